//! Attention on GPUs: every form of its kernels gives the same bits, and the cache rounds as it
//! should.

use crate::common::attention::Attention;
use crate::common::host::HostBatch;
use crate::common::rng::Rng;
use crate::common::run::{bits, download, upload};
use crate::common::wgpu::{Opened, opened};
use trine::backend::ops::{self, Heads};
use trine::backend::wgpu::{Wgpu, WgpuOptions};
use trine::backend::{Backend, KvLayout, KvType, LogitUse, NONE, PAGE_TOKENS, Record, StepKey};
use trine::error::RunError;
use trine::model::activations::rope_tables;

/// Sequences, and their cache on a device.
struct Sequences<'a> {
    test: &'a Attention,
    backend: Wgpu,
    kv: <Wgpu as Backend>::KvCache,
    context: usize,
}

/// How a step is run.
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Both ops in one step, so that they may be fused.
    together: bool,
    /// Rows behind those of the sequences.
    padding: usize,
    /// Of the key: tokens that a sequence may bring, and pages that it may span.
    queries: usize,
    pages: usize,
}

const PLAIN: Form = Form { together: false, padding: 0, queries: 0, pages: 0 };

/// A key that says how many tokens each sequence may bring and how many pages it may span; 0 of
/// either when nothing is known.
fn step_key(tokens: usize, queries: usize, pages: usize) -> StepKey {
    StepKey {
        tokens,
        sequences: tokens,
        queries,
        pages,
        logit_rows: 0,
        logits: LogitUse::Keep,
        hidden: false,
    }
}

impl<'a> Sequences<'a> {
    fn new(opened: &Opened, test: &'a Attention, kv_type: KvType) -> Self {
        let prompt = test.batch(usize::MAX);
        let layout = KvLayout {
            layers: 2,
            pages: *prompt.slots.iter().max().unwrap() as usize / PAGE_TOKENS + 1,
            kv_heads: test.heads.kv,
            head_dim: test.heads.dim,
            kv_type,
        };
        let context = *prompt.kv_lens.iter().max().unwrap() as usize;
        let backend = Wgpu::new(&opened.gpu, WgpuOptions::default());
        let kv = backend.allocate_kv(layout).unwrap();
        Self { test, backend, kv, context }
    }

    /// Both ops, or the first alone, whose answer is empty.
    fn step(&mut self, batch: HostBatch, rows: Vec<f32>, form: Option<Form>) -> Vec<f32> {
        let output = self.any_step(batch, rows, form);
        assert!(output.iter().all(|x| x.is_finite()));
        output
    }

    /// The same, whatever the answer.
    fn any_step(
        &mut self,
        mut batch: HostBatch,
        mut rows: Vec<f32>,
        form: Option<Form>,
    ) -> Vec<f32> {
        let heads = self.test.heads;
        let real = batch.positions.len();
        let sequences = batch.kv_lens.len();
        let Form { together, padding, queries, pages } = form.unwrap_or(PLAIN);
        let count = real + padding;
        batch.positions.resize(count, 0);
        batch.sequences.resize(count, 0);
        batch.slots.resize(count, NONE);
        rows.resize(count * heads.qkv_width(), f32::NAN);
        let Self { backend, kv, .. } = self;
        let (cos, sin) = rope_tables(10_000.0, heads.dim, self.context);
        let (cos, sin) = (upload(backend, &cos), upload(backend, &sin));
        let (batch, mut qkv) = (batch.upload(backend), upload(backend, &rows));
        let mut output = upload(backend, &vec![f32::NAN; count * heads.output_width()]);
        let key = step_key(count, queries, pages);
        let mut record = |r: &mut <Wgpu as Backend>::Recorder<'_>, rope: bool, attention: bool| {
            if rope {
                r.rope_append_kv(ops::RopeAppendKv {
                    rows: count,
                    batch: &batch,
                    heads,
                    qkv: &mut qkv,
                    cos: &cos,
                    sin: &sin,
                    query_norm: None,
                    key_norm: None,
                    kv: &mut *kv,
                    layer: 1,
                })?;
            }
            if attention {
                r.paged_attention(ops::PagedAttention {
                    rows: count,
                    sequences,
                    batch: &batch,
                    heads,
                    scale: 1.0 / (heads.dim as f32).sqrt(),
                    window: self.test.window,
                    qkv: &qkv,
                    kv: &*kv,
                    layer: 1,
                    output: &mut output,
                })?;
            }
            Ok(())
        };
        if together {
            backend.run(&key, &mut |r| record(r, true, true)).unwrap();
        } else {
            backend.run(&key, &mut |r| record(r, true, false)).unwrap();
        }
        if form.is_none() {
            return Vec::new();
        }
        if !together {
            backend.run(&key, &mut |r| record(r, false, true)).unwrap();
        }
        let mut output = download(backend, &output);
        let padding = output.split_off(real * heads.output_width());
        assert!(padding.iter().all(|&x| x == 0.0), "rows of padding are zeros");
        output
    }
}

