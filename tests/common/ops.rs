//! Ops by themselves: inputs from the host, outputs full of garbage before and back on the host
//! after.

use trine::backend::ops::{self, Activation, Epilogue};
use trine::backend::{Backend, Record, quantized_stride};
use trine::ternary::{TernaryRows, TernaryTensor};

use super::host::HostQuantized;
use super::run::{download, run_ops, upload};

/// eps of every norm.
pub(crate) const EPS: f32 = 1e-5;

/// One op through a backend; the reference is asked by `Checked`, where the backend is one.
pub(crate) fn rms_norm_quantize<B: Backend>(
    backend: &mut B,
    input: &[f32],
    width: usize,
    with_norm: bool,
    with_rows: bool,
) -> HostQuantized {
    let rows = input.len() / width;
    let gain = gain(width);
    let (input, gain) = (upload(backend, input), upload(backend, &gain));
    let mut normed = upload(backend, &vec![f32::NAN; rows * width]);
    let mut quantized = garbage(rows, width).upload(backend);
    run_ops(backend, &mut |r| {
        r.rms_norm_quantize(ops::RmsNormQuantize {
            rows,
            width,
            input: &input,
            norm: with_norm.then_some(ops::Norm { gain: &gain, eps: EPS }),
            quantized: &mut quantized,
            normed: with_rows.then_some(&mut normed),
        })
    })
    .unwrap_or_else(|error| panic!("{rows} rows of {width}: {error}"));
    let untouched = download(backend, &normed).iter().all(|x| x.is_nan());
    assert_eq!(untouched, !with_rows);
    HostQuantized::download(backend, &quantized)
}

pub(crate) fn gate_norm_quantize<B: Backend>(
    backend: &mut B,
    gate_up: &[f32],
    width: usize,
    activation: Activation,
    with_norm: bool,
) -> (HostQuantized, Vec<f32>) {
    let rows = gate_up.len() / (2 * width);
    let (gate_up, gain) = (upload(backend, gate_up), upload(backend, &gain(width)));
    let mut normed = upload(backend, &vec![f32::NAN; rows * width]);
    let mut quantized = garbage(rows, width).upload(backend);
    run_ops(backend, &mut |r| {
        r.gate_norm_quantize(ops::GateNormQuantize {
            rows,
            width,
            gate_up: &gate_up,
            activation,
            norm: with_norm.then_some(ops::Norm { gain: &gain, eps: EPS }),
            quantized: &mut quantized,
            normed: Some(&mut normed),
        })
    })
    .unwrap_or_else(|error| panic!("{activation:?}, {rows} rows of {width}: {error}"));
    (HostQuantized::download(backend, &quantized), download(backend, &normed))
}

pub(crate) fn rms_norm<B: Backend>(
    backend: &mut B,
    input: &[f32],
    width: usize,
    gather: Option<&[u32]>,
    first: usize,
    epilogue: Epilogue,
) -> Vec<f32> {
    let rows = 5;
    let (input, gain) = (upload(backend, input), upload(backend, &gain(width)));
    let gather = gather.map(|gather| upload(backend, gather));
    let before = match epilogue {
        Epilogue::Store => vec![f32::NAN; rows * width],
        Epilogue::Add => (0..rows * width).map(|i| i as f32 / 7.0 - 3.0).collect(),
    };
    let mut output = upload(backend, &before);
    run_ops(backend, &mut |r| {
        r.rms_norm(ops::RmsNorm {
            rows,
            width,
            input: &input,
            gather: gather.as_ref(),
            first,
            norm: ops::Norm { gain: &gain, eps: EPS },
            output: &mut output,
            epilogue,
        })
    })
    .unwrap_or_else(|error| panic!("width {width}: {error}"));
    download(backend, &output)
}

/// `into` is what the product is added to: as long as the features, with columns around them.
pub(crate) struct LowRank<'a> {
    pub(crate) input: &'a [f32],
    pub(crate) down: &'a [f32],
    pub(crate) up: &'a [f32],
    pub(crate) rank: usize,
    pub(crate) into: &'a [f32],
}

/// What is between the two products, and what they are added to, after it.
pub(crate) fn low_rank<B: Backend>(backend: &mut B, test: &LowRank<'_>) -> (Vec<f32>, Vec<f32>) {
    let rank = test.rank;
    let (width, features) = (test.down.len() / rank, test.up.len() / rank);
    let rows = test.input.len() / width;
    let [input, down, up, mut output] =
        [test.input, test.down, test.up, test.into].map(|values| upload(backend, values));
    let mut inner = upload(backend, &vec![f32::NAN; rows * rank]);
    run_ops(backend, &mut |r| {
        r.low_rank(ops::LowRank {
            rows,
            width,
            rank,
            features,
            input: &input,
            down: &down,
            up: &up,
            inner: &mut inner,
            output: &mut output,
            stride: features + COLUMN + 1,
            column: COLUMN,
        })
    })
    .unwrap_or_else(|error| panic!("{rows} rows of {width}, {rank}, {features}: {error}"));
    (download(backend, &inner), download(backend, &output))
}

/// Gains of both signs, some of them all but zero.
pub(crate) fn gain(width: usize) -> Vec<f32> {
    (0..width).map(|i| [1.0, -0.7, 1e-4, 2.5, 0.3][i % 5]).collect()
}

/// Quantised rows full of what no op leaves there.
pub(crate) fn garbage(rows: usize, width: usize) -> HostQuantized {
    HostQuantized {
        values: vec![99; rows * quantized_stride(width)],
        scales: vec![f32::NAN; rows],
        sums: vec![99; rows],
    }
}

pub(crate) fn ones(rows: usize, width: usize) -> TernaryTensor {
    TernaryTensor::from_weights(rows, width, 1.0, &vec![1; rows * width]).unwrap()
}

/// What a product writes into, row by row: as long as the features, or with columns around them.
pub(crate) const COLUMN: usize = 2;

pub(crate) fn matmul<B: Backend>(
    backend: &mut B,
    input: &HostQuantized,
    parts: &[&TernaryTensor],
    into: Option<&[f32]>,
) -> Vec<f32> {
    let features = parts.iter().map(|part| part.rows()).sum();
    let rows = input.scales.len();
    let parts: Vec<&dyn TernaryRows> = parts.iter().map(|&part| part as _).collect();
    let weight = backend.pack_ternary(&parts).unwrap();
    let input = input.upload(backend);
    let nothing = vec![f32::NAN; rows * features];
    let mut output = upload(backend, into.unwrap_or(&nothing));
    run_ops(backend, &mut |r| {
        r.ternary_matmul(ops::TernaryMatmul {
            rows,
            width: parts[0].cols(),
            features,
            input: &input,
            weight: &weight,
            output: &mut output,
            stride: if into.is_some() { features + COLUMN + 1 } else { features },
            column: if into.is_some() { COLUMN } else { 0 },
            epilogue: if into.is_some() { Epilogue::Add } else { Epilogue::Store },
        })
    })
    .unwrap();
    download(backend, &output)
}
