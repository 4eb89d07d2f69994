//! Point to point.

use std::ffi::{c_int, c_void};

use xccl::{Communicator, Error, RawCollective, RawRequest, Source, Status};

use crate::boundary::{Failure, Out, Outcome, guard, natural, slice, slice_mut};
use crate::comm::{Live, with, xcclComm_t};
use crate::result::xcclResult_t;

/// The source that stands for any rank.
pub const XCCL_ANY_SOURCE: c_int = -1;

/// What was received.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclStatus_t {
    /// The sender.
    pub source: c_int,
    /// The message's tag.
    pub tag: u32,
    /// Its length in bytes.
    pub bytes: usize,
}

/// Sends `bytes` bytes at data (may be null when bytes is 0) to rank peer, possibly this one. Messages of one sender with one
/// tag arrive in order. Returns when data may be reused: at once for what the sender's ring has room for, after the receiver
/// has copied it for longer messages. Messages to the own rank never block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclSend(
    data: *const c_void,
    bytes: usize,
    peer: c_int,
    tag: u32,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclSend", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with(comm, |live| {
                let data = slice(data.cast::<u8>(), bytes, "data")?;
                Ok(live.comm.send(destination(&live.comm, peer)?, tag, data)?)
            })
        }
    })
}

/// Receives the next message with this tag from rank source, or from any rank (XCCL_ANY_SOURCE), into the capacity bytes at
/// buffer (may be null when capacity is 0). Blocks until it is there, up to the deadline. Writes sender, tag and length to
/// *status unless status is null. xcclTruncated when the message is longer than capacity: *status is written all the same,
/// and the message is kept for a call with a larger buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclRecv(
    buffer: *mut c_void,
    capacity: usize,
    source: c_int,
    tag: u32,
    status: *mut xcclStatus_t,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclRecv", || {
        let status = match status.is_null() {
            true => None,
            // SAFETY: C's promise about its pointers.
            false => Some(unsafe { Out::new(status, "status") }?),
        };
        let report = |source: usize, tag: u32, bytes: usize| {
            if let Some(status) = status {
                status.set(xcclStatus_t { source: source as c_int, tag, bytes });
            }
        };
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with(comm, |live| {
                let buffer = slice_mut(buffer.cast::<u8>(), capacity, "buffer")?;
                let received = live.comm.recv(source_of(&live.comm, source)?, tag, buffer);
                match &received {
                    Ok(got) => report(got.source, got.tag, got.len),
                    Err(Error::Truncated { from, tag, len, .. }) => report(*from, *tag, *len),
                    Err(_) => {}
                }
                received?;
                Ok(())
            })
        }
    })
}

fn destination(comm: &Communicator, peer: c_int) -> Outcome<usize> {
    natural(peer, "peer", format_args!("a rank, 0 to {}", comm.world_size() - 1))
}

pub(crate) fn source_of(comm: &Communicator, source: c_int) -> Outcome<Source> {
    if source == XCCL_ANY_SOURCE {
        return Ok(Source::Any);
    }
    let most = comm.world_size() - 1;
    let rank = natural(source, "source", format_args!("a rank, 0 to {most}, or XCCL_ANY_SOURCE ({XCCL_ANY_SOURCE})"));
    Ok(Source::Rank(rank?))
}

/// A message or a collective on its way: made by xcclIsend, xcclIrecv, xcclIAllReduce and the like, over when xcclWait or
/// xcclTest says so, or with xcclRequestFree.
/// A number, never used again, so that a request that is over is recognised.
pub type xcclRequest_t = u64;

/// No request.
pub const XCCL_REQUEST_NULL: xcclRequest_t = 0;

