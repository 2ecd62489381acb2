//! Tables and matrices that a device cannot bind whole: the same bits in many pieces as in one, on
//! every adapter, and a table that is larger than what Mesa's software driver binds.
#![cfg(feature = "wgpu")]

mod common;

use common::host::{HostBatch, HostQuantized, upload_lanes};
use common::model::host_table;
use common::ops::{EPS, gain, garbage, matmul};
use common::rng::Rng;
use common::run::{bits, download, run_ops, upload};
use common::wgpu::adapters;
use trine::backend::ops::{self, Epilogue};
use trine::backend::wgpu::{Gpu, GpuOptions, Table, Wgpu, WgpuOptions};
use trine::backend::{Backend, FROM_LANE, NONE, Record};
use trine::tensor::{FloatType, HostTable, SharedBytes};
use trine::ternary::{TernaryRows, TernaryTensor};

const FLOATS: [FloatType; 3] = [FloatType::Bf16, FloatType::F16, FloatType::F32];

/// Runs on every adapter: without a limit, and with each of `limits`.
fn with_limits<R: PartialEq + std::fmt::Debug>(limits: &[u64], run: impl Fn(&mut Wgpu) -> R) {
    for adapter in adapters() {
        let open = |options| {
            let gpu = Gpu::of(adapter.clone(), options).unwrap_or_else(|error| panic!("{error}"));
            Wgpu::new(&gpu, WgpuOptions::default())
        };
        let whole = run(&mut open(GpuOptions::default()));
        for &limit in limits {
            let pieces = run(&mut open(GpuOptions::default().binding_limit(limit)));
            let name = adapter.description();
            assert!(whole == pieces, "{name}: pieces of {limit} bytes give other bits");
        }
    }
}

/// The rows of `tokens`, and the history of three lanes after.
fn embed(wgpu: &mut Wgpu, table: &Table, width: usize, tokens: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let rows = tokens.len();
    let batch = HostBatch {
        tokens: tokens.to_vec(),
        positions: (0..rows as u32).collect(),
        sequences: (0..rows as u32).map(|row| row % 3).collect(),
        lanes: vec![2, 1, 0],
        ..HostBatch::default()
    };
    let batch = batch.upload(wgpu);
    let mut lanes = upload_lanes(wgpu, &vec![NONE; 3 * rows], rows, &[9, 6, NONE]);
    let mut output = upload(wgpu, &vec![f32::NAN; rows * width]);
    run_ops(wgpu, &mut |r| {
        let (batch, lanes, output) = (&batch, &mut lanes, &mut output);
        r.embed(ops::Embed { rows, batch, lanes, table, scale: 1.0, output, width })
    })
    .unwrap();
    (bits(&download(wgpu, &output)), download(wgpu, &lanes.history))
}

fn lm_head(
    wgpu: &mut Wgpu,
    table: &Table,
    input: &[f32],
    vocabulary: usize,
    rows: usize,
) -> Vec<f32> {
    let width = input.len() / rows;
    let logit_rows = (0..rows as u32).collect();
    let batch = HostBatch { logit_rows, ..HostBatch::default() }.upload(wgpu);
    let (input, gain) = (upload(wgpu, input), upload(wgpu, &gain(width)));
    let mut normed = upload(wgpu, &vec![f32::NAN; rows * width]);
    let mut logits = upload(wgpu, &vec![f32::NAN; rows * vocabulary]);
    run_ops(wgpu, &mut |r| {
        r.lm_head(ops::LmHead {
            rows,
            first: 0,
            width,
            vocabulary,
            batch: &batch,
            input: &input,
            norm: ops::Norm { gain: &gain, eps: EPS },
            table,
            normed: &mut normed,
            logits: &mut logits,
        })
    })
    .unwrap();
    download(wgpu, &logits)
}

#[test]
fn tables_in_pieces_give_the_same_bits() {
    let (vocabulary, width) = (300, 101);
    // A row alone, a few rows, and pieces that end within a workgroup's rows.
    with_limits(&[404, 3000, 16_000], |wgpu| {
        let mut results = Vec::new();
        for (i, float) in FLOATS.into_iter().enumerate() {
            let mut rng = Rng::of(&[1, i as u64]);
            let values = rng.normals(vocabulary * width, 1.0);
            let table = host_table(vocabulary, width, float, &values);
            let table = wgpu.load_table(table).expect("it loads");
            let mut tokens = rng.tokens(40, vocabulary);
            tokens.extend([0, 299, 300, NONE, FROM_LANE, FROM_LANE | 1, FROM_LANE | 2, 1, 2]);
            results.push(embed(wgpu, &table, width, &tokens));
            for rows in [1, 5] {
                let input = rng.normals(rows * width, 1.0);
                let logits = lm_head(wgpu, &table, &input, vocabulary, rows);
                assert!(logits.iter().all(|logit| logit.is_finite()), "every logit is written");
                results.push((bits(&logits), Vec::new()));
            }
        }
        results
    });
}

#[test]
fn a_limit_makes_pieces() {
    for adapter in adapters() {
        let options = GpuOptions::default().binding_limit(10_000);
        let gpu = Gpu::of(adapter, options).expect("opens");
        let wgpu = Wgpu::new(&gpu, WgpuOptions::default());
        // 9 rows of 1024 bytes go into a piece.
        let table = host_table(100, 256, FloatType::F32, &vec![0.5; 100 * 256]);
        assert_eq!(wgpu.load_table(table).expect("it loads").pieces(), 12);
        // Two tiles of 16 rows, of 256 columns in 64 bytes each: 2048; four of them.
        let weights = TernaryTensor::from_weights(300, 200, 1.0, &[1; 300 * 200]).unwrap();
        assert_eq!(wgpu.pack_ternary(&[&weights]).expect("it loads").pieces(), 3);
    }
}

