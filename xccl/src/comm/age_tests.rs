//! Communicators whose counters pass 2^32, and the numbers of a plane's immediates their end.

use super::far_tests::{all_to_all, on_nodes};
use super::*;
use crate::{DType, Moe, MoeConfig, ReduceOp, Routing, Until, Update};

/// What a job does, often enough that every ring has gone around.
fn in_every_way(comm: &Communicator) {
    let (me, ranks) = (comm.rank(), comm.world_size());
    (0..10).for_each(|_| comm.barrier().unwrap());
    all_to_all(comm, &[0, 8, 40, 41, 5000, 70_000].repeat(12), false);
    for n in 0..80 {
        let mut sums = [me as i64 + n; 3];
        comm.all_reduce_in_place(&mut sums, ReduceOp::Sum).unwrap();
        assert_eq!(sums, [(0..ranks as i64).map(|rank| rank + n).sum::<i64>(); 3]);
        let mut told = vec![n; 40_000 * usize::from(n % 20 == 0) + 1];
        comm.broadcast(&mut told, n as usize % ranks).unwrap();
        assert!(told.iter().all(|&x| x == n));
    }
    let moe = Moe::new(comm, MoeConfig::new(4, 8, 1, ranks, DType::F32)).unwrap();
    for n in 0..9 {
        let tokens = (n + me) % 4;
        let ids: Vec<i32> = (0..tokens).map(|t| ((t + n) % ranks) as i32).collect();
        let sent = moe.dispatch_send(&vec![n as f32; tokens * 8], &Routing::new(&ids, &vec![2.0; tokens])).unwrap();
        let mut batch = moe.dispatch_recv(&sent).unwrap();
        for i in 0..batch.len() {
            let mut row = [0.0f32; 8];
            batch.copy_row(i, &mut row).unwrap();
            batch.output_row::<f32>(i).unwrap().copy_from_slice(&row);
        }
        moe.combine_send(batch).unwrap();
        let mut out = vec![0.0f32; tokens * 8];
        moe.combine_recv(sent, &mut out).unwrap();
        assert!(out.iter().all(|&x| x == 2.0 * n as f32), "exchange {n}: {out:?}");
    }
    let block = comm.shared_alloc(64).unwrap();
    comm.barrier().unwrap();
    let right = block.remote().of((me + 1) % ranks);
    for n in 1..100 {
        comm.put_signal(right.skip(8), &[n; 8], right, Update::Add(1)).unwrap();
        block.signal_wait((me + ranks - 1) % ranks, 0, Until::Ge(n.into())).unwrap();
    }
    comm.quiet().unwrap();
    comm.barrier().unwrap();
}

#[test]
fn counters_pass_two_to_the_32_on_one_node_and_between_nodes() {
    for nodes in [[0, 0, 0], [0, 1, 0]] {
        // The plane's own numbers begin anew at 2^18.
        for age in [(1 << 32) - 5, (1 << 18) - 5, (1u64 << 63) - 5] {
            let mut config = Config::default().timeout(Some(std::time::Duration::from_secs(30))).heap_bytes(1 << 16);
            config.age = age;
            on_nodes(&nodes, 7, config, |comm| in_every_way(&comm));
        }
    }
}
