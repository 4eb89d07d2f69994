//! From counts to a placement: see [`balance()`].

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Placement;
use crate::error::{Error, Result};

/// Loads that differ by less are equal.
const EQUAL: f64 = 1e-9;
/// Changes that are tried out for one packing, at most, beyond the first descent: some 10 ms.
const TRIALS: usize = 40_000;
/// Steps of one descent at most: each takes a look at all slots.
const MOST_STEPS: usize = 4096;
/// Random exchanges before each further descent.
const KICKS: usize = 3;

/// A placement for experts with these `counts` of tokens over ranks on these `nodes`, with at most `redundant` slots more than
/// experts. Slots are spread evenly, the first ranks having one more where they do not divide; one is left out where another
/// replica would do nothing. With `previous`, experts stay where they are
/// as far as that costs nothing.
///
/// # The algorithm
/// The load of a rank is what the [rule](super) gives its slots when tokens come evenly from all ranks
/// ([`Placement::loads`]). What is sought is the placement whose hottest rank has least. Exactly, that is as hard as bin packing; so:
///
/// 1. *Replicate*: each redundant slot goes to the expert with most tokens per replica.
/// 2. *Pack*, in two ways. By nodes: the replicas of an expert stay on one node; experts go to nodes by descending count, each to
///    the node with least load per rank that has room; in each node replicas go to ranks by descending load, each to the rank with
///    least load that has a slot. Flat: the same over all ranks at once.
/// 3. *Improve* each: exchange a slot of the hottest rank with another rank's, turn a spare replica elsewhere into one of its
///    experts, or a spare replica of its own into one of any, whichever brings the ranks concerned down most, until nothing does. Then again after a few random exchanges, from
///    the best so far, as long as there is something to be gained and for a number of trials.
/// 4. Take the best; the former placement, improved, is one of them if its ranks have no more slots. Among equals take
///    the one that moves fewest weights, after ranks of a node have exchanged all their slots where that brings experts back to
///    where they were.
///
/// 5. Leave out replicas that do nothing: where all of an expert are on one rank, or each of its ranks has as many.
///
/// Steps 1 and 2 are what DeepSeek's EPLB does, 3 to 5 are what it does not. Numbers are worked out in a fixed order: all ranks get the same placement from the same counts.
///
/// ```
/// use xccl::placement::balance;
/// # fn main() -> xccl::Result<()> {
/// // Expert 0 has half of the tokens, and gets replicas: three spread it well enough.
/// let counts = [700, 100, 100, 100, 100, 100, 100, 100];
/// let placement = balance(&counts, &[0; 4], 4, None)?;
/// assert_eq!(placement.replicas(0).count(), 3);
/// let loads = placement.loads(&counts, &[0; 4]);
/// assert!(loads.iter().all(|load| *load <= 375.0), "{loads:?}"); // of 350 on average
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Config`] without ranks, for a negative count, or for more redundant slots than there are ranks to put replicas on.
pub fn balance(counts: &[i64], nodes: &[usize], redundant: usize, previous: Option<&Placement>) -> Result<Placement> {
    let (experts, ranks) = (counts.len(), nodes.len());
    let wrong = |option, value: String, expected: String| Err(Error::Config { option, value, expected });
    if ranks == 0 {
        return wrong("balance's nodes", "no rank".to_owned(), "the node of each rank".to_owned());
    }
    if let Some(expert) = counts.iter().position(|&count| count < 0) {
        let value = format!("{} for expert {expert}", counts[expert]);
        return wrong("balance's counts", value, "numbers of tokens, 0 or more".to_owned());
    }
    let most = experts * (ranks - 1);
    if redundant > most {
        let expected = format!("at most {most}: a replica of each expert on each rank");
        return wrong("balance's redundant", redundant.to_string(), expected);
    }
    let slots = experts + redundant;
    let room: Vec<usize> = (0..ranks).map(|rank| slots / ranks + usize::from(rank < slots % ranks)).collect();
    let cluster = Cluster::new(counts, nodes, &room);
    let is_alike = |p: &&Placement| {
        p.ranks() == ranks && p.experts() == experts && (0..ranks).all(|rank| p.slots(rank).len() <= room[rank])
    };
    let former = previous.filter(is_alike).map(|p| (0..ranks).map(|rank| p.slots(rank).to_vec()).collect());
    let replicas = cluster.replicate(redundant);
    let packings = former.into_iter().chain(cluster.pack_by_nodes(&replicas)).chain([cluster.pack(&replicas)]);
    let mut best: Option<(f64, usize, Vec<Vec<usize>>)> = None;
    for packing in packings {
        let mut search = Search::new(&cluster, packing);
        search.improve();
        search.simplify();
        let hottest = search.hottest().1;
        let (moved, slots) = cluster.arrange(search.slots, previous);
        let is_better = |(most, moves, _): &(f64, usize, _)| match (hottest - most).abs() <= EQUAL * most {
            true => moved < *moves,
            false => hottest < *most,
        };
        if best.as_ref().is_none_or(is_better) {
            best = Some((hottest, moved, slots));
        }
    }
    Placement::new(experts, best.map_or(vec![], |(_, _, slots)| slots))
}

impl Placement {
    /// The load of each rank where experts have these `counts` of tokens, which come evenly from all ranks: how many of them its
    /// slots get. `nodes` has the node of each rank.
    ///
    /// # Panics
    /// When there are not as many `counts` as experts, shared ones included, and as many nodes as ranks.
    pub fn loads(&self, counts: &[i64], nodes: &[usize]) -> Vec<f64> {
        assert!(
            counts.len() == self.experts() && nodes.len() == self.ranks(),
            "other experts or ranks than {self:?} has"
        );
        let room: Vec<usize> = (0..self.ranks()).map(|rank| self.slots(rank).len()).collect();
        let slots = (0..self.ranks()).map(|rank| self.slots(rank).to_vec()).collect();
        Search::new(&Cluster::new(counts, nodes, &room), slots).loads
    }
}

/// What there is to balance.
struct Cluster<'a> {
    counts: &'a [i64],
    /// The node of each rank, counted from 0.
    nodes: Vec<usize>,
    ranks_of_node: Vec<usize>,
    /// Slots of each rank.
    room: &'a [usize],
}

impl<'a> Cluster<'a> {
    fn new(counts: &'a [i64], nodes: &[usize], room: &'a [usize]) -> Self {
        let mut names = nodes.to_vec();
        names.sort_unstable();
        names.dedup();
        let nodes: Vec<usize> = nodes.iter().map(|node| names.partition_point(|name| name < node)).collect();
        let mut ranks_of_node = vec![0; names.len()];
        nodes.iter().for_each(|&node| ranks_of_node[node] += 1);
        Cluster { counts, nodes, ranks_of_node, room }
    }

    /// How many replicas each expert gets.
    fn replicate(&self, redundant: usize) -> Vec<usize> {
        let mut replicas = vec![1; self.counts.len()];
        let load = |expert: usize, replicas: usize| Load(self.counts[expert] as f64 / replicas as f64);
        let mut heap: BinaryHeap<_> = (0..replicas.len()).map(|e| (load(e, 1), Reverse(e))).collect();
        for _ in 0..redundant {
            if let Some((_, Reverse(expert))) = heap.pop() {
                replicas[expert] += 1;
                heap.push((load(expert, replicas[expert]), Reverse(expert)));
            }
        }
        replicas
    }

    /// Keeps each expert's replicas on one node; `None` where there is no room to.
    fn pack_by_nodes(&self, replicas: &[usize]) -> Option<Vec<Vec<usize>>> {
        let nodes = self.ranks_of_node.len();
        let mut room = vec![0; nodes];
        self.nodes.iter().zip(self.room).for_each(|(&node, slots)| room[node] += slots);
        let mut loads = vec![0.0f64; nodes];
        let mut of_node = vec![vec![0; replicas.len()]; nodes];
        let mut experts: Vec<usize> = (0..replicas.len()).collect();
        experts.sort_by_key(|&e| (Reverse(self.counts[e]), Reverse(replicas[e]), e));
        for e in experts {
            let fits = |&node: &usize| room[node] >= replicas[e];
            let per_rank = |node: usize| loads[node] / self.ranks_of_node[node] as f64;
            let node = (0..nodes).filter(fits).min_by(|&a, &b| per_rank(a).total_cmp(&per_rank(b)))?;
            room[node] -= replicas[e];
            loads[node] += self.counts[e] as f64;
            of_node[node][e] = replicas[e];
        }
        let mut slots = vec![vec![]; self.nodes.len()];
        for (node, replicas) in of_node.iter().enumerate() {
            let ranks: Vec<usize> = (0..self.nodes.len()).filter(|&rank| self.nodes[rank] == node).collect();
            self.pack_on(&ranks, replicas, &mut slots);
        }
        Some(slots)
    }

    fn pack(&self, replicas: &[usize]) -> Vec<Vec<usize>> {
        let mut slots = vec![vec![]; self.nodes.len()];
        self.pack_on(&(0..self.nodes.len()).collect::<Vec<_>>(), replicas, &mut slots);
        slots
    }

    /// Packs so many replicas of each expert onto `ranks`, whose slots they fill.
    fn pack_on(&self, ranks: &[usize], replicas: &[usize], slots: &mut [Vec<usize>]) {
        let each = |expert: usize| self.counts[expert] as f64 / replicas[expert] as f64;
        let mut experts: Vec<usize> = (0..replicas.len()).filter(|&e| replicas[e] > 0).collect();
        experts.sort_by(|&a, &b| each(b).total_cmp(&each(a)).then(a.cmp(&b)));
        let mut loads = vec![0.0f64; slots.len()];
        for &e in &experts {
            for _ in 0..replicas[e] {
                let free = ranks.iter().copied().filter(|&rank| slots[rank].len() < self.room[rank]);
                if let Some(rank) = free.min_by(|&a, &b| loads[a].total_cmp(&loads[b])) {
                    slots[rank].push(e);
                    loads[rank] += each(e);
                }
            }
        }
    }

    /// Exchanges whole ranks within their nodes, and the order of slots, so that few experts move; says how many do.
    fn arrange(&self, packed: Vec<Vec<usize>>, previous: Option<&Placement>) -> (usize, Vec<Vec<usize>>) {
        let Some(previous) = previous else { return (0, packed) };
        let ranks = packed.len();
        let before = |rank: usize| if rank < previous.ranks() { previous.slots(rank) } else { &[] };
        let mut pairs = vec![];
        for (from, slots) in packed.iter().enumerate() {
            for rank in 0..ranks {
                if self.nodes[rank] == self.nodes[from] && self.room[rank] == self.room[from] {
                    let kept = slots.iter().filter(|e| before(rank).contains(e)).count();
                    pairs.push((Reverse(kept), from != rank, from, rank));
                }
            }
        }
        pairs.sort_unstable();
        let (mut source, mut is_used) = (vec![None; ranks], vec![false; ranks]);
        for (_, _, from, rank) in pairs {
            if source[rank].is_none() && !is_used[from] {
                (source[rank], is_used[from]) = (Some(from), true);
            }
        }
        let mut moved = 0;
        let slots = (0..ranks).map(|rank| {
            // Each rank is one of its own pairs, so all have found one.
            let mut rest = packed[source[rank].unwrap_or(rank)].clone();
            let mut slots = vec![None; rest.len()];
            for (slot, expert) in slots.iter_mut().zip(before(rank)) {
                *slot = rest.iter().position(|e| e == expert).map(|at| rest.remove(at));
            }
            moved += rest.iter().filter(|e| !before(rank).contains(e)).count();
            rest.reverse();
            slots.into_iter().filter_map(|kept| kept.or_else(|| rest.pop())).collect()
        });
        let slots = slots.collect();
        (moved, slots)
    }
}

/// A load, for ordering.
#[derive(PartialEq)]
struct Load(f64);

impl Eq for Load {}

impl Ord for Load {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Load {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// A replica that comes to a rank, goes from one, or both.
#[derive(Clone, Copy)]
struct Change {
    expert: usize,
    from: Option<usize>,
    to: Option<usize>,
}

/// Two of different experts.
type Changes = [Change; 2];

/// Each of two replicas goes to the other's rank.
fn exchange((a, of_a): (usize, usize), (b, of_b): (usize, usize)) -> Changes {
    let change = |expert, from, to| Change { expert, from: Some(from), to: Some(to) };
    [change(a, of_a, of_b), change(b, of_b, of_a)]
}

/// Takes one `value` out.
fn remove(list: &mut Vec<usize>, value: usize) {
    if let Some(at) = list.iter().position(|&v| v == value) {
        list.swap_remove(at);
    }
}

fn greatest_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_divisor(b, a % b) }
}

/// A packing that is being improved.
struct Search<'a> {
    cluster: &'a Cluster<'a>,
    slots: Vec<Vec<usize>>,
    /// By expert, the ranks that have it.
    ranks: Vec<Vec<usize>>,
    loads: Vec<f64>,
    /// Replicas of one expert by node, and loads before a trial.
    by_node: Vec<usize>,
    saved: Vec<(usize, f64)>,
    trials: usize,
}

/// Numbers that look random, the same each time (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 11) % limit.max(1) as u64) as usize
    }
}

impl<'a> Search<'a> {
    fn new(cluster: &'a Cluster<'a>, slots: Vec<Vec<usize>>) -> Self {
        let mut ranks = vec![vec![]; cluster.counts.len()];
        for (rank, slots) in slots.iter().enumerate() {
            slots.iter().for_each(|&expert| ranks[expert].push(rank));
        }
        let (by_node, loads) = (vec![0; cluster.ranks_of_node.len()], vec![0.0; slots.len()]);
        let mut search = Search { cluster, slots, ranks, loads, by_node, saved: vec![], trials: 0 };
        search.weigh();
        search
    }

    /// Works all loads out afresh.
    fn weigh(&mut self) {
        self.loads.fill(0.0);
        (0..self.ranks.len()).for_each(|expert| self.add(expert, 1.0));
    }

    /// Adds the load of an expert's replicas, `sign` times.
    fn add(&mut self, expert: usize, sign: f64) {
        let Search { cluster, ranks, loads, by_node, .. } = self;
        let ranks = &ranks[expert];
        by_node.fill(0);
        ranks.iter().for_each(|&rank| by_node[cluster.nodes[rank]] += 1);
        let all = cluster.nodes.len() as f64;
        let without = by_node.iter().zip(&cluster.ranks_of_node).filter(|(n, _)| **n == 0).map(|(_, ranks)| *ranks);
        let from_others = without.sum::<usize>() as f64 / ranks.len() as f64;
        let each = cluster.counts[expert] as f64 / all * sign;
        for &rank in ranks {
            let node = cluster.nodes[rank];
            loads[rank] += each * (cluster.ranks_of_node[node] as f64 / by_node[node] as f64 + from_others);
        }
    }

    /// The rank with most load.
    fn hottest(&self) -> (usize, f64) {
        let loads = self.loads.iter().copied().enumerate();
        loads.max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0))).unwrap_or((0, 0.0))
    }

    /// Descends, and looks around for a deeper place.
    fn improve(&mut self) {
        self.descend();
        let mean = self.cluster.counts.iter().map(|&count| count as f64).sum::<f64>() / self.loads.len() as f64;
        let (first, first_slots) = (self.hottest().1, self.slots.clone());
        let (mut best, mut slots) = (first, first_slots.clone());
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        self.trials = 0;
        let several = self.loads.len() > 1 && slots.iter().filter(|slots| !slots.is_empty()).count() > 1;
        while several && self.trials < TRIALS && best > mean * (1.0 + EQUAL) {
            // Also when every kick is refused there is an end.
            self.trials += 1;
            for _ in 0..KICKS {
                let (one, other) = (random.below(self.slots.len()), random.below(self.slots.len()));
                if one == other || self.slots[one].is_empty() || self.slots[other].is_empty() {
                    continue;
                }
                let a = self.slots[one][random.below(self.slots[one].len())];
                let b = self.slots[other][random.below(self.slots[other].len())];
                if a != b {
                    self.make(exchange((a, one), (b, other)));
                }
            }
            self.weigh();
            self.descend();
            let most = self.hottest().1;
            if most <= best * (1.0 + EQUAL) {
                (best, slots) = (most.min(best), self.slots.clone());
            } else {
                self.restore(&slots);
            }
        }
        // What wandered off without getting better stays where it was.
        self.restore(if best < first * (1.0 - EQUAL) { &slots } else { &first_slots });
    }

    fn descend(&mut self) {
        for _ in 0..MOST_STEPS {
            let (hot, most) = self.hottest();
            let Some(changes) = self.best_changes(hot, most) else { break };
            self.make(changes);
            self.weigh();
        }
    }

    fn restore(&mut self, slots: &[Vec<usize>]) {
        self.slots = slots.to_vec();
        self.ranks.iter_mut().for_each(Vec::clear);
        for (rank, slots) in slots.iter().enumerate() {
            slots.iter().for_each(|&expert| self.ranks[expert].push(rank));
        }
        self.weigh();
    }

    fn make(&mut self, changes: Changes) {
        for change in changes {
            if let Some(from) = change.from {
                remove(&mut self.slots[from], change.expert);
            }
            if let Some(to) = change.to {
                self.slots[to].push(change.expert);
            }
            self.shift(change);
        }
    }

    /// Leaves out replicas without which loads are the same.
    fn simplify(&mut self) {
        for expert in 0..self.ranks.len() {
            let mut ranks = self.ranks[expert].clone();
            ranks.sort_unstable();
            let of_each = ranks.chunk_by(|a, b| a == b).map(<[usize]>::len);
            let divisor = of_each.reduce(greatest_divisor).unwrap_or(1);
            for (i, &rank) in ranks.iter().enumerate() {
                // Of each `divisor` of a rank's replicas one stays.
                if i % divisor > 0 {
                    remove(&mut self.slots[rank], expert);
                    self.shift(Change { expert, from: Some(rank), to: None });
                }
            }
        }
        self.weigh();
    }

    /// What brings the ranks concerned furthest below `most`, which `hot` has.
    fn best_changes(&mut self, hot: usize, most: f64) -> Option<Changes> {
        let each = |search: &Self, e: usize| search.cluster.counts[e] as f64 / search.ranks[e].len() as f64;
        let mut best = (most * (1.0 - EQUAL), None);
        for i in 0..self.slots[hot].len() {
            let a = self.slots[hot][i];
            // A spare replica here.
            let others = if self.ranks[a].len() > 1 { self.ranks.len() } else { 0 };
            for b in (0..others).filter(|&b| b != a) {
                let less = Change { expert: a, from: Some(hot), to: None };
                self.consider([less, Change { expert: b, from: None, to: Some(hot) }], &mut best);
            }
            for other in (0..self.slots.len()).filter(|&rank| rank != hot) {
                for j in 0..self.slots[other].len() {
                    let b = self.slots[other][j];
                    if a == b {
                        continue;
                    }
                    if each(self, a) > each(self, b) {
                        self.consider(exchange((a, hot), (b, other)), &mut best);
                    }
                    if self.ranks[b].len() > 1 {
                        let further = Change { expert: a, from: None, to: Some(other) };
                        self.consider([further, Change { expert: b, from: Some(other), to: None }], &mut best);
                    }
                }
            }
        }
        best.1
    }

    fn consider(&mut self, changes: Changes, best: &mut (f64, Option<Changes>)) {
        self.trials += 1;
        let after = self.trial(changes);
        if after < best.0 {
            *best = (after, Some(changes));
        }
    }

    /// The most load of the ranks that changes concern, after them.
    fn trial(&mut self, changes: Changes) -> f64 {
        self.saved.clear();
        let save = |search: &mut Self, expert: usize| {
            let Search { ranks, loads, saved, .. } = search;
            saved.extend(ranks[expert].iter().map(|&rank| (rank, loads[rank])));
        };
        for change in changes {
            save(self, change.expert);
            self.add(change.expert, -1.0);
        }
        for change in changes {
            self.shift(change);
            save(self, change.expert);
            self.add(change.expert, 1.0);
        }
        let most = self.saved.iter().map(|&(rank, _)| self.loads[rank]).fold(0.0, f64::max);
        for change in changes.into_iter().rev() {
            self.shift(Change { from: change.to, to: change.from, ..change });
        }
        // The first of each is what it was before.
        while let Some((rank, load)) = self.saved.pop() {
            self.loads[rank] = load;
        }
        most
    }

    fn shift(&mut self, Change { expert, from, to }: Change) {
        let ranks = &mut self.ranks[expert];
        if let Some(from) = from {
            remove(ranks, from);
        }
        ranks.extend(to);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// DeepSeek's EPLB, from its description: which expert is in each slot of each GPU.
    mod eplb {
        /// Which of `packs` packs each item goes to: by descending weight, to the lightest that is not full.
        fn pack(weights: &[f64], packs: usize) -> Vec<usize> {
            let most = weights.len() / packs;
            let mut order: Vec<usize> = (0..weights.len()).collect();
            order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
            let (mut load, mut items, mut pack_of) = (vec![0.0f64; packs], vec![0; packs], vec![0; weights.len()]);
            for item in order {
                let open = (0..packs).filter(|&pack| items[pack] < most);
                let pack = open.min_by(|&a, &b| load[a].total_cmp(&load[b])).unwrap();
                load[pack] += weights[item];
                items[pack] += 1;
                pack_of[item] = pack;
            }
            pack_of
        }

        /// The expert of each replica: the further ones go to whatever has most weight per replica.
        fn replicate(weights: &[f64], replicas: usize) -> Vec<usize> {
            let (mut counts, mut of) = (vec![1.0; weights.len()], (0..weights.len()).collect::<Vec<_>>());
            for _ in weights.len()..replicas {
                let each = |e: usize| weights[e] / counts[e];
                let most = (0..weights.len()).fold(0, |best, e| if each(e) > each(best) { e } else { best });
                counts[most] += 1.0;
                of.push(most);
            }
            of
        }

        /// Groups of experts to nodes, then each node by itself.
        pub(super) fn hierarchical(
            weights: &[f64],
            replicas: usize,
            groups: usize,
            nodes: usize,
            gpus: usize,
        ) -> Vec<Vec<usize>> {
            let size = weights.len() / groups;
            let of_groups: Vec<f64> = weights.chunks(size).map(|group| group.iter().sum()).collect();
            let node_of = pack(&of_groups, nodes);
            let mut slots = vec![];
            for node in 0..nodes {
                let here: Vec<usize> = (0..weights.len()).filter(|e| node_of[e / size] == node).collect();
                let local: Vec<f64> = here.iter().map(|&e| weights[e]).collect();
                let of = replicate(&local, replicas / nodes);
                let counts: Vec<f64> =
                    (0..local.len()).map(|e| of.iter().filter(|&&o| o == e).count() as f64).collect();
                let each: Vec<f64> = of.iter().map(|&e| local[e] / counts[e]).collect();
                let gpu_of = pack(&each, gpus / nodes);
                for gpu in 0..gpus / nodes {
                    slots.push((0..of.len()).filter(|&i| gpu_of[i] == gpu).map(|i| here[of[i]]).collect());
                }
            }
            slots
        }

        /// What it does when groups cannot be spread evenly over nodes.
        pub(super) fn global(weights: &[f64], replicas: usize, gpus: usize) -> Vec<Vec<usize>> {
            hierarchical(weights, replicas, 1, 1, gpus)
        }
    }

    /// The hottest rank's load, where several replicas of one may be on one rank.
    fn hottest(counts: &[i64], nodes: &[usize], slots: &[Vec<usize>]) -> f64 {
        let mut loads = vec![0.0f64; slots.len()];
        for (expert, &count) in counts.iter().enumerate() {
            let replicas: Vec<usize> = slots
                .iter()
                .enumerate()
                .flat_map(|(r, s)| s.iter().filter(|&&e| e == expert).map(move |_| r))
                .collect();
            let on = |node: usize| replicas.iter().filter(|&&rank| nodes[rank] == node).count() as f64;
            // From each rank, in the plainest way.
            for &source in nodes {
                let near = on(source);
                let part = count as f64 / nodes.len() as f64;
                for &rank in &replicas {
                    if near == 0.0 {
                        loads[rank] += part / replicas.len() as f64;
                    } else if nodes[rank] == source {
                        loads[rank] += part / near;
                    }
                }
            }
        }
        loads.into_iter().fold(0.0, f64::max)
    }

    /// The hottest rank's load by the library's placement, which is to be no more than by these.
    fn not_worse(counts: &[i64], nodes: &[usize], redundant: usize, theirs: &[Vec<Vec<usize>>]) {
        let ours = balance(counts, nodes, redundant, None).unwrap();
        let mine = ours.loads(counts, nodes).into_iter().fold(0.0, f64::max);
        for slots in theirs {
            let other = hottest(counts, nodes, slots);
            assert!(mine <= other * (1.0 + 1e-9), "{mine} where EPLB has {other}: {counts:?} on {nodes:?}");
        }
    }

    /// The two layers of EPLB's README: 12 experts in 4 groups, 16 slots on 8 GPUs of 2 nodes.
    const README: [([i64; 12], [usize; 16]); 2] = [
        ([90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]),
        ([20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]),
    ];

    #[test]
    fn no_rank_is_hotter_than_on_eplbs_own_example() {
        let nodes = [0, 0, 0, 0, 1, 1, 1, 1];
        for (counts, published) in README {
            let weights = counts.map(|count| count as f64);
            let published: Vec<Vec<usize>> = published.chunks(2).map(<[usize]>::to_vec).collect();
            let reference = eplb::hierarchical(&weights, 16, 4, 2, 8);
            // The reference is that algorithm.
            assert_eq!(hottest(&counts, &nodes, &reference), hottest(&counts, &nodes, &published));
            not_worse(&counts, &nodes, 4, &[published, eplb::global(&weights, 16, 8)]);
        }
    }

    /// Counts where few experts get most: Zipf's law with any exponent, or one expert many times the average.
    fn skewed(experts: usize) -> impl Strategy<Value = Vec<i64>> {
        let zipf = (0u32..30, Just((0..experts).collect::<Vec<_>>()).prop_shuffle()).prop_map(|(exponent, order)| {
            let of = |place: usize| (1e5 / (place as f64 + 1.0).powf(f64::from(exponent) / 10.0)) as i64;
            order.into_iter().map(of).collect::<Vec<i64>>()
        });
        let hot =
            (prop::collection::vec(0i64..200, experts), 0..experts, 1i64..60).prop_map(|(mut counts, hot, times)| {
                counts[hot] = times * 100;
                counts
            });
        prop_oneof![zipf, hot, prop::collection::vec(0i64..1000, experts)]
    }

    fn trace() -> impl Strategy<Value = (usize, usize, usize, Vec<i64>)> {
        // Nodes, ranks per node, slots per rank, and as many experts as leave the redundant slots.
        (1usize..4, 1usize..5, 2usize..9).prop_flat_map(|(nodes, per_node, slots)| {
            let ranks = nodes * per_node;
            let most = slots - 1;
            (1..=most).prop_flat_map(move |each| (Just(nodes), Just(ranks), Just(slots), skewed(ranks * each)))
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_rank_is_hotter_than_with_eplb((nodes, ranks, slots, counts) in trace()) {
            let weights: Vec<f64> = counts.iter().map(|&count| count as f64).collect();
            let node_of: Vec<usize> = (0..ranks).map(|rank| rank / (ranks / nodes)).collect();
            let redundant = ranks * slots - counts.len();
            if redundant > counts.len() * (ranks - 1) {
                return Ok(());
            }
            let groups = (nodes..=counts.len()).step_by(nodes).filter(|groups| counts.len() % groups == 0);
            let by_nodes = groups.map(|groups| eplb::hierarchical(&weights, ranks * slots, groups, nodes, ranks));
            let theirs: Vec<_> = by_nodes.chain([eplb::global(&weights, ranks * slots, ranks)]).collect();
            not_worse(&counts, &node_of, redundant, &theirs);
        }

        #[test]
        fn loads_are_those_of_the_rule_and_slots_are_even(
            nodes in prop::collection::vec(0usize..3, 1..7),
            counts in prop::collection::vec(0i64..100, 1..20),
            redundant in any::<prop::sample::Index>(),
        ) {
            let redundant = redundant.index((counts.len() * (nodes.len() - 1)).max(1));
            let placement = balance(&counts, &nodes, redundant, None).unwrap();
            prop_assert!(placement.all_slots() <= counts.len() + redundant);
            for rank in 0..nodes.len() {
                let room = (counts.len() + redundant + nodes.len() - 1 - rank) / nodes.len();
                prop_assert!(placement.slots(rank).len() <= room);
            }
            let slots: Vec<_> = (0..nodes.len()).map(|rank| placement.slots(rank).to_vec()).collect();
            let most = placement.loads(&counts, &nodes).into_iter().fold(0.0, f64::max);
            prop_assert!((most - hottest(&counts, &nodes, &slots)).abs() < 1e-6);
            prop_assert_eq!(balance(&counts, &nodes, redundant, None).unwrap(), placement);
        }

        #[test]
        fn what_is_as_good_as_can_be_found_stays(
            nodes in prop::collection::vec(0usize..2, 2..6), counts in prop::collection::vec(1i64..100, 6..16), more in 0usize..6,
        ) {
            let hottest = |p: &Placement| p.loads(&counts, &nodes).into_iter().fold(0.0, f64::max);
            let first = balance(&counts, &nodes, more, None).unwrap();
            // As it is, and with the slots of each rank in another order.
            let turned = (0..nodes.len()).map(|rank| first.slots(rank).iter().rev().copied().collect()).collect();
            for previous in [&first, &Placement::new(counts.len(), turned).unwrap()] {
                let next = balance(&counts, &nodes, more, Some(previous)).unwrap();
                prop_assert!(next == *previous || hottest(&next) < hottest(previous));
            }
        }
    }

    #[test]
    fn what_cannot_be_balanced_is_named() {
        for (counts, nodes, redundant, named) in [
            (&[1, -2][..], &[0, 0][..], 0, "-2 for expert 1"),
            (&[1, 2], &[], 0, "no rank"),
            (&[1, 2], &[0, 0, 0], 5, "at most 4"),
        ] {
            let error = balance(counts, nodes, redundant, None).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        assert!(balance(&[1, 2], &[0, 0, 0], 4, None).is_ok());
    }
}
