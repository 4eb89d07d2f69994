//! The conversions, over the operations of an instruction set.

use super::{BLOCK, WireFormat};
use crate::dtype::Element;

/// What an instruction set does with a few f32, or u32, at a time.
///
/// # Safety
/// Every method needs the implementor's instruction set; pointers are good for [`LANES`](Self::LANES) elements, at any
/// address that the element may have.
pub(super) trait Vector {
    type Float: Copy;
    type Bits: Copy;
    const LANES: usize;

    /// Reads elements and widens them, without loss.
    unsafe fn widen<E: Element>(from: *const E) -> Self::Float;
    /// Rounds to the element type, to nearest even, and writes. NaN is [`QUIET_NAN`] already.
    unsafe fn narrow<E: Element>(x: Self::Float, to: *mut E);
    /// Reads signed bytes.
    unsafe fn signed(from: *const u8) -> Self::Float;
    /// Reads FP8 codes: their values, exactly.
    unsafe fn fp8<F: Fp8>(from: *const u8) -> Self::Float;
    /// Writes the lowest byte of each lane.
    unsafe fn bytes(x: Self::Bits, to: *mut u8);
    unsafe fn splat(x: f32) -> Self::Float;
    unsafe fn splat_bits(x: u32) -> Self::Bits;
    unsafe fn bits(x: Self::Float) -> Self::Bits;
    unsafe fn float(x: Self::Bits) -> Self::Float;
    unsafe fn add(a: Self::Float, b: Self::Float) -> Self::Float;
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    unsafe fn and(a: Self::Bits, b: Self::Bits) -> Self::Bits;
    unsafe fn or(a: Self::Bits, b: Self::Bits) -> Self::Bits;
    /// Modulo 2^32, as the next one.
    unsafe fn plus(a: Self::Bits, b: Self::Bits) -> Self::Bits;
    unsafe fn minus(a: Self::Bits, b: Self::Bits) -> Self::Bits;
    unsafe fn shift_right(a: Self::Bits, by: u32) -> Self::Bits;
    /// The larger; both below 2^31.
    unsafe fn max(a: Self::Bits, b: Self::Bits) -> Self::Bits;
    /// The largest lane; all below 2^31.
    unsafe fn largest(a: Self::Bits) -> u32;
    /// [`QUIET_NAN`] for any NaN.
    unsafe fn quiet(x: Self::Float) -> Self::Float;
}

/// Lanes of the widest vector.
pub(super) const MOST_LANES: usize = 16;

/// The bits of the NaN that is written.
pub(super) const QUIET_NAN: u32 = 0x7fc0_0000;
const INFINITY: u32 = 0x7f80_0000;
const MAGNITUDE: u32 = 0x7fff_ffff;

/// An 8-bit floating-point format, as the OCP specification has it.
pub(super) trait Fp8 {
    /// Bits of the mantissa.
    const MANTISSA: u32;
    /// Exponent of the least normal number, and of all subnormal ones.
    const LEAST_EXPONENT: i32;
    /// The largest finite number.
    const LARGEST: f32;
    /// The code of infinity, without its sign: NaN where there is none.
    const INFINITY_CODE: u8;
    /// The value of each code.
    const VALUES: [f32; 256] = values(Self::MANTISSA, Self::LEAST_EXPONENT, Self::INFINITY_CODE);
}

pub(super) struct Fp8E4m3;
pub(super) struct Fp8E5m2;

/// The code of NaN in both.
pub(super) const NAN_CODE: u8 = 0x7f;

impl Fp8 for Fp8E4m3 {
    const MANTISSA: u32 = 3;
    const LEAST_EXPONENT: i32 = -6;
    const LARGEST: f32 = 448.0;
    const INFINITY_CODE: u8 = NAN_CODE;
}

impl Fp8 for Fp8E5m2 {
    const MANTISSA: u32 = 2;
    const LEAST_EXPONENT: i32 = -14;
    const LARGEST: f32 = 57344.0;
    const INFINITY_CODE: u8 = 0x7c;
}

