//! [`RopeAppendKv`]: a workgroup for each 8 heads of a row, or a part of attention.

use super::dispatch::Dispatch;
use super::kernel::Kernel;
use super::kv::quads;
use super::memory::Raw;
use super::record::{Gain, Op};
use super::{Wgpu, grid};
use crate::backend::PAGE_TOKENS;
use crate::backend::ops::{Heads, RopeAppendKv, check_len};
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new("rope_append_kv", "rrrrrrwww");

/// Heads of a workgroup.
pub(super) const HEADS: usize = 8;

/// The widest head that attention can append.
pub(super) const FUSED_DIM: usize = 256;

fn kernel(f16: u32) -> Kernel {
    KERNEL.with("KV_F16", f16)
}

pub(super) fn kernels() -> Vec<Kernel> {
    vec![kernel(0), kernel(1)]
}

/// The op, kept.
pub(super) struct Rope {
    rows: usize,
    heads: Heads,
    pub(super) positions: Raw,
    pub(super) slots: Raw,
    pub(super) cos: Raw,
    pub(super) sin: Raw,
    /// Rows of `cos` and `sin`.
    pub(super) context: usize,
    query_norm: Option<Gain>,
    key_norm: Option<Gain>,
    qkv: Raw,
    keys: Raw,
    values: Raw,
    pages: usize,
    f16: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Params {
    rows: u32,
    query: u32,
    kv: u32,
    dim: u32,
    quads: u32,
    context: u32,
    slots: u32,
    query_norm: u32,
    key_norm: u32,
    query_eps: f32,
    key_eps: f32,
}

impl Rope {
    pub(super) fn new(op: &RopeAppendKv<'_, Wgpu>) -> Result<Self, RunError> {
        const OP: &str = "rope_append_kv";
        let RopeAppendKv { rows, batch, heads, qkv, cos, sin, kv, layer, .. } = op;
        let (rows, heads) = (*rows, *heads);
        check_len(OP, "positions", rows, batch.positions.len())?;
        check_len(OP, "slots", rows, batch.slots.len())?;
        check_len(OP, "qkv", rows * heads.qkv_width(), qkv.len())?;
        if heads.dim == 0 || heads.dim % 2 != 0 {
            return Err(RunError::Shape {
                op: OP,
                argument: "heads.dim",
                expected: "an even number".to_owned(),
                found: heads.dim.to_string(),
            });
        }
        let (keys, values) = kv.layer(OP, *layer, heads.kv, heads.dim)?;
        Ok(Self {
            rows,
            heads,
            positions: batch.positions.raw().clone(),
            slots: batch.slots.raw().clone(),
            cos: cos.raw().clone(),
            sin: sin.raw().clone(),
            context: cos.len().min(sin.len()) / (heads.dim / 2),
            query_norm: Gain::of(OP, op.query_norm, heads.dim)?,
            key_norm: Gain::of(OP, op.key_norm, heads.dim)?,
            qkv: qkv.raw().clone(),
            keys: keys.clone(),
            values: values.clone(),
            pages: kv.layout.pages,
            f16: kv.is_f16(),
        })
    }

    /// Whether attention can do it: the same rows, layer and cache, and no norms of heads.
    pub(super) fn goes_into(&self, next: Option<&Op>) -> bool {
        let Some(Op::Attention(attention)) = next else { return false };
        (self.rows, self.heads) == (attention.rows, attention.heads)
            && self.positions.id == attention.positions.id
            && self.qkv.id == attention.qkv.id
            && (self.keys.id, self.values.id) == (attention.keys.id, attention.values.id)
            && self.query_norm.is_none()
            && self.key_norm.is_none()
            && self.heads.dim <= FUSED_DIM
    }

    pub(super) fn dispatch(&self, wgpu: &mut Wgpu) -> Result<Dispatch, RunError> {
        let unread = wgpu.nothing_to_read()?;
        let gain = |norm: &Option<Gain>| norm.as_ref().map_or(unread.clone(), |n| n.gain.clone());
        let eps = |norm: &Option<Gain>| norm.as_ref().map_or(0.0, |norm| norm.eps);
        let Heads { query, kv, dim } = self.heads;
        let params = Params {
            rows: self.rows as u32,
            query: query as u32,
            kv: kv as u32,
            dim: dim as u32,
            quads: quads(dim) as u32,
            context: self.context as u32,
            slots: (self.pages * PAGE_TOKENS) as u32,
            query_norm: u32::from(self.query_norm.is_some()),
            key_norm: u32::from(self.key_norm.is_some()),
            query_eps: eps(&self.query_norm),
            key_eps: eps(&self.key_norm),
        };
        let bindings = [
            &self.positions,
            &self.slots,
            &self.cos,
            &self.sin,
            &gain(&self.query_norm),
            &gain(&self.key_norm),
            &self.qkv,
            &self.keys,
            &self.values,
        ];
        let groups = self.rows * (query + 2 * kv).div_ceil(HEADS);
        Ok(Dispatch::new(kernel(self.f16), &bindings, &params, grid(groups)))
    }
}
