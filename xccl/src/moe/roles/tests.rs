//! Attention and experts apart, against a plain reference: threads as ranks, on one node and on several, on a network that reorders
//! and delays.

use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::Communicator;
use crate::comm::Config;
use crate::comm::far_tests::on_nodes;
use crate::dtype::DType;
use crate::moe::placement::Placement;
use crate::moe::{Exchange, MoeConfig, Reduction, Routing, SmoothScales, WireFormat};

const HIDDEN: usize = 24;
const MAX_TOKENS: usize = 7;

/// One micro-batch of one rank: by token, the experts it names.
type Tokens = Vec<Vec<i64>>;

#[derive(Clone, Debug)]
struct Case {
    nodes: Vec<usize>,
    config: RoleConfig,
    /// By domain, by micro-batch, by rank of the domain.
    batches: Vec<Vec<Vec<Tokens>>>,
    /// Experts send micro-batches back in the order they came, or two at a time in reverse.
    reversed: bool,
}

fn case() -> impl Strategy<Value = Case> {
    // By rank its node and its role: a domain's number, or experts.
    let rank = (0usize..3, 0usize..4);
    let ranks = prop::collection::vec(rank, 2..9)
        .prop_filter("both roles", |ranks| ranks.iter().any(|r| r.1 == 0) && ranks.iter().any(|r| r.1 > 0));
    // As many micro-batches in each domain, or as it comes.
    let same = prop_oneof![Just(0usize), 1usize..6];
    (ranks, any::<bool>(), 1usize..10, 1usize..4, same).prop_flat_map(|(ranks, several, experts, topk, same)| {
        let topk = topk.min(experts);
        let nodes: Vec<usize> = ranks.iter().map(|r| if several { r.0 } else { 0 }).collect();
        let named = |role: usize| (0..ranks.len()).filter(|&r| ranks[r].1 == role).collect::<Vec<_>>();
        let attention: Vec<_> = (1..4).map(named).filter(|ranks| !ranks.is_empty()).collect();
        let expert_ranks = named(0);
        let all: Vec<i64> = (0..experts as i64).collect();
        let token = (Just(all).prop_shuffle(), prop::collection::vec(prop::bool::weighted(0.2), topk));
        let token = token.prop_map(|(experts, holes)| {
            experts.into_iter().zip(holes).map(|(e, hole)| if hole { -1 } else { e }).collect::<Vec<_>>()
        });
        let tokens = prop::collection::vec(token, 0..=MAX_TOKENS).boxed();
        let of_domain = |ranks: &Vec<usize>| {
            let batches = if same > 0 { same..same + 1 } else { 0..6 };
            prop::collection::vec(prop::collection::vec(tokens.clone(), ranks.len()), batches).boxed()
        };
        let batches: Vec<_> = attention.iter().map(of_domain).collect();
        let placement = prop::option::of(prop::collection::vec(prop::sample::select(expert_ranks.clone()), experts));
        let reduction = prop_oneof![Just(Reduction::PerExpert), Just(Reduction::PerRank)];
        let forward = (prop_oneof![Just(Forward::Flat), Just(Forward::Trampoline)], 0usize..4);
        let wire =
            prop_oneof![3 => Just(WireFormat::Native), 1 => Just(WireFormat::Fp8E4m3), 2 => Just(WireFormat::Int8)];
        let smooth = any::<bool>();
        (batches, placement, reduction, wire, any::<bool>(), forward, smooth).prop_map(
            move |(batches, placement, reduction, wire, reversed, (forward, trampolines), smooth)| {
                let placement = placement.map(|ranks| Placement::of_ranks(&ranks, nodes.len()).unwrap());
                let moe = MoeConfig {
                    placement,
                    reduction,
                    // Smooth scales have a row for each entry.
                    smooth: (smooth && wire == WireFormat::Int8).then(|| {
                        let scales: Vec<f32> = (0..experts * HIDDEN).map(|i| [0.5, 1.0, 2.0][i % 3]).collect();
                        SmoothScales::new(scales)
                    }),
                    wire,
                    ..MoeConfig::new(MAX_TOKENS, HIDDEN, topk, experts, DType::F32)
                };
                let config = RoleConfig::new(attention.clone(), expert_ranks.clone(), moe);
                let config = RoleConfig { forward, trampolines, ..config };
                Case { nodes: nodes.clone(), config, batches, reversed }
            },
        )
    })
}

