//! Starts the ranks' processes.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid, getppid};

use super::guard::{self, Guard};
use super::hosts::Hosts;
use super::output::Output;
use super::signals::Signals;
use super::{RunOptions, stdin};

/// Starts all ranks into `ranks`, which has those that were started also after an error.
pub fn start(
    options: &RunOptions,
    launch: &str,
    hosts: &Hosts,
    guard: &Guard,
    signals: &Signals,
    output: &mut Output,
    ranks: &mut Vec<Child>,
) -> Result<()> {
    let cores = if options.bind { usable_cores()? } else { vec![] };
    let open_files = allow_open_files(options)?;
    let first = options.nodes.first_rank(options.ranks);
    for index in 0..options.ranks {
        let rank = first + index;
        let mut command = command(options, launch, rank);
        hosts.tell(&mut command, index, options.ranks);
        let core = cores.get(index % cores.len().max(1)).copied();
        let (launcher, mask, pipe) = (getpid(), signals.before(), guard.pipe());
        let before_exec = move || {
            set_pdeathsig(Signal::SIGKILL)?;
            // A launcher that died before this line sends no signal any more.
            if getppid() != launcher {
                return Err(Errno::ESRCH.into());
            }
            guard::announce(pipe)?;
            setrlimit(Resource::RLIMIT_NOFILE, open_files.0, open_files.1)?;
            if let Some(core) = core {
                sched_setaffinity(Pid::from_raw(0), &core)?;
            }
            Ok(mask.thread_set_mask()?)
        };
        // SAFETY: prctl, getppid, write, setrlimit, sched_setaffinity and pthread_sigmask are bare system calls, which is
        // async-signal-safe; nothing here allocates or locks, errors included (they hold just the number).
        unsafe { command.pre_exec(before_exec) };
        let mut child = command.spawn().map_err(|error| CannotStart::new(&options.program, rank, error))?;
        let streams = output.add(rank, &mut child);
        let input = child.stdin.take();
        ranks.push(child);
        streams?;
        input.map_or(Ok(()), stdin::forward)?;
    }
    Ok(())
}

fn command(options: &RunOptions, launch: &str, rank: usize) -> Command {
    let mut command = Command::new(&options.program);
    command
        .args(&options.args)
        .envs(options.env.iter().map(|(name, value)| (name, value)))
        .env(guard::MARK, launch)
        .process_group(0)
        .stdin(stdin::of_rank(rank));
    if options.prefix {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    command
}

/// The cores of the launcher's affinity mask, as masks of one core each.
fn usable_cores() -> Result<Vec<CpuSet>> {
    let all = sched_getaffinity(Pid::from_raw(0)).context("reading the usable cores")?;
    let usable = (0..CpuSet::count()).filter(|&core| all.is_set(core) == Ok(true));
    let one = |core| {
        let mut set = CpuSet::new();
        set.set(core).map(|()| set)
    };
    usable.map(one).collect::<nix::Result<_>>().context("choosing cores")
}

/// Two pipes per rank may be more than a process is allowed by default. Gives the limits that ranks start with.
fn allow_open_files(options: &RunOptions) -> Result<(rlim_t, rlim_t)> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("reading the limit on open files")?;
    let needed = if options.prefix { 2 * options.ranks as rlim_t + 64 } else { 64 };
    if needed > soft {
        ensure!(
            needed <= hard,
            "passing on the output of {} ranks needs {needed} open files, the limit is {hard}: raise it (ulimit -n \
             {needed}), start fewer ranks, or use --no-prefix",
            options.ranks
        );
        setrlimit(Resource::RLIMIT_NOFILE, needed, hard).context("raising the limit on open files")?;
    }
    Ok((soft, hard))
}

/// The ranks' program does not start.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {program:?} as rank {rank}: {error}; {advice}")]
pub struct CannotStart {
    program: OsString,
    rank: usize,
    error: io::Error,
    advice: String,
}

impl CannotStart {
    fn new(program: &OsStr, rank: usize, error: io::Error) -> Self {
        let advice = advice(program, &error);
        CannotStart { program: program.to_owned(), rank, error, advice }
    }

    /// As shells have it: 127 for what is not found, 126 for what is found and cannot be run.
    pub fn exit_code(&self) -> u8 {
        if self.error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }
    }
}

fn advice(program: &OsStr, error: &io::Error) -> String {
    let path = Path::new(program);
    let is_path = program.as_encoded_bytes().contains(&b'/');
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) if is_path && path.exists() => {
            "the file is there, so what it asks for in its first line (#!) or as its loader is not: install or correct that"
                .to_owned()
        }
        Some(Errno::ENOENT) if is_path => "there is no such file: correct the path, or build the program first".to_owned(),
        Some(Errno::ENOENT) if path.is_file() => {
            format!("it is in the current directory, which is not searched: say ./{}", path.display())
        }
        Some(Errno::ENOENT) => "no directory of PATH has it: correct the name, or give its path".to_owned(),
        Some(Errno::EACCES) if path.is_dir() => "it is a directory: give a program in it".to_owned(),
        Some(Errno::EACCES) => format!("make it executable: chmod +x {}", path.display()),
        Some(Errno::EAGAIN) => "there are too many processes: raise the limit (ulimit -u) or start fewer ranks".to_owned(),
        Some(Errno::ENOMEM) => "memory is short: free some, or start fewer ranks".to_owned(),
        _ => "check the name, the arguments and this process's limits (ulimit -a)".to_owned(),
    }
}
