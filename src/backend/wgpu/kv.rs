//! The paged KV cache: for each layer, a buffer of keys and one of values.
//!
//! A head's elements lie in groups of four, **quads**, the last one filled up with zeros, so that a
//! thread loads four at once. Keys lie quad by quad: threads that have a slot each read neighbouring
//! memory. Values lie slot by slot, so that threads that have a quad each do:
//!
//! ```text
//!   keys     [page][head][quad][slot]
//!   values   [page][head][slot][quad]
//! ```
//!
//! A quad is two words of two f16 each, or four of an f32 each.

use super::gpu::Gpu;
use super::memory::{Owned, Raw};
use crate::backend::{KvLayout, KvType, PAGE_TOKENS};
use crate::error::{LoadError, RunError};

/// A KV cache in device memory.
pub struct KvCache {
    layers: Vec<(Owned, Owned)>,
    pub(super) layout: KvLayout,
}

impl KvCache {
    pub(super) fn new(gpu: &Gpu, layout: KvLayout) -> Result<Self, LoadError> {
        let KvLayout { layers, pages, kv_heads, head_dim, kv_type } = layout;
        let bytes = [PAGE_TOKENS, kv_heads, quads(head_dim), 4, kv_type.size()]
            .into_iter()
            .try_fold(pages, usize::checked_mul)
            .map_or(u64::MAX / 2, |bytes| bytes as u64);
        let layers = (0..layers)
            .map(|_| Ok((gpu.reserve("keys", bytes)?, gpu.reserve("values", bytes)?)))
            .collect::<Result<_, LoadError>>()?;
        Ok(Self { layers, layout })
    }

    /// Keys and values of a layer, where it has these heads.
    pub(super) fn layer(
        &self,
        op: &'static str,
        layer: usize,
        kv_heads: usize,
        dim: usize,
    ) -> Result<(&Raw, &Raw), RunError> {
        let layout = &self.layout;
        match self.layers.get(layer) {
            Some((keys, values)) if (kv_heads, dim) == (layout.kv_heads, layout.head_dim) => {
                Ok((&keys.raw, &values.raw))
            }
            _ => Err(RunError::Shape {
                op,
                argument: "kv",
                expected: format!("layer {layer} with {kv_heads} heads of {dim}"),
                found: format!(
                    "{} layers with {} heads of {}",
                    layout.layers, layout.kv_heads, layout.head_dim
                ),
            }),
        }
    }

    /// The number that shaders know the element type by: the constant `KV_F16` there.
    pub(super) fn is_f16(&self) -> u32 {
        u32::from(self.layout.kv_type == KvType::F16)
    }
}

/// Quads of a head.
pub(super) fn quads(dim: usize) -> usize {
    dim.div_ceil(4)
}
