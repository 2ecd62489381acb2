//! [`Embed`]: a block for each row of tokens.

use super::Cuda;
use super::launch::{Kernel, Launch, grid};
use super::table::of_float;
use crate::backend::ops::{Embed, check_len};
use crate::error::RunError;

const BF16: Kernel = Kernel::new::<Args>("embed", 256).named("embed_bf16");
const F16: Kernel = Kernel::new::<Args>("embed", 256).named("embed_f16");
const F32: Kernel = Kernel::new::<Args>("embed", 256).named("embed_f32");

pub(super) const KERNELS: &[Kernel] = &[BF16, F16, F32];

/// `EmbedArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    tokens: u64,
    positions: u64,
    sequences: u64,
    sequence_lanes: u64,
    sampled: u64,
    table: u64,
    history: u64,
    output: u64,
    stride: u64,
    width: u32,
    vocabulary: u32,
    lanes: u32,
    context: u32,
    sequence_count: u32,
    scale: f32,
}

pub(super) fn launches(op: &Embed<'_, Cuda>) -> Result<Vec<Launch>, RunError> {
    const OP: &str = "embed";
    let Embed { rows, batch, lanes, table, scale, output, width } = op;
    let (rows, width) = (*rows, *width);
    check_len(OP, "tokens", rows, batch.tokens.len())?;
    check_len(OP, "positions", rows, batch.positions.len())?;
    check_len(OP, "sequences", rows, batch.sequences.len())?;
    check_len(OP, "output", rows * width, output.len())?;
    table.check(OP, None, width)?;
    if rows == 0 {
        return Ok(Vec::new());
    }
    let args = Args {
        tokens: batch.tokens.memory().address(),
        positions: batch.positions.memory().address(),
        sequences: batch.sequences.memory().address(),
        sequence_lanes: batch.lanes.memory().address(),
        sampled: lanes.sampled.memory().address(),
        table: table.memory.address(),
        history: lanes.history.memory().address(),
        output: output.memory().address(),
        stride: table.stride() as u64,
        width: width as u32,
        vocabulary: table.rows as u32,
        lanes: (lanes.history.len() / lanes.context.max(1)).min(lanes.sampled.len()) as u32,
        context: lanes.context as u32,
        sequence_count: batch.lanes.len() as u32,
        scale: *scale,
    };
    let memory = [
        batch.tokens.memory(),
        batch.positions.memory(),
        batch.sequences.memory(),
        batch.lanes.memory(),
        lanes.sampled.memory(),
        &table.memory,
        lanes.history.memory(),
        output.memory(),
    ];
    let kernel = of_float(table.float, BF16, F16, F32);
    Ok(vec![Launch::new(kernel, grid(rows), &args, &memory)])
}
