//! Exchanges whose rows travel encoded, against a plain reference, which is written without the library.

use anyhow::{Result, ensure};
use half::{bf16, f16};
use xccl::placement::Placement;
use xccl::{
    Communicator, DType, Element, Error, ExpertBatch, Moe, MoeConfig, Reduction, Routing, ScaleLayout, SmoothScales,
    WireFormat,
};

use crate::moe::{Case, Homes};

/// How the experts' side takes the rows.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    CopyRow,
    BySource,
    ExpertMajor,
    Padded,
    InPlace,
    WireExpertMajor(ScaleLayout),
    WirePadded(ScaleLayout),
}

const FORMS: [Form; 9] = [
    Form::CopyRow,
    Form::BySource,
    Form::ExpertMajor,
    Form::Padded,
    Form::InPlace,
    Form::WireExpertMajor(ScaleLayout::RowMajor),
    Form::WireExpertMajor(ScaleLayout::ColumnMajor),
    Form::WirePadded(ScaleLayout::RowMajor),
    Form::WirePadded(ScaleLayout::ColumnMajor),
];

/// A row as it should travel, and what should come out of it.
#[derive(Clone)]
struct Expected {
    values: Vec<u8>,
    scales: Vec<f32>,
    decoded: Vec<f32>,
}

/// Finite magnitudes of an FP8 format by code, and the code of infinity.
fn magnitudes(format: WireFormat) -> Vec<f64> {
    let (mantissa, bias, codes) = if format == WireFormat::Fp8E4m3 { (3, 7, 0x7f) } else { (2, 15, 0x7c) };
    let value = |code: u32| {
        let (exponent, fraction) = ((code >> mantissa) as i32, f64::from(code % (1 << mantissa)));
        let steps = if exponent == 0 { fraction } else { fraction + f64::from(1 << mantissa) };
        steps * 2f64.powi(exponent.max(1) - bias - mantissa)
    };
    (0..codes).map(value).collect()
}

fn plainly<E: Element>(format: WireFormat, row: &[E], smooth: Option<&[f32]>) -> Expected {
    let xs: Vec<f32> = match smooth {
        None => row.iter().map(|x| x.to_f32()).collect(),
        Some(smooth) => row.iter().zip(smooth).map(|(x, s)| x.to_f32() * s).collect(),
    };
    let (block, most) = match format {
        WireFormat::Native => {
            return Expected { values: bytemuck::cast_slice(row).to_vec(), scales: vec![], decoded: xs };
        }
        WireFormat::Int8 => (xs.len(), 127.0),
        WireFormat::Fp8E4m3 => (128, 448.0),
        WireFormat::Fp8E5m2 => (128, 57344.0),
    };
    let (mut values, mut scales, mut decoded) = (vec![], vec![], vec![]);
    for xs in xs.chunks(block) {
        let finite = xs.iter().filter(|x| x.is_finite());
        let mut scale = (finite.fold(0.0f32, |most, x| most.max(x.abs())) / most).max(f32::MIN_POSITIVE);
        let inverse = 1.0 / scale;
        if format == WireFormat::Int8 && xs.iter().any(|x| !x.is_finite()) {
            scale = f32::NAN;
        }
        for &x in xs {
            let y = x * inverse;
            let sign = if y.is_sign_negative() { 0x80 } else { 0 };
            let (code, value) = match format {
                _ if format == WireFormat::Int8 && scale.is_nan() => (0, 0.0),
                // An integer has no negative zero.
                WireFormat::Int8 => (y.round_ties_even() as i8 as u8, y.round_ties_even() as i8 as f32),
                _ if x.is_nan() => (0x7f, f32::NAN),
                WireFormat::Fp8E5m2 if x.is_infinite() => (0x7c | sign, x),
                _ if x.is_infinite() => (0x7f, f32::NAN),
                _ => {
                    let all = magnitudes(format);
                    let distance = |code: usize| (all[code] - f64::from(y).abs()).abs();
                    let by = |a: &usize, b: &usize| distance(*a).total_cmp(&distance(*b)).then((a % 2).cmp(&(b % 2)));
                    let code = (0..all.len()).min_by(by).unwrap_or(0);
                    (code as u8 | sign, all[code] as f32 * if sign == 0 { 1.0 } else { -1.0 })
                }
            };
            values.push(code);
            let x = E::from_f32(value * scale).to_f32();
            decoded.push(if x.is_nan() { f32::NAN } else { x });
        }
        scales.push(scale);
    }
    Expected { values, scales, decoded }
}

