//! `xccl bench compare`, as a user runs it, on a machine without peers and with peers that misbehave.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A quick comparison into `dir`/out, with the peers of `dir`/peers and the programs of `dir`/bin alone.
fn compare(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xccl"));
    command.args(["bench", "compare", "--quick", "--out"]).arg(dir.join("out")).arg("--peers").arg(dir.join("peers"));
    command.args(args).env("PATH", dir.join("bin")).current_dir(dir).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn report(dir: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(dir.join("out/compare.json")).unwrap()).unwrap()
}

fn samples<'a>(report: &'a Value, contender: &str) -> Vec<&'a Value> {
    report["samples"].as_array().unwrap().iter().filter(|s| s["contender"] == contender).collect()
}

/// A peer in shell, which finds its last word, the file for its results, in $json.
fn fake(path: &Path, script: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("#!/bin/sh\nfor json; do :; done\n{script}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn without_any_peer_ours_is_measured_and_each_of_the_others_is_skipped_with_the_way_to_install_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let out = compare(dir, &["--rounds", "2"]);
    let said = text(&out.stderr);
    assert!(out.status.success(), "{said}");
    for (peer, how) in [
        ("Open MPI", "apt-get install openmpi-bin"),
        ("MPICH", "apt-get install mpich"),
        ("PyTorch gloo", "build.sh --with-torch"),
        ("UCX", "apt-get install ucx-utils"),
        ("iceoryx2", "benches/peers/build.sh"),
    ] {
        let line = said.lines().find(|l| l.starts_with(&format!("skipped: {peer}:")));
        assert!(line.is_some_and(|l| l.contains(how)), "{peer}: {said}");
    }
    let report = report(dir);
    let ours = samples(&report, "XCCL");
    assert_eq!(ours.len(), report["samples"].as_array().unwrap().len());
    // Twice: two sizes, two layouts with two numbers of tokens, and the layouts with four ranks.
    assert_eq!(ours.len(), 2 * (2 + 2 * 2 + 2));
    assert!(ours.iter().all(|s| s["round"] == 1 || s["verified"] == true), "{ours:?}");
    let table = fs::read_to_string(dir.join("out/compare.md")).unwrap();
    assert_eq!(table, text(&out.stdout));
    assert!(table.contains("| bytes | limit | XCCL |") && table.contains("- skipped: UCX:"), "{table}");
    assert!(table.contains("xccl run -n 4 -- xccl bench moe --tokens 8"), "{table}");

    // From the same samples again, and no more than these.
    fs::remove_file(dir.join("out/compare.md")).unwrap();
    assert!(compare(dir, &["--rounds", "0", "--add"]).status.success());
    assert_eq!(fs::read_to_string(dir.join("out/compare.md")).unwrap(), table);
    assert!(compare(dir, &["--rounds", "1", "--only", "p2p", "--sizes", "64", "--add"]).status.success());
    let grown = self::report(dir);
    assert_eq!(samples(&grown, "XCCL").len(), ours.len() + 1);
    assert_eq!(grown["sessions"].as_array().unwrap().len(), 2);
}

#[cfg(feature = "plots")]
#[test]
fn the_pictures_are_there_and_name_the_curves() {
    let dir = tempfile::tempdir().unwrap();
    assert!(compare(dir.path(), &["--rounds", "1", "--only", "p2p"]).status.success());
    let svg = fs::read_to_string(dir.path().join("out/compare.svg")).unwrap();
    assert!(svg.contains("XCCL") && svg.contains("4 KiB"), "{svg}");
    assert_eq!(&fs::read(dir.path().join("out/compare.png")).unwrap()[..4], b"\x89PNG");
}

#[test]
fn a_peer_that_crashes_hangs_or_has_another_routing_is_reported_and_the_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fake(&dir.join("bin/mpirun.openmpi"), "echo 'there is no network' >&2; exit 7");
    for program in ["p2p_openmpi", "moe_openmpi", "p2p_mpich", "moe_mpich"] {
        fake(&dir.join("peers").join(program), "exit 0");
    }
    // MPICH's is started by this alone: messages are fine, exchanges are of another routing.
    let times = r#"{"p10":1,"median":2,"p90":3}"#;
    let message = format!(r#"{{"bytes":8,"version":"9.9","half_rtt_us":{times},"verified":true}}"#);
    let exchange = format!(r#"{{"tokens":1,"dispatch_us":{times},"combine_us":{times},"routing_sum":4}}"#);
    let script = format!("case \"$*\" in *p2p_mpich*) echo '{message}' ;; *) echo '{exchange}' ;; esac > \"$json\"");
    fake(&dir.join("bin/mpirun.mpich"), &script);
    fake(&dir.join("peers/p2p_iceoryx2"), "echo $$ > \"$XCCL_RANK.pid\"; while :; do /bin/sleep 60; done");
    let out = compare(dir, &["--rounds", "1", "--only", "p2p,in-place", "--timeout", "2"]);
    // Ours was measured: that a peer failed is no failure of this program.
    assert!(out.status.success(), "{}", text(&out.stderr));
    let report = report(dir);
    assert_eq!(samples(&report, "XCCL").len(), 4);
    let mpich = samples(&report, "MPICH");
    assert!(mpich.len() == 1 && mpich[0]["half_rtt_us"] == 2.0, "{mpich:?}");
    assert_eq!(report["versions"]["MPICH"], "9.9");
    let table = text(&out.stdout);
    for line in [
        "- failed: Open MPI, P2p on 2 ranks, round 1: exit status: 7: there is no network",
        "- failed: MPICH, InPlace on 2 ranks, round 1: at 1 tokens its routing was another one: Some(4)",
        "- failed: iceoryx2, P2p on 2 ranks, round 1: it was ended after 2 s",
    ] {
        assert!(table.contains(line), "{line} is missing in {table}");
    }
    for rank in 0..2 {
        let pid = fs::read_to_string(dir.join(format!("{rank}.pid"))).unwrap();
        assert!(!Path::new("/proc").join(pid.trim()).exists(), "{pid} still runs");
    }
}

#[test]
fn what_cannot_be_compared_is_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    for (args, says) in [
        (&["--ranks", "2,3"][..], "--ranks"),
        (&["--sizes", "0"], "--sizes"),
        (&["--add"], "compare.json"),
        (&["--rounds", "0"], "nothing was measured"),
        (&["--only", "everything"], "everything"),
    ] {
        let out = compare(dir.path(), args);
        assert!(!out.status.success() && text(&out.stderr).contains(says), "{args:?}: {}", text(&out.stderr));
    }
}
