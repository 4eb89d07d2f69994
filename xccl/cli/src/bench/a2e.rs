//! `xccl bench a2e`: attention and experts on different ranks, flat or by trampolines; what each rank watches, reads and sends for a
//! micro-batch, beside what was predicted.

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use bytemuck::{Pod, Zeroable};
use clap::{Args, ValueEnum};
use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use xccl::{
    Attention, Communicator, Config, DType, DomainBatch, Exchange, Experts, Forward, MoeConfig, Reduction, Role,
    RoleConfig, RoleCounts, Routing,
};

use super::figures::{JsonLines, Percentiles};
use super::process::thread_cpu_us;
use super::{Common, join, start};
use crate::say::say;

/// Tag of the benchmark's own messages.
const GATHER: u32 = 0xffff_0004;
/// Micro-batches that differ in their routing; then from the first on again.
const ROUTINGS: usize = 4;

#[derive(Args)]
pub struct A2eArgs {
    #[command(flatten)]
    common: Common,
    /// Attention ranks of each domain
    #[arg(long, default_value_t = 2)]
    attention: usize,
    /// Ranks that hold the experts; a list with --simulate
    #[arg(long, alias = "experts-ranks", value_delimiter = ',', default_value = "2")]
    expert_ranks: Vec<usize>,
    /// Attention groups that take turns on the experts
    #[arg(long, default_value_t = 1)]
    domains: usize,
    /// Who reads the lists of whom
    #[arg(long, value_enum, default_value = "auto")]
    mode: Mode,
    /// Trampolines of each node, if there are; 0 for the square root of a domain's attention ranks
    #[arg(long, default_value_t = 0)]
    trampolines: usize,
    /// Most tokens of a rank in a micro-batch; each has between a half of them and all
    #[arg(long, default_value_t = 8)]
    tokens: usize,
    /// Elements of a token row (bf16)
    #[arg(long, default_value_t = 1024)]
    hidden: usize,
    /// Experts per token
    #[arg(long, default_value_t = 2)]
    topk: usize,
    /// Experts over all ranks; 0 for one on each expert rank, or topk if there are fewer
    #[arg(long, default_value_t = 0)]
    experts: usize,
    /// Where sums are formed
    #[arg(long, value_enum, default_value = "per-expert")]
    reduction: Reduce,
    /// Start no ranks: what they would count, flat and by trampolines
    #[arg(long)]
    simulate: bool,
}

#[derive(Clone, Copy, ValueEnum, Serialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    /// Each expert rank those of each attention rank, and the other way round
    Flat,
    /// A few expert ranks of each node, for the others
    Trampoline,
    /// By trampolines where there are many ranks
    Auto,
}

#[derive(Clone, Copy, ValueEnum, PartialEq)]
enum Reduce {
    PerExpert,
    PerRank,
}

/// What a rank hands in.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct Figures {
    is_attention: f64,
    micro_batches: f64,
    /// Of all its micro-batches: from the first send to the last receive, processor time of the thread, both in microseconds.
    wall_us: f64,
    cpu_us: f64,
    latency_us: f64,
    is_as_predicted: f64,
    counts: [f64; 6],
}

/// Means over the ranks of a role, for one micro-batch.
#[derive(Serialize)]
struct Line {
    role: &'static str,
    ranks: usize,
    wall_us: f64,
    cpu_us: f64,
    /// Median over the ranks of the time from a2e_send to the end of e2a_recv.
    latency_us: Option<f64>,
    published: f64,
    words_watched: f64,
    most_words_watched: f64,
    lists_read: f64,
    list_bytes: f64,
    most_list_bytes: f64,
    far_messages: f64,
    far_bytes: f64,
}

#[derive(Serialize)]
struct Point {
    bench: &'static str,
    attention: usize,
    expert_ranks: usize,
    domains: usize,
    nodes: u32,
    mode: Mode,
    simulated: bool,
    tokens: usize,
    hidden: usize,
    topk: usize,
    experts: usize,
    lines: Vec<Line>,
    as_predicted: Option<bool>,
    verified: Option<bool>,
}

