//! A reliable datagram endpoint with remote writes.

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, shutdown};
use serde::{Deserialize, Serialize};

use super::library::{Infos, Library, string};
use super::probe::Probe;
use super::{Options, abi, providers, watched};
use crate::error::{Error, Result};
use crate::fabric::endpoint::{Access, Endpoint, Event, MOST_PARTS, Part, Posted, Region, RemoteRegion};
use crate::fabric::{decode, encode};
use crate::memory::mapping::Mapping;

/// Completions read at a time.
const BATCH: usize = 32;

/// Room of the completion queue: providers that cannot let it grow hold puts back when it is full.
const QUEUE: usize = 4096;

/// How often a key that is taken is replaced by another one.
const KEY_TRIES: usize = 8;

/// How long a rank takes nothing before its port is asked whether anybody is there, and between two such questions.
const DOUBT: Duration = Duration::from_millis(200);

/// How long closing waits for the connections to end. It takes as long as the provider needs to read what they hold.
const HANG_UP: Duration = Duration::from_secs(1);

/// An open object of libfabric, closed when dropped.
struct Handle<T: Object> {
    object: NonNull<T>,
    owned: PhantomData<T>,
}

/// What begins with a `Fid`.
trait Object {
    const NAME: &str;
}

macro_rules! objects {
    ($($object:ident $name:literal),*) => { $(impl Object for abi::$object { const NAME: &str = $name; })* };
}

objects!(FidFabric "fabric", FidDomain "domain", FidCq "completion queue", FidAv "address vector", FidEp "endpoint", FidMr "registration");

impl<T: Object> Handle<T> {
    /// Takes what a function of libfabric has just opened.
    fn new(object: *mut T) -> Self {
        // A function that succeeds has set it.
        Handle { object: NonNull::new(object).expect("libfabric has opened nothing"), owned: PhantomData }
    }

    fn as_ptr(&self) -> *mut T {
        self.object.as_ptr()
    }

    /// Objects begin with their `Fid`.
    fn fid(&self) -> *mut abi::Fid {
        self.as_ptr().cast()
    }

    fn bind(&self, to: *mut abi::Fid, flags: u64) -> i64 {
        // SAFETY: both are open objects; every object has the table of common functions.
        unsafe { ((*(*self.fid()).ops).bind)(self.fid(), to, flags) }.into()
    }

    fn control(&self, command: c_int, argument: *mut c_void) -> i64 {
        // SAFETY: an open object; the callers pass what the command takes.
        unsafe { ((*(*self.fid()).ops).control)(self.fid(), command, argument) }.into()
    }
}

impl<T: Object> Drop for Handle<T> {
    fn drop(&mut self) {
        // SAFETY: it is open, and closed once, here. What uses it was closed before: see the order of fields.
        let code = unsafe { ((*(*self.fid()).ops).close)(self.fid()) };
        if code != 0 {
            tracing::debug!(code, object = T::NAME, "libfabric did not close an object");
        }
    }
}

/// A range that was registered.
struct Registered {
    /// Absent where a provider takes any local address.
    registration: Option<Handle<abi::FidMr>>,
    memory: Arc<Mapping>,
    range: Range<usize>,
}

/// An operation whose end is to be told, and has not come.
#[derive(Clone, Copy)]
struct Told {
    rank: usize,
    token: u64,
    is_get: bool,
}

/// What a put or get is known by when it ends: a number, where libfabric has a pointer. Zero is neither, since providers report
/// troubles that belong to no operation with a null context.
enum Context {
    /// A put whose end nobody is told.
    Put {
        to: usize,
    },
    Told {
        slot: usize,
    },
}

impl Context {
    fn pack(self) -> *mut c_void {
        let number = match self {
            Context::Put { to } => (to + 1) << 1,
            Context::Told { slot } => slot << 1 | 1,
        };
        std::ptr::without_provenance_mut(number)
    }

    fn unpack(context: *mut c_void) -> Option<Context> {
        match context.addr() {
            0 => None,
            number if number & 1 == 1 => Some(Context::Told { slot: number >> 1 }),
            number => Some(Context::Put { to: (number >> 1) - 1 }),
        }
    }
}

