//! A placement as one rank uses it.
//!
//! Slots are numbered so that those of one rank stand together (by rank, then by slot): their *positions*. Lists sorted in
//! this order fall into one contiguous part per rank, and in it one per slot.

use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::Placement;
use crate::moe::parties::Parties;
use crate::moe::routing::Choice;

/// A placement from an exchange on, for one source of tokens.
pub(in crate::moe) struct Placed {
    pub(in crate::moe) placement: Placement,
    /// The logical expert at each position.
    pub(in crate::moe) expert: Vec<usize>,
    /// The rank of each position.
    pub(in crate::moe) rank: Vec<u32>,
    /// Where each rank's part begins; one more entry for the end.
    pub(in crate::moe) starts: Vec<usize>,
    /// By position, the node, counting those that may have experts other than the source's own; or `NEAR`. Empty where there are
    /// no others.
    node: Vec<u16>,
    pub(in crate::moe) replicas: Replicas,
    /// Tells one placement from another.
    pub(in crate::moe) mark: u64,
    /// The first exchange that goes by it.
    pub(in crate::moe) since: u64,
}

/// Which replica this source's tokens take.
pub(in crate::moe) enum Replicas {
    /// There is one of each expert, at the position that is its number.
    InOrder,
    /// There is one of each expert: its position.
    Single(Vec<u32>),
    /// There are several.
    Several(Rotation),
}

/// How tokens rotate over replicas.
pub(in crate::moe) struct Rotation {
    /// By logical expert: its candidates, as a range of `positions`.
    pub(in crate::moe) candidates: Vec<(u32, u32)>,
    /// The candidates' positions, the one that the first token takes first.
    pub(in crate::moe) positions: Vec<u32>,
    /// By position: which candidate it is, of how many; of none if this source's tokens do not go there.
    pub(in crate::moe) turns: Vec<(u32, u32)>,
}

/// The position is on the source's own node.
const NEAR: u16 = u16::MAX;

impl Placed {
    /// `nodes` has the node of each rank, `me` is the source.
    pub(in crate::moe) fn new(
        placement: &Placement,
        parties: &Parties,
        (me, nodes): (usize, &[usize]),
        since: u64,
    ) -> Arc<Self> {
        let (ranks, mine) = (placement.ranks(), nodes[me]);
        let expert: Vec<usize> = (0..ranks).flat_map(|rank| placement.slots(rank)).copied().collect();
        let rank: Vec<u32> =
            (0..ranks).flat_map(|rank| placement.slots(rank).iter().map(move |_| rank as u32)).collect();
        let starts: Vec<usize> = (0..=ranks).map(|r| rank.partition_point(|&at| (at as usize) < r)).collect();
        let of_experts = parties.destinations.iter().map(|&rank| nodes[rank]);
        let mut others: Vec<usize> = of_experts.filter(|&node| node != mine).collect();
        others.sort_unstable();
        others.dedup();
        let node_of = |&rank: &u32| others.binary_search(&nodes[rank as usize]).map_or(NEAR, |n| n as u16);
        let node = if others.is_empty() { vec![] } else { rank.iter().map(node_of).collect() };
        let replicas = match expert.len() == placement.experts() {
            true if expert.iter().enumerate().all(|(at, &e)| at == e) => Replicas::InOrder,
            true => {
                let mut position = vec![0; expert.len()];
                expert.iter().enumerate().for_each(|(at, &e)| position[e] = at as u32);
                Replicas::Single(position)
            }
            false => Replicas::Several(Rotation::new(placement, &starts, me, nodes)),
        };
        let mut hash = Sha256::new();
        for rank in 0..ranks {
            let slots = placement.slots(rank);
            [slots.len()].iter().chain(slots).for_each(|n| hash.update((*n as u64).to_le_bytes()));
        }
        let mark = u64::from_le_bytes(std::array::from_fn({
            let hash = hash.finalize();
            move |i| hash[i]
        }));
        Arc::new(Placed { placement: placement.clone(), expert, rank, starts, node, replicas, mark, since })
    }

    /// The number of positions.
    pub(in crate::moe) fn positions(&self) -> usize {
        self.expert.len()
    }

    /// The logical experts in `rank`'s slots.
    pub(in crate::moe) fn local(&self, rank: usize) -> &[usize] {
        &self.expert[self.starts[rank]..self.starts[rank + 1]]
    }

    /// Adds a batch's tokens to those of each routed expert, from where the lists begin or the choices, whichever are fewer.
    pub(in crate::moe) fn count(&self, starts: &[u32], choices: &[Choice], counts: &mut [i64]) {
        let tokens = |pair: &[u32]| i64::from(pair[1] - pair[0]);
        if choices.len() < self.positions() {
            for choice in choices.iter().filter(|c| c.is_placed()) {
                if let Some(count) = counts.get_mut(self.expert[choice.position as usize]) {
                    *count += 1;
                }
            }
        } else if matches!(self.replicas, Replicas::InOrder) {
            counts.iter_mut().zip(starts.windows(2)).for_each(|(count, pair)| *count += tokens(pair));
        } else {
            for (&expert, pair) in self.expert.iter().zip(starts.windows(2)) {
                if let Some(count) = counts.get_mut(expert) {
                    *count += tokens(pair);
                }
            }
        }
    }

    /// Which of the other nodes a position is on; `None` where it is the source's own.
    pub(in crate::moe) fn node_of(&self, position: u32) -> Option<usize> {
        let node = *self.node.get(position as usize)?;
        (node != NEAR).then_some(usize::from(node))
    }
}

