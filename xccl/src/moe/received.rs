//! The receiver's side of a slot: the lists that came, and the areas that answers are written to.

use std::sync::Arc;

use super::config::MAX_TOPK;
use super::lanes::{Cut, LaneSet};
use super::layout::{AREAS, Entry, MoeLayout, SlotLayout};
use super::parties::Parties;
use super::placement::placed::Placed;
use super::roles::MergedEntry;
use super::terms::{Terms, sum_each};
use crate::dtype::Element;
use crate::error::Result;
use crate::kernels::Kernels;
use crate::memory::area::Area;
use crate::memory::divided::Owners;
use crate::memory::fetch;
use crate::memory::row::Row;

/// Lists copied out of the senders' memory and checked; kept from exchange to exchange.
pub(super) struct Received {
    parties: Arc<Parties>,
    rank: usize,
    /// Ranks of the communicator: what is said to be by source is by rank, with nothing for those that send no tokens.
    world_size: usize,
    /// What the exchange goes by.
    pub(super) placed: Arc<Placed>,
    /// Slots of this rank.
    local: usize,
    /// `[source][local expert]`, and one more per source: indices into `entries`.
    pub(super) starts: Vec<u32>,
    /// Source by source in the order of arrival; of each one by local expert, then token.
    pub(super) entries: Vec<Entry>,
    /// Which sources have come.
    arrived: Vec<bool>,
    /// By source: what its list looks like, before the entries are copied.
    pub(super) parts: Vec<ListPart>,
    /// Rows per local expert.
    pub(super) counts: Vec<u32>,
    /// Prefix sums of `counts`.
    pub(super) offsets: Vec<u32>,
    /// `[source][local expert]`: rows of the batch before those.
    runs: Vec<u32>,
    /// Per local expert: where its rows begin in a layout that they are copied to.
    pub(super) places: Vec<usize>,
    /// Per row of such a layout: the piece of the work that copies it.
    pub(super) owners: Vec<u16>,
    /// How many of `entries` count.
    pub(super) len: usize,
    /// The same entries by source and token, made when somebody needs them.
    by_token: ByToken,
    /// A list that a trampoline has merged.
    pub(super) merged: Merged,
    /// Decoded rows, one for each piece of the work that copies them.
    pub(super) decoded: Vec<f32>,
    /// A row's scales, while they are copied.
    pub(super) scales: Vec<f32>,
    /// This rank's expert outputs.
    pub(super) outputs: Area,
    /// This rank's sums.
    pub(super) sums: Area,
    /// Where each source finds its rows.
    bases: Area,
}

/// One source's part of the lists.
#[derive(Clone, Copy, Default)]
pub(super) struct ListPart {
    /// Its first entry there, and here.
    pub(super) begin: usize,
    pub(super) base: usize,
    pub(super) count: usize,
    /// Tokens of the source.
    pub(super) tokens: u32,
}

/// The part of a merged list that this rank's experts have, copied out.
#[derive(Default)]
pub(super) struct Merged {
    /// By local expert, and one more.
    pub(super) starts: Vec<u32>,
    pub(super) entries: Vec<MergedEntry>,
}

/// The entries of each token of each source.
#[derive(Default)]
struct ByToken {
    ready: bool,
    tokens: Vec<Span>,
    /// Entries, in each span in ascending order, hence by local expert.
    entries: Vec<u32>,
    /// Per token of one source: its entries, while they are counted.
    counts: Vec<u32>,
    /// Per entry: its row in the batch's order.
    rows: Vec<u32>,
}

/// The entries of one token of one source: `first..end` in [`ByToken::entries`].
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) source: u32,
    pub(super) token: u32,
    first: u32,
    end: u32,
}

/// The sender's areas of a slot.
pub(super) struct SendAreas {
    pub(super) starts: Area,
    pub(super) entries: Area,
    pub(super) rows: Area,
}

