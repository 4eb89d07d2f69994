//! One-sided access to other ranks' shared memory: put, get, signals, atomics; the target takes no part.
//!
//! # What may be written
//! The heap of each rank has a border. Below it lie blocks that their owner alone writes ([`HeapBuffer`](crate::HeapBuffer),
//! which lends `&mut [u8]`); above it lie [`SharedBuffer`]s, of which there are no references, and which alone may be named by a
//! [`Remote`]. Each operation checks that against the border that the target has published: safe code cannot race with a
//! reference, whatever numbers it comes with. The other way, blocks that turn from private to shared while they live, would
//! have to take a reference back that may still be in use; and a table of blocks would be out of date when a late put
//! arrives. A border that never moves up cannot be.
//!
//! # Order
//! As in OpenSHMEM 1.5 ("Memory Ordering Routines", "Signaling Operations"), with its names:
//! - a put returns when its data may be reused; it may arrive later, and before or after other puts;
//! - [`put_signal`](crate::Communicator::put_signal) changes its signal after all of its own data has arrived, no matter about
//!   other puts;
//! - [`fence`](crate::Communicator::fence): what this rank puts, signals or changes by atomics at a rank afterwards, arrives there
//!   after what it did before. It says nothing of other ranks;
//! - [`quiet`](crate::Communicator::quiet): all of it has arrived, at every rank, and is visible to every rank;
//! - a get and an atomic that gives a value are over when they return; puts to the same place are not waited for, unless by `quiet`.
//!
//! A barrier says that what was put to a rank before is visible to that rank; for a third one, `quiet` has to come before it.
//! Beyond OpenSHMEM, every change of a word wakes who waits for it, and concurrent accesses
//! to the same bytes are never undefined behaviour: they mix.

mod far;
pub(crate) mod ops;
mod remote;
mod shared_buffer;

pub use remote::Remote;
pub use shared_buffer::SharedBuffer;

use std::time::Duration;

use crate::comm::Communicator;
use crate::error::Result;
use crate::sync::signal::Update;

impl Communicator {
    /// Asks whether a rank can be reached, and how long it takes to answer: a link that is saturated, or a rank with much to
    /// answer, is late; a broken one never answers. Of a rank of another node, its plane answers, in the order of what was sent
    /// there before: a waiting call of it, or its progress thread while it computes (`XCCL_PROGRESS_THREAD`). A rank of this node is
    /// only looked at. Blocks for `within` at most, whatever the communicator's deadline is.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, UniqueId};
    /// # use std::time::Duration;
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let time = comm.probe(0, Duration::from_secs(1))?;
    /// assert!(time < Duration::from_secs(1));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Timeout`](crate::Error::Timeout) where no answer came in time (the rank may be stopped, or may not be waiting while
    /// it has no progress thread), [`Error::PeerUnreachable`](crate::Error::PeerUnreachable) where the network has given it up,
    /// [`Error::PeerDied`](crate::Error::PeerDied), [`Error::PeerLeft`](crate::Error::PeerLeft),
    /// [`Error::InvalidRank`](crate::Error::InvalidRank).
    pub fn probe(&self, rank: usize, within: Duration) -> Result<Duration> {
        self.inner.probe(rank, within)
    }

    /// Allocates memory of this rank that every rank may read and write, from the upper end of its symmetric heap
    /// (`XCCL_HEAP`). Zeroed only when allocated for the first time. Aligned to 256 bytes. Does not block, and other ranks need
    /// not take part: they are told of [`SharedBuffer::remote`]; ranks that allocate the same blocks in the same order have
    /// them at the same offsets ([`Remote::of`]).
    ///
    /// # Errors
    /// [`Error::HeapExhausted`](crate::Error::HeapExhausted).
    pub fn shared_alloc(&self, bytes: usize) -> Result<SharedBuffer> {
        SharedBuffer::new(self.inner.clone(), bytes)
    }

    /// Writes `data` to the beginning of a piece of a rank's shared memory, possibly this rank's. Returns when `data` may be
    /// reused. When it is visible there: see [`put_signal`](Self::put_signal), [`fence`](Self::fence) and [`quiet`](Self::quiet).
    ///
    /// Towards another node, more than 64 KiB of the symmetric heap ([`heap_alloc`](Self::heap_alloc)) leave without a copy: the call
    /// blocks until they have, up to the deadline. Other memory is copied first.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let block = comm.shared_alloc(4096)?; // every rank does the same
    /// let right = (comm.rank() + 1) % comm.world_size();
    /// comm.put(block.remote().of(right).skip(1024), &[7; 100])?;
    /// comm.barrier()?;
    /// let mut from_left = [0; 100];
    /// block.read(1024, &mut from_left)?;
    /// assert_eq!(from_left, [7; 100]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidRank`](crate::Error::InvalidRank), [`Error::NotShared`](crate::Error::NotShared),
    /// [`Error::Shape`](crate::Error::Shape) when the piece is too short; nothing was written then.
    /// [`Error::PeerLeft`](crate::Error::PeerLeft), [`Error::PeerDied`](crate::Error::PeerDied) once this rank knows,
    /// [`Error::Aborted`](crate::Error::Aborted). Towards another node [`Error::Timeout`](crate::Error::Timeout) and the like: what of
    /// the data had not left may still, as it lies in the heap then.
    pub fn put(&self, to: Remote, data: &[u8]) -> Result<()> {
        self.inner.put(to, data)
    }

