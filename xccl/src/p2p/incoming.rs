//! The receiving side, all sources.
//!
//! For each (source, tag) there are open receives or kept messages, never both: a receive that is posted looks at what was
//! kept, and a message that comes at the open receives. A receive that finds a kept message has it from then on, but the
//! payload is copied by whoever looks for messages next. A long message goes piece by piece into the buffer of the receive
//! that wants it; if there is none when its first piece comes, all of it is kept.
//!
//! Everything that a slot says is copied out and checked against the ring, the heap and the message's length before it is
//! used.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use std::sync::atomic::fence;

use super::outgoing::Traffic;
use super::queues::TagQueues;
use super::slab::Slab;
use super::slot::{HEAP, Head, INLINE, INLINE_BYTES, MORE, PRIVATE, RING, Slot, WITHDRAWN};
use super::{Source, Status};
use crate::comm::inner::CommInner;
use crate::comm::layout::SLOTS;
use crate::error::{Error, Result};
use crate::fabric::cma;
use crate::memory::lent::LentBuffer;
use crate::memory::row::Row;
use crate::memory::stream::{STREAMING_BYTES, end_streaming, stream};
use crate::sync::ring;

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
    /// Nowhere: its sender has given it up.
    Withdrawn,
}

impl Held {
    fn copy_of(data: &[u8]) -> Self {
        let mut short = [0; INLINE_BYTES];
        match short.get_mut(..data.len()) {
            Some(to) => {
                to.copy_from_slice(data);
                Held::Inline(short)
            }
            None => Held::Bytes(data.to_vec()),
        }
    }

    /// Bytes that it takes of this rank's memory. What is only described takes some too: a sender might describe for ever.
    fn bytes(&self) -> usize {
        match self {
            Held::Inline(_) | Held::Heap { .. } | Held::Private { .. } | Held::Withdrawn => INLINE_BYTES,
            Held::Bytes(bytes) => bytes.len().max(INLINE_BYTES),
        }
    }
}

struct Message {
    source: usize,
    tag: u64,
    len: usize,
    held: Held,
}

/// A receive that somebody has asked for.
struct Receive {
    number: u64,
    buffer: LentBuffer,
    state: State,
}

enum State {
    /// Waits for a message, in the queue of open receives under this key.
    Open(usize),
    /// Has found a kept message.
    Found(Message),
    /// The pieces of a message from this source are being copied into its buffer.
    Filling(usize),
    Done(Result<Status>),
}

/// The long message that is being taken from a source, piece by piece.
struct Partial {
    tag: u64,
    len: usize,
    filled: usize,
    into: Into,
}

enum Into {
    /// The buffer of this receive.
    Receive(usize),
    Kept(Vec<u8>),
}

/// Names a receive: where it is, and which one, since a later one may have its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    key: usize,
    number: u64,
}

pub(super) struct Incoming {
    pub(super) traffic: Traffic,
    /// Slots consumed, per source, and of all.
    next: Vec<u64>,
    pub(super) taken: u64,
    partial: Vec<Option<Partial>>,
    receives: Slab<Receive>,
    /// Keys of the receives that wait for a message; those from any source after the last rank's.
    open: TagQueues<usize>,
    /// Receives that have found a message, not copied yet.
    found: VecDeque<Name>,
    /// Messages that no receive has asked for yet.
    unexpected: TagQueues<Message>,
    held_bytes: usize,
    started: u64,
    /// By far source, bytes of the ring that were copied out since it was last told.
    untold: Vec<usize>,
}

