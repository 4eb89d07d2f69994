//! What travels over the bootstrap's connections: messages of a four-byte mark and then postcard.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::sync::Operation;

/// The largest blob of one rank in an exchange.
pub(crate) const MAX_BLOB: usize = 64 * 1024;
/// The most descriptors of one rank in an exchange.
pub(crate) const MAX_DESCRIPTORS: usize = 16;
/// The most ranks: rank 0 holds a connection to each, and names them all in one message.
pub(crate) const MAX_WORLD_SIZE: usize = 4096;
/// The longest message. A receiver's buffer has this size, so that nothing a peer says makes it allocate more.
pub(super) const MAX_MESSAGE: usize = MAX_BLOB + 1024;
/// The longest greeting; a verdict that quotes one field of it and one of rank 0's still fits a message.
pub(super) const MAX_HELLO: usize = 16 * 1024;

/// Starts every message. The digit changes with the messages below.
const MARK: [u8; 4] = *b"xcb2";

/// A field of the configuration that must be equal on all ranks: its name and its value.
pub(super) type Field = (String, String);

/// A rank's greeting, and its request to join.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub secret: [u8; 32],
    pub rank: usize,
    pub world_size: usize,
    /// Used where the kernel does not tell (another pid namespace, another host).
    pub pid: u32,
    /// Equal on ranks of one node.
    pub node: [u8; 32],
    /// How much longer the rank is going to wait. Rank 0 waits no longer than the least patient rank, so that each is
    /// still there to hear the verdict.
    pub patience: Duration,
    pub description: Vec<Field>,
}

/// Leaves the secret out.
impl fmt::Debug for Hello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hello {{ rank: {} of {}, pid: {} }}", self.rank, self.world_size, self.pid)
    }
}

/// From a rank to rank 0.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ToRoot<'a> {
    Hello(Hello),
    /// The rank's part of exchange number `round`; `fds` descriptors travel with it, or, where this connection cannot carry
    /// them, over the node's own.
    Part {
        round: u64,
        fds: usize,
        #[serde(borrow)]
        blob: &'a [u8],
    },
    /// The rank leaves the communicator, as it may.
    Goodbye,
}

/// From rank 0 to a rank.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromRoot<'a> {
    /// Everybody has joined; the process and the node of each rank, and rank 0's own address.
    Welcome { pids: Vec<u32>, nodes: Vec<usize>, address: Option<SocketAddr> },
    /// Another rank's part of exchange number `round`.
    Part {
        round: u64,
        rank: usize,
        fds: usize,
        #[serde(borrow)]
        blob: &'a [u8],
    },
    /// The set-up has failed.
    Verdict(Verdict),
    /// A rank is gone without having left.
    Lost { rank: usize },
    /// Rank 0 leaves the communicator, as it may.
    Goodbye,
}

/// Why the set-up failed, in a form that rank 0 can tell the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Verdict {
    Refused { why: String },
    Mismatch { rank: usize, what: String, theirs: String, ours: String },
    InvalidRank { rank: usize, world_size: usize },
    DuplicateRank { rank: usize, first_pid: u32, second_pid: u32 },
    MissingRanks { ranks: Vec<usize>, world_size: usize, waited: Duration, turned_away: String },
    PeerDied { rank: usize },
    Timeout { peer: Option<usize>, waited: Duration, waited_for: String },
    Failed { why: String },
}

impl Verdict {
    /// Whether it blames none but ranks that there are.
    pub(super) fn is_of(&self, ranks: usize) -> bool {
        match self {
            Verdict::PeerDied { rank } => *rank < ranks,
            Verdict::Timeout { peer, .. } => peer.is_none_or(|rank| rank < ranks),
            Verdict::MissingRanks { ranks: missing, .. } => missing.iter().all(|&rank| rank < ranks),
            _ => true,
        }
    }
}

