//! `xccl bench moe`: dispatch and combine, time of the slowest rank, beside what plain copies of the same rows take.

use std::fs::File;
use std::io::BufReader;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use half::{bf16, f16};
use memmap2::{Advice, MmapMut};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;
use xccl::placement;
use xccl::{
    Communicator, Config, CountForm, DType, Element, Exchange, ExpertBatch, HeapBuffer, Moe, MoeConfig, ReduceOp,
    Reduction, Routing, ScaleLayout, WireFormat, WireRows,
};

use super::epilogue::{Extras, Step};
use super::figures::{JsonLines, Percentiles, line_ns, show_line, slowest, timed};
use super::lanes::{InPool, in_pool};
use super::{Common, progress, quantized};

#[derive(Args)]
pub struct MoeArgs {
    #[command(flatten)]
    pub(super) common: Common,
    /// Tokens of every rank; a list is measured point by point
    #[arg(long, value_delimiter = ',', default_value = "128")]
    tokens: Vec<usize>,
    /// Tokens of each rank, in rank order, in place of --tokens
    #[arg(long, value_delimiter = ',')]
    tokens_per_rank: Option<Vec<usize>>,
    /// Elements of a token row
    #[arg(long, default_value_t = 7168)]
    hidden: usize,
    /// Experts per token
    #[arg(long, default_value_t = 8)]
    topk: usize,
    /// Experts over all ranks
    #[arg(long, default_value_t = 256)]
    experts: usize,
    /// Element type: bf16, f16 or f32
    #[arg(long, default_value = "bf16", value_parser = DType::from_str)]
    dtype: DType,
    /// How token rows travel: native, int8, fp8-e4m3 or fp8-e5m2
    #[arg(long, default_value = "native", value_parser = WireFormat::from_str)]
    wire: WireFormat,
    /// What the experts' side does with the rows
    #[arg(long, value_enum, default_value = "in-place")]
    layout: Layout,
    /// Copies hand values and scales over as they travel, scales in columns, instead of decoding
    #[arg(long)]
    keep_wire: bool,
    /// Where the tokens are before the dispatch
    #[arg(long, value_enum, default_value = "copy")]
    input: Place,
    /// Where the experts' outputs are before the combine; in-place takes them from the outbox in any case
    #[arg(long, value_enum, default_value = "copy")]
    output: Place,
    /// Where sums are formed
    #[arg(long, value_enum, default_value = "per-rank")]
    reduction: Reduce,
    /// Threads that share each rank's copies and sums; every other round has one, for comparison. Ranks times lanes should not
    /// be more than the cores
    #[arg(long, default_value_t = 1)]
    lanes: usize,
    /// What is done with the sums in combine's pass; every other round does it in a pass of its own, for comparison
    #[arg(long, value_enum, value_delimiter = ',')]
    epilogue: Vec<Step>,
    /// uniform, skew:F (expert 0 is drawn F times as often as the average), or a .npy file of recorded ids, [tokens, topk]
    #[arg(long, default_value = "uniform")]
    routing: RoutingSource,
    /// Seed of the drawn routing
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Then balances the experts from the tokens that they got, with so many slots more than experts, installs that placement and
    /// measures again
    #[arg(long)]
    redundant: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum, Serialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Layout {
    /// Rows stay in the senders' memory
    InPlace,
    /// Rows are copied to one contiguous buffer, expert by expert
    ExpertMajor,
    /// Rows are copied to [local experts, capacity, hidden]
    Padded,
}

#[derive(Clone, Copy, ValueEnum, Serialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Place {
    /// In the caller's buffer: copied once
    Copy,
    /// In the outbox: not copied
    Outbox,
}

#[derive(Clone, Copy, ValueEnum, Serialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
enum Reduce {
    /// On the token's rank, one row per expert
    PerExpert,
    /// On the experts' rank, then one row per rank on the token's
    PerRank,
    /// As per-rank, the sums on the experts' rank being the engine's work
    Engine,
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
enum RoutingSource {
    Uniform,
    Skew(f64),
    File(String),
}

impl FromStr for RoutingSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("skew:") {
            Some(f) => match f.parse() {
                Ok(f) if (1.0..=1e6).contains(&f) => Ok(RoutingSource::Skew(f)),
                _ => Err(format!("{f:?} is not a factor from 1 to 1000000")),
            },
            None if text == "uniform" => Ok(RoutingSource::Uniform),
            None if text.ends_with(".npy") => Ok(RoutingSource::File(text.to_owned())),
            None => Err("expected uniform, skew:F or a file that ends in .npy".to_owned()),
        }
    }
}

#[derive(Serialize)]
struct Limit {
    dispatch_us: f64,
    combine_us: f64,
    line_ns: Option<f64>,
}

#[derive(Serialize)]
struct Point {
    bench: &'static str,
    ranks: usize,
    /// Of rank 0.
    tokens: usize,
    tokens_per_rank: Vec<usize>,
    hidden: usize,
    topk: usize,
    experts: usize,
    dtype: String,
    wire: String,
    keep_wire: bool,
    routing: RoutingSource,
    layout: Layout,
    input: Place,
    output: Place,
    reduction: Reduce,
    lanes: usize,
    epilogue: Vec<Step>,
    /// Tells one routing from another: over all ranks' ids in turn, the sum of (id + 1) times the id's place, counted from 1.
    routing_sum: u64,
    dispatch_us: Percentiles,
    combine_us: Percentiles,
    /// Combine and then the epilogue in a pass of its own.
    separate_us: Option<Percentiles>,
    /// Slots that replicas have, once experts were balanced.
    redundant: Option<usize>,
    /// Rows of the hottest rank, as a multiple of the mean.
    hottest: f64,
    /// Dispatch and combine with one lane, where there are more.
    alone_dispatch_us: Option<Percentiles>,
    alone_combine_us: Option<Percentiles>,
    limit: Limit,
    verified: Option<bool>,
}