impl Rotation {
    fn new(placement: &Placement, starts: &[usize], me: usize, nodes: &[usize]) -> Self {
        let mut positions: Vec<u32> = vec![];
        let mut turns = vec![(0, 0); starts[starts.len() - 1]];
        // One walk over the slots: a look for each expert's would take their product.
        let mut replicas = vec![vec![]; placement.experts()];
        for rank in 0..placement.ranks() {
            for (slot, &expert) in placement.slots(rank).iter().enumerate() {
                replicas[expert].push((nodes[rank], starts[rank] + slot));
            }
        }
        let candidates = replicas.into_iter().map(|replicas| {
            let is_near = replicas.iter().any(|&(node, _)| node == nodes[me]);
            let candidates = replicas.into_iter().filter(|&(node, _)| !is_near || node == nodes[me]);
            let first = positions.len();
            positions.extend(candidates.map(|(_, position)| position as u32));
            let of = positions.len() - first;
            positions[first..].rotate_left(me % of);
            for (turn, &position) in positions[first..].iter().enumerate() {
                turns[position as usize] = (turn as u32, of as u32);
            }
            (first as u32, of as u32)
        });
        let candidates = candidates.collect();
        Rotation { candidates, positions, turns }
    }

    /// The position that takes the `nth` token naming `expert`, and how many of the source's tokens it took before.
    pub(in crate::moe) fn place(&self, expert: u32, nth: u32) -> (u32, u32) {
        let (first, of) = self.candidates[expert as usize];
        match of {
            1 => (self.positions[first as usize], nth),
            _ => (self.positions[(first + nth % of) as usize], nth / of),
        }
    }

    /// How many of `count` tokens that name its expert a position takes.
    pub(in crate::moe) fn share(&self, position: usize, count: u32) -> u32 {
        match self.turns[position] {
            (_, 0) => 0,
            (_, 1) => count,
            (turn, of) => count.saturating_sub(turn).div_ceil(of),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The nodes of the ranks, and a placement with replicas.
    pub(in crate::moe) fn placements() -> impl Strategy<Value = (Vec<usize>, Placement)> {
        let shape = (prop::collection::vec(0usize..3, 1..7), 1usize..12);
        shape.prop_flat_map(|(nodes, experts)| {
            let ranks = nodes.len();
            // Also twice on a rank.
            let homes = prop::collection::vec(prop::collection::vec(0..ranks, 1..=ranks + 1), experts);
            homes.prop_map(move |homes| {
                let mut slots = vec![vec![]; ranks];
                // Not in the order of the experts.
                for (expert, ranks) in homes.iter().enumerate() {
                    for &rank in ranks {
                        let at = (expert * 7) % (slots[rank].len() + 1);
                        slots[rank].insert(at, expert);
                    }
                }
                (nodes.clone(), Placement::new(homes.len(), slots).unwrap())
            })
        })
    }

    proptest! {
        #[test]
        fn tokens_take_the_replica_that_anybody_works_out_for_them((nodes, placement) in placements(), count in 0u32..40) {
            for me in 0..nodes.len() {
                let placed = Placed::new(&placement, &Parties::all(nodes.len()), (me, &nodes), 1);
                let position_of = |(rank, slot): (usize, usize)| (placed.starts[rank] + slot) as u32;
                let several = match &placed.replicas {
                    Replicas::Several(rotation) => Some(rotation),
                    _ => None,
                };
                let mut shares = vec![0; placed.positions()];
                for expert in 0..placement.experts() {
                    let mut taken = vec![0; placed.positions()];
                    for nth in 0..count {
                        let chosen = position_of(placement.choose(expert, me, nth as usize, &nodes).unwrap());
                        let (position, before) = match (&placed.replicas, several) {
                            (Replicas::Single(position), _) => (position[expert], nth),
                            (_, Some(rotation)) => rotation.place(expert as u32, nth),
                            _ => (expert as u32, nth),
                        };
                        prop_assert_eq!((position, before), (chosen, taken[chosen as usize]));
                        taken[chosen as usize] += 1;
                        shares[chosen as usize] += 1;
                    }
                    // The candidates share evenly, and are near if any is.
                    let used: Vec<usize> = (0..taken.len()).filter(|&p| taken[p] > 0).collect();
                    let has_near = placement.replicas(expert).any(|(rank, _)| nodes[rank] == nodes[me]);
                    prop_assert!(used.iter().all(|&p| !has_near || nodes[placed.rank[p] as usize] == nodes[me]));
                    let most = used.iter().map(|&p| taken[p]).max().unwrap_or(0);
                    prop_assert!(used.iter().all(|&p| taken[p] + 1 >= most));
                }
                if let Some(rotation) = several {
                    let shared: Vec<u32> = (0..shares.len()).map(|p| rotation.share(p, count)).collect();
                    prop_assert_eq!(shared, shares);
                }
            }
        }

        #[test]
        fn positions_are_by_rank_and_slot((nodes, placement) in placements()) {
            let placed = Placed::new(&placement, &Parties::all(nodes.len()), (0, &nodes), 1);
            for rank in 0..nodes.len() {
                prop_assert_eq!(placed.local(rank), placement.slots(rank));
                for position in placed.starts[rank]..placed.starts[rank + 1] {
                    prop_assert_eq!(placed.rank[position] as usize, rank);
                    let node = placed.node_of(position as u32);
                    prop_assert_eq!(node.is_none(), nodes[rank] == nodes[0]);
                }
            }
        }
    }
}
