//! How close the ops of the CPU come to the limits of the machine they run on, at the shapes of
//! BitNet b1.58 2B4T: `cargo bench --bench ops`.
//!
//! Decoding is held against the bandwidth at which all threads read memory, long prompts against
//! the rate of int8 dot products; both are measured first, by the same threads. Weights rotate over
//! more layers than caches hold. The share is that of the best run, as a neighbour on the machine
//! can only slow things down.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::time::{Duration, Instant};
use trine::backend::cpu::{Buffer, Cpu, CpuOptions, Recorder, TernaryMatrix};
use trine::backend::ops::*;
use trine::backend::{Backend, KvLayout, KvType, LogitUse, PAGE_TOKENS, Record, StepKey};
use trine::error::RunError;
use trine::tensor::{FloatType, HostTable, SharedBytes};
use trine::ternary::TernaryRows;

/// Width and features of a layer's matrices: qkv, output, gate and up, down.
const LAYER: [(usize, usize); 4] = [(2560, 3840), (2560, 2560), (2560, 13824), (6912, 2560)];
/// Layers of 17 MB that decoding rotates over: four times the largest cache of the machines this
/// has run on.
const LAYERS: usize = 8;
const VOCABULARY: usize = 128_256;
const HIDDEN: usize = 2560;

/// A matrix of any codes.
struct AnyCodes(usize, usize);