/// Another rank.
///
/// `ofi_rxm` makes connections when they are needed, and again when they break or are refused: until then it says that the queue
/// is full. So a rank that is gone would keep the others waiting for room. Where it takes nothing for a while, its port is asked:
/// when it refuses, nobody is there any more.
struct Peer {
    /// Its number in the address vector.
    number: u64,
    /// Its port, where it has one that can be asked.
    port: Option<SocketAddr>,
    /// Since when it takes nothing.
    held_up: Option<Instant>,
    probe: Option<Probe>,
    /// Why it cannot be reached any more. A rank that an operation has failed for stays lost: the provider would connect again,
    /// but what was on its way is not sent again, and a later put could be counted in its place.
    lost: Option<String>,
}

/// What other ranks are told of an endpoint.
#[derive(Serialize, Deserialize)]
struct Address {
    provider: String,
    format: u32,
    bytes: Vec<u8>,
}

/// See [`super::open`].
///
/// Fields are dropped in this order, which libfabric demands: what uses an object is closed before it.
pub(super) struct OfiEndpoint {
    ep: Handle<abi::FidEp>,
    regions: Vec<Registered>,
    av: Handle<abi::FidAv>,
    cq: Handle<abi::FidCq>,
    domain: Handle<abi::FidDomain>,
    fabric: Handle<abi::FidFabric>,
    library: &'static Library,
    /// What the objects were opened with; a single entry.
    info: Infos,
    provider: String,
    mr_mode: c_int,
    wake_fd: Option<RawFd>,
    /// By rank; none for those that are not needed.
    peers: Vec<Option<Peer>>,
    /// How many of them are held up.
    held_up: usize,
    /// By slot; none for those that are free.
    told: Vec<Option<Told>>,
    free_slots: Vec<usize>,
    /// Operations that could not even be started.
    failed: VecDeque<Event>,
}

// SAFETY: the objects belong to this value alone, and libfabric lets any thread use them, one at a time (FI_THREAD_DOMAIN, a
// domain for each endpoint); `&mut self` sees to that.
unsafe impl Send for OfiEndpoint {}

impl OfiEndpoint {
    pub(super) fn open(options: &Options) -> Result<Self> {
        let library = Library::get()?;
        let info = providers::choose(options.provider.as_deref(), options.source)?;
        // SAFETY: `choose` returns one entry, which lives as long as `info`.
        let chosen = unsafe { &*info.as_ptr() };
        let provider = providers::name_of(chosen);
        // SAFETY: entries of `fi_getinfo` have all their parts.
        let mr_mode = unsafe { (*chosen.domain_attr).mr_mode };
        let check = |call, code: i64| library.check(&provider, call, code);

        let fabric = Handle::new(library.open_fabric(chosen, &provider)?);
        let domain = Handle::new(opened(|to| {
            // SAFETY: an open fabric and an entry that belongs to it.
            let code = unsafe { ((*(*fabric.as_ptr()).ops).domain)(fabric.as_ptr(), info.as_ptr(), to, NOTHING) };
            check("fi_domain", code.into())
        })?);
        let (cq, wake_fd) = open_queue(library, &provider, &domain, options.wakes)?;
        let av = Handle::new(opened(|to| {
            let mut attr = abi::AvAttr {
                type_: abi::AV_TABLE,
                rx_ctx_bits: 0,
                count: options.ranks,
                ep_per_node: 0,
                name: std::ptr::null(),
                map_addr: NOTHING,
                flags: 0,
            };
            // SAFETY: an open domain; the attributes are read during the call only.
            let code = unsafe { ((*(*domain.as_ptr()).ops).av_open)(domain.as_ptr(), &mut attr, to, NOTHING) };
            check("fi_av_open", code.into())
        })?);
        let ep: Handle<abi::FidEp> = Handle::new(opened(|to| {
            // SAFETY: an open domain and the entry it was opened with.
            let code = unsafe { ((*(*domain.as_ptr()).ops).endpoint)(domain.as_ptr(), info.as_ptr(), to, NOTHING) };
            check("fi_endpoint", code.into())
        })?);
        check("fi_ep_bind(av)", ep.bind(av.fid(), 0))?;
        // Puts that succeed say nothing here: their targets know. Errors always come.
        let flags = abi::TRANSMIT | abi::RECV | abi::SELECTIVE_COMPLETION;
        check("fi_ep_bind(cq)", ep.bind(cq.fid(), flags))?;
        check("fi_enable", ep.control(abi::ENABLE, NOTHING))?;
        tracing::debug!(provider, version = library.version(), wakes = wake_fd.is_some(), "network endpoint");
        Ok(OfiEndpoint {
            ep,
            regions: Vec::new(),
            av,
            cq,
            domain,
            fabric,
            library,
            info,
            provider,
            mr_mode,
            wake_fd,
            peers: Vec::new(),
            held_up: 0,
            told: Vec::new(),
            free_slots: Vec::new(),
            failed: VecDeque::new(),
        })
    }

