//! The toy's recordings: each op with its arguments as text, to compare, and as a closure, to run.

use trine::backend::reference::ReferenceRecorder;
use trine::backend::{NONE, Record, ops};
use trine::error::RunError;

use super::control::Control;
use super::kept::{Group, KeptNorm, Wrong, spoil, spoil_quantized, with_norm};
use super::{Shared, Toy};

type Ran = Result<(), RunError>;

/// An op as it was recorded.
struct RecordedOp {
    name: &'static str,
    /// Sizes, numbers and ids of all arguments.
    arguments: String,
    run: Box<dyn Fn(&Control) -> Ran + Send + Sync>,
}

/// The ops of a step; keeps alive what they name.
pub(crate) struct Recording(Vec<RecordedOp>);

impl Recording {
    pub(super) fn run(&self, control: &Control) -> Ran {
        for op in &self.0 {
            control.fault(op.name)?;
            (op.run)(control)?;
        }
        Ok(())
    }

    /// The first op in which two recordings differ.
    pub(super) fn difference(&self, other: &Self) -> Option<String> {
        let (kept, again) = (&self.0, &other.0);
        let differ = kept.iter().zip(again).position(|(kept, again)| {
            (kept.name, &kept.arguments) != (again.name, &again.arguments)
        });
        match differ {
            Some(index) => {
                let (kept, again) = (&kept[index], &again[index]);
                Some(format!(
                    "op {index} was {} ({}) and is {} ({})",
                    kept.name, kept.arguments, again.name, again.arguments
                ))
            }
            None if kept.len() != again.len() => {
                Some(format!("there were {} ops and are {}", kept.len(), again.len()))
            }
            None => None,
        }
    }
}

#[derive(Default)]
pub(crate) struct ToyRecorder(Vec<RecordedOp>);

impl ToyRecorder {
    pub(super) fn finish(self) -> Recording {
        Recording(self.0)
    }

    fn push(
        &mut self,
        name: &'static str,
        arguments: String,
        run: impl Fn(&Control) -> Ran + Send + Sync + 'static,
    ) -> Ran {
        self.0.push(RecordedOp { name, arguments, run: Box::new(run) });
        Ok(())
    }
}

impl Record<Toy> for ToyRecorder {
    fn embed(&mut self, op: ops::Embed<'_, Toy>) -> Ran {
        let ops::Embed { rows, width, scale, .. } = op;
        let (batch, lanes) = (op.batch.handles(), op.lanes.handles());
        let (table, output) = (op.table.clone(), op.output.clone());
        let arguments = format!(
            "rows {rows}, width {width}, scale {scale}, {}, {}, table {}, output {}",
            batch.arguments(),
            lanes.arguments(),
            table.id,
            output.id
        );
        self.push("embed", arguments, move |control| {
            let (table, mut output) = (table.get(), output.get_mut());
            batch.with(|batch| {
                lanes.with(|lanes| {
                    ReferenceRecorder.embed(ops::Embed {
                        rows,
                        batch,
                        lanes,
                        table: &table,
                        scale,
                        output: &mut output,
                        width,
                    })?;
                    spoil(control, "embed", "output", &mut output);
                    spoil(control, "embed", "history", &mut lanes.history);
                    Ok(())
                })
            })
        })
    }

    fn rms_norm(&mut self, op: ops::RmsNorm<'_, Toy>) -> Ran {
        let ops::RmsNorm { rows, width, first, epilogue, .. } = op;
        let (input, gather) = (op.input.clone(), op.gather.cloned());
        let (norm, output) = (KeptNorm::of(op.norm), op.output.clone());
        let arguments = format!(
            "rows {rows}, width {width}, first {first}, {epilogue:?}, input {}, gather {:?}, norm {}, \
             output {}",
            input.id,
            gather.as_ref().map(|gather| gather.id),
            KeptNorm::arguments(Some(&norm)),
            output.id
        );
        self.push("rms_norm", arguments, move |control| {
            let gather = gather.as_ref().map(Shared::get);
            let mut output = output.get_mut();
            ReferenceRecorder.rms_norm(ops::RmsNorm {
                rows,
                width,
                input: &input.get(),
                gather: gather.as_deref(),
                first,
                norm: ops::Norm { gain: &norm.gain.get(), eps: norm.eps },
                output: &mut output,
                epilogue,
            })?;
            spoil(control, "rms_norm", "output", &mut output);
            Ok(())
        })
    }

