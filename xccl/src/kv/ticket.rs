//! Naming a request.

use std::fmt;

use crate::bootstrap::MAX_WORLD_SIZE;

/// A request in flight, as its receiver or its sender names it. A number that is never used again by its handle, so that a
/// request that is over is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KvTicket(u64);

const SLOT_BITS: u32 = 8;
const PEER_BITS: u32 = 12;
/// Requests in flight between two ranks that a ticket can tell apart.
pub(super) const MAX_REQUESTS: usize = 1 << SLOT_BITS;
/// The largest number of a request: reached after centuries of a request per microsecond.
pub(super) const MAX_NUMBER: u64 = u64::MAX >> (SLOT_BITS + PEER_BITS);

const _: () = assert!(MAX_WORLD_SIZE <= 1 << PEER_BITS);

impl KvTicket {
    pub(super) fn new(peer: usize, slot: usize, number: u64) -> Self {
        KvTicket(number << (SLOT_BITS + PEER_BITS) | (peer as u64) << SLOT_BITS | slot as u64)
    }

    pub(super) fn peer(self) -> usize {
        (self.0 >> SLOT_BITS) as usize & ((1 << PEER_BITS) - 1)
    }

    pub(super) fn slot(self) -> usize {
        self.0 as usize & (MAX_REQUESTS - 1)
    }

    pub(super) fn number(self) -> u64 {
        self.0 >> (SLOT_BITS + PEER_BITS)
    }

    /// For keeping it where only numbers can be kept.
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// What [`to_bits`](Self::to_bits) gave. Other numbers name no request.
    pub fn from_bits(bits: u64) -> Self {
        KvTicket(bits)
    }
}

impl fmt::Display for KvTicket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {} with rank {}", self.number(), self.peer())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_keeps_its_parts() {
        for (peer, slot, number) in [(0, 0, 1), (MAX_WORLD_SIZE - 1, MAX_REQUESTS - 1, MAX_NUMBER), (7, 3, 1 << 30)] {
            let ticket = KvTicket::from_bits(KvTicket::new(peer, slot, number).to_bits());
            assert_eq!((ticket.peer(), ticket.slot(), ticket.number()), (peer, slot, number));
        }
    }
}
