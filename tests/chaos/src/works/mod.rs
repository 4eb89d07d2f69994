//! What the ranks do, and what must come of it: each byte that arrives is compared with what it must be.

mod collectives;
mod exchange;
mod messages;
mod pages;
mod parts;
mod roles;
mod signals;

use clap::ValueEnum;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use xccl::{Communicator, Config, Error, MemoryFlavour, Moe, UniqueId};

use crate::case::{Case, JOINING};

/// Why a rank could not play a round to its end.
#[derive(Debug)]
pub enum Fault {
    /// A call has failed; the ranks that it blames, as the whole communicator numbers them.
    Told { blamed: Vec<usize>, err: Box<Error>, text: String },
    /// Something is not as it must be.
    Wrong(String),
}

pub type Played<T = ()> = Result<T, Fault>;

impl From<Error> for Fault {
    fn from(err: Error) -> Self {
        let text = format!("{err:?}: {err}");
        Fault::Told { blamed: blamed_by(&err), err: Box::new(err), text }
    }
}

impl From<anyhow::Error> for Fault {
    fn from(err: anyhow::Error) -> Self {
        Fault::Wrong(format!("{err:#}"))
    }
}

impl Fault {
    /// As the whole communicator numbers the ranks of a part.
    fn of_part(self, members: &[usize]) -> Self {
        match self {
            Fault::Told { blamed, err, text } => {
                let text = format!("in a part of ranks {members:?}: {text}");
                let blamed = blamed.into_iter().map(|rank| members.get(rank).copied().unwrap_or(usize::MAX)).collect();
                Fault::Told { blamed, err, text }
            }
            wrong => wrong,
        }
    }
}

/// Says what is wrong unless it is right.
fn check(right: bool, what: impl FnOnce() -> String) -> Played {
    if right { Ok(()) } else { Err(Fault::Wrong(what())) }
}

/// The ranks whose end an error tells of.
fn blamed_by(err: &Error) -> Vec<usize> {
    match err {
        Error::PeerDied { rank, .. } | Error::PeerUnreachable { rank, .. } => vec![*rank],
        // Before a rank has said who it is, nobody knows that it was ever there.
        Error::MissingRanks { ranks, .. } => ranks.clone(),
        Error::RootUnreachable { .. } | Error::HostUnreachable { .. } => vec![0],
        _ => vec![],
    }
}

/// The variant's name.
pub fn kind_of(err: &Error) -> String {
    let text = format!("{err:?}");
    text.split([' ', '(', '{']).next().unwrap_or_default().to_owned()
}

/// One kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Work {
    Messages,
    AnySource,
    Exchange,
    Apart,
    Collectives,
    Started,
    Barriers,
    Signals,
    Atomics,
    Pages,
    Split,
    Duplicate,
    /// The last of them.
    Renew,
}

impl Work {
    pub fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

/// What is drawn alike on every rank.
fn common(case: &Case, round: u32) -> StdRng {
    StdRng::seed_from_u64(case.seed ^ u64::from(round) << 32)
}

/// What all ranks do in a round.
pub fn of_round(case: &Case, round: u32) -> Work {
    if let Some(work) = case.work {
        return work;
    }
    // To join anew takes until the deadline if somebody does not come: at the end, where the deadline may be short.
    let all = Work::value_variants();
    match round == case.rounds && case.renews {
        true => Work::Renew,
        false => all[common(case, round).random_range(0..all.len() - 1)],
    }
}

/// Byte `i` of what `from` has for `to`.
fn byte(salt: u64, from: usize, to: usize, i: usize) -> u8 {
    let word = (i as u64 >> 3).wrapping_add(salt).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (from * 131 + to * 7) as u64;
    (word >> (i % 8 * 7)) as u8 ^ i as u8
}

fn bytes(salt: u64, from: usize, to: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| byte(salt, from, to, i)).collect()
}

/// A rank with all that it keeps from round to round.
pub struct Player<'c> {
    case: &'c Case,
    rank: usize,
    ranks: usize,
    comm: Communicator,
    /// Handles live as long as their communicator, or shorter.
    moe: Option<(exchange::Shape, Moe)>,
}

fn config(case: &Case) -> Config {
    Config::default()
        .timeout(Some(case.patience()))
        .memory(if case.posix { MemoryFlavour::Posix } else { MemoryFlavour::Memfd })
        .progress_thread(case.progress_thread)
        .p2p_ring_bytes(32 << 10)
        .heap_bytes(1 << 20)
}

impl<'c> Player<'c> {
    pub fn join(case: &'c Case, rank: usize, id: &UniqueId) -> Played<Self> {
        let comm = Communicator::init(rank, case.ranks(), id, config(case))?;
        Ok(Player { case, rank, ranks: case.ranks(), comm, moe: None })
    }

    pub fn play(&mut self, work: Work, round: u32) -> Played {
        let mut rng = common(self.case, round);
        let _: u32 = rng.random();
        match work {
            Work::Messages => messages::ring(&self.comm, &mut rng),
            Work::AnySource => messages::any_source(&self.comm, &mut rng),
            Work::Exchange => self.exchange(&mut rng),
            Work::Apart => roles::apart(&self.comm, &mut rng),
            Work::Collectives => collectives::one_after_another(&self.comm, &mut rng),
            Work::Started => collectives::started(&self.comm, &mut rng),
            Work::Barriers => Ok((0..rng.random_range(1..20)).try_for_each(|_| self.comm.barrier())?),
            Work::Signals => signals::neighbours(&self.comm, &mut rng),
            Work::Atomics => signals::tickets(&self.comm, &mut rng),
            Work::Pages => pages::transfer(&self.comm, &mut rng),
            Work::Split => parts::split(&self.comm, &mut rng),
            Work::Duplicate => parts::duplicate(&self.comm, &mut rng),
            Work::Renew => self.renew(),
        }
    }

    /// After a death was told, every later call that needs all ranks says so.
    pub fn says_so_again(&self, first: &Fault) -> Played {
        let Fault::Told { blamed, err, text } = first else { return Ok(()) };
        // What was found by missing a rank elsewhere is not known here yet, and another one may be dead besides.
        if !matches!(**err, Error::PeerDied { .. } | Error::PeerUnreachable { .. }) || text.contains("in a part of") {
            return Ok(());
        }
        match self.comm.barrier() {
            Err(Error::PeerDied { rank, .. } | Error::PeerUnreachable { rank, .. })
                if blamed.contains(&rank) || self.case.blows.iter().any(|blow| blow.rank == rank) =>
            {
                Ok(())
            }
            other => Err(Fault::Wrong(format!("after {text}: barrier gave {other:?}"))),
        }
    }

    /// All leave, and join anew.
    fn renew(&mut self) -> Played {
        let mut id = [0u8; 128];
        if self.rank == 0 {
            let made = match self.case.is_far() {
                true => UniqueId::new_at(([127, 0, 0, 1], 0).into()),
                false => UniqueId::new(),
            };
            id = *made?.as_bytes();
        }
        self.comm.broadcast(&mut id, 0)?;
        self.moe = None;
        let id = UniqueId::from_bytes(&id)?;
        let config = config(self.case).timeout(Some(JOINING));
        self.comm = Communicator::init(self.rank, self.ranks, &id, config)?;
        Ok(())
    }
}
