//! Every fixture, in the form it was published in, against what transformers computes from it.

mod fixture;
#[path = "fixture/lora.rs"]
mod lora;

use std::path::Path;

use trine::backend::Backend;
use trine::backend::cpu::{Cpu, CpuOptions, Isa};
use trine::backend::reference::Reference;
use trine::checkpoint;
use trine::checkpoint::adapted::{Adapted, Merged};
use trine::checkpoint::lora::Adapter;
use trine::error::LoadError;
use trine::model::config::{ModelConfig, NormRole, Projection};
use trine::model::executor::Executor;
use trine::model::weights::{AdapterMatrices, WeightSource};
use trine::tensor::HostTable;
use trine::ternary::TernaryRows;

fn compare<B: Backend>(backend: B, name: &str) -> Vec<String> {
    compare_file(backend, name, &fixture::folder(name))
}

/// Compares a checkpoint with the reference of a fixture.
fn compare_file<B: Backend>(backend: B, name: &str, path: &Path) -> Vec<String> {
    let fixture = fixture::load(name);
    let checkpoint = checkpoint::open(path).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut executor = Executor::load(backend, &checkpoint, fixture::reserve(), &mut |_, _| {})
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(fixture.cases.iter().any(|case| case.strict), "{name} has no strict case");
    let mut wrong = Vec::new();
    for case in &fixture.cases {
        let output = fixture::run(&mut executor, case)
            .unwrap_or_else(|e| panic!("{name} {}: {e}", case.name));
        for failure in fixture::failures(case, &output) {
            let file = path.file_name().unwrap_or_default().display();
            wrong.push(format!("{} as {file}, {}: {failure}", fixture.name, case.name));
        }
    }
    wrong
}

fn expect_none(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_reference_agrees_with_transformers() {
    expect_none(fixture::NAMES.iter().flat_map(|name| compare(Reference::new(), name)).collect());
}

#[test]
fn the_cpu_agrees_with_transformers() {
    let wrong = Isa::available().into_iter().flat_map(|isa| {
        fixture::NAMES.iter().flat_map(move |name| {
            let options = CpuOptions::default().threads(2).isa(isa);
            compare(Cpu::new(options).expect("the ISA is there"), name)
        })
    });
    expect_none(wrong.collect());
}

/// The same models as GGUF files, which the `gguf` package wrote: I2_S, TQ1_0, TQ2_0, ternary floats
/// and masters give the same logits and tokens as the folder that transformers read.
#[test]
fn gguf_files_agree_with_transformers() {
    let folder = fixture::folder("gguf");
    let files = std::fs::read_dir(&folder).expect("a folder").map(|file| file.expect("one").path());
    let files: Vec<_> =
        files.filter(|path| path.extension().is_some_and(|e| e == "gguf")).collect();
    assert!(files.len() >= 12, "{files:?}");
    // Its folder is compared here alone.
    let folder = Some(fixture::folder("bitnet_master_exact"));
    let wrong = files.into_iter().chain(folder).flat_map(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).expect("UTF-8");
        let name = name.split('.').next().expect("a folder's name");
        let cpu = Cpu::new(CpuOptions::default().threads(2)).expect("a CPU");
        compare_file(cpu, name, &path)
    });
    expect_none(wrong.collect());
}

fn compare_adapted<B: Backend>(backend: B, model: &lora::Model) -> Vec<String> {
    let source = model.open();
    let mut executor = Executor::load(backend, &*source, fixture::reserve(), &mut |_, _| {})
        .unwrap_or_else(|e| panic!("{}: {e}", model.name));
    let mut wrong = Vec::new();
    for case in model.cases() {
        let output = fixture::run(&mut executor, &case)
            .unwrap_or_else(|e| panic!("{} {}: {e}", model.name, case.name));
        for failure in fixture::failures(&case, &output) {
            wrong.push(format!("{} {}: {failure}", model.name, case.name));
        }
    }
    wrong
}

#[test]
fn adapters_agree_with_peft_in_the_reference() {
    let models = lora::MODELS.iter();
    expect_none(models.flat_map(|model| compare_adapted(Reference::new(), model)).collect());
}

