//! `generation_config.json`, `tokenizer_config.json` and chat templates.

use serde_json::json;

use super::{Case, generation, replace, tokenizer};

pub(crate) const TEXT_AND_SAMPLING: &[Case] = &[
    (
        "a generation config that is no object",
        |base| base.generation = Some(json!("greedy")),
        "generation_config.json: JSON: expected an object, found \"greedy\"",
    ),
    (
        "a temperature in quotes",
        |base| generation(base, "temperature", json!("0.6")),
        "generation_config.json: temperature: expected a number of at least 0, found \"0.6\"",
    ),
    (
        "a temperature that is infinite in f32",
        |base| generation(base, "temperature", json!(1e60)),
        "generation_config.json: temperature: expected a number of at least 0, found 1e+60",
    ),
    (
        "top_p above one",
        |base| generation(base, "top_p", json!(1.5)),
        "generation_config.json: top_p: expected a number above 0 and at most 1, found 1.5",
    ),
    (
        "a negative top_k",
        |base| generation(base, "top_k", json!(-1)),
        "generation_config.json: top_k: expected an integer from 0 to 4294967295, found -1",
    ),
    (
        "min_p below zero",
        |base| generation(base, "min_p", json!(-0.1)),
        "generation_config.json: min_p: expected a number from 0 to 1, found -0.1",
    ),
    (
        "a repetition penalty of zero",
        |base| generation(base, "repetition_penalty", json!(0.0)),
        "generation_config.json: repetition_penalty: expected a number above 0, found 0.0",
    ),
    (
        "do_sample as a number",
        |base| generation(base, "do_sample", json!(1)),
        "generation_config.json: do_sample: expected true or false, found 1",
    ),
    (
        "eos ids with a string among them",
        |base| generation(base, "eos_token_id", json!([2, "</s>"])),
        "generation_config.json: eos_token_id: expected a token id, a list of them or null, found \
         [2,\"</s>\"]",
    ),
    (
        "a negative bos id",
        |base| generation(base, "bos_token_id", json!(-1)),
        "generation_config.json: bos_token_id: expected a token id or null, found -1",
    ),
    (
        "a max_length of zero",
        |base| generation(base, "max_length", json!(0)),
        "generation_config.json: max_length: expected an integer from 1 to 4294967295, found 0",
    ),
    (
        "an eos id in quotes in config.json",
        |base| base.set("eos_token_id", json!("2")),
        "config.json: eos_token_id: expected a token id, a list of them or null, found \"2\"",
    ),
    (
        "a chat template that is a number",
        |base| tokenizer(base, "chat_template", json!(7)),
        "tokenizer_config.json: chat_template: expected a string or a list of {name, template}, \
         names differing, found 7",
    ),
    (
        "two chat templates of one name",
        |base| {
            let one = json!({ "name": "default", "template": "" });
            tokenizer(base, "chat_template", json!([one, one]));
        },
        "tokenizer_config.json: chat_template: expected a string or a list of {name, template}, \
         names differing, found [{\"name\":\"default\",\"template\":\"\"},{\"name\":\"default\",\"templat…",
    ),
    (
        "a bos token without content",
        |base| tokenizer(base, "bos_token", json!({ "lstrip": true })),
        "tokenizer_config.json: bos_token: expected a string or an object with content, found \
         {\"lstrip\":true}",
    ),
    (
        "add_bos_token as a string",
        |base| tokenizer(base, "add_bos_token", json!("true")),
        "tokenizer_config.json: add_bos_token: expected true or false, found \"true\"",
    ),
    (
        "a chat template file that is not UTF-8",
        |base| replace(base, "chat_template.jinja", b"{{ \xc3 }}"),
        "chat_template.jinja: encoding: expected UTF-8 text, found byte 0xc3 at offset 3",
    ),
];
