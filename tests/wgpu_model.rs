//! The whole model on GPUs: what transformers computes, the CPU's text, and the same bits however
//! a step is enqueued. On every adapter of the machine, in every variant.
#![cfg(feature = "wgpu")]

mod common;
mod fixture;
#[path = "fixture/lora.rs"]
mod lora;

use common::demo::{DemoText, demo_text};
use common::model::{awkward_models, roomy};
use common::run::{bits, generate, ids, keep_last, load, part, session, step_logits};
use common::wgpu::{Opened, opened};
use common::workload::{greedy, sampled, workload};
use trine::backend::wgpu::{Gpu, GpuOptions, Wgpu, WgpuOptions};
use trine::checkpoint;
use trine::model::executor::Executor;

/// The fixtures whose activations lie on rounding boundaries on purpose: they ask for IEEE division
/// and square root, which WGSL does not promise.
const NEEDS_IEEE: &str = "bitnet_ties";

fn backend(opened: &Opened, options: WgpuOptions) -> Wgpu {
    Wgpu::new(&opened.gpu, options)
}

#[test]
fn it_agrees_with_transformers() {
    let mut wrong = Vec::new();
    for opened in opened() {
        let mut compared = 0;
        for name in fixture::NAMES {
            let fixture = fixture::load(name);
            let checkpoint = checkpoint::open(&fixture.folder).expect("opens");
            let device = backend(opened, WgpuOptions::default());
            let mut executor =
                Executor::load(device, &checkpoint, fixture::reserve(), &mut |_, _| {})
                    .unwrap_or_else(|error| panic!("{name}: {error}"));
            // On a slow adapter the shortest of the strict cases, and not in every variant.
            let strict = fixture.cases.iter().filter(|case| case.strict);
            let shortest = strict.map(|case| case.ids.len()).min();
            let chosen = |case: &&fixture::Case| {
                !opened.slow || (!opened.plain && Some(case.ids.len()) == shortest)
            };
            for case in fixture.cases.iter().filter(chosen) {
                compared += 1;
                let output = fixture::run(&mut executor, case)
                    .unwrap_or_else(|error| panic!("{name} {}: {error}", case.name));
                for failure in fixture::failures(case, &output) {
                    if *name == NEEDS_IEEE {
                        eprintln!("{}: {name} {}: {failure}", opened.name, case.name);
                    } else {
                        let (device, fixture) = (&opened.name, &fixture.name);
                        wrong.push(format!("{device}: {fixture} {}: {failure}", case.name));
                    }
                }
            }
        }
        assert!(compared > 0 || opened.plain, "{}: nothing was compared", opened.name);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// With adapters, fused and replayed where there are none and not where there are: the same bits.
#[test]
fn adapters_agree_with_peft() {
    let mut wrong = Vec::new();
    for opened in opened().iter().filter(|opened| !opened.slow || opened.plain) {
        // All of them where they take little time, and in one variant.
        let models = if opened.plain { 1 } else { lora::MODELS.len() };
        for model in &lora::MODELS[..models] {
            let (source, cases) = (model.open(), model.cases());
            let run = |options: WgpuOptions, case: &fixture::Case| {
                let reserve = fixture::reserve();
                let device = backend(opened, options);
                let mut executor = Executor::load(device, &*source, reserve, &mut |_, _| {})
                    .unwrap_or_else(|error| panic!("{}: {error}", model.name));
                fixture::run(&mut executor, case)
                    .unwrap_or_else(|error| panic!("{} {}: {error}", model.name, case.name))
            };
            // The shortest.
            let case = &cases[1];
            let output = run(WgpuOptions::default(), case);
            for failure in fixture::failures(case, &output) {
                wrong.push(format!("{}: {} {}: {failure}", opened.name, model.name, case.name));
            }
            if model.name == "patterns" {
                let plain = run(WgpuOptions::default().fused(false).replay(false), case);
                assert_eq!(bits(&output.logits), bits(&plain.logits), "{}", opened.name);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Text of the demo model: the CPU's tokens, up to the first near-tie.
#[test]
fn the_demo_model_says_what_it_says_on_the_cpu() {
    let DemoText { checkpoint, reserve, prompt, answer: expected, sure } = demo_text();
    for opened in opened() {
        let device = backend(opened, WgpuOptions::default());
        let count = if opened.slow { 6 } else { expected.len() };
        let answer = generate(&mut session(device, &checkpoint, reserve), &prompt, &greedy(count));
        let found = ids(&answer.expect("generates"));
        let equal = expected.iter().zip(&found).take_while(|(a, b)| a == b).count();
        eprintln!("{}: {equal} of {count} tokens equal, near-tie at {sure}", opened.name);
        assert_eq!(found.len(), count);
        assert!(equal >= sure.min(count), "{}: {equal} tokens, expected {sure}", opened.name);
    }
}

/// Fused or not, replayed or not, one step per submission or several: the same answers.
#[test]
fn how_a_step_is_enqueued_changes_nothing() {
    for opened in opened().iter().filter(|opened| !opened.slow) {
        for model in awkward_models() {
            let plain = WgpuOptions::default().fused(false).replay(false).burst(1);
            let expected = workload(&mut session(backend(opened, plain), &model, roomy()));
            for options in [
                WgpuOptions::default(),
                WgpuOptions::default().replay(false),
                WgpuOptions::default().fused(false),
                WgpuOptions::default().burst(4),
            ] {
                let found = workload(&mut session(backend(opened, options), &model, roomy()));
                assert_eq!(expected, found, "{} {options:?} {:?}", opened.name, model.config);
            }
        }
    }
}

/// Variants differ in how they get there, not in where.
#[test]
fn variants_of_one_adapter_give_the_same_bits() {
    let model = &awkward_models()[0];
    let mut first: Vec<(String, Vec<u32>)> = Vec::new();
    for opened in opened() {
        let mut executor = load(backend(opened, WgpuOptions::default()), model, roomy());
        let logits =
            step_logits(&mut executor, vec![keep_last(part(0, 0, &[1, 2, 3, 4, 5], &[0]))]);
        let name = opened.gpu.adapter().name();
        match first.iter().find(|(other, _)| *other == name) {
            Some((_, expected)) => assert_eq!(expected, &bits(&logits), "{}", opened.name),
            None => first.push((name, bits(&logits))),
        }
    }
}

/// The first time that a step runs is like every other.
#[test]
fn a_replayed_step_equals_the_first() {
    for opened in opened() {
        let model = &awkward_models()[0];
        let mut executor = load(backend(opened, WgpuOptions::default()), model, roomy());
        let mut run = || {
            step_logits(&mut executor, vec![part(0, 0, &[1, 2, 3], &[0])]);
            let one = keep_last(part(0, 3, &[7], &[0]));
            bits(&step_logits(&mut executor, vec![one]))
        };
        let first = run();
        for _ in 0..5 {
            assert_eq!(first, run(), "{}", opened.name);
        }
    }
}

/// Decoding takes no more memory with every step.
#[test]
fn nothing_is_allocated_per_step() {
    for opened in opened().iter().filter(|opened| !opened.plain) {
        let model = &awkward_models()[0];
        // A device of its own, whose memory no other test takes.
        let gpu = Gpu::of(opened.gpu.adapter().clone(), GpuOptions::default()).expect("opens");
        let mut session = session(Wgpu::new(&gpu, WgpuOptions::default()), model, roomy());
        let allocated = || {
            let report = gpu.device().generate_allocator_report();
            report.map(|report| (report.total_allocated_bytes, report.allocations.len()))
        };
        let before_all = if opened.slow { 5 } else { 8 };
        for params in [greedy(before_all), sampled(before_all)] {
            generate(&mut session, &[1, 2, 3], &params).expect("generates");
        }
        let before = allocated();
        let (rounds, tokens) = if opened.slow { (1, 8) } else { (5, 20) };
        for _ in 0..rounds {
            for params in [greedy(tokens), sampled(tokens)] {
                generate(&mut session, &[1, 2, 3], &params).expect("generates");
            }
        }
        assert_eq!(before, allocated(), "{}", opened.name);
    }
}

/// Three sequences in a step give each the bits that it has alone, and a prompt in two steps those
/// that it has in one. `ragged.rs` has many more of these for all but slow adapters.
#[test]
fn a_ragged_batch_is_as_each_alone() {
    for opened in opened() {
        let model = &awkward_models()[0];
        let mut executor = load(backend(opened, WgpuOptions::default()), model, roomy());
        let prompts: [&[u32]; 3] = [&[1, 2, 3, 4, 5, 6, 7], &[9], &[30, 31, 32]];
        let vocabulary = model.config.vocabulary;
        let together = prompts.iter().enumerate();
        let together = together.map(|(lane, prompt)| part(lane, 0, prompt, &[lane as u32]));
        let logits = step_logits(&mut executor, together.map(keep_last).collect());
        for (lane, prompt) in prompts.iter().enumerate() {
            // Another lane and page, in one step and in two.
            let whole = keep_last(part(5 - lane, 0, prompt, &[9]));
            let alone = step_logits(&mut executor, vec![whole]);
            assert_eq!(bits(&alone), bits(&logits[lane * vocabulary..][..vocabulary]));
            let (first, rest) = prompt.split_at(prompt.len() / 2);
            if !first.is_empty() {
                step_logits(&mut executor, vec![part(5, 0, first, &[10])]);
                let rest = keep_last(part(5, first.len(), rest, &[10]));
                assert_eq!(bits(&alone), bits(&step_logits(&mut executor, vec![rest])));
            }
        }
    }
}
