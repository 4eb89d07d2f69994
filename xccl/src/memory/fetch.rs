//! Asking for lines ahead of their use.

use super::layout::LINE;

/// Asks the processor for the line at `at`, which is going to be read soon.
#[inline(always)]
pub(crate) fn to_read(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: fetching ahead changes nothing and faults on no address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// Asks the processor for the line at `at` for this core alone: it is going to be written soon, and others may have it.
#[inline(always)]
pub(crate) fn to_write(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above; x86-64 processors without the instruction do nothing.
    unsafe {
        std::arch::asm!("prefetchw [{at}]", at = in(reg) at, options(nostack, readonly, preserves_flags));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!("prfm pstl1keep, [{at}]", at = in(reg) at, options(nostack, readonly, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// The addresses of the lines of `bytes` bytes from `at` on, near enough for a hint: none need be readable.
#[inline(always)]
pub(crate) fn lines(at: *const u8, bytes: usize) -> impl Iterator<Item = *const u8> {
    (0..bytes).step_by(LINE).map(move |offset| at.wrapping_add(offset))
}
