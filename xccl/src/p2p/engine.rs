//! The protocol of point-to-point messages.
//!
//! From each rank to each other one there is a ring of slots and a ring of payload bytes in the sender's outbox; who may
//! touch a slot is told in [`ring`]. A slot is one cache line: turn word, tag, kind, length, and 40 bytes that hold either
//! the payload or where it is. A long message takes several slots: the first names its whole length, the following ones carry
//! more of it, and nothing else comes between, so that one message at a time is being put together per source.
//!
//! A rendezvous has a number, counted per pair of ranks; when the receiver has copied the payload it stores that number into
//! the word of its own outbox that belongs to it (number modulo [`SLOTS`]). The sender uses a number only when the one
//! `SLOTS` before it is finished, so a word is never overwritten before it was seen, in whatever order they finish.
//!
//! Everything that a descriptor says is copied out and checked against the ring, the heap and the message's length before it
//! is used.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use bytemuck::{Pod, Zeroable};

use super::{Source, Status};
use crate::comm::inner::{CommInner, lock};
use crate::comm::layout::SLOTS;
use crate::error::{Error, Result};
use crate::fabric::cma;
use crate::sync::progress::{Operation, Waiting};
use crate::sync::ring;

const INLINE_BYTES: usize = 40;
/// Payloads start on cache lines, so that sender and receiver do not meet on one.
const PAYLOAD_ALIGN: u64 = 64;

/// What follows the turn word in a slot.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Descriptor {
    tag: u32,
    kind: u32,
    /// Bytes of the whole message; for `MORE`, of this piece.
    len: u64,
    body: [u8; INLINE_BYTES],
}

const _: () = assert!(size_of::<Descriptor>() == 56);

/// The payload is the body.
const INLINE: u32 = 0;
/// The (first piece of the) payload is in the ring: position, bytes of the piece.
const RING: u32 = 1;
/// A further piece is in the ring: position.
const MORE: u32 = 2;
/// The payload is in the sender's symmetric heap: offset, number of the rendezvous.
const HEAP: u32 = 3;
/// The payload is in the sender's private memory: address, number of the rendezvous.
const PRIVATE: u32 = 4;

impl Descriptor {
    fn new(tag: u32, kind: u32, len: usize, words: [u64; 2]) -> Self {
        let mut body = [0; INLINE_BYTES];
        body[..16].copy_from_slice(bytemuck::bytes_of(&words));
        Descriptor { tag, kind, len: len as u64, body }
    }

    fn inline(tag: u32, data: &[u8]) -> Self {
        let mut descriptor = Descriptor { tag, kind: INLINE, len: data.len() as u64, body: [0; INLINE_BYTES] };
        descriptor.body[..data.len()].copy_from_slice(data);
        descriptor
    }

    fn words(&self) -> [u64; 2] {
        bytemuck::pod_read_unaligned(&self.body[..16])
    }
}

/// Names a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ticket {
    Send { to: usize, number: u64, tag: u32, len: usize },
    Recv { number: u64, from: Option<usize>, tag: u32 },
}

/// Bytes of a request: lent until it is cancelled, or a copy.
enum Bytes {
    Lent(*const u8, usize),
    Owned(Vec<u8>),
}

// SAFETY: whoever lent the bytes promised that they stay readable until the request ends, from whichever thread.
unsafe impl Send for Bytes {}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            // SAFETY: readable until the request ends, by the promise of `start_send`'s caller.
            Bytes::Lent(at, len) => unsafe { std::slice::from_raw_parts(*at, *len) },
            Bytes::Owned(bytes) => bytes,
        }
    }
}

struct PendingSend {
    number: u64,
    tag: u32,
    bytes: Bytes,
    /// Bytes that are in the ring already.
    done: usize,
}

/// Messages and bytes: counted under the lock that is held anyway.
#[derive(Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
}

impl Traffic {
    fn count(&mut self, bytes: usize) {
        self.messages += 1;
        self.bytes += bytes as u64;
    }
}

/// The sending side of one pair.
struct Outgoing {
    traffic: Traffic,
    /// Slots filled.
    next: u64,
    /// Slots that the receiver had consumed when last looked at: its word is read again only when this leaves no room,
    /// since it has just written it, and the line would have to come over before each message.
    consumed: u64,
    /// End of the payload ring's used part, in bytes since the beginning.
    head: u64,
    /// The payload ring's end after each slot.
    ends: [u64; SLOTS],
    /// Rendezvous started.
    rendezvous: u64,
    /// Requests so far; those that wait for room; those that wait for the receiver's copy, with the rendezvous' number.
    started: u64,
    waiting: VecDeque<PendingSend>,
    described: Vec<(u64, u64)>,
}

