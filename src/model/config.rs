//! Hyper-parameters, parsed once into valid states, and the table of families.

use std::num::NonZeroUsize;

use crate::backend::ops::{Activation, Heads};

/// The members of the BitNet b1.58 family that this crate runs. Everything that a family decides
/// is in its row of [`FAMILIES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// BitNet b1.58 2B4T: sub-norms before the output and down projections.
    BitNet,
    /// Llama-shaped ternary models (Llama3-8B-1.58, Falcon3-1.58, Falcon-E): no sub-norms.
    Llama,
    /// BitNet-embedding 0.6B: Qwen3 with a norm before each projection.
    Qwen3,
    /// BitNet-embedding 270M: Gemma 3 with a norm before each projection.
    Gemma3,
}

/// What a family decides, one row per family.
#[derive(Debug)]
pub struct FamilyRow {
    /// The family.
    pub family: Family,
    /// The name people know it by.
    pub name: &'static str,
    /// `architectures` in a Hugging Face config.
    pub hf_architecture: &'static str,
    /// `model_type` in a Hugging Face config.
    pub hf_model_type: &'static str,
    /// Values of `hidden_act` that the family's definition gives a meaning to.
    pub activations: &'static [(&'static str, Activation)],
    /// An RMS norm between attention and the output projection.
    pub attention_sub_norm: bool,
    /// An RMS norm between the gated product and the down projection.
    pub ffn_sub_norm: bool,
    /// An RMS norm before each of the seven projections, besides those before attention and the
    /// feed-forward network.
    pub projection_norms: bool,
    /// An RMS norm of each query and key head before it is rotated.
    pub head_norms: bool,
    /// An RMS norm of what attention and the feed-forward network answer, before it is added to the
    /// residual stream.
    pub post_norms: bool,
    /// Embeddings are multiplied by the square root of their width.
    pub scaled_embedding: bool,
    /// How RoPE pairs dimensions in Hugging Face files.
    pub rope: &'static str,
}

/// The one table that decides activation, norms and RoPE per family.
pub const FAMILIES: &[FamilyRow] = &[
    FamilyRow {
        family: Family::BitNet,
        name: "BitNet b1.58 (2B4T)",
        hf_architecture: "BitNetForCausalLM",
        hf_model_type: "bitnet",
        activations: &[
            ("relu2", Activation::Relu2),
            ("silu", Activation::Silu),
            ("gelu_pytorch_tanh", Activation::GeluTanh),
        ],
        attention_sub_norm: true,
        ffn_sub_norm: true,
        projection_norms: false,
        head_norms: false,
        post_norms: false,
        scaled_embedding: false,
        rope: "half-split",
    },
    FamilyRow {
        family: Family::Llama,
        name: "Llama, ternary",
        hf_architecture: "LlamaForCausalLM",
        hf_model_type: "llama",
        activations: &[
            ("silu", Activation::Silu),
            ("relu2", Activation::Relu2),
            ("gelu_pytorch_tanh", Activation::GeluTanh),
        ],
        attention_sub_norm: false,
        ffn_sub_norm: false,
        projection_norms: false,
        head_norms: false,
        post_norms: false,
        scaled_embedding: false,
        rope: "half-split",
    },
    FamilyRow {
        family: Family::Qwen3,
        name: "Qwen3, ternary (BitNet-embedding)",
        hf_architecture: "Qwen3Model",
        hf_model_type: "qwen3",
        activations: &[("silu", Activation::Silu)],
        attention_sub_norm: false,
        ffn_sub_norm: false,
        projection_norms: true,
        head_norms: true,
        post_norms: false,
        scaled_embedding: false,
        rope: "half-split",
    },
    FamilyRow {
        family: Family::Gemma3,
        name: "Gemma 3, ternary (BitNet-embedding)",
        hf_architecture: "Gemma3TextModel",
        hf_model_type: "gemma3_text",
        activations: &[("gelu_pytorch_tanh", Activation::GeluTanh)],
        attention_sub_norm: false,
        ffn_sub_norm: false,
        projection_norms: true,
        head_norms: true,
        post_norms: true,
        scaled_embedding: true,
        rope: "half-split",
    },
];

impl Family {
    /// The family's row of [`FAMILIES`].
    pub fn row(self) -> &'static FamilyRow {
        // Every variant has a row: `every_family_has_a_row` tests it.
        &FAMILIES[FAMILIES.iter().position(|row| row.family == self).unwrap_or(0)]
    }
}

/// Hyper-parameters of a model. A value of this type has passed [`ModelConfig::validate`] when it
/// came from a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family, which decides norms and RoPE layout.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward network.
    pub ffn: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of the attention.
    pub heads: Heads,
    /// Rows of the embedding table.
    pub vocabulary: usize,
    /// Positions the model was made for.
    pub context: usize,
    /// eps of every norm.
    pub rms_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Activation of the gated feed-forward network.
    pub activation: Activation,
    /// Whether the output head is the embedding table.
    pub tied_head: bool,
    /// What attention has in some families alone.
    pub attention: Attention,
}

