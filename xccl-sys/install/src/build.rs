//! Builds the two libraries.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::names;

/// Where they lie, before they are installed.
pub struct Libraries {
    pub shared: PathBuf,
    /// The static one.
    pub fixed: PathBuf,
}

/// Builds both into `scratch`.
pub fn libraries(scratch: &Path) -> Result<Libraries> {
    let archive = archive()?;
    // One object of all, in which only the C interface is visible: two Rust libraries can meet in one program.
    let object = scratch.join("xccl.o");
    run(tool("LD", "ld").arg("-r").arg("--whole-archive").arg(&archive).arg("-o").arg(&object), "binutils")?;
    // Without the intermediate code that Rust's own libraries carry, which archivers of another compiler trip over.
    let only = ["--wildcard", "--keep-global-symbol=xccl*", "--strip-debug", "--remove-section=.llvm*"];
    run(tool("OBJCOPY", "objcopy").args(only).arg(&object), "binutils")?;
    let fixed = scratch.join("libxccl.a");
    run(tool("AR", "ar").arg("rcs").arg(&fixed).arg(&object), "binutils")?;

    let map = scratch.join("xccl.map");
    let text = include_str!("../templates/xccl.map").replace("@NODE@", &names::symbol_version());
    std::fs::write(&map, text).context("writing the version script")?;
    let shared = scratch.join("libxccl.so");
    let mut link = tool("CC", "cc");
    link.arg("-shared").arg("-o").arg(&shared).arg(&object);
    link.arg(format!("-Wl,-soname,{}", names::soname())).arg(format!("-Wl,--version-script={}", map.display()));
    link.args(["-Wl,--gc-sections", "-Wl,--no-undefined", "-Wl,-z,relro,-z,now"]);
    link.args(names::PRIVATE_LIBS.map(|lib| format!("-l{lib}")));
    run(&mut link, "gcc")?;
    Ok(Libraries { shared, fixed })
}

/// cargo's static library of the C interface.
fn archive() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--release", "--locked", "--package", "xccl-sys", "--message-format=json-render-diagnostics"]);
    build.arg("--manifest-path").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml"));
    let output = build.stderr(Stdio::inherit()).output().context("cargo cannot be started")?;
    ensure!(output.status.success(), "cargo could not build xccl-sys: {}", output.status);
    let messages = String::from_utf8(output.stdout).context("cargo's messages")?;
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    for message in messages.filter(|message| message["target"]["name"] == "xccl_c") {
        let files = message["filenames"].as_array().into_iter().flatten().filter_map(Value::as_str);
        if let Some(archive) = files.map(PathBuf::from).find(|file| file.extension().is_some_and(|e| e == "a")) {
            return Ok(archive);
        }
    }
    bail!("cargo has built no static library for xccl-sys")
}

fn tool(variable: &str, default: &str) -> Command {
    Command::new(std::env::var_os(variable).filter(|name| !name.is_empty()).unwrap_or_else(|| OsString::from(default)))
}

fn run(command: &mut Command, package: &str) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output =
        command.output().with_context(|| format!("{name} cannot be started (Debian: apt-get install {package})"))?;
    ensure!(output.status.success(), "{name} failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
