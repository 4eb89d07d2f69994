//! A rank: a process that plays one case after another, until it is killed in one.

use std::io::{BufRead, Write};

use anyhow::{Context, Result};
use nix::sys::signal::{SigEvent, SigevNotify, Signal};
use nix::sys::time::TimeSpec;
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use xccl::{Error, UniqueId};

use crate::case::{Blow, Kind};
use crate::leaks::{self, Held};
use crate::wire::{Outcome, Report, Task, now_ns};
use crate::works::{self, Fault, Player};

/// Takes tasks from standard input until there are no more.
pub fn run() -> Result<()> {
    let mut before = Held::now();
    let mut was_far = false;
    for line in std::io::stdin().lock().lines() {
        let task: Task = serde_json::from_str(&line?)?;
        let far = task.case.is_far();
        let (outcome, at_ns, during) = play(&task);
        // The network's library keeps a few things for ever, from its first use on.
        let leaks = match far && !was_far {
            true => vec![],
            false => Held::more_than(&before),
        };
        if far && !was_far {
            (before, was_far) = (settled(), true);
        }
        let report = Report { outcome, at_ns, during, leaks, vm_kib: leaks::vm_kib() };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        out.flush()?;
    }
    Ok(())
}

/// What is held once nothing is being closed any more.
fn settled() -> Held {
    let mut last = Held::now();
    for _ in 0..40 {
        std::thread::sleep(std::time::Duration::from_millis(5));
        let now = Held::now();
        if now == last {
            break;
        }
        last = now;
    }
    last
}

fn play(task: &Task) -> (Outcome, u64, String) {
    let Task { case, rank, id } = task;
    // SAFETY: no other thread of this process is there between two cases.
    unsafe { std::env::set_var("XCCL_NODE_ID", format!("node {}", case.nodes[*rank])) };
    let blows: Vec<Blow> = case.blows.iter().filter(|blow| blow.rank == *rank).copied().collect();
    let mut armed = Armed { blows, timers: vec![] };
    let mut during = "joining".to_owned();
    let mut known = 0;
    let outcome = (|| -> Result<(), Fault> {
        let id: [u8; 128] = id.as_slice().try_into().ok().context("an id has 128 bytes")?;
        let id = UniqueId::from_bytes(&id).context("an id")?;
        armed.begin(0)?;
        let mut player = Player::join(case, *rank, &id)?;
        for round in 1..=case.rounds {
            let work = works::of_round(case, round);
            during = format!("round {round}: {}", work.name());
            armed.begin(round)?;
            if let Err(fault) = player.play(work, round) {
                known = now_ns();
                if let Fault::Told { .. } = &fault {
                    // Whatever is called afterwards says the same.
                    player.says_so_again(&fault)?;
                }
                return Err(fault);
            }
        }
        during = "leaving".to_owned();
        Ok(())
    })();
    let at_ns = if known == 0 { now_ns() } else { known };
    let outcome = match outcome {
        Ok(()) => Outcome::Done,
        Err(Fault::Told { err, text, .. }) if matches!(*err, Error::CannotListen { .. }) => Outcome::Void(text),
        Err(Fault::Told { blamed, err, text }) if !blamed.is_empty() => {
            Outcome::Told { blamed, kind: works::kind_of(&err), text }
        }
        Err(Fault::Told { text, .. }) => Outcome::Wrong(text),
        Err(Fault::Wrong(why)) => Outcome::Wrong(why),
    };
    (outcome, at_ns, during)
}

/// The blows that are to come, and the timers of those that are on their way.
struct Armed {
    blows: Vec<Blow>,
    timers: Vec<Timer>,
}

impl Armed {
    /// Winds up the timers of a round.
    fn begin(&mut self, round: u32) -> Result<()> {
        for blow in self.blows.iter().filter(|blow| blow.round == round) {
            let signal = if blow.kind == Kind::Kill { Signal::SIGKILL } else { Signal::SIGSTOP };
            let notify = SigevNotify::SigevSignal { signal, si_value: 0 };
            let mut timer = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(notify)).context("timer_create")?;
            let after = TimeSpec::new((blow.after_ns / 1_000_000_000) as i64, (blow.after_ns % 1_000_000_000) as i64);
            timer.set(Expiration::OneShot(after), TimerSetTimeFlags::empty()).context("timer_settime")?;
            self.timers.push(timer);
        }
        Ok(())
    }
}
