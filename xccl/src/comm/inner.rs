//! What a communicator is made of, shared by its handles.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::bells::Bells;
use super::ending::{ABORTED, ABORTED_AND_LEFT, Cause, Ending, LEFT, RUNNING};
use super::layout::{ABI_VERSION, BELL, BYTE_ORDER, CommLayout, HEAP_START, Header, MAGIC};
use super::{Config, Statistics};
use crate::bootstrap::{Limit, Rendezvous, Star, UniqueId};
use crate::collectives;
use crate::collectives::engine::Collectives;
use crate::error::{Error, Result};
use crate::fabric::far::Far;
use crate::fabric::plane::Trouble;
use crate::fabric::progress::{Mover, move_unattended_on};
use crate::fabric::{self, Fabric, cma};
use crate::memory::heap::Heap;
use crate::memory::machine;
use crate::memory::mapping::Mapping;
use crate::memory::segment::Writers;
use crate::observe::Standing;
use crate::observe::board::{Board, ShownWait};
use crate::p2p::Traffic;
use crate::p2p::calibration::{self, Calibration, CalibrationPoint};
use crate::p2p::engine::P2p;
use crate::sync::bell::{self, Sleeper};
use crate::sync::cores::{CoreSharing, Cores};
use crate::sync::fork::Origin;
use crate::sync::progress::{Operation, Waiting};
use crate::sync::wait::{self, Patience, Phase};

/// What a state word says.
pub(crate) fn standing(state: u32) -> Standing {
    match state {
        RUNNING => Standing::Active,
        ABORTED => Standing::Aborted,
        LEFT => Standing::Left,
        _ => Standing::Unknown,
    }
}

/// How long a rank that leaves waits, at most, until what it has sent to far ranks is there.
const FAREWELL: Duration = Duration::from_secs(5);
/// Sleeps where nobody moves the plane on meanwhile.
const WITHOUT_MOVER: Duration = Duration::from_micros(200);

/// "For ever", for interfaces that need an instant.
const NO_DEADLINE: Duration = Duration::from_secs(365 * 24 * 3600);

/// Counters of one rank of one communicator.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) exchanges: AtomicU64,
    pub(crate) tokens: AtomicU64,
    pub(crate) far_rows: AtomicU64,
    pub(crate) far_sums: AtomicU64,
    pub(crate) waits: AtomicU64,
    pub(crate) waits_yielded: AtomicU64,
    pub(crate) waits_slept: AtomicU64,
    pub(crate) wake_ups: AtomicU64,
    pub(crate) waited_us: AtomicU64,
}

pub(crate) struct CommInner {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) config: Config,
    pub(crate) layout: CommLayout,
    pub(crate) fabric: Fabric,
    /// The node of each rank.
    pub(crate) nodes: Vec<usize>,
    bells: Arc<Bells>,
    /// What this rank shows of itself.
    pub(crate) board: Board,
    /// Names the communicator on this machine.
    pub(crate) id: u64,
    pub(crate) heap: Mutex<Heap>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) p2p: P2p,
    pub(crate) collectives: Collectives,
    pub(crate) calibration: Calibration,
    pub(crate) ending: Arc<Ending>,
    pub(super) aborting: Mutex<()>,
    pub(super) shrinking: Mutex<()>,
    /// What it was built with.
    pub(super) unique_id: UniqueId,
    /// The ranks in the communicator that this one is the rest of.
    pub(super) former: Vec<usize>,
    barriers: Mutex<u64>,
    pub(crate) core_sharing: CoreSharing,
    patience: Patience,
    sleeper: Sleeper,
    origin: Origin,
}

/// What a communicator comes from.
pub(crate) enum Descent<'a> {
    New,
    /// It was split off, and its siblings are there as well.
    Part(&'a CommInner),
    /// It is what is left of another one, whose ranks are named; with what ends its being built.
    Rest {
        of: &'a CommInner,
        members: &'a [usize],
        limit: Limit,
    },
}

impl Descent<'_> {
    fn whole(&self) -> Option<&CommInner> {
        match self {
            Descent::New => None,
            Descent::Part(whole) | Descent::Rest { of: whole, .. } => Some(whole),
        }
    }
}

/// The waits of one call. Its deadline counts from the first that is not over at once.
#[derive(Default)]
pub(crate) struct Call {
    since: Option<Instant>,
    /// Another deadline than the communicator's.
    within: Option<Duration>,
}

