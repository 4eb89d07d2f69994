//! Collectives of ranks on several nodes, which cannot all read each other's slots: over messages, with a tag of the library's own.
//!
//! In up to three rounds each rank sends its blocks, or parts, to those that need them, and joins what it has got in ascending order
//! of rank: every result has the same bits as on one node, whoever is where.
//!
//! What all ranks need as it is crosses once per node: the blocks of an all-gather, and the joined parts of an all-reduce. It goes to
//! the ranks of the sender's node and to one rank of each other node, that with the same index among its node's, which passes it on.
//! A broadcast goes to the first rank of each node. What is to be joined crosses as often as there are ranks that join it: a
//! sum over the ranks of a node, formed before it crosses, would be another one in its last bits.
//!
//! Before its first message to a rank, each says which call it makes. A receiver that makes another one says so to the ranks of
//! its node and in its answer; the others meet their deadline.

use std::ops::Range;

use super::failure::{Failure, Halt};
use super::kernels::{Outputs, reduce};
use super::types::{Call, ReduceOp};
use super::varied::Parts;
use crate::comm::inner::CommInner;
use crate::error::Error;
use crate::memory::layout::LINE;
use crate::memory::lent::LentPair;
use crate::memory::row::{Row, Target};
use crate::p2p::Source;
use crate::p2p::engine::{INTERNAL_TAG, Ticket};
use crate::sync::progress::Operation;

/// Where bytes are.
#[derive(Clone, Debug)]
enum Place {
    Input(Range<usize>),
    Output(Range<usize>),
    Scratch(Range<usize>),
}

/// What a rank says before its first message to another one: number, digest, the call's words.
const HEAD_BYTES: usize = 32;

/// What is under way of one collective. Kept from one to the next: its memory is used again.
#[derive(Default)]
pub(super) struct Between {
    /// The other ranks of this node.
    near: Vec<usize>,
    /// Of each other node, the rank that passes on what this one sends there.
    across: Vec<usize>,
    /// By rank, who of this node gets what it sends here first: a near rank itself.
    by_way_of: Vec<usize>,
    /// Results of others that have to be joined, or that may not go where they belong yet.
    scratch: Vec<u8>,
    head: [u8; HEAD_BYTES],
    /// From each rank.
    heads: Vec<[u8; HEAD_BYTES]>,
    /// With whom, and how long what comes has to be.
    pending: Vec<(usize, Ticket, Option<usize>)>,
    sends: Vec<(usize, Place)>,
    receives: Vec<(usize, Place)>,
    state: State,
    /// Messages of this collective that are over.
    over: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum State {
    /// Nothing is under way.
    #[default]
    Idle,
    /// The heads of this round are.
    Heads(usize),
    /// The data of this round is.
    Data(usize),
}

/// What a collective is, for this file.
pub(super) struct Task<'a> {
    pub(super) call: &'a Call,
    pub(super) number: u64,
    pub(super) digest: u64,
    pub(super) buffers: &'a LentPair,
    pub(super) parts: Option<&'a Parts>,
    pub(super) output_at: usize,
}

impl Task<'_> {
    fn block(&self) -> usize {
        self.call.count * self.call.dtype.size()
    }

    fn is_all_reduce(&self) -> bool {
        matches!(self.call.operation, Operation::AllReduce | Operation::Reduce)
    }

    /// The part of a reduction that `rank` joins.
    fn part(&self, rank: usize, ranks: usize) -> Range<usize> {
        let each = self.block().div_ceil(ranks).next_multiple_of(LINE);
        (rank * each).min(self.block())..((rank + 1) * each).min(self.block())
    }
}

/// The rounds of a collective; most have less to do.
const ROUNDS: usize = 3;

