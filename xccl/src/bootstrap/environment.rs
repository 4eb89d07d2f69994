//! Which rank this process is, as its launcher's environment tells.

use std::fmt;
use std::os::unix::process::parent_id;

use super::rendezvous::Place;
use crate::error::{Error, Result};

/// What the launcher told this process about its place in the job.
///
/// ```
/// let vars = [("XCCL_RANK", "1"), ("XCCL_WORLD_SIZE", "4"), ("XCCL_JOB", "3f1c")];
/// let lookup = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string());
/// let launch = xccl::Launch::from_lookup(&lookup)?;
/// assert_eq!((launch.rank, launch.world_size, launch.origin), (1, 4, "XCCL_RANK"));
/// # Ok::<(), xccl::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Launch {
    /// This process's rank.
    pub rank: usize,
    /// The number of ranks.
    pub world_size: usize,
    /// This rank's index on its machine, if the launcher tells.
    pub local_rank: Option<usize>,
    /// The number of ranks on this machine, if the launcher tells.
    pub local_world_size: Option<usize>,
    /// A text that all ranks of the job share and no other job has. [`UniqueId::from_job`](crate::UniqueId::from_job)
    /// derives the secret from it.
    pub job: String,
    /// The host (a name or an address) and the port at which rank 0 waits for the others; nothing where all ranks live on
    /// one machine, and need none.
    ///
    /// Ranks live on several machines where their number on this one (or Slurm) says so, or `XCCL_NODE_ID` is set. The place
    /// then comes from `XCCL_MASTER_ADDR` and `XCCL_MASTER_PORT`. What is not set is taken from `MASTER_ADDR`, and from the
    /// port *after* `MASTER_PORT`: that one belongs to PyTorch's own rendezvous. Where the launcher does not tell,
    /// `XCCL_MASTER_ADDR` decides.
    pub rendezvous: Option<(String, u16)>,
    /// The variable by which the launcher was recognised.
    pub origin: &'static str,
}

/// Leaves the job's text out, which may be its secret.
impl fmt::Debug for Launch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launch")
            .field("rank", &self.rank)
            .field("world_size", &self.world_size)
            .field("local_rank", &self.local_rank)
            .field("local_world_size", &self.local_world_size)
            .field("rendezvous", &self.rendezvous)
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

/// The variables of one launcher.
struct Launcher {
    rank: &'static str,
    /// The first that is set counts.
    world_size: &'static [&'static str],
    local_rank: &'static str,
    local_world_size: Option<&'static str>,
    /// The first that is set counts.
    nodes: &'static [&'static str],
    /// Told whether the ranks live on several machines.
    job: fn(&Lookup, bool) -> Result<String>,
}

/// In order of precedence: what was set for us, then what is nearest to the process. torchrun goes before mpirun and srun
/// because those start torchrun, and not the other way round; Slurm is last because mpirun runs inside its jobs.
const LAUNCHERS: [Launcher; 5] = [
    Launcher {
        rank: "XCCL_RANK",
        world_size: &["XCCL_WORLD_SIZE"],
        local_rank: "XCCL_LOCAL_RANK",
        local_world_size: Some("XCCL_LOCAL_WORLD_SIZE"),
        nodes: &[],
        job: |lookup, _| lookup.required(JOB, "a text that all ranks of this job share, and no other job has"),
    },
    Launcher {
        rank: "RANK",
        world_size: &["WORLD_SIZE"],
        local_rank: "LOCAL_RANK",
        local_world_size: Some("LOCAL_WORLD_SIZE"),
        nodes: &[],
        job: torchrun_job,
    },
    Launcher {
        rank: "OMPI_COMM_WORLD_RANK",
        world_size: &["OMPI_COMM_WORLD_SIZE"],
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_world_size: Some("OMPI_COMM_WORLD_LOCAL_SIZE"),
        nodes: &[],
        job: open_mpi_job,
    },
    Launcher {
        rank: "PMI_RANK",
        world_size: &["PMI_SIZE"],
        local_rank: "MPI_LOCALRANKID",
        local_world_size: Some("MPI_LOCALNRANKS"),
        nodes: &[],
        job: hydra_job,
    },
    Launcher {
        // The step's id and not SLURM_PROCID says that srun started us: a batch script has the latter too, and is no rank.
        rank: "SLURM_PROCID",
        world_size: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
        local_rank: "SLURM_LOCALID",
        local_world_size: None,
        nodes: &["SLURM_STEP_NUM_NODES", "SLURM_NNODES"],
        job: slurm_job,
    },
];

