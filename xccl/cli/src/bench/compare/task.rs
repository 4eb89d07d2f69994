//! What is measured: which sizes, on how many ranks, with how many iterations.

use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A series that `--only` chooses.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Part {
    /// Messages between two ranks, over sizes
    P2p,
    /// Dispatch and combine over tokens, rows used as they come
    InPlace,
    /// Dispatch and combine over tokens, with the copy to expert-major order
    ExpertMajor,
    /// Both of the latter over numbers of ranks
    Ranks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    P2p,
    InPlace,
    ExpertMajor,
}

/// The sizes of one comparison.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    pub hidden: usize,
    pub topk: usize,
    pub experts: usize,
    /// Tokens per rank of the series over ranks.
    pub tokens_over_ranks: usize,
    #[serde(skip)]
    pub sizes: Vec<usize>,
    #[serde(skip)]
    pub tokens: Vec<usize>,
    #[serde(skip)]
    pub ranks: Vec<usize>,
    #[serde(skip)]
    pub quick: bool,
}

/// One contender's share of a round: some sizes of one kind.
pub struct Task {
    pub what: What,
    pub ranks: usize,
    /// Bytes of a message, or tokens per rank.
    pub sizes: Vec<usize>,
    pub verify: bool,
    pub quick: bool,
}

/// Sizes that are measured with the same number of iterations.
pub struct Group {
    pub sizes: Vec<usize>,
    pub iters: u32,
    pub warmup: u32,
}

impl Shape {
    pub fn full() -> Self {
        Shape {
            hidden: 7168,
            topk: 8,
            experts: 256,
            tokens_over_ranks: 128,
            sizes: vec![8, 64, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20],
            tokens: vec![1, 8, 32, 128, 512, 1024],
            ranks: vec![2, 4, 8],
            quick: false,
        }
    }

    pub fn quick() -> Self {
        Shape {
            hidden: 256,
            topk: 4,
            experts: 16,
            tokens_over_ranks: 8,
            sizes: vec![8, 4096],
            tokens: vec![1, 8],
            ranks: vec![2, 4],
            quick: true,
        }
    }

    pub fn check(&self) -> Result<()> {
        ensure!(
            self.sizes.iter().all(|&s| s > 0) && !self.sizes.is_empty(),
            "--sizes: at least one, each at least 1 byte"
        );
        ensure!(
            self.tokens.iter().all(|&t| t > 0) && !self.tokens.is_empty(),
            "--tokens: at least one, each at least 1"
        );
        let wrong = self.ranks.iter().find(|&&r| r < 2 || !self.experts.is_multiple_of(r));
        ensure!(
            wrong.is_none() && !self.ranks.is_empty(),
            "--ranks: {wrong:?} is given; each is at least 2, and {} experts are a multiple of it",
            self.experts
        );
        Ok(())
    }

    /// The tasks of one part of one round.
    pub fn tasks(&self, part: Part, verify: bool) -> Vec<Task> {
        let task =
            |what, ranks, sizes: &[usize]| Task { what, ranks, sizes: sizes.to_vec(), verify, quick: self.quick };
        match part {
            Part::P2p => vec![task(What::P2p, 2, &self.sizes)],
            Part::InPlace => vec![task(What::InPlace, self.ranks[0], &self.tokens)],
            Part::ExpertMajor => vec![task(What::ExpertMajor, self.ranks[0], &self.tokens)],
            Part::Ranks => {
                let each = self.ranks.iter().map(|&ranks| {
                    [What::InPlace, What::ExpertMajor].map(|what| task(what, ranks, &[self.tokens_over_ranks]))
                });
                each.flatten().collect()
            }
        }
    }
}

impl Task {
    /// Short ones are repeated more often; each takes about a second.
    pub fn groups(&self) -> Vec<Group> {
        let (small, middle) = match self.what {
            What::P2p => (64 << 10, 4 << 20),
            What::InPlace | What::ExpertMajor => (16, 256),
        };
        let counts = match (self.what, self.quick) {
            (_, true) => [(10, 2); 3],
            (What::P2p, _) => [(200, 20), (30, 3), (5, 1)],
            // Ranks that take turns on a core: slow, and over in one time slice or another.
            _ if self.ranks > machine_cores() => [(100, 10), (30, 3), (10, 2)],
            _ => [(1000, 100), (200, 20), (30, 5)],
        };
        let class = |size: usize| if size <= small { 0 } else { 1 + usize::from(size > middle) };
        let groups = counts.into_iter().enumerate().map(|(i, (iters, warmup))| Group {
            sizes: self.sizes.iter().copied().filter(|&s| class(s) == i).collect(),
            iters,
            warmup,
        });
        groups.filter(|group| !group.sizes.is_empty()).collect()
    }

    /// Whether each rank has a core of its own.
    pub fn fits_cores(&self) -> bool {
        self.ranks <= machine_cores()
    }
}

fn machine_cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_hold_every_size_once_and_in_order() {
        for part in [Part::P2p, Part::InPlace, Part::ExpertMajor, Part::Ranks] {
            for task in Shape::full().tasks(part, false) {
                let sizes: Vec<usize> = task.groups().into_iter().flat_map(|g| g.sizes).collect();
                assert_eq!(sizes, task.sizes);
            }
        }
    }

    #[test]
    fn numbers_of_ranks_that_do_not_divide_the_experts_are_refused() {
        let shape = Shape { ranks: vec![2, 3], ..Shape::full() };
        assert!(shape.check().unwrap_err().to_string().contains("Some(3)"));
        assert!(Shape { ranks: vec![], ..Shape::full() }.check().is_err());
        assert!(Shape { sizes: vec![0], ..Shape::full() }.check().is_err());
        Shape::full().check().unwrap();
        Shape::quick().check().unwrap();
    }
}
