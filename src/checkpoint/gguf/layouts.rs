//! How GGUF files store ternary matrices.
//!
//! Sources: `ggml-bitnet-mad.cpp` of microsoft/BitNet for I2_S; `ggml-quants.c` of ggml for TQ1_0
//! and TQ2_0. All have codes 0, 1 and 2 for −1, 0 and +1.

use super::dequantize::{dequantize, row_bytes};
use super::types::TensorType;
use crate::ternary::{TernaryRows, ZERO_CODE, code_of_float, has_invalid_code};

/// Weights to a block of TQ1_0 and TQ2_0, a part of one row.
pub(crate) const TQ_BLOCK: usize = 256;
/// Weights to a block of I2_S, which may go on in the next row.
pub(crate) const I2S_BLOCK: usize = 128;

/// A ternary matrix as it lies in a file; [`check`](Self::check) has passed.
pub(crate) struct StoredRows<'a> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) scale: f32,
    pub(crate) layout: Layout,
    pub(crate) bytes: &'a [u8],
}

/// What the bytes of a ternary matrix are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Layout {
    /// Blocks of 128 weights in 32 bytes, rows one after the other: byte `p` holds the codes of
    /// weights `p`, `32 + p`, `64 + p` and `96 + p`, the first in the highest bits.
    I2S,
    /// Blocks of 256 weights in 54 bytes: base 3, five weights to a byte, and an f16 scale.
    Tq1_0,
    /// Blocks of 256 weights in 66 bytes: four weights to a byte, and an f16 scale. Byte `p` of a
    /// half of 32 bytes holds the weights `p`, `32 + p`, `64 + p` and `96 + p` of 128, the first in
    /// the lowest bits.
    Tq2_0,
    /// Floats, or blocks of them, all of which are −a, 0 or a.
    Values { kind: TensorType, magnitude: f32 },
    /// Floats, or blocks of them, that absmean makes ternary: its scale.
    Master { kind: TensorType, mean: f32 },
}

/// What a pass over a matrix found that must not be there.
pub(crate) enum Fault {
    /// Code 3.
    Code { row: usize, col: usize },
    /// A block with another scale than those before it.
    Scale { row: usize, block: usize, found: f32 },
    /// A float that has no place in the layout.
    Value { row: usize, col: usize, found: f32 },
}

impl TernaryRows for StoredRows<'_> {
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
        match self.layout {
            Layout::I2S => i2s_codes(self.bytes, row * self.cols, codes),
            Layout::Tq1_0 => tq_row::<54>(self.bytes, row, codes, tq1_0_codes),
            Layout::Tq2_0 => tq_row::<66>(self.bytes, row, codes, tq2_0_codes),
            Layout::Values { kind, .. } => self.float_row(kind, row, |values| {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = ZERO_CODE + u8::from(*value > 0.0) - u8::from(*value < 0.0);
                }
            }),
            Layout::Master { kind, mean } => self.float_row(kind, row, |values| {
                for (code, value) in codes.iter_mut().zip(values) {
                    *code = code_of_float(*value, mean);
                }
            }),
        }
    }
}

impl StoredRows<'_> {
    /// The floats of a row.
    fn float_row(&self, kind: TensorType, row: usize, then: impl FnOnce(&[f32])) {
        let mut values = vec![0.0; self.cols];
        let size = row_bytes(kind, self.cols).unwrap_or(0);
        dequantize(kind, &self.bytes[row * size..][..size], &mut values);
        then(&values);
    }

    /// The absmean scale of master weights. Summed in f64, so that the order of the sum does not
    /// show in f32.
    pub(crate) fn mean(&self) -> f32 {
        let Layout::Master { kind, .. } = self.layout else { return self.scale };
        let mut sum = 0f64;
        for row in 0..self.rows {
            self.float_row(kind, row, |values| {
                sum += values.iter().map(|value| f64::from(value.abs())).sum::<f64>();
            });
        }
        ((sum / (self.rows * self.cols) as f64) as f32).max(1e-5)
    }

    /// Reads all weights and returns the first fault.
    pub(crate) fn check(&self) -> Option<Fault> {
        match self.layout {
            Layout::I2S => {
                let packed = &self.bytes[..self.rows * self.cols / 4];
                let at = packed.iter().position(|byte| has_invalid_code(*byte))?;
                let group = (0..4).find(|g| packed[at] >> (6 - 2 * g) & 3 == 3).unwrap_or(0);
                let element = at / 32 * I2S_BLOCK + group * 32 + at % 32;
                Some(Fault::Code { row: element / self.cols, col: element % self.cols })
            }
            Layout::Tq1_0 => self.block_scales::<54>(),
            Layout::Tq2_0 => self.block_scales::<66>().or_else(|| {
                let (blocks, _) = self.bytes.as_chunks::<66>();
                let bad = |block: &[u8; 66]| block[..64].iter().any(|b| has_invalid_code(*b));
                let at = blocks.iter().position(bad)?;
                let mut codes = [0; TQ_BLOCK];
                tq2_0_codes(&blocks[at][..64], &mut codes);
                let element = at * TQ_BLOCK + codes.iter().position(|code| *code == 3)?;
                Some(Fault::Code { row: element / self.cols, col: element % self.cols })
            }),
            Layout::Values { kind, magnitude } => {
                self.first_value(kind, |v| ![-magnitude, 0.0, magnitude].contains(&v))
            }
            Layout::Master { kind, .. } => self.first_value(kind, |v| !v.is_finite()),
        }
    }

    /// The first float that is wrong.
    fn first_value(&self, kind: TensorType, wrong: impl Fn(f32) -> bool) -> Option<Fault> {
        (0..self.rows).find_map(|row| {
            let mut fault = None;
            self.float_row(kind, row, |values| {
                if let Some(col) = values.iter().position(|value| wrong(*value)) {
                    fault = Some(Fault::Value { row, col, found: values[col] });
                }
            });
            fault
        })
    }

    /// The first block whose scale is neither that of the matrix nor 0, which blocks of zeros have.
    fn block_scales<const BYTES: usize>(&self) -> Option<Fault> {
        let first = first_block_scale(self.bytes, BYTES)?;
        let blocks = self.cols / TQ_BLOCK;
        let (all, _) = self.bytes.as_chunks::<BYTES>();
        all.iter().enumerate().find_map(|(at, block)| {
            let found = block_scale(block);
            (found != 0.0 && found != first).then(|| Fault::Scale {
                row: at / blocks,
                block: at % blocks,
                found,
            })
        })
    }
}

