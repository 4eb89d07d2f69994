//! Calls shared by several threads: the same bits for any number of them, whatever the threads do, and no harm when they fail.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use half::{bf16, f16};
use proptest::prelude::*;
use xccl::{
    Communicator, Config, Element, Epilogue, Error, ExpertBatch, Lanes, Moe, MoeConfig, Reduction, Residual, Result,
    RmsNorm, Routing, ScaleLayout, SmoothScales, UniqueId, WireFormat,
};
use xccl_tests::as_threads;

/// Threads for each call, the last lane first; counts the calls that were shared.
#[derive(Default)]
struct Threads {
    shared: AtomicUsize,
}

impl Lanes for Threads {
    fn run(&self, lanes: usize, work: &(dyn Fn(usize) + Sync)) {
        self.shared.fetch_add(1, Relaxed);
        std::thread::scope(|s| (0..lanes).rev().for_each(|lane| drop(s.spawn(move || work(lane)))));
    }
}

#[derive(Clone, Debug)]
struct Case {
    wire: WireFormat,
    /// Whether rows are multiplied by smooth scales, in int8.
    smooth: bool,
    reduction: Reduction,
    hidden: usize,
    tokens: [usize; 2],
    topk: usize,
    experts: usize,
    seed: u64,
    /// Rows beyond each expert's in the padded layout, and the alignment of the other one.
    slack: usize,
    by_source: bool,
    in_place: bool,
}

const MOST_TOKENS: usize = 90;

fn case() -> impl Strategy<Value = Case> {
    let shape = (1usize..9).prop_flat_map(|topk| (Just(topk), topk..20));
    let reduction = prop_oneof![Just(Reduction::PerExpert), Just(Reduction::PerRank)];
    let flags = (any::<bool>(), any::<bool>());
    let tokens = [0..MOST_TOKENS, 0..MOST_TOKENS];
    let wire = prop::sample::select(vec![
        (WireFormat::Native, false),
        (WireFormat::Int8, false),
        (WireFormat::Int8, true),
        (WireFormat::Fp8E4m3, false),
    ]);
    (wire, reduction, 4000usize..9000, tokens, shape, any::<u64>(), 0usize..5, flags).prop_map(
        |((wire, smooth), reduction, hidden, tokens, (topk, experts), seed, slack, (by_source, in_place))| Case {
            wire,
            smooth,
            reduction,
            hidden,
            tokens,
            topk,
            experts,
            seed,
            slack,
            by_source,
            in_place,
        },
    )
}

