//! Attention on CUDA: it is that of the reference, every form of its kernels gives the same bits,
//! and the cache rounds as it should.

use crate::common::attention::Attention;
use crate::common::host::HostBatch;
use crate::common::rng::Rng;
use crate::common::run::{bits, download, upload};
use trine::backend::cuda::{Cuda, CudaOptions};
use trine::backend::ops::{self, Heads};
use trine::backend::reference::{attend, cached_head};
use trine::backend::{Backend, KvLayout, KvType, LogitUse, NONE, PAGE_TOKENS, Record, StepKey};
use trine::error::RunError;
use trine::model::activations::rope_tables;

/// A backend, if there is a device: fused, but nothing is kept.
fn open() -> Option<Cuda> {
    crate::common::cuda::open(CudaOptions::default())
}

/// Sequences, and their cache on a device.
struct Sequences<'a> {
    test: &'a Attention,
    backend: Cuda,
    kv: <Cuda as Backend>::KvCache,
    cos: Vec<f32>,
    sin: Vec<f32>,
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
    fn new(test: &'a Attention, kv_type: KvType) -> Option<Self> {
        let prompt = test.batch(usize::MAX);
        let layout = KvLayout {
            layers: 2,
            pages: *prompt.slots.iter().max().unwrap() as usize / PAGE_TOKENS + 1,
            kv_heads: test.heads.kv,
            head_dim: test.heads.dim,
            kv_type,
        };
        let context = *prompt.kv_lens.iter().max().unwrap() as usize;
        let backend = open()?;
        let kv = backend.allocate_kv(layout).unwrap();
        let (cos, sin) = rope_tables(10_000.0, test.heads.dim, context);
        Some(Self { test, backend, kv, cos, sin })
    }

    /// Without a rotation: keys are in the cache as they are given.
    fn unrotated(mut self) -> Self {
        self.cos.fill(1.0);
        self.sin.fill(0.0);
        self
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
        let Self { backend, kv, cos, sin, .. } = self;
        let (cos, sin) = (upload(backend, cos), upload(backend, sin));
        let (batch, mut qkv) = (batch.upload(backend), upload(backend, &rows));
        let mut output = upload(backend, &vec![f32::NAN; count * heads.output_width()]);
        let key = step_key(count, queries, pages);
        let mut record = |r: &mut <Cuda as Backend>::Recorder<'_>, rope: bool, attention: bool| {
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

/// The last tokens of each sequence, many rows of a step, against the reference in f64.
fn agrees(heads: Heads, kv_type: KvType, lens: &[usize], queries: usize, window: usize) {
    let test = Attention::new(heads, kv_type, false, lens).windowed(window);
    let Some(all) = Sequences::new(&test, kv_type) else { return };
    let mut all = all.unrotated();
    all.step(test.batch(usize::MAX), test.qkv.clone(), None);
    let (batch, rows) = (test.batch(queries), test.rows(queries));
    let form = Form { padding: 3, ..PLAIN };
    let found = all.step(batch.clone(), rows.clone(), Some(form));
    let of_heads = test.qkv.chunks(heads.dim);
    let kv: Vec<f32> = of_heads.flat_map(|head| cached_head(head, kv_type)).collect();
    let (dim, width) = (heads.dim, heads.qkv_width());
    let starts: Vec<usize> = (0..lens.len()).map(|s| lens[..s].iter().sum()).collect();
    for (t, found) in found.chunks(heads.output_width()).enumerate() {
        let sequence = batch.sequences[t] as usize;
        let position = batch.positions[t] as usize;
        let unseen = if window == 0 { 0 } else { (position + 1).saturating_sub(window) };
        let tokens = starts[sequence] + unseen..=starts[sequence] + position;
        let mut expected = vec![0.0; heads.output_width()];
        for (h, expected) in expected.chunks_mut(dim).enumerate() {
            let kv_head = h / (heads.query / heads.kv);
            let of = |first: usize| -> Vec<&[f32]> {
                let at = (first + kv_head) * dim;
                tokens.clone().map(|token| &kv[token * width + at..][..dim]).collect()
            };
            let (keys, values) = (of(heads.query), of(heads.query + heads.kv));
            let query = &rows[t * width + h * dim..][..dim];
            attend(query, &keys, &values, 1.0 / (dim as f32).sqrt(), expected);
        }
        let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (i, (e, f)) in expected.iter().zip(found).enumerate() {
            assert!(
                (e - f).abs() <= 1e-5 * largest,
                "{heads:?}, {kv_type:?}, {lens:?}: token {t}, element {i} is {f}, not {e}"
            );
        }
    }
}

#[test]
fn attention_is_that_of_the_reference() {
    let shapes = [
        (1, 1, 2),
        (3, 1, 6),
        (4, 1, 64),
        (8, 2, 128),
        (5, 1, 80),
        (7, 1, 100),
        (3, 3, 16),
        (2, 1, 176),
        (4, 1, 256),
        (18, 1, 32),
        (40, 2, 8),
        (1, 1, 1024),
    ];
    for (i, (query, kv, dim)) in shapes.into_iter().enumerate() {
        let heads = Heads { query, kv, dim };
        let lens: [&[usize]; 3] = [&[1, 31, 32, 33, 70], &[255, 2, 257], &[256, 40, 3]];
        for kv_type in [KvType::F16, KvType::F32, KvType::Int8] {
            agrees(heads, kv_type, lens[i % 3], 2, 0);
        }
    }
    let heads = Heads { query: 4, kv: 1, dim: 32 };
    agrees(heads, KvType::F16, &[600, 100], 40, 0);
    agrees(heads, KvType::F32, &[600, 100], 3, 0);
    agrees(heads, KvType::Int8, &[600, 100], 40, 0);
}

/// Windows of one key, of less and more than a page, a part and a block, and of more than all keys.
#[test]
fn attention_in_windows_is_that_of_the_reference() {
    let shapes = [(4, 1, 64), (5, 1, 128), (3, 1, 256), (3, 1, 6), (7, 1, 100), (18, 1, 32)];
    for (i, (query, kv, dim)) in shapes.into_iter().enumerate() {
        let heads = Heads { query, kv, dim };
        for (j, kv_type) in [KvType::F16, KvType::F32, KvType::Int8].into_iter().enumerate() {
            let windows: [&[usize]; 3] = [&[1, 33, 64, 300], &[2, 65, 256], &[31, 128, 257]];
            for &window in windows[(i + j) % 3] {
                agrees(heads, kv_type, &[300, 70, 3], 18, window);
            }
        }
    }
}

/// Large and small numbers: halves of queries and weights must hold them.
#[test]
fn no_magnitude_is_lost() {
    for (factor, kv_type) in [1e-6, 1e6]
        .into_iter()
        .flat_map(|f| [KvType::F16, KvType::Int8].map(|kv_type| (f, kv_type)))
    {
        let heads = Heads { query: 2, kv: 1, dim: 16 };
        let mut test = Attention::new(heads, kv_type, false, &[90]);
        for row in test.qkv.chunks_mut(heads.qkv_width()) {
            let (queries, rest) = row.split_at_mut(32);
            queries.iter_mut().for_each(|x| *x *= factor);
            rest[..16].iter_mut().for_each(|x| *x /= factor.min(1.0) * 1e4);
        }
        let Some(all) = Sequences::new(&test, kv_type) else { return };
        let mut all = all.unrotated();
        all.step(test.batch(usize::MAX), test.qkv.clone(), Some(PLAIN));
    }
}

/// Looped or split over parts, fused or not, with padding or without.
fn forms_agree(heads: Heads, kv_type: KvType, lens: &[usize], window: usize) {
    let test = Attention::new(heads, kv_type, false, lens).windowed(window);
    let pages = lens.iter().max().unwrap().div_ceil(PAGE_TOKENS);
    let Some(mut all) = Sequences::new(&test, kv_type) else { return };
    all.step(test.batch(usize::MAX), test.qkv.clone(), None);
    let (batch, rows) = (test.batch(1), test.rows(1));
    let looped = bits(&all.step(batch.clone(), rows.clone(), Some(PLAIN)));
    let nowhere = HostBatch { slots: vec![NONE; lens.len()], ..batch.clone() };
    let fused = Form { together: true, queries: 1, ..PLAIN };
    for form in [
        Form { padding: 2, queries: 1, pages, ..PLAIN },
        Form { queries: 1, ..PLAIN },
        Form { padding: 1, ..fused },
        Form { pages, ..fused },
        Form { padding: 3, pages: pages + 20, ..fused },
        Form { padding: 60, ..PLAIN },
    ] {
        // Something else in the slots of the last tokens.
        all.step(batch.clone(), vec![3.0; rows.len()], None);
        let found = all.step(batch.clone(), rows.clone(), Some(form));
        let place = || format!("{heads:?}, {kv_type:?}, {lens:?}, {form:?}");
        assert_eq!(bits(&found), looped, "{}", place());
        // What the step has left in the cache, by a step that appends nothing.
        let again = all.step(nowhere.clone(), rows.clone(), Some(PLAIN));
        assert_eq!(bits(&again), looped, "the cache after {}", place());
    }
}

const SHAPES: [(usize, usize, usize); 10] = [
    (1, 1, 2),
    (4, 1, 100),
    (5, 1, 128),
    (8, 2, 128),
    (3, 3, 10),
    (20, 5, 64),
    (2, 1, 1024),
    (3, 1, 256),
    (20, 1, 48),
    (2, 2, 192),
];

#[test]
fn all_forms_give_the_same_bits() {
    let lens: [&[usize]; 4] = [&[1, 31, 32, 255, 256, 257], &[300], &[700], &[600, 1, 513]];
    for (i, (query, kv, dim)) in SHAPES.into_iter().enumerate() {
        let heads = Heads { query, kv, dim };
        let others = if dim % 16 == 0 { KvType::F16 } else { KvType::F32 };
        forms_agree(heads, KvType::F16, lens[i % 4], 0);
        forms_agree(heads, others, lens[(i + 1) % 4], 0);
        forms_agree(heads, KvType::Int8, lens[(i + 2) % 4], 0);
        // In a window, of which there may be parts in two blocks, or in three.
        let windows = [40, 257, 1, 300];
        forms_agree(heads, KvType::F16, lens[3], windows[i % 4]);
        forms_agree(heads, others, lens[2], windows[(i + 1) % 4]);
        forms_agree(heads, KvType::Int8, lens[1 + i % 3], windows[(i + 2) % 4]);
    }
}

#[test]
fn batches_of_any_size_give_the_bits_of_one() {
    let lens = [5, 33, 1, 290, 32, 31, 64, 257];
    for (dim, kv_type) in [
        (20, KvType::F16),
        (16, KvType::F16),
        (12, KvType::F32),
        (20, KvType::Int8),
        (16, KvType::Int8),
    ] {
        let heads = Heads { query: 4, kv: 2, dim };
        // All tokens of the prompts at once, so that each has other tokens around it.
        let test = Attention::new(heads, kv_type, false, &lens);
        let prompt = test.batch(usize::MAX);
        let Some(mut all) = Sequences::new(&test, kv_type) else { return };
        let found = all.step(prompt.clone(), test.qkv.clone(), Some(PLAIN));
        let form = Form { together: true, queries: 1, pages: 10, ..PLAIN };
        let decoded = all.step(test.batch(1), test.rows(1), Some(form));
        let width = heads.output_width();
        for (s, decoded) in decoded.chunks(width).enumerate() {
            let end = prompt.query_starts[s + 1] as usize;
            let prefilled = &found[(end - 1) * width..end * width];
            assert_eq!(bits(prefilled), bits(decoded), "sequence {s}");
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
            assert_eq!(bits(&found), bits(&decoded[..size * width]), "{size}");
        }
    }
}

/// A prompt of one sequence, cut at these places, each piece one step; the answers of all tokens.
fn in_pieces(test: &Attention, kv_type: KvType, cuts: &[usize]) -> Option<Vec<u32>> {
    let whole = test.batch(usize::MAX);
    let width = test.heads.qkv_width();
    let mut all = Sequences::new(test, kv_type)?;
    let mut found = Vec::new();
    let ends = cuts.iter().copied().chain([whole.positions.len()]);
    let mut start = 0;
    for end in ends {
        let batch = HostBatch {
            positions: whole.positions[start..end].to_vec(),
            sequences: vec![0; end - start],
            slots: whole.slots[start..end].to_vec(),
            query_starts: vec![0, (end - start) as u32],
            kv_lens: vec![end as u32],
            ..whole.clone()
        };
        let rows = test.qkv[start * width..end * width].to_vec();
        let queries = usize::from(end - start == 1);
        let form = Form { together: true, queries, pages: end.div_ceil(32), ..PLAIN };
        found.extend(bits(&all.any_step(batch, rows, Some(form))));
        start = end;
    }
    Some(found)
}

#[test]
fn a_prompt_in_pieces_gives_the_bits_of_the_whole() {
    for (query, kv, dim, kv_type) in [
        (4, 1, 128, KvType::F16),
        (5, 1, 64, KvType::F16),
        (3, 1, 256, KvType::F16),
        (4, 1, 12, KvType::F16),
        (7, 1, 8, KvType::F32),
        (4, 1, 128, KvType::Int8),
        (3, 1, 256, KvType::Int8),
        (4, 1, 12, KvType::Int8),
    ] {
        let heads = Heads { query, kv, dim };
        for window in [0, 70] {
            let test = Attention::new(heads, kv_type, false, &[330]).windowed(window);
            let Some(whole) = in_pieces(&test, kv_type, &[]) else { return };
            for cuts in [
                vec![1, 2, 3, 63, 64, 65, 66, 127, 128, 200],
                vec![255, 256, 257, 258],
                vec![17, 50, 51, 328, 329],
            ] {
                let found = in_pieces(&test, kv_type, &cuts).unwrap();
                assert!(found == whole, "{heads:?}, {kv_type:?}, {window}, cut at {cuts:?}");
            }
        }
    }
}

/// A fault of a token reaches those that see it, and none behind them, whatever shares a tile.
#[test]
fn a_fault_goes_no_further_than_its_window() {
    for (dim, kv_type) in [
        (128, KvType::F16),
        (256, KvType::F16),
        (12, KvType::F16),
        (8, KvType::F32),
        (128, KvType::Int8),
        (12, KvType::Int8),
    ] {
        let heads = Heads { query: 3, kv: 1, dim };
        let (window, width) = (20, heads.output_width());
        let test = || Attention::new(heads, kv_type, false, &[130]).windowed(window);
        let Some(expected) = in_pieces(&test(), kv_type, &[]) else { return };
        for (token, element) in [(1, 3 * dim + 5), (66, 4 * dim + 7), (64, 4 * dim)] {
            let mut bad = test();
            bad.qkv[token * heads.qkv_width() + element] = f32::NAN;
            let place = format!("{heads:?}, {kv_type:?}: element {element} of token {token}");
            for cuts in [&[][..], &[token, token + 1, token + 40]] {
                let found = in_pieces(&bad, kv_type, cuts).unwrap();
                let after = (token + window) * width;
                assert!(found[..token * width] == expected[..token * width], "{place}");
                assert!(found[after..] == expected[after..], "{place}");
                for rows in found[token * width..after].chunks(width) {
                    assert!(rows.iter().any(|&x| f32::from_bits(x).is_nan()), "{place}");
                }
            }
        }
    }
}

/// A fault of a token reaches all after it, and none before it, whatever they share a tile with.
#[test]
fn tokens_before_a_fault_do_not_see_it() {
    for (dim, kv_type) in [
        (128, KvType::F16),
        (256, KvType::F16),
        (12, KvType::F16),
        (8, KvType::F32),
        (128, KvType::Int8),
        (12, KvType::Int8),
    ] {
        let heads = Heads { query: 3, kv: 1, dim };
        let good = Attention::new(heads, kv_type, false, &[130]);
        let Some(expected) = in_pieces(&good, kv_type, &[]) else { return };
        let width = heads.output_width();
        for (token, element) in
            [(1, 3 * dim + 5), (66, 4 * dim + 7), (66, 4 * dim), (129, 5 * dim - 1)]
        {
            for fault in [f32::NAN, f32::INFINITY] {
                // Where the cache holds infinity, a score of −∞ is one like any other.
                if kv_type == KvType::F32 && fault.is_infinite() && element < 4 * dim {
                    continue;
                }
                let mut bad = Attention::new(heads, kv_type, false, &[130]);
                bad.qkv[token * heads.qkv_width() + element] = fault;
                let found = in_pieces(&bad, kv_type, &[]).unwrap();
                let place = || {
                    format!("{heads:?}, {kv_type:?}: {fault} in element {element} of token {token}")
                };
                assert!(found[..token * width] == expected[..token * width], "{}", place());
                // The elements of an int8 value share its scale.
                let value = element.checked_sub(4 * dim).filter(|_| kv_type != KvType::Int8);
                for (i, &x) in found[token * width..].iter().enumerate() {
                    let (x, hit) = (f32::from_bits(x), value.is_none_or(|e| i % dim == e));
                    assert_eq!(!x.is_finite(), hit, "{} in {i}", place());
                }
                let cut = in_pieces(&bad, kv_type, &[token]).unwrap();
                let same = |a: &u32, b: &u32| {
                    a == b || f32::from_bits(*a).is_nan() && f32::from_bits(*b).is_nan()
                };
                assert!(found.iter().zip(&cut).all(|(a, b)| same(a, b)), "{}", place());
            }
        }
    }
}

/// A token with one key answers its value, as the cache holds it.
fn cached(kv_type: KvType, fused: bool, key: f32, values: &[f32]) -> Option<Vec<f32>> {
    let heads = Heads { query: 1, kv: 1, dim: 128 };
    let count = values.len() / heads.dim;
    let mut backend = crate::common::cuda::open(CudaOptions::default().fused(fused))?;
    let layout = KvLayout { layers: 1, pages: count, kv_heads: 1, head_dim: 128, kv_type };
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
    Some(download(&mut backend, &output))
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
    for fused in [false, true] {
        let Some(found) = cached(KvType::F16, fused, 0.5, &values) else { return };
        for (value, found) in values.iter().zip(found) {
            let expected = half::f16::from_f32(*value).to_f32();
            // The answer is `1 · value / 1`, plus zeros, which take the sign off a zero. What f16
            // cannot hold is a fault.
            assert!(
                found == expected || expected.is_infinite() && found.is_nan(),
                "fused {fused}: {value:e} became {found:e}, not {expected:e}"
            );
        }
    }
}

/// Fused or not, small and large, with zeros and with what is below the floor of the scale.
#[test]
fn an_int8_cache_holds_the_integers_of_the_reference() {
    let mut rng = Rng::new(4);
    let mut values = Vec::new();
    for size in [1.0, 0.0, 1e-3, 3e4, 1e-20, 1e-31, 1e-38, 1e30] {
        values.extend(rng.normals(128, 1.0).iter().map(|x| x * size));
        // Halves between two integers, with a scale of one.
        values.extend((0..128).map(|i| if i == 0 { 127.0 } else { i as f32 - 64.5 }));
    }
    for fused in [false, true] {
        let Some(found) = cached(KvType::Int8, fused, 0.5, &values) else { return };
        for (value, found) in values.chunks(128).zip(found.chunks(128)) {
            let expected = cached_head(value, KvType::Int8);
            let step = expected.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
            // Weights have 22 bits, so a thousandth of a step is far more than they may be off.
            for (e, f) in expected.iter().zip(found) {
                assert!((e - f).abs() <= 1e-3 * step, "fused {fused}: {f:e} and not {e:e}");
            }
        }
    }
}

#[test]
fn what_is_not_a_number_reaches_the_output() {
    for fused in [false, true] {
        let mut values = vec![1.0; 256];
        values[3] = f32::NAN;
        let Some(found) = cached(KvType::F16, fused, 0.5, &values) else { return };
        assert!(found[3].is_nan());
        assert_eq!(found[128..], [1.0; 128]);
        for key in [f32::NAN, -f32::NAN, f32::INFINITY, 1e30] {
            let found = cached(KvType::F16, fused, key, &[1.0; 128]).unwrap();
            assert!(found.iter().all(|x| x.is_nan()), "{key}");
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let Some(mut backend) = open() else { return };
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
    let dims = [12, 16].into_iter();
    for (dim, kv_type) in dims.flat_map(|dim| [(dim, KvType::F16), (dim, KvType::Int8)]) {
        let heads = Heads { query: 4, kv: 2, dim };
        let test = Attention::new(heads, kv_type, false, &[40, 300]);
        let Some(mut all) = Sequences::new(&test, kv_type) else { return };
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
            assert!(found[..width].iter().all(|x| x.is_nan()), "{form:?}");
            assert_eq!(bits(&found[width..]), expected[width..], "{form:?}");
            // Positions beyond the page table and the rotation, tokens of no sequence.
            for position in [5000, NONE - 1, NONE] {
                let mut wrong = batch.clone();
                wrong.positions[0] = position;
                wrong.slots[0] = [NONE - 1, 1 << 16][queries];
                let found = all.any_step(wrong, rows.clone(), Some(form));
                assert_eq!(bits(&found[width..]), expected[width..], "{form:?}");
            }
        }
        let mut wrong = batch.clone();
        wrong.sequences[0] = 77;
        let found = all.any_step(wrong, rows.clone(), Some(PLAIN));
        assert!(found[..width].iter().all(|&x| x == 0.0));
        assert_eq!(bits(&found[width..]), expected[width..]);
    }
}
