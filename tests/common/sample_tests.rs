//! Tests of sampling and scoring, for backends that may round differently from the reference: equality
//! where the contract is exact; and of draws, that a token other than the reference's is one that
//! rounding may have brought forward.

use trine::backend::ops::{self, SampleRow};
use trine::backend::random::gumbel;
use trine::backend::reference::{Reference, sample_row};
use trine::backend::{Backend, MAX_LOGPROBS, NONE, Record};
use trine::error::RunError;

use super::host::{HostBatch, upload_lanes, upload_samples};
use super::rng::Rng;
use super::run::{run_ops, upload};
use super::sample::*;

pub(crate) fn draws_are_the_references_but_for_rounding<B: Backend>(
    backends: &mut [(&'static str, B)],
) {
    let mut counts = [0; 2];
    let cases = [(1, 32, 2), (2, 48, 4), (255, 48, 4), (256, 48, 4), (257, 48, 8), (1000, 48, 8)];
    let large = [(32_000, 16, 3), (128_256, 16, 1)];
    for (vocabulary, rows, passes) in cases.into_iter().chain(large) {
        for seed in 0..passes {
            let [all, differ] = compare(backends, &random_pass(vocabulary, rows, seed));
            counts = [counts[0] + all, counts[1] + differ];
        }
    }
    let [all, differ] = counts;
    println!("{differ} of {all} draws differ, each within rounding");
    assert!(differ * 200 <= all, "{differ} of {all} draws differ");
}

/// What excuses a draw excuses the reference's own, and few others.
pub(crate) fn what_rounding_excuses_is_little() {
    let (mut rows, mut lenient) = (0, 0);
    for (vocabulary, seed) in [(2, 0), (255, 1), (1000, 2), (1000, 3)] {
        let pass = random_pass(vocabulary, 48, seed);
        let expected = run(&mut Reference::new(), &pass);
        for (r, &token) in expected.tokens.iter().enumerate() {
            let bounds = Bounds::of(&pass, r);
            assert!(bounds.admits(token), "{vocabulary} tokens, row {r}: {:?}", pass.rows[r]);
            rows += 1;
            // At temperature 0 slack tells none of the equal ones apart.
            let others = (0..vocabulary as u32).filter(|&other| bounds.admits(other)).count() - 1;
            lenient += usize::from(pass.rows[r].temperature > 0.0 && others > 0);
        }
    }
    println!("in {lenient} of {rows} rows another token is excused");
    assert!(lenient * 20 < rows, "{lenient} of {rows}");
}

pub(crate) fn half_of_a_million_equal_tokens_is_half<B: Backend>(
    backends: &mut [(&'static str, B)],
) {
    // A sum that overflowed, or weights without enough bits, would cut elsewhere.
    let vocabulary = 1 << 20;
    let rows: Vec<_> = (0..3).map(|r| SampleRow { top_p: 0.5, seed_low: 5, ..plain(r) }).collect();
    let mut logits = vec![0.5; 3 * vocabulary];
    // The heavy half is hidden among light ones; the best one of a light row has a hundredth.
    logits[vocabulary..2 * vocabulary].iter_mut().step_by(2).for_each(|x| *x = 3.5);
    logits[2 * vocabulary..].fill(-9.0);
    logits[3 * vocabulary - 1] = 0.5;
    let mut pass = Pass { vocabulary, rows, logits, ..Pass::default() };
    for seed_low in 0..2 {
        pass.rows.iter_mut().for_each(|row| row.seed_low = seed_low);
        compare(backends, &pass);
    }
}

pub(crate) fn greedy_is_exact<B: Backend>(backends: &mut [(&'static str, B)]) {
    for (vocabulary, rows) in
        [(1, 3), (2, 5), (255, 9), (257, 64), (2047, 4), (2049, 4), (6000, 17), (128_256, 7)]
    {
        for logprobs in [false, true] {
            let mut pass = random_pass(vocabulary, rows, 3);
            (pass.greedy, pass.logprobs) = (true, logprobs);
            // The highest twice, in pieces of their own where there are some.
            let last = &mut pass.logits[(rows - 1) * vocabulary..];
            (last[vocabulary - 1], last[vocabulary / 3]) = (50.0, 50.0);
            pass.rows[1].lane = NONE;
            let [_, differ] = compare(backends, &pass);
            assert_eq!(differ, 0);
        }
    }
}

pub(crate) fn what_is_not_finite_is_found_anywhere<B: Backend>(backends: &mut [(&'static str, B)]) {
    let bad = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7f80_0001)];
    for (vocabulary, step) in [(1, 1), (257, 1), (5000, 97)] {
        let places: Vec<usize> = (0..vocabulary).step_by(step).collect();
        let count = places.len();
        let mut rng = Rng::of(&[22, vocabulary as u64]);
        let mut pass = Pass { vocabulary, logprobs: true, ..Pass::default() };
        pass.logits = rng.normals(count * vocabulary, 3.0);
        for (r, place) in places.into_iter().enumerate() {
            pass.logits[r * vocabulary + place] = bad[r % bad.len()];
            pass.rows.push(SampleRow { logprobs: 3, top_k: (r % 3) as u32, ..plain(r) });
        }
        for greedy in [false, true] {
            pass.greedy = greedy;
            for (name, backend) in backends.iter_mut() {
                let found = run(backend, &pass);
                assert!(found.tokens.iter().all(|&token| token == NONE), "{name}");
                assert!(found.sampled.iter().all(|&token| token == NONE), "{name}");
                assert!(found.logprobs.iter().all(|&x| x == f32::NAN.to_bits()), "{name}");
                assert!(found.top_tokens.iter().all(|&token| token == NONE), "{name}");
                assert!(found.top_logprobs.iter().all(|&x| x == 0), "{name}");
            }
        }
    }
}

/// Also gives what each backend gave.
pub(crate) fn a_row_depends_on_itself_alone<B: Backend>(
    backends: &mut [(&'static str, B)],
) -> Vec<Out> {
    let pass = {
        let mut pass = random_pass(3000, 12, 4);
        pass.rows[2].lane = NONE;
        pass.logits[5 * 3000 + 17] = f32::NAN;
        pass
    };
    let mut outs: Vec<Out> = Vec::new();
    for (name, backend) in backends.iter_mut() {
        let together = run(backend, &pass);
        for (r, &row) in pass.rows.iter().enumerate() {
            let lane = if row.lane == NONE { NONE } else { 0 };
            let alone = Pass {
                logits: pass.logits[r * 3000..][..3000].to_vec(),
                rows: vec![SampleRow { lane, ..row }],
                history: pass.history[r * CONTEXT..][..CONTEXT].to_vec(),
                ..pass.clone()
            };
            let top = r * MAX_LOGPROBS..(r + 1) * MAX_LOGPROBS;
            let expected = Out {
                tokens: vec![together.tokens[r]],
                sampled: vec![together.sampled[r]],
                logprobs: vec![together.logprobs[r]],
                top_tokens: together.top_tokens[top.clone()].to_vec(),
                top_logprobs: together.top_logprobs[top].to_vec(),
            };
            assert_eq!(run(backend, &alone), expected, "{name}, row {r}");
        }
        outs.push(together);
    }
    outs
}

pub(crate) fn the_noise_is_the_references<B: Backend>(backends: &mut [(&'static str, B)]) {
    // Of two tokens, the second one's logit makes up for the difference of their noise, and a
    // little more or less than that.
    let draws = |row: &SampleRow| {
        let seed = u64::from(row.seed_low);
        [0, 1].map(|token| gumbel(seed, row.length, row.choice, token))
    };
    let row = |seed_low| SampleRow { seed_low, length: seed_low % 24, choice: 3, ..plain(0) };
    // Some as they come, and the extremes of many: high ones are where u is next to 1.
    let mut seeds: Vec<u32> = (0..400).collect();
    let extreme = |seed: &u32| draws(&row(*seed)).iter().any(|&g| !(-2.55..11.5).contains(&g));
    seeds.extend((400..1_000_000).filter(extreme));
    assert!(seeds.len() > 410, "{}", seeds.len());
    let mut pass = Pass { vocabulary: 2, ..Pass::default() };
    let mut expected = Vec::new();
    for &seed in &seeds {
        let row = row(seed);
        let [g0, g1] = draws(&row).map(f64::from);
        let slack = 1e-5 * (1.0 + g0.abs() + g1.abs());
        for (sign, token) in [(1.0, 1), (-1.0, 0)] {
            pass.rows.push(SampleRow { lane: pass.rows.len() as u32, ..row });
            pass.logits.extend([0.0, (g0 - g1 + sign * slack) as f32]);
            expected.push(token);
        }
    }
    for (name, backend) in backends.iter_mut() {
        assert_eq!(run(backend, &pass).tokens, expected, "{name}");
    }
}

pub(crate) fn frequencies_approach_softmax<B: Backend>(backends: &mut [(&'static str, B)]) {
    let logits = [1.0, 0.0, -1.0, 2.0, 0.5, -20.0, 1.0, 1.5];
    for (temperature, top_k, draws) in [(1.0, 0, 1500), (0.5, 3, 500)] {
        let kept = |token: usize| top_k == 0 || [3, 7, 0].contains(&token);
        let weight = |token: usize| f64::from(logits[token] / temperature).exp();
        let total: f64 = (0..8).filter(|&token| kept(token)).map(weight).sum();
        let rows = (0..draws).map(|i| SampleRow {
            length: i as u32,
            seed_low: 5,
            temperature,
            top_k,
            ..plain(i)
        });
        let pass = Pass {
            vocabulary: 8,
            rows: rows.collect(),
            logits: logits.repeat(draws),
            ..Pass::default()
        };
        for (name, backend) in backends.iter_mut() {
            let tokens = run(backend, &pass).tokens;
            let mut square = 0.0;
            for token in (0..8).filter(|&token| token != 5) {
                let found = tokens.iter().filter(|&&t| t == token as u32).count() as f64;
                let mean = draws as f64 * weight(token) / total;
                if kept(token) {
                    square += (found - mean).powi(2) / mean;
                } else {
                    assert_eq!(found, 0.0, "{name}");
                }
            }
            // 99.99 % of 6 degrees of freedom.
            assert!(square < 27.9, "{name}: {square}");
        }
    }
}

pub(crate) fn options_out_of_range_do_no_harm<B: Backend>(backends: &mut [(&'static str, B)]) {
    let (vocabulary, strange) = (700, [f32::NAN, f32::INFINITY, -1.0, 1e-45, 3e38]);
    let mut rng = Rng::of(&[23]);
    let mut pass = Pass { vocabulary, biases: vec![(3, 1.0), (u32::MAX, 2.0)], ..Pass::default() };
    for x in strange {
        for row in [
            SampleRow { temperature: x, ..plain(0) },
            SampleRow { top_p: x, min_p: x, top_k: u32::MAX, ..plain(0) },
            SampleRow { min_p: x, top_p: 0.5, ..plain(0) },
            SampleRow { repetition_penalty: x, length: u32::MAX, ..plain(0) },
            SampleRow { frequency_penalty: x, presence_penalty: x, length: 99, ..plain(0) },
            SampleRow { bias_start: u32::MAX, bias_count: 2, ..plain(0) },
            SampleRow { bias_start: 1, bias_count: u32::MAX, logprobs: 99, ..plain(0) },
            SampleRow { bias_start: 0, bias_count: 2, ..plain(0) },
        ] {
            pass.rows.push(SampleRow { lane: pass.rows.len() as u32, ..row });
        }
    }
    let beyond = pass.rows.len();
    pass.rows.push(SampleRow { repetition_penalty: 2.0, length: 5, ..plain(1 << 30) });
    pass.history = rng.tokens(pass.rows.len() * CONTEXT, 2 * vocabulary);
    pass.logits = rng.normals(pass.rows.len() * vocabulary, 3.0);
    for logprobs in [false, true] {
        pass.logprobs = logprobs;
        for (name, backend) in backends.iter_mut() {
            let found = run(backend, &pass);
            for (r, &token) in found.tokens.iter().enumerate() {
                assert!(token == NONE || (token as usize) < vocabulary, "{name}, row {r}: {token}");
                if r < beyond {
                    assert_eq!(found.sampled[r], token, "{name}");
                }
            }
            assert_eq!(found.sampled[beyond], 88, "{name}: no such lane");
            // Biases that are there in part count as none; tokens that are not are passed by.
            for (r, biases) in [(5, &[][..]), (6, &[]), (7, &[(3, 1.0)])] {
                let x = &pass.logits[r * vocabulary..][..vocabulary];
                assert_eq!(found.tokens[r], sample_row(x, &pass.rows[r], biases, &[]), "{name}");
            }
        }
    }
}

pub(crate) fn scores_are_the_references<B: Backend>(backends: &mut [(&'static str, B)]) {
    for (vocabulary, rows) in [(1, 2), (257, 9), (5000, 5), (128_256, 5)] {
        let mut rng = Rng::of(&[24, vocabulary as u64]);
        let x: Vec<f32> = (0..rows).flat_map(|r| logits(&mut rng, vocabulary, r)).collect();
        let mut targets = rng.tokens(FIRST + rows, vocabulary);
        targets[FIRST + 1] = NONE;
        let expected = score(&mut Reference::new(), vocabulary, &x, &targets);
        for (name, backend) in backends.iter_mut() {
            let found = score(backend, vocabulary, &x, &targets);
            for (&found, &expected) in found.iter().zip(&expected) {
                near(found, expected, &|| format!("{name}: {vocabulary} tokens"));
            }
            let mut beyond = targets.clone();
            beyond[FIRST] = vocabulary as u32;
            beyond[FIRST + 1] = NONE - 1;
            let found = score(backend, vocabulary, &x, &beyond);
            assert_eq!(found[FIRST..FIRST + 2], [f32::NAN.to_bits(); 2], "{name}");
        }
    }
}

pub(crate) fn buffers_that_are_too_short_are_refused<B: Backend>(
    backends: &mut [(&'static str, B)],
) {
    for (name, backend) in backends.iter_mut() {
        for short in 0..6 {
            let len = |which: usize, len: usize| len - usize::from(which == short);
            let batch = HostBatch {
                sample_rows: vec![plain(0); len(0, 3)],
                targets: vec![0; len(0, 3)],
                ..HostBatch::default()
            }
            .upload(backend);
            let mut lanes = upload_lanes(backend, &[0; 8], 4, &[0; 2]);
            let logits = upload(backend, &vec![0.0; len(1, 10)]);
            let mut samples = ops::Samples {
                tokens: upload(backend, &vec![0; len(2, 3)]),
                logprobs: upload(backend, &vec![0.0; len(3, 3)]),
                top_tokens: upload(backend, &vec![0; len(4, 3 * MAX_LOGPROBS)]),
                top_logprobs: upload(backend, &vec![0.0; len(5, 3 * MAX_LOGPROBS)]),
            };
            let sampled = run_ops(backend, &mut |r| {
                r.sample(ops::Sample {
                    rows: 2,
                    first: 1,
                    vocabulary: 5,
                    greedy: false,
                    logprobs: true,
                    batch: &batch,
                    lanes: &mut lanes,
                    logits: &logits,
                    samples: &mut samples,
                })
            });
            assert!(matches!(sampled, Err(RunError::Shape { .. })), "{name}, {short}");
            let scored = run_ops(backend, &mut |r| {
                let (batch, logits, samples) = (&batch, &logits, &mut samples);
                r.score(ops::Score { rows: 2, first: 1, vocabulary: 5, batch, logits, samples })
            });
            let refused = matches!(scored, Err(RunError::Shape { .. }));
            assert_eq!(refused, [0, 1, 3].contains(&short), "{name}, {short}");
        }
    }
}
