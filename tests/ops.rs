//! Every op on every backend of this machine, on shapes that no kernel likes, against the
//! reference: equality where the contract is exact, else the tolerances of `backend::check`.

mod common;

use common::attention::{Attention, kv_types};
use common::host::{HostBatch, HostQuantized, upload_lanes, upload_samples};
use common::model::host_table;
use common::ops::{
    COLUMN, EPS, LowRank, gain, gate_norm_quantize, low_rank, matmul, ones, rms_norm,
    rms_norm_quantize,
};
use common::rng::Rng;
use common::run::{bits, download, run_ops, upload};
use trine::backend::check::Checked;
use trine::backend::ops::{self, Activation, Epilogue, Heads, SampleRow};
use trine::backend::reference::{Reference, ReferenceMatrix, cached_head};
use trine::backend::{Backend, FROM_LANE, KvType, MAX_LOGPROBS, NONE, Record, quantized_stride};
use trine::tensor::FloatType;
use trine::ternary::{TernaryRows, TernaryTensor};

const WIDTHS: [usize; 15] = [1, 2, 3, 31, 32, 33, 63, 64, 65, 100, 255, 256, 257, 640, 2560];
const ROWS: [usize; 6] = [1, 2, 3, 5, 8, 17];
const FEATURES: [usize; 5] = [1, 3, 4, 5, 61];

/// Rows whose magnitudes differ by row: a row's tolerance is its own.
fn rows_of(rng: &mut Rng, rows: usize, width: usize) -> Vec<f32> {
    (0..rows).flat_map(|t| rng.normals(width, [1.0, 30.0, 1e-3][t % 3])).collect()
}

