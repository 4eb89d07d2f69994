//! Registered memory that puts of other memory leave from, since what an engine puts need not be registered, and may be reused as
//! soon as the call returns. Gets land here, too.
//!
//! It is divided into chunks. A chunk that was put from is free again when its puts have left. One that a get was given up on is free
//! when its bytes have come after all, or never.
//!
//! Few chunks are in use at a time, and the one that was freed last is used first: it is still in the cache of the core that fills
//! it, so that the network's copy reads it there.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::endpoint::{Access, Region};
use super::plane::{Departure, Plane};
use crate::comm::inner::lock;
use crate::error::Result;
use crate::memory::mapping::Mapping;

/// Bytes of a chunk: a put's size from which on the network's bandwidth counts, not its latency.
pub(crate) const CHUNK: usize = 64 << 10;
/// Gets from ranks that were lost take some away for ever.
const CHUNKS: usize = 64;
/// Those that are put from at a time: a second-level cache has room for them.
const LEAVING: usize = 8;

pub(crate) struct Bounce {
    memory: Arc<Mapping>,
    pub(crate) region: Region,
    chunks: Mutex<Chunks>,
}

struct Chunks {
    /// The one that was freed last is the last.
    free: Vec<usize>,
    /// Those that are being put from, the first one first.
    leaving: VecDeque<(usize, Departure)>,
    /// Those that a get was given up on, with its token.
    coming: Vec<(usize, u64)>,
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
        let chunks = Chunks { free: (0..CHUNKS).rev().collect(), leaving: VecDeque::new(), coming: Vec::new() };
        Ok(Bounce { memory, region, chunks: Mutex::new(chunks) })
    }

    /// A chunk, if one is free.
    pub(crate) fn take(&self, plane: &Plane) -> Option<Chunk> {
        let Chunks { free, leaving, coming } = &mut *lock(&self.chunks);
        while let Some(&(chunk, departure)) = leaving.front()
            && plane.has_left(departure)
        {
            leaving.pop_front();
            free.push(chunk);
        }
        if leaving.len() >= LEAVING {
            return None;
        }
        if free.is_empty() {
            let has_come = |&mut (_, token): &mut (usize, u64)| plane.answer(token).is_some();
            free.extend(coming.extract_if(.., has_come).map(|(chunk, _)| chunk));
        }
        free.pop().map(Chunk)
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

    /// Gives a chunk back that was put from.
    pub(crate) fn leaves(&self, chunk: Chunk, departure: Departure) {
        lock(&self.chunks).leaving.push_back((chunk.0, departure));
    }

    /// Gives a chunk back that the answer to a get may still come to.
    pub(crate) fn give_up(&self, chunk: Chunk, token: u64) {
        lock(&self.chunks).coming.push((chunk.0, token));
    }

    /// Gives a chunk back that nothing comes to any more.
    pub(crate) fn free(&self, chunk: Chunk) {
        lock(&self.chunks).free.push(chunk.0);
    }
}
