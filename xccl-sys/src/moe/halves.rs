//! The four halves, for engines that overlap exchanges with their own work.

use std::ffi::{c_int, c_void};
use std::ptr::{null, null_mut};

use xccl::{DType, Element, Error, ExpertBatch, ExpertId, InputRows, Moe, Reduction, Routing};

use super::*;
use crate::boundary::{Failure, Out, Outcome, SizedOut, guard, sized, slice, slice_mut};
use crate::result::xcclResult_t;

/// Gives the rows that the next exchange's tokens lie in: [num_tokens, *row_bytes], of which hidden elements of each row count,
/// aligned to 64 bytes, with what an earlier exchange left there. Compute the tokens there, then call xcclMoeDispatchSend with
/// tokens null and this num_tokens: nothing is copied. Rows that were given before and not sent are taken back.
/// xcclInvalidUsage where rows travel encoded: see xcclMoeInputWireRows. Blocks as xcclMoeDispatchSend does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeInputRows(
    num_tokens: usize,
    rows: *mut *mut c_void,
    row_bytes: *mut usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    fn take<E: Element>(
        moe: &'static Moe,
        tokens: usize,
        wrap: fn(InputRows<'static, E>) -> AnyRows,
    ) -> Outcome<(AnyRows, *mut c_void)> {
        let mut rows = moe.input_rows::<E>(tokens)?;
        let at = rows.matrix().as_mut_ptr();
        Ok((wrap(rows), at.cast()))
    }
    guard("xcclMoeInputRows", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let (out, out_bytes) = (Out::new(rows, "rows")?, Out::new(row_bytes, "row_bytes")?);
            with_held(moe, |held| {
                let moe = held.moe();
                held.input_rows = None;
                let (rows, at) = match moe.config().dtype {
                    DType::F32 => take(moe, num_tokens, AnyRows::F32),
                    DType::F16 => take(moe, num_tokens, AnyRows::F16),
                    DType::BF16 => take(moe, num_tokens, AnyRows::Bf16),
                }?;
                held.input_rows = Some(rows);
                out.set(at);
                out_bytes.set(moe.row_stride() * moe.config().dtype.size());
                Ok(())
            })
        }
    })
}

pub(crate) const NO_INPUT: xcclMoeInput_t = xcclMoeInput_t {
    size: 0,
    tokens: null(),
    num_tokens: 0,
    topk_ids: null(),
    topk_weights: null(),
    active: null(),
    ids_type: xcclDataType_t::xcclInt32 as u32,
};

/// First half of a dispatch: sends this rank's tokens to the ranks that hold their experts, and names the exchange in
/// *exchange. Every rank must call it for every exchange. The arrays may be used again when it returns. Blocks only until every
/// rank has combined the exchange before the last, up to the deadline.
///
/// Bad input is xcclInvalidArgument and nothing is sent: ranks that wait for this one get xcclPeerRefused, and all may call
/// again. xcclInvalidUsage when two exchanges are under way.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeDispatchSend(
    input: *const xcclMoeInput_t,
    exchange: *mut xcclExchange_t,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeDispatchSend", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                let checked =
                    Out::new(exchange, "exchange").and_then(|out| Ok((out, sized(input, NO_INPUT, "input")?)));
                match checked {
                    Ok((out, input)) => send_any(held, &input).map(|epoch| out.set(epoch)),
                    Err(failure) => {
                        refuse(held.moe());
                        Err(failure)
                    }
                }
            })
        }
    })
}

/// The library has not seen this input: hand it one that it refuses, and it tells those who wait.
pub(super) fn refuse(moe: &Moe) {
    fn one<E: Element>(moe: &Moe) {
        let _ = moe.dispatch_send::<E, i32>(&[], &Routing::new(&[], &[0.0]));
    }
    by_dtype!(moe, one(moe));
}

/// # Safety
/// The input's pointers are null or good for the sizes that [`xcclMoeInput_t`] gives.
pub(super) unsafe fn send_any(held: &mut Held, input: &xcclMoeInput_t) -> Outcome<u64> {
    let moe = held.moe();
    // SAFETY: the caller's promise.
    unsafe { by_dtype!(moe, send(held, input)) }
}

/// # Safety
/// As for [`send_any`].
unsafe fn send<E: Element>(held: &mut Held, input: &xcclMoeInput_t) -> Outcome<u64> {
    // SAFETY: the caller's promise.
    unsafe {
        match input.ids_type {
            i if i == xcclDataType_t::xcclInt32 as u32 => send_with::<E, i32>(held, input),
            i if i == xcclDataType_t::xcclInt64 as u32 => send_with::<E, i64>(held, input),
            other => {
                refuse(held.moe());
                Err(Failure::argument(format!("input->ids_type is {other}: expected xcclInt32 (2) or xcclInt64 (4)")))
            }
        }
    }
}