/// Where a message is, before it is received.
enum Held {
    /// All of a short message, without an allocation.
    Inline([u8; INLINE_BYTES]),
    Bytes(Vec<u8>),
    Heap {
        offset: u64,
        rendezvous: u64,
    },
    Private {
        address: u64,
        rendezvous: u64,
    },
}

impl Held {
    /// Bytes that it takes of this rank's memory.
    fn bytes(&self) -> usize {
        match self {
            Held::Inline(_) => INLINE_BYTES,
            Held::Bytes(bytes) => bytes.len(),
            Held::Heap { .. } | Held::Private { .. } => 0,
        }
    }
}

struct Message {
    tag: u32,
    len: usize,
    held: Held,
}

struct Posted {
    number: u64,
    from: Source,
    tag: u32,
    buffer: (*mut u8, usize),
    result: Option<Result<Status>>,
}

// SAFETY: whoever lent the buffer promised that it stays writable until the request ends, from whichever thread.
unsafe impl Send for Posted {}

/// The receiving side, all sources.
#[derive(Default)]
struct Incoming {
    traffic: Traffic,
    /// Slots consumed, per source.
    next: Vec<u64>,
    /// The long message that is being put together, per source, with its bytes still missing.
    partial: Vec<Option<(u32, usize, Vec<u8>)>>,
    /// Messages that no receive has asked for yet, per source.
    unexpected: Vec<VecDeque<Message>>,
    held_bytes: usize,
    posted: Vec<Posted>,
    started: u64,
}

pub(crate) struct P2p {
    outgoing: Vec<Mutex<Outgoing>>,
    incoming: Mutex<Incoming>,
    /// Sends that wait for room, over all destinations: spares receives the look at every destination.
    unsent: AtomicUsize,
}

impl P2p {
    pub(crate) fn new(world_size: usize) -> Self {
        let outgoing = || Outgoing {
            traffic: Traffic::default(),
            next: 0,
            consumed: 0,
            head: 0,
            ends: [0; SLOTS],
            rendezvous: 0,
            started: 0,
            waiting: VecDeque::new(),
            described: vec![],
        };
        let incoming = Incoming {
            next: vec![0; world_size],
            partial: (0..world_size).map(|_| None).collect(),
            unexpected: (0..world_size).map(|_| VecDeque::new()).collect(),
            ..Incoming::default()
        };
        P2p {
            outgoing: (0..world_size).map(|_| Mutex::new(outgoing())).collect(),
            incoming: Mutex::new(incoming),
            unsent: AtomicUsize::new(0),
        }
    }

    /// Starts a send.
    ///
    /// # Safety
    /// `data` stays readable and unchanged until [`wait`](Self::wait) or [`test`](Self::test) says that the request is done,
    /// or [`cancel`](Self::cancel) returns.
    pub(crate) unsafe fn start_send(&self, comm: &CommInner, to: usize, tag: u32, data: &[u8]) -> Result<Ticket> {
        let mut out = lock(&self.outgoing[to]);
        out.traffic.count(data.len());
        let number = out.started;
        out.started += 1;
        if to == comm.rank {
            let message = Message { tag, len: data.len(), held: Held::Bytes(data.to_vec()) };
            lock(&self.incoming).deliver(comm, to, message)?;
        } else {
            out.waiting.push_back(PendingSend { number, tag, bytes: Bytes::Lent(data.as_ptr(), data.len()), done: 0 });
            self.unsent.fetch_add(1, Relaxed);
            self.push(comm, to, &mut out);
        }
        Ok(Ticket::Send { to, number, tag, len: data.len() })
    }

    /// Starts a receive.
    ///
    /// # Safety
    /// `buffer` stays writable and unused until [`wait`](Self::wait) or [`test`](Self::test) says that the request is done, or
    /// [`cancel`](Self::cancel) returns.
    pub(crate) unsafe fn start_recv(&self, from: Source, tag: u32, buffer: &mut [u8]) -> Ticket {
        let mut incoming = lock(&self.incoming);
        let number = incoming.started;
        incoming.started += 1;
        let buffer = (buffer.as_mut_ptr(), buffer.len());
        incoming.posted.push(Posted { number, from, tag, buffer, result: None });
        let from = if let Source::Rank(rank) = from { Some(rank) } else { None };
        Ticket::Recv { number, from, tag }
    }

