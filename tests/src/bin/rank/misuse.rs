//! Wrong calls, each with its error, on the rank that errs and on the others.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use half::bf16;
use xccl::{Communicator, DType, Error, ExpertId, Moe, MoeConfig, Routing};

pub(crate) fn an_abandoned_batch_is_told(comm: &Communicator) -> Result<()> {
    let moe = Moe::new(comm, MoeConfig::new(1, 8, 1, comm.world_size(), DType::F32))?;
    let last = comm.world_size() - 1;
    for epoch in 1..=3u64 {
        let sent = moe.dispatch_send(&[1.0f32; 8], &Routing::new(&[last as i32], &[1.0]))?;
        let mut batch = moe.dispatch_recv(&sent)?;
        if comm.rank() == last && epoch == 2 {
            drop(batch);
        } else {
            for i in 0..batch.len() {
                batch.output_row::<f32>(i)?.fill(epoch as f32);
            }
            moe.combine_send(batch)?;
        }
        let outcome = moe.combine_recv(sent, &mut [0.0f32; 8]);
        match epoch {
            2 => {
                ensure!(matches!(outcome, Err(Error::PeerAbandoned { rank, epoch: 2 }) if rank == last), "{outcome:?}")
            }
            _ => outcome?,
        }
    }
    Ok(())
}

/// A handle that the machine has no room for: every rank is told why, and the communicator is still good.
pub(crate) fn a_handle_without_room_is_told(comm: &Communicator) -> Result<()> {
    let Err(err) = Moe::new(comm, MoeConfig::new(64, 1024, 2, 4, DType::F32)) else { bail!("there was room") };
    eprintln!("{err:?}: {err}");
    Ok(comm.barrier()?)
}

pub(crate) fn a_late_rank_is_described(comm: &Communicator) -> Result<()> {
    if comm.rank() == 1 {
        // Nobody sends this: it waits until rank 0, which has less patience, leaves.
        let err = comm.recv(0, 77, &mut [0; 8]).unwrap_err();
        ensure!(matches!(err, Error::PeerLeft { rank: 0, .. }), "{err:?}");
        return Ok(());
    }
    let err = comm.barrier().unwrap_err();
    let Error::Timeout { peer: Some(1), .. } = err else { bail!("{err:?}") };
    let text = err.to_string();
    for part in ["barrier", "rank 1", "recv", "77"] {
        ensure!(text.contains(part), "{text:?} lacks {part:?}");
    }
    Ok(())
}

/// Each rank comes half a deadline later than the one before: what the first one waits is its deadline all the same, not one
/// for each rank, and it names the rank that is missing then.
pub(crate) fn ranks_that_come_one_by_one(comm: &Communicator) -> Result<()> {
    // As the test sets it.
    const DEADLINE: Duration = Duration::from_millis(600);
    let (rank, last) = (comm.rank(), comm.world_size() - 1);
    let moe = Moe::new(comm, MoeConfig::new(1, 8, 1, last + 1, DType::F32))?;
    let come = |turn: usize| std::thread::sleep(DEADLINE * turn as u32 / 2);
    let missing = |outcome: xccl::Result<()>| match outcome {
        Err(Error::Timeout { peer: Some(peer), .. }) if peer < last => Ok(()),
        other => bail!("{other:?}"),
    };
    // The others have more patience, as long as they are told nothing: they call again.
    let until_it_ends = |call: &mut dyn FnMut() -> xccl::Result<()>| loop {
        match call() {
            Err(Error::Timeout { .. }) => {}
            other => return other,
        }
    };
    come(rank);
    if rank == 0 {
        missing(comm.barrier())?;
    }
    until_it_ends(&mut || comm.barrier())?;
    come(rank);
    let sent = moe.dispatch_send(&[1.0f32; 8], &Routing::new(&[last as i32], &[1.0]))?;
    if rank == 0 {
        missing(moe.dispatch_recv(&sent).map(|_| ()))?;
    }
    until_it_ends(&mut || moe.dispatch_recv(&sent).and_then(|batch| moe.combine_send(batch)))?;
    until_it_ends(&mut || comm.barrier())?;
    Ok(moe.combine_recv(sent, &mut [0.0f32; 8])?)
}

const GOOD: ([i32; 2], [f32; 2]) = ([0, 3], [0.5, 0.5]);

