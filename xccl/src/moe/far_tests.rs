//! Exchanges among ranks of one node or several, on a network that reorders and delays, against a plain reference.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;

use super::placement::Placement;
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
    shared: usize,
    /// Zero, copy and constant experts.
    specials: [usize; 3],
    /// The placement of each exchange: where it differs from the one before, it is installed.
    placements: Vec<Placement>,
    reduction: Reduction,
    wire: WireFormat,
    exchanges: Vec<Routings>,
    lanes: usize,
    /// Whether an exchange is received only when the next one was sent.
    late: bool,
}

/// Any placement of so many experts: mostly one replica of each, or several.
fn placement(experts: usize, ranks: usize) -> impl Strategy<Value = Placement> {
    let homes = prop_oneof![
        prop::collection::vec(prop::collection::vec(0..ranks, 1), experts),
        // Also twice on a rank.
        prop::collection::vec(prop::collection::vec(0..ranks, 1..=ranks + 1), experts),
    ];
    (homes, any::<usize>()).prop_map(move |(homes, turn)| {
        let mut slots = vec![vec![]; ranks];
        for (expert, ranks) in homes.iter().enumerate() {
            for &rank in ranks {
                let at = (expert ^ turn) % (slots[rank].len() + 1);
                slots[rank].insert(at, expert);
            }
        }
        Placement::new(experts, slots).unwrap()
    })
}

fn case() -> impl Strategy<Value = Case> {
    let nodes = prop_oneof![
        prop::collection::vec(0usize..3, 2..7).prop_filter("several nodes", |n| n.iter().any(|x| *x != n[0])),
        prop::collection::vec(0usize..1, 1..5),
    ];
    let specials = prop_oneof![Just([0; 3]), prop::array::uniform3(0usize..3)];
    let shape = (nodes, 2usize..12, 1usize..5, prop_oneof![Just(0usize), 0usize..3], specials);
    shape.prop_flat_map(|(nodes, experts, topk, shared, specials)| {
        let (ranks, named) = (nodes.len(), experts + specials.iter().sum::<usize>());
        let topk = topk.min(named);
        let all: Vec<i64> = (0..named as i64).collect();
        let token = (Just(all).prop_shuffle(), prop::collection::vec(prop::bool::weighted(0.2), topk));
        let token = token.prop_map(|(experts, holes)| {
            experts.into_iter().zip(holes).map(|(e, hole)| if hole { -1 } else { e }).collect::<Vec<_>>()
        });
        let routings = prop::collection::vec(prop::collection::vec(token, 0..9), ranks);
        let reduction = prop_oneof![Just(Reduction::PerExpert), Just(Reduction::PerRank)];
        let wire = prop_oneof![Just(WireFormat::Native), Just(WireFormat::Fp8E4m3)];
        let placements = prop::collection::vec(placement(experts + shared, ranks), 1..4);
        let exchanges = prop::collection::vec((routings, any::<prop::sample::Index>()), 1..6);
        let rest = (placements, reduction, wire, exchanges, 1usize..4, any::<bool>());
        rest.prop_map(move |(placements, reduction, wire, exchanges, lanes, late)| {
            let (exchanges, which): (Vec<_>, Vec<_>) = exchanges.into_iter().unzip();
            Case {
                nodes: nodes.clone(),
                experts,
                topk,
                shared,
                specials,
                placements: which.into_iter().map(|which| which.get(&placements).clone()).collect(),
                reduction,
                wire,
                exchanges,
                lanes,
                late,
            }
        })
    })
}

/// A choice of one token, in the plainest way.
struct Chosen {
    token: usize,
    /// Logical.
    expert: usize,
    weight: f32,
    /// Rank and slot, unless it needs none.
    place: Option<(usize, usize)>,
}

