//! Jobs that grow old, that are forked, and that run out of something.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use xccl::{Communicator, Config, DType, Error, MemoryFlavour, Moe, MoeConfig, ReduceOp, Routing, UniqueId};

/// What this process holds: descriptors, mappings of segments, KiB of memory.
fn held() -> Result<(usize, usize, u64)> {
    let descriptors = std::fs::read_dir("/proc/self/fd")?.count();
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let segments = maps.lines().filter(|line| line.contains("xccl-")).count();
    let status = std::fs::read_to_string("/proc/self/status")?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let resident = resident.and_then(|text| text.split_whitespace().next()?.parse().ok()).context("VmRSS")?;
    Ok((descriptors, segments, resident))
}

fn number(name: &str, default: u64) -> Result<u64> {
    Ok(std::env::var(name).ok().map(|text| text.parse()).transpose()?.unwrap_or(default))
}

/// One token, or none, to each rank in turn.
fn exchange(moe: &Moe, n: u64, world: usize) -> xccl::Result<()> {
    let (id, tokens) = ([(n % world as u64) as i32], !n.is_multiple_of(3) as usize);
    let (ids, weights) = (&id[..tokens], &[1.0f32][..tokens]);
    let sent = moe.dispatch_send(&[n as f32; 8][..8 * tokens], &Routing::new(ids, weights))?;
    let mut batch = moe.dispatch_recv(&sent)?;
    for i in 0..batch.len() {
        let mut row = [0.0f32; 8];
        batch.copy_row(i, &mut row)?;
        batch.output_row::<f32>(i)?.copy_from_slice(&row);
    }
    moe.combine_send(batch)?;
    let mut out = [0.0f32; 8];
    moe.combine_recv(sent, &mut out[..8 * tokens])?;
    assert!(out[..8 * tokens].iter().all(|&x| x == n as f32), "exchange {n}: {out:?}");
    Ok(())
}

/// Many exchanges, messages and collectives: memory and descriptors stay what they are.
pub(crate) fn many_exchanges(comm: &Communicator) -> Result<()> {
    let (me, world) = (comm.rank(), comm.world_size());
    let moe = Moe::new(comm, MoeConfig::new(1, 8, 1, world, DType::F32))?;
    let rounds = number("TEST_EXCHANGES", 4000)?;
    let mut before = None;
    for n in 0..rounds {
        exchange(&moe, n % 1000, world)?;
        if n % 16 == 0 {
            let mut got = [0; 8];
            comm.send((me + 1) % world, 1, &n.to_le_bytes())?;
            comm.recv((me + world - 1) % world, 1, &mut got)?;
            let mut sum = [n];
            let word: &mut [i64] = &mut [sum[0] as i64];
            comm.all_reduce_in_place(word, ReduceOp::Sum)?;
            sum[0] = word[0] as u64;
            ensure!(u64::from_le_bytes(got) == n && sum[0] == n * world as u64, "round {n}");
        }
        // By then all has been touched that ever is.
        if n == rounds / 4 {
            before = Some(held()?);
        }
    }
    let (before, after) = (before.context("rounds")?, held()?);
    ensure!(before.0 == after.0 && before.1 == after.1, "held {before:?} and then {after:?}");
    ensure!(after.2 <= before.2 + 512, "memory grew from {} to {} KiB", before.2, after.2);
    Ok(comm.barrier()?)
}

/// Communicators come and go; nothing stays of them.
pub(crate) fn many_communicators(comm: &Communicator) -> Result<()> {
    let count = number("TEST_COMMUNICATORS", 100)?;
    let mut before = None;
    for n in 0..count {
        let part = comm.duplicate()?;
        part.barrier()?;
        if n % 4 == 0 {
            let moe = Moe::new(&part, MoeConfig::new(1, 8, 1, part.world_size(), DType::F32))?;
            exchange(&moe, n, part.world_size())?;
        }
        drop(part);
        if n == count / 4 {
            before = Some(held()?);
        }
    }
    let (before, after) = (before.context("rounds")?, held()?);
    ensure!(before.0 == after.0 && before.1 == after.1, "held {before:?} and then {after:?}");
    ensure!(after.2 <= before.2 + 2048, "memory grew from {} to {} KiB", before.2, after.2);
    Ok(())
}

