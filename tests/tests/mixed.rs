//! Ranks in three languages in one communicator: 0 and 2 in C, 1 in Rust, 3 in C++.

use std::path::Path;

use xccl_tests::{C99, CXX17, Ended, Job, compile, new_job};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

fn start(dir: &Path, more: &[(&str, &str)]) -> Job {
    let source = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("mixed").join(name);
    let c = compile("cc", &C99, &source("rank.c"), &dir.join("c"));
    let cpp = compile("c++", &CXX17, &source("rank.cpp"), &dir.join("cpp"));
    let job = new_job();
    let mut all = Job::default();
    for (rank, program) in [&c, RANK, &c, &cpp].into_iter().enumerate() {
        let variables = [("XCCL_RANK", rank.to_string()), ("XCCL_WORLD_SIZE", "4".into()), ("XCCL_JOB", job.clone())];
        let more = more.iter().map(|&(name, value)| (name, value.to_owned()));
        let env = variables.into_iter().chain(more).map(|(name, value)| (name.to_owned(), value));
        all.start_another(program, "mixed", env);
    }
    all
}

#[test]
fn ranks_in_c_rust_and_cpp_exchange_messages_and_tokens() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let ended = start(dir.path(), &[]).wait();
    assert!(ended.iter().all(|e| e.code == Some(0)), "{ended:#?}");
}

#[test]
fn ranks_in_every_language_are_told_who_died() {
    for dead in 0..4 {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let job = start(dir.path(), &[("DIES", &dead.to_string())]);
        for (rank, Ended { code, stderr }) in job.wait().into_iter().enumerate().filter(|&(rank, _)| rank != dead) {
            let named = stderr.contains(&format!("rank {dead} died"));
            assert!(code == Some(0) && named, "rank {rank}: {code:?}: {stderr}");
        }
    }
}
