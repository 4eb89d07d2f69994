//! What lies where in a MoE handle's outbox.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::parties::{Part, Parties};
use super::wire::RowLayout;
use super::{MoeConfig, Reduction};
use crate::memory::area::{self, Area, Words};
use crate::memory::layout::{LINE, Layout};
use crate::memory::mapping::Mapping;

/// Exchanges that may be in flight.
pub(super) const SLOTS: usize = 2;

/// The slot that an exchange uses.
pub(super) fn slot_of(epoch: u64) -> usize {
    (epoch % SLOTS as u64) as usize
}

/// One choice of one token, in the list for the rank that holds its expert.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub(super) struct Entry {
    /// Row of the sender's outbox.
    pub(super) token: u32,
    pub(super) weight: f32,
}

const _: () = assert!(size_of::<Entry>() == 8 && align_of::<Entry>() == 4);

/// Offsets. All words have one writer, the outbox's owner. Those that a reader looks at together share a line: with many ranks it
/// is the lines that cost, not the bytes.
#[derive(Clone)]
pub(super) struct MoeLayout {
    /// Epoch word: tokens and lists of this exchange are complete. Read by all ranks. On its line are `refused` and each slot's
    /// `tokens` and `placement`.
    pub(super) dispatched: usize,
    /// The exchange whose input was refused here. Read by all ranks that wait for it.
    pub(super) refused: usize,
    /// Where attention and experts are apart: this rank takes part in no exchange from this one on (0: it goes on). Read by who waits for
    /// it. See [`roles`](super::roles).
    pub(super) closed: usize,
    slots: [SlotLayout; SLOTS],
    /// Bytes from one row to the next, of outputs and sums.
    pub(super) stride: usize,
    /// Where things lie in a token row.
    pub(super) token: RowLayout,
    /// Rows of the output area.
    pub(super) output_rows: usize,
    /// Rows of the area of sums.
    pub(super) sum_rows: usize,
    /// Positions that a placement may have.
    pub(super) positions: usize,
    /// Slots that a rank may have: entries of `bases` per source.
    pub(super) bases_per_source: usize,
    /// Where the words end.
    words_end: usize,
    /// Bytes of the outbox of a rank that sends tokens, and of one that has experts: the same where every rank does both. Where
    /// none does, either has its own areas after the words, at offsets that the other's have in its own outbox.
    pub(super) send_bytes: usize,
    receive_bytes: usize,
}

/// One exchange's part of the outbox.
#[derive(Clone)]
pub(super) struct SlotLayout {
    /// Epoch word: outputs of this exchange are complete, and its tokens are no longer read here. Read by all ranks. One per
    /// slot, since the two exchanges in flight may be combined in either order. On its line is `abandoned`.
    pub(super) combined: usize,
    /// The exchange of this slot that was given up here before combining. Read by all ranks, after `combined`.
    pub(super) abandoned: usize,
    /// u32: tokens of this rank.
    pub(super) tokens: usize,
    /// u64, twice: the mark of the placement that this rank's lists go by, on the line of `dispatched`, and the first exchange that
    /// it was used in, on that of `combined`.
    pub(super) placement: [usize; 2],
    /// u64: output rows of this rank that are written. Changed by this rank's own kernels, on whatever device, read by this
    /// rank.
    pub(super) done: usize,
    /// u32 per position, and one more: where its entries begin.
    pub(super) starts: Range<usize>,
    /// The entries, sorted by position, then token.
    pub(super) entries: Range<usize>,
    /// u32 per source and local slot: the output row of its first entry. With [`Reduction::PerRank`] the first one of
    /// each source counts: the row of its first sum.
    pub(super) bases: Range<usize>,
    /// The token rows, as the wire format has them: one per token, or with smooth scales one per entry, in the entries' order.
    pub(super) rows: Range<usize>,
    /// The expert output rows.
    pub(super) outputs: Range<usize>,
    /// The sums of this rank's experts, one row per source and token, with [`Reduction::PerRank`] only.
    pub(super) sums: Range<usize>,
}

/// Areas of one slot.
pub(super) const AREAS: usize = 6;

impl SlotLayout {
    /// Everything that only one value at a time may write, in the order of their offsets; those that a rank with this part does not
    /// have are empty. All lie at `end` or later, which becomes the end of the last.
    pub(super) fn areas(&self, part: Part, end: &mut usize) -> [Range<usize>; AREAS] {
        let SlotLayout { starts, entries, bases, rows, outputs, sums, .. } = self.clone();
        let (sent, received) = (part.sends(), part.receives());
        let areas =
            [(starts, sent), (entries, sent), (bases, received), (rows, sent), (outputs, received), (sums, received)];
        areas.map(|(area, has)| {
            let area = if has { area } else { *end..*end };
            *end = area.end;
            area
        })
    }
}

