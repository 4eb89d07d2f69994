//! Collectives.

use std::ffi::{c_int, c_void};
use std::ops::Range;

use xccl::{Collective, ReduceOp, Value};

use crate::boundary::{Failure, Out, Outcome, guard, natural, slice, slice_mut};
use crate::comm::{Live, with, xcclComm_t};
use crate::moe::xcclDataType_t;
use crate::p2p::xcclRequest_t;
use crate::result::xcclResult_t;

/** How elements of several ranks become one: in ascending order of rank, so that every rank gets the same bits. f16 and bf16 are
 *  joined in f32 and rounded once. The numbers are fixed, and NCCL's. */
// 1 (NCCL's product) stays unused.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclRedOp_t {
    /// The sum; integers wrap around.
    xcclSum = 0,
    /// The largest; NaN if one is NaN.
    xcclMax = 2,
    /// The smallest; NaN if one is NaN.
    xcclMin = 3,
    /// The sum divided by the number of ranks; integers are rounded toward zero.
    xcclAvg = 4,
}

/// Evaluates an expression with the element type that a number names.
macro_rules! by_type {
    ($datatype:expr, $t:ident => $body:expr) => {{
        const UINT8: u32 = xcclDataType_t::xcclUint8 as u32;
        const INT32: u32 = xcclDataType_t::xcclInt32 as u32;
        const INT64: u32 = xcclDataType_t::xcclInt64 as u32;
        const FLOAT16: u32 = xcclDataType_t::xcclFloat16 as u32;
        const FLOAT32: u32 = xcclDataType_t::xcclFloat32 as u32;
        const BFLOAT16: u32 = xcclDataType_t::xcclBfloat16 as u32;
        match $datatype {
            UINT8 => {
                type $t = u8;
                $body
            }
            INT32 => {
                type $t = i32;
                $body
            }
            INT64 => {
                type $t = i64;
                $body
            }
            FLOAT16 => {
                type $t = half::f16;
                $body
            }
            FLOAT32 => {
                type $t = f32;
                $body
            }
            BFLOAT16 => {
                type $t = half::bf16;
                $body
            }
            other => Err(Failure::argument(format!(
                "datatype is {other}: expected xcclUint8 (1), xcclInt32 (2), xcclInt64 (4), xcclFloat16 (6), xcclFloat32 (7) or \
                 xcclBfloat16 (9)"
            ))),
        }
    }};
}

fn reduction(op: u32) -> Outcome<ReduceOp> {
    match op {
        op if op == xcclRedOp_t::xcclSum as u32 => Ok(ReduceOp::Sum),
        op if op == xcclRedOp_t::xcclMax as u32 => Ok(ReduceOp::Max),
        op if op == xcclRedOp_t::xcclMin as u32 => Ok(ReduceOp::Min),
        op if op == xcclRedOp_t::xcclAvg as u32 => Ok(ReduceOp::Avg),
        other => {
            let expected = "expected xcclSum (0), xcclMax (2), xcclMin (3) or xcclAvg (4)";
            Err(Failure::argument(format!("op is {other}: {expected}")))
        }
    }
}

/// A rank, and whether it is this one.
fn root_of(live: &Live, root: c_int) -> Outcome<(usize, bool)> {
    let root = natural(root, "root", format_args!("a rank, 0 to {}", live.comm.world_size() - 1))?;
    Ok((root, root == live.comm.rank()))
}

/// Elements of as many blocks as there are ranks.
fn blocks(live: &Live, count: usize) -> Outcome<usize> {
    let ranks = live.comm.world_size();
    count
        .checked_mul(ranks)
        .ok_or_else(|| Failure::argument(format!("{ranks} blocks of {count} elements are no memory's")))
}

fn check_apart<T>(send: *const c_void, sends: usize, recv: *const c_void, recvs: usize) -> Outcome {
    let bytes = |elements: usize| elements.saturating_mul(size_of::<T>());
    let (a, b) = (send.addr(), recv.addr());
    let overlap = sends > 0 && recvs > 0 && a < b.saturating_add(bytes(recvs)) && b < a.saturating_add(bytes(sends));
    match overlap && !send.is_null() && !recv.is_null() {
        true => Err(Failure::argument("sendbuff overlaps recvbuff, but not as in place".to_owned())),
        false => Ok(()),
    }
}

