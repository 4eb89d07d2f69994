//! Waits for the ranks; ends all once one has failed.

use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg, raise};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::output::Forwarder;
use super::signals::{Event, Signals};
use super::{RunOptions, TIMED_OUT};

struct Supervisor<'a> {
    /// The rank of the first of this launcher's.
    first: usize,
    /// By rank, from that one on: its process and the group that this leads.
    groups: Vec<Pid>,
    /// Ranks that have not ended.
    running: Vec<usize>,
    /// Exit code of the first that failed.
    failed: Option<u8>,
    /// When those that do not react to SIGTERM are killed.
    kill_at: Option<Instant>,
    /// When the job's time is over, unless that is past.
    over_at: Option<Instant>,
    timeout: Duration,
    grace: Duration,
    output: &'a Forwarder,
}

/// Returns once every rank has ended; none is reaped. Gives the exit code of the first that failed, or 0.
pub fn supervise(ranks: &[Child], signals: &Signals, options: &RunOptions, output: &Forwarder) -> Result<u8> {
    let groups = ranks.iter().map(|rank| Pid::from_raw(rank.id() as i32)).collect();
    let running = (0..ranks.len()).collect();
    let over_at = options.timeout.map(|timeout| Instant::now() + timeout);
    let (timeout, grace) = (options.timeout.unwrap_or_default(), options.grace);
    let first = options.nodes.first_rank(options.ranks);
    let mut supervisor =
        Supervisor { first, groups, running, failed: None, kill_at: None, over_at, timeout, grace, output };
    while !supervisor.running.is_empty() {
        let next = supervisor.kill_at.into_iter().chain(supervisor.over_at).min();
        let patience = next.map(|at| at.saturating_duration_since(Instant::now()));
        match signals.next(patience)? {
            Some(Event::Child(first)) => supervisor.look(first)?,
            Some(Event::Signal(signal)) => supervisor.pass_on(signal),
            None => supervisor.time_passed(),
        }
    }
    Ok(supervisor.failed.unwrap_or(0))
}

impl Supervisor<'_> {
    fn send(&self, signal: Signal) {
        for &group in &self.groups {
            // A group that is gone has nothing to be told.
            let _ = killpg(group, signal);
        }
    }

    fn time_passed(&mut self) {
        let now = Instant::now();
        if self.over_at.is_some_and(|at| at <= now) {
            self.over_at = None;
            if self.failed.is_none() {
                let (time, still) = (self.timeout.as_secs_f64(), self.running.len());
                let say =
                    format!("xccl run: the time of {time} s is over with {still} ranks still running; ending them\n");
                self.output.say(&say);
                self.fail(TIMED_OUT);
            }
        }
        if self.kill_at.is_some_and(|at| at <= now) {
            self.kill_at = None;
            self.send(Signal::SIGKILL);
        }
    }

    /// The job has failed: the ranks are asked to end, and have some time for it.
    fn fail(&mut self, code: u8) {
        self.failed = Some(code);
        self.send(Signal::SIGTERM);
        // A stopped one does not even see the former.
        self.send(Signal::SIGCONT);
        self.kill_at = Some(Instant::now() + self.grace);
    }

    fn pass_on(&self, signal: Signal) {
        self.send(signal);
        if signal == Signal::SIGTSTP {
            // SIGCONT, which ends this stop, is passed on in its turn.
            let _ = raise(Signal::SIGSTOP);
        }
    }

    /// Looks which ranks have ended, `first` before the others: several deaths may have become one signal, and the one
    /// that raised it may have caused the others.
    fn look(&mut self, first: Pid) -> Result<()> {
        let (mut order, others): (Vec<usize>, Vec<usize>) =
            self.running.iter().partition(|&&rank| self.groups[rank] == first);
        order.extend(others);
        for rank in order {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            let status = loop {
                match waitid(Id::Pid(self.groups[rank]), flags) {
                    Err(Errno::EINTR) => {}
                    other => break other.with_context(|| format!("waiting for rank {rank}"))?,
                }
            };
            if status != WaitStatus::StillAlive {
                self.running.retain(|&r| r != rank);
                self.ended(rank, status);
            }
        }
        Ok(())
    }

    fn ended(&mut self, rank: usize, status: WaitStatus) {
        let (code, how) = match status {
            WaitStatus::Exited(_, code) => (code as u8, format!("exited with code {code}")),
            WaitStatus::Signaled(_, signal, core) => {
                let core = if core { ", core dumped" } else { "" };
                let how = format!("was killed by signal {} ({signal}{core})", signal as i32);
                (128 + signal as u8, how)
            }
            _ => return,
        };
        // What follows the first failure, follows from it.
        if code == 0 || self.failed.is_some() {
            return;
        }
        let rest = match self.running.len() {
            0 => String::new(),
            1 => "; ending the other rank".to_owned(),
            n => format!("; ending the other {n} ranks"),
        };
        let (rank, pid) = (self.first + rank, self.groups[rank]);
        self.output.say(&format!("xccl run: rank {rank} (pid {pid}) {how}{rest}\n"));
        self.fail(code);
    }
}
