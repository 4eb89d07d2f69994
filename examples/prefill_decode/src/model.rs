//! A small decoder: embedding, layers of causal attention over a paged cache and of a feed-forward network, logits.
//!
//! Everything is f32, in one fixed order of additions: the same tokens and the same cache give the same bits, wherever they are
//! computed.

use anyhow::{Result, ensure};

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

    /// Elements of the cache for one token and layer: a key, then a value.
    pub fn token_values(&self) -> usize {
        2 * self.hidden
    }

    pub fn token_bytes(&self) -> usize {
        self.token_values() * size_of::<f32>()
    }

    pub fn page_bytes(&self) -> usize {
        self.page_tokens * self.token_bytes()
    }

    /// Pages that so many tokens take.
    pub fn pages_of(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }
}

/// Where keys and values are kept, by layer, page, and token of the page.
pub trait Cache {
    fn store(&mut self, layer: usize, page: u32, token: usize, values: &[f32]) -> Result<()>;
    /// The first tokens of a page.
    fn load(&self, layer: usize, page: u32, into: &mut [f32]) -> Result<()>;
}

struct Layer {
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    out: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

pub struct Model {
    shape: Shape,
    embedding: Vec<f32>,
    layers: Vec<Layer>,
}

impl Model {
    /// With random weights, which the seed decides.
    pub fn new(shape: Shape) -> Self {
        let (hidden, inter) = (shape.hidden, 2 * shape.hidden);
        let mut table = 0;
        let mut weights = |count: usize, inputs: usize| -> Vec<f32> {
            table += 1;
            let scale = (1.0 / inputs as f32).sqrt();
            (0..count).map(|i| uniform(shape.seed, table, i) * 1.7 * scale).collect()
        };
        let embedding = weights(shape.vocabulary * hidden, 1);
        let layer = |_| Layer {
            query: weights(hidden * hidden, hidden),
            key: weights(hidden * hidden, hidden),
            value: weights(hidden * hidden, hidden),
            out: weights(hidden * hidden, hidden),
            up: weights(hidden * inter, hidden),
            down: weights(inter * hidden, inter),
        };
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
            tokens.iter().enumerate().map(|(i, &token)| self.embed(token, start + i)).collect();
        let values = self.shape.token_values();
        for (l, layer) in self.layers.iter().enumerate() {
            before(l)?;
            for (i, row) in rows.iter().enumerate() {
                let mut kv = multiply(&normed(row), &layer.key, hidden);
                kv.extend(multiply(&normed(row), &layer.value, hidden));
                let position = start + i;
                cache.store(l, table[position / page_tokens], position % page_tokens, &kv)?;
            }
            let seen = start + tokens.len();
            let mut context = vec![0.0; seen * values];
            for (page, part) in context.chunks_mut(page_tokens * values).enumerate() {
                cache.load(l, table[page], part)?;
            }
            for (i, row) in rows.iter_mut().enumerate() {
                let query = multiply(&normed(row), &layer.query, hidden);
                let attended = self.attend(&query, &context[..(start + i + 1) * values]);
                add(row, &multiply(&attended, &layer.out, hidden));
                let mut inner = multiply(&normed(row), &layer.up, 2 * hidden);
                inner.iter_mut().for_each(|x| *x = x.max(0.0));
                add(row, &multiply(&inner, &layer.down, hidden));
            }
            after(l, cache)?;
        }
        Ok(rows.last().map_or(vec![], |row| {
            let row = normed(row);
            self.embedding.chunks_exact(hidden).map(|of| dot(&row, of)).collect()
        }))
    }

    fn embed(&self, token: u32, position: usize) -> Vec<f32> {
        let hidden = self.shape.hidden;
        let row = &self.embedding[token as usize * hidden..][..hidden];
        // A position is a fixed random row, half as long as a token's.
        let at = |i: usize| 0.5 * uniform(self.shape.seed, u64::MAX, position * hidden + i);
        row.iter().enumerate().map(|(i, x)| x + at(i)).collect()
    }

