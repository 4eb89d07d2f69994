//! How this rank reaches each other rank's memory.
//!
//! This is the seam between planes. The layers above ask [`Fabric::peer`] for a rank and never map, open or read anything
//! themselves. What a rank has written into its outbox is read at the same offsets in either case:
//! - of a *near* rank, on the same node, the outbox itself is mapped ([`shm`]);
//! - of a *far* one there is a landing zone on this node, which it puts what concerns this rank into ([`plane`]).

pub(crate) mod bare;
pub(crate) mod bounce;
pub(crate) mod cma;
pub(crate) mod endpoint;
pub(crate) mod far;
pub(crate) mod ofi;
pub(crate) mod plane;
#[cfg(any(test, fuzzing))]
pub(crate) mod pretence;
pub(crate) mod progress;
pub(crate) mod shm;

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

pub use bare::BareNetwork;
use endpoint::Endpoint;
use far::Far;
pub use ofi::NetworkProvider;
use serde::{Deserialize, Serialize};

use crate::bootstrap::{Star, UniqueId};
use crate::comm::Config;
use crate::error::{Error, Result};
use crate::memory::MemoryFlavour;
use crate::memory::machine;
use crate::memory::mapping::Mapping;
use crate::memory::segment::{OwnSegment, Writers, check_segment, map_peer};

/// This rank's segment and those of the ranks of its node, mapped.
pub(crate) struct Segments {
    pub(crate) own: Mapping,
    /// By rank, this rank's own (outboxes read-only) included; `None` for far ones.
    pub(crate) peers: Vec<Option<Mapping>>,
    /// Descriptors by which others find this rank's segment, and that of the next rank of the node should it die.
    pub(crate) found_by: [OwnedFd; 2],
}

/// What a rank says of its segment: its bytes, the descriptor being sent along; or why it has none.
type Announcement = std::result::Result<u64, String>;

/// Creates a segment on every rank and maps those of this node. Collective: a rank that cannot go on, for what has gone wrong
/// `before` or since its segment cannot be created, says so to the others instead of leaving them to wait.
///
/// # Errors
/// `before`'s; [`Error::NotEnoughMemory`] and the like, which the other ranks get as [`Error::Bootstrap`] with the same text.
pub(crate) fn exchange_segments(
    star: &mut Star,
    config: &Config,
    before: Result<()>,
    writers: Writers,
    bytes: usize,
    deadline: Instant,
) -> Result<Segments> {
    exchange_segments_of(star, config, before, writers, (|_| bytes, |_| true), deadline)
}

/// As [`exchange_segments`], with segments of `bytes_of` their ranks, of which only those of ranks that it `maps` are mapped.
pub(crate) fn exchange_segments_of(
    star: &mut Star,
    config: &Config,
    before: Result<()>,
    writers: Writers,
    (bytes_of, maps): (impl Fn(usize) -> usize, impl Fn(usize) -> bool),
    deadline: Instant,
) -> Result<Segments> {
    let bytes = bytes_of(star.rank());
    let created = before.and_then(|()| OwnSegment::create(config.memory, writers, bytes, config.huge_pages));
    let (own, mut fds) = exchange_created(star, created, config.memory, &bytes_of, deadline)?;
    let near = fds.iter().enumerate().map(|(rank, fd)| (rank, fd.as_ref().filter(|_| maps(rank))));
    let peers = near.map(|(rank, fd)| fd.map(|fd| map_peer(fd, writers, bytes_of(rank))).transpose());
    let (peers, own_segment) = (peers.collect::<Result<_>>()?, own.for_peers);
    // The next rank of the node; alone, this one once more.
    fds.rotate_left(star.rank() + 1);
    let next = fds.into_iter().flatten().next().map_or_else(|| own_segment.try_clone(), Ok);
    let next = next.map_err(|e| Error::os("dup", e))?;
    Ok(Segments { own: own.mapping, peers, found_by: [own_segment, next] })
}

