//! [`PagedAttention`]: a workgroup for each token, key/value head and tile of the query heads that
//! share it; for few tokens over many keys, one for each block of keys too, whose states a second
//! kernel joins.

use std::num::NonZeroUsize;

use super::dispatch::Dispatch;
use super::kernel::{Kernel, WORKGROUP};
use super::kv::quads;
use super::memory::Raw;
use super::rope_append_kv::Rope;
use super::{Wgpu, grid};
use crate::backend::ops::{Heads, PagedAttention, check_len};
use crate::backend::{KEY_BLOCK, NONE, PAGE_TOKENS, StepKey};
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new("paged_attention", "rrrrrrrwww");
const COMBINE: Kernel = Kernel::new("paged_attention_combine", "rrrrw");

/// Query heads of a tile that are compiled for: each key that is loaded serves all of them.
const TILES: [usize; 3] = [1, 2, 4];

/// Groups of threads that go through the keys' values at most. Few make the sum over them short.
const GROUPS: usize = 32;

/// Workgroups that keep a device busy: below, the blocks of keys get workgroups of their own.
const BUSY: usize = 256;

const BLOCK_PAGES: usize = KEY_BLOCK / PAGE_TOKENS;

// A thread has a key.
const _: () = assert!(KEY_BLOCK == WORKGROUP as usize);

fn kernel(tile: usize, f16: u32, split: bool, fused: bool) -> Kernel {
    KERNEL
        .with("QUERIES", tile as u32)
        .with("KV_F16", f16)
        .with("SPLIT", u32::from(split))
        .with("FUSED", u32::from(fused))
}

pub(super) fn kernels() -> Vec<Kernel> {
    let mut kernels = vec![COMBINE];
    for tile in TILES {
        for f16 in [0, 1] {
            for split in [false, true] {
                kernels.extend([false, true].map(|fused| kernel(tile, f16, split, fused)));
            }
        }
    }
    kernels
}

/// The op, kept.
pub(super) struct Attention {
    /// The rotation and the append before it, where they are fused into it.
    pub(super) rope: Option<Rope>,
    pub(super) rows: usize,
    pub(super) heads: Heads,
    pub(super) positions: Raw,
    pub(super) qkv: Raw,
    pub(super) keys: Raw,
    pub(super) values: Raw,
    sequences: usize,
    sequence_of: Raw,
    query_starts: Raw,
    page_table: Raw,
    max_pages: usize,
    pages: usize,
    f16: u32,
    scale: f32,
    window: Option<NonZeroUsize>,
    output: Raw,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Params {
    rows: u32,
    sequences: u32,
    max_pages: u32,
    pages: u32,
    query: u32,
    kv: u32,
    dim: u32,
    quads: u32,
    groups: u32,
    tile: u32,
    tiles: u32,
    blocks: u32,
    context: u32,
    scale: f32,
    window: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct CombineParams {
    rows: u32,
    sequences: u32,
    query: u32,
    kv: u32,
    dim: u32,
    quads: u32,
    tile: u32,
    tiles: u32,
    pitch: u32,
    blocks: u32,
    max_pages: u32,
    window: u32,
}

impl Attention {
    pub(super) fn new(op: &PagedAttention<'_, Wgpu>) -> Result<Self, RunError> {
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
        let widest = 4 * WORKGROUP as usize;
        if heads.dim == 0 || heads.dim % 2 != 0 || heads.dim > widest {
            let expected = format!("an even number up to {widest}");
            return shape("heads.dim", expected, heads.dim.to_string());
        }
        let (keys, values) = kv.layer(OP, *layer, heads.kv, heads.dim)?;
        if kv.layout.pages == 0 {
            return shape("kv", "at least a page".to_owned(), "none".to_owned());
        }
        Ok(Self {
            rope: None,
            rows,
            heads,
            positions: batch.positions.raw().clone(),
            qkv: qkv.raw().clone(),
            keys: keys.clone(),
            values: values.clone(),
            sequences,
            sequence_of: batch.sequences.raw().clone(),
            query_starts: batch.query_starts.raw().clone(),
            page_table: batch.page_table.raw().clone(),
            max_pages: batch.max_pages,
            pages: kv.layout.pages,
            f16: kv.is_f16(),
            scale: op.scale,
            window: op.window,
            output: output.raw().clone(),
        })
    }

    pub(super) fn dispatches(
        &self,
        wgpu: &mut Wgpu,
        key: &StepKey,
    ) -> Result<Vec<Dispatch>, RunError> {
        if self.rows == 0 {
            return Ok(Vec::new());
        }
        let Heads { query, kv, dim } = self.heads;
        let quads = quads(dim);
        let group = query / kv;
        // Of a tile, each thread has a quad of one head.
        let most = TILES.into_iter().rev().find(|tile| tile * quads <= WORKGROUP as usize);
        let tiles = group.div_ceil(most.unwrap_or(1));
        let tile = group.div_ceil(tiles);
        let pitch = TILES.into_iter().find(|&size| size >= tile).unwrap_or(TILES[2]);
        let places = self.rows * kv * tiles;

        // Blocks that one row's keys lie in; a window may begin at the last key of one.
        let spanned = key.pages.min(self.max_pages).div_ceil(BLOCK_PAGES);
        let blocks = (self.window)
            .map_or(spanned, |window| spanned.min((window.get() - 1).div_ceil(KEY_BLOCK) + 1));
        let split = key.queries == 1 && blocks > 1 && places < BUSY;
        let window = self.window.map_or(NONE, |w| u32::try_from(w.get()).unwrap_or(NONE));
        let output = if split {
            let heads = (places * blocks * pitch) as u64;
            wgpu.scratch("attention over blocks", heads * (quads as u64 + 1) * 16)?
        } else {
            self.output.clone()
        };

        let unread = wgpu.nothing_to_read()?;
        let rope = self.rope.as_ref();
        let params = Params {
            rows: self.rows as u32,
            sequences: self.sequences as u32,
            max_pages: self.max_pages as u32,
            pages: self.pages as u32,
            query: query as u32,
            kv: kv as u32,
            dim: dim as u32,
            quads: quads as u32,
            groups: (WORKGROUP as usize / quads).min(GROUPS) as u32,
            tile: tile as u32,
            tiles: tiles as u32,
            blocks: blocks as u32,
            context: rope.map_or(0, |rope| rope.context as u32),
            scale: self.scale * std::f32::consts::LOG2_E,
            window,
        };
        let bindings = [
            &self.positions,
            rope.map_or(&self.sequence_of, |rope| &rope.slots),
            &self.query_starts,
            &self.page_table,
            rope.map_or(&unread, |rope| &rope.cos),
            rope.map_or(&unread, |rope| &rope.sin),
            &self.qkv,
            &self.keys,
            &self.values,
            &output,
        ];
        let kernel = kernel(pitch, self.f16, split, rope.is_some());
        let groups = if split { places * blocks } else { places };
        let mut dispatches = vec![Dispatch::new(kernel, &bindings, &params, grid(groups))];
        if split {
            let params = CombineParams {
                rows: self.rows as u32,
                sequences: self.sequences as u32,
                query: query as u32,
                kv: kv as u32,
                dim: dim as u32,
                quads: quads as u32,
                tile: tile as u32,
                tiles: tiles as u32,
                pitch: pitch as u32,
                blocks: blocks as u32,
                max_pages: self.max_pages as u32,
                window,
            };
            let bindings =
                [&self.positions, &self.sequence_of, &self.query_starts, &output, &self.output];
            dispatches.push(Dispatch::new(COMBINE, &bindings, &params, grid(places)));
        }
        Ok(dispatches)
    }
}
