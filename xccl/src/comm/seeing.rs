//! What a rank can see of the others, and tell of itself.

use std::time::{Duration, Instant};

use super::Communicator;
use super::inner::{CommInner, standing};
use crate::error::Result;
use crate::observe::process::{self, Look};
use crate::observe::reading::BoardCopy;
use crate::observe::{CommSnapshot, HistoryRecord, ProcessState, RankSnapshot, Standing, diagnose};
use crate::sync::progress::{Waiting, now_ns};

/// How long processes are watched, to see what processor time they use.
const WATCHED: Duration = Duration::from_millis(20);
/// Waits that are younger mean nothing yet, unless the one that asks has less patience itself.
const PATIENCE: Duration = Duration::from_millis(200);

impl CommInner {
    fn board_of(&self, rank: usize) -> Option<BoardCopy> {
        let own = (rank == self.rank).then_some(&self.fabric.outbox);
        let near = || self.fabric.peer(rank).near.as_ref().map(|_| &self.fabric.peer(rank).outbox);
        BoardCopy::take(&**own.or_else(near)?, &self.layout.board, now_ns())
    }

    fn pid_of(&self, rank: usize) -> Option<u32> {
        self.fabric.peer(rank).near.as_ref().map(|near| near.pid)
    }

    /// What this rank sees of all, when it has watched their processes for a while.
    fn watch(&self, time: Duration) -> CommSnapshot {
        let looked = Instant::now();
        let look = |rank| self.pid_of(rank).and_then(process::look);
        let before: Vec<Option<Look>> = (0..self.world_size).map(look).collect();
        std::thread::sleep(time);
        self.seen((0..self.world_size).map(|rank| self.see(rank, before[rank], looked)))
    }

    /// What this rank sees of all at once.
    pub(crate) fn glance(&self) -> CommSnapshot {
        self.seen((0..self.world_size).map(|rank| self.see(rank, None, Instant::now())))
    }

    fn seen(&self, ranks: impl Iterator<Item = RankSnapshot>) -> CommSnapshot {
        let ranks = ranks.collect();
        let created = self.board_of(self.rank).map_or(0, |board| board.created);
        CommSnapshot { id: self.id, age_ns: now_ns().saturating_sub(created), ranks }
    }

    fn see(&self, rank: usize, before: Option<Look>, looked: Instant) -> RankSnapshot {
        let Some(board) = self.board_of(rank) else {
            let remark = self.fabric.far_to(rank).map(|far| far.plane.describe(rank));
            // That it has left or aborted is told across nodes.
            let standing = match standing(self.state(rank)) {
                Standing::Active => Standing::Unknown,
                other => other,
            };
            return RankSnapshot { rank, node: Some(self.nodes[rank]), standing, remark, ..Default::default() };
        };
        let pid = self.pid_of(rank);
        let now = pid.and_then(process::look).filter(|look| look.started == board.started);
        let used = now.zip(before).and_then(|(now, before)| {
            Some(now.used?.saturating_sub(before.used?).as_secs_f64() / looked.elapsed().as_secs_f64())
        });
        let state = match now {
            Some(look) => look.state,
            None if self.ending.has_died(rank) => ProcessState::Dead,
            None => ProcessState::Unknown,
        };
        let seen = RankSnapshot::of(rank, pid, state, board, now_ns()).with_cores(used);
        RankSnapshot { node: Some(self.nodes[rank]), ..seen }
    }

    /// Why a wait has not come to its end, as far as it can be seen from here.
    pub(super) fn explain(&self, what: &Waiting, waited: Duration) -> String {
        let seen = self.watch(WATCHED);
        let of = |rank: usize| format!("rank {rank} {}", seen.ranks[rank].last_seen());
        let waited_for = match what.peer {
            Some(peer) => of(peer),
            None => (0..self.world_size).filter(|&r| r != self.rank).take(8).map(of).collect::<Vec<_>>().join("; "),
        };
        let patience = PATIENCE.min(waited / 4).as_nanos() as u64;
        let diagnosis = diagnose(std::slice::from_ref(&seen), patience);
        tracing::debug!(rank = self.rank, operation = %what.operation, epoch = what.epoch, peer = what.peer, ?waited, %diagnosis, "deadline passed");
        format!("{waited_for}; {diagnosis}")
    }
}

impl Communicator {
    /// What this rank sees of all ranks: what each is doing, whom it waits for and since when, what it has counted. Ranks of other
    /// nodes cannot be seen, but for whether they were heard of. Asks nothing of the others, which may be stopped or dead. Does not
    /// block.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, Finding, Standing, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let seen = comm.snapshot();
    /// assert_eq!((seen.ranks.len(), seen.ranks[0].standing), (1, Standing::Active));
    /// assert_eq!(seen.diagnosis().finding, Finding::Quiet);
    /// println!("{seen}{}", seen.diagnosis());
    /// # Ok(())
    /// # }
    /// ```
    pub fn snapshot(&self) -> CommSnapshot {
        self.inner.glance()
    }

    /// As [`snapshot`](Self::snapshot), but watches the ranks' processes for `time` before, to tell what processor time they use:
    /// from 10 ms on that means something.
    pub fn snapshot_over(&self, time: Duration) -> CommSnapshot {
        self.inner.watch(time)
    }

    /// Nanoseconds that this rank has waited for each rank, since it joined or last [took](Self::take_wait_times) them: who is
    /// late, and how much it costs. A wait counts for the rank that had to come next in the order of the call; if a later one has
    /// not come either, only what is left after the first counts for it. Waits that are over at once (within a microsecond) and
    /// waits for whichever rank comes first do not count.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// assert_eq!(comm.wait_times().len(), comm.world_size());
    /// # Ok(())
    /// # }
    /// ```
    pub fn wait_times(&self) -> Vec<u64> {
        self.inner.board.wait_times()
    }

    /// As [`wait_times`](Self::wait_times), which count from 0 afterwards: once per step, say.
    pub fn take_wait_times(&self) -> Vec<u64> {
        self.inner.board.take_wait_times()
    }

    /// The last operations of a rank of this node, the oldest first, also after its death: up to 64 calls of all ranks together
    /// (exchanges, collectives, barriers) and waits that went to sleep. Messages are not recorded otherwise. Of a rank
    /// of another node there are none.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, Operation, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// comm.barrier()?;
    /// let last = comm.history(0)?.pop().unwrap();
    /// assert_eq!((last.operation, last.epoch, last.failed), (Operation::Barrier, 1, false));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidRank`](crate::Error::InvalidRank).
    pub fn history(&self, rank: usize) -> Result<Vec<HistoryRecord>> {
        self.inner.check_rank(rank)?;
        Ok(self.inner.board_of(rank).map_or_else(Vec::new, |board| board.history))
    }
}
