//! `xccl bench growth`: the same tokens in all, by more and more ranks: what each token costs, and what each rank does.
//!
//! Processor time and not the clock: with more ranks than cores, the clock says how many cores there are.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytemuck::{Pod, Zeroable};
use clap::{Args, ValueEnum};
use half::bf16;
use nix::sys::memfd::{MFdFlags, memfd_create};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use xccl::{Communicator, DType, ExpertBatch, Moe, MoeConfig, Reduction, Routing, Statistics};

use super::process::{Memory, Usage, clock_us, thread_cpu_us};
use crate::run::{self, RunOptions};
use crate::say::say;

/// When the launcher began to start the ranks, by the clock that they share.
const STARTED: &str = "XCCL_BENCH_STARTED_US";
/// The engine's among the parts of an exchange.
const ENGINE: usize = 2;
/// Tag of the benchmark's own messages.
const GATHER: u32 = 0xffff_0003;

#[derive(Args)]
pub struct GrowthArgs {
    /// Numbers of ranks, measured one after another
    #[arg(long, value_delimiter = ',', default_value = "2,4,8,16,32,64", value_parser = clap::value_parser!(u32).range(1..=1024))]
    ranks: Vec<u32>,
    /// Tokens of all ranks together
    #[arg(long, default_value_t = 1024)]
    tokens: usize,
    /// Elements of a token row (bf16)
    #[arg(long, default_value_t = 7168)]
    hidden: usize,
    /// Experts per token
    #[arg(long, default_value_t = 8)]
    topk: usize,
    /// Experts over all ranks
    #[arg(long, default_value_t = 256)]
    experts: usize,
    /// Where sums are formed. With per-expert the bytes per token are the same for any number of ranks
    #[arg(long, value_enum, default_value = "per-expert")]
    reduction: Reduce,
    /// Which experts the tokens choose
    #[arg(long, value_enum, default_value = "uniform")]
    routing: Choose,
    /// Bind rank i to the i-th usable core, round and round
    #[arg(long)]
    bind: bool,
    /// Measured exchanges
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    iters: u32,
    /// Exchanges before them
    #[arg(long, default_value_t = 5)]
    warmup: u32,
    /// Check every byte in a pass of its own
    #[arg(long)]
    verify: bool,
    /// Write one JSON object per number of ranks to this file, or to standard output with "-"
    #[arg(long, value_name = "FILE")]
    json: Option<String>,
    /// Set for the ranks: where rank 0 writes what was measured
    #[arg(long, hide = true)]
    point: Option<OsString>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Reduce {
    /// On the token's rank, one row per expert
    PerExpert,
    /// On the experts' rank, then one row per rank on the token's
    PerRank,
}

#[derive(Clone, Copy, PartialEq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Choose {
    /// Any: the more ranks, the fewer rows stay on their own
    Uniform,
    /// Those of other ranks: as many bytes cross between ranks whatever their number
    Remote,
}

/// What one number of ranks gave. Times are microseconds; counts are sums over all ranks.
#[derive(Serialize, Deserialize)]
struct Point {
    bench: String,
    ranks: usize,
    tokens: usize,
    hidden: usize,
    topk: usize,
    experts: usize,
    reduction: Reduce,
    routing: Choose,
    exchanges: u32,
    /// Processor time of all ranks per token, the engine's part included: the rows are read and outputs written.
    cpu_us_per_token: f64,
    /// The same without the engine's part.
    exchange_cpu_us_per_token: f64,
    parts: Parts,
    system_us_per_token: f64,
    wall_us_per_exchange: f64,
    /// Bytes that a token's rows have in dispatch and combine, and those of them that lie on another rank.
    bytes_per_token: f64,
    remote_bytes_per_token: f64,
    per_exchange: PerExchange,
    start: Start,
    memory: PerRank,
    verified: Option<bool>,
}

/// Processor time per token, waiting included.
#[derive(Serialize, Deserialize)]
struct Parts {
    dispatch_send_us: f64,
    dispatch_recv_us: f64,
    engine_us: f64,
    combine_send_us: f64,
    combine_recv_us: f64,
}

/// Sums over all ranks.
#[derive(Serialize, Deserialize)]
struct PerExchange {
    voluntary_switches: f64,
    involuntary_switches: f64,
    page_faults: f64,
    waits: f64,
    waits_yielded: f64,
    waits_slept: f64,
    wake_ups: f64,
}

