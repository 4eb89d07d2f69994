//! The source's side of a combine: what the experts' ranks have published is read once and summed.

use std::sync::atomic::Ordering::{Acquire, Relaxed};

use super::config::MAX_TOPK;
use super::epilogue::{Epilogue, Steps};
use super::kernels::Sum;
use super::layout::SlotLayout;
use super::placement::Placement;
use super::routing::{Choice, NONE};
use super::terms::{Terms, sum_each};
use super::{Exchange, Flight, Lists, Moe, Outboxes, Phase, Reduction, SLOTS, State, kernels};
use crate::comm::inner::Call;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::memory::divided::{Divided, Owners};
use crate::memory::row::Row;
use crate::sync::epoch;
use crate::sync::progress::{Operation, Waiting};

/// Where the peers say that their output rows for this rank begin; kept from exchange to exchange.
pub(super) struct FirstRows {
    /// By expert; with [`Reduction::PerRank`] by rank.
    first: Vec<u32>,
    /// Sums taken before each piece, `[piece, rank]`.
    taken: Vec<u32>,
    /// What one peer says, before it is put in its places.
    copied: Vec<u32>,
    world_size: usize,
}

impl FirstRows {
    pub(super) fn new(experts: usize, world_size: usize) -> Self {
        FirstRows { first: vec![0; experts.max(world_size)], taken: vec![], copied: vec![0; experts], world_size }
    }

    /// Notes where in each rank's sums the pieces begin, each of `choices` choices: those of a token stand together.
    fn count_sums(&mut self, placement: &Placement, all: &[Choice], topk: usize, choices: usize, pieces: usize) {
        self.taken.clear();
        self.taken.resize(pieces * self.world_size, 0);
        for (i, piece) in all.chunks(choices.max(1)).take(pieces - 1).enumerate() {
            let (before, after) = self.taken[i * self.world_size..].split_at_mut(self.world_size);
            let after = &mut after[..self.world_size];
            after.copy_from_slice(before);
            for choices in piece.chunks_exact(topk) {
                Ranks::of(choices, placement).get().iter().for_each(|&rank| after[rank as usize] += 1);
            }
        }
    }
}

/// The ranks that hold experts of one token, ascending.
struct Ranks {
    ranks: [u32; MAX_TOPK],
    n: usize,
}

impl Ranks {
    fn of(choices: &[Choice], placement: &Placement) -> Self {
        let (mut ranks, mut n) = ([0; MAX_TOPK], 0);
        for choice in choices.iter().filter(|c| c.expert != NONE) {
            let rank = placement.rank[choice.expert as usize];
            if !ranks[..n].contains(&rank) {
                ranks[n] = rank;
                n += 1;
            }
        }
        ranks[..n].sort_unstable();
        Ranks { ranks, n }
    }

    fn get(&self) -> &[u32] {
        &self.ranks[..self.n]
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
        let epoch = self.check_exchange("combine_recv", &sent, Phase::Combined, "combine_recv after combine_send")?;
        let mut state = self.state.borrow_mut();
        let State { flights, first_rows, seen, .. } = &mut *state;
        let slot = (epoch % SLOTS as u64) as usize;
        let flight = &mut flights[slot];
        let (tokens, topk, hidden) = (flight.tokens, self.config.topk, self.config.hidden);
        self.check_rows("out", out, tokens)?;
        let lanes = self.lanes();
        // The bytes that are read: what is shared is the time they take.
        let cut = lanes.cut(tokens, flight.choices.len() * self.layout.stride);
        let owners = Owners::Blocks(cut.each);
        let steps = epilogue.check(tokens, hidden, owners)?;
        self.await_outputs(flight, &mut seen.epochs[slot])?;
        self.take_first_rows(flight, first_rows);
        if self.config.reduction == Reduction::PerRank {
            first_rows.count_sums(&self.placement, &flight.choices, topk, cut.each * topk, cut.pieces);
        }
        let combine = Combine {
            outboxes: self.outboxes(),
            placement: &self.placement,
            epoch,
            reduction: self.config.reduction,
            topk,
            choices: &flight.choices,
            first: &first_rows.first,
            streaming: steps.norm.is_none() && tokens * hidden * size_of::<E>() >= kernels::STREAMING_BYTES,
            steps,
            out: Divided::new(out, hidden, owners),
        };
        let taken = Divided::new(&mut first_rows.taken, self.comm.world_size, Owners::Blocks(1));
        lanes.share(cut, &|piece| {
            let mut part = taken.part(piece);
            let taken = match combine.reduction {
                Reduction::PerExpert => &mut [][..],
                Reduction::PerRank => part.row_mut(piece),
            };
            combine.tokens(piece, cut.range(piece), taken)
        })?;
        self.comm.counters.exchanges.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Waits for every rank that had entries of this one.
    fn await_outputs(&self, flight: &mut Flight, seen: &mut [u64]) -> Result<()> {
        let (epoch, slot) = (flight.epoch, self.layout.slot(flight.epoch));
        let mut call = Call::default();
        for peer in self.ranks_of(&mut flight.lists) {
            let outbox = &self.peers[peer];
            let word = outbox.word64(slot.combined);
            let what = Waiting { operation: Operation::CombineRecv, epoch, peer: Some(peer) };
            self.comm.wait_in(&mut call, what, || epoch::reached(word, epoch).then_some(()))?;
            if outbox.word64(slot.abandoned).load(Acquire) == epoch {
                return Err(Error::PeerAbandoned { rank: peer, epoch });
            }
            seen[peer] = epoch;
            // Read when all have come: until then the line is on its way.
            outbox.fetch(self.bases_at(slot));
        }
        Ok(())
    }

    /// Notes where the outputs for this rank begin, in the outbox of each rank that had entries of it.
    fn take_first_rows(&self, flight: &mut Flight, first_rows: &mut FirstRows) {
        let at = self.bases_at(self.layout.slot(flight.epoch));
        for peer in self.ranks_of(&mut flight.lists) {
            match self.config.reduction {
                Reduction::PerExpert => {
                    let experts = self.placement.local(peer);
                    let copied = &mut first_rows.copied[..experts.len()];
                    self.peers[peer].row(at, copied.len()).copy_to(copied);
                    experts.iter().zip(copied).for_each(|(&expert, row)| first_rows.first[expert] = *row);
                }
                Reduction::PerRank => self.peers[peer].row(at, 1).copy_to(&mut first_rows.first[peer..peer + 1]),
            }
        }
    }

    /// The ranks that have entries in this rank's lists.
    fn ranks_of<'l>(&'l self, lists: &'l mut Lists) -> impl Iterator<Item = usize> + 'l {
        let starts = lists.starts.slice_mut::<u32>(0, self.config.experts + 1);
        let parts = self.placement.starts.windows(2).enumerate();
        parts.filter(move |(_, part)| starts[part[0]] < starts[part[1]]).map(|(rank, _)| rank)
    }

    /// Where every rank has the bases for this one.
    fn bases_at(&self, slot: &SlotLayout) -> usize {
        slot.bases.start + self.comm.rank * self.layout.bases_per_source * size_of::<u32>()
    }
}

/// A combine whose outputs are all there, for any thread.
struct Combine<'a, E> {
    outboxes: Outboxes<'a>,
    placement: &'a Placement,
    epoch: u64,
    reduction: Reduction,
    topk: usize,
    choices: &'a [Choice],
    /// As in [`FirstRows`].
    first: &'a [u32],
    steps: Steps<'a, E>,
    /// Whether the sums go past the caches: nothing of them is read again here.
    streaming: bool,
    out: Divided<'a, E>,
}

