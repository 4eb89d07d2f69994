//! Nothing of an exchange's or a short message's way allocates, once its memory is there: counted in every mode, in Rust and C.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::Arc;

use half::bf16;
use xccl::{
    Collective, DType, Epilogue, Exchange, KvConfig, KvOutcome, KvReceiver, KvSender, KvSenderEvent, Lanes, Moe,
    MoeConfig, PageLayout, PagePair, ReduceOp, Reduction, Residual, Result, RmsNorm, Routing, ScaleLayout,
    SmoothScales, Until, Update, WireFormat,
};
use xccl_c::*;
use xccl_tests::as_threads;

/// The system's allocator, which counts what a thread asks for.
struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    // A thread that ends has no counter any more.
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: the system's allocator does it all.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise, handed on; so it is below.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const WARM_UP: usize = 4;
const ROUNDS: usize = 6;

/// Allocations of this thread in the rounds after the first ones.
fn counted(mut round: impl FnMut()) -> u64 {
    (0..WARM_UP).for_each(|_| round());
    let before = COUNT.get();
    (0..ROUNDS).for_each(|_| round());
    COUNT.get() - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(counted(|| drop(std::hint::black_box(Box::new(7)))), ROUNDS as u64);
}

/// Lanes that are called one after another: what they do is what counts here.
struct InTurn;

impl Lanes for InTurn {
    fn run(&self, lanes: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..lanes).for_each(work);
    }
}

const TOKENS: usize = 64;
const HIDDEN: usize = 4096;
const TOPK: usize = 4;
const EXPERTS: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    InPlace,
    FromOutbox,
    ExpertMajor,
    Padded,
    BySource,
    OutputsFromBuffer,
    OutputsFromBufferBySource,
    Sums,
    Epilogue,
}

const MODES: [Mode; 9] = [
    Mode::InPlace,
    Mode::FromOutbox,
    Mode::ExpertMajor,
    Mode::Padded,
    Mode::BySource,
    Mode::OutputsFromBuffer,
    Mode::OutputsFromBufferBySource,
    Mode::Sums,
    Mode::Epilogue,
];

/// What one rank puts in, and room for what it gets out.
struct Buffers {
    tokens: Vec<bf16>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    active: Vec<bool>,
    rows: Vec<bf16>,
    normed: Vec<bf16>,
    out: Vec<bf16>,
}

impl Buffers {
    fn new(rank: usize, world: usize) -> Self {
        let one = bf16::from_f32(1.0);
        Buffers {
            tokens: vec![one; TOKENS * HIDDEN],
            ids: (0..TOKENS * TOPK).map(|i| ((i * 5 + i / TOPK + rank) % EXPERTS) as i32).collect(),
            weights: vec![0.25; TOKENS * TOPK],
            active: (0..TOKENS).map(|t| t % 7 != 3).collect(),
            rows: vec![one; EXPERTS * world * TOKENS * HIDDEN],
            normed: vec![one; TOKENS * HIDDEN],
            out: vec![one; TOKENS * HIDDEN],
        }
    }

