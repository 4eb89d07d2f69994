//! What a snapshot means, in one sentence. A pure function of the snapshot.
//!
//! The parties are processes: one that waits in one communicator cannot serve another one. A wait counts once it is older than
//! the patience. What is looked for, the most telling first:
//! 1. a process that has died, or was stopped: whatever waits, waits for that in the end;
//! 2. a rank that has aborted;
//! 3. parties that wait for each other: the largest set of which each waits for one in the set, or for anyone of whom all are in
//!    it. That is a *mismatch* where ranks are in different calls that all ranks have to make, and otherwise a *cycle*;
//! 4. the *straggler*: the party at the end of most chains of waits, and what it does;
//! 5. waits for anyone.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::process::ProcessState;
use super::snapshot::{CommSnapshot, RankSnapshot, Standing, WaitSnapshot};
use super::text::{duration, is_for_all, phrase, whom};
use crate::sync::Operation;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Finding {
    /// Nobody waits for long.
    Quiet,
    /// A process has died.
    Died,
    /// A process was stopped by a signal, or a debugger holds it.
    Stopped,
    /// A rank has aborted.
    Aborted,
    /// Ranks are in different calls that all have to make.
    Mismatch,
    /// Ranks wait for each other.
    Cycle,
    /// Others wait for a rank that waits for nobody.
    Straggler,
    /// Ranks wait for messages or signals from anyone.
    Idle,
}

/// What a snapshot means. Its `Display` is the sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Diagnosis {
    /// What was found.
    pub finding: Finding,
    /// The sentence.
    pub text: String,
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A wait of a rank.
#[derive(Clone, Copy)]
struct Edge<'a> {
    /// The index of the communicator.
    comm: usize,
    rank: usize,
    wait: &'a WaitSnapshot,
}

/// One process; or one rank, where a process has several of a communicator.
#[derive(Default)]
struct Party<'a> {
    /// Its ranks: communicator and rank.
    places: Vec<(usize, usize)>,
    /// Its waits that are old enough.
    waits: Vec<Edge<'a>>,
}

struct Graph<'a> {
    comms: &'a [CommSnapshot],
    parties: Vec<Party<'a>>,
    /// By communicator and rank.
    party: Vec<Vec<usize>>,
}

/// Says what the snapshots of one job's communicators mean; waits count when they are at least `patience_ns` old.
pub(crate) fn diagnose(comms: &[CommSnapshot], patience_ns: u64) -> Diagnosis {
    let graph = Graph::new(comms, patience_ns);
    let found = graph.dead().or_else(|| graph.stopped()).or_else(|| graph.aborted());
    let found = found.or_else(|| graph.waiting_for_each_other()).or_else(|| graph.straggler());
    let (finding, text) = found
        .or_else(|| graph.idle())
        .unwrap_or_else(|| (Finding::Quiet, format!("nobody has waited for longer than {}", duration(patience_ns))));
    Diagnosis { finding, text }
}

type Found = Option<(Finding, String)>;

impl<'a> Graph<'a> {
    fn new(comms: &'a [CommSnapshot], patience_ns: u64) -> Self {
        let mut graph = Graph { comms, parties: vec![], party: vec![] };
        let mut of_process = BTreeMap::new();
        for (c, comm) in comms.iter().enumerate() {
            let mut indices = vec![];
            for rank in &comm.ranks {
                let (at, pid) = ((c, rank.rank), rank.pid.filter(|&pid| graph.is_one_rank(pid)));
                let new = graph.parties.len();
                let index = pid.map_or(new, |pid| *of_process.entry(pid).or_insert(new));
                if index == new {
                    graph.parties.push(Party::default());
                }
                let party = &mut graph.parties[index];
                party.places.push(at);
                // Waiting for its own threads or devices is not waiting for a rank.
                let is_old = |wait: &&WaitSnapshot| {
                    let for_rows = matches!(wait.operation, Operation::CombineSend | Operation::E2aSend);
                    wait.for_ns >= patience_ns && !(for_rows && wait.peer == Some(rank.rank))
                };
                let takes_part = rank.standing == Standing::Active;
                let waits = rank.waits.iter().filter(is_old).filter(|_| takes_part);
                party.waits.extend(waits.map(|wait| Edge { comm: c, rank: rank.rank, wait }));
                indices.push(index);
            }
            graph.party.push(indices);
        }
        graph
    }

    /// Whether the process has one rank at most in every communicator.
    fn is_one_rank(&self, pid: u32) -> bool {
        self.comms.iter().all(|comm| comm.ranks.iter().filter(|rank| rank.pid == Some(pid)).count() <= 1)
    }

