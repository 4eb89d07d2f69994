//! From top-k ids to the lists that receivers read.

use super::layout::Entry;
use super::placement::Placement;
use crate::dtype::ExpertId;
use crate::error::{Error, Result};
use crate::memory::fetch;

/// Which experts each token goes to. Borrowed: the same routing may serve several exchanges.
///
/// ```
/// use xccl::Routing;
/// let ids = [3i32, 0, /* token 1: */ 2, -1];
/// let weights = [0.75, 0.25, 1.0, 0.0];
/// let routing = Routing::new(&ids, &weights).active(&[true, false]); // token 1 is masked out
/// # let _ = routing;
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Routing<'a, I> {
    pub(super) ids: &'a [I],
    pub(super) weights: &'a [f32],
    pub(super) active: Option<&'a [bool]>,
}

impl<'a, I: ExpertId> Routing<'a, I> {
    /// `ids[t * topk + k]` is the k-th expert of token t, or -1 for none; `weights` its factor in the sum.
    pub fn new(ids: &'a [I], weights: &'a [f32]) -> Self {
        Routing { ids, weights, active: None }
    }

    /// Leaves out the tokens whose entry is false: they go nowhere, and their sums are zeros.
    pub fn active(mut self, active: &'a [bool]) -> Self {
        self.active = Some(active);
        self
    }

    /// The number of tokens; checks the lengths against each other.
    pub(super) fn tokens(&self, topk: usize, max_tokens: usize) -> Result<usize> {
        let shape = |what, given, expected: String| Err(Error::Shape { what, given, expected });
        if !self.ids.len().is_multiple_of(topk) {
            return shape("topk_ids", self.ids.len(), format!("a multiple of topk = {topk}"));
        }
        let tokens = self.ids.len() / topk;
        if tokens > max_tokens {
            return Err(Error::TooManyTokens { given: tokens, limit: max_tokens });
        }
        if self.weights.len() != self.ids.len() {
            return shape("topk_weights", self.weights.len(), format!("{} (tokens * topk)", self.ids.len()));
        }
        match self.active {
            Some(active) if active.len() != tokens => {
                shape("the active-token mask", active.len(), format!("{tokens} (tokens)"))
            }
            _ => Ok(tokens),
        }
    }
}

/// Where one choice of one token went. Aligned so that it is one store.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(8))]
pub(super) struct Choice {
    /// The expert, or [`NONE`].
    pub(super) expert: u32,
    /// Index among this rank's entries for that expert.
    pub(super) index: u32,
}

/// The expert of a choice that names none.
pub(super) const NONE: u32 = u32::MAX;

/// A choice that names no expert.
const NOWHERE: Choice = Choice { expert: NONE, index: 0 };

/// Tokens whose lines are fetched at a time, [`AHEAD`] such groups ahead: ids, choices and entries are short pieces of memory, which the
/// processor's own prefetcher has hardly found when they end, and the rows that were written since the last exchange have
/// displaced them.
const GROUP: usize = 8;
const AHEAD: usize = 4;

/// Memory for building lists, kept from exchange to exchange.
pub(super) struct ListBuilder {
    tallies: Vec<Tally>,
}

/// What is known of one expert.
#[derive(Clone, Copy, Default)]
#[repr(C, align(8))]
struct Tally {
    /// The last token that named it, plus one: finds duplicates without comparing pairs.
    last: u32,
    /// Tokens so far; then where its entries begin.
    count: u32,
}

impl ListBuilder {
    pub(super) fn new(experts: usize) -> Self {
        ListBuilder { tallies: vec![Tally::default(); experts] }
    }