/// Rows of all kinds: ordinary, all zeros, tiny, huge, and with something that is not finite.
fn value<E: Element>(rank: usize, token: usize, column: usize, seed: usize) -> E {
    let x = ((rank * 37 + token * 11 + column * 3 + seed) % 97) as f32 / 8.0 - 6.0;
    E::from_f32(match (rank + token + seed) % 6 {
        1 => 0.0 * x,
        2 => x * 1e-7 * if E::DTYPE == DType::F16 { 1.0 } else { 1e-31 },
        3 => x * 1e3 * if E::DTYPE == DType::F16 { 1.0 } else { 1e33 },
        4 if column == 5 => [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][token % 3],
        _ => x * 1.5f32.powi((column % 140 / 7) as i32 - 10),
    })
}

fn smooth_of(config: &MoeConfig, expert: usize) -> Option<Vec<f32>> {
    let factor = |column: usize| 0.5 + ((expert * 5 + column) % 23) as f32 / 16.0;
    config.smooth.as_ref().map(|_| (0..config.hidden).map(factor).collect())
}

struct Exchanged<'a> {
    case: &'a Case,
    /// By source, token and expert.
    rows: std::collections::HashMap<(usize, usize, usize), Expected>,
}

impl Exchanged<'_> {
    fn expected<E: Element>(&mut self, source: usize, token: usize, expert: usize) -> Expected {
        let (config, seed) = (&self.case.config, self.case.seed);
        let expert = if config.smooth.is_some() { expert } else { 0 };
        let row = || {
            let row: Vec<E> = (0..config.hidden).map(|c| value(source, token, c, seed)).collect();
            plainly(config.wire, &row, smooth_of(config, expert).as_deref())
        };
        self.rows.entry((source, token, expert)).or_insert_with(row).clone()
    }
}

pub(crate) fn every_format_in_every_form(comm: &Communicator) -> Result<()> {
    fn cases<E: Element>(comm: &Communicator, hidden: usize) -> Result<()> {
        let uneven: Vec<usize> = (0..11).map(|e| (e * e) % comm.world_size()).collect();
        let uneven = Placement::of_ranks(&uneven, comm.world_size())?;
        let shape = MoeConfig { placement: Some(uneven), ..MoeConfig::new(7, hidden, 3, 11, E::DTYPE) };
        let mut config = MoeConfig { wire: WireFormat::Int8, ..shape.clone() };
        config.smooth = Some(SmoothScales::new(vec![1.0; 11 * hidden]));
        let smooth: Vec<f32> = (0..11).filter_map(|e| smooth_of(&config, e)).flatten().collect();
        config.smooth = Some(SmoothScales::new(smooth));
        let mut configs = vec![config];
        for wire in [WireFormat::Native, WireFormat::Int8, WireFormat::Fp8E4m3, WireFormat::Fp8E5m2] {
            configs.push(MoeConfig { wire, ..shape.clone() });
        }
        configs.push(MoeConfig { wire: WireFormat::Fp8E4m3, reduction: Reduction::PerRank, ..shape });
        for config in configs {
            let moe = Moe::new(comm, config.clone())?;
            for (seed, form) in FORMS.into_iter().enumerate() {
                let case = Case { config: config.clone(), world: comm.world_size(), seed };
                exchange::<E>(comm, &moe, &case, form)?;
            }
        }
        Ok(())
    }
    cases::<bf16>(comm, 256)?;
    cases::<f32>(comm, 300)?;
    cases::<f16>(comm, 101)
}

