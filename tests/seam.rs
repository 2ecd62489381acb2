//! A new backend needs the two traits and nothing else: a toy device with a queue, padding and
//! recordings gives the reference's answers bit for bit, and whatever goes wrong on it is reported.

mod common;

use std::sync::Arc;

use common::model::{RandomModel, awkward_models, roomy, small_model};
use common::rng::Rng;
use common::run::{
    batch, bits, download, generate, ids, load, part, run_ops, sample_last, sampled_part,
    score_all, session, step, upload,
};
use common::toy::{Control, Mode, Spoil, Toy};
use trine::backend::check::Checked;
use trine::backend::reference::Reference;
use trine::backend::{Backend, LogitUse, NONE, Record, StepKey, ops};
use trine::engine::score::{ScoreRequest, Scored};
use trine::engine::session::Token;
use trine::engine::{SamplingParams, Session};
use trine::error::RunError;
use trine::model::activations::Reserve;
use trine::model::batch::{BatchSequence, Purpose, RowOptions};
use trine::model::executor::{Executor, StepExecutor};
use trine::model::weights::WeightSource;

fn sampled(max_tokens: usize) -> SamplingParams {
    SamplingParams {
        temperature: 0.8,
        top_k: 20,
        repetition_penalty: 1.2,
        frequency_penalty: 0.3,
        logit_bias: vec![(1, 0.5)],
        seed: Some(11),
        logprobs: Some(3),
        max_tokens: Some(max_tokens),
        ..SamplingParams::default()
    }
}

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens: Some(max_tokens), ..SamplingParams::default() }
}

/// Prompts of several lengths, greedy and sampled, some of which share a prefix, then scores.
fn workload(session: &mut Session) -> (Vec<Vec<Token>>, Vec<Scored>) {
    let vocabulary = session.config().vocabulary;
    let prompt = Rng::new(5).tokens(90, vocabulary);
    let answers = [(5, greedy(6)), (40, sampled(8)), (90, greedy(3)), (37, sampled(4))]
        .into_iter()
        .map(|(len, params)| generate(session, &prompt[..len], &params).unwrap())
        .collect();
    let requests: Vec<ScoreRequest> = [1, 2, 31, 33, 70]
        .map(|len| ScoreRequest {
            ids: prompt[..len].to_vec(),
            greedy: 2,
            logits: true,
            score_from: Some(1),
        })
        .into();
    (answers, session.score(&requests).unwrap())
}

/// Some lanes that each bring a prompt in one step and then decode together.
fn batched(executor: &mut dyn StepExecutor, lanes: usize, options: &RowOptions) -> Vec<Vec<u32>> {
    let vocabulary = executor.config().vocabulary;
    let prompts: Vec<Vec<u32>> = ([3, 30, 20, 1, 9, 17].iter().take(lanes))
        .map(|&len| Rng::new(len).tokens(len as usize, vocabulary))
        .collect();
    let pages = |lane: usize| [2 * lane as u32, 2 * lane as u32 + 1];
    let first = (prompts.iter().enumerate())
        .map(|(lane, prompt)| sample_last(part(lane, 0, prompt, &pages(lane)), options))
        .collect();
    let mut steps = vec![sample_step(executor, first)];
    for n in 0..6 {
        let next = (prompts.iter().enumerate())
            .map(|(lane, prompt)| {
                sample_last(sampled_part(lane, prompt.len() + n, &pages(lane)), options)
            })
            .collect();
        steps.push(sample_step(executor, next));
    }
    steps
}

fn sample_step(executor: &mut dyn StepExecutor, sequences: Vec<BatchSequence>) -> Vec<u32> {
    step(executor, sequences, Purpose::Sample { logprobs: false }).unwrap().tokens
}

#[test]
fn a_toy_equals_the_reference() {
    for model in awkward_models() {
        let expected = workload(&mut session(Reference::new(), &model, roomy()));
        let toy = Toy::new();
        let control = toy.control();
        let found = workload(&mut session(toy, &model, roomy()));
        assert_eq!(expected, found, "{:?}", model.config);
        // The toy overwrote its intermediates, padded its rows and started from a cache of NaN:
        // padding is a no-op, and nothing is read that the step did not write.
        let stats = *control.stats();
        assert!(stats.poisoned > 20 * stats.runs, "{stats:?}");
    }
}