impl TernaryRows for AnyCodes {
    fn rows(&self) -> usize {
        self.1
    }
    fn cols(&self) -> usize {
        self.0
    }
    fn scale(&self) -> f32 {
        1.0
    }
    fn read_codes(&self, row: usize, codes: &mut [u8]) {
        let mut state = row as u32 * 2_654_435_761 + 1;
        for code in codes {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *code = (((state >> 24) * 3) >> 8) as u8;
        }
    }
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

fn step(cpu: &mut Cpu, mut record: impl FnMut(&mut Recorder<'_>) -> Result<(), RunError>) {
    cpu.run(&KEY, &mut |recorder| record(recorder)).unwrap();
}

fn quantized(cpu: &Cpu, rows: usize, width: usize) -> Quantized<Cpu> {
    let mut q = allocate_quantized(cpu, "q", rows, width).unwrap();
    q.values.iter_mut().enumerate().for_each(|(i, q)| *q = (i * 37 % 251) as i8);
    q.scales.fill(40.0);
    q
}

/// One bench: times `f`, and prints the rate of the best run in `units`, with its share of `limit`
/// (units per second) where there is one.
fn measure(
    c: &mut Criterion,
    (group, name): (&str, String),
    (units, limit, unit): (f64, Option<f64>, &str),
    mut f: impl FnMut(),
) {
    let mut best = Duration::MAX;
    let mut group = c.benchmark_group(group);
    group.sample_size(10).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_secs(2));
    group.throughput(Throughput::Bytes(units as u64));
    group.bench_function(BenchmarkId::from_parameter(name), |b| {
        b.iter_custom(|iterations| {
            let mut total = Duration::ZERO;
            for _ in 0..iterations {
                let start = Instant::now();
                f();
                let time = start.elapsed();
                best = best.min(time);
                total += time;
            }
            total
        });
    });
    group.finish();
    if best < Duration::MAX {
        let rate = units / best.as_secs_f64();
        println!("    best {best:?}: {:.2} G{unit}/s", rate / 1e9);
        if let Some(limit) = limit {
            println!("    {:.0} % of {:.1}", 100.0 * rate / limit, limit / 1e9);
        }
    }
}

fn machines() -> Vec<(Cpu, f64, f64)> {
    let all = Cpu::new(CpuOptions::default()).unwrap().threads();
    let mut threads = vec![1, all];
    threads.dedup();
    threads
        .into_iter()
        .map(|threads| {
            let cpu = Cpu::new(CpuOptions::default().threads(threads)).unwrap();
            let (bandwidth, rate) = (cpu.read_bandwidth(), cpu.int8_rate());
            println!(
                "{}: reads {:.1} GB/s, {:.0} G int8 products/s",
                cpu.info().description,
                bandwidth / 1e9,
                rate / 1e9
            );
            (cpu, bandwidth, rate)
        })
        .collect()
}

fn products(c: &mut Criterion) {
    for (mut cpu, bandwidth, rate) in machines() {
        let threads = cpu.threads();
        let layers: Vec<Vec<TernaryMatrix>> = (0..LAYERS)
            .map(|_| {
                LAYER.iter().map(|&(k, n)| cpu.pack_ternary(&[&AnyCodes(k, n)]).unwrap()).collect()
            })
            .collect();
        let weights: usize = LAYER.iter().map(|(k, n)| k * n).sum();
        for rows in [1, 4, 16, 128] {
            let inputs: Vec<Quantized<Cpu>> =
                LAYER.iter().map(|&(k, _)| quantized(&cpu, rows, k)).collect();
            let mut output: Buffer<f32> = cpu.allocate("output", rows * 13824).unwrap();
            let mut turn = 0;
            let name = ("ternary_matmul", format!("{rows} rows, {threads} threads"));
            let limit = if rows <= 4 {
                (weights as f64 / 4.0, Some(bandwidth), "B")
            } else {
                ((rows * weights) as f64, Some(rate), "MAC")
            };
            measure(c, name, limit, || {
                turn = (turn + 1) % LAYERS;
                for ((&(width, features), weight), input) in
                    LAYER.iter().zip(&layers[turn]).zip(&inputs)
                {
                    step(&mut cpu, |r| {
                        r.ternary_matmul(TernaryMatmul {
                            rows,
                            width,
                            features,
                            input,
                            weight,
                            output: &mut output,
                            stride: features,
                            column: 0,
                            epilogue: Epilogue::Store,
                        })
                    });
                }
            });
        }
    }
}

fn empty_batch(cpu: &Cpu, tokens: usize, pages: usize) -> Batch<Cpu> {
    let one = |len| cpu.allocate("batch", len).unwrap();
    Batch {
        tokens: one(tokens),
        positions: one(tokens),
        sequences: one(tokens),
        slots: one(tokens),
        query_starts: one(2),
        kv_lens: one(1),
        page_table: one(pages),
        max_pages: pages,
        lanes: one(1),
        logit_rows: one(tokens),
        targets: one(tokens),
        sample_rows: cpu.allocate("batch", tokens).unwrap(),
        bias_tokens: one(1),
        bias_values: cpu.allocate("batch", 1).unwrap(),
    }
}

fn heads(c: &mut Criterion) {
    let bytes: Vec<u8> = [0x3F, 0x80].repeat(VOCABULARY * HIDDEN);
    let table = HostTable {
        rows: VOCABULARY,
        cols: HIDDEN,
        float: FloatType::Bf16,
        bytes: SharedBytes::new(bytes),
    };
    for (mut cpu, bandwidth, _) in machines() {
        let threads = cpu.threads();
        let size = table.bytes.len() as f64;
        let table = cpu.load_table(table.clone()).unwrap();
        for rows in [1, 8] {
            let batch = empty_batch(&cpu, rows, 1);
            let input: Buffer<f32> = cpu.allocate("input", rows * HIDDEN).unwrap();
            let gain: Buffer<f32> = cpu.allocate("gain", HIDDEN).unwrap();
            let mut normed: Buffer<f32> = cpu.allocate("normed", rows * HIDDEN).unwrap();
            let mut logits: Buffer<f32> = cpu.allocate("logits", rows * VOCABULARY).unwrap();
            let name = ("lm_head", format!("{rows} rows, {threads} threads"));
            measure(c, name, (size, Some(bandwidth), "B"), || {
                step(&mut cpu, |r| {
                    r.lm_head(LmHead {
                        rows,
                        first: 0,
                        width: HIDDEN,
                        vocabulary: VOCABULARY,
                        batch: &batch,
                        input: &input,
                        norm: Norm { gain: &gain, eps: 1e-5 },
                        table: &table,
                        normed: &mut normed,
                        logits: &mut logits,
                    })
                });
            });
        }
    }
}

fn attention(c: &mut Criterion) {
    let heads = Heads { query: 20, kv: 5, dim: 128 };
    for (mut cpu, bandwidth, _) in machines() {
        let threads = cpu.threads();
        let pages = 4096 / PAGE_TOKENS;
        let layout =
            KvLayout { layers: 8, pages, kv_heads: 5, head_dim: 128, kv_type: KvType::F16 };
        let kv = cpu.allocate_kv(layout).unwrap();
        let mut layer = 0;
        for (rows, context) in [(1, 4096), (512, 512)] {
            let mut batch = empty_batch(&cpu, rows, pages);
            (0..rows).for_each(|t| batch.positions[t] = (context - rows + t) as u32);
            (0..pages).for_each(|page| batch.page_table[page] = page as u32);
            batch.query_starts[1] = rows as u32;
            let qkv: Buffer<f32> = cpu.allocate("qkv", rows * heads.qkv_width()).unwrap();
            let mut output: Buffer<f32> = cpu.allocate("o", rows * heads.output_width()).unwrap();
            let name = ("paged_attention", format!("{rows} of {context}, {threads} threads"));
            // One token reads the cache; a prompt is arithmetic.
            let limit = if rows == 1 {
                ((context * 5 * 128 * 2 * 2) as f64, Some(bandwidth), "B")
            } else {
                ((rows * context / 2 * 20 * 128 * 2) as f64, None, "FMA")
            };
            measure(c, name, limit, || {
                layer = (layer + 1) % 8;
                step(&mut cpu, |r| {
                    r.paged_attention(PagedAttention {
                        rows,
                        sequences: 1,
                        batch: &batch,
                        heads,
                        scale: 0.09,
                        window: None,
                        qkv: &qkv,
                        kv: &kv,
                        layer,
                        output: &mut output,
                    })
                });
            });
        }
    }
}

fn small_ops(c: &mut Criterion) {
    let mut cpu = Cpu::new(CpuOptions::default()).unwrap();
    let mut lanes = Lanes {
        history: cpu.allocate("history", 64).unwrap(),
        context: 64,
        sampled: cpu.allocate("sampled", 1).unwrap(),
    };
    let mut logits: Buffer<f32> = cpu.allocate("logits", VOCABULARY).unwrap();
    logits.iter_mut().enumerate().for_each(|(i, x)| *x = (i * 7919 % 10007) as f32 * 1e-3);
    let mut samples = Samples {
        tokens: cpu.allocate("tokens", 1).unwrap(),
        logprobs: cpu.allocate("logprobs", 1).unwrap(),
        top_tokens: cpu.allocate("top_tokens", 20).unwrap(),
        top_logprobs: cpu.allocate("top_logprobs", 20).unwrap(),
    };
    let plain = SampleRow {
        temperature: 1.0,
        top_p: 1.0,
        repetition_penalty: 1.0,
        length: 5,
        ..SampleRow::default()
    };
    for (name, greedy, row) in [
        ("greedy", true, plain),
        ("temperature", false, plain),
        ("top-p 0.95", false, SampleRow { top_p: 0.95, ..plain }),
        ("top-k 40, top-p 0.95", false, SampleRow { top_k: 40, top_p: 0.95, ..plain }),
    ] {
        let mut batch = empty_batch(&cpu, 1, 1);
        batch.sample_rows[0] = row;
        measure(c, ("sample", name.to_owned()), (VOCABULARY as f64, None, "logits"), || {
            step(&mut cpu, |r| {
                r.sample(Sample {
                    rows: 1,
                    first: 0,
                    vocabulary: VOCABULARY,
                    greedy,
                    logprobs: false,
                    batch: &batch,
                    lanes: &mut lanes,
                    logits: &logits,
                    samples: &mut samples,
                })
            });
        });
    }
    let gain: Buffer<f32> = cpu.allocate("gain", HIDDEN).unwrap();
    let input: Buffer<f32> = cpu.allocate("input", HIDDEN).unwrap();
    let mut q = quantized(&cpu, 1, HIDDEN);
    measure(c, ("rms_norm_quantize", "1 row".to_owned()), (HIDDEN as f64, None, "values"), || {
        step(&mut cpu, |r| {
            r.rms_norm_quantize(RmsNormQuantize {
                rows: 1,
                width: HIDDEN,
                input: &input,
                norm: Some(Norm { gain: &gain, eps: 1e-5 }),
                quantized: &mut q,
                normed: None,
            })
        });
    });
}

criterion_group!(benches, products, heads, attention, small_ops);
criterion_main!(benches);
