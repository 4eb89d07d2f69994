//! KV pages from prefill to decode ranks.

use std::ffi::{c_int, c_void};
use std::sync::{Mutex, MutexGuard, TryLockError};

use xccl::{
    KvConfig, KvEvent, KvOutcome, KvPosted, KvReceiver, KvSender, KvSenderEvent, KvTicket, PageLayout, PagePair,
};

use crate::boundary::{Failure, Out, Outcome, SizedOut, guard, natural, sized, slice, slice_mut};
use crate::comm::{with, xcclComm_t};
use crate::handle::{self, Handle, Magic};
use crate::onesided::block_at;
use crate::result::{code_of, xcclResult_t};

/// The shape of what is moved. Equal on all ranks. Set it to XCCL_KV_CONFIG_INITIALIZER, then its fields.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclKvConfig_t {
    /// sizeof(xcclKvConfig_t).
    pub size: usize,
    /// Layers of the model. Where keys and values of a layer lie in two tensors, count each as a layer.
    pub layers: usize,
    /// Bytes of a page of one layer.
    pub page_bytes: usize,
    /// Most pages of one request; 0: 1024.
    pub max_pages: usize,
    /// Most requests in flight from one sender to one receiver, at most 256; 0: 16.
    pub max_requests: usize,
}

/// Where the pages of a pool lie: page p of layer l begins l * layer_stride + p * page_stride bytes behind its beginning. May
/// differ between ranks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclPageLayout_t {
    /// Pages of each layer.
    pub pages: usize,
    /// Bytes from a page to the same page of the next layer.
    pub layer_stride: usize,
    /// Bytes from a page to the next one of its layer.
    pub page_stride: usize,
}

/// A page to be copied.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclPagePair_t {
    /// The sender's page.
    pub source: u32,
    /// The receiver's page.
    pub destination: u32,
}

/// A request in flight. A number, never used again by its handle, so that a request that is over is recognised.
pub type xcclKvTicket_t = u64;

/// No request.
pub const XCCL_KV_TICKET_NULL: xcclKvTicket_t = 0;

