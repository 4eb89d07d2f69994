//! Trampoline forward: a few expert ranks of a node gather what all of its expert ranks would read of every source, and what every
//! source would read of them.
//!
//! Without it an expert rank watches M words and reads M short lists, and an attention rank watches N words and reads N short lists of
//! where its outputs lie. With T trampolines on a node, the sources are divided into T blocks, in their order, and trampoline t serves
//! block t. All of what follows is metadata: rows stay where they are, and are read there as ever.
//! - *Down.* When all sources of its block have dispatched `e`, a trampoline merges their lists of the node's experts into one, by
//!   expert, then source, then token, in a segment of its own, and publishes `forwarded = e`. An expert rank waits for T such words
//!   and reads T lists, each of which has its part in one piece.
//! - *Up.* When all expert ranks of the node have combined `e`, the trampoline copies where they have put the outputs of each near
//!   source of its block, and publishes `returned = e`, a word of the slot. A source waits for one word, and reads one list. The same
//!   word tells it, two exchanges later, that its rows and lists of `e` may be overwritten: all expert ranks of the node are done with
//!   them.
//! - Sources of other nodes are merged with the near ones on the way down, from their mirrors. What goes back to them goes through their
//!   [rail peers](super::super::rail) as ever.
//!
//! A trampoline's lists of `e` are overwritten in `e + 2`, when the sources of its block have dispatched that. They have seen
//! `returned = e`, hence all expert ranks of the node have combined `e` and read the lists that led to it; sources of other nodes
//! have seen the same from their rail peers. The lists of outputs of `e` are read before their reader dispatches `e + 2`.
//!
//! A trampoline forwards within its calls: a2e_recv and e2a_send, and [`Experts::forward`](super::Experts::forward).
//!
//! When an expert rank has given `e` up, or left before it, `returned = e` comes all the same, with `spoiled = e` beside it: sources
//! then look at the expert ranks' own words.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Instant;

use bytemuck::{Pod, Zeroable};

use crate::bootstrap::Star;
use crate::comm::inner::CommInner;
use crate::error::{Error, Result};
use crate::fabric;
use crate::memory::area::{self, Area, Words};
use crate::memory::layout::{LINE, Layout};
use crate::memory::mapping::Mapping;
use crate::memory::segment::Writers;
use crate::moe::layout::{Entry, SLOTS, slot_of};
use crate::moe::parties::Parties;
use crate::moe::{Moe, MoeConfig, Reduction};
use crate::sync::{closing, epoch};

/// One entry of a merged list.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub(in crate::moe) struct MergedEntry {
    /// The source's place among all sources.
    pub(in crate::moe) source: u32,
    /// The entry's place in its source's list.
    pub(in crate::moe) at: u32,
    pub(in crate::moe) token: u32,
    pub(in crate::moe) weight: f32,
}

const _: () = assert!(size_of::<MergedEntry>() == 16);

/// Which ranks of a node are trampolines, and for which sources.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    /// Sources of each block, but the last.
    pub(super) each: usize,
    /// By block, the trampoline.
    pub(super) ranks: Vec<usize>,
}

impl Blocks {
    /// Of the expert ranks `near` of a node, for `sources` sources; `wanted` trampolines where there are as many ranks.
    pub(super) fn new(near: &[usize], sources: usize, wanted: usize) -> Self {
        let each = sources.div_ceil(wanted.min(near.len()).max(1));
        let count = if near.is_empty() { 0 } else { sources.div_ceil(each) };
        // Spread over the ranks.
        let ranks = (0..count).map(|block| near[block * near.len() / count]).collect();
        Blocks { each, ranks }
    }

    /// The places of a block's sources among all.
    pub(super) fn sources(&self, block: usize, all: usize) -> Range<usize> {
        block * self.each..((block + 1) * self.each).min(all)
    }

    /// The block that `rank` serves.
    fn of(&self, rank: usize) -> Option<usize> {
        self.ranks.iter().position(|&r| r == rank)
    }
}

