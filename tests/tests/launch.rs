//! Ranks as launchers start them, and ranks that do not fit together.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, socket};
use xccl_tests::{Ended, Job, names_in_dev_shm, new_job};

const RANK: &str = env!("CARGO_BIN_EXE_rank");

fn environment(variables: &[(&str, String)]) -> Vec<(String, String)> {
    variables.iter().map(|(name, value)| (name.to_string(), value.clone())).collect()
}

#[test]
fn mpirun_starts_ranks_that_find_each_other() {
    let mut mpirun = Command::new("mpirun");
    mpirun.args(["--allow-run-as-root", "--oversubscribe", "-n", "3", RANK, "moe"]).env("XCCL_TIMEOUT", "20");
    let output = mpirun.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|err| panic!("mpirun (Debian: apt-get install openmpi-bin): {err}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn hydra_starts_ranks_that_find_each_other() {
    let mut hydra = Command::new("mpiexec.hydra");
    let output = hydra.args(["-n", "3", RANK, "moe"]).env("XCCL_TIMEOUT", "20").stdin(Stdio::null()).output();
    match output {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
        Err(err) => eprintln!("skipped: mpiexec.hydra (Debian: apt-get install mpich): {err}"),
    }
}

#[test]
fn hydras_variables_are_understood() {
    // What ranks of one job share is their parent, which is this test.
    let ranks = (0..3).map(|rank| {
        environment(&[
            ("PMI_RANK", rank.to_string()),
            ("PMI_SIZE", "3".into()),
            ("PMI_FD", (7 + rank).to_string()),
            ("MPI_LOCALRANKID", rank.to_string()),
            ("MPI_LOCALNRANKS", "3".into()),
        ])
    });
    all_well(Job::start_with(RANK, "moe", ranks).wait());
}

#[test]
fn torchruns_variables_are_understood() {
    let (id, port) = (new_job(), "29517".to_owned());
    let ranks = (0..3).map(|rank| {
        environment(&[
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", "3".into()),
            ("LOCAL_RANK", rank.to_string()),
            ("LOCAL_WORLD_SIZE", "3".into()),
            ("MASTER_ADDR", "127.0.0.1".into()),
            ("MASTER_PORT", port.clone()),
            ("TORCHELASTIC_RUN_ID", id.clone()),
            ("TORCHELASTIC_RESTART_COUNT", "0".into()),
        ])
    });
    all_well(Job::start_with(RANK, "moe", ranks).wait());
}

#[test]
fn sruns_variables_are_understood() {
    let job = std::process::id().to_string();
    let ranks = (0..3).map(|rank| {
        environment(&[
            ("SLURM_PROCID", rank.to_string()),
            ("SLURM_NTASKS", "3".into()),
            ("SLURM_STEP_NUM_TASKS", "3".into()),
            ("SLURM_LOCALID", rank.to_string()),
            ("SLURM_JOB_ID", job.clone()),
            ("SLURM_STEP_ID", "0".into()),
        ])
    });
    all_well(Job::start_with(RANK, "moe", ranks).wait());
}

fn all_well(ended: Vec<Ended>) {
    assert!(ended.iter().all(|e| e.code == Some(0)), "{ended:#?}");
}

/// Two ranks of which the second has another value of `variable`: both are told the other's rank and both values.
fn differ(variable: &str, values: [&str; 2], say: [&str; 2]) {
    let job = new_job();
    let ranks = (0..2).map(|rank| {
        environment(&[
            ("XCCL_RANK", rank.to_string()),
            ("XCCL_WORLD_SIZE", "2".into()),
            ("XCCL_JOB", job.clone()),
            ("XCCL_TIMEOUT", "3".into()),
            (variable, values[rank].into()),
        ])
    });
    for Ended { code, stderr } in Job::start_with(RANK, "join", ranks).wait() {
        assert_ne!(code, Some(0), "{variable}");
        let says_all = say.iter().all(|value| stderr.contains(value));
        assert!(stderr.contains("Mismatch") && says_all, "{variable} {values:?}: {stderr}");
    }
}

#[test]
fn ranks_with_different_options_are_told_both_values() {
    differ("XCCL_P2P_RING", ["64K", "128K"], ["65536", "131072"]);
    differ("XCCL_HEAP", ["1M", "2M"], ["1048576", "2097152"]);
    differ("XCCL_MEMORY", ["memfd", "posix"], ["memfd", "posix"]);
    differ("XCCL_WORLD_SIZE", ["2", "3"], ["2", "3"]);
}

#[test]
fn a_rank_claimed_by_two_processes_is_named() {
    let job = new_job();
    let ranks = [0, 1, 1].map(|rank| {
        environment(&[
            ("XCCL_RANK", rank.to_string()),
            ("XCCL_WORLD_SIZE", "3".into()),
            ("XCCL_JOB", job.clone()),
            ("XCCL_TIMEOUT", "3".into()),
        ])
    });
    let ended = Job::start_with(RANK, "join", ranks).wait();
    for Ended { code, stderr } in &ended {
        assert_ne!(*code, Some(0), "{ended:#?}");
        assert!(stderr.contains("DuplicateRank") && stderr.contains('1'), "{ended:#?}");
    }
}

/// Another user, for those who may become one.
const NOBODY: u32 = 65534;

/// Rank 0 or rank 1 of a job runs as another user: that one is refused, the other one waits in vain.
#[test]
fn ranks_of_two_users_do_not_meet() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can start a process as another user");
        return;
    }
    // Where the other user finds it.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let program = dir.path().join("rank");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).expect("its own folder");
    std::fs::copy(RANK, &program).expect("a copy");
    for others in 0..2 {
        let job = new_job();
        let ranks = [0, 1].map(|rank| {
            let mut command = Command::new(&program);
            command.arg("join").env("XCCL_RANK", rank.to_string()).env("XCCL_WORLD_SIZE", "2").env("XCCL_JOB", &job);
            command.env("XCCL_TIMEOUT", "2").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            if rank == others {
                command.uid(NOBODY).gid(NOBODY);
            }
            command.spawn().expect("the rank starts")
        });
        let [zero, one] = ranks.map(|rank| rank.wait_with_output().expect("the rank ends"));
        let (zero, one) = (String::from_utf8_lossy(&zero.stderr), String::from_utf8_lossy(&one.stderr));
        let (owner, other) = if others == 0 { (NOBODY, 0) } else { (0, NOBODY) };
        let refused = format!("the job's socket belongs to user {owner}, this process runs as user {other}");
        assert!(one.contains("Refused") && one.contains(&refused), "{one}");
        assert!(zero.contains("MissingRanks { ranks: [1]"), "{zero}");
    }
}

