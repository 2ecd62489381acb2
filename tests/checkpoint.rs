//! Checkpoints of every published form open, and give the weights that were written.

mod checkpoint_base;
mod checkpoint_export;
mod checkpoint_gguf;

use checkpoint_base::{
    Base, FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, PROJECTIONS, VOCABULARY, embedding,
    floats, multiplier, weight,
};
use std::path::Path;

use serde_json::json;
use trine::backend::ops::{Activation, Heads};
use trine::checkpoint::{Checkpoint, Files, open, open_files};
use trine::model::config::{Attention, Family, ModelConfig, NormRole, Projection};
use trine::model::weights::WeightSource;
use trine::tensor::{FloatType, SharedBytes};

const ROLES: [Projection; 7] = [
    Projection::Query,
    Projection::Key,
    Projection::Value,
    Projection::Output,
    Projection::Gate,
    Projection::Up,
    Projection::Down,
];

fn opened(base: &Base) -> Checkpoint {
    let folder = tempfile::tempdir().expect("a temporary folder");
    base.write(folder.path());
    let checkpoint = open(folder.path()).unwrap_or_else(|e| panic!("{e}"));
    checkpoint.verify().unwrap_or_else(|e| panic!("{e}"));
    checkpoint
}

/// Every matrix has the weights of the base; scales are for the caller to compare.
fn check_codes(checkpoint: &Checkpoint, scale: impl Fn(usize, &str) -> f32) {
    for layer in 0..LAYERS {
        for ((name, rows, cols), role) in PROJECTIONS.into_iter().zip(ROLES) {
            let matrix = checkpoint.ternary(layer, role).expect(name);
            assert_eq!((matrix.rows(), matrix.cols()), (rows, cols), "{name}");
            assert_eq!(matrix.scale(), scale(layer, name), "scale of layer {layer}, {name}");
            for row in 0..rows {
                let mut codes = vec![9; cols];
                matrix.read_codes(row, &mut codes);
                let expected: Vec<u8> =
                    (0..cols).map(|col| (weight(layer, name, row, col) + 1) as u8).collect();
                assert_eq!(codes, expected, "layer {layer}, {name}, row {row}");
            }
        }
    }
}

/// Windows by the rules of transformers' configuration classes.
#[test]
fn layers_have_the_windows_of_their_config() {
    let of = |name: &str, changes: serde_json::Value| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let read = |name: &str| std::fs::read(folder.join(name)).expect(name);
        let mut config: serde_json::Value =
            serde_json::from_slice(&read("config.json")).expect("a config");
        for (key, value) in changes.as_object().expect("changes") {
            config[key] = value.clone();
        }
        let files = vec![
            ("config.json".to_owned(), SharedBytes::new(config.to_string().into_bytes())),
            ("model.safetensors".to_owned(), SharedBytes::new(read("model.safetensors"))),
        ];
        let checkpoint = open_files(Files::Memory { label: "".into(), files });
        checkpoint.map_err(|error| error.to_string()).map(|checkpoint| {
            let local = checkpoint.config().attention.local.clone();
            local.map(|local| (local.window.get(), local.rope_theta, local.layers))
        })
    };
    let qwen = |changes| of("qwen3_embedding", changes);
    let two = json!(["sliding_attention", "full_attention"]);
    let (on, off) = (true, false);
    assert_eq!(qwen(json!({ "sliding_window": 24, "max_window_layers": 0 })), Ok(None));
    let by_number = json!({ "use_sliding_window": on, "sliding_window": 24,
                            "max_window_layers": 1, "layer_types": null });
    assert_eq!(qwen(by_number), Ok(Some((24, 1e6, vec![false, true]))));
    let by_name = json!({ "use_sliding_window": on, "sliding_window": 24, "layer_types": two });
    assert_eq!(qwen(by_name), Ok(Some((24, 1e6, vec![true, false]))));
    for (switch, window) in [(off, json!(24)), (on, json!(null))] {
        let none =
            json!({ "use_sliding_window": switch, "sliding_window": window, "layer_types": two });
        let error = qwen(none).unwrap_err();
        assert!(error.contains("layer_types: sliding_attention is not supported"), "{error}");
    }

    let gemma = |changes| of("gemma3_windows", changes);
    assert_eq!(gemma(json!({})), Ok(Some((12, 100.0, vec![true, false, true]))));
    let pattern = json!({ "sliding_window_pattern": 3 });
    assert_eq!(gemma(pattern), Ok(Some((12, 100.0, vec![true, true, false]))));
    assert_eq!(gemma(json!({ "sliding_window_pattern": 1 })), Ok(None));
    let error = gemma(json!({ "sliding_window": 0 })).unwrap_err();
    assert!(error.contains("sliding_window: 0 is not supported"), "{error}");
    let error = gemma(json!({ "sliding_window": -3 })).unwrap_err();
    assert!(error.contains("sliding_window: expected an integer"), "{error}");
}