/// Looped or split over blocks, fused or not, with padding or without.
fn forms_agree(opened: &Opened, heads: Heads, kv_type: KvType, lens: &[usize], window: usize) {
    let test = Attention::new(heads, kv_type, false, lens).windowed(window);
    let pages = lens.iter().max().unwrap().div_ceil(PAGE_TOKENS);
    let mut all = Sequences::new(opened, &test, kv_type);
    all.step(test.batch(usize::MAX), test.qkv.clone(), None);
    let (batch, rows) = (test.batch(1), test.rows(1));
    let looped = bits(&all.step(batch.clone(), rows.clone(), Some(PLAIN)));
    let nowhere = HostBatch { slots: vec![NONE; lens.len()], ..batch.clone() };
    let fused = Form { together: true, queries: 1, ..PLAIN };
    for form in [
        Form { padding: 2, queries: 1, pages, ..PLAIN },
        Form { padding: 1, ..fused },
        Form { pages, ..fused },
        Form { padding: 3, pages: pages + 20, ..fused },
        Form { padding: 60, ..PLAIN },
    ] {
        // Something else in the slots of the last tokens.
        all.step(batch.clone(), vec![3.0; rows.len()], None);
        let found = all.step(batch.clone(), rows.clone(), Some(form));
        let place = || format!("{}, {heads:?}, {kv_type:?}, {lens:?}, {form:?}", opened.name);
        assert_eq!(bits(&found), looped, "{}", place());
        // What the step has left in the cache, by a step that appends nothing.
        let again = all.step(nowhere.clone(), rows.clone(), Some(PLAIN));
        assert_eq!(bits(&again), looped, "the cache after {}", place());
    }
}

const SHAPES: [(usize, usize, usize); 7] =
    [(1, 1, 2), (4, 1, 100), (5, 1, 128), (8, 2, 128), (3, 3, 10), (20, 5, 64), (2, 1, 1024)];

#[test]
fn all_forms_give_the_same_bits() {
    let lens: [&[usize]; 4] = [&[1, 31, 32, 255, 256, 257], &[300], &[700], &[700, 1, 513]];
    for opened in opened() {
        for (i, (query, kv, dim)) in SHAPES.into_iter().enumerate() {
            let heads = Heads { query, kv, dim };
            let of = |kv: usize| [KvType::F16, KvType::F32][(i + kv) % 2];
            forms_agree(opened, heads, of(0), lens[0], 0);
            forms_agree(opened, heads, of(1), lens[1 + i % 3], 0);
            // In a window, of which there may be parts in two blocks, or in three.
            forms_agree(opened, heads, of(0), lens[3], [40, 257, 1, 300][i % 4]);
        }
    }
}

#[test]
fn batches_of_any_size_give_the_bits_of_one() {
    let lens = [5, 33, 1, 290, 32, 31, 64, 257];
    let heads = Heads { query: 4, kv: 2, dim: 20 };
    for (opened, window) in opened().iter().flat_map(|opened| [(opened, 0), (opened, 45)]) {
        // All tokens of the prompts at once, so that each has other tokens around it.
        let test = Attention::new(heads, KvType::F16, false, &lens).windowed(window);
        let prompt = test.batch(usize::MAX);
        let mut all = Sequences::new(opened, &test, KvType::F16);
        let found = all.step(prompt.clone(), test.qkv.clone(), Some(PLAIN));
        let form = Form { together: true, queries: 1, pages: 10, ..PLAIN };
        let decoded = all.step(test.batch(1), test.rows(1), Some(form));
        let width = heads.output_width();
        for (s, decoded) in decoded.chunks(width).enumerate() {
            let end = prompt.query_starts[s + 1] as usize;
            let prefilled = &found[(end - 1) * width..end * width];
            assert_eq!(bits(prefilled), bits(decoded), "{}, sequence {s}", opened.name);
        }
        // The first of them, and a batch of each size.
        for size in 1..=lens.len() {
            let mut batch = test.batch(1);
            batch.positions.truncate(size);
            batch.sequences.truncate(size);
            batch.slots.truncate(size);
            batch.query_starts.truncate(size + 1);
            batch.kv_lens.truncate(size);
            let rows = test.rows(1)[..size * heads.qkv_width()].to_vec();
            let found = all.step(batch, rows, Some(form));
            assert_eq!(bits(&found), bits(&decoded[..size * width]), "{}, {size}", opened.name);
        }
    }
}

