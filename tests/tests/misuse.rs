//! Wrong calls: the right error where they are made, and news of it elsewhere.

use std::process::Command;

use xccl_tests::{Ended, Job, new_job, plays_well};

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
fn a_call_that_waits_for_many_ranks_has_one_deadline() {
    plays_well(RANK, 5, "staggered", &[("XCCL_TIMEOUT", "0.6")]);
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

/// Two ranks where `/dev/shm` has `size` bytes: their exit codes, and what they said. `None` where a test cannot mount.
fn with_small_dev_shm(size: &str, scenario: &str) -> Option<Vec<Ended>> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let script = r#"mount -t tmpfs -o size=$1 tmpfs /dev/shm || exit 99
        for r in 0 1; do { XCCL_RANK=$r "$2" "$3" 2> "$4/$r.said"; echo $? > "$4/$r.code"; } & done; wait; ls /dev/shm"#;
    let mut alone = Command::new("unshare");
    alone.args(["--mount", "sh", "-c", script, "sh", size, RANK, scenario]).arg(dir.path());
    alone.env("XCCL_WORLD_SIZE", "2").env("XCCL_JOB", new_job()).env("XCCL_MEMORY", "posix");
    alone.env("XCCL_TIMEOUT", "20").env("XCCL_HEAP", "1M").env("RUST_BACKTRACE", "0");
    let output = alone.output().ok()?;
    if !output.status.success() {
        eprintln!("skipped: no mount namespace here: {}", String::from_utf8_lossy(&output.stderr));
        return None;
    }
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "names are left in /dev/shm");
    let read = |name: String| std::fs::read_to_string(dir.path().join(name)).expect("a rank's words");
    let ended = |r| Ended { code: read(format!("{r}.code")).trim().parse().ok(), stderr: read(format!("{r}.said")) };
    Some([0, 1].map(ended).into())
}

/// At least one of the ranks names both numbers; the other one says the same, or whom it was told by.
fn told_of_too_little_memory(ended: &[Ended]) {
    let both = |e: &Ended| e.stderr.contains("NotEnoughMemory { what: \"a segment in /dev/shm\", needed: ");
    let told = |e: &Ended, by: usize| e.stderr.contains(&format!("rank {by}: a segment in /dev/shm needs "));
    assert!(ended.iter().any(both), "{ended:#?}");
    assert!((0..2).all(|r| both(&ended[r]) || told(&ended[r], 1 - r)), "{ended:#?}");
}

#[test]
fn a_full_dev_shm_is_an_error_at_start_on_every_rank() {
    // Room for no outbox; for no heap; for one heap.
    for size in ["64k", "1m", "2m"] {
        let Some(ended) = with_small_dev_shm(size, "join") else { return };
        assert!(ended.iter().all(|e| e.code == Some(1)), "{size}: {ended:#?}");
        told_of_too_little_memory(&ended);
    }
}

#[test]
fn a_handle_that_dev_shm_has_no_room_for_is_told_to_every_rank_and_the_communicator_goes_on() {
    // Room for the communicator, and for less than two handles.
    let Some(ended) = with_small_dev_shm("6m", "large-handle") else { return };
    assert!(ended.iter().all(|e| e.code == Some(0)), "{ended:#?}");
    told_of_too_little_memory(&ended);
}
