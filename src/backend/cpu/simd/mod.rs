//! The vocabulary in which the ops are written once for every instruction set: 16 lanes of f32 or
//! i32, and 64 ternary codes.
//!
//! # Why the results are the same bits everywhere
//!
//! Each function below has one meaning, down to the rounding, the order of a reduction and what it
//! does with NaN; [`scalar`] spells it out, and the vector versions are instructions that do the
//! same. Multiply-add is fused where it is written [`fma`](Simd::fma) and nowhere else. Bodies over
//! `S: Simd` then cannot differ between instruction sets, whatever the width of the registers.
//!
//! # How the code gets its instructions
//!
//! A body is a [`Kernel`](super::isa::Kernel). [`Token::run`](super::isa::Token::run) calls it from
//! a function that enables the features, and as everything here is `inline(always)`, all of it is
//! compiled inside that function. A function over `S` that is not inlined would still be right, and
//! very slow.

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
pub(super) mod scalar;

/// Lanes of a vector: one AVX-512 register, two of AVX2, four of NEON or SSE.
pub(super) const LANES: usize = 16;

/// How many 16-lane accumulators a tile may have.
#[derive(Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only x86 vectors use them all"))]
pub(super) enum Registers {
    /// One: a vector is a loop, and its lanes are what the compiler has to schedule.
    One,
    /// Six to eight: 16 registers of 8 lanes.
    Few,
    /// Twenty-four: 32 registers of 16 lanes.
    Many,
}

/// A value of this type is the proof that its instructions may be used.
pub(super) trait Simd: Copy + Send + Sync + 'static {
    /// 16 × f32.
    type F: Copy;
    /// 16 × i32.
    type I: Copy;
    /// 64 × u8, codes below 4.
    type Codes: Copy;
    /// Sums of products on their way into 16 × i32, one lane per matrix row.
    type Partial: Copy;
    /// How many accumulators fit the registers. Tiles that need more are not compiled.
    const REGISTERS: Registers;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, v: Self::F, out: &mut [f32; LANES]);
    /// Little-endian half precision, exact.
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F;
    /// To half precision, ties to even.
    fn store_f16(self, v: Self::F, out: &mut [u8; 2 * LANES]);
    /// Exact.
    fn load_i8(self, x: &[i8; LANES]) -> Self::F;
    /// Little-endian bfloat16, exact.
    fn load_bf16(self, x: &[u8; 2 * LANES]) -> Self::F;

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a > b ? a : b`: `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? a : b`: `b` where either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// The larger of `a` (not negative) and `|x|`; NaN counts as larger than infinity.
    fn max_abs(self, a: Self::F, x: Self::F) -> Self::F;
    /// To an integer, ties to even.
    fn round(self, x: Self::F) -> Self::F;
    /// `2^n` for integral `n` in −126 ..= 127.
    fn pow2(self, n: Self::F) -> Self::F;
    /// The sum: lane `j` plus lane `j + 8`, of those `j` plus `j + 4`, then 2, then 1.
    fn sum(self, v: Self::F) -> f32;
    /// The highest lane by [`max`](Self::max), in the tree of [`sum`](Self::sum).
    fn highest(self, v: Self::F) -> f32;

    fn splat_i32(self, x: i32) -> Self::I;
    fn add_i32(self, a: Self::I, b: Self::I) -> Self::I;
    fn sub_i32(self, a: Self::I, b: Self::I) -> Self::I;
    fn sum_i32(self, v: Self::I) -> i32;
    /// To the nearest integer, ties to even, of values within ±2³¹.
    fn to_i32(self, v: Self::F) -> Self::I;
    /// To f32, ties to even.
    fn to_f32(self, v: Self::I) -> Self::F;
    /// Stores values that lie in −128 ..= 127.
    fn store_i8(self, v: Self::I, out: &mut [i8; LANES]);

    fn load_codes(self, line: &[u8; 64]) -> Self::Codes;
    /// The codes at bits `2·J` of each byte.
    fn plane<const J: usize>(self, line: Self::Codes) -> Self::Codes;
    /// Starts a partial sum that [`finish`](Self::finish) will add to `acc`.
    fn begin(self, acc: Self::I) -> Self::Partial;
    /// Lane `l` gains `Σ codes[4l + i] · quad[i]`; at most 4 times before `finish`, with codes of
    /// at most 2.
    fn dot(self, partial: Self::Partial, codes: Self::Codes, quad: [i8; 4]) -> Self::Partial;
    /// `acc` plus the partial sum.
    fn finish(self, acc: Self::I, partial: Self::Partial) -> Self::I;

    /// Emits nothing, and keeps the compiler from computing the sum later, or from loading sooner
    /// what is loaded after this. Left alone it loads the four words of an activation together,
    /// for all rows of a tile, and spills them.
    fn settle(self, partial: &mut Self::Partial);

    /// Asks for the cache line at an address, which may be any.
    fn prefetch(self, address: *const u8);

    /// Fewer than 16 values, in the first lanes; zeros in the others.
    #[inline(always)]
    fn load_tail(self, x: &[f32]) -> Self::F {
        let mut lanes = [0.0; LANES];
        lanes[..x.len()].copy_from_slice(x);
        self.load(&lanes)
    }

    /// Stores the first lanes.
    #[inline(always)]
    fn store_tail(self, v: Self::F, out: &mut [f32]) {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        let len = out.len();
        out.copy_from_slice(&lanes[..len]);
    }

    /// The first lane.
    #[inline(always)]
    fn first(self, v: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        lanes[0]
    }
}
