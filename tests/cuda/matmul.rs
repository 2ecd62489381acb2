//! The ternary product on CUDA is exact in every form, and fused ops give the bits of the ops that
//! they are made of.

use crate::common::cuda::open;
use crate::common::host::HostQuantized;
use crate::common::ops::{COLUMN, EPS, gain, gate_norm_quantize, matmul};
use crate::common::rng::Rng;
use crate::common::run::{bits, download, run_ops, upload};
use trine::backend::cpu::{Cpu, CpuOptions};
use trine::backend::cuda::{CudaOptions, MatmulForm};
use trine::backend::ops::{self, Activation, Epilogue, allocate_quantized};
use trine::backend::{Backend, Record, quantized_stride};
use trine::ternary::{TernaryRows, TernaryTensor};

const ROWS: [usize; 13] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 65, 130];
const WIDTHS: [usize; 6] = [1, 4, 37, 256, 300, 1000];
const FEATURES: [usize; 6] = [1, 7, 8, 9, 17, 130];

/// Every form, in every size that is compiled, and the choice by rows.
fn forms() -> Vec<Option<MatmulForm>> {
    let few = [1, 2, 3, 16].map(|pairs| MatmulForm::Few { pairs });
    let some = [1, 2, 4].map(|pairs| MatmulForm::Some { pairs });
    let many = [8, 16].map(|pairs| MatmulForm::Many { pairs });
    let all = few.into_iter().chain(some).chain(many);
    std::iter::once(None).chain(all.map(Some)).collect()
}

fn with(form: Option<MatmulForm>) -> CudaOptions {
    form.map_or(CudaOptions::default(), |form| CudaOptions::default().matmul(form))
}

/// Rows of any int8, whatever the norm would make of them.
fn rows_of(rng: &mut Rng, rows: usize, width: usize) -> HostQuantized {
    let stride = quantized_stride(width);
    let mut values = vec![0; rows * stride];
    for row in values.chunks_mut(stride) {
        row[..width].fill_with(|| rng.bits() as i8);
    }
    let sum = |row: &[i8]| row.iter().map(|&q| i32::from(q)).sum();
    let sums = values.chunks(stride).map(sum).collect();
    let scales = (0..rows).map(|r| if r == 3 { f32::NAN } else { 3.0 + r as f32 }).collect();
    HostQuantized { values, scales, sums }
}

/// What a product gives by its formula, row by row.
fn expected(
    input: &HostQuantized,
    parts: &[(f32, Vec<i8>)],
    width: usize,
    into: Option<&[f32]>,
) -> Vec<u32> {
    let rows = input.scales.len();
    let stride = quantized_stride(width);
    let weights =
        parts.iter().flat_map(|(scale, part)| part.chunks(width).map(|weights| (*scale, weights)));
    let weights: Vec<(f32, &[i8])> = weights.collect();
    let (length, column) =
        if into.is_some() { (weights.len() + COLUMN + 1, COLUMN) } else { (weights.len(), 0) };
    let mut output = into.map_or(vec![f32::NAN; rows * length], <[f32]>::to_vec);
    for row in 0..rows {
        let q = &input.values[row * stride..][..width];
        for (n, (scale, weights)) in weights.iter().enumerate() {
            let sum: i64 = weights.iter().zip(q).map(|(&t, &q)| i64::from(t) * i64::from(q)).sum();
            let y = sum as f32 * (scale / input.scales[row]);
            let out = &mut output[row * length + column + n];
            *out = if into.is_some() { *out + y } else { y };
        }
    }
    canonical(&output)
}

/// The bits, with one NaN for all: its sign and payload are the hardware's business.
fn canonical(values: &[f32]) -> Vec<u32> {
    bits(&values.iter().map(|&x| if x.is_nan() { f32::NAN } else { x }).collect::<Vec<f32>>())
}

