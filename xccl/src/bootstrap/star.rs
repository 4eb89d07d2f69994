//! Ranks joined through rank 0: one connection from it to each other rank, for the communicator's life.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use super::gathering::{Gathered, Gathering};
use super::link::{Inbox, Limit, Link, Listener, Lookout, Received, Sent, has_hung_up, wait_until};
use super::message::{
    Field, FromRoot, Hello, MAX_BLOB, MAX_DESCRIPTORS, MAX_HELLO, MAX_WORLD_SIZE, ToRoot, Verdict, decode, encode,
};
use super::node::{self, NodeKey};
use super::rendezvous::{Place, Rendezvous};
use super::reserved::{self, Reserved};
use super::tcp::{self, Attempt};
use super::watch::Watch;
use super::{UniqueId, unix};
use crate::error::{Error, Result};
use crate::sync::Operation;
use crate::sync::fork::Origin;

/// The ranks wait this much longer than rank 0, so that they hear its verdict.
const FOR_THE_VERDICT: Duration = Duration::from_millis(500);
/// Waits between two attempts to reach rank 0.
const FIRST_RETRY: Duration = Duration::from_millis(1);
const LAST_RETRY: Duration = Duration::from_millis(50);
/// Looks, a millisecond apart, for what has ended a connection.
const CONFIRMATIONS: usize = 20;
/// How long one attempt to reach rank 0 on another host may take.
const ATTEMPT: Duration = Duration::from_secs(5);
/// How long the ranks of one node, all alive and at it, may take to meet.
const FOR_THE_NODE: Duration = Duration::from_secs(20);
/// The longest text in which a rank tells the others why it cannot go on.
const REASON: usize = 4096;

/// One rank's part of an exchange: its blob and its descriptors.
pub(crate) type Part = (Vec<u8>, Vec<OwnedFd>);

/// A part on its way: the number of descriptors that come with it, over whichever connection.
struct Piece {
    blob: Vec<u8>,
    fds: Vec<OwnedFd>,
    announced: usize,
}

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
    /// Where this rank's end of the connections is, if they go between hosts.
    local: Option<SocketAddr>,
    /// The ranks of this node, where there are others and the star's own connections carry no descriptors.
    near: Option<Box<Near>>,
    /// Looks out for ranks that vanish, where the ranks live on several nodes.
    watch: Option<Watch>,
    /// What rank 0 has said while nothing was being exchanged.
    verdict: Option<Verdict>,
    /// What ends an exchange before its time.
    lookout: Option<Lookout>,
    origin: Origin,
}

/// The ranks of one node, joined over a Unix socket besides.
struct Near {
    star: Star,
    /// By rank of that star, the rank here.
    members: Vec<usize>,
}

impl Star {
    /// Joins the ranks that share the rendezvous; returns when all `world_size` have. `description` is what they must agree on.
    pub(crate) fn join(
        rendezvous: &Rendezvous,
        rank: usize,
        world_size: usize,
        description: &[Field],
        limit: &Limit,
    ) -> Result<Star> {
        let node = match rendezvous.place {
            Some(_) => NodeKey::of_this_process(),
            None => NodeKey::pretended(),
        };
        Star::join_from(node?, rendezvous, rank, world_size, description, limit)
    }

    /// As [`join`](Self::join), from that node.
    pub(super) fn join_from(
        node: NodeKey,
        rendezvous: &Rendezvous,
        rank: usize,
        world_size: usize,
        description: &[Field],
        limit: &Limit,
    ) -> Result<Star> {
        if world_size > MAX_WORLD_SIZE {
            let expected = format!("at most {MAX_WORLD_SIZE} ranks");
            return Err(Error::Config { option: "world size", value: world_size.to_string(), expected });
        }
        let version = ("version".to_string(), env!("CARGO_PKG_VERSION").to_string());
        let hello = Hello {
            secret: rendezvous.id.secret(),
            rank,
            world_size,
            pid: std::process::id(),
            node: node.0,
            patience: limit.left(),
            description: std::iter::once(version).chain(description.iter().cloned()).collect(),
        };
        match &rendezvous.place {
            Some(place) if world_size > 1 => {
                let mut star = Star::join_over_tcp(rendezvous, place, hello, limit)?;
                star.join_node(&rendezvous.id, node, limit)?;
                Ok(star)
            }
            _ => Star::join_over_unix(&rendezvous.id.socket_name(), hello, limit),
        }
    }

