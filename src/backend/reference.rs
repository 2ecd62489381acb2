//! The specification of every op: scalar, naive, sums in f64. Slow on purpose.
//!
//! Each op is a function over slices, so that its mathematics can be read without the seam, and
//! [`Reference`] is a [`Backend`] made of them. Exact where the contract is exact (integers, the
//! quantisation's rounding); elsewhere a backend is compared with it within a tolerance.

use std::cmp::Ordering;

use super::ops::{self, Activation, Epilogue, Heads, SampleRow};
use super::random::gumbel;
use super::{
    Backend, DeviceInfo, Element, FROM_LANE, KV_FLOOR, KvLayout, KvType, MAX_LOGPROBS, NONE,
    PAGE_TOKENS, Record, RecordStep, StepKey, quantized_stride,
};
use crate::error::{LoadError, RunError};
use crate::tensor::HostTable;
use crate::ternary::TernaryRows;

/// `x_i · (1 / sqrt(mean(x²) + eps)) · gain_i`.
pub fn norm_row(input: &[f32], gain: &[f32], eps: f32, output: &mut [f32]) {
    let mean = input.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / input.len() as f64;
    let inverse = 1.0 / (mean + f64::from(eps)).sqrt();
    for ((y, &x), &g) in output.iter_mut().zip(input).zip(gain) {
        *y = (f64::from(x) * inverse * f64::from(g)) as f32;
    }
}

/// Quantises one row into `values` (zero beyond the row) and returns its scale `s` and `Σ q`.
pub fn quantize_row(row: &[f32], values: &mut [i8]) -> (f32, i32) {
    let absmax = row.iter().fold(0f32, |max, x| max.max(x.abs()));
    let finite = row.iter().all(|x| x.is_finite());
    let scale = if finite { 127.0 / absmax.max(1e-5) } else { f32::NAN };
    values.fill(0);
    for (q, &x) in values.iter_mut().zip(row).filter(|_| finite) {
        *q = (x * scale).round_ties_even().clamp(-128.0, 127.0) as i8;
    }
    (scale, values.iter().map(|&q| i32::from(q)).sum())
}

/// Quantises a key or a value of one head for an int8 cache and returns its scale `d`.
pub fn quantize_head(head: &[f32], values: &mut [i8]) -> f32 {
    if !head.iter().all(|x| x.is_finite()) {
        values.fill(0);
        return f32::NAN;
    }
    let most = head.iter().fold(KV_FLOOR, |max, x| max.max(x.abs()));
    for (q, &x) in values.iter_mut().zip(head) {
        *q = (x * (127.0 / most)).round_ties_even() as i8;
    }
    most / 127.0
}

/// A key or a value of one head as a cache of this type gives it back.
pub fn cached_head(head: &[f32], kv_type: KvType) -> Vec<f32> {
    match kv_type {
        KvType::F32 => head.to_vec(),
        KvType::F16 => head.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect(),
        KvType::Int8 => {
            let mut values = vec![0; head.len()];
            let scale = quantize_head(head, &mut values);
            values.iter().map(|&q| f32::from(q) * scale).collect()
        }
    }
}

/// `act(gate)`.
pub fn activate(activation: Activation, gate: f32) -> f64 {
    let x = f64::from(gate);
    match activation {
        Activation::Relu2 => x.max(0.0) * x.max(0.0),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            x / 2.0 * (1.0 + inner.tanh())
        }
    }
}

/// Rotates one head in place, dimension `i` with `i + dim/2`.
pub fn rotate_head(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = head.len() / 2;
    for i in 0..half {
        let (x, y) = (f64::from(head[i]), f64::from(head[i + half]));
        let (c, s) = (f64::from(cos[i]), f64::from(sin[i]));
        head[i] = (x * c - y * s) as f32;
        head[i + half] = (y * c + x * s) as f32;
    }
}

