//! Ternary weights: the codes, their packing, and absmean quantisation.
//!
//! A weight of a BitNet b1.58 matrix is `scale · t` with `t` in {−1, 0, +1} and one f32 scale for
//! the whole matrix. Everywhere in this crate `t` is kept as the **code** `c = t + 1`:
//!
//! ```text
//!   code (2 bits)   00   01   10   11
//!   t               −1    0   +1   never written; a file that holds it is refused
//! ```
//!
//! A byte packs four codes, the first in the lowest bits:
//!
//! ```text
//!   bit     7 6   5 4   3 2   1 0
//!   code     c3    c2    c1    c0
//! ```
//!
//! Codes are unsigned so that unpacking is a shift and a mask; a dot product with int8 activations
//! `q` then needs one correction for the whole row: `Σ t·q = Σ c·q − Σ q`.
//!
//! Which four weights share a byte is the business of each file format (read through
//! [`TernaryRows`]) and of each backend (written by its `pack_ternary`). [`TernaryTensor`], the
//! form for weights that are made in memory, packs four neighbours of a row.

use crate::tensor::FloatType;

/// The code of `t = 0`, with which rows are padded.
pub const ZERO_CODE: u8 = 1;

/// A ternary matrix on the host, whatever its layout, read row by row.
pub trait TernaryRows: Sync {
    /// Rows: output features.
    fn rows(&self) -> usize;
    /// Columns: input features.
    fn cols(&self) -> usize;
    /// What a sum `Σ t·q` is multiplied by, next to the activation scale: mean |W| for absmean.
    fn scale(&self) -> f32;
    /// Writes the codes of one row (each 0, 1 or 2) into `codes`, which holds [`cols`](Self::cols).
    fn read_codes(&self, row: usize, codes: &mut [u8]);
}

/// A ternary matrix in memory: row-major, four neighbouring columns to a byte, each row starting
/// on a byte of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct TernaryTensor {
    rows: usize,
    cols: usize,
    scale: f32,
    packed: Vec<u8>,
}

impl TernaryTensor {
    /// Packs `rows × cols` weights of −1, 0 and +1. `None` if their number is not `rows × cols` or
    /// one of them is something else.
    pub fn from_weights(rows: usize, cols: usize, scale: f32, weights: &[i8]) -> Option<Self> {
        if Some(weights.len()) != rows.checked_mul(cols)
            || weights.iter().any(|t| !(-1..=1).contains(t))
        {
            return None;
        }
        let codes: Vec<u8> = weights.iter().map(|&t| (t + 1) as u8).collect();
        let packed = if cols == 0 {
            Vec::new()
        } else {
            codes.chunks_exact(cols).flat_map(pack_codes).collect()
        };
        Some(Self { rows, cols, scale, packed })
    }

    /// Quantises `rows × cols` float weights by [`absmean`]. `None` if their number is something
    /// else or one of them is not finite.
    pub fn from_floats(rows: usize, cols: usize, weights: &[f32]) -> Option<Self> {
        if Some(weights.len()) != rows.checked_mul(cols) || weights.iter().any(|w| !w.is_finite()) {
            return None;
        }
        let scale = absmean(weights.iter().copied());
        let ternary: Vec<i8> = weights.iter().map(|&w| code_of_float(w, scale) as i8 - 1).collect();
        Self::from_weights(rows, cols, scale, &ternary)
    }
}

impl TernaryRows for TernaryTensor {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn scale(&self) -> f32 {
        self.scale
    }
    fn read_codes(&self, row: usize, codes: &mut [u8]) {
        let stride = self.cols.div_ceil(4);
        unpack_codes(&self.packed[row * stride..][..stride], codes);
    }
}

/// Packs codes four to a byte, first in the lowest bits; the last byte is filled with
/// [`ZERO_CODE`].
pub fn pack_codes(codes: &[u8]) -> Vec<u8> {
    codes
        .chunks(4)
        .map(|four| {
            (0..4).fold(0, |byte, i| byte | four.get(i).copied().unwrap_or(ZERO_CODE) << (2 * i))
        })
        .collect()
}

/// The inverse of [`pack_codes`]: fills `codes` from as many bytes as that takes.
pub fn unpack_codes(packed: &[u8], codes: &mut [u8]) {
    for (four, byte) in codes.chunks_mut(4).zip(packed) {
        for (i, code) in four.iter_mut().enumerate() {
            *code = byte >> (2 * i) & 3;
        }
    }
}

/// Whether a byte of packed codes holds the forbidden code 3.
pub fn has_invalid_code(byte: u8) -> bool {
    byte & (byte >> 1) & 0x55 != 0
}

