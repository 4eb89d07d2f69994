//! What the two processes that exchange messages could do at best, measured on a memory that both have mapped: a cache line
//! handed over, and a plain copy by one core of what the other has written.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};
use xccl::Communicator;

use super::figures::{GAMES, game_ns, play};

const TAG: u32 = 0xffff_0002;
/// The two words of a game, each with a pair of lines to itself.
const WORDS: [usize; 2] = [0, 128];
const DATA: usize = 4096;

/// The memory of ranks 0 and 1: words to play with, and bytes that rank 1 has written.
pub struct Pair {
    memory: MmapRaw,
    bytes: usize,
    rank: usize,
    /// Keeps it for rank 0 to open.
    _fd: OwnedFd,
}

impl Pair {
    /// Both ranks call it; `None` on both where rank 0 cannot open what rank 1 has created.
    pub fn open(comm: &Communicator, bytes: usize) -> Result<Option<Self>> {
        let map = |fd: OwnedFd| -> Result<Pair> {
            let memory =
                MmapOptions::new().len(DATA + bytes).map_raw(fd.as_raw_fd()).context("mapping the limits' memory")?;
            Ok(Pair { memory, bytes, rank: comm.rank(), _fd: fd })
        };
        if comm.rank() == 1 {
            let fd = memfd_create(c"xccl-bench", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
            nix::unistd::ftruncate(fd.as_fd(), (DATA + bytes) as i64).context("ftruncate")?;
            let path = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
            let pair = map(fd)?;
            // SAFETY: inside the mapping, which only this process has so far.
            unsafe { pair.memory.as_mut_ptr().add(DATA).write_bytes(1, bytes) };
            comm.send(0, TAG, path.as_bytes())?;
            let mut opened = [0];
            comm.recv(0, TAG, &mut opened)?;
            return Ok((opened == [1]).then_some(pair));
        }
        let mut path = [0; 64];
        let len = comm.recv(1, TAG, &mut path)?.len;
        let file = File::options().read(true).write(true).open(std::str::from_utf8(&path[..len])?);
        let pair = file.ok().map(|file| map(file.into())).transpose()?;
        comm.send(1, TAG, &[pair.is_some().into()])?;
        Ok(pair)
    }

    fn word(&self, i: usize) -> &AtomicU64 {
        // SAFETY: inside the mapping and aligned; both processes use it as an atomic only.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().add(WORDS[i]).cast()) }
    }

    /// Nanoseconds that a cache line takes from one process's core to the other's: the best of several games, as
    /// [`line_ns`](super::figures::line_ns) plays them between threads. Both ranks call it.
    pub fn line_ns(&self, comm: &Communicator) -> Result<Option<f64>> {
        let mut best: Option<f64> = None;
        for _ in 0..GAMES {
            self.meet(comm)?;
            (0..WORDS.len()).for_each(|i| self.word(i).store(0, Ordering::Relaxed));
            self.meet(comm)?;
            let game = play(self.word(0), self.word(1), self.rank as u64).map(game_ns);
            best = best.into_iter().chain(game).min_by(f64::total_cmp);
        }
        Ok(best)
    }

    /// Copies bytes to an offset of that memory, with the machine's `memcpy`: what a put cannot beat.
    pub fn copy_in(&self, at: usize, from: &[u8]) {
        assert!(at + from.len() <= self.bytes, "{} of {} bytes", at + from.len(), self.bytes);
        // SAFETY: inside the mapping; the other process only reads it before this rank has got it.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.memory.as_mut_ptr().add(DATA + at), from.len()) };
    }

    fn meet(&self, comm: &Communicator) -> Result<()> {
        let other = 1 - self.rank;
        comm.send(other, TAG, &[])?;
        comm.recv(other, TAG, &mut [])?;
        Ok(())
    }

    /// Copies what rank 1 has written, with the machine's `memcpy`.
    pub fn copy(&self, to: &mut [u8]) {
        assert!(to.len() <= self.bytes, "{} of {} bytes", to.len(), self.bytes);
        // SAFETY: inside the mapping; rank 1 wrote it before it told rank 0 where it is, and nobody writes it any more.
        unsafe { std::ptr::copy_nonoverlapping(self.memory.as_ptr().add(DATA), to.as_mut_ptr(), to.len()) };
        std::hint::black_box(to);
    }
}
