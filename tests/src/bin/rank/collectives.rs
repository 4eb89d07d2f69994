//! Collectives between processes.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use xccl::{Collective, Communicator, Error, ReduceOp};

/// Every collective at sizes that take each of its ways, on the communicator, on a duplicate and on a part of it.
pub(crate) fn every_collective(comm: &Communicator) -> Result<()> {
    all_of(comm)?;
    all_of(&comm.duplicate()?)?;
    let Some(part) = comm.split(Some(comm.rank() as u32 % 2), -(comm.rank() as i32))? else { bail!("no part") };
    all_of(&part)?;
    all_of(comm)
}

fn all_of(comm: &Communicator) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let sum = (world * (world + 1) / 2) as i64;
    for count in [1, 5, 400, 3000, 40_000, 300_000] {
        let value = |rank: usize, i: usize| (rank as i64 + 1) * (i as i64 % 1009 + 1);
        let mine = |n: usize| (0..n).map(|i| value(rank, i)).collect::<Vec<_>>();
        let root = count % world;

        let mut got = vec![0; count];
        comm.all_reduce(&mine(count), &mut got, ReduceOp::Sum)?;
        ensure!(got.iter().enumerate().all(|(i, &x)| x == sum * (i as i64 % 1009 + 1)), "all_reduce of {count}");

        let mut got = mine(count);
        comm.reduce_in_place(&mut got, ReduceOp::Max, root)?;
        let of = if rank == root { world - 1 } else { rank };
        ensure!(got.iter().enumerate().all(|(i, &x)| x == value(of, i)), "reduce of {count}");

        let mut got = vec![0; count];
        comm.reduce_scatter(&mine(count * world), &mut got, ReduceOp::Min)?;
        ensure!(got.iter().enumerate().all(|(i, &x)| x == value(0, rank * count + i)), "reduce_scatter of {count}");

        let mut got = vec![0; count * world];
        comm.all_gather(&mine(count), &mut got)?;
        let from_all = |got: &[i64]| got.iter().enumerate().all(|(i, &x)| x == value(i / count, i % count));
        ensure!(from_all(&got), "all_gather of {count}");

        let mut got = vec![0; if rank == root { count * world } else { 0 }];
        comm.gather(&mine(count), &mut got, root)?;
        ensure!(from_all(&got), "gather of {count}");

        let (mut got, all) = (vec![0; count], if rank == root { mine(count * world) } else { vec![] });
        comm.scatter(&all, &mut got, root)?;
        ensure!(got.iter().enumerate().all(|(i, &x)| x == value(root, rank * count + i)), "scatter of {count}");

        let mut got = mine(count);
        comm.broadcast(&mut got, root)?;
        ensure!(got.iter().enumerate().all(|(i, &x)| x == value(root, i)), "broadcast of {count}");

        let mut got = mine(count * world);
        comm.all_to_all_in_place(&mut got)?;
        let is_right = |(i, &x): (usize, &i64)| x == value(i / count, rank * count + i % count);
        ensure!(got.iter().enumerate().all(is_right), "all_to_all of {count}");

        // Rank r sends (r + s) % 3 * count elements to rank s.
        let len = |from: usize, to: usize| (from + to) % 3 * count;
        let parts = |len: &dyn Fn(usize) -> usize| {
            let ends = (0..world).scan(0, |end, r| Some(std::mem::replace(end, *end + len(r))..*end));
            ends.collect::<Vec<_>>()
        };
        let (sends, recvs) = (parts(&|to| len(rank, to)), parts(&|from| len(from, rank)));
        let mut got = vec![0; recvs[world - 1].end];
        comm.all_to_all_v(&mine(sends[world - 1].end), &sends, &mut got, &recvs)?;
        for (from, part) in recvs.into_iter().enumerate() {
            let start: usize = (0..rank).map(|to| len(from, to)).sum();
            let is_right = |(i, &x): (usize, &i64)| x == value(from, start + i);
            ensure!(got[part].iter().enumerate().all(is_right), "all_to_all_v of {count}");
        }
    }
    Ok(())
}

/// The last rank kills itself before a collective, or in the middle of many; the others expect to be told, in every one.
pub(crate) fn die(comm: &Communicator, scenario: &str) -> Result<()> {
    let last = comm.world_size() - 1;
    comm.barrier()?;
    let kill = || {
        std::thread::sleep(Duration::from_millis(300));
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
    };
    let amid = scenario == "collective-die-amid";
    if comm.rank() == last {
        if amid { drop(std::thread::spawn(kill)) } else { kill() }
    }
    let (mut large, mut blocks) = (vec![1.0f32; 300_000], vec![0u8; comm.world_size() * 1000]);
    let start = Instant::now();
    let outcome = match scenario {
        "collective-die-amid" => (|| loop {
            comm.all_reduce_in_place(&mut large, ReduceOp::Max)?;
            comm.all_gather_in_place(&mut blocks)?;
        })(),
        "collective-die-reduce" => comm.all_reduce_in_place(&mut large, ReduceOp::Sum),
        "collective-die-broadcast" => comm.broadcast(&mut large, last),
        _ => comm.scope(|scope| {
            let mut gather = scope.start(Collective::AllGather { send: None, recv: &mut blocks })?;
            let mut sum = scope.start(Collective::AllReduce { send: None, recv: &mut large, op: ReduceOp::Sum })?;
            sum.wait()?;
            gather.wait()
        }),
    };
    let Err(Error::PeerDied { rank, .. }) = outcome else { bail!("{outcome:?}") };
    ensure!(start.elapsed() < Duration::from_secs(5), "told only after {:?}", start.elapsed());
    ensure!(rank == last, "rank {rank} was blamed, rank {last} died");
    let again = comm.all_gather_in_place(&mut blocks);
    ensure!(matches!(again, Err(Error::PeerDied { rank, .. }) if rank == last), "{again:?}");
    Ok(())
}

/// The last rank asks for another number of elements.
pub(crate) fn mismatch(comm: &Communicator) -> Result<()> {
    let last = comm.world_size() - 1;
    let mut buffer = vec![0u8; if comm.rank() == last { 9 } else { 10 }];
    let made = comm.all_reduce_in_place(&mut buffer, ReduceOp::Max);
    let Err(err @ Error::CallMismatch { .. }) = made else { bail!("{made:?}") };
    let text = err.to_string();
    for part in ["all_reduce(max, 9 u8)", "all_reduce(max, 10 u8)", &format!("rank {last}")] {
        ensure!(text.contains(part), "{part:?} is not in {text:?}");
    }
    // All are told before one leaves: a rank that has left is no reason any more.
    Ok(comm.barrier()?)
}
