//! What is exported reads back as what it was.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;

use trine::backend::ops::Heads;
use trine::checkpoint::export::{ExportOptions, Format, Source, TableType, export};
use trine::checkpoint::synthetic::{SyntheticModel, published};
use trine::checkpoint::{
    Checkpoint, DeclaredPooling, GenerationDefaults, Pooling, TokenizerFiles, open, open_tokenizer,
};
use trine::error::ExportError;
use trine::model::config::{Attention, LocalLayers, ModelConfig, NormRole, Projection};
use trine::model::weights::WeightSource;
use trine::text::Special;

fn fixtures() -> impl Iterator<Item = (String, Checkpoint)> {
    let entries = fs::read_dir("tests/fixtures").expect("fixtures");
    let folders = entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_dir());
    folders.filter(|folder| folder.join("config.json").exists()).map(|folder| {
        let name = folder.file_name().expect("a name").to_string_lossy().into_owned();
        (name, open(&folder).unwrap_or_else(|e| panic!("{e}")))
    })
}

fn assert_same(name: &str, before: &Checkpoint, after: &Checkpoint) {
    assert_eq!(before.generation(), after.generation(), "{name}");
    assert_same_weights(name, before, after);
}

fn assert_same_weights(name: &str, before: &dyn WeightSource, after: &dyn WeightSource) {
    assert_eq!(before.config(), after.config(), "{name}");
    let mut roles = vec![NormRole::Final];
    for layer in 0..before.config().layers {
        roles.extend(before.config().layer_norms(layer));
        for projection in Projection::ALL {
            let pair = [before, after].map(|c| c.ternary(layer, projection).expect("a matrix"));
            let [old, new] = &pair;
            let at = format!("{name}, layer {layer}, {projection:?}");
            assert_eq!(old.scale(), new.scale(), "{at}");
            assert_eq!((old.rows(), old.cols()), (new.rows(), new.cols()), "{at}");
            for row in 0..old.rows() {
                let codes = [old, new].map(|matrix| {
                    let mut codes = vec![9; matrix.cols()];
                    matrix.read_codes(row, &mut codes);
                    codes
                });
                assert_eq!(codes[0], codes[1], "{at}, row {row}");
            }
        }
    }
    for role in roles {
        assert_eq!(before.norm(role).expect("a norm"), after.norm(role).expect("a norm"), "{name}");
    }
    for (old, new) in [
        (before.embedding().expect("a table"), after.embedding().expect("a table")),
        (before.head().expect("a table"), after.head().expect("a table")),
    ] {
        assert_eq!((old.rows, old.cols, old.float), (new.rows, new.cols, new.float), "{name}");
        assert_eq!(*old.bytes, *new.bytes, "{name}");
    }
}

/// Packed, float and master weights, scales that multiply and that divide, tied and not, in shards
/// and not: all become the one form of a folder, and no bit of a weight changes.
#[test]
fn every_fixture_survives_as_a_folder() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut count = 0;
    for (name, before) in fixtures() {
        let out = folder.path().join(&name);
        let options = ExportOptions::new(Format::Hf);
        let result = export(&before.export_source(), &out, &options, &mut |_, _| true);
        result.unwrap_or_else(|e| panic!("{name}: {e}"));
        let after = open(&out).unwrap_or_else(|e| panic!("{name}: {e}"));
        after.verify().unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_same(&name, &before, &after);
        assert_eq!(before.embeds(), after.embeds(), "{name}");
        count += 1;
    }
    assert!(count >= 10, "{count} fixtures");
}

