//! Rows of weights to the bytes of file formats.
//!
//! Ternary codes are exact in every layout here. Floats are rounded as ggml rounds them
//! (`ggml-quants.c` of llama.cpp, `quants.py` of its gguf package), so that a file is what other
//! converters would have written.

use half::{bf16, f16};

/// Values in a block of I2_S. Blocks do not know of rows; those of a row of a multiple of 128
/// columns lie within it.
pub(super) const I2_S_BLOCK: usize = 128;
/// Bytes that follow the codes of an I2_S tensor: the scale as f32, and zeros.
pub(super) const I2_S_TAIL: usize = 32;
/// Values in a block of TQ1_0, TQ2_0 and Q6_K.
pub(super) const SUPER_BLOCK: usize = 256;
const TQ2_0_BYTES: usize = 66;
const TQ1_0_BYTES: usize = 54;
const Q6_K_BYTES: usize = 210;
const Q8_0_BLOCK: usize = 32;
const Q8_0_BYTES: usize = 34;

/// How a ternary matrix is written in GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TernaryLayout {
    I2S,
    Tq2,
    Tq1,
}

impl TernaryLayout {
    /// The name that ggml has for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::I2S => "I2_S",
            Self::Tq2 => "TQ2_0",
            Self::Tq1 => "TQ1_0",
        }
    }

    /// Columns must be a multiple of this.
    pub(super) fn block(self) -> usize {
        match self {
            Self::I2S => I2_S_BLOCK,
            Self::Tq2 | Self::Tq1 => SUPER_BLOCK,
        }
    }

    /// Bytes of a row of so many columns, a multiple of [`block`](Self::block).
    pub(super) fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::I2S => cols / 4,
            Self::Tq2 => cols / SUPER_BLOCK * TQ2_0_BYTES,
            Self::Tq1 => cols / SUPER_BLOCK * TQ1_0_BYTES,
        }
    }

    /// What follows the last row.
    pub(super) fn tail(self, scale: f32) -> Vec<u8> {
        match self {
            Self::I2S => {
                let mut tail = vec![0; I2_S_TAIL];
                tail[..4].copy_from_slice(&scale.to_le_bytes());
                tail
            }
            Self::Tq2 | Self::Tq1 => Vec::new(),
        }
    }

    /// Encodes the codes of a row. `scale` stands in each block of TQ2_0 and TQ1_0.
    pub(super) fn encode(self, codes: &[u8], scale: f16, out: &mut [u8]) {
        match self {
            Self::I2S => {
                for (block, out) in codes.as_chunks::<I2_S_BLOCK>().0.iter().zip(blocks::<32>(out))
                {
                    *out = i2_s(block);
                }
            }
            Self::Tq2 => {
                for (block, out) in
                    codes.as_chunks::<SUPER_BLOCK>().0.iter().zip(blocks::<TQ2_0_BYTES>(out))
                {
                    out[..64].copy_from_slice(&tq2_0(block));
                    out[64..].copy_from_slice(&block_scale(block, scale).to_le_bytes());
                }
            }
            Self::Tq1 => {
                for (block, out) in
                    codes.as_chunks::<SUPER_BLOCK>().0.iter().zip(blocks::<TQ1_0_BYTES>(out))
                {
                    out[..52].copy_from_slice(&tq1_0(block));
                    out[52..].copy_from_slice(&block_scale(block, scale).to_le_bytes());
                }
            }
        }
    }
}

fn blocks<const N: usize>(out: &mut [u8]) -> impl Iterator<Item = &mut [u8; N]> {
    out.as_chunks_mut::<N>().0.iter_mut()
}

/// ggml takes the largest value of a block for its scale, which of a block of zeros is 0.
fn block_scale(codes: &[u8], scale: f16) -> f16 {
    if codes.iter().all(|&code| code == crate::ternary::ZERO_CODE) { f16::ZERO } else { scale }
}

/// Byte p holds values p, p + 32, p + 64 and p + 96, the first in the highest bits.
/// Source: `quantize_i2_s` in `src/ggml-bitnet-mad.cpp` of microsoft/BitNet.
fn i2_s(codes: &[u8; I2_S_BLOCK]) -> [u8; 32] {
    std::array::from_fn(|p| codes[p] << 6 | codes[p + 32] << 4 | codes[p + 64] << 2 | codes[p + 96])
}

/// In each half of 128 values, byte p holds values p, p + 32, p + 64 and p + 96, the first in the
/// lowest bits.
fn tq2_0(codes: &[u8; SUPER_BLOCK]) -> [u8; 64] {
    std::array::from_fn(|byte| {
        let at = byte / 32 * 128 + byte % 32;
        codes[at] | codes[at + 32] << 2 | codes[at + 64] << 4 | codes[at + 96] << 6
    })
}

