//! What can go wrong, with the facts that a caller needs to act on it.

use std::io;
use std::time::Duration;

use crate::dtype::DType;
use crate::sync::Operation;

/// The result of every fallible call of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that a call of this crate can report.
///
/// Each variant carries the value that was wrong, the limit it met, and the ranks involved; its text says what to do.
///
/// ```
/// let err = xccl::Error::TooManyTokens { given: 4096, limit: 1024 };
/// assert!(err.to_string().contains("4096"));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration value is malformed or out of range.
    #[error("{option} = {value:?} is not usable: expected {expected}")]
    Config {
        /// The option: the environment variable's name, or the field's.
        option: &'static str,
        /// The value that was given.
        value: String,
        /// What would have been accepted.
        expected: String,
    },

    /// No launcher's environment says which rank this process is.
    #[error(
        "no launcher environment found (looked for {looked_for}): start the program with `xccl run -n N -- program`, \
         torchrun, mpirun or srun, or set XCCL_RANK, XCCL_WORLD_SIZE and XCCL_JOB"
    )]
    NotLaunched {
        /// The variables that were looked for.
        looked_for: String,
    },

    /// A rank lies outside the communicator.
    #[error("rank {rank} does not exist: the communicator has {world_size} ranks, 0 to {}", .world_size.saturating_sub(1))]
    InvalidRank {
        /// The rank that was given.
        rank: usize,
        /// The number of ranks.
        world_size: usize,
    },

    /// Some ranks did not join the communicator in time.
    #[error(
        "rank(s) {ranks:?} of {world_size} did not join within {waited:?}{turned_away}: check that they were started, with \
         the same job id (on this machine, unless rank 0 has an address), and that none of them failed"
    )]
    MissingRanks {
        /// The ranks that are missing.
        ranks: Vec<usize>,
        /// The number of ranks expected.
        world_size: usize,
        /// How long the others waited.
        waited: Duration,
        /// Who came meanwhile and was refused, and why; empty where nobody was.
        turned_away: String,
    },

    /// Two processes claim the same rank.
    #[error(
        "rank {rank} was claimed twice, by process {first_pid} and by process {second_pid}: give each process its own rank"
    )]
    DuplicateRank {
        /// The rank in question.
        rank: usize,
        /// The process that claimed it first.
        first_pid: u32,
        /// The process that claimed it too.
        second_pid: u32,
    },

    /// A rank's version, world size or configuration differs from rank 0's.
    #[error("rank {rank} has {what} = {theirs}, rank 0 has {ours}: start every rank with the same {what}")]
    Mismatch {
        /// The rank that differs.
        rank: usize,
        /// What differs.
        what: String,
        /// That rank's value.
        theirs: String,
        /// Rank 0's value.
        ours: String,
    },

    /// Rank 0, which collects the others, cannot be reached.
    #[error(
        "rank 0 could not be reached within {waited:?}: check that it was started on this machine with the same job id"
    )]
    RootUnreachable {
        /// How long was tried.
        waited: Duration,
    },

    /// Rank 0's address, where the ranks of several hosts meet, cannot be reached.
    #[error(
        "rank 0 could not be reached at {tried} within {waited:?} ({last}): check that rank 0 was started, that this is an \
         address of its host (XCCL_MASTER_ADDR, XCCL_MASTER_PORT), that its job id is the same, and that no firewall is between"
    )]
    HostUnreachable {
        /// The addresses that were tried.
        tried: String,
        /// How long was tried.
        waited: Duration,
        /// What the last attempt ended with.
        last: String,
    },

    /// Rank 0 cannot wait for the other ranks at the address that it was given.
    #[error("rank 0 cannot wait for the others at {address}: {source}; {}", after_refusal_to_listen(.source))]
    CannotListen {
        /// The address.
        address: String,
        /// The reason.
        source: io::Error,
    },

    /// A process is not allowed to join the job.
    #[error("joining the job was refused: {why}")]
    Refused {
        /// What was wrong with the request.
        why: String,
    },

    /// Two ranks lost touch, or misunderstood each other, while a communicator was being set up.
    #[error("setting up the communicator failed while {during}: {source}")]
    Bootstrap {
        /// The step that failed.
        during: &'static str,
        /// The reason.
        source: io::Error,
    },

    /// A rank of another node cannot be reached any more: its process or its node has ended, or the link is down.
    #[error(
        "rank {rank}, on another node, could not be reached while this rank was in {during} (epoch {epoch}): {why}. Check its \
         process and the link; go on without it (shrink), or destroy this communicator"
    )]
    PeerUnreachable {
        /// The rank.
        rank: usize,
        /// What this rank was doing.
        during: Operation,
        /// The epoch, or the tag for point to point.
        epoch: u64,
        /// What the network says.
        why: String,
    },

    /// A rank's process has ended without leaving the communicator.
    #[error(
        "rank {rank} died while this rank was in {during} (epoch {epoch}): go on without it (shrink), or destroy this communicator"
    )]
    PeerDied {
        /// The rank that died.
        rank: usize,
        /// What this rank was doing.
        during: Operation,
        /// The epoch (or the tag, for point to point) of that operation.
        epoch: u64,
    },

    /// A rank has left the communicator while this one still waited for it.
    #[error(
        "rank {rank} left the communicator while this rank waited for it in {during} (epoch {epoch}): both must agree on the number of calls"
    )]
    PeerLeft {
        /// The rank that left.
        rank: usize,
        /// What this rank was doing.
        during: Operation,
        /// The epoch (or the tag, for point to point) of that operation.
        epoch: u64,
    },

    /// The communicator was aborted.
    #[error(
        "the communicator was aborted by rank {by}{} while this rank was in {during}: destroy it, or go on with those that are left (shrink)",
        in_brackets(*.code, .why)
    )]
    Aborted {
        /// The rank that aborted it.
        by: usize,
        /// What this rank was doing.
        during: Operation,
        /// The number that it gave; 0 where it gave none.
        code: i32,
        /// Its reason; empty where it gave none.
        why: String,
    },

    /// The deadline passed.
    #[error(
        "{during} (epoch {epoch}) did not finish within {waited:?}: {waited_for}; {}; raise XCCL_TIMEOUT if this is expected",
        after_timeout(.during)
    )]
    Timeout {
        /// What this rank was doing.
        during: Operation,
        /// The epoch (or the tag, for point to point) of that operation.
        epoch: u64,
        /// The rank that was waited for, if it was one.
        peer: Option<usize>,
        /// How long was waited.
        waited: Duration,
        /// Who was waited for and what that rank was last seen doing.
        waited_for: String,
    },

    /// The machine has too little memory for the configuration.
    #[error(
        "{what} needs {needed} bytes on this machine, {available} are available: lower the sizes in the configuration, or the number of ranks"
    )]
    NotEnoughMemory {
        /// What the memory is for.
        what: &'static str,
        /// Bytes needed by all ranks of this machine.
        needed: u64,
        /// Bytes available.
        available: u64,
    },

    /// The symmetric heap has no room left.
    #[error(
        "the symmetric heap has no free block of {requested} bytes (largest: {largest_free} of {total}): raise XCCL_HEAP"
    )]
    HeapExhausted {
        /// Bytes asked for.
        requested: usize,
        /// The largest free block.
        largest_free: usize,
        /// The heap's size.
        total: usize,
    },

    /// A piece of a rank's heap is not shared memory.
    #[error(
        "{bytes} bytes at {offset} of rank {rank}'s heap are not shared memory, which is there from {from} to {to}: name a piece of what that rank has allocated with shared_alloc"
    )]
    NotShared {
        /// The rank.
        rank: usize,
        /// Where the piece begins.
        offset: usize,
        /// Its bytes.
        bytes: usize,
        /// Where the rank's shared memory begins.
        from: usize,
        /// Where it ends.
        to: usize,
    },

    /// A piece of shared memory cannot be a word.
    #[error(
        "a piece of {bytes} bytes at {offset} of rank {rank}'s heap holds no word: words are 8 bytes at a multiple of 8"
    )]
    NoWord {
        /// The rank.
        rank: usize,
        /// Where the piece begins.
        offset: usize,
        /// Its bytes.
        bytes: usize,
    },

    /// A KV request was cancelled by one of its two ranks.
    #[error("the KV request {id} with rank {rank} was cancelled: the receiver's pages are free once its poll says so")]
    KvCancelled {
        /// The other rank.
        rank: usize,
        /// The request's id.
        id: u64,
    },

    /// A page cannot be posted, or pushed to.
    #[error("page {page} of KV request {id} with rank {rank} {why}")]
    KvPage {
        /// The other rank.
        rank: usize,
        /// The request's id.
        id: u64,
        /// The page.
        page: u32,
        /// What is wrong with it, and what to do.
        why: &'static str,
    },

    /// A rank has no part in the KV transfer, or the other one.
    #[error("rank {rank} is no KV {expected}: pages go from senders to receivers")]
    KvRole {
        /// The rank.
        rank: usize,
        /// What it should be.
        expected: &'static str,
    },

    /// A system call failed.
    #[error("{call} failed: {source}")]
    Os {
        /// The call.
        call: &'static str,
        /// The reason.
        source: io::Error,
    },

    /// The network library is missing or too old.
    #[error(
        "libfabric, which connects nodes, cannot be used: {why}; install it (Debian's package is libfabric1), name its directory in LD_LIBRARY_PATH, or keep all ranks on one node; XCCL_FABRIC names the provider of it that is used"
    )]
    FabricLibrary {
        /// What was wrong.
        why: String,
    },

    /// No network provider will do, or not the one that was asked for.
    #[error("XCCL_FABRIC = {wanted:?} finds no network provider that can be used: {why}")]
    FabricProvider {
        /// The provider that was asked for, or "auto".
        wanted: String,
        /// What it lacks, and which ones would do.
        why: String,
    },

    /// A call of the network library failed.
    #[error("{call} failed on the network provider {provider}: {why}")]
    Fabric {
        /// The provider.
        provider: String,
        /// The call.
        call: &'static str,
        /// The reason, as libfabric tells it.
        why: String,
    },

    /// A message is longer than the buffer it was to be received in. It is still there: receive it with a larger one.
    #[error(
        "the message of {len} bytes from rank {from} (tag {tag}) does not fit the buffer of {capacity} bytes: it was kept, receive it with a larger buffer"
    )]
    Truncated {
        /// The sender.
        from: usize,
        /// The message's tag.
        tag: u32,
        /// The message's length in bytes.
        len: usize,
        /// The buffer's length in bytes.
        capacity: usize,
    },

    /// The sender of a message gave it up before it was received: its deadline passed, or it cancelled the request.
    #[error(
        "rank {rank} gave up sending its message with tag {tag} before it was received here: receive again, once it has sent another one"
    )]
    Withdrawn {
        /// The sender.
        rank: usize,
        /// The message's tag.
        tag: u32,
    },

    /// Messages that nobody receives fill the receiver's memory.
    #[error(
        "{held} bytes of messages wait unreceived at this rank (limit {limit}), the oldest from rank {from} with tag {tag}: receive it, or raise XCCL_UNEXPECTED_BYTES"
    )]
    UnexpectedFull {
        /// Bytes held.
        held: usize,
        /// The limit.
        limit: usize,
        /// The sender of the oldest message.
        from: usize,
        /// Its tag.
        tag: u32,
    },

    /// More tokens than the handle was made for.
    #[error("{given} tokens were given, the limit is {limit}: raise MoeConfig::max_tokens or send fewer")]
    TooManyTokens {
        /// The number given.
        given: usize,
        /// `max_tokens` of the configuration.
        limit: usize,
    },

    /// An expert id is outside the range of experts.
    #[error("token {token} names expert {expert} in its choice {k}: experts are 0 to {}, and -1 for none", .experts.saturating_sub(1))]
    ExpertOutOfRange {
        /// The token's index.
        token: usize,
        /// The index within the token's top-k.
        k: usize,
        /// The id that was given.
        expert: i64,
        /// The number of experts.
        experts: usize,
    },

    /// A token names the same expert twice.
    #[error(
        "token {token} names expert {expert} twice (again in its choice {k}): the experts of one token must differ"
    )]
    DuplicateExpert {
        /// The token's index.
        token: usize,
        /// The index of the second mention within the token's top-k.
        k: usize,
        /// The expert.
        expert: i64,
    },

    /// A buffer has the wrong number of elements.
    #[error("{what} has {given} elements, expected {expected}")]
    Shape {
        /// Which buffer.
        what: &'static str,
        /// Its number of elements.
        given: usize,
        /// The number it should have.
        expected: String,
    },

    /// A buffer's element type is not the handle's.
    #[error("{what} holds {given} elements, this handle was made for {expected}")]
    DTypeMismatch {
        /// Which buffer.
        what: &'static str,
        /// Its element type.
        given: DType,
        /// The handle's.
        expected: DType,
    },

    /// A call that does not go with the form in which the handle's rows travel.
    #[error("{call} cannot be used where rows travel as {wire}: {expected}")]
    Wire {
        /// The call.
        call: &'static str,
        /// The wire format's name.
        wire: String,
        /// What to do.
        expected: &'static str,
    },

    /// Two exchanges are in flight already.
    #[error(
        "{limit} exchanges are in flight, a further one would overwrite the oldest (epoch {oldest}): finish it with combine_recv first"
    )]
    TooManyInFlight {
        /// How many may be in flight.
        limit: usize,
        /// The oldest one's epoch.
        oldest: u64,
    },

    /// The halves of an exchange were called in a wrong order.
    #[error("{call} was called at the wrong time in exchange {epoch}: {expected}")]
    WrongOrder {
        /// The call.
        call: &'static str,
        /// The exchange.
        epoch: u64,
        /// What should have been called.
        expected: &'static str,
    },

    /// Another rank's input to this exchange was refused, so it has sent nothing yet.
    #[error(
        "rank {rank} has not sent its tokens of exchange {epoch}: its input was refused there; once it sends a correct one this call may be repeated"
    )]
    PeerRefused {
        /// The rank whose input was refused.
        rank: usize,
        /// The exchange.
        epoch: u64,
    },

    /// Another rank gave an exchange up after taking tokens for it.
    #[error("rank {rank} gave up exchange {epoch} before combining: its experts' outputs will not come")]
    PeerAbandoned {
        /// The rank that gave up.
        rank: usize,
        /// The exchange.
        epoch: u64,
    },

    /// An expert has more rows than the padded layout holds.
    #[error("local expert {expert} has {rows} rows, the padded layout holds {capacity}: pass a larger capacity")]
    CapacityExceeded {
        /// The local expert's index.
        expert: usize,
        /// Its number of rows.
        rows: usize,
        /// The capacity that was given.
        capacity: usize,
    },

    /// More rows arrived for this rank's experts than the handle has room for.
    #[error(
        "{rows} rows arrived for this rank's experts in exchange {epoch}, there is room for {limit}: raise MoeConfig::max_expert_rows on every rank"
    )]
    TooManyExpertRows {
        /// Rows that arrived so far.
        rows: usize,
        /// The limit.
        limit: usize,
        /// The exchange.
        epoch: u64,
    },

    /// Two ranks make different collective calls, so that none can go on.
    #[error(
        "rank {rank} calls {theirs} where rank {other} calls {others} (collective {epoch}): every rank has to make the same calls in the same order; build another communicator"
    )]
    CallMismatch {
        /// The number of the call, counted from 1 on every rank.
        epoch: u64,
        /// One of the two ranks.
        rank: usize,
        /// Its call, with what it asks for.
        theirs: String,
        /// The other rank.
        other: usize,
        /// Its call.
        others: String,
    },

    /// A rank has given a collective up before it was over.
    #[error("rank {rank} gave up {during} (collective {epoch}): build another communicator")]
    GivenUp {
        /// The rank that gave up.
        rank: usize,
        /// The collective that it gave up.
        during: Operation,
        /// Its number, counted from 1 on every rank.
        epoch: u64,
    },

    /// The other ranks go on without this one.
    #[error(
        "the other ranks have gone on in {during} without this one, which they could not reach: end this process, or join them anew"
    )]
    LeftOut {
        /// In which call.
        during: Operation,
    },

    /// A peer's memory holds a value that cannot be.
    #[error(
        "rank {rank}'s memory holds {what} = {value}, the limit is {limit}: that process is broken or runs another version"
    )]
    Corrupt {
        /// The rank.
        rank: usize,
        /// What was read.
        what: &'static str,
        /// The value.
        value: u64,
        /// What it should not exceed.
        limit: u64,
    },

    /// A rank makes the handle of another role than the configuration gives it.
    #[error(
        "rank {rank} makes a handle for {claimed}, RoleConfig names it as {configured}: make the handle of its role"
    )]
    RoleMismatch {
        /// The rank.
        rank: usize,
        /// The role whose handle it makes.
        claimed: String,
        /// Its role.
        configured: String,
    },

    /// A rank is named twice where attention and experts are apart.
    #[error("rank {rank} is named as {first} and as {second}: each rank has one role")]
    RoleConflict {
        /// The rank.
        rank: usize,
        /// The role that was named first.
        first: String,
        /// The one that was named too.
        second: String,
    },

    /// A rank has no role where attention and experts are apart.
    #[error(
        "rank {rank} of {world_size} has no role: name it in RoleConfig::attention or RoleConfig::experts, or split the communicator"
    )]
    NoRole {
        /// The rank.
        rank: usize,
        /// The number of ranks.
        world_size: usize,
    },

    /// An expert is placed on a rank that holds none.
    #[error(
        "expert {expert} is placed on rank {rank}, which is {role}: experts belong on the ranks of RoleConfig::experts"
    )]
    ExpertWithoutRole {
        /// The expert.
        expert: usize,
        /// The rank.
        rank: usize,
        /// That rank's role.
        role: String,
    },

    /// This process was forked from the one that has joined the communicator.
    #[error(
        "this process was forked from process {joined}, which has joined the communicator and alone may use it: let the child join one of its own, or start another program"
    )]
    Forked {
        /// The process that has joined.
        joined: u32,
    },

    /// Two ranks go by different placements of experts in an exchange.
    #[error(
        "rank {rank} has sent exchange {epoch} by {theirs}, this rank by {ours}: give the exchange up, and install the same placement on every rank between the same two dispatches"
    )]
    PlacementMismatch {
        /// The other rank.
        rank: usize,
        /// The exchange.
        epoch: u64,
        /// Its placement: a hash, and since which exchange it goes by it.
        theirs: String,
        /// This rank's.
        ours: String,
    },
}

