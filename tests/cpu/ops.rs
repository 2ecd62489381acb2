//! Every op of the CPU backend: the same bits for every instruction set of this machine, for any
//! number of threads, and for a row alone as among others; and near a naive sum in f64.

use std::num::NonZeroUsize;

use crate::common::*;
use trine::backend::cpu::{Buffer, Cpu, Table};
use trine::backend::ops::*;
use trine::backend::reference::{cached_head, quantize_head};
use trine::backend::{Backend, KvLayout, KvType, NONE, PAGE_TOKENS, Record, quantized_stride};
use trine::tensor::FloatType;

const WIDTHS: [usize; 12] = [1, 3, 15, 16, 63, 64, 65, 100, 255, 257, 640, 2560];

/// Results of quantising, as bits.
fn quantized_bits(cpu: &mut Cpu, q: &Quantized<Cpu>, rows: usize, width: usize) -> Vec<u32> {
    let mut bits: Vec<u32> = Vec::new();
    let values = cpu.read(&q.values, rows * quantized_stride(width)).unwrap();
    bits.extend(values.into_iter().map(|q| q as u32));
    bits.extend(cpu.read(&q.scales, rows).unwrap().into_iter().map(f32::to_bits));
    bits.extend(cpu.read(&q.sums, rows).unwrap().into_iter().map(|q| q as u32));
    bits
}

fn rms_norm_quantize(
    cpu: &mut Cpu,
    input: &[f32],
    width: usize,
    gain: Option<&[f32]>,
    with_normed: bool,
) -> (Vec<u32>, Vec<f32>) {
    let rows = input.len() / width;
    let input = buffer(cpu, input);
    let gain = gain.map(|gain| buffer(cpu, gain));
    let mut quantized = allocate_quantized(cpu, "q", rows, width).unwrap();
    // What was there before must not show.
    quantized.values.fill(77);
    let mut normed: Buffer<f32> = cpu.allocate("normed", rows * width).unwrap();
    step(cpu, |r| {
        r.rms_norm_quantize(RmsNormQuantize {
            rows,
            width,
            input: &input,
            norm: gain.as_ref().map(|gain| Norm { gain, eps: 1e-5 }),
            quantized: &mut quantized,
            normed: with_normed.then_some(&mut normed),
        })
    });
    (quantized_bits(cpu, &quantized, rows, width), normed.to_vec())
}

#[test]
fn low_rank_products() {
    let mut random = Random(21);
    for (width, rank, features) in [(1, 1, 1), (65, 5, 63), (255, 9, 130), (640, 32, 300)] {
        let rows = 5;
        let (input, down) = (random.floats(rows * width, 3.0), random.floats(rank * width, 1.0));
        let (up, into) = (random.floats(rank * features, 1.0), random.floats(rows * features, 1.0));
        let run = |cpu: &mut Cpu, rows: std::ops::Range<usize>| {
            let input = buffer(cpu, &input[rows.start * width..rows.end * width]);
            let mut output = buffer(cpu, &into[rows.start * features..rows.end * features]);
            let (down, up) = (buffer(cpu, &down), buffer(cpu, &up));
            let mut inner: Buffer<f32> = cpu.allocate("inner", rows.len() * rank).unwrap();
            step(cpu, |r| {
                r.low_rank(LowRank {
                    rows: rows.len(),
                    width,
                    rank,
                    features,
                    input: &input,
                    down: &down,
                    up: &up,
                    inner: &mut inner,
                    output: &mut output,
                    stride: features,
                    column: 0,
                })
            });
            output.iter().map(|x| x.to_bits()).collect::<Vec<u32>>()
        };
        let together = on_all(|cpu| run(cpu, 0..rows));
        let alone = on_all(|cpu| run(cpu, 3..4));
        assert_eq!(alone[..], together[3 * features..4 * features], "alone as among others");
        for (at, &bits) in together.iter().enumerate() {
            let (t, n) = (at / features, at % features);
            let product = |j: usize| {
                let row = &down[j * width..][..width];
                row.iter().zip(&input[t * width..]).map(|(&a, &b)| f64::from(a) * f64::from(b))
            };
            let inner: Vec<f64> = (0..rank).map(|j| product(j).sum()).collect();
            let size: f64 = (0..rank).map(|j| inner[j].abs()).sum::<f64>() + 1.0;
            let sum: f64 = (0..rank).map(|j| inner[j] * f64::from(up[j * features + n])).sum();
            let error = f64::from(into[at]) + sum - f64::from(f32::from_bits(bits));
            assert!(error.abs() <= 1e-5 * size, "{width} {rank} {features}: {error}");
        }
    }
}

