//! A device whose every op is checked against the reference: the first wrong op is named, whichever
//! it is, and a device that is right passes.

mod common;

use std::sync::Arc;

use common::model::{RandomModel, awkward_models, roomy, small_model};
use common::rng::Rng;
use common::run::{load, part, run_ops, sample_last, score_all, session, step, upload};
use common::toy::{Control, Mode, Spoil, Toy};
use common::workload::{greedy_row, workload};
use trine::backend::check::Checked;
use trine::backend::reference::Reference;
use trine::backend::{Backend, Record, ops};
use trine::error::RunError;
use trine::model::batch::{Purpose, RowOptions};
use trine::model::executor::Executor;

/// A model on a toy whose every op is checked, and what can make the toy wrong.
fn checked(model: &RandomModel) -> (Executor<Checked<Toy>>, Arc<Control>) {
    let toy = Toy::with(Mode::Eager);
    let control = toy.control();
    (load(Checked::new(toy), model, roomy()), control)
}

#[test]
fn a_toy_passes_every_check() {
    for model in awkward_models() {
        let expected = workload(&mut session(Reference::new(), &model, roomy()));
        let found = workload(&mut session(Checked::new(Toy::with(Mode::Eager)), &model, roomy()));
        assert_eq!(expected, found);
    }
}

/// One wrong element in one output of each op of a step is reported with the op's name, its place
/// in the step, the output and the element.
#[test]
fn one_wrong_element_is_named() {
    let model = small_model();
    let (hidden, ffn) = (model.config.hidden, model.config.ffn);
    let head = 1 + 10 * model.config.layers;
    // What is spoiled: op, output, element, ops of this name before it. Its place in the step: the
    // second layer starts at op 11.
    let planted = [
        ("embed", "output", 2 * hidden, 0, 0),
        ("embed", "history", 1, 0, 0),
        ("rms_norm_quantize", "values", 3, 0, 1),
        ("rms_norm_quantize", "values", 256 + hidden, 3, 11), // beyond the row's end
        ("rms_norm_quantize", "scales", 2, 1, 5),
        ("rms_norm_quantize", "sums", 0, 2, 7),
        ("ternary_matmul", "output", 0, 0, 2),
        ("ternary_matmul", "output", 2 * hidden + 1, 1, 6),
        ("ternary_matmul", "output", 2 * ffn, 6, 18),
        ("ternary_matmul", "output", hidden - 1, 7, 20),
        ("rope_append_kv", "queries", 1, 1, 13),
        ("paged_attention", "output", 5, 0, 4),
        ("gate_norm_quantize", "values", ffn - 1, 0, 9),
        ("gate_norm_quantize", "scales", 1, 1, 19),
        ("gate_norm_quantize", "sums", 2, 1, 19),
        ("lm_head", "normed", 0, 0, head),
        ("lm_head", "logits", 60, 0, head),
        ("sample", "tokens", 0, 0, head + 1),
        ("sample", "sampled", 0, 0, head + 1),
        ("sample", "logprobs", 0, 0, head + 1),
        ("sample", "top_tokens", 1, 0, head + 1),
        ("sample", "top_logprobs", 1, 0, head + 1),
        ("score", "logprobs", 1, 0, head + 1),
    ];
    for (op, output, element, skip, place) in planted {
        let spoil = Spoil { op, output, element, skip };
        let error = run_spoiled(&model, spoil);
        let RunError::Disagrees { op: named, index, output: named_output, element: at, .. } = error
        else {
            panic!("{spoil:?}: {error}");
        };
        assert_eq!((named, index, named_output), (op, place, output), "{spoil:?}");
        // Queries are compared without the keys and values between them.
        assert_eq!(at, element, "{spoil:?}");
    }
}

/// What goes into the cache cannot be read back; attention answers for it.
#[test]
fn a_wrong_value_in_the_cache_is_named_by_attention() {
    let spoil = Spoil { op: "rope_append_kv", output: "values", element: 1, skip: 0 };
    let error = run_spoiled(&small_model(), spoil);
    assert!(
        matches!(error, RunError::Disagrees { op: "paged_attention", index: 4, .. }),
        "{error}"
    );
}

fn run_spoiled(model: &RandomModel, spoil: Spoil) -> RunError {
    let (mut executor, control) = checked(model);
    let tokens = [4, 8, 12];
    let fresh = part(0, 0, &tokens, &[0]);
    let run = |executor: &mut Executor<Checked<Toy>>| {
        if spoil.op == "score" {
            return step(executor, vec![score_all(fresh.clone(), &tokens)], Purpose::Score);
        }
        let options =
            RowOptions { row: ops::SampleRow { logprobs: 2, ..greedy_row() }, biases: vec![] };
        let sequences = vec![sample_last(fresh.clone(), &options)];
        step(executor, sequences, Purpose::Sample { logprobs: true })
    };
    run(&mut executor).expect("nothing is wrong yet");
    control.plant(spoil);
    let error = run(&mut executor).expect_err("a wrong element");
    assert!(!control.fault_is_planted());
    run(&mut executor).expect("it was wrong once");
    error
}

/// The outputs that no step of these models asks for.
#[test]
fn one_wrong_element_is_named_in_ops_by_themselves() {
    let planted = [
        ("rms_norm", "output", 4),
        ("rms_norm_quantize", "normed", 5),
        ("gate_norm_quantize", "normed", 3),
        ("low_rank", "inner", 1),
        ("low_rank", "output", 7),
    ];
    for (op, output, element) in planted {
        let toy = Toy::with(Mode::Eager);
        let control = toy.control();
        let mut backend = Checked::new(toy);
        run_norms(&mut backend).unwrap();
        control.plant(Spoil { op, output, element, skip: 0 });
        let error = run_norms(&mut backend).unwrap_err();
        let RunError::Disagrees { op: named, output: named_output, element: at, .. } = error else {
            panic!("{op}: {error}");
        };
        assert_eq!((named, named_output, at), (op, output, element));
    }
}

fn run_norms<B: Backend>(backend: &mut B) -> Result<(), RunError> {
    let mut rng = Rng::new(1);
    let (rows, width) = (2, 5);
    let gate_up = upload(backend, &rng.normals(rows * 2 * width, 1.0));
    let gain = upload(backend, &rng.normals(width, 1.0));
    let (mut output, mut normed) = (upload(backend, &[0f32; 10]), upload(backend, &[0f32; 10]));
    let mut inner = upload(backend, &[0f32; 2]);
    let mut quantized = ops::allocate_quantized(backend, "test values", rows, width).unwrap();
    let norm = ops::Norm { gain: &gain, eps: 1e-5 };
    run_ops(backend, &mut |r| {
        let (gather, first, input) = (None, 0, &gate_up);
        let output = &mut output;
        let epilogue = ops::Epilogue::Store;
        r.rms_norm(ops::RmsNorm { rows, width, input, gather, first, norm, output, epilogue })?;
        r.rms_norm_quantize(ops::RmsNormQuantize {
            rows,
            width,
            input,
            norm: Some(norm),
            quantized: &mut quantized,
            normed: Some(&mut normed),
        })?;
        r.gate_norm_quantize(ops::GateNormQuantize {
            rows,
            width,
            gate_up: &gate_up,
            activation: ops::Activation::Silu,
            norm: Some(norm),
            quantized: &mut quantized,
            normed: Some(&mut normed),
        })?;
        r.low_rank(ops::LowRank {
            rows,
            width,
            rank: 1,
            features: width,
            input,
            down: &gain,
            up: &gain,
            inner: &mut inner,
            output,
            stride: width,
            column: 0,
        })
    })
}
