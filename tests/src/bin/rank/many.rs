//! Many ranks, and idle ones.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use xccl::{Communicator, CoreSharing, DType, Moe, MoeConfig};

use crate::moe::{Case, Form, exchange};

/// Rank 0 waits a second for a message: it must sleep, not spin.
pub(crate) fn idle(comm: &Communicator) -> Result<()> {
    if comm.rank() == 1 {
        std::thread::sleep(Duration::from_millis(1500));
        return Ok(comm.send(0, 1, &[1])?);
    }
    let cpu = || -> Result<f64> {
        let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
        let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
        Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
    };
    let before = cpu()?;
    comm.recv(1, 1, &mut [0])?;
    let used = cpu()? - before;
    ensure!(used < 0.02 * 1.5, "used {used} s of a core in 1.5 s");
    Ok(())
}

/// Three exchanges, with a barrier after each.
pub(crate) fn crowd(comm: &Communicator) -> Result<()> {
    let config = MoeConfig::new(2, 24, 2, comm.world_size() + 3, DType::F32);
    let moe = Moe::new(comm, config.clone())?;
    for seed in 0..3 {
        let case = Case { config: config.clone(), world: comm.world_size(), seed };
        exchange::<f32>(comm, &moe, &case, Form::InPlace)?;
        comm.barrier()?;
    }
    Ok(())
}

/// Before joining: binds the ranks to one core, or each to one of its own.
pub(crate) fn take_cores(scenario: &str) -> Result<()> {
    let index = match scenario {
        "one-core" => 0,
        "own-cores" => std::env::var("XCCL_RANK")?.parse()?,
        _ => return Ok(()),
    };
    let usable = sched_getaffinity(Pid::from_raw(0))?;
    let core = (0..CpuSet::count()).filter(|&core| usable.is_set(core) == Ok(true)).nth(index);
    let mut own = CpuSet::new();
    own.set(core.with_context(|| format!("there is no usable core {index}"))?)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &own)?)
}

/// Two ranks on one core: a wait gives it to the other rank instead of spinning on it.
pub(crate) fn one_core(comm: &Communicator) -> Result<()> {
    let sharing = comm.core_sharing();
    ensure!(*sharing == CoreSharing::TooFewCores { ranks: 2, cores: 1 }, "{sharing}");
    for _ in 0..50 {
        comm.barrier()?;
    }
    let counts = comm.statistics();
    // What a wait found without giving the core away was there already.
    ensure!(counts.waits == counts.waits_yielded + counts.waits_slept && counts.waits >= 20, "{counts:?}");
    // A part of such ranks has no core for each either, however few they are.
    let part = comm.split(Some(comm.rank() as u32), 0)?.context("a part of one rank")?;
    ensure!(*part.core_sharing() == CoreSharing::Inherited { ranks: 2 }, "{}", part.core_sharing());
    Ok(())
}

/// Two ranks, each bound to a core: neither sees more than one, and yet they may spin.
pub(crate) fn own_cores(comm: &Communicator) -> Result<()> {
    let sharing = comm.core_sharing();
    ensure!(*sharing == CoreSharing::CoreEach { ranks: 2, cores: 2 }, "{sharing}");
    Ok(comm.barrier()?)
}
