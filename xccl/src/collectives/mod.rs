//! Operations that all ranks of a communicator make together.
//!
//! Every rank has slots in its outbox that only it writes and the others read ([`slots`]). A collective is made of steps: in each,
//! a rank fills its slot, publishes it with one store, and reads those of the others where they are ([`sync::steps`] tells who may
//! touch what when). What a collective does in each step is told in [`pattern`], who moves it on in [`engine`].
//!
//! All ranks make the same calls in the same order. Where they do not, each of them gets
//! [`Error::CallMismatch`](crate::Error::CallMismatch) with both ranks' calls: in that collective, or, where a rank reads from nobody
//! in it (the root of a broadcast), in the next one in which it does.
//!
//! [`sync::steps`]: crate::sync::steps

mod between;
pub(crate) mod engine;
pub(crate) mod failure;
mod group;
mod kernels;
mod pattern;
mod request;
pub(crate) mod slots;
#[cfg(test)]
mod tests;
mod types;
mod varied;

pub use request::{Collective, RawCollective};
pub use types::{DataType, ReduceOp, Value};

/// What a collective asks for, from the two words that say so.
pub(crate) fn describe(call: [u64; 2]) -> String {
    types::Call::describe(call)
}

use std::ops::Range;

use crate::comm::Communicator;
use crate::error::Result;

impl Communicator {
    /// Returns when every rank has called it. What any rank wrote before its call is visible after it.
    ///
    /// # Errors
    /// [`Error::Timeout`](crate::Error::Timeout) names a rank that has not come, [`Error::PeerDied`](crate::Error::PeerDied)
    /// and [`Error::PeerLeft`](crate::Error::PeerLeft) one that will not.
    pub fn barrier(&self) -> Result<()> {
        self.inner.barrier()
    }

    /// Makes a collective and waits until this rank's part in it is over: its buffers may be used again.
    ///
    /// # Errors
    /// Arguments that this rank can see to be wrong ([`Error::InvalidRank`](crate::Error::InvalidRank),
    /// [`Error::Shape`](crate::Error::Shape)) are reported before anything is published: the call may be repeated, the others wait
    /// for it. After any other error the communicator makes no collectives any more:
    /// [`Error::CallMismatch`](crate::Error::CallMismatch) where ranks make different calls,
    /// [`Error::GivenUp`](crate::Error::GivenUp) where another one has met its deadline, and what waiting can meet.
    pub fn collective<T: Value>(&self, collective: Collective<'_, T>) -> Result<()> {
        // SAFETY: the buffers are borrowed until the call returns, and it leaves nothing on its way.
        let ask = unsafe { collective.ask(&self.inner) }?;
        self.inner.collectives.run(&self.inner, ask)
    }

    /// Joins the elements of all ranks' `send`, and gives the result to all, with the same bits on each. Both buffers have as many
    /// elements, on all ranks. The order of joining is [`ReduceOp`]'s.
    ///
    /// ```
    /// use xccl::{Communicator, Config, ReduceOp, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let mut sums = [0.0f32; 3];
    /// comm.all_reduce(&[1.0, 2.0, 3.0], &mut sums, ReduceOp::Sum)?;
    /// assert_eq!(sums, [1.0, 2.0, 3.0].map(|x| x * comm.world_size() as f32));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`collective`](Self::collective); so it is for all of them.
    pub fn all_reduce<T: Value>(&self, send: &[T], recv: &mut [T], op: ReduceOp) -> Result<()> {
        self.collective(Collective::AllReduce { send: Some(send), recv, op })
    }