/// Small whole numbers: no sum of them is rounded.
fn value(batch: usize, rank: usize, token: usize, column: usize) -> f32 {
    ((batch + rank * 3 + token * 5 + column) % 9) as f32 - 4.0
}

fn output(expert: i64, x: f32) -> f32 {
    x * (expert % 4) as f32 + 1.0
}

fn weight(token: usize, k: usize) -> f32 {
    [0.5, 1.0, 2.0][(token + k) % 3]
}

/// What a token gets, in the plainest way.
fn expected(batch: usize, rank: usize, token: usize, ids: &[i64], column: usize) -> f32 {
    let term = |(k, &e): (usize, &i64)| weight(token, k) * output(e, value(batch, rank, token, column));
    ids.iter().enumerate().filter(|(_, e)| **e >= 0).map(term).sum()
}

fn send<'m>(attention: &'m Attention, topk: usize, batch: usize, me: usize, tokens: &Tokens) -> Exchange<'m> {
    let rows: Vec<f32> = (0..tokens.len()).flat_map(|t| (0..HIDDEN).map(move |c| value(batch, me, t, c))).collect();
    let weights: Vec<f32> = (0..tokens.len()).flat_map(|t| (0..topk).map(move |k| weight(t, k))).collect();
    attention.a2e_send(&rows, &Routing::new(&tokens.concat(), &weights)).unwrap()
}

fn check(attention: &Attention, tolerance: f32, sent: Exchange<'_>, batch: usize, me: usize, tokens: &Tokens) {
    let mut out = vec![f32::NAN; tokens.len() * HIDDEN];
    attention.e2a_recv(sent, &mut out).unwrap();
    for (t, (ids, row)) in tokens.iter().zip(out.chunks_exact(HIDDEN)).enumerate() {
        for (c, x) in row.iter().enumerate() {
            let y = expected(batch, me, t, ids, c);
            assert!((x - y).abs() <= tolerance, "{x} for {y}: batch {batch}, token {t} of rank {me}, channel {c}");
        }
    }
}

/// All micro-batches of a rank, two in flight.
fn attend(comm: &Communicator, case: &Case) -> RoleCounts {
    let (me, topk) = (comm.rank(), case.config.moe.topk);
    let attention = Attention::new(comm, case.config.clone()).unwrap();
    let domain = attention.domain();
    let index = case.config.attention[domain].iter().position(|&r| r == me).unwrap();
    // Quantized numbers are only near.
    let tolerance = if case.config.moe.wire == WireFormat::Native { 0.0 } else { 4.0 };
    let mut in_flight = VecDeque::new();
    let finish = |in_flight: &mut VecDeque<(usize, Exchange<'_>)>| {
        let (batch, sent) = in_flight.pop_front().unwrap();
        check(&attention, tolerance, sent, batch, me, &case.batches[domain][batch][index]);
    };
    for (batch, tokens) in case.batches[domain].iter().enumerate() {
        if in_flight.len() == 2 {
            finish(&mut in_flight);
        }
        in_flight.push_back((batch, send(&attention, topk, batch, me, &tokens[index])));
    }
    while !in_flight.is_empty() {
        finish(&mut in_flight);
    }
    attention.counts()
}

/// What the experts' rank `me` should get of a micro-batch, in the plainest way: expert, source, token.
fn arrivals(case: &Case, domain: usize, batch: usize, experts: &[usize]) -> Vec<(usize, usize, usize)> {
    let mut rows = vec![];
    for &expert in experts {
        for (index, &source) in case.config.attention[domain].iter().enumerate() {
            for (token, ids) in case.batches[domain][batch][index].iter().enumerate() {
                if ids.contains(&(expert as i64)) {
                    rows.push((expert, source, token));
                }
            }
        }
    }
    rows
}

