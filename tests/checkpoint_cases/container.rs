//! Broken safetensors files and indices.

use serde_json::json;

use super::{Case, claimed_length, header, index, replace};
use crate::checkpoint_base::container;

pub(crate) const CONTAINER: &[Case] = &[
    (
        "an empty weight file",
        |base| replace(base, "model.safetensors", b""),
        "model.safetensors: header length: expected 8 bytes, found a file of 0 bytes",
    ),
    (
        "a weight file of four bytes",
        |base| replace(base, "model.safetensors", &[8, 0, 0, 0]),
        "model.safetensors: header length: expected 8 bytes, found a file of 4 bytes",
    ),
    (
        "a header that is cut off",
        |base| claimed_length(base, 100, b"{\"a\""),
        "model.safetensors: header length: expected at most 4 (the file has 12 bytes), found 100",
    ),
    (
        "a header of 2^60 bytes",
        |base| claimed_length(base, 1 << 60, b"{}"),
        "model.safetensors: header length: expected at most 2 (the file has 10 bytes), found \
         1152921504606846976",
    ),
    (
        "a header of 2^64 - 1 bytes",
        |base| claimed_length(base, u64::MAX, b"{}"),
        "model.safetensors: header length: expected at most 2 (the file has 10 bytes), found \
         18446744073709551615",
    ),
    (
        "a header that is not UTF-8",
        |base| replace(base, "model.safetensors", b"\x03\0\0\0\0\0\0\0{\xff}"),
        "model.safetensors: header: expected UTF-8 text, found another byte at offset 1",
    ),
    (
        "a header that is not JSON",
        |base| header(base, "{tensor}"),
        "model.safetensors: header: expected a JSON object of tensors, found key must be a string *",
    ),
    (
        "a header that is a list",
        |base| header(base, "[]"),
        "model.safetensors: header: expected a JSON object of tensors, found invalid type: * \
         expected an object of tensors*",
    ),
    (
        "a tensor without offsets",
        |base| header(base, r#"{"a":{"dtype":"F32","shape":[4]}}"#),
        "model.safetensors: header: expected a JSON object of tensors, found tensor a: missing \
         field `data_offsets`*",
    ),
    (
        "a type that does not exist",
        |base| header(base, r#"{"a":{"dtype":"F31","shape":[4],"data_offsets":[0,16]}}"#),
        "model.safetensors: header: expected a JSON object of tensors, found tensor a: unknown \
         variant `F31`*",
    ),
    (
        "a negative dimension",
        |base| header(base, r#"{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}"#),
        "model.safetensors: header: expected a JSON object of tensors, found tensor a: invalid \
         value: integer `-4`*",
    ),
    (
        "two tensors of one name",
        |base| {
            header(
                base,
                r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},
                    "a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}"#,
            );
        },
        "model.safetensors: header: expected a JSON object of tensors, found two tensors named a *",
    ),
    (
        "a name that moves the cursor",
        |base| header(base, r#"{"\u001b[2J":{"dtype":"U8","shape":[16],"data_offsets":[0,16]}}"#),
        "model.safetensors: header: expected names of at most 1000 bytes, no control characters, \
         found \\u{1b}[2J",
    ),
    (
        "offsets beyond the end",
        |base| header(base, r#"{"a":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}"#),
        "model.safetensors: a: data_offsets: expected an end of at most 16, the bytes of data in \
         the file, found 20",
    ),
    (
        "offsets close to 2^64",
        |base| {
            header(
                base,
                r#"{"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]},
                    "b":{"dtype":"U8","shape":[18446744073709551599],
                         "data_offsets":[16,18446744073709551615]}}"#,
            );
        },
        "model.safetensors: b: data_offsets: expected an end of at most 16, the bytes of data in \
         the file, found 18446744073709551615",
    ),
    (
        "offsets that overlap",
        |base| {
            header(
                base,
                r#"{"a":{"dtype":"U8","shape":[10],"data_offsets":[0,10]},
                    "b":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}"#,
            );
        },
        "model.safetensors: b: data_offsets: expected a start of 10, where the tensor before it \
         ends, found 8",
    ),
    (
        "offsets with a hole",
        |base| header(base, r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}"#),
        "model.safetensors: a: data_offsets: expected a start of 0, where the tensor before it \
         ends, found 8",
    ),
    (
        "offsets in reverse",
        |base| {
            header(
                base,
                r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},
                    "b":{"dtype":"U8","shape":[8],"data_offsets":[8,0]}}"#,
            );
        },
        "model.safetensors: b: data_offsets: expected 8 bytes for U8 [8], found 8 to 0",
    ),
    (
        "offsets that do not fit the shape",
        |base| header(base, r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,16]}}"#),
        "model.safetensors: a: data_offsets: expected 24 bytes for F32 [2, 3], found 0 to 16",
    ),
    (
        "a shape beyond all sizes",
        |base| {
            header(
                base,
                r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}"#,
            );
        },
        "model.safetensors: a: data_offsets: expected a shape of whole bytes, fewer than 2^61, \
         not F32 [4294967296, 4294967296], found 0 to 16",
    ),
    (
        "bytes after the last tensor",
        |base| header(base, r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#),
        "model.safetensors: data: expected 8 bytes, where the last tensor ends, found 16 bytes",
    ),
    (
        "a weight file that is cut off",
        |base| {
            let mut file = container(&base.tensors);
            file.pop();
            replace(base, "model.safetensors", &file);
        },
        "model.safetensors: model.norm.weight: data_offsets: expected an end of at most *",
    ),
    (
        "an index that is not JSON",
        |base| {
            base.shards = 2;
            replace(base, "model.safetensors.index.json", b"{");
        },
        "model.safetensors.index.json: JSON: expected an object with weight_map, found EOF *",
    ),
    (
        "a shard outside the folder",
        |base| index(base, json!({ "a": "../model.safetensors" })),
        "model.safetensors.index.json: weight_map: expected names of files in the same folder, \
         found \"../model.safetensors\"",
    ),
    (
        "a shard with an absolute path",
        |base| index(base, json!({ "a": "/etc/passwd" })),
        "model.safetensors.index.json: weight_map: expected names of files in the same folder, \
         found \"/etc/passwd\"",
    ),
    (
        "a shard without a name",
        |base| index(base, json!({ "a": "" })),
        "model.safetensors.index.json: weight_map: expected names of files in the same folder, \
         found \"\"",
    ),
    (
        "a shard that is missing",
        |base| index(base, json!({ "a": "model-00003-of-00003.safetensors" })),
        "model.safetensors.index.json: weight_map: expected model-00003-of-00003.safetensors \
         beside it, found no such file",
    ),
    (
        "a tensor that its shard does not have",
        |base| index(base, json!({ "a.weight": "model-00001-of-00002.safetensors" })),
        "model.safetensors.index.json: weight_map.a.weight: expected a tensor of \
         model-00001-of-00002.safetensors, found no tensor of that name there",
    ),
    (
        "a tensor in two shards",
        |base| {
            base.shards = 2;
            let whole = container(&base.tensors);
            let second = base.shard(1);
            replace(base, &second, &whole);
        },
        "model-00002-of-00002.safetensors: model.embed_tokens.weight: expected one tensor of this \
         name, found another in */model-00001-of-00002.safetensors",
    ),
];