/** What has happened to a request. The numbers are fixed. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclKvEventKind_t {
    /// Nothing that was not told yet.
    xcclKvNothing = 0,
    /// To a sender: a receiver waits for these pages.
    xcclKvPosted = 1,
    /// To a receiver: all pages have come; the request is over.
    xcclKvDone = 2,
    /// One of the two ranks has cancelled it; the request is over.
    xcclKvCancelled = 3,
    /// The other rank has died, left or misbehaved; the request is over.
    xcclKvFailed = 4,
    /// To a sender: a receiver will post nothing any more; no request.
    xcclKvGone = 5,
}

/// What has happened. Set it to XCCL_KV_EVENT_INITIALIZER.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclKvEvent_t {
    /// sizeof(xcclKvEvent_t).
    pub size: usize,
    /// The request.
    pub ticket: xcclKvTicket_t,
    /// Its id.
    pub id: u64,
    /// Number of its pages (xcclKvPosted).
    pub pages: usize,
    /// Bytes of the last page that are wanted (xcclKvPosted).
    pub last_page_bytes: usize,
    /// An xcclKvEventKind_t.
    pub kind: u32,
    /// The other rank.
    pub peer: c_int,
    /// An xcclResult_t: why it failed or has gone, otherwise xcclSuccess.
    pub result: u32,
}

const NOTHING: xcclKvEvent_t = xcclKvEvent_t {
    size: size_of::<xcclKvEvent_t>(),
    ticket: XCCL_KV_TICKET_NULL,
    id: 0,
    pages: 0,
    last_page_bytes: 0,
    kind: xcclKvEventKind_t::xcclKvNothing as u32,
    peer: -1,
    result: xcclResult_t::xcclSuccess as u32,
};

fn of_posted(kind: xcclKvEventKind_t, posted: KvPosted, result: xcclResult_t) -> xcclKvEvent_t {
    xcclKvEvent_t {
        ticket: posted.ticket.to_bits(),
        id: posted.id,
        pages: posted.pages,
        last_page_bytes: posted.last_page_bytes,
        kind: kind as u32,
        peer: posted.to as c_int,
        result: result as u32,
        ..NOTHING
    }
}

fn of_sender(event: KvSenderEvent) -> xcclKvEvent_t {
    use xcclKvEventKind_t::*;
    match event {
        KvSenderEvent::Posted(posted) => of_posted(xcclKvPosted, posted, xcclResult_t::xcclSuccess),
        KvSenderEvent::Cancelled(posted) => of_posted(xcclKvCancelled, posted, xcclResult_t::xcclSuccess),
        KvSenderEvent::Failed(posted, err) => of_posted(xcclKvFailed, posted, code_of(&err)),
        KvSenderEvent::Gone(to, err) => {
            xcclKvEvent_t { kind: xcclKvGone as u32, peer: to as c_int, result: code_of(&err) as u32, ..NOTHING }
        }
    }
}

fn of_receiver(event: KvEvent) -> xcclKvEvent_t {
    use xcclKvEventKind_t::*;
    let (kind, result) = match event.outcome {
        KvOutcome::Done => (xcclKvDone, xcclResult_t::xcclSuccess),
        KvOutcome::Cancelled => (xcclKvCancelled, xcclResult_t::xcclSuccess),
        KvOutcome::Failed(err) => (xcclKvFailed, code_of(&err)),
    };
    xcclKvEvent_t {
        ticket: event.ticket.to_bits(),
        id: event.id,
        kind: kind as u32,
        peer: event.from as c_int,
        result: result as u32,
        ..NOTHING
    }
}

/// What a sender's handle points to.
// Spelt so that cbindgen does not see it: the header shows an opaque struct.
#[cfg_attr(all(), repr(C))]
pub struct xcclKvSender {
    magic: Magic,
    inner: Mutex<Option<KvSender>>,
}

/// A rank's part in KV transfer: it sends pages. Made by xcclKvSenderCreate, owned by the caller, given back to
/// xcclKvSenderDestroy. One thread at a time may use it, not always the same.
pub type xcclKvSender_t = *mut xcclKvSender;

impl Handle for xcclKvSender {
    const MAGIC: u64 = u64::from_be_bytes(*b"XCCL kvs");
    const KIND: &'static str = "a sender of KV pages";

    fn magic(&self) -> &Magic {
        &self.magic
    }
}

/// What a receiver's handle points to.
#[cfg_attr(all(), repr(C))]
pub struct xcclKvReceiver {
    magic: Magic,
    inner: Mutex<Option<KvReceiver>>,
}

/// A rank's part in KV transfer: it receives pages. Made by xcclKvReceiverCreate, owned by the caller, given back to
/// xcclKvReceiverDestroy. One thread at a time may use it, not always the same.
pub type xcclKvReceiver_t = *mut xcclKvReceiver;

impl Handle for xcclKvReceiver {
    const MAGIC: u64 = u64::from_be_bytes(*b"XCCL kvr");
    const KIND: &'static str = "a receiver of KV pages";

    fn magic(&self) -> &Magic {
        &self.magic
    }
}

fn locked<'a, T>(inner: &'a Mutex<Option<T>>, name: &str) -> Outcome<MutexGuard<'a, Option<T>>> {
    match inner.try_lock() {
        Ok(inner) => Ok(inner),
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => {
            Err(Failure::usage(format!("another thread is in a call with {name}: one at a time may use it")))
        }
    }
}

/// Calls `body` with the sender behind a handle.
///
/// # Safety
/// As for [`handle::shell`].
unsafe fn with_sender<T>(sender: xcclKvSender_t, body: impl FnOnce(&mut KvSender) -> Outcome<T>) -> Outcome<T> {
    // SAFETY: the caller's promise.
    let shell = unsafe { handle::shell(sender, "sender") }?;
    let mut inner = locked(&shell.inner, "sender")?;
    body(inner.as_mut().ok_or_else(|| handle::destroyed::<xcclKvSender>("sender"))?)
}

/// Calls `body` with the receiver behind a handle.
///
/// # Safety
/// As for [`handle::shell`].
unsafe fn with_receiver<T>(receiver: xcclKvReceiver_t, body: impl FnOnce(&mut KvReceiver) -> Outcome<T>) -> Outcome<T> {
    // SAFETY: the caller's promise.
    let shell = unsafe { handle::shell(receiver, "receiver") }?;
    let mut inner = locked(&shell.inner, "receiver")?;
    body(inner.as_mut().ok_or_else(|| handle::destroyed::<xcclKvReceiver>("receiver"))?)
}

const NO_CONFIG: xcclKvConfig_t = xcclKvConfig_t { size: 0, layers: 0, page_bytes: 0, max_pages: 0, max_requests: 0 };

/// # Safety
/// C's promise about its pointers.
unsafe fn shape_of(config: *const xcclKvConfig_t, layout: *const xcclPageLayout_t) -> Outcome<(KvConfig, PageLayout)> {
    // SAFETY: the caller's promise; any bits are a configuration or a layout, to be checked.
    let (config, layouts) = unsafe { (sized(config, NO_CONFIG, "config")?, slice(layout, 1, "layout")?) };
    let mut made = KvConfig::new(config.layers, config.page_bytes);
    if config.max_pages > 0 {
        made = made.max_pages(config.max_pages);
    }
    if config.max_requests > 0 {
        made = made.max_requests(config.max_requests);
    }
    let xcclPageLayout_t { pages, layer_stride, page_stride } = layouts[0];
    Ok((made, PageLayout { pages, layer_stride, page_stride }))
}

/// Makes this rank a sender of KV pages, whose pages lie as *layout says in the memory that xcclKvPush is given, and writes its
/// handle to *sender; *sender is left as it is on failure. Every rank of comm must make a sender or a receiver at the same
/// time, with the same configuration (xcclJoinFailed on every rank otherwise). Blocks until all have.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvSenderCreate(
    sender: *mut xcclKvSender_t,
    comm: xcclComm_t,
    config: *const xcclKvConfig_t,
    layout: *const xcclPageLayout_t,
) -> xcclResult_t {
    guard("xcclKvSenderCreate", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, made) = unsafe {
            let out = Out::new(sender, "sender")?;
            let (config, layout) = shape_of(config, layout)?;
            (out, with(comm, |live| Ok(KvSender::new(&live.comm, config, layout)?))?)
        };
        out.set(handle::hand_out(xcclKvSender { magic: Magic::of::<xcclKvSender>(), inner: Mutex::new(Some(made)) }));
        Ok(())
    })
}

/// Gives the handle up: any further use of it is xcclInvalidArgument. Requests in flight are cancelled. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvSenderDestroy(sender: xcclKvSender_t) -> xcclResult_t {
    guard("xcclKvSenderDestroy", || {
        // SAFETY: C's promise about its handles.
        let shell = unsafe { handle::shell(sender, "sender") }?;
        let made = locked(&shell.inner, "sender")?.take();
        drop(made.ok_or_else(|| handle::destroyed::<xcclKvSender>("sender"))?);
        shell.magic().clear();
        Ok(())
    })
}

/// Writes to *event what has happened that was not told yet: a request was posted, cancelled, or its receiver is gone; or that
/// nothing has (xcclKvNothing). Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvSenderPoll(event: *mut xcclKvEvent_t, sender: xcclKvSender_t) -> xcclResult_t {
    guard("xcclKvSenderPoll", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = SizedOut::new(event, "event")?;
            let found = with_sender(sender, |sender| Ok(sender.poll()?))?;
            out.set(found.map_or(NOTHING, of_sender));
            Ok(())
        }
    })
}

/// Waits for something to happen, and writes it to *event. Blocks up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvSenderWait(event: *mut xcclKvEvent_t, sender: xcclKvSender_t) -> xcclResult_t {
    guard("xcclKvSenderWait", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = SizedOut::new(event, "event")?;
            out.set(of_sender(with_sender(sender, |sender| Ok(sender.wait()?))?));
            Ok(())
        }
    })
}

/// Copies the receiver's pages of a request, in its order, to the capacity elements at pages. xcclTruncated when they are more.
/// Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvSenderPages(
    ticket: xcclKvTicket_t,
    pages: *mut u32,
    capacity: usize,
    sender: xcclKvSender_t,
) -> xcclResult_t {
    guard("xcclKvSenderPages", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let to = slice_mut(pages, capacity, "pages")?;
            with_sender(sender, |sender| {
                let listed = sender.pages(KvTicket::from_bits(ticket))?;
                let Some(to) = to.get_mut(..listed.len()) else {
                    let text = format!("the request has {} pages, capacity is {capacity}", listed.len());
                    return Err(Failure::truncated(text));
                };
                to.copy_from_slice(listed);
                Ok(())
            })
        }
    })
}

/// Copies the count pages at pages of one layer from this rank's pool, pool_bytes bytes at pool, to the receiver's; to none
/// but those that it has posted for the request, and to each once. The receiver is told when the layer is complete; also of a
/// request without pages every layer has to be pushed. Writes 1 to *over when the whole request is complete, otherwise 0. The
/// pool may be reused when the call returns. xcclInvalidArgument for a wrong page: nothing was moved. xcclRemoteError when the
/// receiver has cancelled or is gone: the request is over. Blocks only for room towards another machine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvPush(
    ticket: xcclKvTicket_t,
    layer: usize,
    pool: *const c_void,
    pool_bytes: usize,
    pages: *const xcclPagePair_t,
    count: usize,
    over: *mut c_int,
    sender: xcclKvSender_t,
) -> xcclResult_t {
    guard("xcclKvPush", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = Out::new(over, "over")?;
            let pool = slice(pool.cast::<u8>(), pool_bytes, "pool")?;
            // The same two numbers: see below.
            let pages = slice(pages.cast::<PagePair>(), count, "pages")?;
            let ticket = KvTicket::from_bits(ticket);
            let is_over = with_sender(sender, |sender| Ok(sender.push(ticket, layer, pool, pages)?))?;
            out.set(is_over.into());
            Ok(())
        }
    })
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<PagePair>() == size_of::<xcclPagePair_t>());
    assert!(offset_of!(PagePair, source) == offset_of!(xcclPagePair_t, source));
    assert!(offset_of!(PagePair, destination) == offset_of!(xcclPagePair_t, destination));
};

/// Gives a request up: it is over, and the receiver gets its pages back. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvSenderCancel(ticket: xcclKvTicket_t, sender: xcclKvSender_t) -> xcclResult_t {
    guard("xcclKvSenderCancel", || {
        // SAFETY: C's promise about its handles.
        unsafe { with_sender(sender, |sender| Ok(sender.cancel(KvTicket::from_bits(ticket))?)) }
    })
}

/// Makes this rank a receiver of KV pages, with the pool at pool, a block of xcclSharedAlloc that lies as *layout says, and writes
/// its handle to *receiver; *receiver is left as it is on failure. Every rank takes part: see xcclKvSenderCreate. Blocks until
/// all have.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvReceiverCreate(
    receiver: *mut xcclKvReceiver_t,
    comm: xcclComm_t,
    config: *const xcclKvConfig_t,
    pool: *const c_void,
    layout: *const xcclPageLayout_t,
) -> xcclResult_t {
    guard("xcclKvReceiverCreate", || {
        // SAFETY: C's promise about its pointers and handles.
        let (out, made) = unsafe {
            let out = Out::new(receiver, "receiver")?;
            let (config, layout) = shape_of(config, layout)?;
            let made = with(comm, |live| match block_at(live, pool, 0, "pool")? {
                (pool, 0) => Ok(KvReceiver::new(&live.comm, config, pool, layout)?),
                _ => Err(Failure::argument(format!("pool ({pool:p}) is not the beginning of its block"))),
            });
            (out, made?)
        };
        let shell = xcclKvReceiver { magic: Magic::of::<xcclKvReceiver>(), inner: Mutex::new(Some(made)) };
        out.set(handle::hand_out(shell));
        Ok(())
    })
}

/// Gives the handle up: any further use of it is xcclInvalidArgument. Requests in flight are cancelled; while a sender may still
/// write to the pool, it stays allocated. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvReceiverDestroy(receiver: xcclKvReceiver_t) -> xcclResult_t {
    guard("xcclKvReceiverDestroy", || {
        // SAFETY: C's promise about its handles.
        let shell = unsafe { handle::shell(receiver, "receiver") }?;
        let made = locked(&shell.inner, "receiver")?.take();
        drop(made.ok_or_else(|| handle::destroyed::<xcclKvReceiver>("receiver"))?);
        shell.magic().clear();
        Ok(())
    })
}

/// Asks rank from, a sender, to fill the count pages at pages (may be null when count is 0) for the request id, which is the
/// application's: of the last page the first last_page_bytes bytes, of the others all. Writes a ticket to *ticket, or
/// XCCL_KV_TICKET_NULL when as many requests as may be are in flight from that sender: poll, and post again. The pages belong
/// to the request until its end has been told. xcclInvalidArgument for a page that is none or has a request. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvPost(
    from: c_int,
    id: u64,
    pages: *const u32,
    count: usize,
    last_page_bytes: usize,
    ticket: *mut xcclKvTicket_t,
    receiver: xcclKvReceiver_t,
) -> xcclResult_t {
    guard("xcclKvPost", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let (out, pages) = (Out::new(ticket, "ticket")?, slice(pages, count, "pages")?);
            let from = natural(from, "from", format_args!("a rank"))?;
            let posted = with_receiver(receiver, |receiver| Ok(receiver.post(from, id, pages, last_page_bytes)?))?;
            out.set(posted.map_or(XCCL_KV_TICKET_NULL, KvTicket::to_bits));
            Ok(())
        }
    })
}

/// Writes 1 to *ready when a layer of a request is complete: its pages may be read; otherwise 0. xcclRemoteError when it will
/// not come any more. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvLayerReady(
    ticket: xcclKvTicket_t,
    layer: usize,
    ready: *mut c_int,
    receiver: xcclKvReceiver_t,
) -> xcclResult_t {
    guard("xcclKvLayerReady", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = Out::new(ready, "ready")?;
            let is_ready =
                with_receiver(receiver, |receiver| Ok(receiver.layer_ready(KvTicket::from_bits(ticket), layer)?))?;
            out.set(is_ready.into());
            Ok(())
        }
    })
}

/// Waits until a layer of a request is complete. Otherwise as xcclKvLayerReady. Blocks up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvWaitLayer(
    ticket: xcclKvTicket_t,
    layer: usize,
    receiver: xcclKvReceiver_t,
) -> xcclResult_t {
    guard("xcclKvWaitLayer", || {
        // SAFETY: C's promise about its handles.
        unsafe { with_receiver(receiver, |receiver| Ok(receiver.wait_layer(KvTicket::from_bits(ticket), layer)?)) }
    })
}

/// Tells the sender to stop. The pages are free when the end of the request has been told, which may still be xcclKvDone. Does
/// not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvReceiverCancel(ticket: xcclKvTicket_t, receiver: xcclKvReceiver_t) -> xcclResult_t {
    guard("xcclKvReceiverCancel", || {
        // SAFETY: C's promise about its handles.
        unsafe { with_receiver(receiver, |receiver| Ok(receiver.cancel(KvTicket::from_bits(ticket))?)) }
    })
}

/// Writes to *event which request has ended, and how, if one has that was not told yet (otherwise xcclKvNothing). Its pages are
/// free. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvReceiverPoll(event: *mut xcclKvEvent_t, receiver: xcclKvReceiver_t) -> xcclResult_t {
    guard("xcclKvReceiverPoll", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = SizedOut::new(event, "event")?;
            let found = with_receiver(receiver, |receiver| Ok(receiver.poll()?))?;
            out.set(found.map_or(NOTHING, of_receiver));
            Ok(())
        }
    })
}

/// Waits for a request to end, and writes it to *event. xcclInvalidUsage when none is in flight. Blocks up to the deadline.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclKvReceiverWait(event: *mut xcclKvEvent_t, receiver: xcclKvReceiver_t) -> xcclResult_t {
    guard("xcclKvReceiverWait", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = SizedOut::new(event, "event")?;
            out.set(of_receiver(with_receiver(receiver, |receiver| Ok(receiver.wait()?))?));
            Ok(())
        }
    })
}
