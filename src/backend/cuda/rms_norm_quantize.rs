//! [`RmsNormQuantize`]: a block for each row.

use std::rc::Rc;

use super::Cuda;
use super::launch::{Kernel, Launch, grid};
use super::memory::Owned;
use super::record::{Gain, QuantizedRows};
use crate::backend::ops::{Quantized, RmsNormQuantize, check_len};
use crate::backend::quantized_stride;
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new::<Args>("rms_norm_quantize", 256);

pub(super) const KERNELS: &[Kernel] = &[KERNEL];

/// The op, kept.
pub(super) struct Quantize {
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) input: Rc<Owned>,
    pub(super) norm: Option<Gain>,
    pub(super) quantized: QuantizedRows,
    pub(super) normed: Option<Rc<Owned>>,
}

/// `RmsNormQuantizeArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    input: u64,
    gain: u64,
    values: u64,
    scales: u64,
    sums: u64,
    normed: u64,
    width: u32,
    stride: u32,
    eps: f32,
    padding: u32,
}

impl Quantize {
    pub(super) fn new(op: RmsNormQuantize<'_, Cuda>) -> Result<Self, RunError> {
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
            input: input.memory().clone(),
            norm: Gain::of(OP, norm, width)?,
            quantized: QuantizedRows::of(quantized),
            normed: normed.map(|normed| normed.memory().clone()),
        })
    }

    pub(super) fn launches(&self) -> Vec<Launch> {
        if self.rows == 0 {
            return Vec::new();
        }
        let Self { input, norm, quantized, normed, .. } = self;
        let args = Args {
            input: input.address(),
            gain: norm.as_ref().map_or(0, |norm| norm.gain.address()),
            values: quantized.values.address(),
            scales: quantized.scales.address(),
            sums: quantized.sums.address(),
            normed: normed.as_ref().map_or(0, |normed| normed.address()),
            width: self.width as u32,
            stride: quantized_stride(self.width) as u32,
            eps: norm.as_ref().map_or(0.0, |norm| norm.eps),
            padding: 0,
        };
        let mut memory = vec![input, &quantized.values, &quantized.scales, &quantized.sums];
        memory.extend(norm.as_ref().map(|norm| &norm.gain));
        memory.extend(normed);
        vec![Launch::new(KERNEL, grid(self.rows), &args, &memory)]
    }
}

/// Checks that quantised rows are large enough.
pub(super) fn check_quantized(
    op: &'static str,
    rows: usize,
    width: usize,
    quantized: &Quantized<Cuda>,
) -> Result<(), RunError> {
    check_len(op, "quantized.values", rows * quantized_stride(width), quantized.values.len())?;
    check_len(op, "quantized.scales", rows, quantized.scales.len())?;
    check_len(op, "quantized.sums", rows, quantized.sums.len())
}