#[test]
fn norms_quantised() {
    let mut random = Random(1);
    for width in WIDTHS {
        let rows = 5;
        let mut input = random.floats(rows * width, 3.0);
        // A row of zeros, and one that is tiny.
        input[..width].fill(0.0);
        input[width..2 * width].iter_mut().for_each(|x| *x *= 1e-9);
        let gain = random.floats(width, 1.0);
        for gain in [Some(&gain[..]), None] {
            let (bits, normed) = on_all(|cpu| {
                let (bits, normed) = rms_norm_quantize(cpu, &input, width, gain, true);
                let (without, _) = rms_norm_quantize(cpu, &input, width, gain, false);
                assert_eq!(bits, without, "the second output changes nothing");
                (bits, normed)
            });
            let stride = quantized_stride(width);
            for row in 0..rows {
                let x = &input[row * width..][..width];
                let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
                let factor = 1.0 / (mean + 1e-5).sqrt();
                let mut sum = 0;
                let mut absmax = 1e-5f32;
                for i in 0..width {
                    let y = normed[row * width + i];
                    let exact = match gain {
                        Some(gain) => f64::from(x[i]) * factor * f64::from(gain[i]),
                        None => f64::from(x[i]),
                    };
                    assert!((f64::from(y) - exact).abs() <= 1e-6 * exact.abs() + 1e-12);
                    absmax = absmax.max(y.abs());
                }
                let scale = 127.0 / absmax;
                assert_eq!(bits[rows * stride + row], scale.to_bits());
                for i in 0..stride {
                    let expected = match normed.get(row * width + i) {
                        Some(y) if i < width => (y * scale).round_ties_even() as i32,
                        _ => 0,
                    };
                    sum += expected;
                    assert_eq!(bits[row * stride + i] as i32, expected, "{width} {row} {i}");
                }
                assert_eq!(bits[rows * (stride + 1) + row] as i32, sum);
            }
            // Alone as among others.
            let row = 3;
            let (alone, _) = on_all(|cpu| {
                rms_norm_quantize(cpu, &input[row * width..][..width], width, gain, true)
            });
            assert_eq!(alone[..stride], bits[row * stride..][..stride]);
        }
    }
}

#[test]
fn what_is_not_finite_stays_visible() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for (width, at) in [(40, 3), (40, 39)] {
            let mut input = vec![1.0; width];
            input[at] = bad;
            for gain in [None, Some(&vec![1.0f32; width][..])] {
                let (bits, _) =
                    on_all_nan(|cpu| rms_norm_quantize(cpu, &input, width, gain, false));
                let scale = f32::from_bits(bits[quantized_stride(width)]);
                assert!(!(1.0 / scale).is_finite(), "{bad} at {at} gave the scale {scale}");
            }
        }
    }
}

