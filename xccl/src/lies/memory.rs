//! Targets that lie in memory that this rank reads.

use std::cell::Cell;
use std::sync::atomic::Ordering::Relaxed;

use super::Garbage;
use super::world::{Kind, PAGES, Pages, World, with};
use crate::collectives::engine::Collectives;
use crate::collectives::{Collective, ReduceOp};
use crate::comm::inner::CommInner;
use crate::comm::layout::{HEAP_START, SLOTS};
use crate::memory::mapping::Mapping;
use crate::moe::{Moe, Routing};
use crate::onesided::Remote;
use crate::p2p::Source;
use crate::p2p::engine::P2p;
use crate::sync::{Until, Update};

type Kept = Cell<Option<(World, u32)>>;

/// Words that a rank says of itself: its state now and then, since little is done with who is gone.
fn words(g: &mut Garbage<'_>, comm: &CommInner, liar: &Mapping) {
    let layout = &comm.layout;
    if g.one_in(16) {
        g.scatter(liar, layout.state.min(layout.board.identity)..layout.slot(0, 0), 12);
    } else {
        g.scatter(liar, layout.consumed(0)..layout.slot(0, 0), 8);
        liar.word32(layout.state).store(1, Relaxed);
        [layout.border, layout.sleep].iter().for_each(|&at| liar.word64(at).store(g.word(), Relaxed));
    }
}

/// Slots and the ring of messages.
pub(super) fn messages(g: &mut Garbage<'_>) {
    thread_local!(static WORLD: Kept = const { Cell::new(None) });
    with(
        &WORLD,
        || World::new([0, 0], Kind::Bare),
        |world| {
            let (me, liar) = (&*world.me.comm.inner, &world.liar.comm.inner.fabric.outbox);
            words(g, me, liar);
            for n in 0..g.below(2 * SLOTS) as u64 {
                let slot = liar.line(me.layout.slot(0, n));
                let turn = if g.one_in(10) { g.word() } else { n + 1 };
                // Tag, kind and length are often those of a message.
                let (tag, kind) = (u64::from(g.byte() % 3), u64::from(g.byte() % 6));
                let len = if g.one_in(2) { g.word() } else { [0, 8, 40, 100, 9000][g.below(5)] };
                let head = if g.one_in(8) { g.word() } else { tag | kind << 32 };
                let words = [turn, head, len, g.word(), g.word(), 0, 0, 0];
                slot.iter().zip(words).skip(1).for_each(|(to, word)| to.store(word, Relaxed));
                slot[0].store(turn, Relaxed);
            }
            let p2p = P2p::new(2);
            p2p.set_private_rendezvous(g.one_in(2).then_some(100));
            for _ in 0..g.below(5) {
                let tag = u64::from(g.byte() % 3);
                let mut buffer = vec![0; [0, 8, 100, 9000, 40_000][g.below(5)]];
                let _ = match g.byte() % 3 {
                    0 => p2p.recv(me, Source::Any, tag, &mut buffer).map(|_| ()),
                    1 => p2p.recv(me, Source::Rank(1), tag, &mut buffer).map(|_| ()),
                    _ => p2p.send(me, 1, tag, &buffer),
                };
            }
        },
    );
}