/// From nothing to a communicator. Milliseconds.
#[derive(Serialize, Deserialize)]
struct Start {
    /// From the launcher's first to the last rank that is ready.
    spawn_to_ready_ms: f64,
    /// `Communicator::from_env` alone, of the rank that took longest. It includes waiting for ranks that start later.
    init_ms: f64,
    /// From the last rank that began to join to the last rank that was ready.
    last_joined_to_ready_ms: f64,
    /// Processor time of joining, per rank.
    init_cpu_ms: f64,
    init_page_faults: f64,
}

/// Means over the ranks, in bytes.
#[derive(Serialize, Deserialize)]
struct PerRank {
    /// Shared memory that was touched: after joining, and after all exchanges.
    joined: f64,
    touched: f64,
    /// What [`MemoryPlan`](xccl::MemoryPlan) and [`MoeConfig::outbox_bytes`] plan for, all pages touched.
    planned: f64,
    private: f64,
    page_tables: f64,
    mapped: f64,
    descriptors: f64,
}

/// What one rank has measured.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Figures {
    began_us: f64,
    ready_us: f64,
    init: Usage,
    joined: Memory,
    used: Usage,
    parts_us: [f64; 5],
    rows: f64,
    remote_rows: f64,
    waits: [f64; 4],
    memory: Memory,
}

impl GrowthArgs {
    pub fn run(&self) -> Result<u8> {
        match &self.point {
            None => self.start(),
            Some(point) => self.join(point).map(|()| 0),
        }
    }

    /// Starts the jobs, one after another.
    fn start(&self) -> Result<u8> {
        ensure!(self.topk <= self.experts, "--topk {} is more than --experts {}", self.topk, self.experts);
        let exe = std::env::current_exe().context("finding this program")?;
        let mut points: Vec<Point> = vec![];
        say!(
            "# xccl bench growth: {} tokens in all, hidden {} bf16, top-{} of {}; processor time per token in us, switches and \
             waits per rank and exchange",
            self.tokens,
            self.hidden,
            self.topk,
            self.experts
        );
        say!(
            "{:>6} {:>9} {:>6} {:>9} {:>6} | {:>7} {:>7} {:>7} {:>7} {:>7} | {:>9} {:>7} {:>8} {:>8} {:>6} {:>9} {:>9} {:>8}",
            "ranks",
            "cpu/token",
            "x",
            "exchange",
            "x",
            "d.send",
            "d.recv",
            "engine",
            "c.send",
            "c.recv",
            "KiB/token",
            "remote",
            "wall us",
            "yielded",
            "slept",
            "switches",
            "preempted",
            "verified"
        );
        for &ranks in &self.ranks {
            // A file without a name: nothing is left, however this ends.
            let to = memfd_create(c"xccl-bench", MFdFlags::MFD_CLOEXEC).context("making a file for the figures")?;
            let path = format!("/proc/{}/fd/{}", std::process::id(), to.as_raw_fd());
            let mut args: Vec<OsString> = std::env::args_os().skip(1).collect();
            args.extend(["--point".into(), path.into()]);
            let code = run::launch(RunOptions {
                ranks: ranks as usize,
                nodes: run::Nodes::One,
                bind: self.bind,
                prefix: false,
                program: exe.clone().into_os_string(),
                args,
                env: vec![(STARTED.into(), clock_us()?.to_string().into())],
                grace: Duration::from_secs(1),
                timeout: None,
            })?;
            if code != 0 {
                return Ok(code);
            }
            let mut text = String::new();
            let mut from = File::from(to);
            from.rewind().and_then(|()| from.read_to_string(&mut text)).context("reading the figures")?;
            let point = serde_json::from_str(&text).context("reading the figures")?;
            points.push(point);
            self.show_costs(&points);
        }
        self.show_start_and_memory(&points);
        if let Some(path) = &self.json {
            let lines: Vec<String> = points.iter().map(serde_json::to_string).collect::<serde_json::Result<_>>()?;
            match path.as_str() {
                "-" => say!("{}", lines.join("\n")),
                path => std::fs::write(path, lines.join("\n") + "\n").with_context(|| format!("writing {path:?}"))?,
            }
        }
        Ok(0)
    }

