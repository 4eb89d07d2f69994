//! Communicators.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_char, c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};

use xccl::{Communicator, HeapBuffer, SharedBuffer, UniqueId};

use crate::boundary::{Failure, Out, Outcome, SizedOut, guard, natural, text};
use crate::config::{config_of, xcclConfig_t};
use crate::handle::{self, Handle, Magic};
use crate::p2p::Requests;
use crate::result::xcclResult_t;

/// This header's version: major * 10000 + minor * 100 + patch. xcclGetVersion gives the library's.
pub const XCCL_VERSION: c_int = 100;

/// The color of a rank that is in none of the communicators of an xcclCommSplit.
pub const XCCL_SPLIT_NOCOLOR: c_int = -1;

/// Bytes of a unique id.
pub const XCCL_UNIQUE_ID_BYTES: usize = 128;

const fn number(text: &str) -> c_int {
    match c_int::from_str_radix(text, 10) {
        Ok(number) => number,
        Err(_) => panic!("a part of the version is not a number"),
    }
}

const _: () = assert!(
    XCCL_VERSION
        == number(env!("CARGO_PKG_VERSION_MAJOR")) * 10_000
            + number(env!("CARGO_PKG_VERSION_MINOR")) * 100
            + number(env!("CARGO_PKG_VERSION_PATCH"))
);
const _: () = assert!(XCCL_UNIQUE_ID_BYTES == UniqueId::LEN);

/// Names a communicator that is about to be built, and holds its secret. Good for one communicator. One rank makes it
/// (xcclGetUniqueId) and hands the bytes to the others by any means it likes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct xcclUniqueId {
    /// The bytes.
    pub internal: [c_char; XCCL_UNIQUE_ID_BYTES],
}

/// What a communicator handle points to.
// Spelt so that cbindgen does not see it: the header shows an opaque struct.
#[cfg_attr(all(), repr(C))]
pub struct xcclComm {
    magic: Magic,
    // Read while a call runs, so that several may; written by destroy alone, which does not wait for it.
    inner: RwLock<Option<Live>>,
}

/// A communicator, with what C has of it.
pub(crate) struct Live {
    pub(crate) comm: Communicator,
    requests: Mutex<Requests>,
    /// By address.
    blocks: Mutex<HashMap<usize, HeapBuffer>>,
    /// By address, to find the one that an address lies in.
    shared: Mutex<BTreeMap<usize, Arc<SharedBuffer>>>,
}

impl Live {
    pub(crate) fn requests(&self) -> MutexGuard<'_, Requests> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn shared(&self) -> MutexGuard<'_, BTreeMap<usize, Arc<SharedBuffer>>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blocks(&self) -> MutexGuard<'_, HashMap<usize, HeapBuffer>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A group of ranks. Made by xcclCommInitRank or xcclCommInitFromEnv, owned by the caller, given back to xcclCommDestroy.
/// Several threads may use it at once; calls that all ranks make together must come in the same order everywhere.
pub type xcclComm_t = *mut xcclComm;

impl Handle for xcclComm {
    const MAGIC: u64 = u64::from_be_bytes(*b"XCCLcomm");
    const KIND: &'static str = "a communicator";

    fn magic(&self) -> &Magic {
        &self.magic
    }
}

/// Calls `body` with the communicator behind a handle.
///
/// # Safety
/// As for [`handle::shell`].
pub(crate) unsafe fn with<T>(comm: xcclComm_t, body: impl FnOnce(&Live) -> Outcome<T>) -> Outcome<T> {
    // SAFETY: the caller's promise.
    let shell = unsafe { handle::shell(comm, "comm") }?;
    let inner = shell.inner.read().unwrap_or_else(PoisonError::into_inner);
    body(inner.as_ref().ok_or_else(|| handle::destroyed::<xcclComm>("comm"))?)
}

fn hand_out(comm: Communicator) -> xcclComm_t {
    let live = Live { comm, requests: Mutex::default(), blocks: Mutex::default(), shared: Mutex::default() };
    handle::hand_out(xcclComm { magic: Magic::of::<xcclComm>(), inner: RwLock::new(Some(live)) })
}

/// Writes the library's version to *version: major * 10000 + minor * 100 + patch. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclGetVersion(version: *mut c_int) -> xcclResult_t {
    guard("xcclGetVersion", || {
        // SAFETY: C's promise about its pointers.
        unsafe { Out::new(version, "version") }?.set(XCCL_VERSION);
        Ok(())
    })
}