fn compute(experts: &Experts, case: &Case, mut batch: DomainBatch<'_>) {
    let local = batch.local_experts().to_vec();
    let found: Vec<_> = batch.rows().map(|row| (local[row.expert], row.source, row.token)).collect();
    assert_eq!(found, arrivals(case, batch.domain(), batch.epoch() as usize - 1, &local));
    for i in 0..batch.len() {
        let mut row = [0.0f32; HIDDEN];
        batch.copy_row(i, &mut row).unwrap();
        let expert = local[batch.row(i).expert];
        if let Some(smooth) = &case.config.moe.smooth {
            row.iter_mut().zip(&smooth.as_slice()[expert * HIDDEN..]).for_each(|(x, scale)| *x /= scale);
        }
        batch.output_row::<f32>(i).unwrap().copy_from_slice(&row.map(|x| output(expert as i64, x)));
    }
    experts.e2a_send(batch).unwrap();
}

/// The loop of an expert rank.
fn serve(comm: &Communicator, case: &Case) -> RoleCounts {
    let experts = Experts::new(comm, case.config.clone()).unwrap();
    let mut served = vec![0; experts.domains()];
    let mut held: Vec<DomainBatch<'_>> = vec![];
    while let Some(batch) = experts.a2e_recv().unwrap() {
        served[batch.domain()] += 1;
        assert_eq!(batch.epoch(), served[batch.domain()] as u64, "in order, none twice");
        // Whoever has sent two may wait for one of them: hold none back but the first of two.
        let has_second = case.batches[batch.domain()].len() > batch.epoch() as usize;
        if case.reversed && held.is_empty() && has_second && batch.epoch() % 2 == 1 {
            held.push(batch);
            continue;
        }
        let is_pair = held.first().is_some_and(|first| first.domain() == batch.domain());
        compute(&experts, case, batch);
        if is_pair {
            held.drain(..).for_each(|batch| compute(&experts, case, batch));
        }
    }
    assert_eq!(experts.ended(), Some(Ended::Done));
    assert_eq!(served, case.batches.iter().map(Vec::len).collect::<Vec<_>>());
    assert!(experts.a2e_recv().unwrap().is_none(), "and stays over");
    experts.counts()
}

fn run(comm: &Communicator, case: &Case) -> RoleCounts {
    match case.config.role_of(comm.rank()).unwrap() {
        Role::Attention { .. } => attend(comm, case),
        Role::Experts => serve(comm, case),
    }
}

/// What all of its ranks have counted is what was predicted: with as many micro-batches in each domain.
fn compare(case: &Case, counted: &[RoleCounts]) {
    let batches = case.batches.iter().map(Vec::len).min().unwrap();
    if case.batches.iter().any(|of_domain| of_domain.len() != batches) {
        return;
    }
    let routing = |domain: usize, batch: usize, rank: usize| {
        let index = case.config.attention[domain].iter().position(|&r| r == rank).unwrap();
        case.batches[domain][batch][index].concat()
    };
    // Nodes are numbered in the order of their first ranks.
    let mut seen = vec![];
    let number = |node: &usize| {
        seen.iter().position(|s| s == node).unwrap_or_else(|| {
            seen.push(*node);
            seen.len() - 1
        })
    };
    let nodes: Vec<usize> = case.nodes.iter().map(number).collect();
    let predicted = case.config.predict(&nodes, batches, routing).unwrap();
    for (rank, (counted, predicted)) in counted.iter().zip(&predicted).enumerate() {
        let role = case.config.role_of(rank).unwrap();
        assert_eq!(counted, predicted, "rank {rank} of {role}, {batches} micro-batches, nodes {nodes:?}");
    }
}

