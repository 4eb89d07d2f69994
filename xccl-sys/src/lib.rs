//! The C ABI of XCCL, as `include/xccl.h` declares it (generated from these sources by `tests/header.rs`).
//!
//! Every entry point runs inside one panic boundary ([`boundary::guard`]), checks its pointers and values, and returns an
//! [`xcclResult_t`]; the text of a failure is kept for the thread ([`xcclGetLastError`]). The documentation of the entry
//! points is the header's, so it is written for C.

// The names are C's. What a caller has to promise is the same for every entry point and is said once, in the header's
// preamble: pointers are null or valid for the size that the parameter's text gives, for the length of the call.
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals, clippy::missing_safety_doc)]

mod a2e;
mod boundary;
mod collectives;
mod comm;
mod config;
mod handle;
mod kv;
mod moe;
mod onesided;
mod p2p;
mod result;
mod status;

pub use a2e::*;
pub use boundary::xcclGetLastError;
pub use collectives::*;
pub use comm::*;
pub use config::{XCCL_UNDEFINED, xcclConfig_t, xcclKernels_t, xcclMemory_t};
pub use kv::*;
pub use moe::*;
pub use onesided::*;
pub use p2p::{
    XCCL_ANY_SOURCE, XCCL_REQUEST_NULL, xcclIrecv, xcclIsend, xcclRecv, xcclRequest_t, xcclRequestFree, xcclSend,
    xcclStatus_t, xcclTest, xcclWait, xcclWaitAll,
};
pub use result::{xcclGetErrorString, xcclResult_t};
pub use status::*;