    pub(crate) fn wait(&self, comm: &CommInner, ticket: Ticket) -> Result<Status> {
        let (operation, tag, peer) = match ticket {
            Ticket::Send { to, tag, .. } => (Operation::Send, tag, Some(to)),
            Ticket::Recv { from, tag, .. } => (Operation::Recv, tag, from),
        };
        let what = Waiting { operation, epoch: tag.into(), peer };
        comm.wait(what, || self.test(comm, ticket).transpose())?
    }

    pub(crate) fn test(&self, comm: &CommInner, ticket: Ticket) -> Result<Option<Status>> {
        match ticket {
            Ticket::Send { to, number, tag, len } => {
                if !self.sent(comm, to, number) {
                    // The receiver may be waiting for us to take its messages first.
                    self.progress(comm)?;
                    if !self.sent(comm, to, number) {
                        return Ok(None);
                    }
                }
                Ok(Some(Status { source: comm.rank, tag, len }))
            }
            Ticket::Recv { number, .. } => {
                if self.unsent.load(Relaxed) > 0 {
                    self.push_waiting(comm);
                }
                let mut incoming = lock(&self.incoming);
                incoming.pull(comm)?;
                let Some(at) = incoming.posted.iter().position(|p| p.number == number) else { return Ok(None) };
                if incoming.posted[at].result.is_none() {
                    return Ok(None);
                }
                let posted = incoming.posted.remove(at);
                posted.result.transpose()
            }
        }
    }

    fn sent(&self, comm: &CommInner, to: usize, number: u64) -> bool {
        let mut out = lock(&self.outgoing[to]);
        self.push(comm, to, &mut out);
        let is_waiting = out.waiting.iter().any(|w| w.number == number);
        !is_waiting && !out.described.iter().any(|&(n, _)| n == number)
    }

    /// Moves everything that can be moved without waiting.
    fn progress(&self, comm: &CommInner) -> Result<()> {
        self.push_waiting(comm);
        lock(&self.incoming).pull(comm)
    }

    fn push_waiting(&self, comm: &CommInner) {
        for to in 0..comm.world_size {
            let mut out = lock(&self.outgoing[to]);
            if !out.waiting.is_empty() {
                self.push(comm, to, &mut out);
            }
        }
    }

    fn push(&self, comm: &CommInner, to: usize, out: &mut Outgoing) {
        let before = out.waiting.len();
        out.push(comm, to);
        self.unsent.fetch_sub(before - out.waiting.len(), Relaxed);
    }

    /// What this rank has sent and received, and how many rendezvous it has begun.
    pub(crate) fn traffic(&self) -> (Traffic, Traffic, u64) {
        let (mut sent, mut rendezvous) = (Traffic::default(), 0);
        for out in &self.outgoing {
            let out = lock(out);
            sent.messages += out.traffic.messages;
            sent.bytes += out.traffic.bytes;
            rendezvous += out.rendezvous;
        }
        (sent, lock(&self.incoming).traffic, rendezvous)
    }

    /// Sends and waits.
    pub(crate) fn send(&self, comm: &CommInner, to: usize, tag: u32, data: &[u8]) -> Result<()> {
        if to != comm.rank && data.len() <= INLINE_BYTES && self.send_at_once(comm, to, tag, data) {
            return Ok(());
        }
        // SAFETY: `data` is borrowed until the request has been waited for and, if that failed, cancelled.
        let ticket = unsafe { self.start_send(comm, to, tag, data)? };
        let sent = self.wait(comm, ticket);
        if sent.is_err() {
            self.cancel(ticket);
        }
        sent.map(|_| ())
    }

    /// Sends a short message if there is room for it now and nothing stands before it: no request has to be kept.
    fn send_at_once(&self, comm: &CommInner, to: usize, tag: u32, data: &[u8]) -> bool {
        let mut out = lock(&self.outgoing[to]);
        if !out.waiting.is_empty() || !out.has_slot(comm, to) {
            return false;
        }
        out.fill_slot(comm, to, &Descriptor::inline(tag, data));
        out.traffic.count(data.len());
        drop(out);
        comm.notify(to);
        true
    }

