//! Every fixture, in the form it was published in, against what transformers computes from it.

mod fixture;

use std::path::Path;

use trine::backend::Backend;
use trine::backend::cpu::{Cpu, CpuOptions, Isa};
use trine::backend::reference::Reference;
use trine::checkpoint;
use trine::model::executor::Executor;

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
    assert!(files.len() >= 8, "{files:?}");
    let wrong = files.iter().flat_map(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).expect("UTF-8");
        let (name, _) = name.split_once('.').expect("a folder's name");
        let cpu = Cpu::new(CpuOptions::default().threads(2)).expect("a CPU");
        compare_file(cpu, name, path)
    });
    expect_none(wrong.collect());
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
