//! What a MoE handle is made for.

use super::parties::{Part, Parties};
use super::placement::Placement;
use super::routing::Width;
use super::smooth::SmoothScales;
use super::special::ConstantExperts;
use super::wire::WireFormat;
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Where the weighted sum over a token's experts is formed.
///
/// With ranks on several nodes, each node forms one sum per token over its own experts and rounds it to the element type; the
/// token's rank adds those of the other nodes, by ascending node, to the terms of its own node, which come first. So the
/// result depends on which experts share a node, and for a given grouping of ranks and experts into nodes it has the same bits
/// every time, whatever arrives first. It has the bits of a single node where a token's experts are all on its own node; and with
/// [`PerExpert`](Self::PerExpert) where they are all on one other node and k names them in the order in which that node has them
/// (by rank, then slot), since a sum that is rounded once more to its own type stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// On the token's rank, in ascending k, shared experts after those: bitwise the same result for any number of ranks and any
    /// placement, with or without replicas.
    PerExpert,
    /// First on each expert's rank (one row per token and rank travels), then on the token's rank in ascending rank.
    PerRank,
}

/// The shape of a MoE handle's exchanges. Equal on all ranks.
///
/// ```
/// use xccl::{DType, MoeConfig, Reduction};
/// let config = MoeConfig { reduction: Reduction::PerRank, ..MoeConfig::new(128, 7168, 8, 256, DType::BF16) };
/// assert!(config.outbox_bytes(2).unwrap() > 128 * 7168 * 2);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoeConfig {
    /// Most tokens of one rank in one exchange.
    pub max_tokens: usize,
    /// Elements of a token row.
    pub hidden: usize,
    /// Experts that a token may name.
    pub topk: usize,
    /// Routed experts over all ranks, however many replicas they have.
    pub experts: usize,
    /// Element type of the rows.
    pub dtype: DType,
    /// Where sums are formed. Default: [`Reduction::PerExpert`].
    pub reduction: Reduction,
    /// Which rank holds which expert, shared ones included; `None` splits the routed ones evenly into contiguous blocks, the
    /// first ranks holding one more where they do not divide, and gives every rank a replica of each shared one.
    pub placement: Option<Placement>,
    /// Most slots of a rank in this and later placements ([`Moe::install`](super::Moe::install)); `None` makes room for placements
    /// with no more of them than the first one has, of any rank and together.
    pub slots: Option<usize>,
    /// Shared experts: every token goes to each, without being named, with the factor 1 (as in CANN's
    /// `aclnnMoeDistributeCombineV3`), in the sum after those that it names. In a placement the s-th is expert `experts + s`.
    /// Default: 0.
    pub shared: usize,
    /// Zero experts: ids that give nothing. Default: 0.
    ///
    /// Zero, copy and constant experts need no slot and no transfer; they are what CANN's `aclnnMoeDistributeCombineV3` defines.
    /// Their ids, as tokens name them, begin at `experts`, in this order. What they give is worked out on the token's rank, in f32,
    /// in ascending k among its terms; with ranks that send sums (other nodes, or
    /// [`PerRank`](Reduction::PerRank)), before those.
    pub zero: usize,
    /// Copy experts: ids that give the token itself. Where rows travel encoded, [`Epilogue::tokens`](super::Epilogue::tokens) has to
    /// name the tokens. Default: 0.
    pub copy: usize,
    /// Constant experts: ids that give a vector, and perhaps a part of the token. Default: none.
    pub constant: Option<ConstantExperts>,
    /// Most rows that may arrive for one rank's experts in one exchange; `None` makes room for the worst case. Memory is
    /// used as it is touched.
    pub max_expert_rows: Option<usize>,
    /// How token rows travel to the experts; outputs and sums keep the element type. Default: [`WireFormat::Native`].
    pub wire: WireFormat,
    /// Factors that a row is multiplied by before it is quantized, with [`WireFormat::Int8`] only. Default: none.
    pub smooth: Option<SmoothScales>,
}

impl MoeConfig {
    /// A configuration with the defaults for the rest.
    pub fn new(max_tokens: usize, hidden: usize, topk: usize, experts: usize, dtype: DType) -> Self {
        MoeConfig {
            max_tokens,
            hidden,
            topk,
            experts,
            dtype,
            reduction: Reduction::PerExpert,
            placement: None,
            slots: None,
            shared: 0,
            zero: 0,
            copy: 0,
            constant: None,
            max_expert_rows: None,
            wire: WireFormat::Native,
            smooth: None,
        }
    }

    /// Bytes of shared memory that a handle takes on each rank; pages count once they are touched.
    ///
    /// With W ranks, T tokens at most, K choices (topk and shared experts), P slots, L of them on the rank that has most, and rows of
    /// H bytes rounded up to lines, each of the two exchanges that may be in flight has room for
    ///
    /// ```text
    /// lists  = 4 (P + 1) + 8 T K + 4 W L
    /// rows   = H T              tokens
    ///        + H min(W T K, max_expert_rows)                     outputs
    ///        + H min(W T, outputs), with Reduction::PerRank      sums
    /// ```
    ///
    /// of which T, outputs and sums are touched as far as an exchange needs them: with a fixed total of tokens and evenly chosen
    /// experts the touched part is divided among the ranks, while the lists' 4 (P + 1) is not.
    ///
    /// # Errors
    /// [`Error::Config`] as when the handle is made.
    pub fn outbox_bytes(&self, world_size: usize) -> Result<usize> {
        self.check(world_size)?;
        let layout = super::layout::MoeLayout::new(self, &Parties::all(world_size));
        Ok(layout.bytes_of(Part::Both))
    }