fn exchange<E: Element>(comm: &Communicator, moe: &Moe, case: &Case, form: Form) -> Result<()> {
    let (rank, homes) = (comm.rank(), Homes::of(comm, moe)?);
    let (hidden, config) = (case.config.hidden, &case.config);
    let (_, ids, weights, active) = case.input::<E>(rank);
    let routing = Routing::new(&ids, &weights).active(&active);
    let count = case.tokens(rank);
    let mut exchanged = Exchanged { case, rows: Default::default() };
    let sent = if case.seed % 3 == 1 && config.smooth.is_none() {
        // The engine has quantized its tokens.
        let mut rows = moe.input_wire_rows(count)?;
        for t in 0..rows.len() {
            let expected = exchanged.expected::<E>(rank, t, 0);
            let (values, scales) = rows.row(t);
            values.copy_from_slice(&expected.values);
            scales.copy_from_slice(&expected.scales);
        }
        moe.dispatch_send_wire_rows(rows, &routing)?
    } else {
        let tokens: Vec<E> = (0..count).flat_map(|t| (0..hidden).map(move |c| value(rank, t, c, case.seed))).collect();
        moe.dispatch_send(&tokens, &routing)?
    };
    let mut batch = match form {
        Form::BySource => {
            let mut arrivals = moe.dispatch_recv_by_source(&sent)?;
            let mut row = vec![E::from_f32(0.0); hidden];
            while let Some(source) = arrivals.next_source()? {
                for i in arrivals.rows_of(source) {
                    let (token, expert) = (arrivals.row(i).token, arrivals.local_experts()[arrivals.row(i).expert]);
                    arrivals.copy_row(i, &mut row)?;
                    same_elements(&row, &exchanged.expected::<E>(source, token, expert).decoded)?;
                }
            }
            arrivals.into_batch()?
        }
        _ => moe.dispatch_recv(&sent)?,
    };
    let expected = case.rows(batch.local_experts());
    let found: Vec<_> = batch.rows().map(|r| (batch.local_experts()[r.expert], r.source, r.token)).collect();
    ensure!(found == expected, "rows are {found:?}, expected {expected:?}");
    let expected: Vec<Expected> = expected.into_iter().map(|(e, s, t)| exchanged.expected::<E>(s, t, e)).collect();
    take_rows::<E>(config, &mut batch, &expected, form)?;

    for (i, row) in expected.iter().enumerate() {
        let expert = batch.local_experts()[batch.row(i).expert] as i64;
        let output = batch.output_row::<E>(i)?;
        output.iter_mut().zip(&row.decoded).for_each(|(y, &x)| *y = case.expert(expert, E::from_f32(x)));
    }
    moe.combine_send(batch)?;
    let mut out = vec![E::from_f32(-1.0); count * hidden];
    moe.combine_recv(sent, &mut out)?;
    for (t, out) in out.chunks_exact(hidden).enumerate() {
        let nobody = vec![-1; config.topk];
        let ids = if active[t] { &ids[t * config.topk..][..config.topk] } else { &nobody };
        let outputs = |&id: &i64| match id {
            -1 => vec![],
            id => {
                let decoded = exchanged.expected::<E>(rank, t, id as usize).decoded;
                decoded.iter().map(|&x| case.expert(id, E::from_f32(x)).to_f32()).collect()
            }
        };
        let outputs: Vec<Vec<f32>> = ids.iter().map(outputs).collect();
        let sum = |c: usize| {
            homes.sum::<E>(config.reduction, rank, ids, |k| weights[t * config.topk + k] * outputs[k][c]).to_f32()
        };
        same_elements(out, &(0..hidden).map(sum).collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Bit for bit, but that a NaN is a NaN.
fn same_elements<E: Element>(found: &[E], expected: &[f32]) -> Result<()> {
    ensure!(found.len() == expected.len(), "{} elements instead of {}", found.len(), expected.len());
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        let a = a.to_f32();
        ensure!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "element {i}: {a} instead of {b}");
    }
    Ok(())
}

fn same_row(values: &[u8], scales: &[f32], expected: &Expected) -> Result<()> {
    ensure!(values == expected.values, "values {values:?} instead of {:?}", expected.values);
    same_elements(scales, &expected.scales)
}

/// Takes the rows in one form, and compares.
fn take_rows<E: Element>(
    config: &MoeConfig,
    batch: &mut ExpertBatch<'_>,
    expected: &[Expected],
    form: Form,
) -> Result<()> {
    let (hidden, align) = (config.hidden, 3);
    let capacity = batch.counts().iter().copied().max().unwrap_or(0) as usize + 1;
    let padded = matches!(form, Form::Padded | Form::WirePadded(_));
    let rows = if padded { batch.counts().len() * capacity } else { batch.aligned_rows(align) };
    let mut places = vec![];
    let mut end = 0;
    for &count in batch.counts() {
        places.extend((0..count as usize).map(|i| end + i));
        end += if padded { capacity } else { (count as usize).next_multiple_of(align) };
    }
    let (bytes, per_row) = (config.wire.value_bytes(hidden, E::DTYPE), config.wire.scales(hidden));
    match form {
        Form::BySource => {}
        Form::CopyRow => {
            let mut row = vec![E::from_f32(-3.0); hidden];
            for (i, expected) in expected.iter().enumerate() {
                batch.copy_row(i, &mut row)?;
                same_elements(&row, &expected.decoded)?;
            }
        }
        Form::InPlace => {
            for (i, expected) in expected.iter().enumerate() {
                // SAFETY: the senders keep the protocol: this program is all ranks.
                let row = unsafe { batch.row_wire(i) };
                same_row(row.values, row.scales, expected)?;
            }
        }
        Form::ExpertMajor | Form::Padded => {
            let mut copied = vec![E::from_f32(-3.0); rows * hidden];
            match padded {
                true => batch.copy_padded(&mut copied, capacity)?,
                false => batch.copy_into(&mut copied, align)?,
            }
            for (place, expected) in places.into_iter().zip(expected) {
                same_elements(&copied[place * hidden..][..hidden], &expected.decoded)?;
            }
        }
        Form::WireExpertMajor(layout) | Form::WirePadded(layout) => {
            let (parts, part) = if padded { (batch.counts().len(), capacity) } else { (1, rows) };
            let mut values = vec![0x33; rows * bytes];
            let mut scales = vec![-7.0f32; parts * layout.elements(part, per_row)];
            if per_row > 0 && rows > 0 {
                let short = &mut scales.clone()[1..];
                let refused = match padded {
                    true => batch.copy_wire_padded(&mut values, short, layout, capacity),
                    false => batch.copy_wire_into(&mut values, short, layout, align),
                };
                ensure!(matches!(refused, Err(Error::Shape { .. })), "{refused:?}");
            }
            match padded {
                true => batch.copy_wire_padded(&mut values, &mut scales, layout, capacity)?,
                false => batch.copy_wire_into(&mut values, &mut scales, layout, align)?,
            }
            let column = part.next_multiple_of(4);
            for (&place, expected) in places.iter().zip(expected) {
                let scale = |block: usize| match layout {
                    ScaleLayout::RowMajor => scales[place * per_row + block],
                    ScaleLayout::ColumnMajor => {
                        scales[place / part.max(1) * column * per_row + block * column + place % part.max(1)]
                    }
                };
                let scales: Vec<f32> = (0..per_row).map(scale).collect();
                same_row(&values[place * bytes..][..bytes], &scales, expected)?;
            }
            let untouched = (0..rows).filter(|row| !places.contains(row));
            for row in untouched {
                ensure!(values[row * bytes..][..bytes].iter().all(|&v| v == 0x33), "row {row} in between was written");
            }
            let left = scales.iter().filter(|&&s| s == -7.0).count();
            ensure!(left == scales.len() - places.len() * per_row, "{left} scales are left as they were");
        }
    }
    Ok(())
}

/// Calls that do not go with a wire format say so, and can be followed by those that do.
pub(crate) fn refused(comm: &Communicator) -> Result<()> {
    let shape = MoeConfig::new(4, 64, 1, 4, DType::F32);
    let smooth = |n: usize, value: f32| Some(SmoothScales::new(vec![value; n]));
    for (config, named) in [
        (MoeConfig { smooth: smooth(256, 1.0), ..shape.clone() }, "int8"),
        (MoeConfig { wire: WireFormat::Fp8E4m3, smooth: smooth(256, 1.0), ..shape.clone() }, "fp8-e4m3"),
        (MoeConfig { wire: WireFormat::Int8, smooth: smooth(255, 1.0), ..shape.clone() }, "255"),
        (MoeConfig { wire: WireFormat::Int8, smooth: smooth(256, f32::INFINITY), ..shape.clone() }, "inf"),
    ] {
        let text = Moe::new(comm, config).err().map(|err| err.to_string()).unwrap_or_default();
        ensure!(text.contains(named), "{text:?} does not name {named}");
    }

    let config = MoeConfig { wire: WireFormat::Int8, smooth: smooth(256, 0.5), ..shape.clone() };
    let moe = Moe::new(comm, config)?;
    let rows = moe.input_wire_rows(1).map(|_| ());
    ensure!(matches!(rows, Err(Error::Wire { call: "input_wire_rows", .. })), "{rows:?}");

    let moe = Moe::new(comm, MoeConfig { wire: WireFormat::Fp8E4m3, ..shape.clone() })?;
    let rows = moe.input_rows::<f32>(1).map(|_| ());
    ensure!(matches!(rows, Err(Error::Wire { call: "input_rows", .. })), "{rows:?}");
    let sent = moe.dispatch_send(&[448.0f32; 64], &Routing::new(&[comm.rank() as i32 % 4], &[1.0]))?;
    let mut batch = loop {
        // A rank that sees the others' refusal of before tries again.
        match moe.dispatch_recv(&sent) {
            Err(Error::PeerRefused { .. }) => std::thread::yield_now(),
            other => break other?,
        }
    };
    for i in 0..batch.len() {
        // SAFETY: refused, so nothing is read.
        let slice = unsafe { batch.row_slice::<f32>(i) }.map(|_| ());
        ensure!(matches!(slice, Err(Error::Wire { call: "row_slice", .. })), "{slice:?}");
    }
    let refused = batch.copy_wire_into(&mut [0; 64], &mut [0.0; 4], ScaleLayout::ColumnMajor, usize::MAX);
    ensure!(matches!(refused, Err(Error::Shape { .. })) || batch.is_empty(), "{refused:?}");
    let outputs = vec![1.0f32; batch.len() * 64];
    moe.combine_send_from(batch, &outputs)?;
    let mut out = [0.0f32; 64];
    moe.combine_recv(sent, &mut out)?;
    ensure!(out == [1.0; 64], "{out:?}");

    if comm.world_size() > 1 {
        let differs = |config| match Moe::new(comm, config).map(|_| ()) {
            Err(Error::Mismatch { theirs, ours, .. }) if theirs != ours => Ok(()),
            other => Err(anyhow::anyhow!("{other:?} instead of a mismatch")),
        };
        let odd = comm.rank() % 2 == 1;
        let wire = if odd { WireFormat::Int8 } else { WireFormat::Native };
        differs(MoeConfig { wire, ..shape.clone() })?;
        let value = if odd { 0.5 } else { 0.25 };
        differs(MoeConfig { wire: WireFormat::Int8, smooth: smooth(256, value), ..shape })?;
    }
    Ok(())
}
