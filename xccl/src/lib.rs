//! Communication for LLM-serving engines over global shared memory.
//!
//! XCCL moves tokens between the processes ("ranks") that serve a large mixture-of-experts model. Every rank owns memory
//! that it alone writes and its peers read: to send, it writes once and publishes with one store; to receive, a rank reads
//! the rows where they are.
//!
//! - [`Communicator`]: a group of ranks; how they find each other ([`UniqueId`], launchers' environments), `split`, barrier.
//! - [`Moe`]: dispatch each token to the ranks that hold its experts, combine what comes back.
//! - [`Attention`] and [`Experts`]: the same between ranks that hold attention and ranks that hold experts.
//! - Collectives: [`Communicator::all_reduce`], [`Communicator::all_gather`] and the like, at once or in the background.
//! - Point to point: [`Communicator::send`], [`Communicator::recv`].
//! - One-sided: [`Communicator::put`], [`Communicator::get`], signals and atomics on [`SharedBuffer`]s of other ranks.
//! - KV cache: [`KvSender`] and [`KvReceiver`] move pages from prefill to decode ranks, layer by layer.
//! - Seeing what a job does: [`Communicator::snapshot`], [`MachineSnapshot`], [`Communicator::wait_times`],
//!   [`Communicator::history`].
//! - [`Config`]: every option, by code or by environment; [`Error`]: everything that can go wrong, with the facts.
//!
//! Linux only. See [`Moe`] for a complete example.

#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

#[cfg(not(loom))]
mod bootstrap;
#[cfg(not(loom))]
mod collectives;
#[cfg(not(loom))]
mod comm;
#[cfg(not(loom))]
mod dtype;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
mod fabric;
#[cfg(not(loom))]
mod kernels;
#[cfg(not(loom))]
mod kv;
#[cfg(all(fuzzing, not(loom)))]
#[doc(hidden)]
pub mod lies;
#[cfg(all(test, not(fuzzing), not(loom)))]
mod lies;
mod loom_facade;
#[cfg(not(loom))]
mod memory;
#[cfg(not(loom))]
mod moe;
#[cfg(not(loom))]
mod observe;
#[cfg(not(loom))]
mod onesided;
#[cfg(not(loom))]
mod p2p;
mod sync;

#[cfg(all(not(loom), feature = "prometheus"))]
pub use crate::observe::prometheus_text;
#[cfg(not(loom))]
pub use crate::{
    bootstrap::{Launch, UniqueId},
    collectives::{Collective, DataType, RawCollective, ReduceOp, Value},
    comm::{Communicator, Config, HeapBuffer, MemoryPlan, Origin, Setting, Statistics},
    dtype::{DType, Element, ExpertId},
    error::{Error, Result},
    fabric::{BareNetwork, NetworkProvider},
    kernels::Kernels,
    kv::{KvConfig, KvEvent, KvOutcome, KvPosted, KvReceiver, KvSender, KvSenderEvent, KvTicket, PageLayout, PagePair},
    memory::MemoryFlavour,
    moe::{
        Arrivals, Attention, BatchRow, ConstantExperts, CountForm, DomainBatch, Ended, Epilogue, Exchange, ExpertBatch,
        Experts, Forward, InputRows, Lanes, Moe, MoeConfig, Reduction, Residual, RmsNorm, Role, RoleConfig, RoleCounts,
        Routing, ScaleLayout, SmoothScales, TokenSum, WireFormat, WireRow, WireRows,
    },
    observe::{
        CommSnapshot, Diagnosis, Finding, HistoryRecord, JobSnapshot, MachineSnapshot, ProcessState, RankSnapshot,
        Standing, WaitSnapshot,
    },
    onesided::{Remote, SharedBuffer},
    p2p::{Calibration, CalibrationPoint, CollectiveRequest, RawRequest, Request, Scope, Source, Status, wait_all},
    sync::{CoreSharing, Operation, Until, Update},
};

#[cfg(not(loom))]
pub use crate::moe::placement;

/// The README's Rust example.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
