//! Copies into and out of memory that others may be reading and writing at the same time: other processes, and threads of
//! this one.
//!
//! To Rust two plain accesses that race are undefined behaviour, whatever the processor does with them. So nothing here is a
//! plain access that the compiler knows of: words are atomic, and longer pieces are moved by the machine's `memcpy`, called
//! through a pointer that the compiler cannot see through, so that its accesses are what the processor makes of them: each
//! byte is read or written at some moment. Whoever races gets bytes of both, never anything worse; an aligned word of a
//! piece of up to [`SHORT`] bytes arrives whole.

use std::ffi::c_void;
use std::hint::black_box;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU8, AtomicU64};

use super::mapping::Mapping;
use super::stream::{self, STREAMING_BYTES};

/// Pieces up to this length are moved word by word: for so few bytes a call would take longer.
const SHORT: usize = 64;

impl Mapping {
    /// Copies bytes in. They are visible to whoever sees a later release store of this thread.
    ///
    /// # Panics
    /// When they do not lie inside the mapping, or it is read-only.
    pub(crate) fn put(&self, offset: usize, from: &[u8]) {
        match from.len() {
            0..=SHORT if offset.is_multiple_of(8) => self.put_words(offset, from),
            len if len >= STREAMING_BYTES => {
                self.put_streaming(offset, from);
                stream::end_streaming();
            }
            len => {
                let to = self.at_mut(offset, len);
                // SAFETY: writable for `len` bytes, as just checked; `from` is readable, and no reference exists to what others
                // may write, so the two do not overlap.
                unsafe { copy(to, from.as_ptr(), len) }
            }
        }
    }

    /// As [`put`](Self::put), past the caches: [`stream::end_streaming`] has to follow before anything is published.
    pub(crate) fn put_streaming(&self, offset: usize, from: &[u8]) {
        let to = self.at_mut(offset, from.len());
        #[cfg(target_arch = "x86_64")]
        {
            let (head, lines) = stream::whole_lines(to, from.len());
            let tail = head + lines;
            // SAFETY: three parts of what was just checked, as in `put`.
            unsafe {
                copy(to, from.as_ptr(), head);
                stream::stream_lines(from.as_ptr().add(head), to.add(head), lines);
                copy(to.add(tail), from.as_ptr().add(tail), from.len() - tail);
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        // SAFETY: as in `put`.
        unsafe {
            copy(to, from.as_ptr(), from.len())
        }
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// When they do not lie inside the mapping.
    pub(crate) fn get(&self, offset: usize, to: &mut [u8]) {
        if to.len() <= SHORT && offset.is_multiple_of(8) {
            return self.get_words(offset, to);
        }
        let from = self.at(offset, to.len());
        // SAFETY: readable for as many bytes, as just checked, and `to` does not overlap: see `put`.
        unsafe { copy(to.as_mut_ptr(), from, to.len()) }
    }

    fn put_words(&self, offset: usize, from: &[u8]) {
        self.at_mut(offset, from.len());
        let (words, rest) = from.as_chunks::<8>();
        for (i, &word) in words.iter().enumerate() {
            self.word64(offset + i * 8).store(u64::from_ne_bytes(word), Relaxed);
        }
        for (i, &byte) in rest.iter().enumerate() {
            self.byte(offset + words.len() * 8 + i).store(byte, Relaxed);
        }
    }

    fn get_words(&self, offset: usize, to: &mut [u8]) {
        self.at(offset, to.len());
        let (words, rest) = to.as_chunks_mut::<8>();
        let tail = offset + words.len() * 8;
        for (i, word) in words.iter_mut().enumerate() {
            *word = self.word64(offset + i * 8).load(Relaxed).to_ne_bytes();
        }
        for (i, byte) in rest.iter_mut().enumerate() {
            *byte = self.byte(tail + i).load(Relaxed);
        }
    }

    fn byte(&self, offset: usize) -> &AtomicU8 {
        let at = self.at(offset, 1);
        // SAFETY: in bounds, alive as long as `self`; all access of this process to it is atomic, or no access of Rust's.
        unsafe { AtomicU8::from_ptr(at.cast_mut()) }
    }

    /// The word at `offset`, for programs that share it with others.
    pub(crate) fn shared_word(&self, offset: usize) -> &AtomicU64 {
        self.at_mut(offset, 8);
        self.word64(offset)
    }
}

/// # Safety
/// `from` is readable and `to` writable for `len` bytes; they do not overlap.
unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
    type Memcpy = unsafe extern "C" fn(*mut c_void, *const c_void, usize) -> *mut c_void;
    let memcpy: Memcpy = black_box(libc::memcpy);
    // SAFETY: the caller's promise.
    unsafe { memcpy(to.cast(), from.cast(), len) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::segment::{MemoryFlavour, OwnSegment, Writers};

    fn mapping(bytes: usize) -> Mapping {
        OwnSegment::create(MemoryFlavour::Memfd, Writers::Anyone, bytes, false).unwrap().mapping
    }

    #[test]
    fn bytes_of_every_length_and_alignment_come_out_as_they_went_in_and_touch_no_others() {
        let memory = mapping(8192);
        let all = |memory: &Mapping| {
            let mut bytes = vec![0; 1024];
            memory.get(0, &mut bytes);
            bytes
        };
        for offset in 256..266 {
            for len in (0..140).chain([255, 256, 257]) {
                memory.put(0, &[0xee; 1024]);
                let bytes: Vec<u8> = (0..len).map(|i| i as u8).collect();
                let mut expected = vec![0xee; 1024];
                expected[offset..offset + len].copy_from_slice(&bytes);
                memory.put(offset, &bytes);
                assert!(all(&memory) == expected, "{len} bytes at {offset}");
                let mut out = vec![0; len];
                memory.get(offset, &mut out);
                assert_eq!(out, bytes);
                memory.put_streaming(offset, &vec![1; len]);
                stream::end_streaming();
                expected[offset..offset + len].fill(1);
                assert!(all(&memory) == expected, "{len} bytes at {offset}, past the caches");
            }
        }
    }

    #[test]
    fn long_pieces_go_past_the_caches_and_arrive() {
        let memory = mapping(STREAMING_BYTES + 4096);
        let bytes: Vec<u8> = (0..STREAMING_BYTES + 100).map(|i| (i * 7 + (i >> 9)) as u8).collect();
        memory.put(33, &bytes);
        let mut out = vec![0; bytes.len()];
        memory.get(33, &mut out);
        assert!(out == bytes);
    }

    #[test]
    #[should_panic(expected = "outside the segment")]
    fn bytes_beyond_the_end_are_refused() {
        mapping(4096).put(4090, &[0; 7]);
    }
}
