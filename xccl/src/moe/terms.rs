//! Sums in a row: the terms of each are gathered while those of the one before are still to be summed, so that their memory can
//! be fetched in time.

use std::ops::Range;

use arrayvec::ArrayVec;

use super::config::MAX_TOPK;
use super::kernels::Sum;
use crate::dtype::Element;
use crate::error::Result;
use crate::memory::row::Row;

/// The rows of one sum, with their factors: a token's experts or ranks, constant ones with two rows each, and bias and residual.
pub(super) type Terms<'a, E> = ArrayVec<(Row<'a, E>, f32), { 2 * MAX_TOPK + 2 }>;

/// Forms the sums `range`: `gather(i, terms)` names the rows of sum `i`, `write(i, sum)` takes it.
///
/// # Errors
/// The first one of `gather`; sums that were gathered before may be left out.
pub(super) fn sum_each<'a, E: Element>(
    range: Range<usize>,
    mut gather: impl FnMut(usize, &mut Terms<'a, E>) -> Result<()>,
    mut write: impl FnMut(usize, Sum<'_, E>),
) -> Result<()> {
    let mut terms = [Terms::new(), Terms::new()];
    if !range.is_empty() {
        gather(range.start, &mut terms[0])?;
        Sum::of(&terms[0]).fetch_heads();
    }
    for (turn, i) in range.clone().enumerate() {
        let [even, odd] = &mut terms;
        let (now, ahead) = if turn % 2 == 0 { (even, odd) } else { (odd, even) };
        ahead.clear();
        if i + 1 < range.end {
            gather(i + 1, ahead)?;
        }
        write(i, Sum { ahead, ..Sum::of(now) });
    }
    Ok(())
}