    fn check(&self, call: &'static str, code: i64) -> Result<()> {
        self.library.check(&self.provider, call, code)
    }

    fn wrong(&self, call: &'static str, why: String) -> Error {
        Error::Fabric { provider: self.provider.clone(), call, why }
    }

    fn info(&self) -> &abi::Info {
        // SAFETY: `info` has one entry, with all its parts.
        unsafe { &*self.info.as_ptr() }
    }

    /// Refuses what the provider does not carry in one piece.
    fn check_length(&self, bytes: usize) -> Result<()> {
        // SAFETY: entries of `fi_getinfo` have all their parts.
        let limit = unsafe { (*self.info().ep_attr).max_msg_size };
        if bytes > limit {
            let why = format!("{bytes} bytes are more than it carries at once ({limit}): send them in parts");
            return Err(self.wrong("fi_writedata", why));
        }
        Ok(())
    }

    fn needs(&self, mode: c_int) -> bool {
        self.mr_mode & mode != 0
    }

    /// This endpoint's own address, as the provider writes it.
    fn own_address(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; 256];
        let mut length = bytes.len();
        // SAFETY: an open endpoint; `bytes` has `length` bytes.
        let code =
            unsafe { ((*(*self.ep.as_ptr()).cm).getname)(self.ep.fid(), bytes.as_mut_ptr().cast(), &mut length) };
        self.check("fi_getname", code.into())?;
        bytes.truncate(length);
        Ok(bytes)
    }

    /// The provider's bytes of another rank's address, which came over a network: nothing is believed of their length.
    fn address_of(&self, rank: usize, blob: &[u8], own: &[u8]) -> Result<Vec<u8>> {
        let theirs: Address = decode(blob)?;
        let differs =
            |what: &str, theirs: String, ours: String| Error::Mismatch { rank, what: what.to_owned(), theirs, ours };
        if theirs.provider != self.provider {
            return Err(differs("network provider (XCCL_FABRIC)", theirs.provider, self.provider.clone()));
        }
        let format = self.info().addr_format;
        let is_ip = |bytes: &[u8]| providers::socket_address(format, bytes).is_some();
        if theirs.format != format || theirs.bytes.len() != own.len() || is_ip(&theirs.bytes) != is_ip(own) {
            let shown = |format: u32, bytes: &[u8]| format!("{} bytes of format {format}", bytes.len());
            return Err(differs("form of network address", shown(theirs.format, &theirs.bytes), shown(format, own)));
        }
        Ok(theirs.bytes)
    }

    /// The address of a part of a region, and what the provider knows the region by.
    fn local(&self, region: Region, part: &Range<usize>) -> (*const u8, *mut c_void) {
        let registered = &self.regions[region.index];
        let bytes = registered.range.len();
        assert!(part.start <= part.end && part.end <= bytes, "{part:?} leaves a region of {bytes} bytes");
        // SAFETY: an open registration.
        let desc = registered.registration.as_ref().map_or(NOTHING, |r| unsafe { (*r.as_ptr()).mem_desc });
        (registered.memory.at(registered.range.start + part.start, part.len()), desc)
    }

    fn peer(&mut self, rank: usize) -> &mut Peer {
        let peer = self.peers.get_mut(rank).and_then(Option::as_mut);
        peer.unwrap_or_else(|| panic!("rank {rank} was not connected"))
    }

    /// Whether an operation for this rank has failed, or would: it is reported as failed at once.
    fn is_lost(&mut self, rank: usize) -> bool {
        let Some(why) = self.peer(rank).lost.clone() else { return false };
        self.failed.push_back(Event::Failed { to: Some(rank), why });
        true
    }

    /// Says that an operation for `rank` has failed, and that all others will.
    fn lose(&mut self, rank: usize, why: String) -> Event {
        if let Some(peer) = self.peers.get_mut(rank).and_then(Option::as_mut) {
            peer.probe = None;
            self.held_up -= usize::from(peer.held_up.take().is_some());
            peer.lost.get_or_insert_with(|| why.clone());
        }
        Event::Failed { to: Some(rank), why }
    }

    /// What the return value of an operation means. An operation that cannot even start has failed like one that fails later.
    fn posted(&mut self, rank: usize, call: &'static str, code: i64) -> Posted {
        match code {
            0.. => {
                let peer = self.peer(rank);
                if peer.held_up.take().is_some() {
                    peer.probe = None;
                    self.held_up -= 1;
                }
                Posted::Yes
            }
            code if code == -abi::EAGAIN => {
                let peer = self.peer(rank);
                if peer.port.is_some() && peer.held_up.is_none() {
                    peer.held_up = Some(Instant::now());
                    self.held_up += 1;
                }
                Posted::Full
            }
            code => {
                let why = self.library.error(&self.provider, call, code).to_string();
                let event = self.lose(rank, why);
                self.failed.push_back(event);
                Posted::Yes
            }
        }
    }

    /// Finds out of ranks that take nothing whether they are there.
    fn doubt(&mut self, events: &mut Vec<Event>) {
        let now = Instant::now();
        for rank in 0..self.peers.len() {
            let Some(peer) = &mut self.peers[rank] else { continue };
            let (Some(since), Some(port)) = (peer.held_up, peer.port) else { continue };
            let outcome = match &peer.probe {
                Some(probe) => probe.end(),
                None if now - since < DOUBT => continue,
                None => match Probe::begin(port) {
                    Ok(probe) => {
                        peer.probe = Some(probe);
                        continue;
                    }
                    Err(err) => Some(Err(err)),
                },
            };
            match outcome {
                None => {}
                Some(Err(err)) if err.kind() == ErrorKind::ConnectionRefused => {
                    let event = self.lose(rank, format!("nobody is at {port} any more: {err}"));
                    events.push(event);
                }
                // It is only slow; or nothing is known, as while a link is down.
                Some(_) => (peer.probe, peer.held_up) = (None, Some(now)),
            }
        }
    }

    fn register_with_key(&self, memory: &Mapping, range: &Range<usize>, access: u64) -> Result<Handle<abi::FidMr>> {
        let mut tries = 0;
        loop {
            let key = if self.needs(abi::MR_PROV_KEY) { 0 } else { self.random_key()? };
            let mut registration = std::ptr::null_mut();
            // SAFETY: an open domain; the range lies in the mapping, which outlives the registration (see `Registered`).
            let code = unsafe {
                ((*(*self.domain.as_ptr()).mr).reg)(
                    self.domain.fid(),
                    memory.at(range.start, range.len()).cast(),
                    range.len(),
                    access,
                    0,
                    key,
                    0,
                    &mut registration,
                    NOTHING,
                )
            };
            tries += 1;
            if i64::from(code) == -abi::ENOKEY && tries < KEY_TRIES {
                continue;
            }
            self.check("fi_mr_reg", code.into())?;
            return Ok(Handle::new(registration));
        }
    }

    /// A key that nobody can guess who was not told, in as many bytes as the provider takes.
    fn random_key(&self) -> Result<u64> {
        // SAFETY: entries of `fi_getinfo` have all their parts.
        let bytes = unsafe { (*self.info().domain_attr).mr_key_size }.clamp(1, 8);
        let mut key = [0; 8];
        File::open("/dev/urandom")
            .and_then(|mut source| source.read_exact(&mut key[..bytes]))
            .map_err(|e| Error::os("read(/dev/urandom)", e))?;
        Ok(u64::from_le_bytes(key))
    }

    /// Takes the errors that the queue holds.
    fn take_errors(&mut self, events: &mut Vec<Event>) -> Result<()> {
        loop {
            /// Later versions write a longer entry, though only when asked for: room for them all the same.
            #[repr(C)]
            struct Room {
                entry: abi::CqErrEntry,
                later: [u64; 8],
            }
            let mut room = MaybeUninit::<Room>::zeroed();
            // SAFETY: an open queue; the entry is ours.
            let code =
                unsafe { ((*(*self.cq.as_ptr()).ops).readerr)(self.cq.as_ptr(), room.as_mut_ptr().cast(), 0) } as i64;
            if code == -abi::EAGAIN || code == 0 {
                return Ok(());
            }
            self.check("fi_cq_readerr", code)?;
            // SAFETY: zeros are a whole entry, and so is what the call has written.
            let entry = unsafe { room.assume_init() }.entry;
            let why = self.reason(&entry);
            let to = match Context::unpack(entry.op_context) {
                Some(Context::Put { to }) => Some(to),
                Some(Context::Told { slot }) => self.end(slot).map(|told| told.rank),
                None => None,
            };
            events.push(match to {
                Some(rank) => self.lose(rank, why),
                None => Event::Failed { to, why },
            });
        }
    }

    /// The texts for an error: libfabric's, and the provider's own.
    fn reason(&self, entry: &abi::CqErrEntry) -> String {
        if entry.err == abi::ECANCELED {
            return format!("the connection has ended ({})", self.provider);
        }
        // SAFETY: an open queue; the provider's number and data are the entry's own; no buffer is given.
        let text = unsafe {
            ((*(*self.cq.as_ptr()).ops).strerror)(
                self.cq.as_ptr(),
                entry.prov_errno,
                entry.err_data,
                std::ptr::null_mut(),
                0,
            )
        };
        format!("{} ({}: {})", self.library.text(entry.err.into()), self.provider, string(text))
    }

    fn begin(&mut self, told: Told) -> usize {
        let slot = self.free_slots.pop().unwrap_or_else(|| {
            self.told.push(None);
            self.told.len() - 1
        });
        self.told[slot] = Some(told);
        slot
    }

    /// The operation that a slot held; none if it has ended before, as after an error that is reported twice.
    fn end(&mut self, slot: usize) -> Option<Told> {
        let told = self.told.get_mut(slot)?.take()?;
        self.free_slots.push(slot);
        Some(told)
    }

    /// Posts an operation whose end is told.
    fn post_told(
        &mut self,
        told: Told,
        local: (Region, Range<usize>),
        remote: (RemoteRegion, usize),
        immediate: u32,
    ) -> Result<Posted> {
        let (address, mut desc) = self.local(local.0, &local.1);
        let bytes = local.1.len();
        let (iov_base, number) = (address.cast_mut().cast(), self.peer(told.rank).number);
        let local = libc::iovec { iov_base, iov_len: bytes };
        let remote = abi::RmaIov { addr: reach(remote.0, remote.1, bytes), len: bytes, key: remote.0.key };
        let slot = self.begin(told);
        let message = abi::MsgRma {
            msg_iov: &local,
            desc: &mut desc,
            iov_count: 1,
            addr: number,
            rma_iov: &remote,
            rma_iov_count: 1,
            context: Context::Told { slot }.pack(),
            data: immediate.into(),
        };
        // SAFETY: an open endpoint has the table of remote reads and writes.
        let rma = unsafe { &*(*self.ep.as_ptr()).rma };
        let (call, post, flags) = match told.is_get {
            true => ("fi_readmsg", rma.readmsg, abi::COMPLETION),
            false => ("fi_writemsg", rma.writemsg, abi::COMPLETION | abi::REMOTE_CQ_DATA),
        };
        // SAFETY: an open endpoint; the message is read during the call only; the bytes stay mapped as long as it lives.
        let code = unsafe { post(self.ep.as_ptr(), &message, flags) } as i64;
        if code < 0 {
            self.end(slot);
        }
        Ok(self.posted(told.rank, call, code))
    }
}

