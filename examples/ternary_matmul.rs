//! The op level, without any model: open a device, pack a ternary matrix, quantise activations,
//! multiply.
//!
//! ```text
//! cargo run --release --example ternary_matmul
//! ```

use trine::backend::cpu::{Cpu, CpuOptions};
use trine::backend::ops::{Epilogue, RmsNormQuantize, TernaryMatmul, allocate_quantized};
use trine::backend::{Backend, LogitUse, Record, StepKey};
use trine::ternary::TernaryTensor;

/// Multiplies two rows of activations by a 3 × 4 matrix on `backend`.
fn multiply<B: Backend>(mut backend: B) -> Result<Vec<f32>, Box<dyn std::error::Error>> {
    let (rows, width, features) = (2, 4, 3);
    #[rustfmt::skip]
    let weights = [
        1, 0, -1,  1,
        0, 1,  1, -1,
       -1, 1,  0,  0,
    ];
    let matrix = TernaryTensor::from_weights(features, width, 0.5, &weights)
        .ok_or("the weights do not fit the shape")?;
    let matrix = backend.pack_ternary(&[&matrix])?;

    let mut input = backend.allocate("input", rows * width)?;
    let mut quantized = allocate_quantized(&backend, "quantised input", rows, width)?;
    let mut output = backend.allocate("output", rows * features)?;
    backend.write(&mut input, &[1.0, 2.0, 3.0, 4.0, -1.0, 0.5, 0.0, 0.25])?;

    // A step is enqueued under a key that holds its sizes; what it records depends on nothing else.
    let key = StepKey {
        tokens: rows,
        sequences: 1,
        queries: rows,
        pages: 0,
        logit_rows: 0,
        logits: LogitUse::Keep,
        hidden: false,
    };
    backend.run(&key, &mut |recorder| {
        recorder.rms_norm_quantize(RmsNormQuantize {
            rows,
            width,
            input: &input,
            norm: None,
            quantized: &mut quantized,
            normed: None,
        })?;
        recorder.ternary_matmul(TernaryMatmul {
            rows,
            width,
            features,
            input: &quantized,
            weight: &matrix,
            output: &mut output,
            stride: features,
            column: 0,
            epilogue: Epilogue::Store,
        })
    })?;
    Ok(backend.read(&output, rows * features)?)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cpu = Cpu::new(CpuOptions::default())?;
    println!("on {}", cpu.info().description);
    for row in multiply(cpu)?.chunks(3) {
        println!("{row:?}");
    }
    Ok(())
}
