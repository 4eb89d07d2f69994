//! Rows that travel encoded: quantized by the engine, or handed over as they are.

use std::ffi::c_void;
use std::ptr::null_mut;

use xccl::{ScaleLayout, WireFormat};

use super::*;
use crate::boundary::{Failure, Out, Outcome, guard, slice_mut};
use crate::result::xcclResult_t;

/** How token rows travel in a dispatch; outputs keep the element type. The numbers are fixed. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclWireFormat_t {
    /// The elements as they are, without scales.
    xcclWireNative = 0,
    /// int8_t with one scale per row: the row's largest magnitude / 127. A row with NaN or an infinity has scale NaN.
    xcclWireInt8 = 1,
    /// OCP FP8 E4M3 with one scale per 128 channels: their largest magnitude / 448. NaN and infinities become NaN.
    xcclWireFp8E4m3 = 2,
    /// OCP FP8 E5M2 with one scale per 128 channels: their largest magnitude / 57344.
    xcclWireFp8E5m2 = 3,
}

/** How the scales of several rows lie beside each other. The numbers are fixed. */
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum xcclScaleLayout_t {
    /// [rows, scales per row].
    xcclScaleRowMajor = 0,
    /// [scales per row, rows padded to a multiple of 4], as block-scaled GEMMs load them.
    xcclScaleColumnMajor = 1,
}

pub(super) fn wire_of(wire: u32) -> Outcome<WireFormat> {
    match wire {
        w if w == xcclWireFormat_t::xcclWireNative as u32 => Ok(WireFormat::Native),
        w if w == xcclWireFormat_t::xcclWireInt8 as u32 => Ok(WireFormat::Int8),
        w if w == xcclWireFormat_t::xcclWireFp8E4m3 as u32 => Ok(WireFormat::Fp8E4m3),
        w if w == xcclWireFormat_t::xcclWireFp8E5m2 as u32 => Ok(WireFormat::Fp8E5m2),
        other => Err(Failure::argument(format!(
            "config->wire is {other}: expected xcclWireNative (0), xcclWireInt8 (1), xcclWireFp8E4m3 (2) or \
             xcclWireFp8E5m2 (3)"
        ))),
    }
}

pub(crate) fn number_of(wire: WireFormat) -> u32 {
    let wire = match wire {
        WireFormat::Native => xcclWireFormat_t::xcclWireNative,
        WireFormat::Int8 => xcclWireFormat_t::xcclWireInt8,
        WireFormat::Fp8E4m3 => xcclWireFormat_t::xcclWireFp8E4m3,
        WireFormat::Fp8E5m2 => xcclWireFormat_t::xcclWireFp8E5m2,
    };
    wire as u32
}

fn layout_of(layout: u32) -> Outcome<ScaleLayout> {
    match layout {
        l if l == xcclScaleLayout_t::xcclScaleRowMajor as u32 => Ok(ScaleLayout::RowMajor),
        l if l == xcclScaleLayout_t::xcclScaleColumnMajor as u32 => Ok(ScaleLayout::ColumnMajor),
        other => Err(Failure::argument(format!(
            "layout is {other}: expected xcclScaleRowMajor (0) or xcclScaleColumnMajor (1)"
        ))),
    }
}

/// As xcclMoeInputRows, in the handle's wire format, for engines that hold quantized tokens: row t's values begin at
/// (char *)*values + t * *row_bytes, aligned to 64 bytes, and its scales at (char *)*scales + t * *row_bytes; *scales is null
/// where the format has none. xcclInvalidUsage with smooth scales. Blocks as xcclMoeDispatchSend does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeInputWireRows(
    num_tokens: usize,
    values: *mut *mut c_void,
    scales: *mut *mut f32,
    row_bytes: *mut usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeInputWireRows", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            let out = (Out::new(values, "values")?, Out::new(scales, "scales")?, Out::new(row_bytes, "row_bytes")?);
            with_held(moe, |held| {
                let moe = held.moe();
                held.input_rows = None;
                let mut rows = moe.input_wire_rows(num_tokens)?;
                let (at, stride) = (rows.matrix().as_mut_ptr(), rows.stride());
                held.input_rows = Some(AnyRows::Wire(rows));
                out.0.set(at.cast());
                out.1.set(moe.scales_offset().map_or(null_mut(), |offset| at.wrapping_add(offset).cast()));
                out.2.set(stride);
                Ok(())
            })
        }
    })
}

