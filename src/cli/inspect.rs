//! `trine inspect`: what is in a checkpoint, and what would run it.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};
use trine::backend::select::{DeviceStatus, devices};
use trine::backend::{Head, KvType};
use trine::checkpoint::lora::Adapter;
use trine::engine::{ModelFiles, ModelOptions, Pooling, SamplingParams};
use trine::model::activations::Reserve;
use trine::model::config::ModelConfig;

use super::args::{AnyModelArgs, ContextArgs};
use super::devices::as_json;
use super::fit::Needed;
use super::output::{self, bytes};
use super::tokenize::listed;

/// Show what is in a checkpoint, and what would run it
///
/// Sampling options shown are those in force for generate and chat when no flag says otherwise.
#[derive(Args)]
#[command(after_help = "\
Examples:
  trine inspect
  trine inspect models/bitnet-b1.58-2B-4T --tensors
  trine inspect --json --synthetic 8b")]
pub(crate) struct Inspect {
    /// The checkpoint, as --model names it
    #[arg(value_name = "PATH", conflicts_with_all = ["model", "synthetic"])]
    path: Option<PathBuf>,
    #[command(flatten)]
    model: AnyModelArgs,
    #[command(flatten)]
    context: ContextArgs,
    /// List all tensors
    #[arg(long)]
    tensors: bool,
    /// List the metadata of a GGUF file
    #[arg(long)]
    metadata: bool,
    /// Read every weight and stop at the first that is not valid
    #[arg(long)]
    verify: bool,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// What a model's parts weigh.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bytes {
    /// Ternary matrices at 2 bits a weight, as they are when loaded.
    ternary: u64,
    norms: u64,
    embedding: u64,
    /// What the output head reads per token.
    head: u64,
    tied: bool,
    /// Keys and values of one position of the KV cache, and the elements of each.
    kv_heads: u64,
    head_dim: u64,
}

impl Bytes {
    pub(crate) fn of(files: &ModelFiles) -> Self {
        let config = files.config();
        // A synthetic model's tables are bf16.
        let table = 2 * config.embedding_parameters();
        let (embedding, head) = files.checkpoint().map_or((table, table), |checkpoint| {
            (checkpoint.summary().embedding_bytes, checkpoint.summary().head_bytes)
        });
        Self {
            ternary: config.ternary_parameters() / 4,
            norms: 4 * config.norm_parameters(),
            embedding,
            head,
            tied: config.tied_head,
            kv_heads: 2 * (config.layers * config.heads.kv) as u64,
            head_dim: config.heads.dim as u64,
        }
    }

    /// The whole model as it is when loaded.
    pub(crate) fn model(&self) -> u64 {
        self.ternary + self.norms + self.embedding + if self.tied { 0 } else { self.head }
    }

    /// Weights that one token reads.
    pub(crate) fn per_token(&self) -> u64 {
        self.ternary + self.norms + self.head
    }

    /// With an output head of this kind. A row in int8 comes with a scale and three bounds.
    pub(crate) fn with_head(mut self, head: Head, config: &ModelConfig) -> Self {
        if head != Head::Full {
            self.head = config.embedding_parameters() + 16 * config.vocabulary as u64;
        }
        self
    }

    /// One position of the KV cache.
    pub(crate) fn kv_per_token(&self, kv_type: KvType) -> u64 {
        self.kv_heads * (self.head_dim * kv_type.size() as u64 + kv_type.scale_size() as u64)
    }
}

impl Inspect {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let files = self.model.open_at(self.path.as_deref())?;
        let options = ModelOptions::default().context(self.context.context);
        let reserve = options.reserve(files.config())?;
        if let Some(checkpoint) = files.checkpoint().filter(|_| self.verify) {
            checkpoint.verify()?;
        }
        let devices = devices();
        if self.json {
            return output::json(&as_object(&files, &reserve, &devices));
        }
        let mut rows = about(&files);
        rows.extend(runs_on(&Needed::of(&files, &reserve), &devices));
        output::text(&output::columns(&rows))?;
        if self.metadata {
            output::text(&format!("\n{}", output::columns(&metadata(&files))))?;
        }
        if self.tensors {
            output::text(&format!("\n{}", output::columns(&tensors(&files))))?;
        }
        Ok(())
    }
}

fn row(name: &str, value: impl Into<String>) -> Vec<String> {
    vec![name.to_owned(), value.into()]
}

