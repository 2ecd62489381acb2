//! `trine embed` against what transformers and sentence-transformers compute.

use std::path::Path;

use serde_json::Value;

use super::run::{copy, copy_into, fixture, parsed, trine, with_input};

fn reference(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/{name}/reference.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn vectors(stdout: &str) -> Vec<Value> {
    stdout.lines().map(parsed).collect()
}

#[test]
fn embeddings_are_those_of_transformers() {
    for name in ["qwen3_embedding", "gemma3_embedding"] {
        let folder = format!("tests/fixtures/{name}");
        let reference = reference(name);
        let cases = reference["embeddings"].as_array().unwrap();
        let texts: Vec<&str> = cases.iter().map(|case| case["text"].as_str().unwrap()).collect();
        for pooling in ["last", "mean"] {
            let flags = ["embed", "-m", &folder, "--device", "cpu", "--kv", "f32", "--json"];
            let flags = [&flags[..], &["--pooling", pooling]].concat();
            let found = vectors(&trine([&flags[..], &texts].concat()).good());
            assert_eq!(found.len(), cases.len());
            for (index, (case, found)) in cases.iter().zip(&found).enumerate() {
                assert_eq!(found["index"], index);
                assert_eq!(found["tokens"], case["ids"].as_array().unwrap().len());
                let (expected, found) = (numbers(&case[pooling]), numbers(&found["embedding"]));
                let length: f64 = found.iter().map(|x| x * x).sum();
                assert!((length - 1.0).abs() < 1e-5, "{length}");
                assert_eq!(expected.len(), found.len());
                for (a, b) in expected.iter().zip(&found) {
                    assert!((a - b).abs() < 1e-4, "{name} {pooling}: {b}, expected {a}");
                }
            }
            // Alone, and a line of standard input, and a file: the same bits.
            let alone = trine([&flags[..], &texts[..1]].concat()).good();
            assert_eq!(vectors(&alone)[0]["embedding"], found[0]["embedding"]);
            let lines = texts.join("\n");
            assert_eq!(vectors(&with_input(&flags, lines.as_bytes()).good()), found);
        }
    }
}

/// Embeds the texts of a reference and compares with its vectors of one kind.
fn compare(model: &Path, reference: &Value, kind: &str, flags: &[&str]) {
    let cases = reference.as_array().unwrap();
    let texts: Vec<&str> = cases.iter().map(|case| case["text"].as_str().unwrap()).collect();
    let model = model.to_str().unwrap();
    let all = ["embed", "-m", model, "--device", "cpu", "--kv", "f32", "--json"];
    let found = vectors(&trine([&all[..], flags, &texts].concat()).good());
    assert_eq!(found.len(), cases.len());
    for (case, found) in cases.iter().zip(&found) {
        assert_eq!(found["tokens"], case["ids"].as_array().unwrap().len());
        let (expected, found) = (numbers(&case[kind]), numbers(&found["embedding"]));
        assert_eq!(expected.len(), found.len());
        for (a, b) in expected.iter().zip(&found) {
            assert!((a - b).abs() < 1e-4, "{model} {kind}: {b}, expected {a}");
        }
    }
}

/// What sentence-transformers wrote beside a model is in force, and what it computes comes out; another
/// pooling is one that the user names.
#[test]
fn pooling_is_what_modules_say() {
    let reference = &reference("pooling")["cases"];
    for version in ["v3", "v6"] {
        for mode in ["lasttoken", "mean", "cls"] {
            let folder = copy(&fixture("qwen3_embedding"));
            copy_into(&fixture(&format!("pooling/{version}_{mode}")), folder.path());
            compare(folder.path(), reference, mode, &[]);
            compare(folder.path(), reference, "mean", &["--pooling", "mean"]);
            let path = folder.path().to_str().unwrap();
            let value = trine(["inspect", "-m", path, "--json"]).json();
            assert_eq!(value["pooling"]["mode"], mode.trim_end_matches("token"), "{value}");
            let said = value["pooling"]["said"].as_str().unwrap();
            assert!(said.contains("1_Pooling") && said.contains("pooling_mode"), "{said}");
        }
    }
    // Nothing says anything: the last.
    compare(&fixture("qwen3_embedding"), reference, "lasttoken", &[]);
    let model = fixture("qwen3_embedding");
    let text = trine(["inspect".as_ref(), "-m".as_ref(), model.as_os_str()]).good();
    assert!(text.contains("last, since nothing says another"), "{text}");
    compare(&model, reference, "cls", &["--pooling", "cls"]);
}

#[test]
fn pooling_that_is_not_implemented_is_refused_by_name_unless_another_is_named() {
    let reference = &reference("pooling")["cases"];
    for version in ["v3", "v6"] {
        for (mode, name) in [
            ("max", "max"),
            ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
            ("weightedmean", "weightedmean"),
            ("mean+lasttoken", "mean beside lasttoken"),
        ] {
            let folder = copy(&fixture("qwen3_embedding"));
            copy_into(&fixture(&format!("pooling/{version}_{mode}")), folder.path());
            let path = folder.path().to_str().unwrap();
            let refused = trine(["embed", "-m", path, "--device", "cpu", "a boat"]);
            assert_eq!(refused.code, Some(2), "{refused:?}");
            refused.sentence(&["1_Pooling", "pooling_mode", name, "is not supported", "--pooling"]);
            compare(folder.path(), reference, "lasttoken", &["--pooling", "last"]);
            let value = trine(["inspect", "-m", path, "--json"]).json();
            assert_eq!(value["pooling"]["mode"], Value::Null, "{value}");
            assert!(value["pooling"]["said"].as_str().unwrap().starts_with(name), "{value}");
        }
    }
}

/// A GGUF file that says mean, as its converter may: followed, and the doubt is said.
#[test]
fn pooling_is_what_a_gguf_file_says() {
    let folder = copy(&fixture("qwen3_embedding"));
    let file = folder.path().join("m.gguf");
    std::fs::copy(fixture("gguf/qwen3_embedding.scales.gguf"), &file).unwrap();
    let reference = &reference("pooling")["cases"];
    compare(&file, reference, "mean", &[]);
    compare(&file, reference, "lasttoken", &["--pooling", "last"]);
    let text = trine(["inspect".as_ref(), "-m".as_ref(), file.as_os_str()]).good();
    assert!(text.contains("mean, by qwen3.pooling_type in "), "{text}");
    assert!(text.contains("model cards of BitNet-embedding ask for last"), "{text}");
}

#[test]
fn any_model_embeds() {
    let line = trine(["embed", "--device", "cpu", "Shall I compare thee"]).good();
    let values: Vec<f64> = line.split_whitespace().map(|x| x.parse().unwrap()).collect();
    let length: f64 = values.iter().map(|x| x * x).sum();
    assert!((length - 1.0).abs() < 1e-5, "{length}");
}

#[test]
fn texts_that_cannot_be_embedded_are_refused() {
    with_input(["embed", "--device", "cpu"], b"").refused(&["at least one text"]);
    let long = "word ".repeat(400);
    trine(["embed", "--device", "cpu", "-c", "64", &long]).refused(&["text 1", "64 tokens"]);
}
