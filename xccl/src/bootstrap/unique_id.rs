//! The name and secret of one communicator.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::ops::Range;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use super::reserved;
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"XCCLUID2";
const TOKEN: Range<usize> = 8..24;
const SECRET: Range<usize> = 24..56;
/// Of the address: 0 where there is none, else 4 or 6.
const FAMILY: usize = 56;
/// Two bytes, the least significant one first, as in all numbers here.
const PORT: Range<usize> = 58..60;
/// Of a link-local IPv6 address.
const SCOPE: Range<usize> = 60..64;
/// An IPv4 address takes the first four bytes.
const IP: Range<usize> = 64..80;
const CHECKSUM: Range<usize> = 80..88;

/// Names a communicator that is about to be built. One rank makes it, and hands it to the others by any means it likes.
///
/// It holds the communicator's secret: who knows it may join; on rank 0's machine, who runs under the same user besides. It
/// is good for one communicator only.
///
/// It may carry the address at which rank 0 waits ([`new_at`](Self::new_at)); then the ranks may live on any hosts that reach
/// it. Without one ([`new`](Self::new)) all ranks live on one machine, and no network is used.
///
/// ```
/// let id = xccl::UniqueId::new()?;
/// let text = id.to_string();
/// assert_eq!(text.parse::<xccl::UniqueId>()?, id);
/// assert_eq!(xccl::UniqueId::from_bytes(id.as_bytes())?, id);
/// # Ok::<(), xccl::Error>(())
/// ```
///
/// Layout: magic (8 bytes), job token (16), secret (32), address (family 1, zero 1, port 2, scope 4, IP 16; zeros where there
/// is none), checksum over these (8), zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; UniqueId::LEN]);

impl UniqueId {
    /// Bytes of an id.
    pub const LEN: usize = 128;

    /// Makes a new id from the system's random numbers, for ranks of one machine.
    ///
    /// # Errors
    /// [`Error::Os`] where the system has no random numbers.
    pub fn new() -> Result<Self> {
        Ok(Self::assemble(&random()?, None))
    }