impl From<Verdict> for Error {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Refused { why } => Error::Refused { why },
            Verdict::Mismatch { rank, what, theirs, ours } => Error::Mismatch { rank, what, theirs, ours },
            Verdict::InvalidRank { rank, world_size } => Error::InvalidRank { rank, world_size },
            Verdict::DuplicateRank { rank, first_pid, second_pid } => {
                Error::DuplicateRank { rank, first_pid, second_pid }
            }
            Verdict::MissingRanks { ranks, world_size, waited, turned_away } => {
                Error::MissingRanks { ranks, world_size, waited, turned_away }
            }
            Verdict::PeerDied { rank } => Error::PeerDied { rank, during: Operation::Init, epoch: 0 },
            Verdict::Timeout { peer, waited, waited_for } => {
                Error::Timeout { during: Operation::Init, epoch: 0, peer, waited, waited_for }
            }
            Verdict::Failed { why } => {
                Error::Bootstrap { during: "exchanging with the other ranks", source: io::Error::other(why) }
            }
        }
    }
}

impl From<&Error> for Verdict {
    fn from(error: &Error) -> Self {
        match error {
            Error::Refused { why } => Verdict::Refused { why: why.clone() },
            Error::Mismatch { rank, what, theirs, ours } => {
                Verdict::Mismatch { rank: *rank, what: what.clone(), theirs: theirs.clone(), ours: ours.clone() }
            }
            Error::InvalidRank { rank, world_size } => Verdict::InvalidRank { rank: *rank, world_size: *world_size },
            Error::DuplicateRank { rank, first_pid, second_pid } => {
                Verdict::DuplicateRank { rank: *rank, first_pid: *first_pid, second_pid: *second_pid }
            }
            Error::MissingRanks { ranks, world_size, waited, turned_away } => Verdict::MissingRanks {
                ranks: ranks.clone(),
                world_size: *world_size,
                waited: *waited,
                turned_away: turned_away.clone(),
            },
            Error::PeerDied { rank, .. } => Verdict::PeerDied { rank: *rank },
            Error::Timeout { peer, waited, waited_for, .. } => {
                Verdict::Timeout { peer: *peer, waited: *waited, waited_for: waited_for.clone() }
            }
            Error::Bootstrap { source, .. } => Verdict::Failed { why: source.to_string() },
            other => Verdict::Failed { why: other.to_string() },
        }
    }
}

/// Writes a message out.
pub(super) fn encode(message: &impl Serialize) -> Result<Vec<u8>> {
    let bytes = postcard::to_extend(message, MARK.to_vec())
        .map_err(|e| Error::Bootstrap { during: "writing a message", source: io::Error::other(e) })?;
    if bytes.len() > MAX_MESSAGE {
        let why = format!("it has {} bytes, the limit is {MAX_MESSAGE}", bytes.len());
        return Err(Error::Bootstrap { during: "writing a message", source: io::Error::other(why) });
    }
    Ok(bytes)
}

/// Reads a message; `None` where the bytes are no such message, to the last one.
pub(super) fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    let (message, rest) = postcard::take_from_bytes(bytes.strip_prefix(&MARK)?).ok()?;
    rest.is_empty().then_some(message)
}

