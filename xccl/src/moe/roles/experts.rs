//! The experts' side: a loop that serves the domains in turn.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;
use std::time::{Duration, Instant};

use super::config::Role;
use super::{RoleConfig, SHUT_DOWN, meet};
use crate::comm::Communicator;
use crate::comm::inner::{Call, CommInner};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::moe::{ExpertBatch, Lanes, Moe};
use crate::sync::epoch;
use crate::sync::progress::{Operation, Waiting};

/// Why an expert rank's loop has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All attention ranks have said that they are done.
    Done,
    /// An attention rank has shut the group down.
    ShutDown {
        /// The rank.
        by: usize,
    },
    /// A rank has aborted the communicator.
    Aborted {
        /// The rank.
        by: usize,
    },
}

/// A micro-batch of one domain: an [`ExpertBatch`] with the domain's number.
#[must_use = "dropping it gives the micro-batch up: pass it to e2a_send"]
pub struct DomainBatch<'m> {
    domain: usize,
    batch: ExpertBatch<'m>,
}

impl DomainBatch<'_> {
    /// The domain whose attention ranks have sent it.
    pub fn domain(&self) -> usize {
        self.domain
    }
}

impl<'m> Deref for DomainBatch<'m> {
    type Target = ExpertBatch<'m>;

    fn deref(&self) -> &ExpertBatch<'m> {
        &self.batch
    }
}

impl DerefMut for DomainBatch<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.batch
    }
}

/// What the sources of a domain that were looked at do in its next exchange.
#[derive(Clone, Copy, PartialEq)]
enum Seen {
    Sent,
    Closed,
}

/// How far a domain has come.
struct Domain {
    /// Sources whose part in the next exchange was seen, and what it is.
    seen: usize,
    all: Option<Seen>,
    /// The refusal that was told last: source and exchange.
    refused: Option<(usize, u64)>,
    is_over: bool,
}

struct Serving {
    domains: Vec<Domain>,
    /// The domain that is looked at first.
    turn: usize,
    ended: Option<Ended>,
}

/// How it stands with a domain's next exchange.
enum Next {
    Ready,
    /// All its sources have closed.
    Over,
    /// This source's part has not come.
    Awaits(usize),
    Refused(usize),
    /// This source has closed, and others have sent.
    Left(usize),
}

/// What a look at all domains has found.
enum Found {
    Batch(usize),
    Ended(Ended),
    Failed(Error),
    /// The one domain that goes on waits for another source now.
    Moved,
}

/// How long there must have been nothing to do before every look is at all sources' words.
const IDLE: Duration = Duration::from_millis(1);
/// Looks without the clock.
const BUSY_LOOKS: u32 = 64;

/// An expert rank's handle: it receives micro-batches of all domains, and sends the outputs back.
///
/// A micro-batch is received as soon as all attention ranks of its domain have sent it; of several that are there, that of the domain
/// which comes next after the one served last. Two of each domain may be in flight. See [`Attention`](super::Attention) for an
/// example.
pub struct Experts {
    comm: Arc<CommInner>,
    pub(super) domains: Vec<Moe>,
    serving: RefCell<Serving>,
}

impl Experts {
    /// Makes an expert rank's handle. Collective: every rank of `comm` calls this or [`Attention::new`](super::Attention::new), with the
    /// same configuration.
    ///
    /// # Errors
    /// As [`Attention::new`](super::Attention::new).
    pub fn new(comm: &Communicator, config: RoleConfig) -> Result<Self> {
        let comm = comm.inner.clone();
        let domains = meet(&comm, &config, Role::EXPERTS)?;
        let of = |_: &Moe| Domain { seen: 0, all: None, refused: None, is_over: false };
        let serving = Serving { domains: domains.iter().map(of).collect(), turn: 0, ended: None };
        Ok(Experts { comm, domains, serving: RefCell::new(serving) })
    }

    /// The number of domains.
    pub fn domains(&self) -> usize {
        self.domains.len()
    }

    /// Global ids of this rank's experts, ascending.
    pub fn local_experts(&self) -> &[usize] {
        self.domains[0].placement.local(self.comm.rank)
    }

    /// As [`Moe::set_lanes`].
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_lanes(&self, lanes: usize, threads: Arc<dyn Lanes>) -> Result<()> {
        self.domains.iter().try_for_each(|moe| moe.set_lanes(lanes, threads.clone()))
    }

