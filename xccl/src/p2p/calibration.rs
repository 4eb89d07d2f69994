//! Which way long messages take: chosen by measurement while a communicator is being joined.
//!
//! Ranks 0 and 1 send each other a few messages through the ring, and a few that the receiver reads with `process_vm_readv`,
//! by the very calls that will carry the application's. All ranks take what these two have found: one machine, one answer, and
//! sixty-four ranks that measured at once on a few cores would find anything but the truth. Which way a message takes is its
//! sender's choice alone, so nothing breaks where a rank has been told otherwise.
//!
//! On a machine where a line takes 22 or 200 ns, as its virtual cores happen to lie, 64 KiB took 1.3 or 4.4 us through the ring
//! and 5.0 or 5.8 by `process_vm_readv`, 256 KiB 4.4 or 10.7 and 16.5: the calls walk page tables, the ring's pieces stay in
//! the caches. Other kernels and processors differ in both.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Source;
use crate::comm::config::{Config, Origin};
use crate::comm::inner::CommInner;
use crate::error::Result;

/// How long messages from private memory travel, and how that was chosen.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Calibration {
    /// From this many bytes on the receiver reads the sender's memory with `process_vm_readv`, where the kernel allows it;
    /// shorter ones go through the ring, and all of them where this is `None`.
    pub private_rendezvous: Option<usize>,
    /// Who chose it: [`Origin::Measured`], or whoever set `XCCL_RENDEZVOUS`, or the default where nothing could be measured.
    pub origin: Origin,
    /// What was measured.
    pub points: Vec<CalibrationPoint>,
}

/// One size that was measured both ways.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CalibrationPoint {
    /// Bytes of the message.
    pub bytes: usize,
    /// Microseconds of half a round trip through the ring.
    pub ring_us: f64,
    /// Microseconds of half a round trip with `process_vm_readv`.
    pub cma_us: f64,
}

/// Ascending. Shorter messages go through the ring anyway: the receiver's answer would cost more than the copy.
const SIZES: [usize; 2] = [64 << 10, 256 << 10];
/// Round trips of each kind; the fastest counts, and the first also brings in the pages.
const ROUNDS: usize = 5;
/// Where a round trip takes a time slice, the fastest so far has to do.
const LONGEST: Duration = Duration::from_millis(5);
/// Bytes per microsecond that the slowest way of copying exceeds on whatever machine this runs.
const SLOWEST_COPY: f64 = 1000.0;
/// No other messages are under way yet, so that any tag would do.
const TAG: u64 = u32::MAX as u64;

/// What rank 0 asks rank 1 for next.
const STOP: u8 = 0;
const RING: u8 = 1;
const CMA: u8 = 2;

impl Calibration {
    /// What the configuration says. Its default, where nothing could be measured: through the ring if every rank has a core.
    /// If not, two processes would have to take turns on a core for each ringful, and do so once for a message that the
    /// receiver reads by itself.
    pub(crate) fn set(config: &Config, has_core_each: bool) -> Self {
        let origin = config.rendezvous_origin();
        let reads = config.cma && !(has_core_each && origin == Origin::Default);
        Calibration { private_rendezvous: reads.then_some(config.rendezvous_bytes), origin, points: vec![] }
    }

    /// What is measured decides: the shortest size from which on reading the sender's memory is faster.
    fn of(points: Vec<CalibrationPoint>) -> Self {
        let slower = points.iter().rposition(|p| p.cma_us >= p.ring_us);
        let first = slower.map_or(0, |at| at + 1);
        let private_rendezvous = points.get(first).map(|p| p.bytes);
        Calibration { private_rendezvous, origin: Origin::Measured, points }
    }
}

/// Takes what rank 0 has measured, unless that tells of the scheduler and not of copies.
pub(crate) fn choose_from(config: &Config, has_core_each: bool, mut points: Vec<CalibrationPoint>) -> Calibration {
    points.retain(|p| p.ring_us.max(p.cma_us) <= p.bytes as f64 / SLOWEST_COPY);
    match points.is_empty() || !config.leaves_to_measurement() {
        true => Calibration::set(config, has_core_each),
        false => Calibration::of(points),
    }
}

