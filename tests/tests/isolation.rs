//! What a rank owns, no other rank can write.

use xccl_tests::plays_well;

const RANK: &str = env!("CARGO_BIN_EXE_rank");

#[test]
fn no_way_leads_to_writing_a_peers_outbox() {
    [2, 3].into_iter().for_each(|n| plays_well(RANK, n, "isolation", &[]));
}

#[test]
fn a_rank_that_overwrites_its_own_memory_hurts_only_itself() {
    for (n, seed) in [(3, "1"), (4, "2")] {
        plays_well(RANK, n, "overwrites-itself", &[("TEST_SEED", seed), ("XCCL_TIMEOUT", "0.3")]);
    }
}
