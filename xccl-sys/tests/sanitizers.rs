//! C and C++ programs under the compilers' sanitizers. Only what is compiled here is instrumented, the library is not:
//! AddressSanitizer sees every access of the programs and what they allocate, ThreadSanitizer the programs' own accesses and
//! atomics, kernels' included. What the library does between threads is loom's part.

use std::path::{Path, PathBuf};
use std::process::Command;

use xccl_tests::{C99, CXX17, compile, new_job, plays_well, succeeds};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

const PROGRAMS: [&str; 5] = [
    "examples/c/moe.c",
    "examples/c/ring.c",
    "examples/c/overlap.c",
    "examples/cpp/engine.cpp",
    "xccl-sys/tests/device.c",
];

fn instrumented(dir: &Path, source: &str, sanitizer: &'static str) -> String {
    let (compiler, flags) = if source.ends_with(".cpp") { ("c++", CXX17) } else { ("cc", C99) };
    let flags: Vec<&str> = flags.into_iter().chain([sanitizer]).collect();
    compile(compiler, &flags, &root().join(source), &dir.join("instrumented"))
}

#[test]
fn programs_are_clean_under_address_and_undefined_behaviour_sanitizer() {
    for source in PROGRAMS {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let program = instrumented(dir.path(), source, "-fsanitize=address,undefined");
        plays_well(&program, 2, "", &[("UBSAN_OPTIONS", "halt_on_error=1")]);
    }
}

#[test]
fn kernels_on_threads_are_clean_under_thread_sanitizer() {
    for source in ["examples/cpp/engine.cpp", "xccl-sys/tests/device.c"] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let program = instrumented(dir.path(), source, "-fsanitize=thread");
        plays_well(&program, 2, "", &[("TSAN_OPTIONS", "halt_on_error=1")]);
    }
}

/// With the shared library, whose calls of malloc and memcpy can be told apart: it orders them by locks and atomics of its own,
/// which ThreadSanitizer cannot see.
#[test]
fn threads_that_share_handles_are_clean_under_thread_sanitizer() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let test = std::env::current_exe().expect("the test's own path");
    let libraries = test.parent().expect("target/<profile>/deps");
    let (program, suppressions) = (dir.path().join("threads"), dir.path().join("suppressions"));
    std::fs::write(&suppressions, "called_from_lib:libxccl_c.so\n").expect("a file");
    let mut cc = Command::new("cc");
    cc.args(C99).arg("-fsanitize=thread").arg("-I").arg(root().join("include"));
    cc.arg(root().join("xccl-sys/tests/threads.c")).arg("-o").arg(&program).arg(libraries.join("libxccl_c.so"));
    cc.arg(format!("-Wl,-rpath,{}", libraries.display())).arg("-lpthread");
    succeeds(&mut cc);
    let options = format!("halt_on_error=1 suppressions={}", suppressions.display());
    let mut alone = Command::new(program);
    alone.env("XCCL_RANK", "0").env("XCCL_WORLD_SIZE", "1").env("XCCL_JOB", new_job()).env("TSAN_OPTIONS", options);
    succeeds(&mut alone);
}
