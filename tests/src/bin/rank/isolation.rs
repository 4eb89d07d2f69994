//! Every way a peer might try to write another rank's outbox.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};
use xccl::Communicator;

/// One line of a process's `maps`.
struct Mapped {
    from: usize,
    to: usize,
    rights: String,
    inode: u64,
}

impl Mapped {
    /// The segments that a process has mapped.
    fn of(pid: u32) -> Result<Vec<Mapped>> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let parse = |line: &str| {
            let mut fields = line.split_whitespace();
            let (from, to) = fields.next()?.split_once('-')?;
            let address = |text| usize::from_str_radix(text, 16).ok();
            let (from, to, rights) = (address(from)?, address(to)?, fields.next()?.to_owned());
            Some(Mapped { from, to, rights, inode: fields.nth(2)?.parse().ok()? })
        };
        Ok(maps.lines().filter(|l| l.contains("memfd:xccl")).filter_map(parse).collect())
    }

    fn files(&self, pid: u32) -> String {
        format!("/proc/{pid}/map_files/{:x}-{:x}", self.from, self.to)
    }
}

/// Opens a segment again for writing, if the kernel lets us, and tries to use that. Says whether it was opened.
fn reopened(path: &str) -> Result<bool> {
    let Ok(file) = OpenOptions::new().read(true).write(true).open(path) else { return Ok(false) };
    ensure!(file.write_at(b"x", 0).is_err(), "a write through {path} changed an outbox");
    let (rights, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: a fresh mapping at an address of the kernel's choice, of which nothing is used.
    let mapped = unsafe { libc::mmap(std::ptr::null_mut(), 4096, rights, shared, file.as_raw_fd(), 0) };
    ensure!(mapped == libc::MAP_FAILED, "{path} was mapped for writing");
    // SAFETY: as above; only the right to read is asked for.
    let mapped = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, shared, file.as_raw_fd(), 0) };
    if mapped != libc::MAP_FAILED {
        // SAFETY: the range was mapped just now, and nothing refers to it.
        let outcome = unsafe { libc::mprotect(mapped, 4096, rights) };
        ensure!(outcome == -1, "{path}, mapped for reading, was made writable");
    }
    ensure!(file.set_len(0).is_err(), "{path} was shrunk under its readers");
    Ok(true)
}

pub(crate) fn outboxes_stay_their_owners(comm: &Communicator) -> Result<()> {
    let (rank, own) = (comm.rank(), std::process::id());
    let mut pids = vec![own; comm.world_size()];
    for peer in (0..pids.len()).filter(|&p| p != rank) {
        comm.send(peer, 1, &own.to_le_bytes())?;
    }
    for (peer, pid) in pids.iter_mut().enumerate().filter(|&(p, _)| p != rank) {
        let mut bytes = [0; 4];
        comm.recv(peer, 1, &mut bytes)?;
        *pid = u32::from_le_bytes(bytes);
    }

    let outboxes: Vec<Mapped> = Mapped::of(own)?.into_iter().filter(|m| m.rights == "r--s").collect();
    ensure!(outboxes.len() + 1 >= comm.world_size(), "found only {} outboxes of peers", outboxes.len());
    let memory = OpenOptions::new().read(true).write(true).open("/proc/self/mem")?;
    for outbox in &outboxes {
        let (at, bytes) = (outbox.from as *mut libc::c_void, outbox.to - outbox.from);
        // SAFETY: asks for a right; nothing is written even if it were given.
        let outcome = unsafe { libc::mprotect(at, bytes, libc::PROT_READ | libc::PROT_WRITE) };
        let err = std::io::Error::last_os_error();
        ensure!(outcome == -1, "mprotect made a peer's outbox writable");
        ensure!([Some(libc::EACCES), Some(libc::EPERM)].contains(&err.raw_os_error()), "mprotect: {err}");
        // The kernel's back door for debuggers. The byte is what it was, so that a success does no harm.
        let (mut byte, address) = ([0], outbox.from as u64);
        memory.read_exact_at(&mut byte, address)?;
        ensure!(memory.write_at(&byte, address).is_err(), "/proc/self/mem wrote a peer's outbox");
        reopened(&outbox.files(own))?;
    }
    for &pid in pids.iter() {
        // Where the owners have mapped the same segments, writable.
        for theirs in Mapped::of(pid)?.iter().filter(|m| outboxes.iter().any(|o| o.inode == m.inode)) {
            if pid != own {
                reopened(&theirs.files(pid))?;
            }
        }
        // And any descriptor of one that is still open, here or there.
        for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            let path = entry.path();
            let leads_to_outbox = File::open(&path).and_then(|f| f.metadata()).is_ok_and(|m| {
                use std::os::unix::fs::MetadataExt;
                outboxes.iter().any(|o| o.inode == m.ino()) && m.size() > 0
            });
            let is_segment = std::fs::read_link(&path).is_ok_and(|t| t.to_string_lossy().contains("memfd:xccl"));
            if leads_to_outbox && is_segment {
                reopened(&path.to_string_lossy())?;
            }
        }
    }
    comm.barrier()?;
    Ok(())
}
