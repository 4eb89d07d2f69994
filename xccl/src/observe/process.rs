//! What the kernel says of a process: whether it runs, sleeps, was stopped, and how much processor time it has used.

use std::fmt;
use std::time::Duration;

use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use serde::Serialize;

/// What the kernel says of a rank's process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ProcessState {
    /// It runs, or could.
    Running,
    /// It sleeps.
    Sleeping,
    /// It sleeps in the kernel, and no signal wakes it: a disk, swap or a device keeps it waiting.
    Uninterruptible,
    /// A signal has stopped it, as SIGSTOP or SIGTSTP do: it goes on with SIGCONT.
    Stopped,
    /// A debugger holds it.
    Traced,
    /// It has ended.
    Dead,
    /// It cannot be seen from here: on another host, in another pid namespace, or of another user.
    #[default]
    Unknown,
}

impl fmt::Display for ProcessState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            ProcessState::Running => "running",
            ProcessState::Sleeping => "sleeping",
            ProcessState::Uninterruptible => "in kernel",
            ProcessState::Stopped => "stopped",
            ProcessState::Traced => "traced",
            ProcessState::Dead => "dead",
            ProcessState::Unknown => "unknown",
        })
    }
}

/// One look at a process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Look {
    pub(crate) state: ProcessState,
    /// When it began, in ticks since the machine did: tells it from a later process of the same number.
    pub(crate) started: u64,
    /// Processor time of all its threads.
    pub(crate) used: Option<Duration>,
}

/// Looks at a process; `None` when there is none of that number.
pub(crate) fn look(pid: u32) -> Option<Look> {
    let (state, started) = parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
    let clock = clock_getcpuclockid(Pid::from_raw(pid as i32)).ok();
    let used = clock.and_then(|clock| clock.now().ok()).map(Duration::from);
    Some(Look { state, started, used })
}

/// When this process began; 0 if `/proc` does not say.
pub(crate) fn own_start() -> u64 {
    std::fs::read_to_string("/proc/self/stat").ok().and_then(|text| parse(&text)).map_or(0, |(_, started)| started)
}

/// The state and the start of a process, from its `stat`.
fn parse(stat: &str) -> Option<(ProcessState, u64)> {
    // The name, in parentheses, may contain anything.
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    let state = match fields.next()? {
        "R" => ProcessState::Running,
        "S" | "I" => ProcessState::Sleeping,
        "D" => ProcessState::Uninterruptible,
        "T" => ProcessState::Stopped,
        "t" => ProcessState::Traced,
        "Z" | "X" | "x" => ProcessState::Dead,
        _ => ProcessState::Unknown,
    };
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_seen_as_it_runs_stops_and_ends() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        let state = |expected: ProcessState| {
            // The kernel takes its time to stop it.
            (0..1000).any(|_| {
                std::thread::sleep(Duration::from_millis(2));
                look(child.id()).is_some_and(|look| look.state == expected)
            })
        };
        assert!(state(ProcessState::Sleeping));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        assert!(state(ProcessState::Stopped));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        assert!(state(ProcessState::Dead));
        child.wait().unwrap();
        assert_eq!(look(pid.as_raw() as u32), None);
        let own = look(std::process::id()).unwrap();
        assert!(own.started == own_start() && own.used.is_some_and(|used| !used.is_zero()), "{own:?}");
    }

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let rest = (4..=52).map(|i| i.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(parse(&format!("7 (a) R (b) T {rest}")), Some((ProcessState::Stopped, 22)));
        assert_eq!(parse("7 (a) T 1"), None);
        assert_eq!(parse(""), None);
    }
}
