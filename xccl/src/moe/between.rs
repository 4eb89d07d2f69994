//! Exchanges between nodes.
//!
//! Each rank has one *rail peer* on every other node: the rank with the same index among its node's ranks (modulo their number, where
//! nodes differ in size).
//! - *dispatch_send* puts each row that experts of a node need once, with that node's part of the lists, into a mirror of this rank's
//!   outbox at its rail peer, and then tells the words. The mirror lies in a segment that the ranks of that node map: they read
//!   lists and rows from it as from a near rank's outbox.
//! - *combine_recv* first does this rank's duty: for each rank of another node whose rail peer it is, it waits until the ranks
//!   of this node have combined, forms one sum per token over their experts, and puts these rows back, one per token and node.
//!   Then it sums what is near, and after that one row of each other node that had experts of the token, by ascending node.
//!
//! Who may overwrite what: `returned = e`, which a rail peer tells with the sums of `e`, also says that no rank of its node has a use
//! for the tokens of `e` any more; before `dispatch_send(e + 2)` a rank has seen it from every node. The sums that a rail peer
//! puts from are overwritten in `e + 2`, when their receiver has dispatched that, hence has combined `e`.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::config::MAX_TOPK;
use super::layout::{Entry, MoeLayout, SLOTS};
use super::placement::Placement;
use super::routing::{Choice, NONE};
use super::terms::{Terms, sum_each};
use super::{Moe, MoeConfig, Reduction};
use crate::bootstrap::Star;
use crate::comm::inner::{Call, CommInner};
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::fabric::endpoint::{Access, Region, RemoteRegion};
use crate::fabric::far::Far;
use crate::fabric::plane::{Put, Update, Window};
use crate::fabric::{self, LandingSegments};
use crate::memory::area::{self, Area};
use crate::memory::divided::Owners;
use crate::memory::layout::LINE;
use crate::memory::mapping::Mapping;
use crate::memory::row::Row;
use crate::sync::epoch;
use crate::sync::progress::{Operation, Waiting};

const PAGE: usize = 4096;

/// Words of a line that a node's rail peer tells.
const RETURNED: usize = 0;
const ABANDONED: usize = RETURNED + SLOTS * 8;
/// Which rank has abandoned.
const BY: usize = ABANDONED + SLOTS * 8;

const _: () = assert!(BY + SLOTS * 8 <= LINE);

/// Which rank is where.
struct Map {
    /// By rank.
    node: Vec<usize>,
    /// By node, its ranks, ascending.
    members: Vec<Vec<usize>>,
    /// The rank's own node.
    mine: usize,
}

impl Map {
    fn new(nodes: &[usize], rank: usize) -> Self {
        let mut members = vec![vec![]; nodes.iter().max().map_or(0, |most| most + 1)];
        nodes.iter().enumerate().for_each(|(rank, &node)| members[node].push(rank));
        Map { node: nodes.to_vec(), members, mine: nodes[rank] }
    }

    /// The rank of `node` that stands for `rank` there.
    fn rail(&self, rank: usize, node: usize) -> usize {
        let index = self.members[self.node[rank]].iter().position(|&r| r == rank).unwrap_or(0);
        self.members[node][index % self.members[node].len()]
    }

    /// The ranks of other nodes that `rank` stands for at its own.
    fn duties(&self, rank: usize) -> Vec<usize> {
        let node = self.node[rank];
        (0..self.node.len()).filter(|&r| self.node[r] != node && self.rail(r, node) == rank).collect()
    }

    /// The nodes other than `node`, ascending.
    fn others(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.members.len()).filter(move |&n| n != node && !self.members[n].is_empty())
    }

    /// A node's ranks as ranges of neighbours.
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

/// A rank of another node that this one stands for.
struct Duty {
    source: usize,
    /// By slot, where its sums land.
    results: [RemoteRegion; SLOTS],
    line: usize,
}

/// The sums of one source, while they are formed; kept from exchange to exchange.
#[derive(Default)]
struct Sums {
    starts: Vec<u32>,
    entries: Vec<Entry>,
    bases: Vec<u32>,
    /// Per token: terms so far, then where they begin.
    counts: Vec<u32>,
    /// Tokens that have terms.
    tokens: Vec<u32>,
    /// Where each of them has its terms, and one more.
    spans: Vec<u32>,
    /// Rank, row, weight.
    terms: Vec<(u32, u32, f32)>,
    /// Per token, the last rank that was found to have it, plus one.
    last: Vec<u32>,
}

