//! The collectives' part of the outbox: slots, the log of calls, and why this rank takes part no more.
//!
//! | | writer | readers |
//! | --- | --- | --- |
//! | failure line | its owner, once, before it takes part no more | whoever waits in a collective |
//! | log: the last [`LOG`] calls | its owner | a rank that has found that the calls differ |
//! | [`SMALL_SLOTS`] slots: a line (turn, digest, 48 bytes of payload) and 4 KiB | its owner | all |
//! | [`LARGE_SLOTS`] large payloads | its owner | all |
//!
//! Which slot a step uses, and when it may be filled again, is told in [`steps`]. A step whose payload is large uses the
//! large one of its number as well; there are fewer of these, so it waits for more.
//!
//! The digest is of all calls up to this one. Equal digests are equal histories; from different ones the log tells where they part.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::types::Call;
use crate::memory::layout::{LINE, Layout};
use crate::memory::mapping::Mapping;
use crate::memory::row::{Row, Target};
use crate::sync::steps;

/// Calls that the log keeps.
const LOG: u64 = 64;
/// So many steps may a rank that only writes be ahead of its readers: where ranks share cores, those read all of them when their
/// turn comes. Of four ranks on two cores, 20 broadcasts of 8 bytes one after another took 0.5 us each with 16 slots.
const SMALL_SLOTS: u64 = 32;
/// Payload of a slot's line, and of the whole slot. The stride is no power of two: slots of the same number in all outboxes would
/// fall into the same sets of the caches.
const INLINE: usize = 48;
const SMALL: usize = 4096;
const STRIDE: usize = LINE + SMALL;
const LARGE_SLOTS: u64 = 4;
/// Bytes of a large payload: a line more than a piece, so that 4096 ranks find room for a line each and a result.
pub(super) const LARGE: usize = PIECE + LINE;
/// Bytes that go in one step. All-reduces of two ranks, us for 1 / 64 MiB, with pieces of 32, 64, 128 and 256 KiB: 66 / 13100, 60 / 7540, 55 /
/// -, 52 / 7580; broadcasts 39, 35, 32 and 29 for 1 MiB; with eight ranks on two cores 64 MiB take 38, 34 and 32 ms with the last three.
pub(super) const PIECE: usize = 256 << 10;

/// Words of a slot's line.
const TURN: usize = 0;
const DIGEST: usize = 8;
const PAYLOAD: usize = 16;

/// Where the parts lie in the outbox.
#[derive(Clone, Debug)]
pub(crate) struct Slots {
    failure: usize,
    log: usize,
    small: usize,
    large: usize,
}

