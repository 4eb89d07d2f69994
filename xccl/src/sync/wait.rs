//! The order in which a wait gets patient: spin, yield, sleep.

use std::time::{Duration, Instant};

use super::cores::CoreSharing;
use crate::error::Result;

/// How long to look, to spin and to yield before sleeping.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Patience {
    /// Looks before anything else.
    pub(crate) looks: u32,
    pub(crate) spin: Duration,
    pub(crate) yielding: Duration,
}

impl Patience {
    /// With a core for each rank the awaited word is a cache line away, so spinning pays. With fewer cores the rank that
    /// is waited for may need this very core: it gets it soon.
    pub(crate) fn for_sharing(cores: &CoreSharing) -> Self {
        if cores.has_core_each() {
            Patience { looks: LOOKS, spin: Duration::from_micros(200), yielding: Duration::from_micros(300) }
        } else {
            // Of 64 ranks on two cores each waits 2.5 times per exchange: looking 1000 times and then spinning for 0.5 us took 8 %
            // of their time, and hardly a wait ended by it.
            Patience { looks: LOOKS / 16, spin: Duration::ZERO, yielding: Duration::from_micros(50) }
        }
    }
}

/// The first sleep is short, in case a wake-up was swallowed; the longest bounds how late a death is noticed.
const FIRST_SLICE: Duration = Duration::from_millis(2);
const LAST_SLICE: Duration = Duration::from_millis(40);
/// Looks that take about a microsecond.
const LOOKS: u32 = 32;
/// Spins between two looks at the clock.
const SPINS_PER_LOOK: u32 = 64;

/// Looks a few times, without the clock: reading it costs as much as a cache-line handover.
///
/// With a pause after each look. A core that does nothing but look takes the line back while the other one is about to write
/// it: a ping-pong of bare slots took 67 ns without the pause (of 24 ns) and 36 with it where a line takes 26 to 33, and 280
/// against 120 to 187 where it takes 190.
#[inline]
pub(crate) fn briefly<T>(patience: &Patience, mut ready: impl FnMut() -> Option<T>) -> Option<T> {
    for _ in 0..patience.looks {
        if let Some(value) = ready() {
            return Some(value);
        }
        std::hint::spin_loop();
    }
    None
}

/// How patient a wait had become when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Spinning,
    Yielding,
    /// It has slept, or was about to.
    Asleep,
}

/// Waits until `ready` gives a value, and tells in which phase it came.
///
/// `sleep` sleeps for at most the slice it is given, unless its second argument turns true; `check` runs before every
/// sleep and ends the wait by its error.
pub(crate) fn until<T>(
    patience: &Patience,
    mut ready: impl FnMut() -> Option<T>,
    mut sleep: impl FnMut(Duration, &mut dyn FnMut() -> bool),
    mut check: impl FnMut() -> Result<()>,
) -> Result<(T, Phase)> {
    let started = Instant::now();
    while started.elapsed() < patience.spin {
        for _ in 0..SPINS_PER_LOOK {
            if let Some(value) = ready() {
                return Ok((value, Phase::Spinning));
            }
            std::hint::spin_loop();
        }
    }
    let yielding_since = Instant::now();
    while yielding_since.elapsed() < patience.yielding {
        std::thread::yield_now();
        if let Some(value) = ready() {
            return Ok((value, Phase::Yielding));
        }
    }
    let mut slice = FIRST_SLICE;
    loop {
        if let Some(value) = ready() {
            return Ok((value, Phase::Asleep));
        }
        if let Err(err) = check() {
            // What was waited for may have come just before the reason to give up.
            return ready().map(|value| (value, Phase::Asleep)).ok_or(err);
        }
        let mut found = None;
        sleep(slice, &mut || {
            found = ready();
            found.is_some()
        });
        if let Some(value) = found {
            return Ok((value, Phase::Asleep));
        }
        slice = (slice * 2).min(LAST_SLICE);
    }
}
