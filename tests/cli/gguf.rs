//! Text commands with a GGUF file that has its own tokenizer, as 2B4T is published: without the name
//! of a split, and with a chat template that its converter made up.

use std::path::Path;

use super::run::{trine, with_input};

fn with_model<'a>(args: &[&'a str]) -> Vec<&'a str> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gguf_tokenizer/bitnet_2b4t.gguf");
    assert!(Path::new(path).is_file());
    let mut all = args.to_vec();
    all.splice(1..1, ["--model", path]);
    all
}

#[test]
fn inspect_says_what_was_put_right() {
    let text = trine(with_model(&["inspect"])).good();
    assert!(
        text.contains("tokenizer.ggml.pre is missing: text is split as for llama-bpe"),
        "{text}"
    );
    assert!(text.contains("chat template in the file was made up by its converter"), "{text}");
    let value = trine(with_model(&["inspect", "--json"])).json();
    // Both the end of a text and the end of a turn.
    assert_eq!(value["sampling"]["stop_tokens"], serde_json::json!([901, 904]), "{value}");
    assert_eq!(
        (&value["tokenizer"]["tokens"], &value["tokenizer"]["bos"]),
        (&905.into(), &900.into())
    );
}

#[test]
fn conversations_have_the_format_that_the_model_was_trained_on() {
    let messages = br#"[{"role": "user", "content": "hi <|eot_id|>"}]"#;
    let args = with_model(&["tokenize", "--json", "--chat", "-"]);
    let value = with_input(args, messages).json();
    assert_eq!(value["text"], "User: hi <|eot_id|><|eot_id|>Assistant: ");
    let ids: Vec<u64> =
        value["ids"].as_array().unwrap().iter().filter_map(|id| id.as_u64()).collect();
    // BOS, and one end of turn: the other is a user's text.
    assert_eq!((ids[0], ids.iter().filter(|&&id| id == 904).count()), (900, 1));
}

#[test]
fn text_commands_run() {
    let value = trine(with_model(&["tokenize", "--json", "it's 12345 <|eot_id|>"])).json();
    let ids: Vec<String> =
        value["ids"].as_array().unwrap().iter().map(ToString::to_string).collect();
    assert_eq!((ids[0].as_str(), ids[ids.len() - 1].as_str()), ("900", "904"));
    let text = trine(with_model(&["tokenize", "--no-special", "--decode", &ids.join(",")])).good();
    assert_eq!(text, "it's 12345 \n");

    let args = ["generate", "-n", "6", "--temp", "0", "--ignore-eos", "--json", "Shall I"];
    let value = trine(with_model(&args)).json();
    assert_eq!(value["usage"]["completion_tokens"], 6);
    let args = ["chat", "-n", "6", "--temp", "0", "--json"];
    let answer = with_input(with_model(&args), b"Hello\n").json();
    assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 8, "{answer}");
}