/// What lies where in a trampoline's segment. All words have one writer, the trampoline.
struct TrampolineLayout {
    /// Epoch word: the merged lists of this exchange are complete. Read by the expert ranks of the node.
    forwarded: usize,
    /// The first exchange that the trampoline takes no part in (0: it goes on), as `closed` of a handle. Read by who reads the others.
    left: usize,
    slots: [SlotLayout; SLOTS],
    /// Of one source, where its outputs lie: u32 by position, or with [`Reduction::PerRank`] by destination.
    width: usize,
    /// Entries that a list has room for.
    most_entries: usize,
    bytes: usize,
}

struct SlotLayout {
    /// Epoch word: the outputs' places of this exchange are complete. Read by the near sources of the block. On its line is `spoiled`.
    returned: usize,
    /// The exchange of this slot that an expert rank has given up.
    spoiled: usize,
    /// u32 per position, and one more.
    starts: Range<usize>,
    entries: Range<usize>,
    /// By source of the block, then as `width` says.
    places: Range<usize>,
}

impl TrampolineLayout {
    fn new(config: &MoeConfig, (positions, destinations): (usize, usize), each: usize) -> Self {
        let width = match config.reduction {
            Reduction::PerExpert => positions,
            Reduction::PerRank => destinations,
        };
        let most_entries = each * config.max_tokens * config.width().choices();
        let mut layout = Layout::default();
        let forwarded = layout.add(LINE);
        let words = [(); SLOTS].map(|()| layout.add(LINE));
        let slots = words.map(|returned| {
            let mut area = |bytes: usize| {
                let start = layout.add(bytes);
                start..start + bytes
            };
            SlotLayout {
                returned,
                spoiled: returned + 8,
                starts: area((positions + 1) * 4),
                entries: area(most_entries * size_of::<MergedEntry>()),
                places: area(each * width * 4),
            }
        });
        TrampolineLayout { forwarded, left: forwarded + 8, slots, width, most_entries, bytes: layout.bytes() }
    }

    fn slot(&self, epoch: u64) -> &SlotLayout {
        &self.slots[slot_of(epoch)]
    }

    fn split(&self, own: Arc<Mapping>) -> (Words, [Lists; SLOTS]) {
        let [a, b] = &self.slots;
        let ranges = [&a.starts, &a.entries, &a.places, &b.starts, &b.entries, &b.places].map(Range::clone);
        let (words, [a, b, c, d, e, f]) = area::split(own, ranges);
        (words, [Lists { starts: a, entries: b, places: c }, Lists { starts: d, entries: e, places: f }])
    }
}

struct Lists {
    starts: Area,
    entries: Area,
    places: Area,
}

/// What this rank does as a trampoline.
struct Duty {
    block: Range<usize>,
    words: Words,
    lists: [Lists; SLOTS],
    /// The last exchange whose lists were forwarded; sources of the block that were seen to have dispatched the next.
    forwarded: u64,
    sources_seen: usize,
    /// By slot, the exchange that is to be returned, or was; destinations that were seen to have combined it; and whether it was.
    returning: [(u64, usize, bool); SLOTS],
    scratch: Scratch,
}

/// Memory for merging, kept from exchange to exchange.
#[derive(Default)]
struct Scratch {
    /// By source of the block, its starts of the node's positions, range by range.
    starts: Vec<u32>,
    entries: Vec<Entry>,
    /// By position.
    cursors: Vec<u32>,
    places: Vec<u32>,
}

/// A handle's trampolines of this rank's node.
pub(in crate::moe) struct Trampolines {
    blocks: Blocks,
    /// By block, the trampoline's segment, if it concerns this rank.
    segments: Vec<Option<Mapping>>,
    layout: TrampolineLayout,
    /// Expert ranks of the node.
    near: Vec<usize>,
    /// Positions of their experts, as ranges.
    positions: Vec<Range<usize>>,
    /// Where each rank's positions begin; one more entry for the end.
    starts: Vec<usize>,
    duty: Option<RefCell<Duty>>,
}

