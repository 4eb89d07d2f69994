//! All jobs of this machine, seen from outside.
//!
//! A rank keeps a descriptor of its outbox open, and one of the outbox of the next rank of its node, so that what a dead rank has
//! shown stays readable. `/proc/PID/fd` leads to both: for processes of the same user that may be dumped (or for root), in the
//! same pid namespace. That takes the right to *read* a process as a debugger does, which Yama leaves alone. They are read as files, never mapped:
//! a page that was not touched stays so, and nothing that a process does to its segment can harm the reader.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use serde::Serialize;

use super::board::BoardLayout;
use super::diagnosis::{Diagnosis, diagnose};
use super::process::{self, Look, ProcessState};
use super::reading::{BoardCopy, Outbox};
use super::snapshot::{CommSnapshot, RankSnapshot};
use crate::bootstrap::MAX_WORLD_SIZE;
use crate::comm::inner::standing;
use crate::comm::layout::{ABI_VERSION, BYTE_ORDER, Header, MAGIC};
use crate::error::{Error, Result};
use crate::memory::layout::Layout;
use crate::memory::segment;
use crate::sync::progress::now_ns;

/// How long processes are watched, to see what processor time they use.
const WATCHED: Duration = Duration::from_millis(50);
/// Waits that are younger mean nothing yet.
const PATIENCE: Duration = Duration::from_millis(200);

/// What was seen of the jobs of this machine. Its `Display` is what `xccl status` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct MachineSnapshot {
    /// The jobs: processes that share communicators, directly or through others.
    pub jobs: Vec<JobSnapshot>,
    /// Processes of this user whose descriptors may not be read.
    pub unreadable: usize,
    /// Communicators of another version of this library.
    pub other_versions: usize,
}

/// What was seen of one job.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct JobSnapshot {
    /// Its communicators, the oldest first.
    pub communicators: Vec<CommSnapshot>,
    /// What it means.
    pub diagnosis: Diagnosis,
}

/// An outbox that some processes have open.
struct Found {
    file: File,
    header: Header,
    layout: BoardLayout,
    /// Its owner's number here, if the owner is among those.
    owner: Option<u32>,
}

/// What a scan has found.
#[derive(Default)]
struct Scan {
    /// By device and inode.
    outboxes: BTreeMap<(u64, u64), Found>,
    unreadable: usize,
    other_versions: usize,
}

