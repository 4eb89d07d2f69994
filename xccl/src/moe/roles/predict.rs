//! What a group will count, as a function of its shape and routing: no rank runs.
//!
//! Written from what the protocols say, for groups that no machine at hand could run; a test holds it against what ranks have counted.

use std::ops::Range;
use std::sync::Arc;

use super::trampoline::Blocks;
use super::{RoleConfig, RoleCounts};
use crate::error::{Error, Result};
use crate::moe::between::Map;
use crate::moe::layout::{Entry, MoeLayout};
use crate::moe::parties::Parties;
use crate::moe::placement::placed::Placed;
use crate::moe::{MoeConfig, Reduction};

/// One domain's micro-batch, as the ranks see it.
struct Domain<'a> {
    config: &'a MoeConfig,
    parties: Parties,
    placed: Arc<Placed>,
    layout: MoeLayout,
    nodes: &'a [usize],
    /// By node, its expert ranks.
    near: Vec<Vec<usize>>,
    /// By node, its trampolines.
    trampolines: Option<Vec<Blocks>>,
}

impl RoleConfig {
    /// What each rank of a group would count in `micro_batches` micro-batches of every domain: see [`Attention::counts`](super::Attention::counts).
    /// `nodes` has the node of each rank, and `routing(domain, micro-batch, rank)` the expert ids of an attention rank's tokens,
    /// `[T, topk]`.
    ///
    /// ```
    /// use xccl::{DType, Forward, MoeConfig, RoleConfig};
    /// let moe = MoeConfig::new(1, 64, 1, 256, DType::BF16);
    /// let flat = RoleConfig { forward: Forward::Flat, ..RoleConfig::new([0..100], 100..356, moe) };
    /// let by_trampolines = RoleConfig { forward: Forward::Trampoline, ..flat.clone() };
    /// let words = |config: RoleConfig| {
    ///     let counts = config.predict(&[0; 356], 10, |_, batch, rank| vec![(rank * 7 + batch) as i64 % 256])?;
    ///     Ok::<_, xccl::Error>(counts[0].words_watched)
    /// };
    /// assert!(words(by_trampolines)? * 50 < words(flat)?);
    /// # Ok::<_, xccl::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of a configuration that cannot be, as [`Attention::new`](super::Attention::new); [`Error::ExpertOutOfRange`].
    pub fn predict(
        &self,
        nodes: &[usize],
        micro_batches: usize,
        mut routing: impl FnMut(usize, usize, usize) -> Vec<i64>,
    ) -> Result<Vec<RoleCounts>> {
        self.check(nodes.len())?;
        let moe = self.placed()?;
        let mut counts = vec![RoleCounts::default(); nodes.len()];
        for (number, sources) in self.attention.iter().enumerate() {
            let wanted = self.trampolines_for(sources.len(), &self.experts, nodes);
            let domain = Domain::new(&moe, Parties::apart(nodes.len(), sources, &self.experts), nodes, wanted)?;
            let mut before: Vec<Vec<bool>> = vec![];
            for batch in 0..micro_batches {
                let ids: Vec<_> = sources.iter().map(|&rank| routing(number, batch, rank)).collect();
                let had_entries = domain.count(&ids, &mut counts)?;
                // The micro-batch before the last is known to have been consumed before one is sent.
                if batch >= 2 {
                    domain.count_claims(&before[batch - 2], &mut counts);
                }
                before.push(had_entries);
            }
        }
        Ok(counts)
    }
}

impl<'a> Domain<'a> {
    fn new(config: &'a MoeConfig, parties: Parties, nodes: &'a [usize], wanted: Option<usize>) -> Result<Self> {
        let placed = Placed::new(&config.first_placement(nodes.len())?, &parties, (0, nodes), 1);
        let layout = MoeLayout::new(config, &parties);
        let mut near = vec![vec![]; nodes.iter().max().map_or(0, |most| most + 1)];
        parties.destinations.iter().for_each(|&rank| near[nodes[rank]].push(rank));
        let blocks = |wanted| near.iter().map(|ranks| Blocks::new(ranks, parties.sources.len(), wanted)).collect();
        let trampolines = wanted.map(blocks);
        Ok(Domain { config, parties, placed, layout, nodes, near, trampolines })
    }

