//! The diagnosis, by a table of hangs and by properties; boards and what is read of them.

use proptest::prelude::*;

use super::board::{Board, BoardLayout, RECORDS, WAITS};
use super::reading::BoardCopy;
use super::*;
use crate::memory::layout::{LINE, Layout};
use crate::memory::mapping::Mapping;
use crate::sync::Operation;
use crate::sync::progress::{Waiting, now_ns};

const SECOND: u64 = 1_000_000_000;
const PATIENCE: u64 = SECOND / 5;

fn wait(operation: Operation, epoch: u64, peer: impl Into<Option<usize>>) -> WaitSnapshot {
    WaitSnapshot { operation, epoch, peer: peer.into(), for_ns: 3 * SECOND }
}

fn call(operation: Operation, epoch: u64, over: bool) -> HistoryRecord {
    HistoryRecord {
        number: 1,
        operation,
        is_wait: false,
        epoch,
        peer: None,
        began_ns_ago: 4 * SECOND,
        took_ns: over.then_some(SECOND),
        failed: false,
        asked: None,
    }
}

/// A communicator of ranks that are processes 100, 101 and so on, each with its waits.
fn comm(id: u64, waits: &[&[WaitSnapshot]]) -> CommSnapshot {
    let rank = |(rank, waits): (usize, &&[WaitSnapshot])| RankSnapshot {
        rank,
        node: Some(0),
        pid: Some(100 + rank as u32),
        process: ProcessState::Sleeping,
        standing: Standing::Active,
        waits: waits.to_vec(),
        quiet_ns: Some(3 * SECOND),
        ..Default::default()
    };
    CommSnapshot { id: id << 32, age_ns: 60 * SECOND, ranks: waits.iter().enumerate().map(rank).collect() }
}

fn found(comms: &[CommSnapshot]) -> (Finding, String) {
    let Diagnosis { finding, text } = diagnose(comms, PATIENCE);
    (finding, text)
}

use Operation::{AllReduce, Barrier, CombineSend, DispatchRecv, Recv, Setup};

#[test]
fn waits_that_are_young_mean_nothing() {
    let young = WaitSnapshot { for_ns: PATIENCE - 1, ..wait(Recv, 7, 1) };
    let (finding, text) = found(&[comm(1, &[&[young], &[WaitSnapshot { peer: Some(0), ..young }]])]);
    assert_eq!((finding, text.as_str()), (Finding::Quiet, "nobody has waited for longer than 200.0 ms"));
    assert_eq!(found(&[]).0, Finding::Quiet);
}

#[test]
fn ranks_that_receive_from_each_other_are_a_cycle() {
    let (finding, text) = found(&[comm(1, &[&[wait(DispatchRecv, 812, 1)], &[wait(Recv, 7, 0)]])]);
    let says = "ranks wait for each other: rank 0 waits for rank 1 in dispatch_recv 812, rank 1 waits for rank 0 in recv tag 7";
    assert_eq!((finding, text.as_str()), (Finding::Cycle, says));
    // Whoever waits for the cycle is not part of it.
    let (_, text) = found(&[comm(1, &[&[wait(Recv, 1, 2)], &[wait(Recv, 1, 2)], &[wait(Recv, 2, 1)]])]);
    assert!(
        text.ends_with("rank 2 waits for rank 1 in recv tag 2, rank 1 waits for rank 2 in recv tag 1")
            || text.ends_with("rank 1 waits for rank 2 in recv tag 1, rank 2 waits for rank 1 in recv tag 2"),
        "{text}"
    );
    let (finding, text) = found(&[comm(1, &[&[wait(Recv, 5, 0)], &[]])]);
    assert_eq!((finding, text.as_str()), (Finding::Cycle, "rank 0 waits for itself in recv tag 5"));
}

#[test]
fn different_calls_of_all_are_a_mismatch() {
    let (finding, text) = found(&[comm(1, &[&[wait(Barrier, 5, 1)], &[wait(DispatchRecv, 3, 0)]])]);
    let says = "ranks are in different calls: rank 0 waits for rank 1 in barrier 5, rank 1 waits for rank 0 in dispatch_recv 3";
    assert_eq!((finding, text.as_str()), (Finding::Mismatch, says));
    // Who sets something up waits for all.
    let (finding, text) =
        found(&[comm(1, &[&[wait(AllReduce, 2, 2)], &[wait(AllReduce, 2, 2)], &[wait(Setup, 0, None)]])]);
    assert_eq!(finding, Finding::Mismatch, "{text}");
    assert!(text.contains("rank 2 waits for all others in set-up"), "{text}");
    // Halves of the exchanges of one handle go together.
    let (finding, _) = found(&[comm(1, &[&[wait(Operation::CombineRecv, 5, 1)], &[wait(DispatchRecv, 6, 0)]])]);
    assert_eq!(finding, Finding::Cycle);
}

