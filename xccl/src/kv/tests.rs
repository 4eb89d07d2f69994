use std::collections::HashMap;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::Communicator;
use crate::comm::far_tests::on_nodes;
use crate::error::{Error, Result};
use crate::onesided::tests::{config, ranks};

const UNTOUCHED: u8 = 0xee;

/// The byte of a sender's page.
fn byte(sender: usize, layer: usize, page: usize, i: usize) -> u8 {
    (sender * 131 + layer * 57 + page * 29 + i * 7 + (i >> 8)) as u8
}

/// The sender's page that goes to the `place`-th page of a request: the plainest choice that both sides can make.
fn source_of(id: u64, place: usize, pages: usize) -> usize {
    (id as usize * 7 + place * 3) % pages
}

fn sender_pool(rank: usize, config: &KvConfig, layout: &PageLayout) -> Vec<u8> {
    let mut pool = vec![0; layout.bytes(config).unwrap()];
    for layer in 0..config.layers {
        for page in 0..layout.pages {
            let at = layout.at(layer, page);
            let bytes = pool[at..at + config.page_bytes].iter_mut().enumerate();
            bytes.for_each(|(i, b)| *b = byte(rank, layer, page, i));
        }
    }
    pool
}

fn receiver_pool(comm: &Communicator, config: &KvConfig, layout: PageLayout) -> Result<KvReceiver> {
    let bytes = layout.bytes(config).unwrap();
    let pool = comm.shared_alloc(bytes)?;
    pool.write(0, &vec![UNTOUCHED; bytes])?;
    KvReceiver::new(comm, *config, pool, layout)
}

/// All pages of a request of one layer.
fn pairs(id: u64, pages: &[u32], own: usize) -> Vec<PagePair> {
    pages.iter().enumerate().map(|(place, &page)| (source_of(id, place, own) as u32, page).into()).collect()
}

#[derive(Clone, Debug)]
struct Request {
    sender: usize,
    pages: usize,
    last: usize,
    /// Who cancels it: nobody, the receiver after posting, the sender when it is posted, or half way.
    cancel: u8,
    /// Decides the order of layers and the pieces.
    seed: u64,
}

fn request(senders: usize, config: KvConfig) -> impl Strategy<Value = Request> {
    (0..senders, 0..=config.max_pages, 1..=config.page_bytes, 0u8..8, any::<u64>())
        .prop_map(|(sender, pages, last, cancel, seed)| Request { sender, pages, last, cancel, seed })
}

#[derive(Clone, Debug)]
struct Scene {
    config: KvConfig,
    senders: usize,
    /// By receiver.
    requests: Vec<Vec<Request>>,
    by_page: bool,
}

fn scene() -> impl Strategy<Value = Scene> {
    (1usize..4, 1usize..100, 1usize..9, 1usize..5, 1usize..3, 1usize..3, any::<bool>()).prop_flat_map(
        |(layers, page_bytes, max_pages, max_requests, senders, receivers, by_page)| {
            let config = KvConfig::new(layers, page_bytes).max_pages(max_pages).max_requests(max_requests);
            let requests = prop::collection::vec(request(senders, config), 0..12);
            prop::collection::vec(requests, receivers).prop_map(move |requests| Scene {
                config,
                senders,
                requests,
                by_page,
            })
        },
    )
}

/// Ids tell whose request it is, and which.
fn id_of(receiver: usize, request: usize) -> u64 {
    (receiver * 1000 + request) as u64
}

impl Scene {
    fn layout(&self, pages: usize, by_page: bool) -> PageLayout {
        match by_page {
            true => PageLayout::by_page(&self.config, pages),
            false => PageLayout::by_layer(&self.config, pages),
        }
    }

