//! The forward pass, and the executor that runs it: the one file that knows a layer.

use std::collections::VecDeque;

use super::activations::{Activations, Reserve};
use super::batch::{Batch, Purpose, StepOutput};
use super::config::ModelConfig;
use super::staging::Staging;
use super::weights::{Layer, WeightSource, Weights};
use crate::backend::ops::{
    Embed, Epilogue, GateNormQuantize, LmHead, Norm, PagedAttention, RmsNormQuantize, RopeAppendKv,
    Sample, Score, TernaryMatmul,
};
use crate::backend::{Backend, DeviceInfo, LogitUse, MAX_LOGPROBS, NONE, Record, Stats, StepKey};
use crate::error::{LoadError, RunError};

/// A model on a device, whatever the device: what the engine steps.
pub trait StepExecutor {
    /// The model's hyper-parameters.
    fn config(&self) -> &ModelConfig;
    /// What was reserved at load.
    fn reserve(&self) -> &Reserve;
    /// The device.
    fn device(&self) -> &DeviceInfo;
    /// What the device has done since it was opened, where that is counted.
    fn stats(&self) -> Option<Stats> {
        None
    }
    /// Enqueues a step. At most [`DeviceInfo::steps_ahead`] may be enqueued and not collected.
    fn submit(&mut self, batch: &Batch) -> Result<(), RunError>;
    /// Waits for the oldest step that was not collected.
    fn collect(&mut self) -> Result<StepOutput, RunError>;
    /// Steps enqueued and not collected.
    fn in_flight(&self) -> usize;
    /// Logits of the last step's last pass of the head, `rows × vocabulary`.
    fn read_logits(&mut self, rows: usize) -> Result<Vec<f32>, RunError>;
}

/// Owns a backend, a model's weights on it, and the memory of its steps.
pub struct Executor<B: Backend> {
    config: ModelConfig,
    reserve: Reserve,
    weights: Weights<B>,
    activations: Activations<B>,
    kv: B::KvCache,
    staging: Staging,
    in_flight: VecDeque<InFlight<B>>,
    // Last, so that it outlives what it allocated.
    backend: B,
}

/// A step that was enqueued: the copies to wait for.
struct InFlight<B: Backend> {
    rows: usize,
    purpose: Purpose,
    lanes: Vec<usize>,
    top: Vec<usize>,
    tokens: Option<B::Pending<u32>>,
    logprobs: Option<B::Pending<f32>>,
    top_tokens: Option<B::Pending<u32>>,
    top_logprobs: Option<B::Pending<f32>>,
    hidden: Option<B::Pending<f32>>,
    /// Where the step answers nothing: something to wait for.
    end: Option<B::Pending<u32>>,
}

impl<B: Backend> Executor<B> {
    /// Loads a model: reserves all memory that steps will need, packs the weights, and prepares
    /// the keys of decoding. `progress` hears how many of how many matrices are packed.
    pub fn load(
        mut backend: B,
        source: &dyn WeightSource,
        reserve: Reserve,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let config = source.config().clone();
        check_memory(backend.info(), &config, &reserve)?;
        let weights = Weights::load(&mut backend, source, progress)?;
        let kv = backend.allocate_kv(reserve.kv_layout(&config))?;
        let activations = Activations::allocate(&mut backend, &config, &reserve)?;
        let staging = Staging::new(&config, &reserve);
        let in_flight = VecDeque::with_capacity(backend.info().steps_ahead);
        let mut executor =
            Self { config, reserve, weights, activations, kv, staging, in_flight, backend };
        executor.prepare_decoding()?;
        Ok(executor)
    }

    /// Lets the backend prepare every decode key: one token per sequence, greedy and sampled.
    fn prepare_decoding(&mut self) -> Result<(), RunError> {
        let decode = |sequences, pages, logits| StepKey {
            tokens: sequences,
            sequences,
            queries: 1,
            pages,
            logit_rows: sequences,
            logits,
            hidden: false,
        };
        let mut keys = Vec::new();
        for logits in [LogitUse::Greedy, LogitUse::Sample] {
            for pages in self.distinct(self.reserve.max_pages(), |n| decode(1, n, logits)) {
                let of = |n| decode(n, pages.pages, logits);
                keys.extend(self.distinct(self.staging.most_sequences(), of));
            }
        }
        for key in keys {
            self.with_recording(&key, |backend, record| backend.prepare(&key, record))?;
        }
        Ok(())
    }

