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

use super::memory::Memory;
use super::simd::{LANES, Simd};
use crate::backend::{KvLayout, KvType, PAGE_TOKENS};
use crate::error::{LoadError, RunError};
use half::f16;

/// An element type of the cache.
pub(super) trait KvElement: bytemuck::Pod + Send + Sync {
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F;
    fn store<S: Simd>(s: S, v: S::F, out: &mut [Self; LANES]);
}

impl KvElement for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F {
        s.load(x)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F, out: &mut [Self; LANES]) {
        s.store(v, out);
    }
}

impl KvElement for f16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, x: &[Self; LANES]) -> S::F {
        s.load_f16(bytemuck::cast_ref(x))
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::F, out: &mut [Self; LANES]) {
        s.store_f16(v, bytemuck::cast_mut(out));
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
}

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
            "the KV cache ({} layers, {} pages of {PAGE_TOKENS} tokens, {} heads of {})",
            layout.layers, layout.pages, layout.kv_heads, layout.head_dim
        );
        let data = match layout.kv_type {
            KvType::F32 => KvData::F32(Memory::new(&what, len)?),
            KvType::F16 => KvData::F16(Memory::new(&what, len)?),
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