#[test]
fn garbage_in_the_intermediates_would_be_seen() {
    // The twin of the test above: what the toy overwrites does matter while a step runs.
    let toy = Toy::new();
    let control = toy.control();
    let model = small_model();
    let mut executor = load(toy, &model, roomy());
    let logits = common::run::step_logits(
        &mut executor,
        vec![common::run::keep_last(part(0, 0, &[1, 2, 3], &[0]))],
    );
    assert!(logits.iter().all(|x| x.is_finite()));
    control.poison();
    let error = executor.read_logits(1).unwrap_err();
    assert!(matches!(error, RunError::NonFinite { .. }), "{error}");
}

#[test]
fn work_is_enqueued_not_called() {
    let model = small_model();
    let toy = Toy::new();
    let control = toy.control();
    let mut executor = load(toy, &model, roomy());
    let options = RowOptions { row: greedy_row(), biases: vec![] };
    let first = sample_last(part(0, 0, &[1, 2, 3], &[0]), &options);
    let second = sample_last(sampled_part(0, 3, &[0]), &options);
    let third = sample_last(sampled_part(0, 4, &[0]), &options);
    let purpose = Purpose::Sample { logprobs: false };
    control.close();
    // Neither step has run when `submit` returns, the second of which needs the first one's token.
    executor.submit(&batch(vec![first], purpose)).unwrap();
    executor.submit(&batch(vec![second], purpose)).unwrap();
    assert_eq!(executor.in_flight(), 2);
    let refused = executor.submit(&batch(vec![third.clone()], purpose)).unwrap_err();
    assert!(matches!(refused, RunError::Exhausted { what: "steps in flight", .. }), "{refused}");
    control.open();
    let mut tokens = vec![executor.collect().unwrap().tokens[0]];
    tokens.push(executor.collect().unwrap().tokens[0]);
    tokens.push(sample_step(&mut executor, vec![third])[0]);

    let mut reference = session(Reference::new(), &model, roomy());
    let expected = generate(&mut reference, &[1, 2, 3], &greedy(3)).unwrap();
    assert_eq!(ids(&expected), tokens);
    let nothing = executor.collect().unwrap_err();
    assert!(matches!(nothing, RunError::Exhausted { what: "steps to collect", .. }), "{nothing}");
}

/// Options of a row that is plainly greedy.
fn greedy_row() -> ops::SampleRow {
    ops::SampleRow { repetition_penalty: 1.0, top_p: 1.0, ..ops::SampleRow::default() }
}

#[test]
fn decode_steps_replay_what_was_prepared() {
    let model = small_model();
    let rows =
        [greedy_row(), ops::SampleRow { temperature: 0.7, seed_low: 3, prompt: 3, ..greedy_row() }];
    // 5 and 6 lanes are what is left above the largest power of two.
    for (row, lanes) in rows.into_iter().flat_map(|row| (1..=6).map(move |lanes| (row, lanes))) {
        let options = RowOptions { row, biases: vec![] };
        let toy = Toy::new();
        let control = toy.control();
        let mut executor = load(toy, &model, roomy());
        let loaded = *control.stats();
        assert!(loaded.prepared > 0 && loaded.recorded == loaded.prepared, "{loaded:?}");
        let found = batched(&mut executor, lanes, &options);
        // At most the prompts' step was recorded: seven steps ran, and six of them, each with
        // other inputs than the one before, were replayed from what was prepared at load.
        let stats = *control.stats();
        assert_eq!(stats.runs, 7);
        assert!(stats.replayed >= 6, "{lanes} lanes: {stats:?}");
        assert_eq!(stats.recorded - loaded.recorded, 7 - stats.replayed);
        let expected = batched(&mut load(Reference::new(), &model, roomy()), lanes, &options);
        assert_eq!(expected, found);
        let distinct: std::collections::HashSet<_> = found.iter().collect();
        assert!(distinct.len() > 1, "all steps gave the same tokens, which proves nothing");
    }
}

