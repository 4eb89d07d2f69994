//! A complete mixture-of-experts layer over a text: computed by N ranks that exchange their tokens through XCCL, and by one
//! process without it. The outputs are compared bit by bit.
//!
//! `model` is the layer, `single` and `distributed` are the two ways to run it, `compare` judges.

mod compare;
mod distributed;
mod model;
mod single;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use example_parts::launch;
use half::bf16;
use xccl::{Communicator, Config, Element, Reduction};

use distributed::{Outcome, experts_of, tokens_of};
use model::Shape;

const TEXT: &str = include_str!("../data/text.txt");
const DEFAULT_RANKS: usize = 4;

/// Computes a mixture-of-experts layer by N ranks through XCCL and by one process without it, and compares the outputs.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Ranks to start [default: 4]. Under a launcher (xccl run, torchrun, mpirun, srun) its ranks are joined instead.
    #[arg(long, value_name = "N")]
    ranks: Option<usize>,
    /// Element type of rows and expert weights.
    #[arg(long, value_enum, default_value_t = DTypeArg::Both)]
    dtype: DTypeArg,
    /// Where a token's expert outputs are added up: at the token's owner in a fixed order, or first on the experts' ranks.
    #[arg(long, value_enum, default_value_t = ReductionArg::PerExpert)]
    reduction: ReductionArg,
    /// Elements of a token's row.
    #[arg(long, value_name = "N", default_value_t = 128)]
    hidden: usize,
    /// Width of an expert between its matrices.
    #[arg(long, value_name = "N", default_value_t = 256)]
    inter: usize,
    /// Experts of the layer.
    #[arg(long, value_name = "N", default_value_t = 16)]
    experts: usize,
    /// Experts that each token visits.
    #[arg(long, value_name = "N", default_value_t = 4)]
    topk: usize,
    /// Rows of the embedding's table; words are hashed into it.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    vocabulary: usize,
    /// Seed of all weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Most tokens that a rank sends in one exchange; longer texts take several.
    #[arg(long, value_name = "N", default_value_t = 64)]
    batch: usize,
    /// Read the text from this file instead of the one that ships with the example.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Change one bit of the ranks' outputs before the comparison, to see that it notices.
    #[arg(long)]
    spoil: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum DTypeArg {
    F32,
    Bf16,
    Both,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum ReductionArg {
    PerExpert,
    PerRank,
}

impl Args {
    fn shape(&self) -> Shape {
        let &Args { hidden, inter, experts, topk, vocabulary, seed, .. } = self;
        Shape { hidden, inter, experts, topk, vocabulary, seed }
    }

    fn reduction(&self) -> Reduction {
        match self.reduction {
            ReductionArg::PerExpert => Reduction::PerExpert,
            ReductionArg::PerRank => Reduction::PerRank,
        }
    }

    fn tokens(&self) -> Result<Vec<u32>> {
        let read = |path: &PathBuf| fs::read_to_string(path).with_context(|| format!("reading {}", path.display()));
        let text = self.text.as_ref().map(read).transpose()?;
        let tokens = model::tokenize(text.as_deref().unwrap_or(TEXT), self.vocabulary);
        ensure!(!tokens.is_empty(), "the text has no words: give --text a file that has some");
        Ok(tokens)
    }
}

fn main() -> ExitCode {
    launch::end("moe_layer", run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    args.shape().check()?;
    ensure!(args.batch > 0, "--batch is 0: give at least 1");
    let tokens = args.tokens()?;
    match launch::join(Config::from_env()?)? {
        Some(comm) => join(args, &tokens, &comm).with_context(|| format!("rank {}", comm.rank())),
        None => {
            let ranks = args.ranks.unwrap_or(DEFAULT_RANKS);
            ensure!(ranks > 0, "--ranks is 0: give at least 1");
            launch::start(ranks, 1)
        }
    }
}

/// This process is a rank.
fn join(args: &Args, tokens: &[u32], comm: &Communicator) -> Result<()> {
    if let Some(ranks) = args.ranks {
        let started = comm.world_size();
        ensure!(ranks == started, "--ranks is {ranks}, but the launcher started {started}: leave --ranks out");
    }
    // All exchanges come first, so that no rank waits while rank 0 computes the reference.
    let f32_outcome = compute::<f32>(args, tokens, comm, DTypeArg::F32)?;
    let bf16_outcome = compute::<bf16>(args, tokens, comm, DTypeArg::Bf16)?;
    if comm.rank() != 0 {
        return Ok(());
    }
    report(args, tokens, comm.world_size(), f32_outcome.as_ref(), bf16_outcome.as_ref());
    let verdicts = [judge(args, tokens, f32_outcome), judge(args, tokens, bf16_outcome)];
    conclude(args, comm.world_size(), verdicts.into_iter().flatten())
}

fn compute<E: Element>(
    args: &Args,
    tokens: &[u32],
    comm: &Communicator,
    dtype: DTypeArg,
) -> Result<Option<Outcome<E>>> {
    if args.dtype != DTypeArg::Both && args.dtype != dtype {
        return Ok(None);
    }
    distributed::run(comm, &args.shape(), args.reduction(), args.batch, tokens).with_context(|| E::DTYPE.to_string())
}

/// The text's part in each rank, and each expert's load.
fn report(
    args: &Args,
    tokens: &[u32],
    ranks: usize,
    f32_outcome: Option<&Outcome<f32>>,
    bf16_outcome: Option<&Outcome<bf16>>,
) {
    let Shape { hidden, inter, experts, topk, .. } = args.shape();
    println!("{} tokens, hidden {hidden}, inter {inter}, top {topk} of {experts} experts, {ranks} ranks", tokens.len());
    let owned: Vec<String> = (0..ranks).map(|r| tokens_of(r, ranks, tokens.len()).len().to_string()).collect();
    println!("tokens owned by each rank: {}", owned.join(" "));

    let columns: Vec<(&str, &[u32])> =
        [("f32", f32_outcome.map(|o| &o.loads)), ("bf16", bf16_outcome.map(|o| &o.loads))]
            .into_iter()
            .filter_map(|(name, loads)| Some((name, loads?.as_slice())))
            .collect();
    let headings: String = columns.iter().map(|(name, _)| format!("{:>12}", format!("rows ({name})"))).collect();
    println!("\nexpert  rank{headings}");
    let most = columns.iter().flat_map(|(_, loads)| loads.iter()).copied().max().unwrap_or(0).max(1);
    for rank in 0..ranks {
        for expert in experts_of(rank, ranks, experts) {
            let loads: String = columns.iter().map(|(_, loads)| format!("{:>12}", loads[expert])).collect();
            let bar = columns.first().map_or(0, |(_, loads)| (40 * loads[expert]).div_ceil(most));
            println!("{}", format!("{expert:>6}{rank:>6}{loads}  {}", "#".repeat(bar as usize)).trim_end());
        }
    }
    println!();
}

/// The element type and, where bitwise agreement is not asked for, the error found; or how the outputs differ.
fn judge<E: Element>(args: &Args, tokens: &[u32], outcome: Option<Outcome<E>>) -> Option<Result<String>> {
    let mut outcome = outcome?;
    if args.spoil {
        let last = outcome.outputs.len() - 1;
        // The highest byte holds the sign and most of the exponent: wrong by any tolerance.
        let bytes = bytemuck::bytes_of_mut(&mut outcome.outputs[last]);
        bytes[bytes.len() - 1] ^= 1;
    }
    let shape = args.shape();
    let reference = single::run::<E>(&shape, tokens);
    let verdict = compare::loads(&outcome, &reference).and_then(|()| match args.reduction {
        ReductionArg::PerExpert => {
            compare::bitwise(&outcome.outputs, &reference, shape.hidden).map(|()| E::DTYPE.to_string())
        }
        ReductionArg::PerRank => {
            let error = compare::within_tolerance(&outcome.outputs, &reference, shape.hidden, shape.topk)?;
            let tolerance = compare::tolerance_factor(E::DTYPE, shape.topk);
            Ok(format!("{} (max abs error {error:.1e}, tolerance {tolerance:.1e} of the terms added up)", E::DTYPE))
        }
    });
    Some(verdict.with_context(|| E::DTYPE.to_string()))
}

fn conclude(args: &Args, ranks: usize, verdicts: impl Iterator<Item = Result<String>>) -> Result<()> {
    let (good, bad): (Vec<_>, Vec<_>) = verdicts.partition(Result::is_ok);
    if !bad.is_empty() {
        let complaints: Vec<String> = bad.into_iter().filter_map(Result::err).map(|e| format!("{e:#}")).collect();
        bail!("{} ({ranks} ranks)", complaints.join("; "));
    }
    let agreed: Vec<String> = good.into_iter().flatten().collect();
    let how = if args.reduction == ReductionArg::PerExpert { "bitwise" } else { "within tolerance" };
    println!("outputs agree {how}: {} ({ranks} ranks)", agreed.join(", "));
    Ok(())
}
