//! The paged KV cache: for each layer, a buffer of keys and one of values.
//!
//! Within a page, the keys of a head lie in words of a *pair* of dimensions: 32 slots of the first
//! pairs, then of the next. Threads that have a slot each read neighbouring words. Values lie slot
//! by slot, so that threads that have a pair of dimensions each do:
//!
//! ```text
//!   keys     [page][head][pair of dimensions][slot]
//!   values   [page][head][slot][pair of dimensions]
//! ```
//!
//! A pair is one word of two f16, or two words of an f32 each.

use super::gpu::Gpu;
use super::memory::{Owned, Raw};
use crate::backend::{KvLayout, KvType, PAGE_TOKENS};
use crate::error::LoadError;

/// A KV cache in device memory.
pub struct KvCache {
    layers: Vec<(Owned, Owned)>,
    pub(super) layout: KvLayout,
}

impl KvCache {
    pub(super) fn new(gpu: &Gpu, layout: KvLayout) -> Result<Self, LoadError> {
        let KvLayout { layers, pages, kv_heads, head_dim, kv_type } = layout;
        let bytes = [PAGE_TOKENS, kv_heads, head_dim, kv_type.size()]
            .into_iter()
            .try_fold(pages, usize::checked_mul)
            .map_or(u64::MAX / 2, |bytes| bytes as u64);
        let layers = (0..layers)
            .map(|_| Ok((gpu.reserve("keys", bytes)?, gpu.reserve("values", bytes)?)))
            .collect::<Result<_, LoadError>>()?;
        Ok(Self { layers, layout })
    }

    /// Keys and values of a layer.
    pub(super) fn layer(&self, layer: usize) -> (&Raw, &Raw) {
        let (keys, values) = &self.layers[layer];
        (&keys.raw, &values.raw)
    }

    /// The number that shaders know the element type by: the constant `KV_F16` there.
    pub(super) fn is_f16(&self) -> u32 {
        u32::from(self.layout.kv_type == KvType::F16)
    }
}
