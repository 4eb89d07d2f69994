//! The words and lists of both sides: what lies where in a rank's control memory.

use super::config::KvConfig;
use crate::memory::layout::{LINE, Layout};
use crate::onesided::Remote;

/// What is said of a posted request, before its pages: number, id, count of pages, bytes of the last one.
pub(super) const HEAD_WORDS: usize = 4;
const HEAD_BYTES: usize = HEAD_WORDS * 8;

/// A sender's memory, for one receiver: written by that receiver.
pub(super) struct Mailbox {
    /// The number of the last request posted.
    pub(super) posted: usize,
    /// 1 when the receiver has gone.
    pub(super) gone: usize,
    /// By slot, the number of the request that the receiver has cancelled.
    cancelled: usize,
    /// By slot, head and pages.
    requests: usize,
    stride: usize,
    pub(super) bytes: usize,
}

impl Mailbox {
    pub(super) fn new(config: &KvConfig) -> Self {
        let mut layout = Layout::default();
        let posted = layout.add(LINE);
        let cancelled = layout.add(config.max_requests * 8);
        let stride = (HEAD_BYTES + config.max_pages * 4).next_multiple_of(LINE);
        let requests = layout.add(config.max_requests * stride);
        let bytes = (requests + config.max_requests * stride).next_multiple_of(LINE);
        Mailbox { posted, gone: posted + 8, cancelled, requests, stride, bytes }
    }

    pub(super) fn cancelled(&self, slot: usize) -> usize {
        self.cancelled + slot * 8
    }

    pub(super) fn request(&self, slot: usize) -> usize {
        self.requests + slot * self.stride
    }

    pub(super) fn pages(&self, slot: usize) -> usize {
        self.request(slot) + HEAD_BYTES
    }
}

/// A receiver's memory, for one sender: written by that sender.
pub(super) struct Signals {
    /// 1 when the sender has gone.
    pub(super) gone: usize,
    slots: usize,
    stride: usize,
    pub(super) bytes: usize,
}

impl Signals {
    pub(super) fn new(config: &KvConfig) -> Self {
        let stride = ((1 + config.layers) * 8).next_multiple_of(LINE);
        Signals { gone: 0, slots: LINE, stride, bytes: LINE + config.max_requests * stride }
    }

    /// How the last request of the slot ended: its number and a [`Closed`].
    pub(super) fn closed(&self, slot: usize) -> usize {
        self.slots + slot * self.stride
    }

    /// The number of the last request of the slot whose layer is complete.
    pub(super) fn layer(&self, slot: usize, layer: usize) -> usize {
        self.closed(slot) + (1 + layer) * 8
    }
}

/// The word at `offset` of a piece.
pub(super) fn word(piece: Remote, offset: usize) -> Remote {
    piece.skip(offset).first(8)
}

/// How a request ended, as its sender says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closed {
    /// All layers are complete.
    Done = 1,
    /// The sender has stopped, on its own or as told.
    Cancelled = 2,
}

impl Closed {
    pub(super) fn word(self, number: u64) -> u64 {
        number << 2 | self as u64
    }

    /// Whether, and how, the request `number` ended; the whole word when it makes no sense.
    pub(super) fn of(word: u64, number: u64) -> Result<Option<Closed>, u64> {
        match (word >> 2 == number, word & 3) {
            (false, _) => Ok(None),
            (true, 1) => Ok(Some(Closed::Done)),
            (true, 2) => Ok(Some(Closed::Cancelled)),
            (true, _) => Err(word),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps_and_all_stays_inside() {
        for (layers, pages, requests) in [(1, 1, 1), (7, 13, 5), (64, 1024, 256)] {
            let config = KvConfig::new(layers, 1).max_pages(pages).max_requests(requests);
            let (mailbox, signals) = (Mailbox::new(&config), Signals::new(&config));
            let mut areas = vec![(mailbox.posted, 8), (mailbox.gone, 8)];
            areas.extend((0..requests).map(|slot| (mailbox.cancelled(slot), 8)));
            areas.extend((0..requests).map(|slot| (mailbox.request(slot), HEAD_BYTES)));
            areas.extend((0..requests).map(|slot| (mailbox.pages(slot), pages * 4)));
            disjoint(areas, mailbox.bytes);
            let mut areas = vec![(signals.gone, 8)];
            areas.extend((0..requests).map(|slot| (signals.closed(slot), 8)));
            areas.extend(
                (0..requests).flat_map(|s| (0..layers).map(move |l| (s, l))).map(|(s, l)| (signals.layer(s, l), 8)),
            );
            disjoint(areas, signals.bytes);
        }
    }

    fn disjoint(mut areas: Vec<(usize, usize)>, bytes: usize) {
        areas.sort();
        assert!(areas.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        assert!(areas.iter().all(|&(at, len)| at % 8 == 0 && at + len <= bytes));
    }

    #[test]
    fn an_end_is_told_of_one_request_only() {
        assert_eq!(Closed::of(Closed::Done.word(5), 5), Ok(Some(Closed::Done)));
        assert_eq!(Closed::of(Closed::Cancelled.word(5), 5), Ok(Some(Closed::Cancelled)));
        assert_eq!(Closed::of(Closed::Done.word(4), 5), Ok(None));
        assert_eq!(Closed::of(0, 5), Ok(None));
        assert_eq!(Closed::of(5 << 2 | 3, 5), Err(23));
    }
}
