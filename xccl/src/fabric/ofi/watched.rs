//! The connections behind a wake descriptor, which libfabric does not name.

use std::fs;
use std::os::fd::{BorrowedFd, RawFd};

use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt};

/// The TCP connections that an epoll descriptor watches, itself or through others that it watches. None where the kernel does not
/// tell.
pub(super) fn connections(epoll: RawFd) -> Vec<RawFd> {
    let mut found = Vec::new();
    // Epoll descriptors cannot watch each other in circles.
    let mut to_see = vec![epoll];
    while let Some(fd) = to_see.pop() {
        let Ok(text) = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")) else { continue };
        // Only epoll descriptors have such lines: "tfd:  12 events: 19 data: …".
        let watched = text.lines().filter_map(|line| line.strip_prefix("tfd:"));
        for fd in watched.filter_map(|rest| rest.split_whitespace().next()?.parse().ok()) {
            if is_connection(fd) { found.push(fd) } else { to_see.push(fd) }
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Whether it is a TCP socket that does not listen: one that was shut down still is.
fn is_connection(fd: RawFd) -> bool {
    let Ok(own) = getsockname::<SockaddrStorage>(fd) else { return false };
    // SAFETY: it has just been seen to be open, and its owner is not called meanwhile.
    let listens = getsockopt(&unsafe { BorrowedFd::borrow_raw(fd) }, sockopt::AcceptConn);
    matches!(own.family(), Some(AddressFamily::Inet | AddressFamily::Inet6)) && listens == Ok(false)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

    use super::*;

    #[test]
    fn connections_are_found_through_nested_descriptors_and_other_sockets_are_not() {
        let [inner, outer] = [(); 2].map(|()| Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let (pair, _other) = UnixStream::pair().unwrap();
        let event = || EpollEvent::new(EpollFlags::EPOLLIN, 0);
        inner.add(&stream, event()).unwrap();
        inner.add(&pair, event()).unwrap();
        outer.add(&listener, event()).unwrap();
        outer.add(&inner.0, event()).unwrap();
        assert_eq!(connections(outer.0.as_raw_fd()), [stream.as_raw_fd()]);
        outer.add(&accepted, event()).unwrap();
        let mut both = [stream.as_raw_fd(), accepted.as_raw_fd()];
        both.sort_unstable();
        assert_eq!(connections(outer.0.as_raw_fd()), both);
        stream.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(connections(outer.0.as_raw_fd()), both);
        assert_eq!(connections(pair.as_raw_fd()), []);
    }
}