#[test]
fn waiting_for_anyone_is_hopeless_only_if_all_wait() {
    let for_anyone: &[WaitSnapshot] = &[wait(Recv, 5, None)];
    let (finding, text) = found(&[comm(1, &[&[wait(Barrier, 3, 1)], for_anyone])]);
    let says = "ranks wait for each other: rank 0 waits for rank 1 in barrier 3, rank 1 waits for anyone in recv tag 5";
    assert_eq!((finding, text.as_str()), (Finding::Cycle, says));
    let (finding, text) = found(&[comm(1, &[&[wait(Barrier, 3, 1)], for_anyone, &[]])]);
    assert_eq!(
        (finding, text.as_str()),
        (Finding::Idle, "rank 1 waits for anyone in recv tag 5; rank 0 waits for it, in barrier 3")
    );
}

#[test]
fn the_straggler_is_at_the_end_of_the_chains_and_its_state_is_told() {
    let waits: [&[WaitSnapshot]; 4] = [&[wait(Barrier, 9, 1)], &[wait(Recv, 1, 3)], &[wait(Recv, 1, 3)], &[]];
    let mut late = comm(1, &waits);
    late.ranks[3].history = vec![call(DispatchRecv, 811, true)];
    let tail = "; all 3 others wait for it, in recv tag 1";
    let says = |late: &CommSnapshot, expected: String| {
        assert_eq!(found(std::slice::from_ref(late)), (Finding::Straggler, expected + tail));
    };
    late.ranks[3].cores = Some(0.0);
    let asleep = "rank 3 (process 103) has been asleep outside of this library for 3.0 s, using no processor time, after dispatch_recv 811";
    says(&late, asleep.to_owned());
    late.ranks[3].cores = Some(0.98);
    late.ranks[3].process = ProcessState::Running;
    says(
        &late,
        "rank 3 (process 103) has been computing for 3.0 s (it uses 0.98 cores), after dispatch_recv 811".to_owned(),
    );
    late.ranks[3].history.push(call(CombineSend, 811, false));
    says(&late, "rank 3 (process 103) has been at work in combine_send 811 for 3.0 s (it uses 0.98 cores)".to_owned());
    late.ranks[3] =
        RankSnapshot { rank: 3, node: Some(1), remark: Some("not on this machine".to_owned()), ..Default::default() };
    says(&late, "rank 3 of node 1 cannot be seen from here".to_owned());
}

#[test]
fn the_stopped_and_the_dead_come_before_who_waits_for_them() {
    let waits: [&[WaitSnapshot]; 4] = [&[wait(Recv, 7, 1)], &[wait(Recv, 7, 0)], &[wait(Barrier, 4, 3)], &[]];
    let mut seen = comm(1, &waits);
    seen.ranks[3].process = ProcessState::Stopped;
    seen.ranks[3].quiet_ns = Some(10_200_000_000);
    seen.ranks[3].history = vec![call(Operation::DispatchSend, 812, false)];
    let says = "rank 3 (process 103) is alive, but stopped by a signal (as SIGSTOP does; SIGCONT lets it go on), and has not moved \
                for 10.2 s, in dispatch_send 812; rank 2 waits for it, in barrier 4";
    assert_eq!(found(std::slice::from_ref(&seen)), (Finding::Stopped, says.to_owned()));
    seen.ranks[3].process = ProcessState::Dead;
    let (finding, text) = found(std::slice::from_ref(&seen));
    assert_eq!(finding, Finding::Died);
    assert!(text.starts_with("rank 3 (process 103) has died, in dispatch_send 812"), "{text}");
    // One that has left has ended as it should.
    seen.ranks[3].standing = Standing::Left;
    assert_eq!(found(&[seen]).0, Finding::Cycle);
}

