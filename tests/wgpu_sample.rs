//! Sampling and scoring on GPUs, in every variant, against the reference: equality where the
//! contract is exact; and of draws, that a token other than the reference's is one that rounding
//! may have brought forward.

#![cfg(feature = "wgpu")]

mod common;

use common::host::{HostBatch, upload_lanes, upload_samples};
use common::rng::Rng;
use common::run::{bits, download, run_ops, upload};
use common::wgpu::opened;
use trine::backend::ops::{self, SampleRow};
use trine::backend::random::gumbel;
use trine::backend::reference::{Reference, sample_row};
use trine::backend::wgpu::{Wgpu, WgpuOptions};
use trine::backend::{Backend, MAX_LOGPROBS, NONE, Record};
use trine::error::RunError;

/// Rows of other passes in front of each test's.
const FIRST: usize = 2;
const CONTEXT: usize = 24;

/// A pass, row `r` in lane `r` where it is not padding.
#[derive(Clone, Default)]
struct Pass {
    vocabulary: usize,
    logits: Vec<f32>,
    rows: Vec<SampleRow>,
    biases: Vec<(u32, f32)>,
    history: Vec<u32>,
    greedy: bool,
    logprobs: bool,
}

/// All that a pass writes, floats as bits and one NaN for all.
#[derive(Debug, Clone, PartialEq)]
struct Out {
    tokens: Vec<u32>,
    sampled: Vec<u32>,
    logprobs: Vec<u32>,
    top_tokens: Vec<u32>,
    top_logprobs: Vec<u32>,
}

fn plain(lane: usize) -> SampleRow {
    let lane = lane as u32;
    SampleRow { lane, top_p: 1.0, repetition_penalty: 1.0, temperature: 1.0, ..Default::default() }
}

fn one_nan(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

fn run<B: Backend>(backend: &mut B, pass: &Pass) -> Out {
    let rows = pass.rows.len();
    let (bias_tokens, bias_values) = pass.biases.iter().copied().unzip();
    let sample_rows = [&[plain(0); FIRST], &pass.rows[..]].concat();
    let batch = HostBatch { sample_rows, bias_tokens, bias_values, ..HostBatch::default() };
    let batch = batch.upload(backend);
    let mut history = pass.history.clone();
    history.resize(rows * CONTEXT, 0);
    let mut lanes = upload_lanes(backend, &history, CONTEXT, &vec![88; rows]);
    let logits = upload(backend, &pass.logits);
    let mut samples = upload_samples(backend, FIRST + rows);
    run_ops(backend, &mut |r| {
        r.sample(ops::Sample {
            rows,
            first: FIRST,
            vocabulary: pass.vocabulary,
            greedy: pass.greedy,
            logprobs: pass.logprobs,
            batch: &batch,
            lanes: &mut lanes,
            logits: &logits,
            samples: &mut samples,
        })
    })
    .unwrap();
    assert_eq!(bits(&download(backend, &logits)), bits(&pass.logits), "logits are left alone");
    let tokens = download(backend, &samples.tokens);
    let logprobs = download(backend, &samples.logprobs);
    let top_tokens = download(backend, &samples.top_tokens);
    let top_logprobs = download(backend, &samples.top_logprobs);
    // Rows of other passes.
    assert_eq!((&tokens[..FIRST], &logprobs[..FIRST]), (&[77; FIRST][..], &[77.0; FIRST][..]));
    let top = FIRST * MAX_LOGPROBS;
    assert!(top_tokens[..top].iter().all(|&token| token == 77));
    assert!(top_logprobs[..top].iter().all(|&logprob| logprob == 77.0));
    Out {
        tokens: tokens[FIRST..].to_vec(),
        sampled: download(backend, &lanes.sampled),
        logprobs: one_nan(&logprobs[FIRST..]),
        top_tokens: top_tokens[top..].to_vec(),
        top_logprobs: one_nan(&top_logprobs[top..]),
    }
}

/// A backend for each adapter and variant, kept from pass to pass with its scratch memory.
fn backends() -> Vec<(&'static str, Wgpu)> {
    let open = |opened: &'static common::wgpu::Opened| {
        (opened.name.as_str(), Wgpu::new(&opened.gpu, WgpuOptions::default()))
    };
    opened().iter().map(open).collect()
}

