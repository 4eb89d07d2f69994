//! Exchanges between nodes.
//!
//! Each rank has one *rail peer* on every other node: the rank with the same index among its node's ranks (modulo their number, where
//! nodes differ in size).
//! - *dispatch_send* puts each row that experts of a node need once, with that node's part of the lists, into a mirror of this rank's
//!   outbox at its rail peer, and then tells the words. The mirror lies in a segment that the ranks of that node map: they read
//!   lists and rows from it as from a near rank's outbox.
//! - When all ranks of a node have combined, the [rail peer](super::rail) forms one sum per token over their experts, and puts these
//!   rows back, one per token and node. It is a chore of whoever waits on that rank, or of its progress thread.
//! - *combine_recv* sums what is near, and after that one row of each other node that had experts of the token, by ascending node.
//!
//! Who may overwrite what: `returned = e`, which a rail peer tells with the sums of `e`, also says that no rank of its node has a use
//! for the tokens of `e` any more; before `dispatch_send(e + 2)` a rank has seen it from every node. The sums that a rail peer
//! puts from are overwritten in `e + 2`, when their receiver has dispatched that, hence has combined `e`.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::layout::{Entry, MoeLayout, SLOTS, slot_of};
use super::parties::Parties;
use super::placement::placed::Placed;
use super::rail::{Duty, Near, Rail, Staging};
use super::routing::Choice;
use super::{Moe, MoeConfig};
use crate::bootstrap::Star;
use crate::comm::inner::{Call, CommInner};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::fabric::endpoint::{Access, Region, RemoteRegion};
use crate::fabric::far::Far;
use crate::fabric::plane::{Put, Update, Window};
use crate::fabric::{self, LandingSegments};
use crate::memory::layout::LINE;
use crate::memory::mapping::Mapping;
use crate::memory::row::Row;
use crate::sync::epoch;
use crate::sync::progress::{Operation, Waiting};

const PAGE: usize = 4096;

/// Words of a line that a node's rail peer tells.
pub(super) const RETURNED: usize = 0;
pub(super) const ABANDONED: usize = RETURNED + SLOTS * 8;
/// Which rank has abandoned.
pub(super) const BY: usize = ABANDONED + SLOTS * 8;

const _: () = assert!(BY + SLOTS * 8 <= LINE);

/// What a handle's outboxes look like.
pub(super) type Shape<'a> = (&'a MoeConfig, &'a MoeLayout, &'a Arc<Placed>);

/// Which rank is where.
pub(super) struct Map<'p> {
    parties: &'p Parties,
    /// By rank.
    node: Vec<usize>,
    /// By rank, its place among the ranks of its node that have the same part.
    index: Vec<usize>,
    /// By node, its ranks that have experts, ascending.
    members: Vec<Vec<usize>>,
    /// The rank's own node.
    mine: usize,
}

impl<'p> Map<'p> {
    pub(super) fn new(nodes: &[usize], rank: usize, parties: &'p Parties) -> Self {
        let count = nodes.iter().max().map_or(0, |most| most + 1);
        let (mut members, mut index) = (vec![vec![]; count], vec![0; nodes.len()]);
        for (ranks, have_experts) in [(&parties.sources, false), (&parties.destinations, true)] {
            let mut seen = vec![0; count];
            for &rank in ranks {
                index[rank] = seen[nodes[rank]];
                seen[nodes[rank]] += 1;
                if have_experts {
                    members[nodes[rank]].push(rank);
                }
            }
        }
        Map { parties, node: nodes.to_vec(), index, members, mine: nodes[rank] }
    }

    /// The rank of `node` that stands for `rank` there.
    pub(super) fn rail(&self, rank: usize, node: usize) -> usize {
        self.members[node][self.index[rank] % self.members[node].len()]
    }

    /// The ranks of other nodes that `rank` stands for at its own.
    fn duties(&self, rank: usize) -> Vec<usize> {
        if !self.parties.part(rank).receives() {
            return vec![];
        }
        let node = self.node[rank];
        let sources = self.parties.sources.iter().copied();
        sources.filter(|&r| self.node[r] != node && self.rail(r, node) == rank).collect()
    }