impl Call {
    /// A call with a deadline of its own.
    pub(crate) fn within(time: Duration) -> Self {
        Call { since: None, within: Some(time) }
    }
}

/// The connections that were used to join, for one set-up, which others can see.
pub(crate) struct SetUp<'c> {
    star: MutexGuard<'c, Star>,
    shown: Option<ShownWait>,
    board: &'c Board,
}

impl Deref for SetUp<'_> {
    type Target = Star;

    fn deref(&self) -> &Star {
        &self.star
    }
}

impl DerefMut for SetUp<'_> {
    fn deref_mut(&mut self) -> &mut Star {
        &mut self.star
    }
}

impl Drop for SetUp<'_> {
    fn drop(&mut self) {
        self.shown.take().into_iter().for_each(|shown| self.board.woke(shown, true));
    }
}

/// What a rank says of itself once segments are mapped.
#[derive(Serialize, Deserialize)]
struct Probe {
    /// Where a private word of it lies, for its peers to try `process_vm_readv` on.
    address: u64,
    /// What its machine is known by: other nodes may be on it, and share its cores.
    machine: String,
    cores: Cores,
    /// Whether it is left to measurements how its messages travel.
    calibrate: bool,
}

impl CommInner {
    pub(crate) fn init(
        rank: usize,
        world_size: usize,
        rendezvous: &Rendezvous,
        config: Config,
        descent: Descent<'_>,
    ) -> Result<Self> {
        if world_size == 0 || rank >= world_size {
            return Err(Error::InvalidRank { rank, world_size });
        }
        config.kernels.resolve("Config::kernels")?;
        let limit = match &descent {
            Descent::Rest { limit, .. } => limit.clone(),
            _ => (Instant::now() + config.timeout.unwrap_or(NO_DEADLINE)).into(),
        };
        let deadline = limit.until;
        let heap_bytes = HEAP_START + config.heap_bytes.next_multiple_of(4096);
        let mut star = Star::join(rendezvous, rank, world_size, &config.description(), &limit)?;
        star.look_out(limit.lookout);
        #[cfg(any(test, fuzzing))]
        if let Some(pretence) = &config.pretence {
            star.pretend(&pretence.nodes);
        }
        let nodes = star.nodes().to_vec();
        let config = if nodes.iter().any(|&node| node != nodes[0]) { config.between_nodes() } else { config };
        let layout = CommLayout::new(world_size, &config);
        let ranks_here = star.ranks_here();
        let here = ((0..rank).filter(|&other| star.is_near(other)).count(), ranks_here);
        let bytes = layout.bytes + heap_bytes;
        let enough = fabric::check_memory("the communicator", bytes, ranks_here);
        let outboxes = fabric::exchange_segments(&mut star, &config, enough, Writers::Owner, layout.bytes, deadline)?;
        let heaps = fabric::exchange_segments(&mut star, &config, Ok(()), Writers::Anyone, heap_bytes, deadline)?;
        let pids = star.pids().to_vec();
        let mut fabric = Fabric::new(outboxes, heaps, &pids, |_| Ok(Arc::new(Mapping::anonymous(layout.bytes)?)))?;

        let (config_hash, job) =
            (hash_of(format!("{:?}", config.description()).as_bytes()), hash_of(rendezvous.id().as_bytes()));
        let header = |rank: usize| Header {
            magic: MAGIC,
            abi_version: ABI_VERSION,
            byte_order: BYTE_ORDER,
            outbox_bytes: layout.bytes as u64,
            heap_bytes: heap_bytes as u64,
            config_hash,
            job,
            rank: rank as u32,
            world_size: world_size as u32,
            pid: pids[rank],
            reserved: 0,
        };
        fabric.outbox.write(0, bytemuck::bytes_of(&header(rank)));
        let board = Board::new(fabric.outbox.clone(), &layout.board, &nodes);
        fabric.outbox.word32(layout.state).store(RUNNING, Release);

        // Every header is written once everybody has sent its part.
        let probe = Box::new(MAGIC);
        let address = &raw const *probe as u64;
        let calibrate = config.leaves_to_measurement();
        let own = Probe { address, machine: machine::identity(), cores: machine::cores(), calibrate };
        let blob = fabric::encode(&own)?;
        // A part of a communicator takes what the whole has measured.
        let mut calibrate = world_size >= 2 && descent.whole().is_none();
        let parts = star.exchange(&blob, &[], deadline)?;
        let mut cores = Vec::with_capacity(world_size);
        for (peer, (blob, _)) in parts.iter().enumerate() {
            let probe: Probe = fabric::decode(blob)?;
            calibrate &= (peer >= 2 || probe.calibrate) && nodes[peer] == nodes[0];
            if star.is_near(peer) || probe.machine == own.machine {
                cores.push(probe.cores);
            }
            if !star.is_near(peer) {
                continue;
            }
            check_header(&fabric, peer, &header(peer))?;
            let mut seen = [0; 8];
            let readable =
                config.cma && cma::read(pids[peer], probe.address, &mut seen).is_ok() && seen == MAGIC.to_ne_bytes();
            fabric.outbox.write(layout.cma + peer, &[readable.into()]);
        }
        // And everybody has tried to read everybody once this is through.
        star.exchange(&[], &[], deadline)?;
        drop(probe);

        let bells = Arc::new(Bells::new(&fabric, world_size, &layout));
        let ending = Arc::new(Ending::new(star, &fabric, &layout, &bells));
        if ranks_here < world_size {
            let mut star = ending.star();
            let endpoint = fabric::open_endpoint(&config, rendezvous.id(), &star)?;
            let progress_thread = config.progress_thread;
            let watched = star.watched()?;
            let mover = |plane, chores| {
                let [heard, looked] = std::array::from_fn(|_| ending.clone());
                let heard = move |source| heard.heard_from(source);
                let look = move || looked.look();
                match progress_thread {
                    true => Mover::start(plane, chores, heard, watched, look),
                    false => Mover::none(plane, chores, heard),
                }
            };
            let far = Far::connect(&mut star, endpoint, &fabric, &layout, mover, deadline)?;
            ending.tell_far(&far.plane, (0..world_size).filter(|&rank| !star.is_near(rank)).collect());
            drop(star);
            fabric.far = Some(far);
        }

        let alone = CoreSharing::of(&cores);
        let core_sharing = match &descent {
            Descent::Part(whole) => alone.of_part(&whole.core_sharing),
            _ => alone,
        };
        let patience = Patience::for_sharing(&core_sharing).in_turn(here.0, here.1);
        tracing::debug!(rank, %core_sharing, outbox = layout.bytes, heap = heap_bytes, "communicator ready");
        let mut comm = CommInner {
            former: match &descent {
                Descent::Rest { members, .. } => members.to_vec(),
                _ => (0..world_size).collect(),
            },
            unique_id: *rendezvous.id(),
            shrinking: Mutex::new(()),
            calibration: descent.whole().map_or_else(
                || Calibration::set(&config, core_sharing.has_core_each()),
                |whole| whole.calibration.clone(),
            ),
            rank,
            world_size,
            p2p: P2p::new(world_size),
            collectives: Collectives::new(rank, &nodes),
            board,
            id: job,
            heap: Mutex::new(Heap::new(HEAP_START, heap_bytes - HEAP_START)),
            counters: Arc::default(),
            ending,
            aborting: Mutex::new(()),
            barriers: Mutex::new(0),
            patience: if ranks_here < world_size { patience.between_nodes() } else { patience },
            core_sharing,
            sleeper: Sleeper::new(),
            origin: Origin::new(),
            config,
            layout,
            fabric,
            nodes,
            bells,
        };
        #[cfg(any(test, fuzzing))]
        comm.grow_old();
        if calibrate && comm.can_read(0, 1) && comm.can_read(1, 0) {
            comm.calibrate(deadline)?;
        }
        comm.p2p.set_private_rendezvous(comm.calibration.private_rendezvous);
        comm.look_out();
        Ok(comm)
    }