impl Trampolines {
    /// Whether `rank` is one of `wanted` trampolines of its node.
    pub(in crate::moe) fn includes(comm: &CommInner, parties: &Parties, wanted: usize, rank: usize) -> bool {
        let near = parties.destinations.iter().copied().filter(|&other| comm.nodes[other] == comm.nodes[rank]);
        Blocks::new(&near.collect::<Vec<_>>(), parties.sources.len(), wanted).of(rank).is_some()
    }

    /// Sets up the trampolines of all nodes, `wanted` on each. Collective over all ranks.
    pub(in crate::moe) fn new(
        comm: &CommInner,
        star: &mut Star,
        (config, parties, starts): (&MoeConfig, &Parties, &[usize]),
        wanted: usize,
        deadline: Instant,
    ) -> Result<Self> {
        let near_of = |node: usize| {
            let near = parties.destinations.iter().copied().filter(move |&rank| comm.nodes[rank] == node);
            near.collect::<Vec<_>>()
        };
        let sources = parties.sources.len();
        let blocks_of: Vec<Blocks> = (0..comm.nodes.iter().max().map_or(0, |most| most + 1))
            .map(|node| Blocks::new(&near_of(node), sources, wanted))
            .collect();
        let sizes = (starts[starts.len() - 1], parties.destinations.len());
        let (near, blocks) = (near_of(comm.nodes[comm.rank]), blocks_of[comm.nodes[comm.rank]].clone());
        let layout = TrampolineLayout::new(config, sizes, blocks.each);
        let bytes_of = |rank: usize| {
            let blocks = &blocks_of[comm.nodes[rank]];
            match blocks.of(rank) {
                Some(_) => TrampolineLayout::new(config, sizes, blocks.each).bytes,
                None => PAGE,
            }
        };
        let part = parties.part(comm.rank);
        let block_of_mine = parties.index_of(comm.rank) / blocks.each.max(1);
        let maps = |rank: usize| match blocks.of(rank) {
            Some(_) if part.receives() => true,
            Some(block) if part.sends() => block == block_of_mine,
            _ => false,
        };
        let here = (0..comm.world_size).filter(|&rank| comm.is_near(rank));
        let enough = fabric::check_memory("the trampolines", here.map(bytes_of).sum(), 1);
        let segments =
            fabric::exchange_segments_of(star, &comm.config, enough, Writers::Owner, (bytes_of, maps), deadline)?;
        let fabric::Segments { own, peers, .. } = segments;
        let mut by_rank = peers;
        let segments = blocks.ranks.iter().map(|&rank| by_rank[rank].take()).collect();
        let duty = blocks.of(comm.rank).map(|block| {
            let (words, lists) = layout.split(Arc::new(own));
            let block = blocks.sources(block, sources);
            let (forwarded, returning) = (0, [(0, 0, true); SLOTS]);
            RefCell::new(Duty {
                block,
                words,
                lists,
                forwarded,
                sources_seen: 0,
                returning,
                scratch: Scratch::default(),
            })
        });
        let mut positions: Vec<Range<usize>> = vec![];
        for range in near.iter().map(|&rank| starts[rank]..starts[rank + 1]).filter(|range| !range.is_empty()) {
            match positions.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => positions.push(range),
            }
        }
        Ok(Trampolines { blocks, segments, layout, near, positions, starts: starts.to_vec(), duty })
    }

    /// The blocks: how many there are on this node.
    pub(in crate::moe) fn count(&self) -> usize {
        self.blocks.ranks.len()
    }

    /// The trampoline of a block.
    pub(super) fn rank(&self, block: usize) -> usize {
        self.blocks.ranks[block]
    }

    /// The places of a block's sources among all.
    pub(in crate::moe) fn sources(&self, block: usize, parties: &Parties) -> Range<usize> {
        self.blocks.sources(block, parties.sources.len())
    }

    /// The trampolines of this node.
    pub(in crate::moe) fn ranks(&self) -> &[usize] {
        &self.blocks.ranks
    }

    /// Whether this rank is one of them.
    pub(super) fn is_own(&self) -> bool {
        self.duty.is_some()
    }

    /// The block of the source at `index` among all, if there are trampolines on this node.
    pub(in crate::moe) fn block_of(&self, index: usize) -> Option<usize> {
        Some(index / self.blocks.each.max(1)).filter(|&block| block < self.blocks.ranks.len())
    }

    fn segment(&self, block: usize) -> &Mapping {
        match &self.segments[block] {
            Some(segment) => segment,
            None => panic!("nothing of the trampoline of block {block} concerns this rank"),
        }
    }

    /// Whether a block's trampoline has left before `epoch`.
    pub(in crate::moe) fn has_left(&self, block: usize, epoch: u64) -> bool {
        closing::is_closed(self.segment(block).word64(self.layout.left), epoch)
    }

    /// Says that this rank, if it is a trampoline, takes part in no exchange from `epoch` on.
    pub(super) fn leave(&self, epoch: u64) {
        if let Some(duty) = &self.duty {
            closing::close(duty.borrow().words.word64(self.layout.left), epoch);
        }
    }

    /// Whether the merged lists of a block are complete.
    pub(super) fn has_forwarded(&self, block: usize, epoch: u64) -> bool {
        epoch::reached(self.segment(block).word64(self.layout.forwarded), epoch)
    }

    /// Whether a block's outputs' places are complete.
    pub(in crate::moe) fn has_returned(&self, block: usize, epoch: u64) -> bool {
        epoch::reached(self.segment(block).word64(self.layout.slot(epoch).returned), epoch)
    }

    /// Whether an expert rank has given `epoch` up, after it was returned.
    pub(in crate::moe) fn is_spoiled(&self, block: usize, epoch: u64) -> bool {
        self.segment(block).word64(self.layout.slot(epoch).spoiled).load(Acquire) == epoch
    }

    /// Where the outputs of the source at `index` among all lie: as many as there is room for in `to`, from the first on.
    pub(in crate::moe) fn read_places(&self, epoch: u64, index: usize, to: &mut [u32]) {
        let (block, slot) = (index / self.blocks.each, self.layout.slot(epoch));
        let at = slot.places.start + (index - block * self.blocks.each) * self.layout.width * size_of::<u32>();
        self.segment(block).read_into(at, &mut to[..self.layout.width]);
    }

    /// How many places a source has.
    pub(in crate::moe) fn width(&self) -> usize {
        self.layout.width
    }

    /// Copies the part of a merged list that has the positions `positions`, after checking how long it is.
    pub(in crate::moe) fn read_list(
        &self,
        (epoch, block): (u64, usize),
        positions: Range<usize>,
        starts: &mut Vec<u32>,
        entries: &mut Vec<MergedEntry>,
    ) -> Result<()> {
        let (segment, slot) = (self.segment(block), self.layout.slot(epoch));
        starts.resize(positions.len() + 1, 0);
        segment.read_into(slot.starts.start + positions.start * size_of::<u32>(), starts);
        let (begin, end) = (starts[0] as usize, starts[positions.len()] as usize);
        if starts.windows(2).any(|w| w[0] > w[1]) || end > self.layout.most_entries {
            let (rank, limit) = (self.rank(block), self.layout.most_entries as u64);
            return Err(Error::Corrupt { rank, what: "the end of a merged list", value: end as u64, limit });
        }
        starts.iter_mut().for_each(|start| *start -= begin as u32);
        entries.resize(end - begin, MergedEntry::default());
        segment.read_into(slot.entries.start + begin * size_of::<MergedEntry>(), entries);
        Ok(())
    }
}