impl Drop for OfiEndpoint {
    /// Ends the connections before the endpoint is closed.
    ///
    /// `tcp;ofi_rxm` of libfabric 1.17 dereferences a null pointer when it closes a connection that has brought half of a put: it
    /// reports the put as an error of an operation that nobody has posted. A connection that ends by itself is cleaned up well, so
    /// all are shut down here, and moved on until the provider has let go of them.
    fn drop(&mut self) {
        let Some(wake) = self.wake_fd.filter(|_| providers::speaks_tcp(&self.provider)) else { return };
        let (start, mut events) = (Instant::now(), Vec::new());
        loop {
            let connections = watched::connections(wake);
            if connections.is_empty() {
                return;
            }
            for connection in connections {
                // An error says that it has ended already.
                let _ = shutdown(connection, Shutdown::Both);
            }
            events.clear();
            if self.poll(&mut events).is_err() || start.elapsed() > HANG_UP {
                tracing::debug!("connections are still open while the network endpoint is closed");
                return;
            }
        }
    }
}

const NOTHING: *mut c_void = std::ptr::null_mut();

/// What a function of libfabric has opened.
fn opened<T>(open: impl FnOnce(*mut *mut T) -> Result<()>) -> Result<*mut T> {
    let mut object = std::ptr::null_mut();
    open(&mut object)?;
    Ok(object)
}

