//! What `config.json` may not say.

use serde_json::json;

use super::{Case, replace};

pub(crate) const CONFIG: &[Case] = &[
    (
        "an empty config",
        |base| replace(base, "config.json", b""),
        "config.json: JSON: expected an object, found an empty file",
    ),
    (
        "a config that is cut off",
        |base| replace(base, "config.json", b"{\"hidden_size\": 8,"),
        "config.json: JSON: expected an object, found EOF *",
    ),
    (
        "a config that is a list",
        |base| replace(base, "config.json", b"[1, 2]"),
        "config.json: JSON: expected an object, found [1,2]",
    ),
    (
        "a config that is not UTF-8",
        |base| replace(base, "config.json", b"{\"a\": \"\xff\"}"),
        "config.json: encoding: expected UTF-8 text, found byte 0xff at offset 7",
    ),
    (
        "a config nested without end",
        |base| replace(base, "config.json", "[".repeat(1 << 20).as_bytes()),
        "config.json: JSON: expected an object, found recursion limit exceeded *",
    ),
    (
        "a config beyond all sizes",
        |base| replace(base, "config.json", " ".repeat((16 << 20) + 1).as_bytes()),
        "config.json: size: expected at most 16777216 bytes of text, found more",
    ),
    (
        "no model_type",
        |base| base.unset("model_type"),
        "config.json: model_type: expected bitnet, gemma3_text, llama, qwen3, found nothing",
    ),
    (
        "an unknown family",
        |base| base.set("model_type", json!("mamba")),
        "config.json: model_type: mamba is not supported; supported: bitnet, gemma3_text, llama, qwen3",
    ),
    (
        "a family whose name is a megabyte of control characters",
        |base| base.set("model_type", json!("\u{1b}".repeat(1 << 20))),
        "config.json: model_type: \\u{1b}\\u{1b}\\u{1b}*… is not supported; supported: bitnet, \
         gemma3_text, llama, qwen3",
    ),
    (
        "an unknown architecture",
        |base| base.set("architectures", json!(["BitNetForSequenceClassification"])),
        "config.json: architectures: BitNetForSequenceClassification is not supported; supported: \
         BitNetForCausalLM, LlamaForCausalLM, BitnetForCausalLM, Qwen3Model, Qwen3ForCausalLM, \
         Gemma3TextModel, Gemma3ForCausalLM",
    ),
    (
        "architectures and model_type that disagree",
        |base| base.set("architectures", json!(["LlamaForCausalLM"])),
        "config.json: model_type: expected \"llama\", since architectures is LlamaForCausalLM, \
         found \"bitnet\"",
    ),
    (
        "two architectures",
        |base| base.set("architectures", json!(["LlamaForCausalLM", "BitNetForCausalLM"])),
        "config.json: architectures: expected one name, found LlamaForCausalLM, BitNetForCausalLM",
    ),
    (
        "architectures of a wrong type",
        |base| base.set("architectures", json!([7])),
        "config.json: architectures: expected a list of strings, found [7]",
    ),
    (
        "an unknown activation",
        |base| base.set("hidden_act", json!("gelu_new")),
        "config.json: hidden_act: gelu_new is not supported; supported: relu2, silu, \
         gelu_pytorch_tanh",
    ),
    (
        "no activation",
        |base| base.unset("hidden_act"),
        "config.json: hidden_act: expected relu2, silu, gelu_pytorch_tanh, found nothing",
    ),
    (
        "no hidden size",
        |base| base.unset("hidden_size"),
        "config.json: hidden_size: expected an integer from 1 to 16777216, found nothing",
    ),
    (
        "a size of zero",
        |base| base.set("intermediate_size", json!(0)),
        "config.json: intermediate_size: expected an integer from 1 to 16777216, found 0",
    ),
    (
        "a negative size",
        |base| base.set("hidden_size", json!(-8)),
        "config.json: hidden_size: expected an integer from 1 to 16777216, found -8",
    ),
    (
        "a size of 2^60",
        |base| base.set("num_hidden_layers", json!(1u64 << 60)),
        "config.json: num_hidden_layers: expected an integer from 1 to 16777216, found \
         1152921504606846976",
    ),
    (
        "a size with a fraction point",
        |base| base.set("hidden_size", json!(8.0)),
        "config.json: hidden_size: expected an integer from 1 to 16777216, found 8.0",
    ),
    (
        "a size in quotes",
        |base| base.set("vocab_size", json!("5")),
        "config.json: vocab_size: expected an integer from 1 to 16777216, found \"5\"",
    ),
    (
        "no context",
        |base| base.set("max_position_embeddings", json!(null)),
        "config.json: max_position_embeddings: expected an integer from 1 to 16777216, found \
         nothing",
    ),
    (
        "zero heads",
        |base| base.set("num_attention_heads", json!(0)),
        "config.json: num_attention_heads: expected an integer from 1 to 16777216, found 0",
    ),
    (
        "heads that do not divide the hidden size",
        |base| base.set("num_attention_heads", json!(3)),
        "config.json: hidden_size: expected a multiple of num_attention_heads, 3, since head_dim \
         is absent, found 8",
    ),
    (
        "key/value heads that do not divide the heads",
        |base| base.set("num_key_value_heads", json!(3)),
        "config.json: num_key_value_heads: expected a divisor of num_attention_heads, 2, found 3",
    ),
    (
        "an odd head dimension",
        |base| base.set("head_dim", json!(5)),
        "config.json: head_dim: expected an even number, found 5",
    ),
    (
        "an eps of zero",
        |base| base.set("rms_norm_eps", json!(0)),
        "config.json: rms_norm_eps: expected a positive number, found 0",
    ),
    (
        "an eps that is zero in f32",
        |base| base.set("rms_norm_eps", json!(1e-60)),
        "config.json: rms_norm_eps: expected a positive number, found 0",
    ),
    (
        "an eps in quotes",
        |base| base.set("rms_norm_eps", json!("1e-5")),
        "config.json: rms_norm_eps: expected a positive number, found \"1e-5\"",
    ),
    (
        "no rope_theta",
        |base| base.unset("rope_theta"),
        "config.json: rope_theta: expected a positive number, here or in rope_parameters, found \
         nothing",
    ),
    (
        "a negative rope_theta",
        |base| base.set("rope_theta", json!(-1.0)),
        "config.json: rope_theta: expected a positive number, found -1.0",
    ),
    (
        "two values of rope_theta",
        |base| base.set("rope_parameters", json!({ "rope_theta": 10000.0 })),
        "config.json: rope_parameters.rope_theta: expected 500000, the rope_theta found before, \
         found 10000",
    ),
    (
        "rope scaling in the old form",
        |base| base.set("rope_scaling", json!({ "type": "linear", "factor": 2.0 })),
        "config.json: rope_scaling.type: linear is not supported; supported: default",
    ),
    (
        "rope scaling in the new form",
        |base| base.set("rope_parameters", json!({ "rope_type": "llama3" })),
        "config.json: rope_parameters.rope_type: llama3 is not supported; supported: default",
    ),
    (
        "rope scaling without a type",
        |base| base.set("rope_scaling", json!({ "factor": 2.0 })),
        "config.json: rope_scaling.factor: 2.0 is not supported; supported: none",
    ),
    (
        "rope parameters per kind of layer",
        |base| base.set("rope_parameters", json!({ "full_attention": { "rope_theta": 1.0 } })),
        "config.json: rope_parameters.full_attention: {\"rope_theta\":1.0} is not supported; \
         supported: one rope_theta for all layers",
    ),
    (
        "rope parameters of a wrong type",
        |base| base.set("rope_parameters", json!(7)),
        "config.json: rope_parameters: expected an object, found 7",
    ),
    (
        "a part of the head rotated",
        |base| base.set("partial_rotary_factor", json!(0.5)),
        "config.json: partial_rotary_factor: 0.5 is not supported; supported: 1",
    ),
    (
        "biases of attention",
        |base| base.set("attention_bias", json!(true)),
        "config.json: attention_bias: true is not supported; supported: false",
    ),
    (
        "biases of the feed-forward network",
        |base| base.set("mlp_bias", json!(true)),
        "config.json: mlp_bias: true is not supported; supported: false",
    ),
    (
        "a boolean that is a number",
        |base| base.set("attention_bias", json!(1)),
        "config.json: attention_bias: expected true or false, found 1",
    ),
    (
        "a sliding window",
        |base| base.set("sliding_window", json!(32)),
        "config.json: sliding_window: 32, less than max_position_embeddings is not supported; \
         supported: null or at least 64",
    ),
    (
        "layers with a sliding window",
        |base| base.set("layer_types", json!(["full_attention", "sliding_attention"])),
        "config.json: layer_types: sliding_attention is not supported; supported: full_attention",
    ),
    (
        "a tie that is neither true nor false",
        |base| base.set("tie_word_embeddings", json!("yes")),
        "config.json: tie_word_embeddings: expected true or false, found \"yes\"",
    ),
    (
        "no quantization_config",
        |base| base.unset("quantization_config"),
        "config.json: quantization_config: expected an object with quant_method \"bitnet\", \
         without which a checkpoint has no ternary weights, found nothing",
    ),
    (
        "another quant_method",
        |base| base.quantization("quant_method", json!("gptq")),
        "config.json: quantization_config.quant_method: gptq is not supported; supported: bitnet",
    ),
    (
        "no quant_method",
        |base| base.quantization("quant_method", json!(null)),
        "config.json: quantization_config.quant_method: expected \"bitnet\", found nothing",
    ),
    (
        "an unknown linear_class",
        |base| base.quantization("linear_class", json!("hbitlinear")),
        "config.json: quantization_config.linear_class: hbitlinear is not supported; supported: \
         bitlinear, autobitlinear",
    ),
    (
        "an unknown quantization_mode",
        |base| base.quantization("quantization_mode", json!("lazy")),
        "config.json: quantization_config.quantization_mode: lazy is not supported; supported: \
         offline, online",
    ),
    (
        "a norm before each projection",
        |base| base.quantization("use_rms_norm", json!(true)),
        "config.json: quantization_config.use_rms_norm: true is not supported; supported: false",
    ),
    (
        "projections that are not ternary",
        |base| base.quantization("modules_to_not_convert", json!(["lm_head", "down_proj"])),
        "config.json: quantization_config.modules_to_not_convert: \"down_proj\" is not supported; \
         supported: null, [] or some of lm_head, model.embed_tokens, embed_tokens, model.norm, \
         norm",
    ),
    (
        "1bitLLM with other bits",
        |base| {
            base.set("architectures", json!(["BitnetForCausalLM"]));
            base.set("model_type", json!("llama"));
            base.set("weight_bits", json!(2));
            base.unset("quantization_config");
        },
        "config.json: weight_bits: expected the integer 1, found 2",
    ),
];
