//! The name and secret of one communicator.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"XCCLUID1";
const TOKEN: Range<usize> = 8..24;
const SECRET: Range<usize> = 24..56;
const CHECKSUM: Range<usize> = 56..64;

/// Names a communicator that is about to be built. One rank makes it, and hands it to the others by any means it likes.
///
/// It holds the communicator's secret: who knows it, and runs under the same user, may join. It is good for one
/// communicator only.
///
/// ```
/// let id = xccl::UniqueId::new()?;
/// let text = id.to_string();
/// assert_eq!(text.parse::<xccl::UniqueId>()?, id);
/// assert_eq!(xccl::UniqueId::from_bytes(id.as_bytes())?, id);
/// # Ok::<(), xccl::Error>(())
/// ```
///
/// Layout: magic (8 bytes), job token (16), secret (32), checksum over these (8), zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; UniqueId::LEN]);

impl UniqueId {
    /// Bytes of an id.
    pub const LEN: usize = 128;

    /// Makes a new id from the system's random numbers.
    pub fn new() -> Result<Self> {
        let mut random = [0; SECRET.end - TOKEN.start];
        File::open("/dev/urandom")
            .and_then(|mut source| source.read_exact(&mut random))
            .map_err(|e| Error::os("read(/dev/urandom)", e))?;
        Ok(Self::assemble(&random))
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
        Self::assemble(&derived)
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
            return refuse(start, "an id made by UniqueId::new, which starts with XCCLUID1");
        }
        if bytes[CHECKSUM] != checksum(&bytes[..SECRET.end]) || bytes[CHECKSUM.end..].iter().any(|&b| b != 0) {
            return refuse("XCCLUID1...".to_string(), "all 128 bytes unchanged: its checksum does not match");
        }
        Ok(Self(*bytes))
    }

    fn assemble(token_and_secret: &[u8; SECRET.end - TOKEN.start]) -> Self {
        let mut bytes = [0; Self::LEN];
        bytes[..MAGIC.len()].copy_from_slice(MAGIC);
        bytes[TOKEN.start..SECRET.end].copy_from_slice(token_and_secret);
        let sum = checksum(&bytes[..SECRET.end]);
        bytes[CHECKSUM].copy_from_slice(&sum);
        Self(bytes)
    }

    /// What only the ranks of this communicator know.
    pub(super) fn secret(&self) -> [u8; 32] {
        let mut secret = [0; 32];
        secret.copy_from_slice(&self.0[SECRET]);
        secret
    }

    /// The name of rank 0's socket in the abstract namespace. Everybody on the machine can list it.
    pub(super) fn socket_name(&self) -> String {
        format!("xccl-{}", hex(&self.0[TOKEN]))
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM.end - CHECKSUM.start] {
    let mut sum = [0; CHECKSUM.end - CHECKSUM.start];
    let len = sum.len();
    sum.copy_from_slice(&Sha256::digest(bytes)[..len]);
    sum
}

fn hex(bytes: &[u8]) -> String {
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
    fn any_changed_byte_is_noticed() {
        let id = UniqueId::new().unwrap();
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
    fn debug_output_hides_the_secret() {
        let id = UniqueId::new().unwrap();
        assert!(!format!("{id:?}").contains(&hex(&id.secret())));
    }
}
