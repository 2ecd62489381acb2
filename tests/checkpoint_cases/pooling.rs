//! `modules.json` and what it leads to; `pooling_type` of GGUF files.

use serde_json::json;

use super::{Case, gguf, replace};
use crate::checkpoint_base::Base;
use crate::gguf_file::{f32_value, i32_value, string_value};

/// A module that pools, with a config of its own.
fn config(base: &mut Base, config: &serde_json::Value) {
    module(base, "sentence_transformers.models.Pooling", "1_Pooling");
    replace(base, "1_Pooling/config.json", config.to_string().as_bytes());
}

fn module(base: &mut Base, class: &str, path: &str) {
    let modules = json!([{ "idx": 0, "name": "0", "path": path, "type": class }]);
    replace(base, "modules.json", modules.to_string().as_bytes());
}

pub(crate) const POOLING: &[Case] = &[
    (
        "modules that are no list",
        |base| replace(base, "modules.json", b"{}"),
        "modules.json: JSON: expected an array, found {}",
    ),
    (
        "modules that are cut short",
        |base| replace(base, "modules.json", b"[{\"type\": "),
        "modules.json: JSON: expected an array, found EOF while parsing a value at line 1 column 10",
    ),
    (
        "modules a million deep",
        |base| replace(base, "modules.json", "[".repeat(1 << 20).as_bytes()),
        "modules.json: JSON: expected an array, found recursion limit exceeded at line 1 column 128",
    ),
    (
        "megabytes of modules",
        |base| replace(base, "modules.json", format!("[{}1]", "1,".repeat(1 << 20)).as_bytes()),
        "modules.json: size: expected at most 1048576 bytes, found 2097155",
    ),
    (
        "modules that are numbers",
        |base| replace(base, "modules.json", b"[1, 2]"),
        "modules.json: modules: expected objects, found 1",
    ),
    (
        "a module without a class",
        |base| replace(base, "modules.json", b"[{\"path\": \"\"}]"),
        "modules.json: module.type: expected a class, found nothing",
    ),
    (
        "a module that changes the vector",
        |base| module(base, "sentence_transformers.models.Dense", "2_Dense"),
        "modules.json: module.type: sentence_transformers.models.Dense is not supported; supported: \
         Transformer, Pooling and Normalize: others change the embedding",
    ),
    (
        "a module of the author's own",
        |base| module(base, "custom_pooling.LatentPooling", "1_Pooling"),
        "modules.json: module.type: custom_pooling.LatentPooling is not supported; supported: \
         Transformer, Pooling and Normalize: others change the embedding",
    ),
    (
        "a transformer elsewhere",
        |base| module(base, "sentence_transformers.models.Transformer", "0_Transformer"),
        "modules.json: module.path: a model in \"0_Transformer\" is not supported; supported: one in \
         the folder itself",
    ),
    (
        "two poolings",
        |base| {
            let one =
                json!({ "path": "1_Pooling", "type": "sentence_transformers.models.Pooling" });
            replace(base, "modules.json", json!([one, one]).to_string().as_bytes());
        },
        "modules.json: module.type: a second Pooling is not supported; supported: one",
    ),
    (
        "pooling outside of the folder",
        |base| module(base, "sentence_transformers.models.Pooling", "../../etc"),
        "modules.json: module.path: expected a folder in this one, found \"../../etc\"",
    ),
    (
        "pooling at an absolute path",
        |base| module(base, "sentence_transformers.models.Pooling", "/proc/self"),
        "modules.json: module.path: expected a folder in this one, found \"/proc/self\"",
    ),
    (
        "pooling on another drive",
        |base| module(base, "sentence_transformers.models.Pooling", "C:\\pooling"),
        "modules.json: module.path: expected a folder in this one, found \"C:\\\\pooling\"",
    ),
    (
        "a path of a thousand folders",
        |base| module(base, "sentence_transformers.models.Pooling", &["a"; 1000].join("/")),
        "modules.json: module.path: expected a folder in this one, found \"a/a/*",
    ),
    (
        "a path that is a number",
        |base| {
            let one = json!([{ "path": 1, "type": "sentence_transformers.models.Pooling" }]);
            replace(base, "modules.json", one.to_string().as_bytes());
        },
        "modules.json: module.path: expected a string, found 1",
    ),
    (
        "pooling that is not there",
        |base| module(base, "sentence_transformers.models.Pooling", "1_Pooling"),
        "1_Pooling/config.json: cannot be read: there is no such file",
    ),
    (
        "a folder where the config should be",
        |base| {
            module(base, "sentence_transformers.models.Pooling", "1_Pooling");
            replace(base, "1_Pooling/config.json/x", b"");
        },
        "1_Pooling/config.json: kind: expected a file, found a folder",
    ),
    (
        "pooling that is no object",
        |base| config(base, &json!(["mean"])),
        "1_Pooling/config.json: JSON: expected an object, found [\"mean\"]",
    ),
    (
        "pooling by a number",
        |base| config(base, &json!({ "pooling_mode": 3 })),
        "1_Pooling/config.json: pooling_mode: expected the name of a pooling or a list of names, \
         found 3",
    ),
    (
        "pooling of a name that nobody knows",
        |base| config(base, &json!({ "pooling_mode": "median" })),
        "1_Pooling/config.json: pooling_mode: expected cls, max, mean, mean_sqrt_len_tokens, \
         weightedmean, lasttoken, found \"median\"",
    ),
    (
        "a list of no poolings",
        |base| config(base, &json!({ "pooling_mode": [] })),
        "1_Pooling/config.json: pooling_mode: expected the name of a pooling or a list of names, \
         found []",
    ),
    (
        "a list of too many",
        |base| config(base, &json!({ "pooling_mode": vec!["mean"; 7] })),
        "1_Pooling/config.json: pooling_mode: expected the name of a pooling or a list of names, \
         found [*",
    ),
    (
        "a switch that is a word",
        |base| config(base, &json!({ "pooling_mode_mean_tokens": "true" })),
        "1_Pooling/config.json: pooling_mode_mean_tokens: expected true or false, found \"true\"",
    ),
];

pub(crate) const POOLING_TYPE: &[gguf::Case] = &[
    (
        "pooling by name",
        |file| file.of("pooling_type", string_value(b"mean")),
        "bitnet-b1.58.pooling_type: expected an integer from 0 to 4294967295, found \"mean\"",
    ),
    (
        "negative pooling",
        |file| file.of("pooling_type", i32_value(-1)),
        "bitnet-b1.58.pooling_type: expected an integer from 0 to 4294967295, found -1 (i32)",
    ),
    (
        "pooling that is a float",
        |file| file.of("pooling_type", f32_value(1.0)),
        "bitnet-b1.58.pooling_type: expected an integer from 0 to 4294967295, found 1 (f32)",
    ),
];