    /// Goes on as if this communicator had been in use for long.
    #[cfg(any(test, fuzzing))]
    fn grow_old(&self) {
        let age = self.layout.age;
        if age > 0 {
            self.p2p.grow_old(self);
            self.collectives.grow_old(self);
            *lock(&self.barriers) = age;
            self.fabric.heap.word32(BELL).fetch_sub(3, Relaxed);
        }
    }

    /// From now on what is set up with these ranks ends when the communicator does, and moves its traffic on meanwhile.
    fn look_out(&self) {
        let ending = Arc::downgrade(&self.ending);
        let far = self.fabric.far.as_ref().map(|far| (Arc::downgrade(&far.plane), Arc::downgrade(&far.chores)));
        let check = move || {
            let Some(ending) = ending.upgrade() else { return Ok(()) };
            // Ranks of other nodes may need something of this one before they come to the set-up.
            if let Some((plane, chores)) =
                far.as_ref().and_then(|(plane, chores)| plane.upgrade().zip(chores.upgrade()))
            {
                plane.progress(|source| ending.heard_from(source));
                chores.attempt();
            }
            ending.check(Operation::Setup)
        };
        self.star().look_out(Some(Arc::new(check)));
    }

    /// All ranks take what ranks 0 and 1 have measured, unless their own configuration says otherwise. Called on all ranks, or
    /// on none.
    fn calibrate(&mut self, deadline: Instant) -> Result<()> {
        let points = calibration::measure(self)?;
        self.p2p.forget_traffic();
        self.counters = Arc::default();
        let parts = self.star().exchange(&fabric::encode(&points)?, &[], deadline)?;
        let points: Vec<CalibrationPoint> = parts.first().map_or(Ok(vec![]), |(blob, _)| fabric::decode(blob))?;
        self.calibration = calibration::choose_from(&self.config, self.core_sharing.has_core_each(), points);
        Ok(())
    }

