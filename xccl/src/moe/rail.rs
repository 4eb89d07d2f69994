//! What a rank does for the ranks of other nodes that it stands for: see [`between`](super::between).

use std::ops::Range;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};

use half::{bf16, f16};

use super::between::{ABANDONED, BY, RETURNED, Shape};
use super::config::MAX_TOPK;
use super::layout::{Entry, MoeLayout, SLOTS, slot_of};
use super::parties::{Parties, Peers};
use super::placement::placed::Placed;
use super::terms::{Terms, sum_each};
use super::{MoeConfig, Outboxes, Reduction};
use crate::comm::inner::{CommInner, Counters, lock};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::fabric::endpoint::{Access, Region, RemoteRegion};
use crate::fabric::far::Far;
use crate::fabric::plane::{Plane, Put, Update};
use crate::fabric::progress::{Chore, Chores};
use crate::kernels::Kernels;
use crate::memory::area::{self, Area};
use crate::memory::mapping::Mapping;
use crate::sync::fork::Origin;
use crate::sync::{closing, epoch};

/// Bytes of sums that leave together: they are still in a cache when they are read to be sent, and the source takes them while the
/// next ones are formed.
const PIECE: usize = 256 << 10;

/// A rank of another node that this one stands for.
pub(super) struct Duty {
    pub(super) source: usize,
    /// By slot, where its sums land.
    pub(super) results: [RemoteRegion; SLOTS],
    /// Where it has the line of words for this node.
    pub(super) line: usize,
}

/// The ranks of this node.
pub(super) struct Near {
    pub(super) ranks: Vec<usize>,
    /// As ranges of neighbours.
    pub(super) blocks: Vec<Range<usize>>,
}

/// How sums leave.
pub(super) struct Staging {
    pub(super) plane: Arc<Plane>,
    pub(super) rows_bytes: usize,
    /// The window of the words beside them.
    pub(super) result_words: u16,
}

/// The sums of one source, while they are formed; kept from exchange to exchange.
#[derive(Default)]
struct Sums {
    starts: Vec<u32>,
    entries: Vec<Entry>,
    bases: Vec<u32>,
    /// Per token: terms so far, then where they begin.
    counts: Vec<u32>,
    /// Where each token that has terms has them, and one more.
    spans: Vec<u32>,
    /// Rank, row, weight.
    terms: Vec<(u32, u32, f32)>,
    /// Per token, the last rank that was found to have it, plus one.
    last: Vec<u32>,
}

struct State {
    /// By slot: the sums that are put back, `max_tokens` rows per duty.
    areas: [Area; SLOTS],
    /// By slot, the exchange that this rank has begun, and the last whose duty was done.
    begun: [u64; SLOTS],
    done: [u64; SLOTS],
    /// By slot, what that exchange goes by.
    placed: [Arc<Placed>; SLOTS],
    sums: Sums,
}

/// One handle's duties of one rank.
pub(super) struct Rail {
    config: MoeConfig,
    layout: MoeLayout,
    parties: Arc<Parties>,
    kernels: Kernels,
    /// Every rank's outbox, or its mirror: once they are mapped.
    peers: OnceLock<Arc<Peers>>,
    duties: Vec<Duty>,
    near: Near,
    staging: Staging,
    region: Region,
    /// By slot, where its area begins in `region`.
    starts: [usize; SLOTS],
    state: Mutex<State>,
    /// Messages with sums, and their bytes.
    returned: [AtomicU64; 2],
    chores: Arc<Chores>,
    counters: Arc<Counters>,
    me: usize,
    origin: Origin,
}

