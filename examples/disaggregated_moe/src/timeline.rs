//! What an attention rank was doing, to see whether its two micro-batches overlap.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytemuck::{Pod, Zeroable};

/// Spans that the picture shows.
const SHOWN: usize = 20;
/// Characters of the picture's width.
const WIDTH: usize = 100;

/// What becomes of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    Attention,
    AtExperts,
}

/// From when to when a micro-batch was what.
#[derive(Clone, Copy)]
struct Span {
    number: usize,
    doing: Doing,
    from: Duration,
    to: Duration,
}

/// Sums over the whole run.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct Counts {
    /// Turns in which a micro-batch with requests was attended to.
    pub turns: u64,
    /// Those of them during which the other micro-batch was at the experts.
    pub turns_overlapped: u64,
    /// Rows of all turns.
    pub rows: u64,
    /// Microseconds of all turns.
    pub attention: u64,
    /// Microseconds for which the rank had nothing to do but wait for the experts.
    pub waiting: u64,
}

pub struct Timeline {
    start: Instant,
    /// The latest, as many as are shown.
    latest: VecDeque<Span>,
    /// Those that have taken the least time so far: when nothing else has kept these processes from their cores.
    quickest: Vec<Span>,
    counts: Counts,
}

impl Default for Timeline {
    fn default() -> Self {
        Timeline { start: Instant::now(), latest: VecDeque::new(), quickest: vec![], counts: Counts::default() }
    }
}

impl Timeline {
    /// A span that ends now.
    pub fn add(&mut self, number: usize, doing: Doing, since: Instant) {
        let (from, to) = (since - self.start, self.start.elapsed());
        if doing == Doing::Attention {
            self.counts.attention += (to - from).as_micros() as u64;
        }
        self.keep(Span { number, doing, from, to });
    }

    fn keep(&mut self, span: Span) {
        if self.latest.len() == SHOWN {
            self.latest.pop_front();
        }
        self.latest.push_back(span);
        // When one micro-batch is without requests, the other one has nothing to overlap with.
        let of_each = self.latest.iter().filter(|span| span.number == 0).count();
        if self.latest.len() < SHOWN || of_each != SHOWN / 2 {
            return;
        }
        if self.quickest.is_empty() || length(&self.latest) < length(&self.quickest) {
            self.quickest = self.latest.iter().copied().collect();
        }
    }

    pub fn waited(&mut self, since: Instant) {
        self.counts.waiting += since.elapsed().as_micros() as u64;
    }

    pub fn attended(&mut self, rows: usize, overlapped: bool) {
        self.counts.turns += 1;
        self.counts.turns_overlapped += u64::from(overlapped);
        self.counts.rows += rows as u64;
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// A line for each micro-batch, none where little was done: `#` while it is attended to, `-` while it is at the experts.
    pub fn picture(&self) -> String {
        let shown = &self.quickest;
        let Some(start) = shown.iter().map(|span| span.from).min() else { return String::new() };
        let column = (length(shown) / WIDTH as u32).max(Duration::from_nanos(1));
        let at = |number: usize, n: u32| {
            let middle = start + column * n + column / 2;
            let is = |doing: Doing| {
                let covers = |s: &&Span| s.number == number && s.doing == doing && (s.from..s.to).contains(&middle);
                shown.iter().any(|span| covers(&span))
            };
            match () {
                () if is(Doing::Attention) => '#',
                () if is(Doing::AtExperts) => '-',
                () => ' ',
            }
        };
        let line = |number| (0..WIDTH as u32).map(|n| at(number, n)).collect::<String>();
        let title = format!(
            "# attention, - at the experts, in the quickest stretch; a column is {:.1} us",
            column.as_secs_f64() * 1e6
        );
        let lines = (0..2).map(|number| format!("micro-batch {number} |{}|", line(number)));
        [title].into_iter().chain(lines).map(|line| line + "\n").collect()
    }
}

/// From the beginning of the first to the end of the last.
fn length<'a>(spans: impl IntoIterator<Item = &'a Span> + Copy) -> Duration {
    let start = spans.into_iter().map(|span| span.from).min().unwrap_or_default();
    spans.into_iter().map(|span| span.to).max().unwrap_or_default() - start
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(number: usize, doing: Doing, from: u64, to: u64) -> Span {
        Span { number, doing, from: Duration::from_micros(from), to: Duration::from_micros(to) }
    }

    #[test]
    fn a_picture_shows_what_overlaps() {
        let mut timeline = Timeline::default();
        assert_eq!(timeline.picture(), "");
        timeline.quickest.extend([span(0, Doing::Attention, 100, 150), span(0, Doing::AtExperts, 140, 300)]);
        timeline.quickest.extend([span(1, Doing::Attention, 150, 200), span(1, Doing::AtExperts, 200, 250)]);
        let picture = timeline.picture();
        let lines: Vec<&str> = picture.lines().collect();
        assert!(lines[0].ends_with("a column is 2.0 us"), "{picture}");
        assert_eq!(lines[1], format!("micro-batch 0 |{}{}|", "#".repeat(25), "-".repeat(75)));
        assert_eq!(
            lines[2],
            format!("micro-batch 1 |{}{}{}{}|", " ".repeat(25), "#".repeat(25), "-".repeat(25), " ".repeat(25))
        );
    }

    #[test]
    fn the_quickest_stretch_is_kept() {
        let mut timeline = Timeline::default();
        for n in 0..100u64 {
            // Of ten microseconds each, but for 40 to 70, of which each takes one.
            let at = 10 * n - 9 * n.saturating_sub(40).min(30);
            timeline.keep(span(n as usize % 2, Doing::Attention, at, at + 1));
        }
        assert_eq!(timeline.quickest.len(), SHOWN);
        assert_eq!(length(&timeline.quickest), Duration::from_micros(SHOWN as u64));
        assert!(timeline.quickest[0].from >= Duration::from_micros(400));
        // Not one in which a micro-batch was alone, which takes no time here.
        (0..SHOWN).for_each(|_| timeline.keep(span(0, Doing::Attention, 2000, 2000)));
        assert!(timeline.quickest[0].from < Duration::from_micros(2000));
    }
}