    /// What this rank has done so far, given its messages.
    pub(crate) fn statistics(&self, (sent, received, rendezvous): (Traffic, Traffic, u64)) -> Statistics {
        let c = &self.counters;
        let far = self.fabric.far.as_ref().map_or_else(Default::default, |far| far.plane.moved());
        Statistics {
            messages_sent: sent.messages,
            bytes_sent: sent.bytes,
            messages_received: received.messages,
            bytes_received: received.bytes,
            rendezvous,
            exchanges: c.exchanges.load(Relaxed),
            tokens: c.tokens.load(Relaxed),
            far_rows: c.far_rows.load(Relaxed),
            far_sums: c.far_sums.load(Relaxed),
            far_puts: far.puts,
            far_bytes: far.bytes,
            far_records: far.records,
            waits: c.waits.load(Relaxed),
            waits_yielded: c.waits_yielded.load(Relaxed),
            waits_slept: c.waits_slept.load(Relaxed),
            waited_us: c.waited_us.load(Relaxed),
            wake_ups: c.wake_ups.load(Relaxed),
        }
    }

    /// Shows what this rank has counted, unless another thread is at the messages just now.
    #[cold]
    fn show_counters(&self) {
        if let Some(traffic) = self.p2p.traffic_if_free() {
            self.board.counts(&self.statistics(traffic));
        }
    }

