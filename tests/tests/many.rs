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
