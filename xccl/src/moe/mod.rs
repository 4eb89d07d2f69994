//! Expert parallelism: dispatch each token to the ranks that hold its experts, combine what comes back.
//!
//! # The protocol
//! Exchange `e` (counted from 1) uses slot `e % 2` of every rank's outbox for this handle.
//! - *dispatch_send*: the rank writes its rows and its lists (entries sorted by expert, so that each receiver finds its own
//!   as one contiguous part) and publishes `dispatched = e`.
//! - *dispatch_recv*: for each source, wait for `dispatched >= e`, copy its part of the lists out, check it. Rows stay where
//!   they are. Source by source an area of output rows is assigned.
//! - *combine_send*: the rank has written expert outputs into its own outbox; it writes where each source's area begins and
//!   publishes `combined = e`, a word of the slot: dispatches go in order, the two exchanges in flight may be combined in
//!   either one.
//! - *combine_recv*: for each rank that had entries of this one, wait for `combined >= e`, then read the rows.
//!
//! Who may overwrite what: token rows and lists of `e` are rewritten in `dispatch_send(e + 2)`, which first waits until every
//! rank has published `combined >= e`, hence has no more use for them. Output rows of `e` are rewritten after
//! `dispatch_recv(e + 2)` has seen `dispatched >= e + 2` of every source, which a source publishes only after its
//! `combine_recv(e)`. So no word exists just to give memory back.
//!
//! How ranks of other nodes take part: [`between`].

mod arrivals;
mod batch;
mod between;
mod combine;
mod config;
mod counts;
mod encoding;
mod epilogue;
#[cfg(test)]
mod far_tests;
mod install;
mod joined;
mod kernels;
mod lanes;
mod layout;
#[cfg(any(test, fuzzing))]
mod lies;
mod parties;
pub mod placement;
mod rail;
mod received;
mod roles;
mod routing;
mod smooth;
mod special;
mod terms;
mod ways;
mod wire;

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Instant;

pub use arrivals::Arrivals;
pub use batch::{BatchRow, ExpertBatch, TokenSum, WireRow};
use between::Between;
use combine::FirstRows;
pub use config::{MoeConfig, Reduction};
pub use counts::CountForm;
pub use encoding::WireRows;
pub use epilogue::{Epilogue, Residual, RmsNorm};
use lanes::LaneSet;
pub use lanes::Lanes;
use layout::{AREAS, MoeLayout, SLOTS, slot_of};
use parties::{Parties, Peers};
use placement::placed::Placed;
use received::{Received, SendAreas};
pub use roles::{Attention, DomainBatch, Ended, Experts, Forward, Role, RoleConfig, RoleCounts};
use roles::{Counting, Trampolines};
pub use routing::Routing;
use routing::{Choice, ListBuilder, SHARED_WEIGHT};
pub use smooth::SmoothScales;
pub use special::ConstantExperts;
use special::Vectors;
use ways::Ways;
pub use wire::{ScaleLayout, WireFormat};

use crate::comm::Communicator;
use crate::comm::inner::{Call, CommInner};
use crate::dtype::{Element, ExpertId};
use crate::error::{Error, Result};
use crate::fabric;
use crate::kernels::Kernels;
use crate::memory::area::{Area, Words};
use crate::memory::divided::Owners;
use crate::memory::row::Row;
use crate::memory::segment::Writers;
use crate::sync::closing;
use crate::sync::epoch;
use crate::sync::progress::{Operation, Waiting};

/// How far this rank has come in an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No exchange uses the slot, or only its rows are being filled.
    Free,
    /// Tokens are sent.
    Sent,
    /// Tokens are received; the batch is out.
    Received,
    /// Outputs are published.
    Combined,
}

/// One exchange in flight, as its source sees it.
struct Flight {
    epoch: u64,
    phase: Phase,
    tokens: usize,
    /// What the exchange goes by.
    placed: Arc<Placed>,
    /// Whether other nodes have to be told which placement that is.
    tell_placement: bool,
    choices: Vec<Choice>,
    /// The choices' factors, where this rank sums experts' outputs.
    weights: Vec<f32>,
    lists: Lists,
    /// The token rows, unless an [`InputRows`] has them.
    rows: Option<Area>,
    /// The receiver's side, unless a batch has it.
    received: Option<Box<Received>>,
    /// The source's side was dropped while the batch was still out.
    orphaned: bool,
}

/// Where the sender writes its lists.
struct Lists {
    starts: Area,
    entries: Area,
}

struct State {
    next: u64,
    /// What the next exchange goes by.
    placed: Arc<Placed>,
    /// Tokens of this rank by routed expert, rows by slot, since they were taken.
    expert_counts: Vec<i64>,
    slot_counts: Vec<i64>,
    flights: [Flight; SLOTS],
    builder: ListBuilder,
    first_rows: FirstRows,
    seen: SeenCombined,
}

/// The last exchange that each peer was seen to have combined, by slot: their words, which are on other cores, are looked at once.
struct SeenCombined {
    epochs: [Vec<u64>; SLOTS],
    /// All peers have combined this exchange.
    all: u64,
}

