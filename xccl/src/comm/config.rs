//! Options: each has a default, a unit and a range, and can be set in code or by environment.

use std::fmt;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::memory::MemoryFlavour;

/// Where an option's value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The built-in default.
    Default,
    /// The environment.
    Environment,
    /// A call of the application.
    Code,
    /// Measured while joining.
    Measured,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Origin::Default => "default",
            Origin::Environment => "environment",
            Origin::Code => "code",
            Origin::Measured => "measured at start",
        })
    }
}

/// One option as `xccl info` shows it.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The environment variable that sets it.
    pub variable: &'static str,
    /// Its value, in the form the variable takes.
    pub value: String,
    /// Where the value comes from.
    pub origin: Origin,
    /// What it means, with its unit.
    pub meaning: &'static str,
}

/// Over TCP on loopback 1 MiB took 341, 290 and 270 us with rings of 128 KiB, 512 KiB and 2 MiB, where a bare put takes 191.
const FAR_RING: usize = 1 << 20;

const TIMEOUT: usize = 0;
const MEMORY: usize = 1;
const HUGE_PAGES: usize = 2;
const HEAP: usize = 3;
const P2P_RING: usize = 4;
const RENDEZVOUS: usize = 5;
const CMA: usize = 6;
const UNEXPECTED: usize = 7;
const KERNELS: usize = 8;
const PROGRESS_THREAD: usize = 9;
const FABRIC: usize = 10;

const OPTIONS: [(&str, &str); 11] = [
    ("XCCL_TIMEOUT", "deadline of every blocking call, in seconds, or \"infinite\""),
    ("XCCL_MEMORY", "where shared segments come from: memfd or posix (/dev/shm)"),
    ("XCCL_HUGE_PAGES", "ask for huge pages: auto or never"),
    ("XCCL_HEAP", "bytes of each rank's symmetric heap (K, M, G suffixes)"),
    (
        "XCCL_P2P_RING",
        "payload bytes of the ring from each rank to each other rank (4K to 1G); 1 MiB by default where there are several nodes",
    ),
    (
        "XCCL_RENDEZVOUS",
        "messages from the heap of at least this many bytes are copied once, by the receiver; if set, private memory too, else measured",
    ),
    ("XCCL_CMA", "read a sender's private memory with process_vm_readv: auto or never"),
    ("XCCL_UNEXPECTED_BYTES", "most bytes of messages kept for receives that have not been posted yet"),
    (
        "XCCL_KERNELS",
        "instruction set that wire formats are encoded with: auto, scalar, avx2, avx512, avx512bf16 or neon",
    ),
    (
        "XCCL_PROGRESS_THREAD",
        "where ranks are on several nodes, a thread per rank moves their traffic on while it computes: auto or never",
    ),
    (
        "XCCL_FABRIC",
        "libfabric's provider between nodes: auto (hardware before tcp), or its name, such as tcp or verbs",
    ),
];

/// The configuration of a communicator. All ranks must use the same, which is checked when they join.
///
/// ```
/// use std::time::Duration;
/// let config = xccl::Config::default().timeout(Some(Duration::from_secs(5))).heap_bytes(1 << 20);
/// let shown = config.settings();
/// assert_eq!((shown[0].variable, shown[0].value.as_str()), ("XCCL_TIMEOUT", "5"));
/// ```
#[derive(Clone, Debug)]
pub struct Config {
    pub(crate) timeout: Option<Duration>,
    pub(crate) memory: MemoryFlavour,
    pub(crate) huge_pages: bool,
    pub(crate) heap_bytes: usize,
    pub(crate) p2p_ring_bytes: usize,
    pub(crate) rendezvous_bytes: usize,
    pub(crate) cma: bool,
    pub(crate) unexpected_bytes: usize,
    pub(crate) kernels: Kernels,
    pub(crate) progress_thread: bool,
    /// The provider between nodes; none: the best there is.
    pub(crate) fabric: Option<String>,
    origins: [Origin; OPTIONS.len()],
    /// From where the counters begin, which otherwise takes years to get there.
    #[cfg(any(test, fuzzing))]
    pub(crate) age: u64,
    /// Nodes and a network that only the tests of this process see.
    #[cfg(any(test, fuzzing))]
    pub(crate) pretence: Option<std::sync::Arc<crate::fabric::pretence::Pretence>>,
}

