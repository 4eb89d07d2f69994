//! Prompt and answer in one process, without XCCL: what the two groups have to equal.

use anyhow::Result;

use crate::model::{Cache, Model, Shape, greedy};

/// A cache in private memory: layer after layer, page after page.
pub struct Private {
    values: Vec<f32>,
    pages: usize,
    token_values: usize,
    page_tokens: usize,
}

impl Private {
    pub fn new(shape: &Shape, pages: usize) -> Self {
        let (token_values, page_tokens) = (shape.token_values(), shape.page_tokens);
        let values = vec![0.0; shape.layers * pages * page_tokens * token_values];
        Private { values, pages, token_values, page_tokens }
    }

    fn at(&self, layer: usize, page: u32) -> usize {
        (layer * self.pages + page as usize) * self.page_tokens * self.token_values
    }

    pub fn as_bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.values)
    }
}

impl Cache for Private {
    fn store(&mut self, layer: usize, page: u32, token: usize, values: &[f32]) -> Result<()> {
        let at = self.at(layer, page) + token * self.token_values;
        self.values[at..at + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn load(&self, layer: usize, page: u32, into: &mut [f32]) -> Result<()> {
        let at = self.at(layer, page);
        into.copy_from_slice(&self.values[at..at + into.len()]);
        Ok(())
    }
}

/// The logits of each of the `new` tokens that follow a prompt.
pub fn answer(model: &Model, shape: &Shape, prompt: &[u32], new: usize) -> Result<Vec<Vec<f32>>> {
    let pages = shape.pages_of(prompt.len() + new);
    let table: Vec<u32> = (0..pages as u32).collect();
    let mut cache = Private::new(shape, pages);
    let (mut tokens, mut start, mut all) = (prompt.to_vec(), 0, vec![]);
    for _ in 0..new {
        let logits = model.forward(&tokens[start..], start, &table, &mut cache, |_| Ok(()), |_, _| Ok(()))?;
        start = tokens.len();
        tokens.push(greedy(&logits));
        all.push(logits);
    }
    Ok(all)
}