#[test]
fn adapters_agree_with_peft_on_the_cpu() {
    let wrong = Isa::available().into_iter().flat_map(|isa| {
        lora::MODELS.iter().flat_map(move |model| {
            let options = CpuOptions::default().threads(2).isa(isa);
            compare_adapted(Cpu::new(options).expect("the ISA is there"), model)
        })
    });
    expect_none(wrong.collect());
}

/// Every projection of an adapter counts: without any one of them the answers are others. So does
/// its scale.
#[test]
fn a_part_of_an_adapter_is_not_the_adapter() {
    let model = &lora::MODELS[0];
    let (folder, case) = (&model.paths()[0], &model.cases()[1]);
    let base = checkpoint::open(&fixture::folder("bitnet_silu")).expect("opens");
    let logits = |source: &dyn WeightSource| {
        let cpu = Cpu::new(CpuOptions::default().threads(1)).expect("a CPU");
        let mut executor =
            Executor::load(cpu, source, fixture::reserve(), &mut |_, _| {}).expect("loads");
        fixture::run(&mut executor, case).expect("runs").logits
    };
    let scaled = |scale: f32| {
        let mut adapted = Adapted::new(&base);
        adapted.add(Adapter::open(folder, scale).expect("opens")).expect("fits");
        adapted
    };
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(fixture::furthest(&case.logits, &logits(&scaled(0.9))) > 0.01);
    assert_eq!(bits(&logits(&scaled(0.0))), bits(&logits(&base)), "nothing of it");
    for projection in Projection::ALL {
        let found = logits(&Without { adapted: scaled(1.0), projection });
        let worst = fixture::furthest(&case.logits, &found);
        assert!(worst > 0.01, "without {projection:?}: {worst}");
    }
}

/// A model with adapters but for one projection.
struct Without<'a> {
    adapted: Adapted<&'a checkpoint::Checkpoint>,
    projection: Projection,
}

impl WeightSource for Without<'_> {
    fn config(&self) -> &ModelConfig {
        self.adapted.config()
    }
    fn ternary(&self, layer: usize, p: Projection) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        self.adapted.ternary(layer, p)
    }
    fn adapter_rank(&self, layer: usize, p: Projection) -> usize {
        if p == self.projection { 0 } else { self.adapted.adapter_rank(layer, p) }
    }
    fn adapter(&self, layer: usize, p: Projection) -> Result<Option<AdapterMatrices>, LoadError> {
        if p == self.projection { Ok(None) } else { self.adapted.adapter(layer, p) }
    }
    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        self.adapted.norm(role)
    }
    fn embedding(&self) -> Result<HostTable, LoadError> {
        self.adapted.embedding()
    }
    fn head(&self) -> Result<HostTable, LoadError> {
        self.adapted.head()
    }
}

/// The whole model gives the same bits on every instruction set and with any number of threads.
#[test]
fn every_cpu_variant_gives_the_same_bits() {
    let fixture = fixture::load("bitnet_long");
    let checkpoint = checkpoint::open(&fixture.folder).expect("loads");
    let case = fixture.cases.iter().find(|case| case.ids.len() == 300).expect("300 tokens");
    let mut first: Option<fixture::Output> = None;
    for isa in Isa::available() {
        for threads in 1..=3 {
            let cpu = Cpu::new(CpuOptions::default().threads(threads).isa(isa)).expect("a CPU");
            let mut executor = Executor::load(cpu, &checkpoint, fixture::reserve(), &mut |_, _| {})
                .expect("loads");
            let output = fixture::run(&mut executor, case).expect("runs");
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let first =
                first.get_or_insert_with(|| fixture::run(&mut executor, case).expect("runs"));
            assert_eq!(bits(&first.logits), bits(&output.logits), "{isa}, {threads} threads");
            assert_eq!(bits(&first.final_hidden), bits(&output.final_hidden));
            assert_eq!(first.nll, output.nll, "{isa}, {threads} threads");
            assert_eq!(first.greedy, output.greedy);
        }
    }
}

