//! How close the kernels of a GPU come to its limits, at the shapes of BitNet b1.58 2B4T:
//!
//! ```text
//! cargo bench --bench wgpu -- [--device wgpu:0] [--quick] [--json]
//! ```
//!
//! Each line is a step of many dispatches of one kind, whose weights rotate over more layers than
//! caches hold, divided by their number: the time of a dispatch among its like, with the gaps
//! between dependent ones. Rates count what must be read from memory once; the share is that of the
//! rate at which the device copies.

use std::time::Instant;

use trine::backend::ops::{
    Activation, Epilogue, GateNormQuantize, Norm, Quantized, RmsNormQuantize, TernaryMatmul,
    allocate_quantized,
};
use trine::backend::wgpu::{Buffer, Gpu, GpuOptions, Recorder, TernaryMatrix, Wgpu, WgpuOptions};
use trine::backend::{Backend, LogitUse, Record, StepKey};
use trine::error::RunError;
use trine::ternary::TernaryRows;

const HIDDEN: usize = 2560;
const FFN: usize = 6912;
/// Name, width and features of a layer's matrices.
const LAYER: [(&str, usize, usize); 4] = [
    ("qkv", HIDDEN, 3840),
    ("output", HIDDEN, HIDDEN),
    ("gate and up", HIDDEN, 2 * FFN),
    ("down", FFN, HIDDEN),
];

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

struct Bench {
    device: Wgpu,
    copy: f64,
    layers: usize,
    repetitions: usize,
    json: bool,
    key: usize,
}

