//! Wrong calls: the right error where they are made, and news of it elsewhere.

use xccl_tests::{Ended, Job, plays_well};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

#[test]
fn bad_input_is_refused_where_it_is_given_and_the_others_are_told() {
    [2, 3].into_iter().for_each(|n| plays_well(RANK, n, "refused", &[]));
}

#[test]
fn asking_for_too_many_input_rows_is_told_to_the_others() {
    plays_well(RANK, 2, "refused-rows", &[("XCCL_TIMEOUT", "3")]);
}

#[test]
fn peers_are_told_of_a_batch_that_was_given_up() {
    [1, 2, 4].into_iter().for_each(|n| plays_well(RANK, n, "abandoned", &[]));
}

#[test]
fn peers_are_told_of_both_batches_that_were_given_up() {
    [1, 2, 4].into_iter().for_each(|n| plays_well(RANK, n, "both-abandoned", &[]));
}

#[test]
fn rows_that_were_lent_out_are_given_back_before_other_input_and_half_a_batch_is_told() {
    plays_well(RANK, 2, "rows-lent-out", &[]);
}

#[test]
fn a_deadline_tells_what_the_peer_was_last_seen_doing() {
    plays_well(RANK, 2, "late", &[("XCCL_TIMEOUT", "1")]);
}

#[test]
fn a_dispatch_past_its_deadline_may_be_repeated() {
    plays_well(RANK, 2, "late-dispatch", &[("XCCL_TIMEOUT", "1")]);
}

#[test]
fn a_rank_that_never_comes_is_named_at_the_deadline() {
    let ended = Job::start_some(RANK, 3, [0, 2], "join", &[("XCCL_TIMEOUT", "0.5")]).wait();
    for Ended { code, stderr } in ended {
        assert_ne!(code, Some(0));
        assert!(stderr.contains("MissingRanks") && stderr.contains("[1]"), "{stderr}");
    }
}

#[test]
fn a_machine_without_enough_memory_is_told_both_numbers() {
    let ended = Job::start(RANK, 2, "join", &[("XCCL_HEAP", "900G")]).wait();
    for Ended { code, stderr } in ended {
        assert_ne!(code, Some(0));
        assert!(
            stderr.contains("NotEnoughMemory") && stderr.contains("needed") && stderr.contains("available"),
            "{stderr}"
        );
    }
}
