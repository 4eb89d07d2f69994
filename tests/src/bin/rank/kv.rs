//! KV pages between processes, one of which may be killed.

use anyhow::{Result, bail, ensure};
use xccl::{
    Communicator, Error, KvConfig, KvOutcome, KvPosted, KvReceiver, KvSender, KvSenderEvent, KvTicket, PageLayout,
};

const REQUESTS: u64 = 40;
const PAGES: usize = 64;

fn config() -> KvConfig {
    KvConfig::new(3, 5000).max_pages(8).max_requests(3)
}

fn byte(sender: usize, layer: usize, page: usize, i: usize) -> u8 {
    (sender * 131 + layer * 57 + page * 29 + i * 7 + (i >> 8)) as u8
}

fn source_of(id: u64, place: usize) -> usize {
    (id as usize * 5 + place) % PAGES
}

/// The first half of the ranks are senders, the others receivers. The scenario names who is killed, if anyone: the first sender,
/// or the last receiver. All requests between the others must end well.
pub(crate) fn transfer(comm: &Communicator, scenario: &str) -> Result<()> {
    let (rank, world) = (comm.rank(), comm.world_size());
    let senders = world / 2;
    let victim = match scenario {
        "kv-all-live" => None,
        "kv-sender-dies" => Some(0),
        "kv-receiver-dies" => Some(world - 1),
        other => bail!("unknown scenario {other:?}"),
    };
    if rank < senders { send(comm, senders, victim) } else { receive(comm, senders, victim) }
}

fn die() -> Result<()> {
    nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL)?;
    Ok(())
}

fn send(comm: &Communicator, senders: usize, victim: Option<usize>) -> Result<()> {
    let (config, rank) = (config(), comm.rank());
    let layout = PageLayout::by_layer(&config, PAGES);
    let mut pool = vec![0; layout.bytes(&config).unwrap_or(0)];
    pool.iter_mut().enumerate().for_each(|(at, b)| {
        let (layer, rest) = (at / layout.layer_stride, at % layout.layer_stride);
        *b = byte(rank, layer, rest / layout.page_stride, rest % layout.page_stride);
    });
    let mut sender = KvSender::new(comm, config, layout)?;
    let mut left = vec![REQUESTS; comm.world_size()];
    left[..senders].fill(0);
    let mut open: Vec<(KvPosted, usize)> = vec![];
    let mut pushes = 0;
    while left.iter().any(|&n| n > 0) {
        let event = if open.is_empty() { Some(sender.wait()?) } else { sender.poll()? };
        match event {
            None => {}
            Some(KvSenderEvent::Posted(posted)) => open.push((posted, 0)),
            Some(KvSenderEvent::Cancelled(posted)) => bail!("{posted:?} was cancelled"),
            Some(KvSenderEvent::Failed(posted, err)) => {
                failed(victim, posted.to, &err)?;
                open.retain(|(open, _)| open.ticket != posted.ticket);
                left[posted.to] = 0;
            }
            Some(KvSenderEvent::Gone(to, err)) if left[to] > 0 => {
                failed(victim, to, &err)?;
                left[to] = 0;
            }
            // Whoever has all it wanted may go.
            Some(KvSenderEvent::Gone(..)) => {}
        }
        // Layer by layer, the requests in turn.
        if open.is_empty() {
            continue;
        }
        let (posted, layer) = open.remove(0);
        let pages = sender.pages(posted.ticket)?.iter().enumerate();
        let pairs: Vec<_> = pages.map(|(place, &page)| (source_of(posted.id, place) as u32, page).into()).collect();
        pushes += 1;
        if victim == Some(rank) && pushes == 50 {
            die()?;
        }
        match sender.push(posted.ticket, layer, &pool, &pairs) {
            Ok(false) => open.push((posted, layer + 1)),
            Ok(true) => left[posted.to] -= 1,
            Err(err) => {
                failed(victim, posted.to, &err)?;
                left[posted.to] = 0;
            }
        }
    }
    Ok(())
}