    /// The choices of a token.
    pub(super) fn width(&self) -> Width {
        Width { topk: self.topk, shared: self.shared }
    }

    /// Whether a token's rank multiplies anything by the token's factors.
    pub(super) fn sums_here(&self) -> bool {
        self.reduction == Reduction::PerExpert || self.special_experts() > 0
    }

    /// The placement that a handle begins with.
    pub(super) fn first_placement(&self, world_size: usize) -> Result<Placement> {
        match &self.placement {
            Some(placement) => Ok(placement.clone()),
            None => {
                let everywhere: Vec<usize> = (0..world_size).collect();
                Placement::even(self.experts, world_size)?.with_shared(&vec![everywhere; self.shared])
            }
        }
    }

    /// The most slots of all ranks together and of one, after [`check`](Self::check).
    pub(super) fn room(&self, world_size: usize) -> (usize, usize) {
        match (self.slots, &self.placement) {
            (Some(slots), _) => (world_size * slots, slots.max(1)),
            (None, Some(placement)) => (placement.all_slots(), placement.most_slots().max(1)),
            (None, None) => {
                let each = self.experts.div_ceil(world_size) + self.shared;
                (self.experts + world_size * self.shared, each)
            }
        }
    }

    /// Whether a handle may go by a placement.
    pub(super) fn check_placement(&self, placement: &Placement, world_size: usize) -> Result<()> {
        let wrong = |value: String, expected: String| Err(Error::Config { option: "a placement", value, expected });
        if placement.ranks() != world_size {
            return wrong(format!("{} ranks", placement.ranks()), format!("{world_size}, as the communicator has"));
        }
        if placement.experts() != self.experts + self.shared {
            let expected = format!("{} routed and {} shared ones", self.experts, self.shared);
            return wrong(format!("{} experts", placement.experts()), expected);
        }
        let (all, each) = self.room(world_size);
        if let Some(rank) = (0..world_size).find(|&rank| placement.slots(rank).len() > each) {
            let value = format!("{} slots on rank {rank}", placement.slots(rank).len());
            return wrong(value, format!("at most {each}: see MoeConfig::slots"));
        }
        match placement.all_slots() > all {
            true => wrong(format!("{} slots", placement.all_slots()), format!("at most {all}: see MoeConfig::slots")),
            false => Ok(()),
        }
    }

    pub(super) fn check(&self, world_size: usize) -> Result<()> {
        let range = |option: &'static str, value: usize, least: usize, most: usize| {
            if (least..=most).contains(&value) {
                return Ok(());
            }
            Err(Error::Config { option, value: value.to_string(), expected: format!("{least} to {most}") })
        };
        range("MoeConfig::max_tokens", self.max_tokens, 1, 1 << 20)?;
        range("MoeConfig::hidden", self.hidden, 1, 1 << 20)?;
        range("MoeConfig::experts", self.experts, 1, 1 << 16)?;
        range("MoeConfig::shared", self.shared, 0, MAX_TOPK - 1)?;
        range("MoeConfig::zero", self.zero, 0, 1 << 16)?;
        range("MoeConfig::copy", self.copy, 0, 1 << 16)?;
        self.check_constants()?;
        let named = self.experts + self.special_experts();
        range("MoeConfig::topk", self.topk, 1, named.min(MAX_TOPK - self.shared))?;
        if let Some(rows) = self.max_expert_rows {
            range("MoeConfig::max_expert_rows", rows, 1, 1 << 31)?;
        }
        if let Some(slots) = self.slots {
            range("MoeConfig::slots", slots, 0, 1 << 16)?;
        }
        self.check_placement(&self.first_placement(world_size)?, world_size)?;
        if let Some(smooth) = &self.smooth {
            let wrong = |option, value, expected| Err(Error::Config { option, value, expected });
            if self.wire != WireFormat::Int8 {
                let expected = "int8 where there are smooth scales".to_owned();
                return wrong("MoeConfig::wire", self.wire.to_string(), expected);
            }
            let count = (self.experts + self.shared) * self.hidden;
            range("the number of MoeConfig::smooth's scales", smooth.as_slice().len(), count, count)?;
            if let Some(i) = smooth.as_slice().iter().position(|s| !s.is_finite()) {
                let value =
                    format!("{} for expert {}, channel {}", smooth.as_slice()[i], i / self.hidden, i % self.hidden);
                return wrong("MoeConfig::smooth", value, "finite numbers".to_owned());
            }
        }
        Ok(())
    }

    fn check_constants(&self) -> Result<()> {
        let Some(constant) = &self.constant else { return Ok(()) };
        let wrong = |value, expected| Err(Error::Config { option: "MoeConfig::constant", value, expected });
        let (values, count) = (constant.vectors().len(), constant.vectors().len() / self.hidden);
        if values % self.hidden != 0 || count > 1 << 16 {
            let expected = format!("at most 65536 times hidden ({})", self.hidden);
            return wrong(format!("{values} values of vectors"), expected);
        }
        match constant.factor_counts() {
            Some(counts) if counts != [count; 2] => {
                let value = format!("{} factors of tokens and {} of vectors", counts[0], counts[1]);
                wrong(value, format!("{count} of each, as many as vectors"))
            }
            _ => Ok(()),
        }
    }
}

/// Experts per token that the reduction keeps on its stack.
pub(super) const MAX_TOPK: usize = 64;
