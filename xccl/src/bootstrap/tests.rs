//! Ranks that meet over TCP, on nodes that are pretended; and on pretended nodes that meet without it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use super::UniqueId;
use proptest::prelude::*;

use super::message::Field;
use super::node::NodeKey;
use super::rendezvous::{Place, Rendezvous};
use super::star::Star;
use super::unix::tests::{content, memfd};
use crate::error::{Error, Result};

fn fields() -> Vec<Field> {
    vec![("XCCL_HEAP".to_string(), "1".to_string())]
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn at(address: &str) -> Rendezvous {
    Rendezvous::from(&UniqueId::new_at(address.parse().unwrap()).unwrap())
}

/// Joins as that rank, from the pretended node of that number.
fn join(rendezvous: &Rendezvous, rank: usize, nodes: &[usize], deadline: Instant) -> Result<Star> {
    let node = NodeKey::of(&format!("{}-{}", std::process::id(), nodes[rank]));
    Star::join_from(node, rendezvous, rank, nodes.len(), &fields(), &deadline.into())
}

/// Plays `scene` as every rank, each in a thread.
fn play(rendezvous: &Rendezvous, nodes: &[usize], scene: impl Fn(usize, Star) + Sync) {
    thread::scope(|s| {
        for rank in 0..nodes.len() {
            let scene = &scene;
            s.spawn(move || scene(rank, join(rendezvous, rank, nodes, soon()).unwrap()));
        }
    });
}

/// Blobs must reach all ranks, descriptors those of the same node.
fn exchange_all(rank: usize, star: &mut Star, nodes: &[usize]) {
    assert_eq!(star.nodes(), nodes);
    for round in 0..3 {
        // Not every rank has descriptors, and in one round none has.
        let count = |rank: usize| (rank + round) % 3 * usize::from(round != 1);
        let files: Vec<_> = (0..count(rank)).map(|i| memfd(&format!("file {rank} {round} {i}"))).collect();
        let fds: Vec<_> = files.iter().map(|f| f.as_fd()).collect();
        let blob = |rank: usize| format!("blob {rank} {round}").repeat(rank * 1000 + 1);
        let parts = star.exchange(blob(rank).as_bytes(), &fds, soon()).unwrap();
        assert_eq!(parts.len(), nodes.len());
        for (peer, (bytes, fds)) in parts.into_iter().enumerate() {
            assert_eq!(bytes, blob(peer).as_bytes());
            let here = if nodes[peer] == nodes[rank] { count(peer) } else { 0 };
            let contents: Vec<_> = fds.into_iter().map(content).collect();
            assert_eq!(contents, (0..here).map(|i| format!("file {peer} {round} {i}")).collect::<Vec<_>>());
        }
    }
    assert_eq!(star.pids(), vec![std::process::id(); nodes.len()]);
}

const SHAPES: [&[usize]; 6] = [&[0, 0], &[0, 1], &[0, 0, 1, 1], &[0, 1, 0, 2, 1], &[0, 1, 1, 1], &[0, 0, 0]];

#[test]
fn blobs_reach_every_rank_and_descriptors_those_of_the_node() {
    for nodes in SHAPES {
        for rendezvous in [at("127.0.0.1:0"), at("[::1]:0"), Rendezvous::from(&UniqueId::new().unwrap())] {
            let address = rendezvous.place.clone();
            play(&rendezvous, nodes, |rank, mut star| {
                exchange_all(rank, &mut star, nodes);
                let expected = address.as_ref().map(|place| match place {
                    Place::Address(address) => address.ip(),
                    Place::Name(..) => unreachable!(),
                });
                assert_eq!(star.local_address(), expected);
                assert_eq!(star.lost(), None);
            });
        }
    }
}

#[test]
fn a_rank_alone_needs_no_network() {
    let mut star = join(&at("127.0.0.1:0"), 0, &[0], soon()).unwrap();
    exchange_all(0, &mut star, &[0]);
}

/// Waits for `lost` to name a rank.
fn eventually_lost(star: &mut Star) -> Option<usize> {
    let until = soon();
    while star.lost().is_none() && Instant::now() < until {
        thread::sleep(Duration::from_millis(2));
    }
    star.lost()
}

/// Two ways for ranks of two nodes to meet.
fn both_ways() -> [Rendezvous; 2] {
    [at("127.0.0.1:0"), Rendezvous::from(&UniqueId::new().unwrap())]
}

fn join_all(rendezvous: &Rendezvous, nodes: &[usize]) -> Vec<Star> {
    thread::scope(|s| {
        let join = |rank| s.spawn(move || join(rendezvous, rank, nodes, soon()).unwrap());
        let threads: Vec<_> = (0..nodes.len()).map(join).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn a_rank_that_vanishes_is_named_to_all_and_one_that_leaves_is_not() {
    for rendezvous in both_ways() {
        let mut stars = join_all(&rendezvous, &[0, 0, 1, 1]);
        drop(stars.remove(1));
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(2));
            stars.iter_mut().for_each(|star| assert_eq!(star.lost(), None));
        }
        stars.remove(1).vanish();
        // Rank 0 sees it and tells the others.
        for star in &mut stars {
            assert_eq!(eventually_lost(star), Some(2));
        }
    }
}

#[test]
fn that_rank_0_vanishes_is_noticed_and_that_it_leaves_is_no_loss() {
    for rendezvous in both_ways() {
        let mut stars = join_all(&rendezvous, &[0, 1, 1]);
        stars.remove(0).vanish();
        stars.iter_mut().for_each(|star| assert_eq!(eventually_lost(star), Some(0)));
    }
    for rendezvous in both_ways() {
        let mut stars = join_all(&rendezvous, &[0, 1, 1]);
        drop(stars.remove(0));
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(2));
            stars.iter_mut().for_each(|star| assert_eq!(star.lost(), None));
        }
    }
}