impl Between {
    /// For `rank`; `nodes` has the node of each.
    pub(super) fn new(rank: usize, nodes: &[usize]) -> Self {
        let members = |node: usize| (0..nodes.len()).filter(move |&r| nodes[r] == node);
        let stand_in = |of: usize, node: usize| {
            let index = members(nodes[of]).take_while(|&r| r != of).count();
            members(node).nth(index % members(node).count())
        };
        let first_of_others =
            (0..nodes.len()).filter(|&r| nodes[r] != nodes[rank] && members(nodes[r]).next() == Some(r));
        Between {
            near: members(nodes[rank]).filter(|&r| r != rank).collect(),
            across: first_of_others.filter_map(|r| stand_in(rank, nodes[r])).collect(),
            by_way_of: (0..nodes.len())
                .map(|r| if nodes[r] == nodes[rank] { r } else { stand_in(r, nodes[rank]).unwrap_or(rank) })
                .collect(),
            ..Between::default()
        }
    }

    /// Sends `own` to where all ranks get it from, and receives what `to` has of others in the first half of that.
    fn spread(&mut self, me: usize, own: &Place, to: impl Fn(usize) -> Place) {
        let Between { near, across, by_way_of, sends, receives, .. } = self;
        sends.extend(near.iter().chain(&*across).map(|&rank| (rank, own.clone())));
        let comes = |&rank: &usize| rank != me && (by_way_of[rank] == me || by_way_of[rank] == rank);
        receives.extend((0..by_way_of.len()).filter(comes).map(|rank| (rank, to(rank))));
    }

    /// The second half: passes on what this rank has got for its node. Messages to one rank stand together.
    fn pass_on(&mut self, me: usize, of: impl Fn(usize) -> Place) {
        let Between { near, by_way_of, sends, receives, .. } = self;
        let by_way_of = &*by_way_of;
        let far = |by: usize| (0..by_way_of.len()).filter(move |&rank| rank != by && by_way_of[rank] == by);
        for &peer in &*near {
            sends.extend(far(me).map(|rank| (peer, of(rank))));
            receives.extend(far(peer).map(|rank| (peer, of(rank))));
        }
    }

    /// Goes on until it is over, or says whom it waits for, and how many messages are over.
    pub(super) fn advance(
        &mut self,
        comm: &CommInner,
        task: &Task<'_>,
    ) -> std::result::Result<Option<(usize, u64)>, Halt> {
        if self.state == State::Idle {
            self.over = 0;
            self.begin(comm, task, 0);
        }
        loop {
            while let Some(&(peer, ticket, expected)) = self.pending.last() {
                let counts = |sent: usize, expected: usize| Failure::Counts {
                    number: task.number,
                    sends: (peer, sent as u64),
                    expects: (comm.rank, expected as u64),
                };
                match (comm.p2p.test(comm, ticket), expected) {
                    (Ok(None), _) => return Ok(Some((peer, self.over))),
                    (Ok(Some(status)), Some(expected)) if status.len != expected => {
                        return Err(counts(status.len, expected).into());
                    }
                    (Ok(Some(_)), _) => {
                        self.pending.pop();
                        self.over += 1;
                    }
                    (Err(Error::Truncated { len, capacity, .. }), _) => return Err(counts(len, capacity).into()),
                    (Err(err), _) => return Err(Halt::Error(err)),
                }
            }
            match self.state {
                State::Heads(round) => {
                    self.check_heads(comm, task)?;
                    self.exchange(comm, task);
                    self.state = State::Data(round);
                }
                State::Data(round) if round + 1 < ROUNDS => {
                    if round == 0 {
                        self.finish_first(comm, task);
                    }
                    self.begin(comm, task, round + 1);
                }
                State::Data(_) | State::Idle => {
                    self.state = State::Idle;
                    return Ok(None);
                }
            }
        }
    }

    /// Gives everything up: the buffers are free.
    pub(super) fn cancel(&mut self, comm: &CommInner) {
        self.pending.drain(..).for_each(|(_, ticket, _)| comm.p2p.cancel(comm, ticket));
        self.state = State::Idle;
    }

