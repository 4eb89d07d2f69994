//! `xccl bench wait`: from a peer's store to the waiter's return, in each phase of a wait, beside the same with bare words.
//!
//! Rank 0 waits in `recv`, rank 1 sends as late as it takes for the wait to be spinning, yielding or asleep. The message is the
//! sender's clock just before it sends. The limits are games of the same two processes with words in memory that they share, and
//! with nothing but what the phase is made of: loads, `sched_yield`, or a futex.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use memmap2::{MmapOptions, MmapRaw};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use serde::Serialize;
use xccl::Communicator;

use super::Common;
use super::figures::{JsonLines, Percentiles, line_ns, show_line};
use super::process::{clock_us, micros};

const GO: u32 = 1;
const PUBLISHED: u32 = 2;

#[derive(Args)]
pub struct WaitArgs {
    #[command(flatten)]
    pub(super) common: Common,
    /// Milliseconds over which the processor time of idle ranks is taken
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    idle_ms: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Phase {
    Spinning,
    Yielding,
    Asleep,
}

/// The ranks have a core each, or share one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Place {
    CoreEach,
    OneCore,
}

/// How late rank 1 publishes, for the wait to have come to each phase.
const CASES: [(Place, Phase, Duration); 5] = [
    (Place::CoreEach, Phase::Spinning, Duration::from_micros(50)),
    (Place::CoreEach, Phase::Yielding, Duration::from_micros(350)),
    (Place::CoreEach, Phase::Asleep, Duration::from_millis(5)),
    // At once: rank 1 gets the core when rank 0 gives it away.
    (Place::OneCore, Phase::Yielding, Duration::ZERO),
    (Place::OneCore, Phase::Asleep, Duration::from_millis(5)),
];

#[derive(Serialize)]
struct Point {
    bench: &'static str,
    ranks: usize,
    place: Place,
    phase: Phase,
    /// Waits that ended in this phase.
    samples: usize,
    store_to_return_us: Percentiles,
    limit_us: Percentiles,
    line_ns: Option<f64>,
}

#[derive(Serialize)]
struct Idle {
    bench: &'static str,
    ranks: usize,
    place: Place,
    idle_ms: u32,
    /// Of a core, by each rank that waits, after the first millisecond.
    cpu_percent: f64,
}

impl WaitArgs {
    pub fn measure(&self, comm: &Communicator) -> Result<()> {
        ensure!(comm.world_size() >= 2, "this needs 2 ranks, there is {}", comm.world_size());
        let mut json = JsonLines::open(comm, self.common.json.as_deref())?;
        let line = if comm.rank() == 0 { line_ns() } else { None };
        comm.barrier()?;
        if comm.rank() == 0 {
            json.table(&format!(
                "# xccl bench wait: {} ranks; from rank 1's store to rank 0's return; line handover {}",
                comm.world_size(),
                show_line(line)
            ));
            json.table(&format!(
                "{:>9} {:>9} {:>8} {:>9} {:>9} {:>9} {:>10} {:>8}",
                "place", "phase", "samples", "p10 us", "median", "p90", "limit us", "/ limit"
            ));
        }
        let usable = sched_getaffinity(Pid::from_raw(0)).context("reading the usable cores")?;
        for place in [Place::CoreEach, Place::OneCore] {
            // Left to the scheduler, a rank that wakes up may be put onto the core on which the other one spins.
            bind(&usable, if place == Place::OneCore { 0 } else { comm.rank() })?;
            // Decides anew how to wait.
            let here = Communicator::from_env()?;
            if place == Place::OneCore || here.core_sharing().has_core_each() {
                self.at_place(&here, place, line, &mut json)?;
            } else if comm.rank() == 0 {
                json.table(&format!("{:>9} {}", "core-each", here.core_sharing()));
            }
        }
        sched_setaffinity(Pid::from_raw(0), &usable).context("giving the cores back")?;
        comm.barrier()?;
        Ok(())
    }

    fn at_place(&self, comm: &Communicator, place: Place, line: Option<f64>, json: &mut JsonLines) -> Result<()> {
        let words = Words::share(comm)?;
        for (_, phase, delay) in CASES.into_iter().filter(|&(at, _, _)| at == place) {
            if !json.goes_on(comm)? {
                break;
            }
            let rounds = self.common.warmup + self.common.iters;
            let mut measured = None;
            match comm.rank() {
                0 => measured = Some((self.wait(comm, phase, rounds)?, words.wait(phase, rounds)?)),
                1 => {
                    publish(comm, delay, rounds)?;
                    words.publish(phase, delay, rounds)?;
                }
                _ => {}
            }
            if let Some((times, limits)) = measured {
                let limit_us = Percentiles::of(limits);
                let (samples, name) = (times.len(), format!("{phase:?}").to_lowercase());
                if samples == 0 {
                    json.table(&format!("{:>9} {name:>9} {samples:>8}", place.name()));
                    continue;
                }
                let store_to_return_us = Percentiles::of(times);
                let Percentiles { p10, median, p90 } = store_to_return_us;
                json.table(&format!(
                    "{:>9} {name:>9} {samples:>8} {p10:>9.3} {median:>9.3} {p90:>9.3} {:>10.3} {:>8.2}",
                    place.name(),
                    limit_us.median,
                    median / limit_us.median
                ));
                let (bench, ranks) = ("wait", comm.world_size());
                json.write(&Point {
                    bench,
                    ranks,
                    place,
                    phase,
                    samples,
                    store_to_return_us,
                    limit_us,
                    line_ns: line,
                })?;
            }
        }
        if let Some(cpu_percent) = self.idle(comm)? {
            let (ranks, idle_ms) = (comm.world_size(), self.idle_ms);
            json.table(&format!("{:>9} {:>9} {cpu_percent:.3} % of a core per rank", place.name(), "idle"));
            json.write(&Idle { bench: "wait-idle", ranks, place, idle_ms, cpu_percent })?;
        }
        Ok(())
    }