/// Makes a new id in *id. Call it on one rank and hand the bytes to the others. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclGetUniqueId(id: *mut xcclUniqueId) -> xcclResult_t {
    guard("xcclGetUniqueId", || {
        // SAFETY: C's promise about its pointers.
        let out = unsafe { Out::new(id, "id") }?;
        out.set(xcclUniqueId { internal: UniqueId::new()?.as_bytes().map(|byte| byte as c_char) });
        Ok(())
    })
}

/// Makes a new id in *id for ranks on any hosts, whose rank 0 waits for the others at `address`: one of its own host's and a
/// port, such as "10.0.0.1:29500" or "[2001:db8::1]:29500"; no names. With port 0 a free one is taken at once, and the process
/// that makes the id must be the one that joins as rank 0. Call it on one rank and hand the bytes to the others. Does not
/// block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclGetUniqueIdAt(id: *mut xcclUniqueId, address: *const c_char) -> xcclResult_t {
    guard("xcclGetUniqueIdAt", || {
        // SAFETY: C's promise about its pointers.
        let out = unsafe { Out::new(id, "id") }?;
        // SAFETY: as above.
        let text = unsafe { text(address, "address") }?.to_string_lossy();
        let expected = "expected an IP address and a port, such as 10.0.0.1:29500 or [2001:db8::1]:29500";
        let address = text.parse().map_err(|_| Failure::argument(format!("address is {text:?}: {expected}")))?;
        out.set(xcclUniqueId { internal: UniqueId::new_at(address)?.as_bytes().map(|byte| byte as c_char) });
        Ok(())
    })
}

/// Joins the communicator of the nranks ranks that share id, as rank `rank` (0 to nranks - 1), and writes its handle to
/// *comm; *comm is left as it is on failure. Options come from the XCCL_... environment variables. Blocks until all ranks
/// have joined or the deadline has passed (xcclJoinFailed names the rank that is missing, claimed twice, or differs).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommInitRank(
    comm: *mut xcclComm_t,
    nranks: c_int,
    id: xcclUniqueId,
    rank: c_int,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers.
    guard("xcclCommInitRank", || unsafe { init_rank(comm, nranks, id, rank, std::ptr::null()) })
}

/// As xcclCommInitRank, with options of the application's: those of *config that are not XCCL_UNDEFINED win over the
/// environment. config may be null. Every rank must give the same. Blocks as xcclCommInitRank does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommInitRankConfig(
    comm: *mut xcclComm_t,
    nranks: c_int,
    id: xcclUniqueId,
    rank: c_int,
    config: *const xcclConfig_t,
) -> xcclResult_t {
    // SAFETY: C's promise about its pointers.
    guard("xcclCommInitRankConfig", || unsafe { init_rank(comm, nranks, id, rank, config) })
}

/// # Safety
/// C's promise about its pointers.
unsafe fn init_rank(
    comm: *mut xcclComm_t,
    nranks: c_int,
    id: xcclUniqueId,
    rank: c_int,
    config: *const xcclConfig_t,
) -> Outcome {
    // SAFETY: the caller's promise.
    let (out, config) = unsafe { (Out::new(comm, "comm")?, config_of(config)?) };
    if nranks < 1 {
        return Err(Failure::argument(format!("nranks is {nranks}: expected at least 1")));
    }
    let nranks = natural(nranks, "nranks", format_args!("at least 1"))?;
    let rank = natural(rank, "rank", format_args!("0 to {}", nranks - 1))?;
    let id = UniqueId::from_bytes(&id.internal.map(|byte| byte as u8))?;
    out.set(hand_out(Communicator::init(rank, nranks, &id, config)?));
    Ok(())
}