    /// Makes `starts` (one per expert position and one more) and `entries` (sorted by position, then token), of which there may be
    /// as many as ids, and fills `choices`, one per id.
    ///
    /// The entries are put in order where the peers read them. Those have the lines in their caches, and each has to come back
    /// before it is written: all are asked for while the choices are counted.
    pub(super) fn build<I: ExpertId>(
        &mut self,
        routing: &Routing<'_, I>,
        topk: usize,
        placement: &Placement,
        choices: &mut Vec<Choice>,
        starts: &mut [u32],
        entries: &mut [Entry],
    ) -> Result<()> {
        let tallies = &mut self.tallies;
        let experts = tallies.len();
        let fetch_group = |first: usize, choices: &[Choice]| {
            let n = GROUP * topk;
            fetch::lines(routing.ids.as_ptr().wrapping_add(first).cast(), n * size_of::<I>()).for_each(fetch::to_read);
            fetch::lines(routing.weights.as_ptr().wrapping_add(first).cast(), n * size_of::<f32>())
                .for_each(fetch::to_read);
            fetch::lines(choices.as_ptr().wrapping_add(first).cast(), n * size_of::<Choice>())
                .for_each(fetch::to_write);
            fetch::lines(entries.as_ptr().wrapping_add(first).cast(), n * size_of::<Entry>()).for_each(fetch::to_write);
        };
        choices.resize(routing.ids.len(), NOWHERE);
        fetch::lines(tallies.as_ptr().cast(), size_of_val(&tallies[..])).for_each(fetch::to_write);
        (0..AHEAD).for_each(|group| fetch_group(group * GROUP * topk, choices));
        fetch::lines(starts.as_ptr().cast(), size_of_val(starts)).for_each(fetch::to_write);
        tallies.fill(Tally::default());
        for first in (0..choices.len()).step_by(GROUP * topk) {
            fetch_group(first + AHEAD * GROUP * topk, choices);
            let group = first..choices.len().min(first + GROUP * topk);
            count(routing, topk, first / topk, tallies, &mut choices[group])?;
        }
        let mut total = 0;
        for (start, &expert) in starts.iter_mut().zip(&placement.expert) {
            *start = total;
            total += std::mem::replace(&mut tallies[expert].count, total);
        }
        starts[experts] = total;
        place(choices, routing.weights, topk, tallies, entries);
        Ok(())
    }
}

/// Counts the choices of the tokens from `first` on, which go to `choices`. A function of its own, so that all of it is in
/// registers.
#[inline(never)]
fn count<I: ExpertId>(
    routing: &Routing<'_, I>,
    topk: usize,
    first: usize,
    tallies: &mut [Tally],
    choices: &mut [Choice],
) -> Result<()> {
    let ids = routing.ids[first * topk..][..choices.len()].chunks_exact(topk);
    for (token, (ids, choices)) in (first..).zip(ids.zip(choices.chunks_exact_mut(topk))) {
        if routing.active.is_some_and(|active| !active[token]) {
            // Ids of tokens that go nowhere are not looked at.
            choices.fill(NOWHERE);
            continue;
        }
        let mark = token as u32 + 1;
        for (k, (id, choice)) in ids.iter().zip(choices).enumerate() {
            let expert = id.to_i64();
            // A negative id is a large number.
            match usize::try_from(expert as u64).ok().and_then(|expert| tallies.get_mut(expert)) {
                Some(tally) if tally.last != mark => {
                    *choice = Choice { expert: expert as u32, index: tally.count };
                    *tally = Tally { last: mark, count: tally.count + 1 };
                }
                Some(_) => return Err(Error::DuplicateExpert { token, k, expert }),
                None if expert == -1 => *choice = NOWHERE,
                None => return Err(Error::ExpertOutOfRange { token, k, expert, experts: tallies.len() }),
            }
        }
    }
    Ok(())
}