/// Slots, log and failure line of collectives.
pub(super) fn collectives(g: &mut Garbage<'_>) {
    thread_local!(static WORLD: Kept = const { Cell::new(None) });
    with(
        &WORLD,
        || World::new([0, 0], Kind::Bare),
        |world| {
            let (me, liar) = (&*world.me.comm.inner, &world.liar.comm.inner.fabric.outbox);
            let slots = &me.layout.collectives;
            for (at, bytes) in slots.areas() {
                for memory in [liar, &me.fabric.outbox] {
                    (at..at + bytes.min(64 << 10)).step_by(64).for_each(|at| memory.word64(at).store(0, Relaxed));
                }
            }
            let (kind, n, root) = (g.byte(), [1, 5, 700, 9000][g.below(4)], g.below(2));
            let run = || {
                let (send, mut recv) = (vec![1i32; 2 * n], vec![0i32; 2 * n]);
                let recv = &mut recv[..];
                let parts = [0..n / 2, n / 2..n];
                let collective = match kind % 7 {
                    0 => Collective::Broadcast { send: None, recv, root },
                    1 => Collective::AllReduce { send: None, recv, op: ReduceOp::Sum },
                    2 => Collective::AllGather { send: Some(&send[..n]), recv },
                    3 => Collective::ReduceScatter { send: Some(&send), recv: &mut recv[..n], op: ReduceOp::Max },
                    4 => Collective::AllToAll { send: Some(&send), recv },
                    5 => Collective::Reduce { send: None, recv, op: ReduceOp::Sum, root },
                    _ => Collective::AllToAllV { send: Some(&send), send_parts: &parts, recv, recv_parts: &parts },
                };
                Collectives::new(0, &[0, 0]).run_alone(me, collective)
            };
            // The first attempt finds nothing, and shows what the digest must be.
            let _ = run();
            let digest = slots.digest(&me.fabric.outbox, 1);
            if g.one_in(8) {
                for (at, bytes) in slots.areas() {
                    g.scatter(liar, at..at + bytes.min(8192), 12);
                }
            }
            for step in 1..g.below(40) as u64 {
                let payload = slots.areas()[2].0 + (step % 32) as usize * (64 + 4096) + 16;
                g.scatter(liar, payload..payload + 40, 4);
                if kind % 7 == 6 && step == 1 {
                    // As long as they say, or nearly.
                    let (longest, own) = (if g.one_in(2) { n as u64 * 2 } else { g.word() }, g.word() % 4);
                    [longest, n as u64 / 2 * 4, own].iter().enumerate().for_each(|(i, &word)| {
                        liar.word64(payload + i * 8).store(word, Relaxed);
                    });
                }
                let turn = if g.one_in(12) { g.word() } else { step };
                slots.publish_as(liar, step, turn, if g.one_in(20) { g.word() } else { digest });
            }
            let _ = run();
        },
    );
}

/// Lists, rows and sums of an exchange.
pub(super) fn exchange(g: &mut Garbage<'_>) {
    thread_local!(static WORLD: Kept = const { Cell::new(None) });
    with(
        &WORLD,
        || World::new([0, 0], Kind::Moes),
        |world| {
            let which = g.below(3);
            let (me, liar) = (&world.me.moes[which], &world.liar.moes[which]);
            words(g, &world.me.comm.inner, &world.liar.comm.inner.fabric.outbox);
            for _ in 0..1 + g.below(3) {
                liar.lie(g);
                // What goes wrong is told; the next exchange begins all the same.
                let _ = one_exchange(g, me);
            }
        },
    );
}

fn one_exchange(g: &mut Garbage<'_>, moe: &Moe) -> crate::Result<()> {
    let tokens = g.below(4);
    let ids: Vec<i32> = (0..tokens).flat_map(|_| [i32::from(g.byte() % 2), 2 + i32::from(g.byte() % 2)]).collect();
    let weights = vec![0.5; ids.len()];
    let sent = moe.dispatch_send(&vec![1.0f32; tokens * 8], &Routing::new(&ids, &weights))?;
    let mut row = [0.0f32; 8];
    let batch = match g.one_in(3) {
        true => {
            let mut arrivals = moe.dispatch_recv_by_source(&sent)?;
            while let Some(source) = arrivals.next_source()? {
                for i in arrivals.rows_of(source) {
                    arrivals.copy_row(i, &mut row)?;
                    arrivals.output_row::<f32>(i)?.fill(2.0);
                }
            }
            arrivals.into_batch()?
        }
        false => {
            let mut batch = moe.dispatch_recv(&sent)?;
            for i in 0..batch.len() {
                batch.copy_row(i, &mut row)?;
                batch.output_row::<f32>(i)?.fill(2.0);
            }
            let (aligned, most) = (batch.aligned_rows(4), batch.counts().iter().max().map_or(0, |&n| n as usize));
            batch.copy_into(&mut vec![0.0f32; aligned * 8], 4)?;
            let experts = batch.local_experts().len();
            batch.copy_padded(&mut vec![0.0f32; experts * most * 8], most)?;
            batch
        }
    };
    moe.combine_send(batch)?;
    moe.combine_recv(sent, &mut vec![0.0f32; tokens * 8])
}

