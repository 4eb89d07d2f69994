//! What a process holds: what must be the same before and after a case.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Connections that turn out not to be needed are closed by the provider a little later.
const SOON: Duration = Duration::from_secs(3);

/// Descriptors, shared mappings, threads and children of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held(BTreeMap<String, usize>);

impl Held {
    pub fn now() -> Held {
        let mut held = BTreeMap::new();
        let mut add = |what: String| *held.entry(what).or_insert(0) += 1;
        for entry in std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten() {
            let Ok(target) = std::fs::read_link(entry.path()) else { continue };
            let target = target.to_string_lossy().into_owned();
            // Of sockets and pipes the number says nothing.
            let kind = target.split_once(":[").map_or(target.as_str(), |(kind, _)| kind);
            if !kind.starts_with("/proc/") {
                add(format!("descriptor of {kind}"));
            }
        }
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let shared = maps.lines().filter(|line| line.split_whitespace().nth(1).is_some_and(|r| r.ends_with('s')));
        shared.for_each(|line| add(format!("mapping of {}", line.split_whitespace().nth(5).unwrap_or("nothing"))));
        for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            add("thread".to_owned());
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            children.split_whitespace().for_each(|_| add("child".to_owned()));
        }
        Held(held)
    }

    /// What there is more than before, once it had time to go.
    pub fn more_than(before: &Held) -> Vec<String> {
        let start = Instant::now();
        loop {
            let now = Held::now();
            let had = |what: &str| before.0.get(what).copied().unwrap_or(0);
            let more: Vec<_> = now.0.iter().filter(|(what, n)| **n > had(what)).collect();
            if more.is_empty() || start.elapsed() > SOON {
                return more.into_iter().map(|(what, n)| format!("{} {what}", n - had(what))).collect();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The process's address space.
pub fn vm_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    line.and_then(|text| text.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Names of segments in `/dev/shm` that these processes have made.
pub fn names_of(pids: &[u32]) -> Vec<String> {
    let entries = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let of = |name: &str| name.strip_prefix("xccl-")?.split('-').next()?.parse::<u32>().ok();
    names.filter(|name| of(name).is_some_and(|pid| pids.contains(&pid))).collect()
}
