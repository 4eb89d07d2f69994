//! What this machine has to offer.

use std::fs;
use std::os::linux::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use super::cgroup::Groups;
use crate::sync::cores::Cores;

/// Bytes that can still be allocated here: what the kernel calls available, or what the control group leaves, whichever
/// is less. `None` where neither can be read.
pub(crate) fn available_memory() -> Option<u64> {
    let free = meminfo_available();
    let group = in_own_group(|groups| groups.available_memory());
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

fn in_own_group<T>(ask: impl FnOnce(Groups<'_>) -> Option<T>) -> Option<T> {
    let listing = fs::read_to_string("/proc/self/cgroup").ok()?;
    ask(Groups { listing: &listing, root: Path::new("/sys/fs/cgroup") })
}

/// A text that the processes of one machine share, whatever parts them into nodes.
pub(crate) fn identity() -> String {
    // The number of the first of its kind, which the kernel has fixed: in another one the name is a container's own.
    const FIRST_NAMES: u64 = 0xeffffffe;
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let has_its_name = fs::metadata("/proc/self/ns/uts").is_ok_and(|names| names.st_ino() == FIRST_NAMES);
    // Hosts that were started from one snapshot share their boot id.
    let name = if has_its_name { read("/proc/sys/kernel/hostname") } else { String::new() };
    format!("{} {name}", read("/proc/sys/kernel/random/boot_id"))
}

/// The cores that this process may run on, and the share of their time that it has.
pub(crate) fn cores() -> Cores {
    let own = sched_getaffinity(Pid::from_raw(0));
    // On machines with more cores than a mask of the usual size has. Asking takes many system calls.
    let fallback = own.as_ref().map_or_else(|_| std::thread::available_parallelism().map_or(1, |n| n.get()), |_| 0);
    let is_usable = |core: &usize| own.as_ref().map_or_else(|_| *core < fallback, |set| set.is_set(*core) == Ok(true));
    let mut mask = vec![0u64; CpuSet::count().div_ceil(64)];
    (0..CpuSet::count()).filter(is_usable).for_each(|core| mask[core / 64] |= 1 << (core % 64));
    while mask.last() == Some(&0) {
        mask.pop();
    }
    let quota = in_own_group(|groups| groups.quota()).map(|quota| {
        // The same path may be another group where the kernel shows each container its own tree.
        let namespace = fs::read_link("/proc/self/ns/cgroup").unwrap_or_default();
        (format!("{} {}", namespace.display(), quota.group.display()), quota.cores)
    });
    Cores { mask, quota }
}
