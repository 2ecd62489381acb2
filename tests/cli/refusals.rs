//! Bad input of every kind: one sentence, exit code 2, nothing on stdout.

use std::path::Path;

use super::run::{copy, demo, fixture, line, trine, with_input};

/// Arguments and what the sentence must name.
const LINES: &[(&str, &[&str])] = &[
    ("", &["no command"]),
    ("generat x", &["generat", "generate"]),
    ("run x", &["run", "trine help"]),
    ("generate x y", &["\"y\"", "too many"]),
    ("perplexity README.md models/demo", &["models/demo", "--model"]),
    ("inspect models/demo --synthetic 2b4t", &["PATH", "--synthetic"]),
    ("generate --temperture 1 x", &["--temperture", "--temperature"]),
    ("generate --temperature hot x", &["--temperature", "a number", "hot"]),
    ("generate --temperature -1 x", &["--temperature", "0.001 to 1000", "-1"]),
    ("generate --temperature nan x", &["--temperature", "a number", "nan"]),
    ("generate --temperature inf x", &["--temperature", "inf"]),
    ("generate -temp hot x", &["--temperature", "hot"]),
    ("generate --top-p 0 x", &["--top-p", "more than 0, at most 1"]),
    ("generate --top-p 1.5 x", &["--top-p", "1.5"]),
    ("generate --top-k -1 x", &["-1"]),
    ("generate --min-p 2 x", &["--min-p", "0 to 1", "2"]),
    ("generate --repetition-penalty 0 x", &["--repetition-penalty", "0.01 to 100"]),
    ("generate --frequency-penalty 9 x", &["--frequency-penalty", "-2 to 2", "9"]),
    ("generate --presence-penalty -9 x", &["--presence-penalty", "-2 to 2", "-9"]),
    ("generate --logit-bias 5 x", &["--logit-bias", "TOKEN=BIAS", "5"]),
    ("generate --logit-bias 99999=1 x", &["--logit-bias", "1024", "99999"]),
    ("generate --stop-token 99999 x", &["--stop-token", "1024", "99999"]),
    ("generate --seed x x", &["--seed", "whole number", "x"]),
    ("generate --max-tokens 0 x", &["--max-tokens", "at least 1", "0"]),
    ("generate --max-tokens many x", &["--max-tokens", "many"]),
    ("generate --max-tokens", &["--max-tokens", "value"]),
    ("generate --logprobs 21 --json x", &["--logprobs", "20", "21"]),
    ("generate --logprobs 2 x", &["--json"]),
    ("generate --threads 0 x", &["--threads", "1 to 1024", "0"]),
    ("bench -t 1,2000", &["--threads", "1 to 1024", "2000"]),
    ("generate --context 0 x", &["--context", "at least 1"]),
    ("generate --context 513 x", &["--context", "1 to 512", "513"]),
    ("generate --context 4 Shall-I-compare-thee-to-a-summer", &["context", "4"]),
    ("generate --kv f8 x", &["--kv", "f32, f16, int8", "f8"]),
    ("generate --device tpu x", &["--device", "cuda:N", "tpu"]),
    ("generate --device cuda:99 x", &["cuda:99"]),
    ("generate --device cuda:x x", &["--device", "cuda:x"]),
    ("generate --device wgpu:99 x", &["wgpu:99"]),
    ("generate --device wgpu:nosuch x", &["wgpu:nosuch"]),
    ("generate --device wgpu: x", &["--device", "wgpu:NAME"]),
    ("generate --model no/such/folder x", &["no/such/folder", "cannot be read"]),
    ("generate --model Cargo.toml x", &["Cargo.toml", "not supported"]),
    ("generate --lora no/such/folder x", &["no/such/folder", "cannot be read"]),
    ("generate --lora models/demo x", &["adapter_config.json", "no such file"]),
    ("generate --lora :2 x", &["--lora", "FOLDER:SCALE"]),
    ("generate --lora tests/fixtures/lora_packed x", &["lora_A.weight", "the base asks for"]),
    ("generate --file no/such/file", &["no/such/file"]),
    ("generate --file src", &["src"]),
    ("generate --file README.md x", &["--file", "PROMPT"]),
    ("generate", &["no prompt", "standard input"]),
    ("generate -cnv -p x", &["-cnv", "trine chat"]),
    ("generate -ngl 99 -p x", &["-ngl", "--device"]),
    ("generate -hf microsoft/bitnet-b1.58-2B-4T -p x", &["-hf", "--model"]),
    ("-m models/demo -p x", &["trine generate"]),
    ("-m models/demo -cnv", &["trine chat"]),
    ("chat -p x", &["-p", "--system"]),
    ("chat --model no/such/folder", &["no/such/folder"]),
    ("chat --temperature 5000", &["--temperature", "5000"]),
    ("inspect --model no/such/folder", &["no/such/folder"]),
    ("inspect --synthetic 4b", &["--synthetic", "2b4t, 0.7b", "70b, 100b", "4b"]),
    ("generate -m tests/fixtures/qwen3_embedding x", &["qwen3_embedding", "trine embed"]),
    ("chat -m tests/fixtures/gemma3_embedding", &["gemma3_embedding", "trine embed"]),
    ("embed --file no/such/file", &["no/such/file"]),
    ("embed --pooling first x", &["--pooling", "first"]),
    ("embed -c 9999 x", &["context", "9999"]),
    ("inspect --synthetic 2b4t --model models/demo", &["--synthetic", "--model"]),
    ("devices --model no/such/folder", &["no/such/folder"]),
    ("devices --test --model no/such/folder", &["no/such/folder"]),
    ("devices --synthetic 4b", &["--synthetic", "2b4t, 0.7b", "70b, 100b", "4b"]),
    ("devices --device cpu", &["--device"]),
    ("bench --device cpu,tpu", &["--device", "cuda:N", "tpu"]),
    ("bench --device cpu,", &["--device"]),
    ("tokenize --decode 1,x", &["--decode", "token ids", "1,x"]),
    ("tokenize --decode -1", &["--decode", "-1"]),
    ("tokenize --decode 1,1024", &["--decode", "1024"]),
    ("tokenize --chat no/such/file", &["no/such/file"]),
    ("tokenize --chat Cargo.toml", &["Cargo.toml", "messages"]),
    ("tokenize --decode 1 text", &["--decode", "TEXT"]),
    ("score", &["--ids"]),
    ("score --ids 1,2", &["--greedy", "--logits", "--nll"]),
    ("score --ids 1,x --nll", &["--ids", "1,x"]),
    ("score --ids 1,-2 --nll", &["--ids", "1,-2"]),
    ("score --ids 1,5000000000 --nll", &["--ids", "5000000000"]),
    ("score --ids 1,1024 --nll", &["ids", "1024"]),
    ("score --ids , --nll", &["ids", "at least one"]),
    ("score --ids 1 --greedy -1", &["-1"]),
    ("score --ids 1 --greedy 512", &["512"]),
    ("score --ids 1 --jsonl --nll", &["--jsonl"]),
    ("perplexity", &["FILE"]),
    ("perplexity no/such/file", &["no/such/file"]),
    ("perplexity --context 600 Cargo.toml", &["context", "600"]),
    ("perplexity --stride 600 Cargo.toml", &["--stride", "511", "600"]),
    ("perplexity --stride 0 Cargo.toml", &["--stride", "at least 1"]),
    ("bench -p 0 -n 0", &["-p", "-n"]),
    ("bench -p 1,x", &["--n-prompt", "x"]),
    ("bench -p 512", &["pp512", "512"]),
    ("bench -r 0", &["--repetitions", "at least 1"]),
    ("bench -o xml", &["--output", "md, csv, json, jsonl", "xml"]),
    ("bench --device cuda:99", &["cuda:99"]),
    ("completions tcsh", &["tcsh", "bash"]),
    ("completions", &["SHELL"]),
];

