//! How survivors agree on who goes on, whatever dies meanwhile.
//!
//! Every rank has a *board*, which it alone writes and all others read; on other nodes they read copies, which follow in the order
//! of its changes. A rank that has died leaves its board as it was; and a rank that is held to be gone is gone (that is the kernel's
//! word within a node). An *attempt*, numbered from 1, has five phases:
//!
//! 1. *Gather*: a rank says that it joins, and waits until each other one has joined or is gone. Those that have joined are what it
//!    proposes as members.
//! 2. *Propose*: the ranks take turns, by number. At its turn a rank publishes what it holds to be the members; at another's it waits
//!    for that one's proposal and takes it over, unless that one is gone without one.
//! 3. *Build*: the members build the new communicator, which fails where one of them dies.
//! 4. *Tally*: a rank says how that ended, and hears it of each other member, unless that one is gone.
//! 5. *Settle*: turns as in 2, on whether all have built it. If not, the next attempt begins.
//!
//! Why all agree after turns: one of the ranks lives through all of them. After that one's turn all hold what it has published, and so
//! do those whose turns come later. A rank that was told differently before is gone.
//!
//! Why a board's field is not written again before all have read it: it changes in the next attempt at the earliest, which a rank
//! enters only when all others have had their last turn of this one, or are gone.
//!
//! This module knows no memory, no network and no clock: the same code runs on boards in shared memory, on the simulated ones of its
//! tests, and in a model that tries every order of two and three ranks' steps.

/// A set of ranks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Ranks(Vec<u64>);

impl Ranks {
    pub(crate) fn none(ranks: usize) -> Self {
        Ranks(vec![0; ranks.div_ceil(64)])
    }

    pub(crate) fn from_words(words: Vec<u64>) -> Self {
        Ranks(words)
    }

    pub(crate) fn words(&self) -> &[u64] {
        &self.0
    }

    pub(crate) fn add(&mut self, rank: usize) {
        self.0[rank / 64] |= 1 << (rank % 64);
    }

    pub(crate) fn has(&self, rank: usize) -> bool {
        self.0.get(rank / 64).is_some_and(|word| word >> (rank % 64) & 1 == 1)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.0.len() * 64).filter(|&rank| self.has(rank))
    }
}

/// How building has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Outcome {
    Done,
    /// A member was lost: without it, it may be done.
    Retry,
    /// It cannot be done.
    Failed,
}

/// What a rank has published.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Board {
    /// The last attempt that it has joined.
    pub(crate) joined: u64,
    /// The attempt that `members` is its proposal of.
    pub(crate) proposed: u64,
    pub(crate) members: Ranks,
    /// How the last attempt that it has built in has ended for it.
    pub(crate) built: (u64, Option<Outcome>),
    /// What it has published at its turn to settle.
    pub(crate) settled: (u64, Option<Outcome>),
    /// It takes part no more, for good.
    pub(crate) gave_up: bool,
}

/// What a rank sees of the others. Boards are copies, and what they say is not trusted.
pub(crate) trait Seen {
    fn board(&self, rank: usize) -> Board;
    /// Whether the rank changes its board no more.
    fn is_gone(&self, rank: usize) -> bool;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Gather,
    Propose,
    Build,
    Tally,
    Settle,
    Over,
}

/// What a step has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// The rank's own board may have changed: publish it, and step on.
    Moved,
    /// Nothing changes before that rank does.
    Waits(usize),
    /// Build with [`Agreement::members`], then say how it [ended](Agreement::built), once.
    Build,
    /// All members hold the communicator that was built last to be theirs.
    Done,
    /// It cannot be built, as at least one rank has found.
    Failed,
    /// The others go on without this rank.
    LeftOut,
    /// That rank takes part no more, without being gone.
    GaveUp(usize),
}

/// Finds nothing, or what was looked for, or that it never comes.
enum Look<T> {
    NotYet,
    Is(T),
    Never,
}

/// One rank's part.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Agreement {
    rank: usize,
    ranks: usize,
    attempt: u64,
    phase: Phase,
    /// The rank that this one has come to, in the phase.
    turn: usize,
    members: Ranks,
    outcome: Outcome,
    own: Board,
}

impl Agreement {
    /// For `rank` of `ranks`, whose board is `own`: the attempt after the last that it has taken part in.
    pub(crate) fn new(rank: usize, ranks: usize, own: Board) -> Self {
        let attempt = own.joined;
        let members = Ranks::none(ranks);
        let mut new =
            Agreement { rank, ranks, attempt, phase: Phase::Over, turn: 0, members, outcome: Outcome::Done, own };
        new.begin();
        new
    }

