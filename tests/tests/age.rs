//! Jobs that grow old, that are forked, and that run out of something.

use std::process::Command;

use xccl_tests::{has_network, plays_well, plays_well_on, succeeds};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

/// Plays a scenario that is one process's own.
fn alone(scenario: &str) {
    succeeds(Command::new(RANK).arg(scenario));
}

#[test]
fn exchanges_take_no_more_and_no_more_memory() {
    plays_well(RANK, 2, "many-exchanges", &[]);
}

/// `cargo test -p xccl-tests --test age -- --ignored ten_million`: a minute or two.
#[test]
#[ignore = "takes minutes"]
fn ten_million_exchanges_take_no_more_memory() {
    // The job is given a minute; this is the program's own patience.
    let ranks = (0..2).map(|rank| {
        let mut command = Command::new(RANK);
        command.arg("many-exchanges").env("XCCL_RANK", rank.to_string()).env("XCCL_WORLD_SIZE", "2");
        command.env("XCCL_JOB", format!("age-{}", std::process::id())).env("TEST_EXCHANGES", "10000000");
        command.spawn().expect("the rank starts")
    });
    for mut rank in ranks.collect::<Vec<_>>() {
        assert!(rank.wait().expect("the rank ends").success());
    }
}

#[test]
fn a_hundred_communicators_leave_nothing_behind() {
    plays_well(RANK, 2, "many-communicators", &[]);
}

#[test]
#[ignore = "takes a minute"]
fn a_thousand_communicators_leave_nothing_behind() {
    plays_well(RANK, 3, "many-communicators", &[("TEST_COMMUNICATORS", "1000")]);
}

#[test]
fn a_fork_is_told_that_the_communicator_is_its_parents() {
    plays_well(RANK, 3, "forked", &[]);
    if has_network() {
        plays_well_on(RANK, &[0, 0, 1], "forked", &[]);
    }
}

#[test]
fn too_few_descriptors_are_an_error_and_lose_none() {
    alone("few-descriptors");
}

#[test]
fn too_little_address_space_is_an_error_and_leaves_nothing_mapped() {
    alone("little-address-space");
}

#[test]
fn a_full_dev_shm_is_an_error_and_leaves_no_name() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make another /dev/shm");
        return;
    }
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", "mount -t tmpfs -o size=16m none /dev/shm && exec \"$0\" full-dev-shm", RANK]);
    succeeds(&mut command);
}
