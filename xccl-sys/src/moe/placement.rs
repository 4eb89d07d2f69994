//! Which rank holds which expert, how many tokens each got, and better placements.

use std::ffi::c_int;

use xccl::CountForm;
use xccl::placement::{self, Placement};

use super::*;
use crate::boundary::{Failure, Out, Outcome, guard, natural, slice, slice_mut};
use crate::result::xcclResult_t;

/// As the library's own limit.
pub(super) const MOST_SLOTS: usize = 1 << 16;
const MOST_RANKS: usize = 1 << 16;

/** How counts are written. The numbers are fixed. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclCounts_t {
    /// One by one.
    xcclCountsEach = 0,
    /// Each with all before it.
    xcclCountsPrefixSums = 1,
}

fn form_of(form: u32) -> Outcome<CountForm> {
    match form {
        f if f == xcclCounts_t::xcclCountsEach as u32 => Ok(CountForm::Each),
        f if f == xcclCounts_t::xcclCountsPrefixSums as u32 => Ok(CountForm::PrefixSums),
        other => {
            let text = format!("form is {other}: expected xcclCountsEach (0) or xcclCountsPrefixSums (1)");
            Err(Failure::argument(text))
        }
    }
}

/// The experts of `slots` slots of each rank, -1 after a rank's last.
///
/// # Safety
/// `at` is null or has an entry for each slot.
pub(super) unsafe fn placement_of(
    at: *const i32,
    (nranks, slots): (usize, usize),
    experts: usize,
    name: &str,
) -> Outcome<Placement> {
    if !(1..=MOST_SLOTS).contains(&slots) || nranks > MOST_RANKS {
        return Err(Failure::argument(format!("slots is {slots}: expected 1 to {MOST_SLOTS} with {name}")));
    }
    // SAFETY: the caller's promise.
    let all = unsafe { slice(at, nranks * slots, name) }?;
    let mut ranks = Vec::with_capacity(nranks);
    for (rank, row) in all.chunks_exact(slots).enumerate() {
        let used = row.iter().rposition(|&expert| expert != -1).map_or(0, |last| last + 1);
        let expert = |(slot, &expert): (usize, &i32)| {
            let name = format!("{name}[{rank} * slots + {slot}]");
            natural(expert, &name, format_args!("an expert, or -1 after a rank's last"))
        };
        ranks.push(row[..used].iter().enumerate().map(expert).collect::<Outcome<Vec<_>>>()?);
    }
    Ok(Placement::new(experts, ranks)?)
}

/// Goes by another placement from the next exchange on, whose number it writes to *exchange unless that is null. Exchanges under
/// way end by the one that they began with. slot_experts is [nranks, slots], the logical expert in each slot of each rank, -1
/// after a rank's last; the shared expert s is num_experts + s. Every rank must call it with the same placement between the same
/// two dispatches. Where ranks do not agree, receiving the first exchange that they do not agree on is xcclInvalidUsage on every
/// rank, with both values in xcclGetLastError, and no row is taken; they can go on by giving it up and installing the same one.
/// xcclInvalidArgument for one that does not fit the handle; what was in force stays so. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeInstall(
    slot_experts: *const i32,
    slots: usize,
    exchange: *mut xcclExchange_t,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeInstall", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                let out = if exchange.is_null() { None } else { Some(Out::new(exchange, "exchange")?) };
                let (moe, experts) = (held.moe(), held.moe().placement().experts());
                let shape = (moe.placement().ranks(), slots);
                let epoch = moe.install(&placement_of(slot_experts, shape, experts, "slot_experts")?)?;
                out.into_iter().for_each(|out| out.set(epoch));
                Ok(())
            })
        }
    })
}

/// Writes the logical experts in the slots of a rank, by the placement of the next exchange, to experts, which has room for
/// capacity of them, and their number to *num_slots. xcclTruncated when capacity is too small, with *num_slots written. Does not
/// block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeSlotExperts(
    rank: c_int,
    experts: *mut i32,
    capacity: usize,
    num_slots: *mut usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeSlotExperts", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = Out::new(num_slots, "num_slots")?;
            with_held(moe, |held| {
                let there = held.moe().experts_of(natural(rank, "rank", format_args!("a rank"))?)?;
                out.set(there.len());
                if capacity < there.len() {
                    let text = format!(
                        "rank {rank} has {} slots, capacity is {capacity}: call again with more room",
                        there.len()
                    );
                    return Err(Failure::truncated(text));
                }
                let to = slice_mut(experts, there.len(), "experts")?;
                to.iter_mut().zip(there).for_each(|(to, expert)| *to = expert as i32);
                Ok(())
            })
        }
    })
}

/// Writes how many of this rank's tokens have named each routed expert since they were last taken to counts, and begins anew.
/// num_counts is the number of routed experts; form an xcclCounts_t. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeTakeExpertCounts(
    form: u32,
    counts: *mut i64,
    num_counts: usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeTakeExpertCounts", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                let (moe, form) = (held.moe(), form_of(form)?);
                check_count(num_counts, moe.config().experts, "routed experts")?;
                Ok(moe.take_expert_counts(form, slice_mut(counts, num_counts, "counts")?)?)
            })
        }
    })
}

/// Writes how many rows have come for each of this rank's slots since they were last taken to counts, and begins anew. num_counts is
/// the number of slots, as xcclMoeLocalExperts gives it; form an xcclCounts_t. A slot goes on counting when another expert is
/// installed in it: take the counts before. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeTakeSlotCounts(
    form: u32,
    counts: *mut i64,
    num_counts: usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeTakeSlotCounts", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                let (moe, form) = (held.moe(), form_of(form)?);
                check_count(num_counts, held.local()?, "slots of this rank")?;
                Ok(moe.take_slot_counts(form, slice_mut(counts, num_counts, "counts")?)?)
            })
        }
    })
}

/// Before a slice is made of memory that may not be there.
fn check_count(given: usize, expected: usize, unit: &str) -> Outcome {
    match given == expected {
        true => Ok(()),
        false => Err(Failure::argument(format!("num_counts is {given}: expected {expected}, the {unit}"))),
    }
}

/// Makes a placement for num_experts experts with these counts of tokens (of all ranks together), over nranks ranks on these
/// nodes, with at most redundant slots more than experts, spread evenly: the hottest rank gets as few tokens as can be found.
/// previous is null or [nranks, slots], where experts stay as far as that costs nothing. The result is written to slot_experts,
/// [nranks, slots], as xcclMoeInstall takes it; slots is at least (num_experts + redundant) / nranks, rounded up. The same arguments
/// give the same placement on every rank. Does not block; takes milliseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclBalanceExperts(
    counts: *const i64,
    num_experts: usize,
    nodes: *const i32,
    nranks: usize,
    redundant: usize,
    previous: *const i32,
    slots: usize,
    slot_experts: *mut i32,
) -> xcclResult_t {
    guard("xcclBalanceExperts", || {
        for (value, most, name) in [(num_experts, MOST_EXPERTS, "num_experts"), (nranks, MOST_RANKS, "nranks")] {
            if !(1..=most).contains(&value) {
                return Err(Failure::argument(format!("{name} is {value}: expected 1 to {most}")));
            }
        }
        let needed = num_experts.saturating_add(redundant).div_ceil(nranks);
        if !(needed..=MOST_SLOTS).contains(&slots) {
            let text = format!(
                "slots is {slots}: expected {needed} to {MOST_SLOTS}, for {num_experts} experts and {redundant} redundant slots on {nranks} ranks"
            );
            return Err(Failure::argument(text));
        }
        // SAFETY: C's promise about its pointers.
        unsafe {
            let counts = slice(counts, num_experts, "counts")?;
            let node = |(i, &node): (usize, &i32)| natural(node, &format!("nodes[{i}]"), format_args!("a node"));
            let nodes = slice(nodes, nranks, "nodes")?.iter().enumerate().map(node).collect::<Outcome<Vec<_>>>()?;
            let previous = match previous.is_null() {
                true => None,
                false => Some(placement_of(previous, (nranks, slots), num_experts, "previous")?),
            };
            let made = placement::balance(counts, &nodes, redundant, previous.as_ref())?;
            let to = slice_mut(slot_experts, nranks * slots, "slot_experts")?;
            to.fill(-1);
            for (rank, to) in to.chunks_exact_mut(slots).enumerate() {
                to.iter_mut().zip(made.slots(rank)).for_each(|(to, &expert)| *to = expert as i32);
            }
            Ok(())
        }
    })
}
