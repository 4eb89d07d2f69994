//! `xccl bench` and `xccl info`, as a user runs them.

use std::process::{Command, Output, Stdio};

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
