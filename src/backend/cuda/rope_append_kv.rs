//! [`RopeAppendKv`]: a warp for each head of a row, or a part of attention.

use std::rc::Rc;

use super::Cuda;
use super::launch::{Kernel, Launch, grid};
use super::memory::Owned;
use super::record::{Gain, Op};
use crate::backend::ops::{Heads, RopeAppendKv, check_len};
use crate::backend::{KvType, PAGE_TOKENS};
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new::<Args>("rope_append_kv", 256);
const F32: Kernel = KERNEL.named("rope_append_kv_f32");
const F16: Kernel = KERNEL.named("rope_append_kv_f16");
const INT8: Kernel = KERNEL.named("rope_append_kv_int8");

pub(super) const KERNELS: &[Kernel] = &[F32, F16, INT8];

/// Heads of a block: a warp each.
const HEADS: usize = 8;

/// The op, kept.
pub(super) struct Rope {
    rows: usize,
    heads: Heads,
    pub(super) positions: Rc<Owned>,
    pub(super) slots: Rc<Owned>,
    pub(super) cos: Rc<Owned>,
    pub(super) sin: Rc<Owned>,
    /// Rows of `cos` and `sin`.
    pub(super) context: usize,
    query_norm: Option<Gain>,
    key_norm: Option<Gain>,
    qkv: Rc<Owned>,
    keys: Rc<Owned>,
    values: Rc<Owned>,
    pages: usize,
    stride: usize,
    kv_type: KvType,
}

/// `RopeAppendKvArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    positions: u64,
    slots: u64,
    cos: u64,
    sin: u64,
    query_gain: u64,
    key_gain: u64,
    qkv: u64,
    keys: u64,
    values: u64,
    query: u32,
    kv: u32,
    dim: u32,
    stride: u32,
    context: u32,
    slot_count: u32,
    query_eps: f32,
    key_eps: f32,
}

impl Rope {
    pub(super) fn new(op: &RopeAppendKv<'_, Cuda>) -> Result<Self, RunError> {
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
            positions: batch.positions.memory().clone(),
            slots: batch.slots.memory().clone(),
            cos: cos.memory().clone(),
            sin: sin.memory().clone(),
            context: cos.len().min(sin.len()) / (heads.dim / 2),
            query_norm: Gain::of(OP, op.query_norm, heads.dim)?,
            key_norm: Gain::of(OP, op.key_norm, heads.dim)?,
            qkv: qkv.memory().clone(),
            keys: keys.clone(),
            values: values.clone(),
            pages: kv.layout.pages,
            stride: kv.stride(),
            kv_type: kv.layout.kv_type,
        })
    }

    /// Whether attention can do it: the same rows, layer and cache, and no norms of heads.
    pub(super) fn goes_into(&self, next: Option<&Op>) -> bool {
        let Some(Op::Attention(attention)) = next else { return false };
        (self.rows, self.heads) == (attention.rows, attention.heads)
            && Rc::ptr_eq(&self.positions, &attention.positions)
            && Rc::ptr_eq(&self.qkv, &attention.qkv)
            && Rc::ptr_eq(&self.keys, &attention.keys)
            && Rc::ptr_eq(&self.values, &attention.values)
            && self.query_norm.is_none()
            && self.key_norm.is_none()
    }

    pub(super) fn launches(&self) -> Vec<Launch> {
        if self.rows == 0 {
            return Vec::new();
        }
        let address = |norm: &Option<Gain>| norm.as_ref().map_or(0, |norm| norm.gain.address());
        let eps = |norm: &Option<Gain>| norm.as_ref().map_or(0.0, |norm| norm.eps);
        let Heads { query, kv, dim } = self.heads;
        let Self { positions, slots, cos, sin, qkv, keys, values, .. } = self;
        let args = Args {
            positions: positions.address(),
            slots: slots.address(),
            cos: cos.address(),
            sin: sin.address(),
            query_gain: address(&self.query_norm),
            key_gain: address(&self.key_norm),
            qkv: qkv.address(),
            keys: keys.address(),
            values: values.address(),
            query: query as u32,
            kv: kv as u32,
            dim: dim as u32,
            stride: self.stride as u32,
            context: self.context as u32,
            slot_count: (self.pages * PAGE_TOKENS) as u32,
            query_eps: eps(&self.query_norm),
            key_eps: eps(&self.key_norm),
        };
        let mut memory = vec![positions, slots, cos, sin, qkv, keys, values];
        memory.extend(self.query_norm.iter().chain(&self.key_norm).map(|norm| &norm.gain));
        let kernel = match self.kv_type {
            KvType::F32 => F32,
            KvType::F16 => F16,
            KvType::Int8 => INT8,
        };
        let blocks = self.rows * (query + 2 * kv).div_ceil(HEADS);
        vec![Launch::new(kernel, grid(blocks), &args, &memory)]
    }
}
