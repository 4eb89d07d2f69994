//! Where the ranks live: all on this machine, on nodes that are pretended, or on several hosts with a launcher on each.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, setsockopt, socket, sockopt};

/// The hosts of a job that has a launcher on each.
#[derive(Args)]
pub struct RealHosts {
    /// Number of hosts, each of which runs this command with its own --node-rank
    #[arg(long, value_name = "K", requires_all = ["node_rank", "master"], conflicts_with = "nodes",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    nnodes: Option<u32>,
    /// Which of the hosts this one is, from 0 on
    #[arg(long, value_name = "R", requires = "nnodes")]
    node_rank: Option<u32>,
    /// Name or address of host 0, where rank 0 waits, and a free port of it
    #[arg(long, value_name = "ADDR:PORT", requires = "nnodes")]
    master: Option<String>,
    /// A text that all hosts give, and no other job; others on this machine can read it, unlike XCCL_JOB, which it replaces
    #[arg(long, value_name = "TEXT", requires = "nnodes")]
    job: Option<String>,
}

impl RealHosts {
    pub fn nodes(self) -> Result<Nodes> {
        let (Some(of), Some(this), Some(master)) = (self.nnodes, self.node_rank, self.master) else {
            return Ok(Nodes::One);
        };
        ensure!(this < of, "--node-rank {this} does not exist: with --nnodes {of} the hosts are 0 to {}", of - 1);
        let job = match self.job.or_else(|| std::env::var("XCCL_JOB").ok()) {
            Some(job) if !job.trim().is_empty() => job,
            _ => bail!(
                "several hosts need a job text: set XCCL_JOB to the same on each of them, hard to guess and for this job \
                 alone (or give --job)"
            ),
        };
        Ok(Nodes::Real { this: this as usize, of: of as usize, master: address_and_port(&master)?, job })
    }
}

fn address_and_port(master: &str) -> Result<(String, u16)> {
    let split = master.rsplit_once(':').filter(|(host, _)| !host.is_empty());
    let port = split.and_then(|(_, port)| port.parse().ok()).filter(|&port: &u16| port > 0);
    // Without brackets, who could tell an IPv6 address's end from a port.
    match split.zip(port) {
        Some(((host, _), port)) if !host.contains(':') || (host.starts_with('[') && host.ends_with(']')) => {
            Ok((host.to_owned(), port))
        }
        _ => bail!(
            "--master {master} is not usable: expected a name or an address, and a port from 1 to 65535, such as \
             node0:29500, 10.0.0.1:29500 or [2001:db8::1]:29500"
        ),
    }
}

/// Where the ranks live.
pub enum Nodes {
    /// All on this machine.
    One,
    /// On this machine, as if it were so many.
    Pretended(usize),
    /// As many on each host.
    Real {
        /// This host's number.
        this: usize,
        /// The number of hosts.
        of: usize,
        /// Where rank 0 waits.
        master: (String, u16),
        /// What the hosts' launchers have in common.
        job: String,
    },
}

impl Nodes {
    pub fn pretended(nodes: usize, ranks: usize) -> Result<Nodes> {
        ensure!(nodes <= ranks, "{ranks} ranks cannot live on {nodes} nodes: give at most as many nodes as ranks");
        Ok(Nodes::Pretended(nodes))
    }

    /// The rank of the first of the `ranks` that this launcher starts.
    pub fn first_rank(&self, ranks: usize) -> usize {
        match self {
            Nodes::Real { this, .. } => this * ranks,
            _ => 0,
        }
    }
}

/// What the ranks are told of the nodes.
pub struct Hosts<'a> {
    nodes: &'a Nodes,
    job: &'a str,
    port: Option<Port>,
}

