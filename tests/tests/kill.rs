//! A rank is killed: the others say which, soon, and nothing is left.

use std::time::{Duration, Instant};

use xccl_tests::{Job, names_in_dev_shm};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

fn survivors_name_the_dead(scenario: &str) {
    for (n, memory) in [(2, "memfd"), (4, "posix"), (8, "memfd")] {
        let start = Instant::now();
        let ended = Job::start(RANK, n, scenario, &[("XCCL_MEMORY", memory)]).wait();
        let (dead, survivors) = ended.split_last().expect("there are ranks");
        assert_eq!(dead.code, None, "{dead:?}");
        assert!(survivors.iter().all(|s| s.code == Some(0)), "{scenario} with {n} ranks, {memory}: {survivors:#?}");
        assert!(start.elapsed() < Duration::from_secs(10), "{scenario} with {n} ranks took {:?}", start.elapsed());
    }
    assert_eq!(names_in_dev_shm(), Vec::<String>::new());
}

#[test]
fn killed_while_others_wait_in_a_barrier() {
    survivors_name_the_dead("die-in-barrier");
}

#[test]
fn killed_while_others_wait_for_its_message() {
    survivors_name_the_dead("die-in-recv");
}

#[test]
fn killed_while_others_wait_for_anyones_message() {
    survivors_name_the_dead("die-in-recv-any");
}

#[test]
fn killed_while_others_wait_for_its_signal() {
    survivors_name_the_dead("die-in-signal");
}

#[test]
fn killed_while_others_wait_for_anyones_signal() {
    survivors_name_the_dead("die-in-signal-any");
}

#[test]
fn an_attention_rank_is_killed_beside_experts() {
    survivors_name_the_dead("die-apart-attention");
}

#[test]
fn an_expert_rank_is_killed_beside_attention() {
    survivors_name_the_dead("die-apart-experts");
}

#[test]
fn killed_while_others_wait_in_dispatch_recv() {
    survivors_name_the_dead("die-in-dispatch");
}

#[test]
fn killed_while_others_wait_in_combine_recv() {
    survivors_name_the_dead("die-in-combine");
}

#[test]
fn killed_while_others_wait_for_somebody_else() {
    survivors_name_the_dead("die-in-recv-other");
}

#[test]
fn killed_while_others_set_something_up() {
    survivors_name_the_dead("die-in-split");
}

#[test]
fn the_first_death_is_named_and_not_those_it_has_caused() {
    for n in [3, 5] {
        let ended = Job::start(RANK, n, "die-of-it", &[]).wait();
        let (dead, survivors) = ended.split_last().expect("there are ranks");
        assert!(dead.code.is_none() && survivors.iter().all(|s| s.code == Some(0)), "{n} ranks: {survivors:#?}");
    }
}

#[test]
fn those_that_are_left_go_on_whoever_dies_meanwhile() {
    for seed in 0..4 {
        let n = [3, 4, 6, 4][seed];
        let ended = Job::start(RANK, n, &format!("shrink-{seed}"), &[]).wait();
        for (rank, ended) in ended.iter().enumerate() {
            let expected = if [0, 2].contains(&rank) { None } else { Some(0) };
            assert_eq!(ended.code, expected, "rank {rank} of {n}, {seed}: {}", ended.stderr);
        }
    }
    assert_eq!(names_in_dev_shm(), Vec::<String>::new());
}

/// Rank 2 never comes, so the others are still joining when one of them is killed.
fn killed_while_joining(victim: usize, memory: &str) {
    let mut job = Job::start_some(RANK, 3, [0, 1], "join", &[("XCCL_MEMORY", memory)]);
    std::thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    job.kill(victim);
    let ended = job.wait();
    let (code, stderr) = (ended[1 - victim].code, &ended[1 - victim].stderr);
    assert!(code.is_some_and(|c| c != 0), "{ended:#?}");
    assert!(start.elapsed() < Duration::from_secs(5), "told only after {:?}", start.elapsed());
    assert!(stderr.contains("PeerDied") && stderr.contains(&format!("rank: {victim}")), "{stderr}");
    assert_eq!(names_in_dev_shm(), Vec::<String>::new());
}

#[test]
fn a_rank_killed_while_joining_is_named() {
    killed_while_joining(1, "memfd");
    killed_while_joining(1, "posix");
}

#[test]
fn rank_0_killed_while_others_join_is_named() {
    killed_while_joining(0, "memfd");
}
