//! Non-blocking requests whose buffers nobody guards: for bindings to languages without borrows.

use std::sync::Arc;

use super::engine::Ticket;
use super::{Source, Status};
use crate::comm::Communicator;
use crate::comm::inner::CommInner;
use crate::error::{Error, Result};

/// A message on its way: see [`Communicator::isend_raw`]. Dropping it cancels it, as the end of a
/// [scope](Communicator::scope) does. It keeps the communicator's memory mapped.
///
/// ```
/// # use xccl::{Communicator, Config, UniqueId};
/// # fn main() -> xccl::Result<()> {
/// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
/// let (message, mut buffer) = ([7u8; 8], [0u8; 8]);
/// // SAFETY: both live until the requests are done.
/// let (mut send, mut receive) =
///     unsafe { (comm.isend_raw(0, 1, &message)?, comm.irecv_raw(0, 1, &mut buffer)?) };
/// send.wait()?;
/// assert_eq!(receive.wait()?.len, 8);
/// drop(receive);
/// assert_eq!(buffer, message);
/// # Ok(())
/// # }
/// ```
pub struct RawRequest {
    comm: Arc<CommInner>,
    /// `None` once it is over.
    ticket: Option<Ticket>,
}

impl RawRequest {
    /// As [`Request::wait`](super::Request::wait). After [`Error::Timeout`] the message is still on its way and the call may be
    /// repeated; after anything else the request is over.
    ///
    /// # Errors
    /// As [`Request::wait`](super::Request::wait); [`Error::WrongOrder`] when it is over already.
    pub fn wait(&mut self) -> Result<Status> {
        let ticket = self.pending("wait")?;
        let result = self.comm.p2p.wait(&self.comm, ticket);
        if !matches!(result, Err(Error::Timeout { .. })) {
            self.end();
        }
        result
    }

    /// As [`Request::test`](super::Request::test); after a status or an error the request is over.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn test(&mut self) -> Result<Option<Status>> {
        let ticket = self.pending("test")?;
        let result = self.comm.p2p.test(&self.comm, ticket);
        if !matches!(result, Ok(None)) {
            self.end();
        }
        result
    }

    fn pending(&self, call: &'static str) -> Result<Ticket> {
        self.ticket.ok_or(Error::WrongOrder { call, epoch: 0, expected: "a request that is not over" })
    }

    fn end(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.comm.p2p.cancel(&self.comm, ticket);
        }
    }
}

impl Drop for RawRequest {
    fn drop(&mut self) {
        self.end();
    }
}

impl Communicator {
    /// Starts to send `data`.
    ///
    /// # Errors
    /// [`Error::InvalidRank`].
    ///
    /// # Safety
    /// `data` stays readable and unchanged until the request is over or dropped, whatever its lifetime says.
    pub unsafe fn isend_raw(&self, to: usize, tag: u32, data: &[u8]) -> Result<RawRequest> {
        self.inner.check_rank(to)?;
        // SAFETY: the caller's promise; a dropped request is cancelled.
        let ticket = unsafe { self.inner.p2p.start_send(&self.inner, to, tag.into(), data) };
        Ok(RawRequest { comm: self.inner.clone(), ticket: Some(ticket) })
    }

    /// Starts to receive into `buffer`.
    ///
    /// # Errors
    /// [`Error::InvalidRank`].
    ///
    /// # Safety
    /// `buffer` stays writable and unused until the request is over or dropped, whatever its lifetime says.
    pub unsafe fn irecv_raw(&self, from: impl Into<Source>, tag: u32, buffer: &mut [u8]) -> Result<RawRequest> {
        let from = from.into();
        self.inner.check_process()?;
        if let Source::Rank(rank) = from {
            self.inner.check_rank(rank)?;
        }
        // SAFETY: the caller's promise; a dropped request is cancelled.
        let ticket = unsafe { self.inner.p2p.start_recv(from, tag.into(), buffer) };
        Ok(RawRequest { comm: self.inner.clone(), ticket: Some(ticket) })
    }
}
