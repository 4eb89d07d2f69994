//! Plain loops over rows, and numbers from a seed.
//!
//! Everything adds in one fixed order, so that it gives the same bits in whichever process it is computed.

use std::f64::consts::{LN_2, LOG2_E};

use xccl::Element;

/// The output function of SplitMix64 (Steele, Lea and Flood, 2014), used as a hash. It is written out here because a
/// library's generator may change its stream between versions, and what the examples print would change with it.
pub fn splitmix64(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Entry `index` of a seeded table: uniform in [-1, 1), a multiple of 2^-23 and so exact in f32. A hash of its place, so that a rank
/// can make the weights it holds without making the others.
pub fn uniform(seed: u64, table: u64, index: usize) -> f32 {
    let bits = splitmix64(splitmix64(splitmix64(seed).wrapping_add(table)).wrapping_add(index as u64));
    (bits >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}

/// A seeded matrix whose products with rows of unit variance have unit variance again, in [`multiply`]'s layout.
pub fn matrix<E: Element>(seed: u64, table: u64, inputs: usize, outputs: usize) -> Vec<E> {
    let scale = (3.0 / inputs as f32).sqrt();
    (0..inputs * outputs).map(|index| E::from_f32(uniform(seed, table, index) * scale)).collect()
}

/// `row` times a matrix of `row.len()` rows by `outputs` columns, row-major. Each output adds its products in ascending
/// order of the input; going through the outputs in the inner loop lets them share vector registers without changing that.
pub fn multiply<E: Element>(row: &[f32], weights: &[E], outputs: usize) -> Vec<f32> {
    let mut product = vec![0.0f32; outputs];
    for (&x, weights) in row.iter().zip(weights.chunks_exact(outputs)) {
        for (sum, w) in product.iter_mut().zip(weights) {
            *sum += x * w.to_f32();
        }
    }
    product
}

/// The row in f32.
pub fn widen<E: Element>(row: &[E]) -> Vec<f32> {
    row.iter().map(|x| x.to_f32()).collect()
}

/// The sum of the products, in ascending order.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Adds a row to another one.
pub fn add(to: &mut [f32], from: &[f32]) {
    to.iter_mut().zip(from).for_each(|(x, y)| *x += y);
}

/// The row divided by its root mean square.
pub fn normed(row: &[f32]) -> Vec<f32> {
    let scale = 1.0 / (dot(row, row) / row.len() as f32 + 1e-6).sqrt();
    row.iter().map(|x| x * scale).collect()
}

/// e^x from additions and multiplications alone. The standard library's `exp` may differ in its last bit between platforms
/// and even between two calls; this one rounds the same way everywhere.
pub fn exp(x: f32) -> f32 {
    let x = f64::from(x).clamp(-200.0, 200.0);
    let halvings = (x * LOG2_E).round();
    let rest = x - halvings * LN_2;
    // |rest| is at most ln(2) / 2, where what this polynomial leaves out is far below an f32's rounding.
    let series = (1..=12).rev().fold(1.0, |sum, n| 1.0 + sum * rest / f64::from(n));
    let power_of_two = f64::from_bits(((1023 + halvings as i64) as u64) << 52);
    (series * power_of_two) as f32
}

/// x times the logistic function of x.
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// Positive numbers that add up to 1, in the proportions of e^x.
pub fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = logits.iter().map(|x| exp(x - largest)).collect();
    let total = powers.iter().fold(0.0, |sum, p| sum + p);
    powers.into_iter().map(|p| p / total).collect()
}

/// The `count` largest of the shares, the lower index first where two are equal, with their indices.
pub fn largest(shares: Vec<f32>, count: usize) -> Vec<(usize, f32)> {
    let mut chosen: Vec<(usize, f32)> = shares.into_iter().enumerate().collect();
    chosen.sort_by(|(a, p), (b, q)| q.total_cmp(p).then(a.cmp(b)));
    chosen.truncate(count);
    chosen
}

/// The token with the largest logit; of equal ones the first.
pub fn greedy(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best });
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_splitmix64() {
        // The first two outputs of the published generator seeded with 0: its state advances by the constant each time.
        assert_eq!(splitmix64(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(splitmix64(0x9e37_79b9_7f4a_7c15), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn seeded_numbers_differ_by_seed_table_and_index_and_are_centred() {
        let first = uniform(1, 1, 0);
        for other in [uniform(2, 1, 0), uniform(1, 2, 0), uniform(1, 1, 1)] {
            assert_ne!(first, other);
        }
        let numbers: Vec<f32> = (0..10_000).map(|index| uniform(1, 12, index)).collect();
        assert!(numbers.iter().all(|x| (-1.0..1.0).contains(x)));
        let mean = numbers.iter().sum::<f32>() / 10_000.0;
        let variance = numbers.iter().map(|x| x * x).sum::<f32>() / 10_000.0;
        assert!(mean.abs() < 0.03 && (variance - 1.0 / 3.0).abs() < 0.02, "mean {mean}, variance {variance}");
    }

    #[test]
    fn the_exponential_is_within_one_rounding_of_the_exact_value() {
        for step in -8000..=8000 {
            let x = step as f32 / 100.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs();
            assert!(error <= exact * 2f64.powi(-24) * 1.001, "exp({x}) = {}, exactly {exact}", exp(x));
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    }

    #[test]
    fn of_equal_shares_the_lower_index_comes_first() {
        assert_eq!(largest(vec![0.2, 0.3, 0.2, 0.3], 3), [(1, 0.3), (3, 0.3), (0, 0.2)]);
        assert_eq!(greedy(&[1.0, 3.0, 2.0, 3.0]), 1);
    }

    #[test]
    fn a_softmax_of_logarithms_gives_their_proportions() {
        let shares = softmax(&[1f32.ln(), 2f32.ln(), 5f32.ln()]);
        for (share, expected) in shares.iter().zip([0.125, 0.25, 0.625]) {
            assert!((share - expected).abs() < 1e-6, "{shares:?}");
        }
        assert_eq!(softmax(&[1e30, 1e30]), [0.5, 0.5]);
    }

    #[test]
    fn a_product_goes_through_the_matrix_by_rows_of_inputs() {
        // (1, 10) times ((1, 2, 3), (4, 5, 6)).
        assert_eq!(multiply(&[1.0, 10.0], &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], 3), [41.0, 52.0, 63.0]);
    }

    #[test]
    fn a_normed_row_has_unit_variance() {
        assert_eq!(normed(&[3.0, -3.0]).iter().map(|x| x.round()).collect::<Vec<_>>(), [1.0, -1.0]);
    }
}
