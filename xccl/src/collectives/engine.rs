//! Collectives on their way, and who moves them on.
//!
//! They are done in the order in which they were started, step by step ([`steps`](crate::sync::steps)), each by whoever waits for
//! one, or asks whether it is done. Nobody works in the background.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use super::between::{Between, Task};
use super::failure::{Failure, Halt, difference};
use super::group::{Group, View};
use super::pattern::{Pattern, Plan, Sources};
use super::slots::Slots;
use super::types::{Call, ReduceOp};
use super::varied::{Parts, Varied};
use crate::comm::ending::Cause;
use crate::comm::inner::{Call as Waits, CommInner, lock};
use crate::error::{Error, Result};
use crate::memory::lent::LentPair;
use crate::sync::progress::{Operation, Waiting};

/// A call whose arguments have been checked.
pub(crate) struct Ask {
    pub(super) call: Call,
    pub(super) buffers: LentPair,
    /// Where in the output this rank's own block begins, for those that give it one.
    pub(super) output_at: usize,
    /// For an exchange of parts of different sizes.
    pub(super) parts: Option<Parts>,
}

/// Names a collective: its number, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    number: u64,
    operation: Operation,
}

pub(crate) struct Collectives {
    engine: Mutex<Engine>,
    /// Collectives that are not over: spares others the look.
    pending: AtomicUsize,
    /// Lists of parts, to be used again.
    spare: Mutex<Vec<Parts>>,
}

struct Engine {
    steps: Steps,
    queue: VecDeque<Op>,
    started: u64,
    finished: u64,
    /// Of all calls started.
    digest: u64,
    broken: Option<Broken>,
}

/// How far this rank and the others are.
struct Steps {
    group: Group,
    /// Steps published.
    step: u64,
    /// All others have published at least so many.
    known: u64,
    /// What is under way between nodes, where there are several: then nobody publishes steps.
    between: Option<Between>,
}

/// Why no collective can go on, to be told again.
#[derive(Clone, Copy)]
enum Broken {
    Failure(Failure),
    Over(Cause),
    Left(usize),
}

struct Op {
    number: u64,
    call: Call,
    /// In the history of this rank.
    record: u64,
    digest: u64,
    buffers: LentPair,
    work: Work,
    /// Steps done.
    at: u64,
    phase: Phase,
}

/// What is done in the steps.
enum Work {
    Even(Plan),
    Varied(Varied),
    /// Between nodes; with the parts of an exchange where they differ, and where the own block of a result begins.
    Between(Option<Parts>, usize),
}

enum Phase {
    Fill,
    /// Has published, and taken from so many sources.
    Take(usize),
}

/// What an operation waits for.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stuck {
    number: u64,
    step: u64,
    operation: Operation,
    peer: usize,
}

impl Collectives {
    pub(crate) fn new(rank: usize, nodes: &[usize]) -> Self {
        let between = nodes.iter().any(|&node| node != nodes[0]).then(|| Between::new(rank, nodes));
        let engine = Engine {
            steps: Steps { group: Group::of(rank, nodes), step: 0, known: 0, between },
            queue: VecDeque::new(),
            started: 0,
            finished: 0,
            digest: 0,
            broken: None,
        };
        Collectives { engine: Mutex::new(engine), pending: AtomicUsize::new(0), spare: Mutex::default() }
    }

