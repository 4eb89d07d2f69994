//! A dispatch received source by source.

use super::batch::{BatchRow, ExpertBatch};
use crate::dtype::Element;
use crate::error::Result;

/// The rows for this rank's experts, as they arrive: see
/// [`Moe::dispatch_recv_by_source`](super::Moe::dispatch_recv_by_source).
///
/// Rows are numbered in the order of arrival, those of one source by local expert, then token. Outputs may be written as soon
/// as a row is there; [`into_batch`](Self::into_batch) gives what [`combine_send`](super::Moe::combine_send) takes. Dropping it
/// instead gives the exchange up.
///
/// ```
/// # use xccl::{Communicator, Config, DType, Moe, MoeConfig, Routing, UniqueId};
/// # fn main() -> xccl::Result<()> {
/// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
/// # let moe = Moe::new(&comm, MoeConfig::new(8, 16, 1, 4, DType::F32))?;
/// # let (ids, weights) = ([0i32, 3], [1.0f32, 0.5]);
/// let sent = moe.dispatch_send(&[1.0f32; 32], &Routing::new(&ids, &weights))?;
/// let mut arrivals = moe.dispatch_recv_by_source(&sent)?;
/// let mut row = vec![0.0f32; 16];
/// while let Some(source) = arrivals.next_source()? {
///     for i in arrivals.rows_of(source) {
///         arrivals.copy_row(i, &mut row)?;
///         let twice = row.iter().map(|x| 2.0 * x); // the expert's work
///         arrivals.output_row::<f32>(i)?.iter_mut().zip(twice).for_each(|(y, x)| *y = x);
///     }
/// }
/// moe.combine_send(arrivals.into_batch()?)?;
/// let mut out = vec![0.0f32; 32];
/// moe.combine_recv(sent, &mut out)?;
/// assert_eq!((out[0], out[16]), (2.0, 1.0));
/// # Ok(())
/// # }
/// ```
#[must_use = "dropping it gives the exchange up"]
pub struct Arrivals<'m> {
    batch: ExpertBatch<'m>,
}

impl<'m> Arrivals<'m> {
    pub(super) fn new(mut batch: ExpertBatch<'m>) -> Self {
        batch.answer_as_arrived();
        Arrivals { batch }
    }

    /// Waits for the next source's tokens; `None` when all have come.
    ///
    /// # Errors
    /// As [`dispatch_recv`](super::Moe::dispatch_recv); the call may be repeated.
    pub fn next_source(&mut self) -> Result<Option<usize>> {
        self.batch.receive_any()
    }

    /// The rows that `source` sent: none before [`next_source`](Self::next_source) has named it.
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn rows_of(&self, source: usize) -> std::ops::Range<usize> {
        self.batch.rows_of(source)
    }

    /// What row `i` is.
    ///
    /// # Panics
    /// When it has not arrived.
    pub fn row(&self, i: usize) -> BatchRow {
        self.batch.arrived_row(i)
    }

    /// The logical experts in this rank's slots: see [`ExpertBatch::local_experts`].
    pub fn local_experts(&self) -> &[usize] {
        self.batch.local_experts()
    }

    /// Copies row `i` out: `hidden` elements.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::DTypeMismatch`](crate::Error::DTypeMismatch).
    ///
    /// # Panics
    /// When it has not arrived.
    pub fn copy_row<E: Element>(&self, i: usize, to: &mut [E]) -> Result<()> {
        self.batch.copy_arrived(i, to)
    }

    /// The row of this rank's outbox that the output for row `i` is to be written to: `hidden` elements, aligned to 64 bytes.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`](crate::Error::DTypeMismatch).
    ///
    /// # Panics
    /// When it has not arrived.
    pub fn output_row<E: Element>(&mut self, i: usize) -> Result<&mut [E]> {
        self.batch.arrived_output(i)
    }

    /// The rows that `source` sent, with their addresses: see [`ExpertBatch::addresses`].
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn addresses(&mut self, source: usize) -> impl Iterator<Item = (BatchRow, *const u8, *mut u8)> + '_ {
        self.batch.arrived_addresses(source)
    }

    /// Waits for the sources that have not come, and gives all rows as one batch in its usual order. Outputs that were written
    /// stay valid.
    ///
    /// # Errors
    /// As [`next_source`](Self::next_source); the exchange is then given up.
    pub fn into_batch(mut self) -> Result<ExpertBatch<'m>> {
        while self.next_source()?.is_some() {}
        self.batch.complete();
        Ok(self.batch)
    }
}
