//! One-sided access and KV transfer between real processes.

use xccl_tests::{Ended, Job, names_in_dev_shm, new_job, plays_well};

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

/// Ranks that pretend to live on two nodes by turns, so that what is between the two goes over libfabric; `None`, with the
/// reason printed, where that is not installed.
fn on_two_nodes(n: usize, scenario: &str) -> Option<Vec<Ended>> {
    // SAFETY: loading it runs its initializers, which ask nothing of this process; it stays loaded.
    if unsafe { libc::dlopen(c"libfabric.so.1".as_ptr(), libc::RTLD_LAZY) }.is_null() {
        eprintln!("skipped: libfabric is not installed (Debian: apt-get install libfabric1)");
        return None;
    }
    let job = new_job();
    let rank = |rank: usize| {
        let numbers = [("XCCL_RANK", rank), ("XCCL_WORLD_SIZE", n), ("XCCL_NODE_ID", rank % 2)];
        let numbers = numbers.map(|(name, value)| (name.to_owned(), value.to_string()));
        numbers.into_iter().chain([("XCCL_JOB".to_owned(), job.clone())]).collect()
    };
    Some(Job::start_with(RANK, scenario, (0..n).map(rank)).wait())
}

#[test]
fn puts_signals_atomics_and_pages_cross_between_nodes() {
    for (n, scenario) in [(2, "put"), (3, "put"), (2, "kv-all-live"), (4, "kv-all-live")] {
        let ended = on_two_nodes(n, scenario).unwrap_or_default();
        assert!(ended.iter().all(|e| e.code == Some(0)), "{scenario} with {n} ranks: {ended:#?}");
    }
}

#[test]
fn a_death_on_another_node_ends_the_requests_of_the_dead_alone() {
    for (n, scenario, victim) in [(2, "kv-sender-dies", 0), (4, "kv-receiver-dies", 3)] {
        for (rank, ended) in on_two_nodes(n, scenario).unwrap_or_default().iter().enumerate() {
            let expected = if rank == victim { None } else { Some(0) };
            assert_eq!(ended.code, expected, "{scenario} with {n} ranks: rank {rank}: {}", ended.stderr);
        }
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
