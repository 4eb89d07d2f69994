//! Rank 0 waits for the others: whoever connects is checked, and a hello that cannot be right ends the job for all.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::link::{Inbox, Limit, Link, Listener, Received, Sent, wait_until};
use super::message::{FromRoot, Hello, ToRoot, Verdict, decode, encode, first_difference};
use super::node::{self, NodeKey};
use super::star::tell_all;
use crate::error::{Error, Result};

/// A connection that has said nothing for so long is dropped.
const SILENCE: Duration = Duration::from_secs(5);

/// How long rank 0 stays, after the set-up has failed, for ranks that have not come yet.
const FOR_LATECOMERS: Duration = Duration::from_secs(1);

/// How many origins of connections that were turned away are told.
const ORIGINS: usize = 4;

/// A connection whose hello has not come.
struct Stranger {
    link: Link,
    since: Instant,
}

pub(super) struct Gathering {
    listener: Listener,
    own: Hello,
    started: Instant,
    /// Comes down to that of the least patient rank.
    limit: Limit,
    strangers: Vec<Stranger>,
    /// By rank; nothing for rank 0 itself.
    joined: Vec<Option<Joined>>,
    /// How many were turned away, and the first of them: origin and reason.
    turned_away: (usize, Vec<String>),
    inbox: Inbox,
}

struct Joined {
    link: Link,
    pid: u32,
    node: NodeKey,
}

/// All ranks as rank 0 knows them once they have joined, in their order.
pub(super) struct Gathered {
    /// Nothing for rank 0 itself.
    pub links: Vec<Option<Link>>,
    pub pids: Vec<u32>,
    pub nodes: Vec<usize>,
    /// Rank 0's own, as the other ranks reach it.
    pub address: Option<SocketAddr>,
}

impl Gathering {
    pub(super) fn new(listener: Listener, own: Hello, limit: &Limit) -> Self {
        let joined = (0..own.world_size).map(|_| None).collect();
        let inbox = Inbox::new();
        let (started, turned_away, limit) = (Instant::now(), (0, vec![]), limit.clone());
        Gathering { listener, own, started, limit, strangers: vec![], joined, turned_away, inbox }
    }

    /// Returns once everybody has joined and been told so.
    pub(super) fn run(mut self) -> Result<Gathered> {
        match self.gather().and_then(|()| self.welcome()) {
            Ok((pids, nodes, address)) => {
                let links = self.joined.into_iter().map(|joined| Some(joined?.link)).collect();
                Ok(Gathered { links, pids, nodes, address })
            }
            Err(error) => {
                let verdict = Verdict::from(&error);
                tell_all(self.joined.iter_mut().flatten().map(|joined| &mut joined.link), &verdict);
                self.tell_latecomers(&verdict);
                Err(error)
            }
        }
    }

    /// Ranks that were only slower to start are told too, instead of looking for a rank 0 that is gone.
    fn tell_latecomers(&mut self, verdict: &Verdict) {
        // Where there is a lookout, they have one as well.
        let stays = if self.limit.lookout.is_some() { Duration::ZERO } else { FOR_LATECOMERS };
        self.limit.until = self.limit.until.min(Instant::now() + stays);
        let mut missing = self.missing().count();
        while missing > 0 && !self.limit.has_passed() {
            if self.await_something().and_then(|()| self.accept()).is_err() {
                return;
            }
            for mut stranger in std::mem::take(&mut self.strangers) {
                match stranger.link.try_receive(&mut self.inbox) {
                    Ok(Received::Nothing) => self.strangers.push(stranger),
                    Ok(Received::Message(len, _)) => {
                        if let Some(ToRoot::Hello(hello)) = decode(self.inbox.message(len))
                            && equal_in_constant_time(&hello.secret, &self.own.secret)
                        {
                            tell_all([&mut stranger.link].into_iter(), verdict);
                            missing = missing.saturating_sub(1);
                        }
                    }
                    _ => {}
                }
            }
            // Their hang-ups no longer matter, and would end every wait at once.
            self.joined.iter_mut().for_each(|joined| *joined = None);
        }
    }

