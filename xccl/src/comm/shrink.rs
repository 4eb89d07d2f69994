//! Going on with those that are left: the [agreement](super::agreement) on boards in shared memory, and the new communicator.
//!
//! A rank's board lies in its outbox. A field that says that others may be read is stored after them, with release order; between
//! nodes the changes travel as records, which are applied in their order. What is built needs no connection of the old communicator:
//! its ranks meet anew, at a socket whose name and secret all derive from the old id, the attempt and the members. Where members live
//! on several hosts, the first of them takes a port, and tells its address on its board.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Instant;

use super::Communicator;
use super::agreement::{Agreement, Board, Outcome, Ranks, Seen, Step};
use super::inner::{Call, CommInner, Descent, lock};
use crate::bootstrap::{Limit, Rendezvous};
use crate::error::{Error, Result};
use crate::fabric::far::OUTBOX;
use crate::fabric::plane::Update;
use crate::memory::layout::{LINE, Layout};
use crate::memory::mapping::Mapping;
use crate::sync::progress::{Operation, Waiting};

const DURING: Operation = Operation::Shrink;

/// Where a rank's board lies in its outbox.
#[derive(Clone, Debug)]
pub(crate) struct BallotLayout {
    joined: usize,
    proposed: usize,
    built: usize,
    settled: usize,
    gave_up: usize,
    /// The attempt that `address` is for, and four words: family and port, scope, and the IP.
    placed: usize,
    address: usize,
    members: usize,
    /// Words of `members`.
    words: usize,
}

impl BallotLayout {
    pub(crate) fn new(layout: &mut Layout, world_size: usize) -> Self {
        let words = world_size.div_ceil(64);
        let start = layout.add(2 * LINE + words * 8);
        let [joined, proposed, built, settled, gave_up, placed] = std::array::from_fn(|i| start + i * 8);
        let (address, members) = (start + LINE, start + 2 * LINE);
        BallotLayout { joined, proposed, built, settled, gave_up, placed, address, members, words }
    }

    /// The board's area: offset and bytes.
    #[cfg(test)]
    pub(crate) fn area(&self) -> (usize, usize) {
        (self.joined, 2 * LINE + self.words * 8)
    }

    fn read(&self, from: &Mapping) -> Board {
        let word = |at: usize| from.word64(at).load(Acquire);
        let outcome = |at: usize| {
            let word = word(at);
            let outcome = match word & 3 {
                1 => Some(Outcome::Done),
                2 => Some(Outcome::Retry),
                3 => Some(Outcome::Failed),
                _ => None,
            };
            (word >> 2, outcome)
        };
        let (joined, proposed) = (word(self.joined), word(self.proposed));
        let members = (0..self.words).map(|i| from.word64(self.members + i * 8).load(Relaxed));
        Board {
            joined,
            proposed,
            members: Ranks::from_words(members.collect()),
            built: outcome(self.built),
            settled: outcome(self.settled),
            gave_up: word(self.gave_up) != 0,
        }
    }

    /// The words in which `board` differs from what was published before, those first that others must not be read without.
    fn changes(&self, before: &Board, board: &Board) -> Vec<(usize, u64)> {
        let outcome = |(attempt, outcome): (u64, Option<Outcome>)| {
            attempt << 2
                | match outcome {
                    None => 0,
                    Some(Outcome::Done) => 1,
                    Some(Outcome::Retry) => 2,
                    Some(Outcome::Failed) => 3,
                }
        };
        let mut changes = vec![];
        let mut add = |at: usize, was: u64, is: u64| {
            if was != is {
                changes.push((at, is));
            }
        };
        for (i, &word) in board.members.words().iter().enumerate() {
            add(self.members + i * 8, before.members.words().get(i).copied().unwrap_or(0), word);
        }
        add(self.joined, before.joined, board.joined);
        add(self.proposed, before.proposed, board.proposed);
        add(self.built, outcome(before.built), outcome(board.built));
        add(self.settled, outcome(before.settled), outcome(board.settled));
        add(self.gave_up, before.gave_up.into(), board.gave_up.into());
        changes
    }
}

/// Four words that carry an address.
fn address_words(address: SocketAddr) -> [u64; 4] {
    let (family, scope, ip) = match address {
        SocketAddr::V4(v4) => (4, 0, v4.ip().to_ipv6_mapped().to_bits()),
        SocketAddr::V6(v6) => (6, v6.scope_id(), v6.ip().to_bits()),
    };
    [family << 16 | u64::from(address.port()), scope.into(), (ip >> 64) as u64, ip as u64]
}

