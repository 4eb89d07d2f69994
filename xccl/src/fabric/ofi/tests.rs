//! Endpoints of one process put into each other's memory, over the loopback addresses.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::library::Library;
use super::{Options, open};
use crate::fabric::endpoint::{Access, Endpoint, Event, MOST_PARTS, Part, Posted, Region, RemoteRegion};
use crate::memory::MemoryFlavour;
use crate::memory::mapping::Mapping;
use crate::memory::segment::{OwnSegment, Writers};

/// No test waits longer.
const LONGEST: Duration = Duration::from_secs(20);

/// Whether libfabric can be loaded; a test that needs it says so and ends, otherwise.
pub(super) fn without_library() -> bool {
    let missing = Library::get().err();
    if let Some(why) = &missing {
        eprintln!("skipped: {why}");
    }
    missing.is_some()
}

/// A rank: its endpoint and its memory, registered for others.
struct Rank {
    endpoint: Box<dyn Endpoint>,
    memory: Arc<Mapping>,
    region: Region,
}

/// `n` ranks at an address, which all reach each other.
fn ranks(n: usize, source: &str, bytes: usize) -> Vec<Rank> {
    let source: IpAddr = source.parse().unwrap();
    let options = Options { provider: None, source: Some(source), ranks: n, wakes: true };
    let mut ranks: Vec<_> = (0..n)
        .map(|_| {
            let mut endpoint = open(&options).unwrap();
            let segment = OwnSegment::create(MemoryFlavour::Memfd, Writers::Anyone, bytes, false).unwrap();
            let memory = Arc::new(segment.mapping);
            let region = endpoint.register(&memory, 0..bytes, Access::Remote).unwrap();
            Rank { endpoint, memory, region }
        })
        .collect();
    let addresses: Vec<_> = ranks.iter().map(|r| Some(r.endpoint.address().unwrap())).collect();
    ranks.iter_mut().for_each(|r| r.endpoint.connect(&addresses).unwrap());
    ranks
}

/// Polls all ranks, adding what each has seen, until `done`.
fn poll_until(ranks: &mut [Rank], seen: &mut [Vec<Event>], done: impl Fn(&[Vec<Event>]) -> bool) {
    let start = Instant::now();
    while !done(seen) {
        assert!(start.elapsed() < LONGEST, "waited in vain: {seen:?}");
        for (rank, seen) in ranks.iter_mut().zip(seen.iter_mut()) {
            rank.endpoint.poll(seen).unwrap();
        }
    }
}

/// Posts until it is taken, polling all ranks meanwhile.
fn insist(ranks: &mut [Rank], seen: &mut [Vec<Event>], mut post: impl FnMut(&mut [Rank]) -> Posted) {
    let start = Instant::now();
    while post(ranks) == Posted::Full {
        assert!(start.elapsed() < LONGEST, "the queue stays full: {seen:?}");
        for (rank, seen) in ranks.iter_mut().zip(seen.iter_mut()) {
            rank.endpoint.poll(seen).unwrap();
        }
    }
}

#[test]
fn a_put_brings_its_bytes_and_then_its_immediate() {
    if without_library() {
        return;
    }
    for source in ["127.0.0.1", "::1"] {
        let mut ranks = ranks(2, source, 1 << 16);
        let mut seen = vec![Vec::new(); 2];
        ranks[0].memory.write(100, b"here it is");
        let target = ranks[1].region.remote;
        insist(&mut ranks, &mut seen, |ranks| {
            let from = (ranks[0].region, 100..110);
            ranks[0].endpoint.put(1, from, (target, 5000), 0xfeed_beef, None).unwrap()
        });
        poll_until(&mut ranks, &mut seen, |seen| !seen[1].is_empty());
        let mut bytes = [0; 10];
        ranks[1].memory.read(5000, &mut bytes);
        assert_eq!(&bytes, b"here it is");
        assert_eq!(seen, [vec![], vec![Event::Arrived { immediate: 0xfeed_beef }]]);
    }
}