/// Joins the communicator of all ranks that a launcher has started (xccl run, torchrun, mpirun, srun, or XCCL_RANK,
/// XCCL_WORLD_SIZE and XCCL_JOB set by hand) and writes its handle to *comm; *comm is left as it is on failure. The n-th
/// call of this process meets the other ranks' n-th. config may be null, or gives options as for xcclCommInitRankConfig.
/// Blocks as xcclCommInitRank does; xcclNotLaunched without a launcher.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommInitFromEnv(comm: *mut xcclComm_t, config: *const xcclConfig_t) -> xcclResult_t {
    guard("xcclCommInitFromEnv", || {
        // SAFETY: C's promise about its pointers.
        let (out, config) = unsafe { (Out::new(comm, "comm")?, config_of(config)?) };
        out.set(hand_out(Communicator::from_env_with(config)?));
        Ok(())
    })
}

/// Divides the ranks of comm by color (0 or more): in each new communicator they are ordered by key, then by rank in comm. A
/// rank that passes XCCL_SPLIT_NOCOLOR takes part and gets null. Every rank must call it. Options are comm's. Blocks until
/// all have called it, up to the deadline. The new communicator is independent of comm and destroyed on its own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommSplit(
    comm: xcclComm_t,
    color: c_int,
    key: c_int,
    newcomm: *mut xcclComm_t,
) -> xcclResult_t {
    guard("xcclCommSplit", || {
        // SAFETY: C's promise about its pointers.
        let out = unsafe { Out::new(newcomm, "newcomm") }?;
        let color = match color {
            XCCL_SPLIT_NOCOLOR => None,
            _ => Some(natural(color, "color", format_args!("0 or more, or XCCL_SPLIT_NOCOLOR (-1)"))? as u32),
        };
        // SAFETY: C's promise about its handles.
        let made = unsafe { with(comm, |live| Ok(live.comm.split(color, key)?)) }?;
        out.set(made.map_or(std::ptr::null_mut(), hand_out));
        Ok(())
    })
}

/// Makes another communicator of the same ranks, whose messages and exchanges never meet comm's, and writes its handle to
/// *newcomm. Every rank must call it. Options are comm's. Blocks until all have called it, up to the deadline. The new
/// communicator is independent of comm and destroyed on its own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommDuplicate(comm: xcclComm_t, newcomm: *mut xcclComm_t) -> xcclResult_t {
    guard("xcclCommDuplicate", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, made) = unsafe { (Out::new(newcomm, "newcomm")?, with(comm, |live| Ok(live.comm.duplicate()?))?) };
        out.set(hand_out(made));
        Ok(())
    })
}

/// Leaves the communicator and gives the handle up: any further use of it is xcclInvalidArgument. Does not block; ranks may
/// leave in any order, and what this rank has sent can still be received. Its requests are cancelled and its memory
/// (xcclMemAlloc) is freed; MoE handles made from it stay good.
/// xcclInvalidUsage while another thread is in a call with it: the handle is then still good.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommDestroy(comm: xcclComm_t) -> xcclResult_t {
    guard("xcclCommDestroy", || {
        // SAFETY: C's promise about its handles.
        let shell = unsafe { handle::shell(comm, "comm") }?;
        let mut inner = match shell.inner.try_write() {
            Ok(inner) => inner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::usage(
                    "another thread is in a call with comm: wait for it, or call xcclCommAbort",
                ));
            }
        };
        let live = inner.take().ok_or_else(|| handle::destroyed::<xcclComm>("comm"))?;
        shell.magic().clear();
        drop(live);
        Ok(())
    })
}

/// Ends every pending and later wait of every rank with xcclAborted. Does not block and may be called while another thread
/// is in a call. The handle is still to be destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommAbort(comm: xcclComm_t) -> xcclResult_t {
    guard("xcclCommAbort", || {
        // SAFETY: C's promise about its handles.
        unsafe {
            with(comm, |live| {
                live.comm.abort();
                Ok(())
            })
        }
    })
}

/// As xcclCommAbort, with a number and a reason that every rank finds in the text of its error: up to 112 bytes of it. why may be
/// null. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommAbortWith(comm: xcclComm_t, code: c_int, why: *const c_char) -> xcclResult_t {
    guard("xcclCommAbortWith", || {
        let why = match why.is_null() {
            true => String::new(),
            // SAFETY: C's promise about its pointers.
            false => unsafe { text(why, "why") }?.to_string_lossy().into_owned(),
        };
        // SAFETY: C's promise about its handles.
        unsafe {
            with(comm, |live| {
                live.comm.abort_with(code, &why);
                Ok(())
            })
        }
    })
}

