//! An attention rank: asks prefill ranks for the cache of its prompts, and answers them, two micro-batches in turn.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use example_parts::cache::Pool;
use xccl::{Communicator, KvOutcome, KvReceiver, PageLayout, ReduceOp};

use crate::job::{Job, OPEN_LINE};
use crate::model::Decoder;
use crate::schedule::{Exchange, Request, Schedule};
use crate::single::Token;
use crate::timeline::Timeline;

/// A rank without requests looks so often for pages. Meanwhile it holds up the others of its domain, so not for longer.
const IDLE: Duration = Duration::from_millis(1);

/// What a rank has answered, by request, and how it has spent its time.
pub struct Answered {
    pub answers: Vec<(u64, Vec<Token>)>,
    pub timeline: Timeline,
}

/// Answers all requests that are this rank's. `kv` are the attention and prefill ranks, `domain` those attention ranks that send
/// their micro-batches together with this one.
pub fn run(kv: &Communicator, domain: &Communicator, job: &Job, exchange: &impl Exchange) -> Result<Answered> {
    let decoder = Decoder::seeded(job.shape);
    let (mut admission, mut pool) = Admission::new(kv, job)?;
    let mut schedule = Schedule::new(&decoder, exchange, &mut pool, job.seats, job.new);
    let mut answers = vec![];
    for round in 0.. {
        admission.ask()?;
        admission.look()?;
        let is_idle = schedule.active() == 0 && admission.ready.is_empty();
        if is_idle && !admission.is_over() {
            admission.look_for(IDLE)?;
        }
        // The experts wait for all ranks of a domain, so one without requests goes on with empty micro-batches until nobody has
        // any. The ranks ask each other as seldom as tokens come: once in a model's layers.
        if round % job.shape.layers == 0 {
            let has_work = !is_idle || !admission.is_over();
            if !is_needed_by_any(domain, has_work)? {
                break;
            }
        }
        for request in schedule.turns(|| admission.ready.pop_front())? {
            admission.free.extend(&request.table);
            answers.push((request.id, request.answer));
        }
    }
    schedule.finish()?;
    Ok(Answered { answers, timeline: schedule.timeline })
}

/// Whether any rank of the domain has requests.
fn is_needed_by_any(domain: &Communicator, has_work: bool) -> Result<bool> {
    let mut any = [0];
    domain.all_reduce(&[u8::from(has_work)], &mut any, ReduceOp::Max)?;
    Ok(any[0] > 0)
}

/// Requests on their way into a micro-batch.
struct Admission<'a> {
    job: &'a Job,
    receiver: KvReceiver,
    /// Nobody was asked for their cache.
    waiting: VecDeque<u64>,
    /// Their cache is on its way.
    coming: Vec<Request>,
    /// It is there.
    ready: VecDeque<Request>,
    /// Pages of no request.
    free: Vec<u32>,
}

impl<'a> Admission<'a> {
    fn new(kv: &Communicator, job: &'a Job) -> Result<(Self, Pool)> {
        let (config, pages) = (job.kv_config(), job.pages());
        let layout = PageLayout::by_page(&config, pages);
        let bytes = layout.bytes(&config).context("a pool of this size")?;
        let memory = Arc::new(kv.shared_alloc(bytes)?);
        let pool = Pool { memory: memory.clone(), layout, sizes: job.shape.pages() };
        let mut receiver = KvReceiver::new(kv, config, memory, layout)?;
        for prefill in job.prefill_ranks() {
            receiver.post(prefill, OPEN_LINE, &[], 0)?;
        }
        let waiting = job.requests(|id| job.attention_of(id) == kv.rank()).into();
        let free = (0..pages as u32).collect();
        let (coming, ready) = (vec![], VecDeque::new());
        Ok((Admission { job, receiver, waiting, coming, ready, free }, pool))
    }

    /// Nothing is left but what is in the micro-batches.
    fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.coming.is_empty() && self.ready.is_empty()
    }

    /// Asks for the cache of as many prompts as there is room for.
    fn ask(&mut self) -> Result<()> {
        let sizes = self.job.shape.pages();
        while let Some(&id) = self.waiting.front() {
            let text = self.job.prompts[id as usize].clone();
            // The last token is left to this rank: its logits are the first of the answer.
            let (cached, needed) = (text.len() - 1, sizes.pages_of(text.len() + self.job.new));
            if self.free.len() < needed {
                break;
            }
            let table = self.free.split_off(self.free.len() - needed);
            let posted = &table[..sizes.pages_of(cached)];
            let in_last = cached - posted.len().saturating_sub(1) * sizes.page_tokens;
            let from = self.job.prefill_of(id);
            if self.receiver.post(from, id, posted, in_last * sizes.token_bytes())?.is_none() {
                self.free.extend(table);
                break;
            }
            self.waiting.pop_front();
            self.coming.push(Request { id, text, table, answer: vec![] });
        }
        Ok(())
    }

    /// Takes those whose cache is there. Also finds out that a prefill rank has died.
    fn look(&mut self) -> Result<()> {
        while let Some(end) = self.receiver.poll()? {
            match end.outcome {
                KvOutcome::Done => self.ready.extend(self.coming.extract_if(.., |request| request.id == end.id)),
                KvOutcome::Failed(error) => return Err(error.into()),
                KvOutcome::Cancelled => bail!("rank {} has cancelled request {}", end.from, end.id),
            }
        }
        Ok(())
    }

    fn look_for(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while self.ready.is_empty() && Instant::now() < end {
            sleep(time / 10);
            self.look()?;
        }
        Ok(())
    }
}