common::backend_tests! {
    fn rms_norm_quantize_agrees<B>(open) {
        let mut backend = Checked::new(open());
        for (width, rows) in WIDTHS.into_iter().flat_map(|w| ROWS.map(|r| (w, r))) {
            let mut rng = Rng::of(&[1, width as u64, rows as u64]);
            let input = rows_of(&mut rng, rows, width);
            for (with_norm, with_rows) in [(true, false), (false, true), (true, true)] {
                rms_norm_quantize(&mut backend, &input, width, with_norm, with_rows);
            }
        }
    }

    fn quantizing_rounds_half_to_even_and_has_a_floor<B>(open) {
        let mut backend = open();
        let width = 8;
        // The largest value is 127, so the scale is 1 and the halves are ties.
        let ties = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5];
        let zeros = [0.0; 8];
        let floor = [1e-6, -1e-6, 5e-7, 0.0, 0.0, 0.0, 0.0, 0.0];
        let negative = [-3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let input = [ties, zeros, floor, negative].concat();
        let found = rms_norm_quantize(&mut backend, &input, width, false, false);
        let row = |t: usize| &found.values[t * quantized_stride(width)..][..width];
        assert_eq!(row(0), [127, 0, 2, 2, 0, -2, -2, 126]);
        assert_eq!(row(1), [0; 8]);
        assert_eq!(row(2), [13, -13, 6, 0, 0, 0, 0, 0], "the scale is 127 / 1e-5");
        assert_eq!(row(3), [-127, 42, 0, 0, 0, 0, 0, 0]);
        assert_eq!(found.sums, [253, 0, 6, -85]);
        assert_eq!(found.scales[..3], [1.0, 127.0 / 1e-5, 127.0 / 1e-5]);
        for (t, values) in found.values.chunks(quantized_stride(width)).enumerate() {
            assert!(values[width..].iter().all(|&q| q == 0), "row {t} is zero beyond its width");
        }
    }

    fn a_value_that_is_not_finite_spoils_its_row_and_no_other<B>(open) {
        let mut backend = open();
        for width in [1, 33, 300] {
            for (i, wrong) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
                let mut input = Rng::new(7).normals(3 * width, 1.0);
                let clean = rms_norm_quantize(&mut backend, &input, width, false, false);
                input[width + (i * 17) % width] = wrong;
                for with_norm in [false, true] {
                    let found = rms_norm_quantize(&mut backend, &input, width, with_norm, false);
                    assert!(found.scales[1].is_nan(), "{wrong}, norm {with_norm}: {found:?}");
                    assert!(found.scales[0].is_finite() && found.scales[2].is_finite());
                    if !with_norm {
                        assert_eq!(found.scales[0], clean.scales[0]);
                        assert_eq!(found.values[..width], clean.values[..width]);
                    }
                    let product = matmul(&mut backend, &found, &[&ones(2, width)], None);
                    let nan: Vec<bool> = product.iter().map(|y| y.is_nan()).collect();
                    assert_eq!(nan, [false, false, true, true, false, false]);
                }
            }
        }
    }

    fn rms_norm_agrees<B>(open) {
        let mut backend = Checked::new(open());
        for width in WIDTHS {
            let mut rng = Rng::of(&[2, width as u64]);
            // Tiny rows, of which eps is most; rows whose squares only just stay within f32.
            let magnitudes = [1e-20, 1e-3, 1.0, 1e4, 1e15];
            let input: Vec<f32> = magnitudes.iter().flat_map(|&m| rng.normals(width, m)).collect();
            let gathers: [Option<&[u32]>; 3] =
                [None, Some(&[4, 0, NONE, 2, 2]), Some(&[9, 9, 3, NONE, 1, 0, 4])];
            for (gather, first) in gathers.into_iter().zip([0, 0, 2]) {
                for epilogue in [Epilogue::Store, Epilogue::Add] {
                    let found = rms_norm(&mut backend, &input, width, gather, first, epilogue);
                    assert_eq!(found.len(), 5 * width);
                }
            }
        }
    }

    fn ternary_matmul_is_exact<B>(open) {
        let mut backend = open();
        for (width, features) in WIDTHS.into_iter().flat_map(|w| FEATURES.map(|n| (w, n))) {
            let mut rng = Rng::of(&[3, width as u64, features as u64]);
            // Parts of different scales, like query, key and value.
            let parts: Vec<TernaryTensor> = [(features, 0.37), (1, 1.9), (features, 0.011)]
                .map(|(n, scale)| {
                    TernaryTensor::from_weights(n, width, scale, &rng.ternary(n * width)).unwrap()
                })
                .into();
            let parts: Vec<&TernaryTensor> = parts.iter().collect();
            for rows in ROWS {
                let input = HostQuantized::of(&rows_of(&mut rng, rows, width), width);
                check_matmul(&mut backend, &input, &parts, None);
                check_matmul(&mut backend, &input, &parts[..1], Some(rng.bits()));
            }
        }
    }

    fn the_largest_sums_are_exact<B>(open) {
        let mut backend = open();
        for width in [255, 4096, 20_000] {
            let minus = TernaryTensor::from_weights(1, width, 1.0, &vec![-1; width]).unwrap();
            let plus = ones(1, width);
            for q in [127i8, -128] {
                let rows = 5;
                let stride = quantized_stride(width);
                let mut values = vec![0; rows * stride];
                values.chunks_mut(stride).for_each(|row| row[..width].fill(q));
                let sums = vec![i32::from(q) * width as i32; rows];
                let input = HostQuantized { values, scales: vec![1.0; rows], sums };
                for rows in [1, rows] {
                    let some = HostQuantized {
                        values: input.values[..rows * stride].to_vec(),
                        scales: input.scales[..rows].to_vec(),
                        sums: input.sums[..rows].to_vec(),
                    };
                    let found = matmul(&mut backend, &some, &[&plus, &minus], None);
                    let sum = f32::from(q) * width as f32; // below 2^24, so exact
                    assert_eq!(found, [sum, -sum].repeat(rows), "width {width}, q {q}");
                }
            }
        }
    }

    fn low_rank_agrees<B>(open) {
        let mut backend = Checked::new(open());
        let shapes = [(1, 1, 1), (33, 3, 5), (64, 4, 64), (100, 5, 257), (257, 8, 63), (2560, 33, 130)];
        for (width, rank, features) in shapes {
            for rows in ROWS {
                let mut rng = Rng::of(&[9, width as u64, rank as u64, rows as u64]);
                let input = rows_of(&mut rng, rows, width);
                let (down, up) = (rng.normals(rank * width, 1.0), rng.normals(rank * features, 0.1));
                let into = rows_of(&mut rng, rows, features + COLUMN + 1);
                let test = LowRank { input: &input, down: &down, up: &up, rank, into: &into };
                let (_, found) = low_rank(&mut backend, &test);
                let before = into.chunks(features + COLUMN + 1);
                for (found, before) in found.chunks(features + COLUMN + 1).zip(before) {
                    assert_eq!(found[..COLUMN], before[..COLUMN]);
                    assert_eq!(found[COLUMN + features..], before[COLUMN + features..]);
                }
            }
        }
    }

    /// The second product has one order of its sum, so that all devices give its bits.
    fn low_rank_adds_in_order<B>(open) {
        let mut backend = open();
        let (rank, features, rows) = (7, 70, 5);
        let mut rng = Rng::new(11);
        // The identity, so that what is between the two products is the input.
        let down: Vec<f32> =
            (0..rank * rank).map(|i| f32::from(u8::from(i % (rank + 1) == 0))).collect();
        let (input, up) = (rng.normals(rows * rank, 1.0), rng.normals(rank * features, 0.1));
        let into = rng.normals(rows * (features + COLUMN + 1), 1.0);
        let test = LowRank { input: &input, down: &down, up: &up, rank, into: &into };
        let (inner, found) = low_rank(&mut backend, &test);
        assert_eq!(inner, input);
        for (t, n) in (0..rows).flat_map(|t| (0..features).map(move |n| (t, n))) {
            let sum = (0..rank).fold(0f32, |sum, j| {
                up[j * features + n].mul_add(input[t * rank + j], sum)
            });
            let at = t * (features + COLUMN + 1) + COLUMN + n;
            let (expected, found) = (into[at] + sum, found[at]);
            // WGSL lets a driver round the product and the sum of `fma` each, and the reference
            // sums in f64.
            let close = (expected - found).abs() <= 1e-6 * (1.0 + expected.abs());
            let kind = backend.info().name.split(':').next();
            let exact = expected == found || !matches!(kind, Some("cpu" | "cuda"));
            assert!(close && exact, "row {t}, feature {n}: {expected} and {found}");
        }
    }

    fn a_row_of_low_rank_does_not_depend_on_others<B>(open) {
        let mut backend = open();
        let (width, rank, features, rows) = (300, 6, 70, 9);
        let mut rng = Rng::new(12);
        let (down, up) = (rng.normals(rank * width, 1.0), rng.normals(rank * features, 1.0));
        let stride = features + COLUMN + 1;
        let (input, into) = (rng.normals(rows * width, 1.0), rng.normals(rows * stride, 1.0));
        let test = LowRank { input: &input, down: &down, up: &up, rank, into: &into };
        let (_, together) = low_rank(&mut backend, &test);
        for t in 0..rows {
            let (input, into) = (&input[t * width..][..width], &into[t * stride..][..stride]);
            let (_, alone) = low_rank(&mut backend, &LowRank { input, into, ..test });
            assert_eq!(bits(&alone), bits(&together[t * stride..][..stride]), "row {t}");
        }
    }

    fn rope_and_attention_agree<B>(open) {
        let mut backend = Checked::new(open());
        for &kv_type in kv_types::<B>() {
            for (query, kv, dim) in [(1, 1, 2), (4, 2, 6), (5, 1, 20), (3, 3, 64), (2, 1, 128)] {
                let heads = Heads { query, kv, dim };
                for head_norms in [false, true] {
                    Attention::new(heads, kv_type, head_norms, &[1, 3, 31, 32, 33, 64, 65])
                        .run(&mut backend, 2);
                }
            }
            // Past two blocks of keys, and exactly at their ends.
            let heads = Heads { query: 4, kv: 2, dim: 10 };
            Attention::new(heads, kv_type, false, &[255, 256, 257, 512, 600]).run(&mut backend, 3);
        }
    }

    fn attention_in_windows_agrees<B>(open) {
        let mut backend = Checked::new(open());
        for (i, &kv_type) in kv_types::<B>().iter().enumerate() {
            let shapes = [(4, 2, 6), (3, 3, 64), (2, 1, 128)];
            for (j, (query, kv, dim)) in shapes.into_iter().enumerate() {
                let heads = Heads { query, kv, dim };
                let windows: [&[usize]; 3] = [&[1, 32], &[2, 33, 70], &[31, 60]];
                for &window in windows[(i + j) % 3] {
                    Attention::new(heads, kv_type, false, &[3, 33, 65])
                        .windowed(window)
                        .run(&mut backend, 12);
                }
            }
            let heads = Heads { query: 4, kv: 2, dim: 16 };
            for window in [40, [1, 255, 257][i % 3], 300] {
                Attention::new(heads, kv_type, false, &[257, 600])
                    .windowed(window)
                    .run(&mut backend, 2);
            }
        }
    }

    /// With one key the softmax is 1, so the answer is the value as the cache holds it.
    fn a_query_with_one_key_answers_its_value<B>(open) {
        let mut backend = open();
        for &kv_type in kv_types::<B>() {
            let heads = Heads { query: 4, kv: 2, dim: 6 };
            let test = Attention::new(heads, kv_type, false, &[1]);
            let values = &test.qkv[heads.output_width() + heads.kv * heads.dim..];
            let expected: Vec<f32> =
                (0..4).flat_map(|head| cached_head(&values[head / 2 * 6..][..6], kv_type)).collect();
            assert_eq!(test.run(&mut backend, 1), expected, "{kv_type:?}");
            // One key of many: the query's own.
            let test = Attention::new(heads, kv_type, false, &[75]).windowed(1);
            let width = heads.qkv_width();
            for (row, found) in test.qkv[5 * width..].chunks(width).zip(
                test.run(&mut backend, 70).chunks(heads.output_width())
            ) {
                let values = &row[heads.output_width() + heads.kv * heads.dim..];
                let expected: Vec<f32> = (0..4)
                    .flat_map(|head| cached_head(&values[head / 2 * 6..][..6], kv_type))
                    .collect();
                assert_eq!(found, expected, "{kv_type:?}");
            }
        }
    }

    /// Where the rotation changes nothing, a device stores the very integers that the reference
    /// does, so that the tolerance need not allow for one that was rounded the other way.
    fn an_int8_cache_holds_the_same_integers<B>(open) {
        if !kv_types::<B>().contains(&KvType::Int8) {
            return;
        }
        let mut backend = open();
        for (query, kv, dim) in [(1, 1, 2), (4, 2, 6), (5, 1, 20), (3, 3, 64), (2, 1, 176)] {
            let heads = Heads { query, kv, dim };
            let lens = [1, 31, 33, 64, 300];
            let mut test = Attention::new(heads, KvType::Int8, false, &lens).unrotated();
            let width = heads.qkv_width();
            for (t, row) in test.qkv.chunks_mut(width).enumerate() {
                // Scales from those of zeros and of less than the floor to large ones.
                let factor = [1.0, 1e-3, 40.0, 0.0, 1e-35, 1e-12][t % 6];
                row[(query + kv) * dim..].iter_mut().for_each(|x| *x *= factor);
                if t % 4 == 1 {
                    row[query * dim..][..dim].iter_mut().for_each(|x| *x *= 1e-4);
                }
            }
            let expected = test.run(&mut Reference::new(), 3);
            let found = test.run(&mut backend, 3);
            for (row, (expected, found)) in
                expected.chunks(dim).zip(found.chunks(dim)).enumerate()
            {
                let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
                for (e, f) in expected.iter().zip(found) {
                    let most = 1e-5 * largest + f32::MIN_POSITIVE;
                    assert!((e - f).abs() <= most, "{heads:?}: {f} and not {e} in row {row}");
                }
            }
        }
    }

    fn gate_norm_quantize_agrees<B>(open) {
        let mut backend = Checked::new(open());
        for activation in [Activation::Relu2, Activation::Silu, Activation::GeluTanh] {
            for width in WIDTHS {
                let mut rng = Rng::of(&[4, width as u64]);
                // ReLU² of 300 is beyond f16, and exp of 100 beyond f32.
                let magnitudes = [0.01, 1.0, 10.0, 300.0, 1e5];
                let input: Vec<f32> = magnitudes
                    .iter()
                    .flat_map(|&m| [rng.normals(width, m), rng.normals(width, 2.0)].concat())
                    .collect();
                for with_norm in [false, true] {
                    gate_norm_quantize(&mut backend, &input, width, activation, with_norm);
                }
            }
        }
    }

    fn activations_have_their_known_values<B>(open) {
        let mut backend = open();
        let width = 4;
        let gate_up = [-3.0f32, 0.0, 300.0, 100.0, 1.0, 1.0, 2.0, -1.0];
        let mut rows = |activation| {
            gate_norm_quantize(&mut backend, &gate_up, width, activation, false).1
        };
        assert_eq!(rows(Activation::Relu2), [0.0, 0.0, 180_000.0, -10_000.0]);
        // transformers' `silu` and `gelu_pytorch_tanh` of −3.
        for (activation, expected) in
            [(Activation::Silu, -0.142_277_62), (Activation::GeluTanh, -0.003_637_392)]
        {
            let found = rows(activation);
            assert!((found[0] - expected).abs() < 1e-6, "{found:?}");
            assert_eq!(found[1..], [0.0, 600.0, -100.0]);
        }
    }

    fn embed_agrees<B>(open) {
        let mut backend = Checked::new(open());
        for (width, float) in [1, 33, 100, 256, 257].into_iter().flat_map(|width| {
            [FloatType::Bf16, FloatType::F16, FloatType::F32].map(move |float| (width, float))
        }) {
            let vocabulary = 7;
            let values = Rng::new(5).normals(vocabulary * width, 1.0);
            let table = host_table(vocabulary, width, float, &values);
            let mut row = vec![0.0; width];
            table.read_row(6, &mut row);
            let table = backend.load_table(table).unwrap();
            let batch = HostBatch {
                // Lane 1 sampled token 6; lane 2 sampled nothing; 7 is beyond the table.
                tokens: vec![3, FROM_LANE | 1, NONE, FROM_LANE | 2, 0, 7],
                positions: vec![0, 4, 0, 2, 1, 3],
                sequences: vec![0, 1, 0, 2, 0, 0],
                lanes: vec![2, 1, 0],
                ..HostBatch::default()
            };
            let batch = batch.upload(&mut backend);
            let mut lanes = upload_lanes(&mut backend, &[50; 15], 5, &[9, 6, NONE]);
            let mut output = upload(&mut backend, &vec![f32::NAN; 6 * width]);
            run_ops(&mut backend, &mut |r| {
                r.embed(ops::Embed {
                    rows: 6,
                    batch: &batch,
                    lanes: &mut lanes,
                    table: &table,
                    scale: 1.5,
                    output: &mut output,
                    width,
                })
            })
            .unwrap();
            let history = download(&mut backend, &lanes.history);
            assert_eq!(history, [[50; 5], [50, 50, 50, 50, 6], [3, 0, 50, 50, 50]].concat());
            let output = download(&mut backend, &output);
            let sampled: Vec<f32> = row.iter().map(|x| x * 1.5).collect();
            assert_eq!(output[width..2 * width], sampled);
            assert!(output[2 * width..4 * width].iter().all(|&x| x == 0.0));
        }
    }

    fn lm_head_agrees<B>(open) {
        let mut backend = Checked::new(open());
        for width in [1, 2, 33, 100, 256, 257, 640] {
            for float in [FloatType::Bf16, FloatType::F16, FloatType::F32] {
                for (vocabulary, rows) in [(1, 1), (5, 2), (61, 3), (257, 5), (130, 17)] {
                    lm_head(&mut backend, width, float, vocabulary, rows);
                }
            }
        }
    }

    fn score_agrees<B>(open) {
        let mut backend = Checked::new(open());
        for vocabulary in [1, 7, 257, 5000] {
            let mut rng = Rng::of(&[6, vocabulary as u64]);
            let (rows, first) = (5, 2);
            let mut logits = rng.normals(rows * vocabulary, 4.0);
            logits[3 * vocabulary..4 * vocabulary].fill(1e4); // all equal, and large
            logits[4 * vocabulary] = f32::NAN;
            let mut targets = rng.tokens(first + rows, vocabulary);
            targets[first + 1] = NONE;
            let batch = HostBatch { targets, ..HostBatch::default() }.upload(&mut backend);
            let logits = upload(&mut backend, &logits);
            let mut samples = upload_samples(&mut backend, first + rows);
            run_ops(&mut backend, &mut |r| {
                let (batch, logits, samples) = (&batch, &logits, &mut samples);
                r.score(ops::Score { rows, first, vocabulary, batch, logits, samples })
            })
            .unwrap();
            let found = download(&mut backend, &samples.logprobs);
            assert_eq!(found[..first], [77.0; 2], "rows of another pass");
            assert_eq!(found[first + 1], 0.0, "no target");
            assert!((found[first + 3] + (vocabulary as f32).ln()).abs() < 1e-3);
            assert!(found[first + 4].is_nan());
        }
    }

    fn sample_agrees<B>(open) {
        let mut backend = Checked::new(open());
        for vocabulary in [1, 7, 64, 257, 5000] {
            for round in 0..12 {
                sample(&mut backend, vocabulary, round);
            }
        }
    }
}

