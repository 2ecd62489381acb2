//! `--lora`, and adapters as models, against PEFT.

use serde_json::Value;

use super::run::{copy, fixture, line, parsed, trine};

/// A case of an adapter's reference: ids, logits and greedy tokens.
fn case(adapter: &str, cases: &str) -> Value {
    let text = std::fs::read_to_string(fixture(adapter).join("reference.json")).unwrap();
    parsed(&text)[cases][1].clone()
}

#[track_caller]
fn expect(case: &Value, flags: &str) {
    let ids: Vec<String> = case["ids"].as_array().unwrap().iter().map(Value::to_string).collect();
    let steps = case["greedy"].as_array().unwrap().len();
    let ids = ids.join(",");
    let found =
        line(&format!("score --device cpu --ids {ids} --greedy {steps} --logits --json {flags}"));
    let found = found.json();
    assert_eq!(found["tokens"], case["greedy"], "{flags}");
    let logits = found["logits"].as_array().unwrap().iter().zip(case["logits"].as_array().unwrap());
    for (found, expected) in logits {
        let difference = found.as_f64().unwrap() - expected.as_f64().unwrap();
        assert!(difference.abs() <= 2e-3, "{flags}: {found} and {expected}");
    }
}

#[test]
fn adapters_are_applied_by_flag_and_as_models() {
    let (packed, both) = (case("lora_packed", "cases"), case("lora_patterns", "both"));
    let base = "--model tests/fixtures/bitnet_silu";
    expect(&packed, &format!("{base} --lora tests/fixtures/lora_packed"));
    // Its config says where the base is.
    expect(&packed, "--model tests/fixtures/lora_packed");
    expect(&packed, "--model tests/fixtures/lora_packed/adapter_model.safetensors");
    // Two, by flags, and one as the model; half of one twice.
    let second = "--lora tests/fixtures/lora_patterns";
    expect(&both, &format!("{base} --lora tests/fixtures/lora_packed {second}"));
    expect(&both, &format!("--model tests/fixtures/lora_packed {second}"));
    let half = "--lora tests/fixtures/lora_packed:0.5";
    expect(&packed, &format!("{base} {half} {half}"));
}

#[test]
fn inspect_shows_adapters_and_their_memory() {
    let flags = "--model tests/fixtures/lora_patterns --lora tests/fixtures/lora_packed:0.5";
    let found = line(&format!("inspect --json {flags}")).json();
    let [first, second] = found["adapters"].as_array().unwrap().as_slice() else {
        panic!("{found}");
    };
    assert_eq!((&first["ranks"], &first["scale"]), (&parsed("[1,7]"), &parsed("1.0")));
    assert_eq!((&second["ranks"], &second["scale"]), (&parsed("[32,32]"), &parsed("0.5")));
    assert_eq!(second["matrices"], 7);
    // bitnet_silu: 40 and 52 wide, one layer.
    let second_parameters = 32 * (4 * (40 + 40) + 2 * (40 + 52) + (52 + 40));
    assert_eq!(second["parameters"], second_parameters);
    let weights = first["parameters"].as_u64().unwrap() + second_parameters;
    let rows = 256 * (39 + 52);
    assert_eq!(found["memory"]["adapter_bytes"], 4 * (weights + rows));
    let text = line(&format!("inspect {flags}")).good();
    for part in ["lora_packed", "times 0.5", "rank 32", "rank 1 to 7", "+ adapters"] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!line("inspect").good().contains("adapter"));
}

/// Merged into master weights, written, and read again: what PEFT's merge computes.
#[test]
fn convert_merges_adapters_into_master_weights() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("merged");
    let out = out.to_str().unwrap();
    let merge = "--type hf --merge tests/fixtures/lora_master";
    line(&format!("convert tests/fixtures/llama_master_f16 {out} {merge}")).good();
    expect(&case("lora_master", "merged"), &format!("--model {out}"));

    // Ternary weights have no room for an adapter.
    let other = folder.path().join("other");
    let other_name = other.to_str().unwrap();
    let merge = "--type hf --merge tests/fixtures/lora_packed";
    line(&format!("convert tests/fixtures/bitnet_silu {other_name} {merge}")).refused(&[
        "lora_packed",
        "without float master weights of self_attn.q_proj in layer 0",
        "master weights",
        "--lora",
    ]);
    assert!(!other.exists());
}

