//! Exchanges among ranks of several nodes, on a network that reorders and delays, against a plain reference.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::comm::Config;
use crate::comm::far_tests::on_nodes;
use crate::dtype::DType;

const HIDDEN: usize = 24;

/// One exchange: by rank, by token, the experts it names.
type Routings = Vec<Vec<Vec<i64>>>;

#[derive(Clone, Debug)]
struct Case {
    nodes: Vec<usize>,
    experts: usize,
    topk: usize,
    placement: Option<Vec<usize>>,
    reduction: Reduction,
    wire: WireFormat,
    exchanges: Vec<Routings>,
    lanes: usize,
}

fn case() -> impl Strategy<Value = Case> {
    let nodes = prop::collection::vec(0usize..3, 2..7);
    let nodes = nodes.prop_filter("several nodes", |nodes| nodes.iter().any(|n| *n != nodes[0]));
    let shape = (nodes, 2usize..12, 1usize..5);
    shape.prop_flat_map(|(nodes, experts, topk)| {
        let (ranks, topk) = (nodes.len(), topk.min(experts));
        let all: Vec<i64> = (0..experts as i64).collect();
        let token = (Just(all).prop_shuffle(), prop::collection::vec(prop::bool::weighted(0.2), topk));
        let token = token.prop_map(|(experts, holes)| {
            experts.into_iter().zip(holes).map(|(e, hole)| if hole { -1 } else { e }).collect::<Vec<_>>()
        });
        let routings = prop::collection::vec(prop::collection::vec(token, 0..9), ranks);
        let placement = prop::option::of(prop::collection::vec(0..ranks, experts));
        let reduction = prop_oneof![Just(Reduction::PerExpert), Just(Reduction::PerRank)];
        let wire = prop_oneof![Just(WireFormat::Native), Just(WireFormat::Fp8E4m3)];
        let rest = (placement, reduction, wire, prop::collection::vec(routings, 1..6), 1usize..4);
        rest.prop_map(move |(placement, reduction, wire, exchanges, lanes)| Case {
            nodes: nodes.clone(),
            experts,
            topk,
            placement,
            reduction,
            wire,
            exchanges,
            lanes,
        })
    })
}

/// Small whole numbers: no sum of them is rounded.
fn value(exchange: usize, rank: usize, token: usize, column: usize) -> f32 {
    ((exchange + rank * 3 + token * 5 + column) % 9) as f32 - 4.0
}

fn output(expert: i64, x: f32) -> f32 {
    x * (expert % 4) as f32 + 1.0
}

fn weight(token: usize, k: usize) -> f32 {
    [0.5, 1.0, 2.0][(token + k) % 3]
}

/// What a token gets, in the plainest way.
fn expected(exchange: usize, rank: usize, token: usize, ids: &[i64], column: usize) -> f32 {
    let term = |(k, &e): (usize, &i64)| weight(token, k) * output(e, value(exchange, rank, token, column));
    ids.iter().enumerate().filter(|(_, e)| **e >= 0).map(term).sum()
}

struct Scoped;

impl Lanes for Scoped {
    fn run(&self, lanes: usize, work: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|s| (0..lanes).for_each(|lane| _ = s.spawn(move || work(lane))));
    }
}

fn send<'m>(moe: &'m Moe, case: &Case, e: usize, me: usize) -> Exchange<'m> {
    let routing = &case.exchanges[e][me];
    let tokens: Vec<f32> = (0..routing.len()).flat_map(|t| (0..HIDDEN).map(move |c| value(e, me, t, c))).collect();
    let weights: Vec<f32> = (0..routing.len()).flat_map(|t| (0..case.topk).map(move |k| weight(t, k))).collect();
    moe.dispatch_send(&tokens, &Routing::new(&routing.concat(), &weights)).unwrap()
}

fn compute(moe: &Moe, mut batch: ExpertBatch<'_>) {
    for i in 0..batch.len() {
        let mut row = [0.0f32; HIDDEN];
        batch.copy_row(i, &mut row).unwrap();
        let expert = batch.local_experts()[batch.row(i).expert] as i64;
        batch.output_row::<f32>(i).unwrap().copy_from_slice(&row.map(|x| output(expert, x)));
    }
    moe.combine_send(batch).unwrap();
}

fn check(moe: &Moe, case: &Case, e: usize, me: usize, sent: Exchange<'_>) {
    let routing = &case.exchanges[e][me];
    let mut out = vec![f32::NAN; routing.len() * HIDDEN];
    moe.combine_recv(sent, &mut out).unwrap();
    for (t, (ids, row)) in routing.iter().zip(out.chunks_exact(HIDDEN)).enumerate() {
        for (c, x) in row.iter().enumerate() {
            let y = expected(e, me, t, ids, c);
            // Quantized numbers are only near.
            let tolerance = if case.wire == WireFormat::Native { 0.0 } else { 4.0 };
            assert!((x - y).abs() <= tolerance, "{x} for {y}: exchange {e}, token {t} of rank {me}, channel {c}");
        }
    }
}