impl<E: Element> Combine<'_, E> {
    /// Sums a piece's tokens; `taken` says by rank how many sums the earlier ones have taken.
    fn tokens<'t>(&'t self, piece: usize, tokens: std::ops::Range<usize>, taken: &mut [u32]) -> Result<()> {
        let &Combine { topk, ref steps, streaming, .. } = self;
        let hidden = self.outboxes.hidden;
        let mut out = self.out.part(piece);
        let mut normed = steps.norm.as_ref().map(|norm| (norm, norm.out.part(piece)));
        let gather = |token: usize, terms: &mut Terms<'t, E>| {
            let choices = &self.choices[token * topk..(token + 1) * topk];
            match self.reduction {
                Reduction::PerExpert => self.experts(choices, terms)?,
                Reduction::PerRank => self.ranks(choices, taken, terms)?,
            }
            let residual = steps.residual.map(|rows| &rows[token * hidden..(token + 1) * hidden]);
            for row in [steps.bias, residual].into_iter().flatten() {
                terms.push(Row::from(row), 1.0);
            }
            Ok(())
        };
        sum_each(tokens, gather, |token, sum| {
            let out = out.row_mut(token);
            Sum { onto: steps.in_place, streaming, ..sum }.write(out);
            if let Some((norm, rows)) = &mut normed {
                kernels::rms_norm(out, norm.weight, norm.eps, rows.row_mut(token));
            }
        })?;
        if streaming {
            kernels::end_streaming();
        }
        Ok(())
    }

    /// One row per expert, in the order in which the token names them.
    fn experts<'t>(&'t self, choices: &[Choice], terms: &mut Terms<'t, E>) -> Result<()> {
        for choice in choices.iter().filter(|c| c.expert != NONE) {
            let rank = self.placement.rank[choice.expert as usize] as usize;
            let row = self.first[choice.expert as usize] as usize + choice.index as usize;
            let layout = self.outboxes.layout;
            let area = (layout.slot(self.epoch).outputs.start, layout.output_rows);
            terms.push(self.outboxes.output(rank, area, row)?, choice.weight);
        }
        Ok(())
    }

    /// One row per rank, ascending. Each rank's sums are those of the tokens that have entries there, in order.
    fn ranks<'t>(&'t self, choices: &[Choice], taken: &mut [u32], terms: &mut Terms<'t, E>) -> Result<()> {
        for &rank in Ranks::of(choices, self.placement).get() {
            let taken = &mut taken[rank as usize];
            let row = self.first[rank as usize] as usize + *taken as usize;
            *taken += 1;
            let layout = self.outboxes.layout;
            let area = (layout.slot(self.epoch).sums.start, layout.sum_rows);
            terms.push(self.outboxes.output(rank as usize, area, row)?, 1.0);
        }
        Ok(())
    }
}