/// Hands the segment that this rank has `created`, or why it has none, to the ranks of its node, and gives theirs by rank, after
/// checking that each has `bytes_of` its rank and cannot shrink. Collective.
fn exchange_created(
    star: &mut Star,
    created: Result<OwnSegment>,
    flavour: MemoryFlavour,
    bytes_of: impl Fn(usize) -> usize,
    deadline: Instant,
) -> Result<(OwnSegment, Vec<Option<OwnedFd>>)> {
    let bytes = bytes_of(star.rank()) as u64;
    let announcement: Announcement = created.as_ref().map(|_| bytes).map_err(|err| err.to_string());
    let fds: Vec<_> = created.iter().map(|segment| segment.for_peers.as_fd()).collect();
    let parts = star.exchange(&encode(&announcement)?, &fds, deadline);
    // Its own failure is what a rank reports first.
    let (created, parts) = (created?, parts?);
    let mut peers = Vec::with_capacity(parts.len());
    for (rank, (blob, fds)) in parts.into_iter().enumerate() {
        announced(rank, &blob, bytes_of(rank))?;
        let fd = star.is_near(rank).then(|| checked_fd(fds, rank, flavour, bytes_of(rank)));
        peers.push(fd.transpose()?);
    }
    Ok((created, peers))
}

/// Where what far ranks put for this node lands: this rank's segment, and those of the other ranks of the node.
pub(crate) struct LandingSegments {
    pub(crate) own: Arc<Mapping>,
    pub(crate) peers: Landings,
}

/// By rank, its segment and the segment's bytes.
pub(crate) struct Landings(Vec<Option<(OwnedFd, usize)>>);

impl Landings {
    /// Maps a part of a near rank's landing segment.
    pub(crate) fn map(&self, rank: usize, offset: usize, bytes: usize) -> Result<Mapping> {
        match &self.0[rank] {
            Some((fd, all)) if offset + bytes <= *all => Mapping::read_only_part(fd, offset, bytes),
            _ => Err(Error::Corrupt {
                rank,
                what: "its landing segment's bytes",
                value: 0,
                limit: (offset + bytes) as u64,
            }),
        }
    }
}

/// Creates a segment of `bytes_of` its rank on every rank, for far ranks to put into and near ones to read. Collective, as
/// [`exchange_segments`].
///
/// It is always a memfd: most of it is never touched, which a reservation in `/dev/shm` would have to pay for.
pub(crate) fn exchange_landings(
    star: &mut Star,
    bytes_of: impl Fn(usize) -> usize,
    deadline: Instant,
) -> Result<LandingSegments> {
    let bytes_of = |rank| bytes_of(rank).max(1).next_multiple_of(4096);
    let flavour = MemoryFlavour::Memfd;
    let created = OwnSegment::create(flavour, Writers::Owner, bytes_of(star.rank()), false);
    let (own, fds) = exchange_created(star, created, flavour, bytes_of, deadline)?;
    let peers = fds.into_iter().enumerate().map(|(rank, fd)| Some((fd?, bytes_of(rank)))).collect();
    Ok(LandingSegments { own: Arc::new(own.mapping), peers: Landings(peers) })
}

/// Checks what a rank has announced.
fn announced(rank: usize, blob: &[u8], bytes: usize) -> Result<()> {
    let announced = decode::<Announcement>(blob)?.map_err(|why| Error::Bootstrap {
        during: "creating shared memory",
        source: std::io::Error::other(format!("rank {rank}: {why}")),
    })?;
    if announced == bytes as u64 {
        return Ok(());
    }
    Err(Error::Mismatch {
        rank,
        what: "segment size".to_owned(),
        theirs: announced.to_string(),
        ours: bytes.to_string(),
    })
}

/// The one descriptor that came with an announcement, of a segment that is as large as was said and cannot shrink.
fn checked_fd(fds: Vec<OwnedFd>, rank: usize, flavour: MemoryFlavour, bytes: usize) -> Result<OwnedFd> {
    let missing = Error::Corrupt { rank, what: "its segment's descriptors", value: 0, limit: 1 };
    let fd = fds.into_iter().next().ok_or(missing)?;
    check_segment(&fd, rank, flavour, bytes)?;
    Ok(fd)
}

