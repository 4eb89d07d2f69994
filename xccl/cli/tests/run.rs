//! `xccl run`, as a user runs it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

fn xccl(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xccl"));
    command.arg("run").args(args).stdin(Stdio::null());
    command
}

fn sh(options: &[&str], script: &str) -> Command {
    xccl(&[options, &["--", "sh", "-c", script]].concat())
}

fn output(mut command: Command) -> Output {
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn sorted_lines(bytes: &[u8]) -> Vec<String> {
    let mut lines: Vec<_> = text(bytes).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// Whether a process exists and has not ended.
fn is_alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

/// The letter that `ps` shows.
fn state(pid: u32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('-')
}

fn eventually(mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

/// A launcher whose output is read as it comes, and that a failed test does not leave behind.
struct Running {
    launcher: Child,
    stdout: ChildStdout,
    seen: String,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut launcher = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = launcher.stdout.take().unwrap();
        Running { launcher, stdout, seen: String::new() }
    }

    fn read_until(&mut self, word: &str, times: usize) {
        let mut buffer = [0; 256];
        while self.seen.matches(word).count() < times {
            let n = self.stdout.read(&mut buffer).unwrap();
            assert!(n > 0, "the output ended: {}", self.seen);
            self.seen.push_str(&text(&buffer[..n]));
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.launcher.id() as i32), signal).unwrap();
    }

    /// Exit code, all of stdout, all of stderr.
    fn end(mut self) -> (Option<i32>, String, String) {
        self.stdout.read_to_string(&mut self.seen).unwrap();
        let mut stderr = String::new();
        self.launcher.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        (self.launcher.wait().unwrap().code(), std::mem::take(&mut self.seen), stderr)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}

/// The process ids that scripts wrote to `*.pid` in `dir`.
fn pids(dir: &Path) -> Vec<String> {
    let files = fs::read_dir(dir).unwrap().flatten().filter(|f| f.path().extension().is_some_and(|e| e == "pid"));
    let read = files.map(|f| fs::read_to_string(f.path()).unwrap_or_default());
    read.filter(|p| p.ends_with('\n')).map(|p| p.trim().to_owned()).collect()
}

#[test]
fn every_rank_finds_its_place_and_the_same_job_in_its_environment() {
    let script = "echo $XCCL_RANK $XCCL_WORLD_SIZE $XCCL_LOCAL_RANK $XCCL_LOCAL_WORLD_SIZE $XCCL_JOB";
    let mut command = sh(&["-n", "3", "--no-prefix"], script);
    command.env("XCCL_RANK", "77").env("XCCL_JOB", "another launcher's");
    let out = output(command);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let lines = sorted_lines(&out.stdout);
    let job = lines[0].rsplit(' ').next().unwrap();
    assert!(job.len() == 32 && job.bytes().all(|b| b.is_ascii_hexdigit()), "{job}");
    assert_eq!(lines, [0, 1, 2].map(|rank| format!("{rank} 3 {rank} 3 {job}")));
    let other = output(sh(&["-n", "1", "--no-prefix"], "echo $XCCL_JOB"));
    assert_ne!(text(&other.stdout).trim(), job);
}

#[test]
fn each_line_of_either_stream_begins_with_its_rank() {
    let out = output(sh(&["-n", "2"], "echo one; echo two; echo three >&2; printf 'no end'"));
    assert!(out.status.success());
    assert_eq!(sorted_lines(&out.stdout), ["[0] no end", "[0] one", "[0] two", "[1] no end", "[1] one", "[1] two"]);
    assert_eq!(sorted_lines(&out.stderr), ["[0] three", "[1] three"]);
    assert!(out.stdout.ends_with(b"no end\n"));
}

#[test]
fn lines_of_many_ranks_do_not_mix_even_when_written_in_parts() {
    let script = "for i in 1 2 3 4 5 6 7 8 9; do printf $XCCL_RANK; printf $XCCL_RANK; echo $XCCL_RANK; done";
    let out = output(sh(&["-n", "8"], script));
    let lines = sorted_lines(&out.stdout);
    let expected: Vec<_> = (0..8).flat_map(|r| vec![format!("[{r}] {r}{r}{r}"); 9]).collect();
    assert_eq!(lines, expected);
}

#[test]
fn bytes_that_are_no_text_pass_and_lines_without_end_come_in_pieces() {
    let out = output(sh(&["-n", "1"], r"printf '\377\000\r\n'; head -c 40000 /dev/zero"));
    let first = b"[0] \xff\0\r\n";
    assert!(out.stdout.starts_with(first));
    let rest: Vec<_> = out.stdout[first.len()..].split_inclusive(|&b| b == b'\n').collect();
    assert_eq!(rest.iter().map(|piece| piece.len() - "[0] \n".len()).collect::<Vec<_>>(), [16384, 16384, 7232]);
}

#[test]
fn nothing_of_a_long_output_is_lost_to_a_slow_reader() {
    let mut running = Running::start(sh(&["-n", "2"], "seq 50000"));
    std::thread::sleep(Duration::from_millis(300));
    running.read_until("\n", 1);
    let (code, seen, _) = running.end();
    assert_eq!((code, seen.lines().count()), (Some(0), 100_000));
}

#[test]
fn a_closed_output_ends_the_ranks_as_it_would_without_a_launcher() {
    let Running { launcher, stdout, .. } = &mut Running::start(sh(&["-n", "2"], "exec yes"));
    stdout.read_exact(&mut [0; 100]).unwrap();
    // The only reader goes.
    let null = fs::File::open("/dev/null").unwrap();
    *stdout = ChildStdout::from(std::os::fd::OwnedFd::from(null));
    assert_eq!(launcher.wait().unwrap().code(), Some(128 + 13));
}

#[test]
fn without_prefix_output_passes_as_it_is() {
    let out = output(sh(&["-n", "1", "--no-prefix"], "printf plain; printf err >&2"));
    assert_eq!((text(&out.stdout), text(&out.stderr)), ("plain".into(), "err".into()));
}

#[test]
fn only_rank_0_reads_standard_input() {
    let mut command = sh(&["-n", "3"], "echo \"<$(cat)>\"");
    let mut launcher = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    launcher.stdin.take().unwrap().write_all(b"hello").unwrap();
    let out = launcher.wait_with_output().unwrap();
    assert_eq!(sorted_lines(&out.stdout), ["[0] <hello>", "[1] <>", "[2] <>"]);
}

#[test]
fn the_first_failure_ends_the_rest_and_names_rank_and_exit_code() {
    let start = Instant::now();
    let out = output(sh(&["-n", "3"], "test $XCCL_RANK = 1 && { echo last words >&2; exit 7; }; exec sleep 60"));
    assert_eq!(out.status.code(), Some(7));
    let stderr = text(&out.stderr);
    let (words, message) = stderr.split_once('\n').unwrap();
    assert_eq!(words, "[1] last words");
    assert!(message.starts_with("xccl run: rank 1 (pid "), "{stderr}");
    assert!(message.ends_with(") exited with code 7; ending the other 2 ranks\n"), "{stderr}");
    assert!(start.elapsed() < Duration::from_secs(2), "SIGTERM was enough, no grace had to pass");
}

#[test]
fn a_rank_killed_by_a_signal_is_named_with_the_signal() {
    let out = output(sh(&["-n", "2"], "test $XCCL_RANK = 0 && kill -9 $$; exec sleep 60"));
    assert_eq!(out.status.code(), Some(128 + 9));
    let stderr = text(&out.stderr);
    assert!(stderr.contains("was killed by signal 9 (SIGKILL); ending the other rank\n"), "{stderr}");
}

#[test]
fn a_job_whose_time_is_over_is_ended_with_what_it_has_started() {
    let dir = tempfile::tempdir().unwrap();
    // One that does not listen, and one in a session of its own.
    let script = format!(
        "trap '' TERM; cd {}; setsid sh -c 'echo $$ > child$XCCL_RANK.pid; exec sleep 60' & echo $$ > $XCCL_RANK.pid; \
         while :; do sleep 60; done",
        dir.path().display()
    );
    let out = output(sh(&["-n", "2", "--timeout", "0.7", "--grace", "0.1"], &script));
    assert_eq!(out.status.code(), Some(124), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("0.7 s is over with 2 ranks still running"), "{}", text(&out.stderr));
    let pids = pids(dir.path());
    assert!(pids.len() == 4 && pids.iter().all(|pid| !is_alive(pid)), "{pids:?}");
    // Time left over changes nothing.
    assert_eq!(output(sh(&["-n", "2", "--timeout", "60"], "exit 3")).status.code(), Some(3));
    assert!(output(sh(&["-n", "2", "--timeout", "60"], "true")).status.success());
}

#[test]
fn what_ignores_the_request_to_end_is_killed_after_the_grace_even_if_stopped() {
    let script = "trap '' TERM; case $XCCL_RANK in 0) sleep 0.1; exit 3;; 1) kill -STOP $$;; esac; exec sleep 60";
    let start = Instant::now();
    let out = output(sh(&["-n", "3", "--grace", "0.3"], script));
    assert_eq!(out.status.code(), Some(3));
    assert!((0.3..3.0).contains(&start.elapsed().as_secs_f64()), "{:?}", start.elapsed());
}

#[test]
fn what_a_rank_leaves_behind_ends_with_the_job_whatever_session_it_moved_to() {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "cd {}; sleep 1000 & echo $! > a.pid; setsid sh -c 'echo $$ > b.pid; exec sleep 1000' & \
         until test -s b.pid; do sleep 0.01; done",
        dir.path().display()
    );
    let start = Instant::now();
    let out = output(sh(&["-n", "1"], &script));
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(start.elapsed() < Duration::from_secs(3), "held up by a grandchild's open pipe");
    let pids = pids(dir.path());
    assert_eq!(pids.len(), 2);
    assert!(eventually(|| !pids.iter().any(|p| is_alive(p))), "left behind: {pids:?}");
}

#[test]
fn a_killed_launcher_leaves_no_rank_no_grandchild_and_no_guard() {
    for signal_group in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let script = format!(
            "cd {}; echo $$ > $XCCL_RANK.rank.pid; setsid sh -c 'echo $$ > '$XCCL_RANK'.session.pid; exec sleep 1000' & \
             sh -c 'echo $$ > '$XCCL_RANK'.grandchild.pid; sleep 1000; true'",
            dir.path().display()
        );
        let mut command = sh(&["-n", "2"], &script);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut running = Running::start(command);
        assert!(eventually(|| pids(dir.path()).len() == 6), "{:?}", pids(dir.path()));
        let launcher = running.launcher.id();
        let mut pids = pids(dir.path());
        let children = fs::read_to_string(format!("/proc/{launcher}/task/{launcher}/children")).unwrap();
        let guard = children.split_whitespace().find(|&pid| !pids.iter().any(|p| p == pid));
        pids.push(guard.expect("the launcher's third child is the guard").to_owned());
        assert!(pids.iter().all(|p| is_alive(p)));
        match signal_group {
            true => killpg(Pid::from_raw(launcher as i32), Signal::SIGKILL).unwrap(),
            false => running.signal(Signal::SIGKILL),
        }
        running.launcher.wait().unwrap();
        assert!(eventually(|| !pids.iter().any(|p| is_alive(p))), "left behind: {pids:?}");
    }
}

