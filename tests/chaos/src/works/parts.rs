//! Communicators made of others.

use rand::Rng;
use rand::rngs::StdRng;
use xccl::Communicator;

use super::{Played, messages};

/// Parts of the ranks, in the reverse order; some are in none.
pub fn split(comm: &Communicator, rng: &mut StdRng) -> Played {
    let colors = rng.random_range(1..4);
    let of: Vec<Option<u32>> =
        (0..comm.world_size()).map(|_| Some(rng.random_range(0..colors)).filter(|_| rng.random_bool(0.9))).collect();
    let (me, mine) = (comm.rank(), of[comm.rank()]);
    let members: Vec<usize> = (0..of.len()).rev().filter(|&rank| mine.is_some() && of[rank] == mine).collect();
    let Some(part) = comm.split(mine, -(me as i32)).map_err(|err| in_either(err, &members))? else { return Ok(()) };
    messages::ring(&part, rng).map_err(|fault| fault.of_part(&members))?;
    part.barrier().map_err(|err| super::Fault::from(err).of_part(&members))
}

/// A split speaks first in the whole communicator and then in the part: an error of joining the part has the part's numbers. The
/// two are told apart by the ranks that there are, where that is possible; else both are taken for blamed.
fn in_either(err: xccl::Error, members: &[usize]) -> super::Fault {
    match super::Fault::from(err) {
        super::Fault::Told { mut blamed, err, text } => {
            let in_part: Vec<_> = blamed.iter().filter_map(|&rank| members.get(rank).copied()).collect();
            blamed.extend(in_part);
            super::Fault::Told { blamed, err, text: format!("in a part of ranks {members:?}, or before: {text}") }
        }
        wrong => wrong,
    }
}

pub fn duplicate(comm: &Communicator, rng: &mut StdRng) -> Played {
    let twin = comm.duplicate()?;
    messages::ring(&twin, rng)?;
    // The first is still what it was.
    messages::ring(comm, rng)
}