fn counts_of(counts: &RoleCounts) -> [f64; 6] {
    let c = counts;
    [c.published, c.words_watched, c.lists_read, c.list_bytes, c.far_messages, c.far_bytes].map(|n| n as f64)
}

impl A2eArgs {
    pub fn run(&self) -> Result<u8> {
        if self.simulate {
            self.show_predictions()?;
            return Ok(0);
        }
        let [expert_ranks] = self.expert_ranks[..] else { bail!("a list of --expert-ranks goes with --simulate only") };
        let n = u32::try_from(self.domains * self.attention + expert_ranks).unwrap_or(u32::MAX);
        ensure!((2..=1024).contains(&n), "{n} ranks: at most 1024 can be started");
        match join(|| {
            // Hundreds of ranks: what this benchmark's own messages need, no more.
            Ok(Config::from_env()?.p2p_ring_bytes(4 << 10).heap_bytes(64 << 10))
        })? {
            None => start(&Common { n, ..self.common.clone() }),
            Some(comm) => self.measure(&comm, expert_ranks).map(|()| 0),
        }
    }

    fn config(&self, expert_ranks: usize, mode: Mode) -> RoleConfig {
        let experts = match self.experts {
            0 => expert_ranks.max(self.topk),
            experts => experts,
        };
        let reduction = match self.reduction {
            Reduce::PerExpert => Reduction::PerExpert,
            Reduce::PerRank => Reduction::PerRank,
        };
        let shape = MoeConfig::new(self.tokens.max(1), self.hidden, self.topk, experts, DType::BF16);
        let moe = MoeConfig { reduction, ..shape };
        let domains = (0..self.domains).map(|d| d * self.attention..(d + 1) * self.attention);
        let first = self.domains * self.attention;
        let config = RoleConfig::new(domains, first..first + expert_ranks, moe);
        let forward = match mode {
            Mode::Flat => Forward::Flat,
            Mode::Trampoline => Forward::Trampoline,
            Mode::Auto => Forward::Auto,
        };
        RoleConfig { forward, trampolines: self.trampolines, ..config }
    }

    /// The experts of a micro-batch's tokens: the same wherever they are computed.
    fn ids(&self, experts: usize, batch: usize, rank: usize) -> Vec<i64> {
        let mut rng = StdRng::seed_from_u64((batch % ROUTINGS) as u64 * 1_000_003 + rank as u64);
        let tokens = rng.random_range(self.tokens / 2..=self.tokens);
        let mut ids: Vec<i64> = vec![];
        for _ in 0..tokens {
            let begin = ids.len();
            while ids.len() < begin + self.topk {
                let id = rng.random_range(0..experts as i64);
                if !ids[begin..].contains(&id) {
                    ids.push(id);
                }
            }
        }
        ids
    }

    fn check(&self, config: &RoleConfig) -> Result<()> {
        let experts = config.moe.experts;
        ensure!(self.topk <= experts, "--topk {} is more than the {experts} experts", self.topk);
        ensure!(self.domains > 0 && self.attention > 0, "there must be a domain with an attention rank");
        Ok(())
    }

