//! The output head, embeddings and norms on CUDA, at awkward shapes: against sums in f64, and bit by
//! bit against themselves with other rows beside them.

use crate::common::host::{HostBatch, upload_lanes};
use crate::common::ops::{EPS, gain};
use crate::common::rng::Rng;
use crate::common::run::{bits, download, run_ops, upload};
use trine::backend::cuda::{Cuda, CudaOptions, Head};
use trine::backend::ops::Epilogue;
use trine::backend::{Backend, FROM_LANE, NONE, Record, ops};
use trine::tensor::{FloatType, HostTable, SharedBytes};

const FLOATS: [FloatType; 3] = [FloatType::Bf16, FloatType::F16, FloatType::F32];

fn open() -> Option<Cuda> {
    crate::common::cuda::open(CudaOptions::default())
}

/// A table of normals in a type, and its values.
fn table(rng: &mut Rng, float: FloatType, rows: usize, cols: usize) -> (HostTable, Vec<f32>) {
    let values = rng.normals(rows * cols, 0.5);
    let bytes: Vec<u8> = match float {
        FloatType::Bf16 => {
            values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
        }
        FloatType::F16 => {
            values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect()
        }
        FloatType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    let mut exact = vec![0.0; values.len()];
    float.decode(&bytes, &mut exact);
    (HostTable { rows, cols, float, bytes: SharedBytes::new(bytes) }, exact)
}

/// A pass of the head.
struct Pass<'a> {
    width: usize,
    vocabulary: usize,
    input: &'a [f32],
    gather: &'a [u32],
    first: usize,
    rows: usize,
}

/// Normed rows and logits. What is behind them stays as it was.
fn head(cuda: &mut Cuda, table: &HostTable, pass: &Pass) -> (Vec<f32>, Vec<f32>) {
    let &Pass { width, vocabulary, input, gather, first, rows } = pass;
    let table = cuda.load_table(table.clone()).unwrap();
    let batch = HostBatch { logit_rows: gather.to_vec(), ..HostBatch::default() }.upload(cuda);
    let (input, gain) = (upload(cuda, input), upload(cuda, &gain(width)));
    let mut normed = upload(cuda, &vec![77.0; (rows + 1) * width]);
    let mut logits = upload(cuda, &vec![77.0; (rows + 1) * vocabulary]);
    run_ops(cuda, &mut |r| {
        r.lm_head(ops::LmHead {
            rows,
            first,
            width,
            vocabulary,
            batch: &batch,
            input: &input,
            norm: ops::Norm { gain: &gain, eps: EPS },
            table: &table,
            normed: &mut normed,
            logits: &mut logits,
        })
    })
    .unwrap();
    let (mut normed, mut logits) = (download(cuda, &normed), download(cuda, &logits));
    assert!(normed.split_off(rows * width).iter().all(|&x| x == 77.0));
    assert!(logits.split_off(rows * vocabulary).iter().all(|&x| x == 77.0));
    (normed, logits)
}

/// Rows of very different sizes, and a gather that turns them around with gaps.
fn inputs(rng: &mut Rng, rows: usize, width: usize) -> (Vec<f32>, Vec<u32>) {
    let mut input = Vec::new();
    for r in 0..rows {
        input.extend(rng.normals(width, [1.0, 1e-3, 1e4, 30.0][r % 4]));
    }
    let gather = (0..rows).map(|r| if r % 5 == 3 { NONE } else { (rows - 1 - r) as u32 }).collect();
    (input, gather)
}

fn check(cuda: &mut Cuda, float: FloatType, width: usize, vocabulary: usize, rows: usize) {
    let mut rng = Rng::of(&[31, width as u64, vocabulary as u64, rows as u64]);
    let (table, values) = table(&mut rng, float, vocabulary, width);
    let (input, mut gather) = inputs(&mut rng, rows, width);
    // Rows of another pass in front.
    gather.splice(0..0, [0, NONE]);
    let pass = Pass { width, vocabulary, input: &input, gather: &gather, first: 2, rows };
    let (normed, logits) = head(cuda, &table, &pass);
    let what = format!("{float:?}, {rows} rows, {vocabulary} × {width}");
    // Two parts of a row have this many bits of each element, and sums in f32 lose some of theirs.
    let parts = if float == FloatType::Bf16 { 2f64.powi(-17) } else { 2f64.powi(-23) };
    for r in 0..rows {
        let row = &normed[r * width..][..width];
        if gather[2 + r] == NONE {
            assert!(
                row.iter().chain(&logits[r * vocabulary..][..vocabulary]).all(|x| x.to_bits() == 0)
            );
            continue;
        }
        for v in 0..vocabulary {
            let products =
                row.iter().zip(&values[v * width..]).map(|(&a, &b)| f64::from(a) * f64::from(b));
            let (mut sum, mut size) = (0.0, 0.0);
            for product in products {
                sum += product;
                size += product.abs();
            }
            let error = (f64::from(logits[r * vocabulary + v]) - sum).abs();
            assert!(error <= size * (parts + 1e-6), "{what}: {error} of {size} at {r}, {v}");
        }
    }
    // The same bits alone, of a few rows.
    for r in (0..rows).step_by(rows.div_ceil(4)) {
        let alone = head(cuda, &table, &Pass { first: 2 + r, rows: 1, ..pass });
        assert_eq!(bits(&alone.0), bits(&normed[r * width..][..width]), "{what}, row {r}");
        let together = &logits[r * vocabulary..][..vocabulary];
        assert_eq!(bits(&alone.1), bits(together), "{what}, row {r}");
    }
}