    /// One row for the last point, beside the first.
    fn show_costs(&self, points: &[Point]) {
        let (Some(first), Some(p)) = (points.first(), points.last()) else { return };
        let each = |sum: f64| sum / p.ranks as f64;
        say!(
            "{:>6} {:>9.3} {:>6.2} {:>9.3} {:>6.2} | {:>7.3} {:>7.3} {:>7.3} {:>7.3} {:>7.3} | {:>9.1} {:>7.2} {:>8.0} {:>8.2} {:>6.2} {:>9.2} {:>9.2} {:>8}",
            p.ranks,
            p.cpu_us_per_token,
            p.cpu_us_per_token / first.cpu_us_per_token,
            p.exchange_cpu_us_per_token,
            p.exchange_cpu_us_per_token / first.exchange_cpu_us_per_token,
            p.parts.dispatch_send_us,
            p.parts.dispatch_recv_us,
            p.parts.engine_us,
            p.parts.combine_send_us,
            p.parts.combine_recv_us,
            p.bytes_per_token / 1024.0,
            p.remote_bytes_per_token / p.bytes_per_token,
            p.wall_us_per_exchange,
            each(p.per_exchange.waits_yielded),
            each(p.per_exchange.waits_slept),
            each(p.per_exchange.voluntary_switches),
            each(p.per_exchange.involuntary_switches),
            p.verified.map_or("-", |v| if v { "yes" } else { "NO" })
        );
    }

    fn show_start_and_memory(&self, points: &[Point]) {
        say!("\n# start in ms; memory per rank in KiB, of shared memory what was touched");
        say!(
            "{:>6} {:>9} {:>8} {:>9} {:>9} {:>8} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11} {:>6}",
            "ranks",
            "to ready",
            "init",
            "last join",
            "init cpu",
            "faults",
            "joined",
            "touched",
            "planned",
            "private",
            "tables",
            "mapped",
            "files"
        );
        for p in points {
            let (s, m) = (&p.start, &p.memory);
            say!(
                "{:>6} {:>9.1} {:>8.1} {:>9.1} {:>9.2} {:>8.0} {:>9.0} {:>9.0} {:>9.0} {:>9.0} {:>9.0} {:>11.0} {:>6.0}",
                p.ranks,
                s.spawn_to_ready_ms,
                s.init_ms,
                s.last_joined_to_ready_ms,
                s.init_cpu_ms,
                s.init_page_faults,
                m.joined / 1024.0,
                m.touched / 1024.0,
                m.planned / 1024.0,
                m.private / 1024.0,
                m.page_tables / 1024.0,
                m.mapped / 1024.0,
                m.descriptors
            );
        }
    }

    /// One rank.
    fn join(&self, point: &OsString) -> Result<()> {
        let (began_us, before) = (clock_us()?, Usage::now()?);
        let comm = Communicator::from_env()?;
        let (ready_us, init) = (clock_us()?, Usage::now()?.since(&before));
        comm.barrier()?;
        let joined = Memory::now()?;
        comm.barrier()?;

        let mut rank = Rank::new(self, &comm)?;
        let verified = if self.verify { Some(rank.verify()?) } else { None };
        for _ in 0..self.warmup {
            rank.exchange()?;
        }
        rank.parts_us = [0.0; 5];
        comm.barrier()?;
        let (started, before, counted) = (clock_us()?, Usage::now()?, comm.statistics());
        for _ in 0..self.iters {
            rank.exchange()?;
        }
        let (used, counts) = (Usage::now()?.since(&before), comm.statistics());
        comm.barrier()?;
        let wall_us = clock_us()? - started;
        let count = |of: fn(&Statistics) -> u64| (of(&counts) - of(&counted)) as f64;
        let (rows, remote_rows) = rank.rows_per_exchange();
        let memory = Memory::now()?;
        comm.barrier()?;
        let figures = Figures {
            began_us,
            ready_us,
            init,
            joined,
            used,
            parts_us: rank.parts_us,
            rows,
            remote_rows,
            waits: [count(|s| s.waits), count(|s| s.waits_yielded), count(|s| s.waits_slept), count(|s| s.wake_ups)],
            memory,
        };
        let planned = rank.planned_bytes()? as f64;
        if let Some(all) = gather(&comm, figures)? {
            let point_json = serde_json::to_string(&self.point(&all, wall_us, planned, verified)?)?;
            std::fs::write(point, point_json).context("handing the figures to the launcher")?;
        }
        comm.barrier()?;
        Ok(())
    }