/// The same base as GGUF, merged: the same bytes as from its folder, in either form.
#[test]
fn convert_merges_adapters_into_master_weights_of_gguf_files() {
    let folder = tempfile::tempdir().unwrap();
    let [hf, gguf] = ["bitnet_1bitllm", "gguf/bitnet_1bitllm.f16.gguf"].map(|base| {
        let out = folder.path().join(base.replace('/', "_"));
        let merge = "--type hf --merge tests/fixtures/lora_1bitllm";
        line(&format!("convert tests/fixtures/{base} {} {merge}", out.display())).good();
        expect(&case("lora_1bitllm", "merged"), &format!("--model {}", out.display()));
        std::fs::read(out.join("model.safetensors")).unwrap()
    });
    assert!(hf == gguf, "{} and {} bytes", hf.len(), gguf.len());

    // Ternary floats are not masters.
    let other = folder.path().join("other");
    let base = "tests/fixtures/gguf/bitnet_silu.scales.gguf";
    let merge = "--type hf --merge tests/fixtures/lora_packed";
    line(&format!("convert {base} {} {merge}", other.display())).refused(&[
        "lora_packed",
        "without float master weights of self_attn.q_proj in layer 0",
        "a folder or a GGUF file with float master weights",
    ]);
}

/// Where the norm is part of the projection, an adapter comes before it, and cannot be merged.
#[test]
fn adapters_of_embedding_models() {
    for (base, adapter) in [("qwen3_embedding", "lora_qwen3"), ("gemma3_embedding", "lora_gemma3")]
    {
        let text = std::fs::read_to_string(fixture(adapter).join("reference.json")).unwrap();
        let cases = &parsed(&text)["embeddings"];
        let cases = cases.as_array().unwrap();
        let texts: Vec<&str> = cases.iter().map(|case| case["text"].as_str().unwrap()).collect();
        let vectors = |pooling: &str, lora: &[&str]| -> Vec<Vec<f64>> {
            let (base, lora) = (fixture(base), lora.iter().copied());
            let flags = ["embed", "-m", base.to_str().unwrap(), "--pooling", pooling, "--device"];
            let flags = flags.into_iter().chain(["cpu", "--kv", "f32", "--json"]).chain(lora);
            let found = trine(flags.chain(texts.iter().copied())).good();
            let vector = |line: &str| {
                let numbers = parsed(line)["embedding"].clone();
                numbers.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
            };
            found.lines().map(vector).collect()
        };
        let furthest = |found: &[Vec<f64>], pooling: &str| {
            let mut worst = 0.0f64;
            for (found, case) in found.iter().zip(cases) {
                let expected = case[pooling].as_array().unwrap();
                assert_eq!(found.len(), expected.len());
                for (found, expected) in found.iter().zip(expected) {
                    worst = worst.max((found - expected.as_f64().unwrap()).abs());
                }
            }
            worst
        };
        let adapter = fixture(adapter);
        let adapter = adapter.to_str().unwrap();
        for pooling in ["last", "mean"] {
            let found = vectors(pooling, &["--lora", adapter]);
            let worst = furthest(&found, pooling);
            assert!(worst < 1e-3, "{adapter}, {pooling}: {worst}");
            let without = furthest(&vectors(pooling, &[]), pooling);
            assert!(without > 0.01, "{adapter} changes nothing: {without}");
        }
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let base = fixture(base);
        let merge = format!("--type hf --merge {adapter}");
        line(&format!("convert {} {} {merge}", base.display(), out.display())).refused(&[
            "merging",
            "a norm inside its projections",
            "--lora",
        ]);
        assert!(!out.exists());
    }
}

/// A base that is not on this machine is named, one that is another is told.
#[test]
fn a_base_that_is_not_there_is_named() {
    let adapter = copy(&fixture("lora_packed"));
    let folder = adapter.path().to_str().unwrap();
    let ran = trine(["inspect", "--model", folder]);
    ran.refused(&["base_model_name_or_path", "../bitnet_silu", "--model", "--lora"]);

    let config = adapter.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("../bitnet_silu", "someone/another-model")).unwrap();
    let base = fixture("bitnet_silu");
    let ran = trine(["inspect", "--model", base.to_str().unwrap(), "--lora", folder]);
    assert!(ran.stderr.contains("someone/another-model"), "{ran:?}");
    ran.good();
    let same = line("inspect --model tests/fixtures/bitnet_silu --lora tests/fixtures/lora_packed");
    assert_eq!(same.stderr, "");

    std::fs::write(&config, text.replace("../bitnet_silu", ".")).unwrap();
    trine(["inspect", "--model", folder])
        .refused(&["base_model_name_or_path", "an adapter itself"]);
}