/// All tests can be run with old counters: `XCCL_TEST_AGE=4294967290 cargo test -p xccl --lib`.
#[cfg(any(test, fuzzing))]
fn age() -> u64 {
    std::env::var("XCCL_TEST_AGE").map_or(0, |age| age.parse().expect("XCCL_TEST_AGE is a number"))
}

impl Default for Config {
    fn default() -> Self {
        Config {
            timeout: Some(Duration::from_secs(60)),
            memory: MemoryFlavour::Memfd,
            huge_pages: true,
            heap_bytes: 16 << 20,
            p2p_ring_bytes: 128 << 10,
            rendezvous_bytes: 32 << 10,
            cma: true,
            unexpected_bytes: 256 << 20,
            kernels: Kernels::Auto,
            progress_thread: true,
            fabric: None,
            origins: [Origin::Default; OPTIONS.len()],
            #[cfg(any(test, fuzzing))]
            age: age(),
            #[cfg(any(test, fuzzing))]
            pretence: None,
        }
    }
}

impl Config {
    /// The defaults, changed by the `XCCL_…` variables that are set.
    ///
    /// # Errors
    /// [`Error::Config`] names a variable whose value cannot be used.
    pub fn from_env() -> Result<Self> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    pub(crate) fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let mut config = Config::default();
        for (option, (name, _)) in OPTIONS.iter().enumerate() {
            if let Some(value) = lookup(name) {
                config.set(option, name, value.trim())?;
                config.origins[option] = Origin::Environment;
            }
        }
        Ok(config)
    }

    fn set(&mut self, option: usize, name: &'static str, value: &str) -> Result<()> {
        let wrong =
            |expected: &str| Error::Config { option: name, value: value.to_owned(), expected: expected.to_owned() };
        let auto = |value: &str| match value {
            "auto" => Ok(true),
            "never" => Ok(false),
            _ => Err(wrong("auto or never")),
        };
        let bytes = |least: usize, most: usize| {
            let expected = format!("a number of bytes from {least} to {most}, such as 64K, 16M or 1G");
            parse_bytes(value).filter(|n| (least..=most).contains(n)).ok_or_else(|| wrong(&expected))
        };
        match option {
            TIMEOUT => {
                let seconds = || value.parse().ok().filter(|s: &f64| *s > 0.0 && *s <= 1e9);
                self.timeout = match value {
                    "infinite" => None,
                    _ => Some(Duration::from_secs_f64(seconds().ok_or_else(|| wrong("seconds above 0, or infinite"))?)),
                };
            }
            MEMORY => {
                self.memory = match value {
                    "memfd" => MemoryFlavour::Memfd,
                    "posix" => MemoryFlavour::Posix,
                    _ => return Err(wrong("memfd or posix")),
                };
            }
            HUGE_PAGES => self.huge_pages = auto(value)?,
            HEAP => self.heap_bytes = bytes(0, 1 << 40)?,
            P2P_RING => self.p2p_ring_bytes = bytes(4 << 10, 1 << 30)?.next_multiple_of(64),
            RENDEZVOUS => self.rendezvous_bytes = bytes(64, 1 << 40)?,
            CMA => self.cma = auto(value)?,
            UNEXPECTED => self.unexpected_bytes = bytes(0, 1 << 40)?,
            PROGRESS_THREAD => self.progress_thread = auto(value)?,
            FABRIC => {
                // Which providers there are is seen only where there are several nodes.
                let name = |value: &str| !value.is_empty() && value.chars().all(|c| c.is_ascii_graphic());
                self.fabric = match value {
                    "auto" => None,
                    _ if name(value) => Some(value.to_owned()),
                    _ => return Err(wrong("auto, or the name of a provider as `xccl info` lists them")),
                };
            }
            _ => {
                self.kernels = value.parse().map_err(|_| wrong("auto, scalar, avx2, avx512, avx512bf16 or neon"))?;
                self.kernels.resolve(name)?;
            }
        }
        Ok(())
    }

    /// Whether it is left to measurements when the receiver reads private memory.
    pub(crate) fn leaves_to_measurement(&self) -> bool {
        self.cma && self.rendezvous_origin() == Origin::Default
    }

    /// The same for ranks of several nodes, where what was left to the default is another one.
    pub(crate) fn between_nodes(mut self) -> Self {
        if self.origins[P2P_RING] == Origin::Default {
            self.p2p_ring_bytes = FAR_RING;
        }
        self
    }

    /// Who has chosen how long a message must be to be copied once.
    pub(crate) fn rendezvous_origin(&self) -> Origin {
        self.origins[RENDEZVOUS]
    }

    fn by_code(mut self, option: usize) -> Self {
        self.origins[option] = Origin::Code;
        self
    }

    /// The deadline of every blocking call; `None` waits for ever. Default: 60 s.
    pub fn timeout(mut self, timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self.by_code(TIMEOUT)
    }

    /// Where shared segments come from. Default: [`MemoryFlavour::Memfd`].
    pub fn memory(mut self, flavour: MemoryFlavour) -> Self {
        self.memory = flavour;
        self.by_code(MEMORY)
    }

    /// Whether to ask for huge pages. Default: yes.
    pub fn huge_pages(mut self, ask: bool) -> Self {
        self.huge_pages = ask;
        self.by_code(HUGE_PAGES)
    }

    /// Bytes of each rank's symmetric heap. Default: 16 MiB; memory is used as it is touched.
    pub fn heap_bytes(mut self, bytes: usize) -> Self {
        self.heap_bytes = bytes;
        self.by_code(HEAP)
    }

    /// Payload bytes of the ring from each rank to each other one; raised to 4 KiB and to whole cache lines. Default:
    /// 128 KiB, or 1 MiB where the ranks are on several nodes.
    pub fn p2p_ring_bytes(mut self, bytes: usize) -> Self {
        self.p2p_ring_bytes = bytes.clamp(4 << 10, 1 << 30).next_multiple_of(64);
        self.by_code(P2P_RING)
    }

    /// Messages of at least this many bytes are copied once, by the receiver, where it can reach them. Default: 32 KiB from the
    /// symmetric heap; from private memory what was measured to be faster ([`Communicator::calibration`](crate::Communicator::calibration)).
    pub fn rendezvous_bytes(mut self, bytes: usize) -> Self {
        self.rendezvous_bytes = bytes.max(64);
        self.by_code(RENDEZVOUS)
    }

    /// Whether to read a sender's private memory with `process_vm_readv` where the kernel permits it. Default: yes.
    pub fn cma(mut self, allow: bool) -> Self {
        self.cma = allow;
        self.by_code(CMA)
    }

    /// Most bytes kept for receives that have not been posted yet. Default: 256 MiB.
    pub fn unexpected_bytes(mut self, bytes: usize) -> Self {
        self.unexpected_bytes = bytes;
        self.by_code(UNEXPECTED)
    }

    /// The instruction set that wire formats are encoded and decoded with. Default: [`Kernels::Auto`]. One that this processor
    /// lacks is an error when the communicator is made; ranks may differ.
    pub fn kernels(mut self, kernels: Kernels) -> Self {
        self.kernels = kernels;
        self.by_code(KERNELS)
    }

    /// Whether, where the ranks are on several nodes, each has a thread that moves their traffic on while it computes or sleeps. It
    /// sleeps itself while there is none. Without it, only calls that wait do, and what other ranks are waiting for stays where
    /// it is while this one computes or sets something up (`split`, a new handle). Default: yes.
    pub fn progress_thread(mut self, start: bool) -> Self {
        self.progress_thread = start;
        self.by_code(PROGRESS_THREAD)
    }

    /// The network provider of libfabric between nodes, such as `tcp` or `verbs`; `None` for the best there is, hardware before
    /// TCP. Default: `None`. [`Communicator::network_providers`](crate::Communicator::network_providers) lists them.
    pub fn fabric(mut self, provider: Option<&str>) -> Self {
        self.fabric = provider.map(str::to_owned);
        self.by_code(FABRIC)
    }

    /// Every option with its value and where that comes from.
    pub fn settings(&self) -> Vec<Setting> {
        let auto = |yes: bool| if yes { "auto" } else { "never" }.to_owned();
        let values: [String; OPTIONS.len()] = [
            self.timeout.map_or("infinite".to_owned(), |t| t.as_secs_f64().to_string()),
            match self.memory {
                MemoryFlavour::Memfd => "memfd".to_owned(),
                MemoryFlavour::Posix => "posix".to_owned(),
            },
            auto(self.huge_pages),
            self.heap_bytes.to_string(),
            self.p2p_ring_bytes.to_string(),
            self.rendezvous_bytes.to_string(),
            auto(self.cma),
            self.unexpected_bytes.to_string(),
            self.kernels.to_string(),
            auto(self.progress_thread),
            self.fabric.clone().unwrap_or_else(|| "auto".to_owned()),
        ];
        let with_values = OPTIONS.iter().zip(values).zip(self.origins);
        with_values
            .map(|((&(variable, meaning), value), origin)| Setting { variable, value, origin, meaning })
            .collect()
    }

    /// What all ranks must agree on: the options that shape shared memory or the protocol.
    pub(crate) fn description(&self) -> Vec<(String, String)> {
        let shared = [MEMORY, HEAP, P2P_RING, CMA, FABRIC].map(|option| OPTIONS[option].0);
        let settings = self.settings().into_iter().filter(|s| shared.contains(&s.variable));
        settings.map(|s| (s.variable.to_owned(), s.value)).collect()
    }
}