#[test]
fn norms_of_gathered_rows() {
    let mut random = Random(2);
    for width in [1, 17, 64, 2560] {
        let input = random.floats(6 * width, 2.0);
        let gain = random.floats(width, 1.0);
        let gather = [9, 9, 5, NONE, 0, 5];
        let norm = |epilogue| {
            on_all(|cpu| {
                let (input, gain, gather) =
                    (buffer(cpu, &input), buffer(cpu, &gain), buffer(cpu, &gather));
                let mut output: Buffer<f32> = cpu.allocate("output", 4 * width).unwrap();
                output.fill(9.0);
                step(cpu, |r| {
                    r.rms_norm(RmsNorm {
                        rows: 4,
                        width,
                        input: &input,
                        gather: Some(&gather),
                        first: 2,
                        norm: Norm { gain: &gain, eps: 1e-6 },
                        output: &mut output,
                        epilogue,
                    })
                });
                bits(&output)
            })
        };
        let added = norm(Epilogue::Add);
        assert_eq!(added[..width], added[3 * width..], "row 5 twice");
        assert!(added[width..2 * width].iter().all(|&x| x == 9f32.to_bits()), "nothing is added");
        let out = norm(Epilogue::Store);
        for (&sum, &y) in added.iter().zip(&out) {
            let (sum, y) = (f32::from_bits(sum), f32::from_bits(y));
            assert!((sum - (9.0 + y)).abs() <= 2e-6 * (9.0 + y.abs()), "{sum} is not 9 + {y}");
        }
        assert_eq!(out[..width], out[3 * width..], "row 5 twice");
        assert!(out[width..2 * width].iter().all(|&x| x == 0), "padding is zeros");
    }
}

#[test]
fn gates() {
    let mut random = Random(3);
    for width in [1, 3, 16, 65, 257, 640] {
        for activation in [Activation::Relu2, Activation::Silu, Activation::GeluTanh] {
            let rows = 3;
            let gate_up = random.floats(rows * 2 * width, 4.0);
            let gain = random.floats(width, 1.0);
            for with_norm in [false, true] {
                let (bits, floats) = on_all(|cpu| {
                    let (gate_up, gain) = (buffer(cpu, &gate_up), buffer(cpu, &gain));
                    let mut quantized = allocate_quantized(cpu, "q", rows, width).unwrap();
                    let mut normed: Buffer<f32> = cpu.allocate("n", rows * width).unwrap();
                    step(cpu, |r| {
                        r.gate_norm_quantize(GateNormQuantize {
                            rows,
                            width,
                            gate_up: &gate_up,
                            activation,
                            norm: with_norm.then_some(Norm { gain: &gain, eps: 1e-5 }),
                            quantized: &mut quantized,
                            normed: Some(&mut normed),
                        })
                    });
                    (quantized_bits(cpu, &quantized, rows, width), normed.to_vec())
                });
                assert!(!bits.is_empty());
                for row in 0..rows {
                    let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
                    let exact: Vec<f64> =
                        (0..width).map(|i| act(activation, gate[i]) * f64::from(up[i])).collect();
                    let mean = exact.iter().map(|y| y * y).sum::<f64>() / width as f64;
                    let factor = 1.0 / (mean + 1e-5).sqrt();
                    for i in 0..width {
                        let y = match with_norm {
                            true => exact[i] * factor * f64::from(gain[i]),
                            false => exact[i],
                        };
                        let found = f64::from(floats[row * width + i]);
                        assert!((found - y).abs() <= 3e-6 * y.abs() + 1e-9, "{found} {y}");
                    }
                }
            }
        }
    }
}

fn act(activation: Activation, x: f32) -> f64 {
    let x = f64::from(x);
    match activation {
        Activation::Relu2 => x.max(0.0).powi(2),
        Activation::Silu => x / (1.0 + (-x).exp()),
        _ => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + u.tanh())
        }
    }
}

