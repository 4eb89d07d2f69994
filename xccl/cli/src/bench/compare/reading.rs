//! What a run tells of one size, in the words of each program.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::contender::Reads;
use crate::bench::figures::Percentiles;

/// One measured point: the medians.
#[derive(Debug, PartialEq)]
pub struct Reading {
    /// Bytes, or tokens per rank.
    pub size: usize,
    pub times: Times,
    /// What the machine needs for the same, where the program has measured it.
    pub limit_us: Option<f64>,
    pub version: Option<String>,
    pub verified: Option<bool>,
    pub routing_sum: Option<u64>,
}

/// Microseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Times {
    HalfRoundTrip(f64),
    Exchange { dispatch: f64, combine: f64 },
}

/// A line of JSON, of ours or of a peer.
#[derive(Deserialize)]
struct Line {
    bytes: Option<usize>,
    tokens: Option<usize>,
    half_rtt_us: Option<Percentiles>,
    dispatch_us: Option<Percentiles>,
    combine_us: Option<Percentiles>,
    limit: Option<Limit>,
    version: Option<String>,
    verified: Option<bool>,
    routing_sum: Option<u64>,
}

#[derive(Deserialize)]
struct Limit {
    line_ns: Option<f64>,
    memcpy_us: Option<f64>,
    dispatch_us: Option<f64>,
    combine_us: Option<f64>,
}

pub fn read(reads: Reads, text: &str) -> Result<Vec<Reading>> {
    let readings: Vec<Reading> = match reads {
        Reads::JsonLines => text.lines().map(json_line).collect::<Result<_>>()?,
        Reads::UcxTable => text.lines().filter_map(|line| ucx_line(line).transpose()).collect::<Result<_>>()?,
    };
    ensure!(!readings.is_empty(), "it ended well and printed no result");
    for reading in &readings {
        let times = match reading.times {
            Times::HalfRoundTrip(t) => [t, t],
            Times::Exchange { dispatch, combine } => [dispatch, combine],
        };
        ensure!(times.iter().all(|t| t.is_finite() && *t > 0.0), "{times:?} us at size {}: no times", reading.size);
    }
    Ok(readings)
}

fn json_line(text: &str) -> Result<Reading> {
    let line: Line = serde_json::from_str(text).with_context(|| format!("reading {text:?}"))?;
    let limit = line.limit.as_ref();
    let (size, times, limit_us) = match (line.bytes, line.tokens) {
        (Some(bytes), None) => {
            let half = line.half_rtt_us.with_context(|| format!("{text:?} has no half_rtt_us"))?.median;
            // A message is not faster than a line, nor than a copy of it.
            let line_us = limit.and_then(|l| l.line_ns).unwrap_or(0.0) / 1e3;
            (bytes, Times::HalfRoundTrip(half), limit.and_then(|l| l.memcpy_us).map(|copy| copy.max(line_us)))
        }
        (None, Some(tokens)) => {
            let (Some(dispatch), Some(combine)) = (line.dispatch_us, line.combine_us) else {
                bail!("{text:?} has no dispatch_us or no combine_us");
            };
            let limit_us = limit.and_then(|l| Some(l.dispatch_us? + l.combine_us?));
            (tokens, Times::Exchange { dispatch: dispatch.median, combine: combine.median }, limit_us)
        }
        _ => bail!("{text:?} has neither bytes nor tokens"),
    };
    let Line { version, verified, routing_sum, .. } = line;
    Ok(Reading { size, times, limit_us, version, verified, routing_sum })
}

/// `SIZE,ITERATIONS,PERCENTILE,AVERAGE,…`, the name of each test being the size; other lines are headings.
fn ucx_line(text: &str) -> Result<Option<Reading>> {
    let mut fields = text.split(',');
    let Some(Ok(size)) = fields.next().map(str::parse::<usize>) else { return Ok(None) };
    let median = fields.nth(1).and_then(|field| field.trim().parse::<f64>().ok());
    let half = median.with_context(|| format!("{text:?}: the third column is no time"))?;
    let times = Times::HalfRoundTrip(half);
    Ok(Some(Reading { size, times, limit_us: None, version: None, verified: None, routing_sum: None }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_points_and_the_peers_are_read_alike() {
        let ours = r#"{"bench":"p2p","ranks":2,"bytes":8,"half_rtt_us":{"p10":0.1,"median":0.2,"p90":0.3},"gbps":0.1,
            "limit":{"line_ns":32.0,"memcpy_us":0.001},"verified":true}"#
            .replace('\n', "");
        let readings = read(Reads::JsonLines, &ours).unwrap();
        assert_eq!(readings[0].size, 8);
        assert_eq!(readings[0].times, Times::HalfRoundTrip(0.2));
        assert_eq!(readings[0].limit_us, Some(0.032), "a line takes longer than the copy");
        assert_eq!(readings[0].verified, Some(true));
        let peer = r#"{"peer":"mpich","version":"4.0.2","tokens":8,"routing_sum":18446744073709551615,
            "dispatch_us":{"p10":1,"median":2.5,"p90":3},"combine_us":{"p10":1,"median":4,"p90":5},"verified":null}"#
            .replace('\n', "");
        let reading = &read(Reads::JsonLines, &peer).unwrap()[0];
        assert_eq!(reading.times, Times::Exchange { dispatch: 2.5, combine: 4.0 });
        assert_eq!((reading.limit_us, reading.verified), (None, None));
        assert_eq!((reading.version.as_deref(), reading.routing_sum), (Some("4.0.2"), Some(u64::MAX)));
    }

    #[test]
    fn the_table_of_ucx_is_read_by_its_percentile() {
        let table = "ucx.txt,iterations,50.0_percentile_lat,avg_lat,overall_lat,avg_bw,overall_bw,avg_mr,overall_mr\n\
                     8,1000,0.170,0.171,0.171,43.10,43.10,5649541,5649541\n\
                     1048576,300,85.250,86.1,86.1,1.0,1.0,11,11\n";
        let readings = read(Reads::UcxTable, table).unwrap();
        let all: Vec<_> = readings.iter().map(|r| (r.size, r.times)).collect();
        assert_eq!(all, [(8, Times::HalfRoundTrip(0.17)), (1 << 20, Times::HalfRoundTrip(85.25))]);
    }

    #[test]
    fn what_is_no_result_is_an_error_that_shows_it() {
        for (reads, text, says) in [
            (Reads::JsonLines, "", "printed no result"),
            (Reads::JsonLines, "{\"bytes\":8}", "half_rtt_us"),
            (Reads::JsonLines, "{\"verified\":true}", "neither bytes nor tokens"),
            (Reads::JsonLines, "Segmentation fault", "Segmentation fault"),
            (Reads::JsonLines, "{\"bytes\":8,\"half_rtt_us\":{\"p10\":0,\"median\":0,\"p90\":0}}", "no times"),
            (Reads::UcxTable, "8,1000,+--,", "third column"),
            (Reads::UcxTable, "Waiting for connection...\n", "printed no result"),
        ] {
            let error = format!("{:#}", read(reads, text).unwrap_err());
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }
}