impl Moe {
    /// Forwards what has become possible, if this rank is a trampoline.
    pub(super) fn forward(&self) -> Result<()> {
        let Some(duty) = self.trampolines.as_ref().and_then(|t| t.duty.as_ref()) else { return Ok(()) };
        // Who has it is at it.
        let Ok(mut duty) = duty.try_borrow_mut() else { return Ok(()) };
        self.forward_down(&mut duty)?;
        (0..SLOTS).for_each(|slot| self.forward_up(&mut duty, slot));
        Ok(())
    }

    /// Whether all that was forwarded was returned.
    pub(super) fn has_returned_all(&self) -> bool {
        let duty = self.trampolines.as_ref().and_then(|t| t.duty.as_ref());
        duty.is_none_or(|duty| duty.borrow().returning.iter().all(|(_, _, is_done)| *is_done))
    }

    fn forward_down(&self, duty: &mut Duty) -> Result<()> {
        let Some(trampolines) = &self.trampolines else { return Ok(()) };
        let (epoch, sources) = (duty.forwarded + 1, &self.parties.sources[duty.block.clone()]);
        while let Some(&source) = sources.get(duty.sources_seen) {
            if !epoch::reached(self.peers[source].word64(self.layout.dispatched), epoch) {
                return Ok(());
            }
            duty.sources_seen += 1;
        }
        let (to, slot) = (&mut duty.lists[slot_of(epoch)], self.layout.slot(epoch));
        let scratch = &mut duty.scratch;
        let positions = trampolines.positions.iter().cloned();
        let width: usize = positions.clone().map(|range| range.len() + 1).sum();
        scratch.starts.resize(sources.len() * width, 0);
        scratch.cursors.clear();
        let all = trampolines.starts[trampolines.starts.len() - 1];
        scratch.cursors.resize(all + 1, 0);
        // How many entries each position has; then where they begin; then each source's are put there.
        let mut lists = 0;
        for (&source, starts) in sources.iter().zip(scratch.starts.chunks_exact_mut(width.max(1))) {
            let outbox = &self.peers[source];
            let tokens = outbox.word32(slot.tokens).load(Relaxed) as usize;
            let corrupt = |what, value: usize, limit: usize| {
                Err(Error::Corrupt { rank: source, what, value: value as u64, limit: limit as u64 })
            };
            if tokens > self.config.max_tokens {
                return corrupt("a number of tokens", tokens, self.config.max_tokens);
            }
            let mut rest = starts;
            for range in positions.clone() {
                let (part, after) = rest.split_at_mut(range.len() + 1);
                rest = after;
                outbox.read_into(slot.starts.start + range.start * size_of::<u32>(), part);
                let end = part[range.len()] as usize;
                if part.windows(2).any(|w| w[0] > w[1]) || end > tokens * self.config.width().choices() {
                    return corrupt("the end of a list", end, tokens * self.config.width().choices());
                }
                let counts = &mut scratch.cursors[range];
                counts.iter_mut().zip(part.windows(2)).for_each(|(count, w)| *count += w[1] - w[0]);
                lists += 1;
            }
        }
        let mut total = 0;
        scratch.cursors.iter_mut().for_each(|cursor| total += std::mem::replace(cursor, total));
        to.starts.slice_mut::<u32>(0, all + 1).copy_from_slice(&scratch.cursors);
        let merged = to.entries.slice_mut::<MergedEntry>(0, total as usize);
        for (index, starts) in duty.block.clone().zip(scratch.starts.chunks_exact(width.max(1))) {
            let source = self.parties.sources[index];
            let outbox = &self.peers[source];
            let mut rest = starts;
            for range in positions.clone() {
                let (part, after) = rest.split_at(range.len() + 1);
                rest = after;
                let (begin, end) = (part[0] as usize, part[range.len()] as usize);
                scratch.entries.resize(end - begin, Entry::default());
                outbox.read_into(slot.entries.start + begin * size_of::<Entry>(), &mut scratch.entries);
                for (position, w) in range.zip(part.windows(2)) {
                    for at in w[0]..w[1] {
                        let Entry { token, weight } = scratch.entries[at as usize - begin];
                        let cursor = &mut scratch.cursors[position];
                        merged[*cursor as usize] = MergedEntry { source: index as u32, at, token, weight };
                        *cursor += 1;
                    }
                }
            }
        }
        (duty.forwarded, duty.sources_seen) = (epoch, 0);
        duty.returning[slot_of(epoch)] = (epoch, 0, false);
        epoch::publish(duty.words.word64(trampolines.layout.forwarded), epoch);
        self.counts.words(sources.len() as u64);
        self.counts.lists(lists, (sources.len() * width * 4 + total as usize * size_of::<Entry>()) as u64);
        self.counts.published(1);
        self.comm.notify_all();
        Ok(())
    }

