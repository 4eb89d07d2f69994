//! Ranks joined through rank 0: one connection from it to each other rank, for the communicator's life.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::UniqueId;
use super::gathering::Gathering;
use super::link::{Inbox, Link, Listener, Received, Sent, wait_until};
use super::message::{
    Field, FromRoot, Hello, MAX_BLOB, MAX_DESCRIPTORS, MAX_HELLO, MAX_WORLD_SIZE, ToRoot, Verdict, decode, encode,
};
use crate::error::{Error, Result};
use crate::sync::Operation;

/// The ranks wait this much longer than rank 0, so that they hear its verdict.
const FOR_THE_VERDICT: Duration = Duration::from_millis(500);
/// Waits between two attempts to reach rank 0.
const FIRST_RETRY: Duration = Duration::from_millis(1);
const LAST_RETRY: Duration = Duration::from_millis(50);

/// One rank's part of an exchange: its blob and its descriptors.
pub(crate) type Part = (Vec<u8>, Vec<OwnedFd>);

enum Role {
    Root {
        /// By rank; `None` for rank 0 itself.
        links: Vec<Option<Link>>,
    },
    Member(Link),
}

/// A rank's place among the ranks that have joined.
pub(crate) struct Star {
    rank: usize,
    pids: Vec<u32>,
    nodes: Vec<usize>,
    role: Role,
    inbox: Inbox,
    round: u64,
}

impl Star {
    /// Joins the ranks that share `id`; returns when all `world_size` have. `description` is what they must agree on.
    pub(crate) fn join(
        id: &UniqueId,
        rank: usize,
        world_size: usize,
        description: &[Field],
        deadline: Instant,
    ) -> Result<Star> {
        if world_size > MAX_WORLD_SIZE {
            let expected = format!("at most {MAX_WORLD_SIZE} ranks");
            return Err(Error::Config { option: "world size", value: world_size.to_string(), expected });
        }
        let version = ("version".to_string(), env!("CARGO_PKG_VERSION").to_string());
        let hello = Hello {
            secret: id.secret(),
            rank,
            world_size,
            pid: std::process::id(),
            patience: deadline.saturating_duration_since(Instant::now()),
            description: std::iter::once(version).chain(description.iter().cloned()).collect(),
        };
        if rank == 0 {
            if world_size == 1 {
                return Ok(Star::new(0, vec![hello.pid], Role::Root { links: vec![None] }));
            }
            if let Some(listener) = Listener::bind(&id.socket_name())? {
                let (links, pids) = Gathering::new(listener, hello, deadline).run()?;
                return Ok(Star::new(0, pids, Role::Root { links }));
            }
            // Somebody else is rank 0 already: say hello as rank 0 all the same, so that every rank learns of it.
        }
        Star::join_as_member(id, &hello, deadline)
    }

    fn new(rank: usize, pids: Vec<u32>, role: Role) -> Star {
        let nodes = vec![0; pids.len()];
        Star { rank, pids, nodes, role, inbox: Inbox::new(), round: 0 }
    }

    fn join_as_member(id: &UniqueId, hello: &Hello, deadline: Instant) -> Result<Star> {
        let started = Instant::now();
        let link = reach_root(&id.socket_name(), started, deadline)?;
        // Whoever took the name must be this user before it hears the secret.
        let ours = nix::unistd::geteuid().as_raw();
        let peer = link.peer()?;
        if peer.uid != ours {
            let why = format!("the job's socket belongs to user {}, this process runs as user {ours}", peer.uid);
            return Err(Error::Refused { why });
        }
        let bytes = encode(&ToRoot::Hello(hello.clone()))?;
        if bytes.len() > MAX_HELLO {
            let expected = format!("at most {MAX_HELLO} bytes in all");
            return Err(Error::Config { option: "configuration", value: format!("{} bytes", bytes.len()), expected });
        }
        let mut inbox = Inbox::new();
        // A refusal to take the greeting is told by the verdict that comes back, or by the lack of one.
        link.blocking_send(&bytes, &[], deadline)?;
        let until = deadline + FOR_THE_VERDICT;
        match link.blocking_receive(&mut inbox, until)? {
            Received::Message(len, _) => match decode(inbox.message(len)) {
                Some(FromRoot::Welcome { pids }) if pids.len() == hello.world_size => {
                    Ok(Star::new(hello.rank, pids, Role::Member(link)))
                }
                Some(FromRoot::Verdict(verdict)) => Err(verdict.into()),
                _ => Err(garbled("joining")),
            },
            Received::Nothing => Err(timed_out(0, started.elapsed(), "rank 0 has not said who joined")),
            Received::Closed => Err(died(0)),
            Received::TooLong | Received::DescriptorsLost => Err(garbled("joining")),
        }
    }

