//! Ranks that hang, for someone to look at from outside; and a rank that is stopped for a while, of which the others are told.

use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, raise};
use xccl::{Communicator, DType, Error, Finding, Moe, MoeConfig, ProcessState, ReduceOp, Routing};

/// Each waits for the one before: nobody sends. Who is told of a death stays, for whoever looks on.
pub(crate) fn cycle(comm: &Communicator) -> Result<()> {
    let before = (comm.rank() + comm.world_size() - 1) % comm.world_size();
    ensure_cut_short(comm.recv(before, 7, &mut [0; 8]).map(|_| ()))?;
    std::thread::sleep(Duration::from_secs(20));
    Ok(())
}

/// Rank 0 is in a barrier, the others reduce.
pub(crate) fn mismatch(comm: &Communicator) -> Result<()> {
    comm.barrier()?;
    ensure_cut_short(match comm.rank() {
        0 => comm.barrier(),
        _ => comm.all_reduce_in_place(&mut [1.0f32; 12], ReduceOp::Sum),
    })
}

/// The last rank stops itself between the halves of an exchange.
pub(crate) fn straggler(comm: &Communicator) -> Result<()> {
    ensure_cut_short(exchanges(comm, 4, 3).map(|_| ()))
}

/// Who looks on kills the ranks, in the end.
fn ensure_cut_short(outcome: xccl::Result<()>) -> Result<()> {
    ensure!(outcome.is_err(), "nobody sent anything");
    Ok(())
}

/// Exchanges of rows that tell their source, token and exchange; in exchange `stop` the last rank stops itself before it sends,
/// so that its late writes are those of an exchange in which the others have waited for it in vain.
fn exchanges(comm: &Communicator, exchanges: u64, stop: u64) -> xccl::Result<usize> {
    const HIDDEN: usize = 64;
    let (rank, world, last) = (comm.rank(), comm.world_size(), comm.world_size() - 1);
    let moe = Moe::new(comm, MoeConfig::new(4, HIDDEN, 2, world * 2, DType::F32))?;
    let (mut refused, value) =
        (0, |source: usize, token: usize, e: u64| (source * 1000 + token * 100) as f32 + e as f32);
    // Each half is repeated after a deadline, since nothing was lost.
    let mut again = |outcome: xccl::Result<()>| match outcome {
        Err(Error::Timeout { during, epoch, peer, waited_for, .. }) => {
            assert!(waited_for.contains(&format!("rank {last} is alive (stopped by a signal")), "{waited_for}");
            assert!(waited_for.contains(&format!("rank {last} (process")), "{waited_for}");
            eprintln!("{during} {epoch}, waiting for {peer:?}: {waited_for}");
            refused += 1;
            Ok(false)
        }
        outcome => outcome.map(|()| true),
    };
    for e in 1..=exchanges {
        let tokens: Vec<f32> = (0..4).flat_map(|token| [value(rank, token, e); HIDDEN]).collect();
        let ids: Vec<i32> = (0..4).flat_map(|t| [t % (2 * world as i32), last as i32 * 2 + 1]).collect();
        let ids: Vec<i32> = ids.chunks(2).flat_map(|c| if c[0] == c[1] { [c[0], -1] } else { [c[0], c[1]] }).collect();
        let routing = Routing::new(&ids, &[0.5; 8]);
        if rank == last && e == stop {
            raise(Signal::SIGSTOP).expect("a process may stop itself");
        }
        let sent = moe.dispatch_send(&tokens, &routing)?;
        let mut batch = None;
        while !again(moe.dispatch_recv(&sent).map(|rows| batch = Some(rows)))? {}
        let mut batch = batch.expect("it has come");
        for i in 0..batch.len() {
            let mut row = [0.0f32; HIDDEN];
            batch.copy_row(i, &mut row)?;
            let from = batch.row(i);
            assert_eq!(row, [value(from.source, from.token, e); HIDDEN], "row {i} of exchange {e}");
            batch.output_row::<f32>(i)?.copy_from_slice(&row);
        }
        moe.combine_send(batch)?;
        let mut out = vec![0.0f32; 4 * HIDDEN];
        moe.combine_recv(sent, &mut out)?;
        for (token, row) in out.chunks(HIDDEN).enumerate() {
            let terms = ids[token * 2..][..2].iter().filter(|&&id| id >= 0).count() as f32;
            assert!(
                row.iter().all(|&x| x == 0.5 * terms * value(rank, token, e)),
                "token {token} of exchange {e}: {row:?}"
            );
        }
    }
    Ok(refused)
}

/// The last rank is stopped for longer than the others' deadline: they are told so and try again, and every byte is right in the
/// end.
pub(crate) fn paused(comm: &Communicator) -> Result<()> {
    let refused = exchanges(comm, 5, 3)?;
    ensure!(comm.rank() == comm.world_size() - 1 || refused > 0, "nobody has stopped");
    ensure!(
        comm.history(comm.rank())?.iter().any(|record| record.failed) == (refused > 0),
        "the history does not say so"
    );
    Ok(comm.barrier()?)
}

/// The same, but the others abort: when the last rank goes on, what it writes is for nobody, and it is told.
pub(crate) fn aborted_while_paused(comm: &Communicator) -> Result<()> {
    let (rank, last) = (comm.rank(), comm.world_size() - 1);
    let twin = comm.duplicate()?;
    comm.barrier()?;
    if rank == last {
        raise(Signal::SIGSTOP)?;
        comm.send(0, 1, &[0xbb; 8])?;
    }
    let mut outcome = comm.barrier();
    // The others had come to the barrier: it may be over for the last one. A message does not come any more.
    if rank == last && outcome.is_ok() {
        outcome = comm.recv(0, 9, &mut [0; 8]).map(|_| ());
    }
    match outcome {
        Err(Error::Timeout { waited_for, .. }) if rank != last => {
            ensure!(waited_for.contains("stopped by a signal"), "{waited_for}");
            let seen = comm.snapshot();
            ensure!(seen.ranks[last].process == ProcessState::Stopped, "{seen}");
            ensure!(seen.diagnosis().finding == Finding::Stopped, "{}", seen.diagnosis());
            comm.abort();
        }
        Err(Error::Aborted { by, .. }) => ensure!(by != last, "it has aborted nothing"),
        other => anyhow::bail!("{other:?}"),
    }
    // In another communicator of the same ranks its messages are not to be found.
    let mut got = [0; 8];
    if rank == last {
        twin.send(0, 1, &[0xaa; 8])?;
    } else if rank == 0 {
        twin.recv(last, 1, &mut got)?;
        ensure!(got == [0xaa; 8], "{got:?}");
    }
    // The twin outlives whoever is late.
    loop {
        match twin.barrier() {
            Err(Error::Timeout { .. }) => std::thread::sleep(Duration::from_millis(1)),
            other => return Ok(other?),
        }
    }
}