#[test]
fn every_form_is_exact_on_awkward_shapes() {
    for form in forms() {
        let Some(mut cuda) = open(with(form)) else { return };
        for (k, n) in WIDTHS.into_iter().flat_map(|k| FEATURES.map(|n| (k, n))) {
            let mut rng = Rng::of(&[k as u64, n as u64]);
            let cut = n / 2;
            let parts: Vec<(f32, Vec<i8>)> = [(0.75, cut), (1.3, n - cut)]
                .into_iter()
                .filter(|&(_, rows)| rows > 0)
                .map(|(scale, rows)| (scale, rng.ternary(rows * k)))
                .collect();
            let tensors: Vec<TernaryTensor> = parts
                .iter()
                .map(|(scale, part)| {
                    TernaryTensor::from_weights(part.len() / k, k, *scale, part).unwrap()
                })
                .collect();
            let tensors: Vec<&TernaryTensor> = tensors.iter().collect();
            for rows in ROWS {
                // All rows at the widest and narrowest, and a few of them at each.
                if rows > 9 && !matches!((k, n), (300, 130) | (1000, 17) | (37, 9) | (1, 1)) {
                    continue;
                }
                let input = rows_of(&mut rng, rows, k);
                let into = (rows % 2 == 0).then(|| rng.normals(rows * (n + COLUMN + 1), 100.0));
                let found = matmul(&mut cuda, &input, &tensors, into.as_deref());
                let expected = expected(&input, &parts, k, into.as_deref());
                assert!(canonical(&found) == expected, "{form:?}: {rows} rows, {n} × {k}");
            }
        }
    }
}

#[test]
fn the_largest_sums_are_exact_in_every_form() {
    let (k, n) = (6912, 17);
    let stride = quantized_stride(k);
    for form in forms() {
        let Some(mut cuda) = open(with(form)) else { return };
        for (weight, q) in [(1i8, 127i8), (1, -128), (-1, 127), (-1, -128)] {
            let tensor = TernaryTensor::from_weights(n, k, 1.0, &vec![weight; n * k]).unwrap();
            for rows in [1, 4, 9] {
                let input = HostQuantized {
                    values: (0..rows * stride)
                        .map(|i| if i % stride < k { q } else { 0 })
                        .collect(),
                    scales: vec![1.0; rows],
                    sums: vec![i32::from(q) * k as i32; rows],
                };
                let found = matmul(&mut cuda, &input, &[&tensor], None);
                let sum = f32::from(weight) * f32::from(q) * k as f32; // below 2^24, so exact
                assert!(found.iter().all(|&y| y == sum), "{form:?}: {weight} {q}, {rows} rows");
            }
        }
    }
}

/// Products that several blocks of columns and several warps share, at shapes of a model.
#[test]
fn a_row_is_the_same_alone_and_among_others() {
    let mut rng = Rng::new(5);
    let (k, n, rows) = (2560, 80, 70);
    let tensor = TernaryTensor::from_weights(n, k, 1.1, &rng.ternary(n * k)).unwrap();
    let all = rows_of(&mut rng, rows, k);
    let stride = quantized_stride(k);
    let part = |start: usize, end: usize| HostQuantized {
        values: all.values[start * stride..end * stride].to_vec(),
        scales: all.scales[start..end].to_vec(),
        sums: all.sums[start..end].to_vec(),
    };
    let mut first = None;
    for form in forms() {
        let Some(mut cuda) = open(with(form)) else { return };
        let found = canonical(&matmul(&mut cuda, &all, &[&tensor], None));
        let first = first.get_or_insert_with(|| found.clone());
        assert!(found == *first, "{form:?}");
        for (start, end) in [(0, 1), (7, 9), (20, 23), (40, 49), (33, 70)] {
            let some = canonical(&matmul(&mut cuda, &part(start, end), &[&tensor], None));
            assert!(some == first[start * n..end * n], "{form:?}: {start}..{end}");
        }
    }
}

