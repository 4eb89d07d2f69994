//! A program's threads, lent to the calls of a MoE handle.

use std::ffi::c_void;
use std::mem::transmute;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::sync::{Arc, Mutex};

use xccl::Lanes;

use super::*;
use crate::boundary::guard;
use crate::result::xcclResult_t;

/// One lane's part of a call: call it with the state that xcclRunLanes_t was given and the number of the lane.
pub type xcclLaneWork_t = unsafe extern "C" fn(state: *mut c_void, lane: usize);

/// Lends threads: calls work(state, i) for each i in 0 to lanes - 1, on any threads, and returns when all of these calls have.
/// Calls that are left out, or come twice or late, cost time and nothing else. What is shared takes some ten microseconds or
/// more, so threads should spin for their work, not sleep. It must not use the MoE handle, nor throw.
pub type xcclRunLanes_t =
    Option<unsafe extern "C" fn(context: *mut c_void, lanes: usize, work: xcclLaneWork_t, state: *mut c_void)>;

/// From now on shares the copies and sums of each call with `lanes` threads of the program, 1 to 64, where there is enough to
/// share: those of xcclMoeDispatchSend, xcclMoeDispatch, xcclMoeCopyExpertMajor, xcclMoeCopyPadded, xcclMoeCopyWire..., xcclMoeCombineSend,
/// xcclMoeCombineRecv, xcclMoeCombineRecvWith and xcclMoeCombine. run lends the threads; it is called with context by the thread
/// that is in the call. Results have the same bits for any number of lanes. XCCL starts no threads itself. run and context must
/// be good until they are replaced or the handle is destroyed; with run null, as at first, the calling thread works alone. Does
/// not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeSetLanes(
    lanes: usize,
    run: xcclRunLanes_t,
    context: *mut c_void,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeSetLanes", || {
        // SAFETY: C's promise about its handles.
        let (shell, mut inner) = unsafe { locked(moe) }?;
        let held = inner.as_mut().ok_or_else(|| handle::destroyed::<xcclMoe>("moe"))?;
        let (lanes, run) = match run {
            Some(run) => (lanes, run),
            None => (1, run_nothing as unsafe extern "C" fn(_, _, _, _)),
        };
        let threads = Lent { run, context, gate: &shell.gate };
        Ok(held.moe().set_lanes(lanes, Arc::new(threads))?)
    })
}

unsafe extern "C" fn run_nothing(_: *mut c_void, _: usize, _: xcclLaneWork_t, _: *mut c_void) {}

/// The threads that C lends.
struct Lent {
    run: unsafe extern "C" fn(*mut c_void, usize, xcclLaneWork_t, *mut c_void),
    context: *mut c_void,
    gate: &'static Gate,
}

// SAFETY: the context is only handed on, to a callback that its owner has made for whichever thread is in the call.
unsafe impl Send for Lent {}
// SAFETY: as above.
unsafe impl Sync for Lent {}

impl Lanes for Lent {
    fn run(&self, lanes: usize, work: &(dyn Fn(usize) + Sync)) {
        self.gate.open(work, |state| {
            // SAFETY: a function of C's with this signature, and its own context, good by its promise.
            unsafe { (self.run)(self.context, lanes, lane, state) }
        });
    }
}

/// What C calls for each lane.
unsafe extern "C" fn lane(state: *mut c_void, lane: usize) {
    // SAFETY: the state that `Gate::open` has given: a gate, which lives for ever.
    unsafe { &*state.cast::<Gate>() }.pass(lane);
}

type Work = dyn Fn(usize) + Sync;

/// What stands between C's threads and the work of one call, which is gone when the call returns: whoever comes later, or
/// twice, finds the gate shut, and the call does not return before everybody who came through has left.
///
/// The word holds whether the gate is open, and how many threads have knocked and not left. A thread knocks before it looks
/// whether the gate is open; the call shuts it before it looks whether someone is there: so one of the two sees the other.
/// It lives in the handle's shell, which is never freed.
#[derive(Default)]
pub(super) struct Gate {
    word: AtomicU64,
    /// Written only while the gate is shut, read only by threads that have come through.
    work: Mutex<Option<NonNull<Work>>>,
}

// SAFETY: the work is `Sync`, and is called only while the call that lends it waits.
unsafe impl Send for Gate {}
// SAFETY: as above.
unsafe impl Sync for Gate {}

const OPEN: u64 = 1 << 63;

impl Gate {
    /// Lets threads come through to `work` while `body` runs.
    fn open(&self, work: &(dyn Fn(usize) + Sync), body: impl FnOnce(*mut c_void)) {
        // SAFETY: only the lifetime changes, and nobody uses the work once this function has returned: see the type.
        let work = unsafe { transmute::<NonNull<dyn Fn(usize) + Sync + '_>, NonNull<Work>>(NonNull::from(work)) };
        *lock(&self.work) = Some(work);
        self.word.fetch_or(OPEN, Release);
        body((&raw const *self).cast_mut().cast());
        self.word.fetch_and(!OPEN, AcqRel);
        while self.word.load(Acquire) != 0 {
            // Only when C did not wait for its threads.
            std::thread::yield_now();
        }
        *lock(&self.work) = None;
    }

    fn pass(&self, lane: usize) {
        let is_open = self.word.fetch_add(1, Acquire) & OPEN != 0;
        let work = if is_open { *lock(&self.work) } else { None };
        if let Some(work) = work {
            // SAFETY: lent by `open`, which waits until this thread has left.
            let work = unsafe { work.as_ref() };
            work(lane);
        }
        self.word.fetch_sub(1, Release);
    }
}

fn lock(work: &Mutex<Option<NonNull<Work>>>) -> MutexGuard<'_, Option<NonNull<Work>>> {
    work.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

    use super::*;

    #[test]
    fn a_thread_that_comes_late_finds_the_gate_shut_and_one_inside_is_waited_for() {
        let gate: &'static Gate = Box::leak(Box::default());
        let state = (&raw const *gate).cast_mut().cast::<c_void>() as usize;
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| {
                    while !stop.load(Relaxed) {
                        // SAFETY: the gate lives for ever.
                        unsafe { lane(state as *mut c_void, 7) };
                    }
                });
            }
            for round in 0..2000 {
                // What the work uses is gone after each round.
                let alive = Box::new(AtomicUsize::new(round));
                let work = |lane: usize| {
                    assert_eq!((lane, alive.load(Relaxed)), (7, round));
                };
                gate.open(&work, |_| {
                    if round % 2 == 0 {
                        std::thread::yield_now(); // and returns without waiting for anybody
                    }
                });
                alive.store(usize::MAX, Relaxed);
            }
            stop.store(true, Relaxed);
        });
        assert_eq!(gate.word.load(Relaxed), 0);
        assert!(lock(&gate.work).is_none());
    }

    #[test]
    fn lanes_come_through_while_the_gate_is_open() {
        let gate: &'static Gate = Box::leak(Box::default());
        let sum = AtomicUsize::new(0);
        let add = |lane| {
            sum.fetch_add(lane, Relaxed);
        };
        gate.open(&add, |state| {
            // SAFETY: the state of this gate.
            (0..5).for_each(|i| unsafe { lane(state, i) });
        });
        assert_eq!(sum.load(Relaxed), 10);
    }
}
