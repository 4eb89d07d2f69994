//! All samples of a comparison, as compare.json keeps them, and their medians.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::reading::{Reading, Times};
use super::task::{Shape, What};

#[derive(Serialize, Deserialize)]
pub struct Report {
    pub machine: String,
    pub shape: Shape,
    /// By contender.
    pub versions: BTreeMap<String, String>,
    pub sessions: Vec<Session>,
    pub commands: Vec<Command>,
    pub skipped: BTreeMap<String, String>,
    pub failed: Vec<Failure>,
    pub samples: Vec<Sample>,
}

#[derive(Serialize, Deserialize)]
pub struct Session {
    /// Seconds since 1970.
    pub began: u64,
    pub rounds: u32,
}

/// When a sample was taken.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Moment {
    pub session: usize,
    pub round: u32,
    /// What a line took from core to core before and after the run.
    pub line_ns: [Option<f64>; 2],
}

/// Virtual cores move on the cores that there are, within minutes or seconds, and with them the time of a line changes by a factor
/// of ten. Times of one state say nothing on those of the other one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    /// Lines took at most twice the shortest time that was seen.
    Near,
    /// They took longer.
    Far,
}

/// What was run, as a person would type it.
#[derive(Serialize, Deserialize)]
pub struct Command {
    pub contender: String,
    pub what: What,
    pub ranks: usize,
    pub command: String,
}

#[derive(Serialize, Deserialize)]
pub struct Failure {
    pub contender: String,
    pub what: What,
    pub ranks: usize,
    pub session: usize,
    pub round: u32,
    pub reason: String,
}

/// The medians of one run at one size.
#[derive(Serialize, Deserialize)]
pub struct Sample {
    pub what: What,
    pub ranks: usize,
    /// Bytes, or tokens per rank.
    pub size: usize,
    pub contender: String,
    #[serde(flatten)]
    pub at: Moment,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub half_rtt_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dispatch_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub combine_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verified: Option<bool>,
}

/// Over the rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Median, lowest, highest: of the half round trip, or of dispatch and combine together.
    pub median: f64,
    pub low: f64,
    pub high: f64,
    pub dispatch: Option<f64>,
    pub combine: Option<f64>,
    /// There is no sample of the state that the others are of.
    pub other_state: bool,
}

