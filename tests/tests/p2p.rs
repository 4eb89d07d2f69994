//! Messages between real processes.

use xccl_tests::plays_well;

const RANK: &str = env!("CARGO_BIN_EXE_rank");

/// The ways messages may travel.
const WAYS: [&[(&str, &str)]; 5] = [
    &[],
    &[("XCCL_CMA", "never")],
    &[("XCCL_CMA", "never"), ("XCCL_P2P_RING", "4K")],
    &[("XCCL_RENDEZVOUS", "128")],
    &[("XCCL_MEMORY", "posix"), ("XCCL_P2P_RING", "8K")],
];

fn in_every_way(sizes: &[usize], scenario: &str) {
    for n in sizes {
        WAYS.iter().for_each(|way| plays_well(RANK, *n, scenario, way));
    }
}

#[test]
fn messages_of_all_sizes_arrive_in_order() {
    in_every_way(&[1, 2, 5], "messages");
}

#[test]
fn sixty_four_outstanding_messages_keep_their_order_per_tag() {
    in_every_way(&[1, 2, 3], "mixed-sizes");
}

#[test]
fn messages_from_the_symmetric_heap_are_only_described() {
    for n in [1, 2, 3] {
        plays_well(RANK, n, "heap", &[]);
        plays_well(RANK, n, "heap", &[("XCCL_CMA", "never"), ("XCCL_MEMORY", "posix")]);
    }
}

#[test]
fn a_message_too_long_for_one_receive_goes_to_the_next() {
    in_every_way(&[1, 2], "truncated");
}

#[test]
fn a_receive_that_is_given_up_takes_no_message() {
    in_every_way(&[1, 2], "given-up");
}

#[test]
fn five_hundred_receives_get_what_they_were_posted_for() {
    in_every_way(&[1, 2, 3], "many-posted");
}

#[test]
fn communicators_split_and_end_in_any_order() {
    [1, 2, 7].into_iter().for_each(|n| plays_well(RANK, n, "split", &[]));
}

#[test]
fn a_message_that_its_sender_gave_up_arrives_as_it_was_or_not_at_all() {
    for way in WAYS {
        plays_well(RANK, 2, "withdrawn", &[way, &[("XCCL_TIMEOUT", "0.4")]].concat());
    }
}
