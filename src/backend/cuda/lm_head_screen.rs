//! The output head by a copy of the table in int8. Screened, where only the best token of a few rows is
//! wanted: bounds on all logits from the copy, then the logits of those that may be the best. Gives the
//! tokens of the full head; `lm_head.cu` has the proof. Or by the copy alone.

use std::rc::Rc;

use super::launch::{Kernel, Launch, grid};
use super::lm_head::{HeadArgs, ROWS_BF16, ROWS_F16, RowsArgs, WARPS, chunks};
use super::memory::Owned;
use super::sample::{PIECE, pieces};
use super::table::{ROW_BYTES, Table, of_float};
use super::{Cuda, Head};
use crate::backend::ops::Sample;
use crate::error::{LoadError, RunError};
use crate::tensor::FloatType;

const QUANTIZE_BF16: Kernel =
    Kernel::new::<QuantizeArgs>("lm_head_quantize", 256).named("lm_head_quantize_bf16");
const QUANTIZE_F16: Kernel =
    Kernel::new::<QuantizeArgs>("lm_head_quantize", 256).named("lm_head_quantize_f16");
const QUANTIZE_F32: Kernel =
    Kernel::new::<QuantizeArgs>("lm_head_quantize", 256).named("lm_head_quantize_f32");
const INT8: Kernel =
    Kernel::new::<Int8Args>("lm_head", 256).named("lm_head_int8").with_shared(SHARED);
const SCREEN: Kernel =
    Kernel::new::<ScreenArgs>("lm_head", 256).named("lm_head_screen").with_shared(SHARED);
const RESCORE_BF16: Kernel =
    Kernel::new::<RescoreArgs>("lm_head", 256).named("lm_head_rescore_bf16");
const RESCORE_F16: Kernel = Kernel::new::<RescoreArgs>("lm_head", 256).named("lm_head_rescore_f16");

pub(super) const KERNELS: &[Kernel] =
    &[QUANTIZE_BF16, QUANTIZE_F16, QUANTIZE_F32, INT8, SCREEN, RESCORE_BF16, RESCORE_F16];

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

/// `LmHeadInt8Args` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Int8Args {
    table: u64,
    bounds: u64,
    parts: u64,
    row_bounds: u64,
    floors: u64,
    factors: u64,
    logits: u64,
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
#[derive(Clone)]
pub(super) struct Copy {
    pub(super) values: Rc<Owned>,
    pub(super) bounds: Rc<Owned>,
    /// Bytes from one row to the next.
    pub(super) stride: usize,
}

impl Copy {
    /// Makes the copy that a head of this kind reads, on the device.
    pub(super) fn new(cuda: &Cuda, table: &Table, head: Head) -> Result<Option<Self>, LoadError> {
        if head == Head::Full || table.rows == 0 || table.cols == 0 {
            return Ok(None);
        }
        // The bounds are on the logits that tensor cores compute, of 16 bits.
        if head == Head::Screened && table.float == FloatType::F32 {
            return Err(LoadError::Option {
                option: "head".into(),
                expected: "full or int8, for a model whose output head is in f32".into(),
                found: "screened".into(),
            });
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
        let kernel = of_float(table.float, QUANTIZE_BF16, QUANTIZE_F16, QUANTIZE_F32);
        let memory = [&table.memory, &values, &bounds];
        let launch = Launch::new(kernel, grid(table.rows), &args, &memory);
        cuda.launch(&launch)
            .map_err(|reason| LoadError::Device { device: cuda.info.name.clone(), reason })?;
        Ok(Some(Self { values, bounds, stride }))
    }

    /// Blocks of a row, as the kernels count them.
    fn blocks(&self) -> usize {
        self.stride / ROW_BYTES
    }

    /// A launch for as many blocks as stay on the GPU for all of the table.
    fn launch(
        &self,
        cuda: &Cuda,
        kernel: Kernel,
        args: &impl bytemuck::NoUninit,
        shape: Shape<'_>,
    ) -> Launch {
        let wanted = shape.vocabulary.div_ceil(TOKENS * WARPS);
        let grid = grid(wanted.min(RESIDENT * cuda.gpu().multiprocessors.max(1)));
        Launch::new(kernel, grid, args, shape.memory).shared(shape.shared)
    }
}

/// Rows of the input in int8, up to 8 of them: what `lm_head_rows` makes for a copy to be multiplied by.
struct Int8Rows {
    parts: Rc<Owned>,
    bounds: Rc<Owned>,
    floors: Rc<Owned>,
}

impl Int8Rows {
    fn new(cuda: &mut Cuda, rows: usize, copy: &Copy) -> Result<Self, RunError> {
        Ok(Self {
            parts: cuda.scratch("the int8 parts of rows", (rows * 2 * copy.stride) as u64)?,
            bounds: cuda.scratch("the bounds of rows", 16 * rows as u64)?,
            floors: cuda.scratch("the least of the best logits", 4 * rows as u64)?,
        })
    }

