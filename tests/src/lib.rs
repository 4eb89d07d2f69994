//! Starts the processes of a test, and ends them; compiles those in C and C++.

pub mod namespaces;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use xccl::{Communicator, Config, UniqueId};

/// No test's process lives longer.
const LONGEST: Duration = Duration::from_secs(60);

/// What a process of a test ended with.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard error.
    pub stderr: String,
}

/// The ranks of one job, each a process. Those still running are killed when it is dropped.
#[derive(Default)]
pub struct Job {
    ranks: Vec<Child>,
}

impl Job {
    /// Starts `n` processes of `program` that play `scenario`, with further variables in their environment.
    pub fn start(program: &str, n: usize, scenario: &str, env: &[(&str, &str)]) -> Job {
        Job::start_some(program, n, 0..n, scenario, env)
    }

    /// As [`start`](Self::start), a rank for each of `nodes`, the node that it takes itself for.
    pub fn start_on_nodes(program: &str, nodes: &[usize], scenario: &str, env: &[(&str, &str)]) -> Job {
        let (job, port) = (new_job(), free_port("127.0.0.1").to_string());
        let rank = |(rank, node): (usize, &usize)| {
            let mut env: Vec<(String, String)> = env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            for (name, value) in [
                ("XCCL_RANK", &rank.to_string()),
                ("XCCL_WORLD_SIZE", &nodes.len().to_string()),
                ("XCCL_JOB", &job),
                ("XCCL_NODE_ID", &node.to_string()),
                ("XCCL_MASTER_ADDR", &"127.0.0.1".to_owned()),
                ("XCCL_MASTER_PORT", &port),
            ] {
                env.push((name.to_owned(), value.clone()));
            }
            env
        };
        Job::start_with(program, scenario, nodes.iter().enumerate().map(rank))
    }

    /// As [`start`](Self::start), but only some of the `n` ranks.
    pub fn start_some(
        program: &str,
        n: usize,
        ranks: impl IntoIterator<Item = usize>,
        scenario: &str,
        env: &[(&str, &str)],
    ) -> Job {
        let job = new_job();
        let rank = |rank: usize| {
            let mut env: Vec<(String, String)> = env.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            env.push(("XCCL_RANK".into(), rank.to_string()));
            env.push(("XCCL_WORLD_SIZE".into(), n.to_string()));
            env.push(("XCCL_JOB".into(), job.clone()));
            env
        };
        Job::start_with(program, scenario, ranks.into_iter().map(rank))
    }

    /// Starts a process for each environment, which has to say which rank it is.
    pub fn start_with(
        program: &str,
        scenario: &str,
        environments: impl IntoIterator<Item = Vec<(String, String)>>,
    ) -> Job {
        let mut job = Job::default();
        environments.into_iter().for_each(|env| job.start_another(program, scenario, env));
        job
    }

    /// Starts one more process, perhaps of another program.
    pub fn start_another(&mut self, program: &str, scenario: &str, env: impl IntoIterator<Item = (String, String)>) {
        self.start_command(Command::new(program), scenario, env);
    }

    /// Starts one more process, by a command that lacks the scenario.
    pub fn start_command(
        &mut self,
        mut command: Command,
        scenario: &str,
        env: impl IntoIterator<Item = (String, String)>,
    ) {
        command.arg(scenario).env("XCCL_TIMEOUT", "20").env("RUST_BACKTRACE", "0").envs(env);
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        self.ranks.push(command.spawn().expect("the test's own program can be started"));
    }

    /// The process of the `i`-th rank that was started.
    pub fn pid(&self, i: usize) -> u32 {
        self.ranks[i].id()
    }

    /// `kill -9` of the `i`-th rank that was started.
    pub fn kill(&mut self, i: usize) {
        self.ranks[i].kill().expect("the rank is this process's child");
    }