    /// As [`all_reduce`](Self::all_reduce), in one buffer.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn all_reduce_in_place<T: Value>(&self, buffer: &mut [T], op: ReduceOp) -> Result<()> {
        self.collective(Collective::AllReduce { send: None, recv: buffer, op })
    }

    /// As [`all_reduce`](Self::all_reduce), but only `root` gets the result; on the others `recv` is not used, and may be empty.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn reduce<T: Value>(&self, send: &[T], recv: &mut [T], op: ReduceOp, root: usize) -> Result<()> {
        self.collective(Collective::Reduce { send: Some(send), recv, op, root })
    }

    /// As [`reduce`](Self::reduce), in one buffer, which keeps its elements on the other ranks.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn reduce_in_place<T: Value>(&self, buffer: &mut [T], op: ReduceOp, root: usize) -> Result<()> {
        self.collective(Collective::Reduce { send: None, recv: buffer, op, root })
    }

    /// Joins the elements of all ranks, and gives each rank a block of the result: `send` has as many blocks as there are ranks,
    /// each as long as `recv`.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn reduce_scatter<T: Value>(&self, send: &[T], recv: &mut [T], op: ReduceOp) -> Result<()> {
        self.collective(Collective::ReduceScatter { send: Some(send), recv, op })
    }

    /// As [`reduce_scatter`](Self::reduce_scatter), in one buffer: rank r finds its result in block r, the others keep their
    /// elements.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn reduce_scatter_in_place<T: Value>(&self, buffer: &mut [T], op: ReduceOp) -> Result<()> {
        self.collective(Collective::ReduceScatter { send: None, recv: buffer, op })
    }

    /// Gives every rank's `send` to all: rank r's is block r of `recv`.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let mut ranks = vec![0; comm.world_size()];
    /// comm.all_gather(&[comm.rank() as i32], &mut ranks)?;
    /// assert!(ranks.iter().enumerate().all(|(i, &rank)| rank == i as i32));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn all_gather<T: Value>(&self, send: &[T], recv: &mut [T]) -> Result<()> {
        self.collective(Collective::AllGather { send: Some(send), recv })
    }

    /// As [`all_gather`](Self::all_gather), in one buffer: rank r's elements are in block r already.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn all_gather_in_place<T: Value>(&self, buffer: &mut [T]) -> Result<()> {
        self.collective(Collective::AllGather { send: None, recv: buffer })
    }

    /// As [`all_gather`](Self::all_gather), but only `root` gets the blocks; on the others `recv` is not used, and may be empty.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn gather<T: Value>(&self, send: &[T], recv: &mut [T], root: usize) -> Result<()> {
        self.collective(Collective::Gather { send: Some(send), recv, root })
    }

    /// As [`gather`](Self::gather), in one buffer: `root`'s has all blocks, its own in place; that of another rank is its block.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn gather_in_place<T: Value>(&self, buffer: &mut [T], root: usize) -> Result<()> {
        self.collective(Collective::Gather { send: None, recv: buffer, root })
    }

    /// Gives block r of `root`'s `send` to rank r; on the others `send` is not used, and may be empty.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn scatter<T: Value>(&self, send: &[T], recv: &mut [T], root: usize) -> Result<()> {
        self.collective(Collective::Scatter { send: Some(send), recv, root })
    }

    /// As [`scatter`](Self::scatter), in one buffer: `root`'s has all blocks and keeps them; that of another rank gets its block.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn scatter_in_place<T: Value>(&self, buffer: &mut [T], root: usize) -> Result<()> {
        self.collective(Collective::Scatter { send: None, recv: buffer, root })
    }

    /// Gives `root`'s buffer to all. `root` may return before the others have called.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn broadcast<T: Value>(&self, buffer: &mut [T], root: usize) -> Result<()> {
        self.collective(Collective::Broadcast { send: None, recv: buffer, root })
    }

    /// Gives block r of each rank's `send` to rank r, where it becomes the block of that rank in `recv`.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn all_to_all<T: Value>(&self, send: &[T], recv: &mut [T]) -> Result<()> {
        self.collective(Collective::AllToAll { send: Some(send), recv })
    }

    /// As [`all_to_all`](Self::all_to_all), in one buffer.
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn all_to_all_in_place<T: Value>(&self, buffer: &mut [T]) -> Result<()> {
        self.collective(Collective::AllToAll { send: None, recv: buffer })
    }

    /// As [`all_to_all`](Self::all_to_all), with parts of different sizes: rank r gets `send_parts[r]` of this rank's `send`, and
    /// what rank r has for this one goes to `recv_parts[r]` of `recv`. A rank's two numbers of elements, as sender and receiver
    /// see them, have to agree.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let (rank, world) = (comm.rank(), comm.world_size());
    /// // Rank r sends r + 1 elements to each.
    /// let (sent, got) = (vec![rank as i32; rank + 1], world * (world + 1) / 2);
    /// let from: Vec<_> = (0..world).map(|r| r * (r + 1) / 2..(r + 1) * (r + 2) / 2).collect();
    /// let mut all = vec![-1; got];
    /// comm.all_to_all_v(&sent, &vec![0..rank + 1; world], &mut all, &from)?;
    /// assert!(from.iter().enumerate().all(|(r, part)| all[part.clone()].iter().all(|&x| x == r as i32)));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    pub fn all_to_all_v<T: Value>(
        &self,
        send: &[T],
        send_parts: &[Range<usize>],
        recv: &mut [T],
        recv_parts: &[Range<usize>],
    ) -> Result<()> {
        self.collective(Collective::AllToAllV { send: Some(send), send_parts, recv, recv_parts })
    }
}
