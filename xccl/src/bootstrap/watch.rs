//! Notices that a rank of another node is gone: its connection has ended, and it had not said goodbye.
//!
//! Rank 0 has a connection to every rank and so sees all ends; it tells the other ranks, which see only rank 0's.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::link::{Inbox, Link, Received};
use super::message::{FromRoot, ToRoot, Verdict, decode};
use crate::error::{Error, Result};

/// Connections that are looked at in one go; more are found the next time.
const AT_ONCE: usize = 16;

pub(super) struct Watch {
    /// Asks about all connections with one system call. Those that have ended are taken out.
    epoll: Epoll,
    /// The ranks that were found to be gone, in this order.
    lost: Vec<usize>,
}

impl Watch {
    /// Rank 0 looks for ends of connections alone: what has come and is not read may be a rank's part of an exchange.
    pub(super) fn over_members(links: &[Option<Link>]) -> Result<Watch> {
        let watch = Watch::new()?;
        for (rank, link) in links.iter().enumerate() {
            link.as_ref().map_or(Ok(()), |link| watch.add(link, EpollFlags::EPOLLRDHUP, rank))?;
        }
        Ok(watch)
    }

    /// The other ranks are told nothing between two exchanges but what belongs here.
    pub(super) fn over_root(link: &Link) -> Result<Watch> {
        let watch = Watch::new()?;
        watch.add(link, EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, 0)?;
        Ok(watch)
    }

    fn new() -> Result<Watch> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|e| Error::os("epoll_create1", e))?;
        Ok(Watch { epoll, lost: vec![] })
    }

    fn add(&self, link: &Link, events: EpollFlags, rank: usize) -> Result<()> {
        let event = EpollEvent::new(events, rank as u64);
        self.epoll.add(link.as_fd(), event).map_err(|e| Error::os("epoll_ctl", e))
    }

    fn remove(&self, link: &Link) {
        // It is in there; and if it were not, nothing would be left to do.
        let _ = self.epoll.delete(link.as_fd());
    }

    /// The connections at which something has happened.
    fn happenings(&self, events: &mut [EpollEvent; AT_ONCE]) -> usize {
        // An interrupted call finds what there is the next time.
        self.epoll.wait(events, EpollTimeout::ZERO).unwrap_or(0)
    }

    pub(super) fn lost(&self) -> &[usize] {
        &self.lost
    }

    /// Gives the ranks that are found to be gone, each once.
    pub(super) fn look_at_members(&mut self, links: &mut [Option<Link>], inbox: &mut Inbox) -> &[usize] {
        let mut events = [EpollEvent::empty(); AT_ONCE];
        let before = self.lost.len();
        let happened = self.happenings(&mut events);
        for event in &events[..happened] {
            let rank = usize::try_from(event.data()).unwrap_or(usize::MAX);
            let Some(link) = links.get_mut(rank).and_then(Option::as_mut) else { continue };
            self.remove(link);
            if !has_said_goodbye(link, inbox) {
                self.lost.push(rank);
            }
        }
        &self.lost[before..]
    }

    /// Hears what rank 0 has to say, if anything; a verdict on an exchange that is still to come is kept for that.
    pub(super) fn look_at_root(&mut self, link: &mut Link, inbox: &mut Inbox, verdict: &mut Option<Verdict>) {
        // The end of what came with the last message of an exchange is no event any more.
        let mut events = [EpollEvent::empty(); AT_ONCE];
        if self.happenings(&mut events) == 0 && !link.has_unread() {
            return;
        }
        loop {
            match link.try_receive(inbox) {
                Ok(Received::Message(len, _)) => match decode(inbox.message(len)) {
                    Some(FromRoot::Lost { rank }) => self.lost.push(rank),
                    Some(FromRoot::Verdict(said)) => *verdict = Some(said),
                    Some(FromRoot::Goodbye) => break self.remove(link),
                    _ => break self.end(link),
                },
                Ok(Received::Nothing) => break,
                _ => break self.end(link),
            }
        }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    fn end(&mut self, link: &Link) {
        self.remove(link);
        self.lost.push(0);
    }
}

/// Reads what came before the end of the connection.
fn has_said_goodbye(link: &mut Link, inbox: &mut Inbox) -> bool {
    while let Ok(Received::Message(len, _)) = link.try_receive(inbox) {
        if matches!(decode(inbox.message(len)), Some(ToRoot::Goodbye)) {
            return true;
        }
    }
    false
}
