//! A buffer whose rows are divided among several threads.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use super::area::Area;
use bytemuck::Pod;

/// Parts that a buffer can be divided into.
pub(crate) const MOST_PARTS: usize = 256;

/// Which part each row belongs to.
#[derive(Clone, Copy)]
pub(crate) enum Owners<'a> {
    /// So many rows in turn to each part.
    Blocks(usize),
    /// As listed, row by row.
    Listed(&'a [u16]),
}

/// A buffer of rows that belong to parts. Each part is given to one thread, once, and lends its own rows only: so no two
/// threads reach the same row, whatever numbers they come with.
pub(crate) struct Divided<'a, T> {
    at: *mut T,
    rows: usize,
    /// Elements of a row.
    stride: usize,
    owners: Owners<'a>,
    given: [AtomicU64; MOST_PARTS / 64],
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: sharing it lets threads take parts, which are disjoint pieces of a `&mut [T]`: as sending those.
unsafe impl<T: Send> Sync for Divided<'_, T> {}

/// The rows of one part.
pub(crate) struct Part<'d, T> {
    divided: &'d Divided<'d, T>,
    part: usize,
}

impl<'a, T> Divided<'a, T> {
    /// Rows of `stride` elements; what is left at the end of the buffer belongs to nobody.
    ///
    /// # Panics
    /// When `stride` is 0.
    pub(crate) fn new(buffer: &'a mut [T], stride: usize, owners: Owners<'a>) -> Self {
        let given = [const { AtomicU64::new(0) }; MOST_PARTS / 64];
        Divided { rows: buffer.len() / stride, at: buffer.as_mut_ptr(), stride, owners, given, buffer: PhantomData }
    }

    /// Gives a part to whoever asks first.
    ///
    /// # Panics
    /// When it was given before, or is none.
    pub(crate) fn part(&self, part: usize) -> Part<'_, T> {
        let bit = 1 << (part % 64);
        assert!(self.given[part / 64].fetch_or(bit, Relaxed) & bit == 0, "part {part} is given once");
        Part { divided: self, part }
    }
}

impl<T> Part<'_, T> {
    /// One of the part's rows.
    ///
    /// # Panics
    /// When it is another part's, or none.
    pub(crate) fn row_mut(&mut self, row: usize) -> &mut [T] {
        let Divided { at, rows, stride, owners, .. } = *self.divided;
        let owner = match owners {
            Owners::Blocks(rows) => return self.block_mut(row..row + 1, rows),
            Owners::Listed(owners) => owners[row],
        };
        assert!(row < rows && usize::from(owner) == self.part, "row {row} of {rows} is part {owner}'s");
        // SAFETY: inside the buffer, which nobody else may use for 'a. The row belongs to this part, which was given once,
        // and `&mut self` makes this the only reference to any of its rows.
        unsafe { std::slice::from_raw_parts_mut(at.add(row * stride), stride) }
    }

    /// Rows of a part that has a block of them.
    ///
    /// # Panics
    /// As [`row_mut`](Self::row_mut), and when the rows were listed.
    pub(crate) fn rows_mut(&mut self, rows: Range<usize>) -> &mut [T] {
        let Owners::Blocks(block) = self.divided.owners else { panic!("listed rows need not be neighbours") };
        self.block_mut(rows, block)
    }

    fn block_mut(&mut self, rows: Range<usize>, block: usize) -> &mut [T] {
        let Divided { at, rows: all, stride, .. } = *self.divided;
        let first = self.part * block;
        let inside = first <= rows.start && rows.start <= rows.end && rows.end - first <= block && rows.end <= all;
        assert!(inside, "rows {rows:?} of {all} are not all in part {} of {block}", self.part);
        // SAFETY: as in `row_mut`: inside the buffer, and all of them this part's.
        unsafe { std::slice::from_raw_parts_mut(at.add(rows.start * stride), rows.len() * stride) }
    }
}

impl Area {
    /// `rows` rows of `stride` bytes from `offset` on, divided among threads.
    ///
    /// # Panics
    /// As [`slice_mut`](Self::slice_mut), and when `stride` is no multiple of an element.
    pub(crate) fn divide<'a, T: Pod>(
        &'a mut self,
        offset: usize,
        rows: usize,
        stride: usize,
        owners: Owners<'a>,
    ) -> Divided<'a, T> {
        assert!(stride.is_multiple_of(size_of::<T>()), "rows of {stride} bytes");
        let stride = stride / size_of::<T>();
        Divided::new(self.slice_mut(offset, rows * stride), stride, owners)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_write_their_own_rows_and_all_of_them() {
        let mut buffer = [0u8; 23];
        let owners: [u16; 7] = [0, 1, 2, 1, 0, 2, 2];
        let divided = Divided::new(&mut buffer, 3, Owners::Listed(&owners));
        std::thread::scope(|s| {
            for part in 0..3 {
                let (divided, owners) = (&divided, &owners);
                s.spawn(move || {
                    let mut mine = divided.part(part);
                    for row in (0..7).filter(|&row| usize::from(owners[row]) == part) {
                        mine.row_mut(row).fill(10 * part as u8 + row as u8);
                    }
                });
            }
        });
        for (row, values) in buffer.chunks_exact(3).enumerate() {
            assert_eq!(values, [10 * owners[row] as u8 + row as u8; 3]);
        }
        assert_eq!(buffer[21..], [0; 2]);
    }

    #[test]
    fn a_block_has_its_rows_and_the_last_one_what_is_left() {
        let mut buffer = [0u8; 10];
        let divided = Divided::new(&mut buffer, 2, Owners::Blocks(3));
        assert_eq!(divided.part(0).rows_mut(0..3).len(), 6);
        divided.part(1).row_mut(4).fill(1);
        assert_eq!(buffer, [0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
    }

    #[test]
    #[should_panic(expected = "part 65 is given once")]
    fn a_part_is_given_once() {
        let mut buffer = [0u8; 4];
        let divided = Divided::new(&mut buffer, 1, Owners::Blocks(1));
        divided.part(65);
        divided.part(65);
    }

    #[test]
    #[should_panic(expected = "row 1 of 4 is part 2's")]
    fn a_row_of_another_part_is_refused() {
        Divided::new(&mut [0u8; 4], 1, Owners::Listed(&[1, 2, 1, 1])).part(1).row_mut(1);
    }

    #[test]
    #[should_panic(expected = "rows 2..3 of 4 are not all in part 0 of 2")]
    fn a_row_of_another_block_is_refused() {
        Divided::new(&mut [0u8; 4], 1, Owners::Blocks(2)).part(0).row_mut(2);
    }

    #[test]
    #[should_panic(expected = "rows 4..5 of 4 are not all in part 2 of 2")]
    fn a_row_beyond_the_buffer_is_refused() {
        Divided::new(&mut [0u8; 4], 1, Owners::Blocks(2)).part(2).row_mut(4);
    }

    #[test]
    #[should_panic(expected = "rows 1..3 of 4 are not all in part 0 of 2")]
    fn rows_that_reach_into_another_block_are_refused() {
        Divided::new(&mut [0u8; 4], 1, Owners::Blocks(2)).part(0).rows_mut(1..3);
    }
}
