//! Embedding tables and output heads, in the bytes of their checkpoint.

use super::simd::{LANES, Simd};
use crate::backend::ops::check_len;
use crate::error::RunError;
use crate::tensor::{FloatType, HostTable};

/// A table that stays where it is, usually in the file's memory map.
pub struct Table(pub(super) HostTable);

impl Table {
    /// Checks the shape that an op expects.
    pub(super) fn check(
        &self,
        op: &'static str,
        rows: Option<usize>,
        width: usize,
    ) -> Result<(), RunError> {
        let table = &self.0;
        if table.cols != width || rows.is_some_and(|rows| rows != table.rows) {
            return Err(RunError::Shape {
                op,
                argument: "table",
                expected: format!("{} rows of {width}", rows.unwrap_or(table.rows)),
                found: format!("{} rows of {}", table.rows, table.cols),
            });
        }
        let bytes = table.rows.saturating_mul(table.cols).saturating_mul(table.float.size());
        check_len(op, "table bytes", bytes, table.bytes.len())
    }
}

/// An element type of a table.
pub(super) trait Float: Copy + Send + Sync {
    /// The bytes of 16 elements.
    type Chunk: bytemuck::Pod;
    const TYPE: FloatType;
    fn load<S: Simd>(s: S, chunk: &Self::Chunk) -> S::F;
}

#[derive(Clone, Copy)]
pub(super) struct Bf16;
#[derive(Clone, Copy)]
pub(super) struct F16;
#[derive(Clone, Copy)]
pub(super) struct F32;

impl Float for Bf16 {
    type Chunk = [u8; 2 * LANES];
    const TYPE: FloatType = FloatType::Bf16;
    #[inline(always)]
    fn load<S: Simd>(s: S, chunk: &Self::Chunk) -> S::F {
        s.load_bf16(chunk)
    }
}

impl Float for F16 {
    type Chunk = [u8; 2 * LANES];
    const TYPE: FloatType = FloatType::F16;
    #[inline(always)]
    fn load<S: Simd>(s: S, chunk: &Self::Chunk) -> S::F {
        s.load_f16(chunk)
    }
}

impl Float for F32 {
    type Chunk = [u8; 4 * LANES];
    const TYPE: FloatType = FloatType::F32;
    #[inline(always)]
    fn load<S: Simd>(s: S, chunk: &Self::Chunk) -> S::F {
        let (words, _) = chunk.as_chunks::<4>();
        let mut lanes = [0.0; LANES];
        for (lane, bytes) in lanes.iter_mut().zip(words) {
            *lane = f32::from_le_bytes(*bytes);
        }
        s.load(&lanes)
    }
}
