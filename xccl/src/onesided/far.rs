//! One-sided access to a rank of another node, over the plane.
//!
//! Batches to a rank are applied in order, each after all its puts have arrived. So a signal that follows puts needs no fence, and
//! the answer to a fetch says that all before has arrived.

use super::Remote;
use crate::comm::inner::{Call, CommInner};
use crate::error::{Error, Result};
use crate::fabric::bounce::{CHUNK, Chunk};
use crate::fabric::far::{Far, HEAP, OUTBOX};
use crate::fabric::plane::{self, Change, Put};
use crate::sync::progress::{Operation, Waiting};
use crate::sync::signal::Update;

/// Pieces of one batch.
const PIECES: usize = 64;

/// Puts that are being gathered into a batch: they leave together from one chunk.
struct Batch {
    chunk: Option<Chunk>,
    /// Bytes of the chunk that are used.
    used: usize,
    puts: [Option<Put>; PIECES],
    count: usize,
}

/// Access to one far rank, by one call.
pub(super) struct ToFar<'a> {
    comm: &'a CommInner,
    far: &'a Far,
    rank: usize,
    call: Call,
    during: Operation,
}

/// The change as the plane knows it.
pub(super) fn told(offset: usize, update: Update) -> plane::Update {
    match update {
        Update::Set(value) => plane::Update::Word64 { window: HEAP, offset, value },
        Update::Add(value) => plane::Update::Add { window: HEAP, offset, value },
    }
}

impl<'a> ToFar<'a> {
    pub(super) fn new(comm: &'a CommInner, far: &'a Far, rank: usize, during: Operation) -> Self {
        ToFar { comm, far, rank, call: Call::default(), during }
    }

    fn wait<T>(&mut self, ready: impl FnMut() -> Option<T>) -> Result<T> {
        let what = Waiting { operation: self.during, epoch: 0, peer: Some(self.rank) };
        self.comm.wait_in(&mut self.call, what, ready)
    }

    fn chunk(&mut self) -> Result<Chunk> {
        let far = self.far;
        self.wait(|| far.bounce.take(&far.plane))
    }

    /// Puts pieces, by their offsets in the heap, then makes the changes that follow.
    pub(super) fn put<'d>(
        &mut self,
        pieces: impl IntoIterator<Item = (usize, &'d [u8])>,
        then: &[plane::Update],
    ) -> Result<()> {
        let mut batch = Batch { chunk: None, used: 0, puts: [const { None }; PIECES], count: 0 };
        for (offset, data) in pieces {
            let mut offset = offset;
            let mut rest = data;
            while !rest.is_empty() {
                if batch.used == CHUNK || batch.count == PIECES {
                    self.send(&mut batch, &[]);
                }
                let room = CHUNK - batch.used;
                let (part, others) = rest.split_at(room.min(rest.len()));
                self.add(&mut batch, offset, part)?;
                (offset, rest) = (offset + part.len(), others);
            }
        }
        if batch.count > 0 || !then.is_empty() {
            self.send(&mut batch, then);
        }
        Ok(())
    }

    fn add(&mut self, batch: &mut Batch, offset: usize, part: &[u8]) -> Result<()> {
        let Some(into) = self.far.heap_of(self.rank) else { return Ok(()) };
        if batch.chunk.is_none() {
            batch.chunk = Some(self.chunk()?);
        }
        let Some(chunk) = &batch.chunk else { return Ok(()) };
        self.far.bounce.write(chunk, batch.used, part);
        let start = chunk.start() + batch.used;
        let put = Put { from: self.far.bounce.region, range: start..start + part.len(), into, offset };
        batch.puts[batch.count] = Some(put);
        (batch.used, batch.count) = (batch.used + part.len(), batch.count + 1);
        Ok(())
    }

    fn send(&mut self, batch: &mut Batch, then: &[plane::Update]) {
        self.far.plane.send(self.rank, batch.puts.iter_mut().filter_map(Option::take), then);
        if let Some(chunk) = batch.chunk.take() {
            self.far.bounce.sent(chunk, self.rank, self.far.plane.started(self.rank));
        }
        (batch.used, batch.count) = (0, 0);
    }

    /// Copies memory from there.
    pub(super) fn get(&mut self, from: Remote, into: &mut [u8]) -> Result<()> {
        let Some(region) = self.far.heap_of(self.rank) else { return Ok(()) };
        let far = self.far;
        for (i, part) in into.chunks_mut(CHUNK).enumerate() {
            let chunk = self.chunk()?;
            let (offset, range) = (from.offset + i * CHUNK, chunk.start()..chunk.start() + part.len());
            let token = self.wait(|| {
                let into = (far.bounce.region, range.clone());
                far.plane.get(from.rank, (region, offset), into).transpose()
            });
            let token = match token.and_then(|token| token) {
                Ok(token) => token,
                Err(err) => {
                    // Nothing was started.
                    far.bounce.free(chunk);
                    return Err(err);
                }
            };
            if let Err(err) = self.wait(|| far.plane.answer(token)) {
                far.plane.forget(token);
                return Err(err);
            }
            far.bounce.read(&chunk, part);
            far.bounce.free(chunk);
        }
        Ok(())
    }

    /// Changes a word there, and gives what it was before.
    pub(super) fn fetch(&mut self, offset: usize, change: Change) -> Result<u64> {
        self.fetch_from(HEAP, offset, change)
    }

    /// Returns when all that was sent there before has been applied, and what was on its way here at that time.
    pub(super) fn round_trip(&mut self) -> Result<()> {
        // A word of ours, as it lies there.
        self.fetch_from(OUTBOX, self.comm.layout.border, Change::Nothing).map(|_| ())
    }

    fn fetch_from(&mut self, window: u16, offset: usize, change: Change) -> Result<u64> {
        let (far, token) = (self.far, self.far.plane.fetch(self.rank, window, offset, change));
        let answer = self.wait(|| far.plane.answer(token));
        if answer.is_err() {
            far.plane.forget(token);
        }
        answer
    }

    /// Waits until all that was sent there has been applied. Of a rank that has left there is nothing to wait for.
    pub(super) fn settle(&mut self) -> Result<()> {
        let (comm, far, rank, during) = (self.comm, self.far, self.rank, self.during);
        let has_left = || matches!(comm.check_partner(rank, during), Err(Error::PeerLeft { .. }));
        self.wait(|| (far.plane.is_settled(rank) || has_left()).then_some(()))?;
        // What cannot be reached counts as settled, but has not arrived.
        if has_left() { Ok(()) } else { comm.check_partner_lives(rank, during) }
    }
}