    fn local(&self, rank: usize) -> usize {
        self.placed.local(rank).len()
    }

    /// Whether what a source reads of its node comes by a trampoline.
    fn is_gathered(&self, node: usize) -> bool {
        self.trampolines.as_ref().is_some_and(|blocks| !blocks[node].ranks.is_empty())
    }

    /// The places of experts of one node, as ranges of neighbouring ranks.
    fn ranges(&self, node: usize) -> Vec<Range<usize>> {
        let mut ranges: Vec<Range<usize>> = vec![];
        for &rank in &self.near[node] {
            match ranges.last_mut() {
                Some(last) if last.end == rank => last.end += 1,
                _ => ranges.push(rank..rank + 1),
            }
        }
        ranges
    }

    /// Counts one micro-batch, without what is waited for before it is sent; says which ranks had entries of the sources, by source and
    /// rank.
    fn count(&self, ids: &[Vec<i64>], counts: &mut [RoleCounts]) -> Result<Vec<bool>> {
        let (world, topk) = (self.nodes.len(), self.config.topk);
        let mut entries = vec![0usize; ids.len() * world];
        let mut had_entries = vec![false; ids.len() * world];
        let map = Map::new(self.nodes, 0, &self.parties);
        for (index, (&source, ids)) in self.parties.sources.iter().zip(ids).enumerate() {
            let of_source = &mut entries[index * world..(index + 1) * world];
            // By expert, tokens that have named it.
            let mut nths = vec![0; self.config.experts + self.config.shared];
            // By node, tokens that have experts there.
            let mut tokens = vec![0usize; self.near.len()];
            for (token, choices) in ids.chunks(topk).enumerate() {
                let mut named = vec![];
                let shared = (0..self.config.shared).map(|s| (topk + s, (self.config.experts + s) as i64));
                let choices = choices.iter().copied().enumerate().filter(|(_, expert)| *expert != -1);
                for (k, expert) in choices.chain(shared) {
                    let (experts, first) = (self.config.experts, self.config.experts + self.config.special_experts());
                    // Special experts are on no rank.
                    if k < topk && (experts as i64..first as i64).contains(&expert) {
                        continue;
                    }
                    let place = usize::try_from(expert).ok().filter(|&e| k >= topk || e < experts).and_then(|expert| {
                        nths[expert] += 1;
                        self.placed.placement.choose(expert, source, nths[expert] - 1, self.nodes)
                    });
                    let (rank, _) = place.ok_or(Error::ExpertOutOfRange { token, k, expert, experts: first })?;
                    of_source[rank] += 1;
                    if !named.contains(&self.nodes[rank]) {
                        named.push(self.nodes[rank]);
                    }
                }
                named.into_iter().for_each(|node| tokens[node] += 1);
            }
            had_entries[index * world..][..world].iter_mut().zip(&*of_source).for_each(|(had, n)| *had = *n > 0);

            let node = self.nodes[source];
            let mut own = RoleCounts { published: 1, ..RoleCounts::default() };
            let with_entries: Vec<usize> =
                self.near[node].iter().copied().filter(|&rank| of_source[rank] > 0).collect();
            match self.is_gathered(node) {
                _ if with_entries.is_empty() => {}
                true => {
                    own.words_watched += 1;
                    own.lists_read += 1;
                    own.list_bytes += 4 * match self.config.reduction {
                        Reduction::PerExpert => self.placed.positions(),
                        Reduction::PerRank => self.parties.destinations.len(),
                    } as u64;
                }
                false => {
                    own.words_watched += with_entries.len() as u64;
                    own.lists_read += with_entries.len() as u64;
                    let places = |&rank: &usize| match self.config.reduction {
                        Reduction::PerExpert => self.local(rank),
                        Reduction::PerRank => 1,
                    };
                    own.list_bytes += 4 * with_entries.iter().map(places).sum::<usize>() as u64;
                }
            }
            for other in (0..self.near.len()).filter(|&other| other != node && !self.near[other].is_empty()) {
                let entries: usize = self.near[other].iter().map(|&rank| of_source[rank]).sum();
                let starts = self.ranges(other).into_iter().map(|r| r.map(|rank| self.local(rank)).sum::<usize>() + 1);
                let rows = if self.config.smooth.is_some() { entries } else { tokens[other] };
                own.far_messages += 1;
                own.far_bytes +=
                    (starts.sum::<usize>() * 4 + entries * size_of::<Entry>() + rows * self.layout.token.stride) as u64;
                own.words_watched += u64::from(tokens[other] > 0);
                let rail = &mut counts[map.rail(source, other)];
                rail.far_messages += 1;
                rail.far_bytes += (tokens[other] * self.layout.stride) as u64;
            }
            counts[source] += own;
        }
        for &rank in &self.parties.destinations {
            let entries: usize = (0..ids.len()).map(|index| entries[index * world + rank]).sum();
            let (lists, entry) = match &self.trampolines {
                None => (self.parties.sources.len(), size_of::<Entry>()),
                Some(blocks) => (blocks[self.nodes[rank]].ranks.len(), size_of::<super::MergedEntry>()),
            };
            counts[rank] += RoleCounts {
                published: 1,
                words_watched: lists as u64,
                lists_read: lists as u64,
                list_bytes: (lists * (self.local(rank) + 1) * 4 + entries * entry) as u64,
                ..RoleCounts::default()
            };
        }
        let of = |index: usize, rank: usize| entries[index * world + rank];
        for (node, blocks) in self.trampolines.iter().flatten().enumerate() {
            for (block, &rank) in blocks.ranks.iter().enumerate() {
                counts[rank] += self.count_gathering(node, blocks.sources(block, ids.len()), of);
            }
        }
        Ok(had_entries)
    }