#[test]
fn a_put_tells_that_it_has_left_and_its_memory_may_change_then() {
    if without_library() {
        return;
    }
    const BYTES: usize = 8 << 20;
    let mut ranks = ranks(2, "127.0.0.1", 2 * BYTES);
    let mut seen = vec![Vec::new(); 2];
    let data = pattern(BYTES, 5);
    ranks[0].memory.write(0, &data);
    let target = ranks[1].region.remote;
    for (token, bytes) in [(7, 3), (8, BYTES)] {
        insist(&mut ranks, &mut seen, |ranks| {
            ranks[0].endpoint.put(1, (ranks[0].region, 0..bytes), (target, BYTES), 4, Some(token)).unwrap()
        });
        poll_until(&mut ranks, &mut seen, |seen| seen[0].contains(&Event::Left { token }));
    }
    ranks[0].memory.write(0, &vec![0; BYTES]);
    poll_until(&mut ranks, &mut seen, |seen| seen[1].len() == 2);
    assert_eq!(
        seen,
        [vec![Event::Left { token: 7 }, Event::Left { token: 8 }], vec![Event::Arrived { immediate: 4 }; 2]]
    );
    let mut arrived = vec![0; BYTES];
    ranks[1].memory.read(BYTES, &mut arrived);
    assert!(arrived == data);
}

/// Bytes that depend on every argument.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251 + seed * 31) as u8).collect()
}

#[test]
fn puts_of_any_length_arrive_exactly_once_with_the_right_bytes() {
    if without_library() {
        return;
    }
    let lengths = [0, 1, 7, 64, 65, 4096, 100_000, 1 << 20, 4 << 20];
    for source in ["127.0.0.1", "::1"] {
        let mut ranks = ranks(2, source, 8 << 20);
        let mut seen = vec![Vec::new(); 2];
        for (i, len) in lengths.into_iter().enumerate() {
            let (from, to) = (33 * i, 777 + 5 * i);
            let bytes = pattern(len, i);
            ranks[0].memory.write(from, &bytes);
            ranks[1].memory.write(to, &vec![0xee; len + 1]);
            let target = ranks[1].region.remote;
            insist(&mut ranks, &mut seen, |ranks| {
                let part = (ranks[0].region, from..from + len);
                ranks[0].endpoint.put(1, part, (target, to), i as u32, None).unwrap()
            });
            poll_until(&mut ranks, &mut seen, |seen| seen[1].len() > i);
            let mut arrived = vec![0; len + 1];
            ranks[1].memory.read(to, &mut arrived);
            assert!(arrived[..len] == bytes, "{len} bytes over {source}");
            assert_eq!(arrived[len], 0xee, "a byte behind the {len} of the put was written");
        }
        let all: Vec<_> = (0..lengths.len()).map(|i| Event::Arrived { immediate: i as u32 }).collect();
        assert_eq!(seen, [vec![], all]);
    }
}

#[test]
fn the_parts_of_a_put_all_lie_there_when_its_one_immediate_arrives() {
    if without_library() {
        return;
    }
    let mut ranks = ranks(2, "127.0.0.1", 1 << 20);
    let mut seen = vec![Vec::new(); 2];
    let most = ranks[0].endpoint.most_parts();
    assert!((2..=MOST_PARTS).contains(&most), "{most} parts");
    // Of several lengths, and at the target in the opposite order.
    let parts = [(5, 0, 900_000), (300_000, 10, 500_000), (1, 400_000, 450_000), (12_345, 500_000, 10)];
    for count in 1..=most {
        let parts = &parts[..count];
        for (i, &(len, from, to)) in parts.iter().enumerate() {
            ranks[0].memory.write(from, &pattern(len, i + count));
            ranks[1].memory.write(to, &vec![0xee; len + 1]);
        }
        let (source, target) = (ranks[0].region, ranks[1].region.remote);
        let part =
            |&(len, from, to): &(usize, usize, usize)| Part { from: (source, from..from + len), into: (target, to) };
        let put: Vec<_> = parts.iter().map(part).collect();
        insist(&mut ranks, &mut seen, |ranks| ranks[0].endpoint.put_parts(1, &put, count as u32).unwrap());
        poll_until(&mut ranks, &mut seen, |seen| seen[1].len() >= count);
        for (i, &(len, _, to)) in parts.iter().enumerate() {
            let mut arrived = vec![0; len + 1];
            ranks[1].memory.read(to, &mut arrived);
            assert!(arrived[..len] == pattern(len, i + count), "part {i} of {count}");
            assert_eq!(arrived[len], 0xee, "a byte behind part {i} was written");
        }
    }
    let all: Vec<_> = (1..=most).map(|count| Event::Arrived { immediate: count as u32 }).collect();
    assert_eq!(seen, [vec![], all]);
}

