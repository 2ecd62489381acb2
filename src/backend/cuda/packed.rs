//! Ternary matrices in device memory, in the order in which the kernels read them.
//!
//! Rows are taken in pairs of tiles of 8 and columns in blocks of 256:
//!
//! ```text
//!   [pair of tiles][block of 256 columns][tile of the pair][lane of 32][4 words]
//! ```
//!
//! A warp loads a tile's part of a block, 512 bytes, in one piece, 16 bytes a lane. Lane `4 g + t`
//! has row `g` of the tile, and word `j` of its four the columns `64 j + 16 t .. + 16` of the block;
//! column `4 s + b` of those is in bits `8 b + 2 s` and `8 b + 2 s + 1`, as its code 0, 1 or 2. So
//! `(word >> 2 s) & 0x03030303` is the codes of four neighbouring columns, one a byte, which is the
//! order in which quantised activations lie in memory; the four lanes of a row want 64 neighbouring
//! bytes of those; and this is also how a tensor core's operands are spread over the lanes, up to
//! an exchange of columns that is the same for weights and activations.
//!
//! Rows are padded to whole pairs and columns to [`quantized_stride`], with zeros' code.

use std::rc::Rc;

use super::device::Device;
use super::memory::Owned;
use crate::backend::quantized_stride;
use crate::error::LoadError;
use crate::ternary::{TernaryRows, ZERO_CODE};

/// Rows of a pair of tiles.
pub(super) const PAIR: usize = 16;

/// Columns of a block.
pub(super) const BLOCK: usize = 256;

/// Rows of a tile, and its bytes in a block.
const TILE: usize = 8;
const TILE_BYTES: usize = TILE * BLOCK / 4;

/// The most columns: the kernels keep sums of codes times 4 in i32, to which every second column
/// adds at most `4 · 2 · 128`.
const MOST_COLS: usize = 1 << 21;

/// A ternary matrix in device memory.
#[derive(Clone)]
pub struct TernaryMatrix {
    pub(super) codes: Rc<Owned>,
    /// The scale of each row.
    pub(super) scales: Rc<Owned>,
    rows: usize,
    cols: usize,
}

impl TernaryMatrix {
    pub(super) fn new(device: &Rc<Device>, parts: &[&dyn TernaryRows]) -> Result<Self, LoadError> {
        let cols = parts.first().map_or(0, |part| part.cols());
        let refuse = |expected, found: usize| LoadError::Option {
            option: "parts of a ternary matrix".into(),
            expected,
            found: found.to_string(),
        };
        if let Some(other) = parts.iter().find(|part| part.cols() != cols) {
            return Err(refuse(format!("{cols} columns in each"), other.cols()));
        }
        if cols > MOST_COLS {
            return Err(refuse(format!("at most {MOST_COLS} columns"), cols));
        }
        let rows: usize = parts.iter().map(|part| part.rows()).sum();
        let stride = quantized_stride(cols);
        let pair_bytes = PAIR * stride / 4;
        let pairs = rows.div_ceil(PAIR);
        let codes = Owned::new(device, "ternary weights", (pairs * pair_bytes) as u64)?;
        let mut source = Rows { parts, index: 0, row: 0 };
        let mut scales = Vec::with_capacity(pairs * PAIR);
        let mut row = vec![ZERO_CODE; stride];
        // As many pairs at a time as keep the copy small.
        let batch = ((8 << 20) / pair_bytes.max(1)).max(1);
        let mut packed = Vec::new();
        for start in (0..pairs).step_by(batch) {
            let end = (start + batch).min(pairs);
            packed.clear();
            packed.resize((end - start) * pair_bytes, 0);
            for index in start * PAIR..end * PAIR {
                let scale = if index < rows {
                    source.next(&mut row[..cols])
                } else {
                    row.fill(ZERO_CODE);
                    0.0
                };
                scales.push(scale);
                let pair = &mut packed[(index / PAIR - start) * pair_bytes..][..pair_bytes];
                pack_row(&row, index % PAIR, pair);
            }
            codes.upload((start * pair_bytes) as u64, &packed)?;
        }
        let scale_memory = Owned::new(device, "ternary scales", 4 * scales.len() as u64)?;
        scale_memory.upload(0, bytemuck::cast_slice(&scales))?;
        Ok(Self { codes, scales: scale_memory, rows, cols })
    }

    /// Rows: output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: input features.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// The rows of several parts, one after the other.
struct Rows<'a> {
    parts: &'a [&'a dyn TernaryRows],
    index: usize,
    row: usize,
}

impl Rows<'_> {
    /// Reads the next row, and answers its scale.
    fn next(&mut self, codes: &mut [u8]) -> f32 {
        while self.row == self.parts[self.index].rows() {
            (self.index, self.row) = (self.index + 1, 0);
        }
        let part = self.parts[self.index];
        part.read_codes(self.row, codes);
        self.row += 1;
        part.scale()
    }
}

/// Writes one row of codes, padded to its stride, into its places in a pair of tiles.
fn pack_row(codes: &[u8], row: usize, pair: &mut [u8]) {
    let (tile, g) = (row / TILE, row % TILE);
    for (block, codes) in codes.chunks_exact(BLOCK).enumerate() {
        let tile = &mut pair[(2 * block + tile) * TILE_BYTES..][..TILE_BYTES];
        for (i, codes) in codes.chunks_exact(16).enumerate() {
            let (j, t) = (i / 4, i % 4);
            let word = &mut tile[(4 * g + t) * 16 + 4 * j..][..4];
            for (b, out) in word.iter_mut().enumerate() {
                *out = (0..4).fold(0, |bits, s| bits | codes[4 * s + b] << (2 * s));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_and_a_mask_give_four_neighbours() {
        let codes: Vec<u8> = (0..512).map(|i| (i * 7 % 11 % 3) as u8).collect();
        for row in [0, 5, 8, 15] {
            let mut pair = vec![0; PAIR * 512 / 4];
            pack_row(&codes, row, &mut pair);
            for column in (0..512).step_by(4) {
                let (block, column) = (column / 256, column % 256);
                let (j, t, s) = (column / 64, column % 64 / 16, column % 16 / 4);
                let lane = 4 * (row % 8) + t;
                let start = block * 1024 + row / 8 * 512 + lane * 16 + j * 4;
                let word = u32::from_le_bytes(pair[start..start + 4].try_into().unwrap());
                let four = (word >> (2 * s) & 0x0303_0303).to_le_bytes();
                assert_eq!(four, codes[256 * block + column..][..4], "row {row}, column {column}");
            }
        }
    }
}
