//! A rank that is stopped is told apart from one that has died, and what it does when it goes on harms nobody.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use xccl_tests::Job;

const RANK: &str = env!("CARGO_BIN_EXE_rank");

/// Lets the last of three ranks go on that has stopped itself, once the others' deadline must have passed.
fn goes_on_after_a_pause(scenario: &str) {
    let job = Job::start(RANK, 3, scenario, &[("XCCL_TIMEOUT", "1")]);
    let pid = Pid::from_raw(job.pid(2) as i32);
    let is_stopped = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('T'))
    };
    let waited = (0..2000).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        is_stopped()
    });
    std::thread::sleep(Duration::from_millis(1800));
    kill(pid, Signal::SIGCONT).expect("the rank is this process's child");
    let ended = job.wait();
    assert!(waited && ended.iter().all(|e| e.code == Some(0)), "{scenario}: {ended:#?}");
}

#[test]
fn a_stopped_rank_is_named_and_its_late_exchange_has_every_byte_right() {
    goes_on_after_a_pause("paused");
}

#[test]
fn a_rank_that_was_stopped_while_the_others_aborted_is_told_when_it_goes_on() {
    goes_on_after_a_pause("aborted-while-paused");
}
