//! Runs the contenders in turn. One that fails or hangs is reported, and the others go on.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use super::contender::{Contender, Job, Place, Reads};
use super::machine;
use super::reading::{Reading, read};
use super::report::{self, Failure, Report, Sample};
use super::routing;
use super::task::{Part, Shape, Task, What};
use crate::bench::figures::show_line;
use crate::run::TIMED_OUT;

pub struct Session<'a> {
    place: &'a Place,
    shape: &'a Shape,
    /// Of the routing.
    ids: &'a [i32],
    timeout: u32,
    contenders: Vec<Box<dyn Contender>>,
    report: &'a mut Report,
    session: usize,
}

impl<'a> Session<'a> {
    pub fn new(place: &'a Place, shape: &'a Shape, ids: &'a [i32], timeout: u32, report: &'a mut Report) -> Self {
        let session = report.sessions.len();
        Session { place, shape, ids, timeout, contenders: vec![], report, session }
    }

    pub fn report(&self) -> &Report {
        self.report
    }

    /// Takes part if it is there.
    pub fn admit(&mut self, contender: Box<dyn Contender>) {
        let name = contender.name().to_owned();
        match contender.find(self.place) {
            Ok(version) => {
                self.report.skipped.remove(&name);
                self.report.versions.extend(version.map(|version| (name, version)));
                self.contenders.push(contender);
            }
            Err(reason) => {
                eprintln!("skipped: {name}: {reason}");
                self.report.skipped.insert(name, reason);
            }
        }
    }

    /// Every contender once for each task. Each round begins with another one, so that none always follows the same.
    pub fn round(&mut self, parts: &[Part], round: u32, rounds: u32) -> Result<()> {
        eprintln!("round {} of {rounds}; line handover {}", round + 1, show_line(machine::line_ns()));
        if self.report.sessions.len() == self.session {
            let began = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            self.report.sessions.push(report::Session { began, rounds: 0 });
        }
        self.report.sessions[self.session].rounds += 1;
        let mut done: Vec<(What, usize, Vec<usize>)> = vec![];
        for task in parts.iter().flat_map(|&part| self.shape.tasks(part, round == 0)) {
            // The series over tokens may have measured it already.
            let covers = |(what, ranks, sizes): &(What, usize, Vec<usize>)| {
                *what == task.what && *ranks == task.ranks && task.sizes.iter().all(|size| sizes.contains(size))
            };
            if done.iter().any(covers) {
                continue;
            }
            for turn in 0..self.contenders.len() {
                let which = (turn + round as usize) % self.contenders.len();
                if round < self.contenders[which].rounds(&task) {
                    self.measure(which, &task, round)?;
                }
            }
            done.push((task.what, task.ranks, task.sizes));
        }
        Ok(())
    }

    fn measure(&mut self, which: usize, task: &Task, round: u32) -> Result<()> {
        let contender = &self.contenders[which];
        let name = contender.name();
        let jobs = contender.jobs(task, self.place)?;
        if jobs.is_empty() {
            return Ok(());
        }
        let begin = Instant::now();
        for job in &jobs {
            let before = machine::line_ns();
            let readings = self.readings(job, task);
            let line_ns = [before, machine::line_ns()];
            match readings {
                Ok(readings) => {
                    let at = report::Moment { session: self.session, round, line_ns };
                    for reading in readings {
                        self.report.samples.push(Sample::new(task.what, task.ranks, name, at, &reading));
                        self.report.versions.extend(reading.version.map(|version| (name.to_owned(), version)));
                    }
                }
                Err(error) => {
                    let (reason, contender) = (format!("{error:#}"), name.to_owned());
                    eprintln!("failed: {name}: {reason}\n  {}", job.shown(self.place));
                    let (what, ranks, session) = (task.what, task.ranks, self.session);
                    self.report.failed.push(Failure { contender, what, ranks, session, round, reason });
                }
            }
        }
        eprintln!("  {:?}, {} ranks: {name}, {:.1} s", task.what, task.ranks, begin.elapsed().as_secs_f64());
        let known = |c: &report::Command| c.contender == name && c.what == task.what && c.ranks == task.ranks;
        if !self.report.commands.iter().any(known) {
            let shown = jobs.iter().map(|job| report::Command {
                contender: name.to_owned(),
                what: task.what,
                ranks: task.ranks,
                command: job.shown(self.place),
            });
            self.report.commands.extend(shown);
        }
        Ok(())
    }

    fn readings(&self, job: &Job, task: &Task) -> Result<Vec<Reading>> {
        let json = self.place.out.join("points.json");
        if job.reads == Reads::JsonLines && json.exists() {
            fs::remove_file(&json).with_context(|| format!("removing {json:?}"))?;
        }
        let out = self.start(job, &json)?;
        ensure!(out.status.success(), "{}", self.complaint(&out));
        let text = match job.reads {
            Reads::JsonLines => fs::read_to_string(&json).context("its results")?,
            Reads::UcxTable => String::from_utf8_lossy(&out.stdout).into_owned(),
        };
        let readings = read(job.reads, &text)?;
        for reading in &readings {
            ensure!(task.sizes.contains(&reading.size), "it measured {}, which was not asked for", reading.size);
            ensure!(reading.verified != Some(false), "at size {} some bytes were wrong", reading.size);
            if task.what != What::P2p {
                let expected = routing::sum(self.ids, self.shape.topk, task.ranks, reading.size);
                let found = reading.routing_sum;
                ensure!(found == Some(expected), "at {} tokens its routing was another one: {found:?}", reading.size);
            }
        }
        Ok(readings)
    }

    /// Under `xccl run`, which ends it with everything it has started, whether it hangs or this process is killed.
    fn start(&self, job: &Job, json: &Path) -> Result<Output> {
        let mut command = Command::new(&self.place.xccl);
        let (timeout, ranks) = (self.timeout.to_string(), job.ranks.to_string());
        command.args(["run", "--no-prefix", "--grace", "2", "--timeout", &timeout, "-n", &ranks]);
        if job.bind {
            command.arg("--bind");
        }
        command.arg("--").args(&job.command);
        if job.reads == Reads::JsonLines {
            command.arg("--json").arg(json);
        }
        command.envs(job.env.iter().map(|(name, value)| (name, value))).stdin(Stdio::null());
        command.output().context("starting it")
    }

    fn complaint(&self, out: &Output) -> String {
        if out.status.code() == Some(i32::from(TIMED_OUT)) {
            return format!("it was ended after {} s", self.timeout);
        }
        let said = String::from_utf8_lossy(&out.stderr);
        let mut said: Vec<&str> =
            said.lines().filter(|l| !l.trim().is_empty() && !l.starts_with("xccl run:")).collect();
        // What comes first is the cause in C, what comes last in Python.
        if said.len() > 6 {
            said.drain(3..said.len() - 3);
        }
        format!("{}: {}", out.status, said.join(" / "))
    }
}
