//! Where Rust meets C: the panic boundary, the last error's text, pointers checked and turned into what Rust uses.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

use crate::result::{code_of, xcclResult_t};

/// Why an entry point fails.
pub(crate) struct Failure {
    code: xcclResult_t,
    text: String,
}

impl Failure {
    pub(crate) fn argument(text: impl Into<String>) -> Self {
        Failure { code: xcclResult_t::xcclInvalidArgument, text: text.into() }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Failure { code: xcclResult_t::xcclInvalidUsage, text: text.into() }
    }

    /// Whether it is about what was passed in.
    pub(crate) fn is_of_arguments(&self) -> bool {
        self.code == xcclResult_t::xcclInvalidArgument
    }

    /// Says where it happened.
    pub(crate) fn within(self, place: std::fmt::Arguments<'_>) -> Self {
        Failure { text: format!("{place}: {}", self.text), ..self }
    }

    pub(crate) fn truncated(text: impl Into<String>) -> Self {
        Failure { code: xcclResult_t::xcclTruncated, text: text.into() }
    }
}

impl From<xccl::Error> for Failure {
    fn from(err: xccl::Error) -> Self {
        Failure { code: code_of(&err), text: err.to_string() }
    }
}

pub(crate) type Outcome<T = ()> = Result<T, Failure>;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// The text of the last call of this thread that failed: the call, the value that was wrong and what to do. An empty string
/// when none has failed. It belongs to the library and lives until the next failing call of this thread. Does not block.
#[unsafe(no_mangle)]
pub extern "C" fn xcclGetLastError() -> *const c_char {
    // At a thread's end its texts are gone.
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs the body of the entry point `call`: no panic leaves it, a failure's text is kept.
pub(crate) fn guard(call: &'static str, body: impl FnOnce() -> Outcome) -> xcclResult_t {
    // What a panic leaves in a handle is still sound: later calls take its lock all the same and check what they find.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return xcclResult_t::xcclSuccess,
        Ok(Err(failure)) => failure,
        Err(payload) => {
            let text = format!("a bug in XCCL, please report it: {}", panic_text(payload.as_ref()));
            // A payload may panic once more when it is dropped.
            std::mem::forget(payload);
            Failure { code: xcclResult_t::xcclInternalError, text }
        }
    };
    let text = format!("{call}: {}", failure.text).replace('\0', "\\0");
    let text = CString::new(text).unwrap_or_default();
    let _ = LAST_ERROR.try_with(|last| last.replace(text));
    failure.code
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no text)")
}

/// Where a result goes: C's memory, perhaps never written before.
#[derive(Clone, Copy)]
pub(crate) struct Out<T>(NonNull<T>);

impl<T: Copy> Out<T> {
    /// # Safety
    /// `at` is null, or may be written until the entry point returns.
    pub(crate) unsafe fn new(at: *mut T, name: &str) -> Outcome<Self> {
        check_pointer(at, name).map(Out)
    }

    pub(crate) fn set(self, value: T) {
        // SAFETY: not null and aligned as checked by `new`, writable as its caller has promised.
        unsafe { self.0.write(value) }
    }
}

fn check_pointer<T>(at: *mut T, name: &str) -> Outcome<NonNull<T>> {
    let at = NonNull::new(at).ok_or_else(|| Failure::argument(format!("{name} is a null pointer")))?;
    if !at.is_aligned() {
        return Err(Failure::argument(format!("{name} is {at:p}: expected a multiple of {}", align_of::<T>())));
    }
    Ok(at)
}

fn check_len<T>(len: usize, name: &str) -> Outcome {
    match len.checked_mul(size_of::<T>()).is_some_and(|bytes| bytes <= isize::MAX as usize) {
        true => Ok(()),
        false => Err(Failure::argument(format!("{name} cannot have {len} elements of {} bytes", size_of::<T>()))),
    }
}

/// A text of C's.
///
/// # Safety
/// It must be null, or end with a zero and stay as it is as long as the result lives.
pub(crate) unsafe fn text<'a>(at: *const c_char, name: &str) -> Outcome<&'a CStr> {
    check_pointer(at.cast_mut(), name)?;
    // SAFETY: it is not null, and the rest is the caller's promise.
    Ok(unsafe { CStr::from_ptr(at) })
}

