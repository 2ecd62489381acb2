//! [`LmHead`]: the norm of the gathered rows, then the product with the table.

use std::rc::Rc;

use super::launch::{Kernel, Launch, grid};
use super::lm_head_screen::{Int8, Screened};
use super::memory::Owned;
use super::rms_norm;
use super::table::{ROW_BYTES, of_float};
use super::{Cuda, Head as HeadKind};
use crate::backend::ops::{Epilogue, LmHead, RmsNorm, check_len};
use crate::error::RunError;
use crate::tensor::FloatType;

const OP: &str = "lm_head";

pub(super) const ROWS_BF16: Kernel =
    Kernel::new::<RowsArgs>("lm_head_rows", 256).named("lm_head_rows_bf16");
pub(super) const ROWS_F16: Kernel =
    Kernel::new::<RowsArgs>("lm_head_rows", 256).named("lm_head_rows_f16");
const F32: Kernel = Kernel::new::<F32Args>("lm_head_f32", 256);

/// A variant of the product, of both types.
struct Variant {
    /// Rows of the input, at most.
    rows: usize,
    /// Rows of the table that a warp takes at a time.
    tokens: usize,
    /// Blocks that run on a multiprocessor at once.
    resident: usize,
    /// The most bytes of shared memory, for all of the input or for two chunks of it. Where blocks
    /// share a multiprocessor, few enough for all of them, on GPUs with the least of it too.
    shared: usize,
    bf16: Kernel,
    f16: Kernel,
}

impl Variant {
    const fn new(
        rows: usize,
        tokens: usize,
        resident: usize,
        shared: usize,
        names: [&'static str; 2],
    ) -> Self {
        let kernel = Kernel::new::<HeadArgs>("lm_head", 256).with_shared(shared);
        let [bf16, f16] = names;
        Self { rows, tokens, resident, shared, bf16: kernel.named(bf16), f16: kernel.named(f16) }
    }
}

const VARIANTS: [Variant; 4] = [
    Variant::new(8, 16, 3, 32 << 10, ["lm_head_bf16_8", "lm_head_f16_8"]),
    Variant::new(16, 16, 3, 32 << 10, ["lm_head_bf16_16", "lm_head_f16_16"]),
    Variant::new(32, 16, 2, 32 << 10, ["lm_head_bf16_32", "lm_head_f16_32"]),
    Variant::new(64, 32, 1, 64 << 10, ["lm_head_bf16_64", "lm_head_f16_64"]),
];

/// Rows of the input that are not padded, and that may be screened.
const FEW: usize = VARIANTS[0].rows;

/// Rows of the input that a launch takes.
const MOST_ROWS: usize = VARIANTS[3].rows;

pub(super) const KERNELS: &[Kernel] = &[
    ROWS_BF16,
    ROWS_F16,
    VARIANTS[0].bf16,
    VARIANTS[0].f16,
    VARIANTS[1].bf16,
    VARIANTS[1].f16,
    VARIANTS[2].bf16,
    VARIANTS[2].f16,
    VARIANTS[3].bf16,
    VARIANTS[3].f16,
    F32,
];

/// Warps of a block.
pub(super) const WARPS: usize = 8;

/// `LmHeadRowsArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
pub(super) struct RowsArgs {
    pub(super) input: u64,
    pub(super) gain: u64,
    pub(super) gather: u64,
    pub(super) normed: u64,
    pub(super) parts: u64,
    pub(super) factors: u64,
    pub(super) screen: u64,
    pub(super) bounds: u64,
    pub(super) floors: u64,
    pub(super) width: u32,
    pub(super) first: u32,
    pub(super) inputs: u32,
    pub(super) rows: u32,
    pub(super) part_rows: u32,
    pub(super) steps: u32,
    pub(super) eps: f32,
    pub(super) padding: u32,
}

/// `LmHeadArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
pub(super) struct HeadArgs {
    pub(super) table: u64,
    pub(super) parts: u64,
    pub(super) factors: u64,
    pub(super) logits: u64,
    pub(super) stride: u64,
    pub(super) rows: u32,
    pub(super) vocabulary: u32,
    pub(super) blocks: u32,
    pub(super) chunk: u32,
}

/// `LmHeadF32Args` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct F32Args {
    table: u64,
    normed: u64,
    logits: u64,
    stride: u64,
    rows: u32,
    width: u32,
    vocabulary: u32,
    padding: u32,
}

/// The launches of the op, and what takes their place where only the best token is wanted.
pub(super) struct Head {
    pub(super) launches: Vec<Launch>,
    pub(super) screened: Option<Screened>,
}

impl Head {
    fn full(launches: Vec<Launch>) -> Self {
        Self { launches, screened: None }
    }