/// `Σ a_i · b_i`.
pub fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// `softmax(q·k · scale) · v` over `keys` and `values`, one row per position.
pub fn attend(query: &[f32], keys: &[&[f32]], values: &[&[f32]], scale: f32, output: &mut [f32]) {
    let scores: Vec<f64> = keys.iter().map(|k| dot(query, k) * f64::from(scale)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    for (i, y) in output.iter_mut().enumerate() {
        let weighted: f64 = weights.iter().zip(values).map(|(w, v)| w * f64::from(v[i])).sum();
        *y = (weighted / sum) as f32;
    }
}

/// `ln Σ exp(x)`, `None` where a logit is not finite.
pub fn log_sum_exp(logits: &[f32]) -> Option<f64> {
    if logits.iter().any(|x| !x.is_finite()) {
        return None;
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).sum();
    Some(f64::from(max) + sum.ln())
}

/// Steps 1 to 7 of [`ops::Sample`] for one row of finite logits. `history` holds the sequence's
/// tokens so far, prompt and answer.
pub fn sample_row(
    logits: &[f32],
    options: &SampleRow,
    biases: &[(u32, f32)],
    history: &[u32],
) -> u32 {
    let mut x = logits.to_vec();
    for &(token, bias) in biases {
        if let Some(x) = x.get_mut(token as usize) {
            *x += bias;
        }
    }
    penalize(&mut x, options, history);
    let mut order = descending(&x);
    if options.temperature == 0.0 || order.is_empty() {
        return order.first().map_or(NONE, |&token| token as u32);
    }
    for x in &mut x {
        *x /= options.temperature;
    }
    if options.min_p > 0.0 {
        let floor = x[order[0]] + libm::logf(options.min_p);
        order.retain(|&token| x[token] >= floor);
    }
    if options.top_k > 0 {
        order.truncate(options.top_k as usize);
    }
    if options.top_p < 1.0 {
        let weight = |token: usize| (f64::from(x[token]) - f64::from(x[order[0]])).exp();
        let total: f64 = order.iter().map(|&token| weight(token)).sum();
        let mut share = 0.0;
        let kept = order.iter().position(|&token| {
            share += weight(token) / total;
            share >= f64::from(options.top_p)
        });
        order.truncate(kept.map_or(order.len(), |last| last + 1));
    }
    let seed = u64::from(options.seed_high) << 32 | u64::from(options.seed_low);
    let noisy =
        |token: usize| x[token] + gumbel(seed, options.length, options.choice, token as u32);
    let best = order.iter().copied().max_by(|&a, &b| {
        noisy(a).total_cmp(&noisy(b)).then(b.cmp(&a)) // among equals the lowest token
    });
    best.map_or(NONE, |token| token as u32)
}

/// Tokens by descending logit, equal ones (0 and −0 too) in ascending order.
fn descending(logits: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // A stable sort keeps equal ones as they are; the logits are finite, so all compare.
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap_or(Ordering::Equal));
    order
}

fn penalize(x: &mut [f32], options: &SampleRow, history: &[u32]) {
    let mut seen = vec![false; x.len()];
    let mut count = vec![0u32; x.len()];
    for (position, &token) in history.iter().enumerate() {
        if (token as usize) < x.len() {
            seen[token as usize] = true;
            count[token as usize] += u32::from(position >= options.prompt as usize);
        }
    }
    for token in 0..x.len() {
        let (x, repetition) = (&mut x[token], options.repetition_penalty);
        if seen[token] && repetition != 1.0 {
            *x = if *x > 0.0 { *x / repetition } else { *x * repetition };
        }
        if count[token] > 0 {
            *x -= options.frequency_penalty * count[token] as f32 + options.presence_penalty;
        }
    }
}

/// A ternary matrix, one weight a byte.
#[derive(Debug)]
pub struct ReferenceMatrix {
    rows: usize,
    cols: usize,
    weights: Vec<i8>,
    scales: Vec<f32>,
}

