//! The communicator: a group of ranks that can reach each other's memory.

mod abort;
#[cfg(test)]
mod age_tests;
mod agreement;
mod bells;
pub(crate) mod config;
pub(crate) mod ending;
#[cfg(test)]
pub(crate) mod far_tests;
mod heap_buffer;
pub(crate) mod inner;
pub(crate) mod layout;
mod rollback;
mod seeing;
mod shrink;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};

pub use config::{Config, Origin, Setting};
pub use heap_buffer::HeapBuffer;
use inner::{CommInner, Descent};

use crate::bootstrap::{Launch, Rendezvous, UniqueId};
use crate::error::{Error, Result};
use crate::fabric::{self, NetworkProvider, ofi};
use crate::memory::machine;
use crate::p2p::Calibration;
use crate::sync::CoreSharing;

/// A group of ranks. Cheap to clone: clones are handles of the same communicator, and it is left when the last one is
/// dropped (handles made from it, such as [`Moe`](crate::Moe), count).
///
/// A communicator may be used from several threads; calls that all ranks make together (barrier, split, new handles) must
/// be made in the same order everywhere.
///
/// ```
/// use xccl::{Communicator, Config, UniqueId};
/// # fn main() -> xccl::Result<()> {
/// let id = UniqueId::new()?; // one rank makes it, the application hands it to the others
/// let comm = Communicator::init(0, 1, &id, Config::default())?;
/// assert_eq!((comm.rank(), comm.world_size()), (0, 1));
/// comm.barrier()?;
/// comm.destroy();
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Communicator {
    pub(crate) inner: Arc<CommInner>,
}

/// What a communicator's rank has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable, Serialize)]
#[repr(C)]
#[non_exhaustive]
pub struct Statistics {
    /// Messages sent.
    pub messages_sent: u64,
    /// Bytes of those messages.
    pub bytes_sent: u64,
    /// Messages received.
    pub messages_received: u64,
    /// Bytes of those messages.
    pub bytes_received: u64,
    /// Messages among those sent that were only described, and copied once by the receiver.
    pub rendezvous: u64,
    /// MoE exchanges finished.
    pub exchanges: u64,
    /// Tokens dispatched.
    pub tokens: u64,
    /// Token rows put to other nodes: one per token and node that has experts of it.
    pub far_rows: u64,
    /// Sums put back to other nodes: one per token of theirs with experts here that this rank answers for.
    pub far_sums: u64,
    /// Data puts to other nodes, of any kind.
    pub far_puts: u64,
    /// Bytes of those puts.
    pub far_bytes: u64,
    /// Records put to other nodes: short messages, words, and what comes after data. Of up to 256 bytes.
    pub far_records: u64,
    /// Waits that were not satisfied at once.
    pub waits: u64,
    /// Waits among them that went on to give the core away (`sched_yield`) before they ended.
    pub waits_yielded: u64,
    /// Waits among them that went to sleep.
    pub waits_slept: u64,
    /// Microseconds spent in them.
    pub waited_us: u64,
    /// Sleeping ranks that this one has woken.
    pub wake_ups: u64,
}

