//! How a communicator comes to its end, and which rank is named for it.
//!
//! A rank ends in one of three ways: it *leaves* (in order; what it has published stays good), it *aborts* (which ends the
//! communicator for all), or its process *dies*. The first two it says itself, in its state word. Death is told by the kernel to
//! those on its node (pidfd), and between nodes by the end of a connection.
//!
//! One death often brings about others: a rank is told, and exits. Nobody knows the order in which processes have ended, so each
//! rank says in its *cause word* why it holds the communicator to be over, before it returns the error that may make it exit. Who
//! finds a rank dead, or aborted, reads that rank's cause word: there is what it failed of. And it reads the words of all before
//! it asks the kernel, which is cheaper as well. Words of others are believed as far as they can be true: a rank that this one sees
//! alive has not died.
//!
//! The first cause that a rank has found stays its cause. Who has found it by itself rings all bells of the node, so that one look
//! is enough; those that sleep long take turns at looking ([`wait`](crate::sync::wait)).

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Instant;

use super::abort;
use super::bells::Bells;
use super::inner::lock;
use super::layout::CommLayout;
use crate::bootstrap::Star;
use crate::error::{Error, Result};
use crate::fabric::Fabric;
use crate::fabric::far::OUTBOX;
use crate::fabric::plane::{Plane, Update};
use crate::memory::mapping::Mapping;
use crate::sync::Operation;
use crate::sync::bell;
use crate::sync::liveness::Liveness;

/// A far rank that is waited for is asked so often whether it is there.
const BETWEEN_PROBES_MS: u64 = 20;

/// Values of the state word.
pub(crate) const RUNNING: u32 = 1;
pub(crate) const ABORTED: u32 = 2;
pub(crate) const LEFT: u32 = 3;
/// For those that look at the abort this is one still.
pub(crate) const ABORTED_AND_LEFT: u32 = 4;

/// Why a communicator is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The rank's process has ended without leaving.
    Died(usize),
    /// The rank has aborted it.
    Aborted(usize),
}

impl Cause {
    /// As it stands in a cause word, which is 0 at first.
    fn word(self) -> u64 {
        match self {
            Cause::Died(rank) => 1 << 32 | rank as u64,
            Cause::Aborted(rank) => 2 << 32 | rank as u64,
        }
    }

    fn of(word: u64, ranks: usize) -> Option<Self> {
        let rank = Some(word as u32 as usize).filter(|&rank| rank < ranks)?;
        match word >> 32 {
            1 => Some(Cause::Died(rank)),
            2 => Some(Cause::Aborted(rank)),
            _ => None,
        }
    }

    fn rank(self) -> usize {
        let (Cause::Died(rank) | Cause::Aborted(rank)) = self;
        rank
    }
}

/// What a rank knows of the end of its communicator. Shared with the threads that look out for it.
pub(crate) struct Ending {
    rank: usize,
    /// By rank, its outbox, or where what it puts of that lands.
    outboxes: Vec<Arc<Mapping>>,
    own: Arc<Mapping>,
    /// Where an outbox has its owner's state, and its cause word.
    state: usize,
    cause: usize,
    /// Where it has what its owner says of an abort.
    abort: usize,
    /// Where it has the ranks of its owner's node that were seen dead.
    gone: usize,
    nodes: Vec<usize>,
    liveness: Liveness,
    bells: Arc<Bells>,
    plane: OnceLock<(Arc<Plane>, Vec<usize>)>,
    star: Mutex<Star>,
    since: Instant,
    /// By rank, when it was last asked whether it is there: in milliseconds.
    probed: Vec<AtomicU64>,
    known: OnceLock<Cause>,
}

