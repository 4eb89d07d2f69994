//! Attention and experts apart: A2E and E2A.
//!
//! M ranks hold attention, in one or more *domains*, and N others hold the experts. Each domain has a [`Moe`] handle of its own,
//! in which its attention ranks are the only [sources](super::parties) and the expert ranks the only destinations. So the protocol is
//! that of dispatch and combine ([`moe`](super)), with what follows from nobody being both:
//! - *a2e_send* is a dispatch_send, *e2a_recv* a combine_recv. Between attention ranks, and between expert ranks of a node whose
//!   traffic stays on it, there are no lists, no memory and no words.
//! - *a2e_recv* looks at all domains in turn, from the one after that which was served last, and takes the first whose next
//!   micro-batch has come from all of its attention ranks. Exchanges of a domain are numbered by themselves: domains never wait for each
//!   other, except where both want the same expert rank's time.
//! - An expert rank's output rows of `e` may be written again in `e + 2` of the same domain: its sources have received `e` before
//!   they send that.
//!
//! # The end
//! `closed`, a word beside `dispatched`, says that its rank takes part in no exchange from that number on. An attention rank publishes it
//! when its handle ends, an expert rank when its loop does.
//! - An expert rank's loop is over when no domain goes on: for each, all sources have closed at the exchange that would be next. A
//!   source that has closed before one that another source of its domain has sent has left its domain alone: that is told to the loop
//!   ([`Error::PeerLeft`]), and to the domain's attention ranks by this rank's `closed`.
//! - The highest bit of `closed` asks all loops to end at once ([`Attention::shut_down`]). It is looked for where there is nothing
//!   else to do: it takes a look at every attention rank's word.
//!
//! Where a group is large, a few expert ranks gather what the others would each read of everybody: [`trampoline`].
//!
//! How a source that sends and closes between two looks is told from one that closes only: [`closing`].

mod attention;
mod config;
mod counts;
mod experts;
mod predict;
#[cfg(test)]
mod tests;
mod trampoline;

use std::sync::Arc;

pub use attention::Attention;
pub use config::{Forward, Role, RoleConfig};
pub(super) use counts::Counting;
pub use counts::RoleCounts;
pub use experts::{DomainBatch, Ended, Experts};
pub(super) use trampoline::{MergedEntry, Trampolines};

use super::parties::Parties;
use super::{Flight, Moe, Phase, slot_of};
use crate::comm::inner::CommInner;
use crate::error::{Error, Result};
use crate::fabric;
use crate::sync::closing;

/// Compares what the ranks want, checks it, and makes the handles of all domains. Collective over all ranks: every rank gets the same
/// error.
fn meet(comm: &Arc<CommInner>, config: &RoleConfig, claimed: &'static str) -> Result<Vec<Moe>> {
    let mine = format!("{config:?}");
    let blob = fabric::encode(&(claimed, &mine))?;
    let parts = comm.star().exchange(&blob, &[], comm.deadline())?;
    let mut claims = Vec::with_capacity(parts.len());
    for (rank, (blob, _)) in parts.iter().enumerate() {
        let (claim, theirs): (&str, &str) = fabric::decode(blob)?;
        if theirs != mine {
            let (what, theirs) = ("the role configuration".to_owned(), theirs.to_owned());
            return Err(Error::Mismatch { rank, what, theirs, ours: mine });
        }
        claims.push(claim);
    }
    let roles = config.check(comm.world_size)?;
    for (rank, (role, claimed)) in roles.iter().zip(claims).enumerate() {
        if role.kind() != claimed {
            return Err(Error::RoleMismatch { rank, claimed: claimed.to_owned(), configured: role.to_string() });
        }
    }
    let moe = config.placed()?;
    let domain = |sources: &Vec<usize>| {
        let parties = Parties::apart(comm.world_size, sources, &config.experts);
        let trampolines = config.trampolines_for(sources.len(), &config.experts, &comm.nodes);
        Moe::between_parties(comm, moe.clone(), parties, trampolines)
    };
    config.attention.iter().map(domain).collect()
}

impl Moe {
    /// Says that this rank takes part in no exchange from `epoch` on.
    fn close(&self, value: u64) {
        if self.comm.is_forked() {
            return;
        }
        closing::close(self.own.word64(self.layout.closed), value);
        self.comm.notify_all();
        if let Some((far, between)) = self.between() {
            between.borrow().tell(far, self.layout.closed, value);
        }
    }

    /// Says so of a rank that has experts; the ranks of other nodes that it stands for are told unless they are done.
    fn leave(&self, are_done: bool) {
        let epoch = self.next_epoch();
        self.trampolines.iter().for_each(|trampolines| trampolines.leave(epoch));
        self.close(epoch);
        if let Some((_, between)) = self.between()
            && !are_done
        {
            between.borrow().rail.leave(epoch);
        }
    }

    /// What was done beside moving rows.
    fn role_counts(&self) -> RoleCounts {
        let mut counts = self.counts.get();
        if let Some((_, between)) = self.between() {
            let (messages, bytes) = between.borrow().rail.returned();
            counts += RoleCounts { far_messages: messages, far_bytes: bytes, ..RoleCounts::default() };
        }
        counts
    }

    /// The number of the next exchange.
    fn next_epoch(&self) -> u64 {
        self.state.borrow().next
    }

    /// Begins to receive the next exchange, as a rank that sends none; `None` while an older one holds its slot.
    fn begin_to_receive(&self) -> Option<super::ExpertBatch<'_>> {
        let mut state = self.state.borrow_mut();
        let epoch = state.next;
        let flight: &mut Flight = &mut state.flights[slot_of(epoch)];
        let mut received = flight.received.take()?;
        received.go_by(&state.placed);
        let flight = &mut state.flights[slot_of(epoch)];
        flight.placed = received.placed.clone();
        // There is no source's side that would end it.
        (flight.epoch, flight.phase, flight.orphaned) = (epoch, Phase::Received, true);
        state.next += 1;
        drop(state);
        if let Some((_, between)) = self.between() {
            between.borrow().rail.begin(epoch, &received.placed);
        }
        Some(super::ExpertBatch::new(self, epoch, received))
    }
}
