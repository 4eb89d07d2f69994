//! How senders and receivers learn of each other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::config::{KvConfig, PageLayout};
use crate::comm::inner::CommInner;
use crate::error::{Error, Result};
use crate::fabric;
use crate::onesided::{Remote, SharedBuffer};

/// What a rank is, and where the others find what they need.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Role {
    /// Where its mailboxes begin, one per rank.
    Sender { mailboxes: usize },
    /// Where its signals begin, for each rank; its pool.
    Receiver { signals: usize, pool: usize, layout: PageLayout },
}

#[derive(Serialize, Deserialize)]
struct Announcement {
    config: KvConfig,
    /// Or why it cannot take part.
    role: std::result::Result<Role, String>,
}

/// Tells all ranks what this one is, and learns what they are. Collective: a rank that cannot go on tells the others.
pub(super) fn meet(
    comm: &Arc<CommInner>,
    config: &KvConfig,
    own: std::result::Result<Role, &Error>,
) -> Result<Vec<Role>> {
    let (is_able, role) = (own.is_ok(), own.map_err(|err| err.to_string()));
    let mine = fabric::encode(&Announcement { config: *config, role })?;
    let parts = comm.star().exchange(&mine, &[], comm.deadline())?;
    let mut roles = Vec::with_capacity(parts.len());
    for (rank, (blob, _)) in parts.iter().enumerate() {
        let theirs: Announcement = fabric::decode(blob)?;
        if theirs.config != *config {
            let (what, theirs, ours) = ("the KV configuration", format!("{:?}", theirs.config), format!("{config:?}"));
            return Err(Error::Mismatch { rank, what: what.to_owned(), theirs, ours });
        }
        let role = theirs.role.map_err(|why| Error::Bootstrap {
            during: "setting up KV transfer",
            source: std::io::Error::other(format!("rank {rank}: {why}")),
        });
        roles.push(role);
    }
    // Whoever fails has a reason of its own to report, which comes before a peer's.
    if is_able { roles.into_iter().collect() } else { Ok(vec![]) }
}

/// The part of a rank's memory at `offset` that is for the peer with this number.
pub(super) fn part(rank: usize, offset: usize, bytes: usize, peer: usize) -> Remote {
    Remote { rank, offset: offset.saturating_add(bytes.saturating_mul(peer)), bytes }
}

/// Memory for words of peers, who may write there as long as the communicator lives: never given back.
pub(super) struct Control(Remote);

impl Control {
    pub(super) fn new(comm: &Arc<CommInner>, bytes: usize) -> Result<Self> {
        let block = SharedBuffer::new(comm.clone(), bytes)?;
        // Somebody's block before, perhaps.
        block.write(0, &vec![0; bytes])?;
        block.keep();
        Ok(Control(block.remote()))
    }

    pub(super) fn remote(&self) -> Remote {
        self.0
    }
}

/// Says when it is time for something that takes a system call.
pub(super) struct Seldom {
    last: Instant,
}

/// How late the end of a process is noticed by who only polls.
const BETWEEN: Duration = Duration::from_millis(2);

impl Seldom {
    pub(super) fn new() -> Self {
        Seldom { last: Instant::now() }
    }

    pub(super) fn is_time(&mut self) -> bool {
        let now = Instant::now();
        let is_time = now.duration_since(self.last) >= BETWEEN;
        if is_time {
            self.last = now;
        }
        is_time
    }
}
