//! GGUF files that the `gguf` package wrote (`tools/make_gguf_fixtures.py`) hold the weights of the
//! Hugging Face folders that they were made of, bit for bit.

mod file;

use std::path::{Path, PathBuf};

use file::{File, array_value, f32_value, u32_value};

use trine::backend::ops::Activation;
use trine::checkpoint::{Checkpoint, Files, open, open_files};
use trine::model::config::{Family, NormRole, Projection};
use trine::model::weights::WeightSource;
use trine::tensor::{FloatType, HostTable, SharedBytes};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn opened(path: &Path) -> Checkpoint {
    let checkpoint = open(path).unwrap_or_else(|e| panic!("{e}"));
    checkpoint.verify().unwrap_or_else(|e| panic!("{e}"));
    checkpoint
}

fn gguf(name: &str) -> Checkpoint {
    opened(&fixtures().join("gguf").join(name))
}

fn values(table: &HostTable) -> Vec<f32> {
    let mut values = vec![0.0; table.rows * table.cols];
    table.float.decode(&table.bytes, &mut values);
    values
}

/// Every weight of both is the same.
fn check_same(a: &Checkpoint, b: &Checkpoint) {
    let mut expected = a.config().clone();
    expected.context = b.config().context;
    // The files of Gemma 3 have no key for the scale of scores: what it is besides that of the heads'
    // width is in the gains of the query heads.
    let fold = match expected.family {
        Family::Gemma3 => {
            let (dim, scalar) = (expected.heads.dim as f64, 40.0);
            assert_eq!(expected.attention.scale, Some(1.0 / f64::sqrt(scalar) as f32));
            expected.attention.scale = Some(1.0 / dim.sqrt() as f32);
            (dim / scalar).sqrt() as f32
        }
        _ => 1.0,
    };
    assert_eq!(b.config(), &expected);
    for layer in 0..a.config().layers {
        for projection in Projection::ALL {
            let what = format!("layer {layer}, {projection:?}");
            let a = a.ternary(layer, projection).expect("rows");
            let b = b.ternary(layer, projection).expect("rows");
            assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()), "{what}");
            assert_eq!(a.scale(), b.scale(), "{what}");
            let (mut of_a, mut of_b) = (vec![8; a.cols()], vec![9; a.cols()]);
            for row in 0..a.rows() {
                a.read_codes(row, &mut of_a);
                b.read_codes(row, &mut of_b);
                assert_eq!(of_a, of_b, "{what}, row {row}");
            }
        }
        for role in a.config().layer_norms(layer) {
            let fold = if matches!(role, NormRole::QueryHead(_)) { fold } else { 1.0 };
            let expected: Vec<f32> =
                a.norm(role).expect("gains").iter().map(|g| g * fold).collect();
            assert_eq!(b.norm(role).expect("gains"), expected, "{role:?}");
        }
    }
    let last = NormRole::Final;
    assert_eq!(a.norm(last).expect("gains"), b.norm(last).expect("gains"));
    assert_eq!(values(&a.embedding().expect("a table")), values(&b.embedding().expect("a table")));
    assert_eq!(values(&a.head().expect("a table")), values(&b.head().expect("a table")));
}

#[test]
fn they_hold_the_weights_of_their_folders() {
    for name in [
        "bitnet_blocks.i2_s",
        "bitnet_blocks.tq1_0",
        "bitnet_blocks.tq2_0",
        "bitnet_1bitllm.f16",
        "bitnet_silu.scales",
        "bitnet_ties.q8_0",
        "llama_absent.i2_s",
        "llama_master_f16.mixed",
        "qwen3_embedding.scales",
        "gemma3_windows.i2_s",
    ] {
        println!("{name}");
        let (folder, _) = name.split_once('.').expect("a folder's name");
        let folder = opened(&fixtures().join(folder));
        let gguf = gguf(&format!("{name}.gguf"));
        check_same(&folder, &gguf);
        assert!(gguf.summary().unused.is_empty(), "{:?}", gguf.summary().unused);
        assert_eq!(gguf.generation().eos_token_ids[0], folder.generation().eos_token_ids[0]);
        assert_eq!(gguf.embeds(), folder.embeds(), "{name}");
        assert_eq!(gguf.generation().bos_token_id, folder.generation().bos_token_id);
    }
}

