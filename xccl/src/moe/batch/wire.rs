//! Rows of a batch that travel encoded: decoded on the way, or handed over as they are.

use super::ExpertBatch;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::memory::divided::{Divided, Owners};
use crate::memory::row::Row;
use crate::moe::Outboxes;
use crate::moe::received::Received;
use crate::moe::wire::{self, COLUMN_ALIGN, ScaleLayout, WireFormat};

/// A row as it travels: see [`ExpertBatch::row_wire`].
#[derive(Clone, Copy, Debug)]
pub struct WireRow<'b> {
    /// The values: [`WireFormat::value_bytes`] bytes, aligned to 64.
    pub values: &'b [u8],
    /// The scales: [`WireFormat::scales`] of them.
    pub scales: &'b [f32],
}

/// Rows whose scales are written to their columns together, a line of each: columns may lie so that the caches have no room
/// for a line of each at once.
const TOGETHER: usize = 16;

impl<'m> Outboxes<'m> {
    /// The values of the token row at `offset` of a source's outbox.
    fn values(&self, source: usize, offset: usize) -> Row<'m, u8> {
        self.peers[source].row(offset, self.layout.token.values)
    }

    /// Its scales.
    fn scales(&self, source: usize, offset: usize) -> Row<'m, f32> {
        self.peers[source].row(offset + self.layout.token.scales_at, self.layout.token.scales)
    }

    /// Copies it out, decoded.
    fn copy_token<E: Element>(&self, source: usize, offset: usize, to: &mut [E]) {
        match self.format {
            (_, WireFormat::Native) => self.token(source, offset).copy_to(to),
            format => wire::decode(format, self.peers[source].row(offset, self.layout.token.stride), to),
        }
    }
}