/// Changing one token of a prompt changes the logits: nothing answers without having read.
#[test]
fn the_prompt_matters() {
    let mut fixture = fixture::load("bitnet_packed");
    let checkpoint = checkpoint::open(Path::new(&fixture.folder)).expect("loads");
    let cpu = Cpu::new(CpuOptions::default()).expect("a CPU");
    let mut executor =
        Executor::load(cpu, &checkpoint, fixture::reserve(), &mut |_, _| {}).expect("loads");
    let case = fixture.cases.iter_mut().find(|case| case.ids.len() == 17).expect("17 tokens");
    let before = fixture::run(&mut executor, case).expect("runs").logits;
    for position in 0..case.ids.len() {
        let original = case.ids[position];
        case.ids[position] = (original + 1) % checkpoint_vocabulary(&checkpoint);
        let after = fixture::run(&mut executor, case).expect("runs").logits;
        assert!(fixture::furthest(&before, &after) > 1e-3, "position {position}");
        case.ids[position] = original;
    }
}

fn checkpoint_vocabulary(checkpoint: &checkpoint::Checkpoint) -> u32 {
    checkpoint.config().vocabulary as u32
}

/// Ternary weights have no room for what an adapter adds.
#[test]
fn ternary_weights_are_not_merged() {
    let base = checkpoint::open(&fixture::folder("bitnet_silu")).expect("opens");
    let mut adapted = Adapted::new(&base);
    let adapter = Adapter::open(&fixture::folder("lora_packed"), 1.0).expect("opens");
    adapted.add(adapter).expect("fits");
    let Err(error) = Merged::new(adapted) else { panic!("ternary weights were merged") };
    let error = error.to_string();
    assert!(error.contains("self_attn.q_proj in layer 0") && error.contains("--lora"), "{error}");
}

/// A program that names no pooling gets that of the model; one that it names goes before it.
#[test]
fn a_program_pools_as_the_model_says() {
    use trine::backend::KvType;
    use trine::backend::select::DeviceName;
    use trine::engine::{LoadedModel, ModelOptions, Pooling};

    let text = std::fs::read_to_string(fixture::folder("pooling/reference.json")).expect("there");
    let reference: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let case = &reference["cases"][0];
    let model = |pooling: &str| {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let base = std::fs::read_dir(fixture::folder("qwen3_embedding")).expect("a folder");
        let pooling = fixture::folder(pooling);
        let config = folder.path().join("1_Pooling");
        std::fs::create_dir(&config).expect("made");
        let files = base.map(|file| file.expect("a file").path());
        let files = files.chain([pooling.join("modules.json")]);
        let files = files.map(|file| (file, folder.path()));
        for (file, to) in files.chain([(pooling.join("1_Pooling/config.json"), &*config)]) {
            std::fs::copy(&file, to.join(file.file_name().expect("a name"))).expect("copied");
        }
        let options = ModelOptions::default().device(DeviceName::Cpu).kv_type(KvType::F32);
        LoadedModel::open(folder.path(), &options).unwrap_or_else(|e| panic!("{e}"))
    };
    let texts = [case["text"].as_str().expect("a text")];
    let close = |found: &[Vec<f32>], kind: &str| {
        let expected = case[kind].as_array().expect(kind).iter();
        let both = found[0].iter().zip(expected);
        both.clone().count() == found[0].len()
            && both.into_iter().all(|(a, b)| (f64::from(*a) - b.as_f64().expect(kind)).abs() < 1e-4)
    };
    let mut mean = model("pooling/v6_mean");
    assert!(close(&mean.embed_texts(&texts, None).expect("embeds"), "mean"));
    assert!(close(&mean.embed_texts(&texts, Pooling::Cls).expect("embeds"), "cls"));
    let mut max = model("pooling/v6_max");
    assert!(close(&max.embed_texts(&texts, Pooling::Last).expect("embeds"), "lasttoken"));
    let error = max.embed_texts(&texts, None).expect_err("not implemented").to_string();
    assert!(error.contains("named by the caller, found max, by pooling_mode in "), "{error}");
}
