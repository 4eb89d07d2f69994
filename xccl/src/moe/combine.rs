//! The source's side of a combine: what the experts' ranks have published is read once and summed.

use std::sync::atomic::Ordering::{Acquire, Relaxed};

use super::between::Between;
use super::config::MAX_TOPK;
use super::epilogue::{Epilogue, Steps};
use super::kernels::Sum;
use super::layout::{SlotLayout, slot_of};
use super::placement::placed::Placed;
use super::routing::Choice;
use super::special::{Special, Vectors};
use super::terms::{Terms, sum_each};
use super::{
    Exchange, Flight, Lists, Moe, MoeConfig, Outboxes, Phase, Reduction, State, Trampolines, WireFormat, kernels,
};
use crate::comm::inner::Call;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::memory::divided::{Divided, Owners};
use crate::memory::row::Row;
use crate::sync::epoch;
use crate::sync::progress::Operation;

/// Where the peers say that their output rows for this rank begin; kept from exchange to exchange.
pub(super) struct FirstRows {
    /// By position; with [`Reduction::PerRank`] by rank.
    first: Vec<u32>,
    /// Sums taken before each piece, `[piece, rank or other node]`.
    taken: Vec<u32>,
    /// What a trampoline says, before it is put in its places.
    copied: Vec<u32>,
}

impl FirstRows {
    pub(super) fn new(positions: usize, world_size: usize) -> Self {
        let most = positions.max(world_size);
        FirstRows { first: vec![0; most], taken: vec![], copied: vec![0; most] }
    }

    /// Notes where in the sums of each rank or node the pieces begin, each of `choices` choices: those of a token stand
    /// together.
    fn count_sums(&mut self, senders: Senders<'_>, all: &[Choice], each: usize, choices: usize, pieces: usize) {
        let width = senders.width();
        self.taken.clear();
        self.taken.resize(pieces * width, 0);
        for (i, piece) in all.chunks(choices.max(1)).take(pieces - 1).enumerate() {
            let (before, after) = self.taken[i * width..].split_at_mut(width);
            let after = &mut after[..width];
            after.copy_from_slice(before);
            for choices in piece.chunks_exact(each) {
                senders.of(choices).get().iter().for_each(|&sender| after[sender as usize] += 1);
            }
        }
    }
}

/// Who sends sums: with [`Reduction::PerRank`] the ranks of this node, and in any case the other nodes. Those are numbered after
/// the ranks.
#[derive(Clone, Copy)]
struct Senders<'a> {
    placed: &'a Placed,
    between: Option<&'a Between>,
    /// Whether ranks do.
    ranks: bool,
    world_size: usize,
}

impl Senders<'_> {
    fn width(&self) -> usize {
        self.world_size + self.between.map_or(0, Between::others)
    }

    /// Who sends sums for one token, ascending.
    fn of(&self, choices: &[Choice]) -> SenderSet {
        let (mut senders, mut n) = ([0; MAX_TOPK], 0);
        for choice in choices.iter().filter(|c| c.is_placed()) {
            let sender = match self.placed.node_of(choice.position) {
                Some(node) => (self.world_size + node) as u32,
                None if self.ranks => self.placed.rank[choice.position as usize],
                None => continue,
            };
            if !senders[..n].contains(&sender) {
                senders[n] = sender;
                n += 1;
            }
        }
        senders[..n].sort_unstable();
        SenderSet { senders, n }
    }
}

struct SenderSet {
    senders: [u32; MAX_TOPK],
    n: usize,
}

impl SenderSet {
    fn get(&self) -> &[u32] {
        &self.senders[..self.n]
    }
}

