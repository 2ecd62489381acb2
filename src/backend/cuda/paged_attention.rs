//! [`PagedAttention`]: a block for each key/value head and tile of the tokens and query heads that
//! share it; for few tokens over many keys, one for each part of the keys too, which a second
//! kernel joins.
//!
//! There are two arithmetics, and shape and type of the cache choose between them, never the rows
//! of a step: on tensor cores where the cache is f16 or int8 and the heads fit, on plain cores for
//! the rest.

use std::num::NonZeroUsize;
use std::rc::Rc;

use super::Cuda;
use super::launch::{Kernel, Launch};
use super::memory::Owned;
use super::rope_append_kv::Rope;
use crate::backend::ops::{Heads, PagedAttention, check_len};
use crate::backend::{KEY_BLOCK, KvType, NONE, PAGE_TOKENS, StepKey};
use crate::error::RunError;

const PLAIN: Kernel =
    Kernel::new::<Args>("paged_attention", 256).with_shared(plain_shared(8, WIDEST));
const TENSOR: Kernel = Kernel::new::<Args>("paged_attention_mma", 128);
const COMBINE: Kernel = Kernel::new::<CombineArgs>("paged_attention_combine", 128);

pub(super) const KERNELS: &[Kernel] = &[
    PLAIN.named("paged_attention_f32_1"),
    PLAIN.named("paged_attention_f32_4"),
    PLAIN.named("paged_attention_f32_8"),
    PLAIN.named("paged_attention_f16_1"),
    PLAIN.named("paged_attention_f16_4"),
    PLAIN.named("paged_attention_f16_8"),
    PLAIN.named("paged_attention_int8_1"),
    PLAIN.named("paged_attention_int8_4"),
    PLAIN.named("paged_attention_int8_8"),
    by_keys(1, false),
    by_keys(2, false),
    by_keys(4, false),
    by_rows(1, false),
    by_rows(2, false),
    by_rows(4, false),
    by_keys(1, true),
    by_keys(2, true),
    by_keys(4, true),
    by_rows(1, true),
    by_rows(2, true),
    by_rows(4, true),
    COMBINE,
];

/// The widest head: a thread has four elements of it.
const WIDEST: usize = 1024;
/// The widest head on tensor cores.
const WIDEST_TENSOR: usize = 256;
/// What heads on tensor cores are a multiple of: the depth of an instruction.
const DEPTH: usize = 16;

/// Rows of a tile on plain cores that are compiled for.
const ROWS: [usize; 3] = [1, 4, 8];
/// Rows of a tensor core's tile.
const TILE: usize = 16;
/// Keys of a part on tensor cores.
const PART: usize = 64;

/// Blocks that keep a device busy: below, parts of the keys get blocks of their own. Twice the
/// multiprocessors of an H100.
const BUSY: usize = 264;

/// Chunks of 64 elements of a head, a number that is compiled for.
const fn chunks(dim: usize) -> usize {
    dim.div_ceil(64).next_power_of_two()
}

/// Warps of a block by keys, and 16 rows each that one by rows has: as many as have room in 99 KiB,
/// the least that a multiprocessor of compute capability 8.x or later has.
const fn warps(chunks: usize) -> usize {
    if chunks <= 2 { 4 } else { 2 }
}

/// Tensor cores, a warp for each part of the keys; over a cache of int8, or of f16.
const fn by_keys(chunks: usize, int8: bool) -> Kernel {
    let name = match (chunks, int8) {
        (1, false) => "paged_attention_mma_f16_keys_1",
        (2, false) => "paged_attention_mma_f16_keys_2",
        (_, false) => "paged_attention_mma_f16_keys_4",
        (1, true) => "paged_attention_mma_int8_keys_1",
        (2, true) => "paged_attention_mma_int8_keys_2",
        (_, true) => "paged_attention_mma_int8_keys_4",
    };
    let mut kernel = TENSOR.named(name).with_shared(by_keys_shared(chunks));
    kernel.threads = 32 * warps(chunks) as u32;
    kernel
}

/// Tensor cores, a warp for each 16 rows, or two.
const fn by_rows(chunks: usize, int8: bool) -> Kernel {
    let name = match (chunks, int8) {
        (1, false) => "paged_attention_mma_f16_rows_1",
        (2, false) => "paged_attention_mma_f16_rows_2",
        (_, false) => "paged_attention_mma_f16_rows_4",
        (1, true) => "paged_attention_mma_int8_rows_1",
        (2, true) => "paged_attention_mma_int8_rows_2",
        (_, true) => "paged_attention_mma_int8_rows_4",
    };
    TENSOR.named(name).with_shared(by_rows_shared(chunks))
}