#[test]
fn what_is_sent_for_an_exchange_survives_looking_for_losses() {
    for rendezvous in both_ways() {
        let nodes = [0, 1, 1];
        let mut stars = join_all(&rendezvous, &nodes).into_iter();
        let (mut root, mut first, mut late) = (stars.next().unwrap(), stars.next().unwrap(), stars.next().unwrap());
        let early = thread::spawn(move || {
            exchange_all(1, &mut first, &[0, 1, 1]);
            first
        });
        for _ in 0..20 {
            thread::sleep(Duration::from_millis(2));
            assert_eq!((root.lost(), late.lost()), (None, None));
        }
        let second = thread::spawn(move || {
            exchange_all(2, &mut late, &[0, 1, 1]);
            late
        });
        exchange_all(0, &mut root, &nodes);
        early.join().unwrap();
        second.join().unwrap();
    }
}

#[test]
fn a_verdict_that_comes_between_two_exchanges_ends_the_next_one() {
    for rendezvous in both_ways() {
        let mut stars = join_all(&rendezvous, &[0, 1, 1]).into_iter();
        let (mut root, mut late) = (stars.next().unwrap(), stars.next().unwrap());
        let error = root.exchange(b"", &[], Instant::now() + Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, Error::Timeout { peer: Some(1), .. }), "{error}");
        thread::sleep(Duration::from_millis(50));
        assert_eq!(late.lost(), None);
        let error = late.exchange(b"", &[], soon()).unwrap_err();
        assert!(matches!(error, Error::Timeout { peer: Some(1), .. }), "{error}");
    }
}

#[test]
fn ranks_that_are_missing_are_named_over_tcp_too() {
    let rendezvous = at("127.0.0.1:0");
    let nodes = [0, 0, 1, 1];
    thread::scope(|s| {
        let deadline = Instant::now() + Duration::from_millis(300);
        let join = |rank| {
            let rendezvous = &rendezvous;
            s.spawn(move || join(rendezvous, rank, &nodes, deadline))
        };
        let present = [0, 2].map(join);
        for thread in present {
            let error = thread.join().unwrap().err().unwrap();
            let Error::MissingRanks { ranks, world_size: 4, turned_away, .. } = error else { panic!("{error}") };
            assert_eq!((ranks, turned_away.as_str()), (vec![1, 3], ""));
        }
    });
}