    /// Goes on as if so many collectives, each of one step, had been made.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn grow_old(&self, comm: &CommInner) {
        let age = comm.layout.age;
        let mut engine = lock(&self.engine);
        (engine.started, engine.finished) = (age, age);
        (engine.steps.step, engine.steps.known) = (age, age);
        comm.layout.collectives.grow_old(&comm.fabric.outbox, age);
    }

    /// Empty lists of parts.
    pub(super) fn spare_parts(&self) -> Parts {
        lock(&self.spare).pop().unwrap_or_default()
    }

    /// Starts a collective and waits for it.
    pub(crate) fn run(&self, comm: &CommInner, ask: Ask) -> Result<()> {
        comm.check_process()?;
        let mut engine = lock(&self.engine);
        let ticket = engine.start(comm, ask)?;
        // The lock is kept for less than it takes to get it again.
        let is_over = || match engine.advance(comm, ticket.number) {
            Ok(None) => Some(Ok(())),
            Ok(Some(_)) => None,
            Err(err) => Some(Err(err)),
        };
        let soon = comm.briefly(is_over);
        drop(engine);
        let result = soon.unwrap_or_else(|| self.wait_on(comm, ticket));
        if let Err(err) = &result {
            lock(&self.engine).stop(comm, ticket, err);
        }
        result
    }

    /// Makes a collective outside of the communicator's own sequence.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn run_alone<T: super::Value>(&self, comm: &CommInner, call: super::Collective<'_, T>) -> Result<()> {
        // SAFETY: the buffers are borrowed until the call returns, and it leaves nothing on its way.
        let ask = unsafe { call.ask(comm) }?;
        self.run(comm, ask)
    }

    /// Starts a collective, to be waited for.
    pub(crate) fn start(&self, comm: &CommInner, ask: Ask) -> Result<Ticket> {
        comm.check_process()?;
        let mut engine = lock(&self.engine);
        let ticket = engine.start(comm, ask)?;
        // What can be done at once is: others may be waiting for it.
        let begun = engine.advance(comm, ticket.number);
        self.pending.store(engine.queue.len(), Relaxed);
        begun.map(|_| ticket)
    }

    /// Waits; after a deadline the collective is still on its way.
    pub(crate) fn wait(&self, comm: &CommInner, ticket: Ticket) -> Result<()> {
        comm.check_process()?;
        let result = self.wait_on(comm, ticket);
        if let Err(err) = &result
            && !matches!(err, Error::Timeout { .. })
        {
            lock(&self.engine).stop(comm, ticket, err);
        }
        self.pending.store(lock(&self.engine).queue.len(), Relaxed);
        result
    }

    /// Looks whether it is over, and moves it on.
    pub(crate) fn test(&self, comm: &CommInner, ticket: Ticket) -> Result<bool> {
        comm.check_process()?;
        let mut engine = lock(&self.engine);
        let over = engine.advance(comm, ticket.number).map(|stuck| stuck.is_none());
        self.pending.store(engine.queue.len(), Relaxed);
        over
    }

    /// Waits once more, and if that fails gives all collectives up: the buffers are nobody's afterwards.
    pub(crate) fn settle(&self, comm: &CommInner, ticket: Ticket) {
        if comm.is_forked() {
            return;
        }
        if let Err(err) = self.wait_on(comm, ticket) {
            lock(&self.engine).stop(comm, ticket, &err);
        }
        self.pending.store(lock(&self.engine).queue.len(), Relaxed);
    }

    /// Moves on what others wait for, as far as it goes. For calls that wait for something else.
    pub(crate) fn progress(&self, comm: &CommInner) {
        if self.pending.load(Relaxed) > 0
            && let Ok(mut engine) = self.engine.try_lock()
        {
            // What goes wrong is told to whoever asks for the collective.
            let last = engine.started;
            let _ = engine.advance(comm, last);
            self.pending.store(engine.queue.len(), Relaxed);
        }
    }

    fn wait_on(&self, comm: &CommInner, ticket: Ticket) -> Result<()> {
        let mut waits = Waits::default();
        loop {
            let Some(stuck) = lock(&self.engine).advance(comm, ticket.number)? else { return Ok(()) };
            let what = Waiting { operation: stuck.operation, epoch: stuck.number, peer: Some(stuck.peer) };
            // Whoever gets a step further begins to wait anew, and does not get tired.
            comm.wait_in(&mut waits, what, || {
                comm.p2p.progress(comm);
                match lock(&self.engine).advance(comm, ticket.number) {
                    Ok(Some(same)) if same == stuck => None,
                    Ok(_) => Some(Ok(())),
                    Err(err) => Some(Err(err)),
                }
            })??;
        }
    }
}