impl Case {
    /// What the tokens of `source` choose, token by token, each in ascending k, shared experts last.
    fn chosen(&self, e: usize, source: usize) -> Vec<Chosen> {
        let (placement, mut named) = (&self.placements[e], vec![0; self.experts + self.shared]);
        let mut all = vec![];
        for (token, ids) in self.exchanges[e][source].iter().enumerate() {
            let mut place = |expert: usize| {
                named[expert] += 1;
                placement.choose(expert, source, named[expert] - 1, &self.nodes)
            };
            for (k, &id) in ids.iter().enumerate().filter(|(_, id)| **id >= 0) {
                let expert = id as usize;
                let (weight, is_special) = (weight(token, k), expert >= self.experts);
                let (expert, place) = match is_special {
                    false => (expert, place(expert)),
                    // Beyond those with slots.
                    true => (expert + self.shared, None),
                };
                all.push(Chosen { token, expert, weight, place });
            }
            for expert in self.experts..self.experts + self.shared {
                all.push(Chosen { token, expert, weight: 1.0, place: place(expert) });
            }
        }
        all
    }

    /// What an expert gives for `x`.
    fn given(&self, expert: usize, x: f32, column: usize) -> f32 {
        let [zero, copy, _] = self.specials;
        match expert.checked_sub(self.experts + self.shared) {
            None => output(expert as i64, x),
            Some(special) if special < zero => 0.0,
            Some(special) if special < zero + copy => x,
            Some(special) => {
                let (token, vector) = factors(special - zero - copy);
                token * x + vector * constant(special - zero - copy, column)
            }
        }
    }
}

/// What constant experts are made of.
fn factors(expert: usize) -> (f32, f32) {
    [(0.0, 1.0), (2.0, 0.0), (1.0, -2.0)][expert % 3]
}

fn constant(expert: usize, column: usize) -> f32 {
    (expert * 5 + column % 3) as f32
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
fn expected(case: &Case, e: usize, rank: usize, chosen: &[Chosen], token: usize, column: usize) -> f32 {
    let x = value(e, rank, token, column);
    chosen.iter().filter(|c| c.token == token).map(|c| c.weight * case.given(c.expert, x, column)).sum()
}

struct Scoped;

impl Lanes for Scoped {
    fn run(&self, lanes: usize, work: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|s| (0..lanes).for_each(|lane| _ = s.spawn(move || work(lane))));
    }
}

fn tokens_of(case: &Case, e: usize, me: usize) -> Vec<f32> {
    let tokens = case.exchanges[e][me].len();
    (0..tokens).flat_map(|t| (0..HIDDEN).map(move |c| value(e, me, t, c))).collect()
}

fn send<'m>(moe: &'m Moe, case: &Case, e: usize, me: usize) -> Exchange<'m> {
    let routing = &case.exchanges[e][me];
    let weights: Vec<f32> = (0..routing.len()).flat_map(|t| (0..case.topk).map(move |k| weight(t, k))).collect();
    moe.dispatch_send(&tokens_of(case, e, me), &Routing::new(&routing.concat(), &weights)).unwrap()
}

/// The rows that come to this rank, in order: logical expert, slot, source, token, weight.
fn rows_for(case: &Case, e: usize, me: usize) -> Vec<(usize, usize, usize, usize, f32)> {
    let mut rows = vec![];
    for (slot, &expert) in case.placements[e].slots(me).iter().enumerate() {
        for source in 0..case.nodes.len() {
            let here = case.chosen(e, source).into_iter().filter(|c| c.place == Some((me, slot)));
            rows.extend(here.map(|c| (expert, slot, source, c.token, c.weight)));
        }
    }
    rows
}

fn compute(moe: &Moe, case: &Case, e: usize, me: usize, sent: &Exchange<'_>) {
    let mut batch = moe.dispatch_recv(sent).unwrap();
    let rows = batch.rows().map(|r| (batch.local_experts()[r.expert], r.expert, r.source, r.token, r.weight));
    assert_eq!(rows.collect::<Vec<_>>(), rows_for(case, e, me));
    for i in 0..batch.len() {
        let mut row = [0.0f32; HIDDEN];
        batch.copy_row(i, &mut row).unwrap();
        let expert = batch.local_experts()[batch.row(i).expert] as i64;
        batch.output_row::<f32>(i).unwrap().copy_from_slice(&row.map(|x| output(expert, x)));
    }
    moe.combine_send(batch).unwrap();
}

