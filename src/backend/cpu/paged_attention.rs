//! [`PagedAttention`]: softmax over blocks of keys.
//!
//! The rows of a sequence and key/value head are its tokens times the query heads that share that
//! head; a **tile** is up to 8 of them, which share each load of a key or value. The arithmetic of a
//! row is the same in any tile:
//!
//! 1. `score = (Σ_d q_d · k_d) · scale`, a chain of fused multiply-adds over `d` for each key;
//!    where keys have scales, the sum is multiplied by the key's first;
//! 2. per block of [`KEY_BLOCK`] keys: `m` the highest score, `p = exp(score − m)`, `l = Σ p` in 16
//!    lanes by position, `o = Σ p · v` a chain over the keys, ascending; where values have scales,
//!    `p` is multiplied by the value's for it;
//! 3. blocks are joined in ascending order, each side scaled by `exp` of its `m` minus the higher,
//!    from the first that the row sees any key of;
//! 4. `o / l`.
//!
//! Where there are fewer tiles than keep the threads busy (a long context, one token), the blocks
//! of a tile are computed by different threads and joined afterwards: the same operations.

#![expect(
    clippy::needless_range_loop,
    reason = "loops over the constants of a tile index several arrays of it"
)]

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::exp::{exp, exp_one};
use super::isa::Kernel;
use super::kv::{KvData, KvElement, KvShape, SCALES};
use super::pool::Disjoint;
use super::simd::{LANES, Registers, Simd};
use super::{Cpu, SMALL, scratch};
use crate::backend::ops::{Heads, PagedAttention, check_len, first_key};
use crate::backend::{KEY_BLOCK, PAGE_TOKENS};
use crate::error::RunError;

/// Rows of a tile: with two vectors of keys, 16 chains of multiply-adds. Four would hide their
/// latency; eight load and convert each key half as often.
const TILE: usize = 8;

/// Some rows of a sequence.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    sequence: u32,
    /// First row: token of the step times query heads per key/value head, plus which of them.
    first: u32,
    rows: u32,
    /// The first block of keys that any of its rows sees, and how many there are from it on.
    first_block: u32,
    blocks: u32,
    /// Blocks of all tiles before it.
    blocks_before: u32,
}

/// Which values some rows of a tile weigh, and which columns of them.
#[derive(Clone, Copy)]
struct Weighed {
    sequence: u32,
    /// The first page of the block of keys.
    first_page: usize,
    kv_head: usize,
    /// Keys `least .. most` of the block are those that any of the rows sees.
    least: usize,
    most: usize,
    column: usize,
    /// The first of the rows in the tile.
    first_row: usize,
}

struct Attention<'a, T> {
    heads: Heads,
    scale: f32,
    window: Option<NonZeroUsize>,
    qkv: &'a [f32],
    positions: &'a [u32],
    page_table: &'a [u32],
    max_pages: usize,
    shape: KvShape,
    /// The layer.
    cache: &'a [T],
    /// Its scales, where it has any.
    scales: &'a [f32],
    output: Disjoint<'a, f32>,
    tiles: &'a [Tile],
    /// A page number was beyond the cache.
    bad_page: AtomicBool,
}

/// What is known of a tile after some blocks: of each row `m`, `l` and `o`.
struct State<'a> {
    highest: &'a mut [f32],
    sum: &'a mut [f32],
    /// A row every `value_stride`.
    out: &'a mut [f32],
}

impl<'a> State<'a> {
    fn len(value_stride: usize) -> usize {
        TILE * (value_stride + 2)
    }

    fn new(memory: &'a mut [f32], value_stride: usize) -> Self {
        let (highest, rest) = memory.split_at_mut(TILE);
        let (sum, rest) = rest.split_at_mut(TILE);
        Self { highest, sum, out: &mut rest[..TILE * value_stride] }
    }
}

/// Tiles, whole or by their blocks.
struct Tiles<'a, T> {
    attention: &'a Attention<'a, T>,
    items: Range<usize>,
    /// Absent: item `i` is tile `i / kv_heads`, head `i % kv_heads`. Else it is block `i /
    /// kv_heads` of the blocks of all tiles, and its state goes here.
    states: Option<&'a Disjoint<'a, f32>>,
    scratch: &'a mut [f32],
}