/// A token with one key answers its value, as the cache holds it.
fn cached(opened: &Opened, fused: bool, key: f32, values: &[f32]) -> Vec<f32> {
    let heads = Heads { query: 1, kv: 1, dim: 128 };
    let count = values.len() / heads.dim;
    let mut backend = Wgpu::new(&opened.gpu, WgpuOptions::default().fused(fused));
    let layout =
        KvLayout { layers: 1, pages: count, kv_heads: 1, head_dim: 128, kv_type: KvType::F16 };
    let mut kv = backend.allocate_kv(layout).unwrap();
    let rows: Vec<f32> = values
        .chunks(heads.dim)
        .flat_map(|value| [&[0.25; 128], &[key; 128], value].concat())
        .collect();
    let batch = HostBatch {
        positions: vec![0; count],
        sequences: (0..count as u32).collect(),
        slots: (0..count as u32).map(|s| s * PAGE_TOKENS as u32).collect(),
        query_starts: (0..=count as u32).collect(),
        kv_lens: vec![1; count],
        page_table: (0..count as u32).collect(),
        max_pages: 1,
        ..HostBatch::default()
    };
    let batch = batch.upload(&mut backend);
    let (cos, sin) = (upload(&mut backend, &[1.0; 64]), upload(&mut backend, &[0.0; 64]));
    let mut qkv = upload(&mut backend, &rows);
    let mut output = upload(&mut backend, &vec![7.0; values.len()]);
    let step = step_key(count, usize::from(fused), 1);
    backend
        .run(&step, &mut |r| {
            r.rope_append_kv(ops::RopeAppendKv {
                rows: count,
                batch: &batch,
                heads,
                qkv: &mut qkv,
                cos: &cos,
                sin: &sin,
                query_norm: None,
                key_norm: None,
                kv: &mut kv,
                layer: 0,
            })?;
            r.paged_attention(ops::PagedAttention {
                rows: count,
                sequences: count,
                batch: &batch,
                heads,
                scale: 1.0,
                window: None,
                qkv: &qkv,
                kv: &kv,
                layer: 0,
                output: &mut output,
            })
        })
        .unwrap();
    download(&mut backend, &output)
}

#[test]
fn the_cache_rounds_to_the_nearest_even_half() {
    let mut values = Vec::new();
    // Around every kind of boundary: zero, denormals, the first normal, powers, the end.
    for half in (0..0x7c00u16).step_by(97).chain([0, 1, 2, 0x3fe, 0x3ff, 0x400, 0x401, 0x7bff]) {
        let low = f64::from(half::f16::from_bits(half).to_f32());
        let high = if half == 0x7bff {
            65536.0
        } else {
            f64::from(half::f16::from_bits(half + 1).to_f32())
        };
        let tie = ((low + high) / 2.0) as f32;
        values.extend([low as f32, tie, tie.next_up(), tie.next_down(), -tie, -tie.next_up()]);
    }
    values.extend([65503.9, 65504.0, 65519.99, 65520.0, 65535.9, 65536.0, 1e9, f32::MAX]);
    values.extend([1e-8, 2.98e-8, f32::MIN_POSITIVE, 1e-40, 0.0, -0.0]);
    let mut rng = Rng::new(3);
    values.extend((0..2000).map(|_| f32::from_bits(rng.bits() as u32)).filter(|x| !x.is_nan()));
    values.resize(values.len().next_multiple_of(128), 1.0);
    for opened in opened() {
        for fused in [false, true] {
            for (value, found) in values.iter().zip(cached(opened, fused, 0.5, &values)) {
                let expected = half::f16::from_f32(*value).to_f32();
                // The answer is `1 · value / 1`, plus zeros, which take the sign off a zero.
                assert!(
                    found == expected,
                    "{}, fused {fused}: {value:e} became {found:e}, not {expected:e}",
                    opened.name
                );
            }
        }
    }
}

