//! Ranks that take themselves for those of several nodes, so that the plane between nodes carries what shared memory does otherwise:
//! real processes, on loopback.

use xccl_tests::{Job, has_network, plays_well_on};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

/// Two nodes of one and of two ranks, three of unequal size, and two whose ranks are not neighbours.
const NODES: [&[usize]; 4] = [&[0, 1], &[0, 0, 1, 1], &[0, 1, 1, 2, 2, 2], &[0, 1, 0, 1]];

fn on_all_nodes(scenario: &str) {
    if has_network() {
        NODES.into_iter().for_each(|nodes| plays_well_on(RANK, nodes, scenario, &[]));
    }
}

#[test]
fn exchanges_equal_a_plain_reference_bit_for_bit() {
    on_all_nodes("moe");
}

#[test]
fn encoded_rows_arrive_in_every_format_and_form() {
    on_all_nodes("wire");
}

#[test]
fn two_exchanges_are_in_flight_in_any_order() {
    ["in-flight", "joined", "reuse", "later-first"].into_iter().for_each(on_all_nodes);
}

#[test]
fn messages_of_every_kind_arrive() {
    ["messages", "mixed-sizes", "truncated", "given-up", "many-posted", "heap"].into_iter().for_each(on_all_nodes);
}

#[test]
fn communicators_are_split_across_nodes() {
    on_all_nodes("split");
}

#[test]
fn bad_input_and_given_up_exchanges_are_told_to_other_nodes() {
    ["refused", "refused-rows", "abandoned", "both-abandoned", "rows-lent-out"].into_iter().for_each(on_all_nodes);
}

#[test]
fn without_a_progress_thread_all_is_as_before() {
    if has_network() {
        let env = [("XCCL_PROGRESS_THREAD", "never")];
        ["messages", "moe"].into_iter().for_each(|scenario| plays_well_on(RANK, &[0, 1, 1], scenario, &env));
    }
}

#[test]
fn a_death_is_told_to_the_ranks_of_other_nodes_by_the_right_name() {
    if !has_network() {
        return;
    }
    for scenario in ["die-in-barrier", "die-in-recv", "die-in-recv-any", "die-in-dispatch", "die-in-combine"] {
        for nodes in [&[0, 1][..], &[0, 0, 1, 1]] {
            let ended = Job::start_on_nodes(RANK, nodes, scenario, &[]).wait();
            let survivors = &ended[..nodes.len() - 1];
            assert!(survivors.iter().all(|e| e.code == Some(0)), "{scenario} on {nodes:?}: {ended:#?}");
        }
    }
}
