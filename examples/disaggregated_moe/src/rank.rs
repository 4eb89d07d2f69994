//! A rank from its start to its end, and whom it blames if that is not a good one.

use anyhow::{Context, Error, Result};
use xccl::{Attention, Communicator};

use crate::attention::{self, Answered};
use crate::job::{Job, Role};
use crate::{experts, judge, prefill};

/// Plays this rank's role, and gives rank 0 all answers. Returns when all ranks are through.
pub fn run(world: &Communicator, job: &Job) -> Result<Option<judge::Collected>> {
    let collected = play(world, job).and_then(|answered| judge::collect(world, job, answered));
    collected.and_then(|collected| see_out(world).map(|()| collected)).map_err(|error| blame(world, job, error))
}

/// Also a rank that has nothing left to do stays until the others are through, so that all hear of one that dies. That may take
/// longer than any deadline.
fn see_out(world: &Communicator) -> Result<()> {
    loop {
        match world.barrier() {
            Err(xccl::Error::Timeout { .. }) => {}
            end => return Ok(end?),
        }
    }
}

/// What this rank has answered, if it is an attention rank.
fn play(world: &Communicator, job: &Job) -> Result<Option<Answered>> {
    let role = job.role_of(world.rank());
    let is_expert = matches!(role, Role::Expert { .. });
    let is_prefill = matches!(role, Role::Prefill { .. });
    // Pages go from prefill to attention ranks, rows from attention to expert ranks and back: who takes part in neither of the two is
    // not in its communicator.
    let kv = world.split((!is_expert).then_some(0), 0).context("joining the ranks that move pages")?;
    let a2e = world.split((!is_prefill).then_some(0), 0).context("joining the ranks that move rows")?;
    let domain = match (&a2e, role) {
        (Some(a2e), Role::Attention { domain }) => a2e.split(Some(domain as u32), 0),
        (Some(a2e), _) => a2e.split(None, 0),
        (None, _) => Ok(None),
    }
    .context("joining the attention ranks of a domain")?;
    world.barrier()?;
    if world.rank() == 0 {
        let Job { prefill, experts, .. } = job;
        println!("{} attention, {experts} expert and {prefill} prefill ranks have joined", job.attention_ranks());
    }
    match (kv, a2e, domain) {
        (Some(kv), Some(a2e), Some(domain)) => {
            let attention = Attention::new(&a2e, experts::roles(job)?)?;
            attention::run(&kv, &domain, job, &&attention).map(Some)
        }
        (_, Some(a2e), _) => experts::run(&a2e, job).map(|()| None),
        (Some(kv), ..) => prefill::run(&kv, job).map(|()| None),
        (None, None, _) => Ok(None),
    }
}

/// Says which rank the error goes back to. What this rank has met may only be a consequence: the rank that it waited for has left,
/// because another one has died. But all ranks know who is still there, in the communicator of all.
fn blame(world: &Communicator, job: &Job, error: Error) -> Error {
    let missing = match world.barrier() {
        // The rank that died may still have come to this one: then the next one tells.
        Ok(()) => world.barrier().err().filter(|missing| matches!(missing, xccl::Error::PeerDied { .. })),
        Err(missing) => Some(missing),
    };
    match missing {
        Some(xccl::Error::PeerDied { rank, .. }) => error.context(format!("rank {rank}, {}, died", job.role_of(rank))),
        Some(xccl::Error::PeerLeft { rank, .. } | xccl::Error::PeerUnreachable { rank, .. }) => {
            error.context(format!("rank {rank}, {}, has ended before the job was done", job.role_of(rank)))
        }
        _ => error,
    }
}
