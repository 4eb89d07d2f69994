//! Which peers' processes are still alive: the kernel's word, not silence.

use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::memory::fd;

/// One pidfd per rank of another process.
pub(crate) struct Liveness {
    pidfds: Vec<(usize, OwnedFd)>,
    /// The ranks of this very process.
    own: Vec<usize>,
}

impl Liveness {
    /// Watches the process of each rank. A process that this one cannot see (another pid namespace) is not watched: its
    /// death then ends in a deadline. Nor is a rank of another node, which has `None`.
    pub(crate) fn watch(pids: impl Iterator<Item = Option<u32>>) -> Self {
        let this = std::process::id();
        let near = pids.enumerate().filter_map(|(rank, pid)| Some((rank, pid.filter(|&pid| pid != 0)?)));
        let (own, others): (Vec<_>, Vec<_>) = near.partition(|&(_, pid)| pid == this);
        let pidfds = others.into_iter().filter_map(|(rank, pid)| Some((rank, pidfd_open(pid)?))).collect();
        Liveness { pidfds, own: own.into_iter().map(|(rank, _)| rank).collect() }
    }

    /// Whether the rank's process has ended, where this one can know.
    pub(crate) fn has_ended(&self, rank: usize) -> Option<bool> {
        if self.own.contains(&rank) {
            return Some(false);
        }
        let at = self.pidfds.binary_search_by_key(&rank, |(rank, _)| *rank).ok()?;
        let mut fd = [PollFd::new(self.pidfds[at].1.as_fd(), PollFlags::POLLIN)];
        // An error of poll says nothing: the next look may.
        Some(poll(&mut fd, PollTimeout::ZERO).is_ok_and(|ready| ready > 0))
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