#[test]
fn two_steps_in_flight_change_nothing() {
    for model in awkward_models() {
        let prompt = Rng::new(9).tokens(20, model.config.vocabulary);
        for params in [greedy(12), sampled(12), SamplingParams { logprobs: None, ..sampled(12) }] {
            let run = |toy: Toy| {
                let control = toy.control();
                let tokens =
                    generate(&mut session(toy, &model, roomy()), &prompt, &params).unwrap();
                let stats = *control.stats();
                (tokens, stats.most_pending)
            };
            let (ahead, most_ahead) = run(Toy::new());
            let (alone, most_alone) = run(Toy::new().synchronous());
            assert_eq!(ahead, alone);
            assert_eq!(ahead.len(), 12);
            assert_eq!(
                most_ahead,
                2 * most_alone,
                "one session enqueues ahead, the other does not"
            );
        }
    }
}

#[test]
fn an_answer_given_up_with_steps_in_flight_leaves_no_trace() {
    let model = small_model();
    let mut toy = session(Toy::new(), &model, roomy());
    let expected = generate(&mut toy, &[4, 5, 6], &greedy(6)).unwrap();
    toy.reset();
    for taken in 0..4 {
        let started = toy.generate(&[4, 5, 7], &sampled(9)).unwrap().take(taken).count();
        assert_eq!(started, taken);
        let stop = SamplingParams { stop_tokens: vec![expected[2].id], ..greedy(6) };
        assert_eq!(generate(&mut toy, &[4, 5, 6], &stop).unwrap(), {
            let end = expected.iter().position(|token| token.id == expected[2].id).unwrap();
            &expected[..end]
        });
        assert_eq!(generate(&mut toy, &[4, 5, 6], &greedy(6)).unwrap(), expected);
    }
}

#[test]
fn what_a_step_records_depends_on_its_key_alone() {
    for model in awkward_models() {
        let toy = Toy::with(Mode::Compare);
        let control = toy.control();
        let mut executor = load(toy, &model, roomy());
        batched(&mut executor, 3, &RowOptions { row: greedy_row(), biases: vec![] });
        let biased = RowOptions {
            row: ops::SampleRow { temperature: 1.5, logprobs: 2, ..greedy_row() },
            biases: vec![(0, 1.0), (3, -1.0)],
        };
        batched(&mut executor, 3, &biased);
        // Other lanes, pages, positions and targets under a key that has been seen.
        let vocabulary = model.config.vocabulary;
        for (seed, len, lane, pages) in [(1, 5, 0, [0, 1]), (2, 7, 4, [9, 3]), (3, 8, 2, [7, 7])] {
            let tokens = Rng::new(seed).tokens(len, vocabulary);
            for start in [0, 3] {
                let scored = score_all(part(lane, start, &tokens, &pages), &tokens);
                step(&mut executor, vec![scored], Purpose::Score).unwrap();
            }
        }
        let stats = *control.stats();
        assert!(stats.compared >= 10, "{stats:?}");
    }
}

#[test]
fn a_recording_that_depends_on_more_is_noticed() {
    let mut toy = Toy::with(Mode::Compare);
    let (input, mut output) = (upload(&mut toy, &[1f32; 8]), upload(&mut toy, &[0f32; 8]));
    let gain = upload(&mut toy, &[1f32; 4]);
    let key = StepKey {
        tokens: 2,
        sequences: 1,
        pages: 1,
        logit_rows: 0,
        logits: LogitUse::Keep,
        hidden: false,
    };
    let mut run = |rows: usize, times: usize| {
        toy.run(&key, &mut |recorder| {
            (0..times).try_for_each(|_| {
                let norm = ops::Norm { gain: &gain, eps: 1e-5 };
                let (gather, first, width) = (None, 0, 4);
                let (input, output) = (&input, &mut output);
                recorder.rms_norm(ops::RmsNorm { rows, width, input, gather, first, norm, output })
            })
        })
    };
    run(2, 1).unwrap();
    run(2, 1).unwrap();
    let other_argument = run(1, 1).unwrap_err().to_string();
    assert!(other_argument.contains("op 0 was rms_norm (rows 2"), "{other_argument}");
    let other_ops = run(2, 2).unwrap_err().to_string();
    assert!(other_ops.contains("there were 1 ops and are 2"), "{other_ops}");
}