impl Report {
    pub fn new(machine: String, shape: &Shape) -> Self {
        let shape = shape.clone();
        Report {
            machine,
            shape,
            versions: BTreeMap::new(),
            sessions: vec![],
            commands: vec![],
            skipped: BTreeMap::new(),
            failed: vec![],
            samples: vec![],
        }
    }

    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {path:?}, which --add adds to"))?;
        serde_json::from_str(&text).with_context(|| format!("reading {path:?}"))
    }

    /// Samples of another machine or other rows do not belong into the same medians.
    pub fn can_be_added_to(&self, machine: &str, shape: &Shape, path: &Path) -> Result<()> {
        let model = |s: &Shape| (s.hidden, s.topk, s.experts, s.tokens_over_ranks);
        ensure!(
            self.machine == machine && model(&self.shape) == model(shape),
            "{path:?} was measured on {:?} with hidden, top-k, experts, tokens {:?}, and this is {machine:?} with {:?}: leave out \
             --add, or choose another --out",
            self.machine,
            model(&self.shape),
            model(shape)
        );
        Ok(())
    }

    pub fn last_session(&self) -> usize {
        self.sessions.len().saturating_sub(1)
    }

    /// Contenders in the order of their first sample, for one kind.
    pub fn contenders(&self, what: What) -> Vec<&str> {
        let mut names: Vec<&str> = vec![];
        for sample in self.samples.iter().filter(|s| s.what == what) {
            if !names.contains(&sample.contender.as_str()) {
                names.push(&sample.contender);
            }
        }
        // Ours first, the others by name: the rounds begin with another one each.
        names.sort_by_key(|&name| (name != super::ours::NAME, name));
        names
    }

    /// The state in which a sample was taken, if it was one and the same.
    pub fn state(&self, sample: &Sample) -> Option<State> {
        let lines = self.samples.iter().flat_map(|s| s.at.line_ns).flatten();
        let near = 2.0 * lines.min_by(f64::total_cmp)?;
        match sample.at.line_ns {
            [Some(before), Some(after)] if before.max(after) <= near => Some(State::Near),
            [Some(before), Some(after)] if before.min(after) > near => Some(State::Far),
            _ => None,
        }
    }

    /// The state in which most of the points of one kind have a sample; these are compared.
    pub fn state_compared(&self, what: What) -> Option<State> {
        let points = |state: State| {
            let here = self.samples.iter().filter(|s| s.what == what && self.state(s) == Some(state));
            here.map(|s| (s.ranks, s.size, &s.contender)).collect::<BTreeSet<_>>().len()
        };
        let (near, far) = (points(State::Near), points(State::Far));
        match near.max(far) {
            0 => None,
            _ => Some(if near >= far { State::Near } else { State::Far }),
        }
    }

    pub fn summary(&self, what: What, ranks: usize, size: usize, contender: &str) -> Option<Summary> {
        let here = |s: &&Sample| s.what == what && s.ranks == ranks && s.size == size && s.contender == contender;
        let all: Vec<&Sample> = self.samples.iter().filter(here).collect();
        let state = self.state_compared(what);
        let same: Vec<&Sample> = all.iter().copied().filter(|s| state.is_none() || self.state(s) == state).collect();
        let other_state = same.is_empty();
        let samples = if other_state { all } else { same };
        let totals: Vec<f64> = samples.iter().map(|s| s.total()).collect();
        Some(Summary {
            median: median(totals.clone())?,
            low: totals.iter().copied().min_by(f64::total_cmp)?,
            high: totals.iter().copied().max_by(f64::total_cmp)?,
            dispatch: median(samples.iter().filter_map(|s| s.dispatch_us).collect()),
            combine: median(samples.iter().filter_map(|s| s.combine_us).collect()),
            other_state,
        })
    }

    /// What the machine needs for the same, where somebody has measured it.
    pub fn limit(&self, what: What, ranks: usize, size: usize) -> Option<f64> {
        let state = self.state_compared(what);
        let here = |s: &&Sample| s.what == what && s.ranks == ranks && s.size == size;
        let limits = self.samples.iter().filter(here).filter(|s| state.is_none() || self.state(s) == state);
        median(limits.filter_map(|s| s.limit_us).collect())
    }

    /// Sizes of one kind and number of ranks, ascending.
    pub fn sizes(&self, what: What, ranks: usize) -> Vec<usize> {
        let mut sizes: Vec<usize> =
            self.samples.iter().filter(|s| s.what == what && s.ranks == ranks).map(|s| s.size).collect();
        sizes.sort_unstable();
        sizes.dedup();
        sizes
    }

    /// Numbers of ranks with which one kind and size was measured, ascending.
    pub fn ranks(&self, what: What, size: usize) -> Vec<usize> {
        let mut ranks: Vec<usize> =
            self.samples.iter().filter(|s| s.what == what && s.size == size).map(|s| s.ranks).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }

    /// The number of ranks that has the most sizes: that of the series over sizes.
    pub fn ranks_of_series(&self, what: What) -> Option<usize> {
        let ranks = self.samples.iter().filter(|s| s.what == what).map(|s| s.ranks);
        ranks.max_by_key(|&r| (self.sizes(what, r).len(), std::cmp::Reverse(r)))
    }
}

impl Sample {
    pub fn new(what: What, ranks: usize, contender: &str, at: Moment, reading: &Reading) -> Self {
        let (half_rtt_us, dispatch_us, combine_us) = match reading.times {
            Times::HalfRoundTrip(t) => (Some(t), None, None),
            Times::Exchange { dispatch, combine } => (None, Some(dispatch), Some(combine)),
        };
        // No message is faster than a line, and the run's own game of lines may have met a busy core.
        let line_us = at.line_ns.into_iter().flatten().min_by(f64::total_cmp).unwrap_or(0.0) / 1e3;
        let limit_us = match what {
            What::P2p => reading.limit_us.map(|limit| limit.max(line_us)),
            What::InPlace | What::ExpertMajor => reading.limit_us,
        };
        let (size, contender, verified) = (reading.size, contender.to_owned(), reading.verified);
        Sample { what, ranks, size, contender, at, half_rtt_us, dispatch_us, combine_us, limit_us, verified }
    }

