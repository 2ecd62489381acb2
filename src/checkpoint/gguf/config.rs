//! Hyper-parameters from the metadata of a GGUF file.
//!
//! Keys: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; those of `gemma3` and what they
//! are where they are absent: <https://github.com/ggml-org/llama.cpp/blob/master/src/models/gemma3.cpp>.
//! As in `hf::config`, a key that would change what the model computes, and whose meaning is not
//! implemented here, is an error.

use std::num::NonZeroUsize;

use super::EMBEDDING;
use super::container::Gguf;
use super::metadata::{Metadata, Value};
use crate::backend::ops::{Activation, Heads};
use crate::error::LoadError;
use crate::model::config::{Attention, Family, LocalLayers, MAX_SIZE, ModelConfig};

/// What a value of `general.architecture` means.
#[derive(Debug)]
pub(crate) struct Architecture {
    pub(crate) name: &'static str,
    pub(crate) family: Family,
    /// What the feed-forward network has if no key says so. Published files have no key.
    activation: Activation,
    /// Whether the rows of query and key heads are in the order of interleaved rotation: the two
    /// halves of each head, which Hugging Face's files have one after the other, by turns.
    pub(crate) interleaved: bool,
    /// Whether the architecture is ternary by definition. Float weights are then masters that were
    /// trained to be quantised; of another architecture they are those of some other model.
    pub(crate) ternary: bool,
    /// Whether a model without a head of its own embeds texts and writes none.
    pub(crate) embeds: bool,
}

/// The architectures that are read.
pub(crate) const ARCHITECTURES: &[Architecture] = &[
    // 1bitLLM's models, by llama.cpp's converter.
    Architecture {
        name: "bitnet",
        family: Family::BitNet,
        activation: Activation::Silu,
        interleaved: false,
        ternary: true,
        embeds: false,
    },
    // 2B4T, by bitnet.cpp's converter: the first name was used until April 2025.
    Architecture {
        name: "bitnet-25",
        family: Family::BitNet,
        activation: Activation::Relu2,
        interleaved: false,
        ternary: true,
        embeds: false,
    },
    Architecture {
        name: "bitnet-b1.58",
        family: Family::BitNet,
        activation: Activation::Relu2,
        interleaved: false,
        ternary: true,
        embeds: false,
    },
    // Llama3-8B-1.58, Falcon3-1.58, Falcon-E.
    Architecture {
        name: "llama",
        family: Family::Llama,
        activation: Activation::Silu,
        interleaved: true,
        ternary: false,
        embeds: false,
    },
    // BitNet-embedding 0.6B, by bitnet.cpp's converter. A Qwen3 of another kind lacks the norms before
    // its projections.
    Architecture {
        name: "qwen3",
        family: Family::Qwen3,
        activation: Activation::Silu,
        interleaved: false,
        ternary: false,
        embeds: true,
    },
    // BitNet-embedding 270M, by bitnet.cpp's converter, which adds the one to the gains that
    // Gemma 3 stores without it.
    Architecture {
        name: "gemma3",
        family: Family::Gemma3,
        activation: Activation::GeluTanh,
        interleaved: false,
        ternary: false,
        embeds: true,
    },
];

/// Gemma 3 of 27B has as many layers; its scores are scaled by another rule than those of the rest.
const LAYERS_27B: usize = 62;

/// What engines multiply the scores of a Gemma 3 by.
pub(crate) fn gemma_scale(config: &ModelConfig) -> f32 {
    scale_of_gemma(config.hidden, config.layers, config.heads)
}

fn scale_of_gemma(hidden: usize, layers: usize, heads: Heads) -> f32 {
    let of_query = if layers == LAYERS_27B { hidden / heads.query } else { heads.dim };
    1.0 / (of_query.max(1) as f64).sqrt() as f32
}

/// Which layers of a Gemma 3 see a window where no key says it.
pub(crate) fn every_sixth(layers: usize) -> Vec<bool> {
    all_but_every(6, layers)
}

/// Windows in all layers but every `pattern`th; of 0 llama.cpp makes windows in all.
fn all_but_every(pattern: usize, layers: usize) -> Vec<bool> {
    (0..layers).map(|layer| pattern == 0 || layer % pattern < pattern - 1).collect()
}

/// What the metadata says.
#[derive(Debug)]
pub(crate) struct GgufConfig {
    /// `tied_head` is decided by the tensors.
    pub(crate) model: ModelConfig,
    pub(crate) architecture: &'static Architecture,
    /// What the file does not say and was taken from the rules of llama.cpp.
    pub(crate) assumed: Vec<String>,
}

const SIZE: std::ops::RangeInclusive<u64> = 1..=MAX_SIZE as u64;
const POSITIVE: &str = "a positive number";

