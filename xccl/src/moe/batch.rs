//! What arrived for this rank's experts, in place.

mod wire;

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use bytemuck::Pod;
use half::{bf16, f16};
pub use wire::WireRow;

use super::lanes::Cut;
use super::layout::{Entry, slot_of};
use super::received::{ListPart, Merged, Received, Span};
use super::wire::WireFormat;
use super::{Moe, Phase, Reduction, Trampolines, kernels};
use crate::comm::inner::Call;
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::memory::divided::{Divided, Owners, Part};
use crate::memory::fetch;
use crate::memory::layout::LINE;
use crate::memory::row::Row;
use crate::sync::epoch;
use crate::sync::progress::{Operation, Waiting};

/// One row of a batch: a token that one of this rank's experts is to work on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchRow {
    /// The slot: an index among this rank's experts ([`ExpertBatch::local_experts`] has the logical ids).
    pub expert: usize,
    /// The rank that sent it.
    pub source: usize,
    /// The token's index there.
    pub token: usize,
    /// The expert's factor in the token's sum.
    pub weight: f32,
}

/// The sum that one token of one source gets from this rank: see [`ExpertBatch::sums`].
#[derive(Clone, Copy)]
pub struct TokenSum<'b> {
    /// The rank that sent the token.
    pub source: usize,
    /// The token's index there.
    pub token: usize,
    received: &'b Received,
    entries: &'b [u32],
}

impl TokenSum<'_> {
    /// The rows of the batch that belong to the sum, by local expert, with their weights.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = (usize, f32)> + '_ {
        let weight = |entry: u32| self.received.entries[entry as usize].weight;
        self.entries.iter().map(move |&entry| (self.received.row_of(entry) as usize, weight(entry)))
    }
}

/// Copies rows of a piece's tokens to its part of a layout.
type CopyTokens<'f, T> = dyn Fn(Copying<'_>, &[Span], &mut Part<'_, T>) + Sync + 'f;

/// A piece of the work of copying rows.
#[derive(Clone, Copy)]
struct Copying<'a> {
    received: &'a Received,
    piece: usize,
    /// Past the caches.
    streaming: bool,
}

impl Copying<'_> {
    fn copy<T: Pod>(&self, row: Row<'_, T>, to: &mut [T]) {
        if self.streaming { kernels::stream(row, to) } else { row.copy_to(to) }
    }
}

/// How a batch's outputs come to be published.
#[derive(Clone, Copy, PartialEq)]
enum Outputs {
    /// The outbox's output rows, in the batch's order.
    InOrder,
    /// The outbox's output rows, in the order of arrival.
    AsArrived,
    /// The sums are in the outbox.
    Summed,
}

/// The rows for this rank's experts in one exchange, ordered by local expert, then source rank, then token.
///
/// The rows lie in the senders' memory until [`Moe::combine_send`], which takes the batch. Dropping it instead gives the
/// exchange up, which the senders are told ([`Error::PeerAbandoned`]).
#[must_use = "dropping it gives the exchange up: pass it to combine_send"]
pub struct ExpertBatch<'m> {
    moe: &'m Moe,
    epoch: u64,
    /// `None` once it was given back, which only happens when the batch ends.
    received: Option<Box<Received>>,
    published: bool,
    outputs: Outputs,
}

impl<'m> ExpertBatch<'m> {
    pub(super) fn new(moe: &'m Moe, epoch: u64, mut received: Box<Received>) -> Self {
        received.clear();
        received.fetch();
        moe.own.word64(moe.layout.slot(epoch).done).store(0, Relaxed);
        ExpertBatch { moe, epoch, received: Some(received), published: false, outputs: Outputs::InOrder }
    }

    fn received(&self) -> &Received {
        self.received.as_deref().expect("a batch holds its lists until it ends")
    }

    fn received_mut(&mut self) -> &mut Received {
        self.received.as_deref_mut().expect("a batch holds its lists until it ends")
    }

    pub(super) fn is_of(&self, moe: &Moe) -> bool {
        std::ptr::eq(self.moe, moe)
    }