impl Moe {
    /// Receives the experts' outputs and writes `out[t] = sum over k of weight[t, k] * output[t, k]`, `[T, hidden]`, summed in
    /// f32 and rounded once. Tokens without experts get zeros. Blocks until the ranks that had tokens of this one have
    /// published.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DTypeMismatch`], [`Error::WrongOrder`], [`Error::PeerAbandoned`], [`Error::Corrupt`] and what
    /// waiting can meet. The exchange has ended then.
    pub fn combine_recv<E: Element>(&self, sent: Exchange<'_>, out: &mut [E]) -> Result<()> {
        self.combine_recv_with(sent, out, Epilogue::default())
    }

    /// As [`combine_recv`](Self::combine_recv), and adds a bias and residual rows before the sums are rounded, and norms what it
    /// has written, all while a row is in registers and caches: [`Epilogue`] has the formula.
    ///
    /// # Errors
    /// As [`combine_recv`](Self::combine_recv); [`Error::Config`] for an `eps` that is none.
    pub fn combine_recv_with<E: Element>(
        &self,
        sent: Exchange<'_>,
        out: &mut [E],
        epilogue: Epilogue<'_, E>,
    ) -> Result<()> {
        let before = match self.parties.part(self.comm.rank).receives() {
            true => Phase::Combined,
            false => Phase::Sent,
        };
        let epoch = self.check_exchange("combine_recv", &sent, before, "combine_recv after combine_send")?;
        let recorded = self.comm.board.begins(self.operation(Operation::CombineRecv), epoch);
        let mut state = self.state.borrow_mut();
        let State { flights, first_rows, seen, .. } = &mut *state;
        let slot = slot_of(epoch);
        let flight = &mut flights[slot];
        let (tokens, each, hidden) = (flight.tokens, self.config.width().choices(), self.config.hidden);
        self.check_rows("out", out, tokens)?;
        let lanes = self.lanes();
        // The bytes that are read: what is shared is the time they take.
        let cut = lanes.cut(tokens, flight.choices.len() * self.layout.stride);
        let owners = Owners::Blocks(cut.each);
        let steps = epilogue.check(tokens, hidden, owners)?;
        self.check_tokens(&steps)?;
        let mut call = Call::default();
        self.await_outputs(flight, &mut seen.epochs[slot], &mut call)?;
        let between = self.between().map(|(_, between)| between.borrow());
        if let Some(between) = &between {
            self.counts.words(between.with_tokens(epoch));
            between.await_sums(&self.comm, &mut call, epoch)?;
        }
        self.take_first_rows(flight, first_rows);
        let per_rank = self.config.reduction == Reduction::PerRank;
        let world_size = self.comm.world_size;
        let placed = &*flight.placed;
        let senders = Senders { placed, between: between.as_deref(), ranks: per_rank, world_size };
        let sums = per_rank || between.is_some();
        if sums {
            first_rows.count_sums(senders, &flight.choices, each, cut.each * each, cut.pieces);
        }
        let combine = Combine {
            outboxes: self.outboxes(),
            senders,
            specials: (self.config.special_experts() > 0).then_some(Specials {
                config: &self.config,
                vectors: &self.vectors,
                rank: self.comm.rank,
            }),
            epoch,
            each,
            choices: &flight.choices,
            weights: &flight.weights,
            first: &first_rows.first,
            streaming: steps.norm.is_none() && tokens * hidden * size_of::<E>() >= kernels::STREAMING_BYTES,
            steps,
            out: Divided::new(out, hidden, owners),
        };
        let taken = Divided::new(&mut first_rows.taken, senders.width(), Owners::Blocks(1));
        lanes.share(cut, &|piece| {
            let mut part = taken.part(piece);
            let taken = if sums { part.row_mut(piece) } else { &mut [] };
            combine.tokens(piece, cut.range(piece), taken)
        })?;
        self.comm.counters.exchanges.fetch_add(1, Relaxed);
        recorded.over();
        Ok(())
    }

