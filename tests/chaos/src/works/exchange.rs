//! Dispatch and combine. Tokens and weights are small numbers, so that every sum is exact in any order.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use xccl::{Communicator, DType, Exchange, Moe, MoeConfig, Reduction, Routing};

use super::{Played, Player, check};

/// What a handle was made for.
#[derive(Clone, Copy, PartialEq)]
pub struct Shape {
    most_tokens: usize,
    hidden: usize,
    topk: usize,
    experts: usize,
    reduction: Reduction,
}

/// What one rank sends in one exchange.
pub(super) struct Sent {
    pub(super) ids: Vec<i32>,
    pub(super) weights: Vec<f32>,
    pub(super) tokens: Vec<f32>,
}

impl Shape {
    pub(super) fn draw(rng: &mut StdRng, ranks: usize) -> Shape {
        let experts = ranks + rng.random_range(0..4);
        let reduction = if rng.random() { Reduction::PerExpert } else { Reduction::PerRank };
        let (most_tokens, hidden) = (rng.random_range(1..24), [1, 8, 100, 1500][rng.random_range(0..4)]);
        Shape { most_tokens, hidden, topk: rng.random_range(1..=experts.min(4)), experts, reduction }
    }

    pub(super) fn hidden(&self) -> usize {
        self.hidden
    }

    pub(super) fn config(&self) -> MoeConfig {
        let &Shape { most_tokens, hidden, topk, experts, reduction } = self;
        MoeConfig { reduction, ..MoeConfig::new(most_tokens, hidden, topk, experts, DType::F32) }
    }

    /// What `rank` sends: known to all.
    pub(super) fn sent_by(&self, salt: u64, rank: usize) -> Sent {
        let mut rng = StdRng::seed_from_u64(salt ^ (rank as u64) << 48);
        let tokens = rng.random_range(0..=self.most_tokens);
        let mut ids = vec![];
        for _ in 0..tokens {
            let first = rng.random_range(0..self.experts);
            for k in 0..self.topk {
                let none = rng.random_bool(0.1);
                ids.push(if none { -1 } else { ((first + k) % self.experts) as i32 });
            }
        }
        let weights = ids.iter().map(|_| [0.5, 1.0, 2.0][rng.random_range(0..3)]).collect();
        let tokens = (0..tokens * self.hidden).map(|_| rng.random_range(-8i8..8) as f32).collect();
        Sent { ids, weights, tokens }
    }

    /// What the experts make of what a rank has sent.
    pub(super) fn result(&self, sent: &Sent) -> Vec<f32> {
        let mut out = vec![0.0; sent.tokens.len()];
        for (choice, (&id, weight)) in sent.ids.iter().zip(&sent.weights).enumerate() {
            let token = choice / self.topk * self.hidden..(choice / self.topk + 1) * self.hidden;
            if id >= 0 {
                let terms = sent.tokens[token.clone()].iter().map(|&x| weight * work_of(id as usize, x));
                out[token].iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
            }
        }
        out
    }
}

/// What an expert does.
pub(super) fn work_of(expert: usize, x: f32) -> f32 {
    x * (1 + expert % 3) as f32 + expert as f32
}

impl Player<'_> {
    /// One to three exchanges, the first of which may be combined after the second one's dispatch.
    pub fn exchange(&mut self, rng: &mut StdRng) -> Played {
        let shape = Shape::draw(rng, self.ranks);
        let anew = rng.random_bool(0.5);
        let (shape, moe) = match self.moe.take() {
            Some(kept) if !anew => kept,
            _ => (shape, Moe::new(&self.comm, shape.config())?),
        };
        let played = rounds(&self.comm, &shape, &moe, rng);
        self.moe = Some((shape, moe));
        played
    }
}

fn rounds(comm: &Communicator, shape: &Shape, moe: &Moe, rng: &mut StdRng) -> Played {
    let (salt, overlap) = (rng.random::<u64>(), rng.random_bool(0.3));
    if overlap {
        let (first, second) = (send(comm, shape, moe, salt)?, send(comm, shape, moe, salt + 1)?);
        experts(comm, shape, moe, &first, salt)?;
        experts(comm, shape, moe, &second, salt + 1)?;
        receive(comm, shape, moe, second, salt + 1)?;
        return receive(comm, shape, moe, first, salt);
    }
    for n in 0..rng.random_range(1..5) {
        let sent = send(comm, shape, moe, salt + n)?;
        experts(comm, shape, moe, &sent, salt + n)?;
        receive(comm, shape, moe, sent, salt + n)?;
    }
    Ok(())
}

fn send<'m>(comm: &Communicator, shape: &Shape, moe: &'m Moe, salt: u64) -> Played<Exchange<'m>> {
    let Sent { ids, weights, tokens } = shape.sent_by(salt, comm.rank());
    Ok(moe.dispatch_send(&tokens, &Routing::new(&ids, &weights))?)
}

fn experts<'m>(comm: &Communicator, shape: &Shape, moe: &'m Moe, exchange: &Exchange<'m>, salt: u64) -> Played {
    let mut batch = moe.dispatch_recv(exchange)?;
    let sent: Vec<Sent> = (0..comm.world_size()).map(|rank| shape.sent_by(salt, rank)).collect();
    let mine = batch.local_experts().to_vec();
    let named = |sent: &Sent| sent.ids.iter().filter(|&&id| id >= 0 && mine.contains(&(id as usize))).count();
    let expected = sent.iter().map(named).sum::<usize>();
    check(batch.len() == expected, || format!("{} rows where there are {expected}", batch.len()))?;
    let mut row = vec![0.0f32; shape.hidden];
    for i in 0..batch.len() {
        let what = batch.row(i);
        batch.copy_row(i, &mut row)?;
        let at = what.token * shape.hidden;
        let right = sent[what.source].tokens.get(at..at + shape.hidden);
        check(right == Some(&row[..]), || format!("row {i} of {what:?} is wrong"))?;
        let expert = mine[what.expert];
        let output = batch.output_row::<f32>(i)?;
        output.iter_mut().zip(&row).for_each(|(y, &x)| *y = work_of(expert, x));
    }
    Ok(moe.combine_send(batch)?)
}

fn receive(comm: &Communicator, shape: &Shape, moe: &Moe, exchange: Exchange<'_>, salt: u64) -> Played {
    let expected = shape.result(&shape.sent_by(salt, comm.rank()));
    let mut out = vec![0.0f32; expected.len()];
    moe.combine_recv(exchange, &mut out)?;
    check(out == expected, || "sums are wrong".to_owned())
}