/// A byte holds five values as the digits of a number to base 3, the first the most significant,
/// scaled from 0..243 to 0..256 and rounded up, so that multiplying by 3 brings out a digit as the
/// carry. The last four bytes hold four values each.
fn tq1_0(codes: &[u8; SUPER_BLOCK]) -> [u8; 52] {
    let digits = |first: usize, step: usize, count: usize| {
        let number = (0..5).fold(0u32, |number, k| {
            number * 3 + if k < count { u32::from(codes[first + k * step]) } else { 0 }
        });
        (number * 256).div_ceil(243) as u8
    };
    std::array::from_fn(|byte| match byte {
        0..32 => digits(byte, 32, 5),
        32..48 => digits(160 + byte - 32, 16, 5),
        _ => digits(240 + byte - 48, 4, 4),
    })
}

/// Four rows to a byte, row r of `rows / 4 · k + r` for k from 0 in the lowest bits: transformers'
/// `pack_weights` (`integrations/bitnet.py`).
pub(super) fn pack_rows(rows: [&[u8]; 4], out: &mut [u8]) {
    let [a, b, c, d] = rows;
    for (index, byte) in out.iter_mut().enumerate() {
        *byte = a[index] | b[index] << 2 | c[index] << 4 | d[index] << 6;
    }
}

/// The element type of an embedding table or output head in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TableType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
    /// ggml's Q8_0: 32 values to an f16 scale and a byte each; 8.5 bits a value.
    Q8_0,
    /// ggml's Q6_K: 256 values to an f16 scale, 16 byte scales and 6 bits each; 6.56 bits a value.
    Q6K,
}

impl TableType {
    /// The name that ggml has for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F32 => "F32",
            Self::Q8_0 => "Q8_0",
            Self::Q6K => "Q6_K",
        }
    }

    /// Columns must be a multiple of this.
    pub(super) fn block(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 | Self::F32 => 1,
            Self::Q8_0 => Q8_0_BLOCK,
            Self::Q6K => SUPER_BLOCK,
        }
    }

    /// Bytes of a row of so many columns, a multiple of [`block`](Self::block).
    pub(super) fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::F16 | Self::Bf16 => cols * 2,
            Self::F32 => cols * 4,
            Self::Q8_0 => cols / Q8_0_BLOCK * Q8_0_BYTES,
            Self::Q6K => cols / SUPER_BLOCK * Q6_K_BYTES,
        }
    }

    /// Encodes finite values. An `Err` is the column of one that the type cannot hold.
    pub(super) fn encode(self, values: &[f32], out: &mut [u8]) -> Result<(), usize> {
        match self {
            Self::F32 => {
                for (value, out) in values.iter().zip(blocks::<4>(out)) {
                    *out = value.to_le_bytes();
                }
            }
            Self::F16 => {
                for (column, (value, out)) in values.iter().zip(blocks::<2>(out)).enumerate() {
                    *out = finite(f16::from_f32(*value)).ok_or(column)?.to_le_bytes();
                }
            }
            Self::Bf16 => {
                for (column, (value, out)) in values.iter().zip(blocks::<2>(out)).enumerate() {
                    let rounded = bf16::from_f32(*value);
                    if !rounded.is_finite() {
                        return Err(column);
                    }
                    *out = rounded.to_le_bytes();
                }
            }
            Self::Q8_0 => {
                let rows = values.as_chunks::<Q8_0_BLOCK>().0.iter();
                for (index, (block, out)) in rows.zip(blocks::<Q8_0_BYTES>(out)).enumerate() {
                    q8_0(block, out).ok_or_else(|| index * Q8_0_BLOCK + largest(block))?;
                }
            }
            Self::Q6K => {
                let rows = values.as_chunks::<SUPER_BLOCK>().0.iter();
                for (index, (block, out)) in rows.zip(blocks::<Q6_K_BYTES>(out)).enumerate() {
                    q6_k(block, out).ok_or_else(|| index * SUPER_BLOCK + largest(block))?;
                }
            }
        }
        Ok(())
    }
}

/// Where the value of largest magnitude is.
fn largest(values: &[f32]) -> usize {
    let places = 0..values.len();
    places.max_by(|a, b| values[*a].abs().total_cmp(&values[*b].abs())).unwrap_or(0)
}

fn finite(value: f16) -> Option<f16> {
    value.is_finite().then_some(value)
}

/// The scale, then the values. `None` if f16 does not hold the scale.
fn q8_0(values: &[f32; Q8_0_BLOCK], out: &mut [u8; Q8_0_BYTES]) -> Option<()> {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out[..2].copy_from_slice(&finite(f16::from_f32(scale))?.to_le_bytes());
    for (value, out) in values.iter().zip(&mut out[2..]) {
        // Half away from zero, as C's roundf.
        *out = (value * inverse).round() as i8 as u8;
    }
    Some(())
}

/// Below this ggml takes a group of values for zeros.
const Q6_K_EPS: f32 = 1e-15;

