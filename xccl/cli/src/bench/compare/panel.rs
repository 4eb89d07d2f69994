//! The curves of a comparison, whoever draws them.

use super::report::Report;
use super::task::What;

/// One diagram: time against something, both logarithmic.
pub struct Panel {
    pub title: String,
    /// What is counted along the x axis.
    pub over: &'static str,
    /// In bytes, 4 Ki is a rounder number than 4000.
    pub in_bytes: bool,
    pub curves: Vec<Curve>,
    /// What the machine needs.
    pub limit: Vec<(f64, f64)>,
}

pub struct Curve {
    pub name: String,
    /// Microseconds over x.
    pub points: Vec<(f64, f64)>,
}

/// Those that have something to show.
pub fn panels(report: &Report) -> Vec<Panel> {
    let mut panels = vec![];
    for what in [What::P2p, What::InPlace, What::ExpertMajor] {
        let Some(ranks) = report.ranks_of_series(what) else { continue };
        let sizes = report.sizes(what, ranks);
        let (title, over) = match what {
            What::P2p => ("Message, half round trip".to_owned(), "bytes"),
            What::InPlace => (format!("Dispatch + combine, rows in place, {ranks} ranks"), "tokens per rank"),
            What::ExpertMajor => (format!("Dispatch + combine, expert-major copy, {ranks} ranks"), "tokens per rank"),
        };
        let curve = |name: &str| {
            let time = |&size: &usize| Some((size as f64, report.summary(what, ranks, size, name)?.median));
            Curve { name: name.to_owned(), points: sizes.iter().filter_map(time).collect() }
        };
        let limit = sizes.iter().filter_map(|&size| Some((size as f64, report.limit(what, ranks, size)?))).collect();
        let curves = report.contenders(what).into_iter().map(curve).collect();
        panels.push(Panel { title, over, in_bytes: what == What::P2p, curves, limit });
    }
    let tokens = report.shape.tokens_over_ranks;
    // One diagram over ranks, of the layout that most engines ask for.
    let what = What::ExpertMajor;
    let ranks = report.ranks(what, tokens);
    if ranks.len() > 1 {
        let curve = |name: &str| {
            let time = |&r: &usize| Some((r as f64, report.summary(what, r, tokens, name)?.median));
            Curve { name: name.to_owned(), points: ranks.iter().filter_map(time).collect() }
        };
        panels.push(Panel {
            title: format!("Dispatch + combine, expert-major copy, {tokens} tokens per rank"),
            over: "ranks",
            in_bytes: false,
            curves: report.contenders(what).into_iter().map(curve).collect(),
            limit: ranks.iter().filter_map(|&r| Some((r as f64, report.limit(what, r, tokens)?))).collect(),
        });
    }
    panels
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::compare::report::tests::sample_report;

    #[test]
    fn a_panel_has_each_contenders_medians_and_the_limit() {
        let panels = panels(&sample_report());
        assert_eq!(panels.len(), 2, "no series over ranks without expert-major samples");
        assert_eq!(panels[0].curves[0].name, "XCCL");
        assert_eq!(panels[0].curves[1].points, [(8.0, 0.4), (4096.0, 2.0)]);
        assert_eq!(panels[0].limit, [(8.0, 0.05), (4096.0, 0.05)]);
        assert_eq!(panels[1].curves[0].points, [(128.0, 250.0)]);
    }
}
