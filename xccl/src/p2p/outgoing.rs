//! The sending side of one pair of ranks.
//!
//! A message that does not fit a slot goes through the ring in pieces, each published as soon as it is there: the receiver
//! copies one piece out while the next is copied in, and both cores copy at once. A message that has begun stays first in
//! the queue until its last piece is in.
//!
//! To another node, what lies in the symmetric heap is put into the receiver's ring straight from there. All but the last piece,
//! which is copied into the ring here and sent when those before have left: so a sender that gives up may change its memory at once,
//! and the receiver is told, who has not got the whole message.
//!
//! A rendezvous has a number, counted per pair of ranks; when the receiver has copied the payload it stores that number into
//! the word of its own outbox that belongs to it (number modulo [`SLOTS`]). The sender uses a number only when the one
//! `SLOTS` before it is finished, so a word is never overwritten before it was seen, in whatever order they finish.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use std::sync::atomic::fence;

use super::slot::{HEAP, Head, INLINE, INLINE_BYTES, MORE, PRIVATE, RING, Slot, WITHDRAWN};
use crate::comm::inner::CommInner;
use crate::comm::layout::SLOTS;
use crate::fabric::plane::Departure;
use crate::memory::lent::LentBytes;
use crate::sync::ring;

/// Payloads start on cache lines, so that sender and receiver do not meet on one.
const PAYLOAD_ALIGN: u64 = 64;
/// Bytes of a piece: small, so that the receiver begins soon, and large enough that the slot's line (one more to hand over)
/// does not count. Measured between two processes (c2c of 41 ns): 64 KiB took 2.00, 1.24, 1.24 and 1.34 us with pieces of 4,
/// 8, 16 and 32 KiB; 1 MiB 30.6, 23.1, 21.0 and 20.7.
const SHORT_PIECE: usize = 8 << 10;
const LONG_PIECE: usize = 16 << 10;
/// Between nodes a piece is a put and a record, which cost the same whatever their size: a fourth of the message within these.
const FAR_PIECE: usize = 64 << 10;
const LONGEST_FAR_PIECE: usize = 256 << 10;
/// From here on, long pieces.
const LONG_MESSAGE: usize = 128 << 10;

/// Messages and bytes: counted under the lock that is held anyway.
#[derive(Clone, Copy, Default)]
pub(crate) struct Traffic {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
}

impl Traffic {
    pub(super) fn count(&mut self, bytes: usize) {
        self.messages += 1;
        self.bytes += bytes as u64;
    }
}

/// Bytes of a send: lent until it is cancelled, or a copy.
enum Bytes {
    Lent(LentBytes),
    Owned(Vec<u8>),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Lent(bytes) => bytes.as_slice(),
            Bytes::Owned(bytes) => bytes,
        }
    }
}

struct PendingSend {
    number: u64,
    tag: u64,
    bytes: Bytes,
    /// Bytes that are in the ring already.
    done: usize,
    /// Pieces that were put straight from the heap.
    straight: Option<Departure>,
    /// Given up while some of them had not left.
    is_withdrawn: bool,
}

impl PendingSend {
    fn new(number: u64, tag: u64, bytes: LentBytes) -> Self {
        PendingSend { number, tag, bytes: Bytes::Lent(bytes), done: 0, straight: None, is_withdrawn: false }
    }

    /// Whether the pieces that were put straight from the heap have left.
    fn has_left(&self, comm: &CommInner, to: usize) -> bool {
        let plane = || comm.fabric.far_to(to).map(|far| &far.plane);
        self.straight.zip(plane()).is_none_or(|(departure, plane)| plane.has_left(departure))
    }
}

/// What has become of a send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// All of it is in the ring.
    Sent,
    /// It waits for room.
    Waits,
    /// It is described, and waits for the receiver's copy.
    Described,
}