/// Numbers that look random, the same on every run.
fn number(seed: u64, i: usize) -> u64 {
    let mut x = seed.wrapping_add((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    for _ in 0..3 {
        x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    }
    x ^ (x >> 32)
}

fn values<E: Element>(seed: u64, n: usize) -> Vec<E> {
    (0..n).map(|i| E::from_f32((number(seed, i) % 4001) as f32 / 250.0 - 8.0)).collect()
}

impl Case {
    fn ids(&self, rank: usize) -> Vec<i64> {
        let token = |t: usize| {
            let start = number(self.seed, 1000 * rank + t) as usize;
            (0..self.topk).map(move |k| match (start + k).is_multiple_of(6) {
                true => -1,
                false => ((start + k) % self.experts) as i64,
            })
        };
        (0..self.tokens[rank]).flat_map(token).collect()
    }

    /// Every result of one exchange, as bytes.
    fn results<E: Element>(&self, comm: &Communicator, moe: &Moe) -> Result<Vec<Vec<u8>>> {
        let (rank, hidden) = (comm.rank(), self.hidden);
        let tokens = values::<E>(self.seed + rank as u64, self.tokens[rank] * hidden);
        let ids = self.ids(rank);
        let weights = values::<f32>(self.seed + 7, ids.len());
        let sent = moe.dispatch_send(&tokens, &Routing::new(&ids, &weights))?;
        let mut batch = match self.by_source {
            true => moe.dispatch_recv_by_source(&sent)?.into_batch()?,
            false => moe.dispatch_recv(&sent)?,
        };
        let most = batch.counts().iter().max().map_or(0, |&n| n as usize);
        let padded_rows = batch.counts().len() * (most + self.slack);
        let mut padded = vec![E::from_f32(0.0); padded_rows * hidden];
        batch.copy_padded(&mut padded, most + self.slack)?;
        // Longer than needed, by less than a row and by more.
        let needed = batch.aligned_rows(self.slack) * hidden;
        let mut aligned = vec![E::from_f32(0.0); needed + self.slack * hidden / 2];
        batch.copy_into(&mut aligned, self.slack)?;
        let mut row = vec![E::from_f32(0.0); hidden];
        for i in 0..batch.len().min(3) {
            batch.copy_row(i, &mut row)?;
            let first = batch.row(i).expert * (most + self.slack) * hidden;
            let begin = first + (i - batch.offsets()[batch.row(i).expert] as usize) * hidden;
            let copied = &padded[begin..begin + hidden];
            assert!(bytemuck::cast_slice::<E, u8>(&row) == bytemuck::cast_slice::<E, u8>(copied), "row {i}");
        }
        let (rows, wire) = (batch.aligned_rows(1), self.wire);
        let mut kept = vec![0; rows * wire.value_bytes(hidden, E::DTYPE)];
        let mut scales = vec![0.0f32; ScaleLayout::ColumnMajor.elements(rows, wire.scales(hidden))];
        batch.copy_wire_into(&mut kept, &mut scales, ScaleLayout::ColumnMajor, 1)?;
        kept.extend(bytemuck::cast_slice::<f32, u8>(&scales));
        self.hand_in::<E>(moe, batch)?;
        let mut out = values::<E>(self.seed + 1, tokens.len());
        let (residual, bias) = (values::<E>(self.seed + 2, tokens.len()), values::<E>(self.seed + 3, hidden));
        let mut normed = vec![E::from_f32(0.0); tokens.len()];
        let epilogue = Epilogue {
            bias: Some(&bias),
            residual: if self.in_place { Residual::InPlace } else { Residual::Rows(&residual) },
            norm: Some(RmsNorm { weight: &bias, eps: 1e-5, out: &mut normed }),
            ..Epilogue::default()
        };
        moe.combine_recv_with(sent, &mut out, epilogue)?;
        let mut all = [padded, aligned, out, normed].map(|all| bytemuck::cast_slice(&all).to_vec()).to_vec();
        all.push(kept);
        Ok(all)
    }

    /// Outputs from a buffer or written in place, as the seed says.
    fn hand_in<E: Element>(&self, moe: &Moe, mut batch: ExpertBatch<'_>) -> Result<()> {
        let outputs = values::<E>(self.seed + 5, batch.len() * self.hidden);
        if self.seed.is_multiple_of(2) {
            return moe.combine_send_from(batch, &outputs);
        }
        for (i, output) in outputs.chunks_exact(self.hidden).enumerate() {
            batch.output_row::<E>(i)?.copy_from_slice(output);
        }
        moe.combine_send(batch)
    }

    fn agrees<E: Element>(&self) {
        let shared = AtomicUsize::new(0);
        as_threads(2, |comm| {
            let smooth = values::<f32>(self.seed + 9, self.experts * self.hidden);
            let config = MoeConfig {
                reduction: self.reduction,
                wire: self.wire,
                smooth: self.smooth.then(|| SmoothScales::new(smooth)),
                ..MoeConfig::new(MOST_TOKENS, self.hidden, self.topk, self.experts, E::DTYPE)
            };
            let moe = Moe::new(comm, config).expect("a handle");
            let alone = self.results::<E>(comm, &moe).expect("an exchange");
            for lanes in 1..=5 {
                let threads = Arc::new(Threads::default());
                moe.set_lanes(lanes, threads.clone()).expect("a number of lanes");
                let together = self.results::<E>(comm, &moe).expect("an exchange");
                assert!(together == alone, "{lanes} lanes, rank {}", comm.rank());
                shared.fetch_add(threads.shared.load(Relaxed), Relaxed);
            }
        });
        // 90 rows of 4000 elements are far more than what is shared.
        let most = *self.tokens.iter().max().expect("two ranks");
        assert!(shared.load(Relaxed) > 0 || most < 70, "{self:?}: nothing was shared");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 20, ..ProptestConfig::with_cases(16) })]
    #[test]
    fn any_number_of_lanes_gives_the_same_bits(case in case()) {
        match case.seed % 3 {
            0 => case.agrees::<f32>(),
            1 => case.agrees::<bf16>(),
            _ => case.agrees::<f16>(),
        }
    }
}