/// What attention has in some families alone. The default is what it has in most.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Attention {
    /// What scores are multiplied by; `1 / √(head dim)` if absent.
    pub scale: Option<f32>,
    /// Layers that see a window of keys.
    pub local: Option<LocalLayers>,
}

/// Layers that see a window of keys, and rotate by frequencies of their own.
#[derive(Debug, Clone, PartialEq)]
pub struct LocalLayers {
    /// How many keys a query sees, the latest, its own among them.
    pub window: NonZeroUsize,
    /// Base of their rotary frequencies.
    pub rope_theta: f64,
    /// Which layers, by their number.
    pub layers: Vec<bool>,
}

/// The largest value that any size in a config may have: past it products of two sizes could leave
/// 64 bits, and no published model comes near.
pub const MAX_SIZE: usize = 1 << 24;

impl ModelConfig {
    /// Checks what no single field can tell. The `Err` holds the field, what was expected and what
    /// was found.
    pub fn validate(&self) -> Result<(), (&'static str, String, String)> {
        for (field, value) in [
            ("hidden_size", self.hidden),
            ("intermediate_size", self.ffn),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads.query),
            ("num_key_value_heads", self.heads.kv),
            ("head_dim", self.heads.dim),
            ("vocab_size", self.vocabulary),
            ("max_position_embeddings", self.context),
        ] {
            if value == 0 || value > MAX_SIZE {
                return Err((field, format!("1 to {MAX_SIZE}"), value.to_string()));
            }
        }
        if !self.heads.query.is_multiple_of(self.heads.kv) {
            return Err((
                "num_key_value_heads",
                format!("a divisor of num_attention_heads, {}", self.heads.query),
                self.heads.kv.to_string(),
            ));
        }
        if !self.heads.dim.is_multiple_of(2) {
            return Err(("head_dim", "an even number".into(), self.heads.dim.to_string()));
        }
        if !(self.rms_eps.is_finite() && self.rms_eps > 0.0) {
            return Err(("rms_norm_eps", "a positive number".into(), self.rms_eps.to_string()));
        }
        let local = self.attention.local.as_ref();
        if let Some(local) = local.filter(|local| local.layers.len() != self.layers) {
            let expected = format!("{}, one for each layer", self.layers);
            return Err(("layer_types", expected, local.layers.len().to_string()));
        }
        if let Some(theta) = local.map(|local| local.rope_theta)
            && !(theta.is_finite() && theta > 0.0)
        {
            return Err(("rope_local_base_freq", "a positive number".into(), theta.to_string()));
        }
        if let Some(scale) = self.attention.scale
            && !(scale.is_finite() && scale > 0.0)
        {
            return Err(("query_pre_attn_scalar", "a positive number".into(), scale.to_string()));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(("rope_theta", "a positive number".into(), self.rope_theta.to_string()));
        }
        Ok(())
    }

    /// Ternary weights of the whole model.
    pub fn ternary_parameters(&self) -> u64 {
        let layer: u64 = (Projection::ALL.into_iter())
            .map(|projection| {
                let (rows, cols) = self.shape(projection);
                rows as u64 * cols as u64
            })
            .sum();
        self.layers as u64 * layer
    }

    /// Weights of the embedding table.
    pub fn embedding_parameters(&self) -> u64 {
        self.vocabulary as u64 * self.hidden as u64
    }

    /// Weights of all norms.
    pub fn norm_parameters(&self) -> u64 {
        let width = |role| self.norm_width(role) as u64;
        let layer: u64 = self.layer_norms(0).into_iter().map(width).sum();
        self.layers as u64 * layer + width(NormRole::Final)
    }

    /// What embeddings are multiplied by.
    pub fn embedding_scale(&self) -> f32 {
        if self.family.row().scaled_embedding { (self.hidden as f64).sqrt() as f32 } else { 1.0 }
    }

    /// How many keys a query of a layer sees; all if absent.
    pub fn window(&self, layer: usize) -> Option<NonZeroUsize> {
        let local = self.attention.local.as_ref();
        local.filter(|local| local.layers[layer]).map(|local| local.window)
    }

    /// What attention's scores are multiplied by.
    pub fn attention_scale(&self) -> f32 {
        self.attention.scale.unwrap_or(1.0 / (self.heads.dim as f32).sqrt())
    }

    /// The norms of a layer.
    pub fn layer_norms(&self, layer: usize) -> Vec<NormRole> {
        let mut roles = vec![NormRole::Attention(layer), NormRole::Ffn(layer)];
        if self.family.row().head_norms {
            roles.extend([NormRole::QueryHead(layer), NormRole::KeyHead(layer)]);
        }
        if self.family.row().post_norms {
            roles.extend([NormRole::PostAttention(layer), NormRole::PostFfn(layer)]);
        }
        roles.extend(Projection::ALL.into_iter().filter_map(|p| self.projection_norm(layer, p)));
        roles
    }

    /// The norm whose output a projection multiplies, where that is not the norm before attention or
    /// the feed-forward network itself.
    pub fn projection_norm(&self, layer: usize, projection: Projection) -> Option<NormRole> {
        let row = self.family.row();
        match projection {
            _ if row.projection_norms => Some(NormRole::Projection(layer, projection)),
            Projection::Output if row.attention_sub_norm => Some(NormRole::AttentionSub(layer)),
            Projection::Down if row.ffn_sub_norm => Some(NormRole::FfnSub(layer)),
            _ => None,
        }
    }

    /// Width of a norm.
    pub fn norm_width(&self, role: NormRole) -> usize {
        match role {
            NormRole::Attention(_) | NormRole::Ffn(_) | NormRole::Final => self.hidden,
            NormRole::PostAttention(_) | NormRole::PostFfn(_) => self.hidden,
            NormRole::QueryHead(_) | NormRole::KeyHead(_) => self.heads.dim,
            NormRole::AttentionSub(_) => self.shape(Projection::Output).1,
            NormRole::FfnSub(_) => self.shape(Projection::Down).1,
            NormRole::Projection(_, projection) => self.shape(projection).1,
        }
    }

    /// All weights.
    pub fn parameters(&self) -> u64 {
        let tables = if self.tied_head { 1 } else { 2 };
        self.ternary_parameters() + tables * self.embedding_parameters() + self.norm_parameters()
    }

    /// Rows (output features) and columns (input features) of a projection.
    pub fn shape(&self, projection: Projection) -> (usize, usize) {
        let kv = self.heads.kv * self.heads.dim;
        match projection {
            Projection::Query => (self.heads.output_width(), self.hidden),
            Projection::Key | Projection::Value => (kv, self.hidden),
            Projection::Output => (self.hidden, self.heads.output_width()),
            Projection::Gate | Projection::Up => (self.ffn, self.hidden),
            Projection::Down => (self.hidden, self.ffn),
        }
    }
}

