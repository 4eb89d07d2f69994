//! What may come over the connections of a set-up.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::link::Link;
use super::message::{FromRoot, ToRoot, Verdict, encode};
use super::star::Star;
use super::unix;
use crate::lies::Garbage;

const RANKS: usize = 3;

fn text(g: &mut Garbage<'_>) -> String {
    let n = g.below(20);
    String::from_utf8_lossy(g.bytes(n)).into_owned()
}

fn number(g: &mut Garbage<'_>) -> usize {
    if g.one_in(3) { g.word() as usize } else { g.below(RANKS + 1) }
}

fn verdict(g: &mut Garbage<'_>) -> Verdict {
    match g.byte() % 6 {
        0 => Verdict::PeerDied { rank: number(g) },
        1 => Verdict::Timeout { peer: Some(number(g)), waited: Duration::from_secs(g.word()), waited_for: text(g) },
        2 => Verdict::MissingRanks {
            ranks: (0..g.below(5)).map(|_| number(g)).collect(),
            world_size: number(g),
            waited: Duration::ZERO,
            turned_away: text(g),
        },
        3 => Verdict::InvalidRank { rank: number(g), world_size: number(g) },
        4 => Verdict::Mismatch { rank: number(g), what: text(g), theirs: text(g), ours: text(g) },
        _ => Verdict::Failed { why: text(g) },
    }
}

/// Sends a message, or something that is nearly one, with some descriptors.
fn send(g: &mut Garbage<'_>, to: &mut Link, message: crate::Result<Vec<u8>>) {
    let Ok(mut bytes) = message else { return };
    match g.byte() % 8 {
        0 => {
            let at = g.below(bytes.len());
            bytes[at] ^= g.byte();
        }
        1 => bytes.truncate(g.below(bytes.len())),
        2 => bytes = g.bytes(100).to_vec(),
        _ => {}
    }
    let descriptors = if g.one_in(3) { g.below(3) } else { 0 };
    let stdin = std::io::stdin();
    let fds: Vec<BorrowedFd<'_>> = (0..descriptors).map(|_| stdin.as_fd()).collect();
    let _ = to.try_send(&bytes, &fds);
}

fn use_of(star: &mut Star) {
    for _ in 0..2 {
        if let Some(lost) = star.lost() {
            assert!(lost < RANKS, "rank {lost} was lost, of {RANKS}");
        }
        if let Err(err) = star.exchange(b"own", &[], Instant::now()) {
            let blamed = match err {
                crate::Error::PeerDied { rank, .. } => Some(rank),
                crate::Error::Timeout { peer, .. } => peer,
                _ => None,
            };
            assert!(blamed.is_none_or(|rank| rank < RANKS), "{err}");
        }
    }
}

/// What rank 0 says to the others.
pub(crate) fn member(g: &mut Garbage<'_>) {
    let Ok((ours, theirs)) = unix::pair() else { return };
    let mut root = Link::Unix(theirs);
    let nodes = if g.one_in(2) { vec![0, 0, 0] } else { vec![0, 1, 0] };
    let Ok(mut star) = Star::lied_to(1, nodes, vec![Link::Unix(ours)]) else { return };
    for n in 0..1 + g.below(6) {
        let blob_bytes = g.below(30);
        let (round, rank) = (if g.one_in(4) { g.word() } else { 1 }, if g.one_in(3) { number(g) } else { n * 2 });
        let (fds, blob) = (if g.one_in(4) { number(g) } else { 0 }, g.bytes(blob_bytes));
        let message = match g.byte() % 8 {
            0 => FromRoot::Verdict(verdict(g)),
            1 => FromRoot::Lost { rank: number(g) },
            2 => FromRoot::Goodbye,
            3 => FromRoot::Welcome { pids: vec![1; g.below(5)], nodes: vec![number(g)], address: None },
            _ => FromRoot::Part { round, rank, fds, blob },
        };
        send(g, &mut root, encode(&message));
    }
    // Or this rank would wait for a verdict.
    drop(root);
    use_of(&mut star);
}

/// What the others say to rank 0.
pub(crate) fn root(g: &mut Garbage<'_>) {
    let (Ok((one, first)), Ok((other, second))) = (unix::pair(), unix::pair()) else { return };
    let nodes = if g.one_in(2) { vec![0, 0, 0] } else { vec![0, 1, 0] };
    let Ok(mut star) = Star::lied_to(0, nodes, vec![Link::Unix(one), Link::Unix(other)]) else { return };
    let mut ends = [Link::Unix(first), Link::Unix(second)];
    for _ in 0..1 + g.below(5) {
        let blob_bytes = g.below(30);
        let round = if g.one_in(4) { g.word() } else { 1 };
        let (fds, blob) = (if g.one_in(4) { number(g) } else { 0 }, g.bytes(blob_bytes));
        let to = &mut ends[g.below(2)];
        let message = match g.byte() % 4 {
            0 => ToRoot::Goodbye,
            _ => ToRoot::Part { round, fds, blob },
        };
        send(g, to, encode(&message));
    }
    use_of(&mut star);
}
