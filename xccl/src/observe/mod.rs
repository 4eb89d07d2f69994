//! Seeing what a job does: what each rank shows, who reads it, and what it means.
//!
//! Every rank keeps a [`board`] at the beginning of its outbox, which it alone writes: the waits of its threads, its last
//! operations, what it has counted, how long it has waited for each peer. Writing it costs little enough to be always on:
//! - a wait is shown when it goes to sleep, half a millisecond after it began; shorter ones are only counted;
//! - calls of all ranks together (exchanges, collectives, barriers) are recorded as they begin and end, in two lines of this
//!   core's cache; messages are not, unless their wait goes to sleep.
//!
//! Two kinds of readers copy boards ([`reading`]) and make a [`CommSnapshot`] of them: the ranks of the node, through their
//! mappings, when a deadline has passed or the engine asks; and any process of the same user, through a descriptor that
//! `/proc` lends it ([`machine`]). Neither asks anything of the rank, which may be stopped or dead. [`diagnosis`] says what a
//! snapshot means, in one sentence.

pub(crate) mod board;
mod diagnosis;
mod machine;
pub(crate) mod process;
#[cfg(feature = "prometheus")]
mod prometheus;
pub(crate) mod reading;
mod snapshot;
#[cfg(test)]
mod tests;
mod text;

pub(crate) use diagnosis::diagnose;
pub use diagnosis::{Diagnosis, Finding};
pub use machine::{JobSnapshot, MachineSnapshot};
pub use process::ProcessState;
#[cfg(feature = "prometheus")]
pub use prometheus::prometheus_text;
pub use snapshot::{CommSnapshot, HistoryRecord, RankSnapshot, Standing, WaitSnapshot};
