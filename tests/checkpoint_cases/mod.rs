//! Tables of broken checkpoints, and the ways to break them.

pub(crate) mod config;
pub(crate) mod container;
pub(crate) mod gguf;
pub(crate) mod lora;
mod places;
pub(crate) mod pooling;
pub(crate) mod tensors;
pub(crate) mod text;

use serde_json::{Value, json};

use crate::checkpoint_base::{Base, raw_container};

/// What is wrong, how it gets wrong, and the sentence that it must produce: whole, but for the
/// folder before it. A `*` stands for words of another library.
pub(crate) type Case = (&'static str, fn(&mut Base), &'static str);

pub(crate) fn replace(base: &mut Base, file: &str, bytes: &[u8]) {
    base.files.insert(file.into(), bytes.to_vec());
}

/// A weight file with a header of its own before 16 bytes of data.
pub(crate) fn header(base: &mut Base, header: &str) {
    replace(base, "model.safetensors", &raw_container(header, &[0; 16]));
}

pub(crate) fn claimed_length(base: &mut Base, length: u64, rest: &[u8]) {
    let mut file = length.to_le_bytes().to_vec();
    file.extend_from_slice(rest);
    replace(base, "model.safetensors", &file);
}

/// Rewrites the index of a checkpoint in two shards.
pub(crate) fn index(base: &mut Base, weight_map: Value) {
    base.shards = 2;
    let index = json!({ "weight_map": weight_map }).to_string();
    replace(base, "model.safetensors.index.json", index.as_bytes());
}

pub(crate) fn generation(base: &mut Base, key: &str, value: Value) {
    base.generation = Some(json!({ key: value }));
}

pub(crate) fn tokenizer(base: &mut Base, key: &str, value: Value) {
    base.tokenizer_config = Some(json!({ key: value }));
}