    /// Copies the beginning of a piece of a rank's shared memory. Returns when it is there; what others write meanwhile arrives
    /// old or new, byte by byte. A rank that has left can still be read.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn get(&self, from: Remote, into: &mut [u8]) -> Result<()> {
        self.inner.get(from, into)
    }

    /// As [`put`](Self::put); afterwards changes a word of the same rank's shared memory (the first 8 bytes of `word`): whoever
    /// sees the change sees the data.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, Source, UniqueId, Until, Update};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let block = comm.shared_alloc(4096)?; // a word, then data
    /// let theirs = block.remote(); // or what another rank has told
    /// comm.put_signal(theirs.skip(64), b"hello", theirs, Update::Add(1))?;
    /// block.signal_wait(Source::Any, 0, Until::Ge(1))?; // the other rank
    /// # let mut read = [0; 5];
    /// # block.read(64, &mut read)?;
    /// # assert_eq!(&read, b"hello");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`put`](Self::put); [`Error::NoWord`](crate::Error::NoWord). Nothing was written, or the data alone.
    pub fn put_signal(&self, to: Remote, data: &[u8], word: Remote, update: Update) -> Result<()> {
        self.inner.put_signal(to, data, word, update)
    }

    /// Changes a word without data, and wakes who waits for it. Atomic with the other operations on words. After a
    /// [`fence`](Self::fence) it says that all puts before have arrived.
    ///
    /// # Errors
    /// As [`put_signal`](Self::put_signal).
    pub fn signal(&self, word: Remote, update: Update) -> Result<()> {
        self.inner.signal(word, update)
    }

    /// The value of a word of a rank's shared memory.
    ///
    /// # Errors
    /// As [`put_signal`](Self::put_signal); so it is for all atomics.
    pub fn atomic_fetch(&self, word: Remote) -> Result<u64> {
        self.inner.atomic_fetch(word)
    }

    /// Sets a word; does not wait until it is set, as [`signal`](Self::signal) with [`Update::Set`].
    ///
    /// # Errors
    /// As [`atomic_fetch`](Self::atomic_fetch).
    pub fn atomic_set(&self, word: Remote, value: u64) -> Result<()> {
        self.inner.signal(word, Update::Set(value))
    }

    /// Adds to a word; does not wait until it is done, as [`signal`](Self::signal) with [`Update::Add`].
    ///
    /// # Errors
    /// As [`atomic_fetch`](Self::atomic_fetch).
    pub fn atomic_add(&self, word: Remote, value: u64) -> Result<()> {
        self.inner.signal(word, Update::Add(value))
    }

    /// Sets a word and gives its value before.
    ///
    /// # Errors
    /// As [`atomic_fetch`](Self::atomic_fetch).
    pub fn atomic_swap(&self, word: Remote, value: u64) -> Result<u64> {
        self.inner.atomic_swap(word, value)
    }

    /// Adds to a word and gives its value before. Past the largest number it goes on from 0.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let tickets = comm.shared_alloc(8)?;
    /// assert_eq!(comm.atomic_fetch_add(tickets.remote(), 1)?, 0);
    /// assert_eq!(comm.atomic_compare_swap(tickets.remote(), 1, 10)?, 1);
    /// assert_eq!(comm.atomic_fetch(tickets.remote())?, 10);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`atomic_fetch`](Self::atomic_fetch).
    pub fn atomic_fetch_add(&self, word: Remote, value: u64) -> Result<u64> {
        self.inner.atomic_fetch_add(word, value)
    }

    /// Sets a word to `value` if it is `expected`; gives its value before, either way.
    ///
    /// # Errors
    /// As [`atomic_fetch`](Self::atomic_fetch).
    pub fn atomic_compare_swap(&self, word: Remote, expected: u64, value: u64) -> Result<u64> {
        self.inner.atomic_compare_swap(word, expected, value)
    }

    /// Puts, signals and atomics of this rank at `rank` after this call arrive there after those before it. Does not block for a
    /// rank of this node; for another one, until that has all that was put before, up to the deadline.
    ///
    /// # Errors
    /// [`Error::InvalidRank`](crate::Error::InvalidRank) and what waiting can meet.
    pub fn fence(&self, rank: usize) -> Result<()> {
        self.inner.fence(rank)
    }

    /// Waits until all that this rank has put, signalled and changed is visible to every rank. Blocks up to the deadline;
    /// for ranks of this node it is so at once.
    ///
    /// # Errors
    /// What waiting can meet.
    pub fn quiet(&self) -> Result<()> {
        self.inner.quiet()
    }
}

#[cfg(test)]
pub(crate) mod tests;