/// Makes a communicator of the ranks that are left after others have died or left, in the order of their ranks in comm, and writes
/// its handle to *newcomm; *newcomm is left as it is on failure. Ends comm as xcclCommAbort does. Every rank that lives must call it,
/// and all get the same members, although ranks die meanwhile, rank 0 too. Blocks until all that live have called it, up to the
/// deadline (xcclTimeout, and xcclRemoteError where another rank has met its own). comm is still to be destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommShrink(comm: xcclComm_t, newcomm: *mut xcclComm_t) -> xcclResult_t {
    guard("xcclCommShrink", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, made) = unsafe { (Out::new(newcomm, "newcomm")?, with(comm, |live| Ok(live.comm.shrink()?))?) };
        out.set(hand_out(made));
        Ok(())
    })
}

/// As xcclCommShrink, to run an iteration again: `finished` is the last one that this rank has finished, in numbers of the
/// application's, and *agreed becomes the smallest of all. What was under way in comm is forgotten, and cannot be met in *newcomm.
/// Ranks that wait are told to call it too by xcclAborted, whose text says that comm rolls back. Blocks as xcclCommShrink does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommRollback(
    comm: xcclComm_t,
    finished: u64,
    newcomm: *mut xcclComm_t,
    agreed: *mut u64,
) -> xcclResult_t {
    guard("xcclCommRollback", || {
        // SAFETY: C's promise about its pointers.
        let (out, number) = unsafe { (Out::new(newcomm, "newcomm")?, Out::new(agreed, "agreed")?) };
        // SAFETY: C's promise about its handles.
        let (made, all) = unsafe { with(comm, |live| Ok(live.comm.rollback(finished)?)) }?;
        out.set(hand_out(made));
        number.set(all);
        Ok(())
    })
}

/// Makes an id on rank 0 and writes it to *id on every rank, for a communicator of comm's ranks and others to come, to whom the
/// application hands it: then comm's ranks call xcclCommInitRank with their ranks and the new nranks, the others with the ranks from
/// there on. Every rank must call it. Blocks until all have called it, up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommGetNewId(comm: xcclComm_t, id: *mut xcclUniqueId) -> xcclResult_t {
    guard("xcclCommGetNewId", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, made) = unsafe { (Out::new(id, "id")?, with(comm, |live| Ok(live.comm.new_id()?))?) };
        out.set(xcclUniqueId { internal: made.as_bytes().map(|byte| byte as c_char) });
        Ok(())
    })
}

/// Writes to *former the rank that `rank` had in the communicator that comm was made from by xcclCommShrink or xcclCommRollback; rank
/// itself in any other. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommFormerRank(comm: xcclComm_t, rank: c_int, former: *mut c_int) -> xcclResult_t {
    guard("xcclCommFormerRank", || {
        // SAFETY: C's promise about its pointers.
        let out = unsafe { Out::new(former, "former") }?;
        // SAFETY: C's promise about its handles.
        let found = unsafe {
            with(comm, |live| {
                let ranks = live.comm.former_ranks();
                let rank = natural(rank, "rank", format_args!("0 to {}", ranks.len() - 1))?;
                let invalid = || Failure::argument(format!("rank is {rank}: expected 0 to {}", ranks.len() - 1));
                ranks.get(rank).copied().ok_or_else(invalid)
            })
        }?;
        out.set(found as c_int);
        Ok(())
    })
}

/// Writes this process's rank, 0 to nranks - 1, to *rank. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommUserRank(comm: xcclComm_t, rank: *mut c_int) -> xcclResult_t {
    guard("xcclCommUserRank", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, value) = unsafe { (Out::new(rank, "rank")?, with(comm, |live| Ok(live.comm.rank()))?) };
        out.set(value as c_int);
        Ok(())
    })
}

/// Writes the number of ranks to *count. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommCount(comm: xcclComm_t, count: *mut c_int) -> xcclResult_t {
    guard("xcclCommCount", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, value) = unsafe { (Out::new(count, "count")?, with(comm, |live| Ok(live.comm.world_size()))?) };
        out.set(value as c_int);
        Ok(())
    })
}