impl Incoming {
    pub(super) fn new(world_size: usize) -> Self {
        Incoming {
            traffic: Traffic::default(),
            next: vec![0; world_size],
            taken: 0,
            partial: (0..world_size).map(|_| None).collect(),
            receives: Slab::default(),
            open: TagQueues::new(world_size + 1),
            found: VecDeque::new(),
            unexpected: TagQueues::new(world_size),
            held_bytes: 0,
            started: 0,
            untold: vec![0; world_size],
        }
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn grow_old(&mut self, age: u64) {
        self.next.fill(age);
    }

    /// Where receives from any source are kept in the queue.
    fn any(&self) -> usize {
        self.next.len()
    }

    /// Posts a receive.
    pub(super) fn post(&mut self, from: Source, tag: u64, buffer: LentBuffer) -> Name {
        let name = Name { key: self.receives.next_key(), number: self.started };
        self.started += 1;
        let kept = self.find_kept(from, tag);
        let state = match kept.and_then(|kept| self.take_kept(kept, tag, buffer.len())) {
            Some(state) => state,
            None => {
                let source = if let Source::Rank(rank) = from { rank } else { self.any() };
                State::Open(self.open.push(source, tag, name.key))
            }
        };
        if let State::Found(_) = state {
            self.found.push_back(name);
        }
        self.receives.insert(Receive { number: name.number, buffer, state });
        name
    }

    /// The first kept message that a receive wants.
    fn find_kept(&self, from: Source, tag: u64) -> Option<usize> {
        match from {
            _ if self.unexpected.is_empty() => None,
            Source::Rank(rank) => self.unexpected.first(rank, tag),
            Source::Any => (0..self.any()).find_map(|rank| self.unexpected.first(rank, tag)),
        }
    }

    /// Gives a kept message to a receive with room for `capacity` bytes; one that is longer stays.
    fn take_kept(&mut self, key: usize, tag: u64, capacity: usize) -> Option<State> {
        let &Message { source: from, len, .. } = self.unexpected.get(key)?;
        if len > capacity {
            return Some(State::Done(Err(Error::Truncated { from, tag: tag as u32, len, capacity })));
        }
        let message = self.unexpected.remove(key)?;
        self.held_bytes -= message.held.bytes();
        Some(State::Found(message))
    }

    /// The result of a receive, once it has one; the receive is forgotten then.
    pub(super) fn take_result(&mut self, name: Name) -> Option<Result<Status>> {
        let receive = self.receives.get(name.key).filter(|r| r.number == name.number)?;
        if !matches!(receive.state, State::Done(_)) {
            return None;
        }
        match self.receives.remove(name.key)?.state {
            State::Done(result) => Some(result),
            _ => None,
        }
    }

    /// Forgets a receive: it takes no message, and its buffer is free.
    pub(super) fn cancel(&mut self, comm: &CommInner, name: Name) {
        if self.receives.get(name.key).is_none_or(|r| r.number != name.number) {
            return;
        }
        let Some(mut receive) = self.receives.remove(name.key) else { return };
        match receive.state {
            State::Done(_) => {}
            State::Open(place) => drop(self.open.remove(place)),
            State::Found(message) => {
                self.found.retain(|&found| found != name);
                self.deliver(comm, message, TagQueues::push_first);
            }
            State::Filling(source) => {
                if let Some(partial) = &mut self.partial[source] {
                    partial.into = Into::Kept(receive.buffer.as_mut_slice()[..partial.filled].to_vec());
                    self.held_bytes += partial.filled;
                }
            }
        }
    }

    /// Takes all messages that are wanted, or that stand before wanted ones.
    pub(super) fn pull(&mut self, comm: &CommInner) -> Result<()> {
        while let Some(Name { key, .. }) = self.found.pop_front() {
            self.finish(comm, key);
        }
        for source in 0..comm.world_size {
            while source != comm.rank && self.wants(source) && self.pull_one(comm, source)? {}
        }
        Ok(())
    }

    fn wants(&self, source: usize) -> bool {
        let is_filling = || matches!(self.partial[source], Some(Partial { into: Into::Receive(_), .. }));
        self.open.count(source) > 0 || self.open.count(self.any()) > 0 || is_filling()
    }

    /// The slot of `source`'s next message.
    pub(super) fn slot<'a>(&self, comm: &'a CommInner, source: usize) -> (u64, Slot<'a>) {
        let n = self.next[source];
        (n, Slot(comm.fabric.peer(source).outbox.line(comm.layout.slot(comm.rank, n))))
    }

    /// Whether the next message of `source` with that tag can only be for who asks next: no receive is open, and nothing of the
    /// kind is kept or half received.
    pub(super) fn is_idle(&self, source: usize, tag: u64) -> bool {
        self.open.is_empty() && self.partial[source].is_none() && self.unexpected.first(source, tag).is_none()
    }