#[test]
fn embeddings() {
    let mut random = Random(4);
    let (vocabulary, width) = (11, 37);
    for float in [FloatType::Bf16, FloatType::F16, FloatType::F32] {
        let table = random.table(vocabulary, width, float);
        let out = on_all(|cpu| {
            let mut batch = batch(cpu, 7, 3, 4);
            batch.tokens[..7].copy_from_slice(&[3, 10, 11, NONE, 1 << 31, 1 << 31 | 1, 3]);
            batch.positions[..7].copy_from_slice(&[0, 1, 2, 0, 5, 0, 8]);
            batch.sequences[..7].copy_from_slice(&[0, 0, 0, 0, 1, 2, 1]);
            batch.lanes[..3].copy_from_slice(&[2, 0, 1]);
            let mut lanes = lanes(cpu, 3, 8);
            lanes.history.fill(99);
            lanes.sampled.copy_from_slice(&[7, 500, 0]);
            let table = cpu.load_table(table.clone()).unwrap();
            let mut output: Buffer<f32> = cpu.allocate("output", 7 * width).unwrap();
            output.fill(9.0);
            step(cpu, |r| {
                r.embed(Embed {
                    rows: 7,
                    batch: &batch,
                    lanes: &mut lanes,
                    table: &table,
                    scale: 1.5,
                    output: &mut output,
                    width,
                })
            });
            let mut expected = [99; 24];
            (expected[16], expected[17], expected[5]) = (3, 10, 7);
            assert_eq!(lanes.history[..], expected);
            output.to_vec()
        });
        let mut row = vec![0.0; width];
        for (at, token) in
            [Some(3), Some(10), None, None, Some(7), None, Some(3)].iter().enumerate()
        {
            match token {
                Some(token) => table.read_row(*token, &mut row),
                None => row.fill(0.0),
            }
            for (found, expected) in out[at * width..][..width].iter().zip(&row) {
                assert_eq!(*found, expected * 1.5);
            }
        }
    }
}

fn lm_head(
    cpu: &mut Cpu,
    table: &Table,
    (vocabulary, width): (usize, usize),
    input: &[f32],
    gather: &[u32],
) -> (Vec<u32>, Vec<f32>) {
    let rows = gather.len();
    let mut batch = batch(cpu, 1, 1, rows + 1);
    batch.logit_rows[1..].copy_from_slice(gather);
    let input = buffer(cpu, input);
    let gain = buffer(cpu, &vec![0.5f32; width]);
    let mut normed: Buffer<f32> = cpu.allocate("normed", rows * width).unwrap();
    let mut logits: Buffer<f32> = cpu.allocate("logits", rows * vocabulary).unwrap();
    logits.fill(9.0);
    step(cpu, |r| {
        r.lm_head(LmHead {
            rows,
            first: 1,
            width,
            vocabulary,
            batch: &batch,
            input: &input,
            norm: Norm { gain: &gain, eps: 1e-5 },
            table,
            normed: &mut normed,
            logits: &mut logits,
        })
    });
    (bits(&logits), normed.to_vec())
}