/// Joins the blocks of tiles that [`Tiles`] has computed.
struct Join<'a, T> {
    attention: &'a Attention<'a, T>,
    states: &'a mut [f32],
}

/// The scales of a page's keys and values, by slot.
type Scales<'a> = (&'a [[f32; LANES]], &'a [[f32; LANES]]);

/// Room for the scores of a tile in one block.
const SCORES: usize = TILE * KEY_BLOCK;

impl<T: KvElement> Kernel for Tiles<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let attention = self.attention;
        let stride = attention.shape.value_stride;
        let len = State::len(stride);
        let (scores, rest) = self.scratch.split_at_mut(SCORES);
        let (all, one) = rest.split_at_mut(len);
        for item in self.items {
            let (number, kv_head) = (item / attention.heads.kv, item % attention.heads.kv);
            let (tile, blocks) = if self.states.is_none() {
                let tile = &attention.tiles[number];
                (tile, 0..tile.blocks as usize)
            } else {
                let before = |tile: &Tile| tile.blocks_before as usize <= number;
                let tile = &attention.tiles[attention.tiles.partition_point(before) - 1];
                let block = number - tile.blocks_before as usize;
                (tile, block..block + 1)
            };
            for number in blocks {
                let state = match self.states {
                    // SAFETY: the parts of a job have items of their own.
                    Some(states) => unsafe { states.range(item * len..(item + 1) * len) },
                    None if number == 0 => &mut *all,
                    None => &mut *one,
                };
                let block = tile.first_block as usize + number;
                attention.block(s, tile, kv_head, block, scores, &mut State::new(state, stride));
                if self.states.is_none() && number > 0 {
                    let one = State::new(one, stride);
                    attention.join(s, tile, block, &mut State::new(all, stride), &one);
                }
            }
            if self.states.is_none() {
                attention.store(s, tile, kv_head, &State::new(all, stride));
            }
        }
    }
}

impl<T: KvElement> Kernel for Join<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let attention = self.attention;
        let (stride, kv_heads) = (attention.shape.value_stride, attention.heads.kv);
        let len = State::len(stride);
        for tile in attention.tiles {
            for kv_head in 0..kv_heads {
                let start = (tile.blocks_before as usize * kv_heads + kv_head) * len;
                let (all, rest) = self.states[start..].split_at_mut(len);
                let mut all = State::new(all, stride);
                for number in 1..tile.blocks as usize {
                    let start = (number * kv_heads - 1) * len;
                    let one = State::new(&mut rest[start..][..len], stride);
                    let block = tile.first_block as usize + number;
                    attention.join(s, tile, block, &mut all, &one);
                }
                attention.store(s, tile, kv_head, &all);
            }
        }
    }
}

