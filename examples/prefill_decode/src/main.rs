//! Prefill and decode in two groups of processes. Prefill ranks compute the paged key-value cache of prompts, and move it layer by
//! layer through XCCL to decode ranks, which go on from there. The logits are compared bit by bit with those of one process.
//!
//! `model` is the decoder, `prefill` and `decode` are the two roles, `single` is the one process, `job` says who
//! serves what.

mod decode;
mod job;
mod model;
mod prefill;
mod single;

use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use example_parts::launch;
use xccl::{Communicator, Config};

use job::Job;
use model::{Model, Shape};

/// Answers requests by prefill and decode ranks that move the KV cache through XCCL, and by one process without it, and
/// compares the logits.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Ranks that compute the cache of prompts.
    #[arg(long, value_name = "N", default_value_t = 1)]
    prefill: usize,
    /// Ranks that go on from there.
    #[arg(long, value_name = "N", default_value_t = 1)]
    decode: usize,
    /// Requests.
    #[arg(long, value_name = "N", default_value_t = 12)]
    requests: u64,
    /// Tokens of the longest prompt; they have 1 to so many.
    #[arg(long, value_name = "N", default_value_t = 40)]
    prompt: usize,
    /// Tokens of each answer.
    #[arg(long, value_name = "N", default_value_t = 12)]
    new: usize,
    /// Pages of a decode rank's cache [default: room for four of the longest requests].
    #[arg(long, value_name = "N")]
    pages: Option<usize>,
    /// Layers of the model.
    #[arg(long, value_name = "N", default_value_t = 4)]
    layers: usize,
    /// Heads of its attention.
    #[arg(long, value_name = "N", default_value_t = 4)]
    heads: usize,
    /// Elements of a token's row.
    #[arg(long, value_name = "N", default_value_t = 64)]
    hidden: usize,
    /// Tokens that there are.
    #[arg(long, value_name = "N", default_value_t = 500)]
    vocabulary: usize,
    /// Tokens of a page of the cache.
    #[arg(long, value_name = "N", default_value_t = 8)]
    page_tokens: usize,
    /// Seed of weights and prompts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Change one bit of a logit before the comparison, to see that it notices.
    #[arg(long)]
    spoil: bool,
}

impl Args {
    fn job(&self) -> Result<Job> {
        let &Args { layers, heads, hidden, vocabulary, page_tokens, seed, .. } = self;
        let shape = Shape { layers, heads, hidden, vocabulary, page_tokens, seed };
        shape.check()?;
        let &Args { prefill, decode, requests, prompt: longest, new, .. } = self;
        for (name, value) in [("prefill", prefill), ("decode", decode), ("prompt", longest), ("new", new)] {
            ensure!(value > 0, "--{name} is 0: give at least 1");
        }
        let one = shape.pages().pages_of(longest + new);
        let pages = self.pages.unwrap_or(4 * one);
        ensure!(pages >= one, "--pages is {pages}: the longest request needs {one}");
        Ok(Job { shape, prefill, decode, requests, longest, new, pages })
    }
}

const TAG: u32 = 1;

fn main() -> ExitCode {
    launch::end("prefill_decode", run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let job = args.job()?;
    let ranks = job.prefill + job.decode;
    let pool = job.pages * job.shape.layers * job.shape.pages().page_bytes();
    match launch::join(Config::from_env()?.heap_bytes(pool + (4 << 20)))? {
        Some(comm) => {
            let started = comm.world_size();
            ensure!(started == ranks, "{started} ranks were started: --prefill and --decode ask for {ranks}");
            join(args, &job, &comm).with_context(|| format!("rank {}", comm.rank()))
        }
        None => launch::start(ranks, 1),
    }
}

/// This process is a rank.
fn join(args: &Args, job: &Job, comm: &Communicator) -> Result<()> {
    if comm.rank() >= job.prefill {
        let decoded = decode::run(comm, job)?;
        for answer in &decoded.answers {
            let logits: Vec<f32> = answer.logits.iter().flatten().copied().collect();
            let head = [answer.id, decoded.most_at_once as u64].map(u64::to_le_bytes).concat();
            comm.send(0, TAG, &[&head, bytemuck::cast_slice(&logits)].concat())?;
        }
        return Ok(());
    }
    prefill::run(comm, job)?;
    if comm.rank() == 0 { judge(args, job, comm) } else { Ok(()) }
}

/// Collects the answers, and compares them with those of one process.
fn judge(args: &Args, job: &Job, comm: &Communicator) -> Result<()> {
    let (model, row) = (Model::new(job.shape), job.shape.vocabulary);
    let mut message = vec![0u8; 16 + job.new * row * size_of::<f32>()];
    let (mut at_once, mut tokens) = (0, 0);
    for n in 0..job.requests {
        let got = comm.recv(xccl::Source::Any, TAG, &mut message)?;
        ensure!(got.len == message.len(), "{} bytes of logits came, expected {}", got.len, message.len());
        let (words, _) = message[..16].as_chunks::<8>();
        let [id, most] = [words[0], words[1]].map(u64::from_le_bytes);
        at_once = at_once.max(most);
        let mut logits: Vec<u32> = message[16..].as_chunks().0.iter().map(|&bytes| u32::from_ne_bytes(bytes)).collect();
        if args.spoil && n == 0 {
            logits[0] ^= 1;
        }
        let prompt = model::prompt(&job.shape, id, job.longest);
        tokens += prompt.len();
        let alone = single::answer(&model, &job.shape, &prompt, job.new)?;
        let alone = alone.iter().flatten().map(|x| x.to_bits());
        if let Some((at, (ours, theirs))) = logits.into_iter().zip(alone).enumerate().find(|(_, (a, b))| a != b) {
            bail!(
                "logits differ: request {id}, token {}, logit {}: {:e} by the ranks and {:e} by one process",
                at / row,
                at % row,
                f32::from_bits(ours),
                f32::from_bits(theirs)
            );
        }
    }
    println!(
        "{} requests, {tokens} tokens of prompts, {} new ones each; up to {at_once} at once on a decode rank",
        job.requests, job.new
    );
    println!("logits agree bitwise with one process ({} prefill ranks, {} decode ranks)", job.prefill, job.decode);
    Ok(())
}