/// Folder to GGUF to folder, in each type that holds the model: no bit of a weight changes.
#[test]
fn weights_survive_gguf_and_back() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let demo = ("demo".to_owned(), open(Path::new("models/demo")).expect("opens"));
    let mut written = Vec::new();
    for (name, before) in fixtures().chain([demo]) {
        for format in [Format::I2S, Format::Tq2, Format::Tq1] {
            let gguf = folder.path().join(format!("{name}-{format:?}.gguf"));
            let options = ExportOptions::new(format);
            match export(&before.export_source(), &gguf, &options, &mut |_, _| true) {
                Err(ExportError::Unfit { .. }) => continue,
                result => result.unwrap_or_else(|e| panic!("{name}: {e}")),
            };
            let between = open(&gguf).unwrap_or_else(|e| panic!("{e}"));
            between.verify().unwrap_or_else(|e| panic!("{e}"));
            assert_same_weights(&gguf.display().to_string(), &before, &between);
            let out = gguf.with_extension("");
            let options = ExportOptions::new(Format::Hf);
            let result = export(&between.export_source(), &out, &options, &mut |_, _| true);
            result.unwrap_or_else(|e| panic!("{name}: {e}"));
            let after = open(&out).unwrap_or_else(|e| panic!("{e}"));
            assert_same_weights(&out.display().to_string(), &before, &after);
            written.push(format!("{name}-{format:?}"));
        }
    }
    println!("{written:?}");
    assert!(written.contains(&"demo-I2S".to_owned()), "{written:?}");
}

/// Tokenizers of GGUF files become a `tokenizer.json` and a GGUF vocabulary again, and give the same
/// ids.
#[test]
fn tokenizers_of_gguf_files_survive() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let texts =
        ["Shall I compare thee", "  two\n\n lines\t", "12345 naïve 🙂 שלום", "", "don't 'RE"];
    for name in
        ["llama_bpe", "bitnet_2b4t", "gpt2", "qwen2", "smollm", "llama", "llama_flat", "gemma"]
    {
        let file = Path::new("tests/gguf_tokenizer").join(name).with_extension("gguf");
        let files = open_tokenizer(&file).unwrap_or_else(|e| panic!("{e}"));
        let before = files.tokenizer().expect("reads").expect("a tokenizer");
        let config = ModelConfig {
            hidden: 128,
            ffn: 128,
            layers: 1,
            heads: Heads { query: 2, kv: 1, dim: 64 },
            vocabulary: before.vocabulary_size(),
            ..published("2b4t").expect("a shape")
        };
        let model = SyntheticModel::new(config, 1).expect("valid");
        let generation = GenerationDefaults::default();
        let source = Source {
            weights: &model,
            tokenizer: &files,
            generation: &generation,
            embeds: false,
            pooling: &DeclaredPooling::Nothing,
            name,
            files: None,
        };
        let hf = folder.path().join(name);
        let gguf = hf.with_extension("gguf");
        for (path, format) in [(&hf, Format::Hf), (&gguf, Format::I2S)] {
            let result = export(&source, path, &ExportOptions::new(format), &mut |_, _| true);
            result.unwrap_or_else(|e| panic!("{name}: {e}"));
            let after = open_tokenizer(path).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(after.bos_token, files.bos_token, "{name}");
            assert_eq!(after.eos_token, files.eos_token, "{name}");
            assert_eq!(after.chat_template, files.chat_template, "{name}");
            let after = after.tokenizer().expect("reads").expect("a tokenizer");
            for text in texts {
                for special in [Special::PROMPT, Special::NONE] {
                    let ids = [&before, &after].map(|t| t.encode(text, special).expect("ids"));
                    assert_eq!(ids[0], ids[1], "{name}, {format:?}: {text:?}");
                    assert_eq!(before.decode(&ids[0], true), after.decode(&ids[0], true), "{name}");
                }
            }
        }
    }
}

