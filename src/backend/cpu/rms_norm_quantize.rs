//! [`RmsNormQuantize`]: rows to int8, after a norm or as they are.

use super::isa::Kernel;
use super::pool::Disjoint;
use super::rms_norm::norm_row;
use super::simd::{LANES, Simd};
use super::{Buffer, Cpu, SMALL, scratch};
use crate::backend::ops::{Quantized, RmsNormQuantize, check_len};
use crate::backend::quantized_stride;
use crate::error::RunError;
use std::ops::Range;

/// The largest magnitude of a row, NaN where one of its values is.
#[inline(always)]
pub(super) fn absmax<S: Simd>(s: S, x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut highest = s.splat(0.0);
    for chunk in chunks {
        highest = s.max_abs(highest, s.load(chunk));
    }
    highest = s.max_abs(highest, s.load_tail(tail));
    let mut lanes = [0.0; LANES];
    s.store(highest, &mut lanes);
    // As bits, in which NaN is above all.
    f32::from_bits(lanes.into_iter().map(f32::to_bits).fold(0, u32::max))
}

/// Quantises a row into `out`, which is longer and gets zeros beyond it; the scale and `Σ q`.
///
/// A row that holds NaN or infinity gets zeros and the scale NaN, so that what is multiplied with it
/// cannot look sound.
#[inline(always)]
pub(super) fn quantize_row<S: Simd>(s: S, x: &[f32], out: &mut [i8]) -> (f32, i32) {
    let absmax = absmax(s, x);
    if !absmax.is_finite() {
        out.fill(0);
        return (f32::NAN, 0);
    }
    let scale = 127.0 / if absmax < 1e-5 { 1e-5 } else { absmax };

    let (chunks, tail) = x.as_chunks::<LANES>();
    let by = s.splat(scale);
    let mut sums = s.splat_i32(0);
    let (values, rest) = out.split_at_mut(chunks.len() * LANES);
    for (chunk, values) in chunks.iter().zip(values.as_chunks_mut::<LANES>().0) {
        let q = quantize(s, s.load(chunk), by);
        sums = s.add_i32(sums, q);
        s.store_i8(q, values);
    }
    rest.fill(0);
    if !tail.is_empty() {
        let mut values = [0; LANES];
        s.store_i8(quantize(s, s.load_tail(tail), by), &mut values);
        rest[..tail.len()].copy_from_slice(&values[..tail.len()]);
    }
    let tail_sum: i32 = rest[..tail.len()].iter().map(|&q| i32::from(q)).sum();
    (scale, s.sum_i32(sums) + tail_sum)
}

/// `clamp(round_half_even(x · scale), −128, 127)`. The bounds are integers, so that clamping first
/// gives the same.
#[inline(always)]
pub(super) fn quantize<S: Simd>(s: S, x: S::F, scale: S::F) -> S::I {
    let y = s.max(s.mul(x, scale), s.splat(-128.0));
    s.to_i32(s.min(y, s.splat(127.0)))
}

/// The three parts of [`Quantized`], for the parts of a job.
pub(super) struct QuantizedOut<'a> {
    values: Disjoint<'a, i8>,
    scales: Disjoint<'a, f32>,
    sums: Disjoint<'a, i32>,
    stride: usize,
}

impl<'a> QuantizedOut<'a> {
    pub(super) fn new(
        op: &'static str,
        rows: usize,
        width: usize,
        quantized: &'a mut Quantized<Cpu>,
    ) -> Result<Self, RunError> {
        let stride = quantized_stride(width);
        check_len(op, "quantized.values", rows * stride, quantized.values.len())?;
        check_len(op, "quantized.scales", rows, quantized.scales.len())?;
        check_len(op, "quantized.sums", rows, quantized.sums.len())?;
        Ok(Self {
            values: Disjoint::new(&mut quantized.values),
            scales: Disjoint::new(&mut quantized.scales),
            sums: Disjoint::new(&mut quantized.sums),
            stride,
        })
    }

    /// Quantises a row.
    ///
    /// # Safety
    /// No other part of the job does the same row.
    #[inline(always)]
    pub(super) unsafe fn row<S: Simd>(&self, s: S, row: usize, x: &[f32]) {
        // SAFETY: by the caller's word.
        let (values, scale, sum) = unsafe {
            (
                self.values.range(row * self.stride..(row + 1) * self.stride),
                self.scales.range(row..row + 1),
                self.sums.range(row..row + 1),
            )
        };
        (scale[0], sum[0]) = quantize_row(s, x, values);
    }
}

/// Where the f32 row goes that is quantised: the op's second output, else some scratch.
#[inline(always)]
pub(super) fn float_row<'a>(
    normed: Option<&'a Disjoint<'_, f32>>,
    scratch: &'a mut [f32],
    row: usize,
    width: usize,
) -> &'a mut [f32] {
    match normed {
        // SAFETY: the parts of a job have rows of their own.
        Some(normed) => unsafe { normed.range(row * width..(row + 1) * width) },
        None => &mut scratch[..width],
    }
}

/// Checks the second output of an op and shares it.
pub(super) fn share_normed<'a>(
    op: &'static str,
    needed: usize,
    normed: Option<&'a mut Buffer<f32>>,
) -> Result<Option<Disjoint<'a, f32>>, RunError> {
    let Some(normed) = normed else { return Ok(None) };
    check_len(op, "normed", needed, normed.len())?;
    Ok(Some(Disjoint::new(normed)))
}

struct NormQuantizeRows<'a> {
    rows: Range<usize>,
    width: usize,
    input: &'a [f32],
    norm: Option<(&'a [f32], f32)>,
    quantized: &'a QuantizedOut<'a>,
    normed: Option<&'a Disjoint<'a, f32>>,
    scratch: &'a mut [f32],
}

impl Kernel for NormQuantizeRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            let x = &self.input[row * self.width..][..self.width];
            let y = match self.norm {
                Some((gain, eps)) => {
                    let y = float_row(self.normed, self.scratch, row, self.width);
                    norm_row(s, x, gain, eps, y);
                    &*y
                }
                None => {
                    if self.normed.is_some() {
                        float_row(self.normed, self.scratch, row, self.width).copy_from_slice(x);
                    }
                    x
                }
            };
            // SAFETY: the parts of a job have rows of their own.
            unsafe { self.quantized.row(s, row, y) };
        }
    }
}

impl Cpu {
    pub(super) fn rms_norm_quantize(
        &mut self,
        op: RmsNormQuantize<'_, Self>,
    ) -> Result<(), RunError> {
        const OP: &str = "rms_norm_quantize";
        let RmsNormQuantize { rows, width, input, .. } = op;
        check_len(OP, "input", rows * width, input.len())?;
        let norm = match op.norm {
            Some(norm) => {
                check_len(OP, "gain", width, norm.gain.len())?;
                Some((&norm.gain[..width], norm.eps))
            }
            None => None,
        };
        let normed = share_normed(OP, rows * width, op.normed)?;
        let quantized = QuantizedOut::new(OP, rows, width, op.quantized)?;
        self.pool.split(rows, 1, (rows * width, SMALL), |rows| {
            scratch::with(width, |scratch| {
                self.token.run(NormQuantizeRows {
                    rows,
                    width,
                    input,
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
