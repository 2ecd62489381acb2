//! The recorder: ops become dispatches, after those that follow each other were fused.

use super::Wgpu;
use super::dispatch::Dispatch;
use super::fuse::fuse;
use super::gate_norm_quantize::Gate;
use super::memory::Raw;
use super::paged_attention::Attention;
use super::rms_norm_quantize::Quantize;
use super::rope_append_kv::Rope;
use super::ternary_matmul::{FusedMatmul, Matmul};
use crate::backend::ops::{self, Quantized};
use crate::backend::{Record, StepKey};
use crate::error::RunError;

/// Records one step.
pub struct Recorder<'r> {
    pub(super) wgpu: &'r mut Wgpu,
    pub(super) key: StepKey,
    ops: Vec<Op>,
}

/// An op that is recorded, with all that its dispatches need.
pub(super) enum Op {
    /// Nothing to fuse.
    Dispatches(Vec<Dispatch>),
    Quantize(Quantize),
    Matmul(Matmul),
    Gate(Gate),
    FusedMatmul(FusedMatmul),
    Rope(Rope),
    Attention(Box<Attention>),
}

/// Quantised rows in device memory.
#[derive(Clone)]
pub(super) struct QuantizedRows {
    pub(super) values: Raw,
    pub(super) scales: Raw,
    pub(super) sums: Raw,
}

impl QuantizedRows {
    pub(super) fn of(quantized: &Quantized<Wgpu>) -> Self {
        Self {
            values: quantized.values.raw().clone(),
            scales: quantized.scales.raw().clone(),
            sums: quantized.sums.raw().clone(),
        }
    }
}

/// A norm's gain and eps.
#[derive(Clone)]
pub(super) struct Gain {
    pub(super) gain: Raw,
    pub(super) eps: f32,
}

impl Gain {
    /// Checks that the gain is as long as the rows.
    pub(super) fn of(
        op: &'static str,
        norm: Option<ops::Norm<'_, Wgpu>>,
        width: usize,
    ) -> Result<Option<Self>, RunError> {
        let Some(ops::Norm { gain, eps }) = norm else { return Ok(None) };
        ops::check_len(op, "gain", width, gain.len())?;
        Ok(Some(Self { gain: gain.raw().clone(), eps }))
    }
}

impl<'r> Recorder<'r> {
    pub(super) fn new(wgpu: &'r mut Wgpu, key: StepKey) -> Self {
        Self { wgpu, key, ops: Vec::new() }
    }

    pub(super) fn push(&mut self, op: Op) {
        self.ops.push(op);
    }

    /// The dispatches of all ops.
    pub(super) fn finish(mut self) -> Result<Vec<Dispatch>, RunError> {
        let mut ops = std::mem::take(&mut self.ops);
        if self.wgpu.options.fused {
            ops = fuse(ops, &self.key);
        }
        let mut dispatches = Vec::new();
        for op in ops {
            match op {
                Op::Dispatches(more) => dispatches.extend(more),
                Op::Quantize(op) => dispatches.push(op.dispatch(self.wgpu)?),
                Op::Matmul(op) => dispatches.extend(op.dispatches()),
                Op::Gate(op) => dispatches.push(op.dispatch(self.wgpu)?),
                Op::FusedMatmul(op) => dispatches.extend(op.dispatches(self.wgpu)?),
                Op::Rope(op) => dispatches.push(op.dispatch(self.wgpu)?),
                Op::Attention(op) => dispatches.extend(op.dispatches(self.wgpu, &self.key)?),
            }
        }
        Ok(dispatches)
    }
}

impl Wgpu {
    /// Something to bind where an op has no buffer for a kernel to read.
    pub(super) fn nothing_to_read(&mut self) -> Result<Raw, RunError> {
        self.scratch("nothing to read", 16)
    }

    /// Something to bind where an op wants no output.
    pub(super) fn nothing_to_write(&mut self) -> Result<Raw, RunError> {
        self.scratch("nothing to write", 16)
    }
}

impl Record<Wgpu> for Recorder<'_> {
    fn embed(&mut self, op: ops::Embed<'_, Wgpu>) -> Result<(), RunError> {
        let dispatches = super::embed::dispatches(&op)?;
        self.push(Op::Dispatches(dispatches));
        Ok(())
    }
    fn rms_norm(&mut self, op: ops::RmsNorm<'_, Wgpu>) -> Result<(), RunError> {
        let dispatch = super::rms_norm::dispatch(self.wgpu, &op)?;
        self.push(Op::Dispatches(vec![dispatch]));
        Ok(())
    }
    fn rms_norm_quantize(&mut self, op: ops::RmsNormQuantize<'_, Wgpu>) -> Result<(), RunError> {
        let op = Quantize::new(op)?;
        self.push(Op::Quantize(op));
        Ok(())
    }
    fn ternary_matmul(&mut self, op: ops::TernaryMatmul<'_, Wgpu>) -> Result<(), RunError> {
        let op = Matmul::new(&op)?;
        self.push(Op::Matmul(op));
        Ok(())
    }
    fn low_rank(&mut self, op: ops::LowRank<'_, Wgpu>) -> Result<(), RunError> {
        let dispatches = super::low_rank::dispatches(&op)?;
        self.push(Op::Dispatches(dispatches));
        Ok(())
    }
    fn rope_append_kv(&mut self, op: ops::RopeAppendKv<'_, Wgpu>) -> Result<(), RunError> {
        let op = Rope::new(&op)?;
        self.push(Op::Rope(op));
        Ok(())
    }
    fn paged_attention(&mut self, op: ops::PagedAttention<'_, Wgpu>) -> Result<(), RunError> {
        let op = Attention::new(&op)?;
        self.push(Op::Attention(Box::new(op)));
        Ok(())
    }
    fn gate_norm_quantize(&mut self, op: ops::GateNormQuantize<'_, Wgpu>) -> Result<(), RunError> {
        let op = Gate::new(op)?;
        self.push(Op::Gate(op));
        Ok(())
    }
    fn lm_head(&mut self, op: ops::LmHead<'_, Wgpu>) -> Result<(), RunError> {
        let dispatches = super::lm_head::dispatches(self.wgpu, op)?;
        self.push(Op::Dispatches(dispatches));
        Ok(())
    }
    fn sample(&mut self, op: ops::Sample<'_, Wgpu>) -> Result<(), RunError> {
        let dispatches = super::sample::dispatches(self.wgpu, &op)?;
        self.push(Op::Dispatches(dispatches));
        Ok(())
    }
    fn score(&mut self, op: ops::Score<'_, Wgpu>) -> Result<(), RunError> {
        let dispatches = super::score::dispatches(&op)?;
        self.push(Op::Dispatches(dispatches));
        Ok(())
    }
}
