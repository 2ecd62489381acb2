//! Text in, text out: generate, tokenize, inspect, devices, help, completions.

use std::io::Read;
use std::process::Stdio;

use super::run::{command, demo, fixture, line, parsed, trine, with_input};

const COMMANDS: [&str; 10] = [
    "generate",
    "chat",
    "inspect",
    "devices",
    "tokenize",
    "score",
    "perplexity",
    "bench",
    "convert",
    "completions",
];

#[test]
fn every_command_has_help_with_an_example() {
    for name in COMMANDS {
        let help = trine([name, "--help"]).good();
        assert!(help.contains("Example") && help.contains(&format!("trine {name}")), "{help}");
    }
    let help = line("--help").good();
    assert!(help.contains("Exit codes") && COMMANDS.iter().all(|name| help.contains(name)));
    assert!(line("--version").good().starts_with("trine "));
}

#[test]
fn generate_streams_text_to_stdout_and_the_rest_to_stderr() {
    let args = ["generate", "--ignore-eos", "-n", "12", "--seed", "1", "Shall I compare thee"];
    let first = trine(args);
    assert!(first.stderr.contains("seed 1") && first.stderr.contains("12 tokens"), "{first:?}");
    let text = first.good();
    assert!(text.trim().len() > 5 && text.ends_with('\n'), "{text:?}");
    assert_eq!(trine(args).good(), text, "the same seed gives the same text");
    let other = trine(["generate", "-n", "12", "--seed", "2", "Shall I compare thee"]).good();
    let prompt = trine(["generate", "-n", "12", "--seed", "1", "Now is the winter"]).good();
    assert!(other != text && prompt != text);
    let quiet = trine(["generate", "-n", "2", "-q", "x"]);
    assert_eq!(quiet.stderr, "");
}

#[test]
fn the_demo_is_the_folder_of_the_demo() {
    let args = "generate -n 8 --seed 3 Good-morrow --model";
    let demo = demo();
    let args: Vec<&str> = args.split(' ').chain([demo.to_str().unwrap()]).collect();
    let embedded = line("generate -n 8 --seed 3 Good-morrow").good();
    assert_eq!(trine(args).good(), embedded);
}

#[test]
fn prompts_come_from_anywhere() {
    let expected = line("generate -n 6 -temp 0 -q Good").good();
    assert_eq!(line("generate -n 6 -temp 0 -q -p Good").good(), expected);
    assert_eq!(with_input(["generate", "-n", "6", "-temp", "0"], b"Good\n").good(), expected);
    assert_eq!(with_input(["generate", "-n", "6", "-temp=0", "-"], b"Good").good(), expected);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    std::fs::write(&file, "Good\r\n").unwrap();
    let args = ["generate", "-n", "6", "--temp", "0", "-f", file.to_str().unwrap()];
    assert_eq!(trine(args).good(), expected);
}

