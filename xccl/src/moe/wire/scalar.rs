//! One element at a time: the reference, for any processor.

use super::WireFormat;
use super::vector::{self, Fp8, QUIET_NAN, Vector};
use crate::dtype::Element;

pub(super) struct Scalar;

/// # Safety
/// As for [`vector::encode`].
pub(super) unsafe fn encode<E: Element>(
    format: WireFormat,
    row: &[E],
    smooth: Option<&[f32]>,
    values: &mut [u8],
    scales: &mut [f32],
) {
    // SAFETY: by the caller's promise; no feature is needed.
    unsafe { vector::encode::<Scalar, E>(format, row, smooth, values, scales) }
}

/// # Safety
/// As for [`vector::decode`].
pub(super) unsafe fn decode<E: Element>(format: WireFormat, values: *const u8, scales: *const u8, to: &mut [E]) {
    // SAFETY: as above.
    unsafe { vector::decode::<Scalar, E>(format, values, scales, to) }
}

impl Vector for Scalar {
    type Float = f32;
    type Bits = u32;
    const LANES: usize = 1;

    #[inline(always)]
    unsafe fn widen<E: Element>(from: *const E) -> f32 {
        // SAFETY: by the caller's promise.
        unsafe { from.read() }.to_f32()
    }
    #[inline(always)]
    unsafe fn narrow<E: Element>(x: f32, to: *mut E) {
        // SAFETY: by the caller's promise.
        unsafe { to.write(E::from_f32(x)) }
    }
    #[inline(always)]
    unsafe fn signed(from: *const u8) -> f32 {
        // SAFETY: by the caller's promise.
        f32::from(unsafe { from.cast::<i8>().read() })
    }
    #[inline(always)]
    unsafe fn fp8<F: Fp8>(from: *const u8) -> f32 {
        // SAFETY: by the caller's promise.
        F::VALUES[usize::from(unsafe { from.read() })]
    }
    #[inline(always)]
    unsafe fn bytes(x: u32, to: *mut u8) {
        // SAFETY: by the caller's promise.
        unsafe { to.write(x as u8) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    unsafe fn splat_bits(x: u32) -> u32 {
        x
    }
    #[inline(always)]
    unsafe fn bits(x: f32) -> u32 {
        x.to_bits()
    }
    #[inline(always)]
    unsafe fn float(x: u32) -> f32 {
        f32::from_bits(x)
    }
    #[inline(always)]
    unsafe fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    unsafe fn mul(a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    unsafe fn and(a: u32, b: u32) -> u32 {
        a & b
    }
    #[inline(always)]
    unsafe fn or(a: u32, b: u32) -> u32 {
        a | b
    }
    #[inline(always)]
    unsafe fn plus(a: u32, b: u32) -> u32 {
        a.wrapping_add(b)
    }
    #[inline(always)]
    unsafe fn minus(a: u32, b: u32) -> u32 {
        a.wrapping_sub(b)
    }
    #[inline(always)]
    unsafe fn shift_right(a: u32, by: u32) -> u32 {
        a >> by
    }
    #[inline(always)]
    unsafe fn max(a: u32, b: u32) -> u32 {
        a.max(b)
    }
    #[inline(always)]
    unsafe fn largest(a: u32) -> u32 {
        a
    }
    #[inline(always)]
    unsafe fn quiet(x: f32) -> f32 {
        if x.is_nan() { f32::from_bits(QUIET_NAN) } else { x }
    }
}
