//! Between nodes: batches of puts, each followed by changes to words of the target.
//!
//! There are no loads between nodes, so what a rank would read of another one is *put* into a landing zone at the reader, at
//! the same offset; from there it is read as if its writer were near. What has to become visible at once, and after the data
//! (epoch words, turns of slots), is not put but *told*: it stands in a record, and the target itself stores it.
//!
//! # The protocol, per ordered pair of ranks
//! - The sender numbers its batches from 1. A batch is any number of data puts and one put of a *record* into the landing ring at
//!   the target, at slot `number % RECORDS`. Each put carries an immediate: (data or record, sender, number).
//! - Data puts that no update follows yet ([`Plane::put`]) leave at once, and belong to the batch that the next record ends: so
//!   a long transfer is bare puts and one record.
//! - Where the card puts several ranges at once, those of a batch go together, and the last of them with the record: a small
//!   exchange is one put. Then they count as one, or are there when the record is.
//! - The target counts. A batch is complete when its record has arrived and as many data puts as the record says: nothing is
//!   inferred from the order of arrivals. Complete batches are applied in the order of their numbers: the record is copied out
//!   and checked, its updates are stored, with release order, into landing zones or the symmetric heap.
//! - *Credit*: the sender starts batch `n` only when it knows that batch `n - RECORDS` was applied, so a number in an
//!   immediate names one batch and a slot of the ring is never overwritten before it was read. The target tells how many it has applied in
//!   every record of its own, and by an immediate of its own kind when it has told nothing for a quarter of the ring, or when the
//!   sender asks. What has no credit, or finds the card's queue full, waits in a queue at the sender.
//!
//! The race that looks possible: two batches in flight change the same word, and the later one's puts arrive first. They are
//! counted, but its updates wait for the earlier batch.
//!
//! Whoever waits moves everything on ([`Plane::progress`]); so does the [progress thread](super::progress).

#[cfg(any(test, fuzzing))]
pub(crate) mod lies;
pub(crate) mod record;
#[cfg(any(test, fuzzing))]
pub(crate) mod simulated;
#[cfg(test)]
mod tests;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

pub(crate) use record::{Change, MOST_BYTES, Update};
use record::{Record, WORDS};

use super::endpoint::{Access, Endpoint, Event, MOST_PARTS, Part, Posted, Region, RemoteRegion};
use crate::comm::inner::lock;
use crate::error::{Error, Result};
use crate::memory::mapping::Mapping;

/// Bytes of a record.
pub(crate) const RECORD_BYTES: usize = 256;
/// Batches that may be on their way from one rank to another.
pub(crate) const RECORDS: u64 = 64;
/// Puts of a batch without a record: what is in flight is bounded by this and the credit.
const MOST_PUTS: u32 = 64;
/// Batches that may have been applied without a word to their sender.
const UNTOLD: u64 = RECORDS / 4;
/// Batches that may wait for credit when a fetch is to be answered. Whoever fetches waits for the answer, so that it has not many on
/// their way; one that never takes any would fill this rank's memory.
const UNANSWERED: usize = 64 * RECORDS as usize;
/// Bytes of the ring that one rank's records land in.
const RING: usize = RECORDS as usize * RECORD_BYTES;

/// Bits of an immediate, from the top: kind, sender, number.
const NUMBER_BITS: u32 = 18;
const SENDER_BITS: u32 = 12;
const NUMBERS: u64 = 1 << NUMBER_BITS;
/// A data put of batch `number`.
const DATA: u32 = 0;
/// The record of batch `number`.
const RECORD: u32 = 1;
/// The sender has applied all batches up to `number`.
const TOLD: u32 = 2;
/// The sender wants to be told when batch `number` was applied.
const ASKS: u32 = 3;

const _: () = assert!(crate::bootstrap::MAX_WORLD_SIZE <= 1 << SENDER_BITS && RECORDS < NUMBERS / 4);

fn immediate(kind: u32, sender: usize, number: u64) -> u32 {
    kind << (SENDER_BITS + NUMBER_BITS) | (sender as u32) << NUMBER_BITS | (number % NUMBERS) as u32
}