impl<T: KvElement> Attention<'_, T> {
    /// Query heads that share a key/value head.
    fn group(&self) -> usize {
        self.heads.query / self.heads.kv
    }

    /// Token and query head of a row of a tile.
    fn row(&self, tile: &Tile, kv_head: usize, row: usize) -> (usize, usize) {
        let row = tile.first as usize + row;
        (row / self.group(), kv_head * self.group() + row % self.group())
    }

    /// Positions whose keys a row sees.
    fn keys(&self, tile: &Tile, row: usize) -> Range<usize> {
        let (token, _) = self.row(tile, 0, row);
        let position = self.positions[token] as usize;
        first_key(self.window, position)..position + 1
    }

    /// Which keys of a block a row sees.
    fn seen(&self, tile: &Tile, row: usize, block: usize) -> Range<usize> {
        let keys = self.keys(tile, row);
        let of_block = |key: usize| key.saturating_sub(block * KEY_BLOCK).min(KEY_BLOCK);
        of_block(keys.start)..of_block(keys.end)
    }

    /// The number of a page of a sequence.
    fn page_number(&self, sequence: u32, index: usize) -> usize {
        let entry = sequence as usize * self.max_pages + index;
        match self.page_table.get(entry) {
            Some(&page) if index < self.max_pages && (page as usize) < self.shape.pages => {
                page as usize
            }
            _ => {
                self.bad_page.store(true, Relaxed);
                0
            }
        }
    }

    /// Keys and values of a head in a page of a sequence.
    fn page(&self, sequence: u32, index: usize, kv_head: usize) -> (&[T], &[T]) {
        let page = self.page_number(sequence, index);
        self.cache[self.shape.start(page, kv_head)..][..self.shape.head()]
            .split_at(self.shape.keys())
    }

    /// Their scales.
    fn page_scales(&self, sequence: u32, index: usize, kv_head: usize) -> Scales<'_> {
        let page = self.page_number(sequence, index);
        let scales = &self.scales[self.shape.scales_start(page, kv_head)..][..SCALES];
        let (keys, values) = scales.split_at(PAGE_TOKENS);
        (keys.as_chunks().0, values.as_chunks().0)
    }

    /// Steps 1 and 2 for one block.
    #[inline(always)]
    fn block<S: Simd>(
        &self,
        s: S,
        tile: &Tile,
        kv_head: usize,
        block: usize,
        scores: &mut [f32],
        state: &mut State<'_>,
    ) {
        let rows = tile.rows as usize;
        let (mut row, at) = (0, (kv_head, block));
        while row < rows {
            row += match S::REGISTERS {
                Registers::Many if rows - row >= 8 => {
                    self.block_of::<S, 8>(s, tile, row, at, scores, state)
                }
                Registers::Many | Registers::Few if rows - row >= 4 => {
                    self.block_of::<S, 4>(s, tile, row, at, scores, state)
                }
                Registers::Many | Registers::Few if rows - row >= 2 => {
                    self.block_of::<S, 2>(s, tile, row, at, scores, state)
                }
                _ => self.block_of::<S, 1>(s, tile, row, at, scores, state),
            };
        }
    }

    /// The same for `R` rows of the tile from `first` on.
    #[inline(always)]
    fn block_of<S: Simd, const R: usize>(
        &self,
        s: S,
        tile: &Tile,
        first: usize,
        (kv_head, block): (usize, usize),
        scores: &mut [f32],
        state: &mut State<'_>,
    ) -> usize {
        let dim = self.heads.dim;
        let width = self.heads.qkv_width();
        let mut queries: [&[f32]; R] = [&[]; R];
        let (mut unseen, mut seen) = ([0; R], [0; R]);
        // The keys that any of the rows sees. Positions rise along a sequence, so the first row sees
        // the earliest and the last the latest; but any order is right.
        let (mut least, mut most) = (KEY_BLOCK, 0);
        for r in 0..R {
            let (token, head) = self.row(tile, kv_head, first + r);
            queries[r] = &self.qkv[token * width + head * dim..][..dim];
            let keys = self.seen(tile, first + r, block);
            if !keys.is_empty() {
                (unseen[r], seen[r]) = (keys.start, keys.end);
                (least, most) = (least.min(keys.start), most.max(keys.end));
            }
        }
        if least >= most {
            return R; // none of them is joined
        }
        let pages = least / PAGE_TOKENS..most.div_ceil(PAGE_TOKENS);
        let first_page = block * (KEY_BLOCK / PAGE_TOKENS);

        for page in pages.clone() {
            let (keys, _) = self.page(tile.sequence, first_page + page, kv_head);
            let sums = score_page::<S, T, R>(s, &queries, keys);
            let key_scales =
                T::SCALED.then(|| self.page_scales(tile.sequence, first_page + page, kv_head).0);
            for r in 0..R {
                let at = r * KEY_BLOCK + page * PAGE_TOKENS;
                let (out, _) = scores[at..at + PAGE_TOKENS].as_chunks_mut::<LANES>();
                for (i, (out, sum)) in out.iter_mut().zip(sums[r]).enumerate() {
                    let sum = key_scales.map_or(sum, |scales| s.mul(sum, s.load(&scales[i])));
                    s.store(s.mul(sum, s.splat(self.scale)), out);
                }
            }
        }
        for r in 0..R {
            let row = &mut scores[r * KEY_BLOCK..][..pages.end * PAGE_TOKENS];
            row[..unseen[r]].fill(f32::NEG_INFINITY);
            row[seen[r]..].fill(f32::NEG_INFINITY);
            let of_pages = &mut row[pages.start * PAGE_TOKENS..];
            (state.highest[first + r], state.sum[first + r]) =
                soften(s, of_pages.as_chunks_mut().0);
            if T::SCALED {
                let row_pages = of_pages.chunks_exact_mut(PAGE_TOKENS);
                for (page, row) in pages.clone().zip(row_pages) {
                    let (_, scales) = self.page_scales(tile.sequence, first_page + page, kv_head);
                    for (p, scale) in row.as_chunks_mut::<LANES>().0.iter_mut().zip(scales) {
                        s.store(s.mul(s.load(p), s.load(scale)), p);
                    }
                }
                // Whatever the scales of keys are that the row does not see.
                row[..unseen[r]].fill(0.0);
                row[seen[r]..].fill(0.0);
            }
        }

        let stride = self.shape.value_stride;
        let mut column = 0;
        while column < stride {
            let left = (stride - column) / LANES;
            let of = Weighed {
                sequence: tile.sequence,
                first_page,
                kv_head,
                least,
                most,
                column,
                first_row: first,
            };
            column += LANES
                * match S::REGISTERS {
                    // With 4 rows, 16 sums; with 8, too many.
                    Registers::Many if left >= 4 && R <= 4 => {
                        self.weigh::<S, R, 4>(s, of, scores, state)
                    }
                    Registers::Many | Registers::Few if left >= 2 => {
                        self.weigh::<S, R, 2>(s, of, scores, state)
                    }
                    _ => self.weigh::<S, R, 1>(s, of, scores, state),
                };
        }
        R
    }

    /// `Σ p · v` of `V` vectors of columns. A row that sees fewer keys adds zeros.
    #[inline(always)]
    fn weigh<S: Simd, const R: usize, const V: usize>(
        &self,
        s: S,
        of: Weighed,
        weights: &[f32],
        state: &mut State<'_>,
    ) -> usize {
        let Weighed { sequence, first_page, kv_head, least, most, column, first_row } = of;
        let stride = self.shape.value_stride;
        let mut sums = [[s.splat(0.0); V]; R];
        for start in (least / PAGE_TOKENS * PAGE_TOKENS..most).step_by(PAGE_TOKENS) {
            let page = first_page + start / PAGE_TOKENS;
            let (_, values) = self.page(sequence, page, kv_head);
            let (unseen, keys) = (least.saturating_sub(start), (most - start).min(PAGE_TOKENS));
            let mut weights_of: [&[f32]; R] = [&[]; R];
            for r in 0..R {
                weights_of[r] = &weights[r * KEY_BLOCK + start..][..keys];
            }
            for (key, values) in values.chunks_exact(stride).enumerate().take(keys).skip(unseen) {
                let (values, _) = values[column..].as_chunks::<LANES>();
                let mut v = [s.splat(0.0); V];
                for i in 0..V {
                    // SAFETY: the caller has found `V` vectors between `column` and the end.
                    v[i] = T::load(s, unsafe { values.get_unchecked(i) });
                }
                for r in 0..R {
                    // SAFETY: each of these slices was cut to `keys`.
                    let weight = s.splat(unsafe { *weights_of[r].get_unchecked(key) });
                    for i in 0..V {
                        sums[r][i] = s.fma(weight, v[i], sums[r][i]);
                    }
                }
            }
        }
        for r in 0..R {
            let (out, _) = state.out[(first_row + r) * stride + column..][..V * LANES]
                .as_chunks_mut::<LANES>();
            for i in 0..V {
                s.store(sums[r][i], &mut out[i]);
            }
        }
        V
    }

    /// Step 3: `one`, which is of a later block, into `all`.
    #[inline(always)]
    fn join<S: Simd>(&self, s: S, tile: &Tile, block: usize, all: &mut State<'_>, one: &State<'_>) {
        let stride = self.shape.value_stride;
        for r in 0..tile.rows as usize {
            if self.seen(tile, r, block).is_empty() {
                continue;
            }
            if self.keys(tile, r).start / KEY_BLOCK == block {
                // The first that it sees any of: there is nothing to join it to.
                (all.highest[r], all.sum[r]) = (one.highest[r], one.sum[r]);
                all.out[r * stride..][..stride].copy_from_slice(&one.out[r * stride..][..stride]);
                continue;
            }
            let highest =
                if one.highest[r] > all.highest[r] { one.highest[r] } else { all.highest[r] };
            let of_all = exp_one(s, all.highest[r] - highest);
            let of_one = exp_one(s, one.highest[r] - highest);
            all.highest[r] = highest;
            all.sum[r] = one.sum[r].mul_add(of_one, all.sum[r] * of_all);
            let (of_all, of_one) = (s.splat(of_all), s.splat(of_one));
            let (out, _) = all.out[r * stride..][..stride].as_chunks_mut::<LANES>();
            let (more, _) = one.out[r * stride..][..stride].as_chunks::<LANES>();
            for (out, more) in out.iter_mut().zip(more) {
                let scaled = s.mul(s.load(out), of_all);
                s.store(s.fma(s.load(more), of_one, scaled), out);
            }
        }
    }

    /// Step 4, into the output.
    #[inline(always)]
    fn store<S: Simd>(&self, s: S, tile: &Tile, kv_head: usize, state: &State<'_>) {
        let dim = self.heads.dim;
        for r in 0..tile.rows as usize {
            let (token, head) = self.row(tile, kv_head, r);
            let start = token * self.heads.output_width() + head * dim;
            // SAFETY: each row of each tile has an output of its own.
            let out = unsafe { self.output.range(start..start + dim) };
            let sum = s.splat(state.sum[r]);
            let (values, _) =
                state.out[r * self.shape.value_stride..][..self.shape.value_stride].as_chunks();
            for (out, values) in out.chunks_mut(LANES).zip(values) {
                s.store_tail(s.div(s.load(values), sum), out);
            }
        }
    }
}