    fn play_sender(&self, comm: &Communicator, done: &AtomicUsize) -> Result<()> {
        let layout = self.layout(13, !self.by_page);
        let (config, own) = (self.config, layout.pages);
        let pool = sender_pool(comm.rank(), &config, &layout);
        let mut sender = KvSender::new(comm, config, layout)?;
        let (mut open, mut turn) = (vec![], 0);
        // A request that is cancelled before it was taken is never heard of here.
        while done.load(Relaxed) < self.requests.len() {
            match sender.poll()? {
                Some(KvSenderEvent::Posted(posted)) => {
                    let request = self.of(posted.id);
                    assert_eq!((posted.pages, request.sender), (request.pages, comm.rank()));
                    // What is to be pushed, in some order and in pieces.
                    let mut pieces = vec![];
                    for layer in 0..config.layers {
                        let pairs = pairs(posted.id, sender.pages(posted.ticket)?, own);
                        let piece = 1 + (request.seed as usize >> layer) % 4;
                        match pairs.is_empty() {
                            true => pieces.push((layer, pairs)),
                            false => pieces.extend(pairs.chunks(piece).map(|piece| (layer, piece.to_vec()))),
                        }
                    }
                    let first = request.seed as usize % pieces.len();
                    pieces.rotate_left(first);
                    open.push((posted, pieces));
                }
                Some(KvSenderEvent::Cancelled(posted)) => {
                    assert!([1, 2].contains(&self.of(posted.id).cancel));
                    open.retain(|(other, _)| other.ticket != posted.ticket);
                }
                Some(KvSenderEvent::Failed(posted, err)) => panic!("{posted:?}: {err}"),
                // It has all it wanted, but others have not.
                Some(KvSenderEvent::Gone(..)) => {}
                None => std::thread::yield_now(),
            }
            turn += 1;
            let Some(at) = (!open.is_empty()).then(|| turn / 3 % open.len()) else { continue };
            let (posted, pieces) = &mut open[at];
            let request = self.of(posted.id);
            if request.cancel == 3 || request.cancel == 4 && pieces.len() == 1 {
                sender.cancel(posted.ticket)?;
                assert!(matches!(sender.cancel(posted.ticket), Err(Error::WrongOrder { .. })));
            } else {
                let (layer, piece) = pieces.remove(0);
                match sender.push(posted.ticket, layer, &pool, &piece) {
                    Ok(is_over) => assert_eq!(is_over, pieces.is_empty()),
                    Err(Error::KvCancelled { .. }) => assert!([1, 2].contains(&request.cancel)),
                    Err(err) => panic!("{err}"),
                }
            }
            if sender.pages(posted.ticket).is_err() {
                open.remove(at);
            }
        }
        assert_eq!((sender.in_flight(), open.len()), (0, 0));
        comm.barrier()
    }

    fn of(&self, id: u64) -> &Request {
        &self.requests[id as usize / 1000][id as usize % 1000]
    }

