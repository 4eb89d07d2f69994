//! An epoch word: the one store that makes everything written before it visible.
//!
//! *Writer* (one rank): fills a buffer with plain stores, then [`publish`]es the epoch with release order. It may fill
//! that buffer again only when it knows, from the readers' own words, that none of them still reads the old contents.
//! *Readers* (any number): [`reached`] loads with acquire order; when it says yes, all that the writer wrote before is
//! visible. Words only grow, so a reader that looks late sees a larger value, never a missed one.

use crate::loom_facade::{AtomicU64, Ordering};

/// Makes all earlier writes of this thread visible to whoever sees `epoch`.
pub(crate) fn publish(word: &AtomicU64, epoch: u64) {
    word.store(epoch, Ordering::Release);
}

/// Whether the writer has published `epoch` or a later one.
pub(crate) fn reached(word: &AtomicU64, epoch: u64) -> bool {
    word.load(Ordering::Acquire) >= epoch
}
