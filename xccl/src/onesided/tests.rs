use std::sync::Barrier;
use std::time::Duration;

use super::*;
use crate::comm::Config;
use crate::comm::far_tests::on_nodes;
use crate::error::Error;
use crate::p2p::Source;
use crate::sync::signal::Until;
use crate::{HeapBuffer, UniqueId};

const HEAP: usize = 1 << 20;

pub(crate) fn config() -> Config {
    Config::default().heap_bytes(HEAP).timeout(Some(Duration::from_secs(20)))
}

fn alone() -> Communicator {
    Communicator::init(0, 1, &UniqueId::new().unwrap(), config()).unwrap()
}

/// Ranks that are threads of this process: first on one node, then on several, on a network that reorders and delays.
pub(crate) fn ranks(n: usize, play: impl Fn(&Communicator) + Sync) {
    let alone: Vec<usize> = (0..n).collect();
    let mixed: Vec<usize> = (0..n).map(|rank| rank % 2).collect();
    let nodes = [vec![0; n], alone, mixed];
    for (seed, nodes) in nodes.into_iter().enumerate().take(n.max(1)) {
        on_nodes(&nodes, Some(7 + seed as u64), config(), |comm| play(&comm));
    }
}

/// The same on one node alone.
fn near(n: usize, play: impl Fn(&Communicator) + Sync) {
    on_nodes(&vec![0; n], Some(1), config(), |comm| play(&comm));
}

#[test]
fn what_is_put_is_read_and_got() {
    ranks(3, |comm| {
        let block = comm.shared_alloc(10_000).unwrap();
        let (right, left) = ((comm.rank() + 1) % 3, (comm.rank() + 2) % 3);
        comm.barrier().unwrap();
        for len in [0, 1, 8, 63, 64, 65, 5000, 9000] {
            let data = |rank: usize| (0..len).map(|i| (i * 7 + rank) as u8).collect::<Vec<u8>>();
            comm.put(block.remote().of(right).skip(1000), &data(comm.rank())).unwrap();
            comm.quiet().unwrap();
            comm.barrier().unwrap();
            let (mut here, mut there) = (vec![0; len], vec![0; len]);
            block.read(1000, &mut here).unwrap();
            comm.get(block.remote().of(right).skip(1000), &mut there).unwrap();
            assert!(here == data(left) && there == data(comm.rank()), "{len} bytes");
            comm.barrier().unwrap();
        }
    });
}

#[test]
fn long_data_of_the_heap_and_of_private_memory_may_change_as_soon_as_it_was_put() {
    const LONG: usize = 200_000;
    ranks(3, |comm| {
        let block = comm.shared_alloc(64 + 2 * LONG).unwrap();
        let (right, left) = ((comm.rank() + 1) % 3, (comm.rank() + 2) % 3);
        let (mut heap, mut private) = (comm.heap_alloc(LONG).unwrap(), vec![0; LONG]);
        let data =
            |rank: usize, n: u64| (0..LONG).map(|i| (i * 7 + i / 256 + rank) as u8 ^ n as u8).collect::<Vec<u8>>();
        comm.barrier().unwrap();
        let theirs = block.remote().of(right);
        for round in 1..=3 {
            heap.copy_from_slice(&data(comm.rank(), round));
            private.copy_from_slice(&data(comm.rank(), round + 100));
            comm.put(theirs.skip(64), &heap[..LONG / 2]).unwrap();
            comm.put(theirs.skip(64 + LONG), &private).unwrap();
            comm.put_signal(theirs.skip(64 + LONG / 2), &heap[LONG / 2..], theirs, Update::Add(1)).unwrap();
            heap.fill(0xee);
            private.fill(0xee);
            block.signal_wait(left, 0, Until::Ge(round)).unwrap();
            let mut found = vec![0; LONG];
            block.read(64, &mut found).unwrap();
            assert!(found == data(left, round));
            block.read(64 + LONG, &mut found).unwrap();
            assert!(found == data(left, round + 100));
            comm.barrier().unwrap();
            comm.get(theirs.skip(64), &mut found).unwrap();
            assert!(found == data(comm.rank(), round));
            comm.barrier().unwrap();
        }
    });
}

#[test]
fn a_signal_comes_after_its_data_and_wakes_who_sleeps() {
    const ROUNDS: u64 = 200;
    ranks(2, |comm| {
        let block = comm.shared_alloc(64 + 4096).unwrap();
        comm.barrier().unwrap();
        let theirs = block.remote().of(1 - comm.rank());
        for round in 1..=ROUNDS {
            if comm.rank() == 0 {
                if round % 20 == 0 {
                    // Longer than a waiter spins and yields.
                    std::thread::sleep(Duration::from_millis(3));
                }
                comm.put_signal(theirs.skip(64), &[round as u8; 4096], theirs, Update::Add(1)).unwrap();
                block.signal_wait(1, 8, Until::Eq(round)).unwrap();
            } else {
                let from = if round % 2 == 0 { Source::Any } else { Source::Rank(0) };
                assert_eq!(block.signal_wait(from, 0, Until::Ge(round)).unwrap(), round);
                let mut data = [0; 4096];
                block.read(64, &mut data).unwrap();
                assert_eq!(data, [round as u8; 4096]);
                comm.signal(theirs.skip(8), Update::Set(round)).unwrap();
            }
        }
        assert_eq!(block.signal_fetch(if comm.rank() == 0 { 8 } else { 0 }).unwrap(), ROUNDS);
    });
}

