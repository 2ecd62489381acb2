//! [`RopeAppendKv`]: rotary positions, and new keys and values into the cache.

use super::isa::Kernel;
use super::kv::{KvData, KvElement, KvShape, SCALES};
use super::pool::Disjoint;
use super::rms_norm::norm_row;
use super::simd::{LANES, Simd};
use super::{Cpu, SMALL, scratch};
use crate::backend::ops::{Heads, Norm, RopeAppendKv, check_len};
use crate::backend::{NONE, PAGE_TOKENS};
use crate::error::RunError;
use std::ops::Range;

type HeadNorm<'a> = Option<(&'a [f32], f32)>;

/// Norms and rotates the query and key heads of some rows, in place.
struct Rotate<'a> {
    rows: Range<usize>,
    heads: Heads,
    qkv: &'a Disjoint<'a, f32>,
    positions: &'a [u32],
    cos: &'a [f32],
    sin: &'a [f32],
    query_norm: HeadNorm<'a>,
    key_norm: HeadNorm<'a>,
    /// One head.
    scratch: &'a mut [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (dim, half) = (self.heads.dim, self.heads.dim / 2);
        let width = self.heads.qkv_width();
        let rotated = (self.heads.query + self.heads.kv) * dim;
        for row in self.rows {
            let at = self.positions[row] as usize * half;
            // Only padding has positions beyond the tables.
            let (Some(cos), Some(sin)) = (self.cos.get(at..at + half), self.sin.get(at..at + half))
            else {
                continue;
            };
            // SAFETY: the parts of a job have rows of their own.
            let heads = unsafe { self.qkv.range(row * width..row * width + rotated) };
            for (head, x) in heads.chunks_exact_mut(dim).enumerate() {
                let norm = if head < self.heads.query { self.query_norm } else { self.key_norm };
                if let Some((gain, eps)) = norm {
                    norm_row(s, x, gain, eps, self.scratch);
                    x.copy_from_slice(self.scratch);
                }
                rotate(s, x, cos, sin);
            }
        }
    }
}

#[inline(always)]
fn rotate<S: Simd>(s: S, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = x.split_at_mut(cos.len());
    let (low, low_tail) = low.as_chunks_mut::<LANES>();
    let (high, high_tail) = high.as_chunks_mut::<LANES>();
    let (cos, cos_tail) = cos.as_chunks::<LANES>();
    let (sin, sin_tail) = sin.as_chunks::<LANES>();
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let (l, h) = rotated(s, s.load(low), s.load(high), s.load(cos), s.load(sin));
        s.store(l, low);
        s.store(h, high);
    }
    if !low_tail.is_empty() {
        let (cos, sin) = (s.load_tail(cos_tail), s.load_tail(sin_tail));
        let (l, h) = rotated(s, s.load_tail(low_tail), s.load_tail(high_tail), cos, sin);
        s.store_tail(l, low_tail);
        s.store_tail(h, high_tail);
    }
}

#[inline(always)]
fn rotated<S: Simd>(s: S, low: S::F, high: S::F, cos: S::F, sin: S::F) -> (S::F, S::F) {
    (s.sub(s.mul(low, cos), s.mul(high, sin)), s.add(s.mul(high, cos), s.mul(low, sin)))
}

/// Appends keys and values of some key/value heads, for all rows.
struct Append<'a, T> {
    kv_heads: Range<usize>,
    heads: Heads,
    qkv: &'a [f32],
    /// Slot of each row.
    slots: &'a [u32],
    shape: KvShape,
    /// The layer.
    cache: &'a Disjoint<'a, T>,
    /// Its scales, where it has any.
    scales: &'a Disjoint<'a, f32>,
}

