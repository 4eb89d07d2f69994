//! What the director and its ranks say to each other: a line of JSON each.

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::case::Case;

/// To a worker: be that rank in that case.
#[derive(Serialize, Deserialize)]
pub struct Task {
    pub case: Case,
    pub rank: usize,
    /// The communicator's id.
    pub id: Vec<u8>,
}

/// How a case ended for a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// All rounds were as they should be.
    Done,
    /// A call failed, and named these ranks.
    Told { blamed: Vec<usize>, kind: String, text: String },
    /// Something was not as it should be, or nobody was named.
    Wrong(String),
    /// The case could not begin: somebody else has taken the port.
    Void(String),
}

/// From a worker.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub outcome: Outcome,
    /// When it was known.
    pub at_ns: u64,
    /// The round, and what was done in it.
    pub during: String,
    /// What is still there of what the case has opened, mapped or started.
    pub leaks: Vec<String>,
    /// The process's address space.
    pub vm_kib: u64,
}

/// The machine's monotonic clock, the same for all its processes.
pub fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}