    fn exchange(&mut self, moe: &Moe, mode: Mode) -> Result<()> {
        let routing = Routing::new(&self.ids, &self.weights).active(&self.active);
        let sent: Exchange<'_> = match mode {
            Mode::FromOutbox => {
                let mut rows = moe.input_rows::<bf16>(TOKENS)?;
                rows.row(0)[0] = bf16::ONE;
                moe.dispatch_send_rows(rows, &routing)?
            }
            _ => moe.dispatch_send(&self.tokens, &routing)?,
        };
        let mut batch = match mode {
            Mode::BySource | Mode::OutputsFromBufferBySource => {
                let mut arrivals = moe.dispatch_recv_by_source(&sent)?;
                while let Some(source) = arrivals.next_source()? {
                    for i in arrivals.rows_of(source) {
                        arrivals.output_row::<bf16>(i)?[0] = bf16::ONE;
                    }
                }
                arrivals.into_batch()?
            }
            _ => moe.dispatch_recv(&sent)?,
        };
        let rows = batch.len();
        assert!(rows > TOKENS, "{rows} rows");
        match mode {
            Mode::ExpertMajor => batch.copy_into(&mut self.rows, 4)?,
            Mode::Padded => {
                let most = batch.counts().iter().copied().max().unwrap_or(0);
                batch.copy_padded(&mut self.rows, most as usize)?;
            }
            Mode::InPlace => assert!(batch.rows().count() == rows && batch.addresses().count() == rows),
            _ => {}
        }
        match mode {
            Mode::OutputsFromBuffer | Mode::OutputsFromBufferBySource => {
                moe.combine_send_from(batch, &self.rows[..rows * HIDDEN])?;
            }
            Mode::Sums => {
                let sums = batch.sums().len();
                for i in 0..sums {
                    batch.sum_row::<bf16>(i)?[0] = bf16::ONE;
                }
                moe.combine_send_sums(batch)?;
            }
            _ => moe.combine_send(batch)?,
        }
        match mode {
            Mode::Epilogue => {
                let (bias, residual) = (Some(&self.tokens[..HIDDEN]), Residual::Rows(&self.tokens));
                let norm = RmsNorm { weight: &self.tokens[..HIDDEN], eps: 1e-6, out: &mut self.normed };
                moe.combine_recv_with(sent, &mut self.out, Epilogue { bias, residual, norm: Some(norm), tokens: None })
            }
            _ => moe.combine_recv(sent, &mut self.out),
        }
    }
}

fn config(reduction: Reduction) -> MoeConfig {
    MoeConfig { reduction, ..MoeConfig::new(TOKENS, HIDDEN, TOPK, EXPERTS, DType::BF16) }
}

#[test]
fn an_exchange_allocates_nothing_in_any_mode() {
    as_threads(2, |comm| {
        let mut buffers = Buffers::new(comm.rank(), comm.world_size());
        for reduction in [Reduction::PerExpert, Reduction::PerRank] {
            let moe = Moe::new(comm, config(reduction)).expect("a handle");
            for lanes in [1, 3] {
                moe.set_lanes(lanes, Arc::new(InTurn)).expect("a number of lanes");
                for mode in MODES.into_iter().filter(|&m| m != Mode::Sums || reduction == Reduction::PerRank) {
                    let allocations = counted(|| buffers.exchange(&moe, mode).expect("an exchange"));
                    assert_eq!(allocations, 0, "{mode:?}, {reduction:?}, {lanes} lanes");
                }
            }
        }
    });
}

#[test]
fn rows_that_travel_encoded_allocate_nothing() {
    as_threads(2, |comm| {
        let mut buffers = Buffers::new(comm.rank(), comm.world_size());
        let mut values = vec![0u8; buffers.rows.len()];
        let mut scales = vec![0.0f32; buffers.rows.len() / 64];
        let smooth = SmoothScales::new(vec![0.5; EXPERTS * HIDDEN]);
        for (wire, smooth) in [
            (WireFormat::Int8, None),
            (WireFormat::Int8, Some(smooth)),
            (WireFormat::Fp8E4m3, None),
            (WireFormat::Fp8E5m2, None),
        ] {
            let is_smooth = smooth.is_some();
            let moe = Moe::new(comm, MoeConfig { wire, smooth, ..config(Reduction::PerExpert) }).expect("a handle");
            for lanes in [1, 3] {
                moe.set_lanes(lanes, Arc::new(InTurn)).expect("a number of lanes");
                for mode in [Mode::InPlace, Mode::ExpertMajor, Mode::Padded] {
                    let allocations = counted(|| buffers.exchange(&moe, mode).expect("an exchange"));
                    assert_eq!(allocations, 0, "{mode:?}, {wire}, {lanes} lanes");
                }
                let mut from_outbox = || -> Result<()> {
                    let rows = moe.input_wire_rows(TOKENS)?;
                    let routing = Routing::new(&buffers.ids, &buffers.weights);
                    let sent = moe.dispatch_send_wire_rows(rows, &routing)?;
                    moe.combine_send(moe.dispatch_recv(&sent)?)?;
                    moe.combine_recv(sent, &mut buffers.out)
                };
                if !is_smooth {
                    assert_eq!(counted(|| from_outbox().expect("an exchange")), 0, "{wire} in the outbox");
                }
                for layout in [ScaleLayout::RowMajor, ScaleLayout::ColumnMajor] {
                    let mut kept = || -> Result<()> {
                        let sent = moe.dispatch_send(&buffers.tokens, &Routing::new(&buffers.ids, &buffers.weights))?;
                        let mut batch = moe.dispatch_recv(&sent)?;
                        batch.copy_wire_into(&mut values, &mut scales, layout, 4)?;
                        let most = batch.counts().iter().copied().max().unwrap_or(0);
                        batch.copy_wire_padded(&mut values, &mut scales, layout, most as usize)?;
                        moe.combine_send(batch)?;
                        moe.combine_recv(sent, &mut buffers.out)
                    };
                    let allocations = counted(|| kept().expect("an exchange"));
                    assert_eq!(allocations, 0, "{layout:?}, {wire}, {lanes} lanes");
                }
            }
        }
    });
}

