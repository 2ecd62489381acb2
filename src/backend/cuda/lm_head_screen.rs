//! The output head where only the best token of a few rows is wanted: bounds on all logits from a copy
//! of the table in int8, then the logits of those that may be the best. Gives the tokens of the full
//! head; `lm_head.cu` has the proof.

use std::rc::Rc;

use super::Cuda;
use super::launch::{Kernel, Launch, grid};
use super::lm_head::{HeadArgs, ROWS_BF16, ROWS_F16, RowsArgs, WARPS, chunks};
use super::memory::Owned;
use super::sample::{PIECE, pieces};
use super::table::{ROW_BYTES, Table, of_float};
use crate::backend::ops::Sample;
use crate::error::{LoadError, RunError};
use crate::tensor::FloatType;

const QUANTIZE_BF16: Kernel =
    Kernel::new::<QuantizeArgs>("lm_head_quantize", 256).named("lm_head_quantize_bf16");
const QUANTIZE_F16: Kernel =
    Kernel::new::<QuantizeArgs>("lm_head_quantize", 256).named("lm_head_quantize_f16");
const SCREEN: Kernel =
    Kernel::new::<ScreenArgs>("lm_head", 256).named("lm_head_screen").with_shared(SHARED);
const RESCORE_BF16: Kernel =
    Kernel::new::<RescoreArgs>("lm_head", 256).named("lm_head_rescore_bf16");
const RESCORE_F16: Kernel = Kernel::new::<RescoreArgs>("lm_head", 256).named("lm_head_rescore_f16");

pub(super) const KERNELS: &[Kernel] =
    &[QUANTIZE_BF16, QUANTIZE_F16, SCREEN, RESCORE_BF16, RESCORE_F16];

/// Bytes of shared memory for the input, where three blocks share a multiprocessor.
const SHARED: usize = 32 << 10;
/// Blocks on a multiprocessor.
const RESIDENT: usize = 3;
/// Rows of the table that a warp takes at a time.
const TOKENS: usize = 16;

/// `LmHeadQuantizeArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct QuantizeArgs {
    table: u64,
    values: u64,
    bounds: u64,
    stride: u64,
    copy_stride: u64,
}

/// `LmHeadScreenArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct ScreenArgs {
    table: u64,
    bounds: u64,
    parts: u64,
    row_bounds: u64,
    upper: u64,
    floors: u64,
    stride: u64,
    rows: u32,
    vocabulary: u32,
    blocks: u32,
    chunk: u32,
}

/// `LmHeadRescoreArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct RescoreArgs {
    table: u64,
    parts: u64,
    factors: u64,
    upper: u64,
    floors: u64,
    options: u64,
    bests: u64,
    done: u64,
    tokens: u64,
    sampled: u64,
    logprobs: u64,
    stride: u64,
    rows: u32,
    vocabulary: u32,
    blocks: u32,
    first: u32,
    pieces: u32,
    lanes: u32,
}

/// A copy of a table in int8, a scale for each row, with bounds on its error.
pub(super) struct Copy {
    pub(super) values: Rc<Owned>,
    pub(super) bounds: Rc<Owned>,
    /// Bytes from one row to the next.
    pub(super) stride: usize,
}

impl Copy {
    /// Makes a copy on the device; of tables of f32 there is none.
    pub(super) fn new(cuda: &Cuda, table: &Table) -> Result<Option<Self>, LoadError> {
        if table.float == FloatType::F32 || table.rows == 0 || table.cols == 0 {
            return Ok(None);
        }
        let stride = table.cols.next_multiple_of(ROW_BYTES);
        let reserve = |what, bytes: usize| Owned::new(&cuda.device, what, bytes as u64);
        let values = reserve("int8 copy of the output head", table.rows * stride)?;
        let bounds = reserve("bounds of the output head", table.rows * 16)?;
        let args = QuantizeArgs {
            table: table.memory.address(),
            values: values.address(),
            bounds: bounds.address(),
            stride: table.stride() as u64,
            copy_stride: stride as u64,
        };
        let kernel = of_float(table.float, QUANTIZE_BF16, QUANTIZE_F16, QUANTIZE_BF16);
        let memory = [&table.memory, &values, &bounds];
        let launch = Launch::new(kernel, grid(table.rows), &args, &memory);
        cuda.launch(&launch)
            .map_err(|reason| LoadError::Device { device: cuda.info.name.clone(), reason })?;
        Ok(Some(Self { values, bounds, stride }))
    }
}

