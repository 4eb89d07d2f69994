//! `xccl bench all_reduce` and the like: collectives, in the columns of nccl-tests.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;
use half::{bf16, f16};
use serde::Serialize;
use xccl::{Collective, Communicator, DataType, ReduceOp, Value};

use super::figures::{JsonLines, Percentiles, slowest};
use super::{Common, progress};

/// Which collective.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum What {
    AllReduce,
    AllGather,
    ReduceScatter,
    AllToAll,
    Broadcast,
}

#[derive(Args)]
pub struct CollectiveArgs {
    #[command(flatten)]
    pub(super) common: Common,
    /// Bytes of the larger of the two buffers (K, M, G suffixes); rounded up to an element for each rank
    #[arg(long, value_delimiter = ',', default_value = "8,1K,4K,64K,1M,16M,64M", value_parser = bytes)]
    sizes: Vec<usize>,
    /// Element type: f32, f16, bf16, i32, i64 or u8
    #[arg(long, default_value = "f32")]
    dtype: DataType,
    /// Reduction: sum, max, min or avg
    #[arg(long, default_value = "sum")]
    op: ReduceOp,
    /// The root of a broadcast
    #[arg(long, default_value_t = 0)]
    root: usize,
    /// At most so many seconds for each size, out of place and in place together; a size whose iterations would take longer gets fewer
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

/// Times are medians over batches, of the slowest rank.
#[derive(Serialize)]
struct Way {
    time_us: Percentiles,
    algbw_gbps: f64,
    busbw_gbps: f64,
    wrong: Option<u64>,
}

#[derive(Serialize)]
struct Point {
    bench: &'static str,
    ranks: usize,
    bytes: usize,
    count: usize,
    dtype: String,
    op: Option<String>,
    out_of_place: Way,
    in_place: Way,
}

fn bytes(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(digits) => (digits, text.as_bytes()[text.len() - 1]),
        None => (text, b' '),
    };
    let shift = match unit {
        b'K' => 10,
        b'M' => 20,
        b'G' => 30,
        _ => 0,
    };
    let number: usize = digits.parse().map_err(|_| format!("{text:?} is no number of bytes, such as 8, 64K or 1M"))?;
    number.checked_mul(1 << shift).filter(|&n| n <= 1 << 40).ok_or_else(|| format!("{text:?} is too large"))
}

impl What {
    fn name(self) -> &'static str {
        match self {
            What::AllReduce => "all_reduce",
            What::AllGather => "all_gather",
            What::ReduceScatter => "reduce_scatter",
            What::AllToAll => "all_to_all",
            What::Broadcast => "broadcast",
        }
    }

    /// Whether its larger buffer has a block for each rank.
    fn has_blocks(self) -> bool {
        !matches!(self, What::AllReduce | What::Broadcast)
    }

    /// What algbw is multiplied with, so that busbw compares with what a link can carry.
    fn factor(self, ranks: usize) -> f64 {
        let others = (ranks - 1) as f64 / ranks as f64;
        match self {
            What::AllReduce => 2.0 * others,
            What::AllGather | What::ReduceScatter | What::AllToAll => others,
            What::Broadcast => 1.0,
        }
    }
}

/// What checking needs to know of an element type.
trait Checked: Value + PartialEq {
    /// Small enough that sums over 64 ranks are exact.
    fn small(x: u8) -> Self;
    /// `sum` is of such values.
    fn of_sum(sum: u64, ranks: usize, is_avg: bool) -> Self;
}

macro_rules! floats {
    ($($t:ty => $of:expr),*) => {$(
        impl Checked for $t {
            fn small(x: u8) -> Self {
                $of(f32::from(x))
            }
            fn of_sum(sum: u64, ranks: usize, is_avg: bool) -> Self {
                $of(if is_avg { sum as f32 / ranks as f32 } else { sum as f32 })
            }
        }
    )*};
}

macro_rules! integers {
    ($($t:ty),*) => {$(
        impl Checked for $t {
            fn small(x: u8) -> Self {
                x as $t
            }
            fn of_sum(sum: u64, ranks: usize, is_avg: bool) -> Self {
                (if is_avg { sum / ranks as u64 } else { sum }) as $t
            }
        }
    )*};
}

floats!(f32 => |x| x, f16 => f16::from_f32, bf16 => bf16::from_f32);
integers!(i32, i64, u8);

fn value(rank: usize, i: usize) -> u8 {
    ((i * 7 + i / 251 + rank * 3) % 5) as u8
}