    /// Receives a short message straight from its slot, if nothing else is asked for or kept. Waits for the next message of
    /// `from`, whatever it is, without a lock if that takes long; `None` when it is not such a one.
    fn recv_at_once(
        &self,
        comm: &CommInner,
        from: usize,
        tag: u32,
        buffer: &mut [u8],
        what: Waiting,
    ) -> Result<Option<Status>> {
        let mut incoming = lock(&self.incoming);
        if !incoming.is_idle(from) || self.unsent.load(Relaxed) > 0 {
            return Ok(None);
        }
        let n = incoming.next[from];
        let slot = comm.layout.slot(comm.rank, n);
        let turn = comm.fabric.peer(from).outbox.word64(slot);
        let has_come = || ring::reached(turn, n).then_some(());
        // The lock is kept for less than it takes to get it again.
        if comm.briefly(has_come).is_none() {
            drop(incoming);
            comm.wait(what, has_come)?;
            incoming = lock(&self.incoming);
            // Another thread may have taken it meanwhile, or asked for something.
            if incoming.next[from] != n || !incoming.is_idle(from) {
                return Ok(None);
            }
        }
        let mut descriptor = [Descriptor::zeroed()];
        comm.fabric.peer(from).outbox.read_into(slot + 8, &mut descriptor);
        let [Descriptor { tag: theirs, kind: INLINE, len, body }] = descriptor else { return Ok(None) };
        let len = len as usize;
        if theirs != tag || len > buffer.len().min(INLINE_BYTES) {
            return Ok(None);
        }
        buffer[..len].copy_from_slice(&body[..len]);
        incoming.traffic.count(len);
        incoming.release(comm, from, INLINE);
        Ok(Some(Status { source: from, tag, len }))
    }

    /// Receives and waits.
    pub(crate) fn recv(&self, comm: &CommInner, from: Source, tag: u32, buffer: &mut [u8]) -> Result<Status> {
        if let Source::Rank(rank) = from
            && rank != comm.rank
        {
            let what = Waiting { operation: Operation::Recv, epoch: tag.into(), peer: Some(rank) };
            if let Some(status) = self.recv_at_once(comm, rank, tag, buffer, what)? {
                return Ok(status);
            }
        }
        // SAFETY: `buffer` is borrowed until the request has been waited for and, if that failed, cancelled.
        let ticket = unsafe { self.start_recv(from, tag, buffer) };
        let received = self.wait(comm, ticket);
        if received.is_err() {
            self.cancel(ticket);
        }
        received
    }

    /// Forgets a request, so that its buffer is free: a receive takes no message, a send goes on from a copy.
    pub(crate) fn cancel(&self, ticket: Ticket) {
        match ticket {
            Ticket::Send { to, number, .. } => {
                let mut out = lock(&self.outgoing[to]);
                out.described.retain(|&(n, _)| n != number);
                let Some(at) = out.waiting.iter().position(|w| w.number == number) else { return };
                if out.waiting[at].done == 0 {
                    out.waiting.remove(at);
                    self.unsent.fetch_sub(1, Relaxed);
                } else {
                    let copy = out.waiting[at].bytes.as_slice().to_vec();
                    out.waiting[at].bytes = Bytes::Owned(copy);
                }
            }
            Ticket::Recv { number, .. } => lock(&self.incoming).posted.retain(|p| p.number != number),
        }
    }
}

impl Outgoing {
    /// Puts as much of the waiting sends into the ring as there is room for, and forgets the rendezvous that are finished.
    fn push(&mut self, comm: &CommInner, to: usize) {
        let theirs = &comm.fabric.peer(to).outbox;
        self.described.retain(|&(_, rendezvous)| {
            let word = theirs.word64(comm.layout.finished(comm.rank, rendezvous as usize % SLOTS));
            word.load(Acquire) < rendezvous
        });
        let mut pushed = false;
        while let Some(mut send) = self.waiting.pop_front() {
            let (fits, is_done) = self.push_one(comm, to, &mut send);
            pushed |= fits;
            if !is_done {
                self.waiting.push_front(send);
            }
            if !fits {
                break;
            }
        }
        if pushed {
            comm.notify(to);
        }
    }