    /// Softmax over all positions of the context, head by head.
    fn attend(&self, query: &[f32], context: &[f32]) -> Vec<f32> {
        let Shape { heads, hidden, .. } = self.shape;
        let width = hidden / heads;
        let mut out = vec![0.0; hidden];
        for head in 0..heads {
            let part = head * width..(head + 1) * width;
            let tokens = || context.chunks_exact(2 * hidden);
            let scale = 1.0 / (width as f32).sqrt();
            let scores: Vec<f32> = tokens().map(|kv| dot(&query[part.clone()], &kv[part.clone()]) * scale).collect();
            let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let shares: Vec<f32> = scores.iter().map(|s| (s - most).exp()).collect();
            let total: f32 = shares.iter().sum();
            for (share, kv) in shares.iter().zip(tokens()) {
                let value = &kv[hidden..][part.clone()];
                out[part.clone()].iter_mut().zip(value).for_each(|(o, v)| *o += share / total * v);
            }
        }
        out
    }
}

/// The token with the largest logit; of equal ones the first.
pub fn greedy(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
    best as u32
}

/// A request's prompt: 1 to `longest` tokens.
pub fn prompt(shape: &Shape, id: u64, longest: usize) -> Vec<u32> {
    let draw = |i: u64| splitmix64(shape.seed ^ id << 32 ^ i);
    let len = 1 + draw(u64::MAX) as usize % longest;
    (0..len as u64).map(|i| (draw(i) % shape.vocabulary as u64) as u32).collect()
}

fn normed(row: &[f32]) -> Vec<f32> {
    let scale = 1.0 / (dot(row, row) / row.len() as f32 + 1e-6).sqrt();
    row.iter().map(|x| x * scale).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(x, y)| *x += y);
}

/// A row times a matrix of `columns` columns.
fn multiply(row: &[f32], matrix: &[f32], columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; columns];
    for (x, weights) in row.iter().zip(matrix.chunks_exact(columns)) {
        out.iter_mut().zip(weights).for_each(|(o, w)| *o += x * w);
    }
    out
}

/// A number from -1 to 1 that seed, table and index decide.
fn uniform(seed: u64, table: u64, index: usize) -> f32 {
    let bits = splitmix64(splitmix64(seed ^ table.rotate_left(20)) ^ index as u64);
    (bits >> 40) as f32 / (1 << 23) as f32 - 1.0
}

fn splitmix64(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::single::Private;

    const TINY: Shape = Shape { layers: 2, heads: 2, hidden: 8, vocabulary: 11, page_tokens: 3, seed: 5 };

    #[test]
    fn a_prompt_gives_the_same_bits_at_once_and_token_by_token_whatever_its_pages_are() {
        let model = Model::new(TINY);
        let tokens: Vec<u32> = (0..10).map(|i| i * 7 % 11).collect();
        let run = |table: &[u32], cuts: &[usize]| {
            let (mut cache, mut start, mut logits) = (Private::new(&TINY, 9), 0, vec![]);
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
        let mut cache = Private::new(&TINY, 9);
        let changed = model.forward(&other, 0, &[0, 1, 2, 3], &mut cache, |_| Ok(()), |_, _| Ok(())).unwrap();
        assert_ne!(changed, at_once);
    }

    #[test]
    fn prompts_have_one_token_to_the_longest() {
        let lengths: Vec<usize> = (0..200).map(|id| prompt(&TINY, id, 7).len()).collect();
        assert!((1..=7).all(|len| lengths.contains(&len)) && lengths.iter().all(|len| (1..=7).contains(len)));
    }

    #[test]
    fn the_first_of_the_largest_is_taken() {
        assert_eq!(greedy(&[1.0, 3.0, 2.0, 3.0]), 1);
    }
}