/// Only requests with the victim may fail, and by its death.
fn failed(victim: Option<usize>, peer: usize, err: &Error) -> Result<()> {
    let is_death = matches!(err, Error::PeerDied { rank, .. } | Error::PeerUnreachable { rank, .. } if *rank == peer);
    ensure!(victim == Some(peer) && is_death, "rank {peer}: {err:?}");
    Ok(())
}

struct Waiting {
    from: usize,
    ticket: KvTicket,
    pages: Vec<u32>,
}

fn receive(comm: &Communicator, senders: usize, victim: Option<usize>) -> Result<()> {
    let (config, rank) = (config(), comm.rank());
    let layout = PageLayout::by_page(&config, PAGES);
    let pool = comm.shared_alloc(layout.bytes(&config).unwrap_or(0))?;
    let mut receiver = KvReceiver::new(comm, config, pool, layout)?;
    let mut free: Vec<u32> = (0..PAGES as u32).collect();
    let mut waiting: Vec<Waiting> = vec![];
    let mut next = vec![0; senders];
    let mut ended = 0;
    while next.iter().any(|&n| n < REQUESTS) || receiver.in_flight() > 0 {
        for (sender, next) in next.iter_mut().enumerate() {
            let id = *next;
            let count = (id as usize * 3 + sender) % (config.max_pages + 1);
            if id == REQUESTS || free.len() < count {
                continue;
            }
            let pages = free.split_off(free.len() - count);
            match receiver.post(sender, id, &pages, last_bytes(id)) {
                // Perhaps its death is known already.
                Err(err) => {
                    failed(victim, sender, &err)?;
                    *next = REQUESTS;
                    free.extend(pages);
                }
                Ok(None) => free.extend(pages),
                Ok(Some(ticket)) => {
                    *next += 1;
                    waiting.push(Waiting { from: sender, ticket, pages });
                    if victim == Some(rank) && ended == 20 {
                        die()?;
                    }
                }
            }
        }
        if receiver.in_flight() == 0 {
            continue;
        }
        if let [first, ..] = &waiting[..]
            && let Err(err) = receiver.wait_layer(first.ticket, 0)
            && !matches!(err, Error::WrongOrder { .. })
        {
            failed(victim, first.from, &err)?;
        }
        let end = receiver.wait()?;
        let at = waiting.iter().position(|w| w.ticket == end.ticket);
        let Some(Waiting { pages, .. }) = at.map(|at| waiting.remove(at)) else { bail!("{end:?} was not posted") };
        match end.outcome {
            KvOutcome::Done => check(&receiver, &config, end.from, end.id, &pages)?,
            KvOutcome::Failed(err) => {
                failed(victim, end.from, &err)?;
                next[end.from] = REQUESTS;
            }
            KvOutcome::Cancelled => bail!("request {} of rank {} was cancelled", end.id, end.from),
        }
        free.extend(pages);
        ended += 1;
    }
    ensure!(free.len() == PAGES, "{} pages are free", free.len());
    Ok(())
}

fn last_bytes(id: u64) -> usize {
    1 + id as usize * 113 % 5000
}

fn check(receiver: &KvReceiver, config: &KvConfig, from: usize, id: u64, pages: &[u32]) -> Result<()> {
    for layer in 0..config.layers {
        for (place, &page) in pages.iter().enumerate() {
            let len = if place + 1 == pages.len() { last_bytes(id) } else { config.page_bytes };
            let mut found = vec![0; len];
            receiver.read_page(layer, page, &mut found)?;
            let source = source_of(id, place);
            let right = found.iter().enumerate().all(|(i, &b)| b == byte(from, layer, source, i));
            ensure!(right, "request {id} from rank {from}: page {place} of layer {layer} is wrong");
        }
    }
    Ok(())
}
