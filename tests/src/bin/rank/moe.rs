//! Exchanges against a plain reference, which is written without the library.

use anyhow::{Result, ensure};
use half::{bf16, f16};
use xccl::placement::Placement;
use xccl::{Communicator, DType, Element, Error, Exchange, ExpertBatch, Moe, MoeConfig, Reduction, Routing};

/// A shape and what the ranks put in: the same wherever it is computed.
pub(crate) struct Case {
    pub(crate) config: MoeConfig,
    pub(crate) world: usize,
    pub(crate) seed: usize,
}

impl Case {
    pub(crate) fn tokens(&self, rank: usize) -> usize {
        (rank * 5 + self.seed * 3) % (self.config.max_tokens + 1)
    }

    fn value<E: Element>(&self, rank: usize, token: usize, column: usize) -> E {
        E::from_f32(((rank * 37 + token * 11 + column * 3 + self.seed) % 97) as f32 / 8.0 - 6.0)
    }

    /// Every fifth choice names no expert.
    fn id(&self, rank: usize, token: usize, k: usize) -> i64 {
        let first = rank * 7 + token * 13 + self.seed;
        if (first + k).is_multiple_of(5) { -1 } else { ((first + k * 3) % self.config.experts) as i64 }
    }

    fn weight(&self, rank: usize, token: usize, k: usize) -> f32 {
        ((rank + token + k) % 9) as f32 * 0.3 - 1.0
    }

    fn is_active(&self, token: usize) -> bool {
        token % 4 != 3
    }

    /// What expert `expert` makes of an element.
    pub(crate) fn expert<E: Element>(&self, expert: i64, x: E) -> E {
        E::from_f32(x.to_f32() * (expert % 7 + 1) as f32 + 0.125)
    }

    /// A token's sum.
    fn sum<E: Element>(&self, homes: &Homes, rank: usize, token: usize, column: usize) -> E {
        if !self.is_active(token) {
            return E::from_f32(0.0);
        }
        let ids: Vec<i64> = (0..self.config.topk).map(|k| self.id(rank, token, k)).collect();
        let x = self.value::<E>(rank, token, column);
        homes.sum(self.config.reduction, rank, &ids, |k| self.weight(rank, token, k) * self.expert(ids[k], x).to_f32())
    }

    pub(crate) fn input<E: Element>(&self, rank: usize) -> (Vec<E>, Vec<i64>, Vec<f32>, Vec<bool>) {
        let tokens = 0..self.tokens(rank);
        let choices = || tokens.clone().flat_map(|t| (0..self.config.topk).map(move |k| (t, k)));
        (
            tokens.clone().flat_map(|t| (0..self.config.hidden).map(move |c| self.value(rank, t, c))).collect(),
            choices().map(|(t, k)| self.id(rank, t, k)).collect(),
            choices().map(|(t, k)| self.weight(rank, t, k)).collect(),
            tokens.clone().map(|t| self.is_active(t)).collect(),
        )
    }

    /// (expert, source, token) of each row that `rank`'s experts should get, in the batch's order.
    pub(crate) fn rows(&self, experts: &[usize]) -> Vec<(usize, usize, usize)> {
        let mut rows = vec![];
        for &expert in experts {
            for source in 0..self.world {
                for token in (0..self.tokens(source)).filter(|&t| self.is_active(t)) {
                    if (0..self.config.topk).any(|k| self.id(source, token, k) == expert as i64) {
                        rows.push((expert, source, token));
                    }
                }
            }
        }
        rows
    }
}

/// Where experts and ranks are.
pub(crate) struct Homes {
    /// By rank.
    experts: Vec<Vec<usize>>,
    nodes: Vec<usize>,
}

