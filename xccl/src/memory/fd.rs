//! Descriptors that arrive as bare numbers.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Takes ownership of a descriptor that the kernel has just created for this process.
///
/// `raw` must come from a system call that made it (`SCM_RIGHTS`, `pidfd_open`) and must not have been given to anybody
/// else; this is why the function is private to the crate.
pub(crate) fn own(raw: RawFd) -> OwnedFd {
    // SAFETY: the callers pass a descriptor fresh from the kernel, which nothing else owns.
    unsafe { OwnedFd::from_raw_fd(raw) }
}
