//! [`GateNormQuantize`]: a workgroup for each row.

use super::dispatch::Dispatch;
use super::kernel::Kernel;
use super::memory::Raw;
use super::record::{Gain, QuantizedRows};
use super::rms_norm_quantize::check_quantized;
use super::{Wgpu, grid};
use crate::backend::ops::{Activation, GateNormQuantize, check_len};
use crate::backend::quantized_stride;
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new("gate_norm_quantize", "rrwwww");

pub(super) fn kernels() -> Vec<Kernel> {
    vec![KERNEL]
}

/// The number that shaders know an activation by.
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
    pub(super) gate_up: Raw,
    pub(super) activation: Activation,
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
    activation: u32,
}

impl Gate {
    pub(super) fn new(op: GateNormQuantize<'_, Wgpu>) -> Result<Self, RunError> {
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
            gate_up: gate_up.raw().clone(),
            activation,
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
            activation: activation_code(self.activation),
        };
        let bindings = [
            &self.gate_up,
            self.norm.as_ref().map_or(&unread, |norm| &norm.gain),
            &self.quantized.values,
            &self.quantized.scales,
            &self.quantized.sums,
            self.normed.as_ref().unwrap_or(&unwritten),
        ];
        Ok(Dispatch::new(KERNEL, &bindings, &params, grid(self.rows)))
    }
}