impl ReferenceMatrix {
    /// Unpacks matrices of equal width below each other.
    pub fn new(parts: &[&dyn TernaryRows]) -> Result<Self, LoadError> {
        let cols = parts.first().map_or(0, |part| part.cols());
        let mut matrix = Self { rows: 0, cols, weights: Vec::new(), scales: Vec::new() };
        let mut codes = vec![0; cols];
        for part in parts {
            if part.cols() != cols {
                return Err(LoadError::Option {
                    option: "parts of a ternary matrix".into(),
                    expected: format!("{cols} columns in each"),
                    found: part.cols().to_string(),
                });
            }
            matrix.rows += part.rows();
            for row in 0..part.rows() {
                part.read_codes(row, &mut codes);
                matrix.weights.extend(codes.iter().map(|&code| code as i8 - 1));
                matrix.scales.push(part.scale());
            }
        }
        Ok(matrix)
    }

    /// `(Σ_k t_nk · q_k) · (scale_n / s)`.
    pub fn dot(&self, row: usize, values: &[i8], scale: f32) -> f32 {
        let weights = &self.weights[row * self.cols..][..self.cols];
        let sum: i32 = weights.iter().zip(values).map(|(&t, &q)| i32::from(t) * i32::from(q)).sum();
        sum as f32 * (self.scales[row] / scale)
    }
}

/// A KV cache: keys and values in f32, as a cache of its type gives them back.
#[derive(Debug)]
pub struct ReferenceKv {
    layout: KvLayout,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl ReferenceKv {
    /// The type whose rounding it has.
    pub fn kv_type(&self) -> KvType {
        self.layout.kv_type
    }

    /// First element of a head's key or value.
    fn offset(&self, layer: usize, slot: usize, head: usize) -> usize {
        let KvLayout { pages, kv_heads, head_dim, .. } = self.layout;
        ((layer * pages * PAGE_TOKENS + slot) * kv_heads + head) * head_dim
    }

    /// Stores one head's rotated key and value.
    pub fn store(&mut self, layer: usize, slot: usize, head: usize, key: &[f32], value: &[f32]) {
        let start = self.offset(layer, slot, head);
        let kv_type = self.layout.kv_type;
        self.keys[start..][..key.len()].copy_from_slice(&cached_head(key, kv_type));
        self.values[start..][..value.len()].copy_from_slice(&cached_head(value, kv_type));
    }

    /// One head's key and value.
    pub fn load(&self, layer: usize, slot: usize, head: usize) -> (&[f32], &[f32]) {
        let (start, dim) = (self.offset(layer, slot, head), self.layout.head_dim);
        (&self.keys[start..][..dim], &self.values[start..][..dim])
    }
}

/// The reference as a backend: runs each op as it is recorded, on one thread.
#[derive(Debug)]
pub struct Reference {
    info: DeviceInfo,
}

impl Reference {
    /// The reference backend.
    pub fn new() -> Self {
        Self { info: DeviceInfo::new("reference", "the specification of every op, scalar in f64") }
    }
}

impl Default for Reference {
    fn default() -> Self {
        Self::new()
    }
}

impl Backend for Reference {
    type Buffer<T: Element> = Vec<T>;
    type TernaryMatrix = ReferenceMatrix;
    type Table = HostTable;
    type KvCache = ReferenceKv;
    type Pending<T: Element> = Vec<T>;
    type Recorder<'r> = ReferenceRecorder;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn allocate<T: Element>(&self, name: &'static str, len: usize) -> Result<Vec<T>, LoadError> {
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(len).map_err(|_| LoadError::OutOfMemory {
            device: self.info.name.clone(),
            arithmetic: format!("{name} needs {len} elements of {} bytes", size_of::<T>()),
        })?;
        buffer.resize(len, T::default());
        Ok(buffer)
    }

    fn len<T: Element>(&self, buffer: &Vec<T>) -> usize {
        buffer.len()
    }

    fn pack_ternary(&self, parts: &[&dyn TernaryRows]) -> Result<ReferenceMatrix, LoadError> {
        ReferenceMatrix::new(parts)
    }

    fn load_table(&self, table: HostTable) -> Result<HostTable, LoadError> {
        Ok(table)
    }