fn about(files: &ModelFiles) -> Vec<Vec<String>> {
    let config = files.config();
    let heads = config.heads;
    let weights = Bytes::of(files);
    let mut rows = vec![row("model", files.name.as_str())];
    if let Some(checkpoint) = files.checkpoint() {
        let summary = checkpoint.summary();
        rows.push(row("format", format!("{}, {}", summary.format, bytes(summary.file_bytes))));
        rows.push(row("architecture", summary.architecture.as_str()));
        rows.push(row("quantization", summary.quantization.as_str()));
    }
    for adapter in files.adapters() {
        let (low, high) = adapter.ranks();
        let rank = if low == high { format!("{low}") } else { format!("{low} to {high}") };
        rows.push(row(
            "adapter",
            format!(
                "{}, times {}: rank {rank}, {} parameters, {}",
                adapter.folder().display(),
                adapter.strength(),
                output::count(adapter.parameters()),
                adapter.projections().join(", ")
            ),
        ));
    }
    rows.extend([
        row("family", config.family.row().name),
        row(
            "parameters",
            format!("{} ({})", output::count(config.parameters()), config.parameters()),
        ),
        row(
            "layers",
            format!("{} of hidden size {}, FFN {}", config.layers, config.hidden, config.ffn),
        ),
        row("heads", format!("{} query, {} key/value, of {}", heads.query, heads.kv, heads.dim)),
        row("vocabulary", config.vocabulary.to_string()),
        row("context", format!("{} tokens", config.context)),
        row("attention", attention(config)),
        row(
            "arithmetic",
            format!(
                "{:?}, RMS eps {:e}, RoPE base {} ({})",
                config.activation,
                config.rms_eps,
                config.rope_theta,
                config.family.row().rope
            ),
        ),
    ]);
    for projection in files.checkpoint().iter().flat_map(|c| &c.summary().projections) {
        let scales = projection
            .scales
            .map_or(String::new(), |[low, high]| format!(", scales {low:.4} to {high:.4}"));
        let [out, inner] = projection.shape;
        rows.push(row(&projection.name, format!("{out} x {inner}, {}{scales}", projection.stored)));
    }
    let ends = match files.defaults.stop_tokens.as_slice() {
        [] => "none".to_owned(),
        ends => listed(ends),
    };
    // Types of tables, which a synthetic model has no files to say.
    let [embedding, head] = files.checkpoint().map_or_else(Default::default, |checkpoint| {
        let summary = checkpoint.summary();
        [&summary.embedding, &summary.head].map(|kind| format!(", {kind}"))
    });
    let head = if weights.tied { ", the embedding table" } else { &head };
    rows.extend([
        row("ternary", format!("{} at 2 bits a weight", bytes(weights.ternary))),
        row("embedding", format!("{}{embedding}", bytes(weights.embedding))),
        row("head", format!("{}{head}", bytes(weights.head))),
        row(
            "KV per token",
            format!(
                "{} in int8, {} in f16, {} in f32",
                bytes(weights.kv_per_token(KvType::Int8)),
                bytes(weights.kv_per_token(KvType::F16)),
                bytes(weights.kv_per_token(KvType::F32))
            ),
        ),
        row("tokenizer", tokenizer(files)),
        row("pooling", files.pooling.to_string()),
        row("chat template", if files.chat.is_some() { "yes" } else { "none" }),
        row("sampling", sampling(&files.defaults)),
        row("end tokens", ends),
    ]);
    if let Some(checkpoint) = files.checkpoint() {
        let summary = checkpoint.summary();
        rows.extend(summary.assumed.iter().map(|assumed| row("assumed", assumed.as_str())));
        rows.extend(summary.unused.iter().map(|unused| row("unused", unused.as_str())));
    }
    rows
}

/// How many keys a query sees.
fn attention(config: &ModelConfig) -> String {
    let Some(local) = &config.attention.local else { return "all keys before a token".into() };
    let windowed = local.layers.iter().filter(|local| **local).count();
    format!(
        "the last {} keys in {windowed} of {} layers, RoPE base {} there; all keys in the rest",
        local.window, config.layers, local.rope_theta
    )
}

fn tokenizer(files: &ModelFiles) -> String {
    let bos = files.bos.map_or("no BOS".into(), |id| format!("BOS {id}"));
    match &files.tokenizer {
        Some(tokenizer) => format!("{} tokens, {bos}", tokenizer.vocabulary_size()),
        None => "none".into(),
    }
}

/// Options in force, in the order in which they apply.
fn sampling(params: &SamplingParams) -> String {
    let mut parts = Vec::new();
    if params.repetition_penalty != 1.0 {
        parts.push(format!("repetition penalty {}", params.repetition_penalty));
    }
    let greedy = if params.temperature == 0.0 { " (the likeliest token)" } else { "" };
    parts.push(format!("temperature {}{greedy}", params.temperature));
    if params.min_p > 0.0 {
        parts.push(format!("min-p {}", params.min_p));
    }
    if params.top_k > 0 {
        parts.push(format!("top-k {}", params.top_k));
    }
    if params.top_p < 1.0 {
        parts.push(format!("top-p {}", params.top_p));
    }
    if let Some(max) = params.max_tokens {
        parts.push(format!("at most {max} tokens"));
    }
    parts.join(", ")
}

