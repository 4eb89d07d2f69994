//! Which rank does what.

use std::fmt;

use crate::error::{Error, Result};
use crate::moe::MoeConfig;
use crate::moe::placement::Placement;

/// Who holds attention and who holds experts, and what travels between them. Equal on all ranks.
///
/// ```
/// use xccl::{DType, MoeConfig, RoleConfig};
/// // Two domains of two attention ranks each, and three expert ranks that serve both.
/// let config = RoleConfig::new([0..2, 2..4], 4..7, MoeConfig::new(128, 7168, 8, 256, DType::BF16));
/// assert_eq!(config.attention, [vec![0, 1], vec![2, 3]]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoleConfig {
    /// By domain, its attention ranks. Domains take turns on the same experts; the ranks of one send their micro-batches together.
    pub attention: Vec<Vec<usize>>,
    /// The ranks that hold the experts.
    pub experts: Vec<usize>,
    /// The shape of the exchanges. [`MoeConfig::placement`] names expert ranks; without one they share the experts evenly, in
    /// contiguous blocks. [`MoeConfig::max_expert_rows`] counts what comes from one domain.
    pub moe: MoeConfig,
    /// Whether a few expert ranks of each node gather what the others would each read of everybody. Default: [`Forward::Auto`].
    pub forward: Forward,
    /// How many of each node's expert ranks do, if they do; 0 for the square root of a domain's attention ranks. Default: 0.
    pub trampolines: usize,
}

/// How what ranks read of each other travels, beside the rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Forward {
    /// Each expert rank reads the lists of each attention rank, and the other way round.
    Flat,
    /// A few expert ranks of each node, the trampolines, gather them for the others. One more step, and fewer words and lists.
    Trampoline,
    /// By trampolines in a domain that has many attention ranks, on nodes with many expert ranks.
    #[default]
    Auto,
}

/// What a rank of a group does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It holds attention, in this domain.
    Attention {
        /// The domain's number, from 0.
        domain: usize,
    },
    /// It holds experts.
    Experts,
}

/// From so many attention ranks of a domain, and expert ranks of a node, on.
const MANY: usize = 32;

impl Role {
    pub(super) const ATTENTION: &'static str = "attention";
    pub(super) const EXPERTS: &'static str = "experts";

    pub(super) fn kind(self) -> &'static str {
        match self {
            Role::Attention { .. } => Self::ATTENTION,
            Role::Experts => Self::EXPERTS,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Attention { domain } => write!(f, "attention of domain {domain}"),
            Role::Experts => f.write_str("experts"),
        }
    }
}

impl RoleConfig {
    /// By domain, the attention ranks; the expert ranks; the shape of the exchanges.
    pub fn new<D: IntoIterator<Item = usize>>(
        attention: impl IntoIterator<Item = D>,
        experts: impl IntoIterator<Item = usize>,
        moe: MoeConfig,
    ) -> Self {
        let sorted = |ranks: D| {
            let mut ranks: Vec<usize> = ranks.into_iter().collect();
            ranks.sort_unstable();
            ranks
        };
        let mut experts: Vec<usize> = experts.into_iter().collect();
        experts.sort_unstable();
        let attention = attention.into_iter().map(sorted).collect();
        RoleConfig { attention, experts, moe, forward: Forward::Auto, trampolines: 0 }
    }

    /// What a rank does; `None` for one that the configuration does not name.
    pub fn role_of(&self, rank: usize) -> Option<Role> {
        let domain = self.attention.iter().position(|ranks| ranks.contains(&rank));
        let experts = self.experts.contains(&rank).then_some(Role::Experts);
        domain.map(|domain| Role::Attention { domain }).or(experts)
    }

    /// Checks everything, and gives the roles by rank.
    pub(super) fn check(&self, world_size: usize) -> Result<Vec<Role>> {
        let mut roles: Vec<Option<Role>> = vec![None; world_size];
        let mut name = |rank: usize, role: Role| {
            let known = roles.get_mut(rank).ok_or(Error::InvalidRank { rank, world_size })?;
            match known.replace(role) {
                None => Ok(()),
                Some(first) => Err(Error::RoleConflict { rank, first: first.to_string(), second: role.to_string() }),
            }
        };
        let none = |option, expected: &str| {
            Err(Error::Config { option, value: "[]".to_owned(), expected: expected.to_owned() })
        };
        if self.attention.is_empty() || self.attention.iter().any(Vec::is_empty) {
            return none("RoleConfig::attention", "one domain or more, each with one rank or more");
        }
        if self.experts.is_empty() {
            return none("RoleConfig::experts", "one rank or more");
        }
        for (domain, ranks) in self.attention.iter().enumerate() {
            ranks.iter().try_for_each(|&rank| name(rank, Role::Attention { domain }))?;
        }
        self.experts.iter().try_for_each(|&rank| name(rank, Role::Experts))?;
        for ranks in self.attention.iter().chain([&self.experts]) {
            if !ranks.is_sorted() {
                let expected = "ranks in ascending order".to_owned();
                return Err(Error::Config { option: "the ranks of a role", value: format!("{ranks:?}"), expected });
            }
        }
        let missing = roles.iter().position(Option::is_none);
        if let Some(rank) = missing {
            return Err(Error::NoRole { rank, world_size });
        }
        let roles: Vec<Role> = roles.into_iter().flatten().collect();
        self.moe.check(world_size)?;
        let placement = self.placed()?.first_placement(world_size)?;
        for (rank, role) in roles.iter().enumerate().filter(|(_, role)| **role != Role::Experts) {
            if let Some(&expert) = placement.slots(rank).first() {
                return Err(Error::ExpertWithoutRole { expert, rank, role: role.to_string() });
            }
        }
        Ok(roles)
    }

    /// How many trampolines each node has for a domain of so many attention ranks; `None` for none. `nodes` has the node of each
    /// rank.
    pub(super) fn trampolines_for(&self, attention: usize, experts: &[usize], nodes: &[usize]) -> Option<usize> {
        let mut on_node = vec![0; nodes.iter().max().map_or(0, |most| most + 1)];
        experts.iter().for_each(|&rank| on_node[nodes[rank]] += 1);
        let most = on_node.into_iter().max().unwrap_or(0);
        let pays = match self.forward {
            Forward::Flat => false,
            Forward::Trampoline => true,
            Forward::Auto => attention >= MANY && most >= MANY,
        };
        let chosen = if self.trampolines > 0 { self.trampolines } else { attention.isqrt() };
        pays.then_some(chosen)
    }

    /// The exchanges' shape with a placement.
    pub(super) fn placed(&self) -> Result<MoeConfig> {
        let ranks = self.attention.iter().flatten().chain(&self.experts).map(|rank| rank + 1).max().unwrap_or(0);
        let evenly = || {
            let even = Placement::even(self.moe.experts, self.experts.len())?;
            let mut slots = vec![vec![]; ranks];
            self.experts.iter().enumerate().for_each(|(i, &rank)| slots[rank] = even.slots(i).to_vec());
            Placement::new(self.moe.experts, slots)?.with_shared(&vec![self.experts.clone(); self.moe.shared])
        };
        let placement = self.moe.placement.clone().map_or_else(evenly, Ok)?;
        Ok(MoeConfig { placement: Some(placement), ..self.moe.clone() })
    }
}