#[test]
fn every_bad_line_gets_one_sentence() {
    for (args, parts) in LINES {
        let ran = line(args);
        println!("{args}: {}", ran.stderr);
        ran.refused(parts);
    }
}

#[test]
fn an_empty_path_is_no_demo() {
    trine(["generate", "--model", "", "x"]).refused(&["--model", "value"]);
}

#[cfg(unix)]
#[test]
fn arguments_need_not_be_utf8() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let odd = OsStr::from_bytes(b"caf\xe9");
    trine([OsStr::new("generate"), odd]).refused(&["UTF-8"]);
    trine([OsStr::new("generate"), OsStr::new("-m"), odd, OsStr::new("x")])
        .refused(&["caf", "cannot be read"]);
    trine([odd]).refused(&["caf"]);
}

#[test]
fn prompts_must_be_utf8() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("latin1.txt");
    std::fs::write(&file, b"caf\xe9").unwrap();
    let path = file.to_str().unwrap();
    for args in
        [["generate", "--file", path], ["tokenize", "--file", path], ["perplexity", "--file", path]]
    {
        trine(args).refused(&["latin1.txt", "UTF-8", "offset 3"]);
    }
    with_input(["generate", "-"], b"caf\xe9").refused(&["standard input", "UTF-8", "offset 3"]);
}