    /// The nodes other than `node` that have experts, ascending.
    fn others(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.members.len()).filter(move |&n| n != node && !self.members[n].is_empty())
    }

    /// Those of a node's ranks that have experts, as ranges of neighbours.
    fn blocks(&self, node: usize) -> Vec<Range<usize>> {
        let mut blocks: Vec<Range<usize>> = vec![];
        for &rank in &self.members[node] {
            match blocks.last_mut() {
                Some(last) if last.end == rank => last.end += 1,
                _ => blocks.push(rank..rank + 1),
            }
        }
        blocks
    }
}

/// What a rank offers another one, for one handle.
#[derive(Clone, Serialize, Deserialize)]
struct Offer {
    /// By slot, the mirror of that rank's lists and rows, if this one is its rail peer.
    mirror: Option<[RemoteRegion; SLOTS]>,
    /// By slot, where sums for this one land, if that one is its rail peer; and the line of words.
    results: Option<([RemoteRegion; SLOTS], usize)>,
}

/// Another node, as this rank sends to it.
struct Node {
    rail: usize,
    blocks: Vec<Range<usize>>,
    /// By slot, the mirror of this rank's lists and rows there.
    mirror: [RemoteRegion; SLOTS],
    /// Tokens of the current exchange that go there, as ranges.
    runs: Vec<Range<u32>>,
    /// The last token that was found to go there, plus one.
    last: u32,
    /// By slot, whether any do.
    has_tokens: [bool; SLOTS],
}

/// A handle's part between nodes.
pub(super) struct Between {
    /// The other nodes, ascending.
    nodes: Vec<Node>,
    /// What this rank does for others.
    pub(super) rail: Arc<Rail>,
    /// This rank's outbox for the handle.
    outbox: Region,
    /// The window of the mirrors' words.
    mirror_words: u16,
    /// Sums of other nodes for this rank: a line of words per node, then by slot and node the rows.
    results: Arc<Mapping>,
    result_rows: usize,
    rows_bytes: usize,
}

/// What an exchange has sent to other nodes.
pub(super) struct Sent {
    pub(super) rows: u64,
    pub(super) messages: u64,
    pub(super) bytes: u64,
}

/// Where the parts that are mirrored begin and end in a slot of the outbox.
fn mirrored(layout: &MoeLayout, slot: usize) -> Range<usize> {
    let slot = layout.slot(slot as u64);
    slot.starts.start..slot.rows.end
}

