//! `misuse.c`: every function of the library with arguments that it must refuse, and at the wrong time.

use std::collections::BTreeSet;
use std::path::Path;

use xccl_tests::{C99, Job, compile, exported_functions};

fn source() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/misuse.c")
}

/// Those that have a case of their own.
fn functions_tried() -> BTreeSet<String> {
    let text = std::fs::read_to_string(source()).expect("misuse.c");
    let cases = text.lines().filter_map(|line| {
        let line = line.trim_start();
        line.strip_prefix("ONE(").or_else(|| line.strip_prefix("TEXT("))
    });
    cases.map(|rest| rest.split([',', ')']).next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn every_exported_function_is_tried() {
    assert_eq!(functions_tried(), exported_functions(), "the cases in misuse.c, and what the library exports");
}

fn misused(ranks: usize) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let functions = format!("-DFUNCTIONS={}", functions_tried().len());
    let flags: Vec<&str> = C99.into_iter().map(|f| if f == "-pedantic" { functions.as_str() } else { f }).collect();
    let program = compile("cc", &flags, &source(), &dir.path().join("misuse"));
    let ended = Job::start(&program, ranks, "", &[]).wait();
    assert!(ended.iter().all(|e| e.code == Some(0)), "{ended:#?}");
}

#[test]
fn twenty_thousand_wrong_calls_do_no_harm() {
    misused(1);
}

#[test]
fn a_rank_that_errs_leaves_no_other_one_hanging() {
    misused(2);
}