/// The ternary matrices of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// Hidden to query heads.
    Query,
    /// Hidden to key heads.
    Key,
    /// Hidden to value heads.
    Value,
    /// Attention back to hidden.
    Output,
    /// Hidden to the gate of the feed-forward network.
    Gate,
    /// Hidden to what the gate lets through.
    Up,
    /// Feed-forward network back to hidden.
    Down,
}

impl Projection {
    /// All of them, in the order of a layer.
    pub const ALL: [Self; 7] =
        [Self::Query, Self::Key, Self::Value, Self::Output, Self::Gate, Self::Up, Self::Down];
}

/// The norms of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NormRole {
    /// Before attention, of a layer. `[hidden]`.
    Attention(usize),
    /// Before the output projection, of a layer. `[query heads · head dim]`.
    AttentionSub(usize),
    /// Before the feed-forward network, of a layer. `[hidden]`.
    Ffn(usize),
    /// Before the down projection, of a layer. `[ffn]`.
    FfnSub(usize),
    /// Before one projection of a layer alone, in families that norm the input of each. Its columns.
    Projection(usize, Projection),
    /// Of each query head of a layer, before it is rotated. `[head dim]`.
    QueryHead(usize),
    /// Of each key head of a layer, before it is rotated. `[head dim]`.
    KeyHead(usize),
    /// Of what attention answers, before it is added to the residual stream. `[hidden]`.
    PostAttention(usize),
    /// Of what the feed-forward network answers, before it is added to the residual stream.
    /// `[hidden]`.
    PostFfn(usize),
    /// Before the output head. `[hidden]`.
    Final,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_a_row() {
        for family in [Family::BitNet, Family::Llama, Family::Qwen3, Family::Gemma3] {
            assert_eq!(family.row().family, family);
        }
    }

    /// Parameter counts as published: 2B4T's safetensors index says 2,412,820,480, and
    /// Llama3-8B's 8,030,261,248.
    #[test]
    fn published_parameter_counts() {
        let mut config = ModelConfig {
            family: Family::BitNet,
            hidden: 2560,
            ffn: 6912,
            layers: 30,
            heads: Heads { query: 20, kv: 5, dim: 128 },
            vocabulary: 128_256,
            context: 4096,
            rms_eps: 1e-5,
            rope_theta: 500_000.0,
            activation: Activation::Relu2,
            tied_head: true,
            attention: Attention::default(),
        };
        assert_eq!(config.parameters(), 2_412_820_480);
        config = ModelConfig {
            family: Family::Llama,
            hidden: 4096,
            ffn: 14336,
            layers: 32,
            heads: Heads { query: 32, kv: 8, dim: 128 },
            activation: Activation::Silu,
            tied_head: false,
            ..config
        };
        assert_eq!(config.parameters(), 8_030_261_248);
    }
}
