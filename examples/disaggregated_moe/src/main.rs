//! A small mixture-of-experts decoder served by three groups of processes. Prefill ranks compute the cache of prompts and push it,
//! layer by layer, to attention ranks; these answer the prompts, and in each layer send rows to expert ranks and get their sums back.
//! Two micro-batches take turns, so that attention and experts work at the same time. The answers are compared bit by bit
//! with those of one process.
//!
//! `model` is the decoder, `single` the one process. `prefill`, `attention` and `experts` are the three roles, `schedule` is what
//! an attention rank does when, and `timeline` shows it. `job` says who does what, `rank` leads a rank through, `judge` compares.

mod attention;
mod experts;
mod job;
mod judge;
mod model;
mod prefill;
mod rank;
mod schedule;
mod single;
mod timeline;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use example_parts::launch;
use xccl::Config;

use job::Job;
use model::Shape;

const PROMPTS: &str = include_str!("../prompts.txt");

/// Answers prompts by prefill, attention and expert ranks that exchange pages and rows through XCCL, and by one process without it,
/// and compares the answers.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Ranks that compute the cache of prompts.
    #[arg(long, value_name = "P", default_value_t = 1)]
    prefill: usize,
    /// Attention ranks of each domain.
    #[arg(long, value_name = "M", default_value_t = 2)]
    attention: usize,
    /// Expert ranks, which serve all domains.
    #[arg(long, value_name = "N", default_value_t = 2)]
    experts: usize,
    /// Groups of attention ranks, each with micro-batches of its own.
    #[arg(long, value_name = "D", default_value_t = 1)]
    domains: usize,
    /// Nodes that the ranks pretend to be on: between them pages and rows travel over the network.
    #[arg(long, value_name = "K", default_value_t = 1)]
    nodes: usize,
    /// Tokens of each answer.
    #[arg(long, value_name = "N", default_value_t = 16)]
    tokens: usize,
    /// A file of prompts, one in each line, instead of the one that ships with the example.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Requests of a micro-batch, at most; each attention rank has two micro-batches.
    #[arg(long, value_name = "N", default_value_t = 3)]
    seats: usize,
    /// Layers of the model.
    #[arg(long, value_name = "N", default_value_t = 4)]
    layers: usize,
    /// Heads of its attention.
    #[arg(long, value_name = "N", default_value_t = 4)]
    heads: usize,
    /// Elements of a token's row.
    #[arg(long, value_name = "N", default_value_t = 64)]
    hidden: usize,
    /// Width of an expert between its matrices.
    #[arg(long, value_name = "N", default_value_t = 64)]
    inter: usize,
    /// Routed experts of each layer.
    #[arg(long, value_name = "N", default_value_t = 16)]
    routed: usize,
    /// Routed experts that each token visits.
    #[arg(long, value_name = "N", default_value_t = 4)]
    topk: usize,
    /// Tokens of a page of the cache.
    #[arg(long, value_name = "N", default_value_t = 8)]
    page_tokens: usize,
    /// Seed of the weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Change one bit of an answer before the comparison, to see that it notices.
    #[arg(long)]
    spoil: bool,
}

impl Args {
    fn job(&self) -> Result<Job> {
        let &Args { layers, heads, hidden, inter, routed, topk, page_tokens, seed, .. } = self;
        let shape = Shape { layers, heads, hidden, inter, routed, topk, page_tokens, seed };
        shape.check()?;
        let &Args { prefill, attention, experts, domains, tokens: new, seats, .. } = self;
        for (name, value) in [
            ("prefill", prefill),
            ("attention", attention),
            ("experts", experts),
            ("domains", domains),
            ("tokens", new),
            ("seats", seats),
        ] {
            ensure!(value > 0, "--{name} is 0: give at least 1");
        }
        ensure!(
            experts <= routed,
            "--experts is {experts}, but there are only {routed} routed experts for these ranks"
        );
        Ok(Job { shape, prompts: self.read_prompts()?, new, seats, domains, attention, experts, prefill })
    }

    fn read_prompts(&self) -> Result<Vec<Vec<u8>>> {
        let read = |path: &PathBuf| fs::read_to_string(path).with_context(|| format!("reading {}", path.display()));
        let text = self.prompts.as_ref().map(read).transpose()?;
        let lines = text.as_deref().unwrap_or(PROMPTS).lines();
        Ok(lines.filter(|line| !line.is_empty()).map(|line| line.as_bytes().to_vec()).collect())
    }
}

fn main() -> ExitCode {
    launch::end("disaggregated_moe", run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let job = args.job()?;
    let pool = job.pages() * job.shape.layers * job.shape.pages().page_bytes();
    let Some(world) = launch::join(Config::from_env()?.heap_bytes(pool + (4 << 20)))? else {
        return launch::start(job.ranks(), args.nodes);
    };
    let (rank, started) = (world.rank(), world.world_size());
    ensure!(started == job.ranks(), "{started} ranks were started, the options ask for {}", job.ranks());
    let collected = rank::run(&world, &job).with_context(|| format!("rank {rank}, {}", job.role_of(rank)))?;
    let Some(mut collected) = collected else { return Ok(()) };
    if args.spoil {
        collected.spoil();
    }
    collected.report(&job);
    collected.judge(&job)
}
