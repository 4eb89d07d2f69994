//! Who moves the plane on, and a thread that does while the rank computes or sleeps.
//!
//! Beside what the plane itself has to do there are *chores*: things that other nodes wait for and that become possible when ranks of
//! this node have done their part, such as forming the sums that go back to another node.
//!
//! Whoever waits moves things on itself, and better: it sees what it waits for the moment that it comes. So the thread keeps away
//! while somebody does ([`Mover::attend`]), and takes over when the last one goes to sleep.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::plane::Plane;
use crate::comm::inner::lock;
use crate::error::{Error, Result};

/// How long the thread keeps away before it looks whether anybody attends.
const AWAY: Duration = Duration::from_millis(1);
/// The longest sleep where the card wakes the thread; a bound for what a provider might not tell.
const ASLEEP_MS: u8 = 20;
/// How long the thread goes on looking after something has come, between two yields of its core. What is put in a row comes
/// within this time, and a thread that sleeps in between is woken by each put, on the core of who puts.
const LINGER: Duration = Duration::from_micros(30);
/// Looks where it does not, or where something waits for room or a chore is due.
const BETWEEN_LOOKS: Duration = Duration::from_micros(50);

/// Looks at what is watched, where the card does not let the thread sleep.
const UNWATCHED: Duration = Duration::from_millis(20);

/// Something that other nodes wait for.
pub(crate) trait Chore: Send + Sync {
    /// Does what has become possible. Never blocks; several threads may try at once.
    fn attempt(&self);
}

/// The chores of a communicator.
#[derive(Default)]
pub(crate) struct Chores {
    list: Mutex<Vec<Weak<dyn Chore>>>,
    /// Those that are to be done, and may not be possible yet.
    due: AtomicUsize,
}

impl Chores {
    /// Adds a chore, which is forgotten when it is dropped.
    pub(crate) fn add(&self, chore: Weak<dyn Chore>) {
        let mut list = lock(&self.list);
        list.retain(|chore| chore.strong_count() > 0);
        list.push(chore);
    }

    /// One more thing is to be done.
    pub(crate) fn begin(&self) {
        self.due.fetch_add(1, Relaxed);
    }

    /// It was done.
    pub(crate) fn end(&self) {
        self.due.fetch_sub(1, Relaxed);
    }

    fn are_due(&self) -> bool {
        self.due.load(Relaxed) > 0
    }

    /// Attempts all, if any is due.
    pub(crate) fn attempt(&self) {
        // Whoever has the list is at it.
        if self.are_due()
            && let Ok(list) = self.list.try_lock()
        {
            list.iter().filter_map(Weak::upgrade).for_each(|chore| chore.attempt());
        }
    }
}

thread_local! {
    /// The planes of this thread's communicators that no progress thread moves on. When it waits for something else than words of
    /// theirs, such as its part in a set-up or another communicator, it moves them on all the same: other ranks may wait for what they
    /// have to send before they do theirs. Not those of other threads, which may be ranks of their own.
    static UNATTENDED: RefCell<Vec<Weak<Unattended>>> = const { RefCell::new(vec![]) };
}

struct Unattended {
    plane: Arc<Plane>,
    chores: Arc<Chores>,
    heard: Box<dyn Fn(usize) + Send + Sync>,
}

/// Moves on what no progress thread does for this thread, if there is any; says whether there is.
pub(crate) fn move_unattended_on() -> bool {
    let mut is_any = false;
    for at in 0.. {
        // The list is gone when its thread ends.
        let Ok(Some(one)) = UNATTENDED.try_with(|all| all.borrow().get(at).cloned()) else { break };
        if let Some(one) = one.upgrade() {
            one.plane.progress(&one.heard);
            one.chores.attempt();
            is_any = true;
        }
    }
    is_any
}

struct Shared {
    /// Threads of the rank that move things on themselves.
    attending: AtomicUsize,
    /// One of them has done so since the thread last looked, and not gone to sleep: it will soon again. Were the thread to listen
    /// between two calls, each arrival would wake it for nothing, and take a core from whoever the arrival is for.
    attended: AtomicBool,
    stop: AtomicBool,
    wake: EventFd,
}

/// The thread, or the lack of one.
pub(crate) struct Mover {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// What is moved on in its place.
    _unattended: Option<Arc<Unattended>>,
}

