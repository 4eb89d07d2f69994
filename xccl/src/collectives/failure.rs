//! Why collectives of a communicator cannot go on: a line in the outbox of the rank that has found it, so that all learn of it.

use super::slots::Slots;
use super::types::Call;
use crate::comm::inner::CommInner;
use crate::error::Error;
use crate::memory::mapping::Mapping;
use crate::sync::Operation;

const MISMATCH: u64 = 1;
const GIVEN_UP: u64 = 2;
const COUNTS: u64 = 3;

/// What a failure line says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Failure {
    /// Two ranks make different calls, each with its words.
    Mismatch { number: u64, calls: [(usize, [u64; 2]); 2] },
    /// A rank sends a block of another size than its receiver expects: each with its number of bytes.
    Counts { number: u64, sends: (usize, u64), expects: (usize, u64) },
    /// A rank has stopped in the middle of a collective.
    GivenUp { number: u64, rank: usize, during: Operation },
}

/// Why a collective cannot go on here.
pub(super) enum Halt {
    /// For a reason that others have to be told.
    Failure(Failure),
    /// For one that they see themselves.
    Error(Error),
}

impl From<Failure> for Halt {
    fn from(failure: Failure) -> Self {
        Halt::Failure(failure)
    }
}

impl Failure {
    fn words(self) -> [u64; 8] {
        match self {
            Failure::Mismatch { number, calls: [(a, [a0, a1]), (b, [b0, b1])] } => {
                [MISMATCH, number, a as u64, a0, a1, b as u64, b0, b1]
            }
            Failure::Counts { number, sends: (a, sent), expects: (b, expected) } => {
                [COUNTS, number, a as u64, sent, 0, b as u64, expected, 0]
            }
            Failure::GivenUp { number, rank, during } => [GIVEN_UP, number, rank as u64, during as u64, 0, 0, 0, 0],
        }
    }

    /// As the line of rank `by` says. Ranks that there are not make it say nothing but that it takes part no more.
    fn of(words: [u64; 8], by: usize, ranks: usize) -> Self {
        let [kind, number, a, a0, a1, b, b0, b1] = words;
        let (a, b) = (a as usize, b as usize);
        if a >= ranks || b >= ranks {
            return Failure::GivenUp { number, rank: by, during: Operation::Computing };
        }
        match kind {
            MISMATCH => Failure::Mismatch { number, calls: [(a, [a0, a1]), (b, [b0, b1])] },
            COUNTS => Failure::Counts { number, sends: (a, a0), expects: (b, b0) },
            _ => {
                let during = Operation::from_word(a0 as u32).unwrap_or(Operation::Computing);
                Failure::GivenUp { number, rank: a, during }
            }
        }
    }

    /// What the line of a rank of this node says, if it takes part no more.
    pub(super) fn told_by(comm: &CommInner, rank: usize) -> Option<Self> {
        let peer = comm.fabric.peer(rank);
        peer.near
            .as_ref()
            .and_then(|_| comm.layout.collectives.failure(&peer.outbox))
            .map(|words| Failure::of(words, rank, comm.world_size))
    }

    /// Tells the other ranks of this node.
    pub(super) fn publish(self, comm: &CommInner) {
        comm.layout.collectives.fail(&comm.fabric.outbox, self.words());
        comm.ring_all();
    }

    pub(super) fn error(self) -> Error {
        match self {
            Failure::Mismatch { number, calls: [(rank, theirs), (other, others)] } => Error::CallMismatch {
                epoch: number,
                rank,
                theirs: Call::describe(theirs),
                other,
                others: Call::describe(others),
            },
            Failure::Counts { number, sends: (rank, sent), expects: (other, expected) } => Error::CallMismatch {
                epoch: number,
                rank,
                theirs: format!("all_to_all_v(sending {sent} bytes to rank {other})"),
                other,
                others: format!("all_to_all_v(expecting {expected} bytes from rank {rank})"),
            },
            Failure::GivenUp { number, rank, during } => Error::GivenUp { rank, during, epoch: number },
        }
    }
}

/// The first call in which two ranks differ, of those up to `number` that both logs still have.
pub(super) fn difference(slots: &Slots, own: (usize, &Mapping), other: (usize, &Mapping), number: u64) -> Failure {
    for number in Slots::oldest(number)..=number {
        if let (Some(theirs), Some(ours)) = (slots.logged(other.1, number), slots.logged(own.1, number))
            && theirs != ours
        {
            return Failure::Mismatch { number, calls: [(other.0, theirs), (own.0, ours)] };
        }
    }
    let ours = slots.logged(own.1, number).unwrap_or_default();
    Failure::Mismatch { number, calls: [(other.0, [0; 2]), (own.0, ours)] }
}

/// What any rank says of why it takes part no more.
pub(crate) fn told_by_anyone(comm: &CommInner) -> Option<Error> {
    (0..comm.world_size).find_map(|rank| Failure::told_by(comm, rank)).map(Failure::error)
}
