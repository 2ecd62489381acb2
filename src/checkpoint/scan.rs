//! Passes over stored weights that look for what must not be there, at the speed of memory.

use crate::tensor::FloatType;
use crate::ternary::has_invalid_code;

/// Bytes that are looked at between two looks at the result: small enough that a fault is located
/// in the cache, large enough that the inner loop is all there is.
const BLOCK: usize = 16 << 10;

/// The first element that is NaN or infinite, by its exponent bits, which a NaN cannot hide from a
/// compiler that assumes there is none. An incomplete last element is not looked at.
pub(crate) fn first_non_finite(float: FloatType, bytes: &[u8]) -> Option<usize> {
    match float {
        FloatType::Bf16 => first_16(bytes, 0x7f80),
        FloatType::F16 => first_16(bytes, 0x7c00),
        FloatType::F32 => first_32(bytes, 0x7f80_0000),
    }
}

fn first_16(bytes: &[u8], exponent: u16) -> Option<usize> {
    let bad = |b: &[u8; 2]| u16::from_le_bytes(*b) & exponent == exponent;
    first_block(
        bytes.as_chunks::<2>().0,
        BLOCK / 2,
        |block| block.iter().fold(0u16, |any, b| any | u16::from(bad(b))) != 0,
        bad,
    )
}

fn first_32(bytes: &[u8], exponent: u32) -> Option<usize> {
    let bad = |b: &[u8; 4]| u32::from_le_bytes(*b) & exponent == exponent;
    first_block(
        bytes.as_chunks::<4>().0,
        BLOCK / 4,
        |block| block.iter().fold(0u32, |any, b| any | u32::from(bad(b))) != 0,
        bad,
    )
}

/// The first byte of packed codes that holds code 3.
pub(crate) fn first_invalid_code(bytes: &[u8]) -> Option<usize> {
    first_block(
        bytes,
        BLOCK,
        |block| block.iter().fold(0u8, |any, b| any | (b & (b >> 1) & 0x55)) != 0,
        |&byte| has_invalid_code(byte),
    )
}

/// `any` asks a whole block without branches, so that it becomes vector instructions; `bad` then
/// finds the element.
fn first_block<T>(
    elements: &[T],
    block: usize,
    any: impl Fn(&[T]) -> bool,
    bad: impl Fn(&T) -> bool,
) -> Option<usize> {
    let index = elements.chunks(block).position(any)?;
    let start = index * block;
    elements[start..].iter().position(bad).map(|offset| start + offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_found_wherever_they_stand() {
        for (float, size, inf) in [
            (FloatType::Bf16, 2, 0x7f80u32),
            (FloatType::F16, 2, 0xfc00),
            (FloatType::F32, 4, 0xff80_0000),
        ] {
            let largest = inf - 1;
            let count = 2 * BLOCK / size + 5;
            let fill: Vec<u8> =
                (0..count).flat_map(|_| largest.to_le_bytes()[..size].to_vec()).collect();
            assert_eq!(first_non_finite(float, &fill), None, "the largest finite number");
            for at in [0, 1, BLOCK / size - 1, BLOCK / size, count - 1] {
                for bits in [inf, inf + 1] {
                    let mut bytes = fill.clone();
                    bytes[at * size..][..size].copy_from_slice(&bits.to_le_bytes()[..size]);
                    assert_eq!(first_non_finite(float, &bytes), Some(at));
                }
            }
        }
        assert_eq!(first_non_finite(FloatType::F32, &[0xff; 3]), None);
    }

    #[test]
    fn code_three_is_found_wherever_it_stands() {
        // 0b10_01_10_01 has adjacent ones across codes, none within one.
        for at in [0, 7, BLOCK - 1, BLOCK, 2 * BLOCK] {
            for shift in [0, 2, 4, 6] {
                let mut bytes = vec![0b10_01_10_01u8; 2 * BLOCK + 1];
                assert_eq!(first_invalid_code(&bytes), None);
                bytes[at] |= 3 << shift;
                assert_eq!(first_invalid_code(&bytes), Some(at));
            }
        }
    }
}
