//! Who sends tokens and who has experts.
//!
//! In an ordinary handle every rank does both. Where attention and experts are [apart](super::roles), no rank does: then a rank has
//! memory for its own part only, and maps, reads and waits for ranks of the other part only.

use std::ops::Index;

use crate::memory::mapping::Mapping;

/// What a rank does in a handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// It sends tokens and has experts.
    Both,
    /// It sends tokens.
    Source,
    /// It has experts.
    Destination,
    /// It has no part in it: another domain's attention rank.
    Neither,
}

impl Part {
    pub(super) fn sends(self) -> bool {
        matches!(self, Part::Both | Part::Source)
    }

    pub(super) fn receives(self) -> bool {
        matches!(self, Part::Both | Part::Destination)
    }
}

/// The ranks of a handle by what they do.
#[derive(Clone, Debug)]
pub(super) struct Parties {
    /// Ranks that send tokens, ascending.
    pub(super) sources: Vec<usize>,
    /// Ranks that have experts, ascending.
    pub(super) destinations: Vec<usize>,
    /// By rank.
    parts: Vec<Part>,
    /// Whether no rank does both.
    pub(super) are_apart: bool,
}

impl Parties {
    /// Every rank does both.
    pub(super) fn all(world_size: usize) -> Self {
        let ranks: Vec<usize> = (0..world_size).collect();
        Parties { sources: ranks.clone(), destinations: ranks, parts: vec![Part::Both; world_size], are_apart: false }
    }

    /// No rank does both: the two lists, ascending, have none in common.
    pub(super) fn apart(world_size: usize, sources: &[usize], destinations: &[usize]) -> Self {
        let mut parts = vec![Part::Neither; world_size];
        sources.iter().for_each(|&rank| parts[rank] = Part::Source);
        destinations.iter().for_each(|&rank| parts[rank] = Part::Destination);
        Parties { sources: sources.to_vec(), destinations: destinations.to_vec(), parts, are_apart: true }
    }

    /// The ranks of the communicator.
    pub(super) fn ranks(&self) -> usize {
        self.parts.len()
    }

    pub(super) fn part(&self, rank: usize) -> Part {
        self.parts[rank]
    }

    /// The place of a source among the sources.
    pub(super) fn index_of(&self, source: usize) -> usize {
        self.sources.partition_point(|&rank| rank < source)
    }

    /// Whether `rank` reads anything of `other`'s outbox, perhaps its own; also what other ranks with experts have there, if it sums or
    /// `forwards` that.
    pub(super) fn concerns(&self, rank: usize, other: usize, forwards: bool) -> bool {
        let (own, theirs) = (self.parts[rank], self.parts[other]);
        let both_receive = own.receives() && theirs.receives();
        (own.sends() && theirs.receives()) || (own.receives() && theirs.sends()) || (forwards && both_receive)
    }
}

/// By rank, the outboxes, or their mirrors, that concern this rank.
pub(super) struct Peers(Vec<Option<Mapping>>);

impl Peers {
    pub(super) fn new(peers: Vec<Option<Mapping>>) -> Self {
        Peers(peers)
    }

    pub(super) fn get(&self, rank: usize) -> Option<&Mapping> {
        self.0[rank].as_ref()
    }
}

impl Index<usize> for Peers {
    type Output = Mapping;

    /// # Panics
    /// When that rank does not concern this one, which is for the crate itself to know.
    fn index(&self, rank: usize) -> &Mapping {
        match &self.0[rank] {
            Some(peer) => peer,
            None => panic!("nothing of rank {rank} concerns this one"),
        }
    }
}
