//! Smooth scales: what int8 rows are multiplied by, expert by expert, before they are quantized.

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};

/// Factors `[experts, hidden]`, shared experts last, that move the weight of outlying channels from the activations to the experts' weights
/// (SmoothQuant): a row for expert e is multiplied by its factors before it is quantized, and e's weights have been divided by
/// them. A token's row then differs from expert to expert, and is written once for each. Equal on all ranks, which is checked.
///
/// ```
/// use xccl::{DType, MoeConfig, SmoothScales, WireFormat};
/// let config = MoeConfig {
///     wire: WireFormat::Int8,
///     smooth: Some(SmoothScales::new(vec![1.0; 4 * 64])),
///     ..MoeConfig::new(8, 64, 2, 4, DType::BF16)
/// };
/// assert!(config.outbox_bytes(2).is_ok());
/// ```
#[derive(Clone)]
pub struct SmoothScales(Arc<[f32]>);

impl SmoothScales {
    /// `scales[e * hidden + c]` is the factor of channel c in rows for expert e: finite.
    pub fn new(scales: impl Into<Arc<[f32]>>) -> Self {
        SmoothScales(scales.into())
    }

    /// The factors.
    pub fn as_slice(&self) -> &[f32] {
        &self.0
    }

    /// Those of one expert.
    pub(super) fn of(&self, expert: usize, hidden: usize) -> &[f32] {
        &self.0[expert * hidden..(expert + 1) * hidden]
    }
}

/// Their number and a hash: this is what ranks compare.
impl fmt::Debug for SmoothScales {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hash = Sha256::digest(bytemuck::cast_slice::<f32, u8>(&self.0));
        write!(f, "{} smooth scales with hash ", self.0.len())?;
        hash.iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl PartialEq for SmoothScales {
    fn eq(&self, other: &Self) -> bool {
        bytemuck::cast_slice::<f32, u8>(&self.0) == bytemuck::cast_slice::<f32, u8>(&other.0)
    }
}

impl Eq for SmoothScales {}