#[test]
fn a_get_fetches_the_bytes_and_names_its_token() {
    if without_library() {
        return;
    }
    let mut ranks = ranks(2, "127.0.0.1", 8 << 20);
    let mut seen = vec![Vec::new(); 2];
    for (i, len) in [1, 64, 5000, 4 << 20].into_iter().enumerate() {
        let bytes = pattern(len, i);
        ranks[1].memory.write(100, &bytes);
        let source = ranks[1].region.remote;
        let token = u64::MAX - i as u64;
        insist(&mut ranks, &mut seen, |ranks| {
            let into = (ranks[0].region, 9..9 + len);
            ranks[0].endpoint.get(1, (source, 100), into, token).unwrap()
        });
        poll_until(&mut ranks, &mut seen, |seen| seen[0].len() > i);
        assert_eq!(seen[0][i], Event::Got { token });
        let mut fetched = vec![0; len];
        ranks[0].memory.read(9, &mut fetched);
        assert!(fetched == bytes, "{len} bytes");
    }
    assert!(seen[1].is_empty(), "{seen:?}");
}

#[test]
fn a_full_queue_is_said_to_be_full_and_takes_more_once_polled() {
    if without_library() {
        return;
    }
    let mut ranks = ranks(2, "127.0.0.1", 1 << 20);
    let mut seen = vec![Vec::new(); 2];
    let target = ranks[1].region.remote;
    let put = |ranks: &mut [Rank], immediate: u32| {
        let from = (ranks[0].region, 0..512);
        ranks[0].endpoint.put(1, from, (target, 512 * (immediate as usize % 2000)), immediate, None).unwrap()
    };
    insist(&mut ranks, &mut seen, |ranks| put(ranks, 0));
    // Nobody polls.
    let mut posted = 1;
    while put(&mut ranks, posted) == Posted::Yes {
        posted += 1;
        assert!(posted < 1 << 20, "a queue without end");
    }
    for more in posted..posted + 1000 {
        insist(&mut ranks, &mut seen, |ranks| put(ranks, more));
    }
    let total = posted as usize + 1000;
    poll_until(&mut ranks, &mut seen, |seen| seen[1].len() >= total);
    let mut immediates: Vec<_> = seen[1]
        .iter()
        .map(|event| match event {
            Event::Arrived { immediate } => *immediate,
            other => panic!("{other:?}"),
        })
        .collect();
    immediates.sort_unstable();
    assert_eq!(immediates, (0..total as u32).collect::<Vec<_>>());
    assert!(seen[0].is_empty(), "{:?}", seen[0]);
}

#[test]
fn eight_ranks_put_into_each_others_memory_all_at_once_from_threads_of_their_own() {
    const N: usize = 8;
    const ROUNDS: usize = 20;
    const LEN: usize = 3000;
    if without_library() {
        return;
    }
    let ranks = ranks(N, "::1", N * ROUNDS * LEN * 2);
    let targets: Vec<_> = ranks.iter().map(|r| r.region.remote).collect();
    let finished = std::sync::Barrier::new(N);
    let play = |me: usize, rank: &mut Rank| {
        let start = Instant::now();
        let mut events = Vec::new();
        let out = N * ROUNDS * LEN;
        for round in 0..ROUNDS {
            for to in (0..N).filter(|to| *to != me) {
                // A part of the source's own, since a put reads it until it has arrived.
                let at = out + (round * N + to) * LEN;
                rank.memory.write(at, &pattern(LEN, me * 1000 + round));
                let slot = (me * ROUNDS + round) * LEN;
                let immediate = (me * ROUNDS + round) as u32;
                while rank.endpoint.put(to, (rank.region, at..at + LEN), (targets[to], slot), immediate, None).unwrap()
                    == Posted::Full
                {
                    assert!(start.elapsed() < LONGEST, "rank {me} finds no room");
                    rank.endpoint.poll(&mut events).unwrap();
                }
            }
        }
        while events.len() < (N - 1) * ROUNDS {
            assert!(start.elapsed() < LONGEST, "rank {me} has only {} arrivals", events.len());
            rank.endpoint.poll(&mut events).unwrap();
        }
        // Others may still need this one's polls.
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                finished.wait();
                done.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                rank.endpoint.poll(&mut events).unwrap();
                std::thread::yield_now();
            }
        });
        let mut immediates: Vec<_> = events
            .iter()
            .map(|event| match event {
                Event::Arrived { immediate } => *immediate as usize,
                other => panic!("{other:?}"),
            })
            .collect();
        immediates.sort_unstable();
        let expected: Vec<_> = (0..N * ROUNDS).filter(|i| i / ROUNDS != me).collect();
        assert_eq!(immediates, expected);
        for i in expected {
            let mut bytes = vec![0; LEN];
            rank.memory.read(i * LEN, &mut bytes);
            assert!(bytes == pattern(LEN, i / ROUNDS * 1000 + i % ROUNDS), "rank {me}, put {i}");
        }
    };
    let play = &play;
    std::thread::scope(|s| {
        for (me, mut rank) in ranks.into_iter().enumerate() {
            s.spawn(move || play(me, &mut rank));
        }
    });
}

