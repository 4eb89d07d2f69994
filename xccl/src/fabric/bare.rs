//! Bare puts between two ranks of different nodes: what nothing that goes between nodes can beat on the same network, for benchmarks.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::endpoint::{Access, Endpoint, Event, Posted, Region, RemoteRegion};
use super::{decode, encode, ofi};
use crate::comm::Communicator;
use crate::error::{Error, Result};
use crate::memory::mapping::Mapping;

/// Polls between two looks at the clock.
const POLLS_PER_LOOK: u32 = 256;
const ADDRESS: u32 = 0xffff_00ba;

/// An endpoint of its own at each of two ranks, polled without a pause: no records, no credit, no sleep.
///
/// ```no_run
/// # use xccl::BareNetwork;
/// # fn layer(comm: &xccl::Communicator) -> xccl::Result<()> {
/// // Ranks 0 and 1, which are on different nodes.
/// if let Some(mut bare) = BareNetwork::open(comm, 1 - comm.rank(), 1 << 20)? {
///     let time = bare.puts(65536, 1000, comm.rank() == 0)?; // of all 1000, one after the other
///     println!("{:.2} GB/s", 65536e-9 * 1000.0 / time.as_secs_f64());
/// }
/// # Ok(())
/// # }
/// ```
pub struct BareNetwork {
    /// Not closed where a put may be halfway in: that is what `tcp;ofi_rxm` of libfabric 1.17 crashes of.
    endpoint: ManuallyDrop<Box<dyn Endpoint>>,
    /// Where puts leave from, and behind it as much where the other side's land.
    #[cfg(test)]
    memory: Arc<Mapping>,
    region: Region,
    target: RemoteRegion,
    /// Of each of the two.
    bytes: usize,
    events: Vec<Event>,
    arrived: usize,
    /// Puts that have not left, of those that tell.
    leaving: usize,
    has_failed: bool,
    timeout: Option<Duration>,
}

