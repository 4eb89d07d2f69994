//! A rank on the same node: its memory is mapped.

use std::sync::Arc;

use crate::memory::mapping::Mapping;

/// What there is of a near rank beside its outbox.
pub(crate) struct Near {
    /// Its symmetric heap, writable.
    pub(crate) heap: Arc<Mapping>,
    /// Its process, for reading private memory.
    pub(crate) pid: u32,
}
