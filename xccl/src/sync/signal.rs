//! Signals: words that any rank may change and their owner waits on.
//!
//! *Writers* (any number): put their data with plain stores, then [`apply`] an update to the word, which releases them, then
//! ring the owner's bell if it sleeps (see [`bell`](super::bell): any rank may have to, so a waiter names whom it waits for, or
//! anyone). *The owner* looks with acquire order. Updates by several writers add up: each is one atomic operation that goes on
//! from the last one, so that whoever sees the sum has acquired what all of them have released before.

use crate::loom_facade::{AtomicU64, Ordering};

/// How a signal changes its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// The word becomes this.
    Set(u64),
    /// This is added to the word; past the largest number it goes on from 0.
    Add(u64),
}

/// What a word is waited to become, as an unsigned number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Equal to this.
    Eq(u64),
    /// Different from this.
    Ne(u64),
    /// Greater than this.
    Gt(u64),
    /// This or greater.
    Ge(u64),
    /// Less than this.
    Lt(u64),
    /// This or less.
    Le(u64),
}

impl Until {
    /// Whether a value is what is waited for.
    ///
    /// ```
    /// assert!(xccl::Until::Ge(3).holds(4));
    /// ```
    pub fn holds(self, value: u64) -> bool {
        match self {
            Until::Eq(other) => value == other,
            Until::Ne(other) => value != other,
            Until::Gt(other) => value > other,
            Until::Ge(other) => value >= other,
            Until::Lt(other) => value < other,
            Until::Le(other) => value <= other,
        }
    }
}

/// Changes the word; whoever sees the new value sees all earlier writes of this thread.
pub(crate) fn apply(word: &AtomicU64, update: Update) {
    match update {
        Update::Set(value) => word.store(value, Ordering::Release),
        Update::Add(value) => _ = word.fetch_add(value, Ordering::AcqRel),
    }
}

/// The word, if it is what is waited for; what was written before it became so is then visible.
pub(crate) fn look(word: &AtomicU64, until: Until) -> Option<u64> {
    let value = word.load(Ordering::Acquire);
    until.holds(value).then_some(value)
}