impl Received {
    /// Shares a slot's areas between its two sides.
    ///
    /// `most` is the most slots that this rank may have.
    pub(super) fn new(
        parties: &Arc<Parties>,
        (rank, world_size): (usize, usize),
        (most, placed): (usize, Arc<Placed>),
        areas: [Area; AREAS],
    ) -> (Self, SendAreas) {
        let [starts, entries, bases, rows, outputs, sums] = areas;
        let mut received = Received {
            parties: parties.clone(),
            rank,
            world_size,
            placed,
            local: 0,
            starts: Vec::with_capacity(world_size * (most + 1)),
            entries: vec![],
            arrived: vec![false; world_size],
            parts: vec![ListPart::default(); world_size],
            counts: Vec::with_capacity(most),
            offsets: Vec::with_capacity(most + 1),
            runs: Vec::with_capacity(most * world_size),
            places: Vec::with_capacity(most),
            owners: vec![],
            len: 0,
            by_token: ByToken::default(),
            merged: Merged::default(),
            decoded: vec![],
            scales: vec![],
            outputs,
            sums,
            bases,
        };
        received.resize();
        (received, SendAreas { starts, entries, rows })
    }

    /// Takes the placement of the next exchange.
    pub(super) fn go_by(&mut self, placed: &Arc<Placed>) {
        if !Arc::ptr_eq(&self.placed, placed) {
            self.placed = placed.clone();
            self.resize();
        }
    }

    fn resize(&mut self) {
        let local = self.placed.local(self.rank).len();
        self.local = local;
        for (list, len) in [
            (&mut self.starts, self.world_size * (local + 1)),
            (&mut self.counts, local),
            (&mut self.offsets, local + 1),
            (&mut self.runs, local * self.world_size),
        ] {
            list.clear();
            list.resize(len, 0);
        }
        self.places.resize(local, 0);
    }

    /// The logical experts in this rank's slots.
    pub(super) fn local_experts(&self) -> &[usize] {
        self.placed.local(self.rank)
    }

    /// Forgets the last exchange.
    pub(super) fn clear(&mut self) {
        self.len = 0;
        self.arrived.fill(false);
        self.by_token.ready = false;
    }

    /// Asks for the lines that every exchange writes whatever is sent: rows that were written since the last one have displaced
    /// them, and they come while the tokens are waited for.
    pub(super) fn fetch(&self) {
        for list in [&self.starts, &self.counts, &self.offsets, &self.runs] {
            fetch::lines(list.as_ptr().cast(), size_of_val(&list[..])).for_each(fetch::to_write);
        }
    }

    pub(super) fn has(&self, source: usize) -> bool {
        self.arrived[source]
    }

    pub(super) fn arrive(&mut self, source: usize) {
        self.arrived[source] = true;
    }

    /// Entries of `source` for local expert `expert`.
    pub(super) fn range(&self, source: usize, expert: usize) -> std::ops::Range<usize> {
        let at = source * (self.local + 1) + expert;
        self.starts[at] as usize..self.starts[at + 1] as usize
    }

    /// All entries of `source`.
    pub(super) fn entries_of(&self, source: usize) -> std::ops::Range<usize> {
        let at = source * (self.local + 1);
        self.starts[at] as usize..self.starts[at + self.local] as usize
    }

    /// Entries of sources whose lists' starts were taken.
    pub(super) fn entries_held(&self, sources: &[usize]) -> usize {
        sources.iter().map(|&source| self.parts[source].count).sum()
    }

    /// Takes a merged list apart: the entries of `block`, places among the `sources`, which were checked, by source, then expert, then
    /// token.
    pub(super) fn take_merged(
        &mut self,
        sources: &[usize],
        block: std::ops::Range<usize>,
        local: usize,
        merged: &Merged,
    ) {
        let Received { starts, entries, arrived, parts, len, .. } = self;
        let width = local + 1;
        let of = |index: usize| &sources[index];
        for index in block.clone() {
            starts[of(index) * width..(of(index) + 1) * width].fill(0);
        }
        let by_expert = merged.starts.windows(2).map(|w| &merged.entries[w[0] as usize..w[1] as usize]).enumerate();
        for (expert, list) in by_expert.clone() {
            list.iter().for_each(|entry| starts[of(entry.source as usize) * width + expert] += 1);
        }
        // From counts to where each begins, which putting them in their places makes into where each ends.
        let mut next = *len as u32;
        for index in block.clone() {
            let first = next;
            for start in &mut starts[of(index) * width..][..local] {
                next += std::mem::replace(start, next);
            }
            starts[of(index) * width + local] = next;
            let (base, count) = (first as usize, (next - first) as usize);
            parts[*of(index)] = ListPart { begin: 0, base, count, tokens: 0 };
            arrived[*of(index)] = true;
        }
        entries.resize(entries.len().max(next as usize), Entry::default());
        for (expert, list) in by_expert {
            for merged in list {
                let source = *of(merged.source as usize);
                let start = &mut starts[source * width + expert];
                let part = &mut parts[source];
                if *start as usize == part.base {
                    part.begin = merged.at as usize;
                }
                entries[*start as usize] = Entry { token: merged.token, weight: merged.weight };
                *start += 1;
            }
        }
        // Each begins where the one before has ended.
        for index in block {
            let starts = &mut starts[of(index) * width..][..width];
            starts.copy_within(..local, 1);
            starts[0] = parts[*of(index)].base as u32;
        }
        *len = next as usize;
    }