fn runs_on(needed: &Needed, devices: &[DeviceStatus]) -> Vec<Vec<String>> {
    let mut rows = vec![row("memory", needed.arithmetic())];
    rows.extend(
        devices
            .iter()
            .map(|device| row(&format!("runs on {}", device.name), needed.verdict(device))),
    );
    rows
}

fn metadata(files: &ModelFiles) -> Vec<Vec<String>> {
    let mut rows = vec![["KEY", "VALUE"].map(str::to_owned).to_vec()];
    for (key, value) in files.checkpoint().iter().flat_map(|c| &c.summary().metadata) {
        rows.push(row(key, value.as_str()));
    }
    rows
}

fn tensors(files: &ModelFiles) -> Vec<Vec<String>> {
    let mut rows = vec![["TENSOR", "TYPE", "SHAPE", "BYTES"].map(str::to_owned).to_vec()];
    for tensor in files.checkpoint().iter().flat_map(|c| &c.summary().tensors) {
        rows.push(vec![
            tensor.name.clone(),
            tensor.dtype.clone(),
            format!("{:?}", tensor.shape),
            tensor.bytes.to_string(),
        ]);
    }
    rows
}

fn as_object(files: &ModelFiles, reserve: &Reserve, devices: &[DeviceStatus]) -> Value {
    let weights = Bytes::of(files);
    let needed = Needed::of(files, reserve);
    let runs_on: Vec<Value> = devices
        .iter()
        .map(|device| {
            let mut object = as_json(device);
            object["fits"] = json!(needed.fits(device).is_ok());
            object
        })
        .collect();
    json!({
        "model": files.name,
        "family": files.config().family.row().name,
        "config": config_json(files.config()),
        "parameters": files.config().parameters(),
        "bytes": {
            "ternary": weights.ternary,
            "norms": weights.norms,
            "embedding": weights.embedding,
            "head": weights.head,
            "kv_per_token_int8": weights.kv_per_token(KvType::Int8),
            "kv_per_token_f16": weights.kv_per_token(KvType::F16),
            "kv_per_token_f32": weights.kv_per_token(KvType::F32),
        },
        "memory": {
            "context": reserve.context,
            "model_bytes": needed.model,
            "adapter_bytes": needed.adapters,
            "kv_bytes": needed.kv,
            "activation_bytes": needed.activations,
            "sum_bytes": needed.sum(),
        },
        "adapters": files.adapters().iter().map(adapter_json).collect::<Vec<_>>(),
        "tokenizer": files.tokenizer.as_ref().map(|tokenizer| json!({
            "tokens": tokenizer.vocabulary_size(),
            "bos": files.bos,
            "eos": tokenizer.eos_id(),
        })),
        "chat_template": files.chat.is_some(),
        "pooling": {
            // None where the checkpoint asks for one that is not supported.
            "mode": files.pooling.in_force().ok().map(Pooling::name),
            "said": files.pooling.to_string(),
        },
        "sampling": sampling_json(&files.defaults),
        "runs_on": runs_on,
        "files": files.checkpoint().map(|checkpoint| checkpoint.summary()),
    })
}

fn adapter_json(adapter: &Adapter) -> Value {
    json!({
        "path": adapter.folder(),
        "scale": adapter.strength(),
        "base": adapter.base(),
        "ranks": [adapter.ranks().0, adapter.ranks().1],
        "parameters": adapter.parameters(),
        "matrices": adapter.modules(),
        "projections": adapter.projections(),
    })
}

fn config_json(config: &ModelConfig) -> Value {
    json!({
        "layers": config.layers,
        "hidden": config.hidden,
        "ffn": config.ffn,
        "query_heads": config.heads.query,
        "kv_heads": config.heads.kv,
        "head_dim": config.heads.dim,
        "vocabulary": config.vocabulary,
        "context": config.context,
        "rms_eps": config.rms_eps,
        "rope_theta": config.rope_theta,
        "window": config.attention.local.as_ref().map(|local| json!({
            "keys": local.window.get(),
            "layers": local.layers,
            "rope_theta": local.rope_theta,
        })),
        "activation": format!("{:?}", config.activation),
        "tied_head": config.tied_head,
    })
}

fn sampling_json(params: &SamplingParams) -> Value {
    json!({
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "max_tokens": params.max_tokens,
        "stop_tokens": params.stop_tokens,
    })
}
