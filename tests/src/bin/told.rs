//! How soon ranks are told of a death: prints, for each number of ranks and each call that they wait in, the median and the longest
//! time from a `kill -9` to the error.
//!
//! `cargo run --release -p xccl-tests --bin told -- [ROUNDS] [RANKS,RANKS…]`; needs the program `rank` beside it. Nothing is asserted
//! of times; a rank that is told of the wrong one, or not at all, is an error.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use xccl_tests::{Job, has_network};

const CALLS: [&str; 9] =
    ["barrier", "recv", "recv-any", "recv-other", "signal", "signal-any", "all-reduce", "dispatch", "split"];

fn now() -> Result<u64> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos() as u64)
}

/// Kills the last rank while the others wait in `call`; gives how long after that each was told, in nanoseconds.
fn one(program: &str, nodes: &[usize], call: &str, pause: Duration) -> Result<Vec<u64>> {
    let (scenario, last) = (format!("told-{call}"), nodes.len() - 1);
    let met = std::env::temp_dir().join(xccl_tests::new_job());
    std::fs::create_dir(&met)?;
    let env = [("TEST_MET", met.to_str().context("a path of text")?)];
    let mut job = match nodes.iter().all(|&node| node == 0) {
        true => Job::start(program, nodes.len(), &scenario, &env),
        false => Job::start_on_nodes(program, nodes, &scenario, &env),
    };
    let start = Instant::now();
    while std::fs::read_dir(&met)?.count() < nodes.len() && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(2));
    }
    std::fs::remove_dir_all(&met)?;
    // Now they fall asleep.
    std::thread::sleep(pause);
    let killed = now()?;
    job.kill(last);
    let ended = job.wait();
    let mut told = vec![];
    for (rank, ended) in ended[..last].iter().enumerate() {
        ensure!(ended.code == Some(0), "{call}, rank {rank} of nodes {nodes:?}: {ended:?}");
        let line = ended.stderr.lines().find_map(|line| line.strip_prefix("told ")).context("it says nothing")?;
        let (at, whom) = line.split_once(' ').context("it says too little")?;
        ensure!(whom.parse() == Ok(last), "{call}: rank {rank} was told of rank {whom}, rank {last} was killed");
        told.push(at.parse::<u64>()?.saturating_sub(killed));
    }
    Ok(told)
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let rounds: usize = arguments.next().map_or(Ok(3), |n| n.parse())?;
    let ranks = arguments.next().unwrap_or_else(|| "2,4,8,16".to_owned());
    let own = std::env::current_exe()?;
    let program = own.with_file_name("rank").display().to_string();
    println!("{:>6} {:>6} {:>12} {:>6} {:>12} {:>12}", "ranks", "nodes", "call", "told", "median ms", "longest ms");
    for n in ranks.split(',').map(str::parse::<usize>) {
        let n = n?;
        for nodes in [1, 2] {
            if nodes == 2 && !has_network() {
                continue;
            }
            let of_rank: Vec<usize> = (0..n).map(|rank| rank * nodes / n).collect();
            let mut all = vec![];
            for call in CALLS {
                let mut told = vec![];
                for round in 0..rounds {
                    // Never at the same point of the others' sleeps.
                    let pause = Duration::from_micros(100_000 + 7_300 * round as u64);
                    told.extend(one(&program, &of_rank, call, pause)?);
                }
                report(n, nodes, call, &mut told);
                all.extend(told);
            }
            report(n, nodes, "all", &mut all);
        }
    }
    Ok(())
}

fn report(n: usize, nodes: usize, call: &str, told: &mut [u64]) {
    told.sort_unstable();
    let ms = |ns: Option<&u64>| ns.map_or(0.0, |ns| *ns as f64 / 1e6);
    let (median, longest) = (ms(told.get(told.len() / 2)), ms(told.last()));
    println!("{n:>6} {nodes:>6} {call:>12} {:>6} {median:>12.2} {longest:>12.2}", told.len());
}
