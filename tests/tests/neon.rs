//! The kernels of wire formats and sums on AArch64: the library's own tests of them, all 65,536 values of bf16 among them,
//! compiled for that processor and run by an emulator of it. Skipped, with the reason, where the tools are missing.

use std::path::{Path, PathBuf};
use std::process::Command;

use xccl_tests::succeeds;

const TARGET: &str = "aarch64-unknown-linux-gnu";
/// What has to be found, and the package that has it (Debian 12).
const TOOLS: [(&str, &str); 2] =
    [("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross"), ("qemu-aarch64", "qemu-user")];
/// Where the C library is that the cross compiler links with.
const SYSROOT: &str = "/usr/aarch64-linux-gnu";

/// A compiler with the standard library for the target: the one named by `XCCL_AARCH64_RUSTC`, this toolchain's or the system's.
fn compiler() -> Result<PathBuf, String> {
    let named = std::env::var_os("XCCL_AARCH64_RUSTC").map(PathBuf::from);
    let candidates: Vec<PathBuf> = match named {
        Some(named) => vec![named],
        None => vec!["rustc".into(), "/usr/bin/rustc".into()],
    };
    let has_library = |rustc: &Path| {
        let printed = Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]).output();
        let folder =
            printed.ok().filter(|p| p.status.success()).map(|p| String::from_utf8_lossy(&p.stdout).into_owned());
        let entries = folder.and_then(|folder| std::fs::read_dir(folder.trim()).ok());
        entries.is_some_and(|mut entries| {
            entries.any(|e| e.is_ok_and(|e| e.file_name().to_string_lossy().starts_with("libstd-")))
        })
    };
    candidates.iter().find(|rustc| has_library(rustc)).cloned().ok_or(format!(
        "{candidates:?} have no standard library for {TARGET}: rustup target add {TARGET}, or Debian's rustc-web and \
         libstd-rust-web-dev:arm64 (dpkg --add-architecture arm64)"
    ))
}

#[test]
fn on_aarch64_all_kernels_give_the_bits_of_the_plain_reference() {
    let missing = TOOLS.iter().find(|(tool, _)| Command::new(tool).arg("--version").output().is_err());
    let rustc = match (missing, compiler()) {
        (Some((tool, package)), _) => return println!("skipped: no {tool} (apt-get install {package})"),
        (None, Err(reason)) => return println!("skipped: {reason}"),
        (None, Ok(rustc)) => rustc,
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(&root).args(["test", "--locked", "--package", "xccl", "--lib", "--target", TARGET]);
    // A folder of its own: the tests that run beside this one hold the lock of the other.
    cargo.arg("--target-dir").arg(root.join("target/aarch64"));
    cargo.args(["--", "moe::wire", "moe::kernels"]);
    cargo.env("RUSTC", rustc).env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", TOOLS[0].0);
    let said =
        succeeds(cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER", format!("{} -L {SYSROOT}", TOOLS[1].0)));
    assert!(said.contains("moe::wire::") && said.contains("test result: ok"), "{said}");
}
