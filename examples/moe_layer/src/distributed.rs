//! The same layer by N ranks: each owns a stretch of the text and a block of the experts, and XCCL carries the rows.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use example_parts::expert::Expert;
use xccl::{Communicator, Element, ExpertBatch, Moe, MoeConfig, Reduction, Routing};

use crate::model::{Router, Shape, embed};

const OUTPUTS: u32 = 1;
const LOADS: u32 = 2;

/// What the ranks computed together, as rank 0 sees it.
pub struct Outcome<E> {
    /// `[tokens, hidden]`, in the order of the text.
    pub outputs: Vec<E>,
    /// How many rows arrived at each expert.
    pub loads: Vec<u32>,
}

/// The tokens that `rank` owns: a stretch of the text. The stretches are of different lengths on purpose (in the proportions
/// 1 : 2 : 3 : 1 : 2 : 3 …), as the batches of an engine's ranks are.
pub fn tokens_of(rank: usize, ranks: usize, tokens: usize) -> Range<usize> {
    let parts_before = |rank: usize| (0..rank).map(|r| 1 + r % 3).sum::<usize>();
    let start = |rank| tokens * parts_before(rank) / parts_before(ranks);
    start(rank)..start(rank + 1)
}

/// The experts that `rank` holds, by XCCL's rule: blocks, and the first `experts % ranks` ranks hold one more.
pub fn experts_of(rank: usize, ranks: usize, experts: usize) -> Range<usize> {
    let start = |rank: usize| rank * (experts / ranks) + rank.min(experts % ranks);
    start(rank)..start(rank + 1)
}

/// Runs the layer over the text, at most `batch` tokens of each rank at a time. Every rank calls it; rank 0 gets the outcome.
pub fn run<E: Element>(
    comm: &Communicator,
    shape: &Shape,
    reduction: Reduction,
    batch: usize,
    tokens: &[u32],
) -> Result<Option<Outcome<E>>> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    let mine = &tokens[tokens_of(rank, ranks, tokens.len())];
    let longest = (0..ranks).map(|r| tokens_of(r, ranks, tokens.len()).len()).max().unwrap_or(0);

    let mut config = MoeConfig::new(batch, shape.hidden, shape.topk, shape.experts, E::DTYPE);
    config.reduction = reduction;
    let moe = Moe::new(comm, config)?;
    let mut part = Part::<E>::new(shape, experts_of(rank, ranks, shape.experts));
    // An exchange involves every rank: one that is through with its own tokens still serves its experts.
    for step in 0..longest.div_ceil(batch) {
        part.step(&moe, mine.chunks(batch).nth(step).unwrap_or(&[]))?;
    }
    gather(comm, shape, tokens.len(), &part)
}

/// A rank's part of the layer.
struct Part<'a, E> {
    shape: &'a Shape,
    router: Router,
    held: Range<usize>,
    experts: Vec<Expert<E>>,
    /// `[own tokens, hidden]`.
    outputs: Vec<E>,
    /// Rows that arrived at each expert held.
    loads: Vec<u32>,
}

impl<'a, E: Element> Part<'a, E> {
    fn new(shape: &'a Shape, held: Range<usize>) -> Self {
        let experts = held.clone().map(|expert| shape.expert(expert)).collect();
        Part { shape, router: Router::seeded(shape), loads: vec![0; held.len()], held, experts, outputs: vec![] }
    }

    /// One exchange: route, dispatch, compute, combine.
    fn step(&mut self, moe: &Moe, tokens: &[u32]) -> Result<()> {
        let rows: Vec<E> = embed(self.shape, tokens);
        let chosen = rows.chunks_exact(self.shape.hidden).flat_map(|row| self.router.route(row));
        let (ids, weights): (Vec<i32>, Vec<f32>) = chosen.map(|(expert, weight)| (expert as i32, weight)).unzip();

        let sent = moe.dispatch_send(&rows, &Routing::new(&ids, &weights))?;
        let mut batch = moe.dispatch_recv(&sent)?;
        self.compute(&mut batch)?;
        moe.combine_send(batch)?;

        let done = self.outputs.len();
        self.outputs.resize(done + rows.len(), E::from_f32(0.0));
        moe.combine_recv(sent, &mut self.outputs[done..])?;
        Ok(())
    }

    /// The experts' work on the rows that have arrived, each answer written straight to where its owner reads it.
    fn compute(&mut self, batch: &mut ExpertBatch<'_>) -> Result<()> {
        ensure!(
            batch.local_experts().iter().copied().eq(self.held.clone()),
            "XCCL placed experts {:?} on this rank, the example expects {:?}",
            batch.local_experts(),
            self.held
        );
        for (load, count) in self.loads.iter_mut().zip(batch.counts()) {
            *load += count;
        }
        let mut row = vec![E::from_f32(0.0); self.shape.hidden];
        for index in 0..batch.len() {
            batch.copy_row(index, &mut row)?;
            let expert = &self.experts[batch.row(index).expert];
            expert.forward(&row, batch.output_row::<E>(index)?);
        }
        Ok(())
    }
}

/// Brings every rank's part to rank 0 by point-to-point messages.
fn gather<E: Element>(
    comm: &Communicator,
    shape: &Shape,
    tokens: usize,
    part: &Part<'_, E>,
) -> Result<Option<Outcome<E>>> {
    if comm.rank() != 0 {
        comm.send(0, OUTPUTS, bytemuck::cast_slice(&part.outputs))?;
        comm.send(0, LOADS, bytemuck::cast_slice(&part.loads))?;
        return Ok(None);
    }
    let mut outcome = Outcome { outputs: part.outputs.clone(), loads: part.loads.clone() };
    for rank in 1..comm.world_size() {
        let mut outputs = vec![E::from_f32(0.0); tokens_of(rank, comm.world_size(), tokens).len() * shape.hidden];
        receive(comm, rank, OUTPUTS, &mut outputs).context("collecting the outputs")?;
        outcome.outputs.extend(outputs);
        let mut loads = vec![0u32; experts_of(rank, comm.world_size(), shape.experts).len()];
        receive(comm, rank, LOADS, &mut loads).context("collecting the experts' loads")?;
        outcome.loads.extend(loads);
    }
    Ok(Some(outcome))
}

fn receive<T: bytemuck::Pod>(comm: &Communicator, rank: usize, tag: u32, values: &mut [T]) -> Result<()> {
    let bytes = bytemuck::cast_slice_mut(values);
    let status = comm.recv(rank, tag, bytes)?;
    ensure!(status.len == bytes.len(), "rank {rank} sent {} bytes, {} were expected", status.len, bytes.len());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_has_one_owner_and_the_stretches_differ_in_length() {
        for ranks in 1..=9 {
            for tokens in [0, 1, 5, 600] {
                let mut next = 0;
                for rank in 0..ranks {
                    let range = tokens_of(rank, ranks, tokens);
                    assert_eq!(range.start, next);
                    next = range.end;
                }
                assert_eq!(next, tokens);
            }
        }
        assert_eq!((0..4).map(|rank| tokens_of(rank, 4, 70).len()).collect::<Vec<_>>(), [10, 20, 30, 10]);
    }

    #[test]
    fn the_first_ranks_hold_one_expert_more() {
        assert_eq!((0..3).map(|rank| experts_of(rank, 3, 8)).collect::<Vec<_>>(), [0..3, 3..6, 6..8]);
        assert_eq!((0..3).map(|rank| experts_of(rank, 3, 2)).collect::<Vec<_>>(), [0..1, 1..2, 2..2]);
    }
}