/// A handle for the exchanges of one MoE shape over one communicator. Two exchanges may be in flight.
///
/// It may be moved between threads and is used by one at a time.
///
/// ```
/// use xccl::{Communicator, Config, DType, Moe, MoeConfig, Routing, UniqueId};
/// # fn main() -> xccl::Result<()> {
/// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
/// let (hidden, topk, experts) = (16, 2, 4);
/// let moe = Moe::new(&comm, MoeConfig::new(8, hidden, topk, experts, DType::F32))?;
///
/// let tokens = vec![1.0f32; 2 * hidden];
/// let (ids, weights) = ([0i32, 3, 1, -1], [0.5f32, 0.5, 1.0, 0.0]);
/// let sent = moe.dispatch_send(&tokens, &Routing::new(&ids, &weights))?;
/// let mut batch = moe.dispatch_recv(&sent)?;
/// for i in 0..batch.len() {
///     let mut row = vec![0.0f32; hidden];
///     batch.copy_row(i, &mut row)?;
///     let expert = batch.local_experts()[batch.row(i).expert];
///     for (y, x) in batch.output_row::<f32>(i)?.iter_mut().zip(row) {
///         *y = x * expert as f32; // the expert's work
///     }
/// }
/// moe.combine_send(batch)?;
/// let mut out = vec![0.0f32; 2 * hidden];
/// moe.combine_recv(sent, &mut out)?;
/// assert_eq!((out[0], out[hidden]), (0.5 * 0.0 + 0.5 * 3.0, 1.0));
/// # Ok(())
/// # }
/// ```
pub struct Moe {
    comm: Arc<CommInner>,
    config: MoeConfig,
    layout: MoeLayout,
    parties: Arc<Parties>,
    /// What constant experts give.
    vectors: Vectors,
    /// What encodes, decodes, sums and norms rows.
    kernels: Kernels,
    /// The words of this rank's outbox for the handle.
    own: Words,
    /// The other ranks' outboxes for the handle, or their mirrors.
    peers: Arc<Peers>,
    state: RefCell<State>,
    lanes: RefCell<LaneSet>,
    ways: RefCell<Ways>,
    /// Who gathers what ranks of this node read of each other, where attention and experts are apart and it pays.
    trampolines: Option<Trampolines>,
    counts: Counting,
    /// What there is of other nodes.
    between: Option<RefCell<Between>>,
}

/// A dispatch that was sent: what [`Moe::dispatch_recv`] and [`Moe::combine_recv`] need to know of it.
///
/// Dropping it gives the exchange up: the peers learn of it if this rank has not published its experts' outputs.
#[must_use = "dropping it gives the exchange up"]
pub struct Exchange<'m> {
    moe: &'m Moe,
    epoch: u64,
}

impl Exchange<'_> {
    /// The exchange's number, from 1; the same on all ranks.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
}

/// Rows of this rank's outbox, to compute tokens in, so that [`Moe::dispatch_send_rows`] copies nothing.
///
/// Dropping them gives them back.
pub struct InputRows<'m, E> {
    moe: &'m Moe,
    tokens: usize,
    epoch: u64,
    /// `None` once they were given back.
    rows: Option<Area>,
    element: PhantomData<E>,
}

impl<E: Element> InputRows<'_, E> {
    /// The number of rows.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Row `token`: `hidden` elements, aligned to 64 bytes, with the contents that an earlier exchange left there.
    ///
    /// # Panics
    /// When `token` is not below [`len`](Self::len).
    pub fn row(&mut self, token: usize) -> &mut [E] {
        assert!(token < self.tokens, "row {token} of {}", self.tokens);
        let rows = self.rows.as_mut().expect("held until dropped");
        rows.slice_mut(token * self.moe.layout.stride, self.moe.config.hidden)
    }

    /// All rows at once, for a matrix product that writes where the peers read: `[len, row_stride]`, of which each row's first
    /// `hidden` elements count ([`Moe::row_stride`]).
    pub fn matrix(&mut self) -> &mut [E] {
        let elements = self.tokens * self.moe.row_stride();
        self.rows.as_mut().expect("held until dropped").slice_mut(0, elements)
    }
}

impl<E> Drop for InputRows<'_, E> {
    fn drop(&mut self) {
        self.moe.state.borrow_mut().flight(self.epoch).rows = self.rows.take();
    }
}

/// Tells the peers that this rank's input was bad, unless it is forgotten: after an error, or a panic of the threads that
/// share the copy.
struct Refusal<'m> {
    moe: &'m Moe,
    epoch: u64,
}

impl Drop for Refusal<'_> {
    fn drop(&mut self) {
        self.moe.refuse(self.epoch);
    }
}

/// What any thread needs to find rows in the ranks' outboxes.
#[derive(Clone, Copy)]
struct Outboxes<'m> {
    peers: &'m Peers,
    layout: &'m MoeLayout,
    hidden: usize,
    format: (Kernels, WireFormat),
    /// Whether a token has a row for each of its entries.
    row_per_entry: bool,
}

impl<'m> Outboxes<'m> {
    /// Where the token row of an entry of `source` lies in its outbox; the index was checked when the lists were taken.
    fn token_offset(&self, epoch: u64, received: &Received, source: usize, entry: usize) -> usize {
        let row = received.outbox_row(source, entry, self.row_per_entry);
        self.layout.slot(epoch).rows.start + row * self.layout.token.stride
    }