#[test]
fn a_launcher_killed_at_any_moment_of_its_start_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let script = format!("cd {}; sleep 1000 & echo $! > $$.pid; wait", dir.path().display());
    for step in 0..20 {
        let running = Running::start(sh(&["-n", "8"], &script));
        std::thread::sleep(Duration::from_millis(step));
        drop(running);
    }
    assert!(eventually(|| !pids(dir.path()).iter().any(|p| is_alive(p))), "left behind: {:?}", pids(dir.path()));
}

#[test]
fn signals_to_the_launcher_reach_the_ranks() {
    let script = "trap 'echo got USR1' USR1; trap 'echo got TERM; exit 0' TERM; echo ready; \
                  while :; do sleep 0.02; done";
    let mut running = Running::start(sh(&["-n", "2"], script));
    running.read_until("ready", 2);
    running.signal(Signal::SIGUSR1);
    running.read_until("got USR1", 2);
    running.signal(Signal::SIGTERM);
    let (code, seen, stderr) = running.end();
    assert_eq!((code, seen.matches("got TERM").count()), (Some(0), 2), "{stderr}");
}

#[test]
fn an_interrupt_ends_the_ranks_and_shows_in_the_exit_code() {
    let mut running = Running::start(sh(&["-n", "2"], "echo ready; exec sleep 60"));
    running.read_until("ready", 2);
    running.signal(Signal::SIGINT);
    let (code, _, stderr) = running.end();
    assert_eq!(code, Some(130));
    assert_eq!(stderr.matches("(SIGINT)").count(), 1, "{stderr}");
}