#[test]
fn a_rank_claimed_twice_is_an_error_everywhere_over_tcp_too() {
    for twice in [0, 1] {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let rendezvous = Rendezvous::from(&UniqueId::new_at(port).unwrap());
        thread::scope(|s| {
            let join = |rank| {
                let rendezvous = &rendezvous;
                s.spawn(move || join(rendezvous, rank, &[0, 1, 1], soon()).err().unwrap())
            };
            for thread in [0, 1, twice].map(join) {
                let error = thread.join().unwrap();
                assert!(matches!(error, Error::DuplicateRank { rank, .. } if rank == twice), "{error}");
            }
        });
    }
}

/// That rendezvous, as somebody has it whose id is another one.
fn elsewhere(rendezvous: &Rendezvous, id: UniqueId) -> Rendezvous {
    Rendezvous::new(id, rendezvous.place.clone())
}

#[test]
fn a_wrong_secret_is_refused_at_both_ends() {
    let rendezvous = at("127.0.0.1:0");
    let stranger = elsewhere(&rendezvous, rendezvous.id().with_secret([7; 32]));
    let deadline = Instant::now() + Duration::from_millis(500);
    thread::scope(|s| {
        let root = s.spawn(|| join(&rendezvous, 0, &[0, 1], deadline));
        let error = join(&stranger, 1, &[0, 1], soon()).err().unwrap();
        assert!(matches!(error, Error::Refused { .. }) && error.to_string().contains("another secret"), "{error}");
        let error = root.join().unwrap().err().unwrap();
        let Error::MissingRanks { turned_away, .. } = &error else { panic!("{error}") };
        assert!(turned_away.contains("127.0.0.1 (its secret is another one)"), "{turned_away}");
    });
}

#[test]
fn a_rank_0_that_does_not_know_the_secret_is_not_believed() {
    // It greets as rank 0 would, with what it has made up.
    let liar = TcpListener::bind("127.0.0.1:0").unwrap();
    let rendezvous = Rendezvous::from(&UniqueId::new_at(liar.local_addr().unwrap()).unwrap());
    let lies = thread::spawn(move || {
        let (mut stream, _) = liar.accept().unwrap();
        stream.read_exact(&mut [0; 68]).unwrap();
        stream.write_all(&[0; 49]).unwrap();
        let mut rest = vec![];
        stream.read_to_end(&mut rest).unwrap();
        rest
    });
    let error = join(&rendezvous, 1, &[0, 1], Instant::now() + Duration::from_millis(100)).err().unwrap();
    assert!(matches!(error, Error::HostUnreachable { .. }), "{error}");
    // It is told nothing: in particular no hello.
    assert_eq!(lies.join().unwrap(), b"");
}

#[test]
fn two_jobs_at_one_address_meet_one_after_the_other() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let jobs: Vec<_> = (0..3).map(|_| Rendezvous::from(&UniqueId::new_at(port).unwrap())).collect();
    thread::scope(|s| {
        for job in &jobs {
            s.spawn(|| play(job, &[0, 1, 1], |rank, mut star| exchange_all(rank, &mut star, &[0, 1, 1])));
        }
    });
}

#[test]
fn twenty_jobs_over_tcp_never_meet() {
    thread::scope(|s| {
        for _ in 0..20 {
            s.spawn(|| play(&at("[::1]:0"), &[0, 1, 0], |rank, mut star| exchange_all(rank, &mut star, &[0, 1, 0])));
        }
    });
}

#[test]
fn an_address_that_nobody_has_is_an_error_at_the_deadline_that_says_who_was_tried() {
    let refused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // The latter is of a range kept for documentation (RFC 5737), so nobody's.
    for address in [refused, "198.51.100.1:29500".parse::<SocketAddr>().unwrap()] {
        let rendezvous = Rendezvous::from(&UniqueId::new_at(address).unwrap());
        let error = join(&rendezvous, 1, &[0, 1], Instant::now() + Duration::from_millis(300)).err().unwrap();
        let text = error.to_string();
        assert!(matches!(error, Error::HostUnreachable { .. }), "{text}");
        for part in [&address.to_string()[..], "XCCL_MASTER_ADDR", "firewall"] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
    }
}

