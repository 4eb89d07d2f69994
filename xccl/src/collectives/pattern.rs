//! What a collective does in each of its steps: what it puts into its slot, whose slots it reads, what it makes of them.
//!
//! - Small reductions are *one-shot*: every rank publishes all of its input, and joins everybody's. One step.
//! - Large ones are *two-shot*: each rank joins one part of a chunk for all, from the slots of all, and writes the result into its
//!   next slot, where the others copy it from. In each step there are the parts of one chunk and the results of the one before:
//!   c chunks take c + 1 steps, and all ranks read and write all the time.
//! - Everything else is a copy into the own slot and a copy out of others', in pieces that stay in the caches.
//!
//! A copy by the kernel from private memory (`process_vm_readv`) would be one instead of two, and yet takes longer: 69 us for 1 MiB
//! where both copies through the caches together take 46 us of processor time.

use super::group::{Group, View};
use super::kernels::{Outputs, STREAMING_RESULT, reduce};
use super::slots::{LARGE, PIECE};
use super::types::{DataType, ReduceOp};
use crate::memory::layout::LINE;
use crate::memory::lent::LentPair;
use crate::memory::row::{Row, Target};
use crate::memory::stream::end_streaming;

/// How data moves. Ranks are given by their place in the group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Pattern {
    /// From one to all.
    Broadcast { root: usize },
    /// Each one's block to one, or to all.
    Gather { root: Option<usize> },
    /// One's blocks to each.
    Scatter { root: usize },
    /// Each one's blocks to each.
    Exchange,
    /// The same, joined.
    ReduceScatter,
    /// All of everybody's input to one, or to all, who join it.
    OneShot { root: Option<usize> },
    /// A part of everybody's input to each, who joins it and hands the result to one, or to all.
    TwoShot { root: Option<usize> },
}

/// A pattern for so many bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) pattern: Pattern,
    pub(super) dtype: DataType,
    pub(super) op: ReduceOp,
    /// Bytes of the whole, or of a block.
    block: usize,
    /// Most bytes of the whole, of a block, or of a part, that go in one step.
    piece: usize,
    pub(super) steps: u64,
    /// Where in the output this rank's own result begins.
    output_at: usize,
}

/// What is read in a step.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Sources {
    Nobody,
    One(usize),
    All,
}

impl Plan {
    pub(super) fn new(
        pattern: Pattern,
        (dtype, op): (DataType, ReduceOp),
        block: usize,
        output_at: usize,
        members: usize,
    ) -> Self {
        let most = |parts: usize| (LARGE / parts / LINE * LINE).max(LINE);
        let (piece, steps) = match pattern {
            Pattern::Broadcast { .. } | Pattern::Gather { .. } => (PIECE, block.div_ceil(PIECE)),
            Pattern::Scatter { .. } | Pattern::Exchange | Pattern::ReduceScatter => {
                (most(members), block.div_ceil(most(members)))
            }
            Pattern::OneShot { .. } => (block, 1),
            Pattern::TwoShot { .. } => {
                // Only as large as needed: short parts then lie side by side.
                let part = block.div_ceil(members).next_multiple_of(LINE).min(most(members + 1));
                (part, block.div_ceil(part.max(1) * members) + 1)
            }
        };
        Plan { pattern, dtype, op, block, piece, steps: steps.max(1) as u64, output_at }
    }

    /// The range of the whole, or of each block, that goes in step `at`.
    fn range(&self, at: u64) -> (usize, usize) {
        let start = (at as usize * self.piece).min(self.block);
        (start, self.piece.min(self.block - start))
    }

    /// From one block to the next in a slot.
    fn stride(&self, at: u64) -> usize {
        let (_, len) = self.range(at);
        if len <= 8 { 8 } else { len.next_multiple_of(LINE) }
    }

    /// Two-shot: the range of part `part` of chunk `at`.
    fn part(&self, at: u64, part: usize, members: usize) -> (usize, usize) {
        let chunk = self.piece * members;
        let start = (at as usize * chunk).min(self.block);
        let chunk = chunk.min(self.block - start);
        let each = chunk.div_ceil(members).next_multiple_of(LINE);
        let from = (part * each).min(chunk);
        (start + from, each.min(chunk - from))
    }

    /// Bytes of a step's payload.
    pub(super) fn payload(&self, at: u64, members: usize) -> usize {
        match self.pattern {
            Pattern::Broadcast { .. } | Pattern::Gather { .. } | Pattern::OneShot { .. } => self.range(at).1,
            Pattern::Scatter { .. } | Pattern::Exchange | Pattern::ReduceScatter => self.stride(at) * members,
            Pattern::TwoShot { .. } => self.piece * (members + 1),
        }
    }

    /// Whether this rank has something to say in its slot.
    pub(super) fn fills(&self, group: &Group) -> bool {
        match self.pattern {
            _ if group.len() == 1 => false,
            Pattern::Broadcast { root } | Pattern::Scatter { root } => root == group.me,
            Pattern::Gather { root } | Pattern::OneShot { root } => root != Some(group.me),
            _ => true,
        }
    }

    /// Whose slots this rank reads in step `at`.
    pub(super) fn sources(&self, at: u64, group: &Group) -> Sources {
        match self.pattern {
            _ if group.len() == 1 => Sources::Nobody,
            Pattern::Broadcast { root } | Pattern::Scatter { root } if root != group.me => Sources::One(root),
            Pattern::Broadcast { .. } | Pattern::Scatter { .. } => Sources::Nobody,
            Pattern::Gather { root: Some(root) } | Pattern::OneShot { root: Some(root) } if root != group.me => {
                Sources::Nobody
            }
            Pattern::TwoShot { root: Some(root) } if root != group.me && at + 1 == self.steps => Sources::Nobody,
            _ => Sources::All,
        }
    }