    fn play_receiver(&self, comm: &Communicator, done: &AtomicUsize) -> Result<()> {
        let me = comm.rank() - self.senders;
        let pages = 2 * self.config.max_pages + 3;
        let layout = self.layout(pages, self.by_page);
        let mut receiver = receiver_pool(comm, &self.config, layout)?;
        let mut todo: Vec<usize> = (0..self.requests[me].len()).rev().collect();
        let mut free: Vec<u32> = (0..pages as u32).rev().collect();
        let mut held: HashMap<u64, Vec<u32>> = HashMap::new();
        // By layer and page, what it holds; `None` where nobody can know.
        let mut expected = vec![vec![Some(vec![UNTOUCHED; self.config.page_bytes]); pages]; self.config.layers];
        while !todo.is_empty() || receiver.in_flight() > 0 {
            if let Some(&next) = todo.last()
                && self.requests[me][next].pages <= free.len()
            {
                let (request, id) = (&self.requests[me][next], id_of(me, next));
                let pages = free.split_off(free.len() - request.pages);
                match receiver.post(request.sender, id, &pages, request.last)? {
                    None => free.extend(pages),
                    Some(ticket) => {
                        todo.pop();
                        if request.cancel == 1 {
                            receiver.cancel(ticket)?;
                        } else if request.cancel == 2 {
                            match receiver.wait_layer(ticket, 0).and_then(|()| receiver.cancel(ticket)) {
                                Ok(()) | Err(Error::KvCancelled { .. }) => {}
                                Err(err) => panic!("{err}"),
                            }
                        } else if request.cancel == 0 {
                            receiver.wait_layer(ticket, self.config.layers - 1)?;
                            assert!(receiver.layer_ready(ticket, self.config.layers - 1)?);
                        }
                        held.insert(id, pages);
                    }
                }
            }
            let Some(end) = receiver.poll()? else { continue };
            let request = self.of(end.id);
            assert_eq!(end.from, request.sender);
            let pages = held.remove(&end.id).expect("an end is told once");
            for (layer, of_layer) in expected.iter_mut().enumerate() {
                for (place, &page) in pages.iter().enumerate() {
                    let slot = &mut of_layer[page as usize];
                    match (&end.outcome, slot) {
                        (KvOutcome::Done, slot) => {
                            let len = if place + 1 == pages.len() { request.last } else { self.config.page_bytes };
                            let source = source_of(end.id, place, 13);
                            let content = (0..len).map(|i| byte(request.sender, layer, source, i)).collect::<Vec<_>>();
                            match slot {
                                Some(bytes) => bytes[..len].copy_from_slice(&content),
                                None if len == self.config.page_bytes => *slot = Some(content),
                                None => {}
                            }
                        }
                        (_, slot) => *slot = None,
                    }
                }
            }
            match end.outcome {
                KvOutcome::Done => assert!(![3, 4].contains(&request.cancel), "{request:?}"),
                KvOutcome::Cancelled => assert!((1..5).contains(&request.cancel), "{request:?}"),
                KvOutcome::Failed(err) => panic!("{err}"),
            }
            assert!(matches!(receiver.layer_ready(end.ticket, 0), Err(Error::WrongOrder { .. })));
            free.extend(pages);
        }
        done.fetch_add(1, Relaxed);
        for (layer, pages) in expected.iter().enumerate() {
            for (page, bytes) in pages.iter().enumerate() {
                let mut found = vec![0; self.config.page_bytes];
                receiver.read_page(layer, page as u32, &mut found)?;
                assert!(bytes.as_ref().is_none_or(|bytes| *bytes == found), "layer {layer}, page {page}: {found:?}");
            }
        }
        comm.barrier()
    }
}

