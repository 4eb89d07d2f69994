//! Percentiles, gathering them over ranks, and writing them out.

use std::cell::Cell;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use xccl::Communicator;

use crate::say::try_say;

/// Tags of the benchmark's own messages.
const GATHER: u32 = 0xffff_0001;
const GOES_ON: u32 = 0xffff_0002;

#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Percentiles {
    pub p10: f64,
    pub median: f64,
    pub p90: f64,
}

impl Percentiles {
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |q: f64| values[((values.len() - 1) as f64 * q).round() as usize];
        Percentiles { p10: at(0.1), median: at(0.5), p90: at(0.9) }
    }
}

/// Iteration by iteration, the time of the slowest rank; on rank 0 only.
pub fn slowest(comm: &Communicator, times: &[f64]) -> Result<Option<Vec<f64>>> {
    if comm.rank() != 0 {
        comm.send(0, GATHER, bytemuck::cast_slice(times))?;
        return Ok(None);
    }
    let mut slowest = times.to_vec();
    let mut theirs = vec![0.0f64; times.len()];
    for rank in 1..comm.world_size() {
        comm.recv(rank, GATHER, bytemuck::cast_slice_mut(&mut theirs))?;
        slowest.iter_mut().zip(&theirs).for_each(|(s, &t)| *s = s.max(t));
    }
    Ok(Some(slowest))
}

/// Microseconds that `f` takes.
pub fn timed<R>(f: impl FnOnce() -> Result<R>) -> Result<(f64, R)> {
    let start = Instant::now();
    let result = f()?;
    Ok((start.elapsed().as_secs_f64() * 1e6, result))
}

/// Nanoseconds that a cache line takes from one core to another: the best of several short games of two threads. `None`
/// where there is just one core, or where the threads never had two cores at the same time.
///
/// The best, since it is a limit: a game whose players shared a core measures the scheduler. And each game ends after a
/// while for the same reason: with both cores busy, every turn would cost a time slice.
pub fn line_ns() -> Option<f64> {
    if std::thread::available_parallelism().map_or(1, |n| n.get()) < 2 {
        return None;
    }
    (0..GAMES).filter_map(|_| one_game()).min_by(f64::total_cmp)
}

/// As it stands in a heading.
pub fn show_line(line_ns: Option<f64>) -> String {
    line_ns.map_or("not measured (needs two idle cores)".to_owned(), |ns| format!("{ns:.0} ns"))
}

/// Games that a handover is the best of.
pub const GAMES: u32 = 20;
const TURNS: u64 = 4_000;
const LONGEST_GAME: Duration = Duration::from_millis(5);
/// Spins between two looks at the clock.
const SPINS_PER_LOOK: u32 = 256;

/// Nanoseconds of a turn, of the time of a game.
pub fn game_ns(took: Duration) -> f64 {
    took.as_secs_f64() * 1e9 / TURNS as f64
}

/// Plays one side (0 or 1) of a game for two: they increment `turn` by turns. Both words are 0 at first. `None` when the other
/// one does not keep up.
pub fn play(turn: &AtomicU64, ready: &AtomicU64, side: u64) -> Option<Duration> {
    ready.fetch_add(1, Ordering::AcqRel);
    let waiting = Instant::now();
    let await_value = |word: &AtomicU64, value: u64| {
        while word.load(Ordering::Acquire) != value {
            for _ in 0..SPINS_PER_LOOK {
                if word.load(Ordering::Acquire) == value {
                    return true;
                }
                std::hint::spin_loop();
            }
            if waiting.elapsed() > LONGEST_GAME {
                return false;
            }
        }
        true
    };
    // Starting a thread takes longer than the game.
    if !await_value(ready, 2) {
        return None;
    }
    let start = Instant::now();
    for n in (side..TURNS).step_by(2) {
        if !await_value(turn, n) {
            return None;
        }
        turn.store(n + 1, Ordering::Release);
    }
    Some(start.elapsed())
}

fn one_game() -> Option<f64> {
    let turn = AtomicU64::new(0);
    let ready = AtomicU64::new(0);
    std::thread::scope(|s| {
        let other = s.spawn(|| play(&turn, &ready, 1));
        let took = play(&turn, &ready, 0);
        other.join().ok()??;
        took.map(game_ns)
    })
}

/// Writes JSON objects, one per line; and the table for people, which gives way to them on standard output.
pub struct JsonLines {
    to: Option<Box<dyn Write>>,
    table_to_stderr: bool,
    /// Nobody reads standard output any more (`| head`).
    is_closed: Cell<bool>,
}

impl JsonLines {
    pub fn open(comm: &Communicator, path: Option<&str>) -> Result<Self> {
        let to: Option<Box<dyn Write>> = match path.filter(|path| comm.rank() == 0 && *path != "-") {
            None => None,
            Some(path) => Some(Box::new(File::create(path).with_context(|| format!("creating {path:?}"))?)),
        };
        Ok(JsonLines { to, table_to_stderr: path == Some("-"), is_closed: Cell::new(false) })
    }

    /// A line of the table.
    pub fn table(&self, line: &str) {
        if self.table_to_stderr { eprintln!("{line}") } else { self.say(line) }
    }

    pub fn write(&mut self, point: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(point)?;
        if let Some(to) = &mut self.to {
            writeln!(to, "{line}")?;
        } else if self.table_to_stderr {
            self.say(&line);
        }
        Ok(())
    }

    fn say(&self, line: &str) {
        if !self.is_closed.get() {
            self.is_closed.set(!try_say(format_args!("{line}")));
        }
    }

    /// Whether somebody still wants the rest: rank 0 knows, and tells the others, so that all stop after the same point. Every
    /// rank must call it.
    pub fn goes_on(&self, comm: &Communicator) -> Result<bool> {
        let mut goes_on = [u8::from(!self.is_closed.get() || self.to.is_some())];
        match comm.rank() {
            0 => (1..comm.world_size()).try_for_each(|rank| comm.send(rank, GOES_ON, &goes_on))?,
            _ => drop(comm.recv(0, GOES_ON, &mut goes_on)?),
        }
        Ok(goes_on == [1])
    }
}
