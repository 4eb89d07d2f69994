//! Copies past the caches.

use bytemuck::Pod;

#[cfg(target_arch = "x86_64")]
use super::layout::LINE;
use super::row::Row;

/// From so many bytes on a copy goes past the caches: the destination will not stay in them, and a line that is written
/// whole need not be read first. 14 MiB of rows per rank take 0.7 of the time so, 2 MiB twice the time.
pub(crate) const STREAMING_BYTES: usize = 8 << 20;

/// Copies a row past the caches. [`end_streaming`] has to follow before anything is published.
#[cfg(target_arch = "x86_64")]
pub(crate) fn stream<T: Pod>(row: Row<'_, T>, to: &mut [T]) {
    assert_eq!(row.len(), to.len(), "a row's length");
    let (from, to) = (row.as_ptr().cast::<u8>(), bytemuck::cast_slice_mut::<T, u8>(to));
    let head = to.as_ptr().align_offset(LINE).min(to.len());
    let tail = head + (to.len() - head) / LINE * LINE;
    // SAFETY: the row is as long as `to`, and `head` lies inside.
    unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), head) };
    let lines = &mut to[head..tail];
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature is there; whole lines, the first aligned to one, and the row is as long.
        unsafe { stream_avx512(from.add(head), lines) };
    } else {
        // SAFETY: as above.
        unsafe { stream_sse2(from.add(head), lines) };
    }
    // SAFETY: the row is as long as `to`, and `tail` lies inside.
    unsafe { std::ptr::copy_nonoverlapping(from.add(tail), to.as_mut_ptr().add(tail), to.len() - tail) };
}

/// # Safety
/// `to` is whole lines, the first aligned to one; `from` is readable for as many bytes. So it is for the other version.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn stream_avx512(from: *const u8, to: &mut [u8]) {
    use std::arch::x86_64::*;
    for at in (0..to.len()).step_by(LINE) {
        // SAFETY: a line inside both, by the caller's promise.
        unsafe { _mm512_stream_si512(to.as_mut_ptr().add(at).cast(), _mm512_loadu_si512(from.add(at).cast())) };
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn stream_sse2(from: *const u8, to: &mut [u8]) {
    use std::arch::x86_64::*;
    for at in (0..to.len()).step_by(16) {
        // SAFETY: a quarter of a line inside both, by the caller's promise.
        unsafe { _mm_stream_si128(to.as_mut_ptr().add(at).cast(), _mm_loadu_si128(from.add(at).cast())) };
    }
}

/// Elsewhere through the caches.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn stream<T: Pod>(row: Row<'_, T>, to: &mut [T]) {
    row.copy_to(to);
}

/// Puts streamed stores in order with the later ones.
pub(crate) fn end_streaming() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has it, and it touches nothing.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