#[test]
fn packed_weights_whose_scale_multiplies() {
    let checkpoint = opened(&Base::bitnet());
    let expected = ModelConfig {
        family: Family::BitNet,
        hidden: HIDDEN,
        ffn: FFN,
        layers: LAYERS,
        heads: Heads { query: HEADS, kv: KV_HEADS, dim: HEAD_DIM },
        vocabulary: VOCABULARY,
        context: 64,
        rms_eps: 1e-5,
        rope_theta: 500_000.0,
        activation: Activation::Relu2,
        tied_head: true,
        attention: Attention::default(),
    };
    assert_eq!(checkpoint.config(), &expected);
    check_codes(&checkpoint, multiplier);

    let table = checkpoint.embedding().expect("a table");
    assert_eq!((table.rows, table.cols, table.float), (VOCABULARY, HIDDEN, FloatType::Bf16));
    assert_eq!(*table.bytes, *embedding("BF16").bytes);
    assert_eq!(*checkpoint.head().expect("the same table").bytes, *table.bytes);
    for (role, width) in [
        (NormRole::Attention(0), HIDDEN),
        (NormRole::AttentionSub(1), HEADS * HEAD_DIM),
        (NormRole::Ffn(1), HIDDEN),
        (NormRole::FfnSub(0), FFN),
        (NormRole::Final, HIDDEN),
    ] {
        let expected: Vec<f32> = (0..width).map(|i| 1.0 + i as f32 / 16.0).collect();
        assert_eq!(checkpoint.norm(role).expect("gains"), expected, "{role:?}");
    }
}

/// One byte by hand: 0b10_01_00_01 holds the codes 1, 0, 1, 2 of rows 0, R, 2R and 3R.
#[test]
fn a_byte_by_hand() {
    let mut base = Base::bitnet();
    base.tensor("model.layers.0.self_attn.q_proj.weight").bytes[HIDDEN + 3] = 0b10_01_00_01;
    let checkpoint = opened(&base);
    let matrix = checkpoint.ternary(0, Projection::Query).expect("a matrix");
    let code = |row| {
        let mut codes = [9; HIDDEN];
        matrix.read_codes(row, &mut codes);
        codes[3]
    };
    assert_eq!([code(1), code(3), code(5), code(7)], [1, 0, 1, 2]);
}

#[test]
fn packed_weights_whose_scale_divides() {
    let mut base = Base::llama();
    check_codes(&opened(&base), multiplier);
    base.quantization("linear_class", json!("bitlinear"));
    // transformers does not read the mode for bitlinear.
    base.quantization("quantization_mode", json!("online"));
    let checkpoint = opened(&base);
    check_codes(&checkpoint, multiplier);
    assert_eq!(checkpoint.config().family, Family::Llama);
    assert!(!checkpoint.config().tied_head);
    let head = checkpoint.head().expect("a head");
    assert_eq!(head.row(1)[..2], half::bf16::from_f32(HIDDEN as f32).to_le_bytes());
}