fn check(moe: &Moe, case: &Case, e: usize, me: usize, sent: Exchange<'_>) {
    let (tokens, chosen) = (tokens_of(case, e, me), case.chosen(e, me));
    let mut out = vec![f32::NAN; tokens.len()];
    let named = (case.wire != WireFormat::Native).then_some(&tokens[..]);
    moe.combine_recv_with(sent, &mut out, Epilogue { tokens: named, ..Epilogue::default() }).unwrap();
    for (t, row) in out.chunks_exact(HIDDEN).enumerate() {
        for (c, x) in row.iter().enumerate() {
            let y = expected(case, e, me, &chosen, t, c);
            // Quantized numbers are only near.
            let tolerance = if case.wire == WireFormat::Native { 0.0 } else { 4.0 };
            assert!((x - y).abs() <= tolerance, "{x} for {y}: exchange {e}, token {t} of rank {me}, channel {c}");
        }
    }
}

/// All exchanges of a case, two in flight, each by its placement; and what the counters must say.
fn run(comm: &Communicator, case: &Case) {
    let (me, ranks) = (comm.rank(), comm.world_size());
    let [zero, copy, constants] = case.specials;
    let vectors: Vec<f32> = (0..constants).flat_map(|i| (0..HIDDEN).map(move |c| constant(i, c))).collect();
    let (of_tokens, of_vectors): (Vec<f32>, Vec<f32>) = (0..constants).map(factors).unzip();
    let config = MoeConfig {
        reduction: case.reduction,
        wire: case.wire,
        placement: Some(case.placements[0].clone()),
        slots: Some(case.placements.iter().map(Placement::most_slots).max().unwrap()),
        shared: case.shared,
        zero,
        copy,
        constant: (constants > 0).then(|| ConstantExperts::new(vectors).factors(of_tokens, of_vectors)),
        ..MoeConfig::new(9, HIDDEN, case.topk, case.experts, DType::F32)
    };
    let moe = Moe::new(comm, config).unwrap();
    moe.set_lanes(case.lanes, Arc::new(Scoped)).unwrap();
    let mut before: Option<(usize, Exchange<'_>)> = None;
    for e in 0..case.exchanges.len() {
        if e > 0 && case.placements[e] != case.placements[e - 1] {
            assert_eq!(moe.install(&case.placements[e]).unwrap(), e as u64 + 1);
        }
        let sent = send(&moe, case, e, me);
        if !case.late {
            compute(&moe, case, e, me, &sent);
        }
        if let Some((e, sent)) = before.replace((e, sent)) {
            if case.late {
                compute(&moe, case, e, me, &sent);
            }
            check(&moe, case, e, me, sent);
        }
    }
    if let Some((e, sent)) = before {
        if case.late {
            compute(&moe, case, e, me, &sent);
        }
        check(&moe, case, e, me, sent);
    }

    // Tokens by expert, rows by slot.
    let most = case.placements.iter().map(Placement::most_slots).max().unwrap();
    let (mut by_expert, mut by_slot) = (vec![0i64; case.experts], vec![0i64; most]);
    for e in 0..case.exchanges.len() {
        let named = case.chosen(e, me).into_iter().filter(|c| c.expert < case.experts);
        named.for_each(|c| by_expert[c.expert] += 1);
        rows_for(case, e, me).iter().for_each(|row| by_slot[row.1] += 1);
    }
    let mut counts = vec![-1; case.experts];
    moe.take_expert_counts(CountForm::Each, &mut counts).unwrap();
    assert_eq!(counts, by_expert);
    moe.take_expert_counts(CountForm::PrefixSums, &mut counts).unwrap();
    assert!(counts.iter().all(|&count| count == 0));
    let mut counts = vec![-1; moe.experts_of(me).unwrap().len()];
    moe.take_slot_counts(CountForm::PrefixSums, &mut counts).unwrap();
    for (slot, &count) in counts.iter().enumerate() {
        assert_eq!(count, by_slot[..=slot].iter().sum::<i64>());
    }

    // A row crosses once per node that has experts of it; a sum comes back for each.
    let crossings = |rank: usize| {
        let exchanges = (0..case.exchanges.len()).map(move |e| {
            let nodes = case.chosen(e, rank).into_iter().filter_map(|c| Some((c.token, case.nodes[c.place?.0])));
            nodes.filter(|(_, node)| *node != case.nodes[rank]).collect::<BTreeSet<_>>().len() as u64
        });
        exchanges.sum::<u64>()
    };
    let statistics = comm.statistics();
    assert_eq!(statistics.far_rows, crossings(me));
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
        assert_eq!(sums, (0..ranks).map(crossings).sum::<u64>());
    }
    comm.barrier().unwrap();
}

