//! Non-blocking requests whose buffers are borrowed until the scope ends.

use std::marker::PhantomData;

use super::engine::Ticket;
use super::{Source, Status};
use crate::collectives::{self, Collective, Value};
use crate::comm::Communicator;
use crate::error::Result;

/// Where non-blocking requests live: see [`Communicator::scope`].
pub struct Scope<'scope, 'env: 'scope> {
    comm: &'scope Communicator,
    tickets: std::cell::RefCell<Vec<Ticket>>,
    collectives: std::cell::RefCell<Vec<collectives::engine::Ticket>>,
    scope: PhantomData<&'scope mut &'scope ()>,
    env: PhantomData<&'env mut &'env ()>,
}

/// A message on its way. Forgetting it does no harm: the scope's end cancels what was not waited for.
pub struct Request<'scope> {
    comm: &'scope Communicator,
    ticket: Ticket,
}

impl Request<'_> {
    /// Blocks until the buffer may be used again. For a send the status names this rank, the tag and the length.
    ///
    /// # Errors
    /// As [`Communicator::send`] and [`Communicator::recv`].
    pub fn wait(self) -> Result<Status> {
        self.comm.inner.p2p.wait(&self.comm.inner, self.ticket)
    }

    /// Looks whether the request is done, without blocking. Once it has given a status, the request is over.
    ///
    /// # Errors
    /// As [`Communicator::send`] and [`Communicator::recv`].
    pub fn test(&mut self) -> Result<Option<Status>> {
        self.comm.inner.p2p.test(&self.comm.inner, self.ticket)
    }
}

/// A collective on its way. Forgetting it does no harm: the scope's end waits for it.
pub struct CollectiveRequest<'scope> {
    comm: &'scope Communicator,
    ticket: collectives::engine::Ticket,
}

impl CollectiveRequest<'_> {
    /// Blocks until this rank's part is over. After [`Error::Timeout`](crate::Error::Timeout) the collective is still on its way.
    ///
    /// # Errors
    /// As [`Communicator::collective`].
    pub fn wait(&mut self) -> Result<()> {
        self.comm.inner.collectives.wait(&self.comm.inner, self.ticket)
    }

    /// Looks whether this rank's part is over, without blocking, and moves it on.
    ///
    /// # Errors
    /// As [`Communicator::collective`].
    pub fn test(&mut self) -> Result<bool> {
        self.comm.inner.collectives.test(&self.comm.inner, self.ticket)
    }
}

/// Waits for several requests, in any order of completion, each up to the deadline; gives their statuses in the order given.
///
/// # Errors
/// The first error; the requests after it are cancelled when their scope ends.
pub fn wait_all<'scope>(requests: impl IntoIterator<Item = Request<'scope>>) -> Result<Vec<Status>> {
    requests.into_iter().map(Request::wait).collect()
}

impl<'scope, 'env> Scope<'scope, 'env> {
    /// Starts to send; `data` is borrowed until the scope ends.
    ///
    /// # Errors
    /// [`Error::InvalidRank`](crate::Error::InvalidRank).
    pub fn isend(&self, to: usize, tag: u32, data: &'env [u8]) -> Result<Request<'scope>> {
        let comm = &self.comm.inner;
        comm.check_rank(to)?;
        // SAFETY: `data` lives for 'env, which outlives the scope, and the scope's end forgets what is still pending.
        let ticket = unsafe { comm.p2p.start_send(comm, to, tag.into(), data) };
        Ok(self.request(ticket))
    }

    /// Starts to receive; `buffer` is borrowed until the scope ends.
    ///
    /// # Errors
    /// [`Error::InvalidRank`](crate::Error::InvalidRank).
    pub fn irecv(&self, from: impl Into<Source>, tag: u32, buffer: &'env mut [u8]) -> Result<Request<'scope>> {
        let comm = &self.comm.inner;
        let from = from.into();
        comm.check_process()?;
        if let Source::Rank(rank) = from {
            comm.check_rank(rank)?;
        }
        // SAFETY: `buffer` is borrowed for 'env, which outlives the scope, and the scope's end forgets what is still pending.
        let ticket = unsafe { comm.p2p.start_recv(from, tag.into(), buffer) };
        Ok(self.request(ticket))
    }

    /// Starts a collective; its buffers are borrowed until the scope ends, which waits for it. Several may be on their way: they
    /// are made in the order in which they were started, each moved on by whoever waits in this communicator.
    ///
    /// ```
    /// # use xccl::{Collective, Communicator, Config, ReduceOp, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let (mut sums, mut token) = ([1.0f32; 8], [7i32]);
    /// comm.scope(|scope| {
    ///     let mut sum = scope.start(Collective::AllReduce { send: None, recv: &mut sums, op: ReduceOp::Sum })?;
    ///     let mut next = scope.start(Collective::Broadcast { send: None, recv: &mut token, root: 0 })?;
    ///     next.wait()?;
    ///     sum.wait()
    /// })?;
    /// assert_eq!((sums[0], token[0]), (comm.world_size() as f32, 7));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Communicator::collective`].
    pub fn start<T: Value>(&self, collective: Collective<'env, T>) -> Result<CollectiveRequest<'scope>> {
        let comm = &self.comm.inner;
        // SAFETY: the buffers are borrowed for 'env, which outlives the scope, and the scope's end waits for what is on its way.
        let ask = unsafe { collective.ask(comm) }?;
        let ticket = comm.collectives.start(comm, ask)?;
        self.collectives.borrow_mut().push(ticket);
        Ok(CollectiveRequest { comm: self.comm, ticket })
    }

    fn request(&self, ticket: Ticket) -> Request<'scope> {
        self.tickets.borrow_mut().push(ticket);
        Request { comm: self.comm, ticket }
    }
}

impl Drop for Scope<'_, '_> {
    fn drop(&mut self) {
        for ticket in self.tickets.get_mut().drain(..) {
            self.comm.inner.p2p.cancel(&self.comm.inner, ticket);
        }
        for ticket in self.collectives.get_mut().drain(..) {
            self.comm.inner.collectives.settle(&self.comm.inner, ticket);
        }
    }
}

impl Communicator {
    /// Runs `f` with a scope for non-blocking requests, as `std::thread::scope` does for threads: buffers that outlive the
    /// scope may be lent to requests. Requests that were not waited for are cancelled at the end: a receive takes no message
    /// any more, a send that the receiver may have seen the beginning of is finished from a copy, or withdrawn
    /// ([`Error::Withdrawn`](crate::Error::Withdrawn)) where the receiver was to copy it, or it was leaving for another node
    /// straight from the symmetric heap. Collectives are waited for: the other ranks need this one's part.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let (message, mut buffer) = ([1u8; 8], [0u8; 8]);
    /// comm.scope(|scope| {
    ///     let receive = scope.irecv(0, 1, &mut buffer)?;
    ///     let send = scope.isend(0, 1, &message)?;
    ///     xccl::wait_all([send, receive])
    /// })?;
    /// assert_eq!(buffer, message);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// What `f` returns.
    pub fn scope<'env, R>(&self, f: impl for<'scope> FnOnce(&Scope<'scope, 'env>) -> Result<R>) -> Result<R> {
        let scope = Scope {
            comm: self,
            tickets: Default::default(),
            collectives: Default::default(),
            scope: PhantomData,
            env: PhantomData,
        };
        f(&scope)
    }
}
