//! [`TernaryMatmul`]: exact products of ternary matrices with int8 rows.
//!
//! The matrix lies in groups of 16 rows and lines of 16 columns ([`packed`](super::packed)). A
//! **tile** is one or two groups times some rows of activations: its sums stay in registers from the
//! first line to the last, each line is unpacked once per tile, and each word of four activations
//! is loaded once per tile and broadcast. Tiles differ in shape and never in result: sums are
//! integers.

use super::Cpu;
use super::isa::Kernel;
use super::packed::{GROUP, TernaryMatrix};
use super::pool::Disjoint;
use super::simd::{Registers, Simd};
use crate::backend::ops::{Epilogue, TernaryMatmul, check_len};
use crate::backend::quantized_stride;
use crate::error::RunError;
use std::array::from_fn;
use std::ops::Range;

/// How far ahead of a line to prefetch when each line is used once: without it a core waits on
/// memory for much of the time, and from 2.5 KiB to 10 KiB ahead made no difference.
const AHEAD: usize = 4096;

/// Bytes of activations that are multiplied with one group after the other before the next rows
/// are taken: half of the second-level cache of the smaller processors in use.
const BLOCK_BYTES: usize = 512 << 10;

/// Products below which one thread is faster than two: some 10 µs of work.
const LEAST_WORK: usize = 1 << 19;

struct Product<'a> {
    groups: Range<usize>,
    matrix: &'a TernaryMatrix,
    rows: usize,
    /// Quantised rows, `quads` to a row, of which the first `lines` are used.
    values: &'a [[i8; GROUP]],
    quads: usize,
    scales: &'a [f32],
    sums: &'a [i32],
    output: &'a Disjoint<'a, f32>,
    stride: usize,
    column: usize,
    epilogue: Epilogue,
}

impl Kernel for Product<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let tile_rows = tile_rows::<S>();
        let block = (BLOCK_BYTES / (self.quads * GROUP).max(1)).max(tile_rows);
        let blocks = self.rows.div_ceil(block);
        for block in 0..blocks {
            let rows = self.rows * block / blocks..self.rows * (block + 1) / blocks;
            // Tiles of nearly equal height: 13 rows are 7 and 6, not 12 and 1.
            let tiles = rows.len().div_ceil(tile_rows);
            let mut group = self.groups.start;
            while group < self.groups.end {
                let left = self.groups.end - group;
                let mut done = 1;
                for tile in 0..tiles {
                    let start = rows.start + rows.len() * tile / tiles;
                    let end = rows.start + rows.len() * (tile + 1) / tiles;
                    done = self.some_rows(s, group, left, start, end - start);
                }
                group += done;
            }
        }
    }
}

/// The most rows of activations in a tile.
const fn tile_rows<S: Simd>() -> usize {
    match S::REGISTERS {
        Registers::One => 1,
        // Six sums of 16 bits and six of 32 leave 4 of the 16 registers.
        Registers::Few => 3,
        // Two groups of 8 sums. 12 would unpack less often, but 12 addresses do not fit the
        // general registers, and it was slower.
        Registers::Many => 8,
    }
}

impl Product<'_> {
    /// A tile of `rows` rows and one or two of the `left` groups; how many. That number depends
    /// on `left` and on whether there are more than 3 rows.
    #[inline(always)]
    fn some_rows<S: Simd>(
        &self,
        s: S,
        group: usize,
        left: usize,
        row: usize,
        rows: usize,
    ) -> usize {
        match S::REGISTERS {
            Registers::One => self.tile::<S, 1, 1, 1>(s, group, row),
            Registers::Few => match rows {
                1 => self.tile::<S, 1, 1, 1>(s, group, row),
                2 => self.tile::<S, 2, 1, 1>(s, group, row),
                _ => self.tile::<S, 3, 1, 1>(s, group, row),
            },
            // Few rows need several sums each to hide the latency of the dot products.
            Registers::Many => match rows {
                1 => self.tile::<S, 1, 1, 4>(s, group, row),
                2 => self.tile::<S, 2, 1, 4>(s, group, row),
                3 => self.tile::<S, 3, 1, 4>(s, group, row),
                _ if left == 1 => {
                    // The odd group at the end of a range.
                    for row in row..row + rows {
                        self.tile::<S, 1, 1, 4>(s, group, row);
                    }
                    return 1;
                }
                4 => self.tile::<S, 4, 2, 1>(s, group, row),
                5 => self.tile::<S, 5, 2, 1>(s, group, row),
                6 => self.tile::<S, 6, 2, 1>(s, group, row),
                7 => self.tile::<S, 7, 2, 1>(s, group, row),
                _ => self.tile::<S, 8, 2, 1>(s, group, row),
            },
        }
        if matches!(S::REGISTERS, Registers::Many) && rows > 3 { 2 } else { 1 }
    }

    /// `R` groups times `M` rows, with `U` (1 or 4) lines at a time into sums of their own.
    #[inline(always)]
    fn tile<S: Simd, const M: usize, const R: usize, const U: usize>(
        &self,
        s: S,
        group: usize,
        row: usize,
    ) {
        let lines = self.matrix.lines;
        let codes: [&[[u8; 64]]; R] =
            from_fn(|r| &self.matrix.codes[(group + r) * lines..][..lines]);
        let values: [&[[i8; GROUP]]; M] =
            from_fn(|m| &self.values[(row + m) * self.quads..][..lines]);
        // One group: the stream goes on behind it. Two: the next two.
        let ahead = if R == 1 { AHEAD } else { R * lines * 64 };

        let mut sums = [[[s.splat_i32(0); M]; R]; U];
        let whole = lines - lines % U;
        let mut line = 0;
        while line < whole {
            // Written out: sums that a loop indexes stay in memory.
            add_line(s, &codes, &values, line, ahead, &mut sums[0]);
            if U == 4 {
                add_line(s, &codes, &values, line + 1, ahead, &mut sums[1]);
                add_line(s, &codes, &values, line + 2, ahead, &mut sums[2]);
                add_line(s, &codes, &values, line + 3, ahead, &mut sums[3]);
            }
            line += U;
        }
        while line < lines {
            add_line(s, &codes, &values, line, ahead, &mut sums[0]);
            line += 1;
        }
        for r in 0..R {
            for m in 0..M {
                let mut sum = sums[0][r][m];
                for sums in &sums[1..] {
                    sum = s.add_i32(sum, sums[r][m]);
                }
                self.finish(s, sum, group + r, row + m);
            }
        }
    }

    /// From the sums of codes to 16 results of row `row`.
    #[inline(always)]
    fn finish<S: Simd>(&self, s: S, sum: S::I, group: usize, row: usize) {
        let product = s.to_f32(s.sub_i32(sum, s.splat_i32(self.sums[row])));
        let scales = &self.matrix.scales.as_chunks::<GROUP>().0[group];
        let y = s.mul(product, s.div(s.load(scales), s.splat(self.scales[row])));
        let first = group * GROUP;
        let count = (self.matrix.features - first).min(GROUP);
        let start = row * self.stride + self.column + first;
        // SAFETY: the parts of a job have groups, and so columns of the output, of their own.
        let out = unsafe { self.output.range(start..start + count) };
        if let Ok(out) = <&mut [f32; GROUP]>::try_from(&mut *out) {
            match self.epilogue {
                Epilogue::Store => s.store(y, out),
                Epilogue::Add => s.store(s.add(s.load(out), y), out),
            }
        } else {
            match self.epilogue {
                Epilogue::Store => s.store_tail(y, out),
                Epilogue::Add => s.store_tail(s.add(s.load_tail(out), y), out),
            }
        }
    }
}