#[test]
fn generate_as_json() {
    let args = "generate --ignore-eos -n 5 --seed 7 --json --logprobs 3 Good";
    let value = line(args).json();
    assert_eq!(value["usage"]["completion_tokens"], 5);
    assert_eq!(value["tokens"].as_array().unwrap().len(), 5);
    assert_eq!((&value["finish_reason"], &value["seed"]), (&"length".into(), &7.into()));
    assert!(value["timings"]["decode_per_second"].as_f64().unwrap() > 0.0);
    for token in value["logprobs"].as_array().unwrap() {
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        let top = token["top"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
    }
    let text = value["text"].as_str().unwrap();
    assert_eq!(
        line("generate --ignore-eos -n 5 --seed 7 Good").good().trim_end_matches('\n'),
        text
    );
    // A random seed is reported, and gives the same answer again.
    let random = line("generate -n 8 --json Good").json();
    let again = line(&format!("generate -n 8 --json Good -s {}", random["seed"])).json();
    assert_eq!(again["tokens"], random["tokens"]);
}

#[test]
fn an_answer_ends_before_its_stop_text() {
    let whole = line("generate --ignore-eos -n 24 --temperature 0 --json Good").json();
    let text = whole["text"].as_str().unwrap();
    // From the middle of the text, and across tokens: they have a few characters each.
    let characters: Vec<char> = text.chars().collect();
    let stop: String = characters[4..12].iter().collect();
    let before = text.split(&stop).next().unwrap();
    let args =
        ["generate", "--ignore-eos", "-n", "24", "-temp", "0", "--json", "--stop", &stop, "Good"];
    let value = trine(args).json();
    assert_eq!((value["text"].as_str(), value["stop"].as_str()), (Some(before), Some(&*stop)));
    assert_eq!(value["finish_reason"], "stop_text");
    let token = whole["tokens"][3].to_string();
    let args =
        format!("generate --ignore-eos -n 24 --temperature 0 --json --stop-token {token} Good");
    let value = line(&args).json();
    assert_eq!(value["finish_reason"], "stop_token");
    assert!(value["tokens"].as_array().unwrap().len() <= 3);
}

#[test]
fn biases_ban_and_force_tokens() {
    let forced = line("generate -n 3 --temperature 0 --logit-bias 40=1000 --json Good").json();
    assert_eq!(forced["tokens"], serde_json::json!([40, 40, 40]));
    let first = line("generate -n 1 --temperature 0 --json Good").json()["tokens"][0].to_string();
    let args = format!("generate -n 1 --temperature 0 --json --logit-bias {first}=-1000 Good");
    assert_ne!(line(&args).json()["tokens"][0].to_string(), first);
}

/// The first byte of a character, again and again: text is held back until it is hopeless.
#[test]
fn partial_characters_are_held_back() {
    let ids = trine(["tokenize", "--no-special", "\u{2603}"]).good();
    let first = ids.trim_end().split(',').next().unwrap();
    let bias = format!("{first}=1000");
    let args = ["generate", "-n", "3", "--temperature", "0", "--logit-bias", &bias, "--json", "A"];
    let value = trine(args).json();
    let ids = format!("{first},{first},{first}");
    let decoded = trine(["tokenize", "--no-special", "--json", "--decode", &ids]).json();
    assert_eq!(value["text"], decoded["text"]);
    assert!(value["text"].as_str().unwrap().contains('\u{fffd}'));
}

#[test]
fn the_context_ends_an_answer() {
    let value = line("generate -n -1 -c 16 --ignore-eos --json Good").json();
    assert_eq!(value["finish_reason"], "context");
    let usage = &value["usage"];
    let tokens =
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
    assert_eq!(tokens, 16);
}

#[test]
fn a_reader_that_goes_away_ends_it_quietly() {
    let mut child = command()
        .args(["generate", "-n", "-1", "--ignore-eos", "-q", "Good"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 4]).unwrap();
    drop(stdout);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = command();
    let output = command.args(["tokenize", "x"]).stdout(full).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with("error: standard output: cannot be written"), "{stderr}");
}

#[test]
fn every_op_can_be_checked_against_the_reference() {
    let plain = line("generate -n 4 --temperature 0 --json Good").json();
    let checked = line("generate -n 4 --temperature 0 --json --check --eager Good").json();
    assert_eq!(checked["tokens"], plain["tokens"]);
}

#[test]
fn threads_change_nothing() {
    let one = line("generate -n 12 --seed 5 -t 1 Good").good();
    assert_eq!(line("generate -n 12 --seed 5 -t 3 Good").good(), one);
}

#[test]
fn tokens_round_trip() {
    let text = "To be, or not to be:\n  that is the question — 2B4T & größer!";
    let value = trine(["tokenize", "--json", text]).json();
    let ids: Vec<String> =
        value["ids"].as_array().unwrap().iter().map(ToString::to_string).collect();
    let listed = trine(["tokenize", text]).good();
    assert_eq!(listed.trim_end(), ids.join(","));
    assert_eq!(with_input(["tokenize"], text.as_bytes()).good(), listed);
    let decoded = trine(["tokenize", "--json", "--no-special", "--decode", listed.trim_end()]);
    assert_eq!(decoded.json()["text"], text);
    let bare = trine(["tokenize", "--json", "--no-special", text]).json();
    assert_eq!(bare["ids"].as_array().unwrap()[..], value["ids"].as_array().unwrap()[1..]);
    let pieces = trine(["tokenize", "--pieces", text]).good();
    assert_eq!(pieces.lines().count(), ids.len());
    assert!(pieces.starts_with(&format!("{}\t<|begin_of_text|>", ids[0])));
}

#[test]
fn control_tokens_are_parsed_unless_the_text_is_plain() {
    let parsed = trine(["tokenize", "--json", "a<|eot_id|>"]).json();
    assert_eq!(parsed["ids"].as_array().unwrap().last().unwrap(), 1023);
    let plain = trine(["tokenize", "--json", "--plain", "a<|eot_id|>"]).json();
    assert!(!plain["ids"].as_array().unwrap().contains(&1023.into()));
}

