//! The rows of GGUF tensors as floats.
//!
//! Formulas: `dequantize_row_*` of ggml's `ggml-quants.c`, products and sums in its order, so that
//! each value is the one that ggml computes, bit for bit. In the comments, `d` and `m` are f16 and
//! the parts of a block come in the order in which they are stored.

use half::f16;

use super::types::TensorType;
use crate::tensor::FloatType;

/// The float type, of tensors that are not quantised.
pub(crate) fn float(kind: TensorType) -> Option<FloatType> {
    match kind {
        TensorType::F32 => Some(FloatType::F32),
        TensorType::F16 => Some(FloatType::F16),
        TensorType::Bf16 => Some(FloatType::Bf16),
        _ => None,
    }
}

/// Values to a block and bytes of it, of the types that [`dequantize`] reads.
pub(crate) fn block(kind: TensorType) -> Option<(usize, usize)> {
    match kind {
        TensorType::F32 => Some((1, 4)),
        TensorType::F16 | TensorType::Bf16 => Some((1, 2)),
        TensorType::Q4_0 => Some((32, 18)),
        TensorType::Q5_0 => Some((32, 22)),
        TensorType::Q5_1 => Some((32, 24)),
        TensorType::Q8_0 => Some((32, 34)),
        TensorType::Q4K => Some((256, 144)),
        TensorType::Q6K => Some((256, 210)),
        TensorType::Tq1_0 | TensorType::Tq2_0 | TensorType::I2S => None,
    }
}

/// The bytes of some rows of `cols` values; `None` of types that [`dequantize`] does not read.
pub(crate) fn row_bytes(kind: TensorType, cols: usize) -> Option<usize> {
    let (values, bytes) = block(kind)?;
    Some(cols / values * bytes)
}

/// Reads whole blocks of a type that [`block`] knows.
pub(crate) fn dequantize(kind: TensorType, bytes: &[u8], out: &mut [f32]) {
    if let Some(float) = float(kind) {
        return float.decode(bytes, out);
    }
    let Some((values, size)) = block(kind) else { return };
    debug_assert_eq!(bytes.len() / size * values, out.len());
    let one = match kind {
        TensorType::Q4_0 => q4_0,
        TensorType::Q5_0 => q5_0,
        TensorType::Q5_1 => q5_1,
        TensorType::Q8_0 => q8_0,
        TensorType::Q4K => q4_k,
        _ => q6_k,
    };
    for (bytes, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(values)) {
        one(bytes, out);
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// `d`, 16 bytes of two 4-bit codes: `d · (code − 8)`. The low codes come first.
fn q4_0(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (j, byte) in bytes[2..18].iter().enumerate() {
        out[j] = d * (f32::from(byte & 15) - 8.0);
        out[j + 16] = d * (f32::from(byte >> 4) - 8.0);
    }
}

/// The 5-bit codes of a block: 4 bytes of fifth bits, 16 bytes of two times four.
fn five_bits(bytes: &[u8], out: &mut [f32], value: impl Fn(f32) -> f32) {
    let fifth = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (j, byte) in bytes[4..20].iter().enumerate() {
        let bit = |at: usize| (fifth >> at & 1) as u8 * 16;
        out[j] = value(f32::from(byte & 15 | bit(j)));
        out[j + 16] = value(f32::from(byte >> 4 | bit(j + 16)));
    }
}

/// `d`, 5-bit codes: `d · (code − 16)`.
fn q5_0(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    five_bits(&bytes[2..], out, |code| d * (code - 16.0));
}

/// `d`, `m`, 5-bit codes: `d · code + m`.
fn q5_1(bytes: &[u8], out: &mut [f32]) {
    let (d, m) = (half(bytes, 0), half(bytes, 2));
    five_bits(&bytes[4..], out, |code| d * code + m);
}

/// `d`, 32 signed bytes: `d · byte`.
fn q8_0(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (out, byte) in out.iter_mut().zip(&bytes[2..]) {
        *out = d * f32::from(*byte as i8);
    }
}

/// `d`, `m`, 12 bytes of eight 6-bit scales and eight 6-bit minima, 128 bytes of two 4-bit codes:
/// `(d · scale) · code − (m · minimum)`, one scale and minimum for 32 values.
fn q4_k(bytes: &[u8], out: &mut [f32]) {
    let (d, m) = (half(bytes, 0), half(bytes, 2));
    let packed = &bytes[4..16];
    let scale_and_minimum = |j: usize| {
        if j < 4 {
            (packed[j] & 63, packed[j + 4] & 63)
        } else {
            (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
        }
    };
    for (pair, codes) in bytes[16..].chunks_exact(32).enumerate() {
        for high in 0..2 {
            let (scale, minimum) = scale_and_minimum(2 * pair + high);
            let (scale, minimum) = (d * f32::from(scale), m * f32::from(minimum));
            let out = &mut out[64 * pair + 32 * high..][..32];
            for (out, codes) in out.iter_mut().zip(codes) {
                *out = scale * f32::from(codes >> (4 * high) & 15) - minimum;
            }
        }
    }
}

/// 128 bytes of low halves, 64 bytes of high bits, 16 signed scales, `d`:
/// `(d · scale) · (code − 32)` with 6-bit codes, one scale for 16 values.
fn q6_k(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 208);
    for side in 0..2 {
        let low = &bytes[64 * side..][..64];
        let high = &bytes[128 + 32 * side..][..32];
        let scales = &bytes[192 + 8 * side..][..8];
        for quarter in 0..4 {
            let out = &mut out[128 * side + 32 * quarter..][..32];
            for (l, out) in out.iter_mut().enumerate() {
                let low = low[l + 32 * (quarter % 2)] >> (4 * (quarter / 2)) & 15;
                let code = low | (high[l] >> (2 * quarter) & 3) << 4;
                let scale = f32::from(scales[2 * quarter + l / 16] as i8);
                *out = d * scale * (f32::from(code) - 32.0);
            }
        }
    }
}