/// What the reference says, and that every GPU says the same but for rounding. How many draws were
/// compared, and how many differ.
fn compare(backends: &mut [(&'static str, Wgpu)], pass: &Pass) -> [usize; 2] {
    let expected = run(&mut Reference::new(), pass);
    let mut counts = [0; 2];
    for (name, backend) in backends {
        let found = run(backend, pass);
        for (r, row) in pass.rows.iter().enumerate() {
            let what = || format!("{name}: {} tokens, row {r}: {row:?}", pass.vocabulary);
            let (token, wanted) = (found.tokens[r], expected.tokens[r]);
            counts[0] += 1;
            if token != wanted {
                counts[1] += 1;
                let admissible = !pass.greedy && Bounds::of(pass, r).admits(token);
                assert!(admissible, "{token} is not {wanted}, {}", what());
            } else {
                near(found.logprobs[r], expected.logprobs[r], &what);
            }
            if row.lane != NONE {
                assert_eq!(found.sampled[r], token, "{}", what());
            }
        }
        let padding = pass.rows.iter().zip(&found.sampled).filter(|(row, _)| row.lane == NONE);
        assert!(padding.into_iter().all(|(_, &sampled)| sampled == 88), "{name}");
        assert_eq!(found.top_tokens, expected.top_tokens, "{name}");
        for (&found, &expected) in found.top_logprobs.iter().zip(&expected.top_logprobs) {
            near(found, expected, &|| (*name).into());
        }
    }
    counts
}

/// Log-probabilities are differences of numbers of the order of 100; NaN and 0 are themselves.
fn near(found: u32, expected: u32, what: &dyn Fn() -> String) {
    let (a, b) = (f32::from_bits(found), f32::from_bits(expected));
    let near = (a - b).abs() <= 4e-6 + 4e-7 * b.abs();
    assert!(found == expected || near, "log-probability {a} is not {b}, {}", what());
}

/// The tokens that may be drawn if every cut is moved and every score is changed by `SLACK` at most.
struct Bounds {
    scores: Vec<f64>,
    /// Tokens that are kept at the widest, and of those the ones that are kept in any case.
    order: Vec<usize>,
    surely: usize,
    slack: f64,
}

const SLACK: f64 = 1e-4;

impl Bounds {
    fn of(pass: &Pass, r: usize) -> Self {
        let (row, vocabulary) = (&pass.rows[r], pass.vocabulary);
        let mut x: Vec<f32> = pass.logits[r * vocabulary..][..vocabulary].to_vec();
        for &(token, value) in &biases_of(pass, row) {
            x[token as usize] += value;
        }
        let history = history_of(pass, r);
        for (v, x) in x.iter_mut().enumerate() {
            let at = |from: usize| history[from.min(history.len())..].iter();
            let count = |from: usize| at(from).filter(|&&t| t as usize == v).count();
            if count(0) > 0 {
                let factor = row.repetition_penalty;
                *x = if *x > 0.0 { *x / factor } else { *x * factor };
            }
            if count(row.prompt as usize) > 0 {
                let count = count(row.prompt as usize) as f32;
                *x -= row.frequency_penalty * count + row.presence_penalty;
            }
        }
        let mut order: Vec<usize> = (0..vocabulary).collect();
        order.sort_by(|&a, &b| x[b].partial_cmp(&x[a]).unwrap());
        // Temperature 0 takes the best, and cuts nothing.
        let warm = row.temperature != 0.0;
        let scaled =
            |v: usize| f64::from(x[v]) / f64::from(if warm { row.temperature } else { 1.0 });
        let top = scaled(order[0]);
        // Numbers of this size are a few units in the last place apart.
        let slack = SLACK + 4.0 * f64::from(f32::EPSILON) * top.abs();
        let (mut surely, mut perhaps) = (vocabulary, vocabulary);
        if warm && row.min_p > 0.0 {
            let floor = top + f64::from(row.min_p).ln();
            // The logarithm of 1 is exact.
            let least = if row.min_p == 1.0 { floor } else { floor + slack };
            surely = order.partition_point(|&v| scaled(v) >= least).max(1);
            perhaps = order.partition_point(|&v| scaled(v) >= floor - slack);
        }
        if warm && row.top_k > 0 {
            let last = (row.top_k as usize).min(vocabulary);
            surely = surely.min(last);
            // Only penalties are rounded, and only then may places change.
            let rounded = row.repetition_penalty != 1.0 || row.frequency_penalty != 0.0;
            let kept = scaled(order[last - 1]) - slack;
            let last = if rounded { order.partition_point(|&v| scaled(v) >= kept) } else { last };
            perhaps = perhaps.min(last);
        }
        if warm && row.top_p < 1.0 {
            let weight = |v: usize| (scaled(v) - top).exp();
            let first = |kept: usize, share: f64| {
                let goal = share * order[..kept].iter().map(|&v| weight(v)).sum::<f64>();
                let mut sum = 0.0;
                let found = order[..kept].iter().position(|&v| {
                    sum += weight(v);
                    sum >= goal
                });
                found.map_or(kept, |last| last + 1)
            };
            surely = first(surely, f64::from(row.top_p) - 1e-5);
            perhaps = first(perhaps, f64::from(row.top_p) + 1e-5);
        }
        order.truncate(perhaps);
        let seed = u64::from(row.seed_high) << 32 | u64::from(row.seed_low);
        let noise = |v: usize| f64::from(gumbel(seed, row.length, row.choice, v as u32));
        let scores =
            (0..vocabulary).map(|v| scaled(v) + if warm { noise(v) } else { 0.0 }).collect();
        Self { scores, order, surely, slack }
    }

    fn admits(&self, token: u32) -> bool {
        let most = self.order[..self.surely].iter().map(|&v| self.scores[v]);
        let most = most.fold(f64::NEG_INFINITY, f64::max);
        self.order.contains(&(token as usize)) && self.scores[token as usize] >= most - self.slack
    }
}

fn biases_of(pass: &Pass, row: &SampleRow) -> Vec<(u32, f32)> {
    pass.biases[row.bias_start as usize..][..row.bias_count as usize].to_vec()
}

fn history_of(pass: &Pass, r: usize) -> Vec<u32> {
    pass.history.get(r * CONTEXT..).map_or(vec![], |history| {
        history[..(pass.rows[r].length as usize).min(history.len())].to_vec()
    })
}

/// Rows of every kind: spread out, with ties, all equal, peaked, with both zeros, far from zero.
fn logits(rng: &mut Rng, vocabulary: usize, kind: usize) -> Vec<f32> {
    let mut x = rng.normals(vocabulary, 3.0);
    match kind % 7 {
        1 => x.iter_mut().for_each(|x| *x = x.round()),
        2 => x.fill(-1.25),
        3 => x[rng.below(vocabulary)] = 30.0,
        4 => x.iter_mut().for_each(|x| *x = if *x > 0.0 { 0.0 } else { -0.0 }),
        5 => x.iter_mut().for_each(|x| *x = 1e4 + 10.0 * *x),
        _ => {}
    }
    x
}

/// Options of row `r`: one of them alone by turns, or any of them.
fn options(rng: &mut Rng, pass: &mut Pass, r: usize, alone: usize) -> SampleRow {
    let vocabulary = pass.vocabulary;
    let of = |rng: &mut Rng, values: &[f32]| values[rng.below(values.len())];
    let length = rng.below(CONTEXT + 1) as u32;
    let bias_start = pass.biases.len() as u32;
    let bias_count = rng.below(5) as u32;
    // Few tokens, so that some come twice.
    let near = rng.below(vocabulary);
    for _ in 0..bias_count {
        let token = (near + rng.below(2)).min(vocabulary - 1);
        pass.biases.push((token as u32, rng.range(-5.0, 8.0)));
    }
    let all = SampleRow {
        lane: r as u32,
        length,
        prompt: rng.below(length as usize + 1) as u32,
        bias_start,
        bias_count,
        temperature: of(rng, &[0.0, 1e-3, 0.3, 0.7, 1.0, 1.0, 2.0, 1e3]),
        top_k: [0, 1, 2, 5, 40, 300, vocabulary + 1][rng.below(7)] as u32,
        top_p: of(rng, &[1.0, 0.0, 1e-6, 0.1, 0.5, 0.9, 0.999]),
        min_p: of(rng, &[0.0, 1e-6, 0.05, 0.5, 1.0]),
        repetition_penalty: of(rng, &[1.0, 1.3, 0.8]),
        frequency_penalty: of(rng, &[0.0, 0.5, -0.5]),
        presence_penalty: of(rng, &[0.0, 1.0, -1.0]),
        seed_low: rng.bits() as u32,
        seed_high: rng.bits() as u32,
        choice: rng.below(3) as u32,
        logprobs: rng.below(MAX_LOGPROBS + 1) as u32,
    };
    let none = SampleRow {
        length,
        prompt: all.prompt,
        seed_low: all.seed_low,
        seed_high: all.seed_high,
        logprobs: all.logprobs,
        ..plain(r)
    };
    match alone {
        1 => SampleRow { temperature: all.temperature, ..none },
        2 => SampleRow { top_k: all.top_k, ..none },
        3 => SampleRow { top_p: all.top_p, ..none },
        4 => SampleRow { min_p: all.min_p, ..none },
        5 => SampleRow { bias_start, bias_count, ..none },
        6 => SampleRow { repetition_penalty: all.repetition_penalty, ..none },
        7 => SampleRow { frequency_penalty: all.frequency_penalty, ..none },
        8 => SampleRow { presence_penalty: all.presence_penalty, ..none },
        _ => all,
    }
}

fn random_pass(vocabulary: usize, rows: usize, seed: u64) -> Pass {
    let mut rng = Rng::of(&[21, vocabulary as u64, seed]);
    let mut pass = Pass { vocabulary, logprobs: seed.is_multiple_of(2), ..Pass::default() };
    // Many of one token, so that it is counted more than once.
    pass.history = rng.tokens(rows * CONTEXT, vocabulary);
    pass.history.iter_mut().step_by(3).for_each(|token| *token = vocabulary as u32 / 2);
    for r in 0..rows {
        pass.logits.extend(logits(&mut rng, vocabulary, r + seed as usize));
        let alone = (r + seed as usize) % 16;
        let row = options(&mut rng, &mut pass, r, alone);
        pass.rows.push(row);
    }
    pass
}

#[test]
fn draws_are_the_references_but_for_rounding() {
    let mut backends = backends();
    let mut counts = [0; 2];
    let cases = [(1, 32, 2), (2, 48, 4), (255, 48, 4), (256, 48, 4), (257, 48, 8), (1000, 48, 8)];
    let large = [(32_000, 16, 3), (128_256, 16, 1)];
    for (vocabulary, rows, passes) in cases.into_iter().chain(large) {
        for seed in 0..passes {
            let [all, differ] = compare(&mut backends, &random_pass(vocabulary, rows, seed));
            counts = [counts[0] + all, counts[1] + differ];
        }
    }
    let [all, differ] = counts;
    println!("{differ} of {all} draws differ, each within rounding");
    assert!(differ * 200 <= all, "{differ} of {all} draws differ");
}

/// What excuses a draw excuses the reference's own, and few others.
#[test]
fn what_rounding_excuses_is_little() {
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

#[test]
fn half_of_a_million_equal_tokens_is_half() {
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
        compare(&mut backends(), &pass);
    }
}

#[test]
fn greedy_is_exact() {
    let mut backends = backends();
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
            let [_, differ] = compare(&mut backends, &pass);
            assert_eq!(differ, 0);
        }
    }
}

