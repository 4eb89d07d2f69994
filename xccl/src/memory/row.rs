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
