//! Numbers made of any bytes: those that are near to a limit come often.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use crate::memory::mapping::Mapping;

/// Bytes that are read one after the other, and zeros once they are used up.
pub(crate) struct Garbage<'a>(&'a [u8]);

impl<'a> Garbage<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Garbage(bytes)
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    /// A number below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (usize::from(self.byte()) | if limit > 256 { usize::from(self.byte()) << 8 } else { 0 }) % limit
    }

    /// Whether, in one case of `n`.
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    pub(crate) fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub(crate) fn word(&mut self) -> u64 {
        match self.byte() % 8 {
            0 | 1 => u64::from(self.byte() % 8),
            2 => u64::from(self.byte()),
            3 => u64::MAX - u64::from(self.byte() % 4),
            4 => (1 << (self.byte() % 64)) - u64::from(self.byte() % 2),
            5 => u64::from(self.byte() % 8) | u64::from(self.byte() % 8) << 32,
            6 => u64::from(self.byte()) << (self.byte() % 57),
            _ => {
                let mut word = [0; 8];
                let bytes = self.bytes(8);
                word[..bytes.len()].copy_from_slice(bytes);
                u64::from_le_bytes(word)
            }
        }
    }

    /// Writes up to `most` words anywhere in a range of memory.
    pub(crate) fn scatter(&mut self, memory: &Mapping, range: Range<usize>, most: usize) {
        for _ in 0..self.below(most) {
            let at = (range.start.next_multiple_of(8) + self.below((range.len() / 8).max(1)) * 8).min(memory.len() - 8);
            memory.word64(at).store(self.word(), Relaxed);
        }
    }
}