/// How far ahead of `number` the one with these low bits is, if it may be.
fn ahead(low: u32, number: u64) -> Option<u64> {
    let ahead = u64::from(low).wrapping_sub(number) % NUMBERS;
    (ahead <= RECORDS).then_some(ahead)
}

/// One put of a batch.
#[derive(Clone, Debug)]
pub(crate) struct Put {
    pub(crate) from: Region,
    /// Offsets within `from`.
    pub(crate) range: Range<usize>,
    pub(crate) into: RemoteRegion,
    pub(crate) offset: usize,
}

impl Put {
    fn part(&self) -> Part {
        Part { from: (self.from, self.range.clone()), into: (self.into, self.offset) }
    }
}

/// Puts whose memory waits to be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Departure(u64);

/// Words that one rank may change in this process.
#[derive(Clone)]
pub(crate) struct Window {
    pub(crate) memory: Arc<Mapping>,
    /// Where offset 0 lies in `memory`.
    pub(crate) base: usize,
    /// The offsets that may be changed.
    pub(crate) range: Range<usize>,
}

/// What was sent to far ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moved {
    /// Ranges of data that were put.
    pub(crate) puts: u64,
    /// Their bytes.
    pub(crate) bytes: u64,
    pub(crate) records: u64,
}

/// Why nothing comes from a far rank any more.
#[derive(Clone, Debug)]
pub(crate) enum Trouble {
    /// It cannot be reached: what the card says.
    Lost { rank: usize, why: String },
    /// It says what cannot be.
    Corrupt { rank: usize, what: &'static str, value: u64, limit: u64 },
}

/// What has arrived of a batch.
#[derive(Clone, Copy, Default)]
struct Arrival {
    puts: u32,
    record: bool,
}

/// This rank's end of one pair.
struct Peer {
    /// Where our records land at that rank.
    records: Option<RemoteRegion>,
    /// Where its records land here.
    landing: (Arc<Mapping>, Region),
    /// Batches that were started here, and how many of them it has applied.
    started: u64,
    taken: u64,
    /// It was asked to tell when this one is applied; what it was not asked yet waits for the card.
    asked: u64,
    asking: bool,
    /// Batches of it that were applied here, and how many of them it was told.
    applied: u64,
    told: u64,
    /// It wants to be told when this one is applied.
    wants: u64,
    arrived: [Arrival; RECORDS as usize],
    /// Puts of the batch after the last one that was started: of an open one, that has no record yet.
    open: u32,
    /// What has not been posted: puts, with their batch's number and who asks whether they have left, and records with how many
    /// puts each has.
    puts: VecDeque<(u64, Put, Option<Departure>)>,
    batches: VecDeque<(Record, u32)>,
    /// When its last batch was applied.
    last_heard: Option<Instant>,
    /// Whether it is one of [`State::held_up`].
    held_up: bool,
    trouble: Option<Trouble>,
    moved: Moved,
}

struct State {
    endpoint: Box<dyn Endpoint>,
    rank: usize,
    /// By rank; `None` for near ones.
    peers: Vec<Option<Peer>>,
    /// Peers that have something to send which the card or credit did not let pass.
    held_up: usize,
    /// By window, by rank: what that rank may change.
    windows: Vec<Vec<Option<Window>>>,
    /// Where records leave from: per peer, a ring as at the target.
    staging: (Arc<Mapping>, Region),
    events: Vec<Event>,
    /// Ranks that have changed words here since they were last reported.
    heard: Vec<bool>,
    /// What is being posted.
    parts: Vec<Part>,
    /// What the answers to fetches and gets are; `None` until they come.
    answers: HashMap<u64, Option<u64>>,
    /// Puts that have not left, and the rank they go to.
    departures: HashMap<Departure, (usize, u32)>,
    next_token: u64,
    /// Answers to the fetches of others that are to be sent.
    to_answer: Vec<(usize, Update)>,
}

/// This rank's end of all pairs.
pub(crate) struct Plane {
    state: Mutex<State>,
    wake: Option<OwnedFd>,
}

impl Plane {
    /// Prepares for the ranks that are `far`.
    pub(crate) fn new(mut endpoint: Box<dyn Endpoint>, rank: usize, far: &[bool]) -> Result<Self> {
        let staging = Arc::new(Mapping::anonymous(far.len() * RING)?);
        let region = endpoint.register(&staging, 0..staging.len(), Access::Local)?;
        let mut peer_of = |far: bool| -> Result<Option<Peer>> {
            if !far {
                return Ok(None);
            }
            let memory = Arc::new(Mapping::anonymous(RING)?);
            let region = endpoint.register(&memory, 0..RING, Access::Remote)?;
            Ok(Some(Peer::new((memory, region))))
        };
        let peers = far.iter().map(|&far| peer_of(far)).collect::<Result<Vec<_>>>()?;
        let wake = endpoint.wake_fd().map(|fd| fd.try_clone_to_owned()).transpose().map_err(|e| Error::os("dup", e))?;
        let state = State {
            endpoint,
            rank,
            held_up: 0,
            windows: vec![],
            staging: (staging, region),
            events: vec![],
            heard: vec![false; peers.len()],
            parts: Vec::with_capacity(MOST_PARTS),
            peers,
            answers: HashMap::new(),
            departures: HashMap::new(),
            next_token: 0,
            to_answer: vec![],
        };
        Ok(Plane { state: Mutex::new(state), wake })
    }

