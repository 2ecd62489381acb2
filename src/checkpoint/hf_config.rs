//! `config.json` of a Hugging Face folder: hyper-parameters and quantisation.
//!
//! Sources: transformers 5.23, `models/{bitnet,llama}/configuration_*.py`,
//! `utils/quantization_config.py` (`BitNetQuantConfig`), `modeling_rope_utils.py`, and the configs
//! of published checkpoints. A key that would change what the model computes, and whose meaning is
//! not implemented here, is an error; keys that change nothing are not looked at.

use std::path::Path;

use serde_json::{Map, Value};

use super::json::{Fields, describe, quote};
use crate::backend::ops::{Activation, Heads};
use crate::error::LoadError;
use crate::model::config::{Family, MAX_SIZE, ModelConfig};

/// A way in which checkpoints of a family are written: what the config calls it and what the
/// sub-norms are called.
#[derive(Debug)]
pub(crate) struct Form {
    /// The only entry of `architectures`.
    pub(crate) architecture: &'static str,
    pub(crate) model_type: &'static str,
    pub(crate) family: Family,
    /// Tensor names of the sub-norms within a layer, where the family has them.
    pub(crate) attention_sub_norm: &'static str,
    pub(crate) ffn_sub_norm: &'static str,
    /// Whether the form has no `quantization_config` and says `weight_bits` and `input_bits`.
    bits_in_config: bool,
}

/// The first form of a family is the one whose config has no `architectures`.
pub(crate) const FORMS: &[Form] = &[
    Form {
        architecture: "BitNetForCausalLM",
        model_type: "bitnet",
        family: Family::BitNet,
        attention_sub_norm: "self_attn.attn_sub_norm",
        ffn_sub_norm: "mlp.ffn_sub_norm",
        bits_in_config: false,
    },
    Form {
        architecture: "LlamaForCausalLM",
        model_type: "llama",
        family: Family::Llama,
        attention_sub_norm: "",
        ffn_sub_norm: "",
        bits_in_config: false,
    },
    // 1bitLLM/bitnet_b1_58-{large,xl,3B}: the arithmetic of the BitNet family, float master
    // weights, and the model_type of Llama, whose config class its code reuses.
    Form {
        architecture: "BitnetForCausalLM",
        model_type: "llama",
        family: Family::BitNet,
        attention_sub_norm: "self_attn.inner_attn_ln",
        ffn_sub_norm: "mlp.ffn_layernorm",
        bits_in_config: true,
    },
];

/// How the projections are stored and what their scales mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Quantization {
    /// `linear_class` `bitlinear`, or none: packed, `weight_scale` divides.
    BitLinear,
    /// `autobitlinear`, `offline`: packed, or floats of −1, 0 and +1; `weight_scale` multiplies.
    AutoOffline,
    /// `autobitlinear`, `online`: float master weights, quantised by absmean when they are loaded.
    Master,
}

impl Quantization {
    /// In words, for people.
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::BitLinear => "bitlinear: packed weights, divided by weight_scale",
            Self::AutoOffline => "autobitlinear, offline: ternary weights times weight_scale",
            Self::Master => "float master weights, quantised by absmean when loaded",
        }
    }
}

/// What a config says.
#[derive(Debug)]
pub(crate) struct HfConfig {
    /// `tied_head` holds only if `tied` is not `None`.
    pub(crate) model: ModelConfig,
    pub(crate) form: &'static Form,
    pub(crate) quantization: Quantization,
    /// `tie_word_embeddings`, if the config has it.
    pub(crate) tied: Option<bool>,
    /// What the config does not say and was taken from the rules of transformers.
    pub(crate) assumed: Vec<String>,
}

const SIZE: std::ops::RangeInclusive<u64> = 1..=MAX_SIZE as u64;

/// Reads a config.
pub(crate) fn parse(file: &Path, map: &Map<String, Value>) -> Result<HfConfig, LoadError> {
    let fields = Fields { file, prefix: "", map };
    let mut assumed = Vec::new();
    let form = form(&fields, &mut assumed)?;
    let quantization = quantization(&fields, form, &mut assumed)?;
    refuse_variants(&fields)?;

    let size = |key| fields.required_integer(key, SIZE).map(|n| n as usize);
    let context = size("max_position_embeddings")?;
    let hidden = size("hidden_size")?;
    let model = ModelConfig {
        family: form.family,
        hidden,
        ffn: size("intermediate_size")?,
        layers: size("num_hidden_layers")?,
        heads: heads(&fields, form, hidden, &mut assumed)?,
        vocabulary: size("vocab_size")?,
        context,
        rms_eps: fields
            .number("rms_norm_eps", POSITIVE, |eps| eps > 0.0)?
            .ok_or_else(|| fields.absent("rms_norm_eps", POSITIVE))? as f32,
        rope_theta: rope_theta(&fields)?,
        activation: activation(&fields, form)?,
        tied_head: true,
    };
    if let Some(window) = fields.integer("sliding_window", 0..=u64::MAX)?
        && window < context as u64
    {
        return Err(fields.unsupported(
            "sliding_window",
            format!("{window}, less than max_position_embeddings"),
            format!("null or at least {context}"),
        ));
    }
    model
        .validate()
        .map_err(|(field, expected, found)| LoadError::invalid(file, field, expected, found))?;
    let tied = fields.boolean("tie_word_embeddings")?;
    Ok(HfConfig { model, form, quantization, tied, assumed })
}