    /// Says to everybody that it sends to in this round which call this is.
    fn begin(&mut self, comm: &CommInner, task: &Task<'_>, round: usize) {
        self.plan(comm, task, round);
        let [what, count] = task.call.words();
        for (word, to) in [task.number, task.digest, what, count].into_iter().zip(self.head.chunks_exact_mut(8)) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        self.heads.resize(comm.world_size, [0; HEAD_BYTES]);
        for (from, _) in self.receives.chunk_by(|a, b| a.0 == b.0).filter_map(|of_one| of_one.first()) {
            // SAFETY: the heads stay where they are, and are not looked at, until the request is over or cancelled.
            let ticket = unsafe { comm.p2p.start_recv(Source::Rank(*from), INTERNAL_TAG, &mut self.heads[*from]) };
            self.pending.push((*from, ticket, Some(HEAD_BYTES)));
        }
        for (to, _) in self.sends.chunk_by(|a, b| a.0 == b.0).filter_map(|to_one| to_one.first()) {
            // SAFETY: the head stays as it is until the request is over or cancelled.
            let ticket = unsafe { comm.p2p.start_send(comm, *to, INTERNAL_TAG, &self.head) };
            self.pending.push((*to, ticket, None));
        }
        self.state = State::Heads(round);
    }

    fn check_heads(&self, comm: &CommInner, task: &Task<'_>) -> std::result::Result<(), Failure> {
        for (from, _) in &self.receives {
            let head = &self.heads[*from];
            let [number, digest, what, count] = std::array::from_fn(|i| {
                let (words, _) = head.as_chunks::<8>();
                u64::from_ne_bytes(words[i])
            });
            if (number, digest) != (task.number, task.digest) {
                let calls = [(*from, [what, count]), (comm.rank, task.call.words())];
                return Err(Failure::Mismatch { number: task.number, calls });
            }
        }
        Ok(())
    }

    /// Starts the messages of this round.
    fn exchange(&mut self, comm: &CommInner, task: &Task<'_>) {
        for (from, place) in &self.receives {
            let target = target(&mut self.scratch, task.buffers, place);
            // SAFETY: scratch and buffers stay where they are, and this part is used by nobody else, until the request is over or
            // cancelled, which the owner of `buffers` has promised for as long as they are lent.
            let ticket = unsafe {
                let buffer = std::slice::from_raw_parts_mut(target.as_mut_ptr(), target.len());
                comm.p2p.start_recv(Source::Rank(*from), INTERNAL_TAG, buffer)
            };
            self.pending.push((*from, ticket, Some(target.len())));
        }
        for (to, place) in &self.sends {
            let row = source(&self.scratch, task.buffers, place);
            // SAFETY: as above, and unchanged: a round writes nowhere where it reads.
            let ticket = unsafe { comm.p2p.start_send(comm, *to, INTERNAL_TAG, row.as_slice()) };
            self.pending.push((*to, ticket, None));
        }
    }

