//! Attention and experts apart.

use std::ffi::c_void;
use std::ptr::{NonNull, null, null_mut};
use std::sync::{Mutex, MutexGuard, TryLockError};

use xccl::{
    Attention, DomainBatch, Element, Ended, Exchange, ExpertId, Experts, Forward, MoeConfig, RoleConfig, Routing,
};

use crate::boundary::{Failure, Out, Outcome, SizedOut, guard, sized, slice, slice_mut};
use crate::comm::{with, xcclComm_t};
use crate::handle::{self, Handle, Magic};
use crate::moe::{
    NO_CONFIG, NO_INPUT, XCCL_IN_PLACE, XCCL_SUMMED, by_dtype, config_of, describe, dtype_of, number_of,
    xcclDataType_t, xcclExchange_t, xcclMoeConfig_t, xcclMoeInput_t, xcclMoeRow_t,
};
use crate::result::xcclResult_t;

/** Who reads what of whom, beside the rows. The numbers are fixed. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclForward_t {
    /// By trampolines in a domain of many attention ranks, on nodes with many expert ranks.
    xcclForwardAuto = 0,
    /// Each expert rank the lists of each attention rank, and the other way round.
    xcclForwardFlat = 1,
    /// A few expert ranks of each node gather them for the others.
    xcclForwardTrampoline = 2,
}

/// Who holds attention and who holds experts. Equal on all ranks. Set it to XCCL_A2E_CONFIG_INITIALIZER, then its fields.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclA2EConfig_t {
    /// sizeof(xcclA2EConfig_t).
    pub size: usize,
    /// [nranks], read during xcclA2ECreate: the domain of a rank that holds attention, counted from 0 without gaps, or -1 for one that
    /// holds experts. The ranks of a domain send their micro-batches together.
    pub roles: *const i32,
    /// The shape of the exchanges, read during xcclA2ECreate. Its placement names ranks that hold experts; null: these share the
    /// experts evenly. Its max_expert_rows counts what comes from one domain.
    pub moe: *const xcclMoeConfig_t,
    /// How many expert ranks of each node gather for the others, if any do; 0: the square root of a domain's attention ranks.
    pub trampolines: usize,
    /// An xcclForward_t.
    pub forward: u32,
}

/** Why an expert rank's loop has ended. The numbers are fixed. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclA2EEnd_t {
    /// It goes on: this is a micro-batch.
    xcclA2EGoesOn = 0,
    /// All attention ranks are done.
    xcclA2EDone = 1,
    /// An attention rank has shut the group down.
    xcclA2EWasShutDown = 2,
    /// A rank has aborted the communicator.
    xcclA2EAborted = 3,
}

/// A micro-batch of one domain: what arrived for this rank's experts. Set it to XCCL_A2E_BATCH_INITIALIZER. What it points to belongs to
/// the handle and is good until the micro-batch's xcclE2ASend.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct xcclA2EBatch_t {
    /// sizeof(xcclA2EBatch_t).
    pub size: usize,
    /// The micro-batch's number in its domain, from 1.
    pub exchange: xcclExchange_t,
    /// Rows: by local expert, then by the rank they come from, then by token.
    pub num_rows: usize,
    /// Experts of this rank.
    pub local_experts: usize,
    /// [local_experts], rows of each.
    pub counts: *const u32,
    /// [local_experts + 1], expert e has the rows offsets[e] to offsets[e + 1] - 1.
    pub offsets: *const u32,
    /// [num_rows].
    pub rows: *const xcclMoeRow_t,
    /// [num_rows, row_bytes], the outputs of all rows in their order: what rows[i].output points into.
    pub outputs: *mut c_void,
    /// Bytes from one output row to the next.
    pub row_bytes: usize,
    /// An xcclA2EEnd_t: when it is not xcclA2EGoesOn the loop is over and there is no micro-batch.
    pub end: u32,
    /// The domain.
    pub domain: u32,
    /// An xcclDataType_t: the element type of the rows.
    pub dtype: u32,
    /// An xcclWireFormat_t: how the token rows lie in their senders' memory.
    pub wire: u32,
}

/// A rank's side. What borrows from it is dropped before it.
enum Side {
    Attention { handle: NonNull<Attention>, sent: Vec<(Exchange<'static>, usize)> },
    Experts { handle: NonNull<Experts>, held: Vec<HeldBatch> },
}

/// A micro-batch that C works on, and its rows as C sees them.
struct HeldBatch {
    batch: DomainBatch<'static>,
    rows: Vec<xcclMoeRow_t>,
}

struct Held {
    rank: usize,
    role: String,
    side: Side,
}

const fn is_send<T: Send>() {}
const _: () = is_send::<Attention>();
const _: () = is_send::<Experts>();

// SAFETY: both handles may move to another thread, and what borrows from them moves along: all of it is reached through one lock.
// The addresses are only handed out.
unsafe impl Send for Held {}

impl Held {
    fn wrong_role(rank: usize, role: &str, call: &str, wanted: &str) -> Failure {
        Failure::usage(format!("{call} is for ranks that hold {wanted}: rank {rank} holds {role}"))
    }

    fn attention(&mut self, call: &str) -> Outcome<(&'static Attention, &mut Vec<(Exchange<'static>, usize)>)> {
        match &mut self.side {
            // SAFETY: made from a box by `xcclA2ECreate`, shared only, and freed by `drop` after all that borrows from it.
            Side::Attention { handle, sent } => Ok((unsafe { handle.as_ref() }, sent)),
            Side::Experts { .. } => Err(Self::wrong_role(self.rank, &self.role, call, "attention")),
        }
    }

    fn experts(&mut self, call: &str) -> Outcome<(&'static Experts, &mut Vec<HeldBatch>)> {
        match &mut self.side {
            // SAFETY: as in `attention`.
            Side::Experts { handle, held } => Ok((unsafe { handle.as_ref() }, held)),
            Side::Attention { .. } => Err(Self::wrong_role(self.rank, &self.role, call, "experts")),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        match &mut self.side {
            Side::Attention { handle, sent } => {
                sent.clear();
                // SAFETY: it came from a box, and all that borrowed from it is gone.
                drop(unsafe { Box::from_raw(handle.as_ptr()) });
            }
            Side::Experts { handle, held } => {
                held.clear();
                // SAFETY: as above.
                drop(unsafe { Box::from_raw(handle.as_ptr()) });
            }
        }
    }
}

/// What a handle points to.
// Spelt so that cbindgen does not see it: the header shows an opaque struct.
#[cfg_attr(all(), repr(C))]
pub struct xcclA2E {
    magic: Magic,
    inner: Mutex<Option<Held>>,
}

/// A handle of a group in which some ranks hold attention and others hold experts. Made by xcclA2ECreate, owned by the caller, given
/// back to xcclA2EDestroy. One thread at a time may use it, not always the same.
pub type xcclA2E_t = *mut xcclA2E;

impl Handle for xcclA2E {
    const MAGIC: u64 = u64::from_be_bytes(*b"XCCL a2e");
    const KIND: &'static str = "an A2E handle";

    fn magic(&self) -> &Magic {
        &self.magic
    }
}

/// # Safety
/// As for [`handle::shell`].
unsafe fn locked(a2e: xcclA2E_t) -> Outcome<(&'static xcclA2E, MutexGuard<'static, Option<Held>>)> {
    // SAFETY: the caller's promise.
    let shell = unsafe { handle::shell(a2e, "a2e") }?;
    match shell.inner.try_lock() {
        Ok(inner) => Ok((shell, inner)),
        // A panic has left the exchanges as they were; what is there can still be dropped, and is checked by each call.
        Err(TryLockError::Poisoned(poisoned)) => Ok((shell, poisoned.into_inner())),
        Err(TryLockError::WouldBlock) => {
            Err(Failure::usage("another thread is in a call with a2e: one at a time may use it"))
        }
    }
}

/// # Safety
/// As for [`handle::shell`].
unsafe fn with_held<T>(a2e: xcclA2E_t, body: impl FnOnce(&mut Held) -> Outcome<T>) -> Outcome<T> {
    // SAFETY: the caller's promise.
    let (_, mut inner) = unsafe { locked(a2e) }?;
    body(inner.as_mut().ok_or_else(|| handle::destroyed::<xcclA2E>("a2e"))?)
}

const NO_A2E_CONFIG: xcclA2EConfig_t =
    xcclA2EConfig_t { size: 0, roles: null(), moe: null(), trampolines: 0, forward: 0 };

/// The configuration, and this rank's place among the roles.
fn roles_of(roles: &[i32], moe: MoeConfig) -> Outcome<RoleConfig> {
    let domains = roles.iter().copied().max().unwrap_or(-1) + 1;
    if let Some((rank, role)) = roles.iter().enumerate().find(|(_, role)| **role < -1) {
        return Err(Failure::argument(format!(
            "config->roles[{rank}] is {role}: expected a domain's number, or -1 for a rank that holds experts"
        )));
    }
    if domains as usize > roles.len() {
        let text = format!("config->roles names domain {}: domains are counted without gaps", domains - 1);
        return Err(Failure::argument(text));
    }
    let named = |role: i32| (0..roles.len()).filter(move |&rank| roles[rank] == role).collect::<Vec<_>>();
    Ok(RoleConfig::new((0..domains).map(named), named(-1), moe))
}

/// Makes this rank's handle of a group of attention and expert ranks and writes it to *a2e; *a2e is left as it is on failure. Every
/// rank of comm must call it, with the same configuration (xcclJoinFailed on every rank otherwise). xcclInvalidArgument on every rank
/// for one that cannot be, such as an expert that is placed on a rank that holds attention. Blocks until all have called.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclA2ECreate(
    a2e: *mut xcclA2E_t,
    comm: xcclComm_t,
    config: *const xcclA2EConfig_t,
) -> xcclResult_t {
    guard("xcclA2ECreate", || {
        // SAFETY: C's promise about its pointers and handles; any bits are a configuration, to be checked.
        unsafe {
            let out = Out::new(a2e, "a2e")?;
            let config = sized(config, NO_A2E_CONFIG, "config")?;
            let moe = sized(config.moe, NO_CONFIG, "config->moe")?;
            let forward = match config.forward {
                f if f == xcclForward_t::xcclForwardAuto as u32 => Forward::Auto,
                f if f == xcclForward_t::xcclForwardFlat as u32 => Forward::Flat,
                f if f == xcclForward_t::xcclForwardTrampoline as u32 => Forward::Trampoline,
                other => {
                    return Err(Failure::argument(format!(
                        "config->forward is {other}: expected xcclForwardAuto (0), xcclForwardFlat (1) or xcclForwardTrampoline (2)"
                    )));
                }
            };
            let held = with(comm, |live| {
                let (comm, trampolines) = (&live.comm, config.trampolines);
                let roles = slice(config.roles, comm.world_size(), "config->roles")?;
                let moe = config_of(&moe, comm.world_size())?;
                let config = RoleConfig { forward, trampolines, ..roles_of(roles, moe)? };
                let role = config.role_of(comm.rank()).map_or_else(String::new, |role| role.to_string());
                // Not a Box: moving that would claim that nothing borrows from its contents.
                let side = match roles[comm.rank()] {
                    -1 => {
                        let handle = NonNull::from(Box::leak(Box::new(Experts::new(comm, config)?)));
                        Side::Experts { handle, held: vec![] }
                    }
                    _ => {
                        let handle = NonNull::from(Box::leak(Box::new(Attention::new(comm, config)?)));
                        Side::Attention { handle, sent: vec![] }
                    }
                };
                Ok(Held { rank: comm.rank(), role, side })
            })?;
            let shell = xcclA2E { magic: Magic::of::<xcclA2E>(), inner: Mutex::new(Some(held)) };
            out.set(handle::hand_out(shell));
            Ok(())
        }
    })
}

/// Gives the handle up: any further use of it is xcclInvalidArgument. An attention rank says by it that it is done; when all have, the
/// experts' loops end. A micro-batch that an expert rank has not sent back is given up, which its attention ranks learn of
/// (xcclRemoteError). Blocks, up to the deadline, while other ranks still need what this one passes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclA2EDestroy(a2e: xcclA2E_t) -> xcclResult_t {
    guard("xcclA2EDestroy", || {
        // SAFETY: C's promise about its handles.
        let (shell, mut inner) = unsafe { locked(a2e) }?;
        let held = inner.take().ok_or_else(|| handle::destroyed::<xcclA2E>("a2e"))?;
        shell.magic().clear();
        drop(held);
        Ok(())
    })
}

/// Attention: sends the tokens of a micro-batch to the experts and names it in *exchange. Every attention rank of the domain calls
/// it for every micro-batch, perhaps with no tokens; two may be under way. The arrays may be used again when it returns. Blocks only
/// until the micro-batch before the last was consumed, up to the deadline.
///
/// Bad input is xcclInvalidArgument and nothing is sent; expert ranks are told (xcclPeerRefused) and wait for the corrected one.
/// xcclInvalidUsage on a rank that holds experts, or for a third micro-batch; xcclRemoteError when an expert rank's loop has ended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclA2ESend(
    input: *const xcclMoeInput_t,
    exchange: *mut xcclExchange_t,
    a2e: xcclA2E_t,
) -> xcclResult_t {
    guard("xcclA2ESend", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(a2e, |held| {
                let (attention, sent) = held.attention("xcclA2ESend")?;
                let begun = Out::new(exchange, "exchange").and_then(|out| {
                    let input = sized(input, NO_INPUT, "input")?;
                    Ok((out, by_dtype!(attention, send(attention, &input))?))
                });
                let (out, (one, tokens)) = begun.inspect_err(|failure| {
                    // The library has not seen this input: hand it one that it refuses, and it tells those who wait.
                    if failure.is_of_arguments() {
                        by_dtype!(attention, refuse(attention));
                    }
                })?;
                out.set(one.epoch());
                sent.push((one, tokens));
                Ok(())
            })
        }
    })
}

fn refuse<E: Element>(attention: &Attention) {
    let _ = attention.a2e_send::<E, i32>(&[], &Routing::new(&[], &[0.0]));
}

/// # Safety
/// The input's pointers are null or good for the sizes that [`xcclMoeInput_t`] gives.
unsafe fn send<E: Element>(
    attention: &'static Attention,
    input: &xcclMoeInput_t,
) -> Outcome<(Exchange<'static>, usize)> {
    // SAFETY: the caller's promise.
    unsafe {
        match input.ids_type {
            i if i == xcclDataType_t::xcclInt32 as u32 => send_with::<E, i32>(attention, input),
            i if i == xcclDataType_t::xcclInt64 as u32 => send_with::<E, i64>(attention, input),
            other => {
                Err(Failure::argument(format!("input->ids_type is {other}: expected xcclInt32 (2) or xcclInt64 (4)")))
            }
        }
    }
}

/// # Safety
/// As for [`send`].
unsafe fn send_with<E: Element, I: ExpertId>(
    attention: &'static Attention,
    input: &xcclMoeInput_t,
) -> Outcome<(Exchange<'static>, usize)> {
    let (config, tokens) = (attention.config(), input.num_tokens);
    if tokens > config.max_tokens {
        // Before slices are made of memory that may not be there.
        return Err(xccl::Error::TooManyTokens { given: tokens, limit: config.max_tokens }.into());
    }
    // Products of checked values: at most 2^20 tokens times 2^20 elements.
    let (elements, choices) = (tokens * config.hidden, tokens * config.topk);
    // SAFETY: the caller's promise.
    unsafe {
        let rows = slice(input.tokens.cast::<E>(), elements, "input->tokens")?;
        let ids = slice(input.topk_ids.cast::<I>(), choices, "input->topk_ids")?;
        let routing = Routing::new(ids, slice(input.topk_weights, choices, "input->topk_weights")?);
        let sent = match input.active.is_null() {
            true => attention.a2e_send(rows, &routing)?,
            false => {
                let active: Vec<bool> = slice(input.active, tokens, "input->active")?.iter().map(|&a| a != 0).collect();
                attention.a2e_send(rows, &routing.active(&active))?
            }
        };
        Ok((sent, tokens))
    }
}

/// Attention: receives the sums of a micro-batch, [num_tokens, hidden], as xcclMoeCombineRecv. Those under way may be received in
/// either order. Blocks until the expert ranks that had tokens of this one have sent them back, up to the deadline. After any result
/// but xcclInvalidArgument and xcclInvalidUsage the micro-batch is over.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclE2ARecv(exchange: xcclExchange_t, out: *mut c_void, a2e: xcclA2E_t) -> xcclResult_t {
    guard("xcclE2ARecv", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(a2e, |held| {
                let (attention, sent) = held.attention("xcclE2ARecv")?;
                by_dtype!(attention, take_sums(attention, sent, exchange, out))
            })
        }
    })
}

/// # Safety
/// As for [`xcclE2ARecv`].
unsafe fn take_sums<E: Element>(
    attention: &'static Attention,
    sent: &mut Vec<(Exchange<'static>, usize)>,
    exchange: xcclExchange_t,
    out: *mut c_void,
) -> Outcome {
    let place = sent.iter().position(|(one, _)| one.epoch() == exchange).ok_or_else(|| {
        Failure::argument(format!("exchange ({exchange}) is not under way: it was never sent, or is over"))
    })?;
    let elements = sent[place].1 * attention.config().hidden;
    // SAFETY: the caller's promise.
    let out = unsafe { slice_mut(out.cast::<E>(), elements, "out") }?;
    let (one, _) = sent.swap_remove(place);
    Ok(attention.e2a_recv(one, out)?)
}

/// Attention: ends the loops of all expert ranks at once, without waiting for other attention ranks, whose micro-batches under way are
/// given up (xcclRemoteError). The handle is given up as by xcclA2EDestroy. xcclInvalidUsage on a rank that holds experts. Does not
/// block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclA2EShutDown(a2e: xcclA2E_t) -> xcclResult_t {
    guard("xcclA2EShutDown", || {
        // SAFETY: C's promise about its handles.
        let (shell, mut inner) = unsafe { locked(a2e) }?;
        let held = inner.as_mut().ok_or_else(|| handle::destroyed::<xcclA2E>("a2e"))?;
        held.attention("xcclA2EShutDown")?.0.ask_to_end();
        shell.magic().clear();
        drop(inner.take());
        Ok(())
    })
}

const NO_BATCH: xcclA2EBatch_t = xcclA2EBatch_t {
    size: size_of::<xcclA2EBatch_t>(),
    exchange: 0,
    num_rows: 0,
    local_experts: 0,
    counts: null(),
    offsets: null(),
    rows: null(),
    outputs: null_mut(),
    row_bytes: 0,
    end: xcclA2EEnd_t::xcclA2EGoesOn as u32,
    domain: 0,
    dtype: 0,
    wire: 0,
};

/// Experts: receives the next micro-batch of any domain and describes it in *batch; the rows stay in the attention ranks' memory.
/// Domains take turns. When the loop is over, now and from then on, batch->end says why. Two micro-batches of each domain may be out.
/// Blocks until one is complete, up to the deadline; may be called again after xcclTimeout and after xcclPeerRefused, which names an
/// attention rank whose input was bad. xcclRemoteError for a domain that one of its ranks has left: the others go on.
/// xcclInvalidUsage on a rank that holds attention.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclA2ERecv(batch: *mut xcclA2EBatch_t, a2e: xcclA2E_t) -> xcclResult_t {
    guard("xcclA2ERecv", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = SizedOut::new(batch, "batch")?;
            with_held(a2e, |held| {
                let (experts, held) = held.experts("xcclA2ERecv")?;
                let (config, local_experts) = (experts.config(), experts.local_experts().len());
                let Some(mut batch) = experts.a2e_recv()? else {
                    let end = match experts.ended() {
                        Some(Ended::ShutDown { .. }) => xcclA2EEnd_t::xcclA2EWasShutDown,
                        Some(Ended::Aborted { .. }) => xcclA2EEnd_t::xcclA2EAborted,
                        _ => xcclA2EEnd_t::xcclA2EDone,
                    };
                    out.set(xcclA2EBatch_t { end: end as u32, ..NO_BATCH });
                    return Ok(());
                };
                let rows: Vec<_> = batch.addresses().map(describe(experts.scales_offset())).collect();
                out.set(xcclA2EBatch_t {
                    exchange: batch.epoch(),
                    num_rows: rows.len(),
                    local_experts,
                    counts: batch.counts().as_ptr(),
                    offsets: batch.offsets().as_ptr(),
                    rows: rows.as_ptr(),
                    outputs: rows.first().map_or(null_mut(), |row| row.output),
                    row_bytes: experts.row_stride() * config.dtype.size(),
                    domain: batch.domain() as u32,
                    dtype: dtype_of(config.dtype) as u32,
                    wire: number_of(config.wire),
                    ..NO_BATCH
                });
                held.push(HeldBatch { batch, rows });
                Ok(())
            })
        }
    })
}

/// Experts: sends the outputs of a domain's micro-batch back. outputs: [num_rows, hidden] in the batch's order, copied once (or
/// summed on the way, with xcclReducePerRank), or XCCL_IN_PLACE when they were written to rows[i].output. Micro-batches may be sent
/// back in any order. Does not block. xcclInvalidArgument and xcclInvalidUsage change nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclE2ASend(
    domain: usize,
    exchange: xcclExchange_t,
    outputs: *const c_void,
    a2e: xcclA2E_t,
) -> xcclResult_t {
    guard("xcclE2ASend", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(a2e, |held| {
                let (experts, held) = held.experts("xcclE2ASend")?;
                by_dtype!(experts, hand_over(experts, held, (domain, exchange), outputs))
            })
        }
    })
}

/// # Safety
/// As for [`xcclE2ASend`].
unsafe fn hand_over<E: Element>(
    experts: &'static Experts,
    held: &mut Vec<HeldBatch>,
    (domain, exchange): (usize, xcclExchange_t),
    outputs: *const c_void,
) -> Outcome {
    let is_it = |one: &HeldBatch| one.batch.domain() == domain && one.batch.epoch() == exchange;
    let place = held.iter().position(is_it).ok_or_else(|| {
        let text = format!("exchange ({exchange}) of domain {domain} was not received, or was sent back already");
        Failure::argument(text)
    })?;
    let elements = held[place].rows.len() * experts.config().hidden;
    let from = match outputs.addr() {
        XCCL_IN_PLACE => None,
        XCCL_SUMMED => {
            return Err(Failure::usage("outputs is XCCL_SUMMED: sums of an A2E handle are formed by the library"));
        }
        // SAFETY: the caller's promise.
        _ => Some(unsafe { slice(outputs.cast::<E>(), elements, "outputs") }?),
    };
    let one = held.swap_remove(place).batch;
    match from {
        None => Ok(experts.e2a_send(one)?),
        Some(outputs) => Ok(experts.e2a_send_from(one, outputs)?),
    }
}
