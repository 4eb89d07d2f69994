//! What was seen of a communicator at one moment. Times are nanoseconds, as seen from that moment.

use std::fmt;

use serde::{Serialize, Serializer};

use super::diagnosis::{Diagnosis, diagnose};
use super::process::ProcessState;
use super::reading::BoardCopy;
use crate::comm::Statistics;
use crate::comm::inner::standing;
use crate::sync::Operation;

/// What was seen of a communicator: [`Communicator::snapshot`](crate::Communicator::snapshot), [`MachineSnapshot::take`](crate::MachineSnapshot::take).
/// Its `Display` is a table with a line for each rank.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CommSnapshot {
    /// Names it on this machine; the same on all its ranks.
    #[serde(serialize_with = "hexadecimal")]
    pub id: u64,
    /// How long it has been there.
    pub age_ns: u64,
    /// By rank.
    pub ranks: Vec<RankSnapshot>,
}

/// What was seen of a rank.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RankSnapshot {
    /// The rank.
    pub rank: usize,
    /// Its node, where that is known.
    pub node: Option<usize>,
    /// Its process, where that is known.
    pub pid: Option<u32>,
    /// What the kernel says of the process.
    pub process: ProcessState,
    /// Cores that the process has used while it was looked at, if it was looked at twice.
    pub cores: Option<f64>,
    /// Whether it takes part.
    pub standing: Standing,
    /// What its threads sleep for: up to eight at the same time. Waits of less than half a millisecond are not shown.
    pub waits: Vec<WaitSnapshot>,
    /// For how long it has neither begun nor ended anything that is recorded.
    pub quiet_ns: Option<u64>,
    /// What it has counted, and how long ago it has said so: a rank that is hardly kept waiting does not say so often.
    pub statistics: Option<Statistics>,
    /// How long ago the statistics were stored.
    pub statistics_age_ns: Option<u64>,
    /// How long it has waited for each rank, in all, with the waits that are not over.
    pub waited_ns: Vec<u64>,
    /// How long it has waited for whichever rank would come first.
    pub waited_for_anyone_ns: u64,
    /// Its last operations, the oldest first: calls of all ranks together, and waits that went to sleep.
    pub history: Vec<HistoryRecord>,
    /// What else is known of a rank that is not on this node.
    pub remark: Option<String>,
}

/// Whether a rank takes part in its communicator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Standing {
    /// It does.
    Active,
    /// It has aborted the communicator.
    Aborted,
    /// It has left.
    Left,
    /// It cannot be seen.
    #[default]
    Unknown,
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Standing::Active => "active",
            Standing::Aborted => "aborted",
            Standing::Left => "left",
            Standing::Unknown => "unknown",
        })
    }
}

/// A wait of a thread of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct WaitSnapshot {
    /// In which operation.
    pub operation: Operation,
    /// The epoch, the number, or the tag of messages.
    pub epoch: u64,
    /// The rank that is waited for; `None` for any.
    pub peer: Option<usize>,
    /// For how long.
    pub for_ns: u64,
}

/// An operation that a rank remembers.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct HistoryRecord {
    /// Counts them.
    pub number: u64,
    /// The operation.
    pub operation: Operation,
    /// Whether it is a wait that went to sleep; otherwise a call.
    pub is_wait: bool,
    /// The epoch, the number, or the tag of messages.
    pub epoch: u64,
    /// The rank that was waited for; `None` for any, and for calls.
    pub peer: Option<usize>,
    /// How long ago it began; of calls, to the kernel's tick (4 ms).
    pub began_ns_ago: u64,
    /// How long it took; `None` while it is not over.
    pub took_ns: Option<u64>,
    /// Whether it ended with an error.
    pub failed: bool,
    /// What a collective asked for.
    pub asked: Option<String>,
}

impl CommSnapshot {
    /// What it means. Waits count once they are 0.2 s old.
    pub fn diagnosis(&self) -> Diagnosis {
        diagnose(std::slice::from_ref(self), 200_000_000)
    }
}

impl RankSnapshot {
    /// What a board shows.
    pub(crate) fn of(rank: usize, pid: Option<u32>, process: ProcessState, board: BoardCopy, now: u64) -> Self {
        let (stored, statistics) = board.counters.unzip();
        RankSnapshot {
            rank,
            node: board.nodes.get(rank).copied(),
            pid,
            process,
            cores: None,
            standing: standing(board.state),
            waits: board.waits,
            quiet_ns: Some(now.saturating_sub(board.moved)),
            statistics,
            statistics_age_ns: stored.map(|stored| now.saturating_sub(stored)),
            waited_ns: board.waited,
            waited_for_anyone_ns: board.waited_for_anyone,
            history: board.history,
            remark: None,
        }
    }

    /// The call of all ranks together that it is in, if the last one is not over.
    pub fn call(&self) -> Option<&HistoryRecord> {
        self.history.iter().rev().find(|record| !record.is_wait).filter(|record| record.took_ns.is_none())
    }

    /// With what its process uses of the processor.
    pub(crate) fn with_cores(self, cores: Option<f64>) -> Self {
        RankSnapshot { cores, ..self }
    }
}

fn hexadecimal<S: Serializer>(id: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{id:016x}"))
}