/// Each error is named on the rank that makes it, told to the others soon, and gone once a correct call follows.
pub(crate) fn refused(comm: &Communicator) -> Result<()> {
    let moe = Moe::new(comm, MoeConfig::new(2, 8, 2, 4, DType::F32))?;
    let row = [1.0f32; 8];
    fn send<I: ExpertId>(moe: &Moe, tokens: &[f32], ids: &[I]) -> Option<Error> {
        moe.dispatch_send(tokens, &Routing::new(ids, &vec![1.0; ids.len()])).err()
    }
    let mistakes: [&dyn Fn() -> Option<Error>; 10] = [
        &|| send(&moe, &row, &[2i32, 2]),
        &|| send(&moe, &row, &[0i32, 4]),
        &|| send(&moe, &row, &[-2i64, 1]),
        &|| send(&moe, &row, &[1i64 << 40, 1]),
        &|| send(&moe, &[0.0; 24], &[0i32, 1, 0, 1, 0, 1]),
        &|| send(&moe, &row[..7], &[0i32, 1]),
        &|| send(&moe, &row, &[0i32, 1, 2]),
        &|| moe.dispatch_send(&[bf16::ONE; 8], &Routing::new(&GOOD.0, &GOOD.1)).err(),
        &|| moe.dispatch_send(&row, &Routing::new(&GOOD.0, &GOOD.1[..1])).err(),
        &|| moe.dispatch_send(&row, &Routing::new(&GOOD.0, &GOOD.1).active(&[true, true])).err(),
    ];
    for (n, mistake) in mistakes.iter().enumerate() {
        if comm.rank() == 1 {
            let err = mistake().ok_or_else(|| anyhow::anyhow!("mistake {n} was taken for granted"))?;
            let is_right = match n {
                0 => matches!(err, Error::DuplicateExpert { token: 0, k: 1, expert: 2 }),
                1 => matches!(err, Error::ExpertOutOfRange { token: 0, k: 1, expert: 4, experts: 4 }),
                2 => matches!(err, Error::ExpertOutOfRange { token: 0, k: 0, expert: -2, experts: 4 }),
                3 => matches!(err, Error::ExpertOutOfRange { expert: 0x100_0000_0000, .. }),
                4 => matches!(err, Error::TooManyTokens { given: 3, limit: 2 }),
                5 => matches!(err, Error::Shape { what: "tokens", given: 7, .. }),
                6 => matches!(err, Error::Shape { what: "topk_ids", given: 3, .. }),
                7 => matches!(err, Error::DTypeMismatch { given: DType::BF16, expected: DType::F32, .. }),
                8 => matches!(err, Error::Shape { what: "topk_weights", given: 1, .. }),
                _ => matches!(err, Error::Shape { what: "the active-token mask", given: 2, .. }),
            };
            ensure!(is_right, "mistake {n}: {err:?}");
        }
        told_and_corrected(comm, &moe, n)?;
    }
    Ok(())
}

/// More rows asked for than there are: the others are told of that too.
pub(crate) fn refused_rows(comm: &Communicator) -> Result<()> {
    let moe = Moe::new(comm, MoeConfig::new(2, 8, 2, 4, DType::F32))?;
    if comm.rank() == 1 {
        let err = moe.input_rows::<f32>(3).err();
        ensure!(matches!(err, Some(Error::TooManyTokens { given: 3, limit: 2 })), "{err:?}");
    }
    told_and_corrected(comm, &moe, 0)
}

/// Rank 1 has been refused: the others hear of it, and the exchange succeeds once it corrects itself.
fn told_and_corrected(comm: &Communicator, moe: &Moe, n: usize) -> Result<()> {
    let (row, others) = ([1.0f32; 8], comm.world_size() - 1);
    if comm.rank() == 1 {
        for _ in 0..others {
            comm.recv(xccl::Source::Any, 1, &mut [])?;
        }
    }
    let sent = moe.dispatch_send(&row, &Routing::new(&GOOD.0, &GOOD.1))?;
    if comm.rank() != 1 {
        let start = Instant::now();
        let refused = moe.dispatch_recv(&sent).map(|_| ());
        ensure!(
            matches!(refused, Err(Error::PeerRefused { rank: 1, epoch }) if epoch == sent.epoch()),
            "mistake {n}: {refused:?}"
        );
        ensure!(start.elapsed() < Duration::from_secs(5), "mistake {n}: told only after {:?}", start.elapsed());
        comm.send(1, 1, &[])?;
    }
    let mut batch = loop {
        match moe.dispatch_recv(&sent) {
            Err(Error::PeerRefused { rank: 1, .. }) => std::thread::sleep(Duration::from_millis(1)),
            other => break other?,
        }
    };
    for i in 0..batch.len() {
        batch.output_row::<f32>(i)?.copy_from_slice(&row);
    }
    moe.combine_send(batch)?;
    let mut out = [0.0f32; 8];
    moe.combine_recv(sent, &mut out)?;
    ensure!(out == row, "mistake {n}: {out:?}");
    Ok(())
}

