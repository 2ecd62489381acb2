//! [`LmHead`]: the norm of the gathered rows, then the product with each piece of the table.

use super::dispatch::Dispatch;
use super::kernel::{Kernel, ROWS};
use super::table::{FLOATS, float_code};
use super::{Wgpu, grid, rms_norm};
use crate::backend::ops::{Epilogue, LmHead, RmsNorm, check_len};
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new("lm_head", "rrw");

/// Rows of the table that a workgroup takes: 8 groups of 32 threads, 4 each.
pub(super) const FEATURES: usize = 32;

pub(super) fn kernels() -> Vec<Kernel> {
    let of = |rows| {
        FLOATS.map(|float| KERNEL.with("FLOAT", float_code(float)).with("ROWS", rows as u32))
    };
    ROWS.into_iter().flat_map(of).collect()
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Params {
    rows: u32,
    width: u32,
    vocabulary: u32,
    first: u32,
    count: u32,
    stride: u32,
}

pub(super) fn dispatches(wgpu: &mut Wgpu, op: LmHead<'_, Wgpu>) -> Result<Vec<Dispatch>, RunError> {
    const OP: &str = "lm_head";
    let LmHead { rows, first, width, vocabulary, batch, input, norm, table, normed, logits } = op;
    check_len(OP, "logits", rows * vocabulary, logits.len())?;
    if (table.rows, table.cols) != (vocabulary, width) {
        return Err(RunError::Shape {
            op: OP,
            argument: "table",
            expected: format!("{vocabulary} × {width}"),
            found: format!("{} × {}", table.rows, table.cols),
        });
    }
    let gather = Some(&batch.logit_rows);
    let norm = rms_norm::dispatch(
        wgpu,
        &RmsNorm {
            rows,
            width,
            input,
            gather,
            first,
            norm,
            output: normed,
            epilogue: Epilogue::Store,
        },
    )?;
    let mut dispatches = vec![norm];
    let per_group = ROWS.into_iter().find(|&most| most >= rows).unwrap_or(ROWS[3]);
    let kernel = KERNEL.with("FLOAT", table.float_code()).with("ROWS", per_group as u32);
    for chunk in table.chunks().filter(|_| rows > 0) {
        let params = Params {
            rows: rows as u32,
            width: width as u32,
            vocabulary: vocabulary as u32,
            first: chunk.first as u32,
            count: chunk.rows as u32,
            stride: table.stride_words() as u32,
        };
        let bindings = [normed.raw(), chunk.raw, logits.raw()];
        let groups = grid(chunk.rows.div_ceil(FEATURES) * rows.div_ceil(per_group));
        dispatches.push(Dispatch::new(kernel, &bindings, &params, groups));
    }
    Ok(dispatches)
}
