//! How the ranks of a communicator find each other and exchange what they need before they share memory.
//!
//! What the bootstrap guarantees:
//!
//! - A rank is let in only if it runs under the same user, knows the job's secret, and agrees with rank 0 on the version,
//!   the world size and every configuration field. Strangers are turned away without harm to the job.
//! - Joining is all or nothing. Where it fails, the ranks that can be told get the *same* error, naming the rank to blame.
//! - The death of a rank during the set-up is noticed by the kernel closing its connection, not by silence.
//! - Every wait ends at the caller's deadline.
//! - Nothing is left behind: sockets live in the abstract namespace and every descriptor closes on exec.
//!
//! [`Launch`] tells from the launcher's environment which rank this process is. [`UniqueId`] names a communicator and
//! holds its secret. [`Star`] joins the ranks through rank 0 and is the channel for blobs and descriptors afterwards.

mod environment;
mod gathering;
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
pub(crate) use message::MAX_WORLD_SIZE;
pub(crate) use rendezvous::Rendezvous;
pub(crate) use star::Star;
pub use unique_id::UniqueId;