    /// Waits for every rank of this node that had entries of this one.
    fn await_outputs(&self, flight: &mut Flight, seen: &mut [u64], call: &mut Call) -> Result<()> {
        let (epoch, slot) = (flight.epoch, self.layout.slot(flight.epoch));
        if let Some(block) = self.near_block() {
            return self.await_gathered(flight, block, call);
        }
        for peer in self.ranks_of(&flight.placed, &mut flight.lists) {
            let outbox = &self.peers[peer];
            self.await_combined(call, peer, epoch, Operation::CombineRecv)?;
            if outbox.word64(slot.abandoned).load(Acquire) == epoch {
                return Err(self.comm.or_the_end(
                    Error::PeerAbandoned { rank: peer, epoch },
                    Operation::CombineRecv,
                    epoch,
                ));
            }
            seen[peer] = epoch;
            // Read when all have come: until then the line is on its way.
            outbox.fetch(self.bases_at(slot));
        }
        Ok(())
    }

    /// As [`await_outputs`](Self::await_outputs), where a trampoline gathers them.
    fn await_gathered(&self, flight: &mut Flight, block: usize, call: &mut Call) -> Result<()> {
        let (epoch, slot, during) = (flight.epoch, self.layout.slot(flight.epoch), Operation::CombineRecv);
        if self.ranks_of(&flight.placed, &mut flight.lists).next().is_none() {
            return Ok(());
        }
        self.await_returned(call, block, epoch, during)?;
        if !self.trampolines.as_ref().is_some_and(|t| t.is_spoiled(block, epoch)) {
            return Ok(());
        }
        for rank in self.ranks_of(&flight.placed, &mut flight.lists) {
            let outbox = &self.peers[rank];
            if !epoch::reached(outbox.word64(slot.combined), epoch) {
                let during = self.operation(during);
                return Err(self.comm.or_the_end(Error::PeerLeft { rank, during, epoch }, during, epoch));
            }
            if outbox.word64(slot.abandoned).load(Acquire) == epoch {
                return Err(self.comm.or_the_end(Error::PeerAbandoned { rank, epoch }, self.operation(during), epoch));
            }
        }
        Ok(())
    }

    /// Notes where the outputs for this rank begin, in the outbox of each rank that had entries of it.
    fn take_first_rows(&self, flight: &mut Flight, first_rows: &mut FirstRows) {
        if let Some(trampolines) = self.trampolines.as_ref().filter(|_| self.near_block().is_some()) {
            return self.take_gathered(flight, trampolines, first_rows);
        }
        let at = self.bases_at(self.layout.slot(flight.epoch));
        let mut read = (0, 0);
        for peer in self.ranks_of(&flight.placed, &mut flight.lists) {
            match self.config.reduction {
                Reduction::PerExpert => {
                    let starts = &flight.placed.starts;
                    let first = &mut first_rows.first[starts[peer]..starts[peer + 1]];
                    self.peers[peer].row(at, first.len()).copy_to(first);
                }
                Reduction::PerRank => self.peers[peer].row(at, 1).copy_to(&mut first_rows.first[peer..peer + 1]),
            }
            let places = if self.config.reduction == Reduction::PerRank { 1 } else { flight.placed.local(peer).len() };
            read = (read.0 + 1, read.1 + places * size_of::<u32>());
        }
        self.counts.lists(read.0, read.1 as u64);
    }

    /// As [`take_first_rows`](Self::take_first_rows), from what a trampoline has gathered.
    fn take_gathered(&self, flight: &mut Flight, trampolines: &Trampolines, first_rows: &mut FirstRows) {
        if self.ranks_of(&flight.placed, &mut flight.lists).next().is_none() {
            return;
        }
        let FirstRows { first, copied, .. } = first_rows;
        trampolines.read_places(flight.epoch, self.parties.index_of(self.comm.rank), copied);
        match self.config.reduction {
            Reduction::PerExpert => first[..trampolines.width()].copy_from_slice(&copied[..trampolines.width()]),
            Reduction::PerRank => {
                self.parties.destinations.iter().zip(copied).for_each(|(&rank, row)| first[rank] = *row);
            }
        }
        self.counts.lists(1, (trampolines.width() * size_of::<u32>()) as u64);
    }

