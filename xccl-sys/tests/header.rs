//! `include/xccl.h` is what the sources say, and a C99 and a C++11 compiler accept it without a warning.

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
    let sources = ["result.rs", "boundary.rs", "comm.rs", "p2p.rs", "moe.rs"];
    let builder = sources.iter().fold(cbindgen::Builder::new().with_config(config), |builder, source| {
        builder.with_src(crate_dir().join("src").join(source))
    });
    let mut generated = vec![];
    builder.generate().expect("cbindgen understands the sources").write(&mut generated);
    let generated = String::from_utf8(generated).expect("a header is text");
    if std::env::var_os("XCCL_UPDATE_HEADER").is_some() {
        std::fs::write(header(), &generated).expect("include/xccl.h can be written");
    }
    let current = std::fs::read_to_string(header()).unwrap_or_default();
    assert!(
        current == generated,
        "include/xccl.h is stale: run XCCL_UPDATE_HEADER=1 cargo test -p xccl-sys --test header"
    );
}

#[test]
fn header_stands_alone() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (file, standard) in [("alone.c", "-std=c99"), ("alone.cc", "-std=c++11")] {
        compile(dir.path(), file, standard);
    }
}

fn compile(dir: &Path, file: &str, standard: &str) {
    let source = dir.join(file);
    std::fs::write(&source, "#include \"xccl.h\"\n").expect("a source file");
    let output = Command::new("cc")
        .args([standard, "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", "-I"])
        .arg(header().parent().expect("include/"))
        .arg(&source)
        .output()
        .expect("cc starts");
    assert!(output.status.success(), "{file} {standard}: {}", String::from_utf8_lossy(&output.stderr));
}