    /// What a trampoline does for its block.
    fn count_gathering(&self, node: usize, block: Range<usize>, entries: impl Fn(usize, usize) -> usize) -> RoleCounts {
        let ranks = &self.near[node];
        // Experts of neighbouring ranks stand together, also across ranks of other nodes that have none.
        let mut positions: Vec<Range<usize>> = vec![];
        for range in ranks.iter().map(|&rank| self.placed.starts[rank]..self.placed.starts[rank + 1]) {
            match positions.last_mut() {
                _ if range.is_empty() => {}
                Some(last) if last.end == range.start => last.end = range.end,
                _ => positions.push(range),
            }
        }
        let starts: usize = positions.iter().map(|range| range.len() + 1).sum();
        let merged: usize =
            block.clone().map(|index| ranks.iter().map(|&rank| entries(index, rank)).sum::<usize>()).sum();
        let has_near = block.clone().any(|index| self.nodes[self.parties.sources[index]] == node);
        let gathered = if has_near { ranks.iter().filter(|&&rank| self.local(rank) > 0).count() } else { 0 };
        let down = block.len() * starts * 4 + merged * size_of::<Entry>();
        let up = gathered * block.len() * self.layout.bases_per_source * 4;
        RoleCounts {
            published: 2,
            words_watched: (block.len() + ranks.len()) as u64,
            lists_read: (block.len() * positions.len() + gathered) as u64,
            list_bytes: (down + up) as u64,
            ..RoleCounts::default()
        }
    }

    /// Counts what sources wait for before they send, given which ranks they know to be done: those that had entries of them.
    fn count_claims(&self, had_entries: &[bool], counts: &mut [RoleCounts]) {
        for (&source, had) in self.parties.sources.iter().zip(had_entries.chunks(self.nodes.len())) {
            let node = self.nodes[source];
            let near = match self.is_gathered(node) {
                true => 1,
                false => self.near[node].iter().filter(|&&rank| !had[rank]).count(),
            };
            let others = (0..self.near.len()).filter(|&other| other != node && !self.near[other].is_empty());
            counts[source].words_watched += (near + others.count()) as u64;
        }
    }
}
