//! The whole model on CUDA: what transformers computes, the CPU's text, and the same bits however a
//! step is enqueued.

use crate::common::cuda::open;
use crate::common::demo::{DemoText, demo_text};
use crate::common::model::{awkward_models, roomy};
use crate::common::run::{bits, generate, ids, session};
use crate::common::workload::{greedy, workload};
use trine::backend::cuda::CudaOptions;
use trine::checkpoint;
use trine::model::executor::Executor;

#[test]
fn it_agrees_with_transformers() {
    let mut wrong = Vec::new();
    for name in crate::fixture::NAMES {
        let Some(device) = open(CudaOptions::default()) else { return };
        let fixture = crate::fixture::load(name);
        let checkpoint = checkpoint::open(&fixture.folder).expect("opens");
        let mut executor =
            Executor::load(device, &checkpoint, crate::fixture::reserve(), &mut |_, _| {})
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        for case in &fixture.cases {
            let output = crate::fixture::run(&mut executor, case)
                .unwrap_or_else(|error| panic!("{name} {}: {error}", case.name));
            let failures = crate::fixture::failures(case, &output);
            wrong.extend(
                failures.iter().map(|failure| format!("{} {}: {failure}", fixture.name, case.name)),
            );
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// With adapters, and the same bits with fusion, graphs and overlap as without.
#[test]
fn adapters_agree_with_peft() {
    let mut wrong = Vec::new();
    for model in crate::lora::MODELS {
        let source = model.open();
        let run = |options, case: &crate::fixture::Case| {
            let reserve = crate::fixture::reserve();
            let mut executor = Executor::load(open(options)?, &*source, reserve, &mut |_, _| {})
                .unwrap_or_else(|error| panic!("{}: {error}", model.name));
            let output = crate::fixture::run(&mut executor, case);
            Some(output.unwrap_or_else(|error| panic!("{} {}: {error}", model.name, case.name)))
        };
        // The shortest.
        let case = &model.cases()[1];
        let Some(output) = run(CudaOptions::default(), case) else { return };
        for failure in crate::fixture::failures(case, &output) {
            wrong.push(format!("{} {}: {failure}", model.name, case.name));
        }
        if model.name == "patterns" {
            let plain = CudaOptions::default().fused(false).replay(false).overlapped(false);
            let plain = run(plain, case).expect("opens again");
            assert_eq!(bits(&output.logits), bits(&plain.logits));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Text of the demo model: the CPU's tokens, up to the first near-tie.
#[test]
fn the_demo_model_says_what_it_says_on_the_cpu() {
    let Some(device) = open(CudaOptions::default()) else { return };
    let DemoText { checkpoint, reserve, prompt, answer: expected, sure } = demo_text();
    let answer = generate(&mut session(device, &checkpoint, reserve), &prompt, &greedy(64));
    let found = ids(&answer.expect("generates"));
    let equal = expected.iter().zip(&found).take_while(|(a, b)| a == b).count();
    eprintln!("{equal} of {} tokens equal, near-tie at {sure}", expected.len());
    assert!(equal >= sure, "{equal} tokens, expected {sure}");
}

/// Fused or not, a graph or launches, overlapped or not: the same answers.
#[test]
fn how_a_step_is_enqueued_changes_nothing() {
    for model in awkward_models() {
        let run = |options| open(options).map(|cuda| workload(&mut session(cuda, &model, roomy())));
        let plain = CudaOptions::default().fused(false).replay(false).overlapped(false);
        let Some(expected) = run(plain) else { return };
        for options in [
            CudaOptions::default(),
            CudaOptions::default().replay(false),
            CudaOptions::default().fused(false),
            CudaOptions::default().overlapped(false),
        ] {
            assert_eq!(Some(&expected), run(options).as_ref(), "{options:?} {:?}", model.config);
        }
    }
}