    /// Goes on as if so many batches had come and gone.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn grow_old(&self, age: u64) {
        for peer in lock(&self.state).peers.iter_mut().flatten() {
            (peer.started, peer.taken, peer.applied, peer.told, peer.asked) = (age, age, age, age, age);
        }
    }

    /// What other ranks must know to connect.
    pub(crate) fn address(&self) -> Result<Vec<u8>> {
        lock(&self.state).endpoint.address()
    }

    /// Where the records of `rank` are to land.
    pub(crate) fn landing_of(&self, rank: usize) -> Option<RemoteRegion> {
        lock(&self.state).peers[rank].as_ref().map(|peer| peer.landing.1.remote)
    }

    /// Connects to the far ranks: by rank, their addresses.
    pub(crate) fn connect(&self, addresses: &[Vec<u8>]) -> Result<()> {
        let mut state = lock(&self.state);
        let far = |(address, peer): (&Vec<u8>, &Option<Peer>)| peer.is_some().then(|| address.clone());
        let far: Vec<_> = addresses.iter().zip(&state.peers).map(far).collect();
        state.endpoint.connect(&far)
    }

    /// Whether records for `rank` have room where it says that they are to land.
    pub(crate) fn check_records(&self, rank: usize, records: &RemoteRegion) -> Result<()> {
        records.check(rank, RING)
    }

    /// Notes where records for `rank` land at it: before anything is sent to it.
    pub(crate) fn set_records(&self, rank: usize, records: RemoteRegion) {
        if let Some(peer) = &mut lock(&self.state).peers[rank] {
            peer.records = Some(records);
        }
    }

    /// Registers memory, which stays mapped as long as the plane lives.
    pub(crate) fn register(&self, memory: &Arc<Mapping>, range: Range<usize>, access: Access) -> Result<Region> {
        lock(&self.state).endpoint.register(memory, range, access)
    }

    /// Adds a window: by rank, what that rank may change. Gives its number, which is the same on all ranks that add theirs in
    /// the same order.
    pub(crate) fn add_window(&self, by_rank: Vec<Option<Window>>) -> u16 {
        let windows = &mut lock(&self.state).windows;
        windows.push(by_rank);
        (windows.len() - 1) as u16
    }

    /// Starts a batch to `to`: the puts, and when they are there, the updates. Never blocks. The memory that is put from stays as
    /// it is until the batch was applied: that is for the caller's own protocol to know.
    pub(crate) fn send(&self, to: usize, puts: impl IntoIterator<Item = Put>, updates: &[Update]) {
        lock(&self.state).send(to, puts, updates);
    }

    /// Starts puts to `to`, which the next batch's record counts. Never blocks. Their memory stays as it is until they
    /// [have left](Self::has_left). Several calls may be given one departure, which is of one rank.
    pub(crate) fn put(&self, to: usize, puts: impl IntoIterator<Item = Put>, departure: Departure) {
        lock(&self.state).put(to, puts, departure);
    }

