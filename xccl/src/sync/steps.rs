//! The steps of collectives: who may write and who may read slot `step % slots`.
//!
//! Every rank has `slots` slots in its outbox, each with a *turn word* that only it writes. Collectives are made of steps, numbered
//! from 1 on through the life of the communicator, the same on every rank. In each step every rank fills its slot (with nothing,
//! if it has nothing to say), stores the step's number into the turn word, and then reads the slots of those ranks whose data it
//! needs: once their turn has been reached.
//!
//! That one store also says that the rank has done reading all steps before. So a slot may be filled again by step `s` when every
//! other rank has published step [`needed`]`(s)`: all of them are then done with `s - slots`, which used the slot before. Nobody
//! says it twice: in a collective in which each rank reads from all, it has been seen already; and a rank that only writes (the
//! root of a broadcast) looks at the others' words once in `slots` steps, and never waits for a reader that keeps up.
//!
//! A rank is never more than `slots - 1` steps ahead of another one. Therefore a reader that finds the turn it waits for, or finds
//! it late, finds the data of that very step.

use crate::loom_facade::AtomicU64;
#[cfg(not(loom))]
use crate::loom_facade::Ordering;

use super::epoch;

/// What every other rank must have published before step `step` may fill its slot; 0 is published from the start.
pub(crate) fn needed(step: u64, slots: u64) -> u64 {
    (step + 1).saturating_sub(slots)
}

/// Publishes a step: its slot is filled, and all steps before have been read.
pub(crate) fn publish(turn: &AtomicU64, step: u64) {
    epoch::publish(turn, step);
}

/// The last step that the owner of `turn` has published there. A reader that waits for a step finds an earlier one, or that one:
/// anything later is no honest rank's.
#[cfg(not(loom))]
pub(crate) fn published(turn: &AtomicU64) -> u64 {
    turn.load(Ordering::Acquire)
}

/// Whether the owner of `turn` has published `step`, whose slot that is.
pub(crate) fn has(turn: &AtomicU64, step: u64) -> bool {
    epoch::reached(turn, step)
}
