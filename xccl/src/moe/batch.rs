//! What arrived for this rank's experts, in place.

use std::sync::atomic::Ordering::Relaxed;

use super::layout::{Entry, SLOTS};
use super::{Moe, Phase, Reduction, kernels};
use half::{bf16, f16};

use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::sync::epoch;
use crate::sync::progress::{Operation, Waiting};

/// Lists copied out of the senders' memory and checked; kept from exchange to exchange.
pub(super) struct Received {
    world_size: usize,
    local: usize,
    /// `[source][local expert]`, and one more per source: indices into `entries`. An entry's index is also the index of its
    /// output row.
    starts: Vec<u32>,
    entries: Vec<Entry>,
    /// Rows per local expert.
    counts: Vec<u32>,
    /// Prefix sums of `counts`.
    offsets: Vec<u32>,
    /// Rows before each (local expert, source), and one more: the batch's order.
    runs: Vec<u32>,
}

impl Received {
    pub(super) fn new(world_size: usize, local: usize) -> Self {
        Received {
            world_size,
            local,
            starts: vec![0; world_size * (local + 1)],
            entries: vec![],
            counts: vec![0; local],
            offsets: vec![0; local + 1],
            runs: vec![0; local * world_size + 1],
        }
    }

    /// Entries of `source` for local expert `expert`.
    fn range(&self, source: usize, expert: usize) -> std::ops::Range<usize> {
        let at = source * (self.local + 1) + expert;
        self.starts[at] as usize..self.starts[at + 1] as usize
    }

    fn order(&mut self) {
        let mut rows = 0;
        for expert in 0..self.local {
            self.offsets[expert] = rows;
            for source in 0..self.world_size {
                self.runs[expert * self.world_size + source] = rows;
                rows += self.range(source, expert).len() as u32;
            }
            self.counts[expert] = rows - self.offsets[expert];
        }
        self.offsets[self.local] = rows;
        self.runs[self.local * self.world_size] = rows;
    }
}

/// One row of a batch: a token that one of this rank's experts is to work on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchRow {
    /// Index among this rank's experts ([`ExpertBatch::local_experts`] has the global ids).
    pub expert: usize,
    /// The rank that sent it.
    pub source: usize,
    /// The token's index there.
    pub token: usize,
    /// The expert's factor in the token's sum.
    pub weight: f32,
    /// The entry's index, and its output row's.
    entry: usize,
}

/// The rows for this rank's experts in one exchange, ordered by local expert, then source rank, then token.
///
/// The rows lie in the senders' memory until [`Moe::combine_send`], which takes the batch. Dropping it instead gives the
/// exchange up, which the senders are told ([`Error::PeerAbandoned`]).
#[must_use = "dropping it gives the exchange up: pass it to combine_send"]
pub struct ExpertBatch<'m> {
    moe: &'m Moe,
    epoch: u64,
    received: Option<Box<Received>>,
    /// Stands in for `received` once that was given back, which only happens when the batch ends.
    published: bool,
    /// The sums of this rank were formed on the way from the caller's buffer.
    reduced: bool,
}

impl<'m> ExpertBatch<'m> {
    pub(super) fn new(moe: &'m Moe, epoch: u64, mut received: Box<Received>) -> Self {
        received.entries.clear();
        ExpertBatch { moe, epoch, received: Some(received), published: false, reduced: false }
    }

    fn received(&self) -> &Received {
        self.received.as_deref().expect("a batch holds its lists until it ends")
    }

    pub(super) fn is_of(&self, moe: &Moe) -> bool {
        std::ptr::eq(self.moe, moe)
    }

