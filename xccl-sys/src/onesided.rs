//! One-sided access: shared memory, puts, gets, signals, atomics.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use xccl::{Remote, SharedBuffer, Source, Until, Update};

use crate::boundary::{Failure, Out, Outcome, guard, natural, slice, slice_mut};
use crate::comm::{Live, with, xcclComm_t};
use crate::p2p::source_of;
use crate::result::xcclResult_t;

/// A piece of a rank's shared memory, by numbers that mean the same on every rank: it may be sent in a message. Made by
/// xcclSharedRemote on the rank that has the memory. Pieces of it are made by arithmetic; what they name is checked when they are
/// used.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclRemote_t {
    /// The rank.
    pub rank: u64,
    /// Where it begins, in bytes from the beginning of the rank's heap.
    pub offset: u64,
    /// Its bytes.
    pub bytes: u64,
}

/** How a signal changes its word. The numbers are fixed. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclUpdate_t {
    /// The word becomes the value.
    xcclUpdateSet = 0,
    /// The value is added to the word; past the largest number it goes on from 0.
    xcclUpdateAdd = 1,
}

/** What a word is compared with a value for, as unsigned numbers. The numbers are fixed. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclUntil_t {
    /// Equal.
    xcclUntilEq = 0,
    /// Different.
    xcclUntilNe = 1,
    /// Greater.
    xcclUntilGt = 2,
    /// Greater or equal.
    xcclUntilGe = 3,
    /// Less.
    xcclUntilLt = 4,
    /// Less or equal.
    xcclUntilLe = 5,
}

fn remote(from: xcclRemote_t) -> Remote {
    let number = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    Remote { rank: number(from.rank), offset: number(from.offset), bytes: number(from.bytes) }
}

fn update(op: u32, value: u64) -> Outcome<Update> {
    match op {
        o if o == xcclUpdate_t::xcclUpdateSet as u32 => Ok(Update::Set(value)),
        o if o == xcclUpdate_t::xcclUpdateAdd as u32 => Ok(Update::Add(value)),
        other => Err(Failure::argument(format!("op is {other}: expected xcclUpdateSet (0) or xcclUpdateAdd (1)"))),
    }
}

fn until(op: u32, value: u64) -> Outcome<Until> {
    let all =
        [Until::Eq(value), Until::Ne(value), Until::Gt(value), Until::Ge(value), Until::Lt(value), Until::Le(value)];
    let found = usize::try_from(op).ok().and_then(|op| all.get(op).copied());
    found.ok_or_else(|| Failure::argument(format!("until is {op}: expected an xcclUntil_t, 0 to 5")))
}

/// The shared block that has `bytes` bytes at an address, and the address's offset in it.
pub(crate) fn block_at(
    live: &Live,
    at: *const c_void,
    bytes: usize,
    name: &str,
) -> Outcome<(Arc<SharedBuffer>, usize)> {
    let found = live.shared().range(..=at.addr()).next_back().map(|(&start, block)| (block.clone(), at.addr() - start));
    let found = found.filter(|(block, offset)| *offset <= block.len() && bytes <= block.len() - offset);
    found.ok_or_else(|| {
        let what = "are not in a block that xcclSharedAlloc has given for this communicator";
        Failure::argument(format!("{bytes} bytes at {name} ({at:p}) {what}"))
    })
}

/// Allocates bytes bytes (at least 1) of this rank that every rank of comm may read and write by the calls below, and writes
/// their address, a multiple of 256, to *ptr. The memory is the communicator's: it is given back by xcclSharedFree or
/// xcclCommDestroy. Any contents. It comes from the upper end of the symmetric heap; what was shared once stays so, so that
/// a late put never reaches memory of xcclMemAlloc. Ranks that allocate the same blocks in the same order have them at the
/// same offsets. xcclOutOfMemory when the heap (XCCL_HEAP, or heap_bytes) is full. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclSharedAlloc(ptr: *mut *mut c_void, bytes: usize, comm: xcclComm_t) -> xcclResult_t {
    guard("xcclSharedAlloc", || {
        // SAFETY: C's promise about its pointers.
        let out = unsafe { Out::new(ptr, "ptr") }?;
        if bytes == 0 {
            return Err(Failure::argument("bytes is 0: expected at least 1"));
        }
        // SAFETY: C's promise about its handles.
        let at = unsafe {
            with(comm, |live| {
                let block = live.comm.shared_alloc(bytes)?;
                let at = block.as_ptr();
                live.shared().insert(at.expose_provenance(), Arc::new(block));
                Ok(at)
            })
        }?;
        out.set(at.cast());
        Ok(())
    })
}

/// Gives back what xcclSharedAlloc has allocated from the same communicator; the pool of a receiver of KV pages stays until
/// that is destroyed. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclSharedFree(ptr: *mut c_void, comm: xcclComm_t) -> xcclResult_t {
    guard("xcclSharedFree", || {
        // SAFETY: C's promise about its handles.
        unsafe {
            with(comm, |live| match live.shared().remove(&ptr.addr()) {
                Some(_) => Ok(()),
                None => Err(Failure::argument(format!(
                    "ptr ({ptr:p}) is not from xcclSharedAlloc with this communicator, or was freed"
                ))),
            })
        }
    })
}

/// Writes to *remote how other ranks name the bytes bytes at ptr, which lie in a block of xcclSharedAlloc. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclSharedRemote(
    ptr: *const c_void,
    bytes: usize,
    remote: *mut xcclRemote_t,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclSharedRemote", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, piece) = unsafe {
            let out = Out::new(remote, "remote")?;
            let piece = with(comm, |live| {
                let (block, offset) = block_at(live, ptr, bytes, "ptr")?;
                Ok(block.remote().skip(offset).first(bytes))
            });
            (out, piece?)
        };
        out.set(xcclRemote_t { rank: piece.rank as u64, offset: piece.offset as u64, bytes: piece.bytes as u64 });
        Ok(())
    })
}

/// Writes the bytes bytes at data (may be null when bytes is 0) to the beginning of a piece of a rank's shared memory. Returns
/// when data may be reused. They arrive in any order with other puts: see xcclPutSignal, xcclFence, xcclQuiet, which are as
/// in OpenSHMEM. Bytes that a rank reads meanwhile are old or new. Blocks only for room towards another machine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclPut(
    data: *const c_void,
    bytes: usize,
    to: xcclRemote_t,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclPut", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe { with(comm, |live| Ok(live.comm.put(remote(to), slice(data.cast::<u8>(), bytes, "data")?)?)) }
    })
}

/// Copies the first bytes bytes of a piece of a rank's shared memory to buffer (may be null when bytes is 0). Blocks only until
/// they have come from another machine, up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclGet(
    buffer: *mut c_void,
    bytes: usize,
    from: xcclRemote_t,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclGet", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe { with(comm, |live| Ok(live.comm.get(remote(from), slice_mut(buffer.cast::<u8>(), bytes, "buffer")?)?)) }
    })
}

/// As xcclPut; then changes a word of the same rank, the first 8 bytes of word, at a multiple of 8: op is an xcclUpdate_t.
/// Whoever sees the change sees the data; who waits for it is woken. Blocks as xcclPut does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclPutSignal(
    data: *const c_void,
    bytes: usize,
    to: xcclRemote_t,
    word: xcclRemote_t,
    op: u32,
    value: u64,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclPutSignal", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with(comm, |live| {
                let data = slice(data.cast::<u8>(), bytes, "data")?;
                Ok(live.comm.put_signal(remote(to), data, remote(word), update(op, value)?)?)
            })
        }
    })
}

/// Changes a word without data, and wakes who waits for it: op is an xcclUpdate_t. Atomic with all other changes of words. After
/// xcclFence it says that all puts before have arrived. Blocks as xcclPut does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclSignal(word: xcclRemote_t, op: u32, value: u64, comm: xcclComm_t) -> xcclResult_t {
    guard("xcclSignal", || {
        // SAFETY: C's promise about its handles.
        unsafe { with(comm, |live| Ok(live.comm.signal(remote(word), update(op, value)?)?)) }
    })
}

/// Writes the value of a word in a shared block of this rank to *value. What was put before the signal that made it so is
/// visible. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclSignalFetch(word: *const u64, value: *mut u64, comm: xcclComm_t) -> xcclResult_t {
    guard("xcclSignalFetch", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, found) = unsafe {
            let out = Out::new(value, "value")?;
            let found = with(comm, |live| {
                let (block, offset) = block_at(live, word.cast(), 8, "word")?;
                Ok(block.signal_fetch(offset)?)
            });
            (out, found?)
        };
        out.set(found);
        Ok(())
    })
}

/// Waits until a word in a shared block of this rank compares with value as until (an xcclUntil_t) says, and writes what it is
/// to *found unless found is null. source is the rank that will make it so, or XCCL_ANY_SOURCE: it alone wakes this rank at
/// once, and its end ends the wait. What was put before that signal is visible. Blocks up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclSignalWait(
    word: *const u64,
    until: u32,
    value: u64,
    source: c_int,
    found: *mut u64,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclSignalWait", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = if found.is_null() { None } else { Some(Out::new(found, "found")?) };
            let until = self::until(until, value)?;
            let found = with(comm, |live| {
                let source: Source = source_of(&live.comm, source)?;
                let (block, offset) = block_at(live, word.cast(), 8, "word")?;
                Ok(block.signal_wait(source, offset, until)?)
            })?;
            if let Some(out) = out {
                out.set(found);
            }
            Ok(())
        }
    })
}

/// # Safety
/// As for the entry points.
unsafe fn atomic(
    value: *mut u64,
    name: &str,
    comm: xcclComm_t,
    body: impl FnOnce(&xccl::Communicator) -> xccl::Result<u64>,
) -> Outcome {
    // SAFETY: the caller's promise.
    let (out, before) = unsafe { (Out::new(value, name)?, with(comm, |live| Ok(body(&live.comm)?))?) };
    out.set(before);
    Ok(())
}

/// Writes the value of a word of a rank's shared memory to *value. Blocks only until it has come from another machine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclAtomicFetch(word: xcclRemote_t, value: *mut u64, comm: xcclComm_t) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles.
    guard("xcclAtomicFetch", || unsafe { atomic(value, "value", comm, |comm| comm.atomic_fetch(remote(word))) })
}

/// Sets a word and writes its value before to *before. Blocks as xcclAtomicFetch does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclAtomicSwap(
    word: xcclRemote_t,
    value: u64,
    before: *mut u64,
    comm: xcclComm_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers and handles.
    guard("xcclAtomicSwap", || unsafe { atomic(before, "before", comm, |comm| comm.atomic_swap(remote(word), value)) })
}

/// Adds to a word and writes its value before to *before; past the largest number it goes on from 0. Blocks as xcclAtomicFetch
/// does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclAtomicFetchAdd(
    word: xcclRemote_t,
    value: u64,
    before: *mut u64,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclAtomicFetchAdd", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe { atomic(before, "before", comm, |comm| comm.atomic_fetch_add(remote(word), value)) }
    })
}

/// Sets a word to value if it is expected, and writes its value before to *before, either way. Blocks as xcclAtomicFetch does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclAtomicCompareSwap(
    word: xcclRemote_t,
    expected: u64,
    value: u64,
    before: *mut u64,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclAtomicCompareSwap", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe { atomic(before, "before", comm, |comm| comm.atomic_compare_swap(remote(word), expected, value)) }
    })
}

/// Puts, signals and atomics of this rank at rank after this call arrive there after those before it. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclFence(rank: c_int, comm: xcclComm_t) -> xcclResult_t {
    guard("xcclFence", || {
        // SAFETY: C's promise about its handles.
        unsafe {
            with(comm, |live| {
                let expected = format_args!("a rank, 0 to {}", live.comm.world_size() - 1);
                Ok(live.comm.fence(natural(rank, "rank", expected)?)?)
            })
        }
    })
}

/// Returns when all that this rank has put, signalled and changed is visible to every rank. Blocks only for other machines, up
/// to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclQuiet(comm: xcclComm_t) -> xcclResult_t {
    guard("xcclQuiet", || {
        // SAFETY: C's promise about its handles.
        unsafe { with(comm, |live| Ok(live.comm.quiet()?)) }
    })
}