impl MoeArgs {
    pub fn measure(&self, comm: &Communicator) -> Result<()> {
        in_pool(self.lanes, || match self.dtype {
            DType::BF16 => self.measure_as::<bf16>(comm),
            DType::F16 => self.measure_as::<f16>(comm),
            DType::F32 => self.measure_as::<f32>(comm),
        })
    }

    fn measure_as<E: Element>(&self, comm: &Communicator) -> Result<()> {
        let points: Vec<Vec<usize>> = match &self.tokens_per_rank {
            Some(list) => {
                ensure!(
                    list.len() == comm.world_size(),
                    "--tokens-per-rank has {} entries for {} ranks",
                    list.len(),
                    comm.world_size()
                );
                vec![list.clone()]
            }
            None => self.tokens.iter().map(|&t| vec![t; comm.world_size()]).collect(),
        };
        let kinds = (1 + u32::from(self.lanes > 1)) * (1 + u32::from(!self.epilogue.is_empty()));
        ensure!(self.common.iters >= kinds, "--iters {} is less than the {kinds} kinds of rounds", self.common.iters);
        let mut json = JsonLines::open(comm, self.common.json.as_deref())?;
        comm.barrier()?;
        let line_ns = if comm.rank() == 0 { line_ns() } else { None };
        if comm.rank() == 0 {
            json.table(&format!(
                "# xccl bench moe: {} ranks, hidden {}, top-{} of {}, {}, rows {}{}; time of the slowest rank, median; line handover {}",
                comm.world_size(),
                self.hidden,
                self.topk,
                self.experts,
                self.dtype,
                self.wire,
                if self.keep_wire { " and kept so" } else { "" },
                show_line(line_ns)
            ));
            json.table(&format!(
                "{:>8} {:>12} {:>8} {:>12} {:>8} {:>12} {:>12} {:>9}",
                "tokens", "dispatch us", "/ limit", "combine us", "/ limit", "disp. GB/s", "comb. GB/s", "verified"
            ));
        }
        for tokens in &points {
            if !json.goes_on(comm)? {
                break;
            }
            for point in self.points::<E>(comm, tokens, line_ns)? {
                let gbps = |us: f64| (point.tokens * self.hidden * size_of::<E>()) as f64 / us / 1e3;
                json.table(&format!(
                    "{:>8} {:>12.2} {:>8.2} {:>12.2} {:>8.2} {:>12.2} {:>12.2} {:>9}",
                    point.tokens,
                    point.dispatch_us.median,
                    point.dispatch_us.median / point.limit.dispatch_us,
                    point.combine_us.median,
                    point.combine_us.median / point.limit.combine_us,
                    gbps(point.dispatch_us.median),
                    gbps(point.combine_us.median),
                    point.verified.map_or("-", |v| if v { "yes" } else { "NO" })
                ));
                if let Some(separate) = &point.separate_us {
                    let (fused, separate) = (point.combine_us.median, separate.median);
                    json.table(&format!(
                        "{:>8} combine, then the epilogue in a pass of its own: {separate:.2} us; in one pass {:.2} of that",
                        "",
                        fused / separate
                    ));
                }
                if let (Some(dispatch), Some(combine)) = (&point.alone_dispatch_us, &point.alone_combine_us) {
                    let (dispatch, combine) = (dispatch.median, combine.median);
                    json.table(&format!(
                        "{:>8} with one lane: dispatch {dispatch:.2} us, {:.2} times; combine {combine:.2} us, {:.2} times",
                        "",
                        dispatch / point.dispatch_us.median,
                        combine / point.combine_us.median
                    ));
                }
                if self.redundant.is_some() {
                    let placed = match point.redundant {
                        None => "experts one after another".to_owned(),
                        Some(n) => format!("balanced, {n} redundant slots"),
                    };
                    json.table(&format!(
                        "{:>8} {placed}: the hottest rank has {:.2} times the mean",
                        "", point.hottest
                    ));
                }
                json.write(&point)?;
            }
        }
        comm.barrier()?;
        Ok(())
    }

    /// What is measured for one number of tokens: once, or before and after balancing; on rank 0 only.
    fn points<E: Element>(&self, comm: &Communicator, tokens: &[usize], line_ns: Option<f64>) -> Result<Vec<Point>> {
        let reduction = match self.reduction {
            Reduce::PerExpert => Reduction::PerExpert,
            Reduce::PerRank | Reduce::Engine => Reduction::PerRank,
        };
        let most = tokens.iter().copied().max().unwrap_or(0).max(1);
        let shape = MoeConfig::new(most, self.hidden, self.topk, self.experts, self.dtype);
        let slots = self.redundant.map(|redundant| (self.experts + redundant).div_ceil(comm.world_size()));
        let config = MoeConfig { reduction, wire: self.wire, slots, ..shape };
        let moe = Moe::new(comm, config)?;
        // Memory like the outbox's, which the next rank reads: see `copy_as_dispatch`.
        let heap = 2 * (most * self.hidden * size_of::<E>() + 4096);
        let shared = Communicator::from_env_with(Config::from_env()?.heap_bytes(heap).rendezvous_bytes(1))?;
        let mut points = vec![];
        points.extend(self.point::<E>(comm, &shared, &moe, (tokens, line_ns), None)?);
        if let Some(redundant) = self.redundant {
            let mut counts = vec![0i64; self.experts];
            moe.take_expert_counts(CountForm::Each, &mut counts)?;
            comm.all_reduce_in_place(&mut counts, ReduceOp::Sum)?;
            let placement = placement::balance(&counts, &nodes(comm)?, redundant, Some(&moe.placement()))?;
            moe.install(&placement)?;
            let replicas = placement.all_slots() - self.experts;
            points.extend(self.point::<E>(comm, &shared, &moe, (tokens, line_ns), Some(replicas))?);
        }
        Ok(points)
    }

