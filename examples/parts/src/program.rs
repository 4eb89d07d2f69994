//! Runs an example as a user does, for the tests of the examples.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// No run of a test takes longer.
const DEADLINE: Duration = Duration::from_secs(60);
/// What would make an example believe that a launcher has started it already.
const LAUNCHERS: [&str; 8] = [
    "XCCL_RANK",
    "XCCL_WORLD_SIZE",
    "XCCL_JOB",
    "RANK",
    "WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "SLURM_PROCID",
];

/// An example that has been started. It is killed when it is dropped; its ranks end with it.
pub struct Program {
    child: Child,
    said: File,
    complained: File,
    args: String,
}

/// What an example ended with.
#[derive(Debug)]
pub struct Output {
    /// Of its first process.
    pub status: ExitStatus,
    /// What all its processes printed.
    pub stdout: String,
    /// What all its processes complained of.
    pub stderr: String,
}

impl Program {
    /// Starts the example `program` with arguments and further variables.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(program: &str, args: &str, env: &[(&str, &str)]) -> Program {
        // Files, not pipes: a pipe that nobody reads would stop the program, and a rank left behind would keep it open.
        let file = || tempfile::tempfile().expect("a temporary file");
        let (said, complained) = (file(), file());
        let write_to = |file: &File| file.try_clone().expect("a second descriptor");
        let mut command = Command::new(program);
        command.args(args.split_whitespace()).env("XCCL_TIMEOUT", "20").envs(env.iter().copied());
        command.stdin(Stdio::null()).stdout(write_to(&said)).stderr(write_to(&complained));
        LAUNCHERS.iter().filter(|name| !env.iter().any(|(set, _)| set == *name)).for_each(|name| {
            command.env_remove(name);
        });
        let child = command.spawn().expect("the example starts");
        Program { child, said, complained, args: args.to_owned() }
    }

    /// The first process's.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    ///
    /// # Panics
    /// When the kernel does not say.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("the example is this process's child").is_none()
    }

    /// What it has printed so far.
    ///
    /// # Panics
    /// When that cannot be read.
    pub fn said(&self) -> String {
        text(&self.said)
    }

    /// Kills the first process.
    ///
    /// # Panics
    /// When that is not possible.
    pub fn kill(&mut self) {
        self.child.kill().expect("the example is this process's child");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it takes longer than a minute.
    pub fn wait(mut self) -> Output {
        let started = Instant::now();
        while self.runs() {
            let (args, said) = (&self.args, &self.said);
            assert!(
                started.elapsed() < DEADLINE,
                "{args} did not end within {DEADLINE:?}: {}{}",
                text(said),
                text(&self.complained)
            );
            sleep(Duration::from_millis(5));
        }
        let status = self.child.wait().expect("the example is this process's child");
        Output { status, stdout: text(&self.said), stderr: text(&self.complained) }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Either fails only for a process that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs an example to its end, which must be a good one, and gives what it printed.
///
/// # Panics
/// When it fails.
pub fn succeeds(program: &str, args: &str) -> String {
    let Output { status, stdout, stderr } = Program::start(program, args, &[]).wait();
    assert!(status.success(), "{program} {args}: {status}\n{stdout}{stderr}");
    stdout
}

/// Runs an example that must end with code 1 and agree with nothing, and gives its complaint.
///
/// # Panics
/// When it does not.
pub fn fails(program: &str, args: &str) -> String {
    let Output { status, stdout, stderr } = Program::start(program, args, &[]).wait();
    assert_eq!(status.code(), Some(1), "{program} {args}\n{stdout}{stderr}");
    assert!(!stdout.contains("agree"), "{stdout}");
    stderr
}

/// What was written so far. Reading leaves the place alone at which the example writes on.
fn text(file: &File) -> String {
    let bytes = file.metadata().expect("the size of a file").len() as usize;
    let mut text = vec![0; bytes];
    file.read_exact_at(&mut text, 0).expect("a file that only grows");
    String::from_utf8_lossy(&text).into_owned()
}
