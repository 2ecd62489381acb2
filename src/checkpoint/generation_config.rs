//! `generation_config.json`, or the metadata of a GGUF file: what a checkpoint's authors want sampling
//! to start from.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use super::files::Files;
use super::gguf::metadata::Metadata;
use super::json::{Fields, parse_object};
use crate::error::LoadError;

/// Sampling options and token ids that a checkpoint comes with; `None` where it says nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GenerationDefaults {
    /// Whether to sample; greedy otherwise.
    pub do_sample: Option<bool>,
    /// Divides the logits, at least 0.
    pub temperature: Option<f32>,
    /// Keep the fewest tokens whose probabilities reach this, above 0, at most 1.
    pub top_p: Option<f32>,
    /// Keep the k likeliest tokens; 0 keeps all.
    pub top_k: Option<u32>,
    /// Keep tokens with at least this fraction of the highest probability, 0 to 1.
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens seen before, above 0.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end an answer; those of `config.json` where `generation_config.json` has none.
    pub eos_token_ids: Vec<u32>,
    /// Token that begins a text, from the same two files.
    pub bos_token_id: Option<u32>,
    /// Tokens of prompt and answer together.
    pub max_length: Option<usize>,
    /// Tokens of an answer.
    pub max_new_tokens: Option<usize>,
}

const NAME: &str = "generation_config.json";

/// Reads the defaults; `config` is the object of `config.json`.
pub(crate) fn read(
    files: &Files,
    config_file: &Path,
    config: &Map<String, Value>,
) -> Result<GenerationDefaults, LoadError> {
    let file = files.path(NAME);
    let mut defaults = match files.text(NAME)? {
        Some(text) => {
            parse(&Fields { file: &file, prefix: "", map: &parse_object(&file, &text)? })?
        }
        None => GenerationDefaults::default(),
    };
    let config = Fields { file: config_file, prefix: "", map: config };
    if defaults.eos_token_ids.is_empty() {
        defaults.eos_token_ids = token_ids(&config, "eos_token_id")?;
    }
    if defaults.bos_token_id.is_none() {
        defaults.bos_token_id = token_id(&config, "bos_token_id")?;
    }
    Ok(defaults)
}

/// Reads what the metadata of a GGUF file say: the ids of tokens that begin a text and that end an
/// answer.
pub(crate) fn of_gguf(metadata: &Metadata) -> Result<GenerationDefaults, LoadError> {
    let token = |key: &str| {
        let id = metadata.integer(&format!("tokenizer.ggml.{key}"), 0..=u64::from(u32::MAX))?;
        Ok::<_, LoadError>(id.map(|id| id as u32))
    };
    let mut eos_token_ids: Vec<u32> = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        eos_token_ids.extend(token(key)?.filter(|id| !eos_token_ids.contains(id)));
    }
    let bos_token_id = token("bos_token_id")?;
    Ok(GenerationDefaults { eos_token_ids, bos_token_id, ..GenerationDefaults::default() })
}

fn parse(fields: &Fields<'_>) -> Result<GenerationDefaults, LoadError> {
    // What counts is the value as f32: 1e-60 is 0 there and 1e60 is infinite.
    let number = |key, expected, accept: fn(f32) -> bool| {
        let accept = |n: f64| (n as f32).is_finite() && accept(n as f32);
        fields.number(key, expected, accept).map(|n| n.map(|n| n as f32))
    };
    let tokens = |key| fields.integer(key, 1..=u64::from(u32::MAX)).map(|n| n.map(|n| n as usize));
    Ok(GenerationDefaults {
        do_sample: fields.boolean("do_sample")?,
        temperature: number("temperature", "a number of at least 0", |t| t >= 0.0)?,
        top_p: number("top_p", "a number above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?,
        top_k: fields.integer("top_k", 0..=u64::from(u32::MAX))?.map(|k| k as u32),
        min_p: number("min_p", "a number from 0 to 1", |p| (0.0..=1.0).contains(&p))?,
        repetition_penalty: number("repetition_penalty", "a number above 0", |p| p > 0.0)?,
        eos_token_ids: token_ids(fields, "eos_token_id")?,
        bos_token_id: token_id(fields, "bos_token_id")?,
        max_length: tokens("max_length")?,
        max_new_tokens: tokens("max_new_tokens")?,
    })
}

fn token_id(fields: &Fields<'_>, key: &str) -> Result<Option<u32>, LoadError> {
    let id = fields
        .get(key)
        .map(|value| as_token(value).ok_or_else(|| fields.wrong(key, "a token id or null", value)));
    id.transpose()
}

fn token_ids(fields: &Fields<'_>, key: &str) -> Result<Vec<u32>, LoadError> {
    let Some(value) = fields.get(key) else { return Ok(Vec::new()) };
    let ids = match value {
        Value::Array(list) => list.iter().map(as_token).collect(),
        one => as_token(one).map(|id| vec![id]),
    };
    ids.ok_or_else(|| fields.wrong(key, "a token id, a list of them or null", value))
}

fn as_token(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}