pub(super) struct Outgoing {
    pub(super) traffic: Traffic,
    /// Slots filled.
    next: u64,
    /// Slots that the receiver had consumed when last looked at: its word is read again only when this leaves no room,
    /// since it has just written it, and the line would have to come over before each message.
    consumed: u64,
    /// End of the payload ring's used part, in bytes since the beginning.
    head: u64,
    /// The payload ring's end after each slot.
    ends: [u64; SLOTS],
    /// Rendezvous started, by their numbers, and as statistics count them.
    rendezvous: u64,
    pub(super) rendezvous_counted: u64,
    /// Requests so far.
    started: u64,
    /// Those that wait for room, in order.
    waiting: VecDeque<PendingSend>,
    /// Those that wait for the receiver's copy, in order, with the rendezvous' number. Cancelled ones stay until then.
    described: VecDeque<(u64, u64)>,
}

impl Outgoing {
    pub(super) fn new() -> Self {
        Outgoing {
            traffic: Traffic::default(),
            next: 0,
            consumed: 0,
            head: 0,
            ends: [0; SLOTS],
            rendezvous: 0,
            rendezvous_counted: 0,
            started: 0,
            waiting: VecDeque::new(),
            described: VecDeque::new(),
        }
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn grow_old(&mut self, age: u64) {
        (self.next, self.consumed, self.rendezvous, self.started) = (age, age, age, age);
    }

    /// Starts a message: sends what there is room for, if nothing stands before it. Gives its number.
    pub(super) fn start(&mut self, comm: &CommInner, to: usize, tag: u64, bytes: LentBytes) -> (u64, Progress) {
        let number = self.started;
        self.started += 1;
        self.traffic.count(bytes.as_slice().len());
        let mut send = PendingSend::new(number, tag, bytes);
        let progress = match self.waiting.is_empty() {
            true => self.advance(comm, to, &mut send),
            false => Progress::Waits,
        };
        if progress == Progress::Waits {
            self.waiting.push_back(send);
        }
        (number, progress)
    }

    /// Sends a short message if there is room for it now and nothing stands before it: no request has to be kept. The
    /// receiver has yet to be told.
    #[inline]
    pub(super) fn start_short(&mut self, comm: &CommInner, to: usize, tag: u64, data: &[u8]) -> bool {
        if !self.waiting.is_empty() || !self.has_slot(comm, to) {
            return false;
        }
        self.fill_short(comm, to, tag, data);
        self.started += 1;
        self.traffic.count(data.len());
        true
    }

    /// Slots filled so far.
    pub(super) fn filled(&self) -> u64 {
        self.next
    }

    /// How many wait for room.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether the send with that number is over.
    pub(super) fn is_over(&mut self, comm: &CommInner, to: usize, number: u64) -> bool {
        if self.waiting.front().is_some_and(|first| first.number <= number) {
            return false;
        }
        let Ok(at) = self.described.binary_search_by_key(&number, |&(number, _)| number) else { return true };
        if self.is_finished(comm, to, self.described[at].1) {
            self.described.remove(at);
            return true;
        }
        false
    }

    /// Forgets a send: nothing of it is sent, or the rest of it from a copy. What is described is withdrawn: the caller may
    /// change it when this returns, and a receiver that has copied meanwhile looks at the word afterwards.
    pub(super) fn cancel(&mut self, comm: &CommInner, to: usize, number: u64) {
        if let Ok(at) = self.described.binary_search_by_key(&number, |&(number, _)| number) {
            let rendezvous = self.described[at].1;
            let word = comm.layout.withdrawn(to, rendezvous as usize % SLOTS);
            comm.fabric.outbox.word64(word).store(rendezvous, Release);
            // Before whatever the caller does to the payload.
            fence(SeqCst);
        }
        let Ok(at) = self.waiting.binary_search_by_key(&number, |send| send.number) else { return };
        if self.waiting[at].done == 0 {
            self.waiting.remove(at);
        } else if !self.waiting[at].has_left(comm, to) {
            (self.waiting[at].bytes, self.waiting[at].is_withdrawn) = (Bytes::Owned(vec![]), true);
        } else {
            let copy = self.waiting[at].bytes.as_slice().to_vec();
            self.waiting[at].bytes = Bytes::Owned(copy);
        }
    }

    /// Puts as much of the waiting sends into the ring as there is room for.
    pub(super) fn push(&mut self, comm: &CommInner, to: usize) {
        while let Some(mut send) = self.waiting.pop_front() {
            if self.advance(comm, to, &mut send) == Progress::Waits {
                self.waiting.push_front(send);
                break;
            }
        }
    }

    /// Sends as much of a message as there is room for.
    fn advance(&mut self, comm: &CommInner, to: usize, send: &mut PendingSend) -> Progress {
        if send.is_withdrawn {
            if !self.has_slot(comm, to) {
                return Progress::Waits;
            }
            let slot = self.slot(comm, to);
            slot.set_head(Head { tag: send.tag, kind: WITHDRAWN, len: 0 });
            self.publish(comm, to, slot, None);
        } else if send.bytes.as_slice().len() <= INLINE_BYTES {
            if !self.has_slot(comm, to) {
                return Progress::Waits;
            }
            self.fill_short(comm, to, send.tag, send.bytes.as_slice());
        } else if self.describe(comm, to, send) {
            comm.notify(to);
            return Progress::Described;
        } else {
            let mut pieces = 0;
            while send.done < send.bytes.as_slice().len() {
                if !self.push_piece(comm, to, send) {
                    break;
                }
                pieces += 1;
                // It begins to copy while the rest is copied in.
                if pieces == 1 {
                    comm.notify(to);
                }
            }
            if pieces > 1 {
                comm.notify(to);
            }
            return if send.done < send.bytes.as_slice().len() { Progress::Waits } else { Progress::Sent };
        }
        comm.notify(to);
        Progress::Sent
    }

    /// Describes a message that has not begun, if that is possible and pays.
    fn describe(&mut self, comm: &CommInner, to: usize, send: &PendingSend) -> bool {
        let Some((kind, at)) = self.source(comm, to, send) else { return false };
        if !self.may_describe(comm, to) || !self.has_slot(comm, to) {
            return false;
        }
        self.rendezvous += 1;
        self.rendezvous_counted += 1;
        self.described.push_back((send.number, self.rendezvous));
        let slot = self.slot(comm, to);
        slot.set_head(Head { tag: send.tag, kind, len: send.bytes.as_slice().len() as u64 });
        slot.set_numbers([at, self.rendezvous]);
        self.publish(comm, to, slot, None);
        true
    }

    /// Puts the next piece into the ring, if there is room for it.
    fn push_piece(&mut self, comm: &CommInner, to: usize, send: &mut PendingSend) -> bool {
        let data = send.bytes.as_slice();
        // The slot first: while none is free, the oldest unread payload's end is not known any more.
        if !self.has_slot(comm, to) {
            return false;
        }
        let Some((at, piece)) = self.room(comm, to, data.len(), send.done) else { return false };
        let layout = &comm.layout;
        let piece = &data[send.done..send.done + piece];
        let in_ring = (at % layout.ring_bytes as u64) as usize;
        let is_last = send.done + piece.len() == data.len();
        let far = comm.fabric.far_to(to).zip(comm.in_heap(piece)).filter(|_| !is_last);
        if is_last && !send.has_left(comm, to) {
            return false;
        }
        let payload = match far {
            Some((far, in_heap)) => {
                let departure = *send.straight.get_or_insert_with(|| far.plane.departure());
                far.put_into_ring(to, in_heap, in_ring, piece.len(), departure);
                None
            }
            None => {
                comm.fabric.outbox.write(layout.payload(to) + in_ring, piece);
                Some((layout.payload(to) + in_ring, in_ring, piece.len()))
            }
        };
        self.head = at + piece.len() as u64;
        let slot = self.slot(comm, to);
        match send.done {
            0 => slot.set_head(Head { tag: send.tag, kind: RING, len: data.len() as u64 }),
            _ => slot.set_head(Head { tag: send.tag, kind: MORE, len: piece.len() as u64 }),
        }
        slot.set_numbers([at, piece.len() as u64]);
        send.done += piece.len();
        self.publish(comm, to, slot, payload);
        true
    }

    fn fill_short(&mut self, comm: &CommInner, to: usize, tag: u64, data: &[u8]) {
        let slot = self.slot(comm, to);
        slot.set_head(Head { tag, kind: INLINE, len: data.len() as u64 });
        slot.set_body(data);
        self.publish(comm, to, slot, None);
    }

    /// The next slot, which is free.
    fn slot<'a>(&self, comm: &'a CommInner, to: usize) -> Slot<'a> {
        Slot(comm.fabric.outbox.line(comm.layout.slot(to, self.next)))
    }

    /// Hands the slot to the receiver. `payload` is what has come into the ring with it: offset in the outbox and in the ring, bytes.
    fn publish(&mut self, comm: &CommInner, to: usize, slot: Slot<'_>, payload: Option<(usize, usize, usize)>) {
        ring::complete(slot.turn(), self.next);
        if let Some(far) = comm.fabric.far_to(to) {
            far.message(to, &comm.fabric.outbox, payload, comm.layout.slot(to, self.next), slot.words());
        }
        self.ends[(self.next % SLOTS as u64) as usize] = self.head;
        self.next += 1;
    }

    /// Whether the next slot is free.
    fn has_slot(&mut self, comm: &CommInner, to: usize) -> bool {
        let is_free = |out: &Self| ring::may_fill(out.consumed, out.next, SLOTS as u64);
        if !is_free(self) {
            self.look_at_receiver(comm, to);
        }
        is_free(self)
    }

    /// Whether the next rendezvous' word is free. If not, the payload goes through the ring: a receiver that wants a later
    /// message first would otherwise wait for ever.
    fn may_describe(&mut self, comm: &CommInner, to: usize) -> bool {
        while self.described.front().is_some_and(|&(_, oldest)| self.is_finished(comm, to, oldest)) {
            self.described.pop_front();
        }
        self.described.front().is_none_or(|&(_, oldest)| oldest + SLOTS as u64 > self.rendezvous + 1)
    }

    fn is_finished(&self, comm: &CommInner, to: usize, rendezvous: u64) -> bool {
        let word = comm.layout.finished(comm.rank, rendezvous as usize % SLOTS);
        comm.fabric.peer(to).outbox.word64(word).load(Acquire) >= rendezvous
    }

    /// How the receiver can reach the payload itself, if it can and that pays.
    fn source(&self, comm: &CommInner, to: usize, send: &PendingSend) -> Option<(u32, u64)> {
        let data = send.bytes.as_slice();
        if send.done > 0 {
            return None;
        }
        if comm.fabric.far_to(to).is_some() {
            return None;
        }
        if let Some(offset) = comm.in_heap(data) {
            return (data.len() >= comm.config.rendezvous_bytes).then_some((HEAP, offset as u64));
        }
        let is_long = data.len() >= comm.p2p.private_rendezvous();
        (is_long && comm.can_read_me(to)).then_some((PRIVATE, data.as_ptr() as u64))
    }

    fn look_at_receiver(&mut self, comm: &CommInner, to: usize) {
        self.consumed = ring::released(comm.fabric.peer(to).outbox.word64(comm.layout.consumed(comm.rank)));
    }

    /// Where the next piece goes in the payload ring, and its bytes, if that much is free.
    fn room(&mut self, comm: &CommInner, to: usize, len: usize, done: usize) -> Option<(u64, usize)> {
        let ring = comm.layout.ring_bytes as u64;
        let longest = match comm.fabric.far_to(to) {
            Some(_) => (len / 4).clamp(FAR_PIECE, LONGEST_FAR_PIECE),
            None if len < LONG_MESSAGE => SHORT_PIECE,
            None => LONG_PIECE,
        };
        let at = self.head.next_multiple_of(PAYLOAD_ALIGN);
        // A piece never wraps around, and two have room: one is copied in while the other is copied out.
        let piece = (len - done).min(longest).min(comm.layout.ring_bytes / 2).min((ring - at % ring) as usize);
        let fits = |out: &Self| at + piece as u64 <= out.tail().saturating_add(ring);
        if !fits(self) {
            self.look_at_receiver(comm, to);
        }
        fits(self).then_some((at, piece))
    }

    /// End of the payload that the receiver has consumed, as far as is known.
    fn tail(&self) -> u64 {
        match self.consumed {
            consumed if consumed >= self.next => self.head,
            0 => 0,
            consumed => self.ends[((consumed - 1) % SLOTS as u64) as usize],
        }
    }
}
