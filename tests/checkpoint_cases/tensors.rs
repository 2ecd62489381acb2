//! Tensors that are missing, misshapen, left over or hold what they may not.

use serde_json::json;

use super::Case;
use crate::checkpoint_base::{Base, FFN, HIDDEN, Tensor, VOCABULARY, floats};

const Q_PROJ: &str = "model.layers.0.self_attn.q_proj.weight";
const Q_SCALE: &str = "model.layers.0.self_attn.q_proj.weight_scale";
const NORM: &str = "model.layers.1.mlp.ffn_sub_norm.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

pub(crate) const TENSORS: &[Case] = &[
    (
        "a missing projection",
        |base| {
            base.tensors.remove(Q_PROJ);
        },
        "model.safetensors: model.layers.0.self_attn.q_proj.weight: expected a tensor, found none \
         of that name",
    ),
    (
        "a missing scale",
        |base| {
            base.tensors.remove(Q_SCALE);
        },
        "model.safetensors: model.layers.0.self_attn.q_proj.weight_scale: expected a tensor, found \
         none of that name",
    ),
    (
        "a missing norm",
        |base| {
            base.tensors.remove(NORM);
        },
        "model.safetensors: model.layers.1.mlp.ffn_sub_norm.weight: expected a tensor, found none \
         of that name",
    ),
    (
        "a missing embedding",
        |base| {
            base.tensors.remove(EMBEDDING);
        },
        "model.safetensors: model.embed_tokens.weight: expected a tensor, found none of that name",
    ),
    (
        "a head that should be there",
        |base| base.set("tie_word_embeddings", json!(false)),
        "model.safetensors: lm_head.weight: expected a tensor, found none of that name",
    ),
    (
        "a million layers that are not there",
        |base| base.set("num_hidden_layers", json!(1 << 20)),
        "model.safetensors: model.layers.2.self_attn.q_proj.weight: expected a tensor, found none \
         of that name",
    ),
    (
        "packed weights of a wrong shape",
        |base| base.tensor(Q_PROJ).shape.reverse(),
        "model.safetensors: model.layers.0.self_attn.q_proj.weight: expected U8 [2,8], four rows \
         to a byte, found U8 [8,2]",
    ),
    (
        "packed weights of a wrong type",
        |base| base.tensor(Q_PROJ).dtype = "I8",
        "model.safetensors: model.layers.0.self_attn.q_proj.weight: expected U8 [2,8], four rows \
         to a byte, found I8 [2,8]",
    ),
    (
        "float weights of a wrong shape",
        |base| base.add(Q_PROJ, floats("BF16", &[8, 7], |_| 1.0)),
        "model.safetensors: model.layers.0.self_attn.q_proj.weight: expected U8 [2,8], four rows \
         to a byte, found BF16 [8,7]",
    ),
    (
        "a number of rows that cannot be packed",
        |base| base.set("intermediate_size", json!(FFN + 2)),
        "model.safetensors: model.layers.0.mlp.gate_proj.weight: expected floats, since 14 rows \
         are not a multiple of 4, found U8 [3,8]",
    ),
    (
        "a scale per row",
        |base| base.add(Q_SCALE, floats("BF16", &[8], |_| 1.0)),
        "model.safetensors: model.layers.0.self_attn.q_proj.weight_scale: expected BF16, F16 or \
         F32 [1], found BF16 [8]",
    ),
    (
        "a scale that is an integer",
        |base| base.add(Q_SCALE, Tensor { dtype: "I32", shape: vec![1], bytes: vec![1, 0, 0, 0] }),
        "model.safetensors: model.layers.0.self_attn.q_proj.weight_scale: expected BF16, F16 or \
         F32 [1], found I32 [1]",
    ),
    (
        "a scale that is NaN",
        |base| base.add(Q_SCALE, floats("BF16", &[1], |_| f32::NAN)),
        "model.safetensors: model.layers.0.self_attn.q_proj.weight_scale: expected a positive \
         number, its reciprocal finite, found NaN",
    ),
    (
        "a scale that is infinite",
        |base| base.add(Q_SCALE, floats("F16", &[1], |_| f32::INFINITY)),
        "model.safetensors: model.layers.0.self_attn.q_proj.weight_scale: expected a positive \
         number, its reciprocal finite, found inf",
    ),
    (
        "a scale of zero",
        |base| base.add(Q_SCALE, floats("F32", &[1], |_| 0.0)),
        "model.safetensors: model.layers.0.self_attn.q_proj.weight_scale: expected a positive \
         number, its reciprocal finite, found 0",
    ),
    (
        "a negative scale",
        |base| base.add(Q_SCALE, floats("BF16", &[1], |_| -0.5)),
        "model.safetensors: model.layers.0.self_attn.q_proj.weight_scale: expected a positive \
         number, its reciprocal finite, found -0.5",
    ),
    (
        "code 3",
        // Row 1 of the stored rows, column 2, the third of four codes: row 1 + 2 · 2.
        |base| base.tensor(Q_PROJ).bytes[8 + 2] |= 0b00_11_00_00,
        "model.safetensors: model.layers.0.self_attn.q_proj.weight: expected codes 0, 1 and 2, \
         found code 3 at row 5, column 2",
    ),
    (
        "floats that are not ternary where the config says they are",
        |base| {
            base.add(Q_PROJ, floats("F32", &[8, 8], |i| if i == 19 { 0.5 } else { -1.0 }));
        },
        "model.safetensors: model.layers.0.self_attn.q_proj.weight: expected -1, 0 and 1 alone, \
         since the config says that weights were quantised before (quantization_mode), found 0.5 \
         at row 2, column 3",
    ),
    (
        "packed weights where the config says master weights",
        |base| base.quantization("quantization_mode", json!("online")),
        "model.safetensors: model.layers.0.self_attn.q_proj.weight: expected BF16, F16 or F32 \
         [8,8], master weights, since the config says that weights are quantised when they are \
         loaded, found U8 [2,8]",
    ),
    (
        "a scale beside master weights",
        |base| {
            let scale = base.tensor(Q_SCALE).clone();
            *base = Base::master("BF16");
            base.add(Q_SCALE, scale);
        },
        "model.safetensors: model.layers.0.self_attn.q_proj.weight_scale: expected no scale beside \
         weights that are quantised when they are loaded, found BF16 [1]",
    ),
    (
        "a master weight that is NaN",
        |base| {
            *base = Base::master("F32");
            base.add(Q_PROJ, floats("F32", &[8, 8], |i| if i == 9 { f32::NAN } else { 1.0 }));
        },
        "model.safetensors: model.layers.0.self_attn.q_proj.weight: expected finite numbers, found \
         NaN at row 1, column 1",
    ),
    (
        "master weights for bitlinear",
        |base| {
            *base = Base::master("BF16");
            base.quantization("linear_class", json!("bitlinear"));
        },
        "model.safetensors: model.layers.0.self_attn.q_proj.weight: expected U8 [2,8], four rows \
         to a byte, found BF16 [8,8]",
    ),
    (
        "an infinite gain",
        |base| {
            base.add(NORM, floats("BF16", &[FFN], |i| if i == 4 { f32::INFINITY } else { 1.0 }));
        },
        "model.safetensors: model.layers.1.mlp.ffn_sub_norm.weight: expected finite numbers, found \
         inf at element 4",
    ),
    (
        "gains of a wrong width",
        |base| base.add(NORM, floats("BF16", &[FFN - 1], |_| 1.0)),
        "model.safetensors: model.layers.1.mlp.ffn_sub_norm.weight: expected BF16, F16 or F32 \
         [12], found BF16 [11]",
    ),
    (
        "gains that are bytes",
        |base| base.tensor(NORM).dtype = "I16",
        "model.safetensors: model.layers.1.mlp.ffn_sub_norm.weight: expected BF16, F16 or F32 \
         [12], found I16 [12]",
    ),
    (
        "an embedding with other rows than the vocabulary",
        |base| base.set("vocab_size", json!(VOCABULARY + 1)),
        "model.safetensors: model.embed_tokens.weight: expected BF16, F16 or F32 [6,8], found BF16 \
         [5,8]",
    ),
    (
        "an embedding that holds NaN",
        |base| {
            let table = |i| if i == 3 * HIDDEN + 1 { f32::NAN } else { 1.0 };
            base.add(EMBEDDING, floats("F16", &[VOCABULARY, HIDDEN], table));
        },
        "model.safetensors: model.embed_tokens.weight: expected finite numbers, found NaN at row \
         3, column 1",
    ),
    (
        "a head that holds an infinity",
        |base| {
            *base = Base::llama();
            let table = |i| if i == 39 { f32::NEG_INFINITY } else { 1.0 };
            base.add("lm_head.weight", floats("F32", &[VOCABULARY, HIDDEN], table));
        },
        "model.safetensors: lm_head.weight: expected finite numbers, found -inf at row 4, column 7",
    ),
    (
        "a packed head",
        |base| {
            *base = Base::llama();
            let bytes = vec![0; 2 * HIDDEN];
            base.add("lm_head.weight", Tensor { dtype: "U8", shape: vec![2, HIDDEN], bytes });
        },
        "model.safetensors: lm_head.weight: expected BF16, F16 or F32 [5,8], found U8 [2,8]",
    ),
    (
        "a tied head that differs from the embedding",
        |base| base.add("lm_head.weight", floats("BF16", &[VOCABULARY, HIDDEN], |_| 1.0)),
        "model.safetensors: lm_head.weight: expected the values of model.embed_tokens.weight, \
         since tie_word_embeddings is true, found others; set tie_word_embeddings to false to use \
         them",
    ),
    (
        "a bias of a projection",
        |base| {
            base.add("model.layers.1.mlp.down_proj.bias", floats("BF16", &[HIDDEN], |_| 0.0));
        },
        "model.safetensors: model.layers.1.mlp.down_proj.bias: a bias is not supported; supported: \
         projections and norms without bias",
    ),
    (
        "sub-norms in a family without them",
        |base| {
            let gain = base.tensor(NORM).clone();
            *base = Base::llama();
            base.add(NORM, gain);
        },
        "model.safetensors: model.layers.1.mlp.ffn_sub_norm.weight: a tensor with no place in the \
         model's family is not supported; supported: none here",
    ),
    (
        "a norm of a projection",
        |base| {
            let name = "model.layers.0.mlp.up_proj.norm.weight";
            base.add(name, floats("BF16", &[HIDDEN], |_| 1.0));
        },
        "model.safetensors: model.layers.0.mlp.up_proj.norm.weight: a tensor with no place in the \
         model's family is not supported; supported: none here",
    ),
    (
        "a layer beyond the config's",
        |base| base.set("num_hidden_layers", json!(1)),
        "model.safetensors: model.layers.1.input_layernorm.weight: a tensor of layer 1 is not \
         supported; supported: layers 0 to 0, as num_hidden_layers says",
    ),
];
