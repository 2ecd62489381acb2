//! What the tests of the CPU backend share.
#![allow(dead_code, unreachable_pub, reason = "each test file uses some of it")]

use trine::backend::cpu::{Buffer, Cpu, CpuOptions, Isa, Recorder};
use trine::backend::ops::{Batch, Lanes};
use trine::backend::{Backend, Element, LogitUse, StepKey};
use trine::error::RunError;
use trine::tensor::{FloatType, HostTable, SharedBytes};

/// A small generator (SplitMix64): tests need variety, not quality.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    pub fn floats(&mut self, len: usize, size: f32) -> Vec<f32> {
        (0..len).map(|_| ((self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * size).collect()
    }
    pub fn ternary(&mut self, len: usize) -> Vec<i8> {
        (0..len).map(|_| self.below(3) as i8 - 1).collect()
    }
    /// A table whose bytes do not start where its elements would like to.
    pub fn table(&mut self, rows: usize, cols: usize, float: FloatType) -> HostTable {
        let mut bytes = vec![0u8];
        for x in self.floats(rows * cols, 1.0) {
            match float {
                FloatType::Bf16 => bytes.extend(half::bf16::from_f32(x).to_le_bytes()),
                FloatType::F16 => bytes.extend(half::f16::from_f32(x).to_le_bytes()),
                FloatType::F32 => bytes.extend(x.to_le_bytes()),
            }
        }
        let end = bytes.len();
        HostTable { rows, cols, float, bytes: SharedBytes::new(bytes).slice(1..end).unwrap() }
    }
}

pub fn cpu_of(isa: Option<Isa>, threads: usize) -> Cpu {
    let mut options = CpuOptions::default().threads(threads);
    options.isa = isa;
    Cpu::new(options).unwrap()
}

/// Runs `f` for every instruction set of this machine with 1, 2 and 3 threads; all must agree.
pub fn on_all<R: PartialEq + std::fmt::Debug>(f: impl FnMut(&mut Cpu) -> R) -> R {
    on_all_of(&[1, 2, 3], f)
}

/// The same with these numbers of threads.
pub fn on_all_of<R: PartialEq>(threads: &[usize], mut f: impl FnMut(&mut Cpu) -> R) -> R {
    let mut first: Option<R> = None;
    for isa in Isa::available() {
        for &threads in threads {
            let result = f(&mut cpu_of(Some(isa), threads));
            match &first {
                None => first = Some(result),
                Some(first) => {
                    assert!(result == *first, "{isa} with {threads} threads differs from scalar");
                }
            }
        }
    }
    first.unwrap()
}

/// The same for results whose NaN keep their bits out of the comparison: they hold bits already.
pub fn on_all_nan(mut f: impl FnMut(&mut Cpu) -> (Vec<u32>, Vec<f32>)) -> (Vec<u32>, Vec<f32>) {
    let nan = |bits: u32| if f32::from_bits(bits).is_nan() { f32::NAN.to_bits() } else { bits };
    let bits = on_all(|cpu| f(cpu).0.into_iter().map(nan).collect::<Vec<_>>());
    (bits, Vec::new())
}

pub fn buffer<T: Element>(cpu: &mut Cpu, values: &[T]) -> Buffer<T> {
    let mut buffer = cpu.allocate("test", values.len()).unwrap();
    cpu.write(&mut buffer, values).unwrap();
    buffer
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

const KEY: StepKey = StepKey {
    tokens: 0,
    sequences: 0,
    queries: 0,
    pages: 0,
    logit_rows: 0,
    logits: LogitUse::Keep,
    hidden: false,
};

pub fn step_result(
    cpu: &mut Cpu,
    mut record: impl FnMut(&mut Recorder<'_>) -> Result<(), RunError>,
) -> Result<(), RunError> {
    cpu.run(&KEY, &mut |recorder| record(recorder))
}

pub fn step(cpu: &mut Cpu, record: impl FnMut(&mut Recorder<'_>) -> Result<(), RunError>) {
    step_result(cpu, record).unwrap();
}

/// Inputs of a step, all zero.
pub fn batch(cpu: &mut Cpu, tokens: usize, sequences: usize, logit_rows: usize) -> Batch<Cpu> {
    Batch {
        tokens: cpu.allocate("tokens", tokens).unwrap(),
        positions: cpu.allocate("positions", tokens).unwrap(),
        sequences: cpu.allocate("sequences", tokens).unwrap(),
        slots: cpu.allocate("slots", tokens).unwrap(),
        query_starts: cpu.allocate("query_starts", sequences + 1).unwrap(),
        kv_lens: cpu.allocate("kv_lens", sequences).unwrap(),
        page_table: cpu.allocate("page_table", sequences).unwrap(),
        max_pages: 1,
        lanes: cpu.allocate("lanes", sequences).unwrap(),
        logit_rows: cpu.allocate("logit_rows", logit_rows).unwrap(),
        targets: cpu.allocate("targets", logit_rows).unwrap(),
        sample_rows: cpu.allocate("sample_rows", logit_rows).unwrap(),
        bias_tokens: cpu.allocate("bias_tokens", 8).unwrap(),
        bias_values: cpu.allocate("bias_values", 8).unwrap(),
    }
}

pub fn lanes(cpu: &mut Cpu, lanes: usize, context: usize) -> Lanes<Cpu> {
    Lanes {
        history: cpu.allocate("history", lanes * context).unwrap(),
        context,
        sampled: cpu.allocate("sampled", lanes).unwrap(),
    }
}
