//! Against a plain reference: tables and f64, without the code under test.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

/// A finite FP8 code's value, as the specification's formula has it.
fn fp8_value(format: WireFormat, code: u8) -> f64 {
    let (mantissa, bias) = if format == WireFormat::Fp8E4m3 { (3, 7) } else { (2, 15) };
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, fraction) = (i32::from(code & 0x7f) >> mantissa, f64::from(code & ((1 << mantissa) - 1)));
    let fraction = fraction / f64::from(1 << mantissa);
    match exponent {
        0 => sign * fraction * 2f64.powi(1 - bias),
        _ => sign * (1.0 + fraction) * 2f64.powi(exponent - bias),
    }
}

fn is_finite_code(format: WireFormat, code: u8) -> bool {
    (code & 0x7f) < if format == WireFormat::Fp8E4m3 { 0x7f } else { 0x7c }
}

/// The code next to `x`, ties to the even one, by looking at all of them.
fn nearest(format: WireFormat, x: f64) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let codes = (0..0x7fu8).filter(|&code| is_finite_code(format, code));
    let distance = |code: u8| (fp8_value(format, code) - x.abs()).abs();
    let best = codes.min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))));
    sign | best.unwrap()
}

fn round_half_even(x: f64) -> f64 {
    let down = x.floor();
    match x - down {
        d if d < 0.5 => down,
        d if d > 0.5 => down + 1.0,
        _ if down % 2.0 == 0.0 => down,
        _ => down + 1.0,
    }
}

/// What this processor has, and NEON in any case: emulated, where it is missing.
fn all_kernels() -> Vec<Kernels> {
    let mut all = Kernels::available();
    if !all.contains(&Kernels::Neon) {
        all.push(Kernels::Neon);
    }
    all
}

struct Encoded {
    values: Vec<u8>,
    scales: Vec<f32>,
}

impl Encoded {
    /// As it lies in the outbox.
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.values.clone();
        bytes.resize(self.values.len().next_multiple_of(16), 0xaa);
        self.scales.iter().for_each(|s| bytes.extend(s.to_ne_bytes()));
        bytes
    }
}

/// The specification, one element after the other. A product in f64 of two f32 is exact, so that one rounding is made where
/// the specification says.
fn plainly(format: WireFormat, row: &[f32], smooth: Option<&[f32]>) -> Encoded {
    let products = |i: usize| smooth.map_or(row[i], |s| (f64::from(row[i]) * f64::from(s[i])) as f32);
    let xs: Vec<f32> = (0..row.len()).map(products).collect();
    let (most, block) = match format {
        WireFormat::Int8 => (127.0, row.len()),
        WireFormat::Fp8E4m3 => (448.0, 128),
        _ => (57344.0, 128),
    };
    let (mut values, mut scales) = (vec![], vec![]);
    for xs in xs.chunks(block) {
        let amax = xs.iter().filter(|x| x.is_finite()).fold(0.0f64, |most, &x| most.max(f64::from(x).abs()));
        let mut scale = ((amax / most) as f32).max(2f32.powi(-126));
        let inverse = f64::from((1.0 / f64::from(scale)) as f32);
        let broken = format == WireFormat::Int8 && xs.iter().any(|x| !x.is_finite());
        for &x in xs {
            let y = f64::from((f64::from(x) * inverse) as f32);
            values.push(match format {
                WireFormat::Int8 if broken => 0,
                WireFormat::Int8 => round_half_even(y).clamp(-127.0, 127.0) as i8 as u8,
                _ if x.is_nan() => 0x7f,
                WireFormat::Fp8E4m3 if x.is_infinite() => 0x7f,
                _ if x == f32::INFINITY => 0x7c,
                _ if x == f32::NEG_INFINITY => 0xfc,
                _ => nearest(format, y),
            });
        }
        if broken {
            scale = f32::NAN;
        }
        scales.push(scale);
    }
    Encoded { values, scales }
}

/// What a row is decoded to.
fn decoded_plainly<E: Element>(format: WireFormat, encoded: &Encoded) -> Vec<E> {
    let block = if format == WireFormat::Int8 { usize::MAX } else { 128 };
    let value = |(i, &code): (usize, &u8)| {
        let scale = f64::from(encoded.scales[i / block]);
        let value = match format {
            WireFormat::Int8 => f64::from(code as i8),
            _ if is_finite_code(format, code) => fp8_value(format, code),
            WireFormat::Fp8E5m2 if code == 0x7c => f64::INFINITY,
            WireFormat::Fp8E5m2 if code == 0xfc => f64::NEG_INFINITY,
            _ => f64::NAN,
        };
        let x = (value * scale) as f32;
        E::from_f32(if x.is_nan() { f32::from_bits(0x7fc0_0000) } else { x })
    };
    encoded.values.iter().enumerate().map(value).collect()
}