    /// Receives the next micro-batch of any domain: its rows for this rank's experts, in the attention ranks' memory. Blocks until one
    /// is complete; `None` once the loop is over, and from then on: [`ended`](Self::ended) says why.
    ///
    /// # Errors
    /// [`Error::Timeout`] when none has come before the deadline, [`Error::PeerDied`] and the like; [`Error::PeerRefused`] names an
    /// attention rank whose input was bad, once. The call may be repeated after these. [`Error::PeerLeft`] for a domain that cannot go on
    /// since one of its ranks is done and another is not: it is over then, and its ranks are told. [`Error::TooManyExpertRows`] and
    /// [`Error::Corrupt`] give the micro-batch up, which its ranks are told ([`Error::PeerAbandoned`]).
    pub fn a2e_recv(&self) -> Result<Option<DomainBatch<'_>>> {
        let mut serving = self.serving.borrow_mut();
        let mut call = Call::default();
        loop {
            if serving.ended.is_some() {
                return Ok(None);
            }
            let (peer, epoch) = serving.awaits(&self.domains);
            let what = Waiting { operation: Operation::A2eRecv, epoch, peer };
            let (mut looks, started) = (0, Instant::now());
            let found = self.comm.wait_in(&mut call, what, || {
                looks += 1;
                let is_idle = looks > BUSY_LOOKS && started.elapsed() > IDLE;
                serving.look(&self.domains, peer, is_idle)
            });
            match found {
                Ok(Found::Moved) => {}
                Ok(Found::Ended(ended)) => serving.end(&self.domains, ended),
                Err(Error::Aborted { by, .. }) => serving.end(&self.domains, Ended::Aborted { by }),
                Ok(Found::Failed(err)) | Err(err) => return Err(err),
                Ok(Found::Batch(domain)) => return self.receive(&mut serving, domain).map(Some),
            }
        }
    }

    /// Receives the micro-batch of a domain, which has come.
    fn receive(&self, serving: &mut Serving, domain: usize) -> Result<DomainBatch<'_>> {
        let moe = &self.domains[domain];
        let epoch = moe.next_epoch();
        let expected = "the micro-batch before the last to be sent back first";
        let batch = moe.begin_to_receive().ok_or(Error::WrongOrder { call: "a2e_recv", epoch, expected });
        serving.turn = (domain + 1) % self.domains.len();
        let mut batch = batch?;
        (serving.domains[domain].seen, serving.domains[domain].all) = (0, None);
        // They are all there. What cannot be received is dropped, hence given up.
        batch.receive_all()?;
        batch.complete();
        Ok(DomainBatch { domain, batch })
    }

    /// Why the loop has ended; `None` while it goes on.
    pub fn ended(&self) -> Option<Ended> {
        self.serving.borrow().ended
    }

    /// Publishes the outputs that were written through [`ExpertBatch::output_row`]: as [`Moe::combine_send`]. Micro-batches that are out
    /// may be sent back in any order. Never blocks.
    ///
    /// # Errors
    /// [`Error::WrongOrder`] for a batch of another handle.
    pub fn e2a_send(&self, batch: DomainBatch<'_>) -> Result<()> {
        self.moe_of(&batch)?.combine_send(batch.batch)
    }

    /// As [`e2a_send`](Self::e2a_send), with the outputs in a buffer: as [`Moe::combine_send_from`].
    ///
    /// # Errors
    /// As [`Moe::combine_send_from`].
    pub fn e2a_send_from<E: Element>(&self, batch: DomainBatch<'_>, outputs: &[E]) -> Result<()> {
        self.moe_of(&batch)?.combine_send_from(batch.batch, outputs)
    }

    /// As [`e2a_send`](Self::e2a_send), with the sums formed by the engine: as [`Moe::combine_send_sums`].
    ///
    /// # Errors
    /// As [`Moe::combine_send_sums`].
    pub fn e2a_send_sums(&self, batch: DomainBatch<'_>) -> Result<()> {
        self.moe_of(&batch)?.combine_send_sums(batch.batch)
    }

    /// As [`Moe::await_rows`].
    ///
    /// # Errors
    /// As [`Moe::await_rows`].
    pub fn await_rows(&self, batch: &DomainBatch<'_>) -> Result<()> {
        self.moe_of(batch)?.await_rows(&batch.batch)
    }

    fn moe_of(&self, batch: &DomainBatch<'_>) -> Result<&Moe> {
        let (epoch, expected) = (batch.epoch(), "a batch of the same handle");
        self.domains.get(batch.domain).ok_or(Error::WrongOrder { call: "e2a_send", epoch, expected })
    }
}