/// Compares a product with the reference's, bit for bit: stored, or with a seed added to columns
/// in the middle of rows that hold something.
fn check_matmul<B: Backend>(
    backend: &mut B,
    input: &HostQuantized,
    parts: &[&TernaryTensor],
    add: Option<u64>,
) {
    let width = parts[0].cols();
    let refs: Vec<&dyn TernaryRows> = parts.iter().map(|&part| part as _).collect();
    let reference = ReferenceMatrix::new(&refs).unwrap();
    let features: usize = parts.iter().map(|part| part.rows()).sum();
    let rows = input.scales.len();
    let row = |t: usize| &input.values[t * quantized_stride(width)..][..width];
    let product = |t: usize, n: usize| reference.dot(n, row(t), input.scales[t]);
    let (into, expected) = match add {
        None => {
            let store = (0..rows).flat_map(|t| (0..features).map(move |n| (t, n)));
            (None, store.map(|(t, n)| product(t, n)).collect::<Vec<f32>>())
        }
        Some(seed) => {
            let stride = features + COLUMN + 1;
            let into = Rng::new(seed).normals(rows * stride, 3.0);
            let mut sum = into.clone();
            for (t, row) in sum.chunks_mut(stride).enumerate() {
                for n in 0..features {
                    row[COLUMN + n] += product(t, n);
                }
            }
            (Some(into), sum)
        }
    };
    let found = matmul(backend, input, parts, into.as_deref());
    if backend.info().name.starts_with("wgpu") {
        // WGSL's division may be off by 2.5 units in the last place, and a sum may be rounded once
        // less; 5e-7 still tells neighbouring integers below 2²⁰ apart.
        let close = |e: f32, f: f32| (e - f).abs() <= 5e-7 * e.abs().max(1.0);
        let off = expected.iter().zip(&found).position(|(&e, &f)| e != f && !close(e, f));
        assert_eq!(off, None, "{rows} rows of {width}, {features} features, add {add:?}");
        return;
    }
    let (expected, found) = (bits(&expected), bits(&found));
    assert!(expected == found, "{rows} rows of {width}, {features} features, add {add:?}");
}