    fn rms_norm_quantize(&mut self, op: ops::RmsNormQuantize<'_, Toy>) -> Ran {
        const OP: &str = "rms_norm_quantize";
        let ops::RmsNormQuantize { rows, width, .. } = op;
        let (input, quantized) = (op.input.clone(), op.quantized.handles());
        let (norm, normed) = (op.norm.map(KeptNorm::of), op.normed.map(|normed| normed.clone()));
        let arguments = format!(
            "rows {rows}, width {width}, input {}, norm {}, {}, normed {:?}",
            input.id,
            KeptNorm::arguments(norm.as_ref()),
            quantized.arguments(),
            normed.as_ref().map(|normed| normed.id)
        );
        self.push(OP, arguments, move |control| {
            let mut normed = normed.as_ref().map(Shared::get_mut);
            quantized.with(|quantized| {
                with_norm(norm.as_ref(), |norm| {
                    ReferenceRecorder.rms_norm_quantize(ops::RmsNormQuantize {
                        rows,
                        width,
                        input: &input.get(),
                        norm,
                        quantized,
                        normed: normed.as_deref_mut(),
                    })
                })?;
                spoil_quantized(control, OP, quantized);
                if let Some(normed) = normed.as_deref_mut() {
                    spoil(control, OP, "normed", normed);
                }
                Ok(())
            })
        })
    }

    fn ternary_matmul(&mut self, op: ops::TernaryMatmul<'_, Toy>) -> Ran {
        let ops::TernaryMatmul { rows, width, features, stride, column, epilogue, .. } = op;
        let (input, weight, output) = (op.input.handles(), op.weight.clone(), op.output.clone());
        let arguments = format!(
            "rows {rows}, width {width}, features {features}, stride {stride}, column {column}, \
             {epilogue:?}, {}, weight {}, output {}",
            input.arguments(),
            weight.id,
            output.id
        );
        self.push("ternary_matmul", arguments, move |control| {
            let mut output = output.get_mut();
            input.with(|input| {
                ReferenceRecorder.ternary_matmul(ops::TernaryMatmul {
                    rows,
                    width,
                    features,
                    input,
                    weight: &weight.get(),
                    output: &mut output,
                    stride,
                    column,
                    epilogue,
                })
            })?;
            spoil(control, "ternary_matmul", "output", &mut output);
            Ok(())
        })
    }

    fn low_rank(&mut self, op: ops::LowRank<'_, Toy>) -> Ran {
        let ops::LowRank { rows, width, rank, features, stride, column, .. } = op;
        let (input, down, up) = (op.input.clone(), op.down.clone(), op.up.clone());
        let (inner, output) = (op.inner.clone(), op.output.clone());
        let arguments = format!(
            "rows {rows}, width {width}, rank {rank}, features {features}, stride {stride}, \
             column {column}, input {}, down {}, up {}, inner {}, output {}",
            input.id, down.id, up.id, inner.id, output.id
        );
        self.push("low_rank", arguments, move |control| {
            let (mut inner, mut output) = (inner.get_mut(), output.get_mut());
            ReferenceRecorder.low_rank(ops::LowRank {
                rows,
                width,
                rank,
                features,
                input: &input.get(),
                down: &down.get(),
                up: &up.get(),
                inner: &mut inner,
                output: &mut output,
                stride,
                column,
            })?;
            spoil(control, "low_rank", "inner", &mut inner);
            spoil(control, "low_rank", "output", &mut output);
            Ok(())
        })
    }

