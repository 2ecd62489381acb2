//! Tokenizers that would explode: each has one defect and the sentence that it must produce.

use std::path::Path;

use serde_json::{Value, json};
use trine::text::{Special, Tokenizer};

/// The words of a defect, what it puts where, and the sentence behind the file's name.
type Case = (&'static str, &'static str, fn() -> Value, &'static str);

fn good() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": { "type": "Fuse" },
        "model": { "type": "WordLevel", "vocab": { "a": 0, "<unk>": 1 }, "unk_token": "<unk>" },
    })
}

fn repeat(kind: &str, list: &str, step: Value, count: usize) -> Value {
    json!({ "type": kind, list: vec![step; count] })
}

fn replace(content: &str) -> Value {
    json!({ "type": "Replace", "pattern": { "String": "a" }, "content": content })
}

fn template(single: Value, ids: usize) -> Value {
    let token = json!({ "id": "x", "ids": vec![0; ids], "tokens": vec!["a"; ids] });
    let template = json!({
        "type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": { "x": token },
    });
    repeat("Sequence", "processors", template, 40)
}

const TEXT: &str = r#"{"Sequence":{"id":"A","type_id":0}}"#;
const TOKEN: &str = r#"{"SpecialToken":{"id":"x","type_id":0}}"#;

fn pieces(list: &[&str]) -> Value {
    serde_json::from_str(&format!("[{}]", list.join(","))).expect("JSON")
}

fn split(regex: &str) -> Value {
    json!({
        "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false,
    })
}

const CASES: &[Case] = &[
    (
        "normalizers that each double a text",
        "normalizer",
        || repeat("Sequence", "normalizers", replace("aa"), 31),
        "normalizer: expected steps that make a text at most 256 times longer, found steps that \
         could make more of it",
    ),
    (
        "a normalizer that makes a text of a letter",
        "normalizer",
        || replace(&"b".repeat(1000)),
        "normalizer: expected steps that make a text at most 256 times longer, found steps that \
         could make more of it",
    ),
    (
        "a thousand normalizers",
        "normalizer",
        || repeat("Sequence", "normalizers", json!({ "type": "NFC" }), 1000),
        "normalizer: expected at most 32 steps, found more",
    ),
    (
        "a character map that is shorter than it says",
        "normalizer",
        || json!({ "type": "Precompiled", "precompiled_charsmap": "////fwAA" }),
        "normalizer: expected a precompiled_charsmap that is as long as it says, found 6 bytes",
    ),
    (
        "pre-tokenizers that each double a text",
        "pre_tokenizer",
        || {
            let step = json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": false,
            });
            repeat("Sequence", "pretokenizers", step, 31)
        },
        "pre_tokenizer: expected steps that make a text at most 256 times longer, found steps that \
         could make more of it",
    ),
    (
        "an expression with repetitions of repetitions",
        "pre_tokenizer",
        || split("(((?=a)a){1000}){1000}"),
        "pre_tokenizer: expected repetitions whose product is at most 10000, found the expression \
         \"(((?=a)a){1000}){1000}\"",
    ),
    (
        "an expression of a megabyte",
        "pre_tokenizer",
        || split(&"a".repeat(1 << 20)),
        "pre_tokenizer: expected regular expressions of at most 8192 bytes, found one of 1048576",
    ),
    (
        "post-processors that each repeat the text",
        "post_processor",
        || template(pieces(&[TEXT, TEXT]), 1),
        "post_processor: expected a template that holds the text once, found one that drops or \
         repeats it",
    ),
    (
        "post-processors that add many tokens",
        "post_processor",
        || template(pieces(&[TOKEN, TOKEN, TEXT, TOKEN]), 100),
        "post_processor: expected at most 256 added tokens, found more",
    ),
    (
        "decoders that each double a token",
        "decoder",
        || repeat("Sequence", "decoders", replace("aa"), 31),
        "decoder: expected at most 32 decoders, that make a token at most 256 times longer, found \
         31, that can make it 2147483648 times longer",
    ),
    (
        "a hundred thousand decoders",
        "decoder",
        || repeat("Sequence", "decoders", replace("b"), 100_000),
        "decoder: expected at most 32 decoders, that make a token at most 256 times longer, found \
         100000, that can make it 1 times longer",
    ),
    (
        "a token of a megabyte",
        "model",
        || json!({ "type": "WordLevel", "vocab": { "a".repeat(1 << 20): 0 }, "unk_token": "a" }),
        "model.vocab: expected tokens of at most 4096 bytes, found one of 1048576",
    ),
    (
        "a token of a megabyte with a score",
        "model",
        || json!({ "type": "Unigram", "vocab": [["a".repeat(1 << 20), 0.0]], "unk_id": 0 }),
        "model.vocab: expected tokens of at most 4096 bytes, found one of 1048576",
    ),
    (
        "an added token of a megabyte",
        "added_tokens",
        || {
            json!([{ "id": 2, "content": "a".repeat(1 << 20), "special": true,
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false }])
        },
        "added_tokens: expected tokens of at most 4096 bytes, found one of 1048576",
    ),
    (
        "two megabytes of added tokens",
        "added_tokens",
        || {
            let token = |i: u32| {
                json!({ "id": i + 2, "content": format!("{i:4000}"), "special": true,
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false })
            };
            (0..500).map(token).collect()
        },
        "added_tokens: expected at most 1048576 bytes of tokens, found 2000000",
    ),
    (
        "words without end for WordPiece",
        "model",
        || {
            json!({ "type": "WordPiece", "vocab": { "a": 0 }, "unk_token": "a",
            "continuing_subword_prefix": "", "max_input_chars_per_word": 1_000_000 })
        },
        "model.max_input_chars_per_word: expected at most 1000, found 1000000",
    ),
];

#[test]
fn what_would_explode_is_refused() {
    let read = |json: &Value| {
        Tokenizer::from_json(Path::new("tokenizer.json"), json.to_string().as_bytes())
    };
    let tokenizer = read(&good()).expect("the file that the cases bend");
    assert_eq!(tokenizer.encode("a", Special::NONE), Ok(vec![0]));
    let mut wrong = Vec::new();
    for (what, field, value, expected) in CASES {
        let mut json = good();
        json[*field] = value();
        let found = match read(&json) {
            Ok(_) => "no error".to_owned(),
            Err(error) => error.to_string(),
        };
        if found != format!("tokenizer.json: {expected}") {
            wrong.push(format!("{what}\n  expected {expected}\n     found {found}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Merges whose parts are empty, or the whole, cannot go on for ever.
#[test]
fn merges_in_a_circle_end() {
    for merges in [
        json!([["", "a"], ["a", ""]]),
        json!([["a", "a"]]),
        json!([["a", "b"], ["ab", ""], ["", "ab"]]),
    ] {
        let mut json = good();
        json["model"] = json!({
            "type": "BPE", "vocab": { "": 0, "a": 1, "b": 2, "ab": 3, "aa": 4 }, "merges": merges,
        });
        let read = Tokenizer::from_json(Path::new("t"), json.to_string().as_bytes());
        if let Ok(tokenizer) = read {
            let ids = tokenizer.encode("aabab", Special::NONE).expect("every letter is there");
            assert!(ids.len() <= 5, "{merges}: {ids:?}");
        }
    }
}