    /// The row of its source's outbox that an entry's token lies in.
    pub(super) fn outbox_row(&self, source: usize, entry: usize, row_per_entry: bool) -> usize {
        match row_per_entry {
            false => self.entries[entry].token as usize,
            true => self.parts[source].begin + entry - self.entries_of(source).start,
        }
    }

    /// Brings the rows of all sources into the batch's order.
    pub(super) fn order(&mut self) {
        let Received { local, starts, counts, offsets, runs, .. } = self;
        if *local == 0 {
            return;
        }
        counts.fill(0);
        for starts in starts.chunks_exact(*local + 1) {
            counts.iter_mut().zip(starts.windows(2)).for_each(|(count, s)| *count += s[1] - s[0]);
        }
        let mut rows = 0;
        for (offset, count) in offsets.iter_mut().zip(counts.iter()) {
            *offset = rows;
            rows += count;
        }
        offsets[*local] = rows;
        runs[..*local].copy_from_slice(&offsets[..*local]);
        for (source, starts) in starts.chunks_exact(*local + 1).enumerate().take(self.world_size - 1) {
            let (before, after) = runs[source * *local..].split_at_mut(*local);
            for ((after, before), s) in after.iter_mut().zip(before).zip(starts.windows(2)) {
                *after = *before + (s[1] - s[0]);
            }
        }
    }

    /// The local expert, the source and the entry of row `row` of the batch.
    pub(super) fn locate(&self, row: usize) -> (usize, usize, usize) {
        let expert = self.offsets.partition_point(|&before| before as usize <= row) - 1;
        // The last source whose run begins at `row` or before: the runs of an expert ascend, those that are empty begin where the
        // next one does.
        let run = |source: usize| self.runs[source * self.local + expert] as usize;
        let (mut source, mut beyond) = (0, self.world_size);
        while beyond - source > 1 {
            let middle = source.midpoint(beyond);
            if run(middle) <= row { source = middle } else { beyond = middle }
        }
        (expert, source, self.range(source, expert).start + row - run(source))
    }

    /// Tells the sources where they find their rows: in the batch's order, or in that of the entries.
    pub(super) fn write_bases(&mut self, layout: &MoeLayout, slot: &SlotLayout, in_order: bool) {
        let per_source = layout.bases_per_source;
        let bases = self.bases.slice_mut::<u32>(0, slot.bases.len() / 4);
        for (&source, bases) in self.parties.sources.iter().zip(bases.chunks_exact_mut(per_source)) {
            let first_rows = match in_order {
                true => &self.runs[source * self.local..],
                false => &self.starts[source * (self.local + 1)..],
            };
            bases[..self.local].copy_from_slice(&first_rows[..self.local]);
        }
    }

    /// Tells the sources where their sums begin.
    pub(super) fn write_sum_bases(&mut self, layout: &MoeLayout, slot: &SlotLayout) {
        self.index_tokens();
        let per_source = layout.bases_per_source;
        let bases = self.bases.slice_mut::<u32>(0, slot.bases.len() / 4);
        for (&source, bases) in self.parties.sources.iter().zip(bases.chunks_exact_mut(per_source)) {
            bases[0] = self.by_token.tokens.partition_point(|span| (span.source as usize) < source) as u32;
        }
    }

    /// Sorts the entries by source and token, unless that was done.
    pub(super) fn index_tokens(&mut self) {
        let mut by_token = std::mem::take(&mut self.by_token);
        if !by_token.ready {
            by_token.fill(self);
            by_token.ready = true;
        }
        self.by_token = by_token;
    }