/// Memory that a communicator takes on each rank, as its configuration implies it. Pages count once they are touched, and each
/// page once on the machine, however many ranks map it.
///
/// With W ranks and a ring of R bytes (`XCCL_P2P_RING`) to each, the outbox has 5376 bytes (most of them to show what the rank does), and
/// for each rank 13 bytes and two bits, a line, twice 64 words of eight bytes, 64 lines and the ring, parts rounded up to lines and pages.
/// Collectives add 32 slots of 4 KiB and four of 256 KiB:
///
/// ```text
/// outbox  = page(page(5376 + line(8 W + 8) + line(4 W) + 2 line(W / 8) + line(W) + 64 W + 1024 W) + 4096 W + R W) + 1191936
/// touched = a page or a few of words, 4096 bytes and the used part of R for each rank that was sent to, and the used slots
/// heap    = 4096 + XCCL_HEAP, touched as it is allocated and written
/// ```
///
/// Where the ranks are on several nodes, R is 1 MiB unless it was set, and each rank has besides, for each rank of another node, a
/// landing zone as large as an outbox, of which the ring to this rank and some words are touched, and two rings of 16 KiB for
/// records; and 4 MiB that one-sided puts leave from.
///
/// A [`Moe`](crate::Moe) handle adds [`MoeConfig::outbox_bytes`](crate::MoeConfig::outbox_bytes). Every rank maps the segments of
/// all, so that addresses grow with W for each and with W² on the machine; memory does not. What grows with W² in memory are the
/// page tables: eight bytes per rank for each page of a peer that it reads.
///
/// ```
/// use xccl::{Communicator, Config};
/// let (line, page, ring) = (|n: usize| n.next_multiple_of(64), |n: usize| n.next_multiple_of(4096), 1 << 20);
/// let words = |w: usize| 5376 + line(8 * w + 8) + line(4 * w) + 2 * line(w.div_ceil(8)) + line(w) + 1088 * w;
/// let by_formula = |w: usize| page(page(words(w)) + 4096 * w + ring * w) + 1191936;
/// for ranks in [1, 2, 8, 64, 1000] {
///     let plan = Communicator::memory_plan(ranks, &Config::default().p2p_ring_bytes(ring));
///     assert_eq!(plan.outbox_bytes, by_formula(ranks), "{ranks} ranks");
/// }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Bytes of the outbox: written by its owner alone.
    pub outbox_bytes: usize,
    /// Bytes of the symmetric heap.
    pub heap_bytes: usize,
}

/// What a rank says of itself when a communicator is split.
#[derive(Serialize, Deserialize)]
struct Split {
    color: Option<u32>,
    key: i32,
    /// The id of the new communicator, if this rank becomes its rank 0; or why it has none.
    id: std::result::Result<Vec<u8>, String>,
}

impl Communicator {
    /// Joins the communicator of `world_size` ranks that share `id`. Blocks until all have joined, or the deadline. Only an id
    /// with an address ([`UniqueId::new_at`]) joins ranks of several hosts.
    ///
    /// # Errors
    /// [`Error::MissingRanks`], [`Error::DuplicateRank`], [`Error::Mismatch`] and the other errors of joining, on every
    /// rank that has joined; [`Error::NotEnoughMemory`] before anything is created.
    pub fn init(rank: usize, world_size: usize, id: &UniqueId, config: Config) -> Result<Self> {
        Self::meet(rank, world_size, &Rendezvous::from(id), config)
    }

    fn meet(rank: usize, world_size: usize, rendezvous: &Rendezvous, config: Config) -> Result<Self> {
        Ok(Communicator { inner: Arc::new(CommInner::init(rank, world_size, rendezvous, config, Descent::New)?) })
    }

    /// Joins the communicator of all ranks that a launcher (`xccl run`, torchrun, mpirun, srun) has started, configured by
    /// the `XCCL_…` variables. Where the launcher has started them on several hosts, they meet at rank 0's address, as
    /// [`Launch::rendezvous`] tells it; calls of this function by the same processes meet there one after the other.
    ///
    /// # Errors
    /// [`Error::NotLaunched`] outside of a launcher, otherwise as [`init`](Self::init).
    pub fn from_env() -> Result<Self> {
        Self::from_env_with(Config::from_env()?)
    }