#[test]
fn a_stop_from_the_keyboard_stops_the_ranks_and_the_launcher_until_they_continue() {
    // The rank waits in the shell itself: one that is about to start a program (vfork) is not seen stopped.
    let mut command = sh(&["-n", "1"], "echo $$; read word; echo $word");
    command.stdin(Stdio::piped());
    let mut running = Running::start(command);
    running.read_until("\n", 1);
    let rank: u32 = running.seen.trim().trim_start_matches("[0] ").parse().unwrap();
    running.signal(Signal::SIGTSTP);
    assert!(eventually(|| state(rank) == 'T' && state(running.launcher.id()) == 'T'));
    running.signal(Signal::SIGCONT);
    running.launcher.stdin.take().unwrap().write_all(b"done\n").unwrap();
    let (code, seen, _) = running.end();
    assert!(code == Some(0) && seen.contains("done"), "{seen}");
}

#[test]
fn ranks_start_with_the_signal_mask_and_the_limits_of_the_launcher() {
    let script = "grep -h SigBlk /proc/self/status; ulimit -Sn";
    let mut plain = Command::new("sh");
    let plain = text(&plain.args(["-c", script]).output().unwrap().stdout);
    let out = output(sh(&["-n", "1", "--no-prefix"], script));
    assert_eq!(text(&out.stdout), plain);
}

