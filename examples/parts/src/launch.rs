//! Starts the ranks when nobody else has: this program again, once per rank, with the environment that `xccl run` would set.

use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::{ExitStatusExt, parent_id};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use xccl::{Communicator, Config, Error};

/// Marks a process as a rank; one that is a rank never starts others.
const RANK: &str = "XCCL_RANK";
/// Tells a rank the process that it must not outlive.
const LAUNCHER: &str = "EXAMPLE_LAUNCHER";
/// Once a rank has failed, the others have so long to say what that means for them.
const GRACE: Duration = Duration::from_secs(5);

/// The communicator of all ranks, in a process that is one; `None` in the first process, which has to [`start`] them.
pub fn join(config: Config) -> Result<Option<Communicator>> {
    end_with_launcher()?;
    match Communicator::from_env_with(config) {
        Ok(comm) => Ok(Some(comm)),
        Err(Error::NotLaunched { .. }) if env::var_os(RANK).is_none() => Ok(None),
        Err(error) => Err(error).context("joining the other ranks"),
    }
}

/// The end of a process of the example `name`. What went wrong is written at once: another rank's message may not get into it.
pub fn end(name: &str, result: Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    // Nobody may be there to read it.
    let _ = io::stderr().write_all(format!("{name}: {error:#}\n").as_bytes());
    ExitCode::FAILURE
}

/// From now on the kernel ends this process with the one that has started it, if that was [`start`].
fn end_with_launcher() -> Result<()> {
    let Ok(launcher) = env::var(LAUNCHER) else { return Ok(()) };
    set_pdeathsig(Signal::SIGKILL).context("asking to be ended with the launcher")?;
    // One that has died before this line is not told of any more.
    ensure!(parent_id().to_string() == launcher, "the process that has started this rank is gone");
    Ok(())
}

/// The ranks that run; those that still do when it is dropped are ended.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // Either fails only for a process that has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts `ranks` ranks, as if they were on `nodes` nodes, and waits for them. Once one has failed, the others are ended unless they
/// end soon by themselves.
pub fn start(ranks: usize, nodes: usize) -> Result<()> {
    ensure!((1..=ranks).contains(&nodes), "--nodes is {nodes}: {ranks} ranks live on 1 to {ranks} nodes");
    let program = env::current_exe().context("finding this program's own file")?;
    let mut command = Command::new(program);
    command.args(env::args_os().skip(1)).stdin(Stdio::null());
    command.env("XCCL_JOB", job_id()?).env("XCCL_WORLD_SIZE", ranks.to_string());
    command.env(LAUNCHER, std::process::id().to_string());
    if nodes > 1 {
        let port = free_port().context("finding a port for ranks of several nodes")?;
        command.env("XCCL_MASTER_ADDR", Ipv4Addr::LOCALHOST.to_string()).env("XCCL_MASTER_PORT", port.to_string());
    }
    // Ranks of a node follow each other.
    let node_of = |rank: usize| rank * nodes / ranks;
    let mut running = Ranks(vec![]);
    for rank in 0..ranks {
        let node = node_of(rank);
        let of_node: Vec<usize> = (0..ranks).filter(|&other| node_of(other) == node).collect();
        command.env(RANK, rank.to_string());
        command.env("XCCL_LOCAL_RANK", (rank - of_node[0]).to_string());
        command.env("XCCL_LOCAL_WORLD_SIZE", of_node.len().to_string());
        if nodes > 1 {
            command.env("XCCL_NODE_ID", node.to_string());
        }
        running.0.push(command.spawn().with_context(|| format!("starting rank {rank} of {ranks}"))?);
    }
    watch(&mut running)
}

/// Waits until all have ended, or until the grace after the first failure is over.
fn watch(running: &mut Ranks) -> Result<()> {
    let mut failure: Option<(usize, ExitStatus)> = None;
    let mut end = None;
    while end.is_none_or(|end| Instant::now() <= end) {
        let mut done = true;
        for (rank, child) in running.0.iter_mut().enumerate() {
            match child.try_wait().with_context(|| format!("waiting for rank {rank}"))? {
                None => done = false,
                Some(status) if status.success() => {}
                Some(status) => {
                    end.get_or_insert(Instant::now() + GRACE);
                    // Of those that have ended meanwhile, one that was killed is more likely to be the cause.
                    match &failure {
                        Some((_, known)) if known.signal().is_some() || status.signal().is_none() => {}
                        _ => failure = Some((rank, status)),
                    }
                }
            }
        }
        if done {
            break;
        }
        sleep(Duration::from_millis(5));
    }
    match failure {
        None => Ok(()),
        Some((rank, status)) if status.signal().is_some() => bail!("rank {rank} was ended ({status})"),
        Some((rank, status)) => bail!("rank {rank} failed ({status}): its message stands above"),
    }
}

/// Random, because whoever knows the job's id may join it.
fn job_id() -> Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).context("reading /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A port that nobody has at this moment. Should another process take it before rank 0 does, rank 0 says so.
fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
