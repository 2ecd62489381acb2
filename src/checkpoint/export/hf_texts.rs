//! What stands in a Hugging Face folder beside the weights: `config.json`, and the files about text and
//! sampling.
//!
//! Keys: transformers 5.23, `models/{bitnet,llama,qwen3,gemma3}/configuration_*.py`.

use serde_json::{Map, Value, json};

use super::Source;
use crate::checkpoint::hf::config::{FULL, SLIDING};
use crate::checkpoint::hf::form::Form;
use crate::checkpoint::pooling::{self, DeclaredPooling};
use crate::error::ExportError;
use crate::model::config::{Attention, Family, ModelConfig};
use crate::tensor::SharedBytes;
use crate::text::Tokenizer;

/// Files about text and sampling, which are copied.
pub(super) const COMPANIONS: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

/// `config.json`, and the files about text and sampling; `dtype` is that of the embedding table.
pub(super) fn texts(
    source: &Source<'_>,
    form: &Form,
    dtype: &str,
) -> Result<Vec<(String, SharedBytes)>, ExportError> {
    let pretty = |value: &Value| SharedBytes::new(format!("{value:#}\n").into_bytes());
    let mut texts = vec![("config.json".to_owned(), pretty(&config_json(source, form, dtype)?))];
    // Beside a GGUF file there is nothing that says its pooling.
    let by_key = matches!(
        source.pooling,
        DeclaredPooling::Declared { field, .. } if field.ends_with(pooling::KEY)
    );
    if let Some(files) = source.files {
        let modules = if by_key { Vec::new() } else { pooling::files_of_modules(files)? };
        for name in COMPANIONS.iter().map(|name| (*name).to_owned()).chain(modules) {
            if let Some(bytes) = files.map(&name)? {
                texts.push((name, bytes));
            }
        }
        if !by_key {
            return Ok(texts);
        }
    } else {
        texts.push(("generation_config.json".into(), pretty(&generation(source))));
        if let Some((_, bytes)) = source.tokenizer()? {
            texts.push(("tokenizer.json".into(), bytes));
            texts.push(("tokenizer_config.json".into(), pretty(&tokenizer_config(source))));
        }
    }
    if let Some(pooling) = source.pooled() {
        let modules = pooling::modules(pooling, source.weights.config().hidden);
        texts.extend(modules.into_iter().map(|(name, json)| (name.to_owned(), pretty(&json))));
    }
    Ok(texts)
}

fn config_json(source: &Source<'_>, form: &Form, dtype: &str) -> Result<Value, ExportError> {
    let config = source.weights.config();
    let activations = config.family.row().activations.iter();
    let activation = activations.clone().find(|(_, known)| *known == config.activation);
    let torch = match dtype {
        "F16" => "float16",
        "F32" => "float32",
        _ => "bfloat16",
    };
    let [bos, eos, pad] = special_ids(source)?;
    let theta = config.rope_theta;
    let mut json = json!({
        "architectures": [form.architecture],
        "model_type": form.model_type,
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads.query,
        "num_key_value_heads": config.heads.kv,
        "head_dim": config.heads.dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": decimal(config.rms_eps),
        // Once where transformers 4 looks, once where transformers 5 does.
        "rope_theta": theta,
        "rope_parameters": { "rope_type": "default", "rope_theta": theta },
        "hidden_act": activation.map(|(name, _)| name),
        "attention_bias": false,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "torch_dtype": torch,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": ["lm_head"],
        },
    });
    if config.family.row().projection_norms {
        json["quantization_config"]["use_rms_norm"] = true.into();
        json["quantization_config"]["rms_norm_eps"] = decimal(config.rms_eps).into();
    }
    match (config.family, &config.attention) {
        (Family::Gemma3, attention) => gemma(&mut json, config, attention)?,
        (_, Attention { scale: None, local: None }) => {}
        (Family::Qwen3, Attention { scale: None, local: Some(local) })
            if local.rope_theta == config.rope_theta =>
        {
            json["use_sliding_window"] = true.into();
            json["sliding_window"] = local.window.get().into();
            json["layer_types"] = layer_types(config);
        }
        _ => return Err(no_key("its attention", "it has a scale or windows of its own")),
    }
    Ok(json)
}