    /// The ranks of this node that have entries in this rank's lists.
    fn ranks_of<'l>(&'l self, placed: &'l Placed, lists: &'l mut Lists) -> impl Iterator<Item = usize> + 'l {
        let starts = lists.starts.slice_mut::<u32>(0, placed.positions() + 1);
        let parts = placed.starts.windows(2).enumerate();
        let parts = parts.filter(|(rank, _)| self.comm.is_near(*rank));
        parts.filter(move |(_, part)| starts[part[0]] < starts[part[1]]).map(|(rank, _)| rank)
    }

    /// Whether there are tokens for special experts that need them.
    fn check_tokens<E>(&self, steps: &Steps<'_, E>) -> Result<()> {
        if steps.tokens.is_some() || self.config.wire == WireFormat::Native || !self.config.needs_tokens() {
            return Ok(());
        }
        let expected = "combine_recv_with, with Epilogue::tokens for the copy and constant experts";
        Err(Error::Wire { call: "combine_recv", wire: self.config.wire.to_string(), expected })
    }

    /// Where every rank has the bases for this one.
    fn bases_at(&self, slot: &SlotLayout) -> usize {
        slot.bases.start + self.parties.index_of(self.comm.rank) * self.layout.bases_per_source * size_of::<u32>()
    }
}

/// What special experts are worked out from.
#[derive(Clone, Copy)]
struct Specials<'a> {
    config: &'a MoeConfig,
    vectors: &'a Vectors,
    /// This one.
    rank: usize,
}

/// A combine whose outputs are all there, for any thread.
struct Combine<'a, E> {
    outboxes: Outboxes<'a>,
    senders: Senders<'a>,
    specials: Option<Specials<'a>>,
    epoch: u64,
    /// Choices of a token.
    each: usize,
    choices: &'a [Choice],
    /// None with [`Reduction::PerRank`], unless there are special experts.
    weights: &'a [f32],
    /// As in [`FirstRows`].
    first: &'a [u32],
    steps: Steps<'a, E>,
    /// Whether the sums go past the caches: nothing of them is read again here.
    streaming: bool,
    out: Divided<'a, E>,
}

