//! PyTorch's gloo backend, by `moe_gloo.py`.

use anyhow::Result;

use super::contender::{Contender, Job, Place, Reads, common_options, list, text, words};
use super::task::{Group, Task, What};

pub struct Gloo;

impl Contender for Gloo {
    fn name(&self) -> &'static str {
        "PyTorch gloo"
    }

    fn find(&self, place: &Place) -> Result<Option<String>, String> {
        let how = "benches/peers/build.sh --with-torch installs PyTorch there (3 GB to download)";
        place.built("venv/bin/python", how)?;
        place.built("moe_gloo.py", how).map(|_| None)
    }

    fn jobs(&self, task: &Task, place: &Place) -> Result<Vec<Job>> {
        let layout = match task.what {
            What::P2p => return Ok(vec![]),
            What::InPlace => "rows",
            What::ExpertMajor => "expert-major",
        };
        // Importing torch takes longer than the exchanges: one run for all sizes.
        let (iters, warmup) = if task.quick { (3, 1) } else { (10, 2) };
        let group = Group { sizes: task.sizes.clone(), iters, warmup };
        let mut command = vec![text(&place.peers.join("venv/bin/python")), text(&place.peers.join("moe_gloo.py"))];
        command.extend(words(&format!("--layout {layout} --tokens {}", list(&group.sizes))));
        command.extend(place.moe_options());
        command.extend(common_options(&group, task.verify));
        Ok(vec![Job {
            ranks: task.ranks,
            bind: task.fits_cores(),
            command,
            env: vec![("GLOO_SOCKET_IFNAME", "lo".to_owned())],
            reads: Reads::JsonLines,
            typed: None,
        }])
    }

    fn rounds(&self, task: &Task) -> u32 {
        // Eight interpreters on two cores take ten seconds to start.
        if task.ranks > 2 { 1 } else { u32::MAX }
    }
}
