//! A tiny, valid GGUF file that tests bend: written here by hand, byte by byte, so that it shares no
//! code with the reader.
#![allow(dead_code, reason = "each test program uses a part")]

use trine::checkpoint::{Checkpoint, Files, open_files};
use trine::error::LoadError;
use trine::tensor::SharedBytes;

pub(crate) const HIDDEN: usize = 256;
pub(crate) const FFN: usize = 64;
pub(crate) const HEAD_DIM: usize = 2;
pub(crate) const VOCABULARY: usize = 3;
pub(crate) const ARCHITECTURE: &str = "bitnet-b1.58";

/// Type ids.
pub(crate) const F32: u32 = 0;
pub(crate) const F16: u32 = 1;
pub(crate) const Q8_0: u32 = 8;
pub(crate) const TQ1_0: u32 = 34;
pub(crate) const TQ2_0: u32 = 35;
pub(crate) const I2_S: u32 = 36;

#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) name: Vec<u8>,
    /// Columns first.
    pub(crate) ne: Vec<u64>,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
    /// Instead of behind the tensor before.
    pub(crate) offset: Option<u64>,
}

#[derive(Clone)]
pub(crate) struct File {
    pub(crate) magic: [u8; 4],
    pub(crate) version: [u8; 4],
    /// Keys, and values with their types before them.
    pub(crate) keys: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) tensors: Vec<Tensor>,
    /// Instead of their number.
    pub(crate) key_count: Option<u64>,
    pub(crate) tensor_count: Option<u64>,
    /// Bytes that the end of the file lacks.
    pub(crate) cut: usize,
}