/// A completion queue, and the descriptor that wakes a sleeper, where there is one.
fn open_queue(
    library: &Library,
    provider: &str,
    domain: &Handle<abi::FidDomain>,
    wakes: bool,
) -> Result<(Handle<abi::FidCq>, Option<RawFd>)> {
    let open = |wait_obj| {
        opened(|to| {
            let mut attr = abi::CqAttr {
                size: QUEUE,
                flags: 0,
                format: abi::CQ_FORMAT_DATA,
                wait_obj,
                signaling_vector: 0,
                wait_cond: 0,
                wait_set: NOTHING,
            };
            // SAFETY: an open domain; the attributes are read during the call only.
            let code = unsafe { ((*(*domain.as_ptr()).ops).cq_open)(domain.as_ptr(), &mut attr, to, NOTHING) };
            library.check(provider, "fi_cq_open", code.into())
        })
        .map(Handle::new)
    };
    // Not FI_WAIT_POLLFD: the list that libfabric 1.17 gives then lacks the descriptors of the queue below, until a wait of its
    // own has run, which nobody calls here.
    if wakes && let Ok(cq) = open(abi::WAIT_FD) {
        let mut fd: RawFd = -1;
        if cq.control(abi::GETWAIT, (&raw mut fd).cast()) == 0 && fd >= 0 {
            return Ok((cq, Some(fd)));
        }
    }
    Ok((open(abi::WAIT_NONE)?, None))
}

