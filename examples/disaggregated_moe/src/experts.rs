//! An expert rank, and how attention ranks reach it.

use anyhow::{Result, ensure};
use xccl::placement::Placement;
use xccl::{Attention, Communicator, DType, Ended, MoeConfig, RoleConfig, Routing};

use crate::job::Job;
use crate::model::Experts;
use crate::schedule::Exchange;

/// Who has attention, who has experts, and what travels between them. A rank's numbers are those of `comm`, the communicator of both.
pub fn roles(job: &Job) -> Result<RoleConfig> {
    let shape = &job.shape;
    let mut moe = MoeConfig::new(job.seats, shape.hidden, shape.topk, shape.experts(), DType::F32);
    moe.placement = Some(Placement::of_ranks(&job.placement(), job.expert_ranks().end)?);
    Ok(RoleConfig::new((0..job.domains).map(|domain| job.domain(domain)), job.expert_ranks(), moe))
}

/// Serves micro-batches of all domains in a loop of its own, until all attention ranks are done.
pub fn run(comm: &Communicator, job: &Job) -> Result<()> {
    let loops = xccl::Experts::new(comm, roles(job)?)?;
    let experts = Experts::seeded(&job.shape, loops.local_experts().iter().copied());
    let mut row = vec![0.0; job.shape.hidden];
    while let Some(mut batch) = loops.a2e_recv()? {
        for i in 0..batch.len() {
            let index = batch.row(i).expert;
            batch.copy_row(i, &mut row)?;
            experts.answer(index, &row, batch.output_row::<f32>(i)?);
        }
        loops.e2a_send(batch)?;
    }
    let ended = loops.ended();
    ensure!(ended == Some(Ended::Done), "the loop has ended before the attention ranks were done: {ended:?}");
    Ok(())
}

impl<'a> Exchange for &'a Attention {
    type Sent = xccl::Exchange<'a>;

    fn send(&self, rows: &[f32], experts: &[i32], weights: &[f32]) -> Result<Self::Sent> {
        Ok(self.a2e_send(rows, &Routing::new(experts, weights))?)
    }

    fn receive(&self, sent: Self::Sent, sums: &mut [f32]) -> Result<()> {
        Ok(self.e2a_recv(sent, sums)?)
    }
}
