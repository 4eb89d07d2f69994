//! What is asked for: a collective with its buffers, made at once or in the background.

use std::ops::Range;
use std::sync::Arc;

use super::engine::{Ask, Ticket};
use super::types::{Call, ReduceOp, Value};
use crate::comm::Communicator;
use crate::comm::inner::CommInner;
use crate::error::{Error, Result};
use crate::memory::lent::LentPair;
use crate::sync::Operation;

/// A collective and its buffers, for [`Communicator::collective`] and [`Scope::start`](crate::Scope::start).
///
/// `send: None` means in place: what is sent lies in `recv` already, where the method of the same name with `_in_place` says.
/// Counts are elements, and the same on every rank.
///
/// ```
/// use xccl::{Collective, Communicator, Config, ReduceOp, UniqueId};
/// # fn main() -> xccl::Result<()> {
/// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
/// let mut losses = [0.5f32, 0.25];
/// comm.collective(Collective::AllReduce { send: None, recv: &mut losses, op: ReduceOp::Avg })?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub enum Collective<'a, T> {
    /// See [`Communicator::broadcast`].
    Broadcast {
        /// What all get, on `root`; not used on the others.
        send: Option<&'a [T]>,
        /// Where they get it.
        recv: &'a mut [T],
        /// Whose elements all get.
        root: usize,
    },
    /// See [`Communicator::gather`].
    Gather {
        /// This rank's block.
        send: Option<&'a [T]>,
        /// All blocks, on `root`.
        recv: &'a mut [T],
        /// Who gets the blocks.
        root: usize,
    },
    /// See [`Communicator::all_gather`].
    AllGather {
        /// This rank's block.
        send: Option<&'a [T]>,
        /// All blocks.
        recv: &'a mut [T],
    },
    /// See [`Communicator::scatter`].
    Scatter {
        /// All blocks, on `root`.
        send: Option<&'a [T]>,
        /// This rank's block.
        recv: &'a mut [T],
        /// Whose blocks they are.
        root: usize,
    },
    /// See [`Communicator::reduce`].
    Reduce {
        /// This rank's elements.
        send: Option<&'a [T]>,
        /// The result, on `root`.
        recv: &'a mut [T],
        /// How elements are joined.
        op: ReduceOp,
        /// Who gets the result.
        root: usize,
    },
    /// See [`Communicator::reduce_scatter`].
    ReduceScatter {
        /// This rank's elements of all blocks.
        send: Option<&'a [T]>,
        /// This rank's block of the result.
        recv: &'a mut [T],
        /// How elements are joined.
        op: ReduceOp,
    },
    /// See [`Communicator::all_reduce`].
    AllReduce {
        /// This rank's elements.
        send: Option<&'a [T]>,
        /// The result.
        recv: &'a mut [T],
        /// How elements are joined.
        op: ReduceOp,
    },
    /// See [`Communicator::all_to_all`].
    AllToAll {
        /// A block for each rank.
        send: Option<&'a [T]>,
        /// A block from each rank.
        recv: &'a mut [T],
    },
    /// See [`Communicator::all_to_all_v`].
    AllToAllV {
        /// Where the elements for the ranks are.
        send: Option<&'a [T]>,
        /// For each rank, the range of what it gets; in place it has to be that of `recv_parts`.
        send_parts: &'a [Range<usize>],
        /// Where the elements of the ranks go.
        recv: &'a mut [T],
        /// For each rank, the range where its elements go.
        recv_parts: &'a [Range<usize>],
    },
}

