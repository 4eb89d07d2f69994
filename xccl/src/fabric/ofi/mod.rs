//! The plane between nodes, by libfabric: an [`Endpoint`] on any of its providers with reliable datagrams and remote writes.
//!
//! `library` loads it, `abi` says what its structures look like, `providers` chooses one, `endpoint` is the place on the network,
//! `probe` finds out whether anybody is still there, `watched` which connections there are.
//!
//! *Environment.* Providers read their own `FI_…` variables when the library is first used; `fi_info -e` lists them. For
//! `tcp;ofi_rxm` the defaults are the best that was found (1.17, loopback, `figures`): `FI_TCP_PREFETCH_RBUF_SIZE=0` makes 8 bytes
//! 5.7 us where 4.9 and 64 KiB 10.0 where 10.9, `FI_TCP_STAGING_SBUF_SIZE=0` makes 8 bytes dearer too; `FI_TCP_ZEROCOPY_SIZE`,
//! `FI_OFI_RXM_USE_SRX`, `FI_OFI_RXM_CM_PROGRESS_INTERVAL` and `FI_OFI_RXM_ENABLE_PASSTHRU` change nothing that could be told from
//! the noise. `FI_OFI_RXM_DEF_TCP_WAIT_OBJ=pollfd` must not be set: then nothing wakes a sleeper.
//!
//! *What may be lost.* `ofi_rxm` makes a broken connection anew without a word, and puts that had left for it are gone. Puts that had
//! not left fail, and then the rank counts as lost. So whoever counts arrivals may wait in vain, but for a deadline, and must
//! never take a later put for one that is missing.
//!
//! *Forking.* A process that forks while an endpoint is open must not use it in the child; for `verbs` and `efa` set
//! `RDMAV_FORK_SAFE=1` too, or the parent's registered pages may move away from under the network card.

mod abi;
mod endpoint;
#[cfg(test)]
mod figures;
mod library;
mod probe;
mod providers;
#[cfg(test)]
mod tests;
mod watched;

use std::net::IpAddr;

pub use providers::NetworkProvider;
pub(crate) use providers::providers;

use super::endpoint::Endpoint;
use crate::error::Result;

/// What an endpoint is opened with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    /// The provider, by name; none: the best there is.
    pub(crate) provider: Option<String>,
    /// The address of this machine that other ranks reach, for providers whose addresses are those of IP; none: the
    /// provider's first.
    pub(crate) source: Option<IpAddr>,
    /// The number of ranks.
    pub(crate) ranks: usize,
    /// Whether somebody is going to sleep until the endpoint wakes it. With `tcp;ofi_rxm` that makes each put to it dearer, 5.6 us
    /// where 4.7 (half round trips of 8 bytes, loopback): its epoll descriptors are nested. Without, `tcp;ofi_rxm` of libfabric 1.17 crashes when
    /// it is closed while a put is halfway in: for measurements.
    pub(crate) wakes: bool,
}

/// Opens this rank's place on the network.
///
/// Dropping it gives up what has not left yet: the last puts of a rank are known to have arrived only when their targets say so.
///
/// # Errors
/// [`Error::FabricLibrary`](crate::Error::FabricLibrary) without libfabric 1.17,
/// [`Error::FabricProvider`](crate::Error::FabricProvider) when no provider will do, or not the one that is named.
pub(crate) fn open(options: &Options) -> Result<Box<dyn Endpoint>> {
    Ok(Box::new(endpoint::OfiEndpoint::open(options)?))
}