    /// Forms each token's weighted sum over this rank's experts, in ascending order, from outputs in the batch's order.
    pub(super) fn sum_buffer<E: Element>(
        &mut self,
        outputs: &[E],
        kernels: Kernels,
        (hidden, stride): (usize, usize),
        lanes: &LaneSet,
    ) -> Result<()> {
        self.index_tokens();
        let Received { by_token, entries, sums, .. } = self;
        let output = |_, row| Row::from(&outputs[row * hidden..(row + 1) * hidden]);
        by_token.sum(entries, sums, kernels, (hidden, stride), output, lanes)
    }

    /// As [`sum_buffer`](Self::sum_buffer), from the outputs in the outbox, in the batch's order or in that of the entries.
    pub(super) fn sum_outbox<E: Element>(
        &mut self,
        in_order: bool,
        kernels: Kernels,
        (hidden, stride): (usize, usize),
        lanes: &LaneSet,
    ) -> Result<()> {
        self.index_tokens();
        let Received { by_token, entries, outputs, sums, .. } = self;
        let outputs = &*outputs;
        let output = |entry, row| outputs.row::<E>(if in_order { row } else { entry } * stride, hidden);
        by_token.sum(entries, sums, kernels, (hidden, stride), output, lanes)
    }

    /// Where the rows of a token go in the layout whose experts begin at `places`: after [`index_tokens`](Self::index_tokens).
    pub(super) fn places_of(&self, span: &Span) -> impl Iterator<Item = usize> + '_ {
        let mut expert = 0;
        self.entries_at(span).iter().map(move |&entry| {
            let row = self.row_of(entry);
            while self.offsets[expert + 1] <= row {
                expert += 1;
            }
            self.places[expert] + (row - self.offsets[expert]) as usize
        })
    }

    /// Lists for each of `rows` rows of that layout the piece of the tokens that it belongs to.
    pub(super) fn list_owners(&self, cut: &Cut, rows: usize, owners: &mut Vec<u16>) {
        owners.clear();
        owners.resize(rows, u16::MAX);
        for piece in 0..cut.pieces {
            let places = self.tokens()[cut.range(piece)].iter().flat_map(|span| self.places_of(span));
            places.for_each(|place| owners[place] = piece as u16);
        }
    }

    /// The tokens that have entries here, by source, then token: after [`index_tokens`](Self::index_tokens).
    pub(super) fn tokens(&self) -> &[Span] {
        &self.by_token.tokens
    }

    /// The entries of one of them, ascending, hence by local expert.
    pub(super) fn entries_at(&self, span: &Span) -> &[u32] {
        &self.by_token.entries[span.first as usize..span.end as usize]
    }

    /// The row of an entry in the batch's order: after [`index_tokens`](Self::index_tokens).
    pub(super) fn row_of(&self, entry: u32) -> u32 {
        self.by_token.rows[entry as usize]
    }
}