/// Puts each choice where its expert's entries are, as [`count`] is.
#[inline(never)]
fn place(choices: &[Choice], weights: &[f32], topk: usize, tallies: &[Tally], entries: &mut [Entry]) {
    let tokens = choices.chunks_exact(topk).zip(weights.chunks_exact(topk));
    for (token, (choices, weights)) in (0..).zip(tokens) {
        for (choice, &weight) in choices.iter().zip(weights).filter(|(c, _)| c.expert != NONE) {
            let at = tallies[choice.expert as usize].count + choice.index;
            entries[at as usize] = Entry { token, weight };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::moe::MoeConfig;
    use proptest::prelude::*;

    /// What `build` should give, in the plainest way: for each expert in order, the tokens that name it.
    fn plainly(ids: &[i64], weights: &[f32], topk: usize, placement: &Placement) -> (Vec<u32>, Vec<Entry>) {
        let (mut starts, mut entries) = (vec![], vec![]);
        for &expert in &placement.expert {
            starts.push(entries.len() as u32);
            for (i, _) in ids.iter().enumerate().filter(|&(_, &id)| id == expert as i64) {
                entries.push(Entry { token: (i / topk) as u32, weight: weights[i] });
            }
        }
        starts.push(entries.len() as u32);
        (starts, entries)
    }

    type Case = (usize, usize, usize, Option<Vec<usize>>, Vec<i64>);

    /// Experts, ranks, topk, an explicit placement or none, and ids with holes.
    fn case() -> impl Strategy<Value = Case> {
        let shape = (1usize..40, 1usize..9).prop_flat_map(|(e, w)| (Just(e), Just(w), 1..=e.min(8)));
        shape.prop_flat_map(|(experts, world, topk)| {
            let placement = prop::option::of(prop::collection::vec(0..world, experts));
            let order = Just((0..experts as i64).collect::<Vec<_>>()).prop_shuffle();
            let row = (order, prop::collection::vec(any::<bool>(), topk));
            let with_holes = |(order, holes): (Vec<i64>, Vec<bool>)| {
                order.into_iter().zip(holes).map(|(id, hole)| if hole { -1 } else { id }).collect::<Vec<_>>()
            };
            let ids = prop::collection::vec(row.prop_map(with_holes), 0..20).prop_map(|rows| rows.concat());
            (Just(experts), Just(world), Just(topk), placement, ids)
        })
    }

    proptest! {
        #[test]
        fn lists_agree_with_a_plain_reference((experts, world, topk, placement, ids) in case()) {
            let config = MoeConfig { placement, ..MoeConfig::new(32, 8, topk, experts, DType::F32) };
            let placement = Placement::new(&config, world);
            let weights: Vec<f32> = (0..ids.len()).map(|i| i as f32).collect();
            let mut choices = vec![];
            let mut builder = ListBuilder::new(experts);
            // What an earlier exchange, good or bad, has left behind does not matter.
            let all: Vec<i64> = (0..experts as i64).collect();
            let (mut starts, mut entries) = (vec![7; experts + 1], vec![Entry::default(); ids.len().max(experts)]);
            let mut build = |ids: &[i64], weights: &[f32], topk| {
                let routing = Routing::new(ids, weights);
                builder.build(&routing, topk, &placement, &mut choices, &mut starts, &mut entries)
            };
            build(&all, &vec![1.0; experts], experts).unwrap();
            build(&[0, -7], &[1.0; 2], 1).unwrap_err();
            build(&ids, &weights, topk).unwrap();
            let (plain_starts, plain_entries) = plainly(&ids, &weights, topk, &placement);
            prop_assert_eq!(&starts, &plain_starts);
            prop_assert_eq!(&entries[..plain_entries.len()], &plain_entries);
            for (i, choice) in choices.iter().enumerate() {
                if ids[i] < 0 {
                    prop_assert_eq!(choice.expert, NONE);
                } else {
                    prop_assert_eq!(choice.expert as i64, ids[i]);
                    let position = placement.expert.iter().position(|&e| e as i64 == ids[i]).unwrap();
                    let entry = entries[(starts[position] + choice.index) as usize];
                    prop_assert_eq!(entry, Entry { token: (i / topk) as u32, weight: i as f32 });
                }
            }
        }
    }

    #[test]
    fn a_bad_id_is_named_with_its_token_and_the_limit() {
        let placement = Placement::new(&MoeConfig::new(8, 8, 2, 4, DType::F32), 2);
        let build = |ids: &[i32]| {
            let weights = vec![1.0; ids.len()];
            let (mut starts, mut entries) = ([0; 5], [Entry::default(); 4]);
            let routing = Routing::new(ids, &weights);
            ListBuilder::new(4).build(&routing, 2, &placement, &mut vec![], &mut starts, &mut entries)
        };
        assert!(matches!(build(&[0, 1, 2, 4]), Err(Error::ExpertOutOfRange { token: 1, k: 1, expert: 4, experts: 4 })));
        assert!(matches!(build(&[0, -2]), Err(Error::ExpertOutOfRange { token: 0, k: 1, expert: -2, experts: 4 })));
        assert!(matches!(build(&[0, 1, 3, 3]), Err(Error::DuplicateExpert { token: 1, k: 1, expert: 3 })));
        assert!(build(&[0, 1, 1, 0]).is_ok());
    }
}
