//! The screened output head on CUDA: the tokens of the full one, wherever the best token lies and
//! however close others come.

use crate::common::host::{HostBatch, upload_lanes, upload_samples};
use crate::common::ops::EPS;
use crate::common::rng::Rng;
use crate::common::run::{bits, download, upload};
use trine::backend::cuda::{Cuda, CudaOptions, Head};
use trine::backend::ops::{self, SampleRow};
use trine::backend::{Backend, LogitUse, NONE, Record, StepKey};
use trine::tensor::{FloatType, HostTable, SharedBytes};

const FLOATS: [FloatType; 2] = [FloatType::Bf16, FloatType::F16];

/// A step of greedy rows.
struct Step {
    float: FloatType,
    width: usize,
    vocabulary: usize,
    table: Vec<f32>,
    input: Vec<f32>,
    gain: f32,
    /// Rows without a lane.
    padding: Vec<usize>,
}

#[derive(Debug, Clone, PartialEq)]
struct Out {
    tokens: Vec<u32>,
    sampled: Vec<u32>,
    logprobs: Vec<u32>,
    normed: Vec<u32>,
}

/// What the step gives, and what it leaves in the place of the logits.
fn run(cuda: &mut Cuda, step: &Step, logprobs: bool) -> (Out, Vec<f32>, Vec<f32>) {
    let &Step { float, width, vocabulary, .. } = step;
    let rows = step.input.len() / width;
    let to_bytes = |x: &f32| match float {
        FloatType::Bf16 => half::bf16::from_f32(*x).to_le_bytes(),
        _ => half::f16::from_f32(*x).to_le_bytes(),
    };
    let bytes = SharedBytes::new(step.table.iter().flat_map(to_bytes).collect::<Vec<u8>>());
    let table = HostTable { rows: vocabulary, cols: width, float, bytes };
    let table = cuda.load_table(table).unwrap();
    let lane = |r: usize| if step.padding.contains(&r) { NONE } else { r as u32 };
    let batch = HostBatch {
        logit_rows: (0..rows as u32).collect(),
        sample_rows: (0..rows).map(|r| SampleRow { lane: lane(r), ..Default::default() }).collect(),
        ..HostBatch::default()
    }
    .upload(cuda);
    let mut lanes = upload_lanes(cuda, &[0; 8], 1, &vec![88; rows]);
    let mut samples = upload_samples(cuda, rows);
    let (input, gain) = (upload(cuda, &step.input), upload(cuda, &vec![step.gain; width]));
    let mut normed = upload(cuda, &vec![77.0; rows * width]);
    let mut logits = upload(cuda, &vec![77.0; rows * vocabulary]);
    static KEYS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(1 << 20);
    let key = StepKey {
        tokens: KEYS.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
        sequences: rows,
        queries: 1,
        pages: 1,
        logit_rows: rows,
        logits: LogitUse::Greedy,
        hidden: false,
    };
    cuda.run(&key, &mut |r| {
        r.lm_head(ops::LmHead {
            rows,
            first: 0,
            width,
            vocabulary,
            batch: &batch,
            input: &input,
            norm: ops::Norm { gain: &gain, eps: EPS },
            table: &table,
            normed: &mut normed,
            logits: &mut logits,
        })?;
        r.sample(ops::Sample {
            rows,
            first: 0,
            vocabulary,
            greedy: true,
            logprobs,
            batch: &batch,
            lanes: &mut lanes,
            logits: &logits,
            samples: &mut samples,
        })
    })
    .unwrap();
    let normed = download(cuda, &normed);
    let out = Out {
        tokens: download(cuda, &samples.tokens),
        sampled: download(cuda, &lanes.sampled),
        logprobs: bits(&download(cuda, &samples.logprobs)),
        normed: bits(&normed),
    };
    (out, download(cuda, &logits), normed)
}

fn both() -> Option<[Cuda; 2]> {
    let open = |head| crate::common::cuda::open(CudaOptions::default().head(head));
    Some([open(Head::Full)?, open(Head::Screened)?])
}

/// Compares the heads. How many tokens had to be computed of all there are.
fn compare([full, screened]: &mut [Cuda; 2], step: &Step) -> [usize; 2] {
    let &Step { float, width, vocabulary, .. } = step;
    let rows = step.input.len() / width;
    let what = format!("{float:?}, {rows} rows, {vocabulary} × {width}");
    let (expected, logits, normed) = run(full, step, false);
    let (found, upper, _) = run(screened, step, false);
    assert_eq!(found, expected, "{what}");
    let mut counts = [0; 2];
    for r in 0..rows {
        let most = normed[r * width..][..width].iter().fold(0f32, |a, b| a.max(b.abs()));
        if rows > 8 || !most.is_finite() || most == 0.0 {
            continue;
        }
        // The bounds are of the scaled row.
        let factor = f64::from(f32::from_bits(most.to_bits() & 0x7f80_0000)) / 1024.0;
        let row = r * vocabulary..(r + 1) * vocabulary;
        let best = logits[row.clone()].iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for (&upper, &logit) in upper[row.clone()].iter().zip(&logits[row]) {
            let upper = f64::from(upper) * factor;
            assert!(upper >= f64::from(logit) || logit.is_nan(), "{what}: {upper} < {logit}");
            counts[0] += usize::from(upper >= f64::from(best));
        }
        counts[1] += vocabulary;
    }
    counts
}