#[test]
fn atomics_of_all_ranks_add_up_and_no_two_get_the_same_ticket() {
    const EACH: u64 = 200;
    let seen = std::sync::Mutex::new(vec![]);
    ranks(3, |comm| {
        let words = comm.shared_alloc(64).unwrap();
        comm.barrier().unwrap();
        let at_0 = words.remote().of(0);
        for _ in 0..EACH {
            let ticket = comm.atomic_fetch_add(at_0, 1).unwrap();
            comm.atomic_add(at_0.skip(8), 2).unwrap();
            let mut found = comm.atomic_fetch(at_0.skip(16)).unwrap();
            loop {
                match comm.atomic_compare_swap(at_0.skip(16), found, found + 3).unwrap() {
                    now if now == found => break,
                    now => found = now,
                }
            }
            seen.lock().unwrap().push(ticket);
        }
        comm.barrier().unwrap();
        if comm.rank() == 0 {
            let all = [0, 8, 16].map(|offset| words.signal_fetch(offset).unwrap());
            assert_eq!(all, [3 * EACH, 6 * EACH, 9 * EACH]);
            assert_eq!(comm.atomic_swap(at_0, u64::MAX).unwrap(), 3 * EACH);
            assert_eq!(comm.atomic_fetch_add(at_0, 5).unwrap(), u64::MAX);
            assert_eq!(words.signal_fetch(0).unwrap(), 4);
            comm.atomic_set(at_0, 1).unwrap();
            assert_eq!(words.signal_fetch(0).unwrap(), 1);
        }
        comm.barrier().unwrap();
    });
    // Of each of the three times that it was played.
    let mut seen = seen.into_inner().unwrap();
    seen.sort();
    assert_eq!(seen, (0..9 * EACH).map(|i| i / 3).collect::<Vec<_>>());
}

#[test]
fn every_condition_is_waited_for() {
    let comm = alone();
    let word = comm.shared_alloc(8).unwrap();
    for (until, yes, no) in [
        (Until::Eq(5), 5, 4),
        (Until::Ne(5), 6, 5),
        (Until::Gt(5), 6, 5),
        (Until::Ge(5), 5, 4),
        (Until::Lt(5), 4, 5),
        (Until::Le(5), 5, 6),
    ] {
        comm.atomic_set(word.remote(), no).unwrap();
        let both = Barrier::new(2);
        std::thread::scope(|s| {
            s.spawn(|| {
                both.wait();
                std::thread::sleep(Duration::from_millis(1));
                comm.atomic_set(word.remote(), yes).unwrap();
            });
            both.wait();
            // Whoever is alone is not left by all others.
            assert_eq!(word.signal_wait(0, 0, until).unwrap(), yes, "{until:?}");
        });
    }
}

#[test]
fn only_shared_memory_can_be_named() {
    let comm = alone();
    let (own, block): (HeapBuffer, _) = (comm.heap_alloc(4096).unwrap(), comm.shared_alloc(4096).unwrap());
    let shared = block.remote();
    let whole_heap = Remote { rank: 0, offset: 4096, bytes: HEAP };
    for piece in [
        whole_heap,
        whole_heap.first(own.len()),
        Remote { offset: 0, bytes: 8, ..shared },
        Remote { offset: shared.offset - 8, bytes: 16, ..shared },
        Remote { bytes: 4097, ..shared },
        Remote { offset: usize::MAX - 7, bytes: 8, ..shared },
        Remote { bytes: usize::MAX, ..shared },
        Remote { offset: usize::MAX & !7, bytes: usize::MAX, ..shared },
    ] {
        let refused = |err: Error| assert!(matches!(err, Error::NotShared { rank: 0, .. }), "{piece:?}: {err:?}");
        refused(comm.put(piece, &[1; 8]).unwrap_err());
        refused(comm.get(piece, &mut [1; 8]).unwrap_err());
        refused(comm.signal(piece, Update::Set(1)).unwrap_err());
        refused(comm.atomic_fetch_add(piece, 1).unwrap_err());
    }
    assert!(own.iter().all(|&b| b == 0));
    let err = comm.put(shared.skip(4090), &[0; 7]).unwrap_err();
    assert!(matches!(err, Error::Shape { given: 7, .. }), "{err}");
    for word in [shared.skip(4), shared.skip(4092), shared.first(7), shared.skip(4096)] {
        assert!(matches!(comm.signal(word, Update::Add(1)), Err(Error::NoWord { .. })), "{word:?}");
        assert!(matches!(comm.put_signal(shared, &[1], word, Update::Add(1)), Err(Error::NoWord { .. })), "{word:?}");
    }
    let mut first = [0xee];
    block.read(0, &mut first).unwrap();
    assert_eq!(first, [0], "data whose signal was refused was put");
    assert!(matches!(comm.put(shared.of(1), &[]), Err(Error::InvalidRank { rank: 1, .. })));
    assert!(matches!(comm.fence(1), Err(Error::InvalidRank { .. })));
    assert!(matches!(comm.put_signal(shared, &[], shared.of(1), Update::Add(1)), Err(Error::Shape { .. })));
    for (offset, bytes) in [(4097, 0), (4096, 1), (usize::MAX, 2)] {
        assert!(matches!(block.read(offset, &mut vec![0; bytes]), Err(Error::Shape { .. })));
        assert!(matches!(block.write(offset, &vec![0; bytes]), Err(Error::Shape { .. })));
        assert!(block.signal_fetch(offset).is_err());
    }
    assert!(matches!(block.signal_fetch(4), Err(Error::NoWord { .. })));
    assert!(matches!(block.signal_wait(7, 0, Until::Eq(0)), Err(Error::InvalidRank { .. })));
}

