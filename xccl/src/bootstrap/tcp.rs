//! Connections between hosts: TCP, encrypted with keys that only holders of the communicator's secret can agree on.
//!
//! The handshake is Noise's `NNpsk0`: both ends send a fresh key, mixed with the secret from the first byte on. Either end
//! finds out whether the other knows the secret, which itself never travels; who records the traffic cannot read it, not
//! even with the secret; and what is replayed, cut or changed does not decrypt.
//!
//! ```text
//! from a rank   MARK (4 bytes), token (16), Noise's first message (48)
//! from rank 0   0, Noise's second message (48); or one byte: why not
//! afterwards    frames: length of the rest (2 bytes), encrypted: 1 if the message ends here or 0 (1 byte), bytes
//! ```
//!
//! The token tells which communicator is meant, since an address may serve one after the other. Who connects is given no
//! memory beyond what it has sent, and no time beyond what rank 0 gives to strangers ([`Gathering`](super::gathering)).

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};
use sha2::{Digest, Sha256};
use snow::{Builder, HandshakeState, TransportState};

use super::UniqueId;
use super::link::{BACKLOG, Inbox, Limit, Received, Sent, wait_until};
use super::message::MAX_MESSAGE;
use crate::error::{Error, Result};

const NOISE: &str = "Noise_NNpsk0_25519_ChaChaPoly_SHA256";
/// Starts a connection. The digit changes with the handshake and the frames.
const MARK: [u8; 4] = *b"xcn1";
const TOKEN: usize = 16;
/// A key and an authentication tag: each of Noise's messages here.
const NOISE_MESSAGE: usize = 48;
const GREETING: usize = MARK.len() + TOKEN + NOISE_MESSAGE;

/// Rank 0's first byte.
const WELCOME: u8 = 0;
const OTHER_JOB: u8 = 1;
const WRONG_SECRET: u8 = 2;

const LENGTH: usize = 2;
const TAG: usize = 16;
/// Plain bytes of one frame, the byte that says whether it is the last one included.
const FRAME: usize = 32 * 1024;
/// Read at once.
const READ: usize = 16 * 1024;
/// Buffers that have grown beyond this are given back once they are empty.
const KEPT: usize = 4 * 1024;

/// An idle connection is probed, so that a host that has vanished without a word is noticed after half a minute.
const IDLE_SECONDS: u32 = 10;
const PROBE_SECONDS: u32 = 5;
const PROBES: u32 = 4;
const UNACKNOWLEDGED_MILLIS: u32 = 30_000;

/// What both ends must know.
#[derive(Clone)]
pub(super) struct Keys {
    token: [u8; TOKEN],
    secret: [u8; 32],
}

impl Keys {
    pub(super) fn of(id: &UniqueId) -> Self {
        let mut hash = Sha256::new();
        // The secret itself is what ranks of one machine tell each other.
        hash.update("xccl secret between hosts");
        hash.update(id.secret());
        Keys { token: id.token(), secret: hash.finalize().into() }
    }

    fn handshake(&self, initiator: bool) -> Result<HandshakeState> {
        let prologue = [&MARK[..], &self.token].concat();
        let built = NOISE.parse().and_then(|noise| {
            let builder = Builder::new(noise).psk(0, &self.secret)?.prologue(&prologue)?;
            if initiator { builder.build_initiator() } else { builder.build_responder() }
        });
        built.map_err(|e| failed("preparing to encrypt", e))
    }
}

fn failed(during: &'static str, source: snow::Error) -> Error {
    Error::Bootstrap { during, source: std::io::Error::other(source.to_string()) }
}

enum State {
    /// At rank 0: the greeting has not come.
    Ungreeted(Keys),
    Open(Box<TransportState>),
    /// Turned away, or what came did not decrypt.
    Ended,
}

/// A connection whose frames are encrypted. No call blocks.
pub(super) struct Link {
    stream: TcpStream,
    state: State,
    /// Received, and not decrypted yet.
    received: Vec<u8>,
    /// Decrypted parts of a message that has not ended.
    message: Vec<u8>,
    /// Encrypted, and not sent yet from `sent` on.
    to_send: Vec<u8>,
    sent: usize,
}

/// What came of an attempt to connect.
pub(super) enum Attempt {
    Connected(Link),
    /// Rank 0 says that this rank's secret is not its own.
    WrongSecret,
    /// It may work later. Whether time was over before the other end had its say.
    Failed(String, bool),
}

