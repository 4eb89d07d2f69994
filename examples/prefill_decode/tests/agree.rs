//! The example as a user runs it: real processes, several requests in flight, and the verdict.

use example_parts::program;

const PREFILL_DECODE: &str = env!("CARGO_BIN_EXE_prefill_decode");

/// Asserts that the logits agree, and gives the first line: how many requests, and how many at once.
fn agrees(args: &str, ranks: (usize, usize)) -> String {
    let printed = program::succeeds(PREFILL_DECODE, &format!("--prefill {} --decode {} {args}", ranks.0, ranks.1));
    let verdict = format!("agree bitwise with one process ({} prefill ranks, {} decode ranks)", ranks.0, ranks.1);
    assert!(printed.contains(&verdict), "{printed}");
    printed.lines().next().unwrap_or_default().to_owned()
}

fn fails(args: &str) -> String {
    program::fails(PREFILL_DECODE, args)
}

#[test]
fn one_prefill_and_one_decode_rank_agree_with_one_process_and_serve_several_requests_at_once() {
    let line = agrees("", (1, 1));
    assert!(line.starts_with("12 requests") && !line.contains("up to 1 at once"), "{line}");
}

#[test]
fn several_ranks_of_each_kind_agree() {
    agrees("--requests 17", (2, 1));
    agrees("--requests 17", (1, 3));
    agrees("--requests 20 --seed 7", (2, 2));
}

#[test]
fn a_cache_with_room_for_one_request_serves_them_one_by_one() {
    let line = agrees("--requests 5 --prompt 20 --new 4 --page-tokens 8 --pages 3", (1, 1));
    assert!(line.contains("5 requests"), "{line}");
}

#[test]
fn sizes_that_divide_nothing_and_prompts_of_one_token_agree() {
    agrees("--requests 9 --prompt 1 --new 3", (1, 1));
    agrees("--requests 9 --prompt 23 --new 5 --page-tokens 7 --layers 3 --heads 3 --hidden 27 --vocabulary 31", (1, 2));
    assert!(agrees("--requests 0", (1, 1)).starts_with("0 requests"));
}

#[test]
fn one_changed_bit_is_found_and_ends_with_code_1() {
    let message = fails("--spoil --requests 3");
    assert!(message.contains("logits differ: request ") && message.contains("logit 0:"), "{message}");
}

#[test]
fn options_that_cannot_work_are_named() {
    assert!(fails("--heads 5").contains("--hidden is 64"));
    assert!(fails("--decode 0").contains("--decode is 0"));
    assert!(fails("--pages 1").contains("--pages is 1"));
}
