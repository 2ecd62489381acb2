//! Deterministic random numbers: the same on every machine, so that a failure can be run again.

/// SplitMix64 (Steele et al., OOPSLA 2014): small, and any seed is as good as another.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A stream of its own for each path of numbers, so that adding a tensor changes no other.
    pub(crate) fn of(path: &[u64]) -> Self {
        let mut rng = Self(0);
        for &part in path {
            rng.0 ^= part;
            rng.0 = rng.bits();
        }
        rng
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `n`; the bias of the remainder is no matter here.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Uniform in `low .. high`.
    pub(crate) fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * ((self.bits() >> 40) as f32 / (1u64 << 24) as f32)
    }

    /// Close enough to a standard normal: the sum of twelve uniforms.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.range(-0.5, 0.5)).sum()
    }

    pub(crate) fn normals(&mut self, len: usize, deviation: f32) -> Vec<f32> {
        (0..len).map(|_| self.normal() * deviation).collect()
    }

    pub(crate) fn tokens(&mut self, len: usize, vocabulary: usize) -> Vec<u32> {
        (0..len).map(|_| self.below(vocabulary) as u32).collect()
    }

    /// Weights of −1, 0 and +1.
    pub(crate) fn ternary(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| self.below(3) as i8 - 1).collect()
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