/// Spoils a copy of the demo model and looks at what `generate` says.
fn spoilt(spoil: impl Fn(&Path), parts: &[&str]) {
    let folder = copy(&demo());
    spoil(folder.path());
    let path = folder.path().to_str().unwrap();
    trine(["generate", "--model", path, "x"]).refused(parts);
}

fn replace(file: &str, from: &str, to: &str) -> impl Fn(&Path) {
    let (file, from, to) = (file.to_owned(), from.to_owned(), to.to_owned());
    move |folder| {
        let path = folder.join(&file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(&from), "{file} holds {from}");
        std::fs::write(path, text.replace(&from, &to)).unwrap();
    }
}

#[test]
fn broken_checkpoints_are_refused_with_the_file() {
    let remove =
        |name: &'static str| move |folder: &Path| std::fs::remove_file(folder.join(name)).unwrap();
    let write = |name: &'static str, text: &'static str| {
        move |folder: &Path| std::fs::write(folder.join(name), text).unwrap()
    };
    spoilt(remove("config.json"), &["config.json"]);
    spoilt(remove("model.safetensors"), &["model.safetensors"]);
    spoilt(remove("tokenizer.json"), &["tokenizer.json"]);
    spoilt(write("config.json", "{"), &["config.json"]);
    spoilt(write("model.safetensors", "x"), &["model.safetensors"]);
    spoilt(write("tokenizer.json", "{}"), &["tokenizer.json"]);
    spoilt(write("generation_config.json", "[]"), &["generation_config.json"]);
    spoilt(
        write("generation_config.json", "{\"do_sample\":true,\"temperature\":1e-6}"),
        &["generation_config.json", "temperature", "0.001"],
    );
    spoilt(
        replace("tokenizer_config.json", "{% if add_generation_prompt %}", "{% if %}"),
        &["chat_template"],
    );
}

#[test]
fn a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused() {
    let folder = copy(&fixture("bitnet_packed"));
    std::fs::copy(demo().join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    std::fs::remove_file(folder.path().join("tokenizer_config.json")).unwrap();
    let path = folder.path().to_str().unwrap();
    trine(["generate", "--model", path, "x"]).refused(&["tokenizer.json", "317", "1023"]);
}

#[test]
fn a_model_without_tokenizer_or_template_says_so() {
    let plain = fixture("llama_absent");
    let path = plain.to_str().unwrap();
    for command in ["generate", "tokenize"] {
        trine([command, "--model", path, "x"]).refused(&["tokenizer.json", "llama_absent"]);
    }
    trine(["chat", "--model", path]).refused(&["chat template"]);
}

#[test]
fn names_in_files_cannot_break_the_line() {
    trine(["generate", "-m", "no\nsuch\x1b[31m", "x"]).refused(&["no\\nsuch"]);
}
