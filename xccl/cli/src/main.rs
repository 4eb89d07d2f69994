//! `xccl`: start ranks, measure them, show what is configured and what they do.

mod bench;
mod info;
mod run;
mod say;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about = "Communication for LLM-serving engines over shared memory")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::RunArgs),
    /// Measure and verify exchanges
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Show the machine, the memory plan and every option with its origin
    Info(info::InfoArgs),
    Status(status::StatusArgs),
    #[command(name = run::GUARD, hide = true)]
    Guard,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(args) => args.run(),
        Command::Bench(bench) => bench.run(),
        Command::Info(args) => args.run().map(|()| 0),
        Command::Status(args) => args.run().map(|()| 0),
        Command::Guard => run::guard().map(|()| 0),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(err) => {
            eprintln!("xccl: {err:#}");
            err.downcast_ref::<run::CannotStart>().map_or(ExitCode::FAILURE, |e| ExitCode::from(e.exit_code()))
        }
    }
}
