//! Puts, gets, signals and atomics between processes.

use anyhow::{Result, ensure};
use xccl::{Communicator, Remote, Source, Until, Update};

const ROUNDS: u64 = 50;

fn bytes(from: usize, to: usize, round: u64, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 131 + from * 17 + to * 7 + round as usize + (i >> 8)) as u8).collect()
}

/// Every rank puts to every rank, itself among them, pieces of all lengths; who gets one checks it and says so.
pub(crate) fn puts_and_signals(comm: &Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let part = 100_000;
    // By source: a word that counts its puts, a word that counts what it has taken of ours, its data.
    let block = comm.shared_alloc(world * part)?;
    // The blocks need not be at the same place: they are told of.
    let mut theirs = vec![];
    for peer in 0..world {
        comm.send(peer, 1, &block.remote().to_bytes())?;
    }
    for peer in 0..world {
        let mut told = [0; 24];
        comm.recv(peer, 1, &mut told)?;
        theirs.push(Remote::from_bytes(&told));
    }
    for round in 1..=ROUNDS {
        let len = [0, 1, 8, 64, 100, 4096, 99_000][round as usize % 7];
        for (peer, &there) in theirs.iter().enumerate() {
            let to = there.skip(rank * part);
            comm.put_signal(to.skip(64), &bytes(rank, peer, round, len), to, Update::Add(1))?;
        }
        for peer in (0..world).rev() {
            let from = if round % 2 == 0 { Source::Any } else { Source::Rank(peer) };
            ensure!(block.signal_wait(from, peer * part, Until::Eq(round))? == round, "round {round}");
            let mut got = vec![0; len];
            block.read(peer * part + 64, &mut got)?;
            ensure!(got == bytes(peer, rank, round, len), "{len} bytes from rank {peer} are wrong");
            // What was put here can be got back by whoever put it.
            comm.signal(theirs[peer].skip(rank * part + 8), Update::Set(round))?;
        }
        for (peer, &there) in theirs.iter().enumerate() {
            block.signal_wait(peer, peer * part + 8, Until::Ge(round))?;
            let mut back = vec![0; len];
            comm.get(there.skip(rank * part + 64), &mut back)?;
            ensure!(back == bytes(rank, peer, round, len), "{len} bytes at rank {peer} are wrong");
        }
    }
    // A counter of all, at rank 0.
    let counter = theirs[0].skip(16);
    let before = comm.atomic_fetch_add(counter, 1)?;
    ensure!(before < world as u64, "{before}");
    comm.quiet()?;
    comm.barrier()?;
    ensure!(comm.atomic_fetch(counter)? == world as u64, "the counter");
    comm.barrier()?;
    Ok(())
}
