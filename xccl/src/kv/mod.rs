//! Moving the pages of a KV cache from the ranks that prefill to those that decode.
//!
//! A *receiver* owns a pool of pages in its shared memory; a *sender* copies pages there, layer by layer, as it computes them. All
//! of it is puts and signals into each other's shared memory.
//!
//! # The protocol
//! Between a sender and a receiver there are slots, one per request in flight. Requests are numbered from 1 as they are
//! posted. Words hold numbers of requests, so that none has to be reset: what an earlier request has left in its slot is
//! smaller.
//!
//! | word | in the memory of | written by | says |
//! | --- | --- | --- | --- |
//! | posted | sender | receiver, after number, id and pages of the slot | the last number posted |
//! | cancelled, per slot | sender | receiver | the number that it wants no more |
//! | gone | either | the other | it writes nothing any more, to any slot |
//! | layer, per slot and layer | receiver | sender, after all pages of the layer | the number whose layer is complete |
//! | closed, per slot | receiver | sender, after all it had to write | the number that is over, and how |
//!
//! - *Pages* belong to the request from the post to its end, and nobody else may post them. The sender writes to posted pages
//!   only: it copies the list out and checks it against the pool, then each push against the list.
//! - *The end* of a request is told by the sender alone, by `closed`, for only the sender knows when it has stopped writing. A
//!   receiver that cancels asks for it, and has its pages back when `closed` or `gone` comes, or when the kernel says that the
//!   sender's process has ended.
//! - A slot is posted again only after its end was seen, so `posted`, list and `cancelled` of a slot never tell of two requests
//!   that are in flight.
//!
//! The race that looks possible: the receiver cancels while the sender finishes. Then `closed` says *done*, and the receiver's
//! poll does, too: `cancelled` names a number that is over and is never looked at again.
//!
//! What a rank that has gone may still be sent (a post, a cancel, the answer to one) lands in control memory, which stays
//! allocated as long as the communicator.

mod config;
mod layout;
mod receiver;
mod sender;
mod setup;
mod ticket;

#[cfg(test)]
mod tests;

pub use config::{KvConfig, PageLayout, PagePair};
pub use receiver::{KvEvent, KvOutcome, KvReceiver};
pub use sender::{KvPosted, KvSender, KvSenderEvent};
pub use ticket::KvTicket;
