//! The side that has the pages: a decode rank.

use std::sync::Arc;
use std::sync::atomic::Ordering::Acquire;

use super::config::{KvConfig, PageLayout};
use super::layout::{Closed, Mailbox, Signals, word};
use super::setup::{self, Control, Role, Seldom};
use super::ticket::{KvTicket, MAX_NUMBER};
use crate::comm::Communicator;
use crate::comm::inner::{Call, CommInner};
use crate::error::{Error, Result};
use crate::onesided::{Remote, SharedBuffer};
use crate::sync::progress::{Operation, Waiting};
use crate::sync::signal::Update;

const DURING: Operation = Operation::KvRecv;

/// Receives pages of a KV cache into a pool in this rank's shared memory.
///
/// The engine posts a request: which sender is to fill which pages. It may look for each layer
/// ([`layer_ready`](Self::layer_ready)) and start to decode with the first while the last are still on their way; the request
/// and its pages are the engine's again when [`poll`](Self::poll) has told of its end. Between the two, nobody reads or writes
/// pages of layers that are not ready.
///
/// Dropping it cancels what is in flight and never blocks; a pool that a sender may still write to stays allocated then.
///
/// ```
/// use xccl::{Communicator, Config, KvConfig, KvOutcome, KvReceiver, KvSender, KvSenderEvent, PageLayout, UniqueId};
///
/// fn rank(rank: usize, id: &UniqueId) -> xccl::Result<()> {
///     let comm = Communicator::init(rank, 2, id, Config::default())?;
///     let config = KvConfig::new(2, 4096); // layers, bytes of a page
///     if rank == 0 {
///         let cache = vec![7u8; 2 * 10 * 4096]; // what this rank has computed: 10 pages
///         let mut sender = KvSender::new(&comm, config, PageLayout::by_layer(&config, 10))?;
///         let KvSenderEvent::Posted(request) = sender.wait()? else { panic!("nothing else can come") };
///         for layer in 0..2 {
///             sender.push(request.ticket, layer, &cache, &[(4, 0).into(), (9, 3).into()])?; // own page, the receiver's page
///         }
///     } else {
///         let layout = PageLayout::by_layer(&config, 8);
///         let mut receiver = KvReceiver::new(&comm, config, comm.shared_alloc(2 * 8 * 4096)?, layout)?;
///         let request = receiver.post(0, 42, &[0, 3], 4096)?.expect("nothing is in flight");
///         receiver.wait_layer(request, 0)?;
///         let mut page = [0; 4096];
///         receiver.read_page(0, 3, &mut page)?;
///         assert_eq!(page, [7; 4096]);
///         let end = receiver.wait()?;
///         assert!(end.id == 42 && matches!(end.outcome, KvOutcome::Done));
///     }
///     Ok(())
/// }
///
/// let id = UniqueId::new().unwrap();
/// std::thread::scope(|s| {
///     let other = s.spawn(|| rank(0, &id));
///     rank(1, &id).unwrap();
///     other.join().unwrap().unwrap();
/// });
/// ```
pub struct KvReceiver {
    comm: Arc<CommInner>,
    config: KvConfig,
    layout: PageLayout,
    pool: Arc<SharedBuffer>,
    control: Control,
    mailbox: Mailbox,
    signals: Signals,
    /// By rank; `None` for those that are no senders.
    senders: Vec<Option<Sender>>,
    /// Sender and slot of each request in flight, in no particular order.
    in_flight: Vec<(usize, usize)>,
    /// Where poll goes on looking.
    next: usize,
    /// By page, whether a request has it.
    busy: Vec<bool>,
    /// What is put into a mailbox.
    letter: Vec<u8>,
    seldom: Seldom,
}

struct Sender {
    mailbox: Remote,
    /// The number of the last request posted.
    posted: u64,
    slots: Vec<Slot>,
}

#[derive(Default)]
struct Slot {
    /// 0 when there is none.
    number: u64,
    id: u64,
    pages: Vec<u32>,
}

/// The end of a request: its pages are the engine's again, and may be posted for another one.
#[derive(Debug)]
pub struct KvEvent {
    /// The request. It is over.
    pub ticket: KvTicket,
    /// Its id.
    pub id: u64,
    /// Its sender.
    pub from: usize,
    /// How it ended.
    pub outcome: KvOutcome,
}

