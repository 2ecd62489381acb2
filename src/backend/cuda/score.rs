//! [`Score`]: a block for each row.

use super::Cuda;
use super::launch::{Kernel, Launch, grid};
use super::sample::ROW_THREADS;
use crate::backend::ops::{Score, check_len};
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new::<Args>("score", ROW_THREADS);

pub(super) const KERNELS: &[Kernel] = &[KERNEL];

/// `ScoreArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    logits: u64,
    targets: u64,
    logprobs: u64,
    first: u32,
    vocabulary: u32,
}

pub(super) fn launches(op: &Score<'_, Cuda>) -> Result<Vec<Launch>, RunError> {
    const OP: &str = "score";
    let Score { rows, first, vocabulary, batch, logits, samples } = op;
    check_len(OP, "logits", rows * vocabulary, logits.len())?;
    check_len(OP, "targets", first + rows, batch.targets.len())?;
    check_len(OP, "logprobs", first + rows, samples.logprobs.len())?;
    if *rows == 0 {
        return Ok(Vec::new());
    }
    let args = Args {
        logits: logits.memory().address(),
        targets: batch.targets.memory().address(),
        logprobs: samples.logprobs.memory().address(),
        first: *first as u32,
        vocabulary: *vocabulary as u32,
    };
    let memory = [logits.memory(), batch.targets.memory(), samples.logprobs.memory()];
    Ok(vec![Launch::new(KERNEL, grid(*rows), &args, &memory)])
}
