//! What a rank does for each micro-batch beside moving rows: the costs that grow with the number of ranks.

use std::cell::Cell;

/// What a rank has done in its handle so far, beside reading and writing rows. Metadata only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RoleCounts {
    /// Words that this rank has published for ranks of its node.
    pub published: u64,
    /// Words of other ranks that had to reach a value before it could go on.
    pub words_watched: u64,
    /// Lists of other ranks that it has read, each in one piece.
    pub lists_read: u64,
    /// Bytes of those lists.
    pub list_bytes: u64,
    /// Messages that it has sent to other nodes: each a batch of puts that is applied as one.
    pub far_messages: u64,
    /// Bytes of those messages: lists, rows and sums.
    pub far_bytes: u64,
}

impl std::ops::AddAssign for RoleCounts {
    fn add_assign(&mut self, other: Self) {
        self.published += other.published;
        self.words_watched += other.words_watched;
        self.lists_read += other.lists_read;
        self.list_bytes += other.list_bytes;
        self.far_messages += other.far_messages;
        self.far_bytes += other.far_bytes;
    }
}

/// They belong to the handle's thread.
#[derive(Default)]
pub(in crate::moe) struct Counting(Cell<RoleCounts>);

impl Counting {
    fn change(&self, change: impl FnOnce(&mut RoleCounts)) {
        let mut counts = self.0.get();
        change(&mut counts);
        self.0.set(counts);
    }

    pub(in crate::moe) fn published(&self, words: u64) {
        self.change(|counts| counts.published += words);
    }

    pub(in crate::moe) fn words(&self, words: u64) {
        self.change(|counts| counts.words_watched += words);
    }

    pub(in crate::moe) fn lists(&self, lists: u64, bytes: u64) {
        self.change(|counts| {
            counts.lists_read += lists;
            counts.list_bytes += bytes;
        });
    }

    pub(in crate::moe) fn far(&self, messages: u64, bytes: u64) {
        self.change(|counts| {
            counts.far_messages += messages;
            counts.far_bytes += bytes;
        });
    }

    pub(super) fn get(&self) -> RoleCounts {
        self.0.get()
    }
}