fn quick() -> Config {
    Config::default().timeout(Some(Duration::from_secs(30))).heap_bytes(1 << 16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sums_and_batches_are_those_of_a_plain_reference(case in case(), seed: u64) {
        let counted = on_nodes(&case.nodes, seed, quick(), |comm| run(&comm, &case));
        compare(&case, &counted);
    }
}

/// A group on one node.
fn group(domains: usize, attention: usize, experts: usize) -> RoleConfig {
    let ranks = domains * attention;
    let domains = (0..domains).map(|d| d * attention..(d + 1) * attention);
    RoleConfig::new(domains, ranks..ranks + experts, MoeConfig::new(4, HIDDEN, 1, 3, DType::F32))
}

/// A group flat and by trampolines.
fn both_ways(config: RoleConfig) -> impl Iterator<Item = RoleConfig> {
    [Forward::Flat, Forward::Trampoline].into_iter().map(move |forward| RoleConfig { forward, ..config.clone() })
}

fn on_one_node<T: Send>(config: &RoleConfig, body: impl Fn(&Communicator) -> T + Sync) -> Vec<T> {
    let ranks = config.attention.iter().map(Vec::len).sum::<usize>() + config.experts.len();
    on_nodes(&vec![0; ranks], 1, quick(), |comm| body(&comm))
}

/// Serves with outputs of 1 until the loop is over.
fn serve_ones(experts: &Experts) -> Vec<usize> {
    let mut served = vec![];
    while let Some(mut batch) = experts.a2e_recv().unwrap() {
        served.push(batch.domain());
        for i in 0..batch.len() {
            batch.output_row::<f32>(i).unwrap().fill(1.0);
        }
        experts.e2a_send(batch).unwrap();
    }
    served
}

fn error<T>(result: Result<T>) -> Error {
    match result {
        Ok(_) => panic!("no error"),
        Err(err) => err,
    }
}

#[test]
fn a_domain_that_pauses_does_not_keep_another_one_waiting() {
    for config in both_ways(group(2, 1, 2)) {
        on_one_node(&config, |comm| {
            if config.role_of(comm.rank()) == Some(Role::Experts) {
                let served = serve_ones(&Experts::new(comm, config.clone()).unwrap());
                // The last two of domain 0 may come in either order with it here: the other rank had their tokens.
                assert!(served.iter().position(|&domain| domain == 1) >= Some(8), "{served:?}");
                assert_eq!(served.iter().filter(|&&domain| domain == 0).count(), 10);
                return;
            }
            let attention = Attention::new(comm, config.clone()).unwrap();
            let mut out = [0.0f32; HIDDEN];
            if attention.domain() == 0 {
                for _ in 0..10 {
                    let sent = attention.a2e_send(&[2.0f32; HIDDEN], &Routing::new(&[2i32], &[1.0])).unwrap();
                    attention.e2a_recv(sent, &mut out).unwrap();
                    assert_eq!(out, [1.0; HIDDEN]);
                }
                comm.send(1, 1, b"").unwrap();
            } else {
                comm.recv(0, 1, &mut []).unwrap();
                let sent = attention.a2e_send(&[2.0f32; HIDDEN], &Routing::new(&[0i32], &[3.0])).unwrap();
                attention.e2a_recv(sent, &mut out).unwrap();
                assert_eq!(out, [3.0; HIDDEN]);
            }
        });
    }
}

#[test]
fn domains_that_are_both_ready_are_served_in_turn() {
    for config in both_ways(group(3, 1, 1)) {
        on_one_node(&config, |comm| {
            if config.role_of(comm.rank()) == Some(Role::Experts) {
                let experts = Experts::new(comm, config.clone()).unwrap();
                comm.barrier().unwrap();
                assert_eq!(serve_ones(&experts), [0, 1, 2, 0, 1, 2]);
                return;
            }
            let attention = Attention::new(comm, config.clone()).unwrap();
            let send = || attention.a2e_send::<f32, i32>(&[], &Routing::new(&[], &[])).unwrap();
            let sent = [send(), send()];
            comm.barrier().unwrap();
            sent.into_iter().for_each(|sent| attention.e2a_recv::<f32>(sent, &mut []).unwrap());
        });
    }
}

#[test]
fn a_third_micro_batch_in_flight_is_refused() {
    for config in both_ways(group(1, 1, 1)) {
        on_one_node(&config, |comm| {
            if comm.rank() == 1 {
                serve_ones(&Experts::new(comm, config.clone()).unwrap());
                return;
            }
            let attention = Attention::new(comm, config.clone()).unwrap();
            let send = || attention.a2e_send::<f32, i32>(&[], &Routing::new(&[], &[]));
            let sent = [send().unwrap(), send().unwrap()];
            assert!(matches!(error(send()), Error::TooManyInFlight { limit: 2, oldest: 1 }));
            sent.into_iter().for_each(|sent| attention.e2a_recv::<f32>(sent, &mut []).unwrap());
        });
    }
}

#[test]
fn bad_input_is_told_to_the_loop_once_and_the_corrected_one_is_served() {
    for nodes in [[0, 0, 0], [0, 1, 1]] {
        let config = group(1, 1, 2);
        for config in both_ways(config) {
            on_nodes(&nodes, 5, quick(), |comm| {
                let comm = &comm;
                if comm.rank() > 0 {
                    let experts = Experts::new(comm, config.clone()).unwrap();
                    assert!(matches!(error(experts.a2e_recv()), Error::PeerRefused { rank: 0, epoch: 1 }));
                    comm.barrier().unwrap();
                    assert_eq!(serve_ones(&experts), [0]);
                    return;
                }
                let attention = Attention::new(comm, config.clone()).unwrap();
                let bad = attention.a2e_send(&[1.0f32; HIDDEN], &Routing::new(&[3i32], &[1.0]));
                assert!(matches!(error(bad), Error::ExpertOutOfRange { expert: 3, experts: 3, .. }));
                comm.barrier().unwrap();
                let sent = attention.a2e_send(&[1.0f32; HIDDEN], &Routing::new(&[2i32], &[1.0])).unwrap();
                let mut out = [0.0f32; HIDDEN];
                attention.e2a_recv(sent, &mut out).unwrap();
                assert_eq!(out, [1.0; HIDDEN]);
            });
        }
    }
}

#[test]
fn a_micro_batch_that_is_given_up_is_told_and_the_next_one_is_served() {
    for nodes in [[0, 0], [0, 1]] {
        let config = group(1, 1, 1);
        for config in both_ways(config) {
            on_nodes(&nodes, 6, quick(), |comm| {
                let comm = &comm;
                if comm.rank() == 1 {
                    let experts = Experts::new(comm, config.clone()).unwrap();
                    drop(experts.a2e_recv().unwrap());
                    assert_eq!(serve_ones(&experts), [0, 0]);
                    return;
                }
                let attention = Attention::new(comm, config.clone()).unwrap();
                let send = || attention.a2e_send(&[1.0f32; HIDDEN], &Routing::new(&[2i32], &[1.0])).unwrap();
                let mut out = [0.0f32; HIDDEN];
                let given_up = attention.e2a_recv(send(), &mut out);
                assert!(matches!(error(given_up), Error::PeerAbandoned { rank: 1, epoch: 1 }));
                for _ in 0..2 {
                    attention.e2a_recv(send(), &mut out).unwrap();
                    assert_eq!(out, [1.0; HIDDEN]);
                }
            });
        }
    }
}

#[test]
fn a_shutdown_ends_all_loops_at_once_and_tells_the_other_attention_ranks() {
    for nodes in [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 0]] {
        let config = RoleConfig::new([[0], [1]], [2, 3], MoeConfig::new(4, HIDDEN, 1, 3, DType::F32));
        for config in both_ways(config) {
            on_nodes(&nodes, 7, quick(), |comm| {
                let comm = &comm;
                match comm.rank() {
                    0 => {
                        let attention = Attention::new(comm, config.clone()).unwrap();
                        let sent = attention.a2e_send(&[1.0f32; HIDDEN], &Routing::new(&[0i32], &[1.0])).unwrap();
                        attention.e2a_recv(sent, &mut [0.0f32; HIDDEN]).unwrap();
                        attention.shut_down();
                        comm.barrier().unwrap();
                    }
                    1 => {
                        let attention = Attention::new(comm, config.clone()).unwrap();
                        comm.barrier().unwrap();
                        let tokens = [1.0f32; HIDDEN * 2];
                        let sent = attention.a2e_send(&tokens, &Routing::new(&[0i32, 2], &[1.0; 2])).unwrap();
                        let err = error(attention.e2a_recv(sent, &mut [0.0f32; HIDDEN * 2]));
                        let left = matches!(err, Error::PeerLeft { .. } | Error::PeerAbandoned { epoch: 1, .. });
                        assert!(left, "{err}");
                    }
                    me => {
                        let experts = Experts::new(comm, config.clone()).unwrap();
                        assert_eq!(serve_ones(&experts), [0]);
                        assert_eq!(experts.ended(), Some(Ended::ShutDown { by: 0 }), "rank {me}");
                        comm.barrier().unwrap();
                    }
                }
            });
        }
    }
}

