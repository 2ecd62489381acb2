//! Ternary matrices in device memory, in the order in which the kernels read them.
//!
//! Rows are taken in tiles of 16 and columns in blocks of 64. A block of one row is 16 bytes, which
//! a thread loads at once; the blocks of a tile's 16 rows lie next to each other, so that 16
//! neighbouring threads, each with a row of its own, load 256 bytes in one piece:
//!
//! ```text
//!   [tile of 16 rows][block of 64 columns][row of the tile][4 words]
//! ```
//!
//! Word `w` of a block holds columns `16 w .. 16 w + 16`; column `16 w + 4 j + b` is in bits
//! `8 b + 2 j` and `8 b + 2 j + 1` (byte `b`), as its code 0, 1 or 2. So
//! `(word >> 2 j) & 0x03030303` is the codes of four neighbouring columns, one a byte, which is the
//! order in which quantised activations lie in memory. Rows are padded to whole tiles and columns
//! to [`quantized_stride`], with zeros' code.

use super::gpu::Gpu;
use super::memory::{Owned, Raw};
use crate::backend::quantized_stride;
use crate::error::LoadError;
use crate::ternary::{TernaryRows, ZERO_CODE};

/// Rows of a tile.
pub(super) const TILE: usize = 16;

/// Columns of a block.
pub(super) const BLOCK: usize = 64;

/// A ternary matrix in device memory, in parts that the device can bind.
pub struct TernaryMatrix {
    parts: Vec<Part>,
    rows: usize,
    cols: usize,
}

struct Part {
    codes: Owned,
    /// The scale of each row.
    scales: Owned,
    first: usize,
    rows: usize,
}

/// Some of a matrix's rows.
#[derive(Clone)]
pub(super) struct MatrixPart {
    pub(super) codes: Raw,
    pub(super) scales: Raw,
    /// The first of them.
    pub(super) first: usize,
    pub(super) rows: usize,
}

impl TernaryMatrix {
    pub(super) fn new(gpu: &Gpu, sources: &[&dyn TernaryRows]) -> Result<Self, LoadError> {
        let cols = sources.first().map_or(0, |source| source.cols());
        if let Some(other) = sources.iter().find(|source| source.cols() != cols) {
            return Err(LoadError::Option {
                option: "parts of a ternary matrix".into(),
                expected: format!("{cols} columns in each"),
                found: other.cols().to_string(),
            });
        }
        let rows: usize = sources.iter().map(|source| source.rows()).sum();
        let stride = quantized_stride(cols);
        let tile_bytes = TILE * stride / 4;
        let most = gpu.most_per_piece() / tile_bytes.max(1) as u64;
        // A part holds an even number of tiles, which is what one workgroup may take.
        let tiles_per_part = usize::try_from(most).unwrap_or(usize::MAX).max(2) / 2 * 2;
        let mut source = Rows { sources, index: 0, row: 0 };
        let mut parts = Vec::new();
        let mut first = 0;
        while first < rows {
            let count = (rows - first).min(tiles_per_part.saturating_mul(TILE));
            let tiles = count.div_ceil(TILE).next_multiple_of(2);
            let codes = gpu.reserve("ternary weights", (tiles * tile_bytes) as u64)?;
            let mut scales = Vec::with_capacity(tiles * TILE);
            let mut row = vec![ZERO_CODE; stride];
            // As many tiles at a time as keep the copy small.
            let batch = ((8 << 20) / tile_bytes.max(1)).max(1);
            let mut packed = Vec::new();
            for start in (0..tiles).step_by(batch) {
                let end = (start + batch).min(tiles);
                packed.clear();
                packed.resize((end - start) * tile_bytes, 0);
                for index in start * TILE..end * TILE {
                    let scale = if index < count {
                        source.next(&mut row[..cols])
                    } else {
                        row.fill(ZERO_CODE);
                        0.0
                    };
                    scales.push(scale);
                    let tile = &mut packed[(index / TILE - start) * tile_bytes..][..tile_bytes];
                    pack_row(&row, index % TILE, tile);
                }
                gpu.upload(&codes.raw, (start * tile_bytes) as u64, &packed)?;
            }
            let scale_memory = gpu.reserve("ternary scales", 4 * scales.len() as u64)?;
            gpu.upload(&scale_memory.raw, 0, bytemuck::cast_slice(&scales))?;
            parts.push(Part { codes, scales: scale_memory, first, rows: count });
            first += count;
        }
        Ok(Self { parts, rows, cols })
    }

    /// Rows: output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How many pieces there are.
    pub fn pieces(&self) -> usize {
        self.parts.len()
    }

    pub(super) fn parts(&self) -> Vec<MatrixPart> {
        let of = |part: &Part| MatrixPart {
            codes: part.codes.raw.clone(),
            scales: part.scales.raw.clone(),
            first: part.first,
            rows: part.rows,
        };
        self.parts.iter().map(of).collect()
    }
}

/// The rows of several sources, one after the other.
struct Rows<'a> {
    sources: &'a [&'a dyn TernaryRows],
    index: usize,
    row: usize,
}

impl Rows<'_> {
    /// Reads the next row, and answers its scale.
    fn next(&mut self, codes: &mut [u8]) -> f32 {
        while self.row == self.sources[self.index].rows() {
            (self.index, self.row) = (self.index + 1, 0);
        }
        let source = self.sources[self.index];
        source.read_codes(self.row, codes);
        self.row += 1;
        source.scale()
    }
}

/// Writes one row of codes, padded to its stride, into its place in a tile.
fn pack_row(codes: &[u8], row: usize, tile: &mut [u8]) {
    for (block, codes) in codes.chunks_exact(BLOCK).enumerate() {
        let words = &mut tile[(block * TILE + row) * 16..][..16];
        for (word, codes) in words.chunks_exact_mut(4).zip(codes.chunks_exact(16)) {
            for (byte, out) in word.iter_mut().enumerate() {
                *out = (0..4).fold(0, |bits, j| bits | codes[4 * j + byte] << (2 * j));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_and_a_mask_give_four_neighbours() {
        let codes: Vec<u8> = (0..256).map(|i| (i * 7 % 11 % 3) as u8).collect();
        let mut tile = vec![0; TILE * 256 / 4];
        pack_row(&codes, 5, &mut tile);
        for column in (0..256).step_by(4) {
            let (block, word, j) = (column / 64, column % 64 / 16, column % 16 / 4);
            let start = (block * TILE + 5) * 16 + word * 4;
            let word = u32::from_le_bytes(tile[start..start + 4].try_into().unwrap());
            let four = (word >> (2 * j) & 0x0303_0303).to_le_bytes();
            assert_eq!(four, codes[column..column + 4], "column {column}");
        }
    }
}
