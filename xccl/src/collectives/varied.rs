//! The exchange of parts of different sizes.
//!
//! In its first step each rank publishes how long its part for each other one is, and how long its longest. So every receiver
//! checks what it is going to get, and all know how many steps there are. In each further step there is a piece of every part
//! that is long enough.

use std::ops::Range;

use super::failure::{Failure, Halt};
use super::group::View;
use super::pattern::Sources;
use super::slots::LARGE;
use crate::error::Error;
use crate::memory::layout::LINE;
use crate::memory::lent::LentPair;
use crate::memory::row::Row;

/// For each rank, in bytes, what it gets of the input, and where in the output what it has goes.
#[derive(Default)]
pub(super) struct Parts {
    pub(super) sends: Vec<Range<usize>>,
    pub(super) recvs: Vec<Range<usize>>,
}

pub(super) struct Varied {
    pub(super) parts: Parts,
    /// Bytes of the longest part that is known of.
    longest: u64,
    number: u64,
}

impl Varied {
    pub(super) fn new(parts: Parts, number: u64) -> Self {
        let longest = parts.sends.iter().map(|part| part.len() as u64).max().unwrap_or(0);
        Varied { parts, longest, number }
    }

    /// Known once the first step is over.
    pub(super) fn steps(&self, at: u64, members: usize) -> u64 {
        if at == 0 { 1 } else { 1 + self.longest.div_ceil(self.piece(members) as u64) }
    }

    /// Bytes of each part that go in one step.
    fn piece(&self, members: usize) -> usize {
        let most = LARGE / members / LINE * LINE;
        (self.longest.min(most as u64) as usize).next_multiple_of(LINE).max(LINE)
    }

    pub(super) fn payload(&self, at: u64, members: usize) -> usize {
        if at == 0 { 8 * (members + 1) } else { self.piece(members) * members }
    }

    /// The piece of a part that goes in step `at`.
    fn range(&self, part: &Range<usize>, at: u64, members: usize) -> (usize, usize) {
        let piece = self.piece(members);
        let start = ((at as usize - 1) * piece).min(part.len());
        (part.start + start, piece.min(part.len() - start))
    }

    pub(super) fn sources(&self, members: usize) -> Sources {
        if members == 1 { Sources::Nobody } else { Sources::All }
    }

    pub(super) fn fill(&self, view: View<'_>, buffers: &LentPair, at: u64, step: u64) {
        let (group, members) = (view.group, view.group.len());
        let slot = (step, self.payload(at, members));
        let publish = |at: usize, from: Row<'_, u8>| {
            view.slots().fill(view.own(), slot, at, from.len()).copy_from(from);
        };
        if at == 0 {
            publish(0, Row::from(&self.longest.to_ne_bytes()[..]));
            for member in 0..members {
                let len = self.parts.sends[group.rank(member)].len() as u64;
                publish(8 * (member + 1), Row::from(&len.to_ne_bytes()[..]));
            }
            return;
        }
        let own = group.rank(group.me);
        let (from, len) = self.range(&self.parts.sends[own], at, members);
        let (to, _) = self.range(&self.parts.recvs[own], at, members);
        buffers.output(to, len).copy_from(buffers.input(from, len));
        for member in (0..).map_while(|k| group.other(k)) {
            let (from, len) = self.range(&self.parts.sends[group.rank(member)], at, members);
            publish(member * self.piece(members), buffers.input(from, len));
        }
    }

    pub(super) fn take(
        &mut self,
        view: View<'_>,
        buffers: &LentPair,
        member: usize,
        at: u64,
        step: u64,
    ) -> Result<(), Halt> {
        let (members, me) = (view.group.len(), view.group.me);
        let (rank, slot) = (view.group.rank(member), (step, self.payload(at, members)));
        let read = |at, len| view.slots().read(view.outbox(member), slot, at, len);
        let expected = &self.parts.recvs[rank];
        if at == 0 {
            let number = |at| {
                let mut bytes = [0; 8];
                read(at, 8).copy_to(&mut bytes);
                u64::from_ne_bytes(bytes)
            };
            let (longest, sent) = (number(0), number(8 * (me + 1)));
            // Were more steps believed than its parts need, they might never end. What it says of the others' parts, those check.
            let of_others = (0..members).filter(|&other| other != member).map(|other| number(8 * (other + 1))).max();
            let own = number(8 * (member + 1));
            if longest != own.max(of_others.unwrap_or(0)) || own > isize::MAX as u64 {
                let (what, limit) = ("the longest part of an exchange", own);
                return Err(Halt::Error(Error::Corrupt { rank, what, value: longest, limit }));
            }
            if sent != expected.len() as u64 {
                let expects = (view.comm.rank, expected.len() as u64);
                return Err(Failure::Counts { number: self.number, sends: (rank, sent), expects }.into());
            }
            self.longest = self.longest.max(longest);
            return Ok(());
        }
        let (to, len) = self.range(expected, at, members);
        buffers.output(to, len).copy_from(read(me * self.piece(members), len));
        Ok(())
    }
}
