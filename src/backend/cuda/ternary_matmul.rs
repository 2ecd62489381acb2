//! [`TernaryMatmul`]: matrix-vector products for few rows, tensor cores for more, and the form that
//! norms and quantises its input itself.

use std::rc::Rc;

use super::Cuda;
use super::gate_norm_quantize::activation_code;
use super::launch::{Kernel, Launch};
use super::memory::Owned;
use super::packed::{BLOCK, PAIR, TernaryMatrix};
use super::record::{Gain, QuantizedRows};
use super::rms_norm_quantize::check_quantized;
use crate::backend::ops::{Activation, Epilogue, TernaryMatmul, check_len};
use crate::backend::quantized_stride;
use crate::error::RunError;

/// Which kernels multiply quantised rows by a ternary matrix, and how many of its pairs of 8-row
/// tiles a block takes. All give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MatmulForm {
    /// `ternary_matmul` and `ternary_matmul_fused`, for up to four rows at a time; up to 16 pairs,
    /// or with a gate 8.
    Few {
        /// Pairs of tiles.
        pairs: usize,
    },
    /// `ternary_matmul_mma`: tensor cores, the rows as their short operand; 1, 2 or 4 pairs.
    Some {
        /// Pairs of tiles.
        pairs: usize,
    },
    /// `ternary_matmul_tiled`: tensor cores, tiles of 64 rows; 8 or 16 pairs.
    Many {
        /// Pairs of tiles.
        pairs: usize,
    },
}

/// Rows up to which dp4a is used. For a unit of 1024 bytes of weights an H100's multiprocessor has
/// 68 cycles until memory brings the next. Unpacking takes 20 of those, and dp4a 16 for each row, at
/// 64 lanes a cycle; eight instructions of a tensor core take 13 for up to eight rows.
const FEW_ROWS: usize = 2;

/// Rows that the kernel of few rows takes at most.
const MOST_FEW: usize = 4;

/// Rows up to which a tile of 64 would be mostly padding, or read too few weights at a time.
const SOME_ROWS: usize = 64;

/// Rows that a block of the kernels for some rows takes, by the second index of [`MMA`].
const SIZES: [usize; 3] = [8, 16, 32];

/// Rows of a tile of the tiled form.
const TILE_ROWS: usize = 64;

/// Pairs of tiles that a block of the tiled form takes: two for each of its 8 or 4 warps.
const WIDE_PAIRS: usize = 16;
const NARROW_PAIRS: usize = 8;

/// Pairs that a block of the kernels of few rows takes at most; with a gate half of them are up's.
const MOST_PAIRS: usize = 16;

/// Blocks of the kernels of few rows that a multiprocessor has at a time. There are no more blocks
/// than that: each norms the rows anew.
const RESIDENT: usize = 2;

/// Rows up to which norms are fused: each block does all of them anew.
const FUSED_ROWS: usize = 4;

/// Shared memory that the fused form may ask for: with what it has beside, the 99 KiB that a block
/// has on GPUs of compute capability 8.6.
const FUSED_BYTES: usize = 94 << 10;

/// Bytes between quantised rows in shared memory, `PADDING` of the kernel.
const FUSED_PADDING: usize = 64;

const fn few(name: &'static str) -> Kernel {
    Kernel::new::<Args>("ternary_matmul", 256).named(name)
}
const fn mma(name: &'static str) -> Kernel {
    Kernel::new::<RowsArgs>("ternary_matmul_mma", 256).named(name)
}
const fn fused(name: &'static str) -> Kernel {
    Kernel::new::<FusedArgs>("ternary_matmul_fused", 256).named(name).with_shared(FUSED_BYTES)
}

/// By rows, from 1.
const FEW: [Kernel; MOST_FEW] = [
    few("ternary_matmul_1"),
    few("ternary_matmul_2"),
    few("ternary_matmul_3"),
    few("ternary_matmul_4"),
];

