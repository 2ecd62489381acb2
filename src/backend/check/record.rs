//! Runs each op twice and compares.

use super::super::ops;
use super::super::reference::{Reference, ReferenceRecorder};
use super::super::{Backend, Element, KvType, MAX_LOGPROBS, Record, StepKey, quantized_stride};
use super::compare::Place;
use super::{AsDevice, Checked};
use crate::error::RunError;

/// Relative tolerance of a float op whose sums may be in another order.
const SUM: f64 = 2e-5;
/// Relative tolerance of attention over an f16 cache: a key or value that was rounded the other
/// way is off by 2⁻¹¹.
const ATTENTION: f64 = 1e-3;
/// The same over an int8 cache, where it is off by a step: 1/127 of the largest of its head.
const ATTENTION_INT8: f64 = 1e-2;
/// Relative tolerance of the ternary product: exact but for a division that may be approximate.
const SCALING: f64 = 1e-6;

/// Records a step on the device and in the reference, op by op.
pub struct CheckedRecorder<'r, B: Backend> {
    pub(super) device: &'r mut B,
    pub(super) key: StepKey,
    pub(super) index: usize,
}

impl<B: Backend> CheckedRecorder<'_, B> {
    fn run(
        &mut self,
        record: &mut dyn FnMut(&mut B::Recorder<'_>) -> Result<(), RunError>,
    ) -> Result<(), RunError> {
        self.device.run(&self.key, record)
    }

    fn read<T: Element>(&mut self, buffer: &B::Buffer<T>) -> Result<Vec<T>, RunError> {
        let len = self.device.len(buffer);
        self.device.read(buffer, len)
    }

    fn place(&mut self, op: &'static str, output: &'static str) -> Place {
        Place { op, index: self.index, output }
    }

    fn batch(&mut self, batch: &ops::Batch<Checked<B>>) -> Result<ops::Batch<Reference>, RunError> {
        Ok(ops::Batch {
            tokens: self.read(&batch.tokens)?,
            positions: self.read(&batch.positions)?,
            sequences: self.read(&batch.sequences)?,
            slots: self.read(&batch.slots)?,
            query_starts: self.read(&batch.query_starts)?,
            kv_lens: self.read(&batch.kv_lens)?,
            page_table: self.read(&batch.page_table)?,
            max_pages: batch.max_pages,
            lanes: self.read(&batch.lanes)?,
            logit_rows: self.read(&batch.logit_rows)?,
            targets: self.read(&batch.targets)?,
            sample_rows: self.read(&batch.sample_rows)?,
            bias_tokens: self.read(&batch.bias_tokens)?,
            bias_values: self.read(&batch.bias_values)?,
        })
    }

    fn lanes(&mut self, lanes: &ops::Lanes<Checked<B>>) -> Result<ops::Lanes<Reference>, RunError> {
        Ok(ops::Lanes {
            history: self.read(&lanes.history)?,
            context: lanes.context,
            sampled: self.read(&lanes.sampled)?,
        })
    }

    fn quantized(
        &mut self,
        quantized: &ops::Quantized<Checked<B>>,
    ) -> Result<ops::Quantized<Reference>, RunError> {
        Ok(ops::Quantized {
            values: self.read(&quantized.values)?,
            scales: self.read(&quantized.scales)?,
            sums: self.read(&quantized.sums)?,
        })
    }

    fn samples(
        &mut self,
        samples: &ops::Samples<Checked<B>>,
    ) -> Result<ops::Samples<Reference>, RunError> {
        Ok(ops::Samples {
            tokens: self.read(&samples.tokens)?,
            logprobs: self.read(&samples.logprobs)?,
            top_tokens: self.read(&samples.top_tokens)?,
            top_logprobs: self.read(&samples.top_logprobs)?,
        })
    }

    fn gain(
        &mut self,
        norm: Option<ops::Norm<'_, Checked<B>>>,
    ) -> Result<Option<Vec<f32>>, RunError> {
        norm.map(|norm| self.read(norm.gain)).transpose()
    }

    fn compare_floats(
        &mut self,
        op: &'static str,
        output: &'static str,
        (rows, width, relative): (usize, usize, f64),
        expected: &[f32],
        found: &B::Buffer<f32>,
    ) -> Result<(), RunError> {
        let found = self.device.read(found, rows * width)?;
        self.place(op, output).floats(width, relative, &expected[..rows * width], &found)
    }

    fn compare_quantized(
        &mut self,
        op: &'static str,
        rows: usize,
        width: usize,
        expected: &ops::Quantized<Reference>,
        found: &ops::Quantized<Checked<B>>,
    ) -> Result<(), RunError> {
        let stride = quantized_stride(width);
        let scales = &expected.scales[..rows];
        self.compare_floats(op, "scales", (rows, 1, SUM), scales, &found.scales)?;
        let values = self.device.read(&found.values, rows * stride)?;
        let place = self.place(op, "values");
        place.quantized(stride, &expected.values[..rows * stride], &values)?;
        let sums: Vec<i32> =
            values.chunks(stride).map(|row| row.iter().map(|&q| i32::from(q)).sum()).collect();
        let found = self.device.read(&found.sums, rows)?;
        self.place(op, "sums").integers(&sums, &found)
    }
}