    fn rank(&self, (comm, rank): (usize, usize)) -> &'a RankSnapshot {
        &self.comms[comm].ranks[rank]
    }

    /// The parties that are all waited for. None for anyone, or for a rank that does not exist.
    fn targets(&self, edge: &Edge<'_>) -> Vec<usize> {
        match edge.wait.peer {
            Some(peer) => self.party[edge.comm].get(peer).copied().into_iter().collect(),
            None if is_for_all(edge.wait) => {
                // Those that have come to the same call hold nobody up.
                let is_there = |rank: &&RankSnapshot| rank.waits.iter().any(|w| w.operation == edge.wait.operation);
                let missing = self.comms[edge.comm].ranks.iter().filter(|rank| !is_there(rank));
                missing.map(|rank| self.party[edge.comm][rank.rank]).collect()
            }
            None => vec![],
        }
    }

    fn leads_to(&self, edge: &Edge<'_>, party: usize) -> bool {
        self.targets(edge).contains(&party)
    }

    /// Those of the communicator other than the one that waits.
    fn others<'s>(&'s self, edge: &Edge<'_>) -> impl Iterator<Item = usize> + 's {
        let own = self.party[edge.comm][edge.rank];
        self.party[edge.comm].iter().copied().filter(move |&party| party != own)
    }

    fn name(&self, (comm, rank): (usize, usize)) -> String {
        match self.comms.len() {
            1 => format!("rank {rank}"),
            _ => format!("rank {rank} of {}", short(self.comms[comm].id)),
        }
    }

    /// With its process, for whom something has to be done.
    fn full_name(&self, at: (usize, usize)) -> String {
        let pid = self.rank(at).pid.map(|pid| format!(" (process {pid})"));
        self.name(at) + &pid.unwrap_or_default()
    }

    fn waits_for(&self, edge: &Edge<'_>) -> String {
        let who = whom(edge.wait, |peer| match peer == edge.rank {
            true => "itself".to_owned(),
            false => self.name((edge.comm, peer)),
        });
        let name = self.name((edge.comm, edge.rank));
        format!("{name} waits for {who} in {}", phrase(edge.wait.operation, edge.wait.epoch))
    }

    /// The parties that wait for `root`, directly or through others.
    fn waiters(&self, root: usize) -> Vec<usize> {
        let mut found = vec![];
        loop {
            let is_new = |party: &usize| *party != root && !found.contains(party);
            let leads = |party: &usize| {
                let edges = &self.parties[*party].waits;
                edges.iter().any(|e| self.targets(e).iter().any(|t| *t == root || found.contains(t)))
            };
            let more: Vec<usize> = (0..self.parties.len()).filter(is_new).filter(leads).collect();
            if more.is_empty() {
                found.sort_unstable();
                return found;
            }
            found.extend(more);
        }
    }

    /// "; ranks 0 and 1 wait for it, in barrier 5"
    fn tail(&self, root: usize) -> String {
        let waiters = self.waiters(root);
        let Some(&first) = waiters.first() else { return String::new() };
        let direct = waiters.iter().flat_map(|&w| &self.parties[w].waits).find(|e| self.leads_to(e, root));
        let during = direct.map(|e| format!(", in {}", phrase(e.wait.operation, e.wait.epoch))).unwrap_or_default();
        let waits = if waiters.len() == 1 { "waits" } else { "wait" };
        let names: Vec<String> = waiters.iter().map(|&w| self.name(self.parties[w].places[0])).collect();
        match waiters.len() + 1 == self.parties.len() && waiters.len() > 2 {
            true => format!("; all {} others wait for it{during}", waiters.len()),
            false => format!("; {} {waits} for it{during}", listed(&names, self.name(self.parties[first].places[0]))),
        }
    }

    fn dead(&self) -> Found {
        let is_dead = |r: &RankSnapshot| r.process == ProcessState::Dead && r.standing != Standing::Left;
        let at = self.find(is_dead)?;
        let rank = self.rank(at);
        let text = format!("{} has died{}", self.full_name(at), self.after(rank));
        Some((Finding::Died, text + &self.tail(self.party[at.0][at.1])))
    }

    fn stopped(&self) -> Found {
        let is_stopped = |r: &RankSnapshot| {
            matches!(r.process, ProcessState::Stopped | ProcessState::Traced) && r.standing != Standing::Left
        };
        let at = self.find(is_stopped)?;
        let rank = self.rank(at);
        let how = match rank.process {
            ProcessState::Traced => "is alive, but a debugger holds it",
            _ => "is alive, but stopped by a signal (as SIGSTOP does; SIGCONT lets it go on)",
        };
        let quiet = rank.quiet_ns.map(|ns| format!(", and has not moved for {}", duration(ns))).unwrap_or_default();
        let text = format!("{} {how}{quiet}{}", self.full_name(at), self.within(at.0, rank));
        Some((Finding::Stopped, text + &self.tail(self.party[at.0][at.1])))
    }

    fn aborted(&self) -> Found {
        let at = self.find(|r| r.standing == Standing::Aborted)?;
        let text = format!("{} has aborted the communicator: every call of its ranks ends", self.full_name(at));
        Some((Finding::Aborted, text))
    }

    fn find(&self, is_it: impl Fn(&RankSnapshot) -> bool) -> Option<(usize, usize)> {
        let ranks = self.comms.iter().enumerate().flat_map(|(c, comm)| comm.ranks.iter().map(move |r| (c, r)));
        // One that waits does so because of another one.
        let mut found: Vec<_> = ranks.filter(|(_, r)| is_it(r)).map(|(c, r)| ((c, r.rank), r.waits.len())).collect();
        found.sort_by_key(|&(at, waits)| (waits, at));
        found.first().map(|&(at, _)| at)
    }

    /// The parties that wait, each for one that does or for anyone of whom all do.
    fn blocked(&self) -> Vec<bool> {
        let mut blocked: Vec<bool> = self.parties.iter().map(|party| !party.waits.is_empty()).collect();
        loop {
            let stays = |index: usize| self.parties[index].waits.iter().any(|edge| self.is_hopeless(edge, &blocked));
            let Some(free) = (0..blocked.len()).find(|&i| blocked[i] && !stays(i)) else { return blocked };
            blocked[free] = false;
        }
    }

    fn is_hopeless(&self, edge: &Edge<'_>, blocked: &[bool]) -> bool {
        match edge.wait.peer.is_some() || is_for_all(edge.wait) {
            true => self.targets(edge).iter().any(|&target| blocked[target]),
            false => self.others(edge).all(|other| blocked[other]),
        }
    }

    fn waiting_for_each_other(&self) -> Found {
        let blocked = self.blocked();
        let mut at = blocked.iter().position(|&blocked| blocked)?;
        let mut path: Vec<(usize, Edge<'_>)> = vec![];
        let start = loop {
            if let Some(start) = path.iter().position(|&(party, _)| party == at) {
                break start;
            }
            // A wait for a certain rank says more than one for anyone.
            let hopeless = self.parties[at].waits.iter().filter(|edge| self.is_hopeless(edge, &blocked));
            let edge = *hopeless.min_by_key(|edge| edge.wait.peer.is_none())?;
            path.push((at, edge));
            at = self.targets(&edge).into_iter().find(|&t| blocked[t]).or_else(|| self.others(&edge).next())?;
        };
        let cycle: Vec<Edge<'_>> = path.drain(start..).map(|(_, edge)| edge).collect();
        let all: Vec<Edge<'_>> = self.parties.iter().flat_map(|party| &party.waits).copied().collect();
        if let Some((one, other)) = mismatch(&cycle).or_else(|| mismatch(&all)) {
            let (one, other) = (self.waits_for(&one), self.waits_for(&other));
            return Some((Finding::Mismatch, format!("ranks are in different calls: {one}, {other}")));
        }
        let text: Vec<String> = cycle.iter().take(6).map(|edge| self.waits_for(edge)).collect();
        let more = cycle.len().saturating_sub(text.len());
        let more = if more > 0 { format!(", and so on through {more} more") } else { String::new() };
        let each_other = if cycle.len() > 1 { "ranks wait for each other: " } else { "" };
        Some((Finding::Cycle, format!("{each_other}{}{more}", text.join(", "))))
    }

    fn straggler(&self) -> Found {
        let roots = (0..self.parties.len()).filter(|&party| self.parties[party].waits.is_empty());
        let waiters = roots.map(|root| (root, self.waiters(root).len())).filter(|&(_, waiters)| waiters > 0);
        let (root, _) = waiters.min_by_key(|&(root, waiters)| (std::cmp::Reverse(waiters), root))?;
        let direct = self.parties.iter().flat_map(|p| &p.waits).find(|e| self.leads_to(e, root))?;
        let at = *self.parties[root].places.iter().find(|&&(comm, _)| comm == direct.comm)?;
        let text = format!("{} {}", self.full_name(at), self.condition(at, root));
        Some((Finding::Straggler, text + &self.tail(root)))
    }

    /// What a rank does that does not wait here for long.
    fn condition(&self, at: (usize, usize), party: usize) -> String {
        let rank = self.rank(at);
        if rank.standing == Standing::Left {
            return "has left the communicator".to_owned();
        }
        if rank.standing == Standing::Unknown {
            let node = rank.node.map(|node| format!("of node {node} ")).unwrap_or_default();
            return format!("{node}cannot be seen from here");
        }
        // A wait that is not old yet.
        let mut places = self.parties[party].places.iter().filter(|&&place| place != at);
        if let Some(&elsewhere) = places.find(|&&place| {
            let other = self.rank(place);
            other.call().is_some() || !other.waits.is_empty()
        }) {
            let comm = short(self.comms[elsewhere.0].id);
            return format!(
                "is at work in another communicator, {comm}{}",
                self.within(elsewhere.0, self.rank(elsewhere))
            );
        }
        let within = self.within(at.0, rank);
        if !rank.waits.is_empty() {
            return format!("is at work{within}");
        }
        let long = rank.quiet_ns.map(|ns| format!(" for {}", duration(ns))).unwrap_or_default();
        let cores = rank.cores.map(|cores| format!(" (it uses {cores:.2} cores)")).unwrap_or_default();
        if let Some(call) = rank.call() {
            return format!("has been at work in {}{long}{cores}", phrase(call.operation, call.epoch));
        }
        match rank.process {
            ProcessState::Uninterruptible => {
                format!("sleeps in the kernel, where no signal wakes it (a disk, swap or a device){within}")
            }
            ProcessState::Sleeping if rank.cores.is_some_and(|cores| cores < 0.02) => {
                format!("has been asleep outside of this library{long}, using no processor time{within}")
            }
            ProcessState::Sleeping if rank.cores.is_none() => {
                format!("has been outside of this library{long}, and is asleep now{within}")
            }
            _ => format!("has been computing{long}{cores}{within}"),
        }
    }

    /// ", in dispatch_send 812" or ", after dispatch_recv 811"
    fn within(&self, comm: usize, rank: &RankSnapshot) -> String {
        if let Some(wait) = rank.waits.first() {
            let who = whom(wait, |peer| self.name((comm, peer)));
            return format!(", waiting for {who} in {}", phrase(wait.operation, wait.epoch));
        }
        self.after(rank)
    }

    fn after(&self, rank: &RankSnapshot) -> String {
        match (rank.call(), rank.history.last()) {
            (Some(call), _) => format!(", in {}", phrase(call.operation, call.epoch)),
            (None, Some(last)) => format!(", after {}", phrase(last.operation, last.epoch)),
            (None, None) => String::new(),
        }
    }

    fn idle(&self) -> Found {
        let parties = (0..self.parties.len()).filter(|&party| !self.parties[party].waits.is_empty());
        let root = parties.min_by_key(|&party| (std::cmp::Reverse(self.waiters(party).len()), party))?;
        let edge = self.parties[root].waits.first()?;
        Some((Finding::Idle, self.waits_for(edge) + &self.tail(root)))
    }
}

