//! `xccl status`.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use xccl::MachineSnapshot;

use crate::say::say;

/// Show what the jobs of this machine do, and why they do not go on
///
/// Reads what ranks show of themselves: those of this user, or of all for root, in this pid namespace. It asks nothing of them, and they do
/// not notice. Ranks that are still joining are not seen.
#[derive(Args)]
pub struct StatusArgs {
    /// Look again every so many seconds, until interrupted
    #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1")]
    watch: Option<f64>,
    /// One line of JSON per look
    #[arg(long)]
    json: bool,
    /// Show the last so many operations of each rank
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "8", default_value_t = 0)]
    history: usize,
}

impl StatusArgs {
    pub fn run(self) -> Result<()> {
        let Some(seconds) = self.watch else { return self.look() };
        let pause = Duration::try_from_secs_f64(seconds.max(0.1))?;
        loop {
            if !self.json && std::io::stdout().is_terminal() {
                // To the upper left corner, and clear what is below.
                print!("\x1b[H\x1b[J");
                let _ = std::io::stdout().flush();
            }
            self.look()?;
            std::thread::sleep(pause);
        }
    }

    fn look(&self) -> Result<()> {
        let seen = MachineSnapshot::take()?;
        if self.json {
            say!("{}", serde_json::to_string(&seen)?);
            return Ok(());
        }
        say!("{}", seen.to_string().trim_end());
        if self.history > 0 {
            print_history(&seen, self.history);
        }
        Ok(())
    }
}

fn print_history(seen: &MachineSnapshot, records: usize) {
    for comm in seen.jobs.iter().flat_map(|job| &job.communicators) {
        for rank in comm.ranks.iter().filter(|rank| !rank.history.is_empty()) {
            say!("\nhistory of rank {} of {:08x}", rank.rank, comm.id >> 32);
            let skipped = rank.history.len().saturating_sub(records);
            rank.history[skipped..].iter().for_each(|record| say!("  {record}"));
        }
    }
}