/// How a request ended for its receiver.
#[derive(Debug)]
pub enum KvOutcome {
    /// All its pages have come.
    Done,
    /// One of the two ranks has cancelled it; its pages hold anything.
    Cancelled,
    /// Its sender has died or left; its pages hold anything. Or its sender's words make no sense ([`Error::Corrupt`]): then its
    /// pages cannot be posted again, for that process may still write there.
    Failed(Error),
}

impl KvReceiver {
    /// Makes this rank a receiver with a pool of pages. Every rank of the communicator must make a receiver or a
    /// [`KvSender`](super::KvSender) at the same time, with the same configuration; a rank that is neither belongs in another
    /// communicator ([`Communicator::split`]). Blocks until all have, or the deadline.
    ///
    /// # Errors
    /// [`Error::Config`] for a configuration or a layout that cannot be, or does not fit the pool, and where the pool is another
    /// communicator's; [`Error::HeapExhausted`]; [`Error::Mismatch`] when a rank's configuration differs; those of joining.
    pub fn new(
        comm: &Communicator,
        config: KvConfig,
        pool: impl Into<Arc<SharedBuffer>>,
        layout: PageLayout,
    ) -> Result<Self> {
        config.check()?;
        let (comm, pool) = (comm.inner.clone(), pool.into());
        let (mailbox, signals) = (Mailbox::new(&config), Signals::new(&config));
        let prepared = Self::prepare(&comm, &config, &pool, &layout, signals.bytes);
        let role = prepared.as_ref().map(|control| Role::Receiver {
            signals: control.remote().offset,
            pool: pool.remote().offset,
            layout,
        });
        let roles = setup::meet(&comm, &config, role)?;
        let control = prepared?;
        let of = |(rank, role): (usize, &Role)| match *role {
            Role::Receiver { .. } => None,
            Role::Sender { mailboxes } => {
                let slots = (0..config.max_requests).map(|_| Slot::default()).collect();
                Some(Sender { mailbox: setup::part(rank, mailboxes, mailbox.bytes, comm.rank), posted: 0, slots })
            }
        };
        let senders: Vec<_> = roles.iter().enumerate().map(of).collect();
        let most = senders.iter().flatten().count() * config.max_requests;
        Ok(KvReceiver {
            busy: vec![false; layout.pages],
            in_flight: Vec::with_capacity(most),
            next: 0,
            letter: Vec::with_capacity(mailbox.bytes),
            seldom: Seldom::new(),
            pool,
            comm,
            config,
            layout,
            control,
            mailbox,
            signals,
            senders,
        })
    }

    fn prepare(
        comm: &Arc<CommInner>,
        config: &KvConfig,
        pool: &SharedBuffer,
        layout: &PageLayout,
        signals: usize,
    ) -> Result<Control> {
        layout.check(config, pool.len())?;
        if !pool.is_of(comm) {
            let value = format!("{:?}", pool.remote());
            let expected = "a block of the same communicator".to_owned();
            return Err(Error::Config { option: "the pool", value, expected });
        }
        Control::new(comm, signals.saturating_mul(comm.world_size))
    }

    /// The pool. Of its pages, those of ready layers may be read in place ([`SharedBuffer::as_slice`] says under which
    /// conditions), and those of no request may be used for anything.
    pub fn pool(&self) -> &Arc<SharedBuffer> {
        &self.pool
    }

