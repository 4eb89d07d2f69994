//! Where things lie in a segment.

/// Bytes of a cache line: words with different writers never share one.
pub(crate) const LINE: usize = 64;

/// Adds areas one after another and remembers how far it has come.
#[derive(Clone, Default)]
pub(crate) struct Layout {
    end: usize,
}

impl Layout {
    /// Reserves `bytes`, starting on a cache line; returns the offset.
    pub(crate) fn add(&mut self, bytes: usize) -> usize {
        self.add_aligned(bytes, LINE)
    }

    /// Reserves `bytes`, starting at a multiple of `align` (a power of two); returns the offset.
    pub(crate) fn add_aligned(&mut self, bytes: usize, align: usize) -> usize {
        let start = self.end.next_multiple_of(align);
        self.end = start + bytes;
        start
    }

    /// The bytes needed so far, rounded up to a page.
    pub(crate) fn bytes(&self) -> usize {
        self.end.next_multiple_of(4096)
    }
}
