//! Collectives, with results that anyone can say.

use rand::Rng;
use rand::rngs::StdRng;
use xccl::{Collective, Communicator, ReduceOp};

use super::{Played, check};

/// Element `i` of what `rank` has.
fn element(salt: i64, rank: usize, i: usize) -> i64 {
    salt ^ (rank as i64 * 1_000_003 + i as i64 * 97)
}

fn elements(salt: i64, rank: usize, range: std::ops::Range<usize>) -> Vec<i64> {
    range.map(|i| element(salt, rank, i)).collect()
}

fn total(salt: i64, ranks: usize, i: usize) -> i64 {
    (0..ranks).fold(0i64, |sum, rank| sum.wrapping_add(element(salt, rank, i)))
}

pub fn one_after_another(comm: &Communicator, rng: &mut StdRng) -> Played {
    (0..rng.random_range(1..6)).try_for_each(|_| one(comm, rng))
}

fn one(comm: &Communicator, rng: &mut StdRng) -> Played {
    let (me, ranks) = (comm.rank(), comm.world_size());
    let (salt, root): (i64, usize) = (rng.random(), rng.random_range(0..ranks));
    let n = [1, 5, 64, 600, 5000, 40_000][rng.random_range(0..6)];
    let mine = elements(salt, me, 0..n);
    let which = rng.random_range(0..9);
    let (got, expected): (Vec<i64>, Vec<i64>) = match which {
        0 => {
            let mut got = mine;
            comm.broadcast(&mut got, root)?;
            (got, elements(salt, root, 0..n))
        }
        1 => {
            let mut got = vec![0; n];
            comm.all_reduce(&mine, &mut got, ReduceOp::Sum)?;
            (got, (0..n).map(|i| total(salt, ranks, i)).collect())
        }
        2 => {
            let mut got = vec![0; n];
            comm.reduce(&mine, &mut got, ReduceOp::Sum, root)?;
            let right = if me == root { (0..n).map(|i| total(salt, ranks, i)).collect() } else { vec![0; n] };
            (got, right)
        }
        3 => {
            let block = n.div_ceil(ranks);
            let mut got = vec![0; block];
            comm.reduce_scatter(&elements(salt, me, 0..block * ranks), &mut got, ReduceOp::Sum)?;
            (got, (me * block..(me + 1) * block).map(|i| total(salt, ranks, i)).collect())
        }
        4 => {
            let mut got = vec![0; n * ranks];
            comm.all_gather(&mine, &mut got)?;
            (got, (0..ranks).flat_map(|rank| elements(salt, rank, 0..n)).collect())
        }
        5 => {
            let mut got = vec![0; if me == root { n * ranks } else { 0 }];
            comm.gather(&mine, &mut got, root)?;
            let all = (0..ranks).flat_map(|rank| elements(salt, rank, 0..n)).collect();
            (got, if me == root { all } else { vec![] })
        }
        6 => {
            let mut got = vec![0; n];
            let all = if me == root { elements(salt, root, 0..n * ranks) } else { vec![] };
            comm.scatter(&all, &mut got, root)?;
            (got, elements(salt, root, me * n..(me + 1) * n))
        }
        7 => {
            let block = n.div_ceil(ranks);
            let mut got = vec![0; block * ranks];
            comm.all_to_all(&elements(salt, me, 0..block * ranks), &mut got)?;
            (got, (0..ranks).flat_map(|rank| elements(salt, rank, me * block..(me + 1) * block)).collect())
        }
        // Rank r sends r + k elements to rank k.
        _ => {
            let parts = |len: &dyn Fn(usize) -> usize| {
                let mut at = 0;
                let part = |rank| {
                    let start = at;
                    at += len(rank) * (n / 64 + 1);
                    start..at
                };
                (0..ranks).map(part).collect::<Vec<_>>()
            };
            let (sends, recvs) = (parts(&|to| me + to), parts(&|from| from + me));
            let sent = elements(salt, me, 0..sends[ranks - 1].end);
            let mut got = vec![0; recvs[ranks - 1].end];
            comm.all_to_all_v(&sent, &sends, &mut got, &recvs)?;
            let from = |rank: usize| {
                let start = (0..me).map(|to| (rank + to) * (n / 64 + 1)).sum::<usize>();
                elements(salt, rank, start..start + (rank + me) * (n / 64 + 1))
            };
            (got, (0..ranks).flat_map(from).collect())
        }
    };
    check(got == expected, || format!("collective {which} of {n} elements is wrong"))
}

/// Two on their way at once.
pub fn started(comm: &Communicator, rng: &mut StdRng) -> Played {
    let (me, ranks) = (comm.rank(), comm.world_size());
    let (salt, root): (i64, usize) = (rng.random(), rng.random_range(0..ranks));
    let n = [1, 700, 30_000][rng.random_range(0..3)];
    let (mut sums, mut told) = (elements(salt, me, 0..n), elements(salt, me, n..n + 100));
    comm.scope(|scope| {
        let mut sum = scope.start(Collective::AllReduce { send: None, recv: &mut sums, op: ReduceOp::Sum })?;
        let mut broadcast = scope.start(Collective::Broadcast { send: None, recv: &mut told, root })?;
        broadcast.wait()?;
        sum.wait()
    })?;
    check(sums.iter().enumerate().all(|(i, &sum)| sum == total(salt, ranks, i)), || "sums are wrong".to_owned())?;
    check(told == elements(salt, root, n..n + 100), || "what was broadcast is wrong".to_owned())
}
