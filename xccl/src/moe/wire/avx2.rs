//! 8 elements at a time: AVX2 and F16C.

use std::arch::x86_64::*;

use super::WireFormat;
use super::vector::{self, Fp8, NAN_CODE, QUIET_NAN, Vector};
use crate::dtype::{DType, Element};

struct Avx2;

/// # Safety
/// As for [`vector::encode`].
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn encode<E: Element>(
    format: WireFormat,
    row: &[E],
    smooth: Option<&[f32]>,
    values: &mut [u8],
    scales: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { vector::encode::<Avx2, E>(format, row, smooth, values, scales) }
}

/// # Safety
/// As for [`vector::decode`].
#[target_feature(enable = "avx2,f16c")]
pub(super) unsafe fn decode<E: Element>(format: WireFormat, values: *const u8, scales: *const u8, to: &mut [E]) {
    // SAFETY: by the caller's promise.
    unsafe { vector::decode::<Avx2, E>(format, values, scales, to) }
}

/// The lower halves of 32-bit lanes, in order.
#[inline]
#[target_feature(enable = "avx2")]
fn halves(x: __m256i) -> __m128i {
    let packed = _mm256_packus_epi32(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)), _mm256_setzero_si256());
    _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b10_00>(packed))
}

impl Vector for Avx2 {
    type Float = __m256;
    type Bits = __m256i;
    const LANES: usize = 8;

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn widen<E: Element>(from: *const E) -> __m256 {
        // SAFETY: 8 elements are readable, by the caller's promise; all loads take any address.
        unsafe {
            match E::DTYPE {
                DType::BF16 => {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                }
                DType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                DType::F32 => _mm256_loadu_ps(from.cast()),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn narrow<E: Element>(x: __m256, to: *mut E) {
        // SAFETY: room for 8 elements, by the caller's promise; all stores take any address.
        unsafe {
            match E::DTYPE {
                DType::BF16 => {
                    let bits = _mm256_castps_si256(x);
                    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                    let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                    _mm_storeu_si128(to.cast(), halves(_mm256_srli_epi32::<16>(rounded)));
                }
                DType::F16 => _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(x)),
                DType::F32 => _mm256_storeu_ps(to.cast(), x),
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn signed(from: *const u8) -> __m256 {
        // SAFETY: 8 bytes are readable, by the caller's promise.
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(from.cast()) }))
    }

    /// By way of f16, which has as large an exponent as e5m2, and a larger one than e4m3.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn fp8<F: Fp8>(from: *const u8) -> __m256 {
        // SAFETY: 8 bytes are readable, by the caller's promise.
        let codes = _mm_cvtepu8_epi16(unsafe { _mm_loadl_epi64(from.cast()) });
        if F::MANTISSA == 2 {
            return _mm256_cvtph_ps(_mm_slli_epi16::<8>(codes));
        }
        let magnitude = _mm_slli_epi16::<7>(_mm_and_si128(codes, _mm_set1_epi16(0x7f)));
        let sign = _mm_slli_epi16::<8>(_mm_and_si128(codes, _mm_set1_epi16(0x80)));
        let is_nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(i16::from(NAN_CODE) << 7));
        // All exponent and mantissa bits set are a NaN.
        let halves = _mm_or_si128(_mm_or_si128(magnitude, sign), _mm_and_si128(is_nan, _mm_set1_epi16(0x7e00)));
        // Biases of 15 and 7.
        _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(256.0))
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn bytes(x: __m256i, to: *mut u8) {
        let bytes = _mm256_and_si256(x, _mm256_set1_epi32(0xff));
        let narrow = _mm_packus_epi16(halves(bytes), _mm_setzero_si128());
        // SAFETY: room for 8 bytes, by the caller's promise.
        unsafe { _mm_storel_epi64(to.cast(), narrow) }
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn splat(x: f32) -> __m256 {
        _mm256_set1_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn splat_bits(x: u32) -> __m256i {
        _mm256_set1_epi32(x as i32)
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn bits(x: __m256) -> __m256i {
        _mm256_castps_si256(x)
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn float(x: __m256i) -> __m256 {
        _mm256_castsi256_ps(x)
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        _mm256_add_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        _mm256_mul_ps(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        _mm256_and_si256(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        _mm256_or_si256(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn plus(a: __m256i, b: __m256i) -> __m256i {
        _mm256_add_epi32(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn minus(a: __m256i, b: __m256i) -> __m256i {
        _mm256_sub_epi32(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn shift_right(a: __m256i, by: u32) -> __m256i {
        _mm256_srlv_epi32(a, _mm256_set1_epi32(by as i32))
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn max(a: __m256i, b: __m256i) -> __m256i {
        _mm256_max_epu32(a, b)
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn largest(a: __m256i) -> u32 {
        let four = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
        let two = _mm_max_epu32(four, _mm_shuffle_epi32::<0b11_10>(four));
        _mm_cvtsi128_si32(_mm_max_epu32(two, _mm_shuffle_epi32::<0b01>(two))) as u32
    }

    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn quiet(x: __m256) -> __m256 {
        let is_nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x);
        _mm256_blendv_ps(x, _mm256_set1_ps(f32::from_bits(QUIET_NAN)), is_nan)
    }
}
