//! Seeing what ranks do: wait times, histories, snapshots in words, probes.

use std::ffi::{c_char, c_int};
use std::time::Duration;

use crate::boundary::{Failure, Out, Outcome, guard, natural, slice_mut};
use crate::comm::{with, xcclComm_t};
use crate::result::xcclResult_t;

/// Writes how many nanoseconds this rank has waited for each rank to times, which has count elements: the number of ranks. With
/// take = 1 they count from 0 afterwards, with 0 they go on. A wait counts for the rank that had to come next in the order of the
/// call; waits that are over at once, and those for any rank, do not count. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommGetWaitTimes(
    comm: xcclComm_t,
    times: *mut u64,
    count: usize,
    take: c_int,
) -> xcclResult_t {
    guard("xcclCommGetWaitTimes", || {
        // SAFETY: C's promise about its pointers and handles.
        let times = unsafe { slice_mut(times, count, "times") }?;
        // SAFETY: as above.
        let found = unsafe {
            with(comm, |live| {
                let ranks = live.comm.world_size();
                if count != ranks {
                    return Err(Failure::argument(format!("count is {count}: expected {ranks}, the number of ranks")));
                }
                match take {
                    0 => Ok(live.comm.wait_times()),
                    1 => Ok(live.comm.take_wait_times()),
                    _ => Err(Failure::argument(format!("take is {take}: expected 0 or 1"))),
                }
            })
        }?;
        times.copy_from_slice(&found);
        Ok(())
    })
}

/// An operation that a rank remembers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclHistoryRecord_t {
    /// Counts the operations of a rank.
    pub number: u64,
    /// The epoch, the number of the collective, or the tag of messages.
    pub epoch: u64,
    /// Nanoseconds since it began; of calls, to the kernel's tick (4 ms).
    pub began_ns_ago: u64,
    /// Nanoseconds that it took; UINT64_MAX while it is not over.
    pub took_ns: u64,
    /// The rank that was waited for; -1 for any, and for calls.
    pub peer: i32,
    /// 1 for a wait that went to sleep, 0 for a call.
    pub is_wait: i32,
    /// 1 if it ended with an error.
    pub failed: i32,
    /// 0.
    pub reserved: i32,
    /// Its name, for example "dispatch_recv"; ends with a zero.
    pub operation: [c_char; 32],
}

impl From<xccl::HistoryRecord> for xcclHistoryRecord_t {
    fn from(record: xccl::HistoryRecord) -> Self {
        let mut operation = [0; 32];
        let name = record.operation.to_string();
        // The last one stays 0.
        for (to, byte) in operation[..31].iter_mut().zip(name.bytes()) {
            *to = byte as c_char;
        }
        xcclHistoryRecord_t {
            number: record.number,
            epoch: record.epoch,
            began_ns_ago: record.began_ns_ago,
            took_ns: record.took_ns.unwrap_or(u64::MAX),
            peer: record.peer.map_or(-1, |peer| peer as i32),
            is_wait: record.is_wait.into(),
            failed: record.failed.into(),
            reserved: 0,
            operation,
        }
    }
}

/// Writes the last operations of a rank of this node, also after its death, to records, at most capacity of them, the oldest
/// first, and how many to *count: calls that all ranks make together, and waits that went to sleep; a rank remembers 64. Of a
/// rank of another node there are none. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommGetHistory(
    comm: xcclComm_t,
    rank: c_int,
    records: *mut xcclHistoryRecord_t,
    capacity: usize,
    count: *mut usize,
) -> xcclResult_t {
    guard("xcclCommGetHistory", || {
        // SAFETY: C's promise about its pointers.
        let (records, out) = unsafe { (slice_mut(records, capacity, "records")?, Out::new(count, "count")?) };
        let rank = rank_of(rank)?;
        // SAFETY: C's promise about its handles.
        let history = unsafe { with(comm, |live| Ok(live.comm.history(rank)?)) }?;
        let skipped = history.len().saturating_sub(capacity);
        let written = history.len() - skipped;
        for (to, record) in records.iter_mut().zip(history.into_iter().skip(skipped)) {
            *to = record.into();
        }
        out.set(written);
        Ok(())
    })
}

/// Writes what this rank sees of all ranks to text: a line for each, with what it does, whom it waits for and since when, and a
/// sentence that says what holds them up. It ends with a zero. *length is the length without it; where that is capacity or
/// more, the text is cut and the call returns xcclTruncated. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommGetStatusText(
    comm: xcclComm_t,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> xcclResult_t {
    guard("xcclCommGetStatusText", || {
        // SAFETY: C's promise about its pointers.
        let (text, out) = unsafe { (slice_mut(text, capacity, "text")?, Out::new(length, "length")?) };
        // SAFETY: C's promise about its handles.
        let seen = unsafe { with(comm, |live| Ok(live.comm.snapshot())) }?;
        let found = format!("{seen}{}\n", seen.diagnosis());
        out.set(found.len());
        let Some((end, room)) = text.split_last_mut() else {
            return Err(Failure::truncated(format!("capacity is 0: the text has {} bytes and a zero", found.len())));
        };
        for (to, byte) in room.iter_mut().zip(found.bytes().chain(std::iter::once(0))) {
            *to = byte as c_char;
        }
        *end = 0;
        if found.len() > room.len() {
            let needed = found.len() + 1;
            return Err(Failure::truncated(format!("capacity is {capacity}: the text needs {needed} bytes")));
        }
        Ok(())
    })
}

/// Asks whether a rank can be reached, and writes the nanoseconds that it took to answer to *time. A saturated link is late, a
/// broken one never answers (xcclTimeout, or xcclRemoteError where the rank is known to be gone). A rank of this node is only
/// looked at. Blocks, for within_ms milliseconds at most.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommProbe(comm: xcclComm_t, rank: c_int, within_ms: i64, time: *mut u64) -> xcclResult_t {
    guard("xcclCommProbe", || {
        // SAFETY: C's promise about its pointers.
        let out = unsafe { Out::new(time, "time") }?;
        let rank = rank_of(rank)?;
        let within = u64::try_from(within_ms)
            .map_err(|_| Failure::argument(format!("within_ms is {within_ms}: expected milliseconds")))?;
        // SAFETY: C's promise about its handles.
        let took = unsafe { with(comm, |live| Ok(live.comm.probe(rank, Duration::from_millis(within))?)) }?;
        out.set(took.as_nanos() as u64);
        Ok(())
    })
}

fn rank_of(rank: c_int) -> Outcome<usize> {
    natural(rank, "rank", format_args!("a rank"))
}