const JOB: &str = "XCCL_JOB";
const SLURM_STEP: &str = "SLURM_STEP_ID";
const MASTER_ADDR: &str = "XCCL_MASTER_ADDR";
const MASTER_PORT: &str = "XCCL_MASTER_PORT";

impl Launch {
    /// Reads this process's environment: `XCCL_RANK` and its kin, then torchrun's, Open MPI's, MPICH's (Hydra's) and
    /// Slurm's variables. `XCCL_JOB` alone replaces the job's text of any other launcher.
    pub fn from_env() -> Result<Self> {
        Self::from_lookup(&|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// Where rank 0 waits, if not on this machine alone.
    pub(crate) fn place(&self) -> Option<Place> {
        self.rendezvous.as_ref().map(|(host, port)| Place::new(host, *port))
    }

    /// Does as [`from_env`](Self::from_env) with variables from elsewhere.
    pub fn from_lookup(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let lookup = Lookup(variable);
        if variable("XCCL_RANK").is_none() && variable("XCCL_WORLD_SIZE").is_some() {
            lookup.required("XCCL_RANK", "this process's rank, because XCCL_WORLD_SIZE is set")?;
        }
        match LAUNCHERS.iter().find(|launcher| launcher.started_us(&lookup)) {
            Some(launcher) => launcher.read(&lookup),
            None => {
                let ranks: Vec<_> = LAUNCHERS.iter().map(|launcher| launcher.rank).collect();
                Err(Error::NotLaunched { looked_for: format!("{} with {SLURM_STEP}", ranks.join(", ")) })
            }
        }
    }
}

impl Launcher {
    fn started_us(&self, lookup: &Lookup) -> bool {
        lookup.get(self.rank).is_some() && (self.rank != "SLURM_PROCID" || lookup.get(SLURM_STEP).is_some())
    }

    fn read(&self, lookup: &Lookup) -> Result<Launch> {
        let world_name = self.world_size.iter().find(|name| lookup.get(name).is_some()).unwrap_or(&self.world_size[0]);
        let world_size = lookup.number(world_name, 1, usize::MAX, || "the number of ranks, at least 1".to_string())?;
        let below =
            |name, limit: usize, of: &str| lookup.number(name, 0, limit - 1, || format!("a rank below {of} = {limit}"));
        let rank = below(self.rank, world_size, world_name)?;
        let local_world_size = match self.local_world_size.filter(|name| lookup.get(name).is_some()) {
            Some(name) => Some(lookup.number(name, 1, world_size, || format!("1 to {world_name} = {world_size}"))?),
            None => None,
        };
        let local_rank = match lookup.get(self.local_rank) {
            Some(_) => {
                let of = self.local_world_size.filter(|_| local_world_size.is_some()).unwrap_or(world_name);
                Some(below(self.local_rank, local_world_size.unwrap_or(world_size), of)?)
            }
            None => None,
        };
        let several = self.spans_machines(lookup, world_size, local_world_size)?;
        let job = match lookup.get(JOB) {
            Some(_) => lookup.required(JOB, "a text that all ranks of this job share")?,
            None => (self.job)(lookup, several == Some(true))?,
        };
        let rendezvous = self.rendezvous(lookup, several)?;
        Ok(Launch { rank, world_size, local_rank, local_world_size, job, rendezvous, origin: self.rank })
    }

    /// Whether the ranks live on several machines, if the launcher tells.
    fn spans_machines(
        &self,
        lookup: &Lookup,
        world_size: usize,
        local_world_size: Option<usize>,
    ) -> Result<Option<bool>> {
        if let Some(local) = local_world_size {
            return Ok(Some(local < world_size));
        }
        let Some(name) = self.nodes.iter().find(|name| lookup.get(name).is_some()) else { return Ok(None) };
        Ok(Some(lookup.number(name, 1, usize::MAX, || "the number of nodes, at least 1".to_string())? > 1))
    }

    fn rendezvous(&self, lookup: &Lookup, several: Option<bool>) -> Result<Option<(String, u16)>> {
        let pretends = lookup.get("XCCL_NODE_ID").is_some();
        let host = match lookup.get(MASTER_ADDR) {
            _ if several == Some(false) && !pretends => None,
            None if several == Some(true) || pretends => lookup.get("MASTER_ADDR"),
            host => host,
        };
        let Some(host) = host else {
            if several == Some(true) && !pretends {
                let expected = "the address of rank 0's host, since fewer ranks live on this machine than there are";
                lookup.required(MASTER_ADDR, expected)?;
            }
            return Ok(None);
        };
        if host.trim().is_empty() {
            let expected = "the name or address of rank 0's host".to_string();
            return Err(Error::Config { option: MASTER_ADDR, value: host, expected });
        }
        let port = if lookup.get(MASTER_PORT).is_none() && lookup.get("MASTER_PORT").is_some() {
            lookup.port("MASTER_PORT", u16::MAX - 1)? + 1
        } else {
            lookup.port(MASTER_PORT, u16::MAX)?
        };
        Ok(Some((host.trim().to_string(), port)))
    }
}

/// torchrun's rendezvous has an address of its own, and every restart of the workers a new count.
fn torchrun_job(lookup: &Lookup, _: bool) -> Result<String> {
    let port =
        lookup.required("MASTER_PORT", "the port of torchrun's rendezvous (or set XCCL_JOB), because RANK is set")?;
    Ok(lookup.joined(
        &format!("torchrun port={port}"),
        &["MASTER_ADDR", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"],
    ))
}

/// The job's id, under the name that this version of Open MPI has for it, and the random key that 4.x makes for each job.
fn open_mpi_job(lookup: &Lookup, _: bool) -> Result<String> {
    let ids = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid"];
    if ids.iter().all(|name| lookup.get(name).is_none()) {
        lookup.required(ids[0], "the id of Open MPI's job (or set XCCL_JOB), because OMPI_COMM_WORLD_RANK is set")?;
    }
    Ok(lookup.joined("ompi", &[ids[0], ids[1], ids[2], "OMPI_MCA_orte_precondition_transports"]))
}

/// Hydra gives a job no name of its own. Its port is one where it uses one; otherwise ranks talk to it over an inherited
/// descriptor (PMI_FD) whose number means nothing to the others. What the ranks of one machine share, and two jobs do
/// not, is their parent: the proxy which starts them, and lives as long as they do. A shell between the proxy and the
/// program breaks this unless it replaces itself (`exec`); then XCCL_JOB must be given. So it must on several machines, each
/// of which has a proxy of its own.
fn hydra_job(lookup: &Lookup, several: bool) -> Result<String> {
    if several {
        let expected = "a text that all ranks of this job share, since Hydra gives those of several machines none";
        return lookup.required(JOB, expected);
    }
    Ok(lookup.joined(&format!("hydra parent={}", parent_id()), &["PMI_PORT"]))
}

/// A step's id is unique within its job, and the job's within its cluster.
fn slurm_job(lookup: &Lookup, _: bool) -> Result<String> {
    let job =
        lookup.required("SLURM_JOB_ID", "the id of Slurm's job (or set XCCL_JOB), because SLURM_STEP_ID is set")?;
    Ok(lookup.joined(&format!("slurm job={job}"), &[SLURM_STEP, "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"]))
}

struct Lookup<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Lookup<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    /// The variable's value, which must not be blank.
    fn required(&self, name: &'static str, expected: &str) -> Result<String> {
        match self.get(name) {
            Some(value) if !value.trim().is_empty() => Ok(value.trim().to_string()),
            other => {
                let value = other.unwrap_or_else(|| "(not set)".to_string());
                Err(Error::Config { option: name, value, expected: expected.to_string() })
            }
        }
    }

    fn number(&self, name: &'static str, min: usize, max: usize, expected: impl Fn() -> String) -> Result<usize> {
        let text = self.required(name, &expected())?;
        match text.parse() {
            Ok(number) if (min..=max).contains(&number) => Ok(number),
            _ => Err(Error::Config { option: name, value: text, expected: expected() }),
        }
    }

    fn port(&self, name: &'static str, most: u16) -> Result<u16> {
        let expected = || format!("a port that is free on rank 0's host, 1 to {most}");
        Ok(self.number(name, 1, most.into(), expected)? as u16)
    }

    /// `start`, followed by the variables that are set.
    fn joined(&self, start: &str, names: &[&str]) -> String {
        let set = names.iter().filter_map(|name| Some(format!(" {name}={}", self.get(name)?)));
        std::iter::once(start.to_string()).chain(set).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(vars: &[(&str, &str)]) -> Result<Launch> {
        Launch::from_lookup(&|name| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    const XCCL: [(&str, &str); 5] = [
        ("XCCL_RANK", "1"),
        ("XCCL_WORLD_SIZE", "4"),
        ("XCCL_JOB", "abc"),
        ("XCCL_LOCAL_RANK", "1"),
        ("XCCL_LOCAL_WORLD_SIZE", "4"),
    ];
    const TORCHRUN: [(&str, &str); 8] = [
        ("RANK", "2"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "0"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_RUN_ID", "none"),
        ("TORCHELASTIC_RESTART_COUNT", "0"),
    ];
    const OPEN_MPI: [(&str, &str); 6] = [
        ("OMPI_COMM_WORLD_RANK", "3"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "3"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ("PMIX_NAMESPACE", "1665138689"),
        ("OMPI_MCA_orte_precondition_transports", "1601b30ca5367ea9-ada82fff02154dfa"),
    ];
    const HYDRA: [(&str, &str); 4] =
        [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "2")];
    const SLURM: [(&str, &str); 6] = [
        ("SLURM_PROCID", "5"),
        ("SLURM_NTASKS", "64"),
        ("SLURM_STEP_NUM_TASKS", "8"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_JOB_ID", "77"),
        ("SLURM_STEP_ID", "0"),
    ];

    #[test]
    fn every_launcher_is_recognised() {
        let cases: [(&[(&str, &str)], _); 5] = [
            (&XCCL, (1, 4, Some(1), Some(4), "XCCL_RANK")),
            (&TORCHRUN, (2, 4, Some(0), Some(2), "RANK")),
            (&OPEN_MPI, (3, 4, Some(3), Some(4), "OMPI_COMM_WORLD_RANK")),
            (&HYDRA, (0, 2, Some(0), Some(2), "PMI_RANK")),
            (&SLURM, (5, 8, Some(1), None, "SLURM_PROCID")),
        ];
        for (vars, expected) in cases {
            let l = launch(vars).unwrap();
            assert_eq!((l.rank, l.world_size, l.local_rank, l.local_world_size, l.origin), expected);
            assert!(!l.job.is_empty());
        }
    }

    #[test]
    fn the_nearer_launcher_goes_first() {
        let mut vars = Vec::new();
        let layers: [(&[(&str, &str)], &str); 5] = [
            (&SLURM, "SLURM_PROCID"),
            (&HYDRA, "PMI_RANK"),
            (&OPEN_MPI, "OMPI_COMM_WORLD_RANK"),
            (&TORCHRUN, "RANK"),
            (&XCCL, "XCCL_RANK"),
        ];
        for (layer, origin) in layers {
            vars.extend_from_slice(layer);
            assert_eq!(launch(&vars).unwrap().origin, origin);
        }
    }

    #[test]
    fn jobs_differ_where_launches_differ_and_xccl_job_replaces_them() {
        let with = |base: &[(&str, &str)], name: &str, value: &str| {
            let vars: Vec<_> = base.iter().copied().filter(|(n, _)| *n != name).collect();
            launch(&[&vars[..], &[(name, value)]].concat()).unwrap().job
        };
        assert_ne!(launch(&TORCHRUN).unwrap().job, with(&TORCHRUN, "MASTER_PORT", "29501"));
        assert_ne!(launch(&TORCHRUN).unwrap().job, with(&TORCHRUN, "TORCHELASTIC_RESTART_COUNT", "1"));
        assert_ne!(launch(&OPEN_MPI).unwrap().job, with(&OPEN_MPI, "PMIX_NAMESPACE", "2"));
        assert_ne!(launch(&SLURM).unwrap().job, with(&SLURM, "SLURM_STEP_ID", "1"));
        assert_eq!(launch(&TORCHRUN).unwrap().job, with(&TORCHRUN, "RANK", "1"));
        assert_eq!(with(&HYDRA, "XCCL_JOB", "mine"), "mine");
    }

    #[test]
    fn what_is_missing_or_malformed_is_named() {
        type Case<'a> = (&'a [(&'a str, &'a str)], &'a str, &'a str);
        let cases: [Case; 13] = [
            (&[("XCCL_RANK", "0")], "XCCL_WORLD_SIZE", "(not set)"),
            (&[("XCCL_WORLD_SIZE", "2")], "XCCL_RANK", "(not set)"),
            (&[("XCCL_RANK", "0"), ("XCCL_WORLD_SIZE", "2")], "XCCL_JOB", "(not set)"),
            (&[("XCCL_RANK", "0"), ("XCCL_WORLD_SIZE", "2"), ("XCCL_JOB", " ")], "XCCL_JOB", " "),
            (&[("XCCL_RANK", "2"), ("XCCL_WORLD_SIZE", "2"), ("XCCL_JOB", "j")], "XCCL_RANK", "2"),
            (&[("XCCL_RANK", "-1"), ("XCCL_WORLD_SIZE", "2"), ("XCCL_JOB", "j")], "XCCL_RANK", "-1"),
            (&[("XCCL_RANK", "one"), ("XCCL_WORLD_SIZE", "2"), ("XCCL_JOB", "j")], "XCCL_RANK", "one"),
            (&[("XCCL_RANK", "0"), ("XCCL_WORLD_SIZE", "0"), ("XCCL_JOB", "j")], "XCCL_WORLD_SIZE", "0"),
            (&[("RANK", "0"), ("WORLD_SIZE", "2")], "MASTER_PORT", "(not set)"),
            (&[("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "3")], "LOCAL_WORLD_SIZE", "3"),
            (&[("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "2")], "LOCAL_RANK", "2"),
            (&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")], "PMIX_NAMESPACE", "(not set)"),
            (&[("SLURM_PROCID", "0"), ("SLURM_STEP_ID", "0"), ("SLURM_NTASKS", "x")], "SLURM_NTASKS", "x"),
        ];
        for (vars, name, given) in cases {
            match launch(vars) {
                Err(Error::Config { option, value, .. }) => assert_eq!((option, value.as_str()), (name, given)),
                other => panic!("{vars:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn ranks_on_several_machines_meet_at_the_masters_address() {
        let place = |base: &[(&str, &str)], more: &[(&str, &str)]| {
            let vars: Vec<_> = base.iter().copied().filter(|(n, _)| more.iter().all(|(m, _)| n != m)).collect();
            launch(&[&vars[..], more].concat()).map(|launch| launch.rendezvous)
        };
        let at = |host: &str, port| Some((host.to_string(), port));
        let ours = [("XCCL_MASTER_ADDR", "node0"), ("XCCL_MASTER_PORT", "7000")];
        let torch = [("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500")];
        let here = ("XCCL_LOCAL_WORLD_SIZE", "2");
        let pretends = ("XCCL_NODE_ID", "a");

        // On one machine no network is used, whatever is set for others.
        assert_eq!(place(&XCCL, &[ours[0], ours[1], torch[0], torch[1]]).unwrap(), None);
        assert_eq!(place(&OPEN_MPI, &torch).unwrap(), None);
        // Fewer ranks here than there are; our own variables go first, one by one.
        assert_eq!(place(&XCCL, &[here, ours[0], ours[1]]).unwrap(), at("node0", 7000));
        assert_eq!(place(&XCCL, &[here, ours[0], ours[1], torch[0], torch[1]]).unwrap(), at("node0", 7000));
        assert_eq!(place(&XCCL, &[here, ours[0], torch[0], torch[1]]).unwrap(), at("node0", 29501));
        assert_eq!(place(&XCCL, &[here, ours[1], torch[0]]).unwrap(), at("10.0.0.1", 7000));
        // MASTER_PORT is taken: PyTorch listens there.
        assert_eq!(place(&TORCHRUN, &[]).unwrap(), at("127.0.0.1", 29501));
        // On pretended nodes, an address is used if there is one.
        assert_eq!(place(&XCCL, &[pretends]).unwrap(), None);
        assert_eq!(place(&XCCL, &[pretends, here]).unwrap(), None);
        assert_eq!(place(&XCCL, &[pretends, ours[0], ours[1]]).unwrap(), at("node0", 7000));
        // Slurm tells the nodes of a step, and not the ranks here.
        assert_eq!(place(&SLURM, &torch).unwrap(), None);
        assert_eq!(place(&SLURM, &[ours[0], ours[1]]).unwrap(), at("node0", 7000));
        assert_eq!(place(&SLURM, &[torch[0], torch[1], ("SLURM_STEP_NUM_NODES", "2")]).unwrap(), at("10.0.0.1", 29501));
        assert_eq!(place(&SLURM, &[torch[0], torch[1], ("SLURM_STEP_NUM_NODES", "1")]).unwrap(), None);

        for (vars, name) in [
            (&[here][..], "XCCL_MASTER_ADDR"),
            (&[here, ("XCCL_MASTER_ADDR", " "), ours[1]], "XCCL_MASTER_ADDR"),
            (&[here, ours[0]], "XCCL_MASTER_PORT"),
            (&[here, ours[0], ("XCCL_MASTER_PORT", "65536")], "XCCL_MASTER_PORT"),
            (&[here, ours[0], ("XCCL_MASTER_PORT", "0")], "XCCL_MASTER_PORT"),
            (&[here, torch[0], ("MASTER_PORT", "65535")], "MASTER_PORT"),
        ] {
            match place(&XCCL, vars) {
                Err(Error::Config { option, .. }) => assert_eq!(option, name, "{vars:?}"),
                other => panic!("{vars:?}: {other:?}"),
            }
        }
        // Hydra's proxies, one a machine, share no id.
        let apart = [("MPI_LOCALNRANKS", "1"), ours[0], ours[1]];
        assert!(matches!(place(&HYDRA, &apart), Err(Error::Config { option: "XCCL_JOB", .. })));
        assert_eq!(place(&HYDRA, &[apart[0], ours[0], ours[1], ("XCCL_JOB", "j")]).unwrap(), at("node0", 7000));
    }

    #[test]
    fn without_a_launcher_the_error_lists_what_was_looked_for() {
        // A batch script of Slurm has SLURM_PROCID but is no rank.
        for vars in [&[][..], &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")], &[("XCCL_JOB", "j")]] {
            let err = launch(vars).unwrap_err();
            assert!(matches!(&err, Error::NotLaunched { .. }), "{err}");
            assert!(err.to_string().contains("OMPI_COMM_WORLD_RANK"), "{err}");
        }
    }

    #[test]
    fn debug_output_hides_the_job() {
        assert!(!format!("{:?}", launch(&XCCL).unwrap()).contains("abc"));
    }
}
