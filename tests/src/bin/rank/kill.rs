//! A rank that is killed, and what the others say of it.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use xccl::{
    Attention, Communicator, DType, Error, Experts, Forward, Moe, MoeConfig, ReduceOp, Role, RoleConfig, Routing,
    SharedBuffer, Source, Until, Update,
};

/// What the ranks wait in.
struct Waits<'a> {
    comm: &'a Communicator,
    block: SharedBuffer,
    moe: Moe,
}

impl<'a> Waits<'a> {
    fn new(comm: &'a Communicator) -> Result<Self> {
        let block = comm.shared_alloc(8)?;
        let moe = Moe::new(comm, MoeConfig::new(1, 8, 1, comm.world_size(), DType::F32))?;
        comm.barrier()?;
        Ok(Waits { comm, block, moe })
    }

    /// Waits in vain: rank `last` does not come.
    fn wait(&self, what: &str, last: usize) -> xccl::Result<()> {
        let comm = self.comm;
        match what {
            "barrier" => comm.barrier(),
            "recv" => comm.recv(last, 1, &mut [0; 8]).map(|_| ()),
            "recv-any" => comm.recv(Source::Any, 1, &mut [0; 8]).map(|_| ()),
            // Of one that lives.
            "recv-other" => comm.recv((last + 1) % comm.world_size(), 1, &mut [0; 8]).map(|_| ()),
            "signal" => self.block.signal_wait(last, 0, Until::Ne(0)).map(|_| ()),
            "signal-any" => self.block.signal_wait(Source::Any, 0, Until::Ne(0)).map(|_| ()),
            "all-reduce" => comm.all_reduce_in_place(&mut [1.0f32], ReduceOp::Sum),
            "split" => comm.split(Some(0), 0).map(|_| ()),
            "dispatch" => {
                let sent = self.moe.dispatch_send(&[1.0f32; 8], &Routing::new(&[last as i32], &[1.0]))?;
                self.moe.dispatch_recv(&sent).map(|_| ())
            }
            other => unreachable!("{other}"),
        }
    }
}

fn die_now() -> Result<()> {
    Ok(nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL)?)
}

/// The last rank kills itself at the point that the scenario names; the others expect to be told.
pub(crate) fn die(comm: &Communicator, scenario: &str) -> Result<()> {
    let last = comm.world_size() - 1;
    let waits = Waits::new(comm)?;
    let what = scenario.trim_start_matches("die-in-");
    let dies = comm.rank() == last;
    if dies && what != "combine" {
        // The others are asleep by then.
        std::thread::sleep(Duration::from_millis(300));
        die_now()?;
    }
    let start = Instant::now();
    let outcome = match what {
        "combine" => {
            let moe = &waits.moe;
            let sent = moe.dispatch_send(&[1.0f32; 8], &Routing::new(&[last as i32], &[1.0]))?;
            let batch = moe.dispatch_recv(&sent);
            if dies {
                std::thread::sleep(Duration::from_millis(300));
                die_now()?;
            }
            match batch {
                Err(err) => Err(err),
                Ok(batch) => moe.combine_send(batch).and_then(|()| moe.combine_recv(sent, &mut [0.0f32; 8])),
            }
        }
        what => waits.wait(what, last),
    };
    // From another node a death may look as if the link were down.
    let Err(Error::PeerDied { rank, .. } | Error::PeerUnreachable { rank, .. }) = outcome else { bail!("{outcome:?}") };
    ensure!(start.elapsed() < Duration::from_secs(5), "told only after {:?}", start.elapsed());
    ensure!(rank == last, "rank {rank} was blamed, rank {last} died");
    // Later calls say the same.
    let (block, names) = (&waits.block, |err: &Error| match *err {
        Error::PeerDied { rank, .. } | Error::PeerUnreachable { rank, .. } => Some(rank),
        _ => None,
    });
    let put = comm.put_signal(block.remote().of(last), &[], block.remote().of(last), Update::Add(1));
    ensure!(put.as_ref().err().and_then(names) == Some(last), "put_signal: {put:?}");
    for again in ["barrier", "split", "all-reduce"] {
        let outcome = waits.wait(again, last);
        ensure!(outcome.as_ref().err().and_then(names) == Some(last), "{again}: {outcome:?}");
    }
    Ok(())
}

