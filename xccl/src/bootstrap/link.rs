//! One connection between a rank and rank 0, over a Unix socket or over TCP.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::message::{MAX_DESCRIPTORS, MAX_MESSAGE};
use super::{tcp, unix};
use crate::error::{Error, Result};
use crate::fabric::progress::move_unattended_on;

/// How soon to try again where the kernel has nothing that could be polled for.
const RETRY: Duration = Duration::from_millis(1);
/// How often a set-up that waits looks out for what else may end it.
const LOOKOUT: Duration = Duration::from_millis(10);
/// How often it moves on what no thread does.
const BESIDE: Duration = Duration::from_millis(1);
/// How many may wait to be accepted; the kernel lowers it to `net.core.somaxconn`.
pub(super) const BACKLOG: i32 = 4096;

/// Says whether a set-up is to be ended before its deadline, and why.
pub(crate) type Lookout = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// Until when a set-up waits, and what else ends it.
#[derive(Clone)]
pub(crate) struct Limit {
    pub(crate) until: Instant,
    pub(crate) lookout: Option<Lookout>,
}

impl From<Instant> for Limit {
    fn from(until: Instant) -> Self {
        Limit { until, lookout: None }
    }
}

impl Limit {
    pub(crate) fn has_passed(&self) -> bool {
        Instant::now() >= self.until
    }

    /// As this one, but at another time.
    pub(super) fn at(&self, until: Instant) -> Limit {
        Limit { until, lookout: self.lookout.clone() }
    }

    pub(super) fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    /// Whether there is a reason to stop.
    pub(crate) fn look_out(&self) -> Result<()> {
        self.lookout.as_ref().map_or(Ok(()), |lookout| lookout())
    }

    /// Sleeps for `pause`, or what is left.
    pub(super) fn sleep(&self, pause: Duration) -> Result<()> {
        self.look_out()?;
        let until = Instant::now() + pause.min(self.left());
        while move_unattended_on() && Instant::now() + BESIDE < until {
            std::thread::sleep(BESIDE);
        }
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        Ok(())
    }
}

/// What became of an attempt to send.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    Done,
    /// The other end takes no more for now.
    Full,
    Closed,
}

/// What an attempt to receive found.
#[derive(Debug)]
pub(super) enum Received {
    /// A message of that many bytes, which now begin the inbox, and its descriptors.
    Message(usize, Vec<OwnedFd>),
    Nothing,
    Closed,
    /// Something too long to be one of ours, or not encrypted with the connection's keys.
    Foreign,
    /// This process has no room for the message's descriptors, or there were too many.
    DescriptorsLost,
    /// The other end was turned away, for that reason, before it could say anything.
    TurnedAway(&'static str),
}

/// Where messages are received: large enough for any, and allocated once.
pub(super) struct Inbox {
    pub(super) bytes: Box<[u8]>,
    pub(super) control: Vec<u8>,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Inbox { bytes: vec![0; MAX_MESSAGE].into_boxed_slice(), control: cmsg_space!([RawFd; MAX_DESCRIPTORS]) }
    }

    /// The first `len` bytes of the message received last.
    pub(super) fn message(&self, len: usize) -> &[u8] {
        &self.bytes[..len]
    }
}

/// A connection. No call blocks unless its name says so.
pub(super) enum Link {
    Unix(unix::Link),
    Tcp(Box<tcp::Link>),
}

impl Link {
    /// The process at the other end, where the kernel knows it: of this machine, that is.
    pub(super) fn peer(&self) -> Result<Option<unix::Peer>> {
        match self {
            Link::Unix(link) => link.peer().map(Some),
            Link::Tcp(_) => Ok(None),
        }
    }

    /// From where the other end connects, for people to read.
    pub(super) fn origin(&self) -> String {
        match self {
            Link::Unix(_) => "this machine".to_string(),
            Link::Tcp(link) => link.origin(),
        }
    }

    /// This end's address.
    pub(super) fn local_address(&self) -> Option<SocketAddr> {
        match self {
            Link::Unix(_) => None,
            Link::Tcp(link) => link.local_address(),
        }
    }

    /// Whether the other end has been found to know the secret, of which a Unix socket knows nothing.
    pub(super) fn has_keys(&self) -> bool {
        match self {
            Link::Unix(_) => false,
            Link::Tcp(link) => link.has_keys(),
        }
    }

    /// Whether bytes have been received that were not asked for yet.
    pub(super) fn has_unread(&self) -> bool {
        match self {
            Link::Unix(_) => false,
            Link::Tcp(link) => link.has_unread(),
        }
    }

    pub(super) fn carries_descriptors(&self) -> bool {
        matches!(self, Link::Unix(_))
    }