    fn rope_append_kv(&mut self, op: ops::RopeAppendKv<'_, Toy>) -> Ran {
        const OP: &str = "rope_append_kv";
        let ops::RopeAppendKv { rows, heads, layer, .. } = op;
        let (batch, qkv, kv) = (op.batch.handles(), op.qkv.clone(), op.kv.clone());
        let (cos, sin) = (op.cos.clone(), op.sin.clone());
        let (query_norm, key_norm) =
            (op.query_norm.map(KeptNorm::of), op.key_norm.map(KeptNorm::of));
        let arguments = format!(
            "rows {rows}, {heads:?}, layer {layer}, {}, qkv {}, cos {}, sin {}, norms {} {}, kv {}",
            batch.arguments(),
            qkv.id,
            cos.id,
            sin.id,
            KeptNorm::arguments(query_norm.as_ref()),
            KeptNorm::arguments(key_norm.as_ref()),
            kv.id
        );
        self.push(OP, arguments, move |control| {
            let (mut qkv, mut kv) = (qkv.get_mut(), kv.get_mut());
            batch.with(|batch| {
                with_norm(query_norm.as_ref(), |query_norm| {
                    with_norm(key_norm.as_ref(), |key_norm| {
                        ReferenceRecorder.rope_append_kv(ops::RopeAppendKv {
                            rows,
                            batch,
                            heads,
                            qkv: &mut qkv,
                            cos: &cos.get(),
                            sin: &sin.get(),
                            query_norm,
                            key_norm,
                            kv: &mut kv,
                            layer,
                        })
                    })
                })?;
                spoil(control, OP, "queries", &mut qkv);
                if let Some(element) = control.spoiled(OP, "values") {
                    let slot = batch.slots[element];
                    assert_ne!(slot, NONE, "a spoiled value must be one that is written");
                    let (key, value) = kv.load(layer, slot as usize, 0);
                    let (key, mut value) = (key.to_vec(), value.to_vec());
                    value[0] = value[0].wrong();
                    kv.store(layer, slot as usize, 0, &key, &value);
                }
                Ok(())
            })
        })
    }

    fn paged_attention(&mut self, op: ops::PagedAttention<'_, Toy>) -> Ran {
        let ops::PagedAttention { rows, sequences, heads, scale, window, layer, .. } = op;
        let (batch, qkv) = (op.batch.handles(), op.qkv.clone());
        let (kv, output) = (op.kv.clone(), op.output.clone());
        let arguments = format!(
            "rows {rows}, sequences {sequences}, {heads:?}, scale {scale}, window {window:?}, \
             layer {layer}, {}, qkv {}, kv {}, output {}",
            batch.arguments(),
            qkv.id,
            kv.id,
            output.id
        );
        self.push("paged_attention", arguments, move |control| {
            let mut output = output.get_mut();
            batch.with(|batch| {
                ReferenceRecorder.paged_attention(ops::PagedAttention {
                    rows,
                    sequences,
                    batch,
                    heads,
                    scale,
                    window,
                    qkv: &qkv.get(),
                    kv: &kv.get(),
                    layer,
                    output: &mut output,
                })
            })?;
            spoil(control, "paged_attention", "output", &mut output);
            Ok(())
        })
    }

    fn gate_norm_quantize(&mut self, op: ops::GateNormQuantize<'_, Toy>) -> Ran {
        const OP: &str = "gate_norm_quantize";
        let ops::GateNormQuantize { rows, width, activation, .. } = op;
        let (gate_up, quantized) = (op.gate_up.clone(), op.quantized.handles());
        let (norm, normed) = (op.norm.map(KeptNorm::of), op.normed.map(|normed| normed.clone()));
        let arguments = format!(
            "rows {rows}, width {width}, {activation:?}, gate and up {}, norm {}, {}, normed {:?}",
            gate_up.id,
            KeptNorm::arguments(norm.as_ref()),
            quantized.arguments(),
            normed.as_ref().map(|normed| normed.id)
        );
        self.push(OP, arguments, move |control| {
            let mut normed = normed.as_ref().map(Shared::get_mut);
            quantized.with(|quantized| {
                with_norm(norm.as_ref(), |norm| {
                    ReferenceRecorder.gate_norm_quantize(ops::GateNormQuantize {
                        rows,
                        width,
                        gate_up: &gate_up.get(),
                        activation,
                        norm,
                        quantized,
                        normed: normed.as_deref_mut(),
                    })
                })?;
                spoil_quantized(control, OP, quantized);
                if let Some(normed) = normed.as_deref_mut() {
                    spoil(control, OP, "normed", normed);
                }
                Ok(())
            })
        })
    }

