//! `xccl bench p2p`: ping-pong between ranks 0 and 1.

use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;
use xccl::Communicator;

use super::figures::{JsonLines, Percentiles, line_ns, show_line};
use super::{Common, progress};

#[derive(Args)]
pub struct P2pArgs {
    #[command(flatten)]
    pub(super) common: Common,
    /// Message sizes in bytes
    #[arg(long, value_delimiter = ',', default_value = "8,64,1024,4096,16384,65536,262144,1048576")]
    sizes: Vec<usize>,
    /// Send from the symmetric heap instead of private memory
    #[arg(long)]
    heap: bool,
}

#[derive(Serialize)]
struct Limit {
    line_ns: Option<f64>,
    memcpy_us: f64,
}

#[derive(Serialize)]
struct Point {
    bench: &'static str,
    ranks: usize,
    bytes: usize,
    half_rtt_us: Percentiles,
    gbps: f64,
    limit: Limit,
    verified: Option<bool>,
}

/// Round trips between two looks at the clock.
const BATCH: u32 = 10;

impl P2pArgs {
    pub fn measure(&self, comm: &Communicator) -> Result<()> {
        ensure!(comm.world_size() >= 2, "p2p needs 2 ranks, there is {}", comm.world_size());
        let mut json = JsonLines::open(comm, self.common.json.as_deref())?;
        let bar = progress(comm, self.sizes.len());
        comm.barrier()?;
        let line = if comm.rank() == 0 { line_ns() } else { None };
        comm.barrier()?;
        if comm.rank() == 0 {
            json.table(&format!(
                "# xccl bench p2p: ranks 0 and 1 of {}; line handover {}",
                comm.world_size(),
                show_line(line)
            ));
            json.table(&format!(
                "{:>10} {:>12} {:>12} {:>9} {:>12} {:>9}",
                "bytes", "half rtt us", "p90 us", "GB/s", "memcpy us", "verified"
            ));
        }
        for &bytes in &self.sizes {
            if let Some(point) = self.point(comm, bytes, line)? {
                let verified = point.verified.map_or("-", |v| if v { "yes" } else { "NO" });
                let line = format!(
                    "{:>10} {:>12.3} {:>12.3} {:>9.2} {:>12.3} {:>9}",
                    bytes, point.half_rtt_us.median, point.half_rtt_us.p90, point.gbps, point.limit.memcpy_us, verified
                );
                bar.suspend(|| json.table(&line));
                json.write(&point)?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        comm.barrier()?;
        Ok(())
    }

    fn point(&self, comm: &Communicator, bytes: usize, line_ns: Option<f64>) -> Result<Option<Point>> {
        let mut times = vec![];
        let mut verified = None;
        if comm.rank() < 2 {
            let mut private = vec![1u8; bytes];
            let mut heap = comm.heap_alloc(if self.heap { bytes } else { 1 })?;
            let out: &mut [u8] = if self.heap { &mut heap } else { &mut private };
            let mut back = vec![0u8; bytes];
            if self.common.verify {
                verified = Some(check(comm, out, &mut back)?);
            }
            for i in 0..self.common.warmup + self.common.iters {
                let start = Instant::now();
                for _ in 0..BATCH {
                    ping_pong(comm, out, &mut back)?;
                }
                if i >= self.common.warmup {
                    times.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(2 * BATCH));
                }
            }
        }
        comm.barrier()?;
        let memcpy_us = memcpy_us(bytes, self.common.iters);
        if comm.rank() != 0 {
            return Ok(None);
        }
        let half_rtt_us = Percentiles::of(times);
        Ok(Some(Point {
            bench: "p2p",
            ranks: comm.world_size(),
            bytes,
            gbps: bytes as f64 / half_rtt_us.median / 1e3,
            half_rtt_us,
            limit: Limit { line_ns, memcpy_us },
            verified,
        }))
    }
}

fn ping_pong(comm: &Communicator, out: &[u8], back: &mut [u8]) -> xccl::Result<()> {
    if comm.rank() == 0 {
        comm.send(1, 1, out)?;
        comm.recv(1, 1, back)?;
    } else {
        comm.recv(0, 1, back)?;
        comm.send(0, 1, out)?;
    }
    Ok(())
}

/// Each rank sends a pattern of its own, three times over; both compare every byte.
fn check(comm: &Communicator, out: &mut [u8], back: &mut [u8]) -> Result<bool> {
    let pattern = |rank: usize, round: usize, i: usize| (i * 131 + rank * 17 + round * 7 + (i >> 8)) as u8;
    for round in 0..3 {
        out.iter_mut().enumerate().for_each(|(i, b)| *b = pattern(comm.rank(), round, i));
        back.fill(0);
        ping_pong(comm, out, back)?;
        let wrong = back.iter().enumerate().find(|&(i, &b)| b != pattern(1 - comm.rank(), round, i));
        ensure!(wrong.is_none(), "rank {}: byte {wrong:?} of {} is wrong", comm.rank(), back.len());
    }
    Ok(true)
}

fn memcpy_us(bytes: usize, iters: u32) -> f64 {
    let (from, mut to) = (vec![1u8; bytes], vec![0u8; bytes]);
    let times = (0..iters.min(200)).map(|_| {
        let start = Instant::now();
        for _ in 0..BATCH {
            to.copy_from_slice(std::hint::black_box(&from));
            std::hint::black_box(&mut to);
        }
        start.elapsed().as_secs_f64() * 1e6 / f64::from(BATCH)
    });
    Percentiles::of(times.collect()).median
}
