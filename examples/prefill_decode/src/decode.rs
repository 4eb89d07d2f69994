//! A decode rank: gets the cache of each prompt from a prefill rank, and goes on from there, for several requests in turn.
//!
//! Its first step waits for the cache layer by layer, while the prefill rank is still at the later ones.

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use example_parts::arithmetic::greedy;
use example_parts::cache::Pool;
use xccl::{Communicator, KvOutcome, KvReceiver, KvTicket, PageLayout};

use crate::job::{Answer, Job, Roles};
use crate::model::{Model, prompt};

/// A request that this rank is at.
struct Active {
    answer: Answer,
    tokens: Vec<u32>,
    /// Its pages: the first ones hold the prompt.
    table: Vec<u32>,
    /// While the prompt's cache is on its way.
    ticket: Option<KvTicket>,
    has_all: bool,
}

/// The most requests that were in flight or being decoded at the same time, and the answers.
pub struct Decoded {
    pub answers: Vec<Answer>,
    pub most_at_once: usize,
}

pub fn run(comm: &Communicator, job: &Job) -> Result<Decoded> {
    let (shape, roles) = (job.shape, Roles::of(job));
    let (model, config) = (Model::new(shape), job.kv_config());
    // Room for some requests, not for all: the others wait until pages are free.
    let pages = job.pages;
    let layout = PageLayout::by_page(&config, pages);
    let bytes = layout.bytes(&config).context("a pool of this size")?;
    let memory = Arc::new(comm.shared_alloc(bytes)?);
    let mut pool = Pool { memory: memory.clone(), layout, sizes: shape.pages() };
    let mut receiver = KvReceiver::new(comm, config, memory, layout)?;

    let mut waiting: VecDeque<u64> = (0..job.requests).filter(|&id| roles.decode_of(id) == comm.rank()).collect();
    let mut free: Vec<u32> = (0..pages as u32).collect();
    let (mut active, mut answers, mut most_at_once): (Vec<Active>, _, _) = (vec![], vec![], 0);
    while !waiting.is_empty() || !active.is_empty() {
        while let Some(&id) = waiting.front() {
            let Some(request) = start(&mut receiver, job, &roles, id, &mut free)? else { break };
            waiting.pop_front();
            active.push(request);
        }
        most_at_once = most_at_once.max(active.len());
        for request in active.iter_mut().filter(|r| r.answer.logits.len() < job.new) {
            step(&model, &receiver, &mut pool, request)?;
        }
        while let Some(end) = receiver.poll()? {
            let KvOutcome::Done = end.outcome else { bail!("request {}: {:?}", end.id, end.outcome) };
            active.iter_mut().filter(|r| r.answer.id == end.id).for_each(|r| r.has_all = true);
        }
        // Pages may be used again when nobody writes them any more.
        let is_over = |r: &mut Active| r.answer.logits.len() == job.new && r.has_all;
        for request in active.extract_if(.., is_over) {
            free.extend(&request.table);
            answers.push(request.answer);
        }
    }
    Ok(Decoded { answers, most_at_once })
}

/// Asks for the cache of a prompt; `None` while there is no room.
fn start(receiver: &mut KvReceiver, job: &Job, roles: &Roles, id: u64, free: &mut Vec<u32>) -> Result<Option<Active>> {
    let sizes = job.shape.pages();
    let tokens = prompt(&job.shape, id, job.longest);
    let (cached, needed) = (tokens.len() - 1, sizes.pages_of(tokens.len() + job.new));
    if free.len() < needed {
        return Ok(None);
    }
    let table = free.split_off(free.len() - needed);
    let posted = &table[..sizes.pages_of(cached)];
    let last = cached - posted.len().saturating_sub(1) * sizes.page_tokens;
    match receiver.post(roles.prefill_of(id), id, posted, last * sizes.token_bytes())? {
        None => {
            free.extend(table);
            Ok(None)
        }
        Some(ticket) => {
            let answer = Answer { id, logits: vec![] };
            Ok(Some(Active { answer, tokens, table, ticket: Some(ticket), has_all: false }))
        }
    }
}

/// One more token of a request, whose cache is there or coming.
fn step(model: &Model, receiver: &KvReceiver, pool: &mut Pool, request: &mut Active) -> Result<()> {
    let ticket = request.ticket.take();
    let last = request.tokens.len() - 1;
    let arrived = |layer: usize| match ticket {
        Some(ticket) => Ok(receiver.wait_layer(ticket, layer)?),
        None => Ok(()),
    };
    let logits = model.forward(&request.tokens[last..], last, &request.table, pool, arrived, |_, _| Ok(()))?;
    request.tokens.push(greedy(&logits));
    request.answer.logits.push(logits);
    Ok(())
}
