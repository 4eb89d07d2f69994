//! The examples in C and C++, compiled and run as one rank and as several; and under valgrind.

use std::path::{Path, PathBuf};
use std::process::Command;

use xccl_tests::{C99, CXX17, compile, new_job, plays_well, succeeds};

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

fn built(dir: &Path, name: &str) -> String {
    match name.strip_suffix(".cpp") {
        Some(_) => compile("c++", &CXX17, &examples().join("cpp").join(name), &dir.join(name)),
        None => compile("cc", &C99, &examples().join("c").join(name), &dir.join(name)),
    }
}

const ALL: [&str; 4] = ["moe.c", "ring.c", "overlap.c", "engine.cpp"];

#[test]
fn every_example_is_tested_and_built_by_cmake() {
    for (folder, suffix) in [("c", ".c"), ("cpp", ".cpp")] {
        let lists = std::fs::read_to_string(examples().join(folder).join("CMakeLists.txt")).expect("CMakeLists.txt");
        for file in std::fs::read_dir(examples().join(folder)).expect("examples").flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            if let Some(stem) = name.strip_suffix(suffix) {
                assert!(ALL.contains(&name.as_str()) && lists.contains(stem), "{name}");
            }
        }
    }
}

#[test]
fn the_examples_hold_their_own_checks_with_any_number_of_ranks() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for name in ALL {
        let program = built(dir.path(), name);
        [1, 2, 3, 5].into_iter().for_each(|n| plays_well(&program, n, "", &[]));
    }
}

/// Invalid accesses, use of what was never written, and memory that nothing points to any more.
#[test]
fn the_examples_run_clean_under_memcheck() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for name in ["ring.c", "overlap.c", "engine.cpp"] {
        let program = built(dir.path(), name);
        let mut valgrind = Command::new("valgrind");
        valgrind.args(["--quiet", "--error-exitcode=9", "--leak-check=full", "--errors-for-leak-kinds=definite"]);
        valgrind.arg(program).env("XCCL_RANK", "0").env("XCCL_WORLD_SIZE", "1").env("XCCL_JOB", new_job());
        succeeds(&mut valgrind);
    }
}
