//! What a handle points to: a shell that outlives its contents.

use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

use crate::boundary::{Failure, Outcome};

/// The first field of what a handle points to. Says what kind of handle it is, and is cleared when it is destroyed.
///
/// The shell around the contents is never freed (some 64 bytes for each handle that was ever made), so that a handle that
/// is used or destroyed once more is recognised instead of read from memory that belongs to someone else.
pub(crate) struct Magic(AtomicU64);

/// A type that C holds pointers to.
pub(crate) trait Handle: Sized + Sync + 'static {
    const MAGIC: u64;
    /// What C's programmer calls it.
    const KIND: &'static str;
    fn magic(&self) -> &Magic;
}

impl Magic {
    pub(crate) fn of<H: Handle>() -> Self {
        Magic(AtomicU64::new(H::MAGIC))
    }

    pub(crate) fn clear(&self) {
        self.0.store(0, Release);
    }
}

/// Shells that were handed out: reachable for ever, so that leak checkers see that they are kept on purpose.
static SHELLS: Mutex<Vec<usize>> = Mutex::new(vec![]);

/// Hands a shell to C.
pub(crate) fn hand_out<H: Handle>(shell: H) -> *mut H {
    let at = Box::into_raw(Box::new(shell));
    SHELLS.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(at.expose_provenance());
    at
}

/// The shell behind a handle of C's.
///
/// # Safety
/// `handle` is null, or points to memory that may be read, as all that [`hand_out`] has given does for ever.
pub(crate) unsafe fn shell<H: Handle>(handle: *mut H, name: &str) -> Outcome<&'static H> {
    if handle.is_null() {
        return Err(Failure::argument(format!("{name} is a null handle: expected {}", H::KIND)));
    }
    let wrong = || format!("{name} ({handle:p}) is not {}, or was destroyed", H::KIND);
    if !handle.is_aligned() {
        return Err(Failure::argument(wrong()));
    }
    // SAFETY: not null, aligned, and readable as the caller has promised; all kinds of shell begin with their `Magic`
    // (`repr(C)`), and nothing beyond it is looked at before it has said that this is one of the kind.
    let magic = unsafe { &*handle.cast::<Magic>() };
    if magic.0.load(Acquire) != H::MAGIC {
        return Err(Failure::argument(wrong()));
    }
    // SAFETY: the magic number says that `hand_out::<H>` made it; shells are never freed and only shared.
    Ok(unsafe { &*handle })
}

/// The refusal of a handle that was destroyed while this call was on its way.
pub(crate) fn destroyed<H: Handle>(name: &str) -> Failure {
    Failure::argument(format!("{name} is {} that was destroyed", H::KIND))
}