/// `64`, `64K`, `64KiB`, `2M`, `1G`: powers of 1024.
fn parse_bytes(text: &str) -> Option<usize> {
    let text = text.trim_end_matches("iB").trim_end_matches('B');
    let (digits, shift) = match text.chars().last()? {
        'k' | 'K' => (&text[..text.len() - 1], 10),
        'm' | 'M' => (&text[..text.len() - 1], 20),
        'g' | 'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.trim().parse::<usize>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &'static str, value: &'static str) -> Result<Config> {
        Config::from_lookup(|n| (n == name).then(|| value.to_owned()))
    }

    #[test]
    fn a_variable_sets_its_option_and_is_named_as_origin() {
        let config = with("XCCL_HEAP", "2M").unwrap();
        assert_eq!(config.heap_bytes, 2 << 20);
        let heap = config.settings().into_iter().find(|s| s.variable == "XCCL_HEAP").unwrap();
        assert_eq!((heap.value.as_str(), heap.origin), ("2097152", Origin::Environment));
        assert_eq!(with("XCCL_TIMEOUT", "infinite").unwrap().timeout, None);
        assert_eq!(with("XCCL_TIMEOUT", "0.5").unwrap().timeout, Some(Duration::from_millis(500)));
    }

    #[test]
    fn a_value_that_cannot_be_used_is_named_with_what_is_expected() {
        for (name, value) in [
            ("XCCL_TIMEOUT", "soon"),
            ("XCCL_TIMEOUT", "-1"),
            ("XCCL_TIMEOUT", "NaN"),
            ("XCCL_MEMORY", "disk"),
            ("XCCL_HEAP", "lots"),
            ("XCCL_HEAP", ""),
            ("XCCL_HEAP", "99999999999999999999G"),
            ("XCCL_P2P_RING", "16"),
            ("XCCL_CMA", "yes"),
            ("XCCL_FABRIC", ""),
            ("XCCL_FABRIC", "tcp over there"),
            ("XCCL_KERNELS", "sse9"),
            // No processor has both.
            ("XCCL_KERNELS", if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" }),
        ] {
            let text = with(name, value).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(&format!("{value:?}")) && text.contains("expected"), "{text}");
        }
    }
}