    /// The keys that steps of sizes 1 to `max` have.
    fn distinct(&self, max: usize, sizes: impl Fn(usize) -> StepKey) -> Vec<StepKey> {
        let round_up = |n| self.staging.round_up(sizes(n), &|size| self.backend.bucket(size));
        let mut keys: Vec<StepKey> = (1..=max).map(round_up).collect();
        keys.dedup();
        keys
    }

    fn with_recording(
        &mut self,
        key: &StepKey,
        run: impl FnOnce(&mut B, &mut crate::backend::RecordStep<'_, B>) -> Result<(), RunError>,
    ) -> Result<(), RunError> {
        let step = Step { config: &self.config, weights: &self.weights, key };
        let head_rows = self.reserve.logit_rows(&self.config);
        let (activations, kv) = (&mut self.activations, &mut self.kv);
        run(&mut self.backend, &mut |recorder: &mut B::Recorder<'_>| {
            step.record(recorder, activations, kv, head_rows)
        })
    }
}

impl<B: Backend> StepExecutor for Executor<B> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn reserve(&self) -> &Reserve {
        &self.reserve
    }

    fn device(&self) -> &DeviceInfo {
        self.backend.info()
    }

    fn stats(&self) -> Option<Stats> {
        self.backend.stats()
    }

    fn submit(&mut self, batch: &Batch) -> Result<(), RunError> {
        let most = self.backend.info().steps_ahead;
        if self.in_flight.len() >= most {
            return Err(RunError::Exhausted {
                what: "steps in flight",
                asked: self.in_flight.len() + 1,
                reserved: most,
            });
        }
        let backend = &mut self.backend;
        let key = self.staging.fill(batch, &|size| backend.bucket(size))?;
        self.staging.upload(backend, &mut self.activations.batch)?;
        self.with_recording(&key, |backend, record| backend.run(&key, record))?;

        let rows = self.staging.rows();
        let sampling = matches!(batch.purpose, Purpose::Sample { .. });
        let logprobs = matches!(key.logits, LogitUse::SampleLogprobs | LogitUse::Score);
        let alternatives = key.logits == LogitUse::SampleLogprobs && rows > 0;
        let (backend, samples) = (&mut self.backend, &self.activations.samples);
        let mut in_flight = InFlight {
            rows,
            purpose: batch.purpose,
            lanes: self.staging.row_lanes().to_vec(),
            top: self.staging.row_logprobs().to_vec(),
            tokens: None,
            logprobs: None,
            top_tokens: None,
            top_logprobs: None,
            hidden: None,
            end: None,
        };
        if sampling && rows > 0 {
            in_flight.tokens = Some(backend.fetch(&samples.tokens, rows)?);
        }
        if logprobs && rows > 0 {
            in_flight.logprobs = Some(backend.fetch(&samples.logprobs, rows)?);
        }
        if alternatives {
            in_flight.top_tokens = Some(backend.fetch(&samples.top_tokens, rows * MAX_LOGPROBS)?);
            in_flight.top_logprobs =
                Some(backend.fetch(&samples.top_logprobs, rows * MAX_LOGPROBS)?);
        }
        if batch.hidden && rows > 0 {
            let len = rows * self.config.hidden;
            in_flight.hidden = Some(backend.fetch(&self.activations.normed, len)?);
        }
        if rows == 0 && backend.info().asynchronous {
            in_flight.end = Some(backend.fetch(&samples.tokens, 1)?);
        }
        self.in_flight.push_back(in_flight);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, RunError> {
        let Some(step) = self.in_flight.pop_front() else {
            return Err(RunError::Exhausted { what: "steps to collect", asked: 1, reserved: 0 });
        };
        let mut output = StepOutput::default();
        if let Some(pending) = step.tokens {
            output.tokens = self.backend.wait(pending)?;
        }
        if let Some(pending) = step.logprobs {
            output.logprobs = self.backend.wait(pending)?;
        }
        if let (Some(tokens), Some(logprobs)) = (step.top_tokens, step.top_logprobs) {
            let tokens = self.backend.wait(tokens)?;
            let logprobs = self.backend.wait(logprobs)?;
            let pairs: Vec<(u32, f32)> = tokens.into_iter().zip(logprobs).collect();
            output.top = (pairs.chunks_exact(MAX_LOGPROBS).zip(&step.top))
                .map(|(row, &count)| row[..count].to_vec())
                .collect();
        }
        if let Some(pending) = step.end {
            self.backend.wait(pending)?;
        }
        if let Some(pending) = step.hidden {
            output.hidden = self.backend.wait(pending)?;
        }
        let sampling = matches!(step.purpose, Purpose::Sample { .. });
        let not_finite = |row: &usize| {
            (sampling && output.tokens[*row] == NONE)
                || output.logprobs.get(*row).is_some_and(|logprob| logprob.is_nan())
        };
        if let Some(row) = (0..step.rows).find(not_finite) {
            let request = format!("the sequence on lane {}", step.lanes[row]);
            return Err(RunError::NonFinite { request });
        }
        Ok(output)
    }

    fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn read_logits(&mut self, rows: usize) -> Result<Vec<f32>, RunError> {
        let reserved = self.reserve.logit_rows(&self.config);
        if rows > reserved {
            return Err(RunError::Exhausted { what: "rows of logits", asked: rows, reserved });
        }
        let logits = self.backend.read(&self.activations.logits, rows * self.config.vocabulary)?;
        if logits.iter().any(|x| !x.is_finite()) {
            return Err(RunError::NonFinite { request: "the last step".into() });
        }
        Ok(logits)
    }
}