    /// Fills one slot for `send`. Says whether there was room, and whether the send needs no further slot.
    fn push_one(&mut self, comm: &CommInner, to: usize, send: &mut PendingSend) -> (bool, bool) {
        let (own, layout) = (&comm.fabric.outbox, &comm.layout);
        if !self.has_slot(comm, to) {
            return (false, false);
        }
        let data = send.bytes.as_slice();
        let mut is_done = true;
        let descriptor = if data.len() <= INLINE_BYTES {
            Descriptor::inline(send.tag, data)
        } else if let Some((kind, at)) = self.source(comm, to, send).filter(|_| self.may_describe()) {
            let rendezvous = self.rendezvous + 1;
            self.rendezvous = rendezvous;
            self.described.push((send.number, rendezvous));
            Descriptor::new(send.tag, kind, data.len(), [at, rendezvous])
        } else {
            if self.room(comm).is_none_or(|(_, room)| room < data.len() - send.done) {
                self.look_at_receiver(comm, to);
            }
            let Some((at, room)) = self.room(comm) else { return (false, false) };
            let rest = &data[send.done..];
            let piece = &rest[..rest.len().min(room)];
            own.write(layout.payload(to) + (at % layout.ring_bytes as u64) as usize, piece);
            self.head = at + piece.len() as u64;
            let first = send.done == 0;
            send.done += piece.len();
            is_done = send.done == data.len();
            match first {
                true => Descriptor::new(send.tag, RING, data.len(), [at, piece.len() as u64]),
                false => Descriptor::new(send.tag, MORE, piece.len(), [at, 0]),
            }
        };
        self.fill_slot(comm, to, &descriptor);
        (true, is_done)
    }

    /// Whether the next slot is free.
    fn has_slot(&mut self, comm: &CommInner, to: usize) -> bool {
        let is_free = |out: &Self| ring::may_fill(out.consumed, out.next, SLOTS as u64);
        if !is_free(self) {
            self.look_at_receiver(comm, to);
        }
        is_free(self)
    }

    /// Publishes the next slot, which is free.
    fn fill_slot(&mut self, comm: &CommInner, to: usize, descriptor: &Descriptor) {
        let (own, slot) = (&comm.fabric.outbox, comm.layout.slot(to, self.next));
        own.write(slot + 8, bytemuck::bytes_of(descriptor));
        ring::complete(own.word64(slot), self.next);
        self.ends[(self.next % SLOTS as u64) as usize] = self.head;
        self.next += 1;
    }

    /// Whether the next rendezvous' word is free. If not, the payload goes through the ring: a receiver that wants a later
    /// message first would otherwise wait for ever.
    fn may_describe(&self) -> bool {
        self.described.iter().all(|&(_, r)| r + SLOTS as u64 > self.rendezvous + 1)
    }

    /// How the receiver can reach the payload itself, if it can and that pays.
    fn source(&self, comm: &CommInner, to: usize, send: &PendingSend) -> Option<(u32, u64)> {
        let data = send.bytes.as_slice();
        if send.done > 0 || data.len() < comm.config.rendezvous_bytes {
            return None;
        }
        let heap = &comm.fabric.peer(comm.rank).heap;
        let (start, address) = (heap.at(0, 0) as usize, data.as_ptr() as usize);
        if address >= start && address + data.len() <= start + heap.len() {
            return Some((HEAP, (address - start) as u64));
        }
        comm.can_read_me(to).then_some((PRIVATE, address as u64))
    }

    fn look_at_receiver(&mut self, comm: &CommInner, to: usize) {
        self.consumed = ring::released(comm.fabric.peer(to).outbox.word64(comm.layout.consumed(comm.rank)));
    }

    /// A free piece of the payload ring: where, and how many bytes up to the ring's end or to what is still unread.
    fn room(&self, comm: &CommInner) -> Option<(u64, usize)> {
        let ring = comm.layout.ring_bytes as u64;
        let unread = self.next.saturating_sub(self.consumed) > 0;
        let tail = match self.consumed {
            _ if !unread => self.head,
            0 => 0,
            n => self.ends[((n - 1) % SLOTS as u64) as usize],
        };
        let at = self.head.next_multiple_of(PAYLOAD_ALIGN);
        let free = (tail + ring).checked_sub(at)?.min(ring - at % ring);
        // Short pieces cost a slot each: half a ring at least, unless the ring's end is near.
        (free > 0).then_some((at, free.min(ring / 2) as usize))
    }
}

impl Incoming {
    /// Takes all messages that are wanted, or that stand before wanted ones.
    fn pull(&mut self, comm: &CommInner) -> Result<()> {
        self.match_unexpected(comm);
        for source in 0..comm.world_size {
            while source != comm.rank && self.wants(source) && self.pull_one(comm, source)? {}
        }
        Ok(())
    }

