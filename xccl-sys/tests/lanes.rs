//! Lanes lent through the C interface: whatever the callback does, the sums are right and nothing is touched too late.

use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use xccl_c::*;

const TOKENS: usize = 48;
const HIDDEN: usize = 8192;
const EXPERTS: usize = 4;

#[track_caller]
fn check(result: xcclResult_t) {
    assert_eq!(result, xcclResult_t::xcclSuccess);
}

/// Calls of the callback.
static SHARED: AtomicUsize = AtomicUsize::new(0);

struct State(*mut c_void);

// SAFETY: the header lets any thread call the work with it.
unsafe impl Send for State {}

/// The work and the state of some earlier call.
static KEPT: Mutex<Option<(xcclLaneWork_t, State)>> = Mutex::new(None);

unsafe extern "C" fn waits(_: *mut c_void, lanes: usize, work: xcclLaneWork_t, state: *mut c_void) {
    SHARED.fetch_add(1, Relaxed);
    let threads = (0..lanes).map(|lane| {
        let state = State(state);
        std::thread::spawn(move || {
            let state = state;
            // SAFETY: as the header says.
            unsafe { work(state.0, lane) }
        })
    });
    threads.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join().expect("a lane"));
}

/// Leaves the work to a thread that never stops asking for it.
unsafe extern "C" fn returns_too_early(_: *mut c_void, _: usize, work: xcclLaneWork_t, state: *mut c_void) {
    SHARED.fetch_add(1, Relaxed);
    *KEPT.lock().expect("not poisoned") = Some((work, State(state)));
}

unsafe extern "C" fn does_nothing(_: *mut c_void, _: usize, _: xcclLaneWork_t, _: *mut c_void) {
    SHARED.fetch_add(1, Relaxed);
}

fn exchange(moe: xcclMoe_t) {
    let tokens: Vec<f32> = (0..TOKENS * HIDDEN).map(|i| (i % 1013) as f32).collect();
    let ids: Vec<i32> = (0..TOKENS as i32).map(|t| t % EXPERTS as i32).collect();
    let (weights, mut rows, mut out) = (vec![2.0f32; TOKENS], tokens.clone(), vec![0.0f32; TOKENS * HIDDEN]);
    let (mut counts, mut arrived) = ([0; EXPERTS], 0);
    let (from, to) = (tokens.as_ptr().cast(), rows.as_mut_ptr().cast::<c_void>());
    // SAFETY: the buffers are as large as the calls are told, and the handle is good.
    unsafe {
        let (ids, weights, counts) = (ids.as_ptr(), weights.as_ptr(), counts.as_mut_ptr());
        check(xcclMoeDispatch(from, TOKENS, ids, weights, to, TOKENS, counts, &mut arrived, moe));
        check(xcclMoeCombine(to, out.as_mut_ptr().cast(), moe));
    }
    assert!(out.iter().zip(&tokens).all(|(y, x)| *y == 2.0 * x));
}

#[test]
fn whatever_the_callback_does_the_sums_are_right() {
    let (mut comm, mut moe) = (null_mut(), null_mut());
    let mut id = xcclUniqueId { internal: [0; XCCL_UNIQUE_ID_BYTES] };
    let config = xcclMoeConfig_t {
        size: size_of::<xcclMoeConfig_t>(),
        max_tokens: TOKENS,
        hidden: HIDDEN,
        topk: 1,
        experts: EXPERTS,
        dtype: xcclDataType_t::xcclFloat32 as u32,
        reduction: xcclReduction_t::xcclReducePerExpert as u32,
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
    // SAFETY: pointers to values of the right types, and handles that the calls have made.
    unsafe {
        check(xcclGetUniqueId(&mut id));
        check(xcclCommInitRank(&mut comm, 1, id, 0));
        check(xcclMoeCreate(&mut moe, comm, &config));
        for run in [waits, returns_too_early, does_nothing] as [unsafe extern "C" fn(_, _, _, _); 3] {
            check(xcclMoeSetLanes(3, Some(run), null_mut(), moe));
            let (before, stop) = (SHARED.load(Relaxed), AtomicBool::new(false));
            std::thread::scope(|s| {
                for _ in 0..2 {
                    s.spawn(|| {
                        // During calls, after them, and in the midst of the next ones.
                        while !stop.load(Relaxed) {
                            let kept =
                                KEPT.lock().expect("not poisoned").as_ref().map(|(work, state)| (*work, state.0));
                            match kept {
                                Some((work, state)) => work(state, 1),
                                None => std::thread::yield_now(),
                            }
                        }
                    });
                }
                (0..20).for_each(|_| exchange(moe));
                stop.store(true, Relaxed);
            });
            // The copies of both calls and the sums.
            assert!(SHARED.load(Relaxed) - before >= 20 * 3, "the calls were shared");
        }
        check(xcclMoeSetLanes(0, None, null_mut(), moe));
        let before = SHARED.load(Relaxed);
        exchange(moe);
        assert_eq!(SHARED.load(Relaxed), before);
        check(xcclMoeDestroy(moe));
        // Later still.
        if let Some((work, state)) = KEPT.lock().expect("not poisoned").take() {
            work(state.0, 0);
        }
        check(xcclCommDestroy(comm));
    }
}
