//! The vocabulary in AVX2 with FMA and F16C: every vector is two registers, the lower lanes first.

#![expect(
    clippy::undocumented_unsafe_blocks,
    reason = "every block here has the same two: the token proves the features of the intrinsics, \
              and loads and stores go through references to arrays of just the vector's size"
)]

use super::{LANES, Registers, Simd};
use std::arch::x86_64::*;

/// AVX2, FMA and F16C: Haswell (2013) and Zen (2017) have them.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx2(());

impl Avx2 {
    /// The token, on a machine that has the instructions.
    pub(in super::super) fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self(()))
    }
}

/// The lower half of [`Simd::sum`]'s tree.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
pub(super) unsafe fn sum_of_8(v: __m256) -> f32 {
    unsafe {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }
}

/// The lower half of [`Simd::highest`]'s tree.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
pub(super) unsafe fn highest_of_8(v: __m256) -> f32 {
    unsafe {
        let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
    }
}

/// Half of [`Simd::max_abs`].
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn max_abs_of_8(a: __m256, x: __m256) -> __m256 {
    unsafe {
        let abs = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFF_FFFF));
        _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), abs))
    }
}

/// Half of [`Simd::pow2`].
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn pow2_of_8(n: __m256) -> __m256 {
    unsafe {
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    }
}

/// Half of [`Simd::plane`]. There is no shift of bytes; what a wider shift brings in from the
/// neighbour is masked.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn plane_of_32<const J: usize>(line: __m256i) -> __m256i {
    unsafe {
        let shifted = match J {
            0 => line,
            1 => _mm256_srli_epi16::<2>(line),
            2 => _mm256_srli_epi16::<4>(line),
            _ => _mm256_srli_epi16::<6>(line),
        };
        _mm256_and_si256(shifted, _mm256_set1_epi8(3))
    }
}

impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type Codes = [__m256i; 2];
    /// Pairs of products, summed in 16 bits: 4 calls of `dot` add at most 4 · 2 · 2 · 128 = 2048.
    type Partial = [__m256i; 2];
    const REGISTERS: Registers = Registers::Few;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
    }
    #[inline(always)]
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F {
        unsafe {
            let at = x.as_ptr().cast::<__m128i>();
            [_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)))]
        }
    }
    #[inline(always)]
    fn store_f16(self, v: Self::F, out: &mut [u8; 2 * LANES]) {
        unsafe {
            let at = out.as_mut_ptr().cast::<__m128i>();
            _mm_storeu_si128(at, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0]));
            _mm_storeu_si128(at.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1]));
        }
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; LANES]) -> Self::F {
        unsafe {
            let bytes = _mm_loadu_si128(x.as_ptr().cast());
            let low = _mm256_cvtepi8_epi32(bytes);
            let high = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[u8; 2 * LANES]) -> Self::F {
        unsafe {
            let at = x.as_ptr().cast::<__m128i>();
            let (low, high) = (_mm_loadu_si128(at), _mm_loadu_si128(at.add(1)));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(low))),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(high))),
            ]
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn max_abs(self, a: Self::F, x: Self::F) -> Self::F {
        unsafe { [max_abs_of_8(a[0], x[0]), max_abs_of_8(a[1], x[1])] }
    }
    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        unsafe { [_mm256_round_ps::<NEAREST>(x[0]), _mm256_round_ps::<NEAREST>(x[1])] }
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        unsafe { [pow2_of_8(n[0]), pow2_of_8(n[1])] }
    }
    #[inline(always)]
    fn sum(self, v: Self::F) -> f32 {
        unsafe { sum_of_8(_mm256_add_ps(v[0], v[1])) }
    }
    #[inline(always)]
    fn highest(self, v: Self::F) -> f32 {
        unsafe { highest_of_8(_mm256_max_ps(v[0], v[1])) }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        unsafe { [_mm256_set1_epi32(x); 2] }
    }
    #[inline(always)]
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I {
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub_i32(self, a: Self::I, b: Self::I) -> Self::I {
        unsafe { [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    fn sum_i32(self, v: Self::I) -> i32 {
        let mut lanes = [0i32; 8];
        unsafe {
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), _mm256_add_epi32(v[0], v[1]));
        }
        lanes.into_iter().fold(0, i32::wrapping_add)
    }
    #[inline(always)]
    fn to_i32(self, v: Self::F) -> Self::I {
        unsafe { [_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1])] }
    }
    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        unsafe { [_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])] }
    }
    #[inline(always)]
    fn store_i8(self, v: Self::I, out: &mut [i8; LANES]) {
        unsafe {
            // packs works within halves of 128 bits: quarters come as 0, 2, 1, 3.
            let words = _mm256_packs_epi32(v[0], v[1]);
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packs_epi16(
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    fn load_codes(self, line: &[u8; 64]) -> Self::Codes {
        unsafe {
            let at = line.as_ptr().cast::<__m256i>();
            [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))]
        }
    }
    #[inline(always)]
    fn plane<const J: usize>(self, line: Self::Codes) -> Self::Codes {
        unsafe { [plane_of_32::<J>(line[0]), plane_of_32::<J>(line[1])] }
    }
    #[inline(always)]
    fn begin(self, _acc: Self::I) -> Self::Partial {
        unsafe { [_mm256_setzero_si256(); 2] }
    }
    #[inline(always)]
    fn dot(self, partial: Self::Partial, codes: Self::Codes, quad: [i8; 4]) -> Self::Partial {
        let quad = i32::from_ne_bytes(quad.map(|q| q as u8));
        unsafe {
            let quad = _mm256_set1_epi32(quad);
            [
                _mm256_add_epi16(partial[0], _mm256_maddubs_epi16(codes[0], quad)),
                _mm256_add_epi16(partial[1], _mm256_maddubs_epi16(codes[1], quad)),
            ]
        }
    }
    #[inline(always)]
    fn finish(self, acc: Self::I, partial: Self::Partial) -> Self::I {
        unsafe {
            let ones = _mm256_set1_epi16(1);
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(partial[0], ones)),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(partial[1], ones)),
            ]
        }
    }

    #[inline(always)]
    fn settle(self, _partial: &mut Self::Partial) {}

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}
