//! What this machine has to offer.

use std::fs;

/// Bytes that can still be allocated here: what the kernel calls available, or what the control group leaves, whichever
/// is less. `None` where neither can be read.
pub(crate) fn available_memory() -> Option<u64> {
    let free = meminfo_available();
    let group = cgroup_available();
    match (free, group) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn meminfo_available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The tightest limit on the way from this process's control group (version 2) to the root.
fn cgroup_available() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|l| l.strip_prefix("0::"))?;
    let mut dir = std::path::PathBuf::from("/sys/fs/cgroup").join(path.trim_start_matches('/'));
    let mut least: Option<u64> = None;
    while dir.starts_with("/sys/fs/cgroup") {
        let read = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
        if let (Some(max), Some(current)) = (read("memory.max"), read("memory.current")) {
            let left = max.saturating_sub(current);
            least = Some(least.map_or(left, |l| l.min(left)));
        }
        if !dir.pop() {
            break;
        }
    }
    least
}

/// Cores that this process may use: the affinity mask and the control group's quota, not just the number of cores.
pub(crate) fn usable_cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}
