//! Models of the protocols, explored exhaustively (within loom's bounds).

use std::time::Duration;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use loom::thread;

use super::{bell, closing, epoch, pieces, ring, signal, steps};

/// Two buffers in turn; the reader's own word frees a buffer for the epoch after next.
#[test]
fn loom_a_published_epoch_carries_its_rows_and_reuse_waits_for_the_reader() {
    loom::model(|| {
        struct Shared {
            published: AtomicU64,
            consumed: AtomicU64,
            rows: [loom::cell::UnsafeCell<u64>; 2],
        }
        let shared = Arc::new(Shared {
            published: AtomicU64::new(0),
            consumed: AtomicU64::new(0),
            rows: [loom::cell::UnsafeCell::new(0), loom::cell::UnsafeCell::new(0)],
        });
        let writer = {
            let shared = shared.clone();
            thread::spawn(move || {
                for e in 1..=3u64 {
                    // Epoch e reuses the buffer of epoch e - 2, which must have been consumed.
                    while e > 2 && !epoch::reached(&shared.consumed, e - 2) {
                        thread::yield_now();
                    }
                    // SAFETY: loom's cell itself checks that no access is concurrent.
                    shared.rows[(e % 2) as usize].with_mut(|row| unsafe { *row = e * 10 });
                    epoch::publish(&shared.published, e);
                }
            })
        };
        for e in 1..=3u64 {
            while !epoch::reached(&shared.published, e) {
                thread::yield_now();
            }
            // SAFETY: as above.
            let row = shared.rows[(e % 2) as usize].with(|row| unsafe { *row });
            assert_eq!(row, e * 10);
            epoch::publish(&shared.consumed, e);
        }
        writer.join().unwrap();
    });
}

#[test]
fn loom_ring_messages_arrive_in_order_and_slots_are_reused_only_after_release() {
    const SLOTS: u64 = 2;
    loom::model(|| {
        struct Shared {
            turns: [AtomicU64; SLOTS as usize],
            payload: [loom::cell::UnsafeCell<u64>; SLOTS as usize],
            consumed: AtomicU64,
        }
        let shared = Arc::new(Shared {
            turns: [AtomicU64::new(0), AtomicU64::new(0)],
            payload: [loom::cell::UnsafeCell::new(0), loom::cell::UnsafeCell::new(0)],
            consumed: AtomicU64::new(0),
        });
        let sender = {
            let shared = shared.clone();
            thread::spawn(move || {
                for n in 0..3u64 {
                    while !ring::may_fill(ring::released(&shared.consumed), n, SLOTS) {
                        thread::yield_now();
                    }
                    let slot = (n % SLOTS) as usize;
                    // SAFETY: loom's cell itself checks that no access is concurrent.
                    shared.payload[slot].with_mut(|p| unsafe { *p = 100 + n });
                    ring::complete(&shared.turns[slot], n);
                }
            })
        };
        for n in 0..3u64 {
            let slot = (n % SLOTS) as usize;
            while !ring::has(&shared.turns[slot], n) {
                thread::yield_now();
            }
            // SAFETY: as above.
            assert_eq!(shared.payload[slot].with(|p| unsafe { *p }), 100 + n);
            ring::release(&shared.consumed, n + 1);
        }
        sender.join().unwrap();
    });
}

/// No timeout in the model: a lost wake-up would let the sleeper spin on its bell for ever, which loom reports.
#[test]
fn loom_a_sleeper_never_misses_the_publication_it_waits_for() {
    loom::model(|| {
        let word = Arc::new(AtomicU64::new(0));
        let sleep = Arc::new(AtomicU32::new(bell::AWAKE));
        let bell_word = Arc::new(AtomicU32::new(0));
        let publisher = {
            let (word, sleep, bell_word) = (word.clone(), sleep.clone(), bell_word.clone());
            thread::spawn(move || {
                epoch::publish(&word, 1);
                bell::publish_fence();
                bell::ring_if_waiting(&sleep, &bell_word, 7);
            })
        };
        let list = AtomicU64::new(0);
        let place = bell::Place::new(&list, 3);
        let ready = bell::Sleeper::new().sleep_unless(
            (place, &sleep),
            bell::only(7),
            (&bell_word, bell::rung(&bell_word)),
            Duration::MAX,
            || epoch::reached(&word, 1),
        );
        assert!(ready, "woken by the only publisher, so its word must be there");
        publisher.join().unwrap();
        assert_eq!(sleep.load(Ordering::Relaxed), bell::AWAKE);
    });
}

