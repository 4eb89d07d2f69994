//! The result codes: numbers that never move.

use std::ffi::{CStr, c_char, c_int};

use xccl::Error;

/** The result of every call. The numbers are fixed; where NCCL has the same result, they are NCCL's. */
// 1 (NCCL's unhandled CUDA error) and 7 (NCCL's in progress) stay unused.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclResult_t {
    /// The call did what it says.
    xcclSuccess = 0,
    /// The operating system refused something.
    xcclSystemError = 2,
    /// A bug, in this library or in a peer's process.
    xcclInternalError = 3,
    /// A null pointer, a handle that is none, or a value out of range: the text names it.
    xcclInvalidArgument = 4,
    /// A call at the wrong time, or a handle that another thread is using; a collective that ranks call with different arguments.
    xcclInvalidUsage = 5,
    /// A peer died, left, or gave an exchange up.
    xcclRemoteError = 6,
    /// The deadline (XCCL_TIMEOUT) passed.
    xcclTimeout = 8,
    /// A message or an exchange has more bytes or rows than the buffer: nothing is lost, repeat with a larger one.
    xcclTruncated = 9,
    /// A peer's input to the exchange was refused there: repeat the call once it has been corrected.
    xcclPeerRefused = 10,
    /// A rank has aborted the communicator.
    xcclAborted = 11,
    /// The machine, or the symmetric heap, has too little memory.
    xcclOutOfMemory = 12,
    /// More has arrived than the configuration has room for.
    xcclLimitExceeded = 13,
    /// The ranks could not come together: one is missing, claimed twice, differs, or was refused.
    xcclJoinFailed = 14,
    /// No launcher's environment says which rank this process is.
    xcclNotLaunched = 15,
    /// The network between nodes: its library is missing, no provider of it will do, or one has failed.
    xcclNetworkError = 16,
}

use xcclResult_t::*;

const TEXTS: [(xcclResult_t, &CStr); 15] = [
    (xcclSuccess, c"success"),
    (xcclSystemError, c"a system call failed"),
    (xcclInternalError, c"internal error"),
    (xcclInvalidArgument, c"invalid argument"),
    (xcclInvalidUsage, c"invalid usage"),
    (xcclRemoteError, c"a peer died, left or gave up"),
    (xcclTimeout, c"the deadline passed"),
    (xcclTruncated, c"the buffer is too small"),
    (xcclPeerRefused, c"a peer's input was refused"),
    (xcclAborted, c"the communicator was aborted"),
    (xcclOutOfMemory, c"not enough memory"),
    (xcclLimitExceeded, c"a configured limit was exceeded"),
    (xcclJoinFailed, c"the ranks could not come together"),
    (xcclNotLaunched, c"not started by a launcher"),
    (xcclNetworkError, c"the network between nodes failed"),
];

/// A short text for a result, for example "invalid argument". It lives for ever; "unknown result" for other numbers.
/// xcclGetLastError says what was wrong in particular. Does not block.
#[unsafe(no_mangle)]
pub extern "C" fn xcclGetErrorString(result: c_int) -> *const c_char {
    let known = TEXTS.iter().find(|&&(code, _)| code as c_int == result);
    known.map_or(c"unknown result", |&(_, text)| text).as_ptr()
}

/// The code of an error of the library.
pub(crate) fn code_of(err: &Error) -> xcclResult_t {
    match err {
        Error::Config { .. }
        | Error::InvalidRank { .. }
        | Error::TooManyTokens { .. }
        | Error::ExpertOutOfRange { .. }
        | Error::DuplicateExpert { .. }
        | Error::NotShared { .. }
        | Error::NoWord { .. }
        | Error::KvPage { .. }
        | Error::KvRole { .. }
        | Error::RoleMismatch { .. }
        | Error::RoleConflict { .. }
        | Error::NoRole { .. }
        | Error::ExpertWithoutRole { .. }
        | Error::Shape { .. }
        | Error::DTypeMismatch { .. } => xcclInvalidArgument,
        Error::NotLaunched { .. } => xcclNotLaunched,
        Error::MissingRanks { .. }
        | Error::DuplicateRank { .. }
        | Error::Mismatch { .. }
        | Error::RootUnreachable { .. }
        | Error::HostUnreachable { .. }
        | Error::CannotListen { .. }
        | Error::Refused { .. }
        | Error::Bootstrap { .. } => xcclJoinFailed,
        Error::PeerDied { .. }
        | Error::PeerLeft { .. }
        | Error::PeerAbandoned { .. }
        | Error::GivenUp { .. }
        | Error::LeftOut { .. }
        | Error::Withdrawn { .. }
        | Error::KvCancelled { .. } => xcclRemoteError,
        Error::PeerRefused { .. } => xcclPeerRefused,
        Error::Aborted { .. } => xcclAborted,
        Error::Timeout { .. } => xcclTimeout,
        Error::NotEnoughMemory { .. } | Error::HeapExhausted { .. } => xcclOutOfMemory,
        Error::Os { .. } => xcclSystemError,
        Error::FabricLibrary { .. } | Error::FabricProvider { .. } | Error::Fabric { .. } => xcclNetworkError,
        Error::Truncated { .. } => xcclTruncated,
        Error::UnexpectedFull { .. } | Error::CapacityExceeded { .. } | Error::TooManyExpertRows { .. } => {
            xcclLimitExceeded
        }
        Error::TooManyInFlight { .. }
        | Error::WrongOrder { .. }
        | Error::Wire { .. }
        | Error::CallMismatch { .. }
        | Error::Forked { .. }
        | Error::PlacementMismatch { .. } => xcclInvalidUsage,
        // Corrupt, and what later versions of the library add.
        _ => xcclInternalError,
    }
}