/// The last rank gives up both exchanges in flight before anybody looks: each is told as given up.
pub(crate) fn both_abandoned(comm: &Communicator) -> Result<()> {
    let moe = Moe::new(comm, MoeConfig::new(1, 8, 1, comm.world_size(), DType::F32))?;
    let last = comm.world_size() - 1;
    let send = || moe.dispatch_send(&[1.0f32; 8], &Routing::new(&[last as i32], &[1.0]));
    let (first, second) = (send()?, send()?);
    let (first_batch, second_batch) = (moe.dispatch_recv(&first)?, moe.dispatch_recv(&second)?);
    if comm.rank() == last {
        drop((first_batch, second_batch));
    } else {
        moe.combine_send(first_batch)?;
        moe.combine_send(second_batch)?;
    }
    comm.barrier()?;
    for (epoch, sent) in [(1, first), (2, second)] {
        let outcome = moe.combine_recv(sent, &mut [0.0f32; 8]);
        let is_told = matches!(outcome, Err(Error::PeerAbandoned { rank, epoch: e }) if (rank, e) == (last, epoch));
        ensure!(is_told, "exchange {epoch}: {outcome:?}");
    }
    Ok(())
}

/// Rank 0 loses patience in `dispatch_recv`, learns what rank 1 does instead, and takes its tokens once they come.
pub(crate) fn late_dispatch(comm: &Communicator) -> Result<()> {
    let moe = Moe::new(comm, MoeConfig::new(1, 8, 1, 2, DType::F32))?;
    let send = || moe.dispatch_send(&[1.0f32; 8], &Routing::new(&[1i32], &[1.0]));
    let sent = if comm.rank() == 0 {
        let sent = send()?;
        let Some(err) = moe.dispatch_recv(&sent).err() else { bail!("rank 1 has sent nothing") };
        ensure!(matches!(err, Error::Timeout { peer: Some(1), epoch: 1, .. }), "{err:?}");
        let text = err.to_string();
        for part in ["dispatch_recv (epoch 1)", "rank 1", "waiting in recv tag 77 for rank 0"] {
            ensure!(text.contains(part), "{text:?} lacks {part:?}");
        }
        comm.send(1, 77, &[])?;
        sent
    } else {
        comm.recv(0, 77, &mut [])?;
        send()?
    };
    let mut batch = moe.dispatch_recv(&sent)?;
    for i in 0..batch.len() {
        batch.output_row::<f32>(i)?.fill(3.0);
    }
    moe.combine_send(batch)?;
    let mut out = [0.0f32; 8];
    moe.combine_recv(sent, &mut out)?;
    ensure!(out == [3.0; 8], "{out:?}");
    Ok(())
}

/// Rows that were lent out stand in the way of other input until they are given back, and whoever receives source by source
/// hears of the refusal.
pub(crate) fn rows_lent_out(comm: &Communicator) -> Result<()> {
    let moe = Moe::new(comm, MoeConfig::new(2, 8, 2, 4, DType::F32))?;
    let row = [1.0f32; 8];
    let good = || Routing::new(&GOOD.0, &GOOD.1);
    let sent = if comm.rank() == 1 {
        let lent = moe.input_rows::<f32>(1)?;
        let second = moe.input_rows::<f32>(1).map(|_| ());
        ensure!(matches!(second, Err(Error::WrongOrder { .. })), "{second:?}");
        let other = moe.dispatch_send(&row, &good()).map(|_| ());
        ensure!(matches!(other, Err(Error::WrongOrder { .. })), "{other:?}");
        drop(lent);
        comm.recv(0, 1, &mut [])?;
        moe.dispatch_send(&row, &good())?
    } else {
        moe.dispatch_send(&row, &good())?
    };
    let mut arrivals = moe.dispatch_recv_by_source(&sent)?;
    let (mut come, mut told) = (0, false);
    while come < comm.world_size() {
        match arrivals.next_source() {
            Ok(source) => {
                ensure!(source.is_some(), "{come} sources only");
                come += 1;
            }
            Err(Error::PeerRefused { rank: 1, .. }) => {
                // Until rank 1 has corrected itself, each call says so.
                if comm.rank() == 0 && !std::mem::replace(&mut told, true) {
                    comm.send(1, 1, &[])?;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(err) => return Err(err.into()),
        }
    }
    ensure!(arrivals.next_source()?.is_none(), "one source too many");
    if comm.rank() == 0 {
        drop(arrivals); // the others are told
    } else {
        let mut batch = arrivals.into_batch()?;
        (0..batch.len()).try_for_each(|i| batch.output_row::<f32>(i).map(|y| y.fill(2.0)))?;
        moe.combine_send(batch)?;
    }
    if comm.rank() == 1 {
        let combined = moe.combine_recv(sent, &mut [0.0f32; 8]);
        ensure!(matches!(combined, Err(Error::PeerAbandoned { rank: 0, .. })), "{combined:?}");
    }
    Ok(comm.barrier()?)
}