impl Engine {
    fn start(&mut self, comm: &CommInner, ask: Ask) -> Result<Ticket> {
        if let Some(broken) = self.broken {
            return Err(broken.error(comm, ask.call.operation, self.started + 1));
        }
        let Ask { call, buffers, output_at, parts } = ask;
        self.started += 1;
        let number = self.started;
        for word in call.words() {
            // Odd, with about as many ones as zeros: 2^64 divided by the golden ratio.
            self.digest = (self.digest ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.digest ^= self.digest >> 31;
        }
        comm.layout.collectives.log(&comm.fabric.outbox, number, &call);
        let members = self.steps.group.len();
        let block = call.count * call.dtype.size();
        let reduction = (call.dtype, call.op.unwrap_or(ReduceOp::Sum));
        let work = match parts {
            parts if self.steps.between.is_some() => Work::Between(parts, output_at),
            Some(parts) => Work::Varied(Varied::new(parts, number)),
            None => {
                let one_shot = one_shot_up_to(comm.core_sharing.has_core_each());
                let pattern = pattern_of(&call, block, &self.steps.group, one_shot);
                Work::Even(Plan::new(pattern, reduction, block, output_at, members))
            }
        };
        let digest = self.digest;
        let record = comm.board.enters((call.operation, number), Some(call.words()));
        self.queue.push_back(Op { number, call, record, digest, buffers, work, at: 0, phase: Phase::Fill });
        Ok(Ticket { number, operation: call.operation })
    }

    /// Goes on until a number is over, or something has to be waited for.
    fn advance(&mut self, comm: &CommInner, number: u64) -> Result<Option<Stuck>> {
        while self.finished < number {
            if let Some(broken) = self.broken {
                return Err(broken.error(comm, Operation::Computing, number));
            }
            let Some(op) = self.queue.front_mut() else { break };
            match self.steps.advance(comm, op) {
                Ok(None) => {
                    self.finished = op.number;
                    comm.board.ends(op.record, true);
                    let work = self.queue.pop_front().map(|op| op.work);
                    if let Some(Work::Varied(Varied { parts, .. }) | Work::Between(Some(parts), _)) = work {
                        lock(&comm.collectives.spare).push(parts);
                    }
                }
                Ok(stuck) => return Ok(stuck),
                Err(halt) => {
                    let ticket = Ticket { number: op.number, operation: op.call.operation };
                    return Err(match halt {
                        Halt::Failure(failure) => {
                            self.break_off(comm, failure);
                            failure.error()
                        }
                        Halt::Error(err) => {
                            self.stop(comm, ticket, &err);
                            err
                        }
                    });
                }
            }
        }
        Ok(None)
    }

    /// Ends all collectives, for a reason that other ranks cannot see by themselves.
    fn break_off(&mut self, comm: &CommInner, failure: Failure) {
        self.clear(comm);
        self.broken.get_or_insert(Broken::Failure(failure));
        failure.publish(comm);
    }

    /// Ends all collectives after an error of `ticket`: nobody touches their buffers any more.
    fn stop(&mut self, comm: &CommInner, ticket: Ticket, err: &Error) {
        self.clear(comm);
        if self.broken.is_some() {
            return;
        }
        match *err {
            Error::PeerDied { rank, .. } => self.broken = Some(Broken::Over(Cause::Died(rank))),
            Error::PeerLeft { rank, .. } => self.broken = Some(Broken::Left(rank)),
            Error::Aborted { by, .. } => self.broken = Some(Broken::Over(Cause::Aborted(by))),
            // Another rank has told why, or this one tells that it has met its deadline, or a thing that it cannot go on after.
            _ => match (0..comm.world_size).find_map(|rank| Failure::told_by(comm, rank)) {
                Some(told) => self.broken = Some(Broken::Failure(told)),
                None => {
                    let Ticket { number, operation } = ticket;
                    self.break_off(comm, Failure::GivenUp { number, rank: comm.rank, during: operation });
                }
            },
        }
    }

    /// Forgets all that is on its way: nobody touches the buffers any more.
    fn clear(&mut self, comm: &CommInner) {
        if let Some(between) = &mut self.steps.between {
            between.cancel(comm);
        }
        self.queue.drain(..).for_each(|op| comm.board.ends(op.record, false));
    }
}

impl Steps {
    /// Goes on with one operation until it is over, or says what has to be waited for.
    fn advance(&mut self, comm: &CommInner, op: &mut Op) -> std::result::Result<Option<Stuck>, Halt> {
        if let (Work::Between(parts, output_at), Some(between)) = (&op.work, &mut self.between) {
            let Op { call, number, digest, buffers, .. } = &*op;
            let (parts, output_at) = (parts.as_ref(), *output_at);
            let task = Task { call, number: *number, digest: *digest, buffers, parts, output_at };
            return Ok(between.advance(comm, &task)?.map(|(peer, step)| Stuck {
                number: *number,
                step,
                operation: call.operation,
                peer,
            }));
        }
        while op.at < op.work.steps(op.at, self.group.len()) {
            let lags = match op.phase {
                Phase::Fill => self.fill(comm, op),
                Phase::Take(taken) => self.take(comm, op, taken)?,
            };
            if let Some((member, step)) = lags {
                let (number, operation, peer) = (op.number, op.call.operation, self.group.rank(member));
                return Ok(Some(Stuck { number, step, operation, peer }));
            }
        }
        Ok(None)
    }

