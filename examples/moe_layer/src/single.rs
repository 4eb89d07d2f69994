//! The whole layer in one process, without XCCL: what the ranks' outputs are compared with.

use example_parts::expert::Expert;
use xccl::Element;

use crate::model::{Router, Shape, embed};

/// The layer's outputs for a text, and what is needed to judge somebody else's.
pub struct Reference<E> {
    /// `[tokens, hidden]`.
    pub outputs: Vec<E>,
    /// For each element of the outputs, the sum of the magnitudes that were added up: rounding errors scale with it.
    pub magnitudes: Vec<f32>,
    /// How many tokens each expert was chosen for.
    pub loads: Vec<u32>,
}

pub fn run<E: Element>(shape: &Shape, tokens: &[u32]) -> Reference<E> {
    let rows: Vec<E> = embed(shape, tokens);
    let router = Router::seeded(shape);
    let experts: Vec<Expert<E>> = (0..shape.experts).map(|expert| shape.expert(expert)).collect();

    let mut reference = Reference { outputs: vec![], magnitudes: vec![], loads: vec![0; shape.experts] };
    let mut answer = vec![E::from_f32(0.0); shape.hidden];
    for row in rows.chunks_exact(shape.hidden) {
        let mut sum = vec![0.0f32; shape.hidden];
        let mut magnitude = vec![0.0f32; shape.hidden];
        for (expert, weight) in router.route(row) {
            reference.loads[expert] += 1;
            experts[expert].forward(row, &mut answer);
            add_weighted(weight, &answer, &mut sum, &mut magnitude);
        }
        reference.outputs.extend(sum.into_iter().map(E::from_f32));
        reference.magnitudes.extend(magnitude);
    }
    reference
}

/// A multiplication and an addition, each rounded to f32: what XCCL's per-expert reduction promises.
fn add_weighted<E: Element>(weight: f32, answer: &[E], sum: &mut [f32], magnitude: &mut [f32]) {
    for ((x, sum), magnitude) in answer.iter().zip(sum).zip(magnitude) {
        let product = weight * x.to_f32();
        *sum += product;
        *magnitude += product.abs();
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    const SHAPE: Shape = Shape { hidden: 8, inter: 4, experts: 5, topk: 2, vocabulary: 50, seed: 3 };

    #[test]
    fn answers_are_weighted_and_added() {
        let (mut sum, mut magnitude) = ([1.0, 1.0], [1.0, 1.0]);
        add_weighted(0.5, &[4.0f32, -8.0], &mut sum, &mut magnitude);
        assert_eq!((sum, magnitude), ([3.0, -3.0], [3.0, 5.0]));
    }

    #[test]
    fn with_one_expert_the_layer_is_that_expert() {
        let shape = Shape { experts: 1, topk: 1, ..SHAPE };
        let row: Vec<bf16> = embed(&shape, &[17]);
        let mut expected = vec![bf16::ZERO; shape.hidden];
        shape.expert(0).forward(&row, &mut expected);
        let reference = run::<bf16>(&shape, &[17]);
        assert_eq!(reference.outputs, expected);
        assert_eq!(reference.loads, [1]);
    }

    #[test]
    fn every_token_visits_topk_experts_and_depends_on_nothing_but_itself() {
        let together = run::<f32>(&SHAPE, &[3, 4, 3]);
        assert_eq!(together.loads.iter().sum::<u32>(), 6);
        assert_eq!(together.outputs[..8], together.outputs[16..]);
        assert_eq!(together.outputs[8..16], run::<f32>(&SHAPE, &[4]).outputs);
        assert!(together.outputs.iter().zip(&together.magnitudes).all(|(x, m)| x.abs() <= *m && *m > 0.0));
    }

    #[test]
    fn an_empty_text_has_no_outputs() {
        assert!(run::<f32>(&SHAPE, &[]).outputs.is_empty());
    }
}
