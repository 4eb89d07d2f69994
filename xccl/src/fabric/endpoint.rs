//! What a network card does for the plane between nodes: it writes registered memory of another rank, and says which
//! immediates have arrived here.
//!
//! An endpoint knows nothing of records, credits or epochs: that is the [plane](super::plane)'s protocol, which only assumes what
//! is stated here, so that it runs on any provider, and in tests on a simulated one that reorders and delays as far as this
//! contract allows.
//!
//! *Contract.* A put's bytes are in the target's memory before its immediate arrives there, exactly once. Nothing is said of the
//! order of two puts, not even to the same rank. A put has *left* when its bytes are read no more: that may be long before it
//! arrives, or be heard of after. Nothing happens unless [`poll`](Endpoint::poll) is called, on both sides.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::memory::mapping::Mapping;

/// Who may use a registered range from afar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// Nobody: puts start from here, and gets end here.
    Local,
    /// Other ranks may put into it and get from it.
    Remote,
}

/// A registered range of this process's memory, which stays mapped as long as the endpoint lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// Its number at the endpoint that made it.
    pub(crate) index: usize,
    /// What other ranks need to reach it.
    pub(crate) remote: RemoteRegion,
}

/// What a rank must know of another one's registered range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RemoteRegion {
    /// Where the range begins, as the provider counts: an address, or zero.
    pub(crate) base: u64,
    pub(crate) key: u64,
    pub(crate) bytes: u64,
}

/// What a put copies: a part of a region of this rank, and where in one of the target it goes.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) from: (Region, Range<usize>),
    pub(crate) into: (RemoteRegion, usize),
}

/// Parts that any caller may make room for.
pub(crate) const MOST_PARTS: usize = 4;

impl RemoteRegion {
    /// Whether it has as many bytes as rank `of` and this one have agreed on.
    pub(crate) fn check(&self, of: usize, bytes: usize) -> Result<()> {
        if self.bytes == bytes as u64 {
            return Ok(());
        }
        let (what, value, limit) = ("the bytes of a region that it offers", self.bytes, bytes as u64);
        Err(Error::Corrupt { rank: of, what, value, limit })
    }
}

/// Whether an operation was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Posted {
    Yes,
    /// The queue is full: poll, then post again.
    Full,
}

/// What a poll has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A put of another rank is complete here.
    Arrived { immediate: u32 },
    /// A put that was posted with this token has left.
    Left { token: u64 },
    /// A get is complete here; `token` is the one it was posted with.
    Got { token: u64 },
    /// An operation of this rank to `to` has failed for good: that rank is gone, or the way to it.
    Failed { to: Option<usize>, why: String },
}

/// One rank's place on the network.
pub(crate) trait Endpoint: Send {
    /// What other ranks need to [`connect`](Self::connect) to this one.
    fn address(&self) -> Result<Vec<u8>>;

    /// Makes other ranks reachable: by rank, the address of each, `None` for those that are not needed. Called once.
    fn connect(&mut self, addresses: &[Option<Vec<u8>>]) -> Result<()>;

    /// Registers a range of a mapping, which is kept mapped from then on.
    fn register(&mut self, memory: &Arc<Mapping>, range: Range<usize>, access: Access) -> Result<Region>;

    /// Starts to copy `from`, a part of a region of this rank (offsets within it), to `offset` of a region of rank `to`; then
    /// `immediate` arrives there. `from` may be empty. The bytes may be read at any time until the put has left, which is told
    /// where there is a token.
    ///
    /// # Panics
    /// When a range leaves its region: offsets are the crate's own, or were checked before.
    fn put(
        &mut self,
        to: usize,
        from: (Region, Range<usize>),
        into: (RemoteRegion, usize),
        immediate: u32,
        token: Option<u64>,
    ) -> Result<Posted>;

    /// How many parts one put may have: at most [`MOST_PARTS`].
    fn most_parts(&self) -> usize;

    /// As [`put`](Self::put), with one immediate for several parts, of which there is one at least.
    ///
    /// # Panics
    /// As [`put`](Self::put).
    fn put_parts(&mut self, to: usize, parts: &[Part], immediate: u32) -> Result<Posted>;

    /// Starts to copy `from`, an offset of a region of rank `of`, to a part of a region of this rank.
    ///
    /// # Panics
    /// As [`put`](Self::put).
    fn get(
        &mut self,
        of: usize,
        from: (RemoteRegion, usize),
        into: (Region, Range<usize>),
        token: u64,
    ) -> Result<Posted>;

    /// Moves everything on, and adds what has happened to `events`. Never blocks.
    fn poll(&mut self, events: &mut Vec<Event>) -> Result<()>;

    /// A descriptor that becomes readable when [`poll`](Self::poll) is worth calling, where the provider has one.
    fn wake_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>>;

    /// Whether nothing has come up to now, so that sleeping on [`wake_fd`](Self::wake_fd) misses nothing.
    fn may_sleep(&mut self) -> bool;
}
