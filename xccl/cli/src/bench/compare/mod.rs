//! `xccl bench compare`: this library and its peers, run in turn in one session over the same routing, with a table and a plot.
//!
//! A contender says how its runs are started and read (a file each); the session runs all of them in rounds; the report keeps
//! every sample as JSON, from which table and plots are made again at any time.

mod contender;
mod gloo;
mod iceoryx2;
mod machine;
mod mpi;
mod ours;
#[cfg(feature = "plots")]
mod panel;
#[cfg(feature = "plots")]
mod plots;
mod reading;
mod report;
mod routing;
mod session;
mod table;
mod task;
mod ucx;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use contender::{Contender, Place};
use report::Report;
use session::Session;
use task::{Part, Shape};

use crate::say::say;

/// Runs this library and its peers in turn, and writes compare.json, compare.md and a plot (compare.svg, compare.png).
///
/// Peers are built by benches/peers/build.sh. One that is absent is skipped with the way to install it; one that fails, hangs or
/// was given another routing is reported, and the others go on.
#[derive(Args)]
pub struct CompareArgs {
    /// Rounds; in each, every contender runs once. 0 with --add makes table and plot again from what is there
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=1000))]
    rounds: u32,
    /// What to measure
    #[arg(long, value_enum, value_delimiter = ',', default_value = "p2p,in-place,expert-major,ranks")]
    only: Vec<Part>,
    /// Whom to compare with
    #[arg(long, value_enum, value_delimiter = ',', default_value = "openmpi,mpich,gloo,ucx,iceoryx2")]
    against: Vec<Peer>,
    /// A few small points, for trying it out
    #[arg(long)]
    quick: bool,
    /// Message sizes in bytes
    #[arg(long, value_delimiter = ',')]
    sizes: Option<Vec<usize>>,
    /// Tokens per rank
    #[arg(long, value_delimiter = ',')]
    tokens: Option<Vec<usize>>,
    /// Numbers of ranks; the first one is that of the series over tokens
    #[arg(long, value_delimiter = ',')]
    ranks: Option<Vec<usize>>,
    /// Add to the rounds that DIR/compare.json has, instead of beginning anew
    #[arg(long)]
    add: bool,
    /// Where results go
    #[arg(long, value_name = "DIR", default_value = "target/compare")]
    out: PathBuf,
    /// Where benches/peers/build.sh has put the peers [default: the folder "peers" of this program's target folder]
    #[arg(long, value_name = "DIR")]
    peers: Option<PathBuf>,
    /// Seconds after which a run is ended and reported
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Peer {
    Openmpi,
    Mpich,
    Gloo,
    Ucx,
    Iceoryx2,
}

impl Peer {
    fn contenders(self) -> Vec<Box<dyn Contender>> {
        match self {
            Peer::Openmpi => vec![Box::new(mpi::OpenMpi)],
            Peer::Mpich => vec![Box::new(mpi::Mpich)],
            Peer::Gloo => vec![Box::new(gloo::Gloo)],
            Peer::Ucx => vec![Box::new(ucx::Ucx::Best), Box::new(ucx::Ucx::Cma)],
            Peer::Iceoryx2 => vec![Box::new(iceoryx2::Iceoryx2)],
        }
    }
}

impl CompareArgs {
    pub fn run(self) -> Result<u8> {
        let shape = self.shape();
        shape.check()?;
        fs::create_dir_all(&self.out).with_context(|| format!("creating {:?}", self.out))?;
        let data = self.out.join("compare.json");
        let machine = machine::describe();
        let mut report = if self.add {
            let report = Report::load(&data)?;
            report.can_be_added_to(&machine, &shape, &data)?;
            report
        } else {
            Report::new(machine, &shape)
        };

        let ids = routing::draw(&shape);
        let routing = self.out.join("routing.npy");
        routing::write(&routing, &ids, shape.topk)?;
        let place = Place::new(self.peers.clone(), routing, &self.out, &shape)?;
        let mut session = Session::new(&place, &shape, &ids, self.timeout, &mut report);
        session.admit(Box::new(ours::Ours));
        for contender in self.against.iter().flat_map(|peer| peer.contenders()) {
            session.admit(contender);
        }
        for round in 0..self.rounds {
            session.round(&self.only, round, self.rounds)?;
            // After each one: what was measured is there, however this ends.
            report_to(&data, session.report())?;
        }
        report_to(&data, &report)?;
        ensure!(!report.samples.is_empty(), "nothing was measured: use --rounds 1 or more, or --add to what was");

        let text = table::markdown(&report);
        let file = self.out.join("compare.md");
        fs::write(&file, &text).with_context(|| format!("writing {file:?}"))?;
        self.plot(&report)?;
        say!("{}", text.trim_end());
        let ours_failed = report.failed.iter().any(|f| f.contender == ours::NAME && f.session == report.last_session());
        Ok(u8::from(ours_failed))
    }

    fn shape(&self) -> Shape {
        let mut shape = if self.quick { Shape::quick() } else { Shape::full() };
        shape.sizes = self.sizes.clone().unwrap_or(shape.sizes);
        shape.tokens = self.tokens.clone().unwrap_or(shape.tokens);
        shape.ranks = self.ranks.clone().unwrap_or(shape.ranks);
        shape
    }

    #[cfg(feature = "plots")]
    fn plot(&self, report: &Report) -> Result<()> {
        let panels = panel::panels(report);
        let (svg, png) = (self.out.join("compare.svg"), self.out.join("compare.png"));
        plots::svg(&panels, &svg)?;
        plots::png(&panels, &png)?;
        eprintln!("written: compare.json, compare.md, compare.svg, compare.png in {}", self.out.display());
        Ok(())
    }

    #[cfg(not(feature = "plots"))]
    fn plot(&self, _: &Report) -> Result<()> {
        eprintln!("written: compare.json, compare.md in {}", self.out.display());
        eprintln!(
            "no plot: this program was built without the feature `plots` (cargo build -p xccl-cli --features plots)"
        );
        Ok(())
    }
}

fn report_to(path: &Path, report: &Report) -> Result<()> {
    let text = serde_json::to_string_pretty(report).context("writing down the samples")?;
    fs::write(path, text).with_context(|| format!("writing {path:?}"))
}
