//! Taking a copy of a rank's board, from a mapping or from a file. What it says is only shown, and compared: nothing of it is used
//! as an index or a length before it was checked.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::board::{
    ASKED, BEGAN, BoardLayout, ENDED, EPOCH, FAILED, IS_WAIT, NOBODY, NUMBER, RECORDS, WAIT_EPOCH, WAIT_OPERATION,
    WAIT_PEER, WAIT_SINCE, WAITS, WHAT,
};
use super::snapshot::{HistoryRecord, WaitSnapshot};
use crate::collectives;
use crate::comm::Statistics;
use crate::memory::layout::LINE;
use crate::memory::mapping::Mapping;
use crate::sync::Operation;

/// Where a board can be copied from.
pub(crate) trait Outbox {
    /// Copies bytes out; false where there are none.
    fn copy(&self, offset: usize, to: &mut [u8]) -> bool;
}

impl Outbox for Mapping {
    fn copy(&self, offset: usize, to: &mut [u8]) -> bool {
        let is_inside = offset + to.len() <= self.len();
        if is_inside {
            self.get(offset, to);
        }
        is_inside
    }
}

/// Read, not mapped: a segment that shrinks meanwhile is a short read, and pages that were never touched stay so.
impl Outbox for File {
    fn copy(&self, offset: usize, to: &mut [u8]) -> bool {
        self.read_exact_at(to, offset as u64).is_ok()
    }
}

/// A copy of a board.
pub(crate) struct BoardCopy {
    /// The state word.
    pub(crate) state: u32,
    /// When the communicator was made.
    pub(crate) created: u64,
    /// When the process began, in the kernel's ticks.
    pub(crate) started: u64,
    pub(crate) waits: Vec<WaitSnapshot>,
    /// The oldest first.
    pub(crate) history: Vec<HistoryRecord>,
    /// When the counters were stored, and the counters; `None` where they never were.
    pub(crate) counters: Option<(u64, Statistics)>,
    pub(crate) waited: Vec<u64>,
    pub(crate) waited_for_anyone: u64,
    pub(crate) nodes: Vec<usize>,
    /// When it last changed anything that can be seen.
    pub(crate) moved: u64,
}

impl BoardCopy {
    /// As it is now; times are told as they are seen from `now`.
    pub(crate) fn take(from: &impl Outbox, layout: &BoardLayout, now: u64) -> Option<Self> {
        let mut bytes = vec![0; layout.end];
        if !from.copy(0, &mut bytes) {
            return None;
        }
        let mut again = vec![0; RECORDS * LINE];
        if !from.copy(layout.history, &mut again) {
            return None;
        }
        let board = Words(&bytes);
        let ranks = layout.world_size;
        let waits: Vec<_> = (0..WAITS).filter_map(|line| wait(&board, layout.wait(line), ranks, now)).collect();
        let numbers = (0..RECORDS as u64).filter_map(|i| {
            let number = board.word(layout.record(i) + NUMBER * 8);
            // Its line was not taken for another record meanwhile.
            let at = layout.record(i) - layout.history;
            (number != 0 && number % RECORDS as u64 == i && Words(&again).word(at + NUMBER * 8) == number)
                .then_some(number)
        });
        let mut numbers: Vec<u64> = numbers.collect();
        numbers.sort_unstable();
        let mut moved = board.word(layout.identity);
        let mut history = Vec::with_capacity(numbers.len());
        for number in numbers {
            let words: [u64; 8] = std::array::from_fn(|i| board.word(layout.record(number) + i * 8));
            moved = moved.max(words[BEGAN]).max(words[ENDED]);
            history.extend(record(words, ranks, now));
        }
        moved = waits.iter().map(|wait| now.saturating_sub(wait.for_ns)).fold(moved, u64::max);
        // With the waits that are not over.
        let waited = |peer: Option<usize>| {
            let now = waits.iter().filter(|wait| wait.peer == peer).map(|wait| wait.for_ns);
            now.fold(board.word(layout.waited_for(peer)), u64::saturating_add)
        };
        let stored = board.word(layout.counters);
        let counters = (stored != 0).then(|| {
            let mut statistics = Statistics::default();
            let into = bytemuck::bytes_of_mut(&mut statistics);
            into.copy_from_slice(&bytes[layout.counters + 8..][..into.len()]);
            (stored, statistics)
        });
        Some(BoardCopy {
            state: board.half(layout.state),
            created: board.word(layout.identity),
            started: board.word(layout.identity + 8),
            waited: (0..ranks).map(|peer| waited(Some(peer))).collect(),
            waited_for_anyone: waited(None),
            waits,
            history,
            counters,
            nodes: (0..ranks).map(|rank| board.half(layout.nodes + rank * 4) as usize).collect(),
            moved: moved.max(stored),
        })
    }
}

/// Words of a copy.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn word(&self, at: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.0[at..at + 8]);
        u64::from_ne_bytes(word)
    }

    fn half(&self, at: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&self.0[at..at + 4]);
        u32::from_ne_bytes(word)
    }
}

fn peer_of(word: u32, ranks: usize) -> Option<usize> {
    Some(word as usize).filter(|&peer| word != NOBODY && peer < ranks)
}

fn wait(board: &Words<'_>, at: usize, ranks: usize, now: u64) -> Option<WaitSnapshot> {
    let operation = Operation::from_word(board.half(at + WAIT_OPERATION))?;
    (operation != Operation::Computing).then(|| WaitSnapshot {
        operation,
        epoch: board.word(at + WAIT_EPOCH),
        peer: peer_of(board.half(at + WAIT_PEER), ranks),
        for_ns: now.saturating_sub(board.word(at + WAIT_SINCE)),
    })
}

fn record(words: [u64; 8], ranks: usize, now: u64) -> Option<HistoryRecord> {
    let what = words[WHAT];
    let operation = Operation::from_word(what as u16 as u32)?;
    let is_wait = what & IS_WAIT != 0;
    let asks = operation.is_collective() && !is_wait;
    Some(HistoryRecord {
        number: words[NUMBER],
        operation,
        is_wait,
        epoch: words[EPOCH],
        peer: peer_of((what >> 32) as u32, ranks),
        began_ns_ago: now.saturating_sub(words[BEGAN]),
        took_ns: (words[ENDED] != 0).then(|| words[ENDED].saturating_sub(words[BEGAN])),
        failed: what & FAILED != 0,
        asked: asks.then(|| collectives::describe([words[ASKED], words[ASKED + 1]])),
    })
}