    fn new(rank: usize, (pids, nodes): (Vec<u32>, Vec<usize>), role: Role, local: Option<SocketAddr>) -> Result<Star> {
        let watch = if nodes.iter().all(|&node| node == 0) {
            None
        } else {
            Some(match &role {
                Role::Root { links } => Watch::over_members(links)?,
                Role::Member(link) => Watch::over_root(link)?,
            })
        };
        let (inbox, near, verdict, lookout) = (Inbox::new(), None, None, None);
        Ok(Star {
            rank,
            pids,
            nodes,
            role,
            inbox,
            round: 0,
            local,
            near,
            watch,
            verdict,
            lookout,
            origin: Origin::new(),
        })
    }

    fn join_over_unix(name: &str, hello: Hello, limit: &Limit) -> Result<Star> {
        if hello.rank == 0 {
            if hello.world_size == 1 {
                return Star::new(0, (vec![hello.pid], vec![0]), Role::Root { links: vec![None] }, None);
            }
            if let Some(listener) = unix::Listener::bind(name)? {
                return Star::gather(Listener::Unix(listener), hello, limit);
            }
            // Somebody else is rank 0 already: say hello as rank 0 all the same, so that every rank learns of it.
        }
        let link = reach_over_unix(name, limit)?;
        // Whoever took the name must be this user before it hears the secret.
        let ours = nix::unistd::geteuid().as_raw();
        let peer = link.peer()?;
        if peer.uid != ours {
            let why = format!("the job's socket belongs to user {}, this process runs as user {ours}", peer.uid);
            return Err(Error::Refused { why });
        }
        Star::join_as_member(Link::Unix(link), &hello, limit)
    }

    fn join_over_tcp(rendezvous: &Rendezvous, place: &Place, hello: Hello, limit: &Limit) -> Result<Star> {
        let keys = tcp::Keys::of(&rendezvous.id);
        if hello.rank != 0 {
            let link = reach_over_tcp(place, &keys, limit)?;
            return Star::join_as_member(Link::Tcp(Box::new(link)), &hello, limit);
        }
        match rendezvous.listen(place, limit.until) {
            Ok(listener) => Star::gather(Listener::Tcp(listener, keys), hello, limit),
            // As over a Unix socket: if it is another rank 0 of this job that listens, every rank is to learn of it.
            Err(taken) => match try_over_tcp(place, &keys, limit) {
                Ok(Ok(link)) => Star::join_as_member(Link::Tcp(Box::new(link)), &hello, limit),
                _ => Err(taken),
            },
        }
    }

    fn gather(listener: Listener, hello: Hello, limit: &Limit) -> Result<Star> {
        let Gathered { links, pids, nodes, address } = Gathering::new(listener, hello, limit).run()?;
        Star::new(0, (pids, nodes), Role::Root { links }, address)
    }

    fn join_as_member(mut link: Link, hello: &Hello, limit: &Limit) -> Result<Star> {
        let started = Instant::now();
        let bytes = encode(&ToRoot::Hello(hello.clone()))?;
        if bytes.len() > MAX_HELLO {
            let expected = format!("at most {MAX_HELLO} bytes in all");
            return Err(Error::Config { option: "configuration", value: format!("{} bytes", bytes.len()), expected });
        }
        let mut inbox = Inbox::new();
        // A refusal to take the greeting is told by the verdict that comes back, or by the lack of one.
        link.blocking_send(&bytes, &[], limit)?;
        let until = limit.at(limit.until + FOR_THE_VERDICT);
        match link.blocking_receive(&mut inbox, &until)? {
            Received::Message(len, _) => match decode(inbox.message(len)) {
                Some(FromRoot::Welcome { pids, nodes, address })
                    if [pids.len(), nodes.len()] == [hello.world_size; 2] && node::is_numbering(&nodes) =>
                {
                    // What a rank of rank 0's own host sees of the connection may mean nothing to other hosts.
                    let local = link.local_address().map(|own| {
                        address.filter(|root| own.ip().is_loopback() && !root.ip().is_loopback()).unwrap_or(own)
                    });
                    Star::new(hello.rank, (pids, nodes), Role::Member(link), local)
                }
                Some(FromRoot::Verdict(verdict)) if verdict.is_of(hello.world_size) => Err(verdict.into()),
                _ => Err(garbled("joining")),
            },
            Received::Nothing => Err(timed_out(0, started.elapsed(), "rank 0 has not said who joined")),
            Received::Closed => Err(died(0)),
            _ => Err(garbled("joining")),
        }
    }

