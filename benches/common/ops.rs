//! Every op of a layer and of the head at the shapes of BitNet b1.58 2B4T, on any device that keeps
//! recordings.
//!
//! Each line is a step of many ops of one kind, whose weights rotate over more memory than caches
//! hold, run several times without waiting in between and divided by their number: the time of an
//! op among its like, with the gaps between dependent ones. Rates count what must be read from
//! memory once; the share is that of the rate at which the device copies.

mod layer;
mod matrices;

use std::time::Instant;

use serde_json::json;
use trine::backend::ops::{Norm, Quantized, RmsNormQuantize};
use trine::backend::{Backend, LogitUse, PAGE_TOKENS, Record, RecordStep, StepKey};
use trine::checkpoint::synthetic::published;
use trine::error::RunError;
use trine::model::config::ModelConfig;

use super::{Failure, line, median, print};

/// Bytes that weights rotate over: several times the L2 cache of any GPU.
const COLD_BYTES: usize = 256 << 20;

/// Runs whose time is looked at, beyond one that pays for starting and waiting.
const REPLAYS: usize = 4;

/// What is measured, and how.
pub(crate) struct Plan {
    pub(crate) rows: Vec<usize>,
    pub(crate) repetitions: usize,
    /// Bytes that weights rotate over.
    pub(crate) cold_bytes: usize,
    /// The shape; 2B4T but for what a quick run leaves out.
    config: ModelConfig,
    /// Only ops whose name holds this.
    pub(crate) only: Option<String>,
    pub(crate) json: bool,
}

impl Plan {
    /// `quick` shows in seconds, also on an imitated GPU, that it runs at all.
    pub(crate) fn new(quick: bool, rows: Vec<usize>) -> Result<Self, Failure> {
        let mut config = published("2b4t").ok_or("2b4t is published")?;
        let (mut repetitions, mut cold_bytes) = (20, COLD_BYTES);
        if quick {
            (config.layers, config.hidden, config.ffn, config.vocabulary) = (2, 256, 512, 500);
            config.heads = trine::backend::ops::Heads { query: 4, kv: 2, dim: 64 };
            (repetitions, cold_bytes) = (2, 0);
        }
        Ok(Self { rows, repetitions, cold_bytes, config, only: None, json: false })
    }
}

/// One measurement.
struct Op<'a> {
    name: &'a str,
    rows: usize,
    /// Ops of the step.
    count: usize,
    /// Bytes that one of them must read.
    bytes: usize,
    /// Ternary products of a row.
    products: usize,
    /// Tokens of a sequence, and the longest sequence.
    queries: usize,
    context: usize,
}

impl<'a> Op<'a> {
    fn new(name: &'a str, rows: usize, count: usize, bytes: usize) -> Self {
        Self { name, rows, count, bytes, products: 0, queries: 1, context: 0 }
    }
}

/// The device under measurement.
struct Bench<'a, B: Backend> {
    device: B,
    copy: f64,
    plan: &'a Plan,
    key: usize,
}

impl<B: Backend> Bench<'_, B> {
    fn wants(&self, name: &str) -> bool {
        self.plan.only.as_ref().is_none_or(|only| name.contains(only))
    }

    /// Times a step and prints what each of its ops took.
    fn time(
        &mut self,
        op: Op<'_>,
        probe: &B::Buffer<f32>,
        record: &mut RecordStep<'_, B>,
    ) -> Result<(), Failure> {
        if !self.wants(op.name) {
            return Ok(());
        }
        // A key of its own for each step, so that nothing else is replayed.
        self.key += 1;
        let key = StepKey {
            tokens: self.key,
            sequences: 0,
            queries: op.queries,
            pages: op.context.div_ceil(PAGE_TOKENS),
            logit_rows: op.rows,
            logits: LogitUse::Keep,
            hidden: false,
        };
        self.device.prepare(&key, record)?;
        let mut run = |replays: usize| -> Result<f64, RunError> {
            let started = Instant::now();
            for _ in 0..replays {
                self.device.run(&key, record)?;
            }
            self.device.read(probe, 1)?;
            Ok(started.elapsed().as_secs_f64())
        };
        // The first one makes clocks rise.
        run(1)?;
        let mut seconds = Vec::with_capacity(self.plan.repetitions);
        for _ in 0..self.plan.repetitions {
            let one = run(1)?;
            seconds.push((run(1 + REPLAYS)? - one) / (REPLAYS * op.count) as f64);
        }
        let time = median(&seconds);
        let rate = op.bytes as f64 / time;
        let products = (op.products * op.rows) as f64 / time;
        if self.plan.json {
            print(line(
                "op",
                &self.device.info().name,
                json!({
                    "op": op.name,
                    "rows": op.rows,
                    "context": Some(op.context).filter(|&context| context > 0),
                    "microseconds": time * 1e6,
                    "bytes": op.bytes,
                    "bytes_per_second": rate,
                    "copy_bytes_per_second": self.copy,
                    "copy_share": rate / self.copy,
                    "products_per_second": products,
                }),
            ));
        } else {
            println!(
                "{:34} {:4} rows {:10.2} µs {:8.1} GB/s {:6.1} % {:8.2} T products/s",
                op.name,
                op.rows,
                time * 1e6,
                rate / 1e9,
                rate / self.copy * 100.0,
                products / 1e12,
            );
        }
        Ok(())
    }

    fn floats(&mut self, len: usize) -> Result<B::Buffer<f32>, Failure> {
        let mut buffer = self.device.allocate("bench", len)?;
        let values: Vec<f32> = (0..len).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        self.device.write(&mut buffer, &values)?;
        Ok(buffer)
    }
}

fn norm<B: Backend>(
    r: &mut B::Recorder<'_>,
    rows: usize,
    width: usize,
    input: &B::Buffer<f32>,
    gain: Option<&B::Buffer<f32>>,
    quantized: &mut Quantized<B>,
) -> Result<(), RunError> {
    let norm = gain.map(|gain| Norm { gain, eps: 1e-5 });
    r.rms_norm_quantize(RmsNormQuantize { rows, width, input, norm, quantized, normed: None })
}

/// Measures every op on a device that copies `copy` bytes per second.
pub(crate) fn run<B: Backend>(device: B, copy: f64, plan: &Plan) -> Result<(), Failure> {
    let mut bench = Bench { device, copy, plan, key: 0 };
    bench.matrices()?;
    bench.rest()
}