#[test]
fn matrices_in_pieces_give_the_same_bits() {
    let width = 640;
    // Two tiles of 16 rows, of 768 columns at four a byte; and three times as much.
    with_limits(&[6144, 3 * 6144], |wgpu| {
        let mut rng = Rng::new(2);
        let parts: Vec<TernaryTensor> = [(150, 0.37), (7, 1.9), (150, 0.011)]
            .map(|(n, scale)| {
                TernaryTensor::from_weights(n, width, scale, &rng.ternary(n * width)).unwrap()
            })
            .into();
        let parts: Vec<&TernaryTensor> = parts.iter().collect();
        let mut results = Vec::new();
        for rows in [1, 3, 40] {
            let values = rng.normals(rows * width, 1.0);
            let input = HostQuantized::of(&values, width);
            results.push(bits(&matmul(wgpu, &input, &parts, None)));
            let into = rng.normals(rows * (307 + common::ops::COLUMN + 1), 1.0);
            results.push(bits(&matmul(wgpu, &input, &parts, Some(&into))));
            results.push(bits(&fused(wgpu, &values, width, &parts)));
        }
        results
    });
}

/// A norm and the product that reads it, which become one dispatch where the rows are few.
fn fused(wgpu: &mut Wgpu, input: &[f32], width: usize, parts: &[&TernaryTensor]) -> Vec<f32> {
    let rows = input.len() / width;
    let features = parts.iter().map(|part| part.rows()).sum();
    let parts: Vec<&dyn TernaryRows> = parts.iter().map(|&part| part as _).collect();
    let weight = wgpu.pack_ternary(&parts).unwrap();
    let (input, gain) = (upload(wgpu, input), upload(wgpu, &gain(width)));
    let mut quantized = garbage(rows, width).upload(wgpu);
    let mut output = upload(wgpu, &vec![f32::NAN; rows * features]);
    run_ops(wgpu, &mut |r| {
        r.rms_norm_quantize(ops::RmsNormQuantize {
            rows,
            width,
            input: &input,
            norm: Some(ops::Norm { gain: &gain, eps: EPS }),
            quantized: &mut quantized,
            normed: None,
        })?;
        r.ternary_matmul(ops::TernaryMatmul {
            rows,
            width,
            features,
            input: &quantized,
            weight: &weight,
            output: &mut output,
            stride: features,
            column: 0,
            epilogue: Epilogue::Store,
        })
    })
    .unwrap();
    download(wgpu, &output)
}

/// The head of a real model does not fit into 128 MiB, which is all that some drivers bind.
#[test]
fn a_table_of_143_megabytes_is_right() {
    let (rows, cols) = (70_000usize, 1024usize);
    // From 1 up to 2, and different in every row: bf16 has 7 bits behind the point.
    let value = |row: usize, col: usize| 0x3f80 + ((row * 31 + col * 7 + row / 128) % 128) as u16;
    let mut bytes = Vec::with_capacity(2 * rows * cols);
    for row in 0..rows {
        for col in 0..cols {
            bytes.extend_from_slice(&value(row, col).to_le_bytes());
        }
    }
    let bytes = SharedBytes::new(bytes);
    let decoded = |row, col| f32::from_bits(u32::from(value(row, col)) << 16);
    for adapter in adapters() {
        let name = adapter.description();
        let gpu = Gpu::of(adapter, GpuOptions::default()).expect("opens");
        let mut wgpu = Wgpu::new(&gpu, WgpuOptions::default());
        let table = HostTable { rows, cols, float: FloatType::Bf16, bytes: bytes.clone() };
        let table = wgpu.load_table(table).expect("it loads");
        let most = gpu.limits().max_storage_buffer_binding_size.min(gpu.limits().max_buffer_size);
        let per_piece = (most / (2 * cols as u64)) as usize;
        assert_eq!(table.pieces(), rows.div_ceil(per_piece), "{name}");

        // Both sides of where the pieces meet.
        let cut = per_piece.min(rows - 1);
        let tokens = [0, 1, cut - 1, cut, (cut + 1).min(rows - 1), 12_345, rows - 1];
        let ids = tokens.map(|token| token as u32);
        let (found, _) = embed(&mut wgpu, &table, cols, &ids);
        let expected: Vec<f32> =
            tokens.iter().flat_map(|&row| (0..cols).map(move |col| decoded(row, col))).collect();
        assert!(found == bits(&expected), "{name}: other rows than the table's");

        let input = Rng::new(3).normals(cols, 1.0);
        let logits = lm_head(&mut wgpu, &table, &input, rows, 1);
        let gain = gain(cols);
        let mean = input.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / cols as f64;
        let inverse = 1.0 / (mean + f64::from(EPS)).sqrt();
        for token in tokens {
            let (mut sum, mut magnitude) = (0.0, 0.0);
            for col in 0..cols {
                let x = f64::from(input[col]) * inverse * f64::from(gain[col]);
                let product = x * f64::from(decoded(token, col));
                (sum, magnitude) = (sum + product, magnitude + product.abs());
            }
            let error = (f64::from(logits[token]) - sum).abs();
            assert!(error <= 1e-5 * magnitude, "{name}: token {token}: {} {sum}", logits[token]);
        }
        assert!(logits.iter().all(|logit| logit.is_finite()), "{name}: every logit is written");
    }
}
