//! iceoryx2's publish/subscribe, by the project in benches/peers/iceoryx2.

use anyhow::Result;

use super::contender::{Contender, Job, Place, Reads, common_options, list};
use super::task::{Task, What};

pub struct Iceoryx2;

const HOW: &str = "benches/peers/build.sh builds it with cargo";

impl Contender for Iceoryx2 {
    fn name(&self) -> &'static str {
        "iceoryx2"
    }

    fn find(&self, place: &Place) -> Result<Option<String>, String> {
        place.built("p2p_iceoryx2", HOW).map(|_| None)
    }

    fn jobs(&self, task: &Task, place: &Place) -> Result<Vec<Job>> {
        if task.what != What::P2p {
            return Ok(vec![]);
        }
        let program = place.peers.join("p2p_iceoryx2").to_string_lossy().into_owned();
        let jobs = task.groups().into_iter().map(|group| {
            let mut command = vec![program.clone(), "--sizes".to_owned(), list(&group.sizes)];
            command.extend(common_options(&group, task.verify));
            Job { ranks: 2, bind: task.fits_cores(), command, env: vec![], reads: Reads::JsonLines, typed: None }
        });
        Ok(jobs.collect())
    }
}