#[test]
fn puts_to_a_rank_that_has_gone_fail_and_name_it_whether_it_was_ever_reached_or_not() {
    if without_library() {
        return;
    }
    for reached in [true, false] {
        let mut ranks = ranks(3, "127.0.0.1", 1 << 16);
        let mut seen = vec![Vec::new(); 3];
        let target = ranks[2].region.remote;
        let put = |ranks: &mut [Rank]| {
            let from = (ranks[0].region, 0..1000);
            ranks[0].endpoint.put(2, from, (target, 0), 1, None).unwrap()
        };
        if reached {
            insist(&mut ranks, &mut seen, put);
            poll_until(&mut ranks, &mut seen, |seen| !seen[2].is_empty());
        }
        drop(ranks.pop());
        let start = Instant::now();
        while seen[0].is_empty() {
            assert!(start.elapsed() < LONGEST, "nothing is said of the rank that has gone");
            let _ = put(&mut ranks);
            ranks[0].endpoint.poll(&mut seen[0]).unwrap();
        }
        // And it stays so, at once.
        seen[0].clear();
        assert_eq!(put(&mut ranks), Posted::Yes);
        ranks[0].endpoint.poll(&mut seen[0]).unwrap();
        assert!(seen[0].iter().all(|e| matches!(e, Event::Failed { to: Some(2), .. })), "{seen:?}");
        assert!(!seen[0].is_empty());
        // The others are none the worse.
        seen[0].clear();
        let target = ranks[1].region.remote;
        insist(&mut ranks, &mut seen, |ranks| {
            let from = (ranks[0].region, 0..10);
            ranks[0].endpoint.put(1, from, (target, 0), 5, None).unwrap()
        });
        poll_until(&mut ranks, &mut seen, |seen| !seen[1].is_empty());
        assert_eq!(seen[..2], [vec![], vec![Event::Arrived { immediate: 5 }]]);
    }
}

#[test]
fn a_put_wakes_a_sleeper_that_was_told_it_may_sleep() {
    use nix::poll::{PollFd, PollFlags, poll};
    if without_library() {
        return;
    }
    let mut ranks = ranks(2, "127.0.0.1", 1 << 16);
    let mut seen = vec![Vec::new(); 2];
    let target = ranks[1].region.remote;
    let mut sleeper = ranks.pop().unwrap();
    let slept = std::thread::spawn(move || {
        let (start, mut events, mut sleeps) = (Instant::now(), Vec::new(), 0);
        while events.len() < 10 {
            assert!(start.elapsed() < LONGEST, "the sleeper was not woken: {events:?}");
            sleeper.endpoint.poll(&mut events).unwrap();
            if events.len() < 10 && sleeper.endpoint.may_sleep() {
                let mut fds = [PollFd::new(sleeper.endpoint.wake_fd().unwrap(), PollFlags::POLLIN)];
                poll(&mut fds, 20_000u16).unwrap();
                sleeps += 1;
            }
        }
        (events, sleeps)
    });
    for i in 0..10 {
        // It has time to fall asleep.
        std::thread::sleep(Duration::from_millis(20));
        insist(&mut ranks, &mut seen, |ranks| {
            let from = (ranks[0].region, 0..100);
            ranks[0].endpoint.put(1, from, (target, 0), i, None).unwrap()
        });
        ranks[0].endpoint.poll(&mut seen[0]).unwrap();
    }
    while !slept.is_finished() {
        ranks[0].endpoint.poll(&mut seen[0]).unwrap();
    }
    let (events, sleeps) = slept.join().unwrap();
    assert_eq!(events, (0..10).map(|immediate| Event::Arrived { immediate }).collect::<Vec<_>>());
    assert!(sleeps >= 5, "it slept {sleeps} times only");
}

