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
    /// death then ends in a deadline. Nor is a rank of another node, which has `None`.
    pub(crate) fn watch(pids: impl Iterator<Item = Option<u32>>) -> Self {
        let own = std::process::id();
        let others =
            pids.enumerate().filter_map(|(rank, pid)| Some((rank, pid.filter(|&pid| pid != own && pid != 0)?)));
        let pidfds = others.filter_map(|(rank, pid)| Some((rank, pidfd_open(pid)?))).collect();
        Liveness { pidfds }
    }

    /// The first of the ranks whose processes have ended that `counts`. Allocates nothing: a wait may look often.
    pub(crate) fn first_dead(&self, counts: impl Fn(usize) -> bool) -> Option<usize> {
        self.pidfds.chunks(AT_ONCE).find_map(|watched| {
            let mut fds: [_; AT_ONCE] = std::array::from_fn(|i| {
                let (_, fd) = &watched[i.min(watched.len() - 1)];
                PollFd::new(fd.as_fd(), PollFlags::POLLIN)
            });
            let fds = &mut fds[..watched.len()];
            if poll(fds, PollTimeout::ZERO).unwrap_or(0) == 0 {
                return None;
            }
            let ended = |fd: &PollFd| fd.revents().is_some_and(|r| !r.is_empty());
            watched.iter().zip(&*fds).find(|((rank, _), fd)| ended(fd) && counts(*rank)).map(|((rank, _), _)| *rank)
        })
    }
}

/// Descriptors that one system call looks at.
const AT_ONCE: usize = 64;

fn pidfd_open(pid: u32) -> Option<OwnedFd> {
    // SAFETY: the call takes two numbers and touches no memory.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    (raw >= 0).then(|| fd::own(raw as i32))
}
