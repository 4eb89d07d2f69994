//! The example as a user runs it: real processes of all three kinds, and the verdict.

use std::io::Write;

use example_parts::program;
use xccl_tests::has_network;

const DISAGGREGATED_MOE: &str = env!("CARGO_BIN_EXE_disaggregated_moe");

/// Asserts that all answers agree, and that on each attention rank micro-batches have overlapped. Gives what was printed.
fn agrees(prefill: usize, attention: usize, experts: usize, args: &str) -> String {
    let shape = format!("--prefill {prefill} --attention {attention} --experts {experts}");
    let printed = program::succeeds(DISAGGREGATED_MOE, &format!("{shape} {args}"));
    assert!(printed.contains("tokens and logits agree bit for bit with one process"), "{printed}");
    printed
}

/// By attention rank, its turns, and those that have overlapped.
fn turns(printed: &str) -> Vec<(u64, u64)> {
    let lines = printed.lines().filter(|line| line.starts_with("attention rank "));
    let numbers = lines.map(|line| line.split([' ', ':', ';', ',']).filter_map(|word| word.parse().ok()).collect());
    numbers.map(|numbers: Vec<u64>| (numbers[1], numbers[2])).collect()
}

fn fails(args: &str) -> String {
    program::fails(DISAGGREGATED_MOE, args)
}

#[test]
fn one_rank_of_each_kind_agrees_and_attends_while_its_other_micro_batch_is_away() {
    let printed = agrees(1, 1, 1, "--tokens 24");
    let [(turns, overlapped)] = turns(&printed)[..] else { panic!("{printed}") };
    // Twenty prompts, at most three of them in a turn.
    assert!(turns >= 20 / 3 * 24 * 4 && (1..=turns).contains(&overlapped), "{printed}");
    let picture: Vec<&str> = printed.lines().filter(|line| line.starts_with("micro-batch ")).collect();
    assert!(picture.len() == 2 && picture.iter().all(|line| line.contains('-')), "{printed}");
}

#[test]
fn more_attention_than_expert_ranks_agree() {
    assert_eq!(turns(&agrees(1, 3, 2, "--tokens 5")).len(), 3);
}

#[test]
fn more_expert_than_attention_ranks_agree() {
    agrees(2, 1, 3, "--tokens 5");
}

#[test]
fn domains_take_turns_on_the_same_experts_and_agree() {
    let printed = agrees(1, 2, 2, "--domains 2 --tokens 5 --seed 7");
    assert_eq!(turns(&printed).len(), 4);
    assert!(printed.contains("2 x 2 attention ranks"), "{printed}");
}

#[test]
fn ranks_of_two_nodes_agree_where_experts_are_on_both() {
    if has_network() {
        // Three ranks on each node: two attention ranks and an expert rank, an expert rank and two prefill ranks.
        agrees(2, 2, 2, "--nodes 2 --tokens 3");
    }
}

#[test]
fn sizes_that_divide_nothing_agree() {
    agrees(
        1,
        2,
        3,
        "--layers 3 --heads 3 --hidden 27 --inter 19 --routed 7 --topk 5 --page-tokens 5 --seats 1 --tokens 3",
    );
}

#[test]
fn prompts_of_a_file_agree_be_they_short_few_or_none() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let args = format!("--tokens 4 --prompts {}", file.path().display());
    assert!(agrees(1, 2, 1, &args).contains("\n0 prompts of 0 tokens"));
    file.write_all(b"a\n\nbc\nd\n").unwrap();
    assert!(agrees(1, 2, 1, &args).contains("\n3 prompts of 4 tokens"));
}

#[test]
fn one_changed_bit_is_found_and_ends_with_code_1() {
    let message = fails("--spoil --attention 1 --experts 1 --tokens 2");
    assert!(message.contains("answers differ: request 0, token 0:"), "{message}");
}

#[test]
fn options_that_cannot_work_are_named() {
    assert!(fails("--heads 5").contains("--hidden is 64"));
    assert!(fails("--attention 0").contains("--attention is 0"));
    assert!(fails("--experts 17").contains("--experts is 17, but there are only 16"));
    assert!(fails("--nodes 6").contains("--nodes is 6: 5 ranks"));
    assert!(fails("--prompts /nonexistent/prompts").contains("/nonexistent/prompts"));
}
