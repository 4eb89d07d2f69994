//! Kills and stops ranks at random instants of everything that they do together, and judges what the others say: who is told of a
//! death, how soon, whether the right rank is named, whether a byte is wrong, and what is left behind.
//!
//! Cases follow from a seed: `chaos --seed 7 --only 1234 --repeat 50` plays one of them again and again, each time with the same
//! work and with blows at the same instants of it.

mod case;
mod director;
mod leaks;
mod table;
mod wire;
mod worker;
mod works;

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use xccl::{Communicator, Config};

use case::{Case, Choices};
use director::Director;
use table::Table;

/// Kills and stops ranks of XCCL at random instants, and judges what the others say.
#[derive(Parser)]
struct Options {
    /// What all cases follow from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Plays so many cases.
    #[arg(long, default_value_t = u64::MAX)]
    cases: u64,
    /// Ends when so many ranks have been killed.
    #[arg(long, default_value_t = 100)]
    kills: usize,
    /// Ends after so many seconds.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// The number of the first case.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Plays this case alone.
    #[arg(long)]
    only: Option<u64>,
    /// How often each case is played.
    #[arg(long, default_value_t = 1)]
    repeat: u64,
    /// The most ranks of a case.
    #[arg(long, default_value_t = 16)]
    ranks: usize,
    /// All ranks are on one node.
    #[arg(long)]
    one_node: bool,
    /// All that the ranks do.
    #[arg(long)]
    work: Option<works::Work>,
    /// Tells of each case.
    #[arg(long)]
    verbose: bool,
}

fn main() -> Result<()> {
    if std::env::args().nth(1).as_deref() == Some("rank") {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        return worker::run();
    }
    let options = Options::parse();
    let nodes = !options.one_node && Communicator::network_providers(&Config::default()).is_ok();
    let choices = Choices { seed: options.seed, most_ranks: options.ranks, nodes, work: options.work };
    let (first, count) = options.only.map_or((options.first, options.cases), |only| (only, 1));
    let start = Instant::now();
    let (mut director, mut table) = (Director::new(options.verbose), Table::default());
    'cases: for number in first..first.saturating_add(count) {
        for _ in 0..options.repeat {
            if table.kills() >= options.kills || start.elapsed() > Duration::from_secs(options.seconds) {
                break 'cases;
            }
            let case = Case::draw(&choices, number);
            if options.verbose {
                eprintln!("{case:?}");
            }
            let began = Instant::now();
            let judged = director.run(&case)?;
            if options.verbose {
                eprintln!("  took {:?}", began.elapsed());
            }
            if !judged.wrong.is_empty() {
                eprintln!("case {number} of seed {}: nodes {:?}, {:?}", options.seed, case.nodes, case.blows);
                judged.wrong.iter().for_each(|why| eprintln!("  {why}"));
            }
            table.add(&case, judged);
        }
    }
    table.print(start.elapsed(), director.grown_kib);
    let names = director.names_of_the_dead();
    if !names.is_empty() {
        println!("names of killed processes that the next job in /dev/shm clears: {names:?}");
    }
    std::process::exit(if table.is_clean() { 0 } else { 1 });
}
