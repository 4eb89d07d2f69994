//! `examples/c/moe.c`, compiled by `cc` and run as one process and as three.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The libraries that cargo has built along with this test lie beside it.
fn library(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let deps = test.parent().expect("target/<profile>/deps");
    let found = [deps.join(name), deps.join("..").join(name)].into_iter().find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{name} is not in {} and not above it", deps.display()))
}

fn compile(dir: &Path, library: &Path) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let program = dir.join("moe");
    let mut cc = Command::new("cc");
    cc.args(["-std=c99", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pedantic", "-I"]).arg(root.join("include"));
    cc.arg(root.join("examples/c/moe.c")).arg(library).arg("-o").arg(&program);
    let folder = library.parent().expect("a library lies in a folder");
    cc.arg(format!("-Wl,-rpath,{}", folder.display())).args(["-lpthread", "-ldl", "-lm"]);
    let output = cc.output().expect("cc starts");
    assert!(output.status.success(), "cc: {}", String::from_utf8_lossy(&output.stderr));
    program
}

/// Ends what is left of the ranks, whatever happens to the test.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn run(program: &Path, ranks: usize) {
    let dir = program.parent().expect("the program lies in a folder");
    let text = |rank: usize| dir.join(format!("{ranks}.{rank}.txt"));
    let job = format!("c-example-{}-{ranks}-{}", std::process::id(), dir.display());
    let start = |rank: usize| {
        let file = File::create(text(rank)).expect("a file for the output");
        let mut command = Command::new(program);
        command.env("XCCL_RANK", rank.to_string()).env("XCCL_WORLD_SIZE", ranks.to_string());
        command.env("XCCL_JOB", &job).env("XCCL_TIMEOUT", "20");
        command.stderr(file.try_clone().expect("the same file")).stdout(file);
        command.spawn().expect("the example starts")
    };
    let mut children = Ranks((0..ranks).map(start).collect());
    let deadline = Instant::now() + Duration::from_secs(60);
    for rank in 0..ranks {
        let said = || std::fs::read_to_string(text(rank)).unwrap_or_default();
        let status = loop {
            if let Some(status) = children.0[rank].try_wait().expect("a child's status") {
                break status;
            }
            assert!(Instant::now() < deadline, "rank {rank} of {ranks} still runs: {}", said());
            sleep(Duration::from_millis(5));
        };
        let expected = format!("rank {rank} of {ranks}: {} tokens dispatched and combined", rank + 3);
        assert!(status.success() && said().contains(&expected), "rank {rank} of {ranks}: {status}: {}", said());
    }
}

#[test]
fn shared_library() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let program = compile(dir.path(), &library("libxccl_c.so"));
    [1, 3].into_iter().for_each(|ranks| run(&program, ranks));
}

#[test]
fn static_library() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let program = compile(dir.path(), &library("libxccl_c.a"));
    [1, 3].into_iter().for_each(|ranks| run(&program, ranks));
}