type Buffers<'a, T> = (Option<&'a [T]>, &'a mut [T]);

/// The two buffers; only the second one where what is sent lies in it, `at` elements from its beginning.
///
/// # Safety
/// As for [`slice`] and [`slice_mut`].
unsafe fn buffers<'a, T>(
    (send, sends): (*const c_void, usize),
    (recv, recvs): (*mut c_void, usize),
    at: usize,
) -> Outcome<Buffers<'a, T>> {
    // SAFETY: the caller's promise.
    unsafe {
        if !recv.is_null() && send.addr() == recv.addr().wrapping_add(at.wrapping_mul(size_of::<T>())) {
            return Ok((None, slice_mut(recv.cast(), recvs, "recvbuff")?));
        }
        check_apart::<T>(send, sends, recv, recvs)?;
        Ok((Some(slice(send.cast(), sends, "sendbuff")?), slice_mut(recv.cast(), recvs, "recvbuff")?))
    }
}

/// The two buffers; only the first one where what is received belongs into it, `at` elements from its beginning.
///
/// # Safety
/// As for [`slice`] and [`slice_mut`]; where the buffers are one, it may be written.
unsafe fn buffers_in_send<'a, T>(
    (send, sends): (*const c_void, usize),
    (recv, recvs): (*mut c_void, usize),
    at: usize,
) -> Outcome<Buffers<'a, T>> {
    // SAFETY: the caller's promise.
    unsafe {
        if !send.is_null() && recv.addr() == send.addr().wrapping_add(at.wrapping_mul(size_of::<T>())) {
            return Ok((None, slice_mut(send.cast_mut().cast(), sends, "sendbuff")?));
        }
        check_apart::<T>(send, sends, recv, recvs)?;
        Ok((Some(slice(send.cast(), sends, "sendbuff")?), slice_mut(recv.cast(), recvs, "recvbuff")?))
    }
}

/// C's counts and displacements as ranges, and how many elements the buffer has to have.
///
/// # Safety
/// As for [`slice`].
unsafe fn parts(
    live: &Live,
    counts: (*const usize, &str),
    displs: (*const usize, &str),
) -> Outcome<(Vec<Range<usize>>, usize)> {
    let ranks = live.comm.world_size();
    // SAFETY: the caller's promise.
    let (numbers, begins) = unsafe { (slice(counts.0, ranks, counts.1)?, slice(displs.0, ranks, displs.1)?) };
    let mut parts = Vec::with_capacity(ranks);
    for (rank, (&count, &begin)) in numbers.iter().zip(begins).enumerate() {
        let end = begin.checked_add(count).ok_or_else(|| {
            Failure::argument(format!("{}[{rank}] is {begin} and {}[{rank}] {count}: no memory's", displs.1, counts.1))
        })?;
        parts.push(begin..end);
    }
    // Empty parts may lie anywhere.
    parts.iter_mut().filter(|part| part.start == part.end).for_each(|part| *part = 0..0);
    let len = parts.iter().map(|part| part.end).max().unwrap_or(0);
    Ok((parts, len))
}

/// Where a request goes, if there is one.
///
/// # Safety
/// As for [`Out::new`].
unsafe fn out_request(request: Option<*mut xcclRequest_t>) -> Outcome<Option<Out<xcclRequest_t>>> {
    // SAFETY: the caller's promise.
    request.map(|request| unsafe { Out::new(request, "request") }).transpose()
}

/// Makes a collective, or starts it where there is a request to be written.
///
/// # Safety
/// As for [`xccl::Communicator::collective_raw`].
unsafe fn make<T: Value>(live: &Live, collective: Collective<'_, T>, request: Option<Out<xcclRequest_t>>) -> Outcome {
    let Some(out) = request else { return Ok(live.comm.collective(collective)?) };
    // SAFETY: the caller's promise.
    let started = unsafe { live.comm.collective_raw(collective) }?;
    out.set(live.requests().add(started.into()));
    Ok(())
}

