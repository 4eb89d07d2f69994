use proptest::prelude::*;

use super::simulated::network;
use super::*;

const AREA: usize = 1 << 16;

/// A rank with some memory to put from, some to put into, and words that the others may change.
struct Node {
    plane: Plane,
    source: (Arc<Mapping>, Region),
    /// By rank, where its puts land.
    landing: Vec<(Arc<Mapping>, Region)>,
    words: Arc<Mapping>,
}

fn nodes(ranks: usize, depth: usize, seed: u64) -> Vec<Node> {
    let nodes: Vec<_> = network(ranks, depth, seed)
        .into_iter()
        .enumerate()
        .map(|(rank, endpoint)| {
            let far: Vec<_> = (0..ranks).map(|other| other != rank).collect();
            let plane = Plane::new(Box::new(endpoint), rank, &far).unwrap();
            let area = |access| {
                let memory = Arc::new(Mapping::anonymous(AREA).unwrap());
                let region = plane.register(&memory, 0..AREA, access).unwrap();
                (memory, region)
            };
            let words = Arc::new(Mapping::anonymous(4096).unwrap());
            let window = Window { memory: words.clone(), base: 1024, range: 0..1024 };
            plane.add_window(vec![Some(window); ranks]);
            let (source, landing) = (area(Access::Local), (0..ranks).map(|_| area(Access::Remote)).collect());
            Node { plane, source, landing, words }
        })
        .collect();
    let addresses: Vec<_> = nodes.iter().map(|node| node.plane.address().unwrap()).collect();
    for (rank, node) in nodes.iter().enumerate() {
        node.plane.connect(&addresses).unwrap();
        for (other, peer) in nodes.iter().enumerate().filter(|(other, _)| *other != rank) {
            node.plane.set_records(other, peer.plane.landing_of(rank).unwrap());
        }
    }
    nodes
}

impl Node {
    fn word(&self, offset: usize) -> u64 {
        self.words.word64(1024 + offset).load(Acquire)
    }

    fn put(&self, to: &Node, me: usize, range: Range<usize>) -> Put {
        let offset = range.start;
        Put { from: self.source.1, range, into: to.landing[me].1.remote, offset }
    }
}

fn add(offset: usize, value: u64) -> Update {
    Update::Add { window: 0, offset, value }
}

fn set(offset: usize, value: u64) -> Update {
    Update::Word64 { window: 0, offset, value }
}

