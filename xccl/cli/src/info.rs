//! `xccl info`.

use anyhow::Result;
use clap::Args;
use xccl::{Communicator, Config, DType, Error, Launch, MoeConfig, UniqueId};

use crate::say::say;

#[derive(Args)]
pub struct InfoArgs {
    /// Ranks to plan memory for
    #[arg(short, long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    n: u32,
    /// Tokens per rank to plan a MoE handle for
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    /// Elements of a token row
    #[arg(long, default_value_t = 7168)]
    hidden: usize,
    /// Experts per token
    #[arg(long, default_value_t = 8)]
    topk: usize,
    /// Experts over all ranks
    #[arg(long, default_value_t = 256)]
    experts: usize,
}

impl InfoArgs {
    pub fn run(self) -> Result<()> {
        let config = Config::from_env()?;
        let ranks = self.n as usize;
        say!("xccl {}", env!("CARGO_PKG_VERSION"));
        say!("cores usable here        {}", std::thread::available_parallelism()?);
        say!("launcher                 {}", launcher());
        // One rank is enough to try what the machine permits.
        let alone = Communicator::init(0, 1, &UniqueId::new()?, config.clone())?;
        let cma = if alone.cma_readable_by(0)? { "permitted" } else { "not permitted (large messages are pipelined)" };
        say!("plane                    shared memory (load and store)");
        say!("process_vm_readv         {cma}");
        print_network(&config);
        print_calibration(&config)?;
        say!("huge pages               {}", huge_pages());
        say!("waiting of {:<14}{}", format!("{ranks} ranks"), Communicator::core_sharing_of(ranks));
        let plan = Communicator::memory_plan(ranks, &config);
        let moe = MoeConfig::new(self.tokens, self.hidden, self.topk, self.experts, DType::BF16);
        say!("\nmemory of each of {ranks} ranks, once every page has been touched");
        say!("  outbox                 {:>14} bytes", plan.outbox_bytes);
        say!("  symmetric heap         {:>14} bytes", plan.heap_bytes);
        say!(
            "  MoE handle             {:>14} bytes (bf16, {} tokens, hidden {}, top-{} of {})",
            moe.outbox_bytes(ranks)?,
            self.tokens,
            self.hidden,
            self.topk,
            self.experts
        );
        say!("\noptions");
        for s in config.settings() {
            say!("  {:<22} {:>12}  ({})  {}", s.variable, s.value, s.origin, s.meaning);
        }
        Ok(())
    }
}

/// Which rank the environment makes of a process, and where it would meet the others.
fn launcher() -> String {
    let launch = match Launch::from_env() {
        Ok(launch) => launch,
        Err(Error::NotLaunched { .. }) => {
            return "none: ranks are started by xccl run, torchrun, mpirun or srun".to_owned();
        }
        Err(why) => return format!("incomplete: {why}"),
    };
    let meet = match &launch.rendezvous {
        Some((host, port)) => format!("meeting at port {port} of {host}"),
        None => "all on this machine".to_owned(),
    };
    format!("rank {} of {} ({}), {meet}", launch.rank, launch.world_size, launch.origin)
}

/// What can carry rows between nodes.
fn print_network(config: &Config) {
    let providers = match Communicator::network_providers(config) {
        Ok(providers) => providers,
        Err(why) => return say!("between nodes            nothing: {why}"),
    };
    let chosen = providers.iter().find(|p| p.chosen);
    say!("between nodes            {}", chosen.map_or("no provider will do", |p| &p.name));
    for p in &providers {
        // Devices matter where something is going to use them.
        say!("  {:<22} {}", p.name, p.passed_over.clone().unwrap_or_else(|| p.devices.join(", ")));
    }
}

/// How long messages from private memory travel: two threads join as ranks 0 and 1 of a job do.
fn print_calibration(config: &Config) -> Result<()> {
    let id = UniqueId::new()?;
    let join = |rank| Communicator::init(rank, 2, &id, config.clone());
    let pair = std::thread::scope(|s| {
        let other = s.spawn(|| join(1));
        let one = join(0);
        (one, other.join())
    });
    let (comm, Ok(_other)) = pair else { anyhow::bail!("a thread that joined a communicator of two panicked") };
    let comm = comm?;
    let calibration = comm.calibration();
    let way = match calibration.private_rendezvous {
        Some(bytes) => format!("through the ring, from {bytes} bytes on read by the receiver"),
        None => "through the ring, whatever their length".to_owned(),
    };
    say!("long private messages    {way}  ({})", calibration.origin);
    for p in &calibration.points {
        say!(
            "  {:>8} bytes         {:.1} us through the ring, {:.1} us read by the receiver",
            p.bytes,
            p.ring_us,
            p.cma_us
        );
    }
    Ok(())
}

/// What the kernel offers for shared memory: its choices, the one in force in brackets.
fn huge_pages() -> String {
    let text = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    match text.split(['[', ']']).nth(1) {
        Some("never" | "deny") => "not offered (/sys/kernel/mm/transparent_hugepage/shmem_enabled)".to_owned(),
        Some(choice) => format!("offered ({choice})"),
        None => "not known to this kernel".to_owned(),
    }
}
