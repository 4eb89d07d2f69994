//! What all ranks know: the model, the prompts, and who does what.

use std::fmt;
use std::ops::Range;

use xccl::KvConfig;

use crate::model::Shape;

/// What all ranks know.
pub struct Job {
    pub shape: Shape,
    /// Request `id` is the prompt of that number.
    pub prompts: Vec<Vec<u8>>,
    /// Tokens of an answer.
    pub new: usize,
    /// Requests of a micro-batch, at most.
    pub seats: usize,
    pub domains: usize,
    /// Attention ranks of each domain.
    pub attention: usize,
    pub experts: usize,
    pub prefill: usize,
}

/// The number of a request that no prefill rank answers: as long as it is in flight, either side is told of the other's death.
pub const OPEN_LINE: u64 = u64::MAX;

/// What a rank does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Attention { domain: usize },
    Expert { number: usize },
    Prefill { number: usize },
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Attention { domain } => write!(f, "an attention rank of domain {domain}"),
            Role::Expert { number } => write!(f, "expert rank {number}"),
            Role::Prefill { number } => write!(f, "prefill rank {number}"),
        }
    }
}

/// Attention ranks come first, domain after domain, then expert ranks, then prefill ranks: so an attention rank has the same number
/// in each communicator that it is in, and so has an expert rank.
impl Job {
    pub fn ranks(&self) -> usize {
        self.attention_ranks() + self.experts + self.prefill
    }

    pub fn attention_ranks(&self) -> usize {
        self.domains * self.attention
    }

    pub fn role_of(&self, rank: usize) -> Role {
        let others = self.attention_ranks();
        match rank.checked_sub(others) {
            None => Role::Attention { domain: rank / self.attention },
            Some(number) if number < self.experts => Role::Expert { number },
            Some(number) => Role::Prefill { number: number - self.experts },
        }
    }

    /// The attention ranks of a domain.
    pub fn domain(&self, domain: usize) -> Range<usize> {
        domain * self.attention..(domain + 1) * self.attention
    }

    pub fn expert_ranks(&self) -> Range<usize> {
        self.attention_ranks()..self.attention_ranks() + self.experts
    }

    /// The rank of each routed expert: a block of each layer's.
    pub fn placement(&self) -> Vec<usize> {
        let rank_of = |expert| {
            let (_, place) = self.shape.place_of(expert);
            self.attention_ranks() + place * self.experts / self.shape.routed
        };
        (0..self.shape.experts()).map(rank_of).collect()
    }

    /// The prefill ranks, in the communicator of attention and prefill ranks: there they follow the attention ranks.
    pub fn prefill_ranks(&self) -> Range<usize> {
        self.attention_ranks()..self.attention_ranks() + self.prefill
    }

    /// The one of them that a request is for.
    pub fn prefill_of(&self, id: u64) -> usize {
        self.attention_ranks() + id as usize % self.prefill
    }

    /// The attention rank that answers a request.
    pub fn attention_of(&self, id: u64) -> usize {
        id as usize / self.prefill % self.attention_ranks()
    }

    /// The requests that `serves` holds for.
    pub fn requests(&self, serves: impl Fn(u64) -> bool) -> Vec<u64> {
        (0..self.prompts.len() as u64).filter(|&id| serves(id)).collect()
    }

    /// Pages of the longest request.
    pub fn longest(&self) -> usize {
        let tokens = self.prompts.iter().map(|prompt| prompt.len() + self.new).max().unwrap_or(0);
        self.shape.pages().pages_of(tokens).max(1)
    }

    /// Pages of an attention rank: for what sits in its micro-batches, and for two requests whose cache is on its way.
    pub fn pages(&self) -> usize {
        (2 * self.seats + 2) * self.longest()
    }

    /// The cache as it is moved; from a prefill to an attention rank three requests at a time, beside the open line.
    pub fn kv_config(&self) -> KvConfig {
        let sizes = self.shape.pages();
        KvConfig::new(sizes.layers, sizes.page_bytes()).max_pages(self.longest()).max_requests(4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::TINY;

    #[test]
    fn every_rank_has_a_role_every_expert_and_every_request_a_rank() {
        let prompts = vec![b"a prompt".to_vec(); 40];
        let job = Job { shape: TINY, prompts, new: 4, seats: 2, domains: 2, attention: 3, experts: 2, prefill: 2 };
        let roles: Vec<Role> = (0..job.ranks()).map(|rank| job.role_of(rank)).collect();
        assert_eq!(roles.len(), 10);
        assert_eq!((roles[2], roles[3]), (Role::Attention { domain: 0 }, Role::Attention { domain: 1 }));
        assert_eq!((roles[7], roles[8]), (Role::Expert { number: 1 }, Role::Prefill { number: 0 }));
        assert_eq!((job.domain(1), job.expert_ranks()), (3..6, 6..8));
        // Five experts of each of three layers.
        assert_eq!(job.placement(), [6, 6, 6, 7, 7].repeat(3));
        let served = |serves: &dyn Fn(u64) -> bool| job.requests(serves).len();
        assert!((0..6).all(|rank| served(&|id| job.attention_of(id) == rank) >= 6));
        assert!(job.prefill_ranks().all(|rank| served(&|id| job.prefill_of(id) == rank) == 20));
    }
}
