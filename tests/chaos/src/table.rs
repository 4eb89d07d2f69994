//! What all cases have come to.

use std::time::Duration;

use crate::case::Case;
use crate::director::Judged;

#[derive(Default)]
struct Row {
    cases: usize,
    kills: usize,
    stops: usize,
    told_ns: Vec<u64>,
    missed: usize,
    wrong: usize,
    hangs: usize,
    leaks: usize,
}

/// By whether the ranks are on one node or on several.
#[derive(Default)]
pub struct Table([Row; 2]);

impl Table {
    pub fn add(&mut self, case: &Case, judged: Judged) {
        let row = &mut self.0[usize::from(case.is_far())];
        if judged.void {
            return;
        }
        row.cases += 1;
        row.kills += judged.kills;
        row.stops += judged.stops;
        row.told_ns.extend(judged.told_ns);
        row.missed += judged.missed;
        row.wrong += usize::from(!judged.wrong.is_empty());
        row.hangs += judged.hangs;
        row.leaks += judged.leaks;
    }

    pub fn kills(&self) -> usize {
        self.0.iter().map(|row| row.kills).sum()
    }

    pub fn is_clean(&self) -> bool {
        self.0.iter().all(|row| row.wrong == 0)
    }

    pub fn print(&self, took: Duration, grown_kib: u64) {
        println!(
            "| nodes | cases | kills | stops | told | median ms | 99 % ms | max ms | missed when joining | wrong | hangs | leaks |"
        );
        println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
        for (name, row) in ["one", "several"].into_iter().zip(&self.0) {
            let mut told = row.told_ns.clone();
            told.sort_unstable();
            let at = |part: f64| {
                let at = ((told.len() as f64 * part) as usize).min(told.len().saturating_sub(1));
                told.get(at).map_or("-".to_owned(), |&ns| format!("{:.1}", ns as f64 / 1e6))
            };
            println!(
                "| {name} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
                row.cases,
                row.kills,
                row.stops,
                told.len(),
                at(0.5),
                at(0.99),
                at(1.0),
                row.missed,
                row.wrong,
                row.hangs,
                row.leaks
            );
        }
        println!("in {:.0} s; no process has grown by more than {grown_kib} KiB", took.as_secs_f64());
    }
}
