//! One routing for all contenders: drawn once, handed over as a .npy file, recognised by its sum.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use npyz::WriterBuilder;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::task::Shape;

/// Uniform, distinct experts of as many tokens as the largest exchange has: rank `r` of a job with `T` tokens each has the rows
/// from `r * T` on.
pub fn draw(shape: &Shape) -> Vec<i32> {
    let over_tokens = shape.ranks[0] * shape.tokens.iter().copied().max().unwrap_or(1);
    let over_ranks = shape.ranks.iter().copied().max().unwrap_or(1) * shape.tokens_over_ranks;
    let mut rng = StdRng::seed_from_u64(1);
    let rows = over_tokens.max(over_ranks);
    let row = |_| rand::seq::index::sample(&mut rng, shape.experts, shape.topk).into_iter().map(|id| id as i32);
    (0..rows).flat_map(row).collect()
}

pub fn write(path: &Path, ids: &[i32], topk: usize) -> Result<()> {
    let save = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        let options = npyz::WriteOptions::new().default_dtype().shape(&[(ids.len() / topk) as u64, topk as u64]);
        let mut npy = options.writer(&mut file).begin_nd()?;
        npy.extend(ids)?;
        npy.finish()?;
        file.flush()
    };
    save().with_context(|| format!("writing {path:?}"))
}

/// What contenders print of the ids they used: over the ranks' ids in turn, the sum of (id + 1) times the id's place from 1.
pub fn sum(ids: &[i32], topk: usize, ranks: usize, tokens: usize) -> u64 {
    let used = &ids[..ranks * tokens * topk];
    (1u64..).zip(used).fold(0, |sum, (place, &id)| sum.wrapping_add((id as u64 + 1).wrapping_mul(place)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_has_distinct_experts_and_other_orders_have_other_sums() {
        let shape = Shape::quick();
        let ids = draw(&shape);
        assert_eq!(ids.len(), 4 * 8 * 4);
        for row in ids.chunks(shape.topk) {
            assert!(
                row.iter().all(|&id| (0..16).contains(&id) && row.iter().filter(|&&x| x == id).count() == 1),
                "{row:?}"
            );
        }
        assert_eq!(sum(&[0, 1, 2, 3], 2, 2, 1), 1 + 4 + 9 + 16);
        assert_ne!(sum(&[0, 1, 3, 2], 2, 2, 1), sum(&[0, 1, 2, 3], 2, 2, 1));
        assert_eq!(draw(&shape), ids, "the same every time");
    }

    #[test]
    fn the_file_is_one_that_the_c_program_understands() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.npy");
        write(&path, &[5, 6, 7, 8, 9, 10], 2).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(&bytes[..7], b"\x93NUMPY\x01");
        let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        let text = std::str::from_utf8(&bytes[10..header]).unwrap();
        assert!(text.contains("'<i4'") && text.contains("'fortran_order': False"), "{text}");
        assert!(text.contains("'shape': (3, 2"), "{text}");
        assert_eq!(bytes[header..], [5i32, 6, 7, 8, 9, 10].map(i32::to_le_bytes).concat());
    }
}