#[test]
fn an_abort_ends_the_loops() {
    for config in both_ways(group(1, 2, 2)) {
        // Who ends its handle says that it is done: not before the loops have ended.
        let ended = std::sync::Barrier::new(4);
        on_one_node(&config, |comm| match config.role_of(comm.rank()).unwrap() {
            Role::Experts => {
                let experts = Experts::new(comm, config.clone()).unwrap();
                assert!(experts.a2e_recv().unwrap().is_none());
                assert_eq!(experts.ended(), Some(Ended::Aborted { by: 0 }));
                ended.wait();
            }
            Role::Attention { .. } => {
                let _attention = Attention::new(comm, config.clone()).unwrap();
                if comm.rank() == 0 {
                    comm.abort();
                }
                ended.wait();
            }
        });
    }
}

#[test]
fn an_attention_rank_that_is_done_before_its_domain_is_told_to_the_loop_and_to_the_domain() {
    for nodes in [[0; 4], [0, 1, 1, 0]] {
        let domains = [vec![0, 1], vec![2]];
        let config = RoleConfig::new(domains, [3], MoeConfig::new(4, HIDDEN, 1, 3, DType::F32));
        for config in both_ways(config) {
            on_nodes(&nodes, 8, quick(), |comm| {
                let comm = &comm;
                match comm.rank() {
                    3 => {
                        let experts = Experts::new(comm, config.clone()).unwrap();
                        let err = error(experts.a2e_recv());
                        assert!(matches!(err, Error::PeerLeft { rank: 1, epoch: 1, .. }), "{err}");
                        comm.barrier().unwrap();
                        // The other domain goes on.
                        assert_eq!(serve_ones(&experts), [1]);
                    }
                    rank => {
                        let attention = Attention::new(comm, config.clone()).unwrap();
                        let send = || attention.a2e_send(&[1.0f32; HIDDEN], &Routing::new(&[2i32], &[1.0])).unwrap();
                        let mut out = [0.0f32; HIDDEN];
                        match rank {
                            0 => {
                                let sent = send();
                                let err = error(attention.e2a_recv(sent, &mut out));
                                let left = matches!(
                                    err,
                                    Error::PeerLeft { rank: 3, .. } | Error::PeerAbandoned { rank: 3, .. }
                                );
                                assert!(left, "{err}");
                                comm.barrier().unwrap();
                            }
                            1 => {
                                drop(attention);
                                comm.barrier().unwrap();
                            }
                            _ => {
                                comm.barrier().unwrap();
                                attention.e2a_recv(send(), &mut out).unwrap();
                            }
                        }
                    }
                }
            });
        }
    }
}

