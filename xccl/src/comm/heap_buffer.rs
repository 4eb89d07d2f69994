//! A block of the symmetric heap's part that its owner alone writes.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use super::inner::{CommInner, lock};
use crate::error::Result;

/// Bytes on this rank's symmetric heap, given back when dropped. Keeps the communicator's memory mapped.
///
/// ```
/// # use xccl::{Communicator, Config, UniqueId};
/// # fn main() -> xccl::Result<()> {
/// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
/// let mut block = comm.heap_alloc(1 << 20)?;
/// block.fill(7); // sent from here, a message is copied once, by its receiver
/// comm.send(0, 1, &block)?;
/// # Ok(())
/// # }
/// ```
pub struct HeapBuffer {
    comm: Arc<CommInner>,
    offset: usize,
    bytes: usize,
}

impl HeapBuffer {
    pub(super) fn new(comm: Arc<CommInner>, bytes: usize) -> Result<Self> {
        comm.check_process()?;
        let offset = lock(&comm.heap).allocate(bytes)?;
        Ok(HeapBuffer { comm, offset, bytes })
    }

    fn start(&self) -> *mut u8 {
        self.comm.fabric.heap.at_mut(self.offset, self.bytes)
    }
}

impl Deref for HeapBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the block lies inside the mapping, which `comm` keeps alive, and belongs to this value alone until it is
        // dropped; peers only read it, to receive a message sent from it: what they may write lies beyond the heap's border.
        unsafe { std::slice::from_raw_parts(self.start(), self.bytes) }
    }
}

impl DerefMut for HeapBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; `&mut self` makes this the only reference in this process.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.bytes) }
    }
}

impl Drop for HeapBuffer {
    fn drop(&mut self) {
        if self.comm.is_forked() {
            return;
        }
        lock(&self.comm.heap).release(self.offset, self.bytes);
    }
}