/// The sleeper waits for a word that never comes; an abort reaches it all the same, between its look at the state and its sleep too.
#[test]
fn loom_an_abort_ends_the_sleep_of_who_waits_for_another_rank() {
    loom::model(|| {
        let state = Arc::new(AtomicU32::new(0));
        let bell_word = Arc::new(AtomicU32::new(0));
        let aborter = {
            let (state, bell_word) = (state.clone(), bell_word.clone());
            thread::spawn(move || {
                state.store(1, Ordering::Release);
                bell::publish_fence();
                bell::ring(&bell_word);
            })
        };
        let (list, sleep) = (AtomicU64::new(0), AtomicU32::new(bell::AWAKE));
        let place = bell::Place::new(&list, 3);
        loop {
            let rung = bell::rung(&bell_word);
            if state.load(Ordering::Acquire) == 1 {
                break;
            }
            let sleeper = bell::Sleeper::new();
            sleeper.sleep_unless((place, &sleep), bell::only(7), (&bell_word, rung), Duration::MAX, || false);
        }
        aborter.join().unwrap();
    });
}

/// Two publishers; the sleeper waits for the second one only and must not be left asleep by the first one's ringing.
#[test]
fn loom_a_sleeper_waits_for_one_of_two_publishers() {
    loom::model(|| {
        let words = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let sleep = Arc::new(AtomicU32::new(bell::AWAKE));
        let bell_word = Arc::new(AtomicU32::new(0));
        let publishers: Vec<_> = (0..2usize)
            .map(|me| {
                let (words, sleep, bell_word) = (words.clone(), sleep.clone(), bell_word.clone());
                thread::spawn(move || {
                    epoch::publish(&words[me], 1);
                    bell::publish_fence();
                    bell::ring_if_waiting(&sleep, &bell_word, me);
                })
            })
            .collect();
        let list = AtomicU64::new(0);
        let place = bell::Place::new(&list, 3);
        while !bell::Sleeper::new().sleep_unless(
            (place, &sleep),
            bell::only(1),
            (&bell_word, bell::rung(&bell_word)),
            Duration::MAX,
            || epoch::reached(&words[1], 1),
        ) {}
        for publisher in publishers {
            publisher.join().unwrap();
        }
    });
}

/// The threads are not waited for, as by a runner that returns too early: the caller still finds every piece done, once.
#[test]
fn loom_each_piece_is_done_once_and_seen_by_the_caller() {
    const PIECES: usize = 3;
    loom::model(|| {
        struct Shared {
            pieces: pieces::Pieces,
            rows: [loom::cell::UnsafeCell<u64>; PIECES],
        }
        let shared = Arc::new(Shared {
            pieces: pieces::Pieces::new(PIECES),
            rows: std::array::from_fn(|_| loom::cell::UnsafeCell::new(0)),
        });
        let take_part = |shared: &Shared| {
            while let Some(piece) = shared.pieces.take() {
                // SAFETY: loom's cell itself checks that no access is concurrent.
                shared.rows[piece].with_mut(|row| unsafe { *row += 1 });
                shared.pieces.finish();
            }
        };
        let lane = {
            let shared = shared.clone();
            thread::spawn(move || take_part(&shared))
        };
        take_part(&shared);
        while !shared.pieces.all_finished() {
            thread::yield_now();
        }
        for row in &shared.rows {
            // SAFETY: as above.
            assert_eq!(row.with(|row| unsafe { *row }), 1);
        }
        lane.join().unwrap();
    });
}