const fn values(mantissa: u32, least_exponent: i32, infinity: u8) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (magnitude, sign) = (code as u32 & 0x7f, (code as u32 & 0x80) << 24);
        let (exponent, fraction) = (magnitude >> mantissa, magnitude & ((1 << mantissa) - 1));
        values[code] = if magnitude == infinity as u32 && infinity != NAN_CODE {
            f32::from_bits(sign | INFINITY)
        } else if magnitude >= infinity as u32 {
            f32::from_bits(sign | QUIET_NAN)
        } else if exponent == 0 {
            // fraction steps of 2^(least_exponent - mantissa)
            let step = f32::from_bits(((127 + least_exponent - mantissa as i32) as u32) << 23);
            f32::from_bits(sign | (fraction as f32 * step).to_bits())
        } else {
            let biased = (127 + least_exponent - 1) as u32 + exponent;
            f32::from_bits(sign | (biased << 23) | (fraction << (23 - mantissa)))
        };
        code += 1;
    }
    values
}

/// The scale of a row or block whose largest magnitude is `amax`.
#[inline(always)]
fn scale_of(amax: f32, most: f32) -> f32 {
    (amax / most).max(f32::MIN_POSITIVE)
}

/// # Safety
/// As for [`Vector`]; `values` and `scales` have the lengths of an encoded row, `smooth` that of `row` if there is one.
#[inline(always)]
pub(super) unsafe fn encode<V: Vector, E: Element>(
    format: WireFormat,
    row: &[E],
    smooth: Option<&[f32]>,
    values: &mut [u8],
    scales: &mut [f32],
) {
    // SAFETY: by the caller's promise.
    unsafe {
        match (format, smooth) {
            (WireFormat::Native, _) => {}
            (WireFormat::Int8, None) => scales[0] = encode_int8::<V, E, false>(row, &[], values),
            (WireFormat::Int8, Some(smooth)) => scales[0] = encode_int8::<V, E, true>(row, smooth, values),
            (WireFormat::Fp8E4m3, _) => encode_blocks::<V, E, Fp8E4m3>(row, values, scales),
            (WireFormat::Fp8E5m2, _) => encode_blocks::<V, E, Fp8E5m2>(row, values, scales),
        }
    }
}

/// # Safety
/// As for [`Vector`]; `values` and `scales` are readable as an encoded row's.
#[inline(always)]
pub(super) unsafe fn decode<V: Vector, E: Element>(
    format: WireFormat,
    values: *const u8,
    scales: *const u8,
    to: &mut [E],
) {
    // SAFETY: by the caller's promise.
    unsafe {
        match format {
            WireFormat::Native => {}
            WireFormat::Int8 => {
                let scale = scales.cast::<f32>().read_unaligned();
                decode_values::<V, E>(values, scale, to, |from| V::signed(from));
            }
            WireFormat::Fp8E4m3 => decode_blocks::<V, E, Fp8E4m3>(values, scales, to),
            WireFormat::Fp8E5m2 => decode_blocks::<V, E, Fp8E5m2>(values, scales, to),
        }
    }
}

/// `LANES` elements from `at` on, widened; zeros beyond the end.
///
/// # Safety
/// As for [`Vector`]; `at` is below the length.
#[inline(always)]
unsafe fn load<V: Vector, E: Element>(from: &[E], at: usize) -> V::Float {
    let rest = from.len() - at;
    // SAFETY: as many elements are there, by the branch; in the other one the buffer has more.
    unsafe {
        if rest >= V::LANES {
            V::widen(from.as_ptr().add(at))
        } else {
            let mut buffer = [E::zeroed(); MOST_LANES];
            std::ptr::copy_nonoverlapping(from.as_ptr().add(at), buffer.as_mut_ptr(), rest);
            V::widen(buffer.as_ptr())
        }
    }
}

/// [`load`], multiplied by the smooth scales.
///
/// # Safety
/// As for [`load`]; with `SMOOTH` there are as many smooth scales as elements.
#[inline(always)]
unsafe fn load_smooth<V: Vector, E: Element, const SMOOTH: bool>(row: &[E], smooth: &[f32], at: usize) -> V::Float {
    // SAFETY: by the caller's promise.
    unsafe {
        let x = load::<V, E>(row, at);
        if SMOOTH { V::mul(x, load::<V, f32>(smooth, at)) } else { x }
    }
}

/// Writes the lowest bytes of the lanes, of the last ones only as many as there is room for.
///
/// # Safety
/// As for [`Vector`]; `at` is below the length.
#[inline(always)]
unsafe fn store<V: Vector>(codes: V::Bits, to: &mut [u8], at: usize) {
    let rest = to.len() - at;
    // SAFETY: as for `load`.
    unsafe {
        if rest >= V::LANES {
            V::bytes(codes, to.as_mut_ptr().add(at));
        } else {
            let mut buffer = [0; MOST_LANES];
            V::bytes(codes, buffer.as_mut_ptr());
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), to.as_mut_ptr().add(at), rest);
        }
    }
}

