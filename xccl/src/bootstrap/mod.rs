//! How the ranks of a communicator find each other and exchange what they need before they share memory.
//!
//! What the bootstrap guarantees:
//!
//! - A rank is let in only if it knows the job's secret and agrees with rank 0 on the version, the world size and every
//!   configuration field; on one machine, only if it runs under the same user besides. Strangers are turned away without harm
//!   to the job.
//! - Between hosts the secret never travels, both ends prove that they know it, and what they say is encrypted.
//! - The ranks that can hand descriptors to each other are found to be one node; only they get each other's.
//! - Joining is all or nothing. Where it fails, the ranks that can be told get the *same* error, naming the rank to blame.
//! - The death of a rank during the set-up is noticed by the kernel closing its connection, not by silence.
//! - Every wait ends at the caller's deadline.
//! - Nothing is left behind: Unix sockets live in the abstract namespace, rank 0 gives up its port once all have joined, and
//!   every descriptor closes on exec.
//!
//! [`Launch`] tells from the launcher's environment which rank this process is. [`UniqueId`] names a communicator and
//! holds its secret, and the address at which the ranks of several hosts meet ([`Rendezvous`]). [`Star`] joins the ranks
//! through rank 0, over Unix sockets ([`unix`]) on one machine and over TCP ([`tcp`]) otherwise; it is the channel for blobs
//! and descriptors afterwards, and tells of ranks that vanish.

mod environment;
mod gathering;
#[cfg(any(test, fuzzing))]
pub(crate) mod lies;
mod link;
mod message;
mod node;
mod rendezvous;
mod reserved;
mod star;
mod tcp;
#[cfg(test)]
mod tests;
mod unique_id;
mod unix;
mod watch;

pub use environment::Launch;
pub(crate) use link::Limit;
pub(crate) use message::MAX_WORLD_SIZE;
pub(crate) use rendezvous::Rendezvous;
pub(crate) use star::Star;
pub use unique_id::UniqueId;
