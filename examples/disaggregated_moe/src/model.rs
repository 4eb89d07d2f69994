//! A small decoder over bytes: layers of causal attention, and of a mixture of experts with a shared one.
//!
//! The model falls into two parts, as it is served: [`Decoder`] is all that attention ranks have, [`Experts`] are the routed experts,
//! or some of them. Rows go from the one to the other in each layer.
//!
//! Everything is f32 and adds in a fixed order, except for one sum: what a token's experts answer may be added up in parts, here on
//! an expert's rank and there on another one's node. So answers and weights are rounded to few enough bits that these
//! additions are exact in f32, in whatever order, and the model's bits do not depend on where its experts live.

use anyhow::{Result, ensure};
use example_parts::arithmetic::{add, largest, matrix, multiply, normed, softmax};
use example_parts::attention::{Attention, Embedding};
use example_parts::cache::{Cache, Pages};
use example_parts::expert::Expert;

/// Tokens are bytes.
pub const VOCABULARY: usize = 256;

/// Answers are multiples of 2^-12 of at most 16, weights multiples of 2^-6 that add up to 1 or a little more: every product and
/// every partial sum is a multiple of 2^-18 below 2^6, which f32 holds exactly.
const ANSWER_STEPS: f32 = 4096.0;
const LARGEST_ANSWER: f32 = 16.0;
const WEIGHT_STEPS: f32 = 64.0;

/// Sizes of the model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub layers: usize,
    pub heads: usize,
    /// Elements of a token's row; a multiple of `heads`.
    pub hidden: usize,
    /// Width of an expert between its matrices.
    pub inter: usize,
    /// Routed experts of each layer.
    pub routed: usize,
    /// Routed experts that each token visits.
    pub topk: usize,
    /// Tokens of a page of the cache.
    pub page_tokens: usize,
    pub seed: u64,
}

impl Shape {
    pub fn check(&self) -> Result<()> {
        let Shape { layers, heads, hidden, inter, routed, topk, page_tokens, .. } = *self;
        for (name, value) in [
            ("layers", layers),
            ("heads", heads),
            ("hidden", hidden),
            ("inter", inter),
            ("routed", routed),
            ("topk", topk),
            ("page-tokens", page_tokens),
        ] {
            ensure!(value > 0, "--{name} is 0: give at least 1");
        }
        ensure!(hidden.is_multiple_of(heads), "--hidden is {hidden}, which {heads} heads do not divide");
        ensure!(topk <= routed, "--topk is {topk}, but a layer has only {routed} routed experts");
        ensure!(topk <= 32, "--topk is {topk}: of more than 32 the sums would not be exact");
        Ok(())
    }

    /// Of the cache.
    pub fn pages(&self) -> Pages {
        Pages { layers: self.layers, page_tokens: self.page_tokens, token_values: 2 * self.hidden }
    }

    /// Routed experts of all layers. They have one numbering, so that a row's experts also say its layer.
    pub fn experts(&self) -> usize {
        self.layers * self.routed
    }

    /// The layer that an expert belongs to, and its place there.
    pub fn place_of(&self, expert: usize) -> (usize, usize) {
        (expert / self.routed, expert % self.routed)
    }
}

/// What attention ranks have of a layer.
struct Layer {
    attention: Attention,
    /// `[hidden, routed]`.
    router: Vec<f32>,
    shared: Expert<f32>,
}

/// The model without its routed experts.
pub struct Decoder {
    shape: Shape,
    embedding: Embedding,
    layers: Vec<Layer>,
}

/// The experts of a token in one layer, and how much each of them counts.
pub type Choice = Vec<(usize, f32)>;

impl Decoder {
    /// With random weights, which the seed decides.
    pub fn seeded(shape: Shape) -> Self {
        let Shape { seed, heads, hidden, inter, routed, .. } = shape;
        // Table 0 is the embedding's. Then each layer has those of its attention, router and shared expert, then come the experts'.
        let layer = |l: usize| {
            let attention = 1 + l as u64 * TABLES_PER_LAYER;
            let router = attention + Attention::TABLES;
            Layer {
                attention: Attention::seeded(seed, attention, heads, hidden),
                router: matrix(seed, router, hidden, routed),
                shared: Expert::seeded(seed, router + 1, hidden, inter),
            }
        };
        let embedding = Embedding::seeded(seed, 0, VOCABULARY, hidden);
        Decoder { shape, embedding, layers: (0..shape.layers).map(layer).collect() }
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The row that a token starts with.
    pub fn embed(&self, token: u8, position: usize) -> Vec<f32> {
        self.embedding.row(token.into(), position)
    }

    /// How well each byte follows.
    pub fn logits(&self, row: &[f32]) -> Vec<f32> {
        self.embedding.logits(row)
    }

    /// A layer's attention, for rows of tokens that follow each other from position `start` on. Keys and values are in the cache, in
    /// the pages that `table` lists.
    pub fn attend<C: Cache>(
        &self,
        layer: usize,
        rows: &mut [Vec<f32>],
        start: usize,
        cache: &mut C,
        table: &[u32],
    ) -> Result<()> {
        self.layers[layer].attention.add_to(rows, start, cache, (layer, self.shape.page_tokens, table))
    }

    /// What a row's experts are given, and who they are: linear layer, softmax, the `topk` largest shares (the lower expert first
    /// where two are equal), scaled to add up to 1 and rounded.
    pub fn route(&self, layer: usize, row: &[f32]) -> (Vec<f32>, Choice) {
        let Shape { routed, topk, .. } = self.shape;
        let row = normed(row);
        let chosen = largest(softmax(&multiply(&row, &self.layers[layer].router, routed)), topk);
        let total = chosen.iter().fold(0.0, |sum, (_, share)| sum + share);
        let rounded = |share: f32| (share / total * WEIGHT_STEPS).round() / WEIGHT_STEPS;
        let choice = chosen.into_iter().map(|(expert, share)| (layer * routed + expert, rounded(share))).collect();
        (row, choice)
    }

    /// What the expert answers that every token visits, and that attention ranks have themselves.
    pub fn shared(&self, layer: usize, row: &[f32]) -> Vec<f32> {
        let mut answer = vec![0.0; row.len()];
        self.layers[layer].shared.forward(row, &mut answer);
        answer
    }
}

const TABLES_PER_LAYER: u64 = Attention::TABLES + 1 + Expert::<f32>::TABLES;

/// Routed experts: all of them, or those of one rank.
pub struct Experts(Vec<Expert<f32>>);

impl Experts {
    pub fn seeded(shape: &Shape, numbers: impl IntoIterator<Item = usize>) -> Self {
        let first = 1 + shape.layers as u64 * TABLES_PER_LAYER;
        let expert = |number: usize| {
            let table = first + number as u64 * Expert::<f32>::TABLES;
            Expert::seeded(shape.seed, table, shape.hidden, shape.inter)
        };
        Experts(numbers.into_iter().map(expert).collect())
    }