/// What a step's recording depends on.
struct Step<'a, B: Backend> {
    config: &'a ModelConfig,
    weights: &'a Weights<B>,
    key: &'a StepKey,
}

impl<B: Backend> Step<'_, B> {
    /// The whole model: embedding, layers, head.
    fn record(
        &self,
        r: &mut B::Recorder<'_>,
        a: &mut Activations<B>,
        kv: &mut B::KvCache,
        head_rows: usize,
    ) -> Result<(), RunError> {
        r.embed(Embed {
            rows: self.key.tokens,
            batch: &a.batch,
            lanes: &mut a.lanes,
            table: &self.weights.embedding,
            scale: 1.0,
            output: &mut a.residual,
            width: self.config.hidden,
        })?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.attention(r, a, kv, index, layer)?;
            self.feed_forward(r, a, layer)?;
        }
        for first in (0..self.key.logit_rows).step_by(head_rows) {
            self.head(r, a, first, head_rows.min(self.key.logit_rows - first))?;
        }
        Ok(())
    }

    /// `residual += output(norm?(attention(rope(qkv(norm(residual))))))`.
    fn attention(
        &self,
        r: &mut B::Recorder<'_>,
        a: &mut Activations<B>,
        kv: &mut B::KvCache,
        index: usize,
        layer: &Layer<B>,
    ) -> Result<(), RunError> {
        let (rows, heads, hidden) = (self.key.tokens, self.config.heads, self.config.hidden);
        r.rms_norm_quantize(RmsNormQuantize {
            rows,
            width: hidden,
            input: &a.residual,
            norm: Some(self.norm(&layer.attention_norm)),
            quantized: &mut a.hidden,
            normed: None,
        })?;
        r.ternary_matmul(TernaryMatmul {
            rows,
            width: hidden,
            features: heads.qkv_width(),
            input: &a.hidden,
            weight: &layer.qkv,
            output: &mut a.qkv,
            stride: heads.qkv_width(),
            column: 0,
            epilogue: Epilogue::Store,
        })?;
        r.rope_append_kv(RopeAppendKv {
            rows,
            batch: &a.batch,
            heads,
            qkv: &mut a.qkv,
            cos: &a.rope_cos,
            sin: &a.rope_sin,
            query_norm: None,
            key_norm: None,
            kv,
            layer: index,
        })?;
        r.paged_attention(PagedAttention {
            rows,
            sequences: self.key.sequences,
            batch: &a.batch,
            heads,
            scale: 1.0 / (heads.dim as f32).sqrt(),
            qkv: &a.qkv,
            kv,
            layer: index,
            output: &mut a.attended,
        })?;
        r.rms_norm_quantize(RmsNormQuantize {
            rows,
            width: heads.output_width(),
            input: &a.attended,
            norm: layer.attention_sub_norm.as_ref().map(|gain| self.norm(gain)),
            quantized: &mut a.attended_quantized,
            normed: None,
        })?;
        r.ternary_matmul(TernaryMatmul {
            rows,
            width: heads.output_width(),
            features: hidden,
            input: &a.attended_quantized,
            weight: &layer.output,
            output: &mut a.residual,
            stride: hidden,
            column: 0,
            epilogue: Epilogue::Add,
        })
    }

    /// `residual += down(norm?(act(gate(x)) · up(x)))` with `x = norm(residual)`.
    fn feed_forward(
        &self,
        r: &mut B::Recorder<'_>,
        a: &mut Activations<B>,
        layer: &Layer<B>,
    ) -> Result<(), RunError> {
        let (rows, hidden, ffn) = (self.key.tokens, self.config.hidden, self.config.ffn);
        r.rms_norm_quantize(RmsNormQuantize {
            rows,
            width: hidden,
            input: &a.residual,
            norm: Some(self.norm(&layer.ffn_norm)),
            quantized: &mut a.hidden,
            normed: None,
        })?;
        r.ternary_matmul(TernaryMatmul {
            rows,
            width: hidden,
            features: 2 * ffn,
            input: &a.hidden,
            weight: &layer.gate_up,
            output: &mut a.gate_up,
            stride: 2 * ffn,
            column: 0,
            epilogue: Epilogue::Store,
        })?;
        r.gate_norm_quantize(GateNormQuantize {
            rows,
            width: ffn,
            gate_up: &a.gate_up,
            activation: self.config.activation,
            norm: layer.ffn_sub_norm.as_ref().map(|gain| self.norm(gain)),
            quantized: &mut a.gated,
            normed: None,
        })?;
        r.ternary_matmul(TernaryMatmul {
            rows,
            width: ffn,
            features: hidden,
            input: &a.gated,
            weight: &layer.down,
            output: &mut a.residual,
            stride: hidden,
            column: 0,
            epilogue: Epilogue::Add,
        })
    }

    /// One pass of the head, and what is done with its logits.
    fn head(
        &self,
        r: &mut B::Recorder<'_>,
        a: &mut Activations<B>,
        first: usize,
        rows: usize,
    ) -> Result<(), RunError> {
        let vocabulary = self.config.vocabulary;
        r.lm_head(LmHead {
            rows,
            first,
            width: self.config.hidden,
            vocabulary,
            batch: &a.batch,
            input: &a.residual,
            norm: self.norm(&self.weights.final_norm),
            table: self.weights.head.as_ref().unwrap_or(&self.weights.embedding),
            normed: &mut a.normed,
            logits: &mut a.logits,
        })?;
        match self.key.logits {
            LogitUse::Keep => Ok(()),
            LogitUse::Score => r.score(Score {
                rows,
                first,
                vocabulary,
                batch: &a.batch,
                logits: &a.logits,
                samples: &mut a.samples,
            }),
            LogitUse::Greedy | LogitUse::Sample | LogitUse::SampleLogprobs => r.sample(Sample {
                rows,
                first,
                vocabulary,
                greedy: self.key.logits == LogitUse::Greedy,
                logprobs: self.key.logits == LogitUse::SampleLogprobs,
                batch: &a.batch,
                lanes: &mut a.lanes,
                logits: &a.logits,
                samples: &mut a.samples,
            }),
        }
    }

    fn norm<'n>(&self, gain: &'n B::Buffer<f32>) -> Norm<'n, B> {
        Norm { gain, eps: self.config.rms_eps }
    }
}