    fn gather(&mut self) -> Result<()> {
        while self.missing().next().is_some() {
            if self.limit.has_passed() {
                let (ranks, world_size) = (self.missing().collect(), self.own.world_size);
                let (waited, turned_away) = (self.started.elapsed(), self.whom_it_turned_away());
                return Err(Error::MissingRanks { ranks, world_size, waited, turned_away });
            }
            self.await_something()?;
            self.accept()?;
            self.hear_strangers()?;
            self.look_for_hang_ups()?;
        }
        Ok(())
    }

    fn missing(&self) -> impl Iterator<Item = usize> + '_ {
        (1..self.own.world_size).filter(|&r| self.joined[r].is_none())
    }

    fn await_something(&self) -> Result<()> {
        let mut fds = vec![self.listener.poll_fd()];
        fds.extend(self.strangers.iter().map(|s| s.link.poll_fd(PollFlags::POLLIN)));
        fds.extend(self.joined.iter().flatten().map(|joined| joined.link.poll_fd(PollFlags::POLLIN)));
        let silence = self.strangers.iter().map(|s| s.since + SILENCE).min();
        wait_until(&mut fds, &self.limit.at(silence.map_or(self.limit.until, |s| s.min(self.limit.until))))
    }

    fn accept(&mut self) -> Result<()> {
        let most = 2 * self.own.world_size + 64;
        let ours = nix::unistd::geteuid().as_raw();
        // Whoever connects without end keeps nobody from being heard, nor the deadline from coming; and what has come in one round
        // is heard before it has to go.
        for _ in 0..most / 2 {
            let Some(link) = self.listener.accept()? else { break };
            // Other users of this machine are turned away; that is not the job's fault.
            if link.peer()?.is_some_and(|peer| peer.uid != ours) {
                continue;
            }
            // In a flood, those go that have said nothing for longest: a rank says hello at once. One that has shown that it
            // knows the secret comes last, as it will not try again.
            if self.strangers.len() >= most {
                let first = self.strangers.iter().position(|stranger| !stranger.link.has_keys());
                self.strangers.remove(first.unwrap_or(0));
            }
            self.strangers.push(Stranger { link, since: Instant::now() });
        }
        Ok(())
    }

    fn note(&mut self, link: &Link, why: &str) {
        let (count, first) = &mut self.turned_away;
        *count += 1;
        let origin = format!("{} ({why})", link.origin());
        if first.len() < ORIGINS && !first.contains(&origin) {
            first.push(origin);
        }
    }

    fn whom_it_turned_away(&self) -> String {
        match &self.turned_away {
            (0, _) => String::new(),
            (1, first) => format!(", and a connection from {} was turned away", first.join(", ")),
            (count, first) => format!(", and {count} connections were turned away, from {}", first.join(", ")),
        }
    }

    fn hear_strangers(&mut self) -> Result<()> {
        let mut heard = std::mem::take(&mut self.strangers).into_iter();
        while let Some(stranger) = heard.next() {
            if let Err(error) = self.hear(stranger) {
                // The others are still to be told of it: closing their connections would look like this rank's death.
                self.strangers.extend(heard);
                return Err(error);
            }
        }
        Ok(())
    }

    fn hear(&mut self, mut stranger: Stranger) -> Result<()> {
        match stranger.link.try_receive(&mut self.inbox)? {
            Received::Nothing if stranger.since.elapsed() < SILENCE => self.strangers.push(stranger),
            Received::Message(len, _) => {
                if let Some(ToRoot::Hello(hello)) = decode(self.inbox.message(len)) {
                    self.admit(stranger.link, hello)?;
                }
            }
            Received::TurnedAway(why) => self.note(&stranger.link, why),
            _ => {}
        }
        Ok(())
    }

    fn admit(&mut self, mut link: Link, hello: Hello) -> Result<()> {
        if !equal_in_constant_time(&hello.secret, &self.own.secret) {
            self.note(&link, "its secret is another one");
            let why = "the job's secret is another one".to_string();
            tell_all([&mut link].into_iter(), &Verdict::Refused { why });
            return Ok(());
        }
        let pid = link.peer()?.and_then(|peer| peer.pid).unwrap_or(hello.pid);
        match self.objection(&hello, pid) {
            None => {
                let patience = Instant::now().checked_add(hello.patience);
                self.limit.until = patience.map_or(self.limit.until, |p| p.min(self.limit.until));
                self.joined[hello.rank] = Some(Joined { link, pid, node: NodeKey(hello.node) });
                Ok(())
            }
            Some(error) => {
                tell_all([&mut link].into_iter(), &Verdict::from(&error));
                Err(error)
            }
        }
    }

    fn objection(&self, hello: &Hello, pid: u32) -> Option<Error> {
        let (rank, world_size) = (hello.rank, self.own.world_size);
        if hello.world_size != world_size {
            let (theirs, ours) = (hello.world_size.to_string(), world_size.to_string());
            return Some(Error::Mismatch { rank, what: "world size".to_string(), theirs, ours });
        }
        if rank >= world_size {
            return Some(Error::InvalidRank { rank, world_size });
        }
        let first = if rank == 0 { Some(self.own.pid) } else { self.joined[rank].as_ref().map(|joined| joined.pid) };
        if let Some(first_pid) = first {
            return Some(Error::DuplicateRank { rank, first_pid, second_pid: pid });
        }
        let (what, theirs, ours) = first_difference(&hello.description, &self.own.description)?;
        Some(Error::Mismatch { rank, what, theirs, ours })
    }

    /// A rank that has joined says nothing more before it is welcomed: if there is something, it is the end.
    fn look_for_hang_ups(&mut self) -> Result<()> {
        for rank in 1..self.joined.len() {
            let Some(joined) = &mut self.joined[rank] else { continue };
            if matches!(joined.link.try_receive(&mut self.inbox)?, Received::Closed | Received::Foreign) {
                self.joined[rank] = None;
                return Err(Error::PeerDied { rank, during: crate::sync::Operation::Init, epoch: 0 });
            }
        }
        Ok(())
    }

    fn welcome(&mut self) -> Result<(Vec<u32>, Vec<usize>, Option<SocketAddr>)> {
        let pid = |joined: &Option<Joined>| joined.as_ref().map_or(self.own.pid, |joined| joined.pid);
        let pids: Vec<u32> = self.joined.iter().map(pid).collect();
        let key = |joined: &Option<Joined>| joined.as_ref().map_or(NodeKey(self.own.node), |joined| joined.node);
        let nodes = node::number(&self.joined.iter().map(key).collect::<Vec<_>>());
        let address = self.address();
        let bytes = encode(&FromRoot::Welcome { pids: pids.clone(), nodes: nodes.clone(), address })?;
        for (rank, joined) in self.joined.iter_mut().enumerate() {
            let Some(Joined { link, .. }) = joined else { continue };
            if link.blocking_send(&bytes, &[], &self.limit)? != Sent::Done {
                return Err(Error::PeerDied { rank, during: crate::sync::Operation::Init, epoch: 0 });
            }
        }
        Ok((pids, nodes, address))
    }

    /// Where the others have reached rank 0: an address that other hosts can use, if any has come from one.
    fn address(&self) -> Option<SocketAddr> {
        let mut addresses = self.joined.iter().flatten().filter_map(|joined| joined.link.local_address());
        let first = addresses.next()?;
        let is_local = |address: &SocketAddr| address.ip().is_loopback();
        Some(if is_local(&first) { addresses.find(|address| !is_local(address)).unwrap_or(first) } else { first })
    }
}

fn equal_in_constant_time(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |differences, (x, y)| differences | (x ^ y)) == 0
}
