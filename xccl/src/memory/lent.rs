//! Buffers that no borrow guards: lent by a promise for as long as a request lasts.

use std::ops::Range;

use super::row::{Row, Target};

/// Bytes to be read.
pub(crate) struct LentBytes {
    at: *const u8,
    len: usize,
}

// SAFETY: whoever lent the bytes promised that they stay readable, from whichever thread.
unsafe impl Send for LentBytes {}

impl LentBytes {
    /// # Safety
    /// `bytes` stay readable and unchanged until this value is dropped, whatever their lifetime says.
    pub(crate) unsafe fn new(bytes: &[u8]) -> Self {
        LentBytes { at: bytes.as_ptr(), len: bytes.len() }
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: readable as long as this value lives, by the promise of `new`'s caller.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }
}

/// Bytes to be written.
pub(crate) struct LentBuffer {
    at: *mut u8,
    len: usize,
}

// SAFETY: whoever lent the buffer promised that it stays writable, from whichever thread.
unsafe impl Send for LentBuffer {}

impl LentBuffer {
    /// # Safety
    /// `buffer` stays writable and used by nobody else until this value is dropped, whatever its lifetime says.
    pub(crate) unsafe fn new(buffer: &mut [u8]) -> Self {
        LentBuffer { at: buffer.as_mut_ptr(), len: buffer.len() }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: writable as long as this value lives, and used by nobody else, by the promise of `new`'s caller.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

/// What a collective reads and writes: two buffers, or parts of one that may overlap.
pub(crate) struct LentPair {
    input: (*const u8, usize),
    output: (*mut u8, usize),
}

// SAFETY: whoever lent the buffers promised that they stay good, from whichever thread.
unsafe impl Send for LentPair {}

impl LentPair {
    /// # Safety
    /// `input` stays readable and unchanged by others, `output` writable and used by nobody else, until this value is dropped,
    /// whatever their lifetimes say.
    pub(crate) unsafe fn apart(input: &[u8], output: &mut [u8]) -> Self {
        LentPair { input: (input.as_ptr(), input.len()), output: (output.as_mut_ptr(), output.len()) }
    }

    /// One buffer, `input` bytes of which are read.
    ///
    /// # Panics
    /// When they do not lie in the buffer.
    ///
    /// # Safety
    /// As for the output of [`apart`](Self::apart).
    pub(crate) unsafe fn in_place(buffer: &mut [u8], input: Range<usize>) -> Self {
        assert!(input.start <= input.end && input.end <= buffer.len(), "{input:?} of {} bytes", buffer.len());
        let output = (buffer.as_mut_ptr(), buffer.len());
        LentPair { input: (output.0.cast_const().wrapping_add(input.start), input.len()), output }
    }

    /// `len` bytes of the input.
    ///
    /// # Panics
    /// When they do not lie inside.
    pub(crate) fn input(&self, at: usize, len: usize) -> Row<'_, u8> {
        let (start, all) = self.input;
        assert!(at <= all && len <= all - at, "{len} bytes at {at} of an input of {all}");
        // SAFETY: inside the input, which is readable as long as this value lives.
        unsafe { Row::from_raw(start.add(at), len) }
    }

    /// `len` bytes of the output.
    ///
    /// # Panics
    /// When they do not lie inside.
    pub(crate) fn output(&self, at: usize, len: usize) -> Target<'_> {
        let (start, all) = self.output;
        assert!(at <= all && len <= all - at, "{len} bytes at {at} of an output of {all}");
        // SAFETY: inside the output, which is writable as long as this value lives; references to it are never made.
        unsafe { Target::new(start.add(at), len) }
    }

    /// Whether the output begins where the input does.
    pub(crate) fn is_same(&self) -> bool {
        self.input.0 == self.output.0.cast_const()
    }

    pub(crate) fn output_len(&self) -> usize {
        self.output.1
    }
}