impl Homes {
    /// A token's sum, in the plainest way: of `term(k)` for each `ids[k]` that names an expert. Of its own node come the terms in
    /// ascending k, or with [`Reduction::PerRank`] the sums of its ranks; of each other node one sum. What a rank or a node
    /// sums is in ascending order and rounded.
    pub(crate) fn sum<E: Element>(
        &self,
        reduction: Reduction,
        rank: usize,
        ids: &[i64],
        term: impl Fn(usize) -> f32,
    ) -> E {
        let named = |&expert: &usize| ids.iter().position(|&id| id == expert as i64);
        let of_rank = |r: usize| self.experts[r].iter().filter_map(named).map(&term);
        let rounded =
            |terms: &mut dyn Iterator<Item = f32>| terms.reduce(|a, b| a + b).map(|s| E::from_f32(s).to_f32());
        let on = |node: usize| (0..self.nodes.len()).filter(move |&r| self.nodes[r] == node);
        let home = self.nodes[rank];
        let mut sum = 0.0f32;
        match reduction {
            Reduction::PerExpert => {
                let is_near = |id: i64| on(home).any(|r| self.experts[r].iter().any(|&e| e as i64 == id));
                (0..ids.len()).filter(|&k| is_near(ids[k])).for_each(|k| sum += term(k));
            }
            Reduction::PerRank => on(home).filter_map(|r| rounded(&mut of_rank(r))).for_each(|s| sum += s),
        }
        for node in (0..self.nodes.len()).filter(|&node| node != home) {
            let partial = match reduction {
                Reduction::PerExpert => rounded(&mut on(node).flat_map(of_rank)),
                Reduction::PerRank => rounded(&mut on(node).filter_map(|r| rounded(&mut of_rank(r)))),
            };
            sum += partial.unwrap_or(0.0);
        }
        E::from_f32(sum)
    }

    pub(crate) fn of(comm: &Communicator, moe: &Moe) -> Result<Self> {
        let experts = (0..comm.world_size()).map(|r| moe.experts_of(r));
        let nodes = (0..comm.world_size()).map(|r| comm.node_of(r));
        Ok(Homes { experts: experts.collect::<Result<_, _>>()?, nodes: nodes.collect::<Result<_, _>>()? })
    }
}

/// How the experts' side takes the rows and hands its outputs in.
#[derive(Clone, Copy)]
pub(crate) enum Form {
    InPlace,
    ExpertMajor,
    Padded,
    /// In place, in the order of arrival.
    BySource,
    /// All outputs written to the outbox at once.
    Matrix,
    /// As `Matrix`, and the sums formed here.
    Sums,
}

pub(crate) fn moe_in_every_form(comm: &Communicator) -> Result<()> {
    fn cases<E: Element>(comm: &Communicator) -> Result<()> {
        let shape = |hidden, placement| MoeConfig { placement, ..MoeConfig::new(9, hidden, 3, 11, E::DTYPE) };
        let uneven: Vec<usize> = (0..11).map(|e| (e * e) % comm.world_size()).collect();
        let uneven = Placement::of_ranks(&uneven, comm.world_size())?;
        let per_rank = |config: MoeConfig| MoeConfig { reduction: Reduction::PerRank, ..config };
        let uneven = || Some(uneven.clone());
        for (config, form) in [
            (shape(100, None), Form::InPlace),
            (shape(64, uneven()), Form::ExpertMajor),
            (shape(333, None), Form::Padded),
            (shape(100, uneven()), Form::BySource),
            (shape(99, None), Form::Matrix),
            (per_rank(shape(100, None)), Form::InPlace),
            (per_rank(shape(64, uneven())), Form::ExpertMajor),
            (per_rank(shape(333, None)), Form::BySource),
            (per_rank(shape(99, uneven())), Form::Sums),
        ] {
            let moe = Moe::new(comm, config.clone())?;
            for seed in 0..6 {
                let case = Case { config: config.clone(), world: comm.world_size(), seed };
                exchange::<E>(comm, &moe, &case, form)?;
            }
        }
        Ok(())
    }
    cases::<f32>(comm)?;
    cases::<bf16>(comm)?;
    cases::<f16>(comm)
}

