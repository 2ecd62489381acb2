//! How the CPU keeps a ternary matrix: sixteen rows side by side.
//!
//! Rows come in **groups** of 16. A group is a run of **lines** of 64 bytes, one for every 16
//! columns; in a line, each of the 16 rows has 4 bytes, and in byte `i` of them the bits `2j` and
//! `2j + 1` hold the code of column `4j + i`:
//!
//! ```text
//!   line g of a group: columns 16g .. 16g + 16 of its rows 0 .. 16
//!
//!   byte    0        1        2        3       4        …      63
//!   row     0        0        0        0       1        …      15
//!   column  0+4j     1+4j     2+4j     3+4j    0+4j     …      3+4j      plane j = bits 2j, 2j+1
//! ```
//!
//! One plane of a line is thus 4 columns of 16 rows in the order in which the dot-product
//! instructions take them: lane `l` multiplies its four bytes with the four activations of those
//! columns, which are the same for every lane, so they are broadcast from memory as one word. Each
//! lane's sum belongs to one row: no sum across lanes at the end of a row, and results leave as
//! vectors. A thread reads one stream of memory from its first line to its last.
//!
//! Columns beyond the width and rows beyond the last are [`ZERO_CODE`]; activations there are zero.

use super::Cpu;
use super::memory::Memory;
use super::pool::Disjoint;
use crate::error::LoadError;
use crate::ternary::{TernaryRows, ZERO_CODE};
use std::cell::RefCell;

/// Rows of a group, and columns of a line.
pub(super) const GROUP: usize = 16;

/// A ternary matrix in an order that the kernels share.
pub struct TernaryMatrix {
    pub(super) features: usize,
    pub(super) width: usize,
    /// Lines of a group.
    pub(super) lines: usize,
    pub(super) codes: Memory<[u8; 64]>,
    /// The scale of each row; 0 for the rows that fill the last group.
    pub(super) scales: Memory<f32>,
}

/// Writes the codes of one row (a multiple of 16 of them) into its group.
fn pack_row(codes: &[u8], row: usize, group: &mut [[u8; 64]]) {
    for (line, sixteen) in group.iter_mut().zip(codes.as_chunks::<GROUP>().0) {
        // Column 4j + i is byte i of word j of the sixteen.
        let word = |j: usize| {
            u32::from_le_bytes([
                sixteen[4 * j],
                sixteen[4 * j + 1],
                sixteen[4 * j + 2],
                sixteen[4 * j + 3],
            ])
        };
        let packed = word(0) | word(1) << 2 | word(2) << 4 | word(3) << 6;
        line[4 * row..][..4].copy_from_slice(&packed.to_le_bytes());
    }
}

impl Cpu {
    pub(super) fn pack(&self, parts: &[&dyn TernaryRows]) -> Result<TernaryMatrix, LoadError> {
        thread_local! {
            static ROW: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let refuse = |expected: String, found: String| LoadError::Option {
            option: "parts of a packed matrix".to_owned(),
            expected,
            found,
        };
        let width = parts
            .first()
            .ok_or_else(|| refuse("at least one".to_owned(), "none".to_owned()))?
            .cols();
        if let Some(part) = parts.iter().find(|part| part.cols() != width) {
            return Err(refuse(format!("{width} columns in each"), part.cols().to_string()));
        }
        let total = parts.iter().try_fold(0usize, |sum, part| sum.checked_add(part.rows()));
        let lines = width.div_ceil(GROUP);
        let (features, count) = total
            .and_then(|rows| Some((rows, rows.div_ceil(GROUP).checked_mul(lines)?)))
            .ok_or_else(|| {
                refuse("fewer rows".to_owned(), "more than can be counted".to_owned())
            })?;
        let groups = features.div_ceil(GROUP);
        let mut codes = Memory::<[u8; 64]>::new("a ternary matrix", count)?;
        let mut scales = Memory::<f32>::new("the scales of a matrix", groups * GROUP)?;
        let mut start = 0;
        for part in parts {
            scales[start..start + part.rows()].fill(part.scale());
            start += part.rows();
        }

        let shared = Disjoint::new(&mut codes);
        let work = (features.saturating_mul(width), 1 << 16);
        self.pool.split(groups, 1, work, |range| {
            ROW.with_borrow_mut(|row_codes| {
                row_codes.clear();
                row_codes.resize(lines * GROUP, ZERO_CODE);
                // The part that the next row comes from, and that row's number in it.
                let (mut part, mut row) = (0, range.start * GROUP);
                for group in range {
                    // SAFETY: the parts of a job have groups of their own.
                    let out = unsafe { shared.range(group * lines..(group + 1) * lines) };
                    for lane in 0..GROUP {
                        while part < parts.len() && row >= parts[part].rows() {
                            row -= parts[part].rows();
                            part += 1;
                        }
                        match parts.get(part) {
                            Some(rows) => rows.read_codes(row, &mut row_codes[..width]),
                            None => row_codes.fill(ZERO_CODE),
                        }
                        pack_row(row_codes, lane, out);
                        row += 1;
                    }
                }
            });
        });
        Ok(TernaryMatrix { features, width, lines, codes, scales })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuOptions;
    use crate::ternary::TernaryTensor;

    #[test]
    fn packing_is_as_drawn() {
        let (rows, cols) = (19, 37);
        let weights: Vec<i8> = (0..rows * cols).map(|i| (i * 7 / 3 % 3) as i8 - 1).collect();
        let at = |row: usize, col: usize| {
            if row < rows && col < cols { weights[row * cols + col] } else { 0 }
        };
        let (top, bottom) = weights.split_at(5 * cols);
        let top = TernaryTensor::from_weights(5, cols, 0.5, top).unwrap();
        let bottom = TernaryTensor::from_weights(rows - 5, cols, 2.0, bottom).unwrap();
        let cpu = Cpu::new(CpuOptions { threads: Some(3), ..CpuOptions::default() }).unwrap();
        let matrix = cpu.pack(&[&top, &bottom]).unwrap();
        assert_eq!((matrix.features, matrix.width, matrix.lines), (19, 37, 3));
        for (number, line) in matrix.codes.iter().enumerate() {
            let (group, line_in_group) = (number / 3, number % 3);
            for (byte, &packed) in line.iter().enumerate() {
                for plane in 0..4 {
                    let row = group * 16 + byte / 4;
                    let col = line_in_group * 16 + 4 * plane + byte % 4;
                    let code = (packed >> (2 * plane) & 3) as i8;
                    assert_eq!(code - 1, at(row, col), "row {row}, column {col}");
                }
            }
        }
        assert_eq!(matrix.scales[4..6], [0.5, 2.0]);
        assert_eq!(matrix.scales[18..20], [2.0, 0.0]);
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let cpu = Cpu::new(CpuOptions::default()).unwrap();
        let a = TernaryTensor::from_weights(1, 2, 1.0, &[0, 1]).unwrap();
        let b = TernaryTensor::from_weights(1, 1, 1.0, &[0]).unwrap();
        assert!(cpu.pack(&[&a, &b]).is_err());
        assert!(cpu.pack(&[]).is_err());
    }
}