    fn point<E: Element>(
        &self,
        comm: &Communicator,
        shared: &Communicator,
        moe: &Moe,
        (tokens, line_ns): (&[usize], Option<f64>),
        redundant: Option<usize>,
    ) -> Result<Option<Point>> {
        let placed = Placed::new(self, comm, moe, tokens)?;
        let back = Moe::new(comm, self.back_config(&placed, tokens.len())?)?;
        let mut run = Run::<E>::new(self, (comm, shared), [moe, &back], (&placed, tokens))?;
        let verified = if self.common.verify { Some(run.verify()?) } else { None };

        let rounds = self.common.warmup + self.common.iters;
        let bar = progress(comm, rounds as usize);
        let mut times: [Vec<f64>; 7] = Default::default();
        for i in 0..rounds {
            let [dispatch, combine, limit_dispatch, limit_combine] = run.iteration()?;
            if i >= self.common.warmup {
                let (of_dispatch, of_combine) = match (run.is_alone(), run.is_separate()) {
                    (false, false) => (0, Some(1)),
                    (false, true) => (0, Some(4)),
                    (true, false) => (5, Some(6)),
                    (true, true) => (5, None),
                };
                let places = [(of_dispatch, dispatch), (2, limit_dispatch), (3, limit_combine)];
                let combine = of_combine.map(|place| (place, combine));
                places.into_iter().chain(combine).for_each(|(place, one)| times[place].push(one));
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        let mut medians = vec![];
        for times in &times {
            medians.push(slowest(comm, times)?.filter(|times| !times.is_empty()).map(Percentiles::of));
        }
        let (Some(dispatch_us), Some(combine_us), Some(limit_dispatch), Some(limit_combine)) =
            (medians[0], medians[1], medians[2], medians[3])
        else {
            return Ok(None);
        };
        Ok(Some(Point {
            bench: "moe",
            ranks: comm.world_size(),
            tokens: tokens[0],
            tokens_per_rank: tokens.to_vec(),
            hidden: self.hidden,
            topk: self.topk,
            experts: self.experts,
            dtype: self.dtype.to_string(),
            wire: self.wire.to_string(),
            keep_wire: self.keep_wire,
            routing: self.routing.clone(),
            layout: self.layout,
            input: self.input,
            output: self.output(),
            reduction: self.reduction,
            lanes: self.lanes,
            epilogue: self.epilogue.clone(),
            routing_sum: self.routing_sum(tokens)?,
            dispatch_us,
            combine_us,
            separate_us: medians[4],
            redundant,
            hottest: placed.hottest(),
            alone_dispatch_us: medians[5],
            alone_combine_us: medians[6],
            limit: Limit { dispatch_us: limit_dispatch.median, combine_us: limit_combine.median, line_ns },
            verified,
        }))
    }

    /// Bytes of a row's values.
    fn value_bytes(&self) -> usize {
        self.wire.value_bytes(self.hidden, self.dtype)
    }

    /// Bytes of a row as it travels.
    fn wire_bytes(&self) -> usize {
        self.value_bytes() + self.wire.scales(self.hidden) * size_of::<f32>()
    }

    /// Scales of a whole layout of `rows` rows.
    fn scale_elements(&self, rows: usize, local_experts: usize, capacity: usize) -> usize {
        let scales = self.wire.scales(self.hidden);
        match self.layout {
            Layout::InPlace => 0,
            Layout::ExpertMajor => ScaleLayout::ColumnMajor.elements(rows, scales),
            Layout::Padded => local_experts * ScaleLayout::ColumnMajor.elements(capacity, scales),
        }
    }

    /// A handle whose dispatch takes as many rows back to their sources as the combine does.
    fn back_config(&self, placed: &Placed, ranks: usize) -> Result<MoeConfig> {
        let (mut sent, mut got) = (vec![0; ranks], vec![0; ranks]);
        for (source, choices) in placed.choices.iter().enumerate() {
            for choices in choices.chunks_exact(self.topk) {
                let mut from: Vec<usize> = choices.iter().flatten().map(|&(rank, _)| rank).collect();
                if self.reduction != Reduce::PerExpert {
                    from.sort_unstable();
                    from.dedup();
                }
                got[source] += from.len();
                from.into_iter().for_each(|rank| sent[rank] += 1);
            }
        }
        let most = |rows: Vec<usize>| rows.into_iter().max().unwrap_or(0).max(1);
        let max_expert_rows = Some(most(got));
        Ok(MoeConfig { max_expert_rows, ..MoeConfig::new(most(sent), self.hidden, 1, ranks, self.dtype) })
    }

    fn output(&self) -> Place {
        if self.layout == Layout::InPlace || self.reduction == Reduce::Engine { Place::Outbox } else { self.output }
    }

    /// The ids of one rank: the same wherever they are computed.
    fn ids(&self, rank: usize, tokens: usize) -> Result<Vec<i32>> {
        let mut rng = StdRng::seed_from_u64(self.seed.wrapping_mul(1_000_003).wrapping_add(rank as u64));
        let skew = match &self.routing {
            RoutingSource::File(path) => return self.recorded(path, rank, tokens),
            RoutingSource::Uniform => 1.0,
            RoutingSource::Skew(factor) => *factor,
        };
        ensure!(self.topk <= self.experts, "--topk {} is more than --experts {}", self.topk, self.experts);
        let mut ids = Vec::with_capacity(tokens * self.topk);
        for _ in 0..tokens {
            let begin = ids.len();
            while ids.len() < begin + self.topk {
                let weight = skew + (self.experts - 1) as f64;
                let draw = rng.random::<f64>() * weight;
                let id = if draw < skew { 0 } else { ((draw - skew) as usize + 1).min(self.experts - 1) as i32 };
                if !ids[begin..].contains(&id) {
                    ids.push(id);
                }
            }
        }
        Ok(ids)
    }

    fn routing_sum(&self, tokens: &[usize]) -> Result<u64> {
        let (mut sum, mut place) = (0u64, 0u64);
        for (rank, &t) in tokens.iter().enumerate() {
            for id in self.ids(rank, t)? {
                place += 1;
                sum = sum.wrapping_add((i64::from(id) as u64).wrapping_add(1).wrapping_mul(place));
            }
        }
        Ok(sum)
    }

    /// Rows of a recording, dealt out to the ranks in turn, from the beginning again when they run out.
    fn recorded(&self, path: &str, rank: usize, tokens: usize) -> Result<Vec<i32>> {
        let file = File::open(path).with_context(|| format!("opening {path:?}"))?;
        let npy = npyz::NpyFile::new(BufReader::new(file)).with_context(|| format!("reading {path:?}"))?;
        let [rows, topk] = *npy.shape() else { bail!("{path:?} has shape {:?}, expected [tokens, topk]", npy.shape()) };
        ensure!(
            topk as usize == self.topk && rows > 0,
            "{path:?} has shape [{rows}, {topk}], expected [tokens, {}]",
            self.topk
        );
        ensure!(npy.order() == npyz::Order::C, "{path:?} is in Fortran's order: save it with numpy.ascontiguousarray");
        let ids: Vec<i64> = match npy.dtype().descr().as_str() {
            text if text.contains("i4") => npy.into_vec::<i32>()?.into_iter().map(i64::from).collect(),
            text if text.contains("i8") => npy.into_vec::<i64>()?,
            other => bail!("{path:?} holds {other}, expected 4- or 8-byte signed integers"),
        };
        if let Some((i, id)) = ids.iter().enumerate().find(|&(_, &id)| !(-1..self.experts as i64).contains(&id)) {
            let (token, limit) = (i / self.topk, self.experts - 1);
            bail!(
                "{path:?}: token {token} names expert {id}: --experts {} has 0 to {limit}, and -1 for none",
                self.experts
            );
        }
        let first = rank * tokens;
        let row = |t: usize| &ids[(first + t) % rows as usize * self.topk..][..self.topk];
        (0..tokens).flat_map(row).map(|&id| i32::try_from(id).with_context(|| format!("expert id {id}"))).collect()
    }
}

/// The node of each rank.
fn nodes(comm: &Communicator) -> Result<Vec<usize>> {
    Ok((0..comm.world_size()).map(|rank| comm.node_of(rank)).collect::<xccl::Result<_>>()?)
}

/// Where the choices of all ranks go, which every rank can work out.
struct Placed {
    /// The experts in this rank's slots.
    local: Vec<usize>,
    /// By rank, for each of its ids, the rank and slot.
    choices: Vec<Vec<Option<(usize, usize)>>>,
}

impl Placed {
    fn new(args: &MoeArgs, comm: &Communicator, moe: &Moe, tokens: &[usize]) -> Result<Self> {
        let (placement, nodes) = (moe.placement(), nodes(comm)?);
        let mut choices = vec![];
        for (source, &t) in tokens.iter().enumerate() {
            let mut named = vec![0; args.experts];
            let mut choose = |id: i32| {
                let expert = usize::try_from(id).ok()?;
                named[expert] += 1;
                placement.choose(expert, source, named[expert] - 1, &nodes)
            };
            choices.push(args.ids(source, t)?.into_iter().map(&mut choose).collect());
        }
        Ok(Placed { local: placement.slots(comm.rank()).to_vec(), choices })
    }

    /// Rows for each slot of a rank.
    fn rows_of(&self, rank: usize) -> Vec<usize> {
        let mut rows = vec![];
        for &(_, slot) in self.choices.iter().flatten().flatten().filter(|(r, _)| *r == rank) {
            rows.resize(rows.len().max(slot + 1), 0);
            rows[slot] += 1;
        }
        rows
    }

    /// Rows of the rank that has most, as a multiple of the mean.
    fn hottest(&self) -> f64 {
        let rows: Vec<usize> = (0..self.choices.len()).map(|rank| self.rows_of(rank).iter().sum()).collect();
        let (most, all) = (rows.iter().max().copied().unwrap_or(0), rows.iter().sum::<usize>().max(1));
        (most * rows.len()) as f64 / all as f64
    }
}

/// The factor of choice `i`: sums of products stay exact enough to tell any wrong row.
fn weight(i: usize) -> f32 {
    (i % 7 + 1) as f32 / 8.0
}

/// Tokens of the same kind are equal.
fn kind(rank: usize, token: usize) -> usize {
    (rank * 31 + token * 7) % KINDS
}

const KINDS: usize = 251;

/// Element `column` of a token.
fn value(rank: usize, token: usize, column: usize) -> f32 {
    value_of(kind(rank, token), column)
}

fn value_of(kind: usize, column: usize) -> f32 {
    ((kind + column) % KINDS) as f32 / 16.0 - 8.0
}

/// Zeros in huge pages, where the kernel gives them: what an engine would use, so that address translation is not measured.
struct Buffer<E> {
    memory: MmapMut,
    elements: PhantomData<E>,
}

impl<E: Element> Buffer<E> {
    fn new(elements: usize) -> Result<Self> {
        let memory = MmapMut::map_anon((elements * size_of::<E>()).max(1)).context("reserving a buffer")?;
        let _ = memory.advise(Advice::HugePage); // Without them it is just slower.
        Ok(Buffer { memory, elements: PhantomData })
    }
}

impl<E: Element> Deref for Buffer<E> {
    type Target = [E];

    fn deref(&self) -> &[E] {
        bytemuck::cast_slice(&self.memory[..self.memory.len() / size_of::<E>() * size_of::<E>()])
    }
}

impl<E: Element> DerefMut for Buffer<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        let bytes = self.memory.len() / size_of::<E>() * size_of::<E>();
        bytemuck::cast_slice_mut(&mut self.memory[..bytes])
    }
}