/// Panics in the call with the given number.
struct Panics {
    at: usize,
    calls: AtomicUsize,
}

impl Lanes for Panics {
    fn run(&self, lanes: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..lanes).for_each(work);
        assert!(self.calls.fetch_add(1, Relaxed) != self.at, "no more threads");
    }
}

#[test]
fn a_panic_of_the_threads_reaches_the_caller_and_leaves_no_rank_waiting() {
    let hidden = 8192;
    let (ids, weights) = ((0..64).map(|i| i % 4).collect::<Vec<i32>>(), vec![1.0; 64]);
    let tokens = vec![1.0f32; 64 * hidden];
    // In the dispatch's copy, the expert-major copy, the outputs' copy, the combine's sums.
    for at in 0..4 {
        as_threads(2, |comm| {
            let moe = Moe::new(comm, MoeConfig::new(64, hidden, 1, 4, f32::DTYPE)).expect("a handle");
            let mut rows = vec![0.0f32; 128 * hidden];
            let mut out = vec![0.0f32; 64 * hidden];
            let mut exchange = || -> Result<()> {
                let routing = Routing::new(&ids, &weights);
                let sent = moe.dispatch_send(&tokens, &routing)?;
                let mut batch = moe.dispatch_recv(&sent)?;
                batch.copy_into(&mut rows, 1)?;
                let outputs = batch.len() * hidden;
                moe.combine_send_from(batch, &rows[..outputs])?;
                moe.combine_recv(sent, &mut out)
            };
            exchange().expect("an exchange");
            let ended = if comm.rank() == 0 {
                moe.set_lanes(2, Arc::new(Panics { at, calls: AtomicUsize::new(0) })).expect("a number of lanes");
                let panicked = catch_unwind(AssertUnwindSafe(&mut exchange)).expect_err("the threads panic");
                assert_eq!(panicked.downcast_ref::<&str>(), Some(&"no more threads"));
                Ok(())
            } else {
                exchange()
            };
            match (comm.rank(), at, ended) {
                // Nothing was sent: this rank is told, and both may go on.
                (1, 0, Err(Error::PeerRefused { rank: 0, epoch: 2 })) => {}
                (1, 1 | 2, Err(Error::PeerAbandoned { rank: 0, epoch: 2 })) => {}
                (0, _, Ok(())) | (1, 3, Ok(())) => {}
                (rank, _, ended) => panic!("rank {rank}, panic in call {at}: {ended:?}"),
            }
        });
    }
}

#[test]
fn lanes_may_be_set_and_taken_away_between_any_two_calls() {
    let comm = Communicator::init(0, 1, &UniqueId::new().expect("an id"), Config::default()).expect("one rank");
    let moe = Moe::new(&comm, MoeConfig::new(64, 8192, 1, 4, f32::DTYPE)).expect("a handle");
    let (ids, weights, tokens) = ([1i32; 64], [1.0; 64], vec![3.0f32; 64 * 8192]);
    let mut out = vec![0.0f32; 64 * 8192];
    let sent = moe.dispatch_send(&tokens, &Routing::new(&ids, &weights)).expect("a dispatch");
    let threads = Arc::new(Threads::default());
    moe.set_lanes(3, threads.clone()).expect("a number of lanes");
    let batch = moe.dispatch_recv(&sent).expect("a batch");
    let outputs = tokens.clone();
    moe.combine_send_from(batch, &outputs).expect("a combine");
    assert_eq!(threads.shared.load(Relaxed), 1);
    moe.set_lanes(1, threads.clone()).expect("a number of lanes");
    moe.combine_recv(sent, &mut out).expect("the sums");
    assert_eq!((threads.shared.load(Relaxed), out == tokens), (1, true));
    assert!(matches!(moe.set_lanes(65, threads), Err(Error::Config { option: "lanes", .. })));
}