/// 128 bytes of low halves, 64 of high quarters, 16 scales of 16 values each, the scale of those.
/// `None` if f16 does not hold the latter.
fn q6_k(values: &[f32; SUPER_BLOCK], out: &mut [u8; Q6_K_BYTES]) -> Option<()> {
    *out = [0; Q6_K_BYTES];
    let groups = values.as_chunks::<16>().0;
    let wanted: [f32; 16] = std::array::from_fn(|group| q6_k_scale(&groups[group]));
    // The square of a value beyond 1e19 is infinite.
    if !wanted.iter().all(|scale| scale.is_finite()) {
        return None;
    }
    let largest = wanted
        .iter()
        .fold(0f32, |largest, scale| if scale.abs() > largest.abs() { *scale } else { largest });
    if largest.abs() < Q6_K_EPS {
        return Some(());
    }
    let inverse = -128.0 / largest;
    let scale = finite(f16::from_f32(1.0 / inverse))?;
    out[208..].copy_from_slice(&scale.to_le_bytes());
    let mut codes = [0u8; SUPER_BLOCK];
    for (group, values) in groups.iter().enumerate() {
        let factor = (inverse * wanted[group]).round_ties_even().clamp(-128.0, 127.0) as i8;
        out[192 + group] = factor as u8;
        let step = scale.to_f32() * f32::from(factor);
        for (code, value) in codes[group * 16..].iter_mut().zip(values) {
            // With a step of 0 any code means 0.
            *code = if step == 0.0 { 32 } else { q6_k_code(value / step) };
        }
    }
    for half in 0..2 {
        for at in 0..32 {
            let four: [u8; 4] =
                std::array::from_fn(|quarter| codes[half * 128 + quarter * 32 + at]);
            out[half * 64 + at] = four[0] & 15 | four[2] << 4;
            out[half * 64 + 32 + at] = four[1] & 15 | four[3] << 4;
            out[128 + half * 32 + at] =
                four[0] >> 4 | four[1] >> 4 << 2 | four[2] >> 4 << 4 | four[3] >> 4 << 6;
        }
    }
    Some(())
}

fn q6_k_code(steps: f32) -> u8 {
    (steps.round_ties_even().clamp(-32.0, 31.0) + 32.0) as u8
}

/// The scale of 16 values that makes `Σ x²·(x − scale·code)²` small: of 19 candidates around the
/// one that brings the value of largest magnitude to −32, the best after a least-squares fit.
/// It may be negative. (`make_qx_quants` in `ggml-quants.c`, with weights x².)
fn q6_k_scale(values: &[f32; 16]) -> f32 {
    let largest = values
        .iter()
        .fold(0f32, |largest, value| if value.abs() > largest.abs() { *value } else { largest });
    if largest.abs() < Q6_K_EPS {
        return 0.0;
    }
    let fit = |inverse: f32| {
        values.iter().fold((0f32, 0f32), |(product, square), value| {
            let code = (inverse * value).round_ties_even().clamp(-32.0, 31.0);
            let weight = value * value;
            (product + weight * value * code, square + weight * code * code)
        })
    };
    let ratio = |(product, square): (f32, f32)| if square > 0.0 { product / square } else { 0.0 };
    let first = fit(-32.0 / largest);
    let mut scale = ratio(first);
    let mut best = scale * first.0;
    for step in (-9..=9).filter(|step| *step != 0) {
        let (product, square) = fit(-(32.0 + 0.1 * step as f32) / largest);
        if square > 0.0 && product * product > best * square {
            scale = product / square;
            best = scale * product;
        }
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(count: usize) -> Vec<u8> {
        (0..count).map(|i| ((i * i + i / 7) % 3) as u8).collect()
    }

    /// The digits of a TQ1_0 byte come out by multiplying, as decoders do it.
    #[test]
    fn base_three_digits_decode() {
        let codes: [u8; 256] = codes(256).try_into().expect("256");
        let bytes = tq1_0(&codes);
        let digit =
            |byte: u8, k: u32| ((u32::from(byte.wrapping_mul(3u8.wrapping_pow(k))) * 3) >> 8) as u8;
        for p in 0..32 {
            for k in 0..5 {
                assert_eq!(digit(bytes[p], k as u32), codes[p + 32 * k]);
            }
        }
        for p in 0..16 {
            for k in 0..5 {
                assert_eq!(digit(bytes[32 + p], k as u32), codes[160 + p + 16 * k]);
            }
        }
        for p in 0..4 {
            for k in 0..4 {
                assert_eq!(digit(bytes[48 + p], k as u32), codes[240 + p + 4 * k]);
            }
        }
    }

    #[test]
    fn what_a_type_cannot_hold_is_found() {
        let mut out = [0; 34 * 8];
        let mut values = [1.0f32; 256];
        for table in [TableType::F16, TableType::Bf16] {
            let mut out = [0; 512];
            values[5] = f32::MAX;
            assert_eq!(table.encode(&values, &mut out), Err(5));
        }
        values[5] = 65_520.0;
        assert_eq!(TableType::F16.encode(&values, &mut [0; 512]), Err(5));
        assert_eq!(TableType::Q8_0.encode(&values, &mut out), Ok(()));
        values[40] = 127.0 * 65_520.0;
        assert_eq!(TableType::Q8_0.encode(&values, &mut out), Err(40));
        values[40] = 1e30;
        assert_eq!(TableType::Q6K.encode(&values, &mut out[..210]), Err(40));
    }
}
