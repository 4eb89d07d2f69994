//! `xccl run`: local ranks of a program, ended together.
//!
//! Three processes' worth of rules keep a job from leaving anything behind, whichever of them dies first:
//!
//! * A rank leads a process group of its own, and dies with the launcher (`PR_SET_PDEATHSIG`).
//! * The guard is told of each group before the rank's program starts. It kills them, and whatever else carries the launch's
//!   id in its environment, once the launcher's end of their pipe is closed: by the launcher, or by its death.
//! * The launcher reaps no rank before the guard is done. Until then a dead rank's number cannot be given to a process of
//!   somebody else, so that no signal reaches a stranger.

mod child;
mod guard;
mod hosts;
mod output;
mod signals;
mod stdin;
mod supervisor;

use std::ffi::OsString;
use std::time::Duration;

use anyhow::Result;
use clap::Args;

pub use child::CannotStart;
pub use guard::{SUBCOMMAND as GUARD, watch as guard};
pub use hosts::Nodes;

use guard::Guard;
use hosts::{Hosts, RealHosts};
use output::Output;
use signals::Signals;

/// Starts N ranks of a program on this machine and waits for them.
///
/// Each rank finds XCCL_RANK, XCCL_WORLD_SIZE, XCCL_LOCAL_RANK, XCCL_LOCAL_WORLD_SIZE and XCCL_JOB in its environment; on
/// several nodes XCCL_MASTER_ADDR and XCCL_MASTER_PORT besides.
///
/// On several hosts, start one such command on each:
///
///     xccl run -n 8 --nnodes 2 --node-rank 0 --master 10.0.0.1:29500 -- program    (on 10.0.0.1)
///
///     xccl run -n 8 --nnodes 2 --node-rank 1 --master 10.0.0.1:29500 -- program    (on the other one)
///
/// with the same XCCL_JOB in the environment, a text that is hard to guess: who knows it may join.
///
/// Standard input goes to rank 0. Signals are passed on. The first rank that fails ends the others, and its exit code (or
/// 128 plus its signal) becomes this command's. Nothing that a rank has started outlives the job.
#[derive(Args)]
pub struct RunArgs {
    /// Number of ranks (with --nnodes: on this host)
    #[arg(short, long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    n: u32,
    /// Pretend that the ranks live on so many nodes, in blocks: what is not on one node travels over the network (loopback)
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..=1024))]
    nodes: Option<u32>,
    #[command(flatten)]
    hosts: RealHosts,
    /// Bind rank i to the i-th usable core, round and round
    #[arg(long)]
    bind: bool,
    /// Pass output on as it is, without the rank before each line
    #[arg(long)]
    no_prefix: bool,
    /// Seconds between asking the other ranks to end and killing them, once one has failed (0 to 3600)
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds)]
    grace: Duration,
    /// End the job after so many seconds (0 to 86400), with exit code 124 as timeout(1) has it [default: never]
    #[arg(long, value_name = "SECONDS", value_parser = long_seconds)]
    timeout: Option<Duration>,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true)]
    program: Vec<OsString>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    seconds_up_to(text, 3600)
}

fn long_seconds(text: &str) -> Result<Duration, String> {
    seconds_up_to(text, 86400)
}

fn seconds_up_to(text: &str, most: u32) -> Result<Duration, String> {
    let value = text.parse::<f64>().ok().filter(|s| (0.0..=f64::from(most)).contains(s));
    value.map(Duration::from_secs_f64).ok_or_else(|| format!("{text:?} is not a number of seconds from 0 to {most}"))
}

impl RunArgs {
    pub fn run(self) -> Result<u8> {
        let mut words = self.program.into_iter();
        let nodes = match self.nodes {
            Some(nodes) => Nodes::pretended(nodes as usize, self.n as usize)?,
            None => self.hosts.nodes()?,
        };
        launch(RunOptions {
            ranks: self.n as usize,
            nodes,
            bind: self.bind,
            prefix: !self.no_prefix,
            // Clap requires one word; no name at all is reported like a wrong one.
            program: words.next().unwrap_or_default(),
            args: words.collect(),
            env: vec![],
            grace: self.grace,
            timeout: self.timeout,
        })
    }
}

/// What to start, and how.
pub struct RunOptions {
    pub ranks: usize,
    /// Where they live, and others perhaps.
    pub nodes: Nodes,
    /// Bind rank i to the i-th usable core, round and round.
    pub bind: bool,
    /// Put the rank before each line; otherwise ranks write to the launcher's own streams.
    pub prefix: bool,
    pub program: OsString,
    pub args: Vec<OsString>,
    /// Set in every rank, besides what the launcher has and the `XCCL_…` of the rank.
    pub env: Vec<(OsString, OsString)>,
    /// Time between SIGTERM and SIGKILL for the others once a rank has failed.
    pub grace: Duration,
    /// Time after which the job is ended.
    pub timeout: Option<Duration>,
}

/// Exit code of a job that was ended because its time was over.
pub const TIMED_OUT: u8 = 124;

/// Runs the ranks to their end; gives the exit code of the first that failed, or 0.
///
/// Call it from the main thread: ranks die with the thread that started them. An error that is [`CannotStart`] has the exit
/// code that shells use for it.
pub fn launch(options: RunOptions) -> Result<u8> {
    let signals = Signals::catch()?;
    let mut output = Output::new()?;
    let launch: String = rand::random::<[u8; 16]>().iter().map(|byte| format!("{byte:02x}")).collect();
    let hosts = Hosts::new(&options.nodes, &launch)?;
    let guard = Guard::start(&launch)?;
    let mut ranks = vec![];
    let started = child::start(&options, &launch, &hosts, &guard, &signals, &mut output, &mut ranks);
    // An early return closes the guard's pipe as well.
    let output = output.forward()?;
    let code = started.and_then(|()| supervisor::supervise(&ranks, &signals, &options, &output));
    guard.end();
    for rank in &mut ranks {
        // It has ended: by itself, or by the guard.
        let _ = rank.wait();
    }
    // What the ranks wrote is passed on to the end, unless a signal says that nobody waits for it.
    let interrupted = signals.until_closed(output.finish())?;
    Ok(interrupted.unwrap_or(code?))
}
