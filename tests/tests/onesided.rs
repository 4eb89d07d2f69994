//! One-sided access and KV transfer between real processes.

use xccl_tests::{Job, names_in_dev_shm, plays_well};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

#[test]
fn puts_signals_and_atomics_of_all_ranks_arrive() {
    for n in [1, 2, 3, 8] {
        plays_well(RANK, n, "put", &[]);
        plays_well(RANK, n, "put", &[("XCCL_MEMORY", "posix")]);
    }
}

#[test]
fn pages_of_many_requests_reach_several_receivers() {
    for n in [2, 3, 4, 7] {
        plays_well(RANK, n, "kv-all-live", &[]);
    }
}

/// The scenario's victim is killed; all others must end well: what is between two of them goes on.
fn others_go_on(scenario: &str, n: usize, victim: usize) {
    let ended = Job::start(RANK, n, scenario, &[]).wait();
    for (rank, ended) in ended.iter().enumerate() {
        let expected = if rank == victim { None } else { Some(0) };
        assert_eq!(ended.code, expected, "{scenario} with {n} ranks: rank {rank}: {}", ended.stderr);
    }
    assert_eq!(names_in_dev_shm(), Vec::<String>::new());
}

#[test]
fn the_death_of_a_sender_ends_its_requests_alone() {
    [2, 4, 6].into_iter().for_each(|n| others_go_on("kv-sender-dies", n, 0));
}

#[test]
fn the_death_of_a_receiver_ends_its_requests_alone() {
    [2, 4, 6].into_iter().for_each(|n| others_go_on("kv-receiver-dies", n, n - 1));
}