/// Moves all on until `done`, for as many rounds as a live network can need.
fn until(nodes: &[Node], mut done: impl FnMut() -> bool) {
    for _ in 0..200_000 {
        if done() {
            return;
        }
        nodes.iter().for_each(|node| _ = node.plane.progress(|_| {}));
    }
    panic!("nothing moves on any more");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whoever sees a batch's number in its word sees all bytes of it and of the batches before; numbers come one by one.
    #[test]
    fn words_come_after_the_bytes_and_in_order(
        seed: u64, depth in 1usize..9, ranks in 2usize..5, batches in prop::collection::vec(prop::collection::vec(0usize..600, 0..6), 1..150),
    ) {
        let nodes = nodes(ranks, depth, seed);
        let mut ends = vec![0];
        for sizes in &batches {
            ends.push((ends[ends.len() - 1] + sizes.iter().sum::<usize>()) % (AREA / 2));
        }
        // Each byte differs from what was there before, so that one too early or too late is seen.
        let mut expected = vec![0u8; AREA];
        let mut started = 0;
        let mut seen = vec![0u64; ranks];
        until(&nodes, || {
            if started < batches.len() && (0..ranks).all(|me| seen[me] + 20 > started as u64 || me == 0) {
                let (sizes, mut at) = (&batches[started], ends[started]);
                let mut puts = vec![];
                for &size in sizes {
                    let new: Vec<u8> = expected[at..at + size].iter().map(|b| b + 1).collect();
                    expected[at..at + size].copy_from_slice(&new);
                    puts.push(at..at + size);
                    at += size;
                }
                // Memory that is put from stays as it is until the batch was applied: a new copy for each batch would not fit, so
                // those that meet an earlier batch's bytes wait for it.
                if (1..ranks).all(|to| nodes[0].plane.is_settled(to)) {
                    nodes[0].source.0.write(0, &expected);
                } else {
                    for range in puts.iter().rev() {
                        let old: Vec<u8> = expected[range.clone()].iter().map(|b| b - 1).collect();
                        expected[range.clone()].copy_from_slice(&old);
                    }
                    return false;
                }
                started += 1;
                for to in 1..ranks {
                    let puts = puts.iter().map(|range| nodes[0].put(&nodes[to], 0, range.clone()));
                    nodes[0].plane.send(to, puts, &[set(8, started as u64), add(16, 1)]);
                }
            }
            for to in 1..ranks {
                let word = nodes[to].word(8);
                assert!(word >= seen[to] && word == nodes[to].word(16), "{word} after {}", seen[to]);
                if word == started as u64 {
                    let mut landed = vec![0; AREA];
                    nodes[to].landing[0].0.read(0, &mut landed);
                    assert!(landed == expected, "batch {word}");
                }
                seen[to] = word;
            }
            started == batches.len() && seen[1..].iter().all(|&s| s == batches.len() as u64)
        });
    }

    /// All to all, more batches than there is credit for.
    #[test]
    fn every_update_is_made_once(seed: u64, depth in 1usize..20, ranks in 2usize..6, batches in 1u64..200) {
        let nodes = nodes(ranks, depth, seed);
        for (me, node) in nodes.iter().enumerate() {
            for n in 1..=batches {
                for to in (0..ranks).filter(|&to| to != me) {
                    node.plane.send(to, [node.put(&nodes[to], me, 0..n as usize)], &[add(me * 8, n)]);
                }
            }
        }
        let all = batches * (batches + 1) / 2;
        let settled = |me: usize| (0..ranks).all(|to| nodes[me].plane.is_settled(to));
        until(&nodes, || (0..ranks).all(settled));
        for (me, node) in nodes.iter().enumerate() {
            for other in (0..ranks).filter(|&other| other != me) {
                prop_assert_eq!(node.word(other * 8), all);
            }
            let moved = node.plane.moved();
            prop_assert_eq!((moved.puts, moved.bytes), (batches * (ranks as u64 - 1), all * (ranks as u64 - 1)));
        }
    }

    /// Bare puts, each from memory that is used again as soon as it has left, and now and then a word that counts those before.
    #[test]
    fn what_has_left_may_change_and_a_word_comes_after_the_puts_before_it(
        seed: u64, depth in 1usize..9, steps in prop::collection::vec((1usize..300, 0u8..4), 1..300),
    ) {
        const PLACES: usize = 3;
        const PLACE: usize = AREA / PLACES;
        let nodes = nodes(2, depth, seed);
        let (from, to) = (&nodes[0], &nodes[1]);
        let mut expected = vec![0u8; AREA];
        let mut leaving: [Option<Departure>; PLACES] = [None; PLACES];
        // How much of it each word promises.
        let mut promised = vec![0];
        let (mut step, mut at) = (0, 0);
        until(&nodes, || {
            let seen = to.word(8) as usize;
            let mut landed = vec![0; AREA];
            to.landing[0].0.read(0, &mut landed);
            assert!(landed[..promised[seen]] == expected[..promised[seen]], "word {seen}");
            let place = step % PLACES;
            if leaving[place].is_some_and(|departure| !from.plane.has_left(departure)) {
                return false;
            }
            if let Some(&(bytes, then)) = steps.get(step).filter(|(bytes, _)| at + bytes <= AREA) {
                let data: Vec<u8> = (0..bytes).map(|i| (step * 7 + i + 1) as u8).collect();
                expected[at..at + bytes].copy_from_slice(&data);
                from.source.0.write(place * PLACE, &data);
                let departure = from.plane.departure();
                // In two parts, of one departure.
                let middle = bytes / 2;
                for part in [0..middle, middle..bytes] {
                    let (range, offset) = (place * PLACE + part.start..place * PLACE + part.end, at + part.start);
                    let put = Put { from: from.source.1, range, into: to.landing[0].1.remote, offset };
                    from.plane.put(1, [put], departure);
                }
                (leaving[place], step, at) = (Some(departure), step + 1, at + bytes);
                if then == 0 {
                    promised.push(at);
                    from.plane.send(1, [], &[set(8, promised.len() as u64 - 1)]);
                }
                return false;
            }
            from.plane.is_settled(1)
        });
        let mut landed = vec![0; AREA];
        to.landing[0].0.read(0, &mut landed);
        prop_assert!(landed == expected && to.word(8) as usize == promised.len() - 1);
        prop_assert!(leaving.into_iter().flatten().all(|departure| from.plane.has_left(departure)));
        prop_assert!(from.plane.state.lock().unwrap().departures.is_empty());
    }

    #[test]
    fn fetches_are_atomic_and_answered_once(seed: u64, adds in prop::collection::vec(1u64..1000, 1..60)) {
        let nodes = nodes(3, 4, seed);
        let mut waiting: Vec<_> = adds.iter().enumerate().map(|(i, &value)| {
            let me = 1 + i % 2;
            (me, nodes[me].plane.fetch(0, 0, 32, Change::Add(value)))
        }).collect();
        let mut found = vec![];
        until(&nodes, || {
            waiting.retain(|&(me, token)| match nodes[me].plane.answer(token) {
                Some(value) => { found.push(value); false }
                None => true,
            });
            waiting.is_empty()
        });
        prop_assert_eq!(nodes[0].word(32), adds.iter().sum::<u64>());
        found.sort();
        found.dedup();
        prop_assert_eq!(found.len(), adds.len());
    }
}

