//! The experts' side: a loop that serves the domains in turn.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;
use std::time::{Duration, Instant};

use super::config::Role;
use super::{RoleConfig, RoleCounts, meet};
use crate::comm::Communicator;
use crate::comm::inner::{Call, CommInner};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::moe::{ExpertBatch, Lanes, Moe, MoeConfig, Trampolines};
use crate::sync::closing::{self, Part};
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
const BUSY_LOOKS: u32 = 8;

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

    /// The shape of the exchanges, with the placement of the experts.
    pub fn config(&self) -> &MoeConfig {
        self.domains[0].config()
    }

    /// Elements from one row of [`ExpertBatch::output_matrix`] to the next: as [`Moe::row_stride`].
    pub fn row_stride(&self) -> usize {
        self.domains[0].row_stride()
    }

    /// Bytes from where a token row begins to its scales: as [`Moe::scales_offset`].
    pub fn scales_offset(&self) -> Option<usize> {
        self.domains[0].scales_offset()
    }

    /// The number of domains.
    pub fn domains(&self) -> usize {
        self.domains.len()
    }

    /// The logical experts in this rank's slots.
    pub fn local_experts(&self) -> Vec<usize> {
        self.domains[0].state.borrow().placed.local(self.comm.rank).to_vec()
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
        self.comm.check_process()?;
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
                serving.look(&self.comm, &self.domains, peer, is_idle)
            });
            // Who has left may have been done: that is looked for only now and then.
            let found = match found {
                Err(err @ Error::PeerLeft { .. }) => serving.look(&self.comm, &self.domains, peer, true).ok_or(err),
                found => found,
            };
            match found {
                Ok(Found::Moved) => {}
                Ok(Found::Ended(ended)) => serving.end(&self.domains, ended),
                Ok(Found::Failed(Error::Aborted { by, .. })) | Err(Error::Aborted { by, .. }) => {
                    serving.end(&self.domains, Ended::Aborted { by });
                }
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
        match &moe.trampolines {
            Some(trampolines) => batch.receive_forwarded(trampolines)?,
            None => batch.receive_all()?,
        }
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
        let moe = self.moe_of(&batch)?;
        moe.combine_send(batch.batch)?;
        moe.forward()
    }

    /// As [`e2a_send`](Self::e2a_send), with the outputs in a buffer: as [`Moe::combine_send_from`].
    ///
    /// # Errors
    /// As [`Moe::combine_send_from`].
    pub fn e2a_send_from<E: Element>(&self, batch: DomainBatch<'_>, outputs: &[E]) -> Result<()> {
        let moe = self.moe_of(&batch)?;
        moe.combine_send_from(batch.batch, outputs)?;
        moe.forward()
    }

    /// As [`e2a_send`](Self::e2a_send), with the sums formed by the engine: as [`Moe::combine_send_sums`].
    ///
    /// # Errors
    /// As [`Moe::combine_send_sums`].
    pub fn e2a_send_sums(&self, batch: DomainBatch<'_>) -> Result<()> {
        let moe = self.moe_of(&batch)?;
        moe.combine_send_sums(batch.batch)?;
        moe.forward()
    }

    /// Moves on what other ranks wait for, if this rank gathers it for them ([`Forward`](super::Forward)): for an engine that computes
    /// for long between two calls. Never blocks.
    ///
    /// # Errors
    /// [`Error::Corrupt`].
    pub fn forward(&self) -> Result<()> {
        self.domains.iter().try_for_each(Moe::forward)
    }

    /// What this rank has done so far beside moving rows, for all domains.
    pub fn counts(&self) -> RoleCounts {
        self.domains.iter().fold(RoleCounts::default(), |mut sum, moe| {
            sum += moe.role_counts();
            sum
        })
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
            (Some((domain, moe)), None) => {
                let peer = match &moe.trampolines {
                    None => moe.parties.sources.get(domain.seen).copied(),
                    // It waits for its block's sources, and for what is to be returned.
                    Some(trampolines) if trampolines.is_own() => None,
                    Some(trampolines) => trampolines.ranks().get(domain.seen).copied(),
                };
                (peer, moe.next_epoch())
            }
            (Some(_), Some(_)) => (None, domains[self.turn].next_epoch()),
            (None, _) => (None, 0),
        }
    }

    /// Looks at the domains in turn; `peer` is the source that is waited for, if it is just one.
    fn look(&mut self, comm: &CommInner, domains: &[Moe], peer: Option<usize>, is_idle: bool) -> Option<Found> {
        if let Err(err) = domains.iter().try_for_each(Moe::forward) {
            return Some(Found::Failed(err));
        }
        let (mut refused, mut awaited) = (None, None);
        for i in (0..domains.len()).map(|i| (self.turn + i) % domains.len()) {
            let (domain, moe) = (&mut self.domains[i], &domains[i]);
            if domain.is_over {
                continue;
            }
            match domain.look(moe, is_idle) {
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
                    // Perhaps it has left since all are to.
                    if let Some(ended) = asked_to_end(comm, domains) {
                        return Some(Found::Ended(ended));
                    }
                    domain.is_over = true;
                    let (during, epoch) = (Operation::A2eRecv, moe.next_epoch());
                    moe.leave(false);
                    let left = Error::PeerLeft { rank, during, epoch };
                    return Some(Found::Failed(comm.or_the_end(left, during, epoch)));
                }
            }
        }
        if self.domains.iter().all(|domain| domain.is_over) {
            return Some(match (asked_to_end(comm, domains), comm.ending.check(Operation::A2eRecv)) {
                (Some(ended), _) => Found::Ended(ended),
                // They have left because of a death that they have been told of.
                (None, Err(err)) => Found::Failed(err),
                (None, Ok(())) => Found::Ended(Ended::Done),
            });
        }
        // What others have sent comes before what was refused.
        if let Some((domain, (rank, epoch))) = refused {
            self.domains[domain].refused = Some((rank, epoch));
            return Some(Found::Failed(Error::PeerRefused { rank, epoch }));
        }
        if is_idle && let Some(ended) = asked_to_end(comm, domains) {
            return Some(Found::Ended(ended));
        }
        (peer.is_some() && awaited != peer).then_some(Found::Moved)
    }

    /// The loop is over: attention ranks that go on are told.
    fn end(&mut self, domains: &[Moe], ended: Ended) {
        self.ended = Some(ended);
        if ended == Ended::Done {
            domains.iter().for_each(Moe::see_off);
        }
        domains.iter().for_each(|moe| moe.leave(ended == Ended::Done));
    }
}