/// What a deadline leaves of a call.
fn after_timeout(during: &Operation) -> &'static str {
    match during {
        Operation::Init | Operation::Setup | Operation::Shrink => "what was being set up is given up on every rank",
        Operation::Send => "a request can be waited for again, a blocking send has given its message up",
        Operation::CombineRecv | Operation::E2aRecv => "the exchange is given up",
        collective if collective.is_collective() => {
            "a request can be waited for again, a blocking call has given up this communicator's collectives"
        }
        _ => "nothing was lost, the call may be repeated",
    }
}

/// What an aborting rank said.
fn in_brackets(code: i32, why: &str) -> String {
    match (code, why) {
        (0, "") => String::new(),
        (0, why) => format!(" ({why})"),
        (code, "") => format!(" (code {code})"),
        (code, why) => format!(" (code {code}: {why})"),
    }
}

/// What to do where an address cannot be listened at.
fn after_refusal_to_listen(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => "choose another XCCL_MASTER_PORT, or make the id with another address",
        io::ErrorKind::AddrNotAvailable => {
            "that is no address of this host: XCCL_MASTER_ADDR, or the id's address, must be one of the host that rank 0 runs on"
        }
        io::ErrorKind::PermissionDenied => "choose a port from 1024 on",
        _ => "check XCCL_MASTER_ADDR, or the id's address",
    }
}

impl Error {
    /// Wraps the last error of a system call.
    pub(crate) fn os(call: &'static str, source: impl Into<io::Error>) -> Self {
        Error::Os { call, source: source.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadlines_text_says_what_is_left_of_the_call() {
        let text = |during| {
            let (peer, waited, waited_for) = (Some(3), Duration::from_secs(2), "rank 3 sleeps".to_owned());
            Error::Timeout { during, epoch: 7, peer, waited, waited_for }.to_string()
        };
        let recv = text(Operation::DispatchRecv);
        for part in ["dispatch_recv (epoch 7)", "2s", "rank 3 sleeps", "may be repeated", "XCCL_TIMEOUT"] {
            assert!(recv.contains(part), "{part:?} is not in {recv:?}");
        }
        for (during, says) in [(Operation::CombineRecv, "is given up"), (Operation::Send, "has given its message up")] {
            let text = text(during);
            assert!(text.contains(says) && !text.contains("repeated"), "{text}");
        }
    }
}