    /// What puts can be asked for by, whether they have left.
    pub(crate) fn departure(&self) -> Departure {
        let mut state = lock(&self.state);
        state.next_token += 1;
        Departure(state.next_token)
    }

    /// Whether all puts of a departure have left, so that their memory may change. Also where they never will: of a rank that cannot
    /// be reached nothing is sent any more.
    pub(crate) fn has_left(&self, departure: Departure) -> bool {
        !lock(&self.state).departures.contains_key(&departure)
    }

    /// Changes a word at `to`; gives a token for what was there.
    pub(crate) fn fetch(&self, to: usize, window: u16, offset: usize, change: Change) -> u64 {
        let mut state = lock(&self.state);
        let token = state.new_token();
        state.send(to, [], &[Update::Fetch { window, offset, change, token }]);
        token
    }

    /// Starts to copy memory of `of` to this rank; gives a token for when it is there, `None` while the card's queue is full.
    pub(crate) fn get(
        &self,
        of: usize,
        from: (RemoteRegion, usize),
        into: (Region, Range<usize>),
    ) -> Result<Option<u64>> {
        let mut state = lock(&self.state);
        let token = state.new_token();
        match state.endpoint.get(of, from, into, token)? {
            Posted::Yes => Ok(Some(token)),
            Posted::Full => {
                state.answers.remove(&token);
                Ok(None)
            }
        }
    }

    /// What came of a fetch, or zero for a get, once: `None` until it has come.
    pub(crate) fn answer(&self, token: u64) -> Option<u64> {
        let answers = &mut lock(&self.state).answers;
        let value = (*answers.get(&token)?)?;
        answers.remove(&token);
        Some(value)
    }

    /// Forgets a fetch that nobody waits for any more.
    pub(crate) fn forget(&self, token: u64) {
        lock(&self.state).answers.remove(&token);
    }

    /// Sends `to` a question that need not be answered: what finds out whether it can still be reached. Its trouble comes later.
    pub(crate) fn probe(&self, to: usize) {
        lock(&self.state).probe(to);
    }

    /// Whether `to` has applied all that was sent to it; if not, it is asked to tell when it has. Nothing more comes of one that
    /// cannot be reached.
    pub(crate) fn is_settled(&self, to: usize) -> bool {
        lock(&self.state).is_settled(to)
    }

    /// Moves everything on, if no other thread is at it. Then `heard` is told each rank that has changed words here. Says
    /// whether anything has happened.
    pub(crate) fn progress(&self, mut heard: impl FnMut(usize)) -> bool {
        let mut state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let happened = state.progress();
        if happened {
            for rank in 0..state.heard.len() {
                if std::mem::take(&mut state.heard[rank]) {
                    heard(rank);
                }
            }
        }
        happened
    }

    /// Why a rank that `counts` cannot be reached, if there is one.
    pub(crate) fn trouble(&self, counts: impl Fn(usize) -> bool) -> Option<Trouble> {
        let state = lock(&self.state);
        let troubled = state.peers.iter().enumerate().filter(|(rank, _)| counts(*rank));
        troubled.filter_map(|(_, peer)| peer.as_ref()?.trouble.clone()).next()
    }

    /// Tells in words how it stands with a far rank.
    pub(crate) fn describe(&self, rank: usize) -> String {
        let state = lock(&self.state);
        let Some(peer) = &state.peers[rank] else { return "is near".to_owned() };
        let heard = match peer.last_heard {
            Some(at) => format!("last heard of {:?} ago", Duration::from_millis(at.elapsed().as_millis() as u64)),
            None => "not heard of yet".to_owned(),
        };
        let Arrival { puts, record } = peer.arrived[((peer.applied + 1) % RECORDS) as usize];
        let incomplete = match (puts, record) {
            (0, false) => String::new(),
            (puts, record) => {
                let record = if record { "with" } else { "without" };
                format!("; its batch {} is incomplete: {puts} puts, {record} its record", peer.applied + 1)
            }
        };
        let taken = match peer.started - peer.taken {
            0 => String::new(),
            n => format!(
                "; it has not said that it took the last {n} batches from here, of which {} have not left",
                peer.batches.len()
            ),
        };
        format!("{heard}{incomplete}{taken}")
    }