#[test]
fn logits_are_right_and_a_rows_own() {
    let Some(mut cuda) = open() else { return };
    for float in FLOATS {
        for width in [1, 4, 37, 300, 1000] {
            for (vocabulary, rows) in [(1, 1), (7, 9), (129, 7)] {
                check(&mut cuda, float, width, vocabulary, rows);
            }
        }
        for rows in [1, 7, 8, 9, 16, 17, 33, 64, 70] {
            check(&mut cuda, float, 300, 129, rows);
        }
        // More tiles than warps, so that some have none in the last round.
        check(&mut cuda, float, 37, 1000, 2);
        check(&mut cuda, float, 300, 1000, 64);
        // The input in several chunks, of which the last is shorter.
        check(&mut cuda, float, 1800, 70, 8);
    }
}

#[test]
fn every_number_of_rows_gives_the_same_bits() {
    let Some(mut cuda) = open() else { return };
    let (width, vocabulary) = (200, 50);
    for float in FLOATS {
        let mut rng = Rng::of(&[32]);
        let (table, _) = table(&mut rng, float, vocabulary, width);
        let (input, gather) = inputs(&mut rng, 64, width);
        let pass = Pass { width, vocabulary, input: &input, gather: &gather, first: 0, rows: 64 };
        let (_, all) = head(&mut cuda, &table, &pass);
        for rows in 1..64 {
            let first = 64 - rows;
            let (_, some) = head(&mut cuda, &table, &Pass { first, rows, ..pass });
            assert_eq!(bits(&some), bits(&all[first * vocabulary..]), "{float:?}, {rows} rows");
        }
    }
}

#[test]
fn what_is_not_finite_reaches_the_logits_of_its_row_alone() {
    let Some(mut cuda) = open() else { return };
    let (width, vocabulary, rows) = (70, 33, 20);
    for float in FLOATS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut rng = Rng::of(&[33]);
            let (table, _) = table(&mut rng, float, vocabulary, width);
            let (mut input, gather) = inputs(&mut rng, rows, width);
            let sound = {
                let pass =
                    Pass { width, vocabulary, input: &input, gather: &gather, first: 0, rows };
                head(&mut cuda, &table, &pass).1
            };
            input[11 * width + 69] = bad;
            let pass = Pass { width, vocabulary, input: &input, gather: &gather, first: 0, rows };
            let (_, logits) = head(&mut cuda, &table, &pass);
            for (r, (logits, sound)) in
                logits.chunks(vocabulary).zip(sound.chunks(vocabulary)).enumerate()
            {
                if gather[r] == 11 {
                    assert!(logits.iter().all(|x| !x.is_finite()), "{float:?}, {bad}");
                } else {
                    assert_eq!(bits(logits), bits(sound), "{float:?}, {bad}, row {r}");
                }
            }
        }
    }
}