/// Step 1 for the keys of a page, before the scale.
#[inline(always)]
fn score_page<S: Simd, T: KvElement, const R: usize>(
    s: S,
    queries: &[&[f32]; R],
    keys: &[T],
) -> [[S::F; 2]; R] {
    let mut sums = [[s.splat(0.0); 2]; R];
    let (keys, _) = keys.as_chunks::<LANES>();
    for (d, keys) in keys.chunks_exact(2).enumerate() {
        let keys = [T::load(s, &keys[0]), T::load(s, &keys[1])];
        for r in 0..R {
            // SAFETY: a query has `dim` elements, and the keys of a page are `dim` pairs of chunks.
            let q = s.splat(unsafe { *queries[r].get_unchecked(d) });
            sums[r] = [s.fma(q, keys[0], sums[r][0]), s.fma(q, keys[1], sums[r][1])];
        }
    }
    sums
}

/// Step 2 for the scores of a row: they become `p`; `m` and `l`.
#[inline(always)]
fn soften<S: Simd>(s: S, scores: &mut [[f32; LANES]]) -> (f32, f32) {
    let mut highest = s.splat(f32::NEG_INFINITY);
    for chunk in scores.iter() {
        highest = s.max(s.load(chunk), highest);
    }
    let highest = s.highest(highest);
    let (mut sums, shift) = (s.splat(0.0), s.splat(highest));
    for chunk in scores.iter_mut() {
        let p = exp(s, s.sub(s.load(chunk), shift));
        sums = s.add(sums, p);
        s.store(p, chunk);
    }
    (highest, s.sum(sums))
}

