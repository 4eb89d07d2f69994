//! A comparison as Markdown.

use std::fmt::Write;

use super::report::{Report, Sample, Summary};
use super::task::What;

pub fn markdown(report: &Report) -> String {
    // Writing into a String does not fail.
    let mut text = String::new();
    let _ = writeln!(text, "# XCCL and its peers\n\n{}\n", heading(report));
    for what in [What::P2p, What::InPlace, What::ExpertMajor] {
        let Some(ranks) = report.ranks_of_series(what) else { continue };
        let title = match what {
            What::P2p => "Messages between two ranks: half round trip, us".to_owned(),
            _ => format!("{}, {ranks} ranks: dispatch + combine, us", layout(what)),
        };
        let over = if what == What::P2p { "bytes" } else { "tokens per rank" };
        let rows = report.sizes(what, ranks).into_iter().map(|size| (size, ranks, size));
        let _ = write!(text, "## {title}\n\n{}\n", table(report, what, over, &rows.collect::<Vec<_>>()));
    }
    let tokens = report.shape.tokens_over_ranks;
    for what in [What::InPlace, What::ExpertMajor] {
        let ranks = report.ranks(what, tokens);
        if ranks.len() > 1 {
            let rows: Vec<_> = ranks.into_iter().map(|r| (r, r, tokens)).collect();
            let title = format!("{}, {tokens} tokens per rank: dispatch + combine, us", layout(what));
            let _ = write!(text, "## {title}\n\n{}\n", table(report, what, "ranks", &rows));
        }
    }
    text.push_str(&commands(report));
    text.push_str(&missing(report));
    text
}

fn layout(what: What) -> &'static str {
    match what {
        What::ExpertMajor => "Rows copied to expert-major order",
        _ => "Rows used as they come",
    }
}

fn heading(report: &Report) -> String {
    let rounds: u32 = report.sessions.iter().map(|s| s.rounds).sum();
    let versions: Vec<String> = report.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let shape = &report.shape;
    format!(
        "{}. {rounds} rounds, contenders in turn. {}.\n\n\
         Exchanges: hidden {}, top-{} of {}, bf16, one routing for all. Each figure is the median over the rounds of a run's median, in \
         brackets the lowest and highest of these; x is a peer's time divided by XCCL's. The limit is measured in the same runs: \
         a line handover or a copy of the message; plain copies of the rows between the same memories.",
        report.machine,
        versions.join(", "),
        shape.hidden,
        shape.topk,
        shape.experts
    )
}

/// `rows`: what stands in front, ranks, size.
fn table(report: &Report, what: What, over: &str, rows: &[(usize, usize, usize)]) -> String {
    let names = report.contenders(what);
    let mut text = format!("| {over} | limit |");
    names.iter().for_each(|name| text.push_str(&format!(" {name} |")));
    text.push_str("\n| ---: |");
    text.push_str(&" ---: |".repeat(names.len() + 1));
    text.push('\n');
    for &(front, ranks, size) in rows {
        let limit = report.limit(what, ranks, size).map_or_else(|| "-".to_owned(), figure);
        let _ = write!(text, "| {front} | {limit} |");
        let ours = report.summary(what, ranks, size, super::ours::NAME).filter(|s| !s.other_state).map(|s| s.median);
        for name in &names {
            let cell = report.summary(what, ranks, size, name).map_or_else(|| "-".to_owned(), |s| cell(&s));
            let times = match (ours, report.summary(what, ranks, size, name)) {
                (Some(ours), Some(theirs)) if *name != super::ours::NAME && !theirs.other_state => {
                    format!(" **{}x**", ratio(theirs.median / ours))
                }
                _ => String::new(),
            };
            let _ = write!(text, " {cell}{times} |");
        }
        text.push('\n');
    }
    text + &lines(report, what)
}

/// In which state of the machine the times were taken.
fn lines(report: &Report, what: What) -> String {
    let Some(state) = report.state_compared(what) else { return String::new() };
    let (same, other): (Vec<&Sample>, Vec<&Sample>) =
        report.samples.iter().filter(|s| s.what == what).partition(|s| report.state(s) == Some(state));
    let lines = same.iter().flat_map(|s| s.at.line_ns).flatten();
    let (low, high) = (lines.clone().fold(f64::INFINITY, f64::min), lines.fold(0.0, f64::max));
    let mut text = format!("\nA line took {low:.0} to {high:.0} ns from core to core");
    if !other.is_empty() {
        let (other, all) = (other.len(), same.len() + other.len());
        let _ = write!(
            text,
            ". {other} of {all} samples of this kind were taken while it took something else, or changed: they are in compare.json, \
             and here, with a *, only where there is no other"
        );
    }
    text + ".\n"
}

