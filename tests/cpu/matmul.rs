//! The ternary product of the CPU backend is exact, whatever the instruction set, the number of
//! threads and the shape of the batch.

use crate::common::*;
use trine::backend::cpu::{Buffer, Cpu, TernaryMatrix};
use trine::backend::ops::*;
use trine::backend::{Backend, Record, quantized_stride};
use trine::ternary::{TernaryRows, TernaryTensor};

/// Quantised rows, given.
fn quantized(cpu: &mut Cpu, values: &[i8], width: usize, scales: &[f32]) -> Quantized<Cpu> {
    let (rows, stride) = (scales.len(), quantized_stride(width));
    let mut q = allocate_quantized(cpu, "q", rows, width).unwrap();
    for row in 0..rows {
        let values = &values[row * width..][..width];
        q.values[row * stride..][..width].copy_from_slice(values);
        q.sums[row] = values.iter().map(|&q| i32::from(q)).sum();
    }
    q.scales.copy_from_slice(scales);
    q
}

struct Product<'a> {
    width: usize,
    features: usize,
    values: &'a [i8],
    scales: &'a [f32],
    stride: usize,
    column: usize,
    epilogue: Epilogue,
}

impl Product<'_> {
    fn run(&self, cpu: &mut Cpu, weight: &TernaryMatrix) -> Vec<u32> {
        let rows = self.scales.len();
        let input = quantized(cpu, self.values, self.width, self.scales);
        let mut output: Buffer<f32> = cpu.allocate("output", rows * self.stride).unwrap();
        output.fill(0.5);
        step(cpu, |r| {
            r.ternary_matmul(TernaryMatmul {
                rows,
                width: self.width,
                features: self.features,
                input: &input,
                weight,
                output: &mut output,
                stride: self.stride,
                column: self.column,
                epilogue: self.epilogue,
            })
        });
        bits(&output)
    }

    /// What `run` must give, by the formula.
    fn expected(&self, weights: &[i8], weight_scales: &[f32]) -> Vec<u32> {
        let mut output = vec![0.5f32; self.scales.len() * self.stride];
        for (row, &scale) in self.scales.iter().enumerate() {
            let q = &self.values[row * self.width..][..self.width];
            for n in 0..self.features {
                let t = &weights[n * self.width..][..self.width];
                let sum: i64 = t.iter().zip(q).map(|(&t, &q)| i64::from(t) * i64::from(q)).sum();
                let y = i32::try_from(sum).unwrap() as f32 * (weight_scales[n] / scale);
                let out = &mut output[row * self.stride + self.column + n];
                *out = match self.epilogue {
                    Epilogue::Store => y,
                    Epilogue::Add => *out + y,
                };
            }
        }
        bits(&output)
    }
}

#[test]
fn products_are_exact_for_awkward_shapes() {
    let mut random = Random(1);
    for width in [1, 3, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 640] {
        for features in [1, 3, 4, 5, 15, 16, 17, 33, 61] {
            // One part, or two with their own scales.
            let cut = features / 2;
            let weights = random.ternary(features * width);
            let parts: Vec<TernaryTensor> = [(0, cut, 0.75), (cut, features, 1.3)]
                .into_iter()
                .filter(|(start, end, _)| end > start)
                .map(|(start, end, scale)| {
                    let weights = &weights[start * width..end * width];
                    TernaryTensor::from_weights(end - start, width, scale, weights).unwrap()
                })
                .collect();
            let parts: Vec<&dyn TernaryRows> =
                parts.iter().map(|p| p as &dyn TernaryRows).collect();
            let weight_scales: Vec<f32> =
                (0..features).map(|n| if n < cut { 0.75 } else { 1.3 }).collect();
            for rows in [1, 2, 3, 4, 5, 8, 13, 17] {
                if rows > 5 && !matches!(width, 64 | 257) {
                    continue;
                }
                let values: Vec<i8> = (0..rows * width).map(|_| random.next() as i8).collect();
                let scales: Vec<f32> = (0..rows).map(|r| 3.0 + r as f32).collect();
                let product = Product {
                    width,
                    features,
                    values: &values,
                    scales: &scales,
                    stride: features + 3,
                    column: 2,
                    epilogue: if rows % 2 == 0 { Epilogue::Add } else { Epilogue::Store },
                };
                let found = on_all_of(&[1, 3], |cpu| {
                    let weight = cpu.pack_ternary(&parts).unwrap();
                    product.run(cpu, &weight)
                });
                let expected = product.expected(&weights, &weight_scales);
                assert!(found == expected, "{rows} × {width} × {features}");
            }
        }
    }
}