#[test]
fn rows_of_any_size_are_multiplied_as_well() {
    // The gain makes them so: f16 alone would overflow at 65504, and have few bits below 1e-5.
    let Some(mut cuda) = open() else { return };
    let (width, vocabulary) = (100, 9);
    for float in FLOATS {
        for size in [1e-30, 1e-6, 1e6, 1e30] {
            let mut rng = Rng::of(&[34]);
            let (table, values) = table(&mut rng, float, vocabulary, width);
            let table = cuda.load_table(table).unwrap();
            let batch = HostBatch { logit_rows: vec![0], ..HostBatch::default() }.upload(&mut cuda);
            let input = upload(&mut cuda, &rng.normals(width, 1.0));
            let gain = upload(&mut cuda, &vec![size; width]);
            let mut normed = upload(&mut cuda, &vec![0.0; width]);
            let mut logits = upload(&mut cuda, &vec![0.0; vocabulary]);
            run_ops(&mut cuda, &mut |r| {
                r.lm_head(ops::LmHead {
                    rows: 1,
                    first: 0,
                    width,
                    vocabulary,
                    batch: &batch,
                    input: &input,
                    norm: ops::Norm { gain: &gain, eps: EPS },
                    table: &table,
                    normed: &mut normed,
                    logits: &mut logits,
                })
            })
            .unwrap();
            let (row, logits) = (download(&mut cuda, &normed), download(&mut cuda, &logits));
            for (v, &logit) in logits.iter().enumerate() {
                let dot = |f: fn(f64) -> f64| -> f64 {
                    let row = row.iter().zip(&values[v * width..]);
                    row.map(|(&a, &b)| f(f64::from(a) * f64::from(b))).sum()
                };
                let error = (f64::from(logit) - dot(|x| x)).abs();
                assert!(error <= 1e-5 * dot(f64::abs), "{float:?}, {size}: {error}");
            }
        }
    }
}

#[test]
fn embeddings_and_histories_are_exact() {
    let Some(mut cuda) = open() else { return };
    for (float, width) in FLOATS.into_iter().flat_map(|float| [1, 4, 37, 300].map(|w| (float, w))) {
        let (vocabulary, context, lanes) = (13, 6, 4);
        let mut rng = Rng::of(&[35, width as u64]);
        let (table, values) = table(&mut rng, float, vocabulary, width);
        let table = cuda.load_table(table).unwrap();
        // A token, the last one, one beyond the table, padding, a lane's, a lane's without a token, a
        // lane that is not there; positions and sequences that are there and not.
        let tokens = vec![3, 12, 13, NONE, FROM_LANE | 2, FROM_LANE | 1, FROM_LANE | 9, 5, 6, 7];
        let batch = HostBatch {
            tokens: tokens.clone(),
            positions: vec![0, 5, 1, 1, 2, 3, 3, 6, 1, 4],
            sequences: vec![0, 1, 0, 0, 2, 0, 0, 0, 9, 3],
            lanes: vec![2, 0, 1, NONE],
            ..HostBatch::default()
        }
        .upload(&mut cuda);
        let mut on_device =
            upload_lanes(&mut cuda, &vec![77; lanes * context], context, &[1, NONE, 8, 2]);
        let mut output = upload(&mut cuda, &vec![77.0; (tokens.len() + 1) * width]);
        run_ops(&mut cuda, &mut |r| {
            r.embed(ops::Embed {
                rows: tokens.len(),
                batch: &batch,
                lanes: &mut on_device,
                table: &table,
                scale: 1.5,
                output: &mut output,
                width,
            })
        })
        .unwrap();
        let mut expected = Vec::new();
        for token in [3, 12, NONE, NONE, 8, NONE, NONE, 5, 6, 7] {
            match token {
                NONE => expected.extend(vec![0.0; width]),
                token => {
                    let row = &values[token as usize * width..][..width];
                    expected.extend(row.iter().map(|x| x * 1.5));
                }
            }
        }
        expected.extend(vec![77.0; width]);
        assert_eq!(bits(&download(&mut cuda, &output)), bits(&expected), "{float:?}, {width}");
        let mut history = vec![77; lanes * context];
        (history[2 * context], history[5], history[context + 2]) = (3, 12, 8);
        assert_eq!(download(&mut cuda, &on_device.history), history);
    }
}

#[test]
fn gathered_norms_are_those_of_their_rows() {
    let Some(mut cuda) = open() else { return };
    for width in [1, 4, 37, 300, 1000] {
        let input = Rng::of(&[36, width as u64]).normals(6 * width, 2.0);
        let gather = [9, 9, 5, NONE, 0, 6, 5];
        let gathered = crate::common::ops::rms_norm(
            &mut cuda,
            &input,
            width,
            Some(&gather),
            2,
            Epilogue::Store,
        );
        let plain =
            crate::common::ops::rms_norm(&mut cuda, &input, width, None, 0, Epilogue::Store);
        let normed = |row: usize| {
            let x = &input[row * width..][..width];
            let square: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            let inverse = 1.0 / (square / width as f64 + f64::from(EPS)).sqrt();
            let of =
                move |(&x, gain): (&f32, f32)| (f64::from(x) * inverse * f64::from(gain)) as f32;
            x.iter().zip(gain(width)).map(of).collect::<Vec<_>>()
        };
        let near = |found: &[f32], expected: &[f32]| {
            found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-6 * (1.0 + b.abs()))
        };
        for (r, source) in [5, NONE, 0, 6, 5].into_iter().enumerate() {
            let found = &gathered[r * width..][..width];
            match source {
                NONE | 6 => assert!(found.iter().all(|x| x.to_bits() == 0), "{width}"),
                source => assert!(near(found, &normed(source as usize)), "{width}"),
            }
        }
        assert!((0..5).all(|r| near(&plain[r * width..][..width], &normed(r))), "{width}");
        assert_eq!(bits(&gathered[..width]), bits(&gathered[4 * width..]));
        assert_eq!(bits(&gathered[2 * width..][..width]), bits(&plain[..width]));
    }
}