#[test]
fn more_ranks_than_the_soft_limit_on_open_files_allows_can_be_started() {
    let run = format!("exec {} run -n 40 -- sh -c 'ulimit -Sn'", env!("CARGO_BIN_EXE_xccl"));
    let limited = |limit: &str| Command::new("sh").args(["-c", &format!("ulimit {limit}; {run}")]).output().unwrap();
    let out = limited("-Sn 64");
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(text(&out.stdout).lines().filter(|l| l.ends_with("] 64")).count(), 40);
    let out = limited("-n 64");
    assert!(!out.status.success());
    assert!(text(&out.stderr).contains("40 ranks needs 144 open files, the limit is 64"), "{}", text(&out.stderr));
}

#[test]
fn a_program_that_cannot_be_started_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str, mode: u32| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    file("plain", "", 0o644);
    file("orphan", "#!/no/such/interpreter\n", 0o755);
    for (program, code, advice) in [
        ("no-such-program", 127, "no directory of PATH has it"),
        ("plain", 127, "say ./plain"),
        ("/no/such/program", 127, "there is no such file"),
        ("./orphan", 127, "first line"),
        ("./plain", 126, "chmod +x ./plain"),
        ("/", 126, "it is a directory"),
    ] {
        let mut command = xccl(&["-n", "2", "--", program]);
        command.current_dir(dir.path());
        let out = output(command);
        let stderr = text(&out.stderr);
        assert_eq!(out.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(&format!("{program:?}")) && stderr.contains(advice), "{stderr}");
    }
}