/// C's array. May be null when it has no elements.
///
/// # Safety
/// `at` is null, or `len` elements are readable there, and not changed, while the slice is used.
pub(crate) unsafe fn slice<'a, T>(at: *const T, len: usize, name: &str) -> Outcome<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    let at = check_pointer(at.cast_mut(), name)?;
    check_len::<T>(len, name)?;
    // SAFETY: checked to be neither null nor misaligned nor longer than memory; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(at.as_ptr(), len) })
}

/// C's array, to be written. May be null when it has no elements.
///
/// # Safety
/// `at` is null, or `len` elements are writable there, and not used otherwise, while the slice is used.
pub(crate) unsafe fn slice_mut<'a, T>(at: *mut T, len: usize, name: &str) -> Outcome<&'a mut [T]> {
    if len == 0 {
        return Ok(&mut []);
    }
    let at = check_pointer(at, name)?;
    check_len::<T>(len, name)?;
    // SAFETY: as in `slice`; what C has never written is bytes like any other to Rust, which has not allocated it.
    Ok(unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), len) })
}

/// A struct of C's whose first field is its size, which tells the version of the header that its program was compiled with:
/// fields may be added at the end. What the program does not know of is taken from `initial`.
///
/// # Safety
/// `T` is `repr(C)`, begins with a `usize`, and any bits are a value of it. `at` is null, or as many bytes as the first field
/// says are readable there.
pub(crate) unsafe fn sized<T: Copy>(at: *const T, initial: T, name: &str) -> Outcome<T> {
    // SAFETY: the caller's promise.
    let size = unsafe { size_of_sized(at, name) }?;
    let mut value = initial;
    // SAFETY: both are as long: checked by `size_of_sized`, and promised by the caller.
    unsafe { std::ptr::copy_nonoverlapping(at.cast::<u8>(), (&raw mut value).cast::<u8>(), size) };
    Ok(value)
}

/// # Safety
/// As for [`sized`].
unsafe fn size_of_sized<T>(at: *const T, name: &str) -> Outcome<usize> {
    let at = check_pointer(at.cast_mut(), name)?;
    // SAFETY: not null, aligned; the first field is a `usize`, by the caller's promise.
    let size = unsafe { at.cast::<usize>().read() };
    let (least, most) = (size_of::<usize>(), size_of::<T>());
    if (least..=most).contains(&size) {
        return Ok(size);
    }
    Err(Failure::argument(format!(
        "{name}->size is {size}: expected {least} to {most} bytes, as the initializer of xccl.h sets it (a larger one comes \
         from a newer header than this library)"
    )))
}

/// Where a struct with its size in front goes.
pub(crate) struct SizedOut<T> {
    at: NonNull<T>,
    size: usize,
}

impl<T: Copy> SizedOut<T> {
    /// # Safety
    /// As for [`sized`], and writable until the entry point returns.
    pub(crate) unsafe fn new(at: *mut T, name: &str) -> Outcome<Self> {
        // SAFETY: the caller's promise.
        let size = unsafe { size_of_sized(at, name) }?;
        Ok(SizedOut { at: check_pointer(at, name)?, size })
    }

    /// Writes as much as C's program knows of, but not the size.
    pub(crate) fn set(self, value: T) {
        let (from, to) = ((&raw const value).cast::<u8>(), self.at.as_ptr().cast::<u8>());
        let skip = size_of::<usize>();
        // SAFETY: `size` is at most that of `T`, and writable as the caller of `new` has promised.
        unsafe { std::ptr::copy_nonoverlapping(from.add(skip), to.add(skip), self.size - skip) }
    }
}

/// An `int` that counts something.
pub(crate) fn natural(value: i32, name: &str, expected: std::fmt::Arguments<'_>) -> Outcome<usize> {
    usize::try_from(value).map_err(|_| Failure::argument(format!("{name} is {value}: expected {expected}")))
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[test]
    fn a_panic_stays_inside() {
        let code = guard("xcclTest", || panic!("boom {}", 7));
        assert_eq!(code, xcclResult_t::xcclInternalError);
        // SAFETY: the text lives until this thread's next failing call.
        let text = unsafe { CStr::from_ptr(xcclGetLastError()) }.to_str().unwrap();
        assert!(text.starts_with("xcclTest: a bug in XCCL") && text.ends_with("boom 7"), "{text}");
    }
}