    /// Tells the sender that the next slot of `source` was copied out.
    fn release(&mut self, comm: &CommInner, source: usize, kind: u32) {
        let n = self.next[source];
        self.next[source] = n + 1;
        ring::release(comm.fabric.outbox.word64(comm.layout.consumed(source)), n + 1);
        // The sender sleeps only when slots or payload ran out. For slots it is enough to tell it now and then: the fence
        // costs a fifth of a short message. What is left untold meanwhile is found at the end of its slice of sleep.
        if kind != INLINE || n.is_multiple_of(SLOTS as u64 / 4) {
            comm.notify(source);
        }
    }

    /// Whether the next message of `source` can only be for who asks next: nothing is asked for, kept or half received.
    fn is_idle(&self, source: usize) -> bool {
        self.posted.is_empty() && self.unexpected[source].is_empty() && self.partial[source].is_none()
    }

    fn wants(&self, source: usize) -> bool {
        self.posted.iter().any(|p| p.result.is_none() && (p.from == Source::Any || p.from == Source::Rank(source)))
    }

    /// Gives messages that came earlier to receives that were posted since.
    fn match_unexpected(&mut self, comm: &CommInner) {
        for i in 0..self.posted.len() {
            if self.posted[i].result.is_some() {
                continue;
            }
            let (from, tag) = (self.posted[i].from, self.posted[i].tag);
            for source in (0..comm.world_size).filter(|&s| from == Source::Any || from == Source::Rank(s)) {
                let Some(at) = self.unexpected[source].iter().position(|m| m.tag == tag) else { continue };
                if self.unexpected[source][at].len > self.posted[i].buffer.1 {
                    self.truncate(i, source, self.unexpected[source][at].len);
                } else if let Some(message) = self.unexpected[source].remove(at) {
                    self.held_bytes -= message.held.bytes();
                    self.complete(comm, i, source, message);
                }
                break;
            }
        }
    }

    fn truncate(&mut self, posted: usize, from: usize, len: usize) {
        let posted = &mut self.posted[posted];
        posted.result = Some(Err(Error::Truncated { from, tag: posted.tag, len, capacity: posted.buffer.1 }));
    }

    /// Looks at the next slot of `source`; says whether there was something.
    fn pull_one(&mut self, comm: &CommInner, source: usize) -> Result<bool> {
        let (theirs, layout) = (&comm.fabric.peer(source).outbox, &comm.layout);
        let n = self.next[source];
        let slot = layout.slot(comm.rank, n);
        if !ring::has(theirs.word64(slot), n) {
            return Ok(false);
        }
        let mut descriptor = [Descriptor::zeroed()];
        theirs.read_into(slot + 8, &mut descriptor);
        let [descriptor] = descriptor;
        let (tag, [a, b]) = (descriptor.tag, descriptor.words());
        let wrong = |what, value, limit: usize| Error::Corrupt { rank: source, what, value, limit: limit as u64 };
        let corrupt = |what, value, limit| Err(wrong(what, value, limit));
        let Ok(len) = usize::try_from(descriptor.len) else {
            return corrupt("a message's length", descriptor.len, usize::MAX);
        };

        if self.held_bytes > comm.config.unexpected_bytes && !self.wants_tag(source, tag) {
            return Err(self.full(comm));
        }
        let from_ring = |at: u64, piece: usize, into: &mut Vec<u8>| {
            let offset = (at % layout.ring_bytes as u64) as usize;
            if piece > layout.ring_bytes - offset {
                return Err(wrong("a piece's length", piece as u64, layout.ring_bytes - offset));
            }
            let filled = into.len();
            into.resize(filled + piece, 0);
            theirs.read(layout.payload(comm.rank) + offset, &mut into[filled..]);
            Ok(())
        };
        let message = match descriptor.kind {
            INLINE if len <= INLINE_BYTES => Some(Held::Inline(descriptor.body)),
            RING if b as usize <= len => {
                // No more is set aside than has come: a length alone allocates nothing.
                let mut bytes = vec![];
                from_ring(a, b as usize, &mut bytes)?;
                if bytes.len() == len {
                    Some(Held::Bytes(bytes))
                } else {
                    self.partial[source] = Some((tag, len, bytes));
                    None
                }
            }
            MORE => match self.partial[source].take() {
                Some((tag, whole, mut bytes)) if len <= whole - bytes.len() => {
                    from_ring(a, len, &mut bytes)?;
                    if bytes.len() == whole {
                        Some(Held::Bytes(bytes))
                    } else {
                        self.partial[source] = Some((tag, whole, bytes));
                        None
                    }
                }
                _ => return corrupt("a piece's length", len as u64, 0),
            },
            HEAP => Some(Held::Heap { offset: a, rendezvous: b }),
            PRIVATE => Some(Held::Private { address: a, rendezvous: b }),
            kind => return corrupt("a message's kind", kind.into(), PRIVATE as usize),
        };
        self.release(comm, source, descriptor.kind);
        if let Some(held) = message {
            let len = if let Held::Bytes(bytes) = &held { bytes.len() } else { len };
            self.deliver(comm, source, Message { tag, len, held })?;
        }
        Ok(true)
    }

