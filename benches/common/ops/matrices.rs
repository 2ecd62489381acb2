//! The ternary products of a layer.

use trine::backend::ops::{Epilogue, Quantized, TernaryMatmul, allocate_quantized};
use trine::backend::{Backend, Record};
use trine::error::RunError;
use trine::ternary::TernaryRows;

use super::super::Failure;
use super::{Bench, Op, norm};

/// A matrix of any codes: pieces of one random row, from another start in each.
struct AnyCodes {
    cols: usize,
    rows: usize,
    codes: Vec<u8>,
}

impl AnyCodes {
    fn new(cols: usize, rows: usize) -> Self {
        let mut state = 1u32;
        let codes = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (((state >> 24) * 3) >> 8) as u8
        });
        Self { cols, rows, codes: codes.take(cols + 4096).collect() }
    }
}

impl TernaryRows for AnyCodes {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn scale(&self) -> f32 {
        1.0
    }
    fn read_codes(&self, row: usize, codes: &mut [u8]) {
        let start = row * 1999 % 4096;
        codes.copy_from_slice(&self.codes[start..start + self.cols]);
    }
}

impl<B: Backend> Bench<'_, B> {
    /// The products, alone and with the norm in front of them.
    pub(super) fn matrices(&mut self) -> Result<(), Failure> {
        let config = &self.plan.config;
        let (hidden, ffn, heads) = (config.hidden, config.ffn, config.heads);
        let most = self.plan.rows.iter().copied().max().unwrap_or(1);
        let widest = hidden.max(ffn).max(heads.output_width());
        let gain = self.floats(widest)?;
        let input = self.floats(most * widest)?;
        let mut output = self.floats(most * 2 * ffn.max(heads.qkv_width()))?;
        for (name, width, features) in [
            ("qkv", hidden, heads.qkv_width()),
            ("output", heads.output_width(), hidden),
            ("gate and up", hidden, 2 * ffn),
            ("down", ffn, hidden),
        ] {
            let name = format!("{name} {features}×{width}");
            if !self.wants(&name) {
                continue;
            }
            let bytes = width * features / 4;
            let count = self.plan.cold_bytes.div_ceil(bytes).max(config.layers);
            let codes = AnyCodes::new(width, features);
            let weights: Result<Vec<B::TernaryMatrix>, _> =
                (0..count).map(|_| self.device.pack_ternary(&[&codes])).collect();
            let weights = weights?;
            let mut quantized = allocate_quantized(&self.device, "bench", most, width)?;
            for &rows in &self.plan.rows {
                let op =
                    |name| Op { products: width * features, ..Op::new(name, rows, count, bytes) };
                let shape = (rows, width, features);
                self.time(op(&name), &input, &mut |r| {
                    weights.iter().try_for_each(|w| product(r, shape, &quantized, w, &mut output))
                })?;
                let fused = format!("{name} with norm");
                self.time(op(&fused), &input, &mut |r| {
                    weights.iter().try_for_each(|weight| {
                        norm(r, rows, width, &input, Some(&gain), &mut quantized)?;
                        product(r, shape, &quantized, weight, &mut output)
                    })
                })?;
            }
        }
        Ok(())
    }
}

fn product<B: Backend>(
    r: &mut B::Recorder<'_>,
    (rows, width, features): (usize, usize, usize),
    input: &Quantized<B>,
    weight: &B::TernaryMatrix,
    output: &mut B::Buffer<f32>,
) -> Result<(), RunError> {
    r.ternary_matmul(TernaryMatmul {
        rows,
        width,
        features,
        input,
        weight,
        output,
        stride: features,
        column: 0,
        epilogue: Epilogue::Store,
    })
}
