//! Sums of bf16 rows with AVX-512, 32 elements of a row at a time.
//!
//! A register of 32 elements is taken apart into the even and the odd ones, each an f32 after one operation, and put together
//! again at the end: nothing is moved from lane to lane before that. The sums of 128 elements are in eight registers. Sums of two
//! rows of 7168 from two ranks take so 0.73 of the time of lanes that are widened one by one (8 tokens: 4.0 us where 5.5).

use std::arch::x86_64::*;

use super::Sum;
use crate::dtype::{DType, Element};
use crate::memory::layout::LINE;

/// Elements of a register.
const WIDTH: usize = 32;
/// Registers of a block, each summed in two halves.
const VECTORS: usize = 4;
const BLOCK: usize = VECTORS * WIDTH;

/// # Safety
/// As for [`sum`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn plain<E: Element>(sums: Sum<'_, E>, out: &mut [E]) -> usize {
    // SAFETY: by the caller's promise.
    unsafe { sum::<false, E>(sums, out) }
}

/// Rounds with the instruction that takes numbers below 2^-126 for zeros, where there are none.
///
/// # Safety
/// As for [`sum`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn bf16<E: Element>(sums: Sum<'_, E>, out: &mut [E]) -> usize {
    // SAFETY: by the caller's promise.
    unsafe { sum::<true, E>(sums, out) }
}

/// Says how many elements it has done.
///
/// # Safety
/// Each row is as long as `out`, which is of bf16. To be inlined where the features are enabled: AVX-512 F, BW and VL, with
/// `BF16` also DQ and BF16.
#[inline(always)]
unsafe fn sum<const BF16: bool, E: Element>(sum: Sum<'_, E>, out: &mut [E]) -> usize {
    debug_assert!(E::DTYPE == DType::BF16);
    let streaming = sum.streaming && out.as_ptr().align_offset(LINE) == 0;
    let (out, distance) = (bytemuck::cast_slice_mut::<E, u16>(out), sum.distance());
    let whole = out.len() / BLOCK * BLOCK;
    for at in (0..whole).step_by(BLOCK) {
        // SAFETY: the block lies inside `out` and inside each row, by the loop's bound and the caller's promise, who answers for
        // the features too. Streamed lines are aligned, as was looked at.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; VECTORS];
            for (i, &(row, weight)) in sum.rows.iter().enumerate() {
                sum.fetch_ahead(i, row, at, distance, BLOCK * size_of::<E>());
                add::<true>(&mut sums, row.as_ptr().cast::<u16>().add(at), weight);
            }
            if sum.onto {
                add::<false>(&mut sums, out.as_ptr().add(at), 1.0);
            }
            let narrow = match BF16 && !any_subnormal(&sums) {
                true => sums.map(|halves| pack_bf16(halves)),
                false => sums.map(|halves| pack(halves)),
            };
            for (v, narrow) in narrow.into_iter().enumerate() {
                let to = out.as_mut_ptr().add(at + v * WIDTH).cast();
                if streaming { _mm512_stream_si512(to, narrow) } else { _mm512_storeu_si512(to, narrow) }
            }
        }
    }
    whole
}

/// Adds a block of a row, times its weight.
///
/// # Safety
/// The block is readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn add<const WEIGHTED: bool>(sums: &mut [[__m512; 2]; VECTORS], from: *const u16, weight: f32) {
    let weight = _mm512_set1_ps(weight);
    for (v, [even, odd]) in sums.iter_mut().enumerate() {
        // SAFETY: inside the block, by the caller's promise.
        let bits = unsafe { _mm512_loadu_si512(from.add(v * WIDTH).cast()) };
        let mut low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits));
        let mut high = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
        if WEIGHTED {
            (low, high) = (_mm512_mul_ps(weight, low), _mm512_mul_ps(weight, high));
        }
        (*even, *odd) = (_mm512_add_ps(*even, low), _mm512_add_ps(*odd, high));
    }
}

/// Rounds to nearest, ties to even; NaN stays NaN.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn pack([even, odd]: [__m512; 2]) -> __m512i {
    let upper = |x: __m512| {
        let bits = _mm512_castps_si512(x);
        let last = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
        let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x0040_0000))
    };
    _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_srli_epi32::<16>(upper(even)), upper(odd))
}

/// As [`pack`], where no number is below 2^-126 but zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pack_bf16([even, odd]: [__m512; 2]) -> __m512i {
    // SAFETY: both types are 64 bytes without padding.
    let halves = unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even)) };
    // Element 2 * i is the i-th of the lower half, 2 * i + 1 that of the upper half.
    let mut places = [0u16; WIDTH];
    for (i, place) in places.iter_mut().enumerate() {
        *place = (i / 2 + i % 2 * WIDTH / 2) as u16;
    }
    // SAFETY: 64 bytes are readable.
    let places = unsafe { _mm512_loadu_si512(places.as_ptr().cast()) };
    _mm512_permutexvar_epi16(places, halves)
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn any_subnormal(sums: &[[__m512; 2]; VECTORS]) -> bool {
    const SUBNORMAL: i32 = 0x20;
    sums.iter().flatten().fold(0, |any, &x| any | _mm512_fpclass_ps_mask::<SUBNORMAL>(x)) != 0
}