impl<T: Value> Collective<'_, T> {
    /// Checks what this rank can check by itself.
    ///
    /// # Safety
    /// The buffers stay good until the collective is over, whatever their lifetimes say.
    pub(crate) unsafe fn ask(self, comm: &CommInner) -> Result<Ask> {
        let (rank, world) = (comm.rank, comm.world_size);
        let root = match &self {
            Collective::Broadcast { root, .. }
            | Collective::Gather { root, .. }
            | Collective::Scatter { root, .. }
            | Collective::Reduce { root, .. } => Some(*root),
            _ => None,
        };
        if let Some(rank) = root.filter(|&root| root >= world) {
            return Err(Error::InvalidRank { rank, world_size: world });
        }
        let is_root = root == Some(rank);
        let bytes = |elements: Range<usize>| elements.start * size_of::<T>()..elements.end * size_of::<T>();
        let call = |operation, op, count| Call { operation, dtype: T::TYPE, op, root, count };
        // SAFETY: the caller's promise; so it is below.
        let apart = |send: &[T], recv: &mut [T]| unsafe {
            LentPair::apart(bytemuck::cast_slice(send), bytemuck::cast_slice_mut(recv))
        };
        // SAFETY: as above.
        let in_place = |recv: &mut [T], input: Range<usize>| unsafe {
            LentPair::in_place(bytemuck::cast_slice_mut(recv), bytes(input))
        };
        let (mut output_at, mut parts) = (0, None);
        let (call, buffers) = match self {
            Collective::Broadcast { send: Some(send), recv, .. } if is_root => {
                expect("recv", recv.len(), send.len(), 1)?;
                (call(Operation::Broadcast, None, send.len()), apart(send, recv))
            }
            Collective::Broadcast { recv, .. } => {
                let count = recv.len();
                (call(Operation::Broadcast, None, count), in_place(recv, 0..count))
            }
            Collective::Gather { send: Some(send), recv, .. } => {
                if is_root {
                    expect("recv", recv.len(), send.len(), world)?;
                }
                let recv = if is_root { recv } else { &mut [] };
                (call(Operation::Gather, None, send.len()), apart(send, recv))
            }
            Collective::Gather { send: None, recv, .. } if is_root => {
                let count = blocks_of("recv", recv.len(), world)?;
                (call(Operation::Gather, None, count), in_place(recv, rank * count..(rank + 1) * count))
            }
            Collective::Gather { send: None, recv, .. } => {
                let count = recv.len();
                (call(Operation::Gather, None, count), in_place(recv, 0..count))
            }
            Collective::AllGather { send: Some(send), recv } => {
                expect("recv", recv.len(), send.len(), world)?;
                (call(Operation::AllGather, None, send.len()), apart(send, recv))
            }
            Collective::AllGather { send: None, recv } => {
                let count = blocks_of("recv", recv.len(), world)?;
                (call(Operation::AllGather, None, count), in_place(recv, rank * count..(rank + 1) * count))
            }
            Collective::Scatter { send: Some(send), recv, .. } => {
                if is_root {
                    expect("send", send.len(), recv.len(), world)?;
                }
                let send = if is_root { send } else { &[] };
                (call(Operation::Scatter, None, recv.len()), apart(send, recv))
            }
            Collective::Scatter { send: None, recv, .. } if is_root => {
                let count = blocks_of("recv", recv.len(), world)?;
                let all = 0..recv.len();
                output_at = bytes(0..rank * count).end;
                (call(Operation::Scatter, None, count), in_place(recv, all))
            }
            Collective::Scatter { send: None, recv, .. } => {
                (call(Operation::Scatter, None, recv.len()), in_place(recv, 0..0))
            }
            Collective::Reduce { send: Some(send), recv, op, .. } => {
                if is_root {
                    expect("recv", recv.len(), send.len(), 1)?;
                }
                let recv = if is_root { recv } else { &mut [] };
                (call(Operation::Reduce, Some(op), send.len()), apart(send, recv))
            }
            Collective::Reduce { send: None, recv, op, .. } => {
                let count = recv.len();
                (call(Operation::Reduce, Some(op), count), in_place(recv, 0..count))
            }
            Collective::ReduceScatter { send: Some(send), recv, op } => {
                expect("send", send.len(), recv.len(), world)?;
                (call(Operation::ReduceScatter, Some(op), recv.len()), apart(send, recv))
            }
            Collective::ReduceScatter { send: None, recv, op } => {
                let count = blocks_of("recv", recv.len(), world)?;
                let all = 0..recv.len();
                output_at = bytes(0..rank * count).end;
                (call(Operation::ReduceScatter, Some(op), count), in_place(recv, all))
            }
            Collective::AllReduce { send: Some(send), recv, op } => {
                expect("recv", recv.len(), send.len(), 1)?;
                (call(Operation::AllReduce, Some(op), send.len()), apart(send, recv))
            }
            Collective::AllReduce { send: None, recv, op } => {
                let count = recv.len();
                (call(Operation::AllReduce, Some(op), count), in_place(recv, 0..count))
            }
            Collective::AllToAll { send: Some(send), recv } => {
                expect("recv", recv.len(), send.len(), 1)?;
                (call(Operation::AllToAll, None, blocks_of("send", send.len(), world)?), apart(send, recv))
            }
            Collective::AllToAll { send: None, recv } => {
                let (count, all) = (blocks_of("recv", recv.len(), world)?, 0..recv.len());
                (call(Operation::AllToAll, None, count), in_place(recv, all))
            }
            Collective::AllToAllV { send, send_parts, recv, recv_parts } => {
                check_parts("send_parts", send_parts, send.map_or(recv.len(), <[T]>::len), world)?;
                check_parts("recv_parts", recv_parts, recv.len(), world)?;
                let differs = match send {
                    Some(_) => send_parts[rank].len() != recv_parts[rank].len(),
                    None => send_parts != recv_parts,
                };
                if differs {
                    let expected = "what the other one says of this rank, and in place all of it".to_owned();
                    return Err(Error::Shape { what: "send_parts", given: send_parts[rank].len(), expected });
                }
                let ranges = |parts: &'_ [Range<usize>], to: &mut Vec<Range<usize>>| {
                    to.clear();
                    to.extend(parts.iter().cloned().map(bytes));
                };
                let mut table = comm.collectives.spare_parts();
                ranges(send_parts, &mut table.sends);
                ranges(recv_parts, &mut table.recvs);
                parts = Some(table);
                let buffers = match send {
                    Some(send) => apart(send, recv),
                    None => {
                        let all = 0..recv.len();
                        in_place(recv, all)
                    }
                };
                (call(Operation::AllToAllV, None, 0), buffers)
            }
        };
        Ok(Ask { call, buffers, output_at, parts })
    }
}