#[test]
fn a_process_that_waits_in_another_communicator_is_followed_there() {
    let (a, b) = (comm(1, &[&[wait(Barrier, 1, 1)], &[]]), comm(2, &[&[], &[wait(AllReduce, 8, 0)]]));
    let (finding, text) = found(&[a.clone(), b.clone()]);
    let says = "ranks wait for each other: rank 0 of 00000001 waits for rank 1 of 00000001 in barrier 1, rank 1 of 00000002 waits for rank 0 of 00000002 in all_reduce 8";
    assert_eq!((finding, text.as_str()), (Finding::Cycle, says));
    // Ranks that are threads of one process each stand for themselves.
    let mut threads = [a, b];
    threads.iter_mut().flat_map(|comm| &mut comm.ranks).for_each(|rank| rank.pid = Some(100));
    assert_eq!(found(&threads).0, Finding::Straggler);
}

#[test]
fn waiting_for_its_own_devices_is_work() {
    let (finding, _) = found(&[comm(1, &[&[wait(CombineSend, 4, 0)], &[wait(DispatchRecv, 5, 0)]])]);
    assert_eq!(finding, Finding::Straggler);
}

fn any_wait(ranks: usize) -> impl Strategy<Value = WaitSnapshot> {
    let operations = [Barrier, AllReduce, DispatchRecv, Recv, Setup, CombineSend];
    let operation = (0..operations.len()).prop_map(move |i| operations[i]);
    (operation, 0..4u64, prop::option::of(0..ranks), 0..2u64).prop_map(|(operation, epoch, peer, old)| WaitSnapshot {
        operation,
        epoch,
        peer,
        for_ns: old * SECOND,
    })
}

fn any_comms() -> impl Strategy<Value = Vec<CommSnapshot>> {
    let comm = |id| {
        (1usize..6).prop_flat_map(move |ranks| {
            prop::collection::vec(prop::collection::vec(any_wait(ranks), 0..3), ranks)
                .prop_map(move |waits| comm(id, &waits.iter().map(Vec::as_slice).collect::<Vec<_>>()))
        })
    };
    prop_oneof![comm(1).prop_map(|comm| vec![comm]), (comm(1), comm(2)).prop_map(|(a, b)| vec![a, b])]
}

proptest! {
    #[test]
    fn whatever_is_seen_there_is_a_diagnosis_that_names_what_was_seen(comms in any_comms()) {
        let (finding, text) = found(&comms);
        let waits = comms.iter().flat_map(|comm| &comm.ranks).flat_map(|rank| &rank.waits);
        let old = waits.filter(|wait| wait.for_ns >= PATIENCE).count();
        prop_assert!(!text.is_empty());
        if old == 0 {
            prop_assert_eq!(finding, Finding::Quiet);
        }
        if matches!(finding, Finding::Cycle | Finding::Mismatch | Finding::Idle) {
            prop_assert!(text.contains(" waits for "), "{}", text);
        }
        // Each rank for itself, as a rank that sees its own communicator only.
        comms.iter().for_each(|comm| _ = comm.diagnosis());
    }

    #[test]
    fn a_ring_of_receives_is_a_cycle_until_one_of_them_works(ranks in 2usize..12, at_work in 0usize..12) {
        let waits: Vec<[WaitSnapshot; 1]> = (0..ranks).map(|rank| [wait(Recv, 1, (rank + 1) % ranks)]).collect();
        let mut ring = comm(1, &waits.iter().map(|w| &w[..]).collect::<Vec<_>>());
        prop_assert_eq!(found(std::slice::from_ref(&ring)).0, Finding::Cycle);
        let at_work = at_work % ranks;
        ring.ranks[at_work].waits.clear();
        let (finding, text) = found(&[ring]);
        prop_assert_eq!(finding, Finding::Straggler);
        let name = format!("rank {} ", at_work);
        prop_assert!(text.starts_with(&name), "{}", text);
    }
}

fn board(ranks: usize) -> (std::sync::Arc<Mapping>, BoardLayout, Board) {
    let mut layout = Layout::default();
    layout.add(LINE);
    let layout = BoardLayout::new(&mut layout, ranks);
    let memory = std::sync::Arc::new(Mapping::anonymous(layout.end).unwrap());
    let board = Board::new(memory.clone(), &layout, &vec![0; ranks]);
    (memory, layout, board)
}

fn read(memory: &Mapping, layout: &BoardLayout) -> BoardCopy {
    BoardCopy::take(memory, layout, now_ns()).unwrap()
}

