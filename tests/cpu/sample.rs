//! Sampling and scoring on the CPU backend.

use crate::common::*;
use trine::backend::cpu::{Buffer, Cpu};
use trine::backend::ops::*;
use trine::backend::random::gumbel;
use trine::backend::{Backend, MAX_LOGPROBS, NONE, Record};

fn plain(lane: u32) -> SampleRow {
    SampleRow { lane, top_p: 1.0, repetition_penalty: 1.0, temperature: 1.0, ..Default::default() }
}

/// What [`sample`] gives.
#[derive(PartialEq, Debug, Clone)]
struct Picked {
    tokens: Vec<u32>,
    sampled: Vec<u32>,
    logprobs: Vec<u32>,
    top_tokens: Vec<u32>,
    top_logprobs: Vec<u32>,
}

#[derive(Default)]
struct Extra<'a> {
    greedy: bool,
    logprobs: bool,
    history: &'a [u32],
    biases: &'a [(u32, f32)],
}

fn sample(
    cpu: &mut Cpu,
    vocabulary: usize,
    logits: &[f32],
    rows: &[SampleRow],
    extra: &Extra,
) -> Picked {
    let count = rows.len();
    let first = 2;
    let mut batch = batch(cpu, 1, 1, first + count);
    batch.sample_rows[first..].copy_from_slice(rows);
    for (i, &(token, value)) in extra.biases.iter().enumerate() {
        (batch.bias_tokens[i], batch.bias_values[i]) = (token, value);
    }
    let context = extra.history.len().max(4);
    let mut lanes = lanes(cpu, count, context);
    for lane in 0..count {
        lanes.history[lane * context..][..extra.history.len()].copy_from_slice(extra.history);
    }
    lanes.sampled.fill(77);
    let logits = buffer(cpu, logits);
    let mut samples = Samples {
        tokens: cpu.allocate("tokens", first + count).unwrap(),
        logprobs: cpu.allocate("logprobs", first + count).unwrap(),
        top_tokens: cpu.allocate("top_tokens", (first + count) * MAX_LOGPROBS).unwrap(),
        top_logprobs: cpu.allocate("top_logprobs", (first + count) * MAX_LOGPROBS).unwrap(),
    };
    step(cpu, |r| {
        r.sample(Sample {
            rows: count,
            first,
            vocabulary,
            greedy: extra.greedy,
            logprobs: extra.logprobs,
            batch: &batch,
            lanes: &mut lanes,
            logits: &logits,
            samples: &mut samples,
        })
    });
    Picked {
        tokens: samples.tokens[first..].to_vec(),
        sampled: lanes.sampled.to_vec(),
        logprobs: bits(&samples.logprobs[first..]),
        top_tokens: samples.top_tokens[first * MAX_LOGPROBS..].to_vec(),
        top_logprobs: bits(&samples.top_logprobs[first * MAX_LOGPROBS..]),
    }
}

/// The formulas, by sorting.
fn expected(logits: &[f32], o: &SampleRow, history: &[u32], biases: &[(u32, f32)]) -> u32 {
    let mut x = logits.to_vec();
    let range = o.bias_start as usize..(o.bias_start + o.bias_count) as usize;
    for &(token, value) in &biases[range] {
        x[token as usize] += value;
    }
    let history = &history[..(o.length as usize).min(history.len())];
    for (v, x) in x.iter_mut().enumerate() {
        if history.contains(&(v as u32)) {
            *x = if *x > 0.0 { *x / o.repetition_penalty } else { *x * o.repetition_penalty };
            let answer = history.get(o.prompt as usize..).unwrap_or(&[]);
            let count = answer.iter().filter(|&&t| t == v as u32).count();
            if count > 0 {
                *x -= o.frequency_penalty * count as f32 + o.presence_penalty;
            }
        }
    }
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]).then(a.cmp(&b)));
    if o.temperature == 0.0 {
        return order[0] as u32;
    }
    x.iter_mut().for_each(|x| *x /= o.temperature);
    let top = x[order[0]];
    order.retain(|&v| x[v] >= top + o.min_p.ln());
    if o.top_k > 0 {
        order.truncate(o.top_k as usize);
    }
    if o.top_p < 1.0 {
        let total: f64 = order.iter().map(|&v| f64::from(x[v] - top).exp()).sum();
        let mut sum = 0.0;
        let mut kept = 0;
        for &v in &order {
            kept += 1;
            sum += f64::from(x[v] - top).exp();
            if sum >= total * f64::from(o.top_p) {
                break;
            }
        }
        order.truncate(kept);
    }
    let seed = u64::from(o.seed_low) | u64::from(o.seed_high) << 32;
    let score = |v: usize| x[v] + gumbel(seed, o.length, o.choice, v as u32);
    order
        .into_iter()
        .reduce(|a, b| {
            let (sa, sb) = (score(a), score(b));
            if sb > sa || (sb == sa && b < a) { b } else { a }
        })
        .unwrap() as u32
}

