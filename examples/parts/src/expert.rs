//! An expert: the feed-forward network that a mixture has many of.

use xccl::Element;

use crate::arithmetic::{matrix, multiply, silu, widen};

/// One SwiGLU expert: `w_down (silu(w_gate x) * (w_up x))`.
pub struct Expert<E> {
    inter: usize,
    hidden: usize,
    gate: Vec<E>,
    up: Vec<E>,
    down: Vec<E>,
}

impl<E: Element> Expert<E> {
    /// Of the seeded tables, it takes so many.
    pub const TABLES: u64 = 3;

    /// A seeded one.
    pub fn seeded(seed: u64, first_table: u64, hidden: usize, inter: usize) -> Self {
        Expert {
            inter,
            hidden,
            gate: matrix(seed, first_table, hidden, inter),
            up: matrix(seed, first_table + 1, hidden, inter),
            down: matrix(seed, first_table + 2, inter, hidden),
        }
    }

    /// Weights and rows are of type `E`, all arithmetic is in f32, and only the output row is rounded to `E`.
    pub fn forward(&self, row: &[E], output: &mut [E]) {
        let row = widen(row);
        let gate = multiply(&row, &self.gate, self.inter);
        let up = multiply(&row, &self.up, self.inter);
        let gated: Vec<f32> = gate.into_iter().zip(up).map(|(gate, up)| silu(gate) * up).collect();
        for (output, x) in output.iter_mut().zip(multiply(&gated, &self.down, self.hidden)) {
            *output = E::from_f32(x);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// gate = (x0, -x1), up = (x0 + x1, 2 x1), down = (h0, h0 + h1).
    fn tiny_expert<E: Element>() -> Expert<E> {
        let e = |weights: [f32; 4]| weights.map(E::from_f32).to_vec();
        Expert {
            inter: 2,
            hidden: 2,
            gate: e([1.0, 0.0, 0.0, -1.0]),
            up: e([1.0, 0.0, 1.0, 2.0]),
            down: e([1.0, 1.0, 0.0, 1.0]),
        }
    }

    #[test]
    fn an_expert_computes_swiglu() {
        let mut output = [0.0f32; 2];
        tiny_expert().forward(&[1.0, 2.0], &mut output);
        // silu(1) = 0.7310586, silu(-2) = -0.23840584; h = (0.7310586 * 3, -0.23840584 * 4).
        let (h0, h1) = (2.193_175_8f32, -0.953_623_4f32);
        assert!((output[0] - h0).abs() < 1e-6 && (output[1] - (h0 + h1)).abs() < 1e-6, "{output:?}");
        tiny_expert().forward(&[0.0, 0.0], &mut output);
        assert_eq!(output, [0.0, 0.0]);
    }

    #[test]
    fn a_bf16_expert_accumulates_in_f32_and_rounds_once() {
        let row = [1.0, 2.0];
        let (mut exact, mut rounded) = ([0.0f32; 2], [bf16::ZERO; 2]);
        tiny_expert().forward(&row, &mut exact);
        tiny_expert().forward(&row.map(bf16::from_f32), &mut rounded);
        assert_eq!(rounded, exact.map(bf16::from_f32));
    }
}
