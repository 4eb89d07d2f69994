//! Point to point: ordered messages per (source, tag), blocking and non-blocking.
//!
//! How a message travels depends on its size and on where it lies ([`engine`] has the map):
//! - *inline*, up to 40 bytes: head and payload in one cache line;
//! - *ring*: the payload through the sender's ring, in pieces that are copied in and out at the same time, straight from the
//!   sender's buffer and straight into the receive that waits for it;
//! - *rendezvous*, from `XCCL_RENDEZVOUS` bytes on, when the payload lies in the symmetric heap: only described; the receiver
//!   copies it once and tells the sender. From private memory, too, where reading it is permitted and was found to be faster
//!   than the ring ([`calibration`]), or where `XCCL_RENDEZVOUS` has been set.
//!
//! To another node all but the shortest go through the ring; what lies in the symmetric heap is put into it straight from there.

pub(crate) mod calibration;
pub(crate) mod engine;
mod incoming;
mod outgoing;
mod queues;
mod raw;
mod scope;
mod slab;
mod slot;

pub use calibration::{Calibration, CalibrationPoint};
pub(crate) use outgoing::Traffic;
pub use raw::RawRequest;
pub use scope::{CollectiveRequest, Request, Scope, wait_all};

use crate::comm::Communicator;
use crate::error::Result;

/// Whom to receive from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// This rank.
    Rank(usize),
    /// Whichever message with the tag comes first.
    Any,
}

impl From<usize> for Source {
    fn from(rank: usize) -> Self {
        Source::Rank(rank)
    }
}

/// What was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// The sender.
    pub source: usize,
    /// The message's tag.
    pub tag: u32,
    /// Its length in bytes: at most the buffer's.
    pub len: usize,
}

impl Communicator {
    /// Sends bytes to a rank, possibly this one. Returns when `data` may be reused: at once for what fits the ring, after the
    /// receiver has copied it for larger messages. Messages to itself are always buffered.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, Source, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// comm.send(0, 7, b"hello")?;
    /// let mut buffer = [0; 16];
    /// let status = comm.recv(Source::Any, 7, &mut buffer)?;
    /// assert_eq!((status.source, &buffer[..status.len]), (0, &b"hello"[..]));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidRank`](crate::Error::InvalidRank) and what waiting can meet. `data` may be reused after each; after
    /// [`Error::Timeout`](crate::Error::Timeout) the receiver gets all of the message as it was, or
    /// [`Error::Withdrawn`](crate::Error::Withdrawn) in its place.
    pub fn send(&self, to: usize, tag: u32, data: &[u8]) -> Result<()> {
        self.inner.check_rank(to)?;
        self.inner.p2p.send(&self.inner, to, tag.into(), data)
    }

    /// Receives the next message with `tag` from a rank, or from any. Blocks until it is there.
    ///
    /// # Errors
    /// [`Error::Truncated`](crate::Error::Truncated) when it is longer than `buffer`: it is kept, and can be received with a
    /// larger one. [`Error::Withdrawn`](crate::Error::Withdrawn) when its sender has given it up.
    /// [`Error::InvalidRank`](crate::Error::InvalidRank) and what waiting can meet.
    pub fn recv(&self, from: impl Into<Source>, tag: u32, buffer: &mut [u8]) -> Result<Status> {
        let from = from.into();
        if let Source::Rank(rank) = from {
            self.inner.check_rank(rank)?;
        }
        self.inner.p2p.recv(&self.inner, from, tag.into(), buffer)
    }
}