    fn measure(&self, comm: &Communicator, expert_ranks: usize) -> Result<()> {
        let config = self.config(expert_ranks, self.mode);
        self.check(&config)?;
        let json = JsonLines::open(comm, self.common.json.as_deref())?;
        let rounds = (self.common.warmup + self.common.iters) as usize;
        let mut mine = self.rounds(comm, &config, rounds)?;
        let nodes = (0..comm.world_size()).map(|rank| comm.node_of(rank)).collect::<xccl::Result<Vec<_>>>()?;
        let predicted = config.predict(&nodes, rounds, |_, batch, rank| self.ids(config.moe.experts, batch, rank))?;
        mine.is_as_predicted = f64::from(u8::from(counts_of(&predicted[comm.rank()]) == mine.counts));
        if comm.rank() > 0 {
            comm.send(0, GATHER, bytemuck::bytes_of(&(mine)))?;
            comm.barrier()?;
            return Ok(());
        }
        let mut all = vec![mine];
        for rank in 1..comm.world_size() {
            let mut theirs = Figures::zeroed();
            comm.recv(rank, GATHER, bytemuck::bytes_of_mut(&mut theirs))?;
            all.push(theirs);
        }
        let as_predicted = all.iter().all(|figures| figures.is_as_predicted == 1.0);
        self.show(
            json,
            self.point(expert_ranks, self.mode, &all, (Some(as_predicted), self.common.verify.then_some(true))),
        )?;
        comm.barrier()?;
        ensure!(as_predicted, "ranks have counted something else than was predicted");
        Ok(())
    }

    /// Sends micro-batches, or serves them; says what it took.
    fn rounds(&self, comm: &Communicator, config: &RoleConfig, rounds: usize) -> Result<Figures> {
        match config.role_of(comm.rank()) {
            Some(Role::Attention { .. }) => {
                let attention = Attention::new(comm, config.clone())?;
                comm.barrier()?;
                self.attend(comm.rank(), &attention, rounds)
            }
            _ => {
                let experts = Experts::new(comm, config.clone())?;
                comm.barrier()?;
                let (begun, cpu) = (Instant::now(), thread_cpu_us()?);
                let mut served = 0;
                while let Some(batch) = experts.a2e_recv()? {
                    compute(&experts, batch, self.hidden)?;
                    served += 1;
                }
                ensure!(served == rounds * experts.domains(), "{served} micro-batches were served");
                let figures = Figures {
                    micro_batches: served as f64,
                    wall_us: begun.elapsed().as_secs_f64() * 1e6,
                    cpu_us: thread_cpu_us()? - cpu,
                    counts: counts_of(&experts.counts()),
                    ..Figures::zeroed()
                };
                Ok(figures)
            }
        }
    }

