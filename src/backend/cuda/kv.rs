//! The paged KV cache: for each layer, a piece of memory with keys and one with values, in the same
//! order:
//!
//! ```text
//!   [page][head][slot][element]
//! ```
//!
//! A row of elements is filled up with zeros to a multiple of eight, of int8 sixteen, so that it can
//! be loaded in pieces of 16 bytes. What threads read together, a head's rows of a page, is
//! contiguous. The f32 scales of the rows of an int8 cache lie behind all of its elements:
//!
//! ```text
//!   [page][head][slot]
//! ```

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
        let row = stride(head_dim, kv_type)
            .checked_mul(kv_type.size())
            .and_then(|row| row.checked_add(kv_type.scale_size()))
            .unwrap_or(usize::MAX);
        let bytes = [PAGE_TOKENS, kv_heads, row]
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

    /// Elements from one row of a head to the next.
    pub(super) fn stride(&self) -> usize {
        stride(self.layout.head_dim, self.layout.kv_type)
    }
}

/// The same of any cache.
fn stride(dim: usize, kv_type: KvType) -> usize {
    let unit = match kv_type {
        KvType::F32 | KvType::F16 => 8,
        KvType::Int8 => 16,
    };
    dim.checked_next_multiple_of(unit).unwrap_or(usize::MAX)
}
