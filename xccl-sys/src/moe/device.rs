//! What kernels need that compute on other threads or devices.

use std::ffi::{c_int, c_void};
use std::sync::atomic::AtomicU64;

use super::halves::dtype_of;
use super::*;
use crate::boundary::{Out, SizedOut, guard, natural};
use crate::result::xcclResult_t;

/// A batch as kernels see it: see xccl_device.h, whose inline functions read it. Set it to XCCL_DEVICE_BATCH_INITIALIZER. What
/// it points to is good until the exchange's xcclMoeCombineSend or xcclMoeGiveUp.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct xcclDeviceBatch_t {
    /// sizeof(xcclDeviceBatch_t).
    pub size: usize,
    /// [num_rows].
    pub rows: *const xcclMoeRow_t,
    /// [local_experts + 1], expert e has the rows offsets[e] to offsets[e + 1] - 1.
    pub offsets: *const u32,
    /// Rows whose outputs are written; in this rank's outbox, alone on its cache line.
    pub rows_done: *mut u64,
    /// Rows: by local expert, then by the rank they come from, then by token.
    pub num_rows: u64,
    /// Experts of this rank.
    pub local_experts: u64,
    /// Elements of a row.
    pub hidden: u64,
    /// Bytes from one output row to the next: hidden elements, rounded up to 64 bytes.
    pub row_bytes: u64,
    /// An xcclDataType_t: the element type of the rows.
    pub dtype: u32,
    /// An xcclWireFormat_t: how the token rows lie in their senders' memory.
    pub wire: u32,
}

/// Describes an exchange that was received (xcclMoeDispatchRecv) for kernels on other threads or devices, which write the
/// outputs in place and count them; xcclMoeAwaitRows waits for them. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeDeviceBatch(
    exchange: xcclExchange_t,
    batch: *mut xcclDeviceBatch_t,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeDeviceBatch", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = SizedOut::new(batch, "batch")?;
            with_held(moe, |held| {
                let config = held.moe().config();
                let row_bytes = held.moe().row_stride() * config.dtype.size();
                let flight = held.flight(exchange)?;
                let (rows, num_rows) = (flight.described.rows.as_ptr(), flight.described.rows.len());
                let batch = flight.batch()?;
                out.set(xcclDeviceBatch_t {
                    size: size_of::<xcclDeviceBatch_t>(),
                    rows,
                    offsets: batch.offsets().as_ptr(),
                    rows_done: AtomicU64::as_ptr(batch.rows_done()),
                    num_rows: num_rows as u64,
                    local_experts: batch.counts().len() as u64,
                    hidden: config.hidden as u64,
                    row_bytes: row_bytes as u64,
                    dtype: dtype_of(config.dtype) as u32,
                    wire: number_of(config.wire),
                });
                Ok(())
            })
        }
    })
}

/// Blocks, up to the deadline, until kernels have counted all rows of the exchange's batch as done (xcclDevicePublish). May be
/// called again after xcclTimeout.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeAwaitRows(exchange: xcclExchange_t, moe: xcclMoe_t) -> xcclResult_t {
    guard("xcclMoeAwaitRows", || {
        // SAFETY: C's promise about its handles.
        unsafe {
            with_held(moe, |held| {
                let moe = held.moe();
                Ok(moe.await_rows(held.flight(exchange)?.batch()?)?)
            })
        }
    })
}

/// Writes to *base and *bytes where the outbox that rank `rank` has for this handle is mapped in this process: to register it
/// with a device (cudaHostRegister; cudaHostRegisterReadOnly for another rank's, which must not be written). All rows of all
/// batches lie in these. Good until xcclMoeDestroy. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeOutbox(
    rank: c_int,
    base: *mut *const c_void,
    bytes: *mut usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeOutbox", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = (Out::new(base, "base")?, Out::new(bytes, "bytes")?);
            with_held(moe, |held| {
                let (at, bytes) =
                    held.moe().outbox_address(natural(rank, "rank", format_args!("a rank, 0 or more"))?)?;
                out.0.set(at.cast());
                out.1.set(bytes);
                Ok(())
            })
        }
    })
}