    /// All of a model.
    pub fn all(shape: &Shape) -> Self {
        Experts::seeded(shape, 0..shape.experts())
    }

    /// What the `index`-th of them answers, rounded.
    pub fn answer(&self, index: usize, row: &[f32], answer: &mut [f32]) {
        self.0[index].forward(row, answer);
        for x in answer {
            *x = (x.clamp(-LARGEST_ANSWER, LARGEST_ANSWER) * ANSWER_STEPS).round() / ANSWER_STEPS;
        }
    }

    /// Adds up what a token's experts answer. Only for who has all of them.
    pub fn sum(&self, row: &[f32], choice: &Choice) -> Vec<f32> {
        let (mut sum, mut answer) = (vec![0.0; row.len()], vec![0.0; row.len()]);
        for &(expert, weight) in choice {
            self.answer(expert, row, &mut answer);
            answer.iter_mut().for_each(|x| *x *= weight);
            add(&mut sum, &answer);
        }
        sum
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use example_parts::arithmetic::uniform;

    pub const TINY: Shape =
        Shape { layers: 3, heads: 2, hidden: 8, inter: 6, routed: 5, topk: 3, page_tokens: 3, seed: 5 };

    #[test]
    fn what_a_tokens_experts_answer_adds_up_to_the_same_bits_in_any_order_and_in_parts() {
        let (decoder, experts) = (Decoder::seeded(TINY), Experts::all(&TINY));
        for n in 0..200 {
            // Rows large enough that some answers are cut off.
            let row: Vec<f32> = (0..TINY.hidden).map(|i| 9.0 * uniform(1, n, i)).collect();
            let (_, choice) = decoder.route(n as usize % TINY.layers, &row);
            let sum = experts.sum(&row, &choice);
            let reversed = choice.iter().copied().rev().collect();
            assert_eq!(experts.sum(&row, &reversed), sum);
            let mut parts = experts.sum(&row, &choice[1..].to_vec());
            add(&mut parts, &experts.sum(&row, &choice[..1].to_vec()));
            assert_eq!(parts, sum);
        }
    }

    #[test]
    fn a_choice_names_experts_of_its_layer_whose_weights_add_up_to_about_one() {
        let decoder = Decoder::seeded(TINY);
        for layer in 0..TINY.layers {
            let (given, choice) = decoder.route(layer, &decoder.embed(b'x', layer));
            assert!(given.iter().map(|x| x * x).sum::<f32>() > 7.9);
            assert_eq!(choice.len(), TINY.topk);
            assert!(choice.iter().all(|&(expert, _)| TINY.place_of(expert).0 == layer), "{choice:?}");
            let total: f32 = choice.iter().map(|(_, weight)| weight).sum();
            assert!((total - 1.0).abs() <= 1.5 / WEIGHT_STEPS, "{choice:?}");
        }
    }

    #[test]
    fn some_experts_answer_as_all_of_them() {
        let numbers = [1, 7, 14];
        let (all, some) = (Experts::all(&TINY), Experts::seeded(&TINY, numbers));
        let (mut by_all, mut by_some) = ([0.0; 8], [0.0; 8]);
        for (index, number) in numbers.into_iter().enumerate() {
            all.answer(number, &[0.5; 8], &mut by_all);
            some.answer(index, &[0.5; 8], &mut by_some);
            assert_eq!(by_all, by_some);
        }
        assert_ne!(by_all, [0.0; 8]);
    }

    #[test]
    fn sizes_that_cannot_work_are_named() {
        assert!(TINY.check().is_ok());
        let complaint = |shape: Shape| shape.check().unwrap_err().to_string();
        assert!(complaint(Shape { topk: 6, ..TINY }).contains("--topk is 6, but a layer has only 5"));
        assert!(complaint(Shape { heads: 3, ..TINY }).contains("--hidden is 8, which 3 heads"));
        assert!(complaint(Shape { layers: 0, ..TINY }).contains("--layers is 0"));
    }
}
