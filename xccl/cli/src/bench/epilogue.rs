//! What an engine does with the sums of a combine: in its pass, or in one of its own afterwards.

use anyhow::{Result, ensure};
use clap::ValueEnum;
use half::f16;
use half::slice::HalfFloatSliceExt;
use serde::Serialize;
use xccl::{DType, Element, Epilogue, Residual, RmsNorm};

#[derive(Clone, Copy, ValueEnum, Serialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// One row is added to every sum
    Bias,
    /// A row is added to each sum
    Residual,
    /// The root-mean-square norm of the result
    Norm,
}

const EPS: f32 = 1e-6;
const BLOCK: usize = 64;

/// The engine's memory for the steps that were asked for.
pub struct Extras<E> {
    steps: Vec<Step>,
    hidden: usize,
    bias: Vec<E>,
    residual: Vec<E>,
    weight: Vec<E>,
    normed: Vec<E>,
}

impl<E: Element> Extras<E> {
    pub fn new(steps: &[Step], tokens: usize, hidden: usize) -> Self {
        let row = |factor: f32, n: usize| (0..n).map(|i| E::from_f32((i % 61) as f32 * factor - 4.0)).collect();
        let has = |step| steps.contains(&step);
        let all = |step| if has(step) { tokens * hidden } else { 0 };
        Extras {
            steps: steps.to_vec(),
            hidden,
            bias: row(0.125, hidden),
            residual: row(0.25, all(Step::Residual)),
            weight: row(0.0625, hidden),
            normed: vec![E::from_f32(0.0); all(Step::Norm)],
        }
    }

    fn has(&self, step: Step) -> bool {
        self.steps.contains(&step)
    }

    pub fn epilogue(&mut self) -> Epilogue<'_, E> {
        let (bias, residual, norm) = (self.has(Step::Bias), self.has(Step::Residual), self.has(Step::Norm));
        Epilogue {
            bias: bias.then_some(&self.bias),
            residual: if residual { Residual::Rows(&self.residual) } else { Residual::None },
            norm: norm.then_some(RmsNorm { weight: &self.weight, eps: EPS, out: &mut self.normed }),
            tokens: None,
        }
    }

    /// The same steps over sums that are written already, row by row, as an engine's fused kernel would do them.
    pub fn pass(&mut self, out: &mut [E]) {
        for (t, out) in out.chunks_exact_mut(self.hidden).enumerate() {
            let range = t * self.hidden..(t + 1) * self.hidden;
            let bias = self.has(Step::Bias).then_some(&self.bias[..]);
            let residual = self.has(Step::Residual).then(|| &self.residual[range.clone()]);
            let norm = self.steps.contains(&Step::Norm).then(|| (&self.weight[..], &mut self.normed[range]));
            row_pass(out, bias, residual, norm);
        }
    }

    /// Whether token `t` came out as its sum says, which is given before it was rounded.
    pub fn check(&self, t: usize, out: &[E], sum: impl Fn(usize) -> Result<f32>) -> Result<()> {
        let range = t * self.hidden..(t + 1) * self.hidden;
        for (c, found) in out.iter().enumerate() {
            let mut expected = sum(c)?;
            for (step, row) in [(Step::Bias, &self.bias[..]), (Step::Residual, &self.residual[..])] {
                if self.has(step) {
                    expected += row[if step == Step::Bias { c } else { range.start + c }].to_f32();
                }
            }
            let (found, expected) = (found.to_f32(), E::from_f32(expected).to_f32());
            ensure!(found.to_bits() == expected.to_bits(), "token {t}, column {c}: {found}, expected {expected}");
        }
        if !self.has(Step::Norm) {
            return Ok(());
        }
        let mut squares = [0.0f32; BLOCK];
        out.iter().enumerate().for_each(|(c, x)| squares[c % BLOCK] += x.to_f32() * x.to_f32());
        let r = factor(squares, self.hidden);
        for (c, found) in self.normed[range].iter().enumerate() {
            let (found, expected) =
                (found.to_f32(), E::from_f32(out[c].to_f32() * r * self.weight[c].to_f32()).to_f32());
            ensure!(
                found.to_bits() == expected.to_bits(),
                "token {t}, column {c}: normed {found}, expected {expected}"
            );
        }
        Ok(())
    }
}

#[inline(always)]
fn factor(mut squares: [f32; BLOCK], hidden: usize) -> f32 {
    for width in [32, 16, 8, 4, 2, 1] {
        (0..width).for_each(|i| squares[i] += squares[i + width]);
    }
    1.0 / (squares[0] / hidden as f32 + EPS).sqrt()
}