impl ByToken {
    /// `output(entry, row)` is the output of an entry, which is a row of the batch.
    fn sum<'o, E: Element>(
        &self,
        entries: &[Entry],
        sums: &mut Area,
        kernels: Kernels,
        (hidden, stride): (usize, usize),
        output: impl Fn(usize, usize) -> Row<'o, E> + Sync,
        lanes: &LaneSet,
    ) -> Result<()> {
        // The bytes that are read: what is shared is the time they take.
        let cut = lanes.cut(self.tokens.len(), self.entries.len() * stride);
        let sums = sums.divide::<E>(0, self.tokens.len(), stride, Owners::Blocks(cut.each));
        lanes.share(cut, &|piece| {
            let mut sums = sums.part(piece);
            let gather = |i: usize, terms: &mut Terms<'o, E>| {
                let Span { first, end, .. } = self.tokens[i];
                let named = &self.entries[first as usize..end as usize];
                // Only a broken peer names more for one of its tokens.
                for entry in named.iter().take(MAX_TOPK).map(|&entry| entry as usize) {
                    terms.push((output(entry, self.rows[entry] as usize), entries[entry].weight));
                }
                Ok(())
            };
            sum_each(cut.range(piece), gather, |i, sum| sum.write(kernels, &mut sums.row_mut(i)[..hidden]))
        })
    }

    fn fill(&mut self, received: &Received) {
        let total = received.len;
        self.tokens.clear();
        self.entries.resize(total, 0);
        self.rows.resize(total, 0);
        let mut at = 0;
        for &source in &received.parties.sources {
            let range = received.entries_of(source);
            let entries = &received.entries[range.clone()];
            let tokens = entries.iter().fold(0, |most, e| most.max(e.token as usize + 1));
            self.counts.clear();
            self.counts.resize(tokens, 0);
            entries.iter().for_each(|e| self.counts[e.token as usize] += 1);
            for (token, count) in self.counts.iter_mut().enumerate().filter(|(_, count)| **count > 0) {
                let (first, end) = (at, at + *count);
                self.tokens.push(Span { source: source as u32, token: token as u32, first, end });
                *count = first;
                at = end;
            }
            for (entry, e) in range.zip(entries) {
                let cursor = &mut self.counts[e.token as usize];
                self.entries[*cursor as usize] = entry as u32;
                *cursor += 1;
            }
            for expert in 0..received.local {
                let run = received.runs[source * received.local + expert];
                for (row, entry) in (run..).zip(received.range(source, expert)) {
                    self.rows[entry] = row;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::memory::area;
    use crate::memory::segment::{MemoryFlavour, OwnSegment, Writers};
    use crate::moe::MoeConfig;
    use crate::moe::parties::Part;
    use crate::moe::placement::Placement;
    use proptest::prelude::*;

    fn received(world: usize, local: usize) -> Received {
        let config = MoeConfig::new(4, 8, 1, world * local, DType::F32);
        let parties = Arc::new(Parties::all(world));
        let layout = MoeLayout::new(&config, &parties);
        let placed = Placed::new(&Placement::even(world * local, world).unwrap(), &parties, (0, &vec![0; world]), 1);
        let bytes = layout.bytes_of(Part::Both);
        let mapping = OwnSegment::create(MemoryFlavour::Memfd, Writers::Owner, bytes, false).unwrap().mapping;
        let areas = area::split(Arc::new(mapping), layout.slot(0).areas(Part::Both, &mut 0)).1;
        Received::new(&parties, (0, world), (local, placed), areas).0
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_orders_agree_with_a_plain_reference(
            // Per source and local expert, which of eight tokens it is to work on; and the order of arrival.
            (local, lists, order) in (1usize..5, 1usize..5).prop_flat_map(|(local, world)| (
                Just(local),
                prop::collection::vec(prop::collection::vec(prop::collection::btree_set(0u32..8, 0..8), local), world),
                Just((0..world).collect::<Vec<_>>()).prop_shuffle(),
            ))
        ) {
            let world = lists.len();
            let mut received = received(world, local);
            received.clear();
            for &source in &order {
                for (expert, tokens) in lists[source].iter().enumerate() {
                    received.starts[source * (local + 1) + expert] = received.entries.len() as u32;
                    received.entries.extend(tokens.iter().map(|&token| Entry { token, weight: 0.0 }));
                    received.len = received.entries.len();
                }
                received.starts[source * (local + 1) + local] = received.entries.len() as u32;
            }
            received.order();
            received.index_tokens();

            let mut in_order = vec![];
            for expert in 0..local {
                prop_assert_eq!(received.offsets[expert] as usize, in_order.len());
                for (source, lists) in lists.iter().enumerate() {
                    in_order.extend(lists[expert].iter().map(|&token| (expert, source, token)));
                }
            }
            for (row, &(expert, source, token)) in in_order.iter().enumerate() {
                let (e, s, entry) = received.locate(row);
                prop_assert_eq!((e, s, received.entries[entry].token), (expert, source, token));
            }
            let mut by_token = vec![];
            for source in 0..world {
                for token in 0..8 {
                    let rows: Vec<usize> =
                        (0..in_order.len()).filter(|&i| (in_order[i].1, in_order[i].2) == (source, token)).collect();
                    if !rows.is_empty() {
                        by_token.push((source as u32, token, rows));
                    }
                }
            }
            let found: Vec<_> = received.tokens().iter().map(|span| {
                let rows = received.entries_at(span).iter().map(|&e| received.row_of(e) as usize).collect::<Vec<_>>();
                (span.source, span.token, rows)
            }).collect();
            prop_assert_eq!(found, by_token);
        }
    }
}
