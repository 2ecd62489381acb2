//! A new backend needs the two traits and nothing else: a toy device with a queue, padding and
//! recordings gives the reference's answers bit for bit, and whatever goes wrong on it is reported.

mod common;

use common::host::{HostBatch, upload_lanes, upload_samples};
use common::model::{awkward_models, roomy, small_model};
use common::rng::Rng;
use common::run::{
    batch, bits, download, generate, ids, load, part, run_ops, sample_last, sampled_part,
    score_all, session, step, upload,
};
use common::toy::{Mode, Toy};
use common::workload::{greedy, greedy_row, sampled, workload};
use trine::backend::reference::Reference;
use trine::backend::{Backend, LogitUse, NONE, Record, StepKey, ops};
use trine::engine::score::ScoreRequest;
use trine::engine::{SamplingParams, Session};
use trine::error::RunError;
use trine::model::activations::Reserve;
use trine::model::batch::{BatchSequence, Purpose, RowOptions};
use trine::model::executor::StepExecutor;
use trine::model::weights::WeightSource;

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
fn a_deep_queue_changes_nothing_either() {
    const DEPTH: usize = 6;
    for model in awkward_models() {
        let prompt = Rng::new(9).tokens(20, model.config.vocabulary);
        for params in [greedy(12), sampled(12), SamplingParams { logprobs: None, ..sampled(12) }] {
            let run = |toy: Toy| {
                let control = toy.control();
                let mut session = session(toy, &model, roomy());
                let tokens = generate(&mut session, &prompt, &params).unwrap();
                // An answer that ends after fewer tokens than the queue holds, and the next one.
                let (short, longer) = (greedy(3), greedy(9));
                let short = generate(&mut session, &prompt[..7], &short).unwrap();
                let longer = generate(&mut session, &prompt[..9], &longer).unwrap();
                let stats = *control.stats();
                ([tokens, short, longer], stats)
            };
            let (deep, ran) = run(Toy::new().steps_ahead(DEPTH));
            let (alone, ran_alone) = run(Toy::new().synchronous());
            assert_eq!(deep, alone);
            assert_eq!(ran.most_pending, DEPTH * ran_alone.most_pending);
            assert_eq!(ran.runs, ran_alone.runs, "steps beyond the limit were enqueued");
        }
    }
}

#[test]
fn a_stop_token_in_the_middle_of_a_deep_queue_leaves_no_trace() {
    let model = small_model();
    let params = SamplingParams { logprobs: None, ..sampled(12) };
    let mut alone = session(Toy::new().synchronous(), &model, roomy());
    let expected = generate(&mut alone, &[4, 5, 6], &params).unwrap();
    let next = generate(&mut alone, &[4, 5, 6, 9], &greedy(8)).unwrap();
    for depth in [1, 3, 6, 40] {
        let toy = Toy::new().steps_ahead(depth);
        let control = toy.control();
        let mut deep = session(toy, &model, roomy());
        for end in 0..expected.len() {
            deep.reset();
            let stop = expected[end].id;
            let end = expected.iter().position(|token| token.id == stop).unwrap();
            let before = control.stats().runs;
            let stopping = SamplingParams { stop_tokens: vec![stop], ..params.clone() };
            let found = generate(&mut deep, &[4, 5, 6], &stopping).unwrap();
            assert_eq!(found, expected[..end], "depth {depth}");
            let wasted = control.stats().runs - before - (end + 1);
            assert!(wasted < depth, "{wasted} steps ran for nothing at depth {depth}");
            // The steps that were drained wrote keys and a history beyond what was answered.
            assert_eq!(generate(&mut deep, &[4, 5, 6, 9], &greedy(8)).unwrap(), next);
            assert_eq!(generate(&mut deep, &[4, 5, 6], &params).unwrap(), expected);
        }
    }
}

#[test]
fn an_answer_given_up_with_steps_in_flight_leaves_no_trace() {
    for depth in [2, 6] {
        given_up(Toy::new().steps_ahead(depth));
    }
}

fn given_up(toy: Toy) {
    let model = small_model();
    let mut toy = session(toy, &model, roomy());
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
        queries: 2,
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
                let epilogue = ops::Epilogue::Store;
                recorder.rms_norm(ops::RmsNorm {
                    rows,
                    width,
                    input,
                    gather,
                    first,
                    norm,
                    output,
                    epilogue,
                })
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

common::backend_tests! {
    /// Padding rows of the ops whose rows come from the step's inputs, on buffers full of garbage.
    fn padding_rows_write_zeros_and_touch_nothing_else<B>(open) {
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
        let mut lanes = upload_lanes(&mut backend, &[77; 4], 4, &[88]);
        let mut samples = upload_samples(&mut backend, 2);
        let padding = ops::SampleRow { lane: NONE, ..ops::SampleRow::default() };
        let batch = HostBatch {
            tokens: vec![NONE; 2],
            positions: vec![0; 2],
            sequences: vec![0; 2],
            lanes: vec![0],
            logit_rows: vec![NONE; 2],
            sample_rows: vec![padding; 2],
            ..HostBatch::default()
        };
        let batch = batch.upload(&mut backend);
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
