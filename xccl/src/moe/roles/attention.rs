//! The attention side.

use std::sync::Arc;

use super::config::Role;
use super::{RoleConfig, RoleCounts, meet};
use crate::comm::Communicator;
use crate::dtype::{Element, ExpertId};
use crate::error::{Error, Result};
use crate::moe::{Epilogue, Exchange, InputRows, Lanes, Moe, MoeConfig, Routing, WireRows};
use crate::sync::closing::ASKS_TO_END;

/// An attention rank's handle: it sends the tokens of its micro-batches to the experts, and receives the sums. Two may be in flight.
///
/// When it ends, this rank says that it is done; when all attention ranks have, the experts' loops end.
///
/// ```no_run
/// use xccl::{Attention, Communicator, DType, Experts, MoeConfig, Role, RoleConfig, Routing};
/// # fn main() -> xccl::Result<()> {
/// let comm = Communicator::from_env()?; // of five ranks: 0 to 2 hold attention, 3 and 4 experts
/// let config = RoleConfig::new([0..3], 3..5, MoeConfig::new(8, 16, 1, 4, DType::F32));
/// match config.role_of(comm.rank()) {
///     Some(Role::Experts) => {
///         let experts = Experts::new(&comm, config)?;
///         while let Some(mut batch) = experts.a2e_recv()? {
///             for i in 0..batch.len() {
///                 batch.output_row::<f32>(i)?.fill(4.0); // the expert's work
///             }
///             experts.e2a_send(batch)?;
///         }
///     }
///     _ => {
///         let attention = Attention::new(&comm, config)?;
///         let sent = attention.a2e_send(&[1.0f32; 32], &Routing::new(&[0i32, 3], &[1.0, 0.5]))?;
///         let mut out = [0.0f32; 32];
///         attention.e2a_recv(sent, &mut out)?;
///         assert_eq!((out[0], out[31]), (4.0, 2.0));
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct Attention {
    pub(super) moe: Moe,
    domain: usize,
}

impl Attention {
    /// Makes an attention rank's handle. Collective: every rank of `comm` calls this or [`Experts::new`](super::Experts::new), with the
    /// same configuration.
    ///
    /// # Errors
    /// On every rank: [`Error::Mismatch`] when the configurations differ, [`Error::RoleConflict`], [`Error::NoRole`],
    /// [`Error::ExpertWithoutRole`], [`Error::InvalidRank`] and [`Error::Config`] for one that cannot be, and [`Error::RoleMismatch`] when
    /// a rank makes the other role's handle. [`Error::NotEnoughMemory`] as for [`Moe::new`].
    pub fn new(comm: &Communicator, config: RoleConfig) -> Result<Self> {
        let inner = &comm.inner;
        let domains = meet(inner, &config, Role::ATTENTION)?;
        let mine = |(domain, _): &(usize, Moe)| config.role_of(inner.rank) == Some(Role::Attention { domain: *domain });
        match domains.into_iter().enumerate().find(mine) {
            Some((domain, moe)) => Ok(Attention { moe, domain }),
            None => Err(Error::NoRole { rank: inner.rank, world_size: inner.world_size }),
        }
    }

    /// The shape of the exchanges, with the placement of the experts.
    pub fn config(&self) -> &MoeConfig {
        self.moe.config()
    }

    /// This rank's domain.
    pub fn domain(&self) -> usize {
        self.domain
    }

    /// As [`Moe::set_lanes`].
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_lanes(&self, lanes: usize, threads: Arc<dyn Lanes>) -> Result<()> {
        self.moe.set_lanes(lanes, threads)
    }

