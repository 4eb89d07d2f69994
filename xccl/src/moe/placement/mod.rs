//! Which rank holds which expert, in which slot; with replicas of those that get most tokens.
//!
//! A *logical* expert is what a router names. It lives in one *slot* or several, its replicas, mostly on different ranks.
//! A [`Placement`] lists every rank's slots, and is the same on all ranks.
//!
//! # Which replica a token takes
//! Nobody is asked: every rank works it out for its own tokens, and anybody can for any rank ([`Placement::choose`]). The
//! candidates are the expert's replicas on the source's own node, or all of them where that has none, by rank and slot. The n-th
//! token of the source's batch that names the expert (n from 0) takes candidate `(n + source) mod candidates`. So the candidates get
//! the same number of tokens from each source, give or take one, whatever the routing; that sources begin at different ones
//! spreads the odd tokens.
//!
//! Every token of a batch names every shared expert ([`MoeConfig::shared`](crate::MoeConfig::shared)), so those rotate by the
//! token's position.
//!
//! # Balancing
//! [`Moe::take_expert_counts`](crate::Moe::take_expert_counts) has this rank's tokens per expert; summed over the ranks they are
//! what [`balance()`] makes a placement of, which [`Moe::install`](crate::Moe::install) takes from the next exchange on:
//!
//! ```
//! use xccl::placement::{self, Placement};
//! use xccl::{Communicator, CountForm, DType, Moe, MoeConfig, ReduceOp, Routing};
//! # use xccl::{Config, UniqueId};
//! # fn main() -> xccl::Result<()> {
//! # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
//! let (experts, ranks) = (8, comm.world_size());
//! let config = MoeConfig { slots: Some(experts / ranks), ..MoeConfig::new(4, 16, 2, experts, DType::F32) };
//! let moe = Moe::new(&comm, config)?;
//! # let (sent, batch) = moe.dispatch(&[1.0f32; 16], &Routing::new(&[1i32, 5], &[0.5, 0.5]))?;
//! # moe.combine(sent, batch, &mut [0.0f32; 16])?;
//! // After some exchanges:
//! let mut counts = vec![0i64; experts];
//! moe.take_expert_counts(CountForm::Each, &mut counts)?;
//! comm.all_reduce_in_place(&mut counts, ReduceOp::Sum)?;
//! let nodes: Vec<usize> = (0..ranks).map(|rank| comm.node_of(rank)).collect::<xccl::Result<_>>()?;
//! let next = placement::balance(&counts, &nodes, 0, Some(&moe.placement()))?;
//! // ... load the weights of the experts that are new in this rank's slots, then on every rank between the same exchanges:
//! moe.install(&next)?;
//! # Ok(())
//! # }
//! ```

mod balance;
pub(super) mod placed;

use std::fmt;

pub use balance::balance;

use crate::error::{Error, Result};

/// Which logical expert is in each slot of each rank. Equal on all ranks.
///
/// ```
/// use xccl::placement::Placement;
/// # fn main() -> xccl::Result<()> {
/// // Three ranks, four experts, two of them with a replica.
/// let placement = Placement::new(4, vec![vec![0, 1], vec![0, 2], vec![3, 1]])?;
/// assert_eq!(placement.replicas(0).collect::<Vec<_>>(), [(0, 0), (1, 0)]); // rank, slot
/// let nodes = [0, 0, 1]; // ranks 0 and 1 are on one node
/// assert_eq!(placement.choose(1, 2, 7, &nodes), Some((2, 1))); // the only one on its own node
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Placement {
    experts: usize,
    slots: Vec<Vec<usize>>,
}

impl Placement {
    /// Rank r has the expert `slots[r][s]` in its slot s. Ranks may have different numbers of slots, also none. An expert may be
    /// in several slots of one rank, which then takes so many shares of its tokens: that is how a load is divided unevenly, as
    /// placements of EPLB do it.
    ///
    /// # Errors
    /// [`Error::Config`] names expert and rank: an expert that is none of `0..experts`, or that is nowhere.
    pub fn new(experts: usize, slots: Vec<Vec<usize>>) -> Result<Self> {
        let mut is_placed = vec![false; experts];
        for (rank, slots) in slots.iter().enumerate() {
            for &expert in slots {
                match is_placed.get_mut(expert) {
                    Some(is_placed) => *is_placed = true,
                    None => {
                        let expected = format!("experts 0 to {}", experts.saturating_sub(1));
                        return Self::wrong(format!("expert {expert} on rank {rank}"), expected);
                    }
                }
            }
        }
        if let Some(expert) = is_placed.iter().position(|is_placed| !is_placed) {
            let expected = format!("each of the {experts} experts in a slot of one of the {} ranks", slots.len());
            return Self::wrong(format!("expert {expert} in no slot"), expected);
        }
        Ok(Placement { experts, slots })
    }

    fn wrong<T>(value: String, expected: String) -> Result<T> {
        Err(Error::Config { option: "Placement", value, expected })
    }

    /// One replica of each expert, in contiguous blocks by ascending rank, the first ranks holding one more where they do not
    /// divide.
    ///
    /// # Errors
    /// [`Error::Config`] without ranks.
    pub fn even(experts: usize, ranks: usize) -> Result<Self> {
        let (share, larger) = (experts.checked_div(ranks).unwrap_or(0), experts.checked_rem(ranks).unwrap_or(0));
        let first = |rank: usize| rank * share + rank.min(larger);
        Placement::new(experts, (0..ranks).map(|rank| (first(rank)..first(rank + 1)).collect()).collect())
    }

