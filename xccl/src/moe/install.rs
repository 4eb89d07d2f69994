//! Another placement, from the next exchange on.
//!
//! Every exchange goes by one placement on all ranks: the one that was in force when it was sent. Each side of a flight keeps it, so
//! exchanges in flight end by the placement that they began with, and installing stops nobody. What makes sure that all ranks
//! mean the same one is its mark, a hash, which stands beside the lists and is compared by everybody who reads them: ranks that
//! have installed different ones, or at different exchanges, are told of it in the first exchange that they do not agree on, and no row
//! is taken then.

use std::sync::atomic::Ordering::Relaxed;

use super::Moe;
use super::placement::Placement;
use super::placement::placed::Placed;
use crate::error::{Error, Result};

impl Placed {
    fn describe(mark: u64, since: u64) -> String {
        format!("placement {mark:016x} (in use since exchange {since})")
    }
}

impl Moe {
    /// Goes by `placement` from the next exchange on, whose number it gives. Exchanges in flight end by the one that they began
    /// with. Every rank must call it with the same placement between the same two dispatches; none waits for another. The weights
    /// of experts that are new in this rank's slots have to be there when it receives that exchange; the old ones' are needed
    /// until the exchanges in flight are combined.
    ///
    /// Where ranks do not agree, [`dispatch_recv`](Self::dispatch_recv) is an [`Error::PlacementMismatch`] with both values on
    /// every rank, in the first exchange that they do not agree on. They can go on by giving it up and installing the same one.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, DType, Moe, MoeConfig, Routing, UniqueId, placement::Placement};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let moe = Moe::new(&comm, MoeConfig::new(8, 16, 1, 3, DType::F32))?;
    /// assert_eq!(moe.experts_of(0)?, [0, 1, 2]);
    /// moe.install(&Placement::new(3, vec![vec![2, 0, 1]])?)?;
    /// assert_eq!(moe.experts_of(0)?, [2, 0, 1]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for one that does not fit the handle: other numbers of experts or ranks, or more slots than it was made
    /// for ([`MoeConfig::slots`](crate::MoeConfig::slots)). What was in force stays so.
    pub fn install(&self, placement: &Placement) -> Result<u64> {
        self.config.check_placement(placement, self.comm.world_size)?;
        let mut state = self.state.borrow_mut();
        let since = state.next;
        state.placed = Placed::new(placement, &self.parties, (self.comm.rank, &self.comm.nodes), since);
        Ok(since)
    }

    /// The placement that the next exchange goes by.
    pub fn placement(&self) -> Placement {
        self.state.borrow().placed.placement.clone()
    }

    /// Notes beside the lists of a slot which placement they go by.
    pub(super) fn mark(&self, epoch: u64, placed: &Placed) {
        let [mark, since] = self.layout.slot(epoch).placement;
        self.own.word64(mark).store(placed.mark, Relaxed);
        self.own.word64(since).store(placed.since, Relaxed);
    }

    /// Compares the placement of a source's lists with this rank's.
    pub(super) fn check_mark(&self, source: usize, epoch: u64, placed: &Placed) -> Result<()> {
        let (outbox, [mark, since]) = (&self.peers[source], self.layout.slot(epoch).placement);
        let mark = outbox.word64(mark).load(Relaxed);
        if mark == placed.mark {
            return Ok(());
        }
        let theirs = Placed::describe(mark, outbox.word64(since).load(Relaxed));
        let ours = Placed::describe(placed.mark, placed.since);
        Err(Error::PlacementMismatch { rank: source, epoch, theirs, ours })
    }
}
