//! MoE handles and what C sees of an exchange. The four halves are in [`halves`], the joined calls in [`joined`].

mod device;
mod epilogue;
mod halves;
mod joined;
mod lanes;
mod placement;
mod wire;

pub use device::*;
pub use epilogue::*;
pub use halves::*;
pub(crate) use halves::{NO_INPUT, XCCL_IN_PLACE, XCCL_SUMMED, dtype_of};
pub use joined::*;
pub use lanes::*;
pub use placement::*;
pub(crate) use wire::number_of;
pub use wire::*;

use std::ffi::c_void;
use std::ptr::{NonNull, null};
use std::sync::{Mutex, MutexGuard, TryLockError};

use half::{bf16, f16};
use xccl::placement::Placement;
use xccl::{
    Arrivals, BatchRow, ConstantExperts, DType, Exchange, ExpertBatch, InputRows, Moe, MoeConfig, Reduction,
    SmoothScales, WireRows,
};

use crate::boundary::{Failure, Out, Outcome, guard, natural, sized, slice};
use crate::comm::{with, xcclComm_t};
use crate::handle::{self, Handle, Magic};
use crate::result::xcclResult_t;

/// Calls a function that is generic over the element type with that of a handle.
macro_rules! by_dtype {
    ($moe:expr, $function:ident($($argument:expr),*)) => {
        match $moe.config().dtype {
            xccl::DType::F32 => $function::<f32>($($argument),*),
            xccl::DType::F16 => $function::<half::f16>($($argument),*),
            xccl::DType::BF16 => $function::<half::bf16>($($argument),*),
        }
    };
}

pub(crate) use by_dtype;

