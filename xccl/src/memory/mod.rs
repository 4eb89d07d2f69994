//! Segments of shared memory, their layout, and the symmetric heap's allocator.
//!
//! Every rank owns an *outbox*, which it alone writes and which its peers map read-only, and a *symmetric heap*, whose upper
//! part any rank may write. Only offsets cross a process, and every access below is checked against the mapping's length.

pub(crate) mod area;
pub(crate) mod cgroup;
pub(crate) mod divided;
pub(crate) mod fd;
pub(crate) mod fetch;
pub(crate) mod heap;
pub(crate) mod layout;
pub(crate) mod lent;
pub(crate) mod machine;
pub(crate) mod mapping;
pub(crate) mod racing;
pub(crate) mod row;
pub(crate) mod segment;
pub(crate) mod stream;

pub use segment::MemoryFlavour;