/// # Safety
/// C's promise about its pointers and handles; where there is a request, that the buffers are left alone until it is over.
#[allow(clippy::too_many_arguments)]
unsafe fn all_reduce(
    call: &'static str,
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    op: u32,
    comm: xcclComm_t,
    request: Option<*mut xcclRequest_t>,
) -> xcclResult_t {
    guard(call, || {
        // SAFETY: the caller's promise.
        unsafe {
            let out = out_request(request)?;
            with(comm, |live| {
                let op = reduction(op)?;
                by_type!(datatype, T => {
                    let (send, recv) = buffers::<T>((sendbuff, count), (recvbuff, count), 0)?;
                    make(live, Collective::AllReduce { send, recv, op }, out)
                })
            })
        }
    })
}

/// Joins the count elements at sendbuff of all ranks and writes the result to recvbuff on all. In place when sendbuff is
/// recvbuff. Every rank has to call it, with the same count, datatype, op (xcclInvalidUsage on all ranks otherwise).
/// datatype is an xcclDataType_t, op an xcclRedOp_t. After a failure other than xcclInvalidArgument the communicator makes
/// no collectives any more. Blocks until this rank's part is over, up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclAllReduce(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    op: u32,
    comm: xcclComm_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles.
    unsafe { all_reduce("xcclAllReduce", sendbuff, recvbuff, count, datatype, op, comm, None) }
}

/// Starts what xcclAllReduce does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
/// alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclIAllReduce(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    op: u32,
    comm: xcclComm_t,
    request: *mut xcclRequest_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles, and that the buffers are left alone.
    unsafe { all_reduce("xcclIAllReduce", sendbuff, recvbuff, count, datatype, op, comm, Some(request)) }
}

/// # Safety
/// C's promise about its pointers and handles; where there is a request, that the buffers are left alone until it is over.
#[allow(clippy::too_many_arguments)]
unsafe fn reduce(
    call: &'static str,
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    op: u32,
    root: c_int,
    comm: xcclComm_t,
    request: Option<*mut xcclRequest_t>,
) -> xcclResult_t {
    guard(call, || {
        // SAFETY: the caller's promise.
        unsafe {
            let out = out_request(request)?;
            with(comm, |live| {
                let (op, (root, is_root)) = (reduction(op)?, root_of(live, root)?);
                by_type!(datatype, T => {
                    let recv = if is_root { (recvbuff, count) } else { (std::ptr::null_mut(), 0) };
                    let (send, recv) = buffers::<T>((sendbuff, count), recv, 0)?;
                    make(live, Collective::Reduce { send, recv, op, root }, out)
                })
            })
        }
    })
}

/// As xcclAllReduce, but only rank root gets the result: recvbuff is not used on the others. Every rank has to call it,
/// with the same count, datatype, op, root (xcclInvalidUsage on all ranks otherwise). Blocks until this rank's part is
/// over, up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclReduce(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    op: u32,
    root: c_int,
    comm: xcclComm_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles.
    unsafe { reduce("xcclReduce", sendbuff, recvbuff, count, datatype, op, root, comm, None) }
}

/// Starts what xcclReduce does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left alone
/// until it is over. Several may be on their way, made in the order of their calls. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclIReduce(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    op: u32,
    root: c_int,
    comm: xcclComm_t,
    request: *mut xcclRequest_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles, and that the buffers are left alone.
    unsafe { reduce("xcclIReduce", sendbuff, recvbuff, count, datatype, op, root, comm, Some(request)) }
}

/// # Safety
/// C's promise about its pointers and handles; where there is a request, that the buffers are left alone until it is over.
#[allow(clippy::too_many_arguments)]
unsafe fn reduce_scatter(
    call: &'static str,
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    recvcount: usize,
    datatype: u32,
    op: u32,
    comm: xcclComm_t,
    request: Option<*mut xcclRequest_t>,
) -> xcclResult_t {
    guard(call, || {
        // SAFETY: the caller's promise.
        unsafe {
            let out = out_request(request)?;
            with(comm, |live| {
                let (op, all) = (reduction(op)?, blocks(live, recvcount)?);
                by_type!(datatype, T => {
                    let at = live.comm.rank() * recvcount;
                    let (send, recv) = buffers_in_send::<T>((sendbuff, all), (recvbuff, recvcount), at)?;
                    make(live, Collective::ReduceScatter { send, recv, op }, out)
                })
            })
        }
    })
}

