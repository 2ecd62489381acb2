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

/// Which kernels multiply quantised rows by a ternary matrix. All give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MatmulForm {
    /// `ternary_matmul`: dp4a, up to four rows at a time.
    Few,
    /// `ternary_matmul_mma`: tensor cores, the rows as their short operand.
    Some,
    /// `ternary_matmul_tiled`: tensor cores, tiles of 64 rows.
    Many,
}

/// Rows up to which dp4a is used. For a unit of 1024 bytes of weights an H100's multiprocessor has
/// 68 cycles until memory brings the next. Unpacking takes 20 of those, and dp4a 16 for each row, at
/// 64 lanes a cycle; eight instructions of a tensor core take 13 for up to eight rows.
const FEW_ROWS: usize = 2;

/// Rows that the kernel of few rows takes at most.
const MOST_FEW: usize = 4;

/// Rows up to which a tile of 64 would be mostly padding, or read too few weights at a time.
const SOME_ROWS: usize = 64;

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

/// By pairs of tiles, 1, 2 and 4, and by 8 rows, 16 and 32.
const MMA: [[Kernel; 3]; 3] = [
    [
        mma("ternary_matmul_mma_1_1"),
        mma("ternary_matmul_mma_1_2"),
        mma("ternary_matmul_mma_1_4"),
    ],
    [
        mma("ternary_matmul_mma_2_1"),
        mma("ternary_matmul_mma_2_2"),
        mma("ternary_matmul_mma_2_4"),
    ],
    [
        mma("ternary_matmul_mma_4_1"),
        mma("ternary_matmul_mma_4_2"),
        mma("ternary_matmul_mma_4_4"),
    ],
];

/// Of 8 warps, and of 4.
const WIDE: Kernel = Kernel::new::<RowsArgs>("ternary_matmul_tiled", 256)
    .with_shared(tiled_bytes(WIDE_PAIRS));
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
        let processors = cuda.gpu().multiprocessors;
        let pairs = self.weight.rows().div_ceil(PAIR);
        let tiles = self.rows.div_ceil(TILE_ROWS);
        // Tiles that leave multiprocessors idle lose to smaller pieces, which read more often.
        let form = cuda.options.matmul.unwrap_or(if self.rows <= FEW_ROWS {
            MatmulForm::Few
        } else if self.rows > SOME_ROWS && tiles * pairs.div_ceil(NARROW_PAIRS) >= processors {
            MatmulForm::Many
        } else {
            MatmulForm::Some
        });
        match form {
            MatmulForm::Few => {
                let share = share(pairs, processors, MOST_PAIRS);
                (0..self.rows)
                    .step_by(MOST_FEW)
                    .map(|row| self.few(row, MOST_FEW.min(self.rows - row), share))
                    .collect()
            }
            MatmulForm::Some => {
                let (size, rows) = match self.rows {
                    ..=8 => (0, 8),
                    ..=16 => (1, 16),
                    _ => (2, 32),
                };
                let groups = self.rows.div_ceil(rows);
                // As many pairs in a block, which then share the activations, as leave blocks for
                // all multiprocessors.
                let enough = |taken: &usize| pairs.div_ceil(1 << taken) * groups >= processors;
                let taken = (0..3).rev().find(enough).unwrap_or(0);
                vec![self.of_rows(MMA[taken][size], pairs.div_ceil(1 << taken), groups)]
            }
            MatmulForm::Many => {
                let wide = pairs.div_ceil(WIDE_PAIRS);
                vec![if tiles * wide >= 2 * processors {
                    self.of_rows(WIDE, wide, tiles).shared(WIDE.shared)
                } else {
                    self.of_rows(NARROW, pairs.div_ceil(NARROW_PAIRS), tiles).shared(NARROW.shared)
                }]
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

/// Pairs that a block of the kernels of few rows takes.
fn share(pairs: usize, processors: usize, most: usize) -> usize {
    pairs.div_ceil(RESIDENT * processors.max(1)).clamp(1, most)
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
        let share = share(pairs, cuda.gpu().multiprocessors, MOST_PAIRS / halves);
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
