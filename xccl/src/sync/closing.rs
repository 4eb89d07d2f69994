//! The end of an epoch word: its writer says that it publishes no epoch from some number on.
//!
//! *Writer* (one rank): publishes epochs in its [epoch word](super::epoch), and when it is done [`close`]s at the next, in a second
//! word. *Readers* (any number) ask what it does in an epoch, [`look`]. They see one of three things, and never change their mind
//! from published to closed or back: an epoch is either published or closed.
//!
//! The race that looks possible: between a look at the epoch word, which has not reached the epoch, and one at the second word, the
//! writer publishes the epoch and closes. So who finds it closed looks at the epoch word again: the store that closed it came after
//! the one that published, and was acquired.

use super::epoch;
use crate::loom_facade::{AtomicU64, Ordering};

/// In the second word: the writer asks its readers to end, too.
pub(crate) const ASKS_TO_END: u64 = 1 << 63;

/// What a writer does in an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Published,
    /// It will never publish it.
    Closed,
    /// That is not known yet.
    Open,
}

/// Says that no epoch from `first` on will be published, perhaps with [`ASKS_TO_END`].
pub(crate) fn close(closed: &AtomicU64, first: u64) {
    closed.store(first, Ordering::Release);
}

/// What the writer of the two words does in `epoch`, which may be one ahead of those it has published.
pub(crate) fn look(published: &AtomicU64, closed: &AtomicU64, epoch: u64) -> Part {
    if epoch::reached(published, epoch) {
        return Part::Published;
    }
    match is_closed(closed, epoch) {
        false => Part::Open,
        true if epoch::reached(published, epoch) => Part::Published,
        true => Part::Closed,
    }
}

/// Whether the writer begins no epoch from `epoch` on. One that it has begun before it may still end.
pub(crate) fn is_closed(closed: &AtomicU64, epoch: u64) -> bool {
    (1..=epoch).contains(&(closed.load(Ordering::Acquire) & !ASKS_TO_END))
}

/// Whether it asks its readers to end.
#[cfg(not(loom))]
pub(crate) fn asks_to_end(closed: &AtomicU64) -> bool {
    closed.load(Ordering::Acquire) & ASKS_TO_END != 0
}