#[test]
fn a_number_of_ranks_out_of_range_is_refused_with_the_range() {
    for n in ["0", "1025", "many"] {
        let out = output(xccl(&["-n", n, "--", "true"]));
        let stderr = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(n) && (n == "many" || stderr.contains("1..=1024")), "{stderr}");
    }
}

#[test]
fn a_mistyped_option_is_not_taken_for_the_program_and_the_programs_own_options_are_left_to_it() {
    let out = output(xccl(&["-n", "1", "--bnid", "true"]));
    assert!(out.status.code() == Some(2) && text(&out.stderr).contains("--bind"), "{}", text(&out.stderr));
    let out = output(xccl(&["-n", "1", "echo", "--bind", "-n", "--", "x"]));
    assert_eq!(text(&out.stdout), "[0] --bind -n -- x\n");
}

#[test]
fn bind_gives_the_usable_cores_round_and_round() {
    let own = nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cores: Vec<_> = (0..nix::sched::CpuSet::count()).filter(|&c| own.is_set(c).unwrap()).collect();
    let ranks = (cores.len() + 1).min(16);
    let script = "grep Cpus_allowed_list /proc/self/status";
    let out = output(sh(&["-n", &ranks.to_string(), "--bind"], script));
    let lines = text(&out.stdout);
    assert_eq!(lines.lines().count(), ranks);
    for rank in 0..ranks {
        let expected = format!("[{rank}] Cpus_allowed_list:\t{}", cores[rank % cores.len()]);
        assert!(lines.lines().any(|l| l == expected), "{expected:?} is not in {lines}");
    }
}

/// What ranks are told of where they live, as one line each.
const WHERE: &str = "echo $XCCL_RANK $XCCL_WORLD_SIZE $XCCL_LOCAL_RANK $XCCL_LOCAL_WORLD_SIZE \
                     ${XCCL_NODE_ID-none} ${XCCL_MASTER_ADDR-none} ${XCCL_MASTER_PORT-none}";

#[test]
fn ranks_of_pretended_nodes_live_in_blocks_and_meet_on_the_loopback_interface() {
    let out = output(sh(&["-n", "5", "--nodes", "2", "--no-prefix"], WHERE));
    assert!(out.status.success(), "{}", text(&out.stderr));
    let lines = sorted_lines(&out.stdout);
    let port = lines[0].rsplit(' ').next().unwrap().to_owned();
    assert!(port.parse::<u16>().is_ok_and(|port| port > 0), "{port}");
    let expected = ["0 5 0 3 0", "1 5 1 3 0", "2 5 2 3 0", "3 5 0 2 1", "4 5 1 2 1"];
    assert_eq!(lines, expected.map(|rank| format!("{rank} 127.0.0.1 {port}")));
}

#[test]
fn ranks_on_one_machine_are_told_of_no_node_and_no_address() {
    let mut command = sh(&["-n", "1", "--no-prefix"], WHERE);
    command.env("XCCL_NODE_ID", "of another launcher").env_remove("XCCL_MASTER_ADDR").env_remove("XCCL_MASTER_PORT");
    assert_eq!(text(&output(command).stdout), "0 1 0 1 none none none\n");
}