impl Rail {
    pub(super) fn new(
        comm: &CommInner,
        far: &Far,
        (duties, near): (Vec<Duty>, Near),
        staging: Staging,
        ((config, layout, placed), parties): (Shape<'_>, &Arc<Parties>),
    ) -> Result<Arc<Self>> {
        let bytes = duties.len() * staging.rows_bytes;
        let memory = Arc::new(Mapping::anonymous(SLOTS * bytes)?);
        let region = staging.plane.register(&memory, 0..memory.len(), Access::Local)?;
        let (_, areas) = area::split(memory, [0..bytes, bytes..2 * bytes]);
        let placed = std::array::from_fn(|_| placed.clone());
        let state = State { areas, begun: [0; SLOTS], done: [0; SLOTS], placed, sums: Sums::default() };
        let rail = Arc::new(Rail {
            config: config.clone(),
            layout: layout.clone(),
            parties: parties.clone(),
            kernels: comm.config.kernels.resolve("Config::kernels")?,
            peers: OnceLock::new(),
            duties,
            near,
            staging,
            region,
            starts: [0, bytes],
            state: Mutex::new(state),
            returned: Default::default(),
            chores: far.chores.clone(),
            counters: comm.counters.clone(),
            me: comm.rank,
            origin: Origin::new(),
        });
        let chore = Arc::downgrade(&rail);
        far.chores.add(chore);
        Ok(rail)
    }

    /// Messages with sums that were sent back, those in pieces counted once, and their bytes.
    pub(super) fn returned(&self) -> (u64, u64) {
        let [messages, bytes] = self.returned.each_ref().map(|count| count.load(Relaxed));
        (messages, bytes)
    }

    /// Takes the ranks' outboxes.
    pub(super) fn set_peers(&self, peers: Arc<Peers>) {
        // They are mapped once.
        let _ = self.peers.set(peers);
    }

    /// This rank has dispatched `epoch`: from now on there is a duty.
    pub(super) fn begin(&self, epoch: u64, placed: &Arc<Placed>) {
        let slot = slot_of(epoch);
        let mut state = lock(&self.state);
        if !Arc::ptr_eq(&state.placed[slot], placed) {
            state.placed[slot] = placed.clone();
        }
        match self.duties.is_empty() {
            true => state.done[slot] = epoch,
            false => self.chores.begin(),
        }
        state.begun[slot] = epoch;
    }

    /// Whether the duty of `epoch` was done.
    pub(super) fn is_done(&self, epoch: u64) -> bool {
        let state = lock(&self.state);
        let slot = slot_of(epoch);
        state.done[slot] >= epoch || state.begun[slot] < epoch
    }

    /// From `epoch` on there will be no duty: tells the sources that wait for either exchange that may be in flight.
    pub(super) fn leave(&self, epoch: u64) {
        for duty in &self.duties {
            for epoch in epoch..epoch + SLOTS as u64 {
                let word = |at: usize, value: u64| {
                    let (window, offset) = (self.staging.result_words, duty.line + at + slot_of(epoch) * 8);
                    Update::Word64 { window, offset, value }
                };
                let updates = [word(BY, self.me as u64), word(ABANDONED, epoch), word(RETURNED, epoch)];
                self.staging.plane.send(duty.source, [], &updates);
            }
        }
    }

    /// Exchanges whose duty was begun and not done.
    pub(super) fn undone(&self) -> Option<u64> {
        let state = lock(&self.state);
        (0..SLOTS).filter(|&slot| state.done[slot] < state.begun[slot]).map(|slot| state.begun[slot]).min()
    }

    /// Whether the ranks of this node have combined, hence received from all sources, and which of them has given up instead.
    fn combined(&self, peers: &Peers, epoch: u64) -> Option<Option<usize>> {
        let (slot, closed) = (self.layout.slot(epoch), self.layout.closed);
        let has_combined = |rank: usize| epoch::reached(peers[rank].word64(slot.combined), epoch);
        // Who has left before it has given it up.
        let has_left = |rank: usize| closing::is_closed(peers[rank].word64(closed), epoch);
        let is_there = |&rank: &usize| has_combined(rank) || has_left(rank);
        let gave_up =
            |&&rank: &&usize| peers[rank].word64(slot.abandoned).load(Acquire) == epoch || !has_combined(rank);
        self.near.ranks.iter().all(is_there).then(|| self.near.ranks.iter().find(gave_up).copied())
    }

    /// Sends back what the sources get from this node.
    fn send_back(&self, peers: &Peers, state: &mut State, epoch: u64, gave_up: Option<usize>) {
        let slot = slot_of(epoch);
        for (index, duty) in self.duties.iter().enumerate() {
            let word = |at: usize, value: u64| {
                let (window, offset) = (self.staging.result_words, duty.line + at + slot * 8);
                Update::Word64 { window, offset, value }
            };
            let sent = match gave_up {
                Some(by) => Err(by),
                // What cannot be summed is nobody's but the source's fault, which hears of it in this way.
                None => match self.config.dtype {
                    DType::F32 => self.send_sums::<f32>(peers, state, index, epoch, word(RETURNED, epoch)),
                    DType::BF16 => self.send_sums::<bf16>(peers, state, index, epoch, word(RETURNED, epoch)),
                    DType::F16 => self.send_sums::<f16>(peers, state, index, epoch, word(RETURNED, epoch)),
                }
                .map_err(|err| {
                    tracing::error!(%err, source = duty.source, epoch, "no sums for a rank of another node");
                    self.me
                }),
            };
            if let Err(by) = sent {
                let updates = [word(BY, by as u64), word(ABANDONED, epoch), word(RETURNED, epoch)];
                self.staging.plane.send(duty.source, [], &updates);
            }
        }
    }

    /// Forms the sums of one source over the experts of this node, and sends them piece by piece, `last` with the last one.
    fn send_sums<'s, E: Element>(
        &'s self,
        peers: &'s Peers,
        state: &mut State,
        index: usize,
        epoch: u64,
        last: Update,
    ) -> Result<()> {
        let State { areas, placed, sums, .. } = state;
        let duty = &self.duties[index];
        self.take_terms(peers, duty.source, (epoch, &placed[slot_of(epoch)]), sums)?;
        let (layout, hidden) = (&self.layout, self.config.hidden);
        let outboxes = Outboxes {
            peers,
            layout,
            hidden,
            format: (self.kernels, self.config.wire),
            row_per_entry: self.config.smooth.is_some(),
        };
        let slot = layout.slot(epoch);
        let area = match self.config.reduction {
            Reduction::PerExpert => (slot.outputs.start, layout.output_rows),
            Reduction::PerRank => (slot.sums.start, layout.sum_rows),
        };
        let (staging, start) = (&mut areas[slot_of(epoch)], index * self.staging.rows_bytes);
        let mut gather = |i: usize, terms: &mut Terms<'s, E>| {
            let (first, end) = (sums.spans[i] as usize, sums.spans[i + 1] as usize);
            for &(rank, row, weight) in &sums.terms[first..end] {
                terms.push((outboxes.output(rank as usize, area, row as usize)?, weight));
            }
            Ok(())
        };
        let (count, each) = (sums.spans.len() - 1, PIECE.div_ceil(layout.stride));
        for first in (0..count).step_by(each) {
            let piece = first..(first + each).min(count);
            sum_each(piece.clone(), &mut gather, |i, sum| {
                sum.write(self.kernels, staging.slice_mut(start + i * layout.stride, hidden));
            })?;
            let (offset, end) = (piece.start * layout.stride, piece.end * layout.stride);
            let from = self.starts[slot_of(epoch)] + start;
            let range = from + offset..from + end;
            let put = Put { from: self.region, range, into: duty.results[slot_of(epoch)], offset };
            let updates = if piece.end == count { std::slice::from_ref(&last) } else { &[] };
            self.staging.plane.send(duty.source, [put], updates);
        }
        if count == 0 {
            self.staging.plane.send(duty.source, [], &[last]);
        }
        self.counters.far_sums.fetch_add(count as u64, Relaxed);
        self.returned[0].fetch_add(1, Relaxed);
        self.returned[1].fetch_add((count * layout.stride) as u64, Relaxed);
        Ok(())
    }

    /// Lists the terms of each token of a source: copied out of its mirror and the near ranks' outboxes, and checked.
    fn take_terms(&self, peers: &Peers, source: usize, (epoch, placed): (u64, &Placed), sums: &mut Sums) -> Result<()> {
        let (config, layout) = (&self.config, &self.layout);
        let (mirror, slot) = (&peers[source], layout.slot(epoch));
        let corrupt = |what, value: u32, limit: usize| {
            Err(Error::Corrupt { rank: source, what, value: value.into(), limit: limit as u64 })
        };
        let tokens = mirror.word32(slot.tokens).load(Relaxed);
        if tokens as usize > config.max_tokens {
            return corrupt("a number of tokens", tokens, config.max_tokens);
        }
        let Sums { starts, entries, bases, counts, spans, terms, last } = sums;
        counts.clear();
        counts.resize(tokens as usize, 0);
        last.clear();
        last.resize(tokens as usize, 0);
        entries.clear();
        starts.clear();
        // Of each block of ranks its starts, one more than it has experts, and its entries.
        let all = tokens as usize * config.width().choices();
        for block in &self.near.blocks {
            let positions = placed.starts[block.start]..placed.starts[block.end];
            let (at, first) = (starts.len(), entries.len());
            starts.resize(at + positions.len() + 1, 0);
            let part = &mut starts[at..];
            mirror.read_into(slot.starts.start + positions.start * size_of::<u32>(), part);
            if part.windows(2).any(|w| w[0] > w[1]) || part[part.len() - 1] as usize > all {
                return corrupt("the end of a list", part[part.len() - 1], all);
            }
            let begin = part[0];
            let count = (part[part.len() - 1] - begin) as usize;
            part.iter_mut().for_each(|start| *start = *start - begin + first as u32);
            entries.resize(first + count, Entry::default());
            mirror.read_into(slot.entries.start + begin as usize * size_of::<Entry>(), &mut entries[first..]);
        }
        if let Some(wrong) = entries.iter().find(|entry| entry.token >= tokens) {
            return corrupt("a token's index", wrong.token, tokens as usize);
        }
        // Twice over all terms: how many each token has, then in their places.
        let mut each_term = |term: &mut dyn FnMut(usize, u32, u32, f32)| {
            let mut at = 0;
            for (n, &rank) in self.near.ranks.iter().enumerate() {
                // Between two blocks there is one more start.
                at += usize::from(n > 0 && self.near.ranks[n - 1] + 1 != rank);
                let local = placed.local(rank).len();
                let from =
                    slot.bases.start + self.parties.index_of(source) * layout.bases_per_source * size_of::<u32>();
                bases.resize(layout.bases_per_source, 0);
                peers[rank].read_into(from, bases);
                match config.reduction {
                    Reduction::PerExpert => {
                        for (expert, base) in (at..at + local).zip(&*bases) {
                            let range = starts[expert] as usize..starts[expert + 1] as usize;
                            for (i, entry) in entries[range].iter().enumerate() {
                                term(entry.token as usize, rank as u32, base.wrapping_add(i as u32), entry.weight);
                            }
                        }
                    }
                    Reduction::PerRank => {
                        let (mark, range) = (rank as u32 + 1, starts[at] as usize..starts[at + local] as usize);
                        entries[range].iter().for_each(|entry| last[entry.token as usize] = mark);
                        let named = last.iter().enumerate().filter(|(_, last)| **last == mark);
                        for (i, (token, _)) in named.enumerate() {
                            term(token, rank as u32, bases[0].wrapping_add(i as u32), 1.0);
                        }
                    }
                }
                at += local;
            }
        };
        each_term(&mut |token, _, _, _| counts[token] += 1);
        spans.clear();
        let mut total = 0;
        for count in counts.iter_mut().filter(|count| **count > 0) {
            if *count as usize > MAX_TOPK {
                return corrupt("the experts of one token", *count, MAX_TOPK);
            }
            spans.push(total);
            total += std::mem::replace(count, total);
        }
        spans.push(total);
        terms.clear();
        terms.resize(total as usize, (0, 0, 0.0));
        each_term(&mut |token, rank, row, weight| {
            terms[counts[token] as usize] = (rank, row, weight);
            counts[token] += 1;
        });
        Ok(())
    }
}

#[cfg(any(test, fuzzing))]
impl Rail {
    /// Forms the sums of all sources from these outboxes and mirrors.
    pub(super) fn form_all(&self, peers: &Peers, epoch: u64) {
        let mut state = lock(&self.state);
        for index in 0..self.duties.len() {
            let last = Update::Word64 { window: self.staging.result_words, offset: 0, value: epoch };
            let _ = self.send_sums::<f32>(peers, &mut state, index, epoch, last);
        }
    }
}

impl Chore for Rail {
    fn attempt(&self) {
        let mut state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let Some(peers) = self.peers.get() else { return };
        for slot in 0..SLOTS {
            let epoch = state.begun[slot];
            if state.done[slot] < epoch
                && let Some(gave_up) = self.combined(peers, epoch)
            {
                self.send_back(peers, &mut state, epoch, gave_up);
                state.done[slot] = epoch;
                self.chores.end();
            }
        }
    }
}

impl Drop for Rail {
    fn drop(&mut self) {
        if !self.origin.is_elsewhere() && self.undone().is_some() {
            let state = lock(&self.state);
            (0..SLOTS).filter(|&slot| state.done[slot] < state.begun[slot]).for_each(|_| self.chores.end());
        }
    }
}
