//! Creating a segment, handing it to peers, and taking one from a peer.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{shm_open, shm_unlink};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};

use super::mapping::Mapping;
use crate::error::{Error, Result};

/// Where segments come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryFlavour {
    /// `memfd_create`: no name anywhere, no size limit but the machine's, and the kernel's seals forbid peers to write.
    Memfd,
    /// `shm_open`: counted against `/dev/shm`, reserved at start. Peers get read-only descriptors of outboxes, but no
    /// seal stops a process of the same user from reopening one for writing through `/proc`.
    Posix,
}

/// Who may write a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writers {
    /// Its owner alone.
    Owner,
    /// Any rank.
    Anyone,
}

/// A segment that this rank has created: its own mapping, and the descriptor that peers get.
pub(crate) struct OwnSegment {
    pub(crate) mapping: Mapping,
    pub(crate) for_peers: OwnedFd,
}

impl OwnSegment {
    pub(crate) fn create(flavour: MemoryFlavour, writers: Writers, bytes: usize, huge_pages: bool) -> Result<Self> {
        let segment = match flavour {
            MemoryFlavour::Memfd => create_memfd(writers, bytes)?,
            MemoryFlavour::Posix => create_posix(writers, bytes)?,
        };
        if huge_pages {
            segment.mapping.advise_huge_pages();
        }
        Ok(segment)
    }
}

fn create_memfd(writers: Writers, bytes: usize) -> Result<OwnSegment> {
    // As `/proc/PID/maps` shows it; not a name that anyone could open it by.
    let name = match writers {
        Writers::Owner => c"xccl-outbox",
        Writers::Anyone => c"xccl-heap",
    };
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)
        .map_err(|e| Error::os("memfd_create", e))?;
    nix::unistd::ftruncate(&fd, bytes as i64).map_err(|e| Error::os("ftruncate", e))?;
    // The owner's writable mapping comes first: FUTURE_WRITE leaves it alone and forbids all later ones.
    let mapping = Mapping::writable(&fd, bytes)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    let seals = match writers {
        Writers::Owner => seals | future_write_seal(),
        Writers::Anyone => seals,
    };
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).map_err(|e| Error::os("fcntl(F_ADD_SEALS)", e))?;
    Ok(OwnSegment { mapping, for_peers: fd })
}

/// `F_SEAL_FUTURE_WRITE`, which nix does not name.
fn future_write_seal() -> SealFlag {
    SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE)
}

fn create_posix(writers: Writers, bytes: usize) -> Result<OwnSegment> {
    sweep_names_of_the_dead();
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let pid = std::process::id();
    let name = format!("/{NAME_PREFIX}{pid}-{}", COUNTER.fetch_add(1, Ordering::Relaxed));
    let open = |flags: OFlag| shm_open(name.as_str(), flags | OFlag::O_CLOEXEC, Mode::S_IRUSR | Mode::S_IWUSR);
    let fd = open(OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR).map_err(|e| Error::os("shm_open", e))?;
    let for_peers = match writers {
        Writers::Owner => open(OFlag::O_RDONLY),
        Writers::Anyone => fd.try_clone().map_err(|_| nix::Error::last()),
    };
    // Peers get descriptors, so the name has done its work before any peer even knows of the segment.
    let unlinked = shm_unlink(name.as_str());
    let for_peers = for_peers.map_err(|e| Error::os("shm_open", e))?;
    unlinked.map_err(|e| Error::os("shm_unlink", e))?;

    nix::unistd::ftruncate(&fd, bytes as i64).map_err(|e| Error::os("ftruncate", e))?;
    match fallocate(&fd, FallocateFlags::empty(), 0, bytes as i64) {
        Ok(()) => {}
        Err(nix::Error::ENOSPC | nix::Error::ENOMEM) => {
            return Err(Error::NotEnoughMemory {
                what: "a segment in /dev/shm",
                needed: bytes as u64,
                available: free_in_dev_shm(&fd),
            });
        }
        Err(e) => return Err(Error::os("fallocate", e)),
    }
    let mapping = Mapping::writable(&fd, bytes)?;
    Ok(OwnSegment { mapping, for_peers })
}

fn free_in_dev_shm(fd: &impl AsFd) -> u64 {
    nix::sys::statvfs::fstatvfs(fd).map_or(0, |s| s.blocks_available() * s.fragment_size())
}

/// The number of the file system that memfds are files of.
const TMPFS_MAGIC: u64 = nix::sys::statfs::TMPFS_MAGIC.0 as u64;

const NAME_PREFIX: &str = "xccl-";