    /// The token row at `offset` of a source's outbox, which travels as it is.
    fn token<E: Element>(&self, source: usize, offset: usize) -> Row<'m, E> {
        self.peers[source].row(offset, self.hidden)
    }

    /// Row `row` of an area (offset, rows); `row` is what the peer says.
    fn output<E: Element>(&self, rank: usize, (start, rows): (usize, usize), row: usize) -> Result<Row<'m, E>> {
        if row >= rows {
            return Err(Error::Corrupt { rank, what: "an output row's index", value: row as u64, limit: rows as u64 });
        }
        Ok(self.peers[rank].row(start + row * self.layout.stride, self.hidden))
    }
}

impl State {
    /// The exchange that uses `epoch`'s slot.
    fn flight(&mut self, epoch: u64) -> &mut Flight {
        &mut self.flights[slot_of(epoch)]
    }
}

impl Moe {
    /// Makes a handle. Every rank of `comm` must call it, with the same configuration.
    ///
    /// # Errors
    /// [`Error::Config`] for a value out of range, [`Error::NotEnoughMemory`] before anything is created (the
    /// other ranks get [`Error::Bootstrap`] with its text), [`Error::Mismatch`] on every rank when the configurations differ.
    pub fn new(comm: &Communicator, config: MoeConfig) -> Result<Self> {
        let comm = &comm.inner;
        config.check(comm.world_size)?;
        let mine = format!("{config:?}");
        let configurations = comm.star().exchange(mine.as_bytes(), &[], comm.deadline())?;
        for (rank, (theirs, _)) in configurations.into_iter().enumerate() {
            if theirs != mine.as_bytes() {
                let theirs = String::from_utf8_lossy(&theirs).into_owned();
                return Err(Error::Mismatch { rank, what: "the MoE configuration".to_owned(), theirs, ours: mine });
            }
        }
        Self::between_parties(comm, config, Parties::all(comm.world_size), None)
    }

