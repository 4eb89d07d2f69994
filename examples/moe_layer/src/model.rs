//! The layer itself, without any communication: embedding, router and experts.
//!
//! Everything is a plain loop that adds in one fixed order, so a token's routing and an expert's output are bitwise the same
//! in whichever process they are computed. The weights are made from a seed by a hash of their position ([`uniform`]), so a
//! rank can make the experts it holds without making the others.

use std::f64::consts::{LN_2, LOG2_E};

use anyhow::{Result, ensure};
use xccl::Element;

/// The sizes of the layer, and the seed of its weights.
#[derive(Clone, Debug)]
pub struct Shape {
    pub hidden: usize,
    pub inter: usize,
    pub experts: usize,
    pub topk: usize,
    pub vocabulary: usize,
    pub seed: u64,
}

impl Shape {
    pub fn check(&self) -> Result<()> {
        let sizes = [("hidden", self.hidden), ("inter", self.inter), ("experts", self.experts), ("topk", self.topk)];
        for (name, size) in sizes.into_iter().chain([("vocabulary", self.vocabulary)]) {
            ensure!(size > 0, "--{name} is 0: give at least 1");
        }
        ensure!(
            self.topk <= self.experts,
            "--topk is {} but there are only {} experts: a token visits each expert at most once, so give --topk {} or less",
            self.topk,
            self.experts,
            self.experts
        );
        ensure!(self.experts <= i32::MAX as usize, "--experts is {}: give at most {}", self.experts, i32::MAX);
        ensure!(self.vocabulary <= u32::MAX as usize, "--vocabulary is {}: give at most {}", self.vocabulary, u32::MAX);
        Ok(())
    }
}

/// Which of the seeded tables a number belongs to.
#[derive(Clone, Copy)]
enum Table {
    Embedding,
    Router,
    Gate(usize),
    Up(usize),
    Down(usize),
}

impl Table {
    fn number(self) -> u64 {
        match self {
            Table::Embedding => 0,
            Table::Router => 1,
            Table::Gate(expert) => 2 + 3 * expert as u64,
            Table::Up(expert) => 3 + 3 * expert as u64,
            Table::Down(expert) => 4 + 3 * expert as u64,
        }
    }
}

