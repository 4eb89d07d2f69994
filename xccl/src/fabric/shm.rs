//! A rank on the same machine: its memory is mapped.

use crate::memory::mapping::Mapping;

/// The mapped memory of one rank.
pub(crate) struct Peer {
    /// Its outbox, read-only.
    pub(crate) outbox: Mapping,
    /// Its symmetric heap, writable.
    pub(crate) heap: Mapping,
    /// Its process, for reading private memory.
    pub(crate) pid: u32,
}
