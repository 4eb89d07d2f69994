//! What the machine is, as a table's heading says it.

use std::fs;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::bench::figures;

/// Processor, usable cores, kernel.
pub fn describe() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    format!("{}, {cores} usable cores, Linux {}", processor(&cpuinfo), kernel.trim())
}

/// A line handover between the first two usable cores, which are those that ranks 0 and 1 are bound to.
pub fn line_ns() -> Option<f64> {
    let this_thread = Pid::from_raw(0);
    let all = sched_getaffinity(this_thread).ok()?;
    let mut two = CpuSet::new();
    let usable = (0..CpuSet::count()).filter(|&core| all.is_set(core) == Ok(true));
    usable.take(2).for_each(|core| {
        let _ = two.set(core); // It is in a set of the same size.
    });
    sched_setaffinity(this_thread, &two).ok()?;
    let line = figures::line_ns();
    // It was this thread's before.
    let _ = sched_setaffinity(this_thread, &all);
    line
}

fn processor(cpuinfo: &str) -> String {
    let model = cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split_once(':'));
    // ARM kernels give no name.
    model.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_named_where_the_kernel_names_it() {
        assert_eq!(processor("processor\t: 0\nmodel name\t: AMD EPYC\nmodel name\t: other\n"), "AMD EPYC");
        assert_eq!(processor("CPU implementer\t: 0x41\n"), std::env::consts::ARCH);
    }
}