/// Checks that a buffer has `blocks` blocks of `count` elements.
fn expect(what: &'static str, given: usize, count: usize, blocks: usize) -> Result<()> {
    if count.checked_mul(blocks) == Some(given) {
        return Ok(());
    }
    let expected = if blocks == 1 { count.to_string() } else { format!("{blocks} blocks of {count}") };
    Err(Error::Shape { what, given, expected })
}

/// Checks that there is a range for each rank, inside the buffer.
fn check_parts(what: &'static str, parts: &[Range<usize>], len: usize, world: usize) -> Result<()> {
    if parts.len() != world {
        return Err(Error::Shape { what, given: parts.len(), expected: format!("{world}, one for each rank") });
    }
    match parts.iter().find(|part| part.start > part.end || part.end > len) {
        Some(part) => Err(Error::Shape { what, given: part.end, expected: format!("ranges inside 0..{len}") }),
        None => Ok(()),
    }
}

/// Elements of a block, of a buffer that has one for each rank.
fn blocks_of(what: &'static str, given: usize, world: usize) -> Result<usize> {
    if given.is_multiple_of(world) {
        return Ok(given / world);
    }
    Err(Error::Shape { what, given, expected: format!("a multiple of the {world} ranks") })
}

/// A collective on its way whose buffers nobody guards: see [`Communicator::collective_raw`].
pub struct RawCollective {
    comm: Arc<CommInner>,
    /// `None` once it is over.
    ticket: Option<Ticket>,
}

impl RawCollective {
    /// Waits until the buffers may be used again. After [`Error::Timeout`] the collective is still on its way and the call may be
    /// repeated; after anything else it is over.
    ///
    /// # Errors
    /// As [`Communicator::collective`]; [`Error::WrongOrder`] when it is over already.
    pub fn wait(&mut self) -> Result<()> {
        let ticket = self.pending("wait")?;
        let result = self.comm.collectives.wait(&self.comm, ticket);
        if !matches!(result, Err(Error::Timeout { .. })) {
            self.ticket = None;
        }
        result
    }

    /// Looks whether it is over, without blocking, and moves it on.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn test(&mut self) -> Result<bool> {
        let ticket = self.pending("test")?;
        let result = self.comm.collectives.test(&self.comm, ticket);
        if !matches!(result, Ok(false)) {
            self.ticket = None;
        }
        result
    }

    fn pending(&self, call: &'static str) -> Result<Ticket> {
        self.ticket.ok_or(Error::WrongOrder { call, epoch: 0, expected: "a collective that is not over" })
    }
}

impl Drop for RawCollective {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.comm.collectives.settle(&self.comm, ticket);
        }
    }
}

impl Communicator {
    /// Starts a collective. Several may be on their way: they are made in the order in which they were started, each moved on by
    /// whoever waits in this communicator. Dropping the result waits for it, up to the deadline: the other ranks need this one's
    /// part.
    ///
    /// ```
    /// # use xccl::{Collective, Communicator, Config, ReduceOp, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let mut buffer = [1i64; 4];
    /// // SAFETY: the buffer lives until the collective is over, and is not used before.
    /// let mut sum =
    ///     unsafe { comm.collective_raw(Collective::AllReduce { send: None, recv: &mut buffer, op: ReduceOp::Sum })? };
    /// sum.wait()?;
    /// assert_eq!(buffer, [comm.world_size() as i64; 4]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`collective`](Self::collective).
    ///
    /// # Safety
    /// The buffers stay good, what is written unused and what is read unchanged, until the collective is over or dropped, whatever
    /// their lifetimes say.
    pub unsafe fn collective_raw<T: Value>(&self, collective: Collective<'_, T>) -> Result<RawCollective> {
        // SAFETY: the caller's promise.
        let ask = unsafe { collective.ask(&self.inner) }?;
        let ticket = self.inner.collectives.start(&self.inner, ask)?;
        Ok(RawCollective { comm: self.inner.clone(), ticket: Some(ticket) })
    }
}
