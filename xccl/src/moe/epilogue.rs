//! What combine does with a token's sum before it writes it.

use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::memory::divided::{Divided, Owners};

/// What [`Moe::combine_recv_with`](super::Moe::combine_recv_with) does with each token's sum while it is in registers and caches.
///
/// With `s[t]` the sum over k, from 0 on in f32:
///
/// ```text
/// out[t] = round(s[t] + bias + residual[t])                       added in this order in f32, rounded once
/// normed[t] = round((out[t] * r) * weight),  r = 1 / sqrt(sum of out[t][i]^2 / hidden + eps)
/// ```
///
/// in f32 without fused multiplications. The norm is that of the rounded `out`, as in vLLM's `fused_add_rms_norm`: what the engine
/// keeps as its residual stream is what was normed, and a pass of its own over `out` gives the same bits. The factor and the weight
/// are applied before the one rounding, as in CANN's `MoeDistributeCombineAddRmsNorm` (vLLM rounds `out[t] * r` first). The squares
/// are summed in a fixed order: 64 sums, the i-th of the elements i, i + 64, ..., of which the upper half is added to the lower one
/// until one is left; so the result is the same on every processor.
///
/// ```
/// # use xccl::{Communicator, Config, DType, Moe, MoeConfig, Routing, UniqueId};
/// use xccl::{Epilogue, Residual, RmsNorm};
/// # fn main() -> xccl::Result<()> {
/// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
/// # let moe = Moe::new(&comm, MoeConfig::new(8, 16, 1, 4, DType::F32))?;
/// # let sent = moe.dispatch_send(&[1.0f32; 16], &Routing::new(&[2i32], &[1.0]))?;
/// # let mut batch = moe.dispatch_recv(&sent)?;
/// # batch.output_row::<f32>(0)?.fill(2.0);
/// # moe.combine_send(batch)?;
/// let mut stream = vec![5.0f32; 16]; // the residual stream; the token's sum is 2
/// let mut normed = vec![0.0; 16];
/// let norm = RmsNorm { weight: &[0.5; 16], eps: 0.0, out: &mut normed };
/// let epilogue = Epilogue { residual: Residual::InPlace, norm: Some(norm), ..Epilogue::default() };
/// moe.combine_recv_with(sent, &mut stream, epilogue)?;
/// assert_eq!((stream[0], normed[0]), (7.0, 0.5));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Epilogue<'a, E> {
    /// `[hidden]`, added to every sum.
    pub bias: Option<&'a [E]>,
    /// Added to each token's sum after the bias.
    pub residual: Residual<'a, E>,
    /// The norm of what was written.
    pub norm: Option<RmsNorm<'a, E>>,
    /// `[T, hidden]`, the tokens, which copy and constant experts ([`MoeConfig::copy`](super::MoeConfig::copy)) are worked out
    /// from. Needed for those where rows travel encoded; without it they are taken from the outbox.
    pub tokens: Option<&'a [E]>,
}

/// Where the rows lie that are added to the sums.
#[derive(Debug)]
pub enum Residual<'a, E> {
    /// Nothing is added.
    None,
    /// `[T, hidden]`.
    Rows(&'a [E]),
    /// In `out`, which the sums are added to: an engine's residual stream.
    InPlace,
}

/// The root-mean-square norm of each row that combine writes.
#[derive(Debug)]
pub struct RmsNorm<'a, E> {
    /// `[hidden]`, the factors after the norm.
    pub weight: &'a [E],
    /// Added to the mean of the squares: finite, 0 or more.
    pub eps: f32,
    /// `[T, hidden]`, where the normed rows go.
    pub out: &'a mut [E],
}

impl<E> Default for Epilogue<'_, E> {
    /// Sums as [`Moe::combine_recv`](super::Moe::combine_recv) gives them.
    fn default() -> Self {
        Epilogue { bias: None, residual: Residual::None, norm: None, tokens: None }
    }
}

/// A checked epilogue, as the threads that share a combine see it.
pub(super) struct Steps<'a, E> {
    pub(super) bias: Option<&'a [E]>,
    pub(super) residual: Option<&'a [E]>,
    /// Whether `out` holds rows that the sums are added to.
    pub(super) in_place: bool,
    pub(super) norm: Option<Norm<'a, E>>,
    pub(super) tokens: Option<&'a [E]>,
}

pub(super) struct Norm<'a, E> {
    pub(super) weight: &'a [E],
    pub(super) eps: f32,
    pub(super) out: Divided<'a, E>,
}

impl<'a, E: Element> Epilogue<'a, E> {
    pub(super) fn check(self, tokens: usize, hidden: usize, owners: Owners<'a>) -> Result<Steps<'a, E>> {
        let one = |what, row: &[E]| match row.len() == hidden {
            true => Ok(()),
            false => Err(Error::Shape { what, given: row.len(), expected: format!("{hidden} (hidden)") }),
        };
        let all = |what, rows: &[E]| match rows.len() == tokens * hidden {
            true => Ok(()),
            false => {
                let expected = format!("{} ({tokens} rows * hidden {hidden})", tokens * hidden);
                Err(Error::Shape { what, given: rows.len(), expected })
            }
        };
        if let Some(bias) = self.bias {
            one("the epilogue's bias", bias)?;
        }
        let (residual, in_place) = match self.residual {
            Residual::None => (None, false),
            Residual::InPlace => (None, true),
            Residual::Rows(residual) => {
                all("the epilogue's residual", residual)?;
                (Some(residual), false)
            }
        };
        if let Some(tokens) = self.tokens {
            all("the epilogue's tokens", tokens)?;
        }
        let norm = match self.norm {
            None => None,
            Some(RmsNorm { weight, eps, out }) => {
                one("the norm's weight", weight)?;
                all("the norm's out", out)?;
                if !(eps.is_finite() && eps >= 0.0) {
                    let expected = "a finite number, 0 or more".to_owned();
                    return Err(Error::Config { option: "RmsNorm::eps", value: eps.to_string(), expected });
                }
                Some(Norm { weight, eps, out: Divided::new(out, hidden, owners) })
            }
        };
        Ok(Steps { bias: self.bias, residual, in_place, norm, tokens: self.tokens })
    }
}
