//! Operations that all ranks of a communicator make together.

use crate::comm::Communicator;
use crate::error::Result;

impl Communicator {
    /// Returns when every rank has called it. What any rank wrote before its call is visible after it.
    ///
    /// # Errors
    /// [`Error::Timeout`](crate::Error::Timeout) names a rank that has not come, [`Error::PeerDied`](crate::Error::PeerDied)
    /// and [`Error::PeerLeft`](crate::Error::PeerLeft) one that will not.
    pub fn barrier(&self) -> Result<()> {
        self.inner.barrier()
    }
}
