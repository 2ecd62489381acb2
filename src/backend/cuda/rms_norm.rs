//! [`RmsNorm`]: a block for each row.

use super::Cuda;
use super::launch::{Kernel, Launch, grid};
use crate::backend::ops::{Epilogue, RmsNorm, check_len};
use crate::error::RunError;

const KERNEL: Kernel = Kernel::new::<Args>("rms_norm", 256);

pub(super) const KERNELS: &[Kernel] = &[KERNEL];

/// `RmsNormArgs` of the kernel.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Args {
    input: u64,
    gain: u64,
    gather: u64,
    output: u64,
    width: u32,
    first: u32,
    inputs: u32,
    eps: f32,
    add: u32,
    padding: u32,
}

/// Checks the arguments of a norm, which are those of the head's norm too.
pub(super) fn check(op: &'static str, norm: &RmsNorm<'_, Cuda>) -> Result<(), RunError> {
    let RmsNorm { rows, width, input, gather, first, norm, output, .. } = norm;
    check_len(op, "output", rows * width, output.len())?;
    match gather {
        Some(gather) => check_len(op, "gather", first + rows, gather.len())?,
        None => check_len(op, "input", rows * width, input.len())?,
    }
    check_len(op, "gain", *width, norm.gain.len())
}

pub(super) fn launches(op: &RmsNorm<'_, Cuda>) -> Result<Vec<Launch>, RunError> {
    check("rms_norm", op)?;
    let RmsNorm { rows, width, input, gather, first, norm, output, epilogue } = op;
    if *rows == 0 {
        return Ok(Vec::new());
    }
    let args = Args {
        input: input.memory().address(),
        gain: norm.gain.memory().address(),
        gather: gather.map_or(0, |gather| gather.memory().address()),
        output: output.memory().address(),
        width: *width as u32,
        first: *first as u32,
        inputs: (input.len() / (*width).max(1)) as u32,
        eps: norm.eps,
        add: u32::from(*epilogue == Epilogue::Add),
        padding: 0,
    };
    let mut memory = vec![input.memory(), norm.gain.memory(), output.memory()];
    memory.extend(gather.map(|gather| gather.memory()));
    Ok(vec![Launch::new(KERNEL, grid(*rows), &args, &memory)])
}
