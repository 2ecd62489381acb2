//! The paged KV cache: for each layer, a piece of memory with keys and one with values, in the same
//! order:
//!
//! ```text
//!   [page][head][slot][element]
//! ```
//!
//! A row of elements is filled up with zeros to a multiple of eight, so that it can be loaded in
//! pieces of 16 bytes. What threads read together, a head's rows of a page, is contiguous.

use std::rc::Rc;

use super::device::Device;
use super::memory::Owned;
use crate::backend::{KvLayout, KvType, PAGE_TOKENS};
use crate::error::{LoadError, RunError};

/// A KV cache in device memory.
pub struct KvCache {
    layers: Vec<(Rc<Owned>, Rc<Owned>)>,
    pub(super) layout: KvLayout,
}

impl KvCache {
    pub(super) fn new(device: &Rc<Device>, layout: KvLayout) -> Result<Self, LoadError> {
        let KvLayout { layers, pages, kv_heads, head_dim, kv_type } = layout;
        let bytes = [PAGE_TOKENS, kv_heads, stride(head_dim), kv_type.size()]
            .into_iter()
            .try_fold(pages, usize::checked_mul)
            .map_or(u64::MAX / 2, |bytes| bytes as u64);
        let piece = |name| Owned::new(device, name, bytes);
        let layers = (0..layers)
            .map(|_| Ok((piece("keys")?, piece("values")?)))
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
    ) -> Result<(&Rc<Owned>, &Rc<Owned>), RunError> {
        let layout = &self.layout;
        match self.layers.get(layer) {
            Some((keys, values)) if (kv_heads, dim) == (layout.kv_heads, layout.head_dim) => {
                Ok((keys, values))
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

    pub(super) fn is_f16(&self) -> bool {
        self.layout.kv_type == KvType::F16
    }
}

/// Elements from one row of a head to the next.
pub(super) fn stride(dim: usize) -> usize {
    dim.next_multiple_of(8)
}
