//! The launcher's signals, received in its main loop instead of by handlers.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;

/// Passed on to the ranks. SIGTSTP also stops the launcher, so that the shell notices.
const PASSED_ON: [Signal; 9] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGTERM,
    Signal::SIGCONT,
    Signal::SIGTSTP,
    Signal::SIGWINCH,
];

/// What the launcher reacts to.
pub enum Event {
    /// A child changed its state; the first one of those that did so at once.
    Child(Pid),
    Signal(Signal),
}

/// Keeps the signals blocked in this thread and in those that it starts.
pub struct Signals {
    fd: SignalFd,
    before: SigSet,
}

impl Signals {
    pub fn catch() -> Result<Self> {
        // SAFETY: the default action is no handler that could do anything unsafe. A parent that ignores SIGCHLD would
        // otherwise have handed that down, and the ranks' exit codes would be lost.
        unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }.context("catching signals")?;
        let caught: SigSet = PASSED_ON.into_iter().chain([Signal::SIGCHLD]).collect();
        let before = caught.thread_swap_mask(SigmaskHow::SIG_BLOCK).context("catching signals")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let fd = SignalFd::with_flags(&caught, flags).context("catching signals")?;
        Ok(Signals { fd, before })
    }

    /// The mask that a rank starts with.
    pub fn before(&self) -> SigSet {
        self.before
    }

    /// The next event, or `None` once `patience` (without end if `None`) is over.
    pub fn next(&self, patience: Option<Duration>) -> Result<Option<Event>> {
        loop {
            if let Some(event) = self.pending()? {
                return Ok(Some(event));
            }
            // A millisecond more, as the rest of a division would make this spin.
            let timeout = patience.map_or(PollTimeout::NONE, |p| {
                PollTimeout::try_from(p + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            });
            match poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) => return Ok(None),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("waiting for the ranks"),
            }
        }
    }

    fn pending(&self) -> Result<Option<Event>> {
        while let Some(info) = self.fd.read_signal().context("receiving a signal")? {
            match Signal::try_from(info.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) => return Ok(Some(Event::Child(Pid::from_raw(info.ssi_pid as i32)))),
                Ok(signal) => return Ok(Some(Event::Signal(signal))),
                Err(_) => {}
            }
        }
        Ok(None)
    }

    /// Waits until the other end of `pipe` is closed. A signal that asks to end breaks that off and gives its exit code.
    pub fn until_closed(&self, pipe: impl AsFd) -> Result<Option<u8>> {
        loop {
            while let Some(event) = self.pending()? {
                if let Event::Signal(s @ (Signal::SIGHUP | Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM)) = event
                {
                    return Ok(Some(128 + s as u8));
                }
            }
            let mut fds =
                [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN), PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) if fds[1].any() == Some(true) => return Ok(None),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("waiting for the ranks' output"),
            }
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // It was this thread's mask before, so it is a valid one.
        let _ = self.before.thread_set_mask();
    }
}
