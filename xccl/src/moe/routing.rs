//! From top-k ids to the lists that receivers read.

use super::layout::Entry;
use super::placement::placed::{Placed, Replicas};
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
    /// The position of the slot that it went to; or from [`SPECIAL`] on which special expert it names, or [`NONE`]. While choices
    /// are counted, the logical expert.
    pub(super) position: u32,
    /// Index among this rank's entries for that slot.
    pub(super) index: u32,
}

/// The position of a choice that names no expert.
const NONE: u32 = u32::MAX;
/// The position of a choice of the first special expert: one that needs no slot.
const SPECIAL: u32 = 1 << 31;

/// A choice that names no expert.
const NOWHERE: Choice = Choice { position: NONE, index: 0 };

impl Choice {
    /// Whether it goes to a slot.
    pub(super) fn is_placed(&self) -> bool {
        self.position < SPECIAL
    }

    /// Which special expert it names.
    pub(super) fn special(&self) -> Option<usize> {
        (self.position != NONE).then(|| self.position.checked_sub(SPECIAL))?.map(|special| special as usize)
    }
}

/// How the choices of a batch are made up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Width {
    /// Experts that a token names.
    pub(super) topk: usize,
    /// Shared experts, which every token goes to: choices after those.
    pub(super) shared: usize,
}

impl Width {
    /// Choices of a token.
    pub(super) fn choices(&self) -> usize {
        self.topk + self.shared
    }
}

/// The factor of a shared expert.
pub(super) const SHARED_WEIGHT: f32 = 1.0;

/// Tokens whose lines are fetched at a time, [`AHEAD`] such groups ahead: ids, choices and entries are short pieces of memory, which the
/// processor's own prefetcher has hardly found when they end, and the rows that were written since the last exchange have
/// displaced them.
const GROUP: usize = 8;
const AHEAD: usize = 4;

/// Memory for building lists, kept from exchange to exchange.
pub(super) struct ListBuilder {
    /// Of experts with slots: those that are named, then shared ones.
    tallies: Vec<Tally>,
    /// Of special experts.
    specials: Vec<Tally>,
    /// Experts that may be named, of those with slots.
    named: usize,
}

/// What is known of one expert.
#[derive(Clone, Copy, Default)]
#[repr(C, align(8))]
struct Tally {
    /// The last token that named it, plus one: finds duplicates without comparing pairs.
    last: u32,
    /// Tokens so far; then where its entries begin, if it has one slot.
    count: u32,
}

impl ListBuilder {
    pub(super) fn new(experts: usize, shared: usize, specials: usize) -> Self {
        let tallies = |n| vec![Tally::default(); n];
        ListBuilder { tallies: tallies(experts + shared), specials: tallies(specials), named: experts }
    }