impl Endpoint for OfiEndpoint {
    fn address(&self) -> Result<Vec<u8>> {
        let bytes = self.own_address()?;
        encode(&Address { provider: self.provider.clone(), format: self.info().addr_format, bytes })
    }

    fn connect(&mut self, addresses: &[Option<Vec<u8>>]) -> Result<()> {
        let own = self.own_address()?;
        for (rank, blob) in addresses.iter().enumerate() {
            let Some(blob) = blob else {
                self.peers.push(None);
                continue;
            };
            let address = self.address_of(rank, blob, &own)?;
            let mut number = 0;
            // SAFETY: an open address vector; the address has the length that this provider's addresses have.
            let inserted = unsafe {
                ((*(*self.av.as_ptr()).ops).insert)(
                    self.av.as_ptr(),
                    address.as_ptr().cast(),
                    1,
                    &mut number,
                    0,
                    NOTHING,
                )
            };
            self.check("fi_av_insert", inserted.into())?;
            if inserted != 1 {
                return Err(self.wrong("fi_av_insert", format!("rank {rank}'s address is none for this provider")));
            }
            let port = providers::socket_address(self.info().addr_format, &address);
            let port = port.filter(|_| providers::speaks_tcp(&self.provider));
            self.peers.push(Some(Peer { number, port, held_up: None, probe: None, lost: None }));
        }
        Ok(())
    }