/// All exchanges of a case, two in flight; and what the counters must say.
fn run(comm: &Communicator, case: &Case) {
    let (me, ranks) = (comm.rank(), comm.world_size());
    let config = MoeConfig {
        reduction: case.reduction,
        wire: case.wire,
        placement: case.placement.clone(),
        ..MoeConfig::new(9, HIDDEN, case.topk, case.experts, DType::F32)
    };
    let moe = Moe::new(comm, config).unwrap();
    moe.set_lanes(case.lanes, Arc::new(Scoped)).unwrap();
    let mut before: Option<(usize, Exchange<'_>)> = None;
    for e in 0..case.exchanges.len() {
        let sent = send(&moe, case, e, me);
        compute(&moe, moe.dispatch_recv(&sent).unwrap());
        if let Some((e, sent)) = before.replace((e, sent)) {
            check(&moe, case, e, me, sent);
        }
    }
    if let Some((e, sent)) = before {
        check(&moe, case, e, me, sent);
    }

    // A row crosses once per node that has experts of it; a sum comes back for each.
    let node_of = |expert: i64| case.nodes[moe.placement.rank[expert as usize] as usize];
    let crossings = |rank: usize| {
        let tokens = case.exchanges.iter().flat_map(move |routings| &routings[rank]);
        tokens.map(move |ids| {
            let nodes: BTreeSet<_> = ids.iter().filter(|e| **e >= 0).map(|e| node_of(*e)).collect();
            nodes.iter().filter(|n| **n != case.nodes[rank]).count() as u64
        })
    };
    let statistics = comm.statistics();
    assert_eq!(statistics.far_rows, crossings(me).sum::<u64>());
    let all = |mine: u64| {
        comm.barrier().unwrap();
        comm.send(0, 77, &mine.to_ne_bytes()).unwrap();
        let total = (me == 0).then(|| {
            (0..ranks).map(|from| {
                let mut bytes = [0; 8];
                comm.recv(from, 77, &mut bytes).unwrap();
                u64::from_ne_bytes(bytes)
            })
        });
        total.map(Iterator::sum::<u64>)
    };
    // Whoever has its sums knows that they were counted.
    comm.barrier().unwrap();
    if let Some(sums) = all(comm.statistics().far_sums) {
        assert_eq!(sums, (0..ranks).map(|rank| crossings(rank).sum::<u64>()).sum::<u64>());
    }
    comm.barrier().unwrap();
}

fn quick() -> Config {
    Config::default().timeout(Some(Duration::from_secs(30))).heap_bytes(1 << 16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sums_are_right_and_each_row_crosses_once_per_node(case in case(), seed: u64) {
        on_nodes(&case.nodes, seed, quick(), |comm| run(&comm, &case));
    }
}

#[test]
fn two_nodes_of_two_ranks_over_the_real_network() {
    let tokens = |rank: usize, e: usize| {
        (0..8).map(move |t| vec![((t + rank + e) % 8) as i64, ((t * 3 + e + 1 + rank) % 8) as i64])
    };
    let distinct = |ids: Vec<i64>| if ids[0] == ids[1] { vec![ids[0], -1] } else { ids };
    let exchanges = (0..20).map(|e| (0..4).map(|rank| tokens(rank, e).map(distinct).collect()).collect()).collect();
    let case = Case {
        nodes: vec![0, 0, 1, 1],
        experts: 8,
        topk: 2,
        placement: None,
        reduction: Reduction::PerExpert,
        wire: WireFormat::Native,
        exchanges,
        lanes: 1,
    };
    on_nodes(&case.nodes, None, quick(), |comm| run(&comm, &case));
}

#[test]
fn a_refused_input_and_an_abandoned_batch_are_told_to_other_nodes() {
    on_nodes(&[0, 1, 1], 11, quick(), |comm| {
        let moe = Moe::new(&comm, MoeConfig::new(4, HIDDEN, 1, 3, DType::F32)).unwrap();
        let (ids, weights) = ([2i64], [1.0]);
        let tokens = [1.0f32; HIDDEN];
        // Rank 0's input is bad at first.
        if comm.rank() == 0 {
            let error = moe.dispatch_send(&tokens, &Routing::new(&[7i64], &weights)).err().unwrap();
            assert!(matches!(error, Error::ExpertOutOfRange { .. }));
        } else {
            let sent = moe.dispatch_send(&tokens, &Routing::new(&ids, &weights)).unwrap();
            let error = moe.dispatch_recv(&sent).err().unwrap();
            assert!(matches!(error, Error::PeerRefused { rank: 0, epoch: 1 }), "{error}");
            comm.barrier().unwrap();
            // What rank 0 sends then may still be under way.
            let batch = loop {
                match moe.dispatch_recv(&sent) {
                    Ok(batch) => break batch,
                    Err(error) => assert!(matches!(error, Error::PeerRefused { .. }), "{error}"),
                }
            };
            // Rank 2 gives up, which everybody's token went to.
            match comm.rank() {
                2 => drop(batch),
                _ => moe.combine_send(batch).unwrap(),
            }
            let error = moe.combine_recv(sent, &mut [0.0f32; HIDDEN]).err().unwrap();
            let is_told = matches!(error, Error::PeerAbandoned { rank: 2, epoch: 1 } | Error::WrongOrder { .. });
            assert!(is_told, "{error}");
        }
        if comm.rank() == 0 {
            comm.barrier().unwrap();
            let sent = moe.dispatch_send(&tokens, &Routing::new(&ids, &weights)).unwrap();
            moe.combine_send(moe.dispatch_recv(&sent).unwrap()).unwrap();
            let error = moe.combine_recv(sent, &mut [0.0f32; HIDDEN]).err().unwrap();
            assert!(matches!(error, Error::PeerAbandoned { epoch: 1, .. }), "{error}");
        }
        // And all is well afterwards.
        for _ in 0..4 {
            let sent = moe.dispatch_send(&tokens, &Routing::new(&ids, &weights)).unwrap();
            let mut batch = moe.dispatch_recv(&sent).unwrap();
            for i in 0..batch.len() {
                batch.output_row::<f32>(i).unwrap().fill(3.0);
            }
            moe.combine_send(batch).unwrap();
            let mut out = [0.0f32; HIDDEN];
            moe.combine_recv(sent, &mut out).unwrap();
            assert_eq!(out, [3.0; HIDDEN]);
        }
        comm.barrier().unwrap();
    });
}
