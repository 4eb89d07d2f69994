//! Messages of all sizes.

use rand::Rng;
use rand::rngs::StdRng;
use xccl::{Communicator, Source, wait_all};

use super::{Played, bytes, check};

/// In the slot, in the ring, in pieces, and described.
const SIZES: [usize; 11] = [0, 1, 8, 40, 41, 200, 4096, 9000, 30_000, 70_000, 300_000];

/// Every rank has something for every other one: both ways at once, at some distance.
pub fn ring(comm: &Communicator, rng: &mut StdRng) -> Played {
    let (me, ranks) = (comm.rank(), comm.world_size());
    let salt: u64 = rng.random();
    for distance in 1..ranks {
        let (to, from) = ((me + distance) % ranks, (me + ranks - distance) % ranks);
        let len = SIZES[rng.random_range(0..SIZES.len())] / if distance > 2 { 16 } else { 1 };
        let (sent, mut got) = (bytes(salt, me, to, len), vec![0; len]);
        comm.scope(|scope| {
            let receive = scope.irecv(from, 7, &mut got)?;
            let send = scope.isend(to, 7, &sent)?;
            wait_all([send, receive])
        })?;
        check(got == bytes(salt, from, me, len), || format!("{len} bytes from rank {from} are wrong"))?;
    }
    Ok(())
}

/// All send to one, which takes what comes; it may have kept some of them before it asks.
pub fn any_source(comm: &Communicator, rng: &mut StdRng) -> Played {
    let (me, ranks) = (comm.rank(), comm.world_size());
    let (salt, root, each): (u64, usize, usize) = (rng.random(), rng.random_range(0..ranks), rng.random_range(1..6));
    let len = SIZES[rng.random_range(0..9)];
    if me != root {
        for n in 0..each {
            comm.send(root, 9, &bytes(salt + n as u64, me, root, len))?;
        }
        // So that nobody is a round ahead, whose messages would be taken for these.
        return Ok(comm.barrier()?);
    }
    let mut come = vec![0; ranks];
    for _ in 0..each * (ranks - 1) {
        let mut got = vec![0; len + 1];
        let status = comm.recv(Source::Any, 9, &mut got)?;
        let n = come[status.source];
        let right = status.len == len && got[..len] == bytes(salt + n, status.source, root, len);
        check(right, || format!("message {n} of rank {} is wrong: {status:?} of {len}", status.source))?;
        come[status.source] += 1;
    }
    Ok(comm.barrier()?)
}
