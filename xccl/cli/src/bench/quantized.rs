//! What a wire format makes of the benchmark's rows, in the plainest way and without the library: the reference that
//! `--verify` compares with, and the quantized tokens of an engine that has made them itself.

use xccl::{Element, WireFormat};

/// One row: as it travels, and as it is decoded.
pub struct Row<E> {
    pub values: Vec<u8>,
    pub scales: Vec<f32>,
    pub decoded: Vec<E>,
}

/// Channels that share a scale in fp8.
const BLOCK: usize = 128;

/// Finite magnitudes of an FP8 format, by code.
fn magnitudes(format: WireFormat) -> Vec<f32> {
    let (mantissa, bias, codes) = if format == WireFormat::Fp8E5m2 { (2, 15, 0x7c) } else { (3, 7, 0x7f) };
    let value = |code: i32| {
        let (exponent, fraction) = (code >> mantissa, (code % (1 << mantissa)) as f32);
        let hidden = if exponent == 0 { 0.0 } else { (1 << mantissa) as f32 };
        (hidden + fraction) * 2f32.powi(exponent.max(1) - bias - mantissa)
    };
    (0..codes).map(value).collect()
}

/// The code next to a magnitude, ties to the even one.
fn nearest(magnitudes: &[f32], x: f32) -> usize {
    let above = magnitudes.partition_point(|&m| m < x).min(magnitudes.len() - 1);
    let below = above.saturating_sub(1);
    let (down, up) = (f64::from(x) - f64::from(magnitudes[below]), f64::from(magnitudes[above]) - f64::from(x));
    if down < up || (down == up && below % 2 == 0) { below } else { above }
}

/// Quantizes a row of finite elements.
pub fn quantize<E: Element>(format: WireFormat, row: &[E]) -> Row<E> {
    let (block, most) = match format {
        WireFormat::Native => {
            return Row { values: bytemuck::cast_slice(row).to_vec(), scales: vec![], decoded: row.to_vec() };
        }
        WireFormat::Int8 => (row.len(), 127.0),
        WireFormat::Fp8E4m3 => (BLOCK, 448.0),
        WireFormat::Fp8E5m2 => (BLOCK, 57344.0),
    };
    let magnitudes = magnitudes(format);
    let mut made = Row { values: vec![], scales: vec![], decoded: vec![] };
    for row in row.chunks(block) {
        let amax = row.iter().fold(0.0f32, |most, x| most.max(x.to_f32().abs()));
        let scale = (amax / most).max(f32::MIN_POSITIVE);
        for x in row {
            let y = x.to_f32() * (1.0 / scale);
            let (code, value) = match format {
                WireFormat::Int8 => (y.round_ties_even() as i8 as u8, f32::from(y.round_ties_even() as i8)),
                _ => {
                    let code = nearest(&magnitudes, y.abs());
                    let sign = if y.is_sign_negative() { 0x80 } else { 0 };
                    (code as u8 | sign, magnitudes[code].copysign(y))
                }
            };
            made.values.push(code);
            made.decoded.push(E::from_f32(value * scale));
        }
        made.scales.push(scale);
    }
    made
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn known_numbers_are_quantized_as_the_formats_have_them() {
        let row: Vec<bf16> = [448.0, -1.0, 0.0, 17.0, 19.0, 2f32.powi(-10)].map(bf16::from_f32).to_vec();
        let e4m3 = quantize(WireFormat::Fp8E4m3, &row);
        // 17 and 19 lie between 16, 18 and 20: ties go to the even codes.
        assert_eq!((e4m3.values, e4m3.scales), (vec![0x7e, 0xb8, 0x00, 0x58, 0x5a, 0x00], vec![1.0]));
        assert_eq!(e4m3.decoded, [448.0, -1.0, 0.0, 16.0, 20.0, 0.0].map(bf16::from_f32));
        let int8 = quantize(WireFormat::Int8, &[127.0f32, 0.5, 1.5, -2.5]);
        assert_eq!((int8.values, int8.scales), (vec![127, 0, 2, -2i8 as u8], vec![1.0]));
    }
}