    /// Fills this rank's slot and publishes it, or says whom it waits for, and for which step.
    fn fill(&mut self, comm: &CommInner, op: &mut Op) -> Option<(usize, u64)> {
        let view = View { comm, group: &self.group };
        let step = self.step + 1;
        let bytes = op.work.payload(op.at, &self.group);
        let needed = Slots::needed(step, bytes);
        if self.known < needed {
            // Those that keep up have come much further: then the next steps need not look. Not at the last step, whose line its
            // owner may be about to write.
            let far = step - (step - needed) / 2;
            let keep_up = far > needed && lags(view, far).is_none();
            if !keep_up && let Some(member) = lags(view, needed) {
                return Some((member, needed));
            }
            self.known = if keep_up { far } else { needed };
        }
        op.work.fill(view, &op.buffers, op.at, step);
        view.slots().publish(view.own(), step, op.digest);
        if bytes > 0 {
            comm.notify_all();
        } else {
            comm.notify_all_loosely();
        }
        view.slots().prepare(view.own(), step + 1, bytes);
        self.step = step;
        op.phase = Phase::Take(0);
        None
    }

    /// Takes from the sources that have published, and when it has all, ends the step.
    fn take(&mut self, comm: &CommInner, op: &mut Op, taken: usize) -> std::result::Result<Option<(usize, u64)>, Halt> {
        let view = View { comm, group: &self.group };
        let (step, sources) = (self.step, op.work.sources(op.at, &self.group));
        let source = |k: usize| match sources {
            Sources::Nobody => None,
            Sources::One(member) => (k == 0).then_some(member),
            Sources::All => self.group.other(k),
        };
        let mut k = taken;
        while let Some(member) = source(k) {
            let outbox = view.outbox(member);
            let published = view.slots().published(outbox, step);
            if published < step {
                op.phase = Phase::Take(k);
                return Ok(Some((member, step)));
            }
            if published > step {
                let (rank, what) = (self.group.rank(member), "the step of a collective");
                return Err(Halt::Error(Error::Corrupt { rank, what, value: published, limit: step }));
            }
            if op.at == 0 && view.slots().digest(outbox, step) != op.digest {
                let own = (comm.rank, view.own());
                return Err(difference(view.slots(), own, (self.group.rank(member), outbox), op.number).into());
            }
            op.work.take(view, &op.buffers, member, op.at, step)?;
            if let (Sources::One(_), Work::Even(plan)) = (sources, &op.work) {
                view.slots().look_ahead(outbox, step + 1, plan.payload(op.at, self.group.len()));
            }
            k += 1;
        }
        if let Work::Even(plan) = &op.work {
            plan.join(view, &op.buffers, op.at, step);
        }
        if sources == Sources::All {
            self.known = step;
        }
        op.at += 1;
        op.phase = Phase::Fill;
        Ok(None)
    }
}

impl Work {
    /// How many there are, as far as is known in step `at`.
    fn steps(&self, at: u64, members: usize) -> u64 {
        match self {
            Work::Even(plan) => plan.steps,
            Work::Varied(varied) => varied.steps(at, members),
            Work::Between(..) => 0,
        }
    }