/// The output function of SplitMix64 (Steele, Lea and Flood, 2014), used as a hash. It is written out here because a
/// library's generator may change its stream between versions, and the figures in the README would change with it.
fn splitmix64(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Entry `index` of a seeded table: uniform in [-1, 1), a multiple of 2^-23 and so exact in f32.
fn uniform(seed: u64, table: Table, index: usize) -> f32 {
    let bits = splitmix64(splitmix64(splitmix64(seed).wrapping_add(table.number())).wrapping_add(index as u64));
    (bits >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}

/// A seeded matrix whose products with rows of unit variance have unit variance again, in [`multiply`]'s layout.
fn matrix<E: Element>(seed: u64, table: Table, inputs: usize, outputs: usize) -> Vec<E> {
    let scale = (3.0 / inputs as f32).sqrt();
    (0..inputs * outputs).map(|index| E::from_f32(uniform(seed, table, index) * scale)).collect()
}

/// e^x from additions and multiplications alone. The standard library's `exp` may differ in its last bit between platforms
/// and even between two calls; this one rounds the same way everywhere.
fn exp(x: f32) -> f32 {
    let x = f64::from(x).clamp(-200.0, 200.0);
    let halvings = (x * LOG2_E).round();
    let rest = x - halvings * LN_2;
    // |rest| is at most ln(2) / 2, where what this polynomial leaves out is far below an f32's rounding.
    let series = (1..=12).rev().fold(1.0, |sum, n| 1.0 + sum * rest / f64::from(n));
    let power_of_two = f64::from_bits(((1023 + halvings as i64) as u64) << 52);
    (series * power_of_two) as f32
}

fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `row` times a matrix of `row.len()` rows by `outputs` columns, row-major. Each output adds its products in ascending
/// order of the input; going through the outputs in the inner loop lets them share vector registers without changing that.
fn multiply<E: Element>(row: &[f32], weights: &[E], outputs: usize) -> Vec<f32> {
    let mut product = vec![0.0f32; outputs];
    for (&x, weights) in row.iter().zip(weights.chunks_exact(outputs)) {
        for (sum, w) in product.iter_mut().zip(weights) {
            *sum += x * w.to_f32();
        }
    }
    product
}

fn widen<E: Element>(row: &[E]) -> Vec<f32> {
    row.iter().map(|x| x.to_f32()).collect()
}

/// The text as token ids: each word, in lower case, and each punctuation mark is one token, hashed (FNV-1a) into the
/// vocabulary. Two words may share an id, as two strings may in any hashed vocabulary.
pub fn tokenize(text: &str, vocabulary: usize) -> Vec<u32> {
    let lower = text.to_lowercase();
    let words = lower.split_whitespace().flat_map(|chunk| {
        // `split_inclusive` leaves a mark at the end of the piece it ends: part them.
        chunk.split_inclusive(|c: char| !c.is_alphanumeric()).flat_map(|piece| {
            let word = piece.trim_end_matches(|c: char| !c.is_alphanumeric());
            [word, &piece[word.len()..]]
        })
    });
    words.filter(|word| !word.is_empty()).map(|word| (fnv1a(word.as_bytes()) % vocabulary as u64) as u32).collect()
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// The embedding's rows for `tokens`, one after the other. The table is seeded, so a row is made when it is looked up.
pub fn embed<E: Element>(shape: &Shape, tokens: &[u32]) -> Vec<E> {
    let scale = 3.0f32.sqrt(); // unit variance
    let row = |&token: &u32| token as usize * shape.hidden..(token as usize + 1) * shape.hidden;
    let entry = |index| E::from_f32(uniform(shape.seed, Table::Embedding, index) * scale);
    tokens.iter().flat_map(row).map(entry).collect()
}

/// Chooses `topk` experts for a token and says how much each of them counts.
pub struct Router {
    topk: usize,
    experts: usize,
    /// `[hidden, experts]`; f32 whatever the rows are, as in most models.
    weights: Vec<f32>,
}

impl Router {
    pub fn seeded(shape: &Shape) -> Self {
        let weights = matrix(shape.seed, Table::Router, shape.hidden, shape.experts);
        Router { topk: shape.topk, experts: shape.experts, weights }
    }

    /// Linear layer, softmax, the `topk` largest shares (the lower expert first where two are equal), scaled to add up to 1.
    pub fn route<E: Element>(&self, row: &[E]) -> Vec<(usize, f32)> {
        let shares = softmax(&multiply(&widen(row), &self.weights, self.experts));
        let mut chosen: Vec<(usize, f32)> = shares.into_iter().enumerate().collect();
        chosen.sort_by(|(a, p), (b, q)| q.total_cmp(p).then(a.cmp(b)));
        chosen.truncate(self.topk);
        let total = chosen.iter().fold(0.0, |sum, (_, share)| sum + share);
        chosen.into_iter().map(|(expert, share)| (expert, share / total)).collect()
    }
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = logits.iter().map(|x| exp(x - largest)).collect();
    let total = powers.iter().fold(0.0, |sum, p| sum + p);
    powers.into_iter().map(|p| p / total).collect()
}

/// One SwiGLU expert: `w_down (silu(w_gate x) * (w_up x))`.
pub struct Expert<E> {
    inter: usize,
    hidden: usize,
    gate: Vec<E>,
    up: Vec<E>,
    down: Vec<E>,
}

impl<E: Element> Expert<E> {
    pub fn seeded(shape: &Shape, expert: usize) -> Self {
        let &Shape { hidden, inter, seed, .. } = shape;
        Expert {
            inter,
            hidden,
            gate: matrix(seed, Table::Gate(expert), hidden, inter),
            up: matrix(seed, Table::Up(expert), hidden, inter),
            down: matrix(seed, Table::Down(expert), inter, hidden),
        }
    }

    /// Weights and rows are of type `E`, all arithmetic is in f32, and only the output row is rounded to `E`.
    pub fn forward(&self, row: &[E], output: &mut [E]) {
        let row = widen(row);
        let gate = multiply(&row, &self.gate, self.inter);
        let up = multiply(&row, &self.up, self.inter);
        let gated: Vec<f32> = gate.into_iter().zip(up).map(|(gate, up)| silu(gate) * up).collect();
        for (output, x) in output.iter_mut().zip(multiply(&gated, &self.down, self.hidden)) {
            *output = E::from_f32(x);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    const TINY: Shape = Shape { hidden: 2, inter: 2, experts: 3, topk: 2, vocabulary: 100, seed: 7 };

    #[test]
    fn the_hash_is_splitmix64() {
        // The first two outputs of the published generator seeded with 0: its state advances by the constant each time.
        assert_eq!(splitmix64(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(splitmix64(0x9e37_79b9_7f4a_7c15), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn seeded_numbers_differ_by_seed_table_and_index_and_are_centred() {
        let first = uniform(1, Table::Router, 0);
        for other in [uniform(2, Table::Router, 0), uniform(1, Table::Gate(0), 0), uniform(1, Table::Router, 1)] {
            assert_ne!(first, other);
        }
        let numbers: Vec<f32> = (0..10_000).map(|index| uniform(1, Table::Up(3), index)).collect();
        assert!(numbers.iter().all(|x| (-1.0..1.0).contains(x)));
        let mean = numbers.iter().sum::<f32>() / 10_000.0;
        let variance = numbers.iter().map(|x| x * x).sum::<f32>() / 10_000.0;
        assert!(mean.abs() < 0.03 && (variance - 1.0 / 3.0).abs() < 0.02, "mean {mean}, variance {variance}");
    }

    #[test]
    fn the_exponential_is_within_one_rounding_of_the_exact_value() {
        for step in -8000..=8000 {
            let x = step as f32 / 100.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs();
            assert!(error <= exact * 2f64.powi(-24) * 1.001, "exp({x}) = {}, exactly {exact}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    }

    #[test]
    fn words_and_marks_are_tokens_whatever_their_case() {
        let ids = |text| tokenize(text, 1 << 30);
        assert_eq!(ids("The gate, the\n  GATE."), ids("the gate , the gate ."));
        assert_eq!(ids("the gate").len(), 2);
        assert_eq!(ids("(one-way)").len(), 5);
        assert_ne!(ids("expert")[0], ids("experts")[0]);
        assert_eq!(ids(" \n "), []);
        assert!(tokenize("some of these words", 3).iter().all(|&id| id < 3));
    }

    #[test]
    fn a_token_embeds_to_the_same_row_wherever_it_stands() {
        let rows = embed::<f32>(&TINY, &[5, 9, 5]);
        assert_eq!(rows.len(), 6);
        assert_eq!(rows[0..2], rows[4..6]);
        assert_ne!(rows[0..2], rows[2..4]);
        assert_eq!(embed::<f32>(&TINY, &[9]), rows[2..4]);
    }

    #[test]
    fn a_product_goes_through_the_matrix_by_rows_of_inputs() {
        // (1, 10) times ((1, 2, 3), (4, 5, 6)).
        assert_eq!(multiply(&[1.0, 10.0], &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], 3), [41.0, 52.0, 63.0]);
    }

    #[test]
    fn a_softmax_of_logarithms_gives_their_proportions() {
        let shares = softmax(&[1f32.ln(), 2f32.ln(), 5f32.ln()]);
        for (share, expected) in shares.iter().zip([0.125, 0.25, 0.625]) {
            assert!((share - expected).abs() < 1e-6, "{shares:?}");
        }
        assert_eq!(softmax(&[1e30, 1e30]), [0.5, 0.5]);
    }

    #[test]
    fn the_router_keeps_the_largest_shares_and_scales_them_to_one() {
        // A row of (1, 0) reads the first row of the weights: shares 1/8, 2/8, 5/8.
        let weights = vec![1f32.ln(), 2f32.ln(), 5f32.ln(), 9.0, 9.0, 9.0];
        let chosen = Router { topk: 2, experts: 3, weights }.route(&[1.0f32, 0.0]);
        assert_eq!(chosen.iter().map(|c| c.0).collect::<Vec<_>>(), [2, 1]);
        assert!((chosen[0].1 - 5.0 / 7.0).abs() < 1e-6 && (chosen[1].1 - 2.0 / 7.0).abs() < 1e-6, "{chosen:?}");
    }

    #[test]
    fn of_equal_shares_the_lower_expert_is_chosen() {
        let weights = vec![1.0, 2.0, 1.0, 2.0, 1.0];
        let chosen = Router { topk: 3, experts: 5, weights }.route(&[bf16::ONE]);
        assert_eq!(chosen.iter().map(|c| c.0).collect::<Vec<_>>(), [1, 3, 0]);
    }

    /// gate = (x0, -x1), up = (x0 + x1, 2 x1), down = (h0, h0 + h1).
    fn tiny_expert<E: Element>() -> Expert<E> {
        let e = |weights: [f32; 4]| weights.map(E::from_f32).to_vec();
        Expert {
            inter: 2,
            hidden: 2,
            gate: e([1.0, 0.0, 0.0, -1.0]),
            up: e([1.0, 0.0, 1.0, 2.0]),
            down: e([1.0, 1.0, 0.0, 1.0]),
        }
    }

    #[test]
    fn an_expert_computes_swiglu() {
        let mut output = [0.0f32; 2];
        tiny_expert().forward(&[1.0, 2.0], &mut output);
        // silu(1) = 0.7310586, silu(-2) = -0.23840584; h = (0.7310586 * 3, -0.23840584 * 4).
        let (h0, h1) = (2.193_175_8f32, -0.953_623_4f32);
        assert!((output[0] - h0).abs() < 1e-6 && (output[1] - (h0 + h1)).abs() < 1e-6, "{output:?}");
        tiny_expert().forward(&[0.0, 0.0], &mut output);
        assert_eq!(output, [0.0, 0.0]);
    }

    #[test]
    fn a_bf16_expert_accumulates_in_f32_and_rounds_once() {
        let row = [1.0, 2.0];
        let (mut exact, mut rounded) = ([0.0f32; 2], [bf16::ZERO; 2]);
        tiny_expert().forward(&row, &mut exact);
        tiny_expert().forward(&row.map(bf16::from_f32), &mut rounded);
        assert_eq!(rounded, exact.map(bf16::from_f32));
    }

    #[test]
    fn sizes_that_cannot_work_are_named() {
        assert!(TINY.check().is_ok());
        let message = Shape { topk: 4, ..TINY }.check().unwrap_err().to_string();
        assert!(message.contains("--topk is 4") && message.contains("only 3 experts"), "{message}");
        let message = Shape { hidden: 0, ..TINY }.check().unwrap_err().to_string();
        assert!(message.contains("--hidden is 0"), "{message}");
    }
}
