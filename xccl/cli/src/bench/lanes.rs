//! Threads that share a rank's calls.

use anyhow::{Context, Result};
use xccl::Lanes;

/// A pool of one thread less than there are lanes: the thread that calls is one.
pub struct Pool(rayon::ThreadPool);

impl Pool {
    pub fn new(lanes: usize) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(lanes.saturating_sub(1).max(1)).build();
        Ok(Pool(pool.context("starting the lanes' threads")?))
    }
}

impl Lanes for Pool {
    fn run(&self, lanes: usize, work: &(dyn Fn(usize) + Sync)) {
        self.0.in_place_scope(|scope| {
            (1..lanes).for_each(|lane| scope.spawn(move |_| work(lane)));
            work(0);
        });
    }
}