pub(crate) fn exchange<E: Element>(comm: &Communicator, moe: &Moe, case: &Case, form: Form) -> Result<()> {
    let (rank, hidden) = (comm.rank(), case.config.hidden);
    let (tokens, ids, weights, active) = case.input::<E>(rank);
    // Both widths of ids, and both places for the tokens.
    let narrow: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    let sent = if case.seed.is_multiple_of(2) {
        moe.dispatch_send(&tokens, &Routing::new(&ids, &weights).active(&active))?
    } else {
        let mut rows = moe.input_rows::<E>(case.tokens(rank))?;
        for t in 0..rows.len() {
            rows.row(t).copy_from_slice(&tokens[t * hidden..(t + 1) * hidden]);
        }
        moe.dispatch_send_rows(rows, &Routing::new(&narrow, &weights).active(&active))?
    };
    let batch = match form {
        Form::BySource => Some(by_source::<E>(moe, case, &sent)?),
        _ => None,
    };
    let mut batch = match batch {
        Some(batch) => batch,
        None => moe.dispatch_recv(&sent)?,
    };
    let expected = case.rows(batch.local_experts());
    let found: Vec<_> = batch.rows().map(|r| (batch.local_experts()[r.expert], r.source, r.token)).collect();
    ensure!(found == expected, "rows are {found:?}, expected {expected:?}");
    let row_of = |source, token| (0..hidden).map(move |c| case.value::<E>(source, token, c)).collect::<Vec<E>>();
    let bytes = |row: &[E]| bytemuck::cast_slice::<E, u8>(row).to_vec();
    match form {
        Form::InPlace => {
            for (i, &(expert, source, token)) in expected.iter().enumerate() {
                // SAFETY: the senders keep the protocol: this program is all ranks.
                let row = unsafe { batch.row_slice::<E>(i)? }.to_vec();
                ensure!(bytes(&row) == bytes(&row_of(source, token)), "row {i} differs in place");
                let output = batch.output_row::<E>(i)?;
                output.iter_mut().zip(row).for_each(|(y, x)| *y = case.expert(expert as i64, x));
            }
            moe.combine_send(batch)?;
        }
        Form::BySource => {
            let refused = batch.output_matrix::<E>().map(|_| ());
            ensure!(matches!(refused, Err(Error::WrongOrder { .. })), "{refused:?}");
            moe.combine_send(batch)?;
        }
        Form::Matrix | Form::Sums => {
            let outputs: Vec<E> = expected
                .iter()
                .flat_map(|&(expert, source, token)| {
                    row_of(source, token).into_iter().map(move |x| case.expert(expert as i64, x))
                })
                .collect();
            let matrix = batch.output_matrix::<E>()?;
            for (to, from) in matrix.chunks_exact_mut(moe.row_stride()).zip(outputs.chunks_exact(hidden)) {
                to[..hidden].copy_from_slice(from);
            }
            if matches!(form, Form::Matrix) {
                let refused = batch.sum_row::<E>(0).map(|_| ());
                ensure!(matches!(refused, Err(Error::WrongOrder { .. })), "{refused:?}");
                moe.combine_send(batch)?;
            } else {
                form_sums(&mut batch, &outputs, hidden)?;
                moe.combine_send_sums(batch)?;
            }
        }
        Form::ExpertMajor | Form::Padded => {
            let capacity = batch.counts().iter().copied().max().unwrap_or(0) as usize;
            let (align, padded) = (4, matches!(form, Form::Padded));
            let rows = if padded { batch.counts().len() * capacity } else { batch.aligned_rows(align) };
            let mut copied = vec![E::from_f32(-1.0); rows * hidden];
            if padded {
                batch.copy_padded(&mut copied, capacity)?;
                if capacity > 0 {
                    let too_small = batch.copy_padded(&mut copied, capacity - 1);
                    ensure!(matches!(too_small, Err(Error::CapacityExceeded { .. })), "{too_small:?}");
                }
            } else {
                batch.copy_into(&mut copied, align)?;
            }
            let (mut at, mut outputs) = (0, vec![]);
            for (e, &count) in batch.counts().iter().enumerate() {
                let begin = if padded { e * capacity } else { at };
                at += (count as usize).next_multiple_of(align);
                for i in 0..count as usize {
                    let (expert, source, token) = expected[batch.offsets()[e] as usize + i];
                    let row = &copied[(begin + i) * hidden..][..hidden];
                    ensure!(bytes(row) == bytes(&row_of(source, token)), "row {i} of expert {expert} differs");
                    outputs.extend(row.iter().map(|&x| case.expert(expert as i64, x)));
                }
            }
            moe.combine_send_from(batch, &outputs)?;
        }
    }
    let mut out = vec![E::from_f32(f32::NAN); tokens.len()];
    moe.combine_recv(sent, &mut out)?;
    let homes = Homes::of(comm, moe)?;
    for (i, y) in out.iter().enumerate() {
        let (token, column) = (i / hidden, i % hidden);
        let expected: E = case.sum(&homes, rank, token, column);
        ensure!(
            bytemuck::bytes_of(y) == bytemuck::bytes_of(&expected),
            "element {i}: {} instead of {}",
            y.to_f32(),
            expected.to_f32()
        );
    }
    Ok(())
}

