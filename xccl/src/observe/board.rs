//! The board: what a rank shows of itself. Its words lie in the rank's outbox, which only that rank writes; readers take copies.
//!
//! - *Waits*: a line for each of up to [`WAITS`] threads that sleep at the same time. A thread claims a line in private memory,
//!   stores whom it waits for, in what and since when, and the operation last; when it is awake it clears the operation. The
//!   fields are stored one by one: a reader may see a mixture of two waits, which costs a wrong word in a message.
//! - *History*: a ring of [`RECORDS`] lines. A record's number is cleared before its fields are stored and stored after them, so
//!   that a reader that finds the same number before and after its copy has a whole one. A call is recorded as it begins, a wait when
//!   it goes to sleep; the end is added when it is over, if the line has not been taken for a later record. The next number is a word
//!   of this process that is read and stored, not added to: an atomic addition waits for all stores before it, which are rows.
//!   Of an exchange of one token by one rank (2.4 us, four calls) it took 4 %, and without it the records take less than can be
//!   measured. So two threads that begin at the same instant may share a record, in which a reader finds something of both.
//! - *Waited*: nanoseconds by peer, added up. Only a wait that was not over at once is counted.
//! - *Counters*: the statistics, stored when a wait goes to sleep, and when one ends after more than [`STALE`]: a rank that is
//!   never kept waiting does not spend time on it, and its counters are old.

use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::process;
use crate::comm::Statistics;
use crate::comm::inner::lock;
use crate::memory::layout::{LINE, Layout};
use crate::memory::mapping::Mapping;
use crate::sync::progress::{Operation, Waiting, now_ns, tick_ns};

/// Threads of a rank whose waits are shown at the same time; those of more are only counted.
pub(crate) const WAITS: usize = 8;
/// Operations that a rank remembers.
pub(crate) const RECORDS: usize = 64;
/// No peer, or any.
pub(crate) const NOBODY: u32 = u32::MAX;
/// Counters that are older are stored again when a wait ends.
const STALE: Duration = Duration::from_millis(10);

const STATISTICS_WORDS: usize = size_of::<Statistics>() / 8;

/// Offsets in the outbox. They depend on the number of ranks only, so that who finds an outbox can read it.
#[derive(Clone, Debug)]
pub(crate) struct BoardLayout {
    pub(crate) world_size: usize,
    /// The rank's state; see [`CommInner`](crate::comm::inner::CommInner).
    pub(crate) state: usize,
    /// Written once: when the communicator was made, and when the process began, in the kernel's ticks.
    pub(crate) identity: usize,
    pub(crate) waits: usize,
    pub(crate) history: usize,
    /// When they were stored, then the words of [`Statistics`].
    pub(crate) counters: usize,
    /// A word per peer, then one for waits for anyone.
    pub(crate) waited: usize,
    /// Written once: the node of each rank, in four bytes.
    pub(crate) nodes: usize,
    pub(crate) end: usize,
}

impl BoardLayout {
    /// After the header, which `layout` has.
    pub(crate) fn new(layout: &mut Layout, world_size: usize) -> Self {
        let state = layout.add(LINE);
        let identity = layout.add(LINE);
        let waits = layout.add(WAITS * LINE);
        let history = layout.add(RECORDS * LINE);
        let counters = layout.add((1 + STATISTICS_WORDS) * 8);
        let waited = layout.add((world_size + 1) * 8);
        let nodes = layout.add(world_size * 4);
        BoardLayout {
            world_size,
            state,
            identity,
            waits,
            history,
            counters,
            waited,
            nodes,
            end: nodes + world_size * 4,
        }
    }

    pub(crate) fn wait(&self, line: usize) -> usize {
        self.waits + line * LINE
    }

    pub(crate) fn record(&self, number: u64) -> usize {
        self.history + (number % RECORDS as u64) as usize * LINE
    }

    pub(crate) fn waited_for(&self, peer: Option<usize>) -> usize {
        self.waited + peer.unwrap_or(self.world_size) * 8
    }
}

/// Offsets in a line of waits.
pub(crate) const WAIT_OPERATION: usize = 0;
pub(crate) const WAIT_PEER: usize = 4;
pub(crate) const WAIT_EPOCH: usize = 8;
pub(crate) const WAIT_SINCE: usize = 16;

