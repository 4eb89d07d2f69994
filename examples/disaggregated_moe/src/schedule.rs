//! What an attention rank does when: two micro-batches take turns, so that one is attended to while the other is at the experts.
//!
//! ```text
//! micro-batch 0   | attention |  at the experts  | attention |  at the experts  |
//! micro-batch 1               | attention |  at the experts  | attention |  at the experts
//! ```
//!
//! A turn of a micro-batch begins with the experts' answers for its last layer and ends with the rows of its next one being sent.
//! After the last layer each request has its next token, and those that are complete make room for others.

use std::time::Instant;

use anyhow::Result;
use example_parts::arithmetic::add;
use example_parts::cache::Cache;

use crate::model::Decoder;
use crate::single::Token;
use crate::timeline::{Doing, Timeline};

/// The routed experts, wherever they are.
pub trait Exchange {
    /// Rows that are with them.
    type Sent;

    /// Sends rows, with the experts of each and how much they count. A micro-batch without rows is sent as well.
    fn send(&self, rows: &[f32], experts: &[i32], weights: &[f32]) -> Result<Self::Sent>;

    /// Waits for the weighted sums of what they answer.
    fn receive(&self, sent: Self::Sent, sums: &mut [f32]) -> Result<()>;
}

/// A request whose prompt's cache is there.
pub struct Request {
    pub id: u64,
    /// The prompt, and the answer as it grows.
    pub text: Vec<u8>,
    /// Its pages.
    pub table: Vec<u32>,
    pub answer: Vec<Token>,
}

struct MicroBatch<S> {
    requests: Vec<Request>,
    /// One for each request: that of its last token.
    rows: Vec<Vec<f32>>,
    /// The layer that they have come to.
    layer: usize,
    /// While they are at the experts.
    away: Option<Away<S>>,
}

struct Away<S> {
    sent: S,
    since: Instant,
}

/// Two micro-batches.
pub struct Schedule<'a, X: Exchange, C: Cache> {
    decoder: &'a Decoder,
    exchange: &'a X,
    cache: &'a mut C,
    /// Requests of a micro-batch, at most.
    seats: usize,
    /// Tokens of an answer.
    new: usize,
    batches: [MicroBatch<X::Sent>; 2],
    pub timeline: Timeline,
}

impl<'a, X: Exchange, C: Cache> Schedule<'a, X, C> {
    pub fn new(decoder: &'a Decoder, exchange: &'a X, cache: &'a mut C, seats: usize, new: usize) -> Self {
        let batches = [(); 2].map(|()| MicroBatch { requests: vec![], rows: vec![], layer: 0, away: None });
        Schedule { decoder, exchange, cache, seats, new, batches, timeline: Timeline::default() }
    }

    /// Requests that have not got their answer.
    pub fn active(&self) -> usize {
        self.batches.iter().map(|batch| batch.requests.len()).sum()
    }

    /// Gives each micro-batch its turn. `next` is asked for requests while there are seats. Gives those that are complete.
    pub fn turns(&mut self, mut next: impl FnMut() -> Option<Request>) -> Result<Vec<Request>> {
        let mut complete = vec![];
        for number in 0..self.batches.len() {
            self.take_answers(number)?;
            let batch = &mut self.batches[number];
            if batch.requests.is_empty() || batch.layer == self.decoder.shape().layers {
                complete.extend(self.end_step(number));
                self.begin_step(number, &mut next);
            }
            self.attend_and_send(number)?;
        }
        Ok(complete)
    }

    /// Takes what is still away: for the end, when there are no requests any more.
    pub fn finish(&mut self) -> Result<()> {
        (0..self.batches.len()).try_for_each(|number| self.take_answers(number))
    }

    fn take_answers(&mut self, number: usize) -> Result<()> {
        let batch = &mut self.batches[number];
        let Some(Away { sent, since }) = batch.away.take() else { return Ok(()) };
        let hidden = self.decoder.shape().hidden;
        let mut sums = vec![0.0; batch.rows.len() * hidden];
        let waited_from = Instant::now();
        self.exchange.receive(sent, &mut sums)?;
        if batch.rows.is_empty() {
            return Ok(());
        }
        self.timeline.add(number, Doing::AtExperts, since);
        self.timeline.waited(waited_from);
        for (row, sum) in batch.rows.iter_mut().zip(sums.chunks_exact(hidden)) {
            add(row, sum);
        }
        batch.layer += 1;
        Ok(())
    }

    /// Every request has its next token.
    fn end_step(&mut self, number: usize) -> Vec<Request> {
        let MicroBatch { requests, rows, .. } = &mut self.batches[number];
        for (request, row) in requests.iter_mut().zip(rows) {
            let token = Token::greedy(&self.decoder.logits(row));
            request.text.push(token.byte);
            request.answer.push(token);
        }
        requests.extract_if(.., |request| request.answer.len() == self.new).collect()
    }

    /// Takes requests in, and starts with the last token of each. The two micro-batches are kept equally full: what is alone has
    /// nothing to overlap with.
    fn begin_step(&mut self, number: usize, mut next: impl FnMut() -> Option<Request>) {
        let others = self.batches[1 - number].requests.len();
        let batch = &mut self.batches[number];
        while batch.requests.len() < self.seats && batch.requests.len() <= others {
            let Some(request) = next() else { break };
            batch.requests.push(request);
        }
        let row = |request: &Request| {
            let last = request.text.len() - 1;
            self.decoder.embed(request.text[last], last)
        };
        batch.rows = batch.requests.iter().map(row).collect();
        batch.layer = 0;
    }

