//! Asking a port whether anybody listens, without waiting.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getsockopt, socket, sockopt};

/// A TCP connection that is being tried.
pub(super) struct Probe(OwnedFd);

impl Probe {
    /// Begins to connect.
    pub(super) fn begin(to: SocketAddr) -> io::Result<Probe> {
        let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(family, SockType::Stream, flags, None)?;
        match connect(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
            Ok(()) | Err(nix::Error::EINPROGRESS) => Ok(Probe(socket)),
            Err(err) => Err(err.into()),
        }
    }

    /// What has come of it, once that is known: somebody has answered, or why nobody does.
    pub(super) fn end(&self) -> Option<io::Result<()>> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(0) | Err(nix::Error::EINTR) => None,
            Ok(_) => Some(match getsockopt(&self.0, sockopt::SocketError) {
                Ok(0) => Ok(()),
                Ok(code) => Err(io::Error::from_raw_os_error(code)),
                Err(err) => Err(err.into()),
            }),
            Err(err) => Some(Err(err.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    use super::*;

    fn outcome(to: SocketAddr) -> io::Result<()> {
        let probe = Probe::begin(to)?;
        let start = Instant::now();
        loop {
            if let Some(end) = probe.end() {
                return end;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "nothing is known of {to}");
        }
    }

    #[test]
    fn a_port_where_somebody_listens_answers_and_one_where_nobody_does_refuses() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(host).unwrap();
            let address = listener.local_addr().unwrap();
            outcome(address).unwrap();
            drop(listener);
            assert_eq!(outcome(address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        }
    }
}
