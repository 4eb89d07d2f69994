//! The loops that touch every element.
//!
//! Each is one plain loop, compiled once per instruction set and chosen at run time. Rust never fuses a multiplication with
//! an addition on its own, so all versions give the same bits.

#[cfg(target_arch = "x86_64")]
mod avx512;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::dtype::{DType, Element};
use crate::kernels::Kernels;
use crate::memory::fetch;
use crate::memory::row::Row;

pub(super) use crate::memory::stream::{STREAMING_BYTES, end_streaming, stream};

/// From so many bytes on a dispatch's copy into the outbox may go past the caches, if that is found to be faster: see
/// [`Ways`](super::ways::Ways). Its lines were last read by other cores, and each would have to come back from one before it can be
/// written through the cache. Past the caches and through them, far from the reader: 0.9 MB of rows take 46 and 19 us, 1.4 MB 72
/// and 53, 1.8 MB 64 to 117 and 230, 14.7 MB 796 and 861; reading them afterwards takes as long either way.
pub(super) const STREAMING_OUTBOX_BYTES: usize = 3 << 19;

/// Elements summed at a time: few enough that the compiler keeps the sums in vector registers.
const BLOCK: usize = 64;

/// A weighted sum of rows: `out[i] = sum over rows, in order, of weight * row[i]`, accumulated in f32 and rounded once. No rows
/// give zeros.
#[derive(Clone, Copy)]
pub(super) struct Sum<'a, E> {
    /// Each as long as the output.
    pub(super) rows: &'a [(Row<'a, E>, f32)],
    /// The rows that are summed next: what of them is needed first is fetched meanwhile.
    pub(super) ahead: &'a [(Row<'a, E>, f32)],
    /// Adds what the output holds, last.
    pub(super) onto: bool,
    /// Writes past the caches, where kernels can. [`end_streaming`] has to follow.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "plain loops cannot"))]
    pub(super) streaming: bool,
}

/// How many bytes, all rows together, are on their way while others are summed: on from the end of a row into the one that is
/// summed next. The processor's own prefetcher begins anew with each row, and lines that another core has just written take
/// longest. Sums of two rows of 7168 bf16 from two ranks take so 0.57 of their time for 128 tokens (145 us where 255), 0.8 for
/// 1024, and those of eight rows 0.8 for 1024; with 1 KiB or 8 KiB less is gained.
const AHEAD: usize = 4 << 10;

