//! A prefill rank: computes the keys and values of prompts, with a whole model of its own, and pushes each layer as soon as it is
//! done.

use anyhow::{Result, bail};
use example_parts::arithmetic::add;
use example_parts::cache::{Cache, Private};
use xccl::{Communicator, Error, KvPosted, KvSender, KvSenderEvent, PageLayout, PagePair};

use crate::job::{Job, OPEN_LINE};
use crate::model::{Decoder, Experts};

/// Serves requests until all attention ranks have what they want. `kv` are the attention and prefill ranks.
pub fn run(kv: &Communicator, job: &Job) -> Result<()> {
    let (decoder, experts) = (Decoder::seeded(job.shape), Experts::all(&job.shape));
    // One prompt at a time: its pages are this rank's own, from 0 on.
    let (pages, config) = (job.longest(), job.kv_config());
    let mut sender = KvSender::new(kv, config, PageLayout::by_layer(&config, pages))?;
    let mut serves: Vec<usize> = (0..job.attention_ranks()).collect();
    while !serves.is_empty() {
        let event = match sender.wait() {
            // Attention ranks may have enough to do for longer than any deadline.
            Err(Error::Timeout { .. }) => continue,
            event => event?,
        };
        match event {
            // Nothing is to be done for it.
            KvSenderEvent::Posted(posted) if posted.id == OPEN_LINE => {}
            KvSenderEvent::Posted(posted) => serve(&mut sender, job, &decoder, &experts, &posted)?,
            // It has all its answers. Or it could not go on: then the last barrier tells.
            KvSenderEvent::Cancelled(KvPosted { to, .. })
            | KvSenderEvent::Failed(KvPosted { to, .. }, Error::PeerLeft { .. })
            | KvSenderEvent::Gone(to, Error::PeerLeft { .. }) => serves.retain(|&rank| rank != to),
            KvSenderEvent::Failed(_, error) | KvSenderEvent::Gone(_, error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Computes the cache of a prompt and pushes it into the pages that an attention rank has posted for it.
fn serve(sender: &mut KvSender, job: &Job, decoder: &Decoder, experts: &Experts, posted: &KvPosted) -> Result<()> {
    let Some((_, before)) = job.prompts.get(posted.id as usize).and_then(|prompt| prompt.split_last()) else {
        bail!("rank {} asks for request {}, which does not exist", posted.to, posted.id);
    };
    let theirs = sender.pages(posted.ticket)?;
    let pairs: Vec<PagePair> = theirs.iter().enumerate().map(|(own, &page)| (own as u32, page).into()).collect();
    let table: Vec<u32> = (0..pairs.len() as u32).collect();
    let mut cache = Private::new(job.shape.pages(), job.longest());
    fill(decoder, experts, before, &table, &mut cache, |layer, cache| {
        sender.push(posted.ticket, layer, cache.as_bytes(), &pairs)?;
        Ok(())
    })
}

/// Computes keys and values of a text; `after` is called when a layer's are in the cache.
pub fn fill<C: Cache>(
    decoder: &Decoder,
    experts: &Experts,
    text: &[u8],
    table: &[u32],
    cache: &mut C,
    mut after: impl FnMut(usize, &C) -> Result<()>,
) -> Result<()> {
    let mut rows: Vec<Vec<f32>> = text.iter().enumerate().map(|(i, &token)| decoder.embed(token, i)).collect();
    for layer in 0..decoder.shape().layers {
        decoder.attend(layer, &mut rows, 0, cache, table)?;
        after(layer, cache)?;
        for row in &mut rows {
            let (given, choice) = decoder.route(layer, row);
            add(row, &decoder.shared(layer, &given));
            add(row, &experts.sum(&given, &choice));
        }
    }
    Ok(())
}