/// Shared memory of the kernels, as their sources lay it out.
const fn plain_shared(rows: usize, stride: usize) -> usize {
    rows * (4 * stride + 4 * KEY_BLOCK + 16 * 256)
}
const fn by_keys_shared(chunks: usize) -> usize {
    // Values of each warp's part, queries in two halves, the rows' sums, the new key.
    let row = 128 * chunks;
    warps(chunks) * PART * row + 2 * TILE * row + TILE * 2 * row + row
}
const fn by_rows_shared(chunks: usize) -> usize {
    // Keys and values of a part, queries in two halves.
    let row = 128 * chunks;
    2 * PART * row + 2 * warps(chunks) * TILE * row
}

/// The op, kept.
pub(super) struct Attention {
    /// The rotation and the append before it, where they are fused into it.
    pub(super) rope: Option<Rope>,
    pub(super) rows: usize,
    pub(super) heads: Heads,
    pub(super) positions: Rc<Owned>,
    pub(super) qkv: Rc<Owned>,
    pub(super) keys: Rc<Owned>,
    pub(super) values: Rc<Owned>,
    sequences: usize,
    sequence_of: Rc<Owned>,
    query_starts: Rc<Owned>,
    page_table: Rc<Owned>,
    max_pages: usize,
    pages: usize,
    stride: usize,
    kv_type: KvType,
    scale: f32,
    window: Option<NonZeroUsize>,
    output: Rc<Owned>,
}

/// `AttentionArgs` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    positions: u64,
    sequences: u64,
    query_starts: u64,
    page_table: u64,
    qkv: u64,
    keys: u64,
    values: u64,
    output: u64,
    outs: u64,
    statistics: u64,
    slots: u64,
    cos: u64,
    sin: u64,
    rows: u32,
    sequence_count: u32,
    max_pages: u32,
    pages: u32,
    query: u32,
    kv: u32,
    dim: u32,
    stride: u32,
    tokens: u32,
    heads: u32,
    parts: u32,
    context: u32,
    scale: f32,
    window: u32,
}

/// `PagedAttentionCombineArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct CombineArgs {
    attention: Args,
    keys: u32,
    of_block: u32,
}

/// How a launch takes its rows and keys.
struct Form {
    kernel: Kernel,
    shared: usize,
    /// Rows of a tile.
    rows: usize,
    /// Keys that a block takes at a time, and those of a part.
    keys: usize,
    part: usize,
}

impl Attention {
    pub(super) fn new(op: &PagedAttention<'_, Cuda>) -> Result<Self, RunError> {
        const OP: &str = "paged_attention";
        let PagedAttention { rows, sequences, batch, heads, qkv, kv, layer, output, .. } = op;
        let (rows, sequences, heads) = (*rows, *sequences, *heads);
        check_len(OP, "positions", rows, batch.positions.len())?;
        check_len(OP, "sequences", rows, batch.sequences.len())?;
        check_len(OP, "query_starts", sequences + 1, batch.query_starts.len())?;
        check_len(OP, "page_table", sequences * batch.max_pages, batch.page_table.len())?;
        check_len(OP, "qkv", rows * heads.qkv_width(), qkv.len())?;
        check_len(OP, "output", rows * heads.output_width(), output.len())?;
        let shape = |argument, expected: String, found: String| {
            Err(RunError::Shape { op: OP, argument, expected, found })
        };
        if heads.kv == 0 || heads.query == 0 || heads.query % heads.kv != 0 {
            let expected = "as many query heads for each key/value head".to_owned();
            return shape("heads", expected, format!("{heads:?}"));
        }
        if heads.dim == 0 || heads.dim % 2 != 0 || heads.dim > WIDEST {
            let expected = format!("an even number up to {WIDEST}");
            return shape("heads.dim", expected, heads.dim.to_string());
        }
        let (keys, values) = kv.layer(OP, *layer, heads.kv, heads.dim)?;
        Ok(Self {
            rope: None,
            rows,
            heads,
            positions: batch.positions.memory().clone(),
            qkv: qkv.memory().clone(),
            keys: keys.clone(),
            values: values.clone(),
            sequences,
            sequence_of: batch.sequences.memory().clone(),
            query_starts: batch.query_starts.memory().clone(),
            page_table: batch.page_table.memory().clone(),
            max_pages: batch.max_pages,
            pages: kv.layout.pages,
            stride: kv.stride(),
            kv_type: kv.layout.kv_type,
            scale: op.scale,
            window: op.window,
            output: output.memory().clone(),
        })
    }