impl Link {
    /// Connects to rank 0 and agrees on keys with it.
    pub(super) fn connect(address: SocketAddr, keys: &Keys, limit: &Limit) -> Result<Attempt> {
        let failed = |why: &dyn std::fmt::Display| Ok(Attempt::Failed(format!("{address}: {why}"), limit.has_passed()));
        let left = limit.left().max(Duration::from_millis(1));
        let stream = match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => stream,
            Err(error) => return failed(&error),
        };
        // Where nobody listens, a connection from a port to itself can come about.
        if stream.local_addr().ok() == stream.peer_addr().ok() {
            return failed(&"nobody listens there");
        }
        let mut link = Link::new(stream, State::Ended)?;
        let mut handshake = keys.handshake(true)?;
        let mut noise = [0; NOISE_MESSAGE];
        let len = handshake.write_message(&[], &mut noise).map_err(|e| self::failed("greeting rank 0", e))?;
        link.to_send = [&MARK[..], &keys.token, &noise[..len]].concat();
        if link.flush()? != Sent::Done {
            return failed(&"the connection takes no data");
        }
        let mut reply = [0; 1 + NOISE_MESSAGE];
        let come = match link.read_reply(&mut reply, limit) {
            Ok(come) => come,
            Err(error) => return failed(&error),
        };
        let why = match (come, reply[0]) {
            (0, _) => "who listens there has not answered",
            (_, OTHER_JOB) => "who listens there waits for another job, or another communicator of this one",
            (_, WRONG_SECRET) => return Ok(Attempt::WrongSecret),
            (49, WELCOME) => match handshake.read_message(&reply[1..], &mut []) {
                Ok(_) => {
                    link.state = State::Open(Box::new(
                        handshake.into_transport_mode().map_err(|e| self::failed("greeting rank 0", e))?,
                    ));
                    return Ok(Attempt::Connected(link));
                }
                Err(_) => "who listens there does not know the job's secret",
            },
            _ => "who listens there is no rank 0 of this version",
        };
        failed(&why)
    }

    /// Reads a whole reply, or one byte that refuses; gives the number of bytes that came before the end of connection or time.
    fn read_reply(&mut self, reply: &mut [u8], limit: &Limit) -> std::io::Result<usize> {
        let mut come = 0;
        while come < reply.len() && (come == 0 || reply[0] == WELCOME) {
            match self.stream.read(&mut reply[come..]) {
                Ok(0) => break,
                Ok(n) => come += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if limit.has_passed() {
                        break;
                    }
                    let fd = PollFd::new(self.stream.as_fd(), PollFlags::POLLIN);
                    wait_until(&mut [fd], limit).map_err(std::io::Error::other)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(come)
    }

    fn new(stream: TcpStream, state: State) -> Result<Link> {
        let set = |outcome: nix::Result<()>| outcome.map_err(|e| Error::os("setsockopt", e));
        stream.set_nonblocking(true).map_err(|e| Error::os("fcntl(O_NONBLOCK)", e))?;
        set(setsockopt(&stream, sockopt::TcpNoDelay, &true))?;
        set(setsockopt(&stream, sockopt::KeepAlive, &true))?;
        set(setsockopt(&stream, sockopt::TcpKeepIdle, &IDLE_SECONDS))?;
        set(setsockopt(&stream, sockopt::TcpKeepInterval, &PROBE_SECONDS))?;
        set(setsockopt(&stream, sockopt::TcpKeepCount, &PROBES))?;
        set(setsockopt(&stream, sockopt::TcpUserTimeout, &UNACKNOWLEDGED_MILLIS))?;
        Ok(Link { stream, state, received: vec![], message: vec![], to_send: vec![], sent: 0 })
    }

    pub(super) fn origin(&self) -> String {
        self.stream.peer_addr().map_or_else(|_| "(gone)".to_string(), |address| address.ip().to_canonical().to_string())
    }

    pub(super) fn local_address(&self) -> Option<SocketAddr> {
        let mut address = self.stream.local_addr().ok()?;
        address.set_ip(address.ip().to_canonical());
        Some(address)
    }

    /// Whether the other end has been found to know the secret.
    pub(super) fn has_keys(&self) -> bool {
        matches!(self.state, State::Open(_))
    }

    pub(super) fn has_unread(&self) -> bool {
        !self.received.is_empty()
    }

    /// Takes a message for sending, unless an earlier one is still on its way.
    pub(super) fn try_send(&mut self, bytes: &[u8]) -> Result<Sent> {
        match self.flush()? {
            Sent::Done => {}
            other => return Ok(other),
        }
        if !self.encrypt(bytes)? {
            return Ok(Sent::Closed);
        }
        Ok(match self.flush()? {
            Sent::Closed => Sent::Closed,
            // The rest follows.
            _ => Sent::Done,
        })
    }

    /// Adds a message to what is to be sent; not where there are no keys.
    fn encrypt(&mut self, bytes: &[u8]) -> Result<bool> {
        let State::Open(keys) = &mut self.state else { return Ok(false) };
        let mut plain = Vec::with_capacity(bytes.len().min(FRAME) + 1);
        let mut chunks = bytes.chunks(FRAME - 1).peekable();
        while let Some(chunk) = chunks.next() {
            plain.clear();
            plain.push(u8::from(chunks.peek().is_none()));
            plain.extend_from_slice(chunk);
            let (start, len) = (self.to_send.len(), plain.len() + TAG);
            self.to_send.extend_from_slice(&u16::try_from(len).unwrap_or(u16::MAX).to_le_bytes());
            self.to_send.resize(start + LENGTH + len, 0);
            let encrypted = keys.write_message(&plain, &mut self.to_send[start + LENGTH..]);
            encrypted.map_err(|e| failed("encrypting a message", e))?;
        }
        Ok(true)
    }

    /// Sends what was taken and has not been sent.
    pub(super) fn flush(&mut self) -> Result<Sent> {
        while self.sent < self.to_send.len() {
            match self.stream.write(&self.to_send[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => return Ok(Sent::Full),
                    // Whatever the network reports, this connection is over.
                    _ => return Ok(Sent::Closed),
                },
            }
        }
        self.sent = 0;
        self.to_send.clear();
        self.to_send.shrink_to(KEPT);
        Ok(Sent::Done)
    }

    pub(super) fn try_receive(&mut self, inbox: &mut Inbox) -> Result<Received> {
        loop {
            if let Some(received) = self.next(inbox)? {
                return Ok(received);
            }
            let mut bytes = [0; READ];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(Received::Closed),
                Ok(n) => self.received.extend_from_slice(&bytes[..n]),
                Err(error) => match error.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock => return Ok(Received::Nothing),
                    // As for sending: a stranger's connection must not be what ends a job.
                    _ => return Ok(Received::Closed),
                },
            }
        }
    }

    /// What the bytes received so far amount to, if they are enough for anything.
    fn next(&mut self, inbox: &mut Inbox) -> Result<Option<Received>> {
        loop {
            match &mut self.state {
                State::Ended => return Ok(Some(Received::Foreign)),
                State::Ungreeted(keys) => {
                    let keys = keys.clone();
                    if let Some(turned_away) = self.greet(&keys)? {
                        return Ok(Some(turned_away));
                    }
                    if matches!(self.state, State::Ungreeted(_)) {
                        return Ok(None);
                    }
                }
                State::Open(keys) => {
                    let Some(encrypted) = first_frame(&self.received) else { return Ok(None) };
                    let taken = LENGTH + encrypted.len();
                    let mut plain = vec![0; encrypted.len()];
                    let last = match keys.read_message(encrypted, &mut plain) {
                        Ok(len) if len > 1 && self.message.len() + len - 1 <= MAX_MESSAGE => {
                            self.message.extend_from_slice(&plain[1..len]);
                            plain[0] == 1
                        }
                        _ => {
                            self.state = State::Ended;
                            continue;
                        }
                    };
                    self.received.drain(..taken);
                    self.received.shrink_to(KEPT);
                    if last {
                        let len = self.message.len();
                        inbox.bytes[..len].copy_from_slice(&self.message);
                        self.message.clear();
                        self.message.shrink_to(KEPT);
                        return Ok(Some(Received::Message(len, vec![])));
                    }
                }
            }
        }
    }

    /// Rank 0's half of the handshake, once the greeting has come.
    fn greet(&mut self, keys: &Keys) -> Result<Option<Received>> {
        let differs = self.received.iter().zip(&MARK).any(|(theirs, ours)| theirs != ours);
        if differs {
            self.state = State::Ended;
            return Ok(Some(Received::Foreign));
        }
        let Some(greeting) = self.received.get(..GREETING) else { return Ok(None) };
        let (token, noise) = greeting[MARK.len()..].split_at(TOKEN);
        if token != keys.token {
            return self.turn_away(OTHER_JOB, "it belongs to another job, or to another communicator of this one");
        }
        let mut handshake = keys.handshake(false)?;
        if handshake.read_message(noise, &mut []).is_err() {
            return self.turn_away(WRONG_SECRET, "its secret is another one");
        }
        let mut reply = [WELCOME; 1 + NOISE_MESSAGE];
        handshake.write_message(&[], &mut reply[1..]).map_err(|e| failed("answering a greeting", e))?;
        self.received.drain(..GREETING);
        self.to_send.extend_from_slice(&reply);
        let keys = handshake.into_transport_mode().map_err(|e| failed("answering a greeting", e))?;
        self.state = State::Open(Box::new(keys));
        // So few bytes find room; and if the other end is gone, reading says so.
        self.flush()?;
        Ok(None)
    }

    fn turn_away(&mut self, code: u8, why: &'static str) -> Result<Option<Received>> {
        // All that was asked is read, so that closing does not overtake the answer.
        self.received.clear();
        self.to_send.push(code);
        self.flush()?;
        self.state = State::Ended;
        Ok(Some(Received::TurnedAway(why)))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The first frame without its length, if it is there as a whole.
fn first_frame(received: &[u8]) -> Option<&[u8]> {
    let (length, rest) = received.split_first_chunk::<LENGTH>()?;
    rest.get(..usize::from(u16::from_le_bytes(*length)))
}

/// Whether this befell a connection before it was accepted.
fn is_of_a_connection(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::ECONNRESET
                | Errno::ECONNABORTED
                | Errno::EPROTO
                | Errno::ENOPROTOOPT
                | Errno::EOPNOTSUPP
                | Errno::ETIMEDOUT
                | Errno::EHOSTUNREACH
                | Errno::EHOSTDOWN
                | Errno::ENETUNREACH
                | Errno::ENETDOWN
                | Errno::ENETRESET
        )
    )
}

