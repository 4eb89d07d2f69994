//! Whether every rank of a machine has a core of its own, which decides how ranks wait.
//!
//! Each rank tells the others, when it joins, which cores it may run on and what share of their time its control group has. All of
//! them work out the same answer from that.

use std::collections::HashMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What one rank may use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cores {
    /// A bit per core.
    pub(crate) mask: Vec<u64>,
    /// The control group that limits its time, and the number of cores whose time that is.
    pub(crate) quota: Option<(String, f64)>,
}

impl Cores {
    fn has(&self, core: usize) -> bool {
        self.mask.get(core / 64).is_some_and(|word| word >> (core % 64) & 1 == 1)
    }
}

/// How the ranks of a communicator share the cores of their machine.
///
/// With a core for each, a rank that waits spins first: what it waits for is a cache line away. Otherwise it gives its core away at
/// once, since the rank that it waits for may need this very core. [`Communicator::core_sharing`](crate::Communicator::core_sharing)
/// tells which it is; it is decided when the ranks join, from their affinity masks and their control groups' quotas.
///
/// ```
/// use xccl::{Communicator, CoreSharing};
/// let many = Communicator::core_sharing_of(100_000);
/// assert!(matches!(many, CoreSharing::TooFewCores { ranks: 100_000, .. }), "{many}");
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum CoreSharing {
    /// Each rank can have a core of its own.
    CoreEach {
        /// The number of ranks.
        ranks: usize,
        /// Cores that at least one of them may use.
        cores: usize,
    },
    /// There are too few cores, or the ranks' affinity masks leave some to share one.
    TooFewCores {
        /// The number of ranks.
        ranks: usize,
        /// Cores that at least one of them may use.
        cores: usize,
    },
    /// A control group gives its ranks less time than they have cores.
    Quota {
        /// The ranks in that group.
        ranks: usize,
        /// The cores' worth of time that they may use together.
        cores: f64,
    },
    /// The ranks were split off from others that still share the cores.
    Inherited {
        /// The ranks that share them.
        ranks: usize,
    },
}

impl CoreSharing {
    /// How ranks share what each of them says that it may use.
    pub(crate) fn of(all: &[Cores]) -> Self {
        let ranks = all.len();
        let bits = all.iter().map(|c| c.mask.len() * 64).max().unwrap_or(0);
        let cores = (0..bits).filter(|&core| all.iter().any(|c| c.has(core))).count();
        let mut groups = HashMap::<&str, (usize, f64)>::new();
        for (group, quota) in all.iter().filter_map(|c| c.quota.as_ref()) {
            let (members, _) = groups.entry(group).or_insert((0, *quota));
            *members += 1;
        }
        // Of several groups the one that is worst off.
        let tightest = groups.into_values().min_by(|a, b| (a.1 / a.0 as f64).total_cmp(&(b.1 / b.0 as f64)));
        match tightest {
            _ if ranks > cores || !each_has_one(all, bits) => CoreSharing::TooFewCores { ranks, cores },
            Some((members, quota)) if quota < members as f64 => CoreSharing::Quota { ranks: members, cores: quota },
            _ => CoreSharing::CoreEach { ranks, cores },
        }
    }

    /// How the ranks of a part share the cores: its siblings are still there.
    pub(crate) fn of_part(self, whole: &CoreSharing) -> Self {
        match (&self, whole) {
            (_, CoreSharing::CoreEach { .. }) | (CoreSharing::TooFewCores { .. } | CoreSharing::Quota { .. }, _) => {
                self
            }
            (_, CoreSharing::TooFewCores { ranks, .. } | CoreSharing::Quota { ranks, .. }) => {
                CoreSharing::Inherited { ranks: *ranks }
            }
            (_, CoreSharing::Inherited { ranks }) => CoreSharing::Inherited { ranks: *ranks },
        }
    }

    /// Whether each rank can have a core of its own.
    pub fn has_core_each(&self) -> bool {
        matches!(self, CoreSharing::CoreEach { .. })
    }
}