/// The int8 head is the product with weights rounded to int8, row by row, whatever the step: its
/// definition in f64, within what 15 bits of the input's row and f32 leave out.
#[test]
fn the_int8_head_is_the_product_with_rounded_weights() {
    let Some(mut cuda) = crate::common::cuda::open(CudaOptions::default().head(Head::Int8)) else {
        return;
    };
    for (float, width, vocabulary, rows) in FLOATS.into_iter().flat_map(|float| {
        [(37, 129, 8), (300, 70, 19), (1000, 9, 3), (1, 7, 2)].map(|(w, v, r)| (float, w, v, r))
    }) {
        let mut rng = Rng::of(&[37, width as u64, rows as u64]);
        let (table, values) = table(&mut rng, float, vocabulary, width);
        let (input, gather) = inputs(&mut rng, rows, width);
        let pass = Pass { width, vocabulary, input: &input, gather: &gather, first: 0, rows };
        let (normed, logits) = head(&mut cuda, &table, &pass);
        let what = format!("{float:?}, {rows} rows, {vocabulary} × {width}");
        for r in 0..rows {
            let x = &normed[r * width..][..width];
            let largest = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            for v in 0..vocabulary {
                let weights = &values[v * width..][..width];
                let most = weights.iter().fold(0f32, |most, w| most.max(w.abs()));
                let (mut sum, mut size) = (0.0, 0.0);
                for (&w, &x) in weights.iter().zip(x) {
                    // As the kernel divides, so that no tie goes the other way.
                    let q = (w * (127.0 / most)).round_ties_even();
                    let rounded = f64::from(q) * f64::from(most) / 127.0;
                    sum += rounded * f64::from(x);
                    size += rounded.abs();
                }
                let error = (f64::from(logits[r * vocabulary + v]) - sum).abs();
                let of_row = 0.51 * f64::from(largest) / 16256.0;
                let allowed = size * (of_row + 1e-6 * f64::from(largest));
                assert!(error <= allowed, "{what}: {error} > {allowed} at {r}, {v}");
            }
            let alone = head(&mut cuda, &table, &Pass { first: r, rows: 1, ..pass }).1;
            assert_eq!(bits(&alone), bits(&logits[r * vocabulary..][..vocabulary]), "{what}, {r}");
        }
    }
    // What is no number stays in its row, of the input or of the table.
    let (width, vocabulary, rows) = (70, 33, 12);
    for (float, bad) in FLOATS.into_iter().flat_map(|f| [f32::NAN, f32::INFINITY].map(|b| (f, b))) {
        let mut rng = Rng::of(&[38]);
        let (table, _) = table(&mut rng, float, vocabulary, width);
        let mut bytes = table.bytes.to_vec();
        let bad_weight = match float {
            FloatType::Bf16 => half::bf16::from_f32(bad).to_le_bytes().to_vec(),
            FloatType::F16 => half::f16::from_f32(bad).to_le_bytes().to_vec(),
            FloatType::F32 => bad.to_le_bytes().to_vec(),
        };
        bytes.splice((5 * width + 3) * float.size()..(5 * width + 4) * float.size(), bad_weight);
        let table = HostTable { bytes: SharedBytes::new(bytes), ..table };
        let mut input = rng.normals(rows * width, 1.0);
        input[9 * width + 69] = bad;
        let gather: Vec<u32> = (0..rows as u32).collect();
        let pass = Pass { width, vocabulary, input: &input, gather: &gather, first: 0, rows };
        let (_, logits) = head(&mut cuda, &table, &pass);
        for (i, logit) in logits.iter().enumerate() {
            let expected = i / vocabulary == 9 || i % vocabulary == 5;
            assert_eq!(!logit.is_finite(), expected, "{float:?}, {bad}, {i}: {logit}");
        }
    }
}