    fn begin(&mut self) {
        self.attempt += 1;
        self.own.joined = self.attempt;
        self.members = Ranks::none(self.ranks);
        self.enter(Phase::Gather);
    }

    fn enter(&mut self, phase: Phase) {
        (self.phase, self.turn) = (phase, 0);
    }

    /// What others are to see.
    pub(crate) fn own(&self) -> &Board {
        &self.own
    }

    pub(crate) fn attempt(&self) -> u64 {
        self.attempt
    }

    pub(crate) fn members(&self) -> &Ranks {
        &self.members
    }

    /// This rank takes part no more.
    pub(crate) fn give_up(&mut self) {
        self.own.gave_up = true;
        self.phase = Phase::Over;
    }

    /// How building has ended here.
    pub(crate) fn built(&mut self, outcome: Outcome) {
        if self.phase == Phase::Build {
            self.own.built = (self.attempt, Some(outcome));
            self.outcome = outcome;
            self.enter(Phase::Tally);
        }
    }

    /// Goes on by one look at one board, if what is seen allows it.
    pub(crate) fn step(&mut self, seen: &impl Seen) -> Step {
        let (rank, attempt) = (self.turn, self.attempt);
        if rank == self.ranks {
            return self.next_phase();
        }
        let is_own = rank == self.rank;
        let concerns = !matches!(self.phase, Phase::Tally | Phase::Settle) || self.members.has(rank);
        if !concerns {
            self.turn += 1;
            return Step::Moved;
        }
        let look = match self.phase {
            Phase::Gather if is_own => Look::Is(()),
            Phase::Gather => self.look(seen, |board| (board.joined >= attempt).then_some(())),
            Phase::Propose if is_own => {
                (self.own.proposed, self.own.members) = (attempt, self.members.clone());
                Look::Is(())
            }
            Phase::Propose => {
                self.look(seen, |board| (board.proposed >= attempt).then(|| board.members.clone())).map(|members| {
                    // Of what cannot be, nothing is taken over.
                    self.members = Ranks::none(self.ranks);
                    members.iter().filter(|&rank| rank < self.ranks).for_each(|rank| self.members.add(rank));
                })
            }
            Phase::Tally if is_own => Look::Is(()),
            Phase::Tally => match self.look(seen, |board| board.built.1.filter(|_| board.built.0 >= attempt)) {
                // It may have died in the middle of building, or before.
                Look::Never => {
                    self.outcome = self.outcome.max(Outcome::Retry);
                    Look::Never
                }
                look => look.map(|theirs| self.outcome = self.outcome.max(theirs)),
            },
            Phase::Settle if is_own => {
                self.own.settled = (attempt, Some(self.outcome));
                Look::Is(())
            }
            Phase::Settle => self
                .look(seen, |board| board.settled.1.filter(|_| board.settled.0 >= attempt))
                .map(|theirs| self.outcome = theirs),
            Phase::Build => return Step::Build,
            Phase::Over => return Step::Waits(self.rank),
        };
        match look {
            // It may have left since.
            Look::NotYet | Look::Never if seen.board(rank).gave_up => Step::GaveUp(rank),
            Look::NotYet => Step::Waits(rank),
            Look::Is(()) if self.phase == Phase::Gather => {
                self.members.add(rank);
                self.turn += 1;
                Step::Moved
            }
            Look::Is(()) | Look::Never => {
                self.turn += 1;
                Step::Moved
            }
        }
    }

    fn look<T>(&self, seen: &impl Seen, find: impl Fn(&Board) -> Option<T>) -> Look<T> {
        let rank = self.turn;
        if let Some(found) = find(&seen.board(rank)) {
            return Look::Is(found);
        }
        if !seen.is_gone(rank) {
            return Look::NotYet;
        }
        // What it has published last was before it was gone.
        find(&seen.board(rank)).map_or(Look::Never, Look::Is)
    }

    fn next_phase(&mut self) -> Step {
        match self.phase {
            Phase::Gather => self.enter(Phase::Propose),
            Phase::Propose if !self.members.has(self.rank) => {
                self.give_up();
                return Step::LeftOut;
            }
            Phase::Propose => self.enter(Phase::Build),
            Phase::Build => return Step::Build,
            Phase::Tally => self.enter(Phase::Settle),
            Phase::Settle => match self.outcome {
                Outcome::Retry => self.begin(),
                Outcome::Done | Outcome::Failed => {
                    self.phase = Phase::Over;
                    return if self.outcome == Outcome::Done { Step::Done } else { Step::Failed };
                }
            },
            Phase::Over => return Step::Waits(self.rank),
        }
        Step::Moved
    }
}

