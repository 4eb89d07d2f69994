//! Going back together to an iteration that all have finished, after something that is not the end; and ids for ranks to come.

use super::Communicator;
use crate::UniqueId;
use crate::error::{Error, Result};
use crate::fabric;

impl Communicator {
    /// Goes back with all ranks to the last iteration that all of them have finished: `finished` is this rank's last one, in numbers
    /// of the application's; the smallest comes back, with a communicator in which nothing of this one is under way. Every rank that
    /// lives must call it, as [`shrink`](Self::shrink), which it is beside that: ranks that have died or left are no members.
    ///
    /// The first call ends what other ranks wait in, asleep or not, as an abort does whose reason is "it rolls back"; then they call
    /// it too. Exchanges in flight are forgotten. What a rank still writes for them late lies in this communicator's memory, which
    /// the new one does not share: it cannot be taken for a later epoch.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, Error, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let mut comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let (mut done, mut tries) = (0, 0);
    /// while done < 3 {
    ///     let outcome = comm.barrier(); // an iteration
    ///     tries += 1;
    ///     match outcome {
    ///         Ok(()) if tries != 2 => done += 1,
    ///         // Somebody wants to run it again, or has died.
    ///         _ => (comm, done) = comm.rollback(done)?,
    ///     }
    /// }
    /// # assert_eq!(tries, 4);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`shrink`](Self::shrink).
    pub fn rollback(&self, finished: u64) -> Result<(Communicator, u64)> {
        let (mut rest, mut own) = (self.shrink_because("it rolls back")?, finished);
        loop {
            let deadline = rest.inner.deadline();
            let blob = fabric::encode(&own)?;
            // The guard is gone before anything else is done with the communicator.
            let parts = rest.inner.star().exchange(&blob, &[], deadline);
            match parts {
                Ok(parts) => {
                    for (blob, _) in &parts {
                        own = own.min(fabric::decode(blob)?);
                    }
                    return Ok((rest, own));
                }
                // One of them has died since: those that have learned all numbers, and those that have not, go on once more.
                Err(Error::PeerDied { .. } | Error::PeerUnreachable { .. } | Error::Aborted { .. }) => {
                    rest = rest.shrink_because("it rolls back")?;
                }
                Err(err) => return Err(err),
            }
        }
    }

    /// Makes an id on rank 0 and gives it to every rank, for a communicator of these ranks and others that are to come: of a
    /// restarted process, say. Every rank must call it. The application hands the id to the others; then all join:
    /// these with their ranks and the new number of ranks ([`init`](Self::init)), the others with the ranks from there on, and the
    /// same configuration. It carries an address where these ranks have met at one; it is good for that communicator only.
    ///
    /// ```
    /// use xccl::{Communicator, Config, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?; // what is left
    /// let id = comm.new_id()?;
    /// let newcomer = std::thread::spawn(move || Communicator::init(1, 2, &id, Config::default())?.barrier());
    /// let grown = Communicator::init(comm.rank(), comm.world_size() + 1, &id, comm.config().clone())?;
    /// grown.barrier()?;
    /// # newcomer.join().expect("the newcomer ends")
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::PeerDied`] and the like; [`Error::CannotListen`] on every rank where rank 0 can take no port.
    pub fn new_id(&self) -> Result<UniqueId> {
        let star = &mut self.inner.star();
        let made = if self.rank() == 0 { Some(star.new_id(true)) } else { None };
        let told =
            made.as_ref().map(|made| made.as_ref().map(|id| id.0.as_bytes().to_vec()).map_err(|err| err.to_string()));
        let parts = star.exchange(&fabric::encode(&told)?, &[], self.inner.deadline())?;
        let from_root =
            parts.first().map(|(blob, _)| fabric::decode::<Option<std::result::Result<Vec<u8>, String>>>(blob));
        if let Some(made) = made {
            // Kept until this rank joins with it.
            return Ok(made?.keep());
        }
        let failed = |why: String| Error::Bootstrap {
            during: "making an id for a new communicator",
            source: std::io::Error::other(format!("rank 0: {why}")),
        };
        let id =
            from_root.transpose()?.flatten().unwrap_or_else(|| Err("it has sent none".to_owned())).map_err(failed)?;
        let bytes = id.as_slice().try_into().map_err(|_| Error::Corrupt {
            rank: 0,
            what: "the length of a unique id",
            value: id.len() as u64,
            limit: 128,
        })?;
        UniqueId::from_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Config;
    use crate::comm::far_tests::on_nodes;

    #[test]
    fn all_go_back_to_what_the_slowest_has_finished() {
        for (nodes, seed) in [([0; 4], None), ([0, 1, 0, 1], Some(5))] {
            on_nodes(&nodes, seed, Config::default().timeout(Some(Duration::from_secs(20))), |comm| {
                let me = comm.rank();
                if me != 2 {
                    // Two of them are asleep in a call, one is late.
                    let Err(Error::Aborted { by, why, .. }) = comm.recv((me + 1) % 4, 9, &mut [0]) else { panic!() };
                    assert!(why == "it rolls back", "{by}: {why}");
                }
                let (rest, done) = comm.rollback(10 + me as u64).unwrap();
                assert_eq!((rest.world_size(), rest.rank(), done), (4, me, 10));
                rest.barrier().unwrap();
            });
        }
    }

    #[test]
    fn ranks_that_are_left_are_joined_by_others() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let receiver = std::sync::Mutex::new(receiver);
        let config = Config::default().timeout(Some(Duration::from_secs(20)));
        std::thread::scope(|s| {
            let newcomer = s.spawn(|| {
                let id: UniqueId = receiver.lock().unwrap().recv().unwrap();
                let comm = Communicator::init(2, 3, &id, config.clone()).unwrap();
                comm.barrier().unwrap();
            });
            on_nodes(&[0; 3], None, config.clone(), |comm| {
                if comm.rank() == 1 {
                    return;
                }
                let rest = comm.shrink().unwrap();
                let id = rest.new_id().unwrap();
                if rest.rank() == 0 {
                    sender.send(id).unwrap();
                }
                let grown = Communicator::init(rest.rank(), 3, &id, config.clone()).unwrap();
                grown.barrier().unwrap();
            });
            newcomer.join().unwrap();
        });
    }
}