#[test]
fn scales_in_every_float_type_and_without_dimensions() {
    for (dtype, shape) in [("F32", &[1][..]), ("F16", &[1]), ("BF16", &[])] {
        let mut base = Base::bitnet();
        base.add(
            "model.layers.1.mlp.up_proj.weight_scale",
            floats(dtype, shape, |_| multiplier(1, "mlp.up_proj")),
        );
        check_codes(&opened(&base), multiplier);
    }
}

#[test]
fn master_weights_are_quantised_by_absmean() {
    for dtype in ["BF16", "F16", "F32"] {
        let checkpoint = opened(&Base::master(dtype));
        check_codes(&checkpoint, |layer, name| {
            let (_, rows, cols) = PROJECTIONS.into_iter().find(|p| p.0 == name).expect(name);
            let magnitude = |i: usize| match weight(layer, name, i / cols, i % cols) {
                0 => 0.25,
                _ => 1.5,
            };
            let sum: f64 = (0..rows * cols).map(magnitude).sum();
            (sum / (rows * cols) as f64 * f64::from(multiplier(layer, name))) as f32
        });
        let projections = &checkpoint.summary().projections;
        assert!(projections[0].stored.ends_with("master weights"), "{projections:?}");
        assert_eq!(projections[0].scales, None);
    }
}

/// What transformers saves of a packed model after it has unpacked the weights.
#[test]
fn ternary_floats_beside_their_scale() {
    for dtype in ["BF16", "F16", "F32"] {
        let mut base = Base::bitnet();
        for (name, rows, cols) in PROJECTIONS {
            base.add(
                &format!("model.layers.1.{name}.weight"),
                floats(dtype, &[rows, cols], |i| weight(1, name, i / cols, i % cols) as f32),
            );
        }
        check_codes(&opened(&base), multiplier);
    }
}

#[test]
fn shards_give_what_one_file_gives() {
    let mut base = Base::bitnet();
    base.shards = 3;
    let folder = tempfile::tempdir().expect("a temporary folder");
    base.write(folder.path());
    let checkpoint = open(folder.path()).unwrap_or_else(|e| panic!("{e}"));
    check_codes(&checkpoint, multiplier);
    let shards = (0..3).map(|i| folder.path().join(base.shard(i)));
    let bytes: u64 = shards.map(|file| file.metadata().expect("a file").len()).sum();
    assert_eq!(checkpoint.summary().file_bytes, bytes);
    // The path of a shard stands for the folder.
    let shard = open(&folder.path().join(base.shard(1))).unwrap_or_else(|e| panic!("{e}"));
    check_codes(&shard, multiplier);
}

#[test]
fn a_file_in_a_folder_opens_with_the_folders_config() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    Base::bitnet().write(folder.path());
    check_codes(&open(&folder.path().join("model.safetensors")).expect("opens"), multiplier);
    let other = folder.path().join("other.safetensors");
    std::fs::rename(folder.path().join("model.safetensors"), &other).expect("renamed");
    let checkpoint = open(&other).expect("opens");
    check_codes(&checkpoint, multiplier);
    assert_eq!(checkpoint.summary().path, other);
}

#[test]
fn the_safetensors_crate_writes_what_is_read() {
    let base = Base::llama();
    let tensors = base.tensors.iter().map(|(name, t)| {
        let dtype = serde_json::from_value(json!(t.dtype)).expect("a type");
        let view = safetensors::tensor::TensorView::new(dtype, t.shape.clone(), &t.bytes);
        (name, view.expect("a tensor"))
    });
    let file = safetensors::serialize(tensors, None).expect("serialised");
    let mut base = base.clone();
    base.files.insert("model.safetensors".into(), file);
    check_codes(&opened(&base), multiplier);
}

