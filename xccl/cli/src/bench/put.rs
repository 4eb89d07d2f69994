//! `xccl bench put`: one-sided puts from rank 0 into the shared memory of rank 1.

use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;
use xccl::{Communicator, Config, Remote, SharedBuffer, Until, Update};

use super::Common;
use super::figures::{JsonLines, Percentiles, show_line};
use super::pair::Pair;

#[derive(Args)]
pub struct PutArgs {
    #[command(flatten)]
    pub(super) common: Common,
    /// Sizes in bytes
    #[arg(long, value_delimiter = ',', default_value = "8,64,1024,4096,16384,65536,262144,1048576,16777216")]
    sizes: Vec<usize>,
}

#[derive(Serialize)]
struct Point {
    bench: &'static str,
    ranks: usize,
    bytes: usize,
    /// Half of: a put with a signal there, and one back.
    half_rtt_us: Percentiles,
    /// One put after the other.
    put_us: Percentiles,
    gbps: f64,
    line_ns: Option<f64>,
    /// A plain copy of as much from the same memory into memory of both.
    memcpy_us: Option<f64>,
    verified: Option<bool>,
}

const TAG: u32 = 0xffff_0003;
/// The word that counts puts, then the data.
const DATA: usize = 64;

/// What one rank has of the other.
struct Ends {
    here: SharedBuffer,
    there: Remote,
    /// Puts with a signal so far: each rank's word has counted as many.
    count: u64,
}

impl PutArgs {
    pub fn measure(&self, comm: &Communicator) -> Result<()> {
        ensure!(comm.world_size() >= 2, "put needs 2 ranks, there is {}", comm.world_size());
        let largest = self.sizes.iter().copied().max().unwrap_or(0);
        let shared = Communicator::from_env_with(Config::from_env()?.heap_bytes(2 * (largest + 4096)))?;
        let mut json = JsonLines::open(comm, self.common.json.as_deref())?;
        let pair = if comm.rank() < 2 { Pair::open(comm, largest)? } else { None };
        if comm.rank() < 2 {
            let mut ends = ends(&shared, largest)?;
            let line_ns = pair.as_ref().map_or(Ok(None), |pair| pair.line_ns(comm))?;
            if comm.rank() == 0 {
                json.table(&format!("# xccl bench put: from rank 0 to rank 1; line handover {}", show_line(line_ns)));
                json.table(&format!(
                    "{:>10} {:>12} {:>10} {:>9} {:>11} {:>8} {:>9}",
                    "bytes", "half rtt us", "put us", "GB/s", "memcpy us", "/ limit", "verified"
                ));
            }
            for &bytes in &self.sizes {
                self.measure_size(&shared, &mut ends, bytes, pair.as_ref(), line_ns, &mut json)?;
            }
        }
        comm.barrier()?;
        Ok(())
    }

    fn measure_size(
        &self,
        comm: &Communicator,
        ends: &mut Ends,
        bytes: usize,
        pair: Option<&Pair>,
        line_ns: Option<f64>,
        json: &mut JsonLines,
    ) -> Result<()> {
        let mut source = vec![1u8; bytes];
        let verified = if self.common.verify { Some(check(comm, ends, &mut source)?) } else { None };
        // Sizes that take longer are measured less often.
        let iters = self.common.iters.min((2_000_000_000 / bytes.max(1) / 4) as u32).max(3);
        let rounds = self.common.warmup.min(iters) + iters;
        let (mut half, mut put, mut copies) = (vec![], vec![], vec![]);
        for _ in 0..rounds {
            let start = Instant::now();
            for _ in 0..BATCH {
                ping_pong(comm, ends, &source)?;
            }
            half.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(2 * BATCH));
        }
        meet(comm)?;
        if comm.rank() == 0 {
            // In turn: both feel what else the machine is doing.
            for _ in 0..rounds {
                put.push(each(|| comm.put(ends.there.skip(DATA), &source))?);
                if let Some(pair) = pair {
                    copies.push(each(|| {
                        pair.copy_in(0, &source);
                        Ok(())
                    })?);
                }
            }
            comm.quiet()?;
        }
        meet(comm)?;
        if comm.rank() != 0 {
            return Ok(());
        }
        let skip = (rounds - iters) as usize;
        let [half_rtt_us, put_us] = [half, put].map(|times| Percentiles::of(times[skip..].to_vec()));
        let memcpy_us = (!copies.is_empty()).then(|| Percentiles::of(copies[skip..].to_vec()).median);
        let gbps = bytes as f64 / put_us.median / 1e3;
        json.table(&format!(
            "{bytes:>10} {:>12.3} {:>10.3} {gbps:>9.2} {:>11} {:>8} {:>9}",
            half_rtt_us.median,
            put_us.median,
            memcpy_us.map_or("-".to_owned(), |us| format!("{us:.3}")),
            memcpy_us.map_or("-".to_owned(), |us| format!("{:.2}", put_us.median / us)),
            verified.map_or("-", |_| "yes"),
        ));
        let ranks = comm.world_size();
        json.write(&Point { bench: "put", ranks, bytes, half_rtt_us, put_us, gbps, line_ns, memcpy_us, verified })
    }
}

/// Between two looks at the clock.
const BATCH: u32 = 10;

fn each(mut f: impl FnMut() -> xccl::Result<()>) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..BATCH {
        f()?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / f64::from(BATCH))
}

fn ends(comm: &Communicator, largest: usize) -> Result<Ends> {
    let here = comm.shared_alloc(DATA + largest)?;
    here.write(0, &vec![0; here.len()])?;
    let mut told = [0; 24];
    comm.send(1 - comm.rank(), TAG, &here.remote().to_bytes())?;
    comm.recv(1 - comm.rank(), TAG, &mut told)?;
    Ok(Ends { here, there: Remote::from_bytes(&told), count: 0 })
}

fn meet(comm: &Communicator) -> xccl::Result<()> {
    comm.send(1 - comm.rank(), TAG, &[])?;
    comm.recv(1 - comm.rank(), TAG, &mut []).map(|_| ())
}

fn ping_pong(comm: &Communicator, ends: &mut Ends, source: &[u8]) -> xccl::Result<()> {
    ends.count += 1;
    let other = 1 - comm.rank();
    let put = || comm.put_signal(ends.there.skip(DATA), source, ends.there, Update::Set(ends.count));
    let wait = || ends.here.signal_wait(other, 0, Until::Ge(ends.count)).map(|_| ());
    if comm.rank() == 0 { put().and_then(|()| wait()) } else { wait().and_then(|()| put()) }
}

/// Each puts a pattern of its own, three times over; both compare every byte.
fn check(comm: &Communicator, ends: &mut Ends, source: &mut [u8]) -> Result<bool> {
    let pattern = |rank: usize, round: usize, i: usize| (i * 131 + rank * 17 + round * 7 + (i >> 8)) as u8;
    let mut found = vec![0; source.len()];
    for round in 0..3 {
        source.iter_mut().enumerate().for_each(|(i, b)| *b = pattern(comm.rank(), round, i));
        ping_pong(comm, ends, source)?;
        ends.here.read(DATA, &mut found)?;
        let wrong = found.iter().enumerate().find(|&(i, &b)| b != pattern(1 - comm.rank(), round, i));
        ensure!(wrong.is_none(), "byte {wrong:?} of {} is wrong", source.len());
        meet(comm)?;
    }
    Ok(true)
}
