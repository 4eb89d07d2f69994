//! Nodes that only exist in the tests of one process: its ranks are threads, and far ones meet on a simulated network.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::endpoint::Endpoint;
use super::plane::simulated::{Simulated, network};
use crate::bootstrap::UniqueId;

/// By the id of a communicator, the endpoints of its ranks that are not taken yet.
type Networks = HashMap<[u8; UniqueId::LEN], Vec<Option<Simulated>>>;

/// Which rank is on which node.
#[derive(Debug)]
pub(crate) struct Pretence {
    pub(crate) nodes: Vec<usize>,
    /// How deep the network's queues are, and its seed; none for the real one.
    simulated: Option<(usize, u64)>,
    networks: Arc<Mutex<Networks>>,
}

impl Pretence {
    pub(crate) fn new(nodes: Vec<usize>, simulated: Option<(usize, u64)>) -> Self {
        Pretence { nodes, simulated, networks: Arc::default() }
    }

    /// The nodes of some of the ranks, on the same networks.
    pub(crate) fn rest(&self, members: &[usize]) -> Self {
        let mut seen = vec![];
        let number = |&member: &usize| {
            let node = self.nodes[member];
            seen.iter().position(|&other| other == node).unwrap_or_else(|| {
                seen.push(node);
                seen.len() - 1
            })
        };
        Pretence {
            nodes: members.iter().map(number).collect(),
            simulated: self.simulated,
            networks: self.networks.clone(),
        }
    }

    /// The place of `rank` in the communicator of that id, if the network is simulated.
    pub(crate) fn endpoint(&self, id: &UniqueId, rank: usize, ranks: usize) -> Option<Box<dyn Endpoint>> {
        let (depth, seed) = self.simulated?;
        let mut networks = self.networks.lock().unwrap();
        let network = networks
            .entry(*id.as_bytes())
            .or_insert_with(|| network(ranks, depth, seed).into_iter().map(Some).collect());
        Some(Box::new(network[rank].take().expect("each rank joins once")))
    }
}