    fn allocate_kv(&self, layout: KvLayout) -> Result<ReferenceKv, LoadError> {
        let len = layout.layers * layout.pages * PAGE_TOKENS * layout.kv_heads * layout.head_dim;
        Ok(ReferenceKv {
            layout,
            keys: self.allocate("keys", len)?,
            values: self.allocate("values", len)?,
        })
    }

    fn write<T: Element>(&mut self, buffer: &mut Vec<T>, values: &[T]) -> Result<(), RunError> {
        ops::check_len("write", "buffer", values.len(), buffer.len())?;
        buffer[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn run(&mut self, _key: &StepKey, record: &mut RecordStep<'_, Self>) -> Result<(), RunError> {
        record(&mut ReferenceRecorder)
    }

    fn fetch<T: Element>(&mut self, buffer: &Vec<T>, len: usize) -> Result<Vec<T>, RunError> {
        ops::check_len("fetch", "buffer", len, buffer.len())?;
        Ok(buffer[..len].to_vec())
    }

    fn wait<T: Element>(&mut self, pending: Vec<T>) -> Result<Vec<T>, RunError> {
        Ok(pending)
    }
}

/// Runs each op as it is recorded.
#[derive(Debug)]
pub struct ReferenceRecorder;

type Ran = Result<(), RunError>;

impl Record<Reference> for ReferenceRecorder {
    fn embed(&mut self, op: ops::Embed<'_, Reference>) -> Ran {
        let ops::Embed { rows, batch, lanes, table, scale, output, width } = op;
        for t in 0..rows {
            let row = &mut output[t * width..][..width];
            row.fill(0.0);
            let Some(token) = resolve(batch.tokens[t], &lanes.sampled) else { continue };
            if token as usize >= table.rows {
                continue;
            }
            table.read_row(token as usize, row);
            row.iter_mut().for_each(|x| *x *= scale);
            let lane = batch.lanes[batch.sequences[t] as usize] as usize;
            lanes.history[lane * lanes.context + batch.positions[t] as usize] = token;
        }
        Ok(())
    }

    fn rms_norm(&mut self, op: ops::RmsNorm<'_, Reference>) -> Ran {
        let width = op.width;
        for r in 0..op.rows {
            let output = &mut op.output[r * width..][..width];
            let source = op.gather.map_or(r as u32, |gather| gather[op.first + r]);
            let mut normed = vec![0.0; width];
            if source != NONE {
                let input = &op.input[source as usize * width..][..width];
                norm_row(input, op.norm.gain, op.norm.eps, &mut normed);
            }
            for (output, y) in output.iter_mut().zip(normed) {
                match op.epilogue {
                    Epilogue::Store => *output = y,
                    Epilogue::Add => *output += y,
                }
            }
        }
        Ok(())
    }

    fn rms_norm_quantize(&mut self, op: ops::RmsNormQuantize<'_, Reference>) -> Ran {
        let width = op.width;
        let mut normed = op.normed;
        for t in 0..op.rows {
            let mut row = op.input[t * width..][..width].to_vec();
            if let Some(norm) = op.norm {
                norm_row(&op.input[t * width..][..width], norm.gain, norm.eps, &mut row);
            }
            finish_quantize(t, &row, op.quantized, normed.as_deref_mut());
        }
        Ok(())
    }

    fn ternary_matmul(&mut self, op: ops::TernaryMatmul<'_, Reference>) -> Ran {
        let stride = quantized_stride(op.width);
        for t in 0..op.rows {
            let values = &op.input.values[t * stride..][..op.width];
            for n in 0..op.features {
                let y = op.weight.dot(n, values, op.input.scales[t]);
                let output = &mut op.output[t * op.stride + op.column + n];
                match op.epilogue {
                    Epilogue::Store => *output = y,
                    Epilogue::Add => *output += y,
                }
            }
        }
        Ok(())
    }

    fn low_rank(&mut self, op: ops::LowRank<'_, Reference>) -> Ran {
        op.check(Vec::len)?;
        let ops::LowRank { width, rank, features, .. } = op;
        for t in 0..op.rows {
            let x = &op.input[t * width..][..width];
            let inner = &mut op.inner[t * rank..][..rank];
            for (j, inner) in inner.iter_mut().enumerate() {
                *inner = dot(&op.down[j * width..][..width], x) as f32;
            }
            let output = &mut op.output[t * op.stride + op.column..][..features];
            for (n, output) in output.iter_mut().enumerate() {
                let up: Vec<f32> = (0..rank).map(|j| op.up[j * features + n]).collect();
                *output = (f64::from(*output) + dot(&up, inner)) as f32;
            }
        }
        Ok(())
    }

    fn rope_append_kv(&mut self, op: ops::RopeAppendKv<'_, Reference>) -> Ran {
        let Heads { query, kv, dim } = op.heads;
        for t in 0..op.rows {
            let row = &mut op.qkv[t * op.heads.qkv_width()..][..op.heads.qkv_width()];
            let position = op.batch.positions[t] as usize;
            let cos = &op.cos[position * dim / 2..][..dim / 2];
            let sin = &op.sin[position * dim / 2..][..dim / 2];
            for (h, head) in row.chunks_exact_mut(dim).take(query + kv).enumerate() {
                if let Some(norm) = if h < query { op.query_norm } else { op.key_norm } {
                    let input = head.to_vec();
                    norm_row(&input, norm.gain, norm.eps, head);
                }
                rotate_head(head, cos, sin);
            }
            let slot = op.batch.slots[t];
            if slot == NONE {
                continue;
            }
            let (keys, values) = row[query * dim..].split_at(kv * dim);
            for h in 0..kv {
                let (key, value) = (&keys[h * dim..][..dim], &values[h * dim..][..dim]);
                op.kv.store(op.layer, slot as usize, h, key, value);
            }
        }
        Ok(())
    }

    fn paged_attention(&mut self, op: ops::PagedAttention<'_, Reference>) -> Ran {
        let Heads { query, kv, dim } = op.heads;
        let group = query / kv;
        op.output[..op.rows * query * dim].fill(0.0);
        for s in 0..op.sequences {
            let pages = &op.batch.page_table[s * op.batch.max_pages..][..op.batch.max_pages];
            let starts = &op.batch.query_starts;
            for t in starts[s] as usize..starts[s + 1] as usize {
                let position = op.batch.positions[t] as usize;
                let slots: Vec<usize> = (ops::first_key(op.window, position)..=position)
                    .map(|p| pages[p / PAGE_TOKENS] as usize * PAGE_TOKENS + p % PAGE_TOKENS)
                    .collect();
                for h in 0..query {
                    let (keys, values): (Vec<_>, Vec<_>) =
                        slots.iter().map(|&slot| op.kv.load(op.layer, slot, h / group)).unzip();
                    let q = &op.qkv[t * op.heads.qkv_width() + h * dim..][..dim];
                    let output = &mut op.output[(t * query + h) * dim..][..dim];
                    attend(q, &keys, &values, op.scale, output);
                }
            }
        }
        Ok(())
    }

    fn gate_norm_quantize(&mut self, op: ops::GateNormQuantize<'_, Reference>) -> Ran {
        let width = op.width;
        let mut normed = op.normed;
        for t in 0..op.rows {
            let (gate, up) = op.gate_up[2 * t * width..][..2 * width].split_at(width);
            let product: Vec<f32> = (gate.iter().zip(up))
                .map(|(&g, &u)| (activate(op.activation, g) * f64::from(u)) as f32)
                .collect();
            let mut row = product.clone();
            if let Some(norm) = op.norm {
                norm_row(&product, norm.gain, norm.eps, &mut row);
            }
            finish_quantize(t, &row, op.quantized, normed.as_deref_mut());
        }
        Ok(())
    }

    fn lm_head(&mut self, op: ops::LmHead<'_, Reference>) -> Ran {
        let width = op.width;
        self.rms_norm(ops::RmsNorm {
            rows: op.rows,
            width,
            input: op.input,
            gather: Some(&op.batch.logit_rows),
            first: op.first,
            norm: op.norm,
            output: op.normed,
            epilogue: Epilogue::Store,
        })?;
        let mut weights = vec![0.0; width];
        for v in 0..op.vocabulary {
            op.table.read_row(v, &mut weights);
            for r in 0..op.rows {
                let row = &op.normed[r * width..][..width];
                let dot = row.iter().zip(&weights).map(|(&a, &b)| f64::from(a) * f64::from(b));
                op.logits[r * op.vocabulary + v] = dot.sum::<f64>() as f32;
            }
        }
        Ok(())
    }

    fn sample(&mut self, op: ops::Sample<'_, Reference>) -> Ran {
        for r in 0..op.rows {
            let (row, options) = (op.first + r, op.batch.sample_rows[op.first + r]);
            op.samples.tokens[row] = NONE;
            op.samples.logprobs[row] = 0.0;
            let top = row * MAX_LOGPROBS..(row + 1) * MAX_LOGPROBS;
            if op.logprobs {
                op.samples.top_tokens[top.clone()].fill(NONE);
                op.samples.top_logprobs[top].fill(0.0);
            }
            if options.lane == NONE {
                continue;
            }
            let lane = options.lane as usize;
            let logits = &op.logits[r * op.vocabulary..][..op.vocabulary];
            let Some(log_sum) = log_sum_exp(logits) else {
                op.lanes.sampled[lane] = NONE;
                op.samples.logprobs[row] = f32::NAN;
                continue;
            };
            let history = &op.lanes.history[lane * op.lanes.context..][..options.length as usize];
            let bias =
                options.bias_start as usize..(options.bias_start + options.bias_count) as usize;
            let biases: Vec<(u32, f32)> = (op.batch.bias_tokens[bias.clone()].iter().copied())
                .zip(op.batch.bias_values[bias].iter().copied())
                .collect();
            let plain = SampleRow { repetition_penalty: 1.0, ..SampleRow::default() };
            let token = if op.greedy {
                sample_row(logits, &plain, &[], history)
            } else {
                sample_row(logits, &options, &biases, history)
            };
            op.samples.tokens[row] = token;
            op.lanes.sampled[lane] = token;
            if op.logprobs && token != NONE {
                let logprob = |token: usize| (f64::from(logits[token]) - log_sum) as f32;
                op.samples.logprobs[row] = logprob(token as usize);
                for (i, &token) in
                    descending(logits).iter().take(options.logprobs as usize).enumerate()
                {
                    op.samples.top_tokens[row * MAX_LOGPROBS + i] = token as u32;
                    op.samples.top_logprobs[row * MAX_LOGPROBS + i] = logprob(token);
                }
            }
        }
        Ok(())
    }

    fn score(&mut self, op: ops::Score<'_, Reference>) -> Ran {
        for r in 0..op.rows {
            let logits = &op.logits[r * op.vocabulary..][..op.vocabulary];
            let target = op.batch.targets[op.first + r];
            op.samples.logprobs[op.first + r] = match (target, log_sum_exp(logits)) {
                (NONE, _) => 0.0,
                (_, None) => f32::NAN,
                (token, Some(log_sum)) => (f64::from(logits[token as usize]) - log_sum) as f32,
            };
        }
        Ok(())
    }
}

/// The token that an entry of [`ops::Batch::tokens`] means.
pub fn resolve(entry: u32, sampled: &[u32]) -> Option<u32> {
    let token = match entry {
        NONE => NONE,
        lane if lane & FROM_LANE != 0 => {
            sampled.get((lane & !FROM_LANE) as usize).copied().unwrap_or(NONE)
        }
        token => token,
    };
    (token != NONE).then_some(token)
}

fn finish_quantize(
    t: usize,
    row: &[f32],
    quantized: &mut ops::Quantized<Reference>,
    normed: Option<&mut Vec<f32>>,
) {
    if let Some(normed) = normed {
        normed[t * row.len()..][..row.len()].copy_from_slice(row);
    }
    let stride = quantized_stride(row.len());
    let values = &mut quantized.values[t * stride..][..stride];
    (quantized.scales[t], quantized.sums[t]) = quantize_row(row, values);
}
