//! Many ranks, many jobs, and ranks with nothing to do.

use std::time::{Duration, Instant};

use xccl_tests::{Job, plays_well};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

#[test]
fn sixty_four_ranks_make_progress_on_few_cores() {
    let start = Instant::now();
    plays_well(RANK, 64, "crowd", &[]);
    assert!(start.elapsed() < Duration::from_secs(20), "took {:?}", start.elapsed());
}

#[test]
fn twenty_jobs_that_start_at_once_never_meet() {
    let jobs: Vec<Job> = (0..20).map(|_| Job::start(RANK, 2, "join", &[])).collect();
    for ended in jobs.into_iter().flat_map(Job::wait) {
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
}

#[test]
fn a_rank_that_waits_sleeps() {
    plays_well(RANK, 2, "idle", &[]);
}

#[test]
fn ranks_on_one_core_give_it_to_each_other() {
    plays_well(RANK, 2, "one-core", &[]);
}

#[test]
fn ranks_bound_to_a_core_each_are_not_taken_for_many_on_one() {
    if std::thread::available_parallelism().map_or(1, |n| n.get()) < 2 {
        eprintln!("skipped: there is one core");
        return;
    }
    plays_well(RANK, 2, "own-cores", &[]);
}
