//! Embedding tables and heads of GGUF files in a form that backends take.
//!
//! F32, F16 and BF16 stay where they are mapped. Quantised types become f16 when they are asked
//! for, row by row: f16 keeps 11 bits of each value, which is more than any of them has of its
//! block. Where it would not, because values pass its range or most lie below its normal numbers,
//! they become f32.

use std::sync::atomic::{AtomicBool, Ordering};

use half::f16;

use super::container::GgufTensor;
use super::dequantize::{block, dequantize, float};
use super::types::TensorType;
use crate::checkpoint::scan::first_non_finite;
use crate::error::LoadError;
use crate::tensor::{FloatType, HostTable, SharedBytes};

/// The least root mean square of values that become f16: below it, the error of f16's subnormal
/// numbers, 2⁻²⁵, is more than 2⁻¹² of a typical value.
const LEAST_RMS: f64 = 1.0 / (1 << 13) as f64;

/// An embedding table or an output head.
pub(crate) struct Table {
    pub(crate) tensor: GgufTensor,
    kind: TensorType,
    checked: AtomicBool,
}

impl Table {
    /// `kind` is one that [`block`] knows, and the tensor has two dimensions.
    pub(crate) fn new(tensor: GgufTensor, kind: TensorType) -> Self {
        Self { tensor, kind, checked: AtomicBool::new(false) }
    }

    /// Whether another tensor holds the same table.
    pub(crate) fn is_copied_by(&self, other: &GgufTensor) -> bool {
        let this = &self.tensor;
        other.type_id == this.type_id && other.ne == this.ne && *other.bytes == *this.bytes
    }

    /// What its elements are, and become, for people.
    pub(crate) fn describe(&self) -> String {
        let name = self.tensor.type_name();
        match float(self.kind) {
            Some(_) => name,
            None => format!("{name}, f16 when loaded (f32 where f16 would be less exact)"),
        }
    }

    /// Bytes of the table when it is loaded.
    pub(crate) fn loaded_bytes(&self) -> u64 {
        match float(self.kind) {
            Some(_) => self.tensor.bytes.len() as u64,
            None => 2 * self.tensor.ne.iter().map(|n| *n as u64).product::<u64>(),
        }
    }

    /// The table as backends take it.
    pub(crate) fn host(&self) -> Result<HostTable, LoadError> {
        let [cols, rows] = self.tensor.ne[..] else { unreachable!("the shape was checked") };
        let Some(float) = float(self.kind) else { return self.converted(rows, cols) };
        if !self.checked.load(Ordering::Acquire) {
            if let Some(element) = first_non_finite(float, &self.tensor.bytes) {
                let mut value = [0.0];
                let bytes = &self.tensor.bytes[element * float.size()..][..float.size()];
                float.decode(bytes, &mut value);
                return Err(self.non_finite(value[0], element / cols, element % cols));
            }
            self.checked.store(true, Ordering::Release);
        }
        Ok(HostTable { rows, cols, float, bytes: self.tensor.bytes.clone() })
    }

    fn non_finite(&self, value: f32, row: usize, col: usize) -> LoadError {
        self.tensor.wrong("finite numbers", format!("{value} at row {row}, column {col}"))
    }

    fn converted(&self, rows: usize, cols: usize) -> Result<HostTable, LoadError> {
        let mut bytes = Vec::with_capacity(2 * rows * cols);
        let (mut most, mut square) = (0f32, 0f64);
        self.each_row(cols, |values| {
            for value in values {
                bytes.extend(f16::from_f32(*value).to_le_bytes());
                most = most.max(value.abs());
                square += f64::from(*value).powi(2);
            }
        })?;
        let rms = (square / (rows * cols) as f64).sqrt();
        let fits = most <= f16::MAX.to_f32() && (rms >= LEAST_RMS || most == 0.0);
        let float = if fits { FloatType::F16 } else { FloatType::F32 };
        if !fits {
            bytes = Vec::new();
            bytes.reserve_exact(4 * rows * cols);
            self.each_row(cols, |values| {
                bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            })?;
        }
        let (name, kind) = (&self.tensor.name, self.tensor.type_name());
        tracing::info!("{name}: {kind} of {rows} × {cols} became {}", float.name());
        Ok(HostTable { rows, cols, float, bytes: SharedBytes::new(bytes) })
    }

    /// Hands out the rows of a quantised table, which are finite then.
    fn each_row(&self, cols: usize, mut with: impl FnMut(&[f32])) -> Result<(), LoadError> {
        let Some((values, size)) = block(self.kind) else { unreachable!("a type of a table") };
        let mut row = vec![0.0; cols];
        for (index, bytes) in self.tensor.bytes.chunks_exact(cols / values * size).enumerate() {
            dequantize(self.kind, bytes, &mut row);
            if let Some(col) = row.iter().position(|value| !value.is_finite()) {
                return Err(self.non_finite(row[col], index, col));
            }
            with(&row);
        }
        Ok(())
    }
}
