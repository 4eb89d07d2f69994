//! Attention and experts apart: the first ranks hold attention, in one or two domains, the others experts.

use rand::Rng;
use rand::rngs::StdRng;
use xccl::{Attention, Communicator, Experts, RoleConfig, Routing};

use super::exchange::{Sent, Shape, work_of};
use super::{Played, check};

pub fn apart(comm: &Communicator, rng: &mut StdRng) -> Played {
    let (me, ranks) = (comm.rank(), comm.world_size());
    let shape = Shape::draw(rng, ranks);
    let (salt, most): (u64, usize) = (rng.random(), rng.random_range(1..8));
    let attention = rng.random_range(1..ranks);
    let parted = if attention > 1 { rng.random_range(0..attention) } else { 0 };
    let domains: Vec<Vec<usize>> = [0..parted, parted..attention].map(Vec::from_iter).into();
    let domains: Vec<Vec<usize>> = domains.into_iter().filter(|ranks| !ranks.is_empty()).collect();
    let rounds = |domain: usize| 1 + (most + domain) % 8;
    let config = RoleConfig::new(domains.clone(), attention..ranks, shape.config());
    if me < attention {
        let attention = Attention::new(comm, config)?;
        for n in 0..rounds(attention.domain()) as u64 {
            let sent = shape.sent_by(salt + n, me);
            let exchange = attention.a2e_send(&sent.tokens, &Routing::new(&sent.ids, &sent.weights))?;
            let mut out = vec![0.0f32; sent.tokens.len()];
            attention.e2a_recv(exchange, &mut out)?;
            check(out == shape.result(&sent), || format!("sums of round {n} are wrong"))?;
        }
    } else {
        let experts = Experts::new(comm, config)?;
        let mut come = vec![0; domains.len()];
        while let Some(mut batch) = experts.a2e_recv()? {
            let n = come[batch.domain()];
            come[batch.domain()] += 1;
            let sent: Vec<Sent> = (0..ranks).map(|rank| shape.sent_by(salt + n, rank)).collect();
            let mine = experts.local_experts();
            let mut row = vec![0.0f32; shape.hidden()];
            for i in 0..batch.len() {
                let what = batch.row(i);
                batch.copy_row(i, &mut row)?;
                let at = what.token * shape.hidden();
                let right = sent[what.source].tokens.get(at..at + shape.hidden());
                check(right == Some(&row[..]), || format!("row {i} of round {n}, {what:?}, is wrong"))?;
                let output = batch.output_row::<f32>(i)?;
                output.iter_mut().zip(&row).for_each(|(y, &x)| *y = work_of(mine[what.expert], x));
            }
            experts.e2a_send(batch)?;
        }
        let right = come.iter().enumerate().all(|(domain, &n)| n == rounds(domain) as u64);
        check(right, || format!("micro-batches of the domains: {come:?}"))?;
    }
    Ok(comm.barrier()?)
}
