//! One-sided access to a rank of another node, over the plane.
//!
//! Batches to a rank are applied in order, each after all its puts have arrived. So a signal that follows puts needs no fence, and
//! the answer to a fetch says that all before has arrived.

use std::time::Duration;

use super::Remote;
use crate::comm::inner::{Call, CommInner};
use crate::error::{Error, Result};
use crate::fabric::bounce::{CHUNK, Chunk};
use crate::fabric::endpoint::RemoteRegion;
use crate::fabric::far::{Far, HEAP, OUTBOX};
use crate::fabric::plane::{self, Change, Departure, MOST_BYTES, Put};
use crate::sync::progress::{Operation, Waiting};
use crate::sync::signal::Update;

/// So many bytes of a call are copied all the same: to wait until a put has left takes a poll, which costs more.
const COPIED: usize = CHUNK;
/// Bytes of one put at most: others' records would wait behind a longer one.
const LONGEST: usize = 4 << 20;
/// Gets of one call that are on their way at once.
const GETS: usize = 4;

/// A chunk that pieces of other memory are being gathered in.
struct Gathering {
    chunk: Chunk,
    departure: Departure,
    used: usize,
}

/// A part of a get that is on its way.
struct Getting<'d> {
    chunk: Chunk,
    token: u64,
    into: &'d mut [u8],
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

    /// As [`new`](Self::new), with a deadline of its own.
    pub(super) fn within(comm: &'a CommInner, far: &'a Far, rank: usize, during: Operation, time: Duration) -> Self {
        ToFar { call: Call::within(time), ..ToFar::new(comm, far, rank, during) }
    }

    fn wait<T>(&mut self, ready: impl FnMut() -> Option<T>) -> Result<T> {
        let what = Waiting { operation: self.during, epoch: 0, peer: Some(self.rank) };
        self.comm.wait_in(&mut self.call, what, ready)
    }

    fn chunk(&mut self) -> Result<Chunk> {
        let far = self.far;
        self.wait(|| far.bounce.take(&far.plane))
    }

    /// Puts one piece, by its offset in the heap, then makes a change.
    pub(super) fn put_one(&mut self, offset: usize, data: &[u8], then: Option<plane::Update>) -> Result<()> {
        if data.len() > MOST_BYTES {
            return self.put([(offset, data)], then);
        }
        // A put of its own would cost as much as the record.
        let mut words = [0; MOST_BYTES / 8];
        bytemuck::cast_slice_mut(&mut words)[..data.len()].copy_from_slice(data);
        let bytes = plane::Update::Bytes { window: HEAP, offset, len: data.len(), words };
        match then {
            Some(then) => self.far.plane.send(self.rank, [], &[bytes, then]),
            None => self.far.plane.send(self.rank, [], &[bytes]),
        }
        Ok(())
    }

    /// Puts pieces, by their offsets in the heap, then makes a change, if there is one. What lies in this rank's heap leaves from there,
    /// and the call waits until it has; all else is copied into chunks, so that one is filled while those before leave, and so is what
    /// is too short for the wait.
    pub(super) fn put<'d>(
        &mut self,
        pieces: impl IntoIterator<Item = (usize, &'d [u8])>,
        then: Option<plane::Update>,
    ) -> Result<()> {
        let (far, rank) = (self.far, self.rank);
        let Some(into) = far.heap_of(rank) else { return Ok(()) };
        let (mut straight, mut gathering, mut copied) = (None, None, 0);
        for (offset, data) in pieces {
            copied += data.len();
            let Some(at) = self.comm.in_heap(data).filter(|_| copied > COPIED) else {
                self.gather(&mut gathering, into, offset, data)?;
                continue;
            };
            let departure = *straight.get_or_insert_with(|| far.plane.departure());
            let parts = (0..data.len()).step_by(LONGEST).map(|start| {
                let end = data.len().min(start + LONGEST);
                Put { from: far.own_heap, range: at + start..at + end, into, offset: offset + start }
            });
            far.plane.put(rank, parts, departure);
        }
        if let Some(Gathering { chunk, departure, .. }) = gathering {
            far.bounce.leaves(chunk, departure);
        }
        if let Some(then) = then {
            far.plane.send(rank, [], &[then]);
        }
        match straight {
            // Of a rank that cannot be reached, too, nothing leaves any more.
            Some(departure) => self.wait(|| far.plane.has_left(departure).then_some(())),
            None => Ok(()),
        }
    }

    /// Puts a piece of memory that is not registered.
    fn gather(
        &mut self,
        gathering: &mut Option<Gathering>,
        into: RemoteRegion,
        mut offset: usize,
        mut data: &[u8],
    ) -> Result<()> {
        let far = self.far;
        while !data.is_empty() {
            if let Some(Gathering { chunk, departure, .. }) = gathering.take_if(|g| g.used == CHUNK) {
                far.bounce.leaves(chunk, departure);
            }
            let Gathering { chunk, departure, used } = match gathering {
                Some(gathering) => gathering,
                None => {
                    let (chunk, departure) = (self.chunk()?, far.plane.departure());
                    gathering.insert(Gathering { chunk, departure, used: 0 })
                }
            };
            let (part, rest) = data.split_at(data.len().min(CHUNK - *used));
            far.bounce.write(chunk, *used, part);
            let start = chunk.start() + *used;
            let put = Put { from: far.bounce.region, range: start..start + part.len(), into, offset };
            far.plane.put(self.rank, [put], *departure);
            (*used, offset, data) = (*used + part.len(), offset + part.len(), rest);
        }
        Ok(())
    }

    /// Copies memory from there.
    pub(super) fn get(&mut self, from: Remote, into: &mut [u8]) -> Result<()> {
        let Some(region) = self.far.heap_of(self.rank) else { return Ok(()) };
        let mut under_way = [const { None }; GETS];
        let got = self.get_parts((region, from.offset), into, &mut under_way);
        // Those that an error has left.
        for Getting { chunk, token, .. } in under_way.into_iter().flatten() {
            self.far.bounce.give_up(chunk, token);
        }
        got
    }

    fn get_parts<'d>(
        &mut self,
        (region, offset): (RemoteRegion, usize),
        into: &'d mut [u8],
        under_way: &mut [Option<Getting<'d>>; GETS],
    ) -> Result<()> {
        let (far, parts) = (self.far, into.len().div_ceil(CHUNK));
        let mut oldest = 0;
        for (i, into) in into.chunks_mut(CHUNK).enumerate() {
            let chunk = loop {
                // Only who has no chunk waits for one: others may be waiting, too.
                let free = match i - oldest {
                    0 => Some(self.chunk()?),
                    GETS => None,
                    _ => far.bounce.take(&far.plane),
                };
                if let Some(chunk) = free {
                    break chunk;
                }
                self.finish(&mut under_way[oldest % GETS])?;
                oldest += 1;
            };
            under_way[i % GETS] = Some(self.begin(chunk, (region, offset + i * CHUNK), into)?);
        }
        (oldest..parts).try_for_each(|i| self.finish(&mut under_way[i % GETS]))
    }

    fn begin<'d>(&mut self, chunk: Chunk, from: (RemoteRegion, usize), into: &'d mut [u8]) -> Result<Getting<'d>> {
        let (far, rank, range) = (self.far, self.rank, chunk.start()..chunk.start() + into.len());
        let token = self.wait(|| far.plane.get(rank, from, (far.bounce.region, range.clone())).transpose());
        match token.and_then(|token| token) {
            Ok(token) => Ok(Getting { chunk, token, into }),
            Err(err) => {
                // Nothing was started.
                far.bounce.free(chunk);
                Err(err)
            }
        }
    }

    /// Waits for a part, and copies it out of its chunk.
    fn finish(&mut self, under_way: &mut Option<Getting<'_>>) -> Result<()> {
        let far = self.far;
        let Some(token) = under_way.as_ref().map(|getting| getting.token) else { return Ok(()) };
        self.wait(|| far.plane.answer(token))?;
        if let Some(Getting { chunk, into, .. }) = under_way.take() {
            far.bounce.read(&chunk, into);
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
