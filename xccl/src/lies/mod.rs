//! Ranks that lie: what one of them says or writes into its memory must give the others an error, or garbage as numbers, and
//! nothing worse.
//!
//! Each target takes any bytes, makes of them what a broken peer could have written or sent, and lets this rank go on as if all
//! were well. It has to come back: no panic, no access beyond the peer's segment, no wait. The tests here run each target on random
//! bytes (`PROPTEST_CASES` says on how many); `fuzz/` has libFuzzer look for worse ones, with AddressSanitizer.

mod garbage;
mod memory;
mod world;

pub(crate) use garbage::Garbage;
pub(crate) use world::is_impatient;

/// A target: any bytes are good.
pub type Target = fn(&[u8]);

/// All targets, by name.
pub const TARGETS: [(&str, Target); 9] = [
    ("bootstrap_member", |bytes| crate::bootstrap::lies::member(&mut Garbage::new(bytes))),
    ("bootstrap_root", |bytes| crate::bootstrap::lies::root(&mut Garbage::new(bytes))),
    ("plane", |bytes| crate::fabric::plane::lies::records(&mut Garbage::new(bytes))),
    ("messages", |bytes| memory::messages(&mut Garbage::new(bytes))),
    ("collectives", |bytes| memory::collectives(&mut Garbage::new(bytes))),
    ("exchange", |bytes| memory::exchange(&mut Garbage::new(bytes))),
    ("rail", |bytes| memory::rail(&mut Garbage::new(bytes))),
    ("pages", |bytes| memory::pages(&mut Garbage::new(bytes))),
    ("shared", |bytes| memory::shared(&mut Garbage::new(bytes))),
];

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::any;
    use proptest::test_runner::{Config, TestRunner};

    use super::TARGETS;

    fn survives(name: &str) {
        let (_, target) = TARGETS.into_iter().find(|(other, _)| *other == name).unwrap();
        // A case takes some ten microseconds: so many take no time.
        let cases = if std::env::var("PROPTEST_CASES").is_ok() { Config::default().cases } else { 2000 };
        let config = Config { cases, failure_persistence: None, max_shrink_iters: 20_000, ..Config::default() };
        let mut runner = TestRunner::new(config);
        runner
            .run(&vec(any::<u8>(), 0..500), |bytes| {
                target(&bytes);
                Ok(())
            })
            .unwrap_or_else(|failure| panic!("{name}: {failure}"));
    }

    #[test]
    fn what_rank_0_says_in_a_set_up_is_never_worse_than_an_error() {
        survives("bootstrap_member");
    }

    #[test]
    fn what_a_rank_says_to_rank_0_in_a_set_up_is_never_worse_than_an_error() {
        survives("bootstrap_root");
    }

    #[test]
    fn records_of_another_node_are_never_worse_than_an_error() {
        survives("plane");
    }

    #[test]
    fn slots_and_rings_of_messages_are_never_worse_than_an_error() {
        survives("messages");
    }

    #[test]
    fn slots_of_collectives_are_never_worse_than_an_error() {
        survives("collectives");
    }

    #[test]
    fn lists_of_tokens_are_never_worse_than_an_error() {
        survives("exchange");
    }

    #[test]
    fn lists_of_tokens_of_another_node_are_never_worse_than_an_error() {
        survives("rail");
    }

    #[test]
    fn requests_for_pages_are_never_worse_than_an_error() {
        survives("pages");
    }

    #[test]
    fn borders_and_pieces_of_shared_memory_are_never_worse_than_an_error() {
        survives("shared");
    }
}
