//! What takes part in a comparison.

use std::env;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::task::{Group, Shape, Task};

/// This library or a peer.
pub trait Contender {
    /// As tables and plots name it.
    fn name(&self) -> &'static str;

    /// Its version, where its runs do not tell it; or why it cannot take part, with the way to install it.
    fn find(&self, place: &Place) -> Result<Option<String>, String>;

    /// The runs that measure a task, at the contender's best settings; none where it does not do such a thing.
    fn jobs(&self, task: &Task, place: &Place) -> Result<Vec<Job>>;

    /// Rounds of a session in which it does a task: fewer where it is slow.
    fn rounds(&self, _task: &Task) -> u32 {
        u32::MAX
    }
}

/// One run, started by `xccl run`, which ends it and everything it has started when its time is over.
pub struct Job {
    /// Ranks that `xccl run` starts; 1 where the program has a launcher of its own.
    pub ranks: usize,
    pub bind: bool,
    pub command: Vec<String>,
    pub env: Vec<(&'static str, String)>,
    pub reads: Reads,
    /// As a person would type it, where that is not the command.
    pub typed: Option<String>,
}

/// Where the results are.
#[derive(Clone, Copy, PartialEq)]
pub enum Reads {
    /// One object per line, in the file that `--json` names.
    JsonLines,
    /// The table that `ucx_perftest -f -v -b` prints.
    UcxTable,
}

/// Where things are.
pub struct Place {
    /// This program.
    pub xccl: PathBuf,
    pub peers: PathBuf,
    /// The .npy file of the routing.
    pub routing: PathBuf,
    /// For files that runs need.
    pub out: PathBuf,
    shape: Shape,
}

impl Place {
    pub fn new(peers: Option<PathBuf>, routing: PathBuf, out: &Path, shape: &Shape) -> Result<Self> {
        let xccl = env::current_exe().context("finding this program")?;
        // target/release/xccl and target/peers
        let beside = xccl.parent().and_then(Path::parent).map_or_else(|| PathBuf::from("target"), Path::to_owned);
        let peers = peers.unwrap_or_else(|| short(&beside.join("peers")));
        Ok(Place { xccl, peers, routing, out: out.to_owned(), shape: shape.clone() })
    }

    /// What every program for MoE exchanges is told alike.
    pub fn moe_options(&self) -> Vec<String> {
        let Shape { hidden, topk, experts, .. } = self.shape;
        let mut options = words(&format!("--hidden {hidden} --topk {topk} --experts {experts} --routing"));
        options.push(text(&self.routing));
        options
    }

    /// A program that `build.sh` has built.
    pub fn built(&self, program: &str, how: &str) -> Result<String, String> {
        let path = self.peers.join(program);
        if path.exists() {
            return Ok(text(&path));
        }
        Err(format!("{} is not there; {how}", path.display()))
    }

    /// A program of the system.
    pub fn installed(&self, program: &str, how: &str) -> Result<(), String> {
        let path = env::var_os("PATH").unwrap_or_default();
        if env::split_paths(&path).any(|folder| folder.join(program).is_file()) {
            return Ok(());
        }
        Err(format!("{program} is not installed; {how}"))
    }
}

impl Job {
    /// As a person would type it.
    pub fn shown(&self, place: &Place) -> String {
        if let Some(typed) = &self.typed {
            return typed.clone();
        }
        let mut line = String::new();
        for (name, value) in &self.env {
            let _ = write!(line, "{name}={value} ");
        }
        if self.ranks > 1 {
            let _ = write!(line, "xccl run -n {}{} -- ", self.ranks, if self.bind { " --bind" } else { "" });
        }
        let xccl = text(&place.xccl);
        let words = self.command.iter().map(|word| if *word == xccl { "xccl" } else { word.as_str() });
        line + &words.collect::<Vec<_>>().join(" ")
    }
}

/// Paths below the current folder are shown, and used, without it.
fn short(path: &Path) -> PathBuf {
    let here = env::current_dir().unwrap_or_default();
    path.strip_prefix(here).unwrap_or(path).to_owned()
}

pub fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// `1,2,3`
pub fn list(sizes: &[usize]) -> String {
    sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// The options that our programs and the peers' have in common.
pub fn common_options(group: &Group, verify: bool) -> Vec<String> {
    let mut options =
        vec!["--iters".to_owned(), group.iters.to_string(), "--warmup".to_owned(), group.warmup.to_string()];
    if verify {
        options.push("--verify".to_owned());
    }
    options
}

/// Owned words of a command.
pub fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}
