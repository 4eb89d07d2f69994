//! KV pages from the first half of the ranks to the second. The death of a rank ends its own requests; the others' go on.

use rand::Rng;
use rand::rngs::StdRng;
use xccl::{
    Communicator, Error, KvConfig, KvOutcome, KvPosted, KvReceiver, KvSender, KvSenderEvent, KvTicket, PageLayout,
};

use super::{Fault, Played, byte, check};

const PAGES: usize = 16;
const LAYERS: usize = 2;
const PAGE: usize = 900;

pub fn transfer(comm: &Communicator, rng: &mut StdRng) -> Played {
    let (salt, requests): (u64, u64) = (rng.random(), rng.random_range(1..6));
    let senders = comm.world_size() / 2;
    let config = KvConfig::new(LAYERS, PAGE).max_pages(5).max_requests(2);
    let first = match comm.rank() < senders {
        true => send(comm, config, (senders, requests), salt)?,
        false => receive(comm, config, (senders, requests), salt)?,
    };
    // What was told of one pair is everybody's business now.
    match first {
        Some(err) => Err(err.into()),
        None => Ok(comm.barrier()?),
    }
}

fn pages_of(id: u64, sender: usize) -> usize {
    (id as usize * 3 + sender) % 6
}

fn last_bytes(id: u64) -> usize {
    1 + id as usize * 113 % PAGE
}

/// The end of a rank ends what is between the two; anything else does not belong here.
fn ended(peer: usize, err: Error, first: &mut Option<Error>) -> Played {
    match err {
        Error::PeerDied { rank, .. } | Error::PeerUnreachable { rank, .. } if rank == peer => {
            first.get_or_insert(err);
            Ok(())
        }
        // It has heard of a death elsewhere, and gone. Of whose, the barrier says.
        Error::PeerLeft { rank, .. } if rank == peer => Ok(()),
        other => Err(other.into()),
    }
}

fn send(comm: &Communicator, config: KvConfig, (senders, requests): (usize, u64), salt: u64) -> Played<Option<Error>> {
    let layout = PageLayout::by_layer(&config, PAGES);
    let pool: Vec<u8> = (0..LAYERS * PAGES * PAGE).map(|i| byte(salt, comm.rank(), 0, i)).collect();
    let mut sender = KvSender::new(comm, config, layout)?;
    let mut left = vec![requests; comm.world_size()];
    left[..senders].fill(0);
    let (mut open, mut first): (Vec<(KvPosted, usize)>, _) = (vec![], None);
    while left.iter().any(|&n| n > 0) {
        let event = if open.is_empty() { Some(sender.wait()?) } else { sender.poll()? };
        match event {
            None => {}
            Some(KvSenderEvent::Posted(posted)) => open.push((posted, 0)),
            Some(KvSenderEvent::Cancelled(posted)) => {
                open.retain(|(open, _)| open.ticket != posted.ticket);
                left[posted.to] -= 1;
            }
            Some(KvSenderEvent::Failed(posted, err)) => {
                ended(posted.to, err, &mut first)?;
                open.retain(|(open, _)| open.ticket != posted.ticket);
                left[posted.to] = 0;
            }
            Some(KvSenderEvent::Gone(to, err)) => {
                if left[to] > 0 {
                    ended(to, err, &mut first)?;
                }
                left[to] = 0;
            }
        }
        if open.is_empty() {
            continue;
        }
        let (posted, layer) = open.remove(0);
        let pages = sender.pages(posted.ticket)?.iter().enumerate();
        let pairs: Vec<_> =
            pages.map(|(place, &page)| ((posted.id as u32 * 5 + place as u32) % PAGES as u32, page).into()).collect();
        match sender.push(posted.ticket, layer, &pool, &pairs) {
            Ok(false) => open.push((posted, layer + 1)),
            Ok(true) => left[posted.to] -= 1,
            Err(Error::KvCancelled { .. }) => left[posted.to] -= 1,
            Err(err) => {
                ended(posted.to, err, &mut first)?;
                open.retain(|(open, _)| open.to != posted.to);
                left[posted.to] = 0;
            }
        }
    }
    Ok(first)
}

fn receive(
    comm: &Communicator,
    config: KvConfig,
    (senders, requests): (usize, u64),
    salt: u64,
) -> Played<Option<Error>> {
    let layout = PageLayout::by_page(&config, PAGES);
    let pool = comm.shared_alloc(LAYERS * PAGES * PAGE)?;
    let mut receiver = KvReceiver::new(comm, config, pool, layout)?;
    let mut free: Vec<u32> = (0..PAGES as u32).collect();
    let mut waiting: Vec<(KvTicket, Vec<u32>)> = vec![];
    let (mut next, mut first) = (vec![0; senders], None);
    while next.iter().any(|&n| n < requests) || receiver.in_flight() > 0 {
        for (sender, next) in next.iter_mut().enumerate() {
            let id = *next;
            let count = pages_of(id, sender);
            if id >= requests || free.len() < count {
                continue;
            }
            let pages = free.split_off(free.len() - count);
            match receiver.post(sender, id, &pages, last_bytes(id)) {
                Ok(None) => free.extend(pages),
                Ok(Some(ticket)) => {
                    *next += 1;
                    waiting.push((ticket, pages));
                }
                Err(err) => {
                    ended(sender, err, &mut first)?;
                    free.extend(pages);
                    *next = requests;
                }
            }
        }
        if receiver.in_flight() == 0 {
            continue;
        }
        let end = receiver.wait()?;
        let at = waiting.iter().position(|(ticket, _)| *ticket == end.ticket);
        let Some((_, pages)) = at.map(|at| waiting.remove(at)) else {
            return Err(Fault::Wrong(format!("{end:?} was not posted")));
        };
        match end.outcome {
            KvOutcome::Done => verify(&receiver, end.from, end.id, &pages, salt)?,
            KvOutcome::Failed(err) => {
                ended(end.from, err, &mut first)?;
                next[end.from] = requests;
            }
            // A sender that has heard of a death elsewhere, and gone.
            KvOutcome::Cancelled => next[end.from] = requests,
        }
        free.extend(pages);
    }
    check(free.len() == PAGES, || format!("{} pages are free", free.len()))?;
    Ok(first)
}

fn verify(receiver: &KvReceiver, from: usize, id: u64, pages: &[u32], salt: u64) -> Played {
    for layer in 0..LAYERS {
        for (place, &page) in pages.iter().enumerate() {
            let len = if place + 1 == pages.len() { last_bytes(id) } else { PAGE };
            let mut found = vec![0; len];
            receiver.read_page(layer, page, &mut found)?;
            let at = (layer * PAGES + (id as usize * 5 + place) % PAGES) * PAGE;
            let right = found.iter().enumerate().all(|(i, &b)| b == byte(salt, from, 0, at + i));
            check(right, || format!("page {place} of layer {layer} of request {id} from rank {from} is wrong"))?;
        }
    }
    Ok(())
}