    /// Whether `source` has sent its tokens, or refused to.
    fn has_sent(&self, source: usize) -> Option<Result<()>> {
        let (moe, epoch) = (self.moe, self.epoch);
        let outbox = &moe.peers[source];
        let (dispatched, refused) = (outbox.word64(moe.layout.dispatched), outbox.word64(moe.layout.refused));
        if epoch::reached(dispatched, epoch) {
            return Some(Ok(()));
        }
        // A refusal that was followed by a good send is over: look at the epoch word again.
        let is_refused = refused.load(Relaxed) == epoch && !epoch::reached(dispatched, epoch);
        is_refused.then_some(Err(Error::PeerRefused { rank: source, epoch }))
    }

    /// Waits for all sources and takes their lists.
    ///
    /// With many ranks each list is short, and what takes time is the lines and pages that it lies on. So they are fetched ahead:
    /// the starts of one source's list while the next source is looked at, the entries of all while the starts are read. Only
    /// before it has to wait does it take what has come.
    pub(super) fn receive_all(&mut self) -> Result<()> {
        let (mut taken, sources) = (0, &self.moe.parties.sources[..]);
        let mut call = Call::default();
        for (i, &source) in sources.iter().enumerate() {
            if self.has_sent(source).is_none() {
                self.take_all(&sources[taken..i])?;
                taken = i;
            }
            let what = Waiting {
                operation: self.moe.operation(Operation::DispatchRecv),
                epoch: self.epoch,
                peer: Some(source),
            };
            self.moe.comm.wait_in(&mut call, what, || self.has_sent(source))??;
            let bytes = (self.local_experts().len() + 1) * size_of::<u32>();
            fetch::lines(self.moe.peers[source].at(self.starts_at(), bytes), bytes).for_each(fetch::to_read);
        }
        self.take_all(&sources[taken..])
    }

    fn take_all(&mut self, sources: &[usize]) -> Result<()> {
        for &source in sources {
            self.take_starts(source)?;
            self.fetch_entries(source);
        }
        let before = self.received().entries_held(sources);
        sources.iter().try_for_each(|&source| self.take_entries(source))?;
        let starts = sources.len() * (self.local_experts().len() + 1) * size_of::<u32>();
        self.moe.counts.lists(sources.len() as u64, (starts + before * size_of::<Entry>()) as u64);
        Ok(())
    }

    /// Takes the lists that the trampolines of this node have merged, which are all there.
    pub(super) fn receive_forwarded(&mut self, trampolines: &Trampolines) -> Result<()> {
        let moe = self.moe;
        let (mine, epoch) = (moe.comm.rank, self.epoch);
        let placed = &self.received().placed;
        let positions = placed.starts[mine]..placed.starts[mine + 1];
        let (parties, local) = (&moe.parties, positions.len());
        let mut merged = std::mem::take(&mut self.received_mut().merged);
        let (mut lists, mut bytes) = (0, 0);
        for block in 0..trampolines.count() {
            let Merged { starts, entries } = &mut merged;
            trampolines.read_list((epoch, block), positions.clone(), starts, entries)?;
            (lists, bytes) = (lists + 1, bytes + size_of_val(&starts[..]) + size_of_val(&entries[..]));
            let sources = trampolines.sources(block, parties);
            let limits = (moe.config.max_tokens, moe.config.max_tokens * moe.config.topk);
            for entry in entries.iter() {
                let corrupt =
                    |what, value: u32, limit: usize| Self::corrupt(trampolines.ranks()[block], what, value, limit);
                if !sources.contains(&(entry.source as usize)) {
                    return corrupt("a source in a merged list", entry.source, sources.end);
                }
                if entry.token as usize >= limits.0 || entry.at as usize >= limits.1 {
                    return corrupt("a token in a merged list", entry.token.max(entry.at), limits.0);
                }
            }
            let received = self.received_mut();
            let rows = received.len + entries.len();
            if rows > moe.layout.output_rows {
                return Err(Error::TooManyExpertRows { rows, limit: moe.layout.output_rows, epoch });
            }
            received.take_merged(&parties.sources, sources, local, &merged);
        }
        self.received_mut().merged = merged;
        moe.counts.lists(lists, bytes as u64);
        Ok(())
    }