impl Ending {
    pub(crate) fn new(star: Star, fabric: &Fabric, layout: &CommLayout, bells: &Arc<Bells>) -> Self {
        let pids = star.pids().iter().enumerate().map(|(rank, &pid)| star.is_near(rank).then_some(pid));
        Ending {
            rank: star.rank(),
            outboxes: (0..star.pids().len()).map(|rank| fabric.peer(rank).outbox.clone()).collect(),
            own: fabric.outbox.clone(),
            state: layout.state,
            cause: layout.cause,
            abort: layout.abort,
            gone: layout.gone,
            nodes: star.nodes().to_vec(),
            liveness: Liveness::watch(pids),
            bells: bells.clone(),
            plane: OnceLock::new(),
            since: Instant::now(),
            probed: star.pids().iter().map(|_| AtomicU64::new(0)).collect(),
            star: Mutex::new(star),
            known: OnceLock::new(),
        }
    }

    /// From now on what this node alone sees is told to these ranks of others.
    pub(crate) fn tell_far(&self, plane: &Arc<Plane>, ranks: Vec<usize>) {
        self.plane.get_or_init(|| (plane.clone(), ranks));
    }

    /// The connections that were used to join: for one set-up at a time.
    pub(crate) fn star(&self) -> MutexGuard<'_, Star> {
        lock(&self.star)
    }

    pub(crate) fn state(&self, rank: usize) -> u32 {
        match self.outboxes[rank].word32(self.state).load(Acquire) {
            ABORTED_AND_LEFT => ABORTED,
            state => state,
        }
    }

    /// Whether the rank has left, after an abort perhaps.
    pub(crate) fn has_left(&self, rank: usize) -> bool {
        [LEFT, ABORTED_AND_LEFT].contains(&self.outboxes[rank].word32(self.state).load(Acquire))
    }

    /// Whether the rank has said itself that it takes no further part.
    fn has_said_so(&self, rank: usize) -> bool {
        [LEFT, ABORTED].contains(&self.state(rank))
    }

    /// Whether the rank's process has ended without leaving.
    pub(crate) fn has_died(&self, rank: usize) -> bool {
        self.liveness.has_ended(rank) == Some(true) && self.state(rank) != LEFT
    }

    /// Whether the rank takes part in nothing any more, whatever becomes of the communicator: it has left, its process has ended, or
    /// it cannot be reached. A system call, or more for a far one.
    pub(crate) fn is_gone(&self, rank: usize) -> bool {
        if self.has_left(rank) {
            return true;
        }
        if self.nodes[rank] == self.nodes[self.rank] {
            let is_dead = self.liveness.has_ended(rank) == Some(true);
            if is_dead && self.plane.get().is_some() {
                self.tell_gone(rank);
            }
            return is_dead;
        }
        let bit = |by: usize| self.outboxes[by].word64(self.gone + rank / 64 * 8).load(Acquire) >> (rank % 64) & 1;
        let told = (0..self.nodes.len()).any(|by| self.nodes[by] == self.nodes[rank] && bit(by) == 1);
        told || self.is_out_of_reach(rank)
    }

    /// A rank of this node is dead: those of other nodes cannot see it.
    fn tell_gone(&self, rank: usize) {
        let (offset, bit) = (self.gone + rank / 64 * 8, 1 << (rank % 64));
        let before = self.own.word64(offset).fetch_or(bit, AcqRel);
        if let Some((plane, far)) = self.plane.get().filter(|_| before & bit == 0) {
            let update = Update::Word64 { window: OUTBOX, offset, value: before | bit };
            far.iter().for_each(|&to| plane.send(to, [], &[update]));
        }
    }

    /// Whether the connection to a far rank has ended, or its host's network.
    fn is_out_of_reach(&self, rank: usize) -> bool {
        if let Ok(mut star) = self.star.try_lock() {
            star.lost();
            if star.has_lost(rank) {
                return true;
            }
        }
        let Some((plane, _)) = self.plane.get() else { return false };
        // A connection tells that its other end is gone when something is sent there.
        let (last, now) = (&self.probed[rank], self.since.elapsed().as_millis() as u64);
        if now >= last.load(Relaxed) + BETWEEN_PROBES_MS {
            last.store(now, Relaxed);
            plane.probe(rank);
        }
        plane.trouble(|other| other == rank).is_some()
    }

    /// Why the communicator is over, if this rank can tell. A system call or two where it is not.
    pub(crate) fn cause(&self) -> Option<Cause> {
        if let Some(&cause) = self.known.get() {
            return Some(cause);
        }
        let told = (0..self.outboxes.len()).find_map(|rank| self.told_by(rank));
        let found = told.or_else(|| self.seen())?;
        let mut is_news = false;
        let cause = *self.known.get_or_init(|| {
            is_news = true;
            found
        });
        if is_news {
            self.publish(cause, told.is_none());
        }
        Some(cause)
    }

    /// For who was told that there may be news of connections: takes them, so that later deaths are passed on as well.
    pub(crate) fn look(&self) {
        if self.cause().is_some()
            && let Ok(mut star) = self.star.try_lock()
        {
            star.lost();
        }
    }

    /// The cause, if this rank has found it already.
    pub(crate) fn known(&self) -> Option<Cause> {
        self.known.get().copied()
    }

    /// What another rank holds to be the cause, as far as that can be.
    fn told_by(&self, rank: usize) -> Option<Cause> {
        if rank == self.rank {
            return None;
        }
        let cause = Cause::of(self.outboxes[rank].word64(self.cause).load(Acquire), self.outboxes.len())?;
        let can_be = match cause {
            Cause::Died(other) => other != self.rank && self.liveness.has_ended(other) != Some(false),
            Cause::Aborted(other) => self.state(other) == ABORTED,
        };
        can_be.then_some(cause)
    }

    /// What this rank sees by itself.
    fn seen(&self) -> Option<Cause> {
        let aborted = (0..self.outboxes.len()).find(|&rank| self.state(rank) == ABORTED).map(Cause::Aborted);
        let died = || self.liveness.first_dead(|rank| !self.has_said_so(rank)).or_else(|| self.lost());
        let seen = aborted.or_else(|| died().map(Cause::Died))?;
        // Whatever has made that rank end stood in its cause word before.
        Some(self.told_by(seen.rank()).unwrap_or(seen))
    }

    /// The rank whose connection from the time of joining has ended, without its having left.
    fn lost(&self) -> Option<usize> {
        // While the connections are used to set something up, that finds it.
        self.star.try_lock().ok()?.lost().filter(|&rank| !self.has_said_so(rank))
    }

    fn publish(&self, cause: Cause, is_seen: bool) {
        tracing::debug!(rank = self.rank, ?cause, by_itself = is_seen, "communicator is over");
        self.own.word64(self.cause).store(cause.word(), Release);
        if !is_seen {
            return;
        }
        bell::publish_fence();
        self.bells.ring_all();
        if let (Cause::Died(rank), Some((plane, far))) = (cause, self.plane.get())
            && !far.contains(&rank)
        {
            // Only its node sees the process.
            let update = Update::Word64 { window: OUTBOX, offset: self.cause, value: cause.word() };
            far.iter().for_each(|&to| plane.send(to, [], &[update]));
        }
    }

    /// A far rank has changed words here: wakes who sleeps for it, or everybody if it is the end.
    pub(crate) fn heard_from(&self, source: usize) {
        self.bells.heard_from(source);
        if self.known.get().is_none() && (self.told_by(source).is_some() || self.state(source) == ABORTED) {
            self.bells.ring_all();
        }
    }

    /// The error of a call that meets the end.
    pub(crate) fn error(&self, cause: Cause, during: Operation, epoch: u64) -> Error {
        match cause {
            Cause::Died(rank) => Error::PeerDied { rank, during, epoch },
            Cause::Aborted(by) => abort::error(&self.outboxes[by], self.abort, by, during),
        }
    }

    /// Ends what is being set up when the communicator is over.
    pub(crate) fn check(&self, during: Operation) -> Result<()> {
        self.cause().map_or(Ok(()), |cause| Err(self.error(cause, during, 0)))
    }
}