    /// Makes a handle among the ranks that have a part in it. Every rank of `comm` must call it, with the same configuration, which
    /// was checked and compared; with so many trampolines on each node, or none.
    fn between_parties(
        comm: &Arc<CommInner>,
        config: MoeConfig,
        parties: Parties,
        trampolines: Option<usize>,
    ) -> Result<Self> {
        let (comm, parties) = (comm.clone(), Arc::new(parties));
        let part = parties.part(comm.rank);
        let placed = Placed::new(&config.first_placement(comm.world_size)?, &parties, (comm.rank, &comm.nodes), 1);
        let kernels = comm.config.kernels.resolve("Config::kernels")?;
        let layout = MoeLayout::new(&config, &parties);
        let deadline = comm.deadline();
        // Who answers for far sources, or gathers for near ones, reads what all ranks of the node have.
        let gathers = |wanted| Trampolines::includes(&comm, &parties, wanted, comm.rank);
        let forwards = comm.fabric.far.is_some() || trampolines.is_some_and(gathers);
        let mut star = comm.star();
        let here = (0..comm.world_size).filter(|&rank| comm.is_near(rank));
        let all_here = here.map(|rank| layout.bytes_of(parties.part(rank))).sum();
        let enough = fabric::check_memory("the MoE handle", all_here, 1);
        let of = (|rank| layout.bytes_of(parties.part(rank)), |rank| parties.concerns(comm.rank, rank, forwards));
        let fabric::Segments { own, peers, .. } =
            fabric::exchange_segments_of(&mut star, &comm.config, enough, Writers::Owner, of, deadline)?;
        let own = Arc::new(own);
        let (between, mirrors) = match &comm.fabric.far {
            None => (None, vec![]),
            Some(far) => {
                let shape = (&config, &layout, &placed);
                let (between, mirrors) = Between::new(&comm, far, &mut star, (shape, &parties), &own, deadline)?;
                (Some(RefCell::new(between)), mirrors)
            }
        };
        let gathered = (&config, &*parties, &placed.starts[..]);
        let trampolines =
            trampolines.map(|wanted| Trampolines::new(&comm, &mut star, gathered, wanted, deadline)).transpose()?;
        drop(star);
        let mirrors = mirrors.into_iter().chain(std::iter::repeat_with(|| None));
        let peers = peers.into_iter().zip(mirrors).map(|(near, far)| near.or(far)).collect();
        let peers = Arc::new(Peers::new(peers));
        if let Some(between) = &between {
            between.borrow().rail.set_peers(peers.clone());
        }
        let (own, areas) = layout.split(own, part);
        let sent = if part.sends() { config.max_tokens * config.width().choices() } else { 0 };
        let flights = areas.map(|areas: [Area; AREAS]| {
            let ranks = (comm.rank, comm.world_size);
            let most = if part.receives() { layout.bases_per_source } else { 0 };
            let (received, SendAreas { starts, entries, rows }) =
                Received::new(&parties, ranks, (most, placed.clone()), areas);
            Flight {
                epoch: 0,
                phase: Phase::Free,
                tokens: 0,
                placed: placed.clone(),
                tell_placement: true,
                choices: Vec::with_capacity(sent),
                weights: Vec::with_capacity(if config.sums_here() { sent } else { 0 }),
                lists: Lists { starts, entries },
                rows: Some(rows),
                received: part.receives().then(|| Box::new(received)),
                orphaned: false,
            }
        });
        let builder = ListBuilder::new(config.experts, config.shared, config.special_experts());
        let first_rows = FirstRows::new(layout.positions, comm.world_size);
        #[cfg(not(any(test, fuzzing)))]
        let age = 0;
        #[cfg(any(test, fuzzing))]
        let age = comm.layout.age;
        let seen = SeenCombined { epochs: std::array::from_fn(|_| vec![0; comm.world_size]), all: age };
        let (expert_counts, slot_counts) = (vec![0; config.experts], vec![0; layout.bases_per_source]);
        let state = State { next: age + 1, placed, expert_counts, slot_counts, flights, builder, first_rows, seen };
        let (state, lanes, ways) = (RefCell::new(state), RefCell::default(), RefCell::default());
        let vectors = Vectors::new(&config);
        tracing::debug!(rank = comm.rank, experts = config.experts, tokens = config.max_tokens, "MoE handle ready");
        Ok(Moe {
            comm,
            config,
            layout,
            parties,
            vectors,
            kernels,
            own,
            peers,
            state,
            lanes,
            ways,
            trampolines,
            counts: Counting::default(),
            between,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// From now on shares the copies and sums of each call with `lanes` threads, 1 to 64, where there is enough to share;
    /// `threads` lends them. With 1, as at first, the calling thread works alone. Results have the same bits for any number.
    ///
    /// Shared are the copy of [`dispatch_send`](Self::dispatch_send), [`ExpertBatch::copy_into`] and
    /// [`ExpertBatch::copy_padded`], what [`combine_send`](Self::combine_send) sums, the copy of
    /// [`combine_send_from`](Self::combine_send_from), and [`combine_recv`](Self::combine_recv). A panic of `threads` goes on in
    /// the call.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_lanes(&self, lanes: usize, threads: Arc<dyn Lanes>) -> Result<()> {
        self.lanes.replace(LaneSet::new(lanes, threads)?);
        Ok(())
    }

    /// The lanes, for one call: while its threads run, nothing of the handle is borrowed for them.
    fn lanes(&self) -> LaneSet {
        self.lanes.borrow().clone()
    }

    /// Where rows lie, for any thread.
    fn outboxes(&self) -> Outboxes<'_> {
        Outboxes {
            peers: &self.peers,
            layout: &self.layout,
            hidden: self.config.hidden,
            format: (self.kernels, self.config.wire),
            row_per_entry: self.config.smooth.is_some(),
        }
    }

    /// Elements from one row of [`InputRows::matrix`] or [`ExpertBatch::output_matrix`] to the next: `hidden`, rounded up to
    /// 64 bytes.
    pub fn row_stride(&self) -> usize {
        self.layout.stride / self.config.dtype.size()
    }

    /// The logical experts in `rank`'s slots, by the placement of the next exchange.
    ///
    /// # Errors
    /// [`Error::InvalidRank`].
    pub fn experts_of(&self, rank: usize) -> Result<Vec<usize>> {
        self.comm.check_rank(rank)?;
        Ok(self.state.borrow().placed.local(rank).to_vec())
    }

    /// The number of `rank`'s slots, by the placement of the next exchange: the length of [`experts_of`](Self::experts_of).
    ///
    /// # Errors
    /// [`Error::InvalidRank`].
    pub fn slots_of(&self, rank: usize) -> Result<usize> {
        self.comm.check_rank(rank)?;
        Ok(self.state.borrow().placed.local(rank).len())
    }

    /// Sends the tokens of one exchange: `tokens` is `[T, hidden]`, T the routing's number of tokens, at most `max_tokens`,
    /// possibly 0, different on every rank. The rows are copied once, or encoded on the way. Blocks only until every rank has finished the exchange
    /// before the last.
    ///
    /// # Errors
    /// Bad input ([`Error::TooManyTokens`], [`Error::ExpertOutOfRange`], [`Error::DuplicateExpert`], [`Error::Shape`],
    /// [`Error::DTypeMismatch`]) is reported before anything is published, and ranks that wait for this one are told
    /// ([`Error::PeerRefused`]); both sides may try again. [`Error::TooManyInFlight`] for a third exchange.
    pub fn dispatch_send<E: Element, I: ExpertId>(
        &self,
        tokens: &[E],
        routing: &Routing<'_, I>,
    ) -> Result<Exchange<'_>> {
        let epoch = self.claim()?;
        self.send(epoch, routing, |count, rows, lists, choices| {
            self.check_rows("tokens", tokens, count)?;
            match self.config.wire {
                WireFormat::Native => self.copy_tokens(tokens, count, rows),
                _ => self.encode_tokens(tokens, rows, lists, choices),
            }
        })
    }

