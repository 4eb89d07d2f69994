//! Passes the ranks' output on, line by line, with the rank before each line.
//!
//! One thread reads all pipes and alone writes to the launcher's streams, so lines never mix, and a reader of the launcher's
//! output that pauses (`| less`) holds up neither signals nor the watch over the ranks. The launcher's own messages take the
//! same way, through a pipe of their own; closing that pipe tells the thread to pass on what is there and to end.

use std::io::{self, PipeReader, PipeWriter, Read, Write, pipe};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::Child;
use std::thread;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Longer lines are passed on in pieces of this many bytes, each as a line of its own.
const LONGEST_LINE: usize = 16 << 10;

#[derive(Clone, Copy, PartialEq)]
enum To {
    Stdout,
    Stderr,
}

struct Stream {
    from: PipeReader,
    to: To,
    prefix: Vec<u8>,
    /// A line that has not ended yet.
    begun: Vec<u8>,
}

/// The streams, before any is read.
pub struct Output {
    /// The last one carries the launcher's messages.
    streams: Vec<Stream>,
    messages: PipeWriter,
}

/// The launcher's end of the thread.
pub struct Forwarder {
    messages: PipeWriter,
    /// Closed by the thread's end.
    done: PipeReader,
}

impl Output {
    pub fn new() -> Result<Self> {
        let (from, messages) = pipe().context("making a pipe")?;
        Ok(Output { streams: vec![stream(from, To::Stderr, String::new())?], messages })
    }

    /// Takes over the captured streams of a rank.
    pub fn add(&mut self, rank: usize, child: &mut Child) -> Result<()> {
        let stdout = child.stdout.take().map(|from| (OwnedFd::from(from), To::Stdout));
        let stderr = child.stderr.take().map(|from| (OwnedFd::from(from), To::Stderr));
        for (from, to) in stdout.into_iter().chain(stderr) {
            // Before the launcher's: what a rank said last comes before the message that it has ended.
            self.streams.insert(self.streams.len() - 1, stream(from.into(), to, format!("[{rank}] "))?);
        }
        Ok(())
    }

    pub fn forward(self) -> Result<Forwarder> {
        let (done, open) = pipe().context("making a pipe")?;
        let Output { streams, messages } = self;
        let thread = thread::Builder::new().name("output".to_owned());
        thread.spawn(move || {
            forward(streams);
            drop(open);
        })?;
        Ok(Forwarder { messages, done })
    }
}

impl Forwarder {
    /// Writes a message to stderr, after what is there already and between lines.
    pub fn say(&self, message: &str) {
        // The pipe is never full with the few that there are.
        let _ = (&self.messages).write_all(message.as_bytes());
    }

    /// Asks the thread to end; the pipe that this gives is closed once everything is passed on.
    pub fn finish(self) -> PipeReader {
        self.done
    }
}

fn stream(from: PipeReader, to: To, prefix: String) -> Result<Stream> {
    // Only the reading end becomes non-blocking: the ranks notice nothing.
    fcntl(&from, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("preparing a pipe")?;
    Ok(Stream { from, to, prefix: prefix.into_bytes(), begun: vec![] })
}

fn forward(mut streams: Vec<Stream>) {
    let launcher = streams.last().map(|s| s.from.as_raw_fd());
    loop {
        let mut fds: Vec<_> = streams.iter().map(|s| PollFd::new(s.from.as_fd(), PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        let mut ready = ready.into_iter();
        pass_on(&mut streams, |_| ready.next() == Some(true));
        if streams.last().map(|s| s.from.as_raw_fd()) != launcher {
            break;
        }
    }
    // The ranks have ended. Whoever may still hold their pipes open is not waited for.
    while pass_on(&mut streams, |_| true) {}
    streams.iter_mut().for_each(|s| drop(s.end()));
}

/// Reads once from each stream that `is_ready`; drops those that have ended. Says whether anything was read.
fn pass_on(streams: &mut Vec<Stream>, mut is_ready: impl FnMut(&Stream) -> bool) -> bool {
    let mut any = false;
    let mut closed = None;
    streams.retain_mut(|s| {
        if !is_ready(s) {
            return true;
        }
        match s.pass_on() {
            Ok(Progress::Some) => any = true,
            Ok(Progress::None) => {}
            Ok(Progress::End) => return false,
            Err(_) => closed = Some(s.to),
        }
        true
    });
    if let Some(to) = closed {
        // Nobody reads this any more (`| head`). The ranks learn it as they would without a launcher: by SIGPIPE.
        streams.retain(|s| s.to != to || s.prefix.is_empty());
    }
    any
}

enum Progress {
    Some,
    None,
    End,
}

impl Stream {
    /// An error means that the launcher's own stream is closed.
    fn pass_on(&mut self) -> io::Result<Progress> {
        let mut bytes = [0; 64 << 10];
        match self.from.read(&mut bytes) {
            Ok(0) => {
                // This stream is over, whether or not somebody reads its last line.
                let _ = self.end();
                Ok(Progress::End)
            }
            Ok(n) => self.take(&bytes[..n]).map(|()| Progress::Some),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(Progress::None),
            Err(_) => Ok(Progress::End),
        }
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut lines = vec![];
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            let (text, ended) = part.strip_suffix(b"\n").map_or((part, false), |text| (text, true));
            let mut text = text;
            while self.begun.len() + text.len() > LONGEST_LINE {
                let (piece, rest) = text.split_at(LONGEST_LINE - self.begun.len());
                self.begun.extend_from_slice(piece);
                self.complete(&mut lines);
                text = rest;
            }
            self.begun.extend_from_slice(text);
            if ended {
                self.complete(&mut lines);
            }
        }
        self.write(&lines)
    }

    fn complete(&mut self, lines: &mut Vec<u8>) {
        lines.extend_from_slice(&self.prefix);
        lines.append(&mut self.begun);
        lines.push(b'\n');
    }

    /// Passes on a last line that has no end.
    fn end(&mut self) -> io::Result<()> {
        let mut lines = vec![];
        if !self.begun.is_empty() {
            self.complete(&mut lines);
        }
        self.write(&lines)
    }

    fn write(&self, lines: &[u8]) -> io::Result<()> {
        match self.to {
            To::Stdout => write_fully(io::stdout().as_fd(), lines),
            To::Stderr => write_fully(io::stderr().as_fd(), lines),
        }
    }
}

/// Also where the launcher was given a non-blocking stream, as some parents do.
fn write_fully(to: BorrowedFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match nix::unistd::write(to, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                // An error of poll shows in the next write.
                let _ = poll(&mut [PollFd::new(to, PollFlags::POLLOUT)], PollTimeout::NONE);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
