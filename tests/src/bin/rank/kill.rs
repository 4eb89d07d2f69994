//! A rank that is killed, and what the others say of it.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use xccl::{Communicator, DType, Error, Moe, MoeConfig, Routing, Source, Until, Update};

/// The last rank kills itself at the point that the scenario names; the others expect to be told.
pub(crate) fn die(comm: &Communicator, scenario: &str) -> Result<()> {
    let last = comm.world_size() - 1;
    let block = comm.shared_alloc(8)?;
    let moe = Moe::new(comm, MoeConfig::new(1, 8, 1, comm.world_size(), DType::F32))?;
    comm.barrier()?;
    let kill = || nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    let dies = comm.rank() == last;
    let routing = ([last as i32], [1.0f32]);
    if dies && scenario != "die-in-combine" {
        // The others are asleep by then.
        std::thread::sleep(Duration::from_millis(300));
        kill()?;
    }
    let start = Instant::now();
    let outcome = match scenario {
        "die-in-barrier" => comm.barrier(),
        "die-in-recv" => comm.recv(last, 1, &mut [0; 8]).map(|_| ()),
        "die-in-signal" => block.signal_wait(last, 0, Until::Ne(0)).map(|_| ()),
        "die-in-signal-any" => block.signal_wait(Source::Any, 0, Until::Ne(0)).map(|_| ()),
        "die-in-recv-any" => comm.recv(Source::Any, 1, &mut [0; 8]).map(|_| ()),
        _ => {
            let sent = moe.dispatch_send(&[1.0f32; 8], &Routing::new(&routing.0, &routing.1))?;
            let batch = moe.dispatch_recv(&sent);
            if dies {
                std::thread::sleep(Duration::from_millis(300));
                kill()?;
            }
            match batch {
                Err(err) => Err(err),
                Ok(batch) => moe.combine_send(batch).and_then(|()| moe.combine_recv(sent, &mut [0.0f32; 8])),
            }
        }
    };
    // From another node a death may look as if the link were down.
    let Err(Error::PeerDied { rank, .. } | Error::PeerUnreachable { rank, .. }) = outcome else { bail!("{outcome:?}") };
    ensure!(start.elapsed() < Duration::from_secs(5), "told only after {:?}", start.elapsed());
    ensure!(rank == last, "rank {rank} was blamed, rank {last} died");
    // Later calls say the same.
    let put = comm.put_signal(block.remote().of(last), &[], block.remote().of(last), Update::Add(1));
    let again = comm.barrier();
    let names = |err: &Error| match *err {
        Error::PeerDied { rank, .. } | Error::PeerUnreachable { rank, .. } => Some(rank),
        _ => None,
    };
    ensure!(put.as_ref().err().and_then(names) == Some(last), "put_signal: {put:?}");
    ensure!(again.as_ref().err().and_then(names) == Some(last), "barrier: {again:?}");
    Ok(())
}
