//! [`GateNormQuantize`]: the gate of a feed-forward network, its sub-norm, and int8.

use super::exp::{gelu_tanh, times_sigmoid};
use super::isa::Kernel;
use super::pool::Disjoint;
use super::rms_norm::{norm_factor, scale_row, sum_of_squares};
use super::rms_norm_quantize::{QuantizedOut, float_row, share_normed};
use super::simd::{LANES, Simd};
use super::{Cpu, SMALL, scratch};
use crate::backend::ops::{Activation, GateNormQuantize, check_len};
use crate::error::RunError;
use std::ops::Range;

#[inline(always)]
fn gate<S: Simd>(s: S, activation: Activation, gate: S::F, up: S::F) -> S::F {
    let activated = match activation {
        Activation::Relu2 => {
            // In this order of arguments NaN passes.
            let positive = s.max(s.splat(0.0), gate);
            s.mul(positive, positive)
        }
        Activation::Silu => times_sigmoid(s, gate, gate),
        Activation::GeluTanh => gelu_tanh(s, gate),
    };
    s.mul(activated, up)
}

#[inline(always)]
fn gate_row<S: Simd>(s: S, activation: Activation, gate_up: &[f32], out: &mut [f32]) {
    let (gates, ups) = gate_up.split_at(out.len());
    let (gates, gate_tail) = gates.as_chunks::<LANES>();
    let (ups, up_tail) = ups.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for ((g, u), out) in gates.iter().zip(ups).zip(out) {
        s.store(gate(s, activation, s.load(g), s.load(u)), out);
    }
    if !out_tail.is_empty() {
        let v = gate(s, activation, s.load_tail(gate_tail), s.load_tail(up_tail));
        s.store_tail(v, out_tail);
    }
}

struct GateRows<'a> {
    rows: Range<usize>,
    width: usize,
    gate_up: &'a [f32],
    activation: Activation,
    norm: Option<(&'a [f32], f32)>,
    quantized: &'a QuantizedOut<'a>,
    normed: Option<&'a Disjoint<'a, f32>>,
    /// Two rows.
    scratch: &'a mut [f32],
}

impl Kernel for GateRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.width;
        let (gated, scratch) = self.scratch.split_at_mut(width);
        for row in self.rows {
            let gate_up = &self.gate_up[row * 2 * width..][..2 * width];
            // A match outside of the row's loop, so that each loop holds one activation.
            match self.activation {
                Activation::Relu2 => gate_row(s, Activation::Relu2, gate_up, gated),
                Activation::Silu => gate_row(s, Activation::Silu, gate_up, gated),
                Activation::GeluTanh => gate_row(s, Activation::GeluTanh, gate_up, gated),
            }
            let y = match self.norm {
                Some((gain, eps)) => {
                    let y = float_row(self.normed, scratch, row, width);
                    let factor = norm_factor(sum_of_squares(s, gated), width, eps);
                    scale_row(s, gated, factor, gain, y);
                    &*y
                }
                None => {
                    if self.normed.is_some() {
                        float_row(self.normed, scratch, row, width).copy_from_slice(gated);
                    }
                    &*gated
                }
            };
            // SAFETY: the parts of a job have rows of their own.
            unsafe { self.quantized.row(s, row, y) };
        }
    }
}

impl Cpu {
    pub(super) fn gate_norm_quantize(
        &mut self,
        op: GateNormQuantize<'_, Self>,
    ) -> Result<(), RunError> {
        const OP: &str = "gate_norm_quantize";
        let GateNormQuantize { rows, width, gate_up, activation, .. } = op;
        check_len(OP, "gate_up", rows * 2 * width, gate_up.len())?;
        let norm = match op.norm {
            Some(norm) => {
                check_len(OP, "gain", width, norm.gain.len())?;
                Some((&norm.gain[..width], norm.eps))
            }
            None => None,
        };
        let normed = share_normed(OP, rows * width, op.normed)?;
        let quantized = QuantizedOut::new(OP, rows, width, op.quantized)?;
        self.pool.split(rows, 1, (rows * 2 * width, SMALL), |rows| {
            scratch::with(2 * width, |scratch| {
                self.token.run(GateRows {
                    rows,
                    width,
                    gate_up,
                    activation,
                    norm,
                    quantized: &quantized,
                    normed: normed.as_ref(),
                    scratch,
                });
            });
        });
        Ok(())
    }
}
