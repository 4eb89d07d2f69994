//! One call, several threads: the engine lends them, the call is cut into pieces.
//!
//! A piece is a range of tokens; what is computed for a token depends on nothing else, so the result has the same bits for any
//! number of lanes and whoever takes which piece.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};

use crate::comm::inner::lock;
use crate::error::{Error, Result};
use crate::memory::divided::MOST_PARTS;
use crate::sync::pieces::Pieces;

/// An engine's threads, lent to XCCL for the length of one call. XCCL starts none itself.
///
/// ```
/// use std::sync::Arc;
/// use xccl::{Communicator, Config, DType, Lanes, Moe, MoeConfig, UniqueId};
///
/// /// Starts threads for each call: an engine has a pool.
/// struct Threads;
///
/// impl Lanes for Threads {
///     fn run(&self, lanes: usize, work: &(dyn Fn(usize) + Sync)) {
///         std::thread::scope(|s| {
///             (1..lanes).for_each(|lane| drop(s.spawn(move || work(lane))));
///             work(0);
///         });
///     }
/// }
/// # fn main() -> xccl::Result<()> {
/// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
/// let moe = Moe::new(&comm, MoeConfig::new(128, 512, 4, 8, DType::BF16))?;
/// moe.set_lanes(2, Arc::new(Threads))?;
/// # Ok(())
/// # }
/// ```
pub trait Lanes: Send + Sync {
    /// Calls `work(i)` for each `i` in `0..lanes`, on any threads, and returns when all of these calls have.
    ///
    /// A call that is left out, or comes late, costs time and nothing else: the others do its part. What is shared takes some ten
    /// microseconds or more, so threads should spin for their work, not sleep.
    fn run(&self, lanes: usize, work: &(dyn Fn(usize) + Sync));
}

/// Most lanes of one call.
const MOST_LANES: usize = 64;
/// Pieces per lane: a lane that was held up leaves its share to the others.
const PIECES_PER_LANE: usize = 4;
const _: () = assert!(MOST_LANES * PIECES_PER_LANE <= MOST_PARTS);

/// From so many bytes of rows on a call is shared. With a pool that spins, 0.92 MB copied by two lanes take 0.6 of the time and
/// 0.46 MB 0.68; 0.11 MB gain nothing. Threads that sleep take some 25 us to wake up, longer than such a copy: with them 0.92 MB
/// take 1.6 times as long, and 7 MB break even.
const LEAST_SHARED: usize = 512 << 10;
/// Bytes of rows that a piece should have at least.
const LEAST_PIECE: usize = 128 << 10;

/// The lanes that a handle's calls are shared by.
#[derive(Clone, Default)]
pub(super) struct LaneSet {
    lanes: usize,
    threads: Option<Arc<dyn Lanes>>,
}

/// How many items are cut into pieces.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    items: usize,
    /// Items of each piece but the last.
    pub(super) each: usize,
    pub(super) pieces: usize,
}

impl Cut {
    pub(super) fn range(&self, piece: usize) -> Range<usize> {
        let begin = (piece * self.each).min(self.items);
        begin..(begin + self.each).min(self.items)
    }
}

/// Why a piece is not done.
enum Failure {
    Error(Error),
    Panic(Box<dyn Any + Send>),
}

/// A call's pieces, as its threads see them.
struct Shared<'a> {
    pieces: Pieces,
    work: &'a (dyn Fn(usize) -> Result<()> + Sync),
    /// That of the earliest piece, so that the same input gives the same error.
    failure: Mutex<Option<(usize, Failure)>>,
}

impl Shared<'_> {
    fn take_part(&self) {
        while let Some(piece) = self.pieces.take() {
            let failure = match catch_unwind(AssertUnwindSafe(|| (self.work)(piece))) {
                Ok(Ok(())) => None,
                Ok(Err(err)) => Some(Failure::Error(err)),
                Err(payload) => Some(Failure::Panic(payload)),
            };
            if let Some(failure) = failure {
                let mut first = lock(&self.failure);
                if first.as_ref().is_none_or(|&(earlier, _)| piece < earlier) {
                    *first = Some((piece, failure));
                }
            }
            self.pieces.finish();
        }
    }
}

impl LaneSet {
    pub(super) fn new(lanes: usize, threads: Arc<dyn Lanes>) -> Result<Self> {
        if (1..=MOST_LANES).contains(&lanes) {
            return Ok(LaneSet { lanes, threads: Some(threads) });
        }
        Err(Error::Config { option: "lanes", value: lanes.to_string(), expected: format!("1 to {MOST_LANES}") })
    }

    /// Cuts `items` items that take `bytes` bytes together: into one piece unless it pays to share them.
    pub(super) fn cut(&self, items: usize, bytes: usize) -> Cut {
        let pieces = match self.lanes > 1 && bytes >= LEAST_SHARED {
            // As many for each lane, so that none has to wait for another's last one.
            true => (bytes / (self.lanes * LEAST_PIECE)).clamp(1, PIECES_PER_LANE) * self.lanes,
            false => 1,
        };
        let each = items.div_ceil(pieces);
        // Rounding up may leave less for the last ones than there is.
        Cut { items, each, pieces: if each == 0 { 1 } else { items.div_ceil(each) } }
    }

