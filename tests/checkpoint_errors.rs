//! Broken checkpoints: each case has one defect and the sentence that it must produce, whole but
//! for the folder before it. A `*` stands for words of another library.

mod checkpoint_base;
mod checkpoint_cases;
#[path = "checkpoint_gguf/file.rs"]
mod gguf_file;

use std::fs;
use std::path::Path;

use checkpoint_base::{Base, container};
use checkpoint_cases::Case;
use gguf_file::File;
use trine::checkpoint::{Checkpoint, Files, open, open_files};
use trine::error::LoadError;
use trine::tensor::SharedBytes;

fn fault(path: &Path) -> Option<LoadError> {
    open(path).and_then(|checkpoint: Checkpoint| checkpoint.verify()).err()
}

/// Whether `text` is the pattern, each `*` standing for anything.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    for part in parts.clone() {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.is_empty() || pattern.ends_with('*')
}

fn check(cases: &[Case]) {
    let mut wrong = Vec::new();
    for (what, bend, expected) in cases {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut base = Base::bitnet();
        bend(&mut base);
        base.write(folder.path());
        let found = match fault(folder.path()) {
            Some(error) => error.to_string(),
            None => "no error".into(),
        };
        let place = format!("{}/", folder.path().display());
        if !matches(expected, found.strip_prefix(&place).unwrap_or(&found)) {
            wrong.push(format!("{what}\n  expected {expected}\n     found {found}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn configs() {
    check(checkpoint_cases::config::CONFIG);
}

#[test]
fn containers() {
    check(checkpoint_cases::container::CONTAINER);
}

#[test]
fn tensors() {
    check(checkpoint_cases::tensors::TENSORS);
}

#[test]
fn text_and_sampling() {
    check(checkpoint_cases::text::TEXT_AND_SAMPLING);
}

#[test]
fn pooling() {
    check(checkpoint_cases::pooling::POOLING);
    check_gguf(File::bitnet, checkpoint_cases::pooling::POOLING_TYPE);
}

/// What is well formed and not implemented does not stand in the way of anything but pooling.
#[test]
fn pooling_that_is_not_implemented_is_no_fault() {
    let of_gguf = |kind: u32| {
        let mut file = File::bitnet();
        file.of("pooling_type", gguf_file::u32_value(kind));
        let checkpoint = file.open().expect("a sound file");
        checkpoint.pooling().in_force().map_err(|error| error.to_string())
    };
    use trine::checkpoint::Pooling;
    assert_eq!([1, 2, 3].map(of_gguf), [Pooling::Mean, Pooling::Cls, Pooling::Last].map(Ok));
    for (kind, found) in [
        (0, "0, a vector for each token,"),
        (4, "4, a rank and no vector,"),
        (5, "5"),
        (u32::MAX, "4294967295"),
    ] {
        assert_eq!(
            of_gguf(kind),
            Err(format!(
                "m.gguf: bitnet-b1.58.pooling_type: {found} is not supported; supported: last, mean \
                 and cls, one of which can be named instead (--pooling)"
            ))
        );
    }
    // A folder without a list of modules, and one whose modules do not pool.
    for (name, text, expected) in [
        ("1_Pooling/config.json", r#"{"pooling_mode_mean_tokens": true}"#, Pooling::Mean),
        ("1_Pooling/config.json", "{}", Pooling::Mean),
        ("modules.json", r#"[{"type": "sentence_transformers.models.Normalize"}]"#, Pooling::Last),
        ("1_Pooling/README.md", "nothing", Pooling::Last),
    ] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut base = Base::bitnet();
        base.files.insert(name.into(), text.into());
        base.write(folder.path());
        let checkpoint = open(folder.path()).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(
            checkpoint.pooling().in_force().expect("implemented"),
            expected,
            "{name} {text}"
        );
        assert_eq!(checkpoint.embeds(), name == "modules.json");
    }
}

fn check_gguf(base: fn() -> File, cases: &[checkpoint_cases::gguf::Case]) {
    base().open().unwrap_or_else(|e| panic!("{e}"));
    let mut wrong = Vec::new();
    for (what, bend, expected) in cases {
        let mut file = base();
        bend(&mut file);
        let found = file.open().err().map_or("no error".into(), |error| error.to_string());
        if !matches(expected, found.strip_prefix("m.gguf: ").unwrap_or(&found)) {
            wrong.push(format!("{what}\n  expected {expected}\n     found {found}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn gguf_containers() {
    check_gguf(File::bitnet, checkpoint_cases::gguf::CONTAINER);
}

#[test]
fn gguf_configs() {
    check_gguf(File::bitnet, checkpoint_cases::gguf::CONFIG);
}

#[test]
fn gguf_tensors() {
    check_gguf(File::bitnet, checkpoint_cases::gguf::TENSORS);
    check_gguf(File::llama, checkpoint_cases::gguf::LLAMA);
    check_gguf(File::gemma3, checkpoint_cases::gguf::GEMMA3);
}

/// No cut and no flipped bit of a GGUF file makes a panic; a cut is always an error.
#[test]
fn cut_and_flipped_gguf_files_never_panic() {
    let good = File::bitnet().bytes();
    let fault = |bytes: Vec<u8>| {
        let files = vec![("m.gguf".to_owned(), SharedBytes::new(bytes))];
        open_files(Files::Memory { label: "".into(), files })
            .and_then(|checkpoint| checkpoint.verify())
            .err()
    };
    for cut in 0..good.len() {
        let error = fault(good[..cut].to_vec()).map(|error| error.to_string());
        assert!(error.is_some_and(|e| e.starts_with("m.gguf: ")), "cut at {cut}");
    }
    let header = good.windows(18).rposition(|w| w == b"output_norm.weight").expect("a name") + 50;
    for bit in 0..8 * header {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        // Some flips change a name that nothing asks for, or nothing at all.
        fault(bytes);
    }
}

/// Broken adapters, and adapters that do not fit the model.
#[test]
fn adapters() {
    use checkpoint_cases::lora::{ADAPTERS, Adapter};

    let model = tempfile::tempdir().expect("a temporary folder");
    Base::bitnet().write(model.path());
    let sentence = |folder: &Path| {
        let base = open(model.path()).expect("a sound model");
        let adapter = trine::checkpoint::lora::Adapter::open(folder, 1.0);
        let added = adapter.and_then(|adapter| {
            let mut adapted = trine::checkpoint::adapted::Adapted::new(&base);
            adapted.add(adapter)?;
            // The matrices are made when the model is loaded.
            trine::model::weights::WeightSource::adapter(
                &adapted,
                0,
                trine::model::config::Projection::Query,
            )
        });
        added.err().map_or("no error".into(), |error| error.to_string())
    };
    let mut wrong = Vec::new();
    for (what, bend, expected) in ADAPTERS {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut adapter = Adapter::new();
        bend(&mut adapter);
        adapter.write(folder.path());
        let found = sentence(folder.path());
        let place = folder.path().display().to_string();
        let found = found.strip_prefix(&place).unwrap_or(&found).trim_start_matches('/');
        if !matches(expected, found) {
            wrong.push(format!("{what}\n  expected {expected}\n     found {found}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), ADAPTERS.len(), wrong.join("\n"));
}

/// An adapter is no model, and a model no adapter.
#[test]
fn adapters_are_not_models() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    checkpoint_cases::lora::Adapter::new().write(folder.path());
    let place = folder.path().display().to_string();
    assert_eq!(
        fault(folder.path()).expect("an error").to_string(),
        format!(
            "{place}: format: a LoRA adapter is not supported; supported: a model; --lora applies \
             an adapter to one"
        )
    );
    Base::bitnet().write(folder.path());
    assert!(fault(folder.path()).is_none(), "a model beside an adapter is a model");
}

/// Every cut of a good adapter is an error and not a panic.
#[test]
fn cut_adapters_never_panic() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    checkpoint_cases::lora::Adapter::new().write(folder.path());
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        let good = fs::read(folder.path().join(name)).expect("read");
        for cut in (0..good.len()).step_by(37) {
            fs::write(folder.path().join(name), &good[..cut]).expect("written");
            let error = trine::checkpoint::lora::Adapter::open(folder.path(), 1.0).err();
            assert!(error.is_some_and(|e| e.to_string().contains(name)), "{name} cut at {cut}");
        }
        fs::write(folder.path().join(name), &good).expect("written");
    }
}

/// Paths that are not there, or not what they should be.
#[test]
fn paths() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| folder.path().join(name);
    let sentence = |path: &Path| {
        let error = fault(path).expect("an error").to_string();
        error.replace(&format!("{}", folder.path().display()), "FOLDER")
    };
    let os = std::io::Error::from_raw_os_error(2);
    assert_eq!(sentence(&at("none")), format!("FOLDER/none: cannot be read: {os}"));
    assert_eq!(
        sentence(folder.path()),
        "FOLDER/config.json: cannot be read: there is no such file"
    );

    fs::write(at("model.bin"), b"?").expect("written");
    assert_eq!(
        sentence(&at("model.bin")),
        "FOLDER/model.bin: format: this kind of file is not supported; supported: a folder with \
         config.json and model.safetensors, a .safetensors file in one, or a .gguf file"
    );

    Base::bitnet().write(folder.path());
    fs::remove_file(at("model.safetensors")).expect("removed");
    assert_eq!(
        sentence(folder.path()),
        "FOLDER: weights: expected model.safetensors or model.safetensors.index.json, found neither"
    );
    fs::write(at("pytorch_model.bin"), b"").expect("written");
    assert_eq!(
        sentence(folder.path()),
        "FOLDER: weights: expected model.safetensors or model.safetensors.index.json, found only \
         pytorch_model.bin, which can run code when it is read"
    );
    fs::create_dir(at("model.safetensors")).expect("made");
    assert_eq!(
        sentence(folder.path()),
        "FOLDER/model.safetensors: kind: expected a file, found a folder"
    );
    fs::remove_file(at("config.json")).expect("removed");
    fs::create_dir(at("config.json")).expect("made");
    assert_eq!(
        sentence(folder.path()),
        "FOLDER/config.json: kind: expected a file, found a folder"
    );
}

/// Every cut of a good file is an error and not a panic, and so is every flipped bit of its header
/// that makes one.
#[test]
fn cut_and_flipped_files_never_panic() {
    let base = Base::bitnet();
    let good = container(&base.tensors);
    let header_end = 8 + u64::from_le_bytes(good[..8].try_into().expect("8 bytes")) as usize;
    let fault = |weights: Vec<u8>| {
        let config = base.config.to_string().into_bytes();
        let files = [("config.json", config), ("model.safetensors", weights)];
        let files = files.map(|(name, bytes)| (name.to_owned(), SharedBytes::new(bytes)));
        open_files(Files::Memory { label: "memory".into(), files: files.into() })
            .and_then(|checkpoint| checkpoint.verify())
            .err()
    };
    for cut in 0..good.len() {
        let error = fault(good[..cut].to_vec()).map(|error| error.to_string());
        assert!(error.is_some_and(|e| e.contains("model.safetensors: ")), "cut at {cut}");
    }
    for at in 0..header_end {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        // Some flips change a name that nothing asks for, or nothing at all.
        fault(bytes);
    }
}
