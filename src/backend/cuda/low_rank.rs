//! [`LowRank`]: a launch for each of its two products.

use super::Cuda;
use super::launch::{Kernel, Launch, grid};
use crate::backend::ops::LowRank;
use crate::error::RunError;

const THREADS: usize = 256;

/// Rows of a block, `LOW_RANK_ROWS` of the kernels.
const ROWS: usize = 4;

const DOWN: Kernel = Kernel::new::<Args>("low_rank", THREADS as u32).named("low_rank_down");
const UP: Kernel = Kernel::new::<Args>("low_rank", THREADS as u32).named("low_rank_up");

pub(super) const KERNELS: &[Kernel] = &[DOWN, UP];

/// `LowRankArgs` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    input: u64,
    weights: u64,
    output: u64,
    rows: u32,
    width: u32,
    features: u32,
    stride: u32,
    column: u32,
    padding: u32,
}

pub(super) fn launches(op: &LowRank<'_, Cuda>) -> Result<Vec<Launch>, RunError> {
    op.check(|buffer| buffer.len())?;
    let LowRank { rows, width, rank, features, stride, column, .. } = *op;
    if rows == 0 || rank == 0 || features == 0 {
        return Ok(Vec::new());
    }
    let (input, down, up) = (op.input.memory(), op.down.memory(), op.up.memory());
    let (inner, output) = (op.inner.memory(), op.output.memory());
    let groups = rows.div_ceil(ROWS);
    let first = Args {
        input: input.address(),
        weights: down.address(),
        output: inner.address(),
        rows: rows as u32,
        width: width as u32,
        features: rank as u32,
        stride: rank as u32,
        column: 0,
        padding: 0,
    };
    let second = Args {
        input: inner.address(),
        weights: up.address(),
        output: output.address(),
        width: rank as u32,
        features: features as u32,
        stride: stride as u32,
        column: column as u32,
        ..first
    };
    let blocks = features.div_ceil(THREADS);
    Ok(vec![
        Launch::new(DOWN, grid(rank * groups), &first, &[input, down, inner]),
        Launch::new(UP, grid(blocks * groups), &second, &[inner, up, output]),
    ])
}
