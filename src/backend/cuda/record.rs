//! The recorder: ops become launches, after those that follow each other were fused.

use std::rc::Rc;

use super::Cuda;
use super::fuse::fuse;
use super::gate_norm_quantize::Gate;
use super::launch::Launch;
use super::lm_head::Head;
use super::memory::Owned;
use super::paged_attention::Attention;
use super::rms_norm_quantize::Quantize;
use super::rope_append_kv::Rope;
use super::ternary_matmul::{FusedMatmul, Matmul};
use crate::backend::ops::{self, Quantized};
use crate::backend::{LogitUse, Record, StepKey};
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
    /// An output head, which may be screened for the op behind it.
    Head(Head),
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
                Op::Launches(more) | Op::Head(Head { launches: more, .. }) => launches.extend(more),
                Op::Quantize(op) => launches.extend(op.launches()),
                Op::Matmul(op) => launches.extend(op.launches(self.cuda)),
                Op::Gate(op) => launches.extend(op.launches(self.cuda)?),
                Op::FusedMatmul(op) => launches.push(op.launch(self.cuda)),
                Op::Rope(op) => launches.extend(op.launches()),
                Op::Attention(op) => launches.extend(op.launches(self.cuda, &self.key)?),
            }
        }
        Ok(launches)
    }
}

impl Record<Cuda> for Recorder<'_> {
    fn embed(&mut self, op: ops::Embed<'_, Cuda>) -> Result<(), RunError> {
        let launches = super::embed::launches(&op)?;
        self.push(Op::Launches(launches));
        Ok(())
    }

    fn rms_norm(&mut self, op: ops::RmsNorm<'_, Cuda>) -> Result<(), RunError> {
        let launches = super::rms_norm::launches(&op)?;
        self.push(Op::Launches(launches));
        Ok(())
    }

    fn rms_norm_quantize(&mut self, op: ops::RmsNormQuantize<'_, Cuda>) -> Result<(), RunError> {
        let op = Quantize::new(op)?;
        self.push(Op::Quantize(op));
        Ok(())
    }

    fn ternary_matmul(&mut self, op: ops::TernaryMatmul<'_, Cuda>) -> Result<(), RunError> {
        let op = Matmul::new(&op)?;
        self.push(Op::Matmul(op));
        Ok(())
    }

    fn low_rank(&mut self, op: ops::LowRank<'_, Cuda>) -> Result<(), RunError> {
        let launches = super::low_rank::launches(&op)?;
        self.push(Op::Launches(launches));
        Ok(())
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

    fn gate_norm_quantize(&mut self, op: ops::GateNormQuantize<'_, Cuda>) -> Result<(), RunError> {
        let op = Gate::new(op)?;
        self.push(Op::Gate(op));
        Ok(())
    }

    fn lm_head(&mut self, op: ops::LmHead<'_, Cuda>) -> Result<(), RunError> {
        let head = Head::new(self.cuda, op)?;
        self.push(Op::Head(head));
        Ok(())
    }

    fn sample(&mut self, op: ops::Sample<'_, Cuda>) -> Result<(), RunError> {
        super::sample::check(&op)?;
        // Where a step wants the best tokens alone, nobody reads its logits.
        let screened = match self.ops.last() {
            Some(Op::Head(Head { screened: Some(screened), .. }))
                if self.key.logits == LogitUse::Greedy && screened.serves(&op) =>
            {
                Some(screened.launches(self.cuda, &op)?)
            }
            _ => None,
        };
        let launches = match screened {
            Some(launches) => {
                self.ops.pop();
                launches
            }
            None => super::sample::launches(self.cuda, &op)?,
        };
        self.push(Op::Launches(launches));
        Ok(())
    }

    fn score(&mut self, op: ops::Score<'_, Cuda>) -> Result<(), RunError> {
        let launches = super::score::launches(&op)?;
        self.push(Op::Launches(launches));
        Ok(())
    }
}