#[test]
fn a_fault_of_any_op_reaches_the_caller_and_the_next_answer_is_right() {
    let model = small_model();
    let toy = Toy::new();
    let control = toy.control();
    let mut session = session(toy, &model, roomy());
    let answer = |session: &mut Session| generate(session, &[7, 8, 9, 10], &greedy(3));
    let expected = answer(&mut session).unwrap();
    // Embedding, ten ops in each layer, head and sample; three steps.
    let ops_in_a_step = 1 + 10 * model.config.layers + 2;
    for op in 0..3 * ops_in_a_step {
        session.reset();
        control.fail_after(op);
        let error = answer(&mut session).unwrap_err();
        assert!(matches!(error, RunError::Device { .. }), "op {op}: {error}");
        assert!(error.to_string().contains("a planted fault"), "op {op}: {error}");
        assert!(!control.fault_is_planted());
        assert_eq!(answer(&mut session).unwrap(), expected, "after op {op}");
    }
    control.fail_after(3 * ops_in_a_step);
    session.reset();
    assert_eq!(answer(&mut session).unwrap(), expected);
    assert!(control.fault_is_planted(), "the steps have no more ops than these");

    // The fault is still to come: it meets the first op of a score.
    let request =
        ScoreRequest { ids: vec![1, 2, 3], score_from: Some(1), ..ScoreRequest::default() };
    let error = session.score(std::slice::from_ref(&request)).unwrap_err();
    assert!(matches!(error, RunError::Device { .. }), "{error}");
    assert_eq!(session.score(&[request]).unwrap()[0].logprobs.len(), 2);
    assert_eq!(answer(&mut session).unwrap(), expected);
}

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
    let mut quantized = ops::allocate_quantized(backend, "test values", rows, width).unwrap();
    let norm = ops::Norm { gain: &gain, eps: 1e-5 };
    run_ops(backend, &mut |r| {
        let (gather, first, input) = (None, 0, &gate_up);
        let output = &mut output;
        r.rms_norm(ops::RmsNorm { rows, width, input, gather, first, norm, output })?;
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
        })
    })
}

/// The one way in which a bucket can touch a result: a pass of the head that holds padding alone
/// must not take the place of the pass whose rows are wanted.
#[test]
fn padding_never_gets_a_pass_of_the_head_to_itself() {
    // A vocabulary for which the logits of three rows fill a pass, and three round up to four.
    let mut model = small_model();
    model.config.vocabulary = 1_100_000;
    model.config.hidden = 4;
    let reserve = Reserve { sequences: 4, ..roomy() };
    assert_eq!(reserve.logit_rows(&model.config), 3);
    fn run<B: Backend>(backend: B, model: &dyn WeightSource, reserve: Reserve) -> Vec<Vec<u32>> {
        let mut executor = load(backend, model, reserve);
        let kept = common::run::keep_last(part(0, 0, &[1, 2, 3], &[0]));
        let sequences = (0..3)
            .map(|lane| BatchSequence { lane, pages: vec![lane as u32], ..kept.clone() })
            .collect();
        let mut wanted = batch(sequences, Purpose::Score);
        wanted.hidden = true;
        executor.submit(&wanted).unwrap();
        let output = executor.collect().unwrap();
        vec![bits(&output.hidden), bits(&executor.read_logits(3).unwrap())]
    }
    let expected = run(Reference::new(), &model, reserve);
    assert!(expected == run(Toy::new(), &model, reserve), "the logits were overwritten");
}

/// More sequences than tokens in a step: the rows of a bucket must fit what was reserved.
#[test]
fn buckets_stay_within_the_reserve() {
    let model = small_model();
    let reserve = Reserve { sequences: 8, step_tokens: 5, ..roomy() };
    let mut executors: [Box<dyn StepExecutor>; 2] = [
        Box::new(load(Reference::new(), &model, reserve)),
        Box::new(load(Toy::new(), &model, reserve)),
    ];
    let options = RowOptions { row: greedy_row(), biases: vec![] };
    let tokens = executors.each_mut().map(|executor| {
        let sequences = (0..5)
            .map(|lane| sample_last(part(lane, 0, &[lane as u32], &[lane as u32]), &options))
            .collect();
        sample_step(&mut **executor, sequences)
    });
    assert_eq!(tokens[0], tokens[1]);
    assert_eq!(tokens[0].len(), 5);
}

