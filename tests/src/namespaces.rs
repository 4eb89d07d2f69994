//! Network namespaces that stand for hosts: each has an interface of its own, and a bridge joins them.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::unistd::Uid;

/// Which addresses the hosts have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// IPv4 and IPv6.
    Both,
    /// IPv6 alone, on the loopback interface too.
    V6,
}

/// Some hosts. Removed when this is dropped; processes started in them must have ended.
pub struct Namespaces {
    /// The bridge's and then the hosts'.
    names: Vec<String>,
    families: Families,
}

/// Starts the name of each, before the process that has made it.
const PREFIX: &str = "xccl-";

impl Namespaces {
    /// Makes `hosts` of them. Prints why where this is not possible: the test is then to be skipped.
    pub fn new(hosts: usize, families: Families) -> Option<Namespaces> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        if !Uid::effective().is_root() {
            eprintln!("skipped: only root can make network namespaces");
            return None;
        }
        remove_leftovers();
        let stem = format!("{PREFIX}{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let names = std::iter::once("sw".to_owned()).chain((0..hosts).map(|host| host.to_string()));
        // From here on, what was made is removed again.
        let made = Namespaces { names: names.map(|name| format!("{stem}-{name}")).collect(), families };
        match made.make() {
            Ok(()) => Some(made),
            Err(why) => {
                eprintln!("skipped: {why}");
                None
            }
        }
    }

    fn make(&self) -> Result<(), String> {
        let (switch, hosts) = self.names.split_first().expect("the bridge's");
        // One batch makes the namespaces, one fills the bridge's, and one each host's.
        ip(&[], &self.names.iter().map(|name| format!("netns add {name}")).collect::<Vec<_>>())?;
        let mut lines = vec!["link add br0 type bridge".to_owned(), "link set br0 up".to_owned()];
        for (host, name) in hosts.iter().enumerate() {
            lines.push(format!("link add p{host} type veth peer name eth0 netns {name}"));
            lines.push(format!("link set p{host} master br0 up"));
        }
        ip(&["-n", switch], &lines)?;
        for (host, name) in hosts.iter().enumerate() {
            let mut lines = vec!["link set lo up".to_owned(), "link set eth0 up".to_owned()];
            match self.families {
                Families::Both => lines.push(format!("addr add {}/24 dev eth0", self.v4(host))),
                Families::V6 => lines.push("addr del 127.0.0.1/8 dev lo".to_owned()),
            }
            // Nobody else can have it: no need to wait until that is found out.
            lines.push(format!("addr add {}/64 dev eth0 nodad", self.v6(host)));
            ip(&["-n", name], &lines)?;
        }
        Ok(())
    }

    fn v4(&self, host: usize) -> IpAddr {
        IpAddr::from([10, 73, 0, host as u8 + 1])
    }

    fn v6(&self, host: usize) -> IpAddr {
        IpAddr::from([0xfd73, 0, 0, 0, 0, 0, 0, host as u16 + 1])
    }

    /// The host's address: IPv4 where it has one.
    pub fn address(&self, host: usize) -> IpAddr {
        match self.families {
            Families::Both => self.v4(host),
            Families::V6 => self.v6(host),
        }
    }

    /// A command that runs a program on that host, as its own process.
    pub fn command(&self, host: usize, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[host + 1], program]);
        command
    }

    /// Cuts the host off from the others, or joins it to them again: at the bridge, so that the host itself is told nothing.
    pub fn link(&self, host: usize, up: bool) {
        let state = if up { "up" } else { "down" };
        ip(&["-n", &self.names[0]], &[format!("link set p{host} {state}")]).expect("a link changes its state");
    }

    /// Delays and loses what goes to the host, as `tc netem` is told; says why where that is not possible.
    ///
    /// # Errors
    /// What `tc` says.
    pub fn impair(&self, host: usize, how: &str) -> Result<(), String> {
        let mut command = Command::new("ip");
        let device = format!("p{host}");
        command.args(["netns", "exec", &self.names[0], "tc", "qdisc", "add", "dev", &device, "root", "netem"]);
        let output = command.args(how.split(' ')).output().map_err(|err| format!("ip: {err}"))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        }
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        self.names.iter().for_each(|name| delete(name));
    }
}

fn delete(name: &str) {
    // One that was not made is not there to be removed.
    let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
}

/// Runs `ip` with those options once for all lines.
fn ip(options: &[&str], lines: &[String]) -> Result<(), String> {
    let mut command = Command::new("ip");
    command.args(options).args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child =
        command.spawn().map_err(|err| format!("ip cannot be run (Debian: apt-get install iproute2): {err}"))?;
    let mut input = String::new();
    lines.iter().for_each(|line| _ = writeln!(input, "{line}"));
    if let Some(mut to) = child.stdin.take() {
        // One that has ended early says why below.
        let _ = to.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(|err| format!("ip: {err}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("no network namespaces: ip: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Removes what tests have left that were killed.
fn remove_leftovers() {
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
        let maker = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if maker.is_some_and(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists()) {
            delete(&name);
        }
    }
}
