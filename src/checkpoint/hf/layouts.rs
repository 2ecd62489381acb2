//! How Hugging Face folders store ternary matrices, besides float master weights (which are
//! [`AbsmeanRows`](crate::ternary::AbsmeanRows)).

use crate::tensor::FloatType;
use crate::ternary::TernaryRows;

/// Four rows to a byte, as transformers' `pack_weights` writes them
/// (`integrations/bitnet.py`): with `R = rows / 4`, byte `[r, c]` holds the codes of rows
/// `r`, `R + r`, `2R + r` and `3R + r` in column `c`, the first in the lowest bits.
pub(crate) struct PackedRows<'a> {
    rows: usize,
    cols: usize,
    scale: f32,
    bytes: &'a [u8],
}

impl<'a> PackedRows<'a> {
    /// `rows` is a multiple of 4 and `bytes` has `rows / 4 · cols` of them, none with code 3.
    pub(crate) fn new(rows: usize, cols: usize, scale: f32, bytes: &'a [u8]) -> Self {
        assert_eq!(bytes.len() * 4, rows * cols, "the caller has checked the shape");
        Self { rows, cols, scale, bytes }
    }
}

impl TernaryRows for PackedRows<'_> {
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
        let stored = self.rows / 4;
        let bytes = &self.bytes[row % stored * self.cols..][..self.cols];
        // The shift is a constant in each loop: vector units have no variable shift of bytes.
        match row / stored {
            0 => shift_mask::<0>(bytes, codes),
            1 => shift_mask::<2>(bytes, codes),
            2 => shift_mask::<4>(bytes, codes),
            _ => shift_mask::<6>(bytes, codes),
        }
    }
}

fn shift_mask<const SHIFT: u8>(bytes: &[u8], codes: &mut [u8]) {
    for (code, byte) in codes.iter_mut().zip(bytes) {
        *code = byte >> SHIFT & 3;
    }
}

/// Floats that are −1, 0 or +1, the scale beside them: what transformers saves of a model whose
/// packed weights it has unpacked (`AutoBitLinear`, offline).
pub(crate) struct ValueRows<'a> {
    rows: usize,
    cols: usize,
    scale: f32,
    float: FloatType,
    bytes: &'a [u8],
}

impl<'a> ValueRows<'a> {
    /// `bytes` has `rows · cols` elements. An `Err` holds the index and value of the first that is
    /// not −1, 0 or +1.
    pub(crate) fn new(
        rows: usize,
        cols: usize,
        scale: f32,
        float: FloatType,
        bytes: &'a [u8],
    ) -> Result<Self, (usize, f32)> {
        assert_eq!(bytes.len(), rows * cols * float.size(), "the caller has checked the shape");
        let mut values = vec![0.0; cols];
        for (row, bytes) in bytes.chunks_exact(cols * float.size()).enumerate() {
            float.decode(bytes, &mut values);
            let other = |v: &f32| ![-1.0, 0.0, 1.0].contains(v);
            if let Some(col) = values.iter().position(other) {
                return Err((row * cols + col, values[col]));
            }
        }
        Ok(Self { rows, cols, scale, float, bytes })
    }
}

impl TernaryRows for ValueRows<'_> {
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
        let size = self.float.size();
        let bytes = &self.bytes[row * self.cols * size..][..self.cols * size];
        let mut values = [0.0; 256];
        for (codes, bytes) in codes.chunks_mut(256).zip(bytes.chunks(256 * size)) {
            let values = &mut values[..codes.len()];
            self.float.decode(bytes, values);
            for (code, value) in codes.iter_mut().zip(values) {
                *code = (*value + 1.0) as u8;
            }
        }
    }
}
