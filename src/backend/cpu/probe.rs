//! What this machine is and what it can do: its name, its cores, and the two limits that speeds
//! are shares of.

use super::Cpu;
use super::isa::Kernel;
use super::memory::Memory;
use super::pool::Disjoint;
use super::simd::{LANES, Registers, Simd};
use std::time::Instant;

/// The model of the processor, or its architecture where the system does not say.
pub(super) fn brand() -> String {
    let named = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|info| {
        let line = info.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    named.unwrap_or_else(|| format!("{} processor", std::env::consts::ARCH))
}

/// Physical cores, but no more than the processors that this process may use: two threads of one
/// core share the units that the products keep busy.
pub(super) fn cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // Each physical core is named once by the list of its threads.
    let mut cores = std::collections::BTreeSet::new();
    for processor in 0..4096 {
        let file = format!("/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list");
        match std::fs::read_to_string(file) {
            Ok(threads) => cores.insert(threads),
            Err(_) => break,
        };
    }
    if cores.is_empty() { logical } else { logical.min(cores.len()) }
}

/// Reads memory as the products read weights.
struct ReadAll<'a>(&'a [f32]);

impl Kernel for ReadAll<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 4];
        for lines in self.0.as_chunks::<LANES>().0.as_chunks::<4>().0 {
            for (line, sum) in lines.iter().zip(&mut sums) {
                s.prefetch(line.as_ptr().wrapping_add(1024).cast());
                *sum = s.max_abs(*sum, s.load(line));
            }
        }
        s.sum(s.max_abs(s.max_abs(sums[0], sums[1]), s.max_abs(sums[2], sums[3])))
    }
}

/// Dot products with one register of codes, over and over.
struct DotAll {
    rounds: usize,
}

/// Chains of dot products of the probe: more than latency times units of any processor so far.
const CHAINS: usize = 16;

impl Kernel for DotAll {
    type Output = i32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> i32 {
        // Two sums of 16 bits and two of 32 for each chain are what AVX2 has registers for.
        match S::REGISTERS {
            Registers::Many => self.chains::<S, CHAINS>(s),
            Registers::Few => self.chains::<S, 4>(s),
            Registers::One => self.chains::<S, 1>(s),
        }
    }
}

impl DotAll {
    #[inline(always)]
    fn chains<S: Simd, const N: usize>(&self, s: S) -> i32 {
        let codes = s.plane::<0>(s.load_codes(std::hint::black_box(&[1; 64])));
        let quads = [[[1, 0, 1, 0]; 4]; N];
        let mut sums = [s.splat_i32(0); N];
        for _ in 0..self.rounds * CHAINS / N {
            // Activations of their own for each, from memory: no product can be used twice.
            let quads = std::hint::black_box(&quads);
            for (sum, quads) in sums.iter_mut().zip(quads) {
                let partial = s.dot(s.begin(*sum), codes, quads[0]);
                let partial = s.dot(partial, codes, quads[1]);
                let partial = s.dot(partial, codes, quads[2]);
                *sum = s.finish(*sum, s.dot(partial, codes, quads[3]));
            }
        }
        sums.into_iter().fold(0, |total, sum| total.wrapping_add(s.sum_i32(sum)))
    }
}

impl Cpu {
    /// Bytes per second at which all threads together read memory, the best of a few passes over a
    /// buffer that no cache holds: the limit of decoding. 0 where there is no memory for it.
    pub fn read_bandwidth(&self) -> f64 {
        const BYTES: usize = 512 << 20;
        const PASSES: usize = 5;
        let Ok(mut memory) = Memory::<f32>::new("the bandwidth probe", BYTES / 4) else {
            return 0.0;
        };
        {
            // Memory that was never written is one page of zeros.
            let shared = Disjoint::new(&mut memory);
            self.pool.split(BYTES / 4, 1 << 20, (BYTES, 1), |range| {
                // SAFETY: ranges of a split do not overlap.
                unsafe { shared.range(range) }.fill(1.0);
            });
        }
        let best = (0..PASSES).map(|_| {
            let start = Instant::now();
            self.pool.split(BYTES / 4, 1 << 10, (BYTES, 1), |range| {
                std::hint::black_box(self.token.run(ReadAll(&memory[range])));
            });
            start.elapsed().as_secs_f64()
        });
        BYTES as f64 / best.fold(f64::INFINITY, f64::min)
    }

    /// Products of an int8 and a code, each with its addition, per second of all threads together:
    /// the limit of long prompts.
    pub fn int8_rate(&self) -> f64 {
        const ROUNDS: usize = 20_000;
        const PASSES: usize = 5;
        let threads = self.pool.threads();
        let best = (0..PASSES).map(|_| {
            let start = Instant::now();
            self.pool.run(threads * 8, |_| {
                std::hint::black_box(self.token.run(DotAll { rounds: ROUNDS }));
            });
            start.elapsed().as_secs_f64()
        });
        let products = threads * 8 * ROUNDS * CHAINS * 4 * 64;
        products as f64 / best.fold(f64::INFINITY, f64::min)
    }
}
