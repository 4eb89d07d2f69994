//! Installs into a folder, builds programs against what is there, and takes it away again.

use std::path::{Path, PathBuf};
use std::process::Command;

const PROGRAM: &str = r#"
#include <stdio.h>
#include <xccl_device.h>
int main(void) {
  int version = 0;
  if (xcclGetVersion(&version) != xcclSuccess || version != XCCL_VERSION) return 1;
  printf("version %d\n", version);
  return 0;
}
"#;

fn succeeds(command: &mut Command, package: &str) -> String {
    let output =
        command.output().unwrap_or_else(|err| panic!("{command:?} (Debian: apt-get install {package}): {err}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

fn installer() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xccl-install"));
    command.env_remove("PREFIX").env_remove("DESTDIR");
    command
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.flat_map(|e| if e.path().is_dir() { files_below(&e.path()) } else { vec![e.path()] }).collect()
}

/// Runs a program; with a library path unless the library is inside.
fn runs(program: &Path, libraries: Option<&Path>) {
    let mut command = Command::new(program);
    if let Some(libraries) = libraries {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    assert!(succeeds(&mut command, "").starts_with("version "));
}

#[test]
fn an_installed_library_is_found_linked_and_removed() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let staging = dir.path().join("staging");
    let root = staging.join("opt/xccl");
    let install = |libdir: &str| {
        let mut command = installer();
        command.args(["--prefix", "/opt/xccl", "--libdir", libdir]).env("DESTDIR", &staging);
        succeeds(&mut command, "binutils");
        root.join(libdir)
    };
    let source = dir.path().join("version.c");
    std::fs::write(&source, PROGRAM).expect("a source file");
    // Elsewhere first: what then follows takes its place.
    pkg_config(dir.path(), &install("lib/deep/down"), &source);
    let libraries = install("lib");
    assert!(!root.join("lib/deep").exists(), "the earlier installation is left");

    let exported = succeeds(
        Command::new("nm").args(["-D", "--defined-only", "--with-symbol-versions"]).arg(libraries.join("libxccl.so")),
        "binutils",
    );
    let functions: Vec<&str> = exported.lines().filter(|line| !line.contains(" A ")).collect();
    assert!(functions.len() > 20, "{exported}");
    for line in functions {
        assert!(line.contains(" T xccl") && line.contains("@@XCCL_"), "exported besides the interface: {line}");
    }
    let visible = succeeds(
        Command::new("nm").args(["-g", "--defined-only", "--format=posix"]).arg(libraries.join("libxccl.a")),
        "binutils",
    );
    let foreign: Vec<&str> = visible.lines().filter(|line| line.contains(' ') && !line.starts_with("xccl")).collect();
    assert_eq!(foreign, Vec::<&str>::new(), "visible in the static library besides the interface");
    let dynamic = succeeds(Command::new("readelf").arg("-d").arg(libraries.join("libxccl.so")), "binutils");
    assert!(dynamic.contains("soname: [libxccl.so."), "{dynamic}");

    pkg_config(dir.path(), &libraries, &source);
    cmake(dir.path(), &root, &source);

    succeeds(installer().args(["--uninstall", "--prefix", "/opt/xccl", "--destdir"]).arg(&staging), "");
    assert_eq!(files_below(&staging), Vec::<PathBuf>::new());
    assert!(!root.join("lib").exists(), "a folder is left");
}

fn pkg_config(dir: &Path, libraries: &Path, source: &Path) {
    let mut ask = Command::new("pkg-config");
    ask.env("PKG_CONFIG_PATH", libraries.join("pkgconfig")).args(["--cflags", "--libs", "xccl"]);
    let flags = succeeds(&mut ask, "pkg-config");
    let program = dir.join("by-pkg-config");
    succeeds(Command::new("cc").arg(source).arg("-o").arg(&program).args(flags.split_whitespace()), "gcc");
    runs(&program, Some(libraries));
}

fn cmake(dir: &Path, root: &Path, source: &Path) {
    let project = dir.join("project");
    std::fs::create_dir(&project).expect("a folder");
    std::fs::copy(source, project.join("version.c")).expect("a copy");
    std::fs::copy(source, project.join("version.cc")).expect("a copy");
    let lists = "cmake_minimum_required(VERSION 3.16)\n\
                 project(version C CXX)\n\
                 find_package(xccl 0.1 REQUIRED)\n\
                 foreach(language c cc)\n\
                 add_executable(shared_${language} version.${language})\n\
                 target_link_libraries(shared_${language} xccl::xccl)\n\
                 add_executable(static_${language} version.${language})\n\
                 target_link_libraries(static_${language} xccl::static)\n\
                 endforeach()\n";
    std::fs::write(project.join("CMakeLists.txt"), lists).expect("a project");
    let build = project.join("build");
    let prefix = format!("-DCMAKE_PREFIX_PATH={}", root.display());
    succeeds(Command::new("cmake").arg("-S").arg(&project).arg("-B").arg(&build).arg(&prefix), "cmake");
    succeeds(Command::new("cmake").arg("--build").arg(&build), "cmake");
    for language in ["c", "cc"] {
        runs(&build.join(format!("shared_{language}")), None); // the build's own run path
        runs(&build.join(format!("static_{language}")), None);
    }
    // The examples are what a user would begin with.
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    for (folder, program) in [("c", "overlap"), ("cpp", "engine")] {
        let build = dir.join(folder);
        let from = examples.join(folder);
        succeeds(Command::new("cmake").arg("-S").arg(from).arg("-B").arg(&build).arg(&prefix), "cmake");
        succeeds(Command::new("cmake").arg("--build").arg(&build), "cmake");
        let mut alone = Command::new(build.join(program));
        let job = format!("installed-{}-{program}", std::process::id());
        alone.env("XCCL_RANK", "0").env("XCCL_WORLD_SIZE", "1").env("XCCL_JOB", job);
        assert!(succeeds(&mut alone, "").contains("all sums as expected"));
    }
    let wrong = lists.replace("xccl 0.1 REQUIRED", "xccl 9.1 REQUIRED");
    std::fs::write(project.join("CMakeLists.txt"), wrong).expect("a project");
    let other = dir.join("other");
    let refused = Command::new("cmake").arg("-S").arg(&project).arg("-B").arg(other).arg(prefix).output();
    let refused = refused.expect("cmake starts");
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("9.1"), "{refused:?}");
}

#[test]
fn a_prefix_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("file");
    std::fs::write(&file, "").expect("a file");
    let says = |command: &mut Command, part: &str| {
        let output = command.output().expect("the installer starts");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(part), "{part:?} is not in {text:?}");
    };
    says(installer().arg("--prefix").arg(file.join("below")), "file/below");
    says(installer().args(["--prefix", "relative"]), "expected an absolute path");
    says(installer().args(["--prefix", "/p", "--libdir", "../lib"]), "below the prefix");
    says(installer().arg("--uninstall").arg("--prefix").arg(dir.path()), "nothing is installed");
}