#[test]
fn a_provider_that_lacks_what_is_needed_is_refused_with_what_it_lacks_and_those_that_do_not() {
    if without_library() {
        return;
    }
    let refused = |provider: &str, source: Option<&str>| {
        let source = source.map(|s| s.parse().unwrap());
        open(&Options { provider: Some(provider.to_owned()), source, ranks: 2, wakes: true }).err().unwrap().to_string()
    };
    let text = refused("udp", None);
    for part in ["\"udp\"", "FI_RMA", "FI_EP_RDM", "tcp;ofi_rxm"] {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    let text = refused("pigeon", None);
    assert!(text.contains("pigeon is not among") && text.contains("tcp;ofi_rxm"), "{text}");
    // An address for documentation, which no machine has.
    let text = refused("tcp", Some("203.0.113.77"));
    assert!(text.contains("203.0.113.77") && text.contains("127.0.0.1"), "{text}");
}

#[test]
fn an_address_that_is_not_of_this_network_is_refused_with_the_rank_that_sent_it() {
    if without_library() {
        return;
    }
    let local = |source: &str| Options { provider: None, source: Some(source.parse().unwrap()), ranks: 2, wakes: true };
    let four = open(&local("127.0.0.1")).unwrap().address().unwrap();
    for blob in [four.clone(), four[..four.len() - 1].to_vec(), b"garbage".to_vec(), Vec::new()] {
        let mut six = open(&local("::1")).unwrap();
        six.connect(&[None, Some(blob)]).unwrap_err();
    }
    let mut six = open(&local("::1")).unwrap();
    let text = six.connect(&[None, Some(four)]).unwrap_err().to_string();
    assert!(text.contains("rank 1"), "{text}");
}

#[test]
fn a_rank_that_is_there_but_does_not_poll_for_long_is_waited_for() {
    if without_library() {
        return;
    }
    let mut ranks = ranks(2, "127.0.0.1", 1 << 16);
    let mut seen = vec![Vec::new(); 2];
    let target = ranks[1].region.remote;
    let put = |ranks: &mut [Rank]| {
        let from = (ranks[0].region, 0..10);
        ranks[0].endpoint.put(1, from, (target, 0), 5, None).unwrap()
    };
    // Long enough to be asked more than once whether it is there.
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(900) {
        assert_eq!(put(&mut ranks), Posted::Full);
        ranks[0].endpoint.poll(&mut seen[0]).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    insist(&mut ranks, &mut seen, put);
    poll_until(&mut ranks, &mut seen, |seen| !seen[1].is_empty());
    assert_eq!(seen, [vec![], vec![Event::Arrived { immediate: 5 }]]);
}

/// Not a test: the process that `a_process_that_is_killed…` kills. It says its address and its memory, takes the other's,
/// and puts into it until it is killed.
#[test]
#[ignore = "a process of another test"]
fn the_process_to_be_killed() {
    let Ok(source) = std::env::var("XCCL_TEST_KILLED") else { return };
    let options = Options { provider: None, source: Some(source.parse().unwrap()), ranks: 2, wakes: true };
    let mut endpoint = open(&options).unwrap();
    let segment = OwnSegment::create(MemoryFlavour::Memfd, Writers::Anyone, 1 << 20, false).unwrap();
    let region = endpoint.register(&Arc::new(segment.mapping), 0..1 << 20, Access::Remote).unwrap();
    println!("\nTELL {}", hex(&crate::fabric::encode(&(endpoint.address().unwrap(), region.remote)).unwrap()));
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let (address, target): (Vec<u8>, RemoteRegion) = crate::fabric::decode(&unhex(line.trim())).unwrap();
    endpoint.connect(&[Some(address), None]).unwrap();
    let (start, mut events) = (Instant::now(), Vec::new());
    while start.elapsed() < LONGEST {
        // Whether it is taken or not: this only keeps the way busy.
        let _ = endpoint.put(0, (region, 0..1 << 20), (target, 0), 2, None).unwrap();
        endpoint.poll(&mut events).unwrap();
    }
}

/// A process that does not outlive its test.
pub(super) struct Victim(pub(super) std::process::Child);

impl Victim {
    /// By SIGKILL.
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

pub(super) fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

#[test]
fn a_process_that_is_killed_while_puts_and_gets_are_on_their_way_to_it_fails_them_and_closing_does_not_hang() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};
    if without_library() {
        return;
    }
    for gets in [false, true] {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["fabric::ofi::tests::the_process_to_be_killed", "--exact", "--ignored", "--nocapture"])
            .env("XCCL_TEST_KILLED", "127.0.0.1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut victim = Victim(child);
        let mut lines = BufReader::new(victim.0.stdout.take().unwrap()).lines();
        let told = lines.find_map(|line| line.unwrap().strip_prefix("TELL ").map(unhex)).unwrap();
        let (address, target): (Vec<u8>, RemoteRegion) = crate::fabric::decode(&told).unwrap();

        let options = Options { provider: None, source: Some("127.0.0.1".parse().unwrap()), ranks: 2, wakes: true };
        let mut endpoint = open(&options).unwrap();
        let segment = OwnSegment::create(MemoryFlavour::Memfd, Writers::Anyone, 1 << 20, false).unwrap();
        let region = endpoint.register(&Arc::new(segment.mapping), 0..1 << 20, Access::Remote).unwrap();
        endpoint.connect(&[None, Some(address)]).unwrap();
        let tell = crate::fabric::encode(&(endpoint.address().unwrap(), region.remote)).unwrap();
        writeln!(victim.0.stdin.as_mut().unwrap(), "{}", hex(&tell)).unwrap();

        let (start, mut events, mut posted) = (Instant::now(), Vec::new(), 0);
        let mut killed = false;
        while !events.iter().any(|e| matches!(e, Event::Failed { .. })) {
            assert!(start.elapsed() < LONGEST, "nothing is said of the process that was killed ({posted} posted)");
            let whole = (region, 0..1 << 20);
            let taken = match gets {
                true => endpoint.get(1, (target, 0), whole, posted).unwrap(),
                false => endpoint.put(1, whole, (target, 0), 1, None).unwrap(),
            };
            posted += u64::from(taken == Posted::Yes);
            if posted >= 100 && !killed {
                victim.kill();
                killed = true;
            }
            endpoint.poll(&mut events).unwrap();
        }
        assert!(killed, "it failed before: {events:?}");
        let failed = events.iter().filter(|e| matches!(e, Event::Failed { .. }));
        assert!(failed.clone().all(|e| matches!(e, Event::Failed { to: Some(1), .. })), "{events:?}");
        // What else was on its way ends too, and nothing hangs.
        for _ in 0..1000 {
            endpoint.poll(&mut events).unwrap();
        }
        drop(endpoint);
    }
}

#[test]
fn an_endpoint_is_closed_while_a_put_is_halfway_into_its_memory() {
    if without_library() {
        return;
    }
    let mut ranks = ranks(2, "127.0.0.1", 16 << 20);
    let mut seen = vec![Vec::new(); 2];
    let target = ranks[1].region.remote;
    ranks[0].memory.write(0, &vec![7; 16 << 20]);
    let put =
        |ranks: &mut [Rank]| ranks[0].endpoint.put(1, (ranks[0].region, 0..16 << 20), (target, 0), 1, None).unwrap();
    insist(&mut ranks, &mut seen, put);
    // Its first byte is here and its last is not.
    let start = Instant::now();
    let byte = |ranks: &[Rank], at: usize| {
        let mut byte = [0];
        ranks[1].memory.read(at, &mut byte);
        byte[0]
    };
    while byte(&ranks, 0) != 7 {
        assert!(start.elapsed() < LONGEST, "nothing comes");
        ranks[0].endpoint.poll(&mut seen[0]).unwrap();
        ranks[1].endpoint.poll(&mut seen[1]).unwrap();
    }
    assert_ne!(byte(&ranks, (16 << 20) - 1), 7, "a socket holds 16 MiB here: the test needs a longer put");
    drop(ranks.pop());
    while seen[0].is_empty() {
        assert!(start.elapsed() < LONGEST, "nothing is said of the rank that has gone");
        ranks[0].endpoint.poll(&mut seen[0]).unwrap();
    }
    assert!(matches!(seen[0][..], [Event::Failed { to: Some(1), .. }]), "{seen:?}");
}