/// Refuses a model that cannot fit, with the arithmetic, before anything is reserved.
pub(super) fn check_memory(
    device: &DeviceInfo,
    config: &ModelConfig,
    reserve: &Reserve,
) -> Result<(), LoadError> {
    const MB: f64 = 1e6;
    // 2 bits a weight; padding of rows adds a few per cent at most.
    let ternary = config.ternary_parameters() / 4;
    let kv = reserve.kv_layout(config).bytes();
    let activations = reserve.activation_bytes(config);
    // A device of its own also holds the tables, at 16 bits an element or more; the CPU reads them
    // where their file is mapped.
    let tables = if config.tied_head { 2 } else { 4 } * config.embedding_parameters();
    let tables = Some(tables).filter(|_| device.asynchronous);
    let needed = kv
        .zip(activations)
        .and_then(|(kv, activations)| (kv as u64).checked_add(activations as u64))
        .and_then(|sum| sum.checked_add(ternary))
        .and_then(|sum| sum.checked_add(tables.unwrap_or(0)));
    if let (Some(needed), Some(memory)) = (needed, device.memory) {
        if needed <= memory {
            return Ok(());
        }
    } else if needed.is_some() {
        return Ok(());
    }
    let show = |bytes: Option<usize>| {
        bytes.map_or("more than 2^64 B".into(), |b| format!("{:.0} MB", b as f64 / MB))
    };
    let tables = tables.map_or(String::new(), |bytes| {
        format!(" + embedding and head {:.0} MB or more", bytes as f64 / MB)
    });
    let available =
        device.memory.map_or("unknown".into(), |memory| format!("{:.0} MB", memory as f64 / MB));
    Err(LoadError::OutOfMemory {
        device: device.name.clone(),
        arithmetic: format!(
            "ternary weights {:.0} MB{tables} + KV cache for {} tokens {} + activations {}; available {}; \
             a shorter --context makes the KV cache smaller",
            ternary as f64 / MB,
            reserve.kv_pages * crate::backend::PAGE_TOKENS,
            show(kv),
            show(activations),
            available,
        ),
    })
}
