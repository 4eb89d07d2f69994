//! `xccl bench`: measure, and verify every byte in a pass of its own.

mod a2e;
mod collectives;
mod compare;
mod epilogue;
mod figures;
mod growth;
mod kv;
mod lanes;
mod moe;
mod p2p;
mod pair;
mod process;
mod put;
mod quantized;
mod wait;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use xccl::{Communicator, Config, Error, Launch};

use self::collectives::{CollectiveArgs, What};
use crate::run::{self, RunOptions};

#[derive(Subcommand)]
pub enum Bench {
    /// Messages between rank 0 and rank 1
    P2p(p2p::P2pArgs),
    /// Puts from rank 0 into the memory of rank 1: latency with a signal, bandwidth
    Put(put::PutArgs),
    /// Pages of a KV cache from rank 0 to rank 1
    Kv(kv::KvArgs),
    /// Dispatch and combine of a mixture-of-experts layer
    Moe(moe::MoeArgs),
    /// The same between ranks that hold attention and ranks that hold experts; what it costs as these grow in number
    #[command(name = "a2e")]
    A2e(a2e::A2eArgs),
    /// The same tokens by more and more ranks: processor time per token, start-up, memory
    Growth(growth::GrowthArgs),
    Compare(compare::CompareArgs),
    /// All ranks' elements joined, for all, in nccl-tests' columns
    #[command(name = "all_reduce")]
    AllReduce(CollectiveArgs),
    /// Every rank's block for all
    #[command(name = "all_gather")]
    AllGather(CollectiveArgs),
    /// All ranks' elements joined, a block for each
    #[command(name = "reduce_scatter")]
    ReduceScatter(CollectiveArgs),
    /// A block from each rank for each
    #[command(name = "all_to_all")]
    AllToAll(CollectiveArgs),
    /// One rank's elements for all
    Broadcast(CollectiveArgs),
    /// From a peer's store to the waiter's return, spinning, yielding and asleep; processor time of idle ranks
    Wait(wait::WaitArgs),
}

#[derive(Args, Clone)]
struct Common {
    /// Ranks to start, unless this runs under a launcher already
    #[arg(short, long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1024))]
    n: u32,
    /// Pretend that the ranks live on so many nodes, in blocks: what is not on one node travels over the network (loopback)
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    nodes: u32,
    /// Bind rank i to the i-th usable core
    #[arg(long)]
    bind: bool,
    /// Measured iterations
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    iters: u32,
    /// Iterations before them
    #[arg(long, default_value_t = 20)]
    warmup: u32,
    /// Check every byte in a pass of its own
    #[arg(long)]
    verify: bool,
    /// Write one JSON object per measured point to this file, or to standard output with "-"
    #[arg(long, value_name = "FILE")]
    json: Option<String>,
}

impl Bench {
    pub fn run(self) -> Result<u8> {
        match self {
            Bench::P2p(args) => with_ranks(&args.common, |comm| args.measure(comm)),
            Bench::Put(args) => with_ranks(&args.common, |comm| args.measure(comm)),
            Bench::Kv(args) => with_ranks(&args.common, |comm| args.measure(comm)),
            Bench::Moe(args) => with_ranks(&args.common, |comm| args.measure(comm)),
            // As many ranks as its roles have.
            Bench::A2e(args) => args.run(),
            Bench::Wait(args) => with_ranks(&args.common, |comm| args.measure(comm)),
            Bench::AllReduce(args) => with_ranks(&args.common, |comm| args.measure(What::AllReduce, comm)),
            Bench::AllGather(args) => with_ranks(&args.common, |comm| args.measure(What::AllGather, comm)),
            Bench::ReduceScatter(args) => with_ranks(&args.common, |comm| args.measure(What::ReduceScatter, comm)),
            Bench::AllToAll(args) => with_ranks(&args.common, |comm| args.measure(What::AllToAll, comm)),
            Bench::Broadcast(args) => with_ranks(&args.common, |comm| args.measure(What::Broadcast, comm)),
            // It starts its own jobs, one after another.
            Bench::Growth(args) => args.run(),
            Bench::Compare(args) => args.run(),
        }
    }
}

/// Joins under a launcher, otherwise starts the ranks.
fn with_ranks(common: &Common, measure: impl FnOnce(&Communicator) -> Result<()>) -> Result<u8> {
    match join(|| Ok(Config::from_env()?))? {
        None => start(common),
        Some(comm) => measure(&comm).map(|()| 0),
    }
}

/// Joins under a launcher.
fn join(config: impl FnOnce() -> Result<Config>) -> Result<Option<Communicator>> {
    match Launch::from_env() {
        Ok(_) => Ok(Some(Communicator::from_env_with(config()?)?)),
        Err(Error::NotLaunched { .. }) => Ok(None),
        Err(err) => Err(err.into()),
    }
}

fn start(common: &Common) -> Result<u8> {
    let exe = std::env::current_exe().context("finding this program")?;
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    run::launch(RunOptions {
        ranks: common.n as usize,
        nodes: match common.nodes {
            1 => run::Nodes::One,
            nodes => run::Nodes::pretended(nodes as usize, common.n as usize)?,
        },
        bind: common.bind,
        prefix: false,
        program: exe.into_os_string(),
        args,
        env: vec![],
        grace: Duration::from_secs(1),
        timeout: None,
    })
}

/// A progress bar on rank 0's terminal.
fn progress(comm: &Communicator, steps: usize) -> ProgressBar {
    if comm.rank() != 0 || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(steps as u64).with_style(style)
}