impl Bench {
    /// Times a step and prints what each of its `count` dispatches took; `bytes` is what one of
    /// them must read, `products` the ternary products in it.
    fn time(
        &mut self,
        name: &str,
        (rows, count): (usize, usize),
        (bytes, products): (usize, usize),
        probe: &Buffer<f32>,
        mut record: impl FnMut(&mut Recorder<'_>) -> Result<(), RunError>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        // A key of its own for each step, so that nothing else is replayed.
        self.key += 1;
        let key = StepKey {
            tokens: self.key,
            sequences: 0,
            queries: 0,
            pages: 0,
            logit_rows: 1,
            logits: LogitUse::Keep,
            hidden: false,
        };
        self.device.prepare(&key, &mut |recorder| record(recorder))?;
        let mut seconds = Vec::new();
        for repetition in 0..self.repetitions + 1 {
            let started = Instant::now();
            self.device.run(&key, &mut |recorder| record(recorder))?;
            self.device.read(probe, 1)?;
            // The first one compiles and makes clocks rise.
            if repetition > 0 {
                seconds.push(started.elapsed().as_secs_f64() / count as f64);
            }
        }
        seconds.sort_by(f64::total_cmp);
        let median = seconds[seconds.len() / 2];
        let (rate, share) = (bytes as f64 / median, bytes as f64 / median / self.copy);
        if self.json {
            println!(
                "{}",
                serde_json::json!({
                    "op": name, "rows": rows, "microseconds": median * 1e6,
                    "bytes": bytes, "bytes_per_second": rate, "copy_share": share,
                    "products_per_second": products as f64 * rows as f64 / median,
                })
            );
        } else {
            println!(
                "{name:32} {rows:4} rows {:10.2} µs {:8.1} GB/s {:5.1} % {:8.2} T products/s",
                median * 1e6,
                rate / 1e9,
                share * 100.0,
                products as f64 * rows as f64 / median / 1e12,
            );
        }
        Ok(())
    }

    /// The matrices of one kind, one for each layer.
    fn matrices(
        &self,
        width: usize,
        features: usize,
    ) -> Result<Vec<TernaryMatrix>, Box<dyn std::error::Error>> {
        let codes = AnyCodes(width, features);
        (0..self.layers).map(|_| Ok(self.device.pack_ternary(&[&codes])?)).collect()
    }

    fn floats(&mut self, len: usize) -> Result<Buffer<f32>, Box<dyn std::error::Error>> {
        let mut buffer = self.device.allocate("bench", len)?;
        let values: Vec<f32> = (0..len).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        self.device.write(&mut buffer, &values)?;
        Ok(buffer)
    }

    fn run(&mut self, all_rows: &[usize]) -> Result<(), Box<dyn std::error::Error>> {
        let most = *all_rows.iter().max().unwrap_or(&1);
        let gain = self.floats(FFN)?;
        let mut input = self.floats(most * FFN)?;
        let mut output = self.floats(most * 2 * FFN)?;
        for (name, width, features) in LAYER {
            let weights = self.matrices(width, features)?;
            let mut quantized = allocate_quantized(&self.device, "bench", most, width)?;
            let (bytes, products) = (width * features / 4, width * features);
            for &rows in all_rows {
                let count = weights.len();
                let name = format!("{name} {features}×{width}");
                self.time(&name, (rows, count), (bytes, products), &input, |r| {
                    weights.iter().try_for_each(|weight| {
                        product(r, rows, (width, features), &quantized, weight, &mut output)
                    })
                })?;
                let fused = format!("{name} with norm");
                self.time(&fused, (rows, count), (bytes, products), &input, |r| {
                    weights.iter().try_for_each(|weight| {
                        norm(r, rows, width, &input, &gain, &mut quantized)?;
                        product(r, rows, (width, features), &quantized, weight, &mut output)
                    })
                })?;
            }
        }
        let mut quantized = allocate_quantized(&self.device, "bench", most, FFN)?;
        let count = 4 * self.layers;
        for &rows in all_rows {
            let bytes = rows * FFN * 8;
            self.time("gate_norm_quantize 6912", (rows, count), (bytes, 0), &input, |r| {
                (0..count).try_for_each(|_| {
                    r.gate_norm_quantize(GateNormQuantize {
                        rows,
                        width: FFN,
                        gate_up: &output,
                        activation: Activation::Relu2,
                        norm: Some(Norm { gain: &gain, eps: 1e-5 }),
                        quantized: &mut quantized,
                        normed: None,
                    })
                })
            })?;
        }
        // Something small that depends on what was before it: the price of a dispatch.
        self.time("rms_norm_quantize 256", (1, count), (1024, 0), &input, |r| {
            (0..count).try_for_each(|_| norm(r, 1, 256, &input, &gain, &mut quantized))
        })?;
        let zeros = vec![0.0; 256];
        self.device.write(&mut input, &zeros)?;
        Ok(())
    }
}

fn norm(
    r: &mut Recorder<'_>,
    rows: usize,
    width: usize,
    input: &Buffer<f32>,
    gain: &Buffer<f32>,
    quantized: &mut Quantized<Wgpu>,
) -> Result<(), RunError> {
    let norm = Some(Norm { gain, eps: 1e-5 });
    r.rms_norm_quantize(RmsNormQuantize { rows, width, input, norm, quantized, normed: None })
}

fn product(
    r: &mut Recorder<'_>,
    rows: usize,
    (width, features): (usize, usize),
    input: &Quantized<Wgpu>,
    weight: &TernaryMatrix,
    output: &mut Buffer<f32>,
) -> Result<(), RunError> {
    let (stride, column, epilogue) = (features, 0, Epilogue::Store);
    r.ternary_matmul(TernaryMatmul {
        rows,
        width,
        features,
        input,
        weight,
        output,
        stride,
        column,
        epilogue,
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let device = arguments.iter().position(|argument| argument == "--device");
    let device = device.and_then(|at| arguments.get(at + 1));
    let which = device.map(|device| device.trim_start_matches("wgpu").trim_start_matches(':'));
    let gpu = match Gpu::open(which.filter(|which| !which.is_empty()), GpuOptions::default()) {
        Ok(gpu) => gpu,
        // `cargo test` and `cargo bench` run every bench, on machines without a GPU too.
        Err(error) if device.is_none() => {
            eprintln!("nothing to measure: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    if gpu.adapter().is_software() && device.is_none() {
        eprintln!("nothing to measure: {} is named with --device only", gpu.description());
        return Ok(());
    }
    let copy = gpu.copy_bandwidth()?;
    eprintln!("{}: copies {:.1} GB/s (read and written)", gpu.description(), copy / 1e9);
    let (layers, repetitions) = if has("--quick") { (2, 2) } else { (30, 20) };
    let device = Wgpu::new(&gpu, WgpuOptions::default());
    let mut bench = Bench { device, copy, layers, repetitions, json: has("--json"), key: 0 };
    bench.run(if has("--quick") { &[1, 64] } else { &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512] })
}