#[test]
fn files_in_memory_are_a_folder() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut base = Base::bitnet();
    base.shards = 2;
    base.files.insert("tokenizer.json".into(), b"{}".to_vec());
    base.write(folder.path());
    let files = std::fs::read_dir(folder.path())
        .expect("a folder")
        .map(|entry| {
            let entry = entry.expect("an entry");
            let bytes = std::fs::read(entry.path()).expect("a file");
            (entry.file_name().into_string().expect("a name"), SharedBytes::new(bytes))
        })
        .collect();
    let checkpoint = open_files(Files::Memory { label: "in memory".into(), files });
    let checkpoint = checkpoint.unwrap_or_else(|e| panic!("{e}"));
    check_codes(&checkpoint, multiplier);
    let json = checkpoint.tokenizer().tokenizer_json.as_deref();
    assert_eq!(json, Some(&b"{}"[..]));
    assert_eq!(
        checkpoint.tokenizer().tokenizer_path,
        std::path::Path::new("in memory/tokenizer.json")
    );
}

#[test]
fn without_tie_word_embeddings_the_tensors_decide() {
    let mut base = Base::bitnet();
    base.unset("tie_word_embeddings");
    let checkpoint = opened(&base);
    assert!(checkpoint.config().tied_head);
    assert!(
        checkpoint
            .summary()
            .assumed
            .iter()
            .any(|line| line == "tie_word_embeddings: true, since lm_head.weight is not there"),
        "{:?}",
        checkpoint.summary().assumed
    );
    base.add("lm_head.weight", floats("F16", &[VOCABULARY, HIDDEN], |i| i as f32));
    assert!(!opened(&base).config().tied_head);
}

#[test]
fn a_copy_of_the_embedding_may_stand_as_a_tied_head() {
    let mut base = Base::bitnet();
    base.add("lm_head.weight", embedding("BF16"));
    let checkpoint = opened(&base);
    assert!(checkpoint.config().tied_head);
    assert!(checkpoint.summary().unused.is_empty());
}

#[test]
fn quantization_config_may_be_there_twice_and_the_last_counts() {
    let mut base = Base::llama();
    base.quantization("linear_class", json!("autobitlinear"));
    let mut text = base.config.to_string();
    text.truncate(text.len() - 1);
    text.push_str(
        ",\"quantization_config\":{\"quant_method\":\"bitnet\",\"linear_class\":\"bitlinear\"}}",
    );
    base.files.insert("config.json".into(), text.into_bytes());
    check_codes(&opened(&base), multiplier);
}

#[test]
fn rope_theta_in_either_place() {
    for (key, value) in [
        ("rope_parameters", json!({ "rope_type": "default", "rope_theta": 10000.0 })),
        ("rope_scaling", json!({ "type": "default", "rope_theta": 10000 })),
        ("rope_scaling", json!({ "type": "linear", "factor": 1.0, "rope_theta": 10000 })),
    ] {
        let mut base = Base::bitnet();
        base.unset("rope_theta");
        base.set(key, value);
        base.set("partial_rotary_factor", json!(1.0));
        assert_eq!(opened(&base).config().rope_theta, 10_000.0);
        base.set("rope_theta", json!(10000));
        assert_eq!(opened(&base).config().rope_theta, 10_000.0);
    }
}

#[test]
fn head_counts_and_dimension_that_the_config_leaves_out() {
    // BitNet's class means 5 key/value heads where the key is absent.
    let mut base = Base::bitnet();
    base.set("num_attention_heads", json!(5));
    base.set("head_dim", json!(4));
    base.unset("num_key_value_heads");
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.self_attn.{part}");
        for part in ["q_proj.weight", "k_proj.weight", "v_proj.weight"] {
            *base.tensor(&name(part)) = checkpoint_base::packed(layer, part, 20, HIDDEN);
        }
        *base.tensor(&name("o_proj.weight")) = checkpoint_base::packed(layer, "o", HIDDEN, 20);
        *base.tensor(&name("attn_sub_norm.weight")) = floats("F32", &[20], |_| 1.0);
    }
    let heads = opened(&base).config().heads;
    assert_eq!(heads, Heads { query: 5, kv: 5, dim: 4 });
    // Where it is null, and in Llama's class, as many as query heads.
    base.set("num_key_value_heads", json!(null));
    assert_eq!(opened(&base).config().heads, heads);
}

