//! Handles used from several threads, as the header allows it and as it does not.

use std::path::Path;

use xccl_tests::{C99, compile, plays_well};

#[test]
fn threads_share_a_communicator_and_take_turns_with_a_moe_handle() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/threads.c");
    let program = compile("cc", &C99, &source, &dir.path().join("threads"));
    [1, 2, 3].into_iter().for_each(|n| plays_well(&program, n, "", &[]));
}