/// Computes each row as it arrives, then gives all of them as a batch.
fn by_source<'m, E: Element>(moe: &'m Moe, case: &Case, sent: &Exchange<'m>) -> Result<ExpertBatch<'m>> {
    let mut arrivals = moe.dispatch_recv_by_source(sent)?;
    let mut row = vec![E::from_f32(0.0); case.config.hidden];
    let mut seen = vec![];
    while let Some(source) = arrivals.next_source()? {
        ensure!(!seen.contains(&source), "source {source} twice");
        seen.push(source);
        for i in arrivals.rows_of(source) {
            let described = arrivals.row(i);
            ensure!(described.source == source, "row {i} of source {source} is {described:?}");
            arrivals.copy_row(i, &mut row)?;
            for (c, x) in row.iter().enumerate() {
                let sent = case.value::<E>(source, described.token, c);
                ensure!(x.to_f32() == sent.to_f32(), "row {i} of source {source} differs");
            }
            let expert = arrivals.local_experts()[described.expert] as i64;
            arrivals.output_row::<E>(i)?.iter_mut().zip(&row).for_each(|(y, &x)| *y = case.expert(expert, x));
        }
    }
    Ok(arrivals.into_batch()?)
}

/// What the library does with `Reduction::PerRank`, by hand.
fn form_sums<E: Element>(batch: &mut ExpertBatch<'_>, outputs: &[E], hidden: usize) -> Result<()> {
    let sums: Vec<Vec<(usize, f32)>> = batch.sums().map(|sum| sum.rows().collect()).collect();
    for (i, rows) in sums.into_iter().enumerate() {
        let mut sum = vec![0.0f32; hidden];
        for (row, weight) in rows {
            sum.iter_mut().zip(&outputs[row * hidden..]).for_each(|(s, y)| *s += weight * y.to_f32());
        }
        batch.sum_row::<E>(i)?.iter_mut().zip(sum).for_each(|(y, s)| *y = E::from_f32(s));
    }
    Ok(())
}