/// By the rules of llama.cpp: a window of 0 is none; of the layers all but every sixth have it, if the
/// file does not say which.
#[test]
fn a_gemma_has_the_windows_that_its_file_says() {
    let of = |bend: &dyn Fn(&mut File)| {
        let mut file = File::gemma3();
        bend(&mut file);
        let checkpoint = file.open().unwrap_or_else(|e| panic!("{e}"));
        let scale = checkpoint.config().attention.scale.expect("a scale");
        assert_eq!(scale, 1.0 / 2f64.sqrt() as f32, "heads of 2");
        let local = checkpoint.config().attention.local.clone();
        let assumed = checkpoint.summary().assumed.join("; ");
        let local = local.map(|local| (local.window.get(), local.rope_theta, local.layers));
        (local, assumed)
    };
    let (window, pattern) =
        ("gemma3.attention.sliding_window", "gemma3.attention.sliding_window_pattern");
    let activation = "hidden_activation: gelu_pytorch_tanh, from general.architecture gemma3";
    let (local, assumed) = of(&|_| ());
    assert_eq!(local, Some((8, 10_000.0, vec![true])));
    let of_windows = "attention.sliding_window_pattern: 6; rope.freq_base_swa: 10000";
    assert_eq!(assumed, format!("{activation}; {of_windows}"));
    let (local, assumed) = of(&|file| {
        file.set(pattern, u32_value(0));
        file.set("gemma3.rope.freq_base_swa", f32_value(500.0));
    });
    assert_eq!((local, &*assumed), (Some((8, 500.0, vec![true])), activation));
    for all in [(window, u32_value(0)), (pattern, u32_value(1)), (pattern, array_value(7, 1, &[0]))]
    {
        assert_eq!(of(&|file| file.set(all.0, all.1.clone())).0, None, "{all:?}");
    }
    assert_eq!(of(&|file| file.unset(window)).0, None);
    let array = of(&|file| file.set(pattern, array_value(7, 1, &[1])));
    assert_eq!(array.0, Some((8, 10_000.0, vec![true])));
}

/// The activation comes from its key, else from the architecture, and the summary says so.
#[test]
fn the_activation_is_said_where_it_is_assumed() {
    let of = |name| {
        let checkpoint = gguf(name);
        let assumed = checkpoint.summary().assumed.join("; ");
        (checkpoint.config().family, checkpoint.config().activation, assumed)
    };
    let from = |name: &str, architecture: &str| {
        format!("hidden_activation: {name}, from general.architecture {architecture}")
    };
    let (family, activation, assumed) = of("bitnet_blocks.i2_s.gguf");
    assert_eq!((family, activation), (Family::BitNet, Activation::Relu2));
    assert_eq!(assumed, from("relu2", "bitnet-b1.58"));
    let (family, activation, assumed) = of("bitnet_blocks.tq1_0.gguf");
    assert_eq!((family, activation), (Family::BitNet, Activation::Relu2));
    assert_eq!(assumed, "", "it has the key");
    let (family, activation, assumed) = of("bitnet_1bitllm.f16.gguf");
    assert_eq!((family, activation), (Family::BitNet, Activation::Silu));
    assert_eq!(assumed, from("silu", "bitnet"));
    let (family, activation, assumed) = of("llama_absent.i2_s.gguf");
    assert_eq!((family, activation), (Family::Llama, Activation::Silu));
    assert_eq!(assumed, from("silu", "llama"));
    // The first published file of 2B4T.
    let (_, _, assumed) = of("bitnet_blocks.tq2_0.gguf");
    let twice = "tied head: output.weight holds the bytes of token_embd.weight";
    assert_eq!(assumed, format!("{}; {twice}", from("relu2", "bitnet-25")));
}

#[test]
fn the_summary_has_the_facts_of_the_file() {
    let checkpoint = gguf("llama_master_f16.mixed.gguf");
    let summary = checkpoint.summary();
    assert_eq!(summary.format, "GGUF version 3");
    assert_eq!(summary.architecture, "llama");
    assert_eq!(summary.quantization, "I2_S, F32 of three values");
    assert_eq!((summary.embedding.as_str(), summary.head.as_str()), ("F16", "F16"));
    assert!(!summary.tied_head);
    let file_type = ("general.file_type".to_owned(), "40 (u32)".to_owned());
    assert!(summary.metadata.contains(&file_type), "{:?}", summary.metadata);
    let down = summary.projections.iter().find(|p| p.name == "ffn_down").expect("there");
    assert_eq!((down.shape, down.stored.as_str()), ([56, 100], "F32 of three values"));
    let query = summary.tensors.iter().find(|t| t.name == "blk.0.attn_q.weight").expect("there");
    assert_eq!((query.dtype.as_str(), &query.shape[..]), ("I2_S", &[128, 56][..]));
    assert_eq!(query.bytes, 128 * 56 / 4 + 32);

    let separate = gguf("bitnet_silu.scales.gguf");
    assert_eq!(separate.summary().quantization, "F16 of three values");
    assert!(separate.summary().projections.iter().all(|p| p.scales.is_some()));
    let master = gguf("bitnet_1bitllm.f16.gguf");
    assert_eq!(master.summary().quantization, "F16 master weights");
    assert!(master.summary().projections.iter().all(|p| p.scales.is_none()));
}