/// Whether somebody has asked all loops to end.
fn asked_to_end(comm: &CommInner, domains: &[Moe]) -> Option<Ended> {
    let asks = |moe: &Moe, source: usize| closing::asks_to_end(moe.peers[source].word64(moe.layout.closed));
    let asking = |moe: &Moe| moe.parties.sources.iter().copied().find(|&source| asks(moe, source));
    let shut_down = domains.iter().find_map(asking).map(|by| Ended::ShutDown { by });
    shut_down.or_else(|| comm.aborted_by().map(|by| Ended::Aborted { by }))
}

impl Domain {
    /// Looks at the words that the next exchange depends on, from the first on that was not seen.
    fn look(&mut self, moe: &Moe, is_idle: bool) -> Next {
        let epoch = moe.next_epoch();
        if let Some(trampolines) = &moe.trampolines {
            return self.look_at_blocks(moe, trampolines, epoch, is_idle);
        }
        let sources = &moe.parties.sources;
        while let Some(&source) = sources.get(self.seen) {
            let seen = match moe.part_of(source, epoch) {
                Part::Published => Seen::Sent,
                Part::Closed => Seen::Closed,
                Part::Open if moe.has_refused(source, epoch) => return Next::Refused(source),
                Part::Open => return Next::Awaits(source),
            };
            if *self.all.get_or_insert(seen) != seen {
                return Next::Left(if seen == Seen::Closed { source } else { sources[0] });
            }
            moe.counts.words(u64::from(seen == Seen::Sent));
            self.seen += 1;
        }
        self.all_seen()
    }