/// Sends 1, 2, then finishes 1, sends 3, and so on: always two in flight, the third refused.
pub(crate) fn two_exchanges_in_flight(comm: &Communicator) -> Result<()> {
    let config = MoeConfig::new(4, 16, 1, comm.world_size() * 2, DType::F32);
    let moe = Moe::new(comm, config)?;
    let experts = comm.world_size() as i32 * 2;
    let send = |n: i32| {
        let tokens = vec![(n * 10 + comm.rank() as i32) as f32; 16 * 2];
        moe.dispatch_send(&tokens, &Routing::new(&[n % experts, (n + 3) % experts], &[1.0, 2.0]))
    };
    let finish = |n: i32, sent: xccl::Exchange<'_>| -> Result<()> {
        let mut batch = moe.dispatch_recv(&sent)?;
        let mut row = [0.0f32; 16];
        for i in 0..batch.len() {
            batch.copy_row(i, &mut row)?;
            let source = batch.row(i).source as i32;
            ensure!(row == [(n * 10 + source) as f32; 16], "exchange {n} holds {row:?} of rank {source}");
            batch.output_row::<f32>(i)?.copy_from_slice(&row);
        }
        moe.combine_send(batch)?;
        let mut out = [0.0f32; 32];
        moe.combine_recv(sent, &mut out)?;
        let value = (n * 10 + comm.rank() as i32) as f32;
        ensure!(out[0] == value && out[31] == 2.0 * value, "exchange {n} gave {out:?}");
        Ok(())
    };
    let mut previous = (0, send(0)?);
    for n in 1..60 {
        let next = (n, send(n)?);
        let third = send(n + 1).map(|_| ());
        ensure!(matches!(third, Err(Error::TooManyInFlight { limit: 2, .. })), "{third:?}");
        finish(previous.0, previous.1)?;
        previous = next;
    }
    finish(previous.0, previous.1)?;
    ensure!(comm.statistics().exchanges == 60, "{:?}", comm.statistics());
    Ok(())
}

/// Fills each row's output with what its expert makes of it.
fn compute(case: &Case, batch: &mut ExpertBatch<'_>) -> Result<()> {
    let mut row = vec![0.0f32; case.config.hidden];
    for i in 0..batch.len() {
        batch.copy_row(i, &mut row)?;
        let expert = batch.local_experts()[batch.row(i).expert] as i64;
        batch.output_row::<f32>(i)?.iter_mut().zip(&row).for_each(|(y, &x)| *y = case.expert(expert, x));
    }
    Ok(())
}

/// Receives the combined tokens and compares them with the reference.
fn check_sums(comm: &Communicator, moe: &Moe, case: &Case, sent: Exchange<'_>) -> Result<()> {
    let (hidden, epoch) = (case.config.hidden, sent.epoch());
    let mut out = vec![f32::NAN; case.tokens(comm.rank()) * hidden];
    moe.combine_recv(sent, &mut out)?;
    let homes = Homes::of(comm, moe)?;
    for (i, y) in out.iter().enumerate() {
        let expected = case.sum::<f32>(&homes, comm.rank(), i / hidden, i % hidden);
        ensure!(y.to_bits() == expected.to_bits(), "exchange {epoch}, element {i}: {y} instead of {expected}");
    }
    Ok(())
}

/// The halves two by two, also beside an exchange whose halves are called one by one.
pub(crate) fn the_joined_calls(comm: &Communicator) -> Result<()> {
    let config = MoeConfig::new(7, 50, 3, 10, DType::F32);
    let moe = Moe::new(comm, config.clone())?;
    for seed in 0..8 {
        let case = |seed| Case { config: config.clone(), world: comm.world_size(), seed };
        let (one, other) = (case(seed), case(seed + 1));
        let (tokens, ids, weights, active) = other.input::<f32>(comm.rank());
        let slowly = moe.dispatch_send(&tokens, &Routing::new(&ids, &weights).active(&active))?;
        let (tokens, ids, weights, active) = one.input::<f32>(comm.rank());
        let (sent, mut batch) = moe.dispatch(&tokens, &Routing::new(&ids, &weights).active(&active))?;
        compute(&one, &mut batch)?;
        let mut out = vec![f32::NAN; tokens.len()];
        moe.combine(sent, batch, &mut out)?;
        for (i, y) in out.iter().enumerate() {
            let expected = one.sum::<f32>(&Homes::of(comm, &moe)?, comm.rank(), i / 50, i % 50);
            ensure!(y.to_bits() == expected.to_bits(), "seed {seed}, element {i}: {y} instead of {expected}");
        }
        let mut batch = moe.dispatch_recv(&slowly)?;
        compute(&other, &mut batch)?;
        moe.combine_send(batch)?;
        check_sums(comm, &moe, &other, slowly)?;
    }
    Ok(())
}