#[test]
fn wrong_roles_are_told_to_every_rank_with_both_values() {
    let good = group(1, 2, 1);
    let make = |comm: &Communicator, config: RoleConfig| match comm.rank() {
        2 => error(Experts::new(comm, config)),
        _ => error(Attention::new(comm, config)),
    };
    let all = |expected: &str, of: &(dyn Fn(usize) -> RoleConfig + Sync)| {
        for err in on_one_node(&good, |comm| make(comm, of(comm.rank())).to_string()) {
            assert!(err.contains(expected), "{expected:?} is not in {err:?}");
        }
    };
    let with = |attention: Vec<Vec<usize>>, experts: Vec<usize>| RoleConfig { attention, experts, ..good.clone() };
    all("rank 1 is named as attention of domain 0 and as experts", &|_| with(vec![vec![0, 1]], vec![1, 2]));
    all("rank 1 is named as attention of domain 0 and as attention of domain 1", &|_| {
        with(vec![vec![0, 1], vec![1]], vec![2])
    });
    all("rank 1 of 3 has no role", &|_| with(vec![vec![0]], vec![2]));
    all("rank 3 does not exist", &|_| with(vec![vec![0, 1]], vec![2, 3]));
    all("one domain or more", &|_| with(vec![], vec![0, 1, 2]));
    all("ascending", &|_| with(vec![vec![1, 0]], vec![2]));
    all("RoleConfig::experts", &|_| with(vec![vec![0, 1, 2]], vec![]));
    all("expert 1 is placed on rank 0, which is attention of domain 0", &|_| {
        let moe = MoeConfig { placement: Placement::of_ranks(&[2, 0, 2], 3).ok(), ..good.moe.clone() };
        RoleConfig { moe, ..good.clone() }
    });
    all("2 experts", &|_| {
        let moe = MoeConfig { placement: Placement::of_ranks(&[2, 2], 3).ok(), ..good.moe.clone() };
        RoleConfig { moe, ..good.clone() }
    });
    all("has the role configuration", &|rank| match rank {
        1 => with(vec![vec![0, 1]], vec![]),
        _ => good.clone(),
    });
    // The right configuration, and the handle of the other role.
    for err in on_one_node(&good, |comm| match comm.rank() {
        1 | 2 => error(Experts::new(comm, good.clone())).to_string(),
        _ => error(Attention::new(comm, good.clone())).to_string(),
    }) {
        assert!(
            err.contains("rank 1 makes a handle for experts, RoleConfig names it as attention of domain 0"),
            "{err}"
        );
    }
}

