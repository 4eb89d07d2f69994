//! What a rank can be doing, and what it waits for: named in errors, and published for others to see
//! ([`board`](crate::observe)).

use std::fmt;

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// What a rank was doing when something went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
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
    /// Asking whether a rank can be reached.
    Probe = 32,
    /// Agreeing on the ranks that are left, and building their communicator.
    Shrink = 33,
}

/// All of them.
const ALL: [Operation; 29] = {
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
        Probe,
        Shrink,
    ]
};

impl Operation {
    /// Whether it concerns this rank and the one waited for, whatever becomes of others.
    pub(crate) fn is_of_a_pair(self) -> bool {
        matches!(self, Operation::KvSend | Operation::KvRecv | Operation::Probe)
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
            Operation::Probe => "probe",
            Operation::Shrink => "shrink",
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

/// Nanoseconds of the machine's monotonic clock, which all its processes share.
pub(crate) fn now_ns() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC)
}

/// The same as of the kernel's last tick, at most a few milliseconds ago. Read in 3 ns, where the exact time takes 23.
pub(crate) fn tick_ns() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC_COARSE)
}

fn nanoseconds(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}
