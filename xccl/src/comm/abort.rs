//! Aborting: one rank ends the communicator for all, and says why.
//!
//! What it says (a code and a text) lies in its outbox. It is written once, before the state word says that the rank has aborted, and
//! never again: who finds that state finds the words. Then all bells are rung: a sleeper has read its bell before it looked at the
//! states, so that the ring is not lost between that look and its sleep.

use std::sync::atomic::Ordering::{Relaxed, Release};

use super::ending::{ABORTED, RUNNING};
use super::layout::ABORT_BYTES;
use crate::comm::inner::CommInner;
use crate::error::Error;
use crate::fabric::far::OUTBOX;
use crate::fabric::plane::{MOST_BYTES, Update};
use crate::memory::mapping::Mapping;
use crate::sync::Operation;
use crate::sync::bell;

/// The code, and the text's length.
const HEAD: usize = 16;
/// Bytes of the text.
pub(crate) const MOST_TEXT: usize = ABORT_BYTES - HEAD;

const _: () = assert!(ABORT_BYTES <= MOST_BYTES);

/// What a rank says of its abort, as it lies in memory.
fn note_of(code: i32, why: &str) -> [u64; ABORT_BYTES / 8] {
    let len = (0..=MOST_TEXT.min(why.len())).rev().find(|&at| why.is_char_boundary(at)).unwrap_or(0);
    let mut words = [0; ABORT_BYTES / 8];
    (words[0], words[1]) = (code as u32 as u64, len as u64);
    bytemuck::cast_slice_mut(&mut words)[HEAD..HEAD + len].copy_from_slice(&why.as_bytes()[..len]);
    words
}

/// The error of a call that meets the abort of a rank whose outbox this is.
pub(super) fn error(outbox: &Mapping, at: usize, by: usize, during: Operation) -> Error {
    let mut words = [0u64; ABORT_BYTES / 8];
    outbox.read_into(at, &mut words);
    // Its text is only ever shown.
    let len = usize::try_from(words[1]).map_or(MOST_TEXT, |len| len.min(MOST_TEXT));
    let why = String::from_utf8_lossy(&bytemuck::cast_slice(&words)[HEAD..HEAD + len]).into_owned();
    Error::Aborted { by, during, code: words[0] as u32 as i32, why }
}

impl CommInner {
    /// Ends the communicator for all ranks, unless this one has aborted it or left already.
    pub(crate) fn abort(&self, code: i32, why: &str) {
        if self.is_forked() {
            return;
        }
        // One thread at a time: the words are there before the state says so, and are those of the first.
        let _one = super::inner::lock(&self.aborting);
        let state = self.fabric.outbox.word32(self.layout.state);
        if state.load(Relaxed) != RUNNING {
            return;
        }
        // Why this rank was told to stop comes first in what it tells.
        self.ending.cause();
        tracing::debug!(rank = self.rank, code, why, "aborts the communicator");
        let words = note_of(code, why);
        self.fabric.outbox.write(self.layout.abort, bytemuck::cast_slice(&words));
        state.store(ABORTED, Release);
        bell::publish_fence();
        self.ring_all();
        // Later calls of this rank need not wait to find out.
        self.ending.cause();
        let note = Update::Bytes { window: OUTBOX, offset: self.layout.abort, len: ABORT_BYTES, words };
        let ended = Update::Word32 { window: OUTBOX, offset: self.layout.state, value: ABORTED };
        self.fabric.far().for_each(|(rank, far)| far.plane.send(rank, [], &[note, ended]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_an_abort_is_read_back_as_far_as_there_is_room() {
        let memory = Mapping::anonymous(4096).unwrap();
        let long = "ä".repeat(100);
        for (code, why) in [(0, ""), (-7, "the scheduler said so"), (i32::MAX, long.as_str())] {
            memory.write(64, bytemuck::cast_slice(&note_of(code, why)));
            let Error::Aborted { by: 3, code: read, why: text, .. } = error(&memory, 64, 3, Operation::Recv) else {
                panic!()
            };
            assert_eq!(read, code);
            assert!(why.starts_with(&text) && text.len() >= why.len().min(MOST_TEXT - 1), "{text:?}");
        }
    }

    #[test]
    fn nonsense_in_a_ranks_memory_is_shown_as_far_as_it_is_text() {
        let memory = Mapping::anonymous(4096).unwrap();
        memory.write(0, &[255; ABORT_BYTES]);
        assert!(matches!(error(&memory, 0, 1, Operation::Recv), Error::Aborted { by: 1, code: -1, .. }));
    }
}