#[test]
fn what_is_not_a_number_reaches_the_output() {
    for opened in opened() {
        for fused in [false, true] {
            let mut values = vec![1.0; 256];
            values[3] = f32::NAN;
            let found = cached(opened, fused, 0.5, &values);
            assert!(found[3].is_nan(), "{}", opened.name);
            assert_eq!(found[128..], [1.0; 128]);
            for key in [f32::NAN, -f32::NAN, f32::INFINITY, 1e30] {
                let found = cached(opened, fused, key, &[1.0; 128]);
                assert!(found.iter().all(|x| x.is_nan()), "{}, {key}", opened.name);
            }
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let Some(opened) = opened().first() else { return };
    let mut backend = Wgpu::new(&opened.gpu, WgpuOptions::default());
    let layout = KvLayout { layers: 1, pages: 2, kv_heads: 1, head_dim: 4, kv_type: KvType::F16 };
    let mut kv = backend.allocate_kv(layout).unwrap();
    let batch = HostBatch {
        positions: vec![0],
        sequences: vec![0],
        slots: vec![0],
        query_starts: vec![0, 1],
        page_table: vec![0],
        max_pages: 1,
        ..HostBatch::default()
    };
    let batch = batch.upload(&mut backend);
    let table = upload(&mut backend, &[1.0; 8]);
    let (mut qkv, mut output) =
        (upload(&mut backend, &[0.0; 64]), upload(&mut backend, &[0.0; 64]));
    let good = Heads { query: 2, kv: 1, dim: 4 };
    for (rows, heads, layer) in [
        (2, good, 0),
        (1, good, 1),
        (1, Heads { dim: 6, ..good }, 0),
        (1, Heads { kv: 2, ..good }, 0),
        (1, Heads { dim: 0, ..good }, 0),
        (1, Heads { kv: 0, ..good }, 0),
    ] {
        let found = backend.run(&step_key(rows, 0, 0), &mut |r| {
            r.rope_append_kv(ops::RopeAppendKv {
                rows,
                batch: &batch,
                heads,
                qkv: &mut qkv,
                cos: &table,
                sin: &table,
                query_norm: None,
                key_norm: None,
                kv: &mut kv,
                layer,
            })
        });
        assert!(matches!(found, Err(RunError::Shape { .. })), "{rows} rows, {heads:?}, {layer}");
        let found = backend.run(&step_key(rows, 0, 0), &mut |r| {
            r.paged_attention(ops::PagedAttention {
                rows,
                sequences: 1,
                batch: &batch,
                heads,
                scale: 1.0,
                window: None,
                qkv: &qkv,
                kv: &kv,
                layer,
                output: &mut output,
            })
        });
        assert!(matches!(found, Err(RunError::Shape { .. })), "{rows} rows, {heads:?}, {layer}");
    }
}

/// What a step is given may be wrong: nothing outside the cache is touched, and answers of pages
/// that are not there are not numbers.
#[test]
fn numbers_beyond_the_cache_do_no_harm() {
    let heads = Heads { query: 4, kv: 2, dim: 12 };
    for opened in opened() {
        let test = Attention::new(heads, KvType::F16, false, &[40, 300]);
        let mut all = Sequences::new(opened, &test, KvType::F16);
        all.step(test.batch(usize::MAX), test.qkv.clone(), None);
        let (batch, rows) = (test.batch(1), test.rows(1));
        let expected = bits(&all.step(batch.clone(), rows.clone(), Some(PLAIN)));
        let width = heads.output_width();
        for queries in [0, 1] {
            let form = Form { together: queries == 1, queries, pages: 10, ..PLAIN };
            // A page and slots that the cache does not have.
            let mut wrong = batch.clone();
            wrong.page_table[0] = 1 << 20;
            let found = all.any_step(wrong, rows.clone(), Some(form));
            assert!(found[..width].iter().all(|x| x.is_nan()), "{}, {form:?}", opened.name);
            assert_eq!(bits(&found[width..]), expected[width..], "{}, {form:?}", opened.name);
            // Positions beyond the page table and the rotation, tokens of no sequence.
            for position in [5000, NONE - 1, NONE] {
                let mut wrong = batch.clone();
                wrong.positions[0] = position;
                wrong.slots[0] = [NONE - 1, 1 << 16][queries];
                let found = all.any_step(wrong, rows.clone(), Some(form));
                assert_eq!(bits(&found[width..]), expected[width..], "{}, {form:?}", opened.name);
            }
        }
        let mut wrong = batch.clone();
        wrong.sequences[0] = 77;
        let found = all.any_step(wrong, rows.clone(), Some(PLAIN));
        assert!(found[..width].iter().all(|&x| x == 0.0), "{}", opened.name);
        assert_eq!(bits(&found[width..]), expected[width..], "{}", opened.name);
    }
}
