//! [`LowRank`]: a dispatch for each of its two products.

use super::dispatch::Dispatch;
use super::kernel::{Kernel, WORKGROUP};
use super::{Wgpu, grid};
use crate::backend::ops::LowRank;
use crate::error::RunError;

/// Rows of a workgroup.
pub(super) const ROWS: usize = 4;

const DOWN: Kernel = Kernel::new("low_rank", "rrw").entry("down");
const UP: Kernel = Kernel::new("low_rank", "rrw").entry("up");

pub(super) fn kernels() -> Vec<Kernel> {
    vec![DOWN, UP]
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Params {
    rows: u32,
    width: u32,
    features: u32,
    stride: u32,
    column: u32,
}

pub(super) fn dispatches(op: &LowRank<'_, Wgpu>) -> Result<Vec<Dispatch>, RunError> {
    op.check(|buffer| buffer.len())?;
    let LowRank { rows, width, rank, features, stride, column, .. } = *op;
    if rows == 0 || rank == 0 || features == 0 {
        return Ok(Vec::new());
    }
    let groups = rows.div_ceil(ROWS);
    let first = Params {
        rows: rows as u32,
        width: width as u32,
        features: rank as u32,
        stride: rank as u32,
        column: 0,
    };
    let second = Params {
        rows: rows as u32,
        width: rank as u32,
        features: features as u32,
        stride: stride as u32,
        column: column as u32,
    };
    let (inner, output) = (op.inner.raw(), op.output.raw());
    let blocks = features.div_ceil(WORKGROUP as usize);
    Ok(vec![
        Dispatch::new(DOWN, &[op.input.raw(), op.down.raw(), inner], &first, grid(rank * groups)),
        Dispatch::new(UP, &[inner, op.up.raw(), output], &second, grid(blocks * groups)),
    ])
}
