//! Every op of a layer and of the head at the shapes of BitNet b1.58 2B4T, on any device that keeps
//! recordings.
//!
//! Each line is a step of many ops of one kind, whose weights rotate over more memory than caches
//! hold, run several times without waiting in between and divided by their number: the time of an
//! op among its like, with the gaps between dependent ones. Rates count what must be read from
//! memory once; the share is that of the rate at which the device copies.

use std::time::Instant;

use serde_json::json;
use trine::backend::ops::{
    Embed, Epilogue, GateNormQuantize, LmHead, Norm, PagedAttention, Quantized, RmsNormQuantize,
    RopeAppendKv, Sample, Score, TernaryMatmul, allocate_quantized,
};
use trine::backend::{
    Backend, KvLayout, KvType, LogitUse, PAGE_TOKENS, Record, RecordStep, StepKey,
};
use trine::checkpoint::synthetic::{SyntheticModel, published};
use trine::error::RunError;
use trine::model::activations::{Activations, Reserve};
use trine::model::config::ModelConfig;
use trine::model::weights::WeightSource;
use trine::ternary::TernaryRows;

use super::{Failure, line, median, print};

/// Bytes that weights rotate over: several times the L2 cache of any GPU.
const COLD_BYTES: usize = 256 << 20;

/// Bytes that the KV cache may take.
const KV_BYTES: usize = 4 << 30;

/// Runs whose time is looked at, beyond one that pays for starting and waiting.
const REPLAYS: usize = 4;

/// Lengths that attention is measured at.
const CONTEXTS: [usize; 3] = [128, 1024, 4096];

/// Rows up to which each is a sequence of its own; more are a prompt.
const SEQUENCES: usize = 256;

/// A matrix of any codes: pieces of one random row, from another start in each.
struct AnyCodes {
    cols: usize,
    rows: usize,
    codes: Vec<u8>,
}

impl AnyCodes {
    fn new(cols: usize, rows: usize) -> Self {
        let mut state = 1u32;
        let codes = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (((state >> 24) * 3) >> 8) as u8
        });
        Self { cols, rows, codes: codes.take(cols + 4096).collect() }
    }
}

