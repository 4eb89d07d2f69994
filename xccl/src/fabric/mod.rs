//! How this rank reaches each other rank's memory.
//!
//! This is the seam between planes. The layers above ask [`Fabric::peer`] for a rank and never map, open or read anything
//! themselves. Today every peer is reached by load and store ([`shm`]); a plane of one-sided writes between nodes joins
//! here, as a second kind of peer whose outbox is a landing zone on this node.

pub(crate) mod cma;
pub(crate) mod endpoint;
pub(crate) mod plane;
pub(crate) mod shm;

use std::os::fd::AsFd;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::bootstrap::Star;
use crate::comm::Config;
use crate::error::{Error, Result};
use crate::memory::machine;
use crate::memory::mapping::Mapping;
use crate::memory::segment::{OwnSegment, Writers, map_peer};

/// This rank's outbox and every rank's, mapped.
pub(crate) struct Outboxes {
    pub(crate) own: Mapping,
    /// By rank, this rank's own (mapped read-only a second time) included.
    pub(crate) peers: Vec<Mapping>,
}

/// What a rank says of its segment: its bytes, the descriptor being sent along; or why it has none.
type Announcement = std::result::Result<u64, String>;

/// Creates a segment on every rank and maps all of them. Collective: a rank that cannot go on, for what has gone wrong
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
) -> Result<Outboxes> {
    let created = before.and_then(|()| OwnSegment::create(config.memory, writers, bytes, config.huge_pages));
    let announcement: Announcement = created.as_ref().map(|_| bytes as u64).map_err(|err| err.to_string());
    let fds: Vec<_> = created.iter().map(|segment| segment.for_peers.as_fd()).collect();
    let parts = star.exchange(&encode(&announcement)?, &fds, deadline);
    // Its own failure is what a rank reports first.
    let (created, parts) = (created?, parts?);
    let mut peers = Vec::with_capacity(parts.len());
    for (rank, (blob, fds)) in parts.into_iter().enumerate() {
        let announced = decode::<Announcement>(&blob)?.map_err(|why| Error::Bootstrap {
            during: "creating shared memory",
            source: std::io::Error::other(format!("rank {rank}: {why}")),
        })?;
        if announced != bytes as u64 {
            return Err(Error::Mismatch {
                rank,
                what: "segment size".to_owned(),
                theirs: announced.to_string(),
                ours: bytes.to_string(),
            });
        }
        let fd = fds.into_iter().next().ok_or(Error::Corrupt {
            rank,
            what: "its segment's descriptors",
            value: 0,
            limit: 1,
        })?;
        peers.push(map_peer(fd, rank, config.memory, writers, bytes)?);
    }
    Ok(Outboxes { own: created.mapping, peers })
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
    pub(crate) outbox: Mapping,
    peers: Vec<shm::Peer>,
}

impl Fabric {
    pub(crate) fn new(outboxes: Outboxes, heaps: Outboxes, pids: &[u32]) -> Self {
        let peers = outboxes.peers.into_iter().zip(heaps.peers).zip(pids);
        let peers = peers.map(|((outbox, heap), &pid)| shm::Peer { outbox, heap, pid }).collect();
        Fabric { outbox: outboxes.own, peers }
    }

    /// How `rank` is reached. `rank` was checked before.
    pub(crate) fn peer(&self, rank: usize) -> &shm::Peer {
        &self.peers[rank]
    }

    pub(crate) fn peers(&self) -> &[shm::Peer] {
        &self.peers
    }
}