    /// Sends the tokens of a micro-batch to the experts: `tokens` is `[T, hidden]`, T the routing's number of tokens, possibly 0,
    /// different on every rank. Every attention rank of the domain sends one. Blocks only until the micro-batch before the last was
    /// consumed.
    ///
    /// # Errors
    /// As [`Moe::dispatch_send`]. The experts' loops are told of bad input, and wait for the corrected one. [`Error::PeerLeft`] when an
    /// expert rank's loop has ended.
    pub fn a2e_send<E: Element, I: ExpertId>(&self, tokens: &[E], routing: &Routing<'_, I>) -> Result<Exchange<'_>> {
        self.moe.dispatch_send(tokens, routing)
    }

    /// Rows of the outbox to compute a micro-batch's tokens in: see [`Moe::input_rows`].
    ///
    /// # Errors
    /// As [`Moe::input_rows`].
    pub fn input_rows<E: Element>(&self, tokens: usize) -> Result<InputRows<'_, E>> {
        self.moe.input_rows(tokens)
    }

    /// As [`a2e_send`](Self::a2e_send), for tokens that lie in the outbox already.
    ///
    /// # Errors
    /// As [`Moe::dispatch_send_rows`].
    pub fn a2e_send_rows<'m, E: Element, I: ExpertId>(
        &'m self,
        rows: InputRows<'m, E>,
        routing: &Routing<'_, I>,
    ) -> Result<Exchange<'m>> {
        self.moe.dispatch_send_rows(rows, routing)
    }

    /// Rows of the outbox for tokens that the engine has quantized: see [`Moe::input_wire_rows`].
    ///
    /// # Errors
    /// As [`Moe::input_wire_rows`].
    pub fn input_wire_rows(&self, tokens: usize) -> Result<WireRows<'_>> {
        self.moe.input_wire_rows(tokens)
    }

    /// As [`a2e_send`](Self::a2e_send), for tokens that lie in the outbox already, in the wire format.
    ///
    /// # Errors
    /// As [`Moe::dispatch_send_wire_rows`].
    pub fn a2e_send_wire_rows<'m, I: ExpertId>(
        &'m self,
        rows: WireRows<'m>,
        routing: &Routing<'_, I>,
    ) -> Result<Exchange<'m>> {
        self.moe.dispatch_send_wire_rows(rows, routing)
    }

    /// Receives the sums of a micro-batch, `[T, hidden]`: as [`Moe::combine_recv`], in either order of those in flight.
    ///
    /// # Errors
    /// As [`Moe::combine_recv`]; [`Error::PeerLeft`] when an expert rank's loop has ended without it.
    pub fn e2a_recv<E: Element>(&self, sent: Exchange<'_>, out: &mut [E]) -> Result<()> {
        self.moe.combine_recv(sent, out)
    }

    /// As [`e2a_recv`](Self::e2a_recv), with bias, residual and norm in the same pass: [`Moe::combine_recv_with`].
    ///
    /// # Errors
    /// As [`Moe::combine_recv_with`].
    pub fn e2a_recv_with<E: Element>(
        &self,
        sent: Exchange<'_>,
        out: &mut [E],
        epilogue: Epilogue<'_, E>,
    ) -> Result<()> {
        self.moe.combine_recv_with(sent, out, epilogue)
    }

    /// What this rank has done so far beside moving rows.
    pub fn counts(&self) -> RoleCounts {
        self.moe.role_counts()
    }

    /// Ends the loops of all expert ranks at once, without waiting for the other attention ranks, whose micro-batches in flight are given
    /// up: they get [`Error::PeerLeft`].
    pub fn shut_down(self) {
        self.ask_to_end();
    }

    /// As [`shut_down`](Self::shut_down), for a handle that is dropped next.
    #[doc(hidden)]
    pub fn ask_to_end(&self) {
        self.moe.close(ASKS_TO_END | self.moe.next_epoch());
    }
}

impl Drop for Attention {
    fn drop(&mut self) {
        let closed = self.moe.own.word64(self.moe.layout.closed).load(std::sync::atomic::Ordering::Relaxed);
        if closed == 0 {
            self.moe.close(self.moe.next_epoch());
        }
    }
}