/// Every type of table, as the package dequantises it. Quantised types become f16.
#[test]
fn tables_have_the_values_that_the_package_reads() {
    let folder = fixtures().join("gguf/tables");
    for (name, float) in [
        ("f32", FloatType::F32),
        ("f16", FloatType::F16),
        ("bf16", FloatType::Bf16),
        ("q8_0", FloatType::F16),
        ("q6_k", FloatType::F16),
        ("q5_0", FloatType::F16),
        ("q5_1", FloatType::F16),
        ("q4_0", FloatType::F16),
        ("q4_k", FloatType::F16),
    ] {
        let checkpoint = opened(&folder.join(name).with_extension("gguf"));
        let table = checkpoint.embedding().expect("a table");
        assert_eq!((table.float, table.rows, table.cols), (float, 6, 512), "{name}");
        let bytes = std::fs::read(folder.join(name).with_extension("f32")).expect("readable");
        let mut expected = vec![0.0; 6 * 512];
        FloatType::F32.decode(&bytes, &mut expected);
        if float == FloatType::F16 {
            expected.iter_mut().for_each(|x| *x = half::f16::from_f32(*x).to_f32());
        }
        assert_eq!(values(&table), expected, "{name}");
        let summary = checkpoint.summary();
        assert_eq!(summary.embedding_bytes, table.bytes.len() as u64, "{name}");
        let converted = summary.embedding.contains("f16 when loaded");
        assert_eq!(converted, name.starts_with('q'), "{}", summary.embedding);
    }
}

/// A table whose values f16 cannot hold becomes f32, with the package's values bit for bit.
#[test]
fn tables_out_of_the_range_of_f16_become_f32() {
    let folder = fixtures().join("gguf/tables");
    let mut file = std::fs::read(folder.join("q8_0.gguf")).expect("readable");
    let bytes = std::fs::read(folder.join("q8_0.f32")).expect("readable");
    let mut expected = vec![0.0; 6 * 512];
    FloatType::F32.decode(&bytes, &mut expected);
    let checkpoint = |file: &[u8]| {
        let files = vec![("m.gguf".to_owned(), SharedBytes::new(file.to_vec()))];
        open_files(Files::Memory { label: "memory".into(), files }).expect("a model")
    };
    // A block is an f16 factor and 32 signed bytes.
    let data = table_start(&file);
    for block in 0..6 * 512 / 32 {
        let at = data + 34 * block;
        let d = half::f16::from_le_bytes([file[at], file[at + 1]]);
        let large = half::f16::from_f32(d.to_f32() * 1e6);
        file[at..at + 2].copy_from_slice(&large.to_le_bytes());
        for (j, value) in expected[32 * block..][..32].iter_mut().enumerate() {
            *value = large.to_f32() * f32::from(file[at + 2 + j] as i8);
        }
    }
    let table = checkpoint(&file).embedding().expect("a table");
    assert_eq!(table.float, FloatType::F32);
    assert_eq!(values(&table), expected);
}

/// Where the data of a file of `tables` begin, found by what stands there: its `.f32`.
fn table_start(file: &[u8]) -> usize {
    let folder = fixtures().join("gguf/tables");
    let bytes = std::fs::read(folder.join("q8_0.f32")).expect("readable");
    let mut expected = vec![0.0; 32];
    FloatType::F32.decode(&bytes[..128], &mut expected);
    (0..file.len() - 34)
        .step_by(32)
        .find(|at| {
            let d = half::f16::from_le_bytes([file[*at], file[at + 1]]).to_f32();
            let block = &file[at + 2..at + 34];
            block.iter().zip(&expected).all(|(q, value)| d * f32::from(*q as i8) == *value)
        })
        .expect("the table")
}

/// The older version of the format differs in nothing that these files have.
#[test]
fn version_2_is_read() {
    let path = fixtures().join("gguf/bitnet_blocks.i2_s.gguf");
    let mut file = std::fs::read(&path).expect("readable");
    assert_eq!(file[4], 3);
    file[4] = 2;
    let files = vec![("m.gguf".to_owned(), SharedBytes::new(file))];
    let checkpoint = open_files(Files::Memory { label: "memory".into(), files }).expect("a model");
    assert_eq!(checkpoint.summary().format, "GGUF version 2");
    check_same(&opened(&path), &checkpoint);
}

/// A folder that holds one GGUF file and no config is that file.
#[test]
fn a_folder_with_one_file() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = fixtures().join("gguf/bitnet_ties.q8_0.gguf");
    std::fs::copy(&path, folder.path().join("a.gguf")).expect("copied");
    check_same(&opened(&path), &opened(folder.path()));
    std::fs::copy(&path, folder.path().join("b.gguf")).expect("copied");
    let error = open(folder.path()).expect_err("two files").to_string();
    let expected = ": weights: expected config.json, or one .gguf file (name the one that is meant), \
                    found a.gguf and b.gguf";
    assert!(error.ends_with(expected), "{error}");
}
