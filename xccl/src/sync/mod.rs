//! Words that one rank writes and others watch: publication, the point-to-point ring, sleeping and waking, progress.
//!
//! Everything here works on references to atomics and knows nothing of segments or communicators, so that loom can
//! model it: `RUSTFLAGS="--cfg loom" cargo test -p xccl --release --lib loom`.

pub(crate) mod bell;
pub(crate) mod closing;
#[cfg(not(loom))]
pub(crate) mod cores;
pub(crate) mod epoch;
#[cfg(not(loom))]
pub(crate) mod fork;
#[cfg(not(loom))]
pub(crate) mod liveness;
pub(crate) mod pieces;
#[cfg(not(loom))]
pub(crate) mod progress;
pub(crate) mod ring;
pub(crate) mod signal;
pub(crate) mod steps;
#[cfg(not(loom))]
pub(crate) mod wait;

#[cfg(test)]
#[cfg(loom)]
mod loom_tests;

#[cfg(not(loom))]
pub use {
    cores::CoreSharing,
    progress::Operation,
    signal::{Until, Update},
};
