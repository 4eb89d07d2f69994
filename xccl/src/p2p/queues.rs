//! Queues by (source, tag): whatever is outstanding, the first of a pair is found, and any one taken out, in constant time.
//!
//! A queue is a list through the entries, and there is a queue only while it has entries: tags may be used once each.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::slab::Slab;

/// One list per (source, tag).
pub(super) struct TagQueues<T> {
    entries: Slab<Entry<T>>,
    queues: HashMap<u64, Ends, BuildHasherDefault<Mix>>,
    /// Entries per source.
    counts: Vec<usize>,
    /// Entries so far.
    pushed: u64,
}

struct Entry<T> {
    value: T,
    source: usize,
    tag: u64,
    /// Counts entries: the older has the smaller one.
    number: u64,
    before: Option<usize>,
    after: Option<usize>,
}

#[derive(Clone, Copy)]
struct Ends {
    first: usize,
    last: usize,
}

fn pair(source: usize, tag: u64) -> u64 {
    (source as u64) << 40 | tag
}

impl<T> TagQueues<T> {
    pub(super) fn new(sources: usize) -> Self {
        TagQueues { entries: Slab::default(), queues: HashMap::default(), counts: vec![0; sources], pushed: 0 }
    }

    /// Entries of a source.
    pub(super) fn count(&self, source: usize) -> usize {
        self.counts[source]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The key of the first entry of a pair.
    pub(super) fn first(&self, source: usize, tag: u64) -> Option<usize> {
        if self.counts[source] == 0 {
            return None;
        }
        self.queues.get(&pair(source, tag)).map(|ends| ends.first)
    }

    pub(super) fn get(&self, key: usize) -> Option<&T> {
        self.entries.get(key).map(|e| &e.value)
    }

    /// Adds at the end of its queue; gives the entry's key.
    pub(super) fn push(&mut self, source: usize, tag: u64, value: T) -> usize {
        let before = self.queues.get(&pair(source, tag)).map(|ends| ends.last);
        let key = self.insert(source, tag, value, before, None);
        self.queues
            .entry(pair(source, tag))
            .and_modify(|ends| ends.last = key)
            .or_insert(Ends { first: key, last: key });
        key
    }

    /// Adds at the beginning of its queue; gives the entry's key.
    pub(super) fn push_first(&mut self, source: usize, tag: u64, value: T) -> usize {
        let after = self.first(source, tag);
        let key = self.insert(source, tag, value, None, after);
        self.queues
            .entry(pair(source, tag))
            .and_modify(|ends| ends.first = key)
            .or_insert(Ends { first: key, last: key });
        key
    }

    fn insert(&mut self, source: usize, tag: u64, value: T, before: Option<usize>, after: Option<usize>) -> usize {
        self.counts[source] += 1;
        self.pushed += 1;
        let key = self.entries.insert(Entry { value, source, tag, number: self.pushed, before, after });
        if let Some(before) = before.and_then(|b| self.entries.get_mut(b)) {
            before.after = Some(key);
        }
        if let Some(after) = after.and_then(|a| self.entries.get_mut(a)) {
            after.before = Some(key);
        }
        key
    }

    /// Takes an entry out of its queue.
    pub(super) fn remove(&mut self, key: usize) -> Option<T> {
        let Entry { value, source, tag, before, after, .. } = self.entries.remove(key)?;
        self.counts[source] -= 1;
        if let Some(before) = before.and_then(|b| self.entries.get_mut(b)) {
            before.after = after;
        }
        if let Some(after) = after.and_then(|a| self.entries.get_mut(a)) {
            after.before = before;
        }
        match (before, after) {
            (None, None) => drop(self.queues.remove(&pair(source, tag))),
            (None, Some(first)) => {
                self.queues.entry(pair(source, tag)).and_modify(|ends| ends.first = first);
            }
            (Some(last), None) => {
                self.queues.entry(pair(source, tag)).and_modify(|ends| ends.last = last);
            }
            (Some(_), Some(_)) => {}
        }
        Some(value)
    }

    /// Source and tag of the entry that came first of all.
    pub(super) fn oldest(&self) -> Option<(usize, u64)> {
        self.entries.iter().min_by_key(|e| e.number).map(|e| (e.source, e.tag))
    }
}

/// Spreads pairs over the table. They come from the ranks' own programs, so nobody gains by making them collide.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.write_u64(b.into()));
    }

    fn write_u64(&mut self, n: u64) {
        // The table takes its index from the low bits and its mark from the high ones: both depend on every bit of the pair.
        let mixed = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Beside a list of everything in order.
        #[test]
        fn each_pair_is_a_queue_of_its_own(ops in prop::collection::vec((0u8..4, 0usize..3, 0u64..3, any::<usize>()), 1..300)) {
            let mut queues = TagQueues::new(3);
            let mut model: VecDeque<(usize, u64, u64, usize)> = VecDeque::new();
            for (n, (op, source, tag, at)) in ops.into_iter().enumerate() {
                let n = n as u64;
                match op {
                    0 | 1 => {
                        let key = queues.push(source, tag, n);
                        model.push_back((source, tag, n, key));
                    }
                    2 => {
                        let key = queues.push_first(source, tag, n);
                        model.push_front((source, tag, n, key));
                    }
                    _ if model.is_empty() => prop_assert!(queues.is_empty()),
                    _ => {
                        let (_, _, n, key) = model.remove(at % model.len()).unwrap();
                        prop_assert_eq!(queues.remove(key), Some(n));
                    }
                }
                for source in 0..3 {
                    prop_assert_eq!(queues.count(source), model.iter().filter(|m| m.0 == source).count());
                    for tag in 0..3 {
                        let first = queues.first(source, tag).and_then(|key| queues.get(key)).copied();
                        prop_assert_eq!(first, model.iter().find(|m| (m.0, m.1) == (source, tag)).map(|m| m.2));
                    }
                }
                let oldest = model.iter().min_by_key(|m| m.2).map(|m| (m.0, m.1));
                prop_assert_eq!(queues.oldest(), oldest);
            }
        }
    }

    #[test]
    fn tags_that_are_used_once_leave_nothing_behind() {
        let mut queues = TagQueues::new(1);
        for tag in 0..10_000 {
            let key = queues.push(0, tag, ());
            queues.remove(key);
        }
        assert!(queues.queues.is_empty() && queues.entries.iter().next().is_none());
        assert!(queues.queues.capacity() < 100, "{}", queues.queues.capacity());
    }
}