    /// The instant by which a call that starts now must end.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.config.timeout.unwrap_or(NO_DEADLINE)
    }

    /// The connections that were used to join: for one set-up at a time.
    pub(crate) fn star(&self) -> SetUp<'_> {
        let star = self.ending.star();
        let what = Waiting { operation: Operation::Setup, epoch: 0, peer: None };
        SetUp { star, shown: Some(self.board.waits(&what)), board: &self.board }
    }

    /// Whether `rank` is on this node.
    pub(crate) fn is_near(&self, rank: usize) -> bool {
        self.nodes[rank] == self.nodes[self.rank]
    }

    /// Whether this process is a fork of the one that has joined: nothing may be said in that one's name.
    #[inline]
    pub(crate) fn is_forked(&self) -> bool {
        self.origin.is_elsewhere()
    }

    /// Whether this process may use the communicator. To be asked by each call before it touches a lock or a word.
    #[inline]
    pub(crate) fn check_process(&self) -> Result<()> {
        if self.is_forked() { Err(Error::Forked { joined: self.origin.pid() }) } else { Ok(()) }
    }

    /// Whether there is such a rank, and this process may ask something of it.
    pub(crate) fn check_rank(&self, rank: usize) -> Result<()> {
        self.check_process()?;
        if rank < self.world_size { Ok(()) } else { Err(Error::InvalidRank { rank, world_size: self.world_size }) }
    }

    /// To be called after publishing a word that only `peer` waits for.
    pub(crate) fn notify(&self, peer: usize) {
        bell::publish_fence();
        if self.bells.ring_if_waiting(peer, self.rank) {
            self.counters.wake_ups.fetch_add(1, Relaxed);
        }
    }

    /// To be called after publishing a word that any rank of this node may wait for.
    pub(crate) fn notify_all(&self) {
        bell::publish_fence();
        self.notify_all_loosely();
    }

    /// As [`notify_all`](Self::notify_all) without its fence, for words that hardly anybody waits for: a rank that falls asleep at
    /// this very moment may be missed, and looks again when its slice is over.
    pub(crate) fn notify_all_loosely(&self) {
        let rung = self.bells.ring_waiting(self.rank);
        if rung > 0 {
            self.counters.wake_ups.fetch_add(rung, Relaxed);
        }
    }

    /// Takes what has come from far ranks, and sends what waits for room.
    #[cold]
    fn move_on(&self, far: &Far) {
        if self.is_forked() {
            return;
        }
        far.plane.progress(|source| self.ending.heard_from(source));
        far.chores.attempt();
    }

    /// Looks whether `ready` gives a value, and if not, moves things on and looks again.
    fn look<T>(&self, far: &Far, ready: &mut impl FnMut() -> Option<T>) -> Option<T> {
        ready().or_else(|| {
            self.move_on(far);
            ready()
        })
    }

    /// Wakes those who may have a chore now, whatever they sleep for.
    pub(crate) fn call_for_chores(&self) {
        if self.fabric.far.is_some() {
            bell::publish_fence();
            self.bells.ring_asleep();
        }
    }

    /// Looks a few times whether `ready` gives a value.
    #[inline]
    pub(crate) fn briefly<T>(&self, mut ready: impl FnMut() -> Option<T>) -> Option<T> {
        match &self.fabric.far {
            None => wait::briefly(&self.patience, ready),
            Some(far) => {
                far.mover.keep_away();
                wait::briefly(&self.patience, || self.look(far, &mut ready))
            }
        }
    }

    /// Waits until `ready` gives a value, or until there is a reason to give up.
    #[inline]
    pub(crate) fn wait<T>(&self, what: Waiting, ready: impl FnMut() -> Option<T>) -> Result<T> {
        self.wait_in(&mut Call::default(), what, ready)
    }

    /// As [`wait`](Self::wait), for calls that wait several times and have one deadline for all.
    #[inline]
    pub(crate) fn wait_in<T>(&self, call: &mut Call, what: Waiting, mut ready: impl FnMut() -> Option<T>) -> Result<T> {
        if let Some(cause) = self.ending.known() {
            self.check_later_call(cause, &what)?;
        }
        match self.briefly(&mut ready) {
            Some(value) => Ok(value),
            None => self.wait_slowly(call, what, ready),
        }
    }

    /// As [`wait`](Self::wait), for a word that nobody rings a bell for: looks again soon, at the cost of waking up for it.
    pub(crate) fn poll<T>(&self, what: Waiting, mut ready: impl FnMut() -> Option<T>) -> Result<T> {
        // From 0.1 ms to 2 ms.
        const SHORTER: u32 = 20;
        let limit = self.config.timeout;
        match self.briefly(&mut ready) {
            Some(value) => Ok(value),
            None => self.wait_with(
                &mut Call::default(),
                what,
                ready,
                |slice, ready| {
                    std::thread::sleep(slice / SHORTER);
                    ready();
                },
                |since| self.reason_to_give_up(&what, since, limit),
            ),
        }
    }

    #[cold]
    fn wait_slowly<T>(&self, call: &mut Call, what: Waiting, ready: impl FnMut() -> Option<T>) -> Result<T> {
        let limit = call.within.or(self.config.timeout);
        self.wait_unless(call, what, ready, |since| self.reason_to_give_up(&what, since, limit))
    }

    /// As [`wait_in`](Self::wait_in), but ended by the caller's own reasons alone.
    pub(super) fn wait_unless<T>(
        &self,
        call: &mut Call,
        what: Waiting,
        mut ready: impl FnMut() -> Option<T>,
        reason: impl Fn(Instant) -> Result<()>,
    ) -> Result<T> {
        #[cfg(any(test, fuzzing))]
        if crate::lies::is_impatient() {
            // Without the look around that a deadline takes: it is long.
            let Waiting { operation: during, epoch, peer } = what;
            let timeout = || Error::Timeout { during, epoch, peer, waited: Duration::ZERO, waited_for: String::new() };
            return reason(Instant::now()).and_then(|()| ready().ok_or_else(timeout));
        }
        let sleep = self.fabric.outbox.word32(self.layout.sleep);
        let bell = self.fabric.heap.word32(BELL);
        let waits_for = what.peer.map_or(bell::ANYONE, bell::only);
        let place = self.bells.place(self.rank);
        let rung = Cell::new(0);
        let doze = |slice, ready: &mut dyn FnMut() -> bool| {
            self.sleeper.sleep_unless((place, sleep), waits_for, (bell, rung.get()), slice, ready);
        };
        let check = |since| {
            // Read first: what ends the wait from now on rings it, and the sleep that follows is none.
            rung.set(bell::rung(bell));
            reason(since)
        };
        let Some(far) = &self.fabric.far else { return self.wait_with(call, what, ready, doze, check) };
        let looks = || self.look(far, &mut ready);
        // What it waits for may be a far rank, or a near one that waits for a far one.
        far.mover.attend();
        let result = self.wait_with(
            call,
            what,
            looks,
            |slice, ready| {
                let slice = if far.mover.is_running() { slice } else { slice.min(WITHOUT_MOVER) };
                far.mover.leave(true);
                doze(slice, ready);
                far.mover.attend();
            },
            check,
        );
        far.mover.leave(false);
        result
    }

    fn wait_with<T>(
        &self,
        call: &mut Call,
        what: Waiting,
        ready: impl FnMut() -> Option<T>,
        mut sleep: impl FnMut(Duration, &mut dyn FnMut() -> bool),
        check: impl Fn(Instant) -> Result<()>,
    ) -> Result<T> {
        let started = Instant::now();
        let since = *call.since.get_or_insert(started);
        let mut shown = None;
        // Of this communicator or another one: who is waited for here may wait for what that has to send.
        let sleep = |slice: Duration, ready: &mut dyn FnMut() -> bool| {
            sleep(if move_unattended_on() { slice.min(WITHOUT_MOVER) } else { slice }, ready);
        };
        let result = wait::until(&self.patience, ready, sleep, || {
            if shown.is_none() {
                shown = Some(self.board.waits(&what));
                self.show_counters();
            }
            check(since)
        });
        let (took, counters) = (started.elapsed(), &self.counters);
        self.board.waited(what.peer, took);
        counters.waits.fetch_add(1, Relaxed);
        counters.waited_us.fetch_add(took.as_micros() as u64, Relaxed);
        if let Some(shown) = shown {
            self.board.woke(shown, result.is_ok());
        }
        if self.board.counters_are_stale() {
            self.show_counters();
        }
        match result {
            Ok((_, Phase::Spinning)) => {}
            Ok((_, Phase::Yielding)) => _ = counters.waits_yielded.fetch_add(1, Relaxed),
            Ok((_, Phase::Asleep)) | Err(_) => _ = counters.waits_slept.fetch_add(1, Relaxed),
        }
        result.map(|(value, _)| value)
    }

    fn reason_to_give_up(&self, what: &Waiting, since: Instant, limit: Option<Duration>) -> Result<()> {
        let during = what.operation;
        // What is between two ranks goes on whatever becomes of others, but for an abort.
        let concerns = |rank: usize| !during.is_of_a_pair() || what.peer == Some(rank);
        let check_cause = || match self.ending.cause() {
            Some(Cause::Died(rank)) if !concerns(rank) => self.check_pair(what),
            Some(cause) => Err(self.ending.error(cause, during, what.epoch)),
            None => Ok(()),
        };
        check_cause()?;
        if during.is_collective()
            && let Some(told) = collectives::failure::told_by_anyone(self)
        {
            return Err(told);
        }
        self.check_plane(concerns, what)?;
        let others_left = || (0..self.world_size).find(|&r| r != self.rank && self.state(r) == LEFT);
        let all_left = || (0..self.world_size).all(|r| r == self.rank || self.state(r) == LEFT);
        let left = match what.peer {
            Some(peer) => (self.state(peer) == LEFT).then_some(peer),
            None if !during.is_of_a_pair() && all_left() => others_left(),
            None => None,
        };
        if let Some(rank) = left {
            // It may have left because of a death that it has heard of since this rank has looked: it says so before.
            check_cause()?;
            return Err(Error::PeerLeft { rank, during, epoch: what.epoch });
        }
        let waited = since.elapsed();
        if limit.is_some_and(|limit| waited >= limit) {
            return Err(self.timed_out(what, waited));
        }
        Ok(())
    }

    /// What a call reports when another rank has given its part up: that, unless the communicator is over, which is then why.
    pub(crate) fn or_the_end(&self, given_up: Error, during: Operation, epoch: u64) -> Error {
        self.ending.cause().map_or(given_up, |cause| self.ending.error(cause, during, epoch))
    }

    /// Whether the far ranks that `concerns` names can be reached.
    fn check_plane(&self, concerns: impl Fn(usize) -> bool, what: &Waiting) -> Result<()> {
        let Some(far) = &self.fabric.far else { return Ok(()) };
        let (during, epoch) = (what.operation, what.epoch);
        self.check_reach(far, concerns, (during, epoch))
    }

    /// Ends a call that begins after the end of the communicator is known, although what it waits for may be there.
    #[cold]
    fn check_later_call(&self, cause: Cause, what: &Waiting) -> Result<()> {
        match cause {
            Cause::Died(rank) if what.operation.is_of_a_pair() && what.peer != Some(rank) => Ok(()),
            _ => Err(self.ending.error(cause, what.operation, what.epoch)),
        }
    }

    /// Whether what is between this rank and one other can go on although a third one has died.
    fn check_pair(&self, what: &Waiting) -> Result<()> {
        let (during, epoch) = (what.operation, what.epoch);
        if let Some(by) = (0..self.world_size).find(|&rank| self.state(rank) == ABORTED) {
            return Err(self.ending.error(Cause::Aborted(by), during, epoch));
        }
        match what.peer.filter(|&rank| self.ending.has_died(rank)) {
            Some(rank) => Err(Error::PeerDied { rank, during, epoch }),
            None => Ok(()),
        }
    }

    /// Whether the network still reaches the far ranks that it `concerns`.
    fn check_reach(&self, far: &Far, concerns: impl Fn(usize) -> bool, at: (Operation, u64)) -> Result<()> {
        let (during, epoch) = at;
        match far.plane.trouble(|rank| concerns(rank) && self.state(rank) != LEFT) {
            Some(Trouble::Lost { rank, why }) => Err(Error::PeerUnreachable { rank, during, epoch, why }),
            Some(Trouble::Corrupt { rank, what, value, limit }) => Err(Error::Corrupt { rank, what, value, limit }),
            None => Ok(()),
        }
    }

    pub(super) fn timed_out(&self, what: &Waiting, waited: Duration) -> Error {
        let waited_for = self.explain(what, waited);
        Error::Timeout { during: what.operation, epoch: what.epoch, peer: what.peer, waited, waited_for }
    }

    /// Whether anything can still be done to a rank's memory, as far as this rank knows without asking the kernel.
    pub(crate) fn check_partner(&self, rank: usize, during: Operation) -> Result<()> {
        let aborted = |by| self.ending.error(Cause::Aborted(by), during, 0);
        match self.state(rank) {
            ABORTED => return Err(aborted(rank)),
            LEFT => return Err(Error::PeerLeft { rank, during, epoch: 0 }),
            _ if self.ending.known() == Some(Cause::Died(rank)) => {
                return Err(Error::PeerDied { rank, during, epoch: 0 });
            }
            _ => {}
        }
        if let Some(far) = self.fabric.far_to(rank) {
            self.check_reach(far, |other| other == rank, (during, 0))?;
        }
        match self.state(self.rank) {
            ABORTED => Err(aborted(self.rank)),
            _ => Ok(()),
        }
    }

    /// As [`check_partner`](Self::check_partner), but asks the kernel or the network, which takes a while.
    pub(crate) fn check_partner_lives(&self, rank: usize, during: Operation) -> Result<()> {
        self.check_partner(rank, during)?;
        match self.ending.cause() {
            _ if self.ending.has_died(rank) => return Err(Error::PeerDied { rank, during, epoch: 0 }),
            Some(cause @ Cause::Died(dead)) if dead == rank => return Err(self.ending.error(cause, during, 0)),
            _ => {}
        }
        self.check_plane(|other| other == rank, &Waiting { operation: during, epoch: 0, peer: Some(rank) })
    }

    /// For who looks at words without waiting: takes what has come from far ranks.
    pub(crate) fn look_around(&self) {
        if let Some(far) = &self.fabric.far {
            self.move_on(far);
        }
    }

    /// A rank that has aborted the communicator.
    pub(crate) fn aborted_by(&self) -> Option<usize> {
        (0..self.world_size).find(|&rank| self.state(rank) == ABORTED)
    }

    pub(super) fn state(&self, rank: usize) -> u32 {
        self.ending.state(rank)
    }

    /// Where bytes lie in this rank's symmetric heap, if they do.
    pub(crate) fn in_heap(&self, data: &[u8]) -> Option<usize> {
        let heap = &self.fabric.heap;
        let offset = (data.as_ptr() as usize).checked_sub(heap.at(0, 0) as usize)?;
        (offset <= heap.len() && data.len() <= heap.len() - offset).then_some(offset)
    }

    /// Whether `rank` can read this rank's private memory.
    pub(crate) fn can_read_me(&self, rank: usize) -> bool {
        self.can_read(rank, self.rank)
    }

    /// Whether `reader` can read the private memory of `other`, as it has found when joining.
    fn can_read(&self, reader: usize, other: usize) -> bool {
        let mut byte = [0];
        self.fabric.peer(reader).outbox.read(self.layout.cma + other, &mut byte);
        byte[0] == 1
    }

    pub(crate) fn barrier(&self) -> Result<()> {
        self.check_process()?;
        let mut barriers = lock(&self.barriers);
        let epoch = *barriers + 1;
        let recorded = self.board.begins(Operation::Barrier, epoch);
        crate::sync::epoch::publish(self.fabric.outbox.word64(self.layout.barrier), epoch);
        self.notify_all();
        self.fabric.far().for_each(|(rank, far)| far.tell(rank, self.layout.barrier, epoch));
        let mut call = Call::default();
        for peer in 0..self.world_size {
            let word = self.fabric.peer(peer).outbox.word64(self.layout.barrier);
            let what = Waiting { operation: Operation::Barrier, epoch, peer: Some(peer) };
            self.wait_in(&mut call, what, || crate::sync::epoch::reached(word, epoch).then_some(()))?;
        }
        *barriers = epoch;
        recorded.over();
        Ok(())
    }

    /// Says that this rank takes no further part; what it has published stays readable.
    fn leave(&self) {
        let state = if self.state(self.rank) == ABORTED { ABORTED_AND_LEFT } else { LEFT };
        self.fabric.outbox.word32(self.layout.state).store(state, Release);
        self.ring_all();
        self.fabric.far().for_each(|(rank, far)| far.tell32(rank, self.layout.state, state));
    }

    /// Wakes every rank of this node, to look at what this one has published.
    pub(crate) fn ring_all(&self) {
        bell::publish_fence();
        self.bells.ring_all();
    }

    /// Waits until far ranks have what was sent to them, since nobody moves it on afterwards: not for those that have left or
    /// cannot be reached, and not for long.
    fn see_off(&self, far: &Far) {
        let until = Instant::now() + self.config.timeout.unwrap_or(FAREWELL).min(FAREWELL);
        let is_through = |rank: usize| {
            let is_gone = self.ending.has_left(rank) || self.ending.known() == Some(Cause::Died(rank));
            is_gone || far.plane.is_settled(rank)
        };
        while !self.fabric.far().all(|(rank, _)| is_through(rank)) && Instant::now() < until {
            self.move_on(far);
            std::thread::sleep(WITHOUT_MOVER);
        }
    }
}

impl Drop for CommInner {
    fn drop(&mut self) {
        if self.is_forked() {
            // The connections are the other process's as well, and its thread is not here to be waited for.
            std::mem::forget(self.fabric.far.take());
            return;
        }
        // What other ranks still pass on for this one comes first: that it has left must not overtake it.
        self.fabric.far.iter().for_each(|far| self.see_off(far));
        tracing::debug!(rank = self.rank, "leaves the communicator");
        self.leave();
        self.fabric.far.iter().for_each(|far| self.see_off(far));
    }
}

fn check_header(fabric: &Fabric, peer: usize, expected: &Header) -> Result<()> {
    let mut found = [Header { magic: 0, ..*expected }];
    fabric.peer(peer).outbox.read_into(0, &mut found);
    let [found] = found;
    if found == *expected {
        return Ok(());
    }
    Err(Error::Mismatch {
        rank: peer,
        what: "segment header".to_owned(),
        theirs: format!("{found:?}"),
        ours: format!("{expected:?}"),
    })
}

fn hash_of(bytes: &[u8]) -> u64 {
    let digest = Sha256::digest(bytes);
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(first)
}

/// No invariant of the crate's locks spans a panic, so a poisoned one is taken all the same.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