/// Measures between ranks 0 and 1; nothing on the others. Gives rank 0's points, none when it took too long to
/// measure a single one.
pub(crate) fn measure(comm: &CommInner) -> Result<Vec<CalibrationPoint>> {
    let mut points = vec![];
    match comm.rank {
        0 => {
            let started = Instant::now();
            'sizes: for bytes in SIZES {
                let mut buffers = (vec![1u8; bytes], vec![0u8; bytes]);
                let [mut ring_us, mut cma_us] = [f64::INFINITY; 2];
                for round in 0..2 * ROUNDS {
                    if started.elapsed() > LONGEST {
                        if round >= 2 {
                            points.push(CalibrationPoint { bytes, ring_us, cma_us });
                        }
                        break 'sizes;
                    }
                    let (way, best) = if round % 2 == 0 { (RING, &mut ring_us) } else { (CMA, &mut cma_us) };
                    ask(comm, way, bytes)?;
                    choose(comm, way);
                    let start = Instant::now();
                    comm.p2p.send(comm, 1, TAG, &buffers.0)?;
                    comm.p2p.recv(comm, Source::Rank(1), TAG, &mut buffers.1)?;
                    *best = best.min(start.elapsed().as_secs_f64() * 1e6 / 2.0);
                }
                points.push(CalibrationPoint { bytes, ring_us, cma_us });
            }
            ask(comm, STOP, 0)?;
        }
        1 => {
            let mut buffers = (vec![1u8; SIZES[SIZES.len() - 1]], vec![0u8; SIZES[SIZES.len() - 1]]);
            loop {
                let mut asked = [0; 9];
                comm.p2p.recv(comm, Source::Rank(0), TAG, &mut asked)?;
                let [way, bytes @ ..] = asked;
                if way == STOP {
                    break;
                }
                choose(comm, way);
                let bytes = (u64::from_le_bytes(bytes) as usize).min(buffers.0.len());
                comm.p2p.recv(comm, Source::Rank(0), TAG, &mut buffers.1[..bytes])?;
                comm.p2p.send(comm, 0, TAG, &buffers.0[..bytes])?;
            }
        }
        _ => {}
    }
    Ok(points)
}

fn ask(comm: &CommInner, way: u8, bytes: usize) -> Result<()> {
    let mut asked = [way; 9];
    asked[1..].copy_from_slice(&(bytes as u64).to_le_bytes());
    comm.p2p.send(comm, 1, TAG, &asked)
}

fn choose(comm: &CommInner, way: u8) {
    comm.p2p.set_private_rendezvous(if way == CMA { Some(0) } else { None });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(times: [(f64, f64); 2]) -> Option<usize> {
        let point = |(i, (ring_us, cma_us))| CalibrationPoint { bytes: SIZES[i], ring_us, cma_us };
        Calibration::of(times.into_iter().enumerate().map(point).collect()).private_rendezvous
    }

    #[test]
    fn times_of_the_scheduler_choose_nothing_and_a_setting_stands() {
        let point = |ring_us, cma_us| CalibrationPoint { bytes: 65536, ring_us, cma_us };
        let (open, set) = (Config::default(), Config::default().rendezvous_bytes(1000));
        for (has_core_each, private_rendezvous) in [(true, None), (false, Some(32 << 10))] {
            let chosen = choose_from(&open, has_core_each, vec![point(5.0, 300.0)]);
            assert_eq!(chosen, Calibration { private_rendezvous, origin: Origin::Default, points: vec![] });
        }
        assert_eq!(choose_from(&open, false, vec![point(5.0, 6.0)]).origin, Origin::Measured);
        assert_eq!(choose_from(&open, false, vec![point(5.0, 6.0)]).private_rendezvous, None);
        let chosen = choose_from(&set, true, vec![point(5.0, 6.0)]);
        assert_eq!((chosen.private_rendezvous, chosen.origin), (Some(1000), Origin::Code));
    }

    #[test]
    fn the_faster_way_is_taken_from_the_size_on_where_it_is_faster() {
        assert_eq!(chosen([(1.0, 2.0), (4.0, 8.0)]), None);
        assert_eq!(chosen([(1.0, 2.0), (8.0, 4.0)]), Some(256 << 10));
        assert_eq!(chosen([(2.0, 1.0), (8.0, 4.0)]), Some(64 << 10));
        // Faster for the shorter ones only: a long message is worth more than a short one.
        assert_eq!(chosen([(2.0, 1.0), (4.0, 8.0)]), None);
    }
}
