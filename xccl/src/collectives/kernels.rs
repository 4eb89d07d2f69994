//! The loops that join elements of several ranks.
//!
//! Each is one plain loop, compiled once per instruction set and chosen at run time; all give the same bits. Elements are taken
//! a tile at a time: those of the first two inputs widened and joined, those of each further one joined to them, in order, and
//! rounded once. So each input is read once, front to back, however many there are.

use std::mem::MaybeUninit;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::types::{DataType, ReduceOp, Value};
use crate::memory::row::{Row, Target};
use crate::memory::stream::STREAMING_BYTES;

/// Elements of a tile: its sums stay in the first-level cache.
const TILE: usize = 512;

/// Where a reduction's result goes.
#[derive(Clone, Copy)]
pub(super) struct Outputs<'a> {
    /// Two places, either of which may be missing.
    pub(super) to: [Option<Target<'a>>; 2],
    /// Writes the first past the caches; `end_streaming` has to follow.
    pub(super) streaming: bool,
}

/// From so many bytes of a buffer on its result is written past the caches.
pub(super) const STREAMING_RESULT: usize = STREAMING_BYTES;

/// Joins `inputs` inputs of `bytes` bytes each, in order, and writes the result. An output may be an input's place. What
/// `input` gives has to hold `len` bytes at `at`.
///
/// # Panics
/// When an input or an output has another length, or there is no input.
pub(super) fn reduce<'a>(
    (op, dtype): (ReduceOp, DataType),
    (inputs, bytes): (usize, usize),
    input: &dyn Fn(usize) -> Row<'a, u8>,
    outputs: Outputs<'_>,
) {
    assert!(inputs > 0, "nothing to join");
    assert!(outputs.to.iter().flatten().all(|to| to.len() == bytes), "an output's length");
    let size = (inputs, bytes);
    match dtype {
        DataType::F32 => by_op::<f32>(op, size, input, outputs),
        DataType::F16 => by_op::<f16>(op, size, input, outputs),
        DataType::BF16 => by_op::<bf16>(op, size, input, outputs),
        DataType::I32 => by_op::<i32>(op, size, input, outputs),
        DataType::I64 => by_op::<i64>(op, size, input, outputs),
        DataType::U8 => by_op::<u8>(op, size, input, outputs),
    }
}

fn by_op<'a, T>(op: ReduceOp, size: (usize, usize), input: &dyn Fn(usize) -> Row<'a, u8>, outputs: Outputs<'_>)
where
    Sum: Join<T>,
    Max: Join<T>,
    Min: Join<T>,
    Avg: Join<T>,
    T: Value,
{
    match op {
        ReduceOp::Sum => run::<T, Sum>(size, input, outputs),
        ReduceOp::Max => run::<T, Max>(size, input, outputs),
        ReduceOp::Min => run::<T, Min>(size, input, outputs),
        ReduceOp::Avg => run::<T, Avg>(size, input, outputs),
    }
}

/// How elements of type `T` are joined.
trait Join<T> {
    /// What they are joined in.
    type Wide: Copy;
    fn widen(x: T) -> Self::Wide;
    fn join(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    fn finish(a: Self::Wide, inputs: usize) -> T;

    /// Joins two inputs of `n` elements, which are all.
    ///
    /// # Safety
    /// `a` and `b` are readable, `to` writable for `n` elements, at any address. So it is for the others.
    #[inline(always)]
    unsafe fn join_two(a: *const T, b: *const T, to: *mut T, n: usize) {
        for i in 0..n {
            // SAFETY: by the caller's promise; so it is below.
            unsafe {
                let [a, b] = [a, b].map(|x| Self::widen(x.add(i).read_unaligned()));
                to.add(i).write(Self::finish(Self::join(a, b), 2));
            }
        }
    }

    /// Joins the first two inputs of several.
    ///
    /// # Safety
    /// As for [`join_two`](Self::join_two).
    #[inline(always)]
    unsafe fn begin(a: *const T, b: *const T, to: *mut Self::Wide, n: usize) {
        for i in 0..n {
            // SAFETY: as above.
            unsafe {
                let [a, b] = [a, b].map(|x| Self::widen(x.add(i).read_unaligned()));
                to.add(i).write(Self::join(a, b));
            }
        }
    }

    /// Joins one more.
    ///
    /// # Safety
    /// As for [`join_two`](Self::join_two).
    #[inline(always)]
    unsafe fn go_on(to: *mut Self::Wide, more: *const T, n: usize) {
        for i in 0..n {
            // SAFETY: as above.
            unsafe { *to.add(i) = Self::join(*to.add(i), Self::widen(more.add(i).read_unaligned())) };
        }
    }

    /// Joins the last one.
    ///
    /// # Safety
    /// As for [`join_two`](Self::join_two).
    #[inline(always)]
    unsafe fn end(joined: *const Self::Wide, last: *const T, to: *mut T, n: usize, inputs: usize) {
        for i in 0..n {
            // SAFETY: as above.
            unsafe {
                let all = Self::join(*joined.add(i), Self::widen(last.add(i).read_unaligned()));
                to.add(i).write(Self::finish(all, inputs));
            }
        }
    }
}

struct Sum;
struct Max;
struct Min;
struct Avg;

/// The larger; NaN if either is.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

#[inline(always)]
fn smaller(a: f32, b: f32) -> f32 {
    if b < a || b.is_nan() { b } else { a }
}

/// `bf16::from_f32` without a branch, so that the loop around it vectorizes.
#[inline(always)]
fn to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x0040;
    bf16::from_bits((if x.is_nan() { quiet_nan } else { rounded }) as u16)
}

