//! Not a test: what puts cost between two processes, beside fabtests' `fi_rma_pingpong` and `fi_rma_bw` over the same provider,
//! which `benches/peers/build.sh` builds. All take turns, so that they meet the same moods of the machine.
//!
//! `cargo test --release -p xccl --lib ofi::figures -- --ignored --nocapture`

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use super::tests::{Victim, hex, unhex, without_library};
use super::{Options, open};
use crate::fabric::endpoint::{Access, Endpoint, Event, Posted, Region, RemoteRegion};
use crate::fabric::{decode, encode};
use crate::memory::MemoryFlavour;
use crate::memory::segment::{OwnSegment, Writers};

const LARGEST: usize = 4 << 20;
const ROUNDS: usize = 5;
const PINGS: usize = 10_000;

/// Of 8 bytes there are round trips, of more as many puts as make a part of a second.
fn count(size: usize) -> usize {
    if size == 8 { PINGS } else { (1 << 30) / size }
}

struct Side {
    endpoint: Box<dyn Endpoint>,
    region: Region,
    target: RemoteRegion,
    events: Vec<Event>,
    arrived: usize,
}

impl Side {
    /// Opens an endpoint, tells the other side of it and hears of theirs.
    fn join(wakes: bool, tell: impl FnOnce(String), hear: impl FnOnce() -> String) -> Side {
        let source = Some([127, 0, 0, 1].into());
        let mut endpoint = open(&Options { provider: None, source, ranks: 1, wakes }).unwrap();
        let segment = OwnSegment::create(MemoryFlavour::Memfd, Writers::Anyone, LARGEST, false).unwrap();
        segment.mapping.write(0, &vec![1; LARGEST]);
        let region = endpoint.register(&Arc::new(segment.mapping), 0..LARGEST, Access::Remote).unwrap();
        tell(hex(&encode(&(endpoint.address().unwrap(), region.remote)).unwrap()));
        let (address, target): (Vec<u8>, RemoteRegion) = decode(&unhex(hear().trim())).unwrap();
        endpoint.connect(&[Some(address)]).unwrap();
        Side { endpoint, region, target, events: Vec::new(), arrived: 0 }
    }

    fn poll(&mut self) {
        self.endpoint.poll(&mut self.events).unwrap();
        for event in self.events.drain(..) {
            assert!(matches!(event, Event::Arrived { .. }), "{event:?}");
            self.arrived += 1;
        }
    }

    fn put(&mut self, bytes: usize) {
        while self.endpoint.put(0, (self.region, 0..bytes), (self.target, 0), 7, None).unwrap() == Posted::Full {
            self.poll();
        }
    }

    fn wait(&mut self, arrivals: usize) {
        while self.arrived < arrivals {
            self.poll();
        }
        self.arrived -= arrivals;
    }

    /// Plays one side; the time of a put, or of half a round trip.
    fn play(&mut self, size: usize, first: bool) -> Duration {
        let mut time = Duration::ZERO;
        // The first round warms up.
        for n in [count(size) / 10, count(size)] {
            let start = Instant::now();
            match (size, first) {
                (8, true) => (0..n).for_each(|_| {
                    self.put(8);
                    self.wait(1);
                }),
                (8, false) => (0..n).for_each(|_| {
                    self.wait(1);
                    self.put(8);
                }),
                (_, true) => {
                    (0..n).for_each(|_| self.put(size));
                    self.wait(1);
                }
                (_, false) => {
                    self.wait(n);
                    self.put(0);
                }
            }
            time = start.elapsed() / n as u32;
        }
        if size == 8 { time / 2 } else { time }
    }
}

const SIZES: [usize; 8] = [8, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, LARGEST];