#[test]
fn waits_of_several_threads_are_seen_until_they_are_over_and_those_beyond_are_not() {
    let (memory, layout, board) = board(3);
    let what = |i: u64| Waiting { operation: Recv, epoch: i, peer: Some(i as usize % 3) };
    let shown: Vec<_> = (0..WAITS as u64 + 2).map(|i| board.waits(&what(i))).collect();
    let epochs = |memory: &Mapping| read(memory, &layout).waits.iter().map(|w| w.epoch).collect::<Vec<_>>();
    assert_eq!(epochs(&memory), (0..WAITS as u64).collect::<Vec<_>>());
    shown.into_iter().enumerate().for_each(|(i, shown)| board.woke(shown, i % 2 == 0));
    let copy = read(&memory, &layout);
    assert!(copy.waits.is_empty());
    assert_eq!(copy.history.len(), WAITS + 2);
    for record in &copy.history {
        let i = record.number - 1;
        assert_eq!((record.epoch, record.peer, record.is_wait), (i, Some(i as usize % 3), true));
        assert_eq!((record.failed, record.took_ns.is_some()), (i % 2 == 1, true));
    }
    // A line that is free again is used again.
    let shown = board.waits(&what(77));
    assert_eq!(epochs(&memory), [77]);
    board.woke(shown, true);
}

#[test]
fn the_history_keeps_the_last_operations_in_order_and_tells_what_is_not_over() {
    let (memory, layout, board) = board(2);
    for epoch in 1..=RECORDS as u64 + 7 {
        board.begins(DispatchRecv, epoch).over();
    }
    drop(board.begins(CombineSend, 5));
    let asks = |count| Some([AllReduce as u64 | 1 << 16, count]);
    board.ends(board.enters((AllReduce, 8), asks(12)), true);
    board.enters((AllReduce, 9), asks(13));
    let history = read(&memory, &layout).history;
    assert_eq!(history.len(), RECORDS);
    assert!(history.windows(2).all(|pair| pair[0].number + 1 == pair[1].number));
    let [.., before, failed, over, open] = &history[..] else { panic!("{history:?}") };
    assert_eq!((before.epoch, before.failed, before.took_ns.is_some()), (RECORDS as u64 + 7, false, true));
    assert_eq!((failed.operation, failed.failed, failed.took_ns.is_some()), (CombineSend, true, true));
    assert_eq!((over.epoch, over.failed, over.asked.as_deref()), (8, false, Some("all_reduce(sum, 12 f32)")));
    assert_eq!((open.epoch, open.took_ns, open.asked.as_deref()), (9, None, Some("all_reduce(sum, 13 f32)")));
}

#[test]
fn wait_times_add_up_by_peer_and_are_taken_without_others_noticing() {
    let (memory, layout, board) = board(2);
    let time = std::time::Duration::from_nanos;
    [(Some(1), 5), (Some(1), 6), (None, 100)].into_iter().for_each(|(peer, ns)| board.waited(peer, time(ns)));
    assert_eq!(board.wait_times(), [0, 11]);
    assert_eq!(board.take_wait_times(), [0, 11]);
    board.waited(Some(0), time(3));
    assert_eq!(board.wait_times(), [3, 0]);
    let copy = read(&memory, &layout);
    assert_eq!((&copy.waited[..], copy.waited_for_anyone), (&[3, 11][..], 100));
    // Others see what is not over, too.
    let shown = board.waits(&Waiting { operation: Recv, epoch: 1, peer: Some(0) });
    let copy = read(&memory, &layout);
    assert_eq!((copy.waited[0], copy.waited[1]), (3 + copy.waits[0].for_ns, 11));
    board.woke(shown, true);
}

proptest! {
    #[test]
    fn whatever_bytes_a_board_holds_reading_it_does_no_harm(seed in any::<u64>(), ranks in 1usize..9) {
        use rand::{RngCore, SeedableRng};
        let (memory, layout, _) = board(ranks);
        let mut bytes = vec![0; layout.end];
        rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
        memory.write(0, &bytes);
        let now = now_ns();
        let copy = read(&memory, &layout);
        let (state, nodes) = (copy.state, copy.nodes.len());
        let rank = RankSnapshot::of(0, Some(1), ProcessState::Running, copy, now);
        prop_assert!(nodes == ranks && rank.waits.iter().all(|w| w.peer.is_none_or(|p| p < ranks)), "{}", state);
        let ranks: Vec<_> = (0..ranks).map(|r| RankSnapshot { rank: r, ..rank.clone() }).collect();
        let seen = CommSnapshot { id: seed, age_ns: seed, ranks };
        let text = seen.to_string() + &seen.diagnosis().to_string();
        prop_assert!(!text.is_empty());
    }
}
