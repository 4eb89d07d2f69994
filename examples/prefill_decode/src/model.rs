//! A small decoder: embedding, layers of causal attention over a paged cache and of a feed-forward network, logits.
//!
//! Everything is f32, in one fixed order of additions: the same tokens and the same cache give the same bits, wherever they are
//! computed.

use anyhow::{Result, ensure};
use example_parts::arithmetic::{add, matrix, multiply, normed, splitmix64};
use example_parts::attention::{Attention, Embedding};
use example_parts::cache::{Cache, Pages};

/// Sizes of the model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub layers: usize,
    pub heads: usize,
    /// Elements of a token's row; a multiple of `heads`.
    pub hidden: usize,
    pub vocabulary: usize,
    /// Tokens of a page of the cache.
    pub page_tokens: usize,
    pub seed: u64,
}

impl Shape {
    pub fn check(&self) -> Result<()> {
        let Shape { layers, heads, hidden, vocabulary, page_tokens, .. } = *self;
        for (name, value) in [
            ("layers", layers),
            ("heads", heads),
            ("hidden", hidden),
            ("vocabulary", vocabulary),
            ("page-tokens", page_tokens),
        ] {
            ensure!(value > 0, "--{name} is 0: give at least 1");
        }
        ensure!(hidden.is_multiple_of(heads), "--hidden is {hidden}, which {heads} heads do not divide");
        Ok(())
    }

    /// Of the cache.
    pub fn pages(&self) -> Pages {
        Pages { layers: self.layers, page_tokens: self.page_tokens, token_values: 2 * self.hidden }
    }
}

struct Layer {
    attention: Attention,
    up: Vec<f32>,
    down: Vec<f32>,
}

pub struct Model {
    shape: Shape,
    embedding: Embedding,
    layers: Vec<Layer>,
}

impl Model {
    /// With random weights, which the seed decides.
    pub fn new(shape: Shape) -> Self {
        let Shape { seed, heads, hidden, vocabulary, .. } = shape;
        let inter = 2 * hidden;
        // Table 0 is the embedding's; each layer has some of its own.
        let layer = |l: usize| {
            let first = 1 + l as u64 * (Attention::TABLES + 2);
            let after = first + Attention::TABLES;
            Layer {
                attention: Attention::seeded(seed, first, heads, hidden),
                up: matrix(seed, after, hidden, inter),
                down: matrix(seed, after + 1, inter, hidden),
            }
        };
        let embedding = Embedding::seeded(seed, 0, vocabulary, hidden);
        Model { shape, embedding, layers: (0..shape.layers).map(layer).collect() }
    }

    /// Runs tokens, the first of which stands at position `start`, through the model. Keys and values of the positions before
    /// are in the cache, in the pages that `table` lists; those of the new ones are added. `before` is called before each layer
    /// is worked on, `after` when it is done. Gives the last token's logits.
    pub fn forward<C: Cache>(
        &self,
        tokens: &[u32],
        start: usize,
        table: &[u32],
        cache: &mut C,
        mut before: impl FnMut(usize) -> Result<()>,
        mut after: impl FnMut(usize, &C) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let Shape { hidden, page_tokens, .. } = self.shape;
        let mut rows: Vec<Vec<f32>> =
            tokens.iter().enumerate().map(|(i, &token)| self.embedding.row(token, start + i)).collect();
        for (l, layer) in self.layers.iter().enumerate() {
            before(l)?;
            layer.attention.add_to(&mut rows, start, cache, (l, page_tokens, table))?;
            for row in &mut rows {
                let mut inner = multiply(&normed(row), &layer.up, 2 * hidden);
                inner.iter_mut().for_each(|x| *x = x.max(0.0));
                add(row, &multiply(&inner, &layer.down, hidden));
            }
            after(l, cache)?;
        }
        Ok(rows.last().map_or(vec![], |row| self.embedding.logits(row)))
    }
}

/// A request's prompt: 1 to `longest` tokens.
pub fn prompt(shape: &Shape, id: u64, longest: usize) -> Vec<u32> {
    let draw = |i: u64| splitmix64(shape.seed ^ id << 32 ^ i);
    let len = 1 + draw(u64::MAX) as usize % longest;
    (0..len as u64).map(|i| (draw(i) % shape.vocabulary as u64) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use example_parts::cache::Private;

    const TINY: Shape = Shape { layers: 2, heads: 2, hidden: 8, vocabulary: 11, page_tokens: 3, seed: 5 };

    #[test]
    fn a_prompt_gives_the_same_bits_at_once_and_token_by_token_whatever_its_pages_are() {
        let model = Model::new(TINY);
        let tokens: Vec<u32> = (0..10).map(|i| i * 7 % 11).collect();
        let run = |table: &[u32], cuts: &[usize]| {
            let (mut cache, mut start, mut logits) = (Private::new(TINY.pages(), 9), 0, vec![]);
            for &end in cuts {
                let nothing = |_: usize| Ok(());
                logits = model.forward(&tokens[start..end], start, table, &mut cache, nothing, |_, _| Ok(())).unwrap();
                start = end;
            }
            logits
        };
        let at_once = run(&[0, 1, 2, 3], &[10]);
        assert!(at_once.iter().all(|x| x.is_finite()) && at_once.len() == 11);
        assert_eq!(run(&[8, 3, 0, 5], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), at_once);
        assert_eq!(run(&[1, 0, 7, 2], &[4, 10]), at_once);
        // And every token before matters.
        let mut other = tokens.clone();
        other[0] = 1;
        let mut cache = Private::new(TINY.pages(), 9);
        let changed = model.forward(&other, 0, &[0, 1, 2, 3], &mut cache, |_| Ok(()), |_, _| Ok(())).unwrap();
        assert_ne!(changed, at_once);
    }

    #[test]
    fn prompts_have_one_token_to_the_longest() {
        let lengths: Vec<usize> = (0..200).map(|id| prompt(&TINY, id, 7).len()).collect();
        assert!((1..=7).all(|len| lengths.contains(&len)) && lengths.iter().all(|len| (1..=7).contains(len)));
    }
}
