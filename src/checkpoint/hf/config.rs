//! `config.json` of a Hugging Face folder: hyper-parameters and quantisation.
//!
//! Sources: transformers 5.23, `models/{bitnet,llama,qwen3,gemma3}/configuration_*.py`,
//! `utils/quantization_config.py` (`BitNetQuantConfig`), `modeling_rope_utils.py`, and the configs
//! of published checkpoints. A key that would change what the model computes, and whose meaning is
//! not implemented here, is an error; keys that change nothing are not looked at.

use std::num::NonZeroUsize;
use std::path::Path;

use serde_json::{Map, Value};

use super::form::{Form, Quantization, Without, form};
use crate::backend::ops::{Activation, Heads};
use crate::checkpoint::json::{Fields, describe, quote};
use crate::error::LoadError;
use crate::model::config::{Attention, Family, LocalLayers, MAX_SIZE, ModelConfig};

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
    refuse_variants(&fields, form)?;

    let size = |key| fields.required_integer(key, SIZE).map(|n| n as usize);
    let layers = size("num_hidden_layers")?;
    let context = size("max_position_embeddings")?;
    let rope_base = rope_theta(&fields, FULL, 1e6, form)?;
    let local = match (windows(&fields, form, layers, context, &mut assumed)?, form.family) {
        (None, _) => None,
        (Some((window, layers)), Family::Gemma3) => {
            let rope_theta = rope_theta(&fields, SLIDING, 1e4, form)?;
            Some(LocalLayers { window, rope_theta, layers })
        }
        (Some((window, layers)), _) => Some(LocalLayers { window, rope_theta: rope_base, layers }),
    };
    let hidden = size("hidden_size")?;
    let model = ModelConfig {
        family: form.family,
        hidden,
        ffn: size("intermediate_size")?,
        layers,
        heads: heads(&fields, form, hidden, &mut assumed)?,
        vocabulary: size("vocab_size")?,
        context,
        rms_eps: fields
            .number("rms_norm_eps", POSITIVE, |eps| eps > 0.0)?
            .ok_or_else(|| fields.absent("rms_norm_eps", POSITIVE))? as f32,
        rope_theta: rope_base,
        activation: activation(&fields, form)?,
        tied_head: true,
        attention: Attention { scale: attention_scale(&fields, form, &mut assumed)?, local },
    };
    model
        .validate()
        .map_err(|(field, expected, found)| LoadError::invalid(file, field, expected, found))?;
    let tied = fields.boolean("tie_word_embeddings")?;
    Ok(HfConfig { model, form, quantization, tied, assumed })
}

const POSITIVE: &str = "a positive number";

