//! A network in this process that keeps to the [endpoint's contract](crate::fabric::endpoint) and to nothing more: puts arrive in
//! any order, late, after any number of polls, and are read at any time until they have left; queues are short.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::error::Result;
use crate::fabric::endpoint::{Access, Endpoint, Event, MOST_PARTS, Part, Posted, Region, RemoteRegion};
use crate::memory::mapping::Mapping;

#[derive(Debug)]
struct Transfer {
    by: usize,
    to: usize,
    /// Part by part.
    from: Vec<(Arc<Mapping>, Range<usize>)>,
    /// What was read there, once it has left.
    bytes: Option<Vec<Vec<u8>>>,
    /// Who is told that it has left.
    token: Option<u64>,
    into: Vec<(Arc<Mapping>, usize)>,
    done: (usize, Event),
}

#[derive(Debug)]
struct Network {
    random: StdRng,
    /// By key, the memory and whose it is.
    regions: Vec<(usize, Arc<Mapping>, Range<usize>)>,
    under_way: Vec<Transfer>,
    /// By rank, what its next poll finds.
    events: Vec<Vec<Event>>,
    gone: Vec<bool>,
    /// Transfers of one rank that may be under way.
    depth: usize,
}

/// One rank's place on the simulated network.
#[derive(Debug)]
pub(crate) struct Simulated {
    rank: usize,
    network: Arc<Mutex<Network>>,
}

/// Makes the endpoints of `ranks` ranks.
pub(crate) fn network(ranks: usize, depth: usize, seed: u64) -> Vec<Simulated> {
    let network = Network {
        random: StdRng::seed_from_u64(seed),
        regions: vec![],
        under_way: vec![],
        events: vec![vec![]; ranks],
        gone: vec![false; ranks],
        depth,
    };
    let network = Arc::new(Mutex::new(network));
    (0..ranks).map(|rank| Simulated { rank, network: network.clone() }).collect()
}

impl Network {
    fn start(&mut self, transfer: Transfer) -> Posted {
        if self.under_way.iter().filter(|t| t.by == transfer.by).count() >= self.depth {
            return Posted::Full;
        }
        if self.gone[transfer.to] {
            let failed = Event::Failed { to: Some(transfer.to), why: "it has gone".to_owned() };
            self.events[transfer.by].push(failed);
        } else {
            self.under_way.push(transfer);
        }
        Posted::Yes
    }

    /// Lets some of the transfers that `rank` has a part in arrive, in any order.
    fn move_on(&mut self, rank: usize) {
        for _ in 0..self.random.random_range(0..4) {
            let its: Vec<_> = (0..self.under_way.len())
                .filter(|&i| [self.under_way[i].by, self.under_way[i].to].contains(&rank))
                .collect();
            if its.is_empty() {
                return;
            }
            let chosen = its[self.random.random_range(0..its.len())];
            let has_left = self.under_way[chosen].bytes.is_some();
            self.leave(chosen);
            if has_left || self.random.random() {
                let Transfer { bytes, into, done: (who, event), .. } = self.under_way.swap_remove(chosen);
                for (bytes, (into, at)) in bytes.unwrap_or_default().iter().zip(into) {
                    into.write(at, bytes);
                }
                self.events[who].push(event);
            }
        }
    }

    /// Reads the bytes of a transfer, if that has not been done.
    fn leave(&mut self, chosen: usize) {
        let Transfer { by, from, bytes, token, .. } = &mut self.under_way[chosen];
        if bytes.is_none() {
            let read = |(from, range): &(Arc<Mapping>, Range<usize>)| {
                let mut read = vec![0; range.len()];
                from.read(range.start, &mut read);
                read
            };
            *bytes = Some(from.iter().map(read).collect());
            self.events[*by].extend(token.map(|token| Event::Left { token }));
        }
    }

    fn at(&self, key: u64, offset: usize, bytes: usize) -> (Arc<Mapping>, usize) {
        let (_, memory, range) = &self.regions[key as usize];
        assert!(offset + bytes <= range.len(), "{bytes} bytes at {offset} of a region of {range:?}");
        (memory.clone(), range.start + offset)
    }
}

impl Simulated {
    fn post(&self, to: usize, parts: &[Part], immediate: u32, token: Option<u64>) -> Posted {
        let mut network = self.network.lock().unwrap();
        let from = |Part { from: (region, range), .. }: &Part| {
            let (memory, at) = network.at(region.index as u64, range.start, range.len());
            (memory, at..at + range.len())
        };
        let into = |Part { from: (_, range), into: (into, at) }: &Part| network.at(into.key, *at, range.len());
        let (from, into) = (parts.iter().map(from).collect(), parts.iter().map(into).collect());
        let done = (to, Event::Arrived { immediate });
        network.start(Transfer { by: self.rank, to, from, bytes: None, token, into, done })
    }
}

impl Endpoint for Simulated {
    fn address(&self) -> Result<Vec<u8>> {
        Ok(vec![self.rank as u8])
    }

    fn connect(&mut self, addresses: &[Option<Vec<u8>>]) -> Result<()> {
        for (rank, address) in addresses.iter().enumerate() {
            assert!(address.as_ref().is_none_or(|a| a == &[rank as u8]));
        }
        Ok(())
    }

    fn register(&mut self, memory: &Arc<Mapping>, range: Range<usize>, _access: Access) -> Result<Region> {
        let mut network = self.network.lock().unwrap();
        let index = network.regions.len();
        let bytes = range.len() as u64;
        network.regions.push((self.rank, memory.clone(), range));
        Ok(Region { index, remote: RemoteRegion { base: 0, key: index as u64, bytes } })
    }

    fn put(
        &mut self,
        to: usize,
        from: (Region, Range<usize>),
        into: (RemoteRegion, usize),
        immediate: u32,
        token: Option<u64>,
    ) -> Result<Posted> {
        Ok(self.post(to, &[Part { from, into }], immediate, token))
    }

    fn most_parts(&self) -> usize {
        1 + self.network.lock().unwrap().depth % MOST_PARTS
    }

    fn put_parts(&mut self, to: usize, parts: &[Part], immediate: u32) -> Result<Posted> {
        assert!((1..=self.most_parts()).contains(&parts.len()));
        Ok(self.post(to, parts, immediate, None))
    }

    fn get(
        &mut self,
        of: usize,
        (from, offset): (RemoteRegion, usize),
        (into, range): (Region, Range<usize>),
        token: u64,
    ) -> Result<Posted> {
        let mut network = self.network.lock().unwrap();
        let (memory, at) = network.at(from.key, offset, range.len());
        let into = network.at(into.index as u64, range.start, range.len());
        let done = (self.rank, Event::Got { token });
        let (from, into) = (vec![(memory, at..at + range.len())], vec![into]);
        Ok(network.start(Transfer { by: self.rank, to: of, from, bytes: None, token: None, into, done }))
    }

    fn poll(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let mut network = self.network.lock().unwrap();
        network.move_on(self.rank);
        events.append(&mut network.events[self.rank]);
        Ok(())
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn may_sleep(&mut self) -> bool {
        false
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        let mut network = self.network.lock().unwrap();
        network.gone[self.rank] = true;
        let (to_it, others) =
            std::mem::take(&mut network.under_way).into_iter().partition(|t: &Transfer| t.to == self.rank);
        network.under_way = others;
        for Transfer { by, to, .. } in to_it {
            network.events[by].push(Event::Failed { to: Some(to), why: "it has gone".to_owned() });
        }
    }
}