/// Rank 0 forks. The child is told that the communicator is not its own, and its end is nobody's but its.
pub(crate) fn forked(comm: &Communicator) -> Result<()> {
    let world = comm.world_size();
    let moe = Moe::new(comm, MoeConfig::new(1, 8, 1, world, DType::F32))?;
    exchange(&moe, 1, world)?;
    if comm.rank() == 0 {
        let block = comm.heap_alloc(100)?;
        // SAFETY: the child makes no assumption about locks: it calls what is to be refused, and returns.
        match unsafe { fork() }? {
            ForkResult::Child => {
                let refused = [
                    comm.barrier().err(),
                    comm.send(1, 1, &[1]).err(),
                    comm.recv(1, 1, &mut [0]).err(),
                    comm.scope(|scope| scope.isend(1, 1, &[1; 100])?.wait()).err(),
                    comm.all_reduce_in_place(&mut [1.0f32], ReduceOp::Sum).err(),
                    exchange(&moe, 2, world).err(),
                    comm.split(Some(0), 0).err(),
                    comm.shared_alloc(8).err(),
                    Moe::new(comm, MoeConfig::new(1, 8, 1, world, DType::F32)).err(),
                ];
                comm.abort();
                let all = refused.iter().all(|err| matches!(err, Some(Error::Forked { .. })));
                // And all that it has copies of ends with it.
                drop((block, moe));
                ensure!(all, "{refused:?}");
                return Ok(());
            }
            ForkResult::Parent { child } => {
                exchange(&moe, 2, world)?;
                let ended = waitpid(child, None)?;
                ensure!(matches!(ended, WaitStatus::Exited(_, 0)), "the child: {ended:?}");
            }
        }
    } else {
        exchange(&moe, 2, world)?;
    }
    comm.barrier()?;
    // What the child might have said in its parent's name has been heard by now.
    std::thread::sleep(Duration::from_millis(50));
    exchange(&moe, 3, world)?;
    comm.duplicate()?.barrier()?;
    Ok(comm.barrier()?)
}

fn quick() -> Config {
    Config::default().timeout(Some(Duration::from_millis(400))).heap_bytes(64 << 10).p2p_ring_bytes(16 << 10)
}

/// Two ranks of this process join, use what they have made, and leave: what each came to.
fn pair(config: &Config) -> Result<Vec<xccl::Result<()>>> {
    let id = UniqueId::new()?;
    let play = |rank: usize| -> xccl::Result<()> {
        let comm = Communicator::init(rank, 2, &id, config.clone())?;
        let moe = Moe::new(&comm, MoeConfig::new(1, 8, 1, 2, DType::F32))?;
        exchange(&moe, 1, 2)?;
        comm.duplicate()?.barrier()
    };
    std::thread::scope(|s| {
        let other = s.spawn(|| play(1));
        let outcome = play(0);
        Ok(vec![outcome, other.join().ok().context("a rank has panicked")?])
    })
}

/// With room for one descriptor more each time, until there are enough.
pub(crate) fn few_descriptors() -> Result<()> {
    pair(&quick())?.into_iter().collect::<xccl::Result<Vec<_>>>()?;
    let before = held()?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    for more in 0..60 {
        setrlimit(Resource::RLIMIT_NOFILE, before.0 as u64 + more, hard)?;
        let outcomes = pair(&quick());
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
        let after = held()?;
        ensure!(after.0 == before.0 && after.1 == before.1, "{more} more: {before:?} and then {after:?}");
        // An id cannot even be made, at first.
        if outcomes.is_ok_and(|outcomes| outcomes.iter().all(Result::is_ok)) {
            ensure!(more > 5, "no call has failed");
            return Ok(pair(&quick())?.into_iter().collect::<xccl::Result<()>>()?);
        }
    }
    bail!("60 descriptors more were not enough")
}

/// An address space with too little room for the segments.
pub(crate) fn little_address_space() -> Result<()> {
    let large = quick().heap_bytes(256 << 20);
    pair(&quick())?.into_iter().collect::<xccl::Result<Vec<_>>>()?;
    let before = held()?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_AS)?;
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm.split_whitespace().next().context("statm")?.parse()?;
    setrlimit(Resource::RLIMIT_AS, pages * 4096 + (200 << 20), hard)?;
    let outcomes = pair(&large)?;
    setrlimit(Resource::RLIMIT_AS, soft, hard)?;
    ensure!(outcomes.iter().all(Result::is_err), "{outcomes:?}");
    let after = held()?;
    ensure!(after.0 == before.0 && after.1 == before.1, "{before:?} and then {after:?}");
    Ok(pair(&quick())?.into_iter().collect::<xccl::Result<()>>()?)
}

/// A `/dev/shm` with too little room, and nothing else in it.
pub(crate) fn full_dev_shm() -> Result<()> {
    let posix = quick().memory(MemoryFlavour::Posix).timeout(Some(Duration::from_secs(5)));
    let outcomes = pair(&posix.clone().heap_bytes(64 << 20))?;
    let is_told = |outcome: &xccl::Result<()>| match outcome {
        Err(err) => err.to_string().contains("/dev/shm"),
        Ok(()) => false,
    };
    ensure!(outcomes.iter().all(is_told), "{outcomes:?}");
    let left: Vec<_> = std::fs::read_dir("/dev/shm")?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(pair(&posix)?.into_iter().collect::<xccl::Result<()>>()?)
}