    fn lm_head(&mut self, op: ops::LmHead<'_, Toy>) -> Ran {
        let ops::LmHead { rows, first, width, vocabulary, .. } = op;
        let (batch, input, norm) = (op.batch.handles(), op.input.clone(), KeptNorm::of(op.norm));
        let (table, normed, logits) = (op.table.clone(), op.normed.clone(), op.logits.clone());
        let arguments = format!(
            "rows {rows}, first {first}, width {width}, vocabulary {vocabulary}, {}, input {}, \
             norm {}, table {}, normed {}, logits {}",
            batch.arguments(),
            input.id,
            KeptNorm::arguments(Some(&norm)),
            table.id,
            normed.id,
            logits.id
        );
        self.push("lm_head", arguments, move |control| {
            let (mut normed, mut logits) = (normed.get_mut(), logits.get_mut());
            batch.with(|batch| {
                ReferenceRecorder.lm_head(ops::LmHead {
                    rows,
                    first,
                    width,
                    vocabulary,
                    batch,
                    input: &input.get(),
                    norm: ops::Norm { gain: &norm.gain.get(), eps: norm.eps },
                    table: &table.get(),
                    normed: &mut normed,
                    logits: &mut logits,
                })
            })?;
            spoil(control, "lm_head", "normed", &mut normed);
            spoil(control, "lm_head", "logits", &mut logits);
            Ok(())
        })
    }

    fn sample(&mut self, op: ops::Sample<'_, Toy>) -> Ran {
        const OP: &str = "sample";
        let ops::Sample { rows, first, vocabulary, greedy, logprobs, .. } = op;
        let (batch, lanes) = (op.batch.handles(), op.lanes.handles());
        let (logits, samples) = (op.logits.clone(), op.samples.handles());
        let arguments = format!(
            "rows {rows}, first {first}, vocabulary {vocabulary}, greedy {greedy}, \
             logprobs {logprobs}, {}, {}, logits {}, {}",
            batch.arguments(),
            lanes.arguments(),
            logits.id,
            samples.arguments()
        );
        self.push(OP, arguments, move |control| {
            batch.with(|batch| {
                lanes.with(|lanes| {
                    samples.with(|samples| {
                        ReferenceRecorder.sample(ops::Sample {
                            rows,
                            first,
                            vocabulary,
                            greedy,
                            logprobs,
                            batch,
                            lanes: &mut *lanes,
                            logits: &logits.get(),
                            samples: &mut *samples,
                        })?;
                        spoil(control, OP, "tokens", &mut samples.tokens);
                        spoil(control, OP, "sampled", &mut lanes.sampled);
                        spoil(control, OP, "logprobs", &mut samples.logprobs);
                        spoil(control, OP, "top_tokens", &mut samples.top_tokens);
                        spoil(control, OP, "top_logprobs", &mut samples.top_logprobs);
                        Ok(())
                    })
                })
            })
        })
    }

    fn score(&mut self, op: ops::Score<'_, Toy>) -> Ran {
        let ops::Score { rows, first, vocabulary, .. } = op;
        let (batch, logits, samples) =
            (op.batch.handles(), op.logits.clone(), op.samples.handles());
        let arguments = format!(
            "rows {rows}, first {first}, vocabulary {vocabulary}, {}, logits {}, {}",
            batch.arguments(),
            logits.id,
            samples.arguments()
        );
        self.push("score", arguments, move |control| {
            batch.with(|batch| {
                samples.with(|samples| {
                    ReferenceRecorder.score(ops::Score {
                        rows,
                        first,
                        vocabulary,
                        batch,
                        logits: &logits.get(),
                        samples: &mut *samples,
                    })?;
                    spoil(control, "score", "logprobs", &mut samples.logprobs);
                    Ok(())
                })
            })
        })
    }
}