/// Joins the elements at sendbuff of all ranks, a block of recvcount for each rank, and writes this rank's block of the
/// result to recvbuff. In place when recvbuff is sendbuff + rank * recvcount. Every rank has to call it, with the same
/// count, datatype, op (xcclInvalidUsage on all ranks otherwise). Blocks until this rank's part is over, up to the
/// deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclReduceScatter(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    recvcount: usize,
    datatype: u32,
    op: u32,
    comm: xcclComm_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles.
    unsafe { reduce_scatter("xcclReduceScatter", sendbuff, recvbuff, recvcount, datatype, op, comm, None) }
}

/// Starts what xcclReduceScatter does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be
/// left alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclIReduceScatter(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    recvcount: usize,
    datatype: u32,
    op: u32,
    comm: xcclComm_t,
    request: *mut xcclRequest_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles, and that the buffers are left alone.
    unsafe { reduce_scatter("xcclIReduceScatter", sendbuff, recvbuff, recvcount, datatype, op, comm, Some(request)) }
}

/// # Safety
/// C's promise about its pointers and handles; where there is a request, that the buffers are left alone until it is over.
#[allow(clippy::too_many_arguments)]
unsafe fn all_gather(
    call: &'static str,
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    sendcount: usize,
    datatype: u32,
    comm: xcclComm_t,
    request: Option<*mut xcclRequest_t>,
) -> xcclResult_t {
    guard(call, || {
        // SAFETY: the caller's promise.
        unsafe {
            let out = out_request(request)?;
            with(comm, |live| {
                let all = blocks(live, sendcount)?;
                by_type!(datatype, T => {
                    let at = live.comm.rank() * sendcount;
                    let (send, recv) = buffers::<T>((sendbuff, sendcount), (recvbuff, all), at)?;
                    make(live, Collective::AllGather { send, recv }, out)
                })
            })
        }
    })
}

/// Gives the sendcount elements at sendbuff of every rank to all: those of rank r become block r of recvbuff. In place when
/// sendbuff is recvbuff + rank * sendcount. Every rank has to call it, with the same count, datatype (xcclInvalidUsage on
/// all ranks otherwise). Blocks until this rank's part is over, up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclAllGather(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    sendcount: usize,
    datatype: u32,
    comm: xcclComm_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles.
    unsafe { all_gather("xcclAllGather", sendbuff, recvbuff, sendcount, datatype, comm, None) }
}

/// Starts what xcclAllGather does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
/// alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclIAllGather(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    sendcount: usize,
    datatype: u32,
    comm: xcclComm_t,
    request: *mut xcclRequest_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles, and that the buffers are left alone.
    unsafe { all_gather("xcclIAllGather", sendbuff, recvbuff, sendcount, datatype, comm, Some(request)) }
}

/// # Safety
/// C's promise about its pointers and handles; where there is a request, that the buffers are left alone until it is over.
#[allow(clippy::too_many_arguments)]
unsafe fn gather(
    call: &'static str,
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    sendcount: usize,
    datatype: u32,
    root: c_int,
    comm: xcclComm_t,
    request: Option<*mut xcclRequest_t>,
) -> xcclResult_t {
    guard(call, || {
        // SAFETY: the caller's promise.
        unsafe {
            let out = out_request(request)?;
            with(comm, |live| {
                let (all, (root, is_root)) = (blocks(live, sendcount)?, root_of(live, root)?);
                by_type!(datatype, T => {
                    let recv = if is_root { (recvbuff, all) } else { (std::ptr::null_mut(), 0) };
                    let at = live.comm.rank() * sendcount;
                    let (send, recv) = buffers::<T>((sendbuff, sendcount), recv, at)?;
                    make(live, Collective::Gather { send, recv, root }, out)
                })
            })
        }
    })
}

/// As xcclAllGather, but only rank root gets the blocks: recvbuff is not used on the others. Every rank has to call it,
/// with the same count, datatype, root (xcclInvalidUsage on all ranks otherwise). Blocks until this rank's part is over, up
/// to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclGather(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    sendcount: usize,
    datatype: u32,
    root: c_int,
    comm: xcclComm_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles.
    unsafe { gather("xcclGather", sendbuff, recvbuff, sendcount, datatype, root, comm, None) }
}

/// Starts what xcclGather does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left alone
/// until it is over. Several may be on their way, made in the order of their calls. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclIGather(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    sendcount: usize,
    datatype: u32,
    root: c_int,
    comm: xcclComm_t,
    request: *mut xcclRequest_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles, and that the buffers are left alone.
    unsafe { gather("xcclIGather", sendbuff, recvbuff, sendcount, datatype, root, comm, Some(request)) }
}

