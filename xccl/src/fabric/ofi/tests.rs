//! Endpoints of one process put into each other's memory, over the loopback addresses.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::library::Library;
use super::{Options, open};
use crate::fabric::endpoint::{Access, Endpoint, Event, Posted, Region};
use crate::memory::MemoryFlavour;
use crate::memory::mapping::Mapping;
use crate::memory::segment::{OwnSegment, Writers};

/// No test waits longer.
const LONGEST: Duration = Duration::from_secs(20);

/// Whether libfabric can be loaded; a test that needs it says so and ends, otherwise.
fn without_library() -> bool {
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
    let options = Options { provider: None, source: Some(source), ranks: n };
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
            ranks[0].endpoint.put(1, from, (target, 5000), 0xfeed_beef).unwrap()
        });
        poll_until(&mut ranks, &mut seen, |seen| !seen[1].is_empty());
        let mut bytes = [0; 10];
        ranks[1].memory.read(5000, &mut bytes);
        assert_eq!(&bytes, b"here it is");
        assert_eq!(seen, [vec![], vec![Event::Arrived { immediate: 0xfeed_beef }]]);
    }
}