    /// Copies the tokens into the outbox.
    fn copy_tokens<E: Element>(&self, tokens: &[E], count: usize, rows: &mut Area) -> Result<()> {
        let (hidden, stride, lanes) = (self.config.hidden, self.layout.stride, self.lanes());
        let cut = lanes.cut(count, count * stride);
        let rows = rows.divide::<E>(0, count, stride, Owners::Blocks(cut.each));
        let bytes = count * stride;
        let may_stream = bytes >= kernels::STREAMING_OUTBOX_BYTES;
        let streaming = may_stream && self.ways.borrow().past_caches();
        let started = may_stream.then(Instant::now);
        lanes.share(cut, &|piece| {
            let (mut part, range) = (rows.part(piece), cut.range(piece));
            let tokens = &tokens[range.start * hidden..range.end * hidden];
            if streaming {
                for (i, token) in range.zip(tokens.chunks_exact(hidden)) {
                    kernels::stream(Row::from(token), &mut part.row_mut(i)[..hidden]);
                }
                kernels::end_streaming();
            } else if hidden * size_of::<E>() == stride {
                part.rows_mut(range).copy_from_slice(tokens);
            } else {
                for (i, token) in range.zip(tokens.chunks_exact(hidden)) {
                    part.row_mut(i)[..hidden].copy_from_slice(token);
                }
            }
            Ok(())
        })?;
        if let Some(started) = started {
            self.ways.borrow_mut().took(bytes, started.elapsed());
        }
        Ok(())
    }

