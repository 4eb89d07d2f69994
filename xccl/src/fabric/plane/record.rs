//! A record: what a rank tells another one with a batch of puts. At most [`WORDS`] words, in this machine's byte order.
//!
//! | word | |
//! | --- | --- |
//! | 0 | the batch's number, from 1 |
//! | 1 | puts of the batch that come beside this record; in the upper half, words of the record |
//! | 2 | batches of the target that its sender has taken: credit |
//! | 3 … | updates: a head (kind, window), then as many words as the kind has |

use super::RECORD_BYTES;

pub(super) const WORDS: usize = RECORD_BYTES / 8;
const HEADER: usize = 3;

/// A change to words of the target, made there by itself when all puts of the batch have arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Update {
    /// Stores a word, with release order.
    Word64 { window: u16, offset: usize, value: u64 },
    /// As `Word64`, 32 bits.
    Word32 { window: u16, offset: usize, value: u32 },
    /// Stores a line: its first word last, with release order.
    Line { window: u16, offset: usize, words: [u64; 8] },
    /// Copies so many bytes, which nobody looks at before an update that follows: what would be a put of its own otherwise.
    Bytes { window: u16, offset: usize, len: usize, words: [u64; MOST_BYTES / 8] },
    /// Adds to a word.
    Add { window: u16, offset: usize, value: u64 },
    /// Changes a word and answers with what was there.
    Fetch { window: u16, offset: usize, change: Change, token: u64 },
    /// The answer to a fetch.
    Answer { token: u64, value: u64 },
}

/// Bytes that a record carries beside a line.
pub(crate) const MOST_BYTES: usize = 128;

/// What a fetch does to its word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Nothing,
    Add(u64),
    Swap(u64),
    /// Stores the second if the word is equal to the first.
    CompareSwap(u64, u64),
}

const WORD64: u64 = 0;
const WORD32: u64 = 1;
const LINE: u64 = 2;
const ADD: u64 = 3;
const FETCH: u64 = 4;
const ANSWER: u64 = 5;
const BYTES: u64 = 6;

const NOTHING: u64 = 0;
const ADDS: u64 = 1;
const SWAPS: u64 = 2;
const COMPARES: u64 = 3;

fn head(kind: u64, window: u16) -> u64 {
    kind | u64::from(window) << 8
}

/// A record that is being made, or was taken.
#[derive(Clone, Copy)]
pub(super) struct Record {
    words: [u64; WORDS],
    len: usize,
}

impl Record {
    pub(super) fn new(number: u64) -> Self {
        let mut words = [0; WORDS];
        words[0] = number;
        Record { words, len: HEADER }
    }

    /// Adds an update; says whether it had room.
    pub(super) fn push(&mut self, update: &Update) -> bool {
        match *update {
            Update::Word64 { window, offset, value } => self.append(&[head(WORD64, window), offset as u64, value]),
            Update::Word32 { window, offset, value } => {
                self.append(&[head(WORD32, window), offset as u64, value.into()])
            }
            Update::Line { window, offset, words: [a, b, c, d, e, f, g, h] } => {
                self.append(&[head(LINE, window), offset as u64, a, b, c, d, e, f, g, h])
            }
            Update::Bytes { window, offset, len, words } => {
                let (head, before) = ([head(BYTES, window), offset as u64, len as u64], self.len);
                let fits = self.append(&head) && self.append(&words[..len.div_ceil(8)]);
                if !fits {
                    self.len = before;
                }
                fits
            }
            Update::Add { window, offset, value } => self.append(&[head(ADD, window), offset as u64, value]),
            Update::Fetch { window, offset, change, token } => {
                let [op, a, b] = match change {
                    Change::Nothing => [NOTHING, 0, 0],
                    Change::Add(a) => [ADDS, a, 0],
                    Change::Swap(a) => [SWAPS, a, 0],
                    Change::CompareSwap(a, b) => [COMPARES, a, b],
                };
                self.append(&[head(FETCH, window), offset as u64, token, op, a, b])
            }
            Update::Answer { token, value } => self.append(&[head(ANSWER, 0), token, value]),
        }
    }

    fn append(&mut self, words: &[u64]) -> bool {
        let Some(to) = self.words.get_mut(self.len..self.len + words.len()) else { return false };
        to.copy_from_slice(words);
        self.len += words.len();
        true
    }

    /// The record's bytes, with what only is known when it leaves.
    pub(super) fn finish(&mut self, puts: u32, taken: u64) -> &[u8] {
        self.words[1] = (self.len as u64) << 32 | u64::from(puts);
        self.words[2] = taken;
        bytemuck::cast_slice(&self.words[..self.len])
    }