    /// One replica of each expert: expert e on rank `ranks_of[e]`, a rank's experts in ascending order.
    ///
    /// # Errors
    /// [`Error::Config`] for a rank that is none of `0..ranks`.
    pub fn of_ranks(ranks_of: &[usize], ranks: usize) -> Result<Self> {
        let mut slots = vec![vec![]; ranks];
        for (expert, &rank) in ranks_of.iter().enumerate() {
            match slots.get_mut(rank) {
                Some(slots) => slots.push(expert),
                None => {
                    let expected = format!("ranks 0 to {}", ranks.saturating_sub(1));
                    return Self::wrong(format!("expert {expert} on rank {rank}"), expected);
                }
            }
        }
        Placement::new(ranks_of.len(), slots)
    }

    /// Adds shared experts, which every token goes to: the s-th is logical expert `experts() + s`, with a replica in a further
    /// slot of each rank of `ranks_of[s]`: ranks of their own, which have no other slots, or beside others.
    ///
    /// ```
    /// use xccl::placement::Placement;
    /// # fn main() -> xccl::Result<()> {
    /// let routed = Placement::new(4, vec![vec![], vec![0, 1], vec![2, 3]])?;
    /// let placement = routed.with_shared(&[vec![0]])?; // rank 0 has the shared expert alone
    /// assert_eq!(placement.slots(0), [4]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_shared(self, ranks_of: &[Vec<usize>]) -> Result<Self> {
        let (routed, mut slots) = (self.experts, self.slots);
        for (shared, ranks) in ranks_of.iter().enumerate() {
            for &rank in ranks {
                let there = slots.len();
                let Some(slots) = slots.get_mut(rank) else {
                    let expected = format!("ranks 0 to {}", there.saturating_sub(1));
                    return Self::wrong(format!("shared expert {shared} on rank {rank}"), expected);
                };
                slots.push(routed + shared);
            }
        }
        Placement::new(routed + ranks_of.len(), slots)
    }

    /// The number of logical experts, shared ones included.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.slots.len()
    }

    /// The logical experts in a rank's slots.
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn slots(&self, rank: usize) -> &[usize] {
        &self.slots[rank]
    }

    /// The slots of the rank that has most.
    pub fn most_slots(&self) -> usize {
        self.slots.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// The slots of all ranks together.
    pub fn all_slots(&self) -> usize {
        self.slots.iter().map(Vec::len).sum()
    }

    /// Where a logical expert is: rank and slot, ascending.
    pub fn replicas(&self, expert: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.slots.iter().enumerate().flat_map(move |(rank, slots)| {
            let there = slots.iter().enumerate().filter(move |(_, e)| **e == expert);
            there.map(move |(slot, _)| (rank, slot))
        })
    }

    /// The rank and slot of the replica that takes the `nth` token (from 0) naming `expert` in a batch of rank `source`:
    /// see [the rule](self). `nodes` has the node of each rank. `None` where there is no such expert.
    pub fn choose(&self, expert: usize, source: usize, nth: usize, nodes: &[usize]) -> Option<(usize, usize)> {
        let candidates = self.candidates(expert, source, nodes);
        let n = candidates.len();
        (n > 0).then(|| candidates[(nth % n + source) % n])
    }

    /// The replicas that a source's tokens take.
    fn candidates(&self, expert: usize, source: usize, nodes: &[usize]) -> Vec<(usize, usize)> {
        let here = nodes.get(source);
        let near: Vec<_> = self.replicas(expert).filter(|&(rank, _)| nodes.get(rank) == here).collect();
        if near.is_empty() { self.replicas(expert).collect() } else { near }
    }
}

/// The ranks' slots: this is what ranks compare.
impl fmt::Debug for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_placement_is_named() {
        for (slots, named) in [
            (vec![vec![0, 1], vec![2, 4]], "expert 4 on rank 1"),
            (vec![vec![0, 1], vec![2, 0]], "expert 3 in no slot"),
            (vec![], "expert 0 in no slot"),
        ] {
            let error = Placement::new(4, slots).unwrap_err().to_string();
            assert!(error.contains(named), "{named} is not in {error}");
        }
        assert!(Placement::of_ranks(&[0, 3], 2).unwrap_err().to_string().contains("expert 1 on rank 3"));
        let even = Placement::even(3, 2).unwrap();
        assert!(even.clone().with_shared(&[vec![1, 2]]).unwrap_err().to_string().contains("shared expert 0 on rank 2"));
        assert!(even.clone().with_shared(&[vec![]]).unwrap_err().to_string().contains("expert 3 in no slot"));
        assert!(Placement::even(3, 0).is_err());
        assert!(Placement::new(2, vec![vec![1], vec![], vec![0, 1]]).is_ok());
        let uneven = Placement::new(1, vec![vec![0, 0], vec![0]]).unwrap();
        let taken: Vec<_> = (0..6).filter_map(|nth| uneven.choose(0, 1, nth, &[0, 0])).collect();
        assert_eq!(taken, [(0, 1), (1, 0), (0, 0), (0, 1), (1, 0), (0, 0)]);
    }

    #[test]
    fn an_even_split_gives_the_first_ranks_one_more() {
        assert_eq!(Placement::even(8, 3).unwrap().slots, [vec![0, 1, 2], vec![3, 4, 5], vec![6, 7]]);
        assert_eq!(Placement::even(2, 3).unwrap().slots, [vec![0], vec![1], vec![]]);
        assert_eq!(Placement::of_ranks(&[1, 0, 1], 2).unwrap().slots, [vec![1], vec![0, 2]]);
    }
}
