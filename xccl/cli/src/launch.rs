//! Starts local ranks, passes their output and signals on, and ends all when one fails.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use crate::guard::Guard;

#[derive(Args)]
pub struct RunArgs {
    /// Number of ranks
    #[arg(short, long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    n: u32,
    /// Bind rank i to the i-th usable core, round and round
    #[arg(long)]
    bind: bool,
    /// Pass output on as it is, without the rank before each line
    #[arg(long)]
    no_prefix: bool,
    /// Seconds between asking the other ranks to end and killing them, once one has failed
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    grace: f64,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<OsString>,
}

fn seconds(text: &str) -> Result<f64, String> {
    let value = text.parse::<f64>().ok().filter(|s| (0.0..=3600.0).contains(s));
    value.ok_or_else(|| format!("{text:?} is not a number of seconds from 0 to 3600"))
}

impl RunArgs {
    pub fn run(self) -> Result<u8> {
        let [program, args @ ..] = self.program.as_slice() else { unreachable!("clap requires a program") };
        let grace = Duration::from_secs_f64(self.grace);
        launch(&Ranks { count: self.n as usize, bind: self.bind, prefix: !self.no_prefix, grace, program, args })
    }
}

/// What to start.
pub struct Ranks<'a> {
    pub count: usize,
    pub bind: bool,
    pub prefix: bool,
    pub grace: Duration,
    pub program: &'a OsStr,
    pub args: &'a [OsString],
}

enum Event {
    Ended(usize, ExitStatus),
    Signal(i32),
}

/// Runs the ranks to their end; gives the exit code of the first that failed, or 0.
pub fn launch(ranks: &Ranks) -> Result<u8> {
    let mut guard = Guard::start()?;
    let (events, inbox) = mpsc::channel();
    pass_signals_on(events.clone())?;
    let mut groups = vec![];
    let mut outputs = vec![];
    for (rank, mut child) in start_all(ranks, &mut guard)?.into_iter().enumerate() {
        groups.push(Pid::from_raw(child.id() as i32));
        outputs.extend(forward_output(&mut child, rank));
        let events = events.clone();
        thread::spawn(move || child.wait().map(|status| events.send(Event::Ended(rank, status))));
    }
    let code = supervise(&groups, &inbox, ranks.grace);
    // A grandchild may hold the pipes open; the ranks' groups are ended first, so that this comes back.
    drop(guard);
    outputs.into_iter().for_each(|o| drop(o.join()));
    code
}

fn start_all(ranks: &Ranks, guard: &mut Guard) -> Result<Vec<Child>> {
    let job: String = rand::random::<[u8; 16]>().iter().map(|byte| format!("{byte:02x}")).collect();
    let own_cores = sched_getaffinity(Pid::from_raw(0)).context("reading the usable cores")?;
    let cores: Vec<usize> = (0..CpuSet::count()).filter(|&c| own_cores.is_set(c).unwrap_or(false)).collect();
    let mut children: Vec<Child> = vec![];
    for rank in 0..ranks.count {
        let count = ranks.count.to_string();
        let mut command = Command::new(ranks.program);
        command
            .args(ranks.args)
            .env("XCCL_RANK", rank.to_string())
            .env("XCCL_WORLD_SIZE", &count)
            .env("XCCL_LOCAL_RANK", rank.to_string())
            .env("XCCL_LOCAL_WORLD_SIZE", &count)
            .env("XCCL_JOB", &job)
            .process_group(0);
        if rank > 0 {
            command.stdin(Stdio::null());
        }
        if ranks.prefix {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        if ranks.bind {
            // A child inherits the mask of the thread that starts it.
            let mut one = CpuSet::new();
            one.set(cores[rank % cores.len()]).context("choosing a core")?;
            sched_setaffinity(Pid::from_raw(0), &one).context("binding a rank to a core")?;
        }
        let started = command.spawn();
        if ranks.bind {
            sched_setaffinity(Pid::from_raw(0), &own_cores).context("taking the cores back")?;
        }
        // The ranks that were started before are ended by the guard, which reads the end of its input.
        let child = started.with_context(|| {
            format!("cannot start {:?}: check the name, the path and that it is executable", ranks.program)
        })?;
        guard.add(child.id())?;
        children.push(child);
    }
    Ok(children)
}

fn pass_signals_on(events: mpsc::Sender<Event>) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGCONT]).context("catching signals")?;
    thread::spawn(move || signals.forever().try_for_each(|signal| events.send(Event::Signal(signal))));
    Ok(())
}

fn supervise(groups: &[Pid], inbox: &mpsc::Receiver<Event>, grace: Duration) -> Result<u8> {
    let send = |signal: Signal| {
        groups.iter().for_each(|&g| {
            let _ = killpg(g, signal);
        })
    };
    let mut running = groups.len();
    let mut failed = 0;
    let mut kill_at: Option<Instant> = None;
    while running > 0 {
        let patience = kill_at.map_or(Duration::from_secs(3600), |at| at.saturating_duration_since(Instant::now()));
        match inbox.recv_timeout(patience) {
            Ok(Event::Signal(signal)) => send(Signal::try_from(signal)?),
            Ok(Event::Ended(rank, status)) => {
                running -= 1;
                if !status.success() && kill_at.is_none() {
                    failed = code_of(status);
                    let rest = if running > 0 { format!("; ending the other {running}") } else { String::new() };
                    eprintln!("xccl run: rank {rank} (pid {}) {}{rest}", groups[rank], describe(status));
                    send(Signal::SIGTERM);
                    send(Signal::SIGCONT);
                    kill_at = Some(Instant::now() + grace);
                }
            }
            Err(RecvTimeoutError::Timeout) if kill_at.is_some() => {
                send(Signal::SIGKILL);
                kill_at = Some(Instant::now() + Duration::from_secs(3600));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(failed)
}

fn code_of(status: ExitStatus) -> u8 {
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(1)
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (None, Some(signal)) => {
            let name = Signal::try_from(signal).map_or("unknown", Signal::as_str);
            format!("was killed by signal {signal} ({name})")
        }
        (None, None) => "ended".to_owned(),
    }
}

/// Starts a thread for each captured stream of a rank.
fn forward_output(child: &mut Child, rank: usize) -> Vec<JoinHandle<()>> {
    let stdout = child.stdout.take().map(|from| thread::spawn(move || prefix_lines(from, rank, std::io::stdout)));
    let stderr = child.stderr.take().map(|from| thread::spawn(move || prefix_lines(from, rank, std::io::stderr)));
    stdout.into_iter().chain(stderr).collect()
}

/// Longer lines are passed on in pieces of this many bytes.
const LONGEST_LINE: u64 = 64 << 10;

fn prefix_lines<W: Write>(from: impl Read, rank: usize, to: impl Fn() -> W) {
    let mut from = BufReader::new(from);
    loop {
        let mut line = format!("[{rank}] ").into_bytes();
        match from.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        // One write, under the stream's lock: lines of different ranks never mix. A closed stream is nobody's loss.
        let _ = to().write_all(&line);
    }
}
