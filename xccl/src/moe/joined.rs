//! The halves two by two, for engines that have nothing to do in between.

use super::{Exchange, ExpertBatch, Moe, Routing};
use crate::dtype::{Element, ExpertId};
use crate::error::Result;

impl Moe {
    /// Both halves of a dispatch: [`dispatch_send`](Self::dispatch_send), then [`dispatch_recv`](Self::dispatch_recv). Blocks
    /// until all ranks have sent.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, DType, Moe, MoeConfig, Routing, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// # let moe = Moe::new(&comm, MoeConfig::new(8, 16, 1, 4, DType::F32))?;
    /// let (sent, mut batch) = moe.dispatch(&[1.0f32; 32], &Routing::new(&[0i32, 3], &[1.0, 0.5]))?;
    /// for i in 0..batch.len() {
    ///     batch.output_row::<f32>(i)?.fill(4.0);
    /// }
    /// let mut out = [0.0f32; 32];
    /// moe.combine(sent, batch, &mut out)?;
    /// assert_eq!((out[0], out[31]), (4.0, 2.0));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of the two halves. One of the second gives the exchange up, which the other ranks are told
    /// ([`Error::PeerAbandoned`](crate::Error::PeerAbandoned)): to try again after
    /// [`Error::PeerRefused`](crate::Error::PeerRefused) or [`Error::Timeout`](crate::Error::Timeout), call the halves.
    pub fn dispatch<'m, E: Element, I: ExpertId>(
        &'m self,
        tokens: &[E],
        routing: &Routing<'_, I>,
    ) -> Result<(Exchange<'m>, ExpertBatch<'m>)> {
        let sent = self.dispatch_send(tokens, routing)?;
        let batch = self.dispatch_recv(&sent)?;
        Ok((sent, batch))
    }

    /// Both halves of a combine: [`combine_send`](Self::combine_send), then [`combine_recv`](Self::combine_recv). Blocks until
    /// the ranks that had tokens of this one have published their experts' outputs.
    ///
    /// # Errors
    /// Those of the two halves. The exchange has ended then.
    pub fn combine<E: Element>(&self, sent: Exchange<'_>, batch: ExpertBatch<'_>, out: &mut [E]) -> Result<()> {
        self.combine_send(batch)?;
        self.combine_recv(sent, out)
    }
}
