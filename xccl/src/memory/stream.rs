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
    let (head, lines) = whole_lines(to.as_ptr(), to.len());
    let tail = head + lines;
    // SAFETY: the row is as long as `to`, and `head` lies inside.
    unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), head) };
    // SAFETY: the lines lie inside both.
    unsafe { stream_lines(from.add(head), to.as_mut_ptr().add(head), lines) };
    // SAFETY: the row is as long as `to`, and `tail` lies inside.
    unsafe { std::ptr::copy_nonoverlapping(from.add(tail), to.as_mut_ptr().add(tail), to.len() - tail) };
}

/// Of `len` bytes at `to`: how many come before the first line, and how many are whole lines.
#[cfg(target_arch = "x86_64")]
pub(super) fn whole_lines(to: *const u8, len: usize) -> (usize, usize) {
    let head = to.align_offset(LINE).min(len);
    (head, (len - head) / LINE * LINE)
}

/// Copies whole lines past the caches, by instructions that are no accesses of Rust's.
///
/// # Safety
/// `bytes` are whole lines, the first of `to` aligned to one; `from` is readable and `to` writable for as many.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn stream_lines(from: *const u8, to: *mut u8, bytes: usize) {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature is there; the rest is the caller's promise.
        unsafe { stream_avx512(from, to, bytes) };
    } else {
        // SAFETY: the caller's promise.
        unsafe { stream_sse2(from, to, bytes) };
    }
}

/// # Safety
/// As for [`stream_lines`]. So it is for the other version.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn stream_avx512(from: *const u8, to: *mut u8, bytes: usize) {
    use std::arch::x86_64::*;
    for at in (0..bytes).step_by(LINE) {
        // SAFETY: a line inside both, by the caller's promise.
        unsafe { _mm512_stream_si512(to.add(at).cast(), _mm512_loadu_si512(from.add(at).cast())) };
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn stream_sse2(from: *const u8, to: *mut u8, bytes: usize) {
    use std::arch::x86_64::*;
    for at in (0..bytes).step_by(16) {
        // SAFETY: a quarter of a line inside both, by the caller's promise.
        unsafe { _mm_stream_si128(to.add(at).cast(), _mm_loadu_si128(from.add(at).cast())) };
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