/// Returns once every rank has called it. Blocks, up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclBarrier(comm: xcclComm_t) -> xcclResult_t {
    guard("xcclBarrier", || {
        // SAFETY: C's promise about its handles.
        unsafe { with(comm, |live| Ok(live.comm.barrier()?)) }
    })
}

/// Allocates bytes bytes (at least 1) on this rank's symmetric heap and writes their address, a multiple of 256, to *ptr.
/// A message that is sent from there is copied once, by its receiver. The memory is the communicator's: it is given back by
/// xcclMemFree or xcclCommDestroy. Any contents. xcclOutOfMemory when the heap (XCCL_HEAP, or heap_bytes) is full. Does not
/// block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMemAlloc(ptr: *mut *mut c_void, bytes: usize, comm: xcclComm_t) -> xcclResult_t {
    guard("xcclMemAlloc", || {
        // SAFETY: C's promise about its pointers.
        let out = unsafe { Out::new(ptr, "ptr") }?;
        if bytes == 0 {
            return Err(Failure::argument("bytes is 0: expected at least 1"));
        }
        // SAFETY: C's promise about its handles.
        let at = unsafe {
            with(comm, |live| {
                let mut block = live.comm.heap_alloc(bytes)?;
                let at = block.as_mut_ptr();
                live.blocks().insert(at.expose_provenance(), block);
                Ok(at)
            })
        }?;
        out.set(at.cast());
        Ok(())
    })
}

/// Gives back what xcclMemAlloc has allocated from the same communicator. No request may use it any more. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMemFree(ptr: *mut c_void, comm: xcclComm_t) -> xcclResult_t {
    guard("xcclMemFree", || {
        // SAFETY: C's promise about its handles.
        unsafe {
            with(comm, |live| match live.blocks().remove(&ptr.addr()) {
                Some(block) => {
                    drop(block);
                    Ok(())
                }
                None => Err(Failure::argument(format!(
                    "ptr ({ptr:p}) is not from xcclMemAlloc with this communicator, or was freed"
                ))),
            })
        }
    })
}

/// What this rank has done in a communicator so far. Set it to XCCL_STATISTICS_INITIALIZER.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct xcclStatistics_t {
    /// sizeof(xcclStatistics_t).
    pub size: usize,
    /// Messages sent.
    pub messages_sent: u64,
    /// Bytes in them.
    pub bytes_sent: u64,
    /// Messages received.
    pub messages_received: u64,
    /// Bytes in them.
    pub bytes_received: u64,
    /// Messages of these that the receiver copied straight from the sender's memory.
    pub rendezvous: u64,
    /// MoE exchanges completed.
    pub exchanges: u64,
    /// Tokens dispatched.
    pub tokens: u64,
    /// Waits that were not satisfied at once.
    pub waits: u64,
    /// Microseconds spent in them.
    pub waited_us: u64,
    /// Waits among them that went on to give the core away (sched_yield) before they ended.
    pub waits_yielded: u64,
    /// Waits among them that went to sleep.
    pub waits_slept: u64,
    /// Sleeping ranks that this one has woken.
    pub wake_ups: u64,
}

/// Writes this rank's counters to *statistics. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommGetStatistics(comm: xcclComm_t, statistics: *mut xcclStatistics_t) -> xcclResult_t {
    guard("xcclCommGetStatistics", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, found) =
            unsafe { (SizedOut::new(statistics, "statistics")?, with(comm, |live| Ok(live.comm.statistics()))?) };
        out.set(xcclStatistics_t {
            size: size_of::<xcclStatistics_t>(),
            messages_sent: found.messages_sent,
            bytes_sent: found.bytes_sent,
            messages_received: found.messages_received,
            bytes_received: found.bytes_received,
            rendezvous: found.rendezvous,
            exchanges: found.exchanges,
            tokens: found.tokens,
            waits: found.waits,
            waited_us: found.waited_us,
            waits_yielded: found.waits_yielded,
            waits_slept: found.waits_slept,
            wake_ups: found.wake_ups,
        });
        Ok(())
    })
}