    fn attend(&self, me: usize, attention: &Attention, rounds: usize) -> Result<Figures> {
        let experts = attention.config().experts;
        let mut in_flight: VecDeque<(usize, Exchange<'_>, Instant)> = VecDeque::new();
        let mut inputs = vec![];
        for batch in 0..ROUTINGS.min(rounds) {
            let ids = self.ids(experts, batch, me);
            let tokens = ids.len() / self.topk;
            let rows: Vec<bf16> = (0..tokens * self.hidden)
                .map(|i| bf16::from_f32(value(batch, me, i / self.hidden, i % self.hidden)))
                .collect();
            let weights: Vec<f32> = (0..ids.len()).map(weight).collect();
            inputs.push((ids, rows, weights));
        }
        let mut out = vec![bf16::ZERO; self.tokens * self.hidden];
        let (mut latencies, mut checking) = (vec![], 0.0);
        let (begun, cpu) = (Instant::now(), thread_cpu_us()?);
        for batch in 0..rounds + 2 {
            if (batch >= 2 || batch >= rounds)
                && let Some((of, sent, since)) = in_flight.pop_front()
            {
                let (ids, rows, weights) = &inputs[of % ROUTINGS];
                attention.e2a_recv(sent, &mut out[..rows.len()])?;
                latencies.push(since.elapsed().as_secs_f64() * 1e6);
                if self.common.verify {
                    let since = thread_cpu_us()?;
                    ensure!(self.is_right(ids, rows, weights, &out), "rank {me}: a sum of micro-batch {of} is wrong");
                    checking += thread_cpu_us()? - since;
                }
            }
            if batch < rounds {
                let (ids, rows, weights) = &inputs[batch % ROUTINGS];
                let since = Instant::now();
                in_flight.push_back((batch, attention.a2e_send(rows, &Routing::new(ids, weights))?, since));
            }
        }
        let figures = Figures {
            is_attention: 1.0,
            micro_batches: rounds as f64,
            wall_us: begun.elapsed().as_secs_f64() * 1e6,
            cpu_us: thread_cpu_us()? - cpu - checking,
            latency_us: Percentiles::of(latencies).median,
            counts: counts_of(&attention.counts()),
            ..Figures::zeroed()
        };
        Ok(figures)
    }

    /// Small whole numbers: no sum of them is rounded.
    fn is_right(&self, ids: &[i64], rows: &[bf16], weights: &[f32], out: &[bf16]) -> bool {
        let tokens = ids.chunks_exact(self.topk).zip(weights.chunks_exact(self.topk));
        tokens.enumerate().all(|(token, (ids, weights))| {
            (0..self.hidden).all(|column| {
                let i = token * self.hidden + column;
                let term = |(&expert, &w): (&i64, &f32)| w * output(expert, rows[i].to_f32());
                out[i].to_f32() == ids.iter().zip(weights).map(term).sum::<f32>()
            })
        })
    }

    fn point(
        &self,
        expert_ranks: usize,
        mode: Mode,
        all: &[Figures],
        (as_predicted, verified): (Option<bool>, Option<bool>),
    ) -> Point {
        let line = |role: &'static str, is_attention: f64| {
            let ranks: Vec<&Figures> = all.iter().filter(|figures| figures.is_attention == is_attention).collect();
            let each = |of: &dyn Fn(&Figures) -> f64| ranks.iter().map(|f| of(f) / f.micro_batches).collect::<Vec<_>>();
            let mean = |of: &dyn Fn(&Figures) -> f64| each(of).iter().sum::<f64>() / ranks.len() as f64;
            let most = |of: &dyn Fn(&Figures) -> f64| each(of).into_iter().fold(0.0, f64::max);
            let latencies: Vec<f64> = ranks.iter().map(|f| f.latency_us).filter(|us| *us > 0.0).collect();
            Line {
                role,
                ranks: ranks.len(),
                wall_us: mean(&|f| f.wall_us),
                cpu_us: mean(&|f| f.cpu_us),
                latency_us: (!latencies.is_empty()).then(|| Percentiles::of(latencies).median),
                published: mean(&|f| f.counts[0]),
                words_watched: mean(&|f| f.counts[1]),
                most_words_watched: most(&|f| f.counts[1]),
                lists_read: mean(&|f| f.counts[2]),
                list_bytes: mean(&|f| f.counts[3]),
                most_list_bytes: most(&|f| f.counts[3]),
                far_messages: mean(&|f| f.counts[4]),
                far_bytes: mean(&|f| f.counts[5]),
            }
        };
        let config = self.config(expert_ranks, mode);
        Point {
            bench: "a2e",
            attention: self.attention,
            expert_ranks,
            domains: self.domains,
            nodes: self.common.nodes,
            mode,
            simulated: as_predicted.is_none(),
            tokens: self.tokens,
            hidden: self.hidden,
            topk: self.topk,
            experts: config.moe.experts,
            lines: vec![line("attention", 1.0), line("experts", 0.0)],
            as_predicted,
            verified,
        }
    }

    fn heading(&self) -> [String; 2] {
        [
            format!(
                "# xccl bench a2e: {} domains of {} attention ranks, nodes {}, hidden {}, top-{}, up to {} tokens; for one micro-batch, means over ranks",
                self.domains, self.attention, self.common.nodes, self.hidden, self.topk, self.tokens
            ),
            format!(
                "{:>10} {:>12} {:>10} {:>6} {:>10} {:>10} {:>9} {:>8} {:>8} {:>8} {:>11} {:>9} {:>10} {:>9} {:>9}",
                "mode",
                "expert ranks",
                "role",
                "ranks",
                "us",
                "cpu us",
                "published",
                "words",
                "at most",
                "lists",
                "list bytes",
                "far msgs",
                "far bytes",
                "verified",
                "predicted"
            ),
        ]
    }