/// # Safety
/// As for [`send_any`].
unsafe fn send_with<E: Element, I: ExpertId>(held: &mut Held, input: &xcclMoeInput_t) -> Outcome<u64> {
    let mut active = std::mem::take(&mut held.active);
    active.clear();
    // SAFETY: the caller's promise.
    let sent = unsafe { send_arrays::<E, I>(held, input, &mut active) };
    held.active = active;
    sent
}

/// # Safety
/// As for [`send_any`].
unsafe fn send_arrays<E: Element, I: ExpertId>(
    held: &mut Held,
    input: &xcclMoeInput_t,
    active: &mut Vec<bool>,
) -> Outcome<u64> {
    let moe = held.moe();
    // SAFETY: the caller's promise.
    let (tokens, routing) = match unsafe { arrays::<E, I>(held, input, active) } {
        Ok(arrays) => arrays,
        Err(failure) => {
            refuse(moe);
            return Err(failure);
        }
    };
    let rows = held.input_rows.take();
    let sent = match tokens {
        Some(tokens) => {
            // Rows that were given and not used are taken back: they lie where these tokens go.
            drop(rows);
            moe.dispatch_send(tokens, &routing)?
        }
        None => match rows {
            Some(AnyRows::F32(rows)) => moe.dispatch_send_rows(rows, &routing)?,
            Some(AnyRows::F16(rows)) => moe.dispatch_send_rows(rows, &routing)?,
            Some(AnyRows::Bf16(rows)) => moe.dispatch_send_rows(rows, &routing)?,
            Some(AnyRows::Wire(rows)) => moe.dispatch_send_wire_rows(rows, &routing)?,
            None => moe.dispatch_send::<E, I>(&[], &routing)?,
        },
    };
    let epoch = sent.epoch();
    let described = held.spare.pop().unwrap_or_default();
    let (tokens, local) = (input.num_tokens, held.local()?);
    held.flights.push(Flight { epoch, arrived: Arrived::Nothing, sent: Some(sent), tokens, local, described });
    Ok(epoch)
}

/// The caller's arrays; no tokens when those are to be in the outbox.
///
/// # Safety
/// As for [`send_any`].
unsafe fn arrays<'a, E: Element, I>(
    held: &Held,
    input: &xcclMoeInput_t,
    active: &'a mut Vec<bool>,
) -> Outcome<(Option<&'a [E]>, Routing<'a, I>)>
where
    I: ExpertId,
{
    let config = held.moe().config();
    let tokens = input.num_tokens;
    if tokens > config.max_tokens {
        // Before slices are made of memory that may not be there.
        return Err(Error::TooManyTokens { given: tokens, limit: config.max_tokens }.into());
    }
    let in_outbox = input.tokens.is_null() && tokens > 0;
    if in_outbox && held.input_rows.is_none() {
        return Err(Failure::argument("input->tokens is a null pointer, and xcclMoeInputRows has given no rows"));
    }
    // Products of checked values: at most 2^20 tokens times 2^20 elements.
    let (elements, choices) = (tokens * config.hidden, tokens * config.topk);
    // SAFETY: the caller's promise.
    unsafe {
        let rows = slice(input.tokens.cast::<E>(), if in_outbox { 0 } else { elements }, "input->tokens")?;
        let ids = slice(input.topk_ids.cast::<I>(), choices, "input->topk_ids")?;
        let mut routing = Routing::new(ids, slice(input.topk_weights, choices, "input->topk_weights")?);
        if !input.active.is_null() {
            active.extend(slice(input.active, tokens, "input->active")?.iter().map(|&a| a != 0));
            routing = routing.active(active);
        }
        Ok(((!in_outbox).then_some(rows), routing))
    }
}