/// Plays a scene, the ranks on these nodes.
fn play(scene: &Scene, nodes: &[usize], seed: u64) {
    let done = AtomicUsize::new(0);
    on_nodes(nodes, Some(seed), config(), |comm| {
        let played = match comm.rank() < scene.senders {
            true => scene.play_sender(&comm, &done),
            false => scene.play_receiver(&comm, &done),
        };
        if let Err(err) = played {
            // Nobody is to wait for this rank until the deadline.
            comm.abort();
            panic!("rank {}: {err}", comm.rank());
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 20, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn every_page_arrives_and_no_other_byte_changes(scene in scene()) {
        play(&scene, &vec![0; scene.senders + scene.requests.len()], 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 5, ..ProptestConfig::with_cases(10) })]

    #[test]
    fn every_page_arrives_across_nodes(scene in scene(), seed in 0u64..1000) {
        let nodes: Vec<usize> = (0..scene.senders + scene.requests.len()).map(|rank| rank % 2).collect();
        play(&scene, &nodes, seed);
    }
}

fn small() -> (KvConfig, PageLayout) {
    let config = KvConfig::new(2, 64).max_pages(4).max_requests(2);
    (config, PageLayout::by_layer(&config, 8))
}

/// A sender and a receiver.
fn pair(sender: impl Fn(KvSender, &[u8], &Communicator) + Sync, receiver: impl Fn(KvReceiver, &Communicator) + Sync) {
    let (config, layout) = small();
    ranks(2, |comm| {
        if comm.rank() == 0 {
            let pool = sender_pool(0, &config, &layout);
            sender(KvSender::new(comm, config, layout).unwrap(), &pool, comm);
        } else {
            receiver(receiver_pool(comm, &config, layout).unwrap(), comm);
        }
    });
}

fn list<const N: usize>(pairs: [(u32, u32); N]) -> [PagePair; N] {
    pairs.map(PagePair::from)
}

fn next_posted(sender: &mut KvSender) -> KvPosted {
    match sender.wait().unwrap() {
        KvSenderEvent::Posted(posted) => posted,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_layer_is_ready_before_the_next_has_come_and_a_full_pair_would_block() {
    pair(
        |mut sender, pool, comm| {
            let [first, second] = [next_posted(&mut sender), next_posted(&mut sender)];
            assert_eq!((first.id, first.pages, first.last_page_bytes, second.id), (7, 2, 10, 8));
            assert_eq!(sender.pages(first.ticket).unwrap(), [5, 1]);
            assert!(!sender.push(first.ticket, 1, pool, &list([(0, 5)])).unwrap());
            comm.barrier().unwrap();
            comm.barrier().unwrap();
            assert!(!sender.push(first.ticket, 1, pool, &list([(1, 1)])).unwrap());
            comm.barrier().unwrap();
            assert!(sender.push(first.ticket, 0, pool, &list([(0, 5), (1, 1)])).unwrap());
            for layer in 0..2 {
                assert_eq!(sender.push(second.ticket, layer, pool, &[]).unwrap(), layer == 1);
            }
            assert!(sender.poll().unwrap().is_none_or(|event| matches!(event, KvSenderEvent::Posted(_))));
            comm.barrier().unwrap();
        },
        |mut receiver, comm| {
            let request = receiver.post(0, 7, &[5, 1], 10).unwrap().unwrap();
            let empty = receiver.post(0, 8, &[], 0).unwrap().unwrap();
            assert!(receiver.post(0, 9, &[2], 1).unwrap().is_none());
            comm.barrier().unwrap();
            assert!(!receiver.layer_ready(request, 1).unwrap());
            comm.barrier().unwrap();
            comm.barrier().unwrap();
            assert!(receiver.layer_ready(request, 1).unwrap());
            receiver.wait_layer(request, 1).unwrap();
            let mut page = [0; 64];
            receiver.read_page(1, 1, &mut page).unwrap();
            assert_eq!(page[..10], std::array::from_fn::<u8, 10, _>(|i| byte(0, 1, 1, i)));
            assert_eq!(page[10..], [UNTOUCHED; 54]);
            let mut ends = [receiver.wait().unwrap(), receiver.wait().unwrap()].map(|end| (end.ticket, end.id));
            ends.sort();
            assert_eq!(ends, [(request, 7), (empty, 8)]);
            assert!(receiver.poll().unwrap().is_none());
            assert!(matches!(receiver.wait(), Err(Error::WrongOrder { .. })));
            assert!(receiver.post(0, 9, &[2], 1).unwrap().is_some());
            comm.barrier().unwrap();
        },
    );
}

#[test]
fn nothing_wrong_is_posted_or_pushed() {
    pair(
        |mut sender, pool, comm| {
            let posted = next_posted(&mut sender);
            let bad = |sender: &mut KvSender, layer, pages: &[(u32, u32)]| {
                let pages: Vec<_> = pages.iter().map(|&pair| pair.into()).collect();
                sender.push(posted.ticket, layer, pool, &pages)
            };
            for (pages, page) in
                [(&[(0, 5), (0, 6)][..], 6), (&[(0, 5), (1, 5)], 5), (&[(8, 5)], 8), (&[(0, u32::MAX)], u32::MAX)]
            {
                match bad(&mut sender, 0, pages) {
                    Err(Error::KvPage { rank: 1, id: 7, page: named, .. }) => assert_eq!(named, page),
                    other => panic!("{pages:?}: {other:?}"),
                }
            }
            assert!(matches!(bad(&mut sender, 2, &[(0, 5)]), Err(Error::Shape { given: 2, .. })));
            let short = sender.push(posted.ticket, 0, &pool[1..], &list([(0, 5)]));
            assert!(matches!(short, Err(Error::Shape { .. })));
            for ticket in [0, u64::MAX, posted.ticket.to_bits() + 1, posted.ticket.to_bits() ^ 1 << 9] {
                let ticket = KvTicket::from_bits(ticket);
                assert!(matches!(sender.push(ticket, 0, pool, &[]), Err(Error::WrongOrder { .. })), "{ticket}");
                assert!(matches!(sender.cancel(ticket), Err(Error::WrongOrder { .. })));
                assert!(sender.pages(ticket).is_err());
            }
            // Nothing of all that has left a trace.
            assert!(!sender.push(posted.ticket, 0, pool, &list([(0, 5), (1, 1)])).unwrap());
            assert!(matches!(sender.push(posted.ticket, 0, pool, &[]), Err(Error::WrongOrder { .. })));
            assert!(sender.push(posted.ticket, 1, pool, &list([(0, 5), (1, 1)])).unwrap());
            comm.barrier().unwrap();
        },
        |mut receiver, comm| {
            let page = |result: Result<Option<KvTicket>>, page| match result {
                Err(Error::KvPage { rank: 0, id: 7, page: named, .. }) => assert_eq!(named, page),
                other => panic!("{other:?}"),
            };
            page(receiver.post(0, 7, &[1, 8], 1), 8);
            page(receiver.post(0, 7, &[1, 2, 1], 1), 1);
            for (pages, last) in [(&[0, 1, 2, 3, 4][..], 1), (&[0], 0), (&[0], 65)] {
                assert!(matches!(receiver.post(0, 7, pages, last), Err(Error::Shape { .. })));
            }
            assert!(matches!(receiver.post(1, 7, &[0], 1), Err(Error::KvRole { rank: 1, .. })));
            assert!(matches!(receiver.post(2, 7, &[0], 1), Err(Error::InvalidRank { .. })));
            let request = receiver.post(0, 7, &[5, 1], 64).unwrap().unwrap();
            page(receiver.post(0, 7, &[0, 5], 1), 5);
            assert!(matches!(receiver.layer_ready(request, 2), Err(Error::Shape { given: 2, .. })));
            let other = KvTicket::from_bits(request.to_bits() + 1);
            assert!(matches!(receiver.cancel(other), Err(Error::WrongOrder { .. })));
            assert!(matches!(receiver.wait_layer(other, 0), Err(Error::WrongOrder { .. })));
            assert!(receiver.read_page(2, 0, &mut []).is_err() && receiver.read_page(0, 8, &mut []).is_err());
            assert!(receiver.read_page(0, 0, &mut [0; 65]).is_err());
            assert!(matches!(receiver.wait().unwrap().outcome, KvOutcome::Done));
            let mut found = [0; 64];
            for untouched in [0, 2, 3, 4, 6, 7] {
                receiver.read_page(0, untouched, &mut found).unwrap();
                assert_eq!(found, [UNTOUCHED; 64]);
            }
            comm.barrier().unwrap();
        },
    );
}

#[test]
fn a_sender_that_goes_cancels_what_was_posted_and_what_was_not_taken() {
    pair(
        |mut sender, pool, comm| {
            let posted = next_posted(&mut sender);
            sender.push(posted.ticket, 0, pool, &list([(0, 0)])).unwrap();
            comm.barrier().unwrap();
            drop(sender);
            comm.barrier().unwrap();
        },
        |mut receiver, comm| {
            let first = receiver.post(0, 1, &[0], 64).unwrap().unwrap();
            let second = receiver.post(0, 2, &[1], 64).unwrap().unwrap();
            comm.barrier().unwrap();
            receiver.wait_layer(first, 0).unwrap();
            for (ticket, layer) in [(first, 1), (second, 0)] {
                let err = receiver.wait_layer(ticket, layer).unwrap_err();
                assert!(matches!(err, Error::KvCancelled { .. } | Error::PeerLeft { .. }), "{err:?}");
            }
            for _ in 0..2 {
                assert!(matches!(receiver.wait().unwrap().outcome, KvOutcome::Cancelled));
            }
            comm.barrier().unwrap();
            assert!(matches!(receiver.post(0, 3, &[0], 1), Err(Error::PeerLeft { rank: 0, .. })));
        },
    );
}

#[test]
fn a_receiver_that_goes_keeps_its_pool_while_somebody_may_write_there() {
    pair(
        |mut sender, pool, comm| {
            let posted = next_posted(&mut sender);
            comm.barrier().unwrap();
            comm.barrier().unwrap();
            let err = sender.push(posted.ticket, 0, pool, &list([(0, 0)])).unwrap_err();
            assert!(matches!(err, Error::PeerLeft { rank: 1, .. }), "{err:?}");
            assert_eq!(sender.in_flight(), 0);
            match sender.wait().unwrap() {
                KvSenderEvent::Gone(1, Error::PeerLeft { rank: 1, .. }) => {}
                other => panic!("{other:?}"),
            }
            assert!(sender.poll().unwrap().is_none());
            comm.barrier().unwrap();
        },
        |mut receiver, comm| {
            let pool = receiver.pool().remote();
            receiver.post(0, 1, &[0], 64).unwrap().unwrap();
            comm.barrier().unwrap();
            drop(receiver);
            let other = comm.shared_alloc(pool.bytes).unwrap().remote();
            assert!(other.offset + other.bytes <= pool.offset || pool.offset + pool.bytes <= other.offset);
            comm.barrier().unwrap();
            comm.barrier().unwrap();
        },
    );
}

#[test]
fn handles_that_are_dropped_let_go_of_the_communicator() {
    pair(
        |sender, _, comm| {
            let inner = std::sync::Arc::downgrade(&comm.inner);
            comm.barrier().unwrap();
            drop(sender);
            assert_eq!(inner.strong_count(), 1);
        },
        |mut receiver, comm| {
            let inner = std::sync::Arc::downgrade(&comm.inner);
            receiver.post(0, 1, &[0], 64).unwrap().unwrap();
            comm.barrier().unwrap();
            drop(receiver);
            assert_eq!(inner.strong_count(), 1);
        },
    );
}

#[test]
fn ranks_that_differ_or_cannot_take_part_are_told_of_everywhere() {
    let (config, layout) = small();
    ranks(2, |comm| {
        let differs = KvConfig { layers: 2 + comm.rank(), ..config };
        let err = KvSender::new(comm, differs, layout).err().unwrap();
        assert!(matches!(err, Error::Mismatch { .. }), "{err:?}");
        // The pool is too small on rank 1.
        let outcome = match comm.rank() {
            0 => KvSender::new(comm, config, layout).map(|_| ()),
            _ => KvReceiver::new(comm, config, comm.shared_alloc(1023).unwrap(), layout).map(|_| ()),
        };
        match (comm.rank(), outcome.unwrap_err()) {
            (0, Error::Bootstrap { source, .. }) => assert!(source.to_string().starts_with("rank 1:"), "{source}"),
            (1, Error::Config { .. }) => {}
            (rank, err) => panic!("rank {rank}: {err:?}"),
        }
        // And a block of another communicator is none of this one.
        let twin = comm.duplicate().unwrap();
        let pool = twin.shared_alloc(1024).unwrap();
        let err = KvReceiver::new(comm, config, pool, layout).err().unwrap();
        assert!(matches!(err, Error::Config { option: "the pool", .. }), "{err:?}");
    });
}

#[test]
fn a_receiver_that_posts_nonsense_is_told_of_and_nothing_is_written() {
    let (config, layout) = small();
    let mailbox = layout::Mailbox::new(&config);
    ranks(2, |comm| {
        if comm.rank() == 0 {
            let mut sender = KvSender::new(comm, config, layout).unwrap();
            for _ in 0..4 {
                match sender.wait().unwrap() {
                    KvSenderEvent::Failed(posted, Error::Corrupt { rank: 1, .. }) => assert_eq!(posted.to, 1),
                    other => panic!("{other:?}"),
                }
                comm.barrier().unwrap();
            }
            assert_eq!(sender.in_flight(), 0);
            return;
        }
        // A sender that lies: what it puts is what a receiver would.
        let receiver = receiver_pool(comm, &config, layout).unwrap();
        let to = receiver.mailbox_of(0);
        for (n, (count, last, page)) in [(5u64, 1u64, 0u32), (1, 65, 0), (1, 1, 8)].into_iter().enumerate() {
            let mut letter: Vec<u8> = [n as u64 + 1, 0, count, last].iter().flat_map(|w| w.to_le_bytes()).collect();
            letter.extend([page, page].iter().flat_map(|p| p.to_le_bytes()));
            let posted = crate::Update::Set(n as u64 + 1);
            comm.put_signal(to.skip(mailbox.request(0)), &letter, to.skip(mailbox.posted), posted).unwrap();
            comm.barrier().unwrap();
        }
        // A number without a slot.
        comm.signal(to.skip(mailbox.posted), crate::Update::Set(4)).unwrap();
        comm.barrier().unwrap();
        std::thread::sleep(Duration::from_millis(1));
    });
}
