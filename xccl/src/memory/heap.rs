//! The symmetric heap's allocator: first fit over a sorted list of free blocks.

use crate::error::{Error, Result};

/// Hands out offsets of one rank's symmetric heap. Kept in private memory, so that no peer can damage it.
pub(crate) struct HeapAllocator {
    total: usize,
    /// Sorted, disjoint, never adjacent.
    free: Vec<(usize, usize)>,
}

/// Every block starts on, and takes a multiple of, this many bytes.
pub(crate) const HEAP_ALIGN: usize = 256;

impl HeapAllocator {
    pub(crate) fn new(start: usize, bytes: usize) -> Self {
        let free = if bytes == 0 { vec![] } else { vec![(start, bytes)] };
        HeapAllocator { total: bytes, free }
    }

    pub(crate) fn allocate(&mut self, bytes: usize) -> Result<usize> {
        let needed = bytes.max(1).checked_next_multiple_of(HEAP_ALIGN).unwrap_or(usize::MAX);
        let Some(i) = self.free.iter().position(|&(_, len)| len >= needed) else {
            let largest_free = self.free.iter().map(|&(_, len)| len).max().unwrap_or(0);
            return Err(Error::HeapExhausted { requested: bytes, largest_free, total: self.total });
        };
        let (start, len) = self.free[i];
        if len == needed {
            self.free.remove(i);
        } else {
            self.free[i] = (start + needed, len - needed);
        }
        Ok(start)
    }

    pub(crate) fn release(&mut self, start: usize, bytes: usize) {
        let len = bytes.max(1).next_multiple_of(HEAP_ALIGN);
        let i = self.free.partition_point(|&(s, _)| s < start);
        self.free.insert(i, (start, len));
        if i + 1 < self.free.len() && start + len == self.free[i + 1].0 {
            self.free[i].1 += self.free.remove(i + 1).1;
        }
        if i > 0 && self.free[i - 1].0 + self.free[i - 1].1 == start {
            self.free[i - 1].1 += self.free.remove(i).1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn blocks_never_overlap_and_everything_comes_back(ops in prop::collection::vec((any::<bool>(), 1usize..5000), 1..200)) {
            let mut heap = HeapAllocator::new(4096, 65536);
            let mut held: Vec<(usize, usize)> = vec![];
            for (give_back, n) in ops {
                if give_back && !held.is_empty() {
                    let (start, len) = held.swap_remove(n % held.len());
                    heap.release(start, len);
                } else if let Ok(start) = heap.allocate(n) {
                    prop_assert!(start >= 4096 && start + n <= 4096 + 65536 && start % HEAP_ALIGN == 0);
                    prop_assert!(held.iter().all(|&(s, l)| start + n <= s || s + l <= start));
                    held.push((start, n));
                }
            }
            for (start, len) in held {
                heap.release(start, len);
            }
            prop_assert_eq!(heap.free, vec![(4096, 65536)]);
        }
    }

    #[test]
    fn a_full_heap_names_the_request_and_what_is_left() {
        let mut heap = HeapAllocator::new(0, 1024);
        heap.allocate(512).unwrap();
        let err = heap.allocate(1000).unwrap_err();
        assert!(matches!(err, Error::HeapExhausted { requested: 1000, largest_free: 512, total: 1024 }));
    }
}
