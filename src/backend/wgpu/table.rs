//! Embedding tables and output heads, in the type of their checkpoint, in as many pieces as the
//! device's bindings ask for.

use super::gpu::Gpu;
use super::memory::{Owned, Raw};
use crate::error::LoadError;
use crate::tensor::{FloatType, HostTable};

/// A table in device memory.
pub struct Table {
    chunks: Vec<(Owned, usize, usize)>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) float: FloatType,
}

/// Some of a table's rows.
pub(super) struct Chunk<'a> {
    pub(super) raw: &'a Raw,
    /// The first of them.
    pub(super) first: usize,
    pub(super) rows: usize,
}

impl Table {
    pub(super) fn new(gpu: &Gpu, table: &HostTable) -> Result<Self, LoadError> {
        Self::in_chunks(gpu, table, gpu.most_per_piece())
    }

    /// In pieces of at most `most` bytes.
    pub(super) fn in_chunks(gpu: &Gpu, table: &HostTable, most: u64) -> Result<Self, LoadError> {
        let HostTable { rows, cols, float, .. } = *table;
        // Rows start on words in device memory.
        let row_bytes = cols * float.size();
        let stride = row_bytes.next_multiple_of(4);
        let per_chunk = (most / stride.max(1) as u64).min(usize::MAX as u64) as usize;
        if per_chunk == 0 {
            return Err(LoadError::OutOfMemory {
                device: gpu.adapter().name(),
                arithmetic: format!(
                    "a row of the embedding table has {stride} bytes, and a piece may \
                     have {most}"
                ),
            });
        }
        let mut chunks = Vec::new();
        for first in (0..rows).step_by(per_chunk) {
            let count = per_chunk.min(rows - first);
            let owned = gpu.reserve("embedding table", (count * stride) as u64)?;
            if stride == row_bytes {
                let bytes = &table.bytes[first * row_bytes..][..count * row_bytes];
                gpu.upload(&owned.raw, 0, bytes)?;
            } else {
                let batch = ((8 << 20) / stride).max(1);
                let mut padded = Vec::new();
                for start in (0..count).step_by(batch) {
                    padded.clear();
                    for row in start..(start + batch).min(count) {
                        padded.extend_from_slice(table.row(first + row));
                        padded.resize(padded.len().next_multiple_of(4), 0);
                    }
                    gpu.upload(&owned.raw, (start * stride) as u64, &padded)?;
                }
            }
            chunks.push((owned, first, count));
        }
        Ok(Self { chunks, rows, cols, float })
    }

    pub(super) fn chunks(&self) -> impl Iterator<Item = Chunk<'_>> {
        self.chunks.iter().map(|(owned, first, rows)| Chunk {
            raw: &owned.raw,
            first: *first,
            rows: *rows,
        })
    }

    /// How many pieces there are.
    pub fn pieces(&self) -> usize {
        self.chunks.len()
    }

    /// Words from one row to the next.
    pub(super) fn stride_words(&self) -> usize {
        (self.cols * self.float.size()).div_ceil(4)
    }

    /// The number that shaders know the type by.
    pub(super) fn float_code(&self) -> u32 {
        float_code(self.float)
    }
}

/// The number that shaders know a type by, in their constant `FLOAT`.
pub(super) const fn float_code(float: FloatType) -> u32 {
    match float {
        FloatType::Bf16 => 0,
        FloatType::F16 => 1,
        FloatType::F32 => 2,
    }
}

/// All types, for what compiles a kernel for each.
pub(super) const FLOATS: [FloatType; 3] = [FloatType::Bf16, FloatType::F16, FloatType::F32];
