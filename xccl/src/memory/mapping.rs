//! Memory that another process may be reading or writing, behind checked accesses.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64};

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::fetch;
use super::layout::LINE;
use crate::error::{Error, Result};

/// A mapped segment. Offsets are checked on every access; what lies there may change at any time.
#[derive(Debug)]
pub(crate) struct Mapping {
    raw: MmapRaw,
    writable: bool,
}

impl Mapping {
    /// Maps the first `bytes` of a segment for reading and writing.
    pub(crate) fn writable(fd: &impl AsRawFd, bytes: usize) -> Result<Self> {
        let raw = MmapOptions::new().len(bytes).map_raw(fd.as_raw_fd()).map_err(|e| Error::os("mmap", e))?;
        Ok(Mapping { raw, writable: true })
    }

    /// Maps the first `bytes` of a segment for reading; the kernel refuses writes.
    pub(crate) fn read_only(fd: &impl AsRawFd, bytes: usize) -> Result<Self> {
        let raw = MmapOptions::new().len(bytes).map_raw_read_only(fd.as_raw_fd()).map_err(|e| Error::os("mmap", e))?;
        Ok(Mapping { raw, writable: false })
    }

    /// Maps `bytes` of a segment from `offset` on, a multiple of the page, for reading.
    pub(crate) fn read_only_part(fd: &impl AsRawFd, offset: usize, bytes: usize) -> Result<Self> {
        let raw = MmapOptions::new().offset(offset as u64).len(bytes).map_raw_read_only(fd.as_raw_fd());
        Ok(Mapping { raw: raw.map_err(|e| Error::os("mmap", e))?, writable: false })
    }

    /// Memory of this process alone, zeroed.
    pub(crate) fn anonymous(bytes: usize) -> Result<Self> {
        let raw = MmapOptions::new().len(bytes.max(1)).map_anon().map_err(|e| Error::os("mmap", e))?.into();
        Ok(Mapping { raw, writable: true })
    }

    /// Asks for huge pages; a kernel that has none to offer ignores it.
    pub(crate) fn advise_huge_pages(&self) {
        if let Err(err) = self.raw.advise(Advice::HugePage) {
            tracing::debug!(%err, "huge pages are not available for this segment");
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.raw.len()
    }

    /// Whether this process may write it.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// The address of `bytes` bytes at `offset`.
    ///
    /// # Panics
    /// When they do not lie inside the mapping: offsets are the crate's own, or were checked before.
    pub(crate) fn at(&self, offset: usize, bytes: usize) -> *const u8 {
        assert!(
            offset <= self.len() && bytes <= self.len() - offset,
            "offset {offset} + {bytes} is outside the segment"
        );
        // SAFETY: the sum lies inside the mapping, as just checked.
        unsafe { self.raw.as_ptr().add(offset) }
    }

    /// The address of `bytes` writable bytes at `offset`.
    ///
    /// # Panics
    /// As [`at`](Self::at), and when the mapping is read-only.
    pub(crate) fn at_mut(&self, offset: usize, bytes: usize) -> *mut u8 {
        assert!(self.writable, "this segment belongs to another rank");
        self.at(offset, bytes).cast_mut()
    }

    /// Asks the processor for the line at `offset`, which is going to be read soon.
    ///
    /// # Panics
    /// As [`at`](Self::at).
    #[inline]
    pub(crate) fn fetch(&self, offset: usize) {
        fetch::to_read(self.at(offset, 1));
    }

    /// Asks the processor for the line at `offset` of this rank's own segment, which is going to be written soon.
    ///
    /// # Panics
    /// As [`at`](Self::at).
    #[inline]
    pub(crate) fn fetch_to_write(&self, offset: usize) {
        fetch::to_write(self.at(offset, 1));
    }

    /// The 64-bit word at `offset`. On a read-only mapping it may only be loaded.
    pub(crate) fn word64(&self, offset: usize) -> &AtomicU64 {
        let at = self.at(offset, 8);
        assert!(offset.is_multiple_of(8), "word at odd offset {offset}");
        // SAFETY: in bounds, aligned (mappings start on a page), alive as long as `self`; all access to it, by any
        // process, is atomic. Relaxed and acquire loads of 8 bytes are allowed on read-only pages.
        unsafe { AtomicU64::from_ptr(at.cast_mut().cast()) }
    }

    /// The 32-bit word at `offset`. On a read-only mapping it may only be loaded.
    pub(crate) fn word32(&self, offset: usize) -> &AtomicU32 {
        let at = self.at(offset, 4);
        assert!(offset.is_multiple_of(4), "word at odd offset {offset}");
        // SAFETY: as for `word64`.
        unsafe { AtomicU32::from_ptr(at.cast_mut().cast()) }
    }

    /// The cache line at `offset`, as words. On a read-only mapping they may only be loaded.
    #[inline]
    pub(crate) fn line(&self, offset: usize) -> &[AtomicU64; LINE / 8] {
        let at = self.at(offset, LINE);
        assert!(offset.is_multiple_of(LINE), "line at odd offset {offset}");
        // SAFETY: as for `word64`, for each of the words.
        unsafe { &*at.cast() }
    }

    /// Copies plain bytes in.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at_mut(offset, from.len());
        // SAFETY: `to` is valid for `from.len()` bytes; a peer that reads them too early gets garbage as numbers only.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// Copies plain bytes out.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        // SAFETY: `from` is valid for `to.len()` bytes; a peer that changes them meanwhile makes the copy garbage, as
        // numbers only, since callers check what they read before they use it as an index or a length.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies an array of plain values out.
    pub(crate) fn read_into<T: bytemuck::Pod>(&self, offset: usize, to: &mut [T]) {
        self.read(offset, bytemuck::cast_slice_mut(to));
    }
}
