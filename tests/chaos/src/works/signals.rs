//! Puts, signals and atomics.

use rand::Rng;
use rand::rngs::StdRng;
use xccl::{Communicator, Remote, Until, Update};

use super::{Played, bytes, check};

const PART: usize = 20_000;

/// Each rank's block, which need not lie at the same place everywhere.
fn blocks_of_all(comm: &Communicator, own: Remote) -> Played<Vec<Remote>> {
    let mut all = vec![0u8; comm.world_size() * 24];
    comm.all_gather(&own.to_bytes(), &mut all)?;
    let (each, _) = all.as_chunks::<24>();
    Ok(each.iter().map(Remote::from_bytes).collect())
}

/// Every rank puts to its right, which says when it has taken it.
pub fn neighbours(comm: &Communicator, rng: &mut StdRng) -> Played {
    let (me, ranks) = (comm.rank(), comm.world_size());
    let salt: u64 = rng.random();
    let block = comm.shared_alloc(PART)?;
    block.write(0, &[0; 128])?;
    let blocks = blocks_of_all(comm, block.remote())?;
    let (left, right) = ((me + ranks - 1) % ranks, (me + 1) % ranks);
    for round in 1..=rng.random_range(2..30) {
        let len = [0, 1, 8, 64, 1000, 9000, 19_000][rng.random_range(0..7)];
        let to = blocks[right];
        comm.put_signal(to.skip(128), &bytes(salt + round, me, right, len), to, Update::Add(1))?;
        block.signal_wait(left, 0, Until::Eq(round))?;
        let mut got = vec![0; len];
        block.read(128, &mut got)?;
        check(got == bytes(salt + round, left, me, len), || format!("{len} bytes put by rank {left} are wrong"))?;
        comm.signal(blocks[left].skip(64), Update::Set(round))?;
        block.signal_wait(right, 64, Until::Ge(round))?;
    }
    // The block is nobody's before all are done with it.
    comm.quiet()?;
    Ok(comm.barrier()?)
}

/// All draw numbers from a counter of one rank: none is drawn twice.
pub fn tickets(comm: &Communicator, rng: &mut StdRng) -> Played {
    let (me, ranks) = (comm.rank(), comm.world_size());
    let (root, each): (usize, usize) = (rng.random_range(0..ranks), rng.random_range(1..8));
    let block = comm.shared_alloc(8)?;
    block.write(0, &[0; 8])?;
    let blocks = blocks_of_all(comm, block.remote())?;
    let mut drawn = vec![];
    for _ in 0..each {
        drawn.push(comm.atomic_fetch_add(blocks[root], 1)?);
    }
    let mut all = vec![0u8; each * ranks * 8];
    let mine: Vec<u8> = drawn.iter().flat_map(|n| n.to_le_bytes()).collect();
    comm.all_gather(&mine, &mut all)?;
    let (words, _) = all.as_chunks::<8>();
    let mut numbers: Vec<u64> = words.iter().map(|&word| u64::from_le_bytes(word)).collect();
    numbers.sort_unstable();
    let right = numbers.iter().enumerate().all(|(i, &n)| n == i as u64);
    check(right, || format!("rank {me} sees {numbers:?} drawn"))?;
    Ok(comm.barrier()?)
}