impl MoeLayout {
    pub(super) fn new(config: &MoeConfig, parties: &Parties) -> Self {
        let sources = parties.sources.len();
        let stride = (config.hidden * config.dtype.size()).next_multiple_of(LINE);
        let token = config.wire.row_layout(config.hidden, config.dtype);
        let token_rows = config.max_tokens * if config.smooth.is_some() { config.width().choices() } else { 1 };
        let choices = config.max_tokens * config.width().choices();
        let worst = sources * choices;
        let output_rows = config.max_expert_rows.unwrap_or(worst).min(worst);
        let sum_rows = match config.reduction {
            Reduction::PerExpert => 0,
            Reduction::PerRank => (sources * config.max_tokens).min(output_rows),
        };
        let (positions, bases_per_source) = config.room(parties.ranks());

        let mut layout = Layout::default();
        let dispatched = layout.add(LINE);
        let (refused, closed) = (dispatched + 8, dispatched + 32);
        let words: [_; SLOTS] = std::array::from_fn(|slot| {
            let [combined, done] = std::array::from_fn(|_| layout.add(LINE));
            let placement = [dispatched + 40 + slot * 8, combined + 16];
            ([combined, combined + 8, dispatched + 16 + slot * 8, done], placement)
        });
        // The areas of who sends and of who receives: after one another, or where no rank does both, each from the words on.
        let words_end = words[SLOTS - 1].0[3] + LINE;
        let (mut other, received) = (layout.clone(), usize::from(parties.are_apart));
        let mut layouts = [&mut layout, &mut other];
        const SENT: usize = 0;
        let slots = words.map(|([combined, abandoned, tokens, done], placement)| {
            let mut area = |of: usize, bytes: usize, align: usize| {
                let start = layouts[of].add_aligned(bytes, align);
                start..start + bytes
            };
            SlotLayout {
                combined,
                abandoned,
                tokens,
                placement,
                done,
                starts: area(SENT, (positions + 1) * 4, LINE),
                entries: area(SENT, choices * size_of::<Entry>(), LINE),
                bases: area(received, sources * bases_per_source * 4, LINE),
                rows: area(SENT, token_rows * token.stride, PAGE),
                outputs: area(received, output_rows * stride, PAGE),
                sums: area(received, sum_rows * stride, PAGE),
            }
        });
        let bytes = [layout.bytes(), other.bytes()];
        let (send_bytes, receive_bytes) = (bytes[SENT], bytes[received]);
        MoeLayout {
            dispatched,
            refused,
            closed,
            slots,
            stride,
            token,
            output_rows,
            sum_rows,
            positions,
            bases_per_source,
            words_end,
            send_bytes,
            receive_bytes,
        }
    }

    /// Bytes of the outbox of a rank with this part: of one with no part a page, which is never touched.
    pub(super) fn bytes_of(&self, part: Part) -> usize {
        match part {
            Part::Both => self.send_bytes.max(self.receive_bytes),
            Part::Source => self.send_bytes,
            Part::Destination => self.receive_bytes,
            Part::Neither => PAGE,
        }
    }

    /// Takes this rank's outbox apart: the words, and each slot's areas.
    pub(super) fn split(&self, own: Arc<Mapping>, part: Part) -> (Words, [[Area; AREAS]; SLOTS]) {
        let mut end = self.words_end;
        let [first, second] = self.slots.each_ref().map(|slot| slot.areas(part, &mut end));
        let [a, b, c, d, e, f] = first;
        let [g, h, i, j, k, l] = second;
        let (words, [a, b, c, d, e, f, g, h, i, j, k, l]) = area::split(own, [a, b, c, d, e, f, g, h, i, j, k, l]);
        (words, [[a, b, c, d, e, f], [g, h, i, j, k, l]])
    }

    /// The part of the outbox that exchange `epoch` uses.
    pub(super) fn slot(&self, epoch: u64) -> &SlotLayout {
        &self.slots[slot_of(epoch)]
    }
}

const PAGE: usize = 4096;
/// The line of `dispatched` has room for the words of all slots.
const _: () = assert!(40 + SLOTS * 8 <= LINE);
