//! Fused ops give the bits of the ops that they are made of, and are fewer.

use crate::common::ops::{EPS, gain};
use crate::common::rng::Rng;
use crate::common::run::{bits, download, run_ops, upload};
use trine::backend::ops::{self, Activation, Epilogue, allocate_quantized};
use trine::backend::wgpu::{Gpu, Wgpu, WgpuOptions};
use trine::backend::{Backend, Record};
use trine::ternary::{TernaryRows, TernaryTensor};

fn matrix(rng: &mut Rng, rows: usize, cols: usize, scale: f32) -> TernaryTensor {
    let weights: Vec<i8> = rng.tokens(rows * cols, 3).iter().map(|&t| t as i8 - 1).collect();
    TernaryTensor::from_weights(rows, cols, scale, &weights).unwrap()
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
/// many dispatches that took.
fn feed_forward(gpu: &Gpu, fused: bool, shape: Shape) -> (Vec<f32>, u64) {
    let Shape { rows, hidden, ffn, norm, activation } = shape;
    let mut backend = Wgpu::new(gpu, WgpuOptions::default().fused(fused));
    let b = &mut backend;
    let mut rng = Rng::new(7);
    let gate = matrix(&mut rng, ffn, hidden, 0.7);
    let up = matrix(&mut rng, ffn, hidden, 1.3);
    let down = matrix(&mut rng, hidden, ffn, 0.4);
    let gate_up: [&dyn TernaryRows; 2] = [&gate, &up];
    let gate_up_weight = b.pack_ternary(&gate_up).unwrap();
    let down_weight = b.pack_ternary(&[&down]).unwrap();
    let mut residual = upload(b, &rng.normals(rows * hidden, 2.0));
    let (gain, sub_gain) = (upload(b, &gain(hidden)), upload(b, &gain(ffn)));
    let mut quantized = allocate_quantized(b, "test values", rows, hidden).unwrap();
    let mut gated = allocate_quantized(b, "test values", rows, ffn).unwrap();
    let mut gate_up = upload(b, &vec![f32::NAN; rows * 2 * ffn]);
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
    (download(b, &residual), b.stats().unwrap().dispatches)
}

#[test]
fn a_fused_network_has_the_same_bits() {
    for opened in crate::common::wgpu::opened() {
        let mut fused_dispatches = Vec::new();
        for (rows, hidden, ffn) in
            [(1, 64, 100), (2, 100, 132), (3, 128, 64), (4, 260, 516), (5, 64, 64), (1, 2560, 6912)]
        {
            for activation in [Activation::Relu2, Activation::Silu, Activation::GeluTanh] {
                let large = hidden > 1000;
                if large
                    && (opened.gpu.adapter().info().name.contains("Swift")
                        || activation != Activation::Relu2)
                {
                    continue;
                }
                let shape =
                    Shape { rows, hidden, ffn, norm: activation != Activation::Silu, activation };
                let (apart, four) = feed_forward(&opened.gpu, false, shape);
                let (fused, fewer) = feed_forward(&opened.gpu, true, shape);
                assert_eq!(bits(&apart), bits(&fused), "{} {shape:?}", opened.name);
                assert!(apart.iter().all(|x| x.is_finite()));
                assert_eq!(four, 4);
                fused_dispatches.push(fewer);
            }
        }
        // 1, 2 and 4 rows are fused whole; 3 and 5 are not compiled for.
        assert!(
            fused_dispatches.contains(&2) && fused_dispatches.contains(&4),
            "{fused_dispatches:?}"
        );
    }
}

#[test]
fn rows_that_are_read_twice_are_written() {
    for opened in crate::common::wgpu::opened() {
        let mut b = Wgpu::new(&opened.gpu, WgpuOptions::default());
        let mut rng = Rng::new(3);
        let (first, second) = (matrix(&mut rng, 8, 64, 1.0), matrix(&mut rng, 8, 64, 1.0));
        let input = upload(&mut b, &rng.normals(64, 1.0));
        let weights = [&first, &second].map(|m| b.pack_ternary(&[m]).unwrap());
        let mut quantized = allocate_quantized(&b, "test values", 1, 64).unwrap();
        let mut outputs = [(); 2].map(|()| upload(&mut b, &[f32::NAN; 8]));
        run_ops(&mut b, &mut |r| {
            let normed = None;
            r.rms_norm_quantize(ops::RmsNormQuantize {
                rows: 1,
                width: 64,
                input: &input,
                norm: None,
                quantized: &mut quantized,
                normed,
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
        assert_eq!(b.stats().unwrap().dispatches, 3);
        assert!(outputs.iter().all(|o| download(&mut b, o).iter().all(|x| x.is_finite())));
    }
}