    /// Rank 0's side: microseconds of the waits that ended in `phase`.
    fn wait(&self, comm: &Communicator, phase: Phase, rounds: u32) -> Result<Vec<f64>> {
        let mut times = vec![];
        for round in 0..rounds {
            comm.send(1, GO, bytemuck::bytes_of(&round))?;
            let (before, mut published) = (comm.statistics(), 0.0f64);
            comm.recv(1, PUBLISHED, bytemuck::bytes_of_mut(&mut published))?;
            let (now, after) = (clock_us()?, comm.statistics());
            let ended = match () {
                () if after.waits == before.waits => None,
                () if after.waits_slept > before.waits_slept => Some(Phase::Asleep),
                () if after.waits_yielded > before.waits_yielded => Some(Phase::Yielding),
                () => Some(Phase::Spinning),
            };
            if round >= self.common.warmup && ended == Some(phase) {
                times.push(now - published);
            }
        }
        Ok(times)
    }

    /// All ranks but rank 1 wait for it, which looks at their processor clocks meanwhile. On rank 0: per cent of a core.
    fn idle(&self, comm: &Communicator) -> Result<Option<f64>> {
        let mut percent = 0.0f64;
        if comm.rank() != 1 {
            comm.send(1, GO, &std::process::id().to_ne_bytes())?;
            comm.recv(1, PUBLISHED, bytemuck::bytes_of_mut(&mut percent))?;
            return Ok((comm.rank() == 0).then_some(percent));
        }
        let mut clocks = vec![];
        for rank in (0..comm.world_size()).filter(|&r| r != 1) {
            let mut pid = 0u32;
            comm.recv(rank, GO, bytemuck::bytes_of_mut(&mut pid))?;
            clocks.push(clock_getcpuclockid(Pid::from_raw(pid as i32)).context("finding a rank's processor clock")?);
        }
        let used = |clocks: &[ClockId]| clocks.iter().map(|&clock| micros(clock)).sum::<Result<f64>>();
        std::thread::sleep(Duration::from_millis(1));
        let (started, before) = (Instant::now(), used(&clocks)?);
        std::thread::sleep(Duration::from_millis(self.idle_ms.into()));
        let took = started.elapsed().as_secs_f64() * 1e6;
        percent = (used(&clocks)? - before) / clocks.len() as f64 / took * 100.0;
        for rank in (0..comm.world_size()).filter(|&r| r != 1) {
            comm.send(rank, PUBLISHED, bytemuck::bytes_of(&percent))?;
        }
        Ok(None)
    }
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Place::CoreEach => "core-each",
            Place::OneCore => "one-core",
        }
    }
}

/// Binds this process to the `index`-th usable core, round and round.
fn bind(usable: &CpuSet, index: usize) -> Result<()> {
    let cores: Vec<usize> = (0..CpuSet::count()).filter(|&core| usable.is_set(core) == Ok(true)).collect();
    let mut own = CpuSet::new();
    let core = cores.get(index % cores.len().max(1)).context("there is no usable core")?;
    own.set(*core).and_then(|()| sched_setaffinity(Pid::from_raw(0), &own)).context("binding to a core")
}

/// Rank 1's side.
fn publish(comm: &Communicator, delay: Duration, rounds: u32) -> Result<()> {
    for expected in 0..rounds {
        let mut round = 0u32;
        comm.recv(0, GO, bytemuck::bytes_of_mut(&mut round))?;
        ensure!(round == expected, "round {round} came, expected {expected}");
        be_late(delay);
        comm.send(0, PUBLISHED, bytemuck::bytes_of(&clock_us()?))?;
    }
    Ok(())
}

/// A timer would be late itself where microseconds count.
fn be_late(delay: Duration) {
    if delay >= Duration::from_millis(1) {
        return std::thread::sleep(delay);
    }
    let started = Instant::now();
    while started.elapsed() < delay {
        std::hint::spin_loop();
    }
}

/// Words that ranks 0 and 1 share without the library.
struct Words(MmapRaw);