/// A shape of a gated network and the steps around it.
#[derive(Debug, Clone, Copy)]
struct Shape {
    rows: usize,
    hidden: usize,
    ffn: usize,
    norm: bool,
    activation: Activation,
}

/// `residual += down(norm?(act(gate(x)) · up(x)))` with `x = norm?(residual)`; the residual, and how
/// many launches that took.
fn feed_forward(options: CudaOptions, shape: Shape, spoilt: bool) -> Option<(Vec<f32>, u64)> {
    let Shape { rows, hidden, ffn, norm, activation } = shape;
    let mut backend = open(options)?;
    let b = &mut backend;
    let mut rng = Rng::new(7);
    let mut matrix = |rows: usize, cols: usize, scale: f32| {
        TernaryTensor::from_weights(rows, cols, scale, &rng.ternary(rows * cols)).unwrap()
    };
    let (gate, up) = (matrix(ffn, hidden, 0.7), matrix(ffn, hidden, 1.3));
    let down = matrix(hidden, ffn, 0.4);
    let gate_up: [&dyn TernaryRows; 2] = [&gate, &up];
    let gate_up_weight = b.pack_ternary(&gate_up).unwrap();
    let down_weight = b.pack_ternary(&[&down]).unwrap();
    let mut values = rng.normals(rows * hidden, 2.0);
    if spoilt {
        values[hidden / 2] = f32::INFINITY;
    }
    let mut residual = upload(b, &values);
    let (gain, sub_gain) = (upload(b, &gain(hidden)), upload(b, &gain(ffn)));
    let mut quantized = allocate_quantized(b, "test values", rows, hidden).unwrap();
    let mut gated = allocate_quantized(b, "test values", rows, ffn).unwrap();
    let mut gate_up = upload(b, &vec![f32::NAN; rows * 2 * ffn]);
    let before = b.stats().unwrap().dispatches;
    run_ops(b, &mut |r| {
        r.rms_norm_quantize(ops::RmsNormQuantize {
            rows,
            width: hidden,
            input: &residual,
            norm: norm.then_some(ops::Norm { gain: &gain, eps: EPS }),
            quantized: &mut quantized,
            normed: None,
        })?;
        r.ternary_matmul(ops::TernaryMatmul {
            rows,
            width: hidden,
            features: 2 * ffn,
            input: &quantized,
            weight: &gate_up_weight,
            output: &mut gate_up,
            stride: 2 * ffn,
            column: 0,
            epilogue: Epilogue::Store,
        })?;
        r.gate_norm_quantize(ops::GateNormQuantize {
            rows,
            width: ffn,
            gate_up: &gate_up,
            activation,
            norm: norm.then_some(ops::Norm { gain: &sub_gain, eps: EPS }),
            quantized: &mut gated,
            normed: None,
        })?;
        r.ternary_matmul(ops::TernaryMatmul {
            rows,
            width: ffn,
            features: hidden,
            input: &gated,
            weight: &down_weight,
            output: &mut residual,
            stride: hidden,
            column: 0,
            epilogue: Epilogue::Add,
        })
    })
    .unwrap();
    // Uploads may be launches of their own, which came before those of the ops or with them.
    let launches = b.stats().unwrap().dispatches - before;
    Some((download(b, &residual), launches))
}

