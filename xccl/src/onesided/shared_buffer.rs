//! A block of the symmetric heap's part that every rank may write.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

use super::Remote;
use crate::comm::inner::{CommInner, lock};
use crate::error::{Error, Result};
use crate::memory::mapping::Mapping;
use crate::p2p::Source;
use crate::sync::signal::Until;

/// Bytes of this rank that any rank of the communicator may read and write, given back when dropped. Keeps the
/// communicator's memory mapped.
///
/// Others may write there at any time, so there is no `&[u8]` of it: bytes are copied in and out ([`read`](Self::read),
/// [`write`](Self::write)), words are read by [`signal_fetch`](Self::signal_fetch). An engine whose ranks have
/// agreed who writes when may use it in place, at its own risk ([`as_slice`](Self::as_slice), [`as_ptr`](Self::as_ptr)).
///
/// A block that has been given back may still be written by a peer that does not know. It is never lent as a
/// [`HeapBuffer`](crate::HeapBuffer) afterwards, only as another shared block: what was shared once stays so, and
/// [`put`](crate::Communicator::put) refuses everything else.
///
/// ```
/// # use xccl::{Communicator, Config, UniqueId};
/// # fn main() -> xccl::Result<()> {
/// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
/// let block = comm.shared_alloc(4096)?;
/// block.write(100, b"hello")?;
/// let mut read = [0; 5];
/// comm.get(block.remote().skip(100), &mut read)?; // as any rank may that has been told of `block.remote()`
/// assert_eq!(&read, b"hello");
/// # Ok(())
/// # }
/// ```
pub struct SharedBuffer {
    comm: Arc<CommInner>,
    offset: usize,
    bytes: usize,
    /// It stays allocated, whatever becomes of this value.
    is_kept: AtomicBool,
}

impl SharedBuffer {
    pub(crate) fn new(comm: Arc<CommInner>, bytes: usize) -> Result<Self> {
        let offset = comm.allocate_shared(bytes)?;
        Ok(SharedBuffer { comm, offset, bytes, is_kept: AtomicBool::new(false) })
    }

    /// Its bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Its name for other ranks.
    pub fn remote(&self) -> Remote {
        Remote { rank: self.comm.rank, offset: self.offset, bytes: self.bytes }
    }

    /// Copies bytes out from `offset` on. Bytes that somebody writes meanwhile arrive old or new.
    ///
    /// # Errors
    /// [`Error::Shape`] when they do not lie in the block.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<()> {
        let at = self.place(offset, to.len())?;
        self.heap().get(at, to);
        Ok(())
    }

    /// Copies bytes in from `offset` on.
    ///
    /// # Errors
    /// [`Error::Shape`] when they do not lie in the block.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<()> {
        let at = self.place(offset, from.len())?;
        self.heap().put(at, from);
        Ok(())
    }

    /// The address of the first byte, a multiple of 256, valid as long as this value. Reading and writing there is up to an
    /// agreement of the ranks, as for [`as_slice`](Self::as_slice).
    pub fn as_ptr(&self) -> *mut u8 {
        self.heap().at_mut(self.offset, self.bytes)
    }

    /// The bytes where they lie.
    ///
    /// # Safety
    /// No rank writes them as long as the slice lives, and whoever has written them has told so: by a signal that was waited
    /// for, a message, a barrier.
    pub unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: inside the mapping, which `comm` keeps alive; unchanged by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.bytes) }
    }

    /// The bytes where they lie, to be written.
    ///
    /// # Safety
    /// No rank reads or writes them as long as the slice lives.
    pub unsafe fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as for `as_slice`; `&mut self` makes this the only reference in this process.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.bytes) }
    }

    /// The value of the word at `offset`. What was put before the signal that made it so is visible. Does not block.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not in the block, [`Error::NoWord`] when it is not at a multiple of 8.
    pub fn signal_fetch(&self, offset: usize) -> Result<u64> {
        let at = self.word(offset)?;
        self.comm.look_around();
        Ok(self.comm.own_word(at).load(Acquire))
    }

    /// Waits until the word at `offset` is what `until` says, and gives its value. `from` is the rank that will make it so, or
    /// [`Source::Any`]: it alone wakes this one at once, and its end ends the wait. What was put before that signal is visible.
    /// Blocks up to the deadline; sleeps after a while.
    ///
    /// # Errors
    /// As [`signal_fetch`](Self::signal_fetch), [`Error::InvalidRank`] and what waiting can meet; it may be repeated after
    /// [`Error::Timeout`].
    pub fn signal_wait(&self, from: impl Into<Source>, offset: usize, until: Until) -> Result<u64> {
        let at = self.word(offset)?;
        let from = match from.into() {
            Source::Any => None,
            Source::Rank(rank) => {
                self.comm.check_rank(rank)?;
                Some(rank)
            }
        };
        self.comm.signal_wait(from, at, until)
    }

    /// The word at `offset` in this rank's heap.
    fn word(&self, offset: usize) -> Result<usize> {
        let none = || Error::NoWord { rank: self.comm.rank, offset: self.offset + offset, bytes: self.bytes - offset };
        match self.place(offset, 8) {
            Ok(at) if at.is_multiple_of(8) => Ok(at),
            Ok(_) => Err(none()),
            Err(err) => Err(err),
        }
    }

    /// Lets its memory stay allocated as long as the communicator: somebody may still write there.
    pub(crate) fn keep(&self) {
        self.is_kept.store(true, Relaxed);
    }

    /// Whether it belongs to this communicator.
    pub(crate) fn is_of(&self, comm: &Arc<CommInner>) -> bool {
        Arc::ptr_eq(&self.comm, comm)
    }

    fn heap(&self) -> &Mapping {
        &self.comm.fabric.heap
    }

    fn place(&self, offset: usize, bytes: usize) -> Result<usize> {
        match offset <= self.bytes && bytes <= self.bytes - offset {
            true => Ok(self.offset + offset),
            false => Err(Error::Shape {
                what: "the rest of the shared block",
                given: self.bytes.saturating_sub(offset),
                expected: format!("at least {bytes} bytes from {offset} on"),
            }),
        }
    }
}

impl Drop for SharedBuffer {
    fn drop(&mut self) {
        if !self.is_kept.load(Relaxed) && !self.comm.is_forked() {
            lock(&self.comm.heap).release_shared(self.offset, self.bytes);
        }
    }
}