/// The largest magnitude, as bits: as integers these are in the order of the numbers, infinity and NaN above all.
///
/// # Safety
/// As for [`load_smooth`].
#[inline(always)]
unsafe fn largest<V: Vector, E: Element, const SMOOTH: bool>(row: &[E], smooth: &[f32]) -> u32 {
    // SAFETY: by the caller's promise.
    unsafe {
        let magnitude = V::splat_bits(MAGNITUDE);
        let mut most = V::splat_bits(0);
        let mut at = 0;
        while at < row.len() {
            let x = load_smooth::<V, E, SMOOTH>(row, smooth, at);
            most = V::max(most, V::and(V::bits(x), magnitude));
            at += V::LANES;
        }
        V::largest(most)
    }
}

/// Adding it leaves an integer below 2^22 in the lowest bits, rounded to even: 1.5 * 2^23.
const TO_INTEGER: f32 = 12_582_912.0;

/// Gives the scale.
///
/// # Safety
/// As for [`load_smooth`].
#[inline(always)]
unsafe fn encode_int8<V: Vector, E: Element, const SMOOTH: bool>(row: &[E], smooth: &[f32], values: &mut [u8]) -> f32 {
    // SAFETY: by the caller's promise.
    unsafe {
        let amax = largest::<V, E, SMOOTH>(row, smooth);
        if amax >= INFINITY {
            values.fill(0);
            return f32::from_bits(QUIET_NAN);
        }
        let scale = scale_of(f32::from_bits(amax), 127.0);
        let (inverse, to_integer) = (V::splat(1.0 / scale), V::splat(TO_INTEGER));
        let mut at = 0;
        while at < row.len() {
            let x = load_smooth::<V, E, SMOOTH>(row, smooth, at);
            let integer = V::add(V::mul(x, inverse), to_integer);
            store::<V>(V::bits(integer), values, at);
            at += V::LANES;
        }
        scale
    }
}

/// Blocks whose largest magnitudes are looked for together. While their scales are divided, the next ones' are under way: 7168
/// elements take 0.63 of the time that one block after the other takes, whose loops of known length already take 0.83 of that
/// of loops for any length (AVX-512).
const AHEAD: usize = 8;

/// # Safety
/// As for [`encode`].
#[inline(always)]
unsafe fn encode_blocks<V: Vector, E: Element, F: Fp8>(row: &[E], values: &mut [u8], scales: &mut [f32]) {
    let (whole, rest) = row.as_chunks::<BLOCK>();
    let (values, rest_values) = values.as_chunks_mut::<BLOCK>();
    let (scales, rest_scale) = scales.split_at_mut(whole.len());
    for ((row, values), scales) in whole.chunks(AHEAD).zip(values.chunks_mut(AHEAD)).zip(scales.chunks_mut(AHEAD)) {
        let mut amax = [0; AHEAD];
        for (amax, row) in amax.iter_mut().zip(row) {
            // SAFETY: by the caller's promise.
            *amax = unsafe { largest::<V, E, false>(row, &[]) };
        }
        for (((row, values), scale), &amax) in row.iter().zip(values).zip(scales).zip(&amax) {
            // SAFETY: by the caller's promise; a block of each.
            *scale = unsafe { encode_fp8::<V, E, F>(row, values, amax) };
        }
    }
    if let Some(scale) = rest_scale.first_mut() {
        // SAFETY: by the caller's promise; the rests are as long.
        *scale = unsafe { encode_fp8::<V, E, F>(rest, rest_values, largest::<V, E, false>(rest, &[])) };
    }
}

/// One block, whose largest magnitude has the bits `amax`; gives the scale.
///
/// With e the exponent of a magnitude, at least that of the least normal number, the codes from 2^e to 2^(e + 1) are steps of
/// 2^(e - mantissa). Adding 2^(e - mantissa + 23) leaves the number of steps in the lowest bits, rounded to even; subnormal
/// numbers are those with fewer than 2^mantissa steps. A code is `(e - least exponent) * 2^mantissa + steps`, also where
/// rounding has reached the next power of two.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
unsafe fn encode_fp8<V: Vector, E: Element, F: Fp8>(row: &[E], values: &mut [u8], amax: u32) -> f32 {
    // SAFETY: by the caller's promise.
    unsafe {
        if amax >= INFINITY {
            return encode_with_specials::<E, F>(row, values);
        }
        let scale = scale_of(f32::from_bits(amax), F::LARGEST);
        let inverse = V::splat(1.0 / scale);
        let mut at = 0;
        while at < row.len() {
            let x = V::mul(load::<V, E>(row, at), inverse);
            store::<V>(fp8_codes::<V, F>(x), values, at);
            at += V::LANES;
        }
        scale
    }
}

