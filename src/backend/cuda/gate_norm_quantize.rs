//! [`GateNormQuantize`]: a block for each row.

use std::rc::Rc;

use super::Cuda;
use super::launch::{Kernel, Launch, grid};
use super::memory::Owned;
use super::record::{Gain, QuantizedRows};
use super::rms_norm_quantize::check_quantized;
use crate::backend::ops::{Activation, GateNormQuantize, check_len};
use crate::backend::quantized_stride;
use crate::error::RunError;

/// Shared memory that a row of products may take: what any launch may have, less the reductions.
const STAGED_BYTES: usize = (48 << 10) - 256;

const KERNEL: Kernel = Kernel::new::<Args>("gate_norm_quantize", 256);

pub(super) const KERNELS: &[Kernel] = &[KERNEL];

/// The number that kernels know an activation by.
pub(super) const fn activation_code(activation: Activation) -> u32 {
    match activation {
        Activation::Relu2 => 0,
        Activation::Silu => 1,
        Activation::GeluTanh => 2,
    }
}

/// The op, kept.
pub(super) struct Gate {
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) gate_up: Rc<Owned>,
    pub(super) activation: Activation,
    pub(super) norm: Option<Gain>,
    pub(super) quantized: QuantizedRows,
    pub(super) normed: Option<Rc<Owned>>,
}

/// `GateNormQuantizeArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    gate_up: u64,
    gain: u64,
    values: u64,
    scales: u64,
    sums: u64,
    normed: u64,
    products: u64,
    width: u32,
    stride: u32,
    eps: f32,
    activation: u32,
}

impl Gate {
    pub(super) fn new(op: GateNormQuantize<'_, Cuda>) -> Result<Self, RunError> {
        const OP: &str = "gate_norm_quantize";
        let GateNormQuantize { rows, width, gate_up, activation, norm, quantized, normed } = op;
        check_len(OP, "gate_up", 2 * rows * width, gate_up.len())?;
        check_quantized(OP, rows, width, quantized)?;
        if let Some(normed) = &normed {
            check_len(OP, "normed", rows * width, normed.len())?;
        }
        Ok(Self {
            rows,
            width,
            gate_up: gate_up.memory().clone(),
            activation,
            norm: Gain::of(OP, norm, width)?,
            quantized: QuantizedRows::of(quantized),
            normed: normed.map(|normed| normed.memory().clone()),
        })
    }

    pub(super) fn launches(&self, cuda: &mut Cuda) -> Result<Vec<Launch>, RunError> {
        if self.rows == 0 {
            return Ok(Vec::new());
        }
        let Self { gate_up, norm, quantized, normed, .. } = self;
        let row_bytes = 4 * self.width;
        let (shared, products) = if row_bytes <= STAGED_BYTES {
            (row_bytes, None)
        } else {
            (0, Some(cuda.scratch("products with the gate", (self.rows * row_bytes) as u64)?))
        };
        let args = Args {
            gate_up: gate_up.address(),
            gain: norm.as_ref().map_or(0, |norm| norm.gain.address()),
            values: quantized.values.address(),
            scales: quantized.scales.address(),
            sums: quantized.sums.address(),
            normed: normed.as_ref().map_or(0, |normed| normed.address()),
            products: products.as_ref().map_or(0, |products| products.address()),
            width: self.width as u32,
            stride: quantized_stride(self.width) as u32,
            eps: norm.as_ref().map_or(0.0, |norm| norm.eps),
            activation: activation_code(self.activation),
        };
        let mut memory = vec![gate_up, &quantized.values, &quantized.scales, &quantized.sums];
        memory.extend(norm.as_ref().map(|norm| &norm.gain));
        memory.extend(normed);
        memory.extend(&products);
        Ok(vec![Launch::new(KERNEL, grid(self.rows), &args, &memory).shared(shared)])
    }
}