    /// Makes `starts` (one per position and one more) and `entries` (sorted by position, then token), of which there may be
    /// as many as choices, and fills `choices`.
    ///
    /// The entries are put in order where the peers read them. Those have the lines in their caches, and each has to come back
    /// before it is written: all are asked for while the choices are counted.
    pub(super) fn build<I: ExpertId>(
        &mut self,
        routing: &Routing<'_, I>,
        width: Width,
        placed: &Placed,
        choices: &mut Vec<Choice>,
        starts: &mut [u32],
        entries: &mut [Entry],
    ) -> Result<()> {
        let (topk, each) = (width.topk, width.choices());
        let fetch_group = |group: usize, choices: &[Choice]| {
            let (ids, all) = (group * GROUP * topk, group * GROUP * each);
            let n = GROUP * topk;
            fetch::lines(routing.ids.as_ptr().wrapping_add(ids).cast(), n * size_of::<I>()).for_each(fetch::to_read);
            fetch::lines(routing.weights.as_ptr().wrapping_add(ids).cast(), n * size_of::<f32>())
                .for_each(fetch::to_read);
            let n = GROUP * each;
            fetch::lines(choices.as_ptr().wrapping_add(all).cast(), n * size_of::<Choice>()).for_each(fetch::to_write);
            fetch::lines(entries.as_ptr().wrapping_add(all).cast(), n * size_of::<Entry>()).for_each(fetch::to_write);
        };
        let tokens = routing.ids.len() / topk;
        choices.resize(tokens * each, NOWHERE);
        fetch::lines(self.tallies.as_ptr().cast(), size_of_val(&self.tallies[..])).for_each(fetch::to_write);
        (0..AHEAD).for_each(|group| fetch_group(group, choices));
        fetch::lines(starts.as_ptr().cast(), size_of_val(starts)).for_each(fetch::to_write);
        self.tallies.fill(Tally::default());
        self.specials.fill(Tally::default());
        for (group, first) in (0..tokens).step_by(GROUP).enumerate() {
            fetch_group(group + AHEAD, choices);
            let group = first..tokens.min(first + GROUP);
            count(routing, topk, first, self, &mut choices[group.start * each..group.end * each])?;
        }
        let tallies = &mut self.tallies[..];
        let mut total = 0;
        let positions = placed.positions();
        match &placed.replicas {
            Replicas::InOrder | Replicas::Single(_) => {
                for (start, &expert) in starts.iter_mut().zip(&placed.expert) {
                    *start = total;
                    total += std::mem::replace(&mut tallies[expert].count, total);
                }
            }
            Replicas::Several(rotation) => {
                for (position, (start, &expert)) in starts.iter_mut().zip(&placed.expert).enumerate() {
                    *start = total;
                    total += rotation.share(position, tallies[expert].count);
                }
            }
        }
        starts[positions] = total;
        let starts = &*starts;
        match &placed.replicas {
            Replicas::InOrder if width.shared == 0 => place(choices, routing.weights, topk, tallies, entries),
            Replicas::InOrder => place_with(choices, routing.weights, width, entries, |choice| {
                tallies[choice.position as usize].count + choice.index
            }),
            Replicas::Single(position) => place_with(choices, routing.weights, width, entries, |choice| {
                let at = tallies[choice.position as usize].count + choice.index;
                choice.position = position[choice.position as usize];
                at
            }),
            Replicas::Several(rotation) => place_with(choices, routing.weights, width, entries, |choice| {
                let (position, index) = rotation.place(choice.position, choice.index);
                *choice = Choice { position, index };
                starts[position as usize] + index
            }),
        }
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
    builder: &mut ListBuilder,
    choices: &mut [Choice],
) -> Result<()> {
    let ListBuilder { tallies, specials, named } = builder;
    let (tallies, shared) = tallies.split_at_mut(*named);
    let each = topk + shared.len();
    let ids = routing.ids[first * topk..][..choices.len() / each * topk].chunks_exact(topk);
    for (token, (ids, choices)) in (first..).zip(ids.zip(choices.chunks_exact_mut(each))) {
        if routing.active.is_some_and(|active| !active[token]) {
            // Ids of tokens that go nowhere are not looked at.
            choices.fill(NOWHERE);
            continue;
        }
        let mark = token as u32 + 1;
        for (k, (id, choice)) in ids.iter().zip(choices.iter_mut()).enumerate() {
            let expert = id.to_i64();
            // A negative id is a large number.
            match usize::try_from(expert as u64).ok().and_then(|expert| tallies.get_mut(expert)) {
                Some(tally) if tally.last != mark => {
                    *choice = Choice { position: expert as u32, index: tally.count };
                    *tally = Tally { last: mark, count: tally.count + 1 };
                }
                Some(_) => return Err(Error::DuplicateExpert { token, k, expert }),
                None if expert == -1 => *choice = NOWHERE,
                None => *choice = special(specials, tallies.len(), (token, k, expert))?,
            }
        }
        for (s, (tally, choice)) in shared.iter_mut().zip(&mut choices[topk..]).enumerate() {
            *choice = Choice { position: (tallies.len() + s) as u32, index: tally.count };
            tally.count += 1;
        }
    }
    Ok(())
}

/// The choice of a special expert: their ids follow those of the `experts` with slots.
#[cold]
fn special(specials: &mut [Tally], experts: usize, (token, k, expert): (usize, usize, i64)) -> Result<Choice> {
    let all = experts + specials.len();
    let index = usize::try_from(expert).ok().and_then(|id| id.checked_sub(experts));
    let Some((index, tally)) = index.and_then(|index| Some((index, specials.get_mut(index)?))) else {
        return Err(Error::ExpertOutOfRange { token, k, expert, experts: all });
    };
    let mark = token as u32 + 1;
    match std::mem::replace(&mut tally.last, mark) == mark {
        true => Err(Error::DuplicateExpert { token, k, expert }),
        false => Ok(Choice { position: SPECIAL + index as u32, index: 0 }),
    }
}

/// Puts each choice where its expert's entries are, as [`count`] is: where experts lie in their order, and none is shared.
#[inline(never)]
fn place(choices: &[Choice], weights: &[f32], topk: usize, tallies: &[Tally], entries: &mut [Entry]) {
    let tokens = choices.chunks_exact(topk).zip(weights.chunks_exact(topk));
    for (token, (choices, weights)) in (0..).zip(tokens) {
        for (choice, &weight) in choices.iter().zip(weights).filter(|(c, _)| c.is_placed()) {
            let at = tallies[choice.position as usize].count + choice.index;
            entries[at as usize] = Entry { token, weight };
        }
    }
}

/// As [`place`], where `find` says where a choice's entry goes, and turns its expert into a position.
fn place_with(
    choices: &mut [Choice],
    weights: &[f32],
    width: Width,
    entries: &mut [Entry],
    find: impl Fn(&mut Choice) -> u32,
) {
    let tokens = choices.chunks_exact_mut(width.choices()).zip(weights.chunks_exact(width.topk));
    for (token, (choices, weights)) in (0..).zip(tokens) {
        let (named, shared) = choices.split_at_mut(width.topk);
        for (choice, &weight) in named.iter_mut().zip(weights).filter(|(c, _)| c.is_placed()) {
            entries[find(choice) as usize] = Entry { token, weight };
        }
        for choice in shared.iter_mut().filter(|c| c.is_placed()) {
            entries[find(choice) as usize] = Entry { token, weight: SHARED_WEIGHT };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::parties::Parties;
    use crate::moe::placement::Placement;
    use proptest::prelude::*;

    /// What `build` should give, in the plainest way: for each slot in order, the tokens that name its expert and take this replica.
    fn plainly(case: &Case, weights: &[f32], me: usize) -> (Vec<u32>, Vec<Entry>) {
        let (mut starts, mut entries) = (vec![], vec![]);
        for rank in 0..case.nodes.len() {
            for (slot, &expert) in case.placement.slots(rank).iter().enumerate() {
                starts.push(entries.len() as u32);
                let mut nth = 0;
                for (token, ids) in case.ids.iter().enumerate() {
                    let weight = match expert.checked_sub(case.experts) {
                        Some(_) => Some(1.0),
                        None => ids.iter().position(|&id| id == expert as i64).map(|k| weights[token * case.topk + k]),
                    };
                    let Some(weight) = weight else { continue };
                    if case.placement.choose(expert, me, nth, &case.nodes) == Some((rank, slot)) {
                        entries.push(Entry { token: token as u32, weight });
                    }
                    nth += 1;
                }
            }
        }
        starts.push(entries.len() as u32);
        (starts, entries)
    }

    #[derive(Clone, Debug)]
    struct Case {
        nodes: Vec<usize>,
        /// Without the shared ones.
        experts: usize,
        shared: usize,
        specials: usize,
        topk: usize,
        placement: Placement,
        ids: Vec<Vec<i64>>,
    }

    fn case() -> impl Strategy<Value = Case> {
        let shape = (1usize..40, 0usize..3, 0usize..4, prop::collection::vec(0usize..3, 1..9));
        let shape = shape.prop_flat_map(|(e, h, s, nodes)| (Just((e, h, s)), Just(nodes), 1..=(e + s).min(8)));
        shape.prop_flat_map(|((experts, shared, specials), nodes, topk)| {
            let (ranks, all) = (nodes.len(), experts + shared);
            let homes = prop_oneof![
                Just(Placement::even(all, ranks).unwrap()),
                prop::collection::vec(0..ranks, all).prop_map(move |of| Placement::of_ranks(&of, ranks).unwrap()),
                prop::collection::vec(prop::collection::btree_set(0..ranks, 1..=ranks), all).prop_map(move |homes| {
                    let mut slots = vec![vec![]; ranks];
                    homes.iter().enumerate().for_each(|(e, ranks)| ranks.iter().for_each(|&r| slots[r].push(e)));
                    Placement::new(all, slots).unwrap()
                }),
            ];
            let order = Just((0..(experts + specials) as i64).collect::<Vec<_>>()).prop_shuffle();
            let row = (order, prop::collection::vec(any::<bool>(), topk));
            let with_holes = |(order, holes): (Vec<i64>, Vec<bool>)| {
                order.into_iter().zip(holes).map(|(id, hole)| if hole { -1 } else { id }).collect::<Vec<_>>()
            };
            (homes, prop::collection::vec(row.prop_map(with_holes), 0..20)).prop_map(move |(placement, ids)| Case {
                nodes: nodes.clone(),
                experts,
                shared,
                specials,
                topk,
                placement,
                ids,
            })
        })
    }

    proptest! {
        #[test]
        fn lists_agree_with_a_plain_reference(case in case()) {
            let Case { experts, specials, topk, shared, .. } = case;
            for me in 0..case.nodes.len() {
                let placed = Placed::new(&case.placement, &Parties::all(case.nodes.len()), (me, &case.nodes), 1);
                let width = Width { topk, shared };
                let ids = case.ids.concat();
                let weights: Vec<f32> = (0..ids.len()).map(|i| i as f32).collect();
                let mut builder = ListBuilder::new(experts, shared, specials);
                let room = case.ids.len().max(1) * width.choices() + experts + specials;
                let (mut starts, mut entries) = (vec![0; placed.positions() + 1], vec![Entry::default(); room]);
                let mut choices = vec![];
                // What is left of other exchanges does no harm.
                let all: Vec<i64> = (0..topk as i64).collect();
                let mut build = |ids: &[i64], weights: &[f32]| {
                    let routing = Routing::new(ids, weights);
                    builder.build(&routing, width, &placed, &mut choices, &mut starts, &mut entries)
                };
                build(&all, &vec![1.0; topk]).unwrap();
                build(&vec![-7; topk], &vec![1.0; topk]).unwrap_err();
                build(&ids, &weights).unwrap();
                let (plain_starts, plain_entries) = plainly(&case, &weights, me);
                prop_assert_eq!(&starts, &plain_starts);
                prop_assert_eq!(&entries[..plain_entries.len()], &plain_entries);
                for (i, choice) in choices.iter().enumerate() {
                    let (token, k) = (i / width.choices(), i % width.choices());
                    let (expert, weight) = match k.checked_sub(topk) {
                        Some(s) => ((experts + s) as i64, 1.0),
                        None => (case.ids[token][k], weights[token * topk + k]),
                    };
                    if expert < 0 {
                        prop_assert!(!choice.is_placed() && choice.special().is_none());
                    } else if k < topk && expert >= experts as i64 {
                        prop_assert!(!choice.is_placed());
                        prop_assert_eq!(choice.special(), Some(expert as usize - experts));
                    } else {
                        prop_assert_eq!(placed.expert[choice.position as usize] as i64, expert);
                        let entry = entries[(starts[choice.position as usize] + choice.index) as usize];
                        prop_assert_eq!(entry, Entry { token: token as u32, weight });
                    }
                }
            }
        }
    }

    #[test]
    fn a_bad_id_is_named_with_its_token_and_the_limit() {
        let placed = Placed::new(&Placement::even(4, 2).unwrap(), &Parties::all(2), (0, &[0, 0]), 1);
        let build_of = |specials, ids: &[i32]| {
            let weights = vec![1.0; ids.len()];
            let (mut starts, mut entries) = ([0; 5], [Entry::default(); 4]);
            let (routing, width) = (Routing::new(ids, &weights), Width { topk: 2, shared: 0 });
            let mut builder = ListBuilder::new(4, 0, specials);
            builder.build(&routing, width, &placed, &mut vec![], &mut starts, &mut entries)
        };
        let build = |ids: &[i32]| build_of(0, ids);
        assert!(matches!(build(&[0, 1, 2, 4]), Err(Error::ExpertOutOfRange { token: 1, k: 1, expert: 4, experts: 4 })));
        assert!(matches!(build(&[0, -2]), Err(Error::ExpertOutOfRange { token: 0, k: 1, expert: -2, experts: 4 })));
        assert!(matches!(build(&[0, 1, 3, 3]), Err(Error::DuplicateExpert { token: 1, k: 1, expert: 3 })));
        assert!(build(&[0, 1, 1, 0]).is_ok());
        assert!(build_of(2, &[4, 5]).is_ok());
        assert!(matches!(build_of(2, &[5, 6]), Err(Error::ExpertOutOfRange { k: 1, expert: 6, experts: 6, .. })));
        assert!(matches!(build_of(2, &[5, 5]), Err(Error::DuplicateExpert { k: 1, expert: 5, .. })));
    }
}