/// Reads the config of a model.
pub(crate) fn parse(gguf: &Gguf) -> Result<GgufConfig, LoadError> {
    let architecture = architecture(&gguf.metadata)?;
    let keys = Keys { metadata: &gguf.metadata, architecture: architecture.name };
    keys.refuse_variants()?;
    let mut assumed = Vec::new();
    let hidden = keys.size("embedding_length")?;
    let context = keys.size("context_length")?;
    let layers = keys.size("block_count")?;
    let heads = keys.heads(hidden, &mut assumed)?;
    let model = ModelConfig {
        family: architecture.family,
        hidden,
        ffn: keys.size("feed_forward_length")?,
        layers,
        heads,
        vocabulary: keys.vocabulary(gguf)?,
        context,
        rms_eps: keys
            .positive("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| keys.wrong("attention.layer_norm_rms_epsilon", POSITIVE))?
            as f32,
        rope_theta: match keys.positive("rope.freq_base")? {
            Some(theta) => theta,
            None => {
                assumed.push("rope.freq_base: 10000".into());
                10_000.0
            }
        },
        activation: keys.activation(architecture, &mut assumed)?,
        tied_head: true,
        attention: match architecture.family {
            Family::Gemma3 => keys.gemma_attention(hidden, layers, heads, &mut assumed)?,
            _ => {
                keys.whole_attention(context)?;
                Attention::default()
            }
        },
    };
    keys.whole_rotation(model.heads.dim)?;
    model.validate().map_err(|(field, expected, found)| {
        LoadError::invalid(&gguf.file, keys.of_field(field), expected, found)
    })?;
    Ok(GgufConfig { model, architecture, assumed })
}

fn architecture(metadata: &Metadata) -> Result<&'static Architecture, LoadError> {
    let key = "general.architecture";
    let names = || ARCHITECTURES.iter().map(|a| a.name).collect::<Vec<_>>().join(", ");
    let name = metadata.string(key)?.ok_or_else(|| metadata.wrong(key, names()))?;
    ARCHITECTURES
        .iter()
        .find(|architecture| architecture.name == name)
        .ok_or_else(|| metadata.unsupported(key, names()))
}