impl Cpu {
    pub(super) fn paged_attention(&mut self, op: PagedAttention<'_, Self>) -> Result<(), RunError> {
        const OP: &str = "paged_attention";
        let PagedAttention { rows, sequences, batch, heads, qkv, kv, layer, .. } = op;
        let shape_error = |argument, expected: &str, found: String| {
            Err(RunError::Shape { op: OP, argument, expected: expected.to_owned(), found })
        };
        check_len(OP, "positions", rows, batch.positions.len())?;
        check_len(OP, "query_starts", sequences + 1, batch.query_starts.len())?;
        check_len(OP, "page_table", sequences * batch.max_pages, batch.page_table.len())?;
        check_len(OP, "qkv", rows * heads.qkv_width(), qkv.len())?;
        check_len(OP, "output", rows * heads.output_width(), op.output.len())?;
        let shape = kv.shape(OP, layer, heads.kv, heads.dim)?;
        if heads.kv == 0 || heads.dim == 0 || heads.query % heads.kv != 0 {
            let expected = "as many query heads for each key/value head";
            return shape_error("heads", expected, format!("{heads:?}"));
        }
        let group = heads.query / heads.kv;
        let starts = &batch.query_starts[..=sequences];
        let positions = &batch.positions[..rows];
        if starts.windows(2).any(|pair| pair[0] > pair[1]) || starts[sequences] as usize > rows {
            return shape_error("query_starts", "rising numbers of rows", format!("{starts:?}"));
        }

        let mut tiles = std::mem::take(&mut self.tiles);
        tiles.clear();
        let (mut blocks, mut keys) = (0, 0);
        for (sequence, pair) in starts.windows(2).enumerate() {
            let (first, end) = (pair[0] as usize * group, pair[1] as usize * group);
            for first in (first..end).step_by(TILE) {
                let count = (end - first).min(TILE);
                let tokens = first / group..=(first + count - 1) / group;
                let positions = positions[tokens].iter().map(|&position| position as usize);
                let last = positions.clone().max().unwrap_or(0);
                let start = positions.map(|p| first_key(op.window, p)).min().unwrap_or(0);
                let first_block = start / KEY_BLOCK;
                let of_tile = last / KEY_BLOCK + 1 - first_block;
                tiles.push(Tile {
                    sequence: sequence as u32,
                    first: first as u32,
                    rows: count as u32,
                    first_block: first_block as u32,
                    blocks: of_tile as u32,
                    blocks_before: blocks as u32,
                });
                blocks += of_tile;
                keys += last + 1 - start;
            }
        }
        // Rows before the first and behind the last query belong to nobody.
        let width = heads.output_width();
        op.output[..starts[0] as usize * width].fill(0.0);
        op.output[starts[sequences] as usize * width..rows * width].fill(0.0);

        let work = (keys, blocks);
        let layer_of = layer * shape.layer()..(layer + 1) * shape.layer();
        let bad = match &kv.data {
            KvData::F32(data) => self.attend(op, shape, (&data[layer_of], &[]), &tiles, work),
            KvData::F16(data) => self.attend(op, shape, (&data[layer_of], &[]), &tiles, work),
            KvData::Int8 { elements, scales } => {
                let scales = &scales[layer * shape.layer_scales()..][..shape.layer_scales()];
                self.attend(op, shape, (&elements[layer_of], scales), &tiles, work)
            }
        };
        self.tiles = tiles;
        if bad {
            let expected = format!("pages below {} for every position", shape.pages);
            return shape_error("page_table", &expected, "another number".to_owned());
        }
        Ok(())
    }

