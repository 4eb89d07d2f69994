//! What crosses a process: each test starts ranks of `src/bin/rank.rs`, which check what they see.

use std::time::{Duration, Instant};

use xccl_tests::{Ended, Job};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

fn plays_well(n: usize, scenario: &str, env: &[(&str, &str)]) {
    let ended = Job::start(RANK, n, scenario, env).wait();
    assert!(ended.iter().all(|e| e.code == Some(0)), "{scenario} with {n} ranks, {env:?}: {ended:#?}");
}

#[test]
fn exchanges_equal_a_plain_reference_for_any_number_of_ranks() {
    [1, 2, 3, 4, 8, 16].into_iter().for_each(|n| plays_well(n, "moe", &[]));
}

#[test]
fn exchanges_work_over_posix_shared_memory() {
    plays_well(3, "moe", &[("XCCL_MEMORY", "posix")]);
    assert_eq!(names_in_dev_shm(), Vec::<String>::new());
}

#[test]
fn two_exchanges_may_be_in_flight_and_a_third_is_refused() {
    [1, 2, 5].into_iter().for_each(|n| plays_well(n, "in-flight", &[]));
}

#[test]
fn bad_input_is_refused_where_it_is_given_and_the_others_are_told() {
    [2, 3].into_iter().for_each(|n| plays_well(n, "refused", &[]));
}

#[test]
fn peers_are_told_of_a_batch_that_was_given_up() {
    [1, 2, 4].into_iter().for_each(|n| plays_well(n, "abandoned", &[]));
}

#[test]
fn messages_of_all_sizes_arrive_in_order() {
    for n in [1, 2, 5] {
        plays_well(n, "p2p", &[]);
        plays_well(n, "p2p", &[("XCCL_CMA", "never")]);
        plays_well(n, "p2p", &[("XCCL_CMA", "never"), ("XCCL_P2P_RING", "4K")]);
    }
}

#[test]
fn communicators_split_and_end_in_any_order() {
    [1, 2, 7].into_iter().for_each(|n| plays_well(n, "split", &[]));
}

#[test]
fn a_deadline_tells_what_the_peer_was_last_seen_doing() {
    plays_well(2, "late", &[("XCCL_TIMEOUT", "1")]);
}

#[test]
fn no_way_leads_to_writing_a_peers_outbox() {
    plays_well(2, "isolation", &[]);
}

#[test]
fn a_rank_that_waits_sleeps() {
    plays_well(2, "idle", &[]);
}

#[test]
fn sixty_four_ranks_make_progress_on_few_cores() {
    plays_well(64, "abandoned", &[]);
}

#[test]
fn twenty_jobs_that_start_at_once_never_meet() {
    let jobs: Vec<Job> = (0..20).map(|_| Job::start(RANK, 2, "join", &[])).collect();
    for ended in jobs.into_iter().flat_map(Job::wait) {
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
}

#[test]
fn survivors_name_the_rank_that_died() {
    for scenario in ["die-in-barrier", "die-in-recv", "die-in-dispatch", "die-in-combine"] {
        for n in [2, 4] {
            let start = Instant::now();
            let ended = Job::start(RANK, n, scenario, &[]).wait();
            let (dead, survivors) = ended.split_last().expect("there are ranks");
            assert_eq!(dead.code, None, "{dead:?}");
            assert!(survivors.iter().all(|s| s.code == Some(0)), "{scenario} with {n} ranks: {survivors:#?}");
            assert!(start.elapsed() < Duration::from_secs(15), "told by the deadline, not by the kernel");
        }
    }
    assert_eq!(names_in_dev_shm(), Vec::<String>::new());
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
fn a_rank_killed_while_joining_is_named() {
    // Rank 2 never comes, so the others are still joining when rank 1 is killed.
    let mut job = Job::start_some(RANK, 3, [0, 1], "join", &[("XCCL_TIMEOUT", "10")]);
    std::thread::sleep(Duration::from_millis(500));
    job.kill(1);
    let ended = job.wait();
    assert!(ended[0].stderr.contains("PeerDied") && ended[0].stderr.contains("rank: 1"), "{ended:#?}");
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

/// Segments' names that were left behind.
fn names_in_dev_shm() -> Vec<String> {
    let entries = std::fs::read_dir("/dev/shm").expect("/dev/shm is there").flatten();
    let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
    // Other tests' jobs may be between creating and unlinking: what stays is what counts.
    let ours: Vec<String> = names.filter(|n| n.starts_with("xccl-")).collect();
    std::thread::sleep(Duration::from_millis(200));
    ours.into_iter().filter(|n| std::path::Path::new("/dev/shm").join(n).exists()).collect()
}
