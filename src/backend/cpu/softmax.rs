//! What sampling and scoring ask of a row of logits.

use super::exp::exp;
use super::simd::{LANES, Simd};

/// Whether all are finite.
#[inline(always)]
pub(super) fn all_finite<S: Simd>(s: S, x: &[f32]) -> bool {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut highest = s.splat(0.0);
    for chunk in chunks {
        highest = s.max_abs(highest, s.load(chunk));
    }
    highest = s.max_abs(highest, s.load_tail(tail));
    let mut lanes = [0.0; LANES];
    s.store(highest, &mut lanes);
    lanes.into_iter().all(f32::is_finite)
}

/// The highest of values that are not NaN; −∞ of none.
#[inline(always)]
pub(super) fn highest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut highest = s.splat(f32::NEG_INFINITY);
    for chunk in chunks {
        highest = s.max(s.load(chunk), highest);
    }
    tail.iter().fold(s.highest(highest), |a, &b| if b > a { b } else { a })
}

/// The highest of values that are not NaN, the first among equals: `(index, value)`.
#[inline(always)]
pub(super) fn argmax<S: Simd>(s: S, x: &[f32]) -> (usize, f32) {
    let highest = highest(s, x);
    (x.iter().position(|&x| x == highest).unwrap_or(0), highest)
}

/// `m` and `ln Σ exp(x − m)` with `m` the highest: lane `j` of 16 sums the elements `j`, `j + 16`,
/// …; every 4096 elements the lanes go into an f64, so that a large vocabulary loses nothing.
#[inline(always)]
pub(super) fn log_sum_exp<S: Simd>(s: S, x: &[f32]) -> (f32, f64) {
    const BLOCK: usize = 4096;
    let highest = highest(s, x);
    let shift = s.splat(highest);
    let mut total = 0f64;
    for block in x.chunks(BLOCK) {
        let (chunks, tail) = block.as_chunks::<LANES>();
        let mut sums = s.splat(0.0);
        for chunk in chunks {
            sums = s.add(sums, exp(s, s.sub(s.load(chunk), shift)));
        }
        if !tail.is_empty() {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            lanes[..tail.len()].copy_from_slice(tail);
            sums = s.add(sums, exp(s, s.sub(s.load(&lanes), shift)));
        }
        total += f64::from(s.sum(sums));
    }
    (highest, libm::log(total))
}

/// The log-probability of a logit.
pub(super) fn log_probability(x: f32, (highest, log_sum): (f32, f64)) -> f32 {
    (f64::from(x) - f64::from(highest) - log_sum) as f32
}
