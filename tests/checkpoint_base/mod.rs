//! A tiny, valid Hugging Face checkpoint that tests bend: written here by hand, byte by byte, so
//! that it shares no code with the reader.
#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

pub(crate) const HIDDEN: usize = 8;
pub(crate) const FFN: usize = 12;
pub(crate) const LAYERS: usize = 2;
pub(crate) const HEADS: usize = 2;
pub(crate) const KV_HEADS: usize = 1;
pub(crate) const HEAD_DIM: usize = 4;
pub(crate) const VOCABULARY: usize = 5;

/// Projections, rows and columns.
pub(crate) const PROJECTIONS: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
    ("mlp.gate_proj", FFN, HIDDEN),
    ("mlp.up_proj", FFN, HIDDEN),
    ("mlp.down_proj", HIDDEN, FFN),
];

#[derive(Clone)]
pub(crate) struct Tensor {
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

#[derive(Clone)]
pub(crate) struct Base {
    pub(crate) config: Value,
    pub(crate) generation: Option<Value>,
    pub(crate) tokenizer_config: Option<Value>,
    pub(crate) tensors: BTreeMap<String, Tensor>,
    /// Written last, over what is there.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// Number of weight files; more than one brings an index.
    pub(crate) shards: usize,
}

/// The ternary weight of a matrix at a place.
pub(crate) fn weight(layer: usize, projection: &str, row: usize, col: usize) -> i32 {
    let name = projection.bytes().map(usize::from).sum::<usize>();
    ((layer * 5 + name * 3 + row * 7 + col * 11 + row * col) % 3) as i32 - 1
}

/// The scale of a matrix as the model means it: exact in bf16 and f16, and so is its reciprocal.
pub(crate) fn multiplier(layer: usize, projection: &str) -> f32 {
    [0.5, 0.25, 2.0, 4.0][(layer + projection.len()) % 4]
}

pub(crate) fn floats(dtype: &'static str, shape: &[usize], value: impl Fn(usize) -> f32) -> Tensor {
    let bytes = (0..shape.iter().product())
        .flat_map(|i| match dtype {
            "F32" => value(i).to_le_bytes().to_vec(),
            "BF16" => half::bf16::from_f32(value(i)).to_le_bytes().to_vec(),
            "F16" => half::f16::from_f32(value(i)).to_le_bytes().to_vec(),
            _ => panic!("{dtype}"),
        })
        .collect();
    Tensor { dtype, shape: shape.to_vec(), bytes }
}

/// Four rows to a byte, as transformers packs.
pub(crate) fn packed(layer: usize, projection: &str, rows: usize, cols: usize) -> Tensor {
    let stored = rows / 4;
    let byte = |r: usize, c: usize| {
        (0..4).fold(0, |byte, k| {
            byte | ((weight(layer, projection, r + k * stored, c) + 1) as u8) << (2 * k)
        })
    };
    let bytes = (0..stored * cols).map(|i| byte(i / cols, i % cols)).collect();
    Tensor { dtype: "U8", shape: vec![stored, cols], bytes }
}

impl Base {
    /// The form of 2B4T: packed, scales multiply, sub-norms, tied.
    pub(crate) fn bitnet() -> Self {
        let mut base = Self {
            config: json!({
                "architectures": ["BitNetForCausalLM"],
                "model_type": "bitnet",
                "hidden_size": HIDDEN,
                "intermediate_size": FFN,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": KV_HEADS,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 64,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
                "hidden_act": "relu2",
                "tie_word_embeddings": true,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "quantization_config": {
                    "quant_method": "bitnet",
                    "linear_class": "autobitlinear",
                    "quantization_mode": "offline",
                },
            }),
            generation: None,
            tokenizer_config: None,
            tensors: BTreeMap::new(),
            files: BTreeMap::new(),
            shards: 1,
        };
        let gain = |width: usize| floats("BF16", &[width], |i| 1.0 + i as f32 / 16.0);
        base.add("model.embed_tokens.weight", embedding("BF16"));
        base.add("model.norm.weight", gain(HIDDEN));
        for layer in 0..LAYERS {
            let prefix = format!("model.layers.{layer}");
            for (norm, width) in [
                ("input_layernorm", HIDDEN),
                ("self_attn.attn_sub_norm", HEADS * HEAD_DIM),
                ("post_attention_layernorm", HIDDEN),
                ("mlp.ffn_sub_norm", FFN),
            ] {
                base.add(&format!("{prefix}.{norm}.weight"), gain(width));
            }
            for (name, rows, cols) in PROJECTIONS {
                base.add(&format!("{prefix}.{name}.weight"), packed(layer, name, rows, cols));
                let scale = multiplier(layer, name);
                base.add(&format!("{prefix}.{name}.weight_scale"), floats("BF16", &[1], |_| scale));
            }
        }
        base
    }

