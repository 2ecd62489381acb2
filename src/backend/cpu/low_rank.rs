//! [`LowRank`]: a product with a narrow matrix, then one with a wide one.
//!
//! The first has the arithmetic of [`sum_of_squares`](super::rms_norm::sum_of_squares), for a few
//! rows of the matrix at a time; the second runs along the features, which share each element of
//! what is between the two.

use super::isa::Kernel;
use super::pool::Disjoint;
use super::simd::{LANES, Simd};
use super::{Cpu, SMALL};
use crate::backend::ops::LowRank;
use crate::error::RunError;
use std::ops::Range;

/// Rows of the narrow matrix that share what is read of the input.
const RANKS: usize = 4;

/// Vectors of features that share what is between the two products: as many chains of additions as
/// hide their latency.
const VECTORS: usize = 4;

/// `inner[t][j] = Σ_k down[j][k] · input[t][k]`; item `i` is row `i % rows` and a group of `RANKS`.
struct Down<'a> {
    items: Range<usize>,
    rows: usize,
    width: usize,
    rank: usize,
    input: &'a [f32],
    down: &'a [f32],
    inner: &'a Disjoint<'a, f32>,
}

impl Kernel for Down<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for item in self.items.clone() {
            let (first, row) = (item / self.rows * RANKS, item % self.rows);
            if first + RANKS <= self.rank {
                self.sums::<S, RANKS>(s, first, row);
            } else {
                (first..self.rank).for_each(|j| self.sums::<S, 1>(s, j, row));
            }
        }
    }
}

impl Down<'_> {
    #[inline(always)]
    fn sums<S: Simd, const N: usize>(&self, s: S, first: usize, row: usize) {
        let width = self.width;
        let (x, x_tail) = self.input[row * width..][..width].as_chunks::<LANES>();
        let rows: [&[f32]; N] = std::array::from_fn(|j| &self.down[(first + j) * width..][..width]);
        let chunks = rows.map(|row| &row.as_chunks::<LANES>().0[..x.len()]);
        let mut sums = [s.splat(0.0); N];
        for (i, x) in x.iter().enumerate() {
            let x = s.load(x);
            for (sum, chunks) in sums.iter_mut().zip(chunks) {
                *sum = s.fma(s.load(&chunks[i]), x, *sum);
            }
        }
        if !x_tail.is_empty() {
            let x = s.load_tail(x_tail);
            for (sum, row) in sums.iter_mut().zip(rows) {
                *sum = s.fma(s.load_tail(&row[width - x_tail.len()..]), x, *sum);
            }
        }
        let start = row * self.rank + first;
        // SAFETY: the parts of a job have items of their own, and an item its part of a row.
        let inner = unsafe { self.inner.range(start..start + N) };
        for (inner, sum) in inner.iter_mut().zip(sums) {
            *inner = s.sum(sum);
        }
    }
}

/// `output[t][n] += Σ_j up[j][n] · inner[t][j]`; item `i` is row `i % rows` and a group of features.
struct Up<'a> {
    items: Range<usize>,
    rows: usize,
    rank: usize,
    features: usize,
    up: &'a [f32],
    inner: &'a [f32],
    output: &'a Disjoint<'a, f32>,
    stride: usize,
    column: usize,
}

impl Kernel for Up<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for item in self.items.clone() {
            let (first, row) = (item / self.rows * VECTORS * LANES, item % self.rows);
            let end = self.features.min(first + VECTORS * LANES);
            let start = row * self.stride + self.column;
            // SAFETY: the parts of a job have items of their own, and an item its part of a row.
            let output = unsafe { self.output.range(start + first..start + end) };
            let inner = &self.inner[row * self.rank..][..self.rank];
            if end - first == VECTORS * LANES {
                self.add::<S, VECTORS>(s, first, inner, output);
            } else {
                let (whole, tail) = output.split_at_mut((end - first) / LANES * LANES);
                for (i, output) in whole.chunks_exact_mut(LANES).enumerate() {
                    self.add::<S, 1>(s, first + i * LANES, inner, output);
                }
                let mut sum = s.splat(0.0);
                for (j, &m) in inner.iter().enumerate() {
                    let up = &self.up[j * self.features..][end - tail.len()..end];
                    sum = s.fma(s.load_tail(up), s.splat(m), sum);
                }
                s.store_tail(s.add(s.load_tail(tail), sum), tail);
            }
        }
    }
}

impl Up<'_> {
    /// `V` vectors of features from `first` on.
    #[inline(always)]
    fn add<S: Simd, const V: usize>(&self, s: S, first: usize, inner: &[f32], output: &mut [f32]) {
        let mut sums = [s.splat(0.0); V];
        for (j, &m) in inner.iter().enumerate() {
            let up = &self.up[j * self.features + first..][..V * LANES];
            let m = s.splat(m);
            for (sum, up) in sums.iter_mut().zip(up.as_chunks::<LANES>().0) {
                *sum = s.fma(s.load(up), m, *sum);
            }
        }
        for (output, sum) in output.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
            s.store(s.add(s.load(output), sum), output);
        }
    }
}

impl Cpu {
    pub(super) fn low_rank(&mut self, op: LowRank<'_, Self>) -> Result<(), RunError> {
        op.check(|buffer| buffer.len())?;
        let LowRank { rows, width, rank, features, input, down, up, stride, column, .. } = op;
        {
            let inner = Disjoint::new(op.inner);
            let work = (rows * rank * width, SMALL);
            self.pool.split(rank.div_ceil(RANKS) * rows, 1, work, |items| {
                self.token.run(Down { items, rows, width, rank, input, down, inner: &inner });
            });
        }
        let (inner, output) = (&op.inner[..], Disjoint::new(op.output));
        let work = (rows * rank * features, SMALL);
        self.pool.split(features.div_ceil(VECTORS * LANES) * rows, 1, work, |items| {
            self.token.run(Up {
                items,
                rows,
                rank,
                features,
                up,
                inner,
                output: &output,
                stride,
                column,
            });
        });
        Ok(())
    }
}