/// Whether ranks can be given cores, one each: whoever finds its cores taken asks their holders to move.
fn each_has_one(all: &[Cores], bits: usize) -> bool {
    fn place(rank: usize, all: &[Cores], holder: &mut [Option<usize>], asked: &mut [bool]) -> bool {
        if let Some(core) = (0..holder.len()).find(|&core| holder[core].is_none() && all[rank].has(core)) {
            holder[core] = Some(rank);
            return true;
        }
        for core in 0..holder.len() {
            let is_new = all[rank].has(core) && !std::mem::replace(&mut asked[core], true);
            if is_new && holder[core].is_some_and(|other| place(other, all, holder, asked)) {
                holder[core] = Some(rank);
                return true;
            }
        }
        false
    }
    let mut holder = vec![None; bits];
    (0..all.len()).all(|rank| place(rank, all, &mut holder, &mut vec![false; bits]))
}

impl fmt::Display for CoreSharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CoreSharing::CoreEach { ranks, cores } => {
                write!(f, "a core for each ({ranks} ranks, {cores} cores): waits spin, then yield, then sleep")
            }
            CoreSharing::TooFewCores { ranks, cores } => {
                write!(f, "not a core for each ({ranks} ranks, {cores} cores): waits yield at once, then sleep")
            }
            CoreSharing::Quota { ranks, cores } => write!(
                f,
                "not a core for each ({ranks} ranks in a control group with the time of {cores} cores): waits yield at once, \
                 then sleep"
            ),
            CoreSharing::Inherited { ranks } => write!(
                f,
                "not a core for each ({ranks} ranks, which this communicator was split off from): waits yield at once, then \
                 sleep"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(cores: &[usize]) -> Cores {
        let mut mask = vec![0; 3];
        cores.iter().for_each(|core| mask[core / 64] |= 1 << (core % 64));
        Cores { mask, quota: None }
    }

    fn limited(cores: &[usize], group: &str, quota: f64) -> Cores {
        Cores { quota: Some((group.to_owned(), quota)), ..on(cores) }
    }

    #[test]
    fn ranks_with_a_core_each_may_spin() {
        assert_eq!(CoreSharing::of(&[on(&[0, 1]), on(&[0, 1])]), CoreSharing::CoreEach { ranks: 2, cores: 2 });
        // Bound ranks see one core each, and yet there are two.
        assert_eq!(CoreSharing::of(&[on(&[0]), on(&[1])]), CoreSharing::CoreEach { ranks: 2, cores: 2 });
        assert_eq!(CoreSharing::of(&[on(&[0]), on(&[130])]), CoreSharing::CoreEach { ranks: 2, cores: 2 });
        // The first takes what the last needs, and has to move.
        let moved = [on(&[0, 1]), on(&[0, 2]), on(&[0])];
        assert_eq!(CoreSharing::of(&moved), CoreSharing::CoreEach { ranks: 3, cores: 3 });
    }

    #[test]
    fn more_ranks_than_cores_may_not() {
        assert_eq!(CoreSharing::of(&[on(&[0]), on(&[0])]), CoreSharing::TooFewCores { ranks: 2, cores: 1 });
        // Three cores for three ranks, two of which may only use the first.
        let bound = [on(&[0]), on(&[0]), on(&[0, 1, 2])];
        assert_eq!(CoreSharing::of(&bound), CoreSharing::TooFewCores { ranks: 3, cores: 3 });
        // A rank that cannot say has none.
        assert!(!CoreSharing::of(&[on(&[0]), Cores::default()]).has_core_each());
    }

    #[test]
    fn a_quota_counts_for_the_ranks_that_share_it() {
        let two = |a, b| CoreSharing::of(&[limited(&[0, 1], "a", a), limited(&[0, 1], b, a)]);
        assert_eq!(two(2.0, "a"), CoreSharing::CoreEach { ranks: 2, cores: 2 });
        assert_eq!(two(1.5, "a"), CoreSharing::Quota { ranks: 2, cores: 1.5 });
        assert_eq!(two(1.0, "b"), CoreSharing::CoreEach { ranks: 2, cores: 2 });
        assert_eq!(two(0.5, "b"), CoreSharing::Quota { ranks: 1, cores: 0.5 });
    }

    #[test]
    fn a_part_remembers_the_ranks_beside_it() {
        let pair = || CoreSharing::of(&[on(&[0, 1]), on(&[0, 1])]);
        let crowd = CoreSharing::of(&vec![on(&[0, 1]); 64]);
        assert_eq!(pair().of_part(&pair()), pair());
        let part = pair().of_part(&crowd);
        assert_eq!(part, CoreSharing::Inherited { ranks: 64 });
        assert_eq!(pair().of_part(&part), part);
    }
}
