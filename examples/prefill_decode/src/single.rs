//! Prompt and answer in one process, without XCCL: what the two groups have to equal.

use anyhow::Result;
use example_parts::arithmetic::greedy;
use example_parts::cache::Private;

use crate::model::{Model, Shape};

/// The logits of each of the `new` tokens that follow a prompt.
pub fn answer(model: &Model, shape: &Shape, prompt: &[u32], new: usize) -> Result<Vec<Vec<f32>>> {
    let pages = shape.pages().pages_of(prompt.len() + new);
    let table: Vec<u32> = (0..pages as u32).collect();
    let mut cache = Private::new(shape.pages(), pages);
    let (mut tokens, mut start, mut all) = (prompt.to_vec(), 0, vec![]);
    for _ in 0..new {
        let logits = model.forward(&tokens[start..], start, &table, &mut cache, |_| Ok(()), |_, _| Ok(()))?;
        start = tokens.len();
        tokens.push(greedy(&logits));
        all.push(logits);
    }
    Ok(all)
}
