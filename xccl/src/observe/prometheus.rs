//! What ranks have counted, in Prometheus' text format.

use std::fmt::{self, Write};

use super::RankSnapshot;
use crate::comm::{Communicator, Statistics};

/// A counter of [`Statistics`].
type Counter = (&'static str, &'static str, fn(&Statistics) -> u64);

const COUNTERS: [Counter; 16] = [
    ("messages_sent", "Messages sent.", |s| s.messages_sent),
    ("sent_bytes", "Bytes of messages sent.", |s| s.bytes_sent),
    ("messages_received", "Messages received.", |s| s.messages_received),
    ("received_bytes", "Bytes of messages received.", |s| s.bytes_received),
    ("rendezvous", "Messages that the receiver copied from where they lay.", |s| s.rendezvous),
    ("exchanges", "MoE exchanges finished.", |s| s.exchanges),
    ("tokens", "Tokens dispatched.", |s| s.tokens),
    ("far_rows", "Token rows put to other nodes.", |s| s.far_rows),
    ("far_sums", "Sums put back to other nodes.", |s| s.far_sums),
    ("far_puts", "Data puts to other nodes.", |s| s.far_puts),
    ("far_bytes", "Bytes of data puts to other nodes.", |s| s.far_bytes),
    ("far_records", "Records put to other nodes.", |s| s.far_records),
    ("waits", "Waits that were not over at once.", |s| s.waits),
    ("waits_yielded", "Waits that gave the core away.", |s| s.waits_yielded),
    ("waits_slept", "Waits that went to sleep.", |s| s.waits_slept),
    ("wake_ups", "Sleeping ranks that were woken.", |s| s.wake_ups),
];

/// What the ranks of this process have counted in `comms`, how long each has waited for which rank, and what it sees of the
/// others, in Prometheus' text format (version 0.0.4): for an engine to add to what it serves. Never blocks.
///
/// ```
/// # use xccl::{Communicator, Config, UniqueId};
/// # fn main() -> xccl::Result<()> {
/// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
/// let text = xccl::prometheus_text(&[&comm]);
/// assert!(text.contains("# TYPE xccl_messages_sent_total counter"));
/// # Ok(())
/// # }
/// ```
pub fn prometheus_text(comms: &[&Communicator]) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_all(&mut text, comms);
    text
}

fn write_all(text: &mut String, comms: &[&Communicator]) -> fmt::Result {
    let labels = |comm: &Communicator| format!("communicator=\"{:016x}\",rank=\"{}\"", comm.inner.id, comm.rank());
    let counted: Vec<_> = comms.iter().map(|comm| (labels(comm), comm.statistics())).collect();
    for (name, help, value) in COUNTERS {
        family(text, &format!("{name}_total"), "counter", help)?;
        for (labels, statistics) in &counted {
            writeln!(text, "xccl_{name}_total{{{labels}}} {}", value(statistics))?;
        }
    }
    family(text, "waited_seconds_total", "counter", "Time waited for each rank.")?;
    for (comm, (labels, _)) in comms.iter().zip(&counted) {
        for (peer, ns) in comm.inner.board.wait_times_ever().into_iter().enumerate() {
            writeln!(text, "xccl_waited_seconds_total{{{labels},peer=\"{peer}\"}} {}", ns as f64 / 1e9)?;
        }
    }
    family(text, "rank_state", "gauge", "1 for what a rank is seen to be.")?;
    let seen: Vec<_> = comms.iter().map(|comm| comm.inner.glance()).collect();
    for (seen, (labels, _)) in seen.iter().zip(&counted) {
        for rank in &seen.ranks {
            let RankSnapshot { rank, standing, process, .. } = rank;
            let state = format!("peer=\"{rank}\",standing=\"{standing}\",process=\"{process}\"");
            writeln!(text, "xccl_rank_state{{{labels},{state}}} 1")?;
        }
    }
    family(text, "rank_waiting_seconds", "gauge", "For how long a rank has been waiting now.")?;
    for (seen, (labels, _)) in seen.iter().zip(&counted) {
        for rank in seen.ranks.iter().filter(|rank| rank.pid.is_some()) {
            let ns = rank.waits.iter().map(|wait| wait.for_ns).max().unwrap_or(0);
            writeln!(text, "xccl_rank_waiting_seconds{{{labels},peer=\"{}\"}} {}", rank.rank, ns as f64 / 1e9)?;
        }
    }
    Ok(())
}

fn family(text: &mut String, name: &str, kind: &str, help: &str) -> fmt::Result {
    writeln!(text, "# HELP xccl_{name} {help}\n# TYPE xccl_{name} {kind}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, UniqueId};

    #[test]
    fn every_line_is_of_a_family_that_was_named_before_and_once() {
        let comm = Communicator::init(0, 1, &UniqueId::new().unwrap(), Config::default()).unwrap();
        comm.send(0, 1, b"hello").unwrap();
        let twin = comm.duplicate().unwrap();
        let text = prometheus_text(&[&comm, &twin]);
        let mut families = vec![];
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(!families.contains(&name) && ["counter", "gauge"].contains(&kind), "{line}");
                families.push(name);
            } else if !line.starts_with("# HELP ") {
                let (name, rest) = line.split_once('{').unwrap();
                let (labels, value) = rest.split_once("} ").unwrap();
                assert_eq!(Some(&name), families.last(), "{line}");
                assert!(labels.split(',').all(|label| label.ends_with('"') && label.contains("=\"")), "{line}");
                value.parse::<f64>().unwrap();
            }
        }
        let sent: Vec<_> = text.lines().filter(|line| line.starts_with("xccl_sent_bytes_total{")).collect();
        assert!(sent.len() == 2 && sent[0].ends_with("rank=\"0\"} 5") && sent[1].ends_with(" 0"), "{sent:?}");
        assert!(text.contains("standing=\"active\""), "{text}");
    }
}