#[inline(always)]
fn of_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Joins of floating-point types, all in f32.
macro_rules! floats {
    ($t:ty, $widen:expr, $narrow:expr) => {
        floats!($t, $widen, $narrow, Sum, |a: f32, b: f32| a + b, |x: f32, _: usize| x);
        floats!($t, $widen, $narrow, Max, larger, |x: f32, _: usize| x);
        floats!($t, $widen, $narrow, Min, smaller, |x: f32, _: usize| x);
        floats!($t, $widen, $narrow, Avg, |a: f32, b: f32| a + b, |x: f32, n: usize| x / n as f32);
    };
    ($t:ty, $widen:expr, $narrow:expr, $op:ident, $join:expr, $end:expr) => {
        impl Join<$t> for $op {
            type Wide = f32;
            #[inline(always)]
            fn widen(x: $t) -> f32 {
                ($widen)(x)
            }
            #[inline(always)]
            fn join(a: f32, b: f32) -> f32 {
                ($join)(a, b)
            }
            #[inline(always)]
            fn finish(a: f32, inputs: usize) -> $t {
                ($narrow)(($end)(a, inputs))
            }
        }
    };
}

floats!(f32, |x| x, |x| x);
floats!(bf16, of_bf16, to_bf16);

/// Elements of f16 that are converted at a time: the `half` crate looks for the instruction at each call.
const HALVES: usize = 64;

/// Widens up to [`HALVES`] elements at `at` of `n`.
///
/// # Safety
/// `from` is readable for `n` elements.
#[inline(always)]
unsafe fn widen_halves(from: *const f16, at: usize, n: usize) -> [f32; HALVES] {
    let (mut copy, mut wide, n) = ([f16::ZERO; HALVES], [0.0; HALVES], HALVES.min(n - at));
    // SAFETY: by the caller's promise; the copy has as many.
    unsafe { std::ptr::copy_nonoverlapping(from.add(at).cast::<u8>(), copy.as_mut_ptr().cast(), n * 2) };
    copy.convert_to_f32_slice(&mut wide);
    wide
}

/// Rounds up to [`HALVES`] elements to `at` of `n`.
///
/// # Safety
/// `to` is writable for `n` elements.
#[inline(always)]
unsafe fn narrow_halves(wide: &[f32; HALVES], to: *mut f16, at: usize, n: usize) {
    let (mut narrow, n) = ([f16::ZERO; HALVES], HALVES.min(n - at));
    narrow.convert_from_f32_slice(wide);
    // SAFETY: by the caller's promise; the source has as many.
    unsafe { std::ptr::copy_nonoverlapping(narrow.as_ptr(), to.add(at), n) };
}