    /// Asks for the lines that [`take_entries`](Self::take_entries) reads and writes.
    fn fetch_entries(&self, source: usize) {
        let received = self.received();
        let ListPart { begin, base, count, .. } = received.parts[source];
        let bytes = count * size_of::<Entry>();
        fetch::lines(self.moe.peers[source].at(self.entry_at(begin), bytes), bytes).for_each(fetch::to_read);
        // With many ranks a list is a line, and lists that stand together are soon at hand.
        if bytes > LINE {
            fetch::lines(received.entries[base..].as_ptr().cast(), bytes).for_each(fetch::to_write);
        }
    }

    /// Where every source has the starts of this rank's part of its list.
    fn starts_at(&self) -> usize {
        let first = self.received().placed.starts[self.moe.comm.rank];
        self.moe.layout.slot(self.epoch).starts.start + first * size_of::<u32>()
    }

    /// Where a source has an entry of its list.
    fn entry_at(&self, entry: usize) -> usize {
        self.moe.layout.slot(self.epoch).entries.start + entry * size_of::<Entry>()
    }

    /// Waits for any source whose lists have not been taken, and takes them. `None` when all have.
    pub(super) fn receive_any(&mut self) -> Result<Option<usize>> {
        let pending = |source: &usize| !self.received().has(*source);
        let sources = &self.moe.parties.sources;
        if !sources.iter().any(pending) {
            return Ok(None);
        }
        let what = Waiting { operation: Operation::DispatchRecv, epoch: self.epoch, peer: None };
        let source = self.moe.comm.wait(what, || {
            let mut refused = None;
            for source in sources.iter().copied().filter(pending) {
                match self.has_sent(source) {
                    Some(Ok(())) => return Some(Ok(source)),
                    // What others have sent can be worked on before this is told.
                    Some(Err(err)) => refused = refused.or(Some(Err(err))),
                    None => {}
                }
            }
            refused
        })??;
        self.take_lists(source)?;
        Ok(Some(source))
    }

    /// Takes the lists of a source that has sent.
    fn take_lists(&mut self, source: usize) -> Result<()> {
        self.take_starts(source)?;
        let base = self.received().parts[source].base;
        // The call may be repeated.
        self.take_entries(source).inspect_err(|_| self.received_mut().len = base)
    }

    fn corrupt<T>(source: usize, what: &'static str, value: u32, limit: usize) -> Result<T> {
        Err(Error::Corrupt { rank: source, what, value: value.into(), limit: limit as u64 })
    }

    /// Copies where this rank's part of a source's list begins for each expert, checks it, and makes room for the entries.
    fn take_starts(&mut self, source: usize) -> Result<()> {
        let (moe, epoch) = (self.moe, self.epoch);
        let (outbox, slot) = (&moe.peers[source], moe.layout.slot(epoch));
        let tokens = outbox.word32(slot.tokens).load(Relaxed);
        if tokens as usize > moe.config.max_tokens {
            return Self::corrupt(source, "a number of tokens", tokens, moe.config.max_tokens);
        }
        let at = self.starts_at();
        let received = self.received_mut();
        moe.check_mark(source, epoch, &received.placed)?;
        let local = received.local_experts().len();
        let starts = &mut received.starts[source * (local + 1)..(source + 1) * (local + 1)];
        outbox.read_into(at, starts);
        let all = tokens as usize * moe.config.width().choices();
        if starts.windows(2).any(|w| w[0] > w[1]) || starts[local] as usize > all {
            return Self::corrupt(source, "the end of a list", starts[local], all);
        }
        let (begin, count) = (starts[0], (starts[local] - starts[0]) as usize);
        let base = received.len;
        if base + count > moe.layout.output_rows {
            return Err(Error::TooManyExpertRows { rows: base + count, limit: moe.layout.output_rows, epoch });
        }
        starts.iter_mut().for_each(|s| *s = *s - begin + base as u32);
        received.entries.resize(received.entries.len().max(base + count), Entry::default());
        received.len += count;
        received.parts[source] = ListPart { begin: begin as usize, base, count, tokens };
        Ok(())
    }