    /// Makes a new id for ranks on any hosts, whose rank 0 waits for the others at `address`: one of its own host's, IPv4 or
    /// IPv6, which the others reach. The connections are encrypted, and only who knows the id is let in.
    ///
    /// With a port other than 0, any process may make the id; rank 0 takes the port when it joins. Port 0 takes a free port at
    /// once, which [`address`](Self::address) tells: then the process that has made the id must be the one that joins as
    /// rank 0. Until it does, the port stays taken.
    ///
    /// ```
    /// use xccl::{Communicator, Config, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// let id = UniqueId::new_at("127.0.0.1:0".parse().expect("an address"))?;
    /// let other = std::thread::spawn(move || Communicator::init(1, 2, &id, Config::default())?.barrier());
    /// Communicator::init(0, 2, &id, Config::default())?.barrier()?;
    /// # other.join().expect("the other rank ends")
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] for an address that nobody can connect to; with port 0 also [`Error::CannotListen`].
    pub fn new_at(address: SocketAddr) -> Result<Self> {
        let ip = address.ip();
        if ip.is_unspecified() || ip.is_multicast() {
            let expected = "an address of rank 0's host that the other ranks can connect to".to_string();
            return Err(Error::Config { option: "address", value: address.to_string(), expected });
        }
        let random = random()?;
        if address.port() != 0 {
            return Ok(Self::assemble(&random, Some(address)));
        }
        let (listener, address) = reserved::take_a_port(address)?;
        let id = Self::assemble(&random, Some(address));
        reserved::keep(id.token(), listener)?;
        Ok(id)
    }

    /// Where rank 0 waits for the others; nothing where all ranks live on one machine.
    pub fn address(&self) -> Option<SocketAddr> {
        let port = u16::from_le_bytes([self.0[PORT.start], self.0[PORT.start + 1]]);
        let mut ip = [0; 16];
        ip.copy_from_slice(&self.0[IP]);
        match self.0[FAMILY] {
            4 => Some(SocketAddr::from(([ip[0], ip[1], ip[2], ip[3]], port))),
            6 => {
                let mut scope = [0; 4];
                scope.copy_from_slice(&self.0[SCOPE]);
                let scope = u32::from_le_bytes(scope);
                Some(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope).into())
            }
            _ => None,
        }
    }

    /// Makes the id that every rank of `job` derives alike. `sequence` counts the communicators that this process has
    /// made from the job, so that a later one never meets an earlier one.
    pub fn from_job(job: &str, sequence: u64) -> Self {
        let derive = |purpose: &str| {
            let mut hash = Sha256::new();
            // A fixed width before the text: no two (purpose, sequence, job) hash the same bytes.
            hash.update(purpose);
            hash.update(sequence.to_le_bytes());
            hash.update(job);
            hash.finalize()
        };
        let mut derived = [0; SECRET.end - TOKEN.start];
        let (token, secret) = derived.split_at_mut(TOKEN.len());
        token.copy_from_slice(&derive("xccl job token ")[..TOKEN.len()]);
        secret.copy_from_slice(&derive("xccl job secret"));
        Self::assemble(&derived, None)
    }

    /// The id of the communicator in which some of this one's ranks go on (a bit each), in the so manieth attempt. All of them derive
    /// the same; others that have this id could as well.
    pub(crate) fn successor(&self, attempt: u64, members: &[u64], address: Option<SocketAddr>) -> Self {
        let derive = |purpose: &str| {
            let mut hash = Sha256::new();
            hash.update(purpose);
            hash.update(&self.0[TOKEN.start..SECRET.end]);
            hash.update(attempt.to_le_bytes());
            members.iter().for_each(|word| hash.update(word.to_le_bytes()));
            hash.finalize()
        };
        let mut derived = [0; SECRET.end - TOKEN.start];
        let (token, secret) = derived.split_at_mut(TOKEN.len());
        token.copy_from_slice(&derive("xccl next token ")[..TOKEN.len()]);
        secret.copy_from_slice(&derive("xccl next secret"));
        Self::assemble(&derived, address)
    }

    /// The id as bytes, to be handed to other ranks. They hold the secret.
    pub fn as_bytes(&self) -> &[u8; UniqueId::LEN] {
        &self.0
    }

    /// Takes an id that came from [`as_bytes`](Self::as_bytes) of another process, checking that it is whole.
    pub fn from_bytes(bytes: &[u8; UniqueId::LEN]) -> Result<Self> {
        let refuse = |value: String, expected: &str| {
            Err(Error::Config { option: "unique id", value, expected: expected.to_string() })
        };
        if &bytes[..MAGIC.len()] != MAGIC {
            let start = String::from_utf8_lossy(&bytes[..MAGIC.len()]).into_owned();
            return refuse(start, "an id made by UniqueId::new of this version, which starts with XCCLUID2");
        }
        if bytes[CHECKSUM] != checksum(&bytes[..IP.end]) || bytes[CHECKSUM.end..].iter().any(|&b| b != 0) {
            return refuse("XCCLUID2...".to_string(), "all 128 bytes unchanged: its checksum does not match");
        }
        Ok(Self(*bytes))
    }

    fn assemble(token_and_secret: &[u8; SECRET.end - TOKEN.start], address: Option<SocketAddr>) -> Self {
        let mut bytes = [0; Self::LEN];
        bytes[..MAGIC.len()].copy_from_slice(MAGIC);
        bytes[TOKEN.start..SECRET.end].copy_from_slice(token_and_secret);
        if let Some(address) = address {
            bytes[PORT].copy_from_slice(&address.port().to_le_bytes());
            match (address, address.ip().to_canonical()) {
                (_, IpAddr::V4(ip)) => {
                    bytes[FAMILY] = 4;
                    bytes[IP.start..IP.start + 4].copy_from_slice(&ip.octets());
                }
                (address, IpAddr::V6(ip)) => {
                    bytes[FAMILY] = 6;
                    bytes[IP].copy_from_slice(&ip.octets());
                    if let SocketAddr::V6(address) = address {
                        bytes[SCOPE].copy_from_slice(&address.scope_id().to_le_bytes());
                    }
                }
            }
        }
        let sum = checksum(&bytes[..IP.end]);
        bytes[CHECKSUM].copy_from_slice(&sum);
        Self(bytes)
    }

    /// What only the ranks of this communicator know.
    pub(super) fn secret(&self) -> [u8; 32] {
        let mut secret = [0; 32];
        secret.copy_from_slice(&self.0[SECRET]);
        secret
    }

    /// The same id with another secret.
    #[cfg(test)]
    pub(super) fn with_secret(mut self, secret: [u8; 32]) -> Self {
        self.0[SECRET].copy_from_slice(&secret);
        self
    }

    /// What everybody may know of the communicator: it tells its ranks which of the jobs at an address is theirs.
    pub(super) fn token(&self) -> [u8; 16] {
        let mut token = [0; 16];
        token.copy_from_slice(&self.0[TOKEN]);
        token
    }

    /// The name of rank 0's socket in the abstract namespace. Everybody on the machine can list it.
    pub(super) fn socket_name(&self) -> String {
        format!("xccl-{}", hex(&self.0[TOKEN]))
    }
}

