//! Sampling and scoring of random passes, and what of a draw rounding may change: for backends whose
//! arithmetic is not the reference's.

use trine::backend::ops::{self, SampleRow};
use trine::backend::random::gumbel;
use trine::backend::reference::Reference;
use trine::backend::{Backend, MAX_LOGPROBS, NONE, Record};

use super::host::{HostBatch, upload_lanes, upload_samples};
use super::rng::Rng;
use super::run::{bits, download, run_ops, upload};

/// Rows of other passes in front of each test's.
pub(crate) const FIRST: usize = 2;
pub(crate) const CONTEXT: usize = 24;

/// A pass, row `r` in lane `r` where it is not padding.
#[derive(Clone, Default)]
pub(crate) struct Pass {
    pub(crate) vocabulary: usize,
    pub(crate) logits: Vec<f32>,
    pub(crate) rows: Vec<SampleRow>,
    pub(crate) biases: Vec<(u32, f32)>,
    pub(crate) history: Vec<u32>,
    pub(crate) greedy: bool,
    pub(crate) logprobs: bool,
}

/// All that a pass writes, floats as bits and one NaN for all.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Out {
    pub(crate) tokens: Vec<u32>,
    pub(crate) sampled: Vec<u32>,
    pub(crate) logprobs: Vec<u32>,
    pub(crate) top_tokens: Vec<u32>,
    pub(crate) top_logprobs: Vec<u32>,
}

pub(crate) fn plain(lane: usize) -> SampleRow {
    let lane = lane as u32;
    SampleRow { lane, top_p: 1.0, repetition_penalty: 1.0, temperature: 1.0, ..Default::default() }
}

pub(crate) fn one_nan(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

pub(crate) fn run<B: Backend>(backend: &mut B, pass: &Pass) -> Out {
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

/// What the reference says, and that every GPU says the same but for rounding. How many draws were
/// compared, and how many differ.
pub(crate) fn compare<B: Backend>(backends: &mut [(&'static str, B)], pass: &Pass) -> [usize; 2] {
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
pub(crate) fn near(found: u32, expected: u32, what: &dyn Fn() -> String) {
    let (a, b) = (f32::from_bits(found), f32::from_bits(expected));
    let near = (a - b).abs() <= 4e-6 + 4e-7 * b.abs();
    assert!(found == expected || near, "log-probability {a} is not {b}, {}", what());
}

/// The tokens that may be drawn if every cut is moved and every score is changed by `SLACK` at most.
pub(crate) struct Bounds {
    scores: Vec<f64>,
    /// Tokens that are kept at the widest, and of those the ones that are kept in any case.
    order: Vec<usize>,
    surely: usize,
    slack: f64,
}

pub(crate) const SLACK: f64 = 1e-4;

impl Bounds {
    pub(crate) fn of(pass: &Pass, r: usize) -> Self {
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

    pub(crate) fn admits(&self, token: u32) -> bool {
        let most = self.order[..self.surely].iter().map(|&v| self.scores[v]);
        let most = most.fold(f64::NEG_INFINITY, f64::max);
        self.order.contains(&(token as usize)) && self.scores[token as usize] >= most - self.slack
    }
}

pub(crate) fn biases_of(pass: &Pass, row: &SampleRow) -> Vec<(u32, f32)> {
    pass.biases[row.bias_start as usize..][..row.bias_count as usize].to_vec()
}

pub(crate) fn history_of(pass: &Pass, r: usize) -> Vec<u32> {
    pass.history.get(r * CONTEXT..).map_or(vec![], |history| {
        history[..(pass.rows[r].length as usize).min(history.len())].to_vec()
    })
}

/// Rows of every kind: spread out, with ties, all equal, peaked, with both zeros, far from zero.
pub(crate) fn logits(rng: &mut Rng, vocabulary: usize, kind: usize) -> Vec<f32> {
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
pub(crate) fn options(rng: &mut Rng, pass: &mut Pass, r: usize, alone: usize) -> SampleRow {
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

pub(crate) fn random_pass(vocabulary: usize, rows: usize, seed: u64) -> Pass {
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

pub(crate) fn score<B: Backend>(
    backend: &mut B,
    vocabulary: usize,
    x: &[f32],
    targets: &[u32],
) -> Vec<u32> {
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