impl Serving {
    /// Whom a wait is for, and in which exchange: where one domain goes on, the source that is next, otherwise anyone.
    fn awaits(&self, domains: &[Moe]) -> (Option<usize>, u64) {
        let mut open = self.domains.iter().zip(domains).filter(|(domain, _)| !domain.is_over);
        match (open.next(), open.next()) {
            (Some((domain, moe)), None) => (moe.parties.sources.get(domain.seen).copied(), moe.next_epoch()),
            (Some(_), Some(_)) => (None, domains[self.turn].next_epoch()),
            (None, _) => (None, 0),
        }
    }

    /// Looks at the domains in turn; `peer` is the source that is waited for, if it is just one.
    fn look(&mut self, domains: &[Moe], peer: Option<usize>, is_idle: bool) -> Option<Found> {
        let (mut refused, mut awaited) = (None, None);
        for i in (0..domains.len()).map(|i| (self.turn + i) % domains.len()) {
            let (domain, moe) = (&mut self.domains[i], &domains[i]);
            if domain.is_over {
                continue;
            }
            match domain.look(moe) {
                Next::Ready => return Some(Found::Batch(i)),
                Next::Over => domain.is_over = true,
                Next::Awaits(source) => awaited = Some(source),
                Next::Refused(source) => {
                    let at = (source, moe.next_epoch());
                    awaited = Some(source);
                    if domain.refused != Some(at) {
                        refused = Some((i, at));
                    }
                }
                Next::Left(rank) => {
                    domain.is_over = true;
                    let (during, epoch) = (Operation::A2eRecv, moe.next_epoch());
                    moe.close(epoch);
                    return Some(Found::Failed(Error::PeerLeft { rank, during, epoch }));
                }
            }
        }
        if self.domains.iter().all(|domain| domain.is_over) {
            return Some(Found::Ended(Ended::Done));
        }
        // What others have sent comes before what was refused.
        if let Some((domain, (rank, epoch))) = refused {
            self.domains[domain].refused = Some((rank, epoch));
            return Some(Found::Failed(Error::PeerRefused { rank, epoch }));
        }
        if is_idle && let Some(by) = shut_down_by(domains) {
            return Some(Found::Ended(Ended::ShutDown { by }));
        }
        (peer.is_some() && awaited != peer).then_some(Found::Moved)
    }

    /// The loop is over: attention ranks that go on are told.
    fn end(&mut self, domains: &[Moe], ended: Ended) {
        self.ended = Some(ended);
        domains.iter().for_each(|moe| moe.leave(ended == Ended::Done));
    }
}

/// The attention rank that has asked all loops to end.
fn shut_down_by(domains: &[Moe]) -> Option<usize> {
    let asks = |moe: &Moe, source: usize| moe.peers[source].word64(moe.layout.closed).load(Acquire) & SHUT_DOWN != 0;
    domains.iter().find_map(|moe| moe.parties.sources.iter().copied().find(|&source| asks(moe, source)))
}

impl Domain {
    /// Looks at the sources' words from the first on whose part was not seen.
    fn look(&mut self, moe: &Moe) -> Next {
        let (epoch, sources) = (moe.next_epoch(), &moe.parties.sources);
        while let Some(&source) = sources.get(self.seen) {
            let outbox = &moe.peers[source];
            let has_sent = || epoch::reached(outbox.word64(moe.layout.dispatched), epoch);
            let closed_at = || outbox.word64(moe.layout.closed).load(Acquire) & !SHUT_DOWN;
            let seen = match has_sent() {
                true => Seen::Sent,
                // It may have sent just before it closed: look again.
                false if (1..=epoch).contains(&closed_at()) && !has_sent() => Seen::Closed,
                false if outbox.word64(moe.layout.refused).load(Acquire) == epoch && !has_sent() => {
                    return Next::Refused(source);
                }
                false => return Next::Awaits(source),
            };
            if *self.all.get_or_insert(seen) != seen {
                return Next::Left(if seen == Seen::Closed { source } else { sources[0] });
            }
            self.seen += 1;
        }
        match self.all {
            Some(Seen::Closed) => Next::Over,
            _ => Next::Ready,
        }
    }
}

impl Drop for Experts {
    fn drop(&mut self) {
        let serving = self.serving.get_mut();
        if serving.ended.is_none() {
            self.domains.iter().for_each(|moe| moe.leave(false));
        }
    }
}