#[test]
fn picks_follow_the_formulas() {
    let mut random = Random(1);
    for vocabulary in [1, 2, 5, 64, 67, 1000] {
        for round in 0..60 {
            // Some rounds with many ties.
            let mut logits = random.floats(vocabulary, if round % 3 == 0 { 20.0 } else { 3.0 });
            if round % 4 == 0 {
                logits.iter_mut().for_each(|x| *x = x.round());
            }
            let history: Vec<u32> = (0..12).map(|_| random.below(vocabulary) as u32).collect();
            let biases: Vec<(u32, f32)> =
                (0..4).map(|i| (random.below(vocabulary) as u32, i as f32 - 2.0)).collect();
            let one = |random: &mut Random, values: &[f32]| values[random.below(values.len())];
            let row = SampleRow {
                lane: 0,
                length: random.below(13) as u32,
                prompt: random.below(8) as u32,
                bias_start: 1,
                bias_count: random.below(3) as u32,
                temperature: one(&mut random, &[0.0, 0.3, 1.0, 1.0, 5.0, 100.0]),
                top_k: random.below(vocabulary + 4) as u32 * (round % 2),
                top_p: one(&mut random, &[1.0, 0.95, 0.5, 0.01, 0.0]),
                min_p: one(&mut random, &[0.0, 0.0, 0.05, 0.5, 1.0]),
                repetition_penalty: one(&mut random, &[1.0, 1.3, 0.7]),
                frequency_penalty: one(&mut random, &[0.0, 0.5, -0.5]),
                presence_penalty: one(&mut random, &[0.0, 0.5]),
                seed_low: random.next() as u32,
                seed_high: random.next() as u32,
                choice: random.below(3) as u32,
                logprobs: 0,
            };
            let extra = Extra { history: &history, biases: &biases, ..Extra::default() };
            let picked = on_all_of(&[1], |cpu| sample(cpu, vocabulary, &logits, &[row], &extra));
            let token = expected(&logits, &row, &history, &biases);
            assert_eq!(picked.tokens[0], token, "{vocabulary} {row:?}");
            assert_eq!(picked.sampled[0], token);
        }
    }
}

#[test]
fn frequencies_approach_softmax() {
    let logits = [1.0, 0.0, -1.0, 2.0, 0.5, -20.0, 1.0];
    let total: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    let mut cpu = cpu_of(None, 1);
    let draws = 4000;
    let rows: Vec<SampleRow> =
        (0..draws).map(|i| SampleRow { length: i, seed_low: 5, ..plain(i) }).collect();
    let all: Vec<f32> = logits.repeat(draws as usize);
    let picked = sample(&mut cpu, logits.len(), &all, &rows, &Extra::default());
    for (token, &x) in logits.iter().enumerate() {
        let p = f64::from(x).exp() / total;
        let found = picked.tokens.iter().filter(|&&t| t == token as u32).count() as f64;
        let (mean, sigma) = (p * f64::from(draws), (p * (1.0 - p) * f64::from(draws)).sqrt());
        assert!((found - mean).abs() < 4.0 * sigma + 1.0, "{token}: {found} of {mean}");
    }
}