impl Between {
    /// Sets up landing zones with the ranks of other nodes; gives by rank the mirrors of far ones. Collective over all ranks.
    pub(super) fn new(
        comm: &CommInner,
        far: &Far,
        star: &mut Star,
        (shape, parties): (Shape<'_>, &Arc<Parties>),
        own: &Arc<Mapping>,
        deadline: Instant,
    ) -> Result<(Self, Vec<Option<Mapping>>)> {
        let (config, layout, _) = shape;
        let (map, ranks) = (Map::new(&comm.nodes, comm.rank, parties), comm.world_size);
        let part = parties.part(comm.rank);
        let plane = &far.plane;
        let mirror_bytes = layout.send_bytes.next_multiple_of(PAGE);
        let bytes_of = |rank: usize| map.duties(rank).len() * mirror_bytes;
        let LandingSegments { own: landing, peers } = fabric::exchange_landings(star, bytes_of, deadline)?;

        // What lands here: mirrors of those that this rank stands for, and sums for its own tokens.
        let duties = map.duties(comm.rank);
        let others: Vec<usize> = if part.sends() { map.others(map.mine).collect() } else { vec![] };
        let rows_bytes = config.max_tokens * layout.stride;
        let result_rows = (others.len() * LINE).next_multiple_of(PAGE);
        let results = Arc::new(Mapping::anonymous(result_rows + SLOTS * others.len() * rows_bytes)?);
        let mut offers = vec![Offer { mirror: None, results: None }; ranks];
        let (mut mirror_words, mut result_words) = (vec![None; ranks], vec![None; ranks]);
        for (index, &source) in duties.iter().enumerate() {
            let base = index * mirror_bytes;
            let mirror = |slot| -> Result<RemoteRegion> {
                let range = mirrored(layout, slot);
                Ok(plane.register(&landing, base + range.start..base + range.end, Access::Remote)?.remote)
            };
            offers[source].mirror = Some([mirror(0)?, mirror(1)?]);
            let range = 0..layout.slot(0).starts.start;
            mirror_words[source] = Some(Window { memory: landing.clone(), base, range });
        }
        for (index, &node) in others.iter().enumerate() {
            let rail = map.rail(comm.rank, node);
            let rows = |slot| -> Result<RemoteRegion> {
                let start = result_rows + (slot * others.len() + index) * rows_bytes;
                Ok(plane.register(&results, start..start + rows_bytes, Access::Remote)?.remote)
            };
            offers[rail].results = Some(([rows(0)?, rows(1)?], index * LINE));
            // A rank may stand for this one at one node only: its own.
            let range = index * LINE..(index + 1) * LINE;
            result_words[rail] = Some(Window { memory: results.clone(), base: 0, range });
        }
        let (mirror_words, result_words) = (plane.add_window(mirror_words), plane.add_window(result_words));
        let mine = fabric::encode(&offers)?;
        let mut theirs: Vec<Vec<Offer>> = vec![];
        for (rank, (blob, _)) in star.exchange(&mine, &[], deadline)?.into_iter().enumerate() {
            let offers: Vec<Offer> = fabric::decode(&blob)?;
            if offers.len() != ranks {
                let (what, value, limit) = ("a number of offers", offers.len() as u64, ranks as u64);
                return Err(Error::Corrupt { rank, what, value, limit });
            }
            theirs.push(offers);
        }
        let missing = |rank, what| Error::Corrupt { rank, what, value: 0, limit: 1 };
        let node = |&node: &usize| {
            let rail = map.rail(comm.rank, node);
            let mirror = theirs[rail][comm.rank].mirror.ok_or(missing(rail, "offers of a mirror"))?;
            (0..SLOTS).try_for_each(|slot| mirror[slot].check(rail, mirrored(layout, slot).len()))?;
            Ok(Node { rail, blocks: map.blocks(node), mirror, runs: vec![], last: 0, has_tokens: [false; SLOTS] })
        };
        let duty = |&source: &usize| {
            let offer = theirs[source][comm.rank].results;
            let (results, line) = offer.ok_or(missing(source, "offers of room for sums"))?;
            results.iter().try_for_each(|results| results.check(source, rows_bytes))?;
            Ok(Duty { source, results, line })
        };
        let nodes = others.iter().map(node).collect::<Result<_>>()?;

        // Mirrors of far ranks, which their rail peers of this node have.
        let mut mirrors = vec![];
        for source in 0..ranks {
            let is_far = map.node[source] != map.mine && parties.part(source).sends();
            mirrors.push(match is_far && part.receives() {
                false => None,
                true => {
                    let rail = map.rail(source, map.mine);
                    let index = map.duties(rail).iter().position(|&s| s == source).unwrap_or(0);
                    Some(peers.map(rail, index * mirror_bytes, layout.send_bytes)?)
                }
            });
        }
        let duties = duties.iter().map(duty).collect::<Result<_>>()?;
        let staging = Staging { plane: plane.clone(), rows_bytes, result_words };
        let near = Near { ranks: map.members[map.mine].clone(), blocks: map.blocks(map.mine) };
        let rail = Rail::new(comm, far, (duties, near), staging, (shape, parties))?;
        let between = Between {
            outbox: plane.register(own, 0..own.len(), Access::Local)?,
            nodes,
            rail,
            mirror_words,
            results,
            result_rows,
            rows_bytes,
        };
        Ok((between, mirrors))
    }

    /// Sends an exchange's tokens to the other nodes: what was published in the outbox.
    pub(super) fn dispatch(
        &mut self,
        far: &Far,
        (config, layout, placed): Shape<'_>,
        epoch: u64,
        (tokens, tell_placement): (usize, bool),
        choices: &[Choice],
        starts: &[u32],
    ) -> Sent {
        self.find_runs(choices, config.width().choices(), placed);
        for node in &mut self.nodes {
            node.has_tokens[slot_of(epoch)] = !node.runs.is_empty();
        }
        let (slot, in_outbox) = (slot_of(epoch), layout.slot(epoch));
        let first = mirrored(layout, slot).start;
        let window = self.mirror_words;
        let [mark, since] = in_outbox.placement;
        let updates = [
            Update::Word64 { window, offset: mark, value: placed.mark },
            Update::Word64 { window, offset: since, value: placed.since },
            Update::Word32 { window, offset: in_outbox.tokens, value: tokens as u32 },
            Update::Word64 { window, offset: layout.dispatched, value: epoch },
        ];
        // The mirror remembers the placement.
        let updates = &updates[if tell_placement { 0 } else { 2 }..];
        let (outbox, row_bytes) = (self.outbox, layout.token.stride);
        let mut sent = Sent { rows: 0, messages: self.nodes.len() as u64, bytes: 0 };
        for node in &self.nodes {
            let bytes = Cell::new(0);
            let put = |range: Range<usize>| {
                bytes.set(bytes.get() + range.len() as u64);
                Put { from: outbox, offset: range.start - first, range, into: node.mirror[slot] }
            };
            let positions = |block: &Range<usize>| placed.starts[block.start]..placed.starts[block.end];
            let lists = node.blocks.iter().map(positions).flat_map(|positions| {
                let starts_at = in_outbox.starts.start;
                let entries = starts[positions.start] as usize..starts[positions.end] as usize;
                let entries_at = in_outbox.entries.start;
                let starts = starts_at + positions.start * 4..starts_at + (positions.end + 1) * 4;
                [starts, entries_at + entries.start * size_of::<Entry>()..entries_at + entries.end * size_of::<Entry>()]
            });
            let of_rows = |rows: Range<usize>| {
                in_outbox.rows.start + rows.start * row_bytes..in_outbox.rows.start + rows.end * row_bytes
            };
            match config.smooth {
                None => {
                    sent.rows += node.runs.iter().map(|run| u64::from(run.end - run.start)).sum::<u64>();
                    let runs = node.runs.iter().map(|run| of_rows(run.start as usize..run.end as usize));
                    let ranges = lists.chain(runs).filter(|range| !range.is_empty());
                    far.plane.send(node.rail, ranges.map(put), updates);
                }
                // A row for each entry.
                Some(_) => {
                    let entries =
                        |positions: Range<usize>| starts[positions.start] as usize..starts[positions.end] as usize;
                    let runs = node.blocks.iter().map(positions).map(entries);
                    sent.rows += runs.clone().map(|run| run.len() as u64).sum::<u64>();
                    let ranges = lists.chain(runs.map(of_rows)).filter(|range| !range.is_empty());
                    far.plane.send(node.rail, ranges.map(put), updates);
                }
            }
            sent.bytes += bytes.get();
        }
        sent
    }

    /// Notes which tokens go to which node.
    fn find_runs(&mut self, choices: &[Choice], each: usize, placed: &Placed) {
        let Between { nodes, .. } = self;
        nodes.iter_mut().for_each(|node| {
            node.runs.clear();
            node.last = 0;
        });
        for (token, choices) in choices.chunks_exact(each).enumerate() {
            let token = token as u32;
            for choice in choices.iter().filter(|c| c.is_placed()) {
                let Some(node) = placed.node_of(choice.position).and_then(|node| nodes.get_mut(node)) else { continue };
                if node.last == token + 1 {
                    continue;
                }
                node.last = token + 1;
                match node.runs.last_mut() {
                    Some(run) if run.end == token => run.end += 1,
                    _ => node.runs.push(token..token + 1),
                }
            }
        }
    }

    /// Tells the other nodes a word of the outbox.
    pub(super) fn tell(&self, far: &Far, offset: usize, value: u64) {
        let update = [Update::Word64 { window: self.mirror_words, offset, value }];
        self.nodes.iter().for_each(|node| far.plane.send(node.rail, [], &update));
    }

    /// Waits until the other nodes have no more use for the tokens of `epoch`.
    pub(super) fn await_returned(
        &self,
        comm: &CommInner,
        call: &mut Call,
        epoch: u64,
        during: Operation,
    ) -> Result<()> {
        for (index, node) in self.nodes.iter().enumerate() {
            let word = self.results.word64(index * LINE + RETURNED + slot_of(epoch) * 8);
            let what = Waiting { operation: during, epoch, peer: Some(node.rail) };
            comm.wait_in(call, what, || epoch::reached(word, epoch).then_some(()))?;
        }
        Ok(())
    }

    /// Waits for the sums of the nodes that had tokens of this rank in `epoch`.
    pub(super) fn await_sums(&self, comm: &CommInner, call: &mut Call, epoch: u64) -> Result<()> {
        let slot = slot_of(epoch);
        for (index, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.has_tokens[slot]) {
            let word = |at: usize| self.results.word64(index * LINE + at + slot * 8);
            let what = Waiting { operation: Operation::CombineRecv, epoch, peer: Some(node.rail) };
            let has_come = || {
                let is_abandoned = word(ABANDONED).load(Acquire) == epoch;
                (is_abandoned || epoch::reached(word(RETURNED), epoch)).then_some(is_abandoned)
            };
            if comm.wait_in(call, what, has_come)? {
                let rank = word(BY).load(Relaxed) as usize;
                let rank = rank.min(comm.world_size - 1);
                return Err(comm.or_the_end(Error::PeerAbandoned { rank, epoch }, Operation::CombineRecv, epoch));
            }
        }
        Ok(())
    }

    /// The number of other nodes that have tokens of this rank in `epoch`.
    pub(super) fn with_tokens(&self, epoch: u64) -> u64 {
        self.nodes.iter().filter(|node| node.has_tokens[slot_of(epoch)]).count() as u64
    }

    /// The number of other nodes.
    pub(super) fn others(&self) -> usize {
        self.nodes.len()
    }

    /// Row `row` of the sums that a node has returned.
    pub(super) fn sum<E: Element>(
        &self,
        epoch: u64,
        node: usize,
        row: usize,
        stride: usize,
        hidden: usize,
    ) -> Row<'_, E> {
        let area = self.result_rows + (slot_of(epoch) * self.nodes.len() + node) * self.rows_bytes;
        self.results.row(area + row * stride, hidden)
    }
}

