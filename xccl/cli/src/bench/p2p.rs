//! `xccl bench p2p`: ping-pong between ranks 0 and 1, or a rate of messages.

use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;
use xccl::{BareNetwork, Communicator, wait_all};

use super::figures::{JsonLines, Percentiles, show_line};
use super::pair::Pair;
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
    /// Messages from rank 0 to rank 1 with so many outstanding, instead of one at a time there and back
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    window: Option<u32>,
}

#[derive(Serialize)]
struct Limit {
    /// A cache line from one of the two processes to the other.
    line_ns: Option<f64>,
    /// A copy by rank 0's core of what rank 1 has written to memory that both have mapped.
    memcpy_us: Option<f64>,
    /// Between nodes: half a round trip of bare puts of the network.
    bare_us: Option<f64>,
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

#[derive(Serialize)]
struct Rate {
    bench: &'static str,
    ranks: usize,
    bytes: usize,
    window: u32,
    messages_per_s: Percentiles,
    gbps: f64,
    /// Between nodes: of bare puts of the same bytes.
    bare_gbps: Option<f64>,
    line_ns: Option<f64>,
    verified: Option<bool>,
}

/// Round trips between two looks at the clock, while a round trip takes no longer than looking.
const BATCH: u32 = 10;
const LARGE: usize = 1 << 20;

impl P2pArgs {
    pub fn measure(&self, comm: &Communicator) -> Result<()> {
        ensure!(comm.world_size() >= 2, "p2p needs 2 ranks, there is {}", comm.world_size());
        let mut json = JsonLines::open(comm, self.common.json.as_deref())?;
        let bar = progress(comm, self.sizes.len());
        let largest = self.sizes.iter().copied().max().unwrap_or(0);
        let pair = if comm.rank() < 2 { Pair::open(comm, largest)? } else { None };
        let most = self.window.map_or(1, |window| window as usize) * largest;
        let mut bare = if comm.rank() < 2 { BareNetwork::open(comm, 1 - comm.rank(), most)? } else { None };
        self.print_heading(comm, pair.as_ref(), bare.is_some(), &json)?;
        for &bytes in &self.sizes {
            if !json.goes_on(comm)? {
                break;
            }
            // Before each size: it may change within minutes where the two cores are virtual.
            let line_ns = pair.as_ref().map_or(Ok(None), |pair| pair.line_ns(comm))?;
            match self.window {
                None => {
                    self.measure_size(comm, bytes, (pair.as_ref(), bare.as_mut()), line_ns, &mut json, &bar)?;
                }
                Some(_) => {
                    self.measure_rate(comm, bytes, bare.as_mut(), line_ns, &mut json, &bar)?;
                }
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        comm.barrier()?;
        Ok(())
    }

    fn print_heading(&self, comm: &Communicator, pair: Option<&Pair>, far: bool, json: &JsonLines) -> Result<()> {
        let line = pair.map_or(Ok(None), |pair| pair.line_ns(comm))?;
        if comm.rank() != 0 {
            return Ok(());
        }
        json.table(&format!(
            "# xccl bench p2p: ranks 0 and 1 of {}; line handover {}",
            comm.world_size(),
            show_line(line)
        ));
        match self.window {
            None => json.table(&format!(
                "{:>10} {:>12} {:>12} {:>9} {:>12} {:>9} {:>9}",
                "bytes",
                "half rtt us",
                "p90 us",
                "GB/s",
                if far { "bare us" } else { "memcpy us" },
                "/ limit",
                "verified"
            )),
            Some(window) => json.table(&format!(
                "{:>10} {:>12} {:>12} {:>12} {:>9} {:>9} {:>9}{}  ({window} outstanding)",
                "bytes",
                "messages/s",
                "p10",
                "ns each",
                "GB/s",
                if far { "bare" } else { "" },
                "verified",
                if far { "  / bare" } else { "" },
            )),
        }
        Ok(())
    }

    fn measure_size(
        &self,
        comm: &Communicator,
        bytes: usize,
        limits: (Option<&Pair>, Option<&mut BareNetwork>),
        line_ns: Option<f64>,
        json: &mut JsonLines,
        bar: &ProgressBar,
    ) -> Result<()> {
        let Some(point) = self.point(comm, bytes, limits, line_ns)? else { return Ok(()) };
        let half = point.half_rtt_us.median;
        // What cannot be avoided: a line, or the copy if that takes longer.
        let near = line_ns.map(|ns| ns / 1e3).into_iter().chain(point.limit.memcpy_us).max_by(f64::total_cmp);
        let limit_us = point.limit.bare_us.or(near);
        let line = format!(
            "{:>10} {:>12.3} {:>12.3} {:>9.2} {:>12} {:>9} {:>9}",
            bytes,
            half,
            point.half_rtt_us.p90,
            point.gbps,
            point.limit.bare_us.or(point.limit.memcpy_us).map_or("-".to_owned(), |us| format!("{us:.3}")),
            limit_us.map_or("-".to_owned(), |us| format!("{:.2}", half / us)),
            show_verified(point.verified)
        );
        bar.suspend(|| json.table(&line));
        json.write(&point)
    }

    fn point(
        &self,
        comm: &Communicator,
        bytes: usize,
        (pair, mut bare): (Option<&Pair>, Option<&mut BareNetwork>),
        line_ns: Option<f64>,
    ) -> Result<Option<Point>> {
        let (mut times, mut copies, mut bares) = (vec![], vec![], vec![]);
        let mut verified = None;
        let batch = if bytes < LARGE { BATCH } else { 1 };
        if comm.rank() < 2 {
            let mut private = vec![1u8; bytes];
            let mut heap = comm.heap_alloc(if self.heap { bytes } else { 1 })?;
            let out: &mut [u8] = if self.heap { &mut heap } else { &mut private };
            let mut back = vec![0u8; bytes];
            if self.common.verify {
                verified = Some(check(comm, out, &mut back)?);
            }
            let pair = pair.filter(|_| comm.rank() == 0);
            let copy = |back: &mut [u8]| pair.map(|pair| each(batch, || pair.copy(back)));
            for i in 0..self.common.warmup + self.common.iters {
                let start = Instant::now();
                for _ in 0..batch {
                    ping_pong(comm, out, &mut back)?;
                }
                let took = start.elapsed().as_secs_f64() * 1e6 / f64::from(2 * batch);
                // Long copies in turn with the messages: both feel what else the machine's memory is doing.
                let copied = if bytes < LARGE { None } else { copy(&mut back) };
                let first = comm.rank() == 0;
                let bare = bare.as_mut().map(|bare| bare.half_round_trip(bytes, batch as usize, first)).transpose()?;
                if i >= self.common.warmup {
                    times.push(took);
                    copies.extend(copied);
                    bares.extend(bare.map(|time| time.as_secs_f64() * 1e6));
                }
            }
            if bytes < LARGE {
                copies.extend((0..self.common.iters.min(200)).filter_map(|_| copy(&mut back)));
            }
        }
        comm.barrier()?;
        if comm.rank() != 0 {
            return Ok(None);
        }
        let half_rtt_us = Percentiles::of(times);
        let [memcpy_us, bare_us] =
            [copies, bares].map(|times| (!times.is_empty()).then(|| Percentiles::of(times).median));
        Ok(Some(Point {
            bench: "p2p",
            ranks: comm.world_size(),
            bytes,
            gbps: bytes as f64 / half_rtt_us.median / 1e3,
            half_rtt_us,
            limit: Limit { line_ns, memcpy_us, bare_us },
            verified,
        }))
    }

    fn measure_rate(
        &self,
        comm: &Communicator,
        bytes: usize,
        mut bare: Option<&mut BareNetwork>,
        line_ns: Option<f64>,
        json: &mut JsonLines,
        bar: &ProgressBar,
    ) -> Result<()> {
        let window = self.window.unwrap_or(1);
        let (mut rates, mut bares) = (vec![], vec![]);
        let mut verified = None;
        if comm.rank() < 2 {
            let n = window as usize;
            let mut private = vec![1u8; bytes * n];
            let mut heap = comm.heap_alloc(if self.heap { bytes * n } else { 1 })?;
            let out: &mut [u8] = if self.heap { &mut heap } else { &mut private };
            let mut back = vec![0u8; bytes * n];
            if self.common.verify {
                fill(out, comm.rank(), 0);
                window_of(comm, out, &mut back, bytes, n)?;
                verified = Some(comm.rank() == 0 || same(&back, 0, 0)?);
            }
            for i in 0..self.common.warmup + self.common.iters {
                let start = Instant::now();
                window_of(comm, out, &mut back, bytes, n)?;
                let took = start.elapsed();
                let bare = bare.as_mut().map(|bare| bare.puts(bytes, n, comm.rank() == 0)).transpose()?;
                if i >= self.common.warmup {
                    rates.push(f64::from(window) / took.as_secs_f64());
                    bares.extend(bare.map(|time| f64::from(window) / time.as_secs_f64()));
                }
            }
        }
        comm.barrier()?;
        if comm.rank() != 0 {
            return Ok(());
        }
        let messages_per_s = Percentiles::of(rates);
        let gbps = messages_per_s.median * bytes as f64 / 1e9;
        let bare = (!bares.is_empty()).then(|| Percentiles::of(bares).median);
        let bare_gbps = bare.map(|rate| rate * bytes as f64 / 1e9);
        let line = format!(
            "{:>10} {:>12.0} {:>12.0} {:>12.1} {:>9.2} {:>9} {:>9}{}",
            bytes,
            messages_per_s.median,
            messages_per_s.p10,
            1e9 / messages_per_s.median,
            gbps,
            bare_gbps.map_or(String::new(), |bare| format!("{bare:.2}")),
            show_verified(verified),
            bare_gbps.map_or(String::new(), |bare| format!("{:>8.2}", gbps / bare))
        );
        bar.suspend(|| json.table(&line));
        let ranks = comm.world_size();
        json.write(&Rate {
            bench: "p2p-rate",
            ranks,
            bytes,
            window,
            messages_per_s,
            gbps,
            bare_gbps,
            line_ns,
            verified,
        })
    }
}

fn show_verified(verified: Option<bool>) -> &'static str {
    verified.map_or("-", |v| if v { "yes" } else { "NO" })
}

/// Microseconds of each of `n` calls.
fn each(n: u32, mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    (0..n).for_each(|_| f());
    start.elapsed().as_secs_f64() * 1e6 / f64::from(n)
}

/// A window of messages from rank 0 to rank 1, and an answer when the last has come.
fn window_of(comm: &Communicator, out: &[u8], back: &mut [u8], bytes: usize, n: usize) -> xccl::Result<()> {
    // No chunks of nothing: an empty message is a message too.
    let part = |i: usize| i * bytes..(i + 1) * bytes;
    comm.scope(|s| {
        let mut requests = Vec::with_capacity(n);
        if comm.rank() == 0 {
            for i in 0..n {
                requests.push(s.isend(1, 1, &out[part(i)])?);
            }
        } else {
            let mut rest = back;
            for _ in 0..n {
                let (buffer, others) = rest.split_at_mut(bytes);
                requests.push(s.irecv(0, 1, buffer)?);
                rest = others;
            }
        }
        wait_all(requests)
    })?;
    if comm.rank() == 0 { comm.recv(1, 2, &mut []).map(|_| ()) } else { comm.send(0, 2, &[]) }
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
    for round in 0..3 {
        fill(out, comm.rank(), round);
        back.fill(0);
        ping_pong(comm, out, back)?;
        same(back, 1 - comm.rank(), round)?;
    }
    Ok(true)
}

fn pattern(rank: usize, round: usize, i: usize) -> u8 {
    (i * 131 + rank * 17 + round * 7 + (i >> 8)) as u8
}

fn fill(out: &mut [u8], rank: usize, round: usize) {
    out.iter_mut().enumerate().for_each(|(i, b)| *b = pattern(rank, round, i));
}

fn same(back: &[u8], rank: usize, round: usize) -> Result<bool> {
    let wrong = back.iter().enumerate().find(|&(i, &b)| b != pattern(rank, round, i));
    ensure!(wrong.is_none(), "from rank {rank}: byte {wrong:?} of {} is wrong", back.len());
    Ok(true)
}
