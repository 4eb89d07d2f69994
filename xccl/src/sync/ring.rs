//! The order of slots in a point-to-point ring: who may write and who may read slot `n % slots`.
//!
//! The ring lies in the sender's outbox: `slots` lines, each with a *turn word* that only the sender writes. Message `n`
//! (counted from 0) goes into slot `n % slots`, whose turn word becomes `n + 1` when it is complete. The receiver waits
//! for exactly that value, so a slot's previous message (a smaller turn) can never be mistaken for the next. In its own
//! outbox the receiver keeps one word, `consumed`: how many messages it has copied out. The sender fills slot `n` only
//! while `n - consumed < slots`: until then the receiver may still be reading it.
//!
//! Turn words are 64 bits and never wrap in practice (2^64 messages). Payload bytes follow the same rule: those of
//! message `n` are free again once `consumed > n`.

use crate::loom_facade::{AtomicU64, Ordering};

/// Whether the sender may fill the slot of message `n`: the receiver has consumed the message that was there.
pub(crate) fn may_fill(consumed: u64, n: u64, slots: u64) -> bool {
    // A receiver that lies (consumed > n) gets its own ring overwritten, which harms nobody else.
    n.wrapping_sub(consumed) < slots || consumed > n
}

/// Marks message `n` as complete.
pub(crate) fn complete(turn: &AtomicU64, n: u64) {
    turn.store(n + 1, Ordering::Release);
}

/// Whether message `n` can be read from its slot.
pub(crate) fn has(turn: &AtomicU64, n: u64) -> bool {
    turn.load(Ordering::Acquire) == n + 1
}

/// Whether message `n` was completed at some time: it may have been consumed since by another thread, and its slot reused.
#[cfg(not(loom))]
pub(crate) fn reached(turn: &AtomicU64, n: u64) -> bool {
    turn.load(Ordering::Acquire) > n
}

/// Tells the sender that all messages before `n` were copied out.
pub(crate) fn release(consumed: &AtomicU64, n: u64) {
    consumed.store(n, Ordering::Release);
}

/// What the receiver has released so far.
pub(crate) fn released(consumed: &AtomicU64) -> u64 {
    consumed.load(Ordering::Acquire)
}
