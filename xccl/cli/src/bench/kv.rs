//! `xccl bench kv`: pages of a KV cache from rank 0 to rank 1, beside plain copies of the same pages.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;
use xccl::{
    BareNetwork, Communicator, Config, KvConfig, KvOutcome, KvPosted, KvReceiver, KvSender, KvSenderEvent, PageLayout,
    PagePair,
};

use super::Common;
use super::figures::{JsonLines, Percentiles};
use super::pair::Pair;

#[derive(Args)]
pub struct KvArgs {
    #[command(flatten)]
    pub(super) common: Common,
    /// Layers of the model
    #[arg(long, default_value_t = 32)]
    layers: usize,
    /// Pages of a request
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    pages: Vec<usize>,
    /// Bytes of a page of one layer
    #[arg(long, default_value_t = 65536)]
    page_bytes: usize,
    /// How the receiver's pages lie
    #[arg(long, value_enum, default_value_t = Lie::Layer)]
    layout: Lie,
    /// Bytes between two pages, beyond their own
    #[arg(long, default_value_t = 0)]
    gap: usize,
    /// Push from the symmetric heap instead of private memory
    #[arg(long)]
    heap: bool,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
enum Lie {
    /// A layer's pages side by side
    Layer,
    /// A page's layers side by side
    Page,
}

#[derive(Serialize)]
struct Point {
    bench: &'static str,
    layers: usize,
    pages: usize,
    page_bytes: usize,
    layout: Lie,
    /// From the first push to the receiver's answer that all is there.
    request_us: Percentiles,
    gbps: f64,
    /// Plain copies of the same pages from the same memory into memory of both ranks.
    memcpy_us: Option<f64>,
    /// Between nodes: bare puts of as many pages.
    bare_us: Option<f64>,
    verified: Option<bool>,
}

const TAG: u32 = 0xffff_0004;
/// Bare puts begin again at the first place after so many.
const BARE_BYTES: usize = 64 << 20;

impl KvArgs {
    fn layout(&self, config: &KvConfig, pages: usize) -> PageLayout {
        let dense = match self.layout {
            Lie::Layer => PageLayout::by_layer(config, pages),
            Lie::Page => PageLayout::by_page(config, pages),
        };
        let page_stride = dense.page_stride + self.gap;
        match self.layout {
            Lie::Layer => PageLayout { page_stride, layer_stride: pages * page_stride, ..dense },
            Lie::Page => PageLayout { page_stride, ..dense },
        }
    }

    pub fn measure(&self, comm: &Communicator) -> Result<()> {
        ensure!(comm.world_size() == 2, "kv needs 2 ranks, there are {}", comm.world_size());
        let most = self.pages.iter().copied().max().unwrap_or(0).max(1);
        let config = KvConfig::new(self.layers, self.page_bytes).max_pages(most);
        // Twice as many as a request has, so that what is next to each other there need not be so here.
        let layout = self.layout(&config, 2 * most);
        let bytes = layout.bytes(&config).context("pages that are fewer or smaller")?;
        let own = PageLayout::by_layer(&config, 2 * most);
        let own_bytes = own.bytes(&config).context("pages that are fewer or smaller")?;
        let heap = bytes + if self.heap { own_bytes } else { 0 };
        let shared = Communicator::from_env_with(Config::from_env()?.heap_bytes(heap + (16 << 20)))?;
        let mut json = JsonLines::open(comm, self.common.json.as_deref())?;
        let pair = Pair::open(comm, bytes)?;
        let bare_bytes = (most * self.layers * self.page_bytes).min(BARE_BYTES).max(self.page_bytes);
        let mut bare = BareNetwork::open(comm, 1 - comm.rank(), bare_bytes)?;
        if comm.rank() == 0 {
            let lie = match self.layout {
                Lie::Layer => "layer after layer",
                Lie::Page => "page after page",
            };
            json.table(&format!(
                "# xccl bench kv: {} layers, pages of {} bytes, {} bytes between them, {lie}",
                self.layers, self.page_bytes, self.gap
            ));
            json.table(&format!(
                "{:>7} {:>10} {:>12} {:>12} {:>9} {:>11} {:>8} {:>9}",
                "pages",
                "MiB",
                "request us",
                "p90 us",
                "GB/s",
                if bare.is_some() { "bare us" } else { "memcpy us" },
                "/ limit",
                "verified"
            ));
            let mut sender = KvSender::new(&shared, config, own)?;
            let mut private = vec![0; if self.heap { 0 } else { own_bytes }];
            let mut heap = shared.heap_alloc(if self.heap { own_bytes } else { 1 })?;
            let pool: &mut [u8] = if self.heap { &mut heap } else { &mut private };
            pool.iter_mut().enumerate().for_each(|(at, to)| *to = byte(at));
            let ends = (&own, &layout);
            for &pages in &self.pages {
                let limits = (pair.as_ref(), bare.as_mut());
                let point = self.send(comm, &mut sender, pool, ends, pages, limits)?;
                self.show(&mut json, &point)?;
            }
        } else {
            let pool = shared.shared_alloc(bytes)?;
            let mut receiver = KvReceiver::new(&shared, config, pool, layout)?;
            for &pages in &self.pages {
                self.receive(comm, &mut receiver, 2 * most, pages, bare.as_mut())?;
            }
        }
        comm.barrier()?;
        Ok(())
    }

    /// Of the whole request, measured, after the warm-up.
    fn rounds(&self, pages: usize) -> (u32, u32) {
        let bytes = (pages * self.layers * self.page_bytes).max(1);
        let iters = self.common.iters.min((4_000_000_000 / bytes) as u32).max(3);
        (self.common.warmup.min(iters), iters)
    }

