//! The sleep words and bells of the ranks of a node: see [`bell`](crate::sync::bell).

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::layout::{BELL, CommLayout, SLEEPERS};
use crate::fabric::Fabric;
use crate::memory::mapping::Mapping;
use crate::sync::bell::{self, Place};

/// Shared with the thread that moves the plane on.
pub(crate) struct Bells {
    /// By rank, outbox and heap; `None` for far ones.
    near: Vec<Option<(Arc<Mapping>, Arc<Mapping>)>>,
    /// The heap that has the node's list of sleepers: that of its first rank.
    list: Arc<Mapping>,
    /// Where an outbox has its owner's sleep word.
    sleep: usize,
}

impl Bells {
    pub(crate) fn new(fabric: &Fabric, ranks: usize, layout: &CommLayout) -> Self {
        let near = |rank| {
            let peer = fabric.peer(rank);
            peer.near.as_ref().map(|near| (peer.outbox.clone(), near.heap.clone()))
        };
        let near: Vec<_> = (0..ranks).map(near).collect();
        let list = near.iter().flatten().next().map_or_else(|| fabric.heap.clone(), |(_, heap)| heap.clone());
        Bells { near, list, sleep: layout.sleep }
    }

    /// The word of the list of sleepers that has `rank`.
    fn sleepers(&self, rank: usize) -> &AtomicU64 {
        self.list.word64(SLEEPERS + rank / bell::PER_WORD * 8)
    }

    /// The place of `rank` in that list.
    pub(crate) fn place(&self, rank: usize) -> Place<'_> {
        Place::new(self.sleepers(rank), rank)
    }

    /// Wakes `peer` if it sleeps for `source` or for anyone, after a [`bell::publish_fence`]; says whether it did.
    pub(crate) fn ring_if_waiting(&self, peer: usize, source: usize) -> bool {
        let Some(Some((outbox, heap))) = self.near.get(peer) else { return false };
        bell::ring_if_waiting(outbox.word32(self.sleep), heap.word32(BELL), source)
    }

    /// The ranks in the list of sleepers, in which anyone may write.
    fn asleep(&self) -> impl Iterator<Item = usize> {
        let words = (0..self.near.len()).step_by(bell::PER_WORD);
        words.flat_map(|first| bell::sleepers(self.sleepers(first)).map(move |i| first + i))
    }

    /// Wakes all ranks of the node that sleep for `source` or for anyone, after a [`bell::publish_fence`]; says how many.
    pub(crate) fn ring_waiting(&self, source: usize) -> u64 {
        self.asleep().filter(|&peer| self.ring_if_waiting(peer, source)).count() as u64
    }

    /// A far rank has changed words here: wakes who sleeps for it.
    pub(crate) fn heard_from(&self, source: usize) {
        bell::publish_fence();
        self.ring_waiting(source);
    }

    /// Wakes all ranks of the node that sleep, after a [`bell::publish_fence`].
    pub(crate) fn ring_asleep(&self) {
        let heaps = self.asleep().filter_map(|peer| self.near.get(peer)?.as_ref());
        heaps.for_each(|(_, heap)| bell::ring(heap.word32(BELL)));
    }

    /// Wakes all ranks of the node.
    pub(crate) fn ring_all(&self) {
        self.near.iter().flatten().for_each(|(_, heap)| bell::ring(heap.word32(BELL)));
    }
}
