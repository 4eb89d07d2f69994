//! UCX, by its own `ucx_perftest`: tag matching over shared memory. It has no check of the bytes.

use std::fmt::Write;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;

use anyhow::{Context, Result};

use super::contender::{Contender, Job, Place, Reads, text};
use super::task::{Task, What};

pub enum Ucx {
    /// Two copies through shared memory, of any size: what is fastest where memory has small pages, as its test program's has.
    Best,
    /// Single copies of long messages, by `process_vm_readv`: its default choice on one machine.
    Cma,
}

impl Ucx {
    fn settings(&self) -> Vec<(&'static str, String)> {
        match self {
            Ucx::Best => vec![("UCX_TLS", "posix".to_owned()), ("UCX_RNDV_THRESH", "inf".to_owned())],
            Ucx::Cma => vec![("UCX_TLS", "posix,cma".to_owned())],
        }
    }
}

const HOW: &str = "apt-get install ucx-utils";

impl Contender for Ucx {
    fn name(&self) -> &'static str {
        match self {
            Ucx::Best => "UCX",
            Ucx::Cma => "UCX, CMA",
        }
    }

    fn find(&self, place: &Place) -> Result<Option<String>, String> {
        place.installed("ucx_perftest", HOW)?;
        let told = Command::new("ucx_info").arg("-v").output().map(|out| out.stdout).unwrap_or_default();
        Ok(version(&String::from_utf8_lossy(&told)))
    }

    fn jobs(&self, task: &Task, place: &Place) -> Result<Vec<Job>> {
        if task.what != What::P2p {
            return Ok(vec![]);
        }
        let file = place.out.join("ucx.txt");
        let mut tests = String::new();
        for group in task.groups() {
            // A batch of ours is ten round trips; theirs counts one by one.
            let (iters, warmup) = (group.iters * 10, group.warmup * 10);
            for bytes in group.sizes {
                writeln!(tests, "{bytes} -t tag_lat -s {bytes} -n {iters} -w {warmup}")?;
            }
        }
        fs::write(&file, tests).with_context(|| format!("writing {file:?}"))?;
        let port = free_port()?;
        let file = text(&file);
        let server = format!("ucx_perftest -p {port} -b {file}");
        let client = format!("ucx_perftest 127.0.0.1 -p {port} -f -v -b {file}");
        // The client may be first: it comes again until it is let in.
        let script = format!(
            "if [ \"$XCCL_RANK\" = 0 ]; then exec {server} >/dev/null; fi; \
             n=0; until {client}; do n=$((n+1)); [ $n -lt 50 ] || exit 1; sleep 0.1; done"
        );
        let env = self.settings();
        let settings: String = env.iter().map(|(name, value)| format!("{name}={value} ")).collect();
        let typed = format!("{settings}{server} & {settings}{client}");
        Ok(vec![Job {
            ranks: 2,
            bind: task.fits_cores(),
            command: vec!["sh".to_owned(), "-c".to_owned(), script],
            env,
            reads: Reads::UcxTable,
            typed: Some(typed),
        }])
    }
}

/// `# Version 1.13.1` or, in later ones, `# Library version: 1.15.0`.
fn version(told: &str) -> Option<String> {
    let line = told.lines().find(|line| line.to_lowercase().contains("version"))?;
    line.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit())).map(str::to_owned)
}

fn free_port() -> Result<u16> {
    let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
    Ok(bound.context("looking for a free port")?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_old_and_new_releases() {
        assert_eq!(version("# Version 1.13.1\n# Git branch ''\n").as_deref(), Some("1.13.1"));
        assert_eq!(version("# Library version: 1.15.0\n# Library path: /usr/lib\n").as_deref(), Some("1.15.0"));
        assert_eq!(version(""), None);
    }
}