/// By pairs of tiles, 1, 2 and 4, and by [`SIZES`].
const MMA: [[Kernel; 3]; 3] = [
    [mma("ternary_matmul_mma_1_1"), mma("ternary_matmul_mma_1_2"), mma("ternary_matmul_mma_1_4")],
    [mma("ternary_matmul_mma_2_1"), mma("ternary_matmul_mma_2_2"), mma("ternary_matmul_mma_2_4")],
    [mma("ternary_matmul_mma_4_1"), mma("ternary_matmul_mma_4_2"), mma("ternary_matmul_mma_4_4")],
];

/// Of 8 warps, and of 4.
const WIDE: Kernel =
    Kernel::new::<RowsArgs>("ternary_matmul_tiled", 256).with_shared(tiled_bytes(WIDE_PAIRS));
const NARROW: Kernel = Kernel::new::<RowsArgs>("ternary_matmul_tiled", 128)
    .named("ternary_matmul_tiled_narrow")
    .with_shared(tiled_bytes(NARROW_PAIRS));

/// By rows, from 1.
const FUSED: [Kernel; FUSED_ROWS] = [
    fused("ternary_matmul_fused_1"),
    fused("ternary_matmul_fused_2"),
    fused("ternary_matmul_fused_3"),
    fused("ternary_matmul_fused_4"),
];
const FUSED_GATE: [Kernel; FUSED_ROWS] = [
    fused("ternary_matmul_fused_gate_1"),
    fused("ternary_matmul_fused_gate_2"),
    fused("ternary_matmul_fused_gate_3"),
    fused("ternary_matmul_fused_gate_4"),
];

/// The tiled form's activations and weights of two blocks of columns.
const fn tiled_bytes(pairs: usize) -> usize {
    2 * (TILE_ROWS * BLOCK + pairs * PAIR * BLOCK / 4)
}

pub(super) fn kernels() -> Vec<Kernel> {
    [&FEW[..], MMA.as_flattened(), &[WIDE, NARROW], &FUSED, &FUSED_GATE].concat()
}

/// Where a product goes.
#[derive(Clone)]
pub(super) struct Output {
    pub(super) memory: Rc<Owned>,
    pub(super) stride: usize,
    pub(super) column: usize,
    pub(super) add: bool,
}

/// The op, kept.
pub(super) struct Matmul {
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) input: QuantizedRows,
    pub(super) weight: TernaryMatrix,
    pub(super) output: Output,
}

/// `TernaryMatmulArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    values: u64,
    scales: u64,
    sums: u64,
    weights: u64,
    weight_scales: u64,
    output: u64,
    blocks: u32,
    pairs: u32,
    features: u32,
    share: u32,
    stride: u32,
    column: u32,
    add: u32,
    padding: u32,
}

/// `TernaryMatmulMmaArgs` and `TernaryMatmulTiledArgs` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct RowsArgs {
    values: u64,
    scales: u64,
    sums: u64,
    weights: u64,
    weight_scales: u64,
    output: u64,
    rows: u32,
    blocks: u32,
    pairs: u32,
    features: u32,
    stride: u32,
    column: u32,
    add: u32,
    padding: u32,
}

impl Matmul {
    pub(super) fn new(op: &TernaryMatmul<'_, Cuda>) -> Result<Self, RunError> {
        const OP: &str = "ternary_matmul";
        let TernaryMatmul { rows, width, features, input, weight, output, .. } = op;
        let (rows, width, features) = (*rows, *width, *features);
        let shape = |argument, expected: String, found: String| RunError::Shape {
            op: OP,
            argument,
            expected,
            found,
        };
        if (weight.rows(), weight.cols()) != (features, width) {
            let of = |rows, cols| format!("{rows} × {cols}");
            return Err(shape("weight", of(features, width), of(weight.rows(), weight.cols())));
        }
        check_quantized(OP, rows, width, input)?;
        if op.column + features > op.stride {
            let most = format!("at most {}", op.stride.saturating_sub(features));
            return Err(shape("column", most, op.column.to_string()));
        }
        let end = rows.checked_sub(1).map_or(0, |last| last * op.stride + op.column + features);
        check_len(OP, "output", end, output.len())?;
        Ok(Self {
            rows,
            width,
            input: QuantizedRows::of(input),
            weight: TernaryMatrix::clone(weight),
            output: Output {
                memory: output.memory().clone(),
                stride: op.stride,
                column: op.column,
                add: op.epilogue == Epilogue::Add,
            },
        })
    }

