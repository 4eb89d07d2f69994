//! Percentiles, gathering them over ranks, and writing them out.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use xccl::Communicator;

/// Tag of the benchmark's own messages.
const GATHER: u32 = 0xffff_0001;

#[derive(Clone, Copy, Serialize)]
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

/// Nanoseconds that a cache line takes from one core to another; `None` where there is just one.
pub fn line_ns() -> Option<f64> {
    const TURNS: u64 = 20_000;
    if std::thread::available_parallelism().map_or(1, |n| n.get()) < 2 {
        return None;
    }
    let turn = AtomicU64::new(0);
    let play = |odd: u64| {
        for n in (odd..TURNS).step_by(2) {
            let mut spins = 0u32;
            while turn.load(Ordering::Acquire) != n {
                spins += 1;
                if spins > 10_000 {
                    // The other player has no core at the moment.
                    std::thread::yield_now();
                }
                std::hint::spin_loop();
            }
            turn.store(n + 1, Ordering::Release);
        }
    };
    let one_game = || {
        turn.store(0, Ordering::Relaxed);
        let start = Instant::now();
        std::thread::scope(|s| {
            s.spawn(|| play(1));
            play(0);
        });
        start.elapsed().as_secs_f64() * 1e9 / TURNS as f64
    };
    Some(Percentiles::of((0..7).map(|_| one_game()).collect()).median)
}

/// Writes JSON objects, one per line.
pub struct JsonLines(Option<Box<dyn Write>>);

impl JsonLines {
    pub fn open(comm: &Communicator, path: Option<&str>) -> Result<Self> {
        let to: Option<Box<dyn Write>> = match path.filter(|_| comm.rank() == 0) {
            None => None,
            Some("-") => Some(Box::new(std::io::stdout())),
            Some(path) => Some(Box::new(File::create(path).with_context(|| format!("creating {path:?}"))?)),
        };
        Ok(JsonLines(to))
    }

    pub fn write(&mut self, point: &impl Serialize) -> Result<()> {
        if let Some(to) = &mut self.0 {
            writeln!(to, "{}", serde_json::to_string(point)?)?;
        }
        Ok(())
    }
}