#[test]
fn output_heads() {
    let mut random = Random(5);
    for (vocabulary, width) in [(1, 1), (3, 15), (4, 16), (61, 100), (130, 640), (5, 2560)] {
        for float in [FloatType::Bf16, FloatType::F16, FloatType::F32] {
            let table = random.table(vocabulary, width, float);
            let input = random.floats(18 * width, 1.0);
            let gather: Vec<u32> =
                (0..17).map(|r| if r % 7 == 3 { NONE } else { 17 - r }).collect();
            let all = on_all(|cpu| {
                let table = cpu.load_table(table.clone()).unwrap();
                let shape = (vocabulary, width);
                let (all, normed) = lm_head(cpu, &table, shape, &input, &gather);
                for rows in [1, 2, 5, 6, 8] {
                    for start in [0, 4, 9] {
                        let gather = &gather[start..start + rows];
                        let (some, _) = lm_head(cpu, &table, shape, &input, gather);
                        assert_eq!(some, all[start * vocabulary..][..rows * vocabulary]);
                    }
                }
                (all, normed)
            });
            let mut row = vec![0.0; width];
            for (r, logits) in all.0.chunks(vocabulary).enumerate() {
                for (v, &logit) in logits.iter().enumerate() {
                    table.read_row(v, &mut row);
                    let normed = &all.1[r * width..][..width];
                    let terms = || row.iter().zip(normed).map(|(a, b)| f64::from(a * b));
                    let (exact, size) = (
                        row.iter()
                            .zip(normed)
                            .map(|(&a, &b)| f64::from(a) * f64::from(b))
                            .sum::<f64>(),
                        terms().map(f64::abs).sum::<f64>(),
                    );
                    let found = f64::from(f32::from_bits(logit));
                    assert!((found - exact).abs() <= 1e-5 * size + 1e-30, "{found} {exact}");
                }
            }
            assert!(all.0[3 * vocabulary..4 * vocabulary].iter().all(|&x| x == 0));
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let mut cpu = cpu_of(None, 1);
    let cpu = &mut cpu;
    let input = buffer(cpu, &[1.0f32; 10]);
    let gain = buffer(cpu, &[1.0f32; 3]);
    let mut output: Buffer<f32> = cpu.allocate("output", 10).unwrap();
    let gather = buffer(cpu, &[4u32]);
    let mut try_norm = |rows, width, gather| {
        let mut result = Ok(());
        step_result(cpu, |r| {
            result = r.rms_norm(RmsNorm {
                rows,
                width,
                input: &input,
                gather,
                first: 0,
                norm: Norm { gain: &gain, eps: 1e-5 },
                output: &mut output,
                epilogue: Epilogue::Store,
            });
            result.clone()
        })
    };
    assert!(try_norm(3, 3, None).is_ok());
    assert!(try_norm(4, 3, None).is_err());
    assert!(try_norm(1, 4, None).is_err());
    let error = try_norm(1, 3, Some(&gather)).unwrap_err().to_string();
    assert!(error.contains("row 4"), "{error}");
}

// --- rotary positions, the cache and attention ---

/// A sequence's queries, keys and values, run in chunks; the outputs of all its tokens.
struct Conversation<'a> {
    heads: Heads,
    kv_type: KvType,
    qkv: &'a [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    gains: Option<&'a [f32]>,
    /// How many keys a query sees.
    window: Option<NonZeroUsize>,
    /// Tokens of each step.
    chunks: &'a [usize],
    /// Run beside another sequence of a few tokens.
    company: bool,
}

impl Conversation<'_> {
    fn run(&self, cpu: &mut Cpu) -> Vec<u32> {
        let heads = self.heads;
        let (width, out_width) = (heads.qkv_width(), heads.output_width());
        let tokens = self.qkv.len() / width;
        let pages = tokens.div_ceil(PAGE_TOKENS) + 2;
        let layout = KvLayout {
            layers: 2,
            pages: 2 * pages,
            kv_heads: heads.kv,
            head_dim: heads.dim,
            kv_type: self.kv_type,
        };
        let mut kv = cpu.allocate_kv(layout).unwrap();
        let (cos, sin) = (buffer(cpu, self.cos), buffer(cpu, self.sin));
        let gain = self.gains.map(|gain| buffer(cpu, gain));
        let norm = || gain.as_ref().map(|gain| Norm { gain, eps: 1e-6 });
        let scale = 1.0 / (heads.dim as f32).sqrt();
        // Pages in no order; the other sequence has the odd ones.
        let page = |i: usize| 2 * (pages - 1 - i);
        let slot = |t: usize| (page(t / PAGE_TOKENS) * PAGE_TOKENS + t % PAGE_TOKENS) as u32;
        let mut outputs = Vec::new();
        let mut done = 0;
        for &chunk in self.chunks {
            let other = if self.company { 3 } else { 0 };
            let rows = chunk + other + 2;
            let mut batch = batch(cpu, rows, 3, 1);
            batch.max_pages = pages;
            batch.page_table = cpu.allocate("page_table", 3 * pages).unwrap();
            batch.slots.fill(NONE);
            for t in 0..other {
                batch.positions[t] = t as u32;
                batch.slots[t] = (PAGE_TOKENS + t) as u32;
            }
            batch.page_table[0] = 1;
            for i in 0..pages {
                batch.page_table[pages + i] = page(i) as u32;
            }
            for t in 0..chunk {
                batch.positions[other + t] = (done + t) as u32;
                batch.sequences[other + t] = 1;
                batch.slots[other + t] = slot(done + t);
            }
            let end = (other + chunk) as u32;
            batch.query_starts[..4].copy_from_slice(&[0, other as u32, end, end]);
            batch.kv_lens[..3].copy_from_slice(&[other as u32, (done + chunk) as u32, 0]);
            let mut qkv: Buffer<f32> = cpu.allocate("qkv", rows * width).unwrap();
            qkv.fill(0.25);
            qkv[other * width..][..chunk * width]
                .copy_from_slice(&self.qkv[done * width..][..chunk * width]);
            let mut output: Buffer<f32> = cpu.allocate("output", rows * out_width).unwrap();
            output.fill(9.0);
            let (sequences, layer) = (3, 1);
            step(cpu, |r| {
                r.rope_append_kv(RopeAppendKv {
                    rows,
                    batch: &batch,
                    heads,
                    qkv: &mut qkv,
                    cos: &cos,
                    sin: &sin,
                    query_norm: norm(),
                    key_norm: norm(),
                    kv: &mut kv,
                    layer,
                })?;
                r.paged_attention(PagedAttention {
                    rows,
                    sequences,
                    batch: &batch,
                    heads,
                    scale,
                    window: self.window,
                    qkv: &qkv,
                    kv: &kv,
                    layer,
                    output: &mut output,
                })
            });
            let padding = &output[(other + chunk) * out_width..];
            assert!(padding.iter().all(|&x| x == 0.0), "padding is zeros");
            outputs.extend(bits(&output[other * out_width..][..chunk * out_width]));
            done += chunk;
        }
        outputs
    }

    /// The same in f64, without a cache.
    fn naive(&self) -> Vec<f64> {
        let Heads { query, kv, dim } = self.heads;
        let (width, half) = (self.heads.qkv_width(), dim / 2);
        let tokens = self.qkv.len() / width;
        let head = |t: usize, h: usize| -> Vec<f64> {
            let mut x: Vec<f64> =
                self.qkv[t * width + h * dim..][..dim].iter().map(|&x| f64::from(x)).collect();
            if h >= query + kv {
                return x;
            }
            if let Some(gain) = self.gains {
                let mean = x.iter().map(|x| x * x).sum::<f64>() / dim as f64;
                for (x, &gain) in x.iter_mut().zip(gain) {
                    *x *= f64::from(gain) / (mean + 1e-6).sqrt();
                }
            }
            for i in 0..half {
                let (c, s) = (f64::from(self.cos[t * half + i]), f64::from(self.sin[t * half + i]));
                (x[i], x[i + half]) = (x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s);
            }
            x
        };
        let mut out = Vec::new();
        for t in 0..tokens {
            for h in 0..query {
                let q = head(t, h);
                let g = h / (query / kv);
                // By transformers' rule: those with `t − window < u ≤ t`.
                let sees =
                    |u: &usize| self.window.is_none_or(|w| *u as i64 > t as i64 - w.get() as i64);
                let scores: Vec<f64> = (0..=t)
                    .filter(sees)
                    .map(|u| {
                        let k = head(u, query + g);
                        q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() / (dim as f64).sqrt()
                    })
                    .collect();
                let top = scores.iter().copied().fold(f64::MIN, f64::max);
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                let mut row = vec![0.0; dim];
                for (u, score) in (0..=t).filter(sees).zip(&scores) {
                    for (o, v) in row.iter_mut().zip(head(u, query + kv + g)) {
                        *o += (score - top).exp() / total * v;
                    }
                }
                out.extend(row);
            }
        }
        out
    }
}

