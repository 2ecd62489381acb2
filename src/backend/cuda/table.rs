//! Embedding tables and output heads, in the type of their checkpoint.

use std::rc::Rc;

use super::device::Device;
use super::lm_head_screen::Copy;
use super::memory::Owned;
use crate::error::{LoadError, RunError};
use crate::tensor::{FloatType, HostTable};

/// What rows are padded to: a block of `lm_head.cu`, in bytes. A hidden size that is a multiple of
/// 128, as all published ones are, needs no padding.
pub(super) const ROW_BYTES: usize = 256;

/// Bytes that are padded at a time.
const BATCH: usize = 8 << 20;

/// A table in device memory, row-major.
pub struct Table {
    pub(super) memory: Rc<Owned>,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) float: FloatType,
    /// For a screened head.
    pub(super) copy: Option<Copy>,
}

impl Table {
    pub(super) fn new(device: &Rc<Device>, table: &HostTable) -> Result<Self, LoadError> {
        let HostTable { rows, cols, float, .. } = *table;
        let row_bytes = cols * float.size();
        let stride = row_bytes.next_multiple_of(ROW_BYTES);
        let bytes = (rows as u64).saturating_mul(stride as u64);
        let memory = Owned::new(device, "embedding table", bytes)?;
        if stride == row_bytes {
            memory.upload(0, &table.bytes[..rows * row_bytes])?;
        } else {
            let batch = (BATCH / stride.max(1)).max(1);
            let mut padded = Vec::new();
            for start in (0..rows).step_by(batch) {
                padded.clear();
                for row in start..(start + batch).min(rows) {
                    padded.extend_from_slice(table.row(row));
                    padded.resize(padded.len().next_multiple_of(ROW_BYTES), 0);
                }
                memory.upload((start * stride) as u64, &padded)?;
            }
        }
        Ok(Self { memory, rows, cols, float, copy: None })
    }

    /// Bytes from one row to the next.
    pub(super) fn stride(&self) -> usize {
        (self.cols * self.float.size()).next_multiple_of(ROW_BYTES)
    }

    /// Checks the shape that an op expects.
    pub(super) fn check(
        &self,
        op: &'static str,
        rows: Option<usize>,
        width: usize,
    ) -> Result<(), RunError> {
        if self.cols == width && rows.is_none_or(|rows| rows == self.rows) {
            return Ok(());
        }
        Err(RunError::Shape {
            op,
            argument: "table",
            expected: format!("{} × {width}", rows.unwrap_or(self.rows)),
            found: format!("{} × {}", self.rows, self.cols),
        })
    }
}

/// The kernel of a type, of kernels for each.
pub(super) fn of_float<T>(float: FloatType, bf16: T, f16: T, f32: T) -> T {
    match float {
        FloatType::Bf16 => bf16,
        FloatType::F16 => f16,
        FloatType::F32 => f32,
    }
}