    fn point(&self, all: &[Figures], wall_us: f64, planned: f64, verified: Option<bool>) -> Result<Point> {
        let started: f64 = std::env::var(STARTED).context("the launcher's start")?.parse().context("its start")?;
        let sum = |of: &dyn Fn(&Figures) -> f64| all.iter().map(of).sum::<f64>();
        let last = |of: &dyn Fn(&Figures) -> f64| all.iter().map(of).fold(f64::MIN, f64::max);
        let mean = |of: &dyn Fn(&Figures) -> f64| sum(of) / all.len() as f64;
        let (iters, tokens) = (f64::from(self.iters), self.tokens as f64);
        let per_token = |us: f64| us / iters / tokens;
        let (cpu, row_bytes) = (sum(&|f| f.used.cpu_us()), (self.hidden * size_of::<bf16>()) as f64);
        let ready = last(&|f| f.ready_us);
        let part = |i: usize| per_token(sum(&|f| f.parts_us[i]));
        Ok(Point {
            parts: Parts {
                dispatch_send_us: part(0),
                dispatch_recv_us: part(1),
                engine_us: part(ENGINE),
                combine_send_us: part(3),
                combine_recv_us: part(4),
            },
            bench: "growth".to_owned(),
            ranks: all.len(),
            tokens: self.tokens,
            hidden: self.hidden,
            topk: self.topk,
            experts: self.experts,
            reduction: self.reduction,
            routing: self.routing,
            exchanges: self.iters,
            cpu_us_per_token: per_token(cpu),
            exchange_cpu_us_per_token: per_token(cpu - sum(&|f| f.parts_us[ENGINE])),
            system_us_per_token: per_token(sum(&|f| f.used.system_us)),
            wall_us_per_exchange: wall_us / iters,
            bytes_per_token: sum(&|f| f.rows) * row_bytes / tokens,
            remote_bytes_per_token: sum(&|f| f.remote_rows) * row_bytes / tokens,
            per_exchange: PerExchange {
                voluntary_switches: sum(&|f| f.used.voluntary_switches) / iters,
                involuntary_switches: sum(&|f| f.used.involuntary_switches) / iters,
                page_faults: sum(&|f| f.used.page_faults) / iters,
                waits: sum(&|f| f.waits[0]) / iters,
                waits_yielded: sum(&|f| f.waits[1]) / iters,
                waits_slept: sum(&|f| f.waits[2]) / iters,
                wake_ups: sum(&|f| f.waits[3]) / iters,
            },
            start: Start {
                spawn_to_ready_ms: (ready - started) / 1e3,
                init_ms: last(&|f| f.ready_us - f.began_us) / 1e3,
                last_joined_to_ready_ms: (ready - last(&|f| f.began_us)) / 1e3,
                init_cpu_ms: mean(&|f| f.init.cpu_us()) / 1e3,
                init_page_faults: mean(&|f| f.init.page_faults),
            },
            memory: PerRank {
                joined: mean(&|f| f.joined.segments),
                touched: mean(&|f| f.memory.segments),
                planned,
                private: mean(&|f| f.memory.private),
                page_tables: mean(&|f| f.memory.page_tables),
                mapped: mean(&|f| f.memory.mapped),
                descriptors: mean(&|f| f.memory.descriptors),
            },
            verified,
        })
    }

    /// The tokens of `rank`, by their numbers over all ranks.
    fn tokens_of(&self, rank: usize, ranks: usize) -> std::ops::Range<usize> {
        self.tokens * rank / ranks..self.tokens * (rank + 1) / ranks
    }

    /// The experts of one token: with uniform routing the same whatever the number of ranks.
    fn experts_of(&self, token: usize, own: &[usize]) -> Result<Vec<i32>> {
        let eligible = |id: usize| self.routing == Choose::Uniform || !own.contains(&id);
        let others = (0..self.experts).filter(|&id| eligible(id)).count();
        if others < self.topk {
            bail!("a token needs {} experts on other ranks, there are {others}", self.topk);
        }
        let mut rng = StdRng::seed_from_u64(token as u64);
        let mut ids: Vec<i32> = vec![];
        while ids.len() < self.topk {
            let id = rng.random_range(0..self.experts);
            if eligible(id) && !ids.contains(&(id as i32)) {
                ids.push(id as i32);
            }
        }
        Ok(ids)
    }
}

