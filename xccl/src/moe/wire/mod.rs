//! Wire formats: how a token row lies in the outbox.
//!
//! # What each format is
//! `x` are the row's elements, widened to f32; in int8 multiplied by the expert's smooth scales where there are some.
//!
//! | format | values | scales |
//! | --- | --- | --- |
//! | native | the elements as they are | none |
//! | int8 | two's complement, -127 to 127 | one f32 per row |
//! | fp8 e4m3 | OCP FP8: bias 7, no infinities, NaN = s1111111, largest 448, least subnormal 2^-9 | one f32 per 128 channels, the last block may be shorter |
//! | fp8 e5m2 | OCP FP8: bias 15, infinities s1111100, largest 57344, least subnormal 2^-16 | as e4m3 |
//!
//! With `most` = 127, 448 or 57344 and `amax` the largest magnitude of a finite `x` in the row (int8) or block (fp8):
//! - `scale = max(amax / most, 2^-126)`, and a code is `x * (1 / scale)`, rounded to the nearest code, ties to even. Each of
//!   these is one f32 operation, rounded to nearest even. The lower bound keeps `1 / scale` finite: where `amax` is below
//!   `most * 2^-126` codes are coarser than they could be, by absolute steps of 2^-126 or less. A row of zeros has scale
//!   2^-126 and codes 0. No scale overflows, since `most` is above 1.
//! - Saturation: the largest magnitude becomes `most` itself, so no finite `x` is beyond the codes. -128 is never written.
//! - Zero keeps its sign in fp8, and loses it in int8.
//! - What is not finite never becomes finite. int8 has no code for it: the row's scale is NaN, and its codes are 0. In e4m3
//!   NaN and infinities become NaN (0x7f); in e5m2 NaN becomes 0x7f and infinities stay (0x7c, 0xfc). The other elements of
//!   the block are not touched by it. A product with a smooth scale that overflows is not finite either.
//! - Decoding gives `value of the code * scale` in f32, rounded once to the element type, to nearest even. A NaN comes out as
//!   the type's positive quiet NaN with an empty payload.
//!
//! # Where it lies
//! The values, then from the next multiple of 16 bytes on the scales; the next row begins at a multiple of 64.
//!
//! # Kernels
//! One algorithm ([`vector`]) over the operations that an instruction set has ([`scalar`], [`avx2`], [`avx512`], [`neon`]).
//! Every operation is exact or rounded as IEEE 754 says, so all agree bit for bit.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "aarch64", test))]
mod neon;
#[cfg(all(test, not(target_arch = "aarch64")))]
mod neon_emulated;
mod scalar;
#[cfg(test)]
mod tests;
mod vector;

use std::fmt;
use std::str::FromStr;

use crate::dtype::{DType, Element};
use crate::kernels::Kernels;
use crate::memory::layout::LINE;
use crate::memory::row::Row;

/// How token rows travel in a dispatch. Outputs and sums travel in the element type in any case.
///
/// ```
/// use xccl::{DType, WireFormat};
/// assert_eq!(WireFormat::Fp8E4m3.value_bytes(7168, DType::BF16), 7168);
/// assert_eq!(WireFormat::Fp8E4m3.scales(7168), 56); // one per 128 channels
/// assert_eq!(WireFormat::Int8.scales(7168), 1); // one per token
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum WireFormat {
    /// The elements as they are.
    #[default]
    Native = 0,
    /// Signed 8-bit integers with one f32 scale per token: `amax / 127`.
    Int8 = 1,
    /// OCP FP8 E4M3 with one f32 scale per 128 channels: `amax / 448`.
    Fp8E4m3 = 2,
    /// OCP FP8 E5M2 with one f32 scale per 128 channels: `amax / 57344`.
    Fp8E5m2 = 3,
}

const NAMES: [(WireFormat, &str); 4] = [
    (WireFormat::Native, "native"),
    (WireFormat::Int8, "int8"),
    (WireFormat::Fp8E4m3, "fp8-e4m3"),
    (WireFormat::Fp8E5m2, "fp8-e5m2"),
];

/// Channels that share a scale in fp8.
const BLOCK: usize = 128;

impl WireFormat {
    /// Bytes of one row's values, for `hidden` elements of type `dtype`.
    pub const fn value_bytes(self, hidden: usize, dtype: DType) -> usize {
        match self {
            WireFormat::Native => hidden * dtype.size(),
            _ => hidden,
        }
    }

    /// Scales of one row of `hidden` elements.
    pub const fn scales(self, hidden: usize) -> usize {
        match self {
            WireFormat::Native => 0,
            WireFormat::Int8 => 1,
            WireFormat::Fp8E4m3 | WireFormat::Fp8E5m2 => hidden.div_ceil(BLOCK),
        }
    }

    pub(super) fn row_layout(self, hidden: usize, dtype: DType) -> RowLayout {
        let (values, scales) = (self.value_bytes(hidden, dtype), self.scales(hidden));
        let scales_at = values.next_multiple_of(16);
        RowLayout { values, scales, scales_at, stride: (scales_at + scales * size_of::<f32>()).next_multiple_of(LINE) }
    }
}

