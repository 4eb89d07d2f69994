//! `include/xccl.hpp`: every standard and compiler takes it, and each of its members does what its C function does.

use std::path::Path;
use std::process::Command;

use xccl_tests::{CXX17, compile, plays_well, succeeds};

fn program() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/members.cpp")
}

#[test]
fn compilers_accept_the_header_in_both_standards_with_and_without_exceptions() {
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("../include");
    for compiler in ["g++", "clang++"] {
        for standard in ["-std=c++17", "-std=c++20"] {
            for exceptions in ["-fexceptions", "-fno-exceptions"] {
                let mut command = Command::new(compiler);
                command.args([standard, exceptions, "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I"]);
                succeeds(command.arg(&include).arg(program()));
            }
        }
    }
}

#[test]
fn every_member_works_throwing_and_returning() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let throwing = compile("c++", &CXX17, &program(), &dir.path().join("throwing"));
    let flags: Vec<&str> = CXX17.into_iter().chain(["-fno-exceptions"]).collect();
    let returning = compile("c++", &flags, &program(), &dir.path().join("returning"));
    for program in [throwing, returning] {
        [1, 2, 3].into_iter().for_each(|n| plays_well(&program, n, "", &[]));
    }
}
