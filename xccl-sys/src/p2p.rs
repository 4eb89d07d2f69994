//! Point to point.

use std::ffi::{c_int, c_void};

use xccl::{Error, Source};

use crate::boundary::{Out, guard, natural, slice, slice_mut};
use crate::comm::{with, xcclComm_t};
use crate::result::xcclResult_t;

/// The source that stands for any rank.
pub const XCCL_ANY_SOURCE: c_int = -1;

/// What was received.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclStatus_t {
    /// The sender.
    pub source: c_int,
    /// The message's tag.
    pub tag: u32,
    /// Its length in bytes.
    pub bytes: usize,
}

/// Sends `bytes` bytes at data (may be null when bytes is 0) to rank peer, possibly this one. Messages of one sender with one
/// tag arrive in order. Returns when data may be reused: at once for what the sender's ring has room for, after the receiver
/// has copied it for longer messages. Messages to the own rank never block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclSend(
    data: *const c_void,
    bytes: usize,
    peer: c_int,
    tag: u32,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclSend", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with(comm, |comm| {
                let data = slice(data.cast::<u8>(), bytes, "data")?;
                let peer = natural(peer, "peer", &format!("a rank, 0 to {}", comm.world_size() - 1))?;
                Ok(comm.send(peer, tag, data)?)
            })
        }
    })
}

/// Receives the next message with this tag from rank source, or from any rank (XCCL_ANY_SOURCE), into the capacity bytes at
/// buffer (may be null when capacity is 0). Blocks until it is there, up to the deadline. Writes sender, tag and length to
/// *status unless status is null. xcclTruncated when the message is longer than capacity: *status is written all the same,
/// and the message is kept for a call with a larger buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclRecv(
    buffer: *mut c_void,
    capacity: usize,
    source: c_int,
    tag: u32,
    status: *mut xcclStatus_t,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclRecv", || {
        let status = match status.is_null() {
            true => None,
            // SAFETY: C's promise about its pointers.
            false => Some(unsafe { Out::new(status, "status") }?),
        };
        let report = |source: usize, tag: u32, bytes: usize| {
            if let Some(status) = status {
                status.set(xcclStatus_t { source: source as c_int, tag, bytes });
            }
        };
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with(comm, |comm| {
                let buffer = slice_mut(buffer.cast::<u8>(), capacity, "buffer")?;
                let source = match source {
                    XCCL_ANY_SOURCE => Source::Any,
                    rank => {
                        let most = comm.world_size() - 1;
                        let expected = format!("a rank, 0 to {most}, or XCCL_ANY_SOURCE ({XCCL_ANY_SOURCE})");
                        Source::Rank(natural(rank, "source", &expected)?)
                    }
                };
                let received = comm.recv(source, tag, buffer);
                match &received {
                    Ok(got) => report(got.source, got.tag, got.len),
                    Err(Error::Truncated { from, tag, len, .. }) => report(*from, *tag, *len),
                    Err(_) => {}
                }
                received?;
                Ok(())
            })
        }
    })
}
