//! The communicator's outbox and heap: what lies where.

use bytemuck::{Pod, Zeroable};

use super::Config;
use super::shrink::BallotLayout;
use crate::bootstrap::MAX_WORLD_SIZE;
use crate::collectives::slots::Slots;
use crate::memory::layout::{LINE, Layout};
use crate::observe::board::BoardLayout;

/// Changes whenever a layout in shared memory or a protocol changes.
pub(crate) const ABI_VERSION: u32 = 4;
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"XCCLSEG1");
/// Differs when read with the other byte order.
pub(crate) const BYTE_ORDER: u32 = 0x0102_0304;

/// The first bytes of every communicator outbox.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct Header {
    pub(crate) magic: u64,
    pub(crate) abi_version: u32,
    pub(crate) byte_order: u32,
    pub(crate) outbox_bytes: u64,
    pub(crate) heap_bytes: u64,
    /// First bytes of the hash of all options that ranks must agree on.
    pub(crate) config_hash: u64,
    /// First bytes of the hash of the job's id.
    pub(crate) job: u64,
    pub(crate) rank: u32,
    pub(crate) world_size: u32,
    pub(crate) pid: u32,
    pub(crate) reserved: u32,
}

const _: () = assert!(size_of::<Header>() == 64 && align_of::<Header>() == 8);

/// Slots of each ring, and rendezvous that may be outstanding from one rank to another.
pub(crate) const SLOTS: usize = 64;

/// Bytes of what a rank says of its abort: its code and the text's length, eight bytes each, and the text.
pub(crate) const ABORT_BYTES: usize = 128;

/// Offsets in the outbox. Each word names its one writer, the outbox's owner; the comment says who reads it.
#[derive(Clone, Debug)]
pub(crate) struct CommLayout {
    /// [`State`](super::inner) of this rank; read by all before they sleep.
    pub(crate) state: usize,
    /// Where the shared part of this rank's heap begins; read by whoever puts something there.
    pub(crate) border: usize,
    /// Whom this rank sleeps for; read by publishers, those that publish for all only while the list of sleepers has this rank.
    pub(crate) sleep: usize,
    /// What this rank shows of itself, the state included; read by whoever explains a wait.
    pub(crate) board: BoardLayout,
    /// Barriers entered; read by all.
    pub(crate) barrier: usize,
    /// Why this rank holds the communicator to be over; read by all.
    pub(crate) cause: usize,
    /// What this rank says of its abort; read by all once its state says that it has aborted.
    pub(crate) abort: usize,
    /// What this rank says while ranks agree on those that are left; read by all.
    pub(crate) ballot: BallotLayout,
    /// A bit per rank of this node that this rank has seen dead; read by the ranks of other nodes.
    pub(crate) gone: usize,
    /// A byte per rank: 1 where this rank can read that rank's private memory; read by that rank.
    pub(crate) cma: usize,
    /// Per source, a line: messages consumed of the ring from there; read by that source.
    consumed: usize,
    /// Per source, a word per rendezvous: the last one finished; read by that source.
    finished: usize,
    /// Per destination, a word per rendezvous: the last one that was given up, whose payload may change; read by that
    /// destination, when it has copied.
    withdrawn: usize,
    /// Per destination, `SLOTS` lines: the messages to it; read by that destination.
    slots: usize,
    /// Per destination, the payload ring.
    payload: usize,
    pub(crate) ring_bytes: usize,
    /// What collectives are made with; its own table says who reads what.
    pub(crate) collectives: Slots,
    pub(crate) bytes: usize,
    /// Where counters begin.
    #[cfg(any(test, fuzzing))]
    pub(crate) age: u64,
}