/// Words of a record.
pub(crate) const NUMBER: usize = 0;
/// Operation, [`IS_WAIT`], [`FAILED`], and the peer in the upper half.
pub(crate) const WHAT: usize = 1;
pub(crate) const EPOCH: usize = 2;
pub(crate) const BEGAN: usize = 3;
/// 0 while it is not over.
pub(crate) const ENDED: usize = 4;
/// What a collective asks for, in two words; of others they mean nothing.
pub(crate) const ASKED: usize = 5;
/// The bit that tells a wait from a call.
pub(crate) const IS_WAIT: u64 = 1 << 16;
/// The bit that says that it ended with an error.
pub(crate) const FAILED: u64 = 1 << 17;

/// This rank's board, to write.
pub(crate) struct Board {
    own: Arc<Mapping>,
    layout: BoardLayout,
    /// A bit per line of waits that a thread has.
    lines: AtomicU32,
    /// Records so far.
    records: AtomicU64,
    /// When the counters were stored.
    counted: AtomicU64,
    /// What [`take_wait_times`](Self::take_wait_times) has given out, by peer.
    taken: Mutex<Vec<u64>>,
}

/// A wait that others can see.
pub(crate) struct ShownWait {
    line: Option<usize>,
    record: u64,
}

/// A call that others can see. It has failed unless it is said to be [`over`](Self::over).
#[must_use = "dropping it says that the call has failed"]
pub(crate) struct OpenCall<'b> {
    board: &'b Board,
    record: u64,
}

impl OpenCall<'_> {
    /// The call has succeeded.
    #[inline]
    pub(crate) fn over(self) {
        self.board.ends(self.record, true);
        std::mem::forget(self);
    }
}

impl Drop for OpenCall<'_> {
    fn drop(&mut self) {
        self.board.ends(self.record, false);
    }
}

impl Board {
    pub(crate) fn new(own: Arc<Mapping>, layout: &BoardLayout, nodes: &[usize]) -> Self {
        own.word64(layout.identity).store(now_ns(), Relaxed);
        own.word64(layout.identity + 8).store(process::own_start(), Relaxed);
        for (rank, &node) in nodes.iter().enumerate() {
            own.word32(layout.nodes + rank * 4).store(node as u32, Relaxed);
        }
        Board {
            own,
            layout: layout.clone(),
            lines: AtomicU32::new(0),
            records: AtomicU64::new(0),
            counted: AtomicU64::new(0),
            taken: Mutex::new(vec![0; nodes.len()]),
        }
    }

    /// Shows that a thread of this rank goes to sleep.
    pub(crate) fn waits(&self, what: &Waiting) -> ShownWait {
        let now = now_ns();
        let word = what.operation as u64 | IS_WAIT | u64::from(peer_word(what.peer)) << 32;
        let record = self.record([word, what.epoch, now], None);
        let line = self.claim_line();
        if let Some(line) = line {
            let at = self.layout.wait(line);
            self.own.word32(at + WAIT_PEER).store(peer_word(what.peer), Relaxed);
            self.own.word64(at + WAIT_EPOCH).store(what.epoch, Relaxed);
            self.own.word64(at + WAIT_SINCE).store(now, Relaxed);
            self.own.word32(at + WAIT_OPERATION).store(what.operation as u32, Release);
        }
        ShownWait { line, record }
    }

    /// The wait is over.
    pub(crate) fn woke(&self, wait: ShownWait, succeeded: bool) {
        self.add_end(wait.record, now_ns(), succeeded);
        if let Some(line) = wait.line {
            self.own.word32(self.layout.wait(line) + WAIT_OPERATION).store(Operation::Computing as u32, Relaxed);
            self.lines.fetch_and(!(1 << line), Release);
        }
    }

    fn claim_line(&self) -> Option<usize> {
        let free = |used: u32| (used.trailing_ones() < WAITS as u32).then(|| used | (used + 1));
        let before = self.lines.fetch_update(Relaxed, Relaxed, free).ok()?;
        Some(before.trailing_ones() as usize)
    }

