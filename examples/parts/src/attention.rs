//! The parts of a decoder around its feed-forward networks: embedding, causal attention over a paged cache, logits.

use anyhow::Result;

use crate::arithmetic::{add, dot, matrix, multiply, normed, softmax, uniform};
use crate::cache::Cache;

/// The rows of tokens, and of positions.
pub struct Embedding {
    seed: u64,
    hidden: usize,
    /// `[vocabulary, hidden]`.
    rows: Vec<f32>,
}

/// Positions have a table of their own.
const POSITIONS: u64 = u64::MAX;

impl Embedding {
    /// A seeded one.
    pub fn seeded(seed: u64, table: u64, vocabulary: usize, hidden: usize) -> Self {
        // A matrix of one input has rows of unit variance.
        Embedding { seed, hidden, rows: matrix(seed, table, 1, vocabulary * hidden) }
    }

    /// The row of a token at a position: a position is a fixed random row, half as long as a token's.
    pub fn row(&self, token: u32, position: usize) -> Vec<f32> {
        let hidden = self.hidden;
        let row = &self.rows[token as usize * hidden..][..hidden];
        let at = |i: usize| 0.5 * uniform(self.seed, POSITIONS, position * hidden + i);
        row.iter().enumerate().map(|(i, x)| x + at(i)).collect()
    }

    /// How well each token of the vocabulary follows.
    pub fn logits(&self, row: &[f32]) -> Vec<f32> {
        let row = normed(row);
        self.rows.chunks_exact(self.hidden).map(|of| dot(&row, of)).collect()
    }
}

/// Causal attention with several heads.
pub struct Attention {
    heads: usize,
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    out: Vec<f32>,
}

impl Attention {
    /// Of the seeded tables, it takes so many.
    pub const TABLES: u64 = 4;

    /// A seeded one; `heads` divides `hidden`.
    pub fn seeded(seed: u64, first_table: u64, heads: usize, hidden: usize) -> Self {
        let table = |n| matrix(seed, first_table + n, hidden, hidden);
        Attention { heads, query: table(0), key: table(1), value: table(2), out: table(3) }
    }

    /// Adds what each row attends to. The rows are of tokens that follow each other, the first at position `start`; keys and
    /// values of the positions before are in the cache, in the pages that `table` lists, and those of these are added.
    pub fn add_to<C: Cache>(
        &self,
        rows: &mut [Vec<f32>],
        start: usize,
        cache: &mut C,
        (layer, page_tokens, table): (usize, usize, &[u32]),
    ) -> Result<()> {
        let Some(hidden) = rows.first().map(Vec::len) else { return Ok(()) };
        for (i, row) in rows.iter().enumerate() {
            let mut kv = multiply(&normed(row), &self.key, hidden);
            kv.extend(multiply(&normed(row), &self.value, hidden));
            let position = start + i;
            cache.store(layer, table[position / page_tokens], position % page_tokens, &kv)?;
        }
        let mut context = vec![0.0; (start + rows.len()) * 2 * hidden];
        for (page, part) in context.chunks_mut(page_tokens * 2 * hidden).enumerate() {
            cache.load(layer, table[page], part)?;
        }
        for (i, row) in rows.iter_mut().enumerate() {
            let query = multiply(&normed(row), &self.query, hidden);
            let attended = self.attend(&query, &context[..(start + i + 1) * 2 * hidden]);
            add(row, &multiply(&attended, &self.out, hidden));
        }
        Ok(())
    }

    /// Softmax over all positions of the context, head by head.
    fn attend(&self, query: &[f32], context: &[f32]) -> Vec<f32> {
        let hidden = query.len();
        let width = hidden / self.heads;
        let scale = 1.0 / (width as f32).sqrt();
        let mut out = vec![0.0; hidden];
        for head in 0..self.heads {
            let part = head * width..(head + 1) * width;
            let tokens = || context.chunks_exact(2 * hidden);
            let scores: Vec<f32> = tokens().map(|kv| dot(&query[part.clone()], &kv[part.clone()]) * scale).collect();
            for (share, kv) in softmax(&scores).iter().zip(tokens()) {
                let value = &kv[hidden..][part.clone()];
                out[part.clone()].iter_mut().zip(value).for_each(|(o, v)| *o += share * v);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{Pages, Private};

    #[test]
    fn rows_get_the_same_bits_at_once_and_one_by_one_whatever_their_pages_are() {
        let (seed, hidden) = (5, 8);
        let (attention, embedding) = (Attention::seeded(seed, 1, 2, hidden), Embedding::seeded(seed, 0, 11, hidden));
        let sizes = Pages { layers: 1, page_tokens: 3, token_values: 2 * hidden };
        let run = |tokens: &[u32], table: &[u32], cuts: &[usize]| {
            let (mut cache, mut start, mut all) = (Private::new(sizes, 9), 0, vec![]);
            for &end in cuts {
                let mut rows: Vec<Vec<f32>> = (start..end).map(|i| embedding.row(tokens[i], i)).collect();
                attention.add_to(&mut rows, start, &mut cache, (0, 3, table)).unwrap();
                all.extend(rows);
                start = end;
            }
            all
        };
        let mut tokens: Vec<u32> = (0..10).map(|i| i * 7 % 11).collect();
        let at_once = run(&tokens, &[0, 1, 2, 3], &[10]);
        assert!(at_once.len() == 10 && at_once.iter().flatten().all(|x| x.is_finite()));
        assert_eq!(run(&tokens, &[8, 3, 0, 5], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), at_once);
        assert_eq!(run(&tokens, &[1, 0, 7, 2], &[4, 10]), at_once);
        // And every token before matters.
        tokens[0] = 1;
        assert!(run(&tokens, &[0, 1, 2, 3], &[10]).iter().zip(&at_once).all(|(a, b)| a != b));
    }
}
