//! What a MoE handle is made for.

use super::parties::{Part, Parties};
use super::smooth::SmoothScales;
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
/// (by rank, then id), since a sum that is rounded once more to its own type stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// On the token's rank, in ascending k: bitwise the same result for any number of ranks and any placement.
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
    /// Experts over all ranks.
    pub experts: usize,
    /// Element type of the rows.
    pub dtype: DType,
    /// Where sums are formed. Default: [`Reduction::PerExpert`].
    pub reduction: Reduction,
    /// The rank that holds each expert; `None` splits them evenly into contiguous blocks, the first ranks holding one more
    /// where they do not divide.
    pub placement: Option<Vec<usize>>,
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
            max_expert_rows: None,
            wire: WireFormat::Native,
            smooth: None,
        }
    }

    /// Bytes of shared memory that a handle takes on each rank; pages count once they are touched.
    ///
    /// With W ranks, T tokens at most, K choices of E experts, L of them on the rank that has most, and rows of H bytes rounded up to
    /// lines, each of the two exchanges that may be in flight has room for
    ///
    /// ```text
    /// lists  = 4 (E + 1) + 8 T K + 4 W L
    /// rows   = H T              tokens
    ///        + H min(W T K, max_expert_rows)                     outputs
    ///        + H min(W T, outputs), with Reduction::PerRank      sums
    /// ```
    ///
    /// of which T, outputs and sums are touched as far as an exchange needs them: with a fixed total of tokens and evenly chosen
    /// experts the touched part is divided among the ranks, while the lists' 4 (E + 1) is not.
    ///
    /// # Errors
    /// [`Error::Config`] as when the handle is made.
    pub fn outbox_bytes(&self, world_size: usize) -> Result<usize> {
        self.check(world_size)?;
        let placement = super::placement::Placement::new(self, world_size);
        let layout = super::layout::MoeLayout::new(self, &placement, &Parties::all(world_size));
        Ok(layout.bytes_of(Part::Both))
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
        range("MoeConfig::topk", self.topk, 1, self.experts.min(MAX_TOPK))?;
        if let Some(rows) = self.max_expert_rows {
            range("MoeConfig::max_expert_rows", rows, 1, 1 << 31)?;
        }
        if let Some(placement) = &self.placement {
            range("MoeConfig::placement's length", placement.len(), self.experts, self.experts)?;
            for &rank in placement {
                range("a rank in MoeConfig::placement", rank, 0, world_size - 1)?;
            }
        }
        if let Some(smooth) = &self.smooth {
            let wrong = |option, value, expected| Err(Error::Config { option, value, expected });
            if self.wire != WireFormat::Int8 {
                let expected = "int8 where there are smooth scales".to_owned();
                return wrong("MoeConfig::wire", self.wire.to_string(), expected);
            }
            let count = self.experts * self.hidden;
            range("the number of MoeConfig::smooth's scales", smooth.as_slice().len(), count, count)?;
            if let Some(i) = smooth.as_slice().iter().position(|s| !s.is_finite()) {
                let value =
                    format!("{} for expert {}, channel {}", smooth.as_slice()[i], i / self.hidden, i % self.hidden);
                return wrong("MoeConfig::smooth", value, "finite numbers".to_owned());
            }
        }
        Ok(())
    }
}

/// Experts per token that the reduction keeps on its stack.
pub(super) const MAX_TOPK: usize = 64;