    /// As [`from_env`](Self::from_env), with a configuration of the application's.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn from_env_with(config: Config) -> Result<Self> {
        // The n-th communicator that this process makes from its environment meets the others' n-th.
        static SEQUENCE: AtomicU64 = AtomicU64::new(0);
        let launch = Launch::from_env()?;
        let id = UniqueId::from_job(&launch.job, SEQUENCE.fetch_add(1, Relaxed));
        Self::meet(launch.rank, launch.world_size, &Rendezvous::new(id, launch.place()), config)
    }

    /// This process's rank: 0 to `world_size - 1`.
    pub fn rank(&self) -> usize {
        self.inner.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.inner.world_size
    }

    /// The node of a rank: ranks of one node reach each other's memory, others over the network. Nodes are numbered in the order
    /// of their lowest ranks.
    ///
    /// # Errors
    /// [`Error::InvalidRank`].
    pub fn node_of(&self, rank: usize) -> Result<usize> {
        self.inner.check_rank(rank)?;
        Ok(self.inner.nodes[rank])
    }

    /// The configuration in force.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// What this rank has done so far.
    pub fn statistics(&self) -> Statistics {
        self.inner.statistics(self.inner.p2p.traffic())
    }

    /// How messages from private memory travel, and how that was chosen.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, Origin, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default().rendezvous_bytes(1 << 20))?;
    /// assert_eq!(comm.calibration().origin, Origin::Code); // alone, there is nobody to measure with
    /// # Ok(())
    /// # }
    /// ```
    pub fn calibration(&self) -> &Calibration {
        &self.inner.calibration
    }

    /// Whether `rank` can copy from this rank's private memory (`process_vm_readv`), as was tried when joining.
    ///
    /// # Errors
    /// [`Error::InvalidRank`].
    pub fn cma_readable_by(&self, rank: usize) -> Result<bool> {
        self.inner.check_rank(rank)?;
        Ok(self.inner.can_read_me(rank))
    }

    /// How the ranks share the cores of their machine, which decides how they wait: as it was when they joined.
    pub fn core_sharing(&self) -> &CoreSharing {
        &self.inner.core_sharing
    }

    /// How `ranks` ranks would share cores, each of which may use what this process may.
    pub fn core_sharing_of(ranks: usize) -> CoreSharing {
        CoreSharing::of(&vec![machine::cores(); ranks])
    }

    /// Memory that a communicator of `world_size` ranks takes on each of them. Pages count once they are touched.
    pub fn memory_plan(world_size: usize, config: &Config) -> MemoryPlan {
        MemoryPlan { outbox_bytes: layout::CommLayout::new(world_size, config).bytes, heap_bytes: config.heap_bytes }
    }

    /// The network providers of this machine's libfabric, the one that `config` chooses first. Loads the library; blocks while it
    /// looks for devices, a second at most.
    ///
    /// ```
    /// match xccl::Communicator::network_providers(&xccl::Config::default()) {
    ///     Ok(providers) => assert!(providers.iter().filter(|p| p.chosen).count() <= 1),
    ///     Err(err) => assert!(err.to_string().contains("libfabric1")), // not installed
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Error::FabricLibrary`] where libfabric 1.17 or later is not installed.
    pub fn network_providers(config: &Config) -> Result<Vec<NetworkProvider>> {
        ofi::providers(config.fabric.as_deref())
    }

    /// Allocates on this rank's symmetric heap: sends from there are copied once, by the receiver. Zeroed only when
    /// allocated for the first time. Aligned to 256 bytes.
    ///
    /// # Errors
    /// [`Error::HeapExhausted`].
    pub fn heap_alloc(&self, bytes: usize) -> Result<HeapBuffer> {
        HeapBuffer::new(self.inner.clone(), bytes)
    }

    /// Divides the ranks by colour; in each new communicator they are ordered by `key`, then by rank here. Every rank must
    /// call it; one that passes no colour gets `None`.
    ///
    /// # Errors
    /// As [`init`](Self::init).
    pub fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Communicator>> {
        // A port that was taken for it is given back in the end, unless this rank becomes rank 0.
        let reserved = self.inner.star().new_id(false);
        let id = reserved.as_ref().map(|id| id.0.as_bytes().to_vec()).map_err(|err| err.to_string());
        let mine = fabric::encode(&Split { color, key, id })?;
        let parts = self.inner.star().exchange(&mine, &[], self.inner.deadline())?;
        let mut members = vec![];
        for (rank, (blob, _)) in parts.iter().enumerate() {
            let part: Split = fabric::decode(blob)?;
            if color.is_some() && part.color == color {
                members.push((part.key, rank, part.id));
            }
        }
        members.sort_by_key(|&(key, rank, _)| (key, rank));
        let Some(new_rank) = members.iter().position(|&(_, rank, _)| rank == self.rank()) else {
            return Ok(None);
        };
        let (_, root, id) = &members[0];
        let id = id.as_ref().map_err(|why| Error::Bootstrap {
            during: "making an id for the new communicator",
            source: std::io::Error::other(format!("rank {root}: {why}")),
        })?;
        let id: &[u8; 128] = id.as_slice().try_into().map_err(|_| Error::Corrupt {
            rank: *root,
            what: "the length of a unique id",
            value: id.len() as u64,
            limit: 128,
        })?;
        let (id, config) = (UniqueId::from_bytes(id)?, self.config().clone());
        let inner =
            CommInner::init(new_rank, members.len(), &Rendezvous::from(&id), config, Descent::Part(&self.inner))?;
        Ok(Some(Communicator { inner: Arc::new(inner) }))
    }

    /// Another communicator of the same ranks: its messages and exchanges never meet this one's. Every rank must call it.
    ///
    /// # Errors
    /// As [`init`](Self::init).
    pub fn duplicate(&self) -> Result<Communicator> {
        match self.split(Some(0), 0)? {
            Some(comm) => Ok(comm),
            None => Err(Error::InvalidRank { rank: self.rank(), world_size: self.world_size() }),
        }
    }

    /// Ends every pending and later wait of every rank with [`Error::Aborted`]: those of this process's other threads, those that
    /// are asleep, and those of other nodes. Does not block. Only the first abort of a rank counts, and none counts after a death,
    /// which is what the ranks are told then.
    ///
    /// A call that need not wait may still succeed.
    pub fn abort(&self) {
        self.inner.abort(0, "");
    }

    /// As [`abort`](Self::abort), with a number and a reason that every rank is told: up to 112 bytes of it.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, Error, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// comm.abort_with(17, "the scheduler has cancelled the batch");
    /// let Err(Error::Aborted { by: 0, code: 17, why, .. }) = comm.recv(0, 1, &mut [0]) else { panic!() };
    /// assert_eq!(why, "the scheduler has cancelled the batch");
    /// # Ok(())
    /// # }
    /// ```
    pub fn abort_with(&self, code: i32, why: &str) {
        self.inner.abort(code, why);
    }

    /// Leaves the communicator: the same as dropping this handle. Never blocks; ranks may leave in any order, and what this
    /// rank has already sent can still be received.
    pub fn destroy(self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Moe, MoeConfig, Routing};

    fn alone(config: Config) -> Communicator {
        Communicator::init(0, 1, &UniqueId::new().unwrap(), config).unwrap()
    }

    #[test]
    fn statistics_count_messages_exchanges_and_tokens() {
        let comm = alone(Config::default());
        for len in [0, 10, 50_000] {
            comm.send(0, 1, &vec![1; len]).unwrap();
            comm.recv(0, 1, &mut vec![0; len]).unwrap();
        }
        let moe = Moe::new(&comm, MoeConfig::new(4, 8, 1, 2, DType::F32)).unwrap();
        for tokens in [3, 0, 4] {
            let routing = (vec![1i32; tokens], vec![1.0; tokens]);
            let (sent, batch) = moe.dispatch(&vec![1.0f32; tokens * 8], &Routing::new(&routing.0, &routing.1)).unwrap();
            moe.combine(sent, batch, &mut vec![0.0f32; tokens * 8]).unwrap();
        }
        let s = comm.statistics();
        assert_eq!((s.messages_sent, s.bytes_sent, s.messages_received, s.bytes_received), (3, 50_010, 3, 50_010));
        assert_eq!((s.exchanges, s.tokens), (3, 7));
        // A handle's clones count together, another communicator for itself.
        assert_eq!(comm.clone().statistics(), s);
        assert_eq!(comm.duplicate().unwrap().statistics().messages_sent, 0);
    }

    #[test]
    fn handles_outlive_the_communicator_they_were_made_from() {
        let comm = alone(Config::default().heap_bytes(1 << 20));
        let (block, twin) = (comm.heap_alloc(1000).unwrap(), comm.duplicate().unwrap());
        let moe = Moe::new(&comm, MoeConfig::new(4, 8, 1, 2, DType::F32)).unwrap();
        comm.destroy();
        let (sent, batch) = moe.dispatch(&[1.0f32; 8], &Routing::new(&[0i32], &[1.0])).unwrap();
        moe.combine(sent, batch, &mut [0.0f32; 8]).unwrap();
        drop(moe);
        assert_eq!(block.len(), 1000);
        twin.barrier().unwrap();
    }

    #[test]
    fn the_plan_is_what_is_mapped() {
        let config = Config::default().heap_bytes(3 << 20);
        let plan = Communicator::memory_plan(1, &config);
        let comm = alone(config);
        let fabric = &comm.inner.fabric;
        assert_eq!(fabric.outbox.len(), plan.outbox_bytes);
        assert_eq!(fabric.heap.len(), plan.heap_bytes + layout::HEAP_START);
    }
}