    /// Fills the own slot for step `at`, whose number is `step`.
    pub(super) fn fill(&self, view: View<'_>, buffers: &LentPair, at: u64, step: u64) {
        let (group, me) = (view.group, view.group.me);
        let (start, len) = self.range(at);
        let slot = (step, self.payload(at, group.len()));
        let publish = |at: usize, from: Row<'_, u8>| {
            view.slots().fill(view.own(), slot, at, from.len()).copy_from(from);
        };
        let fills = self.fills(group);
        match self.pattern {
            Pattern::Broadcast { root } => {
                if fills {
                    publish(0, buffers.input(start, len));
                }
                if root == me && !buffers.is_same() {
                    self.give(buffers, start, buffers.input(start, len));
                }
            }
            Pattern::OneShot { .. } if fills => publish(0, buffers.input(start, len)),
            Pattern::OneShot { .. } => {}
            Pattern::Gather { root } => {
                let from = buffers.input(start, len);
                if fills {
                    publish(0, from);
                }
                if root.is_none_or(|root| root == me) {
                    self.give(buffers, group.rank(me) * self.block + start, from);
                }
            }
            Pattern::Scatter { .. } | Pattern::Exchange | Pattern::ReduceScatter => {
                if fills {
                    let stride = self.stride(at);
                    for member in (0..).map_while(|k| group.other(k)) {
                        publish(member * stride, buffers.input(group.rank(member) * self.block + start, len));
                    }
                }
                let own = || buffers.input(group.rank(me) * self.block + start, len);
                match self.pattern {
                    Pattern::Scatter { root } if root == me => self.give(buffers, self.output_at + start, own()),
                    Pattern::Exchange => self.give(buffers, group.rank(me) * self.block + start, own()),
                    _ => {}
                }
            }
            Pattern::TwoShot { .. } => {
                if !fills {
                    return;
                }
                for member in (0..).map_while(|k| group.other(k)) {
                    let (start, len) = self.part(at, member, group.len());
                    publish(member * self.piece, buffers.input(start, len));
                }
            }
        }
    }

    /// Takes what it wants from the slot of one rank, which has been published.
    pub(super) fn take(&self, view: View<'_>, buffers: &LentPair, member: usize, at: u64, step: u64) {
        let (group, me) = (view.group, view.group.me);
        let (start, len) = self.range(at);
        let slot = (step, self.payload(at, group.len()));
        let read = |at, len| view.slots().read(view.outbox(member), slot, at, len);
        match self.pattern {
            Pattern::Broadcast { .. } => self.give(buffers, start, read(0, len)),
            Pattern::Gather { .. } => self.give(buffers, group.rank(member) * self.block + start, read(0, len)),
            Pattern::Scatter { .. } => self.give(buffers, self.output_at + start, read(me * self.stride(at), len)),
            Pattern::Exchange => {
                self.give(buffers, group.rank(member) * self.block + start, read(me * self.stride(at), len));
            }
            Pattern::TwoShot { root } if at > 0 && root.is_none_or(|root| root == me) => {
                let (start, len) = self.part(at - 1, member, group.len());
                self.give(buffers, start, read(group.len() * self.piece, len));
            }
            Pattern::ReduceScatter | Pattern::OneShot { .. } | Pattern::TwoShot { .. } => {}
        }
    }

    /// Copies into the output.
    fn give(&self, buffers: &LentPair, at: usize, from: Row<'_, u8>) {
        let to = buffers.output(at, from.len());
        if self.streams(buffers) { to.stream_from(from) } else { to.copy_from(from) }
    }

    fn streams(&self, buffers: &LentPair) -> bool {
        buffers.output_len() >= STREAMING_RESULT
    }

    /// Joins what all have published in step `at`, if this rank has to.
    pub(super) fn join(&self, view: View<'_>, buffers: &LentPair, at: u64, step: u64) {
        let (group, me) = (view.group, view.group.me);
        let members = group.len();
        let slot = (step, self.payload(at, members));
        match self.pattern {
            Pattern::ReduceScatter => {
                let (start, len) = self.range(at);
                let own = buffers.input(group.rank(me) * self.block + start, len);
                let output = buffers.output(self.output_at + start, len);
                self.join_into(view, buffers, own, (slot, me * self.stride(at)), [Some(output), None]);
            }
            Pattern::OneShot { root } if root.is_none_or(|root| root == me) => {
                let (start, len) = self.range(at);
                let output = buffers.output(start, len);
                self.join_into(view, buffers, buffers.input(start, len), (slot, 0), [Some(output), None]);
            }
            Pattern::TwoShot { root } if at + 1 < self.steps => {
                let (start, len) = self.part(at, me, members);
                let output = root.is_none_or(|root| root == me).then(|| buffers.output(start, len));
                // All have published this step, which is more than the next one needs.
                let next = (step + 1, self.payload(at + 1, members));
                let for_others = (members > 1).then(|| view.slots().fill(view.own(), next, members * self.piece, len));
                let own = buffers.input(start, len);
                self.join_into(view, buffers, own, (slot, me * self.piece), [output, for_others]);
            }
            _ => {}
        }
        if self.streams(buffers) {
            end_streaming();
        }
    }

    fn join_into(
        &self,
        view: View<'_>,
        buffers: &LentPair,
        own: Row<'_, u8>,
        (slot, at): ((u64, usize), usize),
        to: [Option<Target<'_>>; 2],
    ) {
        let (me, len) = (view.group.me, own.len());
        let input = |member: usize| match member == me {
            true => own,
            false => view.slots().read(view.outbox(member), slot, at, len),
        };
        let outputs = Outputs { to, streaming: self.streams(buffers) };
        reduce((self.op, self.dtype), (view.group.len(), len), &input, outputs);
    }
}
