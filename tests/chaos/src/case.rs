//! One case: how many ranks, what they do, and who is struck when. All of it follows from the seed and the case's number.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::works::Work;

/// What the cases are drawn from.
#[derive(Clone, Debug)]
pub struct Choices {
    pub seed: u64,
    pub most_ranks: usize,
    /// Whether ranks may be on several nodes.
    pub nodes: bool,
    /// The only work that is done, if it is named.
    pub work: Option<Work>,
}

/// How long joining may take where somebody may be killed before it has said who it is: others can only miss it.
pub const JOINING: Duration = Duration::from_secs(3);

/// What befalls a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// `kill -9`.
    Kill,
    /// SIGSTOP, and SIGCONT after a while.
    Stop { millis: u64 },
}

/// A rank is struck so long after it has begun a round: the kernel's timer does it, wherever the rank is then.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Blow {
    pub rank: usize,
    /// 0 is joining.
    pub round: u32,
    pub after_ns: u64,
    pub kind: Kind,
}

/// A case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Case {
    pub number: u64,
    /// What data and order of works follow from.
    pub seed: u64,
    /// By rank, its node.
    pub nodes: Vec<usize>,
    pub posix: bool,
    pub progress_thread: bool,
    pub rounds: u32,
    pub work: Option<Work>,
    /// Whether the ranks leave and join anew at the end.
    pub renews: bool,
    pub blows: Vec<Blow>,
}

impl Case {
    /// The `number`-th case.
    pub fn draw(choices: &Choices, number: u64) -> Case {
        let mut rng = StdRng::seed_from_u64(choices.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number);
        // Small worlds are soon over, and most races are between two or three ranks.
        let most = choices.most_ranks.max(2);
        let ranks = match rng.random_range(0..10) {
            0..5 => rng.random_range(2..=most.min(4)),
            5..9 => rng.random_range(2..=most.min(8)),
            _ => rng.random_range(2..=most),
        };
        let several = choices.nodes && rng.random_bool(0.3);
        let node = |rng: &mut StdRng, rank: usize| match rank {
            0 => 0,
            1 => 1,
            _ => rng.random_range(0..2),
        };
        let nodes = (0..ranks).map(|rank| if several { node(&mut rng, rank) } else { 0 }).collect();
        let rounds = rng.random_range(2..=10);
        let mut case = Case {
            number,
            seed: rng.random(),
            nodes,
            posix: rng.random_bool(0.2),
            progress_thread: rng.random_bool(0.5),
            rounds,
            work: choices.work,
            renews: rng.random_bool(0.1),
            blows: vec![],
        };
        // Most cases have one victim, some two, and some have only ranks that stop for a while.
        let kills = [1, 1, 1, 1, 1, 1, 1, 2, 2, 0][rng.random_range(0..10)].min(ranks - 1);
        while case.blows.len() < kills {
            let rank = rng.random_range(0..ranks);
            if case.blows.iter().all(|blow| blow.rank != rank) {
                let blow = case.blow(&mut rng, rank, Kind::Kill);
                case.blows.push(blow);
            }
        }
        if kills == 0 || rng.random_bool(0.2) {
            let (rank, millis) = (rng.random_range(0..ranks), rng.random_range(1..60));
            if case.blows.iter().all(|blow| blow.rank != rank) {
                let blow = case.blow(&mut rng, rank, Kind::Stop { millis });
                case.blows.push(blow);
            }
        }
        case
    }

    fn blow(&self, rng: &mut StdRng, rank: usize, kind: Kind) -> Blow {
        // Who is killed while joining may be missed at the deadline only: such cases take long.
        let round = if rng.random_bool(0.06) { 0 } else { rng.random_range(1..=self.rounds) };
        // As likely within the first 10 us as between 1 and 10 ms; joining takes longer than most.
        let (shortest, longest) = if round == 0 { (1e4, 3e7) } else { (1e3, 1e7) };
        let exponent = rng.random_range(f64::log10(shortest)..f64::log10(longest));
        Blow { rank, round, after_ns: 10f64.powf(exponent) as u64, kind }
    }

    pub fn ranks(&self) -> usize {
        self.nodes.len()
    }

    /// Whether ranks are on several nodes.
    pub fn is_far(&self) -> bool {
        self.nodes.iter().any(|&node| node != self.nodes[0])
    }

    /// How long a call may take.
    pub fn patience(&self) -> Duration {
        let joining = self.blows.iter().any(|blow| blow.round == 0 && blow.kind == Kind::Kill);
        if joining { JOINING } else { Duration::from_secs(60) }
    }
}