/// The scale of a float matrix, `max(mean |w|, 1e-5)` (BitNet b1.58, arXiv 2402.17764, equation 3;
/// the floor is transformers'). Summed in f64, so that the order of the sum does not show in f32.
pub fn absmean(weights: impl Iterator<Item = f32>) -> f32 {
    let (count, sum) = weights.fold((0u64, 0f64), |(n, sum), w| (n + 1, sum + f64::from(w.abs())));
    let mean = if count == 0 { 0.0 } else { sum / count as f64 };
    (mean as f32).max(1e-5)
}

/// The code of a float weight under a scale from [`absmean`]:
/// `clamp(round_half_even(w · (1 / scale)), −1, 1) + 1`, the product with the reciprocal as
/// transformers computes it.
pub fn code_of_float(weight: f32, scale: f32) -> u8 {
    ((weight * (1.0 / scale)).round_ties_even().clamp(-1.0, 1.0) + 1.0) as u8
}

/// A row-major float matrix that is quantised by [`absmean`] as it is read.
pub struct AbsmeanRows<'a> {
    rows: usize,
    cols: usize,
    scale: f32,
    float: FloatType,
    bytes: &'a [u8],
}

impl<'a> AbsmeanRows<'a> {
    /// Reads all `rows × cols` weights once for their scale. An `Err` holds the index of the first
    /// weight that is not finite. `bytes` must hold just that many elements.
    pub fn new(rows: usize, cols: usize, float: FloatType, bytes: &'a [u8]) -> Result<Self, usize> {
        assert_eq!(bytes.len(), rows * cols * float.size(), "the caller has checked the shape");
        let mut row = vec![0.0; cols];
        let mut sum = 0f64;
        for r in 0..rows {
            float.decode(&bytes[r * cols * float.size()..][..cols * float.size()], &mut row);
            if let Some(c) = row.iter().position(|w| !w.is_finite()) {
                return Err(r * cols + c);
            }
            sum += row.iter().map(|w| f64::from(w.abs())).sum::<f64>();
        }
        let mean = if rows * cols == 0 { 0.0 } else { sum / (rows * cols) as f64 };
        Ok(Self { rows, cols, scale: (mean as f32).max(1e-5), float, bytes })
    }
}

impl TernaryRows for AbsmeanRows<'_> {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn scale(&self) -> f32 {
        self.scale
    }
    fn read_codes(&self, row: usize, codes: &mut [u8]) {
        let stride = self.cols * self.float.size();
        let mut weights = vec![0.0; self.cols];
        self.float.decode(&self.bytes[row * stride..][..stride], &mut weights);
        for (code, weight) in codes.iter_mut().zip(weights) {
            *code = code_of_float(weight, self.scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_as_drawn() {
        assert_eq!(pack_codes(&[2, 1, 0, 2]), [0b10_00_01_10]);
        assert_eq!(pack_codes(&[0]), [0b01_01_01_00], "the rest of a byte is zeros, code 1");
        let mut codes = [0; 5];
        unpack_codes(&pack_codes(&[2, 0, 1, 2, 0]), &mut codes);
        assert_eq!(codes, [2, 0, 1, 2, 0]);
    }

    #[test]
    fn code_three_is_found_wherever_it_stands() {
        for byte in 0..=255u8 {
            let three = (0..4).any(|i| byte >> (2 * i) & 3 == 3);
            assert_eq!(has_invalid_code(byte), three, "{byte:08b}");
        }
    }

    #[test]
    fn rounding_is_half_to_even() {
        // With scale 1 the boundaries are at ±0.5, which go to the even 0.
        let codes = [-2.0, -0.5001, -0.5, 0.0, 0.5, 0.5001, 9.0].map(|w| code_of_float(w, 1.0));
        assert_eq!(codes, [0, 0, 1, 1, 1, 2, 2]);
    }

    #[test]
    fn absmean_has_a_floor() {
        assert_eq!(absmean([0.0, 0.0].into_iter()), 1e-5);
        assert_eq!(absmean([-1.0, 0.5].into_iter()), 0.75);
        assert_eq!(absmean(std::iter::empty()), 1e-5);
    }

    #[test]
    fn wrong_sizes_and_values_are_refused() {
        assert!(TernaryTensor::from_weights(1, 2, 1.0, &[1]).is_none());
        assert!(TernaryTensor::from_weights(1, 1, 1.0, &[2]).is_none());
        assert!(TernaryTensor::from_floats(1, 1, &[f32::NAN]).is_none());
    }
}