/// # Safety
/// C's promise about its pointers and handles; where there is a request, that the buffers are left alone until it is over.
#[allow(clippy::too_many_arguments)]
unsafe fn scatter(
    call: &'static str,
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    recvcount: usize,
    datatype: u32,
    root: c_int,
    comm: xcclComm_t,
    request: Option<*mut xcclRequest_t>,
) -> xcclResult_t {
    guard(call, || {
        // SAFETY: the caller's promise.
        unsafe {
            let out = out_request(request)?;
            with(comm, |live| {
                let (all, (root, is_root)) = (blocks(live, recvcount)?, root_of(live, root)?);
                by_type!(datatype, T => {
                    let send = if is_root { (sendbuff, all) } else { (std::ptr::null(), 0) };
                    let at = live.comm.rank() * recvcount;
                    let (send, recv) = buffers_in_send::<T>(send, (recvbuff, recvcount), at)?;
                    make(live, Collective::Scatter { send, recv, root }, out)
                })
            })
        }
    })
}

/// Gives block r of rank root's sendbuff, recvcount elements, to rank r, which gets it in recvbuff. sendbuff is not used on
/// the others. In place on root when recvbuff is sendbuff + rank * recvcount. Every rank has to call it, with the same
/// count, datatype, root (xcclInvalidUsage on all ranks otherwise). Blocks until this rank's part is over, up to the
/// deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclScatter(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    recvcount: usize,
    datatype: u32,
    root: c_int,
    comm: xcclComm_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles.
    unsafe { scatter("xcclScatter", sendbuff, recvbuff, recvcount, datatype, root, comm, None) }
}

/// Starts what xcclScatter does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
/// alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclIScatter(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    recvcount: usize,
    datatype: u32,
    root: c_int,
    comm: xcclComm_t,
    request: *mut xcclRequest_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles, and that the buffers are left alone.
    unsafe { scatter("xcclIScatter", sendbuff, recvbuff, recvcount, datatype, root, comm, Some(request)) }
}

/// # Safety
/// C's promise about its pointers and handles; where there is a request, that the buffers are left alone until it is over.
#[allow(clippy::too_many_arguments)]
unsafe fn broadcast(
    call: &'static str,
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    root: c_int,
    comm: xcclComm_t,
    request: Option<*mut xcclRequest_t>,
) -> xcclResult_t {
    guard(call, || {
        // SAFETY: the caller's promise.
        unsafe {
            let out = out_request(request)?;
            with(comm, |live| {
                let (root, is_root) = root_of(live, root)?;
                by_type!(datatype, T => {
                    let send = if is_root { sendbuff } else { recvbuff.cast_const() };
                    let (send, recv) = buffers::<T>((send, count), (recvbuff, count), 0)?;
                    make(live, Collective::Broadcast { send, recv, root }, out)
                })
            })
        }
    })
}

/// Gives the count elements at rank root's sendbuff to all, in recvbuff. sendbuff is not used on the others. In place when
/// sendbuff is recvbuff. Rank root may return before the others have called. Every rank has to call it, with the same
/// count, datatype, root (xcclInvalidUsage on all ranks otherwise). Blocks until this rank's part is over, up to the
/// deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclBroadcast(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    root: c_int,
    comm: xcclComm_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles.
    unsafe { broadcast("xcclBroadcast", sendbuff, recvbuff, count, datatype, root, comm, None) }
}

/// Starts what xcclBroadcast does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
/// alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclIBroadcast(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    root: c_int,
    comm: xcclComm_t,
    request: *mut xcclRequest_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles, and that the buffers are left alone.
    unsafe { broadcast("xcclIBroadcast", sendbuff, recvbuff, count, datatype, root, comm, Some(request)) }
}

/// # Safety
/// C's promise about its pointers and handles; where there is a request, that the buffers are left alone until it is over.
#[allow(clippy::too_many_arguments)]
unsafe fn all_to_all(
    call: &'static str,
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    comm: xcclComm_t,
    request: Option<*mut xcclRequest_t>,
) -> xcclResult_t {
    guard(call, || {
        // SAFETY: the caller's promise.
        unsafe {
            let out = out_request(request)?;
            with(comm, |live| {
                let all = blocks(live, count)?;
                by_type!(datatype, T => {
                    let (send, recv) = buffers::<T>((sendbuff, all), (recvbuff, all), 0)?;
                    make(live, Collective::AllToAll { send, recv }, out)
                })
            })
        }
    })
}