/// A publication for all reaches a sleeper through the list alone, whose word another rank changes at the same time.
#[test]
fn loom_a_publisher_for_all_finds_the_sleeper_in_the_list() {
    loom::model(|| {
        struct Shared {
            word: AtomicU64,
            list: AtomicU64,
            sleep: AtomicU32,
            bell: AtomicU32,
        }
        let shared = Arc::new(Shared {
            word: AtomicU64::new(0),
            list: AtomicU64::new(0b10),
            sleep: AtomicU32::new(bell::AWAKE),
            bell: AtomicU32::new(0),
        });
        let publisher = {
            let shared = shared.clone();
            thread::spawn(move || {
                epoch::publish(&shared.word, 1);
                bell::publish_fence();
                if bell::sleepers(&shared.list).any(|rank| rank == 0) {
                    bell::ring_if_waiting(&shared.sleep, &shared.bell, 7);
                }
            })
        };
        let awakening = {
            let shared = shared.clone();
            thread::spawn(move || shared.list.fetch_and(!0b10, Ordering::Relaxed))
        };
        let at = (bell::Place::new(&shared.list, 0), &shared.sleep);
        let is_there = || epoch::reached(&shared.word, 1);
        assert!(bell::Sleeper::new().sleep_unless(
            at,
            bell::ANYONE,
            (&shared.bell, bell::rung(&shared.bell)),
            Duration::MAX,
            is_there
        ));
        publisher.join().unwrap();
        awakening.join().unwrap();
        assert_eq!(shared.list.load(Ordering::Relaxed), 0);
    });
}

/// Two writers add to a word; its owner sleeps until both have, and then sees what each put before.
/// At most three preemptions: without a bound it takes minutes, and finds nothing either.
#[test]
fn loom_signals_add_up_and_carry_their_data() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        struct Shared {
            word: AtomicU64,
            data: [loom::cell::UnsafeCell<u64>; 2],
            list: AtomicU64,
            sleep: AtomicU32,
            bell: AtomicU32,
        }
        let shared = Arc::new(Shared {
            word: AtomicU64::new(0),
            data: [loom::cell::UnsafeCell::new(0), loom::cell::UnsafeCell::new(0)],
            list: AtomicU64::new(0),
            sleep: AtomicU32::new(bell::AWAKE),
            bell: AtomicU32::new(0),
        });
        let writers: Vec<_> = (0..2usize)
            .map(|me| {
                let shared = shared.clone();
                thread::spawn(move || {
                    // SAFETY: loom's cell itself checks that no access is concurrent.
                    shared.data[me].with_mut(|data| unsafe { *data = 7 });
                    signal::apply(&shared.word, signal::Update::Add(1));
                    bell::publish_fence();
                    bell::ring_if_waiting(&shared.sleep, &shared.bell, me);
                })
            })
            .collect();
        let at = (bell::Place::new(&shared.list, 0), &shared.sleep);
        let both = || signal::look(&shared.word, signal::Until::Ge(2)).is_some();
        while !bell::Sleeper::new().sleep_unless(
            at,
            bell::ANYONE,
            (&shared.bell, bell::rung(&shared.bell)),
            Duration::MAX,
            both,
        ) {}
        for data in &shared.data {
            // SAFETY: as above.
            assert_eq!(data.with(|data| unsafe { *data }), 7);
        }
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    });
}