fn encoded<E: Element>(kernels: Kernels, format: WireFormat, row: &[E], smooth: Option<&[f32]>) -> Encoded {
    let mut to = Encoded { values: vec![0x55; row.len()], scales: vec![7.0; format.scales(row.len())] };
    encode((kernels, format), row, smooth, &mut to.values, &mut to.scales);
    to
}

fn bits(scales: &[f32]) -> Vec<u32> {
    scales.iter().map(|s| s.to_bits()).collect()
}

const FORMATS: [WireFormat; 3] = [WireFormat::Int8, WireFormat::Fp8E4m3, WireFormat::Fp8E5m2];

/// Encodes with every kernel and decodes what came of it to every type; all as the reference.
fn check<E: Element>(row: &[E], smooth: Option<&[f32]>) {
    let wide: Vec<f32> = row.iter().map(|x| x.to_f32()).collect();
    for format in FORMATS.into_iter().filter(|&format| smooth.is_none() || format == WireFormat::Int8) {
        let expected = plainly(format, &wide, smooth);
        for kernels in all_kernels() {
            let found = encoded(kernels, format, row, smooth);
            assert_eq!(bits(&found.scales), bits(&expected.scales), "{kernels} {format} scales");
            for (i, (a, b)) in found.values.iter().zip(&expected.values).enumerate() {
                assert_eq!(
                    a,
                    b,
                    "{kernels} {format} {} element {i}: {} of scale {:?}",
                    E::DTYPE,
                    wide[i],
                    expected.scales
                );
            }
            check_decoding::<f32>(kernels, format, &expected);
            check_decoding::<f16>(kernels, format, &expected);
            check_decoding::<bf16>(kernels, format, &expected);
        }
    }
}

fn check_decoding<E: Element>(kernels: Kernels, format: WireFormat, encoded: &Encoded) {
    let (bytes, expected) = (encoded.bytes(), decoded_plainly::<E>(format, encoded));
    let mut found = vec![E::from_f32(-3.0); expected.len()];
    decode((kernels, format), Row::from(bytes.as_slice()), &mut found);
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        let code = encoded.values[i];
        assert_eq!(
            bytemuck::bytes_of(a),
            bytemuck::bytes_of(b),
            "{kernels} {format} to {} element {i}: code {code:#x}, scales {:?}, {} instead of {}",
            E::DTYPE,
            encoded.scales,
            a.to_f32(),
            b.to_f32()
        );
    }
}

/// In one row all of them, with infinities and NaN; then finite ones with an `amax` that puts scales in other places, one
/// octave after the other, and in blocks of like numbers.
#[test]
fn every_bf16_is_encoded_as_the_reference_says() {
    let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    check(&all, None);
    let finite: Vec<bf16> = all.into_iter().filter(|x| x.is_finite()).collect();
    check(&finite, None);
    for exponent in (-126..128).step_by(9) {
        let limit = 2f32.powi(exponent) * 1.37;
        let below: Vec<bf16> = finite.iter().copied().filter(|x| x.to_f32().abs() <= limit).collect();
        // Each block gets the limit as its largest, and so has one scale for all numbers below.
        let rows = below.chunks(127).flat_map(|block| block.iter().copied().chain([bf16::from_f32(limit)]));
        check(&rows.collect::<Vec<_>>(), None);
    }
}

#[test]
fn every_code_is_decoded_as_the_reference_says_with_any_kind_of_scale() {
    let codes: Vec<u8> = (0..=255).collect();
    let scales = [
        0.0,
        -0.0,
        1.0,
        -0.37,
        1e-45,
        1e-40,
        1.2e-38,
        7.8e-31,
        7.9e-31,
        1e-20,
        3.3e-3,
        1e6,
        7.7e35,
        f32::MAX,
        f32::INFINITY,
        f32::NAN,
        -f32::NAN,
    ];
    for format in FORMATS {
        for scale in scales {
            let encoded = Encoded { values: codes.clone(), scales: vec![scale; format.scales(codes.len())] };
            for kernels in all_kernels() {
                check_decoding::<f32>(kernels, format, &encoded);
                check_decoding::<f16>(kernels, format, &encoded);
                check_decoding::<bf16>(kernels, format, &encoded);
            }
        }
    }
}