fn random() -> Result<[u8; SECRET.end - TOKEN.start]> {
    let mut random = [0; SECRET.end - TOKEN.start];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut random))
        .map_err(|e| Error::os("read(/dev/urandom)", e))?;
    Ok(random)
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM.end - CHECKSUM.start] {
    let mut sum = [0; CHECKSUM.end - CHECKSUM.start];
    let len = sum.len();
    sum.copy_from_slice(&Sha256::digest(bytes)[..len]);
    sum
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The id in 256 hexadecimal digits, secret included.
impl fmt::Display for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

/// Shows the public token only: debug output ends up in logs, where the secret must not be.
impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UniqueId({}, secret hidden)", hex(&self.0[TOKEN]))
    }
}

impl FromStr for UniqueId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let malformed = || Error::Config {
            option: "unique id",
            // Not the text itself, which may hold a secret.
            value: format!("(a text of {} characters)", text.chars().count()),
            expected: "256 hexadecimal digits".to_string(),
        };
        let digits = text.trim().as_bytes();
        if digits.len() != 2 * Self::LEN {
            return Err(malformed());
        }
        let mut bytes = [0; Self::LEN];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|n| u8::try_from(n).ok());
            *byte = match (nibble(pair[0]), nibble(pair[1])) {
                (Some(high), Some(low)) => high << 4 | low,
                _ => return Err(malformed()),
            };
        }
        Self::from_bytes(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_bytes_and_text() {
        let id = UniqueId::new().unwrap();
        assert_eq!(UniqueId::from_bytes(id.as_bytes()).unwrap(), id);
        assert_eq!(id.to_string().to_uppercase().parse::<UniqueId>().unwrap(), id);
        assert_ne!(UniqueId::new().unwrap(), id);
    }

    #[test]
    fn an_id_carries_its_address() {
        for text in ["10.1.2.3:29500", "[2001:db8::1]:1", "[fe80::1%3]:65535", "127.0.0.1:29500"] {
            let address = text.parse().unwrap();
            let id = UniqueId::new_at(address).unwrap();
            assert_eq!(id.to_string().parse::<UniqueId>().unwrap().address(), Some(address));
        }
        let mapped = UniqueId::new_at("[::ffff:10.1.2.3]:5".parse().unwrap()).unwrap();
        assert_eq!(mapped.address(), Some("10.1.2.3:5".parse().unwrap()));
        assert_eq!(UniqueId::new().unwrap().address(), None);
        assert_eq!(UniqueId::from_job("job", 0).address(), None);
        for nowhere in ["0.0.0.0:1", "[::]:0", "224.0.0.1:9"] {
            let error = UniqueId::new_at(nowhere.parse().unwrap()).unwrap_err();
            assert!(matches!(error, Error::Config { option: "address", .. }), "{error}");
        }
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let id = UniqueId::new_at("10.1.2.3:29500".parse().unwrap()).unwrap();
        for at in 0..UniqueId::LEN {
            let mut bytes = *id.as_bytes();
            bytes[at] ^= 1;
            let err = UniqueId::from_bytes(&bytes).unwrap_err();
            assert!(matches!(err, Error::Config { option: "unique id", .. }), "byte {at}: {err}");
        }
    }

    #[test]
    fn text_that_is_no_id_is_refused() {
        let signs = "+1".repeat(UniqueId::LEN);
        for text in ["", "xyz", &"0".repeat(255), &"g".repeat(256), &"é".repeat(128), &"0".repeat(256), &signs] {
            assert!(text.parse::<UniqueId>().is_err(), "{text}");
        }
    }

    #[test]
    fn ranks_of_a_job_derive_the_same_id_and_later_communicators_another() {
        assert_eq!(UniqueId::from_job("job", 0), UniqueId::from_job("job", 0));
        let first = UniqueId::from_job("job", 0);
        for other in [UniqueId::from_job("job", 1), UniqueId::from_job("jobs", 0)] {
            assert_ne!(first.socket_name(), other.socket_name());
            assert_ne!(first.secret(), other.secret());
        }
        assert_eq!(UniqueId::from_bytes(first.as_bytes()).unwrap(), first);
    }

    #[test]
    fn a_successors_id_depends_on_the_old_one_the_attempt_and_the_members() {
        let (id, address) = (UniqueId::new().unwrap(), "10.1.2.3:5".parse().unwrap());
        let next = id.successor(1, &[0b101], Some(address));
        assert_eq!((next, next.address()), (id.successor(1, &[0b101], Some(address)), Some(address)));
        let others = [id.successor(2, &[0b101], None), id.successor(1, &[0b100], None)];
        for other in others.into_iter().chain([UniqueId::new().unwrap().successor(1, &[0b101], None), id]) {
            assert!(other.token() != next.token() && other.secret() != next.secret());
        }
        assert_eq!(UniqueId::from_bytes(next.as_bytes()).unwrap(), next);
    }

    #[test]
    fn debug_output_hides_the_secret() {
        let id = UniqueId::new().unwrap();
        assert!(!format!("{id:?}").contains(&hex(&id.secret())));
    }
}