    /// Joins the ranks of this node over a Unix socket, which carries descriptors. Collective among all ranks.
    fn join_node(&mut self, id: &UniqueId, node: NodeKey, limit: &Limit) -> Result<()> {
        let here = self.nodes[self.rank];
        let members: Vec<usize> = (0..self.nodes.len()).filter(|&rank| self.nodes[rank] == here).collect();
        let joined = self.join_members(&members, id, node, limit);
        let reason = joined.as_ref().err().map(|error| error.to_string()).unwrap_or_default();
        let parts = self.exchange(&reason.as_bytes()[..reason.len().min(REASON)], &[], limit.until);
        // Its own failure is what a rank reports first.
        let (joined, parts) = (joined?, parts?);
        if let Some((rank, (why, _))) = parts.iter().enumerate().find(|(_, (why, _))| !why.is_empty()) {
            let source = std::io::Error::other(format!("rank {rank}: {}", String::from_utf8_lossy(why)));
            return Err(Error::Bootstrap { during: "joining the ranks of one node", source });
        }
        if let Some(star) = joined {
            // What the kernel says of a process counts more than what that process does.
            members.iter().zip(star.pids()).for_each(|(&rank, &pid)| self.pids[rank] = pid);
            self.near = Some(Box::new(Near { star, members }));
        }
        Ok(())
    }

    fn join_members(&self, members: &[usize], id: &UniqueId, node: NodeKey, limit: &Limit) -> Result<Option<Star>> {
        let Some(rank) = members.iter().position(|&rank| rank == self.rank).filter(|_| members.len() > 1) else {
            return Ok(None);
        };
        let (name, secret) = node.socket_of(id);
        // Half of the time is left to tell the others.
        let left = limit.left() / 2;
        let hello = Hello {
            secret,
            rank,
            world_size: members.len(),
            pid: std::process::id(),
            node: node.0,
            patience: left,
            description: vec![],
        };
        let star = Star::join_over_unix(&name, hello, &limit.at(Instant::now() + left.min(FOR_THE_NODE)));
        star.map(Some).map_err(|error| {
            let why = format!(
                "ranks {members:?} seem to share a machine, and cannot meet there; where they do not, set XCCL_NODE_ID to \
                 another text on each host ({error})"
            );
            Error::Bootstrap { during: "joining the ranks of one node", source: std::io::Error::other(why) }
        })
    }

    /// From now on exchanges end when `lookout` says so; the connections are good for no other one then.
    pub(crate) fn look_out(&mut self, lookout: Option<Lookout>) {
        if let Some(near) = &mut self.near {
            near.star.lookout = lookout.clone();
        }
        self.lookout = lookout;
    }

    /// The process of each rank, as rank 0 sees it.
    pub(crate) fn pids(&self) -> &[u32] {
        &self.pids
    }

    /// This rank.
    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// A rank whose peers' ends of the connections somebody else has.
    #[cfg(any(test, fuzzing))]
    pub(super) fn lied_to(rank: usize, nodes: Vec<usize>, mut links: Vec<Link>) -> Result<Star> {
        let role = match rank {
            0 => Role::Root { links: std::iter::once(None).chain(links.into_iter().map(Some)).collect() },
            _ => Role::Member(links.remove(0)),
        };
        Star::new(rank, (vec![1; nodes.len()], nodes), role, None)
    }