/// Ranks of a collective: each has two slots, fills one per step and reads the other rank's as `reads` says.
fn steps_are_read_before_their_slots_are_filled_again(reads: [bool; 2]) {
    const SLOTS: u64 = 2;
    const STEPS: u64 = 3;
    #[derive(Default)]
    struct Rank {
        turns: [AtomicU64; SLOTS as usize],
        data: [loom::cell::UnsafeCell<u64>; SLOTS as usize],
    }
    fn play(me: &Rank, other: &Rank, reads: bool) {
        for step in 1..=STEPS {
            let (needed, slot) = (steps::needed(step, SLOTS), (step % SLOTS) as usize);
            while needed > 0 && !steps::has(&other.turns[(needed % SLOTS) as usize], needed) {
                thread::yield_now();
            }
            // SAFETY: loom's cell itself checks that no access is concurrent.
            me.data[slot].with_mut(|data| unsafe { *data = step * 10 });
            steps::publish(&me.turns[slot], step);
            if reads {
                while !steps::has(&other.turns[slot], step) {
                    thread::yield_now();
                }
                // SAFETY: as above.
                assert_eq!(other.data[slot].with(|data| unsafe { *data }), step * 10);
            }
        }
    }
    loom::model(move || {
        let ranks = Arc::new([Rank::default(), Rank::default()]);
        let other = {
            let ranks = ranks.clone();
            thread::spawn(move || play(&ranks[1], &ranks[0], reads[1]))
        };
        play(&ranks[0], &ranks[1], reads[0]);
        other.join().unwrap();
    });
}

#[test]
fn loom_ranks_that_read_each_other_step_by_step_see_what_was_written_for_the_step() {
    steps_are_read_before_their_slots_are_filled_again([true, true]);
}

#[test]
fn loom_a_rank_that_only_writes_does_not_overtake_its_reader() {
    steps_are_read_before_their_slots_are_filled_again([false, true]);
}

#[test]
fn loom_an_epoch_that_was_published_is_never_found_closed() {
    loom::model(|| {
        let words = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let writer = {
            let words = words.clone();
            thread::spawn(move || {
                epoch::publish(&words[0], 1);
                closing::close(&words[1], 2);
            })
        };
        let [published, closed] = &*words;
        assert_ne!(closing::look(published, closed, 1), closing::Part::Closed);
        while closing::look(published, closed, 2) == closing::Part::Open {
            thread::yield_now();
        }
        assert_eq!(closing::look(published, closed, 2), closing::Part::Closed);
        assert_eq!(closing::look(published, closed, 1), closing::Part::Published);
        writer.join().unwrap();
    });
}

/// A source, its trampoline, and a reader that watches only the trampoline; then the other way: the source overwrites its row when the
/// trampoline has said that the reader is done.
#[test]
fn loom_a_trampoline_carries_what_it_has_seen_both_ways() {
    loom::model(|| {
        #[derive(Default)]
        struct Shared {
            dispatched: AtomicU64,
            forwarded: AtomicU64,
            combined: AtomicU64,
            returned: AtomicU64,
            row: loom::cell::UnsafeCell<u64>,
        }
        let shared = Arc::new(Shared::default());
        let await_in = |word: &AtomicU64| {
            while !epoch::reached(word, 1) {
                thread::yield_now();
            }
        };
        let trampoline = {
            let shared = shared.clone();
            thread::spawn(move || {
                await_in(&shared.dispatched);
                epoch::publish(&shared.forwarded, 1);
                await_in(&shared.combined);
                epoch::publish(&shared.returned, 1);
            })
        };
        let reader = {
            let shared = shared.clone();
            thread::spawn(move || {
                await_in(&shared.forwarded);
                // SAFETY: loom's cell itself checks that no access is concurrent.
                assert_eq!(shared.row.with(|row| unsafe { *row }), 7);
                epoch::publish(&shared.combined, 1);
            })
        };
        // SAFETY: as above.
        shared.row.with_mut(|row| unsafe { *row = 7 });
        epoch::publish(&shared.dispatched, 1);
        await_in(&shared.returned);
        // SAFETY: as above.
        shared.row.with_mut(|row| unsafe { *row = 8 });
        trampoline.join().unwrap();
        reader.join().unwrap();
    });
}