/// A communicator's requests. A request's number is its place and how often that was used before.
#[derive(Default)]
pub(crate) struct Requests {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

struct Slot {
    uses: u32,
    request: Place,
}

/// What a request stands for.
pub(crate) enum Pending {
    Message(RawRequest),
    Collective(RawCollective),
}

impl From<RawRequest> for Pending {
    fn from(message: RawRequest) -> Self {
        Pending::Message(message)
    }
}

impl From<RawCollective> for Pending {
    fn from(collective: RawCollective) -> Self {
        Pending::Collective(collective)
    }
}

impl Pending {
    /// The status of a collective has nothing to say.
    fn wait(&mut self) -> xccl::Result<Status> {
        match self {
            Pending::Message(message) => message.wait(),
            Pending::Collective(collective) => collective.wait().map(|()| NO_STATUS),
        }
    }

    fn test(&mut self) -> xccl::Result<Option<Status>> {
        match self {
            Pending::Message(message) => message.test(),
            Pending::Collective(collective) => collective.test().map(|over| over.then_some(NO_STATUS)),
        }
    }
}

const NO_STATUS: Status = Status { source: 0, tag: 0, len: 0 };

enum Place {
    Empty,
    Here(Pending),
    /// A thread waits for it.
    Out,
}

impl Requests {
    pub(crate) fn add(&mut self, request: Pending) -> xcclRequest_t {
        let at = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { uses: 0, request: Place::Empty });
            self.slots.len() - 1
        });
        let slot = &mut self.slots[at];
        slot.request = Place::Here(request);
        (u64::from(slot.uses) << 32) | (at as u64 + 1)
    }

    fn slot(&mut self, request: xcclRequest_t) -> Outcome<(usize, &mut Slot)> {
        let at = (request & u64::from(u32::MAX)).checked_sub(1).map(|at| at as usize);
        let slot = at.and_then(|at| Some((at, self.slots.get_mut(at)?)));
        let slot = slot.filter(|(_, slot)| u64::from(slot.uses) == request >> 32);
        slot.filter(|(_, slot)| !matches!(slot.request, Place::Empty)).ok_or_else(|| {
            Failure::argument(format!("request ({request}) is not one of this communicator, or is over"))
        })
    }

    fn take(&mut self, request: xcclRequest_t) -> Outcome<Pending> {
        match std::mem::replace(&mut self.slot(request)?.1.request, Place::Out) {
            Place::Here(taken) => Ok(taken),
            _ => Err(Failure::usage(format!("another thread waits for request {request}"))),
        }
    }

    /// Puts back what [`take`](Self::take) gave, unless it is over.
    fn settle(&mut self, request: xcclRequest_t, taken: Pending, is_over: bool) {
        let Ok((_, slot)) = self.slot(request) else { return };
        if is_over {
            self.free(request);
        } else {
            slot.request = Place::Here(taken);
        }
    }

    /// Its number is never used again.
    fn free(&mut self, request: xcclRequest_t) {
        let Ok((at, slot)) = self.slot(request) else { return };
        slot.request = Place::Empty;
        slot.uses = slot.uses.wrapping_add(1);
        self.free.push(at);
    }
}

/// Starts to send, as xcclSend does, and writes a request to *request. data must stay as it is until the request is over.
/// Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclIsend(
    data: *const c_void,
    bytes: usize,
    peer: c_int,
    tag: u32,
    comm: xcclComm_t,
    request: *mut xcclRequest_t,
) -> xcclResult_t {
    guard("xcclIsend", || {
        // SAFETY: C's promise about its pointers and handles, and that `data` stays as it is.
        unsafe {
            let out = Out::new(request, "request")?;
            with(comm, |live| {
                let data = slice(data.cast::<u8>(), bytes, "data")?;
                let started = live.comm.isend_raw(destination(&live.comm, peer)?, tag, data)?;
                out.set(live.requests().add(started.into()));
                Ok(())
            })
        }
    })
}