impl ExpertBatch<'_> {
    /// Copies the token of an entry of `source`, decoded.
    pub(super) fn copy_token<E: Element>(&self, source: usize, entry: usize, to: &mut [E]) {
        self.moe.outboxes().copy_token(source, self.token_offset(source, entry), to);
    }

    /// Row `i` as it travels, where it lies in the sender's memory. With [`WireFormat::Native`] its values are the elements'
    /// bytes, and there are no scales.
    ///
    /// # Panics
    /// When `i` is not below [`len`](Self::len).
    ///
    /// # Safety
    /// As for [`row_slice`](Self::row_slice).
    pub unsafe fn row_wire(&self, i: usize) -> WireRow<'_> {
        assert!(i < self.len(), "row {i} of {}", self.len());
        let (_, source, entry) = self.received().locate(i);
        let (outboxes, offset) = (self.moe.outboxes(), self.token_offset(source, entry));
        // SAFETY: unchanged for as long as the batch is borrowed, by the caller's acceptance.
        let (values, scales) =
            unsafe { (outboxes.values(source, offset).as_slice(), outboxes.scales(source, offset).as_slice()) };
        WireRow { values, scales }
    }

    /// As [`copy_into`](Self::copy_into), with the rows as they travel: values `[aligned_rows(align), value bytes]`, and their
    /// scales as `layout` says, for as many rows ([`ScaleLayout::elements`]). What belongs to rows in between is left as it is.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, DType, Moe, MoeConfig, Routing, ScaleLayout, UniqueId, WireFormat};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let config = MoeConfig { wire: WireFormat::Fp8E4m3, ..MoeConfig::new(8, 256, 1, 4, DType::F32) };
    /// let moe = Moe::new(&comm, config)?;
    /// let sent = moe.dispatch_send(&[1.0f32; 2 * 256], &Routing::new(&[0i32, 3], &[1.0, 0.5]))?;
    /// let mut batch = moe.dispatch_recv(&sent)?;
    /// let rows = batch.aligned_rows(1);
    /// let mut values = vec![0u8; rows * 256];
    /// let mut scales = vec![0.0f32; ScaleLayout::ColumnMajor.elements(rows, 2)]; // one per 128 channels
    /// batch.copy_wire_into(&mut values, &mut scales, ScaleLayout::ColumnMajor, 1)?;
    /// assert_eq!((values[0], scales[0]), (0x7e, 1.0 / 448.0)); // the code of 448
    /// # moe.combine_send_from(batch, &[1.0f32; 2 * 256])?;
    /// # moe.combine_recv(sent, &mut [0.0f32; 2 * 256])
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`] when `values` or `scales` is too small.
    pub fn copy_wire_into(
        &mut self,
        values: &mut [u8],
        scales: &mut [f32],
        layout: ScaleLayout,
        align: usize,
    ) -> Result<()> {
        let (align, rows) = (align.max(1), self.aligned_rows(align));
        let mut end = 0;
        let begin = |count: usize| {
            let begin = end;
            end += count.next_multiple_of(align);
            begin
        };
        self.copy_wire((values, scales), layout, (1, rows), begin)
    }

    /// As [`copy_padded`](Self::copy_padded), with the rows as they travel: values `[local experts, capacity, value bytes]`, and
    /// for each expert the scales of `capacity` rows as `layout` says.
    ///
    /// # Errors
    /// [`Error::CapacityExceeded`] names an expert with more rows, before anything is written; [`Error::Shape`].
    pub fn copy_wire_padded(
        &mut self,
        values: &mut [u8],
        scales: &mut [f32],
        layout: ScaleLayout,
        capacity: usize,
    ) -> Result<()> {
        if let Some((expert, &rows)) = self.counts().iter().enumerate().find(|&(_, &rows)| rows as usize > capacity) {
            return Err(Error::CapacityExceeded { expert, rows: rows as usize, capacity });
        }
        let mut experts = 0..self.counts().len();
        let begin = |_| experts.next().unwrap_or(0) * capacity;
        self.copy_wire((values, scales), layout, (self.counts().len(), capacity), begin)
    }

    /// `parts` matrices of `rows` rows; `begin` gives the place of each expert's first row, from its count.
    fn copy_wire(
        &mut self,
        (values, scales): (&mut [u8], &mut [f32]),
        layout: ScaleLayout,
        (parts, rows): (usize, usize),
        mut begin: impl FnMut(usize) -> usize,
    ) -> Result<()> {
        let token = self.moe.layout.token;
        let all = parts.saturating_mul(rows);
        let check = |what, given, needed: usize| match given >= needed {
            true => Ok(()),
            false => {
                let expected = format!("at least {needed} (for {all} rows, {layout:?} scales)");
                Err(Error::Shape { what, given, expected })
            }
        };
        check("the values' buffer", values.len(), all.saturating_mul(token.values))?;
        check("the scales' buffer", scales.len(), parts.saturating_mul(layout.elements(rows, token.scales)))?;

        let Received { counts, places, scales: row_scales, .. } = self.received_mut();
        places.iter_mut().zip(&*counts).for_each(|(place, &count)| *place = begin(count as usize));
        row_scales.resize(TOGETHER * token.scales, 0.0);
        let mut row_scales = std::mem::take(row_scales);
        self.copy_scales(scales, layout, (parts, rows), &mut row_scales);
        self.received_mut().scales = row_scales;

        let (epoch, outboxes) = (self.epoch, self.moe.outboxes());
        self.fill_layout(values, token.values, &|copying, tokens, to| {
            let received = copying.received;
            for span in tokens {
                let (source, entries) = (span.source as usize, received.entries_at(span));
                for (&entry, place) in entries.iter().zip(received.places_of(span)) {
                    let offset = outboxes.token_offset(epoch, received, source, entry as usize);
                    copying.copy(outboxes.values(source, offset), to.row_mut(place));
                }
            }
        })
    }

    /// Copies the scales of all rows, in the batch's order, so that what lies side by side is written one after the other;
    /// `held` has room for those of [`TOGETHER`] rows. One lane does it: 3 bytes of a hundred at most.
    fn copy_scales(&self, to: &mut [f32], layout: ScaleLayout, (parts, rows): (usize, usize), held: &mut [f32]) {
        let (received, outboxes, per_row) = (self.received(), self.moe.outboxes(), held.len() / TOGETHER);
        if per_row == 0 {
            return;
        }
        let column = rows.next_multiple_of(COLUMN_ALIGN);
        for (expert, &begin) in received.places.iter().enumerate() {
            // Places count through one matrix after the other.
            let part = if parts == 1 { 0 } else { expert };
            let (mut at, mut n) = (begin, 0);
            let sources = self.moe.parties.sources.iter();
            let entries = sources.flat_map(|&s| received.range(s, expert).map(move |e| (s, e)));
            let mut entries = entries.peekable();
            while let Some((source, entry)) = entries.next() {
                let from = outboxes.scales(source, self.token_offset(source, entry));
                at += 1;
                if layout == ScaleLayout::RowMajor {
                    from.copy_to(&mut to[(at - 1) * per_row..at * per_row]);
                    continue;
                }
                from.copy_to(&mut held[n * per_row..(n + 1) * per_row]);
                n += 1;
                if at.is_multiple_of(TOGETHER) || entries.peek().is_none() {
                    let matrix = &mut to[part * column * per_row..][..column * per_row];
                    let first = at - n - part * rows;
                    for (c, to) in matrix.chunks_exact_mut(column).enumerate() {
                        let of_rows = held[c..].iter().step_by(per_row);
                        to[first..first + n].iter_mut().zip(of_rows).for_each(|(to, scale)| *to = *scale);
                    }
                    n = 0;
                }
            }
        }
    }

    /// As `copy_experts`, decoding each token row once.
    pub(super) fn decode_experts<E: Element>(&mut self, to: &mut [E]) -> Result<()> {
        let (epoch, outboxes, hidden) = (self.epoch, self.moe.outboxes(), self.moe.config.hidden);
        let pieces = self.cut_copying(hidden * size_of::<E>()).pieces;
        let mut decoded = std::mem::take(&mut self.received_mut().decoded);
        decoded.resize(decoded.len().max(pieces * hidden), 0.0);
        let scratch = Divided::new(&mut decoded, hidden, Owners::Blocks(1));
        let copied = self.fill_layout(to, hidden, &|copying, tokens, to| {
            let (received, mut scratch) = (copying.received, scratch.part(copying.piece));
            let decoded = &mut bytemuck::cast_slice_mut::<f32, E>(scratch.row_mut(copying.piece))[..hidden];
            for span in tokens {
                let (source, entries) = (span.source as usize, received.entries_at(span));
                for (i, (&entry, place)) in entries.iter().zip(received.places_of(span)).enumerate() {
                    if i == 0 || outboxes.row_per_entry {
                        let offset = outboxes.token_offset(epoch, received, source, entry as usize);
                        outboxes.copy_token(source, offset, decoded);
                    }
                    copying.copy(Row::from(&*decoded), to.row_mut(place));
                }
            }
        });
        self.received_mut().decoded = decoded;
        copied
    }
}