#[test]
fn attention_is_the_same_in_any_chunks_and_near_the_truth() {
    let mut random = Random(6);
    for (query, kv, dim, tokens) in [
        (4, 1, 16, 70),
        (3, 1, 20, 40),
        (2, 2, 64, 33),
        (5, 5, 2, 9),
        (10, 2, 100, 34),
        (1, 1, 16, 600),
    ] {
        let heads = Heads { query, kv, dim };
        let qkv = random.floats(tokens * heads.qkv_width(), 2.0);
        let angles = random.floats(tokens * dim / 2, 3.0);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let gains = random.floats(dim, 1.0);
        for (kv_type, gains, tolerance) in [
            (KvType::F32, None, 2e-5),
            (KvType::F16, Some(&gains[..]), 6e-3),
            (KvType::Int8, None, 6e-2),
        ] {
            let whole = Conversation {
                heads,
                kv_type,
                qkv: &qkv,
                cos: &cos,
                sin: &sin,
                gains,
                window: None,
                chunks: &[tokens],
                company: false,
            };
            let expected = on_all(|cpu| whole.run(cpu));
            for (found, exact) in expected.iter().zip(whole.naive()) {
                let found = f64::from(f32::from_bits(*found));
                assert!((found - exact).abs() < tolerance, "{found} {exact} {heads:?}");
            }
            let ones = vec![1; tokens];
            for chunks in [&[1, tokens - 1][..], &[tokens - 2, 2], &[5, tokens - 6, 1], &ones] {
                let found = on_all_of(&[1, 3], |cpu| {
                    Conversation { chunks, company: true, ..whole }.run(cpu)
                });
                assert!(found == expected, "{heads:?} in {} chunks", chunks.len());
            }
        }
    }
}