fn gather(comm: &Communicator, figures: Figures) -> Result<Option<Vec<Figures>>> {
    if comm.rank() != 0 {
        comm.send(0, GATHER, bytemuck::bytes_of(&figures))?;
        return Ok(None);
    }
    let mut all = vec![figures];
    for rank in 1..comm.world_size() {
        let mut theirs = Figures::zeroed();
        comm.recv(rank, GATHER, bytemuck::bytes_of_mut(&mut theirs))?;
        all.push(theirs);
    }
    Ok(Some(all))
}

/// Element `column` of a token.
fn value(token: usize, column: usize) -> bf16 {
    bf16::from_f32(((token * 7 + column) % 251) as f32 / 16.0 - 8.0)
}

/// The factor of choice `i`.
fn weight(i: usize) -> f32 {
    (i % 7 + 1) as f32 / 8.0
}

/// What an expert makes of its tokens.
fn scale(expert: usize) -> f32 {
    (expert % 5 + 1) as f32
}

/// One rank's part of the exchanges.
struct Rank<'a> {
    args: &'a GrowthArgs,
    comm: &'a Communicator,
    moe: Moe,
    first: usize,
    tokens: Vec<bf16>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    out: Vec<bf16>,
    row: Vec<bf16>,
    /// Processor time of each part of the exchanges: [`PARTS`].
    parts_us: [f64; 5],
}

impl<'a> Rank<'a> {
    fn new(args: &'a GrowthArgs, comm: &'a Communicator) -> Result<Self> {
        let ranks = comm.world_size();
        let mine = args.tokens_of(comm.rank(), ranks);
        let reduction = match args.reduction {
            Reduce::PerExpert => Reduction::PerExpert,
            Reduce::PerRank => Reduction::PerRank,
        };
        let most = args.tokens.div_ceil(ranks).max(1);
        // Even, as the handle places them.
        let own = |rank: usize| -> Vec<usize> {
            let (share, larger) = (args.experts / ranks, args.experts % ranks);
            let first = rank * share + rank.min(larger);
            (first..first + share + usize::from(rank < larger)).collect()
        };
        let mut counts = vec![0usize; args.experts];
        let mut ids = vec![];
        for rank in 0..ranks {
            let experts = own(rank);
            for token in args.tokens_of(rank, ranks) {
                let chosen = args.experts_of(token, &experts)?;
                chosen.iter().for_each(|&id| counts[id as usize] += 1);
                if rank == comm.rank() {
                    ids.extend(chosen);
                }
            }
        }
        let most_rows = (0..ranks).map(|rank| own(rank).iter().map(|&e| counts[e]).sum::<usize>()).max().unwrap_or(0);
        let config = MoeConfig::new(most, args.hidden, args.topk, args.experts, DType::BF16);
        let moe = Moe::new(comm, MoeConfig { reduction, max_expert_rows: Some(most_rows.max(1)), ..config })?;
        let hidden = args.hidden;
        Ok(Rank {
            args,
            comm,
            moe,
            first: mine.start,
            tokens: mine.clone().flat_map(|t| (0..hidden).map(move |c| value(t, c))).collect(),
            weights: (0..ids.len()).map(|i| weight(mine.start * args.topk + i)).collect(),
            ids,
            out: vec![bf16::ZERO; mine.len() * hidden],
            row: vec![bf16::ZERO; hidden],
            parts_us: [0.0; 5],
        })
    }

    /// One exchange. The experts' part reads every row from where it lies and writes every output.
    fn exchange(&mut self) -> Result<()> {
        let mut lap = thread_cpu_us()?;
        let mut parts = self.parts_us.iter_mut();
        let mut next = || -> Result<()> {
            let now = thread_cpu_us()?;
            if let Some(part) = parts.next() {
                *part += now - lap;
            }
            lap = now;
            Ok(())
        };
        let sent = self.moe.dispatch_send(&self.tokens, &Routing::new(&self.ids, &self.weights))?;
        next()?;
        let mut batch = self.moe.dispatch_recv(&sent)?;
        next()?;
        for i in 0..batch.len() {
            batch.copy_row(i, &mut self.row)?;
            batch.output_row::<bf16>(i)?.copy_from_slice(&self.row);
        }
        next()?;
        self.moe.combine_send(batch)?;
        next()?;
        self.moe.combine_recv(sent, &mut self.out)?;
        next()
    }

