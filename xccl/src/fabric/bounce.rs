//! Registered memory that one-sided puts leave from, since what an engine puts need not be registered, and may be reused as soon
//! as the call returns. Gets land here, too.
//!
//! It is divided into chunks, which are used in turn. A chunk that was put from is free again when the target has applied the
//! batch that it was put with. One that a get was given up on is never used again: the bytes may still come.

use std::sync::{Arc, Mutex};

use super::endpoint::{Access, Region};
use super::plane::Plane;
use crate::comm::inner::lock;
use crate::error::Result;
use crate::memory::mapping::Mapping;

/// Bytes of a chunk: a put's size from which on the network's bandwidth counts, not its latency.
pub(crate) const CHUNK: usize = 64 << 10;
const CHUNKS: usize = 64;

#[derive(Clone, Copy)]
enum Use {
    Free,
    /// By a call that is under way, or for ever.
    Taken,
    /// By a batch.
    Sent {
        to: usize,
        number: u64,
    },
}

pub(crate) struct Bounce {
    memory: Arc<Mapping>,
    pub(crate) region: Region,
    /// What each chunk is used for, and which comes next.
    uses: Mutex<([Use; CHUNKS], usize)>,
}

/// A chunk that belongs to its holder.
#[must_use]
pub(crate) struct Chunk(usize);

impl Chunk {
    /// Where it begins in the region.
    pub(crate) fn start(&self) -> usize {
        self.0 * CHUNK
    }
}

impl Bounce {
    pub(crate) fn new(plane: &Plane) -> Result<Self> {
        let memory = Arc::new(Mapping::anonymous(CHUNKS * CHUNK)?);
        let region = plane.register(&memory, 0..memory.len(), Access::Local)?;
        Ok(Bounce { memory, region, uses: Mutex::new(([Use::Free; CHUNKS], 0)) })
    }

    /// A chunk, if one is free.
    pub(crate) fn take(&self, plane: &Plane) -> Option<Chunk> {
        let (uses, next) = &mut *lock(&self.uses);
        for _ in 0..CHUNKS {
            let at = *next % CHUNKS;
            match uses[at] {
                Use::Taken => {}
                // Later ones were sent later: one that is not applied ends the search.
                Use::Sent { to, number } if !plane.is_applied(to, number) => return None,
                Use::Free | Use::Sent { .. } => {
                    uses[at] = Use::Taken;
                    *next = at + 1;
                    return Some(Chunk(at));
                }
            }
            *next = at + 1;
        }
        None
    }

    /// Copies bytes into a chunk, `at` bytes from its beginning.
    pub(crate) fn write(&self, chunk: &Chunk, at: usize, from: &[u8]) {
        assert!(at + from.len() <= CHUNK, "{} bytes at {at} of a chunk", from.len());
        self.memory.write(chunk.start() + at, from);
    }

    /// Copies the first bytes of a chunk out.
    pub(crate) fn read(&self, chunk: &Chunk, to: &mut [u8]) {
        assert!(to.len() <= CHUNK, "{} bytes of a chunk", to.len());
        self.memory.read(chunk.start(), to);
    }

    /// Gives a chunk back that was put from, with the batch that `to` has to apply first.
    pub(crate) fn sent(&self, chunk: Chunk, to: usize, number: u64) {
        lock(&self.uses).0[chunk.0] = Use::Sent { to, number };
    }

    /// Gives a chunk back that nothing comes to any more.
    pub(crate) fn free(&self, chunk: Chunk) {
        lock(&self.uses).0[chunk.0] = Use::Free;
    }
}
