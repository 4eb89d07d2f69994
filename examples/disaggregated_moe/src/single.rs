//! Prompt and answer in one process, one token at a time, without XCCL: what the ranks have to equal.

use anyhow::Result;
use example_parts::arithmetic::{add, greedy};
use example_parts::cache::Private;

use crate::model::{Decoder, Experts};

/// A token of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    pub byte: u8,
    /// Of the bits of all logits, of which the largest has decided the byte.
    pub digest: u64,
}

impl Token {
    /// The one that the logits prefer.
    pub fn greedy(logits: &[f32]) -> Token {
        // FNV-1a, by words.
        let mixed = |hash: u64, x: &f32| (hash ^ u64::from(x.to_bits())).wrapping_mul(0x100_0000_01b3);
        Token { byte: greedy(logits) as u8, digest: logits.iter().fold(0xcbf2_9ce4_8422_2325, mixed) }
    }
}

/// The `new` tokens that follow a prompt, which has one at least.
pub fn answer(decoder: &Decoder, experts: &Experts, prompt: &[u8], new: usize) -> Result<Vec<Token>> {
    let shape = decoder.shape();
    let pages = shape.pages().pages_of(prompt.len() + new);
    let table: Vec<u32> = (0..pages as u32).collect();
    let mut cache = Private::new(shape.pages(), pages);
    let (mut text, mut answer) = (prompt.to_vec(), vec![]);
    for position in 0..prompt.len() + new - 1 {
        let mut row = vec![decoder.embed(text[position], position)];
        for layer in 0..shape.layers {
            decoder.attend(layer, &mut row, position, &mut cache, &table)?;
            let (given, choice) = decoder.route(layer, &row[0]);
            add(&mut row[0], &decoder.shared(layer, &given));
            add(&mut row[0], &experts.sum(&given, &choice));
        }
        if position + 1 == text.len() {
            let token = Token::greedy(&decoder.logits(&row[0]));
            text.push(token.byte);
            answer.push(token);
        }
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::TINY;

    #[test]
    fn an_answer_is_as_long_as_asked_for_and_goes_on_where_a_longer_prompt_would() {
        let (decoder, experts) = (Decoder::seeded(TINY), Experts::all(&TINY));
        let whole = answer(&decoder, &experts, b"A gate opens", 6).unwrap();
        assert_eq!(whole.len(), 6);
        let longer: Vec<u8> = b"A gate opens".iter().copied().chain(whole[..2].iter().map(|t| t.byte)).collect();
        assert_eq!(answer(&decoder, &experts, &longer, 4).unwrap(), whole[2..]);
        assert_ne!(answer(&decoder, &experts, b"B gate opens", 6).unwrap(), whole);
    }

    #[test]
    fn a_digest_is_of_all_bits() {
        let digest = |logits: &[f32]| Token::greedy(logits).digest;
        assert_eq!(Token::greedy(&[1.0, 3.0, 2.0]).byte, 1);
        assert_ne!(digest(&[1.0, 3.0, 0.0]), digest(&[1.0, 3.0, -0.0]));
        assert_ne!(digest(&[1.0, 3.0]), digest(&[3.0, 1.0]));
    }
}