    /// Waits for all to end, for a minute at most.
    pub fn wait(mut self) -> Vec<Ended> {
        let start = Instant::now();
        let ended = self.ranks.iter_mut().map(|child| {
            let status = loop {
                match child.try_wait().expect("the rank is this process's child") {
                    Some(status) => break status,
                    None if start.elapsed() > LONGEST => {
                        let _ = child.kill();
                        break child.wait().expect("the rank is this process's child");
                    }
                    None => std::thread::sleep(Duration::from_millis(5)),
                }
            };
            let mut stderr = String::new();
            if let Some(mut from) = child.stderr.take() {
                let _ = std::io::Read::read_to_string(&mut from, &mut stderr);
            }
            Ended { code: status.code(), stderr }
        });
        ended.collect()
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for child in &mut self.ranks {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A port that nobody has at this moment, of the loopback address of either family.
pub fn free_port(loopback: &str) -> u16 {
    let listener = std::net::TcpListener::bind((loopback, 0)).expect("the loopback interface has that address");
    listener.local_addr().expect("it is bound").port()
}

/// Whether ranks of several nodes can meet here; if not, says why the test that asks is skipped.
pub fn has_network() -> bool {
    let why = Communicator::network_providers(&Config::default()).err();
    if let Some(why) = &why {
        eprintln!("skipped: {why}");
    }
    why.is_none()
}

/// Plays `scenario` with a rank of `program` for each of `nodes`: all of them must end well.
pub fn plays_well_on(program: &str, nodes: &[usize], scenario: &str, env: &[(&str, &str)]) {
    let ended = Job::start_on_nodes(program, nodes, scenario, env).wait();
    assert!(ended.iter().all(|e| e.code == Some(0)), "{scenario} on nodes {nodes:?}, {env:?}: {ended:#?}");
}

/// A text that no other job has.
pub fn new_job() -> String {
    static JOBS: AtomicU32 = AtomicU32::new(0);
    format!("test-{}-{}", std::process::id(), JOBS.fetch_add(1, Ordering::Relaxed))
}

/// Plays `scenario` with `n` ranks of `program`: all of them must end well.
pub fn plays_well(program: &str, n: usize, scenario: &str, env: &[(&str, &str)]) {
    let ended = Job::start(program, n, scenario, env).wait();
    assert!(ended.iter().all(|e| e.code == Some(0)), "{scenario} with {n} ranks, {env:?}: {ended:#?}");
}

/// Plays `scenario` with `n` ranks that are threads of this process.
///
/// # Panics
/// When a rank does, or cannot start.
pub fn as_threads(n: usize, scenario: impl Fn(&Communicator) + Sync) {
    let id = UniqueId::new().expect("an id");
    std::thread::scope(|s| {
        for rank in 0..n {
            let (id, scenario) = (&id, &scenario);
            s.spawn(move || {
                let config = Config::default().timeout(Some(LONGEST / 3));
                scenario(&Communicator::init(rank, n, id, config).expect("the ranks start"));
            });
        }
    });
}

/// Runs a command to its end and gives what it printed; it must succeed.
pub fn succeeds(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|err| {
        let tool = command.get_program().to_string_lossy().into_owned();
        panic!("{tool} cannot be started (Debian: apt-get install {tool}): {err}")
    });
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {said}{complained}");
    said.into_owned()
}

/// Compiles a C or C++ program with the library of the C interface that cargo has built along with the test.
pub fn compile(compiler: &str, flags: &[&str], source: &Path, program: &Path) -> String {
    let test = std::env::current_exe().expect("the test's own path");
    let built = test.parent().expect("target/<profile>/deps");
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("../include");
    let mut command = Command::new(compiler);
    command.args(flags).arg("-I").arg(include).arg(source).arg("-o").arg(program);
    command.arg(built.join("libxccl_c.a")).args(["-lpthread", "-ldl", "-lm"]);
    succeeds(&mut command);
    program.display().to_string()
}

/// The functions that the library of the C interface exports, which cargo has built along with the test.
pub fn exported_functions() -> BTreeSet<String> {
    let test = std::env::current_exe().expect("the test's own path");
    let library = test.parent().expect("target/<profile>/deps").join("libxccl_c.so");
    let symbols = succeeds(Command::new("nm").args(["-D", "--defined-only", "--format=posix"]).arg(&library));
    let names = symbols.lines().filter_map(|line| line.split(' ').next());
    names.filter(|name| name.starts_with("xccl")).map(str::to_owned).collect()
}

/// Flags under which nothing of the interface may cause a warning.
pub const C99: [&str; 7] = ["-std=c99", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pedantic"];
/// The same for C++17.
pub const CXX17: [&str; 7] = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pedantic"];

/// Segments' names that were left behind in `/dev/shm`.
pub fn names_in_dev_shm() -> Vec<String> {
    let entries = std::fs::read_dir("/dev/shm").expect("/dev/shm is there").flatten();
    let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
    // Other tests' jobs may be between creating and unlinking: what stays is what counts.
    let ours: Vec<String> = names.filter(|n| n.starts_with("xccl")).collect();
    std::thread::sleep(Duration::from_millis(200));
    ours.into_iter().filter(|n| std::path::Path::new("/dev/shm").join(n).exists()).collect()
}