    /// What goes where in a round.
    fn plan(&mut self, comm: &CommInner, task: &Task<'_>, round: usize) {
        let (me, ranks, block) = (comm.rank, comm.world_size, task.block());
        let root = task.call.root;
        let others = || (1..ranks).map(move |k| (me + k) % ranks);
        let whole = 0..block;
        let of = |rank: usize| rank * block..(rank + 1) * block;
        self.sends.clear();
        self.receives.clear();
        let in_place = task.buffers.is_same();
        match (task.call.operation, root, round) {
            (Operation::Broadcast, Some(root), round) => {
                // To the first rank of each node, but on its own node to all.
                let leader = |node: usize| comm.nodes.iter().position(|&n| n == node).unwrap_or(0);
                let sender = match comm.nodes[me] == comm.nodes[root] || leader(comm.nodes[me]) == me {
                    true => root,
                    false => leader(comm.nodes[me]),
                };
                let is_sender = |rank: usize| {
                    let near = comm.nodes[rank] == comm.nodes[root];
                    let from = if near || leader(comm.nodes[rank]) == rank { root } else { leader(comm.nodes[rank]) };
                    rank != root && from == me
                };
                // Leaders pass it on once they have it.
                let turn = if me == root { 0 } else { 1 };
                if round == turn {
                    let place = if me == root { Place::Input(whole.clone()) } else { Place::Output(whole.clone()) };
                    self.sends.extend(others().filter(|&rank| is_sender(rank)).map(|rank| (rank, place.clone())));
                }
                let comes_in = usize::from(sender != root);
                if me != root && round == comes_in {
                    self.receives.push((sender, Place::Output(whole)));
                }
            }
            (Operation::AllGather, _, 0) => self.spread(me, &Place::Input(whole), |rank| Place::Output(of(rank))),
            (Operation::AllGather, _, 1) => self.pass_on(me, |rank| Place::Output(of(rank))),
            (Operation::Gather, Some(root), 0) if root == me => {
                self.receives.extend(others().map(|rank| (rank, Place::Output(of(rank)))));
            }
            (Operation::Gather, Some(root), 0) => self.sends.push((root, Place::Input(whole))),
            (Operation::Scatter, Some(root), 0) if root == me => {
                self.sends.extend(others().map(|rank| (rank, Place::Input(of(rank)))));
            }
            (Operation::Scatter, Some(root), 0) => self.receives.push((root, Place::Output(whole))),
            (Operation::ReduceScatter, _, 0) => {
                self.sends.extend(others().map(|rank| (rank, Place::Input(of(rank)))));
                self.receives.extend(others().map(|rank| (rank, Place::Scratch(of(rank)))));
                self.make_room(ranks * block);
            }
            (Operation::AllToAll, _, 0) => {
                let place = |rank| if in_place { Place::Scratch(of(rank)) } else { Place::Output(of(rank)) };
                self.sends.extend(others().map(|rank| (rank, Place::Input(of(rank)))));
                self.receives.extend(others().map(|rank| (rank, place(rank))));
                self.make_room(if in_place { ranks * block } else { 0 });
            }
            (Operation::AllToAllV, _, 0) => {
                let Some(Parts { sends, recvs }) = task.parts else { return };
                let all = recvs.iter().map(|part| part.end).max().unwrap_or(0);
                let place =
                    |r: &Range<usize>| if in_place { Place::Scratch(r.clone()) } else { Place::Output(r.clone()) };
                self.sends.extend(others().map(|rank| (rank, Place::Input(sends[rank].clone()))));
                self.receives.extend(others().map(|rank| (rank, place(&recvs[rank]))));
                self.make_room(if in_place { all } else { 0 });
            }
            (Operation::AllReduce | Operation::Reduce, _, 0) => {
                let part = task.part(me, ranks).len();
                let to = |rank: usize| rank * part..(rank + 1) * part;
                self.sends.extend(others().map(|rank| (rank, Place::Input(task.part(rank, ranks)))));
                self.receives.extend(others().map(|rank| (rank, Place::Scratch(to(rank)))));
                // The last place is for the result.
                self.make_room((ranks + 1) * part);
            }
            (Operation::AllReduce | Operation::Reduce, root, 1) => {
                let part = task.part(me, ranks).len();
                let result = Place::Scratch(ranks * part..(ranks + 1) * part);
                let place = |rank| Place::Output(task.part(rank, ranks));
                match root {
                    None => self.spread(me, &result, place),
                    Some(root) if root == me => self.receives.extend(others().map(|rank| (rank, place(rank)))),
                    Some(root) => self.sends.push((root, result)),
                }
            }
            (Operation::AllReduce, None, 2) => self.pass_on(me, |rank| Place::Output(task.part(rank, ranks))),
            _ => {}
        }
    }

    fn make_room(&mut self, bytes: usize) {
        if self.scratch.len() < bytes {
            self.scratch.resize(bytes, 0);
        }
    }