    fn send(
        &self,
        comm: &Communicator,
        sender: &mut KvSender,
        pool: &[u8],
        (own, theirs): (&PageLayout, &PageLayout),
        pages: usize,
        (pair, mut bare): (Option<&Pair>, Option<&mut BareNetwork>),
    ) -> Result<Point> {
        let (warmup, iters) = self.rounds(pages);
        let (mut times, mut copies, mut bares) = (vec![], vec![], vec![]);
        for round in 0..warmup + iters + u32::from(self.common.verify) {
            let posted = next(sender)?;
            let pairs = pairs(sender.pages(posted.ticket)?);
            let start = Instant::now();
            for layer in 0..self.layers {
                sender.push(posted.ticket, layer, pool, &pairs)?;
            }
            comm.recv(1, TAG, &mut [])?;
            let took = start.elapsed().as_secs_f64() * 1e6;
            let bare = bare.as_mut().map(|bare| bare.puts(self.page_bytes, pages * self.layers, true)).transpose()?;
            if !(warmup..warmup + iters).contains(&round) {
                continue;
            }
            times.push(took);
            bares.extend(bare.map(|time| time.as_secs_f64() * 1e6));
            let Some(pair) = pair.filter(|_| bare.is_none()) else { continue };
            let start = Instant::now();
            for layer in 0..self.layers {
                for page in &pairs {
                    let from = layer * own.layer_stride + page.source as usize * own.page_stride;
                    let to = layer * theirs.layer_stride + page.destination as usize * theirs.page_stride;
                    pair.copy_in(to, &pool[from..from + self.page_bytes]);
                }
            }
            copies.push(start.elapsed().as_secs_f64() * 1e6);
        }
        let request_us = Percentiles::of(times);
        let bytes = pages * self.layers * self.page_bytes;
        Ok(Point {
            bench: "kv",
            layers: self.layers,
            pages,
            page_bytes: self.page_bytes,
            layout: self.layout,
            gbps: bytes as f64 / request_us.median / 1e3,
            request_us,
            memcpy_us: (!copies.is_empty()).then(|| Percentiles::of(copies).median),
            bare_us: (!bares.is_empty()).then(|| Percentiles::of(bares).median),
            // The other rank fails otherwise.
            verified: self.common.verify.then_some(true),
        })
    }

    fn show(&self, json: &mut JsonLines, point: &Point) -> Result<()> {
        let limit = point.bare_us.or(point.memcpy_us);
        json.table(&format!(
            "{:>7} {:>10.2} {:>12.2} {:>12.2} {:>9.2} {:>11} {:>8} {:>9}",
            point.pages,
            (point.pages * self.layers * self.page_bytes) as f64 / f64::from(1 << 20),
            point.request_us.median,
            point.request_us.p90,
            point.gbps,
            limit.map_or("-".to_owned(), |us| format!("{us:.2}")),
            limit.map_or("-".to_owned(), |us| format!("{:.2}", point.request_us.median / us)),
            point.verified.map_or("-", |_| "yes"),
        ));
        json.write(point)
    }

    fn receive(
        &self,
        comm: &Communicator,
        receiver: &mut KvReceiver,
        pool: usize,
        pages: usize,
        mut bare: Option<&mut BareNetwork>,
    ) -> Result<()> {
        let (warmup, iters) = self.rounds(pages);
        // Spread over the pool, in no order.
        let list: Vec<u32> = (0..pages).map(|i| ((i * 2 + 1) % pool) as u32).rev().collect();
        let rounds = warmup + iters + u32::from(self.common.verify);
        for round in 0..rounds {
            if self.common.verify && round + 1 == rounds {
                let memory = receiver.pool().clone();
                memory.write(0, &vec![0; memory.len()])?;
            }
            let posted = receiver.post(0, round.into(), &list, self.page_bytes)?;
            ensure!(posted.is_some(), "an earlier request is still in flight");
            let end = receiver.wait()?;
            ensure!(matches!(end.outcome, KvOutcome::Done), "{end:?}");
            comm.send(0, TAG, &[])?;
            if let Some(bare) = &mut bare {
                bare.puts(self.page_bytes, pages * self.layers, false)?;
            }
        }
        if self.common.verify { self.check(receiver, &list, pool) } else { Ok(()) }
    }

    /// Every byte of every page.
    fn check(&self, receiver: &KvReceiver, list: &[u32], pool: usize) -> Result<()> {
        let own = PageLayout::by_layer(&KvConfig::new(self.layers, self.page_bytes), pool);
        let mut found = vec![0; self.page_bytes];
        for layer in 0..self.layers {
            for pair in pairs(list) {
                receiver.read_page(layer, pair.destination, &mut found)?;
                let from = layer * own.layer_stride + pair.source as usize * own.page_stride;
                let wrong = found.iter().enumerate().find(|&(i, &b)| b != byte(from + i));
                ensure!(wrong.is_none(), "layer {layer}, page {}: byte {wrong:?} is wrong", pair.destination);
            }
        }
        Ok(())
    }
}

fn byte(at: usize) -> u8 {
    (at * 131 + (at >> 8) * 7 + (at >> 16)) as u8
}

fn pairs(theirs: &[u32]) -> Vec<PagePair> {
    theirs.iter().enumerate().map(|(own, &page)| (own as u32, page).into()).collect()
}

fn next(sender: &mut KvSender) -> Result<KvPosted> {
    match sender.wait()? {
        KvSenderEvent::Posted(posted) => Ok(posted),
        other => anyhow::bail!("{other:?}"),
    }
}
