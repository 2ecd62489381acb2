//! The random numbers of sampling: one number for each seed, position, choice and token, whatever
//! else is in the batch and whichever device draws it.

/// A bound on [`gumbel`]: no value is higher.
pub const GUMBEL_MAX: f32 = 22.875;

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four
/// words for each key and counter. Only 32-bit operations, so that shaders can do the same.
pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let ([mut k0, mut k1], [mut c0, mut c1, mut c2, mut c3]) = (key, counter);
    for _ in 0..10 {
        let p0 = u64::from(c0) * 0xD251_1F53;
        let p1 = u64::from(c2) * 0xCD9E_8D57;
        (c0, c1, c2, c3) =
            ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// The random bits of four tokens, `4 · block` and the three after it: Philox with the seed (low
/// half first) as its key and `(block, position, choice, 0)` as its counter.
pub fn token_bits(seed: u64, position: u32, choice: u32, block: u32) -> [u32; 4] {
    philox([seed as u32, (seed >> 32) as u32], [block, position, choice, 0])
}

/// Gumbel noise from random bits: `g = −ln(−ln u)` with `u = (bits + 1/2) / 2³²`, computed in f64
/// by `libm` and rounded once, so that it is the same on every platform.
///
/// Where there is no f64: near 1, take `ln u` as `log1p(−v)` with `v = (!bits + 1/2) / 2³²`.
pub fn gumbel_of_bits(bits: u32) -> f32 {
    let u = (f64::from(bits) + 0.5) / 4_294_967_296.0;
    -libm::log(-libm::log(u)) as f32
}

/// The noise `g_v` of [`Sample`](super::ops::Sample) for token `v`.
pub fn gumbel(seed: u64, position: u32, choice: u32, token: u32) -> f32 {
    gumbel_of_bits(token_bits(seed, position, choice, token / 4)[(token % 4) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_its_published_vectors() {
        // kat_vectors of the authors' Random123, philox4x32 10.
        assert_eq!(philox([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn gumbel_is_bounded_and_distributed() {
        assert!(gumbel_of_bits(u32::MAX) <= GUMBEL_MAX);
        assert!(gumbel_of_bits(0) > -3.2);
        // Mean: Euler's constant; variance: π²/6. Over 2^16 draws their standard errors are 0.005
        // and 0.013.
        let draws: Vec<f64> = (0..1 << 16).map(|v| f64::from(gumbel(7, 3, 0, v))).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!((mean - 0.5772).abs() < 0.025, "{mean}");
        assert!((variance - 1.6449).abs() < 0.065, "{variance}");
    }

    #[test]
    fn every_part_of_the_key_counts() {
        let base = gumbel(1, 2, 3, 4);
        for other in [
            gumbel(2, 2, 3, 4),
            gumbel(1 | 1 << 32, 2, 3, 4),
            gumbel(1, 3, 3, 4),
            gumbel(1, 2, 4, 4),
            gumbel(1, 2, 3, 5),
        ] {
            assert_ne!(base, other);
        }
    }
}