#[test]
fn what_is_not_finite_is_found_anywhere() {
    let mut backends = backends();
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
            for (name, backend) in &mut backends {
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

#[test]
fn a_row_depends_on_itself_alone() {
    let pass = {
        let mut pass = random_pass(3000, 12, 4);
        pass.rows[2].lane = NONE;
        pass.logits[5 * 3000 + 17] = f32::NAN;
        pass
    };
    let mut of_variants: Vec<Out> = Vec::new();
    for (name, backend) in &mut backends() {
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
        of_variants.push(together);
    }
    // Each adapter's variants follow those of the one before it, in the same order.
    let (with, without) = of_variants.split_at(of_variants.len() / 2);
    assert_eq!(with, without, "subgroups change no bit");
}

#[test]
fn the_noise_is_the_references() {
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
    for (name, backend) in &mut backends() {
        assert_eq!(run(backend, &pass).tokens, expected, "{name}");
    }
}

#[test]
fn frequencies_approach_softmax() {
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
        for (name, backend) in &mut backends() {
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

#[test]
fn options_out_of_range_do_no_harm() {
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
        for (name, backend) in &mut backends() {
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

#[test]
fn scores_are_the_references() {
    for (vocabulary, rows) in [(1, 2), (257, 9), (5000, 5), (128_256, 5)] {
        let mut rng = Rng::of(&[24, vocabulary as u64]);
        let x: Vec<f32> = (0..rows).flat_map(|r| logits(&mut rng, vocabulary, r)).collect();
        let mut targets = rng.tokens(FIRST + rows, vocabulary);
        targets[FIRST + 1] = NONE;
        let expected = score(&mut Reference::new(), vocabulary, &x, &targets);
        for (name, backend) in &mut backends() {
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

fn score<B: Backend>(backend: &mut B, vocabulary: usize, x: &[f32], targets: &[u32]) -> Vec<u32> {
    let rows = targets.len() - FIRST;
    let batch = HostBatch { targets: targets.to_vec(), ..HostBatch::default() }.upload(backend);
    let logits = upload(backend, x);
    let mut samples = upload_samples(backend, FIRST + rows);
    run_ops(backend, &mut |r| {
        let (batch, logits, samples) = (&batch, &logits, &mut samples);
        r.score(ops::Score { rows, first: FIRST, vocabulary, batch, logits, samples })
    })
    .unwrap();
    one_nan(&download(backend, &samples.logprobs))
}

#[test]
fn buffers_that_are_too_short_are_refused() {
    for (name, backend) in &mut backends() {
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
