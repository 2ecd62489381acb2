//! [`Score`]: a workgroup for each row.

use super::dispatch::Dispatch;
use super::kernel::Kernel;
use super::{Wgpu, grid};
use crate::backend::ops::{Score, check_len};
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new("score", "rrw");

pub(super) fn kernels() -> Vec<Kernel> {
    vec![KERNEL]
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Params {
    rows: u32,
    first: u32,
    vocabulary: u32,
}

pub(super) fn dispatches(op: &Score<'_, Wgpu>) -> Result<Vec<Dispatch>, RunError> {
    const OP: &str = "score";
    let Score { rows, first, vocabulary, batch, logits, samples } = op;
    let (rows, first, vocabulary) = (*rows, *first, *vocabulary);
    check_len(OP, "logits", rows * vocabulary, logits.len())?;
    check_len(OP, "targets", first + rows, batch.targets.len())?;
    check_len(OP, "logprobs", first + rows, samples.logprobs.len())?;
    if rows == 0 {
        return Ok(Vec::new());
    }
    let params = Params { rows: rows as u32, first: first as u32, vocabulary: vocabulary as u32 };
    let bindings = [logits.raw(), batch.targets.raw(), samples.logprobs.raw()];
    Ok(vec![Dispatch::new(KERNEL, &bindings, &params, grid(rows))])
}