#[test]
fn every_finite_code_with_scale_one_is_its_own_encoding() {
    for format in [WireFormat::Fp8E4m3, WireFormat::Fp8E5m2] {
        let codes: Vec<u8> = (0..=255).filter(|&code| is_finite_code(format, code)).collect();
        let most = *codes.iter().filter(|&&code| code < 0x80).max().unwrap();
        for kernels in all_kernels() {
            for codes in codes.chunks(127) {
                let row: Vec<u8> = codes.iter().copied().chain([most]).collect();
                let values: Vec<f32> = row.iter().map(|&code| fp8_value(format, code) as f32).collect();
                let again = encoded(kernels, format, &values, None);
                assert_eq!((again.values, again.scales), (row, vec![1.0]), "{kernels} {format}");
            }
        }
    }
    let row: Vec<f32> = (-127..=127).map(|x| x as f32).collect();
    for kernels in all_kernels() {
        let again = encoded(kernels, WireFormat::Int8, &row, None);
        assert_eq!(again.values, (-127..=127).map(|x: i8| x as u8).collect::<Vec<_>>());
        assert_eq!(again.scales, [1.0]);
    }
}

#[test]
fn zeros_and_what_is_not_finite_are_as_specified() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for kernels in all_kernels() {
        for format in FORMATS {
            let zeros = encoded(kernels, format, &[0.0f32; 5], None);
            assert_eq!((zeros.values, zeros.scales), (vec![0; 5], vec![f32::MIN_POSITIVE]), "{kernels} {format}");
        }
        let row = [1.0f32, nan, -2.0, inf, -inf];
        let int8 = encoded(kernels, WireFormat::Int8, &row, None);
        assert_eq!((int8.values, bits(&int8.scales)), (vec![0; 5], vec![0x7fc0_0000]));
        let e4m3 = encoded(kernels, WireFormat::Fp8E4m3, &row, None);
        assert_eq!((e4m3.values[1..].to_vec(), e4m3.scales), (vec![0x7f, 0xfe, 0x7f, 0x7f], vec![2.0 / 448.0]));
        let e5m2 = encoded(kernels, WireFormat::Fp8E5m2, &row, None);
        assert_eq!((e5m2.values[1..].to_vec(), e5m2.scales), (vec![0x7f, 0xfb, 0x7c, 0xfc], vec![2.0 / 57344.0]));
        let smoothed = encoded(kernels, WireFormat::Int8, &[1e38f32, 1.0], Some(&[1e10, 1.0]));
        assert_eq!((smoothed.values, bits(&smoothed.scales)), (vec![0; 2], vec![0x7fc0_0000]));
    }
}

/// Numbers of all sizes and kinds, in rows that are mostly of one size.
fn row() -> impl Strategy<Value = Vec<f32>> {
    let special = prop::sample::select(vec![
        0.0,
        -0.0,
        f32::MIN_POSITIVE,
        1e-45,
        -1e-41,
        1e-36,
        f32::MAX,
        f32::MIN,
        448.0,
        464.0,
        57344.0,
        61440.0,
        2f32.powi(-9),
        2f32.powi(-10),
    ]);
    let wild = prop_oneof![4 => special, 1 => any::<u32>().prop_map(f32::from_bits)];
    (-140i32..128, any::<bool>()).prop_flat_map(move |(exponent, with_wild)| {
        let tame = (-2f32..2.0).prop_map(move |x| x * 2f32.powi(exponent / 2) * 2f32.powi(exponent - exponent / 2));
        let element = prop_oneof![60 => tame, u32::from(with_wild) => wild.clone()];
        prop::collection::vec(element, 1..400)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn any_row_is_encoded_and_decoded_as_the_reference_says(row in row(), offset in 0usize..4) {
        let offset = offset.min(row.len() - 1);
        check(&row[offset..], None);
        let narrow: Vec<bf16> = row.iter().map(|&x| bf16::from_f32(x)).collect();
        check(&narrow[offset..], None);
        let narrow: Vec<f16> = row.iter().map(|&x| f16::from_f32(x)).collect();
        check(&narrow[offset..], None);
    }

    #[test]
    fn smooth_scales_are_multiplied_in_before(row in row(), smooth in prop::collection::vec(-4f32..4.0, 400)) {
        check(&row, Some(&smooth[..row.len()]));
        let narrow: Vec<bf16> = row.iter().map(|&x| bf16::from_f32(x)).collect();
        check(&narrow, Some(&smooth[..row.len()]));
    }
}
