//! The tool, as a user runs it.

use std::io::Read;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn xccl(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xccl"));
    command.args(args).stdin(Stdio::null());
    command
}

fn output(args: &[&str]) -> Output {
    xccl(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Whether a process exists and has not ended.
fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

fn eventually(mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(10) {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

#[test]
fn each_rank_gets_its_environment_and_each_line_its_rank() {
    let script = "echo $XCCL_RANK/$XCCL_WORLD_SIZE/$XCCL_LOCAL_RANK/${#XCCL_JOB}; echo oops >&2";
    let out = output(&["run", "-n", "3", "--", "sh", "-c", script]);
    assert!(out.status.success());
    let mut lines: Vec<_> = stdout(&out).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["[0] 0/3/0/32", "[1] 1/3/1/32", "[2] 2/3/2/32"]);
    assert_eq!(stderr(&out).lines().filter(|l| l.ends_with("] oops")).count(), 3);
}

#[test]
fn the_first_failure_ends_the_rest_and_is_named() {
    let start = Instant::now();
    let out = output(&["run", "-n", "3", "--", "sh", "-c", "test $XCCL_RANK = 1 && exit 7; exec sleep 60"]);
    assert_eq!(out.status.code(), Some(7));
    let text = stderr(&out);
    assert!(text.contains("rank 1") && text.contains("exited with code 7") && text.contains("other 2"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_rank_killed_by_a_signal_is_named_with_it() {
    let out = output(&["run", "-n", "2", "--", "sh", "-c", "test $XCCL_RANK = 0 && kill -9 $$; exec sleep 60"]);
    assert_eq!(out.status.code(), Some(128 + 9));
    assert!(stderr(&out).contains("rank 0") && stderr(&out).contains("SIGKILL"), "{}", stderr(&out));
}

#[test]
fn a_rank_that_ignores_the_request_to_end_is_killed_after_the_grace() {
    let script = "trap '' TERM; test $XCCL_RANK = 0 && exit 3; while :; do sleep 0.05; done";
    let out = output(&["run", "-n", "2", "--grace", "0.2", "--", "sh", "-c", script]);
    assert_eq!(out.status.code(), Some(3));
}

#[test]
fn a_killed_launcher_leaves_no_rank_and_no_grandchild() {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "sleep 1000 & echo $! > {0}/$XCCL_RANK.child; echo $$ > {0}/$XCCL_RANK.rank; wait",
        dir.path().display()
    );
    let mut launcher = xccl(&["run", "-n", "2", "--", "sh", "-c", &script]).spawn().unwrap();
    let pids = || -> Vec<String> {
        let files = std::fs::read_dir(dir.path()).unwrap().flatten();
        let read = files.map(|f| std::fs::read_to_string(f.path()).unwrap_or_default().trim().to_owned());
        read.filter(|p| !p.is_empty()).collect()
    };
    assert!(eventually(|| pids().len() == 4), "{:?}", pids());
    let pids = pids();
    assert!(pids.iter().all(|p| is_alive(p)));
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    assert!(eventually(|| !pids.iter().any(|p| is_alive(p))), "left behind: {pids:?}");
}

#[test]
fn a_signal_to_the_launcher_reaches_the_ranks() {
    let script = "trap 'echo got it; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
    let mut launcher = xccl(&["run", "-n", "2", "--", "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = launcher.stdout.take().unwrap();
    let mut text = String::new();
    let mut buffer = [0; 256];
    while text.matches("ready").count() < 2 {
        let n = out.read(&mut buffer).unwrap();
        assert!(n > 0, "{text}");
        text.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(launcher.id() as i32), nix::sys::signal::Signal::SIGTERM)
        .unwrap();
    out.read_to_string(&mut text).unwrap();
    assert!(launcher.wait().unwrap().success());
    assert_eq!(text.matches("got it").count(), 2, "{text}");
}

#[test]
fn a_program_that_cannot_be_started_is_named() {
    let out = output(&["run", "-n", "2", "--", "/no/such/program"]);
    assert!(!out.status.success());
    assert!(stderr(&out).contains("/no/such/program"), "{}", stderr(&out));
}

#[test]
fn bind_gives_each_rank_one_core() {
    let out = output(&["run", "-n", "3", "--bind", "--", "sh", "-c", "grep Cpus_allowed_list /proc/self/status"]);
    let lists: Vec<_> = stdout(&out).lines().map(|l| l.rsplit('\t').next().unwrap().to_owned()).collect();
    assert_eq!(lists.len(), 3);
    assert!(lists.iter().all(|l| l.parse::<u32>().is_ok()), "{lists:?}");
}

fn points(args: &[&str]) -> Vec<serde_json::Value> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("points.json");
    let out = output(&[args, &["--json", file.to_str().unwrap()]].concat());
    assert!(out.status.success(), "{}", stderr(&out));
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn bench_moe_verifies_every_layout_input_and_type() {
    let small = [
        "bench",
        "moe",
        "--hidden",
        "200",
        "--topk",
        "4",
        "--experts",
        "10",
        "--iters",
        "3",
        "--warmup",
        "1",
        "--verify",
    ];
    for extra in [
        &["-n", "2", "--tokens", "1,9"][..],
        &["-n", "3", "--tokens-per-rank", "4,0,7", "--layout", "padded", "--dtype", "f32"],
        &["-n", "4", "--tokens", "5", "--layout", "expert-major", "--dtype", "f16", "--reduction", "per-expert"],
        &["-n", "2", "--tokens", "5", "--input", "outbox", "--routing", "skew:30"],
    ] {
        for point in points(&[&small[..], extra].concat()) {
            assert_eq!(point["verified"], true, "{point}");
            for key in ["bench", "ranks", "tokens", "hidden", "topk", "experts", "dtype", "layout", "input"] {
                assert!(!point[key].is_null(), "{key} is missing in {point}");
            }
            for key in ["dispatch_us", "combine_us"] {
                let time = &point[key];
                assert!(
                    time["p10"].as_f64() <= time["median"].as_f64() && time["median"].as_f64() <= time["p90"].as_f64()
                );
                assert!(point["limit"][key].as_f64().unwrap() > 0.0);
            }
        }
    }
}

#[test]
fn bench_moe_replays_a_recorded_routing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ids.npy");
    // A header as numpy writes it, then [3, 2] int64.
    let header = format!("{:<117}\n", "{'descr': '<i8', 'fortran_order': False, 'shape': (3, 2), }");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    [0i64, 1, 2, -1, 3, 0].iter().for_each(|id| bytes.extend(id.to_le_bytes()));
    std::fs::write(&file, bytes).unwrap();
    let file = file.to_str().unwrap();
    let args = [
        "bench",
        "moe",
        "--tokens",
        "5",
        "--hidden",
        "16",
        "--topk",
        "2",
        "--experts",
        "4",
        "--iters",
        "2",
        "--verify",
    ];
    assert_eq!(points(&[&args[..], &["--routing", file]].concat())[0]["verified"], true);
}

#[test]
fn bench_p2p_verifies_small_and_large_messages() {
    let points =
        points(&["bench", "p2p", "--sizes", "0,8,41,4096,300000", "--iters", "3", "--warmup", "1", "--verify"]);
    assert_eq!(points.len(), 5);
    assert!(points.iter().all(|p| p["verified"] == true && p["half_rtt_us"]["median"].as_f64().unwrap() > 0.0));
}

#[test]
fn info_shows_every_option_with_its_origin() {
    let out = xccl(&["info"]).env("XCCL_HEAP", "1M").output().unwrap();
    let text = stdout(&out);
    let heap = text.lines().find(|l| l.contains("XCCL_HEAP")).unwrap();
    assert!(heap.contains("1048576") && heap.contains("environment"), "{heap}");
    assert!(text.lines().any(|l| l.contains("XCCL_TIMEOUT") && l.contains("default")), "{text}");
    let out = xccl(&["info"]).env("XCCL_HEAP", "lots").output().unwrap();
    assert!(!out.status.success() && stderr(&out).contains("XCCL_HEAP"), "{}", stderr(&out));
}
