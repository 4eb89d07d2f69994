//! Threads that share a rank's calls.

use anyhow::{Context, Result};
use xccl::Lanes;

/// Runs `rank` on one thread of a pool of `lanes`: the others are [`InPool`]'s.
pub fn in_pool<R: Send>(lanes: usize, rank: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    if lanes < 2 {
        return rank();
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(lanes).build();
    pool.context("starting the lanes' threads")?.install(rank)
}

/// The threads of the pool that the caller is in.
pub struct InPool;

impl Lanes for InPool {
    fn run(&self, lanes: usize, work: &(dyn Fn(usize) + Sync)) {
        rayon::scope(|scope| {
            (1..lanes).for_each(|lane| scope.spawn(move |_| work(lane)));
            work(0);
        });
    }
}
