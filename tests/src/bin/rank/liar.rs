//! A rank that writes anything into its own memory while the others go on.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xccl::{Communicator, DType, Moe, MoeConfig, ReduceOp, Routing, SharedBuffer, Source, Until};

/// How long it lies.
const LIES: Duration = Duration::from_millis(1500);

/// As good as random, and the same for the same seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^ mixed >> 29
    }
}

/// Where this process has its own outboxes: nobody else may write those.
fn own_outboxes() -> Result<Vec<(usize, usize)>> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let parse = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let address = |text| usize::from_str_radix(text, 16).ok();
        (rest.starts_with("rw-s") && rest.contains("xccl-outbox")).then_some((address(from)?, address(to)?))
    };
    Ok(maps.lines().filter_map(parse).collect())
}

/// Writes at random for a while, then takes its memory away altogether, and ends.
fn lie(seed: u64) -> Result<()> {
    let outboxes = own_outboxes()?;
    ensure!(outboxes.len() >= 2, "no outboxes");
    let (mut numbers, start) = (Numbers(seed), Instant::now());
    while start.elapsed() < LIES {
        for _ in 0..2000 {
            let (from, to) = outboxes[numbers.next() as usize % outboxes.len()];
            // Words and lists stand at the beginning, and are few.
            let reach = if numbers.next() % 4 == 0 { to - from } else { (to - from).min(64 << 10) };
            let at = from + numbers.next() as usize % (reach / 8) * 8;
            let value = match numbers.next() % 6 {
                0 => numbers.next(),
                1 => u64::MAX - numbers.next() % 4,
                2 => 1 << (numbers.next() % 64),
                _ => numbers.next() % 64,
            };
            // SAFETY: a word of a mapping that is this process's own, and stays mapped until below. That the library's own stores go
            // there too is what this is about.
            unsafe { (at as *mut u64).write_volatile(value) };
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    for (from, to) in outboxes {
        // SAFETY: nothing of this process is run afterwards that would look there.
        unsafe { libc::munmap(from as *mut libc::c_void, to - from) };
    }
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

/// The last rank lies. Of the others every call ends in time: well, or with an error, or with what is not true.
pub(crate) fn overwrites_itself(comm: &Communicator) -> Result<()> {
    let (me, world) = (comm.rank(), comm.world_size());
    let moe = Moe::new(comm, MoeConfig::new(4, 64, 2, world, DType::F32))?;
    let block = comm.shared_alloc(4096)?;
    comm.barrier()?;
    let seed = std::env::var("TEST_SEED").ok().map(|text| text.parse()).transpose()?.unwrap_or(1);
    if me == world - 1 {
        return lie(seed);
    }
    let (mut numbers, start) = (Numbers(seed + 1), Instant::now());
    let patience = comm.config().settings().into_iter().find(|setting| setting.variable == "XCCL_TIMEOUT");
    let patience = Duration::from_secs_f64(patience.context("a timeout")?.value.parse()?);
    while start.elapsed() < LIES + 2 * patience {
        let before = Instant::now();
        // What it comes to does not matter.
        let _ = one_call(comm, &moe, &block, &mut numbers);
        let took = before.elapsed();
        // Of up to five calls, each with its deadline, on a machine that may have other things to do.
        ensure!(took < patience * 5 + Duration::from_secs(5), "a call took {took:?}");
    }
    // Words that count may say that it has come; of a message all would have to be right.
    let outcome = comm.recv(world - 1, 0x7777_7777, &mut [0; 8]);
    ensure!(outcome.is_err(), "a message of a rank that has ended: {outcome:?}");
    Ok(())
}

fn one_call(comm: &Communicator, moe: &Moe, block: &SharedBuffer, numbers: &mut Numbers) -> xccl::Result<()> {
    let (me, world) = (comm.rank(), comm.world_size());
    let peer = numbers.next() as usize % world;
    let mut buffer = [0u8; 3000];
    match numbers.next() % 8 {
        0 => comm.barrier(),
        1 => comm.send(peer, 1, &buffer[..numbers.next() as usize % 3000]),
        2 => comm.recv(peer, 1, &mut buffer).map(|_| ()),
        3 => comm.recv(Source::Any, 1, &mut buffer).map(|_| ()),
        4 => comm.all_reduce_in_place(&mut [1i64; 300], ReduceOp::Sum),
        5 => {
            comm.put(block.remote().of(world - 1), &buffer)?;
            comm.get(block.remote().of(world - 1), &mut buffer)
        }
        6 => block.signal_wait(world - 1, 0, Until::Ne(0)).map(|_| ()),
        _ => {
            let ids = [me as i32, world as i32 - 1, world as i32 - 1, -1];
            let sent = moe.dispatch_send(&[1.0f32; 128], &Routing::new(&ids, &[1.0; 4]))?;
            let mut batch = moe.dispatch_recv(&sent)?;
            let mut row = [0.0f32; 64];
            for i in 0..batch.len() {
                batch.copy_row(i, &mut row)?;
                batch.output_row::<f32>(i)?.copy_from_slice(&row);
            }
            moe.combine_send(batch)?;
            moe.combine_recv(sent, &mut [0.0f32; 128])
        }
    }
}
