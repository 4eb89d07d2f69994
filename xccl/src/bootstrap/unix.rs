//! Connections on one machine: Unix sockets that keep the borders of messages, and carry descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    connect, getsockopt, listen, recvmsg, sendmsg, socket, sockopt,
};

use super::link::{BACKLOG, Inbox, Received, Sent};
use crate::error::{Error, Result};
use crate::memory::fd::own;

/// A connected socket. No call blocks.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

/// The process at the other end, as the kernel tells it.
pub(super) struct Peer {
    pub uid: u32,
    /// `None` where the process lies outside this pid namespace.
    pub pid: Option<u32>,
}

impl Link {
    /// Connects to the socket of that abstract name; `None` where nobody listens, or too many wait already.
    pub(super) fn connect(name: &str) -> Result<Option<Link>> {
        let (fd, address) = new_socket(name)?;
        loop {
            match connect(fd.as_raw_fd(), &address) {
                Ok(()) => return Ok(Some(Link(fd))),
                Err(Errno::ECONNREFUSED | Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(Error::os("connect", e)),
            }
        }
    }

    pub(super) fn peer(&self) -> Result<Peer> {
        let cred =
            getsockopt(&self.0, sockopt::PeerCredentials).map_err(|e| Error::os("getsockopt(SO_PEERCRED)", e))?;
        Ok(Peer { uid: cred.uid(), pid: u32::try_from(cred.pid()).ok().filter(|&pid| pid > 0) })
    }

    pub(super) fn try_send(&self, bytes: &[u8], fds: &[BorrowedFd]) -> Result<Sent> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &rights[..] };
        loop {
            let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
            match sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None) {
                Ok(_) => return Ok(Sent::Done),
                // ETOOMANYREFS: the descriptors that this user has on their way reach the limit; receivers take them off.
                Err(Errno::EAGAIN | Errno::ETOOMANYREFS | Errno::ENOBUFS) => return Ok(Sent::Full),
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(Sent::Closed),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(Error::os("sendmsg", e)),
            }
        }
    }

    pub(super) fn try_receive(&self, inbox: &mut Inbox) -> Result<Received> {
        let mut was_reset = false;
        inbox.control.fill(0);
        loop {
            let mut slices = [IoSliceMut::new(&mut inbox.bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
            let message = match recvmsg::<()>(self.0.as_raw_fd(), &mut slices, Some(&mut inbox.control), flags) {
                Ok(message) => message,
                Err(Errno::EAGAIN) => return Ok(Received::Nothing),
                Err(Errno::EINTR) => continue,
                // The other end closed without reading all we sent. The kernel says so once, and after that hands out
                // what the other end had sent: its verdict, most likely.
                Err(Errno::ECONNRESET) if !was_reset => {
                    was_reset = true;
                    continue;
                }
                Err(Errno::ECONNRESET) => return Ok(Received::Closed),
                Err(e) => return Err(Error::os("recvmsg", e)),
            };
            let (len, flags) = (message.bytes, message.flags);
            let Ok(control) = message.cmsgs() else {
                inbox.close_leftovers();
                return Ok(Received::DescriptorsLost);
            };
            let mut fds = Vec::new();
            for item in control {
                if let ControlMessageOwned::ScmRights(raw) = item {
                    fds.extend(raw.into_iter().map(own));
                }
            }
            return Ok(match len {
                // No message of ours is empty.
                0 => Received::Closed,
                _ if flags.contains(MsgFlags::MSG_TRUNC) => Received::Foreign,
                len => Received::Message(len, fds),
            });
        }
    }
}

/// Two ends of a connection.
#[cfg(any(test, fuzzing))]
pub(super) fn pair() -> Result<(Link, Link)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let ends = nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
    ends.map(|(one, other)| (Link(one), Link(other))).map_err(|e| Error::os("socketpair", e))
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The socket on which rank 0 waits for the others.
pub(super) struct Listener(OwnedFd);

impl Listener {
    /// Takes the name; `None` where another process has it.
    pub(super) fn bind(name: &str) -> Result<Option<Listener>> {
        let (fd, address) = new_socket(name)?;
        match bind(fd.as_raw_fd(), &address) {
            Ok(()) => {}
            Err(Errno::EADDRINUSE) => return Ok(None),
            Err(e) => return Err(Error::os("bind", e)),
        }
        let backlog = Backlog::new(BACKLOG).map_err(|e| Error::os("listen", e))?;
        listen(&fd, backlog).map_err(|e| Error::os("listen", e))?;
        Ok(Some(Listener(fd)))
    }

    /// The next connection; `None` where nobody waits.
    pub(super) fn accept(&self) -> Result<Option<Link>> {
        loop {
            match accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
                Ok(raw) => return Ok(Some(Link(own(raw)))),
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR | Errno::ECONNABORTED) => {}
                Err(e) => return Err(Error::os("accept4", e)),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Inbox {
    /// Closes what the kernel installed of a message whose descriptors it could not all install.
    ///
    /// nix hands out no descriptors of such a message, and they would stay open for ever. The header is read by its
    /// position: a length that counts itself, level and type (two `int`), and then the descriptors.
    fn close_leftovers(&self) {
        const LEVEL: usize = size_of::<usize>();
        const START: usize = LEVEL + 2 * size_of::<i32>();
        let int = |at: usize| self.control.get(at..at + 4).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
        let len = self.control.get(..LEVEL).and_then(|b| b.try_into().ok()).map_or(0, usize::from_ne_bytes);
        if int(LEVEL) == Some(libc::SOL_SOCKET) && int(LEVEL + 4) == Some(libc::SCM_RIGHTS) {
            for at in (START..len.min(self.control.len())).step_by(size_of::<RawFd>()) {
                drop(int(at).map(own));
            }
        }
    }
}

fn new_socket(name: &str) -> Result<(OwnedFd, UnixAddr)> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(|e| Error::os("socket", e))?;
    let address = UnixAddr::new_abstract(name.as_bytes()).map_err(|e| Error::os("socket address", e))?;
    Ok((fd, address))
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::super::message::{MAX_DESCRIPTORS, MAX_MESSAGE};
    use super::*;

    pub fn memfd(content: &str) -> OwnedFd {
        let fd = memfd_create(c"bootstrap-test", MFdFlags::MFD_CLOEXEC).unwrap();
        std::fs::File::from(fd.try_clone().unwrap()).write_all(content.as_bytes()).unwrap();
        fd
    }

    /// Reads without moving the position, which all descriptors of one open file share.
    pub fn content(fd: OwnedFd) -> String {
        let file = std::fs::File::from(fd);
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    fn pair() -> (Link, Link) {
        super::pair().unwrap()
    }

    #[test]
    fn a_message_arrives_whole_with_its_descriptors() {
        let ((a, b), mut inbox) = (pair(), Inbox::new());
        assert!(matches!(b.try_receive(&mut inbox).unwrap(), Received::Nothing));
        let file = memfd("hello");
        assert_eq!(a.try_send(b"bytes", &[file.as_fd()]).unwrap(), Sent::Done);
        let Received::Message(len, mut fds) = b.try_receive(&mut inbox).unwrap() else { panic!("no message") };
        assert_eq!(inbox.message(len), b"bytes");
        assert_eq!((content(fds.remove(0)).as_str(), fds.len()), ("hello", 0));
    }

    #[test]
    fn what_is_too_long_or_carries_too_many_descriptors_is_told_and_closed() {
        let ((a, b), mut inbox) = (pair(), Inbox::new());
        a.try_send(&vec![1; MAX_MESSAGE + 1], &[]).unwrap();
        assert!(matches!(b.try_receive(&mut inbox).unwrap(), Received::Foreign));

        let (end, other_end) = pair();
        a.try_send(b"x", &[end.0.as_fd(); MAX_DESCRIPTORS + 5]).unwrap();
        assert!(matches!(b.try_receive(&mut inbox).unwrap(), Received::DescriptorsLost));
        // Had the received copies of `end` stayed open, its other end would not see it closed.
        drop(end);
        assert!(matches!(other_end.try_receive(&mut inbox).unwrap(), Received::Closed));
    }

    #[test]
    fn the_last_words_of_a_closed_end_are_heard() {
        let ((a, b), mut inbox) = (pair(), Inbox::new());
        a.try_send(b"never read", &[]).unwrap();
        b.try_send(b"verdict", &[]).unwrap();
        drop(b);
        assert!(matches!(a.try_receive(&mut inbox).unwrap(), Received::Message(7, _)));
        assert!(matches!(a.try_receive(&mut inbox).unwrap(), Received::Closed));
        assert_eq!(a.try_send(b"late", &[]).unwrap(), Sent::Closed);
    }
}
