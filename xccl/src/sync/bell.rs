//! Sleeping and waking: an event count per rank, split over two memories.
//!
//! Every rank has a *sleep word* that it alone writes (in its outbox) and a *bell* that anyone may bump (in its
//! symmetric heap).
//! - A sleeper writes into its sleep word whom it waits for, then a fence, then looks at its condition once more; only
//!   if that is still false does it sleep on its bell, and only while the bell has the value read before.
//! - A publisher stores its word, then a fence, then reads the sleep words of those who may wait for it; to the ones
//!   that name it (or anyone) it bumps the bell and wakes the futex.
//!
//! - Who publishes for all would have to read the sleep word of each: with 64 ranks that is 64 lines, most of them to learn that
//!   nobody sleeps. So there is one *list of sleepers* for all, a bit per rank in words that anyone may change: a sleeper sets its
//!   bit before it writes its sleep word and clears it when it is awake. A bit only says whose sleep word to look at.
//!
//! The race that looks possible: the publisher reads the sleep word before the sleeper has written it, and the sleeper
//! checks its condition before the publisher has stored. The two fences forbid that both happen (store buffering): either
//! the publisher sees the sleeper's bit and word, or the sleeper sees the published word. And between the sleeper's check and its
//! `futex_wait`, a bump changes the bell's value, so that the wait returns at once.
//!
//! A rank that scribbles over other ranks' bells or bits can cause wake-ups for nothing, and can swallow one: sleeps are bounded
//! by [`wait`](super::wait)'s slice, so that costs time, never progress.

use std::time::Duration;

use crate::loom_facade::{AtomicU32, AtomicU64, Mutex, MutexGuard, Ordering, fence};

/// The sleep word of a rank that does not sleep.
pub(crate) const AWAKE: u32 = 0;
/// The sleep word of a rank that any other one may wake.
pub(crate) const ANYONE: u32 = u32::MAX;

/// The sleep word that says: only `rank` needs to wake me.
pub(crate) fn only(rank: usize) -> u32 {
    rank as u32 + 1
}

/// To be called after a publication: wakes the owner of `sleep` and `bell` if it waits for rank `me`. Says whether it did.
///
/// The caller has executed [`publish_fence`] between its store and this call.
pub(crate) fn ring_if_waiting(sleep: &AtomicU32, bell: &AtomicU32, me: usize) -> bool {
    let waits_for = sleep.load(Ordering::Relaxed);
    let rings = waits_for != AWAKE && (waits_for == only(me) || waits_for == ANYONE);
    if rings {
        ring(bell);
    }
    rings
}

/// Ranks per word of the list of sleepers.
pub(crate) const PER_WORD: usize = 64;

/// The ranks that one word of the list of sleepers names, as numbers within the word.
///
/// The caller has executed [`publish_fence`] before.
pub(crate) fn sleepers(word: &AtomicU64) -> impl Iterator<Item = usize> {
    let mut bits = word.load(Ordering::Relaxed);
    std::iter::from_fn(move || {
        let next = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(next)
    })
}

/// A rank's place in the list of sleepers.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) word: &'a AtomicU64,
    pub(crate) bit: u64,
}

impl<'a> Place<'a> {
    pub(crate) fn new(word: &'a AtomicU64, rank: usize) -> Self {
        Place { word, bit: 1 << (rank % PER_WORD) }
    }
}

/// Orders a publication before the look at the sleep words.
pub(crate) fn publish_fence() {
    fence(Ordering::SeqCst);
}

/// Wakes whoever sleeps on `bell`.
#[cold]
pub(crate) fn ring(bell: &AtomicU32) {
    bell.fetch_add(1, Ordering::Release);
    futex::wake_all(bell);
}

/// How often `bell` was rung, to be read before a last look at what [`ring`] alone tells: what it tells from then on ends the sleep
/// that begins with this number.
pub(crate) fn rung(bell: &AtomicU32) -> u32 {
    bell.load(Ordering::Acquire)
}

/// A rank's own sleep word, shared by those of its threads that sleep at the same time.
pub(crate) struct Sleeper {
    sleeping: Mutex<u32>,
}

impl Sleeper {
    pub(crate) fn new() -> Self {
        Sleeper { sleeping: Mutex::new(0) }
    }

    /// Sleeps until `bell` is rung once more than `before`, or `slice` has passed, unless `ready` is true after `sleep` says `waits_for` and the list of
    /// sleepers has this rank.
    ///
    /// Returns what `ready` last said. Spurious returns are possible; the caller loops.
    pub(crate) fn sleep_unless(
        &self,
        (place, sleep): (Place<'_>, &AtomicU32),
        waits_for: u32,
        (bell, before): (&AtomicU32, u32),
        slice: Duration,
        mut ready: impl FnMut() -> bool,
    ) -> bool {
        self.enter(place, sleep, waits_for);
        fence(Ordering::SeqCst);
        let is_ready = ready() || {
            futex::wait(bell, before, slice);
            ready()
        };
        self.leave(place, sleep);
        is_ready
    }

    fn enter(&self, place: Place<'_>, sleep: &AtomicU32, waits_for: u32) {
        let mut sleeping = self.lock();
        *sleeping += 1;
        if *sleeping == 1 {
            place.word.fetch_or(place.bit, Ordering::Relaxed);
        }
        sleep.store(if *sleeping == 1 { waits_for } else { ANYONE }, Ordering::Relaxed);
    }

    fn leave(&self, place: Place<'_>, sleep: &AtomicU32) {
        let mut sleeping = self.lock();
        *sleeping -= 1;
        if *sleeping == 0 {
            place.word.fetch_and(!place.bit, Ordering::Relaxed);
            sleep.store(AWAKE, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.sleeping.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(not(loom))]
mod futex {
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    pub(super) fn wait(word: &AtomicU32, expected: u32, timeout: Duration) {
        let timeout = libc::timespec {
            tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // SAFETY: `word` and `timeout` outlive the call, which only reads them. Errors (EAGAIN, EINTR, ETIMEDOUT) all
        // mean that the caller should look again, which it does.
        unsafe {
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const timeout);
        }
    }

    pub(super) fn wake_all(word: &AtomicU32) {
        // SAFETY: `word` outlives the call, which only uses its address.
        unsafe {
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
        }
    }
}

#[cfg(loom)]
mod futex {
    use super::*;

    /// Sleeps for as long as the word keeps its value: no timeout, so that loom finds a lost wake-up as a livelock.
    pub(super) fn wait(word: &AtomicU32, expected: u32, _timeout: Duration) {
        while word.load(Ordering::Acquire) == expected {
            loom::thread::yield_now();
        }
    }

    pub(super) fn wake_all(_word: &AtomicU32) {}
}
