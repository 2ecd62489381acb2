//! Every intermediate of a step, named, and sized once when the model loads.

use super::config::ModelConfig;
use super::weights::AdapterSizes;
use crate::backend::ops::{Batch, Lanes, Quantized, Samples, allocate_quantized};
use crate::backend::{Backend, KvLayout, KvType, MAX_LOGPROBS, PAGE_TOKENS, quantized_stride};
use crate::error::LoadError;

/// How much is reserved when a model loads; nothing is allocated per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserve {
    /// Tokens that a sequence may have.
    pub context: usize,
    /// Sequences that may live at once: lanes.
    pub sequences: usize,
    /// Tokens that a step may bring.
    pub step_tokens: usize,
    /// Pages of the KV cache.
    pub kv_pages: usize,
    /// Element type of the KV cache.
    pub kv_type: KvType,
}

/// Logit biases that a step may bring: OpenAI's limit of 300 per request, rounded up, for each
/// sequence.
pub const MAX_BIASES: usize = 512;

/// Bytes that the logits of one pass of the head may take, so that the buffer does not dwarf a
/// small model; at most 64 rows a pass.
const LOGIT_BYTES: usize = 16 << 20;

impl Reserve {
    /// Pages that one sequence may span.
    pub fn max_pages(&self) -> usize {
        self.context.div_ceil(PAGE_TOKENS)
    }

    /// Rows of the head's passes.
    pub fn logit_rows(&self, config: &ModelConfig) -> usize {
        (LOGIT_BYTES / (4 * config.vocabulary)).clamp(1, 64).min(self.step_tokens)
    }

    /// Shape of the KV cache.
    pub fn kv_layout(&self, config: &ModelConfig) -> KvLayout {
        KvLayout {
            layers: config.layers,
            pages: self.kv_pages,
            kv_heads: config.heads.kv,
            head_dim: config.heads.dim,
            kv_type: self.kv_type,
        }
    }

    /// The largest piece of memory that is reserved whole, and its bytes: what a device must be able
    /// to bind. Weights are not among them: they are split where they must be. `None` if beyond
    /// `usize`.
    pub fn largest_piece(&self, config: &ModelConfig) -> Option<(&'static str, usize)> {
        let floats = |rows: usize, width: usize| rows.checked_mul(width)?.checked_mul(4);
        let keys = self.kv_layout(config).bytes()? / (2 * config.layers);
        let pieces = [
            ("the keys of a layer", Some(keys)),
            ("gate and up of a step", floats(self.step_tokens, 2 * config.ffn)),
            ("queries, keys and values of a step", {
                floats(self.step_tokens, config.heads.qkv_width())
            }),
            ("logits", floats(self.logit_rows(config), config.vocabulary)),
            ("the sequences' tokens", floats(self.sequences, self.context)),
        ];
        let known: Option<Vec<_>> =
            pieces.into_iter().map(|(name, bytes)| Some((name, bytes?))).collect();
        known?.into_iter().max_by_key(|&(_, bytes)| bytes)
    }

    /// Bytes of all activations, for the arithmetic of a refusal. `None` if beyond `usize`.
    pub fn activation_bytes(&self, config: &ModelConfig) -> Option<usize> {
        let attention = config.heads.output_width();
        let row = config.family.row();
        let more = usize::from(row.projection_norms) + usize::from(row.post_norms);
        let per_token = 4
            * ((1 + more) * config.hidden + config.heads.qkv_width() + attention + 2 * config.ffn)
            + quantized_stride(config.hidden)
            + quantized_stride(attention)
            + quantized_stride(config.ffn);
        let rows = self.logit_rows(config);
        let logits = rows.checked_mul(4 * (config.vocabulary + config.hidden))?;
        let history = self.sequences.checked_mul(4 * self.context)?;
        let tables = 1 + usize::from(config.attention.local.is_some());
        let rope = self.context.checked_mul(4 * tables * config.heads.dim)?;
        let table = self.sequences.checked_mul(4 * self.max_pages())?;
        [logits, history, rope, table]
            .into_iter()
            .try_fold(self.step_tokens.checked_mul(per_token)?, usize::checked_add)
    }
}