/// Opens this rank's place on the network.
#[cfg_attr(not(test), allow(unused_variables))]
pub(crate) fn open_endpoint(config: &Config, id: &UniqueId, star: &Star) -> Result<Box<dyn Endpoint>> {
    #[cfg(any(test, fuzzing))]
    if let Some(endpoint) = config.pretence.as_ref().and_then(|p| p.endpoint(id, star.rank(), star.nodes().len())) {
        return Ok(endpoint);
    }
    // Without an address the ranks met on one machine, whatever they are told.
    let source = star.local_address().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let ranks = star.nodes().len();
    ofi::open(&ofi::Options { provider: config.fabric.clone(), source: Some(source), ranks, wakes: true })
}

/// Refuses sizes that this machine cannot hold once every page has been touched.
pub(crate) fn check_memory(what: &'static str, bytes_per_rank: usize, ranks_here: usize) -> Result<()> {
    let needed = (bytes_per_rank as u64).saturating_mul(ranks_here as u64);
    match machine::available_memory() {
        Some(available) if needed > available => Err(Error::NotEnoughMemory { what, needed, available }),
        _ => Ok(()),
    }
}

/// Packs a set-up message.
pub(crate) fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(message)
        .map_err(|e| Error::Bootstrap { during: "packing a set-up message", source: std::io::Error::other(e) })
}

/// Unpacks a set-up message of another rank.
pub(crate) fn decode<'a, T: Deserialize<'a>>(blob: &'a [u8]) -> Result<T> {
    postcard::from_bytes(blob)
        .map_err(|e| Error::Bootstrap { during: "reading a set-up message", source: std::io::Error::other(e) })
}

/// The memories of all ranks of a communicator.
pub(crate) struct Fabric {
    /// This rank's outbox, writable.
    pub(crate) outbox: Arc<Mapping>,
    /// This rank's symmetric heap.
    pub(crate) heap: Arc<Mapping>,
    peers: Vec<Peer>,
    /// Of the outboxes: kept open for whoever looks on from outside.
    _found_by: [OwnedFd; 2],
    /// The ranks of other nodes, if there are any.
    pub(crate) far: Option<Far>,
}

/// How one rank is reached.
pub(crate) struct Peer {
    /// Its outbox, or where what it puts of that lands: read-only.
    pub(crate) outbox: Arc<Mapping>,
    /// What else there is of a rank of this node.
    pub(crate) near: Option<shm::Near>,
}

impl Fabric {
    /// Of `segments`, the outboxes and the heaps. `landing` has the landing zones of far ranks.
    pub(crate) fn new(
        outboxes: Segments,
        heaps: Segments,
        pids: &[u32],
        mut landing: impl FnMut(usize) -> Result<Arc<Mapping>>,
    ) -> Result<Self> {
        let mut peers = Vec::with_capacity(pids.len());
        for (rank, ((outbox, heap), &pid)) in outboxes.peers.into_iter().zip(heaps.peers).zip(pids).enumerate() {
            peers.push(match (outbox, heap) {
                (Some(outbox), Some(heap)) => {
                    Peer { outbox: Arc::new(outbox), near: Some(shm::Near { heap: Arc::new(heap), pid }) }
                }
                _ => Peer { outbox: landing(rank)?, near: None },
            });
        }
        let (outbox, heap) = (Arc::new(outboxes.own), Arc::new(heaps.own));
        Ok(Fabric { outbox, heap, peers, _found_by: outboxes.found_by, far: None })
    }

    /// How `rank` is reached. `rank` was checked before.
    pub(crate) fn peer(&self, rank: usize) -> &Peer {
        &self.peers[rank]
    }

    /// The way to `rank`, if that is a far one.
    pub(crate) fn far_to(&self, rank: usize) -> Option<&Far> {
        self.far.as_ref().filter(|_| self.peers[rank].near.is_none())
    }

    /// The far ranks, with the way to them.
    pub(crate) fn far(&self) -> impl Iterator<Item = (usize, &Far)> {
        let far = self.far.iter().flat_map(|far| (0..self.peers.len()).map(move |rank| (rank, far)));
        far.filter(|(rank, _)| self.peers[*rank].near.is_none())
    }
}