/// # Safety
/// As for [`Vector`]; all lanes are finite, and round to at most `F::LARGEST`.
#[inline(always)]
unsafe fn fp8_codes<V: Vector, F: Fp8>(x: V::Float) -> V::Bits {
    let least_normal = ((127 + F::LEAST_EXPONENT) as u32) << 23;
    let up = (23 - F::MANTISSA) << 23;
    let first_exponent = ((127 + F::LEAST_EXPONENT + 23) as u32 - F::MANTISSA) << F::MANTISSA;
    // SAFETY: by the caller's promise.
    unsafe {
        let bits = V::bits(x);
        let magnitude = V::and(bits, V::splat_bits(MAGNITUDE));
        let exponent = V::and(V::max(magnitude, V::splat_bits(least_normal)), V::splat_bits(INFINITY));
        let magic = V::plus(exponent, V::splat_bits(up));
        let sum = V::bits(V::add(V::float(magnitude), V::float(magic)));
        let steps = V::minus(sum, magic);
        let binade = V::minus(V::shift_right(magic, 23 - F::MANTISSA), V::splat_bits(first_exponent));
        let sign = V::and(V::shift_right(bits, 24), V::splat_bits(0x80));
        V::or(V::plus(binade, steps), sign)
    }
}

/// A block with NaN or infinities: rare, so one element at a time.
fn encode_with_specials<E: Element, F: Fp8>(row: &[E], values: &mut [u8]) -> f32 {
    let finite = row.iter().map(|x| x.to_f32().abs()).filter(|x| x.is_finite());
    let scale = scale_of(finite.fold(0.0, f32::max), F::LARGEST);
    let inverse = 1.0 / scale;
    for (value, x) in values.iter_mut().zip(row) {
        let x = x.to_f32();
        *value = if x.is_nan() || (x.is_infinite() && F::INFINITY_CODE == NAN_CODE) {
            NAN_CODE
        } else if x.is_infinite() {
            F::INFINITY_CODE | if x < 0.0 { 0x80 } else { 0 }
        } else {
            // SAFETY: plain loops need no feature; the number is finite, and at most as large as the format's largest.
            unsafe { fp8_codes::<super::scalar::Scalar, F>(x * inverse) as u8 }
        };
    }
    scale
}

/// # Safety
/// As for [`decode`].
#[inline(always)]
unsafe fn decode_blocks<V: Vector, E: Element, F: Fp8>(values: *const u8, scales: *const u8, to: &mut [E]) {
    for (i, to) in to.chunks_mut(BLOCK).enumerate() {
        // SAFETY: by the caller's promise; one scale per block.
        unsafe {
            let scale = scales.cast::<f32>().add(i).read_unaligned();
            decode_values::<V, E>(values.add(i * BLOCK), scale, to, |from| V::fp8::<F>(from));
        }
    }
}

/// # Safety
/// As for [`Vector`]; as many values as there are elements in `to` are readable.
#[inline(always)]
unsafe fn decode_values<V: Vector, E: Element>(
    values: *const u8,
    scale: f32,
    to: &mut [E],
    read: impl Fn(*const u8) -> V::Float,
) {
    // SAFETY: by the caller's promise; what a peer may be changing is read once, as plain numbers.
    unsafe {
        let scale = V::splat(scale);
        let decoded = |from| V::quiet(V::mul(read(from), scale));
        let whole = to.len() / V::LANES * V::LANES;
        let mut at = 0;
        while at < whole {
            V::narrow(decoded(values.add(at)), to.as_mut_ptr().add(at));
            at += V::LANES;
        }
        let rest = to.len() - whole;
        if rest > 0 {
            let (mut codes, mut elements) = ([0; MOST_LANES], [E::zeroed(); MOST_LANES]);
            std::ptr::copy_nonoverlapping(values.add(whole), codes.as_mut_ptr(), rest);
            V::narrow(decoded(codes.as_ptr()), elements.as_mut_ptr());
            to[whole..].copy_from_slice(&elements[..rest]);
        }
    }
}
