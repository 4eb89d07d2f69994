//! Progress words: what a rank is doing, for whoever waits for it or looks on.
//!
//! One line in the rank's outbox, written by that rank alone and only when it starts to wait or is done waiting, read by
//! anyone. The fields are stored one by one: a reader may see a mixture of two moments, which costs a wrong word in a
//! message and nothing else.

use std::fmt;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::memory::mapping::Mapping;

/// What a rank was doing when something went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum Operation {
    /// Outside of any call of this crate: the engine's own work.
    Computing = 0,
    /// Joining the communicator.
    Init = 1,
    /// A barrier.
    Barrier = 2,
    /// Sending a message.
    Send = 3,
    /// Receiving a message.
    Recv = 4,
    /// The first half of a dispatch.
    DispatchSend = 5,
    /// The second half of a dispatch.
    DispatchRecv = 6,
    /// The first half of a combine.
    CombineSend = 7,
    /// The second half of a combine.
    CombineRecv = 8,
    /// Building another communicator, or a handle that needs memory of its own.
    Setup = 9,
    /// A broadcast.
    Broadcast = 10,
    /// A gather.
    Gather = 11,
    /// An all-gather.
    AllGather = 12,
    /// A scatter.
    Scatter = 13,
    /// A reduction to one rank.
    Reduce = 14,
    /// A reduction whose result is scattered.
    ReduceScatter = 15,
    /// A reduction whose result every rank gets.
    AllReduce = 16,
    /// An exchange of equal blocks.
    AllToAll = 17,
    /// An exchange of blocks of different sizes.
    AllToAllV = 18,
    /// A put, a get or an atomic operation on a rank's shared memory.
    OneSided = 20,
    /// Waiting for a signal.
    SignalWait = 21,
    /// Moving KV pages to receivers.
    KvSend = 22,
    /// Getting KV pages from senders.
    KvRecv = 23,
    /// Attention sends tokens to experts.
    A2eSend = 24,
    /// Experts receive tokens from attention.
    A2eRecv = 25,
    /// Experts send their outputs back.
    E2aSend = 26,
    /// Attention receives the experts' outputs.
    E2aRecv = 27,
}

/// All of them.
const ALL: [Operation; 27] = {
    use Operation::*;
    [
        Computing,
        Init,
        Barrier,
        Send,
        Recv,
        DispatchSend,
        DispatchRecv,
        CombineSend,
        CombineRecv,
        Setup,
        Broadcast,
        Gather,
        AllGather,
        Scatter,
        Reduce,
        ReduceScatter,
        AllReduce,
        AllToAll,
        AllToAllV,
        OneSided,
        SignalWait,
        KvSend,
        KvRecv,
        A2eSend,
        A2eRecv,
        E2aSend,
        E2aRecv,
    ]
};

impl Operation {
    /// Whether it concerns this rank and the one waited for, whatever becomes of others.
    pub(crate) fn is_of_a_pair(self) -> bool {
        matches!(self, Operation::KvSend | Operation::KvRecv)
    }

    pub(crate) fn from_word(word: u32) -> Option<Self> {
        ALL.into_iter().find(|&operation| operation as u32 == word)
    }

    /// Whether it is one of those that go through the collectives' slots.
    pub(crate) fn is_collective(self) -> bool {
        (Operation::Broadcast as u32..=Operation::AllToAllV as u32).contains(&(self as u32))
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Computing => "its own computation",
            Operation::Init => "init",
            Operation::Barrier => "barrier",
            Operation::Send => "send",
            Operation::Recv => "recv",
            Operation::DispatchSend => "dispatch_send",
            Operation::DispatchRecv => "dispatch_recv",
            Operation::CombineSend => "combine_send",
            Operation::CombineRecv => "combine_recv",
            Operation::Setup => "set-up",
            Operation::Broadcast => "broadcast",
            Operation::Gather => "gather",
            Operation::AllGather => "all_gather",
            Operation::Scatter => "scatter",
            Operation::Reduce => "reduce",
            Operation::ReduceScatter => "reduce_scatter",
            Operation::AllReduce => "all_reduce",
            Operation::AllToAll => "all_to_all",
            Operation::AllToAllV => "all_to_all_v",
            Operation::OneSided => "one-sided access",
            Operation::SignalWait => "signal_wait",
            Operation::KvSend => "kv send",
            Operation::KvRecv => "kv recv",
            Operation::A2eSend => "a2e_send",
            Operation::A2eRecv => "a2e_recv",
            Operation::E2aSend => "e2a_send",
            Operation::E2aRecv => "e2a_recv",
        })
    }
}

/// What is waited for: named in errors, published for others to see.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    pub(crate) operation: Operation,
    /// The epoch, or the tag for point to point.
    pub(crate) epoch: u64,
    /// The rank waited for; `None` for any.
    pub(crate) peer: Option<usize>,
}

const OPERATION: usize = 0;
const PEER: usize = 4;
const EPOCH: usize = 8;
const SINCE: usize = 16;
const NOBODY: u32 = u32::MAX;

/// Publishes that this rank starts to wait.
pub(crate) fn waits(own: &Mapping, line: usize, what: &Waiting) {
    own.word32(line + PEER).store(what.peer.map_or(NOBODY, |p| p as u32), Relaxed);
    own.word64(line + EPOCH).store(what.epoch, Relaxed);
    own.word64(line + SINCE).store(now_ns(), Relaxed);
    own.word32(line + OPERATION).store(what.operation as u32, Relaxed);
}

/// Publishes that this rank no longer waits; the epoch stays, as the last one known.
pub(crate) fn computes(own: &Mapping, line: usize) {
    own.word64(line + SINCE).store(now_ns(), Relaxed);
    own.word32(line + OPERATION).store(Operation::Computing as u32, Relaxed);
}

/// Tells in words what a rank was last seen doing.
pub(crate) fn describe(peer: &Mapping, line: usize, rank: usize) -> String {
    let operation = Operation::from_word(peer.word32(line + OPERATION).load(Relaxed));
    let waits_for = peer.word32(line + PEER).load(Relaxed);
    let epoch = peer.word64(line + EPOCH).load(Relaxed);
    let since = peer.word64(line + SINCE).load(Relaxed);
    let ago = Duration::from_millis(now_ns().saturating_sub(since) / 1_000_000);
    match operation {
        None => format!("rank {rank}'s progress words make no sense"),
        Some(_) if since == 0 => format!("rank {rank} has not waited for anything yet"),
        Some(Operation::Computing) => {
            format!("rank {rank} was last seen in {} for {ago:?}, after epoch {epoch}", Operation::Computing)
        }
        Some(operation) if waits_for == NOBODY => {
            format!("rank {rank} was last seen waiting in {operation} (epoch {epoch}) for anyone, for {ago:?}")
        }
        Some(operation) => {
            format!(
                "rank {rank} was last seen waiting in {operation} (epoch {epoch}) for rank {waits_for}, for {ago:?}"
            )
        }
    }
}

/// Nanoseconds of the machine's monotonic clock, which all its processes share.
fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    now.map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}