/// What a rank answers for, of ranks of another node.
pub(super) fn rail(g: &mut Garbage<'_>) {
    thread_local!(static WORLD: Kept = const { Cell::new(None) });
    with(&WORLD, || World::new([0, 1], Kind::Moes), |world| world.me.moes[g.below(2)].answer_lies(g));
}

/// What the other side of a transfer of pages writes into this rank's memory.
pub(super) fn pages(g: &mut Garbage<'_>) {
    thread_local!(static SENDS: Kept = const { Cell::new(None) });
    thread_local!(static RECEIVES: Kept = const { Cell::new(None) });
    let (kept, kind) = if g.one_in(2) { (&SENDS, Kind::Sends) } else { (&RECEIVES, Kind::Receives) };
    with(
        kept,
        || World::new([0, 0], kind),
        |world| {
            let heap = &world.me.comm.inner.fabric.heap;
            let shared =
                world.me.comm.inner.fabric.outbox.word64(world.me.comm.inner.layout.border).load(Relaxed) as usize;
            match &mut world.me.pages {
                Some(Pages::Sender(sender)) => {
                    // Letters with a grain of truth: the liar's own, changed.
                    if let Some(Pages::Receiver(liar)) = &mut world.liar.pages {
                        let pages: Vec<u32> = (0..g.below(3) as u32).collect();
                        let _ = liar.post(0, 7, &pages, 1 + g.below(64));
                    }
                    g.scatter(heap, shared..heap.len(), 8);
                    for _ in 0..3 {
                        let Ok(Some(crate::KvSenderEvent::Posted(posted))) = sender.poll() else { continue };
                        let listed = sender.pages(posted.ticket).map(<[u32]>::to_vec).unwrap_or_default();
                        let pairs: Vec<_> = listed.iter().map(|&page| (page % PAGES as u32, page).into()).collect();
                        let pool = vec![3u8; 2 * PAGES * 64];
                        let _ = sender.push(posted.ticket, g.below(2), &pool, &pairs);
                        let _ = sender.cancel(posted.ticket);
                    }
                    if let Some(Pages::Receiver(liar)) = &mut world.liar.pages {
                        while let Ok(Some(_)) = liar.poll() {}
                    }
                }
                Some(Pages::Receiver(receiver)) => {
                    let posted = receiver.post(1, 9, &[0, 1], 64).ok().flatten();
                    g.scatter(heap, shared..heap.len(), 8);
                    for layer in 0..2 {
                        let _ = posted.map(|ticket| receiver.layer_ready(ticket, layer));
                    }
                    let _ = posted.map(|ticket| receiver.cancel(ticket));
                    for _ in 0..3 {
                        let _ = receiver.poll();
                    }
                }
                None => {}
            }
        },
    );
}

/// Borders, and pieces that somebody has told of.
pub(super) fn shared(g: &mut Garbage<'_>) {
    thread_local!(static WORLD: Kept = const { Cell::new(None) });
    with(
        &WORLD,
        || World::new([0, 0], Kind::Bare),
        |world| {
            let (me, liar) = (&world.me.comm, &world.liar.comm.inner);
            words(g, &me.inner, &liar.fabric.outbox);
            let border = if g.one_in(2) { HEAP_START as u64 } else { g.word() };
            liar.fabric.outbox.word64(liar.layout.border).store(border, Relaxed);
            for _ in 0..g.below(8) {
                let mut told = [0; 24];
                for (to, word) in told.chunks_exact_mut(8).zip([u64::from(g.byte() % 3), g.word(), g.word()]) {
                    to.copy_from_slice(&word.to_le_bytes());
                }
                let piece = Remote::from_bytes(&told);
                let mut data = vec![5; [0, 1, 8, 100, 5000][g.below(5)]];
                let _ = match g.byte() % 6 {
                    0 => me.put(piece, &data),
                    1 => me.get(piece, &mut data),
                    2 => me.put_signal(piece.skip(g.below(64)), &data, piece, Update::Add(1)),
                    3 => me.atomic_fetch_add(piece, 1).map(|_| ()),
                    4 => me.atomic_compare_swap(piece, 0, 1).map(|_| ()),
                    _ => me.signal(piece.first(8), Update::Set(1)),
                };
            }
            if let Ok(block) = me.shared_alloc(64) {
                let _ = block.signal_wait(1, 0, Until::Ge(g.word()));
            }
        },
    );
}