/// Rows of [`LowRank`](crate::backend::ops::LowRank), of one projection at a time.
pub struct AdapterRows<B: Backend> {
    /// `[T, width]` the projection's input before quantisation.
    pub input: B::Buffer<f32>,
    /// `[T, rank]` what is between the two products.
    pub inner: B::Buffer<f32>,
}

/// The buffers that a step reads and writes.
pub struct Activations<B: Backend> {
    /// The step's inputs.
    pub batch: Batch<B>,
    /// What outlives a step.
    pub lanes: Lanes<B>,
    /// `[T, hidden]` the residual stream.
    pub residual: B::Buffer<f32>,
    /// `[T, hidden]` the normed residual stream, in families that norm it again for each projection.
    pub normed_hidden: Option<B::Buffer<f32>>,
    /// `[T, hidden]` what attention or the feed-forward network answers, in families that norm it
    /// before it is added to the residual stream.
    pub unnormed: Option<B::Buffer<f32>>,
    /// `[T, hidden]` quantised, the input of qkv and of gate and up.
    pub hidden: Quantized<B>,
    /// `[T, qkv_width]`.
    pub qkv: B::Buffer<f32>,
    /// `[T, output_width]` what attention answers.
    pub attended: B::Buffer<f32>,
    /// `[T, output_width]` quantised, the input of the output projection.
    pub attended_quantized: Quantized<B>,
    /// What adapters read and write, in a model that has some.
    pub adapter: Option<AdapterRows<B>>,
    /// `[T, 2 · ffn]` gate, then up.
    pub gate_up: B::Buffer<f32>,
    /// `[T, ffn]` quantised, the input of the down projection.
    pub gated: Quantized<B>,
    /// `[logit rows, hidden]` rows that go into the head, of one pass.
    pub normed: B::Buffer<f32>,
    /// `[logit rows, vocabulary]` of one pass.
    pub logits: B::Buffer<f32>,
    /// What sampling and scoring answer.
    pub samples: Samples<B>,
    /// Cosines and sines of the rotation.
    pub rope: Rope<B>,
    /// Those of the layers that rotate by frequencies of their own.
    pub local_rope: Option<Rope<B>>,
}

/// Tables of the rotation.
pub struct Rope<B: Backend> {
    /// `[context, dim / 2]`.
    pub cos: B::Buffer<f32>,
    /// `[context, dim / 2]`.
    pub sin: B::Buffer<f32>,
}

impl<B: Backend> Rope<B> {
    fn upload(
        backend: &mut B,
        config: &ModelConfig,
        theta: f64,
        context: usize,
    ) -> Result<Self, LoadError> {
        let (cos, sin) = rope_tables(theta, config.heads.dim, context);
        let mut rope = Self {
            cos: backend.allocate("RoPE cosines", cos.len())?,
            sin: backend.allocate("RoPE sines", sin.len())?,
        };
        backend.write(&mut rope.cos, &cos)?;
        backend.write(&mut rope.sin, &sin)?;
        Ok(rope)
    }
}