    fn register(&mut self, memory: &Arc<Mapping>, range: Range<usize>, access: Access) -> Result<Region> {
        let address = memory.at(range.start, range.len());
        let own = match memory.is_writable() {
            true => abi::WRITE | abi::READ,
            // Puts may start from it.
            false => abi::WRITE,
        };
        let flags = match access {
            Access::Local => own,
            Access::Remote => {
                assert!(memory.is_writable(), "this segment belongs to another rank");
                own | abi::REMOTE_WRITE | abi::REMOTE_READ
            }
        };
        let mut remote = RemoteRegion { base: 0, key: 0, bytes: range.len() as u64 };
        let registration = if access == Access::Remote || self.needs(abi::MR_LOCAL) {
            let registration = self.register_with_key(memory, &range, flags)?;
            if self.needs(abi::MR_ENDPOINT) {
                self.check("fi_mr_bind", registration.bind(self.ep.fid(), 0))?;
                self.check("fi_mr_enable", registration.control(abi::ENABLE, NOTHING))?;
            }
            // SAFETY: an open registration.
            remote.key = unsafe { (*registration.as_ptr()).key };
            if remote.key == abi::KEY_NOTAVAIL {
                return Err(self.wrong("fi_mr_key", "its keys are longer than 64 bits".to_owned()));
            }
            Some(registration)
        } else {
            None
        };
        if self.needs(abi::MR_VIRT_ADDR) {
            remote.base = address.addr() as u64;
        }
        self.regions.push(Registered { registration, memory: memory.clone(), range });
        Ok(Region { index: self.regions.len() - 1, remote })
    }

    fn put(
        &mut self,
        to: usize,
        from: (Region, Range<usize>),
        into: (RemoteRegion, usize),
        immediate: u32,
        token: Option<u64>,
    ) -> Result<Posted> {
        let bytes = from.1.len();
        self.check_length(bytes)?;
        if self.is_lost(to) {
            return Ok(Posted::Yes);
        }
        if let Some(token) = token {
            return self.post_told(Told { rank: to, token, is_get: false }, from, into, immediate);
        }
        let (address, desc) = self.local(from.0, &from.1);
        let remote = reach(into.0, into.1, bytes);
        let number = self.peer(to).number;
        // Small ones too, though `fi_inject_writedata` would save 0.1 us of 5.6: of what is injected, providers do not say that it
        // has failed, and some take any number of them.
        // SAFETY: an open endpoint; the bytes stay mapped as long as it lives (`Registered`).
        let code = unsafe {
            ((*(*self.ep.as_ptr()).rma).writedata)(
                self.ep.as_ptr(),
                address.cast(),
                bytes,
                desc,
                immediate.into(),
                number,
                remote,
                into.0.key,
                Context::Put { to }.pack(),
            )
        };
        Ok(self.posted(to, "fi_writedata", code as i64))
    }

    fn most_parts(&self) -> usize {
        // SAFETY: entries of `fi_getinfo` have all their parts.
        let limits = unsafe { &*self.info().tx_attr };
        limits.iov_limit.min(limits.rma_iov_limit).clamp(1, MOST_PARTS)
    }

