//! Starts the ranks when nobody else has: this program again, once per rank, with the environment that `xccl run` would set.

use std::env;
use std::fs::File;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Marks a process as a rank; one that is a rank never starts others.
pub const RANK: &str = "XCCL_RANK";

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

/// Starts `ranks` ranks and waits for them. The first that fails ends the others.
pub fn start(ranks: usize) -> Result<()> {
    let program = env::current_exe().context("finding this program's own file")?;
    let job = job_id()?;
    let mut running = Ranks(vec![]);
    for rank in 0..ranks {
        let mut command = Command::new(&program);
        command.args(env::args_os().skip(1)).env("XCCL_JOB", &job).stdin(Stdio::null());
        for (variable, value) in
            [(RANK, rank), ("XCCL_WORLD_SIZE", ranks), ("XCCL_LOCAL_RANK", rank), ("XCCL_LOCAL_WORLD_SIZE", ranks)]
        {
            command.env(variable, value.to_string());
        }
        running.0.push(command.spawn().with_context(|| format!("starting rank {rank} of {ranks}"))?);
    }
    while !all_done(&mut running)? {
        sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn all_done(running: &mut Ranks) -> Result<bool> {
    let mut done = true;
    for (rank, child) in running.0.iter_mut().enumerate() {
        match child.try_wait().with_context(|| format!("waiting for rank {rank}"))? {
            Some(status) if !status.success() => bail!("rank {rank} failed ({status}): its message stands above"),
            Some(_) => {}
            None => done = false,
        }
    }
    Ok(done)
}

/// Random, because whoever knows the job's id may join it.
fn job_id() -> Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).context("reading /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