    /// How rows are taken where each sequence has one of them, or may have any number.
    fn form(&self, single: bool) -> Form {
        let Heads { query, kv, dim } = self.heads;
        let group = query / kv;
        let int8 = self.kv_type == KvType::Int8;
        if (int8 || self.kv_type == KvType::F16) && dim % DEPTH == 0 && dim <= WIDEST_TENSOR {
            let chunks = chunks(dim);
            let keys = warps(chunks) * PART;
            return if single {
                let kernel = by_keys(chunks, int8);
                Form { kernel, shared: kernel.shared, rows: TILE, keys, part: PART }
            } else {
                let kernel = by_rows(chunks, int8);
                let rows = TILE * warps(chunks);
                Form { kernel, shared: kernel.shared, rows, keys, part: PART }
            };
        }
        let wanted = if single { group } else { ROWS[2] };
        let rows = ROWS.into_iter().find(|&rows| rows >= wanted).unwrap_or(ROWS[2]);
        let name = match (self.kv_type, rows) {
            (KvType::F32, 1) => "paged_attention_f32_1",
            (KvType::F32, 4) => "paged_attention_f32_4",
            (KvType::F32, _) => "paged_attention_f32_8",
            (KvType::F16, 1) => "paged_attention_f16_1",
            (KvType::F16, 4) => "paged_attention_f16_4",
            (KvType::F16, _) => "paged_attention_f16_8",
            (KvType::Int8, 1) => "paged_attention_int8_1",
            (KvType::Int8, 4) => "paged_attention_int8_4",
            (KvType::Int8, _) => "paged_attention_int8_8",
        };
        let shared = plain_shared(rows, self.stride);
        Form { kernel: PLAIN.named(name), shared, rows, keys: KEY_BLOCK, part: KEY_BLOCK }
    }

    pub(super) fn launches(&self, cuda: &mut Cuda, key: &StepKey) -> Result<Vec<Launch>, RunError> {
        if self.rows == 0 {
            return Ok(Vec::new());
        }
        let Heads { query, kv, dim } = self.heads;
        let group = query / kv;
        let single = key.queries == 1;
        let form = self.form(single);
        let head_tiles = group.div_ceil(form.rows);
        let heads = group.div_ceil(head_tiles);
        let tokens = if head_tiles > 1 { 1 } else { form.rows / heads };
        let places = if single { self.rows } else { self.rows / tokens + self.sequences + 1 };
        let blocks = places * kv * head_tiles;

        // Blocks that one row's keys lie in; a window may begin at the last key of one.
        let keys = key.pages.min(self.max_pages) * PAGE_TOKENS;
        let splits = keys.div_ceil(form.keys);
        let splits = (self.window)
            .map_or(splits, |window| splits.min((window.get() - 1).div_ceil(form.keys) + 1));
        let split = single && keys.min(splits * form.keys) > KEY_BLOCK && blocks < BUSY;
        let splits = if split { splits } else { 1 };
        let parts = if split { splits * form.keys / form.part } else { 0 };
        let states = (self.rows * query * parts) as u64;
        let scratch = match split {
            true => {
                let bytes = states * self.stride as u64 * 4;
                let outs = cuda.scratch("attention over parts", bytes)?;
                Some((outs, cuda.scratch("statistics of parts", states * 8)?))
            }
            false => None,
        };

        let Self { positions, sequence_of, query_starts, page_table, qkv, .. } = self;
        let rope = self.rope.as_ref();
        let address = |memory: Option<&Rc<Owned>>| memory.map_or(0, |memory| memory.address());
        let args = Args {
            positions: positions.address(),
            sequences: sequence_of.address(),
            query_starts: query_starts.address(),
            page_table: page_table.address(),
            qkv: qkv.address(),
            keys: self.keys.address(),
            values: self.values.address(),
            output: self.output.address(),
            outs: address(scratch.as_ref().map(|(outs, _)| outs)),
            statistics: address(scratch.as_ref().map(|(_, statistics)| statistics)),
            slots: address(rope.map(|rope| &rope.slots)),
            cos: address(rope.map(|rope| &rope.cos)),
            sin: address(rope.map(|rope| &rope.sin)),
            rows: self.rows as u32,
            sequence_count: self.sequences as u32,
            max_pages: self.max_pages as u32,
            pages: self.pages as u32,
            query: query as u32,
            kv: kv as u32,
            dim: dim as u32,
            stride: self.stride as u32,
            tokens: if single { 0 } else { tokens as u32 },
            heads: heads as u32,
            parts: parts as u32,
            context: rope.map_or(0, |rope| rope.context as u32),
            scale: self.scale,
            window: self.window.map_or(NONE, |w| u32::try_from(w.get()).unwrap_or(NONE)),
        };
        let mut memory = vec![positions, sequence_of, query_starts, page_table, qkv];
        memory.extend([&self.keys, &self.values, &self.output]);
        memory.extend(rope.iter().flat_map(|rope| [&rope.slots, &rope.cos, &rope.sin]));
        memory.extend(scratch.iter().flat_map(|(outs, statistics)| [outs, statistics]));
        let grid = [blocks as u32, splits as u32, 1];
        let mut launches = vec![Launch::new(form.kernel, grid, &args, &memory).shared(form.shared)];
        if split {
            let of_block = (form.keys / form.part) as u32;
            let args = CombineArgs { attention: args, keys: form.part as u32, of_block };
            let grid = [(self.rows * query) as u32, 1, 1];
            launches.push(Launch::new(COMBINE, grid, &args, &memory));
        }
        Ok(launches)
    }
}
