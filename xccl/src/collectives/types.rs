//! What collectives are made of: element types, reductions, and the call of one rank as the others see it.

use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};

use crate::sync::Operation;

/// The element type of a collective's buffers.
///
/// ```
/// use xccl::DataType;
/// assert_eq!(DataType::BF16.size(), 2);
/// assert_eq!("i64".parse::<DataType>().unwrap(), DataType::I64);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DataType {
    /// IEEE 754 single precision.
    F32 = 0,
    /// IEEE 754 half precision.
    F16 = 1,
    /// bfloat16: the upper half of an f32.
    BF16 = 2,
    /// Signed integer of 32 bits.
    I32 = 3,
    /// Signed integer of 64 bits.
    I64 = 4,
    /// Unsigned integer of 8 bits, or any byte.
    U8 = 5,
}

impl DataType {
    /// All of them.
    pub const ALL: [DataType; 6] =
        [DataType::F32, DataType::F16, DataType::BF16, DataType::I32, DataType::I64, DataType::U8];

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DataType::F32 | DataType::I32 => 4,
            DataType::F16 | DataType::BF16 => 2,
            DataType::I64 => 8,
            DataType::U8 => 1,
        }
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DataType::F32 => "f32",
            DataType::F16 => "f16",
            DataType::BF16 => "bf16",
            DataType::I32 => "i32",
            DataType::I64 => "i64",
            DataType::U8 => "u8",
        })
    }
}

impl FromStr for DataType {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = DataType::ALL.into_iter().find(|dtype| dtype.to_string() == s);
        found.ok_or_else(|| format!("unknown element type {s:?}: expected f32, f16, bf16, i32, i64 or u8"))
    }
}

/// How elements of several ranks become one. The ranks' elements are joined in ascending order of rank, whatever the number
/// of elements and whoever does it: every rank gets the same bits, and another run gives them again.
///
/// f16 and bf16 are widened to f32, joined there, and rounded once, to nearest even. A maximum or minimum with NaN is NaN.
///
/// ```
/// use xccl::ReduceOp;
/// assert_eq!("avg".parse::<ReduceOp>().unwrap(), ReduceOp::Avg);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ReduceOp {
    /// The sum; integers wrap around.
    Sum = 0,
    /// The largest.
    Max = 1,
    /// The smallest.
    Min = 2,
    /// The sum divided by the number of ranks. Integers do not wrap, and are rounded toward zero.
    Avg = 3,
}

impl ReduceOp {
    /// All of them.
    pub const ALL: [ReduceOp; 4] = [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min, ReduceOp::Avg];
}

impl fmt::Display for ReduceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ReduceOp::Sum => "sum",
            ReduceOp::Max => "max",
            ReduceOp::Min => "min",
            ReduceOp::Avg => "avg",
        })
    }
}

impl FromStr for ReduceOp {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = ReduceOp::ALL.into_iter().find(|op| op.to_string() == s);
        found.ok_or_else(|| format!("unknown reduction {s:?}: expected sum, max, min or avg"))
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that a collective's buffers may be made of: `f32`, [`half::f16`], [`half::bf16`], `i32`, `i64` or `u8`.
///
/// ```
/// use xccl::{DataType, Value};
/// assert_eq!(<i64 as Value>::TYPE, DataType::I64);
/// ```
pub trait Value: bytemuck::Pod + Send + Sync + sealed::Sealed {
    /// The type's name at run time.
    const TYPE: DataType;
}

macro_rules! values {
    ($($t:ty => $name:ident),*) => {$(
        impl sealed::Sealed for $t {}
        impl Value for $t {
            const TYPE: DataType = DataType::$name;
        }
    )*};
}

values!(f32 => F32, f16 => F16, bf16 => BF16, i32 => I32, i64 => I64, u8 => U8);

/// What a rank asks for in one call: the same on every rank, or they have got out of step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) operation: Operation,
    pub(crate) dtype: DataType,
    pub(crate) op: Option<ReduceOp>,
    pub(crate) root: Option<usize>,
    /// Elements: of the whole buffer, or of each rank's block. 0 where blocks differ.
    pub(crate) count: usize,
}

impl Call {
    /// As it stands in shared memory.
    pub(crate) fn words(&self) -> [u64; 2] {
        let op = self.op.map_or(0, |op| op as u64 + 1);
        let root = self.root.map_or(0, |root| root as u64 + 1);
        [self.operation as u64 | (self.dtype as u64) << 8 | op << 16 | root << 32, self.count as u64]
    }

    /// What another rank's words say, as far as they make sense.
    pub(crate) fn describe([what, count]: [u64; 2]) -> String {
        let operation = Operation::from_word(what as u8 as u32);
        let dtype = DataType::ALL.get((what >> 8 & 0xff) as usize);
        let (Some(operation), Some(dtype)) = (operation, dtype) else {
            return format!("something unknown ({what:#x})");
        };
        let op = ReduceOp::ALL.get(((what >> 16 & 0xff) as usize).wrapping_sub(1)).map(|op| format!("{op}, "));
        let root = (what >> 32).checked_sub(1).map(|root| format!(", root {root}"));
        format!("{operation}({}{count} {dtype}{})", op.unwrap_or_default(), root.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_described_from_its_words() {
        let call = Call {
            operation: Operation::Reduce,
            dtype: DataType::BF16,
            op: Some(ReduceOp::Avg),
            root: Some(7),
            count: 12,
        };
        assert_eq!(Call::describe(call.words()), "reduce(avg, 12 bf16, root 7)");
        let call = Call { operation: Operation::AllGather, op: None, root: None, ..call };
        assert_eq!(Call::describe(call.words()), "all_gather(12 bf16)");
        assert!(Call::describe([u64::MAX, 0]).contains("unknown"));
    }
}