/// The keys of an architecture, without its name before them.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'static str,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn wrong(&self, key: &str, expected: impl Into<String>) -> LoadError {
        self.metadata.wrong(&self.full(key), expected)
    }

    fn unsupported(&self, key: &str, supported: impl Into<String>) -> LoadError {
        self.metadata.unsupported(&self.full(key), supported)
    }

    fn size(&self, key: &str) -> Result<usize, LoadError> {
        self.metadata.required_integer(&self.full(key), SIZE).map(|n| n as usize)
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, LoadError> {
        let size = self.metadata.integer(&self.full(key), SIZE)?;
        Ok(size.map(|n| n as usize))
    }

    fn positive(&self, key: &str) -> Result<Option<f64>, LoadError> {
        self.metadata.number(&self.full(key), POSITIVE, |n| n > 0.0)
    }

    /// The key that a field of [`ModelConfig::validate`] comes from.
    fn of_field(&self, field: &str) -> String {
        self.full(match field {
            "hidden_size" => "embedding_length",
            "intermediate_size" => "feed_forward_length",
            "num_hidden_layers" => "block_count",
            "num_attention_heads" => "attention.head_count",
            "num_key_value_heads" => "attention.head_count_kv",
            "head_dim" => "attention.key_length",
            "vocab_size" => "vocab_size",
            "max_position_embeddings" => "context_length",
            "rms_norm_eps" => "attention.layer_norm_rms_epsilon",
            "rope_theta" => "rope.freq_base",
            "rope_local_base_freq" => "rope.freq_base_swa",
            other => other,
        })
    }

    fn heads(&self, hidden: usize, assumed: &mut Vec<String>) -> Result<Heads, LoadError> {
        let query = self.size("attention.head_count")?;
        let kv = self.optional_size("attention.head_count_kv")?.unwrap_or_else(|| {
            assumed.push(format!("attention.head_count_kv: {query}"));
            query
        });
        let dim = match self.optional_size("attention.key_length")? {
            Some(dim) => dim,
            None if hidden.is_multiple_of(query) => hidden / query,
            None => {
                let expected = format!(
                    "a multiple of {}, {query}, since {} is absent",
                    self.full("attention.head_count"),
                    self.full("attention.key_length")
                );
                return Err(self.wrong("embedding_length", expected));
            }
        };
        let value = "attention.value_length";
        if self.optional_size(value)?.is_some_and(|value| value != dim) {
            return Err(self.unsupported(value, format!("{dim}, the length of a key")));
        }
        Ok(Heads { query, kv, dim })
    }

    /// `vocab_size` where there is one, else the rows of the embedding table.
    fn vocabulary(&self, gguf: &Gguf) -> Result<usize, LoadError> {
        if let Some(size) = self.optional_size("vocab_size")? {
            return Ok(size);
        }
        let embedding = gguf.tensor(EMBEDDING)?;
        Ok(embedding.ne.get(1).copied().unwrap_or(1))
    }

    /// The activation by its key, where a file has it, else by the architecture.
    fn activation(
        &self,
        architecture: &Architecture,
        assumed: &mut Vec<String>,
    ) -> Result<Activation, LoadError> {
        let row = architecture.family.row();
        for key in ["hidden_activation", "hidden_act"] {
            let Some(name) = self.metadata.string(&self.full(key))? else { continue };
            let name = match name {
                "relu_sqr" | "relu_squared" | "squared_relu" => "relu2",
                "swish" => "silu",
                name => name,
            };
            let known = row.activations.iter().find(|(known, _)| *known == name);
            let names = || row.activations.iter().map(|(name, _)| *name).collect::<Vec<_>>();
            return known
                .map(|(_, activation)| *activation)
                .ok_or_else(|| self.unsupported(key, names().join(", ")));
        }
        let activation = architecture.activation;
        let name = row.activations.iter().find(|(_, known)| *known == activation);
        assumed.push(format!(
            "hidden_activation: {}, from general.architecture {}",
            name.map_or("", |(name, _)| *name),
            architecture.name
        ));
        Ok(activation)
    }

    /// Refuses options that change what a layer computes.
    fn refuse_variants(&self) -> Result<(), LoadError> {
        for key in ["expert_count", "expert_used_count"] {
            if self.metadata.integer(&self.full(key), 0..=u64::MAX)?.is_some_and(|n| n > 0) {
                return Err(self.unsupported(key, "0"));
            }
        }
        // llama.cpp's converter writes "linear" with a factor of 1 for every `bitnet` model, which
        // changes nothing (`conversion/bitnet.py`).
        let kind = "rope.scaling.type";
        if !matches!(self.metadata.string(&self.full(kind))?, None | Some("none" | "linear")) {
            return Err(self.unsupported(kind, "none"));
        }
        for key in ["rope.scaling.factor", "rope.scale_linear"] {
            if self.positive(key)?.is_some_and(|factor| factor != 1.0) {
                return Err(self.unsupported(key, "1"));
            }
        }
        for key in [
            "logit_scale",
            "embedding_scale",
            "residual_scale",
            "attention.scale",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ] {
            // Some writers put 0 where there is no factor.
            let factor = self.metadata.number(&self.full(key), "a number", |_| true)?;
            if factor.is_some_and(|factor| factor != 0.0 && factor != 1.0) {
                return Err(self.unsupported(key, "none"));
            }
        }
        let causal = "attention.causal";
        if self.metadata.boolean(&self.full(causal))? == Some(false) {
            return Err(self.unsupported(causal, "true"));
        }
        Ok(())
    }

    fn whole_rotation(&self, head_dim: usize) -> Result<(), LoadError> {
        let key = "rope.dimension_count";
        match self.optional_size(key)? {
            Some(dims) if dims != head_dim => {
                Err(self.unsupported(key, format!("{head_dim}, the dimensions of a head")))
            }
            _ => Ok(()),
        }
    }

    /// The scale of Gemma 3's scores, and its windows.
    fn gemma_attention(
        &self,
        hidden: usize,
        layers: usize,
        heads: Heads,
        assumed: &mut Vec<String>,
    ) -> Result<Attention, LoadError> {
        let scale = Some(scale_of_gemma(hidden, layers, heads));
        let key = "attention.sliding_window";
        let window = self.metadata.integer(&self.full(key), 0..=MAX_SIZE as u64)?.unwrap_or(0);
        let Some(window) = NonZeroUsize::new(window as usize) else {
            return Ok(Attention { scale, local: None });
        };
        let layers = self.local_layers(layers, assumed)?;
        let key = "rope.freq_base_swa";
        let rope_theta = self.positive(key)?.unwrap_or_else(|| {
            assumed.push(format!("{key}: 10000"));
            10_000.0
        });
        let local = layers.contains(&true).then_some(LocalLayers { window, rope_theta, layers });
        Ok(Attention { scale, local })
    }

    /// Which layers see a window: an array says it of each, a number `n` of all but every `n`th.
    fn local_layers(
        &self,
        layers: usize,
        assumed: &mut Vec<String>,
    ) -> Result<Vec<bool>, LoadError> {
        let key = "attention.sliding_window_pattern";
        let expected = || format!("a number, or {layers} booleans, one for each layer");
        let pattern = match self.metadata.get(&self.full(key)) {
            Some(Value::Array(array)) => {
                let local: Vec<bool> = (array.iter().take(layers))
                    .filter_map(
                        |item| if let Value::Bool(local) = item { Some(local) } else { None },
                    )
                    .collect();
                let whole = array.len == layers && local.len() == layers;
                return if whole { Ok(local) } else { Err(self.wrong(key, expected())) };
            }
            Some(Value::Integer(pattern)) => {
                usize::try_from(pattern).map_err(|_| self.wrong(key, expected()))?
            }
            Some(_) => return Err(self.wrong(key, expected())),
            None => {
                assumed.push(format!("{key}: 6"));
                6
            }
        };
        Ok(all_but_every(pattern, layers))
    }

    fn whole_attention(&self, context: usize) -> Result<(), LoadError> {
        let key = "attention.sliding_window";
        let window = self.metadata.integer(&self.full(key), 0..=u64::MAX)?;
        match window {
            Some(window) if window != 0 && window < context as u64 => {
                Err(self.unsupported(key, format!("0 or at least {context}, the context")))
            }
            _ => Ok(()),
        }
    }
}
