//! Collectives between real processes.

use xccl_tests::{Job, names_in_dev_shm, plays_well};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

#[test]
fn every_collective_works_at_every_size_with_one_to_eight_processes() {
    for n in [1, 2, 3, 8] {
        plays_well(RANK, n, "collectives", &[]);
    }
    plays_well(RANK, 3, "collectives", &[("XCCL_MEMORY", "posix")]);
}

#[test]
fn different_calls_are_an_error_in_every_process() {
    for n in [2, 3, 8] {
        plays_well(RANK, n, "collective-mismatch", &[]);
    }
}

fn survivors_name_the_dead(scenario: &str) {
    for (n, memory) in [(2, "memfd"), (4, "posix"), (8, "memfd")] {
        let ended = Job::start(RANK, n, scenario, &[("XCCL_MEMORY", memory)]).wait();
        let (dead, survivors) = ended.split_last().expect("there are ranks");
        assert_eq!(dead.code, None, "{dead:?}");
        assert!(survivors.iter().all(|s| s.code == Some(0)), "{scenario} with {n} ranks, {memory}: {survivors:#?}");
    }
    assert_eq!(names_in_dev_shm(), Vec::<String>::new());
}

#[test]
fn killed_before_an_all_reduce() {
    survivors_name_the_dead("collective-die-reduce");
}

#[test]
fn the_root_is_killed_before_its_broadcast() {
    survivors_name_the_dead("collective-die-broadcast");
}

#[test]
fn killed_while_others_have_two_requests_on_their_way() {
    survivors_name_the_dead("collective-die-requests");
}

#[test]
fn killed_in_the_middle_of_collectives() {
    survivors_name_the_dead("collective-die-amid");
}
