//! [`LmHead`]: final norms of the wanted rows, and their products with the output head.
//!
//! A tile is 4 rows of the table times a few rows of activations; the table is read once, and each
//! element of it is converted once per tile. The arithmetic of a logit is that of
//! [`sum_of_squares`](super::rms_norm::sum_of_squares), whatever the tile.

#![expect(
    clippy::needless_range_loop,
    reason = "loops over the constants of a tile index several arrays of it"
)]

use super::isa::Kernel;
use super::pool::Disjoint;
use super::rms_norm::{NormRows, check_gather};
use super::simd::{LANES, Registers, Simd};
use super::table::{Bf16, F16, F32, Float};
use super::{Cpu, SMALL};
use crate::backend::NONE;
use crate::backend::ops::{Epilogue, LmHead, check_len};
use crate::error::RunError;
use crate::tensor::{FloatType, HostTable};
use std::array::from_fn;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows of the table in a tile: with one row of activations, as many chains of additions as hide
/// their latency.
const TABLE_ROWS: usize = 4;

/// Products below which one thread is faster than two.
const LEAST_WORK: usize = 1 << 17;

struct Head<'a, E> {
    vocabulary: Range<usize>,
    width: usize,
    table: &'a HostTable,
    rows: usize,
    normed: &'a [f32],
    logits: &'a Disjoint<'a, f32>,
    element: PhantomData<E>,
}

impl<E: Float> Kernel for Head<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let tile_rows = match S::REGISTERS {
            Registers::One | Registers::Few => 1,
            Registers::Many => 6,
        };
        let tiles = self.rows.div_ceil(tile_rows);
        let mut token = self.vocabulary.start;
        while token < self.vocabulary.end {
            let wide = S::REGISTERS != Registers::One && token + TABLE_ROWS <= self.vocabulary.end;
            for tile in 0..tiles {
                let start = self.rows * tile / tiles;
                let count = self.rows * (tile + 1) / tiles - start;
                match S::REGISTERS {
                    _ if !wide => {
                        for row in start..start + count {
                            self.tile::<S, 1, 1>(s, token, row);
                        }
                    }
                    Registers::One => {}
                    Registers::Few => self.tile::<S, TABLE_ROWS, 1>(s, token, start),
                    Registers::Many => match count {
                        1 => self.tile::<S, TABLE_ROWS, 1>(s, token, start),
                        2 => self.tile::<S, TABLE_ROWS, 2>(s, token, start),
                        3 => self.tile::<S, TABLE_ROWS, 3>(s, token, start),
                        4 => self.tile::<S, TABLE_ROWS, 4>(s, token, start),
                        5 => self.tile::<S, TABLE_ROWS, 5>(s, token, start),
                        _ => self.tile::<S, TABLE_ROWS, 6>(s, token, start),
                    },
                }
            }
            token += if wide { TABLE_ROWS } else { 1 };
        }
    }
}