/// Adds the products of one line.
#[inline(always)]
fn add_line<S: Simd, const M: usize, const R: usize>(
    s: S,
    codes: &[&[[u8; 64]]; R],
    values: &[&[[i8; GROUP]]; M],
    line: usize,
    ahead: usize,
    sums: &mut [[S::I; M]; R],
) {
    let mut packed = [s.load_codes(&codes[0][line]); R];
    let mut partial = [[s.begin(sums[0][0]); M]; R];
    for r in 0..R {
        packed[r] = s.load_codes(&codes[r][line]);
        s.prefetch(codes[r][line].as_ptr().wrapping_add(ahead));
        for m in 0..M {
            partial[r][m] = s.begin(sums[r][m]);
        }
    }
    add_plane::<S, 0, M, R>(s, &packed, values, line, &mut partial);
    add_plane::<S, 1, M, R>(s, &packed, values, line, &mut partial);
    add_plane::<S, 2, M, R>(s, &packed, values, line, &mut partial);
    add_plane::<S, 3, M, R>(s, &packed, values, line, &mut partial);
    for r in 0..R {
        for m in 0..M {
            sums[r][m] = s.finish(sums[r][m], partial[r][m]);
        }
    }
}

#[inline(always)]
fn add_plane<S: Simd, const J: usize, const M: usize, const R: usize>(
    s: S,
    packed: &[S::Codes; R],
    values: &[&[[i8; GROUP]]; M],
    line: usize,
    partial: &mut [[S::Partial; M]; R],
) {
    let mut codes = [packed[0]; R];
    for r in 0..R {
        codes[r] = s.plane::<J>(packed[r]);
    }
    for m in 0..M {
        let q = &values[m][line];
        let quad = [q[4 * J], q[4 * J + 1], q[4 * J + 2], q[4 * J + 3]];
        for r in 0..R {
            partial[r][m] = s.dot(partial[r][m], codes[r], quad);
        }
    }
    for partial in partial.as_flattened_mut() {
        s.settle(partial);
    }
}

impl Cpu {
    pub(super) fn ternary_matmul(&mut self, op: TernaryMatmul<'_, Self>) -> Result<(), RunError> {
        const OP: &str = "ternary_matmul";
        let TernaryMatmul { rows, width, features, stride, column, epilogue, .. } = op;
        let matrix = op.weight;
        let equal = |argument, expected: usize, found: usize| {
            if expected == found {
                return Ok(());
            }
            Err(RunError::Shape {
                op: OP,
                argument,
                expected: expected.to_string(),
                found: found.to_string(),
            })
        };
        equal("width of the weight", width, matrix.width)?;
        equal("features of the weight", features, matrix.features)?;
        let input_stride = quantized_stride(width);
        check_len(OP, "input.values", rows * input_stride, op.input.values.len())?;
        check_len(OP, "input.scales", rows, op.input.scales.len())?;
        check_len(OP, "input.sums", rows, op.input.sums.len())?;
        check_len(OP, "stride", column + features, stride)?;
        if rows == 0 || features == 0 {
            return Ok(());
        }
        check_len(OP, "output", (rows - 1) * stride + column + features, op.output.len())?;

        let output = Disjoint::new(op.output);
        let groups = features.div_ceil(GROUP);
        // One thread's grain is a pair of groups, the wider tile.
        let grain = if rows > 3 { 2 } else { 1 };
        let work = rows.saturating_mul(features).saturating_mul(width);
        self.pool.split(groups, grain, (work, LEAST_WORK), |groups| {
            self.token.run(Product {
                groups,
                matrix,
                rows,
                values: op.input.values.as_chunks::<GROUP>().0,
                quads: input_stride / GROUP,
                scales: &op.input.scales,
                sums: &op.input.sums,
                output: &output,
                stride,
                column,
                epilogue,
            });
        });
        Ok(())
    }
}