/// A pass of the head that may be screened, with what its launches need.
pub(super) struct Screened {
    pub(super) rows: RowsArgs,
    pub(super) head: HeadArgs,
    pub(super) float: FloatType,
    pub(super) table: Rc<Owned>,
    pub(super) values: Rc<Owned>,
    pub(super) bounds: Rc<Owned>,
    pub(super) stride: usize,
    pub(super) parts: Rc<Owned>,
    pub(super) factors: Rc<Owned>,
    pub(super) logits: Rc<Owned>,
    /// What the first kernel reads and writes without the screen.
    pub(super) inputs: [Rc<Owned>; 6],
}

impl Screened {
    /// Whether `op` picks tokens from the logits of this pass, and nothing else is asked of them.
    pub(super) fn serves(&self, op: &Sample<'_, Cuda>) -> bool {
        op.greedy
            && !op.logprobs
            && Rc::ptr_eq(&self.logits, op.logits.memory())
            && (op.rows, op.vocabulary) == (self.head.rows as usize, self.head.vocabulary as usize)
    }

    /// The launches of head and sampling.
    pub(super) fn launches(
        &self,
        cuda: &mut Cuda,
        op: &Sample<'_, Cuda>,
    ) -> Result<Vec<Launch>, RunError> {
        let Self { table, values, bounds, parts, factors, logits, .. } = self;
        let Sample { rows, vocabulary, batch, lanes, samples, .. } = op;
        let blocks = self.stride / ROW_BYTES;
        let screen = cuda.scratch("the int8 parts of rows", (rows * 2 * self.stride) as u64)?;
        let row_bounds = cuda.scratch("the bounds of rows", 16 * *rows as u64)?;
        let floors = cuda.scratch("the least of the best logits", 4 * *rows as u64)?;
        let row_args = RowsArgs {
            screen: screen.address(),
            bounds: row_bounds.address(),
            floors: floors.address(),
            ..self.rows
        };
        let mut memory: Vec<_> = self.inputs.iter().collect();
        memory.extend([&screen, &row_bounds, &floors]);
        let kernel = of_float(self.float, ROWS_BF16, ROWS_F16, ROWS_BF16);
        let rows_launch = Launch::new(kernel, grid(*rows), &row_args, &memory);

        let (chunk, shared) = chunks(blocks, *rows, SHARED);
        let args = ScreenArgs {
            table: values.address(),
            bounds: bounds.address(),
            parts: screen.address(),
            row_bounds: row_bounds.address(),
            upper: logits.address(),
            floors: floors.address(),
            stride: self.stride as u64,
            rows: *rows as u32,
            vocabulary: *vocabulary as u32,
            blocks: blocks as u32,
            chunk: chunk as u32,
        };
        let memory = [values, bounds, &screen, &row_bounds, logits, &floors];
        let wanted = vocabulary.div_ceil(TOKENS * WARPS);
        let screen_grid = grid(wanted.min(RESIDENT * cuda.gpu().multiprocessors.max(1)));
        let screen_launch = Launch::new(SCREEN, screen_grid, &args, &memory).shared(shared);

        let count = vocabulary.div_ceil(PIECE);
        let (bests, done) = pieces(cuda, *rows, count)?;
        let args = RescoreArgs {
            table: table.address(),
            parts: parts.address(),
            factors: factors.address(),
            upper: logits.address(),
            floors: floors.address(),
            options: batch.sample_rows.memory().address(),
            bests: bests.address(),
            done: done.address(),
            tokens: samples.tokens.memory().address(),
            sampled: lanes.sampled.memory().address(),
            logprobs: samples.logprobs.memory().address(),
            stride: self.head.stride,
            rows: *rows as u32,
            vocabulary: *vocabulary as u32,
            blocks: self.head.blocks,
            first: op.first as u32,
            pieces: count as u32,
            lanes: lanes.sampled.len() as u32,
        };
        let memory = [
            table,
            parts,
            factors,
            logits,
            &floors,
            batch.sample_rows.memory(),
            &bests,
            &done,
            samples.tokens.memory(),
            lanes.sampled.memory(),
            samples.logprobs.memory(),
        ];
        let kernel = of_float(self.float, RESCORE_BF16, RESCORE_F16, RESCORE_BF16);
        let rescore = Launch::new(kernel, grid(rows * count), &args, &memory);
        Ok(vec![rows_launch, screen_launch, rescore])
    }
}