impl<T> Look<T> {
    fn map<U>(self, with: impl FnOnce(T) -> U) -> Look<U> {
        match self {
            Look::NotYet => Look::NotYet,
            Look::Is(found) => Look::Is(with(found)),
            Look::Never => Look::Never,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};

    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    /// Ranks that play an agreement, with what is on the way between them.
    #[derive(Clone, PartialEq, Eq, Hash)]
    struct World {
        players: Vec<Player>,
        /// By reader, by writer: the board as the reader sees it, and what is still to arrive of it.
        views: Vec<Vec<(Board, VecDeque<Board>)>>,
        /// By reader, by rank: whether it knows that this one is gone.
        knows: Vec<Vec<bool>>,
        /// Whether boards are copied, with delay.
        far: bool,
    }

    #[derive(Clone, PartialEq, Eq, Hash)]
    struct Player {
        agreement: Agreement,
        alive: bool,
        /// Attempts in which it has come to building.
        builds: u64,
        /// With whom it has built what was settled to be done.
        done: Option<(u64, Ranks)>,
    }

    struct View<'a>(&'a World, usize);

    impl Seen for View<'_> {
        fn board(&self, rank: usize) -> Board {
            let World { players, views, far, .. } = self.0;
            if *far { views[self.1][rank].0.clone() } else { players[rank].agreement.own().clone() }
        }

        fn is_gone(&self, rank: usize) -> bool {
            self.0.knows[self.1][rank]
        }
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Event {
        Steps(usize),
        /// What it has built is good, as all members have come to build; or a member was lost.
        Builds(usize, Outcome),
        Dies(usize),
        Learns(usize, usize),
        Hears(usize, usize),
        /// What was on the way is lost with its sender.
        Misses(usize, usize),
    }

    impl World {
        fn new(ranks: usize, far: bool) -> Self {
            let player = |rank| {
                let agreement = Agreement::new(rank, ranks, Board::default());
                Player { agreement, alive: true, builds: 0, done: None }
            };
            let players: Vec<Player> = (0..ranks).map(player).collect();
            let view = |writer: &Player| (Board::default(), VecDeque::from([writer.agreement.own().clone()]));
            let views = (0..ranks).map(|_| players.iter().map(view).collect()).collect();
            World { players, views, knows: vec![vec![false; ranks]; ranks], far }
        }

        fn ranks(&self) -> usize {
            self.players.len()
        }

        /// What may happen, besides deaths.
        fn events(&self) -> Vec<Event> {
            let mut events = vec![];
            for (rank, player) in self.players.iter().enumerate().filter(|(_, player)| player.alive) {
                if player.done.is_some() {
                    continue;
                }
                let mut after = player.agreement.clone();
                match after.step(&View(self, rank)) {
                    Step::Waits(_) => {}
                    Step::Build => {
                        let attempt = player.agreement.attempt();
                        let members: Vec<_> = player.agreement.members().iter().collect();
                        if members.iter().all(|&m| self.players[m].builds >= attempt) {
                            events.push(Event::Builds(rank, Outcome::Done));
                        }
                        if members.iter().any(|&m| !self.players[m].alive) {
                            events.push(Event::Builds(rank, Outcome::Retry));
                        }
                        if player.builds < attempt {
                            events.push(Event::Steps(rank));
                        }
                    }
                    _ => events.push(Event::Steps(rank)),
                }
                for other in 0..self.ranks() {
                    if !self.players[other].alive && !self.knows[rank][other] {
                        events.push(Event::Learns(rank, other));
                    }
                    if self.far && other != rank && !self.views[rank][other].1.is_empty() {
                        events.push(Event::Hears(rank, other));
                        if !self.players[other].alive {
                            events.push(Event::Misses(rank, other));
                        }
                    }
                }
            }
            events
        }

        fn happens(&mut self, event: Event) {
            match event {
                Event::Steps(rank) => {
                    let mut agreement = self.players[rank].agreement.clone();
                    let step = agreement.step(&View(self, rank));
                    match step {
                        Step::Build => self.players[rank].builds = agreement.attempt(),
                        Step::Done => {
                            let members = agreement.members().clone();
                            self.players[rank].done = Some((agreement.attempt(), members));
                        }
                        Step::Moved | Step::Waits(_) => {}
                        other => panic!("rank {rank} came to {other:?}"),
                    }
                    self.replace(rank, agreement);
                }
                Event::Builds(rank, outcome) => {
                    let mut agreement = self.players[rank].agreement.clone();
                    self.players[rank].builds = agreement.attempt();
                    agreement.built(outcome);
                    self.replace(rank, agreement);
                }
                Event::Dies(rank) => self.players[rank].alive = false,
                Event::Learns(rank, other) => self.knows[rank][other] = true,
                Event::Hears(rank, other) => {
                    let (board, coming) = &mut self.views[rank][other];
                    *board = coming.pop_front().expect("it was on the way");
                }
                Event::Misses(rank, other) => self.views[rank][other].1.clear(),
            }
        }