impl<T: KvElement> Kernel for Append<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Heads { query, kv, dim } = self.heads;
        let width = self.heads.qkv_width();
        let mut lanes = [T::zeroed(); LANES];
        for kv_head in self.kv_heads {
            for (row, &slot) in self.slots.iter().enumerate() {
                if slot == NONE {
                    continue;
                }
                let (page, slot) = (slot as usize / PAGE_TOKENS, slot as usize % PAGE_TOKENS);
                let start = self.shape.start(page, kv_head);
                // SAFETY: the parts of a job have heads of their own.
                let head = unsafe { self.cache.range(start..start + self.shape.head()) };
                let (keys, values) = head.split_at_mut(self.shape.keys());
                let row = &self.qkv[row * width..][..width];
                let key = &row[(query + kv_head) * dim..][..dim];
                let value = &row[(query + kv + kv_head) * dim..][..dim];
                let (key_by, key_scale) = T::scales(s, key);
                let (value_by, value_scale) = T::scales(s, value);
                if T::SCALED {
                    let start = self.shape.scales_start(page, kv_head);
                    // SAFETY: as above.
                    let scales = unsafe { self.scales.range(start..start + SCALES) };
                    (scales[slot], scales[PAGE_TOKENS + slot]) = (key_scale, value_scale);
                }
                for (key, keys) in key.chunks(LANES).zip(keys.chunks_mut(LANES * PAGE_TOKENS)) {
                    T::store(s, s.load_tail(key), s.splat(key_by), &mut lanes);
                    for (dimension, x) in keys.chunks_exact_mut(PAGE_TOKENS).zip(lanes) {
                        dimension[slot] = x;
                    }
                }
                let values = &mut values[slot * self.shape.value_stride..];
                for (value, out) in value.chunks(LANES).zip(values.as_chunks_mut::<LANES>().0) {
                    T::store(s, s.load_tail(value), s.splat(value_by), out);
                }
            }
        }
    }
}

fn head_norm<'a>(
    argument: &'static str,
    norm: Option<Norm<'a, Cpu>>,
    dim: usize,
) -> Result<HeadNorm<'a>, RunError> {
    let Some(norm) = norm else { return Ok(None) };
    check_len("rope_append_kv", argument, dim, norm.gain.len())?;
    Ok(Some((&norm.gain[..dim], norm.eps)))
}

impl Cpu {
    pub(super) fn rope_append_kv(&mut self, op: RopeAppendKv<'_, Self>) -> Result<(), RunError> {
        const OP: &str = "rope_append_kv";
        let RopeAppendKv { rows, batch, heads, qkv, layer, .. } = op;
        let width = heads.qkv_width();
        check_len(OP, "positions", rows, batch.positions.len())?;
        check_len(OP, "slots", rows, batch.slots.len())?;
        check_len(OP, "qkv", rows * width, qkv.len())?;
        let shape = op.kv.shape(OP, layer, heads.kv, heads.dim)?;
        if heads.dim == 0 || heads.dim % 2 != 0 {
            return Err(RunError::Shape {
                op: OP,
                argument: "heads.dim",
                expected: "an even number".to_owned(),
                found: heads.dim.to_string(),
            });
        }
        let query_norm = head_norm("query_norm", op.query_norm, heads.dim)?;
        let key_norm = head_norm("key_norm", op.key_norm, heads.dim)?;
        let slots = &batch.slots[..rows];
        let limit = shape.pages * PAGE_TOKENS;
        if let Some(slot) = slots.iter().find(|&&slot| slot != NONE && slot as usize >= limit) {
            return Err(RunError::Shape {
                op: OP,
                argument: "slots",
                expected: format!("slots below {limit}"),
                found: slot.to_string(),
            });
        }

        {
            let qkv = Disjoint::new(&mut qkv[..]);
            self.pool.split(rows, 1, (rows * width, SMALL), |rows| {
                scratch::with(heads.dim, |scratch| {
                    self.token.run(Rotate {
                        rows,
                        heads,
                        qkv: &qkv,
                        positions: &batch.positions,
                        cos: op.cos,
                        sin: op.sin,
                        query_norm,
                        key_norm,
                        scratch,
                    });
                });
            });
        }
        let layer_of = layer * shape.layer()..(layer + 1) * shape.layer();
        match &mut op.kv.data {
            KvData::F32(data) => {
                self.append(heads, qkv, slots, shape, (&mut data[layer_of], &mut []))
            }
            KvData::F16(data) => {
                self.append(heads, qkv, slots, shape, (&mut data[layer_of], &mut []))
            }
            KvData::Int8 { elements, scales } => {
                let scales = &mut scales[layer * shape.layer_scales()..][..shape.layer_scales()];
                self.append(heads, qkv, slots, shape, (&mut elements[layer_of], scales));
            }
        }
        Ok(())
    }

    fn append<T: KvElement>(
        &self,
        heads: Heads,
        qkv: &[f32],
        slots: &[u32],
        shape: KvShape,
        (cache, scales): (&mut [T], &mut [f32]),
    ) {
        let (cache, scales) = (Disjoint::new(cache), Disjoint::new(scales));
        // Keys are scattered, an element to a cache line: several times the work of a copy.
        let work = slots.len() * heads.kv * heads.dim * 4;
        self.pool.split(heads.kv, 1, (work, SMALL), |kv_heads| {
            let (cache, scales) = (&cache, &scales);
            self.token.run(Append { kv_heads, heads, qkv, slots, shape, cache, scales });
        });
    }
}