/// Starts to receive, as xcclRecv does, and writes a request to *request. The capacity bytes at buffer must not be used until
/// the request is over. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclIrecv(
    buffer: *mut c_void,
    capacity: usize,
    source: c_int,
    tag: u32,
    comm: xcclComm_t,
    request: *mut xcclRequest_t,
) -> xcclResult_t {
    guard("xcclIrecv", || {
        // SAFETY: C's promise about its pointers and handles, and that `buffer` is left alone.
        unsafe {
            let out = Out::new(request, "request")?;
            with(comm, |live| {
                let buffer = slice_mut(buffer.cast::<u8>(), capacity, "buffer")?;
                let started = live.comm.irecv_raw(source_of(&live.comm, source)?, tag, buffer)?;
                out.set(live.requests().add(started.into()));
                Ok(())
            })
        }
    })
}

/// # Safety
/// C's promise about its pointers.
unsafe fn out_status(status: *mut xcclStatus_t) -> Outcome<Option<Out<xcclStatus_t>>> {
    // SAFETY: the caller's promise.
    if status.is_null() { Ok(None) } else { unsafe { Out::new(status, "status") }.map(Some) }
}

fn report(out: Option<Out<xcclStatus_t>>, status: Status) {
    if let Some(out) = out {
        out.set(xcclStatus_t { source: status.source as c_int, tag: status.tag, bytes: status.len });
    }
}

fn wait(live: &Live, request: xcclRequest_t, status: Option<Out<xcclStatus_t>>) -> Outcome {
    let mut taken = live.requests().take(request)?;
    let result = taken.wait();
    live.requests().settle(request, taken, !matches!(result, Err(Error::Timeout { .. })));
    report(status, result?);
    Ok(())
}

/// Waits until the request's buffer may be used again; writes to *status as xcclRecv does (for a send: the own rank, the tag
/// and the length; for a collective zeros) unless status is null. Blocks up to the deadline. The request is over then, but not after xcclTimeout. A
/// message that was too long for its buffer (xcclTruncated) is kept for another receive.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclWait(request: xcclRequest_t, status: *mut xcclStatus_t, comm: xcclComm_t) -> xcclResult_t {
    guard("xcclWait", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let status = out_status(status)?;
            with(comm, |live| wait(live, request, status))
        }
    })
}

/// Waits for the count requests at requests, in any order of completion, and writes to statuses[i] for requests[i] unless
/// statuses is null. On the first failure it returns: the requests after that one are not over. Blocks for each as xcclWait
/// does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclWaitAll(
    count: usize,
    requests: *const xcclRequest_t,
    statuses: *mut xcclStatus_t,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclWaitAll", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let requests = slice(requests, count, "requests")?;
            with(comm, |live| {
                for (i, &request) in requests.iter().enumerate() {
                    let status = if statuses.is_null() { statuses } else { statuses.wrapping_add(i) };
                    wait(live, request, out_status(status)?)
                        .map_err(|failure| failure.within(format_args!("requests[{i}]")))?;
                }
                Ok(())
            })
        }
    })
}

/// Writes 1 to *done when the request is over, and to *status as xcclWait does; 0 when it is not. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclTest(
    request: xcclRequest_t,
    done: *mut c_int,
    status: *mut xcclStatus_t,
    comm: xcclComm_t,
) -> xcclResult_t {
    guard("xcclTest", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let (done, status) = (Out::new(done, "done")?, out_status(status)?);
            with(comm, |live| {
                let mut taken = live.requests().take(request)?;
                let result = taken.test();
                live.requests().settle(request, taken, !matches!(result, Ok(None)));
                let result = result?;
                done.set(result.is_some().into());
                if let Some(got) = result {
                    report(status, got);
                }
                Ok(())
            })
        }
    })
}

/// Gives a request up: its buffer may be used again. A receive takes no message any more; a send whose beginning the receiver
/// may have seen is finished from a copy. Does not block for messages; a collective is waited for, up to the deadline: the other
/// ranks need this one's part.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclRequestFree(request: xcclRequest_t, comm: xcclComm_t) -> xcclResult_t {
    guard("xcclRequestFree", || {
        // SAFETY: C's promise about its handles.
        unsafe {
            with(comm, |live| {
                let taken = live.requests().take(request)?;
                // Nobody else may be kept waiting meanwhile.
                drop(taken);
                live.requests().free(request);
                Ok(())
            })
        }
    })
}