    /// Does each piece once, on as many threads as it pays. A piece's panic goes on in the caller.
    ///
    /// # Errors
    /// That of the earliest piece that failed.
    pub(super) fn share(&self, cut: Cut, work: &(dyn Fn(usize) -> Result<()> + Sync)) -> Result<()> {
        let Some(threads) = self.threads.as_ref().filter(|_| cut.pieces > 1) else {
            return (0..cut.pieces).try_for_each(work);
        };
        let shared = Shared { pieces: Pieces::new(cut.pieces), work, failure: Mutex::new(None) };
        threads.run(self.lanes.min(cut.pieces), &|_| shared.take_part());
        shared.take_part();
        while !shared.pieces.all_finished() {
            // Only when the threads were not waited for: a piece takes microseconds.
            std::thread::yield_now();
        }
        match shared.failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
            None => Ok(()),
            Some((_, Failure::Error(err))) => Err(err),
            Some((_, Failure::Panic(payload))) => resume_unwind(payload),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    /// What a runner may get wrong, and what it should do.
    #[derive(Clone, Copy, Debug)]
    enum Runner {
        OnThreads,
        InTurn,
        NotAtAll,
        Twice,
        OneOnly,
        WithOddNumbers,
    }

    impl Lanes for Runner {
        fn run(&self, lanes: usize, work: &(dyn Fn(usize) + Sync)) {
            match self {
                Runner::OnThreads => std::thread::scope(|s| (0..lanes).for_each(|i| drop(s.spawn(move || work(i))))),
                Runner::InTurn => (0..lanes).for_each(work),
                Runner::NotAtAll => {}
                Runner::Twice => (0..lanes).chain(0..lanes).for_each(work),
                Runner::OneOnly => work(lanes - 1),
                Runner::WithOddNumbers => [lanes, usize::MAX].into_iter().for_each(work),
            }
        }
    }

    const RUNNERS: [Runner; 6] =
        [Runner::OnThreads, Runner::InTurn, Runner::NotAtAll, Runner::Twice, Runner::OneOnly, Runner::WithOddNumbers];

    #[test]
    fn whatever_a_runner_does_each_item_is_done_once() {
        for (runner, lanes, items) in RUNNERS.into_iter().flat_map(|r| (1..6).map(move |l| (r, l, 17 * l + 1))) {
            let set = LaneSet::new(lanes, Arc::new(runner)).unwrap();
            let cut = set.cut(items, 100 << 20);
            assert_eq!(cut.pieces > 1, lanes > 1, "{lanes} lanes");
            let done: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            let piece = |piece: usize| {
                for i in cut.range(piece) {
                    done[i].fetch_add(1, Relaxed);
                }
                Ok(())
            };
            set.share(cut, &piece).unwrap();
            assert!(done.iter().all(|n| n.load(Relaxed) == 1), "{runner:?} with {lanes} lanes");
        }
    }

    #[test]
    fn pieces_cover_all_items_and_none_is_empty() {
        for (lanes, items, bytes) in
            [(1, 100, 1 << 30), (3, 0, 1 << 30), (3, 1, 1 << 30), (5, 23, 1 << 30), (64, 257, 1 << 30)]
        {
            let cut = LaneSet::new(lanes, Arc::new(Runner::InTurn)).unwrap().cut(items, bytes);
            let covered: Vec<usize> = (0..cut.pieces).flat_map(|piece| cut.range(piece)).collect();
            assert_eq!(covered, (0..items).collect::<Vec<_>>());
            assert!(cut.pieces == 1 || !cut.range(cut.pieces - 1).is_empty(), "{lanes} lanes, {items} items");
        }
        assert_eq!(LaneSet::default().cut(1000, 1 << 30).pieces, 1);
        assert_eq!(LaneSet::new(8, Arc::new(Runner::InTurn)).unwrap().cut(1000, LEAST_SHARED - 1).pieces, 1);
    }

    #[test]
    fn the_earliest_piece_that_fails_is_told_and_the_others_are_done() {
        for runner in RUNNERS {
            let set = LaneSet::new(4, Arc::new(runner)).unwrap();
            let cut = set.cut(16, 100 << 20);
            let done = AtomicUsize::new(0);
            let failed = set.share(cut, &|piece| {
                done.fetch_add(1, Relaxed);
                if piece % 5 == 3 { Err(Error::InvalidRank { rank: piece, world_size: 1 }) } else { Ok(()) }
            });
            assert!(matches!(failed, Err(Error::InvalidRank { rank: 3, .. })), "{runner:?}: {failed:?}");
            assert_eq!(done.load(Relaxed), cut.pieces);
        }
    }

    #[test]
    fn a_panic_in_a_lane_goes_on_in_the_caller_once_all_pieces_are_done() {
        for runner in RUNNERS {
            let set = LaneSet::new(2, Arc::new(runner)).unwrap();
            let cut = set.cut(8, 100 << 20);
            let done = AtomicUsize::new(0);
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                set.share(cut, &|piece| {
                    done.fetch_add(1, Relaxed);
                    assert!(piece != 5, "boom");
                    Ok(())
                })
            }));
            assert_eq!(panicked.unwrap_err().downcast_ref::<&str>(), Some(&"boom"), "{runner:?}");
            assert_eq!(done.load(Relaxed), 8);
        }
    }

    #[test]
    fn a_number_of_lanes_out_of_range_is_named() {
        for lanes in [0, MOST_LANES + 1] {
            let refused = LaneSet::new(lanes, Arc::new(Runner::InTurn)).map(|_| ());
            assert!(matches!(refused, Err(Error::Config { option: "lanes", .. })), "{refused:?}");
        }
    }
}