#[test]
fn no_memory_is_taken_for_the_other_role() {
    let config = MoeConfig { reduction: Reduction::PerRank, ..MoeConfig::new(64, 1024, 4, 8, DType::F32) };
    let config = RoleConfig { moe: config, ..group(2, 2, 2) };
    on_one_node(&config, |comm| {
        let row = 1024 * 4;
        match config.role_of(comm.rank()).unwrap() {
            Role::Experts => {
                let experts = Experts::new(comm, config.clone()).unwrap();
                for moe in &experts.domains {
                    // Outputs and sums of two sources in two slots.
                    let rows = 2 * 2 * 64 * (4 + 1);
                    let bytes = moe.outbox_address(comm.rank()).unwrap().1;
                    assert!((rows * row..rows * row + 40_000).contains(&bytes), "{bytes}");
                    assert!(moe.peers.get(5).is_none() && moe.peers.get(4).is_none());
                }
                assert!(experts.a2e_recv().unwrap().is_none());
            }
            Role::Attention { domain } => {
                let attention = Attention::new(comm, config.clone()).unwrap();
                let bytes = attention.moe.outbox_address(comm.rank()).unwrap().1;
                assert!((2 * 64 * row..2 * 64 * row + 40_000).contains(&bytes), "{bytes}");
                let maps = |rank: usize| attention.moe.peers.get(rank).is_some();
                assert_eq!((0..6).filter(|&rank| maps(rank)).collect::<Vec<_>>(), [4, 5], "domain {domain}");
            }
        }
    });
}
