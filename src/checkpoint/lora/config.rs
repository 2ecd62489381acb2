//! `adapter_config.json`: what of it changes what an adapter computes, and the refusal of what is not
//! plain LoRA.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use crate::checkpoint::hf::weights::PROJECTIONS;
use crate::checkpoint::json::{Fields, describe, quote};
use crate::error::LoadError;
use crate::model::config::{MAX_SIZE, Projection};

/// Fields that say nothing about what an adapter computes, or that are read below.
const KNOWN: &[&str] = &[
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
];

/// Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA)
/// take something out of it, which is not in the adapter's folder.
const INITIALISATIONS: &[&str] = &["gaussian", "eva", "orthogonal"];

/// What the config says about which modules an adapter has.
#[derive(Debug, Default)]
pub(super) struct Targets {
    /// Projections that it has in every layer, where that can be told.
    pub(super) everywhere: Vec<Projection>,
    /// `layers_to_transform`; all layers if absent.
    pub(super) layers: Option<BTreeSet<usize>>,
}

/// What is used of `adapter_config.json`.
pub(super) struct Config<'a> {
    fields: Fields<'a>,
    pub(super) base: Option<String>,
    rank: usize,
    alpha: f64,
    stabilised: bool,
    ranks: Vec<(&'a str, f64)>,
    alphas: Vec<(&'a str, f64)>,
    pub(super) targets: Targets,
}

impl<'a> Config<'a> {
    pub(super) fn parse(file: &'a Path, map: &'a Map<String, Value>) -> Result<Self, LoadError> {
        let fields = Fields { file, prefix: "", map };
        match fields.string("peft_type")? {
            Some("LORA") => {}
            Some(other) => return Err(fields.unsupported("peft_type", quote(other, 100), "LORA")),
            None => return Err(fields.absent("peft_type", "\"LORA\"")),
        }
        refuse_variants(&fields)?;
        let rank = fields.required_integer("r", 1..=MAX_SIZE as u64)? as usize;
        let alpha = fields.number("lora_alpha", "a number", |_| true)?;
        Ok(Self {
            base: fields.string("base_model_name_or_path")?.map(str::to_owned),
            rank,
            alpha: alpha.ok_or_else(|| fields.absent("lora_alpha", "a number"))?,
            stabilised: fields.boolean("use_rslora")?.unwrap_or(false),
            ranks: pattern(&fields, "rank_pattern")?,
            alphas: pattern(&fields, "alpha_pattern")?,
            targets: targets(&fields)?,
            fields,
        })
    }

    /// The rank of a module's matrices, and what multiplies their product.
    pub(super) fn rank_and_scale(&self, module: &str) -> Result<(usize, f64), LoadError> {
        let of = |pattern: &[(&str, f64)], otherwise: f64| {
            let found = pattern.iter().find(|(key, _)| names_module(key, module));
            found.map_or(otherwise, |&(_, value)| value)
        };
        let rank = of(&self.ranks, self.rank as f64);
        let alpha = of(&self.alphas, self.alpha);
        let scale = alpha / if self.stabilised { rank.sqrt() } else { rank };
        if (scale as f32).is_finite() {
            return Ok((rank as usize, scale));
        }
        let found = format!("{alpha} for rank {rank}");
        Err(LoadError::invalid(self.fields.file, "lora_alpha", "a factor within f32", found))
    }
}

/// Whether a key of a pattern means a module: the whole name, or its end from a dot on. (PEFT
/// matches keys as regular expressions in that way; `pattern` lets through those without operators.)
fn names_module(key: &str, module: &str) -> bool {
    module.strip_suffix(key).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// `rank_pattern` or `alpha_pattern`: positive numbers by the names of modules.
fn pattern<'a>(fields: &Fields<'a>, key: &str) -> Result<Vec<(&'a str, f64)>, LoadError> {
    let Some(value) = fields.get(key) else { return Ok(Vec::new()) };
    let Some(map) = value.as_object() else {
        return Err(fields.wrong(key, "an object of numbers", value));
    };
    let mut entries = Vec::new();
    for (name, value) in map {
        if !is_plain(name) {
            let supported = "names of modules, no regular expressions";
            return Err(fields.unsupported(key, name, supported));
        }
        let number = value.as_f64().filter(|&n| n > 0.0 && n <= MAX_SIZE as f64);
        let Some(number) = number.filter(|n| key != "rank_pattern" || n.fract() == 0.0) else {
            let expected = format!("positive numbers, whole ones for ranks, at most {MAX_SIZE}");
            return Err(fields.wrong(key, expected, value));
        };
        entries.push((name.as_str(), number));
    }
    Ok(entries)
}

/// Whether a name holds no operator of a regular expression but the dot, which means itself too.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// `target_modules` and what narrows it down. A string is a regular expression, or `all-linear`;
/// which modules it meant the tensors tell.
fn targets(fields: &Fields<'_>) -> Result<Targets, LoadError> {
    let mut targets = Targets::default();
    let layers = |value: &Value| value.as_u64().map(|n| n as usize).filter(|&n| n <= MAX_SIZE);
    targets.layers = match fields.get("layers_to_transform") {
        None => None,
        Some(value) => {
            let some = match value.as_array() {
                Some(list) => list.iter().map(layers).collect::<Option<BTreeSet<usize>>>(),
                None => layers(value).map(|layer| BTreeSet::from([layer])),
            };
            let expected = "a layer or a list of layers";
            Some(some.ok_or_else(|| fields.wrong("layers_to_transform", expected, value))?)
        }
    };
    if fields.get("target_modules").is_some_and(Value::is_string) {
        return Ok(targets);
    }
    let Some(names) = fields.strings("target_modules")? else { return Ok(targets) };
    // Names that other fields take out again.
    let narrowed = fields.get("exclude_modules").is_some_and(is_set);
    for name in names {
        let last = |module: &str| module.rsplit('.').next().map(str::to_owned);
        let Some((projection, module)) = PROJECTIONS.iter().find(|(_, m)| last(m) == last(name))
        else {
            return Err(fields.unsupported(
                "target_modules",
                name,
                "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj",
            ));
        };
        // `q_proj` and `self_attn.q_proj` mean every layer; longer names one of them.
        if !narrowed && names_module(name, module) {
            targets.everywhere.push(*projection);
        }
    }
    Ok(targets)
}

/// Whether a field is there with anything that could mean something.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => true,
    }
}