impl CommLayout {
    pub(crate) fn new(world_size: usize, config: &Config) -> Self {
        let mut layout = Layout::default();
        layout.add(size_of::<Header>());
        // First, since it is found without the configuration.
        let board = BoardLayout::new(&mut layout, world_size);
        let state = board.state;
        let [sleep, barrier] = std::array::from_fn(|_| layout.add(LINE));
        let cause = state + 16;
        let abort = layout.add(ABORT_BYTES);
        let ballot = BallotLayout::new(&mut layout, world_size);
        let gone = layout.add(world_size.div_ceil(64) * 8);
        let cma = layout.add(world_size);
        let consumed = layout.add(world_size * LINE);
        let finished = layout.add(world_size * SLOTS * 8);
        let withdrawn = layout.add(world_size * SLOTS * 8);
        let slots = layout.add_aligned(world_size * SLOTS * LINE, 4096);
        let ring_bytes = config.p2p_ring_bytes;
        let payload = layout.add_aligned(world_size * ring_bytes, 4096);
        let collectives = Slots::new(&mut layout);
        let bytes = layout.bytes();
        CommLayout {
            state,
            // Beside the state, as the cause: they are looked at together, and hardly ever change.
            border: state + 8,
            sleep,
            board,
            barrier,
            cause,
            abort,
            ballot,
            gone,
            cma,
            consumed,
            finished,
            withdrawn,
            slots,
            payload,
            ring_bytes,
            collectives,
            bytes,
            #[cfg(any(test, fuzzing))]
            age: config.age,
        }
    }

    pub(crate) fn consumed(&self, source: usize) -> usize {
        self.consumed + source * LINE
    }

    pub(crate) fn withdrawn(&self, destination: usize, rendezvous: usize) -> usize {
        self.withdrawn + (destination * SLOTS + rendezvous) * 8
    }

    pub(crate) fn finished(&self, source: usize, rendezvous: usize) -> usize {
        self.finished + (source * SLOTS + rendezvous) * 8
    }

    pub(crate) fn slot(&self, destination: usize, message: u64) -> usize {
        self.slots + (destination * SLOTS + (message % SLOTS as u64) as usize) * LINE
    }

    pub(crate) fn payload(&self, destination: usize) -> usize {
        self.payload + destination * self.ring_bytes
    }
}

/// Offsets in the heap segment: the bell, which any rank may ring, the list of sleepers (that of rank 0 counts), then what the
/// engine allocates.
pub(crate) const BELL: usize = 0;
/// A bit per rank.
pub(crate) const SLEEPERS: usize = 2 * LINE;
/// Where the engine's part of the heap begins.
pub(crate) const HEAP_START: usize = 4096;

const _: () = assert!(SLEEPERS + MAX_WORLD_SIZE / 8 <= HEAP_START);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::board::{RECORDS, WAITS};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn areas_of_the_outbox_do_not_overlap_and_stay_inside(world in 1usize..40, ring_kib in 4usize..64) {
            let layout = CommLayout::new(world, &Config::default().p2p_ring_bytes(ring_kib << 10));
            let mut areas = vec![(0, size_of::<Header>())];
            areas.extend([layout.state, layout.sleep, layout.barrier, layout.board.identity].map(|at| (at, LINE)));
            areas.push((layout.abort, ABORT_BYTES));
            areas.extend((0..WAITS).map(|line| (layout.board.wait(line), LINE)));
            areas.extend((0..RECORDS as u64).map(|number| (layout.board.record(number), LINE)));
            areas.push((layout.board.counters, 8 + size_of::<crate::Statistics>()));
            areas.push((layout.board.waited, (world + 1) * 8));
            areas.push((layout.board.nodes, world * 4));
            areas.push(layout.ballot.area());
            areas.push((layout.gone, world.div_ceil(64) * 8));
            areas.push((layout.cma, world));
            areas.extend(layout.collectives.areas());
            for peer in 0..world {
                areas.push((layout.consumed(peer), LINE));
                areas.push((layout.payload(peer), layout.ring_bytes));
                areas.extend((0..SLOTS).map(|i| (layout.finished(peer, i), 8)));
                areas.extend((0..SLOTS).map(|i| (layout.withdrawn(peer, i), 8)));
                areas.extend((0..SLOTS as u64).map(|n| (layout.slot(peer, n), LINE)));
            }
            areas.sort();
            for pair in areas.windows(2) {
                prop_assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:?}");
            }
            let last = areas[areas.len() - 1];
            prop_assert!(last.0 + last.1 <= layout.bytes);
        }
    }
}
