//! The two joined calls: one exchange at a time, rows and outputs in the caller's memory.

use std::ffi::c_void;

use xccl::Element;

use super::halves::{Layout, NO_INPUT, copy_rows, hand_over, receive, refuse, send_any, take_sums};
use super::*;
use crate::boundary::{Failure, Out, Outcome, guard, slice, slice_mut};
use crate::result::xcclResult_t;

/// Sends this rank's tokens to the ranks that hold their experts, and receives what all ranks sent to this rank's experts.
/// Every rank must call it, then xcclMoeCombine. Blocks until all have called it, up to the deadline.
///
/// In:
/// - tokens: [num_tokens, hidden], elements of the handle's type, aligned to the element;
/// - num_tokens: 0 to max_tokens, may differ on every rank;
/// - topk_ids: [num_tokens, topk], ids of experts, different within a token, or -1 for none;
/// - topk_weights: [num_tokens, topk], the factors that xcclMoeCombine applies;
/// - capacity_rows: rows that expert_rows has room for; nranks * max_tokens * min(topk, local experts) is always enough.
///
/// Out:
/// - expert_rows: [*rows, hidden], expert-major: the rows of the first local expert, then of the next; within an expert by
///   the rank they come from, then by token;
/// - expert_counts: [local experts], rows of each;
/// - *rows: their sum.
///
/// Arrays without elements may be null. All memory stays the caller's; the tokens may be reused when the call returns.
///
/// Bad input is xcclInvalidArgument and nothing is sent: the other ranks get xcclPeerRefused, and all may call again.
/// After xcclTruncated (capacity_rows is below *rows, which is written), xcclTimeout or xcclPeerRefused call again with the same
/// arguments, and a larger capacity_rows after xcclTruncated: the tokens are sent once, by whichever call gets that far.
/// xcclInvalidUsage before the last exchange was combined.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeDispatch(
    tokens: *const c_void,
    num_tokens: usize,
    topk_ids: *const i32,
    topk_weights: *const f32,
    expert_rows: *mut c_void,
    capacity_rows: usize,
    expert_counts: *mut u32,
    rows: *mut usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeDispatch", || {
        let input = xcclMoeInput_t { tokens, num_tokens, topk_ids: topk_ids.cast(), topk_weights, ..NO_INPUT };
        let output = Output { expert_rows, capacity_rows, expert_counts, rows };
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                let moe = held.moe();
                by_dtype!(moe, dispatch(held, &input, &output))
            })
        }
    })
}

struct Output {
    expert_rows: *mut c_void,
    capacity_rows: usize,
    expert_counts: *mut u32,
    rows: *mut usize,
}

/// # Safety
/// The pointers are null or good for the sizes that [`xcclMoeDispatch`] gives.
unsafe fn dispatch<E: Element>(held: &mut Held, input: &xcclMoeInput_t, output: &Output) -> Outcome {
    if let Some((epoch, true)) = held.joined {
        return Err(Failure::usage(format!("exchange {epoch} was dispatched already: call xcclMoeCombine first")));
    }
    let (moe, hidden) = (held.moe(), held.moe().config().hidden);
    let local = match held.joined {
        Some((epoch, _)) => held.flight(epoch)?.local,
        None => held.local()?,
    };
    // The results' pointers are looked at first: were they found bad after sending, the others would wait for nothing.
    let checked = || -> Outcome<_> {
        // SAFETY: the caller's promise.
        let (rows, counts) =
            unsafe { (Out::new(output.rows, "rows")?, slice_mut(output.expert_counts, local, "expert_counts")?) };
        let room = output.capacity_rows;
        let elements = room.checked_mul(hidden).ok_or_else(|| {
            Failure::argument(format!("capacity_rows is {room}: memory has no room for that many rows of {hidden}"))
        })?;
        check_elements::<E>(output.expert_rows, elements, "expert_rows")?;
        Ok((rows, counts))
    };
    let (rows, counts) = checked().inspect_err(|_| {
        if held.joined.is_none() {
            refuse(moe);
        }
    })?;
    let epoch = match held.joined {
        Some((epoch, _)) => epoch,
        None => {
            // SAFETY: the caller's promise.
            let epoch = unsafe { send_any(held, input) }?;
            held.joined = Some((epoch, false));
            epoch
        }
    };
    let sent = held.flight(epoch)?.tokens;
    if input.num_tokens != sent {
        let given = input.num_tokens;
        let text = format!("num_tokens is {given}: this call repeats the receiving of an exchange sent with {sent}");
        return Err(Failure::argument(text));
    }
    receive(held, epoch)?;
    let batch = held.flight(epoch)?.batch()?;
    rows.set(batch.len());
    counts.copy_from_slice(batch.counts());
    let needed = batch.len();
    // SAFETY: the caller's promise; the input's slices are no longer in use.
    unsafe {
        copy_rows::<E>(moe, batch, output.expert_rows, output.capacity_rows, needed, Layout::ExpertMajor { align: 1 })?;
    }
    held.joined = Some((epoch, true));
    Ok(())
}

/// Checks a pointer without looking at what it points to.
fn check_elements<E: Element>(at: *mut c_void, elements: usize, name: &str) -> Outcome {
    if elements == 0 {
        return Ok(());
    }
    if at.is_null() {
        return Err(Failure::argument(format!("{name} is a null pointer")));
    }
    if !at.cast::<E>().is_aligned() {
        return Err(Failure::argument(format!("{name} is {at:p}: expected a multiple of {}", align_of::<E>())));
    }
    Ok(())
}

/// Hands back what this rank's experts made of the rows of the last xcclMoeDispatch, and receives the sums for the tokens
/// that this rank sent there: out[t] = sum over k of topk_weights[t, k] * output of expert topk_ids[t, k], summed in f32 and
/// rounded once; zeros for a token without experts. Blocks until the ranks that had tokens of this one have combined, up to
/// the deadline.
///
/// - expert_outputs: [*rows, hidden] in the order of expert_rows, not weighted, and possibly the same memory;
/// - out: [num_tokens, hidden].
///
/// Arrays without elements may be null. All memory stays the caller's. xcclInvalidUsage without a dispatch, and
/// xcclInvalidArgument, change nothing: correct the call and repeat it. After any other result the exchange has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeCombine(
    expert_outputs: *const c_void,
    out: *mut c_void,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeCombine", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                let moe = held.moe();
                by_dtype!(moe, combine(held, expert_outputs, out))
            })
        }
    })
}

/// # Safety
/// The pointers are null or good for the sizes that [`xcclMoeCombine`] gives.
unsafe fn combine<E: Element>(held: &mut Held, expert_outputs: *const c_void, out: *mut c_void) -> Outcome {
    let Some((epoch, true)) = held.joined else {
        return Err(Failure::usage("no exchange was dispatched: call xcclMoeDispatch first"));
    };
    let hidden = held.moe().config().hidden;
    check_elements::<E>(out, held.flight(epoch)?.tokens * hidden, "out")?;
    // SAFETY: the caller's promise.
    unsafe {
        let outputs = slice(expert_outputs.cast::<E>(), held.flight(epoch)?.batch()?.len() * hidden, "expert_outputs")?;
        // From here on the exchange ends, one way or the other.
        let ended = hand_over::<E>(held, epoch, outputs.as_ptr().cast());
        match ended {
            Ok(()) => take_sums::<E>(held, epoch, out),
            Err(failure) => held.end(epoch).and(Err(failure)),
        }
    }
}
