//! What a combine adds to the sums, and their norm.

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use xccl::{Element, Epilogue, Residual, RmsNorm};

use crate::boundary::{Failure, Outcome, slice, slice_mut};

/// What xcclMoeCombineRecvWith does with the sum s[t] of each token, over k from 0 on in f32:
///
/// - out[t] = round(s[t] + bias + residual[t]), added in this order in f32 and rounded once;
/// - normed[t] = round((out[t] * r) * norm_weight), r = 1 / sqrt(sum of out[t][i]^2 / hidden + eps), in f32 without fused
///   multiplications. The norm is that of the rounded out[t], so a pass of its own over out gives the same bits. The squares are
///   summed in a fixed order: 64 sums, the i-th of the elements i, i + 64, ..., of which the upper half is added to the lower one
///   until one is left; the result is the same on every processor.
///
/// Set it to XCCL_MOE_EPILOGUE_INITIALIZER, then its fields. Elements are of the handle's type.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct xcclMoeEpilogue_t {
    /// sizeof(xcclMoeEpilogue_t).
    pub size: usize,
    /// [hidden]; null: none.
    pub bias: *const c_void,
    /// [num_tokens, hidden], or the same memory as out, which the sums are then added to; null: none.
    pub residual: *const c_void,
    /// [hidden]; null: no norm.
    pub norm_weight: *const c_void,
    /// [num_tokens, hidden], where the normed rows go; not looked at without norm_weight.
    pub normed: *mut c_void,
    /// Added to the mean of the squares: finite, 0 or more.
    pub eps: f32,
    /// [num_tokens, hidden], the tokens, which copy and constant experts are worked out from: needed for those where rows travel
    /// encoded. Null: they are taken from the outbox.
    pub tokens: *const c_void,
}

pub(super) const NO_EPILOGUE: xcclMoeEpilogue_t = xcclMoeEpilogue_t {
    size: 0,
    bias: null(),
    residual: null(),
    norm_weight: null(),
    normed: null_mut(),
    eps: 0.0,
    tokens: null(),
};

/// Whether two arrays have an element in common.
fn overlap<E>(a: &[E], b: &[E]) -> bool {
    let (a, b) = (a.as_ptr_range(), b.as_ptr_range());
    !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end
}

/// `out` and the epilogue's arrays, checked.
///
/// # Safety
/// The pointers are null or good for the sizes that [`xcclMoeEpilogue_t`] gives.
pub(super) unsafe fn arrays_of<'a, E: Element>(
    epilogue: &xcclMoeEpilogue_t,
    out: *mut c_void,
    tokens: usize,
    hidden: usize,
) -> Outcome<(&'a mut [E], Epilogue<'a, E>)> {
    let xcclMoeEpilogue_t { bias, residual, norm_weight, normed, eps, tokens: sent, .. } = *epilogue;
    let (all, has_norm) = (tokens * hidden, !norm_weight.is_null());
    let in_place = !residual.is_null() && residual == out.cast_const();
    if has_norm && !(eps.is_finite() && eps >= 0.0) {
        return Err(Failure::argument(format!("epilogue->eps is {eps}: expected a finite number, 0 or more")));
    }
    let elements = |at: *const c_void, n: usize| if at.is_null() { 0 } else { n };
    let rows = if in_place { 0 } else { elements(residual, all) };
    // Shared views of everything for the comparison, which are gone before anything is written.
    // SAFETY: the caller's promise.
    unsafe {
        let written = [
            ("out", slice(out.cast_const().cast::<E>(), all, "out")?),
            (
                "epilogue->normed",
                slice(normed.cast_const().cast::<E>(), if has_norm { all } else { 0 }, "epilogue->normed")?,
            ),
        ];
        let read = [
            ("epilogue->bias", slice(bias.cast::<E>(), elements(bias, hidden), "epilogue->bias")?),
            ("epilogue->residual", slice(residual.cast::<E>(), rows, "epilogue->residual")?),
            ("epilogue->tokens", slice(sent.cast::<E>(), elements(sent, all), "epilogue->tokens")?),
            (
                "epilogue->norm_weight",
                slice(norm_weight.cast::<E>(), elements(norm_weight, hidden), "epilogue->norm_weight")?,
            ),
        ];
        let pairs = written.iter().flat_map(|w| read.iter().map(move |r| (w, r))).chain([(&written[0], &written[1])]);
        for ((one, a), (other, b)) in pairs {
            if overlap(a, b) {
                return Err(Failure::argument(format!("{one} overlaps {other}: expected memory of its own")));
            }
        }
    }
    // SAFETY: the caller's promise; checked to be apart where something is written.
    unsafe {
        let some = |at: *const c_void, n: usize, name| match at.is_null() {
            true => Ok::<_, Failure>(None),
            false => slice(at.cast::<E>(), n, name).map(Some),
        };
        let norm = match some(norm_weight, hidden, "epilogue->norm_weight")? {
            None => None,
            Some(weight) => Some(RmsNorm { weight, eps, out: slice_mut(normed.cast::<E>(), all, "epilogue->normed")? }),
        };
        let residual = match some(residual, rows, "epilogue->residual")? {
            _ if in_place => Residual::InPlace,
            None => Residual::None,
            Some(rows) => Residual::Rows(rows),
        };
        let bias = some(bias, hidden, "epilogue->bias")?;
        let epilogue = Epilogue { bias, residual, norm, tokens: some(sent, all, "epilogue->tokens")? };
        Ok((slice_mut(out.cast::<E>(), all, "out")?, epilogue))
    }
}