#[test]
fn a_block_given_back_is_never_lent_as_its_owners() {
    let comm = alone();
    let late = comm.shared_alloc(HEAP / 2).unwrap().remote();
    let own = comm.heap_alloc(HEAP / 2).unwrap();
    assert!(matches!(comm.heap_alloc(256), Err(Error::HeapExhausted { .. })));
    comm.put(late, &vec![1; HEAP / 2]).unwrap();
    assert!(own.iter().all(|&b| b == 0));
    assert_eq!(comm.shared_alloc(HEAP / 2).unwrap().remote(), late);
}

#[test]
fn what_is_told_of_by_a_third_rank_is_found_and_what_is_not_shared_is_refused_across_nodes() {
    ranks(3, |comm| {
        let (rank, mut told) = (comm.rank(), [0; 24]);
        // From 0 to 1, from there to 2, which may not have heard of 0's memory yet.
        let block = (rank == 0).then(|| comm.shared_alloc(300_000).unwrap());
        match rank {
            0 => comm.send(1, 1, &block.as_ref().unwrap().remote().to_bytes()).unwrap(),
            1 => {
                comm.recv(0, 1, &mut told).unwrap();
                comm.send(2, 1, &told).unwrap();
            }
            _ => {
                comm.recv(1, 1, &mut told).unwrap();
                let there = Remote::from_bytes(&told);
                let data: Vec<u8> = (0..there.bytes).map(|i| (i * 7 + (i >> 8)) as u8).collect();
                comm.put(there, &data).unwrap();
                comm.quiet().unwrap();
                let mut back = vec![0; data.len()];
                comm.get(there, &mut back).unwrap();
                assert!(back == data);
                let below = Remote { offset: there.offset - 8, bytes: 8, ..there };
                assert!(matches!(comm.put(below, &[1]), Err(Error::NotShared { rank: 0, .. })));
                assert!(matches!(comm.put(below.of(1), &[1]), Err(Error::NotShared { rank: 1, .. })));
            }
        }
        comm.barrier().unwrap();
    });
}

#[test]
fn whoever_left_can_be_read_but_not_written_and_an_abort_ends_all() {
    let together = Barrier::new(2);
    near(2, |comm| {
        let twin = comm.duplicate().unwrap();
        let block = twin.shared_alloc(64).unwrap();
        let in_both = comm.shared_alloc(64).unwrap();
        let theirs = block.remote().of(1 - comm.rank());
        block.write(8, &[comm.rank() as u8 + 1; 8]).unwrap();
        comm.barrier().unwrap();
        if comm.rank() == 1 {
            drop((block, twin));
            comm.barrier().unwrap();
            together.wait();
            comm.abort();
            together.wait();
            return;
        }
        comm.barrier().unwrap();
        let mut read = [0; 8];
        twin.get(theirs.skip(8), &mut read).unwrap();
        assert_eq!(read, [2; 8]);
        assert!(matches!(twin.put(theirs, &[1]), Err(Error::PeerLeft { rank: 1, .. })));
        assert!(matches!(block.signal_wait(Source::Any, 0, Until::Eq(9)), Err(Error::PeerLeft { rank: 1, .. })));
        let (block, theirs) = (&in_both, in_both.remote().of(1));
        together.wait();
        together.wait();
        assert!(matches!(comm.put(theirs, &[1]), Err(Error::Aborted { by: 1, .. })));
        assert!(matches!(comm.get(theirs, &mut [1]), Err(Error::Aborted { by: 1, .. })));
        assert!(matches!(block.signal_wait(1, 0, Until::Eq(9)), Err(Error::Aborted { by: 1, .. })));
    });
}