type Norm<'a, E> = Option<(&'a [E], &'a mut [E])>;

fn row_pass<E: Element>(out: &mut [E], bias: Option<&[E]>, residual: Option<&[E]>, norm: Norm<'_, E>) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: the features are there.
            return unsafe { row_pass_avx512(out, bias, residual, norm) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature is there.
            return unsafe { row_pass_avx2(out, bias, residual, norm) };
        }
    }
    plain_row_pass(out, bias, residual, norm);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn row_pass_avx512<E: Element>(out: &mut [E], bias: Option<&[E]>, residual: Option<&[E]>, norm: Norm<'_, E>) {
    plain_row_pass(out, bias, residual, norm);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn row_pass_avx2<E: Element>(out: &mut [E], bias: Option<&[E]>, residual: Option<&[E]>, norm: Norm<'_, E>) {
    plain_row_pass(out, bias, residual, norm);
}

#[inline(always)]
fn plain_row_pass<E: Element>(out: &mut [E], bias: Option<&[E]>, residual: Option<&[E]>, norm: Norm<'_, E>) {
    let (mut squares, mut wide, mut added) = ([0.0f32; BLOCK], [0.0f32; BLOCK], [0.0f32; BLOCK]);
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        let (at, n) = (block * BLOCK, out.len());
        widen(out, &mut wide);
        for row in [bias, residual].into_iter().flatten() {
            widen(&row[at..at + n], &mut added);
            wide.iter_mut().zip(&added).for_each(|(x, a)| *x += a);
        }
        round(&wide[..n], out);
        if norm.is_some() {
            wide.fill(0.0);
            widen(out, &mut wide);
            squares.iter_mut().zip(&wide).for_each(|(s, x)| *s += x * x);
        }
    }
    let Some((weight, normed)) = norm else { return };
    let r = factor(squares, out.len());
    for ((x, weight), normed) in out.chunks(BLOCK).zip(weight.chunks(BLOCK)).zip(normed.chunks_mut(BLOCK)) {
        widen(x, &mut wide);
        widen(weight, &mut added);
        wide.iter_mut().zip(&added).for_each(|(x, w)| *x = *x * r * w);
        round(&wide[..normed.len()], normed);
    }
}

#[inline(always)]
fn widen<E: Element>(row: &[E], to: &mut [f32; BLOCK]) {
    let to = &mut to[..row.len()];
    match E::DTYPE {
        DType::BF16 => {
            let bits = bytemuck::cast_slice::<E, u16>(row);
            to.iter_mut().zip(bits).for_each(|(w, &b)| *w = f32::from_bits(u32::from(b) << 16));
        }
        DType::F16 => bytemuck::cast_slice::<E, f16>(row).convert_to_f32_slice(to),
        DType::F32 => to.copy_from_slice(bytemuck::cast_slice(row)),
    }
}

/// Values that are numbers.
#[inline(always)]
fn round<E: Element>(from: &[f32], to: &mut [E]) {
    match E::DTYPE {
        DType::BF16 => {
            let bits = |x: f32| (x.to_bits().wrapping_add(0x7fff + ((x.to_bits() >> 16) & 1)) >> 16) as u16;
            bytemuck::cast_slice_mut::<E, u16>(to).iter_mut().zip(from).for_each(|(o, &x)| *o = bits(x));
        }
        DType::F16 => bytemuck::cast_slice_mut::<E, f16>(to).convert_from_f32_slice(from),
        DType::F32 => bytemuck::cast_slice_mut::<E, f32>(to).copy_from_slice(from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn the_pass_of_its_own_is_what_check_expects() {
        fn one<E: Element>(steps: &[Step]) {
            let (tokens, hidden) = (3, 200);
            let mut extras = Extras::<E>::new(steps, tokens, hidden);
            let sum = |t: usize, c: usize| ((t * 7 + c) % 33) as f32 / 4.0;
            let mut out: Vec<E> = (0..tokens * hidden).map(|i| E::from_f32(sum(i / hidden, i % hidden))).collect();
            extras.pass(&mut out);
            for (t, row) in out.chunks_exact(hidden).enumerate() {
                extras.check(t, row, |c| Ok(sum(t, c))).unwrap();
            }
            out[hidden + 1] = E::from_f32(77.0);
            assert!(extras.check(1, &out[hidden..2 * hidden], |c| Ok(sum(1, c))).is_err());
        }
        for steps in [&[Step::Bias][..], &[Step::Residual, Step::Norm], &[Step::Bias, Step::Residual, Step::Norm]] {
            one::<f32>(steps);
            one::<bf16>(steps);
            one::<f16>(steps);
        }
    }
}