    /// The form of Llama3-8B-1.58: packed, scales divide, no sub-norms, a head of its own.
    pub(crate) fn llama() -> Self {
        let mut base = Self::bitnet();
        base.set("architectures", json!(["LlamaForCausalLM"]));
        base.set("model_type", json!("llama"));
        base.set("hidden_act", json!("silu"));
        base.set("tie_word_embeddings", json!(false));
        base.set("quantization_config", json!({ "quant_method": "bitnet" }));
        base.tensors.retain(|name, _| !name.contains("sub_norm"));
        base.add("lm_head.weight", floats("BF16", &[VOCABULARY, HIDDEN], |i| i as f32));
        for layer in 0..LAYERS {
            for (name, ..) in PROJECTIONS {
                let reciprocal = 1.0 / multiplier(layer, name);
                base.add(
                    &format!("model.layers.{layer}.{name}.weight_scale"),
                    floats("F32", &[1], |_| reciprocal),
                );
            }
        }
        base
    }

    /// Float master weights whose absmean form is [`weight`], with [`multiplier`] as their mean.
    pub(crate) fn master(dtype: &'static str) -> Self {
        let mut base = Self::bitnet();
        base.config["quantization_config"]["quantization_mode"] = json!("online");
        base.tensors.retain(|name, _| !name.ends_with("weight_scale"));
        for layer in 0..LAYERS {
            for (name, rows, cols) in PROJECTIONS {
                base.add(
                    &format!("model.layers.{layer}.{name}.weight"),
                    master(dtype, layer, name, rows, cols),
                );
            }
        }
        base
    }

    pub(crate) fn add(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.to_owned(), tensor);
    }

    pub(crate) fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("{name}"))
    }

    pub(crate) fn set(&mut self, key: &str, value: Value) {
        self.config[key] = value;
    }

    pub(crate) fn unset(&mut self, key: &str) {
        self.config.as_object_mut().expect("an object").remove(key);
    }

    pub(crate) fn quantization(&mut self, key: &str, value: Value) {
        self.config["quantization_config"][key] = value;
    }

    pub(crate) fn write(&self, folder: &Path) {
        let write = |name: &str, bytes: &[u8]| {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a writable folder");
            fs::write(path, bytes).expect("a writable folder");
        };
        write("config.json", self.config.to_string().as_bytes());
        if let Some(value) = &self.generation {
            write("generation_config.json", value.to_string().as_bytes());
        }
        if let Some(value) = &self.tokenizer_config {
            write("tokenizer_config.json", value.to_string().as_bytes());
        }
        if self.shards == 1 {
            write("model.safetensors", &container(&self.tensors));
        } else {
            let mut weight_map = BTreeMap::new();
            for shard in 0..self.shards {
                let part: BTreeMap<_, _> = self
                    .tensors
                    .iter()
                    .skip(shard)
                    .step_by(self.shards)
                    .map(|(name, tensor)| (name.clone(), tensor.clone()))
                    .collect();
                let file = self.shard(shard);
                write(&file, &container(&part));
                weight_map.extend(part.into_keys().map(|name| (name, file.clone())));
            }
            let index = json!({ "metadata": { "total_size": 1 }, "weight_map": weight_map });
            write("model.safetensors.index.json", index.to_string().as_bytes());
        }
        for (name, bytes) in &self.files {
            write(name, bytes);
        }
    }

    pub(crate) fn shard(&self, index: usize) -> String {
        format!("model-{:05}-of-{:05}.safetensors", index + 1, self.shards)
    }
}

pub(crate) fn embedding(dtype: &'static str) -> Tensor {
    floats(dtype, &[VOCABULARY, HIDDEN], |i| i as f32 / 8.0 - 2.0)
}

/// Weights `±1.5 m` and `±0.25 m`, as many as bring the mean to `m`, where the matrix allows it;
/// the mean is computed again by the test that needs it.
fn master(dtype: &'static str, layer: usize, name: &str, rows: usize, cols: usize) -> Tensor {
    let m = multiplier(layer, name);
    floats(dtype, &[rows, cols], |i| match weight(layer, name, i / cols, i % cols) {
        0 if i % 2 == 0 => 0.25 * m,
        0 => -0.25 * m,
        t => 1.5 * m * t as f32,
    })
}

/// A safetensors file of the tensors, in order of their names.
pub(crate) fn container(tensors: &BTreeMap<String, Tensor>) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let start = data.len();
        data.extend_from_slice(&tensor.bytes);
        header.insert(
            name.clone(),
            json!({
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": [start, data.len()],
            }),
        );
    }
    raw_container(&Value::Object(header).to_string(), &data)
}

/// A safetensors file with any header and data.
pub(crate) fn raw_container(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}