    /// What was sent to far ranks.
    pub(crate) fn moved(&self) -> Moved {
        let state = lock(&self.state);
        state.peers.iter().flatten().fold(Moved::default(), |sum, peer| Moved {
            puts: sum.puts + peer.moved.puts,
            bytes: sum.bytes + peer.moved.bytes,
            records: sum.records + peer.moved.records,
        })
    }

    /// A descriptor that becomes readable when there is something to move on, where the card has one.
    pub(crate) fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.wake.as_ref().map(|fd| fd.as_fd())
    }

    /// Whether nothing has come up to now that [`wake_fd`](Self::wake_fd) would not tell, and nothing waits to be sent.
    pub(crate) fn may_sleep(&self) -> bool {
        let mut state = lock(&self.state);
        state.held_up == 0 && state.endpoint.may_sleep()
    }
}

impl Peer {
    fn new(landing: (Arc<Mapping>, Region)) -> Self {
        Peer {
            records: None,
            landing,
            started: 0,
            taken: 0,
            asked: 0,
            asking: false,
            applied: 0,
            told: 0,
            wants: 0,
            open: 0,
            arrived: [Arrival::default(); RECORDS as usize],
            puts: VecDeque::new(),
            batches: VecDeque::new(),
            last_heard: None,
            held_up: false,
            trouble: None,
            moved: Moved::default(),
        }
    }

    /// The last batch to it that has left.
    fn left(&self) -> u64 {
        self.started - self.batches.len() as u64
    }

    /// Whether something of it has not left.
    fn is_held_up(&self) -> bool {
        !self.puts.is_empty() || !self.batches.is_empty() || self.asking || self.owes_word()
    }

    /// Whether the peer is to be told how much of it was applied.
    fn owes_word(&self) -> bool {
        self.applied - self.told >= UNTOLD || (self.told < self.wants && self.wants <= self.applied)
    }

    fn arrival(&mut self, number: u64) -> &mut Arrival {
        &mut self.arrived[(number % RECORDS) as usize]
    }

    /// So many puts have been posted, and the batch is of so many fewer than was counted.
    fn take_out(&mut self, posted: usize, fewer: usize) {
        for (_, put, _) in self.puts.drain(..posted) {
            self.moved.puts += 1;
            self.moved.bytes += put.range.len() as u64;
        }
        if let Some((_, puts)) = self.batches.front_mut() {
            *puts -= fewer as u32;
        }
    }

    fn give_up(&mut self, trouble: Trouble) {
        self.puts.clear();
        self.batches.clear();
        (self.asking, self.told, self.wants, self.open) = (false, self.applied, 0, 0);
        self.trouble.get_or_insert(trouble);
    }
}

impl State {
    fn new_token(&mut self) -> u64 {
        self.next_token += 1;
        self.answers.insert(self.next_token, None);
        self.next_token
    }

    fn send(&mut self, to: usize, puts: impl IntoIterator<Item = Put>, mut updates: &[Update]) {
        let Some(peer) = self.peers[to].as_mut().filter(|peer| peer.trouble.is_none()) else { return };
        let mut puts = puts.into_iter();
        // More updates than a record holds are several batches; all puts go with the first.
        loop {
            peer.started += 1;
            let (number, before, open) = (peer.started, peer.puts.len(), std::mem::take(&mut peer.open));
            peer.puts.extend(puts.by_ref().map(|put| (number, put, None)));
            let count = open + (peer.puts.len() - before) as u32;
            let mut record = Record::new(number);
            while let Some((first, rest)) = updates.split_first()
                && record.push(first)
            {
                updates = rest;
            }
            peer.batches.push_back((record, count));
            if updates.is_empty() {
                break;
            }
        }
        self.flush(to);
    }

    fn put(&mut self, to: usize, puts: impl IntoIterator<Item = Put>, departure: Departure) {
        for put in puts {
            let Some(peer) = self.peers[to].as_mut().filter(|peer| peer.trouble.is_none()) else { return };
            peer.open += 1;
            peer.puts.push_back((peer.started + 1, put, Some(departure)));
            self.departures.entry(departure).or_insert((to, 0)).1 += 1;
            match peer.open {
                MOST_PUTS => self.send(to, [], &[]),
                _ => _ = self.flush(to),
            }
        }
    }