/// The scale of a block of TQ1_0 or TQ2_0, its last two bytes.
fn block_scale(block: &[u8]) -> f32 {
    let last = [block[block.len() - 2], block[block.len() - 1]];
    half::f16::from_le_bytes(last).to_f32()
}

/// The scale of the first block that is not 0.
pub(crate) fn first_block_scale(bytes: &[u8], block: usize) -> Option<f32> {
    bytes.chunks_exact(block).map(block_scale).find(|scale| *scale != 0.0)
}

/// Weights of I2_S from `start` on.
fn i2s_codes(bytes: &[u8], start: usize, codes: &mut [u8]) {
    let mut at = start;
    let mut codes = codes;
    while !codes.is_empty() {
        let (block, group, place) = (at / I2S_BLOCK, at % I2S_BLOCK / 32, at % 32);
        let run = (32 - place).min(codes.len());
        let bytes = &bytes[32 * block + place..][..run];
        let (now, rest) = codes.split_at_mut(run);
        match group {
            0 => shift_mask::<6>(bytes, now),
            1 => shift_mask::<4>(bytes, now),
            2 => shift_mask::<2>(bytes, now),
            _ => shift_mask::<0>(bytes, now),
        }
        codes = rest;
        at += run;
    }
}

/// Whether a matrix of I2_S seems to have blocks of 64 weights in 16 bytes, which bitnet.cpp writes on
/// ARM since commit 112f853 (November 2025) under the same type id, and cannot be read as I2_S.
///
/// Nothing in a file tells the two apart: one is a permutation of the other. But `dead` columns,
/// whose inputs a trained model has turned off, hold zeros alone; where they do in blocks of 64 and
/// do not in blocks of 128, the blocks are of 64. Without dead columns there is no telling.
pub(crate) fn has_blocks_of_64(bytes: &[u8], rows: usize, cols: usize, dead: &[usize]) -> bool {
    /// Columns and rows that are looked at; the more, the less chance has a part.
    const COLUMNS: usize = 64;
    const ROWS: usize = 64;
    if dead.len() < 4 || dead.len() * 2 > cols {
        return false;
    }
    let in_64 = |element: usize| {
        bytes[element / 64 * 16 + element % 16] >> (6 - 2 * (element % 64 / 16)) & 3
    };
    let in_128 = |element: usize| {
        bytes[element / 128 * 32 + element % 32] >> (6 - 2 * (element % 128 / 32)) & 3
    };
    let zeros = |code: &dyn Fn(usize) -> u8| {
        (0..rows.min(ROWS))
            .all(|row| dead.iter().take(COLUMNS).all(|col| code(row * cols + col) == ZERO_CODE))
    };
    zeros(&in_64) && !zeros(&in_128)
}

fn shift_mask<const SHIFT: u8>(bytes: &[u8], codes: &mut [u8]) {
    for (code, byte) in codes.iter_mut().zip(bytes) {
        *code = byte >> SHIFT & 3;
    }
}

/// A row of blocks of `BYTES`, the last two of which are the scale. A block whose scale is 0 holds
/// zeros, whatever its codes.
fn tq_row<const BYTES: usize>(
    bytes: &[u8],
    row: usize,
    codes: &mut [u8],
    block_codes: impl Fn(&[u8], &mut [u8]),
) {
    let blocks = codes.len() / TQ_BLOCK;
    let (all, _) = bytes.as_chunks::<BYTES>();
    let row = &all[row * blocks..][..blocks];
    for (block, codes) in row.iter().zip(codes.chunks_exact_mut(TQ_BLOCK)) {
        if block_scale(block) == 0.0 {
            codes.fill(ZERO_CODE);
        } else {
            block_codes(&block[..BYTES - 2], codes);
        }
    }
}

fn tq2_0_codes(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes.chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        shift_mask::<0>(bytes, &mut codes[..32]);
        shift_mask::<2>(bytes, &mut codes[32..64]);
        shift_mask::<4>(bytes, &mut codes[64..96]);
        shift_mask::<6>(bytes, &mut codes[96..]);
    }
}

/// 32 bytes of five weights 32 apart, 16 bytes of five weights 16 apart, 4 bytes of four weights 4
/// apart. A byte is ⌈256 · n / 243⌉ for a number n of five digits of base 3, the first weight the
/// highest: multiplied by 3, a digit leaves at the top.
fn tq1_0_codes(bytes: &[u8], codes: &mut [u8]) {
    let digits = |bytes: &[u8], codes: &mut [u8]| {
        let powers = [1u8, 3, 9, 27, 81];
        for (power, codes) in powers.into_iter().zip(codes.chunks_exact_mut(bytes.len())) {
            for (code, byte) in codes.iter_mut().zip(bytes) {
                *code = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
            }
        }
    };
    digits(&bytes[..32], &mut codes[..160]);
    digits(&bytes[32..48], &mut codes[160..240]);
    digits(&bytes[48..52], &mut codes[240..]);
}
