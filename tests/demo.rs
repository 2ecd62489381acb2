//! The demo model is a real checkpoint of the 2B4T architecture, small, and as good as it was
//! measured to be in PyTorch on text that it has never seen.
#![cfg(feature = "cli")]

use std::path::Path;
use std::process::Command;

use trine::checkpoint;
use trine::model::config::Family;

/// What `python tools/train_demo.py --eval-only models/demo` prints (docs/demo-model.md).
const PYTORCH_BITS_PER_BYTE: f64 = 2.00855;

/// The gate of the model: bits per byte on the last tenth of the text.
const MOST_BITS_PER_BYTE: f64 = 2.1;

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo"))
}

#[test]
fn it_predicts_unseen_text_as_well_as_in_pytorch() {
    let text = include_bytes!("../tools/data/tinyshakespeare.txt");
    // The split of tools/train_demo.py: nine tenths to train on, the last tenth never seen.
    let unseen = &text[text.len() - text.len().div_ceil(10)..];
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), unseen).expect("writes");
    let output = Command::new(env!("CARGO_BIN_EXE_trine"))
        .args(["perplexity", "--json"])
        .arg(file.path())
        .output()
        .expect("runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(result["bytes"], unseen.len());
    let found = result["bits_per_byte"].as_f64().expect("a number");
    assert!(found <= MOST_BITS_PER_BYTE, "{found} bits per byte");
    assert!((found / PYTORCH_BITS_PER_BYTE - 1.0).abs() <= 0.01, "{found} bits per byte");
}

#[test]
fn it_is_a_small_2b4t() {
    let bytes: u64 = std::fs::read_dir(folder())
        .expect("models/demo")
        .map(|entry| entry.expect("an entry").metadata().expect("metadata").len())
        .sum();
    assert!(bytes <= 4_000_000, "{bytes} bytes are embedded in the program");
    let checkpoint = checkpoint::open(folder()).expect("opens");
    let config = checkpoint.config();
    assert_eq!(config.family, Family::BitNet);
    assert!(config.heads.kv < config.heads.query, "grouped queries");
    assert!(config.tied_head);
}

/// The embedded model is the folder, byte for byte.
#[test]
fn the_embedded_model_is_the_folder() {
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_trine"))
            .args(["score", "--ids", "1,2,3,4,5", "--greedy", "8", "--logits", "--json"])
            .args(arguments)
            .output()
            .expect("runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    assert_eq!(run(&[]), run(&["--model", folder().to_str().expect("UTF-8")]));
}
