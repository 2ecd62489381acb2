//! The paged KV cache.
//!
//! A page of a layer holds, for each key/value head, first its keys and then its values:
//!
//! ```text
//!   keys    [dim][32 slots]          one vector is one dimension of 16 neighbouring tokens
//!   values  [32 slots][dim, padded]  one vector is 16 dimensions of one token
//! ```
//!
//! Scores of 16 tokens then grow in the lanes of one vector with no sum across lanes, and the
//! weighted values of a token are added where the output lies.
//!
//! Of a cache of int8 the scales lie in memory of their own: 32 of the keys of a page and head, one
//! for each slot, then 32 of the values.

use super::memory::Memory;
use super::rms_norm_quantize::{absmax, quantize};
use super::simd::{LANES, Simd};
use crate::backend::{KV_FLOOR, KvLayout, KvType, PAGE_TOKENS};
use crate::error::{LoadError, RunError};
use half::f16;

/// An element type of the cache.
pub(super) trait KvElement: bytemuck::Pod + Send + Sync {
    /// Whether a key or value has a scale that its elements are multiplied by when they are read.
    const SCALED: bool = false;
    /// What the elements of a key or value are multiplied by to be stored, and its scale.
    #[inline(always)]
    fn scales<S: Simd>(s: S, head: &[f32]) -> (f32, f32) {
        let _ = (s, head);
        (1.0, 1.0)
    }
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F;
    fn store<S: Simd>(s: S, v: S::F, by: S::F, out: &mut [Self; LANES]);
}

impl KvElement for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F {
        s.load(x)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F, _by: S::F, out: &mut [Self; LANES]) {
        s.store(v, out);
    }
}

impl KvElement for f16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F {
        s.load_f16(bytemuck::cast_ref(x))
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F, _by: S::F, out: &mut [Self; LANES]) {
        s.store_f16(v, bytemuck::cast_mut(out));
    }
}

impl KvElement for i8 {
    const SCALED: bool = true;
    #[inline(always)]
    fn scales<S: Simd>(s: S, head: &[f32]) -> (f32, f32) {
        let absmax = absmax(s, head);
        if !absmax.is_finite() {
            return (0.0, f32::NAN);
        }
        let most = if absmax < KV_FLOOR { KV_FLOOR } else { absmax };
        (127.0 / most, most / 127.0)
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F {
        s.load_i8(x)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F, by: S::F, out: &mut [Self; LANES]) {
        s.store_i8(quantize(s, v, by), out);
    }
}

/// Keys and values of all layers.
pub struct KvCache {
    pub(super) layout: KvLayout,
    pub(super) data: KvData,
}

pub(super) enum KvData {
    F32(Memory<f32>),
    F16(Memory<f16>),
    Int8 { elements: Memory<i8>, scales: Memory<f32> },
}

/// Scales of a head in a page: of its keys, then of its values.
pub(super) const SCALES: usize = 2 * PAGE_TOKENS;

/// Where things lie, in elements.
#[derive(Clone, Copy)]
pub(super) struct KvShape {
    pub(super) pages: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    /// Row length of the values.
    pub(super) value_stride: usize,
}

impl KvShape {
    fn of(layout: &KvLayout) -> Self {
        Self {
            pages: layout.pages,
            kv_heads: layout.kv_heads,
            dim: layout.head_dim,
            value_stride: layout.head_dim.next_multiple_of(LANES),
        }
    }

    /// The keys of a head in a page.
    pub(super) fn keys(&self) -> usize {
        self.dim * PAGE_TOKENS
    }

    /// Keys and values of a head in a page.
    pub(super) fn head(&self) -> usize {
        self.keys() + self.value_stride * PAGE_TOKENS
    }

    /// One layer.
    pub(super) fn layer(&self) -> usize {
        self.pages * self.kv_heads * self.head()
    }

    /// Where a head of a page starts within its layer.
    pub(super) fn start(&self, page: usize, kv_head: usize) -> usize {
        (page * self.kv_heads + kv_head) * self.head()
    }

    /// The scales of a layer, where it has any.
    pub(super) fn layer_scales(&self) -> usize {
        self.pages * self.kv_heads * SCALES
    }

    /// Where those of a head of a page start.
    pub(super) fn scales_start(&self, page: usize, kv_head: usize) -> usize {
        (page * self.kv_heads + kv_head) * SCALES
    }
}

impl KvCache {
    pub(super) fn new(layout: KvLayout) -> Result<Self, LoadError> {
        let len = [
            layout.pages,
            layout.kv_heads,
            PAGE_TOKENS,
            // Keys, and values with their padding.
            layout.head_dim.saturating_add(
                layout.head_dim.checked_next_multiple_of(LANES).unwrap_or(usize::MAX),
            ),
        ]
        .into_iter()
        .try_fold(layout.layers, usize::checked_mul)
        .unwrap_or(usize::MAX);
        let what = format!(
            "the KV cache ({} layers, {} pages of {PAGE_TOKENS} tokens, {} heads of {} in {})",
            layout.layers,
            layout.pages,
            layout.kv_heads,
            layout.head_dim,
            layout.kv_type.name()
        );
        let data = match layout.kv_type {
            KvType::F32 => KvData::F32(Memory::new(&what, len)?),
            KvType::F16 => KvData::F16(Memory::new(&what, len)?),
            KvType::Int8 => KvData::Int8 {
                elements: Memory::new(&what, len)?,
                scales: Memory::new(
                    "the scales of the KV cache",
                    [layout.pages, layout.kv_heads, SCALES]
                        .into_iter()
                        .try_fold(layout.layers, usize::checked_mul)
                        .unwrap_or(usize::MAX),
                )?,
            },
        };
        Ok(Self { layout, data })
    }

    /// Checks the layer and the heads that an op expects.
    pub(super) fn shape(
        &self,
        op: &'static str,
        layer: usize,
        kv_heads: usize,
        dim: usize,
    ) -> Result<KvShape, RunError> {
        let layout = &self.layout;
        if layer < layout.layers && kv_heads == layout.kv_heads && dim == layout.head_dim {
            return Ok(KvShape::of(layout));
        }
        Err(RunError::Shape {
            op,
            argument: "kv",
            expected: format!("layer {layer} with {kv_heads} heads of {dim}"),
            found: format!(
                "{} layers with {} heads of {}",
                layout.layers, layout.kv_heads, layout.head_dim
            ),
        })
    }
}