/// Second half of a dispatch: receives what all ranks sent to this rank's experts and describes it in *batch. The rows stay in
/// the senders' memory. Blocks until all ranks have sent, up to the deadline; may be called again, also to get the same
/// description once more. xcclPeerRefused when a rank's input was bad: call again once it has sent.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeDispatchRecv(
    exchange: xcclExchange_t,
    batch: *mut xcclMoeBatch_t,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeDispatchRecv", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = SizedOut::new(batch, "batch")?;
            with_held(moe, |held| {
                receive(held, exchange)?;
                let moe = held.moe();
                let flight = held.flight(exchange)?;
                let rows = (flight.described.rows.as_ptr(), flight.described.rows.len());
                let by_source = flight.described.rows.windows(2).any(|pair| pair[0].output > pair[1].output);
                let outputs = flight.described.rows.first().filter(|_| !by_source).map_or(null_mut(), |row| row.output);
                let batch = flight.batch()?;
                out.set(xcclMoeBatch_t {
                    size: size_of::<xcclMoeBatch_t>(),
                    num_rows: rows.1,
                    local_experts: batch.counts().len(),
                    counts: batch.counts().as_ptr(),
                    offsets: batch.offsets().as_ptr(),
                    rows: rows.0,
                    outputs,
                    row_bytes: moe.row_stride() * moe.config().dtype.size(),
                    hidden: moe.config().hidden,
                    dtype: dtype_of(moe.config().dtype) as u32,
                    wire: number_of(moe.config().wire),
                    row_scales: moe.config().wire.scales(moe.config().hidden),
                    experts: batch.local_experts().as_ptr(),
                });
                Ok(())
            })
        }
    })
}

pub(crate) fn dtype_of(dtype: DType) -> xcclDataType_t {
    match dtype {
        DType::F32 => xcclDataType_t::xcclFloat32,
        DType::F16 => xcclDataType_t::xcclFloat16,
        DType::BF16 => xcclDataType_t::xcclBfloat16,
    }
}

/// Receives what is missing of an exchange, and describes its rows.
pub(super) fn receive(held: &mut Held, exchange: xcclExchange_t) -> Outcome {
    let moe = held.moe();
    let flight = held.flight(exchange)?;
    let mut batch = match &mut flight.arrived {
        Arrived::All(_) => return Ok(()),
        Arrived::Combined => return flight.batch().map(|_| ()),
        Arrived::Nothing => {
            let sent = flight.sent.as_ref().ok_or_else(|| Failure::usage("no exchange was sent"))?;
            moe.dispatch_recv(sent)?
        }
        Arrived::Some(arrivals) => {
            while arrivals.next_source()?.is_some() {}
            match std::mem::replace(&mut flight.arrived, Arrived::Nothing) {
                Arrived::Some(arrivals) => arrivals.into_batch()?,
                _ => return Err(Failure::usage("no exchange was received")),
            }
        }
    };
    flight.described.rows.clear();
    flight.described.rows.extend(batch.addresses().map(describe(moe.scales_offset())));
    flight.arrived = Arrived::All(batch);
    Ok(())
}

/// As xcclMoeDispatchRecv, source by source in the order of arrival: *source is the rank whose *num_rows rows at *rows have
/// come, by local expert, then token; -1 when all sources have come, after which xcclMoeDispatchRecv describes all of them in
/// the usual order, with the same outputs. *rows is good until the next call for the exchange. Blocks until a source has sent,
/// up to the deadline; may be called again after a failure.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeDispatchRecvSource(
    exchange: xcclExchange_t,
    source: *mut c_int,
    rows: *mut *const xcclMoeRow_t,
    num_rows: *mut usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeDispatchRecvSource", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = (Out::new(source, "source")?, Out::new(rows, "rows")?, Out::new(num_rows, "num_rows")?);
            with_held(moe, |held| {
                let moe = held.moe();
                let flight = held.flight(exchange)?;
                if let Arrived::Nothing = flight.arrived {
                    let sent = flight.sent.as_ref().ok_or_else(|| Failure::usage("no exchange was sent"))?;
                    flight.arrived = Arrived::Some(moe.dispatch_recv_by_source(sent)?);
                }
                flight.described.rows.clear();
                let next = match &mut flight.arrived {
                    Arrived::Some(arrivals) => {
                        let next = arrivals.next_source()?;
                        if let Some(source) = next {
                            let describe = describe(moe.scales_offset());
                            flight.described.rows.extend(arrivals.addresses(source).map(describe));
                        }
                        next
                    }
                    _ => {
                        let text = format!("exchange {exchange} was received as a whole already");
                        return Err(Failure::usage(text));
                    }
                };
                out.0.set(next.map_or(-1, |source| source as c_int));
                out.1.set(flight.described.rows.as_ptr());
                out.2.set(flight.described.rows.len());
                Ok(())
            })
        }
    })
}

/// Copies the rows of an exchange that was received into the expert-major layout at to: each local expert's rows one after
/// another, beginning at a multiple of align rows (1: without gaps). to has room for capacity_rows rows of hidden elements;
/// xcclTruncated when these are too few, with nothing written. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeCopyExpertMajor(
    exchange: xcclExchange_t,
    to: *mut c_void,
    capacity_rows: usize,
    align: usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeCopyExpertMajor", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                if align == 0 {
                    return Err(Failure::argument("align is 0: expected a number of rows, at least 1"));
                }
                let moe = held.moe();
                let batch = held.flight(exchange)?.batch()?;
                let needed = batch.aligned_rows(align);
                by_dtype!(moe, copy_rows(moe, batch, to, capacity_rows, needed, Layout::ExpertMajor { align }))
            })
        }
    })
}

