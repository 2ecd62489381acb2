//! Sequences in a paged cache and their attention, by themselves.

use std::num::NonZeroUsize;

use trine::backend::ops::{self, Heads};
use trine::backend::{Backend, KvLayout, KvType, NONE, PAGE_TOKENS, Record};
use trine::model::activations::rope_tables;

use super::host::HostBatch;
use super::ops::{EPS, gain};
use super::rng::Rng;
use super::run::{download, run_ops, upload};

/// The types of cache that a backend has. `B` is no more than a name here.
pub(crate) fn kv_types<B: Backend>() -> &'static [KvType] {
    let all = &[KvType::F32, KvType::F16, KvType::Int8];
    if std::any::type_name::<B>().contains("::wgpu::") { &all[..2] } else { all }
}

/// Sequences in a cache, and queries at their ends.
pub(crate) struct Attention {
    pub(crate) heads: Heads,
    kv_type: KvType,
    head_norms: bool,
    /// Whether keys and queries stay as they are.
    unrotated: bool,
    /// How many keys a query sees; all if absent.
    pub(crate) window: Option<NonZeroUsize>,
    lens: Vec<usize>,
    /// Rows of all sequences, one after the other.
    pub(crate) qkv: Vec<f32>,
    /// Pages of each sequence, out of order and interleaved.
    pages: Vec<Vec<u32>>,
}

impl Attention {
    pub(crate) fn new(heads: Heads, kv_type: KvType, head_norms: bool, lens: &[usize]) -> Self {
        let mut rng = Rng::of(&[7, heads.dim as u64, lens.len() as u64]);
        let tokens: usize = lens.iter().sum();
        // Queries and keys large enough for peaked attention.
        let qkv = rng.normals(tokens * heads.qkv_width(), 1.5);
        let spans = lens.iter().map(|len| len.div_ceil(PAGE_TOKENS));
        let mut all: Vec<u32> = (0..spans.clone().sum::<usize>() as u32 + 2).collect();
        rng.shuffle(&mut all);
        let pages = spans.map(|span| all.split_off(all.len() - span)).collect();
        let (lens, unrotated, window) = (lens.to_vec(), false, None);
        Self { heads, kv_type, head_norms, unrotated, window, lens, qkv, pages }
    }

    /// Where a query sees `window` keys; all of 0.
    pub(crate) fn windowed(mut self, window: usize) -> Self {
        self.window = NonZeroUsize::new(window);
        self
    }

    /// With a rotation that changes nothing, so that every backend stores the very same numbers.
    pub(crate) fn unrotated(mut self) -> Self {
        self.unrotated = true;
        self
    }

    /// The step's inputs for the last `queries` tokens of each sequence.
    pub(crate) fn batch(&self, queries: usize) -> HostBatch {
        let max_pages = self.pages.iter().map(Vec::len).max().unwrap() + 1;
        let mut batch = HostBatch { max_pages, query_starts: vec![0], ..HostBatch::default() };
        for (s, (&len, pages)) in self.lens.iter().zip(&self.pages).enumerate() {
            for position in len.saturating_sub(queries)..len {
                let page = pages[position / PAGE_TOKENS] as usize;
                batch.positions.push(position as u32);
                batch.sequences.push(s as u32);
                batch.slots.push((page * PAGE_TOKENS + position % PAGE_TOKENS) as u32);
            }
            batch.query_starts.push(batch.positions.len() as u32);
            batch.kv_lens.push(len as u32);
            let row = pages.iter().copied().chain(std::iter::repeat(NONE)).take(max_pages);
            batch.page_table.extend(row);
        }
        batch
    }

    /// Rows of `qkv` that belong to the last `queries` tokens of each sequence.
    pub(crate) fn rows(&self, queries: usize) -> Vec<f32> {
        let width = self.heads.qkv_width();
        let mut rows = Vec::new();
        let mut start = 0;
        for &len in &self.lens {
            let first = start + len.saturating_sub(queries);
            rows.extend_from_slice(&self.qkv[first * width..(start + len) * width]);
            start += len;
        }
        rows
    }

    /// Fills the cache with all tokens, then asks for the last `queries` of each sequence, with a
    /// row of padding behind them.
    pub(crate) fn run<B: Backend>(&self, backend: &mut B, queries: usize) -> Vec<f32> {
        let heads = self.heads;
        let context = self.lens.iter().max().unwrap() + 1;
        let layout = KvLayout {
            layers: 2,
            pages: self.pages.iter().map(Vec::len).sum::<usize>() + 2,
            kv_heads: heads.kv,
            head_dim: heads.dim,
            kv_type: self.kv_type,
        };
        let mut kv = backend.allocate_kv(layout).unwrap();
        let (mut cos, mut sin) = rope_tables(10_000.0, heads.dim, context);
        if self.unrotated {
            cos.fill(1.0);
            sin.fill(0.0);
        }
        let (cos, sin) = (upload(backend, &cos), upload(backend, &sin));
        let gains = [gain(heads.dim), gain(heads.dim + 1)[1..].to_vec()];
        let [query_gain, key_gain] = gains.map(|gain| upload(backend, &gain));
        let norm = |gain| self.head_norms.then_some(ops::Norm { gain, eps: EPS });
        let append = |backend: &mut B, kv: &mut B::KvCache, batch: &HostBatch, rows: &[f32]| {
            let (mut batch, mut rows) = (batch.clone(), rows.to_vec());
            batch.positions.push(0);
            batch.sequences.push(0);
            batch.slots.push(NONE);
            rows.extend(vec![f32::NAN; heads.qkv_width()]);
            let count = batch.positions.len();
            let (batch, mut qkv) = (batch.upload(backend), upload(backend, &rows));
            run_ops(backend, &mut |r| {
                r.rope_append_kv(ops::RopeAppendKv {
                    rows: count,
                    batch: &batch,
                    heads,
                    qkv: &mut qkv,
                    cos: &cos,
                    sin: &sin,
                    query_norm: norm(&query_gain),
                    key_norm: norm(&key_gain),
                    kv: &mut *kv,
                    layer: 1,
                })
            })
            .unwrap_or_else(|error| panic!("{heads:?} {:?}: {error}", self.kv_type));
            (batch, qkv, count)
        };
        append(backend, &mut kv, &self.batch(usize::MAX), &self.qkv);
        let (batch, qkv, rows) =
            append(backend, &mut kv, &self.batch(queries), &self.rows(queries));
        let mut output = upload(backend, &vec![f32::NAN; rows * heads.output_width()]);
        run_ops(backend, &mut |r| {
            r.paged_attention(ops::PagedAttention {
                rows,
                sequences: self.lens.len(),
                batch: &batch,
                heads,
                scale: 1.0 / (heads.dim as f32).sqrt(),
                window: self.window,
                qkv: &qkv,
                kv: &kv,
                layer: 1,
                output: &mut output,
            })
        })
        .unwrap_or_else(|error| panic!("{heads:?} {:?}: {error}", self.kv_type));
        let mut output = download(backend, &output);
        let padding = output.split_off((rows - 1) * heads.output_width());
        assert!(padding.iter().all(|&x| x == 0.0), "rows of padding are zeros");
        assert!(output.iter().all(|x| x.is_finite()));
        output
    }
}