    /// Takes a record out of memory that its sender may still be writing: nothing in it is right until it was checked.
    pub(super) fn from_words(words: [u64; WORDS]) -> Option<Self> {
        let len = (words[1] >> 32) as usize;
        (HEADER..=WORDS).contains(&len).then_some(Record { words, len })
    }

    pub(super) fn number(&self) -> u64 {
        self.words[0]
    }

    pub(super) fn puts(&self) -> u32 {
        self.words[1] as u32
    }

    pub(super) fn taken(&self) -> u64 {
        self.words[2]
    }

    /// The updates; the last one is `None` where the words make no sense.
    pub(super) fn updates(&self) -> impl Iterator<Item = Option<Update>> + '_ {
        let mut rest = &self.words[HEADER..self.len];
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let update = parse(&mut rest);
            if update.is_none() {
                rest = &[];
            }
            Some(update)
        })
    }
}

fn parse(rest: &mut &[u64]) -> Option<Update> {
    let mut take = || rest.split_off_first().copied();
    let head = take()?;
    let window = (head >> 8) as u16;
    let offset = take()?;
    let at = usize::try_from(offset).ok()?;
    Some(match head & 0xff {
        WORD64 => Update::Word64 { window, offset: at, value: take()? },
        WORD32 => Update::Word32 { window, offset: at, value: take()? as u32 },
        LINE => {
            let mut words = [0; 8];
            for word in &mut words {
                *word = take()?;
            }
            Update::Line { window, offset: at, words }
        }
        BYTES => {
            let len = usize::try_from(take()?).ok().filter(|&len| len <= MOST_BYTES)?;
            let mut words = [0; MOST_BYTES / 8];
            for word in &mut words[..len.div_ceil(8)] {
                *word = take()?;
            }
            Update::Bytes { window, offset: at, len, words }
        }
        ADD => Update::Add { window, offset: at, value: take()? },
        FETCH => {
            let (token, op, a, b) = (take()?, take()?, take()?, take()?);
            let change = match op {
                NOTHING => Change::Nothing,
                ADDS => Change::Add(a),
                SWAPS => Change::Swap(a),
                COMPARES => Change::CompareSwap(a, b),
                _ => return None,
            };
            Update::Fetch { window, offset: at, change, token }
        }
        ANSWER => Update::Answer { token: offset, value: take()? },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn update() -> impl Strategy<Value = Update> {
        let change = prop_oneof![
            Just(Change::Nothing),
            any::<u64>().prop_map(Change::Add),
            any::<u64>().prop_map(Change::Swap),
            any::<(u64, u64)>().prop_map(|(a, b)| Change::CompareSwap(a, b)),
        ];
        prop_oneof![
            any::<(u16, usize, u64)>().prop_map(|(window, offset, value)| Update::Word64 { window, offset, value }),
            any::<(u16, usize, u32)>().prop_map(|(window, offset, value)| Update::Word32 { window, offset, value }),
            any::<(u16, usize, [u64; 8])>().prop_map(|(window, offset, words)| Update::Line { window, offset, words }),
            any::<(u16, usize, u64)>().prop_map(|(window, offset, value)| Update::Add { window, offset, value }),
            (any::<(u16, usize)>(), prop::collection::vec(any::<u8>(), 0..=MOST_BYTES)).prop_map(
                |((window, offset), bytes)| {
                    let mut words = [0; MOST_BYTES / 8];
                    bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(&bytes);
                    Update::Bytes { window, offset, len: bytes.len(), words }
                }
            ),
            (any::<(u16, usize, u64)>(), change).prop_map(|((window, offset, token), change)| Update::Fetch {
                window,
                offset,
                change,
                token
            }),
            any::<(u64, u64)>().prop_map(|(token, value)| Update::Answer { token, value }),
        ]
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(updates in prop::collection::vec(update(), 0..12), puts: u32, taken: u64, number: u64) {
            let mut record = Record::new(number);
            let kept: Vec<_> = updates.into_iter().filter(|u| record.push(u)).collect();
            let mut words = [0; WORDS];
            let bytes = record.finish(puts, taken);
            bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
            let read = Record::from_words(words).unwrap();
            prop_assert_eq!((read.number(), read.puts(), read.taken()), (number, puts, taken));
            prop_assert_eq!(read.updates().collect::<Option<Vec<_>>>(), Some(kept));
        }

        #[test]
        fn garbage_is_no_more_than_no_update(words: [u64; WORDS], len in 0u64..40) {
            let mut words = words;
            words[1] = len << 32;
            match Record::from_words(words) {
                Some(record) => _ = record.updates().count(),
                None => prop_assert!(!(HEADER as u64..=WORDS as u64).contains(&len)),
            }
        }
    }
}