/// Fills `to` with the bytes of row `i` as it travels, and where they are fewer, of the rows after it.
fn copy_bytes(batch: &ExpertBatch<'_>, i: usize, to: &mut [u8]) {
    let (mut i, mut done) = (i, 0);
    while done < to.len() {
        // SAFETY: the senders keep the protocol: this program is all ranks.
        let row = unsafe { batch.row_wire(i) };
        for part in [row.values, bytemuck::cast_slice(row.scales)] {
            let n = part.len().min(to.len() - done);
            to[done..done + n].copy_from_slice(&part[..n]);
            done += n;
        }
        i = (i + 1) % batch.len();
    }
}

/// One rank's buffers for one point.
struct Run<'a, E> {
    args: &'a MoeArgs,
    comm: &'a Communicator,
    shared: &'a Communicator,
    moe: &'a Moe,
    placed: &'a Placed,
    /// For the combine's limit: see `copy_as_combine`.
    back: &'a Moe,
    tokens: Buffer<E>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    /// Where the rows are copied to, and the experts' outputs are taken from.
    rows: Buffer<E>,
    capacity: usize,
    /// The same as they travel, with --keep-wire.
    wire_values: Buffer<E>,
    wire_scales: Vec<f32>,
    /// What travels and arrives, by [`kind`]: where that is compared, or comes from the engine.
    expected: Vec<quantized::Row<E>>,
    out: Buffer<E>,
    /// Two in turn, like the outbox's slots: for the limits. `sent` is in shared memory.
    sent: [HeapBuffer; 2],
    scratch: [Buffer<E>; 2],
    extras: Extras<E>,
    round: usize,
}