const POSITIVE: &str = "a positive number";

fn form(fields: &Fields<'_>, assumed: &mut Vec<String>) -> Result<&'static Form, LoadError> {
    let list = |names: Vec<&str>| names.join(", ");
    let known_types: Vec<&str> = {
        let mut types: Vec<&str> = FORMS.iter().map(|form| form.model_type).collect();
        types.dedup();
        types.sort_unstable();
        types.dedup();
        types
    };
    let model_type = fields
        .string("model_type")?
        .ok_or_else(|| fields.absent("model_type", list(known_types.clone())))?;
    if !known_types.contains(&model_type) {
        return Err(fields.unsupported("model_type", model_type, list(known_types)));
    }
    let architectures = fields.strings("architectures")?.unwrap_or_default();
    match architectures[..] {
        [] => {
            let form = FORMS.iter().find(|form| form.model_type == model_type);
            let form = form.ok_or_else(|| fields.absent("architectures", "a list"))?;
            assumed.push(format!("architectures: {}, from model_type", form.architecture));
            Ok(form)
        }
        [architecture] => {
            let form = FORMS.iter().find(|form| form.architecture == architecture);
            let form = form.ok_or_else(|| {
                let supported = FORMS.iter().map(|form| form.architecture).collect();
                fields.unsupported("architectures", architecture, list(supported))
            })?;
            if form.model_type != model_type {
                return Err(LoadError::invalid(
                    fields.file,
                    "model_type",
                    format!("{:?}, since architectures is {architecture}", form.model_type),
                    format!("{model_type:?}"),
                ));
            }
            Ok(form)
        }
        _ => Err(LoadError::invalid(
            fields.file,
            "architectures",
            "one name",
            quote(&list(architectures), 100),
        )),
    }
}

fn quantization(
    fields: &Fields<'_>,
    form: &Form,
    assumed: &mut Vec<String>,
) -> Result<Quantization, LoadError> {
    let Some(config) = fields.object("quantization_config", "quantization_config.")? else {
        if !form.bits_in_config {
            return Err(fields.absent(
                "quantization_config",
                "an object with quant_method \"bitnet\", without which a checkpoint has no ternary \
                 weights",
            ));
        }
        for (key, bits) in [("weight_bits", 1), ("input_bits", 8)] {
            fields.required_integer(key, bits..=bits)?;
        }
        return Ok(Quantization::Master);
    };
    match config.string("quant_method")? {
        Some("bitnet") => {}
        Some(other) => return Err(config.unsupported("quant_method", other, "bitnet")),
        None => return Err(config.absent("quant_method", "\"bitnet\"")),
    }
    if config.boolean("use_rms_norm")? == Some(true) {
        return Err(config.unsupported("use_rms_norm", "true", "false"));
    }
    not_converted(&config)?;
    let linear_class = config.string("linear_class")?.unwrap_or_else(|| {
        assumed.push("quantization_config.linear_class: bitlinear".into());
        "bitlinear"
    });
    let mode = config.string("quantization_mode")?.unwrap_or("offline");
    if !["offline", "online"].contains(&mode) {
        return Err(config.unsupported("quantization_mode", mode, "offline, online"));
    }
    match (linear_class, mode) {
        // transformers reads the mode for autobitlinear alone.
        ("bitlinear", _) => Ok(Quantization::BitLinear),
        ("autobitlinear", "online") => Ok(Quantization::Master),
        ("autobitlinear", _) => Ok(Quantization::AutoOffline),
        _ => Err(config.unsupported("linear_class", linear_class, "bitlinear, autobitlinear")),
    }
}

/// `modules_to_not_convert` may name what is never ternary anyway.
fn not_converted(config: &Fields<'_>) -> Result<(), LoadError> {
    const NEVER_TERNARY: [&str; 5] =
        ["lm_head", "model.embed_tokens", "embed_tokens", "model.norm", "norm"];
    let key = "modules_to_not_convert";
    for module in config.strings(key)?.unwrap_or_default() {
        if !NEVER_TERNARY.contains(&module.strip_suffix(".weight").unwrap_or(module)) {
            let supported = format!("null, [] or some of {}", NEVER_TERNARY.join(", "));
            return Err(config.unsupported(key, format!("{module:?}"), supported));
        }
    }
    Ok(())
}

/// Refuses options that change what a layer computes.
fn refuse_variants(fields: &Fields<'_>) -> Result<(), LoadError> {
    for key in ["attention_bias", "mlp_bias"] {
        if fields.boolean(key)? == Some(true) {
            return Err(fields.unsupported(key, "true", "false"));
        }
    }
    if let Some(types) = fields.strings("layer_types")?
        && let Some(other) = types.iter().find(|name| **name != "full_attention")
    {
        return Err(fields.unsupported("layer_types", *other, "full_attention"));
    }
    Ok(())
}

fn heads(
    fields: &Fields<'_>,
    form: &Form,
    hidden: usize,
    assumed: &mut Vec<String>,
) -> Result<Heads, LoadError> {
    let query = fields.required_integer("num_attention_heads", SIZE)? as usize;
    let kv = match fields.integer("num_key_value_heads", SIZE)? {
        Some(kv) => kv as usize,
        // transformers' BitNetConfig has 5 where the key is absent, and the number of query heads
        // where it is null; its LlamaConfig has the latter for both. The shape of k_proj is checked
        // against it either way.
        None => {
            let default = if form.architecture == "BitNetForCausalLM"
                && !fields.map.contains_key("num_key_value_heads")
            {
                5
            } else {
                query
            };
            assumed.push(format!("num_key_value_heads: {default}"));
            default
        }
    };
    let dim = match fields.integer("head_dim", SIZE)? {
        Some(dim) => dim as usize,
        None if hidden.is_multiple_of(query) => hidden / query,
        None => {
            return Err(LoadError::invalid(
                fields.file,
                "hidden_size",
                format!("a multiple of num_attention_heads, {query}, since head_dim is absent"),
                hidden.to_string(),
            ));
        }
    };
    Ok(Heads { query, kv, dim })
}

fn activation(fields: &Fields<'_>, form: &Form) -> Result<Activation, LoadError> {
    let table = form.family.row().activations;
    let supported = || table.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let name =
        fields.string("hidden_act")?.ok_or_else(|| fields.absent("hidden_act", supported()))?;
    table
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, activation)| *activation)
        .ok_or_else(|| fields.unsupported("hidden_act", name, supported()))
}