/// One routing serves fifty exchanges, two of them in flight, their halves interleaved.
pub(crate) fn one_routing_serves_many_exchanges(comm: &Communicator) -> Result<()> {
    let config = MoeConfig::new(7, 50, 3, 10, DType::F32);
    let moe = Moe::new(comm, config.clone())?;
    let case = Case { config, world: comm.world_size(), seed: 2 };
    let (tokens, ids, weights, active) = case.input::<f32>(comm.rank());
    let routing = Routing::new(&ids, &weights).active(&active);
    for _ in 0..25 {
        let first = moe.dispatch_send(&tokens, &routing)?;
        let second = moe.dispatch_send(&tokens, &routing)?;
        let mut first_batch = moe.dispatch_recv(&first)?;
        let mut second_batch = moe.dispatch_recv(&second)?;
        compute(&case, &mut second_batch)?;
        compute(&case, &mut first_batch)?;
        moe.combine_send(first_batch)?;
        moe.combine_send(second_batch)?;
        // Either may be taken first.
        if comm.rank().is_multiple_of(2) {
            check_sums(comm, &moe, &case, second)?;
            check_sums(comm, &moe, &case, first)?;
        } else {
            check_sums(comm, &moe, &case, first)?;
            check_sums(comm, &moe, &case, second)?;
        }
    }
    ensure!(comm.statistics().exchanges == 50, "{:?}", comm.statistics());
    Ok(())
}

/// The last rank hands in the second exchange's outputs before the first one's: whether that is refused or not, nobody may
/// take outputs of the first exchange that were not handed in yet.
pub(crate) fn the_later_exchange_is_combined_first(comm: &Communicator) -> Result<()> {
    let config = MoeConfig::new(5, 40, 2, 8, DType::F32);
    let moe = Moe::new(comm, config.clone())?;
    let case = |seed| Case { config: config.clone(), world: comm.world_size(), seed };
    let (one, two) = (case(1), case(3));
    let send = |case: &Case| -> Result<_> {
        let (tokens, ids, weights, active) = case.input::<f32>(comm.rank());
        Ok(moe.dispatch_send(&tokens, &Routing::new(&ids, &weights).active(&active))?)
    };
    let (first, second) = (send(&one)?, send(&two)?);
    let mut first_batch = moe.dispatch_recv(&first)?;
    let mut second_batch = moe.dispatch_recv(&second)?;
    let is_late = comm.rank() + 1 == comm.world_size();
    let mut handed_in = Ok(());
    compute(&two, &mut second_batch)?;
    if is_late {
        handed_in = moe.combine_send(second_batch);
        // The others wait for the first exchange meanwhile.
        std::thread::sleep(std::time::Duration::from_millis(300));
        compute(&one, &mut first_batch)?;
        moe.combine_send(first_batch)?;
    } else {
        compute(&one, &mut first_batch)?;
        moe.combine_send(first_batch)?;
        moe.combine_send(second_batch)?;
    }
    check_sums(comm, &moe, &one, first)?;
    match handed_in {
        Ok(()) if is_late => check_sums(comm, &moe, &two, second)?,
        Ok(()) => match check_sums(comm, &moe, &two, second) {
            Err(err) if matches!(err.downcast_ref(), Some(Error::PeerAbandoned { epoch: 2, .. })) => {}
            other => other?,
        },
        Err(err) => ensure!(matches!(err, Error::WrongOrder { call: "combine_send", epoch: 2, .. }), "{err:?}"),
    }
    Ok(())
}