    /// Copies the entries and checks them.
    fn take_entries(&mut self, source: usize) -> Result<()> {
        let ListPart { begin, base, count, tokens } = self.received().parts[source];
        let (outbox, at) = (&self.moe.peers[source], self.entry_at(begin));
        let received = self.received_mut();
        let entries = &mut received.entries[base..base + count];
        outbox.read_into(at, entries);
        let largest = entries.iter().fold(0, |most, e| most.max(e.token));
        if count > 0 && largest >= tokens {
            return Self::corrupt(source, "a token's index", largest, tokens as usize);
        }
        received.arrive(source);
        Ok(())
    }

    /// From now on outputs lie in the order of arrival.
    pub(super) fn answer_as_arrived(&mut self) {
        self.outputs = Outputs::AsArrived;
    }

    /// The entries of a source, none before it has come.
    pub(super) fn rows_of(&self, source: usize) -> std::ops::Range<usize> {
        assert!(source < self.moe.comm.world_size, "source {source} of {}", self.moe.comm.world_size);
        if self.received().has(source) { self.received().entries_of(source) } else { 0..0 }
    }

    pub(super) fn arrived_row(&self, entry: usize) -> BatchRow {
        let sources = self.moe.parties.sources.iter().copied();
        let source = { sources }.find(|&source| self.rows_of(source).contains(&entry));
        let source = source.unwrap_or_else(|| panic!("row {entry} has not arrived"));
        let mut experts = 0..self.local_experts().len();
        let expert = experts.find(|&expert| self.received().range(source, expert).contains(&entry));
        self.describe(expert.expect("a source's entries are its experts'"), source, entry)
    }

    pub(super) fn copy_arrived<E: Element>(&self, entry: usize, to: &mut [E]) -> Result<()> {
        self.moe.check_rows("the row's buffer", to, 1)?;
        self.copy_token(self.arrived_row(entry).source, entry, to);
        Ok(())
    }

    pub(super) fn arrived_output<E: Element>(&mut self, entry: usize) -> Result<&mut [E]> {
        self.moe.check_dtype::<E>("output_row")?;
        assert!(entry < self.len(), "row {entry} has not arrived");
        Ok(self.output(entry))
    }

    /// Brings the rows of all sources into the batch's order.
    pub(super) fn complete(&mut self) {
        self.received_mut().order();
        let slot_counts = &mut self.moe.state.borrow_mut().slot_counts;
        slot_counts.iter_mut().zip(self.counts()).for_each(|(sum, &count)| *sum += i64::from(count));
    }

    /// The exchange's number.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.received().len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The logical experts in this rank's slots, by the exchange's placement. From
    /// [`MoeConfig::experts`](super::MoeConfig::experts) on they are shared ones.
    pub fn local_experts(&self) -> &[usize] {
        self.received().local_experts()
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
        let (expert, source, entry) = self.received().locate(i);
        self.describe(expert, source, entry)
    }

