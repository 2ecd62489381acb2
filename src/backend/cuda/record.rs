//! The recorder: ops become launches, after those that follow each other were fused.

use std::collections::VecDeque;
use std::rc::Rc;

use super::Cuda;
use super::launch::Launch;
use super::memory::Owned;
use super::paged_attention::Attention;
use super::rms_norm_quantize::Quantize;
use super::rope_append_kv::Rope;
use crate::backend::ops::{self, Quantized};
use crate::backend::{Record, StepKey};
use crate::error::RunError;

/// Records one step.
pub struct Recorder<'r> {
    pub(super) cuda: &'r mut Cuda,
    pub(super) key: StepKey,
    ops: Vec<Op>,
}

/// An op that is recorded, with all that its launches need.
pub(super) enum Op {
    /// Nothing to fuse.
    Launches(Vec<Launch>),
    Quantize(Quantize),
    Rope(Rope),
    Attention(Box<Attention>),
}

/// Quantised rows in device memory.
#[derive(Clone)]
pub(super) struct QuantizedRows {
    pub(super) values: Rc<Owned>,
    pub(super) scales: Rc<Owned>,
    pub(super) sums: Rc<Owned>,
}

impl QuantizedRows {
    pub(super) fn of(quantized: &Quantized<Cuda>) -> Self {
        Self {
            values: quantized.values.memory().clone(),
            scales: quantized.scales.memory().clone(),
            sums: quantized.sums.memory().clone(),
        }
    }
}

/// A norm's gain and eps.
#[derive(Clone)]
pub(super) struct Gain {
    pub(super) gain: Rc<Owned>,
    pub(super) eps: f32,
}

impl Gain {
    /// Checks that the gain is as long as the rows.
    pub(super) fn of(
        op: &'static str,
        norm: Option<ops::Norm<'_, Cuda>>,
        width: usize,
    ) -> Result<Option<Self>, RunError> {
        let Some(ops::Norm { gain, eps }) = norm else { return Ok(None) };
        ops::check_len(op, "gain", width, gain.len())?;
        Ok(Some(Self { gain: gain.memory().clone(), eps }))
    }
}

impl<'r> Recorder<'r> {
    pub(super) fn new(cuda: &'r mut Cuda, key: StepKey) -> Self {
        Self { cuda, key, ops: Vec::new() }
    }

    pub(super) fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// The launches of all ops.
    pub(super) fn finish(mut self) -> Result<Vec<Launch>, RunError> {
        let mut ops = std::mem::take(&mut self.ops);
        if self.cuda.options.fused {
            ops = fuse(ops, &self.key);
        }
        let mut launches = Vec::new();
        for op in ops {
            match op {
                Op::Launches(more) => launches.extend(more),
                Op::Quantize(op) => launches.extend(op.launches()),
                Op::Rope(op) => launches.extend(op.launches()),
                Op::Attention(op) => launches.extend(op.launches(self.cuda, &self.key)?),
            }
        }
        Ok(launches)
    }
}

/// The rotation and the append go into attention, where every sequence brings one token.
fn fuse(ops: Vec<Op>, key: &StepKey) -> Vec<Op> {
    let mut fused: Vec<Op> = Vec::with_capacity(ops.len());
    let mut rest = VecDeque::from(ops);
    while let Some(op) = rest.pop_front() {
        match op {
            Op::Rope(rope) if key.queries == 1 && rope.goes_into(rest.front()) => {
                let Some(Op::Attention(mut attention)) = rest.pop_front() else { continue };
                attention.rope = Some(rope);
                fused.push(Op::Attention(attention));
            }
            other => fused.push(other),
        }
    }
    fused
}

impl Record<Cuda> for Recorder<'_> {
    fn embed(&mut self, _op: ops::Embed<'_, Cuda>) -> Result<(), RunError> {
        super::todo::op("embed")
    }

    fn rms_norm(&mut self, _op: ops::RmsNorm<'_, Cuda>) -> Result<(), RunError> {
        super::todo::op("rms_norm")
    }

    fn rms_norm_quantize(&mut self, op: ops::RmsNormQuantize<'_, Cuda>) -> Result<(), RunError> {
        let op = Quantize::new(op)?;
        self.push(Op::Quantize(op));
        Ok(())
    }

    fn ternary_matmul(&mut self, _op: ops::TernaryMatmul<'_, Cuda>) -> Result<(), RunError> {
        super::todo::op("ternary_matmul")
    }

    fn rope_append_kv(&mut self, op: ops::RopeAppendKv<'_, Cuda>) -> Result<(), RunError> {
        let op = Rope::new(&op)?;
        self.push(Op::Rope(op));
        Ok(())
    }

    fn paged_attention(&mut self, op: ops::PagedAttention<'_, Cuda>) -> Result<(), RunError> {
        let op = Attention::new(&op)?;
        self.push(Op::Attention(Box::new(op)));
        Ok(())
    }

    fn gate_norm_quantize(&mut self, _op: ops::GateNormQuantize<'_, Cuda>) -> Result<(), RunError> {
        super::todo::op("gate_norm_quantize")
    }

    fn lm_head(&mut self, _op: ops::LmHead<'_, Cuda>) -> Result<(), RunError> {
        super::todo::op("lm_head")
    }

    fn sample(&mut self, _op: ops::Sample<'_, Cuda>) -> Result<(), RunError> {
        super::todo::op("sample")
    }

    fn score(&mut self, _op: ops::Score<'_, Cuda>) -> Result<(), RunError> {
        super::todo::op("score")
    }
}
