//! 16 elements at a time: AVX-512 F, BW and VL, without and with BF16.

use std::arch::x86_64::*;

use super::vector::{self, Fp8, NAN_CODE, QUIET_NAN, Vector};
use super::{BLOCK, WireFormat};
use crate::dtype::{DType, Element};

/// With `BF16` it rounds to bf16 with the instruction that takes numbers below 2^-126 for zeros.
struct Avx512<const BF16: bool>;

/// # Safety
/// As for [`vector::encode`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn encode<E: Element>(
    format: WireFormat,
    row: &[E],
    smooth: Option<&[f32]>,
    values: &mut [u8],
    scales: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { vector::encode::<Avx512<false>, E>(format, row, smooth, values, scales) }
}

/// # Safety
/// As for [`vector::decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn decode<E: Element>(format: WireFormat, values: *const u8, scales: *const u8, to: &mut [E]) {
    // SAFETY: by the caller's promise.
    unsafe { vector::decode::<Avx512<false>, E>(format, values, scales, to) }
}

/// Any code but zero is at least 2^-16, so from this scale on no number is below 2^-126.
const LEAST_SCALE: f32 = 7.888_609e-31; // 2^-100

/// # Safety
/// As for [`vector::decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn decode_bf16<E: Element>(format: WireFormat, values: *const u8, scales: *const u8, to: &mut [E]) {
    // SAFETY: by the caller's promise.
    let scale = |i| unsafe { scales.cast::<f32>().add(i).read_unaligned() };
    let is_small = |i| scale(i).abs() < LEAST_SCALE;
    if E::DTYPE != DType::BF16 || (0..format.scales(to.len())).any(is_small) {
        // SAFETY: by the caller's promise.
        return unsafe { vector::decode::<Avx512<false>, E>(format, values, scales, to) };
    }
    // SAFETY: by the caller's promise.
    unsafe { vector::decode::<Avx512<true>, E>(format, values, scales, to) }
}

/// # Safety
/// `to` is good for 32 bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn narrow_bf16(x: __m512, to: *mut u8) {
    // SAFETY: by the caller's promise; both types are 32 bytes without padding.
    unsafe { _mm256_storeu_si256(to.cast(), std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(x))) }
}

impl<const BF16: bool> Vector for Avx512<BF16> {
    type Float = __m512;
    type Bits = __m512i;
    const LANES: usize = 16;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn widen<E: Element>(from: *const E) -> __m512 {
        // SAFETY: 16 elements are readable, by the caller's promise; all loads take any address.
        unsafe {
            match E::DTYPE {
                DType::BF16 => {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
                DType::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())),
                DType::F32 => _mm512_loadu_ps(from.cast()),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn narrow<E: Element>(x: __m512, to: *mut E) {
        let to = to.cast::<u8>();
        // SAFETY: room for 16 elements, by the caller's promise; all stores take any address.
        unsafe {
            match E::DTYPE {
                DType::BF16 if BF16 => narrow_bf16(x, to),
                DType::BF16 => {
                    let bits = _mm512_castps_si512(x);
                    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                    _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)));
                }
                DType::F16 => {
                    _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(x));
                }
                DType::F32 => _mm512_storeu_ps(to.cast(), x),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn signed(from: *const u8) -> __m512 {
        // SAFETY: 16 bytes are readable, by the caller's promise.
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(from.cast()) }))
    }

    /// By way of f16, which has as large an exponent as e5m2, and a larger one than e4m3.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn fp8<F: Fp8>(from: *const u8) -> __m512 {
        // SAFETY: 16 bytes are readable, by the caller's promise.
        let codes = _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(from.cast()) });
        if F::MANTISSA == 2 {
            return _mm512_cvtph_ps(_mm256_slli_epi16::<8>(codes));
        }
        let magnitude = _mm256_slli_epi16::<7>(_mm256_and_si256(codes, _mm256_set1_epi16(0x7f)));
        let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(codes, _mm256_set1_epi16(0x80)));
        let is_nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(i16::from(NAN_CODE) << 7));
        let halves = _mm256_mask_set1_epi16(_mm256_or_si256(magnitude, sign), is_nan, 0x7e00);
        // Biases of 15 and 7.
        _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256.0))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn bytes(x: __m512i, to: *mut u8) {
        // SAFETY: room for 16 bytes, by the caller's promise.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(x)) }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn splat(x: f32) -> __m512 {
        _mm512_set1_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn splat_bits(x: u32) -> __m512i {
        _mm512_set1_epi32(x as i32)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn bits(x: __m512) -> __m512i {
        _mm512_castps_si512(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn float(x: __m512i) -> __m512 {
        _mm512_castsi512_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        _mm512_add_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        _mm512_mul_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        _mm512_and_si512(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        _mm512_or_si512(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn plus(a: __m512i, b: __m512i) -> __m512i {
        _mm512_add_epi32(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn minus(a: __m512i, b: __m512i) -> __m512i {
        _mm512_sub_epi32(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn shift_right(a: __m512i, by: u32) -> __m512i {
        _mm512_srlv_epi32(a, _mm512_set1_epi32(by as i32))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn max(a: __m512i, b: __m512i) -> __m512i {
        _mm512_max_epu32(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn largest(a: __m512i) -> u32 {
        _mm512_reduce_max_epu32(a)
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn quiet(x: __m512) -> __m512 {
        let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        let bits = _mm512_mask_set1_epi32(_mm512_castps_si512(x), is_nan, QUIET_NAN as i32);
        _mm512_castsi512_ps(bits)
    }
}

const _: () = assert!(BLOCK.is_multiple_of(16));