    /// All rows, in order.
    pub fn rows(&self) -> impl Iterator<Item = BatchRow> + '_ {
        let received = self.received();
        let sources = &self.moe.parties.sources;
        let runs = (0..received.counts.len()).flat_map(move |e| sources.iter().map(move |&s| (e, s)));
        runs.flat_map(move |(e, s)| received.range(s, e).map(move |entry| self.describe(e, s, entry)))
    }

    fn describe(&self, expert: usize, source: usize, entry: usize) -> BatchRow {
        let Entry { token, weight } = self.received().entries[entry];
        BatchRow { expert, source, token: token as usize, weight }
    }

    /// Copies row `i` out: `hidden` elements, decoded if they travelled otherwise.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DTypeMismatch`].
    ///
    /// # Panics
    /// When `i` is not below [`len`](Self::len).
    pub fn copy_row<E: Element>(&self, i: usize, to: &mut [E]) -> Result<()> {
        self.moe.check_rows("the row's buffer", to, 1)?;
        assert!(i < self.len(), "row {i} of {}", self.len());
        let (_, source, entry) = self.received().locate(i);
        self.copy_token(source, entry, to);
        Ok(())
    }

    /// Where the token row of an entry of `source` lies in its outbox.
    fn token_offset(&self, source: usize, entry: usize) -> usize {
        self.moe.outboxes().token_offset(self.epoch, self.received(), source, entry)
    }

    /// Where it lies in the mapping that [`Moe::outbox_address`] names: this rank's own tokens are mapped
    /// twice.
    fn token_address(&self, source: usize, entry: usize) -> *const u8 {
        let outbox = match source == self.moe.comm.rank {
            true => self.moe.own.address().0,
            false => self.moe.peers[source].at(0, self.moe.layout.send_bytes),
        };
        outbox.wrapping_add(self.token_offset(source, entry))
    }

    /// Row `i` where it lies, in the sender's memory: `hidden` elements, aligned to 64 bytes.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`]; [`Error::Wire`] where rows are encoded: see [`row_wire`](Self::row_wire).
    ///
    /// # Panics
    /// When `i` is not below [`len`](Self::len).
    ///
    /// # Safety
    /// The sender does not change the row before the batch ends, unless its process is broken. The caller accepts that a
    /// broken sender may change the values while they are looked at, and uses them as numbers only.
    pub unsafe fn row_slice<E: Element>(&self, i: usize) -> Result<&[E]> {
        self.moe.check_dtype::<E>("row_slice")?;
        self.moe.check_native("row_slice", "use row_wire, or a copy, which decodes")?;
        assert!(i < self.len(), "row {i} of {}", self.len());
        let (_, source, entry) = self.received().locate(i);
        // SAFETY: unchanged for as long as the batch is borrowed, by the caller's acceptance.
        Ok(unsafe { self.moe.outboxes().token(source, self.token_offset(source, entry)).as_slice() })
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
        assert!(i < self.len(), "row {i} of {}", self.len());
        let row = self.output_index(i);
        Ok(self.output(row))
    }

    /// The row of the outbox for the output of row `i`.
    fn output_index(&self, i: usize) -> usize {
        if self.outputs == Outputs::AsArrived { self.received().locate(i).2 } else { i }
    }

    fn output<E: Element>(&mut self, row: usize) -> &mut [E] {
        let (stride, hidden) = (self.moe.layout.stride, self.moe.config.hidden);
        self.received_mut().outputs.slice_mut(row * stride, hidden)
    }

    /// All output rows at once, for a matrix product that writes where the peers read: `[len, row_stride]` in the batch's
    /// order, of which each row's first `hidden` elements count ([`Moe::row_stride`]).
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`]; [`Error::WrongOrder`] for a batch that was received source by source, whose outputs lie in
    /// the order of arrival.
    pub fn output_matrix<E: Element>(&mut self) -> Result<&mut [E]> {
        self.moe.check_dtype::<E>("output_matrix")?;
        if self.outputs == Outputs::AsArrived {
            let expected = "a batch of dispatch_recv";
            return Err(Error::WrongOrder { call: "output_matrix", epoch: self.epoch, expected });
        }
        let elements = self.len() * self.moe.row_stride();
        Ok(self.received_mut().outputs.slice_mut(0, elements))
    }

    /// All rows, in order, with the addresses of the token (in its sender's memory) and of the output (in this rank's): for
    /// kernels that walk them. [`row_slice`](Self::row_slice) and [`output_row`](Self::output_row) say what holds for them; the
    /// addresses are good until the batch ends.
    pub fn addresses(&mut self) -> impl Iterator<Item = (BatchRow, *const u8, *mut u8)> + '_ {
        let outputs = self.received_mut().outputs.as_mut_ptr();
        let (as_arrived, stride) = (self.outputs == Outputs::AsArrived, self.moe.layout.stride);
        let (batch, received) = (&*self, self.received());
        let sources = &self.moe.parties.sources;
        let runs = (0..received.counts.len()).flat_map(move |e| sources.iter().map(move |&s| (e, s)));
        let entries = runs.flat_map(move |(e, s)| received.range(s, e).map(move |entry| (e, s, entry)));
        entries.enumerate().map(move |(i, (expert, source, entry))| {
            let output = outputs.wrapping_add(if as_arrived { entry } else { i } * stride);
            let row = batch.describe(expert, source, entry);
            (row, batch.token_address(source, entry), output)
        })
    }

    /// As [`addresses`](Self::addresses), for what one source has sent, in the order of arrival.
    pub(super) fn arrived_addresses(
        &mut self,
        source: usize,
    ) -> impl Iterator<Item = (BatchRow, *const u8, *mut u8)> + '_ {
        let rows = self.rows_of(source);
        let outputs = self.received_mut().outputs.as_mut_ptr();
        let experts = if rows.is_empty() { 0 } else { self.local_experts().len() };
        let (batch, received) = (&*self, self.received());
        let entries = (0..experts).flat_map(move |e| received.range(source, e).map(move |entry| (e, entry)));
        entries.map(move |(expert, entry)| {
            let row = batch.describe(expert, source, entry);
            let output = outputs.wrapping_add(entry * batch.moe.layout.stride);
            (row, batch.token_address(source, entry), output)
        })
    }

    /// How many output rows are written, for those who write them on other threads or devices: each adds what it has done,
    /// with release order, and [`Moe::await_rows`] waits for all. In this rank's outbox; 0 when the batch begins.
    pub fn rows_done(&self) -> &AtomicU64 {
        self.moe.own.word64(self.moe.layout.slot(self.epoch).done)
    }

    /// Rows that [`copy_into`](Self::copy_into) needs room for; `usize::MAX` where that is more than a number can say.
    pub fn aligned_rows(&self, align: usize) -> usize {
        let aligned = |&rows: &u32| (rows as usize).checked_next_multiple_of(align.max(1)).unwrap_or(usize::MAX);
        self.counts().iter().map(aligned).fold(0, usize::saturating_add)
    }

    /// Copies all rows into the expert-major contiguous layout `[aligned_rows(align), hidden]`: each expert's rows begin at a
    /// multiple of `align` rows. Rows in between are left as they are.
    ///
    /// # Errors
    /// [`Error::Shape`] when `to` is too small, [`Error::DTypeMismatch`].
    pub fn copy_into<E: Element>(&mut self, to: &mut [E], align: usize) -> Result<()> {
        let align = align.max(1);
        self.check_room(to, self.aligned_rows(align))?;
        let Received { counts, places, .. } = self.received_mut();
        let mut end = 0;
        for (place, &count) in places.iter_mut().zip(&*counts) {
            *place = end;
            end += (count as usize).next_multiple_of(align);
        }
        self.copy_experts(to)
    }

    /// Copies all rows into the padded layout `[local experts, capacity, hidden]`. Rows beyond an expert's count are left as
    /// they are.
    ///
    /// # Errors
    /// [`Error::CapacityExceeded`] names an expert with more rows, before anything is written; [`Error::Shape`],
    /// [`Error::DTypeMismatch`].
    pub fn copy_padded<E: Element>(&mut self, to: &mut [E], capacity: usize) -> Result<()> {
        if let Some((expert, &rows)) = self.counts().iter().enumerate().find(|&(_, &rows)| rows as usize > capacity) {
            return Err(Error::CapacityExceeded { expert, rows: rows as usize, capacity });
        }
        self.check_room(to, self.counts().len() * capacity)?;
        let places = self.received_mut().places.iter_mut().enumerate();
        places.for_each(|(expert, place)| *place = expert * capacity);
        self.copy_experts(to)
    }

    fn check_room<E: Element>(&self, to: &[E], rows: usize) -> Result<()> {
        self.moe.check_dtype::<E>("the layout's buffer")?;
        let needed = rows.saturating_mul(self.moe.config.hidden);
        if to.len() >= needed {
            return Ok(());
        }
        let expected = format!("at least {needed} ({rows} rows * hidden {})", self.moe.config.hidden);
        Err(Error::Shape { what: "the layout's buffer", given: to.len(), expected })
    }

    /// Copies each expert's rows to where [`Received::places`] says that they begin, decoded if they travelled otherwise.
    fn copy_experts<E: Element>(&mut self, to: &mut [E]) -> Result<()> {
        let (epoch, outboxes, hidden) = (self.epoch, self.moe.outboxes(), self.moe.config.hidden);
        if self.moe.config.wire != WireFormat::Native {
            return self.decode_experts(to);
        }
        self.fill_layout(to, hidden, &|copying, tokens, to| {
            for span in tokens {
                let (source, entry) = (span.source as usize, copying.received.entries_at(span)[0] as usize);
                let offset = outboxes.token_offset(epoch, copying.received, source, entry);
                let row = outboxes.token::<E>(source, offset);
                copying.received.places_of(span).for_each(|place| copying.copy(row, to.row_mut(place)));
            }
        })
    }

    /// How the copying of all rows, of `bytes` bytes each, is cut into pieces.
    fn cut_copying(&mut self, bytes: usize) -> Cut {
        let (lanes, bytes) = (self.moe.lanes(), self.len() * bytes);
        let received = self.received_mut();
        received.index_tokens();
        lanes.cut(received.tokens().len(), bytes)
    }

    /// Has `copy` fill a layout of rows of `stride` elements, token by token, so that a row that several experts work on comes
    /// over from its sender once and is then in this core's cache.
    fn fill_layout<T: Pod + Send>(&mut self, to: &mut [T], stride: usize, copy: &CopyTokens<'_, T>) -> Result<()> {
        let (lanes, cut) = (self.moe.lanes(), self.cut_copying(stride * size_of::<T>()));
        let streaming = self.len() * stride * size_of::<T>() >= kernels::STREAMING_BYTES;
        let received = self.received_mut();
        let (places, mut owners) = (to.len() / stride, std::mem::take(&mut received.owners));
        let received = &*received;
        let owned = match cut.pieces {
            1 => Owners::Blocks(places),
            _ => {
                received.list_owners(&cut, places, &mut owners);
                Owners::Listed(&owners)
            }
        };
        let to = Divided::new(to, stride, owned);
        let copied = lanes.share(cut, &|piece| {
            let mut to = to.part(piece);
            copy(Copying { received, piece, streaming }, &received.tokens()[cut.range(piece)], &mut to);
            if streaming {
                kernels::end_streaming();
            }
            Ok(())
        });
        self.received_mut().owners = owners;
        copied
    }

    /// The sums that [`Reduction::PerRank`] asks of this rank, by source, then token: for an engine that forms them itself, in
    /// [`sum_row`](Self::sum_row)s, and then calls [`Moe::combine_send_sums`].
    pub fn sums(&mut self) -> impl ExactSizeIterator<Item = TokenSum<'_>> + '_ {
        self.received_mut().index_tokens();
        let received = self.received();
        received.tokens().iter().map(|span| TokenSum {
            source: span.source as usize,
            token: span.token as usize,
            received,
            entries: received.entries_at(span),
        })
    }

    /// The row of this rank's outbox for the `i`-th of [`sums`](Self::sums): `hidden` elements, aligned to 64 bytes, with the
    /// contents that an earlier exchange left there.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`]; [`Error::WrongOrder`] without [`Reduction::PerRank`].
    ///
    /// # Panics
    /// When `i` is not below the number of sums.
    pub fn sum_row<E: Element>(&mut self, i: usize) -> Result<&mut [E]> {
        self.moe.check_dtype::<E>("sum_row")?;
        self.check_sums("sum_row")?;
        let (stride, hidden) = (self.moe.layout.stride, self.moe.config.hidden);
        let received = self.received_mut();
        received.index_tokens();
        let sums = received.tokens().len();
        assert!(i < sums, "sum {i} of {sums}");
        Ok(received.sums.slice_mut(i * stride, hidden))
    }

    fn check_sums(&self, call: &'static str) -> Result<()> {
        if self.moe.config.reduction == Reduction::PerRank {
            return Ok(());
        }
        Err(Error::WrongOrder { call, epoch: self.epoch, expected: "a handle made with Reduction::PerRank" })
    }

    /// Notes that the engine has formed the sums.
    pub(super) fn take_sums(&mut self) -> Result<()> {
        self.check_sums("combine_send_sums")?;
        self.outputs = Outputs::Summed;
        Ok(())
    }

    /// Takes the experts' outputs from a buffer in the batch's order: copies them, or sums them on the way.
    pub(super) fn take_outputs<E: Element>(&mut self, outputs: &[E]) -> Result<()> {
        self.moe.check_rows("outputs", outputs, self.len())?;
        let (stride, hidden) = (self.moe.layout.stride, self.moe.config.hidden);
        match self.moe.config.reduction {
            Reduction::PerExpert => self.copy_outputs(outputs)?,
            Reduction::PerRank => {
                let (kernels, lanes) = (self.moe.kernels, self.moe.lanes());
                self.received_mut().sum_buffer(outputs, kernels, (hidden, stride), &lanes)?;
                self.outputs = Outputs::Summed;
            }
        }
        Ok(())
    }

    /// Copies outputs in the batch's order to where this batch's are.
    fn copy_outputs<E: Element>(&mut self, outputs: &[E]) -> Result<()> {
        let (stride, hidden, rows) = (self.moe.layout.stride, self.moe.config.hidden, self.len());
        if self.outputs == Outputs::AsArrived {
            for (i, output) in outputs.chunks_exact(hidden).enumerate() {
                let row = self.output_index(i);
                self.output(row).copy_from_slice(output);
            }
            return Ok(());
        }
        let lanes = self.moe.lanes();
        let cut = lanes.cut(rows, rows * stride);
        let to = self.received_mut().outputs.divide::<E>(0, rows, stride, Owners::Blocks(cut.each));
        lanes.share(cut, &|piece| {
            let mut to = to.part(piece);
            for row in cut.range(piece) {
                to.row_mut(row)[..hidden].copy_from_slice(&outputs[row * hidden..(row + 1) * hidden]);
            }
            Ok(())
        })
    }

    pub(super) fn publish(&mut self) -> Result<()> {
        self.moe.comm.check_process()?;
        let (moe, epoch) = (self.moe, self.epoch);
        let call = moe.comm.board.begins(moe.operation(Operation::CombineSend), epoch);
        let slot = moe.layout.slot(epoch);
        if moe.config.reduction == Reduction::PerRank && self.outputs != Outputs::Summed {
            match moe.config.dtype {
                DType::F32 => self.sum_outbox::<f32>()?,
                DType::F16 => self.sum_outbox::<f16>()?,
                DType::BF16 => self.sum_outbox::<bf16>()?,
            }
        }
        let in_order = self.outputs == Outputs::InOrder;
        match moe.config.reduction {
            Reduction::PerExpert => self.received_mut().write_bases(&moe.layout, slot, in_order),
            Reduction::PerRank => self.received_mut().write_sum_bases(&moe.layout, slot),
        }
        self.published = true;
        self.end();
        epoch::publish(moe.own.word64(slot.combined), epoch);
        moe.notify_sources();
        call.over();
        Ok(())
    }

    fn sum_outbox<E: Element>(&mut self) -> Result<()> {
        let (stride, hidden) = (self.moe.layout.stride, self.moe.config.hidden);
        let (in_order, kernels, lanes) = (self.outputs == Outputs::InOrder, self.moe.kernels, self.moe.lanes());
        self.received_mut().sum_outbox::<E>(in_order, kernels, (hidden, stride), &lanes)
    }

    /// Gives the lists back without ending the exchange: `dispatch_recv` may be called again.
    pub(super) fn give_back(mut self) {
        let mut state = self.moe.state.borrow_mut();
        let flight = &mut state.flights[slot_of(self.epoch)];
        flight.received = self.received.take();
        flight.phase = Phase::Sent;
        drop(state);
        self.published = true;
    }

    /// Hands the lists back and notes that this rank's part as a receiver is over.
    fn end(&mut self) {
        if let Some(received) = self.received.take() {
            let mut state = self.moe.state.borrow_mut();
            let flight = &mut state.flights[slot_of(self.epoch)];
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
