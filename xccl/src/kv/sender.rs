//! The side that has computed the pages: a prefill rank.

use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use super::config::{KvConfig, PageLayout, PagePair};
use super::layout::{Closed, HEAD_WORDS, Mailbox, Signals, word};
use super::setup::{self, Control, Role, Seldom};
use super::ticket::KvTicket;
use crate::comm::Communicator;
use crate::comm::inner::{Call, CommInner};
use crate::error::{Error, Result};
use crate::onesided::Remote;
use crate::sync::progress::{Operation, Waiting};
use crate::sync::signal::Update;

const DURING: Operation = Operation::KvSend;

/// Pages of requests from so many bytes on are copied past the caches, which would not keep them until they are read: 128 MiB took
/// 6.1 ms so and 6.7 through the caches, 32 MiB 1.63 and 1.77, 16 MiB 0.63 and 0.68, but 8 MiB 0.22 and 0.155.
const STREAMING_REQUEST: usize = 32 << 20;

/// Sends pages of a KV cache into the pools of [`KvReceiver`](super::KvReceiver)s: see there for an example.
///
/// The engine takes requests as receivers post them ([`poll`](Self::poll)) and pushes pages as it has computed them, layer by
/// layer in any order, each layer in one piece or in several. It can write to posted pages only. A request is over when the
/// last page of the last layer was pushed, when either rank cancels it, or when its receiver has died.
///
/// Dropping it cancels what is in flight and never blocks.
pub struct KvSender {
    comm: Arc<CommInner>,
    config: KvConfig,
    layout: PageLayout,
    control: Control,
    mailbox: Mailbox,
    signals: Signals,
    /// By rank; `None` for those that are no receivers.
    receivers: Vec<Option<Receiver>>,
    /// Receiver and slot of each request in flight, in no particular order.
    in_flight: Vec<(usize, usize)>,
    /// Where poll goes on looking.
    next: usize,
    seldom: Seldom,
}

struct Receiver {
    signals: Remote,
    pool: Remote,
    layout: PageLayout,
    /// The number of the last request taken.
    taken: u64,
    slots: Vec<Slot>,
    /// That it has gone was told.
    has_gone: bool,
    /// It has posted nonsense: nothing more is taken from it.
    is_broken: bool,
}

/// What a sender keeps of a request: in private memory, where no receiver changes it any more.
#[derive(Default)]
struct Slot {
    /// 0 when there is none.
    number: u64,
    id: u64,
    pages: Vec<u32>,
    last_page_bytes: usize,
    /// The pages in ascending order, to find one.
    sorted: Vec<u32>,
    /// By layer and place in `sorted`, a bit: pushed already.
    pushed: Vec<u64>,
    /// By layer, pages that are still to be pushed; [`TOLD`] when the layer is complete.
    lacking: Vec<u32>,
    /// Layers that are not complete.
    layers: usize,
}

const TOLD: u32 = u32::MAX;

/// A request that a receiver has posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvPosted {
    /// Names it in later calls.
    pub ticket: KvTicket,
    /// The application's id.
    pub id: u64,
    /// Its receiver.
    pub to: usize,
    /// Number of its pages: [`KvSender::pages`] lists them.
    pub pages: usize,
    /// Bytes of the last page that are wanted.
    pub last_page_bytes: usize,
}

/// A request that was posted without a slot.
fn nameless(to: usize, number: u64) -> KvPosted {
    KvPosted { ticket: KvTicket::new(to, 0, number), id: 0, to, pages: 0, last_page_bytes: 0 }
}

/// What a sender is told.
#[derive(Debug)]
pub enum KvSenderEvent {
    /// A receiver waits for these pages.
    Posted(KvPosted),
    /// A receiver has cancelled a request that was posted: it is over.
    Cancelled(KvPosted),
    /// A request is over because its receiver died, left, or has posted nonsense. One event for each.
    Failed(KvPosted, Error),
    /// A receiver died, left, or was dropped: it will post nothing any more. Told once, after the end of all its requests.
    Gone(usize, Error),
}