/// Windows of one key, of less and more than a page and a block, and of all keys and more.
#[test]
fn a_window_shows_the_latest_keys_alone() {
    let mut random = Random(9);
    for (query, kv, dim, tokens, windows) in [
        (3, 1, 20, 70, &[1, 2, 31, 32, 33, 69, 70, 1000][..]),
        (5, 5, 2, 9, &[1, 4]),
        (1, 1, 16, 600, &[1, 5, 64, 255, 256, 257, 511, 599]),
        (4, 2, 64, 300, &[100]),
    ] {
        let heads = Heads { query, kv, dim };
        let qkv = random.floats(tokens * heads.qkv_width(), 2.0);
        let (cos, sin) = (vec![1.0; tokens * dim / 2], vec![0.0; tokens * dim / 2]);
        let (cos, sin, gains) = (&cos[..], &sin[..], None);
        for (i, &window) in windows.iter().enumerate() {
            let window = NonZeroUsize::new(window);
            let (kv_type, tolerance) =
                [(KvType::F32, 2e-5), (KvType::F16, 6e-3), (KvType::Int8, 6e-2)][i % 3];
            let (qkv, chunks, company) = (&qkv[..], &[tokens][..], false);
            let whole =
                Conversation { heads, kv_type, qkv, cos, sin, gains, window, chunks, company };
            let expected = on_all(|cpu| whole.run(cpu));
            for (found, exact) in expected.iter().zip(whole.naive()) {
                let found = f64::from(f32::from_bits(*found));
                assert!((found - exact).abs() < tolerance, "{found} {exact} {heads:?} {window:?}");
            }
            let ones = vec![1; tokens];
            for chunks in [&[1, tokens - 1][..], &[5, tokens - 6, 1], &ones] {
                let found = on_all_of(&[1, 3], |cpu| {
                    Conversation { chunks, company: true, ..whole }.run(cpu)
                });
                assert!(found == expected, "{heads:?}, {window:?} in {} chunks", chunks.len());
            }
        }
    }
}

/// The integers and the scale of `ops::RopeAppendKv`, worked out by hand.
#[test]
fn heads_are_quantized_to_int8() {
    for (head, expected, scale) in [
        // With a scale of 1, the halves go to the even neighbour.
        (&[127.0f32, -63.5, 0.5, 1.5, 2.5, -0.5][..], &[127i8, -64, 0, 2, 2, 0][..], 1.0f32),
        (&[-254.0, 3.0, 5.0, 254.0], &[-127, 2, 2, 127], 2.0),
        (&[0.0, -0.0], &[0, 0], 1e-30 / 127.0),
        (&[1e-30, -1e-32], &[127, -1], 1e-30 / 127.0),
        (&[f32::MAX, -f32::MAX / 2.0], &[127, -64], f32::MAX / 127.0),
    ] {
        let mut found = vec![9; head.len()];
        assert_eq!(quantize_head(head, &mut found), scale, "{head:?}");
        assert_eq!(found, expected, "{head:?}");
    }
    for fault in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(quantize_head(&[1.0, fault], &mut [9; 2]).is_nan());
        let read = cached_head(&[1.0, fault], KvType::Int8);
        assert!(read.iter().all(|x| x.is_nan()), "{read:?}");
    }
}