/** Types of elements. The numbers are fixed, and NCCL's. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclDataType_t {
    /// Unsigned integer, 1 byte, or any byte: for collectives.
    xcclUint8 = 1,
    /// Signed integer, 4 bytes: for expert ids and collectives.
    xcclInt32 = 2,
    /// Signed integer, 8 bytes: for expert ids and collectives.
    xcclInt64 = 4,
    /// IEEE 754 half precision, 2 bytes: for rows and collectives.
    xcclFloat16 = 6,
    /// IEEE 754 single precision, 4 bytes: for rows and collectives.
    xcclFloat32 = 7,
    /// bfloat16, 2 bytes: for rows and collectives.
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

/// The shape of a MoE handle's exchanges. Equal on all ranks. Set it to XCCL_MOE_CONFIG_INITIALIZER, then its fields.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclMoeConfig_t {
    /// sizeof(xcclMoeConfig_t).
    pub size: usize,
    /// Most tokens of one rank in one exchange, 1 to 1048576.
    pub max_tokens: usize,
    /// Elements of a token row, 1 to 1048576.
    pub hidden: usize,
    /// Experts that a token may name, 1 to 64 (less with shared experts), and at most as many as there are.
    pub topk: usize,
    /// Routed experts over all ranks, 1 to 65536, however many replicas they have.
    pub experts: usize,
    /// An xcclDataType_t: the element type of the rows.
    pub dtype: u32,
    /// An xcclReduction_t.
    pub reduction: u32,
    /// [experts], the rank that holds each expert, read during xcclMoeCreate; null: rank r holds a contiguous block,
    /// experts / nranks of them, the first experts % nranks ranks one more.
    pub placement: *const i32,
    /// Most rows that may arrive for one rank's experts in one exchange; 0 makes room for the worst case. Memory is used as
    /// it is touched.
    pub max_expert_rows: usize,
    /// [experts, hidden], shared ones last, read during xcclMoeCreate: what a row for each expert is multiplied by before it is quantized, with
    /// xcclWireInt8 only; a row is then written for each choice. Null: nothing.
    pub smooth: *const f32,
    /// An xcclWireFormat_t: how token rows travel.
    pub wire: u32,
    /// Most slots of a rank, in this and later placements (xcclMoeInstall); 0: no more than the first one has.
    pub slots: usize,
    /// [nranks, slots], read during xcclMoeCreate, in place of placement: the logical expert in each slot of each rank, -1 after
    /// a rank's last; an expert in several slots has replicas, which its tokens rotate over. The shared expert s is experts + s.
    /// Null: see placement; then every rank has a replica of each shared expert.
    pub slot_experts: *const i32,
    /// Experts that every token goes to, without naming them, with the factor 1.
    pub shared_experts: usize,
    /// Experts that need no slot, whose ids begin at experts: zero experts give nothing, copy experts the token, constant ones
    /// token factor * token + vector factor * vector.
    pub zero_experts: usize,
    /// See zero_experts. Where rows travel encoded, combine needs the tokens for them (xcclMoeEpilogue_t).
    pub copy_experts: usize,
    /// See zero_experts.
    pub constant_experts: usize,
    /// [constant_experts, hidden], read during xcclMoeCreate, rounded to the element type.
    pub constant_vectors: *const f32,
    /// [constant_experts], read during xcclMoeCreate; null: 0, the token has no part in it.
    pub constant_token_factors: *const f32,
    /// [constant_experts], read during xcclMoeCreate; null: 1.
    pub constant_vector_factors: *const f32,
}

/// The tokens of one exchange. Set it to XCCL_MOE_INPUT_INITIALIZER, then its fields. It may be used again, also with other
/// tokens: a routing serves as many exchanges as you like.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclMoeInput_t {
    /// sizeof(xcclMoeInput_t).
    pub size: usize,
    /// [num_tokens, hidden], elements of the handle's type, aligned to the element; copied once. Null: they lie in the rows
    /// that xcclMoeInputRows gave.
    pub tokens: *const c_void,
    /// 0 to max_tokens, may differ on every rank.
    pub num_tokens: usize,
    /// [num_tokens, topk], ids of experts, different within a token, or -1 for none.
    pub topk_ids: *const c_void,
    /// [num_tokens, topk], the factors that the combine applies.
    pub topk_weights: *const f32,
    /// [num_tokens], 0 for tokens that go nowhere (their sums are zeros); null when all go.
    pub active: *const u8,
    /// xcclInt32 or xcclInt64: the type of topk_ids.
    pub ids_type: u32,
}

/// One row that an expert of this rank is to work on. The struct is fixed: kernels walk arrays of it (xccl_device.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct xcclMoeRow_t {
    /// The token in its sender's memory, aligned to 64 bytes: hidden elements, or hidden codes of the handle's wire format. For
    /// reading only: a store to another rank's memory is a fault.
    pub token_data: *const c_void,
    /// The codes' scales, as many as the wire format has for a row, for reading only; null with xcclWireNative.
    pub scales: *const f32,
    /// Where the expert's output goes, hidden elements in this rank's memory, aligned to 64 bytes.
    pub output: *mut c_void,
    /// The slot: an index among this rank's experts.
    pub expert: u32,
    /// The rank that sent it.
    pub source: u32,
    /// The token's index there.
    pub token: u32,
    /// The expert's factor in the token's sum.
    pub weight: f32,
}

/// What arrived for this rank's experts in one exchange. Set it to XCCL_MOE_BATCH_INITIALIZER. What it points to belongs to the
/// handle and is good until the exchange's xcclMoeCombineSend or xcclMoeGiveUp.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct xcclMoeBatch_t {
    /// sizeof(xcclMoeBatch_t).
    pub size: usize,
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
    /// [num_rows, row_bytes], the outputs of all rows in their order, as one matrix: what rows[i].output points into. Null when
    /// the exchange was received source by source, since the outputs then lie in the order of arrival.
    pub outputs: *mut c_void,
    /// Bytes from one output row to the next: hidden elements, rounded up to 64 bytes.
    pub row_bytes: usize,
    /// Elements of a row.
    pub hidden: usize,
    /// An xcclDataType_t: the element type of the rows.
    pub dtype: u32,
    /// An xcclWireFormat_t: how the token rows lie in their senders' memory.
    pub wire: u32,
    /// Scales of one token row.
    pub row_scales: usize,
    /// [local_experts], the logical expert in each slot; from the number of routed experts on they are shared ones.
    pub experts: *const usize,
}

/// The sum that one token of one source gets from this rank.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct xcclMoeSum_t {
    /// Where it goes, hidden elements in this rank's memory, aligned to 64 bytes.
    pub output: *mut c_void,
    /// [num_rows], the rows of the batch that belong to it, ascending.
    pub rows: *const u32,
    /// How many these are, at least 1.
    pub num_rows: u32,
    /// The rank that sent the token.
    pub source: u32,
    /// The token's index there.
    pub token: u32,
    /// 0.
    pub reserved: u32,
}

/// Names an exchange of a MoE handle: its number, from 1, the same on all ranks.
pub type xcclExchange_t = u64;

/// One exchange, as far as it has come. What borrows from the `Moe` is dropped before it.
struct Flight {
    epoch: u64,
    arrived: Arrived,
    sent: Option<Exchange<'static>>,
    tokens: usize,
    /// Slots of this rank.
    local: usize,
    described: Described,
}

/// What C was told of an exchange's rows and sums.
#[derive(Default)]
struct Described {
    rows: Vec<xcclMoeRow_t>,
    sums: Vec<xcclMoeSum_t>,
    sum_rows: Vec<u32>,
}

enum Arrived {
    Nothing,
    Some(Arrivals<'static>),
    All(ExpertBatch<'static>),
    Combined,
}

/// Rows of the outbox that C was given.
enum AnyRows {
    F32(InputRows<'static, f32>),
    F16(InputRows<'static, f16>),
    Bf16(InputRows<'static, bf16>),
    Wire(WireRows<'static>),
}

impl Flight {
    fn batch(&mut self) -> Outcome<&mut ExpertBatch<'static>> {
        match &mut self.arrived {
            Arrived::All(batch) => Ok(batch),
            Arrived::Combined => Err(Failure::usage(format!("exchange {} was combined already", self.epoch))),
            Arrived::Nothing | Arrived::Some(_) => {
                Err(Failure::usage(format!("exchange {} was not received: call xcclMoeDispatchRecv first", self.epoch)))
            }
        }
    }

    fn take_batch(&mut self) -> Outcome<ExpertBatch<'static>> {
        self.batch()?;
        match std::mem::replace(&mut self.arrived, Arrived::Combined) {
            Arrived::All(batch) => Ok(batch),
            _ => Err(Failure::usage("no batch")),
        }
    }
}

/// Rows as C sees them; `scales` says where in a row they are.
pub(crate) fn describe(scales: Option<usize>) -> impl Fn((BatchRow, *const u8, *mut u8)) -> xcclMoeRow_t {
    move |(row, data, output)| xcclMoeRow_t {
        token_data: data.cast(),
        scales: scales.map_or(null(), |offset| data.wrapping_add(offset).cast()),
        output: output.cast(),
        expert: row.expert as u32,
        source: row.source as u32,
        token: row.token as u32,
        weight: row.weight,
    }
}

/// A `Moe` with the exchanges that C has begun.
struct Held {
    moe: NonNull<Moe>,
    rank: usize,
    // These borrow from `moe`, which stays where it is; `drop` ends them first.
    flights: Vec<Flight>,
    input_rows: Option<AnyRows>,
    /// The exchange of the joined calls, and whether its rows were copied to the caller: combine comes next.
    joined: Option<(u64, bool)>,
    /// Descriptors of exchanges that are over, for the next ones.
    spare: Vec<Described>,
    /// Room for the tokens that go.
    active: Vec<bool>,
}

const fn is_send<T: Send>() {}
const _: () = is_send::<Moe>();

// SAFETY: a `Moe` may move to another thread, and what borrows from it moves along: all of it is reached through one lock. The
// addresses are only handed out.
unsafe impl Send for Held {}

impl Held {
    fn new(moe: Moe, rank: usize) -> Self {
        // Not a Box: moving that would claim that nothing borrows from its contents.
        let moe = NonNull::from(Box::leak(Box::new(moe)));
        Held { moe, rank, flights: vec![], input_rows: None, joined: None, spare: vec![], active: vec![] }
    }

    /// The handle, for as long as `self` keeps it: the lifetime is longer than the truth, and no borrow with it is stored
    /// anywhere but in `self`.
    fn moe(&self) -> &'static Moe {
        // SAFETY: made from a box by `new`, shared only, and freed by `drop` after all that borrows from it.
        unsafe { self.moe.as_ref() }
    }

    /// Slots of this rank, by the placement of the next exchange.
    fn local(&self) -> Outcome<usize> {
        Ok(self.moe().slots_of(self.rank)?)
    }

    fn place(&self, exchange: xcclExchange_t) -> Outcome<usize> {
        self.flights.iter().position(|flight| flight.epoch == exchange).ok_or_else(|| {
            Failure::argument(format!("exchange ({exchange}) is not under way: it was never sent, or is over"))
        })
    }

    fn flight(&mut self, exchange: xcclExchange_t) -> Outcome<&mut Flight> {
        let at = self.place(exchange)?;
        Ok(&mut self.flights[at])
    }

    /// Takes an exchange out, keeping what can be used again.
    fn end(&mut self, exchange: xcclExchange_t) -> Outcome<Flight> {
        let mut flight = self.flights.swap_remove(self.place(exchange)?);
        self.spare.push(std::mem::take(&mut flight.described));
        self.joined = self.joined.filter(|&(epoch, _)| epoch != exchange);
        Ok(flight)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.flights.clear();
        self.input_rows = None;
        // SAFETY: it came from a box, and all that borrowed from it is gone.
        drop(unsafe { Box::from_raw(self.moe.as_ptr()) });
    }
}

/// What a MoE handle points to.
// Spelt so that cbindgen does not see it: the header shows an opaque struct.
#[cfg_attr(all(), repr(C))]
pub struct xcclMoe {
    magic: Magic,
    inner: Mutex<Option<Held>>,
    gate: Gate,
}

/// A handle for the exchanges of one MoE shape over one communicator. Made by xcclMoeCreate, owned by the caller, given back
/// to xcclMoeDestroy. One thread at a time may use it, not always the same. Two exchanges may be under way.
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

pub(crate) const NO_CONFIG: xcclMoeConfig_t = xcclMoeConfig_t {
    size: 0,
    max_tokens: 0,
    hidden: 0,
    topk: 0,
    experts: 0,
    dtype: 0,
    reduction: 0,
    placement: null(),
    max_expert_rows: 0,
    smooth: null(),
    wire: 0,
    slots: 0,
    slot_experts: null(),
    shared_experts: 0,
    zero_experts: 0,
    copy_experts: 0,
    constant_experts: 0,
    constant_vectors: null(),
    constant_token_factors: null(),
    constant_vector_factors: null(),
};

/// # Safety
/// The placement is null, or has an entry for each expert; so have the smooth scales, for each channel.
pub(crate) unsafe fn config_of(config: &xcclMoeConfig_t, nranks: usize) -> Outcome<MoeConfig> {
    let xcclMoeConfig_t { max_tokens, hidden, topk, experts, dtype, reduction, placement, max_expert_rows, .. } =
        *config;
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
    let mut made = MoeConfig { reduction, ..MoeConfig::new(max_tokens, hidden, topk, experts, dtype) };
    made.max_expert_rows = (max_expert_rows > 0).then_some(max_expert_rows);
    made.slots = (config.slots > 0).then_some(config.slots);
    made.shared = config.shared_experts;
    (made.zero, made.copy) = (config.zero_experts, config.copy_experts);
    if config.shared_experts > MOST_SHARED {
        let text = format!("config->shared_experts is {}: expected 0 to {MOST_SHARED}", config.shared_experts);
        return Err(Failure::argument(text));
    }
    let all = experts.saturating_add(config.shared_experts);
    if !config.slot_experts.is_null() && (1..=MOST_EXPERTS).contains(&experts) {
        if !placement.is_null() {
            return Err(Failure::argument("config->placement and config->slot_experts are both given: expected one"));
        }
        // SAFETY: the caller's promise.
        let made_of = unsafe { placement_of(config.slot_experts, (nranks, config.slots), all, "config->slot_experts") };
        made.placement = Some(made_of?);
    } else if !placement.is_null() && (1..=MOST_EXPERTS).contains(&experts) {
        // SAFETY: the caller's promise.
        let ranks = unsafe { slice(placement, experts, "config->placement") }?.iter().enumerate();
        let rank = |(i, &rank)| natural(rank, &format!("config->placement[{i}]"), format_args!("a rank"));
        let ranks = ranks.map(rank).collect::<Outcome<Vec<usize>>>()?;
        let everywhere = vec![(0..nranks).collect(); config.shared_experts];
        made.placement = Some(Placement::of_ranks(&ranks, nranks)?.with_shared(&everywhere)?);
    }
    let constants = config.constant_experts;
    if constants > 0 {
        if constants > MOST_EXPERTS || !(1..=MOST_HIDDEN).contains(&hidden) {
            return Err(Failure::argument(format!(
                "config->constant_experts is {constants} with hidden {hidden}: expected 0 to {MOST_EXPERTS}, hidden 1 to {MOST_HIDDEN}"
            )));
        }
        let factors = |at: *const f32, name, otherwise: f32| match at.is_null() {
            true => Ok(vec![otherwise; constants]),
            // SAFETY: the caller's promise.
            false => Ok::<_, Failure>(unsafe { slice(at, constants, name) }?.to_vec()),
        };
        let of_tokens = factors(config.constant_token_factors, "config->constant_token_factors", 0.0)?;
        let of_vectors = factors(config.constant_vector_factors, "config->constant_vector_factors", 1.0)?;
        // SAFETY: the caller's promise.
        let vectors = unsafe { slice(config.constant_vectors, constants * hidden, "config->constant_vectors") }?;
        made.constant = Some(ConstantExperts::new(vectors).factors(of_tokens, of_vectors));
    }
    made.wire = wire_of(config.wire)?;
    if !config.smooth.is_null() && (1..=MOST_EXPERTS).contains(&experts) && (1..=MOST_HIDDEN).contains(&hidden) {
        // SAFETY: the caller's promise.
        let smooth = unsafe { slice(config.smooth, all * hidden, "config->smooth") }?;
        made.smooth = Some(SmoothScales::new(smooth));
    }
    Ok(made)
}

/// As the library's own limit: what is larger is refused by it, without a look at the placement.
const MOST_EXPERTS: usize = 1 << 16;
const MOST_HIDDEN: usize = 1 << 20;
const MOST_SHARED: usize = 63;

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
            let config = sized(config, NO_CONFIG, "config")?;
            let held = with(comm, |live| {
                let moe = Moe::new(&live.comm, config_of(&config, live.comm.world_size())?)?;
                Ok(Held::new(moe, live.comm.rank()))
            });
            (out, held?)
        };
        let (out, held) = made;
        let shell = xcclMoe { magic: Magic::of::<xcclMoe>(), inner: Mutex::new(Some(held)), gate: Gate::default() };
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

/// Writes the number of slots of this rank, by the placement of the next exchange, to *local_experts: the experts that it holds.
/// Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeLocalExperts(moe: xcclMoe_t, local_experts: *mut usize) -> xcclResult_t {
    guard("xcclMoeLocalExperts", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, value) = unsafe {
            let out = Out::new(local_experts, "local_experts")?;
            (out, with_held(moe, |held| held.local())?)
        };
        out.set(value);
        Ok(())
    })
}
