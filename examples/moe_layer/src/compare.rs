//! Whether the ranks' outputs are those of the single process.

use anyhow::{Result, ensure};
use xccl::{DType, Element};

use crate::distributed::Outcome;
use crate::single::Reference;

/// Every expert received exactly the rows that the routing of the single process sends there.
pub fn loads<E>(outcome: &Outcome<E>, reference: &Reference<E>) -> Result<()> {
    ensure!(outcome.loads.len() == reference.loads.len(), "loads of {} experts arrived", outcome.loads.len());
    for (expert, (received, chosen)) in outcome.loads.iter().zip(&reference.loads).enumerate() {
        ensure!(received == chosen, "expert {expert} received {received} rows, but {chosen} tokens chose it");
    }
    Ok(())
}

/// The outputs are the same bits.
pub fn bitwise<E: Element>(outputs: &[E], reference: &Reference<E>, hidden: usize) -> Result<()> {
    let same = |index: usize, x: E| bytemuck::bytes_of(&x) == bytemuck::bytes_of(&reference.outputs[index]);
    judge(outputs, reference, hidden, same, "outputs differ")
}

/// The outputs are the same but for the rounding that a per-rank reduction may add; says the largest difference.
///
/// An output is a sum of K products; M is the sum of their magnitudes and u the element type's unit roundoff. The per-rank
/// reduction adds the products in another order, which moves an f32 sum by at most 2 (K + 1) 2^-24 M, and may round the partial
/// sums to the element type (u M in all) before the output, which is itself rounded on both sides (2 u M). One more u M is
/// allowed for the terms of higher order.
pub fn within_tolerance<E: Element>(
    outputs: &[E],
    reference: &Reference<E>,
    hidden: usize,
    topk: usize,
) -> Result<f32> {
    let factor = tolerance_factor(E::DTYPE, topk);
    let error = |index: usize, x: E| (x.to_f32() - reference.outputs[index].to_f32()).abs();
    let close = |index: usize, x: E| error(index, x) <= factor * reference.magnitudes[index];
    judge(
        outputs,
        reference,
        hidden,
        close,
        &format!("outputs differ by more than {factor:.1e} of the terms added up"),
    )?;
    Ok(outputs.iter().enumerate().map(|(index, &x)| error(index, x)).fold(0.0, f32::max))
}

/// The tolerance of [`within_tolerance`], as a part of M.
pub fn tolerance_factor(dtype: DType, topk: usize) -> f32 {
    let unit_roundoff = match dtype {
        DType::F32 => 2f32.powi(-24),
        DType::F16 => 2f32.powi(-11),
        DType::BF16 => 2f32.powi(-8),
    };
    4.0 * unit_roundoff + 2.0 * (topk + 1) as f32 * 2f32.powi(-24)
}

fn judge<E: Element>(
    outputs: &[E],
    reference: &Reference<E>,
    hidden: usize,
    agrees: impl Fn(usize, E) -> bool,
    complaint: &str,
) -> Result<()> {
    let (count, expected) = (outputs.len(), reference.outputs.len());
    ensure!(count == expected, "outputs differ: the ranks made {count} elements, one process {expected}");
    let mut wrong = (0..count).filter(|&index| !agrees(index, outputs[index]));
    if let Some(first) = wrong.next() {
        anyhow::bail!(
            "{complaint}: {} of {count} elements, first element {} of token {}, which is {:e} by the ranks and {:e} by one process",
            1 + wrong.count(),
            first % hidden,
            first / hidden,
            outputs[first].to_f32(),
            reference.outputs[first].to_f32()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    fn reference<E: Element>(outputs: &[f32]) -> Reference<E> {
        let outputs = outputs.iter().map(|&x| E::from_f32(x)).collect::<Vec<_>>();
        Reference { magnitudes: vec![8.0; outputs.len()], outputs, loads: vec![] }
    }

    #[test]
    fn a_single_bit_is_a_difference() {
        let reference = reference::<f32>(&[1.0, 2.0, 3.0, 4.0]);
        assert!(bitwise(&[1.0, 2.0, 3.0, 4.0], &reference, 2).is_ok());
        let error = bitwise(&[1.0, 2.0, 3.0, 4.0f32.next_up()], &reference, 2).unwrap_err().to_string();
        assert!(error.contains("1 of 4 elements") && error.contains("first element 1 of token 1"), "{error}");
        assert!(bitwise(&[1.0, 2.0, 3.0], &reference, 2).is_err());
    }

    #[test]
    fn zeros_of_different_sign_are_a_difference() {
        assert!(bitwise(&[bf16::NEG_ZERO], &reference::<bf16>(&[0.0]), 1).is_err());
    }

    #[test]
    fn a_tolerance_grows_with_the_terms_and_not_with_the_output() {
        let reference = reference::<bf16>(&[0.0]);
        let limit = tolerance_factor(DType::BF16, 2) * 8.0; // just above 2^-3
        let x = bf16::from_f32(0.125);
        assert_eq!(within_tolerance(&[x], &reference, 1, 2).unwrap(), 0.125);
        assert!(limit < 0.126);
        let error = within_tolerance(&[bf16::from_f32(-0.127)], &reference, 1, 2).unwrap_err().to_string();
        assert!(error.contains("outputs differ by more than"), "{error}");
        assert!(within_tolerance(&[bf16::NAN], &reference, 1, 2).is_err());
    }

    #[test]
    fn a_row_that_went_astray_is_noticed() {
        let reference = Reference::<f32> { loads: vec![3, 4], ..reference(&[]) };
        let mut outcome = Outcome { outputs: vec![], loads: vec![3, 4] };
        assert!(loads(&outcome, &reference).is_ok());
        outcome.loads = vec![2, 4];
        let error = loads(&outcome, &reference).unwrap_err().to_string();
        assert_eq!(error, "expert 0 received 2 rows, but 3 tokens chose it");
    }
}