    /// Adds to what was waited for a peer, or for anyone.
    pub(crate) fn waited(&self, peer: Option<usize>, took: Duration) {
        self.own.word64(self.layout.waited_for(peer)).fetch_add(took.as_nanos() as u64, Relaxed);
    }

    fn ever_waited(&self, peer: usize) -> u64 {
        self.own.word64(self.layout.waited_for(Some(peer))).load(Relaxed)
    }

    /// Nanoseconds waited for each peer since they were taken.
    pub(crate) fn wait_times(&self) -> Vec<u64> {
        let taken = lock(&self.taken);
        taken.iter().enumerate().map(|(peer, taken)| self.ever_waited(peer) - taken).collect()
    }

    /// Nanoseconds ever waited for each peer.
    #[cfg(feature = "prometheus")]
    pub(crate) fn wait_times_ever(&self) -> Vec<u64> {
        (0..self.layout.world_size).map(|peer| self.ever_waited(peer)).collect()
    }

    /// As [`wait_times`](Self::wait_times), which count from here on. What others see goes on.
    pub(crate) fn take_wait_times(&self) -> Vec<u64> {
        let mut taken = lock(&self.taken);
        let take = |(peer, taken): (usize, &mut u64)| {
            let now = self.ever_waited(peer);
            now - std::mem::replace(taken, now)
        };
        taken.iter_mut().enumerate().map(take).collect()
    }

    /// Records a call that begins.
    #[inline]
    pub(crate) fn begins(&self, operation: Operation, epoch: u64) -> OpenCall<'_> {
        OpenCall { board: self, record: self.enters((operation, epoch), None) }
    }

    /// Records a call that begins, and what it asks for; to be [ended](Self::ends).
    #[inline]
    pub(crate) fn enters(&self, (operation, epoch): (Operation, u64), asked: Option<[u64; 2]>) -> u64 {
        self.record([operation as u64 | u64::from(NOBODY) << 32, epoch, tick_ns()], asked)
    }

    /// The call of that record is over.
    #[inline]
    pub(crate) fn ends(&self, record: u64, succeeded: bool) {
        self.add_end(record, tick_ns(), succeeded);
    }

    #[inline]
    fn record(&self, [what, epoch, began]: [u64; 3], asked: Option<[u64; 2]>) -> u64 {
        let number = self.records.load(Relaxed) + 1;
        self.records.store(number, Relaxed);
        let words = self.own.line(self.layout.record(number));
        words[NUMBER].store(0, Relaxed);
        fence(Release);
        words[WHAT].store(what, Relaxed);
        words[EPOCH].store(epoch, Relaxed);
        words[BEGAN].store(began, Relaxed);
        words[ENDED].store(0, Relaxed);
        if let Some([a, b]) = asked {
            words[ASKED].store(a, Relaxed);
            words[ASKED + 1].store(b, Relaxed);
        }
        words[NUMBER].store(number, Release);
        number
    }

    #[inline]
    fn add_end(&self, record: u64, now: u64, succeeded: bool) {
        let words = self.own.line(self.layout.record(record));
        // Another thread may take the line just now: then a record has a wrong end.
        if words[NUMBER].load(Relaxed) == record {
            if !succeeded {
                words[WHAT].store(words[WHAT].load(Relaxed) | FAILED, Relaxed);
            }
            words[ENDED].store(now, Release);
        }
    }

    /// Whether the counters are to be stored: a wait goes to sleep, or they are old.
    pub(crate) fn counters_are_stale(&self) -> bool {
        tick_ns().saturating_sub(self.counted.load(Relaxed)) > STALE.as_nanos() as u64
    }

    /// Stores the counters.
    pub(crate) fn counts(&self, statistics: &Statistics) {
        let now = tick_ns();
        self.counted.store(now, Relaxed);
        let at = self.layout.counters;
        self.own.word64(at).store(now, Relaxed);
        for (i, &word) in bytemuck::cast_slice::<_, u64>(std::slice::from_ref(statistics)).iter().enumerate() {
            self.own.word64(at + 8 + i * 8).store(word, Relaxed);
        }
    }
}

fn peer_word(peer: Option<usize>) -> u32 {
    peer.map_or(NOBODY, |peer| peer as u32)
}