    /// Rows that this rank reads in an exchange: tokens for its experts, and outputs for its tokens. And those of them that lie
    /// on another rank.
    fn rows_per_exchange(&self) -> (f64, f64) {
        // Tokens: one read per choice, counted on the choosing rank.
        let rank_of = |id: i32| {
            let mut ranks = 0..self.comm.world_size();
            ranks.find(|&r| self.moe.experts_of(r).is_ok_and(|experts| experts.contains(&(id as usize))))
        };
        let (mut rows, mut remote) = (0, 0);
        for ids in self.ids.chunks_exact(self.args.topk) {
            let mut ranks: Vec<_> = ids.iter().filter_map(|&id| rank_of(id)).collect();
            let mut count = |ranks: &[usize]| {
                rows += ranks.len();
                remote += ranks.iter().filter(|&&r| r != self.comm.rank()).count();
            };
            count(&ranks);
            if self.args.reduction == Reduce::PerRank {
                ranks.sort_unstable();
                ranks.dedup();
            }
            count(&ranks);
        }
        (rows as f64, remote as f64)
    }

    fn planned_bytes(&self) -> Result<usize> {
        let ranks = self.comm.world_size();
        let plan = Communicator::memory_plan(ranks, self.comm.config());
        Ok(plan.outbox_bytes + plan.heap_bytes + self.moe.config().outbox_bytes(ranks)?)
    }

    /// One exchange in which every row and every sum is compared with a plain reference.
    fn verify(&self) -> Result<bool> {
        let sent = self.moe.dispatch_send(&self.tokens, &Routing::new(&self.ids, &self.weights))?;
        let mut batch = self.moe.dispatch_recv(&sent)?;
        self.verify_rows(&mut batch)?;
        self.moe.combine_send(batch)?;
        let mut sums = vec![bf16::NAN; self.out.len()];
        self.moe.combine_recv(sent, &mut sums)?;
        for (t, out) in sums.chunks_exact(self.args.hidden).enumerate() {
            for (c, &found) in out.iter().enumerate() {
                let expected = self.expected_sum(t, c)?;
                ensure!(found == expected, "token {t}, column {c}: the sum is {found}, expected {expected}");
            }
        }
        Ok(true)
    }

    fn verify_rows(&self, batch: &mut ExpertBatch<'_>) -> Result<()> {
        let mut copy = vec![bf16::ZERO; self.args.hidden];
        for i in 0..batch.len() {
            let row = batch.row(i);
            let token = self.args.tokens_of(row.source, self.comm.world_size()).start + row.token;
            batch.copy_row(i, &mut copy)?;
            let wrong = copy.iter().enumerate().find(|&(c, &x)| x != value(token, c));
            ensure!(wrong.is_none(), "row {i}, token {token}: {wrong:?} is wrong");
            let scale = scale(batch.local_experts()[row.expert]);
            let outputs = batch.output_row::<bf16>(i)?.iter_mut().zip(&copy);
            outputs.for_each(|(y, x)| *y = bf16::from_f32(x.to_f32() * scale));
        }
        Ok(())
    }

    fn expected_sum(&self, t: usize, c: usize) -> Result<bf16> {
        let x = value(self.first + t, c).to_f32();
        let choices = t * self.args.topk..(t + 1) * self.args.topk;
        let term = |i: usize| self.weights[i] * bf16::from_f32(x * scale(self.ids[i] as usize)).to_f32();
        if self.args.reduction == Reduce::PerExpert {
            return Ok(bf16::from_f32(choices.fold(0.0f32, |sum, i| sum + term(i))));
        }
        let mut sum = 0.0f32;
        for rank in 0..self.comm.world_size() {
            let local = self.moe.experts_of(rank)?;
            let mut here: Vec<usize> = choices.clone().filter(|&i| local.contains(&(self.ids[i] as usize))).collect();
            here.sort_by_key(|&i| self.ids[i]);
            if !here.is_empty() {
                sum += bf16::from_f32(here.into_iter().fold(0.0f32, |sum, i| sum + term(i))).to_f32();
            }
        }
        Ok(bf16::from_f32(sum))
    }
}