/// A model with a norm before each projection, as GGUF and as a folder, with its pooling and the token
/// that ends a text, from a model in memory, from GGUF and from a folder.
#[test]
fn an_embedding_model_survives() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files = open_tokenizer(Path::new("tests/gguf_tokenizer/qwen2.gguf")).expect("opens");
    let tokenizer = files.tokenizer().expect("reads").expect("a tokenizer");
    let end = tokenizer.token_id("<|endoftext|>").or(tokenizer.eos_id()).expect("an end");
    let config = ModelConfig {
        hidden: 256,
        ffn: 512,
        layers: 2,
        heads: Heads { query: 4, kv: 2, dim: 64 },
        vocabulary: tokenizer.vocabulary_size(),
        ..published("embedding-0.6b").expect("a shape")
    };
    let model = SyntheticModel::new(config, 1).expect("valid");
    let generation = GenerationDefaults::default();
    for pooling in [Pooling::Last, Pooling::Mean, Pooling::Cls] {
        let declared = match pooling {
            Pooling::Last => DeclaredPooling::Nothing,
            _ => DeclaredPooling::Declared { pooling, file: "a".into(), field: "b".into() },
        };
        let source = Source {
            weights: &model,
            tokenizer: &files,
            generation: &generation,
            embeds: true,
            pooling: &declared,
            name: "embeds",
            files: None,
        };
        let check = |path: &Path, from: &Source<'_>, format: Format| {
            let result = export(from, path, &ExportOptions::new(format), &mut |_, _| true);
            result.unwrap_or_else(|e| panic!("{format:?}: {e}"));
            let after = open(path).unwrap_or_else(|e| panic!("{e}"));
            after.verify().unwrap_or_else(|e| panic!("{e}"));
            let name = path.display().to_string();
            assert_same_weights(&name, &model, &after);
            assert!(after.embeds(), "{name}");
            assert_ne!(*after.pooling(), DeclaredPooling::Nothing, "{name}");
            assert_eq!(after.pooling().in_force().expect("implemented"), pooling, "{name}");
            let read = after.tokenizer().tokenizer().expect("reads").expect("a tokenizer");
            assert_eq!(after.embedding_end(&read), [end], "{name}");
            after
        };
        let named = |name: String| folder.path().join(format!("{pooling:?}-{name}"));
        let hf = check(&named("hf".into()), &source, Format::Hf);
        for format in [Format::I2S, Format::Tq2, Format::Tq1] {
            check(&named(format!("hf-{format:?}.gguf")), &hf.export_source(), format);
            let gguf = check(&named(format!("{format:?}.gguf")), &source, format);
            let back = named(format!("{format:?}-hf"));
            check(&back, &gguf.export_source(), Format::Hf);
            // A folder with modules may be replaced, one with something of the user's may not.
            let again = ExportOptions { overwrite: true, ..ExportOptions::new(Format::Hf) };
            export(&gguf.export_source(), &back, &again, &mut |_, _| true).expect("replaced");
            fs::write(back.join("1_Pooling/mine.txt"), "mine").expect("written");
            let refused = export(&gguf.export_source(), &back, &again, &mut |_, _| true);
            assert!(matches!(refused, Err(ExportError::Foreign { .. })), "{refused:?}");
        }
    }
}