    /// Waits for one source and takes its part of the lists.
    pub(super) fn receive(&mut self, source: usize) -> Result<()> {
        let (moe, epoch) = (self.moe, self.epoch);
        let outbox = &moe.outboxes.peers[source];
        let (dispatched, refused) = (outbox.word64(moe.layout.dispatched), outbox.word64(moe.layout.refused));
        let what = Waiting { operation: Operation::DispatchRecv, epoch, peer: Some(source) };
        moe.comm.wait(what, || {
            if epoch::reached(dispatched, epoch) {
                return Some(Ok(()));
            }
            // A refusal that was followed by a good send is over: look at the epoch word again.
            let is_refused = refused.load(Relaxed) == epoch && !epoch::reached(dispatched, epoch);
            is_refused.then_some(Err(Error::PeerRefused { rank: source, epoch }))
        })??;
        let slot = moe.layout.slot(epoch);
        let corrupt = |what, value: u32, limit: usize| {
            Err(Error::Corrupt { rank: source, what, value: value.into(), limit: limit as u64 })
        };

        let tokens = outbox.word32(slot.tokens).load(Relaxed);
        if tokens as usize > moe.config.max_tokens {
            return corrupt("a number of tokens", tokens, moe.config.max_tokens);
        }
        let first_expert = moe.placement.starts[moe.comm.rank];
        let received = self.received.as_deref_mut().expect("a batch holds its lists until it ends");
        let local = received.local;
        let starts = &mut received.starts[source * (local + 1)..(source + 1) * (local + 1)];
        outbox.read_into(slot.starts + first_expert * 4, starts);
        let all = tokens as usize * moe.config.topk;
        if starts.windows(2).any(|w| w[0] > w[1]) || starts[local] as usize > all {
            return corrupt("the end of a list", starts[local], all);
        }
        let (begin, count) = (starts[0], (starts[local] - starts[0]) as usize);
        let base = received.entries.len();
        if base + count > moe.layout.output_rows {
            return Err(Error::TooManyExpertRows { rows: base + count, limit: moe.layout.output_rows, epoch });
        }
        starts.iter_mut().for_each(|s| *s = *s - begin + base as u32);
        received.entries.resize(base + count, Entry::default());
        let entries = &mut received.entries[base..];
        outbox.read_into(slot.entries + begin as usize * size_of::<Entry>(), entries);
        let largest = entries.iter().fold(0, |most, e| most.max(e.token));
        if count > 0 && largest >= tokens {
            return corrupt("a token's index", largest, tokens as usize);
        }
        Ok(())
    }

    /// Brings the rows of all sources into the batch's order.
    pub(super) fn complete(&mut self) {
        if let Some(received) = self.received.as_deref_mut() {
            received.order();
        }
    }