    fn wants_tag(&self, source: usize, tag: u32) -> bool {
        let from = |p: &Posted| p.from == Source::Any || p.from == Source::Rank(source);
        self.posted.iter().any(|p| p.result.is_none() && p.tag == tag && from(p))
    }

    fn full(&self, comm: &CommInner) -> Error {
        let oldest = (0..comm.world_size).find_map(|s| self.unexpected[s].front().map(|m| (s, m.tag)));
        let (from, tag) = oldest.unwrap_or((0, 0));
        Error::UnexpectedFull { held: self.held_bytes, limit: comm.config.unexpected_bytes, from, tag }
    }

    /// Gives a message to the first receive that wants it, or keeps it.
    fn deliver(&mut self, comm: &CommInner, source: usize, message: Message) -> Result<()> {
        let wants = |p: &Posted| {
            p.result.is_none() && p.tag == message.tag && (p.from == Source::Any || p.from == Source::Rank(source))
        };
        // One that was kept earlier (it was too long for its receive) comes first.
        let earlier = self.unexpected[source].iter().any(|m| m.tag == message.tag);
        match self.posted.iter().position(wants).filter(|_| !earlier) {
            Some(posted) if message.len <= self.posted[posted].buffer.1 => self.complete(comm, posted, source, message),
            posted => {
                if let Some(posted) = posted {
                    self.truncate(posted, source, message.len);
                }
                self.held_bytes += message.held.bytes();
                self.unexpected[source].push_back(message);
            }
        }
        Ok(())
    }

    fn complete(&mut self, comm: &CommInner, posted: usize, source: usize, message: Message) {
        let posted = &mut self.posted[posted];
        let (at, capacity) = posted.buffer;
        assert!(message.len <= capacity, "checked by the callers");
        // SAFETY: writable and unused by anyone else until the request ends, by the promise of `start_recv`'s caller.
        let buffer = unsafe { std::slice::from_raw_parts_mut(at, message.len) };
        let copied = copy_out(comm, source, &message, buffer);
        self.traffic.count(message.len);
        posted.result = Some(copied.map(|()| Status { source, tag: message.tag, len: message.len }));
    }
}

/// Copies a message's payload from wherever it is, and tells the sender when that was its own memory.
fn copy_out(comm: &CommInner, source: usize, message: &Message, buffer: &mut [u8]) -> Result<()> {
    let peer = comm.fabric.peer(source);
    let rendezvous = match &message.held {
        Held::Inline(body) => {
            buffer.copy_from_slice(&body[..message.len]);
            return Ok(());
        }
        Held::Bytes(bytes) => {
            buffer.copy_from_slice(bytes);
            return Ok(());
        }
        Held::Heap { offset, rendezvous } => {
            let end = offset.checked_add(message.len as u64);
            let limit = peer.heap.len() as u64;
            if end.is_none_or(|end| end > limit) {
                return Err(Error::Corrupt { rank: source, what: "an offset in its heap", value: *offset, limit });
            }
            peer.heap.read(*offset as usize, buffer);
            *rendezvous
        }
        Held::Private { address, rendezvous } => {
            cma::read(peer.pid, *address, buffer).map_err(|e| Error::os("process_vm_readv", e))?;
            *rendezvous
        }
    };
    let word = comm.fabric.outbox.word64(comm.layout.finished(source, rendezvous as usize % SLOTS));
    word.store(rendezvous, Release);
    comm.notify(source);
    Ok(())
}
