//! The symmetric heap's allocator: first fit over a sorted list of free blocks, in two parts.
//!
//! Blocks of the lower part are their owner's: it lends out `&mut [u8]` of them, so nobody else may ever write there. Blocks of
//! the upper part are *shared*: any rank may write there, so that nobody gets a reference. A put that is late may still arrive
//! after its block has been given back; therefore what has been shared once stays so. The border between the parts moves down
//! as shared blocks need it, never up, and whoever has seen it at some time has not seen too low a one since.

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
        let needed = needed(bytes);
        let Some(i) = self.free.iter().position(|&(_, len)| len >= needed) else {
            return Err(Error::HeapExhausted {
                requested: bytes,
                largest_free: self.largest_free(),
                total: self.total,
            });
        };
        let (start, len) = self.free[i];
        if len == needed {
            self.free.remove(i);
        } else {
            self.free[i] = (start + needed, len - needed);
        }
        Ok(start)
    }

    fn largest_free(&self) -> usize {
        self.free.iter().map(|&(_, len)| len).max().unwrap_or(0)
    }

    /// Bytes of the free block that ends at `end`.
    fn free_before(&self, end: usize) -> usize {
        self.free.last().filter(|(start, len)| start + len == end).map_or(0, |&(_, len)| len)
    }

    /// Bytes of the free block that starts at `start`.
    fn free_from(&self, start: usize) -> usize {
        self.free.first().filter(|&&(s, _)| s == start).map_or(0, |&(_, len)| len)
    }

    /// Takes the last `bytes` of the free block at the end away.
    fn shrink(&mut self, bytes: usize) {
        if let Some((_, len)) = self.free.last_mut() {
            *len -= bytes;
            if *len == 0 {
                self.free.pop();
            }
        }
    }

    pub(crate) fn release(&mut self, start: usize, bytes: usize) {
        let len = needed(bytes);
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

/// What a block of `bytes` takes.
fn needed(bytes: usize) -> usize {
    bytes.max(1).checked_next_multiple_of(HEAP_ALIGN).unwrap_or(usize::MAX)
}

/// One rank's heap: its own blocks below, shared ones above.
pub(crate) struct Heap {
    own: HeapAllocator,
    shared: HeapAllocator,
    border: usize,
}

impl Heap {
    pub(crate) fn new(start: usize, bytes: usize) -> Self {
        let shared = HeapAllocator { total: bytes, free: vec![] };
        Heap { own: HeapAllocator::new(start, bytes), shared, border: start + bytes }
    }

    /// From here on the heap is shared, for ever.
    pub(crate) fn border(&self) -> usize {
        self.border
    }

    pub(crate) fn allocate(&mut self, bytes: usize) -> Result<usize> {
        self.own.allocate(bytes)
    }

    pub(crate) fn release(&mut self, start: usize, bytes: usize) {
        self.own.release(start, bytes);
    }

    /// A shared block. The border may move: it has to be published before the block is handed out.
    pub(crate) fn allocate_shared(&mut self, bytes: usize) -> Result<usize> {
        if let Ok(start) = self.shared.allocate(bytes) {
            return Ok(start);
        }
        let lacking = needed(bytes) - self.shared.free_from(self.border);
        let available = self.own.free_before(self.border);
        if lacking > available {
            let at_border = self.shared.free_from(self.border) + available;
            let largest_free = at_border.max(self.shared.largest_free());
            return Err(Error::HeapExhausted { requested: bytes, largest_free, total: self.shared.total });
        }
        self.own.shrink(lacking);
        self.border -= lacking;
        self.shared.release(self.border, lacking);
        self.shared.allocate(bytes)
    }

    pub(crate) fn release_shared(&mut self, start: usize, bytes: usize) {
        self.shared.release(start, bytes);
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

    proptest! {
        #[test]
        fn what_was_shared_once_is_never_lent_as_its_owners(ops in prop::collection::vec((0u8..4, 1usize..9000), 1..200)) {
            let end = 4096 + 65536;
            let mut heap = Heap::new(4096, 65536);
            let mut held: [Vec<(usize, usize)>; 2] = Default::default();
            let mut lowest_shared = end;
            for (op, n) in ops {
                let is_shared = op % 2 == 1;
                let kind = &mut held[usize::from(is_shared)];
                if op < 2 && !kind.is_empty() {
                    let (start, len) = kind.swap_remove(n % kind.len());
                    if is_shared { heap.release_shared(start, len) } else { heap.release(start, len) }
                } else if is_shared {
                    let Ok(start) = heap.allocate_shared(n) else { continue };
                    prop_assert!(start >= heap.border() && start + n <= end && start % HEAP_ALIGN == 0);
                    lowest_shared = lowest_shared.min(start);
                    kind.push((start, n));
                } else if let Ok(start) = heap.allocate(n) {
                    prop_assert!(start >= 4096 && start + n <= heap.border());
                    kind.push((start, n));
                }
                prop_assert!(heap.border() <= lowest_shared);
                let mut all: Vec<_> = held.iter().flatten().copied().collect();
                all.sort();
                prop_assert!(all.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
            }
            let border = heap.border();
            let [own, shared] = held;
            own.into_iter().for_each(|(start, len)| heap.release(start, len));
            shared.into_iter().for_each(|(start, len)| heap.release_shared(start, len));
            let block = |from: usize, to: usize| if from == to { vec![] } else { vec![(from, to - from)] };
            prop_assert_eq!((heap.own.free, heap.shared.free), (block(4096, border), block(border, end)));
        }
    }

    #[test]
    fn shared_blocks_use_what_is_free_on_both_sides_of_the_border() {
        let mut heap = Heap::new(0, 4096);
        let first = heap.allocate_shared(1024).unwrap();
        assert_eq!((first, heap.border()), (3072, 3072));
        heap.release_shared(first, 1024);
        assert_eq!((heap.allocate_shared(2048).unwrap(), heap.border()), (2048, 2048));
        heap.allocate(1024).unwrap();
        let err = heap.allocate_shared(2000).unwrap_err();
        assert!(matches!(err, Error::HeapExhausted { requested: 2000, largest_free: 1024, total: 4096 }), "{err:?}");
        assert!(matches!(heap.allocate_shared(usize::MAX), Err(Error::HeapExhausted { .. })));
    }

    #[test]
    fn a_full_heap_names_the_request_and_what_is_left() {
        let mut heap = HeapAllocator::new(0, 1024);
        heap.allocate(512).unwrap();
        let err = heap.allocate(1000).unwrap_err();
        assert!(matches!(err, Error::HeapExhausted { requested: 1000, largest_free: 512, total: 1024 }));
    }
}
