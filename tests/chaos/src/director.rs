//! Starts the ranks, hands out cases, sees who dies and when, and judges what the others say.

use std::fmt;
use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use xccl::UniqueId;

use crate::case::{Case, Kind};
use crate::leaks;
use crate::wire::{Outcome, Report, Task, now_ns};

/// Beyond a call's own patience: what a loaded machine needs besides.
const GRACE: Duration = Duration::from_secs(30);

struct Worker {
    child: Child,
    pidfd: OwnedFd,
    to: ChildStdin,
    from: ChildStdout,
    heard: Vec<u8>,
    /// Its address space after its first cases.
    first_vm: Option<u64>,
    cases: u64,
}

impl Worker {
    fn start() -> Result<Worker> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("rank").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("starting a rank")?;
        let (to, from) = (child.stdin.take().context("its input")?, child.stdout.take().context("its output")?);
        // SAFETY: the call takes two numbers.
        let fd = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, child.id(), 0) };
        if fd < 0 {
            bail!("pidfd_open: {}", std::io::Error::last_os_error());
        }
        // SAFETY: just opened, and nobody else's.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(Worker { child, pidfd, to, from, heard: vec![], first_vm: None, cases: 0 })
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Reads what there is; a whole line is a report.
    fn hear(&mut self) -> Result<Option<Report>> {
        let mut buffer = [0; 8192];
        let n = self.from.read(&mut buffer)?;
        self.heard.extend_from_slice(&buffer[..n]);
        match self.heard.iter().position(|&b| b == b'\n') {
            None => Ok(None),
            Some(end) => {
                let line: Vec<u8> = self.heard.drain(..=end).collect();
                Ok(Some(serde_json::from_slice(&line)?))
            }
        }
    }

    fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
    }

    fn signal(&self, signal: Signal) {
        // It may have died meanwhile.
        let _ = kill(Pid::from_raw(self.pid() as i32), signal);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What has become of one rank.
enum End {
    Reported(Report),
    Died {
        at_ns: u64,
        signal: Option<i32>,
    },
    /// Neither, in time: what the kernel says of it.
    Hung(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Reported(Report { outcome, during, .. }) => write!(f, "{during}: {outcome:?}"),
            End::Died { signal, .. } => write!(f, "ended by signal {signal:?}"),
            End::Hung(seen) => write!(f, "hangs: {seen}"),
        }
    }
}

/// What a case was worth.
#[derive(Default)]
pub struct Judged {
    pub kills: usize,
    pub stops: usize,
    /// How long after the death each survivor knew, in nanoseconds.
    pub told_ns: Vec<u64>,
    /// Survivors that could only miss a rank, at their deadline.
    pub missed: usize,
    pub hangs: usize,
    pub leaks: usize,
    /// It could not begin.
    pub void: bool,
    pub wrong: Vec<String>,
}

/// The ranks' processes. They live from case to case, and are killed in some.
pub struct Director {
    pool: Vec<Worker>,
    /// Processes that were ours and are dead.
    dead: Vec<u32>,
    /// The most that an address space has grown over the cases of a process.
    pub grown_kib: u64,
    /// Says how a case ended for each rank.
    verbose: bool,
}

impl Director {
    pub fn new(verbose: bool) -> Director {
        Director { pool: vec![], dead: vec![], grown_kib: 0, verbose }
    }

    pub fn run(&mut self, case: &Case) -> Result<Judged> {
        while self.pool.len() < case.ranks() {
            self.pool.push(Worker::start()?);
        }
        let mut rng = StdRng::seed_from_u64(case.seed);
        self.pool.shuffle(&mut rng);
        let mut players: Vec<Worker> = self.pool.drain(..case.ranks()).collect();
        let id = match case.is_far() {
            true => UniqueId::new_at((std::net::Ipv4Addr::LOCALHOST, free_port()?).into())?,
            false => UniqueId::new()?,
        };
        let mut order: Vec<usize> = (0..case.ranks()).collect();
        order.shuffle(&mut rng);
        for rank in order {
            let task = Task { case: case.clone(), rank, id: id.as_bytes().to_vec() };
            writeln!(players[rank].to, "{}", serde_json::to_string(&task)?)?;
        }
        let ends = watch(case, &mut players)?;
        if self.verbose {
            ends.iter().enumerate().for_each(|(rank, end)| eprintln!("  rank {rank}: {end}"));
        }
        let mut judged = judge(case, &ends);
        for (worker, end) in players.into_iter().zip(ends) {
            match end {
                End::Reported(report) => self.keep(worker, &report),
                End::Died { .. } | End::Hung(_) => self.dead.push(worker.pid()),
            }
        }
        // The dead ones leave nothing but perhaps a name, for microseconds' worth of kills, which the next job clears.
        let living: Vec<u32> = self.pool.iter().map(Worker::pid).collect();
        let names = leaks::names_of(&living);
        if !names.is_empty() {
            judged.leaks += names.len();
            judged.wrong.push(format!("names are left in /dev/shm: {names:?}"));
        }
        Ok(judged)
    }

