//! Which instruction set the kernels use that touch every element.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// An instruction set that kernels are compiled for. All give the same bits; it is chosen at run time, and may be forced
/// (`XCCL_KERNELS`) to compare or to test them.
///
/// ```
/// use xccl::Kernels;
/// assert!(Kernels::available().contains(&Kernels::Scalar));
/// assert_eq!("avx2".parse::<Kernels>().unwrap(), Kernels::Avx2);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernels {
    /// The best that this processor has.
    Auto,
    /// Plain loops, for any processor.
    Scalar,
    /// x86-64 with AVX2 and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW and VL.
    Avx512,
    /// The same with AVX-512 DQ, and the conversion to bf16 of AVX-512 BF16.
    Avx512Bf16,
    /// AArch64.
    Neon,
}

const NAMES: [(Kernels, &str); 6] = [
    (Kernels::Auto, "auto"),
    (Kernels::Scalar, "scalar"),
    (Kernels::Avx2, "avx2"),
    (Kernels::Avx512, "avx512"),
    (Kernels::Avx512Bf16, "avx512bf16"),
    (Kernels::Neon, "neon"),
];

impl Kernels {
    /// What this processor has, best last.
    pub fn available() -> Vec<Kernels> {
        let named = NAMES.iter().map(|&(kernels, _)| kernels);
        named.filter(|&kernels| kernels != Kernels::Auto && kernels.is_available()).collect()
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        let avx512 = || {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
        };
        match self {
            Kernels::Auto | Kernels::Scalar => true,
            Kernels::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c"),
            Kernels::Avx512 => avx512(),
            Kernels::Avx512Bf16 => {
                avx512() && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512bf16")
            }
            Kernels::Neon => false,
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn is_available(self) -> bool {
        matches!(self, Kernels::Auto | Kernels::Scalar | Kernels::Neon)
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn is_available(self) -> bool {
        matches!(self, Kernels::Auto | Kernels::Scalar)
    }

    /// Itself, if this processor has it; the best there is for [`Kernels::Auto`].
    pub(crate) fn resolve(self, option: &'static str) -> Result<Kernels> {
        let available = Self::available();
        match self {
            Kernels::Auto => Ok(available.last().copied().unwrap_or(Kernels::Scalar)),
            kernels if kernels.is_available() => Ok(kernels),
            kernels => {
                let names = available.iter().map(Kernels::to_string).collect::<Vec<_>>().join(", ");
                let expected = format!("auto, or what this processor has: {names}");
                Err(Error::Config { option, value: kernels.to_string(), expected })
            }
        }
    }
}

impl fmt::Display for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(NAMES.iter().find(|(kernels, _)| kernels == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for Kernels {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let known = NAMES.iter().find(|(_, name)| *name == text);
        known.map(|&(kernels, _)| kernels).ok_or_else(|| {
            let names = NAMES.map(|(_, name)| name).join(", ");
            format!("unknown kernels {text:?}: expected one of {names}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forced_kernels_that_this_processor_lacks_are_an_error_that_names_what_it_has() {
        for (kernels, name) in NAMES {
            match kernels.resolve("XCCL_KERNELS") {
                Ok(resolved) => assert!(resolved.is_available() && resolved != Kernels::Auto, "{name}"),
                Err(err) => {
                    let text = err.to_string();
                    assert!(!kernels.is_available(), "{text}");
                    assert!(text.contains("XCCL_KERNELS") && text.contains(name) && text.contains("scalar"), "{text}");
                }
            }
        }
        // No processor has both.
        assert!(Kernels::Avx2.resolve("").is_err() || Kernels::Neon.resolve("").is_err());
    }
}
