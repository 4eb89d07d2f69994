//! MoE dispatch and combine, joined: one exchange at a time.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, TryLockError};

use half::{bf16, f16};
use xccl::{DType, Element, Error, Exchange, ExpertBatch, Moe, MoeConfig, Reduction, Routing};

use crate::boundary::{Failure, Out, Outcome, guard, slice, slice_mut};
use crate::comm::{with, xcclComm_t};
use crate::handle::{self, Handle, Magic};
use crate::result::xcclResult_t;

/** The element type of token rows. The numbers are fixed, and NCCL's. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclDataType_t {
    /// IEEE 754 half precision, 2 bytes.
    xcclFloat16 = 6,
    /// IEEE 754 single precision, 4 bytes.
    xcclFloat32 = 7,
    /// bfloat16, 2 bytes.
    xcclBfloat16 = 9,
}

/** Where the weighted sum over a token's experts is formed. The numbers are fixed. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclReduction_t {
    /// On the token's rank, in ascending k: bitwise the same result for any number of ranks.
    xcclReducePerExpert = 0,
    /// First on each expert's rank, then on the token's: one row per token and rank is read.
    xcclReducePerRank = 1,
}

/// The shape of a MoE handle's exchanges. Equal on all ranks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclMoeConfig_t {
    /// Most tokens of one rank in one exchange, 1 to 1048576.
    pub max_tokens: usize,
    /// Elements of a token row, 1 to 1048576.
    pub hidden: usize,
    /// Experts that a token may name, 1 to 64 and at most experts.
    pub topk: usize,
    /// Experts over all ranks, 1 to 65536. Rank r holds a contiguous block of them: experts / nranks, the first
    /// experts % nranks ranks one more.
    pub experts: usize,
    /// An xcclDataType_t: the element type of the rows.
    pub dtype: u32,
    /// An xcclReduction_t.
    pub reduction: u32,
}

/// A `Moe` with what one exchange leaves between the calls.
struct Held {
    moe: NonNull<Moe>,
    /// Experts of this rank.
    local: usize,
    // Both borrow from `moe`, which stays where it is; `drop` ends them first.
    batch: Option<ExpertBatch<'static>>,
    sent: Option<Exchange<'static>>,
    /// Tokens of the exchange that was sent.
    tokens: usize,
    /// The batch's rows were copied to the caller: combine comes next.
    delivered: bool,
}

const fn is_send<T: Send>() {}
const _: () = is_send::<Moe>();

// SAFETY: a `Moe` may move to another thread, and what borrows from it moves along: all of it is reached through one lock.
unsafe impl Send for Held {}

impl Held {
    fn new(moe: Moe, local: usize) -> Self {
        // Not a Box: moving that would claim that nothing borrows from its contents.
        let moe = NonNull::from(Box::leak(Box::new(moe)));
        Held { moe, local, batch: None, sent: None, tokens: 0, delivered: false }
    }

    /// The handle, for as long as `self` keeps it: the lifetime is longer than the truth, and no borrow with it is stored
    /// anywhere but in `self`.
    fn moe(&self) -> &'static Moe {
        // SAFETY: made from a box by `new`, shared only, and freed by `drop` after all that borrows from it.
        unsafe { self.moe.as_ref() }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.batch = None;
        self.sent = None;
        // SAFETY: it came from a box, and the two that borrowed from it are gone.
        drop(unsafe { Box::from_raw(self.moe.as_ptr()) });
    }
}

/// What a MoE handle points to.
// Spelt so that cbindgen does not see it: the header shows an opaque struct.
#[cfg_attr(all(), repr(C))]
pub struct xcclMoe {
    magic: Magic,
    inner: Mutex<Option<Held>>,
}

/// A handle for the exchanges of one MoE shape over one communicator. Made by xcclMoeCreate, owned by the caller, given back
/// to xcclMoeDestroy. One thread at a time may use it.
pub type xcclMoe_t = *mut xcclMoe;

impl Handle for xcclMoe {
    const MAGIC: u64 = u64::from_be_bytes(*b"XCCL moe");
    const KIND: &'static str = "a MoE handle";

    fn magic(&self) -> &Magic {
        &self.magic
    }
}

/// # Safety
/// As for [`handle::shell`].
unsafe fn locked(moe: xcclMoe_t) -> Outcome<(&'static xcclMoe, MutexGuard<'static, Option<Held>>)> {
    // SAFETY: the caller's promise.
    let shell = unsafe { handle::shell(moe, "moe") }?;
    match shell.inner.try_lock() {
        Ok(inner) => Ok((shell, inner)),
        // A panic has left the exchange as it was; what is there can still be dropped, and is checked by each call.
        Err(TryLockError::Poisoned(poisoned)) => Ok((shell, poisoned.into_inner())),
        Err(TryLockError::WouldBlock) => {
            Err(Failure::usage("another thread is in a call with moe: one at a time may use it"))
        }
    }
}

/// Calls `body` with what is behind a handle.
///
/// # Safety
/// As for [`handle::shell`].
unsafe fn with_held<T>(moe: xcclMoe_t, body: impl FnOnce(&mut Held) -> Outcome<T>) -> Outcome<T> {
    // SAFETY: the caller's promise.
    let (_, mut inner) = unsafe { locked(moe) }?;
    body(inner.as_mut().ok_or_else(|| handle::destroyed::<xcclMoe>("moe"))?)
}

fn config_of(config: &xcclMoeConfig_t) -> Outcome<MoeConfig> {
    let xcclMoeConfig_t { max_tokens, hidden, topk, experts, dtype, reduction } = *config;
    let dtype = match dtype {
        d if d == xcclDataType_t::xcclFloat16 as u32 => DType::F16,
        d if d == xcclDataType_t::xcclFloat32 as u32 => DType::F32,
        d if d == xcclDataType_t::xcclBfloat16 as u32 => DType::BF16,
        other => {
            let text =
                format!("config->dtype is {other}: expected xcclFloat16 (6), xcclFloat32 (7) or xcclBfloat16 (9)");
            return Err(Failure::argument(text));
        }
    };
    let reduction = match reduction {
        r if r == xcclReduction_t::xcclReducePerExpert as u32 => Reduction::PerExpert,
        r if r == xcclReduction_t::xcclReducePerRank as u32 => Reduction::PerRank,
        other => {
            let text =
                format!("config->reduction is {other}: expected xcclReducePerExpert (0) or xcclReducePerRank (1)");
            return Err(Failure::argument(text));
        }
    };
    Ok(MoeConfig { reduction, ..MoeConfig::new(max_tokens, hidden, topk, experts, dtype) })
}

/// Makes a handle for exchanges of the shape *config and writes it to *moe; *moe is left as it is on failure. Every rank of
/// comm must call it, with the same configuration (xcclJoinFailed on every rank otherwise). Blocks until all have.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeCreate(
    moe: *mut xcclMoe_t,
    comm: xcclComm_t,
    config: *const xcclMoeConfig_t,
) -> xcclResult_t {
    guard("xcclMoeCreate", || {
        // SAFETY: C's promise about its pointers and handles; any bits are a configuration, to be checked.
        let made = unsafe {
            let out = Out::new(moe, "moe")?;
            let config = config_of(&slice(config, 1, "config")?[0])?;
            let held = with(comm, |comm| {
                let moe = Moe::new(comm, config)?;
                let local = moe.experts_of(comm.rank())?.len();
                Ok(Held::new(moe, local))
            });
            (out, held?)
        };
        let (out, held) = made;
        let shell = xcclMoe { magic: Magic::of::<xcclMoe>(), inner: Mutex::new(Some(held)) };
        out.set(handle::hand_out(shell));
        Ok(())
    })
}

/// Gives the handle up: any further use of it is xcclInvalidArgument. An exchange that was not combined is given up, and the
/// other ranks learn of it (xcclRemoteError). Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeDestroy(moe: xcclMoe_t) -> xcclResult_t {
    guard("xcclMoeDestroy", || {
        // SAFETY: C's promise about its handles.
        let (shell, mut inner) = unsafe { locked(moe) }?;
        let held = inner.take().ok_or_else(|| handle::destroyed::<xcclMoe>("moe"))?;
        shell.magic().clear();
        drop(held);
        Ok(())
    })
}

/// Writes the number of experts that this rank holds to *local_experts.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeLocalExperts(moe: xcclMoe_t, local_experts: *mut usize) -> xcclResult_t {
    guard("xcclMoeLocalExperts", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, value) = unsafe {
            let out = Out::new(local_experts, "local_experts")?;
            (out, with_held(moe, |held| Ok(held.local))?)
        };
        out.set(value);
        Ok(())
    })
}

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
        let input = Input { tokens, num_tokens, topk_ids, topk_weights };
        let output = Output { expert_rows, capacity_rows, expert_counts, rows };
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| match held.moe().config().dtype {
                DType::F32 => dispatch::<f32>(held, input, output),
                DType::F16 => dispatch::<f16>(held, input, output),
                DType::BF16 => dispatch::<bf16>(held, input, output),
            })
        }
    })
}

struct Input {
    tokens: *const c_void,
    num_tokens: usize,
    topk_ids: *const i32,
    topk_weights: *const f32,
}

struct Output {
    expert_rows: *mut c_void,
    capacity_rows: usize,
    expert_counts: *mut u32,
    rows: *mut usize,
}

/// # Safety
/// The pointers are null or good for the sizes that [`xcclMoeDispatch`] gives.
unsafe fn dispatch<E: Element>(held: &mut Held, input: Input, output: Output) -> Outcome {
    if held.delivered {
        let epoch = held.sent.as_ref().map_or(0, Exchange::epoch);
        return Err(Failure::usage(format!("exchange {epoch} was dispatched already: call xcclMoeCombine first")));
    }
    let moe = held.moe();
    // The results' pointers are looked at first: were they found bad after sending, the others would wait for nothing.
    // SAFETY: the caller's promise; `expert_rows` is only checked here, with the room that is claimed for it.
    let checked = unsafe {
        let local = held.local;
        let room = output.capacity_rows.checked_mul(moe.config().hidden);
        let room = room.ok_or_else(|| {
            let (rows, hidden) = (output.capacity_rows, moe.config().hidden);
            Failure::argument(format!("capacity_rows is {rows}: memory has no room for that many rows of {hidden}"))
        });
        Out::new(output.rows, "rows").and_then(|rows| {
            let counts = slice_mut(output.expert_counts, local, "expert_counts")?;
            check_elements::<E>(output.expert_rows, room?, "expert_rows")?;
            Ok((rows, counts))
        })
    };
    if held.sent.is_none() {
        // SAFETY: the caller's promise.
        let arrays = checked.as_ref().ok().map(|_| unsafe { arrays::<E>(moe.config(), &input) });
        match arrays {
            Some(Ok((tokens, routing))) => {
                held.sent = Some(moe.dispatch_send(tokens, &routing)?);
                held.tokens = input.num_tokens;
            }
            bad => {
                // The library has not seen this input. Hand it one that it refuses, and it tells those who wait.
                let _ = moe.dispatch_send::<E, i32>(&[], &Routing::new(&[], &[0.0]));
                if let Some(Err(failure)) = bad {
                    return Err(failure);
                }
            }
        }
    }
    let (rows, counts) = checked?;
    if input.num_tokens != held.tokens {
        let (given, sent) = (input.num_tokens, held.tokens);
        let text = format!("num_tokens is {given}: this call repeats the receiving of an exchange sent with {sent}");
        return Err(Failure::argument(text));
    }
    if held.batch.is_none() {
        let sent = held.sent.as_ref().ok_or_else(|| Failure::usage("no exchange was sent"))?;
        held.batch = Some(moe.dispatch_recv(sent)?);
    }
    let batch = held.batch.as_mut().ok_or_else(|| Failure::usage("no exchange was received"))?;
    rows.set(batch.len());
    counts.copy_from_slice(batch.counts());
    if batch.len() > output.capacity_rows {
        let (rows, capacity) = (batch.len(), output.capacity_rows);
        let text =
            format!("{rows} rows arrived, capacity_rows is {capacity}: call again with more room, nothing is lost");
        return Err(Failure::truncated(text));
    }
    // SAFETY: the caller's promise; the input's slices are no longer in use.
    let to = unsafe { slice_mut(output.expert_rows.cast::<E>(), batch.len() * moe.config().hidden, "expert_rows") }?;
    batch.copy_into(to, 1)?;
    held.delivered = true;
    Ok(())
}

/// The caller's arrays.
///
/// # Safety
/// As for [`dispatch`].
unsafe fn arrays<'a, E: Element>(config: &MoeConfig, input: &Input) -> Outcome<(&'a [E], Routing<'a, i32>)> {
    if input.num_tokens > config.max_tokens {
        // Before slices are made of memory that may not be there.
        return Err(Error::TooManyTokens { given: input.num_tokens, limit: config.max_tokens }.into());
    }
    // Products of checked values: at most 2^20 tokens times 2^20 elements.
    let (elements, choices) = (input.num_tokens * config.hidden, input.num_tokens * config.topk);
    // SAFETY: the caller's promise.
    unsafe {
        let tokens = slice(input.tokens.cast::<E>(), elements, "tokens")?;
        let ids = slice(input.topk_ids, choices, "topk_ids")?;
        Ok((tokens, Routing::new(ids, slice(input.topk_weights, choices, "topk_weights")?)))
    }
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
            with_held(moe, |held| match held.moe().config().dtype {
                DType::F32 => combine::<f32>(held, expert_outputs, out),
                DType::F16 => combine::<f16>(held, expert_outputs, out),
                DType::BF16 => combine::<bf16>(held, expert_outputs, out),
            })
        }
    })
}

/// # Safety
/// The pointers are null or good for the sizes that [`xcclMoeCombine`] gives.
unsafe fn combine<E: Element>(held: &mut Held, expert_outputs: *const c_void, out: *mut c_void) -> Outcome {
    let (moe, none) = (held.moe(), || Failure::usage("no exchange was dispatched: call xcclMoeDispatch first"));
    if !held.delivered {
        return Err(none());
    }
    let (hidden, rows) = (moe.config().hidden, held.batch.as_ref().map_or(0, ExpertBatch::len));
    check_elements::<E>(out, held.tokens * hidden, "out")?;
    // SAFETY: the caller's promise.
    let outputs = unsafe { slice(expert_outputs.cast::<E>(), rows * hidden, "expert_outputs") }?;
    // From here on the exchange ends, one way or the other.
    held.delivered = false;
    let (sent, batch) = (held.sent.take(), held.batch.take());
    let (sent, batch) = (sent.ok_or_else(none)?, batch.ok_or_else(none)?);
    moe.combine_send_from(batch, outputs)?;
    // SAFETY: the caller's promise; `outputs` is no longer in use.
    let out = unsafe { slice_mut(out.cast::<E>(), held.tokens * hidden, "out") }?;
    Ok(moe.combine_recv(sent, out)?)
}
