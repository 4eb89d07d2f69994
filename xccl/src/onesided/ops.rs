//! What may be done to another rank's shared memory, each operation in one place: check the piece, then go the way on which
//! the rank is reached.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Release, SeqCst};
use std::sync::atomic::{AtomicU64, fence};

use super::Remote;
use crate::comm::inner::{CommInner, lock};
use crate::comm::layout::HEAP_START;
use crate::error::{Error, Result};
use crate::memory::mapping::Mapping;
use crate::memory::stream;
use crate::sync::progress::{Operation, Waiting};
use crate::sync::signal::{self, Until, Update};

const DURING: Operation = Operation::OneSided;

impl CommInner {
    /// A block of this rank's heap that any rank may write from now on.
    pub(super) fn allocate_shared(&self, bytes: usize) -> Result<usize> {
        let mut heap = lock(&self.heap);
        let offset = heap.allocate_shared(bytes)?;
        // Published under the lock: the border never moves back.
        self.fabric.outbox.word64(self.layout.border).store(heap.border() as u64, Release);
        Ok(offset)
    }

    pub(crate) fn put(&self, to: Remote, data: &[u8]) -> Result<()> {
        self.check_piece(to, data.len())?;
        self.check_partner(to.rank, DURING)?;
        self.shared_heap(to.rank).put(to.offset, data);
        Ok(())
    }

    /// Puts pieces into one area of a rank's memory, by their offsets there; past the caches if so many are to come that they
    /// would not stay there. What is to tell of them has to come after a [`fence`](Self::fence).
    pub(crate) fn put_pieces<'a>(
        &self,
        area: Remote,
        past_caches: bool,
        pieces: impl IntoIterator<Item = (usize, &'a [u8])>,
    ) -> Result<()> {
        self.check_piece(area, area.bytes)?;
        let heap = self.shared_heap(area.rank);
        for (offset, data) in pieces {
            self.check_piece(area.skip(offset), data.len())?;
            match past_caches {
                true => heap.put_streaming(area.offset + offset, data),
                false => heap.put(area.offset + offset, data),
            }
        }
        stream::end_streaming();
        Ok(())
    }

    pub(crate) fn get(&self, from: Remote, into: &mut [u8]) -> Result<()> {
        self.check_piece(from, into.len())?;
        self.check_source(from.rank)?;
        self.shared_heap(from.rank).get(from.offset, into);
        Ok(())
    }

    pub(crate) fn put_signal(&self, to: Remote, data: &[u8], word: Remote, update: Update) -> Result<()> {
        if word.rank != to.rank {
            return Err(Error::Shape {
                what: "the signal's rank",
                given: word.rank,
                expected: format!("{}, where the data goes", to.rank),
            });
        }
        self.check_word(word)?;
        self.put(to, data)?;
        self.update(word, |word| signal::apply(word, update));
        Ok(())
    }

    pub(crate) fn signal(&self, word: Remote, update: Update) -> Result<()> {
        self.check_word(word)?;
        self.check_partner(word.rank, DURING)?;
        self.update(word, |word| signal::apply(word, update));
        Ok(())
    }

    pub(crate) fn atomic_fetch(&self, word: Remote) -> Result<u64> {
        self.check_word(word)?;
        self.check_source(word.rank)?;
        Ok(self.shared_heap(word.rank).shared_word(word.offset).load(Acquire))
    }

    pub(crate) fn atomic_swap(&self, word: Remote, value: u64) -> Result<u64> {
        self.check_word(word)?;
        self.check_partner(word.rank, DURING)?;
        Ok(self.update(word, |word| word.swap(value, AcqRel)))
    }

    pub(crate) fn atomic_fetch_add(&self, word: Remote, value: u64) -> Result<u64> {
        self.check_word(word)?;
        self.check_partner(word.rank, DURING)?;
        Ok(self.update(word, |word| word.fetch_add(value, AcqRel)))
    }

    pub(crate) fn atomic_compare_swap(&self, word: Remote, expected: u64, value: u64) -> Result<u64> {
        self.check_word(word)?;
        self.check_partner(word.rank, DURING)?;
        let swap = |word: &AtomicU64| word.compare_exchange(expected, value, AcqRel, Acquire);
        Ok(self.update(word, swap).unwrap_or_else(|found| found))
    }

    /// Changes a word of another rank, which may sleep until it has changed. The word was checked before.
    fn update<T>(&self, word: Remote, change: impl FnOnce(&AtomicU64) -> T) -> T {
        let before = change(self.shared_heap(word.rank).shared_word(word.offset));
        self.notify(word.rank);
        before
    }

    /// Puts what this rank does to `rank`'s memory from now on after what it has done before.
    pub(crate) fn fence(&self, rank: usize) -> Result<()> {
        self.check_rank(rank)?;
        // Mapped memory: stores past the caches are put in order by who makes them, the others by this.
        fence(SeqCst);
        Ok(())
    }

    /// Returns when all that this rank has done to others' memory is visible to everyone.
    pub(crate) fn quiet(&self) -> Result<()> {
        fence(SeqCst);
        Ok(())
    }

    /// Waits for a word of this rank's own heap, at an offset that was checked before.
    pub(crate) fn signal_wait(&self, from: Option<usize>, offset: usize, until: Until) -> Result<u64> {
        let word = self.shared_heap(self.rank).shared_word(offset);
        let what = Waiting { operation: Operation::SignalWait, epoch: offset as u64, peer: from };
        self.wait(what, || signal::look(word, until))
    }

    /// The word of this rank's own heap at an offset that was checked before.
    pub(crate) fn own_word(&self, offset: usize) -> &AtomicU64 {
        self.shared_heap(self.rank).shared_word(offset)
    }

    /// A rank's heap, which is mapped: every rank of this machine is.
    pub(crate) fn shared_heap(&self, rank: usize) -> &Mapping {
        &self.fabric.peer(rank).heap
    }

    /// A rank that has left has done nothing to what it has written before.
    fn check_source(&self, rank: usize) -> Result<()> {
        match self.check_partner(rank, DURING) {
            Err(Error::PeerLeft { .. }) => Ok(()),
            other => other,
        }
    }

    fn check_word(&self, word: Remote) -> Result<()> {
        let Remote { rank, offset, bytes } = word;
        if bytes < 8 || !offset.is_multiple_of(8) {
            return Err(Error::NoWord { rank, offset, bytes });
        }
        self.check_piece(word, 8)
    }

    /// Whether a piece is all shared memory, and has room for `bytes`.
    pub(crate) fn check_piece(&self, piece: Remote, bytes: usize) -> Result<()> {
        let Remote { rank, offset, bytes: room } = piece;
        self.check_rank(rank)?;
        if bytes > room {
            let expected = format!("at most {room} elements, the bytes of the piece of shared memory");
            return Err(Error::Shape { what: "the data", given: bytes, expected });
        }
        let to = self.shared_heap(rank).len();
        // The border only moves down, so that one seen late refuses too much, never too little. And whatever a broken peer
        // says, its bell and its list of sleepers are no shared memory.
        let border = self.fabric.peer(rank).outbox.word64(self.layout.border).load(Acquire);
        let from = usize::try_from(border).map_or(to, |border| border.clamp(HEAP_START, to));
        match from <= offset && offset <= to && room <= to - offset {
            true => Ok(()),
            false => Err(Error::NotShared { rank, offset, bytes: room, from, to }),
        }
    }
}
