//! What a rank owns, no other rank can write.

use xccl_tests::plays_well;

const RANK: &str = env!("CARGO_BIN_EXE_rank");

#[test]
fn no_way_leads_to_writing_a_peers_outbox() {
    [2, 3].into_iter().for_each(|n| plays_well(RANK, n, "isolation", &[]));
}
