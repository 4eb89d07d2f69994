//! Naming memory of another rank.

/// A piece of a rank's shared memory, by numbers that mean the same on every rank: it may be sent in a message. What it names
/// is checked when it is used.
///
/// ```
/// let piece = xccl::Remote { rank: 1, offset: 8192, bytes: 100 };
/// assert_eq!(piece.skip(64), xccl::Remote { rank: 1, offset: 8256, bytes: 36 });
/// assert_eq!(xccl::Remote::from_bytes(&piece.to_bytes()), piece);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Remote {
    /// The rank.
    pub rank: usize,
    /// Where the piece begins, in bytes from the beginning of the rank's symmetric heap.
    pub offset: usize,
    /// Its bytes.
    pub bytes: usize,
}

impl Remote {
    /// Without its first `bytes`: empty when it has no more.
    pub fn skip(self, bytes: usize) -> Self {
        let skipped = bytes.min(self.bytes);
        Remote { offset: self.offset.saturating_add(skipped), bytes: self.bytes - skipped, ..self }
    }

    /// Its first `bytes`, or all of it when it has no more.
    pub fn first(self, bytes: usize) -> Self {
        Remote { bytes: bytes.min(self.bytes), ..self }
    }

    /// The piece at the same place of another rank: ranks that allocate the same shared blocks in the same order have
    /// them at the same offsets.
    pub fn of(self, rank: usize) -> Self {
        Remote { rank, ..self }
    }

    /// For a message.
    pub fn to_bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        for (to, value) in bytes.chunks_exact_mut(8).zip([self.rank, self.offset, self.bytes]) {
            to.copy_from_slice(&(value as u64).to_le_bytes());
        }
        bytes
    }

    /// From a message.
    pub fn from_bytes(bytes: &[u8; 24]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        let word = |i: usize| u64::from_le_bytes(words[i]) as usize;
        Remote { rank: word(0), offset: word(1), bytes: word(2) }
    }
}
