//! [`RmsNorm`]: norms of rows.

use super::isa::Kernel;
use super::pool::Disjoint;
use super::simd::{LANES, Simd};
use super::{Cpu, SMALL};
use crate::backend::NONE;
use crate::backend::ops::{Epilogue, RmsNorm, check_len};
use crate::error::RunError;
use std::ops::Range;

/// `Σ x²`: lane `j` of 16 sums the elements `j`, `j + 16`, … in order, then the tree of
/// [`Simd::sum`].
#[inline(always)]
pub(super) fn sum_of_squares<S: Simd>(s: S, x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut sums = s.splat(0.0);
    for chunk in chunks {
        let v = s.load(chunk);
        sums = s.fma(v, v, sums);
    }
    if !tail.is_empty() {
        let v = s.load_tail(tail);
        sums = s.fma(v, v, sums);
    }
    s.sum(sums)
}

/// What a row of this `Σ x²` is multiplied by.
#[inline(always)]
pub(super) fn norm_factor(sum_of_squares: f32, width: usize, eps: f32) -> f32 {
    1.0 / (sum_of_squares / width as f32 + eps).sqrt()
}

/// `out_i = (x_i · factor) · gain_i`.
#[inline(always)]
pub(super) fn scale_row<S: Simd>(s: S, x: &[f32], factor: f32, gain: &[f32], out: &mut [f32]) {
    let factor = s.splat(factor);
    let (x, x_tail) = x.as_chunks::<LANES>();
    let (gain, gain_tail) = gain.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for ((x, gain), out) in x.iter().zip(gain).zip(out) {
        s.store(s.mul(s.mul(s.load(x), factor), s.load(gain)), out);
    }
    if !x_tail.is_empty() {
        let v = s.mul(s.mul(s.load_tail(x_tail), factor), s.load_tail(gain_tail));
        s.store_tail(v, out_tail);
    }
}

/// `out_i += (x_i · factor) · gain_i`, product and sum rounded once.
#[inline(always)]
fn add_scaled_row<S: Simd>(s: S, x: &[f32], factor: f32, gain: &[f32], out: &mut [f32]) {
    let factor = s.splat(factor);
    let (x, x_tail) = x.as_chunks::<LANES>();
    let (gain, gain_tail) = gain.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for ((x, gain), out) in x.iter().zip(gain).zip(out) {
        let sum = s.fma(s.mul(s.load(x), factor), s.load(gain), s.load(out));
        s.store(sum, out);
    }
    if !x_tail.is_empty() {
        let scaled = s.mul(s.load_tail(x_tail), factor);
        let sum = s.fma(scaled, s.load_tail(gain_tail), s.load_tail(out_tail));
        s.store_tail(sum, out_tail);
    }
}

/// The norm of a row.
#[inline(always)]
pub(super) fn norm_row<S: Simd>(s: S, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
    let factor = norm_factor(sum_of_squares(s, x), x.len(), eps);
    scale_row(s, x, factor, gain, out);
}

/// Norms of gathered rows; also the first half of the output head.
pub(super) struct NormRows<'a> {
    pub(super) rows: Range<usize>,
    pub(super) width: usize,
    pub(super) input: &'a [f32],
    /// Row of the input for each row of the output.
    pub(super) gather: Option<&'a [u32]>,
    pub(super) gain: &'a [f32],
    pub(super) eps: f32,
    /// The output from its first row on.
    pub(super) output: &'a Disjoint<'a, f32>,
    pub(super) epilogue: Epilogue,
}

impl Kernel for NormRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            // SAFETY: the parts of a job have rows of their own.
            let out = unsafe { self.output.range(row * self.width..(row + 1) * self.width) };
            let from = self.gather.map_or(row, |gather| gather[row] as usize);
            let row =
                (from != NONE as usize).then(|| &self.input[from * self.width..][..self.width]);
            let gain = &self.gain[..self.width];
            match (row, self.epilogue) {
                (Some(x), Epilogue::Store) => norm_row(s, x, gain, self.eps, out),
                (Some(x), Epilogue::Add) => {
                    let factor = norm_factor(sum_of_squares(s, x), x.len(), self.eps);
                    add_scaled_row(s, x, factor, gain, out);
                }
                (None, Epilogue::Store) => out.fill(0.0),
                (None, Epilogue::Add) => {}
            }
        }
    }
}

/// Checks that all gathered rows lie within `input`, which holds rows of `width`.
pub(super) fn check_gather(
    op: &'static str,
    gather: &[u32],
    width: usize,
    input: &[f32],
) -> Result<(), RunError> {
    match gather.iter().find(|&&row| row != NONE && (row as usize + 1) * width > input.len()) {
        None => Ok(()),
        Some(row) => Err(RunError::Shape {
            op,
            argument: "gather",
            expected: format!("rows of an input of {} elements, {width} to a row", input.len()),
            found: format!("row {row}"),
        }),
    }
}

impl Cpu {
    pub(super) fn rms_norm(&mut self, op: RmsNorm<'_, Self>) -> Result<(), RunError> {
        const OP: &str = "rms_norm";
        let RmsNorm { rows, width, .. } = op;
        check_len(OP, "gain", width, op.norm.gain.len())?;
        check_len(OP, "output", rows * width, op.output.len())?;
        let gather = match op.gather {
            Some(gather) => {
                check_len(OP, "gather", op.first + rows, gather.len())?;
                let gather = &gather[op.first..][..rows];
                check_gather(OP, gather, width, op.input)?;
                Some(gather)
            }
            None => {
                check_len(OP, "input", rows * width, op.input.len())?;
                None
            }
        };
        let output = Disjoint::new(op.output);
        self.pool.split(rows, 1, (rows * width, SMALL), |rows| {
            self.token.run(NormRows {
                rows,
                width,
                input: op.input,
                gather,
                gain: op.norm.gain,
                eps: op.norm.eps,
                output: &output,
                epilogue: op.epilogue,
            });
        });
        Ok(())
    }
}