/// Finds the first field in which `theirs` differs from `ours`: its name, their value and ours.
pub(super) fn first_difference(theirs: &[Field], ours: &[Field]) -> Option<(String, String, String)> {
    let value_in = |fields: &[Field], name: &str| {
        fields.iter().find(|(n, _)| n == name).map_or_else(|| "(absent)".to_string(), |(_, value)| value.clone())
    };
    ours.iter()
        .chain(theirs)
        .map(|(name, _)| (name.clone(), value_in(theirs, name), value_in(ours, name)))
        .find(|(_, theirs, ours)| theirs != ours)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hello() -> Hello {
        Hello {
            secret: [7; 32],
            rank: 3,
            world_size: 8,
            pid: 4711,
            node: [9; 32],
            patience: Duration::from_millis(1500),
            description: vec![("heap".to_string(), "1048576".to_string())],
        }
    }

    fn verdicts() -> Vec<Verdict> {
        let text = || "text".to_string();
        vec![
            Verdict::Refused { why: text() },
            Verdict::Mismatch { rank: 1, what: text(), theirs: text(), ours: text() },
            Verdict::InvalidRank { rank: 9, world_size: 8 },
            Verdict::DuplicateRank { rank: 2, first_pid: 10, second_pid: 11 },
            Verdict::MissingRanks {
                ranks: vec![1, 5],
                world_size: 8,
                waited: Duration::from_secs(3),
                turned_away: text(),
            },
            Verdict::PeerDied { rank: 4 },
            Verdict::Timeout { peer: Some(1), waited: Duration::from_secs(1), waited_for: text() },
            Verdict::Failed { why: text() },
        ]
    }

    #[test]
    fn every_verdict_survives_the_wire_and_being_an_error() {
        for verdict in verdicts() {
            let bytes = encode(&FromRoot::Verdict(verdict.clone())).unwrap();
            let Some(FromRoot::Verdict(read)) = decode(&bytes) else { panic!("{verdict:?} was not read back") };
            assert_eq!(read, verdict);
            assert_eq!(Verdict::from(&Error::from(read)), verdict);
        }
    }

    #[test]
    fn the_largest_part_and_the_largest_welcome_fit_a_message() {
        let blob = vec![255; MAX_BLOB];
        let fds = MAX_DESCRIPTORS;
        encode(&ToRoot::Part { round: u64::MAX, fds, blob: &blob }).unwrap();
        encode(&FromRoot::Part { round: u64::MAX, rank: usize::MAX, fds, blob: &blob }).unwrap();
        let nodes = vec![MAX_WORLD_SIZE; MAX_WORLD_SIZE];
        let address = Some((std::net::Ipv6Addr::LOCALHOST, u16::MAX).into());
        encode(&FromRoot::Welcome { pids: vec![u32::MAX; MAX_WORLD_SIZE], nodes, address }).unwrap();
        let ranks = (0..MAX_WORLD_SIZE).collect();
        let (waited, turned_away) = (Duration::MAX, "x".repeat(1024));
        let verdict = Verdict::MissingRanks { ranks, world_size: MAX_WORLD_SIZE, waited, turned_away };
        encode(&FromRoot::Verdict(verdict)).unwrap();
    }

    #[test]
    fn the_first_differing_field_is_named_even_where_one_side_lacks_it() {
        let field = |name: &str, value: &str| (name.to_string(), value.to_string());
        let ours = [field("a", "1"), field("b", "2")];
        assert_eq!(first_difference(&ours, &ours), None);
        let differs = |theirs: &[Field]| first_difference(theirs, &ours).map(|(what, theirs, _)| (what, theirs));
        assert_eq!(differs(&[field("b", "3"), field("a", "1")]), Some(field("b", "3")));
        assert_eq!(differs(&ours[..1]), Some(field("b", "(absent)")));
        let more = [ours[0].clone(), ours[1].clone(), field("c", "4")];
        assert_eq!(differs(&more), Some(field("c", "4")));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn garbage_is_never_more_than_no_message(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<ToRoot>(&bytes);
            let marked = [&MARK[..], &bytes].concat();
            let _ = decode::<ToRoot>(&marked);
            let _ = decode::<FromRoot>(&marked);
        }

        #[test]
        fn a_hello_with_damaged_bytes_is_never_a_panic(at in 0usize..64, value: u8, keep in 0usize..80) {
            let mut bytes = encode(&ToRoot::Hello(hello())).unwrap();
            let len = bytes.len();
            bytes[at % len] = value;
            let _ = decode::<ToRoot>(&bytes);
            bytes.truncate(keep);
            let _ = decode::<ToRoot>(&bytes);
        }

        #[test]
        fn bytes_after_a_message_are_refused(more in prop::collection::vec(any::<u8>(), 1..8)) {
            let mut bytes = encode(&ToRoot::Hello(hello())).unwrap();
            prop_assert!(decode::<ToRoot>(&bytes).is_some());
            bytes.extend(more);
            prop_assert!(decode::<ToRoot>(&bytes).is_none());
        }
    }
}
