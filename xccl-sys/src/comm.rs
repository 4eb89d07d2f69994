//! Communicators.

use std::ffi::{c_char, c_int};
use std::sync::{PoisonError, RwLock, TryLockError};

use xccl::{Communicator, Config, UniqueId};

use crate::boundary::{Failure, Out, Outcome, guard, natural};
use crate::handle::{self, Handle, Magic};
use crate::result::xcclResult_t;

/// This header's version: major * 10000 + minor * 100 + patch. xcclGetVersion gives the library's.
pub const XCCL_VERSION: c_int = 100;

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
    inner: RwLock<Option<Communicator>>,
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
pub(crate) unsafe fn with<T>(comm: xcclComm_t, body: impl FnOnce(&Communicator) -> Outcome<T>) -> Outcome<T> {
    // SAFETY: the caller's promise.
    let shell = unsafe { handle::shell(comm, "comm") }?;
    let inner = shell.inner.read().unwrap_or_else(PoisonError::into_inner);
    body(inner.as_ref().ok_or_else(|| handle::destroyed::<xcclComm>("comm"))?)
}

fn hand_out(comm: Communicator) -> xcclComm_t {
    handle::hand_out(xcclComm { magic: Magic::of::<xcclComm>(), inner: RwLock::new(Some(comm)) })
}

/// Writes the library's version to *version: major * 10000 + minor * 100 + patch.
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
    guard("xcclCommInitRank", || {
        // SAFETY: C's promise about its pointers.
        let out = unsafe { Out::new(comm, "comm") }?;
        if nranks < 1 {
            return Err(Failure::argument(format!("nranks is {nranks}: expected at least 1")));
        }
        let nranks = natural(nranks, "nranks", "at least 1")?;
        let rank = natural(rank, "rank", &format!("0 to {}", nranks - 1))?;
        let id = UniqueId::from_bytes(&id.internal.map(|byte| byte as u8))?;
        out.set(hand_out(Communicator::init(rank, nranks, &id, Config::from_env()?)?));
        Ok(())
    })
}

/// Joins the communicator of all ranks that a launcher has started (xccl run, torchrun, mpirun, srun, or XCCL_RANK,
/// XCCL_WORLD_SIZE and XCCL_JOB set by hand) and writes its handle to *comm; *comm is left as it is on failure. The n-th
/// call of this process meets the other ranks' n-th. Blocks as xcclCommInitRank does; xcclNotLaunched without a launcher.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommInitFromEnv(comm: *mut xcclComm_t) -> xcclResult_t {
    guard("xcclCommInitFromEnv", || {
        // SAFETY: C's promise about its pointers.
        let out = unsafe { Out::new(comm, "comm") }?;
        out.set(hand_out(Communicator::from_env()?));
        Ok(())
    })
}

/// Leaves the communicator and gives the handle up: any further use of it is xcclInvalidArgument. Does not block; ranks may
/// leave in any order, and what this rank has sent can still be received. MoE handles made from it stay good.
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
        let comm = inner.take().ok_or_else(|| handle::destroyed::<xcclComm>("comm"))?;
        shell.magic().clear();
        comm.destroy();
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
            with(comm, |comm| {
                comm.abort();
                Ok(())
            })
        }
    })
}

/// Writes this process's rank, 0 to nranks - 1, to *rank.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommUserRank(comm: xcclComm_t, rank: *mut c_int) -> xcclResult_t {
    guard("xcclCommUserRank", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, value) = unsafe { (Out::new(rank, "rank")?, with(comm, |comm| Ok(comm.rank()))?) };
        out.set(value as c_int);
        Ok(())
    })
}

/// Writes the number of ranks to *count.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclCommCount(comm: xcclComm_t, count: *mut c_int) -> xcclResult_t {
    guard("xcclCommCount", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, value) = unsafe { (Out::new(count, "count")?, with(comm, |comm| Ok(comm.world_size()))?) };
        out.set(value as c_int);
        Ok(())
    })
}

/// Returns once every rank has called it. Blocks, up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclBarrier(comm: xcclComm_t) -> xcclResult_t {
    guard("xcclBarrier", || {
        // SAFETY: C's promise about its handles.
        unsafe { with(comm, |comm| Ok(comm.barrier()?)) }
    })
}