impl TernaryRows for AnyCodes {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn scale(&self) -> f32 {
        1.0
    }
    fn read_codes(&self, row: usize, codes: &mut [u8]) {
        let start = row * 1999 % 4096;
        codes.copy_from_slice(&self.codes[start..start + self.cols]);
    }
}

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

    /// The products, alone and with the norm in front of them.
    fn matrices(&mut self) -> Result<(), Failure> {
        let config = &self.plan.config;
        let (hidden, ffn, heads) = (config.hidden, config.ffn, config.heads);
        let most = self.plan.rows.iter().copied().max().unwrap_or(1);
        let widest = hidden.max(ffn).max(heads.output_width());
        let gain = self.floats(widest)?;
        let input = self.floats(most * widest)?;
        let mut output = self.floats(most * 2 * ffn.max(heads.qkv_width()))?;
        for (name, width, features) in [
            ("qkv", hidden, heads.qkv_width()),
            ("output", heads.output_width(), hidden),
            ("gate and up", hidden, 2 * ffn),
            ("down", ffn, hidden),
        ] {
            let name = format!("{name} {features}×{width}");
            if !self.wants(&name) {
                continue;
            }
            let bytes = width * features / 4;
            let count = self.plan.cold_bytes.div_ceil(bytes).max(config.layers);
            let codes = AnyCodes::new(width, features);
            let weights: Result<Vec<B::TernaryMatrix>, _> =
                (0..count).map(|_| self.device.pack_ternary(&[&codes])).collect();
            let weights = weights?;
            let mut quantized = allocate_quantized(&self.device, "bench", most, width)?;
            for &rows in &self.plan.rows {
                let op =
                    |name| Op { products: width * features, ..Op::new(name, rows, count, bytes) };
                let shape = (rows, width, features);
                self.time(op(&name), &input, &mut |r| {
                    weights.iter().try_for_each(|w| product(r, shape, &quantized, w, &mut output))
                })?;
                let fused = format!("{name} with norm");
                self.time(op(&fused), &input, &mut |r| {
                    weights.iter().try_for_each(|weight| {
                        norm(r, rows, width, &input, Some(&gain), &mut quantized)?;
                        product(r, shape, &quantized, weight, &mut output)
                    })
                })?;
            }
        }
        Ok(())
    }

    /// Attention, the small ops, the head, sampling.
    fn rest(&mut self) -> Result<(), Failure> {
        let config = &self.plan.config.clone();
        let (hidden, ffn, heads) = (config.hidden, config.ffn, config.heads);
        let most = self.plan.rows.iter().copied().max().unwrap_or(1);
        let sequences = most.min(SEQUENCES);
        let position_bytes = 2 * heads.kv * heads.dim * KvType::F16.size();
        let budget = KV_BYTES / (config.layers * position_bytes * PAGE_TOKENS);
        let longest = CONTEXTS[2].max(most);
        let reserve = Reserve {
            context: longest,
            sequences,
            step_tokens: most,
            kv_pages: budget.min(sequences * longest.div_ceil(PAGE_TOKENS)),
            kv_type: KvType::F16,
        };
        let layout: KvLayout = reserve.kv_layout(config);
        let source = SyntheticModel::new(config.clone(), 1)?;
        let table = self.device.load_table(source.embedding()?)?;
        let mut kv = self.device.allocate_kv(layout)?;
        let mut a = Activations::allocate(&mut self.device, config, &reserve)?;
        let gain = self.floats(hidden.max(ffn))?;
        let probe = self.floats(1)?;
        let count = 4 * config.layers;
        let with = |gain| Norm::<B> { gain, eps: 1e-5 };
        for &rows in &self.plan.rows.clone() {
            let prompt = rows > SEQUENCES;
            for context in CONTEXTS {
                // A prompt is as long as it is.
                let context = if prompt { rows } else { context };
                let each = context.div_ceil(PAGE_TOKENS);
                let members = if prompt { 1 } else { rows };
                if members * each > layout.pages {
                    continue;
                }
                self.write_batch(&mut a, rows, context, members)?;
                let op = |name, bytes| Op {
                    context,
                    queries: if prompt { rows } else { 1 },
                    ..Op::new(name, rows, config.layers, bytes)
                };
                let scale = 1.0 / (heads.dim as f32).sqrt();
                let bytes = members * context * position_bytes;
                self.time(op("paged_attention", bytes), &probe, &mut |r| {
                    (0..config.layers).try_for_each(|layer| {
                        r.paged_attention(PagedAttention {
                            rows,
                            sequences: members,
                            batch: &a.batch,
                            heads,
                            scale,
                            qkv: &a.qkv,
                            kv: &kv,
                            layer,
                            output: &mut a.attended,
                        })
                    })
                })?;
                let appended = rows * (4 * heads.qkv_width() + position_bytes);
                self.time(
                    op("rope_append_kv and paged_attention", bytes + appended),
                    &probe,
                    &mut |r| {
                        (0..config.layers).try_for_each(|layer| {
                            r.rope_append_kv(RopeAppendKv {
                                rows,
                                batch: &a.batch,
                                heads,
                                qkv: &mut a.qkv,
                                cos: &a.rope_cos,
                                sin: &a.rope_sin,
                                query_norm: None,
                                key_norm: None,
                                kv: &mut kv,
                                layer,
                            })?;
                            r.paged_attention(PagedAttention {
                                rows,
                                sequences: members,
                                batch: &a.batch,
                                heads,
                                scale,
                                qkv: &a.qkv,
                                kv: &kv,
                                layer,
                                output: &mut a.attended,
                            })
                        })
                    },
                )?;
                if prompt {
                    break;
                }
            }
            self.time(
                Op::new("rms_norm_quantize", rows, count, rows * hidden * 4),
                &probe,
                &mut |r| {
                    (0..count).try_for_each(|_| {
                        norm(r, rows, hidden, &a.residual, Some(&gain), &mut a.hidden)
                    })
                },
            )?;
            self.time(
                Op::new("gate_norm_quantize", rows, count, rows * ffn * 8),
                &probe,
                &mut |r| {
                    (0..count).try_for_each(|_| {
                        r.gate_norm_quantize(GateNormQuantize {
                            rows,
                            width: ffn,
                            gate_up: &a.gate_up,
                            activation: config.activation,
                            norm: Some(with(&gain)),
                            quantized: &mut a.gated,
                            normed: None,
                        })
                    })
                },
            )?;
            self.time(Op::new("embed", rows, count, rows * hidden * 2), &probe, &mut |r| {
                (0..count).try_for_each(|_| {
                    r.embed(Embed {
                        rows,
                        batch: &a.batch,
                        lanes: &mut a.lanes,
                        table: &table,
                        scale: 1.0,
                        output: &mut a.residual,
                        width: hidden,
                    })
                })
            })?;
            // One pass of the head has no more rows than this.
            let pass = rows.min(reserve.logit_rows(config));
            if pass < rows {
                continue;
            }
            let vocabulary = config.vocabulary;
            let count = 8;
            self.time(
                Op::new("lm_head", rows, count, vocabulary * hidden * 2),
                &probe,
                &mut |r| {
                    (0..count).try_for_each(|_| {
                        r.lm_head(LmHead {
                            rows,
                            first: 0,
                            width: hidden,
                            vocabulary,
                            batch: &a.batch,
                            input: &a.residual,
                            norm: with(&gain),
                            table: &table,
                            normed: &mut a.normed,
                            logits: &mut a.logits,
                        })
                    })
                },
            )?;
            let bytes = rows * vocabulary * 4;
            for (name, greedy, logprobs) in [
                ("sample, greedy", true, false),
                ("sample, with options", false, false),
                ("sample, with log-probabilities", false, true),
            ] {
                self.time(Op::new(name, rows, count, bytes), &probe, &mut |r| {
                    (0..count).try_for_each(|_| {
                        r.sample(Sample {
                            rows,
                            first: 0,
                            vocabulary,
                            greedy,
                            logprobs,
                            batch: &a.batch,
                            lanes: &mut a.lanes,
                            logits: &a.logits,
                            samples: &mut a.samples,
                        })
                    })
                })?;
            }
            self.time(Op::new("score", rows, count, bytes), &probe, &mut |r| {
                (0..count).try_for_each(|_| {
                    r.score(Score {
                        rows,
                        first: 0,
                        vocabulary,
                        batch: &a.batch,
                        logits: &a.logits,
                        samples: &mut a.samples,
                    })
                })
            })?;
        }
        // Something small that depends on what was before it: the price of a launch.
        let mut quantized = allocate_quantized(&self.device, "bench", 1, 256)?;
        self.time(Op::new("a launch (rms_norm_quantize 256)", 1, count, 1024), &probe, &mut |r| {
            (0..count).try_for_each(|_| norm(r, 1, 256, &a.residual, Some(&gain), &mut quantized))
        })
    }

    /// A step in which `members` sequences of `context` tokens bring `rows` tokens between them.
    fn write_batch(
        &mut self,
        a: &mut Activations<B>,
        rows: usize,
        context: usize,
        members: usize,
    ) -> Result<(), RunError> {
        let each = context.div_ceil(PAGE_TOKENS);
        let queries = rows / members;
        let first = context - queries;
        let of = |f: &dyn Fn(usize) -> usize, len: usize| -> Vec<u32> {
            (0..len).map(|index| f(index) as u32).collect()
        };
        let page = |member: usize, index: usize| member * each + index.min(each - 1);
        let position = |row: usize| first + row % queries;
        let slot = |row: usize| {
            let at = position(row);
            page(row / queries, at / PAGE_TOKENS) * PAGE_TOKENS + at % PAGE_TOKENS
        };
        let max_pages = a.batch.max_pages;
        let (device, batch) = (&mut self.device, &mut a.batch);
        device.write(&mut batch.tokens, &of(&|row| row * 7 % 400, rows))?;
        device.write(&mut batch.positions, &of(&position, rows))?;
        device.write(&mut batch.sequences, &of(&|row| row / queries, rows))?;
        device.write(&mut batch.slots, &of(&slot, rows))?;
        device.write(&mut batch.query_starts, &of(&|member| member * queries, members + 1))?;
        device.write(&mut batch.kv_lens, &of(&|_| context, members))?;
        let table = of(&|entry| page(entry / max_pages, entry % max_pages), members * max_pages);
        device.write(&mut batch.page_table, &table)?;
        device.write(&mut batch.lanes, &of(&|member| member, members))?;
        device.write(&mut batch.logit_rows, &of(&|row| row, rows))?;
        device.write(&mut batch.targets, &of(&|row| row % 400, rows))?;
        let options = |lane| trine::backend::ops::SampleRow {
            lane: lane as u32,
            length: context as u32,
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            repetition_penalty: 1.0,
            seed_low: lane as u32,
            logprobs: 5,
            ..Default::default()
        };
        let options: Vec<_> = (0..members).map(options).collect();
        device.write(&mut batch.sample_rows, &options)
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

fn product<B: Backend>(
    r: &mut B::Recorder<'_>,
    (rows, width, features): (usize, usize, usize),
    input: &Quantized<B>,
    weight: &B::TernaryMatrix,
    output: &mut B::Buffer<f32>,
) -> Result<(), RunError> {
    r.ternary_matmul(TernaryMatmul {
        rows,
        width,
        features,
        input,
        weight,
        output,
        stride: features,
        column: 0,
        epilogue: Epilogue::Store,
    })
}

/// Measures every op on a device that copies `copy` bytes per second.
pub(crate) fn run<B: Backend>(device: B, copy: f64, plan: &Plan) -> Result<(), Failure> {
    let mut bench = Bench { device, copy, plan, key: 0 };
    bench.matrices()?;
    bench.rest()
}
