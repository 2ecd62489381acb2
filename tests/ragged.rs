//! A sequence's results are its own: bit for bit the same alone or among others, however the prompt
//! is cut, whichever pages and lane it has. And what a step cannot hold is refused by name.

mod common;

use std::num::NonZeroUsize;

use common::attention::kv_types;
use common::model::{RandomModel, awkward_models, roomy, small_model};
use common::rng::Rng;
use common::run::{
    batch, bits, generate, ids, keep_last, load, part, sample_last, sampled_part, score_all,
    session, step,
};
use trine::backend::{Backend, KvType, ops::SampleRow};
use trine::engine::SamplingParams;
use trine::engine::score::ScoreRequest;
use trine::engine::session::{Event, FinishReason};
use trine::error::{RunError, SubmitError};
use trine::model::activations::Reserve;
use trine::model::batch::{Batch, BatchSequence, LogitRow, Purpose, RowOptions};
use trine::model::executor::StepExecutor;

/// A sequence and how it is fed.
#[derive(Debug, Clone)]
struct Sequence {
    lane: usize,
    pages: Vec<u32>,
    prompt: Vec<u32>,
    /// Tokens of the prompt that are in the cache already.
    cached: usize,
    /// Sizes of the chunks in which the rest is brought; the last is repeated.
    chunks: Vec<usize>,
    /// The step at which it joins.
    joins: usize,
    options: RowOptions,
}

impl Sequence {
    fn new(lane: usize, pages: &[u32], prompt: &[u32]) -> Self {
        Self {
            lane,
            pages: pages.to_vec(),
            prompt: prompt.to_vec(),
            cached: 0,
            chunks: vec![usize::MAX],
            joins: 0,
            options: options(prompt.len(), 0),
        }
    }
}

/// Sampled with penalties, so that tokens, history and noise all have to be the sequence's own.
fn options(prompt: usize, seed: u32) -> RowOptions {
    let row = SampleRow {
        prompt: prompt as u32,
        temperature: 0.9,
        top_p: 0.95,
        repetition_penalty: 1.1,
        frequency_penalty: 0.2,
        seed_low: seed,
        logprobs: 4,
        ..SampleRow::default()
    };
    RowOptions { row, biases: vec![(seed % 5, 0.5)] }
}

/// What a sequence was answered, floats as bits.
#[derive(Debug, Clone, Default, PartialEq)]
struct Answer {
    logits: Vec<Vec<u32>>,
    tokens: Vec<u32>,
    logprobs: Vec<u32>,
    top: Vec<Vec<(u32, u32)>>,
}

/// Runs sequences together until each has been answered `decode` tokens.
fn run(executor: &mut dyn StepExecutor, sequences: &[Sequence], decode: usize) -> Vec<Answer> {
    let vocabulary = executor.config().vocabulary;
    let mut answers = vec![Answer::default(); sequences.len()];
    let mut done: Vec<usize> = sequences.iter().map(|sequence| sequence.cached).collect();
    for now in 0.. {
        if answers.iter().all(|answer| answer.tokens.len() == decode) {
            return answers;
        }
        let (mut parts, mut rows) = (Vec::new(), Vec::new());
        for (index, sequence) in sequences.iter().enumerate() {
            let Sequence { lane, pages, prompt, chunks, joins, options, .. } = sequence;
            if now < *joins || answers[index].tokens.len() == decode {
                continue;
            }
            let left = &prompt[done[index].min(prompt.len())..];
            let chunk = chunks[(now - joins).min(chunks.len() - 1)].min(left.len());
            let mut part = if left.is_empty() {
                sampled_part(*lane, done[index], pages)
            } else {
                part(*lane, done[index], &left[..chunk], pages)
            };
            done[index] += part.tokens.len();
            if done[index] >= prompt.len() {
                part = sample_last(part, options);
                rows.push(index);
            }
            parts.push(part);
        }
        let output = step(executor, parts, Purpose::Sample { logprobs: true }).unwrap();
        let logits = executor.read_logits(rows.len()).unwrap();
        for (row, &index) in rows.iter().enumerate() {
            let answer = &mut answers[index];
            answer.logits.push(bits(&logits[row * vocabulary..][..vocabulary]));
            answer.tokens.push(output.tokens[row]);
            answer.logprobs.push(output.logprobs[row].to_bits());
            answer.top.push(output.top[row].iter().map(|&(t, p)| (t, p.to_bits())).collect());
        }
    }
    unreachable!("the steps have no end")
}

