//! What lies where in a MoE handle's outbox.

use bytemuck::{Pod, Zeroable};

use super::MoeConfig;
use crate::memory::layout::{LINE, Layout};

/// Exchanges that may be in flight.
pub(super) const SLOTS: usize = 2;

/// One choice of one token, in the list for the rank that holds its expert.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub(super) struct Entry {
    /// Row of the sender's outbox.
    pub(super) token: u32,
    pub(super) weight: f32,
}

const _: () = assert!(size_of::<Entry>() == 8 && align_of::<Entry>() == 4);

/// Offsets. All words have one writer, the outbox's owner.
pub(super) struct MoeLayout {
    /// Epoch word: tokens and lists of this exchange are complete. Read by all ranks.
    pub(super) dispatched: usize,
    /// The exchange whose input was refused here. Read by all ranks that wait for it.
    pub(super) refused: usize,
    slots: [SlotLayout; SLOTS],
    /// Bytes from one row to the next.
    pub(super) stride: usize,
    /// Rows of the output area.
    pub(super) output_rows: usize,
    pub(super) bytes: usize,
}

/// One exchange's part of the outbox.
#[derive(Clone, Copy)]
pub(super) struct SlotLayout {
    /// Epoch word: outputs of this exchange are complete, and its tokens are no longer read here. Read by all ranks. One per
    /// slot, since the two exchanges in flight may be combined in either order.
    pub(super) combined: usize,
    /// The exchange of this slot that was given up here before combining. Read by all ranks, after `combined`.
    pub(super) abandoned: usize,
    /// u32: tokens of this rank.
    pub(super) tokens: usize,
    /// u32 per expert position, and one more: where its entries begin.
    pub(super) starts: usize,
    /// The entries, sorted by expert position, then token.
    pub(super) entries: usize,
    /// u32 per source rank: the first output row of its entries.
    pub(super) bases: usize,
    /// The token rows.
    pub(super) rows: usize,
    /// The expert output rows.
    pub(super) outputs: usize,
}

impl MoeLayout {
    pub(super) fn new(config: &MoeConfig, world_size: usize) -> Self {
        let stride = (config.hidden * config.dtype.size()).next_multiple_of(LINE);
        // A token's experts on one rank are at most topk, and at most the experts there are.
        let worst = world_size * config.max_tokens * config.topk;
        let output_rows = config.max_expert_rows.unwrap_or(worst).min(worst);
        let mut layout = Layout::default();
        let [dispatched, refused] = std::array::from_fn(|_| layout.add(LINE));
        let slots = std::array::from_fn(|_| SlotLayout {
            combined: layout.add(LINE),
            abandoned: layout.add(LINE),
            tokens: layout.add(4),
            starts: layout.add((config.experts + 1) * 4),
            entries: layout.add(config.max_tokens * config.topk * size_of::<Entry>()),
            bases: layout.add(world_size * 4),
            rows: layout.add_aligned(config.max_tokens * stride, 4096),
            outputs: layout.add_aligned(output_rows * stride, 4096),
        });
        let bytes = layout.bytes();
        MoeLayout { dispatched, refused, slots, stride, output_rows, bytes }
    }

    /// The part of the outbox that exchange `epoch` uses.
    pub(super) fn slot(&self, epoch: u64) -> &SlotLayout {
        &self.slots[(epoch % SLOTS as u64) as usize]
    }
}
