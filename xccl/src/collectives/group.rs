//! The ranks that take part in the steps of a collective: those whose memory this rank reads.

use super::slots::Slots;
use crate::comm::inner::CommInner;
use crate::memory::mapping::Mapping;

/// The ranks of this node, ascending.
pub(super) struct Group {
    members: Vec<usize>,
    /// This rank's place among them.
    pub(super) me: usize,
}

impl Group {
    /// Those that are on the node of `rank`, as `nodes` says for each rank.
    pub(super) fn of(rank: usize, nodes: &[usize]) -> Self {
        let members: Vec<usize> = (0..nodes.len()).filter(|&other| nodes[other] == nodes[rank]).collect();
        let me = members.iter().position(|&member| member == rank).unwrap_or(0);
        Group { members, me }
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// The rank of a member.
    pub(super) fn rank(&self, member: usize) -> usize {
        self.members[member]
    }

    /// The place of a rank that is a member.
    pub(super) fn place(&self, rank: usize) -> usize {
        self.members.binary_search(&rank).unwrap_or(self.me)
    }

    /// The others, each once, beginning after this rank: so not all read from the same at the same time.
    pub(super) fn other(&self, k: usize) -> Option<usize> {
        (k + 1 < self.len()).then(|| (self.me + 1 + k) % self.len())
    }
}

/// Where a step's slots are.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) comm: &'a CommInner,
    pub(super) group: &'a Group,
}

impl<'a> View<'a> {
    pub(super) fn slots(&self) -> &'a Slots {
        &self.comm.layout.collectives
    }

    pub(super) fn own(&self) -> &'a Mapping {
        &self.comm.fabric.outbox
    }

    pub(super) fn outbox(&self, member: usize) -> &'a Mapping {
        &self.comm.fabric.peer(self.group.rank(member)).outbox
    }
}
