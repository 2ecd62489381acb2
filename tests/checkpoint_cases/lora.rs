//! Broken adapters.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::checkpoint_base::{LAYERS, PROJECTIONS, Tensor, container, floats, raw_container};

/// An adapter of rank 2 for the tiny model of `checkpoint_base`, sound until it is bent.
pub(crate) struct Adapter {
    config: Value,
    tensors: BTreeMap<String, Tensor>,
    /// Written last, over what is there; without contents, taken away.
    files: BTreeMap<&'static str, Option<Vec<u8>>>,
}

/// What is wrong, how it gets wrong, and the sentence that it must produce, as in [`super::Case`].
pub(crate) type AdapterCase = (&'static str, fn(&mut Adapter), &'static str);

fn tensor_name(layer: usize, module: &str, half: &str) -> String {
    format!("base_model.model.model.layers.{layer}.{module}.lora_{half}.weight")
}

impl Adapter {
    pub(crate) fn new() -> Self {
        let mut tensors = BTreeMap::new();
        for layer in 0..LAYERS {
            for (module, rows, cols) in PROJECTIONS {
                let values = |i: usize| i as f32 / 64.0 - 0.25;
                tensors.insert(tensor_name(layer, module, "A"), floats("F32", &[2, cols], values));
                tensors.insert(tensor_name(layer, module, "B"), floats("BF16", &[rows, 2], values));
            }
        }
        let targets: Vec<&str> =
            PROJECTIONS.iter().filter_map(|(module, ..)| module.rsplit('.').next()).collect();
        let config = json!({
            "peft_type": "LORA",
            "base_model_name_or_path": "somewhere/else",
            "r": 2,
            "lora_alpha": 4,
            "bias": "none",
            "target_modules": targets,
            "modules_to_save": null,
            "megatron_core": "megatron.core",
            "loftq_config": {},
            "lora_dropout": 0.1,
        });
        Self { config, tensors, files: BTreeMap::new() }
    }

    fn set(&mut self, key: &str, value: Value) {
        self.config[key] = value;
    }

    fn unset(&mut self, key: &str) {
        self.config.as_object_mut().expect("an object").remove(key);
    }

    fn tensor(&mut self, half: &str) -> &mut Tensor {
        let name = tensor_name(0, "self_attn.q_proj", half);
        self.tensors.get_mut(&name).expect("a tensor")
    }

    fn rename(&mut self, half: &str, to: &str) {
        let name = tensor_name(0, "self_attn.q_proj", half);
        let tensor = self.tensors.remove(&name).expect("a tensor");
        self.tensors.insert(to.into(), tensor);
    }

    pub(crate) fn write(&self, folder: &Path) {
        let config = self.config.to_string().into_bytes();
        let mut files: BTreeMap<&str, Option<Vec<u8>>> = BTreeMap::from([
            ("adapter_config.json", Some(config)),
            ("adapter_model.safetensors", Some(container(&self.tensors))),
        ]);
        files.extend(self.files.iter().map(|(&name, bytes)| (name, bytes.clone())));
        for (name, bytes) in files {
            if let Some(bytes) = bytes {
                fs::write(folder.join(name), bytes).expect("a writable folder");
            }
        }
    }
}

const Q_A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