    fn is_settled(&mut self, to: usize) -> bool {
        if self.peers[to].as_ref().is_some_and(|peer| peer.open > 0) {
            self.send(to, [], &[]);
        }
        let Some(peer) = &mut self.peers[to] else { return true };
        if peer.taken == peer.started || peer.trouble.is_some() {
            return true;
        }
        if peer.asked < peer.started {
            (peer.asked, peer.asking) = (peer.started, true);
            self.flush(to);
        }
        false
    }

    fn probe(&mut self, to: usize) {
        if let Some(peer) = self.peers[to].as_mut().filter(|peer| peer.trouble.is_none()) {
            (peer.asked, peer.asking) = (peer.left(), true);
            self.flush(to);
        }
    }

    fn progress(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.events);
        if let Err(err) = self.endpoint.poll(&mut events) {
            events.push(Event::Failed { to: None, why: err.to_string() });
        }
        let mut happened = !events.is_empty();
        for event in events.drain(..) {
            self.take(event);
        }
        self.events = events;
        while let Some((to, answer)) = self.to_answer.pop() {
            let waiting = self.peers[to].as_ref().map_or(0, |peer| peer.batches.len());
            if waiting < UNANSWERED {
                self.send(to, [], &[answer]);
                continue;
            }
            let (what, value, limit) = ("a number of fetches", waiting as u64, UNANSWERED as u64);
            self.give_up(Trouble::Corrupt { rank: to, what, value, limit });
        }
        if self.held_up > 0 {
            for to in 0..self.peers.len() {
                if self.peers[to].as_ref().is_some_and(Peer::is_held_up) {
                    happened |= self.flush(to);
                }
            }
        }
        happened
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Arrived { immediate } => {
                let source = (immediate >> NUMBER_BITS) as usize % (1 << SENDER_BITS);
                // One that is nobody here has no number either: it is left alone.
                if self.peers.get(source).is_some_and(|peer| peer.as_ref().is_some_and(|p| p.trouble.is_none())) {
                    let (kind, low) = (immediate >> (SENDER_BITS + NUMBER_BITS), immediate % NUMBERS as u32);
                    self.arrived(source, kind, low);
                }
            }
            Event::Left { token } => {
                if let Entry::Occupied(mut departure) = self.departures.entry(Departure(token)) {
                    departure.get_mut().1 -= 1;
                    if departure.get().1 == 0 {
                        departure.remove();
                    }
                }
            }
            Event::Got { token } => {
                if let Some(answer) = self.answers.get_mut(&token) {
                    *answer = Some(0);
                }
            }
            Event::Failed { to, why } => {
                let all = 0..self.peers.len();
                for rank in all.filter(|rank| to.is_none_or(|to| to == *rank)) {
                    self.give_up(Trouble::Lost { rank, why: why.clone() });
                }
            }
        }
    }

    fn give_up(&mut self, trouble: Trouble) {
        let (Trouble::Lost { rank, .. } | Trouble::Corrupt { rank, .. }) = trouble;
        let Some(peer) = &mut self.peers[rank] else { return };
        peer.give_up(trouble);
        self.held_up -= usize::from(std::mem::take(&mut peer.held_up));
        self.departures.retain(|_, (to, _)| *to != rank);
        // Whoever sleeps for it is to look.
        self.heard[rank] = true;
    }

    fn arrived(&mut self, source: usize, kind: u32, low: u32) {
        let Some(peer) = &mut self.peers[source] else { return };
        match kind {
            DATA | RECORD => {
                let Some(ahead @ 1..) = ahead(low, peer.applied) else {
                    let (value, limit) = (low.into(), RECORDS);
                    return self.give_up(Trouble::Corrupt { rank: source, what: "a batch's number", value, limit });
                };
                let number = peer.applied + ahead;
                match kind {
                    DATA => peer.arrival(number).puts = peer.arrival(number).puts.saturating_add(1),
                    _ => peer.arrival(number).record = true,
                }
                self.apply(source);
            }
            TOLD => {
                // An older word that was overtaken says nothing new.
                let taken = peer.taken + ahead(low, peer.taken).unwrap_or(0);
                peer.taken = taken.min(peer.started);
            }
            _ => peer.wants = peer.wants.max(peer.applied + ahead(low, peer.applied).unwrap_or(0)),
        }
        if let Some(peer) = &self.peers[source]
            && peer.trouble.is_none()
        {
            self.flush(source);
        }
    }

    /// Applies the batches of `source` that are complete, in their order.
    fn apply(&mut self, source: usize) {
        loop {
            let Some(peer) = &mut self.peers[source] else { return };
            let number = peer.applied + 1;
            let arrival = *peer.arrival(number);
            if !arrival.record {
                return;
            }
            let mut words = [0u64; WORDS];
            peer.landing.0.read_into((number % RECORDS) as usize * RECORD_BYTES, &mut words);
            let corrupt = |what, value, limit| Trouble::Corrupt { rank: source, what, value, limit };
            let Some(record) = Record::from_words(words).filter(|record| record.number() == number) else {
                return self.give_up(corrupt("a record's number", words[0], number));
            };
            if arrival.puts < record.puts() {
                return;
            }
            if arrival.puts > record.puts() {
                return self.give_up(corrupt("a batch's puts", arrival.puts.into(), record.puts().into()));
            }
            if record.taken() > peer.started {
                let trouble = corrupt("batches that were applied", record.taken(), peer.started);
                return self.give_up(trouble);
            }
            peer.taken = peer.taken.max(record.taken());
            *peer.arrival(number) = Arrival::default();
            (peer.applied, peer.last_heard) = (number, Some(Instant::now()));
            self.heard[source] = true;
            for update in record.updates() {
                if let Err(trouble) = self.update(source, update) {
                    return self.give_up(trouble);
                }
            }
        }
    }

    fn update(&mut self, source: usize, update: Option<Update>) -> std::result::Result<(), Trouble> {
        let corrupt = |what, value, limit| Trouble::Corrupt { rank: source, what, value, limit };
        let Some(update) = update else { return Err(corrupt("an update", 0, 0)) };
        let place = |window: u16, offset: usize, bytes: usize, align: usize| {
            let windows = self.windows.get(usize::from(window)).and_then(|by_rank| by_rank[source].as_ref());
            let Some(Window { memory, base, range }) = windows else {
                return Err(corrupt("a window", window.into(), self.windows.len() as u64));
            };
            let fits = range.start <= offset && offset <= range.end && bytes <= range.end - offset;
            match fits && offset.is_multiple_of(align) {
                true => Ok((&**memory, base + offset)),
                false => Err(corrupt("a word's offset", offset as u64, range.end as u64)),
            }
        };
        let word = |window, offset, bytes| place(window, offset, bytes, bytes);
        match update {
            Update::Bytes { window, offset, len, words } => {
                let (memory, at) = place(window, offset, len, 1)?;
                memory.put(at, &bytemuck::cast_slice(&words)[..len]);
            }
            Update::Word64 { window, offset, value } => {
                let (memory, at) = word(window, offset, 8)?;
                memory.word64(at).store(value, Release);
            }
            Update::Word32 { window, offset, value } => {
                let (memory, at) = word(window, offset, 4)?;
                memory.word32(at).store(value, Release);
            }
            Update::Line { window, offset, words } => {
                let (memory, at) = word(window, offset, 64)?;
                let line = memory.line(at);
                line.iter().zip(words).skip(1).for_each(|(to, word)| to.store(word, Relaxed));
                line[0].store(words[0], Release);
            }
            Update::Add { window, offset, value } => {
                let (memory, at) = word(window, offset, 8)?;
                memory.word64(at).fetch_add(value, AcqRel);
            }
            Update::Fetch { window, offset, change, token } => {
                let (memory, at) = word(window, offset, 8)?;
                let word = memory.word64(at);
                let value = match change {
                    Change::Nothing => word.load(Acquire),
                    Change::Add(value) => word.fetch_add(value, AcqRel),
                    Change::Swap(value) => word.swap(value, AcqRel),
                    Change::CompareSwap(expected, value) => {
                        let (Ok(found) | Err(found)) = word.compare_exchange(expected, value, AcqRel, Acquire);
                        found
                    }
                };
                self.to_answer.push((source, Update::Answer { token, value }));
            }
            Update::Answer { token, value } => {
                if let Some(answer) = self.answers.get_mut(&token) {
                    *answer = Some(value);
                }
            }
        }
        Ok(())
    }

    /// Sends what waits for `to` as far as credit and the card let it pass; says whether anything has left.
    fn flush(&mut self, to: usize) -> bool {
        let sent = self.post_all(to);
        if let Some(peer) = &mut self.peers[to] {
            let is = peer.is_held_up();
            self.held_up = self.held_up + usize::from(is) - usize::from(std::mem::replace(&mut peer.held_up, is));
        }
        match sent {
            Ok(sent) => sent,
            Err(err) => {
                self.give_up(Trouble::Lost { rank: to, why: err.to_string() });
                true
            }
        }
    }

    fn post_all(&mut self, to: usize) -> Result<bool> {
        let State { endpoint, rank, peers, staging, parts, .. } = self;
        let (me, staged, most) = (*rank, staging.1, endpoint.most_parts());
        let Some(peer) = &mut peers[to] else { return Ok(false) };
        // Before its set-up is through, nothing leaves.
        let Some(records) = peer.records else { return Ok(false) };
        let mut sent = false;
        loop {
            let ended = peer.batches.front().map_or(u64::MAX, |(record, _)| record.number());
            let number = peer.puts.front().map_or(ended, |(of, ..)| ended.min(*of));
            if number > peer.taken + RECORDS {
                break;
            }
            // What nobody asks about goes together; the last of it with the record.
            let is_ended = number == ended;
            loop {
                let mut of_batch = peer.puts.iter().take_while(|(of, ..)| *of == number);
                let together = of_batch.clone().take_while(|(.., departure)| is_ended && departure.is_none());
                parts.clear();
                parts.extend(together.take(most).map(|(_, put, _)| put.part()));
                if is_ended && parts.len() < most && of_batch.nth(parts.len()).is_none() {
                    break;
                }
                let posted = match parts.is_empty() {
                    true => {
                        let Some((_, put, departure)) = peer.puts.front().filter(|(of, ..)| *of == number) else {
                            break;
                        };
                        let Part { from, into } = put.part();
                        let token = departure.map(|Departure(token)| token);
                        endpoint.put(to, from, into, immediate(DATA, me, number), token)?
                    }
                    false => endpoint.put_parts(to, parts, immediate(DATA, me, number))?,
                };
                if posted == Posted::Full {
                    return Ok(sent);
                }
                peer.take_out(parts.len().max(1), parts.len().saturating_sub(1));
                sent = true;
            }
            // An open batch has no record yet.
            let Some((record, puts)) = peer.batches.front_mut().filter(|(record, _)| record.number() == number) else {
                break;
            };
            let slot = (number % RECORDS) as usize * RECORD_BYTES;
            let at = to * RING + slot;
            let bytes = record.finish(*puts - parts.len() as u32, peer.applied);
            staging.0.write(at, bytes);
            parts.push(Part { from: (staged, at..at + bytes.len()), into: (records, slot) });
            if endpoint.put_parts(to, parts, immediate(RECORD, me, number))? == Posted::Full {
                return Ok(sent);
            }
            peer.take_out(parts.len() - 1, 0);
            peer.told = peer.applied;
            peer.moved.records += 1;
            peer.batches.pop_front();
            sent = true;
        }
        for (kind, number) in [(TOLD, peer.applied), (ASKS, peer.asked)] {
            // A number that is asked for is within the credit that was given, as one in flight.
            let due = if kind == TOLD { peer.owes_word() } else { peer.asking && peer.asked <= peer.left() };
            if due {
                let from = (staged, 0..0);
                if endpoint.put(to, from, (records, 0), immediate(kind, me, number), None)? == Posted::Full {
                    break;
                }
                match kind {
                    TOLD => peer.told = peer.applied,
                    _ => peer.asking = false,
                }
                sent = true;
            }
        }
        Ok(sent)
    }
}