    /// Runs all tiles; whether a page number was beyond the cache.
    fn attend<T: KvElement>(
        &mut self,
        op: PagedAttention<'_, Self>,
        shape: KvShape,
        (cache, scales): (&[T], &[f32]),
        tiles: &[Tile],
        (keys, blocks): (usize, usize),
    ) -> bool {
        let attention = Attention {
            heads: op.heads,
            scale: op.scale,
            window: op.window,
            qkv: op.qkv,
            positions: &op.batch.positions,
            page_table: &op.batch.page_table,
            max_pages: op.batch.max_pages,
            shape,
            cache,
            scales,
            output: Disjoint::new(op.output),
            tiles,
            bad_page: AtomicBool::new(false),
        };
        let kv_heads = op.heads.kv;
        let work = (keys * kv_heads * op.heads.dim * TILE, 4 * SMALL);
        let (items, state) = (tiles.len() * kv_heads, State::len(shape.value_stride));
        // With four items for each thread the last to finish holds up little.
        if items >= 4 * self.pool.threads() || blocks == tiles.len() || self.pool.threads() == 1 {
            self.pool.split(items, 1, work, |items| {
                scratch::with(SCORES + 2 * state, |scratch| {
                    let attention = &attention;
                    self.token.run(Tiles { attention, items, states: None, scratch });
                });
            });
        } else {
            let needed = blocks * kv_heads * state;
            if self.states.len() < needed {
                self.states.resize(needed, 0.0);
            }
            let states = Disjoint::new(&mut self.states[..needed]);
            self.pool.split(blocks * kv_heads, 1, work, |items| {
                scratch::with(SCORES + 2 * state, |scratch| {
                    let attention = &attention;
                    self.token.run(Tiles { attention, items, states: Some(&states), scratch });
                });
            });
            self.token.run(Join { attention: &attention, states: &mut self.states[..needed] });
        }
        attention.bad_page.load(Relaxed)
    }
}