/// The other process: plays the sizes that it reads until there are no more, polling in between.
fn be_second(wakes: bool) {
    let lines = || std::io::stdin().lines().next().unwrap().unwrap();
    let mut side = Side::join(wakes, |text| println!("\nTELL {text}"), lines);
    let (orders, next) = std::sync::mpsc::channel();
    std::thread::spawn(move || std::io::stdin().lines().for_each(|line| orders.send(line.unwrap()).unwrap()));
    loop {
        // The core is for those whose turn it is.
        match next.recv_timeout(Duration::from_millis(1)) {
            Ok(size) => drop(side.play(size.parse().unwrap(), false)),
            Err(RecvTimeoutError::Timeout) => side.poll(),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// A pair of processes, of which this is the first.
struct Pair {
    side: Side,
    orders: ChildStdin,
    /// Dropped last, which ends it.
    _second: Victim,
}

impl Pair {
    fn start(wakes: bool) -> Pair {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["fabric::ofi::figures::puts_between_two_processes", "--exact", "--ignored", "--nocapture"])
            .env("XCCL_FIGURES_SECOND", wakes.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut second = Victim(child);
        let mut lines = BufReader::new(second.0.stdout.take().unwrap()).lines();
        let theirs = lines.find_map(|line| line.unwrap().strip_prefix("TELL ").map(str::to_owned)).unwrap();
        let mut orders = second.0.stdin.take().unwrap();
        let side = Side::join(wakes, |text| writeln!(orders, "{text}").unwrap(), || theirs);
        Pair { side, orders, _second: second }
    }

    fn play(&mut self, size: usize) -> Duration {
        writeln!(self.orders, "{size}").unwrap();
        self.side.play(size, true)
    }
}

/// What fabtests says of a put of `size` bytes, if it was built.
fn fabtests(size: usize, how: &str) -> Option<Duration> {
    let program = if size == 8 { "fi_rma_pingpong" } else { "fi_rma_bw" };
    let peers = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/peers").join(program);
    let run = |more: &[&str]| {
        let mut command = Command::new(&peers);
        command.args(["-p", "tcp;ofi_rxm", "-e", "rdm", "-o", how, "-S", &size.to_string()]);
        command.args(["-I", &count(size).to_string(), "-w", &(count(size) / 10).to_string()]).args(more);
        command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map(Victim)
    };
    let _server = run(&["-s", "127.0.0.1"]).ok()?;
    std::thread::sleep(Duration::from_millis(200));
    let mut client = run(&["127.0.0.1"]).ok()?;
    let lines: Vec<_> = BufReader::new(client.0.stdout.take()?).lines().map_while(|line| line.ok()).collect();
    // bytes, iterations, total, time, MB/s, us, …
    let micros: f64 = lines.last()?.split_whitespace().nth(5)?.parse().ok()?;
    Some(Duration::from_secs_f64(micros * 1e-6))
}

fn median(mut times: Vec<Duration>) -> Option<f64> {
    times.sort_unstable();
    times.get(times.len() / 2).map(|t| t.as_secs_f64() * 1e6)
}

#[test]
#[ignore = "a measurement"]
fn puts_between_two_processes() {
    if without_library() {
        return;
    }
    if let Ok(wakes) = std::env::var("XCCL_FIGURES_SECOND") {
        return be_second(wakes.parse().unwrap());
    }
    let mut pairs = [true, false].map(Pair::start);
    println!("medians of {ROUNDS} rounds over the loopback; 8 bytes: half a round trip, else one of many puts");
    println!("   bytes    put, waking   put, spinning   fabtests writedata   fabtests write  (us)");
    for size in SIZES {
        let mut times = [(); 4].map(|()| Vec::new());
        for _ in 0..ROUNDS {
            for (pair, times) in pairs.iter_mut().zip(&mut times) {
                times.push(pair.play(size));
            }
            times[2].extend(fabtests(size, "writedata"));
            times[3].extend((size == 8).then(|| fabtests(size, "write")).flatten());
        }
        let [waking, spinning, data, write] = times.map(median);
        let shown = |t: Option<f64>| t.map_or("-".to_owned(), |t| format!("{t:.2}"));
        let ratio = |t: Option<f64>| match (t, data) {
            (Some(t), Some(data)) => format!("{:.2} ({:.2}x)", t, t / data),
            _ => shown(t),
        };
        println!("{size:>8} {:>16} {:>16} {:>18} {:>15}", ratio(waking), ratio(spinning), shown(data), shown(write));
    }
}