    /// Takes a message that has come and lies in its slot, or in the ring in one piece, if it is what `tag` and `buffer` ask for.
    #[inline]
    pub(super) fn take_whole(
        &mut self,
        comm: &CommInner,
        source: usize,
        tag: u64,
        buffer: &mut [u8],
    ) -> Result<Option<Status>> {
        let (_, slot) = self.slot(comm, source);
        let Head { tag: theirs, kind, len } = slot.head();
        if theirs != tag || len > buffer.len() as u64 {
            return Ok(None);
        }
        let buffer = &mut buffer[..len as usize];
        match kind {
            INLINE if buffer.len() <= INLINE_BYTES => slot.body(buffer),
            RING if slot.numbers()[1] == len => copy_piece(comm, source, slot.numbers()[0], buffer)?,
            _ => return Ok(None),
        }
        self.traffic.count(buffer.len());
        self.release(comm, source, kind, buffer.len());
        Ok(Some(Status { source, tag: tag as u32, len: buffer.len() }))
    }

    /// Tells the sender that the next slot of `source` was copied out.
    /// `payload` is how much of the ring is free with it.
    fn release(&mut self, comm: &CommInner, source: usize, kind: u32, payload: usize) {
        let n = self.next[source];
        self.next[source] = n + 1;
        self.taken += 1;
        ring::release(comm.fabric.outbox.word64(comm.layout.consumed(source)), n + 1);
        if let Some(far) = comm.fabric.far_to(source) {
            self.untold[source] += payload;
            // A message of its own for each slot would cost more than the slot: the sender has room for the rest meanwhile.
            if (n + 1).is_multiple_of(SLOTS as u64 / 4) || self.untold[source] >= comm.layout.ring_bytes / 4 {
                self.untold[source] = 0;
                far.tell(source, comm.layout.consumed(source), n + 1);
            }
            return;
        }
        // The sender sleeps only when slots or payload ran out. For slots it is enough to tell it now and then: the fence
        // costs a fifth of a short message. What is left untold meanwhile is found at the end of its slice of sleep.
        if kind != INLINE || n.is_multiple_of(SLOTS as u64 / 4) {
            comm.notify(source);
        }
    }

    /// Looks at the next slot of `source`; says whether there was something.
    fn pull_one(&mut self, comm: &CommInner, source: usize) -> Result<bool> {
        let (n, slot) = self.slot(comm, source);
        if !ring::has(slot.turn(), n) {
            return Ok(false);
        }
        let (Head { tag, kind, len }, [a, b]) = (slot.head(), slot.numbers());
        let corrupt = |what, value, limit| Err(Error::Corrupt { rank: source, what, value, limit });
        let Ok(len) = usize::try_from(len) else {
            return corrupt("a message's length", len, usize::MAX as u64);
        };
        if self.held_bytes > comm.config.unexpected_bytes && !self.has_receive(source, tag) {
            return Err(self.full(comm));
        }
        match kind {
            INLINE if len <= INLINE_BYTES => {
                let mut short = [0; INLINE_BYTES];
                slot.body(&mut short);
                let message = Message { source, tag, len, held: Held::Inline(short) };
                self.deliver(comm, message, TagQueues::push);
            }
            RING if b > 0 && b <= len as u64 && self.partial[source].is_none() => {
                self.begin(source, tag, len);
                self.take_piece(comm, source, a, b as usize)?;
            }
            MORE => self.take_piece(comm, source, a, len)?,
            WITHDRAWN if self.partial[source].is_some() => self.take_withdrawn(comm, source),
            HEAP | PRIVATE => {
                let held = match kind {
                    HEAP => Held::Heap { offset: a, rendezvous: b },
                    _ => Held::Private { address: a, rendezvous: b },
                };
                self.deliver(comm, Message { source, tag, len, held }, TagQueues::push);
            }
            INLINE => return corrupt("a short message's length", len as u64, INLINE_BYTES as u64),
            RING => return corrupt("a piece's length", b, len as u64),
            kind => return corrupt("a message's kind", kind.into(), WITHDRAWN.into()),
        }
        let payload = match kind {
            RING => b as usize,
            MORE => len,
            _ => 0,
        };
        self.release(comm, source, kind, payload);
        Ok(true)
    }

    /// A message that comes in pieces goes straight to the receive that wants it.
    fn begin(&mut self, source: usize, tag: u64, len: usize) {
        let into = match self.match_open(source, tag, len) {
            Some(key) => {
                self.set(key, State::Filling(source));
                Into::Receive(key)
            }
            None => Into::Kept(vec![]),
        };
        self.partial[source] = Some(Partial { tag, len, filled: 0, into });
    }

