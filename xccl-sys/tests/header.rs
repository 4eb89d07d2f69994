//! `include/xccl.h` is what the sources say, says of each function whether it blocks, and compilers of C99, C11, C++11 and C++20
//! accept it without a warning.

use std::path::{Path, PathBuf};
use std::process::Command;

fn crate_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn header() -> PathBuf {
    crate_dir().join("../include/xccl.h")
}

#[test]
fn header_is_current() {
    let config = cbindgen::Config::from_file(crate_dir().join("cbindgen.toml")).expect("cbindgen.toml");
    // In the order in which a reader wants them.
    let sources = [
        "result.rs",
        "boundary.rs",
        "config.rs",
        "comm.rs",
        "status.rs",
        "p2p.rs",
        "collectives.rs",
        "onesided.rs",
        "kv.rs",
        "moe/mod.rs",
        "a2e.rs",
    ];
    let builder = sources.iter().fold(cbindgen::Builder::new().with_config(config), |builder, source| {
        builder.with_src(crate_dir().join("src").join(source))
    });
    let mut generated = vec![];
    builder.generate().expect("cbindgen understands the sources").write(&mut generated);
    let generated = grouped(&String::from_utf8(generated).expect("a header is text"));
    if std::env::var_os("XCCL_UPDATE_HEADER").is_some() {
        std::fs::write(header(), &generated).expect("include/xccl.h can be written");
    }
    let current = std::fs::read_to_string(header()).unwrap_or_default();
    assert!(
        current == generated,
        "include/xccl.h is stale: run XCCL_UPDATE_HEADER=1 cargo test -p xccl-sys --test header"
    );
}

/// The first function of each group, and what the group is about.
const GROUPS: [(&str, &str); 14] = [
    ("xcclGetErrorString", "Results"),
    ("xcclGetVersion", "Communicators"),
    ("xcclMemAlloc", "Memory on the symmetric heap, and statistics"),
    ("xcclCommGetWaitTimes", "Seeing what ranks do"),
    ("xcclSend", "Messages"),
    ("xcclAllReduce", "Collectives"),
    ("xcclSharedAlloc", "One-sided access to shared memory"),
    ("xcclKvSenderCreate", "KV pages from prefill to decode ranks"),
    ("xcclMoeCreate", "Experts: handles, and batches for kernels"),
    ("xcclMoeInputRows", "Experts: an exchange in four halves"),
    ("xcclMoeDispatch", "Experts: an exchange in two calls"),
    ("xcclMoeSetLanes", "Experts: threads that share a call"),
    ("xcclA2ECreate", "Attention and experts on ranks of their own"),
    ("xcclMoeInstall", "Experts: placements, and how many tokens each expert got"),
];

/// Puts a heading before each group of functions, and takes away the blanks that cbindgen leaves at the end of lines.
fn grouped(header: &str) -> String {
    let mut text: String = header.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    for (function, about) in GROUPS {
        let declared = text.find(&format!(" {function}(")).or_else(|| text.find(&format!("*{function}(")));
        let declared = declared.unwrap_or_else(|| panic!("{function} is not declared"));
        let comment = text[..declared].rfind("/**").expect("every function has its documentation");
        text.insert_str(comment, &format!("/* ---- {about} {} */\n\n", "-".repeat(106 - about.len())));
    }
    text
}

/// Whoever calls a function must know whether it may wait for other ranks.
#[test]
fn every_function_says_whether_it_blocks() {
    let text = std::fs::read_to_string(header()).expect("include/xccl.h");
    let mut functions = 0;
    for (documentation, declared) in text.split("/**").filter_map(|part| part.split_once("*/\n")) {
        let is_function = |name: &str| !name.contains(['#', '{', ';']) && !name.starts_with("typedef");
        let Some((name, _)) = declared.split_once('(').filter(|(name, _)| is_function(name)) else {
            continue;
        };
        functions += 1;
        let says = ["lock", "Returns once"].iter().any(|word| documentation.contains(word));
        assert!(says, "{name}: write in its documentation when it blocks, or that it does not block");
    }
    assert!(functions > 30, "only {functions} functions were found");
}

/// What a program needs beside the header, to use every initializer.
const USES_INITIALIZERS: &str = r#"
#include "xccl.h"
int main(void);
int main(void) {
  xcclConfig_t config = XCCL_CONFIG_INITIALIZER;
  xcclStatistics_t statistics = XCCL_STATISTICS_INITIALIZER;
  xcclMoeConfig_t moe = XCCL_MOE_CONFIG_INITIALIZER;
  xcclMoeInput_t input = XCCL_MOE_INPUT_INITIALIZER;
  xcclMoeBatch_t batch = XCCL_MOE_BATCH_INITIALIZER;
  xcclDeviceBatch_t device = XCCL_DEVICE_BATCH_INITIALIZER;
  xcclKvConfig_t kv = XCCL_KV_CONFIG_INITIALIZER;
  xcclKvEvent_t event = XCCL_KV_EVENT_INITIALIZER;
  xcclA2EConfig_t a2e = XCCL_A2E_CONFIG_INITIALIZER;
  xcclA2EBatch_t micro_batch = XCCL_A2E_BATCH_INITIALIZER;
  size_t sizes = a2e.size + micro_batch.size + kv.size + event.size + config.size + statistics.size + moe.size + batch.size + device.size;
  return XCCL_IN_PLACE != XCCL_SUMMED && sizes && input.ids_type == xcclInt32 ? 0 : 1;
}
"#;

#[test]
fn gcc_and_clang_accept_the_header_in_every_standard_without_a_warning() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (file, standards) in [("alone.c", ["-std=c99", "-std=c11"]), ("alone.cc", ["-std=c++11", "-std=c++20"])] {
        let source = dir.path().join(file);
        std::fs::write(&source, USES_INITIALIZERS).expect("a source file");
        for standard in standards {
            ["gcc", "clang"].into_iter().for_each(|compiler| compile(compiler, &source, standard));
        }
    }
}

fn compile(compiler: &str, source: &Path, standard: &str) {
    let output = Command::new(compiler)
        .args([standard, "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I"])
        .arg(header().parent().expect("include/"))
        .arg(source)
        .output()
        .unwrap_or_else(|err| panic!("{compiler} cannot be started (Debian: apt-get install {compiler}): {err}"));
    assert!(output.status.success(), "{compiler} {standard}: {}", String::from_utf8_lossy(&output.stderr));
}