impl KvSender {
    /// Makes this rank a sender, whose pages lie as `layout` says in the memory that [`push`](Self::push) is given. Every rank of
    /// the communicator must make a sender or a [`KvReceiver`](super::KvReceiver) at the same time: see there. Blocks until all
    /// have, or the deadline.
    ///
    /// # Errors
    /// As [`KvReceiver::new`](super::KvReceiver::new).
    pub fn new(comm: &Communicator, config: KvConfig, layout: PageLayout) -> Result<Self> {
        config.check()?;
        let comm = comm.inner.clone();
        let (mailbox, signals) = (Mailbox::new(&config), Signals::new(&config));
        let prepared = layout
            .check(&config, isize::MAX as usize)
            .and_then(|()| Control::new(&comm, mailbox.bytes.saturating_mul(comm.world_size)));
        let role = prepared.as_ref().map(|control| Role::Sender { mailboxes: control.remote().offset });
        let roles = setup::meet(&comm, &config, role)?;
        let control = prepared?;
        let of = |(rank, role): (usize, &Role)| match *role {
            Role::Sender { .. } => Ok(None),
            Role::Receiver { signals: at, pool, layout } => {
                let bytes = layout.bytes(&config).ok_or(Error::Corrupt {
                    rank,
                    what: "the layout of its pool of pages",
                    value: layout.pages as u64,
                    limit: 0,
                })?;
                let slots = (0..config.max_requests).map(|_| Slot::default()).collect();
                let signals = setup::part(rank, at, signals.bytes, comm.rank);
                let pool = Remote { rank, offset: pool, bytes };
                Ok(Some(Receiver { signals, pool, layout, taken: 0, slots, has_gone: false, is_broken: false }))
            }
        };
        let receivers = roles.iter().enumerate().map(of).collect::<Result<Vec<_>>>()?;
        let most = receivers.iter().flatten().count() * config.max_requests;
        Ok(KvSender {
            in_flight: Vec::with_capacity(most),
            next: 0,
            seldom: Seldom::new(),
            comm,
            config,
            layout,
            control,
            mailbox,
            signals,
            receivers,
        })
    }

    /// Where the pages that it sends lie.
    pub fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// Requests in flight: taken by [`poll`](Self::poll) and not over.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The receiver's pages of a request, in its order.
    ///
    /// # Errors
    /// [`Error::WrongOrder`] for a request that is over.
    pub fn pages(&self, request: KvTicket) -> Result<&[u32]> {
        self.check("pages", request)?;
        Ok(self.slot(request.peer(), request.slot()).map_or(&[], |slot| &slot.pages))
    }

    /// What has happened, if anything has that was not told yet: a request was posted or cancelled, or a receiver is gone. Does
    /// not block. The end of a receiver's process is noticed within some milliseconds.
    ///
    /// # Errors
    /// [`Error::Aborted`].
    pub fn poll(&mut self) -> Result<Option<KvSenderEvent>> {
        self.comm.look_around();
        for to in 0..self.receivers.len() {
            if let Some(event) = self.take_posted(to)? {
                return Ok(Some(event));
            }
        }
        let asks_kernel = self.seldom.is_time();
        for _ in 0..self.in_flight.len() {
            self.next = (self.next + 1) % self.in_flight.len();
            let (to, slot) = self.in_flight[self.next];
            if let Some(event) = self.look_at(to, slot, asks_kernel)? {
                return Ok(Some(event));
            }
        }
        if asks_kernel { self.gone() } else { Ok(None) }
    }

    /// A receiver that has gone, and has no requests here any more.
    fn gone(&mut self) -> Result<Option<KvSenderEvent>> {
        for to in 0..self.receivers.len() {
            let is_known = self.receivers[to].as_ref().is_none_or(|receiver| receiver.has_gone);
            if is_known || self.in_flight.iter().any(|&(other, _)| other == to) {
                continue;
            }
            match self.comm.check_partner_lives(to, DURING).and_then(|()| self.check_gone(to)) {
                Ok(()) => {}
                Err(err @ Error::Aborted { .. }) => return Err(err),
                Err(err) => {
                    if let Some(receiver) = &mut self.receivers[to] {
                        receiver.has_gone = true;
                    }
                    return Ok(Some(KvSenderEvent::Gone(to, err)));
                }
            }
        }
        Ok(None)
    }

    /// Waits for something to happen. Blocks up to the deadline; sleeps after a while.
    ///
    /// # Errors
    /// [`Error::Aborted`]; [`Error::Timeout`], after which it may be called again.
    pub fn wait(&mut self) -> Result<KvSenderEvent> {
        let comm = self.comm.clone();
        let what = Waiting { operation: DURING, epoch: 0, peer: None };
        comm.wait_in(&mut Call::default(), what, || self.poll().transpose())?
    }

