//! The layer itself, without any communication: embedding, router and experts.
//!
//! Everything is a plain loop that adds in one fixed order, so a token's routing and an expert's output are bitwise the same
//! in whichever process they are computed. The weights are made from a seed by a hash of their position ([`uniform`]), so a
//! rank can make the experts it holds without making the others.

use anyhow::{Result, ensure};
use example_parts::arithmetic::{largest, matrix, multiply, softmax, uniform, widen};
use example_parts::expert::Expert;
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

    /// One of the experts, made from the seed.
    pub fn expert<E: Element>(&self, expert: usize) -> Expert<E> {
        Expert::seeded(self.seed, EXPERTS + expert as u64 * Expert::<E>::TABLES, self.hidden, self.inter)
    }
}

/// Which of the seeded tables a number belongs to: embedding, router, and those of each expert.
const EMBEDDING: u64 = 0;
const ROUTER: u64 = 1;
const EXPERTS: u64 = 2;

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
    let entry = |index| E::from_f32(uniform(shape.seed, EMBEDDING, index) * scale);
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
        let weights = matrix(shape.seed, ROUTER, shape.hidden, shape.experts);
        Router { topk: shape.topk, experts: shape.experts, weights }
    }

    /// Linear layer, softmax, the `topk` largest shares (the lower expert first where two are equal), scaled to add up to 1.
    pub fn route<E: Element>(&self, row: &[E]) -> Vec<(usize, f32)> {
        let shares = softmax(&multiply(&widen(row), &self.weights, self.experts));
        let chosen = largest(shares, self.topk);
        let total = chosen.iter().fold(0.0, |sum, (_, share)| sum + share);
        chosen.into_iter().map(|(expert, share)| (expert, share / total)).collect()
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    const TINY: Shape = Shape { hidden: 2, inter: 2, experts: 3, topk: 2, vocabulary: 100, seed: 7 };

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

    #[test]
    fn sizes_that_cannot_work_are_named() {
        assert!(TINY.check().is_ok());
        let message = Shape { topk: 4, ..TINY }.check().unwrap_err().to_string();
        assert!(message.contains("--topk is 4") && message.contains("only 3 experts"), "{message}");
        let message = Shape { hidden: 0, ..TINY }.check().unwrap_err().to_string();
        assert!(message.contains("--hidden is 0"), "{message}");
    }
}