/// Whether that is what `/proc/PID/fd` says of a descriptor of an outbox.
pub(crate) fn is_outbox_name(target: &Path) -> bool {
    let is = |start: &str| target.to_str().is_some_and(|text| text.starts_with(start));
    is("/memfd:xccl-outbox") || is("/dev/shm/xccl-")
}

/// A kill between `shm_open` and `shm_unlink`, microseconds apart, would leave a name behind: the next one clears it.
fn sweep_names_of_the_dead() {
    let Ok(dir) = std::fs::read_dir("/dev/shm") else { return };
    for name in dir.flatten().filter_map(|e| e.file_name().into_string().ok()) {
        let Some(pid) = name.strip_prefix(NAME_PREFIX).and_then(|r| r.split('-').next()?.parse::<i32>().ok()) else {
            continue;
        };
        let dead = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None) == Err(nix::Error::ESRCH);
        if dead && let Ok(name) = CString::new(format!("/{name}")) {
            let _ = shm_unlink(name.as_c_str());
        }
    }
}

/// Checks that a segment of rank `rank` is as large as that rank says and cannot shrink.
pub(crate) fn check_segment(fd: &OwnedFd, rank: usize, flavour: MemoryFlavour, bytes: usize) -> Result<()> {
    let size = nix::sys::stat::fstat(fd).map_err(|e| Error::os("fstat", e))?.st_size as u64;
    if size < bytes as u64 {
        return Err(Error::Corrupt { rank, what: "a segment's size", value: size, limit: bytes as u64 });
    }
    if flavour == MemoryFlavour::Memfd {
        // Of a file of huge pages a hole may have no page left to give: reading it would be a fault.
        let file_system = nix::sys::statfs::fstatfs(fd).map_err(|e| Error::os("fstatfs", e))?.filesystem_type();
        if file_system != nix::sys::statfs::TMPFS_MAGIC {
            let (what, value, limit) = ("a segment's file system", file_system.0 as u64, TMPFS_MAGIC);
            return Err(Error::Corrupt { rank, what, value, limit });
        }
        let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map_err(|e| Error::os("fcntl(F_GET_SEALS)", e))?;
        if seals & libc::F_SEAL_SHRINK == 0 {
            return Err(Error::Corrupt {
                rank,
                what: "a segment's seals",
                value: seals as u64,
                limit: libc::F_SEAL_SHRINK as u64,
            });
        }
    }
    Ok(())
}

