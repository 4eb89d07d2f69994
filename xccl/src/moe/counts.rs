//! How many tokens each expert got: for the engine's balancer.

use super::{Moe, State};
use crate::error::{Error, Result};

/// How counts are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CountForm {
    /// One by one.
    Each,
    /// Each with all before it, as CANN's `expertTokenNumsType` 0 has them.
    PrefixSums,
}

impl CountForm {
    fn write(self, counts: &mut [i64], to: &mut [i64]) {
        let mut sum = 0;
        for (count, to) in counts.iter_mut().zip(to) {
            sum += *count;
            *to = if self == CountForm::Each { *count } else { sum };
        }
        counts.fill(0);
    }
}

impl Moe {
    /// Takes how many of this rank's tokens have named each routed expert, `[experts]`, in the dispatches since they were last
    /// taken. Tokens that were masked out are not counted. i64, so that ranks can add theirs up with
    /// [`all_reduce`](crate::Communicator::all_reduce). Counted in every exchange, which takes some tens of nanoseconds.
    ///
    /// ```
    /// # use xccl::{Communicator, Config, CountForm, DType, Moe, MoeConfig, Routing, UniqueId};
    /// # fn main() -> xccl::Result<()> {
    /// # let comm = Communicator::init(0, 1, &UniqueId::new()?, Config::default())?;
    /// let moe = Moe::new(&comm, MoeConfig::new(8, 16, 1, 3, DType::F32))?;
    /// let (sent, batch) = moe.dispatch(&[1.0f32; 48], &Routing::new(&[2i32, 0, 2], &[1.0; 3]))?;
    /// # moe.combine(sent, batch, &mut [0.0f32; 48])?;
    /// let mut counts = [0; 3];
    /// moe.take_expert_counts(CountForm::Each, &mut counts)?;
    /// assert_eq!(counts, [1, 0, 2]);
    /// moe.take_expert_counts(CountForm::Each, &mut counts)?;
    /// assert_eq!(counts, [0; 3]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Shape`], with the counts kept.
    pub fn take_expert_counts(&self, form: CountForm, to: &mut [i64]) -> Result<()> {
        let State { expert_counts, .. } = &mut *self.state.borrow_mut();
        check("the counts of experts", to, expert_counts.len(), "experts")?;
        form.write(expert_counts, to);
        Ok(())
    }

    /// Takes how many rows have come for each of this rank's slots, in the order of [`experts_of`](Self::experts_of), since they
    /// were last taken: what these experts had to work on, from all ranks. A slot goes on counting when another expert is
    /// installed in it, so take the counts before.
    ///
    /// # Errors
    /// [`Error::Shape`], with the counts kept.
    pub fn take_slot_counts(&self, form: CountForm, to: &mut [i64]) -> Result<()> {
        let State { slot_counts, placed, .. } = &mut *self.state.borrow_mut();
        check("the counts of slots", to, placed.local(self.comm.rank).len(), "slots of this rank")?;
        form.write(slot_counts, to);
        Ok(())
    }
}

fn check(what: &'static str, to: &[i64], expected: usize, unit: &str) -> Result<()> {
    match to.len() == expected {
        true => Ok(()),
        false => Err(Error::Shape { what, given: to.len(), expected: format!("{expected} ({unit})") }),
    }
}
