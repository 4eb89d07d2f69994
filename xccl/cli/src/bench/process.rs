//! What the kernel says of this process: processor time, switches, memory.

use std::fs;

use anyhow::{Context, Result};
use bytemuck::{Pod, Zeroable};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nix::time::{ClockId, clock_gettime};

/// What the process has used up so far.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Usage {
    pub user_us: f64,
    pub system_us: f64,
    /// The process gave its core away: it slept, or yielded.
    pub voluntary_switches: f64,
    /// Its core was taken away.
    pub involuntary_switches: f64,
    pub page_faults: f64,
}

impl Usage {
    pub fn now() -> Result<Self> {
        let usage = getrusage(UsageWho::RUSAGE_SELF).context("reading this process's usage")?;
        let us = |t: TimeVal| t.tv_sec() as f64 * 1e6 + t.tv_usec() as f64;
        Ok(Usage {
            user_us: us(usage.user_time()),
            system_us: us(usage.system_time()),
            voluntary_switches: usage.voluntary_context_switches() as f64,
            involuntary_switches: usage.involuntary_context_switches() as f64,
            page_faults: usage.minor_page_faults() as f64,
        })
    }

    pub fn since(&self, before: &Usage) -> Usage {
        Usage {
            user_us: self.user_us - before.user_us,
            system_us: self.system_us - before.system_us,
            voluntary_switches: self.voluntary_switches - before.voluntary_switches,
            involuntary_switches: self.involuntary_switches - before.involuntary_switches,
            page_faults: self.page_faults - before.page_faults,
        }
    }

    pub fn cpu_us(&self) -> f64 {
        self.user_us + self.system_us
    }
}

/// Memory of the process, in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct Memory {
    /// Pages of its own outboxes that it has touched: those that only it may write. The heap's first page comes to that.
    pub segments: f64,
    /// Its own: heap, stacks, data.
    pub private: f64,
    /// Tables that translate addresses.
    pub page_tables: f64,
    /// Addresses that segments take, its own and its peers'.
    pub mapped: f64,
    pub descriptors: f64,
}

/// The names of segments, made with `memfd_create` or in /dev/shm.
const SEGMENTS: [&str; 2] = ["/memfd:xccl", "/dev/shm/xccl-"];
/// Where `memfd_create` made it, an outbox is told from a heap, which peers may write too.
const OUTBOX: &str = "/memfd:xccl-outbox";

impl Memory {
    pub fn now() -> Result<Self> {
        let smaps = fs::read_to_string("/proc/self/smaps").context("reading this process's mappings")?;
        let status = fs::read_to_string("/proc/self/status").context("reading this process's status")?;
        let mut memory = Memory { page_tables: kib(&status, "VmPTE:").unwrap_or(0.0) * 1024.0, ..Memory::zeroed() };
        let (mut is_segment, mut is_own) = (false, false);
        for line in smaps.lines() {
            match line.split_once(": ") {
                // A mapping's first line: addresses, and at the end what is mapped.
                None => {
                    is_segment = SEGMENTS.iter().any(|name| line.contains(name));
                    is_own = line.contains(OUTBOX) && line.contains(" rw-s ");
                }
                Some(("Size", _)) if is_segment => memory.mapped += kib(line, "Size:").unwrap_or(0.0) * 1024.0,
                Some(("Rss", _)) if is_own => memory.segments += kib(line, "Rss:").unwrap_or(0.0) * 1024.0,
                Some(("Private_Dirty", _)) if !is_segment => {
                    memory.private += kib(line, "Private_Dirty:").unwrap_or(0.0) * 1024.0;
                }
                _ => {}
            }
        }
        memory.descriptors = fs::read_dir("/proc/self/fd").context("counting descriptors")?.count() as f64 - 1.0;
        Ok(memory)
    }
}

/// The number in the line that begins with `name`.
fn kib(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Microseconds that this thread has run.
pub fn thread_cpu_us() -> Result<f64> {
    micros(ClockId::CLOCK_THREAD_CPUTIME_ID)
}

/// Microseconds on the clock that all processes of the machine share.
pub fn clock_us() -> Result<f64> {
    micros(ClockId::CLOCK_MONOTONIC)
}

pub fn micros(clock: ClockId) -> Result<f64> {
    let t = clock_gettime(clock).context("reading a clock")?;
    Ok(t.tv_sec() as f64 * 1e6 + t.tv_nsec() as f64 / 1e3)
}