impl<E: Float> Head<'_, E> {
    /// `V` tokens from `token` on times `R` rows from `row` on.
    #[inline(always)]
    fn tile<S: Simd, const V: usize, const R: usize>(&self, s: S, token: usize, row: usize) {
        let (width, whole) = (self.width, self.width / LANES);
        let stride = width * E::TYPE.size();
        let bytes: &[u8] = &self.table.bytes;
        let cut = whole * LANES * E::TYPE.size();
        let table: [&[E::Chunk]; V] =
            from_fn(|v| &bytemuck::cast_slice(&bytes[(token + v) * stride..][..cut])[..whole]);
        let rows: [&[[f32; LANES]]; R] =
            from_fn(|r| &self.normed[(row + r) * width..][..width].as_chunks().0[..whole]);

        let mut sums = [[s.splat(0.0); R]; V];
        for i in 0..whole {
            let mut weights = [s.splat(0.0); V];
            for v in 0..V {
                // SAFETY: `i < whole`, to which each of these slices was cut. A check here, with its
                // way out, keeps the sums in memory.
                let chunk = unsafe { table[v].get_unchecked(i) };
                weights[v] = E::load(s, chunk);
                // The same place of the next tile's rows.
                let chunk = std::ptr::from_ref(chunk).cast::<u8>();
                s.prefetch(chunk.wrapping_add(V * stride));
            }
            for r in 0..R {
                // SAFETY: as above.
                let x = s.load(unsafe { rows[r].get_unchecked(i) });
                for v in 0..V {
                    sums[v][r] = s.fma(weights[v], x, sums[v][r]);
                }
            }
        }
        if width % LANES != 0 {
            let tail = width - whole * LANES;
            for v in 0..V {
                let mut lanes = [0.0; LANES];
                let bytes = &bytes[(token + v) * stride..][cut..stride];
                E::TYPE.decode(bytes, &mut lanes[..tail]);
                let weights = s.load(&lanes);
                for r in 0..R {
                    let x = s.load_tail(&self.normed[(row + r) * width..][whole * LANES..width]);
                    sums[v][r] = s.fma(weights, x, sums[v][r]);
                }
            }
        }
        for r in 0..R {
            let start = (row + r) * self.table.rows + token;
            // SAFETY: the parts of a job have tokens of their own.
            let logits = unsafe { self.logits.range(start..start + V) };
            for v in 0..V {
                logits[v] = s.sum(sums[v][r]);
            }
        }
    }
}

impl Cpu {
    pub(super) fn lm_head(&mut self, op: LmHead<'_, Self>) -> Result<(), RunError> {
        const OP: &str = "lm_head";
        let LmHead { rows, first, width, vocabulary, batch, input, normed, logits, .. } = op;
        op.table.check(OP, Some(vocabulary), width)?;
        check_len(OP, "logit_rows", first + rows, batch.logit_rows.len())?;
        check_len(OP, "gain", width, op.norm.gain.len())?;
        check_len(OP, "normed", rows * width, normed.len())?;
        check_len(OP, "logits", rows * vocabulary, logits.len())?;
        let gather = &batch.logit_rows[first..][..rows];
        check_gather(OP, gather, width, input)?;

        {
            let output = Disjoint::new(&mut normed[..]);
            self.pool.split(rows, 1, (rows * width, SMALL), |rows| {
                self.token.run(NormRows {
                    rows,
                    width,
                    input,
                    gather: Some(gather),
                    gain: op.norm.gain,
                    eps: op.norm.eps,
                    output: &output,
                    epilogue: Epilogue::Store,
                });
            });
        }
        // Padding stands at the end: no work for it.
        let real = gather.iter().rposition(|&row| row != NONE).map_or(0, |last| last + 1);
        let project = match op.table.0.float {
            FloatType::Bf16 => Self::project::<Bf16>,
            FloatType::F16 => Self::project::<F16>,
            FloatType::F32 => Self::project::<F32>,
        };
        project(self, &op.table.0, width, real, normed, logits);
        for (logits, _) in
            logits.chunks_exact_mut(vocabulary.max(1)).zip(gather).filter(|&(_, &row)| row == NONE)
        {
            logits.fill(0.0);
        }
        Ok(())
    }

    /// `logits[r] = table · normed[r]` for the first `rows` rows.
    fn project<E: Float>(
        &self,
        table: &HostTable,
        width: usize,
        rows: usize,
        normed: &[f32],
        logits: &mut [f32],
    ) {
        let logits = Disjoint::new(logits);
        let work = rows.saturating_mul(width).saturating_mul(table.rows);
        self.pool.split(table.rows, TABLE_ROWS, (work, LEAST_WORK), |vocabulary| {
            let element = PhantomData::<E>;
            let logits = &logits;
            self.token.run(Head { vocabulary, width, table, rows, normed, logits, element });
        });
    }
}
