//! Point-to-point messages: requests, and who moves them on.
//!
//! From each rank to each other one there is a ring of [slots](super::slot) and a ring of payload bytes in the sender's outbox;
//! who may touch a slot is told in [`ring`]. [`outgoing`](super::outgoing) fills them, [`incoming`](super::incoming) empties
//! them. Nobody works in the background: whoever waits for a request, or asks whether it is done, moves all of them on.

use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::Instant;

use super::incoming::{Incoming, Name};
use super::outgoing::{Outgoing, Progress, Traffic};
use super::slot::INLINE_BYTES;
use super::{Source, Status};
use crate::comm::inner::{Call, CommInner, lock};
use crate::error::{Error, Result};
use crate::memory::lent::{LentBuffer, LentBytes};
use crate::sync::progress::{Operation, Waiting};
use crate::sync::ring;

/// Tags of the application have 32 bits; those from here on are the library's own.
pub(crate) const INTERNAL_TAG: u64 = 1 << 32;

/// Names a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    tag: u64,
    request: Request,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    /// A send that was over when it started.
    Sent {
        len: usize,
    },
    Send {
        to: usize,
        number: u64,
        len: usize,
    },
    Recv {
        name: Name,
        from: Option<usize>,
    },
}

pub(crate) struct P2p {
    outgoing: Vec<Mutex<Outgoing>>,
    incoming: Mutex<Incoming>,
    /// Sends that wait for room, over all destinations: spares receives the look at every destination.
    unsent: AtomicUsize,
    /// Slots filled and emptied by calls that wait, over all ranks.
    moved: AtomicU64,
    /// From how many bytes on the receiver reads a message from this rank's private memory.
    private_rendezvous: AtomicUsize,
}

impl P2p {
    pub(crate) fn new(world_size: usize) -> Self {
        P2p {
            outgoing: (0..world_size).map(|_| Mutex::new(Outgoing::new())).collect(),
            incoming: Mutex::new(Incoming::new(world_size)),
            unsent: AtomicUsize::new(0),
            moved: AtomicU64::new(0),
            private_rendezvous: AtomicUsize::new(usize::MAX),
        }
    }

