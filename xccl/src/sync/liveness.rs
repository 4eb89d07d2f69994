//! Which peers' processes are still alive: the kernel's word, not silence.

use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::memory::fd;

/// One pidfd per rank of another process.
pub(crate) struct Liveness {
    pidfds: Vec<(usize, OwnedFd)>,
}

impl Liveness {
    /// Watches the process of each rank. A process that this one cannot see (another pid namespace) is not watched: its
    /// death then ends in a deadline.
    pub(crate) fn watch(pids: &[u32]) -> Self {
        let own = std::process::id();
        let others = pids.iter().enumerate().filter(|&(_, &pid)| pid != own && pid != 0);
        let pidfds = others.filter_map(|(rank, &pid)| Some((rank, pidfd_open(pid)?))).collect();
        Liveness { pidfds }
    }

    /// The ranks whose processes have ended.
    pub(crate) fn dead(&self) -> Vec<usize> {
        let mut fds: Vec<_> = self.pidfds.iter().map(|(_, fd)| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        if fds.is_empty() || poll(&mut fds, PollTimeout::ZERO).unwrap_or(0) == 0 {
            return vec![];
        }
        let ended = |fd: &PollFd| fd.revents().is_some_and(|r| !r.is_empty());
        self.pidfds.iter().zip(&fds).filter(|(_, fd)| ended(fd)).map(|((rank, _), _)| *rank).collect()
    }
}

fn pidfd_open(pid: u32) -> Option<OwnedFd> {
    // SAFETY: the call takes two numbers and touches no memory.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    (raw >= 0).then(|| fd::own(raw as i32))
}