    /// Rows of the outbox for the next exchange: the engine computes its `tokens` tokens there.
    ///
    /// # Errors
    /// [`Error::TooManyTokens`], [`Error::DTypeMismatch`] and, where rows travel encoded, [`Error::Wire`], which ranks that wait
    /// for this one are told, and [`Error::TooManyInFlight`]; it blocks as [`dispatch_send`](Self::dispatch_send) does.
    pub fn input_rows<E: Element>(&self, tokens: usize) -> Result<InputRows<'_, E>> {
        let check = || {
            self.check_dtype::<E>("input_rows")?;
            self.check_native("input_rows", "use dispatch_send, or input_wire_rows for quantized tokens")
        };
        let (epoch, rows) = self.lend("input_rows", tokens, check)?;
        Ok(InputRows { moe: self, tokens, epoch, rows: Some(rows), element: PhantomData })
    }

    /// Takes the next exchange's rows out for `tokens` tokens.
    fn lend(&self, call: &'static str, tokens: usize, check: impl FnOnce() -> Result<()>) -> Result<(u64, Area)> {
        let epoch = self.claim()?;
        let take = || {
            check()?;
            if tokens > self.config.max_tokens {
                return Err(Error::TooManyTokens { given: tokens, limit: self.config.max_tokens });
            }
            let expected = "the earlier rows to be sent or dropped first";
            let rows = self.state.borrow_mut().flight(epoch).rows.take();
            rows.ok_or(Error::WrongOrder { call, epoch, expected })
        };
        Ok((epoch, take().inspect_err(|_| self.refuse(epoch))?))
    }

    /// As [`dispatch_send`](Self::dispatch_send), for tokens that lie in the outbox already.
    ///
    /// # Errors
    /// As [`dispatch_send`](Self::dispatch_send); [`Error::WrongOrder`] when the rows were made for an exchange that was sent
    /// meanwhile.
    pub fn dispatch_send_rows<'m, E: Element, I: ExpertId>(
        &'m self,
        rows: InputRows<'m, E>,
        routing: &Routing<'_, I>,
    ) -> Result<Exchange<'m>> {
        let lent = (rows.moe, rows.epoch, rows.tokens);
        self.send_lent("dispatch_send_rows", lent, routing, || drop(rows))
    }

    /// Sends rows that were lent, once `give_back` has given them back.
    fn send_lent<'m, I: ExpertId>(
        &'m self,
        call: &'static str,
        (moe, made_for, tokens): (&Moe, u64, usize),
        routing: &Routing<'_, I>,
        give_back: impl FnOnce(),
    ) -> Result<Exchange<'m>> {
        let epoch = self.claim()?;
        if !std::ptr::eq(moe, self) || made_for != epoch {
            let expected = "rows of the same handle, made for this exchange";
            return Err(Error::WrongOrder { call, epoch, expected });
        }
        give_back();
        self.send(epoch, routing, |count, _, _, _| match count == tokens {
            true => Ok(()),
            false => Err(Error::Shape { what: "topk_ids / topk", given: count, expected: format!("{tokens} (rows)") }),
        })
    }

    /// The next exchange's number, once its slot may be written.
    fn claim(&self) -> Result<u64> {
        self.comm.check_process()?;
        let mut state = self.state.borrow_mut();
        let epoch = state.next;
        let slot = slot_of(epoch);
        let State { flights, seen, .. } = &mut *state;
        if flights[slot].phase != Phase::Free {
            return Err(Error::TooManyInFlight { limit: SLOTS, oldest: flights[slot].epoch });
        }
        let Some(previous) = epoch.checked_sub(SLOTS as u64).filter(|&p| p > seen.all) else { return Ok(epoch) };
        let mut call = Call::default();
        if let Some(block) = self.near_block() {
            self.await_returned(&mut call, block, previous, Operation::DispatchSend)?;
        } else {
            for &peer in self.parties.destinations.iter().filter(|&&peer| self.comm.is_near(peer)) {
                let seen = &mut seen.epochs[slot][peer];
                if *seen < previous {
                    self.await_combined(&mut call, peer, previous, Operation::DispatchSend)?;
                    *seen = previous;
                }
            }
        }
        if let Some((_, between)) = self.between() {
            let between = between.borrow();
            let what = Waiting { operation: self.operation(Operation::DispatchSend), epoch, peer: None };
            // All of this node have combined, as just seen.
            self.comm.wait_in(&mut call, what, || between.rail.is_done(previous).then_some(()))?;
            self.counts.words(between.others() as u64);
            between.await_returned(&self.comm, &mut call, previous, self.operation(Operation::DispatchSend))?;
        }
        seen.all = previous;
        Ok(epoch)
    }

    /// Waits until a rank of this node has combined `epoch`.
    fn await_combined(&self, call: &mut Call, peer: usize, epoch: u64, during: Operation) -> Result<()> {
        let outbox = &self.peers[peer];
        let (combined, closed) = (outbox.word64(self.layout.slot(epoch).combined), outbox.word64(self.layout.closed));
        let during = self.operation(during);
        let what = Waiting { operation: during, epoch, peer: Some(peer) };
        self.counts.words(1);
        self.comm.wait_in(call, what, || {
            if epoch::reached(combined, epoch) {
                return Some(Ok(()));
            }
            // An exchange that it has begun before it left may still be combined.
            let has_left = closing::is_closed(closed, epoch);
            has_left.then(|| Err(self.comm.or_the_end(Error::PeerLeft { rank: peer, during, epoch }, during, epoch)))
        })?
    }

    /// What a call is named in errors and progress words.
    fn operation(&self, operation: Operation) -> Operation {
        match operation {
            _ if !self.parties.are_apart => operation,
            Operation::DispatchSend => Operation::A2eSend,
            Operation::DispatchRecv => Operation::A2eRecv,
            Operation::CombineSend => Operation::E2aSend,
            Operation::CombineRecv => Operation::E2aRecv,
            other => other,
        }
    }

    /// The block of trampolines that this rank is in, if it sends tokens to some of this node.
    fn near_block(&self) -> Option<usize> {
        self.trampolines.as_ref()?.block_of(self.parties.index_of(self.comm.rank))
    }

    /// Waits until a trampoline of this node has returned `epoch`.
    fn await_returned(&self, call: &mut Call, block: usize, epoch: u64, during: Operation) -> Result<()> {
        let Some(trampolines) = &self.trampolines else { return Ok(()) };
        let (rank, during) = (trampolines.ranks()[block], self.operation(during));
        let what = Waiting { operation: during, epoch, peer: Some(rank) };
        self.counts.words(1);
        self.comm.wait_in(call, what, || {
            if trampolines.has_returned(block, epoch) {
                return Some(Ok(()));
            }
            let has_left = trampolines.has_left(block, epoch) && !trampolines.has_returned(block, epoch);
            has_left.then(|| Err(self.comm.or_the_end(Error::PeerLeft { rank, during, epoch }, during, epoch)))
        })?
    }

    /// Tells those who wait for what this rank has combined: the sources or the trampolines, and who answers for other nodes.
    fn notify_sources(&self) {
        self.counts.published(1);
        match &self.trampolines {
            Some(trampolines) => trampolines.ranks().iter().for_each(|&rank| self.comm.notify(rank)),
            None => self.comm.notify_all(),
        }
        self.comm.call_for_chores();
    }

    fn send<I: ExpertId>(
        &self,
        epoch: u64,
        routing: &Routing<'_, I>,
        fill_rows: impl FnOnce(usize, &mut Area, (&Placed, &[u32]), &[Choice]) -> Result<()>,
    ) -> Result<Exchange<'_>> {
        let call = self.comm.board.begins(self.operation(Operation::DispatchSend), epoch);
        let refusal = Refusal { moe: self, epoch };
        self.fill(epoch, routing, fill_rows)?;
        std::mem::forget(refusal);
        epoch::publish(self.own.word64(self.layout.dispatched), epoch);
        self.counts.published(1);
        match self.near_block().and_then(|block| Some(self.trampolines.as_ref()?.ranks()[block])) {
            Some(trampoline) => self.comm.notify(trampoline),
            None => self.comm.notify_all(),
        }
        if let Some((far, between)) = self.between() {
            let mut state = self.state.borrow_mut();
            let Flight { tokens, choices, lists, placed, tell_placement, .. } = state.flight(epoch);
            let starts = lists.starts.slice_mut::<u32>(0, placed.positions() + 1);
            let shape = (&self.config, &self.layout, &*placed);
            let exchange = (*tokens, std::mem::take(tell_placement));
            let sent = between.borrow_mut().dispatch(far, shape, epoch, exchange, choices, starts);
            self.comm.counters.far_rows.fetch_add(sent.rows, Relaxed);
            self.counts.far(sent.messages, sent.bytes);
            between.borrow().rail.begin(epoch, placed);
        }
        call.over();
        Ok(Exchange { moe: self, epoch })
    }

    /// Tells the ranks that wait for this one's tokens that its input was bad.
    fn refuse(&self, epoch: u64) {
        if self.comm.is_forked() {
            return;
        }
        self.own.word64(self.layout.refused).store(epoch, Release);
        self.comm.notify_all();
        if let Some((far, between)) = self.between() {
            between.borrow().tell(far, self.layout.refused, epoch);
        }
    }

    fn fill<I: ExpertId>(
        &self,
        epoch: u64,
        routing: &Routing<'_, I>,
        fill_rows: impl FnOnce(usize, &mut Area, (&Placed, &[u32]), &[Choice]) -> Result<()>,
    ) -> Result<()> {
        let config = &self.config;
        let tokens = routing.tokens(config.topk, config.max_tokens)?;
        let mut state = self.state.borrow_mut();
        let State { next, flights, builder, placed, expert_counts, .. } = &mut *state;
        let flight = &mut flights[slot_of(epoch)];
        let expected = "the rows that were lent to be sent or dropped first";
        let rows = flight.rows.as_mut().ok_or(Error::WrongOrder { call: "dispatch_send", epoch, expected })?;
        if !Arc::ptr_eq(&flight.placed, placed) {
            (flight.placed, flight.tell_placement) = (placed.clone(), true);
        }
        let width = config.width();
        let starts = flight.lists.starts.slice_mut(0, placed.positions() + 1);
        let entries = flight.lists.entries.slice_mut(0, tokens * width.choices());
        builder.build(routing, width, placed, &mut flight.choices, starts, entries)?;
        if config.sums_here() {
            flight.weights.clear();
            match width.shared {
                0 => flight.weights.extend_from_slice(routing.weights),
                shared => routing.weights.chunks_exact(width.topk).for_each(|weights| {
                    let shared = std::iter::repeat_n(SHARED_WEIGHT, shared);
                    flight.weights.extend(weights.iter().copied().chain(shared));
                }),
            }
        }
        fill_rows(tokens, rows, (placed, starts), &flight.choices)?;
        placed.count(starts, &flight.choices, expert_counts);
        if flight.tell_placement {
            self.mark(epoch, placed);
        }
        self.own.word32(self.layout.slot(epoch).tokens).store(tokens as u32, Relaxed);
        (flight.epoch, flight.phase, flight.tokens, flight.orphaned) = (epoch, Phase::Sent, tokens, false);
        *next = epoch + 1;
        self.comm.counters.tokens.fetch_add(tokens as u64, Relaxed);
        Ok(())
    }

    /// Receives what all ranks sent to this rank's experts. Rows stay in the senders' memory. Blocks until all have sent.
    ///
    /// # Errors
    /// [`Error::Timeout`], [`Error::PeerDied`] and the like name the rank that was waited for; [`Error::PeerRefused`] one
    /// whose input was bad. The call may be repeated. [`Error::PlacementMismatch`] where ranks have not installed the same
    /// placement.
    pub fn dispatch_recv<'m>(&'m self, sent: &Exchange<'m>) -> Result<ExpertBatch<'m>> {
        let call = self.comm.board.begins(self.operation(Operation::DispatchRecv), sent.epoch);
        let mut batch = self.start_batch("dispatch_recv", sent)?;
        match batch.receive_all() {
            Ok(()) => {
                batch.complete();
                call.over();
                Ok(batch)
            }
            Err(err) => {
                batch.give_back();
                Err(err)
            }
        }
    }

    /// As [`dispatch_recv`](Self::dispatch_recv), source by source in the order of arrival, so that work on the first tokens
    /// begins while the last are still on their way. Never blocks: [`Arrivals::next_source`] does.
    ///
    /// # Errors
    /// [`Error::WrongOrder`].
    pub fn dispatch_recv_by_source<'m>(&'m self, sent: &Exchange<'m>) -> Result<Arrivals<'m>> {
        Ok(Arrivals::new(self.start_batch("dispatch_recv_by_source", sent)?))
    }

    fn start_batch<'m>(&'m self, call: &'static str, sent: &Exchange<'m>) -> Result<ExpertBatch<'m>> {
        self.comm.check_process()?;
        let epoch = self.check_exchange(call, sent, Phase::Sent, "to be called once, after dispatch_send")?;
        let mut state = self.state.borrow_mut();
        let flight = state.flight(epoch);
        let expected = "to be called once at a time";
        let mut received = flight.received.take().ok_or(Error::WrongOrder { call, epoch, expected })?;
        received.go_by(&flight.placed);
        flight.phase = Phase::Received;
        Ok(ExpertBatch::new(self, epoch, received))
    }

    /// Waits until [`ExpertBatch::rows_done`] has reached the batch's length: until those who compute on other threads or
    /// devices have written all outputs.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, DType, Moe, MoeConfig, Routing, UniqueId};
    /// # use std::sync::atomic::Ordering::Release;
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// # let moe = Moe::new(&comm, MoeConfig::new(8, 16, 1, 4, DType::F32))?;
    /// # let sent = moe.dispatch_send(&[1.0f32; 32], &Routing::new(&[0i32, 3], &[1.0, 1.0]))?;
    /// let batch = moe.dispatch_recv(&sent)?;
    /// let (rows, done) = (batch.len() as u64, batch.rows_done());
    /// std::thread::scope(|s| {
    ///     s.spawn(|| done.fetch_add(rows, Release)); // after it has written them
    ///     moe.await_rows(&batch)
    /// })?;
    /// moe.combine_send(batch)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Timeout`] and what waiting can meet; the call may be repeated.
    pub fn await_rows(&self, batch: &ExpertBatch<'_>) -> Result<()> {
        let what = Waiting {
            operation: self.operation(Operation::CombineSend),
            epoch: batch.epoch(),
            peer: Some(self.comm.rank),
        };
        let (done, rows) = (batch.rows_done(), batch.len() as u64);
        self.comm.poll(what, || (done.load(Acquire) >= rows).then_some(()))
    }

    /// Where `rank`'s outbox for this handle is mapped, and its bytes: for registering it with a device. That of another rank
    /// may only be read.
    ///
    /// # Errors
    /// [`Error::InvalidRank`].
    pub fn outbox_address(&self, rank: usize) -> Result<(*const u8, usize)> {
        self.comm.check_rank(rank)?;
        if rank == self.comm.rank {
            return Ok(self.own.address());
        }
        let outbox = self.peers.get(rank).ok_or(Error::InvalidRank { rank, world_size: self.comm.world_size })?;
        Ok((outbox.at(0, outbox.len()), outbox.len()))
    }

    /// Publishes the outputs that were written through [`ExpertBatch::output_row`]. With [`Reduction::PerRank`] it first forms
    /// this rank's weighted sums. Never blocks.
    ///
    /// # Errors
    /// [`Error::WrongOrder`] for a batch of another handle.
    pub fn combine_send(&self, mut batch: ExpertBatch<'_>) -> Result<()> {
        let epoch = batch.epoch();
        if !batch.is_of(self) {
            let expected = "a batch of the same handle";
            return Err(Error::WrongOrder { call: "combine_send", epoch, expected });
        }
        batch.publish()
    }

    /// As [`combine_send`](Self::combine_send), with the outputs in a buffer: `[batch.len(), hidden]` in the batch's order,
    /// copied once, or with [`Reduction::PerRank`] summed on the way.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::DTypeMismatch`] hand nothing out; the exchange is then given up.
    pub fn combine_send_from<E: Element>(&self, mut batch: ExpertBatch<'_>, outputs: &[E]) -> Result<()> {
        batch.take_outputs(outputs)?;
        self.combine_send(batch)
    }

    /// As [`combine_send`](Self::combine_send), with the sums formed by the engine, in [`ExpertBatch::sum_row`]s.
    ///
    /// # Errors
    /// [`Error::WrongOrder`] for a batch of another handle, and without [`Reduction::PerRank`]; the exchange is then given up.
    pub fn combine_send_sums(&self, mut batch: ExpertBatch<'_>) -> Result<()> {
        batch.take_sums()?;
        self.combine_send(batch)
    }

    fn check_exchange(
        &self,
        call: &'static str,
        sent: &Exchange<'_>,
        phase: Phase,
        expected: &'static str,
    ) -> Result<u64> {
        self.comm.check_process()?;
        let epoch = sent.epoch;
        if !std::ptr::eq(sent.moe, self) {
            return Err(Error::WrongOrder { call, epoch, expected: "an exchange of the same handle" });
        }
        let state = self.state.borrow();
        let flight = &state.flights[slot_of(epoch)];
        if flight.phase == phase { Ok(epoch) } else { Err(Error::WrongOrder { call, epoch, expected }) }
    }

    fn check_dtype<E: Element>(&self, what: &'static str) -> Result<()> {
        if E::DTYPE == self.config.dtype {
            return Ok(());
        }
        Err(Error::DTypeMismatch { what, given: E::DTYPE, expected: self.config.dtype })
    }

    fn check_rows<E: Element>(&self, what: &'static str, rows: &[E], count: usize) -> Result<()> {
        self.check_dtype::<E>(what)?;
        if rows.len() == count * self.config.hidden {
            return Ok(());
        }
        let expected = format!("{} ({count} rows * hidden {})", count * self.config.hidden, self.config.hidden);
        Err(Error::Shape { what, given: rows.len(), expected })
    }

    /// Tells the peers that this rank's outputs of `epoch` will not come, and that its tokens may be overwritten.
    fn abandon(&self, epoch: u64) {
        if self.comm.is_forked() {
            return;
        }
        let slot = self.layout.slot(epoch);
        self.own.word64(slot.abandoned).store(epoch, Release);
        epoch::publish(self.own.word64(slot.combined), epoch);
        self.notify_sources();
    }
}

/// Waits until what this rank does for ranks of other nodes is done, at most the deadline: they could not go on without.
impl Drop for Moe {
    fn drop(&mut self) {
        let Some((_, between)) = self.between().filter(|_| !self.comm.is_forked()) else { return };
        let between = between.borrow();
        let Some(epoch) = between.rail.undone() else { return };
        let what = Waiting { operation: self.operation(Operation::CombineRecv), epoch, peer: None };
        // Who has died or left is found by those who wait for it.
        let _ = self.comm.wait(what, || between.rail.undone().is_none().then_some(()));
    }
}

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        let mut state = self.moe.state.borrow_mut();
        let flight = state.flight(self.epoch);
        // A batch that is still out abandons for itself when it is dropped, or combines after all.
        let abandons = flight.phase == Phase::Sent && self.moe.parties.part(self.moe.comm.rank).receives();
        match flight.phase {
            Phase::Received => flight.orphaned = true,
            _ => flight.phase = Phase::Free,
        }
        drop(state);
        if abandons {
            self.moe.abandon(self.epoch);
        }
    }
}