fn quick() -> Config {
    Config::default().timeout(Some(Duration::from_secs(30))).heap_bytes(1 << 16)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

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
        shared: 1,
        specials: [0; 3],
        placements: (0..20)
            .map(|e| {
                let slots = (0..4).map(|rank| vec![rank, rank + 4, (rank + e / 8 + 1) % 4, 8]).collect();
                Placement::new(9, slots).unwrap()
            })
            .collect(),
        reduction: Reduction::PerExpert,
        wire: WireFormat::Native,
        exchanges,
        lanes: 1,
        late: false,
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

/// The bits of what one rank's tokens get from an exchange on one node, with values that round.
fn bits(comm: &Communicator, placement: &Placement, shared: usize, routing: &[Vec<i64>]) -> Vec<u32> {
    let (topk, experts) = (routing[0].len(), placement.experts() - shared);
    let specials = MoeConfig {
        zero: 1,
        copy: 1,
        constant: Some(ConstantExperts::new([0.3; HIDDEN])),
        ..MoeConfig::new(9, HIDDEN, topk, experts, DType::F32)
    };
    let config = MoeConfig { placement: Some(placement.clone()), shared, ..specials };
    let moe = Moe::new(comm, config).unwrap();
    let value = |t: usize, c: usize| 0.1 + (t * 7 + c) as f32 / 3.0;
    let tokens: Vec<f32> = (0..routing.len()).flat_map(|t| (0..HIDDEN).map(move |c| value(t, c))).collect();
    let weights: Vec<f32> = (0..routing.len() * topk).map(|i| 1.0 / (i as f32 + 3.0)).collect();
    let sent = moe.dispatch_send(&tokens, &Routing::new(&routing.concat(), &weights)).unwrap();
    let mut batch = moe.dispatch_recv(&sent).unwrap();
    let given = |expert: usize, x: f32| x / (expert as f32 + 1.1);
    for i in 0..batch.len() {
        let mut row = [0.0f32; HIDDEN];
        batch.copy_row(i, &mut row).unwrap();
        let expert = batch.local_experts()[batch.row(i).expert];
        batch.output_row::<f32>(i).unwrap().copy_from_slice(&row.map(|x| given(expert, x)));
    }
    moe.combine_send(batch).unwrap();
    let mut out = vec![f32::NAN; tokens.len()];
    moe.combine_recv(sent, &mut out).unwrap();
    for (i, y) in out.iter().enumerate() {
        let (t, x) = (i / HIDDEN, tokens[i]);
        let mut sum = 0.0f32;
        for (k, &id) in routing[t].iter().enumerate().filter(|(_, id)| **id >= 0) {
            let weight = weights[t * topk + k];
            match id as usize {
                id if id < experts => sum += weight * given(id, x),
                id if id == experts => {}
                id if id == experts + 1 => sum += weight * x,
                _ => sum += weight * 0.3,
            }
        }
        (experts..experts + shared).for_each(|expert| sum += given(expert, x));
        assert_eq!(y.to_bits(), sum.to_bits(), "{y} for {sum}: element {i}");
    }
    out.iter().map(|x| x.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn sums_have_the_same_bits_for_any_placement_and_any_replicas(
        (placements, ids) in (1usize..5).prop_flat_map(|ranks| {
            let ids = (Just((0..10i64).collect::<Vec<_>>()).prop_shuffle()).prop_map(|ids| ids[..4].to_vec());
            (prop::collection::vec(placement(8, ranks), 3), prop::collection::vec(ids, 1..9))
        }),
    ) {
        // Seven routed experts, one shared one, three that need no slot.
        let ranks = placements[0].ranks();
        let all = on_nodes(&vec![0; ranks], None, quick(), |comm| {
            placements.iter().map(|placement| bits(&comm, placement, 1, &ids)).collect::<Vec<_>>()
        });
        prop_assert!(all.iter().flatten().all(|bits| *bits == all[0][0]));
    }
}

#[test]
fn ranks_that_go_by_different_placements_are_told_of_both() {
    for (nodes, seed) in [(vec![0, 0, 0], None), (vec![0, 1, 1], Some(21))] {
        on_nodes(&nodes, seed, quick(), |comm| {
            let me = comm.rank();
            let config = MoeConfig { slots: Some(3), ..MoeConfig::new(4, HIDDEN, 1, 3, DType::F32) };
            let moe = Moe::new(&comm, config).unwrap();
            let replicated = Placement::new(3, vec![vec![0, 2], vec![1], vec![2, 1]]).unwrap();
            let exchange = || {
                let sent = moe.dispatch_send(&[1.0f32; HIDDEN], &Routing::new(&[2i64], &[1.0])).unwrap();
                let mut batch = moe.dispatch_recv(&sent)?;
                for i in 0..batch.len() {
                    batch.output_row::<f32>(i).unwrap().fill(3.0);
                }
                moe.combine_send(batch).unwrap();
                let mut out = [0.0f32; HIDDEN];
                moe.combine_recv(sent, &mut out).map(|()| assert_eq!(out, [3.0; HIDDEN]))
            };
            exchange().unwrap();
            // Rank 1 installs it one exchange later than the others.
            let mark = || moe.state.borrow().placed.mark;
            let first = mark();
            moe.install(&replicated).unwrap();
            let second = mark();
            if me == 1 {
                moe.install(&Placement::even(3, 3).unwrap()).unwrap();
            }
            for _ in 0..2 {
                let error = exchange().unwrap_err();
                let Error::PlacementMismatch { rank, epoch, theirs, ours } = &error else { panic!("{error}") };
                assert!((*rank == 1) != (me == 1) && (2..=3).contains(epoch), "{error}");
                let (theirs_is, ours_is) = if me == 1 { (second, first) } else { (first, second) };
                assert!(theirs.contains(&format!("{theirs_is:016x}")), "{theirs}");
                assert!(ours.contains(&format!("{ours_is:016x}")), "{ours}");
            }
            moe.install(&replicated).unwrap();
            (0..4).for_each(|_| exchange().unwrap());
            // One that does not fit changes nothing.
            for (slots, named) in [
                (vec![vec![0, 1, 2]; 2], "2 ranks"),
                (vec![vec![0, 1], vec![1], vec![0]], "2 experts"),
                (vec![vec![0, 1, 2, 3], vec![], vec![]], "4 experts"),
            ] {
                let experts = slots.iter().flatten().max().unwrap() + 1;
                let error = moe.install(&Placement::new(experts, slots).unwrap()).unwrap_err();
                assert!(error.to_string().contains(named), "{error}");
            }
            assert_eq!(moe.placement(), replicated);
            exchange().unwrap();
            comm.barrier().unwrap();
        });
    }
}

#[test]
fn a_placement_with_too_many_slots_and_ranks_that_begin_with_different_ones_are_refused() {
    on_nodes(&[0, 0], None, quick(), |comm| {
        let shape = || MoeConfig::new(4, HIDDEN, 1, 3, DType::F32);
        let of = |slots| Some(Placement::new(3, slots).unwrap());
        let wide = MoeConfig { placement: of(vec![vec![0, 1, 2], vec![1]]), slots: Some(2), ..shape() };
        let error = Moe::new(&comm, wide).err().unwrap();
        assert!(error.to_string().contains("3 slots on rank 0"), "{error}");
        let moe = Moe::new(&comm, shape()).unwrap();
        let error = moe.install(&Placement::new(3, vec![vec![0, 1], vec![2, 0]]).unwrap()).unwrap_err();
        assert!(error.to_string().contains("4 slots"), "{error}");
        let differing = of(if comm.rank() == 0 { vec![vec![0, 1], vec![2]] } else { vec![vec![0, 1], vec![2, 0]] });
        let error = Moe::new(&comm, MoeConfig { placement: differing, slots: Some(2), ..shape() }).err().unwrap();
        let text = error.to_string();
        assert!(text.contains("[[0, 1], [2]]") && text.contains("[[0, 1], [2, 0]]"), "{text}");
    });
}