impl<B: Backend> Activations<B> {
    /// Reserves all of it and uploads the RoPE tables.
    pub fn allocate(
        backend: &mut B,
        config: &ModelConfig,
        reserve: &Reserve,
        adapters: &AdapterSizes,
    ) -> Result<Self, LoadError> {
        let (tokens, sequences) = (reserve.step_tokens, reserve.sequences);
        let (hidden, attention) = (config.hidden, config.heads.output_width());
        let logit_rows = reserve.logit_rows(config);
        let mut table = |theta| Rope::upload(backend, config, theta, reserve.context);
        let rope = table(config.rope_theta)?;
        let local = config.attention.local.as_ref();
        let local_rope = local.map(|local| table(local.rope_theta)).transpose()?;
        let row = config.family.row();
        let b = &*backend;
        Ok(Self {
            batch: Batch {
                tokens: b.allocate("tokens", tokens)?,
                positions: b.allocate("positions", tokens)?,
                sequences: b.allocate("sequences", tokens)?,
                slots: b.allocate("slots", tokens)?,
                query_starts: b.allocate("query starts", sequences + 1)?,
                kv_lens: b.allocate("KV lengths", sequences)?,
                page_table: b.allocate("page table", sequences * reserve.max_pages())?,
                max_pages: reserve.max_pages(),
                lanes: b.allocate("lanes", sequences)?,
                logit_rows: b.allocate("logit rows", tokens)?,
                targets: b.allocate("targets", tokens)?,
                sample_rows: b.allocate("sampling options", sequences)?,
                bias_tokens: b.allocate("bias tokens", sequences * MAX_BIASES)?,
                bias_values: b.allocate("bias values", sequences * MAX_BIASES)?,
            },
            lanes: Lanes {
                history: b.allocate("history", sequences * reserve.context)?,
                context: reserve.context,
                sampled: b.allocate("sampled tokens", sequences)?,
            },
            residual: b.allocate("residual stream", tokens * hidden)?,
            normed_hidden: (row.projection_norms)
                .then(|| b.allocate("normed hidden rows", tokens * hidden))
                .transpose()?,
            unnormed: (row.post_norms)
                .then(|| b.allocate("rows before their norm", tokens * hidden))
                .transpose()?,
            hidden: allocate_quantized(b, "quantised hidden rows", tokens, hidden)?,
            qkv: b.allocate("qkv", tokens * config.heads.qkv_width())?,
            attended: b.allocate("attention output", tokens * attention)?,
            attended_quantized: allocate_quantized(b, "quantised attention", tokens, attention)?,
            adapter: (adapters.rank > 0)
                .then(|| {
                    Ok::<_, LoadError>(AdapterRows {
                        input: b.allocate("inputs of adapters", tokens * adapters.width)?,
                        inner: b.allocate("rows of adapters", tokens * adapters.rank)?,
                    })
                })
                .transpose()?,
            gate_up: b.allocate("gate and up", tokens * 2 * config.ffn)?,
            gated: allocate_quantized(b, "quantised gated rows", tokens, config.ffn)?,
            normed: b.allocate("normed rows", logit_rows * hidden)?,
            logits: b.allocate("logits", logit_rows * config.vocabulary)?,
            samples: Samples {
                tokens: b.allocate("sampled rows", tokens)?,
                logprobs: b.allocate("log-probabilities", tokens)?,
                top_tokens: b.allocate("likeliest tokens", sequences * MAX_LOGPROBS)?,
                top_logprobs: b.allocate("their log-probabilities", sequences * MAX_LOGPROBS)?,
            },
            rope,
            local_rope,
        })
    }
}

/// Cosines and sines of `position · theta^(−2i / dim)`, `[context, dim / 2]` each.
///
/// The frequency and the angle are rounded to f32 as in transformers' `compute_default_rope_parameters`;
/// the functions are `libm`'s in f64, so that the tables are the same on every platform.
pub fn rope_tables(theta: f64, dim: usize, context: usize) -> (Vec<f32>, Vec<f32>) {
    let frequencies: Vec<f32> =
        (0..dim / 2).map(|i| 1.0 / libm::pow(theta, (2 * i) as f64 / dim as f64) as f32).collect();
    let angles = (0..context).flat_map(|position| {
        frequencies.iter().map(move |frequency| f64::from(position as f32 * frequency))
    });
    angles.map(|angle| (libm::cos(angle) as f32, libm::sin(angle) as f32)).unzip()
}