/// The buffers of one way of calling.
struct Buffers<T> {
    send: Option<Vec<T>>,
    recv: Vec<T>,
}

struct Task<'a> {
    what: What,
    comm: &'a Communicator,
    args: &'a CollectiveArgs,
    /// Elements of the larger buffer, and of a rank's block.
    count: usize,
    block: usize,
}

impl CollectiveArgs {
    pub fn measure(&self, what: What, comm: &Communicator) -> Result<()> {
        ensure!(self.root < comm.world_size(), "--root {} of {} ranks", self.root, comm.world_size());
        match self.dtype {
            DataType::F32 => self.measure_type::<f32>(what, comm),
            DataType::F16 => self.measure_type::<f16>(what, comm),
            DataType::BF16 => self.measure_type::<bf16>(what, comm),
            DataType::I32 => self.measure_type::<i32>(what, comm),
            DataType::I64 => self.measure_type::<i64>(what, comm),
            DataType::U8 => self.measure_type::<u8>(what, comm),
        }
    }

    fn measure_type<T: Checked>(&self, what: What, comm: &Communicator) -> Result<()> {
        let mut json = JsonLines::open(comm, self.common.json.as_deref())?;
        let bar = progress(comm, self.sizes.len());
        let op = matches!(what, What::AllReduce | What::ReduceScatter).then(|| self.op.to_string());
        if comm.rank() == 0 {
            json.table(&format!("# xccl bench {}: {} ranks", what.name(), comm.world_size()));
            json.table(&format!("#{:>35}{:^37}  {:^37}", "", "out of place", "in place"));
            let way = format!("{:>10} {:>8} {:>8} {:>7}", "time", "algbw", "busbw", "#wrong");
            json.table(&format!("#{:>11} {:>11} {:>5} {:>5} {way}   {way}", "size", "count", "type", "redop"));
            let way = format!("{:>10} {:>8} {:>8} {:>7}", "(us)", "(GB/s)", "(GB/s)", "");
            json.table(&format!("#{:>11} {:>11} {:>5} {:>5} {way}   {way}", "(B)", "(elements)", "", ""));
        }
        for &bytes in &self.sizes {
            let ranks = comm.world_size();
            let blocks = if what.has_blocks() { ranks } else { 1 };
            let block = bytes.div_ceil(size_of::<T>() * blocks).max(1);
            let task = Task { what, comm, args: self, count: block * blocks, block };
            let (apart, within) = (task.way::<T>(false)?, task.way::<T>(true)?);
            bar.inc(1);
            let (Some(out_of_place), Some(in_place)) = (apart, within) else { continue };
            let (dtype, op) = (T::TYPE.to_string(), op.clone());
            let point = Point {
                bench: what.name(),
                ranks,
                bytes: task.count * size_of::<T>(),
                count: task.count,
                dtype,
                op,
                out_of_place,
                in_place,
            };
            bar.suspend(|| json.table(&point.line()));
            json.write(&point)?;
        }
        bar.finish_and_clear();
        comm.barrier()?;
        Ok(())
    }
}

impl Point {
    fn line(&self) -> String {
        let way = |way: &Way| {
            format!(
                "{:>10.2} {:>8.2} {:>8.2} {:>7}",
                way.time_us.median,
                way.algbw_gbps,
                way.busbw_gbps,
                way.wrong.map_or("N/A".to_owned(), |n| n.to_string())
            )
        };
        format!(
            "{:>12} {:>11} {:>5} {:>5} {}   {}",
            self.bytes,
            self.count,
            self.dtype,
            self.op.as_deref().unwrap_or("none"),
            way(&self.out_of_place),
            way(&self.in_place)
        )
    }
}

/// Calls of a batch are timed together, while they take no longer than looking at the clock.
const BATCH_US: f64 = 100.0;
const MOST_PER_BATCH: usize = 20;