/// Refuses what is not plain LoRA, fields of a later PEFT among it.
fn refuse_variants(fields: &Fields<'_>) -> Result<(), LoadError> {
    match fields.get("bias") {
        None => {}
        Some(Value::String(bias)) if bias == "none" => {}
        Some(other) => return Err(fields.unsupported("bias", describe(other), "\"none\"")),
    }
    if let Some(value) = fields.get("modules_to_save").filter(|value| is_set(value)) {
        let supported = "an adapter that has none: matrices of projections alone";
        return Err(fields.unsupported("modules_to_save", describe(value), supported));
    }
    match fields.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => {}
        Some(Value::String(name)) if INITIALISATIONS.contains(&name.as_str()) => {}
        Some(other) => {
            let supported = "true, false, gaussian, eva and orthogonal, which leave the base as it \
                             is; PEFT can convert others to plain LoRA when it saves them";
            return Err(fields.unsupported("init_lora_weights", describe(other), supported));
        }
    }
    for (key, value) in fields.map {
        // Settings of an initialisation that was accepted above.
        let setting = matches!(key.as_str(), "eva_config" | "loftq_config");
        if !KNOWN.contains(&key.as_str()) && !setting && is_set(value) {
            let (key, supported) = (quote(key, 100), "plain LoRA, without this field");
            return Err(fields.unsupported(&key, describe(value), supported));
        }
    }
    Ok(())
}