/// The socket on which rank 0 waits for the ranks of other hosts.
pub(super) struct Listener(TcpListener);

impl Listener {
    /// Takes the address. On all of them (`[::]`), IPv4's are included.
    pub(super) fn bind(address: SocketAddr) -> std::io::Result<Listener> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        // The standard library lets fewer wait than there may be ranks.
        listen(&listener, Backlog::new(BACKLOG)?)?;
        Ok(Listener(listener))
    }

    pub(super) fn address(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// The next connection; `None` where nobody waits.
    pub(super) fn accept(&self, keys: &Keys) -> Result<Option<Link>> {
        loop {
            match self.0.accept() {
                Ok((stream, _)) => {
                    // One that cannot be prepared has ended already.
                    if let Ok(link) = Link::new(stream, State::Ungreeted(keys.clone())) {
                        return Ok(Some(link));
                    }
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Ok(None),
                    ErrorKind::Interrupted => {}
                    _ if is_of_a_connection(&error) => {}
                    _ => return Err(Error::os("accept4", error)),
                },
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;

    /// A rank's end and rank 0's, with keys agreed on.
    fn pair() -> (Link, Link) {
        let keys = Keys { token: [1; TOKEN], secret: [2; 32] };
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.address().unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        let limit = &Limit::from(until);
        std::thread::scope(|s| {
            let rank = s.spawn(|| Link::connect(address, &keys, limit).unwrap());
            wait_until(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], limit).unwrap();
            let mut root = listener.accept(&keys).unwrap().unwrap();
            while !root.has_keys() {
                wait_until(&mut [PollFd::new(root.as_fd(), PollFlags::POLLIN)], limit).unwrap();
                assert!(matches!(root.try_receive(&mut Inbox::new()).unwrap(), Received::Nothing));
            }
            let Attempt::Connected(rank) = rank.join().unwrap() else { panic!("not connected") };
            (rank, root)
        })
    }

    /// Each message as it would travel.
    fn frames_of(link: &mut Link, messages: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let encrypt = |message: &Vec<u8>| {
            assert!(link.encrypt(message).unwrap());
            std::mem::take(&mut link.to_send)
        };
        messages.iter().map(encrypt).collect()
    }

    /// What the other end makes of bytes that come in pieces: the messages, and whether it has given up.
    fn read(link: &mut Link, bytes: &[u8], piece: usize) -> (Vec<Vec<u8>>, bool) {
        let (mut inbox, mut messages) = (Inbox::new(), vec![]);
        for bytes in bytes.chunks(piece) {
            link.received.extend_from_slice(bytes);
            loop {
                match link.try_receive(&mut inbox).unwrap() {
                    Received::Message(len, fds) if fds.is_empty() => messages.push(inbox.message(len).to_vec()),
                    Received::Nothing => break,
                    Received::Foreign => return (messages, true),
                    other => panic!("{other:?}"),
                }
            }
            // No more is kept than a frame that has not come in whole, and the parts of one message.
            assert!(link.received.capacity() <= 2 * (usize::from(u16::MAX) + READ + piece));
            assert!(link.message.capacity() <= 2 * MAX_MESSAGE);
        }
        (messages, false)
    }

    fn messages() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let len = prop_oneof![1usize..100, 1usize..5000, FRAME - 3..FRAME + 3, MAX_MESSAGE - 2..MAX_MESSAGE + 1];
        prop::collection::vec(
            (len, any::<u8>()).prop_map(|(len, first)| (0..len).map(|i| i as u8 ^ first).collect()),
            1..5,
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn messages_survive_being_cut_into_pieces(sent in messages(), piece in 1usize..70_000) {
            let (mut rank, mut root) = pair();
            let bytes = frames_of(&mut rank, &sent).concat();
            prop_assert_eq!(read(&mut root, &bytes, piece), (sent, false));
        }

        /// Never another message than those sent, in their order, and the end at the latest where something was changed.
        #[test]
        fn what_is_changed_cut_replayed_or_made_up_is_never_a_message(
            sent in messages(), kind in 0usize..5, at: prop::sample::Index, value in 1u8..,
            garbage in prop::collection::vec(any::<u8>(), 1..70_000), piece in 1usize..70_000,
        ) {
            let (mut rank, mut root) = pair();
            let frames = frames_of(&mut rank, &sent);
            let changed = at.index(frames.len());
            let mut bytes = frames.concat();
            let before: usize = frames[..changed].iter().map(Vec::len).sum();
            let start = before + at.index(frames[changed].len());
            match kind {
                0 => bytes[start] ^= value,
                1 => _ = bytes.drain(start..start + 1),
                // A message once more.
                2 => _ = bytes.splice(before..before, frames[changed].iter().copied()),
                // Two that have changed places.
                3 => bytes.rotate_left(frames[0].len()),
                _ => _ = bytes.splice(before.., garbage),
            }
            let (heard, ended) = read(&mut root, &bytes, piece);
            let whole = match kind { 2 => changed + 1, 3 if sent.len() == 1 => 1, 3 => 0, _ => changed };
            prop_assert_eq!(&heard, &sent[..whole]);
            // What claims to be longer than what has come is waited for instead, until the deadline of whoever waits.
            prop_assert!(ended || kind != 2);
        }
    }

    #[test]
    fn a_message_that_does_not_end_is_no_message() {
        let (mut rank, mut root) = pair();
        let State::Open(keys) = &mut rank.state else { panic!("no keys") };
        let mut bytes = vec![];
        for _ in 0..=MAX_MESSAGE / (FRAME - 1) + 1 {
            let (mut plain, mut encrypted) = (vec![7; FRAME], vec![0; FRAME + TAG]);
            plain[0] = 0;
            keys.write_message(&plain, &mut encrypted).unwrap();
            bytes.extend(((FRAME + TAG) as u16).to_le_bytes());
            bytes.extend(encrypted);
        }
        assert_eq!(read(&mut root, &bytes, 1000), (vec![], true));
    }

    #[test]
    fn the_secret_does_not_travel_in_clear_and_no_two_greetings_are_alike() {
        let keys = Keys { token: [1; TOKEN], secret: [2; 32] };
        let greeting = || {
            let mut noise = [0; NOISE_MESSAGE];
            assert_eq!(keys.handshake(true).unwrap().write_message(&[], &mut noise).unwrap(), NOISE_MESSAGE);
            noise
        };
        let (one, other) = (greeting(), greeting());
        assert_ne!(one, other);
        assert!(!one.windows(8).any(|bytes| bytes == [2; 8]));
    }
}