impl MachineSnapshot {
    /// Looks at the processes of this machine, those of this user (of all, if that is root). Reads only, and asks nothing of
    /// them. Blocks for some 50 ms.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, MachineSnapshot, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let seen = MachineSnapshot::take()?;
    /// let own = |job: &&xccl::JobSnapshot| {
    ///     job.communicators.iter().any(|comm| comm.ranks[0].pid == Some(std::process::id()))
    /// };
    /// assert!(seen.jobs.iter().any(|job| own(&job)));
    /// # comm.destroy();
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Os`] where `/proc` cannot be read.
    pub fn take() -> Result<Self> {
        let scan = Scan::run()?;
        let looked = Instant::now();
        let owners = scan.outboxes.values().filter_map(|found| found.owner);
        let before: BTreeMap<u32, Look> = owners.filter_map(|pid| Some((pid, process::look(pid)?))).collect();
        std::thread::sleep(WATCHED);
        let mut comms: BTreeMap<u64, CommSnapshot> = BTreeMap::new();
        let mut created = BTreeMap::new();
        for found in scan.outboxes.values() {
            let now = now_ns();
            let Some(board) = BoardCopy::take(&found.file, &found.layout, now) else { continue };
            let id = found.header.job;
            let comm = comms.entry(id).or_insert_with(|| empty(&found.header, &board, now));
            if comm.ranks.len() != board.waited.len() {
                continue;
            }
            created.entry(id).or_insert(board.created);
            let slot = &mut comm.ranks[found.header.rank as usize];
            *slot = RankSnapshot { node: slot.node, ..seen(found, board, &before, looked, now) };
        }
        comms.values_mut().for_each(tell_apart);
        let mut comms: Vec<_> = comms.into_values().collect();
        comms.sort_by_key(|comm| std::cmp::Reverse(comm.age_ns));
        let jobs = jobs_of(comms).into_iter().map(|communicators| {
            let diagnosis = diagnose(&communicators, PATIENCE.as_nanos() as u64);
            JobSnapshot { communicators, diagnosis }
        });
        let (jobs, Scan { unreadable, other_versions, .. }) = (jobs.collect(), scan);
        Ok(MachineSnapshot { jobs, unreadable, other_versions })
    }
}

/// A communicator of which nothing is known yet but its ranks and their nodes.
fn empty(header: &Header, board: &BoardCopy, now: u64) -> CommSnapshot {
    let rank = |(rank, &node): (usize, &usize)| RankSnapshot { rank, node: Some(node), ..Default::default() };
    let ranks = board.nodes.iter().enumerate().map(rank).collect();
    CommSnapshot { id: header.job, age_ns: now.saturating_sub(board.created), ranks }
}

fn seen(found: &Found, board: BoardCopy, before: &BTreeMap<u32, Look>, looked: Instant, now: u64) -> RankSnapshot {
    let now_look = found.owner.and_then(process::look).filter(|look| look.started == board.started);
    let used = now_look.and_then(|look| {
        let earlier = before.get(&found.owner?)?;
        Some(look.used?.saturating_sub(earlier.used?).as_secs_f64() / looked.elapsed().as_secs_f64())
    });
    // Its owner was to be seen among those who have it open, unless it has let go of it.
    let process = match now_look {
        Some(look) => look.state,
        None if standing(board.state) == super::Standing::Left => ProcessState::Unknown,
        None => match process::look(found.header.pid).filter(|look| look.started == board.started) {
            Some(look) => look.state,
            None => ProcessState::Dead,
        },
    };
    let pid = found.owner.unwrap_or(found.header.pid);
    RankSnapshot::of(found.header.rank as usize, Some(pid), process, board, now).with_cores(used)
}

/// Says of each rank that was not seen why that may be.
fn tell_apart(comm: &mut CommSnapshot) {
    let here: Vec<Option<usize>> = comm.ranks.iter().filter(|r| r.pid.is_some()).map(|r| r.node).collect();
    for rank in comm.ranks.iter_mut().filter(|rank| rank.pid.is_none()) {
        let why = if here.contains(&rank.node) { "has ended, or is another user's" } else { "not on this machine" };
        rank.remark = Some(why.to_owned());
    }
}

/// Divides communicators by the processes that they share.
fn jobs_of(comms: Vec<CommSnapshot>) -> Vec<Vec<CommSnapshot>> {
    let mut jobs: Vec<Vec<CommSnapshot>> = vec![];
    for comm in comms {
        let pids: Vec<u32> = comm.ranks.iter().filter_map(|rank| rank.pid).collect();
        let shares = |job: &Vec<CommSnapshot>| {
            job.iter().flat_map(|comm| &comm.ranks).any(|rank| rank.pid.is_some_and(|pid| pids.contains(&pid)))
        };
        let (mut joined, apart): (Vec<_>, Vec<_>) = jobs.into_iter().partition(shares);
        joined.push(vec![comm]);
        jobs = apart;
        jobs.push(joined.into_iter().flatten().collect());
    }
    jobs
}

impl Scan {
    fn run() -> Result<Self> {
        let mut scan = Scan::default();
        let user = nix::unistd::geteuid();
        for entry in std::fs::read_dir("/proc").map_err(|e| Error::os("readdir(/proc)", e))?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            match std::fs::read_dir(entry.path().join("fd")) {
                Ok(descriptors) => descriptors.flatten().for_each(|fd| scan.look_at(pid, &fd.path())),
                Err(_) => {
                    let own = entry.metadata().is_ok_and(|m| m.uid() == user.as_raw());
                    scan.unreadable += usize::from(own);
                }
            }
        }
        Ok(scan)
    }

    /// Notes the outbox that a descriptor leads to, if it does.
    fn look_at(&mut self, pid: u32, fd: &Path) {
        if !std::fs::read_link(fd).is_ok_and(|target| segment::is_outbox_name(&target)) {
            return;
        }
        // Whatever it is by now, opening must not block.
        let Ok(file) = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(fd) else { return };
        let Ok(metadata) = file.metadata() else { return };
        let key = (metadata.dev(), metadata.ino());
        if let Some(found) = self.outboxes.get_mut(&key) {
            if found.owner.is_none() && is_process(pid, found.header.pid) {
                found.owner = Some(pid);
            }
            return;
        }
        let mut header = Header::zeroed();
        if !file.copy(0, bytemuck::bytes_of_mut(&mut header)) || header.magic != MAGIC {
            return;
        }
        if (header.abi_version, header.byte_order) != (ABI_VERSION, BYTE_ORDER) {
            self.other_versions += 1;
            return;
        }
        let ranks = header.world_size as usize;
        if ranks == 0 || ranks > MAX_WORLD_SIZE || header.rank >= header.world_size {
            return;
        }
        let mut layout = Layout::default();
        layout.add(size_of::<Header>());
        let layout = BoardLayout::new(&mut layout, ranks);
        let owner = is_process(pid, header.pid).then_some(pid);
        self.outboxes.insert(key, Found { file, header, layout, owner });
    }
}

/// Whether `pid` is the process that calls itself `own` in its pid namespace.
fn is_process(pid: u32, own: u32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return pid == own };
    let innermost =
        status.lines().find_map(|line| line.strip_prefix("NSpid:")?.split_whitespace().last()?.parse().ok());
    innermost.unwrap_or(pid) == own
}

impl fmt::Display for MachineSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.jobs.is_empty() {
            writeln!(f, "no jobs of this user on this machine")?;
        }
        for (i, job) in self.jobs.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            job.communicators.iter().try_for_each(|comm| write!(f, "{comm}"))?;
            writeln!(f, "{}", job.diagnosis)?;
        }
        if self.unreadable > 0 {
            writeln!(f, "{} processes of this user may not be looked into", self.unreadable)?;
        }
        if self.other_versions > 0 {
            writeln!(f, "{} outboxes are of another version of this library", self.other_versions)?;
        }
        Ok(())
    }
}
