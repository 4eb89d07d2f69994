//! Options of a communicator.

use std::ffi::c_int;
use std::time::Duration;

use xccl::{Config, Kernels, MemoryFlavour};

use crate::boundary::{Failure, Outcome, sized};
use crate::comm::XCCL_VERSION;

/// The value of an option that the environment, or else its default, is to set.
pub const XCCL_UNDEFINED: c_int = -1;

/** Where shared segments come from. The numbers are fixed. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclMemory_t {
    /// memfd_create: no name anywhere, sealed against writing by peers.
    xcclMemfd = 0,
    /// shm_open: counted against /dev/shm, reserved at start.
    xcclPosix = 1,
}

/** Which instruction set the loops use that touch every element. All give the same bits. The numbers are fixed. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclKernels_t {
    /// The best that this processor has.
    xcclKernelsAuto = 0,
    /// Plain loops, for any processor.
    xcclKernelsScalar = 1,
    /// x86-64 with AVX2 and F16C.
    xcclKernelsAvx2 = 2,
    /// x86-64 with AVX-512 F, BW and VL.
    xcclKernelsAvx512 = 3,
    /// The same with AVX-512 DQ, and the conversion to bf16 of AVX-512 BF16.
    xcclKernelsAvx512Bf16 = 4,
    /// AArch64.
    xcclKernelsNeon = 5,
}

/// As C numbers them.
const KERNELS: [Kernels; 6] =
    [Kernels::Auto, Kernels::Scalar, Kernels::Avx2, Kernels::Avx512, Kernels::Avx512Bf16, Kernels::Neon];

/// Options of a communicator. Set it to XCCL_CONFIG_INITIALIZER, then what is to be different. Each option that is
/// XCCL_UNDEFINED comes from its environment variable, or has its default.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct xcclConfig_t {
    /// sizeof(xcclConfig_t).
    pub size: usize,
    /// XCCL_VERSION.
    pub version: i64,
    /// Deadline of every blocking call in milliseconds; 0 waits for ever. XCCL_TIMEOUT, 60000.
    pub timeout_ms: i64,
    /// Bytes of each rank's symmetric heap. XCCL_HEAP, 16 MiB.
    pub heap_bytes: i64,
    /// Payload bytes of the ring from each rank to each other one. XCCL_P2P_RING, 128 KiB.
    pub p2p_ring_bytes: i64,
    /// Messages of at least this many bytes are copied once, where possible. XCCL_RENDEZVOUS, 32 KiB.
    pub rendezvous_bytes: i64,
    /// Most bytes kept for receives that have not been posted yet. XCCL_UNEXPECTED_BYTES, 256 MiB.
    pub unexpected_bytes: i64,
    /// An xcclMemory_t. XCCL_MEMORY, xcclMemfd.
    pub memory: i64,
    /// 1 to ask for huge pages, 0 not to. XCCL_HUGE_PAGES, 1.
    pub huge_pages: i64,
    /// 1 to read a sender's private memory where the kernel permits it, 0 not to. XCCL_CMA, 1.
    pub cma: i64,
    /// An xcclKernels_t. XCCL_KERNELS, xcclKernelsAuto.
    pub kernels: i64,
}

const INITIAL: xcclConfig_t = {
    let unset = XCCL_UNDEFINED as i64;
    xcclConfig_t {
        size: size_of::<xcclConfig_t>(),
        version: XCCL_VERSION as i64,
        timeout_ms: unset,
        heap_bytes: unset,
        p2p_ring_bytes: unset,
        rendezvous_bytes: unset,
        unexpected_bytes: unset,
        memory: unset,
        huge_pages: unset,
        cma: unset,
        kernels: unset,
    }
};

/// The environment's options, changed by what C has set.
///
/// # Safety
/// `config` is null, or readable for as many bytes as it says.
pub(crate) unsafe fn config_of(config: *const xcclConfig_t) -> Outcome<Config> {
    let mut options = Config::from_env()?;
    if config.is_null() {
        return Ok(options);
    }
    // SAFETY: the caller's promise; any bits are a configuration.
    let set = unsafe { sized(config, INITIAL, "config") }?;
    if set.version != i64::from(XCCL_VERSION) {
        let (major, theirs) = (XCCL_VERSION / 10_000, set.version / 10_000);
        if set.version < 100 || theirs != i64::from(major) {
            let text = format!(
                "config->version is {}: expected a version {major}.x, as XCCL_CONFIG_INITIALIZER sets it",
                set.version
            );
            return Err(Failure::argument(text));
        }
    }
    let given = |value: i64| (value != i64::from(XCCL_UNDEFINED)).then_some(value);
    let bytes = |value: i64, name: &str| match given(value) {
        None => Ok(None),
        Some(value) => usize::try_from(value).map(Some).map_err(|_| {
            Failure::argument(format!("config->{name} is {value}: expected a number of bytes, or XCCL_UNDEFINED (-1)"))
        }),
    };
    let flag = |value: i64, name: &str| match given(value) {
        None => Ok(None),
        Some(0) => Ok(Some(false)),
        Some(1) => Ok(Some(true)),
        Some(value) => {
            Err(Failure::argument(format!("config->{name} is {value}: expected 0, 1 or XCCL_UNDEFINED (-1)")))
        }
    };
    if let Some(timeout) = given(set.timeout_ms) {
        let ms = u64::try_from(timeout).map_err(|_| {
            Failure::argument(format!("config->timeout_ms is {timeout}: expected milliseconds, or XCCL_UNDEFINED (-1)"))
        })?;
        options = options.timeout((ms > 0).then(|| Duration::from_millis(ms)));
    }
    if let Some(bytes) = bytes(set.heap_bytes, "heap_bytes")? {
        options = options.heap_bytes(bytes);
    }
    if let Some(bytes) = bytes(set.p2p_ring_bytes, "p2p_ring_bytes")? {
        options = options.p2p_ring_bytes(bytes);
    }
    if let Some(bytes) = bytes(set.rendezvous_bytes, "rendezvous_bytes")? {
        options = options.rendezvous_bytes(bytes);
    }
    if let Some(bytes) = bytes(set.unexpected_bytes, "unexpected_bytes")? {
        options = options.unexpected_bytes(bytes);
    }
    options = match given(set.memory) {
        None => options,
        Some(m) if m == xcclMemory_t::xcclMemfd as i64 => options.memory(MemoryFlavour::Memfd),
        Some(m) if m == xcclMemory_t::xcclPosix as i64 => options.memory(MemoryFlavour::Posix),
        Some(other) => {
            let text =
                format!("config->memory is {other}: expected xcclMemfd (0), xcclPosix (1) or XCCL_UNDEFINED (-1)");
            return Err(Failure::argument(text));
        }
    };
    if let Some(ask) = flag(set.huge_pages, "huge_pages")? {
        options = options.huge_pages(ask);
    }
    if let Some(allow) = flag(set.cma, "cma")? {
        options = options.cma(allow);
    }
    if let Some(number) = given(set.kernels) {
        let kernels = usize::try_from(number).ok().and_then(|number| KERNELS.get(number));
        options = options.kernels(*kernels.ok_or_else(|| {
            let expected = "an xcclKernels_t (0 to 5), or XCCL_UNDEFINED (-1)";
            Failure::argument(format!("config->kernels is {number}: expected {expected}"))
        })?);
    }
    Ok(options)
}
