//! What a rank that lies writes into its outbox for a handle.

use std::cell::OnceCell;
use std::sync::atomic::Ordering::Relaxed;

use super::Moe;
use super::parties::Peers;
use crate::lies::Garbage;
use crate::memory::mapping::Mapping;

impl Moe {
    /// Fills this rank's outbox with lists that are nearly right, or not at all.
    pub(crate) fn lie(&self, g: &mut Garbage<'_>) {
        self.garble(self.own.memory(), g);
    }

    /// Forms the sums for a rank of another node, from lists and rows that are made up.
    pub(crate) fn answer_lies(&self, g: &mut Garbage<'_>) {
        thread_local!(static MEMORY: OnceCell<Peers> = const { OnceCell::new() });
        MEMORY.with(|memory| {
            let anonymous = || Mapping::anonymous(4 << 20).expect("memory");
            let memory = memory.get_or_init(|| Peers::new(vec![Some(anonymous()), Some(anonymous())]));
            [0, 1].iter().for_each(|&rank| self.garble(&memory[rank], g));
            if let Some((_, between)) = self.between() {
                between.borrow().rail.form_all(memory, 1 + g.below(2) as u64);
            }
        });
    }

    fn garble(&self, memory: &Mapping, g: &mut Garbage<'_>) {
        // Beyond all epochs: whoever waits for one finds it.
        let word = |g: &mut Garbage<'_>, at: usize| {
            let epoch = if g.one_in(12) { g.word() } else { 1 << 60 };
            memory.word64(at).store(epoch, Relaxed);
        };
        word(g, self.layout.dispatched);
        let next = self.state.borrow().next;
        memory.word64(self.layout.refused).store(if g.one_in(16) { next } else { 0 }, Relaxed);
        let small = |g: &mut Garbage<'_>, most: usize| match g.one_in(16) {
            true => g.word() as u32,
            false => g.below(most) as u32,
        };
        for epoch in 0..2 {
            let slot = self.layout.slot(epoch);
            word(g, slot.combined);
            memory.word64(slot.abandoned).store(if g.one_in(16) { next } else { 0 }, Relaxed);
            memory.word32(slot.tokens).store(small(g, 4), Relaxed);
            let mut at = 0;
            for start in slot.starts.clone().step_by(4) {
                memory.word32(start).store(at, Relaxed);
                at = at.wrapping_add(small(g, 3));
            }
            for entry in slot.entries.clone().step_by(8) {
                memory.word32(entry).store(small(g, 3), Relaxed);
            }
            for base in slot.bases.clone().step_by(4) {
                memory.word32(base).store(small(g, 8), Relaxed);
            }
        }
    }
}