    pub(super) fn new(cuda: &mut Cuda, op: LmHead<'_, Cuda>) -> Result<Self, RunError> {
        let LmHead { rows, first, width, vocabulary, batch, input, norm, table, normed, logits } =
            op;
        check_len(OP, "logits", rows * vocabulary, logits.len())?;
        table.check(OP, Some(vocabulary), width)?;
        let gather = Some(&batch.logit_rows);
        let norm = RmsNorm {
            rows,
            width,
            input,
            gather,
            first,
            norm,
            output: normed,
            epilogue: Epilogue::Store,
        };
        rms_norm::check(OP, &norm)?;
        if rows == 0 || vocabulary == 0 {
            return rms_norm::launches(&norm).map(Self::full);
        }
        let int8 = table.copy.as_ref().filter(|_| cuda.options.head == HeadKind::Int8);
        if table.float == FloatType::F32 && int8.is_none() {
            let args = F32Args {
                table: table.memory.address(),
                normed: norm.output.memory().address(),
                logits: logits.memory().address(),
                stride: table.stride() as u64,
                rows: rows as u32,
                width: width as u32,
                vocabulary: vocabulary as u32,
                padding: 0,
            };
            let memory = [&table.memory, norm.output.memory(), logits.memory()];
            let mut launches = rms_norm::launches(&norm)?;
            launches.push(Launch::new(F32, grid(vocabulary.div_ceil(WARPS)), &args, &memory));
            return Ok(Self::full(launches));
        }
        // Of 16 bits, which the rows are made for whatever the table's type.
        let blocks = (2 * width).div_ceil(ROW_BYTES);
        // Both parts of the rows of a launch, 2 bytes each.
        let bytes = MOST_ROWS.min(rows.next_multiple_of(16)) * blocks * ROW_BYTES * 2;
        let parts = cuda.scratch("the parts of rows for the output head", bytes as u64)?;
        let factors = cuda.scratch("the factors of logits", 4 * MOST_ROWS as u64)?;
        let multiprocessors = cuda.gpu().multiprocessors.max(1);
        let mut launches = Vec::new();
        let mut screened = None;
        let most = if int8.is_some() { FEW } else { MOST_ROWS };
        for start in (0..rows).step_by(most) {
            let count = most.min(rows - start);
            let variant =
                VARIANTS.iter().find(|variant| count <= variant.rows).unwrap_or(&VARIANTS[3]);
            let part_rows = if count <= FEW { count } else { variant.rows };
            let rows_args = RowsArgs {
                input: norm.input.memory().address(),
                gain: norm.norm.gain.memory().address(),
                gather: batch.logit_rows.memory().address(),
                normed: norm.output.memory().address() + 4 * (start * width) as u64,
                parts: parts.address(),
                factors: factors.address(),
                screen: 0,
                bounds: 0,
                floors: 0,
                width: width as u32,
                first: (first + start) as u32,
                inputs: (norm.input.len() / width.max(1)) as u32,
                rows: count as u32,
                part_rows: part_rows as u32,
                steps: (4 * blocks) as u32,
                eps: norm.norm.eps,
                padding: 0,
            };
            let rows_memory: [&Rc<Owned>; 6] = [
                norm.input.memory(),
                norm.norm.gain.memory(),
                batch.logit_rows.memory(),
                norm.output.memory(),
                &parts,
                &factors,
            ];
            let logits_at = logits.memory().address() + 4 * (start * vocabulary) as u64;
            if let Some(copy) = int8 {
                let pass = Int8 {
                    rows: rows_args,
                    float: table.float,
                    copy,
                    logits: logits.memory(),
                    logits_at,
                    vocabulary,
                    inputs: rows_memory.map(Rc::clone),
                };
                launches.extend(pass.launches(cuda)?);
                continue;
            }
            let kernel = of_float(table.float, ROWS_BF16, ROWS_F16, ROWS_BF16);
            launches.push(Launch::new(kernel, grid(part_rows), &rows_args, &rows_memory));

            let (chunk, shared) = chunks(blocks, part_rows, variant.shared);
            let args = HeadArgs {
                table: table.memory.address(),
                parts: parts.address(),
                factors: factors.address(),
                logits: logits_at,
                stride: table.stride() as u64,
                rows: count as u32,
                vocabulary: vocabulary as u32,
                blocks: blocks as u32,
                chunk: chunk as u32,
            };
            let memory = [&table.memory, &parts, &factors, logits.memory()];
            // Blocks stay for as many tiles as there are, so that their loads never run dry.
            let wanted = vocabulary.div_ceil(variant.tokens * WARPS);
            let head_grid = grid(wanted.min(variant.resident * multiprocessors));
            let kernel = of_float(table.float, variant.bf16, variant.f16, variant.bf16);
            launches.push(Launch::new(kernel, head_grid, &args, &memory).shared(shared));
            if let Some(copy) = table.copy.as_ref().filter(|_| rows <= FEW) {
                screened = Some(Screened {
                    rows: rows_args,
                    head: args,
                    float: table.float,
                    table: Rc::clone(&table.memory),
                    copy: copy.clone(),
                    parts: Rc::clone(&parts),
                    factors: Rc::clone(&factors),
                    logits: Rc::clone(logits.memory()),
                    inputs: rows_memory.map(Rc::clone),
                });
            }
        }
        Ok(Self { launches, screened })
    }
}

/// Blocks of the input that are in shared memory at once, all of them or two chunks, and their bytes.
pub(super) fn chunks(blocks: usize, part_rows: usize, shared: usize) -> (usize, usize) {
    let block = part_rows * 2 * ROW_BYTES;
    if blocks * block <= shared {
        return (blocks, blocks * block);
    }
    let chunk = shared / (2 * block);
    (chunk, 2 * chunk * block)
}
