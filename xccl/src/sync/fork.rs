//! Whether this process is the one that something was made in, or a fork of it.
//!
//! A child has copies of this process's words and locks, maps the same shared memory, and has none of its other threads. So nothing
//! of a communicator may be used there. Asking for the process's number would be a system call; instead the C library is asked once
//! to count forks in the child, and what was made keeps the count.

use std::sync::Once;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

/// Forks between the program's first process and this one.
static FORKS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count() {
    FORKS.fetch_add(1, Relaxed);
}

/// Keeps in which process it was made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    forks: u32,
    pid: u32,
}

impl Origin {
    pub(crate) fn new() -> Self {
        static REGISTERED: Once = Once::new();
        // SAFETY: the function stays where it is, and does nothing that is forbidden in a child. If there is no memory for the
        // registration, forks are not noticed, as before.
        REGISTERED.call_once(|| _ = unsafe { libc::pthread_atfork(None, None, Some(count)) });
        Origin { forks: FORKS.load(Relaxed), pid: std::process::id() }
    }

    /// Whether this process was forked from that one. Costs a load.
    #[inline]
    pub(crate) fn is_elsewhere(&self) -> bool {
        FORKS.load(Relaxed) != self.forks
    }

    /// The process that it was made in.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }
}
