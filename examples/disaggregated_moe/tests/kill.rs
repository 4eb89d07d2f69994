//! Processes of the example are killed: the others say which rank it was, and nothing is left.

use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use example_parts::arithmetic::splitmix64;
use example_parts::program::{Output, Program};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xccl_tests::{has_network, names_in_dev_shm};

const DISAGGREGATED_MOE: &str = env!("CARGO_BIN_EXE_disaggregated_moe");
/// Two attention ranks, two expert ranks and a prefill rank, with answers that take them minutes.
const ENDLESS: &str = "--tokens 100000 --page-tokens 128 --layers 1";
const RANKS: usize = 5;
/// The same on two nodes: attention ranks and an expert rank, the other expert rank and the prefill rank.
const ON_TWO_NODES: &str = "--tokens 100000 --page-tokens 128 --layers 1 --nodes 2";
/// Within it, all that belongs to a job that was killed has to be gone.
const SOON: Duration = Duration::from_secs(10);

/// A run of the example, whose processes can be told from all others.
struct Run {
    program: Program,
    mark: String,
}

impl Run {
    fn start(args: &str) -> Run {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        let mark = format!("{}-{}", std::process::id(), RUNS.fetch_add(1, Ordering::Relaxed));
        let program = Program::start(DISAGGREGATED_MOE, args, &[("EXAMPLE_RUN", &mark)]);
        Run { program, mark }
    }

    /// Waits until all ranks have joined.
    fn joined(&mut self) {
        while !self.program.said().contains("have joined") {
            assert!(self.program.runs(), "the example ends by itself");
            sleep(Duration::from_millis(2));
        }
    }

    /// Processes that belong to it, with the ranks of those that are some.
    fn processes(&self) -> Vec<(Pid, Option<usize>)> {
        let names = fs::read_dir("/proc").unwrap().flatten();
        let pids = names.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let of_this = |pid: i32| {
            // That of a process which has ended is empty.
            let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
            let value = |name: &str| {
                let mut variables = environment.split(|&byte| byte == 0);
                variables.find_map(|variable| std::str::from_utf8(variable).ok()?.strip_prefix(name))
            };
            (value("EXAMPLE_RUN=")? == self.mark).then_some(())?;
            Some((Pid::from_raw(pid), value("XCCL_RANK=").and_then(|rank| rank.parse().ok())))
        };
        pids.filter_map(of_this).collect()
    }

    /// Waits until none is left.
    fn leaves_nothing(self) -> Output {
        let started = Instant::now();
        while !self.processes().iter().all(|&(pid, _)| pid.as_raw() == self.program.pid() as i32) {
            assert!(started.elapsed() < SOON, "still there: {:?}", self.processes());
            sleep(Duration::from_millis(5));
        }
        let output = self.program.wait();
        assert_eq!(names_in_dev_shm(), Vec::<String>::new());
        output
    }
}

fn killed_is_named_by_all_others(args: &str, victim: usize, role: &str) {
    let mut run = Run::start(args);
    run.joined();
    // Some are still about to make their handles.
    sleep(random(Duration::from_millis(300)));
    let (pid, _) = run.processes().into_iter().find(|&(_, rank)| rank == Some(victim)).expect("the rank runs");
    kill(pid, Signal::SIGKILL).unwrap();
    let Output { status, stderr, .. } = run.leaves_nothing();
    assert_eq!(status.code(), Some(1), "{stderr}");
    for rank in (0..RANKS).filter(|&rank| rank != victim) {
        let mut lines = stderr.lines().filter(|line| line.starts_with(&format!("disaggregated_moe: rank {rank}, ")));
        let names = |line: &str| line.contains(&format!(": rank {victim}, {role}, died"));
        assert!(lines.any(names), "what rank {rank} says does not name rank {victim}:\n{stderr}");
    }
    assert!(stderr.contains(&format!("rank {victim} was ended (signal: 9")), "{stderr}");
}

#[test]
fn an_attention_rank_that_is_killed_is_named_by_all_others() {
    killed_is_named_by_all_others(ENDLESS, 0, "an attention rank of domain 0");
    killed_is_named_by_all_others(ENDLESS, 1, "an attention rank of domain 0");
}

#[test]
fn an_expert_rank_that_is_killed_is_named_by_all_others() {
    killed_is_named_by_all_others(ENDLESS, 3, "expert rank 1");
}

#[test]
fn a_prefill_rank_that_is_killed_is_named_by_all_others() {
    killed_is_named_by_all_others(ENDLESS, 4, "prefill rank 0");
}

#[test]
fn a_rank_of_another_node_that_is_killed_is_named_by_all_others() {
    if has_network() {
        killed_is_named_by_all_others(ON_TWO_NODES, 3, "expert rank 1");
    }
}

#[test]
fn a_launcher_that_is_killed_at_any_moment_leaves_nothing() {
    for _ in 0..3 {
        let mut run = Run::start(ENDLESS);
        sleep(random(Duration::from_millis(400)));
        run.program.kill();
        run.leaves_nothing();
    }
}

#[test]
fn a_rank_that_is_killed_at_any_moment_leaves_nothing() {
    for _ in 0..3 {
        let mut run = Run::start(ENDLESS);
        sleep(random(Duration::from_millis(400)));
        let ranks: Vec<Pid> = run.processes().iter().filter(|(_, rank)| rank.is_some()).map(|&(pid, _)| pid).collect();
        if !ranks.is_empty() {
            // It may be about to become a rank.
            let _ = kill(ranks[random(Duration::from_secs(1)).subsec_nanos() as usize % ranks.len()], Signal::SIGKILL);
            run.leaves_nothing();
        } else {
            run.program.kill();
            run.leaves_nothing();
        }
    }
}

/// A time of up to so long, another one in each run. What a test finds with one, it may find again with any.
fn random(longest: Duration) -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    longest.mul_f64(splitmix64(now) as f64 / u64::MAX as f64)
}
