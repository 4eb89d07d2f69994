//! `xccl bench` and `xccl info`, as a user runs them.

use std::path::Path;
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
        &["-n", "2", "--tokens", "999", "--lanes", "2", "--layout", "expert-major"],
        &["-n", "2", "--tokens", "5", "--epilogue", "bias,residual,norm", "--reduction", "per-expert"],
        &["-n", "2", "--tokens", "5", "--wire", "int8", "--layout", "padded"],
        &["-n", "3", "--tokens", "5", "--wire", "int8", "--layout", "expert-major", "--keep-wire", "--dtype", "f16"],
        &["-n", "2", "--tokens", "5", "--wire", "fp8-e4m3", "--layout", "padded", "--keep-wire", "--input", "outbox"],
        &["-n", "2", "--tokens", "5", "--wire", "fp8-e5m2", "--reduction", "engine"],
        &["-n", "2", "--tokens", "5", "--layout", "expert-major", "--keep-wire"],
        &["-n", "4", "--nodes", "2", "--tokens", "5", "--reduction", "per-expert"],
        &["-n", "3", "--nodes", "3", "--tokens", "5", "--wire", "int8", "--reduction", "per-rank"],
    ] {
        for point in points(&[&small[..], extra].concat()) {
            assert_eq!(point["verified"], true, "{point}");
            for key in
                ["bench", "ranks", "tokens", "hidden", "topk", "experts", "dtype", "wire", "routing", "layout", "input"]
            {
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

/// A file as numpy writes it: a header, then [3, 2] int64.
fn recording(file: &Path, fortran_order: &str, ids: [i64; 6]) {
    let dict = format!("{{'descr': '<i8', 'fortran_order': {fortran_order}, 'shape': (3, 2), }}");
    let header = format!("{dict:<117}\n");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    ids.iter().for_each(|id| bytes.extend(id.to_le_bytes()));
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn bench_put_and_kv_verify_what_has_come() {
    let put = ["bench", "put", "--sizes", "8,5000", "--iters", "3", "--warmup", "1", "--verify", "--json", "-"];
    let kv = "bench kv --layers 2 --pages 0,3 --page-bytes 1000 --iters 3 --warmup 1 --layout page --gap 24 --verify --json -";
    let kv: Vec<&str> = kv.split(' ').collect();
    for (args, key, expected) in [(&put[..], "bytes", [8, 5000]), (&kv, "pages", [0, 3])] {
        let out = output(args);
        assert!(out.status.success(), "{}", stderr(&out));
        let points: Vec<serde_json::Value> = stdout(&out).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(points.len(), 2, "{points:?}");
        for (point, expected) in points.iter().zip(expected) {
            assert!(point[key] == expected && point["verified"] == true && point["gbps"].is_number(), "{point}");
        }
    }
}

#[test]
fn bench_moe_replays_a_recorded_routing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ids.npy");
    let file = path.to_str().unwrap();
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
    let args = [&args[..], &["--routing", file]].concat();
    recording(&path, "False", [0, 1, 2, -1, 3, 0]);
    let point = &points(&args)[0];
    assert_eq!(point["verified"], true);
    // Ranks 0 and 1 have five tokens each: the recording over and over.
    let ids = [0i64, 1, 2, -1, 3, 0].into_iter().cycle().take(2 * 5 * 2);
    assert_eq!(point["routing_sum"], (1..).zip(ids).map(|(place, id)| place * (id + 1)).sum::<i64>());
    recording(&path, "False", [0, 1, 2, 4, 3, 0]);
    assert!(refused(&args).contains("token 1 names expert 4: --experts 4 has 0 to 3"), "{}", refused(&args));
    recording(&path, "True", [0, 1, 2, -1, 3, 0]);
    assert!(refused(&args).contains("Fortran's order"), "{}", refused(&args));
    recording(&path, "False", [0, 1, 2, 2, 3, 0]);
    assert!(refused(&args).contains("names expert 2 twice"), "{}", refused(&args));
    let other = ["bench", "moe", "--tokens", "5", "--hidden", "16", "--topk", "3", "--experts", "4", "--routing", file];
    assert!(refused(&other).contains("has shape [3, 2], expected [tokens, 3]"), "{}", refused(&other));
    std::fs::write(&path, "no numbers").unwrap();
    assert!(refused(&args).contains(file), "{}", refused(&args));
}

/// What a call that must fail says.
fn refused(args: &[&str]) -> String {
    let out = output(args);
    assert_eq!(out.status.code(), Some(1), "{args:?}");
    stderr(&out)
}

const QUICK: [&str; 9] = ["bench", "p2p", "--sizes", "8,100", "--iters", "2", "--warmup", "1", "--verify"];

#[test]
fn json_on_standard_output_is_alone_there() {
    for bench in [&QUICK[..], &["bench", "moe", "--hidden", "16", "--tokens", "1,2", "--iters", "2", "--verify"]] {
        let out = output(&[bench, &["--json", "-"]].concat());
        let points: Vec<serde_json::Value> = stdout(&out).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert!(points.len() == 2 && points.iter().all(|p| p["verified"] == true), "{points:?}");
        assert!(stderr(&out).starts_with("# xccl bench"), "the table is for people all the same: {}", stderr(&out));
    }
}

#[test]
fn under_a_launcher_a_bench_joins_its_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("points.json");
    let json = ["--json", file.to_str().unwrap()];
    // Its own -n is not looked at then.
    let out =
        output(&[&["run", "-n", "3", "--", env!("CARGO_BIN_EXE_xccl")], &QUICK[..], &["-n", "7"], &json].concat());
    assert!(out.status.success(), "{}", stderr(&out));
    let point: serde_json::Value =
        serde_json::from_str(std::fs::read_to_string(file).unwrap().lines().next().unwrap()).unwrap();
    assert_eq!(point["ranks"], 3);
    assert!(stdout(&out).lines().all(|line| line.starts_with("[0] ")), "{}", stdout(&out));
}

#[test]
fn a_progress_bar_is_shown_on_a_terminal_and_nowhere_else() {
    let bench = ["bench", "moe", "--tokens", "64", "--hidden", "512", "--iters", "300"];
    let out = output(&bench);
    assert_eq!(stderr(&out), "");
    assert!(!stdout(&out).contains('\u{2588}'), "{}", stdout(&out));
    // `script` gives the command a terminal.
    let command = format!("{} {}", env!("CARGO_BIN_EXE_xccl"), bench.join(" "));
    let mut script = Command::new("script");
    let out = script.args(["--quiet", "--return", "--command", &command, "/dev/null"]).stdin(Stdio::null()).output();
    match out {
        Ok(out) => assert!(out.status.success() && stdout(&out).contains('\u{2588}'), "{}", stdout(&out)),
        Err(err) => eprintln!("skipped: script (Debian: apt-get install bsdutils): {err}"),
    }
}

#[test]
fn bench_p2p_verifies_small_and_large_messages() {
    let points =
        points(&["bench", "p2p", "--sizes", "0,8,41,4096,300000", "--iters", "3", "--warmup", "1", "--verify"]);
    assert_eq!(points.len(), 5);
    assert!(points.iter().all(|p| p["verified"] == true && p["half_rtt_us"]["median"].as_f64().unwrap() > 0.0));
    for (point, bytes) in points.iter().zip([0, 8, 41, 4096, 300_000]) {
        assert!(point["bench"] == "p2p" && point["ranks"] == 2 && point["bytes"] == bytes, "{point}");
        assert!(point["gbps"].is_number() && point["limit"]["memcpy_us"].is_number(), "{point}");
        assert!(point["limit"].as_object().unwrap().contains_key("line_ns"), "{point}");
    }
}

#[test]
fn info_shows_which_rank_the_environment_makes_of_a_process_and_where_it_meets_the_others() {
    let launcher = |variables: &[(&str, &str)]| {
        let mut command = xccl(&["info"]);
        let others = ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_STEP_ID", "XCCL_WORLD_SIZE", "XCCL_NODE_ID"];
        others.iter().for_each(|name| _ = command.env_remove(name));
        let out = command.envs(variables.iter().copied()).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        text.lines().find_map(|line| line.strip_prefix("launcher ")).unwrap_or(&text).trim().to_owned()
    };
    assert!(launcher(&[]).starts_with("none"));
    let rank = [("XCCL_RANK", "1"), ("XCCL_WORLD_SIZE", "4"), ("XCCL_LOCAL_WORLD_SIZE", "2"), ("XCCL_JOB", "j")];
    assert!(launcher(&rank).starts_with("incomplete: XCCL_MASTER_ADDR"));
    let met = [&rank[..], &[("MASTER_ADDR", "node0"), ("MASTER_PORT", "29500")]].concat();
    assert_eq!(launcher(&met), "rank 1 of 4 (XCCL_RANK), meeting at port 29501 of node0");
}

#[test]
fn info_shows_every_option_with_its_origin() {
    let out = xccl(&["info"]).env("XCCL_HEAP", "1M").output().unwrap();
    let text = stdout(&out);
    let heap = text.lines().find(|l| l.contains("XCCL_HEAP")).unwrap();
    assert!(heap.contains("1048576") && heap.contains("environment"), "{heap}");
    assert!(text.lines().any(|l| l.contains("XCCL_TIMEOUT") && l.contains("default")), "{text}");
    let plan = xccl::Communicator::memory_plan(8, &xccl::Config::default());
    for part in ["process_vm_readv", "huge pages", "outbox", &plan.outbox_bytes.to_string(), "MoE handle"] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let settings = xccl::Config::default().settings();
    assert!(settings.iter().all(|s| text.contains(s.variable) && text.contains(s.meaning)), "{text}");
    let out = xccl(&["info"]).env("XCCL_HEAP", "lots").output().unwrap();
    assert!(!out.status.success() && stderr(&out).contains("XCCL_HEAP"), "{}", stderr(&out));
}

#[test]
fn bench_growth_verifies_every_number_of_ranks_and_says_what_each_takes() {
    let args =
        ["bench", "growth", "--ranks", "1,2,5", "--tokens", "11", "--hidden", "40", "--topk", "3", "--experts", "9"];
    let args = [&args[..], &["--iters", "3", "--warmup", "1", "--verify"]].concat();
    for extra in [&[][..], &["--reduction", "per-rank"]] {
        let points = points(&[&args[..], extra].concat());
        assert_eq!(points.iter().map(|p| p["ranks"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 5]);
        for point in &points {
            assert_eq!(point["verified"], true, "{point}");
            // Rows of 40 elements: one per choice to the experts, and as many or one per rank back.
            let (bytes, remote) = (&point["bytes_per_token"], point["remote_bytes_per_token"].as_f64().unwrap());
            assert!(extra.len() == 2 || *bytes == 2.0 * 3.0 * 80.0, "{point}");
            assert_eq!(remote > 0.0, point["ranks"] != 1, "{point}");
            let memory = |key: &str| point["memory"][key].as_f64().unwrap();
            assert!(memory("touched") > memory("joined") && memory("touched") <= memory("planned"), "{point}");
            assert!(point["start"]["init_ms"].as_f64() <= point["start"]["spawn_to_ready_ms"].as_f64(), "{point}");
        }
    }
}

#[test]
fn bench_wait_measures_the_phases_beside_their_limits() {
    let points = points(&["bench", "wait", "-n", "3", "--iters", "20", "--warmup", "2", "--idle-ms", "50"]);
    let slept = points.iter().find(|p| p["place"] == "one-core" && p["phase"] == "asleep").expect("somebody slept");
    assert!(slept["samples"].as_u64().unwrap() > 0 && slept["limit_us"]["median"].as_f64().unwrap() > 0.0, "{slept}");
    let idle = points.iter().find(|p| p["bench"] == "wait-idle").expect("idle ranks");
    assert!(idle["cpu_percent"].as_f64().unwrap() >= 0.0, "{idle}");
}

#[test]
fn status_shows_what_each_rank_does_and_why_nothing_goes_on() {
    use xccl::{Communicator, Config, UniqueId};
    let id = UniqueId::new().unwrap();
    let own = std::process::id();
    let seen = |args: &[&str]| {
        let out = output(args);
        assert!(out.status.success(), "{}", stderr(&out));
        stdout(&out)
    };
    std::thread::scope(|s| {
        let join = |rank| Communicator::init(rank, 2, &id, Config::default()).unwrap();
        let waits = s.spawn(move || join(1).recv(0, 7, &mut [0]).unwrap());
        let comm = join(0);
        let start = std::time::Instant::now();
        let job = loop {
            let all: serde_json::Value = serde_json::from_str(&seen(&["status", "--json"])).unwrap();
            let of_this = |job: &&serde_json::Value| job["communicators"][0]["ranks"][0]["pid"] == own;
            let job = all["jobs"].as_array().unwrap().iter().find(of_this).cloned();
            match job {
                Some(job) if job["diagnosis"]["finding"] == "straggler" => break job,
                job => assert!(start.elapsed().as_secs() < 15, "{job:?}"),
            }
        };
        let ranks = &job["communicators"][0]["ranks"];
        let wait = &ranks[1]["waits"][0];
        assert!(wait["operation"] == "recv" && wait["epoch"] == 7 && wait["peer"] == 0, "{ranks}");
        assert!(ranks[0]["waits"].as_array().unwrap().is_empty() && ranks[0]["standing"] == "active", "{ranks}");
        let text = seen(&["status", "--history"]);
        for part in ["waits for rank 0 in recv tag 7", "rank 1 waits for it", "history of rank 1"] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        comm.send(1, 7, &[1]).unwrap();
        waits.join().unwrap();
    });
}