pub(crate) const ADAPTERS: &[AdapterCase] = &[
    ("a sound adapter", |_| (), "no error"),
    (
        "a regular expression of targets",
        |a| a.set("target_modules", json!(".*(q|k)_proj|.*mlp.*")),
        "no error",
    ),
    (
        "patterns of the rank that is there, and of alphas",
        |a| {
            a.set("r", json!(64));
            a.set(
                "rank_pattern",
                json!({"self_attn.q_proj": 2, "k_proj": 2, "v_proj": 2,
                "o_proj": 2, "gate_proj": 2, "up_proj": 2, "down_proj": 2}),
            );
            a.set("alpha_pattern", json!({"model.layers.1.mlp.down_proj": 0.5}));
        },
        "no error",
    ),
    (
        "names with the adapter's name in them",
        |a| a.rename("A", &Q_A.replace("weight", "default.weight")),
        "no error",
    ),
    (
        "layers_to_transform of the layers that are there",
        |a| {
            a.set("layers_to_transform", json!([1]));
            a.tensors.retain(|name, _| name.contains("layers.1."));
        },
        "no error",
    ),
    (
        "no config",
        |a| _ = a.files.insert("adapter_config.json", None),
        "adapter_config.json: cannot be read: there is no such file",
    ),
    (
        "no weights",
        |a| _ = a.files.insert("adapter_model.safetensors", None),
        "adapter_model.safetensors: cannot be read: there is no such file",
    ),
    (
        "weights in a pickle alone",
        |a| {
            a.files.insert("adapter_model.safetensors", None);
            a.files.insert("adapter_model.bin", Some(Vec::new()));
        },
        ": weights: expected adapter_model.safetensors, found only adapter_model.bin, which can run \
         code when it is read",
    ),
    (
        "a config that is a list",
        |a| a.config = json!([]),
        "adapter_config.json: JSON: expected an object, found []",
    ),
    (
        "a config that is cut off",
        |a| _ = a.files.insert("adapter_config.json", Some(b"{\"r\":".to_vec())),
        "adapter_config.json: JSON: expected an object, found EOF*",
    ),
    (
        "an empty weight file",
        |a| _ = a.files.insert("adapter_model.safetensors", Some(Vec::new())),
        "adapter_model.safetensors: header length: expected 8 bytes, found a file of 0 bytes",
    ),
    (
        "a weight file without tensors",
        |a| a.tensors.clear(),
        "adapter_model.safetensors: tensors: expected matrices lora_A and lora_B, found none",
    ),
    (
        "a weight file that claims more than it has",
        |a| {
            let header = r#"{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,16]}}"#;
            a.files.insert("adapter_model.safetensors", Some(raw_container(header, &[0; 16])));
        },
        "adapter_model.safetensors: a: data_offsets: expected 4000000000000 bytes for *",
    ),
    (
        "another kind of adapter",
        |a| a.set("peft_type", json!("IA3")),
        "adapter_config.json: peft_type: IA3 is not supported; supported: LORA",
    ),
    (
        "no kind of adapter",
        |a| a.unset("peft_type"),
        "adapter_config.json: peft_type: expected \"LORA\", found nothing",
    ),
    (
        "no rank",
        |a| a.unset("r"),
        "adapter_config.json: r: expected an integer from 1 to 16777216, found nothing",
    ),
    (
        "a rank of 0",
        |a| a.set("r", json!(0)),
        "adapter_config.json: r: expected an integer from 1 to 16777216, found 0",
    ),
    (
        "a rank that the tensors do not have",
        |a| a.set("r", json!(3)),
        "adapter_model.safetensors: *q_proj.lora_A.weight: expected rank 3, which \
         adapter_config.json says in r or rank_pattern, found 2",
    ),
    (
        "a pattern of ranks that the tensors do not have",
        |a| a.set("rank_pattern", json!({"layers.1.mlp.up_proj": 1})),
        "adapter_model.safetensors: *layers.1.mlp.up_proj.lora_A.weight: expected rank 1, which \
         adapter_config.json says in r or rank_pattern, found 2",
    ),
    (
        "a pattern that is a regular expression",
        |a| a.set("alpha_pattern", json!({"^model.*q_proj": 1})),
        "adapter_config.json: alpha_pattern: ^model.*q_proj is not supported; supported: names of \
         modules, no regular expressions",
    ),
    (
        "a rank of half",
        |a| a.set("rank_pattern", json!({"q_proj": 0.5})),
        "adapter_config.json: rank_pattern: expected positive numbers, whole ones for ranks, at \
         most 16777216, found 0.5",
    ),
    (
        "no alpha",
        |a| a.unset("lora_alpha"),
        "adapter_config.json: lora_alpha: expected a number, found nothing",
    ),
    (
        "an alpha that is text",
        |a| a.set("lora_alpha", json!("sixteen")),
        "adapter_config.json: lora_alpha: expected a number, found \"sixteen\"",
    ),
    (
        "an alpha beyond f32",
        |a| a.set("lora_alpha", json!(1e300)),
        "adapter_config.json: lora_alpha: expected a factor within f32, found 1*",
    ),
    (
        "an alpha that makes the weights infinite",
        |a| {
            a.set("lora_alpha", json!(3e38));
            *a.tensor("B") = floats("F32", &[8, 2], |_| 100.0);
        },
        "adapter_model.safetensors: *q_proj.lora_B.weight: expected numbers that are finite in f32 \
         when multiplied by *, found larger ones",
    ),
    (
        "DoRA",
        |a| a.set("use_dora", json!(true)),
        "adapter_config.json: use_dora: true is not supported; supported: plain LoRA, without this \
         field",
    ),
    (
        "the magnitudes of DoRA",
        |a| a.rename("A", &Q_A.replace("lora_A.weight", "lora_magnitude_vector")),
        "adapter_model.safetensors: tensor: *lora_magnitude_vector is not supported; supported: *",
    ),
    (
        "biases",
        |a| a.set("bias", json!("lora_only")),
        "adapter_config.json: bias: \"lora_only\" is not supported; supported: \"none\"",
    ),
    (
        "biases of the adapter's own",
        |a| a.set("lora_bias", json!(true)),
        "adapter_config.json: lora_bias: true is not supported; supported: plain LoRA, *",
    ),
    (
        "modules that are saved whole",
        |a| a.set("modules_to_save", json!(["lm_head"])),
        "adapter_config.json: modules_to_save: [\"lm_head\"] is not supported; supported: an \
         adapter that has none: matrices of projections alone",
    ),
    (
        "transposed weights",
        |a| a.set("fan_in_fan_out", json!(true)),
        "adapter_config.json: fan_in_fan_out: true is not supported; supported: plain LoRA, *",
    ),
    (
        "an initialisation that changes the base",
        |a| a.set("init_lora_weights", json!("pissa_niter_16")),
        "adapter_config.json: init_lora_weights: \"pissa_niter_16\" is not supported; supported: *",
    ),
    (
        "a field of the future",
        |a| a.set("use_quantum_lora", json!({"rotations": 3})),
        "adapter_config.json: use_quantum_lora: {\"rotations\":3} is not supported; supported: \
         plain LoRA, without this field",
    ),
    (
        "layers that are there several times",
        |a| a.set("layer_replication", json!([[0, 1], [0, 2]])),
        "adapter_config.json: layer_replication: [[0,1],[0,2]] is not supported; *",
    ),
    (
        "the output head as a target",
        |a| a.set("target_modules", json!(["q_proj", "lm_head"])),
        "adapter_config.json: target_modules: lm_head is not supported; supported: q_proj, k_proj, \
         v_proj, o_proj, gate_proj, up_proj and down_proj",
    ),
    (
        "targets that are numbers",
        |a| a.set("target_modules", json!([1])),
        "adapter_config.json: target_modules: expected a list of strings, found [1]",
    ),
    (
        "a target without tensors",
        |a| a.tensors.retain(|name, _| !name.contains("layers.1.mlp.up_proj")),
        "adapter_config.json: target_modules: expected matrices for mlp.up_proj of all 2 layers of \
         the base, found none for layer 1 in adapter_model.safetensors",
    ),
    (
        "layers that are no list",
        |a| a.set("layers_to_transform", json!("all")),
        "adapter_config.json: layers_to_transform: expected a layer or a list of layers, found \
         \"all\"",
    ),
    (
        "a layer that layers_to_transform does not have",
        |a| a.set("layers_to_transform", json!(1)),
        "adapter_model.safetensors: *layers.0.*: expected tensors of the layers in \
         layers_to_transform, found layer 0",
    ),
    (
        "a layer that the base does not have",
        |a| a.rename("A", &Q_A.replace("layers.0", "layers.7")),
        "adapter_model.safetensors: *: expected lora_A beside it, found none",
    ),
    (
        "layers that the base does not have",
        |a| {
            for half in ["A", "B"] {
                a.rename(half, &tensor_name(7, "self_attn.q_proj", half));
            }
        },
        "adapter_model.safetensors: *layers.7.*: expected a layer below 2, those of the base, \
         found layer 7",
    ),
    (
        "a layer of twenty digits",
        |a| a.rename("A", &Q_A.replace("layers.0", "layers.99999999999999999999")),
        "adapter_model.safetensors: tensor: *layers.99999999999999999999.* is not supported; *",
    ),
    (
        "a half without the other",
        |a| _ = a.tensors.remove(Q_A),
        "adapter_model.safetensors: *q_proj.lora_B.weight: expected lora_A beside it, found none",
    ),
    (
        "the same half twice",
        |a| {
            let tensor = a.tensor("A").clone();
            a.tensors.insert(Q_A.replace("weight", "default.weight"), tensor);
        },
        "adapter_model.safetensors: *: expected one such matrix of a projection, found another, *",
    ),
    (
        "the name of some other model's module",
        |a| a.rename("A", "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"),
        "adapter_model.safetensors: tensor: base_model.model.transformer.h.0.attn.c_attn.lora_A.weight \
         is not supported; supported: *",
    ),
    (
        "embeddings",
        |a| a.rename("A", "base_model.model.model.embed_tokens.lora_embedding_A"),
        "adapter_model.safetensors: tensor: base_model.model.model.embed_tokens.lora_embedding_A \
         is not supported; supported: *",
    ),
    (
        "an input of another width",
        |a| *a.tensor("A") = floats("F32", &[2, 9], |_| 0.5),
        "adapter_model.safetensors: *q_proj.lora_A.weight: expected [2,8], as the base asks for, \
         found [2,9]",
    ),
    (
        "an output of another width",
        |a| *a.tensor("B") = floats("F32", &[4, 2], |_| 0.5),
        "adapter_model.safetensors: *q_proj.lora_B.weight: expected [8,2], as the base asks for, \
         found [4,2]",
    ),
    (
        "a vector",
        |a| *a.tensor("A") = floats("F32", &[16], |_| 0.5),
        "adapter_model.safetensors: *q_proj.lora_A.weight: expected a matrix, found [16]",
    ),
    (
        "a matrix of nothing",
        |a| *a.tensor("A") = floats("F32", &[0, 8], |_| 0.5),
        "adapter_model.safetensors: *q_proj.lora_A.weight: expected a matrix, found [0,8]",
    ),
    (
        "bytes for floats",
        |a| *a.tensor("A") = Tensor { dtype: "U8", shape: vec![2, 8], bytes: vec![1; 16] },
        "adapter_model.safetensors: *q_proj.lora_A.weight: expected bf16, f16 or f32, found U8",
    ),
    (
        "NaN",
        |a| *a.tensor("B") = floats("F16", &[8, 2], |i| if i == 5 { f32::NAN } else { 0.0 }),
        "adapter_model.safetensors: *q_proj.lora_B.weight: expected finite numbers, found NaN at \
         row 2, column 1",
    ),
    (
        "infinity",
        |a| *a.tensor("A") = floats("F32", &[2, 8], |_| f32::INFINITY),
        "adapter_model.safetensors: *q_proj.lora_A.weight: expected finite numbers, found inf at \
         row 0, column 0",
    ),
];
