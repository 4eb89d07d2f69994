//! 4 elements at a time: NEON, which every AArch64 processor has.

#[cfg(target_arch = "aarch64")]
use std::arch::aarch64::*;

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::WireFormat;
#[cfg(not(target_arch = "aarch64"))]
use super::neon_emulated::*;
use super::vector::{self, Fp8, NAN_CODE, QUIET_NAN, Vector};
use crate::dtype::{DType, Element};

struct Neon;

/// # Safety
/// As for [`vector::encode`].
pub(super) unsafe fn encode<E: Element>(
    format: WireFormat,
    row: &[E],
    smooth: Option<&[f32]>,
    values: &mut [u8],
    scales: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe { vector::encode::<Neon, E>(format, row, smooth, values, scales) }
}

/// # Safety
/// As for [`vector::decode`].
pub(super) unsafe fn decode<E: Element>(format: WireFormat, values: *const u8, scales: *const u8, to: &mut [E]) {
    // SAFETY: by the caller's promise.
    unsafe { vector::decode::<Neon, E>(format, values, scales, to) }
}

/// Four bytes, in the lowest byte of each lane.
///
/// # Safety
/// They are readable.
#[inline]
#[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
unsafe fn four_bytes(from: *const u8) -> uint32x4_t {
    // SAFETY: by the caller's promise.
    let bytes = unsafe { from.cast::<u32>().read_unaligned() };
    let wide = vmovl_u8(vcreate_u8(u64::from(bytes)));
    vmovl_u16(vget_low_u16(wide))
}

impl Vector for Neon {
    type Float = float32x4_t;
    type Bits = uint32x4_t;
    const LANES: usize = 4;

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn widen<E: Element>(from: *const E) -> float32x4_t {
        // SAFETY: 4 elements are readable, by the caller's promise.
        unsafe {
            match E::DTYPE {
                DType::BF16 => vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))),
                DType::F16 => {
                    let mut wide = [0.0; 4];
                    from.cast::<[f16; 4]>().read_unaligned().convert_to_f32_slice(&mut wide);
                    vld1q_f32(wide.as_ptr())
                }
                DType::F32 => vld1q_f32(from.cast()),
            }
        }
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn narrow<E: Element>(x: float32x4_t, to: *mut E) {
        // SAFETY: room for 4 elements, by the caller's promise.
        unsafe {
            match E::DTYPE {
                DType::BF16 => {
                    let bits = vreinterpretq_u32_f32(x);
                    let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
                    let rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
                    vst1_u16(to.cast(), vshrn_n_u32::<16>(rounded));
                }
                DType::F16 => {
                    let (mut wide, mut narrow) = ([0.0; 4], [f16::ZERO; 4]);
                    vst1q_f32(wide.as_mut_ptr(), x);
                    narrow.convert_from_f32_slice(&wide);
                    to.cast::<[f16; 4]>().write_unaligned(narrow);
                }
                DType::F32 => vst1q_f32(to.cast(), x),
            }
        }
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn signed(from: *const u8) -> float32x4_t {
        // SAFETY: 4 bytes are readable, by the caller's promise.
        let bytes = vreinterpretq_s32_u32(unsafe { four_bytes(from) });
        vcvtq_f32_s32(vshrq_n_s32::<24>(vshlq_n_s32::<24>(bytes)))
    }

    /// A code's steps of 2^(exponent - mantissa), as an exact product: see `encode_fp8`.
    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn fp8<F: Fp8>(from: *const u8) -> float32x4_t {
        let splat = |x: u32| vdupq_n_u32(x);
        // SAFETY: 4 bytes are readable, by the caller's promise.
        let codes = unsafe { four_bytes(from) };
        let magnitude = vandq_u32(codes, splat(0x7f));
        let hidden = splat(1 << F::MANTISSA);
        let binade = vmaxq_u32(vandq_u32(magnitude, splat(0x7f & !((1 << F::MANTISSA) - 1))), hidden);
        let steps = vaddq_u32(vsubq_u32(magnitude, binade), hidden);
        let left = vdupq_n_s32(23 - F::MANTISSA as i32);
        let least = (127 + F::LEAST_EXPONENT - 1 - F::MANTISSA as i32) as u32;
        let step = vaddq_u32(vshlq_u32(binade, left), splat(least << 23));
        let value = vmulq_f32(vcvtq_f32_u32(steps), vreinterpretq_f32_u32(step));
        let infinite = vceqq_u32(magnitude, splat(u32::from(F::INFINITY_CODE)));
        let is_nan = vorrq_u32(
            vcgtq_u32(magnitude, splat(u32::from(F::INFINITY_CODE))),
            vceqq_u32(magnitude, splat(u32::from(NAN_CODE))),
        );
        let value = vbslq_f32(infinite, vdupq_n_f32(f32::INFINITY), value);
        let value = vbslq_f32(is_nan, vdupq_n_f32(f32::from_bits(QUIET_NAN)), value);
        let sign = vshlq_n_u32::<24>(vandq_u32(codes, splat(0x80)));
        vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(value), sign))
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn bytes(x: uint32x4_t, to: *mut u8) {
        let narrow = vmovn_u32(x);
        let bytes = vmovn_u16(vcombine_u16(narrow, narrow));
        // SAFETY: room for 4 bytes, by the caller's promise.
        unsafe { to.cast::<u32>().write_unaligned(vget_lane_u32::<0>(vreinterpret_u32_u8(bytes))) }
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn splat(x: f32) -> float32x4_t {
        vdupq_n_f32(x)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn splat_bits(x: u32) -> uint32x4_t {
        vdupq_n_u32(x)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn bits(x: float32x4_t) -> uint32x4_t {
        vreinterpretq_u32_f32(x)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn float(x: uint32x4_t) -> float32x4_t {
        vreinterpretq_f32_u32(x)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vaddq_f32(a, b)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        vmulq_f32(a, b)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn and(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        vandq_u32(a, b)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn or(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        vorrq_u32(a, b)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn plus(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        vaddq_u32(a, b)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn minus(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        vsubq_u32(a, b)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn shift_right(a: uint32x4_t, by: u32) -> uint32x4_t {
        vshlq_u32(a, vdupq_n_s32(-(by as i32)))
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn max(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        vmaxq_u32(a, b)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn largest(a: uint32x4_t) -> u32 {
        vmaxvq_u32(a)
    }

    #[inline]
    #[cfg_attr(target_arch = "aarch64", target_feature(enable = "neon"))]
    unsafe fn quiet(x: float32x4_t) -> float32x4_t {
        vbslq_f32(vceqq_f32(x, x), x, vdupq_n_f32(f32::from_bits(QUIET_NAN)))
    }
}