    fn keep(&mut self, mut worker: Worker, report: &Report) {
        worker.cases += 1;
        match worker.first_vm {
            // By then its allocators have what they want.
            None if worker.cases == 20 => worker.first_vm = Some(report.vm_kib),
            None => {}
            Some(first) => self.grown_kib = self.grown_kib.max(report.vm_kib.saturating_sub(first)),
        }
        self.pool.push(worker);
    }

    /// Names of dead processes' segments, which a job that comes afterwards should have cleared.
    pub fn names_of_the_dead(&self) -> Vec<String> {
        leaks::names_of(&self.dead)
    }
}

fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Waits until every rank has reported or died, and lets those go on that were stopped.
fn watch(case: &Case, players: &mut [Worker]) -> Result<Vec<End>> {
    let mut ends: Vec<Option<End>> = players.iter().map(|_| None).collect();
    let stops: Vec<(usize, u64)> = case
        .blows
        .iter()
        .filter_map(|blow| if let Kind::Stop { millis } = blow.kind { Some((blow.rank, millis)) } else { None })
        .collect();
    let mut resume: Vec<Option<Instant>> = players.iter().map(|_| None).collect();
    let limit = Instant::now() + case.patience() + GRACE;
    while ends.iter().any(Option::is_none) {
        let open: Vec<usize> = (0..players.len()).filter(|&rank| ends[rank].is_none()).collect();
        let ready: Vec<[bool; 2]> = {
            let mut fds: Vec<PollFd> = open
                .iter()
                .flat_map(|&rank| [players[rank].from.as_fd(), players[rank].pidfd.as_fd()])
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            let millis: u8 = if stops.is_empty() { 100 } else { 1 };
            poll(&mut fds, PollTimeout::from(millis))?;
            fds.chunks(2).map(|pair| [0, 1].map(|i: usize| pair[i].any() == Some(true))).collect()
        };
        let now = now_ns();
        for (&rank, [says, died]) in open.iter().zip(ready) {
            let player = &mut players[rank];
            if says && let Some(report) = player.hear()? {
                ends[rank] = Some(End::Reported(report));
            } else if died {
                let status = player.child.wait()?;
                ends[rank] = Some(End::Died { at_ns: now, signal: status.signal() });
            }
        }
        for &(rank, millis) in stops.iter().filter(|(rank, _)| ends[*rank].is_none()) {
            match resume[rank] {
                None if players[rank].is_stopped() => {
                    resume[rank] = Some(Instant::now() + Duration::from_millis(millis));
                }
                Some(at) if Instant::now() >= at => {
                    players[rank].signal(Signal::SIGCONT);
                    resume[rank] = None;
                }
                _ => {}
            }
        }
        if Instant::now() > limit {
            for rank in (0..players.len()).filter(|&rank| ends[rank].is_none()).collect::<Vec<_>>() {
                ends[rank] = Some(End::Hung(seen_from_outside(players[rank].pid())));
            }
        }
    }
    Ok(ends.into_iter().flatten().collect())
}

/// Where a process's threads are.
fn seen_from_outside(pid: u32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let task = |task: std::fs::DirEntry| {
        let read = |what: &str| std::fs::read_to_string(task.path().join(what)).unwrap_or_default().trim().to_owned();
        format!("{} in {:?}", read("comm"), read("wchan"))
    };
    tasks.map(task).collect::<Vec<_>>().join(", ")
}

fn judge(case: &Case, ends: &[End]) -> Judged {
    let mut judged = Judged::default();
    let death = |rank: usize| match ends.get(rank) {
        Some(End::Died { at_ns, .. }) => Some(*at_ns),
        _ => None,
    };
    let to_be_killed = |rank: usize| case.blows.iter().any(|blow| blow.rank == rank && blow.kind == Kind::Kill);
    judged.stops = case.blows.iter().filter(|blow| blow.kind != Kind::Kill).count();
    for (rank, end) in ends.iter().enumerate() {
        match end {
            End::Died { signal: Some(9), .. } if to_be_killed(rank) => judged.kills += 1,
            End::Died { signal, .. } => judged.wrong.push(format!("rank {rank} ended by itself, signal {signal:?}")),
            End::Hung(seen) => {
                judged.hangs += 1;
                judged.wrong.push(format!("rank {rank} hangs: {seen}"));
            }
            End::Reported(Report { outcome, at_ns, during, leaks, .. }) => {
                judged.leaks += leaks.len();
                if !leaks.is_empty() {
                    judged.wrong.push(format!("rank {rank}, {during}: left behind: {leaks:?}"));
                }
                match outcome {
                    Outcome::Done => {}
                    Outcome::Void(_) => judged.void = true,
                    Outcome::Wrong(why) => judged.wrong.push(format!("rank {rank}, {during}: {why}")),
                    Outcome::Told { blamed, kind, text } => match blamed.iter().filter_map(|&rank| death(rank)).min() {
                        None => judged.wrong.push(format!("rank {rank}, {during}: nobody of those died: {text}")),
                        Some(_) if !kind.starts_with("Peer") => judged.missed += 1,
                        Some(died) => judged.told_ns.push(at_ns.saturating_sub(died)),
                    },
                }
            }
        }
    }
    // Nobody rank 0 could listen for: all that follows is about that.
    if judged.void {
        judged.wrong.clear();
    }
    judged
}