    fn forward_up(&self, duty: &mut Duty, slot: usize) {
        let Some(trampolines) = &self.trampolines else { return };
        let (epoch, mut seen, false) = duty.returning[slot] else { return };
        let layout = self.layout.slot(epoch);
        while let Some(&rank) = trampolines.near.get(seen) {
            let outbox = &self.peers[rank];
            let has_left = || closing::is_closed(outbox.word64(self.layout.closed), epoch);
            if !epoch::reached(outbox.word64(layout.combined), epoch) && !has_left() {
                duty.returning[slot].1 = seen;
                return;
            }
            seen += 1;
        }
        let mut spoiled = false;
        let (block, width, per_source) = (duty.block.clone(), trampolines.layout.width, self.layout.bases_per_source);
        let places = duty.lists[slot].places.slice_mut::<u32>(0, block.len() * width);
        let is_near = |index: usize| self.comm.is_near(self.parties.sources[index]);
        let has_near = block.clone().any(is_near);
        let mut lists = 0;
        for &rank in &trampolines.near {
            let outbox = &self.peers[rank];
            let has_combined = epoch::reached(outbox.word64(layout.combined), epoch);
            if !has_combined || outbox.word64(layout.abandoned).load(Acquire) == epoch {
                spoiled = true;
                continue;
            }
            let positions = trampolines.starts[rank]..trampolines.starts[rank + 1];
            if !has_near || positions.is_empty() {
                continue;
            }
            let from = &mut duty.scratch.places;
            from.resize(block.len() * per_source, 0);
            outbox.read_into(layout.bases.start + block.start * per_source * size_of::<u32>(), from);
            lists += 1;
            let at = match self.config.reduction {
                Reduction::PerExpert => positions,
                Reduction::PerRank => {
                    let index = self.parties.destinations.partition_point(|&other| other < rank);
                    index..index + 1
                }
            };
            for (to, from) in places.chunks_exact_mut(width).zip(from.chunks_exact(per_source)) {
                to[at.clone()].copy_from_slice(&from[..at.len()]);
            }
        }
        duty.returning[slot] = (epoch, 0, true);
        let at = trampolines.layout.slot(epoch);
        if spoiled {
            duty.words.word64(at.spoiled).store(epoch, Release);
        }
        epoch::publish(duty.words.word64(at.returned), epoch);
        self.counts.words(trampolines.near.len() as u64);
        self.counts.lists(lists, lists * (block.len() * per_source * 4) as u64);
        self.counts.published(1);
        self.comm.notify_all();
    }
}

const PAGE: usize = 4096;

#[cfg(test)]
mod blocks_tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_cover_all_sources_and_each_has_a_rank_of_its_own(
            near in prop::collection::btree_set(0usize..50, 0..20), sources in 1usize..70, wanted in 1usize..30,
        ) {
            let near: Vec<usize> = near.into_iter().collect();
            let blocks = Blocks::new(&near, sources, wanted);
            prop_assert!(blocks.ranks.len() <= wanted && blocks.ranks.iter().all(|rank| near.contains(rank)));
            prop_assert!(blocks.ranks.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert_eq!(blocks.ranks.is_empty(), near.is_empty());
            if !near.is_empty() {
                let covered: Vec<_> = (0..blocks.ranks.len()).flat_map(|b| blocks.sources(b, sources)).collect();
                prop_assert_eq!(covered, (0..sources).collect::<Vec<_>>());
                prop_assert!((0..blocks.ranks.len()).all(|block| !blocks.sources(block, sources).is_empty()));
            }
        }
    }
}
