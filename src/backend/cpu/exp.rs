//! `exp`, and the activations that are made of it.

use super::simd::Simd;

/// `e^x` within 2 ulp: 1 at 0, 0 from about −103.98 down to −∞, ∞ from about 88.73 up, NaN of NaN.
///
/// Cephes' `expf` (S. L. Moshier): `x = n·ln 2 + r` with ln 2 in two parts, of which the first has
/// 9 significant bits so that `n` times it is exact; a polynomial for `|r| ≤ ln(2)/2`; then `2^n`
/// in two factors, so that results below the least normal number are rounded and not lost.
#[inline(always)]
pub(super) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    // In this order of arguments NaN passes. Beyond these bounds the result is 0 or ∞ anyway.
    let x = s.max(s.splat(-104.0), s.min(s.splat(89.0), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_4), x);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let p = s.splat(1.987_569_1e-4);
    let p = s.fma(p, r, s.splat(1.398_199_9e-3));
    let p = s.fma(p, r, s.splat(8.333_452e-3));
    let p = s.fma(p, r, s.splat(4.166_579_6e-2));
    let p = s.fma(p, r, s.splat(0.166_666_65));
    let p = s.fma(p, r, s.splat(0.5));
    let y = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    let half = s.round(s.mul(n, s.splat(0.5)));
    s.mul(s.mul(y, s.pow2(half)), s.pow2(s.sub(n, half)))
}

/// [`exp`] of one number.
#[inline(always)]
pub(super) fn exp_one<S: Simd>(s: S, x: f32) -> f32 {
    s.first(exp(s, s.splat(x)))
}

/// `x / (1 + e^−y)`: SiLU where `y` is `x`.
#[inline(always)]
pub(super) fn times_sigmoid<S: Simd>(s: S, x: S::F, y: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), y));
    s.div(x, s.add(s.splat(1.0), e))
}

/// `x/2 · (1 + tanh(u))` with `u = √(2/π) · (x + 0.044715 x³)`, as `x / (1 + e^−2u)`, which is the
/// same and does not cancel where `x` is very negative.
#[inline(always)]
pub(super) fn gelu_tanh<S: Simd>(s: S, x: S::F) -> S::F {
    let cube = s.mul(s.mul(x, x), x);
    let inner = s.fma(cube, s.splat(0.044_715), x);
    // 2·√(2/π)
    times_sigmoid(s, x, s.mul(inner, s.splat(1.595_769)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::simd::scalar::Scalar;

    fn exp_of(x: f32) -> f32 {
        exp_one(Scalar, x)
    }

    #[test]
    fn exp_is_within_two_ulp() {
        let mut worst = 0.0f64;
        let mut x = -87.0f32;
        while x < 88.0 {
            let exact = f64::from(x).exp();
            let ulp = f64::from(f32::EPSILON) * 2f64.powi(exact.log2().floor() as i32);
            worst = worst.max((f64::from(exp_of(x)) - exact).abs() / ulp);
            x += 0.001_37;
        }
        assert!(worst < 2.0, "{worst}");
    }

    #[test]
    fn exp_at_its_ends() {
        assert_eq!(exp_of(0.0), 1.0);
        assert_eq!(exp_of(-0.0), 1.0);
        assert_eq!(exp_of(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_of(f32::MIN), 0.0);
        assert_eq!(exp_of(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_of(f32::MAX), f32::INFINITY);
        assert!(exp_of(88.7).is_finite());
        assert!(exp_of(f32::NAN).is_nan());
        // The least numbers there are: 2^-149 is e^-103.28.
        assert_eq!(exp_of(-103.0), f32::from_bits(1));
        assert_eq!(exp_of(-104.0), 0.0);
    }

    #[test]
    fn activations_agree_with_their_formulas() {
        for i in -4000..4000 {
            let x = i as f32 * 0.01;
            let y = f64::from(x);
            let silu = y / (1.0 + (-y).exp());
            let got = f64::from(Scalar.first(times_sigmoid(Scalar, [x; 16], [x; 16])));
            assert!((got - silu).abs() <= 1e-6 * silu.abs().max(1e-30) + 1e-37, "silu {x} {got}");
            let u = (2.0 / std::f64::consts::PI).sqrt() * (y + 0.044_715 * y * y * y);
            // 1 + tanh u cancels in f64 too where u is large and negative.
            let gelu = y / (1.0 + (-2.0 * u).exp());
            let got = f64::from(Scalar.first(gelu_tanh(Scalar, [x; 16])));
            let tolerance = 1e-6 * (1.0 + u.abs()) * gelu.abs() + 1e-37;
            assert!((got - gelu).abs() <= tolerance, "gelu {x} {got} {gelu}");
        }
    }
}