/// As xcclMoeCopyExpertMajor, with the rows as they travel: values has room for capacity_rows rows of the format's bytes (hidden,
/// or with xcclWireNative hidden elements), scales for capacity_scales scales, laid out as layout, an xcclScaleLayout_t, says for
/// all rows of the layout. xcclTruncated when either is too small, with nothing written. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeCopyWireExpertMajor(
    exchange: xcclExchange_t,
    values: *mut c_void,
    capacity_rows: usize,
    scales: *mut f32,
    capacity_scales: usize,
    layout: u32,
    align: usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeCopyWireExpertMajor", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                if align == 0 {
                    return Err(Failure::argument("align is 0: expected a number of rows, at least 1"));
                }
                let (moe, layout) = (held.moe(), layout_of(layout)?);
                let batch = held.flight(exchange)?.batch()?;
                let rows = batch.aligned_rows(align);
                let room = Room { values, rows: capacity_rows, scales, scale_elements: capacity_scales };
                let (values, scales) = room.slices(moe, (1, rows), layout)?;
                Ok(batch.copy_wire_into(values, scales, layout, align)?)
            })
        }
    })
}

/// As xcclMoeCopyPadded, with the rows as they travel: see xcclMoeCopyWireExpertMajor. Each local expert has capacity rows of
/// values, and scales for as many rows laid out as layout says. Does not block.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn xcclMoeCopyWirePadded(
    exchange: xcclExchange_t,
    values: *mut c_void,
    capacity_rows: usize,
    scales: *mut f32,
    capacity_scales: usize,
    layout: u32,
    capacity: usize,
    moe: xcclMoe_t,
) -> xcclResult_t {
    guard("xcclMoeCopyWirePadded", || {
        // SAFETY: C's promise about its pointers and handles.
        unsafe {
            with_held(moe, |held| {
                let (moe, layout) = (held.moe(), layout_of(layout)?);
                let batch = held.flight(exchange)?.batch()?;
                let local = batch.counts().len();
                let room = Room { values, rows: capacity_rows, scales, scale_elements: capacity_scales };
                let (values, scales) = room.slices(moe, (local, capacity), layout)?;
                Ok(batch.copy_wire_padded(values, scales, layout, capacity)?)
            })
        }
    })
}

/// C's buffers.
struct Room {
    values: *mut c_void,
    rows: usize,
    scales: *mut f32,
    scale_elements: usize,
}

impl Room {
    /// What `parts` matrices of `rows` rows take of them.
    ///
    /// # Safety
    /// The pointers are null, or good for the sizes beside them.
    unsafe fn slices<'a>(
        self,
        moe: &Moe,
        (parts, rows): (usize, usize),
        layout: ScaleLayout,
    ) -> Outcome<(&'a mut [u8], &'a mut [f32])> {
        let config = moe.config();
        let needed = parts.saturating_mul(rows);
        if needed > self.rows {
            let text =
                format!("the layout takes {needed} rows, capacity_rows is {}: call again with more room", self.rows);
            return Err(Failure::truncated(text));
        }
        let elements = parts.saturating_mul(layout.elements(rows, config.wire.scales(config.hidden)));
        if elements > self.scale_elements {
            let room = self.scale_elements;
            let text =
                format!("the layout takes {elements} scales, capacity_scales is {room}: call again with more room");
            return Err(Failure::truncated(text));
        }
        let bytes = needed.saturating_mul(config.wire.value_bytes(config.hidden, config.dtype));
        // SAFETY: the caller's promise.
        unsafe { Ok((slice_mut(self.values.cast(), bytes, "values")?, slice_mut(self.scales, elements, "scales")?)) }
    }
}