    /// Takes the ranks for those of several nodes.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn pretend(&mut self, nodes: &[usize]) {
        self.nodes = nodes.to_vec();
    }

    /// The node of each rank. Nodes are numbered in the order of their lowest ranks.
    pub(crate) fn nodes(&self) -> &[usize] {
        &self.nodes
    }

    /// Whether a rank is on this one's node.
    pub(crate) fn is_near(&self, rank: usize) -> bool {
        self.nodes[rank] == self.nodes[self.rank]
    }

    /// The number of ranks of this node.
    pub(crate) fn ranks_here(&self) -> usize {
        (0..self.nodes.len()).filter(|&rank| self.is_near(rank)).count()
    }

    /// This rank's own address as other hosts reach it, where the ranks have met over TCP.
    pub(crate) fn local_address(&self) -> Option<IpAddr> {
        self.local.map(|address| address.ip())
    }

    /// Makes an id for a communicator of some of these ranks, of which this one may become rank 0; or of others besides, on
    /// any hosts.
    pub(crate) fn new_id(&self, and_others: bool) -> Result<Reserved> {
        Ok(Reserved(match self.local {
            Some(mut address) if and_others || self.watch.is_some() => {
                address.set_port(0);
                UniqueId::new_at(address)?
            }
            _ => UniqueId::new()?,
        }))
    }

    /// The id of the communicator that goes on with some of these ranks, of which this one becomes rank 0: with a port of its own.
    pub(crate) fn successor_id(&self, of: &UniqueId, attempt: u64, members: &[u64]) -> Result<Reserved> {
        let Some(mut address) = self.local else { return Ok(Reserved(of.successor(attempt, members, None))) };
        address.set_port(0);
        let (listener, address) = reserved::take_a_port(address)?;
        let id = of.successor(attempt, members, Some(address));
        reserved::keep(id.token(), listener)?;
        Ok(Reserved(id))
    }

    /// The rank that is known to be gone without having left, if any: where the ranks live on several nodes, which no process
    /// sees all of. Rank 0 notices when a connection ends, and tells the others when it looks here; if rank 0 itself leaves
    /// in order, nobody tells any more. Never blocks; a system call as long as nothing has happened.
    pub(crate) fn lost(&mut self) -> Option<usize> {
        let Star { role, inbox, watch, verdict, origin, .. } = self;
        let watch = watch.as_mut().filter(|_| !origin.is_elsewhere())?;
        match role {
            Role::Root { links } => {
                for &rank in watch.look_at_members(links, inbox) {
                    let bytes = encode(&FromRoot::Lost { rank }).ok()?;
                    // One that cannot be told finds its connection closed.
                    links.iter_mut().flatten().for_each(|link| _ = link.try_send(&bytes, &[]));
                }
            }
            Role::Member(link) => watch.look_at_root(link, inbox, verdict),
        }
        // Rank 0 may name any number.
        watch.lost().iter().copied().find(|&rank| rank < self.pids.len())
    }

    /// Whether that rank is known to be gone without having left, as [`lost`](Self::lost) has found the first.
    pub(crate) fn has_lost(&self, rank: usize) -> bool {
        self.watch.as_ref().is_some_and(|watch| watch.lost().contains(&rank))
    }

    /// A descriptor that becomes readable when [`lost`](Self::lost) may have something to tell.
    pub(crate) fn watched(&self) -> Result<Option<OwnedFd>> {
        let watched = self.watch.as_ref().map(|watch| watch.as_fd().try_clone_to_owned());
        watched.transpose().map_err(|e| Error::os("dup", e))
    }

    /// Ends the connections as the death of the process would.
    #[cfg(test)]
    pub(super) fn vanish(mut self) {
        self.watch = None;
    }

    /// Gives every rank's blob to every rank, in rank order, and its descriptors to the ranks of its node. Collective.
    pub(crate) fn exchange(&mut self, blob: &[u8], fds: &[BorrowedFd<'_>], deadline: Instant) -> Result<Vec<Part>> {
        if blob.len() > MAX_BLOB || fds.len() > MAX_DESCRIPTORS {
            let value = format!("{} bytes and {} descriptors", blob.len(), fds.len());
            let expected = format!("at most {MAX_BLOB} bytes and {MAX_DESCRIPTORS} descriptors");
            return Err(Error::Config { option: "a part of the set-up", value, expected });
        }
        if self.origin.is_elsewhere() {
            return Err(Error::Forked { joined: self.origin.pid() });
        }
        if let Some(verdict) = self.verdict.take().filter(|verdict| verdict.is_of(self.nodes.len())) {
            return Err(verdict.into());
        }
        let limit = Limit { until: deadline, lookout: self.lookout.clone() };
        self.round += 1;
        let copies = fds.iter().map(|fd| fd.try_clone_to_owned()).collect::<std::io::Result<Vec<_>>>();
        let copies = copies.map_err(|e| Error::os("dup", e))?;
        let own = Piece { blob: blob.to_vec(), fds: copies, announced: fds.len() };
        let exchanged = self.exchange_within(own, fds, &limit);
        // One death ends several connections: the lookout knows which it was, as soon as the kernel says so of the process too.
        exchanged.or_else(|err| {
            for _ in 0..if limit.lookout.is_some() { CONFIRMATIONS } else { 0 } {
                limit.look_out()?;
                if !matches!(err, Error::PeerDied { .. }) {
                    break;
                }
                std::thread::sleep(FIRST_RETRY);
            }
            Err(err)
        })
    }

    fn exchange_within(&mut self, own: Piece, fds: &[BorrowedFd<'_>], limit: &Limit) -> Result<Vec<Part>> {
        let Star { rank, role, inbox, round, nodes, .. } = self;
        let mut pieces = match role {
            Role::Root { links } => {
                let pieces = collect(links, own, *round, inbox, limit).and_then(|mut pieces| {
                    spread(links, nodes, &pieces, *round, limit)?;
                    let elsewhere = pieces.iter_mut().zip(&*nodes).filter(|(_, node)| **node != nodes[0]);
                    elsewhere.for_each(|(piece, _)| piece.fds.clear());
                    Ok(pieces)
                });
                if let Err(error) = &pieces {
                    tell_all(links.iter_mut().flatten(), &error.into());
                }
                pieces
            }
            Role::Member(link) => take_part(link, (*rank, nodes), own, *round, inbox, limit),
        }?;
        self.exchange_descriptors(&mut pieces, fds, limit.until)?;
        Ok(pieces.into_iter().map(|piece| (piece.blob, piece.fds)).collect())
    }

    /// Where the descriptors did not come with the blobs: adds those of this node's ranks, if any has announced some.
    fn exchange_descriptors(&mut self, pieces: &mut [Piece], fds: &[BorrowedFd], deadline: Instant) -> Result<()> {
        let Some(near) = &mut self.near else { return Ok(()) };
        if near.members.iter().all(|&rank| pieces[rank].announced == 0) {
            return Ok(());
        }
        for (&rank, (_, fds)) in near.members.iter().zip(near.star.exchange(&[], fds, deadline)?) {
            if fds.len() != pieces[rank].announced {
                return Err(garbled("taking the descriptors of this node's ranks"));
            }
            pieces[rank].fds = fds;
        }
        Ok(())
    }
}

/// Where ranks live on several nodes, an end of a connection means a rank's death, unless this came before.
impl Drop for Star {
    fn drop(&mut self) {
        if self.watch.is_none() || self.origin.is_elsewhere() {
            return;
        }
        match &mut self.role {
            Role::Root { links } => {
                let Ok(bytes) = encode(&FromRoot::Goodbye) else { return };
                links.iter_mut().flatten().for_each(|link| _ = link.try_send(&bytes, &[]));
            }
            Role::Member(link) => _ = encode(&ToRoot::Goodbye).and_then(|bytes| link.try_send(&bytes, &[])),
        }
    }
}

/// Rank 0's first half: everybody's part.
fn collect(links: &mut [Option<Link>], own: Piece, round: u64, inbox: &mut Inbox, limit: &Limit) -> Result<Vec<Piece>> {
    let started = Instant::now();
    let mut pieces: Vec<Option<Piece>> = links.iter().map(|_| None).collect();
    pieces[0] = Some(own);
    for rank in 1..links.len() {
        // A rank that dies while an earlier one is waited for is to be named, not the one that is only late.
        pieces[rank] = loop {
            let Some(link) = &mut links[rank] else { break None };
            match link.try_receive(inbox)? {
                Received::Message(len, fds) => match decode(inbox.message(len)) {
                    Some(ToRoot::Part { round: r, fds: n, blob })
                        if r == round
                            && n <= MAX_DESCRIPTORS
                            && fds.len() == if link.carries_descriptors() { n } else { 0 } =>
                    {
                        break Some(Piece { blob: blob.to_vec(), fds, announced: n });
                    }
                    Some(ToRoot::Goodbye) => return Err(died(rank)),
                    _ => return Err(garbled("collecting the ranks' parts")),
                },
                Received::Nothing if limit.has_passed() => {
                    let why = format!("rank {rank} has not sent its part of the set-up");
                    return Err(timed_out(rank, started.elapsed(), &why));
                }
                Received::Nothing => await_any(links, rank, limit)?,
                Received::Closed => return Err(died(rank)),
                _ => return Err(garbled("collecting the ranks' parts")),
            }
        };
    }
    Ok(pieces.into_iter().flatten().collect())
}

/// Waits until `rank` has sent something, looking out for hang-ups of any.
fn await_any(links: &[Option<Link>], rank: usize, limit: &Limit) -> Result<()> {
    use nix::poll::PollFlags;
    let ranks: Vec<usize> = (0..links.len()).filter(|&r| links[r].is_some()).collect();
    let mut fds = vec![];
    for &r in &ranks {
        fds.extend(links[r].iter().map(|link| match r == rank {
            true => link.poll_fd(PollFlags::POLLIN),
            false => link.poll_for_hang_up(),
        }));
    }
    wait_until(&mut fds, limit)?;
    match ranks.iter().zip(&fds).find(|(r, fd)| **r != rank && has_hung_up(fd)) {
        Some((&dead, _)) => Err(died(dead)),
        None => Ok(()),
    }
}

/// Rank 0's second half: everybody's part to everybody else.
fn spread(links: &mut [Option<Link>], nodes: &[usize], pieces: &[Piece], round: u64, limit: &Limit) -> Result<()> {
    let started = Instant::now();
    for (rank, Piece { blob, fds, announced }) in pieces.iter().enumerate() {
        let bytes = encode(&FromRoot::Part { round, rank, fds: *announced, blob })?;
        let fds: Vec<BorrowedFd> = fds.iter().map(|fd| fd.as_fd()).collect();
        for (to, link) in links.iter_mut().enumerate().filter(|&(to, _)| to != rank) {
            let Some(link) = link else { continue };
            let goes_along = link.carries_descriptors() && nodes[to] == nodes[rank];
            match link.blocking_send(&bytes, if goes_along { &fds } else { &[] }, limit)? {
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
    link: &mut Link,
    (own_rank, nodes): (usize, &[usize]),
    own: Piece,
    round: u64,
    inbox: &mut Inbox,
    limit: &Limit,
) -> Result<Vec<Piece>> {
    let started = Instant::now();
    let bytes = encode(&ToRoot::Part { round, fds: own.announced, blob: &own.blob })?;
    let fds: Vec<BorrowedFd> = own.fds.iter().map(|fd| fd.as_fd()).collect();
    link.blocking_send(&bytes, if link.carries_descriptors() { &fds } else { &[] }, limit)?;
    let mut own = Some(own);
    let mut pieces = Vec::with_capacity(nodes.len());
    while pieces.len() < nodes.len() {
        if pieces.len() == own_rank {
            pieces.extend(own.take());
            continue;
        }
        let until = limit.at(limit.until + FOR_THE_VERDICT);
        match link.blocking_receive(inbox, &until)? {
            Received::Message(len, fds) => match decode(inbox.message(len)) {
                Some(FromRoot::Part { round: r, rank, fds: n, blob })
                    if r == round
                        && rank == pieces.len()
                        && n <= MAX_DESCRIPTORS
                        && fds.len()
                            == if link.carries_descriptors() && nodes[rank] == nodes[own_rank] { n } else { 0 } =>
                {
                    pieces.push(Piece { blob: blob.to_vec(), fds, announced: n });
                }
                Some(FromRoot::Verdict(verdict)) if verdict.is_of(nodes.len()) => return Err(verdict.into()),
                Some(FromRoot::Lost { rank }) if rank < nodes.len() => return Err(died(rank)),
                Some(FromRoot::Goodbye) => return Err(died(0)),
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
            _ => return Err(garbled("taking the ranks' parts")),
        }
    }
    Ok(pieces)
}

fn reach_over_unix(name: &str, limit: &Limit) -> Result<unix::Link> {
    let started = Instant::now();
    let mut pause = FIRST_RETRY;
    loop {
        if let Some(link) = unix::Link::connect(name)? {
            return Ok(link);
        }
        if limit.has_passed() {
            return Err(Error::RootUnreachable { waited: started.elapsed() });
        }
        limit.sleep(pause)?;
        pause = (pause * 2).min(LAST_RETRY);
    }
}

/// Tries again and again: rank 0 may start later, and its name appear later.
fn reach_over_tcp(place: &Place, keys: &tcp::Keys, limit: &Limit) -> Result<tcp::Link> {
    let started = Instant::now();
    let mut pause = FIRST_RETRY;
    let mut last = String::new();
    loop {
        match try_over_tcp(place, keys, limit)? {
            Ok(link) => return Ok(link),
            // The last attempt, which the deadline cuts short, says less than those before.
            Err((_, cut_short)) if cut_short && !last.is_empty() => {}
            Err((why, _)) => last = why,
        }
        if limit.has_passed() {
            return Err(Error::HostUnreachable { tried: place.to_string(), waited: started.elapsed(), last });
        }
        limit.sleep(pause)?;
        pause = (pause * 2).min(LAST_RETRY);
    }
}

/// Tries each address of the place once. Where none can be reached, it may help to try later; the last one's reason is given,
/// and whether time was over first.
fn try_over_tcp(
    place: &Place,
    keys: &tcp::Keys,
    limit: &Limit,
) -> Result<std::result::Result<tcp::Link, (String, bool)>> {
    let addresses = match place.addresses() {
        Ok(addresses) => addresses,
        Err(error) => return Ok(Err((format!("the name is not known: {error}"), false))),
    };
    let mut last = ("the name has no address".to_string(), false);
    for address in addresses {
        match tcp::Link::connect(address, keys, &limit.at(limit.until.min(Instant::now() + ATTEMPT)))? {
            Attempt::Connected(link) => return Ok(Ok(link)),
            Attempt::Failed(why, cut_short) => last = (why, cut_short),
            Attempt::WrongSecret => {
                let why = format!("rank 0, at {address}, has another secret than this rank");
                return Err(Error::Refused { why });
            }
        }
    }
    Ok(Err(last))
}

/// Sends a verdict to whoever can still hear it.
pub(super) fn tell_all<'a>(links: impl Iterator<Item = &'a mut Link>, verdict: &Verdict) {
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
    use crate::bootstrap::unix::tests::{content, memfd};

    fn fields(heap: &str) -> Vec<Field> {
        vec![("XCCL_HEAP".to_string(), heap.to_string())]
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn until_soon() -> Limit {
        soon().into()
    }

    /// Joins with one thread per (rank, world size, heap), and gives each one's outcome.
    fn join_all(id: &UniqueId, ranks: &[(usize, usize, &str)], wait: Duration) -> Vec<Result<Star>> {
        let deadline = Instant::now() + wait;
        let join = |&(rank, world, heap): &(usize, usize, &str)| {
            let (id, fields) = (*id, fields(heap));
            thread::spawn(move || Star::join(&Rendezvous::from(&id), rank, world, &fields, &deadline.into()))
        };
        let threads: Vec<_> = ranks.iter().map(join).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    }

    fn all_exchange(world_size: usize) {
        let id = UniqueId::new().unwrap();
        let threads: Vec<_> = (0..world_size)
            .map(|rank| {
                thread::spawn(move || {
                    let mut star =
                        Star::join(&Rendezvous::from(&id), rank, world_size, &fields("1"), &until_soon()).unwrap();
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
            let (secret, node) = (id.secret(), [0; 32]);
            let hello = Hello { secret, rank: 2, world_size: 3, pid: 1, node, patience, description };
            Star::join_over_unix(&id.socket_name(), hello, &until_soon())
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
            let mut link = Link::Unix(reach_over_unix(&name, &until_soon()).unwrap());
            link.blocking_send(b"xcb1 what is this", &[], &until_soon()).unwrap();
            let silent = Link::Unix(reach_over_unix(&name, &until_soon()).unwrap());
            let mut liar = Link::Unix(reach_over_unix(&name, &until_soon()).unwrap());
            let hello = Hello {
                secret: [0; 32],
                rank: 1,
                world_size: 2,
                pid: 1,
                node: [0; 32],
                patience: Duration::from_secs(1),
                description: vec![],
            };
            liar.blocking_send(&encode(&ToRoot::Hello(hello)).unwrap(), &[], &until_soon()).unwrap();
            let mut inbox = Inbox::new();
            let Received::Message(len, _) = liar.blocking_receive(&mut inbox, &until_soon()).unwrap() else {
                panic!("no answer")
            };
            assert!(matches!(decode(inbox.message(len)), Some(FromRoot::Verdict(Verdict::Refused { .. }))));
            (link, silent, liar)
        });
        let root = { thread::spawn(move || Star::join(&Rendezvous::from(&id), 0, 2, &fields("1"), &until_soon())) };
        let kept = stranger.join().unwrap();
        Star::join(&Rendezvous::from(&id), 1, 2, &fields("1"), &until_soon()).unwrap();
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