    /// What is done with what the first round has brought, and with this rank's own.
    fn finish_first(&mut self, comm: &CommInner, task: &Task<'_>) {
        let (me, ranks, block) = (comm.rank, comm.world_size, task.block());
        let (buffers, in_place) = (task.buffers, task.buffers.is_same());
        let is_root = task.call.root.is_none_or(|root| root == me);
        let of = |rank: usize| rank * block..(rank + 1) * block;
        let own = |at: usize| buffers.input(at, block);
        match task.call.operation {
            Operation::Broadcast if is_root && !in_place => buffers.output(0, block).copy_from(own(0)),
            Operation::AllGather | Operation::Gather if is_root => {
                buffers.output(me * block, block).copy_from(own(0));
            }
            Operation::Scatter if is_root => buffers.output(task.output_at, block).copy_from(own(me * block)),
            Operation::ReduceScatter => {
                let to = [Some(buffers.output(task.output_at, block)), None];
                self.join(comm, task, own(me * block), block, to);
            }
            Operation::AllToAll => {
                buffers.output(me * block, block).copy_from(own(me * block));
                if in_place {
                    for rank in (0..ranks).filter(|&rank| rank != me) {
                        buffers.output(rank * block, block).copy_from(Row::from(&self.scratch[of(rank)]));
                    }
                }
            }
            Operation::AllToAllV => {
                let Some(Parts { sends, recvs }) = task.parts else { return };
                let (from, to) = (&sends[me], &recvs[me]);
                buffers.output(to.start, to.len()).copy_from(buffers.input(from.start, from.len()));
                if in_place {
                    for (_, part) in recvs.iter().enumerate().filter(|&(rank, _)| rank != me) {
                        buffers.output(part.start, part.len()).copy_from(Row::from(&self.scratch[part.clone()]));
                    }
                }
            }
            _ if task.is_all_reduce() => {
                let part = task.part(me, ranks);
                let output = is_root.then(|| buffers.output(part.start, part.len()));
                let at = ranks * part.len();
                let result = target(&mut self.scratch, buffers, &Place::Scratch(at..at + part.len()));
                // SAFETY: the scratch lives as long as this value, and no reference to this part of it is made meanwhile.
                let result = unsafe { Target::new(result.as_mut_ptr(), result.len()) };
                self.join(comm, task, buffers.input(part.start, part.len()), part.len(), [output, Some(result)]);
            }
            _ => {}
        }
    }

    /// Joins this rank's own elements with those of the others, which lie in the scratch, `stride` bytes from one to the next.
    fn join(&self, comm: &CommInner, task: &Task<'_>, own: Row<'_, u8>, stride: usize, to: [Option<Target<'_>>; 2]) {
        let scratch = self.scratch.as_ptr();
        let input = |rank: usize| match rank == comm.rank {
            true => own,
            // SAFETY: room was made for as many; only copies of it are made.
            false => unsafe { Row::from_raw(scratch.add(rank * stride), own.len()) },
        };
        let op = task.call.op.unwrap_or(ReduceOp::Sum);
        reduce((op, task.call.dtype), (comm.world_size, own.len()), &input, Outputs { to, streaming: false });
    }
}

/// Bytes to be sent.
// Not a slice: that would be a reference to bytes that are being received.
#[allow(clippy::ptr_arg)]
fn source<'a>(scratch: &'a Vec<u8>, buffers: &'a LentPair, place: &Place) -> Row<'a, u8> {
    match place {
        Place::Input(range) => buffers.input(range.start, range.len()),
        Place::Output(range) => buffers.output(range.start, range.len()).as_row(),
        Place::Scratch(range) => {
            assert!(range.start <= range.end && range.end <= scratch.len(), "{range:?} of {} bytes", scratch.len());
            // SAFETY: inside, as just checked, and borrowed for as long.
            unsafe { Row::from_raw(scratch.as_ptr().add(range.start), range.len()) }
        }
    }
}

/// Where bytes are received. No reference to all of the scratch is made: others of its bytes are being received.
fn target<'a>(scratch: &'a mut Vec<u8>, buffers: &'a LentPair, place: &Place) -> Target<'a> {
    match place {
        Place::Input(range) | Place::Output(range) => buffers.output(range.start, range.len()),
        Place::Scratch(range) => {
            assert!(range.start <= range.end && range.end <= scratch.len(), "{range:?} of {} bytes", scratch.len());
            // SAFETY: inside, as just checked, and borrowed for as long.
            unsafe { Target::new(scratch.as_mut_ptr().add(range.start), range.len()) }
        }
    }
}