    /// The launch that makes them, beside what it makes without.
    fn launch(&self, float: FloatType, rows: &RowsArgs, memory: &[Rc<Owned>; 6]) -> Launch {
        let Self { parts, bounds, floors } = self;
        let args = RowsArgs {
            screen: parts.address(),
            bounds: bounds.address(),
            floors: floors.address(),
            ..*rows
        };
        let mut memory: Vec<_> = memory.iter().collect();
        memory.extend([parts, bounds, floors]);
        let kernel = of_float(float, ROWS_BF16, ROWS_F16, ROWS_BF16);
        Launch::new(kernel, grid(rows.part_rows as usize), &args, &memory)
    }
}

/// A pass of the head by its copy alone, of up to 8 rows.
pub(super) struct Int8<'a> {
    pub(super) rows: RowsArgs,
    pub(super) float: FloatType,
    pub(super) copy: &'a Copy,
    pub(super) logits: &'a Rc<Owned>,
    /// Where the pass's logits begin.
    pub(super) logits_at: u64,
    pub(super) vocabulary: usize,
    /// What the first kernel reads and writes; the last is the factors of logits.
    pub(super) inputs: [Rc<Owned>; 6],
}

impl Int8<'_> {
    /// Two launches.
    pub(super) fn launches(&self, cuda: &mut Cuda) -> Result<[Launch; 2], RunError> {
        let Self { rows, copy, logits, vocabulary, .. } = self;
        let int8 = Int8Rows::new(cuda, rows.rows as usize, copy)?;
        let first = int8.launch(self.float, rows, &self.inputs);
        let (chunk, shared) = chunks(copy.blocks(), rows.rows as usize, SHARED);
        let args = Int8Args {
            table: copy.values.address(),
            bounds: copy.bounds.address(),
            parts: int8.parts.address(),
            row_bounds: int8.bounds.address(),
            floors: int8.floors.address(),
            factors: rows.factors,
            logits: self.logits_at,
            stride: copy.stride as u64,
            rows: rows.rows,
            vocabulary: *vocabulary as u32,
            blocks: copy.blocks() as u32,
            chunk: chunk as u32,
        };
        let Int8Rows { parts, bounds, floors } = &int8;
        let memory =
            &[&copy.values, &copy.bounds, parts, bounds, floors, &self.inputs[5], *logits][..];
        let shape = Shape { vocabulary: *vocabulary, shared, memory };
        Ok([first, copy.launch(cuda, INT8, &args, shape)])
    }
}

/// Of a launch over a copy.
struct Shape<'a> {
    vocabulary: usize,
    shared: usize,
    memory: &'a [&'a Rc<Owned>],
}

/// A pass of the head that may be screened, with what its launches need.
pub(super) struct Screened {
    pub(super) rows: RowsArgs,
    pub(super) head: HeadArgs,
    pub(super) float: FloatType,
    pub(super) table: Rc<Owned>,
    pub(super) copy: Copy,
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
        let Self { table, copy, parts, factors, logits, .. } = self;
        let Sample { rows, vocabulary, batch, lanes, samples, .. } = op;
        let int8 = Int8Rows::new(cuda, *rows, copy)?;
        let rows_launch = int8.launch(self.float, &self.rows, &self.inputs);
        let Int8Rows { parts: screen, bounds: row_bounds, floors } = &int8;

        let (chunk, shared) = chunks(copy.blocks(), *rows, SHARED);
        let args = ScreenArgs {
            table: copy.values.address(),
            bounds: copy.bounds.address(),
            parts: screen.address(),
            row_bounds: row_bounds.address(),
            upper: logits.address(),
            floors: floors.address(),
            stride: copy.stride as u64,
            rows: *rows as u32,
            vocabulary: *vocabulary as u32,
            blocks: copy.blocks() as u32,
            chunk: chunk as u32,
        };
        let memory = &[&copy.values, &copy.bounds, screen, row_bounds, logits, floors];
        let shape = Shape { vocabulary: *vocabulary, shared, memory };
        let screen_launch = copy.launch(cuda, SCREEN, &args, shape);

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
            floors,
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
