//! Lies of another rank, each kind by its name:
//!
//! ```sh
//! XCCL_LIES=messages cargo +nightly fuzz run lies -- -runs=1000000
//! ```
//!
//! Without a name all kinds take turns, as the first byte says. `xccl/src/lies` has the targets and their names.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use xccl::lies::{TARGETS, Target};

static CHOSEN: LazyLock<Option<Target>> = LazyLock::new(|| {
    let name = std::env::var("XCCL_LIES").ok()?;
    let found = TARGETS.iter().find(|(other, _)| *other == name);
    let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
    Some(found.unwrap_or_else(|| panic!("XCCL_LIES={name}: the targets are {names:?}")).1)
});

fuzz_target!(|bytes: &[u8]| match (*CHOSEN, bytes.split_first()) {
    (Some(target), _) => target(bytes),
    (None, Some((&first, rest))) => TARGETS[usize::from(first) % TARGETS.len()].1(rest),
    (None, None) => {}
});