    pub(super) fn launches(&self, cuda: &Cuda) -> Vec<Launch> {
        if self.rows == 0 || self.width == 0 || self.weight.rows() == 0 {
            return Vec::new();
        }
        let pairs = self.weight.rows().div_ceil(PAIR);
        let chosen = || form(self.rows, pairs, cuda.gpu().multiprocessors);
        match cuda.options.matmul.unwrap_or_else(chosen) {
            MatmulForm::Few { pairs: share } => (0..self.rows)
                .step_by(MOST_FEW)
                .map(|row| {
                    let rows = MOST_FEW.min(self.rows - row);
                    self.few(row, rows, share.clamp(1, MOST_PAIRS))
                })
                .collect(),
            MatmulForm::Some { pairs: share } => {
                let size = SIZES.into_iter().position(|most| self.rows <= most).unwrap_or(2);
                let share = share.clamp(1, 4).ilog2() as usize;
                let groups = self.rows.div_ceil(SIZES[size]);
                vec![self.of_rows(MMA[share][size], pairs.div_ceil(1 << share), groups)]
            }
            MatmulForm::Many { pairs: share } => {
                let (kernel, share) =
                    if share < WIDE_PAIRS { (NARROW, NARROW_PAIRS) } else { (WIDE, WIDE_PAIRS) };
                let tiles = self.rows.div_ceil(TILE_ROWS);
                vec![self.of_rows(kernel, pairs.div_ceil(share), tiles).shared(kernel.shared)]
            }
        }
    }

    /// The product of 1 to [`MOST_FEW`] rows from `row` on.
    fn few(&self, row: usize, rows: usize, share: usize) -> Launch {
        let Self { width, input, weight, output, .. } = self;
        let pairs = weight.rows().div_ceil(PAIR);
        let args = Args {
            values: input.values.address() + (row * quantized_stride(*width)) as u64,
            scales: input.scales.address() + 4 * row as u64,
            sums: input.sums.address() + 4 * row as u64,
            weights: weight.codes.address(),
            weight_scales: weight.scales.address(),
            output: output.memory.address() + 4 * (row * output.stride) as u64,
            blocks: width.div_ceil(BLOCK) as u32,
            pairs: pairs as u32,
            features: weight.rows() as u32,
            share: share as u32,
            stride: output.stride as u32,
            column: output.column as u32,
            add: u32::from(output.add),
            padding: 0,
        };
        let grid = [pairs.div_ceil(share) as u32, 1, 1];
        Launch::new(FEW[rows - 1], grid, &args, &self.memory())
    }

    /// A kernel that takes all rows.
    fn of_rows(&self, kernel: Kernel, x: usize, y: usize) -> Launch {
        let Self { rows, width, input, weight, output } = self;
        let args = RowsArgs {
            values: input.values.address(),
            scales: input.scales.address(),
            sums: input.sums.address(),
            weights: weight.codes.address(),
            weight_scales: weight.scales.address(),
            output: output.memory.address(),
            rows: *rows as u32,
            blocks: width.div_ceil(BLOCK) as u32,
            pairs: weight.rows().div_ceil(PAIR) as u32,
            features: weight.rows() as u32,
            stride: output.stride as u32,
            column: output.column as u32,
            add: u32::from(output.add),
            padding: 0,
        };
        Launch::new(kernel, [x as u32, y as u32, 1], &args, &self.memory())
    }

    fn memory(&self) -> [&Rc<Owned>; 6] {
        let QuantizedRows { values, scales, sums } = &self.input;
        let weight = &self.weight;
        [values, scales, sums, &weight.codes, &weight.scales, &self.output.memory]
    }
}