fn device_norm<'n, B: Backend>(norm: ops::Norm<'n, Checked<B>>) -> ops::Norm<'n, B> {
    ops::Norm { gain: norm.gain, eps: norm.eps }
}

fn reference_norm<'n, B: Backend>(
    norm: Option<ops::Norm<'_, Checked<B>>>,
    gain: &'n Option<Vec<f32>>,
) -> Option<ops::Norm<'n, Reference>> {
    norm.zip(gain.as_ref()).map(|(norm, gain)| ops::Norm { gain, eps: norm.eps })
}

impl<B: Backend> Record<Checked<B>> for CheckedRecorder<'_, B> {
    fn embed(&mut self, op: ops::Embed<'_, Checked<B>>) -> Result<(), RunError> {
        let (rows, width, scale) = (op.rows, op.width, op.scale);
        let batch = self.batch(op.batch)?;
        let mut lanes = self.lanes(op.lanes)?;
        let mut output = self.read(op.output)?;
        ReferenceRecorder.embed(ops::Embed {
            rows,
            batch: &batch,
            lanes: &mut lanes,
            table: &op.table.reference,
            scale,
            output: &mut output,
            width,
        })?;
        self.run(&mut |r| {
            r.embed(ops::Embed {
                rows,
                batch: op.batch.as_device(),
                lanes: op.lanes.as_device_mut(),
                table: &op.table.device,
                scale,
                output: op.output,
                width,
            })
        })?;
        self.compare_floats("embed", "output", (rows, width, SCALING), &output, op.output)?;
        let history = self.read(&op.lanes.history)?;
        self.place("embed", "history").integers(&lanes.history, &history)?;
        self.index += 1;
        Ok(())
    }

    fn rms_norm(&mut self, op: ops::RmsNorm<'_, Checked<B>>) -> Result<(), RunError> {
        let (rows, width, first, epilogue) = (op.rows, op.width, op.first, op.epilogue);
        let (input, gain) = (self.read(op.input)?, self.read(op.norm.gain)?);
        let gather = op.gather.map(|gather| self.read(gather)).transpose()?;
        let mut output = self.read(op.output)?;
        ReferenceRecorder.rms_norm(ops::RmsNorm {
            rows,
            width,
            input: &input,
            gather: gather.as_ref(),
            first,
            norm: ops::Norm { gain: &gain, eps: op.norm.eps },
            output: &mut output,
            epilogue,
        })?;
        self.run(&mut |r| {
            r.rms_norm(ops::RmsNorm {
                rows,
                width,
                input: op.input,
                gather: op.gather,
                first,
                norm: device_norm(op.norm),
                output: op.output,
                epilogue,
            })
        })?;
        self.compare_floats("rms_norm", "output", (rows, width, SUM), &output, op.output)?;
        self.index += 1;
        Ok(())
    }

    fn rms_norm_quantize(
        &mut self,
        mut op: ops::RmsNormQuantize<'_, Checked<B>>,
    ) -> Result<(), RunError> {
        let (rows, width) = (op.rows, op.width);
        let (input, gain) = (self.read(op.input)?, self.gain(op.norm)?);
        let mut quantized = self.quantized(op.quantized)?;
        let mut normed = op.normed.as_deref().map(|normed| self.read(normed)).transpose()?;
        ReferenceRecorder.rms_norm_quantize(ops::RmsNormQuantize {
            rows,
            width,
            input: &input,
            norm: reference_norm(op.norm, &gain),
            quantized: &mut quantized,
            normed: normed.as_mut(),
        })?;
        self.run(&mut |r| {
            r.rms_norm_quantize(ops::RmsNormQuantize {
                rows,
                width,
                input: op.input,
                norm: op.norm.map(device_norm),
                quantized: op.quantized.as_device_mut(),
                normed: op.normed.as_deref_mut(),
            })
        })?;
        const OP: &str = "rms_norm_quantize";
        if let (Some(expected), Some(found)) = (&normed, &op.normed) {
            self.compare_floats(OP, "normed", (rows, width, SUM), expected, found)?;
        }
        self.compare_quantized(OP, rows, width, &quantized, op.quantized)?;
        self.index += 1;
        Ok(())
    }

    fn ternary_matmul(&mut self, op: ops::TernaryMatmul<'_, Checked<B>>) -> Result<(), RunError> {
        let ops::TernaryMatmul { rows, width, features, stride, column, epilogue, .. } = op;
        let input = self.quantized(op.input)?;
        let mut output = self.read(op.output)?;
        ReferenceRecorder.ternary_matmul(ops::TernaryMatmul {
            rows,
            width,
            features,
            input: &input,
            weight: &op.weight.reference,
            output: &mut output,
            stride,
            column,
            epilogue,
        })?;
        self.run(&mut |r| {
            r.ternary_matmul(ops::TernaryMatmul {
                rows,
                width,
                features,
                input: op.input.as_device(),
                weight: &op.weight.device,
                output: op.output,
                stride,
                column,
                epilogue,
            })
        })?;
        let compared = (rows, stride, SCALING);
        self.compare_floats("ternary_matmul", "output", compared, &output, op.output)?;
        self.index += 1;
        Ok(())
    }

    fn low_rank(&mut self, op: ops::LowRank<'_, Checked<B>>) -> Result<(), RunError> {
        let ops::LowRank { rows, width, rank, features, stride, column, .. } = op;
        let (input, down, up) = (self.read(op.input)?, self.read(op.down)?, self.read(op.up)?);
        let (mut inner, mut output) = (self.read(op.inner)?, self.read(op.output)?);
        ReferenceRecorder.low_rank(ops::LowRank {
            rows,
            width,
            rank,
            features,
            input: &input,
            down: &down,
            up: &up,
            inner: &mut inner,
            output: &mut output,
            stride,
            column,
        })?;
        self.run(&mut |r| {
            r.low_rank(ops::LowRank {
                rows,
                width,
                rank,
                features,
                input: op.input,
                down: op.down,
                up: op.up,
                inner: op.inner,
                output: op.output,
                stride,
                column,
            })
        })?;
        const OP: &str = "low_rank";
        self.compare_floats(OP, "inner", (rows, rank, SUM), &inner, op.inner)?;
        self.compare_floats(OP, "output", (rows, stride, SUM), &output, op.output)?;
        self.index += 1;
        Ok(())
    }

    fn rope_append_kv(&mut self, op: ops::RopeAppendKv<'_, Checked<B>>) -> Result<(), RunError> {
        let ops::RopeAppendKv { rows, heads, layer, .. } = op;
        let batch = self.batch(op.batch)?;
        let mut qkv = self.read(op.qkv)?;
        let (cos, sin) = (self.read(op.cos)?, self.read(op.sin)?);
        let (query_gain, key_gain) = (self.gain(op.query_norm)?, self.gain(op.key_norm)?);
        ReferenceRecorder.rope_append_kv(ops::RopeAppendKv {
            rows,
            batch: &batch,
            heads,
            qkv: &mut qkv,
            cos: &cos,
            sin: &sin,
            query_norm: reference_norm(op.query_norm, &query_gain),
            key_norm: reference_norm(op.key_norm, &key_gain),
            kv: &mut op.kv.reference,
            layer,
        })?;
        self.run(&mut |r| {
            r.rope_append_kv(ops::RopeAppendKv {
                rows,
                batch: op.batch.as_device(),
                heads,
                qkv: op.qkv,
                cos: op.cos,
                sin: op.sin,
                query_norm: op.query_norm.map(device_norm),
                key_norm: op.key_norm.map(device_norm),
                kv: &mut op.kv.device,
                layer,
            })
        })?;
        // Keys need not be rotated in place; what went into the cache shows in attention.
        let (width, queries) = (heads.qkv_width(), heads.output_width());
        let found = self.device.read(op.qkv, rows * width)?;
        let only_queries = |rows: &[f32]| -> Vec<f32> {
            rows.chunks(width).flat_map(|row| row[..queries].to_vec()).collect()
        };
        let expected = only_queries(&qkv[..rows * width]);
        let place = self.place("rope_append_kv", "queries");
        place.floats(queries, SUM, &expected, &only_queries(&found))?;
        self.index += 1;
        Ok(())
    }

    fn paged_attention(&mut self, op: ops::PagedAttention<'_, Checked<B>>) -> Result<(), RunError> {
        let ops::PagedAttention { rows, sequences, heads, scale, window, layer, .. } = op;
        let batch = self.batch(op.batch)?;
        let qkv = self.read(op.qkv)?;
        let mut output = self.read(op.output)?;
        ReferenceRecorder.paged_attention(ops::PagedAttention {
            rows,
            sequences,
            batch: &batch,
            heads,
            scale,
            window,
            qkv: &qkv,
            kv: &op.kv.reference,
            layer,
            output: &mut output,
        })?;
        self.run(&mut |r| {
            r.paged_attention(ops::PagedAttention {
                rows,
                sequences,
                batch: op.batch.as_device(),
                heads,
                scale,
                window,
                qkv: op.qkv,
                kv: &op.kv.device,
                layer,
                output: op.output,
            })
        })?;
        let tolerance = match op.kv.reference.kv_type() {
            KvType::F32 | KvType::F16 => ATTENTION,
            KvType::Int8 => ATTENTION_INT8,
        };
        let compared = (rows, heads.output_width(), tolerance);
        self.compare_floats("paged_attention", "output", compared, &output, op.output)?;
        self.index += 1;
        Ok(())
    }

    fn gate_norm_quantize(
        &mut self,
        mut op: ops::GateNormQuantize<'_, Checked<B>>,
    ) -> Result<(), RunError> {
        let (rows, width, activation) = (op.rows, op.width, op.activation);
        let (gate_up, gain) = (self.read(op.gate_up)?, self.gain(op.norm)?);
        let mut quantized = self.quantized(op.quantized)?;
        let mut normed = op.normed.as_deref().map(|normed| self.read(normed)).transpose()?;
        ReferenceRecorder.gate_norm_quantize(ops::GateNormQuantize {
            rows,
            width,
            gate_up: &gate_up,
            activation,
            norm: reference_norm(op.norm, &gain),
            quantized: &mut quantized,
            normed: normed.as_mut(),
        })?;
        self.run(&mut |r| {
            r.gate_norm_quantize(ops::GateNormQuantize {
                rows,
                width,
                gate_up: op.gate_up,
                activation,
                norm: op.norm.map(device_norm),
                quantized: op.quantized.as_device_mut(),
                normed: op.normed.as_deref_mut(),
            })
        })?;
        const OP: &str = "gate_norm_quantize";
        if let (Some(expected), Some(found)) = (&normed, &op.normed) {
            self.compare_floats(OP, "normed", (rows, width, SUM), expected, found)?;
        }
        self.compare_quantized(OP, rows, width, &quantized, op.quantized)?;
        self.index += 1;
        Ok(())
    }

    fn lm_head(&mut self, op: ops::LmHead<'_, Checked<B>>) -> Result<(), RunError> {
        let ops::LmHead { rows, first, width, vocabulary, .. } = op;
        let batch = self.batch(op.batch)?;
        let (input, gain) = (self.read(op.input)?, self.read(op.norm.gain)?);
        let (mut normed, mut logits) = (self.read(op.normed)?, self.read(op.logits)?);
        ReferenceRecorder.lm_head(ops::LmHead {
            rows,
            first,
            width,
            vocabulary,
            batch: &batch,
            input: &input,
            norm: ops::Norm { gain: &gain, eps: op.norm.eps },
            table: &op.table.reference,
            normed: &mut normed,
            logits: &mut logits,
        })?;
        self.run(&mut |r| {
            r.lm_head(ops::LmHead {
                rows,
                first,
                width,
                vocabulary,
                batch: op.batch.as_device(),
                input: op.input,
                norm: device_norm(op.norm),
                table: &op.table.device,
                normed: op.normed,
                logits: op.logits,
            })
        })?;
        self.compare_floats("lm_head", "normed", (rows, width, SUM), &normed, op.normed)?;
        self.compare_floats("lm_head", "logits", (rows, vocabulary, SUM), &logits, op.logits)?;
        self.index += 1;
        Ok(())
    }

    fn sample(&mut self, op: ops::Sample<'_, Checked<B>>) -> Result<(), RunError> {
        let ops::Sample { rows, first, vocabulary, greedy, logprobs, .. } = op;
        let batch = self.batch(op.batch)?;
        let mut lanes = self.lanes(op.lanes)?;
        let logits = self.read(op.logits)?;
        let mut samples = self.samples(op.samples)?;
        ReferenceRecorder.sample(ops::Sample {
            rows,
            first,
            vocabulary,
            greedy,
            logprobs,
            batch: &batch,
            lanes: &mut lanes,
            logits: &logits,
            samples: &mut samples,
        })?;
        self.run(&mut |r| {
            r.sample(ops::Sample {
                rows,
                first,
                vocabulary,
                greedy,
                logprobs,
                batch: op.batch.as_device(),
                lanes: op.lanes.as_device_mut(),
                logits: op.logits,
                samples: op.samples.as_device_mut(),
            })
        })?;
        let found = self.samples(op.samples)?;
        let range = first..first + rows;
        let place = self.place("sample", "tokens");
        place.integers(&samples.tokens[range.clone()], &found.tokens[range.clone()])?;
        let sampled = self.read(&op.lanes.sampled)?;
        self.place("sample", "sampled").integers(&lanes.sampled, &sampled)?;
        if logprobs {
            let top = first * MAX_LOGPROBS..(first + rows) * MAX_LOGPROBS;
            let place = self.place("sample", "logprobs");
            place.floats(rows, SUM, &samples.logprobs[range.clone()], &found.logprobs[range])?;
            let place = self.place("sample", "top_tokens");
            place.integers(&samples.top_tokens[top.clone()], &found.top_tokens[top.clone()])?;
            let place = self.place("sample", "top_logprobs");
            let expected = &samples.top_logprobs[top.clone()];
            place.floats(MAX_LOGPROBS, SUM, expected, &found.top_logprobs[top])?;
        }
        self.index += 1;
        Ok(())
    }

    fn score(&mut self, op: ops::Score<'_, Checked<B>>) -> Result<(), RunError> {
        let ops::Score { rows, first, vocabulary, .. } = op;
        let batch = self.batch(op.batch)?;
        let logits = self.read(op.logits)?;
        let mut samples = self.samples(op.samples)?;
        ReferenceRecorder.score(ops::Score {
            rows,
            first,
            vocabulary,
            batch: &batch,
            logits: &logits,
            samples: &mut samples,
        })?;
        self.run(&mut |r| {
            r.score(ops::Score {
                rows,
                first,
                vocabulary,
                batch: op.batch.as_device(),
                logits: op.logits,
                samples: op.samples.as_device_mut(),
            })
        })?;
        let found = self.samples(op.samples)?;
        let place = self.place("score", "logprobs");
        let range = first..first + rows;
        place.floats(rows, SUM, &samples.logprobs[range.clone()], &found.logprobs[range])?;
        self.index += 1;
        Ok(())
    }
}