    fn all_seen(&self) -> Next {
        match self.all {
            Some(Seen::Closed) => Next::Over,
            _ => Next::Ready,
        }
    }

    /// As [`look`](Self::look), at the trampolines' words; and where there is nothing else to do at those of the sources whose lists
    /// they have not forwarded.
    fn look_at_blocks(&mut self, moe: &Moe, trampolines: &Trampolines, epoch: u64, is_idle: bool) -> Next {
        while self.seen < trampolines.count() {
            let (block, rank) = (self.seen, trampolines.rank(self.seen));
            let seen = match trampolines.has_forwarded(block, epoch) {
                true => Seen::Sent,
                false if !is_idle => return Next::Awaits(rank),
                false => {
                    // It leaves after the last source has closed.
                    let has_left = trampolines.has_left(block, epoch);
                    match sources_that_wait(moe, &moe.parties.sources[trampolines.sources(block, &moe.parties)], epoch)
                    {
                        Next::Over => Seen::Closed,
                        Next::Awaits(_) if has_left && !trampolines.has_forwarded(block, epoch) => {
                            return Next::Left(rank);
                        }
                        Next::Awaits(_) | Next::Ready => return Next::Awaits(rank),
                        other => return other,
                    }
                }
            };
            if *self.all.get_or_insert(seen) != seen {
                return Next::Left(moe.parties.sources[trampolines.sources(block, &moe.parties).start]);
            }
            moe.counts.words(u64::from(seen == Seen::Sent));
            self.seen += 1;
        }
        self.all_seen()
    }
}

/// How it stands with sources whose lists a trampoline has not forwarded.
fn sources_that_wait(moe: &Moe, sources: &[usize], epoch: u64) -> Next {
    let (mut sent, mut closed, mut refused, mut awaited) = (false, None, None, None);
    for &source in sources {
        match moe.part_of(source, epoch) {
            Part::Published => sent = true,
            Part::Closed => closed = closed.or(Some(source)),
            Part::Open if moe.has_refused(source, epoch) => refused = Some(source),
            Part::Open => awaited = Some(source),
        }
    }
    match (closed, refused, awaited) {
        (Some(source), ..) if sent => Next::Left(source),
        (_, Some(source), _) => Next::Refused(source),
        (_, _, Some(source)) => Next::Awaits(source),
        (Some(_), ..) => Next::Over,
        // All have sent: the trampoline is at it.
        _ => Next::Ready,
    }
}

impl Moe {
    /// What a source does in an exchange.
    fn part_of(&self, source: usize, epoch: u64) -> Part {
        let outbox = &self.peers[source];
        closing::look(outbox.word64(self.layout.dispatched), outbox.word64(self.layout.closed), epoch)
    }

    /// Whether a source's input was refused there; a good one may have followed.
    fn has_refused(&self, source: usize, epoch: u64) -> bool {
        let refused = self.peers[source].word64(self.layout.refused).load(Acquire);
        refused == epoch && self.part_of(source, epoch) == Part::Open
    }

    /// Whether nobody needs anything more of what this rank passes on.
    fn has_passed_all_on(&self) -> bool {
        self.has_returned_all() && self.between().is_none_or(|(_, between)| between.borrow().rail.undone().is_none())
    }

    /// Passes on what others may still wait for: what this rank gathers for its node, and the sums that it answers for. At most until
    /// the deadline.
    fn see_off(&self) {
        if self.has_passed_all_on() {
            return;
        }
        let what = Waiting { operation: Operation::E2aSend, epoch: self.next_epoch(), peer: None };
        // Who has died or left is found by those who wait for it.
        let _ = self.comm.wait(what, || {
            let failed = self.forward().is_err();
            (failed || self.has_passed_all_on()).then_some(())
        });
    }
}

impl Drop for Experts {
    fn drop(&mut self) {
        let serving = self.serving.get_mut();
        if serving.ended.is_none() {
            self.domains.iter().for_each(|moe| moe.leave(false));
        }
        self.domains.iter().for_each(Moe::see_off);
    }
}