impl<'a, E: Element> Sum<'a, E> {
    pub(super) fn of(rows: &'a [(Row<'a, E>, f32)]) -> Self {
        Sum { rows, ahead: &[], onto: false, streaming: false }
    }

    /// Forms the sum.
    ///
    /// # Panics
    /// When a row is not as long as `out`.
    pub(super) fn write(self, kernels: Kernels, out: &mut [E]) {
        assert!(self.rows.iter().all(|(row, _)| row.len() == out.len()), "a row's length");
        match kernels {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: kernels are resolved, so this processor has them; the rows are as long as `out`.
            Kernels::Avx512Bf16 => unsafe { sum_avx512_bf16(self, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Kernels::Avx512 => unsafe { sum_avx512(self, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Kernels::Avx2 => unsafe { sum_avx2(self, out) },
            // SAFETY: the rows are as long as `out`.
            _ => unsafe { sum_portable(self, out, 0) },
        }
    }

    /// Fetches of each row what [`write`](Self::write) needs before what it fetches itself.
    pub(super) fn fetch_heads(&self) {
        for (row, _) in self.rows {
            let bytes = self.distance().min(row.len() * size_of::<E>());
            fetch::lines(row.as_ptr().cast(), bytes).for_each(fetch::to_read);
        }
    }

    /// How many bytes ahead of its use a row's line is fetched.
    fn distance(&self) -> usize {
        AHEAD / self.rows.len().max(1)
    }

    /// Fetches `bytes` bytes, `distance` bytes on from element `at` of the `i`-th row.
    #[inline(always)]
    fn fetch_ahead(&self, i: usize, row: Row<'_, E>, at: usize, distance: usize, bytes: usize) {
        let (far, end) = (at * size_of::<E>() + distance, row.len() * size_of::<E>());
        let line = match self.ahead.get(i) {
            _ if far < end => row.as_ptr().cast::<u8>().wrapping_add(far),
            Some((next, _)) if far < 2 * end => next.as_ptr().cast::<u8>().wrapping_add(far - end),
            _ => return,
        };
        fetch::lines(line, bytes).for_each(fetch::to_read);
    }
}

/// # Safety
/// Each row is as long as `out`; so it is for all versions.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn sum_avx512<E: Element>(sum: Sum<'_, E>, out: &mut [E]) {
    let done = match E::DTYPE {
        // SAFETY: by the caller's promise; the element type was just looked at.
        DType::BF16 => unsafe { avx512::plain(sum, out) },
        _ => 0,
    };
    // SAFETY: by the caller's promise.
    unsafe { sum_portable(sum, out, done) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn sum_avx512_bf16<E: Element>(sum: Sum<'_, E>, out: &mut [E]) {
    let done = match E::DTYPE {
        // SAFETY: by the caller's promise; the element type was just looked at.
        DType::BF16 => unsafe { avx512::bf16(sum, out) },
        _ => 0,
    };
    // SAFETY: by the caller's promise.
    unsafe { sum_portable(sum, out, done) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn sum_avx2<E: Element>(sum: Sum<'_, E>, out: &mut [E]) {
    // SAFETY: by the caller's promise.
    unsafe { sum_portable(sum, out, 0) }
}

/// Sums from element `from` on.
#[inline(always)]
unsafe fn sum_portable<E: Element>(sum: Sum<'_, E>, out: &mut [E], from: usize) {
    let distance = sum.distance();
    for (block, out) in out[from..].chunks_mut(BLOCK).enumerate() {
        let mut sums = [0.0f32; BLOCK];
        let mut row = [E::zeroed(); BLOCK];
        for (i, &(from_row, weight)) in sum.rows.iter().enumerate() {
            let at = from + block * BLOCK;
            sum.fetch_ahead(i, from_row, at, distance, BLOCK * size_of::<E>());
            // The peer that owns the row might be writing it, against the protocol: so copy first, then compute.
            // SAFETY: the row is as long as the whole of `out` by the caller's promise; `row` holds a block.
            unsafe { std::ptr::copy_nonoverlapping(from_row.as_ptr().add(at), row.as_mut_ptr(), out.len()) };
            add_weighted(&mut sums, &row, weight);
        }
        if sum.onto {
            row[..out.len()].copy_from_slice(out);
            add_weighted(&mut sums, &row, 1.0);
        }
        round(&sums[..out.len()], out);
    }
}

/// `out[i] = round((row[i] * r) * weight[i])` with `r = 1 / sqrt(mean of row[i]^2 + eps)`, in f32, without fused operations. The
/// squares are summed in the order that [`Epilogue`](super::Epilogue) tells.
///
/// # Panics
/// When the three are not equally long.
pub(super) fn rms_norm<E: Element>(kernels: Kernels, row: &[E], weight: &[E], eps: f32, out: &mut [E]) {
    assert!(row.len() == out.len() && weight.len() == out.len(), "a row's length");
    match kernels {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: kernels are resolved, so this processor has them.
        Kernels::Avx512 | Kernels::Avx512Bf16 => unsafe { rms_norm_avx512(row, weight, eps, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Kernels::Avx2 => unsafe { rms_norm_avx2(row, weight, eps, out) },
        _ => rms_norm_portable(row, weight, eps, out),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn rms_norm_avx512<E: Element>(row: &[E], weight: &[E], eps: f32, out: &mut [E]) {
    rms_norm_portable(row, weight, eps, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn rms_norm_avx2<E: Element>(row: &[E], weight: &[E], eps: f32, out: &mut [E]) {
    rms_norm_portable(row, weight, eps, out);
}

#[inline(always)]
fn rms_norm_portable<E: Element>(row: &[E], weight: &[E], eps: f32, out: &mut [E]) {
    let mut squares = [0.0f32; BLOCK];
    let (blocks, rest) = row.as_chunks::<BLOCK>();
    for block in blocks {
        let x = widen(block);
        squares.iter_mut().zip(x).for_each(|(s, x)| *s += x * x);
    }
    // A short block, filled up with zeros: those add +0 to sums that are never -0.
    let mut last = [E::zeroed(); BLOCK];
    last[..rest.len()].copy_from_slice(rest);
    squares.iter_mut().zip(widen(&last)).for_each(|(s, x)| *s += x * x);
    let mut width = BLOCK / 2;
    while width > 0 {
        let (low, high) = squares.split_at_mut(width);
        low.iter_mut().zip(high).for_each(|(l, h)| *l += *h);
        width /= 2;
    }
    let r = 1.0 / (squares[0] / row.len() as f32 + eps).sqrt();

    let (weights, weight_rest) = weight.as_chunks::<BLOCK>();
    let (outs, out_rest) = out.as_chunks_mut::<BLOCK>();
    for ((block, weight), out) in blocks.iter().zip(weights).zip(outs) {
        let mut scaled = widen(block);
        scaled.iter_mut().zip(widen(weight)).for_each(|(x, w)| *x = *x * r * w);
        round(&scaled, out);
    }
    let mut scaled = widen(&last);
    let mut last_weight = [E::zeroed(); BLOCK];
    last_weight[..rest.len()].copy_from_slice(weight_rest);
    scaled.iter_mut().zip(widen(&last_weight)).for_each(|(x, w)| *x = *x * r * w);
    round(&scaled[..rest.len()], out_rest);
}

/// The values as f32.
#[inline(always)]
fn widen<E: Element>(row: &[E; BLOCK]) -> [f32; BLOCK] {
    let mut wide = [0.0f32; BLOCK];
    match E::DTYPE {
        DType::BF16 => {
            let bits: &[u16] = bytemuck::cast_slice(row);
            wide.iter_mut().zip(bits).for_each(|(w, &b)| *w = f32::from_bits(u32::from(b) << 16));
        }
        DType::F16 => bytemuck::cast_slice::<E, f16>(row).convert_to_f32_slice(&mut wide),
        DType::F32 => wide.copy_from_slice(bytemuck::cast_slice(row)),
    }
    wide
}

#[inline(always)]
fn add_weighted<E: Element>(sum: &mut [f32; BLOCK], row: &[E; BLOCK], weight: f32) {
    match E::DTYPE {
        DType::BF16 => {
            let bits: &[u16] = bytemuck::cast_slice(row);
            for (s, &b) in sum.iter_mut().zip(bits) {
                *s += weight * f32::from_bits(u32::from(b) << 16);
            }
        }
        DType::F16 => {
            let mut wide = [0.0f32; BLOCK];
            bytemuck::cast_slice::<E, f16>(row).convert_to_f32_slice(&mut wide);
            for (s, x) in sum.iter_mut().zip(wide) {
                *s += weight * x;
            }
        }
        DType::F32 => {
            for (s, &x) in sum.iter_mut().zip(bytemuck::cast_slice::<E, f32>(row)) {
                *s += weight * x;
            }
        }
    }
}

/// Rounds to nearest, ties to even; NaN stays NaN.
#[inline(always)]
fn round<E: Element>(sum: &[f32], out: &mut [E]) {
    match E::DTYPE {
        DType::BF16 => {
            for (o, &s) in bytemuck::cast_slice_mut::<E, u16>(out).iter_mut().zip(sum) {
                *o = bf16_bits(s);
            }
        }
        DType::F16 => bytemuck::cast_slice_mut::<E, f16>(out).convert_from_f32_slice(sum),
        DType::F32 => bytemuck::cast_slice_mut::<E, f32>(out).copy_from_slice(sum),
    }
}

/// `bf16::from_f32` without a branch, so that the loop around it vectorizes.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x0040;
    (if x.is_nan() { quiet_nan } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    #[test]
    fn rounding_to_bf16_agrees_with_the_half_crate() {
        for high in 0..=u16::MAX {
            for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits((u32::from(high) << 16) | low);
                assert_eq!(bf16_bits(x), bf16::from_f32(x).to_bits(), "{x} {:#x}", x.to_bits());
            }
        }
    }

    fn check<E: Element>(rows: &[Vec<f32>], weights: &[f32], n: usize) {
        let rows: Vec<Vec<E>> = rows.iter().map(|r| r[..n].iter().map(|&x| E::from_f32(x)).collect()).collect();
        let pairs: Vec<_> = rows.iter().zip(weights).map(|(r, &w)| (Row::from(r.as_slice()), w)).collect();
        let mut expected = vec![E::zeroed(); n];
        for (i, expected) in expected.iter_mut().enumerate() {
            let sum = rows.iter().zip(weights).fold(0.0f32, |sum, (row, w)| sum + w * row[i].to_f32());
            *expected = E::from_f32(sum);
        }
        for kernels in Kernels::available() {
            for streaming in [false, true] {
                let mut out = vec![E::zeroed(); n];
                Sum { ahead: &pairs, streaming, ..Sum::of(&pairs) }.write(kernels, &mut out);
                end_streaming();
                assert_same(kernels, &out, &expected);
            }
        }
    }

    /// The same bits, but where both are no number: which of several NaNs comes out is the processor's affair.
    fn assert_same<E: Element>(kernels: Kernels, found: &[E], expected: &[E]) {
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let (x, y) = (found.to_f32(), expected.to_f32());
            assert!(x.to_bits() == y.to_bits() || (x.is_nan() && y.is_nan()), "{kernels}, element {i}: {x} or {y}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_streamed_row_is_the_row(row in prop::collection::vec(any::<u16>(), 0..300), offset in 0usize..40) {
            let row: Vec<bf16> = row.into_iter().map(bf16::from_bits).collect();
            let mut to = vec![bf16::from_bits(7); row.len() + 80];
            stream(Row::from(row.as_slice()), &mut to[offset..offset + row.len()]);
            end_streaming();
            for (i, x) in to.iter().enumerate() {
                let expected = i.checked_sub(offset).and_then(|i| row.get(i)).map_or(7, |x| x.to_bits());
                prop_assert_eq!(x.to_bits(), expected);
            }
        }

        #[test]
        fn the_weighted_sum_is_the_plain_one_bit_for_bit(
            rows in prop::collection::vec(prop::collection::vec(-100f32..100.0, 600), 0..9),
            weights in prop::collection::vec(-2f32..2.0, 9),
            n in 1usize..600,
        ) {
            check::<f32>(&rows, &weights, n);
            check::<bf16>(&rows, &weights, n);
            check::<f16>(&rows, &weights, n);
        }

        #[test]
        fn sums_of_any_bits_are_the_plain_ones(
            bits in prop::collection::vec(prop::collection::vec(any::<u16>(), 300), 1..4),
            // Most of them below 2^-126, which some instructions take for zeros.
            small in any::<bool>(),
            weights in prop::collection::vec(prop_oneof![Just(1.0f32), Just(0.0), -2f32..2.0], 3),
        ) {
            let value = |b: u16| bf16::from_bits(if small { b & 0x80ff } else { b }).to_f32();
            let rows: Vec<Vec<f32>> = bits.into_iter().map(|row| row.into_iter().map(value).collect()).collect();
            check::<bf16>(&rows, &weights, 300);
        }

        #[test]
        fn what_is_added_onto_comes_last(
            rows in prop::collection::vec(prop::collection::vec(-100f32..100.0, 300), 0..4),
            n in 0usize..300,
        ) {
            check_onto::<f32>(&rows, n);
            check_onto::<bf16>(&rows, n);
            check_onto::<f16>(&rows, n);
        }

        #[test]
        fn the_norm_is_the_plain_one_bit_for_bit(
            bits in prop::collection::vec(any::<(u32, u32)>(), 1..700),
            tame in any::<bool>(),
            eps in prop_oneof![Just(0.0f32), Just(1e-6), Just(1e30)],
        ) {
            let value = |bits: u32| match tame {
                true => (bits % 2001) as f32 / 100.0 - 10.0,
                false => f32::from_bits(bits), // also infinite, subnormal, none
            };
            let values: Vec<(f32, f32)> = bits.iter().map(|&(x, w)| (value(x), value(w))).collect();
            check_norm::<f32>(&values, eps);
            check_norm::<bf16>(&values, eps);
            check_norm::<f16>(&values, eps);
        }
    }

    fn check_onto<E: Element>(rows: &[Vec<f32>], n: usize) {
        let rows: Vec<Vec<E>> = rows.iter().map(|r| r[..n].iter().map(|&x| E::from_f32(x)).collect()).collect();
        let pairs: Vec<_> = rows.iter().map(|r| (Row::from(r.as_slice()), 0.3)).collect();
        let own: Vec<E> = (0..n).map(|i| E::from_f32(i as f32 / 7.0 - 9.0)).collect();
        let mut appended = vec![E::zeroed(); n];
        Sum::of(&[&pairs[..], &[(Row::from(own.as_slice()), 1.0)]].concat()).write(Kernels::Scalar, &mut appended);
        for kernels in Kernels::available() {
            let mut out = own.clone();
            Sum { onto: true, ..Sum::of(&pairs) }.write(kernels, &mut out);
            assert_same(kernels, &out, &appended);
        }
    }

    /// The formula, written out.
    fn check_norm<E: Element>(values: &[(f32, f32)], eps: f32) {
        let (row, weight): (Vec<E>, Vec<E>) = values.iter().map(|&(x, w)| (E::from_f32(x), E::from_f32(w))).unzip();
        let mut sums = [0.0f32; 64];
        for (i, x) in row.iter().enumerate() {
            sums[i % 64] += x.to_f32() * x.to_f32();
        }
        for width in [32, 16, 8, 4, 2, 1] {
            for i in 0..width {
                sums[i] += sums[i + width];
            }
        }
        let r = 1.0 / (sums[0] / row.len() as f32 + eps).sqrt();
        let plain: Vec<E> = row.iter().zip(&weight).map(|(x, w)| E::from_f32((x.to_f32() * r) * w.to_f32())).collect();
        for kernels in Kernels::available() {
            let mut out = vec![E::zeroed(); row.len()];
            rms_norm(kernels, &row, &weight, eps, &mut out);
            assert_same(kernels, &out, &plain);
        }
    }
}