const PAGE: usize = 4096;
/// Looks between two at the clock, while a game is waited for.
const LOOKS: u32 = 1 << 14;
const LONGEST_GAME: Duration = Duration::from_secs(20);

impl Words {
    /// Rank 0 makes a file without a name, rank 1 opens it through rank 0's descriptor. Others get memory of their own.
    fn share(comm: &Communicator) -> Result<Words> {
        let make = || -> Result<std::fs::File> {
            let file = std::fs::File::from(memfd_create(c"xccl-bench", MFdFlags::MFD_CLOEXEC)?);
            file.set_len(PAGE as u64)?;
            Ok(file)
        };
        let map = |file: &std::fs::File| MmapOptions::new().len(PAGE).map_raw(file).context("mapping shared words");
        match comm.rank() {
            0 => {
                let file = make().context("making shared words")?;
                comm.send(1, GO, bytemuck::bytes_of(&[std::process::id() as i32, file.as_raw_fd()]))?;
                let words = map(&file)?;
                comm.recv(1, GO, &mut [])?;
                Ok(Words(words))
            }
            1 => {
                let mut at = [0i32; 2];
                comm.recv(0, GO, bytemuck::bytes_of_mut(&mut at))?;
                let path = format!("/proc/{}/fd/{}", at[0], at[1]);
                let file =
                    std::fs::File::options().read(true).write(true).open(path).context("opening shared words")?;
                let words = map(&file)?;
                comm.send(0, GO, &[])?;
                Ok(Words(words))
            }
            _ => Ok(Words(map(&make().context("making words")?)?)),
        }
    }

    /// The first word of line `line`.
    fn word(&self, line: usize) -> &AtomicU64 {
        assert!(line < PAGE / 64);
        // SAFETY: inside the mapping, aligned, alive as long as `self`; both processes access it atomically only.
        unsafe { AtomicU64::from_ptr(self.0.as_mut_ptr().add(line * 64).cast()) }
    }

    /// The round that rank 0 waits in.
    fn go(&self) -> &AtomicU64 {
        self.word(0)
    }

    /// Rank 1's clock when it published, in bits.
    fn published(&self) -> &AtomicU64 {
        self.word(1)
    }

    fn bell(&self) -> &AtomicU32 {
        // SAFETY: as for `word`; the bell is accessed as 32 bits only.
        unsafe { AtomicU32::from_ptr(self.0.as_mut_ptr().add(128).cast()) }
    }

    /// Waits as `phase` says until `word` is no longer `old`.
    fn until_new(&self, word: &AtomicU64, old: u64, phase: Phase) -> Result<u64> {
        let started = Instant::now();
        for look in 1.. {
            let rung = self.bell().load(Ordering::Acquire);
            let value = word.load(Ordering::Acquire);
            if value != old {
                return Ok(value);
            }
            match phase {
                Phase::Spinning => {}
                Phase::Yielding => std::thread::yield_now(),
                Phase::Asleep => futex(self.bell(), libc::FUTEX_WAIT, rung),
            }
            if (look % LOOKS == 0 || phase == Phase::Asleep) && started.elapsed() > LONGEST_GAME {
                break;
            }
        }
        bail!("the other rank did not play within {LONGEST_GAME:?}")
    }

    fn wait(&self, phase: Phase, rounds: u32) -> Result<Vec<f64>> {
        let mut times = vec![];
        let mut last = self.published().load(Ordering::Relaxed);
        for _ in 0..rounds {
            self.go().fetch_add(1, Ordering::Release);
            last = self.until_new(self.published(), last, phase)?;
            times.push(clock_us()? - f64::from_bits(last));
        }
        // The next game begins with what this one has left.
        self.go().fetch_add(1, Ordering::Release);
        Ok(times)
    }

    fn publish(&self, phase: Phase, delay: Duration, rounds: u32) -> Result<()> {
        // Looking for the next round must not cost a time slice where there is one core, nor a sleep.
        let looking = if delay.is_zero() || phase == Phase::Asleep { Phase::Yielding } else { Phase::Spinning };
        let mut go = self.word(3).load(Ordering::Relaxed);
        for _ in 0..rounds {
            go = self.until_new(self.go(), go, looking)?;
            be_late(delay);
            self.published().store(clock_us()?.to_bits(), Ordering::Release);
            if phase == Phase::Asleep {
                self.bell().fetch_add(1, Ordering::Release);
                futex(self.bell(), libc::FUTEX_WAKE, i32::MAX as u32);
            }
        }
        let go = self.until_new(self.go(), go, looking)?;
        self.word(3).store(go, Ordering::Relaxed);
        Ok(())
    }
}

/// Waits while the word is `value`, a second at most; or wakes as many. Errors mean that the caller should look again.
fn futex(word: &AtomicU32, operation: i32, value: u32) {
    let second = libc::timespec { tv_sec: 1, tv_nsec: 0 };
    // SAFETY: both outlive the call, which only reads them.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, &raw const second);
    }
}