/// Maps a segment of another rank, which was checked.
pub(crate) fn map_peer(fd: &OwnedFd, writers: Writers, bytes: usize) -> Result<Mapping> {
    match writers {
        Writers::Owner => Mapping::read_only(fd, bytes),
        Writers::Anyone => Mapping::writable(fd, bytes),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use memmap2::MmapOptions;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    use super::*;

    const BYTES: usize = 8192;

    fn segment(flavour: MemoryFlavour, writers: Writers) -> OwnSegment {
        OwnSegment::create(flavour, writers, BYTES, false).unwrap()
    }

    /// The ways from a file to its bytes, and to its size, that succeed.
    fn ways_to_change(file: &File) -> Vec<&'static str> {
        let mut found = vec![];
        let mut is_open = |way, succeeded: bool| found.extend(succeeded.then_some(way));
        is_open("write", file.write_at(b"x", 0).is_ok());
        is_open("a writable mapping", MmapOptions::new().len(BYTES).map_raw(file).is_ok());
        if let Ok(mapping) = MmapOptions::new().len(BYTES).map_raw_read_only(file) {
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the whole mapping, to which no reference exists.
            is_open("mprotect", unsafe { libc::mprotect(mapping.as_mut_ptr().cast(), BYTES, rights) } == 0);
        }
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        is_open("a hole", fallocate(file, hole, 0, 4096).is_ok());
        is_open("a smaller size", file.set_len(4096).is_ok());
        is_open("a larger size", file.set_len(2 * BYTES as u64).is_ok());
        found
    }

    /// Where a process finds a descriptor of this one in `/proc`.
    fn reopened(segment: &OwnSegment) -> Vec<File> {
        let (pid, fd) = (std::process::id(), segment.for_peers.as_raw_fd());
        let paths = [format!("/proc/self/fd/{fd}"), format!("/proc/{pid}/fd/{fd}"), format!("/dev/fd/{fd}")];
        paths.map(|path| OpenOptions::new().read(true).write(true).open(path).unwrap()).into()
    }

    #[test]
    fn neither_the_descriptor_of_an_outbox_nor_reopening_it_leads_to_a_write() {
        let own = segment(MemoryFlavour::Memfd, Writers::Owner);
        let for_peers = File::from(own.for_peers.try_clone().unwrap());
        for file in reopened(&own).iter().chain([&for_peers]) {
            assert_eq!(ways_to_change(file), Vec::<&str>::new());
            assert!(fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::empty())).is_err(), "seals can be changed");
        }
        own.mapping.write(0, b"own");
        let mut seen = [0; 3];
        map_peer(&own.for_peers, Writers::Owner, BYTES).unwrap().read(0, &mut seen);
        assert_eq!(&seen, b"own");
    }

    /// Says that the test above looks at what it means to.
    #[test]
    fn a_heap_may_be_written_by_anyone_and_keeps_its_size() {
        for file in reopened(&segment(MemoryFlavour::Memfd, Writers::Anyone)) {
            assert_eq!(ways_to_change(&file), ["write", "a writable mapping", "mprotect", "a hole"]);
        }
    }

    /// Whether the kernel has noted that huge pages are wanted for a mapping.
    fn asks_for_huge_pages(mapping: &Mapping) -> bool {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", mapping.at(0, 0) as usize);
        let of_mapping = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = of_mapping.into_iter().find(|line| line.starts_with("VmFlags:")).unwrap();
        flags.split_whitespace().any(|flag| flag == "hg")
    }

    #[test]
    fn huge_pages_are_asked_for_where_the_kernel_has_them_and_not_when_told_not_to() {
        let offered = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
        for flavour in [MemoryFlavour::Memfd, MemoryFlavour::Posix] {
            for ask in [true, false] {
                let own = OwnSegment::create(flavour, Writers::Owner, BYTES, ask).unwrap();
                assert_eq!(asks_for_huge_pages(&own.mapping), ask && offered, "{flavour:?}, asked: {ask}");
            }
        }
    }

    #[test]
    fn the_descriptor_of_a_named_outbox_is_for_reading() {
        let own = segment(MemoryFlavour::Posix, Writers::Owner);
        assert_eq!(ways_to_change(&File::from(own.for_peers)), Vec::<&str>::new());
    }

    #[test]
    fn a_store_through_a_peers_mapping_is_a_fault() {
        for flavour in [MemoryFlavour::Memfd, MemoryFlavour::Posix] {
            let own = segment(flavour, Writers::Owner);
            let peers = map_peer(&own.for_peers, Writers::Owner, BYTES).unwrap();
            let at = peers.at(0, 1).cast_mut();
            // SAFETY: the child only limits itself, stores and ends: no lock, no allocation.
            match unsafe { fork() }.unwrap() {
                ForkResult::Child => {
                    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
                    // SAFETY: not sound, which is the point: it must not come back.
                    unsafe {
                        at.write_volatile(1);
                        libc::_exit(0)
                    }
                }
                ForkResult::Parent { child } => {
                    let ended = waitpid(child, None).unwrap();
                    assert!(matches!(ended, WaitStatus::Signaled(_, Signal::SIGSEGV, _)), "{flavour:?}: {ended:?}");
                }
            }
        }
    }

    #[test]
    fn a_segment_that_is_smaller_than_its_owner_says_or_may_shrink_is_refused() {
        let own = segment(MemoryFlavour::Memfd, Writers::Owner);
        let checked = check_segment(&own.for_peers, 3, MemoryFlavour::Memfd, 2 * BYTES);
        assert!(matches!(checked, Err(Error::Corrupt { rank: 3, value: 8192, limit: 16384, .. })), "{checked:?}");
        let loose = memfd_create(c"xccl", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&loose, BYTES as i64).unwrap();
        let checked = check_segment(&loose, 3, MemoryFlavour::Memfd, BYTES);
        assert!(matches!(checked, Err(Error::Corrupt { rank: 3, what: "a segment's seals", .. })), "{checked:?}");
    }

    #[test]
    fn a_name_that_a_killed_process_has_left_is_cleared_and_others_stay() {
        // A process that has ended and was waited for: its number is free.
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let left = format!("/dev/shm/{NAME_PREFIX}{}-0", child.id());
        let own = std::process::id();
        let others = ["x", ""].map(|before| format!("/dev/shm/{NAME_PREFIX}{before}{own}-test"));
        for name in others.iter().chain([&left]) {
            std::fs::write(name, "").unwrap();
        }
        drop(segment(MemoryFlavour::Posix, Writers::Anyone));
        let stays = others.each_ref().map(|name| std::fs::remove_file(name).is_ok());
        assert!(!std::path::Path::new(&left).exists() && stays == [true, true], "{stays:?}");
    }
}
