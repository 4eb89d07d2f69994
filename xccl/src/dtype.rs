//! Element types that travel between ranks.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

/// The element type of token rows.
///
/// ```
/// use xccl::DType;
/// assert_eq!(DType::BF16.size(), 2);
/// assert_eq!("f32".parse::<DType>().unwrap(), DType::F32);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DType {
    /// IEEE 754 single precision.
    F32 = 0,
    /// IEEE 754 half precision.
    F16 = 1,
    /// bfloat16: the upper half of an f32.
    BF16 = 2,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        })
    }
}

impl FromStr for DType {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" => Ok(DType::F32),
            "f16" => Ok(DType::F16),
            "bf16" => Ok(DType::BF16),
            other => Err(format!("unknown element type {other:?}: expected f32, f16 or bf16")),
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
    impl Sealed for i32 {}
    impl Sealed for i64 {}
}

/// A Rust type that a token row may be made of: `f32`, [`half::f16`] or [`half::bf16`].
///
/// ```
/// use xccl::{DType, Element};
/// assert_eq!(<half::bf16 as Element>::DTYPE, DType::BF16);
/// ```
pub trait Element: bytemuck::Pod + Send + Sync + sealed::Sealed {
    /// The element type's name at run time.
    const DTYPE: DType;
    /// Rounds to nearest, ties to even.
    fn from_f32(x: f32) -> Self;
    /// Widens without loss.
    fn to_f32(self) -> f32;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    #[inline]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    #[inline]
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
    #[inline]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    #[inline]
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
    #[inline]
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

/// A Rust type that expert ids may be given in: `i32` or `i64`.
///
/// ```
/// use xccl::ExpertId;
/// assert_eq!(ExpertId::to_i64(-1i32), -1);
/// ```
pub trait ExpertId: Copy + Send + Sync + sealed::Sealed {
    /// Widens without loss.
    fn to_i64(self) -> i64;
}

impl ExpertId for i32 {
    fn to_i64(self) -> i64 {
        self.into()
    }
}

impl ExpertId for i64 {
    fn to_i64(self) -> i64 {
        self
    }
}