fn cell(summary: &Summary) -> String {
    let what = match (summary.dispatch, summary.combine) {
        (Some(dispatch), Some(combine)) => format!("{} + {}", figure(dispatch), figure(combine)),
        _ => figure(summary.median),
    };
    let mark = if summary.other_state { "*" } else { "" };
    format!("{what} ({}-{}){mark}", figure(summary.low), figure(summary.high))
}

fn ratio(x: f64) -> String {
    if x < 10.0 { format!("{x:.2}") } else { format!("{x:.0}") }
}

/// Three digits.
fn figure(us: f64) -> String {
    match us {
        us if us < 1.0 => format!("{us:.3}"),
        us if us < 10.0 => format!("{us:.2}"),
        us if us < 100.0 => format!("{us:.1}"),
        us => format!("{us:.0}"),
    }
}

fn commands(report: &Report) -> String {
    let mut text = String::from(
        "## Commands\n\nEach ran under `xccl run --timeout`, with `--json` for its results; `--verify` in the first round: every byte \
         is checked outside the timing. UCX's program cannot check.\n\n```sh\n",
    );
    for command in &report.commands {
        let _ = writeln!(text, "{}", command.command);
    }
    text.push_str("```\n");
    text
}

fn missing(report: &Report) -> String {
    let mut text = String::new();
    if !report.skipped.is_empty() || !report.failed.is_empty() {
        text.push_str("\n## Missing\n\n");
    }
    for (name, reason) in &report.skipped {
        let _ = writeln!(text, "- skipped: {name}: {reason}");
    }
    for f in &report.failed {
        let _ = writeln!(
            text,
            "- failed: {}, {:?} on {} ranks, round {}: {}",
            f.contender,
            f.what,
            f.ranks,
            f.round + 1,
            f.reason
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::compare::report::tests::sample_report;
    use crate::bench::compare::report::{Command, Failure};

    #[test]
    fn rows_have_the_limit_ours_and_each_peer_with_its_ratio() {
        let text = markdown(&sample_report());
        let line = |begin: &str| text.lines().find(|l| l.starts_with(begin)).unwrap_or_else(|| panic!("{text}"));
        assert_eq!(line("| bytes"), "| bytes | limit | XCCL | Open MPI |");
        assert_eq!(line("| 8 |"), "| 8 | 0.050 | 0.200 (0.100-0.400) | 0.400 (0.200-0.800) **2.00x** |");
        assert_eq!(line("| 128 |"), "| 128 | 0.050 | 200 + 50.0 (250-250) | 400 + 250 (650-650) **2.60x** |");
        // Over ranks.
        assert_eq!(line("| 4 |"), "| 4 | 0.050 | 400 + 50.0 (450-450) | 800 + 250 (1050-1050) **2.33x** |");
        assert!(text.contains("\nA line took 32 to 40 ns from core to core.\n") && text.contains("3 rounds"), "{text}");
        assert!(!text.contains("Missing"), "{text}");
    }

    #[test]
    fn commands_and_whoever_is_missing_are_named() {
        let mut report = sample_report();
        let (contender, what, ranks) = ("Open MPI".to_owned(), What::P2p, 2);
        report.versions.insert("Open MPI".to_owned(), "4.1.4".to_owned());
        report.skipped.insert("UCX".to_owned(), "apt-get install ucx-utils".to_owned());
        report.commands.push(Command { contender: contender.clone(), what, ranks, command: "mpirun x".to_owned() });
        let reason = "it was ended after 60 s".to_owned();
        report.failed.push(Failure { contender, what, ranks, session: 0, round: 1, reason });
        let text = markdown(&report);
        for part in [
            "Open MPI 4.1.4",
            "\nmpirun x\n",
            "- skipped: UCX: apt-get install ucx-utils",
            "- failed: Open MPI, P2p on 2 ranks, round 2: it was ended after 60 s",
        ] {
            assert!(text.contains(part), "{part:?} is missing in {text}");
        }
    }
}
