//! Standard input, which rank 0 gets.

use std::io::{self, IsTerminal, Read, Write};
use std::process::{ChildStdin, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

/// What `rank` has for its standard input.
///
/// A terminal stops (SIGTTIN) a process of another group than the one in its foreground, and that is the launcher's. So the
/// launcher reads a terminal and rank 0 a pipe. Files and pipes are handed on as they are.
pub fn of_rank(rank: usize) -> Stdio {
    match rank {
        0 if io::stdin().is_terminal() => Stdio::piped(),
        0 => Stdio::inherit(),
        _ => Stdio::null(),
    }
}

/// Passes the terminal's input on to rank 0.
pub fn forward(to: ChildStdin) -> Result<()> {
    // The thread is left to itself: it ends with the process, as nothing else ends its read.
    thread::Builder::new().name("stdin".to_owned()).spawn(move || pump(to)).context("starting a thread")?;
    Ok(())
}

fn pump(mut to: ChildStdin) {
    // A launcher in the background gets an error instead of being stopped, and asks again.
    let ttin: SigSet = [Signal::SIGTTIN].into_iter().collect();
    if ttin.thread_block().is_err() {
        return;
    }
    let mut bytes = [0; 4096];
    loop {
        match io::stdin().lock().read(&mut bytes) {
            Ok(0) => return,
            Ok(n) if to.write_all(&bytes[..n]).is_err() => return,
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => thread::sleep(Duration::from_millis(200)),
        }
    }
}
