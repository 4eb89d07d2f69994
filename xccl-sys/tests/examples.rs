//! The examples in C and C++, compiled and run as one rank and as several; and under valgrind.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use xccl_tests::{C99, CXX17, compile, plays_well, succeeds};

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

fn built(dir: &Path, name: &str) -> String {
    match name.strip_suffix(".cpp") {
        Some(_) => compile("c++", &CXX17, &examples().join("cpp").join(name), &dir.join(name)),
        None => compile("cc", &C99, &examples().join("c").join(name), &dir.join(name)),
    }
}

const ALL: [&str; 5] = ["moe.c", "ring.c", "overlap.c", "put.c", "engine.cpp"];

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
    succeeds(Command::new("valgrind").arg("--version"));
    for name in ALL {
        let program = built(dir.path(), name);
        // A program of its own, as ranks are.
        let options = "--quiet --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite";
        let script = dir.path().join(format!("{name}.sh"));
        std::fs::write(&script, format!("#!/bin/sh\nexec valgrind {options} {program}\n")).expect("a script");
        std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).expect("the script's own mode");
        for n in [1, 2] {
            plays_well(&script.display().to_string(), n, "", &[("XCCL_TIMEOUT", "50")]);
        }
    }
}