    /// This rank.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// The node of each rank.
    pub(crate) fn nodes(&self) -> &[usize] {
        &self.nodes
    }

    /// Takes the ranks for those of several nodes.
    #[cfg(test)]
    pub(crate) fn pretend(&mut self, nodes: &[usize]) {
        self.nodes = nodes.to_vec();
    }

    /// The process of each rank, as rank 0 sees it.
    pub(crate) fn pids(&self) -> &[u32] {
        &self.pids
    }

    /// Gives every rank's blob and descriptors to every rank, in rank order. Collective.
    pub(crate) fn exchange(&mut self, blob: &[u8], fds: &[BorrowedFd<'_>], deadline: Instant) -> Result<Vec<Part>> {
        if blob.len() > MAX_BLOB || fds.len() > MAX_DESCRIPTORS {
            let value = format!("{} bytes and {} descriptors", blob.len(), fds.len());
            let expected = format!("at most {MAX_BLOB} bytes and {MAX_DESCRIPTORS} descriptors");
            return Err(Error::Config { option: "a part of the set-up", value, expected });
        }
        self.round += 1;
        let own = fds.iter().map(|fd| fd.try_clone_to_owned()).collect::<std::io::Result<Vec<_>>>();
        let own: Part = (blob.to_vec(), own.map_err(|e| Error::os("dup", e))?);
        let Star { rank, role, inbox, round, pids, .. } = self;
        match role {
            Role::Root { links } => {
                let parts = collect(links, own, *round, inbox, deadline).and_then(|parts| {
                    spread(links, &parts, *round, deadline)?;
                    Ok(parts)
                });
                if let Err(error) = &parts {
                    tell_all(links.iter().flatten(), &error.into());
                }
                parts
            }
            Role::Member(link) => take_part(link, (*rank, pids.len()), own, *round, inbox, deadline),
        }
    }
}

/// Rank 0's first half: everybody's part.
fn collect(links: &[Option<Link>], own: Part, round: u64, inbox: &mut Inbox, deadline: Instant) -> Result<Vec<Part>> {
    let started = Instant::now();
    let mut parts: Vec<Option<Part>> = links.iter().map(|_| None).collect();
    parts[0] = Some(own);
    for (rank, link) in links.iter().enumerate().filter_map(|(r, l)| Some((r, l.as_ref()?))) {
        // A rank that dies while an earlier one is waited for is to be named, not the one that is only late.
        parts[rank] = loop {
            match link.try_receive(inbox)? {
                Received::Message(len, fds) => match decode(inbox.message(len)) {
                    Some(ToRoot::Part { round: r, fds: n, blob }) if r == round && n == fds.len() => {
                        break Some((blob.to_vec(), fds));
                    }
                    _ => return Err(garbled("collecting the ranks' parts")),
                },
                Received::Nothing if Instant::now() >= deadline => {
                    let why = format!("rank {rank} has not sent its part of the set-up");
                    return Err(timed_out(rank, started.elapsed(), &why));
                }
                Received::Nothing => await_any(links, rank, deadline)?,
                Received::Closed => return Err(died(rank)),
                Received::TooLong | Received::DescriptorsLost => return Err(garbled("collecting the ranks' parts")),
            }
        };
    }
    Ok(parts.into_iter().flatten().collect())
}

/// Waits until `rank` has sent something, looking out for hang-ups of any.
fn await_any(links: &[Option<Link>], rank: usize, deadline: Instant) -> Result<()> {
    use nix::poll::PollFlags;
    let ranks: Vec<usize> = (0..links.len()).filter(|&r| links[r].is_some()).collect();
    let events = |r: usize| if r == rank { PollFlags::POLLIN } else { PollFlags::empty() };
    let mut fds: Vec<_> = links.iter().enumerate().filter_map(|(r, l)| Some(l.as_ref()?.poll_fd(events(r)))).collect();
    wait_until(&mut fds, deadline)?;
    let hung_up =
        |fd: &nix::poll::PollFd| fd.revents().is_some_and(|r| r.intersects(PollFlags::POLLHUP | PollFlags::POLLERR));
    match ranks.iter().zip(&fds).find(|(r, fd)| **r != rank && hung_up(fd)) {
        Some((&dead, _)) => Err(died(dead)),
        None => Ok(()),
    }
}

/// Rank 0's second half: everybody's part to everybody else.
fn spread(links: &[Option<Link>], parts: &[Part], round: u64, deadline: Instant) -> Result<()> {
    let started = Instant::now();
    for (rank, (blob, fds)) in parts.iter().enumerate() {
        let bytes = encode(&FromRoot::Part { round, rank, fds: fds.len(), blob })?;
        let fds: Vec<BorrowedFd> = fds.iter().map(|fd| fd.as_fd()).collect();
        for (to, link) in links.iter().enumerate().filter(|&(to, _)| to != rank) {
            let Some(link) = link else { continue };
            match link.blocking_send(&bytes, &fds, deadline)? {
                Sent::Done => {}
                Sent::Full => {
                    let why = format!("rank {to} does not take the others' parts of the set-up");
                    return Err(timed_out(to, started.elapsed(), &why));
                }
                Sent::Closed => return Err(died(to)),
            }
        }
    }
    Ok(())
}

/// What the other ranks do: send their part, take everybody else's.
fn take_part(
    link: &Link,
    (own_rank, world_size): (usize, usize),
    own: Part,
    round: u64,
    inbox: &mut Inbox,
    deadline: Instant,
) -> Result<Vec<Part>> {
    let started = Instant::now();
    let bytes = encode(&ToRoot::Part { round, fds: own.1.len(), blob: &own.0 })?;
    let fds: Vec<BorrowedFd> = own.1.iter().map(|fd| fd.as_fd()).collect();
    link.blocking_send(&bytes, &fds, deadline)?;
    let mut own = Some(own);
    let mut parts = Vec::with_capacity(world_size);
    while parts.len() < world_size {
        if parts.len() == own_rank {
            parts.extend(own.take());
            continue;
        }
        let until = deadline + FOR_THE_VERDICT;
        match link.blocking_receive(inbox, until)? {
            Received::Message(len, fds) => match decode(inbox.message(len)) {
                Some(FromRoot::Part { round: r, rank, fds: n, blob })
                    if r == round && rank == parts.len() && n == fds.len() =>
                {
                    parts.push((blob.to_vec(), fds));
                }
                Some(FromRoot::Verdict(verdict)) => return Err(verdict.into()),
                _ => return Err(garbled("taking the ranks' parts")),
            },
            Received::Nothing => {
                return Err(timed_out(
                    0,
                    started.elapsed(),
                    "rank 0 has not passed on the others' parts of the set-up",
                ));
            }
            Received::Closed => return Err(died(0)),
            Received::TooLong | Received::DescriptorsLost => return Err(garbled("taking the ranks' parts")),
        }
    }
    Ok(parts)
}

fn reach_root(name: &str, started: Instant, deadline: Instant) -> Result<Link> {
    let mut pause = FIRST_RETRY;
    loop {
        if let Some(link) = Link::connect(name)? {
            return Ok(link);
        }
        if Instant::now() >= deadline {
            return Err(Error::RootUnreachable { waited: started.elapsed() });
        }
        std::thread::sleep(pause.min(deadline.saturating_duration_since(Instant::now())));
        pause = (pause * 2).min(LAST_RETRY);
    }
}

/// Sends a verdict to whoever can still hear it.
pub(super) fn tell_all<'a>(links: impl Iterator<Item = &'a Link>, verdict: &Verdict) {
    let Ok(bytes) = encode(&FromRoot::Verdict(verdict.clone())) else { return };
    for link in links {
        // One that cannot be told finds its connection closed.
        let _ = link.try_send(&bytes, &[]);
    }
}

