//! A slot of the ring: one cache line that carries a short message, or tells where a long one is.
//!
//! | word | |
//! | --- | --- |
//! | 0 | the turn: see [`ring`](crate::sync::ring) |
//! | 1 | tag, in the upper half the kind, and in the highest bit whether the tag is the library's own |
//! | 2 | bytes of the whole message; for [`MORE`], of this piece |
//! | 3 to 7 | the payload of a short message, or the two numbers that the kind says |
//!
//! Words that a message does not need are not written: they keep what was there.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

/// Bytes of a message that need no more than the slot.
pub(super) const INLINE_BYTES: usize = 40;

/// The payload is in the slot.
pub(super) const INLINE: u32 = 0;
/// The (first piece of the) payload is in the ring: position, bytes of the piece.
pub(super) const RING: u32 = 1;
/// A further piece is in the ring: position.
pub(super) const MORE: u32 = 2;
/// The payload is in the sender's symmetric heap: offset, number of the rendezvous.
pub(super) const HEAP: u32 = 3;
/// The payload is in the sender's private memory: address, number of the rendezvous.
pub(super) const PRIVATE: u32 = 4;

/// What has begun to come is given up by its sender: no further piece follows.
pub(super) const WITHDRAWN: u32 = 5;

const HEAD: usize = 1;
const LEN: usize = 2;
const BODY: usize = 3;

/// A slot whose turn it is: the sender's to fill, or the receiver's to read.
#[derive(Clone, Copy)]
pub(super) struct Slot<'a>(pub(super) &'a [AtomicU64; 8]);

/// What a slot says of its message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub(super) tag: u64,
    pub(super) kind: u32,
    pub(super) len: u64,
}

impl<'a> Slot<'a> {
    pub(super) fn turn(self) -> &'a AtomicU64 {
        &self.0[0]
    }

    /// All of it, for a receiver that cannot read it here.
    pub(super) fn words(self) -> [u64; 8] {
        std::array::from_fn(|i| self.0[i].load(Relaxed))
    }

    pub(super) fn head(self) -> Head {
        let [head, len] = [HEAD, LEN].map(|i| self.0[i].load(Relaxed));
        let is_internal = head >> 63 << 32;
        Head { tag: is_internal | head & u64::from(u32::MAX), kind: (head >> 32 & 0x7fff_ffff) as u32, len }
    }

    pub(super) fn set_head(self, head: Head) {
        let (is_internal, tag) = (head.tag >> 32 << 63, head.tag & u64::from(u32::MAX));
        self.0[HEAD].store(is_internal | u64::from(head.kind) << 32 | tag, Relaxed);
        self.0[LEN].store(head.len, Relaxed);
    }

    pub(super) fn numbers(self) -> [u64; 2] {
        [BODY, BODY + 1].map(|i| self.0[i].load(Relaxed))
    }

    pub(super) fn set_numbers(self, numbers: [u64; 2]) {
        self.0[BODY].store(numbers[0], Relaxed);
        self.0[BODY + 1].store(numbers[1], Relaxed);
    }

    /// Copies a payload of at most [`INLINE_BYTES`] in, by words: for so few bytes a call of `memcpy` would take longer.
    #[inline]
    pub(super) fn set_body(self, data: &[u8]) {
        let (words, rest) = data.as_chunks::<8>();
        for (to, &word) in self.0[BODY..].iter().zip(words) {
            to.store(u64::from_ne_bytes(word), Relaxed);
        }
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            self.0[BODY + words.len()].store(u64::from_ne_bytes(last), Relaxed);
        }
    }

    /// Copies a payload of at most [`INLINE_BYTES`] out.
    #[inline]
    pub(super) fn body(self, into: &mut [u8]) {
        let (words, rest) = into.as_chunks_mut::<8>();
        for (from, word) in self.0[BODY..].iter().zip(words.iter_mut()) {
            *word = from.load(Relaxed).to_ne_bytes();
        }
        if !rest.is_empty() {
            let last = self.0[BODY + words.len()].load(Relaxed).to_ne_bytes();
            rest.copy_from_slice(&last[..rest.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_comes_out_as_it_went_in_and_touches_no_word_beyond() {
        for len in 0..=INLINE_BYTES {
            let line: [AtomicU64; 8] = std::array::from_fn(|_| AtomicU64::new(u64::MAX));
            let slot = Slot(&line);
            let data: Vec<u8> = (0..len as u8).collect();
            slot.set_head(Head { tag: 7, kind: INLINE, len: len as u64 });
            slot.set_body(&data);
            let mut out = vec![0xee; len];
            slot.body(&mut out);
            assert_eq!(out, data);
            assert_eq!((slot.head().tag, slot.head().kind, slot.head().len), (7, INLINE, len as u64));
            let untouched = line[BODY + len.div_ceil(8)..].iter().all(|w| w.load(Relaxed) == u64::MAX);
            assert!(untouched && line[0].load(Relaxed) == u64::MAX, "{len} bytes: {line:?}");
        }
    }

    #[test]
    fn head_and_numbers_come_out_as_they_went_in() {
        let line: [AtomicU64; 8] = Default::default();
        let slot = Slot(&line);
        slot.set_head(Head { tag: (1 << 33) - 1, kind: PRIVATE, len: u64::MAX });
        slot.set_numbers([1, u64::MAX]);
        assert_eq!((slot.head().tag, slot.head().kind, slot.head().len), ((1 << 33) - 1, PRIVATE, u64::MAX));
        assert_eq!(slot.numbers(), [1, u64::MAX]);
    }
}