impl Moe {
    /// The plane, and this handle's part of it, where ranks are on several nodes.
    pub(super) fn between(&self) -> Option<(&Far, &RefCell<Between>)> {
        Some((self.comm.fabric.far.as_ref()?, self.between.as_ref()?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_rank_has_one_rail_peer_at_every_other_node(nodes in prop::collection::vec(0usize..4, 1..20)) {
            // Numbered in the order of their first ranks, as the bootstrap does.
            let mut seen = vec![];
            let nodes: Vec<usize> = nodes.iter().map(|n| seen.iter().position(|s| s == n).unwrap_or_else(|| {
                seen.push(*n);
                seen.len() - 1
            })).collect();
            let parties = Parties::all(nodes.len());
            let map = Map::new(&nodes, 0, &parties);
            for rank in 0..nodes.len() {
                let rails: Vec<_> = map.others(nodes[rank]).map(|node| map.rail(rank, node)).collect();
                prop_assert_eq!(rails.len(), seen.len() - 1);
                for (node, rail) in map.others(nodes[rank]).zip(rails) {
                    prop_assert_eq!(nodes[rail], node);
                    prop_assert!(map.duties(rail).contains(&rank));
                }
                let blocks = map.blocks(nodes[rank]);
                prop_assert_eq!(blocks.iter().cloned().flatten().collect::<Vec<_>>(), map.members[nodes[rank]].clone());
                prop_assert!(blocks.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
            let duties: usize = (0..nodes.len()).map(|rank| map.duties(rank).len()).sum();
            prop_assert_eq!(duties, nodes.len() * (seen.len() - 1));
        }
    }
}
