//! The vocabulary in AVX-512 with VNNI: every vector is one register.

#![expect(
    clippy::undocumented_unsafe_blocks,
    reason = "every block here has the same two: the token proves the features of the intrinsics, \
              and loads and stores go through references to arrays of just the vector's size"
)]

use super::{LANES, Registers, Simd};
use std::arch::x86_64::*;

/// AVX-512 F, BW, DQ, VL and VNNI, and all that [`Avx2`](super::avx2::Avx2) stands for.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512(());

impl Avx512 {
    /// The token, on a machine that has the instructions.
    pub(in super::super) fn new() -> Option<Self> {
        (super::avx2::Avx2::new().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni"))
        .then_some(Self(()))
    }
}

/// See [`Simd::settle`].
#[target_feature(enable = "avx512f")]
#[inline]
fn settled(mut partial: __m512i) -> __m512i {
    unsafe {
        std::arch::asm!("/* {0} */", inout(zmm_reg) partial, options(nostack, preserves_flags))
    };
    partial
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    type Codes = __m512i;
    type Partial = __m512i;
    const REGISTERS: Registers = Registers::Many;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, v: Self::F, out: &mut [u8; 2 * LANES]) {
        unsafe {
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), half);
        }
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::F {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u8; 2 * LANES]) -> Self::F {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn max_abs(self, a: Self::F, x: Self::F) -> Self::F {
        unsafe {
            let abs = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFF_FFFF));
            _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), abs))
        }
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    fn sum(self, v: Self::F) -> f32 {
        unsafe {
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            super::avx2::sum_of_8(v)
        }
    }
    #[inline(always)]
    fn highest(self, v: Self::F) -> f32 {
        unsafe {
            let v = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            super::avx2::highest_of_8(v)
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I, b: Self::I) -> Self::I {
        unsafe { _mm512_sub_epi32(a, b) }
    }
    #[inline(always)]
    fn sum_i32(self, v: Self::I) -> i32 {
        unsafe { _mm512_reduce_add_epi32(v) }
    }
    #[inline(always)]
    fn to_i32(self, v: Self::F) -> Self::I {
        unsafe { _mm512_cvtps_epi32(v) }
    }
    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        unsafe { _mm512_cvtepi32_ps(v) }
    }
    #[inline(always)]
    fn store_i8(self, v: Self::I, out: &mut [i8; LANES]) {
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(v)) }
    }

    #[inline(always)]
    fn load_codes(self, line: &[u8; 64]) -> Self::Codes {
        unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
    }
    #[inline(always)]
    fn plane<const J: usize>(self, line: Self::Codes) -> Self::Codes {
        // There is no shift of bytes; what a wider shift brings in from the neighbour is masked.
        unsafe {
            let shifted = match J {
                0 => line,
                1 => _mm512_srli_epi16::<2>(line),
                2 => _mm512_srli_epi16::<4>(line),
                _ => _mm512_srli_epi16::<6>(line),
            };
            _mm512_and_si512(shifted, _mm512_set1_epi8(3))
        }
    }
    #[inline(always)]
    fn begin(self, acc: Self::I) -> Self::Partial {
        acc
    }
    #[inline(always)]
    fn dot(self, partial: Self::Partial, codes: Self::Codes, quad: [i8; 4]) -> Self::Partial {
        let quad = i32::from_ne_bytes(quad.map(|q| q as u8));
        unsafe { _mm512_dpbusd_epi32(partial, codes, _mm512_set1_epi32(quad)) }
    }
    #[inline(always)]
    fn finish(self, _acc: Self::I, partial: Self::Partial) -> Self::I {
        partial
    }

    #[inline(always)]
    fn settle(self, partial: &mut Self::Partial) {
        unsafe { *partial = settled(*partial) }
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}
