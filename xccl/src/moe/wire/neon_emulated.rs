//! The NEON instructions that [`super::neon`] uses, as plain loops, so that its code is tested on other processors too. What
//! each does is Arm's description of it; that the real ones do the same is seen where there are some.

#![allow(non_camel_case_types, missing_docs)]

pub(super) type uint8x8_t = [u8; 8];
pub(super) type uint16x4_t = [u16; 4];
pub(super) type uint16x8_t = [u16; 8];
pub(super) type uint32x2_t = [u32; 2];
pub(super) type uint32x4_t = [u32; 4];
pub(super) type int32x4_t = [i32; 4];
pub(super) type float32x4_t = [f32; 4];

fn each<A: Copy, B: Copy, C: Copy + Default>(a: [A; 4], b: [B; 4], f: impl Fn(A, B) -> C) -> [C; 4] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// All bits where so, none where not.
fn mask(so: bool) -> u32 {
    if so { u32::MAX } else { 0 }
}

/// # Safety
/// As for the next three: as many elements as a vector has may be read, or written.
pub(super) unsafe fn vld1_u16(from: *const u16) -> uint16x4_t {
    // SAFETY: by the caller's promise; so it is below.
    unsafe { from.cast::<uint16x4_t>().read_unaligned() }
}
pub(super) unsafe fn vld1q_f32(from: *const f32) -> float32x4_t {
    // SAFETY: as above.
    unsafe { from.cast::<float32x4_t>().read_unaligned() }
}
pub(super) unsafe fn vst1_u16(to: *mut u16, a: uint16x4_t) {
    // SAFETY: as above.
    unsafe { to.cast::<uint16x4_t>().write_unaligned(a) }
}
pub(super) unsafe fn vst1q_f32(to: *mut f32, a: float32x4_t) {
    // SAFETY: as above.
    unsafe { to.cast::<float32x4_t>().write_unaligned(a) }
}

pub(super) fn vcreate_u8(a: u64) -> uint8x8_t {
    a.to_le_bytes()
}
pub(super) fn vmovl_u8(a: uint8x8_t) -> uint16x8_t {
    a.map(u16::from)
}
pub(super) fn vget_low_u16(a: uint16x8_t) -> uint16x4_t {
    [a[0], a[1], a[2], a[3]]
}
pub(super) fn vmovl_u16(a: uint16x4_t) -> uint32x4_t {
    a.map(u32::from)
}
pub(super) fn vmovn_u32(a: uint32x4_t) -> uint16x4_t {
    a.map(|x| x as u16)
}
pub(super) fn vmovn_u16(a: uint16x8_t) -> uint8x8_t {
    a.map(|x| x as u8)
}
pub(super) fn vcombine_u16(low: uint16x4_t, high: uint16x4_t) -> uint16x8_t {
    std::array::from_fn(|i| if i < 4 { low[i] } else { high[i - 4] })
}
pub(super) fn vreinterpret_u32_u8(a: uint8x8_t) -> uint32x2_t {
    [u32::from_le_bytes([a[0], a[1], a[2], a[3]]), u32::from_le_bytes([a[4], a[5], a[6], a[7]])]
}
pub(super) fn vget_lane_u32<const LANE: i32>(a: uint32x2_t) -> u32 {
    a[LANE as usize]
}
pub(super) fn vreinterpretq_f32_u32(a: uint32x4_t) -> float32x4_t {
    a.map(f32::from_bits)
}
pub(super) fn vreinterpretq_u32_f32(a: float32x4_t) -> uint32x4_t {
    a.map(f32::to_bits)
}
pub(super) fn vreinterpretq_s32_u32(a: uint32x4_t) -> int32x4_t {
    a.map(|x| x as i32)
}
pub(super) fn vdupq_n_u32(x: u32) -> uint32x4_t {
    [x; 4]
}
pub(super) fn vdupq_n_s32(x: i32) -> int32x4_t {
    [x; 4]
}
pub(super) fn vdupq_n_f32(x: f32) -> float32x4_t {
    [x; 4]
}
pub(super) fn vshll_n_u16<const N: i32>(a: uint16x4_t) -> uint32x4_t {
    a.map(|x| u32::from(x) << N)
}
pub(super) fn vshrn_n_u32<const N: i32>(a: uint32x4_t) -> uint16x4_t {
    a.map(|x| (x >> N) as u16)
}
pub(super) fn vshrq_n_u32<const N: i32>(a: uint32x4_t) -> uint32x4_t {
    a.map(|x| x >> N)
}
pub(super) fn vshlq_n_u32<const N: i32>(a: uint32x4_t) -> uint32x4_t {
    a.map(|x| x << N)
}
pub(super) fn vshrq_n_s32<const N: i32>(a: int32x4_t) -> int32x4_t {
    a.map(|x| x >> N)
}
pub(super) fn vshlq_n_s32<const N: i32>(a: int32x4_t) -> int32x4_t {
    a.map(|x| x << N)
}
/// Left, or right by a negative number.
pub(super) fn vshlq_u32(a: uint32x4_t, by: int32x4_t) -> uint32x4_t {
    each(a, by, |x, by| if by < 0 { x >> -by } else { x << by })
}
pub(super) fn vandq_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
    each(a, b, |a, b| a & b)
}
pub(super) fn vorrq_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
    each(a, b, |a, b| a | b)
}
pub(super) fn vaddq_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
    each(a, b, u32::wrapping_add)
}
pub(super) fn vsubq_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
    each(a, b, u32::wrapping_sub)
}
pub(super) fn vmaxq_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
    each(a, b, u32::max)
}
pub(super) fn vmaxvq_u32(a: uint32x4_t) -> u32 {
    a.into_iter().fold(0, u32::max)
}
pub(super) fn vceqq_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
    each(a, b, |a, b| mask(a == b))
}
pub(super) fn vcgtq_u32(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
    each(a, b, |a, b| mask(a > b))
}
pub(super) fn vceqq_f32(a: float32x4_t, b: float32x4_t) -> uint32x4_t {
    each(a, b, |a, b| mask(a == b))
}
/// Bits of `a` where the mask has them set, of `b` elsewhere.
pub(super) fn vbslq_f32(mask: uint32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
    let (a, b) = (vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b));
    std::array::from_fn(|i| f32::from_bits((mask[i] & a[i]) | (!mask[i] & b[i])))
}
pub(super) fn vcvtq_f32_s32(a: int32x4_t) -> float32x4_t {
    a.map(|x| x as f32)
}
pub(super) fn vcvtq_f32_u32(a: uint32x4_t) -> float32x4_t {
    a.map(|x| x as f32)
}
pub(super) fn vaddq_f32(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    each(a, b, |a, b| a + b)
}
pub(super) fn vmulq_f32(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    each(a, b, |a, b| a * b)
}
