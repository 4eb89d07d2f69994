//! A tiny process that outlives a killed launcher just long enough to end what the job has left.
//!
//! Its standard input is a pipe of which the launcher alone holds the writing end: first the launch's id, then the process
//! group of each rank, as the rank itself writes it between fork and exec. A program thus never runs unguarded, whenever the
//! launcher is killed. The end of the pipe is the sign to act.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;
use std::{io, thread};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, setsid};

pub const SUBCOMMAND: &str = "__guard";

/// Shown by `ps`, and not matched by a `pkill -9 xccl`, which must not take the guard with the launcher.
const NAME: &str = "rank-guard";

/// Marks what a launcher has started. Not the job's id: two launchers may start ranks of one job on one machine.
pub const MARK: &str = "XCCL_LAUNCH";

/// Length of a launch's id.
const LAUNCH: usize = 32;

/// The launcher's end.
pub struct Guard {
    child: Child,
    pipe: ChildStdin,
}

impl Guard {
    pub fn start(launch: &str) -> Result<Self> {
        // The file that runs now, even if its name leads to another one by now.
        let mut command = Command::new("/proc/self/exe");
        command.arg0(NAME).arg(SUBCOMMAND).env_clear().current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: setsid is async-signal-safe.
        unsafe { command.pre_exec(|| Ok(setsid().map(drop)?)) };
        let mut child =
            command.spawn().context("cannot start the guard process from /proc/self/exe; is /proc mounted?")?;
        let mut pipe = child.stdin.take().context("the guard process has no standard input")?;
        pipe.write_all(launch.as_bytes()).context("telling the guard process of the launch")?;
        Ok(Guard { child, pipe })
    }

    /// Where a rank announces its process group.
    pub fn pipe(&self) -> RawFd {
        self.pipe.as_raw_fd()
    }

    /// Kills what is left of the ranks and of their children, and waits until that is done.
    pub fn end(self) {
        let Guard { mut child, pipe } = self;
        drop(pipe);
        // It ends by itself once its input does.
        let _ = child.wait();
    }
}

/// Puts the calling process's group under guard. For use between fork and exec.
pub fn announce(pipe: RawFd) -> io::Result<()> {
    let record = nix::unistd::getpid().as_raw().to_ne_bytes();
    // SAFETY: the record is as long as said. The descriptor is open: the launcher keeps it until all ranks are started.
    // write is async-signal-safe, and so short a one to a pipe is not split.
    let written = unsafe { libc::write(pipe, record.as_ptr().cast(), record.len()) };
    if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The guard's end.
pub fn watch() -> Result<()> {
    // The launcher's blocked signals stay blocked here: what asks the launcher to end is not for the guard.
    let _ = nix::sys::prctl::set_name(c"rank-guard");
    let mut told = vec![];
    io::stdin().read_to_end(&mut told).context("reading from the launcher")?;
    let Some((launch, groups)) = told.split_at_checked(LAUNCH) else { return Ok(()) };
    for group in groups.chunks_exact(size_of::<i32>()) {
        let group = group.try_into().map_or(0, i32::from_ne_bytes);
        // 0 and 1 would mean the guard's own group and everybody.
        if group > 1 {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    }
    let mark = [MARK.as_bytes(), b"=", launch].concat();
    // A process may fork while it is looked for; a round that finds none ends this. The bound is for those that the kernel
    // does not let go.
    for _ in 0..100 {
        if kill_marked(&mark) == 0 {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Kills the processes that were started with `mark` in their environment: the launch's, in whatever session they are now.
fn kill_marked(mark: &[u8]) -> usize {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = names.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let marked = pids.filter(|pid| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == mark)
    });
    marked.filter(|&pid| kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok()).count()
}
