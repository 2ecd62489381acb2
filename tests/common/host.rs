//! Arguments of ops, made on the host and uploaded: for tests of ops by themselves.

use trine::backend::ops::{Batch, Lanes, Quantized, SampleRow, Samples};
use trine::backend::reference::quantize_row;
use trine::backend::{Backend, MAX_LOGPROBS, quantized_stride};

use super::run::upload;

/// The inputs of a step; a test fills in what its op reads.
#[derive(Debug, Clone, Default)]
pub(crate) struct HostBatch {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) sequences: Vec<u32>,
    pub(crate) slots: Vec<u32>,
    pub(crate) query_starts: Vec<u32>,
    pub(crate) kv_lens: Vec<u32>,
    pub(crate) page_table: Vec<u32>,
    pub(crate) max_pages: usize,
    pub(crate) lanes: Vec<u32>,
    pub(crate) logit_rows: Vec<u32>,
    pub(crate) targets: Vec<u32>,
    pub(crate) sample_rows: Vec<SampleRow>,
    pub(crate) bias_tokens: Vec<u32>,
    pub(crate) bias_values: Vec<f32>,
}

impl HostBatch {
    pub(crate) fn upload<B: Backend>(&self, backend: &mut B) -> Batch<B> {
        Batch {
            tokens: upload(backend, &self.tokens),
            positions: upload(backend, &self.positions),
            sequences: upload(backend, &self.sequences),
            slots: upload(backend, &self.slots),
            query_starts: upload(backend, &self.query_starts),
            kv_lens: upload(backend, &self.kv_lens),
            page_table: upload(backend, &self.page_table),
            max_pages: self.max_pages,
            lanes: upload(backend, &self.lanes),
            logit_rows: upload(backend, &self.logit_rows),
            targets: upload(backend, &self.targets),
            sample_rows: upload(backend, &self.sample_rows),
            bias_tokens: upload(backend, &self.bias_tokens),
            bias_values: upload(backend, &self.bias_values),
        }
    }
}

pub(crate) fn upload_lanes<B: Backend>(
    backend: &mut B,
    history: &[u32],
    context: usize,
    sampled: &[u32],
) -> Lanes<B> {
    Lanes { history: upload(backend, history), context, sampled: upload(backend, sampled) }
}

/// Samples of `rows` rows that hold what no op writes.
pub(crate) fn upload_samples<B: Backend>(backend: &mut B, rows: usize) -> Samples<B> {
    Samples {
        tokens: upload(backend, &vec![77u32; rows]),
        logprobs: upload(backend, &vec![77f32; rows]),
        top_tokens: upload(backend, &vec![77u32; rows * MAX_LOGPROBS]),
        top_logprobs: upload(backend, &vec![77f32; rows * MAX_LOGPROBS]),
    }
}

/// Quantised rows on the host: values at their stride, scales, sums.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HostQuantized {
    pub(crate) values: Vec<i8>,
    pub(crate) scales: Vec<f32>,
    pub(crate) sums: Vec<i32>,
}

impl HostQuantized {
    /// Quantises rows of `width`.
    pub(crate) fn of(rows: &[f32], width: usize) -> Self {
        let mut quantized = Self { values: vec![], scales: vec![], sums: vec![] };
        let mut values = vec![0; quantized_stride(width)];
        for row in rows.chunks(width) {
            let (scale, sum) = quantize_row(row, &mut values);
            quantized.values.extend(&values);
            quantized.scales.push(scale);
            quantized.sums.push(sum);
        }
        quantized
    }

    pub(crate) fn upload<B: Backend>(&self, backend: &mut B) -> Quantized<B> {
        Quantized {
            values: upload(backend, &self.values),
            scales: upload(backend, &self.scales),
            sums: upload(backend, &self.sums),
        }
    }

    pub(crate) fn download<B: Backend>(backend: &mut B, quantized: &Quantized<B>) -> Self {
        Self {
            values: super::run::download(backend, &quantized.values),
            scales: super::run::download(backend, &quantized.scales),
            sums: super::run::download(backend, &quantized.sums),
        }
    }
}