    /// Takes the next request of a receiver.
    fn take_posted(&mut self, to: usize) -> Result<Option<KvSenderEvent>> {
        loop {
            let Some(receiver) = &self.receivers[to] else { return Ok(None) };
            let number = receiver.taken + 1;
            let posted = self.own(to, self.mailbox.posted);
            if posted < number || receiver.is_broken {
                return Ok(None);
            }
            // It posts no more than it has slots for: from a wilder number there would be no end of requests.
            if posted - receiver.taken > self.config.max_requests as u64 {
                if let Some(receiver) = &mut self.receivers[to] {
                    receiver.is_broken = true;
                }
                return Ok(Some(KvSenderEvent::Failed(nameless(to, number), self.corrupt(to, posted))));
            }
            self.comm.check_partner(to, DURING).or_else(only_aborted)?;
            // A receiver posts to slots that are free here, too: it frees one after this rank has.
            let free = |&slot: &usize| receiver.slots[slot].number == 0;
            let slot = (0..receiver.slots.len()).filter(free).find(|&slot| self.head(to, slot)[0] == number);
            let outcome = slot.map(|slot| self.copy_out(to, slot));
            if let Some(receiver) = &mut self.receivers[to] {
                receiver.taken = number;
            }
            let Some((slot, outcome)) = slot.zip(outcome) else {
                // Nobody can be told the end of a request without a slot.
                return Ok(Some(KvSenderEvent::Failed(nameless(to, number), self.corrupt(to, number))));
            };
            self.in_flight.push((to, slot));
            let posted = self.posted(to, slot);
            if let Err(err) = outcome {
                self.end(to, slot, Closed::Cancelled)?;
                return Ok(Some(KvSenderEvent::Failed(posted, err)));
            }
            if self.is_cancelled(to, slot) {
                // Before anyone here has heard of it.
                self.end(to, slot, Closed::Cancelled)?;
                continue;
            }
            return Ok(Some(KvSenderEvent::Posted(posted)));
        }
    }