macro_rules! halves {
    ($op:ident, $join:expr, $end:expr) => {
        impl Join<f16> for $op {
            type Wide = f32;
            #[inline(always)]
            fn widen(x: f16) -> f32 {
                x.to_f32()
            }
            #[inline(always)]
            fn join(a: f32, b: f32) -> f32 {
                ($join)(a, b)
            }
            #[inline(always)]
            fn finish(a: f32, inputs: usize) -> f16 {
                f16::from_f32(($end)(a, inputs))
            }
            #[inline(always)]
            unsafe fn join_two(a: *const f16, b: *const f16, to: *mut f16, n: usize) {
                for at in (0..n).step_by(HALVES) {
                    // SAFETY: by the caller's promise.
                    unsafe {
                        let (mut a, b) = (widen_halves(a, at, n), widen_halves(b, at, n));
                        a.iter_mut().zip(b).for_each(|(a, b)| *a = ($end)(($join)(*a, b), 2));
                        narrow_halves(&a, to, at, n);
                    }
                }
            }
            #[inline(always)]
            unsafe fn begin(a: *const f16, b: *const f16, to: *mut f32, n: usize) {
                for at in (0..n).step_by(HALVES) {
                    // SAFETY: by the caller's promise.
                    unsafe {
                        let (mut a, b) = (widen_halves(a, at, n), widen_halves(b, at, n));
                        a.iter_mut().zip(b).for_each(|(a, b)| *a = ($join)(*a, b));
                        std::ptr::copy_nonoverlapping(a.as_ptr(), to.add(at), HALVES.min(n - at));
                    }
                }
            }
            #[inline(always)]
            unsafe fn go_on(to: *mut f32, more: *const f16, n: usize) {
                for at in (0..n).step_by(HALVES) {
                    // SAFETY: by the caller's promise.
                    let (more, to) = unsafe {
                        let to = std::slice::from_raw_parts_mut(to.add(at), HALVES.min(n - at));
                        (widen_halves(more, at, n), to)
                    };
                    to.iter_mut().zip(more).for_each(|(a, b)| *a = ($join)(*a, b));
                }
            }
            #[inline(always)]
            unsafe fn end(joined: *const f32, last: *const f16, to: *mut f16, n: usize, inputs: usize) {
                for at in (0..n).step_by(HALVES) {
                    // SAFETY: by the caller's promise.
                    unsafe {
                        let joined = std::slice::from_raw_parts(joined.add(at), HALVES.min(n - at));
                        let mut all = widen_halves(last, at, n);
                        all.iter_mut().zip(joined).for_each(|(b, &a)| *b = ($end)(($join)(a, *b), inputs));
                        narrow_halves(&all, to, at, n);
                    }
                }
            }
        }
    };
}

halves!(Sum, |a: f32, b: f32| a + b, |x: f32, _: usize| x);
halves!(Max, larger, |x: f32, _: usize| x);
halves!(Min, smaller, |x: f32, _: usize| x);
halves!(Avg, |a: f32, b: f32| a + b, |x: f32, n: usize| x / n as f32);

/// Joins of integers: averages in a type where the sum of all ranks' elements fits.
macro_rules! integers {
    ($t:ty, $wide:ty) => {
        integers!($t, $t, Sum, |a: $t, b: $t| a.wrapping_add(b), |x: $t, _: usize| x);
        integers!($t, $t, Max, |a: $t, b: $t| a.max(b), |x: $t, _: usize| x);
        integers!($t, $t, Min, |a: $t, b: $t| a.min(b), |x: $t, _: usize| x);
        integers!($t, $wide, Avg, |a: $wide, b: $wide| a + b, |x: $wide, n: usize| (x / n as $wide) as $t);
    };
    ($t:ty, $wide:ty, $op:ident, $join:expr, $end:expr) => {
        impl Join<$t> for $op {
            type Wide = $wide;
            #[inline(always)]
            fn widen(x: $t) -> $wide {
                <$wide>::from(x)
            }
            #[inline(always)]
            fn join(a: $wide, b: $wide) -> $wide {
                ($join)(a, b)
            }
            #[inline(always)]
            fn finish(a: $wide, inputs: usize) -> $t {
                ($end)(a, inputs)
            }
        }
    };
}

integers!(i32, i64);
integers!(i64, i128);
integers!(u8, u32);

fn run<'a, T: Value, J: Join<T>>(size: (usize, usize), input: &dyn Fn(usize) -> Row<'a, u8>, outputs: Outputs<'_>) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the features are there.
            return unsafe { avx512::<T, J>(size, input, outputs) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
            // SAFETY: the features are there.
            return unsafe { avx2::<T, J>(size, input, outputs) };
        }
    }
    portable::<T, J>(size, input, outputs);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
fn avx512<'a, T: Value, J: Join<T>>(size: (usize, usize), input: &dyn Fn(usize) -> Row<'a, u8>, outputs: Outputs<'_>) {
    portable::<T, J>(size, input, outputs);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn avx2<'a, T: Value, J: Join<T>>(size: (usize, usize), input: &dyn Fn(usize) -> Row<'a, u8>, outputs: Outputs<'_>) {
    portable::<T, J>(size, input, outputs);
}