fn step(float: FloatType, width: usize, vocabulary: usize, rows: usize, seed: u64) -> Step {
    let mut rng = Rng::of(&[41, width as u64, vocabulary as u64, rows as u64, seed]);
    Step {
        float,
        width,
        vocabulary,
        table: rng.normals(vocabulary * width, 0.3),
        input: rng.normals(rows * width, 2.0),
        gain: 1.0,
        padding: Vec::new(),
    }
}

#[test]
fn random_heads_give_the_same_tokens() {
    let Some(mut cuda) = both() else { return };
    for float in FLOATS {
        for width in [1, 4, 37, 300, 1000] {
            for (vocabulary, rows) in [(1, 2), (7, 1), (129, 8), (1000, 3)] {
                compare(&mut cuda, &step(float, width, vocabulary, rows, 0));
            }
        }
        // More rows than are screened.
        compare(&mut cuda, &step(float, 37, 129, 9, 0));
        // Several pieces, tiles and rounds; and few have to be computed.
        let mut counts = [0; 2];
        for (rows, gain) in [(1, 1.0), (5, 1e-20), (8, 1e20)] {
            let step = Step { gain, ..step(float, 400, 4200, rows, 1) };
            let [some, all] = compare(&mut cuda, &step);
            counts = [counts[0] + some, counts[1] + all];
        }
        assert!(counts[0] * 100 < counts[1], "{counts:?}");
    }
}

#[test]
fn close_and_equal_logits_are_told_apart() {
    let Some(mut cuda) = both() else { return };
    for float in FLOATS {
        for kind in 0..6 {
            let mut step = step(float, 100, 2100, 2, 2);
            let (width, input) = (step.width, step.input.clone());
            let mut row = |v: usize, f: &dyn Fn(usize) -> f32| {
                (0..width).for_each(|i| step.table[v * width + i] = f(i));
            };
            let along = |i: usize| input[i] * 0.2;
            match kind {
                // The best twice, in different pieces.
                0 => [2099, 77].into_iter().for_each(|v| row(v, &along)),
                // All equal: the first token.
                1 => (0..2100).for_each(|v| row(v, &along)),
                // Hundreds that differ in their last bits.
                2 => (0..2100).step_by(7).for_each(|v| {
                    row(v, &|i| along(i) * if i == v % 100 { 1.008 } else { 1.0 });
                }),
                // Zeros, and all of the others below them.
                3 => (0..2100).for_each(|v| {
                    let sign = if v == 1234 || v == 2000 { 0.0 } else { -1.0 };
                    row(v, &|i| sign * along(i) * (1.0 + v as f32 * 1e-4));
                }),
                // Rows that are all but zero, and the best one of them.
                4 => (0..2100)
                    .for_each(|v| row(v, &|i| along(i) * if v == 9 { 1e-6 } else { -1e-6 })),
                // One element that outweighs its row, and so leaves the others no bits.
                _ => (0..2100).for_each(|v| {
                    row(v, &|i| {
                        if i == v % 100 { 30.0 } else { 0.01 * along(i) + v as f32 * 1e-6 }
                    });
                }),
            }
            compare(&mut cuda, &step);
        }
    }
}

#[test]
fn padding_and_what_is_not_finite_are_as_in_the_full_head() {
    let Some(mut cuda) = both() else { return };
    for float in FLOATS {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut step = step(float, 100, 300, 6, 3);
            step.input[2 * 100 + 99] = bad;
            step.input[4 * 100..5 * 100].fill(0.0);
            step.padding = vec![1];
            compare(&mut cuda, &step);
            // And in the table, which makes every row's logits so.
            step.table[250 * 100 + 7] = bad;
            compare(&mut cuda, &step);
        }
    }
}

#[test]
fn whoever_asks_for_more_gets_the_full_head() {
    let Some([mut full, mut screened]) = both() else { return };
    let step = step(FloatType::Bf16, 100, 300, 3, 4);
    let (expected, logits, _) = run(&mut full, &step, true);
    let (found, others, _) = run(&mut screened, &step, true);
    assert_eq!(found, expected);
    assert_eq!(bits(&others), bits(&logits));
}
