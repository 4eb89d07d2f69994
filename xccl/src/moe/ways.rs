//! Through the caches or past them: which copy into the outbox is faster is found out while working.
//!
//! It depends on where the cores are that have read the rows since, which nothing tells. 1.8 MB of rows into memory that another
//! core has read take 29 us through the caches and 103 past them where the two cores share a third-level cache, and 230 and 71
//! where they do not.

use std::time::Duration;

use super::layout::SLOTS;

/// Copies done the same way before their time is believed: after a change of the way the lines of each slot are where the other
/// way has left them.
const UNSETTLED: u32 = SLOTS as u32;
/// Copies of a trial.
const TRIAL: u32 = 2 * UNSETTLED;
/// From one trial to the next: where the slower way takes four times as long, trials cost 2 % of the time.
const PERIOD: u32 = 512;

/// What copies have taken, either way.
#[derive(Default)]
pub(super) struct Ways {
    /// Nanoseconds per byte: past the caches, through them.
    costs: [f32; 2],
    favourite: usize,
    /// Copies in this period: a few by the favourite way, a trial of the other one, the rest by the favourite again.
    copies: u32,
}

impl Ways {
    fn is_trial(&self) -> bool {
        (TRIAL..2 * TRIAL).contains(&self.copies)
    }

    fn way(&self) -> usize {
        if self.is_trial() { 1 - self.favourite } else { self.favourite }
    }

    /// Whether the next copy should go past the caches.
    pub(super) fn past_caches(&self) -> bool {
        self.way() == 0
    }

    /// Notes what that copy has taken. The better of two counts: others were held up.
    pub(super) fn took(&mut self, bytes: usize, time: Duration) {
        let cost = time.as_nanos() as f32 / bytes.max(1) as f32;
        // The last copies before the trial and the last of it.
        let settled = (self.copies % TRIAL).checked_sub(UNSETTLED).filter(|_| self.copies < 2 * TRIAL);
        let known = &mut self.costs[self.way()];
        match settled {
            Some(0) => *known = cost,
            Some(_) => *known = known.min(cost),
            None => {}
        }
        self.copies += 1;
        if self.copies == 2 * TRIAL {
            self.favourite = usize::from(self.costs[1] < self.costs[0]);
        }
        self.copies %= PERIOD;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A copy through the caches takes long when the one before, into the same slot, went past them. How many went past them, and
    /// one in `held_up` of all took ten times as long.
    fn run(ways: &mut Ways, copies: usize, costs: [u64; 2], held_up: usize) -> usize {
        let mut slots = [true; SLOTS];
        let copies = (1..=copies).map(|i| {
            let past = ways.past_caches();
            let before = std::mem::replace(&mut slots[i % SLOTS], past);
            let cost = if past {
                costs[0]
            } else if before {
                500
            } else {
                costs[1]
            };
            let factor = if i.is_multiple_of(held_up) { 10 } else { 1 };
            ways.took(1000, Duration::from_nanos(cost * factor));
            usize::from(past)
        });
        copies.sum()
    }

    #[test]
    fn the_faster_way_is_taken_and_a_change_is_noticed() {
        for held_up in [7, 64, usize::MAX] {
            let mut ways = Ways::default();
            assert!(run(&mut ways, 1024, [103, 29], held_up) <= 16);
            assert!(run(&mut ways, 2048, [71, 230], held_up) >= 2048 - 512 - 16);
            assert!(run(&mut ways, 2048, [103, 29], held_up) <= 512 + 16);
        }
    }
}