impl Mover {
    /// Starts the thread; `heard` is told each rank that has changed words here. `watched` becomes readable when there may be
    /// something to `look` at.
    pub(crate) fn start(
        plane: Arc<Plane>,
        chores: Arc<Chores>,
        heard: impl Fn(usize) + Send + 'static,
        watched: Option<OwnedFd>,
        look: impl Fn() + Send + 'static,
    ) -> Result<Self> {
        let mut mover = Mover::idle()?;
        let shared = mover.shared.clone();
        let thread = std::thread::Builder::new().name("xccl-progress".to_owned());
        let thread = thread
            .spawn(move || shared.run(&plane, &chores, heard, (watched, look)))
            .map_err(|e| Error::os("pthread_create", e))?;
        mover.thread = Some(thread);
        Ok(mover)
    }

    /// No thread: only who waits moves things on.
    pub(crate) fn none(
        plane: Arc<Plane>,
        chores: Arc<Chores>,
        heard: impl Fn(usize) + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut mover = Mover::idle()?;
        let unattended = Arc::new(Unattended { plane, chores, heard: Box::new(heard) });
        UNATTENDED.with_borrow_mut(|all| {
            all.retain(|one| one.strong_count() > 0);
            all.push(Arc::downgrade(&unattended));
        });
        mover._unattended = Some(unattended);
        Ok(mover)
    }

    fn idle() -> Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let wake = wake.map_err(|e| Error::os("eventfd", e))?;
        let [attended, stop] = [(); 2].map(|()| AtomicBool::new(false));
        let shared = Shared { attending: AtomicUsize::new(0), attended, stop, wake };
        Ok(Mover { shared: Arc::new(shared), thread: None, _unattended: None })
    }

    /// Whether there is a thread that wakes sleepers.
    pub(crate) fn is_running(&self) -> bool {
        self.thread.is_some()
    }

    /// The caller has just moved things on, and will soon again.
    pub(crate) fn keep_away(&self) {
        self.shared.attended.store(true, Relaxed);
    }

    /// The caller moves things on from now on, until it says that it does not.
    pub(crate) fn attend(&self) {
        self.shared.attending.fetch_add(1, Relaxed);
    }

    /// The caller goes to sleep, or has what it wanted.
    pub(crate) fn leave(&self, to_sleep: bool) {
        // Were it left set, the thread would sleep beside its rank.
        self.shared.attended.store(!to_sleep, Relaxed);
        let was = self.shared.attending.fetch_sub(1, Release);
        if let Some(thread) = &self.thread
            && was == 1
            && to_sleep
        {
            thread.thread().unpark();
        }
    }
}

impl Shared {
    fn run(&self, plane: &Plane, chores: &Chores, heard: impl Fn(usize), watched: (Option<OwnedFd>, impl Fn())) {
        let (watched, look) = (watched.0.as_ref().map(|fd| fd.as_fd()), watched.1);
        let mut looked = Instant::now();
        let mut last = None;
        while !self.stop.load(Acquire) {
            if self.attending.load(Acquire) > 0 || self.attended.swap(false, Relaxed) {
                std::thread::park_timeout(AWAY);
                continue;
            }
            let happened = plane.progress(&heard);
            chores.attempt();
            if happened {
                last = Some(Instant::now());
                continue;
            }
            if last.is_some_and(|last| last.elapsed() < LINGER) {
                std::thread::yield_now();
                continue;
            }
            last = None;
            // Nobody would wake the thread when a chore becomes possible.
            match plane.wake_fd().filter(|_| !chores.are_due() && plane.may_sleep()) {
                Some(fd) => {
                    let fds = [fd, self.wake.as_fd(), watched.unwrap_or(fd)];
                    let mut fds = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
                    // An error of poll would come again: it only must not become a busy loop.
                    if poll(&mut fds, ASLEEP_MS).is_err() {
                        std::thread::sleep(BETWEEN_LOOKS);
                    }
                    if watched.is_some() && fds[2].any() == Some(true) {
                        look();
                        // It stays readable while somebody else is about to read it.
                        std::thread::park_timeout(AWAY);
                    }
                }
                None => {
                    std::thread::park_timeout(BETWEEN_LOOKS);
                    if looked.elapsed() >= UNWATCHED {
                        look();
                        looked = Instant::now();
                    }
                }
            }
        }
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.shared.stop.store(true, Release);
        let _ = self.shared.wake.write(1);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It has nothing to report.
            let _ = thread.join();
        }
    }
}