#[test]
fn two_exchanges_in_flight_allocate_nothing() {
    as_threads(2, |comm| {
        let mut buffers = Buffers::new(comm.rank(), comm.world_size());
        let moe = Moe::new(comm, config(Reduction::PerExpert)).expect("a handle");
        let routing = (buffers.ids.clone(), buffers.weights.clone());
        let routing = Routing::new(&routing.0, &routing.1);
        let mut round = || -> Result<()> {
            let first = moe.dispatch_send(&buffers.tokens, &routing)?;
            let second = moe.dispatch_send(&buffers.tokens, &routing)?;
            moe.combine_send(moe.dispatch_recv(&first)?)?;
            moe.combine_send(moe.dispatch_recv(&second)?)?;
            moe.combine_recv(second, &mut buffers.out)?;
            moe.combine_recv(first, &mut buffers.out)
        };
        assert_eq!(counted(|| round().expect("two exchanges")), 0);
    });
}

#[test]
fn messages_in_lines_and_through_the_ring_allocate_nothing() {
    const LONGEST: usize = 30_000;
    as_threads(2, |comm| {
        let (rank, mut buffer) = (comm.rank(), [0; LONGEST]);
        let mut round = |len: usize| -> Result<()> {
            for turn in 0..2 {
                if turn == rank {
                    comm.send(1 - rank, 7, &[3; LONGEST][..len])?;
                } else {
                    comm.recv(1 - rank, 7, &mut buffer[..len])?;
                }
            }
            Ok(())
        };
        for len in [0, 8, 40, 500, 4096, LONGEST] {
            assert_eq!(counted(|| round(len).expect("two messages")), 0, "{len} bytes");
        }
    });
}

