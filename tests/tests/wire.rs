//! Rows that travel encoded, against a plain reference, by real processes.

use xccl_tests::{Job, plays_well};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

#[test]
fn every_format_in_every_layout_equals_a_plain_reference_for_any_number_of_ranks() {
    [1, 2, 3, 4, 8].into_iter().for_each(|n| plays_well(RANK, n, "wire", &[]));
}

#[test]
fn plain_loops_give_the_same() {
    plays_well(RANK, 3, "wire", &[("XCCL_KERNELS", "scalar")]);
}

#[test]
fn calls_and_configurations_that_do_not_go_with_a_format_are_refused() {
    [1, 2, 3].into_iter().for_each(|n| plays_well(RANK, n, "wire-refused", &[]));
}

#[test]
fn kernels_that_the_processor_lacks_are_an_error_that_names_what_it_has() {
    let lacking = if cfg!(target_arch = "aarch64") { "avx2" } else { "neon" };
    let ended = Job::start(RANK, 1, "wire", &[("XCCL_KERNELS", lacking)]).wait();
    let complaint = &ended[0].stderr;
    assert!(ended[0].code != Some(0), "{ended:?}");
    assert!(
        complaint.contains("XCCL_KERNELS") && complaint.contains(lacking) && complaint.contains("scalar"),
        "{complaint}"
    );
}