    fn put_parts(&mut self, to: usize, parts: &[Part], immediate: u32) -> Result<Posted> {
        if let [Part { from, into }] = parts {
            return self.put(to, from.clone(), *into, immediate, None);
        }
        assert!(parts.len() <= self.most_parts(), "{} parts", parts.len());
        self.check_length(parts.iter().map(|part| part.from.1.len()).sum())?;
        if self.is_lost(to) {
            return Ok(Posted::Yes);
        }
        let mut desc = [NOTHING; MOST_PARTS];
        let mut local = [libc::iovec { iov_base: NOTHING, iov_len: 0 }; MOST_PARTS];
        let mut remote = [const { abi::RmaIov { addr: 0, len: 0, key: 0 } }; MOST_PARTS];
        for (i, Part { from, into }) in parts.iter().enumerate() {
            let (address, known_by) = self.local(from.0, &from.1);
            let len = from.1.len();
            desc[i] = known_by;
            local[i] = libc::iovec { iov_base: address.cast_mut().cast(), iov_len: len };
            remote[i] = abi::RmaIov { addr: reach(into.0, into.1, len), len, key: into.0.key };
        }
        let message = abi::MsgRma {
            msg_iov: local.as_ptr(),
            desc: desc.as_mut_ptr(),
            iov_count: parts.len(),
            addr: self.peer(to).number,
            rma_iov: remote.as_ptr(),
            rma_iov_count: parts.len(),
            context: Context::Put { to }.pack(),
            data: immediate.into(),
        };
        // SAFETY: an open endpoint; the message is read during the call only; the bytes stay mapped as long as it lives.
        let code = unsafe { ((*(*self.ep.as_ptr()).rma).writemsg)(self.ep.as_ptr(), &message, abi::REMOTE_CQ_DATA) };
        Ok(self.posted(to, "fi_writemsg", code as i64))
    }

    fn get(
        &mut self,
        of: usize,
        from: (RemoteRegion, usize),
        into: (Region, Range<usize>),
        token: u64,
    ) -> Result<Posted> {
        assert!(self.regions[into.0.index].memory.is_writable(), "this segment belongs to another rank");
        self.check_length(into.1.len())?;
        if self.is_lost(of) {
            return Ok(Posted::Yes);
        }
        self.post_told(Told { rank: of, token, is_get: true }, into, from, 0)
    }

    fn poll(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let mut entries = [const { MaybeUninit::<abi::CqDataEntry>::uninit() }; BATCH];
        loop {
            // SAFETY: an open queue of this format; `entries` has room for as many as it says.
            let code =
                unsafe { ((*(*self.cq.as_ptr()).ops).read)(self.cq.as_ptr(), entries.as_mut_ptr().cast(), BATCH) }
                    as i64;
            if code == -abi::EAGAIN || code == 0 {
                break;
            }
            if code == -abi::EAVAIL {
                self.take_errors(events)?;
                continue;
            }
            self.check("fi_cq_read", code)?;
            let count = usize::try_from(code).unwrap_or(0).min(BATCH);
            for entry in &entries[..count] {
                // SAFETY: the call has written this many.
                let entry = unsafe { entry.assume_init_read() };
                // A put of this rank that has left may be described by the flags it was posted with.
                if entry.flags & abi::REMOTE_CQ_DATA != 0 && entry.flags & abi::WRITE == 0 {
                    events.push(Event::Arrived { immediate: entry.data as u32 });
                } else if let Some(Context::Told { slot }) = Context::unpack(entry.op_context) {
                    events.extend(self.end(slot).map(|Told { token, is_get, .. }| match is_get {
                        true => Event::Got { token },
                        false => Event::Left { token },
                    }));
                }
            }
            if count < BATCH {
                break;
            }
        }
        events.extend(self.failed.drain(..));
        if self.held_up > 0 {
            self.doubt(events);
        }
        Ok(())
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the descriptor belongs to the queue, which lives as long as the borrow.
        self.wake_fd.map(|fd| unsafe { BorrowedFd::borrow_raw(fd) })
    }

    fn may_sleep(&mut self) -> bool {
        let mut queue = [self.cq.fid()];
        // SAFETY: an open fabric, and one open queue of it.
        let code = unsafe { ((*(*self.fabric.as_ptr()).ops).trywait)(self.fabric.as_ptr(), queue.as_mut_ptr(), 1) };
        self.failed.is_empty() && code == 0
    }
}

/// Where `offset` of a region lies, as its provider counts.
fn reach(region: RemoteRegion, offset: usize, bytes: usize) -> u64 {
    let (offset, bytes) = (offset as u64, bytes as u64);
    assert!(
        offset <= region.bytes && bytes <= region.bytes - offset,
        "offset {offset} + {bytes} leaves a region of {} bytes",
        region.bytes
    );
    region.base.wrapping_add(offset)
}