        fn replace(&mut self, rank: usize, agreement: Agreement) {
            if self.far && agreement.own() != self.players[rank].agreement.own() {
                self.views.iter_mut().for_each(|views| views[rank].1.push_back(agreement.own().clone()));
            }
            self.players[rank].agreement = agreement;
        }

        /// Nobody who has finished holds another view; and where nothing can happen any more, all that live have finished.
        fn check(&self, is_end: bool) {
            let mut done = self.players.iter().filter_map(|player| player.done.as_ref());
            if let Some(first) = done.next() {
                assert!(done.all(|other| other == first), "two views: {:?}", self.summary());
                for (rank, player) in self.players.iter().enumerate().filter(|(_, player)| player.alive) {
                    assert!(first.1.has(rank), "{rank} is alive and left out: {:?}", self.summary());
                    // One that has not finished is still in the attempt that the others have finished in.
                    let attempt = player.agreement.attempt();
                    assert!(attempt <= first.0, "{rank} goes on alone: {:?}", self.summary());
                }
            }
            if is_end {
                let left = self.players.iter().filter(|player| player.alive && player.done.is_none());
                assert_eq!(left.count(), 0, "stuck: {:?}", self.summary());
            }
        }

        fn summary(&self) -> Vec<String> {
            let of = |p: &Player| format!("alive {}, done {:?}, {:?}", p.alive, p.done, p.agreement);
            self.players.iter().map(of).collect()
        }
    }

    /// Every order of steps, deaths and what is learned of them.
    fn explore(ranks: usize, far: bool, deaths: usize) -> usize {
        let first = World::new(ranks, far);
        let (mut known, mut open) = (HashSet::from([first.clone()]), vec![(first, deaths)]);
        while let Some((world, deaths)) = open.pop() {
            let mut events = world.events();
            world.check(events.is_empty());
            if deaths > 0 {
                events.extend((0..ranks).filter(|&rank| world.players[rank].alive).map(Event::Dies));
            }
            for event in events {
                let mut next = world.clone();
                next.happens(event);
                let deaths = deaths - usize::from(matches!(event, Event::Dies(_)));
                if known.insert(next.clone()) {
                    open.push((next, deaths));
                }
            }
        }
        known.len()
    }

    #[test]
    fn in_every_order_of_two_and_three_ranks_steps_and_deaths_the_survivors_agree() {
        assert!(explore(2, false, 1) > 100);
        assert!(explore(2, true, 1) > 500);
        assert!(explore(3, false, 2) > 1000);
    }

    /// A run with boards that arrive late, deaths at any moment, and knowledge of them later still.
    fn run(ranks: usize, far: bool, deaths: usize, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut world, mut deaths) = (World::new(ranks, far), deaths.min(ranks - 1));
        // Some worlds hear late, some learn late.
        let reluctance: [u32; 3] = std::array::from_fn(|_| random.random_range(1..20));
        let mut steps = 0;
        loop {
            let events = world.events();
            world.check(events.is_empty());
            if events.is_empty() {
                return;
            }
            if deaths > 0 && random.random_range(0..ranks * 12) == 0 {
                let alive: Vec<_> = (0..ranks).filter(|&rank| world.players[rank].alive).collect();
                world.happens(Event::Dies(alive[random.random_range(0..alive.len())]));
                deaths -= 1;
                continue;
            }
            let event = loop {
                let event = events[random.random_range(0..events.len())];
                let one_in = match event {
                    Event::Hears(..) => reluctance[0],
                    Event::Learns(..) => reluctance[1],
                    Event::Misses(..) => 4,
                    Event::Builds(_, Outcome::Retry) => reluctance[2],
                    _ => 1,
                };
                if random.random_range(0..one_in) == 0 {
                    break event;
                }
            };
            world.happens(event);
            steps += 1;
            assert!(steps < 1_000_000, "no end: {:?}", world.summary());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn survivors_agree_whoever_dies_whenever(ranks in 2usize..9, far: bool, deaths in 0usize..8, seed: u64) {
            run(ranks, far, deaths, seed);
        }
    }

    #[test]
    fn who_gives_up_ends_it_for_those_that_wait() {
        let mut world = World::new(2, false);
        world.players[1].agreement.own.joined = 0;
        world.players[1].agreement.give_up();
        let mut first = world.players[0].agreement.clone();
        assert_eq!(first.step(&View(&world, 0)), Step::Moved);
        assert_eq!(first.step(&View(&world, 0)), Step::GaveUp(1));
    }
}
