//! A rank's own segment, taken apart: words that peers watch, and areas that one value at a time may write.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use bytemuck::Pod;

use super::mapping::Mapping;
use super::row::Row;

/// The first part of a segment: its words.
pub(crate) struct Words {
    mapping: Arc<Mapping>,
    bytes: usize,
}

/// A part of a segment that belongs to this value alone: whoever holds it may write, and nobody else in this process.
pub(crate) struct Area {
    mapping: Arc<Mapping>,
    range: Range<usize>,
}

/// Takes a segment apart: the words end where the first area begins.
///
/// # Panics
/// When the ranges are not ascending and disjoint, or leave the segment: they are the crate's own.
pub(crate) fn split<const N: usize>(mapping: Arc<Mapping>, ranges: [Range<usize>; N]) -> (Words, [Area; N]) {
    let ascending = ranges.windows(2).all(|pair| pair[0].end <= pair[1].start);
    let ends = ranges.last().map_or(0, |last| last.end);
    assert!(ascending && ranges.iter().all(|r| r.start <= r.end) && ends <= mapping.len(), "areas {ranges:?}");
    let bytes = ranges.first().map_or(mapping.len(), |first| first.start);
    let words = Words { mapping: mapping.clone(), bytes };
    (words, ranges.map(|range| Area { mapping: mapping.clone(), range }))
}

impl Words {
    /// Where the whole segment is mapped, and its bytes.
    pub(crate) fn address(&self) -> (*const u8, usize) {
        let bytes = self.mapping.len();
        (self.mapping.at(0, bytes), bytes)
    }

    /// All of the segment.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn memory(&self) -> &Mapping {
        &self.mapping
    }

    /// The 64-bit word at `offset`.
    pub(crate) fn word64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset + 8 <= self.bytes, "no word at {offset}");
        self.mapping.word64(offset)
    }

    /// The 32-bit word at `offset`.
    pub(crate) fn word32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset + 4 <= self.bytes, "no word at {offset}");
        self.mapping.word32(offset)
    }
}

impl Area {
    fn place<T: Pod>(&self, offset: usize, n: usize) -> usize {
        let len = self.range.len();
        assert!(
            offset <= len && n * size_of::<T>() <= len - offset,
            "{n} values at {offset} of an area of {len} bytes"
        );
        self.range.start + offset
    }

    /// `n` values at `offset`.
    ///
    /// # Panics
    /// When they do not lie inside the area, or not aligned.
    pub(crate) fn slice_mut<T: Pod>(&mut self, offset: usize, n: usize) -> &mut [T] {
        let at = self.mapping.at_mut(self.place::<T>(offset, n), n * size_of::<T>()).cast::<T>();
        assert!(at.is_aligned(), "values at odd offset {offset}");
        // SAFETY: in bounds and aligned as checked, any bytes are a valid `T`; areas are disjoint and not words (`split`), and
        // `&mut self` makes this the only reference into this one. Peers map it read-only.
        unsafe { std::slice::from_raw_parts_mut(at, n) }
    }

    /// The address of the first byte.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.mapping.at_mut(self.range.start, self.range.len())
    }

    /// `n` values at `offset`, for reading.
    ///
    /// # Panics
    /// As [`slice_mut`](Self::slice_mut).
    pub(crate) fn row<T: Pod>(&self, offset: usize, n: usize) -> Row<'_, T> {
        self.mapping.row(self.place::<T>(offset, n), n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::segment::{MemoryFlavour, OwnSegment, Writers};

    fn segment() -> Arc<Mapping> {
        Arc::new(OwnSegment::create(MemoryFlavour::Memfd, Writers::Owner, 4096, false).unwrap().mapping)
    }

    #[test]
    fn an_area_is_read_where_it_was_written() {
        let (words, [_, mut second]) = split(segment(), [64..128, 128..256]);
        second.slice_mut::<u32>(64, 3).copy_from_slice(&[1, 2, 3]);
        let mut read = [0u32; 3];
        second.row(64, 3).copy_to(&mut read);
        assert_eq!(read, [1, 2, 3]);
        assert_eq!(words.word64(56).load(std::sync::atomic::Ordering::Relaxed), 0);
    }

    #[test]
    #[should_panic(expected = "areas")]
    fn areas_that_overlap_are_refused() {
        split(segment(), [0..65, 64..128]);
    }

    #[test]
    #[should_panic(expected = "no word at 60")]
    fn a_word_inside_an_area_is_refused() {
        split(segment(), [64..128, 128..192]).0.word64(60);
    }

    #[test]
    #[should_panic(expected = "17 values at 64")]
    fn values_beyond_an_area_are_refused() {
        split(segment(), [64..192, 192..256]).1[0].slice_mut::<u32>(64, 17);
    }
}