    /// A layer's attention for each request by itself, so that nobody's bits depend on the others. Then its rows go to the experts;
    /// while they are there, the shared expert's answers are computed here.
    fn attend_and_send(&mut self, number: usize) -> Result<()> {
        let other = &self.batches[1 - number];
        let overlaps = other.away.is_some() && !other.rows.is_empty();
        let MicroBatch { requests, rows, layer, away } = &mut self.batches[number];
        let started = Instant::now();
        let (mut given, mut experts, mut weights) = (vec![], vec![], vec![]);
        for (request, row) in requests.iter().zip(rows.iter_mut()) {
            let position = request.text.len() - 1;
            self.decoder.attend(*layer, std::slice::from_mut(row), position, self.cache, &request.table)?;
            let (row, choice) = self.decoder.route(*layer, row);
            given.extend(row);
            experts.extend(choice.iter().map(|&(expert, _)| expert as i32));
            weights.extend(choice.iter().map(|&(_, weight)| weight));
        }
        let since = Instant::now();
        *away = Some(Away { sent: self.exchange.send(&given, &experts, &weights)?, since });
        for (row, given) in rows.iter_mut().zip(given.chunks_exact(self.decoder.shape().hidden)) {
            add(row, &self.decoder.shared(*layer, given));
        }
        if !requests.is_empty() {
            self.timeline.add(number, Doing::Attention, started);
            self.timeline.attended(requests.len(), overlaps);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;

    use example_parts::cache::Private;

    use super::*;
    use crate::model::tests::TINY;
    use crate::model::{Choice, Experts};
    use crate::single;

    /// Experts in this process, which answer when they are asked for it, and a record of what was sent.
    struct Here<'a> {
        experts: &'a Experts,
        rows_sent: RefCell<Vec<usize>>,
        most_away: RefCell<(usize, usize)>,
    }

    impl Exchange for Here<'_> {
        type Sent = (Vec<f32>, Vec<i32>, Vec<f32>);

        fn send(&self, rows: &[f32], experts: &[i32], weights: &[f32]) -> Result<Self::Sent> {
            self.rows_sent.borrow_mut().push(rows.len() / TINY.hidden);
            let (now, most) = *self.most_away.borrow();
            self.most_away.replace((now + 1, most.max(now + 1)));
            Ok((rows.to_vec(), experts.to_vec(), weights.to_vec()))
        }

        fn receive(&self, (rows, experts, weights): Self::Sent, sums: &mut [f32]) -> Result<()> {
            self.most_away.borrow_mut().0 -= 1;
            let choices = experts.chunks_exact(TINY.topk).zip(weights.chunks_exact(TINY.topk));
            let each = rows.chunks_exact(TINY.hidden).zip(sums.chunks_exact_mut(TINY.hidden));
            for ((row, sum), (experts, weights)) in each.zip(choices) {
                let choice: Choice =
                    experts.iter().map(|&expert| expert as usize).zip(weights.iter().copied()).collect();
                sum.copy_from_slice(&self.experts.sum(row, &choice));
            }
            Ok(())
        }
    }

    #[test]
    fn answers_are_those_of_one_process_whatever_shares_their_micro_batch_and_its_neighbour() {
        let (decoder, experts) = (Decoder::seeded(TINY), Experts::all(&TINY));
        let prompts: Vec<&[u8]> = vec![b"one", b"t", b"three of them", b"four", b"and five", b"6", b"seven!"];
        let new = 5;
        let expected: Vec<_> = prompts.iter().map(|p| single::answer(&decoder, &experts, p, new).unwrap()).collect();
        for seats in 1..=4 {
            let sizes = TINY.pages();
            let mut cache = Private::new(sizes, 100);
            let (mut free, mut waiting): (Vec<u32>, VecDeque<Request>) = ((0..100).rev().collect(), VecDeque::new());
            for (id, prompt) in prompts.iter().enumerate() {
                let table = free.split_off(free.len() - sizes.pages_of(prompt.len() + new));
                // The prompt's cache, but for the last token.
                let (_, before) = prompt.split_last().unwrap();
                crate::prefill::fill(&decoder, &experts, before, &table, &mut cache, |_, _| Ok(())).unwrap();
                waiting.push_back(Request { id: id as u64, text: prompt.to_vec(), table, answer: vec![] });
            }
            let here = Here { experts: &experts, rows_sent: RefCell::default(), most_away: RefCell::default() };
            let mut schedule = Schedule::new(&decoder, &here, &mut cache, seats, new);
            let mut complete = 0;
            while complete < prompts.len() {
                for request in schedule.turns(|| waiting.pop_front()).unwrap() {
                    assert_eq!(request.answer, expected[request.id as usize], "{seats} seats, request {}", request.id);
                    complete += 1;
                }
            }
            assert_eq!(schedule.active(), 0);
            let counts = schedule.timeline.counts();
            schedule.finish().unwrap();
            assert_eq!(*here.most_away.borrow(), (0, 2), "both were away at the same time, and neither is any more");
            assert_eq!(here.rows_sent.borrow().iter().copied().max(), Some(seats));
            assert_eq!(counts.rows, (prompts.len() * new * TINY.layers) as u64);
            // Alone was the very first turn, and the end of the last requests.
            let alone = counts.turns - counts.turns_overlapped;
            assert!((1..=1 + (new * TINY.layers) as u64).contains(&alone), "{seats} seats: {counts:?}");
        }
    }
}