/// A handle's part between nodes.
pub(super) struct Between {
    map: Map,
    /// By expert, the index in `nodes`, or `NEAR`.
    node_of_expert: Vec<u16>,
    /// The other nodes, ascending.
    nodes: Vec<Node>,
    duties: Vec<Duty>,
    /// This rank's outbox for the handle.
    outbox: Region,
    /// Windows of the mirrors' words, and of the words beside the results.
    mirror_words: u16,
    result_words: u16,
    /// Sums of other nodes for this rank: a line of words per node, then by slot and node the rows.
    results: Arc<Mapping>,
    result_rows: usize,
    /// By slot: the sums that are put back, `max_tokens` rows per duty.
    staging: [Area; SLOTS],
    staging_region: Region,
    staging_starts: [usize; SLOTS],
    rows_bytes: usize,
    /// By slot, the exchange whose duty was done, and one whose duty was given up and not told of.
    done: [u64; SLOTS],
    owed: [u64; SLOTS],
    sums: Sums,
}

/// The expert's rank is on this node.
const NEAR: u16 = u16::MAX;

fn slot_of(epoch: u64) -> usize {
    (epoch % SLOTS as u64) as usize
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
        (config, layout, placement): (&MoeConfig, &MoeLayout, &Placement),
        own: &Arc<Mapping>,
        deadline: Instant,
    ) -> Result<(Self, Vec<Option<Mapping>>)> {
        let (map, ranks) = (Map::new(&comm.nodes, comm.rank), comm.world_size);
        let plane = &far.plane;
        let mirror_bytes = layout.bytes.next_multiple_of(PAGE);
        let bytes_of = |rank: usize| map.duties(rank).len() * mirror_bytes;
        let LandingSegments { own: landing, peers } = fabric::exchange_landings(star, bytes_of, deadline)?;

        // What lands here: mirrors of those that this rank stands for, and sums for its own tokens.
        let duties = map.duties(comm.rank);
        let others: Vec<usize> = map.others(map.mine).collect();
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
            Ok(Node { rail, blocks: map.blocks(node), mirror, runs: vec![], last: 0, has_tokens: [false; SLOTS] })
        };
        let duty = |&source: &usize| {
            let offer = theirs[source][comm.rank].results;
            let (results, line) = offer.ok_or(missing(source, "offers of room for sums"))?;
            Ok(Duty { source, results, line })
        };
        let nodes = others.iter().map(node).collect::<Result<_>>()?;
        let staged = duties.len() * rows_bytes;
        let staging = Arc::new(Mapping::anonymous(SLOTS * staged)?);
        let staging_region = plane.register(&staging, 0..staging.len(), Access::Local)?;
        let (_, staging) = area::split(staging, [0..staged, staged..2 * staged]);
        let node_of = |&rank: &u32| others.iter().position(|&n| n == map.node[rank as usize]);
        let node_of_expert = placement.rank.iter().map(|rank| node_of(rank).map_or(NEAR, |n| n as u16)).collect();

        // Mirrors of far ranks, which their rail peers of this node have.
        let mut mirrors = vec![];
        for source in 0..ranks {
            mirrors.push(match map.node[source] == map.mine {
                true => None,
                false => {
                    let rail = map.rail(source, map.mine);
                    let index = map.duties(rail).iter().position(|&s| s == source).unwrap_or(0);
                    Some(peers.map(rail, index * mirror_bytes, layout.bytes)?)
                }
            });
        }
        let duties = duties.iter().map(duty).collect::<Result<_>>()?;
        let between = Between {
            outbox: plane.register(own, 0..own.len(), Access::Local)?,
            node_of_expert,
            nodes,
            duties,
            mirror_words,
            result_words,
            results,
            result_rows,
            staging,
            staging_region,
            staging_starts: [0, staged],
            rows_bytes,
            done: [0; SLOTS],
            owed: [0; SLOTS],
            sums: Sums::default(),
            map,
        };
        Ok((between, mirrors))
    }

    /// Sends an exchange's tokens to the other nodes: what was published in the outbox.
    pub(super) fn dispatch(
        &mut self,
        far: &Far,
        (config, layout, placement): (&MoeConfig, &MoeLayout, &Placement),
        epoch: u64,
        tokens: usize,
        choices: &[Choice],
        starts: &[u32],
    ) -> u64 {
        self.find_runs(choices, config.topk);
        for node in &mut self.nodes {
            node.has_tokens[slot_of(epoch)] = !node.runs.is_empty();
        }
        let (slot, in_outbox) = (slot_of(epoch), layout.slot(epoch));
        let first = mirrored(layout, slot).start;
        let updates = [
            Update::Word32 { window: self.mirror_words, offset: in_outbox.tokens, value: tokens as u32 },
            Update::Word64 { window: self.mirror_words, offset: layout.dispatched, value: epoch },
        ];
        let (outbox, row_bytes) = (self.outbox, layout.token.stride);
        let mut rows = 0;
        for node in &self.nodes {
            let put =
                |range: Range<usize>| Put { from: outbox, offset: range.start - first, range, into: node.mirror[slot] };
            let positions = |block: &Range<usize>| placement.starts[block.start]..placement.starts[block.end];
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
                    rows += node.runs.iter().map(|run| u64::from(run.end - run.start)).sum::<u64>();
                    let runs = node.runs.iter().map(|run| of_rows(run.start as usize..run.end as usize));
                    let ranges = lists.chain(runs).filter(|range| !range.is_empty());
                    far.plane.send(node.rail, ranges.map(put), &updates);
                }
                // A row for each entry.
                Some(_) => {
                    let entries =
                        |positions: Range<usize>| starts[positions.start] as usize..starts[positions.end] as usize;
                    let runs = node.blocks.iter().map(positions).map(entries);
                    rows += runs.clone().map(|run| run.len() as u64).sum::<u64>();
                    let ranges = lists.chain(runs.map(of_rows)).filter(|range| !range.is_empty());
                    far.plane.send(node.rail, ranges.map(put), &updates);
                }
            }
        }
        rows
    }

    /// Notes which tokens go to which node.
    fn find_runs(&mut self, choices: &[Choice], topk: usize) {
        let Between { nodes, node_of_expert, .. } = self;
        nodes.iter_mut().for_each(|node| {
            node.runs.clear();
            node.last = 0;
        });
        for (token, choices) in choices.chunks_exact(topk).enumerate() {
            let token = token as u32;
            for choice in choices.iter().filter(|c| c.expert != NONE) {
                let Some(node) = nodes.get_mut(usize::from(node_of_expert[choice.expert as usize])) else { continue };
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
                return Err(Error::PeerAbandoned { rank: rank.min(comm.world_size - 1), epoch });
            }
        }
        Ok(())
    }

    /// The number of other nodes.
    pub(super) fn others(&self) -> usize {
        self.nodes.len()
    }

    /// Which of the other nodes has an expert.
    pub(super) fn node_of(&self, expert: u32) -> Option<usize> {
        let node = self.node_of_expert[expert as usize];
        (node != NEAR).then_some(usize::from(node))
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

    /// Sends back what the ranks that this one stands for get from its node.
    pub(super) fn do_duty<E: Element>(&self, epoch: u64, call: &mut Call) -> Result<()> {
        let Some((far, between)) = self.between() else { return Ok(()) };
        let mut between = between.borrow_mut();
        let near = between.map.members[between.map.mine].clone();
        if between.duties.is_empty() {
            between.done[slot_of(epoch)] = epoch;
            return Ok(());
        }
        let slot = self.layout.slot(epoch);
        let mut abandoned = None;
        for &peer in &near {
            let outbox = &self.peers[peer];
            let word = outbox.word64(slot.combined);
            let what = Waiting { operation: Operation::CombineRecv, epoch, peer: Some(peer) };
            self.comm.wait_in(call, what, || epoch::reached(word, epoch).then_some(()))?;
            if outbox.word64(slot.abandoned).load(Acquire) == epoch {
                abandoned = abandoned.or(Some(peer));
            }
        }
        let mut sums = std::mem::take(&mut between.sums);
        for index in 0..between.duties.len() {
            let rows = match abandoned {
                Some(_) => 0,
                None => self.sum_for::<E>(&mut between, index, epoch, &near, &mut sums)?,
            };
            let Between { duties, staging_region, staging_starts, rows_bytes, result_words, .. } = &*between;
            let Duty { source, results, line } = &duties[index];
            let start = staging_starts[slot_of(epoch)] + index * rows_bytes;
            let range = start..start + rows * self.layout.stride;
            let put = Put { from: *staging_region, range, into: results[slot_of(epoch)], offset: 0 };
            let word = |at: usize, value| Update::Word64 {
                window: *result_words,
                offset: line + at + slot_of(epoch) * 8,
                value,
            };
            match abandoned {
                None => far.plane.send(*source, (rows > 0).then_some(put), &[word(RETURNED, epoch)]),
                Some(by) => {
                    let updates = [word(BY, by as u64), word(ABANDONED, epoch), word(RETURNED, epoch)];
                    far.plane.send(*source, [], &updates);
                }
            }
            self.comm.counters.far_sums.fetch_add(rows as u64, Relaxed);
        }
        between.sums = sums;
        between.done[slot_of(epoch)] = epoch;
        Ok(())
    }

    /// Notes that this rank will not do its duty for `epoch`, if it has not, and says so.
    pub(super) fn shirk(&self, epoch: u64) {
        let Some((far, between)) = self.between() else { return };
        let mut between = between.borrow_mut();
        let slot = slot_of(epoch);
        if between.done[slot] >= epoch || between.owed[slot] >= epoch {
            return;
        }
        between.owed[slot] = epoch;
        let by = self.comm.rank as u64;
        for Duty { source, line, .. } in &between.duties {
            let word =
                |at: usize, value| Update::Word64 { window: between.result_words, offset: line + at + slot * 8, value };
            far.plane.send(*source, [], &[word(BY, by), word(ABANDONED, epoch)]);
        }
    }

    /// Says that nobody of this node has a use for the tokens of `epoch` any more, if this rank owes that.
    pub(super) fn make_up(&self, epoch: u64) {
        let Some((far, between)) = self.between() else { return };
        let mut between = between.borrow_mut();
        let slot = slot_of(epoch);
        if between.owed[slot] != epoch || between.done[slot] >= epoch {
            return;
        }
        between.done[slot] = epoch;
        for Duty { source, line, .. } in &between.duties {
            let update =
                Update::Word64 { window: between.result_words, offset: line + RETURNED + slot * 8, value: epoch };
            far.plane.send(*source, [], &[update]);
        }
    }

    /// Forms the sums of one source over the experts of this node; gives their number.
    fn sum_for<'s, E: Element>(
        &'s self,
        between: &mut Between,
        index: usize,
        epoch: u64,
        near: &[usize],
        sums: &mut Sums,
    ) -> Result<usize> {
        let source = between.duties[index].source;
        self.take_terms(source, epoch, near, &between.map, sums)?;
        let (layout, hidden) = (&self.layout, self.config.hidden);
        let (stride, outboxes) = (layout.stride, self.outboxes());
        let slot = layout.slot(epoch);
        let area = match self.config.reduction {
            Reduction::PerExpert => (slot.outputs.start, layout.output_rows),
            Reduction::PerRank => (slot.sums.start, layout.sum_rows),
        };
        let (count, lanes) = (sums.tokens.len(), self.lanes());
        let cut = lanes.cut(count, sums.terms.len() * stride);
        let staging = &mut between.staging[slot_of(epoch)];
        let rows = staging.divide::<E>(index * between.rows_bytes, count, stride, Owners::Blocks(cut.each));
        let sums = &*sums;
        lanes.share(cut, &|piece| {
            let mut part = rows.part(piece);
            let gather = |i: usize, terms: &mut Terms<'s, E>| {
                let (first, end) = (sums.spans[i] as usize, sums.spans[i + 1] as usize);
                for &(rank, row, weight) in &sums.terms[first..end] {
                    terms.push(outboxes.output(rank as usize, area, row as usize)?, weight);
                }
                Ok(())
            };
            sum_each(cut.range(piece), gather, |i, sum| sum.write(&mut part.row_mut(i)[..hidden]))
        })?;
        Ok(count)
    }

    /// Lists the terms of each token of a source: copied out of its mirror and the near ranks' outboxes, and checked.
    fn take_terms(&self, source: usize, epoch: u64, near: &[usize], map: &Map, sums: &mut Sums) -> Result<()> {
        let (config, layout, placement) = (&self.config, &self.layout, &self.placement);
        let (mirror, slot) = (&self.peers[source], layout.slot(epoch));
        let corrupt = |what, value: u32, limit: usize| {
            Err(Error::Corrupt { rank: source, what, value: value.into(), limit: limit as u64 })
        };
        let tokens = mirror.word32(slot.tokens).load(Relaxed);
        if tokens as usize > config.max_tokens {
            return corrupt("a number of tokens", tokens, config.max_tokens);
        }
        let Sums { starts, entries, bases, counts, tokens: named, spans, terms, last } = sums;
        counts.clear();
        counts.resize(tokens as usize + 1, 0);
        last.clear();
        last.resize(tokens as usize, 0);
        entries.clear();
        starts.clear();
        // One range of starts and entries per block of ranks; positions of a block follow each other in `starts`.
        let all = tokens as usize * config.topk;
        for block in map.blocks(map.mine) {
            let positions = placement.starts[block.start]..placement.starts[block.end];
            let (at, first) = (starts.len(), entries.len() as u32);
            starts.resize(at + positions.len() + 1, 0);
            let part = &mut starts[at..];
            mirror.read_into(slot.starts.start + positions.start * 4, part);
            if part.windows(2).any(|w| w[0] > w[1]) || part[part.len() - 1] as usize > all {
                return corrupt("the end of a list", part[part.len() - 1], all);
            }
            let begin = part[0];
            let count = (part[part.len() - 1] - begin) as usize;
            part.iter_mut().for_each(|start| *start = *start - begin + first);
            entries.resize(first as usize + count, Entry::default());
            let from = slot.entries.start + begin as usize * size_of::<Entry>();
            mirror.read_into(from, &mut entries[first as usize..]);
        }
        if let Some(wrong) = entries.iter().find(|entry| entry.token >= tokens) {
            return corrupt("a token's index", wrong.token, tokens as usize);
        }
        // Twice over all terms: how many each token has, then in their places.
        let mut each_term = |term: &mut dyn FnMut(usize, u32, u32, f32)| {
            let mut at = 0;
            for (n, &rank) in near.iter().enumerate() {
                // Between two blocks there is one more start.
                at += usize::from(n > 0 && near[n - 1] + 1 != rank);
                let local = placement.local(rank).len();
                let from = slot.bases.start + source * layout.bases_per_source * size_of::<u32>();
                bases.resize(layout.bases_per_source, 0);
                self.peers[rank].read_into(from, bases);
                let range = starts[at] as usize..starts[at + local] as usize;
                match config.reduction {
                    Reduction::PerExpert => {
                        for (expert, base) in (at..at + local).zip(&*bases) {
                            let range = starts[expert] as usize..starts[expert + 1] as usize;
                            for (i, entry) in entries[range].iter().enumerate() {
                                term(entry.token as usize, rank as u32, base.wrapping_add(i as u32), entry.weight);
                            }
                        }
                    }
                    Reduction::PerRank => {
                        let mark = rank as u32 + 1;
                        entries[range].iter().for_each(|entry| last[entry.token as usize] = mark);
                        let named = last.iter().enumerate().filter(|(_, l)| **l == mark);
                        for (row, (token, _)) in (bases[0]..).zip(named) {
                            term(token, rank as u32, row, 1.0);
                        }
                    }
                }
                at += local;
            }
        };
        each_term(&mut |token, _, _, _| counts[token] += 1);
        named.clear();
        spans.clear();
        let mut total = 0;
        for (token, count) in counts.iter_mut().enumerate().take(tokens as usize).filter(|(_, count)| **count > 0) {
            if *count as usize > MAX_TOPK {
                return corrupt("the experts of one token", *count, MAX_TOPK);
            }
            named.push(token as u32);
            spans.push(total);
            total += std::mem::replace(count, total);
        }
        spans.push(total);
        terms.clear();
        terms.resize(total as usize, (0, 0, 0.0));
        each_term(&mut |token, rank, row, weight| {
            terms[counts[token] as usize] = (rank, row, weight);
            counts[token] += 1;
        });
        Ok(())
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
            let map = Map::new(&nodes, 0);
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