fn alone<B: Backend>(
    open: &dyn Fn() -> B,
    model: &RandomModel,
    reserve: Reserve,
    prompt: &[u32],
    options: &RowOptions,
    decode: usize,
) -> Answer {
    let pages: Vec<u32> = (0..reserve.max_pages() as u32).collect();
    let sequence = Sequence { options: options.clone(), ..Sequence::new(0, &pages, prompt) };
    run(&mut load(open(), model, reserve), &[sequence], decode).remove(0)
}

/// The models, each with one of the types of cache that the backend has.
fn cases<B: Backend>() -> impl Iterator<Item = (RandomModel, Reserve)> {
    let kv = kv_types::<B>().iter().copied().cycle();
    let reserve = Reserve { step_tokens: 160, ..roomy() };
    awkward_models()
        .into_iter()
        .zip(kv)
        .map(move |(model, kv_type)| (model, Reserve { kv_type, ..reserve }))
}

common::backend_tests! {
    not slow;

    fn among_others_is_as_alone<B>(open) {
        for (model, reserve) in cases::<B>() {
            let lens = [1, 5, 33, 64, 2, 17];
            let mut rng = Rng::of(&[1, model.seed]);
            let mut pages: Vec<u32> = (0..reserve.kv_pages as u32).collect();
            rng.shuffle(&mut pages);
            let mut sequences: Vec<Sequence> = lens
                .iter()
                .enumerate()
                .map(|(lane, &len)| {
                    let prompt = rng.tokens(len, model.config.vocabulary);
                    let options = options(len, lane as u32);
                    Sequence { options, ..Sequence::new(lane, &pages[4 * lane..][..4], &prompt) }
                })
                .collect();
            let expected: Vec<Answer> = (sequences.iter())
                .map(|s| alone(open, &model, reserve, &s.prompt, &s.options, 5))
                .collect();
            assert!(expected.iter().any(|answer| answer != &expected[0]));
            let mut executor = load(open(), &model, reserve);
            assert_eq!(run(&mut executor, &sequences, 5), expected, "{:?}", model.config);
            // Again on the same lanes and pages in another order, some joining while others decode
            // and some in chunks.
            rng.shuffle(&mut sequences);
            for (i, sequence) in sequences.iter_mut().enumerate() {
                sequence.joins = i / 2;
                sequence.chunks = vec![[usize::MAX, 7][i % 2]];
            }
            let order: Vec<usize> = sequences.iter().map(|sequence| sequence.lane).collect();
            for (answer, lane) in run(&mut executor, &sequences, 5).into_iter().zip(order) {
                assert_eq!(answer, expected[lane], "lane {lane} of {:?}", model.config);
            }
        }
    }

    fn any_chunking_is_as_one_chunk<B>(open) {
        for (model, reserve) in cases::<B>() {
            let prompt = Rng::of(&[2, model.seed]).tokens(70, model.config.vocabulary);
            let options = options(70, 3);
            let expected = alone(open, &model, reserve, &prompt, &options, 3);
            let mut executor = load(open(), &model, reserve);
            for chunks in [vec![1], vec![32], vec![31, 1, 38], vec![33], vec![64, 6], vec![69, 1]] {
                let pages = [9, 2, 17, 5];
                let sequence =
                    Sequence { chunks, options: options.clone(), ..Sequence::new(1, &pages, &prompt) };
                let found = run(&mut executor, std::slice::from_ref(&sequence), 3);
                assert_eq!(found, std::slice::from_ref(&expected), "{:?}", sequence.chunks);
            }
        }
    }

    fn chunks_across_blocks_of_keys_change_nothing<B>(open) {
        let mut windowed = awkward_models().swap_remove(7);
        windowed.config.attention.local.as_mut().unwrap().window = NonZeroUsize::new(90).unwrap();
        for model in [small_model(), windowed] {
            let reserve =
                Reserve { context: 320, step_tokens: 320, kv_type: KvType::F16, ..roomy() };
            let prompt = Rng::new(4).tokens(300, model.config.vocabulary);
            let options = options(300, 1);
            let expected = alone(open, &model, reserve, &prompt, &options, 2);
            let pages: Vec<u32> = (0..10).rev().collect();
            for chunks in [vec![255, 1, 1, 43], vec![256], vec![257], vec![100]] {
                let options = options.clone();
                let sequence = Sequence { chunks, options, ..Sequence::new(2, &pages, &prompt) };
                let found = run(&mut load(open(), &model, reserve), &[sequence], 2);
                assert_eq!(found, std::slice::from_ref(&expected));
            }
        }
    }

    fn a_prefix_in_the_cache_is_as_a_cold_run<B>(open) {
        for (model, reserve) in cases::<B>() {
            let prompt = Rng::of(&[3, model.seed]).tokens(50, model.config.vocabulary);
            // Without penalties: the history of a lane is not part of a shared page.
            let mut options = options(50, 3);
            (options.row.repetition_penalty, options.row.frequency_penalty) = (1.0, 0.0);
            let expected = alone(open, &model, reserve, &prompt, &options, 3);
            for (prefix, lane) in [(1, 0), (31, 0), (49, 0), (32, 0), (32, 4)] {
                let mut executor = load(open(), &model, reserve);
                // Another answer to the same beginning, on lane 0.
                run(&mut executor, &[Sequence::new(0, &[6, 3], &prompt[..prefix])], 4);
                // On another lane: it shares the full first page and brings a second one.
                let pages = if lane == 0 { [6, 3] } else { [6, 11] };
                let sequence = Sequence {
                    cached: prefix,
                    options: options.clone(),
                    ..Sequence::new(lane, &pages, &prompt)
                };
                let found = run(&mut executor, &[sequence], 3);
                assert_eq!(found, std::slice::from_ref(&expected), "prefix {prefix}, lane {lane}");
            }
        }
    }

    fn a_session_that_remembers_is_as_one_that_does_not<B>(open) {
        for (model, reserve) in cases::<B>() {
            let mut rng = Rng::of(&[4, model.seed]);
            let prompt = rng.tokens(60, model.config.vocabulary);
            let params = SamplingParams {
                temperature: 1.0,
                repetition_penalty: 1.2,
                seed: Some(5),
                max_tokens: Some(4),
                logprobs: Some(2),
                ..SamplingParams::default()
            };
            let mut warm = session(open(), &model, reserve);
            let first = generate(&mut warm, &prompt[..40], &params).unwrap();
            // The next turn: the same prompt, its answer, and more.
            let next = [&prompt[..40], &ids(&first), &prompt[40..]].concat();
            for (prompt, cached) in [(&next[..], 43), (&next[..], next.len() - 1), (&next[..9], 8)] {
                let started = warm.generate(prompt, &params).unwrap();
                assert_eq!(started.usage().cached, cached);
                drop(started);
                let found = generate(&mut warm, prompt, &params).unwrap();
                let mut cold = session(open(), &model, reserve);
                assert_eq!(generate(&mut cold, prompt, &params).unwrap(), found, "{cached} cached");
            }
        }
    }

    fn every_token_of_the_prompt_counts<B>(open) {
        for (model, reserve) in cases::<B>() {
            let vocabulary = model.config.vocabulary;
            let prompt = Rng::of(&[5, model.seed]).tokens(40, vocabulary);
            let mut executor = load(open(), &model, reserve);
            let mut logits = |prompt: &[u32]| {
                run(&mut executor, &[Sequence::new(0, &[0, 1], prompt)], 1).remove(0).logits
            };
            let expected = logits(&prompt);
            for changed in [0, 20, 31, 32, 39] {
                let mut other = prompt.clone();
                other[changed] = (other[changed] + 1) % vocabulary as u32;
                assert_ne!(logits(&other), expected, "token {changed} of {:?}", model.config);
            }
            assert_eq!(logits(&prompt), expected);
        }
    }

    fn scores_do_not_depend_on_the_company<B>(open) {
        for (model, reserve) in cases::<B>() {
            let vocabulary = model.config.vocabulary;
            let requests: Vec<ScoreRequest> = [1, 2, 40, 33, 5, 64, 20, 90, 3]
                .iter()
                .map(|&len| ScoreRequest {
                    ids: Rng::of(&[6, len, model.seed]).tokens(len as usize, vocabulary),
                    greedy: len as usize % 4,
                    logits: len % 2 == 0,
                    score_from: (len != 5).then_some(2),
                })
                .collect();
            let together = session(open(), &model, reserve).score(&requests).unwrap();
            // Steps of 7 tokens, two lanes, and pages for one long prompt at a time.
            let tight = Reserve { step_tokens: 7, sequences: 2, kv_pages: 4, ..reserve };
            let apart = session(open(), &model, tight).score(&requests).unwrap();
            assert_eq!(together, apart, "{:?}", model.config);
            for (request, scored) in requests.iter().zip(&together) {
                let scores = request.score_from.map_or(0, |from| request.ids.len().saturating_sub(from));
                assert_eq!(scored.logprobs.len(), scores);
                assert_eq!(scored.tokens.len(), request.greedy);
                assert_eq!(scored.logits.len(), if request.logits { vocabulary } else { 0 });
                assert_eq!(scored.mean_nll().is_some(), scores > 0);
            }
        }
    }

    fn greedy_answers_and_scores_agree<B>(open) {
        for (model, reserve) in cases::<B>() {
            let prompt = Rng::of(&[7, model.seed]).tokens(35, model.config.vocabulary);
            let mut session = session(open(), &model, reserve);
            let params = SamplingParams {
                max_tokens: Some(6),
                logprobs: Some(1),
                ..SamplingParams::default()
            };
            let answer = generate(&mut session, &prompt, &params).unwrap();
            let request = ScoreRequest {
                ids: prompt.clone(),
                greedy: 6,
                logits: true,
                score_from: None,
            };
            let scored = session.score(&[request]).unwrap().remove(0);
            assert_eq!(scored.tokens, ids(&answer));
            let top = |logits: &[f32]| {
                (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap()
            };
            assert_eq!(top(&scored.logits), answer[0].id as usize);
            // The answer's own log-probabilities, taken as scores of a prompt.
            let request = ScoreRequest {
                ids: [&prompt[..], &ids(&answer)].concat(),
                score_from: Some(prompt.len()),
                ..ScoreRequest::default()
            };
            let scores = session.score(&[request]).unwrap().remove(0).logprobs;
            assert_eq!(scores.len(), 6);
            for (token, score) in answer.iter().zip(scores) {
                assert!((token.logprob.unwrap() - score).abs() < 1e-5, "{token:?} {score}");
                assert_eq!(token.top, [(token.id, token.logprob.unwrap())]);
            }
        }
    }

    fn what_a_step_cannot_hold_is_refused<B>(open) {
        let reserve = Reserve { kv_pages: 8, sequences: 3, step_tokens: 20, context: 40, ..roomy() };
        let mut executor = load(open(), &small_model(), reserve);
        let good = Sequence::new(0, &[0, 1], &[1, 2, 3]);
        let expected = run(&mut executor, std::slice::from_ref(&good), 2);
        let sampling = Purpose::Sample { logprobs: false };
        let fits = part(0, 0, &[1, 2, 3], &[0]);
        let with = |logits: LogitRow| BatchSequence { logits: vec![logits], ..fits.clone() };
        let row = |sample| LogitRow { index: 0, target: None, sample };
        let one = |sequence: BatchSequence, purpose| batch(vec![sequence], purpose);
        let lanes = |lanes: &[usize]| {
            lanes.iter().map(|&lane| part(lane, 0, &[1], &[lane as u32])).collect::<Vec<_>>()
        };
        let biased = RowOptions { biases: vec![(0, 1.0); 513], ..options(3, 0) };
        let mut many = options(3, 0);
        many.row.logprobs = 21;
        let cases: Vec<(&str, Batch)> = vec![
            ("tokens in a step: 21", one(part(0, 0, &[1; 21], &[0, 1]), sampling)),
            ("sequences in a step: 4", batch(lanes(&[0, 1, 2, 3]), sampling)),
            ("tokens of a sequence: 41", one(part(0, 38, &[1; 3], &[0, 1]), sampling)),
            ("tokens of a sequence: expected at least one", one(part(0, 0, &[], &[0]), sampling)),
            ("lanes: 4", one(part(3, 0, &[1], &[0]), sampling)),
            ("lane: expected one sequence", batch(lanes(&[1, 1]), sampling)),
            ("pages: expected enough", one(part(0, 32, &[1], &[0]), sampling)),
            ("KV pages: 9", one(part(0, 0, &[1], &[8]), sampling)),
            // The step's own token lies in a page that is there; attention would read the first.
            ("KV pages: 10", one(part(0, 32, &[1], &[9, 0]), sampling)),
            ("token: expected a token below", one(part(0, 0, &[61], &[0]), sampling)),
            ("target: expected a token below", {
                one(with(LogitRow { target: Some(61), ..row(None) }), Purpose::Score)
            }),
            ("logit row: expected sampling options", one(with(row(None)), sampling)),
            ("logit row: expected one of the step's tokens", {
                one(with(LogitRow { index: 3, ..row(None) }), Purpose::Score)
            }),
            ("logit biases: 513", one(with(row(Some(biased))), sampling)),
            ("log-probabilities: 21", one(with(row(Some(many))), sampling)),
            ("sampled rows in a step: 4", {
                let logits = vec![row(Some(options(1, 0))); 4];
                one(BatchSequence { logits, ..fits.clone() }, sampling)
            }),
        ];
        for (message, bad) in cases {
            let error = executor.submit(&bad).expect_err(message);
            assert!(error.to_string().starts_with(message), "{message}: {error}");
            assert!(
                matches!(error, RunError::Exhausted { .. } | RunError::Submit(_)),
                "{message}: {error:?}"
            );
            assert_eq!(executor.in_flight(), 0);
        }
        let error = executor.read_logits(21).unwrap_err();
        assert!(matches!(error, RunError::Exhausted { what: "rows of logits", .. }), "{error}");
        // What just fits, and the answer of before.
        for good in [
            one(part(0, 0, &[1; 20], &[0]), sampling),
            batch(lanes(&[0, 1, 2]), sampling),
            one(keep_last(part(0, 37, &[1; 3], &[0, 7])), Purpose::Score),
            batch(vec![], Purpose::Score),
        ] {
            executor.submit(&good).unwrap();
            executor.collect().unwrap();
        }
        assert_eq!(run(&mut executor, &[good], 2), expected);
    }

    fn a_session_refuses_what_it_cannot_answer<B>(open) {
        // Pages for 64 tokens, less than the context.
        let reserve = Reserve { kv_pages: 2, ..roomy() };
        let mut session = session(open(), &small_model(), reserve);
        assert_eq!(session.context(), 64);
        let params = SamplingParams::default();
        let refused = |session: &mut trine::engine::Session, prompt: &[u32]| {
            session.generate(prompt, &params).err().map(|error| error.to_string())
        };
        let error = session.generate(&[1; 64], &params).err();
        assert_eq!(error, Some(SubmitError::TooLong { prompt: 64, context: 64 }));
        assert!(refused(&mut session, &[]).unwrap().starts_with("prompt: expected at least one"));
        assert!(refused(&mut session, &[61]).unwrap().starts_with("prompt: expected tokens below"));
        assert_eq!(refused(&mut session, &[60]), None);
        let warm = SamplingParams { temperature: f32::NAN, ..params.clone() };
        assert!(session.generate(&[1], &warm).is_err());

        // An answer ends where the pages do.
        let events: Vec<Event> =
            session.generate(&[1; 60], &params).unwrap().map(Result::unwrap).collect();
        assert_eq!(events.len(), 5, "four tokens fit, then the end");
        let Some(Event::Done { reason, usage }) = events.last() else { panic!("{events:?}") };
        assert_eq!((*reason, usage.generated, usage.prompt), (FinishReason::Context, 4, 60));
        let length = SamplingParams { max_tokens: Some(4), ..params.clone() };
        let last = session.generate(&[1; 60], &length).unwrap().last().unwrap().unwrap();
        assert!(matches!(last, Event::Done { reason: FinishReason::Length, .. }), "{last:?}");

        let request = |len: usize, greedy| ScoreRequest {
            ids: vec![1; len],
            greedy,
            ..ScoreRequest::default()
        };
        let too_long = session.score(&[request(60, 5)]).unwrap_err();
        assert_eq!(too_long, SubmitError::TooLong { prompt: 65, context: 64 }.into());
        assert!(session.score(&[request(0, 1)]).is_err());
        assert_eq!(session.score(&[request(60, 4), request(64, 0)]).unwrap().len(), 2);
    }

    fn a_long_prompt_can_be_given_up_between_its_steps<B>(open) {
        let reserve = Reserve { step_tokens: 16, sequences: 4, ..roomy() };
        let mut session = session(open(), &small_model(), reserve);
        let prompt = Rng::new(5).tokens(40, small_model().config.vocabulary);
        let params = SamplingParams { max_tokens: Some(3), ..SamplingParams::default() };
        let expected = generate(&mut session, &prompt, &params).unwrap();
        session.reset();

        let mut given_up = session.generate(&prompt, &params).unwrap();
        let first = given_up.next().unwrap().unwrap();
        assert_eq!(first, Event::Prompt { done: 16, total: 40 });
        drop(given_up);

        let mut again = session.generate(&prompt, &params).unwrap();
        assert_eq!(again.usage().cached, 16, "what had run is not run again");
        assert_eq!(again.next().unwrap().unwrap(), Event::Prompt { done: 32, total: 40 });
        assert!(matches!(again.next().unwrap().unwrap(), Event::Token(_)));
        drop(again);
        assert_eq!(generate(&mut session, &prompt, &params).unwrap(), expected);
    }

    fn hidden_states_are_those_of_their_rows<B>(open) {
        let model = small_model();
        let hidden = model.config.hidden;
        let tokens = Rng::new(8).tokens(10, model.config.vocabulary);
        let mut executor = load(open(), &model, roomy());
        let mut run = |parts: Vec<BatchSequence>| {
            executor.submit(&Batch { hidden: true, ..batch(parts, Purpose::Score) }).unwrap();
            executor.collect().unwrap().hidden
        };
        let all = run(vec![score_all(part(0, 0, &tokens, &[0]), &tokens)]);
        assert_eq!(all.len(), 10 * hidden);
        for len in [1, 4, 10] {
            let last = run(vec![
                keep_last(part(1, 0, &[3], &[5])),
                keep_last(part(2, 0, &tokens[..len], &[7])),
            ]);
            assert_eq!(bits(&last[hidden..]), bits(&all[(len - 1) * hidden..len * hidden]));
        }
    }
}