impl Slots {
    /// Adds them to an outbox.
    pub(crate) fn new(layout: &mut Layout) -> Self {
        let failure = layout.add_aligned(LINE, 4096);
        let log = layout.add(LOG as usize * 32);
        let small = layout.add_aligned(SMALL_SLOTS as usize * STRIDE, 4096);
        let large = layout.add_aligned(LARGE_SLOTS as usize * LARGE, 4096);
        Slots { failure, log, small, large }
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn areas(&self) -> [(usize, usize); 4] {
        [
            (self.failure, LINE),
            (self.log, LOG as usize * 32),
            (self.small, SMALL_SLOTS as usize * STRIDE),
            (self.large, LARGE_SLOTS as usize * LARGE),
        ]
    }

    fn line(&self, step: u64) -> usize {
        self.small + (step % SMALL_SLOTS) as usize * STRIDE
    }

    /// Where a step has its payload of `bytes` bytes.
    fn payload(&self, step: u64, bytes: usize) -> usize {
        if bytes <= INLINE {
            self.line(step) + PAYLOAD
        } else if bytes <= SMALL {
            self.line(step) + LINE
        } else {
            self.large + (step % LARGE_SLOTS) as usize * LARGE
        }
    }

    /// What all others must have published before step `step` with so many bytes may be filled.
    pub(super) fn needed(step: u64, bytes: usize) -> u64 {
        steps::needed(step, if bytes > SMALL { LARGE_SLOTS } else { SMALL_SLOTS })
    }

    fn turn<'m>(&self, of: &'m Mapping, step: u64) -> &'m AtomicU64 {
        of.word64(self.line(step) + TURN)
    }

    /// Whether the owner of an outbox has published `step`, which is at most `SMALL_SLOTS` back.
    #[inline]
    pub(super) fn has(&self, of: &Mapping, step: u64) -> bool {
        steps::has(self.turn(of, step), step)
    }

    /// The step that the owner of an outbox has published last in the slot of `step`.
    #[inline]
    pub(super) fn published(&self, of: &Mapping, step: u64) -> u64 {
        steps::published(self.turn(of, step))
    }

    /// Publishes a step, whose payload has been written.
    #[inline]
    pub(super) fn publish(&self, own: &Mapping, step: u64, digest: u64) {
        own.word64(self.line(step) + DIGEST).store(digest, Relaxed);
        steps::publish(self.turn(own, step), step);
    }

    /// Gets the lines of the next step, probably of as many bytes, which the readers of the step that used them before still
    /// share: while this rank waits or computes, instead of when they are written. Broadcasts of 64 bytes take so 170 ns where 210,
    /// of 1 KiB 290 where 360 (a line takes about 170 ns); of 4 KiB more than before, 700 where 570.
    pub(super) fn prepare(&self, own: &Mapping, step: u64, bytes: usize) {
        if bytes <= SMALL / 4 {
            let (line, more) = (self.line(step), if bytes > INLINE { bytes } else { 0 });
            (0..=more).step_by(LINE).for_each(|at| own.fetch_to_write(line + at));
        }
    }

    /// Gets what a peer has published for a step, or is about to. Broadcasts of 8 bytes take so 140 ns where 170; longer ones take
    /// as long or longer.
    pub(super) fn look_ahead(&self, of: &Mapping, step: u64, bytes: usize) {
        if bytes <= INLINE {
            of.fetch(self.line(step));
        }
    }

    /// The turns of the last steps before `age` and that one.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn grow_old(&self, own: &Mapping, age: u64) {
        for step in age.saturating_sub(SMALL_SLOTS - 1)..=age {
            steps::publish(self.turn(own, step), step);
        }
    }

    /// As a rank that lies publishes a step.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn publish_as(&self, own: &Mapping, step: u64, turn: u64, digest: u64) {
        own.word64(self.line(step) + DIGEST).store(digest, Relaxed);
        self.turn(own, step).store(turn, Release);
    }

    /// The digest of a published step.
    #[inline]
    pub(crate) fn digest(&self, of: &Mapping, step: u64) -> u64 {
        of.word64(self.line(step) + DIGEST).load(Relaxed)
    }

    /// `len` bytes at `at` of a step's payload of `bytes` bytes, to be written.
    pub(super) fn fill<'m>(&self, own: &'m Mapping, (step, bytes): (u64, usize), at: usize, len: usize) -> Target<'m> {
        assert!(at + len <= bytes && bytes <= LARGE, "{len} bytes at {at} of a payload of {bytes}");
        own.target(self.payload(step, bytes) + at, len)
    }

    /// `len` bytes at `at` of a published step's payload of `bytes` bytes.
    pub(super) fn read<'m>(&self, of: &'m Mapping, (step, bytes): (u64, usize), at: usize, len: usize) -> Row<'m, u8> {
        assert!(at + len <= bytes && bytes <= LARGE, "{len} bytes at {at} of a payload of {bytes}");
        of.row(self.payload(step, bytes) + at, len)
    }

    /// Notes the `number`-th call.
    pub(super) fn log(&self, own: &Mapping, number: u64, call: &Call) {
        let at = self.log + (number % LOG) as usize * 32;
        for (i, word) in [number].into_iter().chain(call.words()).enumerate() {
            own.word64(at + i * 8).store(word, Relaxed);
        }
    }

    /// The words of a rank's `number`-th call, if its log has it.
    pub(super) fn logged(&self, of: &Mapping, number: u64) -> Option<[u64; 2]> {
        let at = self.log + (number % LOG) as usize * 32;
        let [found, what, count] = [0, 8, 16].map(|i| of.word64(at + i).load(Relaxed));
        (found == number).then_some([what, count])
    }

    /// The oldest call that a log may have when `number` is the last one.
    pub(super) fn oldest(number: u64) -> u64 {
        (number + 1).saturating_sub(LOG).max(1)
    }

    /// Says why this rank takes part no more. The first reason stays.
    pub(super) fn fail(&self, own: &Mapping, reason: [u64; 8]) {
        let line = own.line(self.failure);
        if line[0].load(Relaxed) == 0 {
            line[1..].iter().zip(&reason[1..]).for_each(|(word, &value)| word.store(value, Relaxed));
            line[0].store(reason[0], Release);
        }
    }

    /// Why a rank takes part no more.
    pub(super) fn failure(&self, of: &Mapping) -> Option<[u64; 8]> {
        let line = of.line(self.failure);
        let kind = line[0].load(Acquire);
        (kind != 0).then(|| {
            let mut reason = line.each_ref().map(|word| word.load(Relaxed));
            reason[0] = kind;
            reason
        })
    }
}
