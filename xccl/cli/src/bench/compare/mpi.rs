//! Open MPI and MPICH: the same two C programs (`p2p_mpi.c`, `moe_mpi.c`), each at the settings that were fastest. What was tried
//! is in benches/peers/README.md.

use anyhow::Result;

use super::contender::{Contender, Job, Place, Reads, common_options, list, words};
use super::task::{Group, Task, What};

pub struct OpenMpi;

pub struct Mpich;

/// Largest number of tokens whose rows all fit a message of 64 KiB.
const SHORT: usize = 4;

/// What goes through a run decides on the settings.
#[derive(Clone, Copy, PartialEq)]
enum Traffic {
    /// From ordinary memory, page by page: two copies through shared memory take less time than one that looks up pages (CMA).
    Messages,
    /// Rows of few tokens, in huge pages: sent eagerly.
    ShortRows,
    /// More rows, in huge pages: one copy by CMA is fastest.
    Rows,
}

impl Contender for OpenMpi {
    fn name(&self) -> &'static str {
        "Open MPI"
    }

    fn find(&self, place: &Place) -> Result<Option<String>, String> {
        let how = "apt-get install openmpi-bin libopenmpi-dev, then benches/peers/build.sh";
        place.installed("mpirun.openmpi", how)?;
        place.built("p2p_openmpi", how)?;
        place.built("moe_openmpi", how).map(|_| None)
    }

    fn jobs(&self, task: &Task, place: &Place) -> Result<Vec<Job>> {
        let launch = |traffic| {
            // mpirun refuses root otherwise.
            let root = if nix::unistd::geteuid().is_root() { "--allow-run-as-root " } else { "" };
            let place = if task.fits_cores() {
                "--bind-to core"
            } else {
                "--oversubscribe --bind-to none --mca mpi_yield_when_idle 1"
            };
            let eager = "--mca btl_vader_eager_limit 65536 --mca btl_vader_max_send_size 65536";
            let settings = match traffic {
                Traffic::Messages => format!("{eager} --mca btl_vader_single_copy_mechanism none"),
                Traffic::ShortRows => eager.to_owned(),
                Traffic::Rows => String::new(),
            };
            words(&format!("mpirun.openmpi {root}-n {} {place} --mca btl vader,self {settings}", task.ranks))
        };
        jobs(task, place, "openmpi", launch, "")
    }
}

impl Contender for Mpich {
    fn name(&self) -> &'static str {
        "MPICH"
    }

    fn find(&self, place: &Place) -> Result<Option<String>, String> {
        let how = "apt-get install mpich libmpich-dev, then benches/peers/build.sh";
        place.installed("mpirun.mpich", how)?;
        place.built("p2p_mpich", how)?;
        place.built("moe_mpich", how).map(|_| None)
    }

    fn jobs(&self, task: &Task, place: &Place) -> Result<Vec<Job>> {
        let launch = |traffic| {
            // It never yields; through its network layer it spins less than through its shared-memory layer.
            let place = if task.fits_cores() { "-bind-to core" } else { "-genv MPIR_CVAR_NOLOCAL 1" };
            let settings = match traffic {
                Traffic::Messages => "-genv UCX_TLS posix,self -genv UCX_RNDV_THRESH inf",
                Traffic::ShortRows | Traffic::Rows => "-genv UCX_TLS posix,cma,self -genv UCX_RNDV_THRESH 65536",
            };
            words(&format!("mpirun.mpich {place} {settings} -n {}", task.ranks))
        };
        let exchange = if task.fits_cores() { "" } else { "--exchange p2p" };
        jobs(task, place, "mpich", launch, exchange)
    }
}

/// `launch` gives the first words of a command.
fn jobs(
    task: &Task,
    place: &Place,
    build: &str,
    launch: impl Fn(Traffic) -> Vec<String>,
    exchange: &str,
) -> Result<Vec<Job>> {
    let job = |command| Job { ranks: 1, bind: false, command, env: vec![], reads: Reads::JsonLines, typed: None };
    let program = |kind: &str| place.peers.join(format!("{kind}_{build}")).to_string_lossy().into_owned();
    let layout = match task.what {
        What::P2p => {
            let jobs = task.groups().into_iter().map(|group| {
                let mut command = launch(Traffic::Messages);
                command.extend([program("p2p"), "--sizes".to_owned(), list(&group.sizes)]);
                command.extend(common_options(&group, task.verify));
                job(command)
            });
            return Ok(jobs.collect());
        }
        What::InPlace => "rows",
        What::ExpertMajor => "expert-major",
    };
    let jobs = task.groups().into_iter().flat_map(split).map(|(traffic, group)| {
        let mut command = launch(traffic);
        command.push(program("moe"));
        command.extend(words(&format!("--layout {layout} {exchange} --tokens {}", list(&group.sizes))));
        command.extend(place.moe_options());
        command.extend(common_options(&group, task.verify));
        job(command)
    });
    Ok(jobs.collect())
}

/// Short and long ones apart.
fn split(group: Group) -> Vec<(Traffic, Group)> {
    let (short, long): (Vec<usize>, Vec<usize>) = group.sizes.iter().partition(|&&tokens| tokens <= SHORT);
    let of = |sizes| Group { sizes, ..group };
    [(Traffic::ShortRows, of(short)), (Traffic::Rows, of(long))]
        .into_iter()
        .filter(|(_, group)| !group.sizes.is_empty())
        .collect()
}