    /// Goes on as if so many messages had come and gone.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn grow_old(&self, comm: &CommInner) {
        let age = comm.layout.age;
        for (rank, outgoing) in self.outgoing.iter().enumerate() {
            lock(outgoing).grow_old(age);
            ring::release(comm.fabric.outbox.word64(comm.layout.consumed(rank)), age);
            if comm.fabric.far_to(rank).is_some() {
                ring::release(comm.fabric.peer(rank).outbox.word64(comm.layout.consumed(comm.rank)), age);
            }
        }
        lock(&self.incoming).grow_old(age);
    }

    pub(super) fn private_rendezvous(&self) -> usize {
        self.private_rendezvous.load(Relaxed)
    }

    /// Lets messages of so many bytes and more be read from private memory, or none.
    pub(crate) fn set_private_rendezvous(&self, from: Option<usize>) {
        self.private_rendezvous.store(from.unwrap_or(usize::MAX), Relaxed);
    }

    /// Starts a send.
    ///
    /// # Safety
    /// `data` stays readable and unchanged until [`wait`](Self::wait) or [`test`](Self::test) says that the request is done,
    /// or [`cancel`](Self::cancel) returns.
    pub(crate) unsafe fn start_send(&self, comm: &CommInner, to: usize, tag: u64, data: &[u8]) -> Ticket {
        let len = data.len();
        let sent = Ticket { tag, request: Request::Sent { len } };
        if to == comm.rank {
            self.send_to_itself(comm, tag, data);
            return sent;
        }
        if len <= INLINE_BYTES && self.send_at_once(comm, to, tag, data) {
            return sent;
        }
        // SAFETY: the caller's promise.
        let bytes = unsafe { LentBytes::new(data) };
        let (number, progress) = {
            let mut out = lock(&self.outgoing[to]);
            let (number, progress) = out.start(comm, to, tag, bytes);
            if progress == Progress::Waits {
                self.unsent.fetch_add(1, Relaxed);
            }
            (number, progress)
        };
        match progress {
            Progress::Sent => sent,
            Progress::Waits | Progress::Described => Ticket { tag, request: Request::Send { to, number, len } },
        }
    }

    /// Messages to itself are always buffered.
    fn send_to_itself(&self, comm: &CommInner, tag: u64, data: &[u8]) {
        lock(&self.outgoing[comm.rank]).traffic.count(data.len());
        lock(&self.incoming).deliver_own(comm, tag, data);
    }

    /// Starts a receive.
    ///
    /// # Safety
    /// `buffer` stays writable and unused until [`wait`](Self::wait) or [`test`](Self::test) says that the request is done, or
    /// [`cancel`](Self::cancel) returns.
    pub(crate) unsafe fn start_recv(&self, from: Source, tag: u64, buffer: &mut [u8]) -> Ticket {
        // SAFETY: the caller's promise.
        let buffer = unsafe { LentBuffer::new(buffer) };
        let name = lock(&self.incoming).post(from, tag, buffer);
        let from = if let Source::Rank(rank) = from { Some(rank) } else { None };
        Ticket { tag, request: Request::Recv { name, from } }
    }

    pub(crate) fn wait(&self, comm: &CommInner, ticket: Ticket) -> Result<Status> {
        let (operation, peer) = match ticket.request {
            Request::Sent { len } => return Ok(Status { source: comm.rank, tag: ticket.tag as u32, len }),
            Request::Send { to, .. } => (Operation::Send, Some(to)),
            Request::Recv { from, .. } => (Operation::Recv, from),
        };
        let what = Waiting { operation, epoch: ticket.tag, peer };
        let (mut call, mut since, mut moved) = (Call::default(), None, self.moved.load(Relaxed));
        loop {
            // A long message is many short waits: who helps to move one must not get tired of it, yield and sleep. Past the
            // deadline that ends, so that others' messages never hold up the error.
            let over = comm.wait_in(&mut call, what, || {
                comm.collectives.progress(comm);
                if let Some(result) = self.test(comm, ticket).transpose() {
                    return Some(Some(result));
                }
                let before = std::mem::replace(&mut moved, self.moved.load(Relaxed));
                let mut is_early =
                    || comm.config.timeout.is_none_or(|t| since.get_or_insert_with(Instant::now).elapsed() < t);
                (before != moved && is_early()).then_some(None)
            })?;
            if let Some(result) = over {
                return result;
            }
        }
    }

    pub(crate) fn test(&self, comm: &CommInner, ticket: Ticket) -> Result<Option<Status>> {
        comm.check_process()?;
        match ticket.request {
            Request::Sent { len } => Ok(Some(Status { source: comm.rank, tag: ticket.tag as u32, len })),
            Request::Send { to, number, len } => {
                if !self.is_over(comm, to, number) {
                    // The receiver may be waiting for us to take its messages first.
                    self.push_waiting(comm);
                    self.pull(comm, &mut lock(&self.incoming))?;
                    if !self.is_over(comm, to, number) {
                        return Ok(None);
                    }
                }
                Ok(Some(Status { source: comm.rank, tag: ticket.tag as u32, len }))
            }
            Request::Recv { name, .. } => {
                self.push_waiting(comm);
                let mut incoming = lock(&self.incoming);
                let result = match incoming.take_result(name) {
                    None => {
                        self.pull(comm, &mut incoming)?;
                        incoming.take_result(name)
                    }
                    found => found,
                };
                result.transpose().map_err(|err| match err {
                    Error::Withdrawn { .. } => comm.or_the_end(err, Operation::Recv, ticket.tag),
                    err => err,
                })
            }
        }
    }

    fn is_over(&self, comm: &CommInner, to: usize, number: u64) -> bool {
        let mut out = lock(&self.outgoing[to]);
        self.push(comm, to, &mut out);
        out.is_over(comm, to, number)
    }

    /// Moves sends on, as far as it goes. For calls that wait for something else.
    pub(crate) fn progress(&self, comm: &CommInner) {
        self.push_waiting(comm);
    }

    fn push_waiting(&self, comm: &CommInner) {
        for to in 0..comm.world_size {
            if self.unsent.load(Relaxed) == 0 {
                break;
            }
            self.push(comm, to, &mut lock(&self.outgoing[to]));
        }
    }

    fn push(&self, comm: &CommInner, to: usize, out: &mut Outgoing) {
        let before = out.waiting();
        if before > 0 {
            let filled = out.filled();
            out.push(comm, to);
            self.moved.fetch_add(out.filled() - filled, Relaxed);
            self.unsent.fetch_sub(before - out.waiting(), Relaxed);
        }
    }

    fn pull(&self, comm: &CommInner, incoming: &mut Incoming) -> Result<()> {
        let taken = incoming.taken;
        let pulled = incoming.pull(comm);
        if incoming.taken != taken {
            self.moved.fetch_add(incoming.taken - taken, Relaxed);
        }
        pulled
    }

    /// What this rank has sent and received, and how many rendezvous it has begun.
    pub(crate) fn traffic(&self) -> (Traffic, Traffic, u64) {
        let (mut sent, mut rendezvous) = (Traffic::default(), 0);
        for out in &self.outgoing {
            let out = lock(out);
            sent.messages += out.traffic.messages;
            sent.bytes += out.traffic.bytes;
            rendezvous += out.rendezvous_counted;
        }
        (sent, lock(&self.incoming).traffic, rendezvous)
    }

    /// As [`traffic`](Self::traffic); `None` while another thread is at it.
    pub(crate) fn traffic_if_free(&self) -> Option<(Traffic, Traffic, u64)> {
        let (mut sent, mut rendezvous) = (Traffic::default(), 0);
        for out in &self.outgoing {
            let out = out.try_lock().ok()?;
            sent.messages += out.traffic.messages;
            sent.bytes += out.traffic.bytes;
            rendezvous += out.rendezvous_counted;
        }
        Some((sent, self.incoming.try_lock().ok()?.traffic, rendezvous))
    }

    /// Counts from here on.
    pub(crate) fn forget_traffic(&self) {
        for out in &self.outgoing {
            let mut out = lock(out);
            (out.traffic, out.rendezvous_counted) = (Traffic::default(), 0);
        }
        lock(&self.incoming).traffic = Traffic::default();
    }

    /// Sends and waits.
    pub(crate) fn send(&self, comm: &CommInner, to: usize, tag: u64, data: &[u8]) -> Result<()> {
        // SAFETY: `data` is borrowed until the request has been waited for and, if that failed, cancelled.
        let ticket = unsafe { self.start_send(comm, to, tag, data) };
        if let Request::Sent { .. } = ticket.request {
            return Ok(());
        }
        let sent = self.wait(comm, ticket);
        if sent.is_err() {
            self.cancel(comm, ticket);
        }
        sent.map(|_| ())
    }

    /// Sends a short message if there is room for it now and nothing stands before it: no request has to be kept.
    fn send_at_once(&self, comm: &CommInner, to: usize, tag: u64, data: &[u8]) -> bool {
        let sent = lock(&self.outgoing[to]).start_short(comm, to, tag, data);
        if sent {
            comm.notify(to);
        }
        sent
    }

    /// Receives a message straight from its slot or its one piece of the ring, if nothing else is asked for. Waits for the next
    /// message of `from`, whatever it is, without a lock if that takes long; `None` when it is not such a one.
    fn recv_at_once(
        &self,
        comm: &CommInner,
        from: usize,
        tag: u64,
        buffer: &mut [u8],
        what: Waiting,
    ) -> Result<Option<Status>> {
        let mut incoming = lock(&self.incoming);
        if !incoming.is_idle(from, tag) || self.unsent.load(Relaxed) > 0 {
            return Ok(None);
        }
        let (n, slot) = incoming.slot(comm, from);
        let has_come = || ring::reached(slot.turn(), n).then_some(());
        // The lock is kept for less than it takes to get it again.
        if comm.briefly(has_come).is_none() {
            drop(incoming);
            comm.wait(what, has_come)?;
            incoming = lock(&self.incoming);
            // Another thread may have taken it meanwhile, or asked for something.
            if incoming.slot(comm, from).0 != n || !incoming.is_idle(from, tag) {
                return Ok(None);
            }
        }
        incoming.take_whole(comm, from, tag, buffer)
    }

    /// Receives and waits.
    pub(crate) fn recv(&self, comm: &CommInner, from: Source, tag: u64, buffer: &mut [u8]) -> Result<Status> {
        comm.check_process()?;
        if let Source::Rank(rank) = from
            && rank != comm.rank
        {
            let what = Waiting { operation: Operation::Recv, epoch: tag, peer: Some(rank) };
            if let Some(status) = self.recv_at_once(comm, rank, tag, buffer, what)? {
                return Ok(status);
            }
        }
        // SAFETY: `buffer` is borrowed until the request has been waited for and, if that failed, cancelled.
        let ticket = unsafe { self.start_recv(from, tag, buffer) };
        let received = self.wait(comm, ticket);
        if received.is_err() {
            self.cancel(comm, ticket);
        }
        received
    }

    /// Forgets a request, so that its buffer is free: a receive takes no message, a send goes on from a copy or is withdrawn.
    pub(crate) fn cancel(&self, comm: &CommInner, ticket: Ticket) {
        if comm.is_forked() {
            return;
        }
        match ticket.request {
            Request::Sent { .. } => {}
            Request::Send { to, number, .. } => {
                let mut out = lock(&self.outgoing[to]);
                let before = out.waiting();
                out.cancel(comm, to, number);
                self.unsent.fetch_sub(before - out.waiting(), Relaxed);
            }
            Request::Recv { name, .. } => lock(&self.incoming).cancel(comm, name),
        }
    }
}