fn died(rank: usize) -> Error {
    Error::PeerDied { rank, during: Operation::Init, epoch: 0 }
}

fn timed_out(peer: usize, waited: Duration, waited_for: &str) -> Error {
    let waited_for = waited_for.to_string();
    Error::Timeout { during: Operation::Init, epoch: 0, peer: Some(peer), waited, waited_for }
}

fn garbled(during: &'static str) -> Error {
    let why = "a message makes no sense, or this process ran out of descriptors (see ulimit -n)";
    Error::Bootstrap { during, source: std::io::Error::new(std::io::ErrorKind::InvalidData, why) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::thread;

    use super::*;
    use crate::bootstrap::link::tests::{content, memfd};

    fn fields(heap: &str) -> Vec<Field> {
        vec![("XCCL_HEAP".to_string(), heap.to_string())]
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// Joins with one thread per (rank, world size, heap), and gives each one's outcome.
    fn join_all(id: &UniqueId, ranks: &[(usize, usize, &str)], wait: Duration) -> Vec<Result<Star>> {
        let deadline = Instant::now() + wait;
        let join = |&(rank, world, heap): &(usize, usize, &str)| {
            let (id, fields) = (*id, fields(heap));
            thread::spawn(move || Star::join(&id, rank, world, &fields, deadline))
        };
        let threads: Vec<_> = ranks.iter().map(join).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    }

    fn all_exchange(world_size: usize) {
        let id = UniqueId::new().unwrap();
        let threads: Vec<_> = (0..world_size)
            .map(|rank| {
                thread::spawn(move || {
                    let mut star = Star::join(&id, rank, world_size, &fields("1"), soon()).unwrap();
                    for round in 0..3 {
                        let file = memfd(&format!("file {rank} {round}"));
                        let blob = format!("blob {rank} {round}");
                        let parts = star.exchange(blob.as_bytes(), &[file.as_fd()], soon()).unwrap();
                        assert_eq!(parts.len(), world_size);
                        for (peer, (blob, fds)) in parts.into_iter().enumerate() {
                            assert_eq!(blob, format!("blob {peer} {round}").as_bytes());
                            let contents: Vec<_> = fds.into_iter().map(content).collect();
                            assert_eq!(contents, [format!("file {peer} {round}")]);
                        }
                    }
                    assert_eq!(star.pids(), vec![std::process::id(); world_size]);
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn blobs_and_descriptors_reach_every_rank() {
        [1, 2, 8, 64].into_iter().for_each(all_exchange);
    }

    #[test]
    fn twenty_jobs_at_once_never_meet() {
        let threads: Vec<_> = (0..20).map(|_| thread::spawn(|| all_exchange(3))).collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn missing_ranks_are_named_to_all_that_came() {
        let id = UniqueId::new().unwrap();
        for outcome in join_all(&id, &[(0, 4, "1"), (2, 4, "1")], Duration::from_millis(300)) {
            let Err(Error::MissingRanks { ranks, world_size: 4, .. }) = outcome else { panic!("{:?}", outcome.err()) };
            assert_eq!(ranks, [1, 3]);
        }
    }

    #[test]
    fn without_rank_0_the_others_say_so_at_the_deadline() {
        let outcomes = join_all(&UniqueId::new().unwrap(), &[(1, 2, "1")], Duration::from_millis(200));
        assert!(matches!(outcomes[0], Err(Error::RootUnreachable { .. })));
    }

    #[test]
    fn a_rank_claimed_twice_is_an_error_everywhere() {
        for twice in [0, 1] {
            let id = UniqueId::new().unwrap();
            let ranks = [(0, 3, "1"), (1, 3, "1"), (twice, 3, "1")];
            for outcome in join_all(&id, &ranks, Duration::from_secs(5)) {
                let own = std::process::id();
                let Err(Error::DuplicateRank { rank, first_pid, second_pid }) = outcome else {
                    panic!("{:?}", outcome.err())
                };
                assert_eq!((rank, first_pid, second_pid), (twice, own, own));
            }
        }
    }

    #[test]
    fn a_differing_configuration_is_named_with_both_values_everywhere() {
        let id = UniqueId::new().unwrap();
        for outcome in join_all(&id, &[(0, 3, "1"), (1, 3, "1"), (2, 3, "2")], Duration::from_secs(5)) {
            let Err(Error::Mismatch { rank: 2, what, theirs, ours }) = outcome else { panic!("{:?}", outcome.err()) };
            assert_eq!((what.as_str(), theirs.as_str(), ours.as_str()), ("XCCL_HEAP", "2", "1"));
        }
    }

    #[test]
    fn a_differing_world_size_is_named_with_both_values_everywhere() {
        let id = UniqueId::new().unwrap();
        for outcome in join_all(&id, &[(0, 2, "1"), (1, 3, "1")], Duration::from_secs(5)) {
            let Err(Error::Mismatch { rank: 1, what, theirs, ours }) = outcome else { panic!("{:?}", outcome.err()) };
            assert_eq!((what.as_str(), theirs.as_str(), ours.as_str()), ("world size", "3", "2"));
        }
    }

    #[test]
    fn another_version_is_named_with_both_everywhere() {
        let id = UniqueId::new().unwrap();
        let newer = thread::spawn(move || {
            let description = vec![("version".to_string(), "9.9.9".to_string()), fields("1").remove(0)];
            let patience = Duration::from_secs(20);
            let hello = Hello { secret: id.secret(), rank: 2, world_size: 3, pid: 1, patience, description };
            Star::join_as_member(&id, &hello, soon())
        });
        let mut outcomes = join_all(&id, &[(0, 3, "1"), (1, 3, "1")], Duration::from_secs(5));
        outcomes.push(newer.join().unwrap());
        for outcome in outcomes {
            let Err(Error::Mismatch { rank: 2, what, theirs, ours }) = outcome else { panic!("{:?}", outcome.err()) };
            assert_eq!((what.as_str(), theirs.as_str()), ("version", "9.9.9"));
            assert_eq!(ours, env!("CARGO_PKG_VERSION"));
        }
    }

    #[test]
    fn strangers_do_no_harm() {
        let id = UniqueId::new().unwrap();
        let name = id.socket_name();
        let stranger = thread::spawn(move || {
            let link = reach_root(&name, Instant::now(), soon()).unwrap();
            link.blocking_send(b"xcb1 what is this", &[], soon()).unwrap();
            let silent = reach_root(&name, Instant::now(), soon()).unwrap();
            let liar = reach_root(&name, Instant::now(), soon()).unwrap();
            let hello = Hello {
                secret: [0; 32],
                rank: 1,
                world_size: 2,
                pid: 1,
                patience: Duration::from_secs(1),
                description: vec![],
            };
            liar.blocking_send(&encode(&ToRoot::Hello(hello)).unwrap(), &[], soon()).unwrap();
            let mut inbox = Inbox::new();
            let Received::Message(len, _) = liar.blocking_receive(&mut inbox, soon()).unwrap() else {
                panic!("no answer")
            };
            assert!(matches!(decode(inbox.message(len)), Some(FromRoot::Verdict(Verdict::Refused { .. }))));
            (link, silent, liar)
        });
        let root = { thread::spawn(move || Star::join(&id, 0, 2, &fields("1"), soon())) };
        let kept = stranger.join().unwrap();
        Star::join(&id, 1, 2, &fields("1"), soon()).unwrap();
        root.join().unwrap().unwrap();
        drop(kept);
    }

    #[test]
    fn a_rank_that_leaves_during_an_exchange_is_named_to_the_others() {
        let id = UniqueId::new().unwrap();
        let mut stars = join_all(&id, &[(0, 3, "1"), (1, 3, "1"), (2, 3, "1")], Duration::from_secs(5));
        drop(stars.pop());
        let threads =
            stars.into_iter().map(|star| thread::spawn(move || star.unwrap().exchange(b"", &[], soon()).err()));
        for thread in threads.collect::<Vec<_>>() {
            let error = thread.join().unwrap();
            assert!(matches!(error, Some(Error::PeerDied { rank: 2, .. })), "{error:?}");
        }
    }
}
