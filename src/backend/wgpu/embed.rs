//! [`Embed`]: a workgroup for each row of tokens, once for each piece of the table.

use super::dispatch::Dispatch;
use super::kernel::Kernel;
use super::table::{FLOATS, float_code};
use super::{Wgpu, grid};
use crate::backend::ops::{Embed, check_len};
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new("embed", "rrrrrrww");

pub(super) fn kernels() -> Vec<Kernel> {
    FLOATS.map(|float| KERNEL.with("FLOAT", float_code(float))).to_vec()
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
    lanes: u32,
    context: u32,
    sequences: u32,
    scale: f32,
}

pub(super) fn dispatches(op: &Embed<'_, Wgpu>) -> Result<Vec<Dispatch>, RunError> {
    const OP: &str = "embed";
    let Embed { rows, batch, lanes, table, scale, output, width } = op;
    let (rows, width) = (*rows, *width);
    check_len(OP, "tokens", rows, batch.tokens.len())?;
    check_len(OP, "positions", rows, batch.positions.len())?;
    check_len(OP, "sequences", rows, batch.sequences.len())?;
    check_len(OP, "output", rows * width, output.len())?;
    if table.cols != width {
        return Err(RunError::Shape {
            op: OP,
            argument: "table",
            expected: format!("{width} columns"),
            found: table.cols.to_string(),
        });
    }
    let of = |chunk: super::table::Chunk<'_>| {
        let params = Params {
            rows: rows as u32,
            width: width as u32,
            vocabulary: table.rows as u32,
            first: chunk.first as u32,
            count: chunk.rows as u32,
            stride: table.stride_words() as u32,
            lanes: (lanes.history.len() / lanes.context.max(1)).min(lanes.sampled.len()) as u32,
            context: lanes.context as u32,
            sequences: batch.lanes.len() as u32,
            scale: *scale,
        };
        let bindings = [
            batch.tokens.raw(),
            batch.positions.raw(),
            batch.sequences.raw(),
            batch.lanes.raw(),
            lanes.sampled.raw(),
            chunk.raw,
            lanes.history.raw(),
            output.raw(),
        ];
        let kernel = KERNEL.with("FLOAT", table.float_code());
        Dispatch::new(kernel, &bindings, &params, grid(rows))
    };
    Ok(table.chunks().filter(|_| rows > 0).map(of).collect())
}
