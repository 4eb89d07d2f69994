//! The ranks of other nodes: what a communicator's outbox and heap are on the [plane](super::plane).

use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::bounce::Bounce;
use super::endpoint::{Access, Endpoint, Region, RemoteRegion};
use super::plane::{Departure, MOST_BYTES, Plane, Put, Update, Window};
use super::progress::{Chores, Mover};
use super::{Fabric, decode, encode};
use crate::bootstrap::Star;
use crate::comm::layout::{CommLayout, HEAP_START};
use crate::error::Result;
use crate::memory::mapping::Mapping;

/// The window of the landing zones: words of a rank's outbox.
pub(crate) const OUTBOX: u16 = 0;
/// The window of the symmetric heap.
pub(crate) const HEAP: u16 = 1;

pub(crate) struct Far {
    pub(crate) plane: Arc<Plane>,
    /// Puts of the payload rings leave from here: all of this rank's outbox.
    outbox: Region,
    /// And of the symmetric heap, all of it.
    pub(crate) own_heap: Region,
    /// By rank, what it lets this one reach.
    reach: Vec<Option<Reach>>,
    /// What one-sided puts leave from, and gets come to.
    pub(crate) bounce: Bounce,
    pub(crate) chores: Arc<Chores>,
    /// Moves things on while this rank computes.
    pub(crate) mover: Mover,
}

/// What one rank lets another one reach.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Reach {
    /// Where records land.
    records: RemoteRegion,
    /// Where payload of the ring from here to there lands.
    payload: RemoteRegion,
    heap: RemoteRegion,
}

impl Far {
    /// Connects to the ranks of other nodes. Collective over all ranks.
    pub(crate) fn connect(
        star: &mut Star,
        endpoint: Box<dyn Endpoint>,
        fabric: &Fabric,
        layout: &CommLayout,
        mover: impl FnOnce(Arc<Plane>, Arc<Chores>) -> Result<Mover>,
        deadline: Instant,
    ) -> Result<Far> {
        let (rank, ranks) = (star.rank(), star.nodes().len());
        let is_far: Vec<bool> = (0..ranks).map(|other| fabric.peer(other).near.is_none()).collect();
        let plane = Arc::new(Plane::new(endpoint, rank, &is_far)?);
        #[cfg(any(test, fuzzing))]
        plane.grow_old(layout.age);
        let addresses = star.exchange(&plane.address()?, &[], deadline)?;
        plane.connect(&addresses.into_iter().map(|(address, _)| address).collect::<Vec<_>>())?;

        let outbox = plane.register(&fabric.outbox, 0..fabric.outbox.len(), Access::Local)?;
        let own_heap = plane.register(&fabric.heap, 0..fabric.heap.len(), Access::Remote)?;
        let heap = own_heap.remote;
        let bounce = Bounce::new(&plane)?;
        let mut offers = Vec::with_capacity(ranks);
        let (mut words, mut heaps) = (vec![None; ranks], vec![None; ranks]);
        for other in 0..ranks {
            let landing = &fabric.peer(other).outbox;
            let Some(records) = plane.landing_of(other) else {
                offers.push(None);
                continue;
            };
            let payload = layout.payload(rank);
            let payload = plane.register(landing, payload..payload + layout.ring_bytes, Access::Remote)?.remote;
            offers.push(Some(Reach { records, payload, heap }));
            let range = layout.state..layout.bytes;
            words[other] = Some(Window { memory: landing.clone(), base: 0, range });
            let range = HEAP_START..fabric.heap.len();
            heaps[other] = Some(Window { memory: fabric.heap.clone(), base: 0, range });
        }
        plane.add_window(words);
        plane.add_window(heaps);
        let mut reach = Vec::with_capacity(ranks);
        for (other, (blob, _)) in star.exchange(&encode(&offers)?, &[], deadline)?.into_iter().enumerate() {
            let theirs: Vec<Option<Reach>> = decode(&blob)?;
            let to_us = theirs.get(rank).copied().flatten();
            if let Some(reach) = &to_us {
                // Every put into them is measured by what was agreed on.
                plane.check_records(other, &reach.records)?;
                reach.payload.check(other, layout.ring_bytes)?;
                reach.heap.check(other, fabric.heap.len())?;
            }
            if let Some(reach) = to_us.filter(|_| is_far[other]) {
                plane.set_records(other, reach.records);
            }
            reach.push(to_us);
        }
        // Nothing is sent before everybody knows its windows: this is the last round.
        star.exchange(&[], &[], deadline)?;
        let chores = Arc::new(Chores::default());
        let mover = mover(plane.clone(), chores.clone())?;
        Ok(Far { plane, outbox, own_heap, reach, bounce, chores, mover })
    }

    /// The heap of a far rank.
    pub(crate) fn heap_of(&self, rank: usize) -> Option<RemoteRegion> {
        self.reach[rank].as_ref().map(|reach| reach.heap)
    }

    /// Tells `to` that a word of this rank's outbox has changed.
    pub(crate) fn tell(&self, to: usize, offset: usize, value: u64) {
        self.plane.send(to, [], &[Update::Word64 { window: OUTBOX, offset, value }]);
    }

    /// As [`tell`](Self::tell), for a word of four bytes.
    pub(crate) fn tell32(&self, to: usize, offset: usize, value: u32) {
        self.plane.send(to, [], &[Update::Word32 { window: OUTBOX, offset, value }]);
    }

    /// Puts a part of this rank's heap into the ring to `to`; the line that tells of it has to follow.
    pub(crate) fn put_into_ring(&self, to: usize, in_heap: usize, in_ring: usize, bytes: usize, departure: Departure) {
        let Some(reach) = &self.reach[to] else { return };
        let range = in_heap..in_heap + bytes;
        self.plane.put(to, [Put { from: self.own_heap, range, into: reach.payload, offset: in_ring }], departure);
    }

    /// Puts payload of the ring to `to` (its offset in `outbox`, this rank's, and in that ring, and its bytes), then a line.
    pub(crate) fn message(
        &self,
        to: usize,
        outbox: &Mapping,
        payload: Option<(usize, usize, usize)>,
        offset: usize,
        words: [u64; 8],
    ) {
        let Some(reach) = &self.reach[to] else { return };
        let line = Update::Line { window: OUTBOX, offset, words };
        match payload {
            None => self.plane.send(to, [], &[line]),
            // A put of its own would cost as much as the record.
            Some((at, _, len @ ..=MOST_BYTES)) => {
                let mut words = [0; MOST_BYTES / 8];
                outbox.read(at, &mut bytemuck::cast_slice_mut(&mut words)[..len]);
                self.plane.send(to, [], &[Update::Bytes { window: OUTBOX, offset: at, len, words }, line]);
            }
            Some((at, in_ring, len)) => {
                let put = Put { from: self.outbox, range: at..at + len, into: reach.payload, offset: in_ring };
                self.plane.send(to, [put], &[line]);
            }
        }
    }
}