/// An exchange in C, in every form that it has there.
#[test]
fn the_calls_of_the_c_interface_allocate_nothing() {
    const CALLS: usize = 5;
    fn check(result: xcclResult_t) {
        assert_eq!(result, xcclResult_t::xcclSuccess);
    }
    unsafe extern "C" fn in_turn(_: *mut c_void, lanes: usize, work: xcclLaneWork_t, state: *mut c_void) {
        // SAFETY: the state that came with it.
        (0..lanes).for_each(|lane| unsafe { work(state, lane) });
    }

    let mut id = xcclUniqueId { internal: [0; XCCL_UNIQUE_ID_BYTES] };
    // SAFETY: a unique id may be written.
    check(unsafe { xcclGetUniqueId(&mut id) });
    let rank = |rank: i32| {
        let mut buffers = Buffers::new(rank as usize, 2);
        let active: Vec<u8> = buffers.active.iter().map(|&a| a.into()).collect();
        let (mut comm, mut moe) = (null_mut(), null_mut());
        let input = xcclMoeInput_t {
            size: size_of::<xcclMoeInput_t>(),
            tokens: buffers.tokens.as_ptr().cast(),
            num_tokens: TOKENS,
            topk_ids: buffers.ids.as_ptr().cast(),
            topk_weights: buffers.weights.as_ptr(),
            active: active.as_ptr(),
            ids_type: xcclDataType_t::xcclInt32 as u32,
        };
        let epilogue = xcclMoeEpilogue_t {
            size: size_of::<xcclMoeEpilogue_t>(),
            bias: buffers.tokens.as_ptr().cast(),
            residual: buffers.tokens.as_ptr().cast(),
            norm_weight: buffers.tokens.as_ptr().cast(),
            normed: buffers.normed.as_mut_ptr().cast(),
            eps: 1e-6,
            tokens: null(),
        };
        let (out, rows) = (buffers.out.as_mut_ptr(), buffers.rows.as_mut_ptr());
        let room = buffers.rows.len() / HIDDEN;
        let exchange = |call: usize, moe: xcclMoe_t, per_rank: bool| {
            let (mut exchange, mut source, mut n) = (0, 0, 0);
            let (mut arrived, mut sums) = (null(), null());
            let mut batch = xcclMoeBatch_t {
                size: size_of::<xcclMoeBatch_t>(),
                num_rows: 0,
                local_experts: 0,
                counts: null(),
                offsets: null(),
                rows: null(),
                outputs: null_mut(),
                row_bytes: 0,
                hidden: 0,
                dtype: 0,
                wire: 0,
                row_scales: 0,
                experts: null(),
            };
            // SAFETY: the buffers are as large as the calls are told, and the handle is good.
            unsafe {
                if call == 0 {
                    let mut counts = [0; EXPERTS];
                    let (tokens, ids) = (buffers.tokens.as_ptr().cast(), buffers.ids.as_ptr());
                    let weights = buffers.weights.as_ptr();
                    let counts = counts.as_mut_ptr();
                    check(xcclMoeDispatch(tokens, TOKENS, ids, weights, rows.cast(), room, counts, &mut n, moe));
                    check(xcclMoeCombine(rows.cast(), out.cast(), moe));
                    return;
                }
                check(xcclMoeDispatchSend(&input, &mut exchange, moe));
                while call == 1 && source >= 0 {
                    check(xcclMoeDispatchRecvSource(exchange, &mut source, &mut arrived, &mut n, moe));
                }
                check(xcclMoeDispatchRecv(exchange, &mut batch, moe));
                let mut outputs = std::ptr::without_provenance(1); // XCCL_IN_PLACE
                match call {
                    2 => check(xcclMoeCopyExpertMajor(exchange, rows.cast(), room, 1, moe)),
                    3 => outputs = rows.cast(),
                    4 if per_rank => {
                        check(xcclMoeSums(exchange, &mut sums, &mut n, moe));
                        outputs = std::ptr::without_provenance(3); // XCCL_SUMMED
                    }
                    _ => {}
                }
                check(xcclMoeCombineSend(exchange, outputs, moe));
                match call {
                    2 => check(xcclMoeCombineRecvWith(exchange, out.cast(), &epilogue, moe)),
                    _ => check(xcclMoeCombineRecv(exchange, out.cast(), moe)),
                }
            }
        };
        // SAFETY: what the calls are given may be read and written, and the handles are those that they have made.
        unsafe {
            check(xcclCommInitRank(&mut comm, 2, id, rank));
            for reduction in [xcclReduction_t::xcclReducePerExpert, xcclReduction_t::xcclReducePerRank] {
                let config = xcclMoeConfig_t {
                    size: size_of::<xcclMoeConfig_t>(),
                    max_tokens: TOKENS,
                    hidden: HIDDEN,
                    topk: TOPK,
                    experts: EXPERTS,
                    dtype: xcclDataType_t::xcclBfloat16 as u32,
                    reduction: reduction as u32,
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
                check(xcclMoeCreate(&mut moe, comm, &config));
                for lanes in [1, 3] {
                    check(xcclMoeSetLanes(lanes, Some(in_turn), null_mut(), moe));
                    for call in 0..CALLS {
                        let per_rank = reduction == xcclReduction_t::xcclReducePerRank;
                        let allocations = counted(|| exchange(call, moe, per_rank));
                        assert_eq!(allocations, 0, "call {call}, {reduction:?}, {lanes} lanes");
                    }
                }
                check(xcclMoeDestroy(moe));
            }
            check(xcclCommDestroy(comm));
        }
    };
    std::thread::scope(|s| {
        s.spawn(|| rank(0));
        s.spawn(|| rank(1));
    });
}

#[test]
fn collectives_allocate_nothing() {
    for n in [1, 2, 3] {
        as_threads(n, |comm| {
            for count in [1, 500, 5000, 100_000] {
                let (mut one, mut all) = (vec![1.0f32; count], vec![1.0f32; count * n]);
                let parts: Vec<_> = (0..n).map(|r| r * count..(r + 1) * count).collect();
                let allocated = counted(|| {
                    comm.all_reduce_in_place(&mut one, ReduceOp::Sum).unwrap();
                    comm.reduce_in_place(&mut one, ReduceOp::Max, n - 1).unwrap();
                    comm.reduce_scatter(&all, &mut one, ReduceOp::Avg).unwrap();
                    comm.all_gather(&one, &mut all).unwrap();
                    comm.gather(&one, &mut all, 0).unwrap();
                    comm.scatter(&all, &mut one, 0).unwrap();
                    comm.broadcast(&mut one, n - 1).unwrap();
                    comm.all_to_all_in_place(&mut all).unwrap();
                    let (send_parts, recv_parts) = (&parts[..], &parts[..]);
                    comm.collective(Collective::AllToAllV { send: None, send_parts, recv: &mut all, recv_parts })
                        .unwrap();
                });
                assert_eq!(allocated, 0, "rank {} of {n}, {count} elements", comm.rank());
            }
        });
    }
}

#[test]
fn puts_signals_and_pages_allocate_nothing() {
    as_threads(2, |comm| {
        let (rank, other) = (comm.rank(), 1 - comm.rank());
        let block = comm.shared_alloc(8192).unwrap();
        comm.barrier().unwrap();
        let (theirs, mut count) = (block.remote().of(other), 0);
        let allocations = counted(|| {
            count += 1;
            comm.put_signal(theirs.skip(64), &[7; 5000], theirs, Update::Set(count)).unwrap();
            block.signal_wait(other, 0, Until::Ge(count)).unwrap();
            comm.atomic_fetch_add(theirs.skip(8), 1).unwrap();
            comm.get(theirs.skip(64), &mut [0; 100]).unwrap();
        });
        assert_eq!(allocations, 0, "one-sided access of rank {rank}");

        let config = KvConfig::new(3, 1000);
        let layout = PageLayout::by_layer(&config, 20);
        let pages: Vec<u32> = (0..20).rev().collect();
        if rank == 0 {
            let pool = vec![1; layout.bytes(&config).unwrap()];
            let pairs: Vec<PagePair> = pages.iter().map(|&page| (19 - page, page).into()).collect();
            let mut sender = KvSender::new(comm, config, layout).unwrap();
            let allocations = counted(|| {
                let KvSenderEvent::Posted(posted) = sender.wait().unwrap() else { panic!("nothing else can come") };
                (0..3).for_each(|layer| _ = sender.push(posted.ticket, layer, &pool, &pairs).unwrap());
            });
            assert_eq!(allocations, 0, "a sender of pages");
            comm.barrier().unwrap();
        } else {
            let pool = comm.shared_alloc(layout.bytes(&config).unwrap()).unwrap();
            let mut receiver = KvReceiver::new(comm, config, pool, layout).unwrap();
            let allocations = counted(|| {
                let ticket = receiver.post(0, 1, &pages, 500).unwrap().unwrap();
                receiver.wait_layer(ticket, 0).unwrap();
                assert!(matches!(receiver.wait().unwrap().outcome, KvOutcome::Done));
            });
            assert_eq!(allocations, 0, "a receiver of pages");
            comm.barrier().unwrap();
        }
    });
}