#[test]
fn one_bit_llm_names_and_bits() {
    let mut base = Base::master("F16");
    base.set("architectures", json!(["BitnetForCausalLM"]));
    base.set("model_type", json!("llama"));
    base.set("hidden_act", json!("silu"));
    base.set("weight_bits", json!(1));
    base.set("input_bits", json!(8));
    base.unset("quantization_config");
    base.tensors = std::mem::take(&mut base.tensors)
        .into_iter()
        .map(|(name, tensor)| {
            let name = name.replace("attn_sub_norm", "inner_attn_ln");
            (name.replace("ffn_sub_norm", "ffn_layernorm"), tensor)
        })
        .collect();
    let checkpoint = opened(&base);
    assert_eq!(checkpoint.config().family, Family::BitNet);
    assert_eq!(checkpoint.config().activation, Activation::Silu);
    assert_eq!(checkpoint.norm(NormRole::FfnSub(1)).expect("gains").len(), FFN);
}

#[test]
fn tables_and_norms_in_every_float_type() {
    for (dtype, float) in
        [("F32", FloatType::F32), ("F16", FloatType::F16), ("BF16", FloatType::Bf16)]
    {
        let mut base = Base::bitnet();
        base.add("model.embed_tokens.weight", embedding(dtype));
        base.add("model.norm.weight", floats(dtype, &[HIDDEN], |i| i as f32 - 2.0));
        let checkpoint = opened(&base);
        let table = checkpoint.embedding().expect("a table");
        assert_eq!(table.float, float);
        let mut row = [0.0; HIDDEN];
        table.read_row(2, &mut row);
        assert_eq!(row, std::array::from_fn(|i| (16 + i) as f32 / 8.0 - 2.0));
        let gains = checkpoint.norm(NormRole::Final).expect("gains");
        assert_eq!(gains, (0..HIDDEN).map(|i| i as f32 - 2.0).collect::<Vec<_>>());
    }
}

#[test]
fn the_summary_counts_and_lists() {
    let mut base = Base::bitnet();
    base.add("model.rotary_emb.inv_freq", floats("F32", &[2], |_| 1.0));
    base.add("model.layers.0.self_attn.rotary_emb.inv_freq", floats("F32", &[2], |_| 1.0));
    let checkpoint = opened(&base);
    let summary = checkpoint.summary();
    assert_eq!(
        summary.unused,
        ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    );
    let ternary: usize = PROJECTIONS.iter().map(|(_, rows, cols)| LAYERS * rows * cols / 4).sum();
    assert_eq!(summary.ternary_bytes, ternary as u64);
    assert_eq!(summary.embedding_bytes, (VOCABULARY * HIDDEN * 2) as u64);
    assert_eq!(summary.head_bytes, summary.embedding_bytes);
    assert_eq!(summary.tensors.len(), base.tensors.len());
    assert_eq!(summary.parameters, checkpoint.config().parameters());
    let gate = &summary.projections[4];
    assert_eq!((gate.name.as_str(), gate.shape), ("mlp.gate_proj", [FFN, HIDDEN]));
    assert_eq!(gate.stored, "uint8, four codes to a byte");
    let scales = [multiplier(0, "mlp.gate_proj"), multiplier(1, "mlp.gate_proj")];
    assert_eq!(gate.scales, Some([scales[0].min(scales[1]), scales[0].max(scales[1])]));
    assert!(serde_json::to_string(summary).expect("JSON").contains("\"head_bytes\":80"));
}

