//! Snapshots in words.

use std::fmt;

use super::diagnosis::short;
use super::process::ProcessState;
use super::snapshot::{CommSnapshot, HistoryRecord, RankSnapshot, Standing, WaitSnapshot};
use crate::p2p::engine::INTERNAL_TAG;
use crate::sync::Operation;

/// A time as a reader wants it: two or three digits.
pub(super) fn duration(ns: u64) -> String {
    let ns = ns as f64;
    match ns {
        ns if ns < 1e3 => format!("{ns} ns"),
        ns if ns < 1e6 => format!("{:.1} us", ns / 1e3),
        ns if ns < 1e9 => format!("{:.1} ms", ns / 1e6),
        ns if ns < 600e9 => format!("{:.1} s", ns / 1e9),
        ns => format!("{:.0} min", ns / 60e9),
    }
}

/// An operation with its number or tag.
pub(super) fn phrase(operation: Operation, epoch: u64) -> String {
    match operation {
        Operation::Send | Operation::Recv if epoch >= INTERNAL_TAG => format!("{operation} (one of the library's own)"),
        Operation::Send | Operation::Recv => format!("{operation} tag {epoch}"),
        Operation::SignalWait => format!("{operation} at offset {epoch}"),
        _ if epoch == 0 => operation.to_string(),
        _ => format!("{operation} {epoch}"),
    }
}

/// Whether a wait that names no rank is one for all others, not for anyone.
pub(super) fn is_for_all(wait: &WaitSnapshot) -> bool {
    wait.operation == Operation::Setup
}

/// Who is waited for.
pub(super) fn whom(wait: &WaitSnapshot, name: impl Fn(usize) -> String) -> String {
    match wait.peer {
        Some(peer) => name(peer),
        None if is_for_all(wait) => "all others".to_owned(),
        None => "anyone".to_owned(),
    }
}

fn bytes(bytes: u64) -> String {
    match bytes as f64 {
        b if b < 1e4 => format!("{bytes} B"),
        b if b < 1e7 => format!("{:.0} kB", b / 1e3),
        b if b < 1e10 => format!("{:.0} MB", b / 1e6),
        b => format!("{:.0} GB", b / 1e9),
    }
}

impl RankSnapshot {
    /// What it is doing, in a few words.
    pub fn doing(&self) -> String {
        match self.standing {
            Standing::Aborted => return "has aborted".to_owned(),
            Standing::Left => return "has left".to_owned(),
            Standing::Unknown => {
                let node = self.node.map(|node| format!("on node {node}, ")).unwrap_or_default();
                let remark = self.remark.as_deref().unwrap_or("not seen from here");
                return format!("{node}{remark}");
            }
            Standing::Active => {}
        }
        if let Some(wait) = self.waits.iter().max_by_key(|wait| wait.for_ns) {
            let who = whom(wait, |peer| format!("rank {peer}"));
            let more = self.waits.len() - 1;
            let more = if more > 0 { format!(" (and {more} more threads wait)") } else { String::new() };
            return format!("waits for {who} in {}{more}", phrase(wait.operation, wait.epoch));
        }
        let does = match self.process {
            ProcessState::Stopped | ProcessState::Traced => "nothing",
            ProcessState::Dead => "died",
            _ => "computes",
        };
        match (self.call(), self.history.last()) {
            (Some(call), _) => format!("in {}", call.phrase()),
            (None, Some(last)) => format!("{does}, after {}", last.phrase()),
            (None, None) => does.to_owned(),
        }
    }

