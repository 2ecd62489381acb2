//! The forward pass: the one file that knows a layer.

use super::activations::{Activations, AdapterRows};
use super::config::ModelConfig;
use super::weights::{Layer, Linear, Weights};
use crate::backend::ops::{
    Embed, Epilogue, GateNormQuantize, LmHead, LowRank, Norm, PagedAttention, Quantized, RmsNorm,
    RmsNormQuantize, RopeAppendKv, Sample, Score, TernaryMatmul,
};
use crate::backend::{Backend, LogitUse, Record, StepKey};
use crate::error::RunError;

/// What a step's recording depends on.
pub(super) struct Step<'a, B: Backend> {
    pub(super) config: &'a ModelConfig,
    pub(super) weights: &'a Weights<B>,
    pub(super) key: &'a StepKey,
}

impl<B: Backend> Step<'_, B> {
    /// The whole model: embedding, layers, head.
    pub(super) fn record(
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
            scale: self.config.embedding_scale(),
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

    /// `residual += norm?(output(norm?(attention(rope(norm?(qkv(norm(residual))))))))`.
    fn attention(
        &self,
        r: &mut B::Recorder<'_>,
        a: &mut Activations<B>,
        kv: &mut B::KvCache,
        index: usize,
        layer: &Layer<B>,
    ) -> Result<(), RunError> {
        let (rows, heads) = (self.key.tokens, self.config.heads);
        let window = self.config.window(index);
        let rope = a.local_rope.as_ref().filter(|_| window.is_some()).unwrap_or(&a.rope);
        self.project(
            r,
            Project {
                norm: &layer.attention_norm,
                linears: &layer.qkv,
                residual: &a.residual,
                normed: a.normed_hidden.as_mut(),
                quantized: &mut a.hidden,
                adapter: a.adapter.as_mut(),
                output: &mut a.qkv,
                stride: heads.qkv_width(),
            },
        )?;
        r.rope_append_kv(RopeAppendKv {
            rows,
            batch: &a.batch,
            heads,
            qkv: &mut a.qkv,
            cos: &rope.cos,
            sin: &rope.sin,
            query_norm: self.optional_norm(&layer.query_norm),
            key_norm: self.optional_norm(&layer.key_norm),
            kv,
            layer: index,
        })?;
        r.paged_attention(PagedAttention {
            rows,
            sequences: self.key.sequences,
            batch: &a.batch,
            heads,
            scale: self.config.attention_scale(),
            window,
            qkv: &a.qkv,
            kv,
            layer: index,
            output: &mut a.attended,
        })?;
        r.rms_norm_quantize(RmsNormQuantize {
            rows,
            width: heads.output_width(),
            input: &a.attended,
            norm: self.optional_norm(&layer.output.norm),
            quantized: &mut a.attended_quantized,
            normed: input_of(&layer.output, a.adapter.as_mut()).filter(|_| !self.norms_inside()),
        })?;
        self.add_to_residual(
            r,
            AddToResidual {
                linear: &layer.output,
                input: &a.attended_quantized,
                unquantized: Some(&a.attended).filter(|_| self.norms_inside()),
                norm: layer.post_attention_norm.as_ref(),
                unnormed: a.unnormed.as_mut(),
                adapter: a.adapter.as_mut(),
                residual: &mut a.residual,
            },
        )
    }

    /// `residual += norm?(down(norm?(act(gate(x)) · up(x))))` with `x = norm(residual)`.
    fn feed_forward(
        &self,
        r: &mut B::Recorder<'_>,
        a: &mut Activations<B>,
        layer: &Layer<B>,
    ) -> Result<(), RunError> {
        self.project(
            r,
            Project {
                norm: &layer.ffn_norm,
                linears: &layer.gate_up,
                residual: &a.residual,
                normed: a.normed_hidden.as_mut(),
                quantized: &mut a.hidden,
                adapter: a.adapter.as_mut(),
                output: &mut a.gate_up,
                stride: 2 * self.config.ffn,
            },
        )?;
        let (rows, width) = (self.key.tokens, self.config.ffn);
        let norm = self.optional_norm(&layer.down.norm);
        // Adapters read what the norm reads, which then is an op of its own.
        let apart = self.norms_inside() && !layer.down.adapters.is_empty();
        r.gate_norm_quantize(GateNormQuantize {
            rows,
            width,
            gate_up: &a.gate_up,
            activation: self.config.activation,
            norm: norm.filter(|_| !apart),
            quantized: &mut a.gated,
            normed: input_of(&layer.down, a.adapter.as_mut()),
        })?;
        if let Some(AdapterRows { input, .. }) = a.adapter.as_ref().filter(|_| apart) {
            let (norm, quantized) = (self.optional_norm(&layer.down.norm), &mut a.gated);
            let normed = None;
            r.rms_norm_quantize(RmsNormQuantize { rows, width, input, norm, quantized, normed })?;
        }
        self.add_to_residual(
            r,
            AddToResidual {
                linear: &layer.down,
                input: &a.gated,
                unquantized: None,
                norm: layer.post_ffn_norm.as_ref(),
                unnormed: a.unnormed.as_mut(),
                adapter: a.adapter.as_mut(),
                residual: &mut a.residual,
            },
        )
    }

    /// `output = linear(norm(residual))`, one quantised input for all that the linear is made of; in
    /// families that norm the input of each projection, `output = linear(norm'(norm(residual)))` of
    /// each linear into its own columns.
    fn project(&self, r: &mut B::Recorder<'_>, project: Project<'_, B>) -> Result<(), RunError> {
        let Project { norm, linears, residual, quantized, output, stride, .. } = project;
        let (mut normed, mut adapter) = (project.normed, project.adapter);
        let (rows, width) = (self.key.tokens, self.config.hidden);
        if let Some(normed) = normed.as_deref_mut() {
            let (input, norm) = (residual, self.norm(norm));
            let (gather, first) = (None, 0);
            let epilogue = Epilogue::Store;
            r.rms_norm(RmsNorm {
                rows,
                width,
                input,
                gather,
                first,
                norm,
                output: normed,
                epilogue,
            })?;
        }
        for linear in linears {
            let (input, gain) = match (&normed, &linear.norm) {
                (Some(normed), Some(own)) => (&**normed, own),
                _ => (residual, norm),
            };
            r.rms_norm_quantize(RmsNormQuantize {
                rows,
                width,
                input,
                norm: Some(self.norm(gain)),
                quantized,
                normed: input_of(linear, adapter.as_deref_mut()).filter(|_| normed.is_none()),
            })?;
            r.ternary_matmul(TernaryMatmul {
                rows,
                width,
                features: linear.features,
                input: quantized,
                weight: &linear.matrix,
                output,
                stride,
                column: linear.column,
                epilogue: Epilogue::Store,
            })?;
            self.adapt(r, linear, adapter.as_deref_mut(), normed.as_deref(), output, stride)?;
        }
        Ok(())
    }

    /// Whether each projection has a norm of its own. It is part of the layer that PEFT puts an adapter
    /// beside, so that the adapter reads what the norm reads; a norm between layers, such as the
    /// sub-norms of 2B4T, comes before the adapter.
    fn norms_inside(&self) -> bool {
        self.config.family.row().projection_norms
    }

    /// Adds what the adapters of a linear add; its input is `input`, or what is in `rows`.
    fn adapt(
        &self,
        r: &mut B::Recorder<'_>,
        linear: &Linear<B>,
        rows: Option<&mut AdapterRows<B>>,
        input: Option<&B::Buffer<f32>>,
        output: &mut B::Buffer<f32>,
        stride: usize,
    ) -> Result<(), RunError> {
        let Some(AdapterRows { input: own, inner }) = rows else { return Ok(()) };
        let input = input.unwrap_or(own);
        for adapter in &linear.adapters {
            r.low_rank(LowRank {
                rows: self.key.tokens,
                width: linear.width,
                rank: adapter.rank,
                features: adapter.features,
                input,
                down: &adapter.down,
                up: &adapter.up,
                inner,
                output,
                stride,
                column: adapter.column,
            })?;
        }
        Ok(())
    }

    /// `residual += linear(input)`, or `residual += norm(linear(input))`.
    fn add_to_residual(
        &self,
        r: &mut B::Recorder<'_>,
        add: AddToResidual<'_, B>,
    ) -> Result<(), RunError> {
        let AddToResidual { linear, input, unquantized, norm, unnormed, adapter, residual } = add;
        let (rows, hidden) = (self.key.tokens, self.config.hidden);
        let product = |r: &mut B::Recorder<'_>, output: &mut B::Buffer<f32>, epilogue| {
            r.ternary_matmul(TernaryMatmul {
                rows,
                width: linear.width,
                features: linear.features,
                input,
                weight: &linear.matrix,
                output,
                stride: hidden,
                column: 0,
                epilogue,
            })?;
            self.adapt(r, linear, adapter, unquantized, output, hidden)
        };
        let Some((gain, unnormed)) = norm.zip(unnormed) else {
            return product(r, residual, Epilogue::Add);
        };
        product(r, unnormed, Epilogue::Store)?;
        r.rms_norm(RmsNorm {
            rows,
            width: hidden,
            input: unnormed,
            gather: None,
            first: 0,
            norm: self.norm(gain),
            output: residual,
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
        let norm = self.norm(&self.weights.final_norm);
        if self.key.logits == LogitUse::Absent {
            return r.rms_norm(RmsNorm {
                rows,
                width: self.config.hidden,
                input: &a.residual,
                gather: Some(&a.batch.logit_rows),
                first,
                norm,
                output: &mut a.normed,
                epilogue: Epilogue::Store,
            });
        }
        r.lm_head(LmHead {
            rows,
            first,
            width: self.config.hidden,
            vocabulary,
            batch: &a.batch,
            input: &a.residual,
            norm,
            table: self.weights.head.as_ref().unwrap_or(&self.weights.embedding),
            normed: &mut a.normed,
            logits: &mut a.logits,
        })?;
        match self.key.logits {
            LogitUse::Keep | LogitUse::Absent => Ok(()),
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

    fn optional_norm<'n>(&self, gain: &'n Option<B::Buffer<f32>>) -> Option<Norm<'n, B>> {
        gain.as_ref().map(|gain| self.norm(gain))
    }
}

/// Where the input of a linear goes in f32: nowhere, unless it has adapters, which read it.
fn input_of<'r, B: Backend>(
    linear: &Linear<B>,
    rows: Option<&'r mut AdapterRows<B>>,
) -> Option<&'r mut B::Buffer<f32>> {
    rows.filter(|_| !linear.adapters.is_empty()).map(|rows| &mut rows.input)
}

