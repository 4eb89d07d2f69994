//! A rank in Rust of a job in several languages: `tests/mixed/protocol.h` tells what all of them do.

use anyhow::{Result, bail, ensure};
use half::bf16;
use xccl::{Communicator, Element, Error, Moe, MoeConfig, Routing};

const LENGTHS: [usize; 2] = [33, 300_000];
const THROUGH: u32 = 7;
const HIDDEN: usize = 96;
const TOPK: usize = 2;
const EXPERTS: usize = 8;
const MAX_TOKENS: usize = 8;
const ROUNDS: usize = 4;

pub(crate) fn mixed_job(comm: &Communicator) -> Result<()> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    let left = (rank + ranks - 1) % ranks;
    let bytes = |rank: usize, len: usize| (0..len).map(|i| (rank * 61 + i % 253) as u8).collect::<Vec<u8>>();
    for (tag, len) in (0..).zip(LENGTHS) {
        let (out, mut buffer) = (bytes(rank, len), vec![0; LENGTHS[1]]);
        let status = comm.scope(|s| {
            let receive = s.irecv(left, tag, &mut buffer)?;
            s.isend((rank + 1) % ranks, tag, &out)?.wait()?;
            receive.wait()
        })?;
        ensure!(buffer[..status.len] == bytes(left, len), "message {tag} differs");
    }
    let half = comm.split(Some(rank as u32 % 2), -(rank as i32))?;
    let Some(half) = half else { bail!("this rank has a colour") };
    ensure!(half.world_size() == ranks / 2, "{} ranks in the half", half.world_size());
    half.barrier()?;
    drop(half);
    exchanges::<f32>(comm)?;
    exchanges::<bf16>(comm)?;
    if let Ok(dies) = std::env::var("DIES") {
        let dies = dies.parse()?;
        if dies == rank {
            (0..ranks)
                .filter(|&other| other != rank)
                .try_for_each(|other| comm.recv(other, THROUGH, &mut []).map(drop))?;
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL)?;
        }
        comm.send(dies, THROUGH, &[])?;
        let Err(err) = comm.barrier() else { bail!("a dead rank has entered the barrier") };
        eprintln!("{err}");
        ensure!(matches!(err, Error::PeerDied { .. }), "{err:?}");
        return Ok(());
    }
    Ok(comm.barrier()?)
}

/// Source by source, in place.
fn exchanges<E: Element>(comm: &Communicator) -> Result<()> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    let moe = Moe::new(comm, MoeConfig::new(MAX_TOKENS, HIDDEN, TOPK, EXPERTS, E::DTYPE))?;
    let value = |rank: usize, round: usize, t: usize, c: usize| ((rank + round + t + c) % 4) as f32;
    let id = |round: usize, t: usize, k: usize| (rank + round + t * 3 + k * 5) % EXPERTS;
    let mut row = vec![E::from_f32(0.0); HIDDEN];
    for round in 0..ROUNDS {
        let count = (rank * 3 + round) % (MAX_TOKENS + 1);
        let elements = (0..count).flat_map(|t| (0..HIDDEN).map(move |c| (t, c)));
        let choices = || (0..count).flat_map(|t| (0..TOPK).map(move |k| (t, k)));
        let tokens: Vec<E> = elements.clone().map(|(t, c)| E::from_f32(value(rank, round, t, c))).collect();
        let ids: Vec<i32> = choices().map(|(t, k)| id(round, t, k) as i32).collect();
        let weights: Vec<f32> = choices().map(|(_, k)| (k + 1) as f32).collect();
        let sent = moe.dispatch_send(&tokens, &Routing::new(&ids, &weights))?;
        let mut arrivals = moe.dispatch_recv_by_source(&sent)?;
        while let Some(source) = arrivals.next_source()? {
            for i in arrivals.rows_of(source) {
                let described = arrivals.row(i);
                arrivals.copy_row(i, &mut row)?;
                let factor = (rank * (EXPERTS / ranks) + described.expert + 1) as f32;
                for (c, (x, y)) in row.iter().zip(arrivals.output_row::<E>(i)?).enumerate() {
                    ensure!(x.to_f32() == value(source, round, described.token, c), "row {i} of rank {source} differs");
                    *y = E::from_f32(factor * x.to_f32());
                }
            }
        }
        moe.combine_send(arrivals.into_batch()?)?;
        let mut out = vec![E::from_f32(f32::NAN); tokens.len()];
        moe.combine_recv(sent, &mut out)?;
        for ((t, c), y) in elements.zip(&out) {
            let term = |k: usize| (k + 1) as f32 * (id(round, t, k) + 1) as f32 * value(rank, round, t, c);
            ensure!(y.to_f32() == (0..TOPK).map(term).sum::<f32>(), "round {round}, token {t}: {}", y.to_f32());
        }
    }
    Ok(())
}