    fn total(&self) -> f64 {
        self.half_rtt_us.unwrap_or(0.0) + self.dispatch_us.unwrap_or(0.0) + self.combine_us.unwrap_or(0.0)
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Two contenders, three rounds of messages and one of exchanges.
    pub fn sample_report() -> Report {
        let mut report = Report::new("a machine".to_owned(), &Shape::full());
        report.sessions.push(Session { began: 0, rounds: 3 });
        let at = |round| Moment { session: 0, round, line_ns: [Some(32.0), Some(40.0)] };
        let reading = |size, times| Reading {
            size,
            times,
            limit_us: Some(0.05),
            version: None,
            verified: Some(true),
            routing_sum: None,
        };
        for (round, half) in [(0, 0.2), (1, 0.1), (2, 0.4)] {
            for (name, factor) in [("Open MPI", 2.0), ("XCCL", 1.0)] {
                for (size, more) in [(8, 1.0), (4096, 5.0)] {
                    let times = Times::HalfRoundTrip(half * factor * more);
                    report.samples.push(Sample::new(What::P2p, 2, name, at(round), &reading(size, times)));
                }
            }
        }
        for (name, dispatch, combine) in [("XCCL", 100.0, 50.0), ("Open MPI", 200.0, 250.0)] {
            for ranks in [2, 4] {
                let times = Times::Exchange { dispatch: dispatch * ranks as f64, combine };
                report.samples.push(Sample::new(What::InPlace, ranks, name, at(0), &reading(128, times)));
            }
        }
        report
    }

    #[test]
    fn medians_and_ranges_are_over_rounds() {
        let report = sample_report();
        let summary = report.summary(What::P2p, 2, 8, "Open MPI").unwrap();
        assert_eq!((summary.median, summary.low, summary.high), (0.4, 0.2, 0.8));
        let summary = report.summary(What::InPlace, 4, 128, "XCCL").unwrap();
        assert_eq!((summary.median, summary.dispatch, summary.combine), (450.0, Some(400.0), Some(50.0)));
        assert_eq!(report.summary(What::InPlace, 8, 128, "XCCL"), None);
        assert_eq!(report.limit(What::P2p, 2, 8), Some(0.05));
        assert_eq!((median(vec![]), median(vec![3.0, 1.0])), (None, Some(2.0)));
    }

    #[test]
    fn samples_of_another_state_are_left_out_or_marked() {
        let mut report = sample_report();
        let far = Moment { session: 0, round: 3, line_ns: [Some(160.0), Some(200.0)] };
        let changed = Moment { line_ns: [Some(32.0), Some(200.0)], ..far };
        let reading = |half| Reading {
            size: 8,
            times: Times::HalfRoundTrip(half),
            limit_us: None,
            version: None,
            verified: None,
            routing_sum: None,
        };
        for at in [far, changed] {
            report.samples.push(Sample::new(What::P2p, 2, "Open MPI", at, &reading(9.0)));
        }
        report.samples.push(Sample::new(What::P2p, 2, "UCX", far, &reading(7.0)));
        assert_eq!(report.state_compared(What::P2p), Some(State::Near));
        let summary = report.summary(What::P2p, 2, 8, "Open MPI").unwrap();
        assert_eq!((summary.median, summary.high, summary.other_state), (0.4, 0.8, false));
        let summary = report.summary(What::P2p, 2, 8, "UCX").unwrap();
        assert_eq!((summary.median, summary.other_state), (7.0, true));
        // Where no line was ever measured, all samples are of one kind.
        report.samples.iter_mut().for_each(|s| s.at.line_ns = [None, None]);
        assert_eq!(report.state_compared(What::P2p), None);
        let summary = report.summary(What::P2p, 2, 8, "Open MPI").unwrap();
        assert_eq!((summary.high, summary.other_state), (9.0, false));
    }

    #[test]
    fn ours_comes_first_and_series_are_found() {
        let report = sample_report();
        assert_eq!(report.contenders(What::P2p), ["XCCL", "Open MPI"]);
        assert_eq!(report.sizes(What::P2p, 2), [8, 4096]);
        assert_eq!(report.ranks(What::InPlace, 128), [2, 4]);
        assert_eq!(report.ranks_of_series(What::InPlace), Some(2));
        assert_eq!(report.ranks_of_series(What::ExpertMajor), None);
    }

    #[test]
    fn a_report_comes_back_from_its_file_and_is_not_mixed_with_another_machines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("compare.json");
        let report = sample_report();
        fs::write(&path, serde_json::to_string(&report).unwrap()).unwrap();
        let back = Report::load(&path).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), serde_json::to_string(&report).unwrap());
        back.can_be_added_to("a machine", &Shape::full(), &path).unwrap();
        let error = back.can_be_added_to("another", &Shape::full(), &path).unwrap_err().to_string();
        assert!(error.contains("another") && error.contains("--add"), "{error}");
        assert!(back.can_be_added_to("a machine", &Shape::quick(), &path).is_err());
    }
}
