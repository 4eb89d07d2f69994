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
    /// Yields at least, however long the others take.
    yields: u32,
    /// Of the ranks that may sleep here, which one this is, and how many they are.
    turn: (u32, u32),
}

impl Patience {
    /// With a core for each rank the awaited word is a cache line away, so spinning pays. With fewer cores the rank that
    /// is waited for may need this very core: it gets it soon.
    pub(crate) fn for_sharing(cores: &CoreSharing) -> Self {
        if cores.has_core_each() {
            let (spin, yielding) = (Duration::from_micros(200), Duration::from_micros(300));
            Patience { looks: LOOKS, spin, yielding, yields: 0, turn: (0, 1) }
        } else {
            // Of 64 ranks on two cores each waits 2.5 times per exchange: looking 1000 times and then spinning for 0.5 us took 8 %
            // of their time, and hardly a wait ended by it.
            let (spin, yielding) = (Duration::ZERO, Duration::from_micros(50));
            Patience { looks: LOOKS / 16, spin, yielding, yields: 0, turn: (0, 1) }
        }
    }

    /// For ranks of several nodes. Who sleeps there takes two wake-ups: of the progress thread, and by it. Of eight ranks on two cores a
    /// single yield can take longer than all the time for yielding; with 64 of them at least, 8 tokens took half as long on
    /// pretended nodes (4 x 2 ranks, dispatch and combine 0.76 and 0.96 ms where it was 1.8 and 1.8), and 16 were not enough.
    pub(crate) fn between_nodes(self) -> Self {
        Patience { yields: 64, ..self }
    }

    /// For the `index`-th of `ranks` ranks of a node.
    pub(crate) fn in_turn(self, index: usize, ranks: usize) -> Self {
        Patience { turn: (index as u32, ranks.max(1) as u32), ..self }
    }

    /// The longest sleep.
    fn last_slice(&self) -> Duration {
        (BETWEEN_TURNS * self.turn.1).min(LAST_SLICE)
    }

    /// How long to sleep for this rank's next turn, `now` being the machine's clock: the ranks look one after the other, evenly.
    fn until_its_turn(&self, now: Duration) -> Duration {
        let (round, (index, ranks)) = (self.last_slice().as_nanos() as u64, self.turn);
        let (now, own) = (now.as_nanos() as u64, round / u64::from(ranks) * u64::from(index));
        // Not one that is about to come.
        let from = now + round / 4;
        Duration::from_nanos(round / 4 + (own + round - from % round) % round)
    }
}

/// The first sleep is short, in case a wake-up was swallowed; the longest bounds how late a death is noticed by a rank that waits
/// alone.
const FIRST_SLICE: Duration = Duration::from_millis(2);
const LAST_SLICE: Duration = Duration::from_millis(40);
/// Where all ranks of a node sleep, one of them looks so often, and wakes the others if there is a reason. Few ranks look more often
/// each: a look takes some 20 us.
const BETWEEN_TURNS: Duration = Duration::from_millis(5);
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
    let (yielding_since, mut yields) = (Instant::now(), 0);
    while yields < patience.yields || yielding_since.elapsed() < patience.yielding {
        yields += 1;
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
        slice *= 2;
        if slice >= patience.last_slice() {
            slice = patience.until_its_turn(machine_time());
        }
    }
}

/// The machine's monotonic clock, which all its processes share.
fn machine_time() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sync::cores::Cores;

    proptest! {
        #[test]
        fn sleepers_look_in_turns_and_none_sleeps_long(ranks in 1usize..100, start in 0u64..1 << 50) {
            let cores = CoreSharing::of(&[Cores::default()]);
            let all: Vec<_> = (0..ranks).map(|i| Patience::for_sharing(&cores).in_turn(i, ranks)).collect();
            let start = Duration::from_nanos(start);
            let mut looks = vec![];
            for patience in &all {
                let mut now = start;
                while now < start + LAST_SLICE * 4 {
                    let slice = patience.until_its_turn(now);
                    prop_assert!(slice >= patience.last_slice() / 4 && slice <= LAST_SLICE * 5 / 4, "{slice:?}");
                    now += slice;
                    looks.push(now);
                }
            }
            looks.sort();
            let settled: Vec<_> = looks.into_iter().filter(|&at| at > start + LAST_SLICE * 5 / 4).collect();
            let last = settled.iter().rposition(|&at| at <= start + LAST_SLICE * 4).unwrap_or(0);
            for pair in settled[..=last].windows(2) {
                prop_assert!(pair[1] - pair[0] <= BETWEEN_TURNS + Duration::from_micros(1), "{:?}", pair[1] - pair[0]);
            }
        }
    }
}