fn lm_head<B: Backend>(
    backend: &mut B,
    width: usize,
    float: FloatType,
    vocabulary: usize,
    rows: usize,
) {
    let mut rng = Rng::of(&[8, width as u64, vocabulary as u64]);
    let (first, tokens) = (3, rows + 2);
    let input = upload(backend, &rows_of(&mut rng, tokens, width));
    let table = host_table(vocabulary, width, float, &rng.normals(vocabulary * width, 1.0));
    let table = backend.load_table(table).unwrap();
    let mut logit_rows: Vec<u32> = rng.tokens(first + rows, tokens);
    logit_rows[first + rows / 2] = NONE;
    let batch = HostBatch { logit_rows, ..HostBatch::default() }.upload(backend);
    let gain = upload(backend, &gain(width));
    let mut normed = upload(backend, &vec![f32::NAN; rows * width]);
    let mut logits = upload(backend, &vec![f32::NAN; rows * vocabulary]);
    run_ops(backend, &mut |r| {
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
    .unwrap_or_else(|error| panic!("{rows} rows, {vocabulary} × {width} {float:?}: {error}"));
    let logits = download(backend, &logits);
    let padding = &logits[rows / 2 * vocabulary..][..vocabulary];
    assert!(padding.iter().all(|&x| x == 0.0));
    assert!(logits.iter().all(|x| x.is_finite()));
}

/// A pass of rows with all sorts of options over four lanes, rows of another pass before it.
fn sample<B: Backend>(backend: &mut B, vocabulary: usize, round: u64) {
    let mut rng = Rng::of(&[9, vocabulary as u64, round]);
    let (rows, first, context) = (6, 2, 16);
    let mut logits = rng.normals(rows * vocabulary, 3.0);
    logits.iter_mut().step_by(3).for_each(|x| *x = x.round()); // ties
    let broken = 4 * vocabulary;
    logits[broken + vocabulary / 2] =
        if round.is_multiple_of(2) { f32::NAN } else { f32::INFINITY };
    let greedy = round == 0;
    let mut batch = HostBatch::default();
    let options = |rng: &mut Rng, lane: u32, biases: &mut (Vec<u32>, Vec<f32>)| {
        let bias_start = biases.0.len() as u32;
        let bias_count = rng.below(3) as u32;
        for _ in 0..bias_count {
            biases.0.push(rng.below(vocabulary) as u32);
            biases.1.push(rng.range(-5.0, 5.0));
        }
        let length = 1 + rng.below(context - 1) as u32;
        SampleRow {
            lane,
            length,
            prompt: rng.below(length as usize + 1) as u32,
            bias_start,
            bias_count,
            temperature: [0.0, 0.5, 1.0, 2.0][rng.below(4)],
            top_k: [0, 1, 5, 40][rng.below(4)],
            top_p: [1.0, 0.3, 0.9][rng.below(3)],
            min_p: [0.0, 0.05, 0.5][rng.below(3)],
            repetition_penalty: [1.0, 1.3, 0.8][rng.below(3)],
            frequency_penalty: [0.0, 0.5, -0.5][rng.below(3)],
            presence_penalty: [0.0, 1.0, -1.0][rng.below(3)],
            seed_low: rng.bits() as u32,
            seed_high: rng.bits() as u32,
            choice: rng.below(3) as u32,
            logprobs: rng.below(MAX_LOGPROBS.min(vocabulary) + 1) as u32,
        }
    };
    let mut biases = (Vec::new(), Vec::new());
    for r in 0..first + rows {
        let row = options(&mut rng, [0, 1, 0, 1, 2, 3, 4, 5][r], &mut biases);
        batch.sample_rows.push(row);
    }
    batch.sample_rows[first + 5].lane = NONE; // padding
    (batch.bias_tokens, batch.bias_values) = biases;
    let history = rng.tokens(6 * context, vocabulary);
    let mut lanes = upload_lanes(backend, &history, context, &[88; 6]);
    let batch = batch.upload(backend);
    let logits = upload(backend, &logits);
    let mut samples = upload_samples(backend, first + rows);
    run_ops(backend, &mut |r| {
        r.sample(ops::Sample {
            rows,
            first,
            vocabulary,
            greedy,
            logprobs: round % 3 == 1,
            batch: &batch,
            lanes: &mut lanes,
            logits: &logits,
            samples: &mut samples,
        })
    })
    .unwrap_or_else(|error| panic!("vocabulary {vocabulary}, round {round}: {error}"));
    let tokens = download(backend, &samples.tokens);
    assert_eq!(tokens[..first], [77; 2], "rows of another pass");
    assert!(tokens[first..first + 4].iter().all(|&token| (token as usize) < vocabulary));
    assert_eq!(tokens[first + 4..], [NONE; 2], "a row that is not finite, and padding");
    assert_eq!(download(backend, &lanes.sampled)[..4], tokens[first..first + 4]);
}