    fn rows(point: &Point) -> Vec<String> {
        let mode = match point.mode {
            Mode::Flat => "flat",
            Mode::Trampoline => "trampoline",
            Mode::Auto => "auto",
        };
        let yes = |is: Option<bool>| is.map_or("-", |is| if is { "yes" } else { "NO" });
        let time = |us: f64| if point.simulated { "-".to_owned() } else { format!("{us:.1}") };
        let row = |line: &Line| {
            format!(
                "{mode:>10} {:>12} {:>10} {:>6} {:>10} {:>10} {:>9.1} {:>8.1} {:>8.1} {:>8.1} {:>11.0} {:>9.1} {:>10.0} {:>9} {:>9}",
                point.expert_ranks,
                line.role,
                line.ranks,
                time(line.latency_us.unwrap_or(line.wall_us)),
                time(line.cpu_us),
                line.published,
                line.words_watched,
                line.most_words_watched,
                line.lists_read,
                line.list_bytes,
                line.far_messages,
                line.far_bytes,
                yes(point.verified),
                yes(point.as_predicted),
            )
        };
        point.lines.iter().map(row).collect()
    }

    fn show(&self, mut json: JsonLines, point: Point) -> Result<()> {
        self.heading().iter().chain(&Self::rows(&point)).for_each(|line| json.table(line));
        json.write(&point)
    }

    /// What ranks would count in as many micro-batches as would be measured.
    fn show_predictions(&self) -> Result<()> {
        self.heading().iter().for_each(|line| say!("{line}"));
        let modes = if self.mode == Mode::Auto { vec![Mode::Flat, Mode::Trampoline] } else { vec![self.mode] };
        for &expert_ranks in &self.expert_ranks {
            for &mode in &modes {
                let config = self.config(expert_ranks, mode);
                self.check(&config)?;
                let ranks = self.domains * self.attention + expert_ranks;
                // In blocks, as `xccl run --nodes` places them.
                let (nodes, rounds) = (self.common.nodes as usize, (2 * ROUTINGS).max(3));
                let nodes: Vec<usize> = (0..ranks).map(|rank| rank * nodes / ranks).collect();
                let counts =
                    config.predict(&nodes, rounds, |_, batch, rank| self.ids(config.moe.experts, batch, rank))?;
                let figures = |(rank, counts): (usize, &RoleCounts)| {
                    let is_attention = rank < self.domains * self.attention;
                    let micro_batches = if is_attention { rounds } else { rounds * self.domains };
                    Figures {
                        is_attention: f64::from(u8::from(is_attention)),
                        micro_batches: micro_batches as f64,
                        counts: counts_of(counts),
                        ..Figures::zeroed()
                    }
                };
                let all: Vec<Figures> = counts.iter().enumerate().map(figures).collect();
                let point = self.point(expert_ranks, mode, &all, (None, None));
                match self.common.json.as_deref() {
                    Some("-") => say!("{}", serde_json::to_string(&point)?),
                    _ => Self::rows(&point).iter().for_each(|line| say!("{line}")),
                }
            }
        }
        Ok(())
    }
}

/// The experts' work: each writes something of its own.
fn compute(experts: &Experts, mut batch: DomainBatch<'_>, hidden: usize) -> Result<()> {
    let mut row = vec![bf16::ZERO; hidden];
    for i in 0..batch.len() {
        batch.copy_row(i, &mut row)?;
        let expert = batch.local_experts()[batch.row(i).expert] as i64;
        let to = batch.output_row::<bf16>(i)?;
        to.iter_mut().zip(&row).for_each(|(y, x)| *y = bf16::from_f32(output(expert, x.to_f32())));
    }
    Ok(experts.e2a_send(batch)?)
}

fn value(batch: usize, rank: usize, token: usize, column: usize) -> f32 {
    ((batch + rank * 3 + token * 5 + column) % 9) as f32 - 4.0
}

fn output(expert: i64, x: f32) -> f32 {
    x * (expert % 4) as f32 + 1.0
}

fn weight(i: usize) -> f32 {
    [1.0, 2.0][i % 2]
}