#[test]
fn the_highest_sums_are_exact() {
    for width in [256, 6912, 100_000] {
        for (t, q) in [(1, 127), (1, -128), (-1, 127), (-1, -128)] {
            let features = 17;
            let weights = vec![t; features * width];
            let weight = TernaryTensor::from_weights(features, width, 1.0, &weights).unwrap();
            for rows in [1, 4, 6] {
                let product = Product {
                    width,
                    features,
                    values: &vec![q; rows * width],
                    scales: &vec![1.0; rows],
                    stride: features,
                    column: 0,
                    epilogue: Epilogue::Store,
                };
                let found = on_all_of(&[1], |cpu| {
                    let weight = cpu.pack_ternary(&[&weight]).unwrap();
                    product.run(cpu, &weight)
                });
                let sum = width as i64 * i64::from(t) * i64::from(q);
                assert!(found.iter().all(|&y| y == (sum as f32).to_bits()), "{width} {t} {q}");
            }
        }
    }
}

#[test]
fn a_row_is_the_same_alone_and_among_others_at_model_shapes() {
    let mut random = Random(2);
    let (width, features, rows) = (2560, 640, 230);
    let weights = random.ternary(features * width);
    let weight = TernaryTensor::from_weights(features, width, 1.1, &weights).unwrap();
    let values: Vec<i8> = (0..rows * width).map(|_| random.next() as i8).collect();
    let scales: Vec<f32> = (0..rows).map(|r| 3.0 + r as f32).collect();
    let product = |start: usize, end: usize| Product {
        width,
        features,
        values: &values[start * width..end * width],
        scales: &scales[start..end],
        stride: features,
        column: 0,
        epilogue: Epilogue::Store,
    };
    for isa in trine::backend::cpu::Isa::available().into_iter().rev() {
        for threads in [1, 2] {
            let cpu = &mut cpu_of(Some(isa), threads);
            let weight = cpu.pack_ternary(&[&weight]).unwrap();
            // More rows than one block of activations holds.
            let all = product(0, rows).run(cpu, &weight);
            for (start, end) in [(0, 1), (7, 9), (100, 103), (50, 57), (199, 230)] {
                let some = product(start, end).run(cpu, &weight);
                assert!(some == all[start * features..end * features], "{isa} {start}..{end}");
            }
            if threads == 1 && isa != trine::backend::cpu::Isa::Scalar {
                let expected = product(0, 3).expected(&weights, &vec![1.1; features]);
                assert!(all[..3 * features] == expected);
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let mut cpu = cpu_of(None, 1);
    let weight = TernaryTensor::from_weights(2, 3, 1.0, &[0, 1, -1, 0, 1, 1]).unwrap();
    let weight = cpu.pack_ternary(&[&weight]).unwrap();
    let input = quantized(&mut cpu, &[1, 2, 3], 3, &[1.0]);
    let mut output: Buffer<f32> = cpu.allocate("output", 2).unwrap();
    for (rows, width, features, stride, column, named) in [
        (1, 3, 2, 2, 0, ""),
        (0, 3, 2, 2, 0, ""),
        (2, 3, 2, 2, 0, "input"),
        (1, 4, 2, 2, 0, "width"),
        (1, 3, 1, 2, 0, "features"),
        (1, 3, 2, 1, 0, "stride"),
        (1, 3, 2, 3, 1, "output"),
    ] {
        let result = step_result(&mut cpu, |r| {
            r.ternary_matmul(TernaryMatmul {
                rows,
                width,
                features,
                input: &input,
                weight: &weight,
                output: &mut output,
                stride,
                column,
                epilogue: Epilogue::Store,
            })
        });
        match result {
            Ok(()) => assert_eq!(named, ""),
            Err(error) => {
                let error = error.to_string();
                assert!(!named.is_empty() && error.contains(named), "{named}: {error}");
            }
        }
    }
}