/// Copies the rows of an exchange that was received into the padded layout [local experts, capacity, hidden] at to, which has
/// room for capacity_rows rows. xcclLimitExceeded when an expert has more rows than capacity, xcclTruncated when capacity_rows
/// is below local experts * capacity, both with nothing written. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeCopyPadded(
    exchange: xcclExchange_t,
    to: *mut c_void,
    capacity_rows: usize,
    capacity: usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeCopyPadded", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                let moe = held.moe();
                let batch = held.flight(exchange)?.batch()?;
                let needed = batch.counts().len().saturating_mul(capacity);
                by_dtype!(moe, copy_rows(moe, batch, to, capacity_rows, needed, Layout::Padded { capacity }))
            })
        }
    })
}

pub(super) enum Layout {
    ExpertMajor { align: usize },
    Padded { capacity: usize },
}

/// # Safety
/// `to` is null or has room for `room` rows.
pub(super) unsafe fn copy_rows<E: Element>(
    moe: &Moe,
    batch: &mut ExpertBatch<'_>,
    to: *mut c_void,
    room: usize,
    needed: usize,
    layout: Layout,
) -> Outcome {
    let hidden = moe.config().hidden;
    if needed > room {
        let text = format!("the layout takes {needed} rows, capacity_rows is {room}: call again with more room");
        return Err(Failure::truncated(text));
    }
    // SAFETY: the caller's promise.
    let to = unsafe { slice_mut(to.cast::<E>(), needed.saturating_mul(hidden), "to") }?;
    match layout {
        Layout::ExpertMajor { align } => batch.copy_into(to, align)?,
        Layout::Padded { capacity } => batch.copy_padded(to, capacity)?,
    }
    Ok(())
}

/// For engines that form the sums of xcclReducePerRank themselves: describes in *sums the *num_sums sums that are asked of this
/// rank, by source, then token. Write each to its output, then call xcclMoeCombineSend with outputs XCCL_SUMMED. *sums is good
/// until then. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeSums(
    exchange: xcclExchange_t,
    sums: *mut *const xcclMoeSum_t,
    num_sums: *mut usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeSums", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = (Out::new(sums, "sums")?, Out::new(num_sums, "num_sums")?);
            with_held(moe, |held| {
                let moe = held.moe();
                let flight = held.flight(exchange)?;
                flight.batch()?;
                if moe.config().reduction != Reduction::PerRank {
                    return Err(Failure::usage(
                        "the handle was not made with xcclReducePerRank: nobody asks for its sums",
                    ));
                }
                let Flight { arrived: Arrived::All(batch), described, .. } = flight else { return Ok(()) };
                let Described { sums, sum_rows, .. } = described;
                sums.clear();
                sum_rows.clear();
                for sum in batch.sums() {
                    sum_rows.extend(sum.rows().map(|(row, _)| row as u32));
                    sums.push(xcclMoeSum_t {
                        output: null_mut(),
                        rows: null(),
                        num_rows: sum.rows().len() as u32,
                        source: sum.source as u32,
                        token: sum.token as u32,
                        reserved: 0,
                    });
                }
                let mut rows = sum_rows.as_ptr();
                for (i, sum) in sums.iter_mut().enumerate() {
                    sum.output = by_dtype!(moe, sum_output(batch, i))?;
                    sum.rows = rows;
                    rows = rows.wrapping_add(sum.num_rows as usize);
                }
                out.0.set(sums.as_ptr());
                out.1.set(sums.len());
                Ok(())
            })
        }
    })
}

fn sum_output<E: Element>(batch: &mut ExpertBatch<'_>, i: usize) -> Outcome<*mut c_void> {
    Ok(batch.sum_row::<E>(i)?.as_mut_ptr().cast())
}

/// First half of a combine: publishes what this rank's experts made of the rows. outputs: [num_rows, hidden] in the batch's
/// order, not weighted, copied once (or summed on the way, with xcclReducePerRank); XCCL_IN_PLACE when they were written to
/// rows[i].output; XCCL_SUMMED when the sums were written where xcclMoeSums says. Ends the batch. Does not block.
/// xcclInvalidArgument and xcclInvalidUsage change nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeCombineSend(
    exchange: xcclExchange_t,
    outputs: *const c_void,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeCombineSend", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                let moe = held.moe();
                by_dtype!(moe, hand_over(held, exchange, outputs))
            })
        }
    })
}