/// Two waits of one communicator in different calls that all its ranks have to make.
fn mismatch<'a>(edges: &[Edge<'a>]) -> Option<(Edge<'a>, Edge<'a>)> {
    let together = edges.iter().filter_map(|edge| Some((edge, kind(edge.wait.operation)?)));
    let together: Vec<_> = together.collect();
    let (one, other) = together.iter().enumerate().find_map(|(i, one)| {
        let differs = |other: &&(&Edge<'a>, u32)| other.0.comm == one.0.comm && other.1 != one.1;
        Some((one.0, together[i + 1..].iter().find(differs)?.0))
    })?;
    Some((*one, *other))
}

/// What the operations of one call that all ranks make have in common; `None` for what ranks do by themselves.
fn kind(operation: Operation) -> Option<u32> {
    match operation {
        Operation::DispatchSend | Operation::DispatchRecv | Operation::CombineSend | Operation::CombineRecv => {
            Some(Operation::DispatchSend as u32)
        }
        Operation::A2eSend | Operation::A2eRecv | Operation::E2aSend | Operation::E2aRecv => {
            Some(Operation::A2eSend as u32)
        }
        Operation::Barrier | Operation::Setup | Operation::Init => Some(operation as u32),
        collective if collective.is_collective() => Some(collective as u32),
        _ => None,
    }
}

/// "ranks 0, 1 and 3"; of one, its name.
fn listed(names: &[String], only: String) -> String {
    let shown = names.len().min(8);
    let Some((last, before)) = names[..shown].split_last().filter(|(_, before)| !before.is_empty()) else {
        return only;
    };
    match names.len() - shown {
        0 => format!("{} and {last}", before.join(", ")),
        more => format!("{}, {last} and {more} more", before.join(", ")),
    }
}

/// A communicator's name among a few.
pub(super) fn short(id: u64) -> String {
    format!("{:08x}", id >> 32)
}