/// Padding rows of the ops whose rows come from the step's inputs, on buffers full of garbage.
#[test]
fn padding_rows_write_zeros_and_touch_nothing_else() {
    common::on_every_backend(&PaddingRows);
}

struct PaddingRows;
impl common::Body for PaddingRows {
    fn run<B: Backend>(&self, open: &dyn Fn() -> B) {
        let model = small_model();
        let mut backend = open();
        let garbage = [f32::NAN; 6];
        let mut output = upload(&mut backend, &garbage);
        let mut normed = upload(&mut backend, &garbage);
        let mut logits = upload(&mut backend, &garbage);
        let input = upload(&mut backend, &garbage);
        let gain = upload(&mut backend, &[1f32; 3]);
        let values: Vec<f32> = (1..=6).map(|x| x as f32).collect();
        let table = common::model::host_table(2, 3, model.embedding, &values);
        let table = backend.load_table(table).unwrap();
        let mut lanes = ops::Lanes {
            history: upload(&mut backend, &[77u32; 4]),
            context: 4,
            sampled: upload(&mut backend, &[88u32]),
        };
        let mut samples = ops::Samples {
            tokens: upload(&mut backend, &[5u32; 2]),
            logprobs: upload(&mut backend, &[5f32; 2]),
            top_tokens: upload(&mut backend, &[5u32; 40]),
            top_logprobs: upload(&mut backend, &[5f32; 40]),
        };
        let padding = ops::SampleRow { lane: NONE, ..ops::SampleRow::default() };
        let batch = ops::Batch {
            tokens: upload(&mut backend, &[NONE, NONE]),
            positions: upload(&mut backend, &[0u32, 0]),
            sequences: upload(&mut backend, &[0u32, 0]),
            slots: upload(&mut backend, &[NONE, NONE]),
            query_starts: upload(&mut backend, &[0u32, 0]),
            kv_lens: upload(&mut backend, &[0u32]),
            page_table: upload(&mut backend, &[0u32]),
            max_pages: 1,
            lanes: upload(&mut backend, &[0u32]),
            logit_rows: upload(&mut backend, &[NONE, NONE]),
            targets: upload(&mut backend, &[NONE, NONE]),
            sample_rows: upload(&mut backend, &[padding; 2]),
            bias_tokens: upload(&mut backend, &[0u32]),
            bias_values: upload(&mut backend, &[0f32]),
        };
        run_ops(&mut backend, &mut |r| {
            r.embed(ops::Embed {
                rows: 2,
                batch: &batch,
                lanes: &mut lanes,
                table: &table,
                scale: 1.0,
                output: &mut output,
                width: 3,
            })?;
            r.lm_head(ops::LmHead {
                rows: 2,
                first: 0,
                width: 3,
                vocabulary: 2,
                batch: &batch,
                input: &input,
                norm: ops::Norm { gain: &gain, eps: 1e-5 },
                table: &table,
                normed: &mut normed,
                logits: &mut logits,
            })?;
            r.sample(ops::Sample {
                rows: 2,
                first: 0,
                vocabulary: 2,
                greedy: true,
                logprobs: false,
                batch: &batch,
                lanes: &mut lanes,
                logits: &logits,
                samples: &mut samples,
            })
        })
        .unwrap();
        assert_eq!(bits(&download(&mut backend, &output)), [0; 6]);
        assert_eq!(bits(&download(&mut backend, &normed)), [0; 6]);
        assert_eq!(bits(&download(&mut backend, &logits)[..4]), [0; 4]);
        assert_eq!(download(&mut backend, &lanes.history), [77; 4]);
        assert_eq!(download(&mut backend, &lanes.sampled), [88]);
        assert_eq!(download(&mut backend, &samples.tokens), [NONE; 2]);
    }
}
