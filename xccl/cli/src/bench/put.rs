//! `xccl bench put`: one-sided puts from rank 0 into the shared memory of rank 1.

use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;
use xccl::{BareNetwork, Communicator, Config, Remote, SharedBuffer, Until, Update};

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
    /// Put from the symmetric heap instead of private memory
    #[arg(long)]
    heap: bool,
}

#[derive(Serialize)]
struct Point {
    bench: &'static str,
    ranks: usize,
    bytes: usize,
    /// Half of: a put with a signal there, and one back.
    half_rtt_us: Percentiles,
    /// One put after the other; between nodes until the last has arrived.
    put_us: Percentiles,
    gbps: f64,
    line_ns: Option<f64>,
    /// A plain copy of as much from the same memory into memory of both.
    memcpy_us: Option<f64>,
    /// Between nodes: the same of bare puts of the network.
    bare_half_rtt_us: Option<f64>,
    bare_put_us: Option<f64>,
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
        let shared = Communicator::from_env_with(Config::from_env()?.heap_bytes(3 * (largest + 4096)))?;
        let mut json = JsonLines::open(comm, self.common.json.as_deref())?;
        let pair = if comm.rank() < 2 { Pair::open(comm, largest)? } else { None };
        if comm.rank() < 2 {
            let mut ends = ends(&shared, largest)?;
            let mut bare = BareNetwork::open(comm, 1 - comm.rank(), largest)?;
            let mut limits = Limits { pair: pair.as_ref(), bare: bare.as_mut() };
            let line_ns = pair.as_ref().map_or(Ok(None), |pair| pair.line_ns(comm))?;
            if comm.rank() == 0 {
                json.table(&format!("# xccl bench put: from rank 0 to rank 1; line handover {}", show_line(line_ns)));
                let limits = match limits.bare {
                    None => format!("{:>11} {:>8}", "memcpy us", "/ limit"),
                    Some(_) => {
                        format!("{:>11} {:>8} {:>11} {:>8}", "bare rtt/2", "/ bare", "bare us", "/ bare")
                    }
                };
                json.table(&format!(
                    "{:>10} {:>12} {:>10} {:>9} {limits} {:>9}",
                    "bytes", "half rtt us", "put us", "GB/s", "verified"
                ));
            }
            for &bytes in &self.sizes {
                self.measure_size(&shared, &mut ends, bytes, &mut limits, line_ns, &mut json)?;
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
        limits: &mut Limits,
        line_ns: Option<f64>,
        json: &mut JsonLines,
    ) -> Result<()> {
        let mut private = vec![1u8; bytes];
        let mut heap = comm.heap_alloc(if self.heap { bytes } else { 1 })?;
        let source: &mut [u8] = if self.heap { &mut heap } else { &mut private };
        let verified = if self.common.verify { Some(check(comm, ends, source)?) } else { None };
        // Sizes that take longer are measured less often.
        let iters = self.common.iters.min((2_000_000_000 / bytes.max(1) / 4) as u32).max(3);
        let rounds = self.common.warmup.min(iters) + iters;
        let first = comm.rank() == 0;
        let (mut half, mut put, mut copies, mut bare_half, mut bare_put) = (vec![], vec![], vec![], vec![], vec![]);
        // In turn with the limits: all feel what else the machine is doing.
        for _ in 0..rounds {
            let start = Instant::now();
            for _ in 0..BATCH {
                ping_pong(comm, ends, source)?;
            }
            half.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(2 * BATCH));
            if let Some(bare) = &mut limits.bare {
                bare_half.push(bare.half_round_trip(bytes, BATCH as usize, first)?.as_secs_f64() * 1e6);
            }
        }
        meet(comm)?;
        for _ in 0..rounds {
            match &mut limits.bare {
                None if first => {
                    put.push(each(|| comm.put(ends.there.skip(DATA), source))?);
                    if let Some(pair) = limits.pair {
                        copies.push(each(|| {
                            pair.copy_in(0, source);
                            Ok(())
                        })?);
                    }
                }
                None => {}
                Some(bare) => {
                    let n = far_batch(bytes);
                    let start = Instant::now();
                    if first {
                        (0..n).try_for_each(|_| comm.put(ends.there.skip(DATA), source))?;
                        comm.quiet()?;
                        put.push(start.elapsed().as_secs_f64() * 1e6 / n as f64);
                    }
                    meet(comm)?;
                    bare_put.push(bare.puts(bytes, n, first)?.as_secs_f64() * 1e6 / n as f64);
                }
            }
        }
        comm.quiet()?;
        meet(comm)?;
        if comm.rank() != 0 {
            return Ok(());
        }
        let skip = (rounds - iters) as usize;
        let of = |times: Vec<f64>| Percentiles::of(times[skip..].to_vec());
        let limit = |times: Vec<f64>| (!times.is_empty()).then(|| of(times).median);
        let (half_rtt_us, put_us) = (of(half), of(put));
        let [memcpy_us, bare_half_rtt_us, bare_put_us] = [copies, bare_half, bare_put].map(limit);
        let gbps = bytes as f64 / put_us.median / 1e3;
        let beside = |limit: Option<f64>, us: f64| match limit {
            Some(limit) => format!("{limit:>11.3} {:>8.2}", us / limit),
            None => format!("{:>11} {:>8}", "-", "-"),
        };
        let limits = match bare_put_us {
            None => beside(memcpy_us, put_us.median),
            Some(_) => beside(bare_half_rtt_us, half_rtt_us.median) + " " + &beside(bare_put_us, put_us.median),
        };
        json.table(&format!(
            "{bytes:>10} {:>12.3} {:>10.3} {gbps:>9.2} {limits} {:>9}",
            half_rtt_us.median,
            put_us.median,
            verified.map_or("-", |_| "yes"),
        ));
        let ranks = comm.world_size();
        json.write(&Point {
            bench: "put",
            ranks,
            bytes,
            half_rtt_us,
            put_us,
            gbps,
            line_ns,
            memcpy_us,
            bare_half_rtt_us,
            bare_put_us,
            verified,
        })
    }
}

/// What puts are measured beside: within a node plain copies, between nodes bare puts.
struct Limits<'a> {
    pair: Option<&'a Pair>,
    bare: Option<&'a mut BareNetwork>,
}

/// So many puts that the way of the last one does not count.
fn far_batch(bytes: usize) -> usize {
    ((32 << 20) / bytes.max(1)).clamp(4, 200)
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