impl Task<'_> {
    /// Measures one way of calling; rank 0 gets the result.
    fn way<T: Checked>(&self, in_place: bool) -> Result<Option<Way>> {
        let comm = self.comm;
        let mut wrong = None;
        let mut buffers = self.buffers::<T>(in_place);
        self.make(&mut buffers)?;
        if self.args.common.verify {
            let mut counts = [self.wrong(&buffers) as i64];
            comm.all_reduce_in_place(&mut counts, ReduceOp::Sum)?;
            wrong = Some(counts[0] as u64);
        }
        let once = self.timed(&mut buffers, 1)?;
        // All ranks have to agree on how often.
        let mut us = [once as f32];
        comm.broadcast(&mut us, 0)?;
        let us = f64::from(us[0]);
        let per_batch = ((BATCH_US / us) as usize).clamp(1, MOST_PER_BATCH);
        let common = &self.args.common;
        let fit = self.args.seconds / 2.0 * 1e6 / (us * per_batch as f64);
        let batches = (common.iters as usize).min(fit as usize).max(3);
        let warmup = (common.warmup as usize).min(batches);
        let mut times = vec![];
        for i in 0..warmup + batches {
            let took = self.timed(&mut buffers, per_batch)?;
            if i >= warmup {
                times.push(took);
            }
        }
        black_box(&buffers.recv);
        let Some(times) = slowest(comm, &times)? else { return Ok(None) };
        let time_us = Percentiles::of(times);
        let algbw_gbps = (self.count * size_of::<T>()) as f64 / time_us.median / 1e3;
        let busbw_gbps = algbw_gbps * self.what.factor(comm.world_size());
        Ok(Some(Way { time_us, algbw_gbps, busbw_gbps, wrong }))
    }

    fn timed<T: Checked>(&self, buffers: &mut Buffers<T>, calls: usize) -> Result<f64> {
        self.comm.barrier()?;
        let start = Instant::now();
        for _ in 0..calls {
            self.make(buffers)?;
        }
        Ok(start.elapsed().as_secs_f64() * 1e6 / calls as f64)
    }

    fn buffers<T: Checked>(&self, in_place: bool) -> Buffers<T> {
        let (rank, n, block) = (self.comm.rank(), self.count, self.block);
        let mine = |count: usize| (0..count).map(|i| T::small(value(rank, i))).collect::<Vec<T>>();
        let zeros = |count: usize| vec![T::zeroed(); count];
        let (send, recv) = match (self.what, in_place) {
            (What::AllReduce | What::Broadcast, true) => (None, mine(n)),
            (What::AllReduce | What::Broadcast, false) => (Some(mine(n)), zeros(n)),
            (What::AllGather, true) => {
                let mut all = zeros(n);
                all[rank * block..(rank + 1) * block].copy_from_slice(&mine(block));
                (None, all)
            }
            (What::AllGather, false) => (Some(mine(block)), zeros(n)),
            (What::ReduceScatter, false) => (Some(mine(n)), zeros(block)),
            (What::ReduceScatter | What::AllToAll, true) => (None, mine(n)),
            (What::AllToAll, false) => (Some(mine(n)), zeros(n)),
        };
        Buffers { send, recv }
    }

    fn make<T: Checked>(&self, buffers: &mut Buffers<T>) -> xccl::Result<()> {
        let (send, recv) = (buffers.send.as_deref(), &mut buffers.recv[..]);
        let (op, root) = (self.args.op, self.args.root);
        self.comm.collective(match self.what {
            What::AllReduce => Collective::AllReduce { send, recv, op },
            What::AllGather => Collective::AllGather { send, recv },
            What::ReduceScatter => Collective::ReduceScatter { send, recv, op },
            What::AllToAll => Collective::AllToAll { send, recv },
            What::Broadcast => Collective::Broadcast { send, recv, root },
        })
    }

    /// Elements that are not what they should be after the first call.
    fn wrong<T: Checked>(&self, buffers: &Buffers<T>) -> usize {
        let (rank, ranks, block, recv) = (self.comm.rank(), self.comm.world_size(), self.block, &buffers.recv);
        let joined = |i: usize| {
            let all = (0..ranks).map(|r| value(r, i));
            match self.args.op {
                ReduceOp::Max => T::small(all.max().unwrap_or(0)),
                ReduceOp::Min => T::small(all.min().unwrap_or(0)),
                op => T::of_sum(all.map(u64::from).sum(), ranks, op == ReduceOp::Avg),
            }
        };
        let expected = |i: usize| match self.what {
            What::AllReduce => joined(i),
            What::Broadcast => T::small(value(self.args.root, i)),
            What::AllGather => T::small(value(i / block, i % block)),
            What::ReduceScatter => joined(rank * block + i),
            What::AllToAll => T::small(value(i / block, rank * block + i % block)),
        };
        let result = match self.what {
            What::ReduceScatter if buffers.send.is_none() => &recv[rank * block..(rank + 1) * block],
            _ => recv,
        };
        result.iter().enumerate().filter(|&(i, &x)| x != expected(i)).count()
    }
}
