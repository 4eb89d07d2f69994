//! One rank of a test's job: plays the scenario that its argument names. Exit code 0 says that all was as expected.

#[path = "rank/age.rs"]
mod age;
#[path = "rank/collectives.rs"]
mod collectives;
#[path = "rank/hang.rs"]
mod hang;
#[path = "rank/isolation.rs"]
mod isolation;
#[path = "rank/kill.rs"]
mod kill;
#[path = "rank/kv.rs"]
mod kv;
#[path = "rank/liar.rs"]
mod liar;
#[path = "rank/many.rs"]
mod many;
#[path = "rank/misuse.rs"]
mod misuse;
#[path = "rank/mixed.rs"]
mod mixed;
#[path = "rank/moe.rs"]
mod moe;
#[path = "rank/nodes.rs"]
mod nodes;
#[path = "rank/onesided.rs"]
mod onesided;
#[path = "rank/p2p.rs"]
mod p2p;
#[path = "rank/wire.rs"]
mod wire;

use std::time::Duration;

use anyhow::{Result, bail};
use xccl::{Communicator, Config};

fn main() -> Result<()> {
    let scenario = std::env::args().nth(1).unwrap_or_default();
    match scenario.as_str() {
        "few-descriptors" => return age::few_descriptors(),
        "little-address-space" => return age::little_address_space(),
        "full-dev-shm" => return age::full_dev_shm(),
        _ => {}
    }
    let mut config = Config::from_env()?;
    if scenario.starts_with("late") && std::env::var("XCCL_RANK").as_deref() == Ok("1") {
        config = config.timeout(Some(Duration::from_secs(20)));
    }
    many::take_cores(&scenario)?;
    let comm = match Communicator::from_env_with(config) {
        Ok(comm) => comm,
        Err(err) => bail!("{err:?}: {err}"),
    };
    match scenario.as_str() {
        "join" => Ok(comm.barrier()?),
        "many-exchanges" => age::many_exchanges(&comm),
        "many-communicators" => age::many_communicators(&comm),
        "forked" => age::forked(&comm),
        "moe" => moe::moe_in_every_form(&comm),
        "in-flight" => moe::two_exchanges_in_flight(&comm),
        "joined" => moe::the_joined_calls(&comm),
        "reuse" => moe::one_routing_serves_many_exchanges(&comm),
        "later-first" => moe::the_later_exchange_is_combined_first(&comm),
        "refused" => misuse::refused(&comm),
        "refused-rows" => misuse::refused_rows(&comm),
        "abandoned" => misuse::an_abandoned_batch_is_told(&comm),
        "both-abandoned" => misuse::both_abandoned(&comm),
        "rows-lent-out" => misuse::rows_lent_out(&comm),
        "large-handle" => misuse::a_handle_without_room_is_told(&comm),
        "wire" => wire::every_format_in_every_form(&comm),
        "wire-refused" => wire::refused(&comm),
        "late" => misuse::a_late_rank_is_described(&comm),
        "staggered" => misuse::ranks_that_come_one_by_one(&comm),
        "late-dispatch" => misuse::late_dispatch(&comm),
        "messages" => p2p::messages(&comm),
        "mixed" => mixed::mixed_job(&comm),
        "mixed-sizes" => p2p::mixed_sizes(&comm),
        "heap" => p2p::from_the_heap(&comm),
        "withdrawn" => p2p::given_up_by_the_sender(&comm),
        "truncated" => p2p::truncated(&comm),
        "given-up" => p2p::given_up(&comm),
        "many-posted" => p2p::many_posted(&comm),
        "split" => p2p::split(&comm),
        "across-nodes" => nodes::across_nodes(&comm),
        "cut-off" => nodes::cut_off(&comm),
        "under-a-cut" => nodes::under_a_cut(&comm),
        "nothing-stays" => nodes::nothing_stays(&comm),
        "collectives" => collectives::every_collective(&comm),
        die if die.starts_with("die-apart-") => kill::die_apart(&comm, die),
        "collective-mismatch" => collectives::mismatch(&comm),
        die if die.starts_with("collective-die-") => collectives::die(&comm, die),
        "hang-cycle" => hang::cycle(&comm),
        "hang-mismatch" => hang::mismatch(&comm),
        "hang-straggler" => hang::straggler(&comm),
        "paused" => hang::paused(&comm),
        "aborted-while-paused" => hang::aborted_while_paused(&comm),
        "overwrites-itself" => liar::overwrites_itself(&comm),
        "isolation" => isolation::outboxes_stay_their_owners(&comm),
        "idle" => many::idle(&comm),
        "crowd" => many::crowd(&comm),
        "one-core" => many::one_core(&comm),
        "own-cores" => many::own_cores(&comm),
        "put" => onesided::puts_and_signals(&comm),
        kv if kv.starts_with("kv-") => kv::transfer(&comm, kv),
        "die-of-it" => kill::die_of_it(&comm),
        die if die.starts_with("die-") => kill::die(&comm, die),
        shrink if shrink.starts_with("shrink-") => kill::shrink(&comm, shrink),
        told if told.starts_with("told-") => kill::told(&comm, told),
        other => bail!("unknown scenario {other:?}"),
    }
}