impl fmt::Display for WireFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(NAMES.iter().find(|(format, _)| format == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for WireFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = NAMES.iter().find(|(_, name)| *name == text);
        known.map(|&(format, _)| format).ok_or_else(|| {
            let names = NAMES.map(|(_, name)| name).join(", ");
            format!("unknown wire format {text:?}: expected one of {names}")
        })
    }
}

/// How the scales of several rows lie beside each other.
///
/// ```
/// use xccl::ScaleLayout;
/// assert_eq!(ScaleLayout::RowMajor.elements(10, 56), 10 * 56);
/// assert_eq!(ScaleLayout::ColumnMajor.elements(10, 56), 56 * 12); // rows padded to 4
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ScaleLayout {
    /// `[rows, scales per row]`.
    RowMajor = 0,
    /// `[scales per row, rows padded to a multiple of 4]`: what block-scaled GEMMs load 16 bytes at a time, such as
    /// DeepGEMM's ("MN-major, TMA-aligned").
    ColumnMajor = 1,
}

impl ScaleLayout {
    /// Elements of the scales of `rows` rows with `scales` scales each; `usize::MAX` where that is more than a number can say.
    pub const fn elements(self, rows: usize, scales: usize) -> usize {
        match self {
            ScaleLayout::RowMajor => rows.saturating_mul(scales),
            ScaleLayout::ColumnMajor => match rows.checked_next_multiple_of(COLUMN_ALIGN) {
                Some(rows) => rows.saturating_mul(scales),
                None => usize::MAX,
            },
        }
    }
}

/// Rows that a column of scales is padded to: 16 bytes.
pub(super) const COLUMN_ALIGN: usize = 4;

/// Where values and scales lie in a row, in bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct RowLayout {
    /// Bytes of the values, which come first.
    pub(super) values: usize,
    /// Number of scales.
    pub(super) scales: usize,
    /// Where the scales begin.
    pub(super) scales_at: usize,
    /// From one row to the next.
    pub(super) stride: usize,
}

impl RowLayout {
    /// The values and the scales of a row, `stride` bytes that begin on a cache line.
    pub(super) fn split<'r>(&self, row: &'r mut [u8]) -> (&'r mut [u8], &'r mut [f32]) {
        let (values, scales) = row.split_at_mut(self.scales_at);
        (&mut values[..self.values], bytemuck::cast_slice_mut(&mut scales[..self.scales * size_of::<f32>()]))
    }
}

/// Encodes a row: `values` has as many bytes, `scales` as many elements as the format's layout says.
///
/// # Panics
/// When they have not, when there are smooth scales for another format than int8 or not as many as elements, or with
/// [`WireFormat::Native`], which needs no kernel.
pub(super) fn encode<E: Element>(
    (kernels, format): (Kernels, WireFormat),
    row: &[E],
    smooth: Option<&[f32]>,
    values: &mut [u8],
    scales: &mut [f32],
) {
    let layout = format.row_layout(row.len(), E::DTYPE);
    assert!(format != WireFormat::Native, "a native row is copied");
    assert_eq!((values.len(), scales.len()), (layout.values, layout.scales), "an encoded row's size");
    let smooths = |smooth: &[f32]| format == WireFormat::Int8 && smooth.len() == row.len();
    assert!(smooth.is_none_or(smooths), "smooth scales are for int8, one per element");
    match kernels {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: kernels are resolved, so this processor has them; the lengths were checked.
        Kernels::Avx512 | Kernels::Avx512Bf16 => unsafe { avx512::encode(format, row, smooth, values, scales) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Kernels::Avx2 => unsafe { avx2::encode(format, row, smooth, values, scales) },
        #[cfg(any(target_arch = "aarch64", test))]
        // SAFETY: as above; elsewhere it is emulated, for tests.
        Kernels::Neon => unsafe { neon::encode(format, row, smooth, values, scales) },
        // SAFETY: needs no feature; as above.
        _ => unsafe { scalar::encode(format, row, smooth, values, scales) },
    }
}

/// Decodes a row, perhaps in a peer's memory, into as many elements.
///
/// # Panics
/// When `row` is shorter than the format's layout says, or with [`WireFormat::Native`].
pub(super) fn decode<E: Element>((kernels, format): (Kernels, WireFormat), row: Row<'_, u8>, to: &mut [E]) {
    let layout = format.row_layout(to.len(), E::DTYPE);
    assert!(format != WireFormat::Native, "a native row is copied");
    assert!(row.len() >= layout.scales_at + layout.scales * size_of::<f32>(), "an encoded row's size");
    let (values, scales) = (row.as_ptr(), row.as_ptr().wrapping_add(layout.scales_at));
    match kernels {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: kernels are resolved, so this processor has them; values and scales lie inside the row, as checked.
        Kernels::Avx512Bf16 => unsafe { avx512::decode_bf16(format, values, scales, to) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Kernels::Avx512 => unsafe { avx512::decode(format, values, scales, to) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Kernels::Avx2 => unsafe { avx2::decode(format, values, scales, to) },
        #[cfg(any(target_arch = "aarch64", test))]
        // SAFETY: as above; elsewhere it is emulated, for tests.
        Kernels::Neon => unsafe { neon::decode(format, values, scales, to) },
        // SAFETY: needs no feature; as above.
        _ => unsafe { scalar::decode(format, values, scales, to) },
    }
}
