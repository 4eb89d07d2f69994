//! Exchanges of tokens, against a plain reference, by real processes.

use xccl_tests::{names_in_dev_shm, plays_well};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

#[test]
fn exchanges_equal_a_plain_reference_for_any_number_of_ranks() {
    [1, 2, 3, 4, 8, 16].into_iter().for_each(|n| plays_well(RANK, n, "moe", &[]));
}

#[test]
fn exchanges_work_over_posix_shared_memory() {
    plays_well(RANK, 3, "moe", &[("XCCL_MEMORY", "posix")]);
    assert_eq!(names_in_dev_shm(), Vec::<String>::new());
}

#[test]
fn two_exchanges_may_be_in_flight_and_a_third_is_refused() {
    [1, 2, 5].into_iter().for_each(|n| plays_well(RANK, n, "in-flight", &[]));
}

#[test]
fn the_joined_calls_equal_a_plain_reference() {
    [1, 2, 5].into_iter().for_each(|n| plays_well(RANK, n, "joined", &[]));
}

#[test]
fn one_routing_serves_fifty_exchanges_whose_halves_interleave() {
    [1, 2, 5].into_iter().for_each(|n| plays_well(RANK, n, "reuse", &[]));
}

#[test]
fn outputs_handed_in_for_the_later_exchange_first_are_not_taken_for_the_earlier_ones() {
    [2, 3].into_iter().for_each(|n| plays_well(RANK, n, "later-first", &[]));
}