/// Ids, decoded texts and rendered chats against transformers.
#[test]
fn tokens_are_those_of_transformers() {
    for name in ["bitnet_packed", "bitnet_long", "llama_bitlinear"] {
        let folder = fixture(name);
        let model = folder.to_str().unwrap();
        let reference = parsed(&std::fs::read_to_string(folder.join("reference.json")).unwrap());
        for case in reference["tokenizer"]["texts"].as_array().unwrap() {
            let args = ["tokenize", "--json", "--model", model];
            let got = with_input(args, case["text"].as_str().unwrap().as_bytes()).json();
            assert_eq!(got["ids"], case["ids"], "{name}: {}", case["text"]);
        }
        for case in reference["tokenizer"]["chats"].as_array().unwrap() {
            let mut args = vec!["tokenize", "--model", model, "--chat", "-"];
            if case["add_generation_prompt"] == false {
                args.push("--no-generation-prompt");
            }
            let messages = case["messages"].to_string();
            let text = with_input(args.clone(), messages.as_bytes()).good();
            assert_eq!(text, case["text"].as_str().unwrap(), "{name}");
            args.push("--json");
            let value = with_input(args, messages.as_bytes()).json();
            assert_eq!(value["text"], case["text"]);
            assert!(!value["ids"].as_array().unwrap().is_empty());
        }
    }
}

#[test]
fn inspect_shows_what_is_there() {
    let text = line("inspect --tensors").good();
    for part in
        ["demo model", "BitNet b1.58", "KV per token", "temperature", "runs on cpu", "TENSOR"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(line("inspect models/demo").good().contains("models/demo"));
    let value = line("inspect --json --verify").json();
    assert_eq!(value["config"]["vocabulary"], 1024);
    // 5 layers of keys and values of 2 heads of 32, two bytes each.
    assert_eq!(value["bytes"]["kv_per_token_f16"], 5 * 2 * 2 * 32 * 2);
    assert_eq!(value["bytes"]["kv_per_token_int8"], 5 * 2 * 2 * (32 + 4));
    assert_eq!(value["parameters"], value["files"]["parameters"]);
    assert!((value["sampling"]["temperature"].as_f64().unwrap() - 0.8).abs() < 1e-6);
    let cpu = value["runs_on"].as_array().unwrap().iter().find(|device| device["name"] == "cpu");
    assert_eq!(cpu.unwrap()["fits"], true);
    let synthetic = line("inspect --json --synthetic 2b4t").json();
    assert_eq!(synthetic["parameters"], 2_412_820_480u64);
}

/// A GGUF file is a model like any other, and says what it is.
#[test]
fn gguf_files_are_models() {
    let [folder, file] = ["bitnet_blocks", "gguf/bitnet_blocks.i2_s.gguf"].map(fixture);
    let [folder, file] = [&folder, &file].map(|path| path.to_str().unwrap());
    let score = |model| {
        let args = ["score", "--model", model, "--ids", "1,2,3", "--greedy", "4", "--json"];
        trine(args).json()
    };
    assert_eq!(score(file), score(folder));
    let value = trine(["inspect", "--json", "--verify", "--model", file]).json();
    assert_eq!(value["files"]["format"], "GGUF version 3");
    assert_eq!(value["files"]["architecture"], "bitnet-b1.58");
    let text = trine(["inspect", "--metadata", "--model", file]).good();
    for part in ["hidden_activation: relu2, from general.architecture", "I2_S", "general.file_type"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    trine(["tokenize", "--model", file, "text"]).sentence(&["tokenizer"]);
}

#[test]
fn devices_say_why_not() {
    let value = line("devices --json").json();
    let devices = value.as_array().unwrap();
    let find = |name: &str| devices.iter().find(|device| device["name"] == name).unwrap();
    assert_eq!(find("cpu")["available"], true);
    // One that is there has a number.
    if let Some(cuda) = devices.iter().find(|device| device["name"] == "cuda") {
        let reason = cuda["reason"].as_str().unwrap();
        assert!(reason.contains("NVIDIA driver") || reason.contains("CUDA backend"), "{cuda}");
    }
    assert!(line("devices").good().contains("cpu"));
}

#[test]
fn shells_get_completions() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = trine(["completions", shell]).good();
        assert!(script.contains("trine") && script.contains("perplexity"), "{shell}");
    }
}
