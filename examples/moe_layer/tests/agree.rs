//! The example as a user runs it: real processes, the text that ships with it, and the verdict.

use example_parts::program;

const MOE_LAYER: &str = env!("CARGO_BIN_EXE_moe_layer");

/// Asserts success, and gives what was printed.
fn succeeds(args: &str) -> String {
    program::succeeds(MOE_LAYER, args)
}

fn fails(args: &str) -> String {
    program::fails(MOE_LAYER, args)
}

fn agrees_bitwise(ranks: usize) {
    let printed = succeeds(&format!("--ranks {ranks}"));
    assert!(printed.contains(&format!("outputs agree bitwise: f32, bf16 ({ranks} ranks)")), "{printed}");
    let table = printed.lines().skip_while(|line| !line.starts_with("expert")).skip(1);
    let rows: Vec<Vec<usize>> = table.take_while(|line| !line.is_empty()).map(numbers).collect();
    assert_eq!(rows.len(), 16, "{printed}");
    let tokens = numbers(printed.lines().next().unwrap())[0];
    for dtype in [2, 3] {
        assert_eq!(rows.iter().map(|row| row[dtype]).sum::<usize>(), tokens * 4, "{printed}");
    }
    for row in rows {
        assert_eq!(row[1], row[0] / (16 / ranks), "expert {} is on the wrong rank\n{printed}", row[0]);
    }
}

fn numbers(line: &str) -> Vec<usize> {
    line.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

fn agrees_within_tolerance(ranks: usize) {
    let printed = succeeds(&format!("--ranks {ranks} --reduction per-rank"));
    assert!(printed.contains("outputs agree within tolerance: f32 (max abs error"), "{printed}");
    assert!(printed.contains(&format!("({ranks} ranks)")), "{printed}");
}

#[test]
fn one_rank_agrees_bitwise_with_a_single_process() {
    agrees_bitwise(1);
}

#[test]
fn two_ranks_agree_bitwise_with_a_single_process() {
    agrees_bitwise(2);
}

#[test]
fn four_ranks_agree_bitwise_with_a_single_process() {
    agrees_bitwise(4);
}

#[test]
fn eight_ranks_agree_bitwise_with_a_single_process() {
    agrees_bitwise(8);
}

#[test]
fn two_ranks_that_add_up_per_rank_agree_within_tolerance() {
    agrees_within_tolerance(2);
}

#[test]
fn four_ranks_that_add_up_per_rank_agree_within_tolerance() {
    agrees_within_tolerance(4);
}

#[test]
fn sizes_that_divide_nothing_agree_bitwise() {
    let printed = succeeds("--ranks 3 --hidden 37 --inter 19 --experts 7 --topk 5 --batch 50 --dtype bf16");
    assert!(printed.contains("outputs agree bitwise: bf16 (3 ranks)"), "{printed}");
}

#[test]
fn one_changed_bit_is_found_and_ends_with_code_1() {
    let message = fails("--ranks 2 --spoil --hidden 16 --inter 16");
    assert!(
        message.contains("f32: outputs differ: 1 of ") && message.contains("first element 15 of token"),
        "{message}"
    );
    assert!(message.contains("bf16: outputs differ") && message.contains("rank 0 failed"), "{message}");
    let message = fails("--ranks 2 --spoil --hidden 16 --inter 16 --reduction per-rank");
    assert!(message.contains("outputs differ by more than"), "{message}");
}

#[test]
fn options_that_cannot_work_are_named_before_a_rank_is_started() {
    assert!(fails("--topk 17").contains("--topk is 17 but there are only 16 experts"));
    assert!(fails("--ranks 0").contains("--ranks is 0"));
    assert!(fails("--batch 0").contains("--batch is 0"));
    assert!(fails("--text /nonexistent/text").contains("/nonexistent/text"));
}

#[test]
fn the_readme_shows_what_is_printed() {
    let printed = succeeds("--ranks 4");
    assert!(include_str!("../README.md").contains(&printed), "README.md should show:\n{printed}");
}
