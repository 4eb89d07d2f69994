//! A tiny process that outlives a killed launcher just long enough to end its ranks.
//!
//! The launcher alone holds the writing end of the guard's standard input, and tells it each rank's process group. However
//! the launcher ends, the guard reads the end of its input and kills what is left of those groups, grandchildren included.

use std::io::{BufRead, Write, stdin};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

pub const SUBCOMMAND: &str = "__guard";

/// The launcher's end.
pub struct Guard(Child);

impl Guard {
    pub fn start() -> Result<Self> {
        let exe = std::env::current_exe().context("finding this program")?;
        let mut command = Command::new(exe);
        command.arg(SUBCOMMAND).stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
        Ok(Guard(command.spawn().context("starting the guard process")?))
    }

    /// Puts a rank's process group under guard.
    pub fn add(&mut self, group: u32) -> Result<()> {
        let pipe = self.0.stdin.as_mut().context("the guard's pipe is open until the end")?;
        writeln!(pipe, "{group}").context("telling the guard process of a rank")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // It ends by itself once its input does.
        let _ = self.0.wait();
    }
}

/// The guard's end.
pub fn watch() -> Result<()> {
    let groups: Vec<i32> = stdin().lock().lines().map_while(Result::ok).filter_map(|l| l.parse().ok()).collect();
    for group in groups {
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    Ok(())
}
