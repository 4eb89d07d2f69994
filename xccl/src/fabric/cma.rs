//! Reading a sender's private memory with `process_vm_readv` (cross-memory attach): one copy, by the receiver.

use std::io::{self, IoSliceMut};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

/// Copies `to.len()` bytes from `address` in process `pid`.
///
/// The kernel checks the address in that process: a wrong one is an error (`EFAULT`), never a fault here.
pub(crate) fn read(pid: u32, address: u64, mut to: &mut [u8]) -> io::Result<()> {
    let mut address = address as usize;
    while !to.is_empty() {
        let remote = [RemoteIoVec { base: address, len: to.len() }];
        let copied = process_vm_readv(Pid::from_raw(pid as i32), &mut [IoSliceMut::new(to)], &remote)?;
        if copied == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        to = &mut to[copied..];
        address += copied;
    }
    Ok(())
}