    /// Bytes that this rank has to say in step `at`.
    fn payload(&self, at: u64, group: &Group) -> usize {
        match self {
            Work::Even(plan) if plan.fills(group) => plan.payload(at, group.len()),
            Work::Even(_) | Work::Between(..) => 0,
            Work::Varied(varied) => varied.payload(at, group.len()),
        }
    }

    fn sources(&self, at: u64, group: &Group) -> Sources {
        match self {
            Work::Even(plan) => plan.sources(at, group),
            Work::Varied(varied) => varied.sources(group.len()),
            Work::Between(..) => Sources::Nobody,
        }
    }

    fn fill(&self, view: View<'_>, buffers: &LentPair, at: u64, step: u64) {
        match self {
            Work::Even(plan) => plan.fill(view, buffers, at, step),
            Work::Varied(varied) => varied.fill(view, buffers, at, step),
            Work::Between(..) => {}
        }
    }

    fn take(
        &mut self,
        view: View<'_>,
        buffers: &LentPair,
        member: usize,
        at: u64,
        step: u64,
    ) -> std::result::Result<(), Halt> {
        match self {
            Work::Even(plan) => plan.take(view, buffers, member, at, step),
            Work::Varied(varied) => return varied.take(view, buffers, member, at, step),
            Work::Between(..) => {}
        }
        Ok(())
    }
}

/// A member that has not published `step`, which is not 0.
fn lags(view: View<'_>, step: u64) -> Option<usize> {
    let others = (0..).map_while(|k| view.group.other(k));
    others.into_iter().find(|&member| !view.slots().has(view.outbox(member), step))
}

impl Broken {
    fn error(self, comm: &CommInner, during: Operation, epoch: u64) -> Error {
        match self {
            Broken::Failure(failure) => failure.error(),
            Broken::Over(cause) => comm.ending.error(cause, during, epoch),
            Broken::Left(rank) => Error::PeerLeft { rank, during, epoch },
        }
    }
}

/// Up to so many bytes a reduction is one-shot: two-shot, each rank joins less of it, but waits twice. Two ranks with a core each
/// take the same time at 2 to 4 KiB (4 KiB: 0.47 us one-shot where 0.39 two-shot, and 1.1 where 1.5 while a line takes 170 ns); eight
/// ranks on two cores, where each wait is for a turn on a core, between 16 KiB (20 us where 38) and 64 KiB (77 where 27).
fn one_shot_up_to(has_core_each: bool) -> usize {
    if has_core_each { 4 << 10 } else { 32 << 10 }
}

fn pattern_of(call: &Call, block: usize, group: &Group, one_shot: usize) -> Pattern {
    let root = call.root.map(|root| group.place(root));
    match (call.operation, root) {
        (Operation::Broadcast, Some(root)) => Pattern::Broadcast { root },
        (Operation::Scatter, Some(root)) => Pattern::Scatter { root },
        (Operation::Gather | Operation::AllGather, root) => Pattern::Gather { root },
        (Operation::ReduceScatter, _) => Pattern::ReduceScatter,
        (Operation::Reduce | Operation::AllReduce, root) if block <= one_shot => Pattern::OneShot { root },
        (Operation::Reduce | Operation::AllReduce, root) => Pattern::TwoShot { root },
        _ => Pattern::Exchange,
    }
}
