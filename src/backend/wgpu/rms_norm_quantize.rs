//! [`RmsNormQuantize`]: a workgroup for each row.

use super::dispatch::Dispatch;
use super::kernel::Kernel;
use super::memory::Raw;
use super::record::{Gain, QuantizedRows};
use super::{Wgpu, grid};
use crate::backend::ops::{Quantized, RmsNormQuantize, check_len};
use crate::backend::quantized_stride;
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new("rms_norm_quantize", "rrwwww");

pub(super) fn kernels() -> Vec<Kernel> {
    vec![KERNEL]
}

/// The op, kept.
pub(super) struct Quantize {
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) input: Raw,
    pub(super) norm: Option<Gain>,
    pub(super) quantized: QuantizedRows,
    pub(super) normed: Option<Raw>,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Params {
    rows: u32,
    width: u32,
    stride: u32,
    has_norm: u32,
    keep: u32,
    eps: f32,
}

impl Quantize {
    pub(super) fn new(op: RmsNormQuantize<'_, Wgpu>) -> Result<Self, RunError> {
        const OP: &str = "rms_norm_quantize";
        let RmsNormQuantize { rows, width, input, norm, quantized, normed } = op;
        check_len(OP, "input", rows * width, input.len())?;
        check_quantized(OP, rows, width, quantized)?;
        if let Some(normed) = &normed {
            check_len(OP, "normed", rows * width, normed.len())?;
        }
        Ok(Self {
            rows,
            width,
            input: input.raw().clone(),
            norm: Gain::of(OP, norm, width)?,
            quantized: QuantizedRows::of(quantized),
            normed: normed.map(|normed| normed.raw().clone()),
        })
    }

    pub(super) fn dispatch(&self, wgpu: &mut Wgpu) -> Result<Dispatch, RunError> {
        let (unread, unwritten) = (wgpu.nothing_to_read()?, wgpu.nothing_to_write()?);
        let params = Params {
            rows: self.rows as u32,
            width: self.width as u32,
            stride: (quantized_stride(self.width) / 4) as u32,
            has_norm: u32::from(self.norm.is_some()),
            keep: u32::from(self.normed.is_some()),
            eps: self.norm.as_ref().map_or(0.0, |norm| norm.eps),
        };
        let bindings = [
            &self.input,
            self.norm.as_ref().map_or(&unread, |norm| &norm.gain),
            &self.quantized.values,
            &self.quantized.scales,
            &self.quantized.sums,
            self.normed.as_ref().unwrap_or(&unwritten),
        ];
        Ok(Dispatch::new(KERNEL, &bindings, &params, grid(self.rows)))
    }
}

/// Checks that quantised rows are large enough.
pub(super) fn check_quantized(
    op: &'static str,
    rows: usize,
    width: usize,
    quantized: &Quantized<Wgpu>,
) -> Result<(), RunError> {
    check_len(op, "values", rows * quantized_stride(width), quantized.values.len())?;
    check_len(op, "scales", rows, quantized.scales.len())?;
    check_len(op, "sums", rows, quantized.sums.len())
}
