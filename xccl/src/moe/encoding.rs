//! Token rows that travel encoded, as the sender makes them.

use super::placement::placed::Placed;
use super::routing::Choice;
use super::wire::{self, WireFormat};
use super::{Exchange, Moe, Routing};
use crate::dtype::{Element, ExpertId};
use crate::error::{Error, Result};
use crate::memory::area::Area;
use crate::memory::divided::Owners;

/// Rows of this rank's outbox, to write tokens in that the engine has quantized itself, so that
/// [`Moe::dispatch_send_wire_rows`] copies nothing.
///
/// Dropping them gives them back.
pub struct WireRows<'m> {
    moe: &'m Moe,
    tokens: usize,
    epoch: u64,
    /// `None` once they were given back.
    rows: Option<Area>,
}

impl WireRows<'_> {
    /// The number of rows.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// The values and the scales of row `token`, with the contents that an earlier exchange left there: as many as the wire
    /// format has ([`WireFormat::value_bytes`], [`WireFormat::scales`]). A value is its code's times its scale; nothing is
    /// checked, the experts' ranks take them as they are.
    ///
    /// # Panics
    /// When `token` is not below [`len`](Self::len).
    pub fn row(&mut self, token: usize) -> (&mut [u8], &mut [f32]) {
        assert!(token < self.tokens, "row {token} of {}", self.tokens);
        let layout = &self.moe.layout.token;
        layout.split(self.rows.as_mut().expect("held until dropped").slice_mut(token * layout.stride, layout.stride))
    }

    /// All rows at once: `[len, stride]` bytes, of which each row begins with its values; its scales are
    /// [`scales_offset`](Moe::scales_offset) bytes from there.
    pub fn matrix(&mut self) -> &mut [u8] {
        let bytes = self.tokens * self.stride();
        self.rows.as_mut().expect("held until dropped").slice_mut(0, bytes)
    }

    /// Bytes from one row to the next.
    pub fn stride(&self) -> usize {
        self.moe.layout.token.stride
    }
}

impl Drop for WireRows<'_> {
    fn drop(&mut self) {
        self.moe.state.borrow_mut().flight(self.epoch).rows = self.rows.take();
    }
}

impl Moe {
    /// Rows of the outbox for the next exchange, in the wire format: for engines that hold quantized tokens.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, DType, Moe, MoeConfig, Routing, UniqueId, WireFormat};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let config = MoeConfig { wire: WireFormat::Int8, ..MoeConfig::new(8, 64, 1, 4, DType::F32) };
    /// let moe = Moe::new(&comm, config)?;
    /// let mut rows = moe.input_wire_rows(1)?;
    /// let (values, scales) = rows.row(0);
    /// values.fill(-3i8 as u8);
    /// scales[0] = 0.5;
    /// let sent = moe.dispatch_send_wire_rows(rows, &Routing::new(&[2i32], &[1.0]))?;
    /// let batch = moe.dispatch_recv(&sent)?;
    /// let mut row = [0.0f32; 64];
    /// batch.copy_row(0, &mut row)?;
    /// assert_eq!(row, [-1.5; 64]);
    /// # moe.combine_send_from(batch, &row)?;
    /// # moe.combine_recv(sent, &mut row)
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`input_rows`](Self::input_rows); [`Error::Wire`] with smooth scales, where a token has several rows.
    pub fn input_wire_rows(&self, tokens: usize) -> Result<WireRows<'_>> {
        let check = || match self.config.smooth {
            None => Ok(()),
            Some(_) => {
                self.wrong_wire("input_wire_rows", "with smooth scales a token's row differs from expert to expert")
            }
        };
        let (epoch, rows) = self.lend("input_wire_rows", tokens, check)?;
        Ok(WireRows { moe: self, tokens, epoch, rows: Some(rows) })
    }

    /// As [`dispatch_send`](Self::dispatch_send), for tokens that lie in the outbox already, in the wire format.
    ///
    /// # Errors
    /// As [`dispatch_send_rows`](Self::dispatch_send_rows).
    pub fn dispatch_send_wire_rows<'m, I: ExpertId>(
        &'m self,
        rows: WireRows<'m>,
        routing: &Routing<'_, I>,
    ) -> Result<Exchange<'m>> {
        let (moe, epoch, tokens) = (rows.moe, rows.epoch, rows.tokens);
        self.send_lent("dispatch_send_wire_rows", (moe, epoch, tokens), routing, || drop(rows))
    }

    /// Bytes from where a token row begins to its scales; `None` where the wire format has none.
    pub fn scales_offset(&self) -> Option<usize> {
        (self.layout.token.scales > 0).then_some(self.layout.token.scales_at)
    }

    /// Encodes tokens, `[T, hidden]`, into the outbox: each once, or with smooth scales once for each of its choices, as the
    /// row that its entry has in the lists, whose parts begin at `starts`.
    pub(super) fn encode_tokens<E: Element>(
        &self,
        tokens: &[E],
        rows: &mut Area,
        (placed, starts): (&Placed, &[u32]),
        choices: &[Choice],
    ) -> Result<()> {
        let (format, token, hidden) = ((self.kernels, self.config.wire), &self.layout.token, self.config.hidden);
        let (count, each) = (tokens.len() / hidden, self.config.width().choices());
        let Some(smooth) = &self.config.smooth else {
            let lanes = self.lanes();
            let cut = lanes.cut(count, count * token.stride);
            let rows = rows.divide::<u8>(0, count, token.stride, Owners::Blocks(cut.each));
            return lanes.share(cut, &|piece| {
                let (mut rows, range) = (rows.part(piece), cut.range(piece));
                let tokens = tokens[range.start * hidden..range.end * hidden].chunks_exact(hidden);
                for (i, row) in range.zip(tokens) {
                    let (values, scales) = token.split(rows.row_mut(i));
                    wire::encode(format, row, None, values, scales);
                }
                Ok(())
            });
        };
        for (row, choices) in tokens.chunks_exact(hidden).zip(choices.chunks_exact(each)) {
            for choice in choices.iter().filter(|c| c.is_placed()) {
                let position = choice.position as usize;
                let entry = (starts[position] + choice.index) as usize;
                let (values, scales) = token.split(rows.slice_mut(entry * token.stride, token.stride));
                wire::encode(format, row, Some(smooth.of(placed.expert[position], hidden)), values, scales);
            }
        }
        Ok(())
    }

    /// For calls that hand out rows as they are.
    pub(super) fn check_native(&self, call: &'static str, expected: &'static str) -> Result<()> {
        if self.config.wire == WireFormat::Native { Ok(()) } else { self.wrong_wire(call, expected) }
    }

    fn wrong_wire(&self, call: &'static str, expected: &'static str) -> Result<()> {
        Err(Error::Wire { call, wire: self.config.wire.to_string(), expected })
    }
}