    /// The exchange's number.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.received().entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Global ids of this rank's experts, ascending.
    pub fn local_experts(&self) -> &'m [usize] {
        self.moe.placement.local(self.moe.comm.rank)
    }

    /// Rows per local expert.
    pub fn counts(&self) -> &[u32] {
        &self.received().counts
    }

    /// Prefix sums of [`counts`](Self::counts), with the total at the end: expert e's rows are `offsets[e]..offsets[e + 1]`.
    pub fn offsets(&self) -> &[u32] {
        &self.received().offsets
    }

    /// What row `i` is.
    ///
    /// # Panics
    /// When `i` is not below [`len`](Self::len).
    pub fn row(&self, i: usize) -> BatchRow {
        assert!(i < self.len(), "row {i} of {}", self.len());
        let received = self.received();
        let run = received.runs.partition_point(|&before| before as usize <= i) - 1;
        let (expert, source) = (run / received.world_size, run % received.world_size);
        let entry = received.range(source, expert).start + (i - received.runs[run] as usize);
        self.describe(expert, source, entry)
    }

    /// All rows, in order.
    pub fn rows(&self) -> impl Iterator<Item = BatchRow> + '_ {
        let received = self.received();
        let runs = (0..received.local).flat_map(|e| (0..received.world_size).map(move |s| (e, s)));
        runs.flat_map(move |(e, s)| received.range(s, e).map(move |entry| self.describe(e, s, entry)))
    }

    fn describe(&self, expert: usize, source: usize, entry: usize) -> BatchRow {
        let Entry { token, weight } = self.received().entries[entry];
        BatchRow { expert, source, token: token as usize, weight, entry }
    }

    /// Copies row `i` out: `hidden` elements.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DTypeMismatch`].
    ///
    /// # Panics
    /// When `i` is not below [`len`](Self::len).
    pub fn copy_row<E: Element>(&self, i: usize, to: &mut [E]) -> Result<()> {
        self.moe.check_rows("the row's buffer", to, 1)?;
        self.copy(&self.row(i), to);
        Ok(())
    }

    fn copy<E: Element>(&self, row: &BatchRow, to: &mut [E]) {
        self.moe.outboxes.peers[row.source].read(self.offset(row), bytemuck::cast_slice_mut(to));
    }

    fn offset(&self, row: &BatchRow) -> usize {
        self.moe.layout.slot(self.epoch).rows + row.token * self.moe.layout.stride
    }

    /// Row `i` where it lies, in the sender's memory: `hidden` elements, aligned to 64 bytes.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`].
    ///
    /// # Panics
    /// When `i` is not below [`len`](Self::len).
    ///
    /// # Safety
    /// The sender does not change the row before the batch ends, unless its process is broken. The caller accepts that a
    /// broken sender may change the values while they are looked at, and uses them as numbers only.
    pub unsafe fn row_slice<E: Element>(&self, i: usize) -> Result<&[E]> {
        self.moe.check_dtype::<E>("row_slice")?;
        let row = self.row(i);
        let at = self.moe.outboxes.peers[row.source].at(self.offset(&row), self.moe.layout.stride);
        // SAFETY: inside the mapping, aligned to a line; unchanged for the batch's lifetime by the caller's acceptance.
        Ok(unsafe { std::slice::from_raw_parts(at.cast(), self.moe.config.hidden) })
    }

    /// The row of this rank's outbox that the output for row `i` is to be written to: `hidden` elements, aligned to 64 bytes,
    /// with the contents that an earlier exchange left there.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`].
    ///
    /// # Panics
    /// When `i` is not below [`len`](Self::len).
    pub fn output_row<E: Element>(&mut self, i: usize) -> Result<&mut [E]> {
        self.moe.check_dtype::<E>("output_row")?;
        let row = self.row(i);
        Ok(self.output(&row))
    }

    fn output<E: Element>(&mut self, row: &BatchRow) -> &mut [E] {
        let offset = self.output_offset(row.entry);
        // SAFETY: peers read output rows of this epoch only after `combined` says so, and those of the last one in this slot
        // no more (see the module's protocol); each exchange has one batch, and `&mut self` makes the slice unique.
        unsafe { self.moe.outboxes.own.slice_mut(offset, self.moe.config.hidden) }
    }

    /// Rows that [`copy_into`](Self::copy_into) needs room for.
    pub fn aligned_rows(&self, align: usize) -> usize {
        self.counts().iter().map(|&n| (n as usize).next_multiple_of(align.max(1))).sum()
    }

    /// Copies all rows into the expert-major contiguous layout `[aligned_rows(align), hidden]`: each expert's rows begin at a
    /// multiple of `align` rows. Rows in between are left as they are.
    ///
    /// # Errors
    /// [`Error::Shape`] when `to` is too small, [`Error::DTypeMismatch`].
    pub fn copy_into<E: Element>(&self, to: &mut [E], align: usize) -> Result<()> {
        let align = align.max(1);
        let mut start = 0;
        self.check_room(to, self.aligned_rows(align))?;
        self.copy_experts(to, |_, count| {
            let at = start;
            start += count.next_multiple_of(align);
            at
        });
        Ok(())
    }

    /// Copies all rows into the padded layout `[local experts, capacity, hidden]`. Rows beyond an expert's count are left as
    /// they are.
    ///
    /// # Errors
    /// [`Error::CapacityExceeded`] names an expert with more rows, before anything is written; [`Error::Shape`],
    /// [`Error::DTypeMismatch`].
    pub fn copy_padded<E: Element>(&self, to: &mut [E], capacity: usize) -> Result<()> {
        if let Some((expert, &rows)) = self.counts().iter().enumerate().find(|&(_, &rows)| rows as usize > capacity) {
            return Err(Error::CapacityExceeded { expert, rows: rows as usize, capacity });
        }
        self.check_room(to, self.counts().len() * capacity)?;
        self.copy_experts(to, |expert, _| expert * capacity);
        Ok(())
    }

    fn check_room<E: Element>(&self, to: &[E], rows: usize) -> Result<()> {
        self.moe.check_dtype::<E>("the layout's buffer")?;
        let needed = rows * self.moe.config.hidden;
        if to.len() >= needed {
            return Ok(());
        }
        let expected = format!("at least {needed} ({rows} rows * hidden {})", self.moe.config.hidden);
        Err(Error::Shape { what: "the layout's buffer", given: to.len(), expected })
    }

    /// Copies each expert's rows to where `place(expert, count)` says that they begin.
    fn copy_experts<E: Element>(&self, to: &mut [E], mut place: impl FnMut(usize, usize) -> usize) {
        let hidden = self.moe.config.hidden;
        let received = self.received();
        for expert in 0..received.local {
            let begin = place(expert, received.counts[expert] as usize);
            let mut places = to[begin * hidden..].chunks_exact_mut(hidden);
            for source in 0..received.world_size {
                for (entry, to) in received.range(source, expert).zip(&mut places) {
                    self.copy(&self.describe(expert, source, entry), to);
                }
            }
        }
    }

    /// Takes the experts' outputs from a buffer in the batch's order: copies them, or sums them on the way.
    pub(super) fn take_outputs<E: Element>(&mut self, outputs: &[E]) -> Result<()> {
        self.moe.check_rows("outputs", outputs, self.len())?;
        let hidden = self.moe.config.hidden;
        match self.moe.config.reduction {
            Reduction::PerExpert => {
                for (row, output) in self.rows_and_entries(hidden) {
                    self.moe
                        .outboxes
                        .own
                        .write(self.output_offset(output), bytemuck::cast_slice(&outputs[row..row + hidden]));
                }
            }
            Reduction::PerRank => {
                let mut place = vec![0; self.len()];
                self.rows_and_entries(hidden).for_each(|(row, entry)| place[entry] = row);
                self.reduce::<E>(|entry| outputs[place[entry]..place[entry] + hidden].as_ptr());
            }
        }
        self.reduced = true;
        Ok(())
    }

    /// For each row, in order: where it begins in a buffer of `stride` elements per row, and its entry.
    fn rows_and_entries(&self, stride: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.rows().enumerate().map(move |(i, row)| (i * stride, row.entry))
    }

    fn output_offset(&self, entry: usize) -> usize {
        self.moe.layout.slot(self.epoch).outputs + entry * self.moe.layout.stride
    }

    pub(super) fn publish(&mut self) {
        let (moe, epoch) = (self.moe, self.epoch);
        if moe.config.reduction == Reduction::PerRank && !self.reduced {
            match moe.config.dtype {
                DType::F32 => self.reduce_outbox::<f32>(),
                DType::F16 => self.reduce_outbox::<f16>(),
                DType::BF16 => self.reduce_outbox::<bf16>(),
            }
        }
        let slot = moe.layout.slot(epoch);
        for source in 0..moe.comm.world_size {
            let base = self.received().starts[source * (self.received().local + 1)];
            moe.outboxes.own.word32(slot.bases + source * 4).store(base, Relaxed);
        }
        self.published = true;
        self.end();
        epoch::publish(moe.outboxes.own.word64(slot.combined), epoch);
        moe.comm.notify_all();
    }

    fn reduce_outbox<E: Element>(&self) {
        let stride = self.moe.layout.stride;
        self.reduce(|entry| self.moe.outboxes.own.at(self.output_offset(entry), stride).cast::<E>());
    }

    /// Forms, for each token of each source, the weighted sum over this rank's experts in ascending order, in the place of
    /// the first of its output rows: where the source looks for it. `output` says where an entry's output is.
    fn reduce<E: Element>(&self, output: impl Fn(usize) -> *const E) {
        const NONE: u32 = u32::MAX;
        let (moe, received) = (self.moe, self.received());
        let mut first = vec![NONE; moe.config.max_tokens];
        let mut next = vec![NONE; received.entries.len()];
        let mut sum = vec![E::zeroed(); moe.config.hidden];
        let mut rows = Vec::with_capacity(moe.config.topk);
        for source in 0..received.world_size {
            let base = source * (received.local + 1);
            let entries = received.starts[base] as usize..received.starts[base + received.local] as usize;
            first.fill(NONE);
            for entry in entries.clone().rev() {
                let token = received.entries[entry].token as usize;
                next[entry] = std::mem::replace(&mut first[token], entry as u32);
            }
            for entry in entries {
                let token = received.entries[entry].token as usize;
                if first[token] as usize != entry {
                    continue;
                }
                rows.clear();
                let mut at = entry as u32;
                while at != NONE {
                    rows.push((output(at as usize), received.entries[at as usize].weight));
                    at = next[at as usize];
                }
                // SAFETY: `output` gives whole rows; the sum is formed apart from them.
                unsafe { kernels::weighted_sum(&rows, &mut sum) };
                moe.outboxes.own.write(self.output_offset(entry), bytemuck::cast_slice(&sum));
            }
        }
    }

    /// Gives the lists back without ending the exchange: `dispatch_recv` may be called again.
    pub(super) fn give_back(mut self) {
        let mut state = self.moe.state.borrow_mut();
        let flight = &mut state.flights[(self.epoch % SLOTS as u64) as usize];
        flight.received = self.received.take();
        flight.phase = Phase::Sent;
        drop(state);
        self.published = true;
    }

    /// Hands the lists back and notes that this rank's part as a receiver is over.
    fn end(&mut self) {
        if let Some(received) = self.received.take() {
            let mut state = self.moe.state.borrow_mut();
            let flight = &mut state.flights[(self.epoch % SLOTS as u64) as usize];
            flight.received = Some(received);
            flight.phase = if flight.orphaned { Phase::Free } else { Phase::Combined };
        }
    }
}

impl Drop for ExpertBatch<'_> {
    fn drop(&mut self) {
        self.end();
        if !self.published {
            self.moe.abandon(self.epoch);
        }
    }
}