    /// Copies a piece of the message that is being taken from `source` out of the ring; with the last one it is complete.
    fn take_piece(&mut self, comm: &CommInner, source: usize, at: u64, piece: usize) -> Result<()> {
        let missing = self.partial[source].as_ref().map_or(0, |p| p.len - p.filled);
        if piece == 0 || piece > missing {
            let limit = missing as u64;
            return Err(Error::Corrupt { rank: source, what: "a piece's length", value: piece as u64, limit });
        }
        let Some(partial) = &mut self.partial[source] else { return Ok(()) };
        let range = partial.filled..partial.filled + piece;
        // Found first: a length alone sets nothing aside.
        let row = piece_in_ring(comm, source, at, piece)?;
        match &mut partial.into {
            Into::Receive(key) => {
                // Always there: to cancel it would have changed `into`.
                let Some(receive) = self.receives.get_mut(*key) else { return Ok(()) };
                let into = &mut receive.buffer.as_mut_slice()[range];
                if partial.len >= STREAMING_BYTES { stream(row, into) } else { row.copy_to(into) }
            }
            Into::Kept(bytes) => {
                bytes.resize(range.end, 0);
                row.copy_to(&mut bytes[range]);
                self.held_bytes += piece;
            }
        }
        partial.filled += piece;
        if partial.filled < partial.len {
            return Ok(());
        }
        let Some(Partial { tag, len, into, .. }) = self.partial[source].take() else { return Ok(()) };
        match into {
            Into::Receive(key) => {
                if len >= STREAMING_BYTES {
                    end_streaming();
                }
                self.traffic.count(len);
                self.set(key, State::Done(Ok(Status { source, tag: tag as u32, len })));
            }
            Into::Kept(bytes) => {
                self.held_bytes -= bytes.len();
                let message = Message { source, tag, len, held: Held::Bytes(bytes) };
                self.deliver(comm, message, TagQueues::push);
            }
        }
        Ok(())
    }

    /// Ends the message that is being taken from `source`, of which no more comes.
    fn take_withdrawn(&mut self, comm: &CommInner, source: usize) {
        let Some(Partial { tag, len, into, .. }) = self.partial[source].take() else { return };
        match into {
            Into::Receive(key) => {
                end_streaming();
                self.set(key, State::Done(Err(Error::Withdrawn { rank: source, tag: tag as u32 })));
            }
            Into::Kept(bytes) => {
                self.held_bytes -= bytes.len();
                self.deliver(comm, Message { source, tag, len, held: Held::Withdrawn }, TagQueues::push);
            }
        }
    }

    fn set(&mut self, key: usize, state: State) {
        if let Some(receive) = self.receives.get_mut(key) {
            receive.state = state;
        }
    }

    /// The open receive that gets the next message of `source` with `tag`, before those with less room, which end here.
    fn match_open(&mut self, source: usize, tag: u64, len: usize) -> Option<usize> {
        loop {
            let places = [self.open.first(source, tag), self.open.first(self.any(), tag)];
            let asked = |place: &usize| self.open.get(*place).and_then(|&key| self.receives.get(key)).map(|r| r.number);
            let key = self.open.remove(places.into_iter().flatten().min_by_key(asked)?)?;
            let receive = self.receives.get_mut(key)?;
            let capacity = receive.buffer.len();
            if len <= capacity {
                return Some(key);
            }
            receive.state = State::Done(Err(Error::Truncated { from: source, tag: tag as u32, len, capacity }));
        }
    }

    fn has_receive(&self, source: usize, tag: u64) -> bool {
        let is_filling = matches!(self.partial[source], Some(Partial { into: Into::Receive(_), .. }));
        is_filling || self.open.first(source, tag).is_some() || self.open.first(self.any(), tag).is_some()
    }

    fn full(&self, comm: &CommInner) -> Error {
        let partial = |(rank, partial): (usize, &Option<Partial>)| {
            partial.as_ref().filter(|p| matches!(p.into, Into::Kept(_))).map(|p| (rank, p.tag))
        };
        let begun = || self.partial.iter().enumerate().find_map(partial);
        let (from, tag) = self.unexpected.oldest().or_else(begun).unwrap_or((0, 0));
        Error::UnexpectedFull { held: self.held_bytes, limit: comm.config.unexpected_bytes, from, tag: tag as u32 }
    }