impl<'a, E: Element> Run<'a, E> {
    fn new(
        args: &'a MoeArgs,
        (comm, shared): (&'a Communicator, &'a Communicator),
        [moe, back]: [&'a Moe; 2],
        (placed, tokens): (&'a Placed, &[usize]),
    ) -> Result<Self> {
        let (hidden, mine) = (args.hidden, tokens[comm.rank()]);
        // Room for what this rank's experts are going to get, which every rank can work out.
        let counts = placed.rows_of(comm.rank());
        let (local, capacity) = (&placed.local, counts.iter().max().copied().unwrap_or(0));
        let rows = match args.layout {
            Layout::InPlace => 0,
            Layout::ExpertMajor => counts.iter().sum(),
            Layout::Padded => local.len() * capacity,
        };
        let scratch = || Buffer::new(tokens.iter().sum::<usize>().max(1) * hidden);
        let block = || shared.heap_alloc((mine * hidden * size_of::<E>()).max(1));
        let mut run = Run {
            args,
            comm,
            shared,
            moe,
            placed,
            back,
            tokens: Buffer::new(mine * hidden)?,
            ids: args.ids(comm.rank(), mine)?,
            weights: (0..mine * args.topk).map(weight).collect(),
            rows: Buffer::new(rows * hidden)?,
            capacity,
            wire_values: Buffer::new(if args.keep_wire {
                (rows * args.value_bytes()).div_ceil(size_of::<E>())
            } else {
                0
            })?,
            wire_scales: vec![1.0; if args.keep_wire { args.scale_elements(rows, local.len(), capacity) } else { 0 }],
            expected: vec![],
            out: Buffer::new(mine * hidden)?,
            sent: [block()?, block()?],
            scratch: [scratch()?, scratch()?],
            extras: Extras::new(&args.epilogue, mine, hidden),
            round: 0,
        };
        moe.set_lanes(args.lanes, Arc::new(InPool))?;
        for (t, token) in run.tokens.chunks_exact_mut(hidden).enumerate().take(mine) {
            token.iter_mut().enumerate().for_each(|(c, x)| *x = E::from_f32(value(comm.rank(), t, c)));
        }
        if args.common.verify || (args.input == Place::Outbox && args.wire != WireFormat::Native) {
            let row = |kind| (0..hidden).map(|c| E::from_f32(value_of(kind, c))).collect::<Vec<E>>();
            run.expected = (0..KINDS).map(|kind| quantized::quantize(args.wire, &row(kind))).collect();
        }
        // Pages are taken now, not in the first rounds.
        run.scratch
            .iter_mut()
            .chain([&mut run.rows, &mut run.wire_values, &mut run.out])
            .for_each(|buffer| buffer.fill(E::from_f32(1.0)));
        Ok(run)
    }

    /// This rank's tokens.
    fn mine(&self) -> usize {
        self.ids.len() / self.args.topk
    }

    /// What the layout asks for.
    fn take_rows(&mut self, batch: &mut ExpertBatch<'_>) -> Result<()> {
        if !self.args.keep_wire {
            return self.copy_rows(batch);
        }
        let (values, scales) = (bytemuck::cast_slice_mut(&mut self.wire_values), &mut self.wire_scales[..]);
        match self.args.layout {
            Layout::InPlace => Ok(()),
            Layout::ExpertMajor => Ok(batch.copy_wire_into(values, scales, ScaleLayout::ColumnMajor, 1)?),
            Layout::Padded => Ok(batch.copy_wire_padded(values, scales, ScaleLayout::ColumnMajor, self.capacity)?),
        }
    }

    fn copy_rows(&mut self, batch: &mut ExpertBatch<'_>) -> Result<()> {
        match self.args.layout {
            Layout::InPlace => Ok(()),
            Layout::ExpertMajor => Ok(batch.copy_into(&mut self.rows, 1)?),
            Layout::Padded => Ok(batch.copy_padded(&mut self.rows, self.capacity)?),
        }
    }

    /// Whether this round does the epilogue in a pass of its own.
    fn is_separate(&self) -> bool {
        !self.args.epilogue.is_empty() && self.round.is_multiple_of(2)
    }

    /// Whether this round has one lane in place of several.
    fn is_alone(&self) -> bool {
        let kind = if self.args.epilogue.is_empty() { self.round } else { self.round / 2 };
        self.args.lanes > 1 && kind.is_multiple_of(2)
    }

    /// Receives the sums, with what the epilogue asks for.
    fn receive(&mut self, sent: Exchange<'_>) -> Result<()> {
        let (out, is_separate) = (self.mine() * self.args.hidden, self.is_separate());
        let out = &mut self.out[..out];
        if is_separate {
            self.moe.combine_recv(sent, out)?;
            self.extras.pass(out);
            return Ok(());
        }
        Ok(self.moe.combine_recv_with(sent, out, self.extras.epilogue())?)
    }

    /// Times of dispatch, combine, and their limits, in microseconds.
    fn iteration(&mut self) -> Result<[f64; 4]> {
        self.round += 1;
        self.moe.set_lanes(if self.is_alone() { 1 } else { self.args.lanes }, Arc::new(InPool))?;
        let (moe, comm, hidden, mine) = (self.moe, self.comm, self.args.hidden, self.mine());
        let (ids, weights) = (self.ids.clone(), self.weights.clone());
        let routing = Routing::new(&ids, &weights);
        let (mut input, mut wire_input) = (None, None);
        match (self.args.input, self.args.wire) {
            (Place::Copy, _) => {}
            (Place::Outbox, WireFormat::Native) => {
                let mut rows = moe.input_rows::<E>(mine)?;
                for (t, token) in self.tokens.chunks_exact(hidden).enumerate().take(mine) {
                    rows.row(t).copy_from_slice(token);
                }
                input = Some(rows);
            }
            (Place::Outbox, _) => wire_input = Some(self.quantized_input()?),
        }
        comm.barrier()?;
        let (dispatch, (sent, mut batch)) = timed(|| {
            let sent = match (input, wire_input) {
                (Some(rows), _) => moe.dispatch_send_rows(rows, &routing)?,
                (None, Some(rows)) => moe.dispatch_send_wire_rows(rows, &routing)?,
                (None, None) => moe.dispatch_send(&self.tokens[..mine * hidden], &routing)?,
            };
            let mut batch = moe.dispatch_recv(&sent)?;
            self.take_rows(&mut batch)?;
            Ok((sent, batch))
        })?;

        comm.barrier()?;
        let (limit_dispatch, ()) = timed(|| self.copy_as_dispatch(&batch))?;
        self.read_by_the_next_rank()?;
        let limit_combine = self.copy_as_combine(&mut batch)?;

        let outputs = self.work(&mut batch)?;
        comm.barrier()?;
        let (combine, ()) = timed(|| {
            match (outputs, self.args.reduction) {
                (Some(rows), _) => moe.combine_send_from(batch, &self.rows[..rows * hidden])?,
                (None, Reduce::Engine) => moe.combine_send_sums(batch)?,
                (None, _) => moe.combine_send(batch)?,
            }
            self.receive(sent)
        })?;
        Ok([dispatch, combine, limit_dispatch, limit_combine])
    }

    /// Tokens that an engine has quantized in the outbox.
    fn quantized_input(&self) -> Result<WireRows<'a>> {
        let mut rows = self.moe.input_wire_rows(self.mine())?;
        for t in 0..rows.len() {
            let (row, (values, scales)) = (&self.expected[kind(self.comm.rank(), t)], rows.row(t));
            values.copy_from_slice(&row.values);
            scales.copy_from_slice(&row.scales);
        }
        Ok(rows)
    }

    /// The experts' work: outputs are written afresh, by the core that would have computed them. Gives the number of rows where
    /// they are in the caller's buffer.
    fn work(&mut self, batch: &mut ExpertBatch<'_>) -> Result<Option<usize>> {
        let (hidden, rows) = (self.args.hidden, batch.len());
        if self.args.reduction == Reduce::Engine {
            let first: Vec<usize> = batch.sums().filter_map(|sum| sum.rows().next()).map(|(row, _)| row).collect();
            for (i, row) in first.into_iter().enumerate() {
                batch.copy_row(row, &mut self.scratch[0][..hidden])?;
                batch.sum_row::<E>(i)?.copy_from_slice(&self.scratch[0][..hidden]);
            }
            return Ok(None);
        }
        if self.args.output() == Place::Outbox {
            for i in 0..rows {
                batch.copy_row(i, &mut self.scratch[0][..hidden])?;
                batch.output_row::<E>(i)?.copy_from_slice(&self.scratch[0][..hidden]);
            }
            return Ok(None);
        }
        self.copy_rows(batch)?;
        if self.args.layout == Layout::Padded {
            let mut offset = 0;
            for (e, &count) in batch.counts().iter().enumerate() {
                let (from, n) = (e * self.capacity * hidden, count as usize * hidden);
                self.rows.copy_within(from..from + n, offset);
                offset += n;
            }
        }
        Ok(Some(rows))
    }

    /// Plain copies of the bytes that a dispatch moves, between the same memories: into shared memory whose lines another core
    /// has read since they were last written, which on some machines costs many times what private memory does.
    fn copy_as_dispatch(&mut self, batch: &ExpertBatch<'_>) -> Result<()> {
        let bytes = self.args.wire_bytes();
        if self.args.input == Place::Copy {
            let tokens: &[u8] = bytemuck::cast_slice(&self.tokens[..self.mine() * self.args.hidden]);
            // In rows of a few elements the scales are more than what quantizing saves.
            let sent = (self.mine() * bytes).min(tokens.len());
            self.sent[self.round % 2][..sent].copy_from_slice(&tokens[..sent]);
        }
        if self.args.layout != Layout::InPlace {
            let (rows, kept): (&mut [u8], _) = match self.args.keep_wire {
                true => (bytemuck::cast_slice_mut(&mut self.wire_values), self.args.value_bytes()),
                false => (bytemuck::cast_slice_mut(&mut self.rows), self.args.hidden * size_of::<E>()),
            };
            for (i, to) in rows.chunks_exact_mut(kept).enumerate().take(batch.len()) {
                copy_bytes(batch, i, to);
            }
        }
        std::hint::black_box((&mut self.rows, &mut self.wire_values, &mut self.sent));
        Ok(())
    }

    /// As the outbox's rows are: the next rank copies from there.
    fn read_by_the_next_rank(&mut self) -> Result<()> {
        let (rank, ranks) = (self.shared.rank(), self.shared.world_size());
        if self.args.input == Place::Outbox || ranks == 1 {
            return Ok(());
        }
        let bytes = self.mine() * self.args.wire_bytes().min(self.args.hidden * size_of::<E>());
        let (from, to) = (&self.sent[self.round % 2][..bytes], bytemuck::cast_slice_mut::<E, u8>(&mut self.scratch[0]));
        Ok(self.shared.scope(|s| {
            let receive = s.irecv((rank + ranks - 1) % ranks, 0, to)?;
            s.isend((rank + 1) % ranks, 0, from)?.wait()?;
            receive.wait().map(|_| ())
        })?)
    }

    /// Plain copies of as many rows as a combine reads: the experts' outputs, where this rank sums or hands them over, and what
    /// comes back from the peers' memory, which they have just written, into as many rows as are written. Gives the time.
    fn copy_as_combine(&mut self, batch: &mut ExpertBatch<'_>) -> Result<f64> {
        let (hidden, mine, rows) = (self.args.hidden, self.mine(), batch.len());
        let sources: Vec<i32> = match self.args.reduction {
            Reduce::PerExpert => (0..rows).map(|i| batch.row(i).source as i32).collect(),
            // One row per token and rank that holds some of its experts.
            Reduce::PerRank | Reduce::Engine => batch.sums().map(|sum| sum.source as i32).collect(),
        };
        let written = sources.len();
        let mut fresh = self.back.input_rows::<E>(written)?;
        for i in 0..written {
            copy_bytes(batch, i * rows / written, bytemuck::cast_slice_mut(&mut self.scratch[0][..hidden]));
            fresh.row(i).copy_from_slice(&self.scratch[0][..hidden]);
        }
        let sent = self.back.dispatch_send_rows(fresh, &Routing::new(&sources, &vec![1.0; written]))?;
        let back = self.back.dispatch_recv(&sent)?;
        self.comm.barrier()?;
        let (time, ()) = timed(|| {
            if self.args.output() == Place::Copy || self.args.reduction == Reduce::PerRank {
                let room = self.scratch[0].len() / hidden;
                for i in 0..rows {
                    let at = i * written / rows % room * hidden;
                    let to = &mut self.scratch[self.round % 2][at..at + hidden];
                    match self.rows.get(i * hidden..(i + 1) * hidden) {
                        Some(row) => to.copy_from_slice(row),
                        None => copy_bytes(batch, i, bytemuck::cast_slice_mut(to)),
                    }
                }
            }
            for i in 0..back.len() {
                let at = i * mine / back.len() * hidden;
                back.copy_row(i, &mut self.out[at..at + hidden])?;
            }
            std::hint::black_box((&mut self.out, &mut self.scratch));
            Ok(())
        })?;
        Ok(time)
    }

    /// One exchange in which every byte of every row and every sum is compared with a plain reference.
    fn verify(&mut self) -> Result<bool> {
        let (moe, hidden, topk) = (self.moe, self.args.hidden, self.args.topk);
        let routing = Routing::new(&self.ids, &self.weights);
        let mine = self.mine();
        let sent = moe.dispatch_send(&self.tokens[..mine * hidden], &routing)?;
        let mut batch = moe.dispatch_recv(&sent)?;
        let mut expected = vec![];
        let me = self.comm.rank();
        for (slot, &expert) in batch.local_experts().iter().enumerate() {
            for (rank, choices) in self.placed.choices.iter().enumerate() {
                for (i, _) in choices.iter().enumerate().filter(|(_, place)| **place == Some((me, slot))) {
                    expected.push((expert, rank, i / topk, weight(i)));
                }
            }
        }
        ensure!(batch.len() == expected.len(), "{} rows arrived, expected {}", batch.len(), expected.len());
        let mut row = vec![E::from_f32(0.0); hidden];
        for (i, &(expert, source, token, weight)) in expected.iter().enumerate() {
            let got = batch.row(i);
            let found = (batch.local_experts()[got.expert], got.source, got.token, got.weight);
            ensure!(found == (expert, source, token, weight), "row {i} is {found:?}, expected {:?}", expected[i]);
            batch.copy_row(i, &mut row)?;
            for (c, (x, y)) in row.iter().zip(&self.expected[kind(source, token)].decoded).enumerate() {
                ensure!(x.to_f32() == y.to_f32(), "row {i}, column {c} is {}", x.to_f32());
            }
            // Each expert's output differs from every other one's.
            let scale = (expert % 5 + 1) as f32;
            for (y, x) in batch.output_row::<E>(i)?.iter_mut().zip(&row) {
                *y = E::from_f32(x.to_f32() * scale);
            }
        }
        if self.args.layout != Layout::InPlace {
            self.verify_layout(&mut batch)?;
        }
        match self.args.reduction {
            Reduce::Engine => {
                self.form_sums(&mut batch)?;
                moe.combine_send_sums(batch)?;
            }
            _ => moe.combine_send(batch)?,
        }
        self.out.fill(E::from_f32(f32::NAN));
        moe.combine_recv_with(sent, &mut self.out[..mine * hidden], self.extras.epilogue())?;
        for t in 0..mine {
            self.extras.check(t, &self.out[t * hidden..(t + 1) * hidden], |c| self.expected_sum(t, c))?;
        }
        Ok(true)
    }

    /// What the rows were copied to, or handed over as.
    fn verify_layout(&mut self, batch: &mut ExpertBatch<'_>) -> Result<()> {
        self.take_rows(batch)?;
        let (hidden, bytes, scales) =
            (self.args.hidden, self.args.value_bytes(), self.args.wire.scales(self.args.hidden));
        let padded = self.args.layout == Layout::Padded;
        for (i, row) in batch.rows().enumerate() {
            let within = i - batch.offsets()[row.expert] as usize;
            let place = if padded { row.expert * self.capacity + within } else { i };
            let expected = &self.expected[kind(row.source, row.token)];
            if !self.args.keep_wire {
                let found: &[u8] = bytemuck::cast_slice(&self.rows[place * hidden..][..hidden]);
                ensure!(found == bytemuck::cast_slice::<E, u8>(&expected.decoded), "row {i} was copied wrongly");
                continue;
            }
            let values: &[u8] = bytemuck::cast_slice(&self.wire_values);
            ensure!(values[place * bytes..][..bytes] == expected.values, "row {i} was handed over wrongly");
            let (begin, column, at) = match padded {
                true => {
                    let column = self.capacity.next_multiple_of(4);
                    (row.expert * column * scales, column, within)
                }
                false => (0, batch.len().next_multiple_of(4), i),
            };
            let found = (0..scales).map(|s| self.wire_scales[begin + s * column + at].to_bits());
            ensure!(found.eq(expected.scales.iter().map(|s| s.to_bits())), "row {i} has wrong scales");
        }
        Ok(())
    }

    /// What `Reduction::PerRank` asks of an engine that forms the sums, in the plainest way.
    fn form_sums(&self, batch: &mut ExpertBatch<'_>) -> Result<()> {
        let sums: Vec<Vec<(usize, f32)>> = batch.sums().map(|sum| sum.rows().collect()).collect();
        for (i, rows) in sums.into_iter().enumerate() {
            let mut sum = vec![0.0f32; self.args.hidden];
            for (row, weight) in rows {
                sum.iter_mut().zip(batch.output_row::<E>(row)?).for_each(|(s, y)| *s += weight * y.to_f32());
            }
            batch.sum_row::<E>(i)?.iter_mut().zip(sum).for_each(|(y, s)| *y = E::from_f32(s));
        }
        Ok(())
    }

    /// A token's sum, before it is rounded.
    fn expected_sum(&self, t: usize, c: usize) -> Result<f32> {
        let topk = self.args.topk;
        let term = |i: usize| {
            let scale = (self.ids[i] % 5 + 1) as f32;
            weight(i) * E::from_f32(self.expected[kind(self.comm.rank(), t)].decoded[c].to_f32() * scale).to_f32()
        };
        let choices = (t * topk..(t + 1) * topk).filter(|&i| self.ids[i] >= 0);
        let rounded = |terms: &[usize]| match terms {
            [] => None,
            terms => Some(E::from_f32(terms.iter().fold(0.0f32, |sum, &i| sum + term(i))).to_f32()),
        };
        // What each rank's experts add, ascending.
        let mut by_rank = vec![];
        for rank in 0..self.comm.world_size() {
            let place = |i: usize| self.placed.choices[self.comm.rank()][i];
            let mut here: Vec<usize> = choices.clone().filter(|&i| place(i).is_some_and(|(r, _)| r == rank)).collect();
            here.sort_by_key(|&i| place(i));
            by_rank.push((self.comm.node_of(rank)?, here));
        }
        // Of this node the terms or the ranks' sums, of each other one a sum.
        let home = self.comm.node_of(self.comm.rank())?;
        let per_expert = self.args.reduction == Reduce::PerExpert;
        let near = || by_rank.iter().filter(|(node, _)| *node == home);
        let mut sum = match per_expert {
            true => {
                let is_near = |i: &usize| near().any(|(_, here)| here.contains(i));
                choices.clone().filter(is_near).fold(0.0f32, |sum, i| sum + term(i))
            }
            false => near().filter_map(|(_, here)| rounded(here)).fold(0.0f32, |sum, s| sum + s),
        };
        for node in (0..self.comm.world_size()).filter(|&node| node != home) {
            let there = by_rank.iter().filter(|(n, _)| *n == node);
            sum += match per_expert {
                true => rounded(&there.flat_map(|(_, here)| here.clone()).collect::<Vec<_>>()).unwrap_or(0.0),
                false => {
                    let sums = there.filter_map(|(_, here)| rounded(here)).reduce(|a, b| a + b);
                    sums.map_or(0.0, |s| E::from_f32(s).to_f32())
                }
            };
        }
        Ok(sum)
    }
}
