//! Many ranks, and idle ones.

use std::time::Duration;

use anyhow::{Result, ensure};
use xccl::{Communicator, DType, Moe, MoeConfig};

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
