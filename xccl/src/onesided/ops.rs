//! What may be done to another rank's shared memory, each operation in one place: check the piece, then go the way on which
//! the rank is reached.

use std::sync::atomic::Ordering::{AcqRel, Acquire, Release, SeqCst};
use std::sync::atomic::{AtomicU64, fence};
use std::time::{Duration, Instant};

use super::Remote;
use super::far::{ToFar, told};
use crate::comm::inner::{CommInner, lock};
use crate::comm::layout::HEAP_START;
use crate::error::{Error, Result};
use crate::fabric::plane::Change;
use crate::memory::mapping::Mapping;
use crate::memory::stream;
use crate::sync::progress::{Operation, Waiting};
use crate::sync::signal::{self, Until, Update};

const DURING: Operation = Operation::OneSided;

/// How a rank's shared memory is reached.
enum Reach<'a> {
    /// By load and store.
    Near(&'a Mapping),
    /// Over the plane.
    Far(ToFar<'a>),
}

impl CommInner {
    /// A block of this rank's heap that any rank may write from now on.
    pub(super) fn allocate_shared(&self, bytes: usize) -> Result<usize> {
        self.check_process()?;
        let mut heap = lock(&self.heap);
        let before = heap.border();
        let offset = heap.allocate_shared(bytes)?;
        let border = heap.border() as u64;
        // Published under the lock: the border never moves back.
        self.fabric.outbox.word64(self.layout.border).store(border, Release);
        if heap.border() != before {
            self.fabric.far().for_each(|(rank, far)| far.tell(rank, self.layout.border, border));
        }
        Ok(offset)
    }

    fn reach(&self, rank: usize, during: Operation) -> Reach<'_> {
        match (&self.fabric.peer(rank).near, self.fabric.far_to(rank)) {
            (None, Some(far)) => Reach::Far(ToFar::new(self, far, rank, during)),
            (Some(near), _) => Reach::Near(&near.heap),
            // Every rank is one of the two.
            (None, None) => Reach::Near(&self.fabric.heap),
        }
    }

    pub(crate) fn put(&self, to: Remote, data: &[u8]) -> Result<()> {
        self.check_piece(to, data.len())?;
        self.check_target(to.rank)?;
        match self.reach(to.rank, DURING) {
            Reach::Near(heap) => heap.put(to.offset, data),
            Reach::Far(mut there) => there.put_one(to.offset, data, None)?,
        }
        Ok(())
    }

    /// Puts pieces into one area of a rank's memory, by their offsets there; past the caches if so many are to come that they
    /// would not stay there. A signal that follows says that all have arrived.
    pub(crate) fn put_pieces<'a>(
        &self,
        area: Remote,
        past_caches: bool,
        pieces: impl IntoIterator<Item = (usize, &'a [u8])>,
        during: Operation,
    ) -> Result<()> {
        self.check_piece(area, area.bytes)?;
        let inside = pieces.into_iter().map(|(offset, data)| {
            assert!(offset <= area.bytes && data.len() <= area.bytes - offset, "a piece beyond its area");
            (area.offset + offset, data)
        });
        match self.reach(area.rank, during) {
            Reach::Near(heap) => {
                match past_caches {
                    true => inside.for_each(|(offset, data)| heap.put_streaming(offset, data)),
                    false => inside.for_each(|(offset, data)| heap.put(offset, data)),
                }
                stream::end_streaming();
            }
            Reach::Far(mut there) => there.put(inside, None)?,
        }
        Ok(())
    }

    pub(crate) fn get(&self, from: Remote, into: &mut [u8]) -> Result<()> {
        self.check_piece(from, into.len())?;
        self.check_source(from.rank)?;
        match self.reach(from.rank, DURING) {
            Reach::Near(heap) => heap.get(from.offset, into),
            Reach::Far(mut there) => there.get(from, into)?,
        }
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
        self.check_piece(to, data.len())?;
        self.check_target(to.rank)?;
        match self.reach(to.rank, DURING) {
            Reach::Near(heap) => {
                heap.put(to.offset, data);
                self.change(heap, word, |word| signal::apply(word, update));
            }
            Reach::Far(mut there) => there.put_one(to.offset, data, Some(told(word.offset, update)))?,
        }
        Ok(())
    }

    pub(crate) fn signal(&self, word: Remote, update: Update) -> Result<()> {
        self.check_word(word)?;
        self.check_target(word.rank)?;
        match self.reach(word.rank, DURING) {
            Reach::Near(heap) => self.change(heap, word, |word| signal::apply(word, update)),
            Reach::Far(mut there) => there.put([], Some(told(word.offset, update)))?,
        }
        Ok(())
    }

    pub(crate) fn atomic_fetch(&self, word: Remote) -> Result<u64> {
        self.check_word(word)?;
        self.check_source(word.rank)?;
        match self.reach(word.rank, DURING) {
            Reach::Near(heap) => Ok(heap.shared_word(word.offset).load(Acquire)),
            Reach::Far(mut there) => there.fetch(word.offset, Change::Nothing),
        }
    }

    pub(crate) fn atomic_swap(&self, word: Remote, value: u64) -> Result<u64> {
        self.fetch_and(word, Change::Swap(value), |word| word.swap(value, AcqRel))
    }

    pub(crate) fn atomic_fetch_add(&self, word: Remote, value: u64) -> Result<u64> {
        self.fetch_and(word, Change::Add(value), |word| word.fetch_add(value, AcqRel))
    }

    pub(crate) fn atomic_compare_swap(&self, word: Remote, expected: u64, value: u64) -> Result<u64> {
        self.fetch_and(word, Change::CompareSwap(expected, value), |word| {
            word.compare_exchange(expected, value, AcqRel, Acquire).unwrap_or_else(|found| found)
        })
    }

    /// Changes a word, here by `near` or there by `far`, and gives what it was before.
    fn fetch_and(&self, word: Remote, far: Change, near: impl FnOnce(&AtomicU64) -> u64) -> Result<u64> {
        self.check_word(word)?;
        self.check_target(word.rank)?;
        match self.reach(word.rank, DURING) {
            Reach::Near(heap) => Ok(self.change(heap, word, near)),
            Reach::Far(mut there) => there.fetch(word.offset, far),
        }
    }

    /// Changes a word of another rank, which may sleep until it has changed. The word was checked before.
    fn change<T>(&self, heap: &Mapping, word: Remote, change: impl FnOnce(&AtomicU64) -> T) -> T {
        let before = change(heap.shared_word(word.offset));
        self.notify(word.rank);
        before
    }

    /// Puts what this rank does to `rank`'s memory from now on after what it has done before.
    pub(crate) fn fence(&self, rank: usize) -> Result<()> {
        self.check_rank(rank)?;
        match self.reach(rank, DURING) {
            // Stores past the caches were put in order by who made them.
            Reach::Near(_) => fence(SeqCst),
            // Puts of two batches may arrive in any order.
            Reach::Far(mut there) => there.settle()?,
        }
        Ok(())
    }

    /// Returns when all that this rank has done to others' memory is visible to everyone.
    pub(crate) fn quiet(&self) -> Result<()> {
        fence(SeqCst);
        self.fabric.far().try_for_each(|(rank, far)| ToFar::new(self, far, rank, DURING).settle())
    }

    /// How long a rank takes to answer, or why it does not.
    pub(super) fn probe(&self, rank: usize, within: Duration) -> Result<Duration> {
        let started = Instant::now();
        self.check_rank(rank)?;
        self.check_partner_lives(rank, Operation::Probe)?;
        if let Some(far) = self.fabric.far_to(rank) {
            ToFar::within(self, far, rank, Operation::Probe, within).round_trip()?;
        }
        Ok(started.elapsed())
    }

    /// Waits for a word of this rank's own heap, at an offset that was checked before.
    pub(crate) fn signal_wait(&self, from: Option<usize>, offset: usize, until: Until) -> Result<u64> {
        self.check_process()?;
        let word = self.own_word(offset);
        let what = Waiting { operation: Operation::SignalWait, epoch: offset as u64, peer: from };
        self.wait(what, || signal::look(word, until))
    }

    /// The word of this rank's own heap at an offset that was checked before.
    pub(crate) fn own_word(&self, offset: usize) -> &AtomicU64 {
        self.fabric.heap.shared_word(offset)
    }

    /// A rank that has left may have done so because of a death that it was told of.
    fn check_target(&self, rank: usize) -> Result<()> {
        self.check_partner(rank, DURING).map_err(|err| match err {
            Error::PeerLeft { .. } => self.or_the_end(err, DURING, 0),
            err => err,
        })
    }

    /// A rank that has left has done nothing to what it has written before; but one of another node does not answer any more.
    fn check_source(&self, rank: usize) -> Result<()> {
        match self.check_partner(rank, DURING) {
            Err(Error::PeerLeft { .. }) if self.is_near(rank) => Ok(()),
            Err(Error::PeerLeft { .. }) => self.check_target(rank),
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
        self.check_rank(piece.rank)?;
        if bytes > piece.bytes {
            let expected = format!("at most {} elements, the bytes of the piece of shared memory", piece.bytes);
            return Err(Error::Shape { what: "the data", given: bytes, expected });
        }
        let is_shared = self.check_shared(piece);
        match self.fabric.far_to(piece.rank) {
            // It may have been told of by a third rank, before its own word has come: what it has sent comes before an answer.
            Some(far) if is_shared.is_err() => {
                self.check_target(piece.rank)?;
                ToFar::new(self, far, piece.rank, DURING).round_trip()?;
                self.check_shared(piece)
            }
            _ => is_shared,
        }
    }

    fn check_shared(&self, piece: Remote) -> Result<()> {
        let Remote { rank, offset, bytes } = piece;
        // All ranks' heaps have one size.
        let to = self.fabric.heap.len();
        // The border only moves down, so that one seen late refuses too much, never too little. And whatever a broken peer
        // says, its bell and its list of sleepers are no shared memory. Zero: it has shared nothing yet.
        let border = self.fabric.peer(rank).outbox.word64(self.layout.border).load(Acquire);
        let from = match usize::try_from(border) {
            Ok(0) | Err(_) => to,
            Ok(border) => border.clamp(HEAP_START, to),
        };
        match from <= offset && offset <= to && bytes <= to - offset {
            true => Ok(()),
            false => Err(Error::NotShared { rank, offset, bytes, from, to }),
        }
    }
}