/// The form for so many rows and pairs of tiles, on a GPU of so many multiprocessors.
fn form(rows: usize, pairs: usize, processors: usize) -> MatmulForm {
    if rows <= FEW_ROWS {
        return MatmulForm::Few { pairs: share(pairs, processors) };
    }
    let tiles = rows.div_ceil(TILE_ROWS);
    let blocks = |share: usize| pairs.div_ceil(share);
    // Tiles that leave multiprocessors idle lose to smaller pieces, which read more often.
    if rows > SOME_ROWS && tiles * blocks(NARROW_PAIRS) >= processors {
        let wide = tiles * blocks(WIDE_PAIRS) >= RESIDENT * processors;
        return MatmulForm::Many { pairs: if wide { WIDE_PAIRS } else { NARROW_PAIRS } };
    }
    // As many pairs in a block, which then share the activations, as leave a block for each
    // multiprocessor.
    let size = SIZES.into_iter().find(|&most| rows <= most).unwrap_or(SIZES[2]);
    let enough = |&share: &usize| rows.div_ceil(size) * blocks(share) >= processors;
    MatmulForm::Some { pairs: [4, 2].into_iter().find(enough).unwrap_or(1) }
}

/// Pairs that a block of the kernels of few rows takes.
fn share(pairs: usize, processors: usize) -> usize {
    pairs.div_ceil(RESIDENT * processors.max(1)).clamp(1, MOST_PAIRS)
}

/// A product whose input is normed and quantised in the same kernel, and where `gate` is set the
/// activation of a gated network behind it.
pub(super) struct FusedMatmul {
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) input: Rc<Owned>,
    pub(super) norm: Option<Gain>,
    pub(super) weight: TernaryMatrix,
    pub(super) output: Output,
    pub(super) gate: Option<Activation>,
}

/// `TernaryMatmulFusedArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct FusedArgs {
    input: u64,
    gain: u64,
    weights: u64,
    weight_scales: u64,
    output: u64,
    width: u32,
    blocks: u32,
    pairs: u32,
    features: u32,
    share: u32,
    stride: u32,
    column: u32,
    add: u32,
    activation: u32,
    eps: f32,
}

impl FusedMatmul {
    /// Whether rows of this number and width can be normed in shared memory.
    pub(super) fn fits(rows: usize, width: usize) -> bool {
        (1..=FUSED_ROWS).contains(&rows) && width > 0 && shared(rows, width, true) <= FUSED_BYTES
    }

    /// Whether the rows of a gate of this width, and those of up after them, are whole pairs.
    pub(super) fn gates(width: usize) -> bool {
        width.is_multiple_of(PAIR)
    }

    pub(super) fn launch(&self, cuda: &Cuda) -> Launch {
        let Self { rows, width, input, norm, weight, output, gate } = self;
        let halves = if gate.is_some() { 2 } else { 1 };
        let features = weight.rows() / halves;
        let pairs = features.div_ceil(PAIR);
        let share = match cuda.options.matmul {
            Some(MatmulForm::Few { pairs }) => pairs,
            _ => share(pairs, cuda.gpu().multiprocessors),
        };
        let share = share.clamp(1, MOST_PAIRS / halves);
        let args = FusedArgs {
            input: input.address(),
            gain: norm.as_ref().map_or(0, |norm| norm.gain.address()),
            weights: weight.codes.address(),
            weight_scales: weight.scales.address(),
            output: output.memory.address(),
            width: *width as u32,
            blocks: width.div_ceil(BLOCK) as u32,
            pairs: pairs as u32,
            features: features as u32,
            share: share as u32,
            stride: output.stride as u32,
            column: output.column as u32,
            add: u32::from(output.add),
            activation: gate.map_or(0, activation_code),
            eps: norm.as_ref().map_or(0.0, |norm| norm.eps),
        };
        let mut memory = vec![input, &weight.codes, &weight.scales, &output.memory];
        memory.extend(norm.as_ref().map(|norm| &norm.gain));
        let kernel = if gate.is_some() { FUSED_GATE[rows - 1] } else { FUSED[rows - 1] };
        let grid = [pairs.div_ceil(share).max(1) as u32, 1, 1];
        Launch::new(kernel, grid, &args, &memory).shared(shared(*rows, *width, norm.is_some()))
    }
}

/// The fused form's shared memory: a row in f32, the gain, the quantised rows.
fn shared(rows: usize, width: usize, norm: bool) -> usize {
    let padded = quantized_stride(width);
    4 * padded * (1 + usize::from(norm)) + rows * (padded + FUSED_PADDING)
}