    /// Copies a posted request into private memory, and checks it.
    fn copy_out(&mut self, to: usize, at: usize) -> Result<()> {
        let [number, id, count, last_page_bytes] = self.head(to, at);
        let (layers, most) = (self.config.layers, self.config.max_pages);
        let list = self.mine(to).skip(self.mailbox.pages(at));
        let corrupt =
            |what, value: u64, limit: usize| Err(Error::Corrupt { rank: to, what, value, limit: limit as u64 });
        let Some(receiver) = &mut self.receivers[to] else { return Ok(()) };
        let (pool, slot) = (receiver.layout.pages, &mut receiver.slots[at]);
        slot.pages.clear();
        slot.sorted.clear();
        (slot.number, slot.id, slot.last_page_bytes, slot.layers) = (number, id, last_page_bytes as usize, layers);
        slot.lacking.clear();
        if count > most as u64 {
            return corrupt("the number of pages of a request", count, most);
        }
        if count > 0 && !(1..=self.config.page_bytes as u64).contains(&last_page_bytes) {
            return corrupt("the bytes of a request's last page", last_page_bytes, self.config.page_bytes);
        }
        let count = count as usize;
        slot.pages.resize(count, 0);
        self.comm.get(list, bytemuck::cast_slice_mut(&mut slot.pages))?;
        if let Some(&page) = slot.pages.iter().find(|&&page| page as usize >= pool) {
            return corrupt("a page of a request", page.into(), pool.saturating_sub(1));
        }
        slot.sorted.extend_from_slice(&slot.pages);
        slot.sorted.sort_unstable();
        if let Some(twice) = slot.sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return corrupt("a page of a request twice", twice[0].into(), 1);
        }
        slot.lacking.resize(layers, count as u32);
        slot.pushed.clear();
        slot.pushed.resize(layers * count.div_ceil(64), 0);
        Ok(())
    }

    /// Whether a request in flight has ended without its sender's doing.
    fn look_at(&mut self, to: usize, slot: usize, asks_kernel: bool) -> Result<Option<KvSenderEvent>> {
        let posted = self.posted(to, slot);
        let partner = match asks_kernel {
            true => self.comm.check_partner_lives(to, DURING),
            false => self.comm.check_partner(to, DURING),
        };
        match partner.and_then(|()| self.check_gone(to)) {
            Ok(()) if self.is_cancelled(to, slot) => {
                self.end(to, slot, Closed::Cancelled)?;
                Ok(Some(KvSenderEvent::Cancelled(posted)))
            }
            Ok(()) => Ok(None),
            Err(err @ Error::Aborted { .. }) => Err(err),
            Err(err) => {
                self.end(to, slot, Closed::Cancelled)?;
                Ok(Some(KvSenderEvent::Failed(posted, err)))
            }
        }
    }

    /// Copies pages of a layer from `pool`, this rank's pages, to the receiver: each from the pair's source, here, to its destination,
    /// there. Tells the receiver when the layer is complete with them; also of a request without pages every layer has
    /// to be pushed. Says whether the whole request is complete, and over. `pool` may be reused when it returns; which does not
    /// block on a receiver of this machine. To another node, pages that lie in the symmetric heap
    /// ([`Communicator::heap_alloc`]) leave without a copy.
    ///
    /// # Errors
    /// [`Error::KvPage`] for a page that is not the request's, was pushed already, or does not exist here, [`Error::Shape`] for a
    /// layer that is none or a pool that is too short: nothing was moved then. [`Error::KvCancelled`], [`Error::PeerLeft`],
    /// [`Error::PeerDied`], and towards another node [`Error::Timeout`] and the like: the request is over, and `poll` does not tell of
    /// it again. [`Error::WrongOrder`] for one that is over
    /// already, [`Error::Aborted`].
    pub fn push(&mut self, request: KvTicket, layer: usize, pool: &[u8], pages: &[PagePair]) -> Result<bool> {
        self.check("push", request)?;
        let (to, at) = (request.peer(), request.slot());
        let asks_kernel = self.seldom.is_time();
        if let Some(event) = self.look_at(to, at, asks_kernel)? {
            return Err(match event {
                KvSenderEvent::Failed(_, err) | KvSenderEvent::Gone(_, err) => err,
                KvSenderEvent::Cancelled(posted) | KvSenderEvent::Posted(posted) => {
                    Error::KvCancelled { rank: to, id: posted.id }
                }
            });
        }
        self.mark(to, at, layer, pool, pages)?;
        if let Err(err) = self.copy(to, at, layer, pool, pages) {
            // Some may have been moved, and some not.
            self.end(to, at, Closed::Cancelled)?;
            return Err(err);
        }
        self.tell(to, at, layer)
    }

    /// Checks all pairs, and marks the receiver's pages as pushed; none when one is wrong.
    fn mark(&mut self, to: usize, at: usize, layer: usize, pool: &[u8], pages: &[PagePair]) -> Result<()> {
        let (config, layout) = (self.config, self.layout);
        if layer >= config.layers {
            let expected = format!("at most {}", config.layers - 1);
            return Err(Error::Shape { what: "the layer's number", given: layer, expected });
        }
        let bytes = layout.bytes(&config).unwrap_or(usize::MAX);
        if pool.len() < bytes && !pages.is_empty() {
            let expected = format!("at least {bytes}, as its layout says");
            return Err(Error::Shape { what: "the pool of pages", given: pool.len(), expected });
        }
        let Some(slot) = self.receivers[to].as_mut().map(|receiver| &mut receiver.slots[at]) else { return Ok(()) };
        if slot.lacking[layer] == TOLD {
            let expected = "a layer that is not complete yet";
            return Err(Error::WrongOrder { call: "push", epoch: slot.number, expected });
        }
        let first = layer * slot.pages.len().div_ceil(64);
        let bit = |place: usize| (first + place / 64, 1u64 << (place % 64));
        let mut marked = 0;
        let wrong = pages.iter().find_map(|&PagePair { source, destination: page }| {
            if source as usize >= layout.pages {
                return Some((source, "does not exist among this rank's pages"));
            }
            let Ok(place) = slot.sorted.binary_search(&page) else {
                return Some((page, "is none that the receiver has posted for it"));
            };
            let (word, bit) = bit(place);
            if slot.pushed[word] & bit != 0 {
                return Some((page, "has been pushed for this layer already"));
            }
            slot.pushed[word] |= bit;
            marked += 1;
            None
        });
        let Some((page, why)) = wrong else {
            slot.lacking[layer] -= pages.len() as u32;
            return Ok(());
        };
        for pair in &pages[..marked] {
            if let Ok(place) = slot.sorted.binary_search(&pair.destination) {
                let (word, bit) = bit(place);
                slot.pushed[word] &= !bit;
            }
        }
        Err(Error::KvPage { rank: to, id: slot.id, page, why })
    }

    fn copy(&self, to: usize, at: usize, layer: usize, pool: &[u8], pages: &[PagePair]) -> Result<()> {
        let Some(receiver) = &self.receivers[to] else { return Ok(()) };
        let slot = &receiver.slots[at];
        let (last, whole) = (slot.pages.last().copied(), self.config.page_bytes);
        let pieces = pages.iter().map(|&PagePair { source, destination: page }| {
            let bytes = if Some(page) == last { slot.last_page_bytes } else { whole };
            let from = self.layout.at(layer, source as usize);
            (receiver.layout.at(layer, page as usize), &pool[from..from + bytes])
        });
        let past_caches = slot.pages.len().saturating_mul(self.config.layers * whole) >= STREAMING_REQUEST;
        self.comm.put_pieces(receiver.pool, past_caches, pieces, DURING)
    }

    /// Tells the receiver what is complete.
    fn tell(&mut self, to: usize, at: usize, layer: usize) -> Result<bool> {
        let Some(receiver) = &mut self.receivers[to] else { return Ok(false) };
        let slot = &mut receiver.slots[at];
        if slot.lacking[layer] > 0 {
            return Ok(false);
        }
        slot.lacking[layer] = TOLD;
        slot.layers -= 1;
        let (is_last, number) = (slot.layers == 0, slot.number);
        self.comm.signal(word(receiver.signals, self.signals.layer(at, layer)), Update::Set(number))?;
        if is_last {
            self.end(to, at, Closed::Done)?;
        }
        Ok(is_last)
    }

    /// Gives a request up: the receiver gets its pages back. Does not block.
    ///
    /// # Errors
    /// [`Error::WrongOrder`] for a request that is over; [`Error::Aborted`].
    pub fn cancel(&mut self, request: KvTicket) -> Result<()> {
        self.check("cancel", request)?;
        self.end(request.peer(), request.slot(), Closed::Cancelled)
    }

    /// Ends a request, and tells its receiver, if that can still be told.
    fn end(&mut self, to: usize, at: usize, closed: Closed) -> Result<()> {
        self.in_flight.retain(|&in_flight| in_flight != (to, at));
        let Some(receiver) = &mut self.receivers[to] else { return Ok(()) };
        let number = std::mem::take(&mut receiver.slots[at].number);
        let signal = word(receiver.signals, self.signals.closed(at));
        self.comm.signal(signal, Update::Set(closed.word(number))).or_else(only_aborted)
    }

    fn check(&self, call: &'static str, request: KvTicket) -> Result<()> {
        let number = request.number();
        match self.slot(request.peer(), request.slot()) {
            Some(slot) if number != 0 && slot.number == number => Ok(()),
            _ => Err(Error::WrongOrder { call, epoch: number, expected: "a request that is in flight: it is over" }),
        }
    }

    fn slot(&self, to: usize, at: usize) -> Option<&Slot> {
        self.receivers.get(to)?.as_ref()?.slots.get(at)
    }

    fn posted(&self, to: usize, at: usize) -> KvPosted {
        let (number, id, pages, last_page_bytes) = self
            .slot(to, at)
            .map_or((0, 0, 0, 0), |slot| (slot.number, slot.id, slot.pages.len(), slot.last_page_bytes));
        KvPosted { ticket: KvTicket::new(to, at, number), id, to, pages, last_page_bytes }
    }

    fn is_cancelled(&self, to: usize, at: usize) -> bool {
        let number = self.slot(to, at).map_or(0, |slot| slot.number);
        self.own(to, self.mailbox.cancelled(at)) == number
    }

    fn check_gone(&self, to: usize) -> Result<()> {
        match self.own(to, self.mailbox.gone) {
            0 => Ok(()),
            _ => Err(Error::PeerLeft { rank: to, during: DURING, epoch: 0 }),
        }
    }

    /// What the receiver has written into a slot.
    fn head(&self, to: usize, at: usize) -> [u64; HEAD_WORDS] {
        let request = self.mailbox.request(at);
        std::array::from_fn(|i| self.own(to, request + i * 8))
    }

    /// The mailbox of a receiver.
    fn mine(&self, to: usize) -> Remote {
        setup::part(self.comm.rank, self.control.remote().offset, self.mailbox.bytes, to)
    }

    /// A word that a receiver has written.
    fn own(&self, to: usize, offset: usize) -> u64 {
        self.comm.own_word(self.mine(to).skip(offset).offset).load(Acquire)
    }

    fn corrupt(&self, rank: usize, number: u64) -> Error {
        Error::Corrupt { rank, what: "the number of a KV request without a slot", value: number, limit: number - 1 }
    }
}

/// A peer that is gone need not be told anything, and will be noticed elsewhere.
fn only_aborted(err: Error) -> Result<()> {
    match err {
        Error::PeerDied { .. } | Error::PeerLeft { .. } | Error::PeerUnreachable { .. } => Ok(()),
        other => Err(other),
    }
}

impl Drop for KvSender {
    fn drop(&mut self) {
        while let Some(&(to, at)) = self.in_flight.last() {
            let _ = self.end(to, at, Closed::Cancelled);
        }
        // What was posted and not taken ends by this, too.
        for receiver in self.receivers.iter().flatten() {
            let _ = self.comm.signal(word(receiver.signals, self.signals.gone), Update::Set(1));
        }
    }
}