/// `rope_theta` stands at the top level in published configs, and in `rope_parameters` in those
/// that transformers 5 writes.
fn rope_theta(fields: &Fields<'_>) -> Result<f64, LoadError> {
    let theta = |at: &Fields<'_>| at.number("rope_theta", POSITIVE, |theta| theta > 0.0);
    let full = |at: &Fields<'_>| match at.number("partial_rotary_factor", "a number", |_| true)? {
        Some(factor) if factor != 1.0 => {
            Err(at.unsupported("partial_rotary_factor", factor.to_string(), "1"))
        }
        _ => Ok(()),
    };
    full(fields)?;
    let mut found = theta(fields)?;
    for (key, prefix) in
        [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")]
    {
        let Some(rope) = fields.object(key, prefix)? else { continue };
        for key in ["rope_type", "type"] {
            match rope.string(key)? {
                None | Some("default") => {}
                Some(other) => return Err(rope.unsupported(key, other, "default")),
            }
        }
        // One set of parameters per kind of layer.
        if let Some((kind, value)) = rope.map.iter().find(|(_, value)| value.is_object()) {
            return Err(rope.unsupported(kind, describe(value), "one rope_theta for all layers"));
        }
        if let Some(factor) = rope.get("factor").filter(|factor| factor.as_f64() != Some(1.0)) {
            return Err(rope.unsupported("factor", describe(factor), "none"));
        }
        full(&rope)?;
        match (found, theta(&rope)?) {
            (Some(first), Some(second)) if first != second => {
                return Err(LoadError::invalid(
                    fields.file,
                    format!("{key}.rope_theta"),
                    format!("{first}, the rope_theta found before"),
                    second.to_string(),
                ));
            }
            (_, Some(second)) => found = Some(second),
            _ => {}
        }
    }
    found
        .ok_or_else(|| fields.absent("rope_theta", "a positive number, here or in rope_parameters"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_agree_with_the_table_of_families() {
        for family in [Family::BitNet, Family::Llama] {
            let form = FORMS.iter().find(|form| form.family == family).expect("a form");
            let row = family.row();
            assert_eq!(form.architecture, row.hf_architecture);
            assert_eq!(form.model_type, row.hf_model_type);
            assert_eq!(!form.attention_sub_norm.is_empty(), row.attention_sub_norm);
            assert_eq!(!form.ffn_sub_norm.is_empty(), row.ffn_sub_norm);
        }
    }
}