/// Gives block r of sendbuff, count elements, to rank r, and gets block r of recvbuff from it. In place when sendbuff is
/// recvbuff. Every rank has to call it, with the same count, datatype (xcclInvalidUsage on all ranks otherwise). Blocks
/// until this rank's part is over, up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclAllToAll(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    comm: xcclComm_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles.
    unsafe { all_to_all("xcclAllToAll", sendbuff, recvbuff, count, datatype, comm, None) }
}

/// Starts what xcclAllToAll does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
/// alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclIAllToAll(
    sendbuff: *const c_void,
    recvbuff: *mut c_void,
    count: usize,
    datatype: u32,
    comm: xcclComm_t,
    request: *mut xcclRequest_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles, and that the buffers are left alone.
    unsafe { all_to_all("xcclIAllToAll", sendbuff, recvbuff, count, datatype, comm, Some(request)) }
}

/// # Safety
/// C's promise about its pointers and handles; where there is a request, that the buffers are left alone until it is over.
#[allow(clippy::too_many_arguments)]
unsafe fn all_to_all_v(
    call: &'static str,
    sendbuff: *const c_void,
    sendcounts: *const usize,
    sdispls: *const usize,
    recvbuff: *mut c_void,
    recvcounts: *const usize,
    rdispls: *const usize,
    datatype: u32,
    comm: xcclComm_t,
    request: Option<*mut xcclRequest_t>,
) -> xcclResult_t {
    guard(call, || {
        // SAFETY: the caller's promise.
        unsafe {
            let out = out_request(request)?;
            with(comm, |live| {
                let (send_parts, sends) = parts(live, (sendcounts, "sendcounts"), (sdispls, "sdispls"))?;
                let (recv_parts, recvs) = parts(live, (recvcounts, "recvcounts"), (rdispls, "rdispls"))?;
                by_type!(datatype, T => {
                    let (send, recv) = buffers::<T>((sendbuff, sends), (recvbuff, recvs), 0)?;
                    let (send_parts, recv_parts) = (&send_parts[..], &recv_parts[..]);
                    make(live, Collective::AllToAllV { send, send_parts, recv, recv_parts }, out)
                })
            })
        }
    })
}

/// As xcclAllToAll, with blocks of different sizes: rank r gets the sendcounts[r] elements at sendbuff + sdispls[r], and
/// those from rank r, recvcounts[r], go to recvbuff + rdispls[r]. All four are [nranks], in elements. What one rank sends
/// another has to be what that one expects (xcclInvalidUsage on all ranks otherwise). In place when sendbuff is recvbuff,
/// and counts and displacements are the same. Every rank has to call it, with the same datatype. Blocks until this rank's
/// part is over, up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclAllToAllv(
    sendbuff: *const c_void,
    sendcounts: *const usize,
    sdispls: *const usize,
    recvbuff: *mut c_void,
    recvcounts: *const usize,
    rdispls: *const usize,
    datatype: u32,
    comm: xcclComm_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles.
    unsafe {
        all_to_all_v(
            "xcclAllToAllv",
            sendbuff,
            sendcounts,
            sdispls,
            recvbuff,
            recvcounts,
            rdispls,
            datatype,
            comm,
            None,
        )
    }
}

/// Starts what xcclAllToAllv does, and writes a request to *request, for xcclWait and xcclTest. The buffers must be left
/// alone until it is over. Several may be on their way, made in the order of their calls. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclIAllToAllv(
    sendbuff: *const c_void,
    sendcounts: *const usize,
    sdispls: *const usize,
    recvbuff: *mut c_void,
    recvcounts: *const usize,
    rdispls: *const usize,
    datatype: u32,
    comm: xcclComm_t,
    request: *mut xcclRequest_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles, and that the buffers are left alone.
    unsafe {
        all_to_all_v(
            "xcclIAllToAllv",
            sendbuff,
            sendcounts,
            sdispls,
            recvbuff,
            recvcounts,
            rdispls,
            datatype,
            comm,
            Some(request),
        )
    }
}