#[test]
fn rows_do_not_touch_each_other_and_bad_ones_are_marked() {
    let mut random = Random(3);
    let vocabulary = 300;
    let mut logits = random.floats(7 * vocabulary, 4.0);
    logits[2 * vocabulary + 299] = f32::NAN;
    logits[3 * vocabulary + 5] = f32::INFINITY;
    logits[4 * vocabulary + 5] = f32::NEG_INFINITY;
    let rows: Vec<SampleRow> = (0..7)
        .map(|lane| SampleRow {
            top_p: 0.9,
            logprobs: 3,
            seed_low: lane,
            ..plain(if lane == 5 { NONE } else { lane })
        })
        .collect();
    for greedy in [false, true] {
        let extra = Extra { greedy, logprobs: true, ..Extra::default() };
        let all = on_all(|cpu| {
            let mut all = sample(cpu, vocabulary, &logits, &rows, &extra);
            // Which NaN it is may differ.
            for x in all.logprobs.iter_mut().filter(|x| f32::from_bits(**x).is_nan()) {
                *x = f32::NAN.to_bits();
            }
            for (row, options) in rows.iter().enumerate().filter(|(row, _)| [0, 1, 6].contains(row))
            {
                let x = &logits[row * vocabulary..][..vocabulary];
                let alone = SampleRow { lane: 0, ..*options };
                let alone = sample(cpu, vocabulary, x, &[alone], &extra);
                assert_eq!(alone.tokens[0], all.tokens[row]);
                assert_eq!(alone.logprobs[0], all.logprobs[row]);
                assert_eq!(alone.top_tokens, all.top_tokens[row * MAX_LOGPROBS..][..MAX_LOGPROBS]);
            }
            all
        });
        for row in [2, 3, 4] {
            assert_eq!((all.tokens[row], all.sampled[row]), (NONE, NONE));
            assert!(f32::from_bits(all.logprobs[row]).is_nan());
        }
        assert_eq!((all.tokens[5], all.sampled[5]), (NONE, 77), "padding");
        for row in [0, 1, 6] {
            let x = &logits[row * vocabulary..][..vocabulary];
            let mut order: Vec<usize> = (0..vocabulary).collect();
            order.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
            let log_sum = x.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            let logprob = |v: usize| f64::from(x[v]) - log_sum;
            let near =
                |found: u32, v: usize| (f64::from(f32::from_bits(found)) - logprob(v)).abs() < 1e-5;
            assert!(near(all.logprobs[row], all.tokens[row] as usize));
            for (i, &token) in order.iter().enumerate().take(3) {
                assert_eq!(all.top_tokens[row * MAX_LOGPROBS + i], token as u32);
                assert!(near(all.top_logprobs[row * MAX_LOGPROBS + i], token));
            }
            assert_eq!(all.top_tokens[row * MAX_LOGPROBS + 3], NONE);
            if greedy {
                assert_eq!(all.tokens[row], order[0] as u32);
            }
        }
    }
}

#[test]
fn ties_take_the_lowest_token() {
    let mut logits = vec![-1.0f32; 100];
    for at in [37, 38, 70] {
        logits[at] = 3.0;
    }
    let row = SampleRow { temperature: 0.0, logprobs: 4, ..plain(0) };
    for greedy in [true, false] {
        let extra = Extra { greedy, logprobs: true, ..Extra::default() };
        let picked = on_all(|cpu| sample(cpu, 100, &logits, &[row], &extra));
        assert_eq!(picked.tokens, [37]);
        assert_eq!(picked.top_tokens[..4], [37, 38, 70, 0]);
    }
    let row = SampleRow { top_k: 1, ..plain(0) };
    for seed_low in 0..20 {
        let row = SampleRow { seed_low, ..row };
        let picked = on_all_of(&[1], |cpu| sample(cpu, 100, &logits, &[row], &Extra::default()));
        assert_eq!(picked.tokens, [37]);
    }
}

#[test]
fn scores() {
    let mut random = Random(4);
    for vocabulary in [1, 17, 9000] {
        let mut logits = random.floats(4 * vocabulary, 6.0);
        logits[3 * vocabulary - 1] = f32::NAN;
        let targets = [0, NONE, 0, vocabulary as u32 - 1];
        let found = on_all(|cpu| {
            let mut batch = batch(cpu, 1, 1, 5);
            batch.targets[1..].copy_from_slice(&targets);
            let logits = buffer(cpu, &logits);
            let logprobs: Buffer<f32> = cpu.allocate("logprobs", 5).unwrap();
            let mut samples = Samples {
                tokens: cpu.allocate("tokens", 0).unwrap(),
                logprobs,
                top_tokens: cpu.allocate("top_tokens", 0).unwrap(),
                top_logprobs: cpu.allocate("top_logprobs", 0).unwrap(),
            };
            step(cpu, |r| {
                r.score(Score {
                    rows: 4,
                    first: 1,
                    vocabulary,
                    batch: &batch,
                    logits: &logits,
                    samples: &mut samples,
                })
            });
            let nan = |x: &f32| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() };
            samples.logprobs[1..].iter().map(nan).collect::<Vec<_>>()
        });
        let found: Vec<f32> = found.into_iter().map(f32::from_bits).collect();
        assert_eq!(found[1], 0.0);
        assert!(found[2].is_nan());
        for row in [0, 3] {
            let x = &logits[row * vocabulary..][..vocabulary];
            let log_sum = x.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            let exact = f64::from(x[targets[row] as usize]) - log_sum;
            assert!((f64::from(found[row]) - exact).abs() < 1e-5, "{} {exact}", found[row]);
        }
    }
}
