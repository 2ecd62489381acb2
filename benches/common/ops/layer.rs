//! Attention, the small ops of a layer, the head and sampling.

use trine::backend::ops::{
    Embed, GateNormQuantize, LmHead, Norm, PagedAttention, RopeAppendKv, Sample, SampleRow, Score,
    allocate_quantized,
};
use trine::backend::{Backend, KvLayout, KvType, PAGE_TOKENS, Record};
use trine::checkpoint::synthetic::SyntheticModel;
use trine::error::RunError;
use trine::model::activations::{Activations, Reserve};
use trine::model::weights::WeightSource;

use super::super::Failure;
use super::{Bench, Op, norm};

/// Bytes that the KV cache may take.
const KV_BYTES: usize = 4 << 30;

/// Lengths that attention is measured at.
const CONTEXTS: [usize; 3] = [128, 1024, 4096];

/// Rows up to which each is a sequence of its own; more are a prompt.
const SEQUENCES: usize = 256;

impl<B: Backend> Bench<'_, B> {
    /// All that is not a product.
    pub(super) fn rest(&mut self) -> Result<(), Failure> {
        let config = &self.plan.config.clone();
        let (hidden, ffn, heads) = (config.hidden, config.ffn, config.heads);
        let most = self.plan.rows.iter().copied().max().unwrap_or(1);
        let sequences = most.min(SEQUENCES);
        let position_bytes = 2 * heads.kv * heads.dim * KvType::F16.size();
        let budget = KV_BYTES / (config.layers * position_bytes * PAGE_TOKENS);
        let longest = CONTEXTS[2].max(most);
        let reserve = Reserve {
            context: longest,
            sequences,
            step_tokens: most,
            kv_pages: budget.min(sequences * longest.div_ceil(PAGE_TOKENS)),
            kv_type: KvType::F16,
        };
        let layout: KvLayout = reserve.kv_layout(config);
        let source = SyntheticModel::new(config.clone(), 1)?;
        let table = self.device.load_table(source.embedding()?)?;
        let mut kv = self.device.allocate_kv(layout)?;
        let mut a = Activations::allocate(
            &mut self.device,
            config,
            &reserve,
            &trine::model::weights::AdapterSizes::default(),
        )?;
        let gain = self.floats(hidden.max(ffn))?;
        let probe = self.floats(1)?;
        let count = 4 * config.layers;
        let with = |gain| Norm::<B> { gain, eps: 1e-5 };
        for &rows in &self.plan.rows.clone() {
            let prompt = rows > SEQUENCES;
            for context in CONTEXTS {
                // A prompt is as long as it is.
                let context = if prompt { rows } else { context };
                let each = context.div_ceil(PAGE_TOKENS);
                let members = if prompt { 1 } else { rows };
                if members * each > layout.pages {
                    continue;
                }
                self.write_batch(&mut a, rows, context, members)?;
                let op = |name, bytes| Op {
                    context,
                    queries: if prompt { rows } else { 1 },
                    ..Op::new(name, rows, config.layers, bytes)
                };
                let scale = 1.0 / (heads.dim as f32).sqrt();
                let bytes = members * context * position_bytes;
                self.time(op("paged_attention", bytes), &probe, &mut |r| {
                    (0..config.layers).try_for_each(|layer| {
                        r.paged_attention(PagedAttention {
                            rows,
                            sequences: members,
                            batch: &a.batch,
                            heads,
                            scale,
                            window: None,
                            qkv: &a.qkv,
                            kv: &kv,
                            layer,
                            output: &mut a.attended,
                        })
                    })
                })?;
                let appended = rows * (4 * heads.qkv_width() + position_bytes);
                self.time(
                    op("rope_append_kv and paged_attention", bytes + appended),
                    &probe,
                    &mut |r| {
                        (0..config.layers).try_for_each(|layer| {
                            r.rope_append_kv(RopeAppendKv {
                                rows,
                                batch: &a.batch,
                                heads,
                                qkv: &mut a.qkv,
                                cos: &a.rope.cos,
                                sin: &a.rope.sin,
                                query_norm: None,
                                key_norm: None,
                                kv: &mut kv,
                                layer,
                            })?;
                            r.paged_attention(PagedAttention {
                                rows,
                                sequences: members,
                                batch: &a.batch,
                                heads,
                                scale,
                                window: None,
                                qkv: &a.qkv,
                                kv: &kv,
                                layer,
                                output: &mut a.attended,
                            })
                        })
                    },
                )?;
                if prompt {
                    break;
                }
            }
            self.time(
                Op::new("rms_norm_quantize", rows, count, rows * hidden * 4),
                &probe,
                &mut |r| {
                    (0..count).try_for_each(|_| {
                        norm(r, rows, hidden, &a.residual, Some(&gain), &mut a.hidden)
                    })
                },
            )?;
            self.time(
                Op::new("gate_norm_quantize", rows, count, rows * ffn * 8),
                &probe,
                &mut |r| {
                    (0..count).try_for_each(|_| {
                        r.gate_norm_quantize(GateNormQuantize {
                            rows,
                            width: ffn,
                            gate_up: &a.gate_up,
                            activation: config.activation,
                            norm: Some(with(&gain)),
                            quantized: &mut a.gated,
                            normed: None,
                        })
                    })
                },
            )?;
            self.time(Op::new("embed", rows, count, rows * hidden * 2), &probe, &mut |r| {
                (0..count).try_for_each(|_| {
                    r.embed(Embed {
                        rows,
                        batch: &a.batch,
                        lanes: &mut a.lanes,
                        table: &table,
                        scale: 1.0,
                        output: &mut a.residual,
                        width: hidden,
                    })
                })
            })?;
            // One pass of the head has no more rows than this.
            let pass = rows.min(reserve.logit_rows(config));
            if pass < rows {
                continue;
            }
            let vocabulary = config.vocabulary;
            let count = 8;
            self.time(
                Op::new("lm_head", rows, count, vocabulary * hidden * 2),
                &probe,
                &mut |r| {
                    (0..count).try_for_each(|_| {
                        r.lm_head(LmHead {
                            rows,
                            first: 0,
                            width: hidden,
                            vocabulary,
                            batch: &a.batch,
                            input: &a.residual,
                            norm: with(&gain),
                            table: &table,
                            normed: &mut a.normed,
                            logits: &mut a.logits,
                        })
                    })
                },
            )?;
            let bytes = rows * vocabulary * 4;
            for (name, greedy, logprobs) in [
                ("sample, greedy", true, false),
                ("sample, with options", false, false),
                ("sample, with log-probabilities", false, true),
            ] {
                self.time(Op::new(name, rows, count, bytes), &probe, &mut |r| {
                    (0..count).try_for_each(|_| {
                        r.sample(Sample {
                            rows,
                            first: 0,
                            vocabulary,
                            greedy,
                            logprobs,
                            batch: &a.batch,
                            lanes: &mut a.lanes,
                            logits: &a.logits,
                            samples: &mut a.samples,
                        })
                    })
                })?;
            }
            self.time(Op::new("score", rows, count, bytes), &probe, &mut |r| {
                (0..count).try_for_each(|_| {
                    r.score(Score {
                        rows,
                        first: 0,
                        vocabulary,
                        batch: &a.batch,
                        logits: &a.logits,
                        samples: &mut a.samples,
                    })
                })
            })?;
        }
        // Something small that depends on what was before it: the price of a launch.
        let mut quantized = allocate_quantized(&self.device, "bench", 1, 256)?;
        self.time(Op::new("a launch (rms_norm_quantize 256)", 1, count, 1024), &probe, &mut |r| {
            (0..count).try_for_each(|_| norm(r, 1, 256, &a.residual, Some(&gain), &mut quantized))
        })
    }

    /// A step in which `members` sequences of `context` tokens bring `rows` tokens between them.
    fn write_batch(
        &mut self,
        a: &mut Activations<B>,
        rows: usize,
        context: usize,
        members: usize,
    ) -> Result<(), RunError> {
        let each = context.div_ceil(PAGE_TOKENS);
        let queries = rows / members;
        let first = context - queries;
        let of = |f: &dyn Fn(usize) -> usize, len: usize| -> Vec<u32> {
            (0..len).map(|index| f(index) as u32).collect()
        };
        let page = |member: usize, index: usize| member * each + index.min(each - 1);
        let position = |row: usize| first + row % queries;
        let slot = |row: usize| {
            let at = position(row);
            page(row / queries, at / PAGE_TOKENS) * PAGE_TOKENS + at % PAGE_TOKENS
        };
        let max_pages = a.batch.max_pages;
        let (device, batch) = (&mut self.device, &mut a.batch);
        device.write(&mut batch.tokens, &of(&|row| row * 7 % 400, rows))?;
        device.write(&mut batch.positions, &of(&position, rows))?;
        device.write(&mut batch.sequences, &of(&|row| row / queries, rows))?;
        device.write(&mut batch.slots, &of(&slot, rows))?;
        device.write(&mut batch.query_starts, &of(&|member| member * queries, members + 1))?;
        device.write(&mut batch.kv_lens, &of(&|_| context, members))?;
        let table = of(&|entry| page(entry / max_pages, entry % max_pages), members * max_pages);
        device.write(&mut batch.page_table, &table)?;
        device.write(&mut batch.lanes, &of(&|member| member, members))?;
        device.write(&mut batch.logit_rows, &of(&|row| row, rows))?;
        device.write(&mut batch.targets, &of(&|row| row % 400, rows))?;
        let options = |lane| SampleRow {
            lane: lane as u32,
            length: context as u32,
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            repetition_penalty: 1.0,
            seed_low: lane as u32,
            logprobs: 5,
            ..Default::default()
        };
        let options: Vec<_> = (0..members).map(options).collect();
        device.write(&mut batch.sample_rows, &options)
    }
}