#[test]
fn a_name_that_is_not_known_is_an_error_at_the_deadline_that_says_so() {
    // Reserved to mean nothing (RFC 6761).
    let rendezvous = Rendezvous::new(UniqueId::new().unwrap(), Some(Place::new("nowhere.invalid", 29500)));
    let error = join(&rendezvous, 1, &[0, 1], Instant::now() + Duration::from_millis(100)).err().unwrap();
    assert!(error.to_string().contains("nowhere.invalid:29500"), "{error}");
    assert!(error.to_string().contains("not known"), "{error}");
}

#[test]
fn a_name_is_resolved() {
    let port = TcpListener::bind("[::]:0").unwrap().local_addr().unwrap().port();
    let rendezvous = Rendezvous::new(UniqueId::new().unwrap(), Some(Place::new("localhost", port)));
    play(&rendezvous, &[0, 1], |rank, mut star| exchange_all(rank, &mut star, &[0, 1]));
}

#[test]
fn a_flood_of_strangers_keeps_no_rank_out() {
    let rendezvous = at("127.0.0.1:0");
    let address = rendezvous.id().address().unwrap();
    // More than the two ranks' rank 0 lets wait.
    let flood: Vec<_> = (0..300).map(|_| TcpStream::connect(address).unwrap()).collect();
    play(&rendezvous, &[0, 1], |rank, mut star| exchange_all(rank, &mut star, &[0, 1]));
    drop(flood);
}

#[test]
fn strangers_that_connect_without_end_keep_no_rank_out() {
    for place in [at("127.0.0.1:0"), Rendezvous::from(&UniqueId::new().unwrap())] {
        let over = std::sync::atomic::AtomicBool::new(false);
        let flood = || {
            let until = soon();
            while !over.load(std::sync::atomic::Ordering::Relaxed) && Instant::now() < until {
                match place.id().address() {
                    Some(address) => drop(TcpStream::connect(address)),
                    None => drop(super::unix::Link::connect(&place.id().socket_name())),
                }
            }
        };
        thread::scope(|s| {
            (0..2).for_each(|_| drop(s.spawn(flood)));
            play(&place, &[0, 0], |rank, mut star| exchange_all(rank, &mut star, &[0, 0]));
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// A stranger says something: garbage, a true greeting that is cut or changed, one that was recorded, or one followed by
    /// garbage in place of encrypted frames.
    #[test]
    fn whatever_strangers_say_the_ranks_meet(
        said in prop::collection::vec((0usize..4, any::<u8>(), 0usize..70, prop::collection::vec(any::<u8>(), 0..3000)), 1..6)
    ) {
        let rendezvous = at("127.0.0.1:0");
        let address = rendezvous.id().address().unwrap();
        let recorded = recorded_greeting(&rendezvous);
        let mut strangers = vec![];
        for (kind, value, position, garbage) in said {
            let mut stream = TcpStream::connect(address).unwrap();
            let mut words = match kind {
                0 => vec![],
                _ => recorded.clone(),
            };
            match kind {
                1 => words[position % 68] ^= value | 1,
                2 => words.truncate(position % 68),
                _ => {}
            }
            words.extend(&garbage[..if kind == 2 { 0 } else { garbage.len() }]);
            stream.write_all(&words).unwrap();
            strangers.push(stream);
        }
        play(&rendezvous, &[0, 1], |rank, mut star| exchange_all(rank, &mut star, &[0, 1]));
    }
}

/// The first bytes of a rank of that job.
fn recorded_greeting(rendezvous: &Rendezvous) -> Vec<u8> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = Some(Place::Address(listener.local_addr().unwrap()));
    let fake = Rendezvous::new(*rendezvous.id(), place);
    thread::scope(|s| {
        s.spawn(move || _ = join(&fake, 1, &[0, 1], Instant::now()));
        let mut greeting = vec![0; 68];
        listener.accept().unwrap().0.read_exact(&mut greeting).unwrap();
        greeting
    })
}
