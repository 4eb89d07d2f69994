//! Experts that need no transfer: what they give is worked out on the token's own rank.

use std::fmt;
use std::sync::Arc;

use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::config::MoeConfig;
use crate::dtype::{DType, Element};
use crate::memory::row::Row;

/// Experts that give `token factor * token + vector factor * vector`, whatever they are fed with, without work or transfer:
/// the constant experts of CANN's `aclnnMoeDistributeCombineV3`, whose `constExpertAlpha1`, `constExpertAlpha2` and
/// `constExpertV` these are. Equal on all ranks, which is checked.
///
/// ```
/// use xccl::{ConstantExperts, DType, MoeConfig};
/// let hidden = 16;
/// // Two of them: one gives its vector, the other one half of the token less its vector.
/// let vectors = vec![0.25f32; 2 * hidden];
/// let constant = ConstantExperts::new(vectors).factors([0.0, 0.5], [1.0, -1.0]);
/// let config = MoeConfig { constant: Some(constant), ..MoeConfig::new(8, hidden, 2, 4, DType::F32) };
/// assert_eq!(config.special_experts(), 2); // ids 4 and 5
/// assert!(config.outbox_bytes(1).is_ok());
/// ```
#[derive(Clone)]
pub struct ConstantExperts {
    vectors: Arc<[f32]>,
    /// Of the token and of the vector, one each per expert; none: 0 and 1.
    factors: Option<[Arc<[f32]>; 2]>,
}

impl ConstantExperts {
    /// `vectors` is `[experts, hidden]`, rounded to the handle's element type when that is made; the factor of the token is 0, of
    /// the vector 1.
    pub fn new(vectors: impl Into<Arc<[f32]>>) -> Self {
        ConstantExperts { vectors: vectors.into(), factors: None }
    }

    /// Other factors, one each per expert. A token or a vector whose factor is 0 is left out.
    pub fn factors(self, token: impl Into<Arc<[f32]>>, vector: impl Into<Arc<[f32]>>) -> Self {
        ConstantExperts { factors: Some([token.into(), vector.into()]), ..self }
    }

    /// The vectors, `[experts, hidden]`.
    pub fn vectors(&self) -> &[f32] {
        &self.vectors
    }

    /// The factors of token and vector for one expert.
    pub fn factors_of(&self, expert: usize) -> (f32, f32) {
        self.factors.as_ref().map_or((0.0, 1.0), |[token, vector]| (token[expert], vector[expert]))
    }

    /// The numbers of factors.
    pub(super) fn factor_counts(&self) -> Option<[usize; 2]> {
        self.factors.as_ref().map(|factors| factors.each_ref().map(|f| f.len()))
    }

    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let factors = self.factors.iter().flatten();
        [&self.vectors].into_iter().chain(factors).map(|part| bytemuck::cast_slice::<f32, u8>(part))
    }
}

/// The number of values and a hash: this is what ranks compare.
impl fmt::Debug for ConstantExperts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut hash = Sha256::new();
        for part in self.parts() {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        write!(f, "constant experts of {} values with hash ", self.vectors.len())?;
        hash.finalize().iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl PartialEq for ConstantExperts {
    fn eq(&self, other: &Self) -> bool {
        self.parts().eq(other.parts())
    }
}

impl Eq for ConstantExperts {}

/// What a special expert is, by its place among them.
pub(super) enum Special {
    Zero,
    Copy,
    Constant(usize),
}

impl MoeConfig {
    /// The number of zero, copy and constant experts: their ids begin at [`experts`](Self::experts), in this order.
    pub fn special_experts(&self) -> usize {
        self.zero + self.copy + self.constants()
    }

    fn constants(&self) -> usize {
        self.constant.as_ref().map_or(0, |constant| constant.vectors.len() / self.hidden.max(1))
    }

    pub(super) fn special(&self, index: usize) -> Special {
        match index.checked_sub(self.zero) {
            None => Special::Zero,
            Some(index) => index.checked_sub(self.copy).map_or(Special::Copy, Special::Constant),
        }
    }

    /// Whether any of them needs the token.
    pub(super) fn needs_tokens(&self) -> bool {
        let constants = self.constant.iter().flat_map(|c| (0..self.constants()).map(|i| c.factors_of(i).0));
        self.copy > 0 || constants.into_iter().any(|factor| factor != 0.0)
    }
}

/// The constant experts' vectors in the handle's element type.
pub(super) enum Vectors {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Vectors {
    pub(super) fn new(config: &MoeConfig) -> Self {
        fn rounded<E: Element>(config: &MoeConfig) -> Vec<E> {
            config.constant.iter().flat_map(|c| c.vectors.iter().map(|&x| E::from_f32(x))).collect()
        }
        match config.dtype {
            DType::F32 => Vectors::F32(rounded(config)),
            DType::F16 => Vectors::F16(rounded(config)),
            DType::BF16 => Vectors::Bf16(rounded(config)),
        }
    }

    /// That of one expert; `E` is the handle's element type.
    pub(super) fn of<E: Element>(&self, expert: usize, hidden: usize) -> Row<'_, E> {
        let all: &[E] = match self {
            Vectors::F32(all) => bytemuck::cast_slice(all),
            Vectors::F16(all) => bytemuck::cast_slice(all),
            Vectors::Bf16(all) => bytemuck::cast_slice(all),
        };
        Row::from(&all[expert * hidden..(expert + 1) * hidden])
    }
}