pub(crate) fn u32_value(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub(crate) fn i32_value(value: i32) -> Vec<u8> {
    [5u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub(crate) fn f32_value(value: f32) -> Vec<u8> {
    [6u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub(crate) fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

pub(crate) fn string_value(text: &[u8]) -> Vec<u8> {
    [8u32.to_le_bytes().to_vec(), string(text)].concat()
}

/// An array of `count` items of a type.
pub(crate) fn array_value(item: u32, count: u64, items: &[u8]) -> Vec<u8> {
    [&9u32.to_le_bytes()[..], &item.to_le_bytes(), &count.to_le_bytes(), items].concat()
}

pub(crate) fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn f16s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| half::f16::from_f32(*value).to_le_bytes()).collect()
}

/// Codes 1, which are zeros, and the scale behind them.
pub(crate) fn i2s(weights: usize, scale: f32) -> Vec<u8> {
    let mut data = vec![0x55; weights / 4];
    data.extend(scale.to_le_bytes());
    data.extend([0; 28]);
    data
}

/// Blocks of codes in bytes of 0x55 and 0xaa by turns, which are −1, 0 and 1 in any of the formats.
pub(crate) fn tq(blocks: usize, bytes: usize, scale: f32) -> Vec<u8> {
    let block: Vec<u8> = (0..bytes - 2)
        .map(|i| if i % 2 == 0 { 0x55 } else { 0xaa })
        .chain(half::f16::from_f32(scale).to_le_bytes())
        .collect();
    block.repeat(blocks)
}

impl File {
    /// A 2B4T of one layer: I2_S, F32 norms and table.
    pub(crate) fn bitnet() -> Self {
        let mut file = Self {
            magic: *b"GGUF",
            version: 3u32.to_le_bytes(),
            keys: Vec::new(),
            tensors: Vec::new(),
            key_count: None,
            tensor_count: None,
            cut: 0,
        };
        file.set("general.architecture", string_value(ARCHITECTURE.as_bytes()));
        for (key, value) in [
            ("vocab_size", VOCABULARY),
            ("context_length", 32),
            ("embedding_length", HIDDEN),
            ("block_count", 1),
            ("feed_forward_length", FFN),
            ("attention.head_count", 1),
            ("attention.head_count_kv", 1),
            ("attention.key_length", HEAD_DIM),
            ("attention.value_length", HEAD_DIM),
            ("rope.dimension_count", HEAD_DIM),
        ] {
            file.set(&format!("{ARCHITECTURE}.{key}"), u32_value(value as u32));
        }
        file.of("attention.layer_norm_rms_epsilon", f32_value(1e-5));
        file.of("rope.freq_base", f32_value(10_000.0));

        let table: Vec<f32> = (0..VOCABULARY * HIDDEN).map(|i| i as f32).collect();
        file.add("token_embd.weight", &[HIDDEN, VOCABULARY], F32, f32s(&table));
        for (name, rows, cols) in [
            ("attn_q", HEAD_DIM, HIDDEN),
            ("attn_k", HEAD_DIM, HIDDEN),
            ("attn_v", HEAD_DIM, HIDDEN),
            ("attn_output", HIDDEN, HEAD_DIM),
            ("ffn_gate", FFN, HIDDEN),
            ("ffn_up", FFN, HIDDEN),
            ("ffn_down", HIDDEN, FFN),
        ] {
            let data = i2s(rows * cols, 0.5);
            file.add(&format!("blk.0.{name}.weight"), &[cols, rows], I2_S, data);
        }
        for (name, width) in [
            ("blk.0.attn_norm", HIDDEN),
            ("blk.0.attn_sub_norm", HEAD_DIM),
            ("blk.0.ffn_norm", HIDDEN),
            ("blk.0.ffn_sub_norm", FFN),
            ("output_norm", HIDDEN),
        ] {
            file.add(&format!("{name}.weight"), &[width], F32, f32s(&vec![1.0; width]));
        }
        file
    }

    /// The same under the architecture `llama`: no sub-norms.
    pub(crate) fn llama() -> Self {
        let mut file = Self::bitnet();
        file.tensors.retain(|tensor| !tensor.name.ends_with(b"sub_norm.weight"));
        for (key, _) in &mut file.keys {
            if let Some(rest) = key.strip_prefix(ARCHITECTURE.as_bytes()) {
                *key = [b"llama", rest].concat();
            }
        }
        file.set("general.architecture", string_value(b"llama"));
        file
    }

    /// The same under the architecture `gemma3`: the norms that a BitNet-embedding has.
    pub(crate) fn gemma3() -> Self {
        let mut file = Self::bitnet();
        file.tensors.retain(|tensor| !tensor.name.ends_with(b"sub_norm.weight"));
        for (key, _) in &mut file.keys {
            if let Some(rest) = key.strip_prefix(ARCHITECTURE.as_bytes()) {
                *key = [b"gemma3", rest].concat();
            }
        }
        file.set("general.architecture", string_value(b"gemma3"));
        file.set("gemma3.attention.sliding_window", u32_value(8));
        for (name, width) in [
            ("attn_q_norm", HEAD_DIM),
            ("attn_k_norm", HEAD_DIM),
            ("post_attention_norm", HIDDEN),
            ("post_ffw_norm", HIDDEN),
            ("attn_q_norm_in", HIDDEN),
            ("attn_k_norm_in", HIDDEN),
            ("attn_v_norm_in", HIDDEN),
            ("attn_output_norm_in", HEAD_DIM),
            ("ffn_gate_norm_in", HIDDEN),
            ("ffn_up_norm_in", HIDDEN),
            ("ffn_down_norm_in", FFN),
        ] {
            file.add(&format!("blk.0.{name}.weight"), &[width], F32, f32s(&vec![1.0; width]));
        }
        file
    }

    /// Sets a key.
    pub(crate) fn set(&mut self, key: &str, value: Vec<u8>) {
        self.unset(key);
        self.keys.push((key.into(), value));
    }

    /// Sets a key of the architecture.
    pub(crate) fn of(&mut self, key: &str, value: Vec<u8>) {
        self.set(&format!("{ARCHITECTURE}.{key}"), value);
    }

    pub(crate) fn unset(&mut self, key: &str) {
        self.keys.retain(|(other, _)| other != key.as_bytes());
    }

    pub(crate) fn add(&mut self, name: &str, ne: &[usize], kind: u32, data: Vec<u8>) {
        let ne = ne.iter().map(|n| *n as u64).collect();
        self.tensors.push(Tensor { name: name.into(), ne, kind, data, offset: None });
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.tensors.retain(|tensor| tensor.name != name.as_bytes());
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Tensor {
        let tensor = self.tensors.iter_mut().find(|tensor| tensor.name == name.as_bytes());
        tensor.expect("a tensor of that name")
    }

    /// Gives a tensor other data.
    pub(crate) fn store(&mut self, name: &str, kind: u32, data: Vec<u8>) {
        let tensor = self.tensor(name);
        (tensor.kind, tensor.data) = (kind, data);
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut file = [self.magic, self.version].concat();
        file.extend(self.tensor_count.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        file.extend(self.key_count.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            file.extend([string(key), value.clone()].concat());
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            file.extend(
                [string(&tensor.name), (tensor.ne.len() as u32).to_le_bytes().into()].concat(),
            );
            file.extend(tensor.ne.iter().flat_map(|n| n.to_le_bytes()));
            file.extend(tensor.kind.to_le_bytes());
            file.extend(tensor.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&tensor.data);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        file.truncate(file.len() - self.cut);
        file
    }

    pub(crate) fn open(&self) -> Result<Checkpoint, LoadError> {
        let files = vec![("m.gguf".to_owned(), SharedBytes::new(self.bytes()))];
        let checkpoint = open_files(Files::Memory { label: "".into(), files })?;
        checkpoint.verify()?;
        Ok(checkpoint)
    }
}
