//! What a process that looks on from outside is told of jobs that hang.

use std::time::{Duration, Instant};

use xccl::{CommSnapshot, Finding, JobSnapshot, MachineSnapshot, Operation, ProcessState};
use xccl_tests::Job;

const RANK: &str = env!("CARGO_BIN_EXE_rank");

/// What is seen of the job that process `pid` belongs to, once it is `finding`.
fn seen(pid: u32, finding: Finding) -> JobSnapshot {
    let start = Instant::now();
    loop {
        let is_it = |job: &JobSnapshot| job.communicators.iter().flat_map(|c| &c.ranks).any(|r| r.pid == Some(pid));
        let job = MachineSnapshot::take().expect("/proc is there").jobs.into_iter().find(is_it);
        match job {
            Some(job) if job.diagnosis.finding == finding => return job,
            job if start.elapsed() > Duration::from_secs(15) => panic!("expected {finding:?}, found {job:#?}"),
            _ => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn only(job: &JobSnapshot) -> &CommSnapshot {
    assert_eq!(job.communicators.len(), 1, "{job:#?}");
    &job.communicators[0]
}

#[test]
fn a_cycle_of_receives_is_told_and_then_who_died_with_what_it_did_last() {
    let mut job = Job::start(RANK, 3, "hang-cycle", &[]);
    let found = seen(job.pid(0), Finding::Cycle);
    let ranks = &only(&found).ranks;
    for (rank, seen) in ranks.iter().enumerate() {
        assert_eq!((seen.pid, seen.process), (Some(job.pid(rank)), ProcessState::Sleeping));
        let before = (rank + 2) % 3;
        let waits: Vec<_> = seen.waits.iter().map(|w| (w.operation, w.epoch, w.peer)).collect();
        assert_eq!(waits, [(Operation::Recv, 7, Some(before))]);
        let says = format!("rank {rank} waits for rank {before} in recv tag 7");
        assert!(found.diagnosis.text.contains(&says), "{}", found.diagnosis);
    }
    let died = job.pid(1);
    job.kill(1);
    // The others are told as well, and leave: until then, and as long as rank 0 is there, what rank 1 has shown can be read.
    let found = seen(job.pid(0), Finding::Died);
    let rank = &only(&found).ranks[1];
    assert_eq!((rank.pid, rank.process), (Some(died), ProcessState::Dead));
    let last = rank.history.last().expect("it has waited");
    assert_eq!((last.operation, last.epoch, last.peer, last.took_ns), (Operation::Recv, 7, Some(0), None));
    assert!(found.diagnosis.text.contains(&format!("rank 1 (process {died}) has died")), "{}", found.diagnosis);
}

#[test]
fn ranks_in_different_calls_are_told_with_both_calls() {
    let job = Job::start(RANK, 2, "hang-mismatch", &[]);
    let text = seen(job.pid(0), Finding::Mismatch).diagnosis.text;
    assert!(text.contains("rank 0 waits for rank 1 in barrier 2"), "{text}");
    assert!(text.contains("rank 1 waits for rank 0 in all_reduce 1"), "{text}");
}

#[test]
fn a_straggler_that_was_stopped_is_told_with_what_it_was_at() {
    let job = Job::start(RANK, 3, "hang-straggler", &[]);
    let found = seen(job.pid(0), Finding::Stopped);
    let last = &only(&found).ranks[2];
    assert_eq!(last.process, ProcessState::Stopped);
    assert!(last.history.iter().any(|r| (r.operation, r.epoch) == (Operation::CombineRecv, 2)), "{last:#?}");
    let waits_for_it = |text: &str| text.contains("wait for it, in dispatch_recv 3");
    let start = Instant::now();
    while !waits_for_it(&seen(job.pid(0), Finding::Stopped).diagnosis.text) {
        assert!(start.elapsed() < Duration::from_secs(15), "{}", found.diagnosis);
    }
}

#[test]
fn ranks_of_another_node_on_this_machine_are_seen_too() {
    if !xccl_tests::has_network() {
        return;
    }
    let job = Job::start_on_nodes(RANK, &[0, 1], "hang-cycle", &[]);
    let found = seen(job.pid(0), Finding::Cycle);
    let nodes: Vec<_> = only(&found).ranks.iter().map(|rank| rank.node).collect();
    assert_eq!(nodes, [Some(0), Some(1)]);
}