/// What Gemma 3 has keys of its own for.
fn gemma(json: &mut Value, config: &ModelConfig, attention: &Attention) -> Result<(), ExportError> {
    let scale = config.attention_scale();
    let wide = 1.0 / f64::from(scale).powi(2);
    // Published ones are integers, and transformers has no others.
    let scalar = [wide.round(), wide].into_iter().find(|x| (1.0 / x.sqrt()) as f32 == scale);
    let Some(scalar) = scalar else {
        let reason = format!("no query_pre_attn_scalar gives {scale}");
        return Err(no_key("what scores are multiplied by", &reason));
    };
    let rope = |theta: f64| json!({ "rope_type": "default", "rope_theta": theta });
    let full = config.rope_theta;
    let local = attention.local.as_ref();
    let theta = local.map_or(full, |local| local.rope_theta);
    json["layer_types"] = layer_types(config);
    // Where no layer has a window nothing reads it.
    json["sliding_window"] = local.map_or(config.context, |local| local.window.get()).into();
    json["query_pre_attn_scalar"] =
        if scalar.fract() == 0.0 { (scalar as u64).into() } else { scalar.into() };
    json["rope_local_base_freq"] = theta.into();
    json["rope_parameters"] = json!({ FULL: rope(full), SLIDING: rope(theta) });
    json["hidden_activation"] = json["hidden_act"].take();
    json["use_bidirectional_attention"] = false.into();
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        json[key] = Value::Null;
    }
    Ok(())
}

/// The kind of attention of each layer.
fn layer_types(config: &ModelConfig) -> Value {
    let kinds = |layer| if config.window(layer).is_some() { SLIDING } else { FULL };
    (0..config.layers).map(kinds).collect()
}

fn no_key(what: &str, reason: &str) -> ExportError {
    ExportError::Unfit {
        what: what.to_owned(),
        reason: reason.to_owned(),
        instead: "there is no key for it in config.json".into(),
    }
}

/// The f64 whose shortest decimal is that of the f32, so that 1e-5 is not written as
/// 9.999999747378752e-6.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// BOS, EOS and padding: one id, a list, or null.
fn special_ids(source: &Source<'_>) -> Result<[Value; 3], ExportError> {
    let generation = source.generation;
    let text = source.tokenizer;
    let tokenizer = text.tokenizer()?;
    let tokenizer = tokenizer.as_ref();
    let bos = generation.bos_token_id.or_else(|| tokenizer?.bos_id());
    let eos = match generation.eos_token_ids[..] {
        [] => json!(tokenizer.and_then(Tokenizer::eos_id)),
        [one] => json!(one),
        ref several => json!(several),
    };
    let pad = text.pad_token.as_deref().and_then(|pad| tokenizer?.token_id(pad));
    Ok([json!(bos), eos, json!(pad)])
}

fn generation(source: &Source<'_>) -> Value {
    let given = source.generation;
    let mut map = Map::new();
    let mut put = |key: &str, value: Value| {
        if !value.is_null() && value != json!([]) {
            map.insert(key.to_owned(), value);
        }
    };
    let number = |value: Option<f32>| json!(value.map(decimal));
    put("bos_token_id", json!(given.bos_token_id));
    put("eos_token_id", json!(given.eos_token_ids));
    put("do_sample", json!(given.do_sample));
    put("temperature", number(given.temperature));
    put("top_p", number(given.top_p));
    put("top_k", json!(given.top_k));
    put("min_p", number(given.min_p));
    put("repetition_penalty", number(given.repetition_penalty));
    put("max_length", json!(given.max_length));
    put("max_new_tokens", json!(given.max_new_tokens));
    Value::Object(map)
}

fn tokenizer_config(source: &Source<'_>) -> Value {
    let text = source.tokenizer;
    let mut map = Map::new();
    map.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    map.insert("clean_up_tokenization_spaces".into(), false.into());
    map.insert("model_max_length".into(), source.weights.config().context.into());
    let mut put = |key: &str, value: Value| {
        if !value.is_null() {
            map.insert(key.to_owned(), value);
        }
    };
    put("bos_token", json!(text.bos_token));
    put("eos_token", json!(text.eos_token));
    put("pad_token", json!(text.pad_token));
    put("add_bos_token", json!(text.add_bos_token));
    put("add_eos_token", json!(text.add_eos_token));
    let list: Vec<Value> = text
        .named_chat_templates
        .iter()
        .map(|(name, template)| json!({ "name": name, "template": template }))
        .collect();
    if list.is_empty() {
        put("chat_template", json!(text.chat_template));
    } else {
        put("chat_template", list.into());
    }
    Value::Object(map)
}
