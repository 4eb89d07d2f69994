//! Values in memory that another process may change at any time: never a reference, only copies.

use std::marker::PhantomData;

use bytemuck::Pod;

use super::mapping::Mapping;

/// Plain values that are readable for `'a`, but may change meanwhile.
pub(crate) struct Row<'a, T> {
    at: *const T,
    len: usize,
    memory: PhantomData<&'a Mapping>,
}

impl<T> Clone for Row<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Row<'_, T> {}

impl<'a, T: Pod> Row<'a, T> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of the first value: valid for `len` values, not for a reference.
    pub(crate) fn as_ptr(&self) -> *const T {
        self.at
    }

    /// The values where they lie.
    ///
    /// # Safety
    /// They do not change as long as the slice lives.
    pub(crate) unsafe fn as_slice(&self) -> &'a [T] {
        // SAFETY: readable for `len` values for 'a, by the constructors; unchanged by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    /// Copies the values out.
    ///
    /// # Panics
    /// When there are not as many.
    pub(crate) fn copy_to(&self, to: &mut [T]) {
        assert_eq!(to.len(), self.len, "a row's length");
        // SAFETY: readable for `len` values, by the constructors. Values that change meanwhile arrive mixed, as plain numbers.
        unsafe { std::ptr::copy_nonoverlapping(self.at, to.as_mut_ptr(), self.len) }
    }
}

impl<'a, T: Pod> From<&'a [T]> for Row<'a, T> {
    fn from(values: &'a [T]) -> Self {
        Row { at: values.as_ptr(), len: values.len(), memory: PhantomData }
    }
}

impl Mapping {
    /// `n` plain values at `offset`.
    ///
    /// # Panics
    /// When they do not lie inside the mapping, or not aligned: offsets are the crate's own, or were checked before.
    pub(crate) fn row<T: Pod>(&self, offset: usize, n: usize) -> Row<'_, T> {
        let at = self.at(offset, n * size_of::<T>()).cast::<T>();
        assert!(at.is_aligned(), "values at odd offset {offset}");
        Row { at, len: n, memory: PhantomData }
    }
}

/// Plain bytes that are writable for `'a`, though another process, or another view of this kind, may reach them too: never a
/// reference, only copies.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    at: *mut u8,
    len: usize,
    memory: PhantomData<&'a Mapping>,
}

impl<'a> Target<'a> {
    /// # Safety
    /// `len` bytes at `at` are writable for `'a`; no reference to them is used meanwhile.
    pub(crate) unsafe fn new(at: *mut u8, len: usize) -> Self {
        Target { at, len, memory: PhantomData }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of the first byte: valid for `len` bytes, not for a reference.
    pub(crate) fn as_mut_ptr(&self) -> *mut u8 {
        self.at
    }

    /// The bytes, for reading.
    pub(crate) fn as_row(&self) -> Row<'a, u8> {
        Row { at: self.at.cast_const(), len: self.len, memory: PhantomData }
    }

    /// Copies bytes in. Those that are these very ones already are left alone.
    ///
    /// # Panics
    /// When there are not as many.
    pub(crate) fn copy_from(&self, from: Row<'_, u8>) {
        assert_eq!(from.len(), self.len, "a row's length");
        if !self.is(from) {
            // SAFETY: readable and writable for `len` bytes, by the constructors; they may overlap.
            unsafe { std::ptr::copy(from.as_ptr(), self.at, self.len) }
        }
    }

    fn is(&self, row: Row<'_, u8>) -> bool {
        row.as_ptr() == self.at.cast_const()
    }

    /// As [`copy_from`](Self::copy_from), past the caches. The bytes lie elsewhere, or are the very same; `end_streaming` has to
    /// follow.
    ///
    /// # Panics
    /// When there are not as many.
    pub(crate) fn stream_from(&self, from: Row<'_, u8>) {
        if !self.is(from) {
            // SAFETY: writable for `len` bytes by the constructors, and no other view of them is used during this call.
            super::stream::stream(from, unsafe { std::slice::from_raw_parts_mut(self.at, self.len) });
        }
    }
}

impl<'a> Row<'a, u8> {
    /// # Safety
    /// `len` bytes at `at` are readable for `'a`.
    pub(crate) unsafe fn from_raw(at: *const u8, len: usize) -> Self {
        Row { at, len, memory: PhantomData }
    }
}

impl Mapping {
    /// `n` bytes at `offset` of this rank's own segment.
    ///
    /// # Panics
    /// As [`at_mut`](Self::at_mut).
    pub(crate) fn target(&self, offset: usize, n: usize) -> Target<'_> {
        // SAFETY: inside the mapping and writable, as `at_mut` has checked; references to it are never made.
        unsafe { Target::new(self.at_mut(offset, n), n) }
    }
}