#[test]
fn a_fused_network_has_the_same_bits() {
    let shapes = [
        (1, 64, 96),
        (1, 20, 100), // a gate that is not whole tiles
        (2, 100, 144),
        (3, 128, 64),
        (4, 260, 528),
        (5, 64, 64),
        (1, 2560, 320),
        (1, 320, 6912),
        (4, 37, 48),
    ];
    for (rows, hidden, ffn) in shapes {
        for activation in [Activation::Relu2, Activation::Silu, Activation::GeluTanh] {
            if hidden.max(ffn) > 1000 && activation != Activation::Relu2 {
                continue;
            }
            let shape =
                Shape { rows, hidden, ffn, norm: activation != Activation::Silu, activation };
            let plain = CudaOptions::default().fused(false);
            let Some((apart, many)) = feed_forward(plain, shape, false) else { return };
            assert!(apart.iter().all(|x| x.is_finite()), "{shape:?}");
            for pairs in [None, Some(1), Some(2), Some(3), Some(16)] {
                let options = with(pairs.map(|pairs| MatmulForm::Few { pairs }));
                let (fused, fewer) = feed_forward(options, shape, false).unwrap();
                assert!(bits(&apart) == bits(&fused), "{shape:?}, {pairs:?} pairs");
                let saved = match (rows, ffn % 16) {
                    (1..=4, 0) => 2,
                    (1..=4, _) => 1,
                    _ => 0,
                };
                if pairs.is_none() {
                    assert_eq!(many - fewer, saved, "{shape:?}");
                }
            }
        }
    }
}

#[test]
fn a_value_that_is_not_finite_spoils_its_row_when_fused() {
    for norm in [false, true] {
        let (rows, hidden, ffn) = (2, 40, 32);
        let shape = Shape { rows, hidden, ffn, norm, activation: Activation::Relu2 };
        let Some((found, _)) = feed_forward(CudaOptions::default(), shape, true) else { return };
        assert!(found[..hidden].iter().all(|x| !x.is_finite()), "{found:?}");
        assert!(found[hidden..].iter().all(|x| x.is_finite()), "{found:?}");
    }
}

#[test]
fn rows_that_are_read_twice_are_written() {
    let Some(mut b) = open(CudaOptions::default()) else { return };
    let mut rng = Rng::new(3);
    let input = upload(&mut b, &rng.normals(64, 1.0));
    let weights = [(); 2].map(|()| {
        let matrix = TernaryTensor::from_weights(8, 64, 1.0, &rng.ternary(8 * 64)).unwrap();
        b.pack_ternary(&[&matrix]).unwrap()
    });
    let mut quantized = allocate_quantized(&b, "test values", 1, 64).unwrap();
    let mut outputs = [(); 2].map(|()| upload(&mut b, &[f32::NAN; 8]));
    run_ops(&mut b, &mut |r| {
        r.rms_norm_quantize(ops::RmsNormQuantize {
            rows: 1,
            width: 64,
            input: &input,
            norm: None,
            quantized: &mut quantized,
            normed: None,
        })?;
        for (weight, output) in weights.iter().zip(&mut outputs) {
            r.ternary_matmul(ops::TernaryMatmul {
                rows: 1,
                width: 64,
                features: 8,
                input: &quantized,
                weight,
                output,
                stride: 8,
                column: 0,
                epilogue: Epilogue::Store,
            })?;
        }
        Ok(())
    })
    .unwrap();
    assert!(outputs.iter().all(|o| download(&mut b, o).iter().all(|x| x.is_finite())));
}

/// Without a norm, whose sum each backend takes in an order of its own, the gate has the CPU's bits.
#[test]
fn the_gate_has_the_bits_of_the_cpu() {
    let Some(mut cuda) = open(CudaOptions::default()) else { return };
    let mut cpu = Cpu::new(CpuOptions::default()).unwrap();
    for activation in [Activation::Relu2, Activation::Silu, Activation::GeluTanh] {
        // The last is too wide for shared memory.
        for width in [1, 33, 300, 13_000] {
            let mut rng = Rng::new(width as u64);
            let input: Vec<f32> = [0.01, 1.0, 10.0, 300.0, 1e5]
                .iter()
                .flat_map(|&m| [rng.normals(width, m), rng.normals(width, 2.0)].concat())
                .collect();
            let (a, a_rows) = gate_norm_quantize(&mut cpu, &input, width, activation, false);
            let (b, b_rows) = gate_norm_quantize(&mut cuda, &input, width, activation, false);
            assert!(bits(&a_rows) == bits(&b_rows), "{activation:?}, {width}");
            assert!(a == b, "{activation:?}, {width}");
        }
    }
}
