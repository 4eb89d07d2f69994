//! Ranks of several nodes, which are threads of this process on a simulated network that reorders and delays.

use std::cell::OnceCell;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::Source;
use crate::fabric::pretence::Pretence;
use crate::sync::Operation;

/// Runs `body` on every rank, each on a thread of its own; `nodes` says where the ranks are. Without a seed the network is the
/// real one, on loopback.
pub(crate) fn on_nodes<T: Send>(
    nodes: &[usize],
    seed: impl Into<Option<u64>>,
    config: Config,
    body: impl Fn(Communicator) -> T + Sync,
) -> Vec<T> {
    let id = UniqueId::new().unwrap();
    let simulated = seed.into().map(|seed| (1 + (seed % 40) as usize, seed));
    let mut config = config;
    config.pretence = Some(Arc::new(Pretence::new(nodes.to_vec(), simulated)));
    std::thread::scope(|s| {
        let rank = |rank| {
            let (config, id, body) = (config.clone(), &id, &body);
            s.spawn(move || body(Communicator::init(rank, nodes.len(), id, config).unwrap()))
        };
        let ranks: Vec<_> = (0..nodes.len()).map(rank).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn quick() -> Config {
    Config::default().timeout(Some(Duration::from_secs(20))).heap_bytes(1 << 16)
}

/// The nodes of two to six ranks, of which two at least differ.
fn nodes() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0usize..3, 2..7).prop_filter("several nodes", |nodes| nodes.iter().any(|n| *n != nodes[0]))
}

fn payload(from: usize, to: usize, n: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + from * 7 + to * 3 + n) as u8).collect()
}

/// Every rank sends messages of `sizes` to every rank, of private memory or of the heap, and checks what comes.
pub(super) fn all_to_all(comm: &Communicator, sizes: &[usize], in_heap: bool) {
    let (me, ranks) = (comm.rank(), comm.world_size());
    comm.barrier().unwrap();
    let private: Vec<Vec<Vec<u8>>> =
        (0..ranks).map(|to| sizes.iter().enumerate().map(|(n, &len)| payload(me, to, n, len)).collect()).collect();
    let mut heap = comm.heap_alloc(if in_heap { ranks * sizes.iter().sum::<usize>() } else { 1 }).unwrap();
    let mut data: Vec<Vec<&[u8]>> = private.iter().map(|data| data.iter().map(|data| &data[..]).collect()).collect();
    if in_heap {
        let mut rest = &mut heap[..];
        for data in data.iter_mut().flatten() {
            let (place, others) = rest.split_at_mut(data.len());
            place.copy_from_slice(data);
            (*data, rest) = (place, others);
        }
    }
    comm.scope(|scope| {
        let mut requests = vec![];
        for (to, data) in data.iter().enumerate() {
            for data in data {
                requests.push(scope.isend(to, 5, data).unwrap());
            }
        }
        for from in 0..ranks {
            for (n, &len) in sizes.iter().enumerate() {
                let mut buffer = vec![0; len + 3];
                let status = comm.recv(from, 5, &mut buffer).unwrap();
                assert_eq!((status.source, status.len), (from, len));
                assert!(buffer[..len] == payload(from, me, n, len), "message {n} of {len} bytes from {from}");
            }
        }
        requests.into_iter().try_for_each(|request| request.wait().map(|_| ()))
    })
    .unwrap();
    comm.barrier().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn messages_of_all_sizes_arrive_in_order(
        nodes in nodes(), seed: u64, thread: bool, in_heap: bool,
        sizes in prop::collection::vec(prop_oneof![0usize..64, 0usize..5000, 0usize..400_000], 1..12),
    ) {
        let heap = (1 << 16) + nodes.len() * sizes.iter().sum::<usize>();
        let config = quick().progress_thread(thread).p2p_ring_bytes(16 << 10).heap_bytes(heap);
        on_nodes(&nodes, seed, config, |comm| all_to_all(&comm, &sizes, in_heap));
    }
}

#[test]
fn messages_of_all_sizes_arrive_in_order_over_the_real_network() {
    for (thread, in_heap) in [(true, true), (true, false), (false, true)] {
        on_nodes(&[0, 1, 0, 1], None, quick().progress_thread(thread).heap_bytes(8 << 20), |comm| {
            all_to_all(&comm, &[0, 1, 40, 41, 5000, 70_000, 1 << 20, 3, 200_000], in_heap);
        });
    }
}

/// A send from the heap that is given up halfway: the receiver gets all of it as it was, or is told.
#[test]
fn a_message_of_the_heap_that_is_given_up_is_whole_or_withdrawn() {
    const LEN: usize = 60_000;
    let mut outcomes = [0; 2];
    for seed in 0..30 {
        let config = quick().p2p_ring_bytes(16 << 10);
        let outcome = on_nodes(&[0, 1], seed, config, |comm| {
            if comm.rank() == 0 {
                let mut data = comm.heap_alloc(LEN).unwrap();
                data.fill(1);
                comm.scope(|scope| {
                    let mut send = scope.isend(1, 1, &data)?;
                    for _ in 0..seed * 5 {
                        send.test()?;
                    }
                    Ok(())
                })
                .unwrap();
                data.fill(2);
                comm.send(1, 2, b"over").unwrap();
                comm.recv(1, 3, &mut []).unwrap();
                return None;
            }
            let mut data = vec![0; LEN];
            let got = comm.scope(|scope| {
                let mut first = scope.irecv(0, 1, &mut data)?;
                // Sent after it. Nothing comes of one that was given up before it had begun.
                comm.recv(0, 2, &mut [0; 4])?;
                Ok(first.test().transpose())
            });
            comm.send(0, 3, &[]).unwrap();
            got.unwrap().map(|got| match got {
                Ok(status) => {
                    assert!(status.len == LEN && data == [1; LEN]);
                    true
                }
                Err(error) => {
                    assert!(matches!(error, Error::Withdrawn { rank: 0, tag: 1 }), "{error}");
                    false
                }
            })
        });
        if let Some(whole) = outcome[1] {
            outcomes[usize::from(whole)] += 1;
        }
    }
    assert!(outcomes[0] > 0, "none was withdrawn: {outcomes:?}");
}