impl<E: Element> Combine<'_, E> {
    /// Sums a piece's tokens; `taken` says by sender how many sums the earlier ones have taken.
    fn tokens<'t>(&'t self, piece: usize, tokens: std::ops::Range<usize>, taken: &mut [u32]) -> Result<()> {
        let &Combine { each, ref steps, streaming, .. } = self;
        let Outboxes { hidden, format: (kernels, _), .. } = self.outboxes;
        let mut out = self.out.part(piece);
        let mut normed = steps.norm.as_ref().map(|norm| (norm, norm.out.part(piece)));
        let gather = |token: usize, terms: &mut Terms<'t, E>| {
            let range = token * each..(token + 1) * each;
            let choices = &self.choices[range.clone()];
            match &self.specials {
                Some(specials) => self.experts_and_specials(specials, token, terms)?,
                None if self.senders.ranks => {}
                None => self.experts(choices, &self.weights[range], terms)?,
            }
            if !taken.is_empty() {
                self.sums(choices, taken, terms)?;
            }
            let residual = steps.residual.map(|rows| &rows[token * hidden..(token + 1) * hidden]);
            for row in [steps.bias, residual].into_iter().flatten() {
                terms.push((Row::from(row), 1.0));
            }
            Ok(())
        };
        sum_each(tokens, gather, |token, sum| {
            let out = out.row_mut(token);
            Sum { onto: steps.in_place, streaming, ..sum }.write(kernels, out);
            if let Some((norm, rows)) = &mut normed {
                kernels::rms_norm(kernels, out, norm.weight, norm.eps, rows.row_mut(token));
            }
        })?;
        if streaming {
            kernels::end_streaming();
        }
        Ok(())
    }

    /// One row per expert of this node, in the order in which the token names them.
    fn experts<'t>(&'t self, choices: &[Choice], weights: &[f32], terms: &mut Terms<'t, E>) -> Result<()> {
        for (choice, &weight) in choices.iter().zip(weights).filter(|(c, _)| c.is_placed()) {
            if self.senders.placed.node_of(choice.position).is_none() {
                terms.push((self.output(choice)?, weight));
            }
        }
        Ok(())
    }

    /// As [`experts`](Self::experts), and what special experts give, where the token names them.
    fn experts_and_specials<'t>(
        &'t self,
        specials: &'t Specials<'_>,
        token: usize,
        terms: &mut Terms<'t, E>,
    ) -> Result<()> {
        let range = token * self.each..(token + 1) * self.each;
        for (choice, &weight) in self.choices[range.clone()].iter().zip(&self.weights[range]) {
            let Some(special) = choice.special() else {
                let is_here = !self.senders.ranks && choice.is_placed();
                if is_here && self.senders.placed.node_of(choice.position).is_none() {
                    terms.push((self.output(choice)?, weight));
                }
                continue;
            };
            match specials.config.special(special) {
                Special::Zero => {}
                Special::Copy => terms.push((self.own_token(specials, token), weight)),
                Special::Constant(expert) => {
                    let factors = specials.config.constant.as_ref().map_or((0.0, 0.0), |c| c.factors_of(expert));
                    if factors.0 != 0.0 {
                        terms.push((self.own_token(specials, token), weight * factors.0));
                    }
                    if factors.1 != 0.0 {
                        terms.push((specials.vectors.of(expert, self.outboxes.hidden), weight * factors.1));
                    }
                }
            }
        }
        Ok(())
    }

    /// A token as it was sent: where the engine has it, or in the outbox.
    fn own_token<'t>(&'t self, specials: &'t Specials<'_>, token: usize) -> Row<'t, E> {
        let hidden = self.outboxes.hidden;
        match self.steps.tokens {
            Some(tokens) => Row::from(&tokens[token * hidden..(token + 1) * hidden]),
            None => {
                let layout = self.outboxes.layout;
                let at = layout.slot(self.epoch).rows.start + token * layout.token.stride;
                self.outboxes.token(specials.rank, at)
            }
        }
    }

    /// The output of a choice's expert, which is on this node.
    fn output<'t>(&'t self, choice: &Choice) -> Result<Row<'t, E>> {
        let position = choice.position as usize;
        let (rank, layout) = (self.senders.placed.rank[position] as usize, self.outboxes.layout);
        let row = self.first[position] as usize + choice.index as usize;
        self.outboxes.output(rank, (layout.slot(self.epoch).outputs.start, layout.output_rows), row)
    }

    /// One row per sender, ascending. Each one's sums are those of the tokens that have entries there, in order.
    fn sums<'t>(&'t self, choices: &[Choice], taken: &mut [u32], terms: &mut Terms<'t, E>) -> Result<()> {
        let layout = self.outboxes.layout;
        for &sender in self.senders.of(choices).get() {
            let taken = &mut taken[sender as usize];
            let before = std::mem::replace(taken, *taken + 1) as usize;
            if let Some(node) = (sender as usize).checked_sub(self.senders.world_size)
                && let Some(between) = self.senders.between
            {
                terms.push((between.sum(self.epoch, node, before, layout.stride, self.outboxes.hidden), 1.0));
                continue;
            }
            let (rank, row) = (sender, self.first[sender as usize] as usize + before);
            let area = (layout.slot(self.epoch).sums.start, layout.sum_rows);
            terms.push((self.outboxes.output(rank as usize, area, row)?, 1.0));
        }
        Ok(())
    }
}
