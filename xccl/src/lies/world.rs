//! Two ranks on one thread: one that goes on as if all were well, and one that lies.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::bootstrap::UniqueId;
use crate::comm::ending::LEFT;
use crate::comm::{Communicator, Config};
use crate::error::Result;
use crate::fabric::pretence::Pretence;
use crate::kv::{KvConfig, KvReceiver, KvSender, PageLayout};
use crate::moe::{Moe, MoeConfig, Reduction};

thread_local! {
    static IMPATIENT: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread's waits end at once: there is nobody else.
pub(crate) fn is_impatient() -> bool {
    IMPATIENT.get()
}

/// What both ranks have.
pub(super) struct World {
    pub(super) me: Rank,
    pub(super) liar: Rank,
}

/// One of them.
pub(super) struct Rank {
    pub(super) moes: Vec<Moe>,
    pub(super) pages: Option<Pages>,
    pub(super) comm: Communicator,
}

pub(super) enum Pages {
    Sender(KvSender),
    Receiver(KvReceiver),
}

/// What is made besides the communicators.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Kind {
    /// Nothing.
    Bare,
    Moes,
    /// This rank has pages, the liar wants some.
    Sends,
    /// This rank wants pages, the liar has some.
    Receives,
}

pub(super) const PAGES: usize = 6;

pub(super) fn kv() -> KvConfig {
    KvConfig::new(2, 64).max_pages(3).max_requests(2)
}

/// Experts, tokens and all are few: then random numbers are often right.
pub(super) fn moes() -> [MoeConfig; 3] {
    let plain = MoeConfig::new(3, 8, 2, 4, crate::dtype::DType::F32);
    let per_rank = MoeConfig { reduction: Reduction::PerRank, ..plain.clone() };
    let few = MoeConfig { max_expert_rows: Some(3), ..plain.clone() };
    [plain, per_rank, few]
}

impl World {
    /// On one node, or on two with a network that never loses anything.
    pub(super) fn new(nodes: [usize; 2], kind: Kind) -> World {
        IMPATIENT.set(false);
        let id = UniqueId::new().expect("an id");
        let mut config = Config::default().timeout(Some(Duration::from_secs(60))).heap_bytes(64 << 10);
        config = config.p2p_ring_bytes(16 << 10).unexpected_bytes(64 << 10).progress_thread(false).huge_pages(false);
        config.pretence = (nodes[0] != nodes[1]).then(|| Arc::new(Pretence::new(nodes.to_vec(), Some((40, 1)))));
        let join = |rank: usize| -> Result<Rank> {
            let comm = Communicator::init(rank, 2, &id, config.clone())?;
            let moes = match kind {
                Kind::Moes => moes().into_iter().map(|config| Moe::new(&comm, config)).collect::<Result<_>>()?,
                _ => vec![],
            };
            let layout = PageLayout::by_layer(&kv(), PAGES);
            let sender = || -> Result<Pages> { Ok(Pages::Sender(KvSender::new(&comm, kv(), layout)?)) };
            let receiver = || -> Result<Pages> {
                let pool = comm.shared_alloc(2 * PAGES * 64)?;
                Ok(Pages::Receiver(KvReceiver::new(&comm, kv(), pool, layout)?))
            };
            let pages = match (kind, rank) {
                (Kind::Sends, 0) | (Kind::Receives, 1) => Some(sender()?),
                (Kind::Sends, 1) | (Kind::Receives, 0) => Some(receiver()?),
                _ => None,
            };
            Ok(Rank { moes, pages, comm })
        };
        let world = std::thread::scope(|s| {
            let liar = s.spawn(|| join(1));
            let me = join(0);
            liar.join().map(|liar| World { me: me.expect("rank 0 joins"), liar: liar.expect("rank 1 joins") })
        });
        IMPATIENT.set(true);
        world.unwrap_or_else(|_| panic!("rank 1 has panicked"))
    }
}

impl Drop for World {
    /// What leaves waits until the ranks of other nodes have heard of it, and here is nobody else: each has left, as the other sees it.
    fn drop(&mut self) {
        for rank in [&self.me, &self.liar] {
            let (fabric, layout) = (&rank.comm.inner.fabric, &rank.comm.inner.layout);
            let landings = fabric.far().map(|(other, _)| &fabric.peer(other).outbox);
            landings.for_each(|landing| landing.word32(layout.state).store(LEFT, Relaxed));
        }
    }
}

/// Lends a world to a target, a new one now and then: what a liar has broken stays broken.
pub(super) fn with(
    kept: &'static std::thread::LocalKey<Cell<Option<(World, u32)>>>,
    make: impl FnOnce() -> World,
    target: impl FnOnce(&mut World),
) {
    const CASES: u32 = 500;
    let (mut world, cases) = kept.take().filter(|(_, cases)| *cases < CASES).unwrap_or_else(|| (make(), 0));
    target(&mut world);
    kept.set(Some((world, cases + 1)));
}