fn quantization(
    fields: &Fields<'_>,
    form: &Form,
    assumed: &mut Vec<String>,
) -> Result<Quantization, LoadError> {
    let Some(config) = fields.object("quantization_config", "quantization_config.")? else {
        match form.without {
            Without::Refuse => {
                return Err(fields.absent(
                    "quantization_config",
                    "an object with quant_method \"bitnet\", without which a checkpoint has no \
                     ternary weights",
                ));
            }
            Without::Bits => {
                for (key, bits) in [("weight_bits", 1), ("input_bits", 8)] {
                    fields.required_integer(key, bits..=bits)?;
                }
            }
            Without::Norms => assumed.push(
                "quantization_config: float master weights, by the norms before projections".into(),
            ),
        }
        return Ok(Quantization::Master);
    };
    match config.string("quant_method")? {
        Some("bitnet") => {}
        Some(other) => return Err(config.unsupported("quant_method", other, "bitnet")),
        None => return Err(config.absent("quant_method", "\"bitnet\"")),
    }
    projection_norms(fields, &config, form)?;
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

/// transformers' `use_rms_norm` puts a norm before each projection, which the family must have.
fn projection_norms(
    fields: &Fields<'_>,
    config: &Fields<'_>,
    form: &Form,
) -> Result<(), LoadError> {
    let (has, has_not) =
        if form.family.row().projection_norms { ("true", "false") } else { ("false", "true") };
    if config.boolean("use_rms_norm")?.unwrap_or(false).to_string() != has {
        return Err(config.unsupported("use_rms_norm", has_not, has));
    }
    // transformers' default is that of `BitNetQuantConfig`.
    let eps = config.number("rms_norm_eps", POSITIVE, |eps| eps > 0.0)?.unwrap_or(1e-6);
    let of_model = fields.number("rms_norm_eps", POSITIVE, |eps| eps > 0.0)?;
    match of_model.filter(|&of_model| has == "true" && of_model != eps) {
        Some(of_model) => {
            let supported = format!("{of_model}, that of the model");
            Err(config.unsupported("rms_norm_eps", eps.to_string(), supported))
        }
        None => Ok(()),
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
fn refuse_variants(fields: &Fields<'_>, form: &Form) -> Result<(), LoadError> {
    for key in ["attention_bias", "mlp_bias", "use_bidirectional_attention"] {
        if fields.boolean(key)? == Some(true) {
            return Err(fields.unsupported(key, "true", "false"));
        }
    }
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if let Some(cap) = fields.number(key, "a number", |_| true)? {
            return Err(fields.unsupported(key, cap.to_string(), "null"));
        }
    }
    let windows = match form.family {
        Family::Gemma3 => true,
        Family::Qwen3 => qwen_has_windows(fields)?,
        Family::BitNet | Family::Llama => false,
    };
    if !windows
        && let Some(types) = fields.strings("layer_types")?
        && let Some(other) = types.iter().find(|name| **name != FULL)
    {
        return Err(fields.unsupported("layer_types", *other, FULL));
    }
    Ok(())
}

/// Kinds of layers, as `layer_types` and `rope_parameters` call them.
pub(crate) const FULL: &str = "full_attention";
pub(crate) const SLIDING: &str = "sliding_attention";

/// The sliding window, in keys, and which layers see no more; `None` if all see all.
///
/// Of the families here Gemma 3 has windows, and Qwen3 where the config switches them on; the classes
/// of the others do not look at the key, so a window that would matter is not what the checkpoint
/// was trained with.
fn windows(
    fields: &Fields<'_>,
    form: &Form,
    layers: usize,
    context: usize,
    assumed: &mut Vec<String>,
) -> Result<Option<(NonZeroUsize, Vec<bool>)>, LoadError> {
    let window = fields.integer("sliding_window", 0..=u64::MAX)?;
    let local = match form.family {
        Family::Gemma3 => {
            let mut pattern = None;
            for key in ["sliding_window_pattern", "_sliding_window_pattern"] {
                pattern = pattern.or(fields.integer(key, SIZE)?);
            }
            let pattern = pattern.unwrap_or(6) as usize;
            local_layers(fields, layers, |layer| !(layer + 1).is_multiple_of(pattern))?
        }
        Family::Qwen3 if !qwen_has_windows(fields)? => return Ok(None),
        Family::Qwen3 => {
            let all = fields.integer("max_window_layers", 0..=u64::MAX)?.unwrap_or(28);
            local_layers(fields, layers, |layer| layer as u64 >= all)?
        }
        Family::BitNet | Family::Llama => {
            return match window.filter(|&window| window < context as u64) {
                None => Ok(None),
                Some(window) => Err(fields.unsupported(
                    "sliding_window",
                    format!("{window}, less than max_position_embeddings"),
                    format!("null or at least {context}"),
                )),
            };
        }
    };
    if !local.contains(&true) {
        return Ok(None);
    }
    let window = window.unwrap_or_else(|| {
        assumed.push("sliding_window: 4096".into());
        4096
    });
    let window = usize::try_from(window).ok().and_then(NonZeroUsize::new);
    let window =
        window.ok_or_else(|| fields.unsupported("sliding_window", "0", "null or at least 1"))?;
    Ok(Some((window, local)))
}

/// Whether a Qwen3's windows are switched on. A window of null says that there are none.
fn qwen_has_windows(fields: &Fields<'_>) -> Result<bool, LoadError> {
    let none = fields.map.get("sliding_window").is_some_and(Value::is_null);
    Ok(fields.boolean("use_sliding_window")? == Some(true) && !none)
}

/// Which layers see a window: those that `layer_types` names, else those that the rule says.
fn local_layers(
    fields: &Fields<'_>,
    layers: usize,
    rule: impl Fn(usize) -> bool,
) -> Result<Vec<bool>, LoadError> {
    let Some(types) = fields.strings("layer_types")? else {
        return Ok((0..layers).map(rule).collect());
    };
    if types.len() != layers {
        let expected = format!("{layers}, one for each layer");
        let found = types.len().to_string();
        return Err(LoadError::invalid(fields.file, "layer_types", expected, found));
    }
    let local = |name: &&str| match *name {
        FULL => Ok(false),
        SLIDING => Ok(true),
        other => {
            Err(fields.unsupported("layer_types", quote(other, 100), format!("{FULL}, {SLIDING}")))
        }
    };
    types.iter().map(local).collect()
}

/// Gemma 3 multiplies scores by `query_pre_attn_scalar` to the power of −1/2.
fn attention_scale(
    fields: &Fields<'_>,
    form: &Form,
    assumed: &mut Vec<String>,
) -> Result<Option<f32>, LoadError> {
    if form.family != Family::Gemma3 {
        return Ok(None);
    }
    let scalar = fields.number("query_pre_attn_scalar", POSITIVE, |scalar| scalar > 0.0)?;
    Ok(Some(
        1.0 / scalar
            .unwrap_or_else(|| {
                assumed.push("query_pre_attn_scalar: 256".into());
                256.0
            })
            .sqrt() as f32,
    ))
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
    // transformers' defaults.
    let default = match form.family {
        Family::Qwen3 => Some(128),
        Family::Gemma3 => Some(256),
        _ => None,
    };
    let dim = match fields.integer("head_dim", SIZE)?.or(default) {
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
    // Gemma's key, which goes before the older one.
    let key = match fields.string("hidden_activation")? {
        Some(_) if form.family == Family::Gemma3 => "hidden_activation",
        _ => "hidden_act",
    };
    let name = fields.string(key)?.ok_or_else(|| fields.absent(key, supported()))?;
    table
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, activation)| *activation)
        .ok_or_else(|| fields.unsupported(key, name, supported()))
}

/// The base of the rotation in layers of a kind.
///
/// `rope_theta` stands at the top level in published configs, and in `rope_parameters` in those
/// that transformers 5 writes. Gemma 3 has two: the other is `rope_local_base_freq`, or there is a set
/// of `rope_parameters` for each kind of layer; `default` is transformers' where it has neither.
fn rope_theta(
    fields: &Fields<'_>,
    kind: &str,
    default: f64,
    form: &Form,
) -> Result<f64, LoadError> {
    let gemma = form.family == Family::Gemma3;
    let key = if kind == SLIDING { "rope_local_base_freq" } else { "rope_theta" };
    let theta = |at: &Fields<'_>, key| at.number(key, POSITIVE, |theta| theta > 0.0);
    let full = |at: &Fields<'_>| match at.number("partial_rotary_factor", "a number", |_| true)? {
        Some(factor) if factor != 1.0 => {
            Err(at.unsupported("partial_rotary_factor", factor.to_string(), "1"))
        }
        _ => Ok(()),
    };
    full(fields)?;
    let mut found = theta(fields, key)?;
    for (key, prefix) in
        [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")]
    {
        let Some(rope) = fields.object(key, prefix)? else { continue };
        let of_kind = match kind {
            SLIDING => "rope_parameters.sliding_attention.",
            _ => "rope_parameters.full_attention.",
        };
        let rope = match rope.object(kind, of_kind)? {
            Some(of_kind) if gemma => of_kind,
            // The set of the other kind alone.
            None if gemma && [FULL, SLIDING].iter().any(|kind| rope.map.contains_key(*kind)) => {
                continue;
            }
            _ => rope,
        };
        for key in ["rope_type", "type"] {
            match rope.string(key)? {
                None | Some("default") => {}
                Some("linear") if rope.get("factor").and_then(Value::as_f64) == Some(1.0) => {}
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
        match (found, theta(&rope, "rope_theta")?) {
            (Some(first), Some(second)) if first != second => {
                return Err(LoadError::invalid(
                    fields.file,
                    format!("{}rope_theta", rope.prefix),
                    format!("{first}, the rope_theta found before"),
                    second.to_string(),
                ));
            }
            (_, Some(second)) => found = Some(second),
            _ => {}
        }
    }
    found
        .or(gemma.then_some(default))
        .ok_or_else(|| fields.absent("rope_theta", "a positive number, here or in rope_parameters"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gemma(change: impl Fn(&mut Map<String, Value>)) -> Result<HfConfig, LoadError> {
        let json = serde_json::json!({
            "architectures": ["Gemma3TextModel"], "model_type": "gemma3_text", "vocab_size": 100,
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7,
            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32_768,
            "query_pre_attn_scalar": 16, "sliding_window": 512, "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        });
        let Value::Object(mut map) = json else { unreachable!("an object") };
        change(&mut map);
        parse(Path::new("config.json"), &map)
    }

    #[test]
    fn layers_see_windows_and_the_context_is_whole() {
        let config = gemma(|_| ()).expect("valid");
        assert_eq!(config.model.context, 32_768);
        assert_eq!(config.model.attention_scale(), 0.25);
        assert_eq!(config.model.embedding_scale(), 8.0);
        let window = |layer| config.model.window(layer).map(NonZeroUsize::get);
        assert_eq!((window(0), window(5)), (Some(512), None));
        let local = config.model.attention.local.as_ref().expect("local layers");
        // All but every sixth.
        assert_eq!(local.layers, [true, true, true, true, true, false, true]);
        assert_eq!((config.model.rope_theta, local.rope_theta), (1e6, 1e4));

        let all = gemma(|map| _ = map.insert("layer_types".into(), vec![FULL; 7].into()));
        let all = all.expect("valid").model;
        assert_eq!((all.context, all.attention.local), (32_768, None));
        let few = gemma(|map| _ = map.insert("layer_types".into(), vec![FULL; 6].into()));
        assert!(few.expect_err("too few").to_string().contains("7, one for each layer"));
    }

    #[test]
    fn rope_parameters_of_each_kind_of_layer() {
        let config = gemma(|map| {
            map.remove("rope_theta");
            map.remove("rope_local_base_freq");
            let kind =
                |theta: f64| serde_json::json!({"rope_type": "default", "rope_theta": theta});
            let both = serde_json::json!({FULL: kind(3e6), SLIDING: kind(2e4)});
            map.insert("rope_parameters".into(), both);
        });
        let model = config.expect("valid").model;
        assert_eq!(model.rope_theta, 3e6);
        assert_eq!(model.attention.local.expect("local layers").rope_theta, 2e4);
        let both = gemma(|map| {
            let other = serde_json::json!({SLIDING: {"rope_theta": 2e4}});
            map.insert("rope_parameters".into(), other);
        });
        let error = both.expect_err("two bases").to_string();
        assert!(error.contains("rope_parameters.sliding_attention.rope_theta"), "{error}");
    }

    #[test]
    fn what_changes_a_gemma_is_refused() {
        for (key, value) in [
            ("final_logit_softcapping", Value::from(30.0)),
            ("use_bidirectional_attention", true.into()),
            ("hidden_activation", "gelu".into()),
            ("query_pre_attn_scalar", 0.into()),
            ("sliding_window", 0.into()),
        ] {
            let error = gemma(|map| _ = map.insert(key.into(), value.clone())).expect_err(key);
            assert!(error.to_string().contains(key), "{key}: {error}");
        }
        let derived = gemma(|map| {
            map.insert("architectures".into(), vec!["BitGemma3Model"].into());
        });
        let said = derived.expect("a class of its own").assumed.join("\n");
        assert!(said.contains("BitGemma3Model as Gemma3TextModel"), "{said}");
    }

    #[test]
    fn norms_before_projections_are_of_the_family() {
        let of = |norms: Value, eps: f64| {
            gemma(|map| {
                let config = serde_json::json!({"quant_method": "bitnet", "linear_class":
                    "autobitlinear", "quantization_mode": "online", "use_rms_norm": norms,
                    "rms_norm_eps": eps});
                map.insert("quantization_config".into(), config);
            })
        };
        assert_eq!(of(true.into(), 1e-6).expect("valid").quantization, Quantization::Master);
        let error = of(false.into(), 1e-6).expect_err("none").to_string();
        assert!(error.contains("use_rms_norm"), "{error}");
        let error = of(true.into(), 1e-5).expect_err("two eps").to_string();
        assert!(error.contains("quantization_config.rms_norm_eps"), "{error}");
    }
}
