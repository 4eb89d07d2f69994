//! Ranks that meet over TCP, on nodes that are pretended; and on pretended nodes that meet without it.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use super::UniqueId;
use super::message::Field;
use super::node::NodeKey;
use super::rendezvous::{Place, Rendezvous};
use super::star::Star;
use super::unix::tests::{content, memfd};
use crate::error::Result;

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
    Star::join_from(node, rendezvous, rank, nodes.len(), &fields(), deadline)
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