/// Each of the heads and each of keys and values has a scale of its own, and they are counted.
#[test]
fn scales_are_part_of_what_a_cache_takes() {
    let layout = |kv_type| KvLayout { layers: 30, pages: 4, kv_heads: 5, head_dim: 128, kv_type };
    for (kv_type, per_token) in [
        (KvType::F32, 30 * 5 * 2 * 128 * 4),
        (KvType::F16, 30 * 5 * 2 * 128 * 2),
        (KvType::Int8, 30 * 5 * 2 * (128 + 4)),
    ] {
        assert_eq!(layout(kv_type).bytes(), Some(4 * PAGE_TOKENS * per_token));
    }
    let huge = KvLayout { head_dim: usize::MAX, ..layout(KvType::Int8) };
    assert_eq!(huge.bytes(), None);
}

/// A value that is not a number is met by the tokens that see it, and by none before.
#[test]
fn faults_in_an_int8_cache_reach_what_follows() {
    let heads = Heads { query: 2, kv: 1, dim: 4 };
    let (tokens, width) = (9, heads.qkv_width());
    let qkv = Random(8).floats(tokens * width, 1.0);
    let (cos, sin) = (vec![1.0; tokens * 2], vec![0.0; tokens * 2]);
    let run = |qkv: &[f32], chunks: &[usize]| {
        let (kv_type, gains, company) = (KvType::Int8, None, true);
        let (cos, sin, window) = (&cos, &sin, None);
        let test = Conversation { heads, kv_type, qkv, cos, sin, gains, window, chunks, company };
        on_all_nan(|cpu| (test.run(cpu), Vec::new())).0
    };
    let good = run(&qkv, &[tokens]);
    for element in [2 * 4 + 1, 3 * 4 + 2] {
        for fault in [f32::NAN, f32::INFINITY] {
            let mut bad = qkv.clone();
            bad[5 * width + element] = fault;
            for chunks in [&[tokens][..], &[5, 1, 3]] {
                let found = run(&bad, chunks);
                let (before, after) = found.split_at(5 * heads.output_width());
                assert!(after.iter().all(|&x| f32::from_bits(x).is_nan()), "{fault} {element}");
                assert!(before == &good[..before.len()], "{fault} in {element}");
            }
        }
    }
}

#[test]
fn bad_slots_and_pages_are_errors() {
    let mut cpu = cpu_of(None, 2);
    let heads = Heads { query: 1, kv: 1, dim: 16 };
    let layout = KvLayout { layers: 1, pages: 1, kv_heads: 1, head_dim: 16, kv_type: KvType::F32 };
    let mut kv = cpu.allocate_kv(layout).unwrap();
    let table = buffer(&mut cpu, &[1.0f32; 8]);
    let mut batch = batch(&mut cpu, 1, 1, 1);
    batch.page_table = buffer(&mut cpu, &[7]);
    batch.max_pages = 1;
    batch.query_starts[1] = 1;
    batch.slots[0] = PAGE_TOKENS as u32;
    let mut qkv: Buffer<f32> = cpu.allocate("qkv", 48).unwrap();
    let mut output: Buffer<f32> = cpu.allocate("output", 16).unwrap();
    let error = step_result(&mut cpu, |r| {
        r.rope_append_kv(RopeAppendKv {
            rows: 1,
            batch: &batch,
            heads,
            qkv: &mut qkv,
            cos: &table,
            sin: &table,
            query_norm: None,
            key_norm: None,
            kv: &mut kv,
            layer: 0,
        })
    });
    assert!(error.unwrap_err().to_string().contains("slots"));
    let error = step_result(&mut cpu, |r| {
        r.paged_attention(PagedAttention {
            rows: 1,
            sequences: 1,
            batch: &batch,
            heads,
            scale: 1.0,
            window: None,
            qkv: &qkv,
            kv: &kv,
            layer: 0,
            output: &mut output,
        })
    });
    assert!(error.unwrap_err().to_string().contains("page_table"));
}