impl<'a> Hosts<'a> {
    /// `launch` names the job unless several launchers share one.
    pub fn new(nodes: &'a Nodes, launch: &'a str) -> Result<Hosts<'a>> {
        let job = match nodes {
            Nodes::Real { job, .. } => job,
            _ => launch,
        };
        let port = match nodes {
            Nodes::Pretended(_) => Some(Port::reserve()?),
            _ => None,
        };
        Ok(Hosts { nodes, job, port })
    }

    /// Tells the `index`-th rank of the `ranks` that this launcher starts, by its environment.
    pub fn tell(&self, command: &mut Command, index: usize, ranks: usize) {
        let mut world = ranks;
        let (mut local_rank, mut local_world) = (index, ranks);
        match self.nodes {
            // What this launcher may itself be told: its ranks are on one node all the same.
            Nodes::One => _ = command.env_remove("XCCL_NODE_ID"),
            Nodes::Pretended(nodes) => {
                let block = Block::of(index, ranks, *nodes);
                (local_rank, local_world) = (index - block.first, block.ranks);
                command.env("XCCL_NODE_ID", block.node.to_string());
                command.env("XCCL_MASTER_ADDR", Ipv4Addr::LOCALHOST.to_string());
                command.envs(self.port.iter().map(|port| ("XCCL_MASTER_PORT", port.number.to_string())));
            }
            Nodes::Real { of, master: (host, port), .. } => {
                world = of * ranks;
                command.env("XCCL_MASTER_ADDR", host).env("XCCL_MASTER_PORT", port.to_string());
            }
        }
        command
            .env("XCCL_JOB", self.job)
            .env("XCCL_RANK", (self.nodes.first_rank(ranks) + index).to_string())
            .env("XCCL_WORLD_SIZE", world.to_string())
            .env("XCCL_LOCAL_RANK", local_rank.to_string())
            .env("XCCL_LOCAL_WORLD_SIZE", local_world.to_string());
    }
}

/// The ranks of one pretended node: a block of them. The first nodes have one more where they cannot have as many each.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    node: usize,
    first: usize,
    ranks: usize,
}

impl Block {
    /// The one that has `rank`.
    fn of(rank: usize, ranks: usize, nodes: usize) -> Block {
        let (each, more) = (ranks / nodes, ranks % nodes);
        let in_larger = more * (each + 1);
        let (node, ranks) =
            if rank < in_larger { (rank / (each + 1), each + 1) } else { (more + (rank - in_larger) / each, each) };
        Block { node, first: node * each + node.min(more), ranks }
    }
}

/// A free port, which nobody else is given as long as this lives.
struct Port {
    number: u16,
    /// Bound, and not listening: rank 0 may still take the port, as both allow its reuse (SO_REUSEADDR).
    _socket: OwnedFd,
}

impl Port {
    fn reserve() -> Result<Port> {
        let reserve = || {
            let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            let anywhere = SockaddrIn::new(127, 0, 0, 1, 0);
            bind(socket.as_raw_fd(), &anywhere)?;
            let number = getsockname::<SockaddrIn>(socket.as_raw_fd())?.port();
            nix::Result::Ok(Port { number, _socket: socket })
        };
        reserve().context("looking for a free port on the loopback interface")
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use super::*;

    #[test]
    fn ranks_live_on_nodes_in_blocks_that_differ_by_one_at_most() {
        for (ranks, nodes) in [(4, 2), (5, 2), (7, 3), (3, 3), (8, 1), (10, 4)] {
            let blocks: Vec<Block> = (0..ranks).map(|rank| Block::of(rank, ranks, nodes)).collect();
            let mut next = 0;
            for node in 0..nodes {
                let block = &blocks[next];
                assert_eq!((block.node, block.first), (node, next), "{ranks} ranks on {nodes} nodes");
                assert!([ranks / nodes, ranks.div_ceil(nodes)].contains(&block.ranks));
                assert!(blocks[next..next + block.ranks].iter().all(|other| other == block));
                next += block.ranks;
            }
            assert_eq!(next, ranks);
        }
    }

    #[test]
    fn a_reserved_port_is_rank_0s_to_take() {
        let port = Port::reserve().unwrap();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.number));
        TcpListener::bind(address).unwrap();
        assert!((0..64).all(|_| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap() != address));
    }

    #[test]
    fn a_master_is_a_host_and_a_port() {
        let split = |text: &str| address_and_port(text).ok();
        for (text, host) in
            [("node0:29500", "node0"), ("10.0.0.1:29500", "10.0.0.1"), ("[2001:db8::1]:29500", "[2001:db8::1]")]
        {
            assert_eq!(split(text), Some((host.to_owned(), 29500)));
        }
        for text in ["node0", ":29500", "node0:0", "node0:65536", "node0:x", "2001:db8::1:29500", ""] {
            assert_eq!(split(text), None, "{text}");
        }
    }
}
