//! `misuse.c`: every function of the header with arguments that it must refuse, and at the wrong time.

use std::path::Path;

use xccl_tests::{C99, Job, compile};

fn source() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/misuse.c")
}

fn functions_tried() -> Vec<String> {
    let text = std::fs::read_to_string(source()).expect("misuse.c");
    text.split("ONE(").skip(2).map(|rest| rest.split(',').next().unwrap_or_default().trim().to_owned()).collect()
}

#[test]
fn every_function_of_the_header_is_tried() {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("../include/xccl.h");
    let header = std::fs::read_to_string(header).expect("include/xccl.h");
    let tried = functions_tried();
    for line in header.lines().filter_map(|line| line.strip_prefix("xcclResult_t ")) {
        let name = line.split('(').next().unwrap_or_default();
        assert!(tried.iter().any(|t| t == name), "{name} is not in misuse.c");
    }
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