    /// Gives a message to the first receive that wants it, or keeps it.
    fn deliver(
        &mut self,
        comm: &CommInner,
        message: Message,
        keep: impl FnOnce(&mut TagQueues<Message>, usize, u64, Message) -> usize,
    ) {
        match self.match_open(message.source, message.tag, message.len) {
            Some(key) => {
                self.set(key, State::Found(message));
                self.finish(comm, key);
            }
            None => {
                self.held_bytes += message.held.bytes();
                keep(&mut self.unexpected, message.source, message.tag, message);
            }
        }
    }

    /// Takes a message that this rank has sent to itself.
    pub(super) fn deliver_own(&mut self, comm: &CommInner, tag: u64, data: &[u8]) {
        let message = Message { source: comm.rank, tag, len: data.len(), held: Held::copy_of(data) };
        self.deliver(comm, message, TagQueues::push);
    }

    /// Copies the message that a receive has found.
    fn finish(&mut self, comm: &CommInner, key: usize) {
        let Some(receive) = self.receives.get_mut(key) else { return };
        let State::Found(message) = &receive.state else { return };
        let &Message { source, tag, len, .. } = message;
        let copied = copy_out(comm, message, &mut receive.buffer.as_mut_slice()[..len]);
        receive.state = State::Done(copied.map(|()| Status { source, tag: tag as u32, len }));
        self.traffic.count(len);
    }
}

/// Copies a piece out of the ring.
fn copy_piece(comm: &CommInner, source: usize, at: u64, into: &mut [u8]) -> Result<()> {
    piece_in_ring(comm, source, at, into.len())?.copy_to(into);
    Ok(())
}

/// A piece where it lies in the ring.
fn piece_in_ring(comm: &CommInner, source: usize, at: u64, bytes: usize) -> Result<Row<'_, u8>> {
    let layout = &comm.layout;
    let offset = (at % layout.ring_bytes as u64) as usize;
    if bytes > layout.ring_bytes - offset {
        let limit = (layout.ring_bytes - offset) as u64;
        return Err(Error::Corrupt { rank: source, what: "a piece's length", value: bytes as u64, limit });
    }
    Ok(comm.fabric.peer(source).outbox.row(layout.payload(comm.rank) + offset, bytes))
}

/// Copies a message's payload from wherever it is, and tells the sender when that was its own memory.
fn copy_out(comm: &CommInner, message: &Message, buffer: &mut [u8]) -> Result<()> {
    let source = message.source;
    let peer = comm.fabric.peer(source);
    // Only a broken peer describes a payload that cannot be reached from here.
    let near = || {
        let corrupt =
            Error::Corrupt { rank: source, what: "the kind of a message from another node", value: 0, limit: 0 };
        peer.near.as_ref().ok_or(corrupt)
    };
    let (rendezvous, copied) = match &message.held {
        Held::Inline(body) => {
            buffer.copy_from_slice(&body[..message.len]);
            return Ok(());
        }
        Held::Bytes(bytes) => {
            buffer.copy_from_slice(bytes);
            return Ok(());
        }
        Held::Withdrawn => return Err(Error::Withdrawn { rank: source, tag: message.tag as u32 }),
        Held::Heap { offset, rendezvous } => {
            let end = offset.checked_add(message.len as u64);
            let heap = &near()?.heap;
            let limit = heap.len() as u64;
            if end.is_none_or(|end| end > limit) {
                return Err(Error::Corrupt { rank: source, what: "an offset in its heap", value: *offset, limit });
            }
            heap.read(*offset as usize, buffer);
            (*rendezvous, Ok(()))
        }
        Held::Private { address, rendezvous } => {
            (*rendezvous, cma::read(near()?.pid, *address, buffer).map_err(|e| Error::os("process_vm_readv", e)))
        }
    };
    // The copy first: were it of bytes that the sender has changed since, it would have withdrawn them before.
    fence(SeqCst);
    let withdrawn = peer.outbox.word64(comm.layout.withdrawn(comm.rank, rendezvous as usize % SLOTS)).load(Acquire);
    let word = comm.fabric.outbox.word64(comm.layout.finished(source, rendezvous as usize % SLOTS));
    word.store(rendezvous, Release);
    comm.notify(source);
    if withdrawn == rendezvous {
        return Err(Error::Withdrawn { rank: source, tag: message.tag as u32 });
    }
    copied
}
