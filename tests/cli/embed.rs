//! `trine embed` against what transformers computes.

use serde_json::Value;

use super::run::{parsed, trine, with_input};

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