/// What the socket of a job's rank 0 says within a second to a connection of user `uid`; nothing is sent.
fn heard_by(uid: u32, job: &str) -> nix::Result<usize> {
    // Its debug output has the public part, and hides the secret.
    let token = format!("{:?}", xccl::UniqueId::from_job(job, 0));
    let token = token.trim_start_matches("UniqueId(").split(',').next().unwrap_or_default().to_owned();
    let listen = move || {
        // The call itself, not libc's function of that name, changes this thread alone.
        // SAFETY: it takes numbers and touches no memory.
        let outcome = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, -1) };
        assert_eq!(outcome, 0, "setresuid: {}", Errno::last());
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        let address = UnixAddr::new_abstract(format!("xccl-{token}").as_bytes())?;
        let start = Instant::now();
        while let Err(err) = connect(socket.as_raw_fd(), &address) {
            assert!(err == Errno::ECONNREFUSED && start.elapsed() < Duration::from_secs(20), "connect: {err}");
            std::thread::sleep(Duration::from_millis(1));
        }
        let second = nix::sys::time::TimeVal::new(1, 0);
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::ReceiveTimeout, &second)?;
        recv(socket.as_raw_fd(), &mut [0; 64], MsgFlags::empty())
    };
    std::thread::spawn(listen).join().expect("the thread ends")
}

#[test]
fn rank_0_hangs_up_on_other_users_before_they_say_anything() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can connect as another user");
        return;
    }
    let job = new_job();
    let rank = |rank: usize| {
        environment(&[("XCCL_RANK", rank.to_string()), ("XCCL_WORLD_SIZE", "2".into()), ("XCCL_JOB", job.clone())])
    };
    let mut ranks = Job::start_with(RANK, "join", [rank(0)]);
    assert_eq!(heard_by(NOBODY, &job), Ok(0), "not closed");
    assert_eq!(heard_by(0, &job), Err(Errno::EAGAIN), "closed, or told something");
    ranks.start_another(RANK, "join", rank(1));
    all_well(ranks.wait());
}

/// Kills rank 2 of 4 at many moments of its start: the others end with an error, none hangs, nothing is left.
fn killed_at_any_moment(memory: &str) {
    let env = [("XCCL_TIMEOUT", "5"), ("XCCL_MEMORY", memory)];
    let start = Instant::now();
    all_well(Job::start(RANK, 4, "join", &env).wait());
    let whole = start.elapsed().max(Duration::from_millis(20));
    let moments = 24;
    let mut survived = 0;
    for moment in 0..moments {
        let mut job = Job::start(RANK, 4, "join", &env);
        std::thread::sleep(whole * moment / moments);
        job.kill(2);
        let start = Instant::now();
        for (rank, Ended { code, stderr }) in job.wait().into_iter().enumerate().filter(|&(rank, _)| rank != 2) {
            match code {
                Some(0) => survived += 1, // killed when it had done all that the others needed
                Some(_) => assert!(stderr.contains("Error"), "rank {rank}, moment {moment}: {stderr}"),
                None => panic!("rank {rank} was still running a minute after moment {moment}, or crashed: {stderr}"),
            }
        }
        let took = start.elapsed();
        assert!(took < Duration::from_secs(20), "moment {moment}: the others took {took:?}");
    }
    assert!(survived < 3 * moments, "no kill came in time");
    assert_eq!(names_in_dev_shm(), Vec::<String>::new());
}

#[test]
fn a_rank_killed_at_any_moment_of_the_set_up_leaves_no_one_hanging() {
    killed_at_any_moment("memfd");
    killed_at_any_moment("posix");
}
