//! This library, by `xccl bench p2p` and `xccl bench moe`.

use anyhow::Result;

use super::contender::{Contender, Job, Place, Reads, common_options, list, text, words};
use super::task::{Task, What};

pub const NAME: &str = "XCCL";

pub struct Ours;

impl Contender for Ours {
    fn name(&self) -> &'static str {
        NAME
    }

    fn find(&self, _: &Place) -> Result<Option<String>, String> {
        Ok(Some(env!("CARGO_PKG_VERSION").to_owned()))
    }

    fn jobs(&self, task: &Task, place: &Place) -> Result<Vec<Job>> {
        let job = |command| Job {
            ranks: task.ranks,
            bind: task.fits_cores(),
            command,
            env: vec![],
            reads: Reads::JsonLines,
            typed: None,
        };
        let jobs = task.groups().into_iter().map(|group| {
            let mut command = vec![text(&place.xccl), "bench".to_owned()];
            match task.what {
                What::P2p => command.extend(words(&format!("p2p --sizes {}", list(&group.sizes)))),
                What::InPlace => {
                    command.extend(words(&format!("moe --tokens {} --reduction engine", list(&group.sizes))));
                }
                What::ExpertMajor => {
                    let layout = "--layout expert-major --reduction per-expert --output outbox";
                    command.extend(words(&format!("moe --tokens {} {layout}", list(&group.sizes))));
                }
            }
            if task.what != What::P2p {
                command.extend(place.moe_options());
            }
            command.extend(common_options(&group, task.verify));
            job(command)
        });
        Ok(jobs.collect())
    }
}