    /// Sends a message, or gives it to be sent with the next ones. `fds` must be empty where no descriptors can be carried.
    pub(super) fn try_send(&mut self, bytes: &[u8], fds: &[BorrowedFd]) -> Result<Sent> {
        match self {
            Link::Unix(link) => link.try_send(bytes, fds),
            Link::Tcp(link) => link.try_send(bytes),
        }
    }

    /// Sends what [`try_send`](Self::try_send) was given and has not sent.
    fn flush(&mut self) -> Result<Sent> {
        match self {
            Link::Unix(_) => Ok(Sent::Done),
            Link::Tcp(link) => link.flush(),
        }
    }

    /// Sends, waiting for room up to the limit. [`Sent::Full`] says that there was none.
    pub(super) fn blocking_send(&mut self, bytes: &[u8], fds: &[BorrowedFd], limit: &Limit) -> Result<Sent> {
        let mut taken = false;
        loop {
            let sent = if taken { self.flush()? } else { self.try_send(bytes, fds)? };
            let sent = match sent {
                Sent::Done if !taken => {
                    taken = true;
                    self.flush()?
                }
                sent => sent,
            };
            match sent {
                Sent::Full if !limit.has_passed() => wait_for_room(&mut [self.poll_fd(PollFlags::POLLOUT)], limit)?,
                other => return Ok(other),
            }
        }
    }

    pub(super) fn try_receive(&mut self, inbox: &mut Inbox) -> Result<Received> {
        match self {
            Link::Unix(link) => link.try_receive(inbox),
            Link::Tcp(link) => link.try_receive(inbox),
        }
    }

    /// Receives, waiting up to the limit. [`Received::Nothing`] says that nothing came.
    pub(super) fn blocking_receive(&mut self, inbox: &mut Inbox, limit: &Limit) -> Result<Received> {
        loop {
            match self.try_receive(inbox)? {
                Received::Nothing if !limit.has_passed() => {
                    wait_until(&mut [self.poll_fd(PollFlags::POLLIN)], limit)?;
                }
                other => return Ok(other),
            }
        }
    }

    pub(super) fn poll_fd(&self, events: PollFlags) -> PollFd<'_> {
        PollFd::new(self.as_fd(), events)
    }

    /// To be polled for the end of the connection alone.
    pub(super) fn poll_for_hang_up(&self) -> PollFd<'_> {
        self.poll_fd(match self {
            Link::Unix(_) => PollFlags::empty(),
            // Of TCP, the kernel reports this end only if asked.
            Link::Tcp(_) => PollFlags::from_bits_retain(libc::POLLRDHUP),
        })
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Link::Unix(link) => link.as_fd(),
            Link::Tcp(link) => link.as_fd(),
        }
    }
}

/// Whether a wait has found that the other end is gone.
pub(super) fn has_hung_up(fd: &PollFd) -> bool {
    // nix knows no POLLRDHUP, and says nothing of flags that have it.
    fd.revents().is_none_or(|r| r.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}

/// The socket on which rank 0 waits for the others.
pub(super) enum Listener {
    Unix(unix::Listener),
    Tcp(tcp::Listener, tcp::Keys),
}

impl Listener {
    /// The next connection; `None` where nobody waits.
    pub(super) fn accept(&self) -> Result<Option<Link>> {
        match self {
            Listener::Unix(listener) => Ok(listener.accept()?.map(Link::Unix)),
            Listener::Tcp(listener, keys) => Ok(listener.accept(keys)?.map(|link| Link::Tcp(Box::new(link)))),
        }
    }

    pub(super) fn poll_fd(&self) -> PollFd<'_> {
        let fd = match self {
            Listener::Unix(listener) => listener.as_fd(),
            Listener::Tcp(listener, _) => listener.as_fd(),
        };
        PollFd::new(fd, PollFlags::POLLIN)
    }
}

/// Waits until one of the sockets is ready or the limit has come. May return early: the caller looks, and waits again.
pub(super) fn wait_until(fds: &mut [PollFd], limit: &Limit) -> Result<()> {
    limit.look_out()?;
    let longest = match (move_unattended_on(), &limit.lookout) {
        (true, _) => BESIDE,
        (false, Some(_)) => LOOKOUT,
        (false, None) => Duration::MAX,
    };
    let left = limit.left().min(longest);
    // Rounded up: a wait that ends early would spin through its last millisecond. Longer waits come in slices.
    let millis = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
    match poll(fds, PollTimeout::from(millis)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(e) => Err(Error::os("poll", e)),
    }
}

/// Waits until one of the sockets may take a message that it has just refused.
///
/// A socket can report room and refuse all the same (descriptors on their way are limited for all together): hence the
/// pause, without which this would spin.
pub(super) fn wait_for_room(fds: &mut [PollFd], limit: &Limit) -> Result<()> {
    wait_until(fds, limit)?;
    limit.sleep(RETRY)
}