impl BareNetwork {
    /// Connects two ranks, which both call it, for puts of up to `bytes`; `None` where they are of one node. Blocks until both have.
    ///
    /// # Errors
    /// Those of [`Communicator::init`] about the network, and of sending and receiving.
    pub fn open(comm: &Communicator, other: usize, bytes: usize) -> Result<Option<Self>> {
        let inner = &comm.inner;
        inner.check_rank(other)?;
        if inner.fabric.far_to(other).is_none() {
            return Ok(None);
        }
        let source = inner.star().local_address();
        let source = source.unwrap_or(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
        let options =
            ofi::Options { provider: inner.config.fabric.clone(), source: Some(source), ranks: 1, wakes: false };
        let mut endpoint = ofi::open(&options)?;
        let memory = Arc::new(Mapping::anonymous(2 * bytes)?);
        memory.write(0, &vec![1; memory.len()]);
        let region = endpoint.register(&memory, 0..memory.len(), Access::Remote)?;
        let own = encode(&(endpoint.address()?, region.remote))?;
        comm.send(other, ADDRESS, &own)?;
        let mut theirs = [0; 1024];
        let len = comm.recv(other, ADDRESS, &mut theirs)?.len;
        let (address, target): (Vec<u8>, RemoteRegion) = decode(&theirs[..len])?;
        if target.bytes != region.remote.bytes {
            let (theirs, ours) = (target.bytes.to_string(), region.remote.bytes.to_string());
            return Err(Error::Mismatch { rank: other, what: "bytes of bare puts".to_owned(), theirs, ours });
        }
        endpoint.connect(&[Some(address)])?;
        let timeout = inner.config.timeout;
        Ok(Some(BareNetwork {
            endpoint: ManuallyDrop::new(endpoint),
            #[cfg(test)]
            memory,
            region,
            target,
            bytes,
            events: vec![],
            arrived: 0,
            leaving: 0,
            has_failed: false,
            timeout,
        }))
    }

    /// Puts so many bytes `count` times, until all have arrived, from and to one place after the other as far as there is room; the side
    /// that does not `send` waits for them. Both call it. The time of all at the side that sends.
    ///
    /// # Errors
    /// [`Error::Shape`] for more bytes than it was opened for, [`Error::Fabric`] when the network fails or the deadline is over.
    pub fn puts(&mut self, bytes: usize, count: usize, sends: bool) -> Result<Duration> {
        self.check(bytes)?;
        let (start, places) = (Instant::now(), self.bytes.checked_div(bytes).unwrap_or(1).max(1));
        match sends {
            true => {
                (0..count).try_for_each(|i| self.put(i % places * bytes, bytes))?;
                self.wait(1)?;
            }
            false => {
                self.wait(count)?;
                self.put_last(0, 0)?;
            }
        }
        Ok(start.elapsed())
    }

    /// Puts so many bytes there and back `count` times. Both call it, one of them as the `first`. Half of a round trip's time.
    ///
    /// # Errors
    /// As [`puts`](Self::puts).
    pub fn half_round_trip(&mut self, bytes: usize, count: usize, first: bool) -> Result<Duration> {
        self.check(bytes)?;
        let start = Instant::now();
        for i in 0..count {
            if first {
                self.put(0, bytes)?;
            }
            self.wait(1)?;
            match first {
                true => {}
                false if i + 1 < count => self.put(0, bytes)?,
                false => self.put_last(0, bytes)?,
            }
        }
        Ok(start.elapsed() / (2 * count.max(1)) as u32)
    }

    fn check(&self, bytes: usize) -> Result<()> {
        let expected = || format!("at most {}, as it was opened for", self.bytes);
        match bytes <= self.bytes {
            true => Ok(()),
            false => Err(Error::Shape { what: "the bytes of a bare put", given: bytes, expected: expected() }),
        }
    }

    fn put(&mut self, at: usize, bytes: usize) -> Result<()> {
        self.post(at, bytes, None)
    }

    /// A put that nobody polls after: waits until it has left.
    fn put_last(&mut self, at: usize, bytes: usize) -> Result<()> {
        self.leaving += 1;
        self.post(at, bytes, Some(0))?;
        self.until(|this| Ok(this.leaving == 0))
    }

    fn post(&mut self, at: usize, bytes: usize, token: Option<u64>) -> Result<()> {
        let into = (self.target, self.bytes + at);
        self.until(|this| {
            let posted = this.endpoint.put(0, (this.region, at..at + bytes), into, 0, token)?;
            Ok(posted == Posted::Yes)
        })
    }

    fn wait(&mut self, arrivals: usize) -> Result<()> {
        self.until(|this| Ok(this.arrived >= arrivals))?;
        self.arrived -= arrivals;
        Ok(())
    }

    /// Polls until `done`.
    fn until(&mut self, done: impl FnMut(&mut Self) -> Result<bool>) -> Result<()> {
        let result = self.poll_until(done);
        self.has_failed |= result.is_err();
        result
    }

    fn poll_until(&mut self, mut done: impl FnMut(&mut Self) -> Result<bool>) -> Result<()> {
        let failed = |why| Error::Fabric { provider: "of bare puts".to_owned(), call: "a put", why };
        let (start, mut polls) = (Instant::now(), 0u32);
        while !done(self)? {
            self.endpoint.poll(&mut self.events)?;
            for event in self.events.drain(..) {
                match event {
                    Event::Failed { why, .. } => return Err(failed(why)),
                    Event::Left { .. } => self.leaving -= 1,
                    _ => self.arrived += 1,
                }
            }
            polls = polls.wrapping_add(1);
            if polls.is_multiple_of(POLLS_PER_LOOK) && self.timeout.is_some_and(|timeout| start.elapsed() > timeout) {
                return Err(failed(format!("nothing has come for {:?}", start.elapsed())));
            }
        }
        Ok(())
    }
}

impl Drop for BareNetwork {
    fn drop(&mut self) {
        if !self.has_failed {
            // SAFETY: dropped once, here, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.endpoint) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use crate::comm::far_tests::on_nodes;

    #[test]
    fn bare_puts_go_between_nodes_only_and_within_what_was_agreed_on() {
        on_nodes(&[0, 1, 1], None, Config::default().heap_bytes(1 << 16), |comm| {
            if comm.rank() == 2 {
                return assert!(BareNetwork::open(&comm, 1, 64).unwrap().is_none());
            }
            let mut bare = BareNetwork::open(&comm, 1 - comm.rank(), 10_000).unwrap().unwrap();
            let first = comm.rank() == 0;
            for bytes in [0, 1, 3000, 10_000] {
                bare.puts(bytes, 40, first).unwrap();
                bare.half_round_trip(bytes, 40, first).unwrap();
            }
            assert!(matches!(bare.puts(10_001, 1, first), Err(Error::Shape { given: 10_001, .. })));
            let last = [0, 10_000]
                .map(|at| bare.memory.word64(at))
                .map(|word| word.load(std::sync::atomic::Ordering::Acquire));
            assert_eq!(last, [0x0101_0101_0101_0101; 2]);
        });
    }

    #[test]
    fn sides_that_disagree_on_the_bytes_are_told() {
        on_nodes(&[0, 1], None, Config::default().heap_bytes(1 << 16), |comm| {
            let error = BareNetwork::open(&comm, 1 - comm.rank(), 1000 * (1 + comm.rank())).err().unwrap();
            assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        });
    }
}
