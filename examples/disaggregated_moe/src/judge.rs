//! Rank 0 collects what the attention ranks have answered, and compares it with what one process answers.

use anyhow::{Result, bail, ensure};
use xccl::Communicator;

use crate::attention::Answered;
use crate::job::Job;
use crate::model::{Decoder, Experts};
use crate::single::{self, Token};
use crate::timeline::Counts;

const TAG: u32 = 1;
/// Bytes of a token in a message.
const TOKEN: usize = 1 + size_of::<u64>();

/// What all attention ranks have done, as rank 0 knows it.
pub struct Collected {
    /// By request.
    answers: Vec<Vec<Token>>,
    /// By attention rank.
    counts: Vec<Counts>,
    /// Of rank 0.
    picture: String,
}

/// Brings all answers to rank 0, which is an attention rank.
pub fn collect(world: &Communicator, job: &Job, answered: Option<Answered>) -> Result<Option<Collected>> {
    let Some(mut answered) = answered else { return Ok(None) };
    answered.answers.sort_by_key(|&(id, _)| id);
    let counts = answered.timeline.counts();
    if world.rank() != 0 {
        let tokens = answered.answers.iter().flat_map(|(_, answer)| answer);
        let tokens = tokens.flat_map(|token| [&[token.byte], token.digest.to_le_bytes().as_slice()].concat());
        let message: Vec<u8> = bytemuck::bytes_of(&counts).iter().copied().chain(tokens).collect();
        world.send(0, TAG, &message)?;
        return Ok(None);
    }
    let mut collected = Collected {
        answers: vec![vec![]; job.prompts.len()],
        counts: vec![counts],
        picture: answered.timeline.picture(),
    };
    for (id, answer) in answered.answers {
        collected.answers[id as usize] = answer;
    }
    for rank in 1..job.attention_ranks() {
        let ids = job.requests(|id| job.attention_of(id) == rank);
        let mut message = vec![0; size_of::<Counts>() + ids.len() * job.new * TOKEN];
        let got = world.recv(rank, TAG, &mut message)?.len;
        ensure!(got == message.len(), "rank {rank} sent {got} bytes of answers, expected {}", message.len());
        let (counts, tokens) = message.split_at(size_of::<Counts>());
        collected.counts.push(bytemuck::pod_read_unaligned(counts));
        let (tokens, _) = tokens.as_chunks::<TOKEN>();
        for (id, tokens) in ids.into_iter().zip(tokens.chunks_exact(job.new)) {
            let token = |&[byte, ref digest @ ..]: &[u8; TOKEN]| Token { byte, digest: u64::from_le_bytes(*digest) };
            collected.answers[id as usize] = tokens.iter().map(token).collect();
        }
    }
    Ok(Some(collected))
}

impl Collected {
    /// Changes a bit of an answer.
    pub fn spoil(&mut self) {
        self.answers.iter_mut().flatten().take(1).for_each(|token| token.digest ^= 1);
    }

    /// Prints what was done, and how the two micro-batches overlapped.
    pub fn report(&self, job: &Job) {
        let tokens: usize = job.prompts.iter().map(Vec::len).sum();
        println!("{} prompts of {tokens} tokens, {} new ones each", job.prompts.len(), job.new);
        print!("{}", self.picture);
        for (rank, counts) in self.counts.iter().enumerate() {
            let Counts { turns, turns_overlapped, rows, attention, waiting } = counts;
            println!(
                "attention rank {rank}: {turns} turns of {:.1} rows, {turns_overlapped} of them while the other micro-batch was \
                 at the experts; {:.1} ms of attention, {:.1} ms of waiting for experts",
                *rows as f64 / (*turns).max(1) as f64,
                *attention as f64 / 1e3,
                *waiting as f64 / 1e3,
            );
        }
    }

    /// Compares all answers with those of one process.
    pub fn judge(&self, job: &Job) -> Result<()> {
        let (decoder, experts) = (Decoder::seeded(job.shape), Experts::all(&job.shape));
        for (id, (prompt, ours)) in job.prompts.iter().zip(&self.answers).enumerate() {
            let alone = single::answer(&decoder, &experts, prompt, job.new)?;
            ensure!(ours.len() == alone.len(), "request {id} has {} tokens, expected {}", ours.len(), alone.len());
            if let Some((n, (ours, alone))) = ours.iter().zip(&alone).enumerate().find(|(_, (a, b))| a != b) {
                bail!("answers differ: request {id}, token {n}: {ours:?} by the ranks and {alone:?} by one process");
            }
        }
        let Job { prefill, domains, attention, experts, .. } = job;
        println!(
            "tokens and logits agree bit for bit with one process ({prefill} prefill ranks, {domains} x {attention} attention \
             ranks, {experts} expert ranks)"
        );
        Ok(())
    }
}