#[test]
fn anyone_may_send_and_what_was_sent_survives_its_sender() {
    on_nodes(&[0, 1, 1, 0], 3, quick(), |comm| {
        if comm.rank() > 0 {
            comm.send(0, 9, &vec![comm.rank() as u8; 30_000]).unwrap();
            comm.send(0, 9, b"").unwrap();
            return;
        }
        let mut from = vec![];
        for _ in 1..4 {
            let mut buffer = vec![0; 30_000];
            let status = comm.recv(Source::Any, 9, &mut buffer).unwrap();
            assert_eq!(buffer, vec![status.source as u8; 30_000]);
            assert_eq!(comm.recv(status.source, 9, &mut buffer).unwrap().len, 0);
            from.push(status.source);
        }
        from.sort();
        assert_eq!(from, [1, 2, 3]);
    });
}

#[test]
fn an_abort_ends_the_waits_of_other_nodes() {
    on_nodes(&[0, 1, 2], 4, quick(), |comm| match comm.rank() {
        1 => comm.abort(),
        _ => {
            let error = comm.recv(Source::Any, 1, &mut []).unwrap_err();
            assert!(matches!(error, Error::Aborted { by: 1, .. }), "{error}");
        }
    });
}

#[test]
fn who_leaves_without_a_message_is_named_on_other_nodes() {
    on_nodes(&[0, 1], 5, quick(), |comm| {
        if comm.rank() == 0 {
            let error = comm.recv(1, 1, &mut []).unwrap_err();
            assert!(matches!(error, Error::PeerLeft { rank: 1, .. }), "{error}");
        }
    });
}

#[test]
fn a_probe_is_answered_by_who_waits_or_has_a_thread_and_by_nobody_otherwise() {
    for thread in [true, false] {
        let step = AtomicUsize::new(0);
        // Not for ever, should the other one have failed.
        let until = |n: usize| {
            (0..20_000).any(|_| {
                std::thread::sleep(Duration::from_millis(1));
                step.load(SeqCst) >= n
            })
        };
        on_nodes(&[0, 1, 0], 7, quick().progress_thread(thread), |comm| {
            comm.barrier().unwrap();
            match comm.rank() {
                0 => {
                    assert!(until(1));
                    let probed = comm.probe(1, Duration::from_millis(if thread { 20_000 } else { 100 }));
                    step.store(2, SeqCst);
                    match probed {
                        Ok(_) => assert!(thread),
                        Err(Error::Timeout { during: Operation::Probe, peer: Some(1), .. }) => assert!(!thread),
                        Err(other) => panic!("{other}"),
                    }
                    comm.probe(1, Duration::from_secs(20)).unwrap();
                    comm.probe(2, Duration::from_secs(20)).unwrap();
                    comm.send(1, 3, b"").unwrap();
                }
                1 => {
                    // At work, outside of this library, until it has been probed.
                    step.store(1, SeqCst);
                    assert!(until(2));
                    comm.recv(0, 3, &mut []).unwrap();
                }
                _ => {}
            }
            comm.barrier().unwrap();
        });
    }
}

#[test]
fn a_deadline_says_when_a_far_rank_was_last_heard_of() {
    on_nodes(&[0, 1], 6, quick().timeout(Some(Duration::from_millis(300))), |comm| {
        comm.barrier().unwrap();
        if comm.rank() == 0 {
            let error = comm.recv(1, 1, &mut []).unwrap_err().to_string();
            assert!(error.contains("rank 1 is on another node (node 1), last heard of"), "{error}");
        } else {
            std::thread::sleep(Duration::from_millis(600));
        }
    });
}

#[test]
fn ranks_of_several_nodes_share_the_cores_of_the_machine_that_these_are_on() {
    let shared = on_nodes(&[0, 1, 1, 2], 7, quick(), |comm| comm.core_sharing().clone());
    let expected = Communicator::core_sharing_of(4);
    assert!(shared.iter().all(|sharing| *sharing == expected), "{shared:?}, and not {expected:?}");
}

/// The network takes one put at a time, and nobody moves on what waits for it but who waits: for its part in a set-up, too, and for
/// another communicator's words.
#[test]
fn who_waits_for_something_else_moves_on_what_was_sent_before_where_no_thread_does() {
    on_nodes(&[0, 1], 0, quick().progress_thread(false), |comm| {
        let texts: Vec<_> = (0..5).map(|n| payload(comm.rank(), 1, n, 1000)).collect();
        let meanwhile = |wait: &dyn Fn()| {
            comm.scope(|scope| {
                let sent = match comm.rank() {
                    0 => texts.iter().map(|text| scope.isend(1, 5, text)).collect::<Result<Vec<_>>>()?,
                    _ => vec![],
                };
                for n in 0..texts.len() * comm.rank() {
                    let mut text = [0; 1000];
                    comm.recv(0, 5, &mut text)?;
                    assert!(text[..] == payload(0, 1, n, 1000), "message {n}");
                }
                wait();
                sent.into_iter().try_for_each(|request| request.wait().map(|_| ()))
            })
            .unwrap();
        };
        let part = OnceCell::new();
        meanwhile(&|| _ = part.set(comm.split(Some(0), 0).unwrap().unwrap()));
        meanwhile(&|| part.get().unwrap().barrier().unwrap());
    });
}