#[test]
fn a_line_a_word_of_four_bytes_a_swap_and_a_get() {
    let nodes = nodes(2, 4, 1);
    let line = Update::Line { window: 0, offset: 64, words: [1, 2, 3, 4, 5, 6, 7, 8] };
    nodes[0].plane.send(1, [], &[line, Update::Word32 { window: 0, offset: 4, value: 9 }]);
    let old = nodes[0].plane.fetch(1, 0, 64, Change::CompareSwap(1, 77));
    nodes[1].landing[0].0.write(100, b"over there");
    let got =
        nodes[0].plane.get(1, (nodes[1].landing[0].1.remote, 100), (nodes[0].source.1, 200..210)).unwrap().unwrap();
    let (mut first, mut second) = (None, None);
    until(&nodes, || {
        first = first.or_else(|| nodes[0].plane.answer(old));
        second = second.or_else(|| nodes[0].plane.answer(got));
        first.is_some() && second.is_some()
    });
    assert_eq!(first, Some(1));
    let words: Vec<_> = (0..8).map(|i| nodes[1].word(64 + i * 8)).collect();
    assert_eq!(words, [77, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(nodes[1].words.word32(1024 + 4).load(Acquire), 9);
    let mut text = [0; 10];
    nodes[0].source.0.read(200, &mut text);
    assert_eq!(&text, b"over there");
}

#[test]
fn more_updates_than_a_record_holds_are_all_made() {
    let nodes = nodes(2, 4, 2);
    let updates: Vec<_> = (0..100).map(|i| set(8 * i, i as u64 + 1)).collect();
    nodes[0].plane.send(1, [nodes[0].put(&nodes[1], 0, 0..10)], &updates);
    until(&nodes, || nodes[0].plane.is_settled(1));
    assert!((0..100).all(|i| nodes[1].word(8 * i) == i as u64 + 1));
}

#[test]
fn a_rank_that_has_gone_is_trouble_and_holds_up_nobody_else() {
    let mut nodes = nodes(3, 4, 3);
    nodes.pop();
    nodes[0].plane.send(2, [], &[add(0, 1)]);
    nodes[0].plane.send(1, [], &[add(0, 1)]);
    until(&nodes, || nodes[0].plane.trouble(|_| true).is_some() && nodes[0].plane.is_settled(1));
    assert!(matches!(nodes[0].plane.trouble(|_| true), Some(Trouble::Lost { rank: 2, .. })));
    assert!(nodes[0].plane.trouble(|rank| rank != 2).is_none());
    assert!(nodes[0].plane.is_settled(2), "nothing more comes of it");
}

#[test]
fn bare_puts_wait_for_credit_and_of_a_rank_that_has_gone_all_have_left() {
    let mut nodes = nodes(2, 5000, 6);
    let departure = nodes[0].plane.departure();
    let all = u64::from(MOST_PUTS) * (RECORDS + 3) + 5;
    let puts: Vec<_> = (0..all).map(|i| nodes[0].put(&nodes[1], 0, i as usize % 100..i as usize % 100 + 1)).collect();
    nodes[0].plane.put(1, puts, departure);
    // The other side applies nothing yet: so many are on their way, and no more.
    for _ in 0..100 {
        nodes[0].plane.progress(|_| {});
    }
    let moved = nodes[0].plane.moved();
    assert_eq!((moved.puts, moved.records), (u64::from(MOST_PUTS) * RECORDS, RECORDS));
    assert!(!nodes[0].plane.has_left(departure));
    nodes.pop();
    until(&nodes, || nodes[0].plane.has_left(departure));
    assert!(matches!(nodes[0].plane.trouble(|_| true), Some(Trouble::Lost { rank: 1, .. })));
}

#[test]
fn a_word_outside_its_window_is_refused_and_changes_nothing() {
    for (window, offset) in [(0, 1024), (0, 1020), (0, usize::MAX - 7), (0, 4), (1, 0), (u16::MAX, 0)] {
        let nodes = nodes(2, 4, 4);
        nodes[0].plane.send(1, [], &[Update::Word64 { window, offset, value: u64::MAX }]);
        until(&nodes, || nodes[1].plane.trouble(|_| true).is_some());
        assert!(
            matches!(nodes[1].plane.trouble(|_| true), Some(Trouble::Corrupt { rank: 0, .. })),
            "{window} {offset}"
        );
        let mut words = [0u64; 512];
        nodes[1].words.read_into(0, &mut words);
        assert_eq!(words, [0; 512]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// A broken rank may put anything where its records land, and any immediates.
    #[test]
    fn lies_hurt_only_the_liar(words in prop::collection::vec(any::<u64>(), 32), immediates in prop::collection::vec(any::<u32>(), 1..40), small: bool) {
        let nodes = nodes(2, 64, 5);
        let mut bytes = words.clone();
        if small {
            // Nearly right: the number and the length are plausible.
            (bytes[0], bytes[1]) = (1, 12 << 32);
            bytes[3] %= 6;
            bytes[4] %= 2048;
        }
        nodes[1].plane.state.lock().unwrap().peers[0].as_ref().unwrap().landing.0.write(RECORD_BYTES, bytemuck::cast_slice(&bytes));
        for immediate in immediates.into_iter().chain([immediate(RECORD, 0, 1)]) {
            nodes[1].plane.state.lock().unwrap().take(Event::Arrived { immediate });
        }
        for _ in 0..100 {
            nodes[1].plane.progress(|_| {});
        }
        let mut outside = [0u64; 128];
        nodes[1].words.read_into(0, &mut outside);
        prop_assert_eq!(outside, [0; 128]);
    }
}

#[test]
fn numbers_in_immediates_go_round() {
    for number in [0, 1, NUMBERS - 1, NUMBERS, 5 * NUMBERS - 3] {
        for step in 0..=RECORDS {
            assert_eq!(ahead(immediate(DATA, 7, number + step) % NUMBERS as u32, number), Some(step));
        }
        assert_eq!(ahead(immediate(DATA, 7, number + RECORDS + 1) % NUMBERS as u32, number), None);
    }
}
