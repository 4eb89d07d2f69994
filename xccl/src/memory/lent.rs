//! Buffers that no borrow guards: lent by a promise for as long as a request lasts.

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