/// # Safety
/// As for [`xcclMoeCombineSend`].
pub(super) unsafe fn hand_over<E: Element>(
    held: &mut Held,
    exchange: xcclExchange_t,
    outputs: *const c_void,
) -> Outcome {
    let moe = held.moe();
    let flight = held.flight(exchange)?;
    let elements = flight.batch()?.len() * moe.config().hidden;
    match outputs.addr() {
        XCCL_IN_PLACE => Ok(moe.combine_send(flight.take_batch()?)?),
        XCCL_SUMMED if moe.config().reduction == Reduction::PerRank => Ok(moe.combine_send_sums(flight.take_batch()?)?),
        XCCL_SUMMED => Err(Failure::usage("outputs is XCCL_SUMMED: that needs a handle with xcclReducePerRank")),
        _ => {
            // SAFETY: the caller's promise.
            let outputs = unsafe { slice(outputs.cast::<E>(), elements, "outputs") }?;
            Ok(moe.combine_send_from(flight.take_batch()?, outputs)?)
        }
    }
}

/// The addresses of the header's XCCL_IN_PLACE and XCCL_SUMMED: odd, as no row's is.
pub(crate) const XCCL_IN_PLACE: usize = 1;
pub(crate) const XCCL_SUMMED: usize = 3;

/// Second half of a combine: receives the sums for the tokens that this rank sent in the exchange: out[t] = sum over k of
/// topk_weights[t, k] * output of expert topk_ids[t, k], [num_tokens, hidden], summed in f32 and rounded once; zeros for a
/// token without experts. Blocks until the ranks that had tokens of this one have combined, up to the deadline.
/// xcclInvalidUsage before xcclMoeCombineSend, and xcclInvalidArgument, change nothing. After any other result the exchange is
/// over.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeCombineRecv(
    exchange: xcclExchange_t,
    out: *mut c_void,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeCombineRecv", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                let moe = held.moe();
                by_dtype!(moe, take_sums(held, exchange, out))
            })
        }
    })
}

/// # Safety
/// As for [`xcclMoeCombineRecv`].
pub(super) unsafe fn take_sums<E: Element>(held: &mut Held, exchange: xcclExchange_t, out: *mut c_void) -> Outcome {
    // SAFETY: the caller's promise; nothing is added.
    unsafe { take_sums_with::<E>(held, exchange, out, &NO_EPILOGUE) }
}

/// # Safety
/// As for [`xcclMoeCombineRecvWith`].
pub(super) unsafe fn take_sums_with<E: Element>(
    held: &mut Held,
    exchange: xcclExchange_t,
    out: *mut c_void,
    epilogue: &xcclMoeEpilogue_t,
) -> Outcome {
    let moe = held.moe();
    let flight = held.flight(exchange)?;
    if !matches!(flight.arrived, Arrived::Combined) {
        return Err(Failure::usage(format!("exchange {exchange} was not combined: call xcclMoeCombineSend first")));
    }
    // SAFETY: the caller's promise.
    let (out, epilogue) = unsafe { arrays_of::<E>(epilogue, out, flight.tokens, moe.config().hidden) }?;
    let sent = held.end(exchange)?.sent.ok_or_else(|| Failure::usage("no exchange was sent"))?;
    Ok(moe.combine_recv_with(sent, out, epilogue)?)
}

/// As xcclMoeCombineRecv, and adds a bias and residual rows to the sums before they are rounded, and norms what it has written, all
/// while a row is in registers and caches: see xcclMoeEpilogue_t. out and normed must not overlap each other nor what is read, but
/// for a residual that is out. xcclInvalidArgument for such an overlap and for eps changes nothing. Blocks as
/// xcclMoeCombineRecv does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeCombineRecvWith(
    exchange: xcclExchange_t,
    out: *mut c_void,
    epilogue: *const xcclMoeEpilogue_t,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeCombineRecvWith", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                let epilogue = sized(epilogue, NO_EPILOGUE, "epilogue")?;
                let moe = held.moe();
                by_dtype!(moe, take_sums_with(held, exchange, out, &epilogue))
            })
        }
    })
}

/// Gives an exchange up: the ranks that wait for this one's part get xcclRemoteError. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeGiveUp(exchange: xcclExchange_t, moe: xcclMoe_t) -> xcclResult_t {
    guard("xcclMoeGiveUp", || {
        // SAFETY: C's promise about its handles.
        unsafe { with_held(moe, |held| held.end(exchange).map(drop)) }
    })
}