/// Projections of the residual stream that write one row.
struct Project<'p, B: Backend> {
    /// Gain of the norm before all of them.
    norm: &'p B::Buffer<f32>,
    linears: &'p [Linear<B>],
    /// `[T, hidden]`.
    residual: &'p B::Buffer<f32>,
    /// `[T, hidden]`, where each linear has a norm of its own, which reads it.
    normed: Option<&'p mut B::Buffer<f32>>,
    /// `[T, hidden]`, each linear's input in turn.
    quantized: &'p mut Quantized<B>,
    /// What the adapters of the linears read and write.
    adapter: Option<&'p mut AdapterRows<B>>,
    /// `[T, stride]`.
    output: &'p mut B::Buffer<f32>,
    /// Features of all the linears.
    stride: usize,
}

/// A projection back to the residual stream.
struct AddToResidual<'p, B: Backend> {
    linear: &'p Linear<B>,
    /// Its input.
    input: &'p Quantized<B>,
    /// What its adapters read, where that is not what was put aside for them.
    unquantized: Option<&'p B::Buffer<f32>>,
    /// Gain of the norm of what it answers, in families that norm it.
    norm: Option<&'p B::Buffer<f32>>,
    /// `[T, hidden]` what it answers, where that is normed.
    unnormed: Option<&'p mut B::Buffer<f32>>,
    /// What the adapters of the linear read and write.
    adapter: Option<&'p mut AdapterRows<B>>,
    /// `[T, hidden]`.
    residual: &'p mut B::Buffer<f32>,
}
