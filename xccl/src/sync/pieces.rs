//! Work in numbered pieces, which threads take one by one.
//!
//! Every thread takes the next number until none is left: one that comes late, twice or not at all changes nothing but the
//! time. The caller takes what nobody else has taken, and then waits for the pieces that others are still at. Finishing a
//! piece releases what was written for it, and the one who finds all pieces finished acquires it.

use crate::loom_facade::{AtomicU64, Ordering};

pub(crate) struct Pieces {
    next: AtomicU64,
    finished: AtomicU64,
    total: u64,
}

impl Pieces {
    pub(crate) fn new(total: usize) -> Self {
        Pieces { next: AtomicU64::new(0), finished: AtomicU64::new(0), total: total as u64 }
    }

    /// A piece that nobody else has or had.
    pub(crate) fn take(&self) -> Option<usize> {
        // Looked at first, so that the counter stays near the total however often somebody asks.
        if self.next.load(Ordering::Relaxed) >= self.total {
            return None;
        }
        let piece = self.next.fetch_add(1, Ordering::Relaxed);
        (piece < self.total).then_some(piece as usize)
    }

    /// To be called once for each piece that was taken, when it is done.
    pub(crate) fn finish(&self) {
        self.finished.fetch_add(1, Ordering::Release);
    }

    /// Whether all pieces are done; what was written for them is then visible.
    pub(crate) fn all_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire) == self.total
    }
}