    /// Where its pages lie.
    pub fn layout(&self) -> &PageLayout {
        &self.layout
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Copies a page of a layer out of the pool, or as much of it as `to` has room for.
    ///
    /// # Errors
    /// [`Error::Shape`] for a layer, a page or a length that is none.
    pub fn read_page(&self, layer: usize, page: u32, to: &mut [u8]) -> Result<()> {
        let shape = |what, given, limit: usize| Error::Shape { what, given, expected: format!("at most {limit}") };
        if layer >= self.config.layers {
            return Err(shape("the layer's number", layer, self.config.layers - 1));
        }
        if page as usize >= self.layout.pages {
            return Err(shape("the page's number", page as usize, self.layout.pages.saturating_sub(1)));
        }
        if to.len() > self.config.page_bytes {
            return Err(shape("the buffer for a page", to.len(), self.config.page_bytes));
        }
        self.pool.read(self.layout.at(layer, page as usize), to)
    }

    /// Asks a sender to fill pages for the request `id`, which is the application's: of the last page the first `last_page_bytes`
    /// bytes, of the others all. `None` when as many requests as may be ([`KvConfig::max_requests`]) are in flight from that
    /// sender: poll, and post again. Does not block.
    ///
    /// # Errors
    /// [`Error::KvRole`] when `from` is no sender; [`Error::Shape`] for too many pages, or a last page of 0 bytes or more than a
    /// page; [`Error::KvPage`] for a page that is none, is listed twice, or has a request; [`Error::PeerDied`],
    /// [`Error::PeerLeft`], [`Error::Aborted`]. Nothing is posted then.
    pub fn post(&mut self, from: usize, id: u64, pages: &[u32], last_page_bytes: usize) -> Result<Option<KvTicket>> {
        self.check_post(from, id, pages, last_page_bytes)?;
        let Some(sender) = self.senders[from].as_mut() else {
            return Err(Error::KvRole { rank: from, expected: "sender" });
        };
        let Some(slot) = sender.slots.iter().position(|slot| slot.number == 0) else { return Ok(None) };
        let number = sender.posted + 1;
        if number > MAX_NUMBER {
            return Ok(None);
        }
        self.letter.clear();
        for head in [number, id, pages.len() as u64, last_page_bytes as u64] {
            self.letter.extend_from_slice(&head.to_le_bytes());
        }
        pages.iter().for_each(|page| self.letter.extend_from_slice(&page.to_le_bytes()));
        let posted = word(sender.mailbox, self.mailbox.posted);
        let to = sender.mailbox.skip(self.mailbox.request(slot));
        self.comm.put_signal(to, &self.letter, posted, Update::Set(number))?;
        sender.posted = number;
        let taken = &mut sender.slots[slot];
        (taken.number, taken.id) = (number, id);
        taken.pages.clear();
        taken.pages.extend_from_slice(pages);
        pages.iter().for_each(|&page| self.busy[page as usize] = true);
        self.in_flight.push((from, slot));
        Ok(Some(KvTicket::new(from, slot, number)))
    }

    fn check_post(&mut self, from: usize, id: u64, pages: &[u32], last_page_bytes: usize) -> Result<()> {
        self.comm.check_rank(from)?;
        if self.senders[from].is_none() {
            return Err(Error::KvRole { rank: from, expected: "sender" });
        }
        if pages.len() > self.config.max_pages {
            let expected = format!("at most {} (KvConfig::max_pages)", self.config.max_pages);
            return Err(Error::Shape { what: "the list of pages", given: pages.len(), expected });
        }
        if !pages.is_empty() && !(1..=self.config.page_bytes).contains(&last_page_bytes) {
            let expected = format!("1 to {}, a page", self.config.page_bytes);
            return Err(Error::Shape { what: "the last page", given: last_page_bytes, expected });
        }
        let mut marked = 0;
        let wrong = pages.iter().find_map(|&page| match self.busy.get_mut(page as usize) {
            None => Some((page, "does not exist: it is beyond the pool")),
            // One of another request, or of this one.
            Some(true) => {
                Some((page, "belongs to a request in flight, or is listed twice: poll until its request is over"))
            }
            Some(busy) => {
                *busy = true;
                marked += 1;
                None
            }
        });
        pages[..marked].iter().for_each(|&page| self.busy[page as usize] = false);
        if let Some((page, why)) = wrong {
            return Err(Error::KvPage { rank: from, id, page, why });
        }
        if self.has_gone(from) {
            return Err(Error::PeerLeft { rank: from, during: DURING, epoch: 0 });
        }
        self.comm.check_partner(from, DURING)
    }

    /// Whether a layer of a request is complete: its pages may be read. Does not block.
    ///
    /// # Errors
    /// [`Error::WrongOrder`] for a request that is over, [`Error::Shape`] for a layer that is none; [`Error::KvCancelled`] when it
    /// will not come any more because one of the two has cancelled, [`Error::PeerLeft`] or [`Error::PeerDied`] (once this rank
    /// knows) because the sender has ended.
    pub fn layer_ready(&self, request: KvTicket, layer: usize) -> Result<bool> {
        self.comm.look_around();
        self.look_for("layer_ready", request, layer).and_then(|ready| {
            if !ready {
                self.comm.check_partner(request.peer(), DURING)?;
            }
            Ok(ready)
        })
    }

    /// Waits until a layer is complete. Blocks up to the deadline; sleeps after a while.
    ///
    /// # Errors
    /// As [`layer_ready`](Self::layer_ready), and [`Error::Timeout`], after which it may be called again.
    pub fn wait_layer(&self, request: KvTicket, layer: usize) -> Result<()> {
        let what = Waiting { operation: DURING, epoch: request.number(), peer: Some(request.peer()) };
        self.comm.wait(what, || match self.look_for("wait_layer", request, layer) {
            Ok(false) => None,
            Ok(true) => Some(Ok(())),
            Err(err) => Some(Err(err)),
        })?
    }

    fn look_for(&self, call: &'static str, request: KvTicket, layer: usize) -> Result<bool> {
        let slot = self.slot(call, request)?;
        if layer >= self.config.layers {
            let expected = format!("at most {}", self.config.layers - 1);
            return Err(Error::Shape { what: "the layer's number", given: layer, expected });
        }
        let (from, number) = (request.peer(), request.number());
        // The end is looked at first: a layer that came before it is then seen.
        let closed = Closed::of(self.own(from, self.signals.closed(request.slot())), number);
        let gone = self.has_gone(from);
        if self.own(from, self.signals.layer(request.slot(), layer)) == number {
            return Ok(true);
        }
        match closed {
            Ok(Some(Closed::Cancelled)) => Err(Error::KvCancelled { rank: from, id: slot.id }),
            Ok(_) if gone => Err(Error::PeerLeft { rank: from, during: DURING, epoch: number }),
            Ok(None) => Ok(false),
            // Over, and this layer has not come.
            Ok(Some(Closed::Done)) => Err(self.corrupt(from, number)),
            Err(value) => Err(self.corrupt(from, value)),
        }
    }

    /// Tells the sender to stop. The pages are free when [`poll`](Self::poll) has told of the request's end, which may still be
    /// [`KvOutcome::Done`]. Does not block.
    ///
    /// # Errors
    /// [`Error::WrongOrder`] for a request that is over; [`Error::Aborted`].
    pub fn cancel(&mut self, request: KvTicket) -> Result<()> {
        self.slot("cancel", request)?;
        self.tell_cancelled(request.peer(), request.slot(), request.number())
    }

    fn tell_cancelled(&self, from: usize, slot: usize, number: u64) -> Result<()> {
        let Some(sender) = &self.senders[from] else { return Ok(()) };
        match self.comm.signal(word(sender.mailbox, self.mailbox.cancelled(slot)), Update::Set(number)) {
            // Its end will be told by poll.
            Err(Error::PeerDied { .. } | Error::PeerLeft { .. } | Error::PeerUnreachable { .. }) => Ok(()),
            other => other,
        }
    }

    /// A request that has ended, if any has that was not told yet. Does not block. The end of a sender's process is noticed
    /// within some milliseconds.
    ///
    /// # Errors
    /// [`Error::Aborted`].
    pub fn poll(&mut self) -> Result<Option<KvEvent>> {
        self.comm.look_around();
        let asks_kernel = !self.in_flight.is_empty() && self.seldom.is_time();
        for _ in 0..self.in_flight.len() {
            self.next = (self.next + 1) % self.in_flight.len();
            let (from, slot) = self.in_flight[self.next];
            if let Some(outcome) = self.end_of(from, slot, asks_kernel)? {
                return Ok(Some(self.finish(outcome)));
            }
        }
        Ok(None)
    }

    /// Waits for a request to end. Blocks up to the deadline; sleeps after a while.
    ///
    /// # Errors
    /// [`Error::Aborted`], [`Error::Timeout`]; [`Error::WrongOrder`] when nothing is in flight.
    pub fn wait(&mut self) -> Result<KvEvent> {
        if self.in_flight.is_empty() {
            return Err(Error::WrongOrder { call: "wait", epoch: 0, expected: "a request that is in flight" });
        }
        let comm = self.comm.clone();
        let what = Waiting { operation: DURING, epoch: 0, peer: None };
        comm.wait_in(&mut Call::default(), what, || self.poll().transpose())?
    }

    /// How a request has ended, if it has.
    fn end_of(&self, from: usize, slot: usize, asks_kernel: bool) -> Result<Option<KvOutcome>> {
        let number = self.senders[from].as_ref().map_or(0, |sender| sender.slots[slot].number);
        // Before the words: what was written by who has ended since is then seen.
        let gone = self.has_gone(from);
        let partner = match asks_kernel {
            true => self.comm.check_partner_lives(from, DURING),
            false => self.comm.check_partner(from, DURING),
        };
        match Closed::of(self.own(from, self.signals.closed(slot)), number) {
            Ok(Some(Closed::Cancelled)) => return Ok(Some(KvOutcome::Cancelled)),
            Ok(Some(Closed::Done)) => {
                let layers = (0..self.config.layers).map(|layer| self.own(from, self.signals.layer(slot, layer)));
                return Ok(Some(match layers.into_iter().find(|&word| word != number) {
                    None => KvOutcome::Done,
                    Some(word) => KvOutcome::Failed(self.corrupt(from, word)),
                }));
            }
            Ok(None) if gone => return Ok(Some(KvOutcome::Cancelled)),
            Ok(None) => {}
            Err(value) => return Ok(Some(KvOutcome::Failed(self.corrupt(from, value)))),
        }
        match partner {
            Ok(()) => Ok(None),
            Err(err @ Error::Aborted { .. }) => Err(err),
            Err(err) => Ok(Some(KvOutcome::Failed(err))),
        }
    }

    /// Ends the request that was looked at last.
    fn finish(&mut self, outcome: KvOutcome) -> KvEvent {
        let (from, slot) = self.in_flight.swap_remove(self.next);
        let (mut number, mut id) = (0, 0);
        if let Some(sender) = &mut self.senders[from] {
            let ended = &mut sender.slots[slot];
            (number, id) = (std::mem::take(&mut ended.number), ended.id);
            if !matches!(outcome, KvOutcome::Failed(Error::Corrupt { .. })) {
                ended.pages.iter().for_each(|&page| self.busy[page as usize] = false);
            }
        }
        KvEvent { ticket: KvTicket::new(from, slot, number), id, from, outcome }
    }

    fn slot(&self, call: &'static str, request: KvTicket) -> Result<&Slot> {
        let sender = self.senders.get(request.peer()).and_then(Option::as_ref);
        let slot = sender.and_then(|sender| sender.slots.get(request.slot()));
        let number = request.number();
        slot.filter(|slot| number != 0 && slot.number == number).ok_or(Error::WrongOrder {
            call,
            epoch: number,
            expected: "a request that is in flight: its end has not been told by poll",
        })
    }

    #[cfg(test)]
    pub(super) fn mailbox_of(&self, sender: usize) -> Remote {
        self.senders[sender].as_ref().expect("a sender").mailbox
    }

    /// A word that a sender has written.
    fn own(&self, from: usize, offset: usize) -> u64 {
        let at = setup::part(self.comm.rank, self.control.remote().offset, self.signals.bytes, from).skip(offset);
        self.comm.own_word(at.offset).load(Acquire)
    }

    fn has_gone(&self, from: usize) -> bool {
        self.own(from, self.signals.gone) != 0
    }

    fn corrupt(&self, rank: usize, value: u64) -> Error {
        Error::Corrupt { rank, what: "its words about a KV request", value, limit: MAX_NUMBER }
    }
}

impl Drop for KvReceiver {
    fn drop(&mut self) {
        for &(from, slot) in &self.in_flight {
            let number = self.senders[from].as_ref().map_or(0, |sender| sender.slots[slot].number);
            let _ = self.tell_cancelled(from, slot, number);
        }
        for sender in self.senders.iter().flatten() {
            let _ = self.comm.signal(word(sender.mailbox, self.mailbox.gone), Update::Set(1));
        }
        if !self.in_flight.is_empty() {
            // A sender that has not heard of it yet may still write there.
            self.pool.keep();
        }
    }
}