#[inline(always)]
fn portable<'a, T: Value, J: Join<T>>(
    (inputs, bytes): (usize, usize),
    input: &dyn Fn(usize) -> Row<'a, u8>,
    outputs: Outputs<'_>,
) {
    let (elements, size) = (bytes / size_of::<T>(), size_of::<T>());
    let (mut joined, mut wide) = ([MaybeUninit::<T>::uninit(); TILE], [MaybeUninit::<J::Wide>::uninit(); TILE]);
    let mut at = 0;
    while at < elements {
        let n = TILE.min(elements - at);
        let part = |i: usize| {
            let row = input(i);
            assert_eq!(row.len(), bytes, "an input's length");
            // SAFETY: `n` elements at `at` lie inside the row, as just checked, and are read as plain numbers: a peer that writes
            // them, against the protocol, makes the result another number.
            unsafe { row.as_ptr().add(at * size).cast::<T>() }
        };
        // SAFETY: `part` gives `n` elements; `wide` is written by the first inputs before it is read, and `joined` by the last.
        let joined = unsafe {
            let (wide, joined) = (wide.as_mut_ptr().cast::<J::Wide>(), joined.as_mut_ptr().cast::<T>());
            match inputs {
                1 => std::ptr::copy_nonoverlapping(part(0).cast::<u8>(), joined.cast::<u8>(), n * size),
                2 => J::join_two(part(0), part(1), joined, n),
                _ => {
                    J::begin(part(0), part(1), wide, n);
                    (2..inputs - 1).for_each(|i| J::go_on(wide, part(i), n));
                    J::end(wide, part(inputs - 1), joined, n, inputs);
                }
            }
            std::slice::from_raw_parts(joined.cast_const(), n)
        };
        for (i, to) in outputs.to.iter().enumerate() {
            let Some(to) = to else { continue };
            // SAFETY: `n` elements at `at` lie inside the target, whose length was checked by `reduce`.
            let piece = unsafe { Target::new(to.as_mut_ptr().add(at * size), n * size) };
            let from = Row::from(bytemuck::cast_slice(joined));
            if i == 0 && outputs.streaming { piece.stream_from(from) } else { piece.copy_from(from) }
        }
        at += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined<T: Value>(op: ReduceOp, inputs: &[Vec<T>]) -> Vec<T> {
        let mut out = vec![T::zeroed(); inputs[0].len()];
        let bytes = std::mem::size_of_val(out.as_slice());
        // SAFETY: `out` is used by nobody else until it is returned.
        let to = unsafe { Target::new(out.as_mut_ptr().cast(), bytes) };
        let input = |i: usize| Row::from(bytemuck::cast_slice::<T, u8>(&inputs[i]));
        reduce((op, T::TYPE), (inputs.len(), bytes), &input, Outputs { to: [Some(to), None], streaming: false });
        out
    }

    #[test]
    fn nan_stays_nan_in_maxima_and_minima() {
        let inputs = [vec![1.0f32, f32::NAN, 3.0, f32::NAN], vec![2.0, 1.0, f32::NAN, f32::NAN]];
        for op in [ReduceOp::Max, ReduceOp::Min] {
            let out = joined(op, &inputs);
            assert_eq!(out.iter().map(|x| x.is_nan()).collect::<Vec<_>>(), [false, true, true, true]);
        }
        assert!(joined(ReduceOp::Max, &inputs.map(|v| v.into_iter().map(bf16::from_f32).collect()))[1].is_nan());
    }

    #[test]
    fn halves_are_rounded_once() {
        // 2048 + 1 rounds to 2048 in f16, and 2049 would be 2048 after each of two roundings.
        let inputs = [vec![f16::from_f32(2048.0)], vec![f16::from_f32(1.0)], vec![f16::from_f32(1.0)]];
        assert_eq!(joined(ReduceOp::Sum, &inputs)[0].to_f32(), 2050.0);
        let inputs = inputs.map(|v| v.into_iter().map(|x| bf16::from_f32(x.to_f32() / 8.0)).collect());
        assert_eq!(joined::<bf16>(ReduceOp::Sum, &inputs)[0].to_f32(), 256.0);
    }

    #[test]
    fn integers_wrap_in_sums_and_not_in_averages() {
        assert_eq!(joined(ReduceOp::Sum, &[vec![i32::MAX], vec![1]]), [i32::MIN]);
        assert_eq!(joined(ReduceOp::Avg, &[vec![i64::MAX], vec![i64::MAX - 2]]), [i64::MAX - 1]);
        assert_eq!(joined(ReduceOp::Avg, &[vec![-3i32], vec![0]]), [-1]);
        assert_eq!(joined(ReduceOp::Avg, &[vec![255u8], vec![254]]), [254]);
    }

    #[test]
    fn every_tile_and_the_rest_are_joined() {
        for n in [0, 1, 63, 64, 65, TILE - 1, TILE, TILE + 1, 3 * TILE + 7] {
            let input = |k: usize| (0..n).map(|i| (i * 7 + k * 31) as f32).collect::<Vec<_>>();
            let inputs: Vec<_> = (0..3).map(input).collect();
            let expected: Vec<f32> = (0..n).map(|i| inputs[0][i] + inputs[1][i] + inputs[2][i]).collect();
            assert_eq!(joined(ReduceOp::Sum, &inputs), expected);
            let halves: Vec<Vec<f16>> =
                inputs.iter().map(|v| v.iter().map(|&x| f16::from_f32(x % 97.0)).collect()).collect();
            let expected: Vec<f16> = (0..n)
                .map(|i| f16::from_f32(halves[0][i].to_f32() + halves[1][i].to_f32() + halves[2][i].to_f32()))
                .collect();
            assert_eq!(joined(ReduceOp::Sum, &halves), expected);
        }
    }
}