    /// What it was last seen doing, for who has waited for it in vain.
    pub(crate) fn last_seen(&self) -> String {
        let alive = match self.process {
            ProcessState::Stopped => "is alive (stopped by a signal, as by SIGSTOP) and ",
            ProcessState::Traced => "is alive (held by a debugger) and ",
            ProcessState::Dead => "has died; it ",
            _ => "",
        };
        let ago = self.since().map(|ns| format!(" for {}", duration(ns))).unwrap_or_default();
        let doing = match self.standing {
            Standing::Unknown => {
                let node = self.node.map(|node| format!("on another node (node {node}), ")).unwrap_or_default();
                return format!("is {node}{}", self.remark.as_deref().unwrap_or("not seen from here"));
            }
            Standing::Aborted | Standing::Left => return self.doing(),
            Standing::Active => match (self.waits.first(), self.call(), self.history.last()) {
                (Some(wait), ..) => {
                    let who = whom(wait, |peer| format!("rank {peer}"));
                    format!("waiting in {} for {who}", phrase(wait.operation, wait.epoch))
                }
                (None, Some(call), _) => format!("in {}", call.phrase()),
                (None, None, Some(last)) => format!("in {}, after {}", Operation::Computing, last.phrase()),
                (None, None, None) => format!("in {}", Operation::Computing),
            },
        };
        match self.process {
            ProcessState::Stopped | ProcessState::Traced => {
                format!("{alive}has not moved{ago}: it was last seen {doing}")
            }
            _ => format!("{alive}was last seen {doing},{ago}"),
        }
    }

    /// For how long it has been doing that.
    fn since(&self) -> Option<u64> {
        self.waits.iter().map(|wait| wait.for_ns).max().or(self.quiet_ns)
    }

    /// Whom it has waited for most.
    fn most(&self) -> Option<(usize, u64)> {
        let most = self.waited_ns.iter().copied().enumerate().max_by_key(|&(peer, ns)| (ns, std::cmp::Reverse(peer)));
        most.filter(|&(_, ns)| ns > 0)
    }
}

impl HistoryRecord {
    /// The operation with its number or tag, and what a collective asked for.
    fn phrase(&self) -> String {
        match &self.asked {
            Some(asked) => format!("{} {}", asked, self.epoch),
            None => phrase(self.operation, self.epoch),
        }
    }
}

impl fmt::Display for HistoryRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{} ", self.number)?;
        if self.is_wait {
            f.write_str("waited for ")?;
            match self.peer {
                Some(peer) => write!(f, "rank {peer} in ")?,
                None => f.write_str("anyone in ")?,
            }
        }
        write!(f, "{}, {} ago", self.phrase(), duration(self.began_ns_ago))?;
        match self.took_ns {
            None => f.write_str(", not over"),
            Some(0) if !self.is_wait && !self.failed => f.write_str(", took less than a tick"),
            Some(took) => {
                let ended = if self.failed { "failed after" } else { "took" };
                write!(f, ", {ended} {}", duration(took))
            }
        }
    }
}

/// What the table has of a rank.
const COLUMNS: [&str; 10] =
    ["rank", "process", "state", "does", "for", "sent", "received", "exchanges", "waited", "most for"];
/// Those that are words; the others are numbers, and stand at the right.
const WORDS: [usize; 3] = [2, 3, 9];

impl RankSnapshot {
    fn row(&self) -> [String; COLUMNS.len()] {
        let s = self.statistics.unwrap_or_default();
        // What a broken rank shows may be any number.
        let waited = self.waited_ns.iter().fold(self.waited_for_anyone_ns, |sum, ns| sum.saturating_add(*ns));
        let most = self.most().map(|(peer, ns)| format!("rank {peer} ({})", duration(ns)));
        let seen = |text: String| if self.standing == Standing::Unknown { "-".to_owned() } else { text };
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        [
            self.rank.to_string(),
            or_none(self.pid.map(|pid| pid.to_string())),
            self.process.to_string(),
            self.doing(),
            or_none(self.since().map(duration)),
            seen(bytes(s.bytes_sent)),
            seen(bytes(s.bytes_received)),
            seen(s.exchanges.to_string()),
            seen(duration(waited)),
            or_none(most),
        ]
    }
}

impl fmt::Display for CommSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "communicator {}, {} ranks, {} old", short(self.id), self.ranks.len(), duration(self.age_ns))?;
        let rows: Vec<_> =
            std::iter::once(COLUMNS.map(str::to_owned)).chain(self.ranks.iter().map(RankSnapshot::row)).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; COLUMNS.len()] = std::array::from_fn(width);
        for row in &rows {
            let mut line = String::new();
            for (column, (text, width)) in row.iter().zip(widths).enumerate() {
                line += &match WORDS.contains(&column) {
                    true => format!("  {text:<width$}"),
                    false => format!("  {text:>width$}"),
                };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}
