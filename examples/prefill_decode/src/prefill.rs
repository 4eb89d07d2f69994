//! A prefill rank: computes the keys and values of prompts, and pushes each layer as soon as it is done.

use anyhow::{Result, bail};
use example_parts::cache::Private;
use xccl::{Communicator, Error, KvSender, KvSenderEvent, PageLayout, PagePair};

use crate::job::{Job, Roles};
use crate::model::{Model, prompt};

/// Serves all requests that are this rank's.
pub fn run(comm: &Communicator, job: &Job) -> Result<()> {
    let (shape, roles) = (job.shape, Roles::of(job));
    let model = Model::new(shape);
    // One prompt at a time: its pages are this rank's own, from 0 on.
    let pages = shape.pages().pages_of(job.longest).max(1);
    let config = job.kv_config();
    let mut sender = KvSender::new(comm, config, PageLayout::by_layer(&config, pages))?;
    let mine = (0..job.requests).filter(|&id| roles.prefill_of(id) == comm.rank()).count();
    let mut served = 0;
    while served < mine {
        let posted = match sender.wait()? {
            KvSenderEvent::Posted(posted) => posted,
            KvSenderEvent::Failed(posted, err) => bail!("request {} failed: {err}", posted.id),
            // A decode rank that has all its answers leaves, others may still have requests.
            KvSenderEvent::Gone(_, Error::PeerLeft { .. }) => continue,
            other => bail!("{other:?}, with {} requests still to come", mine - served),
        };
        // The last token is left to the decode rank: its logits are the first of the answer.
        let tokens = prompt(&shape, posted.id, job.longest);
        let tokens = &tokens[..tokens.len() - 1];
        let theirs = sender.pages(posted.ticket)?;
        let pairs: Vec<PagePair> = theirs.iter().enumerate().map(|(own, &page)| (own as u32, page).into()).collect();
        let table: Vec<u32> = (0..pages as u32).collect();
        let mut cache = Private::new(shape.pages(), pages);
        let push = |layer: usize, cache: &Private| {
            sender.push(posted.ticket, layer, cache.as_bytes(), &pairs)?;
            Ok(())
        };
        model.forward(tokens, 0, &table, &mut cache, |_| Ok(()), push)?;
        served += 1;
    }
    Ok(())
}