#[test]
fn generation_defaults() {
    let mut base = Base::bitnet();
    // Without the file: the ids of config.json.
    let generation = opened(&base).generation().clone();
    assert_eq!((&generation.eos_token_ids[..], generation.bos_token_id), (&[2][..], Some(1)));
    assert_eq!(generation.do_sample, None);
    base.generation = Some(json!({
        "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.05,
        "repetition_penalty": 1.1, "eos_token_id": [3, 4], "bos_token_id": 0, "max_length": 4096,
        "max_new_tokens": null, "transformers_version": "5.0.0",
    }));
    let generation = opened(&base).generation().clone();
    assert_eq!(generation.do_sample, Some(true));
    assert_eq!(generation.temperature, Some(0.6));
    assert_eq!(generation.top_p, Some(0.9));
    assert_eq!(generation.top_k, Some(40));
    assert_eq!(generation.min_p, Some(0.05));
    assert_eq!(generation.repetition_penalty, Some(1.1));
    assert_eq!(generation.eos_token_ids, [3, 4]);
    assert_eq!(generation.bos_token_id, Some(0));
    assert_eq!((generation.max_length, generation.max_new_tokens), (Some(4096), None));
}

#[test]
fn tokenizer_files() {
    let mut base = Base::bitnet();
    assert!(opened(&base).tokenizer().tokenizer_json.is_none());
    base.tokenizer_config = Some(json!({
        "bos_token": "<s>",
        "eos_token": { "content": "</s>", "lstrip": false },
        "add_bos_token": true,
        "chat_template": "{{ messages }}",
        "model_max_length": 1e30,
    }));
    let checkpoint = opened(&base);
    let tokenizer = checkpoint.tokenizer();
    assert_eq!(tokenizer.bos_token.as_deref(), Some("<s>"));
    assert_eq!(tokenizer.eos_token.as_deref(), Some("</s>"));
    assert_eq!((tokenizer.add_bos_token, tokenizer.add_eos_token), (Some(true), None));
    assert_eq!(tokenizer.chat_template.as_deref(), Some("{{ messages }}"));

    base.tokenizer_config = Some(json!({ "chat_template": [
        { "name": "tool_use", "template": "tools" },
        { "name": "default", "template": "plain" },
    ]}));
    let checkpoint = opened(&base);
    assert_eq!(checkpoint.tokenizer().chat_template.as_deref(), Some("plain"));
    assert_eq!(checkpoint.tokenizer().named_chat_templates.len(), 2);

    base.files.insert("chat_template.jinja".into(), b"of the file".to_vec());
    assert_eq!(opened(&base).tokenizer().chat_template.as_deref(), Some("of the file"));
}

/// The checkpoints that transformers wrote, where they have been made: they open, nothing in them
/// is left over, and every matrix has the multiplier that transformers' own classes give it.
#[test]
fn every_fixture_opens_and_has_its_multipliers() {
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let Ok(folders) = std::fs::read_dir(fixtures) else { return };
    let mut opened = 0;
    for folder in folders.map(|entry| entry.expect("an entry").path()) {
        let Ok(reference) = std::fs::read_to_string(folder.join("reference.json")) else {
            continue;
        };
        // An adapter is no model (`tests/fixtures.rs` compares those with PEFT), nor is what says how
        // to pool.
        if !folder.join("config.json").exists() {
            continue;
        }
        opened += 1;
        let checkpoint = open(&folder).unwrap_or_else(|e| panic!("{e}"));
        checkpoint.verify().unwrap_or_else(|e| panic!("{e}"));
        assert!(checkpoint.summary().unused.is_empty(), "{:?}", checkpoint.summary().unused);
        let reference: serde_json::Value = serde_json::from_str(&reference).expect("JSON");
        for layer in 0..checkpoint.config().layers {
            for ((name, ..), role) in PROJECTIONS.into_iter().zip(ROLES) {
                let expected = &reference["multipliers"][format!("model.layers.{layer}.{name}")];
                let expected = expected.as_f64().expect("a multiplier");
                let scale = f64::from(checkpoint.ternary(layer, role).expect(name).scale());
                // Nine digits in the file; means of master weights are sums in another order.
                assert!(
                    (scale / expected - 1.0).abs() < 1e-5,
                    "{}: layer {layer}, {name}: {scale}, expected {expected}",
                    folder.display()
                );
            }
        }
    }
    assert!(opened > 0, "the folder of fixtures has none");
}
