//! Which rank holds which expert.
//!
//! Experts are put into an order in which those of one rank stand together (by rank, then by id). Lists sorted in this
//! order fall into one contiguous part per rank, and in it one per expert.

use super::MoeConfig;

/// The order of experts by rank.
#[derive(Clone)]
pub(super) struct Placement {
    /// The expert at each position.
    pub(super) expert: Vec<usize>,
    /// The position of each expert.
    pub(super) position: Vec<usize>,
    /// The rank of each expert.
    pub(super) rank: Vec<u32>,
    /// Where each rank's part begins; one more entry for the end.
    pub(super) starts: Vec<usize>,
}

impl Placement {
    pub(super) fn new(config: &MoeConfig, world_size: usize) -> Self {
        let even = |expert: usize| {
            let (share, larger) = (config.experts / world_size, config.experts % world_size);
            let in_larger = larger * (share + 1);
            if expert < in_larger { expert / (share + 1) } else { larger + (expert - in_larger) / share.max(1) }
        };
        let rank_of = |expert: usize| config.placement.as_ref().map_or_else(|| even(expert), |p| p[expert]);
        let mut expert: Vec<usize> = (0..config.experts).collect();
        expert.sort_by_key(|&e| (rank_of(e), e));
        let mut position = vec![0; config.experts];
        expert.iter().enumerate().for_each(|(at, &e)| position[e] = at);
        let starts = (0..=world_size).map(|r| expert.partition_point(|&e| rank_of(e) < r)).collect();
        let rank = (0..config.experts).map(|e| rank_of(e) as u32).collect();
        Placement { expert, position, rank, starts }
    }

    /// The global ids of `rank`'s experts.
    pub(super) fn local(&self, rank: usize) -> &[usize] {
        &self.expert[self.starts[rank]..self.starts[rank + 1]]
    }
}