/// Attention and experts apart; the last rank, which has the role that the scenario names, kills itself after a micro-batch. All
/// others are told, whatever their role.
pub(crate) fn die_apart(comm: &Communicator, scenario: &str) -> Result<()> {
    let (ranks, last) = (comm.world_size(), comm.world_size() - 1);
    let dies = comm.rank() == last;
    let moe = MoeConfig::new(1, 8, 1, ranks, DType::F32);
    let halves = [0..ranks / 2, ranks / 2..ranks];
    let [first, second] = halves;
    let config = match scenario {
        "die-apart-attention" => RoleConfig::new([second], first, moe),
        _ => RoleConfig::new([first], second, moe),
    };
    // Few ranks flat, more by trampolines.
    let config = RoleConfig { forward: if ranks > 4 { Forward::Trampoline } else { Forward::Flat }, ..config };
    let start = Instant::now();
    let outcome = match config.role_of(comm.rank()) {
        Some(Role::Experts) => {
            let experts = Experts::new(comm, config)?;
            loop {
                match experts.a2e_recv() {
                    Ok(Some(mut batch)) => {
                        (0..batch.len()).try_for_each(|i| batch.output_row::<f32>(i).map(|row| row.fill(1.0)))?;
                        experts.e2a_send(batch)?;
                        if dies {
                            std::thread::sleep(Duration::from_millis(300));
                            die_now()?;
                        }
                    }
                    // The attention ranks were told first, and have ended their sides.
                    Ok(None) => break None,
                    Err(err) => break Some(err),
                }
            }
        }
        _ => {
            let attention = Attention::new(comm, config)?;
            // To the experts of all ranks in turn.
            let mut expert = comm.rank() as i32;
            loop {
                expert = (expert + 1) % ranks as i32;
                let exchange = || {
                    let sent = attention.a2e_send(&[1.0f32; 8], &Routing::new(&[expert], &[1.0]))?;
                    attention.e2a_recv(sent, &mut [0.0f32; 8])
                };
                if let Err(err) = exchange() {
                    break Some(err);
                }
                if dies {
                    std::thread::sleep(Duration::from_millis(300));
                    die_now()?;
                }
            }
        }
    };
    ensure!(start.elapsed() < Duration::from_secs(5), "told only after {:?}", start.elapsed());
    // Who has been told first ends its side, which others may see before they look at the processes.
    match outcome {
        Some(Error::PeerDied { rank, .. }) if rank == last => {}
        None | Some(Error::PeerLeft { .. } | Error::PeerAbandoned { .. }) => {}
        other => bail!("{other:?}"),
    }
    let again = comm.barrier();
    ensure!(matches!(again, Err(Error::PeerDied { rank, .. }) if rank == last), "{again:?}");
    Ok(())
}

/// The last rank dies; rank 0 is told, and ends at once without leaving; the others look only afterwards, and are to name the
/// first.
pub(crate) fn die_of_it(comm: &Communicator) -> Result<()> {
    let last = comm.world_size() - 1;
    comm.barrier()?;
    if comm.rank() == last {
        die_now()?;
    }
    if comm.rank() != 0 {
        std::thread::sleep(Duration::from_millis(500));
    }
    let outcome = comm.barrier();
    let Err(Error::PeerDied { rank, .. }) = outcome else { bail!("{outcome:?}") };
    ensure!(rank == last, "rank {rank} was blamed, rank {last} died first");
    std::process::exit(0)
}

/// Ranks 0 and 2 kill themselves at instants that the number in the scenario gives, rank 2 perhaps while the others agree on who is
/// left. Those go on until they are all that live, and hold the same ranks to be members.
pub(crate) fn shrink(comm: &Communicator, scenario: &str) -> Result<()> {
    let seed: u64 = scenario.trim_start_matches("shrink-").parse()?;
    let (me, ranks) = (comm.rank(), comm.world_size());
    // The second comes up to 20 ms after the first, in which a shrink is over.
    let doomed = [(0, 300_000), (2, 300_000 + seed * 7919 % 20_000)];
    comm.barrier()?;
    if let Some(&(_, after)) = doomed.iter().find(|(rank, _)| *rank == me) {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(after));
            let _ = die_now();
        });
    }
    let mut comm = comm.clone();
    let mut members: Vec<i64> = (0..ranks as i64).collect();
    loop {
        let (mine, mut all) = ([me as i64], vec![-1; comm.world_size()]);
        let outcome = (|| loop {
            comm.all_gather(&mine, &mut all)?;
            if comm.world_size() == ranks - doomed.len() {
                return comm.barrier();
            }
        })();
        match outcome {
            Ok(()) => break,
            Err(
                Error::PeerDied { .. } | Error::PeerUnreachable { .. } | Error::Aborted { .. } | Error::PeerLeft { .. },
            ) => {}
            Err(err) => bail!("{err:?}"),
        }
        let start = Instant::now();
        let rest = comm.shrink()?;
        members = rest.former_ranks().iter().map(|&rank| members[rank]).collect();
        eprintln!("rank {me}: {members:?} after {:?}", start.elapsed());
        comm = rest;
    }
    let mut all = vec![-1; comm.world_size()];
    comm.all_gather(&[me as i64], &mut all)?;
    let expected: Vec<i64> = (0..ranks as i64).filter(|rank| ![0, 2].contains(rank)).collect();
    ensure!(all == expected && members == expected, "{all:?}, {members:?}");
    // Handles are made anew.
    let moe = Moe::new(&comm, MoeConfig::new(1, 8, 1, comm.world_size(), DType::F32))?;
    let (sent, batch) = moe.dispatch(&[1.0f32; 8], &Routing::new(&[0], &[1.0]))?;
    Ok(moe.combine(sent, batch, &mut [0.0f32; 8])?)
}

/// Waits for a rank that the test kills, and prints the machine's time when it is told: its name, and that it was so.
pub(crate) fn told(comm: &Communicator, scenario: &str) -> Result<()> {
    let last = comm.world_size() - 1;
    let waits = Waits::new(comm)?;
    std::fs::write(format!("{}/{}", std::env::var("TEST_MET")?, comm.rank()), "")?;
    if comm.rank() == last {
        std::thread::sleep(Duration::from_secs(10));
        bail!("nobody has killed rank {last}");
    }
    match waits.wait(scenario.trim_start_matches("told-"), last) {
        Err(Error::PeerDied { rank, .. } | Error::PeerUnreachable { rank, .. }) => {
            let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
            eprintln!("told {} {rank}", Duration::from(now).as_nanos());
            Ok(())
        }
        outcome => bail!("{outcome:?}"),
    }
}
