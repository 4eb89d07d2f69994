//! Ping-pong between two processes over iceoryx2's publish/subscribe, receivers spinning, half the round trip.
//!
//! As a message-passing user has it: the payload lies in the sender's private memory, is copied into a loaned sample, and out of
//! the received one. `--loan` leaves both copies out, as an application can that builds and uses its data in iceoryx2's memory.
//! Timed as `xccl bench p2p` does: batches of ten round trips, percentiles over batches.
//!
//! Start two: `xccl run -n 2 --bind -- p2p_iceoryx2 …`, or with XCCL_RANK 0 and 1 and one XCCL_JOB.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use iceoryx2::port::publisher::Publisher;
use iceoryx2::port::subscriber::Subscriber;
use iceoryx2::prelude::*;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const VERSION: &str = "0.10.0"; // as Cargo.toml pins it
const BATCH: u32 = 10;
const PATIENCE: Duration = Duration::from_secs(20);
/// Spins between two looks at the clock.
const SPINS_PER_LOOK: u32 = 4096;

struct Options {
    sizes: Vec<usize>,
    iters: u32,
    warmup: u32,
    verify: bool,
    loan: bool,
    json: Option<String>,
}

impl Options {
    fn parse() -> Result<Self> {
        let sizes = vec![8, 64, 1024, 4096, 16384, 65536, 262144, 1048576];
        let mut options = Options { sizes, iters: 200, warmup: 20, verify: false, loan: false, json: None };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
            match word.as_str() {
                "--verify" => options.verify = true,
                "--loan" => options.loan = true,
                "--sizes" => {
                    options.sizes = value()?.split(',').map(str::parse).collect::<std::result::Result<_, _>>()?
                }
                "--iters" => options.iters = value()?.parse()?,
                "--warmup" => options.warmup = value()?.parse()?,
                "--json" => options.json = Some(value()?),
                _ => {
                    return Err(
                        format!("{word}: expected --sizes, --iters, --warmup, --verify, --loan or --json").into()
                    );
                }
            }
        }
        if options.sizes.contains(&0) || options.iters == 0 {
            return Err("sizes and iterations are at least 1".into());
        }
        Ok(options)
    }
}

struct Pair {
    to: Publisher<ipc::Service, [u8], ()>,
    from: Subscriber<ipc::Service, [u8], ()>,
    rank: usize,
    loan: bool,
}

impl Pair {
    fn send(&self, out: &[u8]) -> Result<()> {
        let sample = self.to.loan_slice_uninit(out.len())?;
        if self.loan {
            // SAFETY: bytes of any value are valid; the shared memory was zeroed or written before.
            unsafe { sample.assume_init() }.send()?;
        } else {
            sample.write_from_slice(out).send()?;
        }
        Ok(())
    }

    fn receive(&self, back: &mut [u8]) -> Result<()> {
        let begin = Instant::now();
        loop {
            for _ in 0..SPINS_PER_LOOK {
                if let Some(sample) = self.from.receive()? {
                    if !self.loan {
                        back.copy_from_slice(sample.payload());
                    }
                    return Ok(());
                }
            }
            if begin.elapsed() > PATIENCE {
                return Err("the other rank does not answer".into());
            }
        }
    }

    fn ping_pong(&self, out: &[u8], back: &mut [u8]) -> Result<()> {
        if self.rank == 0 {
            self.send(out)?;
            self.receive(back)
        } else {
            self.receive(back)?;
            self.send(out)
        }
    }

    /// Each rank sends a pattern of its own, three times over; both compare every byte.
    fn check(&self, out: &mut [u8], back: &mut [u8]) -> Result<()> {
        let pattern = |rank: usize, round: usize, i: usize| (i * 131 + rank * 17 + round * 7 + (i >> 8)) as u8;
        for round in 0..3 {
            out.iter_mut().enumerate().for_each(|(i, b)| *b = pattern(self.rank, round, i));
            back.fill(0);
            self.ping_pong(out, back)?;
            if let Some((i, _)) = back.iter().enumerate().find(|&(i, &b)| b != pattern(1 - self.rank, round, i)) {
                return Err(format!("rank {}: byte {i} of {} differs", self.rank, back.len()).into());
            }
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let options = Options::parse()?;
    let rank: usize = std::env::var("XCCL_RANK")?.parse()?;
    let job = std::env::var("XCCL_JOB")?;
    set_log_level(LogLevel::Error);
    let node = NodeBuilder::new().create::<ipc::Service>()?;
    let service = |direction: &str| -> Result<_> {
        let name = format!("xccl-peers/{job}/{direction}");
        Ok(node.service_builder(&name.as_str().try_into()?).publish_subscribe::<[u8]>().open_or_create()?)
    };
    let (there, back) = (service("0-to-1")?, service("1-to-0")?);
    let (mine, theirs) = if rank == 0 { (&there, &back) } else { (&back, &there) };
    let largest = options.sizes.iter().copied().max().unwrap_or(1);
    let from = theirs.subscriber_builder().create()?;
    let to = mine.publisher_builder().initial_max_slice_len(largest).create()?;
    let pair = Pair { to, from, rank, loan: options.loan };

    // Nothing is kept for those who come late: wait for both directions.
    let begin = Instant::now();
    while [&there, &back]
        .iter()
        .any(|s| s.dynamic_config().number_of_publishers() < 1 || s.dynamic_config().number_of_subscribers() < 1)
    {
        if begin.elapsed() > PATIENCE {
            return Err("the other rank did not start".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }

    let mut json = match &options.json {
        Some(path) if rank == 0 => Some(File::create(path)?),
        _ => None,
    };
    if rank == 0 {
        println!("iceoryx2 {VERSION}{}, half round trip in us", if options.loan { ", loaned" } else { "" });
        println!("{:>10} {:>12} {:>12} {:>12}  verified", "bytes", "p10", "median", "p90");
    }
    for &bytes in &options.sizes {
        let (mut out, mut back) = (vec![1u8; bytes], vec![0u8; bytes]);
        let verified = options.verify && !options.loan;
        if verified {
            pair.check(&mut out, &mut back)?;
        }
        let mut times = vec![];
        for i in 0..options.warmup + options.iters {
            let start = Instant::now();
            for _ in 0..BATCH {
                pair.ping_pong(&out, &mut back)?;
            }
            if i >= options.warmup {
                times.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(2 * BATCH));
            }
        }
        if rank != 0 {
            continue;
        }
        times.sort_by(f64::total_cmp);
        let at = |q: f64| times[((times.len() - 1) as f64 * q).round() as usize];
        let (p10, median, p90) = (at(0.1), at(0.5), at(0.9));
        println!("{bytes:>10} {p10:>12.3} {median:>12.3} {p90:>12.3}  {}", if verified { "yes" } else { "not asked" });
        if let Some(json) = &mut json {
            writeln!(
                json,
                "{{\"bench\":\"p2p\",\"peer\":\"iceoryx2\",\"version\":\"{VERSION}\",\"ranks\":2,\"bytes\":{bytes},\
                 \"half_rtt_us\":{{\"p10\":{p10:.4},\"median\":{median:.4},\"p90\":{p90:.4}}},\"verified\":{}}}",
                if verified { "true" } else { "null" }
            )?;
        }
    }
    Ok(())
}
