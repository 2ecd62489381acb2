//! [`Sample`]: greedy by many workgroups for each row, else a workgroup for each row; then the
//! log-probabilities, where they are wanted.

use super::dispatch::Dispatch;
use super::kernel::{Kernel, WORKGROUP};
use super::{Wgpu, grid};
use crate::backend::MAX_LOGPROBS;
use crate::backend::ops::{Sample, check_len};
use crate::error::RunError;

const OP: &str = "sample";

const PIECES: Kernel = Kernel::new("sample_greedy", "rrw").entry("pieces");
const ROWS: Kernel = Kernel::new("sample_greedy", "rrwwww").entry("rows");
const OPTIONS: Kernel = Kernel::new("sample", "rrrrrwwwww");
const LOGPROBS: Kernel = Kernel::new("sample_logprobs", "rrrwww");

/// Tokens of a row that a workgroup looks at: 8 for each thread.
pub(super) const PIECE: usize = 8 * WORKGROUP as usize;

/// The longest row whose sums the search for a cut can hold; see `prelude/select.wgsl`.
const MOST: usize = 1 << 23;

pub(super) fn kernels() -> Vec<Kernel> {
    vec![PIECES, ROWS, OPTIONS, LOGPROBS]
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct GreedyParams {
    rows: u32,
    first: u32,
    vocabulary: u32,
    pieces: u32,
    lanes: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct OptionsParams {
    rows: u32,
    first: u32,
    vocabulary: u32,
    biases: u32,
    context: u32,
    histories: u32,
    lanes: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct LogprobsParams {
    rows: u32,
    first: u32,
    vocabulary: u32,
}

pub(super) fn dispatches(
    wgpu: &mut Wgpu,
    op: &Sample<'_, Wgpu>,
) -> Result<Vec<Dispatch>, RunError> {
    let (rows, vocabulary, end) = (op.rows, op.vocabulary, op.first + op.rows);
    check_len(OP, "logits", rows * vocabulary, op.logits.len())?;
    check_len(OP, "sample_rows", end, op.batch.sample_rows.len())?;
    check_len(OP, "tokens", end, op.samples.tokens.len())?;
    check_len(OP, "logprobs", end, op.samples.logprobs.len())?;
    if op.logprobs {
        check_len(OP, "top_tokens", end * MAX_LOGPROBS, op.samples.top_tokens.len())?;
        check_len(OP, "top_logprobs", end * MAX_LOGPROBS, op.samples.top_logprobs.len())?;
    }
    if vocabulary > MOST {
        return Err(RunError::Shape {
            op: OP,
            argument: "vocabulary",
            expected: format!("at most {MOST} tokens"),
            found: vocabulary.to_string(),
        });
    }
    if rows == 0 {
        return Ok(Vec::new());
    }
    let mut dispatches = if op.greedy { greedy(wgpu, op)? } else { vec![with_options(wgpu, op)?] };
    if op.logprobs {
        let params = LogprobsParams {
            rows: rows as u32,
            first: op.first as u32,
            vocabulary: vocabulary as u32,
        };
        let bindings = [
            op.logits.raw(),
            op.batch.sample_rows.raw(),
            op.samples.tokens.raw(),
            op.samples.logprobs.raw(),
            op.samples.top_tokens.raw(),
            op.samples.top_logprobs.raw(),
        ];
        dispatches.push(Dispatch::new(LOGPROBS, &bindings, &params, grid(rows)));
    }
    Ok(dispatches)
}

fn greedy(wgpu: &mut Wgpu, op: &Sample<'_, Wgpu>) -> Result<Vec<Dispatch>, RunError> {
    let pieces = op.vocabulary.div_ceil(PIECE).max(1);
    let groups = op.rows * pieces;
    // Of each piece: the best logit and its token.
    let bests = wgpu.scratch("the best tokens of pieces", 8 * groups as u64)?;
    let params = GreedyParams {
        rows: op.rows as u32,
        first: op.first as u32,
        vocabulary: op.vocabulary as u32,
        pieces: pieces as u32,
        lanes: op.lanes.sampled.len() as u32,
    };
    let bindings = [
        op.logits.raw(),
        op.batch.sample_rows.raw(),
        &bests,
        op.samples.tokens.raw(),
        op.lanes.sampled.raw(),
        op.samples.logprobs.raw(),
    ];
    Ok(vec![
        Dispatch::new(PIECES, &bindings[..3], &params, grid(groups)),
        Dispatch::new(ROWS, &bindings, &params, grid(op.rows)),
    ])
}

fn with_options(wgpu: &mut Wgpu, op: &Sample<'_, Wgpu>) -> Result<Dispatch, RunError> {
    let Sample { batch, lanes, samples, .. } = op;
    let bytes = 4 * (op.rows * op.vocabulary) as u64;
    let orders = wgpu.scratch("rows to sample from", bytes)?;
    let counts = wgpu.scratch("counts of tokens", bytes)?;
    let params = OptionsParams {
        rows: op.rows as u32,
        first: op.first as u32,
        vocabulary: op.vocabulary as u32,
        biases: batch.bias_tokens.len().min(batch.bias_values.len()) as u32,
        context: lanes.context as u32,
        histories: (lanes.history.len() / lanes.context.max(1)) as u32,
        lanes: lanes.sampled.len() as u32,
    };
    let bindings = [
        op.logits.raw(),
        batch.sample_rows.raw(),
        batch.bias_tokens.raw(),
        batch.bias_values.raw(),
        lanes.history.raw(),
        &orders,
        &counts,
        samples.tokens.raw(),
        lanes.sampled.raw(),
        samples.logprobs.raw(),
    ];
    Ok(Dispatch::new(OPTIONS, &bindings, &params, grid(op.rows)))
}
