//! Which ranks live on one node: those that can hand descriptors to each other.

use std::fs;
use std::os::linux::fs::MetadataExt;

use sha2::{Digest, Sha256};

use super::UniqueId;
use super::unique_id::hex;
use crate::error::{Error, Result};

const NODE_ID: &str = "XCCL_NODE_ID";

/// Ranks of one node, and no others, have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeKey(pub(super) [u8; 32]);

impl NodeKey {
    /// For ranks that have met over a Unix socket: what they pretend (`XCCL_NODE_ID`) is all that can part them.
    pub(super) fn pretended() -> Result<Self> {
        Ok(NodeKey::of(&pretended_id()?))
    }

    /// For ranks that have met over TCP: what their kernel, their network namespace (which holds the names of abstract
    /// sockets) and their user are, and what they pretend. So a wrong `XCCL_NODE_ID` parts ranks, and never joins what
    /// cannot be joined.
    pub(super) fn of_this_process() -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_string()).unwrap_or_default();
        let kernel = read("/proc/sys/kernel/random/boot_id");
        // Hosts that were started from one snapshot share their boot id.
        let name = read("/proc/sys/kernel/hostname");
        let network = fs::metadata("/proc/self/ns/net").map_or(0, |namespace| namespace.st_ino());
        let user = nix::unistd::geteuid();
        Ok(NodeKey::of(&format!("{kernel} {name} {network} {user} {}", pretended_id()?)))
    }

    /// The name of the socket at which this node's ranks of a communicator meet, and their secret.
    pub(super) fn socket_of(&self, id: &UniqueId) -> (String, [u8; 32]) {
        let derive = |purpose: &str| -> [u8; 32] {
            let mut hash = Sha256::new();
            hash.update(purpose);
            hash.update(id.secret());
            hash.update(self.0);
            hash.finalize().into()
        };
        let name = hex(&derive("xccl node's socket")[..8]);
        (format!("{}-{name}", id.socket_name()), derive("xccl node's secret"))
    }

    pub(super) fn of(text: &str) -> Self {
        NodeKey(Sha256::digest(text).into())
    }
}

fn pretended_id() -> Result<String> {
    let Some(id) = std::env::var_os(NODE_ID) else { return Ok(String::new()) };
    let id = id.to_string_lossy().trim().to_string();
    if id.is_empty() {
        let expected = "a text that the ranks of one node share, or no such variable".to_string();
        return Err(Error::Config { option: NODE_ID, value: id, expected });
    }
    Ok(id)
}

/// Numbers the nodes in the order of their lowest ranks.
pub(super) fn number(keys: &[NodeKey]) -> Vec<usize> {
    let mut seen: Vec<NodeKey> = vec![];
    let number = |key: &NodeKey| {
        seen.iter().position(|k| k == key).unwrap_or_else(|| {
            seen.push(*key);
            seen.len() - 1
        })
    };
    keys.iter().map(number).collect()
}

/// Whether nodes are numbered as [`number`] does it.
pub(super) fn is_numbering(nodes: &[usize]) -> bool {
    let mut next = 0;
    nodes.iter().all(|&node| {
        let fits = node <= next;
        next = next.max(node + usize::from(fits));
        fits
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_numbered_in_the_order_of_their_lowest_ranks() {
        let keys = ["b", "a", "b", "c", "a"].map(NodeKey::of);
        assert_eq!(number(&keys), [0, 1, 0, 2, 1]);
        for (nodes, fits) in [
            (&[0, 1, 0, 2, 1][..], true),
            (&[0, 0], true),
            (&[], true),
            (&[1, 0], false),
            (&[0, 2], false),
            (&[0, 1, usize::MAX], false),
        ] {
            assert_eq!(is_numbering(nodes), fits, "{nodes:?}");
        }
    }

    #[test]
    fn a_process_is_on_its_own_node() {
        assert_eq!(NodeKey::of_this_process().unwrap(), NodeKey::of_this_process().unwrap());
        assert_ne!(NodeKey::of_this_process().unwrap(), NodeKey::pretended().unwrap());
    }
}
