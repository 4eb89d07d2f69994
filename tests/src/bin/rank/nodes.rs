//! Ranks on several nodes.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use xccl::{Communicator, Config, DType, Error, Moe, MoeConfig};

use crate::moe::{Case, Form, exchange};

const PATIENCE: Duration = Duration::from_secs(5);

/// What `from` has for `to`: of a length that tells them apart.
fn words(from: usize, to: usize) -> Vec<u8> {
    (0..from * 1000 + to * 10 + 1).map(|i| (i * 7 + from * 31 + to * 17) as u8).collect()
}

/// Every rank has something for every other one.
fn meet(comm: &Communicator) -> Result<()> {
    let (me, ranks) = (comm.rank(), comm.world_size());
    for distance in 1..ranks {
        let (to, from) = ((me + distance) % ranks, (me + ranks - distance) % ranks);
        let (sent, mut got) = (words(me, to), vec![0; words(from, me).len()]);
        comm.scope(|scope| {
            let receive = scope.irecv(from, 7, &mut got)?;
            let send = scope.isend(to, 7, &sent)?;
            xccl::wait_all([send, receive])
        })?;
        ensure!(got == words(from, me), "rank {me} got something else from rank {from}");
    }
    Ok(comm.barrier()?)
}

/// All meet, then parts of them that lie across the nodes, then all once more from the same environment.
pub fn across_nodes(comm: &Communicator) -> Result<()> {
    meet(comm)?;
    let part = comm.split(Some((comm.rank() % 2) as u32), -(comm.rank() as i32))?;
    part.map_or(Ok(()), |part| meet(&part))?;
    meet(&comm.duplicate()?)?;
    meet(&Communicator::from_env()?)
}

/// Every rank waits for a message that never comes, of a rank that is going to vanish: that is told, long before the deadline.
/// Probes are answered before, and never afterwards.
pub fn cut_off(comm: &Communicator) -> Result<()> {
    meet(comm)?;
    comm.probe((comm.rank() + 1) % comm.world_size(), PATIENCE)?;
    std::fs::write(format!("{}/{}", std::env::var("TEST_MET")?, comm.rank()), "")?;
    let other = (comm.rank() + 1) % comm.world_size();
    match comm.recv(other, 9, &mut [0; 8]) {
        Err(Error::PeerDied { rank, .. }) if rank != comm.rank() => match comm.probe(other, PATIENCE / 10) {
            Err(Error::PeerDied { .. } | Error::PeerUnreachable { .. } | Error::Timeout { .. }) => Ok(()),
            outcome => bail!("a host was cut off, and a probe of it ended with {outcome:?}"),
        },
        outcome => bail!("a host was cut off, and the wait for a message ended with {outcome:?}"),
    }
}

/// Exchanges and messages, each checked, while the test cuts a host off for a while. What comes in time is right; otherwise the
/// call ends with an error that says so, within the deadline.
pub fn under_a_cut(comm: &Communicator) -> Result<()> {
    let ready = format!("{}/{}", std::env::var("TEST_MET")?, comm.rank());
    let config = MoeConfig::new(9, 100, 3, 11, DType::F32);
    let moe = Moe::new(comm, config.clone())?;
    let round = |seed| -> Result<()> {
        let case = Case { config: config.clone(), world: comm.world_size(), seed };
        exchange::<f32>(comm, &moe, &case, Form::InPlace)?;
        meet(comm)
    };
    round(0)?;
    std::fs::write(ready, "")?;
    let start = Instant::now();
    for seed in 1.. {
        let before = Instant::now();
        if let Err(err) = round(seed % 50) {
            let waited = before.elapsed();
            ensure!(waited < PATIENCE * 3, "told only after {waited:?}: {err}");
            return match err.downcast_ref() {
                Some(
                    Error::PeerDied { .. }
                    | Error::PeerUnreachable { .. }
                    | Error::PeerLeft { .. }
                    | Error::PeerAbandoned { .. }
                    | Error::Timeout { .. },
                ) => Ok(()),
                _ => Err(err),
            };
        }
        // All leave after the same round.
        let mut over = vec![u8::from(start.elapsed() > PATIENCE)];
        if let Err(err) = comm.broadcast(&mut over, 0) {
            ensure!(before.elapsed() < PATIENCE * 3, "told only after {:?}: {err}", before.elapsed());
            return Ok(());
        }
        if over == [1] {
            break;
        }
    }
    Ok(())
}

/// Communicators come and go, and take all with them that they have opened.
pub fn nothing_stays(comm: &Communicator) -> Result<()> {
    let open = || -> std::io::Result<Vec<_>> {
        let entries = std::fs::read_dir("/proc/self/fd")?.flatten();
        Ok(entries.map(|entry| std::fs::read_link(entry.path()).unwrap_or_default()).collect())
    };
    // What is opened once for all, or by this communicator for its first messages, is not what this is about.
    meet(comm)?;
    meet(&Communicator::from_env_with(Config::from_env()?)?)?;
    let before = open()?;
    for _ in 0..4 {
        let comm = Communicator::from_env()?;
        meet(&comm)?;
        meet(&comm.duplicate()?)?;
    }
    // The provider may still be closing a connection that it turned out not to need, then as now.
    let start = Instant::now();
    while open()?.len() > before.len() {
        ensure!(start.elapsed() < PATIENCE, "open files before: {before:?}, after: {:?}", open()?);
        std::thread::sleep(PATIENCE / 100);
    }
    Ok(())
}