#[test]
fn each_hosts_launcher_starts_its_part_of_the_ranks() {
    for (host, expected) in [("0", ["0 4 0 2", "1 4 1 2"]), ("1", ["2 4 0 2", "3 4 1 2"])] {
        let options = ["-n", "2", "--nnodes", "2", "--node-rank", host, "--master", "[::1]:29500", "--no-prefix"];
        let mut command = sh(&options, &format!("{WHERE} $XCCL_JOB"));
        command.env("XCCL_JOB", "secret").env_remove("XCCL_NODE_ID");
        let out = output(command);
        assert!(out.status.success(), "{}", text(&out.stderr));
        assert_eq!(sorted_lines(&out.stdout), expected.map(|rank| format!("{rank} none [::1] 29500 secret")));
    }
    // The rank that others know it by stands before its lines, and in messages.
    let job = ["--nnodes", "2", "--node-rank", "1", "--master", "h:1", "--job", "secret"];
    let out =
        output(sh(&[&["-n", "2"], &job[..]].concat(), "echo $XCCL_JOB; [ $XCCL_RANK = 2 ] || { sleep 0.5; exit 3; }"));
    assert_eq!(sorted_lines(&out.stdout), ["[2] secret", "[3] secret"]);
    assert!(text(&out.stderr).contains("rank 3 (pid"), "{}", text(&out.stderr));
}

#[test]
fn launchers_of_one_job_end_their_own_ranks_alone() {
    let job = |host| ["-n", "1", "--nnodes", "2", "--node-rank", host, "--master", "h:1", "--job", "shared"];
    let mut other = Running::start(sh(&job("1"), "echo $$ is ready; exec sleep 30"));
    other.read_until("ready", 1);
    let rank = other.seen.split(' ').nth(1).unwrap().to_owned();
    assert!(output(sh(&job("0"), "exit 0")).status.success());
    assert!(is_alive(&rank), "{rank}");
    other.signal(Signal::SIGTERM);
    let (code, ..) = other.end();
    assert_ne!(code, Some(0));
}

#[test]
fn hosts_that_cannot_be_are_named_with_what_is_expected() {
    let host = ["--node-rank", "0", "--master", "h:1", "--job", "j"];
    for (options, says) in [
        (&["-n", "2", "--nodes", "3"][..], "2 ranks cannot live on 3 nodes"),
        (&["-n", "2", "--nodes", "0"], "0"),
        (&["-n", "1", "--nnodes", "2"], "--node-rank"),
        (&["-n", "1", "--master", "h:1"], "--nnodes"),
        (&["-n", "1", "--nnodes", "2", "--node-rank", "2", "--master", "h:1", "--job", "j"], "0 to 1"),
        (&["-n", "1", "--nnodes", "2", "--node-rank", "0", "--master", "h", "--job", "j"], "node0:29500"),
        (&["-n", "1", "--nnodes", "2", "--node-rank", "0", "--master", "h:1"], "XCCL_JOB"),
        (&[&["-n", "1", "--nodes", "1", "--nnodes", "2"], &host[..]].concat(), "--nodes"),
    ] {
        let mut command = sh(options, "echo started");
        command.env_remove("XCCL_JOB");
        let out = output(command);
        assert!(!out.status.success() && out.stdout.is_empty(), "{options:?}");
        assert!(text(&out.stderr).contains(says), "{options:?}: {}", text(&out.stderr));
    }
}

#[test]
fn ranks_of_two_launchers_meet() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let bench = ["--timeout", "60", "--", env!("CARGO_BIN_EXE_xccl"), "bench", "p2p", "--sizes", "8", "--iters", "5"];
    let start = |host: &str| {
        let master = port.to_string();
        let mut command = xccl(&["-n", "1", "--nnodes", "2", "--node-rank", host, "--master", &master]);
        command.args(bench).env("XCCL_JOB", format!("two launchers {}", std::process::id()));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let launchers = ["0", "1"].map(start);
    let [first, second] = launchers.map(|launcher| launcher.wait_with_output().unwrap());
    for out in [&first, &second] {
        assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    }
    assert!(
        text(&first.stdout).lines().any(|line| line.starts_with("[0]") && line.contains('8')),
        "{}",
        text(&first.stdout)
    );
}
