//! The meaning of each function of the vocabulary, one lane at a time.

use super::{LANES, Registers, Simd};
use std::array::from_fn;

/// No instructions beyond the architecture's own.
#[derive(Clone, Copy)]
pub(in super::super) struct Scalar;

impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type Codes = [u8; 64];
    type Partial = [i32; LANES];
    const REGISTERS: Registers = Registers::One;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        *out = v;
    }
    #[inline(always)]
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F {
        from_fn(|l| half::f16::from_le_bytes([x[2 * l], x[2 * l + 1]]).to_f32_const())
    }
    #[inline(always)]
    fn store_f16(self, v: Self::F, out: &mut [u8; 2 * LANES]) {
        for (out, x) in out.as_chunks_mut::<2>().0.iter_mut().zip(v) {
            *out = half::f16::from_f32_const(x).to_le_bytes();
        }
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::F {
        x.map(f32::from)
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u8; 2 * LANES]) -> Self::F {
        from_fn(|l| f32::from_le_bytes([0, 0, x[2 * l], x[2 * l + 1]]))
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|l| a[l] + b[l])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|l| a[l] - b[l])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|l| a[l] * b[l])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|l| a[l] / b[l])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        from_fn(|l| a[l].mul_add(b[l], c[l]))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|l| if a[l] > b[l] { a[l] } else { b[l] })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|l| if a[l] < b[l] { a[l] } else { b[l] })
    }
    #[inline(always)]
    fn max_abs(self, a: Self::F, x: Self::F) -> Self::F {
        // Floats that are not negative are ordered like their bits, NaN above infinity.
        from_fn(|l| f32::from_bits(a[l].to_bits().max(x[l].abs().to_bits())))
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        x.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) << 23) as u32))
    }
    #[inline(always)]
    fn sum(self, v: Self::F) -> f32 {
        let v: [f32; 8] = from_fn(|l| v[l] + v[l + 8]);
        let v: [f32; 4] = from_fn(|l| v[l] + v[l + 4]);
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    fn highest(self, v: Self::F) -> f32 {
        let max = |a: f32, b: f32| if a > b { a } else { b };
        let v: [f32; 8] = from_fn(|l| max(v[l], v[l + 8]));
        let v: [f32; 4] = from_fn(|l| max(v[l], v[l + 4]));
        max(max(v[0], v[2]), max(v[1], v[3]))
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        [x; LANES]
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|l| a[l].wrapping_add(b[l]))
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|l| a[l].wrapping_sub(b[l]))
    }
    #[inline(always)]
    fn sum_i32(self, v: Self::I) -> i32 {
        v.into_iter().fold(0, i32::wrapping_add)
    }
    #[inline(always)]
    fn to_i32(self, v: Self::F) -> Self::I {
        v.map(|x| x.round_ties_even() as i32)
    }
    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        v.map(|x| x as f32)
    }
    #[inline(always)]
    fn store_i8(self, v: Self::I, out: &mut [i8; LANES]) {
        *out = v.map(|x| x as i8);
    }

    #[inline(always)]
    fn load_codes(self, line: &[u8; 64]) -> Self::Codes {
        *line
    }
    #[inline(always)]
    fn plane<const J: usize>(self, line: Self::Codes) -> Self::Codes {
        line.map(|byte| byte >> (2 * J) & 3)
    }
    #[inline(always)]
    fn begin(self, acc: Self::I) -> Self::Partial {
        acc
    }
    #[inline(always)]
    fn dot(self, partial: Self::Partial, codes: Self::Codes, quad: [i8; 4]) -> Self::Partial {
        from_fn(|l| {
            (0..4).fold(partial[l], |sum, i| {
                sum.wrapping_add(i32::from(codes[4 * l + i]) * i32::from(quad[i]))
            })
        })
    }
    #[inline(always)]
    fn finish(self, _acc: Self::I, partial: Self::Partial) -> Self::I {
        partial
    }

    #[inline(always)]
    fn settle(self, _partial: &mut Self::Partial) {}

    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}
}