/// The address that another rank's words carry, if they do.
fn address_of([head, scope, high, low]: [u64; 4]) -> Option<SocketAddr> {
    let ip = std::net::Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low));
    match head >> 16 {
        4 => Some((IpAddr::V4(ip.to_ipv4_mapped()?), head as u16).into()),
        6 => Some(std::net::SocketAddrV6::new(ip, head as u16, 0, scope as u32).into()),
        _ => None,
    }
}

impl Seen for CommInner {
    fn board(&self, rank: usize) -> Board {
        self.layout.ballot.read(&self.fabric.peer(rank).outbox)
    }

    fn is_gone(&self, rank: usize) -> bool {
        self.ending.is_gone(rank)
    }
}

impl Communicator {
    /// A communicator of the ranks that are left, after others have died or left, in the order of their ranks here
    /// ([`former_ranks`](Self::former_ranks)). Ends this one as [`abort`](Self::abort) does, if it has not ended, so that all
    /// come: every rank that lives must call it, whatever its calls have ended with. All of them get the same members, although
    /// ranks die meanwhile, rank 0 too; a rank that dies just when it is through may still be a member, which later calls then
    /// tell. What was sent here and not received is lost. Handles ([`Moe`](crate::Moe), requests, memory) are made anew; this
    /// communicator may be dropped.
    ///
    /// Blocks until all that live have called it, or the deadline. Without anything having failed it gives another communicator
    /// of the same ranks.
    ///
    /// Between nodes a rank also counts as dead when it cannot be reached: where a network falls into parts, each part goes on for
    /// itself.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, Error, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let comm = match comm.barrier() {
    ///     Err(Error::PeerDied { .. } | Error::Aborted { .. }) => comm.shrink()?,
    ///     outcome => outcome.map(|()| comm)?,
    /// };
    /// # comm.shrink()?.barrier()
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Timeout`] and [`Error::GivenUp`], which names a rank that has met its deadline, or could not build the
    /// communicator; [`Error::LeftOut`] where the other ranks have gone on without this one, which they could not reach; on the rank
    /// that cannot build it, the errors of [`init`](Self::init). Nothing is left behind then.
    pub fn shrink(&self) -> Result<Communicator> {
        self.shrink_because("it shrinks")
    }

    /// Shrinks; who still waits here is told `why`.
    pub(super) fn shrink_because(&self, why: &str) -> Result<Communicator> {
        // One thread at a time.
        let _one = lock(&self.inner.shrinking);
        Shrinking::new(&self.inner).run(why)
    }

    /// For each rank its rank in the communicator that this one was [shrunk](Self::shrink) from; itself in any other.
    pub fn former_ranks(&self) -> &[usize] {
        &self.inner.former
    }
}

struct Shrinking<'a> {
    comm: &'a Arc<CommInner>,
    agreement: Agreement,
    published: Board,
    started: Instant,
    deadline: Instant,
}

impl<'a> Shrinking<'a> {
    fn new(comm: &'a Arc<CommInner>) -> Self {
        let published = comm.board(comm.rank);
        let agreement = Agreement::new(comm.rank, comm.world_size, published.clone());
        Shrinking { comm, agreement, published, started: Instant::now(), deadline: comm.deadline() }
    }

    fn run(mut self, why: &str) -> Result<Communicator> {
        let comm = self.comm;
        if self.published.gave_up {
            return Err(Error::GivenUp { rank: comm.rank, during: DURING, epoch: self.agreement.attempt() });
        }
        if comm.ending.cause().is_none() {
            comm.abort(0, why);
        }
        let outcome = self.agree();
        if let Err(err) = &outcome
            && !matches!(err, Error::GivenUp { .. })
        {
            tracing::debug!(%err, rank = comm.rank, "shrinking has failed");
        }
        outcome
    }

    fn agree(&mut self) -> Result<Communicator> {
        let mut made = None;
        let mut own_failure = None;
        self.publish();
        loop {
            match self.step()? {
                Step::Build => {
                    let built = self.build();
                    let outcome = match &built {
                        Ok(_) => Outcome::Done,
                        Err(err) => self.outcome_of(err),
                    };
                    self.agreement.built(outcome);
                    (made, own_failure) = (None, None);
                    match built {
                        Ok(built) => made = Some(built),
                        Err(err) => own_failure = Some(err),
                    }
                }
                Step::Done => {
                    if let Some(made) = made {
                        return Ok(made);
                    }
                    // Whoever has settled it has heard of this rank that it has built it.
                    return Err(Error::Corrupt { rank: self.comm.rank, what: "what was settled", value: 0, limit: 0 });
                }
                Step::Failed => return Err(own_failure.unwrap_or_else(|| self.failure_of_others())),
                Step::LeftOut => return Err(Error::LeftOut { during: DURING }),
                Step::GaveUp(rank) => {
                    let epoch = self.agreement.attempt();
                    self.give_up();
                    return Err(Error::GivenUp { rank, during: DURING, epoch });
                }
                Step::Moved | Step::Waits(_) => {}
            }
            self.publish();
        }
    }

    /// The next step that does more than wait.
    fn step(&mut self) -> Result<Step> {
        let comm = self.comm;
        let rank = match self.agreement.step(&**comm) {
            Step::Waits(rank) => rank,
            step => return Ok(step),
        };
        let agreement = &mut self.agreement;
        let what = Waiting { operation: DURING, epoch: agreement.attempt(), peer: Some(rank) };
        let limit = (self.started, self.deadline);
        let waited = comm.wait_unless(
            &mut Call::default(),
            what,
            || Some(agreement.step(&**comm)).filter(|step| !matches!(step, Step::Waits(_))),
            |_| match Instant::now() >= limit.1 {
                true => Err(comm.timed_out(&what, limit.0.elapsed())),
                false => Ok(()),
            },
        );
        if waited.is_err() {
            self.give_up();
        }
        waited
    }

    fn give_up(&mut self) {
        self.agreement.give_up();
        self.publish();
    }

    /// Publishes what has changed of the own board.
    fn publish(&mut self) {
        let comm = self.comm;
        let changes = comm.layout.ballot.changes(&self.published, self.agreement.own());
        comm.publish_words(&changes);
        self.published = self.agreement.own().clone();
    }

    /// Builds the communicator of the members that were agreed on.
    fn build(&self) -> Result<Communicator> {
        let (comm, attempt) = (self.comm, self.agreement.attempt());
        let members: Vec<usize> = self.agreement.members().iter().collect();
        let lookout = {
            let (comm, members) = (comm.clone(), members.clone());
            move || comm.still_builds(&members, attempt)
        };
        let limit = Limit { until: self.deadline, lookout: Some(Arc::new(lookout)) };
        let invalid = Error::InvalidRank { rank: comm.rank, world_size: members.len() };
        let rank = members.iter().position(|&member| member == comm.rank).ok_or(invalid)?;
        let is_spread = members.iter().any(|&member| comm.nodes[member] != comm.nodes[members[0]]);
        let words = self.agreement.members().words();
        // The first member keeps its port until the communicator is built.
        let needs_address = is_spread && comm.star().local_address().is_some();
        let (id, _reserved) = if !needs_address {
            (comm.unique_id.successor(attempt, words, None), None)
        } else if rank == 0 {
            let reserved = comm.star().successor_id(&comm.unique_id, attempt, words)?;
            if let Some(address) = reserved.0.address() {
                comm.place(address, attempt);
            }
            (reserved.0, Some(reserved))
        } else {
            (comm.unique_id.successor(attempt, words, Some(self.place_of(members[0], &limit)?)), None)
        };
        #[cfg_attr(not(test), allow(unused_mut))]
        let mut config = comm.config.clone();
        #[cfg(test)]
        {
            config.pretence = config.pretence.map(|pretence| Arc::new(pretence.rest(&members)));
        }
        let descent = Descent::Rest { of: comm, members: &members, limit };
        let inner = CommInner::init(rank, members.len(), &Rendezvous::from(&id), config, descent)?;
        Ok(Communicator { inner: Arc::new(inner) })
    }

    /// Where the first member waits for the others.
    fn place_of(&self, first: usize, limit: &Limit) -> Result<SocketAddr> {
        let (comm, attempt) = (self.comm, self.agreement.attempt());
        let board = &comm.layout.ballot;
        let outbox = &comm.fabric.peer(first).outbox;
        let what = Waiting { operation: DURING, epoch: attempt, peer: Some(first) };
        let started = self.started;
        comm.wait_unless(
            &mut Call::default(),
            what,
            || (outbox.word64(board.placed).load(Acquire) == attempt).then_some(()),
            |_| {
                limit.look_out()?;
                if limit.has_passed() { Err(comm.timed_out(&what, started.elapsed())) } else { Ok(()) }
            },
        )?;
        let words = std::array::from_fn(|i| outbox.word64(board.address + i * 8).load(Relaxed));
        address_of(words).ok_or(Error::Corrupt { rank: first, what: "its address", value: words[0], limit: 0 })
    }

    /// Whether building once more, without those that are gone, may help.
    fn outcome_of(&self, err: &Error) -> Outcome {
        let is_lost = |rank: usize| self.comm.is_gone(rank);
        match err {
            // The end of a connection is seen a moment before that of its process.
            Error::PeerDied { .. } | Error::GivenUp { .. } | Error::PeerUnreachable { .. } => Outcome::Retry,
            _ if self.agreement.members().iter().any(is_lost) => Outcome::Retry,
            _ => Outcome::Failed,
        }
    }

    fn failure_of_others(&self) -> Error {
        let attempt = self.agreement.attempt();
        let mut members = self.agreement.members().iter();
        let failed = members.find(|&rank| self.comm.board(rank).built == (attempt, Some(Outcome::Failed)));
        Error::GivenUp { rank: failed.unwrap_or(self.comm.rank), during: DURING, epoch: attempt }
    }
}

impl CommInner {
    /// Whether all members are still at building, or have built.
    fn still_builds(&self, members: &[usize], attempt: u64) -> Result<()> {
        if let Some(&rank) = members.iter().find(|&&rank| rank != self.rank && self.is_gone(rank)) {
            return Err(Error::PeerDied { rank, during: DURING, epoch: attempt });
        }
        let has_stopped = |rank: usize| {
            let board = self.board(rank);
            board.gave_up || (board.built.0 == attempt && board.built.1.is_some_and(|built| built != Outcome::Done))
        };
        match members.iter().find(|&&rank| rank != self.rank && has_stopped(rank)) {
            Some(&rank) => Err(Error::GivenUp { rank, during: DURING, epoch: attempt }),
            None => Ok(()),
        }
    }

    /// Tells where this rank waits for the other members.
    fn place(&self, address: SocketAddr, attempt: u64) {
        let board = &self.layout.ballot;
        let words = address_words(address).into_iter().enumerate().map(|(i, word)| (board.address + i * 8, word));
        let changes: Vec<_> = words.chain([(board.placed, attempt)]).collect();
        self.publish_words(&changes);
    }

    /// Stores words into the own outbox, in their order, and tells all ranks.
    fn publish_words(&self, changes: &[(usize, u64)]) {
        if changes.is_empty() {
            return;
        }
        changes.iter().for_each(|&(at, word)| self.fabric.outbox.word64(at).store(word, Release));
        self.notify_all();
        let update = |&(offset, value): &(usize, u64)| Update::Word64 { window: OUTBOX, offset, value };
        let updates: Vec<_> = changes.iter().map(update).collect();
        self.fabric.far().for_each(|(rank, far)| far.plane.send(rank, [], &updates));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::comm::far_tests::on_nodes;
    use crate::{Config, DType, Moe, MoeConfig};

    fn quick() -> Config {
        Config::default().timeout(Some(Duration::from_secs(20))).heap_bytes(1 << 16)
    }

    /// Every rank hears from every other one, and learns what it was once.
    fn all_are_there(comm: &Communicator, expected: &[usize]) {
        assert_eq!(comm.former_ranks(), expected);
        let former = comm.former_ranks()[comm.rank()] as i64;
        let mut all = vec![0i64; comm.world_size()];
        comm.all_gather(&[former], &mut all).unwrap();
        assert_eq!(all, expected.iter().map(|&rank| rank as i64).collect::<Vec<_>>());
        let (right, left) =
            ((comm.rank() + 1) % comm.world_size(), (comm.rank() + comm.world_size() - 1) % comm.world_size());
        comm.send(right, 1, &former.to_ne_bytes()).unwrap();
        let mut from_left = [0; 8];
        comm.recv(left, 1, &mut from_left).unwrap();
        assert_eq!(i64::from_ne_bytes(from_left), expected[left] as i64);
        Moe::new(comm, MoeConfig::new(4, 8, 1, comm.world_size(), DType::F32)).unwrap();
    }

    /// Some ranks leave, at some time; the others shrink, once and again.
    fn rest_goes_on(nodes: &[usize], seed: Option<u64>, leavers: &[usize]) {
        let rest: Vec<usize> = (0..nodes.len()).filter(|rank| !leavers.contains(rank)).collect();
        on_nodes(nodes, seed, quick(), |comm| {
            // Others may be ahead already.
            let _ = comm.barrier();
            if leavers.contains(&comm.rank()) {
                std::thread::sleep(Duration::from_millis(10 * comm.rank() as u64));
                return;
            }
            let first = comm.shrink().unwrap();
            drop(comm);
            all_are_there(&first, &rest);
            let second = first.shrink().unwrap();
            all_are_there(&second, &(0..rest.len()).collect::<Vec<_>>());
            assert!(matches!(first.barrier(), Err(Error::Aborted { .. })));
        });
    }

    #[test]
    fn those_that_are_left_go_on_together() {
        rest_goes_on(&[0; 4], None, &[]);
        rest_goes_on(&[0; 4], None, &[0]);
        rest_goes_on(&[0; 5], None, &[1, 4]);
        rest_goes_on(&[0; 3], None, &[0, 1]);
    }

    #[test]
    fn those_that_are_left_go_on_together_on_several_nodes() {
        rest_goes_on(&[0, 1, 0, 1], Some(1), &[]);
        rest_goes_on(&[0, 1, 0, 1, 2], Some(2), &[0]);
        rest_goes_on(&[0, 1, 0, 1, 2], Some(3), &[1, 3]);
        // All that are left are on one node.
        rest_goes_on(&[0, 1, 0], Some(4), &[1]);
    }

    #[test]
    fn a_shrink_ends_what_others_wait_in_and_an_abort_can_be_gone_on_after() {
        on_nodes(&[0; 3], None, quick(), |comm| {
            if comm.rank() == 1 {
                comm.abort_with(5, "again");
                comm.abort_with(6, "not heard");
            } else {
                let Err(Error::Aborted { by: 1, code: 5, why, .. }) = comm.recv(1, 1, &mut [0]) else { panic!() };
                assert_eq!(why, "again");
            }
            let comm = comm.shrink().unwrap();
            if comm.rank() > 0 {
                let outcome = comm.recv(0, 1, &mut [0]);
                assert!(matches!(outcome, Err(Error::Aborted { by: 0, .. })), "{outcome:?}");
            }
            all_are_there(&comm.shrink().unwrap(), &[0, 1, 2]);
        });
    }

    #[test]
    fn who_does_not_come_ends_the_shrink_at_the_deadline_for_good() {
        on_nodes(&[0; 3], None, quick().timeout(Some(Duration::from_millis(300))), |comm| {
            comm.barrier().unwrap();
            if comm.rank() == 2 {
                std::thread::sleep(Duration::from_millis(700));
            }
            let err = comm.shrink().err().unwrap();
            match err {
                Error::Timeout { during: Operation::Shrink, peer, .. } if comm.rank() < 2 => assert_eq!(peer, Some(2)),
                Error::GivenUp { during: Operation::Shrink, .. } => {}
                err => panic!("{err}"),
            }
            assert!(matches!(comm.shrink(), Err(Error::GivenUp { .. })));
        });
    }

    proptest! {
        #[test]
        fn a_board_is_read_as_it_was_published(
            ranks in 1usize..200, numbers: [u32; 4], outcomes: [u8; 2], gave_up: bool, members in prop::collection::vec(any::<u64>(), 4),
        ) {
            let mut layout = Layout::default();
            let board = BallotLayout::new(&mut layout, ranks);
            let memory = Mapping::anonymous(layout.bytes()).unwrap();
            let outcome = |n: u8| [None, Some(Outcome::Done), Some(Outcome::Retry), Some(Outcome::Failed)][usize::from(n % 4)];
            let before = board.read(&memory);
            let after = Board {
                joined: numbers[0].into(),
                proposed: numbers[1].into(),
                members: Ranks::from_words(members[..ranks.div_ceil(64)].to_vec()),
                built: (numbers[2].into(), outcome(outcomes[0])),
                settled: (numbers[3].into(), outcome(outcomes[1])),
                gave_up,
            };
            for (at, word) in board.changes(&before, &after) {
                memory.word64(at).store(word, Relaxed);
            }
            prop_assert_eq!(board.read(&memory), after);
        }

        #[test]
        fn an_address_survives_its_words(v4: [u8; 4], v6: u128, port: u16, scope: u32, words: [u64; 4]) {
            let v6 = std::net::SocketAddrV6::new(std::net::Ipv6Addr::from_bits(v6), port, 0, scope);
            for address in [SocketAddr::from((v4, port)), SocketAddr::V6(v6)] {
                prop_assert_eq!(address_of(address_words(address)), Some(address));
            }
            let _ = address_of(words);
        }
    }
}