/// Windows and scales of attention, in the families that have them, as a folder and as GGUF and back;
/// what an architecture has no key for is refused.
#[test]
fn attention_of_its_own_survives_or_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files = TokenizerFiles::default();
    let generation = GenerationDefaults::default();
    let some = |window: usize| NonZeroUsize::new(window).expect("not zero");
    let config = |shape: &str, scale: Option<f32>, local: Option<LocalLayers>| ModelConfig {
        hidden: 256,
        ffn: 256,
        layers: 7,
        heads: Heads { query: 4, kv: 2, dim: 64 },
        vocabulary: 64,
        attention: Attention { scale, local },
        ..published(shape).expect("a shape")
    };
    let sixth = |layer: usize| layer % 6 < 5;
    let third = |layer: usize| layer % 3 < 2;
    let local = |window, rope_theta, which: fn(usize) -> bool| {
        Some(LocalLayers { window: some(window), rope_theta, layers: (0..7).map(which).collect() })
    };
    let (qwen, gemma) = ("embedding-0.6b", "embedding-270m");
    for (name, config, gguf) in [
        ("gemma-whole", config(gemma, Some(0.125), None), true),
        ("gemma-sixth", config(gemma, Some(0.125), local(9, 2e4, sixth)), true),
        ("gemma-third", config(gemma, Some(0.125), local(9, 2e4, third)), true),
        ("gemma-scale", config(gemma, Some(0.25), local(9, 2e4, sixth)), false),
        ("qwen-third", config(qwen, None, local(9, 1e6, third)), false),
    ] {
        let model = SyntheticModel::new(config, 1).expect("valid");
        let source = Source {
            weights: &model,
            tokenizer: &files,
            generation: &generation,
            embeds: true,
            pooling: &DeclaredPooling::Nothing,
            name,
            files: None,
        };
        let convert = |from: &Source<'_>, to: &str, format: Format| {
            let path = folder.path().join(format!("{name}-{to}"));
            export(from, &path, &ExportOptions::new(format), &mut |_, _| true)?;
            let after = open(&path).unwrap_or_else(|e| panic!("{e}"));
            assert_same_weights(&format!("{name}-{to}"), &model, &after);
            Ok(after)
        };
        let hf = convert(&source, "hf", Format::Hf).unwrap_or_else(|e: ExportError| panic!("{e}"));
        for format in [Format::I2S, Format::Tq2] {
            match convert(&hf.export_source(), &format!("{format:?}.gguf"), format) {
                Ok(between) => {
                    assert!(gguf, "{name}");
                    let back = format!("{format:?}-hf");
                    let back = convert(&between.export_source(), &back, Format::Hf);
                    back.unwrap_or_else(|e| panic!("{e}"));
                }
                Err(error) => {
                    assert!(!gguf, "{name}: {error}");
                    assert!(error.to_string().contains("the model's attention"), "{error}");
                }
            }
        }
    }
}

#[test]
fn progress_ends_with_all_bytes_and_can_stop_an_export() {
    let demo = open(Path::new("models/demo")).expect("opens");
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (format, name) in [(Format::I2S, "demo.gguf"), (Format::Hf, "demo")] {
        let out = folder.path().join(name);
        let options = ExportOptions::new(format);
        let mut seen = Vec::new();
        let exported = export(&demo.export_source(), &out, &options, &mut |done, total| {
            seen.push((done, total));
            true
        });
        let bytes = exported.unwrap_or_else(|e| panic!("{e}")).bytes;
        assert_eq!(seen.last(), Some(&(bytes, bytes)));
        assert!(seen.is_sorted_by_key(|(done, _)| *done));
        if format == Format::I2S {
            assert_eq!(fs::metadata(&out).expect("a file").len(), bytes);
        }
        for stop in [0, 1, seen.len() / 2, seen.len() - 1] {
            let out = folder.path().join("stopped");
            let mut left = stop;
            let stopped = export(&demo.export_source(), &out, &options, &mut |_, _| {
                left = left.wrapping_sub(1);
                left != usize::MAX
            });
            assert!(matches!(stopped, Err(ExportError::Cancelled)), "{stopped:?}");
        }
    }
    let left = fs::read_dir(folder.path()).expect("a folder").count();
    assert_eq!(left, 2, "the two that were not stopped");
}

#[test]
fn threads_do_not_show_in_the_file() {
    let demo = open(Path::new("models/demo")).expect("opens");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let files: Vec<Vec<u8>> = [1, 2, 7]
        .into_iter()
        .map(|threads| {
            let out = folder.path().join(threads.to_string());
            let options = ExportOptions {
                threads: Some(threads),
                tables: Some(TableType::Q6K),
                ..ExportOptions::new(Format::I2S)
            };
            export(&demo.export_source(), &out, &options, &mut |_, _| true).expect("written");
            fs::read(out).expect("a file")
        })
        .collect();
    assert!(files[0] == files[1] && files[1] == files[2]);
}
