//! What stands in a GGUF file before its tensors' bytes: keys and values, and where each tensor is.

use super::Source;
use super::encode::TernaryLayout;
use super::gguf::{ALIGNMENT, Tensor};
use super::vocabulary::Vocabulary;
use crate::checkpoint::gguf::config::every_sixth;
use crate::checkpoint::pooling::Pooling;
use crate::model::config::Family;

/// `general.file_type`: what most of the tensors are. 40 is bitnet.cpp's number; llama.cpp has
/// given it to another type since, and prints it only.
fn file_type(layout: TernaryLayout) -> u32 {
    match layout {
        TernaryLayout::Tq1 => 36,
        TernaryLayout::Tq2 => 37,
        TernaryLayout::I2S => 40,
    }
}

/// Everything before the tensors' bytes, not padded.
pub(super) fn header(
    source: &Source<'_>,
    arch: &str,
    layout: TernaryLayout,
    vocabulary: Option<&Vocabulary>,
    tensors: &[Tensor],
) -> Vec<u8> {
    let mut keys = Keys::default();
    model_keys(&mut keys, source, arch, layout);
    match vocabulary {
        Some(vocabulary) => vocabulary_keys(&mut keys, source, vocabulary),
        // What llama.cpp's converter writes for a model without one.
        None => keys.text("tokenizer.ggml.model", "no_vocab"),
    }
    let mut header = b"GGUF".to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend(keys.count.to_le_bytes());
    header.append(&mut keys.bytes);
    let mut offset = 0u64;
    for tensor in tensors {
        put_text(&mut header, &tensor.name);
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        for &size in &tensor.shape {
            header.extend((size as u64).to_le_bytes());
        }
        header.extend(tensor.id.to_le_bytes());
        header.extend(offset.to_le_bytes());
        offset += tensor.bytes.next_multiple_of(ALIGNMENT);
    }
    header
}

fn model_keys(keys: &mut Keys, source: &Source<'_>, arch: &str, layout: TernaryLayout) {
    let config = source.weights.config();
    let of_arch = |key: &str| format!("{arch}.{key}");
    keys.text("general.architecture", arch);
    keys.text("general.type", "model");
    keys.text("general.name", source.name);
    keys.integer("general.file_type", file_type(layout));
    keys.integer("general.quantization_version", 2);
    for (key, size) in [
        ("vocab_size", config.vocabulary),
        ("context_length", config.context),
        ("embedding_length", config.hidden),
        ("block_count", config.layers),
        ("feed_forward_length", config.ffn),
        ("rope.dimension_count", config.heads.dim),
        ("attention.head_count", config.heads.query),
        ("attention.head_count_kv", config.heads.kv),
        ("attention.key_length", config.heads.dim),
        ("attention.value_length", config.heads.dim),
    ] {
        keys.integer(&of_arch(key), size as u32);
    }
    keys.float(&of_arch("attention.layer_norm_rms_epsilon"), config.rms_eps);
    keys.float(&of_arch("rope.freq_base"), config.rope_theta as f32);
    if config.family == Family::Gemma3 {
        let local = config.attention.local.as_ref();
        // Readers take 0 as no window.
        let window = local.map_or(0, |local| local.window.get());
        keys.integer(&of_arch("attention.sliding_window"), window as u32);
        if let Some(local) = local {
            keys.float(&of_arch("rope.freq_base_swa"), local.rope_theta as f32);
            let pattern = of_arch("attention.sliding_window_pattern");
            if local.layers == every_sixth(config.layers) {
                keys.integer(&pattern, 6);
            } else {
                keys.booleans(&pattern, &local.layers);
            }
        }
    }
    if let Some(pooling) = source.pooled() {
        let kind = match pooling {
            Pooling::Mean => 1,
            Pooling::Cls => 2,
            Pooling::Last => 3,
        };
        keys.integer(&of_arch("pooling_type"), kind);
    }
    if config.family == Family::BitNet {
        let activations = config.family.row().activations.iter();
        let name = activations.clone().find(|(_, known)| *known == config.activation);
        keys.text(&of_arch("hidden_activation"), name.map_or("silu", |(name, _)| name));
    }
}

fn vocabulary_keys(keys: &mut Keys, source: &Source<'_>, vocabulary: &Vocabulary) {
    let of = |key: &str| format!("tokenizer.ggml.{key}");
    keys.text(&of("model"), vocabulary.kind);
    keys.text(&of("pre"), vocabulary.pre);
    keys.texts(&of("tokens"), &vocabulary.tokens);
    if !vocabulary.scores.is_empty() {
        keys.array(&of("scores"), FLOAT, vocabulary.scores.iter().map(|s| s.to_le_bytes()));
    }
    keys.array(&of("token_type"), SIGNED, vocabulary.types.iter().map(|t| t.to_le_bytes()));
    if vocabulary.kind == "gpt2" {
        keys.texts(&of("merges"), &vocabulary.merges);
    }
    for (key, id) in [
        ("bos_token_id", vocabulary.bos),
        ("eos_token_id", vocabulary.eos),
        ("eot_token_id", vocabulary.eot),
        ("unknown_token_id", vocabulary.unknown),
        ("padding_token_id", vocabulary.pad),
    ] {
        if let Some(id) = id {
            keys.integer(&of(key), id);
        }
    }
    keys.boolean(&of("add_bos_token"), vocabulary.add_bos);
    keys.boolean(&of("add_eos_token"), vocabulary.add_eos);
    if let Some(prefix) = vocabulary.add_space_prefix {
        keys.boolean(&of("add_space_prefix"), prefix);
    }
    if let Some(template) = &source.tokenizer.chat_template {
        keys.text("tokenizer.chat_template", template);
    }
    let named: Vec<_> = source.tokenizer.named_chat_templates.iter().collect();
    let named = named.iter().filter(|(name, _)| name != "default");
    let names: Vec<String> = named.clone().map(|(name, _)| name.clone()).collect();
    for (name, template) in named {
        keys.text(&format!("tokenizer.chat_template.{name}"), template);
    }
    if !names.is_empty() {
        keys.texts("tokenizer.chat_templates", &names);
    }
}

/// Types of values.
const UNSIGNED: u32 = 4;
const SIGNED: u32 = 5;
const FLOAT: u32 = 6;
const BOOLEAN: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Keys and values as bytes.
#[derive(Default)]
struct Keys {
    count: u64,
    bytes: Vec<u8>,
}

impl Keys {
    fn key(&mut self, key: &str, kind: u32) {
        self.count += 1;
        put_text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn integer(&mut self, key: &str, value: u32) {
        self.key(key, UNSIGNED);
        self.bytes.extend(value.to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f32) {
        self.key(key, FLOAT);
        self.bytes.extend(value.to_le_bytes());
    }

    fn boolean(&mut self, key: &str, value: bool) {
        self.key(key, BOOLEAN);
        self.bytes.push(u8::from(value));
    }

    fn booleans(&mut self, key: &str, values: &[bool]) {
        self.key(key, ARRAY);
        self.bytes.extend(BOOLEAN.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        self.bytes.extend(values.iter().map(|&value| u8::from(value)));
    }

    fn text(&mut self, key: &str, value: &str) {
        self.key(key, TEXT);
        put_text(&mut self.bytes, value);
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        self.key(key, ARRAY);
        self.bytes.extend(TEXT.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        for value in values {
            put_text(&mut self.bytes, value);
        }
    }

    fn array(&mut self, key: &str, kind: u32, values: impl ExactSizeIterator<Item = [u8; 4]>) {
        self.key(key, ARRAY);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        self.bytes.extend(values.flatten());
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
